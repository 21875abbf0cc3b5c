// The keys that a block of queries of local linear attention sees, packed side by side less a mean of them: that
// changes neither weights nor outputs, and what is left cancels less in a covariance.
#pragma once
#include "attention.h"

namespace nearfield {
namespace {

constexpr int64_t LLA_BLOCK = 64;    // queries for which keys are packed once
constexpr int64_t LLA_CHUNK = 4096;  // numbers of keys that stay in the first-level cache between two products

struct LlaDims {
    int64_t head, value, head_wide, value_wide;  // channels, and these up to whole rows of lanes
    int64_t most_keys;                           // that the queries of a block see
    int64_t chunk;                               // keys of a product

    explicit LlaDims(const nearfield_lla &p) : head(p.head_dim), value(p.value_dim) {
        head_wide = round_up(head, int64_t(LANES)), value_wide = round_up(value, int64_t(LANES));
        most_keys = least(p.num_keys, least(p.kernel_size, p.num_keys) + LLA_BLOCK - 1);
        chunk = least(most(LLA_CHUNK / most(head_wide, value_wide), int64_t(LANES)), int64_t(SLOTS));
        chunk -= chunk % LANES;
    }
};

struct Range {
    int64_t from, to;
};

// The keys of a query's window.
inline Range lla_window(const nearfield_lla &p, int64_t query) {
    int64_t token = query + p.num_keys - p.num_queries,
            from = token - (p.is_causal ? p.kernel_size - 1 : p.kernel_size / 2);
    if (!p.is_causal && p.border == NEARFIELD_SHIFT) from = most(least(from, p.num_keys - p.kernel_size), int64_t(0));
    return {most(from, int64_t(0)), least(p.is_causal ? token + 1 : from + p.kernel_size, p.num_keys)};
}

// The keys that the queries [first, last) see.
inline Range lla_reach(const nearfield_lla &p, int64_t first, int64_t last) {
    return {lla_window(p, first).from, lla_window(p, last - 1).to};
}

inline char *lla_row(const nearfield_tensor &x, int64_t bytes, int64_t batch, int64_t token, int64_t head) {
    return address(x, bytes, batch, 0, 0, token, head);
}

// The unmasked keys and the values that the queries of one block see, side by side.
//
// A row that holds a NaN or an infinity is packed as zeros and listed: who does not see it must not meet it.
struct LlaPacked {
    float *keys, *values, *shift;
    int32_t *place;  // of a token, counted from the reach: how many rows lie before it
    int32_t *token;  // of a row, counted from the reach
    int32_t *odd_keys, *odd_values, count, num_odd_keys, num_odd_values;
    Range reach;

    void put(Arena &arena, const LlaDims &d) {
        keys = arena.take<float>((d.most_keys + ROWS) * d.head_wide);
        values = arena.take<float>((d.most_keys + ROWS) * d.value_wide);
        shift = arena.take<float>(d.head_wide);
        place = arena.take<int32_t>(d.most_keys + 1);
        token = arena.take<int32_t>(d.most_keys + ROWS);
        odd_keys = arena.take<int32_t>(d.most_keys);
        odd_values = arena.take<int32_t>(d.most_keys);
    }

    // Reads a row; whether all of its numbers are finite.
    static bool read(const char *from, int64_t dtype, int64_t channels, int64_t wide, float *to) {
        read_units<Single>(from, dtype, channels, to, wide);
        vec sum{};
        for (int64_t c = 0; c < wide; c += WIDTH) sum += load(to + c) * 0.0f;  // 0, or NaN
        if (!any((ivec)(sum != sum))) return true;
        memset(to, 0, sizeof(float) * size_t(wide));
        return false;
    }

    void fill(const nearfield_lla &p, const LlaDims &d, int64_t batch, int64_t kv_head, int64_t first, int64_t last) {
        int64_t bytes = item_bytes(p.dtype), key_step = bytes * p.key.stride[3], value_step = bytes * p.value.stride[3];
        reach = lla_reach(p, first, last);
        count = num_odd_keys = num_odd_values = 0;
        for (int64_t t = reach.from; t < reach.to; t++) {
            place[t - reach.from] = count;
            if (p.key_mask && !p.key_mask[batch * p.num_keys + t]) continue;
            const char *key = lla_row(p.key, bytes, batch, t, kv_head),
                       *value = lla_row(p.value, bytes, batch, t, kv_head);
            prefetch(key, AHEAD * key_step, bytes * d.head);
            prefetch(value, AHEAD * value_step, bytes * d.value);
            if (!read(key, p.dtype, d.head, d.head_wide, keys + count * d.head_wide)) odd_keys[num_odd_keys++] = count;
            if (!read(value, p.dtype, d.value, d.value_wide, values + count * d.value_wide))
                odd_values[num_odd_values++] = count;
            token[count++] = int32_t(t - reach.from);
        }
        place[reach.to - reach.from] = count;
        memset(keys + count * d.head_wide, 0, sizeof(float) * size_t(ROWS * d.head_wide));
        memset(values + count * d.value_wide, 0, sizeof(float) * size_t(ROWS * d.value_wide));
        centre(p, d, first, last);
    }

    // The rows of a query's window.
    Range seen(const nearfield_lla &p, int64_t query) const {
        Range window = lla_window(p, query);
        return {place[window.from - reach.from], place[window.to - reach.from]};
    }

    // Subtracts the mean of what the first query that sees numbers sees: no later token has a part in it.
    void centre(const nearfield_lla &p, const LlaDims &d, int64_t first, int64_t last) {
        Range rows{0, 0};
        int64_t numbers = 0;
        for (int64_t q = first; q < last && !numbers; q++) {
            rows = seen(p, q), numbers = rows.to - rows.from;
            for (int n = 0; n < num_odd_keys; n++) numbers -= rows.from <= odd_keys[n] && odd_keys[n] < rows.to;
        }
        memset(shift, 0, sizeof(float) * size_t(d.head_wide));
        const float share = 1.0f / float(most(numbers, int64_t(1)));
        for (int64_t i = rows.from; i < rows.to; i++)
            for (int64_t c = 0; c < d.head_wide; c += WIDTH)
                store(shift + c, load(shift + c) + load(keys + i * d.head_wide + c) * share);
        for (int64_t i = 0; i < count; i++)
            for (int64_t c = 0; c < d.head_wide; c += WIDTH) {
                float *at = keys + i * d.head_wide + c;
                store(at, load(at) - load(shift + c));
            }
    }
};

}  // namespace
}  // namespace nearfield
