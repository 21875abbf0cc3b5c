// Broken descriptors must be refused without a look at their tensors; whole ones must be accepted.
//
//     fuzz [--cases N] [--seed S] [--only K]
//
// Tensors of broken descriptors lie on pages that may not be touched. What is broken is decided here once more, in
// 128 bits and without care for overflow. With -DNEARFIELD_LIBFUZZER and clang's -fsanitize=fuzzer it is a fuzz target.
#include <sys/mman.h>

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../validate.h"
#include "draw.h"
#include "reference.h"

using namespace nearfield;
using nearfield::check::Draw;

namespace {

__extension__ typedef __int128 Wide;

constexpr int64_t ARENA = int64_t(1) << 24, MOST = int64_t(1) << 40;
enum Use { OPTIONAL, READ, WRITTEN };

// A fresh place for tensors, of memory or of pages that may not be touched.
struct Arena {
    explicit Arena(int access)
        : may_touch(access & PROT_WRITE), data(static_cast<uint8_t *>(mmap(nullptr, ARENA, access, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
        if (data == MAP_FAILED) std::perror("mmap"), std::exit(2);
        if (access & PROT_WRITE) std::memset(data, 0x3d, ARENA);  // ordinary numbers in every dtype
    }
    void *take(int64_t bytes) {
        void *at = data + used;
        used += (bytes + 63) / 64 * 64;
        if (used > ARENA) std::abort();
        return at;
    }
    bool may_touch;
    uint8_t *data;
    int64_t used = 0;
};

nearfield_tensor contiguous(Arena &arena, const int64_t (&size)[5], int64_t channels) {
    nearfield_tensor tensor{};
    int64_t extent = channels;
    for (int d = 4; d >= 0; --d) tensor.stride[d] = extent, extent *= size[d];
    tensor.data = arena.take(4 * extent);
    return tensor;
}

nearfield_attention whole_attention(Draw &draw, Arena &arena, bool grad_bias) {
    nearfield_attention p{};
    p.dtype = draw.between(0, 2), p.border = draw.between(0, 2);
    p.batch = draw.between(0, 2), p.kv_heads = draw.between(1, 2), p.heads = p.kv_heads * draw.between(1, 2);
    p.head_dim = draw.between(1, 20), p.value_dim = draw.between(1, 20), p.scale = 0.5;
    int64_t rank = draw.between(1, 3);
    for (int64_t d = 0; d < 3; ++d) {
        nearfield_axis &a = p.axis[d] = {1, 1, 1, 1, 0};
        if (d < 3 - rank) continue;
        a.size = draw.between(1, 9), a.kernel_size = draw.between(1, a.size), a.stride = draw.between(1, a.kernel_size);
        a.dilation = draw.between(1, a.size / a.kernel_size), a.is_causal = draw.between(0, 1);
        if (p.border == NEARFIELD_SHIFT && !a.is_causal) continue;
        a.dilation += draw.between(0, 2), a.kernel_size += draw.between(0, 3);
    }
    if (rank == 1) p.num_sinks = draw.between(0, 12);
    if (rank == 1 && draw.chance(0.5)) p.first_query = draw.between(0, p.axis[2].size);
    bool all = rank == 1 && !grad_bias && draw.chance(0.1);  // more queries than keys
    if (all) p.axis[2] = {p.axis[2].size, p.axis[2].size, 1, 1, 0}, p.border = NEARFIELD_SHIFT;
    if (all) p.axis[2].stride = draw.between(1, p.axis[2].size), p.first_query = -draw.between(1, 40);
    const int64_t x = p.axis[2].size, queries[] = {p.batch, p.axis[0].size, p.axis[1].size, x - p.first_query, p.heads};
    const int64_t keys[] = {p.batch, p.axis[0].size, p.axis[1].size, x, p.kv_heads};
    if (draw.chance(0.5)) {
        p.num_additional = draw.between(0, 3);
        const int64_t more[] = {p.batch, 1, 1, p.num_additional, p.kv_heads};
        p.additional_key = contiguous(arena, more, p.head_dim);
        p.additional_value = contiguous(arena, more, p.value_dim);
        p.grad_additional_key = contiguous(arena, more, p.head_dim);
        p.grad_additional_value = contiguous(arena, more, p.value_dim);
    }
    p.query = contiguous(arena, queries, p.head_dim), p.key = contiguous(arena, keys, p.head_dim);
    p.value = contiguous(arena, keys, p.value_dim), p.out = contiguous(arena, queries, p.value_dim);
    p.lse = contiguous(arena, queries, 1), p.grad_out = contiguous(arena, queries, p.value_dim);
    if (draw.chance(0.5)) p.grad_lse = contiguous(arena, queries, 1);
    p.grad_query = contiguous(arena, queries, p.head_dim), p.grad_key = contiguous(arena, keys, p.head_dim);
    p.grad_value = contiguous(arena, keys, p.value_dim);
    int64_t entries = p.heads * check::bias_size(p);
    if (grad_bias || (!all && draw.chance(0.3))) p.bias = static_cast<float *>(arena.take(4 * entries));
    if (grad_bias) p.grad_bias = static_cast<float *>(arena.take(4 * entries));
    if (draw.chance(0.3)) p.key_mask = static_cast<uint8_t *>(arena.take(p.batch * keys[1] * keys[2] * x));
    if (draw.chance(0.3)) p.sink_logits = static_cast<float *>(arena.take(4 * p.heads));
    return p;
}

nearfield_decode whole_decode(Draw &draw, Arena &arena) {
    nearfield_decode p{};
    p.dtype = draw.between(0, 2), p.batch = draw.between(0, 2), p.num_queries = draw.between(0, 3);
    p.num_keys = draw.between(0, 40), p.kv_heads = draw.between(1, 3), p.heads = p.kv_heads * draw.between(1, 3);
    p.head_dim = draw.between(1, 20), p.value_dim = draw.between(1, 20), p.scale = -0.25;
    const int64_t queries[] = {p.batch, 1, 1, p.num_queries, p.heads}, keys[] = {p.batch, 1, 1, p.num_keys, p.kv_heads};
    p.query = contiguous(arena, queries, p.head_dim), p.out = contiguous(arena, queries, p.value_dim);
    p.key = contiguous(arena, keys, p.head_dim), p.value = contiguous(arena, keys, p.value_dim);
    if (draw.chance(0.5)) p.lse = contiguous(arena, queries, 1);
    int64_t row = p.num_keys, table = p.num_queries * row;
    if (draw.chance(0.5)) p.visible = static_cast<uint8_t *>(arena.take(p.batch * table));
    if (draw.chance(0.5)) p.addend = static_cast<float *>(arena.take(4 * p.batch * p.heads * table));
    p.visible_stride[0] = draw.chance(0.5) ? table : 0, p.visible_stride[1] = row;
    p.addend_stride[0] = p.heads * table, p.addend_stride[1] = table, p.addend_stride[2] = row;
    if (p.num_queries <= p.num_keys) p.is_causal = draw.between(0, 1);
    if (draw.chance(0.5)) {
        p.block_size = draw.between(1, 50), p.list_length = draw.between(0, 5);
        p.block_stride[2] = p.list_length, p.block_stride[1] = draw.between(0, 1) * p.kv_heads * p.list_length;
        p.block_stride[0] = p.num_queries * p.kv_heads * p.list_length;
        int64_t count = p.batch * p.block_stride[0], blocks = (p.num_keys + p.block_size - 1) / p.block_size;
        auto *list = static_cast<int64_t *>(arena.take(8 * count));
        for (int64_t i = 0; arena.may_touch && i < count; ++i) list[i] = draw.between(-1, blocks - 1);
        p.blocks = list;
    }
    return p;
}

nearfield_shares whole_shares(Draw &draw, Arena &arena) {
    nearfield_shares p{};
    p.dtype = draw.between(0, 2), p.key_dtype = draw.between(0, 2), p.batch = draw.between(0, 2);
    p.num_keys = draw.between(0, 40), p.num_queries = draw.between(0, 3), p.kv_heads = draw.between(1, 3);
    p.heads = p.kv_heads * draw.between(1, 3), p.head_dim = draw.between(1, 20), p.scale = -0.25, p.last_part = 0.5;
    p.block_size = draw.between(1, 50), p.is_bound = draw.between(0, 1);
    if (p.num_queries <= p.num_keys) p.is_causal = draw.between(0, 1);
    const int64_t queries[] = {p.batch, 1, 1, p.num_queries, p.heads}, keys[] = {p.batch, 1, 1, p.num_keys, p.kv_heads};
    p.query = contiguous(arena, queries, p.head_dim), p.key = contiguous(arena, keys, p.head_dim << p.is_bound);
    if (draw.chance(0.5)) p.key_mask = static_cast<uint8_t *>(arena.take(p.batch * p.num_keys));
    p.shares = static_cast<float *>(arena.take(4 * p.batch * p.num_queries * p.kv_heads * (p.num_keys + 1)));
    return p;
}

nearfield_choice whole_choice(Draw &draw, Arena &arena) {
    nearfield_choice p{};
    p.batch = draw.between(0, 2), p.num_keys = draw.between(0, 200), p.kv_heads = draw.between(1, 3);
    p.num_queries = draw.between(0, std::min<int64_t>(p.num_keys, 3)), p.block_size = draw.between(1, 50);
    p.num_blocks = draw.between(0, 9), p.sink_blocks = draw.between(0, 3), p.num_recent = draw.between(0, 99);
    p.list_length = draw.between(0, 12);
    int64_t rows = p.batch * p.num_queries * p.kv_heads;
    p.scores = static_cast<float *>(arena.take(4 * rows * p.num_keys));
    p.chosen = static_cast<int64_t *>(arena.take(8 * rows * p.list_length));
    return p;
}

bool in(int64_t low, int64_t x, int64_t high) { return low <= x && x <= high; }

bool fits(const void *data, int64_t element, std::initializer_list<int64_t> sizes, const int64_t *strides,
          int64_t channels, Use use) {
    Wide low = 0, high = channels, address = Wide(reinterpret_cast<uintptr_t>(data));
    bool empty = channels == 0;
    for (int64_t size : sizes) empty = empty || size == 0;
    if (empty || (!data && use == OPTIONAL)) return true;
    if (!data || address % element) return false;
    for (int64_t size : sizes) {
        Wide stride = *strides++;
        if (size == 1) continue;
        (stride < 0 ? low : high) += (size - 1) * stride;
        if (use == WRITTEN && (stride < 0 ? -stride : stride) < channels) return false;
    }
    low *= element, high *= element;
    return -low <= INT64_MAX && high <= INT64_MAX && address + low >= 0 && address + high <= Wide(UINTPTR_MAX);
}

Wide product(std::initializer_list<int64_t> factors) {
    Wide total = 1;
    for (int64_t factor : factors) total = std::min<Wide>(total * factor, Wide(1) << 70);
    return total;
}

bool is_whole(const nearfield_attention &p, bool backward) {
    if (!in(0, p.dtype, 2) || !in(0, p.border, 2) || !in(0, p.batch, MOST) || !in(1, p.kv_heads, MOST)) return false;
    if (!in(1, p.heads, MOST) || p.heads % p.kv_heads) return false;
    if (!in(1, p.head_dim, 1024) || !in(1, p.value_dim, 1024)) return false;
    if (!std::isfinite(float(p.scale))) return false;
    for (const nearfield_axis &a : p.axis) {
        if (!in(1, a.size, INT32_MAX) || !in(1, a.kernel_size, MOST) || !in(1, a.stride, a.kernel_size)) return false;
        if (!in(1, a.dilation, MOST) || !in(0, a.is_causal, 1)) return false;
        if (p.border == NEARFIELD_SHIFT && !a.is_causal && Wide(a.kernel_size) * a.dilation > a.size) return false;
    }
    const nearfield_axis &z = p.axis[0], &y = p.axis[1], &x = p.axis[2];
    bool line = z.size == 1 && y.size == 1 && z.kernel_size == 1 && y.kernel_size == 1;
    if (!in(0, p.num_sinks, line ? MOST : 0) || p.first_query > (line ? x.size : 0)) return false;
    bool all = line && p.border == NEARFIELD_SHIFT && x.kernel_size == x.size && !x.is_causal && !p.bias;
    if (p.first_query < (all ? x.size - INT32_MAX : 0)) return false;
    if (!in(0, p.num_additional, MOST) || !p.additional_key.data != !p.additional_value.data) return false;
    int64_t dims = p.head_dim + p.value_dim;
    int64_t element = p.dtype == NEARFIELD_F32 ? 4 : 2, count = x.size - p.first_query;
    if (product({p.batch, z.size, y.size, std::max(x.size, count), p.heads, dims, 8}) > INT64_MAX) return false;
    if (product({p.batch, p.num_additional, p.heads, dims, 8}) > INT64_MAX) return false;
    auto query = [&](const nearfield_tensor &t, int64_t channels, int64_t bytes, Use use) {
        return fits(t.data, bytes, {p.batch, z.size, y.size, count, p.heads}, t.stride, channels, use);
    };
    auto key = [&](const nearfield_tensor &t, int64_t channels, Use use) {
        return fits(t.data, element, {p.batch, z.size, y.size, x.size, p.kv_heads}, t.stride, channels, use);
    };
    auto more = [&](const nearfield_tensor &t, int64_t channels, Use use) {
        return fits(t.data, element, {p.batch, 1, 1, p.num_additional, p.kv_heads}, t.stride, channels, use);
    };
    auto array = [&](const void *data, int64_t bytes, std::initializer_list<int64_t> sizes) {
        Wide size = product(sizes) * bytes, address = Wide(reinterpret_cast<uintptr_t>(data));
        return !data || (address % bytes == 0 && size <= INT64_MAX && address + size <= Wide(UINTPTR_MAX));
    };
    int64_t kz = 2 * z.kernel_size - 1, ky = 2 * y.kernel_size - 1, kx = 2 * x.kernel_size - 1;
    if (p.bias && product({p.heads / p.kv_heads, kz, ky, kx}) > INT32_MAX) return false;
    Use result = backward ? READ : WRITTEN;
    bool forward = query(p.query, p.head_dim, element, READ) && key(p.key, p.head_dim, READ) &&
                   key(p.value, p.value_dim, READ) && more(p.additional_key, p.head_dim, READ) &&
                   more(p.additional_value, p.value_dim, READ) && query(p.out, p.value_dim, element, result) &&
                   query(p.lse, 1, 4, result) && array(p.bias, 4, {p.heads, kz, ky, kx}) &&
                   array(p.key_mask, 1, {p.batch, z.size, y.size, x.size}) && array(p.sink_logits, 4, {p.heads});
    if (!forward || !backward) return forward;
    return query(p.grad_out, p.value_dim, element, READ) && query(p.grad_lse, 1, 4, OPTIONAL) &&
           query(p.grad_query, p.head_dim, element, WRITTEN) && key(p.grad_key, p.head_dim, WRITTEN) &&
           key(p.grad_value, p.value_dim, WRITTEN) && more(p.grad_additional_key, p.head_dim, WRITTEN) &&
           more(p.grad_additional_value, p.value_dim, WRITTEN) && (!p.grad_bias || p.bias) &&
           array(p.grad_bias, 4, {p.heads, kz, ky, kx});
}

bool is_array(const void *data, int64_t bytes, std::initializer_list<int64_t> sizes) {
    Wide size = product(sizes) * bytes, address = Wide(reinterpret_cast<uintptr_t>(data));
    return !data || (address % bytes == 0 && size <= INT64_MAX && address + size <= Wide(UINTPTR_MAX));
}

bool is_whole(const nearfield_shares &p) {
    if (!in(0, p.dtype, 2) || !in(0, p.key_dtype, 2) || !in(0, p.batch, MOST)) return false;
    if (!in(0, p.num_queries, MOST) || !in(0, p.num_keys, MOST)) return false;
    if (!in(1, p.heads, MOST) || !in(1, p.kv_heads, MOST) || p.heads % p.kv_heads) return false;
    if (!in(1, p.head_dim, 1024) || !std::isfinite(float(p.scale)) || !(p.last_part > 0) || p.last_part > 1) return false;
    if (!in(1, p.block_size, MOST) || !in(0, p.is_bound, 1) || !in(0, p.is_causal, 1)) return false;
    if (p.is_causal && p.num_queries > p.num_keys) return false;
    int64_t width = p.head_dim << p.is_bound, blocks = (p.num_keys + p.block_size - 1) / p.block_size;
    if (product({p.batch, p.num_queries, p.heads, width, 8}) > INT64_MAX) return false;
    if (product({p.batch, p.num_keys, p.heads, width, 8}) > INT64_MAX) return false;
    if (product({p.batch, p.num_queries, p.heads, blocks + 64, 8}) > INT64_MAX) return false;
    bool is_empty = !p.batch || !p.num_queries || !blocks;
    return fits(p.query.data, p.dtype ? 2 : 4, {p.batch, 1, 1, p.num_queries, p.heads}, p.query.stride, p.head_dim, READ) &&
           fits(p.key.data, p.key_dtype ? 2 : 4, {p.batch, 1, 1, p.num_keys, p.kv_heads}, p.key.stride, width, READ) &&
           is_array(p.key_mask, 1, {p.batch, p.num_keys}) && (is_empty || p.shares) &&
           is_array(p.shares, 4, {p.batch, p.num_queries, p.kv_heads, blocks});
}

bool is_whole(const nearfield_choice &p) {
    if (!in(0, p.batch, MOST) || !in(0, p.num_queries, MOST) || !in(p.num_queries, p.num_keys, MOST)) return false;
    if (!in(1, p.kv_heads, MOST) || !in(1, p.block_size, MOST) || !in(0, p.list_length, MOST)) return false;
    if (!in(0, p.num_blocks, MOST) || !in(0, p.sink_blocks, MOST) || !in(0, p.num_recent, MOST)) return false;
    int64_t blocks = (p.num_keys + p.block_size - 1) / p.block_size;
    bool is_empty = !p.batch || !p.num_queries;
    return is_array(p.scores, 4, {p.batch, p.num_queries, p.kv_heads, blocks}) && (is_empty || !blocks || p.scores) &&
           is_array(p.chosen, 8, {p.batch, p.num_queries, p.kv_heads, p.list_length}) &&
           (is_empty || !p.list_length || p.chosen);
}

bool is_whole(const nearfield_decode &p) {
    if (!in(0, p.dtype, 2) || !in(0, p.batch, MOST)) return false;
    if (!in(0, p.num_queries, MOST) || !in(0, p.num_keys, MOST)) return false;
    if (!in(1, p.heads, MOST) || !in(1, p.kv_heads, MOST) || p.heads % p.kv_heads) return false;
    if (!in(1, p.head_dim, 1024) || !in(1, p.value_dim, 1024) || !std::isfinite(float(p.scale))) return false;
    int64_t dims = p.head_dim + p.value_dim;
    if (product({p.batch, p.num_queries, p.heads, dims, 8}) > INT64_MAX) return false;
    if (product({p.batch, p.num_keys, p.heads, dims, 8}) > INT64_MAX) return false;
    if (product({p.batch, p.num_queries, p.num_keys, p.heads, 8}) > INT64_MAX) return false;
    if (!in(0, p.is_causal, 1) || (p.is_causal && p.num_queries > p.num_keys) || !in(0, p.block_size, MOST)) return false;
    if (p.block_size && !in(0, p.list_length, MOST)) return false;
    int64_t lists = std::max<int64_t>(p.num_queries, 1);
    if (p.block_size && product({p.batch, lists, p.kv_heads, p.list_length + 1, 8}) > INT64_MAX) return false;
    if (p.block_size && !fits(p.blocks, 8, {p.batch, p.num_queries, p.kv_heads}, p.block_stride, p.list_length, READ))
        return false;
    int64_t element = p.dtype == NEARFIELD_F32 ? 4 : 2;
    auto fit = [&](const nearfield_tensor &t, int64_t tokens, int64_t heads, int64_t channels, int64_t bytes, Use use) {
        return fits(t.data, bytes, {p.batch, 1, 1, tokens, heads}, t.stride, channels, use);
    };
    return fit(p.query, p.num_queries, p.heads, p.head_dim, element, READ) &&
           fit(p.key, p.num_keys, p.kv_heads, p.head_dim, element, READ) &&
           fit(p.value, p.num_keys, p.kv_heads, p.value_dim, element, READ) &&
           fit(p.out, p.num_queries, p.heads, p.value_dim, element, WRITTEN) &&
           (!p.lse.data || fit(p.lse, p.num_queries, p.heads, 1, 4, WRITTEN)) &&
           fits(p.visible, 1, {p.batch, p.num_queries}, p.visible_stride, p.num_keys, OPTIONAL) &&
           fits(p.addend, 4, {p.batch, p.heads, p.num_queries}, p.addend_stride, p.num_keys, OPTIONAL);
}

// Some of the words of a descriptor, whose fields all have eight bytes.
template <typename Descriptor>
void corrupt(Draw &draw, Descriptor &descriptor) {
    constexpr int64_t words = sizeof(Descriptor) / 8;
    for (int64_t n = draw.between(1, 3); n > 0; --n) {
        uint8_t *place = reinterpret_cast<uint8_t *>(&descriptor) + 8 * draw.between(0, words - 1);
        int64_t word;
        std::memcpy(&word, place, 8);
        auto bits = uint64_t(word);
        bits = draw.pick<uint64_t>({0, 1, uint64_t(draw.between(-9, 9)), bits + 1, bits - 1, 2 * bits, -bits,
                                    draw.next(), draw.next() >> draw.between(1, 63),
                                    uint64_t(1) << draw.between(20, 63), uint64_t(INT64_MAX),
                                    0x7ff0000000000000, 0x7ff8000000000000});  // the last are inf and NaN
        std::memcpy(place, &bits, 8);
    }
    if (!draw.chance(0.2)) return;
    // Numbers side by side that are each within bounds while their sums or products are not.
    auto *place = reinterpret_cast<uint8_t *>(&descriptor) + 8 * draw.between(0, words - 5);
    for (int64_t n = draw.between(2, 5), bits = int64_t(1) << draw.between(28, 62); n > 0; --n, place += 8)
        std::memcpy(place, &bits, 8);
}

// Windows whose sides are within bounds while their reach, or their table of biases, is not.
void widen(Draw &draw, nearfield_attention &p) {
    for (nearfield_axis &axis : p.axis) {
        axis.kernel_size = draw.pick({axis.kernel_size, int64_t(1) << draw.between(1, 40)});
        axis.dilation = draw.pick({axis.dilation, axis.dilation, int64_t(1) << draw.between(1, 40)});
    }
}

// What is wrong, or "".
std::string step(Draw &draw) {
    static Arena memory(PROT_READ | PROT_WRITE), forbidden(PROT_NONE);
    bool broken = draw.chance(0.85);
    Arena &arena = broken ? forbidden : memory;
    arena.used = 0;
    int64_t threads = draw.between(1, 4), count = draw.between(1, 3);
    int kind = int(draw.between(0, 4));
    bool grad_bias = draw.chance(0.4), whole = true;
    std::vector<nearfield_attention> problems, before;
    nearfield_decode decode{}, decode_before{};
    nearfield_shares shares{}, shares_before{};
    nearfield_choice choice{}, choice_before{};
    if (kind == 2) {
        decode = whole_decode(draw, arena);
        if (broken) corrupt(draw, decode);
        decode_before = decode;
        whole = is_whole(decode);
    } else if (kind == 3) {
        shares = whole_shares(draw, arena);
        if (broken) corrupt(draw, shares);
        shares_before = shares;
        whole = is_whole(shares);
    } else if (kind == 4) {
        choice = whole_choice(draw, arena);
        if (broken) corrupt(draw, choice);
        choice_before = choice;
        whole = is_whole(choice);
    } else {
        for (int64_t i = 0; i < count; ++i) problems.push_back(whole_attention(draw, arena, grad_bias));
        if (broken && draw.chance(0.1))
            widen(draw, problems[draw.between(0, count - 1)]);
        else if (broken)
            corrupt(draw, problems[draw.between(0, count - 1)]);
        before = problems;
        for (const auto &p : problems)
            whole = whole && is_whole(p, kind == 1) && (kind == 0 || !p.grad_bias == !problems[0].grad_bias);
    }
    const nearfield_attention *first = problems.data();
    if (broken && draw.chance(0.05)) threads = draw.pick<int64_t>({0, -1, INT64_MIN}), whole = false;
    if (broken && kind < 2 && draw.chance(0.03)) count = draw.pick<int64_t>({-1, INT64_MIN}), whole = false;
    if (broken && kind < 2 && draw.chance(0.03)) first = nullptr, whole = false;

    int found;
    if (broken && whole)  // the damage is none, but the tensors are not there
        found = kind == 2   ? validate_decode(&decode, threads)
                : kind == 3 ? validate_shares(&shares, threads)
                : kind == 4 ? validate_choice(&choice, threads)
                            : validate_attention(first, count, threads, kind == 1);
    else
        found = kind == 2   ? nearfield_decode_forward(&decode, threads)
                : kind == 3 ? nearfield_block_shares(&shares, threads)
                : kind == 4 ? nearfield_choose_blocks(&choice, threads)
                : kind == 1 ? nearfield_attention_backward(first, count, threads)
                            : nearfield_attention_forward(first, count, threads);
    const char *names[] = {"forward", "backward", "decode", "shares", "choice"};
    if (found != (whole ? NEARFIELD_OK : NEARFIELD_INVALID))
        return std::string(names[kind]) + " gave " + std::to_string(found) + " for a " + (whole ? "whole" : "broken") +
               " descriptor";
    if (std::memcmp(&decode, &decode_before, sizeof decode) || std::memcmp(&shares, &shares_before, sizeof shares) ||
        std::memcmp(&choice, &choice_before, sizeof choice) ||
        (!problems.empty() && std::memcmp(problems.data(), before.data(), problems.size() * sizeof problems[0])))
        return "a descriptor was written";
    const char *wrong_isa = draw.pick<const char *>({nullptr, "", " ", "avx", "avx512 avx2", "avx2 ", "AVX2", "\xff"});
    if (nearfield_use(wrong_isa) != NEARFIELD_INVALID) return "an unknown instruction set was accepted";
    if (nearfield_decode_forward(nullptr, 1) != NEARFIELD_INVALID ||
        nearfield_block_shares(nullptr, 1) != NEARFIELD_INVALID || nearfield_choose_blocks(nullptr, 1) != NEARFIELD_INVALID)
        return "no descriptor was accepted";
    if (nearfield_attention_forward(nullptr, 0, 1) != NEARFIELD_OK) return "an empty job was refused";
    return "";
}

}  // namespace

#if defined(NEARFIELD_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    Draw draw(input, size);
    if (std::string wrong = step(draw); !wrong.empty()) std::fprintf(stderr, "%s\n", wrong.c_str()), std::abort();
    return 0;
}
#else
int main(int count, char **words) {
    int64_t cases = 20000, seed = 1, only = -1;
    for (int i = 1; i < count; ++i) {
        std::string word = words[i];
        int64_t *number = word == "--cases" ? &cases : word == "--seed" ? &seed : word == "--only" ? &only : nullptr;
        if (!number || ++i == count) return std::fprintf(stderr, "fuzz [--cases N] [--seed S] [--only K]\n"), 2;
        *number = std::atoll(words[i]);
    }
    int64_t passed = 0, failed = 0;
    for (int64_t number = only < 0 ? 0 : only; number < (only < 0 ? cases : only + 1); ++number) {
        Draw draw{uint64_t(seed), uint64_t(number)};
        std::string wrong = step(draw);
        wrong.empty() ? ++passed : ++failed;
        if (!wrong.empty())
            std::printf("FAILED: fuzz --seed %lld --only %lld: %s\n", (long long)seed, (long long)number,
                        wrong.c_str());
    }
    std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
    return failed ? 1 : 0;
}
#endif
