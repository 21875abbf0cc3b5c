// Linear attention step by step. A head's state is a matrix,
//
//   S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,    o_t = scale q_t S_t,
//
// and all its derivatives are recurrences of this kind: "rows" of the state meet broadcast numbers, "lanes" vectors.
// A block of rows of one vector of lanes each stays in registers while a walk passes over a chunk of positions.
// Every step multiplies by exp(g_t) <= 1 and nothing divides, so nothing overflows however long the sequence is.
#pragma once
#include "rows.h"

namespace nearfield {
namespace {

constexpr int CHUNK = 64;  // positions packed at once; a backward keeps a state for each

// Rows of a state that fill the registers, in steps of 8.
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 24;
#elif defined(__aarch64__)
constexpr int MOST_ROWS = 16;
#else
constexpr int MOST_ROWS = 8;
#endif

// What a decay is one number for: nothing, a head, a row of the state, a lane of it.
enum Decay { NONE, ONE, ROWS_EACH, LANES_EACH };

// exp(g) as a sum of `factor` and of 1 where `keep` has all its bits: a slow decay is factor = exp(g) - 1, whose
// rounding is a share of g. That of exp(g) itself, 3e-8 at each step, would add up over thousands of them.
NEARFIELD_INLINE void decay_of(vec g, vec *factor, ivec *keep) {
    constexpr float LOW = 1.92596299e-8f;  // log2(e) - LOG2E
    g = g < splat(-110.0f) ? splat(-110.0f) : g;  // far enough for 0; keeps a NaN
    g = g > splat(89.0f) ? splat(89.0f) : g;
    vec shift = splat(12582912.0f), sum = g * LOG2E + shift, whole = sum - shift;  // 1.5 * 2^23 rounds
    vec f = (g * LOG2E - whole) + g * LOW;
    vec p = f * 1.54614475e-4f + 1.33908674e-3f;  // (2^f - 1) / f on [-1/2, 1/2], within 1.3e-8
    p = p * f + 9.61805667e-3f;
    p = p * f + 5.55035710e-2f;
    p = p * f + 2.40226509e-1f;
    p = p * f + 6.93147188e-1f;
    p = p * f;
    *keep = (ivec)(whole == vec{});
    // 2^whole in two factors, for it may be smaller than any normal number, or larger
    ivec number = __builtin_convertvector(whole == whole ? whole : vec{}, ivec), half = number >> 1;
    vec power = (vec)((half + 127) << 23) * (vec)((number - half + 127) << 23);
    *factor = *keep ? p : power + power * p;
}

NEARFIELD_INLINE vec decayed(vec state, vec factor, ivec keep) { return state * factor + (vec)((ivec)state & keep); }

enum Does {
    READS = 1,     // gives outputs; otherwise only the state moves on
    REVERSED = 2,  // from the last position to the first, and the state decays after a step instead of before
    TRACES = 4,    // forward: keeps the decayed state of each step; reversed: adds up its products with the own state
    SECONDS = 8,   // forward: reads the decayed state as well; reversed: adds a second product, after reading
};

// A walk over `count` positions; what belongs to neighbouring positions lies row_stride, lane_stride or, for a decay,
// decay_stride apart. The columns of the state lie side by side.
struct Pass {
    int count;
    int64_t row_stride, lane_stride, decay_stride, state_stride;
    const float *in_rows, *in_lanes;  // the state grows by their product
    const float *out_rows;
    float *out;  // lanes: grows by out_rows times the state
    const float *second_rows, *second_lanes;
    float *second_out;
    const float *factor;
    const int32_t *keep;
    const float *from;  // the state before
    float *to;          // and after, unless NULL
    float *trace, *dot;
};

// Rows row, …, row + R - 1 of the state, lanes lane, …, lane + WIDTH - 1.
template <int DECAY, int DOES, int R>
void walk(const Pass &w, int64_t row, int64_t lane) {
    constexpr bool IS_REVERSED = (DOES & REVERSED) != 0;
    vec state[R];
    const float *from = w.from + row * w.state_stride + lane;
#pragma GCC unroll 24
    for (int r = 0; r < R; r++) state[r] = load(from + r * w.state_stride);
    for (int i = 0; i < w.count; i++) {
        int64_t t = IS_REVERSED ? w.count - 1 - i : i;
        const float *in = w.in_rows + t * w.row_stride + row, *out = nullptr, *second = nullptr, *factors = nullptr;
        const int32_t *keeps = nullptr;
        int64_t at = t * w.lane_stride + lane;
        vec x = load(w.in_lanes + at), y{}, sum[2] = {}, other[2] = {}, dot[2] = {}, factor{};
        ivec keep{};
        if constexpr (DOES & READS) out = w.out_rows + t * w.row_stride + row, sum[0] = load(w.out + at);
        if constexpr (DOES & SECONDS) {
            second = w.second_rows + t * w.row_stride + row;
            if constexpr (IS_REVERSED)
                y = load(w.second_lanes + at);
            else
                other[0] = load(w.second_out + at);
        }
        if constexpr (DECAY != NONE) {
            factors = w.factor + t * w.decay_stride, keeps = w.keep + t * w.decay_stride;
            if constexpr (DECAY == ONE) factor = splat(*factors), keep = splat_int(*keeps);
            if constexpr (DECAY == LANES_EACH) factor = load(factors + lane), keep = load_int(keeps + lane);
        }
        float *trace = nullptr;
        if constexpr (DOES & TRACES) trace = w.trace + t * R * WIDTH;
        if constexpr ((DOES & TRACES) && IS_REVERSED) dot[0] = load(w.dot + at);
        auto decay = [&](int r, vec s) {
            if constexpr (DECAY == NONE) return s;
            if constexpr (DECAY == ROWS_EACH) return decayed(s, splat(factors[row + r]), splat_int(keeps[row + r]));
            return decayed(s, factor, keep);
        };
#pragma GCC unroll 24
        for (int r = 0; r < R; r++) {
            vec s = state[r];
            if constexpr (!IS_REVERSED) {
                s = decay(r, s);
                if constexpr (DOES & TRACES) store(trace + r * WIDTH, s);
                if constexpr (DOES & SECONDS) other[r % 2] += s * second[r];
            }
            s += x * in[r];
            if constexpr (DOES & READS) sum[r % 2] += s * out[r];
            if constexpr (IS_REVERSED) {
                if constexpr (DOES & SECONDS) s += y * second[r];
                if constexpr (DOES & TRACES) dot[r % 2] += s * load(trace + r * WIDTH);
                s = decay(r, s);
            }
            state[r] = s;
        }
        if constexpr (DOES & READS) store(w.out + at, sum[0] + sum[1]);
        if constexpr ((DOES & SECONDS) && !IS_REVERSED) store(w.second_out + at, other[0] + other[1]);
        if constexpr ((DOES & TRACES) && IS_REVERSED) store(w.dot + at, dot[0] + dot[1]);
    }
    if (!w.to) return;
    float *to = w.to + row * w.state_stride + lane;
#pragma GCC unroll 24
    for (int r = 0; r < R; r++) store(to + r * w.state_stride, state[r]);
}

// Calls run(row, number of rows as a constant) for blocks that make up `rows`, a multiple of 8.
template <class Run>
NEARFIELD_INLINE void each_block(int64_t rows, Run run) {
    for (int64_t row = 0; row < rows;) {
        int64_t left = rows - row;
        if (MOST_ROWS >= 24 && left >= 24 && left != 32)
            run(row, std::integral_constant<int, MOST_ROWS>()), row += 24;
        else if (MOST_ROWS >= 16 && left >= 16)
            run(row, std::integral_constant<int, 16 < MOST_ROWS ? 16 : MOST_ROWS>()), row += 16;
        else
            run(row, std::integral_constant<int, 8>()), row += 8;
    }
}

// The delta rule writes what a key's value lacks, S_t = S' + k_t e_t^T with S' = diag(exp(g_t)) S_{t-1} and
// e_t = beta_t (v_t - S'^T k_t): a step needs all rows twice. So the state lies in memory, and one pass over its rows
// ends a step and begins the next. `in_lanes` holds v and becomes v - S'^T k.
struct Delta : Pass {
    float *lanes;
    const float *beta;
};

// N vectors of lanes from `lane` on, `rows` rows.
template <int DECAY, int DOES, int N>
void walk_delta(const Delta &w, int64_t rows, int64_t lane) {
    vec factor{}, e[N], u[N] = {};
    ivec keep{};
    const float *factors = nullptr, *key = nullptr, *next = nullptr;
    const int32_t *keeps = nullptr;
    auto begin = [&](int64_t t) {
        key = next, next = w.in_rows + t * w.row_stride;
        if constexpr (DECAY != NONE) factors = w.factor + t * w.decay_stride, keeps = w.keep + t * w.decay_stride;
        if constexpr (DECAY == ONE) factor = splat(*factors), keep = splat_int(*keeps);
        for (int n = 0; n < N; n++) u[n] = vec{};
    };
    auto decay = [&](int64_t r, vec s) {
        if constexpr (DECAY == NONE) return s;
        if constexpr (DECAY == ROWS_EACH) return decayed(s, splat(factors[r]), splat_int(keeps[r]));
        return decayed(s, factor, keep);
    };
    float *state = w.to + lane;
    begin(0);
    for (int64_t r = 0; r < rows; r++)
        for (int n = 0; n < N; n++) {
            float *at = state + r * w.state_stride + n * WIDTH;
            vec s = decay(r, load(at));
            store(at, s);
            u[n] += s * next[r];
        }
    for (int64_t t = 0; t < w.count; t++) {
        float *at = w.lanes + t * w.lane_stride + lane;
        for (int n = 0; n < N; n++) {
            vec lacks = load(at + n * WIDTH) - u[n];
            store(at + n * WIDTH, lacks);
            e[n] = lacks * w.beta[t];
        }
        const float *query = nullptr;
        if constexpr (DOES & READS) query = w.out_rows + t * w.row_stride;
        vec sum[N] = {};
        auto pass = [&](auto is_last) {
            for (int64_t r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    float *cell = state + r * w.state_stride + n * WIDTH;
                    vec s = load(cell) + e[n] * (is_last.value ? next[r] : key[r]);
                    if constexpr (DOES & READS) sum[n] += s * query[r];
                    if constexpr (!is_last.value) {
                        s = decay(r, s);
                        u[n] += s * next[r];
                    }
                    store(cell, s);
                }
        };
        if (t + 1 < w.count) {
            begin(t + 1);
            pass(std::false_type());
        } else {
            pass(std::true_type());
        }
        if constexpr (DOES & READS)
            for (int n = 0; n < N; n++) store(w.out + t * w.lane_stride + lane + n * WIDTH, sum[n]);
    }
}

// Backward through the same steps. With G the gradient of S_t, grown by the product of q_t and the gradient of o_t
// (`in_rows`, `in_lanes`), that of e_t is G^T k_t: it goes to `out`. Then G' = G - beta k_t (G^T k_t)^T decays.
template <int DECAY, int N>
void walk_delta_back(const Delta &w, int64_t rows, int64_t lane) {
    float *state = w.to + lane;
    vec x[N], minus[N] = {}, sum[N];
    const float *factors = nullptr, *key = w.out_rows;  // of the step that ends; before the first `minus` is 0
    const int32_t *keeps = nullptr;
    vec factor{};
    ivec keep{};
    auto pass = [&](auto ends, auto begins, const float *query, const float *next) {
        for (int64_t r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                float *cell = state + r * w.state_stride + n * WIDTH;
                vec s = load(cell);
                if constexpr (ends.value) {
                    s += minus[n] * key[r];
                    if constexpr (DECAY == ROWS_EACH)
                        s = decayed(s, splat(factors[r]), splat_int(keeps[r]));
                    else if constexpr (DECAY == ONE)
                        s = decayed(s, factor, keep);
                }
                if constexpr (begins.value) {
                    s += x[n] * query[r];
                    sum[n] += s * next[r];
                }
                store(cell, s);
            }
    };
    for (int64_t t = w.count - 1; t >= 0; t--) {
        int64_t at = t * w.lane_stride + lane;
        for (int n = 0; n < N; n++) x[n] = load(w.in_lanes + at + n * WIDTH), sum[n] = vec{};
        const float *query = w.in_rows + t * w.row_stride, *next = w.out_rows + t * w.row_stride;
        if (t == w.count - 1)
            pass(std::false_type(), std::true_type(), query, next);
        else
            pass(std::true_type(), std::true_type(), query, next);
        key = next;
        for (int n = 0; n < N; n++) {
            store(w.out + at + n * WIDTH, sum[n]);
            minus[n] = sum[n] * -w.beta[t];
        }
        if constexpr (DECAY != NONE) factors = w.factor + t * w.decay_stride, keeps = w.keep + t * w.decay_stride;
        if constexpr (DECAY == ONE) factor = splat(*factors), keep = splat_int(*keeps);
    }
    pass(std::true_type(), std::false_type(), nullptr, nullptr);
}

// Calls run(lane, number of vectors as a constant) for stretches that make up `lanes`, a multiple of LANES.
template <class Run>
NEARFIELD_INLINE void each_stretch(int64_t lanes, Run run) {
    int64_t lane = 0;
    for (; lane + 4 * WIDTH <= lanes; lane += 4 * WIDTH) run(lane, std::integral_constant<int, 4>());
    for (; lane + 2 * WIDTH <= lanes; lane += 2 * WIDTH) run(lane, std::integral_constant<int, 2>());
    for (; lane < lanes; lane += WIDTH) run(lane, std::integral_constant<int, 1>());
}

}  // namespace
}  // namespace nearfield
