"""What test_ops.py asks of the CPU, asked of a GPU at the same sizes in both precisions; skipped where none is."""

import pytest
from test_ops import (  # noqa: F401
    test_a_strip_of_any_length,
    test_a_value_that_is_no_number_in_a_pixel_without_weight,
    test_a_value_that_is_no_number_is_not_hidden_by_relu,
    test_conv1x1,
    test_conv3x3,
    test_conv3x3_maxpool2x2_is_the_two_one_after_the_other,
    test_dropout_mask_is_philox,
    test_dropout_rate,
    test_head_cross_entropy_is_the_two_one_after_the_other,
    test_little_is_lost_of_a_loss_small_beside_its_logits,
    test_maxpool2x2,
    test_maxpool2x2_adds_to_a_gradient_that_is_there,
    test_maxpool2x2_does_not_hide_a_value_that_is_no_number,
    test_shapes_that_do_not_fit_are_refused,
    test_softmax_cross_entropy,
    test_softmax_cross_entropy_refuses_what_has_no_loss,
    test_upconv2x2,
)

from fastunet import backends


@pytest.fixture(params=["fp32", "bf16"])
def backend(request):
    try:
        device = backends.resolve_device("cuda")
    except ValueError as error:
        pytest.skip(str(error))
    return backends.load(device, request.param)


@pytest.fixture
def algorithm():
    """The GPU has one way to a convolution."""
