// GCC's builtin, of which Clang has no equal for lanes that are not constants.
#pragma once

template <class Vector, class Lanes>
Vector __builtin_shuffle(Vector first, Vector second, Lanes which) {
  constexpr int kCount = sizeof(Vector) / sizeof(first[0]);
  Vector result{};
  for (int lane = 0; lane < kCount; ++lane)
    result[lane] = which[lane] < kCount ? first[which[lane]] : second[which[lane] - kCount];
  return result;
}
