// One multiprocessor, emulated: the threads of a block are fibers of one operating-system thread, each run until it
// waits; a block that no fiber can continue is a deadlock and says who waits where. Kernels are built with the
// instrumentation of the thread and undefined-behaviour sanitizers, whose calls end here: they say which bytes of
// shared memory a thread touches in plain C++, so that races are found whatever the order in which the threads ran.
#include "machine.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr int most_threads = 1024, most_warps = most_threads / 32;
constexpr unsigned all_lanes = 0xFFFFFFFFu;
constexpr unsigned window = 1024;       // where the window of shared addresses begins
constexpr unsigned char poison = 0xFF;  // in every element type it is NaN, or the most unlikely integer

// ---- Fibers: a stack and a place to continue ------------------------------------------------------------------------

constexpr std::size_t stack_bytes = 128 << 10;

struct Fiber {
  unsigned char* stack = nullptr;  // its lowest byte; the host's is unknown until another fiber asks for it
  std::size_t bytes = 0;
  void* place = nullptr;
};

#ifdef __x86_64__
// Keeps what a function must preserve on the stack that is left, and takes it from the one that is entered.
extern "C" void emulator_switch(void** left, void* entered);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

void begin_at(Fiber& fiber, void (*function)()) {
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.bytes) - 8;  // six registers, the function, its return
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(function);
  fiber.place = top;
}
void leave_for(Fiber& from, Fiber& to) { emulator_switch(&from.place, to.place); }
#else
void begin_at(Fiber& fiber, void (*function)()) {
  if (fiber.place == nullptr) fiber.place = new ucontext_t;
  ucontext_t* context = static_cast<ucontext_t*>(fiber.place);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = fiber.bytes;
  makecontext(context, function, 0);
}
void leave_for(Fiber& from, Fiber& to) {
  if (from.place == nullptr) from.place = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.place), static_cast<ucontext_t*>(to.place));
}
#endif

// A fiber is announced to AddressSanitizer, which would otherwise take its frames for another's.
void switch_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  void* frames;
  __sanitizer_start_switch_fiber(&frames, to.stack, to.bytes);
  leave_for(from, to);
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#else
  leave_for(from, to);
#endif
}

// ---- The block and its threads --------------------------------------------------------------------------------------

struct Copy {
  std::ptrdiff_t offset;  // in shared memory
  const void* global;     // nullptr: zeros
  int group;
};

struct Thread {
  Fiber fiber;
  Site site;                   // where it waits
  const Operation* operation;  // what for, unless it is a barrier
  unsigned mask;               // with which lanes
  void* operand;
  std::vector<Copy> copies;  // issued and not landed, in order
  int groups;                // committed
};

// A lane is running, or in exactly one of the masks.
struct Warp {
  unsigned ready, waiting, at_barrier, exited;
  std::uint16_t synchronized;  // __syncwarp so far, which orders the lanes' touches of memory
};

struct Machine {
  Fiber host;
  Thread threads[most_threads];
  Warp warps[most_warps];
  int order[most_warps];  // of the warps until the next barrier
  int turn;
  int current;  // the running thread, or -1
  int warp_count;

  const char* barrier_name;
  Site barrier_site;
  int arrived, agreed, agreed_last;

  unsigned char *shared_begin, *shared, *shared_end, *shared_pages_end;  // the block's memory within its pages
  std::uint32_t interval, first_interval;                                // between two barriers; the block's first
  const Kernel* kernel;
  const Launch* launch;
  const void* arguments;
  Failure* failure;
  std::uint64_t random;
} machine;

// A linear congruence: the order of threads and blocks is the same in every run, and differs all the time.
unsigned draw(unsigned below) {
  machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>((machine.random >> 32) % below);
}

template <typename T>
void shuffle(T* values, int count) {
  for (int i = count - 1; i > 0; --i) std::swap(values[i], values[draw(static_cast<unsigned>(i) + 1)]);
}

unsigned lanes_of_warp(int warp) {
  const int lanes = machine.launch->block - 32 * warp;
  return lanes >= 32 ? all_lanes : (1u << lanes) - 1u;
}

void resume(int thread) {
  if (thread == machine.current) return;
  Fiber& from = machine.current < 0 ? machine.host : machine.threads[machine.current].fiber;
  machine.current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  switch_fiber(from, machine.threads[thread].fiber);
}

void resume_host() {
  Fiber& from = machine.threads[machine.current].fiber;
  machine.current = -1;
  switch_fiber(from, machine.host);
}

bool same(Site one, Site other) { return one.line == other.line && one.file == other.file; }

std::string place(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

std::string block_name() {
  char text[160];
  std::snprintf(text, sizeof text, "%s, block (%u, %u, %u)", machine.kernel->name, blockIdx.x, blockIdx.y, blockIdx.z);
  return text;
}

std::string thread_name() { return block_name() + ", thread " + std::to_string(machine.current) + ": "; }

[[noreturn]] void end_launch(const std::string& message) {
  std::snprintf(machine.failure->message, sizeof machine.failure->message, "%s", message.c_str());
  resume_host();
  std::abort();  // a fiber left so is never entered again
}

// At an instruction of the kernel: device.py finds its line.
[[noreturn]] void end_launch_at(const void* instruction, const std::string& message) {
  Dl_info library;
  if (dladdr(instruction, &library) != 0) {
    machine.failure->instruction = static_cast<unsigned long long>(static_cast<const char*>(instruction) -
                                                                   static_cast<const char*>(library.dli_fbase));
  }
  end_launch(thread_name() + message);
}

// Who waits where, threads of one state together.
[[noreturn]] void deadlock() {
  std::string message = block_name() + ": deadlock";
  const auto state = [](int index) {
    const Warp& warp = machine.warps[index / 32];
    const unsigned bit = 1u << index % 32;
    if (warp.exited & bit) return std::string(" exited");
    const Thread& thread = machine.threads[index];
    const char* name = warp.at_barrier & bit ? machine.barrier_name : thread.operation->name;
    return std::string(" in ") + name + " (" + place(thread.site) + ")";
  };
  for (int first = 0; first < machine.launch->block;) {
    int end = first + 1;
    while (end < machine.launch->block && state(end) == state(first)) ++end;
    message += first == 0 ? ": " : ", ";
    message += end == first + 1 ? "thread " + std::to_string(first)
                                : "threads " + std::to_string(first) + "-" + std::to_string(end - 1);
    message += state(first);
    first = end;
  }
  end_launch(message);
}

// The order of a warp's lanes and of the block's warps changes at every choice, so that a result which depends on it
// shows; a warp runs until all its lanes wait, so that warps drift as far apart as barriers let them.
void run_another() {
  for (;;) {
    for (; machine.turn < machine.warp_count; ++machine.turn) {
      Warp& warp = machine.warps[machine.order[machine.turn]];
      if (warp.ready != 0) {
        const unsigned rotation = draw(32);
        const unsigned rotated = rotation == 0 ? warp.ready : warp.ready >> rotation | warp.ready << (32 - rotation);
        const int lane = static_cast<int>((static_cast<unsigned>(__builtin_ctz(rotated)) + rotation) % 32);
        warp.ready &= ~(1u << lane);
        return resume(32 * machine.order[machine.turn] + lane);
      }
    }
    const auto waits = [](const Warp& warp) { return warp.waiting != 0; };
    if (std::any_of(machine.warps, machine.warps + machine.warp_count, waits)) deadlock();
    bool all_exited = true;
    for (int i = 0; i < machine.warp_count; ++i) {
      Warp& warp = machine.warps[i];
      if (warp.at_barrier != 0) all_exited = false;
      warp.ready = warp.at_barrier;
      warp.at_barrier = 0;
    }
    if (all_exited) return resume_host();
    machine.agreed_last = machine.agreed;
    machine.arrived = machine.agreed = machine.turn = 0;
    ++machine.interval;
    shuffle(machine.order, machine.warp_count);
  }
}

void thread_main() {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (machine.host.stack == nullptr) {  // this is the launch's first fiber
    machine.host.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
    machine.host.bytes = bytes;
  }
#endif
  machine.kernel->thread(machine.arguments);
  machine.warps[machine.current / 32].exited |= 1u << machine.current % 32;
  run_another();
  std::abort();
}

void run_block() {
  const Launch& launch = *machine.launch;
  std::memset(machine.shared, poison, static_cast<std::size_t>(launch.shared_bytes));
  machine.warp_count = (launch.block + 31) / 32;
  for (int i = 0; i < machine.warp_count; ++i) {
    machine.warps[i] = {lanes_of_warp(i), 0, 0, 0, 0};
    machine.order[i] = i;
  }
  shuffle(machine.order, machine.warp_count);
  for (int i = 0; i < launch.block; ++i) {
    Thread& thread = machine.threads[i];
    thread.copies.clear();
    thread.groups = 0;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(thread.fiber.stack, thread.fiber.bytes);
#endif
    begin_at(thread.fiber, thread_main);
  }
  machine.turn = machine.arrived = machine.agreed = 0;
  machine.first_interval = ++machine.interval;
  machine.current = -1;
  run_another();
}

// ---- Memory: pages with unreadable neighbours -----------------------------------------------------------------------

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

// `bytes` of pages, kept for good, with a page on each side that faults when touched.
struct Pages {
  unsigned char* begin;
  std::size_t bytes;
  explicit Pages(std::size_t wanted) {
    const std::size_t page = page_bytes();
    bytes = (wanted + page - 1) / page * page;
    void* mapped = mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      std::perror("the emulator's memory");
      std::abort();
    }
    begin = static_cast<unsigned char*>(mapped) + page;
    mprotect(begin, bytes, PROT_READ | PROT_WRITE);
  }
};

// A touch of no one's memory ends the launch instead of the process.
void on_fault(int signal, siginfo_t* information, void* context) {
  if (machine.current < 0) {  // not a kernel's doing
    ::signal(signal, SIG_DFL);
    return;
  }
  const char* access = "access to";
  const void* instruction = nullptr;
#ifdef __x86_64__
  const greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  access = registers[REG_ERR] & 2 ? "write to" : "read of";
  instruction = reinterpret_cast<const void*>(registers[REG_RIP]);
#else
  (void)context;
#endif
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(information->si_addr);
  const Fiber& fiber = machine.threads[machine.current].fiber;
  const std::uintptr_t stack = reinterpret_cast<std::uintptr_t>(fiber.stack);
  char text[160];
  if (signal == SIGFPE) {
    std::snprintf(text, sizeof text, "integer division by zero");
  } else if (address < stack && address >= stack - page_bytes()) {
    std::snprintf(text, sizeof text, "stack overflow");
  } else {
    machine.failure->address = address;
    std::snprintf(text, sizeof text, "invalid %s memory at 0x%llx", access, static_cast<unsigned long long>(address));
  }
  end_launch_at(instruction, text);
}

// Faults are caught on a stack of their own while a kernel runs, and Python's handlers come back after it.
class FaultHandler {
 public:
  FaultHandler() {
    static const Pages pages(64 << 10);
    stack_t stack{};
    stack.ss_sp = pages.begin;
    stack.ss_size = pages.bytes;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler never returns
    for (int i = 0; i < count; ++i) sigaction(signals[i], &action, &old_[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < count; ++i) sigaction(signals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int count = 3, signals[count] = {SIGSEGV, SIGBUS, SIGFPE};
  stack_t old_stack_{};
  struct sigaction old_[count]{};
};

// ---- Touches of shared memory ---------------------------------------------------------------------------------------

// Who touched a pair of bytes last, and when. Two touches by different threads, one of them a write, are a race unless
// a barrier lies between them or, within a warp, a __syncwarp. (Single bytes are not followed.)
struct Touch {
  std::uint32_t interval;
  std::uint16_t synchronized;
  std::uint16_t by;  // a thread, or lanes_of + its warp, or several_warps; + in_flight until a cp_async_16 has landed
};
constexpr std::uint16_t lanes_of = 1024, several_warps = 2047, in_flight = 2048;

constexpr int most_shared_bytes = 228 << 10;
Touch writers[most_shared_bytes / 2], readers[most_shared_bytes / 2];

int warp_of(std::uint16_t by) { return by < lanes_of ? by / 32 : by - lanes_of; }

bool in_order(const Touch& earlier, const Touch& now) {
  return earlier.interval != now.interval || earlier.by == now.by ||
         (warp_of(earlier.by) == warp_of(now.by) && earlier.synchronized != now.synchronized);
}

std::string who(std::uint16_t by) {
  if (by < lanes_of) return "thread " + std::to_string(by);
  return by == several_warps ? "several warps" : "lanes of warp " + std::to_string(by - lanes_of);
}

Touch touch_of(int thread) {
  return {machine.interval, machine.warps[thread / 32].synchronized, static_cast<std::uint16_t>(thread)};
}

// Records a touch of shared memory; returns what is wrong with it, or nothing.
template <bool write>
std::string touch(std::ptrdiff_t offset, std::ptrdiff_t bytes, int thread) {
  const auto describe = [&](std::ptrdiff_t pair, const char* text, const Touch& other) {
    return (write ? "writes byte " : "reads byte ") + std::to_string(2 * pair) + " of shared memory, which " + text +
           who(other.by % in_flight);
  };
  if (offset < 0 || offset + bytes > machine.shared_end - machine.shared) {
    return (write ? "writes byte " : "reads byte ") + std::to_string(offset) + " of " +
           std::to_string(machine.shared_end - machine.shared) + " bytes of shared memory";
  }
  if (bytes == 1) return {};
  const Touch now = touch_of(thread);
  for (std::ptrdiff_t pair = offset / 2; pair <= (offset + bytes - 1) / 2; ++pair) {
    Touch &writer = writers[pair], &reader = readers[pair];
    if (writer.by >= in_flight && writer.interval >= machine.first_interval) {
      return describe(pair, "has not been waited for since cp_async_16 by ", writer);
    }
    if (!in_order(writer, now)) return describe(pair, "without a barrier was written by ", writer);
    if (write) {
      if (!in_order(reader, now)) return describe(pair, "without a barrier was read by ", reader);
      writer = now;
    } else if (in_order(reader, now)) {
      reader = now;
    } else {
      reader.by = warp_of(reader.by) == warp_of(now.by) ? static_cast<std::uint16_t>(lanes_of + warp_of(now.by))
                                                        : several_warps;
    }
  }
  return {};
}

// A plain load or store of a kernel.
template <bool write>
void touch_anywhere(const void* pointer, std::ptrdiff_t bytes, const void* instruction) {
  const unsigned char* const first = static_cast<const unsigned char*>(pointer);
  if (first < machine.shared_begin || first >= machine.shared_pages_end) return;
  const std::string wrong = touch<write>(first - machine.shared, bytes, machine.current);
  if (!wrong.empty()) end_launch_at(instruction, wrong);
}

// Why no device would take this launch, or nothing.
std::string refusal(const Kernel& kernel, const Launch& launch) {
  char text[300] = "";
  const auto say = [&](const char* format, auto... values) { std::snprintf(text, sizeof text, format, values...); };
  const int (&grid)[3] = launch.grid;
  if (launch.argument_bytes != kernel.argument_bytes) {
    say("its arguments are %d bytes, those given %d", kernel.argument_bytes, launch.argument_bytes);
  } else if (*std::min_element(grid, grid + 3) < 1 || std::max(grid[1], grid[2]) > 65535) {
    say("a grid of %d x %d x %d blocks cannot be launched", grid[0], grid[1], grid[2]);
  } else if (launch.block < 1 || launch.block > kernel.most_threads) {
    say("a block of %d threads was launched, its launch bounds allow 1 to %d", launch.block, kernel.most_threads);
  } else if (launch.shared_bytes < 0 || launch.shared_bytes > launch.shared_limit) {
    say("%d bytes of shared memory were asked for, a block of this architecture may have %d", launch.shared_bytes,
        launch.shared_limit);
  }
  return text[0] == 0 ? "" : std::string(kernel.name) + ": " + text;
}

}  // namespace

void fail(Site site, const char* format, ...) {
  char text[400];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  end_launch(thread_name() + text + " (" + place(site) + ")");
}

bool launch(const Kernel& kernel, const Launch& launch, const void* arguments, Failure* failure) {
  *failure = {};
  const auto failed = [failure](const std::string& message) {
    std::snprintf(failure->message, sizeof failure->message, "%s", message.c_str());
    return false;
  };
  const std::string refused = refusal(kernel, launch);
  if (!refused.empty()) return failed(refused);

  for (int i = 0; i < launch.block; ++i) {
    if (machine.threads[i].fiber.stack == nullptr) {
      const Pages pages(stack_bytes);
      machine.threads[i].fiber = {pages.begin, pages.bytes, nullptr};
    }
  }
  static const Pages pages(most_shared_bytes);
  std::memset(pages.begin, poison, pages.bytes);
  machine.shared_begin = pages.begin;
  machine.shared_pages_end = pages.begin + pages.bytes;
  machine.shared = machine.shared_pages_end - (launch.shared_bytes + 1023) / 1024 * 1024;  // aligned to 1024
  machine.shared_end = machine.shared + launch.shared_bytes;
  machine.host = {};
  machine.kernel = &kernel;
  machine.launch = &launch;
  machine.arguments = arguments;
  machine.failure = failure;
  machine.random = launch.seed;
  blockDim = {static_cast<unsigned>(launch.block), 1, 1};
  gridDim = {static_cast<unsigned>(launch.grid[0]), static_cast<unsigned>(launch.grid[1]),
             static_cast<unsigned>(launch.grid[2])};

  std::vector<unsigned> blocks(static_cast<std::size_t>(gridDim.x) * gridDim.y * gridDim.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  shuffle(blocks.data(), static_cast<int>(blocks.size()));
  const FaultHandler handler;
  for (const unsigned block : blocks) {
    blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
    run_block();
    if (failure->message[0] != 0) return false;
    const auto is_poison = [](unsigned char byte) { return byte == poison; };
    if (!std::all_of(std::max(machine.shared_begin, machine.shared - 4096), machine.shared, is_poison) ||
        !std::all_of(machine.shared_end, machine.shared_pages_end, is_poison)) {
      return failed(block_name() + ": wrote outside its " + std::to_string(launch.shared_bytes) +
                    " bytes of shared memory");
    }
  }
  return true;
}

// ---- Waiting for one another ----------------------------------------------------------------------------------------

int barrier(const char* name, bool predicate, Site site) {
  Thread& thread = machine.threads[machine.current];
  if (machine.arrived == 0) {
    machine.barrier_name = name;
    machine.barrier_site = site;
  } else if (!same(site, machine.barrier_site)) {
    fail(site, "divergent barrier: comes to %s here while others wait in %s (%s)", name, machine.barrier_name,
         place(machine.barrier_site).c_str());
  }
  ++machine.arrived;
  machine.agreed += predicate;
  thread.site = site;
  machine.warps[machine.current / 32].at_barrier |= 1u << machine.current % 32;
  run_another();
  return machine.agreed_last;
}

void collective(const Operation& operation, unsigned mask, void* operand, Site site) {
  const int index = machine.current, lane = index % 32;
  Warp& warp = machine.warps[index / 32];
  Thread* const lanes = machine.threads + index / 32 * 32;
  if (!(mask >> lane & 1u)) fail(site, "%s with a mask of 0x%08x, in which its lane is not", operation.name, mask);
  const unsigned others = warp.waiting & mask;
  if (others != 0) {
    const Thread& other = lanes[__builtin_ctz(others)];
    if (other.operation->name != operation.name || other.mask != mask || !same(other.site, site)) {
      fail(site, "diverged warp: lane %d comes to %s with mask 0x%08x here while lane %d waits in %s with 0x%08x (%s)",
           lane, operation.name, mask, __builtin_ctz(others), other.operation->name, other.mask,
           place(other.site).c_str());
    }
  }
  lanes[lane].operation = &operation;
  lanes[lane].mask = mask;
  lanes[lane].operand = operand;
  lanes[lane].site = site;
  if ((others | 1u << lane) == mask) {
    void* operands[32] = {};
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1u) operands[i] = lanes[i].operand;
    }
    operation.perform(operands, mask, site);
    warp.waiting &= ~mask;
    warp.ready |= others;
    return;
  }
  warp.waiting |= 1u << lane;
  run_another();
}

void synchronize_warp(unsigned mask, Site site) {
  const auto perform = [](void* const(&)[32], unsigned, Site) { ++machine.warps[machine.current / 32].synchronized; };
  collective({"__syncwarp", perform}, mask, nullptr, site);
}

// ---- Shared memory --------------------------------------------------------------------------------------------------

unsigned char* shared_memory() { return machine.shared; }

unsigned shared_address(const void* pointer, Site site) {
  const unsigned char* const byte = static_cast<const unsigned char*>(pointer);
  if (byte < machine.shared_begin || byte > machine.shared_pages_end) {
    fail(site, "shared_address of what is not in shared memory");
  }
  return window + static_cast<unsigned>(byte - machine.shared);
}

const unsigned char* shared_read(unsigned shared, int bytes, int lane, const char* name, Site site) {
  const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(shared) - window;
  if (offset % bytes != 0) {
    fail(site, "%s of lane %d: byte %td of shared memory is not aligned to %d", name, lane, offset, bytes);
  }
  const std::string wrong = touch<false>(offset, bytes, machine.current / 32 * 32 + lane);
  if (!wrong.empty()) fail(site, "%s of lane %d %s", name, lane, wrong.c_str());
  return machine.shared + offset;
}

// Until a copy lands its place holds poison; what comes to it is read when it lands.
void copy_16(unsigned shared, const void* global, bool valid, Site site) {
  const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(shared) - window;
  if (offset % 16 != 0) fail(site, "cp_async_16: byte %td of shared memory is not aligned to 16", offset);
  const std::string wrong = touch<true>(offset, 16, machine.current);
  if (!wrong.empty()) fail(site, "cp_async_16 %s", wrong.c_str());
  if (valid && reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
    fail(site, "cp_async_16: global address %p is not aligned to 16", global);
  }
  if (valid) (void)*static_cast<const volatile unsigned char*>(global);  // it faults here or nowhere
  std::memset(machine.shared + offset, poison, 16);
  for (std::ptrdiff_t pair = offset / 2; pair < offset / 2 + 8; ++pair) writers[pair].by |= in_flight;
  Thread& thread = machine.threads[machine.current];
  thread.copies.push_back({offset, valid ? global : nullptr, thread.groups});
}

void copy_commit() { ++machine.threads[machine.current].groups; }

void copy_wait(int pending) {
  Thread& thread = machine.threads[machine.current];
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group < thread.groups - pending; ++copy) {
    if (copy->global != nullptr) {
      std::memcpy(machine.shared + copy->offset, copy->global, 16);
    } else {
      std::memset(machine.shared + copy->offset, 0, 16);
    }
    std::fill_n(writers + copy->offset / 2, 8, touch_of(machine.current));
  }
  thread.copies.erase(thread.copies.begin(), copy);
}

}  // namespace emulator

// ---- What the compiler's instrumentation calls ----------------------------------------------------------------------

#define CALLER (static_cast<const char*>(__builtin_return_address(0)) - 1)
#define TOUCH(bytes)                                                                                            \
  void __tsan_read##bytes(void* pointer) { emulator::touch_anywhere<false>(pointer, bytes, CALLER); }           \
  void __tsan_write##bytes(void* pointer) { emulator::touch_anywhere<true>(pointer, bytes, CALLER); }           \
  void __tsan_unaligned_read##bytes(void* pointer) { emulator::touch_anywhere<false>(pointer, bytes, CALLER); } \
  void __tsan_unaligned_write##bytes(void* pointer) { emulator::touch_anywhere<true>(pointer, bytes, CALLER); }

#define UNDEFINED(name, text) \
  void __ubsan_handle_##name() { emulator::end_launch_at(CALLER, text); }

extern "C" {
void __tsan_init() {}
TOUCH(1)
TOUCH(2)
TOUCH(4)
TOUCH(8)
TOUCH(16)
void __tsan_read_range(void* pointer, std::size_t bytes) {
  emulator::touch_anywhere<false>(pointer, static_cast<std::ptrdiff_t>(bytes), CALLER);
}
void __tsan_write_range(void* pointer, std::size_t bytes) {
  emulator::touch_anywhere<true>(pointer, static_cast<std::ptrdiff_t>(bytes), CALLER);
}

void __ubsan_handle_type_mismatch_v1(void*, void* pointer) {
  emulator::end_launch_at(CALLER, pointer == nullptr ? "null pointer" : "misaligned access");
}
UNDEFINED(add_overflow, "signed overflow of +")
UNDEFINED(sub_overflow, "signed overflow of -")
UNDEFINED(mul_overflow, "signed overflow of *")
UNDEFINED(negate_overflow, "signed overflow of -")
UNDEFINED(divrem_overflow, "integer division by zero, or overflow")
UNDEFINED(shift_out_of_bounds, "shift by less than 0 or more than the bits there are, or overflow of it")
UNDEFINED(out_of_bounds, "index outside its array")
UNDEFINED(pointer_overflow, "pointer arithmetic overflows")
UNDEFINED(load_invalid_value, "a bool or enumerator of no valid value")
UNDEFINED(builtin_unreachable, "reached what was said to be unreachable")
UNDEFINED(missing_return, "end of a function that returns a value")
UNDEFINED(invalid_builtin, "__clz or the like of 0")
UNDEFINED(nonnull_arg, "null pointer")
}
