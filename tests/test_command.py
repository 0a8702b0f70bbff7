"""What all commands share: how a mistake is told, and the console script that finds them."""

import errno
import importlib
import os
import subprocess
import sys

import pytest

from fastunet import command
from fastunet.__main__ import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_told_in_one_sentence(capsys, name):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"fastunet.{name}").main(["--no-such-option"])
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith(f"fastunet {name}: error: ")
    assert f"'fastunet {name} --help' explains the options" in told.err


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--no-such-option"]])
def test_an_unknown_command_is_told_in_one_sentence(capsys, arguments):
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert "train, predict, evaluate" in told.err and "--help" in told.err
    assert all(argument in told.err for argument in arguments)


@pytest.mark.parametrize("number", [*command.ADVICE, errno.EIO])
def test_what_the_system_refuses_is_told_with_what_to_do(capsys, number):
    def refuse(arguments):
        raise OSError(number, os.strerror(number), "some/file")

    assert command.run(command.Parser(prog="fastunet test"), refuse, []) == 2
    told = capsys.readouterr().err
    assert told.startswith("fastunet test: error: some/file: ") and told.count("\n") == 1
    assert "; " in told


def test_a_reader_that_goes_ends_a_command_in_silence():
    """As in `fastunet info nuclei | head -1`."""
    with subprocess.Popen(
        [sys.executable, "-m", "fastunet", "info", "nuclei"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == command.READER_GONE
