"""Print the folder of the C++ library's CMake package: `cmake -Dfastunet_DIR=$(python -m fastunet.cmakedir)`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastunet import command
from fastunet.errors import DataError


def cmake_folder() -> Path:
    """Find the folder of fastunet-config.cmake; `find_package(fastunet)` looks for it in `fastunet_DIR`.

    Raises
    ------
    DataError
        If the C++ library is not installed beside the extension.
    """
    import _fastunet  # also where fastunet itself is read from a checkout

    folder = Path(_fastunet.__file__).resolve().parent / "fastunet" / "lib" / "cmake" / "fastunet"
    if not (folder / "fastunet-config.cmake").is_file():
        raise DataError(f"{folder}: the C++ library is not installed there; install fastunet with pip")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser(prog="fastunet cmakedir", description=__doc__)
    return command.run(parser, _print, argv)


def _print(arguments: argparse.Namespace) -> None:
    print(cmake_folder())


if __name__ == "__main__":
    raise SystemExit(main())
