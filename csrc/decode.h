// A few queries against a cache of keys, all of them or those of listed blocks. What costs time is reading the cache,
// once for all heads that share it, so lanes are channels and keys lie where they are. Keys are cut into spans of one
// length whatever the threads do; each span leaves its maximum, sum and weighted values, and these are merged in order.
#pragma once
#include "attention.h"

namespace nearfield {
namespace {

constexpr int64_t SPAN = 512;  // keys of a task
constexpr int AT_ONCE = 64;       // keys between two rescalings
constexpr int TOGETHER = 4;    // queries that share a loaded row
constexpr int CHUNKS = WIDTH == 16 ? 4 : 2;

// The heads that share keys, and the queries that share a list of blocks (without lists all do), are a plane.
struct DecodeJob {
    const nearfield_decode *problem;
    float *parts;     // [planes][spans][rows][2 + value_wide]: maximum, sum, values
    int64_t *blocks;  // [planes][1 + list_length]: how many, then these in ascending order, each once; NULL: all keys
    int64_t lists, planes, rows, keys, spans;  // a plane has at most so many keys
    int64_t head_wide, value_wide, part;
};

struct DecodePlane {
    int64_t batch, kv_head, list, keys;
    const int64_t *blocks;  // NULL: key number i is key i
};

inline DecodePlane decode_plane(const DecodeJob &job, int64_t number) {
    const nearfield_decode &p = *job.problem;
    int64_t head = number / job.lists;
    DecodePlane plane{head / p.kv_heads, head % p.kv_heads, number % job.lists, p.num_keys, nullptr};
    if (!job.blocks) return plane;
    const int64_t *list = job.blocks + number * (1 + p.list_length), count = *list, size = p.block_size;
    plane.blocks = list + 1, plane.keys = count * size;
    int64_t last = ceil_div(p.num_keys, size) - 1;  // may be ragged
    if (count && list[count] == last) plane.keys += p.num_keys - (last + 1) * size;
    return plane;
}

// Row r of a plane's queries: its query number and head.
struct DecodeRow {
    int64_t query, head;
};
inline DecodeRow decode_row(const DecodeJob &job, const DecodePlane &plane, int64_t r) {
    const nearfield_decode &p = *job.problem;
    int64_t group = p.heads / p.kv_heads;
    return {plane.list * (job.rows / group) + r / group, plane.kv_head * group + r % group};
}

// The last key that a query may see.
inline int64_t last_seen(const nearfield_decode &p, int64_t query) {
    return p.num_keys - 1 - (p.is_causal ? p.num_queries - 1 - query : 0);
}

// A row of the cache as floats: where it lies, or converted into `buffer`.
inline const float *cached(const nearfield_tensor &x, int64_t dtype, int64_t batch, int64_t key, int64_t kv_head,
                           int64_t channels, float *buffer) {
    const char *at = address(x, item_bytes(dtype), batch, 0, 0, key, kv_head);
    if (dtype == NEARFIELD_F32 && channels % WIDTH == 0) return reinterpret_cast<const float *>(at);
    read_row(at, dtype, channels, buffer);
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

// Rows of keys: of one head, with room to convert one and for products.
struct KeyRows {
    const nearfield_tensor *tensor;
    int64_t dtype, channels, batch, head;
    float *row, *sums;  // row stays 0 behind its channels
};

// `factor` times the products of T queries, each `wide` floats, with some keys: channel by channel, summed across for
// WIDTH keys at a time. Of each query AT_ONCE results.
template <int T>
NEARFIELD_INLINE void products_with_keys(const KeyRows &rows, const int64_t *keys, int count, const float *query,
                                         int64_t wide, float factor, float *to) {
    int64_t steps = ceil_div(rows.channels, int64_t(WIDTH));
    for (int i = 0; i < count; i += WIDTH) {
        for (int k = 0; k < WIDTH; k++) {
            vec sum[T] = {};
            if (i + k < count) {
                const float *key =
                    cached(*rows.tensor, rows.dtype, rows.batch, keys[i + k], rows.head, rows.channels, rows.row);
                for (int64_t c = 0; c < steps; c++) {
                    vec x = load(key + c * WIDTH);
                    for (int t = 0; t < T; t++) sum[t] += load(query + t * wide + c * WIDTH) * x;
                }
            }
            for (int t = 0; t < T; t++) store(rows.sums + (t * WIDTH + k) * WIDTH, sum[t]);
        }
        for (int t = 0; t < T; t++) {
            vec lines[WIDTH], total{};
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) lines[k] = load(rows.sums + (t * WIDTH + k) * WIDTH);
            transpose_from<1>(lines);
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) total += lines[k];
            store(to + t * AT_ONCE + i, total * factor);
        }
    }
}

// Calls run(first row, how many) for TOGETHER rows at a time, then the rest.
template <class Run>
NEARFIELD_INLINE void each_rows(int64_t rows, Run run) {
    int64_t r = 0;
    for (; r + TOGETHER <= rows; r += TOGETHER) run(r, std::integral_constant<int, TOGETHER>());
    if (rows - r == 3) run(r, std::integral_constant<int, 3>());
    if (rows - r == 2) run(r, std::integral_constant<int, 2>());
    if (rows - r == 1) run(r, std::integral_constant<int, 1>());
}

// Adds the weighted values of T queries to their sums.
template <int T>
void decode_values(const DecodeJob &job, const DecodeWork &work, const DecodePlane &plane, int64_t top,
                   const int64_t *keys, int count, float *part) {
    const nearfield_decode &p = *job.problem;
    int64_t steps = ceil_div(p.value_dim, int64_t(WIDTH));
    const float *weights = work.weights + top * AT_ONCE;
    float *sums = part + top * job.part + 2;
    auto add = [&](int64_t c, auto chunks) {
        vec sum[T][chunks.value];
        for (int t = 0; t < T; t++)
            for (int j = 0; j < chunks.value; j++) sum[t][j] = load(sums + t * job.part + (c + j) * WIDTH);
        for (int i = 0; i < count; i++) {
            const float *value =
                cached(p.value, p.dtype, plane.batch, keys[i], plane.kv_head, p.value_dim, work.value_row) + c * WIDTH;
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
inline void decode_weights(const DecodeJob &job, const DecodeWork &work, const DecodePlane &plane, const uint8_t *visible,
                           const int64_t *keys, int count, int64_t r, float *part) {
    const nearfield_decode &p = *job.problem;
    DecodeRow at = decode_row(job, plane, r);
    float *w = work.weights + r * AT_ONCE, *state = part + r * job.part, top = state[0];
    const float *addend = nullptr;
    if (p.addend)
        addend = p.addend + plane.batch * p.addend_stride[0] + at.head * p.addend_stride[1] + at.query * p.addend_stride[2];
    int64_t last = last_seen(p, at.query);
    for (int i = 0; keys[count - 1] > last && i < count; i++)
        if (keys[i] > last) w[i] = -INFINITE;
    for (int i = 0; i < count; i++) {
        if (addend) w[i] += addend[keys[i]] * LOG2E;
        if (visible && !visible[at.query * p.visible_stride[1] + keys[i]]) w[i] = -INFINITE;
        top = most(top, w[i]);
    }
    float safe = top == -INFINITE ? 0 : top, shrink = __builtin_exp2f(state[0] - safe), total = state[1] * shrink;
    for (int i = count; i < round_up(count, WIDTH); i++) w[i] = -INFINITE;
    for (int i = 0; i < count; i += WIDTH) store(w + i, exp2<5>(load(w + i) - safe));
    for (int i = 0; i < count; i++) total += w[i];
    for (int64_t c = 0; shrink != 1 && c < p.value_dim; c++) state[2 + c] *= shrink;
    state[0] = top, state[1] = total;
}

// The keys of numbers [from, to) that some query of the plane sees; how many.
inline int decode_keys(const DecodeJob &job, const DecodePlane &plane, const uint8_t *visible, int64_t from, int64_t to,
                       int64_t *keys) {
    const nearfield_decode &p = *job.problem;
    int count = 0;
    while (from < to) {
        int64_t key = from, run = to - from;  // keys side by side
        if (plane.blocks) {
            int64_t within = from % p.block_size;
            key = plane.blocks[from / p.block_size] * p.block_size + within, run = least(run, p.block_size - within);
        }
        for (int64_t end = key + run; key < end; key++) keys[count++] = key;
        from += run;
    }
    if (!visible && !p.is_causal) return count;
    int64_t per_list = p.num_queries / job.lists, first = plane.list * per_list, last = first + per_list;
    int seen = 0;
    for (int i = 0; i < count; i++) {
        bool is_seen = keys[i] <= last_seen(p, last - 1);
        if (is_seen && visible) {
            is_seen = false;
            for (int64_t n = first; n < last && !is_seen; n++) is_seen = visible[n * p.visible_stride[1] + keys[i]];
        }
        if (is_seen) keys[seen++] = keys[i];
    }
    return seen;
}

inline void decode_span(void *context, int64_t task, void *memory) {
    const DecodeJob &job = *static_cast<DecodeJob *>(context);
    const nearfield_decode &p = *job.problem;
    int64_t span = task % job.spans, number = task / job.spans;
    DecodePlane plane = decode_plane(job, number);
    int64_t first = span * SPAN, last = least(first + SPAN, plane.keys);
    float *part = job.parts + (number * job.spans + span) * job.rows * job.part;
    Arena arena(memory);
    DecodeWork work(arena, job);
    memset(work.queries, 0, sizeof(float) * size_t(job.rows * job.head_wide));
    memset(work.key_row, 0, sizeof(float) * size_t(job.head_wide));
    memset(work.value_row, 0, sizeof(float) * size_t(job.value_wide));
    memset(part, 0, sizeof(float) * size_t(job.rows * job.part));
    for (int64_t r = 0; r < job.rows; r++) {
        DecodeRow at = decode_row(job, plane, r);
        const char *query = address(p.query, item_bytes(p.dtype), plane.batch, 0, 0, at.query, at.head);
        read_row(query, p.dtype, p.head_dim, work.queries + r * job.head_wide);
        part[r * job.part] = -INFINITE;
    }
    const KeyRows rows{&p.key, p.dtype, p.head_dim, plane.batch, plane.kv_head, work.key_row, work.sums};
    const uint8_t *visible = p.visible ? p.visible + plane.batch * p.visible_stride[0] : nullptr;
    for (int64_t begin = first; begin < last; begin += AT_ONCE) {
        int64_t keys[AT_ONCE];
        int count = decode_keys(job, plane, visible, begin, least(begin + AT_ONCE, last), keys);
        if (!count) continue;
        each_rows(job.rows, [&](int64_t r, auto together) {
            products_with_keys<together.value>(rows, keys, count, work.queries + r * job.head_wide, job.head_wide,
                                               float(p.scale) * LOG2E, work.weights + r * AT_ONCE);
        });
        for (int64_t r = 0; r < job.rows; r++) decode_weights(job, work, plane, visible, keys, count, r, part);
        each_rows(job.rows, [&](int64_t r, auto together) {
            decode_values<together.value>(job, work, plane, r, keys, count, part);
        });
    }
}

inline void merge_spans(void *context, int64_t number, void *memory) {
    const DecodeJob &job = *static_cast<DecodeJob *>(context);
    const nearfield_decode &p = *job.problem;
    DecodePlane plane = decode_plane(job, number);
    float *sum = static_cast<float *>(memory);
    for (int64_t r = 0; r < job.rows; r++) {
        DecodeRow at = decode_row(job, plane, r);
        float top = -INFINITE, total = 0;
        auto part = [&](int64_t span) { return job.parts + ((number * job.spans + span) * job.rows + r) * job.part; };
        for (int64_t s = 0; s < job.spans; s++) top = most(top, part(s)[0]);
        memset(sum, 0, sizeof(float) * size_t(job.value_wide));
        for (int64_t s = 0; s < job.spans; s++) {
            float share = top == -INFINITE ? 0 : __builtin_exp2f(part(s)[0] - top);
            total += part(s)[1] * share;
            for (int64_t c = 0; c < job.value_wide; c += WIDTH) store(sum + c, load(sum + c) + load(part(s) + 2 + c) * share);
        }
        float factor = total == 0 ? 0 : 1 / total;
        for (int64_t c = 0; c < job.value_wide; c += WIDTH) store(sum + c, load(sum + c) * factor);
        write_row(sum, p.value_dim, address(p.out, item_bytes(p.dtype), plane.batch, 0, 0, at.query, at.head), p.dtype);
        if (p.lse.data)
            *reinterpret_cast<float *>(address(p.lse, 4, plane.batch, 0, 0, at.query, at.head)) =
                total == 0 ? -INFINITE : (top + __builtin_log2f(total)) * LN2;
    }
}

// Numbers in ascending order, by Shell's method: lists are short, and most come in order.
inline void sort(int64_t *numbers, int64_t count) {
    int64_t gap = 1;
    while (gap < count / 3) gap = 3 * gap + 1;
    for (; gap; gap /= 3)
        for (int64_t i = gap; i < count; i++) {
            int64_t x = numbers[i], j = i;
            for (; j >= gap && numbers[j - gap] > x; j -= gap) numbers[j] = numbers[j - gap];
            numbers[j] = x;
        }
}

// The lists of all planes; false where one names a block behind the last.
inline bool read_lists(const DecodeJob &job) {
    const nearfield_decode &p = *job.problem;
    int64_t blocks = ceil_div(p.num_keys, p.block_size);
    for (int64_t number = 0; number < job.planes; number++) {
        int64_t *to = job.blocks + number * (1 + p.list_length), count = 0, head = number / job.lists;
        const int64_t *list = p.blocks + head / p.kv_heads * p.block_stride[0] + number % job.lists * p.block_stride[1] +
                              head % p.kv_heads * p.block_stride[2];
        for (int64_t i = 0; i < p.list_length; i++) {
            if (list[i] >= blocks) return false;
            if (list[i] >= 0) to[++count] = list[i];
        }
        sort(to + 1, count);
        *to = 0;
        for (int64_t i = 1; i <= count; i++)
            if (i == 1 || to[i] != to[*to]) to[++*to] = to[i];
    }
    return true;
}

inline int run_decode(const nearfield_decode *problem, int64_t threads) {
    const nearfield_decode &p = *problem;
    DecodeJob job{};
    job.problem = problem, job.keys = p.num_keys;
    job.lists = p.block_size && p.block_stride[1] ? p.num_queries : 1;
    if (p.block_size && p.list_length < ceil_div(p.num_keys, p.block_size)) job.keys = p.list_length * p.block_size;
    job.planes = p.batch * p.kv_heads * job.lists, job.spans = ceil_div(job.keys, SPAN);
    job.head_wide = round_up(p.head_dim, int64_t(LANES)), job.value_wide = round_up(p.value_dim, int64_t(LANES));
    job.part = 2 + job.value_wide;
    if (!job.planes || !p.num_queries) return NEARFIELD_OK;
    job.rows = p.num_queries / job.lists * (p.heads / p.kv_heads);
    double bytes = double(job.planes * job.keys * (p.head_dim + p.value_dim) * item_bytes(p.dtype));
    threads = worth(bytes / 12e6, threads);  // memory gives some 12 MB a millisecond
    int error = NEARFIELD_OK;
    if (p.block_size) {
        job.blocks = static_cast<int64_t *>(malloc(sizeof(int64_t) * size_t(job.planes * (1 + p.list_length))));
        error = !job.blocks ? NEARFIELD_NO_MEMORY : read_lists(job) ? NEARFIELD_OK : NEARFIELD_INVALID;
    }
    if (!error) {
        int64_t floats = job.planes * job.spans * job.rows * job.part;
        job.parts = static_cast<float *>(malloc(sizeof(float) * size_t(most(floats, int64_t(1)))));
        Arena arena(nullptr);
        DecodeWork measured(arena, job);
        bool is_done = job.parts && parallel_for(job.planes * job.spans, threads, arena.used, decode_span, &job) &&
                       parallel_for(job.planes, threads, sizeof(float) * size_t(job.value_wide), merge_spans, &job);
        error = is_done ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
    }
    free(job.parts), free(job.blocks);
    return error;
}

}  // namespace
}  // namespace nearfield
