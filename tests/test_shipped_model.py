"""The network that ships with the package: found by its name, small, and as good as the README says."""

import numpy as np
import pytest

from fastunet import Predictor, UNet, metrics
from fastunet.data.datasets import open_dataset
from fastunet.data.synthetic import synthetic_cells
from fastunet.instances import find_instances
from fastunet.predict import main
from fastunet.predictor import model_file


def test_it_is_found_by_name_and_small():
    path = model_file("nuclei")
    assert path.stat().st_size < 16 * 2**20
    model = UNet.load(path)
    assert (model.in_channels, model.num_classes, model.base_channels, model.depth) == (1, 2, 16, 4)
    assert model.class_names == ["background", "object"]


def test_it_finds_synthetic_nuclei(tmp_path):
    """Images it never saw anything like, from the command line: most nuclei are found."""
    image, labels = synthetic_cells(seed=3, size=256)
    np.save(tmp_path / "cells.npy", image)
    assert main(["-m", "nuclei", "-i", str(tmp_path / "cells.npy"), "-o", str(tmp_path / "found.png"), "--save",
                 "instances", "--quiet"]) == 0  # fmt: skip
    assert (tmp_path / "found.png").exists()
    found = find_instances(Predictor("nuclei")(image).argmax(axis=2))
    assert metrics.iou(labels > 0, found > 0) > 0.7


@pytest.mark.parametrize("name, least", [("bbbc039", 0.74), ("dsb2018", 0.67)])
def test_it_scores_on_held_out_nuclei(data_folder, name, least):
    """Every tenth image by name was held out of its training (bench/segmentation.py), which scored 0.755 and 0.684."""
    samples = sorted(open_dataset(data_folder / name, notify=None).samples, key=lambda sample: sample.name)[
        ::10
    ]
    predictor = Predictor("nuclei")
    found = [find_instances(predictor(sample.image).argmax(axis=2)) for sample in samples]
    assert metrics.seg([sample.instances for sample in samples], found) > least
