"""What every command shares: options of the same name and meaning, and how a user's mistake is told."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fastunet.errors import DataError

USER_MISTAKE = 2
INTERRUPTED = 130
READER_GONE = 141
MOST_THREADS = 1024  # creating many more would take minutes

ADVICE = {
    errno.EEXIST: "a file is there where a folder is expected; name another place",
    errno.ENOTDIR: "a file is there where a folder is expected; name another place",
    errno.EISDIR: "a folder is there where a file is expected; name the file",
    errno.ENOENT: "nothing is there, but a file or folder is expected; check the path",
    errno.EACCES: "this user may not read or write it; change its permissions, or name another place",
    errno.EROFS: "its file system can only be read; name another place",
    errno.ENOSPC: "no space is left where it would be written; free some, or name another place",
}


class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one sentence, without all the options above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_MISTAKE, f"{self.prog}: error: {message}; '{self.prog} --help' explains the options\n")


def add_common_options(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Add --device, --precision, --threads (where `device`) and --quiet."""
    if device:
        parser.add_argument(
            "--device",
            default="auto",
            metavar="auto|cpu|cuda|cuda:N",
            help="where to compute (default: auto)",
        )
        parser.add_argument(
            "--precision",
            default="auto",
            choices=("auto", "fp32", "bf16"),
            help="auto: bf16 on CUDA, fp32 on the CPU (default)",
        )
        parser.add_argument(
            "--threads",
            type=thread_count,
            metavar="N",
            help="CPU threads (default: the cores this process may use)",
        )
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def positive_int(text: str) -> int:
    """Parse an integer of at least 1 for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given, a whole number of at least 1 is expected")
    return value


def thread_count(text: str) -> int:
    """Parse a number of threads for argparse."""
    count = positive_int(text)
    if count > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} was given, 1 to {MOST_THREADS} threads are expected")
    return count


def run(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv`, run `body` and return the exit status.

    A user's mistake (`DataError`, `ValueError`, a file that is missing or exists already, memory that does not
    suffice) ends in one sentence on stderr and status 2; Ctrl-C in status 130. Anything else is a defect of ours
    and keeps its traceback.
    """
    arguments = parser.parse_args(argv)
    try:
        status = body(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
        return READER_GONE
    except (DataError, ValueError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            advice = ADVICE.get(error.errno or 0, f"{error.strerror}; check the path, or name another")
            message = f"{Path(error.filename)}: {advice}"
        else:
            message = str(error) or type(error).__name__
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
