// How one problem is cut: which queries share a row of lanes, which rows of lanes share packed keys.
//
// Tokens of one dilation group on every axis, of one batch entry and one key/value head, are a *plane*: a dense
// grid of its own. Sixteen queries of a plane, a small box of positions times heads of the group, are one row of
// lanes. A *tile* of such boxes is a task; the keys lie on a lattice of *units*, each packed once for a tile.
#pragma once
#include "nearfield.h"
#include <initializer_list>

#include "vec.h"

namespace nearfield {
namespace {

// One axis of a plane: positions inside one dilation group.
struct PlaneAxis {
    int64_t length, first_query;  // tokens of the group, position of its first query (below 0: more queries than tokens)
    int64_t kernel_size, stride, left;
    bool is_causal, is_shifted;
    int64_t low, high;  // positions that windows may reach: outside of [0, length) only for border "pad" with a bias

    // The window [start, end) of the query at `position`: Axis.interval of geometry.py, cut to [low, high).
    void window(int64_t position, int64_t *start, int64_t *end) const {
        int64_t last = length - 1, run = position / stride * stride;
        if (is_causal) {
            *start = least(run + stride - 1, last) - kernel_size + 1;
            *end = position + 1;
        } else {
            *start = least(run + stride / 2, last) - left;
            if (is_shifted) *start = least(*start, length - kernel_size);
            *end = most(*start, is_shifted ? int64_t(0) : *start) + kernel_size;
        }
        *start = most(*start, low);
        *end = least(*end, high);
    }

    // Keys in the window of border "pad", those outside included.
    int64_t padded_size(int64_t position) const {
        if (!is_causal) return kernel_size;
        return position + 1 - (least(position / stride * stride + stride - 1, length - 1) - kernel_size + 1);
    }

    int64_t queries() const { return most(length - first_query, int64_t(0)); }

    // Queries are taken in boxes of `side`. Those of one long stride share a window, so no box goes beyond them.
    bool keeps_to_strides(int64_t side) const { return side <= stride && first_query == 0; }
    int64_t boxes(int64_t side) const {
        if (!keeps_to_strides(side)) return ceil_div(queries(), side);
        return queries() / stride * ceil_div(stride, side) + ceil_div(queries() % stride, side);
    }
    void box(int64_t side, int64_t number, int64_t *from, int64_t *to) const {
        if (keeps_to_strides(side)) {
            int64_t in_stride = ceil_div(stride, side), first = number / in_stride * stride;
            *from = first + number % in_stride * side;
            *to = least(least(*from + side, first + stride), length);
        } else {
            *from = first_query + number * side;
            *to = least(*from + side, length);
        }
    }

    // Keys seen by boxes of `side`, summed over the boxes; long axes are sampled.
    double seen(int64_t side) const {
        int64_t all = boxes(side), sampled = least(all, int64_t(256));
        double sum = 0;
        for (int64_t i = 0; i < sampled; i++) {
            int64_t from, to, start, end, unused;
            box(side, i, &from, &to);
            window(from, &start, &unused);
            window(to - 1, &unused, &end);
            sum += double(end - start);
        }
        return sum * double(all) / double(most(sampled, int64_t(1)));
    }
};

inline PlaneAxis plane_axis(const nearfield_attention &problem, int number, int64_t group) {
    const nearfield_axis &axis = problem.axis[number];
    int64_t first = number == 2 ? problem.first_query : 0;
    PlaneAxis made;
    made.length = ceil_div(axis.size - group, axis.dilation);
    made.first_query = first > group ? ceil_div(first - group, axis.dilation) : least(first, int64_t(0));
    made.kernel_size = axis.kernel_size;
    made.stride = axis.stride;
    made.left = axis.kernel_size / 2;
    made.is_causal = axis.is_causal != 0;
    made.is_shifted = problem.border == NEARFIELD_SHIFT;
    // Zero keys outside have the logits of the bias; without one they are counted, not visited (lanes.h).
    bool pads = problem.border == NEARFIELD_PAD && problem.bias;
    made.low = pads ? 1 - axis.kernel_size : 0;
    made.high = pads && !made.is_causal ? made.length + axis.kernel_size - 1 : made.length;
    return made;
}

constexpr int64_t UNIT_ROWS = 1024;           // keys of a unit at most
constexpr int64_t UNIT_BYTES = 256 << 10;     // a unit and a tile fill about half of a second-level cache
constexpr int64_t TILE_BYTES = 320 << 10;
constexpr int64_t TILE_ROWS = 64;             // rows of lanes in a tile at most

// The problem with what means nothing set to what cannot overflow: strides along axes of one entry, dilations beyond
// the axis.
inline nearfield_attention normalised(nearfield_attention p) {
    int64_t keys[5] = {p.batch, 0, 0, 0, p.kv_heads}, queries[5] = {p.batch, 0, 0, 0, p.heads};
    for (int a = 0; a < 3; a++) {
        p.axis[a].dilation = least(p.axis[a].dilation, p.axis[a].size);
        keys[a + 1] = queries[a + 1] = p.axis[a].size;
    }
    queries[3] -= p.first_query;
    int64_t additional[5] = {p.batch, 1, 1, p.num_additional, p.kv_heads};
    auto settle = [](nearfield_tensor &x, const int64_t *sides) {
        for (int i = 0; i < 5; i++)
            if (sides[i] <= 1) x.stride[i] = 0;
    };
    for (nearfield_tensor *x : {&p.query, &p.out, &p.lse, &p.grad_out, &p.grad_lse, &p.grad_query}) settle(*x, queries);
    for (nearfield_tensor *x : {&p.key, &p.value, &p.grad_key, &p.grad_value}) settle(*x, keys);
    for (nearfield_tensor *x : {&p.additional_key, &p.additional_value, &p.grad_additional_key, &p.grad_additional_value})
        settle(*x, additional);
    return p;
}

struct Plan {
    const nearfield_attention *problem;
    int64_t group;             // query heads of a key/value head
    int64_t groups[3];         // dilation groups that hold tokens
    int64_t planes;            // of one batch entry and key/value head
    int64_t box[4];            // positions on z, y, x and heads that share a row of lanes
    int64_t head_boxes;
    int64_t tile[3];           // boxes of a tile
    int64_t tiles[3];          // tiles of the largest plane
    int64_t unit[3];           // keys of a unit
    int64_t units[3];          // units of the largest plane
    double work;               // products of a number and a row of lanes in one forward
    int64_t rows_in_tile() const { return tile[0] * tile[1] * tile[2] * head_boxes; }
    int64_t unit_rows() const { return unit[0] * unit[1] * unit[2]; }
    int64_t tiles_of_plane() const { return tiles[0] * tiles[1] * tiles[2]; }
    int64_t units_of_plane() const { return units[0] * units[1] * units[2]; }
};

// Also the keys that all rows of lanes of a plane read.
inline double choose_box(Plan &plan, const PlaneAxis *axis) {
    double seen[3][LANES + 1];
    for (int a = 0; a < 3; a++)
        for (int side = 1; side <= LANES; side++)
            seen[a][side] = side <= most(axis[a].queries(), int64_t(1)) ? axis[a].seen(side) : -1;
    double best = -1;
    for (int h = 1; h <= least(plan.group, int64_t(LANES)); h++)
        for (int z = 1; z * h <= LANES && seen[0][z] >= 0; z++)
            for (int y = 1; y * z * h <= LANES && seen[1][y] >= 0; y++)
                for (int x = 1; x * y * z * h <= LANES && seen[2][x] >= 0; x++) {
                    double boxes = double(ceil_div(plan.group, int64_t(h)));
                    double keys = seen[0][z] * seen[1][y] * seen[2][x] * boxes;
                    int64_t sides[3] = {z, y, x};
                    for (int a = 0; a < 3; a++) boxes *= double(axis[a].boxes(sides[a]));
                    double cost = keys + 24 * boxes;  // a row of lanes costs about as much as 24 keys
                    if (best < 0 || cost < best) {
                        best = cost;
                        plan.box[0] = z, plan.box[1] = y, plan.box[2] = x, plan.box[3] = h;
                    }
                }
    return best;
}

// Doubles sides, first those that are short for what windows reach beyond them, while the box stays within `entries`.
inline void widen(int64_t *side, const int64_t *limit, int64_t entries, const double *reach) {
    while (2 * side[0] * side[1] * side[2] <= entries) {
        int widest = -1;
        for (int a = 0; a < 3; a++)
            if (side[a] < limit[a] && (widest < 0 || reach[a] / double(side[a]) >= reach[widest] / double(side[widest])))
                widest = a;
        if (widest < 0) return;
        side[widest] = least(2 * side[widest], limit[widest]);
    }
}

// `row_bytes`: memory of one row of lanes; `key_bytes`: of one packed key.
inline Plan make_plan(const nearfield_attention &problem, int64_t row_bytes, int64_t key_bytes) {
    Plan plan;
    plan.problem = &problem;
    plan.group = problem.heads / problem.kv_heads;
    plan.planes = 1;
    PlaneAxis axis[3];
    for (int a = 0; a < 3; a++) {
        plan.groups[a] = least(problem.axis[a].dilation, problem.axis[a].size);
        plan.planes *= plan.groups[a];
        axis[a] = plane_axis(problem, a, 0);
        axis[a].first_query = axis[a].length - ceil_div(problem.axis[a].size - (a == 2 ? problem.first_query : 0),
                                                        problem.axis[a].dilation);  // the most that a group has
    }
    plan.work = choose_box(plan, axis) * double(plan.planes * problem.batch * problem.kv_heads) *
                double(problem.head_dim + problem.value_dim);
    plan.head_boxes = ceil_div(plan.group, plan.box[3]);

    int64_t boxes[3], window[3];
    for (int a = 0; a < 3; a++) {
        boxes[a] = most(axis[a].boxes(plan.box[a]), int64_t(1));
        window[a] = least(axis[a].kernel_size, axis[a].high - axis[a].low);
        plan.tile[a] = 1;
    }
    int64_t most_rows = most(least(TILE_BYTES / row_bytes, TILE_ROWS), int64_t(1));
    double reach[3];
    for (int a = 0; a < 3; a++) reach[a] = double(window[a]) / double(plan.box[a]);
    widen(plan.tile, boxes, most_rows / plan.head_boxes, reach);
    for (int a = 0; a < 3; a++) {
        plan.tiles[a] = ceil_div(boxes[a], plan.tile[a]);
        plan.tile[a] = ceil_div(boxes[a], plan.tiles[a]);
        plan.unit[a] = 1;
    }
    int64_t most_keys = most(least(UNIT_BYTES / key_bytes, UNIT_ROWS), int64_t(16)), keys[3];
    for (int a = 0; a < 3; a++) {
        keys[a] = axis[a].high - axis[a].low;
        reach[a] = double(window[a] + plan.tile[a] * plan.box[a]);
    }
    widen(plan.unit, keys, most_keys, reach);
    for (int a = 0; a < 3; a++) {
        plan.units[a] = ceil_div(keys[a], plan.unit[a]);
        plan.unit[a] = ceil_div(keys[a], plan.units[a]);
    }
    return plan;
}

// A plane of a problem: batch entry, key/value head and dilation groups.
struct Plane {
    int64_t batch, kv_head, group[3];
    PlaneAxis axis[3];
};

inline Plane make_plane(const Plan &plan, int64_t batch, int64_t kv_head, int64_t number) {
    Plane plane;
    plane.batch = batch;
    plane.kv_head = kv_head;
    for (int a = 2; a >= 0; a--) {
        plane.group[a] = number % plan.groups[a];
        number /= plan.groups[a];
        plane.axis[a] = plane_axis(*plan.problem, a, plane.group[a]);
    }
    return plane;
}

// A box of positions [from, to) on each axis.
struct Box {
    int64_t from[3], to[3];
    bool empty() const { return from[0] >= to[0] || from[1] >= to[1] || from[2] >= to[2]; }
};

inline Box common(const Box &a, const Box &b) {
    Box box;
    for (int i = 0; i < 3; i++) box.from[i] = most(a.from[i], b.from[i]), box.to[i] = least(a.to[i], b.to[i]);
    return box;
}

inline Box unit_box(const Plan &plan, const Plane &plane, int64_t number) {
    Box box;
    for (int a = 2; a >= 0; a--) {
        box.from[a] = plane.axis[a].low + number % plan.units[a] * plan.unit[a];
        box.to[a] = least(box.from[a] + plan.unit[a], plane.axis[a].high);
        number /= plan.units[a];
    }
    return box;
}

}  // namespace
}  // namespace nearfield
