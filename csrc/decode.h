// A few queries against a cache of keys. What costs time is reading the cache, once for all heads that share it, so
// lanes are channels and keys lie where they are. Keys are cut into spans of one length whatever the threads do;
// each span leaves its maximum, sum and weighted values, and these are merged in order.
#pragma once
#include "attention.h"

namespace nearfield {
namespace {

constexpr int64_t SPAN = 512;  // keys of a task
constexpr int AT_ONCE = 64;       // keys between two rescalings
constexpr int TOGETHER = 4;    // queries that share a loaded row
constexpr int CHUNKS = WIDTH == 16 ? 4 : 2;

struct DecodeJob {
    const nearfield_decode *problem;
    float *parts;  // [batch * kv_heads][spans][rows][2 + value_wide]: maximum, sum, values
    int64_t rows, spans, head_wide, value_wide, part;
};

// Row r of a key/value head's queries: its query number and head.
struct DecodeRow {
    int64_t query, head;
};
inline DecodeRow decode_row(const nearfield_decode &p, int64_t kv_head, int64_t r) {
    int64_t group = p.heads / p.kv_heads;
    return {r / group, kv_head * group + r % group};
}

// A row of the cache as floats: where it lies, or converted into `buffer`.
inline const float *cached(const nearfield_decode &p, const nearfield_tensor &x, int64_t batch, int64_t key, int64_t kv_head,
                           int64_t channels, float *buffer) {
    const char *at = address(x, item_bytes(p.dtype), batch, 0, 0, key, kv_head);
    if (p.dtype == NEARFIELD_F32 && channels % WIDTH == 0) return reinterpret_cast<const float *>(at);
    read_row(at, p.dtype, channels, buffer);
    return buffer;
}

// The working memory of a task.
struct DecodeWork {
    float *queries, *sums, *weights;
    float *key_row, *value_row;  // behind their channels they stay 0

    DecodeWork(Arena &arena, const DecodeJob &job) {
        queries = arena.take<float>(job.rows * job.head_wide);
        sums = arena.take<float>(TOGETHER * WIDTH * WIDTH);
        weights = arena.take<float>(job.rows * AT_ONCE);
        key_row = arena.take<float>(job.head_wide);
        value_row = arena.take<float>(job.value_wide);
    }
};

// Scores, in powers of two, of T queries from `top` on with the keys begin + keys[0..count): products channel by
// channel, summed across for WIDTH keys at a time.
template <int T>
void decode_scores(const DecodeJob &job, const DecodeWork &work, int64_t batch, int64_t kv_head, int64_t top, int64_t begin,
                   const int32_t *keys, int count) {
    const nearfield_decode &p = *job.problem;
    int64_t steps = ceil_div(p.head_dim, int64_t(WIDTH));
    const float *query = work.queries + top * job.head_wide;
    for (int i = 0; i < count; i += WIDTH) {
        for (int k = 0; k < WIDTH; k++) {
            vec sum[T] = {};
            if (i + k < count) {
                const float *key = cached(p, p.key, batch, begin + keys[i + k], kv_head, p.head_dim, work.key_row);
                for (int64_t c = 0; c < steps; c++) {
                    vec x = load(key + c * WIDTH);
                    for (int t = 0; t < T; t++) sum[t] += load(query + t * job.head_wide + c * WIDTH) * x;
                }
            }
            for (int t = 0; t < T; t++) store(work.sums + (t * WIDTH + k) * WIDTH, sum[t]);
        }
        for (int t = 0; t < T; t++) {
            vec lines[WIDTH], total{};
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) lines[k] = load(work.sums + (t * WIDTH + k) * WIDTH);
            transpose_from<1>(lines);
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) total += lines[k];
            store(work.weights + (top + t) * AT_ONCE + i, total * (float(p.scale) * LOG2E));
        }
    }
}

// Adds the weighted values of T queries to their sums.
template <int T>
void decode_values(const DecodeJob &job, const DecodeWork &work, int64_t batch, int64_t kv_head, int64_t top, int64_t begin,
                   const int32_t *keys, int count, float *part) {
    const nearfield_decode &p = *job.problem;
    int64_t steps = ceil_div(p.value_dim, int64_t(WIDTH));
    const float *weights = work.weights + top * AT_ONCE;
    float *sums = part + top * job.part + 2;
    auto add = [&](int64_t c, auto chunks) {
        vec sum[T][chunks.value];
        for (int t = 0; t < T; t++)
            for (int j = 0; j < chunks.value; j++) sum[t][j] = load(sums + t * job.part + (c + j) * WIDTH);
        for (int i = 0; i < count; i++) {
            const float *value = cached(p, p.value, batch, begin + keys[i], kv_head, p.value_dim, work.value_row) + c * WIDTH;
            for (int j = 0; j < chunks.value; j++) {
                vec x = load(value + j * WIDTH);
                for (int t = 0; t < T; t++) sum[t][j] += x * weights[t * AT_ONCE + i];
            }
        }
        for (int t = 0; t < T; t++)
            for (int j = 0; j < chunks.value; j++) store(sums + t * job.part + (c + j) * WIDTH, sum[t][j]);
    };
    int64_t c = 0;
    for (; c + CHUNKS <= steps; c += CHUNKS) add(c, std::integral_constant<int, CHUNKS>());
    for (; c < steps; c++) add(c, std::integral_constant<int, 1>());
}

// Weights of one query in place of its scores; what was summed before shrinks to the new maximum.
inline void decode_weights(const DecodeJob &job, const DecodeWork &work, int64_t batch, DecodeRow at, const uint8_t *visible,
                           int64_t begin, const int32_t *keys, int count, int64_t r, float *part) {
    const nearfield_decode &p = *job.problem;
    float *w = work.weights + r * AT_ONCE, *state = part + r * job.part, top = state[0];
    const float *addend = nullptr;
    if (p.addend)
        addend = p.addend + batch * p.addend_stride[0] + at.head * p.addend_stride[1] + at.query * p.addend_stride[2] + begin;
    for (int i = 0; i < count; i++) {
        if (addend) w[i] += addend[keys[i]] * LOG2E;
        if (visible && !visible[at.query * p.visible_stride[1] + begin + keys[i]]) w[i] = -INFINITE;
        top = most(top, w[i]);
    }
    float safe = top == -INFINITE ? 0 : top, shrink = __builtin_exp2f(state[0] - safe), total = state[1] * shrink;
    for (int i = count; i < round_up(count, WIDTH); i++) w[i] = -INFINITE;
    for (int i = 0; i < count; i += WIDTH) store(w + i, exp2<5>(load(w + i) - safe));
    for (int i = 0; i < count; i++) total += w[i];
    for (int64_t c = 0; shrink != 1 && c < p.value_dim; c++) state[2 + c] *= shrink;
    state[0] = top, state[1] = total;
}

inline void decode_span(void *context, int64_t task, void *memory) {
    const DecodeJob &job = *static_cast<DecodeJob *>(context);
    const nearfield_decode &p = *job.problem;
    int64_t span = task % job.spans, plane = task / job.spans, batch = plane / p.kv_heads, kv_head = plane % p.kv_heads;
    int64_t first = span * SPAN, last = least(first + SPAN, p.num_keys);
    float *part = job.parts + (plane * job.spans + span) * job.rows * job.part;
    Arena arena(memory);
    DecodeWork work(arena, job);
    memset(work.queries, 0, sizeof(float) * size_t(job.rows * job.head_wide));
    memset(work.key_row, 0, sizeof(float) * size_t(job.head_wide));
    memset(work.value_row, 0, sizeof(float) * size_t(job.value_wide));
    memset(part, 0, sizeof(float) * size_t(job.rows * job.part));
    for (int64_t r = 0; r < job.rows; r++) {
        DecodeRow at = decode_row(p, kv_head, r);
        const char *query = address(p.query, item_bytes(p.dtype), batch, 0, 0, at.query, at.head);
        read_row(query, p.dtype, p.head_dim, work.queries + r * job.head_wide);
        part[r * job.part] = -INFINITE;
    }
    const uint8_t *visible = p.visible ? p.visible + batch * p.visible_stride[0] : nullptr;
    for (int64_t begin = first; begin < last; begin += AT_ONCE) {
        int32_t keys[AT_ONCE], count = 0;  // those that some query sees
        for (int64_t key = begin; key < least(begin + AT_ONCE, last); key++) {
            bool is_seen = !visible;
            for (int64_t n = 0; n < p.num_queries && !is_seen; n++) is_seen = visible[n * p.visible_stride[1] + key];
            if (is_seen) keys[count++] = int32_t(key - begin);
        }
        if (!count) continue;
        auto each = [&](auto run) {  // TOGETHER queries at a time, then the rest
            int64_t r = 0;
            for (; r + TOGETHER <= job.rows; r += TOGETHER) run(r, std::integral_constant<int, TOGETHER>());
            if (job.rows - r == 3) run(r, std::integral_constant<int, 3>());
            if (job.rows - r == 2) run(r, std::integral_constant<int, 2>());
            if (job.rows - r == 1) run(r, std::integral_constant<int, 1>());
        };
        each([&](int64_t r, auto together) {
            decode_scores<together.value>(job, work, batch, kv_head, r, begin, keys, count);
        });
        for (int64_t r = 0; r < job.rows; r++)
            decode_weights(job, work, batch, decode_row(p, kv_head, r), visible, begin, keys, count, r, part);
        each([&](int64_t r, auto together) {
            decode_values<together.value>(job, work, batch, kv_head, r, begin, keys, count, part);
        });
    }
}

inline void merge_spans(void *context, int64_t plane, void *memory) {
    const DecodeJob &job = *static_cast<DecodeJob *>(context);
    const nearfield_decode &p = *job.problem;
    int64_t batch = plane / p.kv_heads, kv_head = plane % p.kv_heads;
    float *sum = static_cast<float *>(memory);
    for (int64_t r = 0; r < job.rows; r++) {
        DecodeRow at = decode_row(p, kv_head, r);
        float top = -INFINITE, total = 0;
        auto part = [&](int64_t span) { return job.parts + ((plane * job.spans + span) * job.rows + r) * job.part; };
        for (int64_t s = 0; s < job.spans; s++) top = most(top, part(s)[0]);
        memset(sum, 0, sizeof(float) * size_t(job.value_wide));
        for (int64_t s = 0; s < job.spans; s++) {
            float share = top == -INFINITE ? 0 : __builtin_exp2f(part(s)[0] - top);
            total += part(s)[1] * share;
            for (int64_t c = 0; c < job.value_wide; c += WIDTH) store(sum + c, load(sum + c) + load(part(s) + 2 + c) * share);
        }
        float factor = total == 0 ? 0 : 1 / total;
        for (int64_t c = 0; c < job.value_wide; c += WIDTH) store(sum + c, load(sum + c) * factor);
        write_row(sum, p.value_dim, address(p.out, item_bytes(p.dtype), batch, 0, 0, at.query, at.head), p.dtype);
        if (p.lse.data)
            *reinterpret_cast<float *>(address(p.lse, 4, batch, 0, 0, at.query, at.head)) =
                total == 0 ? -INFINITE : (top + __builtin_log2f(total)) * LN2;
    }
}

inline int run_decode(const nearfield_decode *problem, int64_t threads) {
    const nearfield_decode &p = *problem;
    DecodeJob job{problem, nullptr, p.num_queries * (p.heads / p.kv_heads), ceil_div(p.num_keys, SPAN),
                  round_up(p.head_dim, int64_t(LANES)), round_up(p.value_dim, int64_t(LANES)), 0};
    job.part = 2 + job.value_wide;
    int64_t planes = p.batch * p.kv_heads;
    double bytes = double(planes * p.num_keys * (p.head_dim + p.value_dim) * item_bytes(p.dtype));
    threads = worth(bytes / 12e6, threads);  // memory gives some 12 MB a millisecond
    if (!planes || !job.rows) return NEARFIELD_OK;
    job.parts = static_cast<float *>(malloc(sizeof(float) * size_t(most(planes * job.spans * job.rows * job.part, int64_t(1)))));
    Arena arena(nullptr);
    DecodeWork measured(arena, job);
    bool is_done = job.parts && parallel_for(planes * job.spans, threads, arena.used, decode_span, &job) &&
                   parallel_for(planes, threads, sizeof(float) * size_t(job.value_wide), merge_spans, &job);
    free(job.parts);
    return is_done ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
}

}  // namespace
}  // namespace nearfield
