"""The info command: what a network is, and what an image costs with it on this machine."""

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastunet import __version__, backends, command
from fastunet.geometry import border, input_size, output_size
from fastunet.memory import available_bytes, format_bytes, parse_bytes
from fastunet.predictor import Predictor, model_file, shipped_models
from fastunet.speed import seconds_per_flop
from fastunet.tiling import IMAGE_CHANNELS, TilePlan, forward_flops
from fastunet.training_memory import largest_training_tile, training_bytes
from fastunet.unet import UNet


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser(
        prog="fastunet info",
        description="Without MODEL: what fastunet runs on here. With MODEL: the network's sizes and "
        "parameters, and the memory and time an image takes.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model file, run folder or shipped model")
    parser.add_argument(
        "--image", default="512x512", metavar="HxW", help="size of the image to plan for (default: 512x512)"
    )
    parser.add_argument("--tile", default="auto", metavar="N|auto", help="input size of the network")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="how the CPU computes each layer on a tile of --tile (default: 572), of MODEL or the paper's network",
    )
    parser.add_argument("--memory", metavar="BYTES", help="how much a prediction may use, such as 2G")
    command.add_common_options(parser)
    return command.run(parser, _describe, argv)


def _describe(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        backends.set_threads(arguments.threads)
    tile = _tile_size(arguments.tile)
    if arguments.kernels:
        _describe_kernels(arguments.model, 572 if tile == "auto" else int(tile))
        return
    if arguments.model is None:
        _describe_machine(arguments.device)
        return
    height, width = _image_size(arguments.image)
    predictor = Predictor(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision,
        tile=tile,
        memory=None if arguments.memory is None else parse_bytes(arguments.memory),
    )
    plan = predictor.plan(height, width)
    print(f"{model_file(arguments.model)}\n")
    _describe_network(predictor.model)
    print()
    if predictor.model.device != "cpu":
        print(backends.describe(predictor.model.device))
    _describe_prediction(predictor.model, plan)
    _describe_training(predictor.model)


def _describe_machine(device: str) -> None:
    place = backends.resolve_device(device)
    rows = {
        "fastunet": f"{__version__}, Python {platform.python_version()}, NumPy {np.__version__}",
        "device": f"{place} ({backends.describe()})",
        "threads": str(backends.get_threads()),
        "memory": f"{format_bytes(available_bytes())} available",
        "models": ", ".join(shipped_models()) or "none shipped",
    }
    if place != "cpu":
        rows["device"] = backends.describe(place)
        rows["precision"] = backends.resolve_precision("auto", place)
        rows["memory"] = (
            f"{format_bytes(backends.load(place).free_memory())} available on {place}, {rows['memory']}"
        )
    for name, value in rows.items():
        print(f"{name:9} {value}")


def _describe_kernels(model: str | None, tile: int) -> None:
    inputs, classes, base, depth = 1, 2, 64, 4  # the paper's
    if model is not None:
        network = UNet.load(model_file(model), "cpu")
        inputs, classes = network.in_channels, network.num_classes
        base, depth = network.base_channels, network.depth
    output_size(tile, depth)
    backend: Any = backends.load("cpu")
    print(
        f"{backends.describe()}, a tile of {tile}x{tile}\n\n"
        "3x3 convolutions: the fewest multiplications of direct, Winograd F(2x2, 3x3) and F(4x4, 3x3); direct where\n"
        "fewer than 16 channels go in or come out. The first layer of an image of up to 4 channels is computed\n"
        "wherever it is read. Where no gradient is wanted, layers marked + are one linear map with the + behind them,\n"
        "F(5x5, 2x2) and F(4x4, 3x3): where there are 16 to 256 outputs.\n"
        "FASTUNET_CONV=direct, winograd2, winograd4 or winograd6 overrides all of it.\n"
    )
    print(
        f"{'layer':20} {'output':>11} {'channels':>13}  {'forward':12} {'data gradient':14} weight gradient"
    )

    def row(
        layer: str, side: int, inputs: int, outputs: int, forward: str, data: str, weight: str, mark: str = ""
    ) -> None:
        forward += mark
        channels = f"{inputs} -> {outputs}"
        print(f"{layer:20} {f'{side}x{side}':>11} {channels:>13}  {forward:12} {data:14} {weight}")

    def direct(layer: str, side: int, inputs: int, outputs: int, mark: str = "") -> None:
        row(layer, side, inputs, outputs, "direct", "direct", "direct", mark)

    def conv3x3(
        layer: str, side: int, inputs: int, outputs: int, is_first: bool = False, mark: str = ""
    ) -> None:
        forward = backend.conv3x3_algorithm(inputs, outputs, side, side)
        data = "none" if is_first else backend.conv3x3_algorithm(outputs, inputs, side + 2, side + 2)
        as_read = is_first and inputs <= IMAGE_CHANNELS and backend.algorithm != "direct"
        row(layer, side, inputs, outputs, "where read" if as_read else forward, data, forward, mark)

    side = tile
    for level in range(depth + 1):
        width = base * 2**level
        name = f"encoder.{level}" if level < depth else "bottleneck"
        conv3x3(f"{name}.conv1", side - 2, inputs, width, level == 0)
        conv3x3(f"{name}.conv2", side - 4, width, width)
        side, inputs = (side - 4) // 2 if level < depth else side - 4, width
    for step in range(depth):
        width = base * 2 ** (depth - 1 - step)
        composed = backend.composition.pays((2 * width,), (width, width), width)
        mark = " +" if composed else ""
        side *= 2
        direct(f"decoder.{step}.upconv", side, 2 * width, width, mark)
        conv3x3(f"decoder.{step}.conv1", side - 2, 2 * width, width, mark=mark)
        conv3x3(f"decoder.{step}.conv2", side - 4, width, width)
        side -= 4
    direct("head", side, base, classes)


def _describe_network(model: UNet) -> None:
    step, lost = 2**model.depth, border(model.depth)
    classes = f"{model.num_classes} classes"
    if model.class_names:
        classes += f" ({', '.join(model.class_names)})"
    small = input_size(step, model.depth)
    print(
        f"U-Net of depth {model.depth}, {model.base_channels} base channels, {model.in_channels} input "
        f"channel{'s' if model.in_channels > 1 else ''}, {classes}, dropout {model.dropout}, "
        f"normalization {model.normalization}"
    )
    print(
        f"tiles: {small} -> {output_size(small, model.depth)} and every {step} more; {lost} pixels lost on "
        "each side\n"
    )
    layers: dict[str, list[tuple[int, ...]]] = {}
    for name, array in model.state_dict().items():
        layers.setdefault(name.rsplit(".", 1)[0], []).append(array.shape)
    print(f"{'layer':20} {'weight':>18} {'parameters':>12}")
    total = 0
    for layer, shapes in layers.items():
        parameters = sum(int(np.prod(shape)) for shape in shapes)
        weight = max(shapes, key=len)
        print(f"{layer:20} {' x '.join(map(str, weight)):>18} {parameters:12,}")
        total += parameters
    print(f"{f'{len(layers)} convolutions':20} {format_bytes(4 * total):>18} {total:12,}")


def _describe_prediction(model: UNet, plan: TilePlan) -> None:
    rows, columns = plan.grid
    flops = len(plan) * forward_flops(*plan.tile, model)
    seconds, sample = seconds_per_flop(model, plan)
    print(
        f"image of {plan.image[0]}x{plan.image[1]} pixels on {model.device}, {model.precision}: "
        f"{rows * columns} tile{'s' if rows * columns > 1 else ''} of {plan.tile[0]}x{plan.tile[1]} -> "
        f"{plan.output[0]}x{plan.output[1]} ({rows} x {columns})"
    )
    if plan.tile != plan.preferred:
        print(f"  {plan.preferred[0]}x{plan.preferred[1]} would be wanted and does not fit into memory")
    print(
        f"  memory  {format_bytes(plan.memory)} beyond the network ({format_bytes(model.backend.free_memory())} free)"
    )
    per_pixel = flops / plan.image[0] / plan.image[1]
    print(f"  work    {flops / 1e9:,.1f} GFLOP, {per_pixel / 1e6:.2f} MFLOP per pixel")
    print(
        f"  time    about {seconds * flops:.3g} s (a tile of {sample[0]}x{sample[1]} ran at "
        f"{1e-9 / seconds:,.0f} GFLOP/s just now)"
    )


def _describe_training(model: UNet) -> None:
    available = model.backend.free_memory()
    network = model.in_channels, model.num_classes, model.base_channels, model.depth
    where = model.device, model.precision
    tile = largest_training_tile(available, *network, *where)
    if tile is None:
        print(f"training on {model.device}: not even the smallest tile fits into {format_bytes(available)}")
        return
    print(
        f"training on {model.device}: tiles of up to {tile}x{tile} fit, which take "
        f"{format_bytes(training_bytes(tile, *network, *where))}"
    )


def _image_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 1:
        raise ValueError(f"--image is {text!r}; expected height x width in pixels, such as 512x696")
    return size


def _tile_size(text: str) -> int | str:
    if text == "auto":
        return text
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ValueError(
            f"--tile is {text!r}; expected auto or the network's input size in pixels, such as 572"
        )
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
