// Local linear attention for one instruction set, which NEARFIELD_ISA names.
#include "lla_backward.h"
#include "table.h"

namespace nearfield {
namespace {

constexpr int64_t MOST_PARTS = 32;  // tasks of a backward with few heads: each has sums of its own

// Queries [first, last) with the keys that they see, whose gradients lie at `offset` in the sums of a head.
struct LlaPart {
    int64_t first, last, offset;
    Range reach;
};

struct LlaJob {
    const nearfield_lla *problem;
    int64_t planes, blocks;     // batch entries times key heads; blocks of queries
    int64_t num_parts, floats;  // backward: of one plane
    LlaPart parts[MOST_PARTS];
    float *sums;  // backward: [planes][floats]
};

int64_t num_pairs(const nearfield_lla &p, int64_t first, int64_t last) {
    Range reach = lla_reach(p, first, last);
    return (last - first) * (reach.to - reach.from);
}

// Calls run(first, last) for the blocks of queries from `first` to `last`.
template <class Run>
void each_block(int64_t first, int64_t last, Run run) {
    for (int64_t q = first; q < last; q += LLA_BLOCK) run(q, least(q + LLA_BLOCK, last));
}

// Opens every tile of a block, whose packed keys serve them all, and calls run(is_blind).
template <class Run>
void each_tile(LlaTile &tile, int64_t plane, int64_t first, int64_t last, Run run) {
    const nearfield_lla &p = tile.p;
    int64_t batch = plane / p.kv_heads, kv_head = plane % p.kv_heads, group = p.heads / p.kv_heads;
    for (int64_t q = first; q < last; q += LANES)
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) run(!tile.open(batch, q, last, h));
}

void lla_forward_task(void *context, int64_t task, void *memory) {
    const LlaJob &job = *static_cast<LlaJob *>(context);
    const nearfield_lla &p = *job.problem;
    Arena arena(memory);
    LlaTile tile(p, arena);
    int64_t plane = task % job.planes, block = job.blocks - 1 - task / job.planes;  // where more is seen first
    int64_t first = block * LLA_BLOCK, last = least(first + LLA_BLOCK, p.num_queries);
    tile.packed.fill(p, tile.d, plane / p.kv_heads, plane % p.kv_heads, first, last);
    each_tile(tile, plane, first, last, [&](bool is_blind) { is_blind ? tile.forward_blind() : tile.forward(); });
}

// Parts of about the same work, the same whatever the threads.
void split(LlaJob &job) {
    const nearfield_lla &p = *job.problem;
    const LlaDims d(p);
    int64_t wanted = least(job.blocks, most(MOST_PARTS / job.planes, int64_t(1)));
    double whole = 0, done = 0;
    each_block(0, p.num_queries, [&](int64_t first, int64_t last) { whole += double(num_pairs(p, first, last)); });
    int64_t start = 0;
    each_block(0, p.num_queries, [&](int64_t first, int64_t last) {
        done += double(num_pairs(p, first, last));
        if (last < p.num_queries && done * double(wanted) < whole * double(job.num_parts + 1)) return;
        LlaPart part{start, last, job.floats, lla_reach(p, start, last)};
        job.floats += (part.reach.to - part.reach.from + 1) * (d.head_wide + d.value_wide);  // a row for padding
        job.parts[job.num_parts++] = part;
        start = last;
    });
}

void lla_backward_task(void *context, int64_t task, void *memory) {
    const LlaJob &job = *static_cast<LlaJob *>(context);
    const nearfield_lla &p = *job.problem;
    Arena arena(memory);
    LlaBackward tile(p, arena);
    const LlaDims &d = tile.d;
    int32_t *place = arena.take<int32_t>(d.most_keys + ROWS);
    int64_t plane = task % job.planes;
    const LlaPart &part = job.parts[job.num_parts - 1 - task / job.planes];
    int64_t rows = part.reach.to - part.reach.from + 1;
    float *grad_keys = job.sums + plane * job.floats + part.offset, *grad_values = grad_keys + rows * d.head_wide;
    memset(grad_keys, 0, sizeof(float) * size_t(rows * (d.head_wide + d.value_wide)));
    each_block(part.first, part.last, [&](int64_t first, int64_t last) {
        LlaPacked &packed = tile.packed;
        packed.fill(p, d, plane / p.kv_heads, plane % p.kv_heads, first, last);
        for (int32_t i = 0; i < packed.count; i++)
            place[i] = packed.token[i] + int32_t(packed.reach.from - part.reach.from);
        for (int i = 0; i < ROWS; i++) place[packed.count + i] = int32_t(rows - 1);
        each_tile(tile, plane, first, last, [&](bool is_blind) {
            is_blind ? tile.backward_blind() : tile.backward(place, grad_keys, grad_values);
        });
    });
}

// Adds up what the parts found for some keys of a head, in the order of the parts.
void lla_sum_task(void *context, int64_t task, void *memory) {
    const LlaJob &job = *static_cast<LlaJob *>(context);
    const nearfield_lla &p = *job.problem;
    const LlaDims d(p);
    int64_t plane = task % job.planes, first = task / job.planes * LLA_BLOCK, bytes = item_bytes(p.dtype);
    float *key = static_cast<float *>(memory), *value = key + d.head_wide;
    for (int64_t t = first; t < least(first + LLA_BLOCK, p.num_keys); t++) {
        memset(key, 0, sizeof(float) * size_t(d.head_wide + d.value_wide));
        for (int64_t i = 0; i < job.num_parts; i++) {
            const LlaPart &part = job.parts[i];
            if (t < part.reach.from || t >= part.reach.to) continue;
            const float *sums = job.sums + plane * job.floats + part.offset;
            const float *keys = sums + (t - part.reach.from) * d.head_wide;
            const float *values =
                sums + (part.reach.to - part.reach.from + 1) * d.head_wide + (t - part.reach.from) * d.value_wide;
            for (int64_t c = 0; c < d.head_wide; c += WIDTH) store(key + c, load(key + c) + load(keys + c));
            for (int64_t c = 0; c < d.value_wide; c += WIDTH) store(value + c, load(value + c) + load(values + c));
        }
        write_row(key, d.head, lla_row(p.grad_key, bytes, plane / p.kv_heads, t, plane % p.kv_heads), p.dtype);
        write_row(value, d.value, lla_row(p.grad_value, bytes, plane / p.kv_heads, t, plane % p.kv_heads), p.dtype);
    }
}

LlaJob make_job(const nearfield_lla &p) {
    LlaJob job{};
    job.problem = &p, job.planes = p.batch * p.kv_heads, job.blocks = ceil_div(p.num_queries, LLA_BLOCK);
    return job;
}

// Threads that the products are worth; solvers often stop early.
int64_t lla_threads(const nearfield_lla &p, double products, int64_t threads) {
    double pairs = 0;
    each_block(0, p.num_queries, [&](int64_t first, int64_t last) { pairs += double(num_pairs(p, first, last)); });
    double steps = double(least(p.max_iterations, int64_t(8)));
    double each = (2 * steps + products) * double(p.head_dim) + (products - 2) * double(p.value_dim);
    return worth(pairs * double(p.batch * p.heads) * each / (LANES * 2e6), threads);
}

template <class Tile>
size_t tile_bytes(const nearfield_lla &p, bool with_places) {
    Arena arena(nullptr);
    Tile tile(p, arena);
    if (with_places) arena.take<int32_t>(tile.d.most_keys + ROWS);
    return arena.used;
}

}  // namespace

int NEARFIELD_ISA::lla_forward(const nearfield_lla *problem, int64_t threads) {
    LlaJob job = make_job(*problem);
    if (!job.planes || !job.blocks) return NEARFIELD_OK;
    threads = lla_threads(*problem, 3, threads);
    bool is_done =
        parallel_for(job.planes * job.blocks, threads, tile_bytes<LlaTile>(*problem, false), lla_forward_task, &job);
    return is_done ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
}

int NEARFIELD_ISA::lla_backward(const nearfield_lla *problem, int64_t threads) {
    const nearfield_lla &p = *problem;
    const LlaDims d(p);
    LlaJob job = make_job(p);
    if (!job.planes || !p.num_keys) return NEARFIELD_OK;
    if (job.blocks) split(job);
    job.sums = static_cast<float *>(malloc(sizeof(float) * size_t(most(job.planes * job.floats, int64_t(1)))));
    threads = lla_threads(p, 8, threads);
    size_t sum_bytes = sizeof(float) * size_t(d.head_wide + d.value_wide);
    int64_t sum_tasks = job.planes * ceil_div(p.num_keys, LLA_BLOCK);
    size_t bytes = most(tile_bytes<LlaBackward>(p, true), sum_bytes);  // asked for once: short memory is noticed first
    int64_t tasks = job.planes * job.num_parts;
    bool is_done = job.sums && (!tasks || parallel_for(tasks, threads, bytes, lla_backward_task, &job)) &&
                   parallel_for(sum_tasks, threads, bytes, lla_sum_task, &job);
    free(job.sums);
    return is_done ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
}

}  // namespace nearfield
