// Vectors of the instruction set that this file is compiled for, by the compiler's own vector types.
//
// Work is laid out in lanes of 16 numbers on every machine: PARTS native vectors of WIDTH numbers each. Nothing
// here has external linkage, so that no function compiled for one instruction set can be linked into another.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace nearfield {
namespace {

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef float vec_any __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));
typedef int32_t ivec_any __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));
typedef uint16_t half_any __attribute__((vector_size(2 * WIDTH), aligned(1), may_alias));

#define NEARFIELD_INLINE inline __attribute__((always_inline))

NEARFIELD_INLINE vec load(const void *p) { return *static_cast<const vec_any *>(p); }
NEARFIELD_INLINE ivec load_int(const void *p) { return *static_cast<const ivec_any *>(p); }
NEARFIELD_INLINE void store(void *p, vec x) { *static_cast<vec_any *>(p) = x; }
NEARFIELD_INLINE void store_int(void *p, ivec x) { *static_cast<ivec_any *>(p) = x; }
NEARFIELD_INLINE vec splat(float x) { return x - vec{}; }
NEARFIELD_INLINE ivec splat_int(int32_t x) { return x - ivec{}; }

template <class T>
NEARFIELD_INLINE T least(T a, T b) { return b < a ? b : a; }
template <class T>
NEARFIELD_INLINE T most(T a, T b) { return a < b ? b : a; }
template <class T>
NEARFIELD_INLINE T ceil_div(T a, T b) { return (a + b - 1) / b; }
template <class T>
NEARFIELD_INLINE T round_up(T a, T b) { return ceil_div(a, b) * b; }

constexpr float INFINITE = __builtin_inff();
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;

// Whether some lane of a comparison holds.
NEARFIELD_INLINE bool any(ivec mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int32_t bits = 0;
    for (int i = 0; i < WIDTH; i++) bits |= mask[i];
    return bits != 0;
#endif
}

// The larger; `b` where either is no number.
NEARFIELD_INLINE vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// table[index] in the lanes of `mask`, 0 in the others, which read nothing.
NEARFIELD_INLINE vec gather(const float *table, ivec index, ivec mask) {
#if defined(__AVX512F__)
    __mmask16 lanes = _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, (__m512i)index, table, 4);
#else
    vec out{};
    for (int i = 0; i < WIDTH; i++)
        if (mask[i]) out[i] = table[index[i]];
    return out;
#endif
}

// 2^x for x <= 0 (also for small positive x); exactly 0 at -inf and where the result would be denormal.
// DEGREE 5 errs by 1e-7 of the result, 3 by 8e-5, which is below the rounding of bfloat16.
template <int DEGREE>
NEARFIELD_INLINE vec exp2(vec x) {
#if defined(__AVX512F__)
    x = larger(splat(-200.0f), x);  // far enough for 0, and -inf is no operand of a difference; keeps a NaN
    vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec f = x - whole;
#else
    const vec shift = splat(12582912.0f);  // 1.5 * 2^23: the sum rounds to a whole number
    const ivec tiny = (ivec)(x < splat(-126.0f));
    vec y = tiny ? splat(-126.0f) : x;  // keeps a NaN
    vec sum = y + shift;
    vec f = y - (sum - shift);
#endif
    vec p;
    if constexpr (DEGREE == 3) {  // both fitted to the relative error on [-1/2, 1/2]
        p = f * 0.055088725f + 0.24260436f;
        p = p * f + 0.69327629f;
        p = p * f + 0.99992895f;
    } else {
        p = f * 1.3266975e-3f + 9.6754646e-3f;
        p = p * f + 5.5507425e-2f;
        p = p * f + 2.4022122e-1f;
        p = p * f + 6.9314694e-1f;
        p = p * f + 1.00000012f;
    }
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, whole);
#else
    ivec bits = (ivec)p + ((ivec)sum << 23);  // the low bits of the sum are the whole number
    return tiny ? vec{} : (vec)bits;
#endif
}

// log2(x) for normal positive x, within 2e-7 of the larger of 1 and the result.
NEARFIELD_INLINE vec log2(vec x) {
    ivec bits = (ivec)x, exponent = ((bits - 0x3f3504f3) >> 23);  // the fraction lies in [sqrt(1/2), sqrt(2))
    vec f = (vec)(bits - (exponent << 23)) - 1.0f;
    vec t = f / (f + 2.0f), t2 = t * t;  // log(1 + f) = 2 artanh(t)
    vec p = t2 * 0.43295921f + 0.57664368f;
    p = p * t2 + 0.96180001f;
    p = p * t2 + 2.88539008f;
    return p * t + __builtin_convertvector(exponent, vec);
}

// bfloat16 and float16 to float and back, to nearest even.
NEARFIELD_INLINE float from_bf16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
NEARFIELD_INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16) | 0x40;  // NaN stays NaN
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
NEARFIELD_INLINE float from_f16(uint16_t x) {
    uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff, bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
        float magnitude = float(fraction) * 5.9604645e-8f;  // 2^-24
        memcpy(&bits, &magnitude, 4);
        bits |= sign;
    }
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
NEARFIELD_INLINE uint16_t to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and above
    if (bits < 0x38800000u) {                                 // below 2^-14: denormal; adding 1/2 aligns and rounds
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        uint32_t sum;
        memcpy(&sum, &magnitude, 4);
        return uint16_t(sign | (sum - 0x3f000000u));
    }
    return uint16_t(sign | (bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13);
}

template <int H, size_t I>
constexpr int lower_index() { return (I & H) == 0 ? int(I) : int(I) + WIDTH - H; }
template <int H, size_t I>
constexpr int upper_index() { return (I & H) == 0 ? int(I) + H : int(I) + WIDTH; }

template <int H, size_t... I>
NEARFIELD_INLINE void exchange(vec *rows, std::index_sequence<I...>) {
    for (int i = 0; i < WIDTH; i++)
        if ((i & H) == 0) {
            vec a = rows[i], b = rows[i + H];
            rows[i] = __builtin_shufflevector(a, b, lower_index<H, I>()...);
            rows[i + H] = __builtin_shufflevector(a, b, upper_index<H, I>()...);
        }
}

template <int H>
NEARFIELD_INLINE void transpose_from(vec *rows) {
    if constexpr (H < WIDTH) {
        exchange<H>(rows, std::make_index_sequence<WIDTH>());
        transpose_from<2 * H>(rows);
    }
}

// The 32-bit numbers of LANES rows, wherever they lie, as [columns][LANES]; columns is a multiple of WIDTH.
inline void transpose_in(const float *const *rows, int64_t columns, float *to) {
    for (int64_t j = 0; j < columns; j += WIDTH)
        for (int i = 0; i < LANES; i += WIDTH) {
            vec square[WIDTH];
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) square[k] = load(rows[i + k] + j);
            transpose_from<1>(square);
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) store(to + (j + k) * LANES + i, square[k]);
        }
}

// [columns][LANES] times a factor of each lane to `count` rows, wherever they lie.
inline void transpose_out(const float *from, int64_t columns, const float *factor, float *const *rows, int count) {
    for (int i = 0; i < count; i += WIDTH)
        for (int64_t j = 0; j < columns; j += WIDTH) {
            vec square[WIDTH], scale = load(factor + i);
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) square[k] = load(from + (j + k) * LANES + i) * scale;
            transpose_from<1>(square);
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++)
                if (i + k < count) store(rows[i + k] + j, square[k]);
        }
}

}  // namespace
}  // namespace nearfield
