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

// Milliseconds of work, roughly, that a further thread must bring. Torch's own threads spin for about as long after each
// of its operations, and a worker that waits behind one of them for a processor costs more than it brings.
double grain();
void set_grain(double milliseconds);

// The most threads, up to `threads`, that a job of so much work is worth.
inline int64_t worth(double milliseconds, int64_t threads) {
    double least = grain();
    if (milliseconds >= least * double(threads)) return threads;
    return milliseconds < 2 * least ? 1 : int64_t(milliseconds / least);
}

}  // namespace nearfield
