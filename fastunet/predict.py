"""The predict command: image files through a trained network into files of the same shape."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastunet import command
from fastunet.data.images import SUFFIXES, find_images, read_images, write_array
from fastunet.errors import DataError
from fastunet.instances import find_instances
from fastunet.memory import parse_bytes
from fastunet.predictor import Predictor

KINDS = ("probabilities", "classes", "instances")


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser(
        prog="fastunet predict",
        description="Segment images of any size with a trained network; the tile does not change the result.",
        epilog="Probabilities are float32, (K, H, W) per image; classes uint8 and instances uint32, (H, W). "
        "A stack gives a stack. PNG takes classes and instances (uint16) only, of one image per file.",
    )
    parser.add_argument(
        "-m",
        "--model",
        required=True,
        help="model file, run folder of fastunet train, or the name of a shipped model (nuclei)",
    )
    parser.add_argument(
        "-i", "--input", required=True, metavar="IN", help="image or stack, folder of images, or quoted glob"
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="OUT",
        help=f"a file for one input ({', '.join(SUFFIXES)}), or a folder that gets one file per input, named "
        "like it",
    )
    parser.add_argument(
        "--save", choices=KINDS, help="what to write (default: classes where OUT is .png, else probabilities)"
    )
    parser.add_argument(
        "--axes", help="axes of the input arrays, such as ZYX or YXC, where the files do not tell"
    )

    cost = parser.add_argument_group("tiles and rotations")
    cost.add_argument(
        "--tile",
        default="auto",
        metavar="N|auto",
        help="input size of the network, such as 572 (default: auto, the least work that memory allows)",
    )
    cost.add_argument(
        "--memory", metavar="BYTES", help="how much to use, such as 2G (default: 0.8 of what is free)"
    )
    cost.add_argument(
        "--rotations",
        type=int,
        default=1,
        choices=(1, 4, 7, 8),
        help="average over so many views of the image: 4 right angles, 8 with mirror images, 7 rotations by "
        "k*360/7 degrees as in the paper (default: 1, the image as it is)",
    )

    instances = parser.add_argument_group("instances (--save instances)")
    instances.add_argument(
        "--min-size", type=int, metavar="PIXELS", help="leave out instances smaller than this (default: 0)"
    )
    instances.add_argument(
        "--fill-holes", action="store_true", help="fill background that a single instance encloses"
    )
    instances.add_argument(
        "--separation-width",
        type=int,
        metavar="PIXELS",
        help="what training cut from each of two touching instances and they grow back (default: 1)",
    )
    command.add_common_options(parser)
    return command.run(parser, _predict_files, argv)


def _predict_files(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    inputs = find_images(arguments.input)
    kind, outputs = _outputs(arguments, inputs)
    notices: set[str] = set()

    def notify(message: str) -> None:
        if message not in notices and not arguments.quiet:
            tqdm.write(f"note: {message}", file=sys.stderr)
        notices.add(message)

    predictor = Predictor(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision,
        tile=int(arguments.tile) if arguments.tile.isdecimal() else arguments.tile,
        rotations=arguments.rotations,
        memory=None if arguments.memory is None else parse_bytes(arguments.memory),
        threads=arguments.threads,
        notify=notify,
    )
    outputs[0].parent.mkdir(parents=True, exist_ok=True)
    done = 0
    with tqdm(
        total=len(inputs),
        disable=True if arguments.quiet else None,
        bar_format="{percentage:3.0f}%|{bar}| {n:.1f} of {total} images [{elapsed}, {remaining} left]",
    ) as bar:

        def progress(part: float) -> None:
            bar.update(done + part - bar.n)

        for source, target in zip(inputs, outputs):
            images = read_images(source, arguments.axes, notify)
            bar.total += len(images) - 1
            if len({image.pixels.shape[:2] for image in images}) > 1:
                raise DataError(f"{source}: its images differ in size; save each as a file of its own")
            if len(images) > 1 and target.suffix.lower() == ".png":
                raise DataError(f"{source}: a PNG file cannot hold its {len(images)} images; end OUT in .tif")
            results = []
            for image in images:
                try:
                    probabilities = predictor(image.pixels, progress)
                except ValueError as error:
                    raise DataError(f"{source}: {error}") from error
                results.append(_result(probabilities, kind, arguments))
                done += 1
            write_array(target, results[0] if len(images) == 1 else np.stack(results))
    if not arguments.quiet:
        where = outputs[0] if len(outputs) == 1 else f"{outputs[0].parent} ({len(outputs)} files)"
        images_done = f"{done} image{'s' if done > 1 else ''}"
        print(f"{where}: {kind} of {images_done} in {time.perf_counter() - began:.1f} s")


def _outputs(arguments: argparse.Namespace, inputs: list[Path]) -> tuple[str, list[Path]]:
    """Decide what is written and where, one output per input, before any work is done."""
    out: Path = arguments.output
    suffix = out.suffix.lower()
    to_folder = out.is_dir() or suffix == "" or (len(inputs) > 1 and suffix not in SUFFIXES)
    if len(inputs) > 1 and (not to_folder or out.is_file()):
        raise ValueError(f"{out}: {len(inputs)} inputs need a folder to write to; give one as OUT")
    if not to_folder and suffix not in SUFFIXES:
        raise ValueError(f"{out}: {suffix} cannot be written; end OUT in {', '.join(SUFFIXES)}")
    kind = arguments.save or ("classes" if suffix == ".png" and not to_folder else "probabilities")
    if kind == "probabilities" and suffix == ".png" and not to_folder:
        raise ValueError(f"{out}: PNG cannot hold probabilities; end OUT in .tif or .npy, or save classes")
    options = {
        "--min-size": arguments.min_size is not None,
        "--fill-holes": arguments.fill_holes,
        "--separation-width": arguments.separation_width is not None,
    }
    for option, given in options.items():
        if given and kind != "instances":
            raise ValueError(f"{option} is about instances and {kind} are saved; add --save instances")
    outputs = [out / _output_name(path, kind) for path in inputs] if to_folder else [out]
    times = Counter(outputs)
    for source, target in zip(inputs, outputs):
        if target.exists() and target.samefile(source):
            raise ValueError(f"{target}: the output would replace its input; write somewhere else")
        if times[target] > 1:
            raise ValueError(f"{target}: two inputs would be written to it; give inputs of different names")
    return kind, outputs


def _output_name(source: Path, kind: str) -> str:
    """Name a file in the folder OUT as its input, but .tif where PNG cannot hold what is saved."""
    is_png = source.suffix.lower() == ".png"
    return source.with_suffix(".tif").name if is_png and kind == "probabilities" else source.name


def _result(probabilities: NDArray[np.float32], kind: str, arguments: argparse.Namespace) -> NDArray:
    """Turn probabilities (H, W, K) into what is saved: (K, H, W) float32, (H, W) uint8 or (H, W) uint32."""
    if kind == "probabilities":
        return np.ascontiguousarray(np.moveaxis(probabilities, 2, 0))
    classes = probabilities.argmax(axis=2).astype(np.uint8)
    if kind == "classes":
        return classes
    width = 1 if arguments.separation_width is None else arguments.separation_width
    return find_instances(classes, width, arguments.min_size or 0, arguments.fill_holes)


if __name__ == "__main__":
    sys.exit(main())
