"""A stage of bench/gpu.py: cases by name, done one after the other in a process of its own and written down at once.

A CUDA error is the end of its process's GPU: the case is written down as failed, the process ends, and another begins
with the next case. So does a case that hangs, when its time is up.
"""

import faulthandler
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Cases = Mapping[str, Callable[[], Row]]


@dataclass(frozen=True)
class Settings:
    """What all stages are told.

    Attributes
    ----------
    device : str
        "cuda", "cuda:N" or "emulator".
    tiny : bool
        The smallest shapes and few repetitions, to see that the scripts work.
    data : str
        A folder with isbi2012, or the synthetic stack where it is none.
    out : str
        Folder of what is kept.
    seconds : float
        Time of the stage.
    """

    device: str
    tiny: bool
    data: str
    out: str
    seconds: float

    @property
    def gpu(self) -> bool:
        return self.device != "emulator"


def do(cases: Cases, log: Path, limit: float) -> bool:
    """Do what the log does not have yet, each case within `limit` seconds; False after a failure."""
    known = read(log)
    for name, case in cases.items():
        if name in known:
            continue
        _write(log, name, {"failure": f"ended its process, or took more than {limit:.0f} s"})
        faulthandler.dump_traceback_later(limit, exit=True)
        begin = time.perf_counter()
        try:
            row = case()
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            _write(log, name, {"failure": text[:300]})
            return False
        finally:
            faulthandler.cancel_dump_traceback_later()
        _write(log, name, {**row, "seconds": round(time.perf_counter() - begin, 2)})
    return True


def read(log: Path) -> dict[str, Row]:
    """Rows by the names of their cases; a later one replaces an earlier."""
    if not log.exists():
        return {}
    return {row.pop("case"): row for row in map(json.loads, log.read_text().splitlines())}


def _write(log: Path, name: str, row: Row) -> None:
    with open(log, "a") as file:
        file.write(json.dumps({"case": name, **row}) + "\n")
