// Random problems of every kind, held against the definition in double.
//
//     sweep [--cases N] [--seed S] [--only K] [--isa NAME|all] [--threads T] [--verbose]
//
// Every case names the line that repeats it. Results are filled with NaN before each call, and so are the gaps
// between the rows of all tensors: what is not written, or read from where it should not be, shows.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "cases.h"

using namespace nearfield::check;

namespace {

// Below these a result has no full precision left: the smallest normal float, sums of subnormal numbers that bfloat16
// products read as 0, the last place of a subnormal half.
constexpr double SMALLEST[] = {1.2e-38, 1e-36, 6e-8};
constexpr double WORST_ELEMENT = 50;  // its error may be so many times the rms error that is allowed

constexpr unsigned PATIENCE = 300;    // seconds, for a sanitizer on a slow machine; others need a few

char current[800];  // the case that runs, for the one that never ends

void give_up(int) {
    const char *const parts[] = {"FAILED, does not end: ", current, "\n"};
    for (const char *part : parts)
        if (write(STDOUT_FILENO, part, std::strlen(part)) < 0) break;
    _exit(1);
}

void poison(const Output &out) {
    each_row(out.tensor, out.shape, [&](int64_t, int64_t at) {
        std::memset(static_cast<uint8_t *>(out.tensor.data) + at * element_size(out.dtype), POISON,
                    size_t(out.shape.channels * element_size(out.dtype)));
    });
}

// How a result differs from the expected one, or "".
//
// Where the definition is finite the kernel must be, whatever stands in keys that the query does not see. Where it
// is NaN the kernel may be infinite instead: how inf - inf arises depends on the order of sums. An infinite output
// must be that infinity; an infinite gradient, which has more differences in it, may also be NaN.
std::string difference(const Output &out) {
    char line[200];
    Doubles found = load(out.tensor, out.dtype, out.shape);
    double squares = 0, errors = 0;
    size_t finite = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        double e = out.expected[i], f = found[i];
        if (out.leaks && !std::isfinite(f)) continue;
        if (std::isfinite(e)) {
            squares += e * e, errors += (f - e) * (f - e), ++finite;
            if (std::isfinite(f)) continue;
        } else if (std::isnan(e) ? !std::isfinite(f) : f == e || (out.backward && !std::isfinite(f)))
            continue;
        std::snprintf(line, sizeof line, "%s[%zu] is %g, not %g", out.name, i, f, e);
        return line;
    }
    if (!finite) return "";
    double size = std::max(std::sqrt(squares / double(finite)), out.floor);
    double allowed = out.tolerance * size + SMALLEST[out.dtype], error = std::sqrt(errors / double(finite));
    if (error > allowed) {
        std::snprintf(line, sizeof line, "%s: rms error %.3g of %.3g", out.name, error, size);
        return line;
    }
    for (size_t i = 0; i < found.size(); ++i) {
        double e = out.expected[i], f = found[i];
        if (!std::isfinite(e) || !std::isfinite(f) || std::fabs(f - e) <= WORST_ELEMENT * (allowed + out.tolerance * std::fabs(e))) continue;
        std::snprintf(line, sizeof line, "%s[%zu] is %g, not %g", out.name, i, f, e);
        return line;
    }
    return "";
}

// Calls all kernels of a job, then says what is wrong, or "".
std::string call(std::vector<Case> &job, int64_t threads) {
    for (const Case &c : job)
        for (const Output &out : c.outputs) poison(out);
    if (job[0].is_decode) {
        if (nearfield_decode_forward(&job[0].decode, threads) != NEARFIELD_OK) return "decode was refused";
    } else {
        std::vector<nearfield_attention> problems;
        for (const Case &c : job) problems.push_back(c.attention);
        auto count = int64_t(problems.size());
        if (nearfield_attention_forward(problems.data(), count, threads) != NEARFIELD_OK)
            return "forward was refused";
        if (nearfield_attention_backward(problems.data(), count, threads) != NEARFIELD_OK)
            return "backward was refused";
    }
    for (const Case &c : job)
        for (const Output &out : c.outputs)
            if (std::string wrong = difference(out); !wrong.empty()) return wrong + " | " + c.text;
    return "";
}

std::vector<Doubles> results(const std::vector<Case> &job) {
    std::vector<Doubles> all;
    for (const Case &c : job)
        for (const Output &out : c.outputs) all.push_back(load(out.tensor, out.dtype, out.shape));
    return all;
}

std::string damage(const Case &c) {
    for (const Output &out : c.outputs) {
        if (!out.memory || out.memory->far) continue;
        poison(out);
        const uint8_t *data = out.memory->data;
        if (std::any_of(data, data + out.memory->bytes, [](uint8_t byte) { return byte != POISON; }))
            return std::string(out.name) + " was written beside its rows | " + c.text;
    }
    for (const auto &memory : c.memory)
        if (!memory->original.empty() && !std::equal(memory->original.begin(), memory->original.end(), memory->data))
            return "an input was written | " + c.text;
    return "";
}

std::string check_job(std::vector<Case> &job, int64_t threads, int64_t other_threads) {
    std::string wrong = call(job, threads);
    if (wrong.empty() && other_threads) {
        std::vector<Doubles> once = results(job);
        wrong = call(job, other_threads);
        std::vector<Doubles> twice = results(job);
        size_t number = 0;
        for (const Case &c : job)
            for (const Output &out : c.outputs) {
                const Doubles &a = once[number], &b = twice[number];
                ++number;
                // As bytes: NaN equals NaN, but 0 does not equal -0.
                if (wrong.empty() && !a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)))
                    wrong = std::string(out.name) + " depends on the number of threads | " + c.text;
            }
    }
    for (const Case &c : job)
        if (wrong.empty()) wrong = damage(c);
    return wrong;
}

}  // namespace

int main(int count, char **words) {
    int64_t cases = 400, seed = 1, only = -1, threads = 2;
    std::string isa = "all", isas = nearfield_isas();
    bool verbose = false;
    for (int i = 1; i < count; ++i) {
        std::string word = words[i];
        if (word == "--verbose") {
            verbose = true;
            continue;
        }
        int64_t *number = word == "--cases"     ? &cases
                          : word == "--seed"    ? &seed
                          : word == "--only"    ? &only
                          : word == "--threads" ? &threads
                                                : nullptr;
        if (i + 1 == count || (!number && word != "--isa")) {
            std::fprintf(stderr, "%s [--cases N] [--seed S] [--only K] [--isa NAME|all] [--threads T] [--verbose]\n",
                         words[0]);
            return 2;
        }
        if (number)
            *number = std::atoll(words[++i]);
        else
            isa = words[++i];
    }
    if (isa != "all") isas = isa;
    int64_t passed = 0, failed = 0;
    nearfield_set_grain(0);
    std::signal(SIGALRM, give_up);
    for (int64_t number = only < 0 ? 0 : only; number < (only < 0 ? cases : only + 1); ++number) {
        Draw draw{uint64_t(seed), uint64_t(number)};
        std::vector<Case> job = make_job(draw), rival;
        int64_t other_threads = draw.chance(0.3) ? draw.pick<int64_t>({1, 3, 7}) : 0;
        if (draw.chance(0.05)) rival = make_job(draw);  // of another caller at the same time
        if (verbose)
            for (const Case &c : job) std::fprintf(stderr, "%lld: %s\n", (long long)number, c.text.c_str());
        std::string wrong;
        for (size_t at = 0; wrong.empty() && at < isas.size();) {
            size_t end = std::min(isas.find(' ', at), isas.size());
            std::string name = isas.substr(at, end - at), of_rival;
            at = end + 1;
            if (nearfield_use(name.c_str()) != NEARFIELD_OK) {
                std::fprintf(stderr, "This machine has no %s; it has %s.\n", name.c_str(), nearfield_isas());
                return 2;
            }
            std::snprintf(current, sizeof current, "sweep --seed %lld --only %lld --isa %s --threads %lld: %s",
                          (long long)seed, (long long)number, name.c_str(), (long long)threads, job[0].text.c_str());
            alarm(PATIENCE);
            std::thread caller;
            if (!rival.empty()) caller = std::thread([&] { of_rival = check_job(rival, threads, 0); });
            wrong = check_job(job, threads, other_threads);
            if (caller.joinable()) caller.join();
            if (wrong.empty()) wrong = of_rival;
            alarm(0);
            if (wrong.empty()) continue;
            std::printf("FAILED: sweep --seed %lld --only %lld --isa %s --threads %lld: %s\n", (long long)seed,
                        (long long)number, name.c_str(), (long long)threads, wrong.c_str());
            std::fflush(stdout);  // a later case may crash
        }
        wrong.empty() ? ++passed : ++failed;
    }
    std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
    return failed ? 1 : 0;
}
