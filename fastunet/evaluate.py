"""The evaluate command: predictions against the truth, by the metrics of the challenges."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastunet import command
from fastunet.data.images import check_folder, whole_file
from fastunet.figures import CLASS_METRICS, METRICS, Figure, class_figures, foreground_figures, view_pairs
from fastunet.instances import find_instances
from fastunet.pairs import Pair, is_tracking_truth, read_pairs

ROWS_SHOWN = 40

TITLES = {
    "pixel_error": "pixel error (2012)",
    "rand_error": "Rand error (2012)",
    "warping_error": "warping error (2012), splits and mergers",
    "warping_error_plain": "warping error, all that remains",
    "v_rand": "V^Rand, thinned",
    "v_rand_unthinned": "V^Rand, not thinned",
    "v_info": "V^Info, thinned",
    "v_info_unthinned": "V^Info, not thinned",
    "seg": "SEG",
    "iou": "IoU of the foreground",
    "dice": "Dice of the foreground",
}
COLUMNS = {
    "pixel_error": "pixel err",
    "rand_error": "Rand err",
    "warping_error": "warping",
    "v_rand": "V^Rand",
    "v_info": "V^Info",
    "seg": "SEG",
    "iou": "IoU",
    "dice": "Dice",
}
ERRORS = ("warping_error", "warping_error_plain")

DESCRIPTION = """\
Score a prediction against the truth. TRUTH and PRED are a file, a stack or a folder (TIFF, PNG, NPY).
Integers are labels; floats are probabilities, (K, H, W) for an image and (N, K, H, W) for a stack, whose last
class is the foreground."""

EPILOG = """\
pairing
  One file on each side is a pair. Files of two folders pair by name without suffix. The truth of the Cell
  Tracking Challenge (01_GT/SEG/man_seg012.tif) pairs by frame number: with mask012.tif, t012.tif or any other
  name that ends in 012.

metrics
  pixel_error    1 - best F-score of the foreground's pixels over the thresholds 0, 0.1, ... (ISBI 2012)
  rand_error     1 - best F-score of pairs of pixels that share a segment (ISBI 2012)
  warping_error  pixels that split or merge cells after the truth was warped to the prediction (ISBI 2012),
                 and all pixels that remain
  v_rand         Rand score restricted to the truth's foreground (2015), with borders thinned and as they are
  v_info         information score, in the same way
  seg            Cell Tracking Challenge: mean Jaccard index over the reference objects
  iou, dice      overlap of the foreground where its probability is above 0.5; with --labels classes, of each
                 class
Where touching instances are given as truth, gaps of background are cut between them for the warping error and
the scores of segments, as training does. Predicted instances are segments as they are.

gold truth
  In gold truth (GT) of the Cell Tracking Challenge 0 can mean "not annotated". SEG looks at the annotated
  objects only and is the figure for it; it alone is computed there unless --metrics asks for more."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser(
        prog="fastunet evaluate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--truth", required=True, type=Path, help="labels: 0 is background (or not annotated)"
    )
    parser.add_argument("--pred", required=True, type=Path, help="probabilities, classes or instances")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every figure, threshold and image here"
    )
    parser.add_argument(
        "--labels",
        default="auto",
        choices=("auto", "instances", "classes"),
        help="what integers mean; auto: two values are a mask and its 4-connected components the instances, "
        "more values are instances (default: auto)",
    )
    parser.add_argument("--ignore", type=int, metavar="VALUE", help="label of pixels without truth")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
        help=f"only these of {', '.join(METRICS)} (default: all that apply)",
    )
    parser.add_argument(
        "--select",
        metavar="LIST",
        help="only these images, such as 0,6,12 or 60- : frame numbers of Cell Tracking Challenge truth, "
        "else positions from 0; the prediction holds all images of the truth or just these",
    )
    instances = parser.add_argument_group("instances derived from probabilities and masks, for SEG")
    instances.add_argument(
        "--min-size",
        type=command.positive_int,
        default=1,
        metavar="PIXELS",
        help="leave out smaller ones (default: 1)",
    )
    instances.add_argument("--fill-holes", action="store_true", help="fill background that one encloses")
    instances.add_argument(
        "--separation-width",
        type=int,
        default=1,
        metavar="PIXELS",
        help="gap that training cut from each of two touching instances; they grow back by it (default: 1)",
    )
    parser.add_argument(
        "--threads",
        type=command.thread_count,
        metavar="N",
        help="CPU threads (default: the cores this process may use)",
    )
    command.add_common_options(parser, device=False)
    return command.run(parser, _evaluate, argv)


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        check_folder(arguments.json)
        for file in (arguments.truth, arguments.pred):
            if file.exists() and arguments.json.exists() and arguments.json.samefile(file):
                raise ValueError(
                    f"--json {arguments.json}: the figures would replace {file}; write somewhere else"
                )
    pairs = read_pairs(arguments.truth, arguments.pred, arguments.select, arguments.quiet)
    report: dict[str, Any] = {
        "truth": str(arguments.truth),
        "prediction": str(arguments.pred),
        "images": [pair.truth.name for pair in pairs],
    }
    if arguments.labels == "classes":
        report |= _classes(arguments, pairs)
    else:
        report |= _foreground(arguments, pairs)
    if arguments.json is not None:
        with whole_file(arguments.json) as file:
            file.write(json.dumps(_plain(report), indent=2, allow_nan=False).encode() + b"\n")
    if not arguments.quiet:
        print(_table(report))
        if arguments.labels == "classes" and arguments.ignore is None and _has_lone_255(pairs):
            print("label 255 was scored as a class; --ignore 255 leaves its pixels out")


def _has_lone_255(pairs: list[Pair]) -> bool:
    """Whether 255 stands apart from the other labels of the truth, as a value for "no truth here" does."""
    present = np.unique(np.concatenate([np.unique(pair.truth.pixels) for pair in pairs]))
    return 255 in present and 254 not in present


def _classes(arguments: argparse.Namespace, pairs: list[Pair]) -> dict[str, Any]:
    wanted = arguments.metrics or CLASS_METRICS
    for name in wanted:
        if name not in CLASS_METRICS:
            raise ValueError(
                f"--metrics {name} compares foreground or instances, not classes; choose among "
                f"{', '.join(CLASS_METRICS)}, or drop --labels classes"
            )
    figures = class_figures(pairs, wanted, arguments.ignore)
    return {"truth_kind": "classes", "prediction_kind": "classes", "notes": [], "metrics": figures}


def _foreground(arguments: argparse.Namespace, pairs: list[Pair]) -> dict[str, Any]:
    notes = []
    wanted = arguments.metrics or METRICS
    if not arguments.metrics and _is_gold(pairs):
        wanted = ("seg",)
        notes.append("in gold truth 0 can mean not annotated; SEG allows for that, --metrics computes others")
    elif arguments.ignore is not None and "warping_error" in wanted:
        if arguments.metrics:
            raise ValueError("--metrics warping_error cannot leave pixels out; drop it, or drop --ignore")
        wanted = tuple(name for name in wanted if name != "warping_error")
        notes.append("no warping error, which cannot leave ignored pixels out")
    views = view_pairs(
        pairs,
        arguments.labels == "instances",
        arguments.ignore,
        partial(
            find_instances,
            width=arguments.separation_width,
            min_size=arguments.min_size,
            fill_holes=arguments.fill_holes,
        ),
        arguments.quiet,
    )
    return {
        "truth_kind": views.truth_kind,
        "prediction_kind": views.pred_kind,
        "notes": notes,
        "metrics": foreground_figures(views, wanted, arguments.threads, arguments.quiet),
    }


def _is_gold(pairs: list[Pair]) -> bool:
    path = pairs[0].truth.path.resolve()
    return is_tracking_truth(path) and any(part.endswith("_GT") for part in path.parts)


def _plain(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _table(report: dict[str, Any]) -> str:
    images: list[str] = report["images"]
    figures: dict[str, Figure] = {
        name: report["metrics"][name] for name in TITLES if name in report["metrics"]
    }
    by_class = report["truth_kind"] == "classes"
    lines = [
        f"truth       {report['truth']} ({len(images)} image{'s' if len(images) > 1 else ''}, "
        f"{report['truth_kind']})",
        f"prediction  {report['prediction']} ({report['prediction_kind']})",
        *(f"note        {note}" for note in report["notes"]),
        "",
        f"{'metric':42}{'figure':>9}  threshold  detail",
    ]
    for name, figure in figures.items():
        title = f"{COLUMNS[name]}, mean of the classes" if by_class else TITLES[name]
        threshold = figure.get("threshold", math.nan)
        shown = "" if math.isnan(threshold) else f"{threshold:.1f}"
        lines.append(f"{title:42}{_number(name, figure['figure']):>9}  {shown:9}  {_detail(figure)}".rstrip())
    if len(images) > 1:
        lines += ["", *_image_table(images, figures)]
    return "\n".join(lines)


def _image_table(images: list[str], figures: dict[str, Figure]) -> list[str]:
    columns = {name: title for name, title in COLUMNS.items() if name in figures}
    width = max(len("all"), *(len(name) for name in images[:ROWS_SHOWN])) + 2
    lines = [f"{'image':{width}}" + "".join(f"{title:>11}" for title in columns.values())]
    for index, image in enumerate(images[:ROWS_SHOWN]):
        cells = (_number(name, figures[name]["per_image"][index]) for name in columns)
        lines.append(f"{image:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    if len(images) > ROWS_SHOWN:
        lines.append(f"... {len(images) - ROWS_SHOWN} more images; --json FILE writes them all")
    cells = (_number(name, figures[name]["figure"]) for name in columns)
    return [*lines, f"{'all':{width}}" + "".join(f"{cell:>11}" for cell in cells)]


def _number(name: str, figure: float) -> str:
    if math.isnan(figure):
        return "-"
    return f"{figure:.6f}" if name in ERRORS else f"{figure:.4f}"


def _detail(figure: Figure) -> str:
    if "objects" in figure:
        return f"{figure['found']} of {figure['objects']} reference objects found"
    if "pixels" in figure:
        return ", ".join(f"{count} {kind}" for kind, count in figure["pixels"].items() if count)
    if "per_class" in figure:
        scores = enumerate(figure["per_class"])
        return ", ".join(f"{index}: {_number('', score)}" for index, score in scores if not math.isnan(score))
    if "precision" in figure:
        return f"precision {figure['precision']:.4f}, recall {figure['recall']:.4f}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
