#include "cases.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if !defined(__has_feature)
#define __has_feature(name) 0
#endif

namespace nearfield::check {
namespace {

// An address sanitizer watches the ends of buffers better than words that are compared afterwards.
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
constexpr int64_t GUARD = 0;
#else
constexpr int64_t GUARD = 64;
#endif

// A thread sanitizer has no shadow for so many addresses.
#if defined(__linux__) && !defined(__SANITIZE_THREAD__) && !__has_feature(thread_sanitizer)
constexpr bool CAN_BE_FAR = true;
#else
constexpr bool CAN_BE_FAR = false;
#endif

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr int64_t FAR = (int64_t(1) << 32) + 12345;  // elements that the largest stride of a far tensor reaches

// nearfield/core/tolerance.py, by dtype
constexpr double OUTPUT[] = {2e-6, 1e-2, 1.5e-3}, GRADIENT[] = {5e-6, 2e-2, 3e-3};

// Memory for a tensor in a random layout: dimensions in any order, with gaps, backwards, shared, or far apart.
nearfield_tensor place(Draw &draw, Case &c, const Shape &shape, int64_t element, bool shared, bool far) {
    const int64_t size[5] = {shape.batch, shape.tokens[0], shape.tokens[1], shape.tokens[2], shape.heads};
    int64_t order[5] = {0, 1, 2, 3, 4}, far_dim = -1;  // outermost first
    if (draw.chance(0.3)) std::rotate(order + 1, order + 4, order + 5);  // heads first
    if (draw.chance(0.2))
        for (int64_t i = 4; i > 0; --i) std::swap(order[i], order[draw.between(0, i)]);
    for (int64_t d = 0, choices = 0; far && d < 5; ++d)
        if (size[d] > 1 && draw.between(0, choices++) == 0) far_dim = d;
    far = far_dim >= 0;
    bool gaps = draw.chance(0.4);
    int64_t extent = shape.channels, base = 0;
    nearfield_tensor tensor{};
    for (int64_t i = 4; i >= 0; --i) {
        int64_t d = order[i], stride = extent + (gaps ? draw.between(0, 9) : 0);
        if (size[d] <= 1) {
            tensor.stride[d] = draw.pick({int64_t(0), stride, int64_t(-1), int64_t(1) << 50});
            continue;
        }
        if (d == far_dim) stride = std::max(stride, FAR / (size[d] - 1) + 1);
        if (shared && d != far_dim && draw.chance(0.03)) stride = 0;  // expanded
        extent += stride * (size[d] - 1);
        tensor.stride[d] = stride;
        if (draw.chance(0.1)) base += stride * (size[d] - 1), tensor.stride[d] = -stride;
    }
    if (shape.count() == 0) return tensor;  // torch gives no address to empty tensors either
    int64_t skip = draw.between(0, 7);      // element, not vector, alignment
    c.memory.push_back(std::make_unique<Memory>((skip + extent) * element + 2 * GUARD, far));
    tensor.data = c.memory.back()->data + GUARD + (skip + base) * element;
    return tensor;
}

nearfield_tensor table(void *data, int64_t row) { return {data, {row, row, row, row, row}}; }

Doubles normals(Draw &draw, const Shape &shape, double size) {
    Doubles values(shape.count());
    for (double &x : values) x = size * draw.normal();
    return values;
}

void sprinkle(Draw &draw, Doubles &values, std::initializer_list<double> from) {
    for (int64_t n = values.empty() ? 0 : draw.between(0, 2); n > 0; --n)
        values[draw.between(0, int64_t(values.size()) - 1)] = draw.pick(from);
}

// The pairs of an axis whose every window key is listed, outside ones too if each has a bias.
double pairs(const nearfield_axis &axis, int64_t border, bool bias) {
    double total = 0;
    for (int64_t i = 0; i < axis.size; ++i) {
        int64_t group = i % axis.dilation, length = (axis.size - group + axis.dilation - 1) / axis.dilation;
        auto [start, end] = interval(axis, border, i / axis.dilation, group);
        bool all = border == NEARFIELD_PAD && bias;
        total += double((all ? end : std::min(end, length)) - (all ? start : std::max<int64_t>(start, 0)));
    }
    return total;
}

nearfield_axis draw_axis(Draw &draw, int64_t size, int64_t border, bool may_be_endless) {
    nearfield_axis axis{size, 1, 1, 1, draw.chance(0.35)};
    bool must_fit = border == NEARFIELD_SHIFT && !axis.is_causal;
    axis.kernel_size = draw.pick({int64_t(1), size, draw.between(1, std::min<int64_t>(size, 9)), draw.between(1, size),
                                  draw.between(1, std::min<int64_t>(size, 40)), must_fit ? size : 2 * size + 1});
    axis.dilation = must_fit ? size / axis.kernel_size : draw.between(1, size + 1);
    if (draw.chance(0.6)) axis.dilation = draw.between(1, std::max<int64_t>(1, axis.dilation / 2));
    if (draw.chance(0.5)) axis.dilation = 1;
    if (may_be_endless && !must_fit && draw.chance(0.04)) axis.kernel_size = int64_t(1) << draw.between(31, 40);
    if (may_be_endless && !must_fit && draw.chance(0.02)) axis.dilation = int64_t(1) << draw.between(31, 40);
    axis.stride = draw.pick({int64_t(1), int64_t(1), axis.kernel_size, draw.between(1, axis.kernel_size)});
    return axis;
}

int64_t draw_dim(Draw &draw) {
    if (draw.chance(0.15)) return draw.between(1, 256);
    return draw.pick<int64_t>({1, 2, 4, 6, 8, 10, 16, 32, 48, 60, 64, 64, 80, 96, 128, 256});
}

// A problem by its numbers alone.
nearfield_attention draw_numbers(Draw &draw, bool large, bool bias) {
    nearfield_attention p{};
    p.dtype = draw.between(0, 2);
    p.border = draw.between(0, 2);
    p.batch = draw.chance(0.01) ? 0 : draw.pick<int64_t>({1, 1, 2, 3});
    p.kv_heads = draw.pick<int64_t>({1, 1, 2, 3, 4});
    p.heads = p.kv_heads * draw.between(1, 12 / p.kv_heads);
    if (draw.chance(0.4)) p.heads = p.kv_heads;
    p.head_dim = draw_dim(draw);
    p.value_dim = draw.chance(0.6) ? p.head_dim : draw_dim(draw);
    int64_t rank = draw.pick<int64_t>({1, 1, 2, 2, 3});
    for (int64_t d = 0; d < 3; ++d) {
        int64_t most = rank == 1 ? (large ? 2000 : 90) : rank == 2 ? (large ? 40 : 14) : (large ? 14 : 7);
        int64_t size = draw.between(large ? most / 3 : 1, most);
        if (draw.chance(0.2)) size = large ? most : draw.pick<int64_t>({1, 2, 3, 5, 7});
        p.axis[d] = d < 3 - rank ? nearfield_axis{1, 1, 1, 1, 0} : draw_axis(draw, size, p.border, !bias);
    }
    const nearfield_axis &x = p.axis[2];
    if (rank == 1 && draw.chance(0.35)) p.num_sinks = draw.pick({int64_t(1), int64_t(4), draw.between(1, x.size + 3)});
    if (rank == 1 && draw.chance(0.02)) p.num_sinks = int64_t(1) << 40;
    if (rank == 1 && draw.chance(x.is_causal ? 0.4 : 0.2))
        p.first_query = draw.chance(0.7) ? std::max<int64_t>(0, x.size - draw.between(0, 5)) : draw.between(0, x.size);
    if (rank == 1 && !bias && draw.chance(0.15)) {  // any number of queries that see all keys
        p.border = NEARFIELD_SHIFT;
        p.axis[2] = {x.size, x.size, draw.chance(0.8) ? 1 : draw.between(1, x.size), 1, 0};
        p.first_query = draw.chance(0.3) ? draw.between(0, x.size) : -draw.pick({int64_t(1), draw.between(1, 20), 3 * x.size});
    }
    if (draw.chance(0.25)) p.num_additional = draw.between(1, 9);
    p.scale = std::pow(double(p.head_dim), -0.5) * draw.pick({1.0, 1.0, 0.5, 1.5, -1.0});
    return p;
}

double work(const nearfield_attention &p, bool bias) {
    double count = 1;
    for (const nearfield_axis &axis : p.axis) count *= pairs(axis, p.border, bias);
    double tokens = double(key_shape(p, 1).count() / std::max<int64_t>(1, p.batch * p.kv_heads));
    if (p.first_query < 0) {  // more queries than keys, which see them all
        double queries = double(p.axis[2].size - p.first_query);
        count = queries * tokens, tokens = queries;
    }
    count += tokens * double(p.num_additional + std::min(p.num_sinks, p.axis[2].size));
    return double(p.batch * p.heads) * (count + tokens) * double(p.head_dim + p.value_dim);
}

const char *const DTYPES[] = {"f32", "bf16", "f16"}, *const BORDERS[] = {"shift", "truncate", "pad"};

std::string describe(const nearfield_attention &p, const char *extra) {
    char line[600];
    std::string axes;
    for (const nearfield_axis &a : p.axis) {
        std::snprintf(line, sizeof line, "%s%lld:%lld/%lld/%lld%s", axes.empty() ? "" : " x ", (long long)a.size,
                      (long long)a.kernel_size, (long long)a.stride, (long long)a.dilation, a.is_causal ? "c" : "");
        axes += line;
    }
    std::snprintf(line, sizeof line,
                  "%s %s batch %lld heads %lld/%lld dims %lld,%lld axes size:kernel/stride/dilation %s first %lld "
                  "sinks %lld additional %lld scale %g%s%s%s%s%s",
                  DTYPES[p.dtype], BORDERS[p.border], (long long)p.batch, (long long)p.heads, (long long)p.kv_heads,
                  (long long)p.head_dim, (long long)p.value_dim, axes.c_str(), (long long)p.first_query,
                  (long long)p.num_sinks, (long long)p.num_additional, p.scale, p.bias ? " bias" : "",
                  p.key_mask ? " mask" : "", p.sink_logits ? " sink-logits" : "", p.grad_lse.data ? " grad-lse" : "",
                  extra);
    return line;
}

// A result to be: its memory, to be compared with what the definition says.
nearfield_tensor output(Draw &draw, Case &c, const char *name, int64_t dtype, const Shape &shape, bool far,
                        bool backward, double tolerance) {
    nearfield_tensor tensor = place(draw, c, shape, element_size(dtype), false, far);
    Memory *memory = tensor.data ? c.memory.back().get() : nullptr;
    bool leaks = c.special && (backward || (c.special_values && std::string(name).ends_with("out")));
    c.outputs.push_back({name, tensor, dtype, shape, memory, tolerance, 0, {}, backward, leaks});
    return tensor;
}

nearfield_tensor input(Draw &draw, Case &c, int64_t dtype, const Shape &shape, bool far, const Doubles &values) {
    // The NaN of a masked key must not be shared with one that is seen.
    bool shared = std::none_of(values.begin(), values.end(), [](double x) { return std::isnan(x); });
    nearfield_tensor tensor = place(draw, c, shape, element_size(dtype), shared, far);
    store(tensor, dtype, shape, values);
    return tensor;
}

template <typename T>
T *array(Case &c, int64_t count) {
    c.memory.push_back(std::make_unique<Memory>(count * int64_t(sizeof(T)) + 2 * GUARD, false));
    return reinterpret_cast<T *>(c.memory.back()->data + GUARD);
}

void expect(Case &c, size_t number, Result &&result) {
    Output &out = c.outputs[number];
    // Half the size of the terms: a result that cancels below it is all rounding noise, such as the gradient of
    // the only key that a query sees.
    out.floor = 0.5 * result.size.rms(result.values.size());
    out.expected = std::move(result.values);
}

// Inputs that never change are kept to see that they did not.
void keep_inputs(Case &c) {
    for (auto &memory : c.memory) {
        bool written = std::any_of(c.outputs.begin(), c.outputs.end(),
                                   [&](const Output &out) { return out.memory == memory.get(); });
        if (!written && !memory->far) memory->original.assign(memory->data, memory->data + memory->bytes);
    }
}

// `bias` and `grad_bias` are of the whole job.
Case make_attention(Draw &draw, bool bias, bool grad_bias, bool far) {
    Case c;
    nearfield_attention &p = c.attention;
    bool large = !far && draw.chance(0.06);
    bias = bias || draw.chance(0.3);
    do p = draw_numbers(draw, large, bias);
    while (work(p, bias) > (large ? 2e7 : far ? 2e5 : 2e6) || (bias && bias_size(p) * p.heads > 40000));

    const Shape queries = query_shape(p, p.head_dim), keys = key_shape(p, p.head_dim);
    const Shape values = key_shape(p, p.value_dim), results = query_shape(p, p.value_dim);
    const Shape more_keys = additional_shape(p, p.head_dim), more_values = additional_shape(p, p.value_dim);
    c.special = draw.chance(0.08);
    // Tiny inputs are subnormal: floats as good as zero, halves that still carry most of their digits.
    double tiny = p.dtype == NEARFIELD_F16 ? 5e-5 : 1e-39;
    // bfloat16 products read subnormals as 0, which infinity makes NaN: there even the smallest are normal.
    double smallest = p.dtype == NEARFIELD_BF16 ? 1e-30 : tiny;
    double sizes[3];
    for (double &size : sizes) size = !draw.chance(0.02) ? 1 : c.special ? smallest : tiny;
    Doubles q = normals(draw, queries, sizes[0]), k = normals(draw, keys, sizes[1]);
    Doubles v = normals(draw, values, sizes[2]);
    Doubles grad_out = normals(draw, results, 1);
    if (c.special) {
        // Zero keys outside have no product with the query here, but may well have one in a kernel.
        if (p.border != NEARFIELD_PAD) sprinkle(draw, q, {INFINITE, -INFINITE, NOT_A_NUMBER, smallest, -0.0});
        sprinkle(draw, k, {INFINITE, -INFINITE, NOT_A_NUMBER, smallest, -0.0});
        c.special_values = draw.chance(0.5);
        if (c.special_values) sprinkle(draw, v, {INFINITE, -INFINITE, NOT_A_NUMBER, tiny, -0.0});
        sprinkle(draw, grad_out, {INFINITE, NOT_A_NUMBER, tiny});
    }
    if (draw.chance(0.35)) {
        int64_t tokens = p.batch * keys.tokens[0] * keys.tokens[1] * keys.tokens[2];
        auto *mask = array<uint8_t>(c, tokens);
        double share = draw.pick({0.0, 0.05, 0.5, 0.9, 0.9, 1.0});
        for (int64_t t = 0; t < tokens; ++t) {
            mask[t] = draw.chance(share) ? uint8_t(draw.pick({1, 1, 255})) : 0;
            if (mask[t]) continue;
            std::fill_n(k.begin() + t * p.kv_heads * p.head_dim, p.kv_heads * p.head_dim, NOT_A_NUMBER);
            std::fill_n(v.begin() + t * p.kv_heads * p.value_dim, p.kv_heads * p.value_dim, NOT_A_NUMBER);
        }
        p.key_mask = mask;
    }
    bool fused = !far && p.batch > 0 && p.first_query >= 0 && p.first_query < p.axis[2].size && draw.chance(0.15);
    if (fused) {  // slices of the output of one linear layer
        int64_t width = p.heads * p.head_dim, row = width + p.kv_heads * (p.head_dim + p.value_dim);
        int64_t y = p.axis[2].size * row, z = p.axis[1].size * y, batch = p.axis[0].size * z;
        c.memory.push_back(std::make_unique<Memory>(p.batch * batch * element_size(p.dtype), false));
        auto slice = [&](int64_t at, int64_t head) {
            uint8_t *data = c.memory.back()->data + at * element_size(p.dtype);
            return nearfield_tensor{data, {batch, z, y, row, head}};
        };
        p.query = slice(p.first_query * row, p.head_dim);
        p.key = slice(width, p.head_dim);
        p.value = slice(width + p.kv_heads * p.head_dim, p.value_dim);
        store(p.query, p.dtype, queries, q);
        store(p.key, p.dtype, keys, k);
        store(p.value, p.dtype, values, v);
    } else {
        p.query = input(draw, c, p.dtype, queries, far, q);
        p.key = input(draw, c, p.dtype, keys, far, k);
        p.value = input(draw, c, p.dtype, values, far, v);
    }
    p.additional_key = input(draw, c, p.dtype, more_keys, far, normals(draw, more_keys, 1));
    p.additional_value = input(draw, c, p.dtype, more_values, far, normals(draw, more_values, 1));
    if (bias) {
        auto *entries = array<float>(c, p.heads * bias_size(p));
        for (int64_t i = 0; i < p.heads * bias_size(p); ++i) entries[i] = float(draw.normal());
        p.bias = entries;
    }
    if (draw.chance(0.25)) {
        auto *logits = array<float>(c, p.heads);
        for (int64_t h = 0; h < p.heads; ++h) logits[h] = float(draw.normal());
        p.sink_logits = logits;
    }
    p.grad_out = input(draw, c, p.dtype, results, far, grad_out);
    if (draw.chance(0.6))
        p.grad_lse = input(draw, c, NEARFIELD_F32, query_shape(p, 1), far, normals(draw, query_shape(p, 1), 1));

    double loose = GRADIENT[p.dtype];
    p.out = output(draw, c, "out", p.dtype, results, far, false, OUTPUT[p.dtype]);
    p.lse = output(draw, c, "lse", NEARFIELD_F32, query_shape(p, 1), far, false, OUTPUT[p.dtype]);
    p.grad_query = output(draw, c, "grad_query", p.dtype, queries, far, true, loose);
    p.grad_key = output(draw, c, "grad_key", p.dtype, keys, far, true, loose);
    p.grad_value = output(draw, c, "grad_value", p.dtype, values, far, true, loose);
    p.grad_additional_key = output(draw, c, "grad_additional_key", p.dtype, more_keys, far, true, loose);
    p.grad_additional_value = output(draw, c, "grad_additional_value", p.dtype, more_values, far, true, loose);
    if (grad_bias && bias) {
        p.grad_bias = array<float>(c, p.heads * bias_size(p));
        Shape shape{p.heads, {1, 1, 1}, 1, bias_size(p)};
        c.outputs.push_back({"grad_bias", table(p.grad_bias, bias_size(p)), NEARFIELD_F32, shape,
                             c.memory.back().get(), loose, 0, {}, true, c.special});
    }
    keep_inputs(c);
    Forward forward = attention(p);
    Backward grad = attention_backward(p);
    expect(c, 0, std::move(forward.out));
    expect(c, 1, std::move(forward.lse));
    c.outputs[1].floor = 1;  // a logarithm: its absolute error is what counts
    Result *grads[] = {&grad.query, &grad.key, &grad.value, &grad.additional_key, &grad.additional_value, &grad.bias};
    for (size_t i = 2; i < c.outputs.size(); ++i) expect(c, i, std::move(*grads[i - 2]));
    c.text = describe(p, c.special ? " special" : far ? " far" : fused ? " fused" : "");
    return c;
}

// Lists of blocks in any order, with some of them twice and some that are none; keys that no list names are NaN.
void list_blocks(Draw &draw, Case &c, Doubles &k, Doubles &v) {
    nearfield_decode &p = c.decode;
    p.block_size = draw.pick({int64_t(1), int64_t(16), int64_t(64), draw.between(1, 100), p.num_keys + 3});
    int64_t blocks = (p.num_keys + p.block_size - 1) / p.block_size;
    p.list_length = draw.pick({draw.between(0, 4), draw.between(0, blocks + 2), blocks});
    int64_t size[3] = {p.batch, p.num_queries, p.kv_heads}, extent = p.list_length + draw.between(0, 2);
    for (int64_t d = 2; d >= 0; --d) {
        p.block_stride[d] = draw.chance(d == 1 ? 0.5 : 0.1) ? 0 : std::max<int64_t>(extent, 1);
        if (p.block_stride[d]) extent *= size[d];
    }
    auto *list = array<int64_t>(c, std::max<int64_t>(extent, 1));
    for (int64_t i = 0; i < extent; ++i)
        list[i] = blocks && draw.chance(0.9) ? draw.between(0, blocks - 1) : draw.pick<int64_t>({-1, -1, INT64_MIN});
    p.blocks = list;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.kv_heads; ++h)
            for (int64_t j = 0; j < p.num_keys; ++j) {
                bool named = false;
                for (int64_t n = 0; n < p.num_queries; ++n) named |= names(p, b, n, h, j / p.block_size);
                if (named) continue;
                int64_t row = (b * p.num_keys + j) * p.kv_heads + h;
                std::fill_n(k.begin() + row * p.head_dim, p.head_dim, NOT_A_NUMBER);
                std::fill_n(v.begin() + row * p.value_dim, p.value_dim, NOT_A_NUMBER);
            }
}

Case make_decode(Draw &draw, bool far) {
    Case c;
    c.is_decode = true;
    nearfield_decode &p = c.decode;
    p.dtype = draw.between(0, 2);
    p.batch = draw.chance(0.02) ? 0 : draw.between(1, 3);
    p.num_queries = draw.pick({int64_t(1), int64_t(1), draw.between(0, 9)});
    p.num_keys = draw.pick({draw.between(0, 9), draw.between(1, 70), draw.between(1, 600)});
    p.kv_heads = draw.pick<int64_t>({1, 2, 3, 4});
    p.heads = p.kv_heads * draw.between(1, 12 / p.kv_heads);
    p.head_dim = draw_dim(draw);
    p.value_dim = draw.chance(0.6) ? p.head_dim : draw_dim(draw);
    p.scale = std::pow(double(p.head_dim), -0.5) * draw.pick({1.0, 1.0, 0.5, -1.0});
    const Shape queries{p.batch, {1, 1, p.num_queries}, p.heads, p.head_dim};
    const Shape keys{p.batch, {1, 1, p.num_keys}, p.kv_heads, p.head_dim};
    const Shape values{p.batch, {1, 1, p.num_keys}, p.kv_heads, p.value_dim};
    Doubles q = normals(draw, queries, 1), k = normals(draw, keys, 1), v = normals(draw, values, 1);
    if ((c.special = c.special_values = draw.chance(0.1))) {
        sprinkle(draw, q, {INFINITE, NOT_A_NUMBER, -0.0});
        sprinkle(draw, k, {INFINITE, -INFINITE, NOT_A_NUMBER});
        sprinkle(draw, v, {INFINITE, -INFINITE, NOT_A_NUMBER});
    }
    if (draw.chance(0.7)) {
        bool shared = draw.chance(0.5);
        p.visible_stride[1] = p.num_keys + draw.between(0, 3);
        p.visible_stride[0] = shared ? 0 : p.num_queries * p.visible_stride[1] + draw.between(0, 3);
        int64_t rows = shared ? 1 : p.batch, row = p.kv_heads;
        auto *visible = array<uint8_t>(c, std::max(rows, p.batch) * (p.num_queries * p.visible_stride[1] + 3));
        double share = draw.pick({0.05, 0.5, 0.9, 1.0});
        for (int64_t b = 0; b < rows; ++b)
            for (int64_t j = 0; j < p.num_keys; ++j) {
                bool seen = false;
                for (int64_t n = 0; n < p.num_queries; ++n)
                    seen |= visible[b * p.visible_stride[0] + n * p.visible_stride[1] + j] = draw.chance(share);
                if (seen || shared) continue;  // a slot of a cache that nothing was written to yet
                std::fill_n(k.begin() + (b * p.num_keys + j) * row * p.head_dim, row * p.head_dim, NOT_A_NUMBER);
                std::fill_n(v.begin() + (b * p.num_keys + j) * row * p.value_dim, row * p.value_dim, NOT_A_NUMBER);
            }
        p.visible = visible;
    }
    if (p.num_queries <= p.num_keys) p.is_causal = draw.chance(0.4);
    if (draw.chance(0.5)) list_blocks(draw, c, k, v);
    if (draw.chance(0.4)) {
        int64_t row = p.num_keys + draw.between(0, 3), size[3] = {p.batch, p.heads, p.num_queries}, extent = row;
        for (int64_t d = 2; d >= 0; --d) {
            p.addend_stride[d] = draw.chance(0.2) ? 0 : extent;
            if (p.addend_stride[d]) extent *= size[d];
        }
        auto *addend = array<float>(c, extent);
        for (int64_t i = 0; i < extent; ++i) addend[i] = draw.chance(0.02) ? float(-INFINITE) : float(draw.normal());
        p.addend = addend;
    }
    p.query = input(draw, c, p.dtype, queries, far, q);
    p.key = input(draw, c, p.dtype, keys, far, k);
    p.value = input(draw, c, p.dtype, values, far, v);
    Shape results = queries, rows = queries;
    results.channels = p.value_dim, rows.channels = 1;
    p.out = output(draw, c, "decode out", p.dtype, results, far, false, OUTPUT[p.dtype]);
    if (draw.chance(0.7)) p.lse = output(draw, c, "decode lse", NEARFIELD_F32, rows, far, false, OUTPUT[p.dtype]);
    keep_inputs(c);
    Forward forward = decode(p);
    expect(c, 0, std::move(forward.out));
    if (c.outputs.size() > 1) expect(c, 1, std::move(forward.lse)), c.outputs[1].floor = 1;
    char line[300];
    std::snprintf(line, sizeof line,
                  "decode %s batch %lld queries %lld keys %lld heads %lld/%lld dims %lld,%lld%s%s%s%s%s%s", DTYPES[p.dtype],
                  (long long)p.batch, (long long)p.num_queries, (long long)p.num_keys,
                  (long long)p.heads, (long long)p.kv_heads, (long long)p.head_dim, (long long)p.value_dim,
                  p.visible ? " visible" : "", p.is_causal ? " causal" : "", p.block_size ? " lists" : "", p.addend ? " addend" : "", c.special ? " special" : "",
                  far ? " far" : "");
    c.text = line;
    return c;
}

}  // namespace

    Memory::Memory(int64_t count, bool is_far) : bytes(count), far(is_far) {
#if defined(__linux__)
        if (far) {  // only the pages that are touched will exist
            void *map = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (map == MAP_FAILED) std::perror("No address space for far strides"), std::exit(2);
            data = static_cast<uint8_t *>(map);
            return;
        }
#endif
        data = static_cast<uint8_t *>(std::malloc(size_t(bytes)));
        std::memset(data, POISON, size_t(bytes));
    }

    Memory::~Memory() {
#if defined(__linux__)
        if (far) munmap(data, size_t(bytes));
#endif
        if (!far) std::free(data);
    }

std::vector<Case> make_job(Draw &draw) {
    std::vector<Case> job;
    bool far = draw.chance(0.01) && CAN_BE_FAR;
    if (draw.chance(0.15)) {
        job.push_back(make_decode(draw, far));
        return job;
    }
    int64_t count = draw.chance(0.15) ? draw.between(2, 5) : 1;
    bool grad_bias = draw.chance(0.5), bias = grad_bias && count > 1;  // wanted from all of them or none
    for (int64_t i = 0; i < count; ++i) job.push_back(make_attention(draw, bias, grad_bias, far && i == 0));
    return job;
}

}  // namespace nearfield::check
