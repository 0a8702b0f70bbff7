// Work on the engine's threads, in one turn on the engine. What is done must not throw.
#pragma once

#include <cstddef>
#include <vector>

#include "../thread_pool.h"

namespace fastunet {

// body(index) for every index in [0, count).
template <class Body>
void in_parallel(ptrdiff_t count, const Body& body) {
  const Engine turn;
  parallel_for(
      static_cast<int>(count), [](void* context, int index, int) { (*static_cast<const Body*>(context))(index); },
      const_cast<Body*>(&body));
}

// body(index, scratch), with so many numbers of scratch for itself.
template <class Body>
void in_parallel(ptrdiff_t count, ptrdiff_t numbers, const Body& body) {
  const Engine turn;
  struct Context {
    const Body& body;
    ptrdiff_t numbers;
    std::vector<double> scratch;
  } context{body, numbers, std::vector<double>(static_cast<size_t>(numbers * thread_count()))};
  parallel_for(
      static_cast<int>(count),
      [](void* pointer, int index, int thread) {
        Context& c = *static_cast<Context*>(pointer);
        c.body(index, c.scratch.data() + thread * c.numbers);
      },
      &context);
}

}  // namespace fastunet
