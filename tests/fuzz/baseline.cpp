// In the place of csrc/cpu/dispatch.cpp: the kernels that every machine runs.
#include "cpu/table.h"

namespace fastunet {

const KernelTable& kernels() { return baseline::table; }

}  // namespace fastunet
