// The backward of attention.h. Where batch entries times key/value heads are at least as many as threads, one task
// walks over all of one head's queries and sums every gradient (five products a block). Otherwise tasks that keep
// queries sum the gradient of the query, and tasks that keep keys those of key and value (seven products). Both
// add the same numbers in the same order.
#pragma once
#include "attention.h"

namespace nearfield {
namespace {

// Where a block's gradients of keys and values go: rows like those of the packed keys.
struct KeyGrads {
    float *key, *value;
};

template <class P>
void open_backward(Walk<P> &walk, State &state) {
    const nearfield_attention &p = walk.p;
    const Dims &d = walk.d;
    Work<P> &work = walk.work;
    const Lanes &lanes = state.lanes;
    int64_t bytes = item_bytes(p.dtype);
    int count = lanes.count;
    char *query[LANES], *out[LANES], *grad_out[LANES], *lse[LANES], *grad_lse[LANES];
    walk.fetch_rows(lanes, p.query, d.head, query);
    walk.fetch_rows(lanes, p.grad_out, d.value, grad_out);
    walk.fetch_rows(lanes, p.out, d.value, out);
    find_rows(p, walk.plane, walk.plan, lanes, p.lse, 4, lse);
    if (p.grad_lse.data) find_rows(p, walk.plane, walk.plan, lanes, p.grad_lse, 4, grad_lse);
    read_lanes<P>(query, count, p.dtype, d.head, work.staging, state.query);
    read_lanes<P>(grad_out, count, p.dtype, d.value, work.staging, state.grad_out);
    // rows of lanes as `scatter` reads them: floats, or bfloat16 of two lanes side by side
    auto keep_rows = [&](char *const *rows, int64_t channels, int64_t wide, float *to) {
        for (int i = 0; i < LANES; i += P::PACK, to += wide) {
            if (P::PACK == 1 && i < count)
                read_row(rows[i], p.dtype, channels, to);
            else if (i < count)
                read_pairs(rows[i], i + 1 < count ? rows[i + 1] : nullptr, channels, to);
            for (int64_t c = i < count ? channels : 0; c < wide; c++) to[c] = 0;
        }
    };
    keep_rows(query, d.head, d.head_wide, state.query_rows);
    keep_rows(grad_out, d.value, d.value_wide, state.grad_out_rows);
    memset(state.out, 0, sizeof(float) * size_t(d.head_wide) * LANES);
    for (int i = 0; i < LANES; i++) {
        state.top[i] = INFINITE, state.total[i] = 0;  // an idle or blind lane: all weights 0
        float logsum = i < count ? *reinterpret_cast<float *>(lse[i]) : -INFINITE;
        if (logsum == -INFINITE) continue;
        state.top[i] = logsum * LOG2E;
        read_row(out[i], p.dtype, d.value, work.staging);
        read_row(grad_out[i], p.dtype, d.value, work.staging_more);
        vec sum{};
        int64_t c = 0;
        for (; c + WIDTH <= d.value; c += WIDTH) sum += load(work.staging + c) * load(work.staging_more + c);
        float delta = 0;
        for (int j = 0; j < WIDTH; j++) delta += sum[j];
        for (; c < d.value; c++) delta += work.staging[c] * work.staging_more[c];
        state.total[i] = delta - (p.grad_lse.data ? *reinterpret_cast<float *>(grad_lse[i]) : 0);
    }
}

// Weights and gradients of scores of a stretch, in place.
template <bool MASK, bool BIAS>
NEARFIELD_INLINE void finish_grads(const Stretch &s, const BiasTable &bias, float scale, const State &state, float *at,
                                   float *grad_at) {
    static const int32_t all[LANES] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    const int32_t *mask = s.mask ? s.mask : all;
    int step = s.mask ? LANES : 0;
    for (int part = 0; part < PARTS; part++) {
        ivec run = load_int(s.run_mask + part * WIDTH);
        vec lse = load(state.top + part * WIDTH), delta = load(state.total + part * WIDTH);
        for (int i = 0; i < s.count; i++) {
            float *here = at + i * LANES + part * WIDTH, *grad = grad_at + i * LANES + part * WIDTH;
            vec x = load(here) * (scale * LOG2E);
            ivec seen = run;
            if (MASK) seen &= load_int(mask + i * step + part * WIDTH);
            if (BIAS) x += gather(bias.entries, bias.lane[part] + (s.bias_at + i), seen) * LOG2E;
            vec w = exp2<5>(x - lse), g = w * (load(grad) - delta);
            if (MASK) w = seen ? w : vec{}, g = seen ? g : vec{};
            if (BIAS && bias.gradient)
                for (int j = 0; j < WIDTH; j++)
                    if (seen[j] && part * WIDTH + j < state.lanes.count)
                        bias.gradient[bias.lane[part][j] + s.bias_at + i] += g[j];
            store(here, w);
            store(grad, g * scale);
        }
    }
}

// `to` NULL: only the gradient of the query; `with_query` false: only those of keys and values.
template <class P>
void backward_block(Walk<P> &walk, State &state, Block &block, bool with_query, const KeyGrads *to) {
    Work<P> &work = walk.work;
    const Dims &d = walk.d;
    int slots = block.padded();
    float *weights = work.scores, *grads = work.grads;
    scores<P>(work.key.rows, work.key.row_stride, block.row, state.query, weights, slots, int(d.head_units));
    scores<P>(work.value.rows, work.value.row_stride, block.row, state.grad_out, grads, slots, int(d.value_units));
    int first = 0;
    for (int i = 0; i < block.stretches; i++) {
        const Stretch &s = block.stretch[i];
        bool has_bias = s.bias_at != NOWHERE && walk.bias.entries;
        float *at = weights + first * LANES, *grad_at = grads + first * LANES;
        float scale = float(walk.p.scale);
        if (s.is_masked)
            has_bias ? finish_grads<true, true>(s, walk.bias, scale, state, at, grad_at)
                     : finish_grads<true, false>(s, walk.bias, scale, state, at, grad_at);
        else
            has_bias ? finish_grads<false, true>(s, walk.bias, scale, state, at, grad_at)
                     : finish_grads<false, false>(s, walk.bias, scale, state, at, grad_at);
        first += s.count;
    }
    const float *grads_by_slot = grads;
#if defined(__AVX512BF16__)
    if constexpr (P::PACK == 2) {
        for (int i = 0; i < block.slots; i += 2)
            store(work.grads_pair + i / 2 * LANES, as_pairs(load(grads + i * LANES), load(grads + (i + 1) * LANES)));
        grads_by_slot = work.grads_pair;
        if (to)
            for (int i = 0; i < slots; i++) {
                store_lanes(work.weights_lanes + i * LANES / 2, load(weights + i * LANES));
                store_lanes(work.grads_lanes + i * LANES / 2, load(grads + i * LANES));
            }
        weights = work.weights_lanes, grads = work.grads_lanes;
    }
#endif
    if (with_query)
        accumulate<P>(work.key.pairs, work.key.pair_stride, block.row, grads_by_slot, state.out, int(d.head),
                      block.slots / P::PACK);
    if (to) {
        scatter<P>(weights, block.row, state.grad_out_rows, to->value, d.value_wide, slots);
        scatter<P>(grads, block.row, state.query_rows, to->key, d.head_wide, slots);
    }
}

template <class P>
void write_query_grads(Walk<P> &walk) {
    const nearfield_attention &p = walk.p;
    alignas(64) float ones[LANES];
    for (float &x : ones) x = 1;
    for (int64_t r = 0; r < walk.rows; r++) {
        const State &state = walk.work.state[r];
        char *rows[LANES];
        find_rows(p, walk.plane, walk.plan, state.lanes, p.grad_query, item_bytes(p.dtype), rows);
        write_lanes(state.out, walk.d.head, ones, rows, state.lanes.count, p.dtype, walk.work.staging);
    }
}

// Sums of a unit to the gradients of its tokens; a sink's, summed apart, joins its token's.
template <class P>
void write_unit_grads(Walk<P> &walk, const Box &whole, const KeyGrads &from, const int32_t *sinks, const float *sink_grads) {
    const nearfield_attention &p = walk.p;
    const Dims &d = walk.d;
    int64_t side_y = whole.to[1] - whole.from[1], side_x = whole.to[2] - whole.from[2];
    for (int64_t z = whole.from[0]; z < whole.to[0]; z++)
        for (int64_t y = whole.from[1]; y < whole.to[1]; y++)
            for (int64_t x = whole.from[2]; x < whole.to[2]; x++) {
                if (walk.source.is_outside(z, y, x)) continue;
                int64_t row = ((z - whole.from[0]) * side_y + y - whole.from[1]) * side_x + x - whole.from[2];
                float *key = from.key + row * d.head_wide, *value = from.value + row * d.value_wide;
                int64_t token = walk.source.token(2, x), bytes = item_bytes(p.dtype);
                if (walk.source.is_masked(z, y, x)) {
                    for (int64_t c = 0; c < d.head_wide; c++) key[c] = 0;
                    for (int64_t c = 0; c < d.value_wide; c++) value[c] = 0;
                }
                for (int64_t i = 0; sinks && i < num_sinks(p) && sinks[i] >= 0 && sinks[i] <= token; i++)
                    if (sinks[i] == token) {
                        const float *more = sink_grads + i * (d.head_wide + d.value_wide);
                        for (int64_t c = 0; c < d.head_wide; c++) key[c] += more[c];
                        for (int64_t c = 0; c < d.value_wide; c++) value[c] += more[d.head_wide + c];
                    }
                int64_t b = walk.plane.batch, h = walk.plane.kv_head;
                int64_t place[2] = {walk.source.token(0, z), walk.source.token(1, y)};
                write_row(key, d.head, address(p.grad_key, bytes, b, place[0], place[1], token, h), p.dtype);
                write_row(value, d.value, address(p.grad_value, bytes, b, place[0], place[1], token, h), p.dtype);
            }
}

template <class P>
void write_additional_grads(Walk<P> &walk, int64_t first, int64_t keys, const KeyGrads &from) {
    const nearfield_attention &p = walk.p;
    int64_t b = walk.plane.batch, h = walk.plane.kv_head, bytes = item_bytes(p.dtype);
    for (int64_t i = 0; i < keys; i++) {
        write_row(from.key + i * walk.d.head_wide, walk.d.head, address(p.grad_additional_key, bytes, b, 0, 0, first + i, h), p.dtype);
        write_row(from.value + i * walk.d.value_wide, walk.d.value, address(p.grad_additional_value, bytes, b, 0, 0, first + i, h), p.dtype);
    }
}

// Memory behind a task's own working memory: sums of gradients of keys.
template <class P>
struct Sums {
    float *key, *value;      // [units of a plane][rows of a unit + 1]
    float *listed;           // [sinks + additional keys], each a key's and a value's sum

    void place(Arena &arena, const Walk<P> &walk, int64_t units, int64_t lists) {
        int64_t rows = units * (walk.plan.unit_rows() + 1);
        key = arena.take<float>(rows * walk.d.head_wide);
        value = arena.take<float>(rows * walk.d.value_wide);
        listed = arena.take<float>(lists);
    }
};

enum Phase { LISTS, WHOLE_HEADS, QUERIES, KEYS };

// Floats of the sums of listed keys; each list of SLOTS has a row more, for padding.
inline int64_t list_floats(const Dims &d, int64_t keys) {
    return keys ? (ceil_div(keys, int64_t(SLOTS)) * (SLOTS + 1)) * (d.head_wide + d.value_wide) : 0;
}

struct BackwardJob : Job {
    Phase phase;
};

template <class P>
void backward_task(void *context, int64_t task, void *memory) {
    const BackwardJob &job = *static_cast<BackwardJob *>(context);
    int64_t number = find_problem(job, &task);
    Walk<P> walk(job, number);
    const Plan &plan = walk.plan;
    const nearfield_attention &p = walk.p;
    const Dims &d = walk.d;
    Arena arena(memory);
    walk.work.place(arena, d, plan.unit_rows(), plan.rows_in_tile(), true);
    Sums<P> sums;
    int64_t lists = list_floats(d, num_sinks(p)) + list_floats(d, p.num_additional);
    sums.place(arena, walk, job.phase == WHOLE_HEADS ? plan.units_of_plane() : job.phase == KEYS ? 1 : 0,
               job.phase == LISTS ? lists : 0);
    int64_t within = job.phase == QUERIES ? plan.tiles_of_plane() * plan.planes
                     : job.phase == KEYS  ? plan.units_of_plane() * plan.planes
                                          : 1;
    // heads first: their rows of the same tokens lie side by side in memory
    int64_t kv_head = task % p.kv_heads, part = task / p.kv_heads % within, batch = task / p.kv_heads / within;
    int64_t head = batch * p.kv_heads + kv_head;
    const int32_t *sinks = job.sinks && job.sinks[number] ? job.sinks[number] + batch * num_sinks(p) : nullptr;
    float *sink_grads = sinks ? job.sink_grads[number] + head * num_sinks(p) * (d.head_wide + d.value_wide) : nullptr;
    int64_t unit_row = plan.unit_rows() + 1;
    auto unit_sums = [&](int64_t unit) {
        return KeyGrads{sums.key + unit * unit_row * d.head_wide, sums.value + unit * unit_row * d.value_wide};
    };
    auto open = [&](int64_t tile, const Box *wanted = nullptr) {
        if (!walk.open_tile(tile, wanted)) return false;
        for (int64_t i = 0; i < walk.rows; i++) open_backward(walk, walk.work.state[i]);
        return true;
    };

    if (job.phase == QUERIES) {
        walk.enter(batch, kv_head, part / plan.tiles_of_plane());
        if (!open(part % plan.tiles_of_plane())) return;
        walk.visit_all(sinks, true, true, [&](State &state, Block &block, int64_t) {
            backward_block(walk, state, block, true, nullptr);
        });
        write_query_grads(walk);
        return;
    }
    if (job.phase == KEYS) {
        walk.enter(batch, kv_head, part / plan.units_of_plane());
        Box whole = unit_box(plan, walk.plane, part % plan.units_of_plane());
        if (whole.empty()) return;
        KeyGrads to = unit_sums(0);
        memset(to.key, 0, sizeof(float) * size_t(unit_row * d.head_wide));
        memset(to.value, 0, sizeof(float) * size_t(unit_row * d.value_wide));
        walk.work.key.fill(walk.source, p.key, d.head, whole, whole, true, false);
        walk.work.value.fill(walk.source, p.value, d.value, whole, whole, true, false);
        for (int64_t tile = 0; tile < plan.tiles_of_plane(); tile++) {
            if (!open(tile, &whole)) continue;
            walk.visit_unit(whole, [&](State &state, Block &block) { backward_block(walk, state, block, false, &to); });
        }
        write_unit_grads(walk, whole, to, sinks, sink_grads);
        return;
    }
    if (job.phase == LISTS) {
        memset(sums.listed, 0, sizeof(float) * size_t(lists));
        int64_t list = (SLOTS + 1) * (d.head_wide + d.value_wide), sink_lists = ceil_div(num_sinks(p), int64_t(SLOTS));
        auto list_sums = [&](int64_t first) {  // keys of lists of SLOTS, sinks before additional keys
            bool is_sink = first < num_sinks(p);
            float *at = sums.listed + (is_sink ? first / SLOTS : sink_lists + (first - num_sinks(p)) / SLOTS) * list;
            return KeyGrads{at, at + (SLOTS + 1) * d.head_wide};
        };
        for (int64_t plane = 0; plane < plan.planes; plane++)
            for (int64_t tile = 0; tile < plan.tiles_of_plane(); tile++) {
                walk.enter(batch, kv_head, plane);
                if (!open(tile)) continue;
                walk.visit_lists(sinks, false, true, [&](State &state, Block &block, int64_t first) {
                    KeyGrads to = list_sums(first);
                    backward_block(walk, state, block, false, &to);
                });
            }
        walk.enter(batch, kv_head, 0);
        for (int64_t first = 0; first < p.num_additional; first += SLOTS)
            write_additional_grads(walk, first, least(p.num_additional - first, int64_t(SLOTS)), list_sums(num_sinks(p) + first));
        for (int64_t i = 0; sinks && i < num_sinks(p); i++) {
            KeyGrads from = list_sums(i / SLOTS * SLOTS);
            float *to = sink_grads + i * (d.head_wide + d.value_wide);
            memcpy(to, from.key + i % SLOTS * d.head_wide, sizeof(float) * size_t(d.head_wide));
            memcpy(to + d.head_wide, from.value + i % SLOTS * d.value_wide, sizeof(float) * size_t(d.value_wide));
        }
        return;
    }
    for (int64_t plane = 0; plane < plan.planes; plane++) {  // WHOLE_HEADS
        walk.enter(batch, kv_head, plane);
        if (p.grad_bias) walk.bias.gradient = job.bias_parts[number] + head * plan.group * bias_size(p);
        memset(sums.key, 0, sizeof(float) * size_t(plan.units_of_plane() * unit_row * d.head_wide));
        memset(sums.value, 0, sizeof(float) * size_t(plan.units_of_plane() * unit_row * d.value_wide));
        for (int64_t tile = 0; tile < plan.tiles_of_plane(); tile++) {
            if (!open(tile)) continue;
            walk.visit_all(sinks, true, true, [&](State &state, Block &block, int64_t unit) {
                KeyGrads to = unit < 0 ? KeyGrads{} : unit_sums(unit);
                backward_block(walk, state, block, true, unit < 0 ? nullptr : &to);
            });
            write_query_grads(walk);
        }
        for (int64_t unit = 0; unit < plan.units_of_plane(); unit++) {
            Box whole = unit_box(plan, walk.plane, unit);
            if (!whole.empty()) write_unit_grads(walk, whole, unit_sums(unit), sinks, sink_grads);
        }
    }
}

}  // namespace
}  // namespace nearfield
