// The Python module _fastunet: a binding of arrays and the operations on them. The GIL is released while they run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>

#include "memory.h"
#include "operations.h"
#include "thread_pool.h"

namespace py = pybind11;
using namespace py::literals;

// An argument of type Span is a contiguous ndarray; where it is written to, one of just this type.
namespace pybind11::detail {
template <class T>
struct type_caster<fastunet::Span<T>> {
  using Value = std::remove_const_t<T>;
  using Values = array_t<Value, array::c_style>;
  PYBIND11_TYPE_CASTER(fastunet::Span<T>, const_name("ndarray of ") + npy_format_descriptor<Value>::name);

  bool load(handle source, bool convert) {
    if ((!convert || !std::is_const_v<T>) && !Values::check_(source)) return false;
    values = Values::ensure(source);
    if (!values) return false;
    if constexpr (std::is_const_v<T>) {
      value = {values.data(), values.size()};
    } else {
      value = {values.mutable_data(), values.size()};
    }
    return true;
  }

 private:
  Values values;
};
}  // namespace pybind11::detail

namespace fastunet {
namespace {

using Pixels = py::array_t<float, py::array::c_style>;
using Labels = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Weights = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Unlocked = py::call_guard<py::gil_scoped_release>;

Array from_pixels(const Pixels& pixels) {
  if (pixels.ndim() != 4)
    throw std::invalid_argument("an array of " + std::to_string(pixels.ndim()) +
                                " axes was given, (N, H, W, C) is expected");
  int shape[4];
  for (int axis = 0; axis < 4; ++axis) shape[axis] = static_cast<int>(pixels.shape(axis));
  const py::gil_scoped_release unlocked;
  return Array::from_pixels(pixels.data(), shape[0], shape[1], shape[2], shape[3]);
}

Pixels to_pixels(const Array& array) {
  Pixels pixels({array.view.images, array.height, array.width, array.view.channels});
  float* const target = pixels.mutable_data();
  const py::gil_scoped_release unlocked;
  array.to_pixels(target);
  return pixels;
}

}  // namespace
}  // namespace fastunet

PYBIND11_MODULE(_fastunet, module) {
  using namespace fastunet;
  module.doc() = "fastunet's CPU engine";

  py::class_<Array>(module, "Array", "A float32 tensor in the engine's own layout.")
      .def(py::init([](int images, int height, int width, int channels) {
             Array array(images, height, width, channels);
             array.clear();
             array.masked = true;  // as a gradient, by whatever ReLU
             return array;
           }),
           "images"_a, "height"_a, "width"_a, "channels"_a, "Zeros.")
      .def_static("from_pixels", &from_pixels, "pixels"_a, "Copies a contiguous float32 (N, H, W, C).")
      .def("pixels", &to_pixels, "A copy as (N, H, W, C).")
      .def_property_readonly(
          "shape", [](const Array& a) { return py::make_tuple(a.view.images, a.height, a.width, a.view.channels); })
      .def_property_readonly("nbytes", [](const Array& a) { return a.block ? a.block->floats * sizeof(float) : 0; });

  py::class_<Choice>(module, "Choice", "Which pixel won each 2x2 of a pooling.")
      .def_property_readonly("nbytes", [](const Choice& c) { return c.bytes->floats * sizeof(float); });

  module.def(
      "conv3x3_algorithm",
      [](const std::string& wanted, int inputs, int outputs, int height, int width) {
        return name_of(kernels().conv3x3_algorithm(algorithm_named(wanted), inputs, outputs, height, width));
      },
      "wanted"_a, "inputs"_a, "outputs"_a, "height"_a, "width"_a);
  module.def("conv3x3_forward", &conv3x3_forward, Unlocked(), "x"_a, "skip"_a, "weight"_a, "bias"_a, "outputs"_a,
             "relu"_a, "algorithm"_a = "auto");
  module.def("conv3x3_maxpool2x2_forward", &conv3x3_maxpool2x2_forward, Unlocked(), "x"_a, "weight"_a, "bias"_a,
             "outputs"_a, "kept_height"_a, "kept_width"_a, "wants_choice"_a, "algorithm"_a = "auto");
  module.def("conv3x3_backward", &conv3x3_backward, Unlocked(), "gradient"_a, "x"_a, "skip"_a, "relu_output"_a,
             "weight"_a, "weight_gradient"_a, "bias_gradient"_a, "wants_input"_a, "algorithm"_a = "auto");
  module.def("upconv2x2_forward", &upconv2x2_forward, Unlocked(), "x"_a, "weight"_a, "bias"_a, "outputs"_a);
  module.def("upconv2x2_backward", &upconv2x2_backward, Unlocked(), "gradient"_a, "x"_a, "weight"_a,
             "weight_gradient"_a, "bias_gradient"_a, "wants_input"_a);
  py::class_<Composed, std::shared_ptr<Composed>>(module, "Composed",
                                                  "An up-convolution and the convolution behind it as one linear map.");
  module.def("composing_pays", &composing_pays, "algorithm"_a, "inputs"_a, "middle"_a, "skip"_a, "outputs"_a);
  module.def(
      "composed_floats",
      [](int inputs, int middle, int skip, int outputs) {
        return Composition{padded(inputs), padded(middle), padded(skip), padded(outputs)}.floats();
      },
      "inputs"_a, "middle"_a, "skip"_a, "outputs"_a);
  module.def("compose", &compose, Unlocked(), "up_weight"_a, "up_bias"_a, "weight"_a, "bias"_a, "inputs"_a, "middle"_a,
             "skip"_a, "outputs"_a);
  module.def("composed_forward", &composed_forward, Unlocked(), "x"_a, "skip"_a, "composed"_a, "outputs"_a);
  module.def("conv1x1_forward", &conv1x1_forward, Unlocked(), "x"_a, "weight"_a, "bias"_a, "outputs"_a);
  module.def("conv1x1_backward", &conv1x1_backward, Unlocked(), "gradient"_a, "x"_a, "weight"_a, "weight_gradient"_a,
             "bias_gradient"_a, "wants_input"_a);
  module.def("maxpool2x2_forward", &maxpool2x2_forward, Unlocked(), "x"_a);
  module.def("maxpool2x2_backward", &maxpool2x2_backward, Unlocked(), "gradient"_a, "choice"_a, "height"_a, "width"_a,
             "present"_a = std::nullopt);
  module.def(
      "softmax_cross_entropy",
      [](const Array& logits, const Labels& labels, const Weights& weights, bool wants_gradient) {
        return softmax_cross_entropy(logits, {labels.data(), labels.size()}, {weights.data(), weights.size()},
                                     wants_gradient);
      },
      Unlocked(), "logits"_a, "labels"_a, "weights"_a, "wants_gradient"_a);
  module.def("softmax", &softmax, Unlocked(), "logits"_a);
  module.def("dropout", &dropout, Unlocked(), "x"_a, "rate"_a, "seed"_a, "draw"_a);
  module.def("add_centre", &add_centre, Unlocked(), "target"_a, "source"_a);
  module.def("multiply", &multiply, Unlocked(), "target"_a, "factor"_a);
  module.def("sgd_momentum", &sgd_momentum, Unlocked(), "value"_a, "gradient"_a, "momentum"_a, "learning_rate"_a,
             "rate"_a);

  module.def("group_width", &group_width, "outputs"_a);
  module.attr("BLOCK") = kBlock;
  module.def("instruction_set", [] { return std::string(kernels().name); });
  module.def(
      "thread_count",
      [] {
        const Engine turn;
        return thread_count();
      },
      Unlocked());
  module.def(
      "set_thread_count",
      [](int count) {
        const Engine turn;
        set_thread_count(count);
      },
      Unlocked(), "count"_a);
  module.def("allocated_bytes", &allocated_bytes);
  module.def("peak_allocated_bytes", &peak_allocated_bytes);
  module.def(
      "scratch_bytes",
      [] {
        const Engine turn;
        return scratch_bytes();
      },
      Unlocked());
  module.def("reset_peak", &reset_peak);
  module.def(
      "trim",
      [] {
        const Engine turn;
        trim();
      },
      Unlocked());
}
