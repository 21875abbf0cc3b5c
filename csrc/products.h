// The three products of attention, each with 16 lanes and one broadcast number a step, so that keys and values
// are read where they lie and nothing is summed across lanes.
//
//   scores      C[slot][lane]      = sum over t of A[row of slot][t] * B[t][lane]       lanes are queries
//   accumulate  C[r][lane]        += sum over slots of A[row of slot][r] * B[slot][lane]
//   scatter     C[row of slot][v] += sum over t of A[slot][t] * B[t][v]                 lanes are channels
//
// A step is one float, or, where the machine multiplies them, a pair of bfloat16: the same 32-bit unit.
#pragma once
#include "vec.h"

namespace nearfield {
namespace {

struct Single {  // float times float
    static constexpr int PACK = 1;
    static NEARFIELD_INLINE vec dot(vec sum, vec b, const float *a) { return sum + b * *a; }
};

#if defined(__AVX512BF16__)
struct Pair {  // two bfloat16 times two bfloat16, summed in float
    static constexpr int PACK = 2;
    static NEARFIELD_INLINE vec dot(vec sum, vec b, const float *a) {
        int32_t bits;
        memcpy(&bits, a, 4);
        return _mm512_dpbf16_ps(sum, (__m512bh)(__m512)b, (__m512bh)_mm512_set1_epi32(bits));
    }
};
#endif

// Rows that fill the registers beside one row of B.
#if defined(__AVX512F__)
constexpr int ROWS = 8, COLUMNS = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int ROWS = 4, COLUMNS = 1;
#else
constexpr int ROWS = 2, COLUMNS = 1;
#endif

// `slots` is a multiple of ROWS.
template <class P>
void scores(const float *a, int64_t a_stride, const int32_t *row, const float *b, float *c, int slots, int steps) {
    for (int first = 0; first < slots; first += ROWS, c += ROWS * LANES) {
        vec sum[ROWS][PARTS] = {};
        const float *at[ROWS];
        for (int r = 0; r < ROWS; r++) at[r] = a + row[first + r] * a_stride;
        for (int t = 0; t < steps; t++) {
            vec x[PARTS];
            for (int p = 0; p < PARTS; p++) x[p] = load(b + t * LANES + p * WIDTH);
            for (int r = 0; r < ROWS; r++)
                for (int p = 0; p < PARTS; p++) sum[r][p] = P::dot(sum[r][p], x[p], at[r] + t);
        }
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < PARTS; p++) store(c + r * LANES + p * WIDTH, sum[r][p]);
    }
}

// R rows of `accumulate`; slots come in steps of P::PACK neighbours, of which A holds a row for the first.
template <class P, int R>
NEARFIELD_INLINE void accumulate_rows(const float *a, int64_t a_stride, const int32_t *row, const float *b, float *c,
                                      int steps) {
    vec sum[R][PARTS];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < PARTS; p++) sum[r][p] = load(c + r * LANES + p * WIDTH);
    for (int t = 0; t < steps; t++) {
        const float *at = a + row[t * P::PACK] * a_stride;
        vec x[PARTS];
        for (int p = 0; p < PARTS; p++) x[p] = load(b + t * LANES + p * WIDTH);
        for (int r = 0; r < R; r++)
            for (int p = 0; p < PARTS; p++) sum[r][p] = P::dot(sum[r][p], x[p], at + r);
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < PARTS; p++) store(c + r * LANES + p * WIDTH, sum[r][p]);
}

template <class P>
void accumulate(const float *a, int64_t a_stride, const int32_t *row, const float *b, float *c, int rows, int steps) {
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS) accumulate_rows<P, ROWS>(a + r, a_stride, row, b, c + r * LANES, steps);
    if constexpr (ROWS > 4)
        for (; r + 4 <= rows; r += 4) accumulate_rows<P, 4>(a + r, a_stride, row, b, c + r * LANES, steps);
    if constexpr (ROWS > 2)
        for (; r + 2 <= rows; r += 2) accumulate_rows<P, 2>(a + r, a_stride, row, b, c + r * LANES, steps);
    for (; r < rows; r++) accumulate_rows<P, 1>(a + r, a_stride, row, b, c + r * LANES, steps);
}

template <class P, int V>
NEARFIELD_INLINE void scatter_columns(const float *a, const int32_t *row, const float *b, float *c, int64_t stride,
                                      int slots) {
    constexpr int STEPS = LANES / P::PACK;
    for (int first = 0; first < slots; first += ROWS, a += ROWS * STEPS) {
        vec sum[ROWS][V * PARTS];
        float *at[ROWS];
        for (int r = 0; r < ROWS; r++) {
            at[r] = c + row[first + r] * stride;
            for (int p = 0; p < V * PARTS; p++) sum[r][p] = load(at[r] + p * WIDTH);
        }
        for (int t = 0; t < STEPS; t++) {
            vec x[V * PARTS];
            for (int p = 0; p < V * PARTS; p++) x[p] = load(b + t * stride + p * WIDTH);
            for (int r = 0; r < ROWS; r++)
                for (int p = 0; p < V * PARTS; p++) sum[r][p] = P::dot(sum[r][p], x[p], a + r * STEPS + t);
        }
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < V * PARTS; p++) store(at[r] + p * WIDTH, sum[r][p]);
    }
}

// `slots` is a multiple of ROWS, and rows repeat only among slots whose row is never read; `stride`, of B and C,
// is a multiple of LANES.
template <class P>
void scatter(const float *a, const int32_t *row, const float *b, float *c, int64_t stride, int slots) {
    int64_t v = 0;
    for (; v + COLUMNS * LANES <= stride; v += COLUMNS * LANES)
        scatter_columns<P, COLUMNS>(a, row, b + v, c + v, stride, slots);
    for (; v < stride; v += LANES) scatter_columns<P, 1>(a, row, b + v, c + v, stride, slots);
}

}  // namespace
}  // namespace nearfield
