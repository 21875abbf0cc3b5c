// Random problems with their memory and what the definition says of them.
#pragma once
#include <memory>
#include <string>

#include "draw.h"
#include "reference.h"

namespace nearfield::check {

constexpr uint8_t POISON = 0xff;  // repeated it is NaN in every dtype

// The memory of one tensor. Whatever is no element of it, gaps between rows and words at the ends, is poison.
struct Memory {
    Memory(int64_t bytes, bool far);
    ~Memory();
    Memory(const Memory &) = delete;

    uint8_t *data;
    int64_t bytes;
    bool far;  // mapped, and nearly all of it never touched
    std::vector<uint8_t> original;  // of an input
};

// One result of a call and what it should be.
struct Output {
    const char *name;
    nearfield_tensor tensor;
    int64_t dtype;
    Shape shape;
    Memory *memory;  // NULL if it is empty
    double tolerance, floor;  // the floor is an rms to measure small results by
    Doubles expected;
    bool backward;
    bool leaks;  // a special number that a query does not see may make it NaN: 0 times it, as in the definition in torch
};

struct Case {
    std::string text;
    bool is_decode = false, special = false, special_values = false;
    nearfield_attention attention{};
    nearfield_decode decode{};
    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<Output> outputs;
};

// One call of random problems: a decode alone, or some of attention.
std::vector<Case> make_job(Draw &draw);

}  // namespace nearfield::check
