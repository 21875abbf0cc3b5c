// What one build of the kernels offers. attention.cpp, linear.cpp, … are compiled once for each instruction set, each
// time into a namespace of its name; library.cpp chooses a table when the library is first used.
#pragma once
#include "nearfield.h"

// Every entry and its arguments, which come validated (validate.h).
#define NEARFIELD_ENTRIES(ENTRY)                                                                    \
    ENTRY(attention_forward, (const nearfield_attention *problems, int64_t count, int64_t threads)) \
    ENTRY(attention_backward, (const nearfield_attention *problems, int64_t count, int64_t threads)) \
    ENTRY(decode_forward, (const nearfield_decode *problem, int64_t threads))                       \
    ENTRY(block_shares, (const nearfield_shares *problem, int64_t threads))                         \
    ENTRY(choose_blocks, (const nearfield_choice *problem, int64_t threads))                        \
    ENTRY(scan_forward, (const nearfield_scan *problem, int64_t threads))                           \
    ENTRY(scan_backward, (const nearfield_scan *problem, int64_t threads))                          \
    ENTRY(lla_forward, (const nearfield_lla *problem, int64_t threads))                             \
    ENTRY(lla_backward, (const nearfield_lla *problem, int64_t threads))                            \
    ENTRY(linear_forward, (const nearfield_linear *problem, int64_t threads))                       \
    ENTRY(linear_backward, (const nearfield_linear *problem, int64_t threads))

namespace nearfield {

struct Table {
#define NEARFIELD_ENTRY(name, arguments) int(*name) arguments;
    NEARFIELD_ENTRIES(NEARFIELD_ENTRY)
#undef NEARFIELD_ENTRY
};

#if defined(NEARFIELD_ISA)
namespace NEARFIELD_ISA {
#define NEARFIELD_ENTRY(name, arguments) int name arguments;
NEARFIELD_ENTRIES(NEARFIELD_ENTRY)
#undef NEARFIELD_ENTRY
}  // namespace NEARFIELD_ISA
#endif

}  // namespace nearfield
