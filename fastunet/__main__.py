"""The console script: `fastunet COMMAND ...` is `python -m fastunet.COMMAND ...`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a network on annotated images",
    "predict": "segment images with a trained network",
    "evaluate": "score a prediction against the truth",
    "weightmap": "write the loss's weight map as an image",
    "verify": "read a data folder and report what is wrong with it",
    "info": "sizes, parameters, memory and time of a network",
    "cmakedir": "print where CMake finds the C++ library",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return int(importlib.import_module(f"fastunet.{arguments[0]}").main(arguments[1:]))
    listing = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    usage = f"usage: fastunet COMMAND [options]\n\n{listing}\n\n'fastunet COMMAND --help' explains a command."
    if arguments in (["-h"], ["--help"]):
        print(usage)
        return 0
    found = f"{arguments[0]!r} is no command" if arguments else "a command is missing"
    expected = ", ".join(COMMANDS)
    print(
        f"fastunet: error: {found}; one of {expected} is expected, 'fastunet --help' explains them",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
