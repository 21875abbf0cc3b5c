// A small pool of threads shared by all kernels, and the memory that they work in.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nearfield {

// Calls body(context, task, memory) once for every task of [0, tasks), on at most `threads` threads, the caller
// among them. `memory` is `bytes` of 64-byte aligned scratch of the calling thread's own, with arbitrary content;
// it is kept for later jobs. Returns false, with nothing called, if memory is short. Several callers may run jobs
// at once; a forked child starts with a pool of its own.
bool parallel_for(int64_t tasks, int64_t threads, size_t bytes, void (*body)(void *context, int64_t task, void *memory),
                  void *context);

}  // namespace nearfield
