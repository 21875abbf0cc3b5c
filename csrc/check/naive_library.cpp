// The exports of nearfield.h computed by the definition: for tests of what calls the library.
#include <cstring>
#include <new>

#include "../validate.h"
#include "reference.h"

using namespace nearfield;

namespace {

// Runs a computation that allocates.
template <typename Compute>
int computed(Compute compute) {
    try {
        compute();
        return NEARFIELD_OK;
    } catch (const std::bad_alloc &) {
        return NEARFIELD_NO_MEMORY;
    }
}

}  // namespace

int nearfield_attention_forward(const nearfield_attention *problems, int64_t count, int64_t threads) {
    if (int error = validate_attention(problems, count, threads, false)) return error;
    return computed([&] {
        for (const nearfield_attention *p = problems; p < problems + count; ++p) {
            check::Forward result = check::attention(*p);
            check::store(p->out, p->dtype, check::query_shape(*p, p->value_dim), result.out.values);
            check::store(p->lse, NEARFIELD_F32, check::query_shape(*p, 1), result.lse.values);
        }
    });
}

int nearfield_attention_backward(const nearfield_attention *problems, int64_t count, int64_t threads) {
    if (int error = validate_attention(problems, count, threads, true)) return error;
    return computed([&] {
        for (const nearfield_attention *p = problems; p < problems + count; ++p) {
            check::Backward grad = check::attention_backward(*p);
            check::store(p->grad_query, p->dtype, check::query_shape(*p, p->head_dim), grad.query.values);
            check::store(p->grad_key, p->dtype, check::key_shape(*p, p->head_dim), grad.key.values);
            check::store(p->grad_value, p->dtype, check::key_shape(*p, p->value_dim), grad.value.values);
            check::store(p->grad_additional_key, p->dtype, check::additional_shape(*p, p->head_dim),
                         grad.additional_key.values);
            check::store(p->grad_additional_value, p->dtype, check::additional_shape(*p, p->value_dim),
                         grad.additional_value.values);
            if (p->grad_bias)
                for (size_t i = 0; i < grad.bias.values.size(); ++i) p->grad_bias[i] = float(grad.bias.values[i]);
        }
    });
}

int nearfield_decode_forward(const nearfield_decode *problem, int64_t threads) {
    if (int error = validate_decode(problem, threads)) return error;
    return computed([&] {
        const nearfield_decode &p = *problem;
        check::Forward result = check::decode(p);
        check::store(p.out, p.dtype, {p.batch, {1, 1, p.num_queries}, p.heads, p.value_dim}, result.out.values);
        if (p.lse.data)
            check::store(p.lse, NEARFIELD_F32, {p.batch, {1, 1, p.num_queries}, p.heads, 1}, result.lse.values);
    });
}

const char *nearfield_isas(void) { return "naive"; }
const char *nearfield_isa(void) { return "naive"; }
int nearfield_use(const char *isa) {
    return isa && !std::strcmp(isa, "naive") ? NEARFIELD_OK : NEARFIELD_INVALID;
}
void nearfield_set_grain(double) {}

int64_t nearfield_abi(void) { return NEARFIELD_ABI; }
