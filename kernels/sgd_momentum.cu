// One step of stochastic gradient descent with momentum, for all parameters in one pass, as torch.optim.SGD:
//
//   momentum = rate * momentum + gradient;   value -= learning_rate * momentum
//
// All float32 and flat, aligned to 16 bytes; `shadow`, if not null, gets the new values in bfloat16, for the tensor
// cores. Learning rate and momentum's rate come from the device where `rates` is not null (two floats, in this order),
// so that a captured graph need not be captured again when they change.
//
// Grid: ceil(count / 2048) blocks of 256 threads, eight parameters each.
// Cost: 22 bytes a parameter, 20 without shadow. Tested against PyTorch (tests/emulator/test_sgd_momentum.py).
#include "element.cuh"

struct SgdMomentumArguments {
  float* value;
  const float* gradient;
  float* momentum;
  bfloat16* shadow;
  const float* rates;
  long long count;
  float learning_rate;
  float rate;
};

KERNEL(sgd_momentum, SgdMomentumArguments, 256, 4) {
  const long long first = (static_cast<long long>(blockIdx.x) * 256 + threadIdx.x) * 8;
  if (first >= arguments.count) return;
  const float learning_rate = arguments.rates != nullptr ? arguments.rates[0] : arguments.learning_rate;
  const float rate = arguments.rates != nullptr ? arguments.rates[1] : arguments.rate;
  if (first + 8 <= arguments.count) {
    float value[8], gradient[8], momentum[8];
    load8(value, arguments.value + first);
    load8(gradient, arguments.gradient + first);
    load8(momentum, arguments.momentum + first);
    UNROLL
    for (int i = 0; i < 8; ++i) {
      momentum[i] = rate * momentum[i] + gradient[i];
      value[i] -= learning_rate * momentum[i];
    }
    store8(arguments.momentum + first, momentum);
    store8(arguments.value + first, value);
    if (arguments.shadow != nullptr) store8(arguments.shadow + first, value);
    return;
  }
  for (long long i = first; i < arguments.count; ++i) {
    const float momentum = rate * arguments.momentum[i] + arguments.gradient[i];
    const float value = arguments.value[i] - learning_rate * momentum;
    arguments.momentum[i] = momentum;
    arguments.value[i] = value;
    if (arguments.shadow != nullptr) store(arguments.shadow + i, value);
  }
}
