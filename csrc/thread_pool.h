// The engine's own threads: one pool for the process, spinning briefly between the many short parallel
// sections of a network and sleeping when nothing comes. Plain function pointers, so that kernels compiled
// for an instruction set the machine may lack instantiate no library template.
#pragma once

namespace fastunet {

using Task = void (*)(void* context, int index, int thread);

// Runs task(context, index, thread) for every index in [0, count); indices are handed out in increasing order
// as threads become free, thread is in [0, thread_count()). Returns when all are done. The caller takes part.
// Must not be called from within a task; whoever calls holds Engine (below).
void parallel_for(int count, Task task, void* context);

int thread_count();

// Threads used from now on, the caller's included; at least 1, and fewer where the system grants no more.
void set_thread_count(int count);

// One operation at a time uses the pool and the scratch memory: callers on several threads queue here.
class Engine {
 public:
  Engine();
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
};

}  // namespace fastunet
