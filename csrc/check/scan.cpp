// Random selective scans, held against the definition in double, and descriptors that must be refused.
//
//     scan [--cases N] [--seed S] [--only K] [--isa NAME|all] [--threads T]
//
// Every case names the line that repeats it. Memory is filled with NaN before each call, gaps between rows included:
// what is not written, or read from where it should not be, shows.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>

#include "draw.h"
#include "reference.h"

using namespace nearfield::check;

namespace {

constexpr uint8_t POISON = 0xff;  // repeated it is NaN in every dtype
constexpr double TOLERANCE[] = {4e-6, 1e-2, 1.5e-3};  // of the rms of a result or of its terms, by dtype
constexpr double SMALLEST[] = {1e-37, 1e-37, 6e-8};   // below these a result has no full precision left

// A tensor in memory of its own: rows of channels with gaps between them, its outer dimensions in any order.
struct Held {
    const char *name = "";
    int64_t dtype = 0;
    Shape shape{};
    nearfield_tensor tensor{};
    std::vector<uint8_t> memory, original;
    int64_t origin = 0;  // element of the first row
    Result expected;
    bool is_input = false;

    int64_t item() const { return element_size(dtype); }
    void place() { tensor.data = memory.data() + origin * item(); }
};

// The rows of [batch, tokens, groups] and where they lie. `repeats`: rows may lie on one another.
std::unique_ptr<Held> make(Draw &draw, const char *name, int64_t dtype, int64_t batch, int64_t tokens, int64_t groups,
                           int64_t channels, bool repeats) {
    auto held = std::make_unique<Held>();
    held->name = name, held->dtype = dtype, held->shape = {batch, {1, 1, tokens}, groups, channels};
    int64_t sizes[] = {batch, tokens, groups}, axes[] = {0, 3, 4}, order[] = {0, 1, 2};
    for (int i = 2; i > 0; --i) std::swap(order[i], order[draw.between(0, i)]);
    int64_t stride = channels + draw.pick<int64_t>({0, 0, 1, 5}), extent = 0;
    for (int i : {2, 1, 0}) {
        int64_t axis = order[i];
        bool one_row = repeats && draw.chance(0.1), flipped = draw.chance(0.1);
        held->tensor.stride[axes[axis]] = one_row ? 0 : flipped ? -stride : stride;
        if (flipped && !one_row) held->origin += std::max<int64_t>(sizes[axis] - 1, 0) * stride;
        if (one_row) continue;
        extent = std::max(extent, sizes[axis] * stride);
        stride *= std::max<int64_t>(sizes[axis], 1);
    }
    held->memory.assign(size_t((stride + extent + channels + 1) * held->item()), POISON);
    held->place();
    return held;
}

Doubles draw_into(Draw &draw, Held &held, const std::function<double()> &number) {
    each_row(held.tensor, held.shape, [&](int64_t, int64_t at) {
        for (int64_t c = 0; c < held.shape.channels; ++c) write(held.tensor.data, held.dtype, at + c, number());
    });
    held.is_input = true, held.original = held.memory;
    (void)draw;
    return load(held.tensor, held.dtype, held.shape);
}

struct Problem {
    std::string text;
    nearfield_scan p{};
    std::vector<std::unique_ptr<Held>> tensors;
    std::vector<int64_t> ends;
    Doubles x, dt, z, B, C, A, D, bias, initial, pull, pull_state;
    Doubles kept;  // memory of the chunk states, as bytes
    bool special = false;

    Held &add(std::unique_ptr<Held> held, nearfield_tensor *field) {
        if (field) *field = held->tensor;
        tensors.push_back(std::move(held));
        return *tensors.back();
    }
    int64_t sequences() const { return p.cu_seqlens ? p.sequences : p.batch; }
};

double softplus(double x) { return x > 40 ? x : std::log1p(std::exp(x)); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Every result, by the equations and their derivatives.
void define(Problem &problem, Held &out, Held &final_state, std::vector<Held *> grads) {
    const nearfield_scan &p = problem.p;
    const int64_t N = p.state, width = p.channels / p.groups;
    for (Held *held : {&out, &final_state}) held->expected.values.assign(size_t(held->shape.count()), 0);
    for (Held *held : grads)
        if (held) held->expected.values.assign(size_t(held->shape.count()), 0);
    auto add = [](Held *held, int64_t at, double term) {
        if (!held) return;
        held->expected.values[size_t(at)] += term;
        held->expected.size.add(term);
    };
    for (int64_t s = 0; s < problem.sequences(); ++s) {
        int64_t batch = p.cu_seqlens ? 0 : s, begin = p.cu_seqlens ? problem.ends[size_t(s)] : 0;
        int64_t end = p.cu_seqlens ? problem.ends[size_t(s) + 1] : p.tokens, length = end - begin;
        for (int64_t c = 0; c < p.channels; ++c) {
            auto token = [&](int64_t t) { return batch * p.tokens + (p.reverse ? end - 1 - t : begin + t); };
            auto raw = [&](int64_t t) {
                return problem.dt[size_t(token(t) * p.channels + c)] + (p.dt_bias ? problem.bias[size_t(c)] : 0);
            };
            auto step = [&](int64_t t) { return p.softplus ? softplus(raw(t)) : raw(t); };
            Doubles states(size_t((length + 1) * N)), sums(static_cast<size_t>(length));
            for (int64_t n = 0; n < N; ++n)
                states[size_t(n)] = p.initial_state ? problem.initial[size_t((s * p.channels + c) * N + n)] : 0;
            for (int64_t t = 0; t < length; ++t) {
                int64_t at = token(t) * p.channels + c, row = (token(t) * p.groups + c / width) * N;
                double x = problem.x[size_t(at)], y = p.D ? problem.D[size_t(c)] * x : 0;
                double gate = p.z.data ? problem.z[size_t(at)] * sigmoid(problem.z[size_t(at)]) : 1;
                if (p.D) out.expected.size.add(y * gate);
                for (int64_t n = 0; n < N; ++n) {
                    double &h = states[size_t((t + 1) * N + n)];
                    h = std::exp(step(t) * problem.A[size_t(c * N + n)]) * states[size_t(t * N + n)] +
                        step(t) * problem.B[size_t(row + n)] * x;
                    y += problem.C[size_t(row + n)] * h;
                    out.expected.size.add(problem.C[size_t(row + n)] * h * gate);
                }
                sums[size_t(t)] = y;
                out.expected.values[size_t(at)] = y * gate;
            }
            for (int64_t n = 0; n < N; ++n) add(&final_state, (s * p.channels + c) * N + n, states[size_t(length * N + n)]);

            auto [gx, gdt, gz, gB, gC, gA, gD, gbias, ginitial] =
                std::tie(grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], grads[7], grads[8]);
            Doubles carried(static_cast<size_t>(N));
            for (int64_t n = 0; n < N && p.grad_final_state; ++n)
                carried[size_t(n)] = problem.pull_state[size_t((s * p.channels + c) * N + n)];
            for (int64_t t = length - 1; t >= 0; --t) {
                int64_t at = token(t) * p.channels + c, row = (token(t) * p.groups + c / width) * N;
                double x = problem.x[size_t(at)], pull = problem.pull[size_t(at)];
                if (p.z.data) {
                    double z = problem.z[size_t(at)], sg = sigmoid(z);
                    add(gz, at, pull * sums[size_t(t)] * sg * (1 + z * (1 - sg)));
                    pull *= z * sg;
                }
                add(gD, c, pull * x);
                if (p.D) add(gx, at, pull * problem.D[size_t(c)]);
                double slope = p.softplus ? sigmoid(raw(t)) : 1;
                for (int64_t n = 0; n < N; ++n) {
                    double A = problem.A[size_t(c * N + n)], B = problem.B[size_t(row + n)], decay = std::exp(step(t) * A);
                    double before = states[size_t(t * N + n)];
                    double grad = carried[size_t(n)] + problem.C[size_t(row + n)] * pull;
                    add(gC, row + n, pull * states[size_t((t + 1) * N + n)]);
                    add(gB, row + n, grad * step(t) * x);
                    add(gx, at, grad * step(t) * B);
                    add(gA, c * N + n, grad * step(t) * decay * before);
                    for (Held *to : {gdt, gbias}) {
                        add(to, to == gdt ? at : c, grad * B * x * slope);
                        add(to, to == gdt ? at : c, grad * A * decay * before * slope);
                    }
                    carried[size_t(n)] = grad * decay;
                }
            }
            for (int64_t n = 0; n < N; ++n) add(ginitial, (s * p.channels + c) * N + n, carried[size_t(n)]);
        }
    }
}

std::unique_ptr<Problem> make_problem(Draw &draw) {
    auto problem = std::make_unique<Problem>();
    nearfield_scan &p = problem->p;
    p.dtype = draw.pick<int64_t>({NEARFIELD_F32, NEARFIELD_F32, NEARFIELD_BF16, NEARFIELD_F16});
    p.batch = draw.between(1, 3), p.groups = draw.pick<int64_t>({1, 1, 2, 3});
    p.channels = p.groups * draw.pick<int64_t>({1, 2, 5, 15, 16, 17, 33, 140});
    p.state = draw.pick<int64_t>({1, 1, 2, 3, 4, 5, 7, 8, 16, 40});
    p.tokens = draw.pick<int64_t>({0, 1, 2, 7, 24, 25, 26, 63, 64, 65, 130});
    if (p.channels * p.state * p.tokens > 60000) p.tokens = 25, p.batch = 1;
    p.softplus = draw.between(0, 1), p.reverse = draw.between(0, 1);
    if (draw.chance(0.25)) {
        p.batch = 1, p.sequences = draw.between(1, 4);
        for (int64_t i = 1; i < p.sequences; ++i) problem->ends.push_back(draw.between(0, p.tokens));
        problem->ends.push_back(0), problem->ends.push_back(p.tokens);
        std::sort(problem->ends.begin(), problem->ends.end());
        p.cu_seqlens = problem->ends.data();
    }
    double steps = draw.pick({1.0, 1.0, 0.01, 10.0}), decays = draw.pick({1.0, 1.0, 0.001, 30.0});
    auto normal = [&draw] { return draw.normal(); };
    const int64_t rows = problem->sequences(), F = NEARFIELD_F32;
    auto tokens = [&](const char *name, bool grouped, bool repeats) {
        return make(draw, name, p.dtype, p.batch, p.tokens, grouped ? p.groups : 1, grouped ? p.state : p.channels, repeats);
    };
    auto table = [&](const char *name, int64_t first, int64_t second, int64_t third) {
        auto held = std::make_unique<Held>();  // contiguous
        held->name = name, held->dtype = F, held->shape = {first, {1, 1, second}, 1, third};
        held->tensor.stride[0] = second * third, held->tensor.stride[3] = third;
        held->memory.assign(size_t((first * second * third + 1) * 4), POISON);
        held->place();
        return held;
    };
    auto floats = [](const Held &held) { return static_cast<float *>(held.tensor.data); };
    auto read_in = [&](const char *name, bool grouped, nearfield_tensor *field, const std::function<double()> &number) {
        return draw_into(draw, problem->add(tokens(name, grouped, true), field), number);
    };
    problem->x = read_in("x", false, &p.x, normal);
    problem->dt = read_in("dt", false, &p.dt, [&] { return p.softplus ? draw.normal() * 2 : steps * std::fabs(draw.normal()); });
    problem->B = read_in("B", true, &p.B, normal);
    problem->C = read_in("C", true, &p.C, normal);
    if (draw.chance(0.5)) problem->z = read_in("z", false, &p.z, [&] { return 3 * draw.normal(); });
    auto fill = [&](std::unique_ptr<Held> held, const std::function<double()> &number, Doubles *values) {
        Held &kept = problem->add(std::move(held), nullptr);
        *values = draw_into(draw, kept, number);
        return floats(kept);
    };
    p.A = fill(table("A", 1, p.channels, p.state), [&] { return -decays * std::fabs(draw.normal()); }, &problem->A);
    if (draw.chance(0.5)) p.D = fill(table("D", 1, 1, p.channels), normal, &problem->D);
    if (draw.chance(0.5))
        p.dt_bias = fill(table("dt_bias", 1, 1, p.channels), [&] { return std::fabs(draw.normal()); }, &problem->bias);
    if (draw.chance(0.5)) p.initial_state = fill(table("initial_state", rows, p.channels, p.state), normal, &problem->initial);
    if (draw.chance(0.5)) p.grad_final_state = fill(table("grad_final_state", rows, p.channels, p.state), normal, &problem->pull_state);
    problem->pull = read_in("grad_out", false, &p.grad_out, normal);
    problem->special = draw.chance(0.1) && p.tokens;
    if (problem->special) {
        Held &x = *problem->tensors[0];
        int64_t at = draw.between(0, p.tokens - 1) * x.tensor.stride[3] + draw.between(0, p.channels - 1);
        write(x.tensor.data, x.dtype, at, draw.pick({double(NAN), double(INFINITY), -double(INFINITY)}));
        x.original = x.memory;
        problem->x = load(x.tensor, x.dtype, x.shape);
    }

    Held &out = problem->add(tokens("out", false, false), &p.out);
    Held &final_state = problem->add(table("final_state", rows, p.channels, p.state), nullptr);
    p.final_state = floats(final_state);
    std::vector<Held *> grads{
        &problem->add(tokens("grad_x", false, false), &p.grad_x), &problem->add(tokens("grad_dt", false, false), &p.grad_dt),
        p.z.data ? &problem->add(tokens("grad_z", false, false), &p.grad_z) : nullptr,
        &problem->add(tokens("grad_B", true, false), &p.grad_B), &problem->add(tokens("grad_C", true, false), &p.grad_C)};
    auto table_grad = [&](const char *name, const void *operand, int64_t a, int64_t b, int64_t c, float **field) {
        grads.push_back(operand ? &problem->add(table(name, a, b, c), nullptr) : nullptr);
        *field = operand ? floats(*grads.back()) : nullptr;
    };
    table_grad("grad_A", p.A, 1, p.channels, p.state, &p.grad_A);
    table_grad("grad_D", p.D, 1, 1, p.channels, &p.grad_D);
    table_grad("grad_dt_bias", p.dt_bias, 1, 1, p.channels, &p.grad_dt_bias);
    table_grad("grad_initial_state", p.initial_state, rows, p.channels, p.state, &p.grad_initial_state);
    define(*problem, out, final_state, grads);

    int64_t chunk = std::max<int64_t>(8, std::min<int64_t>(64, 1024 / p.state)), width = p.channels / p.groups;
    problem->kept.assign(size_t((p.batch * p.tokens / chunk + rows) * p.groups * ((width + 15) / 16) * p.state * 16 / 2 + 1), NAN);
    p.chunk_states = reinterpret_cast<float *>(problem->kept.data());
    char line[300];
    std::snprintf(line, sizeof line,
                  "dtype %lld, batch %lld, tokens %lld, channels %lld, groups %lld, state %lld, sequences %lld%s%s%s%s%s%s%s, "
                  "steps %g, decays %g",
                  (long long)p.dtype, (long long)p.batch, (long long)p.tokens, (long long)p.channels, (long long)p.groups,
                  (long long)p.state, (long long)p.sequences, p.softplus ? ", softplus" : "", p.reverse ? ", reverse" : "",
                  p.D ? ", D" : "", p.z.data ? ", z" : "", p.dt_bias ? ", bias" : "", p.initial_state ? ", initial" : "",
                  problem->special ? ", special" : "", steps, decays);
    problem->text = line;
    return problem;
}

std::string difference(const Held &held) {
    char line[200];
    Doubles found = load(held.tensor, held.dtype, held.shape);
    double squares = 0, errors = 0;
    size_t finite = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        double e = held.expected.values[i], f = found[i];
        bool largest = std::fabs(e) > (held.dtype == NEARFIELD_F16 ? 65504 : 3e38);
        if (!std::isfinite(e) || largest) {
            if (!std::isfinite(f) || largest) continue;
        } else if (std::isfinite(f)) {
            squares += e * e, errors += (f - e) * (f - e), ++finite;
            continue;
        }
        std::snprintf(line, sizeof line, "%s[%zu] is %g, not %g", held.name, i, f, e);
        return line;
    }
    if (!finite) return "";
    // Terms of a sum that cancel leave their rounding behind: what is allowed is a share of them.
    double size = std::max(std::sqrt(squares / double(finite)), held.expected.size.rms(finite));
    double allowed = TOLERANCE[held.dtype] * size + SMALLEST[held.dtype], error = std::sqrt(errors / double(finite));
    if (error <= allowed) return "";
    std::snprintf(line, sizeof line, "%s: rms error %.3g of %.3g", held.name, error, size);
    return line;
}

// Both kernels; what is wrong, or "".
std::string call(Problem &problem, int64_t threads, std::vector<uint8_t> *bytes) {
    for (auto &held : problem.tensors)
        if (!held->is_input) std::fill(held->memory.begin(), held->memory.end(), POISON);
    if (nearfield_scan_forward(&problem.p, threads) != NEARFIELD_OK) return "forward was refused";
    if (nearfield_scan_backward(&problem.p, threads) != NEARFIELD_OK) return "backward was refused";
    for (auto &held : problem.tensors) {
        if (held->is_input) {
            if (held->memory != held->original) return std::string(held->name) + ", an input, was written";
            continue;
        }
        if (std::string wrong = difference(*held); !wrong.empty()) return wrong;
        bytes->insert(bytes->end(), held->memory.begin(), held->memory.end());
        std::vector<uint8_t> beside = held->memory;
        each_row(held->tensor, held->shape, [&](int64_t, int64_t at) {
            std::fill_n(beside.begin() + (held->origin + at) * held->item(), held->shape.channels * held->item(), POISON);
        });
        if (std::any_of(beside.begin(), beside.end(), [](uint8_t byte) { return byte != POISON; }))
            return std::string(held->name) + " was written beside its rows";
    }
    return "";
}

// Descriptors with one thing wrong, none of which may be read.
std::string check_refusals(Draw &draw, const Problem &problem) {
    using Break = std::function<bool(nearfield_scan &)>;  // false: it cannot be broken so
    static const int64_t falling[] = {0, 3, 2, 5};
    static void *const odd = reinterpret_cast<void *>(uintptr_t(4097));
    const Break breaks[] = {
        [](nearfield_scan &p) { return p.dtype = 3, true; },
        [](nearfield_scan &p) { return p.batch = -1, true; },
        [](nearfield_scan &p) { return p.tokens = -1, true; },
        [](nearfield_scan &p) { return p.channels = 0, true; },
        [](nearfield_scan &p) { return p.groups = p.channels + 1, true; },
        [](nearfield_scan &p) { return p.groups = 0, true; },
        [](nearfield_scan &p) { return p.state = 0, true; },
        [](nearfield_scan &p) { return p.state = 257, true; },
        [](nearfield_scan &p) { return p.softplus = 2, true; },
        [](nearfield_scan &p) { return p.reverse = -1, true; },
        [](nearfield_scan &p) { return p.tokens = int64_t(1) << 41, true; },
        [](nearfield_scan &p) { return p.batch = int64_t(1) << 40, p.tokens = int64_t(1) << 40, p.cu_seqlens = nullptr, true; },
        [](nearfield_scan &p) { return p.batch = 1, p.tokens = 5, p.sequences = 3, p.cu_seqlens = falling, true; },
        [](nearfield_scan &p) { return p.cu_seqlens && (p.sequences = -1, true); },
        [](nearfield_scan &p) { return p.tokens && (p.x.data = nullptr, true); },
        [](nearfield_scan &p) { return p.tokens && (p.B.data = odd, true); },
        [](nearfield_scan &p) { return p.tokens > 1 && (p.C.stride[3] = INT64_MAX / 2, true); },
        [](nearfield_scan &p) { return p.tokens > 1 && p.channels > 1 && (p.grad_x.stride[3] = 1, true); },
        [](nearfield_scan &p) { return p.A = nullptr, true; },
        [](nearfield_scan &p) { return p.A = static_cast<float *>(odd), true; },
        [](nearfield_scan &p) { return p.grad_A = nullptr, true; },
        [](nearfield_scan &p) { return p.D && (p.grad_D = nullptr, true); },
        [](nearfield_scan &p) { return !p.initial_state && (p.grad_initial_state = p.grad_A, true); },
        [](nearfield_scan &p) { return p.tokens && (p.chunk_states = nullptr, true); },
    };
    int64_t which = draw.between(0, int64_t(std::size(breaks)) - 1);
    nearfield_scan broken = problem.p;
    if (!breaks[which](broken) || nearfield_scan_backward(&broken, 1) == NEARFIELD_INVALID) return "";
    return "broken descriptor " + std::to_string(which) + " was not refused";
}

}  // namespace

int main(int count, char **words) {
    int64_t cases = 400, seed = 1, only = -1, threads = 2;
    std::string isa = "all", isas = nearfield_isas();
    for (int i = 1; i < count; i += 2) {
        std::string word = words[i];
        int64_t *number = word == "--cases"     ? &cases
                          : word == "--seed"    ? &seed
                          : word == "--only"    ? &only
                          : word == "--threads" ? &threads
                                                : nullptr;
        if (i + 1 == count || (!number && word != "--isa")) {
            std::fprintf(stderr, "%s [--cases N] [--seed S] [--only K] [--isa NAME|all] [--threads T]\n", words[0]);
            return 2;
        }
        if (number)
            *number = std::atoll(words[i + 1]);
        else
            isa = words[i + 1];
    }
    if (isa != "all") isas = isa;
    int64_t passed = 0, failed = 0;
    nearfield_set_grain(0);
    for (int64_t number = only < 0 ? 0 : only; number < (only < 0 ? cases : only + 1); ++number) {
        Draw draw{uint64_t(seed), uint64_t(number)};
        std::unique_ptr<Problem> problem = make_problem(draw);
        std::string wrong = check_refusals(draw, *problem), name;
        for (size_t at = 0; wrong.empty() && at < isas.size();) {
            size_t end = std::min(isas.find(' ', at), isas.size());
            name = isas.substr(at, end - at);
            at = end + 1;
            if (nearfield_use(name.c_str()) != NEARFIELD_OK) {
                std::fprintf(stderr, "This machine has no %s; it has %s.\n", name.c_str(), nearfield_isas());
                return 2;
            }
            std::vector<uint8_t> once, twice;
            wrong = call(*problem, threads, &once);
            if (wrong.empty()) wrong = call(*problem, draw.pick<int64_t>({1, 3, 7}), &twice);
            if (wrong.empty() && once != twice) wrong = "results depend on the number of threads";
        }
        wrong.empty() ? ++passed : ++failed;
        if (wrong.empty()) continue;
        std::printf("FAILED: scan --seed %lld --only %lld --isa %s --threads %lld: %s | %s\n", (long long)seed,
                    (long long)number, name.c_str(), (long long)threads, wrong.c_str(), problem->text.c_str());
        std::fflush(stdout);  // a later case may crash
    }
    std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
    return failed ? 1 : 0;
}
