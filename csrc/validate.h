// Refuses descriptors that a kernel must not see, from their numbers alone: no tensor is read.
#pragma once
#include "nearfield.h"

namespace nearfield {

int validate_attention(const nearfield_attention *problems, int64_t count, int64_t threads, bool backward);
int validate_decode(const nearfield_decode *problem, int64_t threads);
int validate_shares(const nearfield_shares *problem, int64_t threads);
int validate_choice(const nearfield_choice *problem, int64_t threads);
int validate_scan(const nearfield_scan *problem, int64_t threads, bool backward);
int validate_lla(const nearfield_lla *problem, int64_t threads, bool backward);
int validate_linear(const nearfield_linear *problem, int64_t threads, bool backward);

}  // namespace nearfield
