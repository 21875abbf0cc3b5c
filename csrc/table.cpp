// The table of one instruction set.
#include "table.h"

#define NEARFIELD_JOIN(a, b) a##b
#define NEARFIELD_TABLE(isa) NEARFIELD_JOIN(nearfield_table_, isa)
#define NEARFIELD_ENTRY(name, arguments) nearfield::NEARFIELD_ISA::name,

extern "C" const nearfield::Table NEARFIELD_TABLE(NEARFIELD_ISA) = {NEARFIELD_ENTRIES(NEARFIELD_ENTRY)};
