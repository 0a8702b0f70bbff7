"""metrics.csv: exact numbers, cut back to a checkpoint, readable while it is being written."""

import math

import numpy as np
import pytest

from fastunet.errors import DataError
from fastunet.history import History, read_history

COLUMNS = ["step", "loss", "val_iou"]


def test_numbers_come_back_exactly_and_missing_ones_as_nan(tmp_path):
    rng = np.random.default_rng(0)
    losses = [float(x) for x in rng.uniform(size=5)]
    history = History(tmp_path / "m.csv", COLUMNS)
    for step, loss in enumerate(losses, 1):
        history.append({"step": step, "loss": loss} | ({"val_iou": 0.25} if step == 3 else {}))
        # Rows can be read as soon as they are written.
        assert len(read_history(tmp_path / "m.csv")["step"]) == step
    history.close()
    read = read_history(tmp_path / "m.csv")
    assert list(read) == COLUMNS
    assert read["loss"].tolist() == losses
    assert [math.isnan(x) for x in read["val_iou"]] == [True, True, False, True, True]


@pytest.mark.parametrize("tail", ["", "4,0.4", "4,0.4,0.1\n5,0", "4,0.4,\n4"])
def test_rows_beyond_the_checkpoint_are_dropped(tmp_path, tail):
    path = tmp_path / "m.csv"
    kept = "step,loss,val_iou\n1,0.1,\n2,0.2,0.5\n3,0.30000000000000004,\n"
    path.write_text(kept + tail)
    history = History(path, COLUMNS, last_step=3)
    history.append({"step": 4, "loss": 0.5})
    history.close()
    assert path.read_text() == kept + "4,0.5,\n"


def test_a_new_run_begins_an_empty_table(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("anything")
    History(path, COLUMNS).close()
    assert path.read_text() == "step,loss,val_iou\n"
    assert read_history(path)["step"].shape == (0,)


def test_another_table_is_refused(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("step,accuracy\n1,2\n")
    with pytest.raises(DataError, match=r"m\.csv: its columns are 'step,accuracy'"):
        History(path, COLUMNS, last_step=1)
    path.write_text("step,loss\n1,much\n")
    with pytest.raises(DataError, match="much"):
        read_history(path)
    with pytest.raises(DataError, match="no-such"):
        read_history(tmp_path / "no-such.csv")
