"""The command `weightmap`: the loss's weight map of a label file, as a picture to look at or as numbers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from fastunet import command
from fastunet.data.datasets import LABELS, find_meaning
from fastunet.data.images import SUFFIXES, check_folder, notice, read_labels, whole_file, write_array
from fastunet.data.separation import separate
from fastunet.data.weight_map import PAPER2015, PRESETS, balanced_class_weights, count_classes, weight_map

SMALLEST_PICTURE = 256  # pixels; smaller images are magnified to it, to four times it on the longer side


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = command.Parser(
        prog="fastunet weightmap",
        description="Write the weight of every pixel in the loss: class balance plus a border term where "
        "instances are near each other (Ronneberger et al. 2015, equation 2).",
        epilog="Touching instances are first cut apart, as for training; classes are balanced over all "
        "images of the file.",
    )
    parser.add_argument(
        "labels_file", metavar="LABELS", type=Path, help="label image or stack: .tif, .png or .npy"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        required=True,
        help=".png: a picture with its colour scale, of one image; .tif or .npy: float32 weights",
    )
    parser.add_argument("--preset", choices=PRESETS, default=PAPER2015, help="formula (default: %(default)s)")
    parser.add_argument(
        "--w0", type=float, help="height of the border term (default: the preset's, 10 or 50)"
    )
    parser.add_argument(
        "--sigma",
        type=float,
        metavar="PIXELS",
        help="width of the border term (default: the preset's, 5 or 6)",
    )
    parser.add_argument(
        "--class-weights",
        type=_class_weights,
        default="balanced",
        metavar="balanced|none|W0,W1,...",
        help="weight of each class: so that each has the same sum, 1, or these numbers (default: balanced)",
    )
    parser.add_argument(
        "--separation-width",
        type=int,
        default=1,
        metavar="PIXELS",
        help="pixels taken from each of two instances where they touch; 0 cuts nothing (default: 1)",
    )
    parser.add_argument(
        "--labels",
        choices=LABELS,
        default="auto",
        help="what the labels mean; auto: two values are a binary mask, more are instances (default)",
    )
    parser.add_argument("--ignore", type=int, metavar="VALUE", help="label of pixels without truth: weight 0")
    parser.add_argument("--axes", help="axes of the file, such as ZYX, overriding its metadata")
    parser.add_argument("--page", type=int, metavar="N", help="only this image of a stack, counted from 0")
    command.add_common_options(parser, device=False)
    return command.run(parser, _write_weight_map, argv)


def _write_weight_map(arguments: argparse.Namespace) -> None:
    out: Path = arguments.output
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"--output {out}: suffix {out.suffix!r} cannot be written; use {', '.join(SUFFIXES)}"
        )
    tell = _nothing if arguments.quiet else notice
    file: Path = arguments.labels_file
    if out.exists() and file.exists() and out.samefile(file):
        raise ValueError(f"{out}: the weights would replace the labels; write somewhere else")
    check_folder(out)
    stack = [image.pixels for image in read_labels(file, arguments.axes)]
    picture = out.suffix.lower() == ".png"
    if arguments.page is not None:
        if not 0 <= arguments.page < len(stack):
            raise ValueError(
                f"--page {arguments.page}: {file} holds pages 0 to {len(stack) - 1}; choose one of them"
            )
    elif picture and len(stack) > 1:
        raise ValueError(
            f"{out}: PNG holds one image, {file} {len(stack)}; give --page N or write .tif or .npy"
        )

    meaning = find_meaning(
        file,
        {value: file for labels in stack for value in np.unique(labels).tolist()},
        arguments.labels,
        arguments.ignore,
        notify=tell,
    )
    # Classes that abut are meant to abut; only instances are cut apart.
    width = 0 if meaning.kind == "classes" else arguments.separation_width
    masks = [
        np.where(separate(meaning.instances(labels), width) > 0, meaning.classes(labels), 0)
        for labels in stack
    ]
    class_weights, classes = arguments.class_weights, len(meaning.class_names)
    if isinstance(class_weights, list) and len(class_weights) != classes:
        raise ValueError(
            f"--class-weights: {len(class_weights)} numbers for {classes} classes; give {classes}"
        )
    if class_weights == "balanced" and arguments.preset == PAPER2015:
        counts = [count_classes(mask, classes, meaning.ignored(labels)) for mask, labels in zip(masks, stack)]
        class_weights = balanced_class_weights(np.sum(counts, axis=0))
    pages = range(len(stack)) if arguments.page is None else [arguments.page]
    weights = np.stack(
        [
            weight_map(
                meaning.instances(stack[page]),
                masks[page],
                arguments.w0,
                arguments.sigma,
                class_weights,
                meaning.ignored(stack[page]),
                arguments.preset,
            )
            for page in tqdm(
                pages,
                "weight maps",
                unit="image",
                leave=False,
                delay=1,
                disable=True if arguments.quiet else None,
            )
        ]
    )
    if picture:
        _draw(out, weights[0])
    else:
        write_array(out, weights[0] if len(weights) == 1 else weights, "YX" if len(weights) == 1 else "IYX")
    tell(f"{out}: weights {weights.min():.3g} to {weights.max():.3g}, mean {weights.mean():.3g}")


def _draw(path: Path, weights: np.ndarray) -> None:
    """Draw weights (H, W) pixel by pixel with a colour scale beside them, as in figure 3d of the paper."""
    height, width = weights.shape
    zoom = max(1, min(-(-SMALLEST_PICTURE // min(height, width)), 4 * SMALLEST_PICTURE // max(height, width)))
    shown_height, shown_width = zoom * height, zoom * width
    total_height, total_width, dpi = max(shown_height, SMALLEST_PICTURE), shown_width + 96, 100
    figure = Figure(figsize=(total_width / dpi, total_height / dpi), dpi=dpi)
    bottom = (total_height - shown_height) / 2 / total_height
    axes = figure.add_axes((0, bottom, shown_width / total_width, shown_height / total_height))
    axes.set_axis_off()
    image = axes.imshow(weights, cmap="turbo", vmin=0, interpolation="nearest", aspect="auto")
    scale = figure.add_axes(((shown_width + 14) / total_width, 0.05, 18 / total_width, 0.9))
    figure.colorbar(image, cax=scale).set_label("weight in the loss")
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def _class_weights(text: str) -> str | list[float] | None:
    if text in ("balanced", "none"):
        return text if text == "balanced" else None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither balanced, none nor numbers such as 1,5"
        ) from None


def _nothing(message: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
