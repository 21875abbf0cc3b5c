// Linear attention for one instruction set, which NEARFIELD_ISA names.
//
// Lanes of a state never meet, so a task is a head and some of its lanes. Where lanes are channels of values it gives
// the output, or the gradients of values and beta; where they are channels of keys, the gradients of the others.
#include "linear_work.h"
#include "parallel.h"
#include "table.h"

namespace nearfield {
namespace {

// The output, and the state after; without `reads` only the former's delta rule, for the backward.
template <Decay DECAY>
void run_forward(const LinearJob &job, int64_t plane, Span span, const LinearWork &work, bool reads) {
    const nearfield_linear &p = *job.problem;
    const int64_t head = job.head_wide, value = job.value_wide, stride = span.count() + LANES;
    load_values(job, p.initial_state, plane, span, work.state, stride);
    for (int64_t number = 0; number < job.chunks; number++) {
        Chunk chunk = chunk_of(job, plane, number);
        if (reads) {
            pack(job, p.query, p.dtype, chunk, p.head_dim, {0, head}, work.query, head);
            multiply(chunk, {0, head}, float(p.scale), work.query, head);
        }
        pack(job, p.key, p.dtype, chunk, p.head_dim, {0, head}, work.key, head);
        pack(job, p.value, p.dtype, chunk, p.value_dim, span, work.value, value);
        pack_decay(job, chunk, {0, head}, work);
        Delta w{pass_over(job, chunk, work, true, span, stride), work.value + span.from, work.beta};
        w.in_rows = work.key, w.in_lanes = work.value + span.from;
        w.out_rows = work.query, w.out = work.out + span.from;
        w.from = w.to = work.state;
        if (p.beta.data) {
            pack(job, p.beta, NEARFIELD_F32, chunk, 1, {0, 1}, work.beta, 1);
            each_stretch(span.count(), [&](int64_t lane, auto vectors) {
                if (reads)
                    walk_delta<DECAY, READS, vectors.value>(w, head, lane);
                else
                    walk_delta<DECAY, 0, vectors.value>(w, head, lane);
            });
            for (int t = 0; t < chunk.count && !reads; t++)
                memcpy(job.lacks + job.row(plane, chunk.begin + t) * value + span.from, w.lanes + t * value,
                       sizeof(float) * size_t(span.count()));
        } else {
            for (int t = 0; t < chunk.count; t++) memset(w.out + t * value, 0, sizeof(float) * size_t(span.count()));
            for (int64_t lane = 0; lane < span.count(); lane += WIDTH)
                each_block(head, [&](int64_t row, auto rows) { walk<DECAY, READS, rows.value>(w, row, lane); });
        }
        if (reads) unpack(job, p.out, p.dtype, chunk, p.value_dim, span, work.out, value);
    }
    if (reads) store_values(job, work.state, stride, plane, span, p.final_state);
}

// Gradients of values, of beta and of the initial state.
template <Decay DECAY>
void run_values(const LinearJob &job, int64_t plane, Span span, const LinearWork &work) {
    const nearfield_linear &p = *job.problem;
    const int64_t head = job.head_wide, value = job.value_wide, stride = span.count() + LANES;
    if (p.beta.data) run_forward<DECAY>(job, plane, span, work, false);
    load_values(job, p.grad_final_state, plane, span, work.state, stride);
    for (int64_t number = job.chunks - 1; number >= 0; number--) {
        Chunk chunk = chunk_of(job, plane, number);
        pack(job, p.query, p.dtype, chunk, p.head_dim, {0, head}, work.query, head);
        multiply(chunk, {0, head}, float(p.scale), work.query, head);
        pack(job, p.key, p.dtype, chunk, p.head_dim, {0, head}, work.key, head);
        pack(job, p.grad_out, p.dtype, chunk, p.value_dim, span, work.grad_out, value);
        pack_decay(job, chunk, {0, head}, work);
        Delta w{pass_over(job, chunk, work, true, span, stride), nullptr, work.beta};
        w.in_rows = work.query, w.in_lanes = work.grad_out + span.from;
        w.out_rows = work.key, w.out = work.out + span.from;
        w.from = w.to = work.state;
        if (p.beta.data) {
            pack(job, p.beta, NEARFIELD_F32, chunk, 1, {0, 1}, work.beta, 1);
            each_stretch(span.count(),
                         [&](int64_t lane, auto vectors) { walk_delta_back<DECAY, vectors.value>(w, head, lane); });
            for (int t = 0; t < chunk.count; t++) {
                int64_t row = job.row(plane, chunk.begin + t) * value;
                for (int64_t c = span.from; c < span.to; c += LANES) {
                    float *grad = work.out + t * value + c, sum = 0;
                    for (int i = 0; i < LANES; i++) sum += grad[i] * job.lacks[row + c + i];
                    job.beta_parts[(plane * (value / LANES) + c / LANES) * p.length + chunk.begin + t] = sum;
                    for (int i = 0; i < LANES; i++) grad[i] *= work.beta[t], job.minus[row + c + i] = -grad[i];
                }
            }
        } else {
            for (int t = 0; t < chunk.count; t++) memset(w.out + t * value, 0, sizeof(float) * size_t(span.count()));
            for (int64_t lane = 0; lane < span.count(); lane += WIDTH)
                each_block(head, [&](int64_t row, auto rows) {
                    walk<DECAY, READS | REVERSED, rows.value>(w, row, lane);
                });
        }
        unpack(job, p.grad_value, p.dtype, chunk, p.value_dim, span, work.out, value);
    }
    store_values(job, work.state, stride, plane, span, p.grad_initial_state);
}

// Gradients of queries, keys and decays: lanes are channels of keys, rows those of values.
//   d q_t = scale S_t d o_t,   d k_t = G_t e_t - beta_t S' d e_t,   d g_t = the sum over a row of S' G',
// with e = v and no second term unless there is a beta; G and G' are as in walk_delta_back.
template <Decay DECAY, int MORE>
void run_keys(const LinearJob &job, int64_t plane, Span span, const LinearWork &work) {
    const nearfield_linear &p = *job.problem;
    const int64_t head = job.head_wide, value = job.value_wide, stride = span.count() + LANES;
    const Span all{0, value};
    auto pack_inner = [&](const Chunk &chunk) {  // keys, what they write, decays
        pack(job, p.key, p.dtype, chunk, p.head_dim, span, work.key, head);
        pack_decay(job, chunk, span, work);
        if (!(MORE & SECONDS)) return pack(job, p.value, p.dtype, chunk, p.value_dim, all, work.value, value);
        pack(job, p.beta, NEARFIELD_F32, chunk, 1, {0, 1}, work.beta, 1);
        for (int t = 0; t < chunk.count; t++)
            for (int64_t c = 0; c < value; c += WIDTH)
                store(work.value + t * value + c,
                      load(job.lacks + job.row(plane, chunk.begin + t) * value + c) * work.beta[t]);
    };
    load_keys(job, p.initial_state, plane, span, work.states, stride);
    for (int64_t number = 0; number + 1 < job.chunks; number++) {
        Chunk chunk = chunk_of(job, plane, number);
        pack_inner(chunk);
        Pass w = pass_over(job, chunk, work, false, span, stride);
        w.in_rows = work.value, w.in_lanes = work.key + span.from;
        float *state = work.states + number * value * stride;
        w.from = state, w.to = state + value * stride;
        for (int64_t lane = 0; lane < span.count(); lane += WIDTH)
            each_block(value, [&](int64_t row, auto rows) { walk<DECAY, 0, rows.value>(w, row, lane); });
    }
    load_keys(job, p.grad_final_state, plane, span, work.state, stride);
    for (int64_t number = job.chunks - 1; number >= 0; number--) {
        Chunk chunk = chunk_of(job, plane, number);
        pack_inner(chunk);
        pack(job, p.query, p.dtype, chunk, p.head_dim, span, work.query, head);
        multiply(chunk, span, float(p.scale), work.query, head);
        pack(job, p.grad_out, p.dtype, chunk, p.value_dim, all, work.grad_out, value);
        Pass there = pass_over(job, chunk, work, false, span, stride), back = there;
        there.in_rows = back.out_rows = work.value;
        there.out_rows = back.in_rows = work.grad_out;
        there.in_lanes = back.second_lanes = work.key + span.from;
        back.in_lanes = work.query + span.from;
        if (MORE & SECONDS) there.second_rows = back.second_rows = job.minus + job.row(plane, chunk.begin) * value;
        there.out = work.grad_query + span.from;
        there.second_out = back.out = work.grad_key + span.from;
        there.trace = back.trace = work.trace, back.dot = work.dot + span.from;
        there.from = work.states + number * value * stride;
        back.from = back.to = work.state;
        for (float *x : {there.out, back.out, back.dot})
            for (int t = 0; t < chunk.count; t++) memset(x + t * head, 0, sizeof(float) * size_t(span.count()));
        for (int64_t lane = 0; lane < span.count(); lane += WIDTH)
            each_block(value, [&](int64_t row, auto rows) {
                walk<DECAY, READS | MORE, rows.value>(there, row, lane);
                walk<DECAY, READS | REVERSED | MORE, rows.value>(back, row, lane);
            });
        multiply(chunk, span, float(p.scale), work.grad_query, head);
        unpack(job, p.grad_query, p.dtype, chunk, p.head_dim, span, work.grad_query, head);
        unpack(job, p.grad_key, p.dtype, chunk, p.head_dim, span, work.grad_key, head);
        if (!(MORE & TRACES)) continue;
        if (DECAY == LANES_EACH) unpack(job, p.grad_g, p.g_dtype, chunk, p.head_dim, span, work.dot, head);
        for (int64_t c = span.from; c < span.to && DECAY == ONE; c += LANES)
            for (int t = 0; t < chunk.count; t++) {
                float sum = 0;
                for (int i = 0; i < LANES; i++) sum += work.dot[t * head + c + i];
                job.g_parts[(plane * (head / LANES) + c / LANES) * p.length + chunk.begin + t] = sum;
            }
    }
}

void forward_task(void *context, int64_t task, void *memory) {
    const LinearJob &job = *static_cast<LinearJob *>(context);
    Arena arena(memory);
    LinearWork work(arena, job, false);
    memset(memory, 0, work.floats * sizeof(float));  // behind their channels rows stay 0
    by_decay<ROWS_EACH>(*job.problem, [&](auto decay) {
        run_forward<decay.value>(job, task / job.groups, span_of(job, job.value_wide, task % job.groups), work, true);
    });
}

void values_task(void *context, int64_t task, void *memory) {
    const LinearJob &job = *static_cast<LinearJob *>(context);
    Arena arena(memory);
    LinearWork work(arena, job, true);
    memset(memory, 0, size_t(reinterpret_cast<char *>(work.states) - static_cast<char *>(memory)));
    by_decay<ROWS_EACH>(*job.problem, [&](auto decay) {
        run_values<decay.value>(job, task / job.groups, span_of(job, job.value_wide, task % job.groups), work);
    });
}

void keys_task(void *context, int64_t task, void *memory) {
    const LinearJob &job = *static_cast<LinearJob *>(context);
    Arena arena(memory);
    LinearWork work(arena, job, true);
    memset(memory, 0, size_t(reinterpret_cast<char *>(work.states) - static_cast<char *>(memory)));
    const nearfield_linear &p = *job.problem;
    int64_t plane = task / job.groups;
    Span span = span_of(job, job.head_wide, task % job.groups);
    by_decay<LANES_EACH>(p, [&](auto decay) {
        constexpr Decay DECAY = decay.value;
        constexpr int TRACED = DECAY == NONE ? 0 : TRACES;
        if (p.grad_g.data && p.beta.data) return run_keys<DECAY, TRACED | SECONDS>(job, plane, span, work);
        if (p.grad_g.data) return run_keys<DECAY, TRACED>(job, plane, span, work);
        if (p.beta.data) return run_keys<DECAY, SECONDS>(job, plane, span, work);
        run_keys<DECAY, 0>(job, plane, span, work);
    });
}

void sums_task(void *context, int64_t plane, void *) {
    const LinearJob &job = *static_cast<LinearJob *>(context);
    const nearfield_linear &p = *job.problem;
    auto add = [&](const float *parts, int64_t blocks, const nearfield_tensor &x, int64_t dtype) {
        for (int64_t t = 0; parts && t < p.length; t++) {
            float sum = 0;
            for (int64_t i = 0; i < blocks; i++) sum += parts[(plane * blocks + i) * p.length + t];
            write_row(&sum, 1, place(job, x, dtype, plane, t), dtype);
        }
    };
    add(job.g_parts, job.head_wide / LANES, p.grad_g, p.g_dtype);
    add(job.beta_parts, job.value_wide / LANES, p.grad_beta, NEARFIELD_F32);
}

LinearJob make_job(const nearfield_linear &p) {
    LinearJob job{};
    job.problem = &p;
    job.planes = p.batch * p.heads, job.chunks = ceil_div(p.length, int64_t(CHUNK));
    job.head_wide = round_up(p.head_dim, int64_t(LANES)), job.value_wide = round_up(p.value_dim, int64_t(LANES));
    return job;
}

// As few groups of lanes as let all threads find work: each packs the rows anew.
void group(LinearJob &job, int64_t wide, int64_t threads) {
    threads = least(threads, int64_t(1024));
    job.groups = threads == 1 ? 1 : least(wide / LANES, ceil_div(4 * threads, job.planes));
}

// Walks over a state take about a cycle a vector and operation.
double milliseconds(const LinearJob &job, double operations) {
    double vectors = double(job.planes) * double(job.head_wide * job.value_wide / WIDTH);
    return vectors * (double(job.problem->length) * operations + 4) * 4e-7;
}

int run_linear_forward(const nearfield_linear &p, int64_t threads) {
    LinearJob job = make_job(p);
    if (!job.planes) return NEARFIELD_OK;
    threads = worth(milliseconds(job, 3), threads);
    group(job, job.value_wide, threads);
    Arena arena(nullptr);
    LinearWork measured(arena, job, false);
    return parallel_for(job.planes * job.groups, threads, arena.used, forward_task, &job) ? NEARFIELD_OK
                                                                                           : NEARFIELD_NO_MEMORY;
}

int run_linear_backward(const nearfield_linear &p, int64_t threads) {
    LinearJob job = make_job(p);
    if (!job.planes) return NEARFIELD_OK;
    threads = worth(milliseconds(job, 14), threads);
    int64_t tokens = job.planes * p.length;
    bool is_complete = true;
    auto take = [&](bool is_wanted, int64_t floats) -> float * {
        if (!is_wanted) return nullptr;
        void *memory = malloc(sizeof(float) * size_t(most(floats, int64_t(1))));
        is_complete &= memory != nullptr;
        return static_cast<float *>(memory);
    };
    job.lacks = take(p.beta.data, tokens * job.value_wide);
    job.minus = take(p.beta.data, tokens * job.value_wide);
    job.beta_parts = take(p.beta.data, tokens * (job.value_wide / LANES));
    job.g_parts = take(p.grad_g.data && p.gates == 1, tokens * (job.head_wide / LANES));
    auto phase = [&](int64_t wide, void (*body)(void *, int64_t, void *)) {
        group(job, wide, threads);
        Arena arena(nullptr);
        LinearWork measured(arena, job, true);
        is_complete = is_complete && parallel_for(job.planes * job.groups, threads, arena.used, body, &job);
    };
    phase(job.value_wide, values_task);
    phase(job.head_wide, keys_task);
    if (job.g_parts || job.beta_parts)
        is_complete = is_complete && parallel_for(job.planes, threads, 0, sums_task, &job);
    for (float *x : {job.lacks, job.minus, job.beta_parts, job.g_parts}) free(x);
    return is_complete ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
}

}  // namespace

int NEARFIELD_ISA::linear_forward(const nearfield_linear *problem, int64_t threads) {
    return run_linear_forward(*problem, threads);
}
int NEARFIELD_ISA::linear_backward(const nearfield_linear *problem, int64_t threads) {
    return run_linear_backward(*problem, threads);
}

}  // namespace nearfield
