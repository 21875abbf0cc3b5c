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

// Calls body(context) on up to `threads` threads at once, the caller among them: GOMP_parallel of an OpenMP runtime.
typedef void Team(void (*body)(void *context), void *context, unsigned threads, unsigned flags);

// Jobs run on the threads of `team` from now on, but for those of a forked child; on the pool's own again with NULL.
void set_team(Team *team);

// Milliseconds of work, roughly, that a further thread must bring; below 0 what suits the threads in use.
void set_grain(double milliseconds);

// The most threads, up to `threads`, that a job of so much work is worth. A team is taken whole or not at all: an OpenMP
// runtime may end the threads that a smaller one leaves idle, and start them anew for torch's next operation.
int64_t worth(double milliseconds, int64_t threads);

}  // namespace nearfield
