// Neighborhood attention, forward and backward, over the blocks of lanes.h. Softmax is exact and online: a block's
// maximum rescales what earlier blocks left. Each result is a sum in one fixed order, whatever the threads do.
#pragma once
#include <cstdlib>

#include "lanes.h"
#include "parallel.h"

namespace nearfield {
namespace {

struct Dims {  // of the working arrays, in units of 4 bytes
    int64_t head, value;              // channels
    int64_t head_units, value_units;  // units of a packed row of channels
    int64_t head_wide, value_wide;    // channels up to whole rows of lanes
};

template <class P>
Dims make_dims(const nearfield_attention &p) {
    Dims d;
    d.head = p.head_dim, d.value = p.value_dim;
    d.head_units = ceil_div(d.head, int64_t(P::PACK)), d.value_units = ceil_div(d.value, int64_t(P::PACK));
    d.head_wide = round_up(d.head, int64_t(LANES)), d.value_wide = round_up(d.value, int64_t(LANES));
    return d;
}

// The state of one row of lanes.
struct State {
    Lanes lanes;
    float *query, *out;                // [units][LANES]; backward: `out` is the gradient of the query
    alignas(64) float top[LANES];      // forward: maximum; backward: log-sum-exp, both in powers of two
    alignas(64) float total[LANES];    // forward: sum of weights; backward: rowsum(grad_out * out) - grad_lse
    alignas(64) float scale[LANES];    // forward: factor on `out` besides 1 / total
    float *grad_out;                   // [units][LANES]
    bool is_ahead;                     // forward: what the row needs later is on its way
    float *query_rows, *grad_out_rows; // [LANES / PACK][channels], lanes in pairs for bfloat16
};

// `sinks[batch]`: tokens of the sinks, the first unmasked keys of each row; -1 behind the last.
struct Job {
    const nearfield_attention *problems;
    Plan *plans;
    int64_t *first_task;   // [count + 1]
    int32_t **sinks;       // one table a problem, or NULL
    float **sink_grads;    // backward: [batch][kv_head][sinks][head_wide + value_wide], or NULL
    float **bias_parts;    // backward: [batch][heads][table], or NULL
    int64_t count;
};

inline int64_t num_sinks(const nearfield_attention &p) { return least(p.num_sinks, p.axis[2].size); }

inline int64_t bias_size(const nearfield_attention &p) {
    return (2 * p.axis[0].kernel_size - 1) * (2 * p.axis[1].kernel_size - 1) * (2 * p.axis[2].kernel_size - 1);
}

// The working memory of one thread.
template <class P>
struct Work {
    Packed<P> key, value;
    float *scores, *grads;           // [SLOTS][LANES]
    float *weights_pair, *grads_pair, *weights_lanes, *grads_lanes;  // bfloat16 pairs of slots, of lanes
    float *staging, *staging_more;   // [LANES][channels]
    State *state;
    Masks *masks;
    Block *block;
    Box box;

    // `keys`: rows of the largest unit; `rows`: of the largest tile.
    void place(Arena &arena, const Dims &d, int64_t keys, int64_t rows, bool backward) {
        keys = most(keys, int64_t(SLOTS));  // lists come in blocks
        int64_t slot_floats = int64_t(SLOTS + LANES) * LANES;
        key.place(arena.take<float>((keys + 1) * (key.row_size(d.head) + key.pair_size(d.head))), keys, d.head);
        value.place(arena.take<float>((keys + 1) * (value.row_size(d.value) + value.pair_size(d.value))), keys, d.value);
        scores = arena.take<float>(slot_floats);
        grads = backward ? arena.take<float>(slot_floats) : nullptr;
        weights_pair = grads_pair = weights_lanes = grads_lanes = nullptr;
        if (P::PACK == 2) {
            weights_pair = arena.take<float>(slot_floats / 2);
            if (backward) grads_pair = arena.take<float>(slot_floats / 2);
            if (backward) weights_lanes = arena.take<float>(slot_floats / 2);
            if (backward) grads_lanes = arena.take<float>(slot_floats / 2);
        }
        staging = arena.take<float>(LANES * most(d.head_wide, d.value_wide));
        staging_more = arena.take<float>(LANES * most(d.head_wide, d.value_wide));
        masks = arena.take<Masks>(1);
        block = arena.take<Block>(1);
        state = arena.take<State>(rows);
        for (int64_t i = 0; i < rows; i++) {
            float *parts[5] = {};
            int64_t sizes[5] = {d.head_wide, backward ? d.head_wide : d.value_wide, d.value_wide, d.head_wide, d.value_wide};
            for (int j = 0; j < (backward ? 5 : 2); j++) parts[j] = arena.take<float>(sizes[j] * LANES);
            if (!arena.base) continue;
            State &s = state[i];
            s.query = parts[0], s.out = parts[1], s.grad_out = parts[2], s.query_rows = parts[3], s.grad_out_rows = parts[4];
        }
    }
};

// Bytes of one row of lanes and of one packed key: what plans weigh against the caches.
template <class P>
int64_t row_bytes(const Dims &d, bool backward) {
    int64_t floats = d.head_wide + (backward ? 2 * d.head_wide + 2 * d.value_wide : d.value_wide);
    return floats * LANES * 4 + int64_t(sizeof(State));
}
template <class P>
int64_t key_bytes(const Dims &d, bool backward) {
    int64_t floats = Packed<P>::row_size(d.head) + (P::PACK == 2 && !backward ? 0 : Packed<P>::row_size(d.value));
    if (P::PACK == 2) floats += Packed<P>::pair_size(backward ? d.head : d.value);
    return 4 * (floats + (backward ? d.head_wide + d.value_wide : 0));
}

// Addresses of the lanes' rows in a tensor of queries.
inline void find_rows(const nearfield_attention &p, const Plane &plane, const Plan &plan, const Lanes &lanes,
                      const nearfield_tensor &x, int64_t bytes, char **rows) {
    int64_t step[3];
    for (int a = 0; a < 3; a++) step[a] = bytes * x.stride[a + 1] * p.axis[a].dilation;
    int64_t first = bytes * (plane.batch * x.stride[0] + plane.group[0] * x.stride[1] + plane.group[1] * x.stride[2] +
                             (plane.group[2] - p.first_query) * x.stride[3] + plane.kv_head * plan.group * x.stride[4]);
    for (int i = 0; i < lanes.count; i++) {
        int64_t at = lanes.position[0][i] * step[0] + lanes.position[1][i] * step[1] + lanes.position[2][i] * step[2] +
                     lanes.head[i] * bytes * x.stride[4];
        rows[i] = static_cast<char *>(x.data) + (first + at);
    }
}

// The lanes' rows as units [units][LANES]; idle lanes are zeros.
template <class P>
void read_lanes(char *const *rows, int count, int64_t dtype, int64_t channels, float *staging, float *to) {
    int64_t units = round_up(ceil_div(channels, int64_t(P::PACK)), int64_t(LANES));
    bool in_place = units * P::PACK == channels && (P::PACK == 2 || dtype == NEARFIELD_F32);
    const float *from[LANES];
    for (int i = 0; i < LANES; i++) {
        float *row = staging + (in_place ? 0 : i * units);
        if (i >= count)
            memset(row, 0, 4 * units);
        else if (!in_place)
            read_units<P>(rows[i], dtype, channels, row, units);
        from[i] = in_place && i < count ? reinterpret_cast<const float *>(rows[i]) : row;
    }
    transpose_in(from, units, to);
}

// [channels][LANES] times a factor of each lane to the lanes' rows.
inline void write_lanes(const float *from, int64_t channels, const float *factor, char *const *rows, int count, int64_t dtype,
                        float *staging) {
    int64_t wide = round_up(channels, int64_t(LANES));
    bool in_place = wide == channels && dtype == NEARFIELD_F32;
    float *to[LANES];
    for (int i = 0; i < LANES; i++) to[i] = in_place && i < count ? reinterpret_cast<float *>(rows[i]) : staging + i * wide;
    transpose_out(from, wide, factor, to, count);
    for (int i = 0; !in_place && i < count; i++) write_row(to[i], channels, rows[i], dtype);
}

// What one kernel does on one thread: the task's plane, its tile of rows, the walk over its keys.
template <class P>
struct Walk {
    const nearfield_attention &p;
    const Plan &plan;
    const Dims d;
    Plane plane;
    Work<P> work;
    BiasTable bias;
    Source source;
    int64_t rows = 0;
    Box reach;  // keys that some row of the tile sees

    Walk(const Job &job, int64_t number) : p(job.problems[number]), plan(job.plans[number]), d(make_dims<P>(p)) {}

    void enter(int64_t batch, int64_t kv_head, int64_t number) {
        plane = make_plane(plan, batch, kv_head, number);
        source = Source{&p, &plane, nullptr, false};
        bias.gradient = nullptr;
        bias.entries = p.bias ? p.bias + kv_head * plan.group * bias_size(p) : nullptr;
        for (int a = 0; a < 3; a++) bias.side[a] = 2 * p.axis[a].kernel_size - 1;
    }

    // The rows of a tile, without their channels. False if it has no queries, or none that sees a key of `wanted`.
    bool open_tile(int64_t tile, const Box *wanted = nullptr) {
        int64_t first[3];
        for (int a = 2; a >= 0; a--) {
            const PlaneAxis &axis = plane.axis[a];
            first[a] = tile % plan.tiles[a] * plan.tile[a], tile /= plan.tiles[a];
            int64_t from, to, last = least(first[a] + plan.tile[a], axis.boxes(plan.box[a])) - 1, unused;
            if (last < first[a]) return false;
            axis.box(plan.box[a], first[a], &from, &unused);
            axis.box(plan.box[a], last, &unused, &to);
            axis.window(from, &reach.from[a], &unused);
            axis.window(to - 1, &unused, &reach.to[a]);
        }
        if (wanted && common(reach, *wanted).empty()) return false;
        rows = 0;
        for (int64_t z = 0; z < plan.tile[0]; z++)
            for (int64_t y = 0; y < plan.tile[1]; y++)
                for (int64_t x = 0; x < plan.tile[2]; x++) {
                    int64_t box[3] = {first[0] + z, first[1] + y, first[2] + x};
                    for (int64_t h = 0; h < plan.head_boxes; h++) {
                        Lanes &lanes = work.state[rows].lanes;
                        make_lanes(plan, plane, box, h, lanes);
                        if (!lanes.count) break;
                        rows++;
                    }
                }
        return rows > 0;
    }

    // Addresses of the lanes' rows in a tensor of queries, which begin to move into the cache.
    void fetch_rows(const Lanes &lanes, const nearfield_tensor &x, int64_t channels, char **to) const {
        int64_t bytes = item_bytes(p.dtype);
        find_rows(p, plane, plan, lanes, x, bytes, to);
        for (int i = 0; i < lanes.count; i++) prefetch(to[i], 0, channels * bytes);
    }

    // Begins to move what will be needed while the processor computes: the lanes' own output rows, and the same tokens
    // of the next head, which is the next task.
    void fetch_ahead(const Lanes &lanes) const {
        int64_t bytes = item_bytes(p.dtype), next = plane.kv_head + 1;
        char *rows[LANES];
        find_rows(p, plane, plan, lanes, p.out, bytes, rows);
        for (int i = 0; i < lanes.count; i++)
            for (int64_t at = 0; at < bytes * d.value; at += 64) __builtin_prefetch(rows[i] + at, 1);
        if (next == p.kv_heads) return;
        find_rows(p, plane, plan, lanes, p.query, bytes, rows);
        for (int i = 0; i < lanes.count; i++) prefetch(rows[i], bytes * plan.group * p.query.stride[4], bytes * d.head);
        for (int i = 0; i < lanes.count; i += int(plan.box[3])) {
            int64_t at[3];
            for (int a = 0; a < 3; a++) at[a] = source.token(a, most(lanes.position[a][i], 0));
            prefetch(address(p.key, bytes, plane.batch, at[0], at[1], at[2], next), 0, bytes * d.head);
            prefetch(address(p.value, bytes, plane.batch, at[0], at[1], at[2], next), 0, bytes * d.value);
        }
    }

    // Calls `run(state, block, unit)` for all blocks of one unit, packed before.
    template <class Run>
    void visit_unit(const Box &whole, Run run) {
        work.block->trash = int32_t(plan.unit_rows());
        for (int64_t i = 0; i < rows; i++) {
            State &state = work.state[i];
            bias.set_lanes(p, state.lanes);
            for_each_block<P>(state.lanes, source, whole, bias, *work.masks, *work.block,
                              [&](Block &block) { run(state, block); });
        }
    }

    template <class Run>
    void visit_list(int64_t keys, Run run) {
        work.block->trash = SLOTS;
        for (int64_t i = 0; i < rows; i++)
            for_each_listed<P>(work.state[i].lanes, source, keys, *work.masks, *work.block,
                               [&](Block &block) { run(work.state[i], block); });
    }

    // All keys of the tile, packed and visited: units of the grid, then sinks, then additional keys.
    template <class Run>
    void visit_all(const int32_t *sinks, bool key_pairs, bool value_rows, Run run) {
        for (int64_t u = 0; u < plan.units_of_plane(); u++) {
            Box whole = unit_box(plan, plane, u), part = common(whole, reach);
            if (part.empty()) continue;
            work.key.fill(source, p.key, d.head, whole, part, true, key_pairs);
            work.value.fill(source, p.value, d.value, whole, part, value_rows, !value_rows);
            visit_unit(whole, [&](State &state, Block &block) { run(state, block, u); });
        }
        visit_lists(sinks, key_pairs, value_rows, [&](State &state, Block &block, int64_t) { run(state, block, -1); });
    }

    // Sinks (of this batch entry) and additional keys in lists of SLOTS; `run` is told the first of them, additional
    // keys counted from num_sinks on.
    template <class Run>
    void visit_lists(const int32_t *sinks, bool key_pairs, bool value_rows, Run run) {
        int64_t listed[2] = {0, p.num_additional};
        for (int64_t n = sinks ? num_sinks(p) : 0; listed[0] < n && sinks[listed[0]] >= 0;) listed[0]++;
        for (int kind = 0; kind < 2; kind++)
            for (int64_t first = 0; first < listed[kind]; first += SLOTS) {
                int64_t keys = least(listed[kind] - first, int64_t(SLOTS));
                pack_list(kind == 0 ? sinks + first : nullptr, first, keys, key_pairs, value_rows);
                visit_list(keys, [&](State &state, Block &block) {
                    run(state, block, kind == 0 ? first : num_sinks(p) + first);
                });
                source = Source{&p, &plane, nullptr, false};
            }
    }

    // `first` is the place of the first one among the additional keys; sinks are found by their tokens.
    void pack_list(const int32_t *sinks, int64_t first, int64_t keys, bool key_pairs, bool value_rows) {
        source = Source{&p, &plane, sinks, sinks == nullptr};
        Box whole{{0, 0, 0}, {1, 1, keys}};
        nearfield_tensor key = sinks ? p.key : p.additional_key, value = sinks ? p.value : p.additional_value;
        if (!sinks) {
            key.data = static_cast<char *>(key.data) + item_bytes(p.dtype) * first * key.stride[3];
            value.data = static_cast<char *>(value.data) + item_bytes(p.dtype) * first * value.stride[3];
        }
        work.key.fill(source, key, d.head, whole, whole, true, key_pairs);
        work.value.fill(source, value, d.value, whole, whole, value_rows, !value_rows);
    }
};

// Scores of a stretch: scaled, biased, in powers of two, -inf where masked.
template <bool MASK, bool BIAS>
NEARFIELD_INLINE void finish_scores(const Stretch &s, const BiasTable &bias, float scale, float *at, vec *top) {
    static const int32_t all[LANES] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    const int32_t *mask = s.mask ? s.mask : all;
    int step = s.mask ? LANES : 0;
    for (int part = 0; part < PARTS; part++) {
        ivec run = load_int(s.run_mask + part * WIDTH);
        vec best = top[part];
        for (int i = 0; i < s.count; i++) {
            float *here = at + i * LANES + part * WIDTH;
            vec x = load(here) * scale;
            ivec seen = run;
            if (MASK) seen &= load_int(mask + i * step + part * WIDTH);
            if (BIAS) x += gather(bias.entries, bias.lane[part] + (s.bias_at + i), seen) * LOG2E;
            if (MASK) x = seen ? x : splat(-INFINITE);
            store(here, x);
            best = larger(x, best);
        }
        top[part] = best;
    }
}

inline void finish_block(const Block &block, const BiasTable &bias, float scale, float *scores, vec *top) {
    for (int i = 0; i < block.stretches; i++) {
        const Stretch &s = block.stretch[i];
        bool has_bias = s.bias_at != NOWHERE && bias.entries;
        if (s.is_masked)
            has_bias ? finish_scores<true, true>(s, bias, scale, scores, top)
                     : finish_scores<true, false>(s, bias, scale, scores, top);
        else
            has_bias ? finish_scores<false, true>(s, bias, scale, scores, top)
                     : finish_scores<false, false>(s, bias, scale, scores, top);
        scores += s.count * LANES;
    }
}

#if defined(__AVX512BF16__)
// Two rows of numbers as pairs of bfloat16: the first row's in the low halves.
NEARFIELD_INLINE vec as_pairs(vec first, vec second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
NEARFIELD_INLINE void store_lanes(float *to, vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

template <class P>
void forward_block(Walk<P> &walk, State &state, Block &block) {
    Work<P> &work = walk.work;
    const Dims &d = walk.d;
    float *scores_at = work.scores;
    scores<P>(work.key.rows, work.key.row_stride, block.row, state.query, scores_at, block.padded(), int(d.head_units));
    vec top[PARTS], safe[PARTS], total[PARTS];
    for (int j = 0; j < PARTS; j++) top[j] = load(state.top + j * WIDTH);
    finish_block(block, walk.bias, float(walk.p.scale) * LOG2E, scores_at, top);
    for (int j = 0; j < PARTS; j++) {
        vec before = load(state.top + j * WIDTH);
        safe[j] = top[j] == -INFINITE ? vec{} : top[j];
        total[j] = load(state.total + j * WIDTH);
        if (any(before != top[j])) {
            vec factor = exp2<5>(before - safe[j]);
            total[j] *= factor;
            for (int64_t r = 0; r < d.value; r++)
                store(state.out + r * LANES + j * WIDTH, load(state.out + r * LANES + j * WIDTH) * factor);
        }
        store(state.top + j * WIDTH, top[j]);
    }
    const float *weights = scores_at;
    if constexpr (P::PACK == 1) {
        for (int i = 0; i < block.slots; i++)
            for (int j = 0; j < PARTS; j++) {
                float *at = scores_at + i * LANES + j * WIDTH;
                vec w = exp2<5>(load(at) - safe[j]);
                total[j] += w;
                store(at, w);
            }
    }
#if defined(__AVX512BF16__)
    if constexpr (P::PACK == 2) {
        weights = work.weights_pair;
        vec odd{};
        for (int i = 0; i < block.slots; i += 2) {
            vec a = exp2<3>(load(scores_at + i * LANES) - safe[0]), b = exp2<3>(load(scores_at + (i + 1) * LANES) - safe[0]);
            total[0] += a, odd += b;
            store(work.weights_pair + i / 2 * LANES, as_pairs(a, b));
        }
        total[0] += odd;
    }
#endif
    for (int j = 0; j < PARTS; j++) store(state.total + j * WIDTH, total[j]);
    accumulate<P>(work.value.pairs, work.value.pair_stride, block.row, weights, state.out, int(d.value), block.slots / P::PACK);
}

// One more weight in the total of each lane, of the value zero; `state.scale` is what the others shrink by.
inline void add_sink_logits(const float *logits, State &state) {
    for (int i = 0; i < state.lanes.count; i++) {
        float logit = logits[state.lanes.head[i]] * LOG2E, top = most(state.top[i], logit);
        if (top == -INFINITE) continue;
        state.scale[i] = __builtin_exp2f(state.top[i] - top);
        state.total[i] = state.total[i] * state.scale[i] + __builtin_exp2f(logit - top);
        state.top[i] = top;
    }
}

template <class P>
void finish_forward(Walk<P> &walk, State &state) {
    const nearfield_attention &p = walk.p;
    const Dims &d = walk.d;
    const Lanes &lanes = state.lanes;
    alignas(64) float factor[LANES], lse[LANES];
    if (p.sink_logits) add_sink_logits(p.sink_logits + walk.plane.kv_head * walk.plan.group, state);
    for (int j = 0; j < LANES; j += WIDTH) {
        vec top = load(state.top + j), total = load(state.total + j);
        ivec is_blind = (ivec)(total == vec{});
        vec sum = (top + log2(total)) * LN2;
        sum = (ivec)(total != total) ? total : sum;  // the logarithm loses a NaN
        store(lse + j, is_blind ? splat(-INFINITE) : sum);
        store(factor + j, is_blind ? vec{} : load(state.scale + j) / total);
    }
    char *rows[LANES];
    find_rows(p, walk.plane, walk.plan, lanes, p.lse, 4, rows);
    for (int i = 0; i < lanes.count; i++) *reinterpret_cast<float *>(rows[i]) = lse[i];
    find_rows(p, walk.plane, walk.plan, lanes, p.out, item_bytes(p.dtype), rows);
    write_lanes(state.out, d.value, factor, rows, lanes.count, p.dtype, walk.work.staging);
}

// Problem and remaining task of a job's task.
inline int64_t find_problem(const Job &job, int64_t *task) {
    int64_t low = 0, high = job.count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (job.first_task[middle] <= *task)
            low = middle;
        else
            high = middle - 1;
    }
    *task -= job.first_task[low];
    return low;
}

template <class P>
void forward_task(void *context, int64_t task, void *memory) {
    const Job &job = *static_cast<Job *>(context);
    int64_t number = find_problem(job, &task);
    Walk<P> walk(job, number);
    const Plan &plan = walk.plan;
    Arena arena(memory);
    walk.work.place(arena, walk.d, plan.unit_rows(), plan.rows_in_tile(), false);

    // heads first: their rows of the same tokens lie side by side in memory
    int64_t head = task % walk.p.kv_heads;
    task /= walk.p.kv_heads;
    int64_t tile = task % plan.tiles_of_plane();
    task /= plan.tiles_of_plane();
    walk.enter(task / plan.planes, head, task % plan.planes);
    if (!walk.open_tile(tile)) return;
    char *from[2][LANES];  // of this row of lanes, and of the next, whose queries are on their way meanwhile
    for (int64_t i = 0; i < walk.rows; i++) {
        State &state = walk.work.state[i];
        if (i == 0) walk.fetch_rows(state.lanes, walk.p.query, walk.d.head, from[0]);
        if (i + 1 < walk.rows) walk.fetch_rows(walk.work.state[i + 1].lanes, walk.p.query, walk.d.head, from[(i + 1) % 2]);
        read_lanes<P>(from[i % 2], state.lanes.count, walk.p.dtype, walk.d.head, walk.work.staging, state.query);
        memset(state.out, 0, sizeof(float) * size_t(walk.d.value_wide) * LANES);
        for (int j = 0; j < LANES; j++) {  // zero keys outside the grid have weighed in already
            state.total[j] = state.lanes.padding[j];
            state.top[j] = state.total[j] > 0 ? 0 : -INFINITE;
            state.scale[j] = 1;
        }
        state.is_ahead = false;
    }
    const int32_t *sinks = job.sinks && job.sinks[number] ? job.sinks[number] + walk.plane.batch * num_sinks(walk.p) : nullptr;
    walk.visit_all(sinks, false, false, [&](State &state, Block &block, int64_t) {
        if (!state.is_ahead) walk.fetch_ahead(state.lanes), state.is_ahead = true;
        forward_block(walk, state, block);
    });
    for (int64_t i = 0; i < walk.rows; i++) finish_forward(walk, walk.work.state[i]);
}

}  // namespace
}  // namespace nearfield
