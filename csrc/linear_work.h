// How the tensors of linear attention get into working memory and out: chunks of rows of float32, states by lanes.
#pragma once
#include "linear.h"

namespace nearfield {
namespace {

struct LinearJob {
    const nearfield_linear *problem;
    int64_t planes, chunks, head_wide, value_wide;  // planes: a batch entry and a head; wide: up to whole LANES
    int64_t groups;                                 // of lanes, a task each
    // delta rule, backward: what each step's value lacks, and -beta times the gradient of e
    float *lacks, *minus;         // [planes, length, value_wide]
    float *g_parts, *beta_parts;  // [planes, blocks of LANES, length]: summed in the end, in order

    int64_t row(int64_t plane, int64_t t) const { return plane * problem->length + t; }
};

struct Span {  // of lanes
    int64_t from, to;
    int64_t count() const { return to - from; }
};

inline Span span_of(const LinearJob &job, int64_t wide, int64_t group) {
    int64_t blocks = wide / LANES;
    return {group * blocks / job.groups * LANES, (group + 1) * blocks / job.groups * LANES};
}

// The working memory of a task. Rows have room for all lanes of a head.
struct LinearWork {
    float *query, *key, *grad_query, *grad_key, *factor, *dot;  // [CHUNK, head_wide]
    float *value, *out, *grad_out;                              // [CHUNK, value_wide]
    int32_t *keep;
    float *beta, *state, *trace;
    float *states;  // [chunks, value_dim, lanes of the span]: before each chunk
    size_t floats;

    LinearWork(Arena &arena, const LinearJob &job, bool backward) {
        // a row of tokens is shorter than a chunk while decoding
        const int64_t rows = least(int64_t(CHUNK), round_up(job.problem->length, int64_t(LANES)));
        const int64_t heads = rows * job.head_wide, values = rows * job.value_wide;
        for (float **x : {&query, &key, &factor}) *x = arena.take<float>(heads);
        keep = arena.take<int32_t>(heads);
        for (float **x : {&value, &out}) *x = arena.take<float>(values);
        beta = arena.take<float>(rows);
        state = arena.take<float>(job.head_wide * job.value_wide + LANES * most(job.head_wide, job.value_wide));
        grad_query = grad_key = dot = grad_out = trace = states = nullptr;
        if (backward) {
            for (float **x : {&grad_query, &grad_key, &dot}) *x = arena.take<float>(heads);
            grad_out = arena.take<float>(values);
            trace = arena.take<float>(rows * MOST_ROWS * WIDTH);
            int64_t lanes = (ceil_div(job.head_wide / LANES, job.groups) + 1) * LANES;
            states = arena.take<float>(most(job.chunks, int64_t(1)) * job.value_wide * lanes);
        }
        floats = arena.used / sizeof(float);
    }
};

struct Chunk {
    int64_t plane, begin;
    int count;
};
inline Chunk chunk_of(const LinearJob &job, int64_t plane, int64_t number) {
    int64_t begin = number * CHUNK;
    return {plane, begin, int(least(int64_t(CHUNK), job.problem->length - begin))};
}

inline char *place(const LinearJob &job, const nearfield_tensor &x, int64_t dtype, int64_t plane, int64_t t) {
    int64_t heads = job.problem->heads;
    return address(x, item_bytes(dtype), plane / heads, 0, 0, t, plane % heads);
}

// Channels span.from, … of a chunk of `x`, which has `channels`, to the same places of rows of `wide`.
inline void pack(const LinearJob &job, const nearfield_tensor &x, int64_t dtype, const Chunk &chunk, int64_t channels,
                 Span span, float *to, int64_t wide) {
    int64_t bytes = item_bytes(dtype), count = least(span.to, channels) - span.from;
    for (int t = 0; t < chunk.count; t++) {
        const char *from = place(job, x, dtype, chunk.plane, chunk.begin + t) + bytes * span.from;
        if (chunk.count > AHEAD) prefetch(from, AHEAD * bytes * x.stride[3], bytes * count);
        read_row(from, dtype, count, to + t * wide + span.from);
    }
}

inline void unpack(const LinearJob &job, const nearfield_tensor &x, int64_t dtype, const Chunk &chunk, int64_t channels,
                   Span span, const float *from, int64_t wide) {
    int64_t count = least(span.to, channels) - span.from;
    for (int t = 0; t < chunk.count; t++) {
        char *to = place(job, x, dtype, chunk.plane, chunk.begin + t) + item_bytes(dtype) * span.from;
        write_row(from + t * wide + span.from, count, to, dtype);
    }
}

inline void multiply(const Chunk &chunk, Span span, float factor, float *x, int64_t wide) {
    for (int t = 0; t < chunk.count; t++)
        for (int64_t c = span.from; c < span.to; c += WIDTH) store(x + t * wide + c, load(x + t * wide + c) * factor);
}

inline void pack_decay(const LinearJob &job, const Chunk &chunk, Span span, const LinearWork &work) {
    const nearfield_linear &p = *job.problem;
    if (!p.gates) return;
    auto convert = [&](float *at, int32_t *keep) {
        vec factor;
        ivec bits;
        decay_of(load(at), &factor, &bits);
        store(at, factor), store_int(keep, bits);
    };
    if (p.gates == 1) {
        pack(job, p.g, p.g_dtype, chunk, 1, {0, 1}, work.factor, 1);
        for (int t = 0; t < chunk.count; t += WIDTH) convert(work.factor + t, work.keep + t);
        return;
    }
    pack(job, p.g, p.g_dtype, chunk, p.head_dim, span, work.factor, job.head_wide);
    for (int t = 0; t < chunk.count; t++)
        for (int64_t c = span.from; c < span.to; c += WIDTH)
            convert(work.factor + t * job.head_wide + c, work.keep + t * job.head_wide + c);
}

// Calls run(DECAY as a constant), where a decay for each channel of keys is `EACH`.
template <Decay EACH, class Run>
void by_decay(const nearfield_linear &p, Run run) {
    if (p.gates == 0) return run(std::integral_constant<Decay, NONE>());
    // Where a key has one channel, its decay is that of the head.
    if (p.gates == 1) return run(std::integral_constant<Decay, ONE>());
    run(std::integral_constant<Decay, EACH>());
}

// Lanes of values of a head's state [head_dim, value_dim] in and out; NULL is zeros, or nowhere.
inline void load_values(const LinearJob &job, const float *states, int64_t plane, Span span, float *to,
                        int64_t stride) {
    const nearfield_linear &p = *job.problem;
    memset(to, 0, sizeof(float) * size_t(job.head_wide * stride));
    if (!states) return;
    const float *from = states + plane * p.head_dim * p.value_dim + span.from;
    for (int64_t r = 0; r < p.head_dim; r++)
        read_row(from + r * p.value_dim, NEARFIELD_F32, least(span.to, p.value_dim) - span.from, to + r * stride);
}
inline void store_values(const LinearJob &job, const float *from, int64_t stride, int64_t plane, Span span,
                         float *states) {
    const nearfield_linear &p = *job.problem;
    if (!states) return;
    float *to = states + plane * p.head_dim * p.value_dim + span.from;
    for (int64_t r = 0; r < p.head_dim; r++)
        write_row(from + r * stride, least(span.to, p.value_dim) - span.from, to + r * p.value_dim, NEARFIELD_F32);
}
// Lanes of keys of the same, as rows [value_dim].
inline void load_keys(const LinearJob &job, const float *states, int64_t plane, Span span, float *to, int64_t stride) {
    const nearfield_linear &p = *job.problem;
    memset(to, 0, sizeof(float) * size_t(job.value_wide * stride));
    if (!states) return;
    const float *from = states + plane * p.head_dim * p.value_dim;
    for (int64_t c = span.from; c < least(span.to, p.head_dim); c++)
        for (int64_t r = 0; r < p.value_dim; r++) to[r * stride + c - span.from] = from[c * p.value_dim + r];
}

// What walks over a chunk share; lanes of `span` count from 0.
inline Pass pass_over(const LinearJob &job, const Chunk &chunk, const LinearWork &work, bool lanes_are_values,
                      Span span, int64_t state_stride) {
    Pass w{};
    w.count = chunk.count;
    w.row_stride = lanes_are_values ? job.head_wide : job.value_wide;
    w.lane_stride = lanes_are_values ? job.value_wide : job.head_wide;
    w.decay_stride = job.problem->gates == 1 ? 1 : job.head_wide;
    w.state_stride = state_stride;
    int64_t first = lanes_are_values || job.problem->gates <= 1 ? 0 : span.from;
    w.factor = work.factor + first, w.keep = work.keep + first;
    return w;
}

}  // namespace
}  // namespace nearfield
