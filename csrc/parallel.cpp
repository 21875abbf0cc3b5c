#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace nearfield {
namespace {

constexpr int64_t MOST_WORKERS = 1023;  // a slip in a number of threads must not exhaust the machine

// Milliseconds of work, roughly, that a further thread must bring. Torch's own threads spin for some time after each of
// its operations. They take a job at once; a worker of ours waits behind one of them for a processor.
constexpr double POOL_GRAIN = 1, TEAM_GRAIN = 0.05, UNSET = -1;

// Waking a thread takes longer than many jobs have between them, or than their last tasks differ by. Longer spinning
// would take the processor from torch's own threads.
template <typename Ready>
void spin(Ready ready) {
    auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(20);
    while (!ready() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
}

// The head of a piece of scratch memory; its `bytes` follow.
struct alignas(64) Block {
    Block *next;
    size_t bytes;
};

// Lives on the stack of its caller, who leaves only after every worker has left. The pool's mutex guards what changes,
// `next` excepted; `inside` is read without it as well, while spinning.
struct Job {
    void (*body)(void *, int64_t, void *);
    void *context;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    Block *blocks = nullptr;         // one for each participant who has not come yet
    int64_t seats = 0;               // workers who may still join
    std::atomic<int64_t> inside{0};  // workers who have not left
    Job *following = nullptr;

    void run(Block *block) {
        void *memory = block ? block + 1 : nullptr;
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task, memory);
    }
};

template <typename Link>
Link *pop(Link *&head) {
    Link *first = head;
    if (first) head = first->next;
    return first;
}

class Pool {
public:
    bool run(Job &job, int64_t threads, size_t bytes) {
        int64_t given = std::min(threads, MOST_WORKERS + 1);
        threads = std::min(given, job.tasks);
        Team *others = threads > 1 ? team.load(std::memory_order_acquire) : nullptr;
        std::unique_lock lock(mutex);
        if (others) return borrow(others, job, threads, given, bytes, lock);
        start(threads - 1);
        threads = std::min(threads, workers + 1);
        if (!equip(job, threads, bytes)) return false;
        Block *mine = pop(job.blocks);
        if (threads > 1) open(job, threads - 1, lock);
        lock.unlock();
        job.run(mine);
        lock.lock();
        if (threads > 1) close(job, lock);
        give(mine);
        while (job.blocks) give(pop(job.blocks));
        return true;
    }

    std::atomic<Team *> team{nullptr};

private:
    std::mutex mutex;
    std::condition_variable wake, left;
    std::atomic<uint64_t> opened{0};  // how many jobs so far; written under the mutex
    Job *jobs = nullptr;
    int64_t workers = 0;
    Block *kept = nullptr;
    int64_t num_kept = 0;

    // On threads of another runtime, of which `seats` may take part; it may send fewer than the `threads` asked for.
    bool borrow(Team *others, Job &job, int64_t seats, int64_t threads, size_t bytes, std::unique_lock<std::mutex> &lock) {
        if (!equip(job, seats, bytes)) return false;
        job.seats = seats;
        lock.unlock();
        std::pair<Pool *, Job *> both{this, &job};
        others(join, &both, unsigned(threads), 0);
        lock.lock();
        while (job.blocks) give(pop(job.blocks));
        return true;
    }

    static void join(void *context) {
        auto [pool, job] = *static_cast<std::pair<Pool *, Job *> *>(context);
        std::unique_lock lock(pool->mutex);
        if (job->seats == 0) return;
        --job->seats;
        Block *block = pop(job->blocks);
        lock.unlock();
        job->run(block);
        lock.lock();
        pool->give(block);
    }

    // The pool grows to the largest job's wish, not to the sum of those that run at once: they share the workers, and
    // each has its caller at work. Where the system refuses a thread, jobs make do with fewer.
    void start(int64_t wanted) {
        try {
            for (; workers < wanted; ++workers) std::thread([this] { work(); }).detach();
        } catch (const std::exception &) {
        }
    }

    void work() {
        std::unique_lock lock(mutex);
        for (;;) {
            uint64_t seen = opened;
            Job *job = jobs;
            while (job && job->seats == 0) job = job->following;
            if (job) {
                --job->seats;
                ++job->inside;
                Block *block = pop(job->blocks);
                lock.unlock();
                job->run(block);
                lock.lock();
                give(block);
                job->seats = 0;  // no tasks are left to hand out
                if (--job->inside == 0) left.notify_all();
            } else {
                auto more = [&] { return opened != seen; };
                lock.unlock();
                spin(more);
                lock.lock();
                wake.wait(lock, more);
            }
        }
    }

    // Newest first: a nested job, which somebody waits for inside an older one, finds helpers before it.
    void open(Job &job, int64_t seats, std::unique_lock<std::mutex> &lock) {
        job.seats = seats;
        job.following = jobs;
        jobs = &job;
        ++opened;
        bool all = seats == workers;
        lock.unlock();
        if (all) wake.notify_all();
        for (int64_t i = 0; !all && i < seats; ++i) wake.notify_one();
        lock.lock();
    }

    void close(Job &job, std::unique_lock<std::mutex> &lock) {
        Job **link = &jobs;
        while (*link != &job) link = &(*link)->following;
        *link = job.following;
        auto empty = [&] { return job.inside == 0; };
        if (!empty()) {
            lock.unlock();
            spin(empty);
            lock.lock();
            left.wait(lock, empty);
        }
    }

    bool equip(Job &job, int64_t participants, size_t bytes) {
        for (int64_t i = 0; bytes && i < participants; ++i) {
            Block *block = take(bytes);
            if (!block) {
                while (job.blocks) give(pop(job.blocks));
                return false;
            }
            block->next = job.blocks;
            job.blocks = block;
        }
        return true;
    }

    // The smallest kept block that is large enough. Without one the largest makes room for a new one, so that there
    // are never more blocks than were in use at once; a quarter more serves jobs that grow little by little.
    Block *take(size_t bytes) {
        Block **best = nullptr;
        for (Block **link = &kept; *link; link = &(*link)->next) {
            size_t has = (*link)->bytes;
            if (!best || ((*best)->bytes < bytes ? has > (*best)->bytes : has >= bytes && has < (*best)->bytes))
                best = link;
        }
        if (best) {
            --num_kept;
            Block *block = pop(*best);
            if (block->bytes >= bytes) return block;
            ::operator delete(block, std::align_val_t(alignof(Block)));
        }
        if (bytes > PTRDIFF_MAX / 2) return nullptr;
        bytes += bytes / 4;
        void *fresh = ::operator new(sizeof(Block) + bytes, std::align_val_t(alignof(Block)), std::nothrow);
        return fresh ? new (fresh) Block{nullptr, bytes} : nullptr;
    }

    void give(Block *block) {
        if (!block) return;
        if (num_kept >= std::max<int64_t>(16, 2 * (workers + 1))) {
            ::operator delete(block, std::align_val_t(alignof(Block)));
            return;
        }
        block->next = kept;
        kept = block;
        ++num_kept;
    }
};

// Never destroyed: workers sleep on it while the process exits. Made when the library is loaded, so that no lock of
// a first use can be held at a fork.
alignas(Pool) unsigned char storage[sizeof(Pool)];
Pool *make() { return new (storage) Pool; }
Pool *const pool = [] {
#if !defined(_WIN32)
    // A child has none of the workers, and the mutex may be locked by a thread that it lacks: it starts afresh and
    // forgets the parent's scratch memory.
    pthread_atfork(nullptr, nullptr, [] { make(); });
#endif
    return make();
}();

std::atomic<double> least_work{UNSET};

}  // namespace

void set_team(Team *team) { pool->team.store(team, std::memory_order_release); }

void set_grain(double milliseconds) { least_work.store(milliseconds, std::memory_order_relaxed); }

int64_t worth(double milliseconds, int64_t threads) {
    bool in_team = pool->team.load(std::memory_order_relaxed);
    double least = least_work.load(std::memory_order_relaxed);
    if (least < 0) least = in_team ? TEAM_GRAIN : POOL_GRAIN;
    if (milliseconds >= least * double(threads)) return threads;
    return milliseconds < 2 * least ? 1 : in_team ? threads : int64_t(milliseconds / least);
}

bool parallel_for(int64_t tasks, int64_t threads, size_t bytes, void (*body)(void *context, int64_t task, void *memory),
                  void *context) {
    if (tasks <= 0) return true;
    Job job{body, context, tasks};
    return pool->run(job, std::max<int64_t>(threads, 1), bytes);
}

}  // namespace nearfield
