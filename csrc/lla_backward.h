// The backward of local linear attention. With g the gradient of an output, c = r.(k - kbar) and a = g.(v - vbar):
//
//     (C + ridge) t = -sum of p a (k - kbar),    e = a + t.(k - kbar),    s = p (e (1 - c) - sum of p e (1 - c))
//     dq = scale sum of s k - t,    dridge = -t.r
//     dk = scale s q - p e r + p (1 - c) t,    dv = p (1 - c) g
//
// Weights are computed again, by the very instructions of the forward.
#pragma once
#include "lla.h"

namespace nearfield {
namespace {

struct LlaBackward : LlaTile {
    float *grad_out, *solution;                                       // g; t
    float *pulls;                                                     // g.v, then a, then e: [keys][LANES]
    float *pulled, *factored;                                         // p e and p (1 - c) of a chunk
    float *query_rows, *correction_rows, *solution_rows, *grad_rows;  // [LANES][channels]

    LlaBackward(const nearfield_lla &problem, Arena &arena) : LlaTile(problem, arena) {
        grad_out = arena.take<float>(d.value_wide * LANES);
        grad_rows = arena.take<float>(d.value_wide * LANES);
        for (float **x : {&solution, &query_rows, &correction_rows, &solution_rows})
            *x = arena.take<float>(d.head_wide * LANES);
        for (float **x : {&pulled, &factored}) *x = arena.take<float>(d.chunk * LANES);
        pulls = arena.take<float>((d.most_keys + ROWS) * LANES);
    }

    // Adds to the gradients of keys and values, whose rows are numbered by `place` for every packed row.
    void backward(const int32_t *place, float *grad_keys, float *grad_values) {
        weigh();
        read_wide(p.correction, NEARFIELD_F32, d.head, correction);
        read_wide(p.grad_out, p.dtype, d.value, grad_out);
        vec middle[PARTS], left[PARTS] = {}, pull[PARTS] = {};
        lane_dot(mean, correction, d.head, middle);
        each_chunk([&](int64_t at, int slots) {
            scores<Single>(value(at), d.value_wide, rows, grad_out, pulls + at * LANES, slots, int(d.value));
            times_centred(at, slots, correction, middle, factors + at * LANES, left);
            for (int64_t i = at * LANES; i < (at + slots) * LANES; i += LANES)
                for (int j = 0; j < PARTS; j++) pull[j] += load(weights + i + j * WIDTH) * load(pulls + i + j * WIDTH);
        });
        for (int n = 0; n < packed.num_odd_values; n++)
            for (int i = 0; i < LANES; i++)
                if (seen_from[i] <= packed.odd_values[n] && packed.odd_values[n] < seen_to[i])
                    pull[i / WIDTH][i % WIDTH] = __builtin_nanf("");

        sum_centred(
            [&](int64_t at, int slots, float *w) {
                for (int64_t i = 0; i < slots * LANES; i += WIDTH) {
                    const int64_t k = at * LANES + i;
                    const int j = int(i % LANES / WIDTH);
                    vec a = load(pulls + k) - pull[j];
                    store(factors + k, 1.0f - (load(factors + k) - left[j]));
                    store(pulls + k, a), store(w + i, -load(weights + k) * a);
                }
            },
            residual);
        solve(solution);
        vec slope[PARTS] = {}, rest[PARTS] = {};
        lane_dot(mean, solution, d.head, middle);
        each_chunk([&](int64_t at, int slots) {
            times_centred(at, slots, solution, middle, part, rest);
            for (int64_t i = 0; i < slots * LANES; i += WIDTH) {
                const int64_t k = at * LANES + i;
                vec a = load(pulls + k) + load(part + i);
                store(pulls + k, a);
                slope[i % LANES / WIDTH] += load(weights + k) * a * load(factors + k);
            }
        });
        for (int j = 0; j < PARTS; j++) slope[j] -= rest[j];  // the factors have the mean 1

        lanes_to_rows(query, d.head_wide, query_rows), lanes_to_rows(correction, d.head_wide, correction_rows);
        lanes_to_rows(solution, d.head_wide, solution_rows), lanes_to_rows(grad_out, d.value_wide, grad_rows);
        const float scale = float(p.scale);
        sum_centred(
            [&](int64_t at, int slots, float *of_scores) {
                for (int64_t i = 0; i < slots * LANES; i += WIDTH) {
                    const int64_t k = at * LANES + i;
                    const int j = int(i % LANES / WIDTH);
                    vec w = load(weights + k), a = load(pulls + k) - rest[j], u = load(factors + k);
                    store(of_scores + i, w * (a * u - slope[j]) * scale);
                    store(pulled + i, -w * a);
                    store(factored + i, w * u);
                }
                const int32_t *to_rows = place + from + at;
                scatter<Single>(of_scores, to_rows, query_rows, grad_keys, d.head_wide, slots);
                scatter<Single>(pulled, to_rows, correction_rows, grad_keys, d.head_wide, slots);
                scatter<Single>(factored, to_rows, solution_rows, grad_keys, d.head_wide, slots);
                scatter<Single>(factored, to_rows, grad_rows, grad_values, d.value_wide, slots);
            },
            sums);
        for (int64_t i = 0; i < d.head * LANES; i += WIDTH) store(sums + i, load(sums + i) - load(solution + i));
        write_wide(sums, d.head, p.grad_query, p.dtype);
        lane_dot(solution, correction, d.head, slope);
        for (int i = 0; i < count; i++)
            *reinterpret_cast<float *>(lla_row(p.grad_ridge, 4, batch, first + i, head)) = -slope[i / WIDTH][i % WIDTH];
    }

    // [channels][LANES] as [LANES][channels].
    static void lanes_to_rows(const float *lanes, int64_t wide, float *to_rows) {
        alignas(64) float ones[LANES];
        float *at[LANES];
        for (int i = 0; i < LANES; i++) ones[i] = 1, at[i] = to_rows + i * wide;
        transpose_out(lanes, wide, ones, at, LANES);
    }

    // What queries that see nothing leave.
    void backward_blind() const {
        for (int i = 0; i < count; i++) {
            int64_t bytes = item_bytes(p.dtype);
            memset(lla_row(p.grad_query, bytes, batch, first + i, head), 0, size_t(bytes * d.head));
            *reinterpret_cast<float *>(lla_row(p.grad_ridge, 4, batch, first + i, head)) = 0;
        }
    }
};

}  // namespace
}  // namespace nearfield
