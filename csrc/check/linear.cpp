// Random problems of linear attention, held against the definition in double, and broken ones, which must be refused.
//
//     linear [--cases N] [--seed S] [--only K]
//
// Built with reference.cpp and a library of the kernels. Every case runs on every instruction set, by one thread and by
// several. Results are NaN before each call, and so are the gaps between the rows of all tensors.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <string>

#include "draw.h"
#include "reference.h"

using namespace nearfield::check;

namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr uint8_t POISON = 0xff;  // repeated it is NaN in every dtype
// nearfield/core/tolerance.py, by dtype; the smallest are where a result has no full precision left
constexpr double OUTPUT[] = {2e-6, 1e-2, 1.5e-3}, GRADIENT[] = {5e-6, 2e-2, 3e-3}, SMALLEST[] = {1.2e-38, 1e-36, 6e-8};
constexpr double LARGEST[] = {3.4e38, 3.38e38, 65500};
constexpr double WORST_ELEMENT = 50;  // its error may be so many times the rms error that is allowed
const char *const DTYPES[] = {"f32", "bf16", "f16"};

struct Output {
    const char *name;
    nearfield_tensor tensor;
    int64_t dtype;
    Shape shape;
    std::vector<uint8_t> *memory;
    bool is_gradient;
    Result expected;
};

struct Case {
    nearfield_linear p{};
    std::deque<std::vector<uint8_t>> memory;
    std::deque<Output> outputs;
    bool is_special = false;
    std::string text;
};

Shape shape_of(const nearfield_linear &p, int64_t channels) { return {p.batch, {1, 1, p.length}, p.heads, channels}; }

// Memory for a tensor in a random layout: dimensions in any order, with gaps, backwards, shared.
// `shared`: no axes, or 1: batch and heads, 2: steps too, which then sum up rounding errors that all are the same.
nearfield_tensor place(Draw &draw, Case &c, const Shape &shape, int64_t element, int shared) {
    const int64_t size[5] = {shape.batch, 1, 1, shape.tokens[2], shape.heads};
    int64_t order[3] = {0, 3, 4}, extent = shape.channels, base = 0;
    for (int64_t i = 2; i > 0 && draw.chance(0.4); --i) std::swap(order[i], order[draw.between(0, i)]);
    bool gaps = draw.chance(0.4);
    nearfield_tensor tensor{};
    for (int64_t i = 2; i >= 0; --i) {
        int64_t d = order[i], stride = extent + (gaps ? draw.between(0, 9) : 0);
        if (shared > (d == 3) && draw.chance(0.1)) stride = 0;  // expanded
        tensor.stride[d] = size[d] > 1 ? stride : draw.pick<int64_t>({0, stride, -1, int64_t(1) << 50});
        if (size[d] <= 1) continue;
        extent += stride * (size[d] - 1);
        if (draw.chance(0.1)) base += stride * (size[d] - 1), tensor.stride[d] = -stride;
    }
    if (shape.count() == 0) return tensor;
    int64_t skip = draw.between(0, 7);  // element, not vector, alignment
    c.memory.emplace_back(size_t((2 * skip + extent) * element), POISON);
    tensor.data = c.memory.back().data() + (skip + base) * element;
    return tensor;
}

nearfield_tensor input(Draw &draw, Case &c, int64_t dtype, const Shape &shape, const Doubles &values, int shared = 1) {
    nearfield_tensor tensor = place(draw, c, shape, element_size(dtype), shared);
    store(tensor, dtype, shape, values);
    return tensor;
}

nearfield_tensor output(Draw &draw, Case &c, const char *name, int64_t dtype, const Shape &shape, bool is_gradient) {
    nearfield_tensor tensor = place(draw, c, shape, element_size(dtype), 0);
    c.outputs.push_back({name, tensor, dtype, shape, tensor.data ? &c.memory.back() : nullptr, is_gradient, {}});
    return tensor;
}

// A state, or the gradient of one.
Shape state_shape(const nearfield_linear &p) { return {p.batch, {1, 1, p.heads}, p.head_dim, p.value_dim}; }
nearfield_tensor state_tensor(Case &c) {
    const nearfield_linear &p = c.p;
    int64_t rows = p.head_dim * p.value_dim;
    c.memory.emplace_back(size_t(4 * std::max<int64_t>(state_shape(p).count(), 1)), POISON);
    return {c.memory.back().data(), {p.heads * rows, 0, 0, rows, p.value_dim}};
}
float *state_output(Case &c, const char *name, bool is_gradient) {
    nearfield_tensor tensor = state_tensor(c);
    c.outputs.push_back({name, tensor, NEARFIELD_F32, state_shape(c.p), &c.memory.back(), is_gradient, {}});
    return static_cast<float *>(tensor.data);
}
const float *state_input(Draw &draw, Case &c) {
    auto *data = static_cast<float *>(state_tensor(c).data);
    for (int64_t i = 0; i < state_shape(c.p).count(); ++i) data[i] = float(draw.normal());
    return data;
}

void sprinkle(Draw &draw, Doubles &values) {
    for (int64_t n = values.empty() ? 0 : draw.between(0, 1); n > 0; --n)
        values[size_t(draw.between(0, int64_t(values.size()) - 1))] = draw.pick({INFINITE, -INFINITE, std::nan("")});
}

struct Results {
    Result out, final_state, query, key, value, g, beta, initial_state;
};

// The recurrence as it is written, and its derivative step by step.
Results define(const nearfield_linear &p) {
    const int64_t K = p.head_dim, V = p.value_dim, T = p.length, H = p.heads, cells = K * V;
    Doubles q = load(p.query, p.dtype, shape_of(p, K)), k = load(p.key, p.dtype, shape_of(p, K));
    Doubles v = load(p.value, p.dtype, shape_of(p, V)), grad_out = load(p.grad_out, p.dtype, shape_of(p, V));
    Doubles g = load(p.g, p.g_dtype, shape_of(p, p.gates)), beta;
    if (p.beta.data) beta = load(p.beta, NEARFIELD_F32, shape_of(p, 1));
    Results r;
    auto size = [&](Result &result, int64_t count) { result.values.assign(size_t(count), 0); };
    auto add = [](Result &to, int64_t at, double term) { to.values[size_t(at)] += term, to.size.add(term); };
    auto square = [](double x) { return x * x; };
    auto shrink = [](Doubles &state, Doubles &squares, int64_t i, double factor) {
        state[size_t(i)] *= factor, squares[size_t(i)] *= factor * factor;
    };
    auto close = [](Result &to, int64_t at, const Doubles &state, const Doubles &squares) {
        std::copy(state.begin(), state.end(), to.values.begin() + at);
        for (double x : squares) to.size.squares += std::isfinite(x) ? x : 0;
    };
    const int64_t tokens = p.batch * T * H;
    size(r.out, tokens * V), size(r.query, tokens * K), size(r.key, tokens * K), size(r.value, tokens * V);
    size(r.g, tokens * p.gates), size(r.beta, p.beta.data ? tokens : 0);
    size(r.final_state, p.batch * H * cells), size(r.initial_state, p.batch * H * cells);
    for (int64_t plane = 0; plane < p.batch * H; ++plane) {
        auto token = [&](int64_t t) { return (plane / H * T + t) * H + plane % H; };
        auto decay = [&](int64_t t, int64_t c) {
            return p.gates ? std::exp(g[size_t(token(t) * p.gates + (p.gates == 1 ? 0 : c))]) : 1;
        };
        // of every step: the decayed state, the state, what the value lacks
        std::vector<Doubles> before{size_t(T)}, after{size_t(T)}, lacks{size_t(T)};
        Doubles state(size_t(cells), 0), squares = state;  // the latter of the terms, also of those that cancel
        for (int64_t i = 0; p.initial_state && i < cells; ++i) state[size_t(i)] = p.initial_state[plane * cells + i];
        for (int64_t t = 0; t < T; ++t) {
            const double *key = &k[size_t(token(t) * K)], *query = &q[size_t(token(t) * K)];
            for (int64_t i = 0; i < cells; ++i) shrink(state, squares, i, decay(t, i / V));
            before[size_t(t)] = state;
            Doubles &e = lacks[size_t(t)];
            e.assign(&v[size_t(token(t) * V)], &v[size_t(token(t) * V)] + V);
            double factor = beta.empty() ? 1 : beta[size_t(token(t))];
            for (int64_t i = 0; !beta.empty() && i < cells; ++i) e[size_t(i % V)] -= state[size_t(i)] * key[i / V];
            for (int64_t i = 0; i < cells; ++i) {
                double wanted = v[size_t(token(t) * V + i % V)], lack = e[size_t(i % V)];
                state[size_t(i)] += key[i / V] * factor * lack;
                squares[size_t(i)] += square(key[i / V] * factor) * (square(wanted) + square(wanted - lack));
            }
            after[size_t(t)] = state;
            for (int64_t i = 0; i < cells; ++i)
                add(r.out, token(t) * V + i % V, p.scale * query[i / V] * state[size_t(i)]);
        }
        close(r.final_state, plane * cells, state, squares);
        Doubles grad(size_t(cells), 0);
        std::fill(squares.begin(), squares.end(), 0);
        for (int64_t i = 0; p.grad_final_state && i < cells; ++i)
            grad[size_t(i)] = p.grad_final_state[plane * cells + i];
        for (int64_t t = T - 1; t >= 0; --t) {
            const double *key = &k[size_t(token(t) * K)], *query = &q[size_t(token(t) * K)];
            const double *pull = &grad_out[size_t(token(t) * V)], factor = beta.empty() ? 1 : beta[size_t(token(t))];
            const Doubles &e = lacks[size_t(t)], &was = before[size_t(t)];
            Doubles grad_e(size_t(V), 0);
            for (int64_t i = 0; i < cells; ++i) {
                add(r.query, token(t) * K + i / V, p.scale * after[size_t(t)][size_t(i)] * pull[i % V]);
                grad[size_t(i)] += p.scale * query[i / V] * pull[i % V];
                squares[size_t(i)] += square(p.scale * query[i / V] * pull[i % V]);
                const double lack = e[size_t(i % V)], wanted = v[size_t(token(t) * V + i % V)];
                add(r.key, token(t) * K + i / V, grad[size_t(i)] * factor * lack);
                grad_e[size_t(i % V)] += grad[size_t(i)] * key[i / V];
                r.value.size.add(factor * grad[size_t(i)] * key[i / V]);
                for (double part : {wanted, wanted - lack}) {  // of what is lacking, which may be next to nothing
                    r.key.size.add(grad[size_t(i)] * factor * part);
                    r.beta.size.add(grad[size_t(i)] * key[i / V] * part);
                }
            }
            for (int64_t j = 0; j < V; ++j) r.value.values[size_t(token(t) * V + j)] = factor * grad_e[size_t(j)];
            for (int64_t j = 0; !beta.empty() && j < V; ++j) add(r.beta, token(t), grad_e[size_t(j)] * e[size_t(j)]);
            for (int64_t i = 0; !beta.empty() && i < cells; ++i) {
                add(r.key, token(t) * K + i / V, -factor * was[size_t(i)] * grad_e[size_t(i % V)]);
                grad[size_t(i)] -= factor * key[i / V] * grad_e[size_t(i % V)];
                squares[size_t(i)] += square(factor * key[i / V] * grad_e[size_t(i % V)]);
            }
            for (int64_t i = 0; p.gates && i < cells; ++i)
                add(r.g, token(t) * p.gates + (p.gates == 1 ? 0 : i / V), grad[size_t(i)] * was[size_t(i)]);
            for (int64_t i = 0; i < cells; ++i) shrink(grad, squares, i, decay(t, i / V));
        }
        close(r.initial_state, plane * cells, grad, squares);
    }
    return r;
}

void make_case(Draw &draw, Case &c) {
    nearfield_linear &p = c.p;
    auto dim = [&] { return draw.chance(0.4) ? draw.between(1, 70) : draw.pick<int64_t>({1, 8, 16, 24, 32, 64}); };
    do {
        p.dtype = draw.between(0, 2), p.g_dtype = draw.chance(0.5) ? 0 : p.dtype;
        p.batch = draw.chance(0.02) ? 0 : draw.between(1, 2), p.heads = draw.between(1, 3);
        p.length = draw.pick<int64_t>({0, 1, draw.between(1, 9), draw.between(1, 130), 64, 300});
        p.head_dim = dim(), p.value_dim = draw.chance(0.5) ? p.head_dim : dim();
        if (draw.chance(0.02)) p.value_dim = draw.between(200, 400);
    } while (double(p.batch * p.heads * p.length) * double(p.head_dim * p.value_dim) > 3e5);
    p.gates = draw.pick<int64_t>({0, 1, p.head_dim});
    p.scale = std::pow(double(p.head_dim), -0.5) * draw.pick({1.0, 0.5, -1.0});
    c.is_special = draw.chance(0.08);
    bool is_delta = draw.chance(0.5), wants_g = draw.chance(0.7), wants_state = draw.chance(0.5);
    Shape keys = shape_of(p, p.head_dim), values = shape_of(p, p.value_dim);
    auto normals = [&](const Shape &shape, double size) {
        Doubles x(size_t(shape.count()));
        for (double &value : x) value = size * draw.normal();
        if (c.is_special) sprinkle(draw, x);
        return x;
    };
    p.query = input(draw, c, p.dtype, keys, normals(keys, 1));
    Doubles key = normals(keys, 1);
    // with keys of norm 1 the delta rule is stable
    for (size_t row = 0; is_delta && row < key.size(); row += size_t(p.head_dim)) {
        double squares = 0;
        for (int64_t i = 0; i < p.head_dim; ++i) squares += key[row + size_t(i)] * key[row + size_t(i)];
        for (int64_t i = 0; i < p.head_dim && std::isfinite(squares); ++i) key[row + size_t(i)] /= std::sqrt(squares);
    }
    p.key = input(draw, c, p.dtype, keys, key);
    p.value = input(draw, c, p.dtype, values, normals(values, 1));
    p.grad_out = input(draw, c, p.dtype, values, normals(values, 1));
    if (p.gates) {
        Doubles g(size_t(shape_of(p, p.gates).count()));
        double size = draw.pick({0.0, 1e-4, 0.05, 1.0, 20.0, 300.0});
        for (double &x : g) x = -std::fabs(size * draw.normal());
        for (double &x : g)
            if (draw.chance(0.02)) x = draw.pick({0.0, -50.0, -1e4, -INFINITE});
        p.g = input(draw, c, p.g_dtype, shape_of(p, p.gates), g, 2);
        if (wants_g) p.grad_g = output(draw, c, "grad_g", p.g_dtype, shape_of(p, p.gates), true);
    }
    if (is_delta) {
        Doubles beta(size_t(shape_of(p, 1).count()));
        for (double &x : beta) x = draw.chance(0.1) ? draw.pick({0.0, 1.0}) : std::fabs(0.5 + 0.3 * draw.normal());
        p.beta = input(draw, c, NEARFIELD_F32, shape_of(p, 1), beta, 2);
        is_delta = p.beta.data;
        p.grad_beta = output(draw, c, "grad_beta", NEARFIELD_F32, shape_of(p, 1), true);
    }
    if (draw.chance(0.5)) p.initial_state = state_input(draw, c);
    if (draw.chance(0.5)) p.grad_final_state = state_input(draw, c);
    if (wants_state) p.grad_initial_state = state_output(c, "grad_initial_state", true);
    p.final_state = state_output(c, "final_state", false);
    p.out = output(draw, c, "out", p.dtype, values, false);
    p.grad_query = output(draw, c, "grad_query", p.dtype, keys, true);
    p.grad_key = output(draw, c, "grad_key", p.dtype, keys, true);
    p.grad_value = output(draw, c, "grad_value", p.dtype, values, true);
    Results r = define(p);
    for (Output &out : c.outputs) {
        std::string name = out.name;
        out.expected = std::move(name == "out"           ? r.out
                                 : name == "final_state" ? r.final_state
                                 : name == "grad_query"  ? r.query
                                 : name == "grad_key"    ? r.key
                                 : name == "grad_value"  ? r.value
                                 : name == "grad_g"      ? r.g
                                 : name == "grad_beta"   ? r.beta
                                                         : r.initial_state);
    }
    char line[300];
    std::snprintf(line, sizeof line, "%s g %s x %lld batch %lld length %lld heads %lld dims %lld,%lld%s%s%s%s%s",
                  DTYPES[p.dtype], DTYPES[p.g_dtype], (long long)p.gates, (long long)p.batch, (long long)p.length,
                  (long long)p.heads, (long long)p.head_dim, (long long)p.value_dim, is_delta ? " delta" : "",
                  p.grad_g.data ? " grad-g" : "", p.initial_state ? " initial" : "",
                  p.grad_final_state ? " grad-final" : "", c.is_special ? " special" : "");
    c.text = line;
}

void poison(const Output &out) {
    each_row(out.tensor, out.shape, [&](int64_t, int64_t at) {
        std::memset(static_cast<uint8_t *>(out.tensor.data) + at * element_size(out.dtype), POISON,
                    size_t(out.shape.channels * element_size(out.dtype)));
    });
}

// How a result differs from the expected one, or "". Where the definition is finite an output must be, and where it is
// not neither may be; a gradient may have met the zero times infinity of some other order of products.
std::string difference(const Case &c, const Output &out) {
    char line[200];
    Doubles found = load(out.tensor, out.dtype, out.shape);
    const Doubles &expected = out.expected.values;
    double squares = 0, errors = 0;
    size_t finite = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        double e = std::fabs(expected[i]) < LARGEST[out.dtype] ? expected[i] : INFINITE, f = found[i];
        if (!std::isfinite(f) && (!std::isfinite(e) || (c.is_special && out.is_gradient))) continue;
        if (std::isfinite(e) != std::isfinite(f)) {
            std::snprintf(line, sizeof line, "%s[%zu] is %g, not %g", out.name, i, f, e);
            return line;
        }
        squares += e * e, errors += (f - e) * (f - e), ++finite;
    }
    if (!finite) return "";
    // Half the size of the terms at least: a result that cancels below it is all rounding noise.
    double size = std::max(std::sqrt(squares / double(finite)), 0.5 * out.expected.size.rms(found.size()));
    double tolerance = (out.is_gradient ? GRADIENT : OUTPUT)[out.dtype];
    double allowed = tolerance * size + SMALLEST[out.dtype], error = std::sqrt(errors / double(finite));
    if (error > allowed) {
        std::snprintf(line, sizeof line, "%s: rms error %.3g of %.3g", out.name, error, size);
        return line;
    }
    for (size_t i = 0; i < found.size(); ++i) {
        double e = expected[i], f = found[i];
        if (!std::isfinite(f) || std::fabs(f - e) <= WORST_ELEMENT * (allowed + tolerance * std::fabs(e))) continue;
        std::snprintf(line, sizeof line, "%s[%zu] is %g, not %g", out.name, i, f, e);
        return line;
    }
    return "";
}

std::string call(Case &c, int64_t threads) {
    for (const Output &out : c.outputs) poison(out);
    if (nearfield_linear_forward(&c.p, threads) != NEARFIELD_OK) return "forward was refused";
    if (nearfield_linear_backward(&c.p, threads) != NEARFIELD_OK) return "backward was refused";
    for (const Output &out : c.outputs)
        if (std::string wrong = difference(c, out); !wrong.empty()) return wrong;
    return "";
}

bool is_untouched(const Output &out) {
    return std::all_of(out.memory->begin(), out.memory->end(), [](uint8_t byte) { return byte == POISON; });
}

std::string check_case(Case &c, int64_t threads) {
    std::string wrong = call(c, 1);
    if (!wrong.empty()) return wrong;
    std::vector<std::vector<uint8_t>> once(c.memory.begin(), c.memory.end());
    wrong = call(c, threads);
    if (wrong.empty() && !std::equal(once.begin(), once.end(), c.memory.begin())) return "bits depend on the threads";
    for (const Output &out : c.outputs) {
        if (!wrong.empty() || !out.memory) continue;
        poison(out);
        if (!is_untouched(out)) wrong = std::string(out.name) + " was written beside its rows";
    }
    return wrong;
}

// A descriptor with one thing wrong, that must be refused before anything is written.
std::string check_refusal(Draw &draw, Case &c) {
    nearfield_linear whole = c.p, &p = c.p;
    if (!p.batch || !p.length) return "";
    for (const Output &out : c.outputs) poison(out);
    int64_t kind = draw.between(0, 15), threads = 2, big = int64_t(1) << draw.between(41, 62);
    const nearfield_linear *problem = &p;
    switch (kind) {
    case 0: p.dtype = draw.pick<int64_t>({-1, 3}); break;
    case 1: p.g_dtype = draw.pick<int64_t>({-1, 3}); break;
    case 2: p.gates = p.head_dim + 1; break;
    case 3: p.batch = draw.pick({int64_t(-1), big}); break;
    case 4: p.length = draw.pick({int64_t(-1), big}); break;
    case 5: p.heads = draw.pick({int64_t(0), int64_t(-1), big}); break;
    case 6: p.head_dim = draw.pick<int64_t>({0, -1, 1025}), p.gates = 0; break;
    case 7: p.value_dim = draw.pick<int64_t>({0, -1, 1025}); break;
    case 8: p.scale = draw.pick({INFINITE, std::nan(""), 1e39}); break;
    case 9: p.query.data = nullptr; break;
    case 10: p.value.data = static_cast<char *>(p.value.data) + 1; break;
    case 11: p.out.data = nullptr, p.grad_value.data = nullptr; break;
    case 12: p.final_state = nullptr, p.grad_query.data = nullptr; break;
    case 13: threads = draw.pick<int64_t>({0, -1}); break;
    case 14: problem = nullptr; break;
    case 15: p.batch = p.heads = int64_t(1) << 32; break;
    }
    int forward = nearfield_linear_forward(problem, threads), backward = nearfield_linear_backward(problem, threads);
    c.p = whole;
    if (forward != NEARFIELD_INVALID || backward != NEARFIELD_INVALID)
        return "broken descriptor " + std::to_string(kind) + " was not refused";
    for (const Output &out : c.outputs)
        if (out.memory && !is_untouched(out)) return "something was written before a refusal";
    return "";
}

}  // namespace

int main(int count, char **words) {
    int64_t cases = 400, seed = 1, only = -1, passed = 0, failed = 0;
    for (int i = 1; i < count; ++i) {
        std::string word = words[i];
        int64_t *number = word == "--cases" ? &cases : word == "--seed" ? &seed : word == "--only" ? &only : nullptr;
        if (i + 1 == count || !number) {
            std::fprintf(stderr, "%s [--cases N] [--seed S] [--only K]\n", words[0]);
            return 2;
        }
        *number = std::atoll(words[++i]);
    }
    nearfield_set_grain(0);
    const std::string isas = nearfield_isas();
    for (int64_t number = only < 0 ? 0 : only; number < (only < 0 ? cases : only + 1); ++number) {
        Draw draw{uint64_t(seed), uint64_t(number)};
        Case c;
        make_case(draw, c);
        int64_t threads = draw.pick<int64_t>({2, 3, 7});
        std::string wrong, isa;
        for (size_t at = 0; wrong.empty() && at < isas.size(); at += isa.size() + 1) {
            isa = isas.substr(at, isas.find(' ', at) - at);
            if (nearfield_use(isa.c_str()) != NEARFIELD_OK) return 2;
            wrong = check_case(c, threads);
        }
        if (wrong.empty()) wrong = check_refusal(draw, c);
        wrong.empty() ? ++passed : ++failed;
        if (wrong.empty()) continue;
        std::printf("FAILED: linear --seed %lld --only %lld on %s: %s | %s\n", (long long)seed, (long long)number,
                    isa.c_str(), wrong.c_str(), c.text.c_str());
        std::fflush(stdout);  // a later case may crash
    }
    std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
    return failed ? 1 : 0;
}
