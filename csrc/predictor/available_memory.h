// How much memory this process may still take, as fastunet/memory.py.
#pragma once

namespace fastunet {

// Bytes: the least of what machine, container and address-space limit leave. Where there is no /proc, half of the
// physical memory.
double available_memory();

}  // namespace fastunet
