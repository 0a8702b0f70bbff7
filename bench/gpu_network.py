"""Stage "network": forward pass and training step of the whole network, ours and PyTorch's ways, and their memory.

PyTorch computes in bfloat16, channels-last, with float32 masters and fused SGD, as ours does. Times are the host's, of
many passes started one after the other until all have ended, new tiles copied to the device included.
"""

import functools
import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda_timing import torch_graph
from gpu_stage import Cases, Row, Settings

LIMIT = 150.0
MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}
WHATS = ("forward", "training step")
AIMS_MS = {"forward": 1.0, "training step": 4.0}
Pass = Callable[[], Any]


def sizes(settings: Settings) -> tuple[int, int, int]:
    """Base channels, tile, depth."""
    return (4, 20, 1) if settings.tiny else (64, 572, 4)


def stage(settings: Settings) -> Cases:
    ways = {"fastunet": ours, "fastunet, not recorded": ours, "eager": theirs}
    if not settings.tiny:
        ways |= dict.fromkeys(("CUDA graph", *MODES), theirs)
    return {
        f"{what} | {way}": functools.partial(measured, settings, what, way, run)
        for way, run in ways.items()
        for what in WHATS
    }


def measured(settings: Settings, what: str, way: str, run: Callable[..., tuple[Pass, Pass, Pass]]) -> Row:
    """Milliseconds of a pass, and the peak of reserved device memory."""
    forget(settings)
    one, wait, memory = run(settings, what, way)
    count, rounds = (1, 1) if settings.tiny else (20, 7)
    for _ in range(4):  # kernels are compiled and chosen, the step is recorded
        one()
    wait()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(count):
            one()
        wait()
        times.append(1e3 * (time.perf_counter() - begin) / count)
    return {
        "ms": statistics.median(times),
        "least_ms": min(times),
        "most_ms": max(times),
        "peak_mb": memory(),
    }


def tile(settings: Settings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image, labels and weights."""
    from fastunet import output_size

    _, side, depth = sizes(settings)
    generator = np.random.default_rng(0)
    shape = 1, output_size(side, depth), output_size(side, depth)
    image = generator.standard_normal((1, side, side, 1), np.float32)
    return image, generator.integers(0, 2, shape), generator.random(shape, np.float32)


def ours(settings: Settings, what: str, way: str) -> tuple[Pass, Pass, Pass]:
    """A pass, what waits for all, and the memory in MB."""
    from fastunet import SGD, UNet, no_grad
    from fastunet.autograd import Tensor
    from fastunet.training_step import TrainingStep

    if not settings.gpu:
        importlib.import_module("emulator.conftest")
    base, _, depth = sizes(settings)
    model = UNet(base_channels=base, depth=depth, device=settings.device, precision="bf16")
    backend: Any = model.backend
    image, labels, weights = tile(settings)
    one: Pass
    if what == "forward":
        model.eval()
        given = backend.inlet(image.shape, np.float32)

        def forward() -> Any:
            with no_grad():
                return model(Tensor.from_numpy(given.view, backend)).array

        given.fill(image)
        forward()
        if way == "fastunet":
            recorded = backend.repeat(forward), model  # whose parameters it reads

            def one() -> None:
                given.fill(image)
                recorded[0].start()
        else:

            def one() -> None:
                given.fill(image)
                forward()
    elif way == "fastunet":
        replayed = TrainingStep(model, SGD(model, lr=1e-6))

        def one() -> None:
            replayed(image, labels, weights)
    else:
        optimizer = SGD(model, lr=1e-6)

        def one() -> None:
            optimizer.zero_grad()
            model.loss(image, labels, weights).backward()
            optimizer.step()

    return one, backend.device.synchronize, lambda: pool_mb(settings)


def forget(settings: Settings) -> None:
    """Give back what the cases before have left in the pools of memory."""
    gc.collect()
    if settings.gpu:
        import cupy
        import torch

        cupy.get_default_memory_pool().free_all_blocks()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def pool_mb(settings: Settings) -> float:
    """What CuPy's pool has taken."""
    if not settings.gpu:
        return 0.0
    import cupy

    return cupy.get_default_memory_pool().total_bytes() / 1e6


def theirs(settings: Settings, what: str, way: str) -> tuple[Pass, Pass, Pass]:
    import torch
    import torch.nn.functional as F
    import torch_unet

    from fastunet import UNet

    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if settings.gpu else "cpu")
    base, side, depth = sizes(settings)
    image, labels, weights = (torch.tensor(values) for values in tile(settings))
    host = [image.permute(0, 3, 1, 2), labels, weights]
    if settings.gpu:
        host = [values.contiguous().pin_memory() for values in host]
    x, truth, pixel_weights = (values.to(device) for values in host)
    masters = {}
    for name, values in UNet(base_channels=base, depth=depth, device="cpu").state_dict().items():
        master = torch.tensor(values, device=device)
        if master.ndim == 4:
            master = master.contiguous(memory_format=torch.channels_last)
        masters[name] = master.requires_grad_()
    dropped = (side + 4) // 2**depth - 8
    ones = [
        torch.ones(1, base * 2 ** (depth - 1), *[2 * dropped + 8] * 2, device=device, dtype=torch.bfloat16),
        torch.ones(1, base * 2**depth, *[dropped] * 2, device=device, dtype=torch.bfloat16),
    ]
    optimizer = torch.optim.SGD(masters.values(), lr=1e-6, momentum=0.99, fused=True)
    kept = {name: master.detach().bfloat16() for name, master in masters.items()}

    def logits(parameters: Any, x: Any, masks: Any = ()) -> Any:
        x = x.bfloat16().contiguous(memory_format=torch.channels_last)
        return torch_unet.forward(parameters, x, depth, masks).float()

    def loss(masters: Any, x: Any, truth: Any, pixel_weights: Any) -> Any:
        masks = [F.dropout(values, 0.5) for values in ones]
        rounded = {name: master.bfloat16() for name, master in masters.items()}
        return torch_unet.weighted_cross_entropy(logits(rounded, x, masks), truth, pixel_weights)

    if way in MODES:
        logits_or_loss = torch.compile(logits if what == "forward" else loss, mode=MODES[way])
    else:
        logits_or_loss = logits if what == "forward" else loss

    def one() -> Any:
        if what == "forward":
            with torch.no_grad():
                return logits_or_loss(kept, x)
        optimizer.zero_grad()
        value = logits_or_loss(masters, x, truth, pixel_weights)
        value.backward()
        optimizer.step()
        return value

    work = torch_graph(one) if settings.gpu and way != "eager" else one

    def copied_and_done() -> None:
        targets = (x, truth, pixel_weights)[: 1 if what == "forward" else 3]
        for target, source in zip(targets, host):
            target.copy_(source, non_blocking=True)
        work()

    if not settings.gpu:
        return copied_and_done, lambda: None, lambda: 0.0
    return copied_and_done, torch.cuda.synchronize, lambda: torch.cuda.max_memory_reserved() / 1e6


def summary(rows: dict[str, Row], settings: Settings) -> list[str]:
    lines, ratios = ["pass | engine | ms (least to most) | x fastunet | peak MB"], []
    for what in WHATS:
        mine = rows.get(f"{what} | fastunet", {}).get("ms")
        peers = []
        for name, one in rows.items():
            if not name.startswith(f"{what} |"):
                continue
            if "failure" in one:
                lines.append(f"{name} | {one['failure']}")
                continue
            ratio = f"{one['ms'] / mine:.2f}" if mine else "-"
            spread = f"{one['ms']:.3f} ({one['least_ms']:.3f} to {one['most_ms']:.3f})"
            lines.append(f"{name} | {spread} | {ratio} | {one['peak_mb']:.0f}")
            if not name.partition("| ")[2].startswith("fastunet"):
                peers.append(one["ms"])
        if mine and peers:
            ratios.append(min(peers) / mine)
            reached = "reached" if mine <= AIMS_MS[what] else "missed"
            lines.append(
                f"{what}: PyTorch's best takes {ratios[-1]:.2f} times ours; {AIMS_MS[what]} ms {reached}"
            )
    if len(ratios) == len(WHATS):
        lines.append(f"geometric mean: {math.prod(ratios) ** (1 / len(ratios)):.2f}")
    return lines
