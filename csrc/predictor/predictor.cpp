// Normalise, mirror, tiles, network, softmax, stitch. Of the image only what a tile needs is read, and its prediction
// goes straight to where the caller wants it; only the seven rotations hold whole images of their own.
#include "fastunet/predictor.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "available_memory.h"
#include "geometry.h"
#include "image.h"
#include "model_file.h"
#include "network.h"
#include "normalization.h"
#include "parallel.h"
#include "rotation.h"
#include "tiling.h"

namespace fastunet {
namespace {

constexpr double kShareOfFreeMemory = 0.8;              // the rest is left to everything else on the machine
constexpr ptrdiff_t kLongestSide = ptrdiff_t{1} << 24;  // pixels; tiles and their numbers then stay within int
constexpr int kSeven = 7;

std::string shape_of(ptrdiff_t height, ptrdiff_t width, ptrdiff_t channels) {
  return "(" + std::to_string(height) + ", " + std::to_string(width) + ", " + std::to_string(channels) + ")";
}

// There is something, and its strides stay within the addresses there are.
template <class T>
void check_pixels(const Pixels<T>& p, const char* what) {
  const std::string found = std::string("the ") + what + " has shape " + shape_of(p.height, p.width, p.channels);
  expect(p.height >= 1 && p.width >= 1 && p.channels >= 1,
         found + "; expected (height, width, channels), none of them 0");
  expect(p.height <= kLongestSide && p.width <= kLongestSide,
         found + "; sides of at most " + std::to_string(kLongestSide) + " pixels are expected");
  expect(p.data != nullptr, std::string("the ") + what + " has no data: a pointer to it is expected");
  const double reach = static_cast<double>(p.height) * std::abs(static_cast<double>(p.row_stride)) +
                       static_cast<double>(p.width) * std::abs(static_cast<double>(p.pixel_stride)) +
                       static_cast<double>(p.channels) * std::abs(static_cast<double>(p.channel_stride));
  expect(reach < static_cast<double>(std::numeric_limits<ptrdiff_t>::max() / 2),
         found + " and strides that reach beyond all memory; strides are bytes");
}

template <class T>
void check_result(const Pixels<T>& result, const Image& image, ptrdiff_t channels) {
  check_pixels(result, "result");
  expect(result.height == image.pixels.height && result.width == image.pixels.width && result.channels == channels,
         "the result has shape " + shape_of(result.height, result.width, result.channels) + "; " +
             shape_of(image.pixels.height, image.pixels.width, channels) + " is expected");
}

// What a tile's network sees of an image, normalised; beyond the image, its mirror images.
void gather(const Image& image, const std::vector<Scale>& scales, ptrdiff_t top, ptrdiff_t left, int height, int width,
            float* pixels) {
  const Pixels<const uint8_t>& from = image.pixels;
  std::vector<ptrdiff_t> offsets(static_cast<size_t>(width));
  for (int column = 0; column < width; ++column)
    offsets[column] = mirrored(left + column, from.width) * from.pixel_stride;
  with_type_of(image, [&](auto zero) {
    in_parallel(height, [&](int row) {
      const uint8_t* const begin = address(from, mirrored(top + row, from.height), 0);
      float* pixel = pixels + static_cast<ptrdiff_t>(row) * width * from.channels;
      for (int column = 0; column < width; ++column)
        for (ptrdiff_t channel = 0; channel < from.channels; ++channel)
          *pixel++ = scales[channel](
              static_cast<double>(load<decltype(zero)>(begin + offsets[column] + channel * from.channel_stride)));
    });
  });
}

// body(row, column, values) for every pixel of a tile, with row and column those in the image and its probabilities in
// a row.
template <class Body>
void for_each_pixel(const Tile& tile, const View& probabilities, const Body& body) {
  in_parallel(tile.bottom - tile.top, [&](int row) {
    for (ptrdiff_t column = 0; column < tile.right - tile.left; ++column)
      body(tile.top + row, tile.left + column, probabilities.at(0, 0, row, static_cast<int>(column)));
  });
}

// The probability of a class at a pixel of a block of 16 classes.
float of_class(const View& probabilities, const float* pixel, ptrdiff_t k) {
  return pixel[k / kBlock * probabilities.block_stride + k % kBlock];
}

// Which of `count` is the largest: the first on ties.
template <class Of>
uint8_t largest(ptrdiff_t count, const Of& of) {
  ptrdiff_t best = 0;
  for (ptrdiff_t k = 1; k < count; ++k)
    if (of(k) > of(best)) best = k;
  return static_cast<uint8_t>(best);
}

// A view of the image: quarters of a turn and a mirror image, or a rotation.
struct Seen {
  int quarters = 0;
  bool mirror = false;
  double degrees = 0;
};

std::vector<Seen> views(int rotations) {
  std::vector<Seen> views;
  if (rotations == kSeven)
    for (int k = 0; k < kSeven; ++k) views.push_back({0, false, k * 360.0 / kSeven});
  else
    for (int k = 0; k < rotations; ++k) views.push_back({k % 4, k >= 4, 0});
  return views;
}

}  // namespace

struct Predictor::State {
  Model model;
  Normalization normalization;
  Network network;
  Options options;

  State(const ModelFile& file, const Options& options)
      : model(file.model), normalization(file.normalization), network(file), options(options) {
    const int rotations = options.rotations;
    expect(rotations == 1 || rotations == 4 || rotations == 7 || rotations == 8,
           "rotations is " + std::to_string(rotations) + "; expected 1, 4, 7 or 8");
    if (options.tile != 0) check_tile(options.tile, model.depth);
  }

  static std::unique_ptr<const State> load(const std::string& path, const Options& options) {
    const MappedFile file(path);
    return std::make_unique<const State>(ModelFile(file.bytes(), file.size(), path), options);
  }

  double allowed() const {
    return options.memory > 0 ? static_cast<double>(options.memory) : kShareOfFreeMemory * available_memory();
  }

  // Plans of the image and, of the seven rotations, of the others' views; `beside` are bytes taken whatever the tiles.
  std::vector<TilePlan> plans(ptrdiff_t height, ptrdiff_t width, double beside, double memory) const {
    std::vector<TilePlan> plans;
    for (const Seen& seen : views(options.rotations)) {
      ptrdiff_t rows = seen.quarters % 2 ? width : height, columns = seen.quarters % 2 ? height : width;
      double whole = beside;
      if (options.rotations == kSeven) {
        const Rotation rotation(seen.degrees, height, width);
        rows = rotation.view_height;
        columns = rotation.view_width;
        whole += 4 * (static_cast<double>(height) * static_cast<double>(width) * model.in_channels +
                      static_cast<double>(rows) * static_cast<double>(columns) * model.num_classes);
      }
      plans.push_back(plan_tiles(rows, columns, model, options.tile, whole, memory));
    }
    return plans;
  }

  void check(const Image& image) const {
    check_pixels(image.pixels, "image");
    expect(image.pixels.channels == model.in_channels,
           "the image has " + std::to_string(image.pixels.channels) + " channels and the model takes " +
               std::to_string(model.in_channels) + "; give images like those it was trained on");
  }

  // try_with(plans), again with smaller tiles where memory fails after all.
  template <class Body>
  void within_memory(const Image& image, double beside, const Body& try_with) const {
    for (double memory = allowed();;) {
      const std::vector<TilePlan> planned = plans(image.pixels.height, image.pixels.width, beside, memory);
      try {
        return try_with(planned);
      } catch (const std::bad_alloc&) {
        memory = 0;
        for (const TilePlan& plan : planned) memory = std::max(memory, plan.memory / 2);
      }
    }
  }

  // Tells progress after every tile of all the plans.
  class Steps {
   public:
    Steps(const std::vector<TilePlan>& plans, const Progress& progress) : progress_(progress) {
      for (const TilePlan& plan : plans) tiles_ += plan.tiles();
    }
    void step() {
      ++done_;
      if (progress_ && !progress_(static_cast<double>(done_) / static_cast<double>(tiles_)))
        throw Cancelled("the prediction was cancelled after " + std::to_string(done_) + " of " +
                        std::to_string(tiles_) + " tiles");
    }

   private:
    const Progress& progress_;
    ptrdiff_t tiles_ = 0, done_ = 0;
  };

  // read(top, left, height, width, pixels) and take(tile, probabilities) for every tile of a plan.
  template <class Read, class Take>
  void go(const TilePlan& plan, Steps& steps, const Read& read, const Take& take) const {
    const ptrdiff_t lost = border(model.depth);
    const int height = static_cast<int>(plan.tile_height), width = static_cast<int>(plan.tile_width);
    for (size_t row = 0; row + 1 < plan.rows.size(); ++row)
      for (size_t column = 0; column + 1 < plan.columns.size(); ++column) {
        const Tile tile{plan.rows[row], plan.columns[column], plan.rows[row + 1], plan.columns[column + 1]};
        std::vector<float> pixels(static_cast<size_t>(height) * static_cast<size_t>(width) *
                                  static_cast<size_t>(model.in_channels));
        read(tile.top - lost, tile.left - lost, height, width, pixels.data());
        const Array probabilities = network(std::move(pixels), height, width);
        take(tile, probabilities.view);
        steps.step();
      }
  }

  // One turned view of the image.
  template <class Take>
  void go_turned(const Image& image, const std::vector<Scale>& scales, const Seen& seen, const TilePlan& plan,
                 Steps& steps, const Take& take) const {
    const Image turned_image(image.type, turned(image.pixels, seen.quarters, seen.mirror));
    go(
        plan, steps,
        [&](ptrdiff_t top, ptrdiff_t left, int height, int width, float* pixels) {
          gather(turned_image, scales, top, left, height, width, pixels);
        },
        take);
  }

  // The sum over the views, divided by their number.
  void average(const Image& image, const std::vector<TilePlan>& plans, const Probabilities& result,
               const Progress& progress) const {
    const std::vector<Scale> scales = scales_of(image, normalization);
    const std::vector<Seen> all = views(options.rotations);
    const ptrdiff_t classes = result.channels;
    Steps steps(plans, progress);
    std::optional<Splines> splines;
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i].degrees != 0) {
        if (!splines) splines.emplace(image, scales);
        add_rotated(*splines, Rotation(all[i].degrees, result.height, result.width), plans[i], result, steps);
        continue;
      }
      const Probabilities sum = turned(result, all[i].quarters, all[i].mirror);
      go_turned(image, scales, all[i], plans[i], steps, [&](const Tile& tile, const View& probabilities) {
        for_each_pixel(tile, probabilities, [&](ptrdiff_t row, ptrdiff_t column, const float* pixel) {
          for (ptrdiff_t k = 0; k < classes; ++k) {
            float* const total = address(sum, row, column, k);
            const float value = of_class(probabilities, pixel, k);
            store(total, i == 0 ? value : fastunet::load<float>(total) + value);
          }
        });
      });
    }
    if (all.size() == 1) return;
    const float count = static_cast<float>(all.size());
    in_parallel(result.height, [&](int row) {
      for (ptrdiff_t column = 0; column < result.width; ++column)
        for (ptrdiff_t k = 0; k < classes; ++k) {
          float* const total = address(result, row, column, k);
          store(total, fastunet::load<float>(total) / count);
        }
    });
  }

  void add_rotated(const Splines& splines, const Rotation& rotation, const TilePlan& plan, const Probabilities& sum,
                   Steps& steps) const {
    const ptrdiff_t classes = sum.channels;
    std::vector<float> seen(static_cast<size_t>(rotation.view_height) * static_cast<size_t>(rotation.view_width) *
                            static_cast<size_t>(classes));
    go(
        plan, steps,
        [&](ptrdiff_t top, ptrdiff_t left, int height, int width, float* pixels) {
          rotation.read(splines, top, left, height, width, pixels);
        },
        [&](const Tile& tile, const View& probabilities) {
          for_each_pixel(tile, probabilities, [&](ptrdiff_t row, ptrdiff_t column, const float* pixel) {
            float* const target = seen.data() + (row * rotation.view_width + column) * classes;
            for (ptrdiff_t k = 0; k < classes; ++k) target[k] = of_class(probabilities, pixel, k);
          });
        });
    rotation.add(seen.data(), sum);
  }
};

Predictor::Predictor(const std::string& model_file, const Options& options)
    : state_(State::load(model_file, options)) {}
Predictor::~Predictor() = default;
Predictor::Predictor(Predictor&&) noexcept = default;
Predictor& Predictor::operator=(Predictor&&) noexcept = default;

const Model& Predictor::model() const { return state_->model; }

Plan Predictor::plan(ptrdiff_t height, ptrdiff_t width) const {
  expect(height >= 1 && height <= kLongestSide && width >= 1 && width <= kLongestSide,
         "an image of " + std::to_string(height) + "x" + std::to_string(width) + " pixels was given; sides of 1 to " +
             std::to_string(kLongestSide) + " are expected");
  const std::vector<TilePlan> plans = state_->plans(height, width, 0, state_->allowed());
  Plan plan{plans[0].tile_height, plans[0].tile_width, plans[0].preferred_height, plans[0].preferred_width, 0, 0};
  for (const TilePlan& one : plans) {
    plan.tiles += one.tiles();
    plan.memory = std::max(plan.memory, static_cast<uint64_t>(one.memory));
  }
  return plan;
}

void Predictor::predict(const Image& image, const Probabilities& result, const Progress& progress) const {
  state_->check(image);
  check_result(result, image, state_->model.num_classes);
  state_->within_memory(image, 0,
                        [&](const std::vector<TilePlan>& plans) { state_->average(image, plans, result, progress); });
}

void Predictor::predict(const Image& image, const Classes& result, const Progress& progress) const {
  const State& state = *state_;
  const ptrdiff_t classes = state.model.num_classes;
  state.check(image);
  check_result(result, image, 1);
  expect(classes <= 256,
         "the model has " + std::to_string(classes) + " classes, and bytes can tell 256; predict their probabilities");
  if (state.options.rotations == 1) {
    state.within_memory(image, 0, [&](const std::vector<TilePlan>& plans) {
      const std::vector<Scale> scales = scales_of(image, state.normalization);
      State::Steps steps(plans, progress);
      state.go_turned(image, scales, Seen{}, plans[0], steps, [&](const Tile& tile, const View& probabilities) {
        for_each_pixel(tile, probabilities, [&](ptrdiff_t row, ptrdiff_t column, const float* pixel) {
          *address(result, row, column) =
              largest(classes, [&](ptrdiff_t k) { return of_class(probabilities, pixel, k); });
        });
      });
    });
    return;
  }
  const double bytes =
      4 * static_cast<double>(result.height) * static_cast<double>(result.width) * static_cast<double>(classes);
  state.within_memory(image, bytes, [&](const std::vector<TilePlan>& plans) {
    std::vector<float> values(static_cast<size_t>(result.height) * static_cast<size_t>(result.width) *
                              static_cast<size_t>(classes));
    const Probabilities probabilities(values.data(), result.height, result.width, classes);
    state.average(image, plans, probabilities, progress);
    in_parallel(result.height, [&](int row) {
      for (ptrdiff_t column = 0; column < result.width; ++column) {
        const float* const pixel = address(probabilities, row, column);
        *address(result, row, column) = largest(classes, [&](ptrdiff_t k) { return pixel[k]; });
      }
    });
  });
}

void set_threads(int count) {
  constexpr int kMost = 1024;  // creating many more would take minutes
  expect(count >= 1 && count <= kMost,
         std::to_string(count) + " threads were asked for; 1 to " + std::to_string(kMost) + " are expected");
  const Engine turn;
  set_thread_count(count);
}

int threads() {
  const Engine turn;
  return thread_count();
}

}  // namespace fastunet
