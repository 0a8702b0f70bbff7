#include "table.h"

#define NAME(isa) #isa
#define NAME_OF(isa) NAME(isa)

namespace fastunet {
namespace FASTUNET_ISA {

const KernelTable table = {
    NAME_OF(FASTUNET_ISA),
    conv3x3_algorithm,
    conv3x3_forward,
    first_layer_forward,
    conv3x3_backward_data,
    conv3x3_backward_weight,
    upconv2x2_forward,
    upconv2x2_backward_data,
    upconv2x2_backward_weight,
    compose,
    composed_forward,
    conv1x1_forward,
    conv1x1_backward_data,
    conv1x1_backward_weight,
    mask,
    add_pixels,
    maxpool2x2_forward,
    maxpool2x2_backward,
    softmax_cross_entropy,
    softmax,
    dropout,
    sgd_momentum,
    add,
    multiply,
    to_blocks,
    from_blocks,
};

}  // namespace FASTUNET_ISA
}  // namespace fastunet
