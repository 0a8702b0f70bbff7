"""CuPy's arrays on a GPU, in and out of the network; skipped where there is none.

Nothing but copies and fills is asked of CuPy, which needs CUDA's headers for more.
"""

import types

import numpy as np
import pytest

from fastunet import Predictor, UNet, backends, no_grad
from fastunet.autograd import Tensor


@pytest.fixture
def device() -> str:
    try:
        return backends.resolve_device("cuda")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def cupy(device):
    return pytest.importorskip("cupy")


def only_interface(array):
    """Without DLPack."""
    return types.SimpleNamespace(__cuda_array_interface__=array.__cuda_array_interface__, owner=array)


@pytest.mark.parametrize("how", [lambda array: array, only_interface], ids=["DLPack", "interface"])
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_array_is_read_after_it_is_written_and_before_it_is_written_again(
    device, cupy, rng, precision, own_stream, how
):
    model = UNet(2, 3, 16, 1, dropout=0.0, device=device, precision=precision)
    values = rng.standard_normal((1, 316, 316, 2)).astype(np.float32)
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null
    with no_grad():
        expected = model(values).numpy()
        with stream:
            source = cupy.asarray(values)
            x, large = cupy.empty_like(source), cupy.empty(2**31, np.uint8)
            for _ in range(10):
                for _ in range(4):  # which takes longer than it takes to start the network
                    large.data.memset_async(0, large.nbytes)
                x.data.copy_from_device_async(source.data, x.nbytes)
                logits = model(how(x))
                x.data.memset_async(0xFF, x.nbytes)  # no number
                np.testing.assert_array_equal(cupy.asnumpy(cupy.from_dlpack(logits)), expected)


def test_logits_are_shared_and_have_a_cuda_array_interface(device, cupy, rng):
    logits = UNet(1, 2, 16, 1, device=device)(rng.standard_normal((1, 20, 20, 1)))
    assert cupy.from_dlpack(logits).data.ptr == cupy.asarray(only_interface(logits)).data.ptr
    again = Tensor.from_numpy(cupy.from_dlpack(logits), logits.backend)
    assert np.abs(again.numpy() - logits.numpy()).max() <= 2**-8 * np.abs(logits.numpy()).max()


@pytest.mark.parametrize("how", [lambda array: array, only_interface], ids=["DLPack", "interface"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(300, 260), (2, 90, 120), (81, 70, 2)], ids=str)
def test_an_image_is_predicted_where_it_is(device, cupy, rng, shape, dtype, how):
    """Read after it is written and before it is written again; float sums are in another order than NumPy's."""
    model = UNet(2 if shape[-1] == 2 else 1, 3, 16, 2, device=device, precision="fp32")
    predict = Predictor(model, rotations=4)
    image = (rng.random(shape) * 200).astype(dtype)
    axes = (1, 0, *range(2, image.ndim)) if len(image) > 2 else (0, 2, 1)
    expected = predict(image.transpose(axes))
    source, large = cupy.asarray(image), cupy.empty(2**31, np.uint8)
    given = cupy.empty_like(source)
    large.data.memset_async(0, large.nbytes)  # which takes longer than it takes to start the prediction
    given.data.copy_from_device_async(source.data, given.nbytes)
    found = predict(how(given.transpose(axes)))
    given.data.memset_async(0xFF, given.nbytes)
    shared = cupy.asarray(only_interface(found))
    assert shared.data.ptr == cupy.from_dlpack(found).data.ptr
    assert shared.shape == expected.shape and shared.dtype == np.float32
    np.testing.assert_allclose(cupy.asnumpy(shared), expected, rtol=0, atol=1e-5)
