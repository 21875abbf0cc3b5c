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
    read_row(at, p.dtype, channels, buffer);  // behind the channels the buffer stays 0
    return buffer;
}

inline void decode_span(void *context, int64_t task, void *memory) {
    const DecodeJob &job = *static_cast<DecodeJob *>(context);
    const nearfield_decode &p = *job.problem;
    int64_t span = task % job.spans, plane = task / job.spans, batch = plane / p.kv_heads, kv_head = plane % p.kv_heads;
    int64_t first = span * SPAN, last = least(first + SPAN, p.num_keys);
    int64_t head_steps = ceil_div(p.head_dim, int64_t(WIDTH)), value_steps = ceil_div(p.value_dim, int64_t(WIDTH));
    float *part = job.parts + (plane * job.spans + span) * job.rows * job.part;

    Arena arena(memory);
    float *queries = arena.take<float>(job.rows * job.head_wide), *row = arena.take<float>(job.value_wide + job.head_wide);
    float *sums = arena.take<float>(TOGETHER * LANES * WIDTH), *weights = arena.take<float>(job.rows * AT_ONCE);
    memset(row, 0, sizeof(float) * size_t(job.value_wide + job.head_wide));
    for (int64_t r = 0; r < job.rows; r++) {
        DecodeRow at = decode_row(p, kv_head, r);
        float *to = queries + r * job.head_wide;
        memset(to, 0, sizeof(float) * size_t(job.head_wide));
        read_row(address(p.query, item_bytes(p.dtype), batch, 0, 0, at.query, at.head), p.dtype, p.head_dim, to);
        memset(part + r * job.part, 0, sizeof(float) * size_t(job.part));
        part[r * job.part] = -INFINITE;
    }
    const uint8_t *visible = p.visible ? p.visible + batch * p.visible_stride[0] : nullptr;
    for (int64_t begin = first; begin < last; begin += AT_ONCE) {
        int32_t keys[AT_ONCE], count = 0;  // those that some query sees
        for (int64_t key = begin; key < least(begin + AT_ONCE, last); key++) {
            bool is_seen = !visible;
            for (int64_t n = 0; visible && n < p.num_queries && !is_seen; n++) is_seen = visible[n * p.visible_stride[1] + key];
            if (is_seen) keys[count++] = int32_t(key - begin);
        }
        if (!count) continue;
        for (int64_t top = 0; top < job.rows; top += TOGETHER) {
            int together = int(least(job.rows - top, int64_t(TOGETHER)));
            for (int i = 0; i < count; i += WIDTH) {  // products channel by channel, then summed across for WIDTH keys
                for (int k = 0; k < WIDTH; k++) {
                    vec sum[TOGETHER] = {};
                    if (i + k < count) {
                        prefetch(address(p.key, item_bytes(p.dtype), batch, 0, 0, begin + keys[least(i + k + 4, count - 1)], kv_head),
                                 p.head_dim * item_bytes(p.dtype));
                        const float *key = cached(p, p.key, batch, begin + keys[i + k], kv_head, p.head_dim, row);
                        const float *query = queries + top * job.head_wide;
                        for (int64_t c = 0; c < head_steps; c++) {
                            vec x = load(key + c * WIDTH);
                            for (int t = 0; t < TOGETHER; t++)
                                if (t < together) sum[t] += load(query + t * job.head_wide + c * WIDTH) * x;
                        }
                    }
                    for (int t = 0; t < together; t++) store(sums + (t * LANES + k) * WIDTH, sum[t]);
                }
                for (int t = 0; t < together; t++) {
                    vec lines[WIDTH], total{};
                    for (int k = 0; k < WIDTH; k++) lines[k] = load(sums + (t * LANES + k) * WIDTH);
                    transpose_from<1>(lines);
                    for (int k = 0; k < WIDTH; k++) total += lines[k];
                    store(weights + (top + t) * AT_ONCE + i, total * (float(p.scale) * LOG2E));
                }
            }
        }
        for (int64_t r = 0; r < job.rows; r++) {
            DecodeRow at = decode_row(p, kv_head, r);
            float *w = weights + r * AT_ONCE, *state = part + r * job.part, top = state[0];
            const float *addend = p.addend ? p.addend + batch * p.addend_stride[0] + at.head * p.addend_stride[1] +
                                                 at.query * p.addend_stride[2] + begin
                                           : nullptr;
            for (int i = 0; i < count; i++) {
                if (addend) w[i] += addend[keys[i]] * LOG2E;
                if (visible && !visible[at.query * p.visible_stride[1] + begin + keys[i]]) w[i] = -INFINITE;
                top = most(top, w[i]);
            }
            float safe = top == -INFINITE ? 0 : top, shrink = __builtin_exp2f(state[0] - safe), total = state[1] * shrink;
            for (int i = count; i < round_up(count, WIDTH); i++) w[i] = -INFINITE;
            for (int i = 0; i < count; i += WIDTH) store(w + i, exp2<5>(load(w + i) - safe));
            for (int i = 0; i < count; i++) total += w[i];
            for (int64_t c = 0; shrink != 1 && c < value_steps; c++)
                store(state + 2 + c * WIDTH, load(state + 2 + c * WIDTH) * shrink);
            state[0] = top, state[1] = total;
        }
        for (int64_t top = 0; top < job.rows; top += TOGETHER) {
            int together = int(least(job.rows - top, int64_t(TOGETHER)));
            for (int64_t c = 0; c < value_steps; c += CHUNKS) {
                int chunks = int(least(value_steps - c, int64_t(CHUNKS)));
                vec sum[TOGETHER][CHUNKS] = {};
                for (int t = 0; t < TOGETHER; t++)
                    for (int j = 0; j < CHUNKS; j++)
                        if (t < together && j < chunks) sum[t][j] = load(part + (top + t) * job.part + 2 + (c + j) * WIDTH);
                for (int i = 0; i < count; i++) {
                    prefetch(address(p.value, item_bytes(p.dtype), batch, 0, 0, begin + keys[least(i + 4, count - 1)], kv_head),
                             p.value_dim * item_bytes(p.dtype));
                    const float *value =
                        cached(p, p.value, batch, begin + keys[i], kv_head, p.value_dim, row + job.head_wide) + c * WIDTH;
                    for (int j = 0; j < CHUNKS; j++)
                        if (j < chunks) {
                            vec x = load(value + j * WIDTH);
                            for (int t = 0; t < TOGETHER; t++)
                                if (t < together) sum[t][j] += x * weights[(top + t) * AT_ONCE + i];
                        }
                }
                for (int t = 0; t < TOGETHER; t++)
                    for (int j = 0; j < CHUNKS; j++)
                        if (t < together && j < chunks) store(part + (top + t) * job.part + 2 + (c + j) * WIDTH, sum[t][j]);
            }
        }
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

inline int decode_forward(const nearfield_decode *problem, int64_t threads) {
    const nearfield_decode &p = *problem;
    DecodeJob job{problem, nullptr, p.num_queries * (p.heads / p.kv_heads), ceil_div(p.num_keys, SPAN),
                  round_up(p.head_dim, int64_t(LANES)), round_up(p.value_dim, int64_t(LANES)), 0};
    job.part = 2 + job.value_wide;
    int64_t planes = p.batch * p.kv_heads;
    if (!planes || !job.rows) return NEARFIELD_OK;
    job.parts = static_cast<float *>(malloc(sizeof(float) * size_t(most(planes * job.spans * job.rows * job.part, int64_t(1)))));
    Arena arena(nullptr);
    arena.take<float>(job.rows * job.head_wide), arena.take<float>(job.value_wide + job.head_wide);
    arena.take<float>(TOGETHER * LANES * WIDTH), arena.take<float>(job.rows * AT_ONCE);
    bool is_done = job.parts && parallel_for(planes * job.spans, threads, arena.used, decode_span, &job) &&
                   parallel_for(planes, threads, sizeof(float) * size_t(job.value_wide), merge_spans, &job);
    free(job.parts);
    return is_done ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
}

}  // namespace
}  // namespace nearfield
