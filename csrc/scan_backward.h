// The gradients of a selective scan: chunks from the last to the first. Each is computed again from its saved state,
// then time runs back through it with the gradients of a few states in registers.
#pragma once
#include "scan.h"

namespace nearfield {
namespace {

// All positions of a chunk, backwards, for S states from `n` on. On entry grad_state is what later chunks send here.
template <int S>
void unscan_states(const ScanBlock &b, const ScanWork &w, int64_t state, int64_t rows, int64_t n, int64_t length) {
    for (int part = 0; part < LANES; part += WIDTH) {
        vec exponent[S], carried[S], grad_exponent[S], later[S];
        const float *kept[S], *fraction[S];
        for (int s = 0; s < S; s++) {
            exponent[s] = load(b.exponent + (n + s) * LANES + part);
            carried[s] = load(b.grad_state + (n + s) * LANES + part);
            grad_exponent[s] = vec{};
            kept[s] = w.states + (n + s) * (rows + 1) * LANES + part;
            fraction[s] = w.fractions + (n + s) * rows * LANES + part;
            later[s] = load(kept[s] + length * LANES);
        }
        for (int64_t i = length - 1; i >= 0; i--) {
            vec step = load(w.step + i * LANES + part), input = load(w.input + i * LANES + part);
            vec pull = load(w.grad + i * LANES + part), to_input{}, to_step{};
            const float *B = w.B + i * state + n, *C = w.C + i * state + n;
            float *grad_B = w.grad_B + (i * state + n) * LANES + part, *grad_C = w.grad_C + (i * state + n) * LANES + part;
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                vec before = load(kept[s] + i * LANES), q = load(fraction[s] + i * LANES);
                vec k = power(step * exponent[s]), grad = carried[s] + pull * C[s];
                store(grad_C + s * LANES, load(grad_C + s * LANES) + pull * later[s]);
                store(grad_B + s * LANES, load(grad_B + s * LANES) + grad * input);
                to_input += grad * B[s];
                vec change = grad * times_power(before + before * q, k);  // the gradient of step times A
                to_step += change * exponent[s];
                grad_exponent[s] += change * step;
                carried[s] = times_power(grad + grad * q, k);
                later[s] = before;
            }
            float *grad_input = w.grad_input + i * LANES + part, *grad_step = w.grad_step + i * LANES + part;
            store(grad_input, load(grad_input) + to_input);
            store(grad_step, load(grad_step) + to_step * LN2);
        }
        for (int s = 0; s < S; s++) {
            float *sum = b.grad_exponent + (n + s) * LANES + part;
            store(sum, load(sum) + grad_exponent[s]);
            store(b.grad_state + (n + s) * LANES + part, carried[s]);
        }
    }
}

inline void read_lines(const nearfield_tensor &x, const ScanJob &job, const ScanRows &rows, int64_t t, int64_t length,
                       const ScanBlock &b, float *to) {
    Lines lines = lines_of(x, job, rows, t, length, b, to);
    if (b.count < LANES) return;
    by_dtype(lines.dtype, [&](auto dtype) {
        for (int64_t i = 0; i < length * LANES; i += WIDTH)
            store(to + i, read_part<dtype.value>(lines.at + i / LANES * lines.step + i % LANES * item_bytes(dtype.value)));
    });
}

inline void unscan_chunk(const ScanJob &job, const ScanTask &task, const ScanBlock &b, const ScanWork &w, int64_t t,
                         int64_t chunk, int64_t length) {
    const nearfield_scan &p = *job.problem;
    memcpy(b.state, saved_state(job, task.rows, chunk, b), sizeof(float) * size_t(p.state) * LANES);
    unpack_steps<true>(job, task.rows, b, w, t, length);
    scan_chunk<true>(b, w, p.state, job.rows, length);
    read_lines(p.grad_out, job, task.rows, t, length, b, w.grad);
    if (p.z.data) {
        read_lines(p.z, job, task.rows, t, length, b, w.gate);
        for (int64_t i = 0; i < length * LANES; i += WIDTH) {
            vec z = load(w.gate + i), s = sigmoid(z), pull = load(w.grad + i);
            store(w.grad_gate + i, pull * load(w.y + i) * s * (1.0f + z * (1.0f - s)));
            store(w.grad + i, pull * z * s);
        }
        write_lines(w.grad_gate, p.grad_z, job, task.rows, t, length, b);
    }
    memset(w.grad_input, 0, sizeof(float) * size_t(length) * LANES);
    memset(w.grad_step, 0, sizeof(float) * size_t(length) * LANES);
    int64_t n = 0;
    for (; n + 4 <= p.state; n += 4) unscan_states<4>(b, w, p.state, job.rows, n, length);
    for (; n < p.state; n++) unscan_states<1>(b, w, p.state, job.rows, n, length);
    for (int part = 0; part < LANES; part += WIDTH) {
        vec skip{}, bias{};
        for (int64_t i = part; i < length * LANES; i += LANES) {
            vec x = load(w.x + i), pull = load(w.grad + i), to_input = load(w.grad_input + i);
            vec to_step = (load(w.grad_step + i) + to_input * x) * load(w.slope + i);
            store(w.grad_step + i, to_step);
            store(w.grad_input + i, to_input * load(w.step + i) + pull * load(b.skip + part));
            skip += pull * x, bias += to_step;
        }
        store(b.grad_skip + part, load(b.grad_skip + part) + skip);
        store(b.grad_bias + part, load(b.grad_bias + part) + bias);
    }
    write_lines(w.grad_input, p.grad_x, job, task.rows, t, length, b);
    write_lines(w.grad_step, p.grad_dt, job, task.rows, t, length, b);
}

// The sum over the lanes of each of `count` lines; writes up to whole vectors.
inline void sum_lanes(const float *from, int64_t count, float *to) {
    for (int64_t j = 0; j < count; j += WIDTH) {
        vec square[WIDTH], total{};
#pragma GCC unroll 16
        for (int k = 0; k < WIDTH; k++) {
            square[k] = load(from + (j + k) * LANES);
            for (int part = WIDTH; part < LANES; part += WIDTH) square[k] += load(from + (j + k) * LANES + part);
        }
        transpose_from<1>(square);
#pragma GCC unroll 16
        for (int k = 0; k < WIDTH; k++) total += square[k];
        store(to + j, total);
    }
}

// Where one span of channels leaves its share of the gradient of B (which = 0) or C (1) at a token.
inline float *row_part(const ScanJob &job, int64_t which, int64_t span, int64_t batch, int64_t token) {
    const nearfield_scan &p = *job.problem;
    int64_t spans = p.groups * job.group_spans;
    return job.row_parts + (((which * spans + span) * p.batch + batch) * p.tokens + token) * p.state;
}

inline void scan_backward_task(void *context, int64_t number, void *memory) {
    const ScanJob &job = *static_cast<const ScanJob *>(context);
    const nearfield_scan &p = *job.problem;
    Arena arena(memory);
    ScanWork w(arena, job, true);
    ScanTask task(job, number, w);
    size_t table_bytes = sizeof(float) * size_t(p.state) * LANES;
    int64_t gradient_of_table = (task.sequence * p.channels + w.blocks[0].channel) * p.state;
    for (int64_t i = 0; i < task.blocks; i++) {
        const ScanBlock &b = w.blocks[i];
        const float *later = p.grad_final_state;
        read_table(later ? later + gradient_of_table + i * LANES * p.state : nullptr, p.state, b.count, 1, b.grad_state);
        memset(b.grad_exponent, 0, table_bytes);
        memset(b.grad_skip, 0, sizeof(float) * LANES), memset(b.grad_bias, 0, sizeof(float) * LANES);
    }
    for (int64_t chunk = ceil_div(task.rows.length, job.rows) - 1; chunk >= 0; chunk--) {
        int64_t t = chunk * job.rows, length = least(job.rows, task.rows.length - t), sums = length * p.state;
        read_states(p.B, job, task.rows, t, length, task.group, w.B);
        read_states(p.C, job, task.rows, t, length, task.group, w.C);
        memset(w.grad_B, 0, sizeof(float) * size_t(sums) * LANES), memset(w.grad_C, 0, sizeof(float) * size_t(sums) * LANES);
        for (int64_t i = 0; i < task.blocks; i++) unscan_chunk(job, task, w.blocks[i], w, t, chunk, length);
        for (int64_t which = 0; which < 2; which++) {
            float *total = which ? w.C : w.B;  // no longer needed
            sum_lanes(which ? w.grad_C : w.grad_B, sums, total);
            for (int64_t i = 0; i < length; i++)
                memcpy(row_part(job, which, task.group * job.group_spans + task.span, task.rows.batch,
                                task.rows.first + (t + i) * task.rows.step),
                       total + i * p.state, sizeof(float) * size_t(p.state));
        }
    }
    for (int64_t i = 0; i < task.blocks; i++) {
        const ScanBlock &b = w.blocks[i];
        if (p.grad_initial_state)
            write_table(b.grad_state, p.state, b.count, p.grad_initial_state + gradient_of_table + i * LANES * p.state);
        int64_t blocks = p.groups * job.group_blocks;
        float *part = job.table_parts + (task.sequence * blocks + b.block) * (p.state + 2) * LANES;
        memcpy(part, b.grad_exponent, table_bytes);
        memcpy(part + p.state * LANES, b.grad_skip, sizeof(float) * LANES);
        memcpy(part + (p.state + 1) * LANES, b.grad_bias, sizeof(float) * LANES);
    }
}

// Sums over sequences, in their order: the gradients of A, D and dt_bias of one block.
inline void sum_tables_task(void *context, int64_t block, void *) {
    const ScanJob &job = *static_cast<const ScanJob *>(context);
    const nearfield_scan &p = *job.problem;
    int64_t blocks = p.groups * job.group_blocks, inside = block % job.group_blocks * LANES, size = (p.state + 2) * LANES;
    int64_t channel = block / job.group_blocks * job.group_channels + inside;
    for (int64_t i = 0; i < least(int64_t(LANES), job.group_channels - inside); i++)
        for (int64_t n = 0; n < p.state + 2; n++) {
            double sum = 0;
            for (int64_t s = 0; s < job.sequences; s++) sum += job.table_parts[(s * blocks + block) * size + n * LANES + i];
            float *to = n < p.state ? p.grad_A + (channel + i) * p.state + n : n == p.state ? p.grad_D : p.grad_dt_bias;
            if (to) to[n < p.state ? 0 : channel + i] = float(sum);
        }
}

// Sums over the spans of each group: the gradients of B and C at some tokens.
constexpr int64_t SUMMED_TOKENS = 64;
inline void sum_rows_task(void *context, int64_t number, void *memory) {
    const ScanJob &job = *static_cast<const ScanJob *>(context);
    const nearfield_scan &p = *job.problem;
    float *sum = static_cast<float *>(memory);
    for (int64_t at = number * SUMMED_TOKENS; at < least((number + 1) * SUMMED_TOKENS, p.batch * p.tokens); at++)
        for (int64_t group = 0; group < p.groups; group++)
            for (int64_t which = 0; which < 2; which++) {
                int64_t batch = at / p.tokens, token = at % p.tokens;
                for (int64_t span = 0; span < job.group_spans; span++) {
                    const float *part = row_part(job, which, group * job.group_spans + span, batch, token);
                    for (int64_t n = 0; n < p.state; n++) sum[n] = span ? sum[n] + part[n] : part[n];
                }
                const nearfield_tensor &to = which ? p.grad_C : p.grad_B;
                write_row(sum, p.state, address(to, job.bytes, batch, 0, 0, token, group), p.dtype);
            }
}

}  // namespace
}  // namespace nearfield
