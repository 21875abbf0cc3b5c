// Rows of channels in and out of tensors, whatever their dtype, and the keys of a unit packed side by side.
#pragma once
#include "plan.h"
#include "products.h"

namespace nearfield {
namespace {

// Memory in one piece, handed out in aligned parts; without a base it only counts.
struct Arena {
    char *base;
    size_t used = 0;
    explicit Arena(void *memory) : base(static_cast<char *>(memory)) {}
    template <class T>
    T *take(int64_t count) {
        char *at = base + used;
        used += size_t(round_up(int64_t(sizeof(T)) * count, int64_t(64)));
        return base ? reinterpret_cast<T *>(at) : nullptr;
    }
};

// `n` channels as floats.
NEARFIELD_INLINE void read_row(const void *from, int64_t dtype, int64_t n, float *to) {
    if (dtype == NEARFIELD_F32) {
        const float *at = static_cast<const float *>(from);
        int64_t i = 0;
        for (; i + WIDTH <= n; i += WIDTH) store(to + i, load(at + i));
        for (; i < n; i++) to[i] = at[i];
        return;
    }
    const uint16_t *at = static_cast<const uint16_t *>(from);
    int64_t i = 0;
    if (dtype == NEARFIELD_BF16) {
        for (; i + WIDTH <= n; i += WIDTH)
            store_int(to + i, __builtin_convertvector(*(const half_any *)(at + i), ivec) << 16);
        for (; i < n; i++) to[i] = from_bf16(at[i]);
        return;
    }
#if defined(__AVX512F__)
    for (; i + WIDTH <= n; i += WIDTH) store(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(at + i))));
#elif defined(__F16C__)
    for (; i + WIDTH <= n; i += WIDTH) store(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at + i))));
#endif
    for (; i < n; i++) to[i] = from_f16(at[i]);
}

inline void write_row(const float *from, int64_t n, void *to, int64_t dtype) {
    int64_t i = 0;
    if (dtype == NEARFIELD_F32) {
        float *at = static_cast<float *>(to);
        for (; i + WIDTH <= n; i += WIDTH) store(at + i, load(from + i));
        for (; i < n; i++) at[i] = from[i];
    } else if (dtype == NEARFIELD_BF16) {
        uint16_t *at = static_cast<uint16_t *>(to);
#if defined(__AVX512BF16__)
        for (; i + WIDTH <= n; i += WIDTH)
            _mm256_storeu_si256((__m256i *)(at + i), (__m256i)_mm512_cvtneps_pbh(load(from + i)));
#endif
        for (; i < n; i++) at[i] = to_bf16(from[i]);
    } else {
        uint16_t *at = static_cast<uint16_t *>(to);
#if defined(__AVX512F__)
        for (; i + WIDTH <= n; i += WIDTH)
            _mm256_storeu_si256((__m256i *)(at + i), _mm512_cvtps_ph(load(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; i < n; i++) at[i] = to_f16(from[i]);
    }
}

// A row as the units of P's products: floats, or bfloat16 as they are, two a unit. Fills up to `units` with zeros.
template <class P>
NEARFIELD_INLINE void read_units(const void *from, int64_t dtype, int64_t n, float *to, int64_t units) {
    if constexpr (P::PACK == 1) {
        read_row(from, dtype, n, to);
        for (int64_t i = n; i < units; i++) to[i] = 0;
    } else {
        uint16_t *bits = reinterpret_cast<uint16_t *>(to);
        const uint16_t *at = static_cast<const uint16_t *>(from);
        int64_t i = 0;
        for (; i + 32 <= n; i += 32) memcpy(bits + i, at + i, 64);
        for (; i < n; i++) bits[i] = at[i];
        for (; i < 2 * units; i++) bits[i] = 0;
    }
}

// Two rows of bfloat16 as one of pairs, channel by channel; a row that is NULL counts as zeros.
inline void read_pairs(const void *first, const void *second, int64_t n, float *to) {
    static const uint16_t zeros[WIDTH] = {};
    const uint16_t *a = static_cast<const uint16_t *>(first), *b = static_cast<const uint16_t *>(second);
    const int64_t a_step = a ? 1 : 0, b_step = b ? 1 : 0;
    a = a ? a : zeros;
    b = b ? b : zeros;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        ivec low = __builtin_convertvector(*(const half_any *)(a + i * a_step), ivec);
        ivec high = __builtin_convertvector(*(const half_any *)(b + i * b_step), ivec);
        store_int(to + i, low | high << 16);
    }
    for (; i < n; i++) {
        uint32_t bits = a[i * a_step] | uint32_t(b[i * b_step]) << 16;
        memcpy(to + i, &bits, 4);
    }
}

NEARFIELD_INLINE int64_t item_bytes(int64_t dtype) { return dtype == NEARFIELD_F32 ? 4 : 2; }

NEARFIELD_INLINE char *address(const nearfield_tensor &x, int64_t bytes, int64_t batch, int64_t z, int64_t y, int64_t w,
                               int64_t head) {
    return static_cast<char *>(x.data) + bytes * (batch * x.stride[0] + z * x.stride[1] + y * x.stride[2] +
                                                  w * x.stride[3] + head * x.stride[4]);
}

// Rows of one head lie far apart, where no hardware prefetcher follows: they are asked for some rows ahead.
constexpr int64_t AHEAD = 8;
NEARFIELD_INLINE void prefetch(const char *row, int64_t ahead, int64_t bytes) {
    uintptr_t at = reinterpret_cast<uintptr_t>(row) + uintptr_t(ahead);  // may lie outside of all memory
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void *>(at + uintptr_t(i)));
}

// Where keys come from: tokens of a plane, or a list of tokens (sinks), or the additional keys.
struct Source {
    const nearfield_attention *problem;
    const Plane *plane;
    const int32_t *tokens;  // list: positions on axis x of the grid; NULL otherwise
    bool is_additional;

    bool is_outside(int64_t z, int64_t y, int64_t x) const {
        const PlaneAxis *axis = plane->axis;
        return z < 0 || z >= axis[0].length || y < 0 || y >= axis[1].length || x < 0 || x >= axis[2].length;
    }
    int64_t token(int a, int64_t position) const { return position * problem->axis[a].dilation + plane->group[a]; }

    // Whether the key mask hides a key of the plane; a key outside the grid is never hidden.
    bool is_masked(int64_t z, int64_t y, int64_t x) const {
        const nearfield_attention &p = *problem;
        if (!p.key_mask || is_outside(z, y, x)) return false;
        int64_t row = (plane->batch * p.axis[0].size + token(0, z)) * p.axis[1].size + token(1, y);
        return !p.key_mask[row * p.axis[2].size + token(2, x)];
    }

    // Whether the keys [from, to) of a run are tokens, none of them masked, one step apart.
    bool is_plain(int64_t z, int64_t y, int64_t from, int64_t to) const {
        if (is_additional) return true;
        return !tokens && !problem->key_mask && !is_outside(z, y, from) && !is_outside(z, y, to - 1);
    }

    // Bytes from a key of a run to the next.
    int64_t step(const nearfield_tensor &x) const {
        return item_bytes(problem->dtype) * x.stride[3] * (is_additional ? 1 : problem->axis[2].dilation);
    }

    // The address of a key's row in `x`, or NULL for one that counts as zeros: outside the grid, or masked.
    char *row(const nearfield_tensor &x, int64_t z, int64_t y, int64_t w) const {
        int64_t bytes = item_bytes(problem->dtype), b = plane->batch, h = plane->kv_head;
        if (is_additional) return address(x, bytes, b, 0, 0, w, h);
        if (tokens) return address(x, bytes, b, 0, 0, tokens[w], h);
        if (is_outside(z, y, w) || is_masked(z, y, w)) return nullptr;
        return address(x, bytes, b, token(0, z), token(1, y), token(2, w), h);
    }
};

// Rows of one tensor for the keys of a unit, side by side in the order of its box.
template <class P>
struct Packed {
    float *rows;   // units of channels: read by `scores`
    float *pairs;  // a key and its right neighbour channel by channel: read by `accumulate`. The same as rows for floats
    int64_t row_stride, pair_stride;

    static int64_t row_size(int64_t channels) { return round_up(ceil_div(channels, int64_t(P::PACK)), int64_t(4)); }
    static int64_t pair_size(int64_t channels) { return P::PACK == 1 ? 0 : round_up(channels, int64_t(4)); }

    // Takes its memory for `keys` keys and one row more, which padding reads.
    float *place(float *memory, int64_t keys, int64_t channels) {
        row_stride = row_size(channels), pair_stride = P::PACK == 1 ? row_stride : pair_size(channels);
        rows = memory, memory += (keys + 1) * row_stride;
        pairs = P::PACK == 1 ? rows : memory;
        return P::PACK == 1 ? memory : memory + (keys + 1) * pair_stride;
    }

    // Packs the part `box` of the unit `whole`.
    void fill(const Source &source, const nearfield_tensor &x, int64_t channels, const Box &whole, const Box &box,
              bool with_rows, bool with_pairs) {
        int64_t side_y = whole.to[1] - whole.from[1], side_x = whole.to[2] - whole.from[2];
        int64_t dtype = source.problem->dtype, bytes = item_bytes(dtype) * channels, step = source.step(x);
        with_rows |= P::PACK == 1;
        for (int64_t z = box.from[0]; z < box.to[0]; z++)
            for (int64_t y = box.from[1]; y < box.to[1]; y++) {
                int64_t run = ((z - whole.from[0]) * side_y + y - whole.from[1]) * side_x - whole.from[2];
                bool is_plain = source.is_plain(z, y, box.from[2], box.to[2]);  // then rows follow by `step`
                char *next = source.row(x, z, y, box.from[2]);
                for (int64_t w = box.from[2]; w < box.to[2]; w++) {
                    const char *here = next;
                    next = w + 1 >= box.to[2] ? nullptr : is_plain ? next + step : source.row(x, z, y, w + 1);
                    if (here) prefetch(here, AHEAD * step, bytes);
                    float *to = rows + (run + w) * row_stride;
                    if (with_rows && here)
                        read_units<P>(here, dtype, channels, to, row_stride);
                    else if (with_rows)
                        memset(to, 0, 4 * row_stride);
                    if (P::PACK == 2 && with_pairs) read_pairs(here, next, channels, pairs + (run + w) * pair_stride);
                }
            }
    }
};

}  // namespace
}  // namespace nearfield
