#include "reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace nearfield::check {
namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity();

// A small float as a sign, `exponent_bits` and `mantissa_bits`: 8 and 7 are bfloat16, 5 and 10 float16.
double decode_bits(uint16_t bits, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
    int exponent = (bits >> mantissa_bits) & top, mantissa = bits & ((1 << mantissa_bits) - 1);
    double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == top) return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITE;
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

uint16_t encode_bits(double value, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
    uint16_t sign = std::signbit(value) ? 0x8000 : 0, infinite = uint16_t(top << mantissa_bits);
    if (std::isnan(value)) return sign | infinite | uint16_t(1 << (mantissa_bits - 1));
    double size = std::fabs(value);
    if (size == 0) return sign;
    if (size == INFINITE) return sign | infinite;
    int exponent = std::max(std::ilogb(size), 1 - bias);  // subnormals share the exponent of the smallest normal
    auto steps = int64_t(std::nearbyint(std::ldexp(size, mantissa_bits - exponent)));
    // A mantissa that rounds up to the next power of two carries into the exponent, as it must.
    int64_t bits = (int64_t(exponent + bias - 1) << mantissa_bits) + steps;
    return sign | uint16_t(std::min<int64_t>(bits, infinite));
}

// Something that takes part in the softmax of one query.
struct Term {
    double logit = 0;
    double count = 1;           // so many alike
    int64_t key = -1;           // row of key and value; -1: the value is zero
    int64_t additional = -1;    // row of the additional key and value
    int64_t bias = -1;          // entry of the table of its head
    int64_t row() const { return key >= 0 ? key : additional; }
};

// One key of a window on one axis: its coordinate, -1 outside the grid, and its offset in the table of biases.
struct Place {
    int64_t at, offset;
};

struct Problem {
    const nearfield_attention &p;
    bool outside_counts = p.border == NEARFIELD_PAD;
    Doubles query = load(p.query, p.dtype, query_shape(p, p.head_dim));
    Doubles key = load(p.key, p.dtype, key_shape(p, p.head_dim));
    Doubles value = load(p.value, p.dtype, key_shape(p, p.value_dim));
    Doubles more_key = load(p.additional_key, p.dtype, additional_shape(p, p.head_dim));
    Doubles more_value = load(p.additional_value, p.dtype, additional_shape(p, p.value_dim));

    int64_t tokens() const { return p.axis[0].size * p.axis[1].size * p.axis[2].size; }
    int64_t group_of(int64_t head) const { return head / (p.heads / p.kv_heads); }
    bool masked(int64_t b, int64_t token) const { return p.key_mask && !p.key_mask[b * tokens() + token]; }

    // The window of coordinate `i` of an axis. Keys outside are listed only if each has a bias of its own.
    std::vector<Place> window(const nearfield_axis &axis, int64_t i) const {
        int64_t group = i % axis.dilation, position = i / axis.dilation;
        int64_t length = (axis.size - group + axis.dilation - 1) / axis.dilation;
        auto [start, end] = interval(axis, p.border, position, group);
        bool list_outside = outside_counts && p.bias;
        std::vector<Place> places;
        for (int64_t at = list_outside ? start : std::max<int64_t>(start, 0);
             at < (list_outside ? end : std::min(end, length)); ++at)
            places.push_back({at < 0 || at >= length ? -1 : group + at * axis.dilation,
                              at - position + axis.kernel_size - 1});
        return places;
    }

    // How many keys lie in the window of `i` before any cut.
    double uncut(const nearfield_axis &axis, int64_t i) const {
        auto [start, end] = interval(axis, p.border, i / axis.dilation, i % axis.dilation);
        return double(end - start);
    }

    std::vector<Term> terms(int64_t b, const int64_t (&i)[3], int64_t head, const double *q) const {
        const nearfield_axis *axis = p.axis;
        std::vector<Term> found;
        std::vector<Place> windows[3];
        for (int d = 0; d < 3; ++d) windows[d] = window(axis[d], i[d]);
        std::vector<bool> seen(p.num_sinks ? tokens() : 0);

        for (auto z : windows[0])
            for (auto y : windows[1])
                for (auto x : windows[2]) {
                    Term term;
                    if (p.bias)
                        term.bias = (z.offset * (2 * axis[1].kernel_size - 1) + y.offset) *
                                        (2 * axis[2].kernel_size - 1) + x.offset;
                    if (z.at >= 0 && y.at >= 0 && x.at >= 0) {
                        int64_t token = (z.at * axis[1].size + y.at) * axis[2].size + x.at;
                        if (masked(b, token)) continue;
                        if (p.num_sinks) seen[token] = true;
                        term.key = (b * tokens() + token) * p.kv_heads + group_of(head);
                    }
                    found.push_back(term);
                }
        if (outside_counts && !p.bias) {
            Term zeros;
            zeros.count = uncut(axis[0], i[0]) * uncut(axis[1], i[1]) * uncut(axis[2], i[2]) -
                          double(windows[0].size()) * double(windows[1].size()) * double(windows[2].size());
            if (zeros.count > 0) found.push_back(zeros);
        }
        int64_t sinks = 0;
        for (int64_t token = 0; token < tokens() && sinks < p.num_sinks; ++token) {
            if (masked(b, token)) continue;
            ++sinks;
            if (seen[token] || (axis[2].is_causal && token > i[2])) continue;
            Term term;
            term.key = (b * tokens() + token) * p.kv_heads + group_of(head);
            found.push_back(term);
        }
        for (int64_t j = 0; j < p.num_additional; ++j) {
            Term term;
            term.additional = (b * p.num_additional + j) * p.kv_heads + group_of(head);
            found.push_back(term);
        }
        for (Term &term : found) {
            if (const double *k = key_of(term))
                for (int64_t c = 0; c < p.head_dim; ++c) term.logit += q[c] * k[c];
            term.logit *= p.scale;
            if (term.bias >= 0) term.logit += double(p.bias[head * bias_size(p) + term.bias]);
        }
        if (p.sink_logits) {
            Term sink;
            sink.logit = double(p.sink_logits[head]);
            found.push_back(sink);
        }
        return found;
    }

    // The key and value of a term; null where they are zero.
    const double *key_of(const Term &t) const {
        return t.row() < 0 ? nullptr : (t.key >= 0 ? key : more_key).data() + t.row() * p.head_dim;
    }
    const double *value_of(const Term &t) const {
        return t.row() < 0 ? nullptr : (t.key >= 0 ? value : more_value).data() + t.row() * p.value_dim;
    }

    // Calls visit(row of the query, its head, its terms) for every query and head.
    template <typename Visit>
    void each_query(Visit visit) const {
        int64_t row = 0, i[3];
        for (int64_t b = 0; b < p.batch; ++b)
            for (i[0] = 0; i[0] < p.axis[0].size; ++i[0])
                for (i[1] = 0; i[1] < p.axis[1].size; ++i[1])
                    for (i[2] = p.first_query; i[2] < p.axis[2].size; ++i[2])
                        for (int64_t h = 0; h < p.heads; ++h, ++row)
                            visit(row, h, terms(b, i, h, query.data() + row * p.head_dim));
    }
};

void add(Result &result, int64_t at, double term, double size) {
    result.values[at] += term;
    result.size.add(size);
}
void add(Result &result, int64_t at, double term) { add(result, at, term, term); }

// The log-sum-exp of a row, -inf if it sees nothing; then terms hold their weights as logits.
double softmax(std::vector<Term> &terms) {
    double top = -INFINITE, total = 0;
    for (const Term &t : terms) top = std::max(top, t.logit);
    if (top == -INFINITE) top = 0;  // nothing is seen, or all of it with a logit of -inf (or NaN, which stays)
    for (const Term &t : terms) total += t.count * std::exp(t.logit - top);
    for (Term &t : terms) t.logit = total == 0 ? 0 : std::exp(t.logit - top) / total;
    return total == 0 ? -INFINITE : std::log(total) + top;
}

}  // namespace

int64_t element_size(int64_t dtype) { return dtype == NEARFIELD_F32 ? 4 : 2; }

double read(const void *data, int64_t dtype, int64_t index) {
    if (dtype == NEARFIELD_F32) return double(static_cast<const float *>(data)[index]);
    uint16_t bits = static_cast<const uint16_t *>(data)[index];
    return dtype == NEARFIELD_BF16 ? decode_bits(bits, 8, 7) : decode_bits(bits, 5, 10);
}

void write(void *data, int64_t dtype, int64_t index, double value) {
    if (dtype == NEARFIELD_F32)
        static_cast<float *>(data)[index] = float(value);
    else
        static_cast<uint16_t *>(data)[index] =
            dtype == NEARFIELD_BF16 ? encode_bits(value, 8, 7) : encode_bits(value, 5, 10);
}

Doubles load(const nearfield_tensor &tensor, int64_t dtype, const Shape &shape) {
    Doubles values(shape.count());
    each_row(tensor, shape, [&](int64_t row, int64_t at) {
        for (int64_t c = 0; c < shape.channels; ++c) values[row + c] = read(tensor.data, dtype, at + c);
    });
    return values;
}

void store(const nearfield_tensor &tensor, int64_t dtype, const Shape &shape, const Doubles &values) {
    each_row(tensor, shape, [&](int64_t row, int64_t at) {
        for (int64_t c = 0; c < shape.channels; ++c) write(tensor.data, dtype, at + c, values[row + c]);
    });
}

Shape query_shape(const nearfield_attention &p, int64_t channels) {
    return {p.batch, {p.axis[0].size, p.axis[1].size, p.axis[2].size - p.first_query}, p.heads, channels};
}
Shape key_shape(const nearfield_attention &p, int64_t channels) {
    return {p.batch, {p.axis[0].size, p.axis[1].size, p.axis[2].size}, p.kv_heads, channels};
}
Shape additional_shape(const nearfield_attention &p, int64_t channels) {
    return {p.batch, {1, 1, p.num_additional}, p.kv_heads, channels};
}
int64_t bias_size(const nearfield_attention &p) {
    return (2 * p.axis[0].kernel_size - 1) * (2 * p.axis[1].kernel_size - 1) * (2 * p.axis[2].kernel_size - 1);
}

Interval interval(const nearfield_axis &axis, int64_t border, int64_t position, int64_t group) {
    int64_t last = (axis.size - group + axis.dilation - 1) / axis.dilation - 1;
    int64_t first_of_run = position / axis.stride * axis.stride;
    if (axis.is_causal) {
        int64_t leader = std::min(first_of_run + axis.stride - 1, last);
        int64_t start = leader - axis.kernel_size + 1;
        return {border == NEARFIELD_SHIFT ? std::max<int64_t>(start, 0) : start, position + 1};
    }
    int64_t leader = std::min(first_of_run + axis.stride / 2, last);
    int64_t start = leader - axis.kernel_size / 2;
    if (border == NEARFIELD_SHIFT) start = std::max<int64_t>(std::min(start, last + 1 - axis.kernel_size), 0);
    return {start, start + axis.kernel_size};
}

Forward attention(const nearfield_attention &p) {
    Problem problem{p};
    Forward result;
    result.out.values.resize(query_shape(p, p.value_dim).count());
    result.lse.values.resize(query_shape(p, 1).count());
    problem.each_query([&](int64_t row, int64_t, std::vector<Term> terms) {
        if ((result.lse.values[row] = softmax(terms)) == -INFINITE) return;
        for (const Term &t : terms)
            if (const double *v = problem.value_of(t))
                for (int64_t c = 0; c < p.value_dim; ++c) add(result.out, row * p.value_dim + c, t.logit * v[c]);
    });
    return result;
}

Backward attention_backward(const nearfield_attention &p) {
    Problem problem{p};
    const Doubles out = attention(p).out.values;
    const Doubles grad_out = load(p.grad_out, p.dtype, query_shape(p, p.value_dim));
    Doubles grad_lse(query_shape(p, 1).count());
    if (p.grad_lse.data) grad_lse = load(p.grad_lse, NEARFIELD_F32, query_shape(p, 1));
    Backward grad;
    grad.query.values.resize(problem.query.size());
    grad.key.values.resize(problem.key.size());
    grad.value.values.resize(problem.value.size());
    grad.additional_key.values.resize(problem.more_key.size());
    grad.additional_value.values.resize(problem.more_value.size());
    if (p.bias) grad.bias.values.resize(p.heads * bias_size(p));

    problem.each_query([&](int64_t row, int64_t head, std::vector<Term> terms) {
        if (softmax(terms) == -INFINITE) return;
        const double *q = problem.query.data() + row * p.head_dim, *g = grad_out.data() + row * p.value_dim;
        double common = -grad_lse[row];
        Size of_common;
        of_common.add(common);
        for (int64_t c = 0; c < p.value_dim; ++c) {
            common += g[c] * out[row * p.value_dim + c];
            of_common.add(g[c] * out[row * p.value_dim + c]);
        }
        for (const Term &t : terms) {
            double weight = t.logit, slope = -common;
            Size of_slope = of_common;
            if (const double *v = problem.value_of(t)) {
                Result &grad_v = t.key >= 0 ? grad.value : grad.additional_value;
                for (int64_t c = 0, at = t.row() * p.value_dim; c < p.value_dim; ++c) {
                    slope += g[c] * v[c];
                    of_slope.add(g[c] * v[c]);
                    add(grad_v, at + c, weight * g[c]);
                }
            }
            // d loss / d logit, and what it would be if the terms of its slope did not cancel.
            double by_logit = weight * slope, size = weight * std::sqrt(of_slope.squares);
            if (t.bias >= 0) add(grad.bias, head * bias_size(p) + t.bias, by_logit, size);
            if (const double *k = problem.key_of(t)) {
                Result &grad_k = t.key >= 0 ? grad.key : grad.additional_key;
                for (int64_t c = 0, at = t.row() * p.head_dim; c < p.head_dim; ++c) {
                    add(grad.query, row * p.head_dim + c, by_logit * p.scale * k[c], size * p.scale * k[c]);
                    add(grad_k, at + c, by_logit * p.scale * q[c], size * p.scale * q[c]);
                }
            }
        }
    });
    return grad;
}

bool names(const nearfield_decode &p, int64_t batch, int64_t query, int64_t kv_head, int64_t block) {
    const int64_t *list =
        p.blocks + batch * p.block_stride[0] + query * p.block_stride[1] + kv_head * p.block_stride[2];
    return std::find(list, list + p.list_length, block) != list + p.list_length;
}

Forward decode(const nearfield_decode &p) {
    Shape queries{p.batch, {1, 1, p.num_queries}, p.heads, p.head_dim};
    Shape keys{p.batch, {1, 1, p.num_keys}, p.kv_heads, p.head_dim};
    Shape values{p.batch, {1, 1, p.num_keys}, p.kv_heads, p.value_dim};
    Doubles query = load(p.query, p.dtype, queries), key = load(p.key, p.dtype, keys);
    Doubles value = load(p.value, p.dtype, values);
    Forward result;
    result.out.values.resize(p.batch * p.num_queries * p.heads * p.value_dim);
    result.lse.values.resize(p.batch * p.num_queries * p.heads);
    int64_t row = 0;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t n = 0; n < p.num_queries; ++n)
            for (int64_t h = 0; h < p.heads; ++h, ++row) {
                std::vector<Term> terms;
                for (int64_t j = 0; j < p.num_keys; ++j) {
                    if (p.visible && !p.visible[b * p.visible_stride[0] + n * p.visible_stride[1] + j]) continue;
                    if (p.is_causal && j > p.num_keys - p.num_queries + n) continue;
                    if (p.block_size && !names(p, b, n, h / (p.heads / p.kv_heads), j / p.block_size)) continue;
                    Term term;
                    term.key = (b * p.num_keys + j) * p.kv_heads + h / (p.heads / p.kv_heads);
                    for (int64_t c = 0; c < p.head_dim; ++c)
                        term.logit += query[row * p.head_dim + c] * key[term.key * p.head_dim + c];
                    term.logit *= p.scale;
                    if (p.addend) {
                        const int64_t *stride = p.addend_stride;
                        term.logit += double(p.addend[b * stride[0] + h * stride[1] + n * stride[2] + j]);
                    }
                    terms.push_back(term);
                }
                if ((result.lse.values[row] = softmax(terms)) == -INFINITE) continue;
                for (const Term &t : terms)
                    for (int64_t c = 0; c < p.value_dim; ++c)
                        add(result.out, row * p.value_dim + c, t.logit * value[t.key * p.value_dim + c]);
            }
    return result;
}

}  // namespace nearfield::check
