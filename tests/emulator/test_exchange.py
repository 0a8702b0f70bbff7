"""Arrays of other libraries in and out: kernels/strided.cu, DLPack and the CUDA array interface, exactly.

An emulated device's memory is the host's, so that PyTorch's CPU tensors are arrays on the device; NumPy's are not.
Streams are followed on a device that is only written down.
"""

import contextlib
import gc
import types
import weakref

import numpy as np
import pytest
import torch

from emulator.conftest import DEVICE
from emulator.tensors import from_bfloat16, put_flat, rounded, run
from fastunet import UNet, backends, ops
from fastunet.autograd import Tensor
from fastunet.backends.cuda import strided
from fastunet.backends.cuda.device import CupyExchange
from fastunet.backends.cuda.exchange import Exported, View, contiguous, taken
from fastunet.parameters import ParameterSet

TORCH = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int16": torch.int16,
    "int8": torch.int8,
    "float64": torch.float64,
}


@pytest.fixture(params=["fp32", "bf16"])
def backend(request):
    if DEVICE != "emulator":
        pytest.skip("PyTorch's CPU tensors are in no GPU's memory: tests/test_exchange_cuda.py")
    return backends.load("emulator", request.param)


def numbers(rng, shape, kind: str) -> torch.Tensor:
    """All that a type can hold, if it is an integer of at most 24 bits; else what is neither equal nor zero."""
    if kind in ("float32", "bfloat16", "float64"):
        return torch.tensor(rng.standard_normal(shape)).to(TORCH[kind])
    if kind in ("int32", "int64"):
        return torch.tensor(rng.integers(-(2**24), 2**24, shape)).to(TORCH[kind])
    limits = np.iinfo(kind)
    return torch.from_numpy(rng.integers(limits.min, limits.max, shape, kind, endpoint=True))


# ---- The kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_bits", [32, 64])
@pytest.mark.parametrize("target_type", strided.TYPES[:3])
@pytest.mark.parametrize("source_type", strided.TYPES)
def test_copy(device, rng, source_type, target_type, index_bits):
    """From inside an array in one order of axes into one in another; what lies between is left alone."""
    shape = (2, 3, 5, 37)
    whole = numbers(rng, (38, 5, 4, 2), source_type)
    source = whole[1:].permute(3, 2, 1, 0)[:, 1:]
    assert source.shape == shape
    values = source.to(torch.float64).numpy()
    target_strides = (37 * 32, 37, 37 * 4, 1)  # (i, k, j, l), of each four of k one unused
    bits = 16 if target_type == "bfloat16" else 32
    untouched = np.full(2 * 37 * 32, 12345, np.uint16 if bits == 16 else np.int32)
    memory = put_flat(device, untouched)
    item = source.element_size()
    held = put_flat(device, whole.view(torch.uint8).numpy())
    arguments = strided.CopyArguments(
        held.pointer + item * source.storage_offset(),
        memory.pointer,
        source.stride(),
        target_strides,
        shape,
        strided.TYPES.index(source_type),
        strided.TYPES.index(target_type),
    )
    launch = strided.copy(shape)._replace(defines=(f"-DINDEX_BITS={index_bits}",))
    run(device, launch, 32, arguments)
    found = device.download(memory.pointer, untouched.shape, untouched.dtype)
    places = np.add.outer(
        np.add.outer(np.arange(2) * target_strides[0], np.arange(3) * target_strides[1]),
        np.add.outer(np.arange(5) * target_strides[2], np.arange(37)),
    )
    expected = {
        "float32": lambda: values.astype(np.float32).view(np.int32),
        "bfloat16": lambda: (rounded(values.astype(np.float32), 16).view(np.uint32) >> 16).astype(np.uint16),
        "int32": lambda: values.astype(np.int32),
    }[target_type]()
    np.testing.assert_array_equal(found[places], expected)
    np.testing.assert_array_equal(np.delete(found, places.ravel()), 12345)


def test_indices_are_as_wide_as_they_must_be():
    for count, bits in ((1, 32), (2**32 - 256, 32), (2**32 - 255, 64), (2**35, 64)):
        assert strided.copy((count,)).defines == (f"-DINDEX_BITS={bits}",)


# ---- In -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5, 16])
@pytest.mark.parametrize("kind", strided.TYPES)
def test_an_array_of_any_type_and_order_is_taken_on_the_device(backend, rng, kind, channels):
    x = numbers(rng, (2, channels, 4, 7), kind)
    expected = rounded(x.to(torch.float32).permute(0, 2, 3, 1).numpy(), backend.bits)
    for values in (x, x.contiguous(memory_format=torch.channels_last)):
        for make in (Tensor.from_numpy, Tensor.from_dlpack):
            tensor = make(values.permute(0, 2, 3, 1), backend)
            np.testing.assert_array_equal(tensor.numpy(), expected)
            padding = stored(backend, tensor)[..., channels:]
            assert not padding.any()


def stored(backend, tensor: Tensor) -> np.ndarray:
    """With the padding."""
    array = tensor.array
    values = backend.device.download(
        array.pointer, (*array.shape[:3], array.pitch), np.uint16 if array.bits == 16 else np.float32
    )
    return from_bfloat16(values) if array.bits == 16 else values


@pytest.mark.parametrize("channels", [1, 4, 32])
def test_from_dlpack_shares_what_lies_as_the_engines_own_and_from_numpy_does_not(backend, rng, channels):
    kind = "bfloat16" if backend.bits == 16 else "float32"
    x = numbers(rng, (1, 3, 5, channels), kind)
    shared, copied = Tensor.from_dlpack(x, backend), Tensor.from_numpy(x, backend)
    assert shared.array.pointer == x.data_ptr()
    before = x.float().numpy().copy()
    x += 1
    np.testing.assert_array_equal(copied.numpy(), before)
    np.testing.assert_array_equal(shared.numpy(), x.float().numpy())


def test_from_dlpack_copies_what_lies_otherwise(backend, rng):
    kind, other = ("bfloat16", "float32") if backend.bits == 16 else ("float32", "bfloat16")
    for x in (
        numbers(rng, (1, 3, 5, 16), other),
        numbers(rng, (1, 3, 5, 17), kind),
        numbers(rng, (1, 16, 3, 5), kind).permute(0, 2, 3, 1),
        numbers(rng, (1, 3, 5, 32), kind)[..., :16],
        numbers(rng, (1 + 3 * 5 * 16,), kind)[1:].view(1, 3, 5, 16),  # not on 16 bytes
    ):
        tensor = Tensor.from_dlpack(x, backend)
        expected = rounded(x.float().numpy().copy(), backend.bits)
        x.zero_()
        np.testing.assert_array_equal(tensor.numpy(), expected)


def test_what_is_taken_is_kept(backend, rng):
    x = numbers(rng, (1, 3, 5, 16), "bfloat16" if backend.bits == 16 else "float32")
    expected = x.float().numpy().copy()
    storage = weakref.ref(x.untyped_storage())
    tensor = Tensor.from_dlpack(x, backend)
    del x
    gc.collect()
    np.testing.assert_array_equal(tensor.numpy(), expected)
    del tensor
    gc.collect()
    assert storage() is None


def test_a_network_and_its_loss_take_arrays_on_the_device(backend, rng):
    model = UNet(
        2, 3, 4, 1, dropout=0.0, device="emulator", precision="fp32" if backend.bits == 32 else "bf16"
    )
    x = numbers(rng, (2, 2, 20, 22), "float32").permute(0, 2, 3, 1)
    labels = torch.tensor(rng.integers(0, 3, (6, 2, 4))).permute(1, 2, 0)
    weights = torch.tensor(rng.random((2, 4, 6)))
    on_host = x.numpy(), labels.numpy(), weights.numpy()

    def gradients(x, labels, weights):
        model.parameters().gradients_buffer[...] = 0
        logits = model(x)
        loss = ops.softmax_cross_entropy(logits, labels, weights)
        loss.backward()
        whole = model.loss(x, labels, weights)
        whole.backward()
        return [logits.numpy(), loss.numpy(), whole.numpy(), *model.gradients().values()]

    for found, expected in zip(gradients(x, labels, weights), gradients(*on_host), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4, 5\); \(2, 4, 6\) is expected"):
        model.loss(x, labels[..., :5], weights)


def test_a_gradient_comes_and_goes_on_the_device(backend, rng):
    values = numbers(rng, (1, 5, 7, 3), "float32")
    gradient = numbers(rng, (1, 3, 2, 3), "float32").permute(0, 2, 3, 1)
    given = gradient.clone()
    found = []
    for one in (gradient, gradient.numpy()):
        x = Tensor.from_dlpack(values, backend, requires_gradient=True)
        assert x.device_gradient is None
        ops.maxpool2x2(x).backward(one)
        found.append(torch.from_dlpack(x.device_gradient).numpy())
        np.testing.assert_array_equal(found[-1], x.gradient)
    np.testing.assert_array_equal(*found)
    assert found[0].any()
    assert torch.equal(gradient, given)


def test_a_gradient_that_is_given_stays_as_it_is(backend, rng):
    """Though the engine would write to its own: here it is masked by a ReLU."""
    kind = "bfloat16" if backend.bits == 16 else "float32"
    layer = ParameterSet(backend, {"w": ("conv", (16, 16, 3, 3), (16,)), "b": ("bias", (16,), ())})
    layer["w"].assign(numbers(rng, (16, 16, 3, 3), "float32"))
    x = Tensor.from_dlpack(numbers(rng, (1, 6, 5, 16), kind), backend)
    y = ops.conv3x3(x, layer["w"], layer["b"], relu=True)
    assert (y.numpy() == 0).any()
    gradient = numbers(rng, y.shape, kind)
    before = gradient.clone()
    y.backward(gradient)
    assert torch.equal(gradient, before)


PARAMETERS = [
    ("conv", (5, 17, 3, 3), (17,)),
    ("conv", (20, 21, 3, 3), (5, 16)),
    ("conv", (3, 8, 1, 1), (8,)),
    ("upconv", (18, 9, 2, 2), (18,)),
    ("bias", (17,), ()),
]


@pytest.mark.parametrize("kind, shape, inputs", PARAMETERS, ids=str)
def test_parameters_are_packed_and_unpacked_on_the_device(backend, rng, kind, shape, inputs):
    one, other = (ParameterSet(backend, {"w": (kind, shape, inputs)}) for _ in range(2))
    values = numbers(rng, tuple(reversed(shape)), "float32").permute(*reversed(range(len(shape))))
    backend._operand(one["w"].value)  # from now on there is a copy in bfloat16, too
    one["w"].assign(values)
    other["w"].assign(values.numpy())
    for place in (one, other):
        np.testing.assert_array_equal(place["w"].numpy(), values.numpy())
        assert torch.equal(torch.from_dlpack(place["w"].exported()), values)
    np.testing.assert_array_equal(backend.read(one.values_buffer), backend.read(other.values_buffer))
    if backend.bits == 16:
        count = len(one.values_buffer)
        shadow = backend.device.download(one["w"].value.shadow_pointer, (count,), np.uint16)
        np.testing.assert_array_equal(from_bfloat16(shadow), rounded(backend.read(one.values_buffer), 16))
    with pytest.raises(ValueError, match="is expected"):
        one["w"].assign(values[1:])


# ---- Out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["emulator", "cpu"])
def test_values_go_out_and_are_kept(rng, place):
    if place != DEVICE and place != "cpu":
        pytest.skip("PyTorch's CPU tensors are in no GPU's memory")
    table = backends.load(place, "fp32")
    values = numbers(rng, (2, 3, 4, 5), "float32")
    tensor = Tensor.from_numpy(values.numpy(), table)
    assert tensor.__dlpack_device__() == (1, 0)
    out = [torch.from_dlpack(tensor), np.from_dlpack(tensor)]
    expected = tensor.numpy()
    assert not hasattr(tensor, "__cuda_array_interface__")
    del tensor
    gc.collect()
    for found in out:
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_logits_are_shared(backend, rng):
    logits = UNet(1, 2, 4, 1, device="emulator")(rng.standard_normal((1, 20, 20, 1)))
    seen = torch.from_dlpack(logits)
    assert seen.data_ptr() == logits.array.pointer
    pointer, again = logits.array.pointer, Tensor.from_dlpack(seen, logits.backend)
    np.testing.assert_array_equal(again.numpy(), rounded(logits.numpy(), again.array.bits))
    del logits, again
    gc.collect()
    assert seen.data_ptr() == pointer and torch.isfinite(seen).all()


# ---- Streams and refusals, on a device that is only written down ----------------------------------------------------


class Elsewhere:
    """A GPU's exchange; what it is asked for is in `log`."""

    place = (2, 1)
    stream = 77

    def __init__(self):
        self.log = []

    def holds(self, pointer):
        return pointer != 0xBAD

    def wait_for(self, stream):
        self.log.append(("wait for", stream))

    def borrow(self, pointer, count_bytes, owner):
        self.log.append(("borrow", pointer, count_bytes))
        return types.SimpleNamespace(pointer=pointer, bytes=count_bytes, owner=owner)


class OnGpu:
    """An array that says it is on a GPU."""

    def __init__(self, values: torch.Tensor, place) -> None:
        self.values, self.place, self.streams = values, place, []

    def __dlpack_device__(self):
        return self.place

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        return self.values.__dlpack__()


@pytest.mark.parametrize("kind", [2, 13])  # a GPU's own memory, and managed
def test_dlpack_orders_the_producer_before_our_stream(kind):
    array, exchange = OnGpu(torch.zeros(4, 6)[1:, ::2], (kind, 1)), Elsewhere()
    view = taken(array, exchange, "cuda:1")
    assert array.streams == [77]
    assert (view.shape, view.strides, view.type) == ((3, 3), (6, 2), "float32")
    assert view.pointer == array.values.data_ptr()
    assert exchange.log == [("borrow", view.pointer, 4 * (2 * 6 + 2 * 2 + 1))]


def with_interface(**changes):
    description = {"shape": (3, 5), "typestr": "<f8", "data": (0x10000, True), "version": 3, **changes}
    return types.SimpleNamespace(__cuda_array_interface__=description)


def test_the_cuda_array_interface_orders_its_stream_before_ours():
    exchange = Elsewhere()
    view = taken(with_interface(strides=(-40, 16), stream=5), exchange, "cuda:1")
    assert (view.pointer, view.shape, view.strides, view.type) == (0x10000, (3, 5), (-5, 2), "float64")
    # From the last row's first number to the first row's last.
    assert exchange.log == [("wait for", 5), ("borrow", 0x10000 - 80, 80 + 64 + 8)]
    plain = Elsewhere()
    view = taken(with_interface(typestr="|b1", strides=None), plain, "cuda:1")
    assert (view.strides, view.type, plain.log) == ((5, 1), "uint8", [("borrow", 0x10000, 15)])


@pytest.mark.parametrize(
    "array, sentence",
    [
        (OnGpu(torch.zeros(1), (2, 0)), "an array on device 0 .* was given to cuda:1; move it there"),
        (
            OnGpu(torch.zeros(1, dtype=torch.float16), (2, 1)),
            "an array of float16 was given; float32, bfloat16",
        ),
        (OnGpu(torch.zeros(1, dtype=torch.complex64), (2, 1)), "an array of DLPack type 5 of 64 was given"),
        (with_interface(data=(0xBAD, False)), "an array on a GPU was given to cuda:1; move it there"),
        (with_interface(typestr=">f4"), "an array of >f4 was given"),
        (with_interface(mask=object()), "a masked array was given"),
        (
            with_interface(strides=(40, 12)),
            r"strides of \(40, 12\) bytes was given; multiples of 8 are expected",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_taken_is_refused_in_one_sentence(array, sentence):
    with pytest.raises(ValueError, match=sentence):
        taken(array, Elsewhere(), "cuda:1")


def test_the_cpu_refuses_what_is_on_a_gpu():
    model = UNet(1, 2, 2, 1, device="cpu")
    for array in (OnGpu(torch.zeros(1, 20, 20, 1), (2, 0)), with_interface()):
        with pytest.raises(ValueError, match="on a GPU was given to the CPU; copy it to the host first"):
            model(array)


def test_what_is_on_the_host_is_left_to_be_copied():
    exchange = Elsewhere()
    for values in (np.ones(3), torch.ones(3), [1.0, 1.0, 1.0]):
        np.testing.assert_array_equal(taken(values, exchange, "cuda:1"), np.ones(3))
    assert exchange.log == []


def test_exported_memory_of_a_gpu_has_a_cuda_array_interface():
    memory = types.SimpleNamespace(pointer=4096, bytes=96)
    description = Exported(Elsewhere(), memory, (1, 2, 3, 4)).__cuda_array_interface__
    assert description == {
        "shape": (1, 2, 3, 4),
        "typestr": "<f4",
        "data": (4096, False),
        "strides": None,
        "stream": 77,
        "version": 3,
    }
    view = taken(types.SimpleNamespace(__cuda_array_interface__=description), Elsewhere(), "cuda:1")
    assert view == View(view.memory, 4096, (1, 2, 3, 4), contiguous((1, 2, 3, 4)), "float32")


class Stream(contextlib.nullcontext):
    """A CUDA stream that notes what it waits for."""

    capturing = False

    def __init__(self, ptr, log):
        super().__init__()
        self.ptr, self.log = ptr, log

    def record(self):
        return self.ptr

    def wait_event(self, event):
        self.log.append((self.ptr, "waits for", event))

    def is_capturing(self):
        return self.capturing


def test_a_gpus_streams_wait_for_each_other():
    """Ours for the producer's; and the user's for ours, before memory it lent is free to be changed again."""
    log = []
    cuda = types.SimpleNamespace(
        ExternalStream=lambda pointer: Stream(pointer, log), get_current_stream=lambda: Stream(3, log)
    )
    ours = Stream(7, log)
    exchange = CupyExchange(types.SimpleNamespace(cuda=cuda), contextlib.nullcontext(), ours, 0)
    assert (exchange.place, exchange.stream) == ((2, 0), 7)
    exchange.wait_for(5)
    assert log == [(7, "waits for", 5)]
    owner = Stream(0, log)
    kept = weakref.ref(owner)
    memory = exchange.borrow(256, 4, owner)
    del owner
    gc.collect()
    assert kept() is not None and len(log) == 1
    del memory
    gc.collect()
    assert kept() is None and log[1:] == [(3, "waits for", 7)]
    ours.capturing = True
    exchange.borrow(256, 4, object())
    gc.collect()
    assert len(log) == 2
