// What a kernel's threads ask of the emulated multiprocessor: to wait for one another, to exchange values within a
// warp, to reach shared memory by its window address, to copy asynchronously. emulator.h says CUDA in these terms;
// machine.cpp and warp.cpp do it.
#pragma once

namespace emulator {

// A place in a kernel's source: what the threads of a barrier must have in common, and what an error names.
struct Site {
  const char* file;
  int line;
};
constexpr Site at(const char* file, int line) { return {file, line}; }

struct Kernel {
  const char* name;
  void (*thread)(const void* arguments);
  int argument_bytes;
  int most_threads;
};

// Mirrored by `Launch` in device.py.
struct Launch {
  int grid[3];
  int block;
  int shared_bytes;
  int shared_limit;
  int argument_bytes;
  unsigned seed;
};

// Mirrored by `Failure` in device.py: the memory that was touched and is nobody's, and the instruction that did what
// is not allowed, counted from its library's beginning; 0 where there is none.
struct Failure {
  unsigned long long address, instruction;
  char message[2000];
};

// Runs every block of the grid, one after the other in a shuffled order; returns whether all went well.
bool launch(const Kernel& kernel, const Launch& launch, const void* arguments, Failure* failure);

// Ends the launch with this error, said of the thread that calls. It does not return to the kernel.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(Site site, const char* format, ...);

// Waits until every thread of the block that has not exited is here; returns how many came with a true predicate.
int barrier(const char* name, bool predicate, Site site);

// Waits until every lane of `mask` is here; the last to come performs the operation on the operands of all.
struct Operation {
  const char* name;
  void (*perform)(void* const (&operands)[32], unsigned mask, Site site);
};
void collective(const Operation& operation, unsigned mask, void* operand, Site site);

// The collectives of warp.cpp, as emulator.h and kernels/ptx.cuh name them.
void synchronize_warp(unsigned mask, Site site);
unsigned long long shuffle(const char* name, unsigned mask, unsigned long long value, int source, Site site);
unsigned vote(const char* name, unsigned mask, bool predicate, Site site);
void load_matrices(const char* name, unsigned (&matrix)[4], unsigned shared, bool transposed, Site site);
void multiply_matrices(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Site site);

// The block's dynamic shared memory, and its window: addresses from 1024 on, so that 0 is none.
unsigned char* shared_memory();
unsigned shared_address(const void* pointer, Site site);
// Where `bytes` aligned bytes of the window are that `lane` of the running warp reads.
const unsigned char* shared_read(unsigned shared, int bytes, int lane, const char* name, Site site);

void copy_16(unsigned shared, const void* global, bool valid, Site site);
void copy_commit();
void copy_wait(int pending);

}  // namespace emulator
