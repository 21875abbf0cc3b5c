// Local linear attention: softmax attention of each query plus a first-order correction along r,
//
//     (C + ridge) r = kbar - q,    o = sum over keys of p (1 - r.(k - kbar)) v,
//
// where p are the softmax weights, kbar and C the mean and the covariance of the keys under them. A tile is 16
// consecutive queries of a head, one a lane, which see one range of keys. Their weights are computed once and kept, so
// that a step of conjugate gradients is two products with the keys and no exponential.
#pragma once
#include "lla_keys.h"

namespace nearfield {
namespace {

// sum over t of a[t][lane] * b[t][lane]
inline void lane_dot(const float *a, const float *b, int64_t steps, vec *to) {
    for (int p = 0; p < PARTS; p++) to[p] = vec{};
    for (int64_t t = 0; t < steps; t++)
        for (int p = 0; p < PARTS; p++) to[p] += load(a + t * LANES + p * WIDTH) * load(b + t * LANES + p * WIDTH);
}

// The lanes of one tile and the memory that a thread works in. Arrays of lanes are [channels][LANES] or [keys][LANES].
struct LlaTile {
    const nearfield_lla &p;
    const LlaDims d;
    LlaPacked packed;
    int32_t *rows;                        // 0, 1, 2, …
    float *query, *mean, *correction;     // kbar; r
    float *residual, *direction, *image;  // of conjugate gradients
    float *weights;                       // p
    float *sums;                          // the output, or the gradient of the query
    float *part;                          // [chunk][LANES]
    float *staging;                       // [LANES][channels]
    float *factors;                       // r.(k - kbar), backward then 1 less that
    float ridge[LANES];

    int64_t batch, first;
    int count, head;
    int64_t from, to;          // rows that some lane sees
    int64_t all_from, all_to;  // rows that all lanes see that see any
    alignas(64) int32_t seen_from[LANES], seen_to[LANES];

    LlaTile(const nearfield_lla &problem, Arena &arena) : p(problem), d(problem) {
        packed.put(arena, d);
        rows = arena.take<int32_t>(d.chunk);
        float **wide[] = {&query, &mean, &correction, &residual, &direction, &image};
        for (float **x : wide) *x = arena.take<float>(d.head_wide * LANES);
        sums = arena.take<float>(most(d.head_wide, d.value_wide) * LANES);
        staging = arena.take<float>(most(d.head_wide, d.value_wide) * LANES);
        weights = arena.take<float>((d.most_keys + ROWS) * LANES);
        factors = arena.take<float>((d.most_keys + ROWS) * LANES);
        part = arena.take<float>(d.chunk * LANES);
        for (int64_t i = 0; arena.base && i < d.chunk; i++) rows[i] = int32_t(i);
    }

    void find(const nearfield_tensor &x, int64_t bytes, char **to_rows) const {
        for (int i = 0; i < count; i++) to_rows[i] = lla_row(x, bytes, batch, first + i, head);
    }

    void read_wide(const nearfield_tensor &x, int64_t dtype, int64_t channels, float *to_lanes) const {
        char *at[LANES];
        find(x, item_bytes(dtype), at);
        read_lanes<Single>(at, count, dtype, channels, staging, to_lanes);
        for (int i = 0; i < count; i++)  // who sees nothing has no part in anything
            for (int64_t c = 0; seen_from[i] == seen_to[i] && c < channels; c++) to_lanes[c * LANES + i] = 0;
    }

    void write_wide(const float *lanes, int64_t channels, const nearfield_tensor &x, int64_t dtype) const {
        alignas(64) float ones[LANES];
        for (float &one : ones) one = 1;
        char *at[LANES];
        find(x, item_bytes(dtype), at);
        write_lanes(lanes, channels, ones, at, count, dtype, staging);
    }

    // False if no lane sees a key.
    bool open(int64_t entry, int64_t first_query, int64_t last_query, int64_t of_head) {
        batch = entry, first = first_query, head = int(of_head);
        count = int(least(last_query - first_query, int64_t(LANES)));
        from = packed.count, to = 0, all_from = 0, all_to = packed.count;
        for (int i = 0; i < LANES; i++) {
            Range seen = i < count ? packed.seen(p, first + i) : Range{0, 0};
            seen_from[i] = int32_t(seen.from), seen_to[i] = int32_t(seen.to), ridge[i] = 1;
            if (seen.from == seen.to) continue;
            from = least(from, seen.from), to = most(to, seen.to);
            all_from = most(all_from, seen.from), all_to = least(all_to, seen.to);
            ridge[i] = *reinterpret_cast<const float *>(lla_row(p.ridge, 4, batch, first + i, head));
        }
        return from < to;
    }

    // The lanes that see row `key`, or any row at all.
    ivec sees(int64_t key, int j) const {
        ivec at = splat_int(int32_t(key));
        return (ivec)(load_int(seen_from + j * WIDTH) <= at) & (ivec)(at < load_int(seen_to + j * WIDTH));
    }
    ivec sees_any(int j) const { return (ivec)(load_int(seen_from + j * WIDTH) < load_int(seen_to + j * WIDTH)); }

    const float *key(int64_t at) const { return packed.keys + (from + at) * d.head_wide; }
    const float *value(int64_t at) const { return packed.values + (from + at) * d.value_wide; }

    // Calls run(at, slots) for the rows of the tile, counted from `from`, in chunks.
    template <class Run>
    void each_chunk(Run run) const {
        for (int64_t at = 0; at < to - from; at += d.chunk)
            run(at, int(round_up(least(d.chunk, to - from - at), int64_t(ROWS))));
    }

    void times_keys(int64_t at, int slots, const float *x, float *to_keys) const {
        scores<Single>(key(at), d.head_wide, rows, x, to_keys, slots, int(d.head));
    }
    void add_keys(int64_t at, int slots, const float *of_keys, float *to_channels) const {
        accumulate<Single>(key(at), d.head_wide, rows, of_keys, to_channels, int(d.head), slots);
    }

    // Queries, weights and mean of the keys.
    void weigh() {
        read_wide(p.query, p.dtype, d.head, query);
        for (int n = 0; n < packed.num_odd_keys; n++)
            for (int i = 0; i < LANES; i++)
                if (seen_from[i] <= packed.odd_keys[n] && packed.odd_keys[n] < seen_to[i])
                    query[i] = __builtin_nanf("");
        const float scale = float(p.scale) * LOG2E;
        vec top[PARTS], total[PARTS], share[PARTS];
        for (int j = 0; j < PARTS; j++) top[j] = splat(-INFINITE), total[j] = vec{};
        each_chunk([&](int64_t at, int slots) {
            float *w = weights + at * LANES;
            times_keys(at, slots, query, w);
            for (int i = 0; i < slots; i++)
                for (int j = 0; j < PARTS; j++) {
                    int64_t number = from + at + i;
                    vec s = load(w + i * LANES + j * WIDTH) * scale;
                    if (number < all_from || number >= all_to) s = sees(number, j) ? s : splat(-INFINITE);
                    top[j] = larger(top[j], s);
                    store(w + i * LANES + j * WIDTH, s);
                }
        });
        for (int j = 0; j < PARTS; j++) top[j] = (ivec)(top[j] == splat(-INFINITE)) ? vec{} : top[j];
        const int64_t slots = round_up(to - from, int64_t(ROWS));
        for (int64_t i = 0; i < slots; i++)
            for (int j = 0; j < PARTS; j++) {
                float *at = weights + i * LANES + j * WIDTH;
                vec w = exp2<5>(load(at) - top[j]);
                total[j] += w;
                store(at, w);
            }
        for (int j = 0; j < PARTS; j++) share[j] = sees_any(j) ? 1.0f / total[j] : vec{};
        memset(mean, 0, sizeof(float) * size_t(d.head_wide) * LANES);
        each_chunk([&](int64_t at, int slots) {
            float *w = weights + at * LANES;
            for (int i = 0; i < slots; i++)
                for (int j = 0; j < PARTS; j++)
                    store(w + i * LANES + j * WIDTH, load(w + i * LANES + j * WIDTH) * share[j]);
            add_keys(at, slots, w, mean);
        });
    }

    // x.(k - kbar) for a chunk, given x.kbar, and what p times it adds to a sum that should be zero: the mean of many
    // rounded products is not quite the product with a mean, and whoever centres by both cancels to the last digit.
    void times_centred(int64_t at, int slots, const float *x, const vec *middle, float *to_keys, vec *left) const {
        times_keys(at, slots, x, to_keys);
        const float *w = weights + at * LANES;
        for (int i = 0; i < slots * LANES; i += LANES)
            for (int j = 0; j < PARTS; j++) {
                vec c = load(to_keys + i + j * WIDTH) - middle[j];
                store(to_keys + i + j * WIDTH, c);
                left[j] += load(w + i + j * WIDTH) * c;
            }
    }

    // The sum over keys of a weight times (k - kbar): weights(at, slots, to) gives those of a chunk. Where they sum to
    // zero but for rounding, so must what a mean of many or large keys would make of that.
    template <class Weights>
    void sum_centred(Weights weights_of, float *to_channels) {
        vec left[PARTS] = {};
        memset(to_channels, 0, sizeof(float) * size_t(d.head_wide) * LANES);
        each_chunk([&](int64_t at, int slots) {
            weights_of(at, slots, part);
            for (int i = 0; i < slots * LANES; i += LANES)
                for (int j = 0; j < PARTS; j++) left[j] += load(part + i + j * WIDTH);
            add_keys(at, slots, part, to_channels);
        });
        for (int64_t i = 0; i < d.head * LANES; i += LANES)
            for (int j = 0; j < PARTS; j++) {
                float *at = to_channels + i + j * WIDTH;
                store(at, load(at) - left[j] * load(mean + i + j * WIDTH));
            }
    }

    // C times `x`: the sum of p (x.(k - kbar)) (k - kbar).
    void times_covariance(const float *x, float *product) {
        vec middle[PARTS];
        lane_dot(mean, x, d.head, middle);
        sum_centred(
            [&](int64_t at, int slots, float *c) {
                times_keys(at, slots, x, c);
                for (int i = 0; i < slots * LANES; i += LANES)
                    for (int j = 0; j < LANES; j += WIDTH)
                        store(c + i + j, load(weights + at * LANES + i + j) * (load(c + i + j) - middle[j / WIDTH]));
            },
            product);
    }

    // (C + ridge) x = residual, which is overwritten, in all lanes at once: one that has arrived waits for the others.
    void solve(float *x) {
        vec size[PARTS], limit[PARTS], largest[PARTS], shrink[PARTS];
        ivec is_active[PARTS];
        for (int j = 0; j < PARTS; j++) largest[j] = vec{};
        for (int64_t c = 0; c < d.head; c++)
            for (int j = 0; j < PARTS; j++) {
                vec r = load(residual + c * LANES + j * WIDTH);
                largest[j] = larger(largest[j], larger(r, -r));
            }
        // of a length near 1, so that no square of a small gradient vanishes
        for (int j = 0; j < PARTS; j++)
            shrink[j] = (ivec)(largest[j] > splat(1e-37f)) ? 1.0f / largest[j] : splat(1.0f);
        for (int64_t i = 0; i < d.head * LANES; i += WIDTH) {
            vec r = load(residual + i) * shrink[i % LANES / WIDTH];
            store(residual + i, r), store(direction + i, r);
        }
        lane_dot(residual, residual, d.head, size);
        memset(x, 0, sizeof(float) * size_t(d.head_wide) * LANES);
        for (int64_t i = 0; i < d.head * LANES; i += WIDTH) {
            vec start = size[i % LANES / WIDTH] - size[i % LANES / WIDTH];  // 0, or NaN where it is to stay
            store(x + i, start);
        }
        bool is_done = true;
        for (int j = 0; j < PARTS; j++) {
            limit[j] = size[j] * float(p.tolerance * p.tolerance);
            is_active[j] = (ivec)(size[j] > limit[j]);
            is_done &= !any(is_active[j]);
        }
        for (int64_t n = 0; n < p.max_iterations && !is_done; n++) {
            times_covariance(direction, image);
            vec bend[PARTS], step[PARTS], next[PARTS], keep[PARTS];
            for (int64_t i = 0; i < d.head * LANES; i += WIDTH)
                store(image + i, load(image + i) + load(ridge + i % LANES) * load(direction + i));
            lane_dot(direction, image, d.head, bend);
            for (int j = 0; j < PARTS; j++) {
                is_active[j] &= ~(ivec)(bend[j] <= vec{});
                step[j] = is_active[j] ? size[j] / bend[j] : vec{};
            }
            for (int64_t i = 0; i < d.head * LANES; i += WIDTH) {
                store(x + i, load(x + i) + step[i % LANES / WIDTH] * load(direction + i));
                store(residual + i, load(residual + i) - step[i % LANES / WIDTH] * load(image + i));
            }
            lane_dot(residual, residual, d.head, next);
            is_done = true;
            for (int j = 0; j < PARTS; j++) {
                is_active[j] &= (ivec)(next[j] > limit[j]);
                is_done &= !any(is_active[j]);
                keep[j] = is_active[j] ? next[j] / size[j] : vec{};
                size[j] = next[j];
            }
            for (int64_t i = 0; i < d.head * LANES; i += WIDTH)
                store(direction + i, load(residual + i) + keep[i % LANES / WIDTH] * load(direction + i));
        }
        for (int64_t i = 0; i < d.head * LANES; i += WIDTH) store(x + i, load(x + i) / shrink[i % LANES / WIDTH]);
    }

    void forward() {
        weigh();
        for (int64_t c = 0; c < d.head; c++)  // the mean, like the keys, is counted from the shift
            for (int j = 0; j < LANES; j += WIDTH) {
                vec centred = load(query + c * LANES + j) - packed.shift[c];
                store(residual + c * LANES + j, sees_any(j / WIDTH) ? load(mean + c * LANES + j) - centred : vec{});
            }
        solve(correction);
        vec middle[PARTS], left[PARTS] = {};
        lane_dot(mean, correction, d.head, middle);
        each_chunk(
            [&](int64_t at, int slots) { times_centred(at, slots, correction, middle, factors + at * LANES, left); });
        memset(sums, 0, sizeof(float) * size_t(d.value_wide) * LANES);
        each_chunk([&](int64_t at, int slots) {
            for (int64_t i = at * LANES; i < (at + slots) * LANES; i += LANES)
                for (int j = 0; j < PARTS; j++) {
                    float *w = weights + i + j * WIDTH;
                    store(w, load(w) * (1.0f - (load(factors + i + j * WIDTH) - left[j])));
                }
            accumulate<Single>(value(at), d.value_wide, rows, weights + at * LANES, sums, int(d.value), slots);
        });
        add_odd_values();
        write_wide(sums, d.value, p.out, p.dtype);
        write_wide(correction, d.head, p.correction, NEARFIELD_F32);
    }

    // Values that are no numbers, to those who see them.
    void add_odd_values() {
        for (int n = 0; n < packed.num_odd_values; n++) {
            int64_t row = packed.odd_values[n], at = packed.reach.from + packed.token[row];
            if (row < from || row >= to) continue;
            read_row(lla_row(p.value, item_bytes(p.dtype), batch, at, head / (p.heads / p.kv_heads)), p.dtype, d.value,
                     staging);
            for (int i = 0; i < count; i++)
                for (int64_t c = 0; seen_from[i] <= row && row < seen_to[i] && c < d.value; c++)
                    sums[c * LANES + i] += weights[(row - from) * LANES + i] * staging[c];
        }
    }

    // What queries that see nothing get.
    void forward_blind() const {
        for (int i = 0; i < count; i++) {
            int64_t bytes = item_bytes(p.dtype);
            memset(lla_row(p.out, bytes, batch, first + i, head), 0, size_t(bytes * d.value));
            memset(lla_row(p.correction, 4, batch, first + i, head), 0, size_t(4 * d.head));
        }
    }
};

}  // namespace
}  // namespace nearfield
