// Random numbers that are the same on every machine, which those of <random> need not be.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace nearfield::check {

class Draw {
public:
    Draw(uint64_t seed, uint64_t stream) : state(seed * 0x9e3779b97f4a7c15 + stream) { state = next(); }

    // Takes its numbers from the input of a fuzzer as long as there are any.
    Draw(const uint8_t *data, size_t size) : state(0), input(data), left(size) {}

    uint64_t next() {  // splitmix64
        if (left) {
            uint64_t x = 0;
            size_t taken = std::min<size_t>(left, 8);
            std::memcpy(&x, input, taken);
            input += taken, left -= taken;
            return x;
        }
        uint64_t x = state += 0x9e3779b97f4a7c15;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return x ^ (x >> 31);
    }
    int64_t between(int64_t low, int64_t high) { return low + int64_t(next() % uint64_t(high - low + 1)); }
    bool chance(double share) { return double(next() >> 11) < share * 0x1p53; }
    template <typename T>
    T pick(std::initializer_list<T> from) {
        return from.begin()[between(0, int64_t(from.size()) - 1)];
    }
    double normal() {
        double radius = std::sqrt(-2 * std::log(double((next() >> 11) + 1) * 0x1p-53));
        return radius * std::cos(2 * 3.14159265358979323846 * double(next() >> 11) * 0x1p-53);
    }

private:
    uint64_t state;
    const uint8_t *input = nullptr;
    size_t left = 0;
};

}  // namespace nearfield::check
