// The exported functions: each checks its arguments and calls the best build of the kernels for this machine.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "parallel.h"
#include "table.h"
#include "validate.h"

// The build defines NEARFIELD_WITH_<isa> for each table that it links.
extern "C" {
extern const nearfield::Table nearfield_table_avx512bf16, nearfield_table_avx512, nearfield_table_avx2,
    nearfield_table_baseline;
}

// What this library was built from; hatch_build.py looks for it in the file.
#if !defined(NEARFIELD_STAMP)
#define NEARFIELD_STAMP ""
#endif
extern "C" {
NEARFIELD_API extern const char nearfield_stamp[];
const char nearfield_stamp[] = NEARFIELD_STAMP;
}

namespace nearfield {
namespace {

// The registers of an instruction set are of use only where the system saves them: __builtin_cpu_supports looks at
// XCR0 too. Older clangs do not know the name "f16c", whose registers are those of AVX.
#if defined(__x86_64__)
bool f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx");
}
bool baseline() {  // x86-64-v2
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("popcnt");
}
bool avx2() { return baseline() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c(); }
bool avx512() {
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool avx512bf16() { return avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool baseline() { return true; }
#endif

struct Isa {
    const char *name;
    bool (*executes)();
    const Table *table;
};

constexpr Isa ISAS[] = {
#if defined(NEARFIELD_WITH_avx512bf16)
    {"avx512bf16", avx512bf16, &nearfield_table_avx512bf16},
#endif
#if defined(NEARFIELD_WITH_avx512)
    {"avx512", avx512, &nearfield_table_avx512},
#endif
#if defined(NEARFIELD_WITH_avx2)
    {"avx2", avx2, &nearfield_table_avx2},
#endif
#if defined(NEARFIELD_WITH_baseline)
    {"baseline", baseline, &nearfield_table_baseline},
#endif
};

std::atomic<const Isa *> chosen{nullptr};

// By name, or the best one; NULL where this machine does not execute it.
const Isa *find(const char *name) {
    for (const Isa &isa : ISAS)
        if ((!name || !std::strcmp(isa.name, name)) && isa.executes()) return &isa;
    return nullptr;
}

// At the first use the variable decides, if it is set: a wrong name there is an error, never another choice.
const Table *table() {
    const Isa *isa = chosen.load(std::memory_order_acquire);
    if (!isa) {
        const char *name = std::getenv("NEARFIELD_CPU_ISA");
        const Isa *found = find(name && *name ? name : nullptr);
        if (!found) return nullptr;
        // unless somebody chose meanwhile
        isa = chosen.compare_exchange_strong(isa, found) ? found : isa;
    }
    return isa->table;
}

}  // namespace
}  // namespace nearfield

using namespace nearfield;

int nearfield_attention_forward(const nearfield_attention *problems, int64_t count, int64_t threads) {
    if (int error = validate_attention(problems, count, threads, false)) return error;
    const Table *kernels = table();
    return kernels ? kernels->attention_forward(problems, count, threads) : NEARFIELD_INVALID;
}

int nearfield_attention_backward(const nearfield_attention *problems, int64_t count, int64_t threads) {
    if (int error = validate_attention(problems, count, threads, true)) return error;
    const Table *kernels = table();
    return kernels ? kernels->attention_backward(problems, count, threads) : NEARFIELD_INVALID;
}

int nearfield_decode_forward(const nearfield_decode *problem, int64_t threads) {
    if (int error = validate_decode(problem, threads)) return error;
    const Table *kernels = table();
    return kernels ? kernels->decode_forward(problem, threads) : NEARFIELD_INVALID;
}

int nearfield_block_shares(const nearfield_shares *problem, int64_t threads) {
    if (int error = validate_shares(problem, threads)) return error;
    const Table *kernels = table();
    return kernels ? kernels->block_shares(problem, threads) : NEARFIELD_INVALID;
}

int nearfield_choose_blocks(const nearfield_choice *problem, int64_t threads) {
    if (int error = validate_choice(problem, threads)) return error;
    const Table *kernels = table();
    return kernels ? kernels->choose_blocks(problem, threads) : NEARFIELD_INVALID;
}

int nearfield_scan_forward(const nearfield_scan *problem, int64_t threads) {
    if (int error = validate_scan(problem, threads, false)) return error;
    const Table *kernels = table();
    return kernels ? kernels->scan_forward(problem, threads) : NEARFIELD_INVALID;
}

int nearfield_scan_backward(const nearfield_scan *problem, int64_t threads) {
    if (int error = validate_scan(problem, threads, true)) return error;
    const Table *kernels = table();
    return kernels ? kernels->scan_backward(problem, threads) : NEARFIELD_INVALID;
}

int nearfield_lla_forward(const nearfield_lla *problem, int64_t threads) {
    if (int error = validate_lla(problem, threads, false)) return error;
    const Table *kernels = table();
    return kernels ? kernels->lla_forward(problem, threads) : NEARFIELD_INVALID;
}

int nearfield_lla_backward(const nearfield_lla *problem, int64_t threads) {
    if (int error = validate_lla(problem, threads, true)) return error;
    const Table *kernels = table();
    return kernels ? kernels->lla_backward(problem, threads) : NEARFIELD_INVALID;
}

int nearfield_linear_forward(const nearfield_linear *problem, int64_t threads) {
    if (int error = validate_linear(problem, threads, false)) return error;
    const Table *kernels = table();
    return kernels ? kernels->linear_forward(problem, threads) : NEARFIELD_INVALID;
}

int nearfield_linear_backward(const nearfield_linear *problem, int64_t threads) {
    if (int error = validate_linear(problem, threads, true)) return error;
    const Table *kernels = table();
    return kernels ? kernels->linear_backward(problem, threads) : NEARFIELD_INVALID;
}

const char *nearfield_isas(void) {
    static const std::string names = [] {
        std::string list;
        for (const Isa &isa : ISAS)
            if (isa.executes()) list += (list.empty() ? "" : " ") + std::string(isa.name);
        return list;
    }();
    return names.c_str();
}

const char *nearfield_isa(void) {
    const Isa *isa = chosen.load(std::memory_order_acquire);
    return isa ? isa->name : nullptr;
}

int nearfield_use(const char *isa) {
    const Isa *found = isa ? find(isa) : nullptr;
    if (!found) return NEARFIELD_INVALID;
    chosen.store(found, std::memory_order_release);
    return NEARFIELD_OK;
}

void nearfield_set_grain(double milliseconds) { set_grain(milliseconds); }

void nearfield_set_team(void *team) { set_team(reinterpret_cast<Team *>(team)); }

int64_t nearfield_abi(void) { return NEARFIELD_ABI; }
