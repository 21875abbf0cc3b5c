#include "validate.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>

namespace nearfield {
namespace {

// Sizes stay below this, so that sums of a few of them stay inside 64 bits. It is the LARGEST of geometry.py.
constexpr int64_t LARGEST = int64_t(1) << 40;
// Kernels count the tokens of an axis, and the biases of the heads that share a key, in 32 bits.
constexpr int64_t LONGEST = std::numeric_limits<int32_t>::max();
constexpr int64_t LARGEST_DIM = 1024;  // channels of a head: kernels keep whole rows in scratch
constexpr int64_t LARGEST_STATE = 256;  // of a channel in a scan, for the same reason
constexpr int64_t TOP = std::numeric_limits<int64_t>::max();

// a * b for a, b >= 0, or false if it does not fit.
bool multiply(int64_t a, int64_t b, int64_t *product) {
    if (a != 0 && b > TOP / a) return false;
    *product = a * b;
    return true;
}

bool product_fits(std::initializer_list<int64_t> factors, int64_t most = TOP) {
    int64_t product = 1;
    for (int64_t factor : factors)
        if (!multiply(product, factor, &product)) return false;
    return product <= most;
}

bool between(int64_t low, int64_t x, int64_t high) { return low <= x && x <= high; }

bool aligned(const void *data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes) == 0; }

// Whether the bytes from `low` to `high` beyond `data` are an interval of the address space.
bool addressable(const void *data, int64_t low, int64_t high) {
    auto address = reinterpret_cast<uintptr_t>(data);
    return uint64_t(-low) <= address && uint64_t(high) <= UINTPTR_MAX - address;
}

enum Use { OPTIONAL, READ, WRITTEN };

// One operand: `strides` of its outer dimensions, the last of them followed by `inner` contiguous elements.
bool operand(const void *data, int64_t element, std::initializer_list<int64_t> sizes, const int64_t *strides,
             int64_t inner, Use use) {
    bool empty = inner == 0;
    for (int64_t size : sizes) empty = empty || size == 0;
    if (empty || (use == OPTIONAL && !data)) return true;
    if (!data || !aligned(data, element)) return false;
    int64_t low = 0, high = inner - 1;  // the extreme elements
    for (int64_t size : sizes) {
        int64_t stride = *strides++, reach;
        if (size == 1) continue;
        if (stride < -TOP) return false;
        int64_t length = stride < 0 ? -stride : stride;
        // Rows that overlap themselves would be written by two tasks.
        if (use == WRITTEN && length < inner) return false;
        if (!multiply(size - 1, length, &reach)) return false;
        if (stride < 0 ? low < -TOP + reach : high > TOP - reach) return false;
        (stride < 0 ? low : high) += stride < 0 ? -reach : reach;
    }
    // One element more, for the byte behind the last.
    if (high == TOP || !multiply(high + 1, element, &high) || !multiply(-low, element, &low)) return false;
    return addressable(data, -low, high);
}

bool tensor(const nearfield_tensor &t, int64_t element, const int64_t (&grid)[5], int64_t channels, Use use) {
    return operand(t.data, element, {grid[0], grid[1], grid[2], grid[3], grid[4]}, t.stride, channels, use);
}

// A contiguous array whose size may not even fit in 64 bits.
bool array(const void *data, int64_t element, std::initializer_list<int64_t> sizes) {
    if (!data) return true;
    int64_t count = element;
    for (int64_t size : sizes)
        if (!multiply(count, size, &count)) return false;
    return aligned(data, element) && addressable(data, 0, count);
}

bool heads_and_dims(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t value_dim, double scale) {
    // A scale beyond the range of float would become infinite inside the kernels.
    return between(1, heads, LARGEST) && between(1, kv_heads, heads) && heads % kv_heads == 0 &&
           between(1, head_dim, LARGEST_DIM) && between(1, value_dim, LARGEST_DIM) && std::fabs(scale) <= FLT_MAX;
}

bool axis_is_valid(const nearfield_axis &axis, int64_t border) {
    if (!between(1, axis.size, LONGEST) || !between(1, axis.kernel_size, LARGEST)) return false;
    if (!between(1, axis.stride, axis.kernel_size) || !between(1, axis.dilation, LARGEST)) return false;
    if (!between(0, axis.is_causal, 1)) return false;
    // As a division: the product of kernel_size and dilation may not fit.
    return border != NEARFIELD_SHIFT || axis.is_causal || axis.kernel_size <= axis.size / axis.dilation;
}

bool attention_is_valid(const nearfield_attention &p, bool backward) {
    if (!between(NEARFIELD_F32, p.dtype, NEARFIELD_F16) || !between(NEARFIELD_SHIFT, p.border, NEARFIELD_PAD))
        return false;
    if (!between(0, p.batch, LARGEST)) return false;
    if (!heads_and_dims(p.heads, p.kv_heads, p.head_dim, p.value_dim, p.scale)) return false;
    for (const nearfield_axis &axis : p.axis)
        if (!axis_is_valid(axis, p.border)) return false;

    const nearfield_axis &z = p.axis[0], &y = p.axis[1], &x = p.axis[2];
    bool one_dimension = z.size == 1 && y.size == 1 && z.kernel_size == 1 && y.kernel_size == 1;
    if (!between(0, p.num_sinks, LARGEST) || (p.num_sinks && !one_dimension)) return false;
    if (!between(0, p.num_additional, LARGEST)) return false;
    bool sees_all = p.border == NEARFIELD_SHIFT && x.kernel_size == x.size && !x.is_causal && !p.bias;
    if (!between(sees_all ? x.size - LONGEST : 0, p.first_query, x.size) || (p.first_query && !one_dimension)) return false;
    int64_t num_queries = x.size - p.first_query;
    if (!p.additional_key.data != !p.additional_value.data) return false;

    // Whatever kernels keep for a token, a head and a channel, eight bytes at a time, can be counted.
    int64_t dims = p.head_dim + p.value_dim;
    if (!product_fits({p.batch, z.size, y.size, std::max(x.size, num_queries), p.heads, dims, 8})) return false;
    if (!product_fits({p.batch, p.num_additional, p.heads, dims, 8})) return false;

    const int64_t element = p.dtype == NEARFIELD_F32 ? 4 : 2;
    const int64_t queries[] = {p.batch, z.size, y.size, num_queries, p.heads};
    const int64_t keys[] = {p.batch, z.size, y.size, x.size, p.kv_heads};
    const int64_t more[] = {p.batch, 1, 1, p.num_additional, p.kv_heads};
    const Use result = backward ? READ : WRITTEN;
    if (!tensor(p.query, element, queries, p.head_dim, READ) || !tensor(p.key, element, keys, p.head_dim, READ) ||
        !tensor(p.value, element, keys, p.value_dim, READ) ||
        !tensor(p.additional_key, element, more, p.head_dim, READ) ||
        !tensor(p.additional_value, element, more, p.value_dim, READ) ||
        !tensor(p.out, element, queries, p.value_dim, result) || !tensor(p.lse, 4, queries, 1, result))
        return false;
    const int64_t table[] = {2 * z.kernel_size - 1, 2 * y.kernel_size - 1, 2 * x.kernel_size - 1};
    if (p.bias && !product_fits({p.heads / p.kv_heads, table[0], table[1], table[2]}, LONGEST)) return false;
    if (!array(p.bias, 4, {p.heads, table[0], table[1], table[2]}) ||
        !array(p.key_mask, 1, {p.batch, z.size, y.size, x.size}) || !array(p.sink_logits, 4, {p.heads}))
        return false;
    if (!backward) return true;

    if (p.grad_bias && (!p.bias || !array(p.grad_bias, 4, {p.heads, table[0], table[1], table[2]}))) return false;
    return tensor(p.grad_out, element, queries, p.value_dim, READ) && tensor(p.grad_lse, 4, queries, 1, OPTIONAL) &&
           tensor(p.grad_query, element, queries, p.head_dim, WRITTEN) &&
           tensor(p.grad_key, element, keys, p.head_dim, WRITTEN) &&
           tensor(p.grad_value, element, keys, p.value_dim, WRITTEN) &&
           tensor(p.grad_additional_key, element, more, p.head_dim, WRITTEN) &&
           tensor(p.grad_additional_value, element, more, p.value_dim, WRITTEN);
}

bool decode_is_valid(const nearfield_decode &p) {
    if (!between(NEARFIELD_F32, p.dtype, NEARFIELD_F16) || !between(0, p.batch, LARGEST)) return false;
    if (!between(0, p.num_queries, LARGEST) || !between(0, p.num_keys, LARGEST)) return false;
    if (!heads_and_dims(p.heads, p.kv_heads, p.head_dim, p.value_dim, p.scale)) return false;
    int64_t dims = p.head_dim + p.value_dim;
    if (!product_fits({p.batch, p.num_queries, p.heads, dims, 8}) ||
        !product_fits({p.batch, p.num_keys, p.heads, dims, 8}) ||
        !product_fits({p.batch, p.num_queries, p.num_keys, p.heads, 8}))
        return false;
    if (!between(0, p.is_causal, 1) || (p.is_causal && p.num_queries > p.num_keys)) return false;
    if (!between(0, p.block_size, LARGEST)) return false;
    if (p.block_size) {
        if (!between(0, p.list_length, LARGEST)) return false;
        if (!product_fits({p.batch, std::max<int64_t>(p.num_queries, 1), p.kv_heads, p.list_length + 1, 8})) return false;
        if (!operand(p.blocks, 8, {p.batch, p.num_queries, p.kv_heads}, p.block_stride, p.list_length, READ)) return false;
    }
    const int64_t element = p.dtype == NEARFIELD_F32 ? 4 : 2;
    const int64_t queries[] = {p.batch, 1, 1, p.num_queries, p.heads};
    const int64_t keys[] = {p.batch, 1, 1, p.num_keys, p.kv_heads};
    return tensor(p.query, element, queries, p.head_dim, READ) && tensor(p.key, element, keys, p.head_dim, READ) &&
           tensor(p.value, element, keys, p.value_dim, READ) &&
           tensor(p.out, element, queries, p.value_dim, WRITTEN) &&
           (!p.lse.data || tensor(p.lse, 4, queries, 1, WRITTEN)) &&
           operand(p.visible, 1, {p.batch, p.num_queries}, p.visible_stride, p.num_keys, OPTIONAL) &&
           operand(p.addend, 4, {p.batch, p.heads, p.num_queries}, p.addend_stride, p.num_keys, OPTIONAL);
}

int64_t count_blocks(int64_t keys, int64_t size) { return keys / size + (keys % size != 0); }

bool shares_are_valid(const nearfield_shares &p) {
    if (!between(NEARFIELD_F32, p.dtype, NEARFIELD_F16) || !between(NEARFIELD_F32, p.key_dtype, NEARFIELD_F16)) return false;
    if (!between(0, p.batch, LARGEST) || !between(0, p.num_queries, LARGEST) || !between(0, p.num_keys, LARGEST))
        return false;
    if (!heads_and_dims(p.heads, p.kv_heads, p.head_dim, 1, p.scale)) return false;
    if (!between(1, p.block_size, LARGEST) || !between(0, p.is_bound, 1) || !between(0, p.is_causal, 1)) return false;
    if ((p.is_causal && p.num_queries > p.num_keys) || !(p.last_part > 0 && p.last_part <= 1)) return false;
    const int64_t width = p.head_dim << p.is_bound, blocks = count_blocks(p.num_keys, p.block_size);
    if (!product_fits({p.batch, p.num_queries, p.heads, width, 8}) || !product_fits({p.batch, p.num_keys, p.heads, width, 8}) ||
        !product_fits({p.batch, p.num_queries, p.heads, blocks + 64, 8}))
        return false;
    const int64_t queries[] = {p.batch, 1, 1, p.num_queries, p.heads};
    const int64_t keys[] = {p.batch, 1, 1, p.num_keys, p.kv_heads};
    const bool is_empty = !p.batch || !p.num_queries || !blocks;
    return tensor(p.query, p.dtype == NEARFIELD_F32 ? 4 : 2, queries, p.head_dim, READ) &&
           tensor(p.key, p.key_dtype == NEARFIELD_F32 ? 4 : 2, keys, width, READ) &&
           array(p.key_mask, 1, {p.batch, p.num_keys}) && (is_empty || p.shares) &&
           array(p.shares, 4, {p.batch, p.num_queries, p.kv_heads, blocks});
}

bool choice_is_valid(const nearfield_choice &p) {
    if (!between(0, p.batch, LARGEST) || !between(0, p.num_queries, LARGEST) || !between(p.num_queries, p.num_keys, LARGEST))
        return false;
    if (!between(1, p.kv_heads, LARGEST) || !between(1, p.block_size, LARGEST) || !between(0, p.list_length, LARGEST))
        return false;
    if (!between(0, p.num_blocks, LARGEST) || !between(0, p.sink_blocks, LARGEST) || !between(0, p.num_recent, LARGEST))
        return false;
    const int64_t blocks = count_blocks(p.num_keys, p.block_size);
    const bool is_empty = !p.batch || !p.num_queries;
    return array(p.scores, 4, {p.batch, p.num_queries, p.kv_heads, blocks}) && (is_empty || !blocks || p.scores) &&
           array(p.chosen, 8, {p.batch, p.num_queries, p.kv_heads, p.list_length}) &&
           (is_empty || !p.list_length || p.chosen);
}

bool scan_is_valid(const nearfield_scan &p, bool backward) {
    if (!between(NEARFIELD_F32, p.dtype, NEARFIELD_F16) || !between(0, p.softplus, 1) || !between(0, p.reverse, 1))
        return false;
    if (!between(0, p.batch, LARGEST) || !between(0, p.tokens, LARGEST) || !between(1, p.channels, LARGEST)) return false;
    if (!between(1, p.groups, p.channels) || p.channels % p.groups || !between(1, p.state, LARGEST_STATE)) return false;
    int64_t sequences = p.batch;
    if (p.cu_seqlens) {
        sequences = p.sequences;
        if (p.batch != 1 || !between(0, sequences, LARGEST) || !array(p.cu_seqlens, 8, {sequences + 1})) return false;
        if (p.cu_seqlens[0] != 0 || p.cu_seqlens[sequences] != p.tokens) return false;
        for (int64_t i = 0; i < sequences; i++)
            if (p.cu_seqlens[i] > p.cu_seqlens[i + 1]) return false;
    }
    // Whatever kernels keep for a token or a sequence, and for a channel and a state, can be counted: lanes may be
    // sixteen times the channels.
    int64_t tokens;
    if (!multiply(p.batch, p.tokens, &tokens) || tokens > LARGEST * LARGEST_STATE) return false;
    if (!product_fits({tokens + sequences, p.channels, p.state + 2, 16, 16})) return false;

    const int64_t element = p.dtype == NEARFIELD_F32 ? 4 : 2;
    const int64_t rows[] = {p.batch, 1, 1, p.tokens, 1}, grouped[] = {p.batch, 1, 1, p.tokens, p.groups};
    const bool has_tokens = tokens > 0;
    if (!tensor(p.x, element, rows, p.channels, READ) || !tensor(p.dt, element, rows, p.channels, READ) ||
        !tensor(p.z, element, rows, p.channels, OPTIONAL) || !tensor(p.B, element, grouped, p.state, READ) ||
        !tensor(p.C, element, grouped, p.state, READ))
        return false;
    if (!p.A || !array(p.A, 4, {p.channels, p.state}) || !array(p.D, 4, {p.channels}) ||
        !array(p.dt_bias, 4, {p.channels}) || !array(p.initial_state, 4, {sequences, p.channels, p.state}) ||
        !array(p.chunk_states, 4, {1}))
        return false;
    if (!backward)
        return tensor(p.out, element, rows, p.channels, WRITTEN) &&
               array(p.final_state, 4, {sequences, p.channels, p.state});

    if (has_tokens && !p.chunk_states) return false;
    if (!p.grad_A || !p.grad_D != !p.D || !p.grad_dt_bias != !p.dt_bias) return false;
    if (!p.grad_initial_state != !p.initial_state) return false;
    return tensor(p.grad_out, element, rows, p.channels, READ) &&
           array(p.grad_final_state, 4, {sequences, p.channels, p.state}) &&
           tensor(p.grad_x, element, rows, p.channels, WRITTEN) &&
           tensor(p.grad_dt, element, rows, p.channels, WRITTEN) &&
           (!p.z.data || tensor(p.grad_z, element, rows, p.channels, WRITTEN)) &&
           tensor(p.grad_B, element, grouped, p.state, WRITTEN) &&
           tensor(p.grad_C, element, grouped, p.state, WRITTEN) && array(p.grad_A, 4, {p.channels, p.state}) &&
           array(p.grad_D, 4, {p.channels}) && array(p.grad_dt_bias, 4, {p.channels}) &&
           array(p.grad_initial_state, 4, {sequences, p.channels, p.state});
}

bool lla_is_valid(const nearfield_lla &p, bool backward) {
    if (!between(NEARFIELD_F32, p.dtype, NEARFIELD_F16) || !between(NEARFIELD_SHIFT, p.border, NEARFIELD_TRUNCATE))
        return false;
    if (!between(0, p.batch, LARGEST) || !between(0, p.num_keys, LONGEST) || !between(0, p.num_queries, p.num_keys))
        return false;
    if (!heads_and_dims(p.heads, p.kv_heads, p.head_dim, p.value_dim, p.scale)) return false;
    if (!between(1, p.kernel_size, LARGEST) || !between(0, p.is_causal, 1)) return false;
    if (!p.is_causal && (p.num_queries != p.num_keys || (p.border == NEARFIELD_SHIFT && p.kernel_size > p.num_keys)))
        return false;
    if (!between(0, p.max_iterations, LARGEST) || !(p.tolerance >= 0) || !(p.tolerance <= 1)) return false;
    // The sums of up to 32 parts of a backward count rows up to whole vectors and one row more.
    int64_t dims = p.head_dim + p.value_dim;
    if (!product_fits({p.batch, p.num_keys + 1, p.heads, dims + 32, 4 * 32})) return false;

    const int64_t element = p.dtype == NEARFIELD_F32 ? 4 : 2;
    const int64_t queries[] = {p.batch, 1, 1, p.num_queries, p.heads};
    const int64_t keys[] = {p.batch, 1, 1, p.num_keys, p.kv_heads};
    if (!tensor(p.query, element, queries, p.head_dim, READ) || !tensor(p.key, element, keys, p.head_dim, READ) ||
        !tensor(p.value, element, keys, p.value_dim, READ) || !tensor(p.ridge, 4, queries, 1, READ) ||
        !tensor(p.correction, 4, queries, p.head_dim, backward ? READ : WRITTEN) ||
        !array(p.key_mask, 1, {p.batch, p.num_keys}))
        return false;
    if (!backward) return tensor(p.out, element, queries, p.value_dim, WRITTEN);
    return tensor(p.grad_out, element, queries, p.value_dim, READ) &&
           tensor(p.grad_query, element, queries, p.head_dim, WRITTEN) &&
           tensor(p.grad_key, element, keys, p.head_dim, WRITTEN) &&
           tensor(p.grad_value, element, keys, p.value_dim, WRITTEN) && tensor(p.grad_ridge, 4, queries, 1, WRITTEN);
}

bool linear_is_valid(const nearfield_linear &p, bool backward) {
    if (!between(NEARFIELD_F32, p.dtype, NEARFIELD_F16) || !between(NEARFIELD_F32, p.g_dtype, NEARFIELD_F16)) return false;
    if (!between(0, p.batch, LARGEST) || !between(0, p.length, LARGEST)) return false;
    if (!heads_and_dims(p.heads, p.heads, p.head_dim, p.value_dim, p.scale)) return false;
    if (p.gates != 0 && p.gates != 1 && p.gates != p.head_dim) return false;
    // Channels are padded, by 15 at most; a backward keeps the states of every 64th position.
    int64_t head = p.head_dim + 15, value = p.value_dim + 15;
    if (!product_fits({p.batch, p.length, p.heads, head + value, 16}) ||
        !product_fits({p.batch, p.heads, head, value, 16}) || !product_fits({p.length / 64 + 1, head, value, 16}))
        return false;
    const int64_t element = p.dtype == NEARFIELD_F32 ? 4 : 2, g_element = p.g_dtype == NEARFIELD_F32 ? 4 : 2;
    const int64_t tokens[] = {p.batch, 1, 1, p.length, p.heads};
    if (!tensor(p.query, element, tokens, p.head_dim, READ) || !tensor(p.key, element, tokens, p.head_dim, READ) ||
        !tensor(p.value, element, tokens, p.value_dim, READ) || !tensor(p.g, g_element, tokens, p.gates, READ) ||
        !tensor(p.beta, 4, tokens, 1, OPTIONAL) ||
        !array(p.initial_state, 4, {p.batch, p.heads, p.head_dim, p.value_dim}))
        return false;
    if (!backward)
        return (p.final_state || !p.batch) && array(p.final_state, 4, {p.batch, p.heads, p.head_dim, p.value_dim}) &&
               tensor(p.out, element, tokens, p.value_dim, WRITTEN);
    return array(p.grad_final_state, 4, {p.batch, p.heads, p.head_dim, p.value_dim}) &&
           array(p.grad_initial_state, 4, {p.batch, p.heads, p.head_dim, p.value_dim}) &&
           tensor(p.grad_out, element, tokens, p.value_dim, READ) &&
           tensor(p.grad_query, element, tokens, p.head_dim, WRITTEN) &&
           tensor(p.grad_key, element, tokens, p.head_dim, WRITTEN) &&
           tensor(p.grad_value, element, tokens, p.value_dim, WRITTEN) &&
           (!p.grad_g.data || tensor(p.grad_g, g_element, tokens, p.gates, WRITTEN)) &&
           (!p.beta.data || tensor(p.grad_beta, 4, tokens, 1, WRITTEN));
}

}  // namespace

int validate_attention(const nearfield_attention *problems, int64_t count, int64_t threads, bool backward) {
    if (threads < 1 || count < 0 || (count && !problems) || !aligned(problems, alignof(nearfield_attention)))
        return NEARFIELD_INVALID;
    for (int64_t i = 0; i < count; ++i) {
        if (!attention_is_valid(problems[i], backward)) return NEARFIELD_INVALID;
        if (backward && !problems[i].grad_bias != !problems[0].grad_bias) return NEARFIELD_INVALID;
    }
    return NEARFIELD_OK;
}

int validate_decode(const nearfield_decode *problem, int64_t threads) {
    if (threads < 1 || !problem || !aligned(problem, alignof(nearfield_decode))) return NEARFIELD_INVALID;
    return decode_is_valid(*problem) ? NEARFIELD_OK : NEARFIELD_INVALID;
}

int validate_shares(const nearfield_shares *problem, int64_t threads) {
    if (threads < 1 || !problem || !aligned(problem, alignof(nearfield_shares))) return NEARFIELD_INVALID;
    return shares_are_valid(*problem) ? NEARFIELD_OK : NEARFIELD_INVALID;
}

int validate_choice(const nearfield_choice *problem, int64_t threads) {
    if (threads < 1 || !problem || !aligned(problem, alignof(nearfield_choice))) return NEARFIELD_INVALID;
    return choice_is_valid(*problem) ? NEARFIELD_OK : NEARFIELD_INVALID;
}

int validate_scan(const nearfield_scan *problem, int64_t threads, bool backward) {
    if (threads < 1 || !problem || !aligned(problem, alignof(nearfield_scan))) return NEARFIELD_INVALID;
    return scan_is_valid(*problem, backward) ? NEARFIELD_OK : NEARFIELD_INVALID;
}

int validate_lla(const nearfield_lla *problem, int64_t threads, bool backward) {
    if (threads < 1 || !problem || !aligned(problem, alignof(nearfield_lla))) return NEARFIELD_INVALID;
    return lla_is_valid(*problem, backward) ? NEARFIELD_OK : NEARFIELD_INVALID;
}

int validate_linear(const nearfield_linear *problem, int64_t threads, bool backward) {
    if (threads < 1 || !problem || !aligned(problem, alignof(nearfield_linear))) return NEARFIELD_INVALID;
    return linear_is_valid(*problem, backward) ? NEARFIELD_OK : NEARFIELD_INVALID;
}

}  // namespace nearfield
