// The kernels of one instruction set, gathered by table.cpp. FASTUNET_ISA is the set's name, given by the
// build.
#pragma once

#include "kernels.h"

namespace fastunet {
namespace FASTUNET_ISA {

Algorithm conv3x3_algorithm(Algorithm, int, int, int, int);
void conv3x3_forward(const Channels&, const float*, const Destination&, Algorithm);
void first_layer_forward(const FirstLayer&, const View&);
void conv3x3_backward_data(const View&, const float*, const Destination&, Algorithm);
void conv3x3_backward_weight(const Channels&, const View&, float*, float*, Algorithm);
void upconv2x2_forward(const View&, const float*, const float*, const View&);
void upconv2x2_backward_data(const View&, const float*, const View&, const View&);
void upconv2x2_backward_weight(const View&, const View&, float*);
void compose(const Composition&, const float*, const float*, const float*, const float*, float*, float*, float*);
void composed_forward(const View&, const View&, const float*, const float*, const float*, const View&);
void conv1x1_forward(const View&, const float*, const float*, const View&);
void conv1x1_backward_data(const View&, const float*, const View&, const View&);
void conv1x1_backward_weight(const View&, const View&, float*);
void mask(const View&, const View&, const View&);
void add_pixels(const View&, float*);
void maxpool2x2_forward(const View&, bool, const View&, uint8_t*);
void maxpool2x2_backward(const View&, const uint8_t*, const View&);
CrossEntropy softmax_cross_entropy(const View&, const int32_t*, const float*, const View&);
void softmax(const View&, const View&);
void dropout(const View&, const View&, float, uint64_t, uint64_t);
void sgd_momentum(float*, const float*, float*, float, float, ptrdiff_t);
void add(const View&, const View&);
void multiply(const View&, float);
void to_blocks(const float*, const View&);
void from_blocks(const View&, float*);

extern const KernelTable table;

}  // namespace FASTUNET_ISA
}  // namespace fastunet
