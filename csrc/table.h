// What one build of the kernels offers. kernels.cpp is compiled once for each instruction set, each time under
// another name; library.cpp chooses a table when the library is first used. Further families add entries here.
#pragma once
#include "nearfield.h"

namespace nearfield {

struct Table {
    // Problems come validated (validate.h).
    int (*attention_forward)(const nearfield_attention *, int64_t count, int64_t threads);
    int (*attention_backward)(const nearfield_attention *, int64_t count, int64_t threads);
    int (*decode_forward)(const nearfield_decode *, int64_t threads);
};

}  // namespace nearfield
