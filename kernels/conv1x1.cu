// 1x1 convolution, (N, H, W, C) -> (N, H, W, K) float32 with pitch K: the head of a network for prediction, and for
// training wherever head.cu, which has the loss in the same pass, does not reach.
//
//   conv1x1_forward           y = W x + b
//   conv1x1_data_gradient     x_gradient = W' g, zero where `rectified` and x is not positive
//   conv1x1_weight_gradient   each block's sums of g x' and g, for kernels/reduce.cu to add up in a fixed order
//
// x and x_gradient are whole tensors of one pitch, PITCH, a multiple of 16 up to 1024; any K. Weight float32, [K padded
// to 16][PITCH], products in float32 of the elements as they are stored. `workspace` is [grid.x][weights, biases].
//
// Built with PITCH; channel_lanes.cuh says how a pixel lies on the lanes, and what kMostOutputs and kPixelsOfABlock
// are. Blocks of 128 threads; grid.x is any number up to ceil(pixels / kPixelsOfABlock), in the weight gradient the
// splits; its grid.y = K padded to 16 / kMostOutputs, shared memory 4 kMostOutputs (PITCH + 1) bytes.
//
// Cost a pixel: C elements and 4 K bytes each way (the weight gradient reads x once for kMostOutputs outputs), 2 C K
// FLOP each. Tested against PyTorch in float64 (tests/emulator/test_conv1x1.py).
#include "channel_lanes.cuh"

struct Conv1x1ForwardArguments {
  const element* x;
  const float* weight;
  const float* bias;
  float* y;
  long long pixels;
  int outputs;
};

KERNEL(conv1x1_forward, Conv1x1ForwardArguments, 128, 4) {
  for (long long first = static_cast<long long>(blockIdx.x) * kPixelsOfABlock; first < arguments.pixels;
       first += static_cast<long long>(gridDim.x) * kPixelsOfABlock) {
    Channels x[kPixels];
    UNROLL
    for (int p = 0; p < kPixels; ++p) {
      x[p] = load_pixel(arguments.x, pixel_of(first, p), pixel_of(first, p) < arguments.pixels);
    }
    for (int k = 0; k < arguments.outputs; ++k) {
      const Channels weight = load_weight(arguments.weight + k * PITCH);
      UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const long long pixel = pixel_of(first, p);
        const float sum = product(x[p], weight) + arguments.bias[k];
        if (first_channel(0) == k % kLanes * 8 && pixel < arguments.pixels) {
          arguments.y[pixel * arguments.outputs + k] = sum;
        }
      }
    }
  }
}

struct Conv1x1DataGradientArguments {
  const float* gradient;
  const element* x;
  const float* weight;
  element* x_gradient;
  long long pixels;
  int outputs;
  int rectified;
};

KERNEL(conv1x1_data_gradient, Conv1x1DataGradientArguments, 128, 4) {
  for (long long first = static_cast<long long>(blockIdx.x) * kPixelsOfABlock; first < arguments.pixels;
       first += static_cast<long long>(gridDim.x) * kPixelsOfABlock) {
    Channels sum[kPixels] = {};
    for (int k = 0; k < arguments.outputs; ++k) {
      const Channels weight = load_weight(arguments.weight + k * PITCH);
      UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const long long pixel = pixel_of(first, p);
        if (pixel < arguments.pixels) add_multiple(sum[p], arguments.gradient[pixel * arguments.outputs + k], weight);
      }
    }
    UNROLL
    for (int p = 0; p < kPixels; ++p) {
      const long long pixel = pixel_of(first, p);
      if (pixel >= arguments.pixels) continue;
      const Channels x = load_pixel(arguments.x, pixel, arguments.rectified);
      store_gradient(arguments.x_gradient, pixel, sum[p], x, arguments.rectified);
    }
  }
}

struct Conv1x1WeightGradientArguments {
  const float* gradient;
  const element* x;
  float* workspace;
  long long pixels;
  int outputs;
};

KERNEL(conv1x1_weight_gradient, Conv1x1WeightGradientArguments, 128, 4) {
  SHARED_MEMORY(shared);
  const int output = blockIdx.y * kMostOutputs, rows = (arguments.outputs + 15) / 16 * 16;
  WeightGradient<kMostOutputs> sums;
  for (long long first = static_cast<long long>(blockIdx.x) * kPixelsOfABlock; first < arguments.pixels;
       first += static_cast<long long>(gridDim.x) * kPixelsOfABlock) {
    UNROLL
    for (int p = 0; p < kPixels; ++p) {
      const long long pixel = pixel_of(first, p);
      if (pixel >= arguments.pixels) continue;
      const Channels x = load_pixel(arguments.x, pixel, true);
      UNROLL
      for (int k = 0; k < kMostOutputs; ++k) {
        if (output + k < arguments.outputs) {
          sums.add(k, arguments.gradient[pixel * arguments.outputs + output + k], x);
        }
      }
    }
  }
  sums.write(arguments.workspace, output, output + kMostOutputs, rows, reinterpret_cast<float*>(shared));
}
