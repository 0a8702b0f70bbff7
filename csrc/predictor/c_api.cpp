// The C API: the C++ one with statuses in the place of exceptions.
#include <algorithm>
#include <cstring>
#include <string>

#include "fastunet/fastunet.h"
#include "fastunet/predictor.hpp"

struct fastunet_predictor {
  fastunet::Predictor predictor;
};

namespace {

thread_local std::string last_error;

fastunet_status failed(fastunet_status status, const char* sentence) noexcept {
  try {
    last_error = sentence;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

template <class Body>
fastunet_status status_of(const Body& body) noexcept {
  try {
    body();
    return FASTUNET_OK;
  } catch (const fastunet::DataError& error) {
    return failed(FASTUNET_BAD_FILE, error.what());
  } catch (const fastunet::Cancelled& error) {
    return failed(FASTUNET_CANCELLED, error.what());
  } catch (const fastunet::MemoryError& error) {
    return failed(FASTUNET_OUT_OF_MEMORY, error.what());
  } catch (const std::bad_alloc&) {
    return failed(FASTUNET_OUT_OF_MEMORY, "memory does not suffice; free some");
  } catch (const std::invalid_argument& error) {
    return failed(FASTUNET_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return failed(FASTUNET_FAILED, error.what());
  } catch (...) {
    return failed(FASTUNET_FAILED, "an exception of unknown type was thrown");
  }
}

template <class T>
const T& given(const T* pointer, const char* what) {
  if (pointer == nullptr) throw std::invalid_argument(std::string("no ") + what + " was given: the pointer is null");
  return *pointer;
}

fastunet::Image image_of(const fastunet_image* image) {
  using fastunet::PixelType;
  const fastunet_image& i = given(image, "image");
  if (i.type < FASTUNET_UINT8 || i.type > FASTUNET_FLOAT32)
    throw std::invalid_argument("the image is of type " + std::to_string(static_cast<int>(i.type)) +
                                "; FASTUNET_UINT8, FASTUNET_UINT16 or FASTUNET_FLOAT32 is expected");
  constexpr PixelType kTypes[] = {PixelType::uint8, PixelType::uint16, PixelType::float32};
  return {kTypes[i.type], fastunet::Pixels<const void>(i.data, i.height, i.width, i.channels, i.row_stride,
                                                       i.pixel_stride, i.channel_stride)};
}

template <class T>
fastunet_status predict(const fastunet_predictor* predictor, const fastunet_image* image, const fastunet_result* result,
                        bool classes, fastunet_progress progress, void* user_data) {
  return status_of([&] {
    const fastunet::Predictor& p = given(predictor, "predictor").predictor;
    const fastunet::Image i = image_of(image);
    const fastunet_result& r = given(result, "result");
    const fastunet::Pixels<T> pixels(static_cast<T*>(r.data), i.pixels.height, i.pixels.width,
                                     classes ? 1 : p.model().num_classes, r.row_stride, r.pixel_stride,
                                     r.channel_stride);
    fastunet::Progress tell;
    if (progress != nullptr) tell = [&](double part) { return progress(user_data, part) != 0; };
    p.predict(i, pixels, tell);
  });
}

}  // namespace

const char* fastunet_error(void) { return last_error.c_str(); }

fastunet_options fastunet_default_options(void) {
  const fastunet::Options options;
  return {sizeof(fastunet_options), options.tile, options.rotations, options.memory};
}

fastunet_status fastunet_load(const char* model_file, const fastunet_options* options, fastunet_predictor** predictor) {
  return status_of([&] {
    given(predictor, "place for the predictor");
    *predictor = nullptr;
    fastunet_options o = fastunet_default_options();
    if (options != nullptr) {
      if (options->size < sizeof(size_t) || options->size > sizeof(o))
        throw std::invalid_argument("the options say that they are " + std::to_string(options->size) +
                                    " bytes; fastunet_default_options() makes them right");
      std::memcpy(&o, options, options->size);
    }
    const std::string file = &given(model_file, "model file");
    *predictor = new fastunet_predictor{fastunet::Predictor(file, {o.tile, o.rotations, o.memory})};
  });
}

void fastunet_free(fastunet_predictor* predictor) { delete predictor; }

fastunet_status fastunet_describe(const fastunet_predictor* predictor, fastunet_model* model) {
  return status_of([&] {
    const fastunet::Model& m = given(predictor, "predictor").predictor.model();
    given(model, "place for the description");
    *model = {m.in_channels, m.num_classes, m.base_channels, m.depth};
  });
}

const char* fastunet_class_name(const fastunet_predictor* predictor, int index) {
  if (predictor == nullptr || index < 0) return nullptr;
  const auto& names = predictor->predictor.model().class_names;
  return static_cast<size_t>(index) < names.size() ? names[static_cast<size_t>(index)].c_str() : nullptr;
}

fastunet_status fastunet_plan_image(const fastunet_predictor* predictor, ptrdiff_t height, ptrdiff_t width,
                                    fastunet_plan* plan) {
  return status_of([&] {
    const fastunet::Plan p = given(predictor, "predictor").predictor.plan(height, width);
    given(plan, "place for the plan");
    *plan = {p.tile_height, p.tile_width, p.preferred_height, p.preferred_width, p.tiles, p.memory};
  });
}

fastunet_status fastunet_predict_probabilities(const fastunet_predictor* predictor, const fastunet_image* image,
                                               const fastunet_result* probabilities, fastunet_progress progress,
                                               void* user_data) {
  return predict<float>(predictor, image, probabilities, false, progress, user_data);
}

fastunet_status fastunet_predict_classes(const fastunet_predictor* predictor, const fastunet_image* image,
                                         const fastunet_result* classes, fastunet_progress progress, void* user_data) {
  return predict<uint8_t>(predictor, image, classes, true, progress, user_data);
}

fastunet_status fastunet_set_threads(int count) {
  return status_of([&] { fastunet::set_threads(count); });
}

int fastunet_threads(void) {
  int count = 0;
  status_of([&] { count = fastunet::threads(); });
  return count;
}
