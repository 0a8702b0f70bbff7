#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

namespace fastunet {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // Of fewer threads where the system grants no more.
  explicit Pool(int count) {
    workers_.reserve(count);
    try {
      for (int thread = 1; thread < count; ++thread) workers_.emplace_back([this, thread] { work(thread); });
    } catch (const std::system_error&) {
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      ++generation_;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int count, Task task, void* context) {
    if (count <= 1 || workers_.empty()) {
      for (int index = 0; index < count; ++index) task(context, index, 0);
      return;
    }
    task_ = task;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++generation_;
    }
    wake_.notify_all();
    take(0);
    for (int spin = 0; busy_.load(std::memory_order_acquire) != 0; ++spin) {
      // A worker that lost its core to another program would be waited for in vain: let it run.
      if (spin < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 4000;  // some 50 to 100 us: longer than the gaps between a network's layers

  void take(int thread) {
    for (int index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) task_(context_, index, thread);
  }

  void work(int thread) {
    for (unsigned long seen = 0;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) relax();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
      }
      if (stop_) return;
      seen = generation_.load(std::memory_order_acquire);
      take(thread);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<unsigned long> generation_{0};
  std::atomic<int> next_{0};
  std::atomic<int> busy_{0};
  bool stop_ = false;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int count_ = 0;
};

// Cores that a container's quota comes to (cgroup v2), or `cores` where there is none.
int within_quota(int cores) {
  double quota = 0, period = 0;
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  if (!(file >> quota >> period) || quota <= 0 || period <= 0) return cores;  // "max" is no number: no quota
  const int granted = static_cast<int>(quota / period + 0.999);
  return granted < cores ? granted : cores;
}

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return within_quota(CPU_COUNT(&set));
#endif
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return cores > 0 ? cores : 1;
}

std::mutex engine_mutex;

// A fork waits for the operation in progress: the child would find the engine taken by a thread it does not have.
[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { engine_mutex.lock(); }, [] { engine_mutex.unlock(); }, [] { engine_mutex.unlock(); });

int requested = 0;

// Never destroyed at exit (its threads may outlive static destructors) and made anew in a forked child, which
// has none of its parent's threads.
Pool*& pool() {
  static Pool* current = nullptr;
  static pid_t owner = 0;
  if (current == nullptr || owner != getpid()) {
    current = new Pool(requested > 0 ? requested : usable_cores());
    owner = getpid();
  }
  return current;
}

}  // namespace

Engine::Engine() { engine_mutex.lock(); }
Engine::~Engine() { engine_mutex.unlock(); }

void parallel_for(int count, Task task, void* context) { pool()->run(count, task, context); }

int thread_count() { return pool()->count(); }

void set_thread_count(int count) {
  requested = count > 1 ? count : 1;
  Pool*& current = pool();
  if (current->count() == requested) return;
  Pool* const next = new Pool(requested);
  delete current;
  current = next;
}

}  // namespace fastunet
