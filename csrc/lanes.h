// Sixteen queries side by side and the keys that they see, as blocks of slots.
//
// A slot is one key for all lanes. Slots of a block are runs of neighbours on axis x; where not every lane sees
// every key of a stretch, the stretch has a mask for each axis, and the scores of the others become -inf.
#pragma once
#include "rows.h"

namespace nearfield {
namespace {

constexpr int SLOTS = 256;           // of a block: its scores stay in the first-level cache
constexpr int SHORT_RUN = 48;        // shorter runs are masked whole: cutting them costs more than the masks
constexpr int NOWHERE = INT32_MIN;   // no entry of the bias table

struct alignas(64) Lanes {
    int32_t start[3][LANES], end[3][LANES];  // windows
    int32_t position[3][LANES], head[LANES];
    int64_t from[3], to[3];          // keys that some lane sees
    int64_t all_from[3], all_to[3];  // keys that all lanes see
    float padding[LANES];            // zero keys outside the grid, where they have no bias
    int32_t count;                   // the lanes behind are idle: they repeat the last one and count nothing
};

inline void make_lanes(const Plan &plan, const Plane &plane, const int64_t *box, int64_t head_box, Lanes &lanes) {
    int64_t sides[4], at[4];
    for (int a = 0; a < 3; a++) {
        int64_t stop;
        plane.axis[a].box(plan.box[a], box[a], &at[a], &stop);
        sides[a] = most(stop - at[a], int64_t(0));
        lanes.from[a] = lanes.all_from[a] = lanes.to[a] = lanes.all_to[a] = 0;
        if (!sides[a]) continue;
        plane.axis[a].window(at[a], &lanes.from[a], &lanes.all_to[a]);
        plane.axis[a].window(at[a] + sides[a] - 1, &lanes.all_from[a], &lanes.to[a]);
    }
    at[3] = head_box * plan.box[3];
    sides[3] = least(plan.box[3], plan.group - at[3]);
    int32_t start[3][LANES], end[3][LANES];
    for (int a = 0; a < 3; a++)
        for (int64_t i = 0; i < sides[a]; i++) {
            int64_t first, last;
            plane.axis[a].window(at[a] + i, &first, &last);
            start[a][i] = int32_t(first), end[a][i] = int32_t(last);
        }
    int32_t n = 0, place[3];
    auto set = [&](int i, int a) {
        lanes.position[a][i] = int32_t(at[a]) + place[a];
        lanes.start[a][i] = start[a][place[a]], lanes.end[a][i] = end[a][place[a]];
    };
    for (place[0] = 0; place[0] < sides[0]; place[0]++)
        for (place[1] = 0; place[1] < sides[1]; place[1]++)
            for (place[2] = 0; place[2] < sides[2]; place[2]++)
                for (int64_t h = 0; h < sides[3]; h++, n++) {
                    lanes.head[n] = int32_t(at[3] + h);
                    for (int a = 0; a < 3; a++) set(n, a);
                }
    lanes.count = n;
    bool pads = plan.problem->border == NEARFIELD_PAD && !plan.problem->bias;
    for (int i = 0; i < LANES; i++) {
        double all = 1, inside = 1;
        for (int a = 0; pads && i < n && a < 3; a++) {
            all *= double(plane.axis[a].padded_size(lanes.position[a][i]));
            inside *= double(lanes.end[a][i] - lanes.start[a][i]);
        }
        lanes.padding[i] = float(all - inside);
    }
    for (int a = 0; a < 3; a++) place[a] = int32_t(sides[a]) - 1;
    for (int i = n; n && i < LANES; i++) {
        lanes.head[i] = lanes.head[n - 1];
        for (int a = 0; a < 3; a++) set(i, a);
    }
}

// Slots of one run with the same masks.
struct alignas(64) Stretch {
    int32_t run_mask[LANES];  // of the axes z and y
    const int32_t *mask;      // [count][LANES] of axis x, or NULL
    int32_t count, bias_at;   // slots; entry of the bias table for the first slot and lane offset 0, or NOWHERE
    bool is_masked;
};

struct Block {
    int32_t row[SLOTS + LANES];  // of the packed keys
    Stretch stretch[SLOTS];
    int32_t slots, stretches, trash;

    void clear() { slots = stretches = 0; }
    void push(int64_t first_row, int count, const int32_t *run_mask, const int32_t *mask, int64_t bias_at) {
        Stretch &s = stretch[stretches++];
        for (int i = 0; i < count; i++) row[slots + i] = int32_t(first_row) + i;
        slots += count;
        s.mask = mask, s.count = count, s.bias_at = int32_t(bias_at);
        s.is_masked = run_mask || mask;
        for (int i = 0; i < LANES; i += WIDTH)
            store_int(s.run_mask + i, run_mask ? load_int(run_mask + i) : splat_int(-1));
    }
    // A slot that nobody sees, so that the next run begins at an even one.
    void push_blank() {
        static const int32_t none[LANES] = {};
        push(trash, 1, none, nullptr, NOWHERE);
    }
    // Rows behind the last slot, so that products may run over whole groups.
    int padded() {
        int whole = round_up(int(slots), ROWS);
        for (int i = slots; i < whole; i++) row[i] = trash;
        return whole;
    }
};

struct Masks {
    int32_t axis[3][UNIT_ROWS][LANES];
};

inline void mask_axis(const Lanes &lanes, int a, int64_t from, int64_t to, int32_t (*mask)[LANES]) {
    for (int64_t key = from; key < to; key++, mask++)
        for (int i = 0; i < LANES; i += WIDTH) {
            ivec start = load_int(lanes.start[a] + i), end = load_int(lanes.end[a] + i), at = splat_int(int32_t(key));
            store_int(*mask + i, (ivec)(start <= at) & (ivec)(at < end));
        }
}

struct BiasTable {
    const float *entries;     // of the first head of the group; NULL: none
    float *gradient;          // the same places, or NULL
    int64_t side[3];          // 2 * kernel_size - 1
    ivec lane[PARTS];         // the entry of each lane for the key at 0, 0, 0

    void set_lanes(const nearfield_attention &p, const Lanes &lanes) {
        if (!entries) return;
        alignas(64) int32_t at[LANES];
        for (int i = 0; i < LANES; i++) {
            int64_t entry = lanes.head[i];
            for (int a = 0; a < 3; a++) entry = entry * side[a] + p.axis[a].kernel_size - 1 - lanes.position[a][i];
            at[i] = int32_t(entry);
        }
        for (int j = 0; j < PARTS; j++) lane[j] = load_int(at + j * WIDTH);
    }
};

// Calls `run(block)` for blocks that together hold each key of the unit `whole` that some lane sees, once.
template <class P, class Run>
inline void for_each_block(const Lanes &lanes, const Source &source, const Box &whole, const BiasTable &bias, Masks &masks,
                           Block &block, Run run) {
    Box seen;
    for (int a = 0; a < 3; a++) seen.from[a] = lanes.from[a], seen.to[a] = lanes.to[a];
    seen = common(seen, whole);
    if (seen.empty()) return;
    int64_t side_y = whole.to[1] - whole.from[1], side_x = whole.to[2] - whole.from[2];
    for (int a = 0; a < 2; a++) mask_axis(lanes, a, seen.from[a], seen.to[a], masks.axis[a]);
    int64_t full_from = most(lanes.all_from[2], seen.from[2]), full_to = least(lanes.all_to[2], seen.to[2]);
    bool whole_runs = full_from <= seen.from[2] && seen.to[2] <= full_to;
    if (!whole_runs && (seen.to[2] - seen.from[2] < SHORT_RUN || full_to - full_from < SHORT_RUN / 2))
        full_from = full_to = seen.to[2];
    int32_t(*mask_x)[LANES] = masks.axis[2];
    mask_axis(lanes, 2, seen.from[2], full_from, mask_x);
    mask_axis(lanes, 2, full_to, seen.to[2], mask_x + (full_to - seen.from[2]));

    block.clear();
    auto add = [&](int64_t row, int64_t x, int64_t stop, const int32_t *run_mask, int64_t bias_at) {
        // [x, stop) of one run, cut where masks begin and end and where the block is full
        while (x < stop) {
            bool is_full = full_from <= x && x < full_to;
            int64_t end = least(stop, x < full_from ? full_from : is_full ? full_to : stop);
            end = least(end, x + SLOTS - block.slots);
            const int32_t *mask = is_full ? nullptr : mask_x[x - seen.from[2]];
            block.push(row + x, int(end - x), run_mask, mask, bias_at == NOWHERE ? NOWHERE : bias_at + x);
            x = end;
            if (block.slots == SLOTS) run(block), block.clear();
        }
        if (P::PACK == 2 && block.slots % 2) block.push_blank();
        if (block.slots == SLOTS) run(block), block.clear();
    };
    for (int64_t z = seen.from[0]; z < seen.to[0]; z++)
        for (int64_t y = seen.from[1]; y < seen.to[1]; y++) {
            alignas(64) int32_t both[LANES];
            for (int i = 0; i < LANES; i += WIDTH)
                store_int(both + i, load_int(masks.axis[0][z - seen.from[0]] + i) & load_int(masks.axis[1][y - seen.from[1]] + i));
            bool is_full = lanes.all_from[0] <= z && z < lanes.all_to[0] && lanes.all_from[1] <= y && y < lanes.all_to[1];
            const int32_t *run_mask = is_full ? nullptr : both;
            int64_t row = ((z - whole.from[0]) * side_y + y - whole.from[1]) * side_x - whole.from[2];
            int64_t bias_at = bias.entries ? (z * bias.side[1] + y) * bias.side[2] : NOWHERE;
            if (!source.problem->key_mask) {
                add(row, seen.from[2], seen.to[2], run_mask, bias_at);
                continue;
            }
            for (int64_t x = seen.from[2]; x < seen.to[2];) {  // runs of keys that are not masked
                int64_t stop = x;
                while (stop < seen.to[2] && !source.is_masked(z, y, stop)) stop++;
                if (stop > x) add(row, x, stop, run_mask, bias_at);
                x = most(stop, x + 1);
            }
        }
    if (block.slots) run(block);
}

// The same for a list of keys: additional ones, or sinks, which count only outside a lane's window.
template <class P, class Run>
inline void for_each_listed(const Lanes &lanes, const Source &source, int64_t keys, Masks &masks, Block &block, Run run) {
    const nearfield_axis &axis = source.problem->axis[2];
    for (int64_t first = 0; first < keys; first += SLOTS) {
        int count = int(least(keys - first, int64_t(SLOTS)));
        for (int j = 0; source.tokens && j < count; j++) {
            int64_t token = source.tokens[first + j];
            bool same_group = token % axis.dilation == source.plane->group[2];
            ivec at = splat_int(int32_t(token / axis.dilation));
            for (int i = 0; i < LANES; i += WIDTH) {
                ivec outside = splat_int(-1);
                if (same_group)
                    outside = ~((ivec)(load_int(lanes.start[2] + i) <= at) & (ivec)(at < load_int(lanes.end[2] + i)));
                if (axis.is_causal) {  // token <= position * dilation + group
                    int64_t reach = token - source.plane->group[2];
                    int32_t earliest = reach <= 0 ? 0 : int32_t(ceil_div(reach, axis.dilation));
                    outside &= (ivec)(load_int(lanes.position[2] + i) >= splat_int(earliest));
                }
                store_int(masks.axis[2][j] + i, outside);
            }
        }
        block.clear();
        block.push(first, count, nullptr, source.tokens ? masks.axis[2][0] : nullptr, NOWHERE);
        if (P::PACK == 2 && block.slots % 2) block.push_blank();
        run(block);
    }
}

}  // namespace
}  // namespace nearfield
