// Which blocks of keys a query cares for: the share of each in its attention, and the choice of some.
#pragma once
#include "decode.h"

namespace nearfield {
namespace {

// A plane is the heads that share keys. A task takes a span of whole blocks and leaves of each row and block the maximum
// of the scores, in powers of two, and the sum of the powers relative to it.
struct SharesJob {
    const nearfield_shares *problem;
    float *parts;  // [planes][rows][2][blocks_wide]
    int64_t planes, rows, blocks, blocks_wide;
    int64_t span, spans;      // blocks of a task, and tasks of a plane
    int64_t width, row_wide;  // channels of a row of keys
};

struct SharesWork {
    float *queries, *sums, *scores, *key_row;

    SharesWork(Arena &arena, const SharesJob &job) {
        queries = arena.take<float>(job.rows * job.row_wide);
        sums = arena.take<float>(TOGETHER * WIDTH * WIDTH);
        scores = arena.take<float>(job.rows * AT_ONCE);
        key_row = arena.take<float>(job.row_wide);
    }
};

// A query as the rows of keys are multiplied by it; for bounds what is positive, then what is negative.
inline void read_query(const SharesJob &job, int64_t batch, int64_t kv_head, int64_t r, float *to) {
    const nearfield_shares &p = *job.problem;
    int64_t group = p.heads / p.kv_heads;
    read_row(address(p.query, item_bytes(p.dtype), batch, 0, 0, r / group, kv_head * group + r % group), p.dtype, p.head_dim, to);
    if (!p.is_bound) return;
    for (int64_t c = 0; c < p.head_dim; c++) {
        float x = p.scale < 0 ? -to[c] : to[c];  // the scores are multiplied by the size of the scale
        to[c] = most(x, 0.0f), to[p.head_dim + c] = least(x, 0.0f);
    }
}

// Joins `count` scores, up to AT_ONCE, to the maximum and the sum of a block.
inline void join_scores(const float *scores, int count, float *maximum, float *sum) {
    alignas(64) float w[AT_ONCE];
    memcpy(w, scores, sizeof(float) * size_t(count));
    for (int i = count; i < round_up(count, WIDTH); i++) w[i] = -INFINITE;
    vec highest = load(w), total{};
    for (int i = WIDTH; i < count; i += WIDTH) highest = larger(highest, load(w + i));
    float top = *maximum;
    for (int k = 0; k < WIDTH; k++) top = most(top, highest[k]);
    if (top == -INFINITE) return;
    for (int i = 0; i < count; i += WIDTH) total += exp2<5>(load(w + i) - top);
    float all = *sum == 0 ? 0 : *sum * __builtin_exp2f(*maximum - top);
    for (int k = 0; k < WIDTH; k++) all += total[k];
    *maximum = top, *sum = all;
}

inline void shares_span(void *context, int64_t task, void *memory) {
    const SharesJob &job = *static_cast<SharesJob *>(context);
    const nearfield_shares &p = *job.problem;
    int64_t plane = task / job.spans, batch = plane / p.kv_heads, kv_head = plane % p.kv_heads;
    int64_t block = task % job.spans * job.span, size = p.block_size;
    int64_t last = least((block + job.span) * size, p.num_keys), group = p.heads / p.kv_heads;
    Arena arena(memory);
    SharesWork work(arena, job);
    memset(work.queries, 0, sizeof(float) * size_t(job.rows * job.row_wide));
    memset(work.key_row, 0, sizeof(float) * size_t(job.row_wide));
    for (int64_t r = 0; r < job.rows; r++) {
        read_query(job, batch, kv_head, r, work.queries + r * job.row_wide);
        float *part = job.parts + (plane * job.rows + r) * 2 * job.blocks_wide;
        for (int64_t i = block; i < least(block + job.span, job.blocks); i++)
            part[i] = -INFINITE, part[job.blocks_wide + i] = 0;
    }
    float scale = float(p.is_bound ? __builtin_fabs(p.scale) : p.scale) * LOG2E;
    const KeyRows rows{&p.key, p.key_dtype, job.width, batch, kv_head, work.key_row, work.sums};
    const uint8_t *mask = p.key_mask ? p.key_mask + batch * p.num_keys : nullptr;
    for (int64_t begin = block * size; begin < last;) {
        // a chunk ends with a block where one is not much shorter
        int64_t end = least(begin + AT_ONCE, last), rest = size - begin % size;
        if (rest <= AT_ONCE && size > AT_ONCE / 2) end = least(begin + rest, last);
        int64_t keys[AT_ONCE];
        int count = 0;
        for (int64_t key = begin; key < end; key++)
            if (!mask || mask[key]) keys[count++] = key;
        if (count)
            each_rows(job.rows, [&](int64_t r, auto together) {
                products_with_keys<together.value>(rows, keys, count, work.queries + r * job.row_wide, job.row_wide, scale,
                                                   work.scores + r * AT_ONCE);
            });
        for (int64_t r = 0; count && r < job.rows; r++) {
            float *w = work.scores + r * AT_ONCE, *part = job.parts + (plane * job.rows + r) * 2 * job.blocks_wide;
            int64_t seen = p.num_keys - (p.is_causal ? p.num_queries - 1 - r / group : 0);  // keys before it are
            int until = count;
            while (until && keys[until - 1] >= seen) until--;
            if (size == 1) {
                for (int i = 0; i < until; i++)
                    if (w[i] != -INFINITE) part[keys[i]] = w[i], part[job.blocks_wide + keys[i]] = 1;
                continue;
            }
            for (int i = 0; i < until;) {
                int64_t at = keys[i] / size;
                int run = 1;
                if (keys[until - 1] / size == at) run = until - i;
                while (i + run < until && keys[i + run] / size == at) run++;
                join_scores(w + i, run, part + at, part + job.blocks_wide + at);
                i += run;
            }
        }
        begin = end;
    }
}

inline void merge_shares(void *context, int64_t task, void *memory) {
    const SharesJob &job = *static_cast<SharesJob *>(context);
    const nearfield_shares &p = *job.problem;
    int64_t plane = task / p.num_queries, query = task % p.num_queries, group = p.heads / p.kv_heads;
    float *sum = static_cast<float *>(memory);
    memset(sum, 0, sizeof(float) * size_t(job.blocks_wide));
    const float *part = nullptr;
    for (int64_t g = 0; g < group; g++) {
        part = job.parts + (plane * job.rows + query * group + g) * 2 * job.blocks_wide;
        const float *sums = part + job.blocks_wide;
        vec highest = splat(-INFINITE), total{};
        for (int64_t i = 0; i < job.blocks_wide; i += WIDTH) highest = larger(highest, load(part + i));
        float top = -INFINITE, all = 0;
        for (int k = 0; k < WIDTH; k++) top = most(top, highest[k]);
        if (top == -INFINITE) continue;
        for (int64_t i = 0; i < job.blocks_wide; i += WIDTH) total += exp2<5>(load(part + i) - top) * load(sums + i);
        for (int k = 0; k < WIDTH; k++) all += total[k];
        float factor = 1 / (all * float(group));
        for (int64_t i = 0; i < job.blocks_wide; i += WIDTH)
            store(sum + i, load(sum + i) + exp2<5>(load(part + i) - top) * load(sums + i) * factor);
    }
    int64_t batch = plane / p.kv_heads, kv_head = plane % p.kv_heads;
    float *to = p.shares + ((batch * p.num_queries + query) * p.kv_heads + kv_head) * job.blocks;
    for (int64_t i = 0; i < job.blocks; i++)  // a block that is seen has a share, however small
        to[i] = part[job.blocks_wide + i] > 0 ? most(sum[i], 1.17549435e-38f) : 0;
}

inline int run_shares(const nearfield_shares *problem, int64_t threads) {
    const nearfield_shares &p = *problem;
    SharesJob job{};
    job.problem = problem;
    job.planes = p.batch * p.kv_heads, job.rows = p.num_queries * (p.heads / p.kv_heads);
    job.blocks = ceil_div(p.num_keys, p.block_size), job.blocks_wide = round_up(job.blocks, int64_t(LANES));
    job.width = p.head_dim << p.is_bound, job.row_wide = round_up(job.width, int64_t(LANES));
    if (!job.planes || !job.rows || !job.blocks) return NEARFIELD_OK;
    job.span = most(SPAN / p.block_size, int64_t(1)), job.spans = ceil_div(job.blocks, job.span);
    double bytes = double(job.planes * p.num_keys * job.width * item_bytes(p.key_dtype));
    threads = worth(bytes / 12e6, threads);
    int64_t floats = job.planes * job.rows * 2 * job.blocks_wide;
    job.parts = static_cast<float *>(malloc(sizeof(float) * size_t(floats)));
    for (int64_t row = 0; job.parts && row < job.planes * job.rows; row++)
        for (int64_t i = job.blocks; i < job.blocks_wide; i++) {
            float *part = job.parts + row * 2 * job.blocks_wide;
            part[i] = -INFINITE, part[job.blocks_wide + i] = 0;
        }
    Arena arena(nullptr);
    SharesWork measured(arena, job);
    bool is_done = job.parts && parallel_for(job.planes * job.spans, threads, arena.used, shares_span, &job);
    for (int64_t row = 0; is_done && p.last_part != 1 && row < job.planes * job.rows; row++)
        job.parts[row * 2 * job.blocks_wide + job.blocks_wide + job.blocks - 1] *= float(p.last_part);
    is_done = is_done && parallel_for(job.planes * p.num_queries, threads, sizeof(float) * size_t(job.blocks_wide),
                                      merge_shares, &job);
    free(job.parts);
    return is_done ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
}

// A score as a whole number of the same order; 0 where there is none. Forced blocks get the largest.
constexpr int32_t FORCED = 0x7fffffff;

// The largest number that at least `wanted` (1 or more) of the keys reach, or 1.
inline int32_t threshold(const int32_t *order, int64_t count, int64_t wanted) {
    int32_t low = 1;
    for (int32_t bit = 1 << 30; bit; bit >>= 1) {
        int32_t tried = low - 1 + bit;  // low - 1 has none of the lower bits yet
        int64_t reach = 0;
        for (int64_t i = 0; i < count; i++) reach += order[i] > tried;
        if (reach >= wanted) low = tried + 1;
    }
    return low;
}

inline void choose_row(void *context, int64_t row, void *memory) {
    const nearfield_choice &p = *static_cast<const nearfield_choice *>(context);
    int64_t blocks = ceil_div(p.num_keys, p.block_size), query = row / p.kv_heads % p.num_queries;
    int64_t at = p.num_keys - p.num_queries + query, recent = blocks, end = -1;
    if (p.num_recent) recent = most(at - p.num_recent + 1, int64_t(0)) / p.block_size, end = at / p.block_size;
    const float *scores = p.scores + row * blocks;
    int32_t *order = static_cast<int32_t *>(memory);
    int64_t sinks = 0, forced = 0;
    for (int64_t i = 0; i < blocks; i++) {
        int32_t bits = 0;
        if (scores[i] > 0) {
            memcpy(&bits, scores + i, 4);
            if (sinks < p.sink_blocks || (recent <= i && i <= end)) bits = FORCED, forced++;
            sinks++;
        }
        order[i] = bits;
    }
    int64_t wanted = most(p.num_blocks, forced), equal = 0;
    int32_t least_taken = wanted ? threshold(order, blocks, wanted) : FORCED;
    int64_t *to = p.chosen + row * p.list_length, count = 0;
    for (int64_t i = 0; i < blocks; i++) equal += order[i] > least_taken;
    equal = wanted - equal;  // of those at the threshold the first so many
    for (int64_t i = 0; i < blocks && count < p.list_length; i++)
        if (order[i] > least_taken || (order[i] == least_taken && equal-- > 0)) to[count++] = i;
    while (count < p.list_length) to[count++] = -1;
}

inline int run_choice(const nearfield_choice *problem, int64_t threads) {
    const nearfield_choice &p = *problem;
    int64_t rows = p.batch * p.num_queries * p.kv_heads, blocks = ceil_div(p.num_keys, p.block_size);
    threads = worth(double(rows * blocks) / 4e5, threads);  // a few times 30 comparisons a block
    bool is_done = parallel_for(rows, threads, sizeof(int32_t) * size_t(most(blocks, int64_t(1))), choose_row,
                                const_cast<nearfield_choice *>(problem));
    return is_done ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
}

}  // namespace
}  // namespace nearfield
