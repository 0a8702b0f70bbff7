"""Write what fuzzing begins with: `python tests/fuzz/seeds.py FOLDER` (a model file, folders `model` and `predict`)."""

import json
import struct
import sys
from pathlib import Path

import numpy as np

from fastunet import UNet


def write_seeds(folder: Path) -> Path:
    """Seeds of both targets; returns the model file that fuzz_predict is to be given."""
    for name in ("model", "predict"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    model = UNet(1, 3, 1, 1, seed=1)
    model.class_names = ["a", "ä", "\n"]
    tiny = folder / "tiny.safetensors"
    for rule in ("zscore", "minmax", "none", [[0.5, 2e-3]]):
        model.normalization = rule
        model.save(tiny)
        content = tiny.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        name = json.dumps(rule).strip('"[]').replace(" ", "")
        (folder / "model" / f"file-{name}").write_bytes(b"\0" + content)
        data_bytes = struct.pack("<H", len(content) - begin)
        (folder / "model" / f"header-{name}").write_bytes(b"\1" + data_bytes + content[8:begin])

    random = np.random.default_rng(1)
    for number, (rotations, tile, kind, height, width) in enumerate(
        [(0, 0, 0, 9, 7), (1, 18, 1, 5, 12), (2, 20, 2, 1, 6), (3, 26, 0, 11, 1), (0, 18, 2, 16, 15)]
    ):
        element = (1, 2, 4)[kind]
        image = struct.pack("BbbBbbb", kind, height, width, 1, width * element, element, element)
        for classes in (0, 1):
            result = struct.pack("Bbbb", classes, *((width, 1, 1) if classes else (12, 120, 4)))
            options = struct.pack("BbB", rotations, tile, 40)
            pixels = random.random(height * width, np.float32).tobytes()
            path = folder / "predict" / f"{number}-{classes}"
            path.write_bytes(options + image + result + b"\0" + pixels)
    return tiny


if __name__ == "__main__":
    print(write_seeds(Path(sys.argv[1])))
