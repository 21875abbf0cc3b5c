// Selective scans: h = e^(step A) h + step B x, y = C h, for each channel of its own.
//
// Lanes are 16 channels. Time runs in chunks whose rows are unpacked to floats; inside a chunk a few states at a time
// stay in registers while all positions pass. The work is one exponential for each state and position, some ten
// operations, and five more for the recurrence: no algorithm for decays of any size does without the exponential.
#pragma once
#include "rows.h"
#include "scan_math.h"

namespace nearfield {
namespace {

constexpr int64_t SPAN_BLOCKS = 8;  // blocks of 16 channels that share unpacked rows of B and C
constexpr int64_t CHUNK_STATES = 1024, MOST_ROWS = 64, LEAST_ROWS = 8;

// Positions between two saved states: so many that those between fit the second-level cache. Also in native.py.
inline int64_t chunk_rows(int64_t state) { return most(least(CHUNK_STATES / state, MOST_ROWS), LEAST_ROWS); }

// The problem as its tasks see it. A task is one span of the channels of a group in one sequence.
struct ScanJob {
    const nearfield_scan *problem;
    int64_t sequences, rows, group_channels, group_blocks, group_spans, bytes;
    float *table_parts;  // [sequences][blocks][state + 2][LANES]: gradients of A, D and dt_bias
    float *row_parts;    // [2][spans][batch * tokens][state]: gradients of B and C
};

// A sequence of rows in the order of the scan.
struct ScanRows {
    int64_t batch, first, step, length, number;  // token `first + t * step` comes at time t; number of its first chunk
};

inline ScanRows scan_rows(const ScanJob &job, int64_t sequence) {
    const nearfield_scan &p = *job.problem;
    int64_t batch = p.cu_seqlens ? 0 : sequence;
    int64_t begin = p.cu_seqlens ? p.cu_seqlens[sequence] : 0;
    int64_t end = p.cu_seqlens ? p.cu_seqlens[sequence + 1] : p.tokens;
    int64_t number = (batch * p.tokens + begin) / job.rows + sequence;
    return {batch, p.reverse ? end - 1 : begin, p.reverse ? -1 : 1, end - begin, number};
}

NEARFIELD_INLINE char *scan_address(const nearfield_tensor &x, int64_t bytes, const ScanRows &rows, int64_t t, int64_t head,
                                    int64_t channel) {
    return address(x, bytes, rows.batch, 0, 0, rows.first + t * rows.step, head) + bytes * channel;
}

// WIDTH channels, once the dtype is known.
template <int64_t DTYPE>
NEARFIELD_INLINE vec read_part(const char *from) {
    float x[WIDTH];
    read_row(from, DTYPE, WIDTH, x);
    return load(x);
}

template <int64_t DTYPE>
NEARFIELD_INLINE void write_part(vec from, char *to) {
    float x[WIDTH];
    store(x, from);
    write_row(x, WIDTH, to, DTYPE);
}

NEARFIELD_INLINE void ask_for(const char *p) { __builtin_prefetch(p); }

template <class Run>
NEARFIELD_INLINE void by_dtype(int64_t dtype, Run run) {
    if (dtype == NEARFIELD_F32) run(std::integral_constant<int64_t, NEARFIELD_F32>());
    else if (dtype == NEARFIELD_BF16) run(std::integral_constant<int64_t, NEARFIELD_BF16>());
    else run(std::integral_constant<int64_t, NEARFIELD_F16>());
}

inline void read_states(const nearfield_tensor &x, const ScanJob &job, const ScanRows &rows, int64_t t, int64_t length,
                        int64_t group, float *to) {
    for (int64_t i = 0; i < length; i++, to += job.problem->state)
        read_row(scan_address(x, job.bytes, rows, t + i, group, 0), job.problem->dtype, job.problem->state, to);
}

// [channels][state] to and from [state][LANES].
inline void read_table(const float *from, int64_t state, int64_t count, float factor, float *to) {
    if (from && count == LANES && state % WIDTH == 0) {
        const float *rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = from + i * state;
        transpose_in(rows, state, to);
        for (int64_t i = 0; i < state * LANES; i += WIDTH) store(to + i, load(to + i) * factor);
        return;
    }
    for (int64_t n = 0; n < state; n++)
        for (int64_t i = 0; i < LANES; i++) to[n * LANES + i] = from && i < count ? from[i * state + n] * factor : 0;
}

inline void write_table(const float *from, int64_t state, int64_t count, float *to) {
    if (count == LANES && state % WIDTH == 0) {
        alignas(64) float ones[LANES];
        float *rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = to + i * state, ones[i] = 1;
        transpose_out(from, state, ones, rows, LANES);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < state; n++) to[i * state + n] = from[n * LANES + i];
}

// One block of 16 channels and the rows of the chunk at hand, all [rows][LANES].
struct ScanBlock {
    int64_t channel, count, block;  // its first channel, how many of its lanes are used, its number
    int64_t ahead;                  // channels to the block that comes next: up to 0, in the next chunk
    float *exponent, *state;        // [state][LANES]: A in powers of two, and where time has come to
    float *skip, *bias;             // [LANES]: D and dt_bias
    float *grad_state, *grad_exponent, *grad_skip, *grad_bias;
};

// The rows of a block in a tensor, in the order of the scan. Where lanes are unused they go through a buffer of floats.
struct Lines {
    char *at;
    int64_t step, dtype;  // bytes from a row to the next
    int64_t ahead;        // bytes to the rows that come after these: rows lie far apart, so no hardware asks for them
};

inline Lines lines_there(const nearfield_tensor &x, const ScanJob &job, const ScanRows &rows, int64_t t, const ScanBlock &b) {
    int64_t step = rows.step * x.stride[3] * job.bytes, ahead = b.ahead * job.bytes;
    if (b.ahead <= 0) ahead += job.rows * step;
    return {scan_address(x, job.bytes, rows, t, 0, b.channel), step, job.problem->dtype, ahead};
}

inline Lines lines_of(const nearfield_tensor &x, const ScanJob &job, const ScanRows &rows, int64_t t, int64_t length,
                      const ScanBlock &b, float *buffer) {
    Lines lines = lines_there(x, job, rows, t, b);
    if (b.count == LANES) return lines;
    for (int64_t i = 0; i < length; i++) {
        for (int64_t j = b.count; j < LANES; j++) buffer[i * LANES + j] = 0;
        read_row(lines.at + i * lines.step, lines.dtype, b.count, buffer + i * LANES);
    }
    return {reinterpret_cast<char *>(buffer), LANES * sizeof(float), NEARFIELD_F32, 0};
}

inline void write_lines(const float *from, const nearfield_tensor &x, const ScanJob &job, const ScanRows &rows, int64_t t,
                        int64_t length, const ScanBlock &b) {
    Lines lines = lines_there(x, job, rows, t, b);
    by_dtype(lines.dtype, [&](auto dtype) {
        for (int64_t i = 0; i < length; i++, from += LANES) {
            char *to = lines.at + i * lines.step;
            ask_for(to + lines.ahead);
            if (b.count < LANES)
                write_row(from, b.count, to, dtype.value);
            else
                for (int part = 0; part < LANES; part += WIDTH)
                    write_part<dtype.value>(load(from + part), to + part * item_bytes(dtype.value));
        }
    });
}

struct ScanWork {
    float *x, *step, *input, *y, *gate;  // input: step x; y: the sum over states, later with skip and gate
    float *B, *C;                        // [rows][state]
    float *slope, *grad, *grad_step, *grad_input, *grad_gate;
    float *states, *fractions;           // [state][1 + rows][LANES], [state][rows][LANES]
    float *grad_B, *grad_C;              // [rows][state][LANES], summed over the blocks of the span
    ScanBlock *blocks;

    ScanWork(Arena &arena, const ScanJob &job, bool backward) {
        int64_t state = job.problem->state, lanes = job.rows * LANES;
        for (float **to : {&x, &step, &input, &y, &gate}) *to = arena.take<float>(lanes);
        for (float **to : {&B, &C}) *to = arena.take<float>(job.rows * state + LANES);
        if (backward) {
            for (float **to : {&slope, &grad, &grad_step, &grad_input, &grad_gate}) *to = arena.take<float>(lanes);
            states = arena.take<float>(state * (job.rows + 1) * LANES);
            for (float **to : {&fractions, &grad_B, &grad_C}) *to = arena.take<float>(state * lanes);
        }
        blocks = arena.take<ScanBlock>(SPAN_BLOCKS);
        for (int64_t i = 0; i < SPAN_BLOCKS; i++) {
            ScanBlock b{};
            for (float **to : {&b.exponent, &b.state}) *to = arena.take<float>(state * LANES);
            for (float **to : {&b.skip, &b.bias}) *to = arena.take<float>(LANES);
            if (backward) {
                for (float **to : {&b.grad_state, &b.grad_exponent}) *to = arena.take<float>(state * LANES);
                for (float **to : {&b.grad_skip, &b.grad_bias}) *to = arena.take<float>(LANES);
            }
            if (arena.base) blocks[i] = b;
        }
    }
};

// Which sequence, group and channels a task has; fills in the tables of its blocks and returns how many there are.
struct ScanTask {
    int64_t sequence, group, span, blocks;
    ScanRows rows;

    ScanTask(const ScanJob &job, int64_t task, const ScanWork &work) {
        const nearfield_scan &p = *job.problem;
        span = task % job.group_spans;
        group = task / job.group_spans % p.groups;
        sequence = task / job.group_spans / p.groups;
        rows = scan_rows(job, sequence);
        int64_t first = span * SPAN_BLOCKS;
        blocks = least(SPAN_BLOCKS, job.group_blocks - first);
        for (int64_t i = 0; i < blocks; i++) {
            ScanBlock &b = work.blocks[i];
            int64_t inside = (first + i) * LANES;
            b.channel = group * job.group_channels + inside;
            b.count = least(int64_t(LANES), job.group_channels - inside);
            b.block = group * job.group_blocks + first + i;
            b.ahead = i + 1 < blocks ? LANES : -(blocks - 1) * LANES;
            read_table(p.A + b.channel * p.state, p.state, b.count, LOG2E, b.exponent);
            const float *initial = p.initial_state;
            if (initial) initial += (sequence * p.channels + b.channel) * p.state;
            read_table(initial, p.state, b.count, 1, b.state);
            for (int64_t j = 0; j < LANES; j++) {
                b.skip[j] = p.D && j < b.count ? p.D[b.channel + j] : 0;
                b.bias[j] = p.dt_bias && j < b.count ? p.dt_bias[b.channel + j] : 0;
            }
        }
    }
};

inline float *saved_state(const ScanJob &job, const ScanRows &rows, int64_t chunk, const ScanBlock &b) {
    const nearfield_scan &p = *job.problem;
    int64_t blocks = p.groups * job.group_blocks;
    return p.chunk_states ? p.chunk_states + ((rows.number + chunk) * blocks + b.block) * p.state * LANES : nullptr;
}

// Rows of x, step sizes, inputs and what skips the states; for the backward also the derivative of the softplus.
template <bool BACKWARD>
void unpack_steps(const ScanJob &job, const ScanRows &rows, const ScanBlock &b, const ScanWork &w, int64_t t, int64_t length) {
    bool softened = job.problem->softplus;
    Lines x_lines = lines_of(job.problem->x, job, rows, t, length, b, w.x);
    Lines dt_lines = lines_of(job.problem->dt, job, rows, t, length, b, w.step);
    by_dtype(x_lines.dtype, [&](auto dtype) {
        constexpr int64_t D = dtype.value;
        for (int part = 0; part < LANES; part += WIDTH) {
            vec bias = load(b.bias + part), skip = load(b.skip + part);
            const char *x_at = x_lines.at + part * item_bytes(D), *dt_at = dt_lines.at + part * item_bytes(D);
            for (int64_t i = part; i < length * LANES; i += LANES, x_at += x_lines.step, dt_at += dt_lines.step) {
                ask_for(x_at + x_lines.ahead), ask_for(dt_at + dt_lines.ahead);
                vec x = read_part<D>(x_at), step = read_part<D>(dt_at) + bias, slope = splat(1.0f);
                if (softened) step = softplus(step, BACKWARD ? &slope : nullptr);
                store(w.step + i, step);
                store(w.input + i, step * x);
                store(w.y + i, x * skip);
                if (BACKWARD) store(w.x + i, x), store(w.slope + i, slope);
            }
        }
    });
}

// All positions of a chunk for S states from `n` on: adds C h to the rows of y. With KEEP every state and fraction
// stays for the backward.
template <int S, bool KEEP>
void scan_states(const ScanBlock &b, const ScanWork &w, int64_t state, int64_t rows, int64_t n, int64_t length) {
    for (int part = 0; part < LANES; part += WIDTH) {
        vec exponent[S], h[S];
        float *kept[S], *fraction[S];
        for (int s = 0; s < S; s++) {
            exponent[s] = load(b.exponent + (n + s) * LANES + part);
            h[s] = load(b.state + (n + s) * LANES + part);
            if (KEEP) {
                kept[s] = w.states + (n + s) * (rows + 1) * LANES + part;
                fraction[s] = w.fractions + (n + s) * rows * LANES + part;
                store(kept[s], h[s]);
            }
        }
        for (int64_t i = 0; i < length; i++) {
            vec step = load(w.step + i * LANES + part), input = load(w.input + i * LANES + part);
            vec y = load(w.y + i * LANES + part);
            const float *B = w.B + i * state + n, *C = w.C + i * state + n;
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                vec x = step * exponent[s], k = power(x), q = exp2_less_1(remainder(x, k));
                h[s] = times_power(h[s] + h[s] * q, k) + input * B[s];
                y += h[s] * C[s];
                if (KEEP) store(kept[s] + (i + 1) * LANES, h[s]), store(fraction[s] + i * LANES, q);
            }
            store(w.y + i * LANES + part, y);
        }
        for (int s = 0; s < S; s++) store(b.state + (n + s) * LANES + part, h[s]);
    }
}

template <bool KEEP>
void scan_chunk(const ScanBlock &b, const ScanWork &w, int64_t state, int64_t rows, int64_t length) {
    int64_t n = 0;
    for (; n + 4 <= state; n += 4) scan_states<4, KEEP>(b, w, state, rows, n, length);
    for (; n < state; n++) scan_states<1, KEEP>(b, w, state, rows, n, length);
}

inline void scan_forward_task(void *context, int64_t number, void *memory) {
    const ScanJob &job = *static_cast<const ScanJob *>(context);
    const nearfield_scan &p = *job.problem;
    Arena arena(memory);
    ScanWork w(arena, job, false);
    ScanTask task(job, number, w);
    for (int64_t t = 0, chunk = 0; t < task.rows.length; t += job.rows, chunk++) {
        int64_t length = least(job.rows, task.rows.length - t);
        read_states(p.B, job, task.rows, t, length, task.group, w.B);
        read_states(p.C, job, task.rows, t, length, task.group, w.C);
        for (int64_t i = 0; i < task.blocks; i++) {
            const ScanBlock &b = w.blocks[i];
            if (float *to = saved_state(job, task.rows, chunk, b)) memcpy(to, b.state, sizeof(float) * size_t(p.state) * LANES);
            unpack_steps<false>(job, task.rows, b, w, t, length);
            scan_chunk<false>(b, w, p.state, job.rows, length);
            if (p.z.data) {
                Lines lines = lines_of(p.z, job, task.rows, t, length, b, w.gate);
                by_dtype(lines.dtype, [&](auto dtype) {
                    for (int64_t j = 0; j < length * LANES; j += WIDTH) {
                        const char *at = lines.at + j / LANES * lines.step + j % LANES * item_bytes(dtype.value);
                        ask_for(at + lines.ahead);
                        vec z = read_part<dtype.value>(at);
                        store(w.y + j, load(w.y + j) * z * sigmoid(z));
                    }
                });
            }
            write_lines(w.y, p.out, job, task.rows, t, length, b);
        }
    }
    for (int64_t i = 0; p.final_state && i < task.blocks; i++) {
        const ScanBlock &b = w.blocks[i];
        write_table(b.state, p.state, b.count, p.final_state + (task.sequence * p.channels + b.channel) * p.state);
    }
}

}  // namespace
}  // namespace nearfield
