// Images as their callers hold them: reading a number of any type, turning, mirroring. Nothing is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "fastunet/predictor.hpp"

namespace fastunet {

// Where a channel of a pixel lies, at any address.
template <class T>
T* address(const Pixels<T>& p, ptrdiff_t row, ptrdiff_t column, ptrdiff_t channel = 0) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p.data) + row * p.row_stride + column * p.pixel_stride +
                              channel * p.channel_stride);
}

template <class T>
T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
void store(void* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

// body(T{}) with T the type of the image's numbers.
template <class Body>
void with_type_of(const Image& image, const Body& body) {
  switch (image.type) {
    case PixelType::uint8:
      return body(uint8_t{});
    case PixelType::uint16:
      return body(uint16_t{});
    case PixelType::float32:
      return body(float{});
  }
}

// The same pixels turned counterclockwise by quarters of a full turn, then mirrored left to right where `mirror`.
template <class T>
Pixels<T> turned(Pixels<T> p, int quarters, bool mirror) {
  for (; quarters > 0; --quarters) {
    p.data = address(p, 0, p.width - 1);
    std::swap(p.height, p.width);
    std::swap(p.row_stride, p.pixel_stride);
    p.row_stride = -p.row_stride;
  }
  if (mirror) {
    p.data = address(p, 0, p.width - 1);
    p.pixel_stride = -p.pixel_stride;
  }
  return p;
}

// The position that a mirrored axis of `size` pixels shows: numpy's "reflect", folded again and again.
inline ptrdiff_t mirrored(ptrdiff_t position, ptrdiff_t size) {
  if (size == 1) return 0;
  const ptrdiff_t period = 2 * size - 2;
  position %= period;
  if (position < 0) position += period;
  return position < size ? position : period - position;
}

}  // namespace fastunet
