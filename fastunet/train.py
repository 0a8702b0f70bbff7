"""`python -m fastunet.train [DATA]`: train a network on annotated images."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastunet import command
from fastunet.data import datasets
from fastunet.data.datasets import Dataset
from fastunet.data.synthetic import synthetic_dataset
from fastunet.training import Result, Settings, check_out, read_config, resume, train

SYNTHETIC_IMAGES = 12
SYNTHETIC_SIZE = 512
SYNTHETIC_MINUTES = 2.5
SYNTHETIC_VAL = "0.2"

SOURCE_OPTIONS = ("data", "labels", "ignore", "axes", "val")
MACHINE_OPTIONS = ("device", "threads", "quiet", "resume")

DESCRIPTION = """\
Train a U-Net on annotated images and write a run folder: the network (model.safetensors, the best by
validation), its curves (progress.png, metrics.csv), its predictions on held-out images (samples.png), and
checkpoints from which a run that was stopped goes on as if it never had been.
"""

EPILOG = """\
examples:
  python -m fastunet.train                                a first network on built-in images, in three minutes
  python -m fastunet.train images/ --minutes 30           half an hour on your own
  python -m fastunet.train images/ --val 0,6,12,18        hold out these four images
  python -m fastunet.train images/ --init nuclei          begin with the weights of a trained network
  python -m fastunet.train --resume runs/20250102-030405  go on with a run that was stopped
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; an option that is not given leaves no trace, so that --resume can tell."""
    parser = command.Parser(
        prog="fastunet train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="a folder: train-volume.tif + train-labels.tif, or a Cell Tracking Challenge folder, or images/ "
        "+ labels/ (or masks/) paired by name (default: a built-in synthetic stack)",
    )
    data.add_argument(
        "--labels",
        choices=datasets.LABELS,
        help="what label values mean; auto: two values are a binary mask, more are instances (default)",
    )
    data.add_argument("--ignore", type=int, metavar="VALUE", help="label value of pixels that teach nothing")
    data.add_argument(
        "--axes", help="axes of the image files, such as YX, ZYX or YXC (default: as the files say)"
    )
    data.add_argument(
        "--class-names", type=_names, metavar="A,B,...", help="names of the classes, background first"
    )
    data.add_argument(
        "--val",
        metavar="FRACTION|LIST|FOLDER",
        help="held-out images: a fraction (every so many images), a list such as 0,6,12 or 60- (frame "
        "numbers in a Cell Tracking Challenge folder), or another data folder (default: 0.1)",
    )
    data.add_argument(
        "--normalization",
        type=_normalization,
        metavar="zscore|minmax|none|OFFSET,SCALE",
        help="grey values on their way into the network, recorded in the model; OFFSET,SCALE for (x - "
        "OFFSET) * SCALE, one pair a channel separated by ; (default: zscore, per image and channel)",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="RUN", help="the run folder (default: runs/DATE-TIME)")
    length = run.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=command.positive_int, metavar="N", help="length of the run (default: 10000)"
    )
    length.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help=f"length of the run in minutes of training and validation; the learning rate then follows the "
        f"clock (default without DATA: {SYNTHETIC_MINUTES:g})",
    )
    run.add_argument(
        "--resume", metavar="RUN", help="go on with a run that was stopped, with its own options"
    )
    run.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    run.add_argument(
        "--checkpoint-every", type=command.positive_int, metavar="STEPS", help="default: about a minute"
    )
    run.add_argument(
        "--best",
        choices=("iou", "v_rand", "seg", "loss"),
        help="validation figure that chooses the network kept (default: v_rand for binary masks, seg for "
        "instances, iou for classes)",
    )
    run.add_argument("--seed", type=int, help="of weights, samples and dropout (default: 0)")
    run.add_argument(
        "--tensorboard", action="store_true", help="write events for TensorBoard into the run folder"
    )

    network = parser.add_argument_group("network")
    network.add_argument(
        "--init",
        metavar="MODEL",
        help="fine-tune: begin with the weights of a model file, a run folder or 'nuclei'",
    )
    network.add_argument(
        "--base-channels",
        type=_auto_or_positive_int,
        metavar="N",
        help="channels of the finest level (default: 64 on CUDA, 16 on the CPU)",
    )
    network.add_argument(
        "--depth", type=command.positive_int, metavar="D", help="poolings, 1 to 6 (default: 4)"
    )
    network.add_argument(
        "--tile",
        type=_auto_or_positive_int,
        metavar="N",
        help="side of the network's input in pixels, 16 k + 12 at depth 4 (default: 572 on CUDA; on the CPU 316, "
        "more where objects are large; less where all images are smaller)",
    )
    network.add_argument(
        "--dropout", type=float, metavar="P", help="at the end of the contracting path (default: 0.5)"
    )

    learning = parser.add_argument_group("learning")
    learning.add_argument("--lr", type=float, metavar="RATE", help="highest learning rate (default: 0.001)")
    learning.add_argument("--momentum", type=float, metavar="M", help="of the gradients (default: 0.99)")
    learning.add_argument(
        "--preset", choices=("paper2015", "falk2019"), help="of the weight map (default: paper2015)"
    )
    learning.add_argument(
        "--w0",
        type=float,
        metavar="W",
        help="weight of the border between objects (default: 10; 50 for falk2019)",
    )
    learning.add_argument(
        "--sigma", type=float, metavar="PX", help="width of that border's weight (default: 5; 6 for falk2019)"
    )
    learning.add_argument(
        "--separation-width",
        type=int,
        metavar="PX",
        help="background cut from each of two touching objects; tell prediction the same (default: 1)",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", metavar="auto|cpu|cuda|cuda:N", help="where to compute (default: auto)")
    machine.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), help="auto: bf16 on CUDA, fp32 on the CPU (default)"
    )
    machine.add_argument(
        "--threads",
        type=command.thread_count,
        metavar="N",
        help="CPU threads (default: the cores this process may use)",
    )
    machine.add_argument("--quiet", action="store_true", help="print errors only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return command.run(build_parser(), _train, argv)


def _train(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    quiet = given.get("quiet", False)

    def notify(line: str) -> None:
        if not quiet:
            print(line, flush=True)

    result = _resume(given, notify) if "resume" in given else _start(given, notify)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in result.scores.items())
    notify(f"best of {result.steps} steps by {result.best}: step {result.best_step}, {figures}")
    notify(f"written to {result.out}: model.safetensors, metrics.csv, progress.png, samples.png")
    return 0


def _start(given: dict[str, Any], notify: Callable[[str], None]) -> Result:
    source = {name: given.get(name) for name in SOURCE_OPTIONS}
    for name in ("data", "val"):
        source[name] = _absolute(source[name])
    options = {
        name: value
        for name, value in given.items()
        if name not in (*SOURCE_OPTIONS, "out", "overwrite", "quiet")
    }
    if source["data"] is None:
        for name in ("labels", "ignore", "axes"):
            if source[name] is not None:
                raise ValueError(
                    f"--{name} {source[name]} is about DATA, and none was given; name the folder of your images, "
                    f"or leave --{name} out"
                )
        source["val"] = source["val"] or SYNTHETIC_VAL
        if not {"steps", "minutes"} & options.keys():
            options["minutes"] = SYNTHETIC_MINUTES
    options["init"] = _absolute(options.get("init"))
    settings = Settings(**options)
    if "out" in given:
        check_out(Path(given["out"]), given.get("overwrite", False))
    training, validation = open_data(source, given.get("class_names"), None if given.get("quiet") else notify)
    return train(
        training,
        validation,
        given.get("out"),
        settings,
        overwrite=given.get("overwrite", False),
        source=source,
        notify=notify,
        quiet=given.get("quiet", False),
    )


def _resume(given: dict[str, Any], notify: Callable[[str], None]) -> Result:
    run = given["resume"]
    _, config = read_config(run)
    recorded = config["settings"] | config["source"] | {"out": run}
    for name, value in given.items():
        # Paths are recorded as absolute ones.
        same = (value, _absolute(value)) if isinstance(value, str) else (value,)
        if name in (*MACHINE_OPTIONS, "data") or (name in recorded and recorded[name] in same):
            continue
        option = f"--{name.replace('_', '-')}"
        before = "out it" if recorded.get(name) in (None, False) else f" {recorded[name]}"
        found = f"was begun with{before}" if name in recorded else "does not take it"
        raise ValueError(
            f"{option} was given with --resume, and {run} {found}; leave {option} out, or start a new run, "
            f"from its weights with --init {run} if you like"
        )
    # A folder that has moved is named again; the images and labels in it must be the same.
    source = config["source"] | {name: given[name] for name in ("data",) if name in given}
    training, validation = open_data(source, config["settings"]["class_names"], None)
    return resume(
        run,
        training,
        validation,
        device=given.get("device"),
        threads=given.get("threads"),
        notify=notify,
        quiet=given.get("quiet", False),
    )


def open_data(
    source: dict[str, Any], class_names: list[str] | None, notify: Callable[[str], None] | None
) -> tuple[Dataset, Dataset]:
    """Open training and held-out images as the options of a run, or its config.json, say.

    Parameters
    ----------
    source : dict
        The options data, labels, ignore, axes and val; None where not given.
    class_names : list of str, optional
    notify : callable, optional
        Receives what the user should know.

    Returns
    -------
    training, validation : Dataset
        Nothing is held out of a single image, unless `val` is a folder.
    """
    if source["data"] is None:
        dataset = synthetic_dataset(SYNTHETIC_IMAGES, SYNTHETIC_SIZE, 0)
        if notify is not None:
            notify(f"no DATA given: {SYNTHETIC_IMAGES} synthetic images of {SYNTHETIC_SIZE} pixels")
    else:
        dataset = datasets.open_dataset(
            source["data"],
            source["labels"] or "auto",
            source["ignore"],
            source["axes"],
            class_names=class_names,
            notify=notify,
        )
    return datasets.validation_split(dataset, source["val"] or "0.1", source["axes"], notify=notify)


def _absolute(text: str | None) -> str | None:
    """Make a path that exists absolute, so that a run can be resumed from another folder; leave all else."""
    return str(Path(text).resolve()) if text is not None and Path(text).exists() else text


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _auto_or_positive_int(text: str) -> int | None:
    return None if text == "auto" else command.positive_int(text)


def _normalization(text: str) -> str | list[list[float]]:
    if text in ("zscore", "minmax", "none"):
        return text
    try:
        pairs = [[float(number) for number in pair.split(",")] for pair in text.split(";")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} was given, zscore, minmax, none or OFFSET,SCALE is expected"
        )
    return pairs


if __name__ == "__main__":
    sys.exit(main())
