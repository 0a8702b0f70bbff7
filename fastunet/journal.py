"""The folder of an unfinished prediction: what the work is, and which of its tiles are done.

`work.json` states the work, so that any process that sees the folder can do tiles of it. Every process appends the
tiles it has done to a file of its own, each after the tile's pixels are on the disk. A kill at any moment loses the
tiles that were being made and no others.
"""

import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from fastunet.errors import DataError

WORK = "work.json"


def folder_of(target: Path) -> Path:
    """Name the folder in which an output is made."""
    return target.with_name(f"{target.name}.partial")


class Journal:
    """The journal in a folder that `begin` made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.work: dict[str, Any] = json.loads((folder / WORK).read_text())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder}: it holds no readable {WORK} ({error}); use --overwrite to begin anew"
            ) from None
        self._own: int | None = None
        self._lock: int | None = None

    @classmethod
    def begin(cls, folder: Path, work: dict[str, Any]) -> "Journal":
        """Make the folder, or empty it, and state the work."""
        if (folder / WORK).is_file():
            os.close(_locked(folder))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        temporary = folder / f"{WORK}.tmp"
        with temporary.open("w") as file:
            json.dump(work, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / WORK)
        return cls(folder)

    def lock(self) -> None:
        """Keep the folder from other commands as long as this process lives.

        Raises
        ------
        DataError
            If another has it.
        """
        self._lock = _locked(self.folder)

    @property
    def is_locked(self) -> bool:
        """Whether the folder is this process's."""
        return self._lock is not None

    def finished(self) -> set[int]:
        """Tiles that are done."""
        return finished_tiles(self.folder)

    def record(self, tile: int) -> None:
        """Note that a tile is done, durably."""
        if self._own is None:
            name = f"finished-{socket.gethostname()}-{os.getpid()}"
            self._own = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self._own, f"{tile}\n".encode())
        os.fsync(self._own)

    def close(self) -> None:
        for file in (self._own, self._lock):
            if file is not None:
                os.close(file)
        self._own = self._lock = None


def finished_tiles(folder: Path) -> set[int]:
    """Tiles that are done in a folder; none where there is no folder."""
    lines: list[str] = []
    for file in folder.glob("finished-*"):
        lines += file.read_text().split("\n")[:-1]  # the last ends in a line break, unless it was cut off
    return {int(line) for line in lines}


def _locked(folder: Path) -> int:
    file = os.open(folder / WORK, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise DataError(f"{folder}: another process is at work on it; wait for it, or stop it") from None
    return file
