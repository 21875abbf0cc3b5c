// The definition of every kernel, in double, one query at a time: what the checks hold the kernels against.
// Written from nearfield/ops/neighborhood/geometry.py and reference.py, never from the kernels.
#pragma once
#include <cmath>
#include <vector>

#include "../nearfield.h"

namespace nearfield::check {

using Doubles = std::vector<double>;

// The size of the terms that a result sums: the rms it would have if they were independent. Rounding noise is a
// share of this, while the result itself may be next to nothing because its terms cancel.
struct Size {
    double squares = 0;
    void add(double term) {
        if (std::isfinite(term)) squares += term * term;
    }
    double rms(size_t count) const { return count ? std::sqrt(squares / double(count)) : 0; }
};

// Dense, in the order of its tensor: [batch, z, y, x, head, channel].
struct Result {
    Doubles values;
    Size size;
};
struct Forward {
    Result out, lse;
};
struct Backward {
    Result query, key, value, additional_key, additional_value, bias;
};

Forward attention(const nearfield_attention &problem);
Backward attention_backward(const nearfield_attention &problem);  // reads grad_out and grad_lse, not out and lse
Forward decode(const nearfield_decode &problem);
// Whether a list of blocks names this one.
bool names(const nearfield_decode &problem, int64_t batch, int64_t query, int64_t kv_head, int64_t block);

// One element of a tensor of `dtype`. Writing rounds to nearest, ties to even.
int64_t element_size(int64_t dtype);
double read(const void *data, int64_t dtype, int64_t index);
void write(void *data, int64_t dtype, int64_t index, double value);

// A tensor as dense doubles, and back; `tokens` are its sizes on axes z, y, x.
struct Shape {
    int64_t batch, tokens[3], heads, channels;
    int64_t count() const { return batch * tokens[0] * tokens[1] * tokens[2] * heads * channels; }
};
template <typename Visit>  // visit(index of the row's first element in dense order, its offset in the tensor)
void each_row(const nearfield_tensor &tensor, const Shape &shape, Visit visit) {
    const int64_t *stride = tensor.stride;
    int64_t row = 0;
    for (int64_t b = 0; b < shape.batch; ++b)
        for (int64_t z = 0; z < shape.tokens[0]; ++z)
            for (int64_t y = 0; y < shape.tokens[1]; ++y)
                for (int64_t x = 0; x < shape.tokens[2]; ++x)
                    for (int64_t h = 0; h < shape.heads; ++h, ++row)
                        visit(row * shape.channels,
                              b * stride[0] + z * stride[1] + y * stride[2] + x * stride[3] + h * stride[4]);
}
Doubles load(const nearfield_tensor &tensor, int64_t dtype, const Shape &shape);
void store(const nearfield_tensor &tensor, int64_t dtype, const Shape &shape, const Doubles &values);

// Shapes of a problem's tensors.
Shape query_shape(const nearfield_attention &problem, int64_t channels);
Shape key_shape(const nearfield_attention &problem, int64_t channels);
Shape additional_shape(const nearfield_attention &problem, int64_t channels);
int64_t bias_size(const nearfield_attention &problem);  // entries of the table of one head

// `[start, end)` of the window of the query at `position` of `group`, as positions of that group, uncut.
struct Interval {
    int64_t start, end;
};
Interval interval(const nearfield_axis &axis, int64_t border, int64_t position, int64_t group);

}  // namespace nearfield::check
