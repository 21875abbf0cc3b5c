// Exponentials that keep their digits where a recurrence needs them, and what is made of them.
//
// A decay is kept as 2^k (1 + q), which is exact where it matters: near 1, where thousands of factors follow one
// another, q has all its digits, and near 0 the product has. At step 0 a state does not change by a bit.
#pragma once
#include "vec.h"

namespace nearfield {
namespace {

#if defined(__AVX512F__)
NEARFIELD_INLINE vec whole_part(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
NEARFIELD_INLINE vec power(vec x) { return whole_part(x); }
NEARFIELD_INLINE vec times_power(vec x, vec power) { return _mm512_scalef_ps(x, power); }
NEARFIELD_INLINE vec remainder(vec x, vec power) { return x - power; }
#else
// The power of two itself; 0 or infinite beyond the range of float.
NEARFIELD_INLINE vec power(vec x) {
    const vec shift = splat(12582912.0f);  // 1.5 * 2^23: the sum rounds to a whole number
    x = x < -127.0f ? splat(-127.0f) : x;  // keeps a NaN
    x = x > 128.0f ? splat(128.0f) : x;
    return (vec)(((ivec)(x + shift) + 127) << 23);
}
NEARFIELD_INLINE vec times_power(vec x, vec power) { return x * power; }
NEARFIELD_INLINE vec whole_part(vec x) {
    const vec shift = splat(12582912.0f);
    return (x + shift) - shift;
}
NEARFIELD_INLINE vec remainder(vec x, vec) {
    x = x < -127.0f ? splat(-127.0f) : x;
    return x - whole_part(x);
}
#endif

// 2^f - 1 for f in [-1/2, 1/2], within 3e-8 of it also near 0.
NEARFIELD_INLINE vec exp2_less_1(vec f) {
    vec p = f * 1.5453163e-4f + 1.3390863e-3f;
    p = p * f + 9.6180826e-3f;
    p = p * f + 5.5503571e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    return p * f;
}

// e^x for x <= 0, to the last place: the rounding of x log2(e) would show in small step sizes.
NEARFIELD_INLINE vec exp_of_negative(vec x) {
    x = x < -110.0f ? splat(-110.0f) : x;  // keeps a NaN
    vec k = whole_part(x * LOG2E);
    vec r = x - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    vec y = exp2_less_1(r * LOG2E) + 1.0f;
    return times_power(y, power(k));
}

NEARFIELD_INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

// log(1 + e^x), and its derivative if it is wanted.
NEARFIELD_INLINE vec softplus(vec x, vec *slope) {
    vec y = exp_of_negative(-absolute(x));
    vec t = y / (y + 2.0f), w = t * t;  // log(1 + y) = 2 artanh(t), t <= 1/3
    vec p = w * (1.0f / 13) + 1.0f / 11;
    p = p * w + 1.0f / 9;
    p = p * w + 1.0f / 7;
    p = p * w + 1.0f / 5;
    p = p * w + 1.0f / 3;
    p = p * w + 1.0f;
    if (slope) *slope = (x < 0.0f ? y : splat(1.0f)) / (y + 1.0f);
    return larger(x, vec{}) + 2.0f * t * p;
}

NEARFIELD_INLINE vec sigmoid(vec x) {
    vec y = exp_of_negative(-absolute(x));
    return (x < 0.0f ? y : splat(1.0f)) / (y + 1.0f);
}

}  // namespace
}  // namespace nearfield
