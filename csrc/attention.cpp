// Neighborhood attention, decoding and the choice of blocks for one instruction set, which NEARFIELD_ISA names.
#include "backward.h"
#include "blocks.h"
#include "table.h"

namespace nearfield {
namespace {

#if defined(__AVX512BF16__)
bool multiplies_pairs(const nearfield_attention &p) { return p.dtype == NEARFIELD_BF16; }
#define NEARFIELD_BY_DTYPE(p, call) (multiplies_pairs(p) ? call<Pair> : call<Single>)
#else
#define NEARFIELD_BY_DTYPE(p, call) (call<Single>)
#endif

void *zeroed(int64_t count, size_t size) { return calloc(size_t(most(count, int64_t(1))), size); }

// The tables of a job; tasks index into them.
struct Tables {
    BackwardJob job{};
    bool is_complete;

    template <class P>
    static Plan plan(const nearfield_attention &p, bool backward) {
        Dims d = make_dims<P>(p);
        return make_plan(p, row_bytes<P>(d, backward), key_bytes<P>(d, backward));
    }

    Tables(const nearfield_attention *problems, int64_t count, bool backward) {
        auto *settled = static_cast<nearfield_attention *>(zeroed(count, sizeof(nearfield_attention)));
        for (int64_t i = 0; settled && i < count; i++) settled[i] = normalised(problems[i]);
        job.problems = settled, job.count = count;
        job.plans = static_cast<Plan *>(zeroed(count, sizeof(Plan)));
        job.first_task = static_cast<int64_t *>(zeroed(count + 1, sizeof(int64_t)));
        job.sinks = static_cast<int32_t **>(zeroed(count, sizeof(void *)));
        job.sink_grads = static_cast<float **>(zeroed(count, sizeof(void *)));
        job.bias_parts = static_cast<float **>(zeroed(count, sizeof(void *)));
        is_complete = settled && job.plans && job.first_task && job.sinks && job.sink_grads && job.bias_parts;
        for (int64_t i = 0; is_complete && i < count; i++) {
            const nearfield_attention &p = settled[i];
            job.plans[i] = NEARFIELD_BY_DTYPE(p, plan)(p, backward);
            if (num_sinks(p)) is_complete = list_sinks(p, &job.sinks[i]);
            Dims d = make_dims<Single>(p);
            if (backward && num_sinks(p)) {
                int64_t floats = p.batch * p.kv_heads * num_sinks(p) * (d.head_wide + d.value_wide);
                is_complete &= (job.sink_grads[i] = static_cast<float *>(zeroed(floats, sizeof(float)))) != nullptr;
            }
            if (backward && p.grad_bias)
                is_complete &= (job.bias_parts[i] = static_cast<float *>(
                                    zeroed(p.batch * p.heads * bias_size(p), sizeof(float)))) != nullptr;
        }
    }

    ~Tables() {
        for (int64_t i = 0; i < job.count; i++) {
            if (job.sinks) free(job.sinks[i]);
            if (job.sink_grads) free(job.sink_grads[i]);
            if (job.bias_parts) free(job.bias_parts[i]);
        }
        free(const_cast<nearfield_attention *>(job.problems));
        free(job.plans), free(job.first_task), free(job.sinks), free(job.sink_grads), free(job.bias_parts);
    }

    // The first unmasked tokens of each row.
    static bool list_sinks(const nearfield_attention &p, int32_t **to) {
        int64_t sinks = num_sinks(p), tokens = p.axis[2].size;
        int32_t *table = *to = static_cast<int32_t *>(malloc(sizeof(int32_t) * size_t(most(p.batch * sinks, int64_t(1)))));
        if (!table) return false;
        for (int64_t b = 0; b < p.batch; b++) {
            int64_t found = 0;
            for (int64_t i = 0; i < tokens && found < sinks; i++)
                if (!p.key_mask || p.key_mask[b * tokens + i]) table[b * sinks + found++] = int32_t(i);
            while (found < sinks) table[b * sinks + found++] = -1;
        }
        return true;
    }

    // Numbers the tasks: `each(plan)` of them for every problem.
    template <class Each>
    int64_t number_tasks(Each each) {
        for (int64_t i = 0; i < job.count; i++) job.first_task[i + 1] = job.first_task[i] + each(job.plans[i]);
        return job.first_task[job.count];
    }
};

double milliseconds(const Job &job, double passes) {
    double work = 0;
    for (int64_t i = 0; i < job.count; i++) work += passes * job.plans[i].work;
    return work / 4e6;
}

// Tasks in runs, so that small ones do not pay for being handed out one by one.
struct Runs {
    void (*body)(void *, int64_t, void *);
    void *context;
    int64_t tasks, length;
};

void run_of_tasks(void *context, int64_t number, void *memory) {
    const Runs &runs = *static_cast<Runs *>(context);
    int64_t end = least((number + 1) * runs.length, runs.tasks);
    for (int64_t task = number * runs.length; task < end; task++) runs.body(runs.context, task, memory);
}

bool run(int64_t tasks, int64_t threads, size_t bytes, void (*body)(void *, int64_t, void *), void *context) {
    if (!tasks) return true;
    Runs runs{body, context, tasks, most(tasks / (threads * 32), int64_t(1))};
    return parallel_for(ceil_div(tasks, runs.length), threads, bytes, run_of_tasks, &runs);
}

template <class P>
size_t forward_bytes(const nearfield_attention &p, const Plan &plan) {
    Arena arena(nullptr);
    Work<P> work;
    work.place(arena, make_dims<P>(p), plan.unit_rows(), plan.rows_in_tile(), false);
    return arena.used;
}

template <class P>
size_t backward_bytes(const nearfield_attention &p, const Plan &plan, Phase phase) {
    Arena arena(nullptr);
    Work<P> work;
    Dims d = make_dims<P>(p);
    work.place(arena, d, plan.unit_rows(), plan.rows_in_tile(), true);
    int64_t units = phase == WHOLE_HEADS ? plan.units_of_plane() : phase == KEYS ? 1 : 0;
    arena.take<float>(units * (plan.unit_rows() + 1) * d.head_wide);
    arena.take<float>(units * (plan.unit_rows() + 1) * d.value_wide);
    arena.take<float>(phase == LISTS ? list_floats(d, num_sinks(p)) + list_floats(d, p.num_additional) : 0);
    return arena.used;
}

void forward_any(void *context, int64_t task, void *memory) {
    const Job &job = *static_cast<Job *>(context);
    int64_t local = task;
    const nearfield_attention &p = job.problems[find_problem(job, &local)];
    (void)p;
    NEARFIELD_BY_DTYPE(p, forward_task)(context, task, memory);
}

void backward_any(void *context, int64_t task, void *memory) {
    const Job &job = *static_cast<BackwardJob *>(context);
    int64_t local = task;
    const nearfield_attention &p = job.problems[find_problem(job, &local)];
    (void)p;
    NEARFIELD_BY_DTYPE(p, backward_task)(context, task, memory);
}

void sum_bias(const BackwardJob &job) {
    for (int64_t i = 0; i < job.count; i++) {
        const nearfield_attention &p = job.problems[i];
        if (!p.grad_bias) continue;
        int64_t entries = p.heads * bias_size(p);
        for (int64_t e = 0; e < entries; e++) {
            float sum = 0;
            for (int64_t b = 0; b < p.batch; b++) sum += job.bias_parts[i][b * entries + e];
            p.grad_bias[e] = sum;
        }
    }
}

}  // namespace

int NEARFIELD_ISA::attention_forward(const nearfield_attention *problems, int64_t count, int64_t threads) {
    Tables tables(problems, count, false);
    if (!tables.is_complete) return NEARFIELD_NO_MEMORY;
    size_t bytes = 0;
    for (int64_t i = 0; i < count; i++)
        bytes = most(bytes, NEARFIELD_BY_DTYPE(problems[i], forward_bytes)(tables.job.problems[i], tables.job.plans[i]));
    int64_t tasks = tables.number_tasks([](const Plan &plan) {
        return plan.problem->batch * plan.problem->kv_heads * plan.planes * plan.tiles_of_plane();
    });
    Job *job = &tables.job;
    return run(tasks, worth(milliseconds(*job, 1), threads), bytes, forward_any, job) ? NEARFIELD_OK : NEARFIELD_NO_MEMORY;
}

int NEARFIELD_ISA::attention_backward(const nearfield_attention *problems, int64_t count, int64_t threads) {
    Tables tables(problems, count, true);
    if (!tables.is_complete) return NEARFIELD_NO_MEMORY;
    BackwardJob &job = tables.job;
    threads = worth(milliseconds(job, 2.5), threads);
    int64_t heads = 0;
    bool with_bias = false, with_lists = false;
    for (int64_t i = 0; i < count; i++) {
        const nearfield_attention &p = job.problems[i];
        heads += p.batch * p.kv_heads;
        with_bias |= p.grad_bias != nullptr;
        with_lists |= num_sinks(p) > 0 || p.num_additional > 0;
    }
    // A bias table is summed over all queries of a head, so those stay together.
    bool is_one_pass = heads >= threads || with_bias;
    Phase phases[3];
    int used = 0;
    if (with_lists) phases[used++] = LISTS;
    if (is_one_pass) {
        phases[used++] = WHOLE_HEADS;
    } else {
        phases[used++] = QUERIES;
        phases[used++] = KEYS;
    }
    size_t bytes = 0;  // asked for once: memory that is short is noticed before anything is written
    for (int j = 0; j < used; j++)
        for (int64_t i = 0; i < count; i++)
            bytes = most(bytes, NEARFIELD_BY_DTYPE(problems[i], backward_bytes)(job.problems[i], job.plans[i], phases[j]));
    for (int j = 0; j < used; j++) {
        job.phase = phases[j];
        int64_t tasks = tables.number_tasks([&](const Plan &plan) {
            int64_t planes = plan.problem->batch * plan.problem->kv_heads;
            if (job.phase == QUERIES) return planes * plan.planes * plan.tiles_of_plane();
            if (job.phase == KEYS) return planes * plan.planes * plan.units_of_plane();
            return planes;
        });
        if (!run(tasks, threads, bytes, backward_any, &job)) return NEARFIELD_NO_MEMORY;
    }
    sum_bias(job);
    return NEARFIELD_OK;
}

int NEARFIELD_ISA::decode_forward(const nearfield_decode *problem, int64_t threads) { return run_decode(problem, threads); }

int NEARFIELD_ISA::block_shares(const nearfield_shares *problem, int64_t threads) { return run_shares(problem, threads); }

int NEARFIELD_ISA::choose_blocks(const nearfield_choice *problem, int64_t threads) { return run_choice(problem, threads); }

}  // namespace nearfield
