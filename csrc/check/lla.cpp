// Random problems of local linear attention, held against the definition in double.
//
//     lla [--cases N] [--seed S] [--only K] [--threads T]
//
// Each runs on every instruction set, with one thread and with more: the same bits. Results are filled with NaN before,
// and so are the gaps between the rows of all tensors.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <sstream>
#include <string>

#include "draw.h"
#include "reference.h"

using namespace nearfield::check;

namespace {

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN(),
                 INFINITE = std::numeric_limits<double>::infinity();
constexpr uint8_t POISON = 0xff;  // repeated it is NaN in every dtype
constexpr double WORST_ELEMENT = 50;
// nearfield/core/tolerance.py, by dtype
constexpr double OUTPUT[] = {2e-6, 1e-2, 1.5e-3}, GRADIENT[] = {5e-6, 2e-2, 3e-3};
constexpr double SMALLEST[] = {1.2e-38, 1e-36, 6e-8};

struct Memory {
    std::unique_ptr<uint8_t[]> data;
    size_t bytes = 0;
};

// Memory for a tensor in a random layout, all of it poison.
nearfield_tensor place(Draw &draw, const Shape &shape, int64_t element, Memory &memory) {
    const int64_t size[5] = {shape.batch, 1, 1, shape.tokens[2], shape.heads};
    int64_t order[5] = {0, 1, 2, 3, 4}, extent = shape.channels, base = 0;  // outermost first
    if (draw.chance(0.4))
        for (int64_t i = 4; i > 0; --i) std::swap(order[i], order[draw.between(0, i)]);
    bool gaps = draw.chance(0.4);
    nearfield_tensor tensor{};
    for (int64_t i = 4; i >= 0; --i) {
        int64_t d = order[i], stride = extent + (gaps ? draw.between(0, 9) : 0);
        if (size[d] <= 1) {
            tensor.stride[d] = draw.pick({int64_t(0), stride, int64_t(-1), int64_t(1) << 50});
            continue;
        }
        extent += stride * (size[d] - 1), tensor.stride[d] = stride;
        if (draw.chance(0.1)) base += stride * (size[d] - 1), tensor.stride[d] = -stride;
    }
    if (!shape.count()) return tensor;
    int64_t skip = draw.between(0, 7);
    memory.bytes = size_t((skip + extent) * element);
    memory.data.reset(new uint8_t[memory.bytes]);
    std::memset(memory.data.get(), POISON, memory.bytes);
    tensor.data = memory.data.get() + (skip + base) * element;
    return tensor;
}

struct Output {
    const char *name;
    nearfield_tensor tensor;
    int64_t dtype;
    Shape shape;
    Memory *memory;
    double tolerance;
    Doubles expected;
    double floor;  // an rms to measure small results by
    bool leaks;    // a special number may reach it that its row does not see
};

struct Case {
    nearfield_lla p{};
    std::string text;
    bool is_special = false;
    double rounding = 1;   // a score of 16 is wrong by 16 roundings, and so is its weight
    double condition = 1;  // of C + ridge, which multiplies the roundings of a solution
    Memory memory[11];
    std::vector<uint8_t> mask;
    std::vector<Output> outputs;
};

Shape of_queries(const nearfield_lla &p, int64_t channels) {
    return {p.batch, {1, 1, p.num_queries}, p.heads, channels};
}
Shape of_keys(const nearfield_lla &p, int64_t channels) { return {p.batch, {1, 1, p.num_keys}, p.kv_heads, channels}; }

// (C + ridge) x = b by conjugate gradients.
Doubles solve(const nearfield_lla &p, const Doubles &weights, const std::vector<Doubles> &keys, double ridge,
              const Doubles &b) {
    size_t dim = b.size();
    Doubles x(dim, 0.0), r = b, d = b;
    auto dot = [](const Doubles &u, const Doubles &v) {
        double sum = 0;
        for (size_t c = 0; c < u.size(); ++c) sum += u[c] * v[c];
        return sum;
    };
    double size = dot(r, r), limit = p.tolerance * p.tolerance * size;
    if (size < 1e-280) return x;  // of a softmax that is 1 for a single key
    for (int64_t n = 0; n < p.max_iterations && size > limit; ++n) {
        Doubles y(dim, 0.0);
        for (size_t j = 0; j < keys.size(); ++j) {  // centred: their mean is zero
            double along = weights[j] * dot(keys[j], d);
            for (size_t c = 0; c < dim; ++c) y[c] += along * keys[j][c];
        }
        for (size_t c = 0; c < dim; ++c) y[c] += ridge * d[c];
        double step = size / dot(d, y), before = size;
        for (size_t c = 0; c < dim; ++c) x[c] += step * d[c], r[c] -= step * y[c];
        size = dot(r, r);
        for (size_t c = 0; c < dim; ++c) d[c] = r[c] + size / before * d[c];
    }
    if (std::isnan(size)) std::fill(x.begin(), x.end(), NOT_A_NUMBER);
    return x;
}

// By the equations as they are written, a query at a time.
//
// A float is wrong by a share of what was summed, not of the sum: the floor of a result is the rms that its terms would
// have if none cancelled. Those of r are as large as |kbar - q| / ridge, which no key need have a part in.
void expect(Case &c) {
    const nearfield_lla &p = c.p;
    Doubles q = load(p.query, p.dtype, of_queries(p, p.head_dim)), k = load(p.key, p.dtype, of_keys(p, p.head_dim));
    Doubles v = load(p.value, p.dtype, of_keys(p, p.value_dim)),
            g = load(p.grad_out, p.dtype, of_queries(p, p.value_dim));
    Doubles ridge = load(p.ridge, NEARFIELD_F32, of_queries(p, 1));
    auto &out = c.outputs;
    for (Output &o : out) o.expected.assign(size_t(o.shape.count()), 0.0);
    std::vector<double> squares(out.size(), 0.0);  // of the terms of each result
    auto bound = [&](size_t which, double term) {
        if (std::isfinite(term)) squares[which] += term * term;
    };
    auto add = [&](size_t which, int64_t at, double term) {
        out[which].expected[size_t(at)] += term;
        bound(which, term);
    };
    const nearfield_axis axis{p.num_keys, p.kernel_size, 1, 1, p.is_causal};
    const int64_t dim = p.head_dim, dv = p.value_dim;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t i = 0; i < p.num_queries; ++i)
            for (int64_t h = 0; h < p.heads; ++h) {
                int64_t row = (b * p.num_queries + i) * p.heads + h;
                auto [start, end] = interval(axis, p.border, i + p.num_keys - p.num_queries, 0);
                std::vector<int64_t> seen;
                for (int64_t j = std::max<int64_t>(start, 0); j < std::min(end, p.num_keys); ++j)
                    if (!p.key_mask || p.key_mask[b * p.num_keys + j])
                        seen.push_back((b * p.num_keys + j) * p.kv_heads + h / (p.heads / p.kv_heads));
                if (seen.empty()) continue;
                Doubles w(seen.size());
                double top = -INFINITE, total = 0;
                for (size_t j = 0; j < seen.size(); ++j) {
                    for (int64_t t = 0; t < dim; ++t) w[j] += q[row * dim + t] * k[seen[j] * dim + t];
                    w[j] *= p.scale;
                    if (std::isnan(w[j])) top = NOT_A_NUMBER;
                    top = w[j] > top ? w[j] : top;
                }
                for (double &x : w) total += x = std::exp(x - top);
                for (double &x : w) x /= total;
                Doubles mean(dim, 0.0), gap(dim);
                for (size_t j = 0; j < seen.size(); ++j)
                    for (int64_t t = 0; t < dim; ++t) mean[t] += w[j] * k[seen[j] * dim + t];
                std::vector<Doubles> keys;
                for (int64_t j : seen) {
                    keys.emplace_back(dim);
                    for (int64_t t = 0; t < dim; ++t) keys.back()[t] = k[j * dim + t] - mean[t];
                }
                for (int64_t t = 0; t < dim; ++t) gap[t] = mean[t] - q[row * dim + t];
                auto length = [](const Doubles &x) {
                    double sum = 0;
                    for (double term : x) sum += term * term;
                    return std::sqrt(sum);
                };
                double large_r = length(gap) / ridge[row] / std::sqrt(double(dim)), large_s = 0, spread = 0;
                Doubles r = solve(p, w, keys, ridge[row], gap), along(seen.size(), 0.0), pulls(seen.size(), 0.0);
                Doubles large_along(seen.size()), large_pull(seen.size(), 0.0);
                double pull = 0;
                for (int64_t t = 0; t < dim; ++t) add(1, row * dim + t, r[t]), bound(1, large_r);
                for (size_t j = 0; j < seen.size(); ++j) {
                    double score = 0;
                    for (int64_t t = 0; t < dim; ++t) score += p.scale * q[row * dim + t] * keys[j][t];
                    if (std::isfinite(score)) c.rounding = std::max(c.rounding, 1 + std::fabs(score) / 4);
                    spread += w[j] * length(keys[j]) * length(keys[j]) / ridge[row];
                    large_along[j] = large_r * length(keys[j]);
                    for (int64_t t = 0; t < dim; ++t) along[j] += r[t] * keys[j][t];
                    for (int64_t t = 0; t < dv; ++t) {
                        add(0, row * dv + t, w[j] * v[seen[j] * dv + t]);
                        add(0, row * dv + t, -w[j] * along[j] * v[seen[j] * dv + t]);
                        bound(0, w[j] * large_along[j] * v[seen[j] * dv + t]);
                        bound(4, w[j] * large_along[j] * g[row * dv + t]);
                        pulls[j] += g[row * dv + t] * v[seen[j] * dv + t];
                        large_pull[j] += std::pow(g[row * dv + t] * v[seen[j] * dv + t], 2);
                        add(4, seen[j] * dv + t, w[j] * (1 - along[j]) * g[row * dv + t]);
                    }
                    pull += w[j] * pulls[j], large_pull[j] = std::sqrt(large_pull[j]);
                    large_s += std::pow(w[j] * large_pull[j] * length(keys[j]), 2);
                }
                if (std::isfinite(spread)) c.condition = std::max(c.condition, 1 + spread / 16);
                large_s = std::sqrt(large_s / double(dim)) / ridge[row];
                Doubles right(dim, 0.0), slope(seen.size(), 0.0);
                for (size_t j = 0; j < seen.size(); ++j)
                    for (int64_t t = 0; t < dim; ++t) right[t] -= w[j] * (pulls[j] - pull) * keys[j][t];
                Doubles s = solve(p, w, keys, ridge[row], right);
                double middle = 0;
                for (size_t j = 0; j < seen.size(); ++j) {
                    double other = 0, sum = 0;
                    for (int64_t t = 0; t < dim; ++t)
                        other += s[t] * keys[j][t], sum += (s[t] + r[t] * pull) * keys[j][t];
                    double large = (large_pull[j] + large_s * length(keys[j])) * (1 + large_along[j]);
                    slope[j] = pulls[j] * (1 - along[j]) + sum - other * along[j];
                    middle += w[j] * slope[j];
                    for (int64_t t = 0; t < dim; ++t) {
                        add(3, seen[j] * dim + t, w[j] * (pull - pulls[j] - other) * r[t]);
                        add(3, seen[j] * dim + t, w[j] * (1 - along[j]) * s[t]);
                        bound(2, p.scale * w[j] * large * keys[j][t]),
                            bound(3, p.scale * w[j] * large * q[row * dim + t]);
                        bound(3, w[j] * large * large_r), bound(3, w[j] * (1 + large_along[j]) * large_s);
                    }
                }
                for (size_t j = 0; j < seen.size(); ++j)
                    for (int64_t t = 0; t < dim; ++t) {
                        double gs = p.scale * w[j] * (slope[j] - middle);
                        add(2, row * dim + t, gs * keys[j][t]);
                        add(3, seen[j] * dim + t, gs * q[row * dim + t]);
                    }
                for (int64_t t = 0; t < dim; ++t) {
                    add(2, row * dim + t, -s[t]), add(5, row, -s[t] * r[t]);
                    bound(2, large_s), bound(5, large_s * large_r);
                }
            }
    for (Output &o : out) o.tolerance *= p.dtype == NEARFIELD_F32 ? c.rounding * c.condition : 1;
    for (size_t n = 0; n < out.size(); ++n)
        if (out[n].shape.count()) out[n].floor = std::sqrt(squares[n] / double(out[n].shape.count()));
}

void make(Draw &draw, Case &c) {
    nearfield_lla &p = c.p;
    bool is_large = draw.chance(0.05);
    p.dtype = draw.chance(0.6) ? NEARFIELD_F32 : draw.between(1, 2);
    p.batch = draw.chance(0.03) ? 0 : draw.between(1, 2);
    p.num_keys = draw.chance(0.03) ? 0 : draw.between(1, is_large ? 400 : draw.pick<int64_t>({8, 40, 90, 150}));
    p.kv_heads = draw.between(1, 2), p.heads = p.kv_heads * draw.between(1, 3);
    auto dim = [&] {
        return draw.chance(0.3) ? draw.between(1, 40)
                                : draw.pick<int64_t>({1, 2, 4, 8, 16, 20, 32, 64, is_large ? 256 : 48});
    };
    p.head_dim = dim(), p.value_dim = draw.chance(0.6) ? p.head_dim : dim();
    p.is_causal = draw.chance(0.6);
    p.border = draw.between(0, 1);
    p.kernel_size =
        draw.pick<int64_t>({1, 2, draw.between(1, 20), draw.between(1, 200), int64_t(1) << draw.between(9, 40)});
    if (!p.is_causal && p.border == NEARFIELD_SHIFT) p.kernel_size = std::min(p.kernel_size, p.num_keys);
    if (!p.is_causal && p.border == NEARFIELD_SHIFT && !p.num_keys) p.border = NEARFIELD_TRUNCATE, p.kernel_size = 1;
    p.num_queries = p.is_causal && draw.chance(0.3) ? draw.between(0, p.num_keys) : p.num_keys;
    p.scale = draw.chance(0.7) ? 1 / std::sqrt(double(p.head_dim)) : draw.normal();
    if (draw.chance(0.7))
        p.tolerance = 1e-7, p.max_iterations = 100;
    else
        p.tolerance = draw.pick({0.0, 0.0, 1.0}),
        p.max_iterations = draw.between(0, 3);  // more repeat the roundings of those before
    c.is_special = draw.chance(0.15);
    const int64_t element = p.dtype == NEARFIELD_F32 ? 4 : 2;
    auto fill = [&](nearfield_tensor &x, int64_t dtype, Shape shape, Memory &memory, bool may_be_special, auto number) {
        x = place(draw, shape, dtype == NEARFIELD_F32 ? 4 : element, memory);
        Doubles values(size_t(shape.count()));
        for (double &value : values) value = number();
        if (c.is_special && may_be_special && !values.empty() && draw.chance(0.4))
            values[size_t(draw.between(0, int64_t(values.size()) - 1))] =
                draw.pick({NOT_A_NUMBER, INFINITE, -INFINITE});
        store(x, dtype, shape, values);
    };
    double size = draw.pick({1.0, 1.0, 1.0, 0.3, 3.0}), centre = draw.chance(0.2) ? draw.pick({3.0, 30.0}) : 0;
    double small = draw.chance(0.1) ? 1e-3 : 1, lowest = draw.pick({0.5, 1.0, 10.0}) * std::max(1.0, size * size);
    fill(p.query, p.dtype, of_queries(p, p.head_dim), c.memory[0], true, [&] { return size * draw.normal() + centre; });
    fill(p.key, p.dtype, of_keys(p, p.head_dim), c.memory[1], true, [&] { return size * draw.normal() + centre; });
    fill(p.value, p.dtype, of_keys(p, p.value_dim), c.memory[2], true, [&] { return draw.normal(); });
    fill(p.grad_out, p.dtype, of_queries(p, p.value_dim), c.memory[3], true, [&] { return small * draw.normal(); });
    fill(p.ridge, NEARFIELD_F32, of_queries(p, 1), c.memory[4], false,
         [&] { return lowest * std::exp(std::fabs(draw.normal())); });
    if (draw.chance(0.4)) {
        double share = draw.pick({0.1, 0.5, 0.95});
        for (int64_t i = 0; i < p.batch * p.num_keys; ++i)
            c.mask.push_back(draw.chance(share) ? 0 : uint8_t(draw.between(1, 255)));
        c.mask.push_back(0);
        p.key_mask = c.mask.data();
        each_row(p.key, of_keys(p, p.head_dim), [&](int64_t row, int64_t at) {  // masked keys may hold anything
            int64_t token = row / p.head_dim / p.kv_heads;
            if (!c.mask[size_t(token)] && draw.chance(0.5)) write(p.key.data, p.dtype, at, NOT_A_NUMBER);
        });
    }
    auto result = [&](const char *name, nearfield_tensor &x, int64_t dtype, Shape shape, Memory &memory,
                      const double *allowed) {
        x = place(draw, shape, dtype == NEARFIELD_F32 ? 4 : element, memory);
        bool is_gradient = allowed == GRADIENT;
        c.outputs.push_back({name, x, dtype, shape, &memory, allowed[p.dtype], {}, 0, c.is_special && is_gradient});
    };
    result("out", p.out, p.dtype, of_queries(p, p.value_dim), c.memory[5], OUTPUT);
    result("correction", p.correction, NEARFIELD_F32, of_queries(p, p.head_dim), c.memory[6], GRADIENT);
    result("grad_query", p.grad_query, p.dtype, of_queries(p, p.head_dim), c.memory[7], GRADIENT);
    result("grad_key", p.grad_key, p.dtype, of_keys(p, p.head_dim), c.memory[8], GRADIENT);
    result("grad_value", p.grad_value, p.dtype, of_keys(p, p.value_dim), c.memory[9], GRADIENT);
    result("grad_ridge", p.grad_ridge, NEARFIELD_F32, of_queries(p, 1), c.memory[10], GRADIENT);
    std::ostringstream text;
    text << "dtype " << p.dtype << " border " << p.border << " batch " << p.batch << " queries " << p.num_queries
         << " keys " << p.num_keys << " heads " << p.heads << "/" << p.kv_heads << " dims " << p.head_dim << ","
         << p.value_dim << " kernel " << p.kernel_size << (p.is_causal ? " causal" : "") << (p.key_mask ? " mask" : "")
         << " scale " << p.scale << " its " << p.max_iterations << " tol " << p.tolerance << " size " << size
         << " centre " << centre << " ridge " << lowest << (c.is_special ? " special" : "");
    c.text = text.str();
    expect(c);
}

std::string difference(const Output &out) {
    char line[200];
    Doubles found = load(out.tensor, out.dtype, out.shape);
    double squares = 0, errors = 0;
    size_t finite = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        double e = out.expected[i], f = found[i];
        if (out.leaks && !std::isfinite(f)) continue;
        if (std::isfinite(e)) {
            squares += e * e, errors += (f - e) * (f - e), ++finite;
            if (std::isfinite(f)) continue;
        } else if (!std::isfinite(f))  // how inf - inf arises depends on the order of sums
            continue;
        std::snprintf(line, sizeof line, "%s[%zu] is %g, not %g", out.name, i, f, e);
        return line;
    }
    if (!finite) return "";
    double size = std::max(std::sqrt(squares / double(finite)), out.floor);
    double allowed = out.tolerance * size + SMALLEST[out.dtype], error = std::sqrt(errors / double(finite));
    if (error > allowed) {
        std::snprintf(line, sizeof line, "%s: rms error %.3g of %.3g", out.name, error, size);
        return line;
    }
    for (size_t i = 0; i < found.size(); ++i) {
        double e = out.expected[i], f = found[i];
        if (!std::isfinite(e) || !std::isfinite(f) ||
            std::fabs(f - e) <= WORST_ELEMENT * (allowed + out.tolerance * std::fabs(e)))
            continue;
        std::snprintf(line, sizeof line, "%s[%zu] is %g, not %g", out.name, i, f, e);
        return line;
    }
    return "";
}

std::string run(Case &c, int64_t threads) {
    for (Output &out : c.outputs)
        if (out.memory->bytes) std::memset(out.memory->data.get(), POISON, out.memory->bytes);
    if (nearfield_lla_forward(&c.p, threads) != NEARFIELD_OK) return "forward was refused";
    if (nearfield_lla_backward(&c.p, threads) != NEARFIELD_OK) return "backward was refused";
    for (const Output &out : c.outputs)
        if (std::string wrong = difference(out); !wrong.empty()) return wrong;
    return "";
}

std::vector<Doubles> results(const Case &c) {
    std::vector<Doubles> all;
    for (const Output &out : c.outputs) all.push_back(load(out.tensor, out.dtype, out.shape));
    return all;
}

std::string check(Case &c, int64_t threads) {
    std::vector<uint8_t> before[5];
    for (int i = 0; i < 5; ++i) before[i].assign(c.memory[i].data.get(), c.memory[i].data.get() + c.memory[i].bytes);
    std::string wrong = run(c, 1);
    if (!wrong.empty()) return wrong;
    std::vector<Doubles> once = results(c);
    if (wrong = run(c, threads); !wrong.empty()) return wrong;
    std::vector<Doubles> twice = results(c);
    for (size_t n = 0; n < once.size(); ++n)
        if (!once[n].empty() && std::memcmp(once[n].data(), twice[n].data(), once[n].size() * sizeof(double)))
            return std::string(c.outputs[n].name) + " depends on the number of threads";
    for (Output &out : c.outputs) {
        if (!out.memory->bytes) continue;
        each_row(out.tensor, out.shape, [&](int64_t, int64_t at) {
            int64_t bytes = element_size(out.dtype);
            std::memset(static_cast<uint8_t *>(out.tensor.data) + at * bytes, POISON,
                        size_t(out.shape.channels * bytes));
        });
        const uint8_t *data = out.memory->data.get();
        if (std::any_of(data, data + out.memory->bytes, [](uint8_t byte) { return byte != POISON; }))
            return std::string(out.name) + " was written beside its rows";
    }
    for (int i = 0; i < 5; ++i)
        if (!std::equal(before[i].begin(), before[i].end(), c.memory[i].data.get())) return "an input was written";
    return "";
}

// What a kernel must not see is refused, whatever else the problem is.
std::string refusals(const Case &c) {
    auto is_refused = [&](auto spoil) {
        nearfield_lla p = c.p;
        spoil(p);
        return nearfield_lla_forward(&p, 1) == NEARFIELD_INVALID && nearfield_lla_backward(&p, 1) == NEARFIELD_INVALID;
    };
    bool holds =
        is_refused([](auto &p) { p.dtype = 3; }) && is_refused([](auto &p) { p.border = NEARFIELD_PAD; }) &&
        is_refused([](auto &p) { p.batch = -1; }) && is_refused([](auto &p) { p.num_queries = p.num_keys + 1; }) &&
        is_refused([](auto &p) { p.num_keys = int64_t(1) << 31; }) && is_refused([](auto &p) { p.kernel_size = 0; }) &&
        is_refused([](auto &p) { p.heads = 0; }) && is_refused([](auto &p) { p.kv_heads = p.heads + 1; }) &&
        is_refused([](auto &p) { p.head_dim = 1025; }) && is_refused([](auto &p) { p.value_dim = 0; }) &&
        is_refused([](auto &p) { p.max_iterations = -1; }) && is_refused([](auto &p) { p.tolerance = NOT_A_NUMBER; }) &&
        is_refused([](auto &p) { p.scale = INFINITE; }) && is_refused([](auto &p) { p.is_causal = 2; });
    if (c.p.batch && c.p.num_queries)
        holds = holds && is_refused([](auto &p) { p.query.data = nullptr; }) &&
                is_refused([](auto &p) { p.ridge.data = static_cast<char *>(p.ridge.data) + 1; }) &&
                is_refused([](auto &p) { p.correction.data = nullptr; });
    if (c.p.batch && c.p.num_queries > 1)
        holds = holds && is_refused([](auto &p) { p.key.stride[3] = int64_t(1) << 62; });
    return holds && nearfield_lla_forward(nullptr, 1) == NEARFIELD_INVALID &&
                   nearfield_lla_forward(&c.p, 0) == NEARFIELD_INVALID
               ? ""
               : "a broken descriptor was accepted";
}

}  // namespace

int main(int count, char **words) {
    int64_t cases = 400, seed = 1, only = -1, threads = 3;
    for (int i = 1; i < count; ++i) {
        std::string word = words[i];
        int64_t *number = word == "--cases"     ? &cases
                          : word == "--seed"    ? &seed
                          : word == "--only"    ? &only
                          : word == "--threads" ? &threads
                                                : nullptr;
        if (!number || ++i == count)
            return std::fprintf(stderr, "lla [--cases N] [--seed S] [--only K] [--threads T]\n"), 2;
        *number = std::atoll(words[i]);
    }
    int64_t passed = 0, failed = 0;
    nearfield_set_grain(0);
    for (int64_t number = only < 0 ? 0 : only; number < (only < 0 ? cases : only + 1); ++number) {
        Draw draw{uint64_t(seed), uint64_t(number)};
        Case c;
        make(draw, c);
        std::string wrong = refusals(c);
        if (!wrong.empty())
            std::printf("FAILED: lla --seed %lld --only %lld: %s | %s\n", (long long)seed, (long long)number,
                        wrong.c_str(), c.text.c_str());
        std::istringstream isas(nearfield_isas());
        for (std::string isa; wrong.empty() && isas >> isa;) {
            nearfield_use(isa.c_str());
            wrong = check(c, threads);
            if (wrong.empty()) continue;
            std::printf("FAILED: lla --seed %lld --only %lld (%s): %s | %s\n", (long long)seed, (long long)number,
                        isa.c_str(), wrong.c_str(), c.text.c_str());
            std::fflush(stdout);
        }
        wrong.empty() ? ++passed : ++failed;
    }
    std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
    return failed ? 1 : 0;
}
