// The head of the network in training, in one pass over its input: 1x1 convolution, softmax, weighted cross-entropy,
// the gradient of the input and those of weight and bias. Neither logits nor their gradient are ever stored.
//
//   z = W x + b,   loss = sum of w * -log softmax(z)[label] / sum of w
//   x_gradient = W' g, zero where `rectified` and x is not positive,   g = w (softmax(z) - onehot) / sum of w
//   W gradient = sum of g x',   b gradient = sum of g, left as each block's sums in `workspace`, [grid.x][weights,
//   biases], for kernels/reduce.cu to add up in a fixed order
//
// x and x_gradient are whole tensors of PITCH stored channels; x_gradient and workspace may be null. Weight float32,
// [CLASSES padded to 16][PITCH], zero in the padding; logits are shifted by their largest, so that any finite ones are
// safe. A pixel of weight 0 counts for nothing, whatever its label; one that has a weight and the label of no class is
// counted, and its gradient is 0. Of values that are not finite in such pixels only the weight gradient of their own
// channels knows, where they meet the zeros of g. kernels/softmax.cu sums the weights before (weight_sums) and the loss
// after (total_loss).
//
// Built with PITCH and CLASSES, at most kMostOutputs: 8 for up to 256 channels, 2048 / PITCH up to 1024 (a lane has the
// weight gradient in registers); conv1x1.cu and softmax.cu together do the rest. Blocks of 128 threads; grid.x is any
// number up to ceil(pixels / kPixelsOfABlock), channel_lanes.cuh; up to 3 classes of up to 256 channels leave room for
// four blocks on a multiprocessor. Shared memory 1024 + 4 CLASSES (PITCH + 1) bytes.
//
// Cost a pixel: C elements read, C written, and 8 bytes; 6 C K FLOP. Tested against PyTorch in float64
// (tests/emulator/test_head.py).
#include "channel_lanes.cuh"
#include "cross_entropy.cuh"

static_assert(CLASSES <= kMostOutputs, "the weight gradient of so many classes does not fit into registers");
constexpr int kRows = (CLASSES + 15) / 16 * 16;

struct HeadArguments {
  const element* x;
  const float* weight;
  const float* bias;
  const int* labels;
  const float* weights;
  const double* weight_parts;
  LossPart* loss_parts;
  element* x_gradient;
  float* workspace;
  long long pixels;
  int rectified;
};

// The loss of a pixel before its weight, and the gradient of its logits in their place; zeros unless it counts.
__device__ __forceinline__ float cross_entropy(float (&logits)[CLASSES], int label, bool counts, float factor) {
  float largest = logits[0], sum = 0.0f, labelled = 0.0f;
  UNROLL
  for (int k = 1; k < CLASSES; ++k) largest = fmaxf(largest, logits[k]);
  UNROLL
  for (int k = 0; k < CLASSES; ++k) {
    const float distance = logits[k] - largest;
    labelled = k == label ? distance : labelled;
    logits[k] = expf(distance);
    sum += logits[k];
  }
  UNROLL
  for (int k = 0; k < CLASSES; ++k) {
    logits[k] = counts ? (logits[k] / sum - (k == label ? 1.0f : 0.0f)) * factor : 0.0f;
  }
  // Both terms are positive: nothing cancels, however large the logits.
  return logf(sum) - labelled;
}

KERNEL(head_cross_entropy, HeadArguments, 128, 2) {
  SHARED_MEMORY(shared);
  double* const sums = reinterpret_cast<double*>(shared);
  float* const weight = reinterpret_cast<float*>(sums + kThreads);
  const float scale = static_cast<float>(1.0 / sum_of_weights<kThreads>(arguments.weight_parts, sums));
  for (int i = threadIdx.x; i < CLASSES * PITCH; i += kThreads) weight[i] = arguments.weight[i];
  if (threadIdx.x < CLASSES) weight[CLASSES * PITCH + threadIdx.x] = arguments.bias[threadIdx.x];
  __syncthreads();

  WeightGradient<CLASSES> weight_gradient;
  double loss = 0.0;
  int invalid = 0;
  for (long long first = static_cast<long long>(blockIdx.x) * kPixelsOfABlock; first < arguments.pixels;
       first += static_cast<long long>(gridDim.x) * kPixelsOfABlock) {
    Channels x[kPixels];
    int label[kPixels];
    float pixel_weight[kPixels], logits[kPixels][CLASSES];
    UNROLL
    for (int p = 0; p < kPixels; ++p) {
      const long long pixel = pixel_of(first, p);
      const bool valid = pixel < arguments.pixels;
      x[p] = load_pixel(arguments.x, pixel, valid);
      label[p] = valid ? arguments.labels[pixel] : 0;
      pixel_weight[p] = valid ? arguments.weights[pixel] : 0.0f;
    }
    UNROLL
    for (int k = 0; k < CLASSES; ++k) {
      const Channels row = load_weight(weight + k * PITCH);
      UNROLL
      for (int p = 0; p < kPixels; ++p) logits[p][k] = product(x[p], row) + weight[CLASSES * PITCH + k];
    }
    UNROLL
    for (int p = 0; p < kPixels; ++p) {
      const bool known = label[p] >= 0 && label[p] < CLASSES, heavy = pixel_weight[p] != 0.0f;
      const bool counts = known && heavy;
      const float nats = cross_entropy(logits[p], label[p], counts, pixel_weight[p] * scale);
      // Every lane of a pixel has the same; one of them reports it.
      if (threadIdx.x % kLanes == 0) loss += counts ? pixel_weight[p] * nats : 0.0f, invalid += !known && heavy;
      UNROLL
      for (int k = 0; k < CLASSES; ++k) weight_gradient.add(k, logits[p][k], x[p]);
    }
    if (arguments.x_gradient == nullptr) continue;
    Channels gradient[kPixels] = {};
    UNROLL
    for (int k = 0; k < CLASSES; ++k) {
      const Channels row = load_weight(weight + k * PITCH);
      UNROLL
      for (int p = 0; p < kPixels; ++p) add_multiple(gradient[p], logits[p][k], row);
    }
    UNROLL
    for (int p = 0; p < kPixels; ++p) {
      const long long pixel = pixel_of(first, p);
      if (pixel < arguments.pixels) {
        store_gradient(arguments.x_gradient, pixel, gradient[p], x[p], arguments.rectified);
      }
    }
  }
  write_loss_part<kThreads>(arguments.loss_parts, loss, invalid, sums);
  if (arguments.workspace == nullptr) return;
  weight_gradient.write(arguments.workspace, 0, kRows, kRows, weight);
}
