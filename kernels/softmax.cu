// Softmax over given logits, (N, H, W, K) float32 with pitch K, and its weighted cross-entropy
//
//   loss = sum of w * -log p(label) / sum of w,   d loss / d logit = w * (p - onehot) / sum of w
//
// for any number of classes; the network's head, of few classes, is in one pass with its convolution (head.cu).
// Logits are shifted by their largest, so that any finite ones are safe. A pixel of weight 0 counts for nothing,
// whatever its label; one that has a weight and the label of no class is counted, and its gradient is 0.
//
//   weight_sums             parts[i] = sum of the i-th of kWeightParts = 128 stretches of the weights; grid 128
//   softmax                 probabilities; grid ceil(pixels / 128)
//   softmax_cross_entropy   logit_gradient, if not null, and each block's loss; any grid up to ceil(pixels / 128): a
//                           block goes over the pixels in steps of the grid
//   total_loss              the sums of all: {sum of w * -log p, sum of w, pixels with an invalid label}; and the loss,
//                           no number where a label is invalid or no pixel has a weight; grid 1
//
// Blocks of 128 threads; 1024 bytes of shared memory in all but softmax. A thread has a pixel: a warp's 32 K
// neighbouring floats are read from memory once and then found in the cache. Cost, bytes a pixel: 4; 8 K; 8 K + 8 with
// gradient, 4 K + 8 without; none. Tested against PyTorch in float64 (tests/emulator/test_softmax.py).
#include "cross_entropy.cuh"

constexpr int kThreads = 128;

struct WeightSumsArguments {
  const float* weights;
  double* parts;
  long long pixels;
};

KERNEL(weight_sums, WeightSumsArguments, 128, 8) {
  SHARED_MEMORY(shared);
  const long long stretch = (arguments.pixels + kWeightParts - 1) / kWeightParts, first = blockIdx.x * stretch;
  const long long end = min(first + stretch, arguments.pixels);
  double sum = 0.0;
  for (long long i = first + threadIdx.x; i < end; i += kThreads) sum += arguments.weights[i];
  sum = sum_of_block<kThreads>(sum, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) arguments.parts[blockIdx.x] = sum;
}

// Largest logit and the sum of all exponentials of the distances to it.
__device__ __forceinline__ void sum_exponentials(const float* logits, int classes, float& largest, float& sum) {
  largest = logits[0], sum = 0.0f;
  for (int k = 1; k < classes; ++k) largest = fmaxf(largest, logits[k]);
  for (int k = 0; k < classes; ++k) sum += expf(logits[k] - largest);
}

struct SoftmaxArguments {
  const float* logits;
  float* probabilities;
  long long pixels;
  int classes;
};

KERNEL(softmax, SoftmaxArguments, 128, 8) {
  const long long pixel = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= arguments.pixels) return;
  const float* const logits = arguments.logits + pixel * arguments.classes;
  float* const probabilities = arguments.probabilities + pixel * arguments.classes;
  float largest, sum;
  sum_exponentials(logits, arguments.classes, largest, sum);
  for (int k = 0; k < arguments.classes; ++k) probabilities[k] = expf(logits[k] - largest) / sum;
}

struct CrossEntropyArguments {
  const float* logits;
  float* logit_gradient;
  const int* labels;
  const float* weights;
  const double* weight_parts;
  LossPart* loss_parts;
  long long pixels;
  int classes;
};

KERNEL(softmax_cross_entropy, CrossEntropyArguments, 128, 8) {
  SHARED_MEMORY(shared);
  double* const sums = reinterpret_cast<double*>(shared);
  const float scale = static_cast<float>(1.0 / sum_of_weights<kThreads>(arguments.weight_parts, sums));
  const int classes = arguments.classes;
  double loss = 0.0;
  int invalid = 0;
  for (long long pixel = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x; pixel < arguments.pixels;
       pixel += static_cast<long long>(gridDim.x) * kThreads) {
    const float* const logits = arguments.logits + pixel * classes;
    const int label = arguments.labels[pixel];
    const float weight = arguments.weights[pixel];
    const bool known = label >= 0 && label < classes, counts = known && weight != 0.0f;
    float largest = 0.0f, sum = 1.0f;
    if (counts) {
      sum_exponentials(logits, classes, largest, sum);
      // Both terms are positive: nothing cancels, however large the logits.
      loss += weight * ((largest - logits[label]) + logf(sum));
    }
    invalid += !known && weight != 0.0f;
    if (arguments.logit_gradient == nullptr) continue;
    float* const gradient = arguments.logit_gradient + pixel * classes;
    for (int k = 0; k < classes; ++k) {
      const float wanted = k == label ? 1.0f : 0.0f;
      gradient[k] = counts ? (expf(logits[k] - largest) / sum - wanted) * (weight * scale) : 0.0f;
    }
  }
  write_loss_part<kThreads>(arguments.loss_parts, loss, invalid, sums);
}

struct TotalLossArguments {
  const LossPart* loss_parts;
  const double* weight_parts;
  double* total;
  float* value;
  int parts;
};

KERNEL(total_loss, TotalLossArguments, 128, 8) {
  SHARED_MEMORY(shared);
  double* const sums = reinterpret_cast<double*>(shared);
  double loss = 0.0, invalid = 0.0;
  for (int i = threadIdx.x; i < arguments.parts; i += kThreads) {
    loss += arguments.loss_parts[i].loss, invalid += static_cast<double>(arguments.loss_parts[i].invalid);
  }
  loss = sum_of_block<kThreads>(loss, sums);
  invalid = sum_of_block<kThreads>(invalid, sums);
  const double weights = sum_of_weights<kThreads>(arguments.weight_parts, sums);
  if (threadIdx.x != 0) return;
  arguments.total[0] = loss, arguments.total[1] = weights, arguments.total[2] = invalid;
  const bool exists = invalid == 0.0 && weights != 0.0;
  *arguments.value = exists ? static_cast<float>(loss / weights) : __uint_as_float(0x7FC00000u);
}
