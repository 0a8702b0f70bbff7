"""Train, predict and score on real images, through the commands a user types: the README's table of scores.

    python bench/segmentation.py isbi2012 --minutes 30 --data ../shared/data --out runs/isbi-30
    python bench/segmentation.py DIC-C2DH-HeLa | PhC-C2DH-U373 | nuclei

Held out are slices 0, 6, 12, 18 of the ISBI 2012 stack; frames from 60 (DIC-HeLa) and 50 (PhC-U373) on, scored against
the gold truth and the silver one, on which they are trained; and every tenth image of the two sets of nuclei (dsb2018
and bbbc039). The checkpoint kept is the best on these same images. Other options, such as --threads 1, go to fastunet
train. Scores are printed and written to OUT/scores.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from fastunet.data.images import read_array, write_array

FIRST_HELD_OUT = {"DIC-C2DH-HeLa": ("01", 60), "PhC-C2DH-U373": ("02", 50)}
ISBI_HELD_OUT = (0, 6, 12, 18)


def fastunet(*arguments: object) -> None:
    """Run a command as a user would."""
    print("+ python -m fastunet." + " ".join(map(str, arguments)), flush=True)
    subprocess.run([sys.executable, "-m", f"fastunet.{arguments[0]}", *map(str, arguments[1:])], check=True)


def scores(path: Path) -> dict:
    return json.loads(path.read_text())


def isbi2012(data: Path, out: Path, training: list[str]) -> dict:
    selection = ",".join(map(str, ISBI_HELD_OUT))
    fastunet("train", data / "isbi2012", "--val", selection, "--out", out, *training)
    held_out = out / "held-out.tif"
    write_array(held_out, read_array(data / "isbi2012" / "train-volume.tif")[list(ISBI_HELD_OUT)])
    result = {}
    for rotations in (1, 7):
        prediction, table = out / f"held-out-{rotations}.tif", out / f"scores-{rotations}.json"
        fastunet("predict", "-m", out, "-i", held_out, "-o", prediction, "--rotations", rotations)
        truth = data / "isbi2012" / "train-labels.tif"
        fastunet("evaluate", "--truth", truth, "--pred", prediction, "--select", selection, "--json", table)
        result[f"{rotations} rotations"] = scores(table)
    held_out.unlink()  # the images may not be copied about
    return result


def cell_tracking(name: str, data: Path, out: Path, training: list[str]) -> dict:
    sequence, first = FIRST_HELD_OUT[name]
    folder = data / "ctc" / name
    fastunet("train", folder, "--val", f"{first}-", "--out", out, *training)
    frames, predictions = out / "frames", out / "predictions"
    frames.mkdir(exist_ok=True)
    for frame in sorted((folder / sequence).glob("t*.tif")):
        if int(frame.stem[1:]) >= first and not (frames / frame.name).exists():
            (frames / frame.name).symlink_to(frame.resolve())
    fastunet("predict", "-m", out, "-i", frames, "-o", predictions, "--save", "instances")
    result = {}
    for kind in ("GT", "ST"):
        truth, table = folder / f"{sequence}_{kind}" / "SEG", out / f"scores-{kind}.json"
        fastunet(
            "evaluate", "--truth", truth, "--pred", predictions, "--select", f"{first}-", "--json", table
        )
        result[kind] = scores(table)
    return result


def nuclei(data: Path, out: Path, training: list[str]) -> dict:
    """Both CC0 sets in two folders of links: every tenth image of each is held out."""
    folders = {kind: out.with_name(f"{out.name}-{kind}") for kind in ("training", "held-out")}
    for name in ("bbbc039", "dsb2018"):
        for i, image in enumerate(sorted((data / name / "images").iterdir())):
            for kind in ("images", "labels"):
                link = folders["training" if i % 10 else "held-out"] / kind / f"{name}_{image.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to((data / name / kind / image.name).resolve())
    fastunet("train", folders["training"], "--val", folders["held-out"], "--out", out, *training)
    predictions, result = out / "predictions", {}
    fastunet(
        "predict", "-m", out, "-i", folders["held-out"] / "images", "-o", predictions, "--save", "instances"
    )
    for name in ("bbbc039", "dsb2018"):
        for kind, found in (("truth", folders["held-out"] / "labels"), ("prediction", predictions)):
            for file in found.glob(f"{name}_*"):
                link = out / name / kind / file.name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(file.resolve())
        truth, table = out / name / "truth", out / f"scores-{name}.json"
        fastunet("evaluate", "--truth", truth, "--pred", out / name / "prediction", "--labels", "instances",
                 "--json", table)  # fmt: skip
        result[name] = scores(table)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("isbi2012", *FIRST_HELD_OUT, "nuclei"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FASTUNET_DATA", "../shared/data")))
    parser.add_argument("--minutes", default="12")
    parser.add_argument("--out", type=Path)
    arguments, more = parser.parse_known_args()
    out = arguments.out or Path("runs") / f"{arguments.name}-{arguments.minutes}"
    training = ["--minutes", arguments.minutes, "--base-channels", "16", "--overwrite", *more]
    if arguments.name == "isbi2012":
        result = isbi2012(arguments.data, out, training)
    elif arguments.name == "nuclei":
        result = nuclei(arguments.data, out, training)
    else:
        result = cell_tracking(arguments.name, arguments.data, out, training)
    (out / "scores.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
