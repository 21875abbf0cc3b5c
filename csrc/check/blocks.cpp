// Random problems of the shares of blocks and of their choice, held against the definition in double.
//
//     blocks [--cases N] [--seed S] [--only K] [--threads T]
//
// Each runs on every instruction set, with one thread and with more: the same bits. Keys that nobody sees are NaN, and
// so are the gaps between the rows of all tensors.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "draw.h"
#include "reference.h"

using namespace nearfield::check;

namespace {

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN(),
                 INFINITE = std::numeric_limits<double>::infinity();
constexpr double SHARES = 2e-5;  // exponentials of sums of up to 512 products in float

// A tensor in one of two orders, with gaps; whatever is no element of it is NaN.
nearfield_tensor place(Draw &draw, const Shape &shape, int64_t dtype, std::vector<uint8_t> &memory) {
    int64_t gap = draw.chance(0.4) ? draw.between(1, 9) : 0, row = shape.channels + gap;
    nearfield_tensor tensor{};
    int64_t *stride = tensor.stride, tokens = shape.tokens[2];
    if (draw.chance(0.5)) stride[4] = row, stride[3] = row * shape.heads;
    else stride[3] = row, stride[4] = row * tokens;
    stride[0] = row * tokens * shape.heads;
    if (!shape.count()) return tensor;
    memory.assign(size_t((shape.batch * stride[0] - gap) * element_size(dtype)), 0xff);
    tensor.data = memory.data();
    return tensor;
}

struct Case {
    nearfield_shares p{};
    std::vector<uint8_t> query, key, mask;
    std::vector<double> expected;
    std::vector<float> found;
    std::string text;
};

void make(Draw &draw, Case &c) {
    nearfield_shares &p = c.p;
    p.dtype = draw.between(0, 2), p.key_dtype = draw.chance(0.7) ? p.dtype : 0;
    p.batch = draw.between(draw.chance(0.05) ? 0 : 1, 2), p.num_queries = draw.pick<int64_t>({1, 1, 2, 5});
    p.num_keys = draw.pick({draw.between(1, 9), draw.between(1, 70), draw.between(1, 1200)});
    p.is_causal = p.num_queries <= p.num_keys && draw.chance(0.5);
    p.kv_heads = draw.between(1, 3), p.heads = p.kv_heads * draw.between(1, 4);
    p.head_dim = draw.pick({int64_t(1), int64_t(16), int64_t(64), draw.between(1, 256)});
    p.is_bound = draw.chance(0.3), p.scale = draw.pick({1.0, 1.0, -1.0}) / std::sqrt(double(p.head_dim));
    p.block_size = draw.pick({int64_t(1), int64_t(16), int64_t(64), draw.between(1, 150), p.num_keys});
    p.last_part = draw.chance(0.5) ? 1 : 0.25;
    const int64_t width = p.head_dim << p.is_bound, blocks = (p.num_keys + p.block_size - 1) / p.block_size;
    const Shape queries{p.batch, {1, 1, p.num_queries}, p.heads, p.head_dim};
    const Shape keys{p.batch, {1, 1, p.num_keys}, p.kv_heads, width};
    Doubles q(queries.count()), k(keys.count());
    for (double &x : q) x = draw.normal();
    for (double &x : k) x = draw.normal();
    if (p.is_bound)  // greatest, least
        for (int64_t row = 0; row < keys.count(); row += width)
            for (int64_t d = 0; d < p.head_dim; ++d)
                if (k[row + d] < k[row + p.head_dim + d]) std::swap(k[row + d], k[row + p.head_dim + d]);
    if (draw.chance(0.5)) {
        double share = draw.pick({0.1, 0.6, 0.95});
        c.mask.resize(size_t(p.batch * p.num_keys + 1));
        for (int64_t j = 0; j < p.batch * p.num_keys; ++j)
            if (!(c.mask[j] = draw.chance(share) ? uint8_t(draw.pick({1, 255})) : 0))
                std::fill_n(k.begin() + j * p.kv_heads * width, p.kv_heads * width, NOT_A_NUMBER);
        p.key_mask = c.mask.data();
    }
    p.query = place(draw, queries, p.dtype, c.query), p.key = place(draw, keys, p.key_dtype, c.key);
    store(p.query, p.dtype, queries, q), store(p.key, p.key_dtype, keys, k);
    q = load(p.query, p.dtype, queries), k = load(p.key, p.key_dtype, keys);  // as rounded

    const int64_t group = p.heads / p.kv_heads;
    c.expected.assign(size_t(p.batch * p.num_queries * p.kv_heads * blocks), 0);
    c.found.resize(c.expected.size());
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t n = 0; n < p.num_queries; ++n)
            for (int64_t head = 0; head < p.heads; ++head) {
                const double *one = &q[((b * p.num_queries + n) * p.heads + head) * p.head_dim];
                std::vector<double> logits(p.num_keys, -INFINITE);
                double top = -INFINITE, total = 0;
                for (int64_t j = 0; j < p.num_keys; ++j) {
                    if (p.key_mask && !c.mask[b * p.num_keys + j]) continue;
                    if (p.is_causal && j > p.num_keys - p.num_queries + n) continue;
                    const double *row = &k[((b * p.num_keys + j) * p.kv_heads + head / group) * width];
                    double sum = 0;
                    for (int64_t d = 0; d < p.head_dim; ++d) {
                        double x = one[d] * p.scale;
                        sum += p.is_bound ? std::max(x * row[d], x * row[p.head_dim + d]) : x * row[d];
                    }
                    if (j / p.block_size == blocks - 1) sum += std::log(p.last_part);
                    logits[j] = sum, top = std::max(top, sum);
                }
                for (double x : logits) total += top == -INFINITE ? 0 : std::exp(x - top);
                double *to = &c.expected[((b * p.num_queries + n) * p.kv_heads + head / group) * blocks];
                for (int64_t j = 0; j < p.num_keys; ++j)
                    if (logits[j] != -INFINITE) to[j / p.block_size] += std::exp(logits[j] - top) / total / double(group);
            }
    p.shares = c.found.data();
    char line[200];
    std::snprintf(line, sizeof line, "batch %lld queries %lld keys %lld heads %lld/%lld dim %lld block %lld%s%s%s",
                  (long long)p.batch, (long long)p.num_queries, (long long)p.num_keys, (long long)p.heads,
                  (long long)p.kv_heads, (long long)p.head_dim, (long long)p.block_size, p.is_bound ? " bound" : "",
                  p.is_causal ? " causal" : "", p.key_mask ? " mask" : "");
    c.text = line;
}

std::string check_shares(Case &c, int64_t threads) {
    std::fill(c.found.begin(), c.found.end(), float(NOT_A_NUMBER));
    if (nearfield_block_shares(&c.p, 1) != NEARFIELD_OK) return "it was refused";
    std::vector<float> once = c.found;
    std::fill(c.found.begin(), c.found.end(), float(NOT_A_NUMBER));
    if (nearfield_block_shares(&c.p, threads) != NEARFIELD_OK) return "it was refused";
    if (!once.empty() && std::memcmp(once.data(), c.found.data(), 4 * once.size())) return "it depends on the number of threads";
    char line[100];
    for (size_t i = 0; i < once.size(); ++i) {
        double e = c.expected[i], f = once[i];
        if (std::fabs(f - e) <= SHARES * std::max(e, 1e-3) && (f > 0) == (e > 0)) continue;
        std::snprintf(line, sizeof line, "share %zu is %g, not %g", i, f, e);
        return line;
    }
    return "";
}

// The choice among the shares that were found: forced blocks, then the largest, of equal ones the first.
std::string check_choice(Draw draw, const Case &c, int64_t threads) {
    nearfield_choice p{c.p.batch, c.p.num_queries, c.p.num_keys, c.p.kv_heads, c.p.block_size};
    if (p.num_queries > p.num_keys) return "";
    const int64_t blocks = (p.num_keys + p.block_size - 1) / p.block_size, rows = p.batch * p.num_queries * p.kv_heads;
    p.num_blocks = draw.between(0, blocks + 2), p.sink_blocks = draw.pick<int64_t>({0, 1, 3});
    p.num_recent = draw.pick({int64_t(0), int64_t(1), draw.between(0, p.num_keys + 9)});
    std::vector<float> scores = c.found;
    if (draw.chance(0.5))
        for (float &x : scores) x = std::ceil(x * 4) / 4;  // ties
    std::vector<std::vector<int64_t>> expected(rows);
    for (int64_t row = 0; row < rows; ++row) {
        const float *at = scores.data() + row * blocks;
        int64_t place = p.num_keys - p.num_queries + row / p.kv_heads % p.num_queries, seen = 0;
        std::vector<int64_t> rest, &list = expected[row];
        for (int64_t i = 0; i < blocks; ++i) {
            if (!(at[i] > 0)) continue;
            bool is_recent = p.num_recent && (i + 1) * p.block_size > place - p.num_recent + 1 && i * p.block_size <= place;
            (seen++ < p.sink_blocks || is_recent ? list : rest).push_back(i);
        }
        std::stable_sort(rest.begin(), rest.end(), [&](int64_t a, int64_t b) { return at[a] > at[b]; });
        for (int64_t i : rest)
            if (int64_t(list.size()) < p.num_blocks) list.push_back(i);
        std::sort(list.begin(), list.end());
        p.list_length = std::max(p.list_length, int64_t(list.size()));
    }
    std::vector<int64_t> chosen(size_t(rows * p.list_length), -7);
    p.scores = scores.data(), p.chosen = chosen.data();
    if (nearfield_choose_blocks(&p, threads) != NEARFIELD_OK) return "the choice was refused";
    for (int64_t row = 0; row < rows; ++row) {
        expected[row].resize(size_t(p.list_length), -1);
        if (!std::equal(expected[row].begin(), expected[row].end(), chosen.begin() + row * p.list_length))
            return "row " + std::to_string(row) + " chose other blocks";
    }
    return "";
}

}  // namespace

int main(int count, char **words) {
    int64_t cases = 400, seed = 1, only = -1, threads = 3;
    for (int i = 1; i < count; ++i) {
        std::string word = words[i];
        int64_t *number = word == "--cases"     ? &cases
                          : word == "--seed"    ? &seed
                          : word == "--only"    ? &only
                          : word == "--threads" ? &threads
                                                : nullptr;
        if (!number || ++i == count)
            return std::fprintf(stderr, "blocks [--cases N] [--seed S] [--only K] [--threads T]\n"), 2;
        *number = std::atoll(words[i]);
    }
    int64_t passed = 0, failed = 0;
    nearfield_set_grain(0);
    for (int64_t number = only < 0 ? 0 : only; number < (only < 0 ? cases : only + 1); ++number) {
        Draw draw{uint64_t(seed), uint64_t(number)};
        Case c;
        make(draw, c);
        std::string wrong;
        std::istringstream isas(nearfield_isas());
        for (std::string isa; wrong.empty() && isas >> isa;) {
            nearfield_use(isa.c_str());
            wrong = check_shares(c, threads);
            if (wrong.empty()) wrong = check_choice(draw, c, threads);
            if (wrong.empty()) continue;
            std::printf("FAILED: blocks --seed %lld --only %lld (%s): %s | %s\n", (long long)seed, (long long)number,
                        isa.c_str(), wrong.c_str(), c.text.c_str());
            std::fflush(stdout);
        }
        wrong.empty() ? ++passed : ++failed;
    }
    std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
    return failed ? 1 : 0;
}
