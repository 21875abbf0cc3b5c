// Selective scans for one instruction set, as jobs for the threads.
#include <cstdlib>

#include "parallel.h"
#include "scan_backward.h"
#include "table.h"

namespace nearfield {
namespace {

ScanJob make_scan(const nearfield_scan &p) {
    ScanJob job{};
    job.problem = &p;
    job.sequences = p.cu_seqlens ? p.sequences : p.batch;
    job.rows = chunk_rows(p.state);
    job.group_channels = p.channels / p.groups;
    job.group_blocks = ceil_div(job.group_channels, int64_t(LANES));
    job.group_spans = ceil_div(job.group_blocks, SPAN_BLOCKS);
    job.bytes = item_bytes(p.dtype);
    return job;
}

int64_t num_tasks(const ScanJob &job) { return job.sequences * job.problem->groups * job.group_spans; }

size_t scratch(const ScanJob &job, bool backward) {
    Arena arena(nullptr);
    ScanWork measured(arena, job, backward);
    return arena.used;
}

// A vector of states takes some twenty cycles, its rows some sixty.
double milliseconds(const ScanJob &job) {
    const nearfield_scan &p = *job.problem;
    return double(p.batch * p.tokens) * double(p.groups * job.group_blocks) * (20 * double(p.state) + 60) / 2.5e6;
}

float *floats(int64_t count) { return static_cast<float *>(malloc(sizeof(float) * size_t(most(count, int64_t(1))))); }

}  // namespace

int NEARFIELD_ISA::scan_forward(const nearfield_scan *problem, int64_t threads) {
    ScanJob job = make_scan(*problem);
    threads = worth(milliseconds(job), threads);
    return parallel_for(num_tasks(job), threads, scratch(job, false), scan_forward_task, &job) ? NEARFIELD_OK
                                                                                             : NEARFIELD_NO_MEMORY;
}

int NEARFIELD_ISA::scan_backward(const nearfield_scan *problem, int64_t threads) {
    const nearfield_scan &p = *problem;
    ScanJob job = make_scan(p);
    int64_t blocks = p.groups * job.group_blocks, spans = p.groups * job.group_spans, tokens = p.batch * p.tokens;
    threads = worth(3 * milliseconds(job), threads);
    job.table_parts = floats(job.sequences * blocks * (p.state + 2) * LANES);
    job.row_parts = floats(2 * spans * tokens * p.state);
    size_t bytes = most(scratch(job, true), sizeof(float) * size_t(p.state));
    bool is_done = job.table_parts && job.row_parts &&
                   parallel_for(num_tasks(job), threads, bytes, scan_backward_task, &job) &&
                   parallel_for(blocks, threads, 0, sum_tables_task, &job) &&
                   parallel_for(ceil_div(tokens, SUMMED_TOKENS), threads, bytes, sum_rows_task, &job);
    free(job.table_parts), free(job.row_parts);
    return is_done ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
}

}  // namespace nearfield
