"""metrics.csv: what a run measured, one row a step, readable while the run is going on."""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastunet.data.images import whole_file
from fastunet.errors import DataError


class History:
    """Appends rows to a run's metrics.csv.

    Parameters
    ----------
    path : path
        The file; made anew when `last_step` is 0.
    columns : sequence of str
        Names of the columns, `step` first.
    last_step : int
        Rows beyond this step are dropped: a resumed run writes them again.
    """

    def __init__(self, path: Path | str, columns: Sequence[str], last_step: int = 0) -> None:
        path = Path(path)
        header = ",".join(columns)
        kept = []
        if last_step and path.exists():
            found, *lines = path.read_text().splitlines() or [""]
            if found != header:
                raise DataError(
                    f"{path}: its columns are {found!r} where {header!r} is expected; the file was changed "
                    f"or is another run's: put it back, or start a new run"
                )
            for line in lines:
                step = line.partition(",")[0]
                if not step.isdigit() or int(step) > last_step:
                    break
                kept.append(line)
        with whole_file(path) as file:
            file.write(("\n".join([header, *kept]) + "\n").encode())
        self._columns = list(columns)
        self._file = open(path, "a", buffering=1)

    def append(self, row: Mapping[str, float | int]) -> None:
        """Write one row; a column that `row` lacks stays empty."""
        self._file.write(",".join(repr(row[name]) if name in row else "" for name in self._columns) + "\n")

    def sync(self) -> None:
        """Make sure that every row so far survives a crash of the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_history(path: Path | str) -> dict[str, np.ndarray]:
    """Columns of a metrics.csv as float64 arrays, NaN where a row has no value; a row cut short is left out.

    Raises
    ------
    DataError
        If the file is missing or is no table of numbers.
    """
    try:
        with open(path, newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        table = [
            [float(value) if value else math.nan for value in row] for row in rows if len(row) == len(header)
        ]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected the metrics.csv of a run") from error
    values = np.array(table, float).reshape(-1, len(header))
    return {name: values[:, i] for i, name in enumerate(header)}
