"""The engines of peers.py, each in its best configuration for one tile at a time: fastunet and its peers.

An engine's `build` loads the network of a task and returns a pass. Of inference that gives the logits (1, K, H', W');
of training it makes a step (forward, weighted softmax cross-entropy, backward, SGD with momentum; no dropout) and gives
the loss. Imports stay inside, for each engine runs in a process of its own (peers_turns.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastunet import output_size

LEARNING_RATE, MOMENTUM = 1e-5, 0.99
FLOAT32, STEPS, BFLOAT16 = 1e-4, 1e-3, 5e-2
Pass = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """What is to be computed: the networks in a folder (see `prepare`), on a tile."""

    folder: Path
    base: int
    tile: int
    threads: int

    @property
    def model(self) -> Path:
        return self.folder / "network.safetensors"

    @property
    def onnx(self) -> Path:
        return self.folder / "network.onnx"

    @property
    def ncnn(self) -> Path:
        return self.folder / "network.pt"

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An image (1, H, W, 1), labels and weights (1, H', W')."""
        generator = np.random.default_rng(0)
        shape = 1, output_size(self.tile), output_size(self.tile)
        image = generator.standard_normal((1, self.tile, self.tile, 1), np.float32)
        return image, generator.integers(0, 2, shape, np.int32), generator.random(shape, np.float32)


@dataclass(frozen=True)
class Engine:
    """One row of the table.

    Attributes
    ----------
    packages : tuple of str
        What must be installed; the first is the engine's own, others convert the network for it.
    imports : tuple of str
        What of its package is imported late, and belongs to the library's own memory.
    tolerance : float
        Of its result against PyTorch's float32 (`peers_turns.difference`).
    convert : callable, optional
        Writes the network in the engine's format; in a process of its own, too.
    threads : int, optional
        Instead of the task's.
    """

    name: str
    build: Callable[[Task], Pass]
    packages: tuple[str, ...]
    imports: tuple[str, ...] = ()
    tolerance: float = FLOAT32
    environment: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[Task], None] | None = None
    threads: int | None = None


def prepare(task: Task) -> None:
    """Write the model file: He's initialisation, and biases that would be missed."""
    from fastunet import UNet

    model = UNet(base_channels=task.base, dropout=0.0, device="cpu")
    generator = np.random.default_rng(1)
    for name, parameter in model.parameters().items():
        if name.endswith("bias"):
            parameter.assign(generator.normal(0, 0.1, parameter.shape).astype(np.float32))
    model.save(task.model)


def to_onnx(task: Task) -> None:
    import peers_network

    if not task.onnx.exists():
        peers_network.export_onnx(task.model, task.tile, task.onnx)


def to_ncnn(task: Task) -> None:
    import peers_network

    peers_network.export_ncnn(task.model, task.tile, task.ncnn)


def fastunet_inference(task: Task) -> Pass:
    from fastunet import UNet, backends, no_grad

    backends.set_threads(task.threads)
    model = UNet.load(task.model, device="cpu")
    image, _, _ = task.data()

    def infer() -> np.ndarray:
        with no_grad():
            return model(image).numpy().transpose(0, 3, 1, 2)

    return infer


def fastunet_training(task: Task) -> Pass:
    from fastunet import SGD, UNet, backends
    from fastunet.training_step import TrainingStep

    backends.set_threads(task.threads)
    model = UNet.load(task.model, device="cpu").train()
    step = TrainingStep(model, SGD(model, LEARNING_RATE, MOMENTUM))
    data = task.data()
    return lambda: step(*data)()


def torch_inference(
    task: Task, layout: str, compiled: bool = False, frozen: bool = False, dtype: str = "float32"
) -> Pass:
    """With dtype bfloat16 the weights are kept in it, which saves the casts of autocast."""
    import peers_network
    import torch

    torch.set_num_threads(task.threads)
    types = {"dtype": getattr(torch, dtype), "memory_format": getattr(torch, layout)}
    network: Any = peers_network.load(task.model, **types).eval()
    image = torch.tensor(task.data()[0]).permute(0, 3, 1, 2).to(**types)
    if compiled:
        network = torch.compile(network)

    def infer() -> np.ndarray:
        with torch.no_grad():
            return network(image).float().numpy()

    if compiled:
        with torch._inductor.config.patch(freezing=frozen):
            infer()
    return infer


def torch_training(task: Task, layout: str, compiled: bool = False, autocast: bool = False) -> Pass:
    import peers_network
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(task.threads)
    memory_format = getattr(torch, layout)
    network = peers_network.load(task.model, memory_format=memory_format)
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM, fused=True)
    given = task.data()
    image = torch.tensor(given[0]).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    labels, weights = torch.tensor(given[1]).long(), torch.tensor(given[2])

    def loss_of(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = network(image)
        return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum() / weights.sum()

    compute = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        optimizer.zero_grad()
        loss = compute(image)
        loss.backward()
        optimizer.step()
        return loss.item()

    if compiled:
        compute(image).backward()
    return step


def onnxruntime_inference(task: Task) -> Pass:
    """Its threads spin within a pass and stop with it, so that they are not in the next engine's way."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(task.onnx, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: channels_first(task)}
    return lambda: session.run(None, given)[0]


def openvino_inference(task: Task, precision: str) -> Pass:
    import openvino

    request = (
        openvino.Core()
        .compile_model(
            str(task.onnx),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": task.threads,
            },
        )
        .create_infer_request()
    )
    image = channels_first(task)
    return lambda: request.infer([image], share_inputs=True, share_outputs=True)[0]


def ncnn_inference(task: Task) -> Pass:
    """Winograd where it chooses it, as by default; nothing is stored or computed in 16 bits."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = task.threads
    for name in dir(net.opt):
        if name.startswith(("use_fp16", "use_bf16")):
            setattr(net.opt, name, False)
    for load, ending in ((net.load_param, ".ncnn.param"), (net.load_model, ".ncnn.bin")):
        if load(str(task.ncnn.with_suffix(ending))):
            raise RuntimeError(f"ncnn cannot read the converted network ({ending})")
    image = channels_first(task)[0]

    def infer() -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        return np.asarray(extractor.extract("out0")[1])[None]

    return infer


def channels_first(task: Task) -> np.ndarray:
    return task.data()[0].reshape(1, 1, task.tile, task.tile)


# PyTorch's large tensors come in huge pages where the system lends them: 8 % on the machine of bench/NOTES.md.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
AVX2 = {**HUGE_PAGES, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
FASTUNET = partial(Engine, packages=("fastunet",), imports=("fastunet.training_step",))
TORCH = partial(Engine, packages=("torch",), imports=("torch._dynamo",), environment=HUGE_PAGES)
COMPILED = partial(TORCH, imports=("torch._inductor.compile_fx",))
OPENVINO = partial(Engine, packages=("openvino", "onnx", "onnxscript"), convert=to_onnx)
INFERENCE = partial(torch_inference, layout="channels_last")
TRAINING = partial(torch_training, layout="channels_last")
FROZEN = partial(INFERENCE, compiled=True, frozen=True)

ENGINES = {
    "inference": (
        FASTUNET("fastunet", fastunet_inference),
        FASTUNET("fastunet, one thread", fastunet_inference, threads=1),
        FASTUNET("fastunet, direct", fastunet_inference, environment={"FASTUNET_CONV": "direct"}),
        FASTUNET("fastunet, AVX2", fastunet_inference, environment={"FASTUNET_ISA": "avx2"}),
        TORCH("PyTorch, contiguous", partial(torch_inference, layout="contiguous_format")),
        TORCH("PyTorch, channels_last", INFERENCE),
        COMPILED("PyTorch, compiled", partial(INFERENCE, compiled=True)),
        COMPILED("PyTorch, compiled and frozen", FROZEN),
        TORCH("PyTorch, AVX2", INFERENCE, environment=AVX2),
        Engine("ONNX Runtime", onnxruntime_inference, ("onnxruntime", "onnx", "onnxscript"), convert=to_onnx),
        OPENVINO("OpenVINO", partial(openvino_inference, precision="f32")),
        Engine("ncnn", ncnn_inference, ("ncnn", "pnnx"), convert=to_ncnn),
        TORCH("PyTorch, bfloat16", partial(INFERENCE, dtype="bfloat16"), tolerance=BFLOAT16),
        COMPILED(
            "PyTorch, bfloat16, compiled and frozen", partial(FROZEN, dtype="bfloat16"), tolerance=BFLOAT16
        ),
        OPENVINO("OpenVINO, bfloat16", partial(openvino_inference, precision="bf16"), tolerance=BFLOAT16),
    ),
    "training step": (
        FASTUNET("fastunet", fastunet_training, tolerance=STEPS),
        TORCH("PyTorch, contiguous", partial(torch_training, layout="contiguous_format"), tolerance=STEPS),
        TORCH("PyTorch, channels_last", TRAINING, tolerance=STEPS),
        COMPILED("PyTorch, compiled", partial(TRAINING, compiled=True), tolerance=STEPS),
        TORCH("PyTorch, bfloat16 autocast", partial(TRAINING, autocast=True), tolerance=BFLOAT16),
    ),
}
