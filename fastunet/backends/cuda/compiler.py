"""From kernels/*.cu to machine code of one architecture, by NVRTC; results are kept in the user's cache folder.

A result's name in the cache is a digest of every kernel source, the compiler's options and its version, so that none is
ever out of date; it is written under a temporary name and renamed, so that any number of processes may start at once.
"""

import functools
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OLDEST_CAPABILITY = (8, 0)

_REPORT = re.compile(
    r"Function properties for (\w+)\s.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """What one thread (registers, local, spilled: in bytes but for registers) or block (static shared bytes) needs."""

    registers: int
    shared: int
    local: int
    spilled: int


def build(file: str, defines: tuple[str, ...], architecture: str) -> bytes:
    """Machine code (a cubin) of a file of kernels/, from the cache or made now.

    Parameters
    ----------
    file : str
        Such as "dropout.cu".
    defines : tuple of str
        Such as ("-DELEMENT_BITS=16",).
    architecture : str
        Such as "sm_90a".

    Raises
    ------
    RuntimeError
        If the source does not compile.
    """
    options = _options(defines, architecture)
    entry = _entry(file, options)
    code = None if entry is None else _read(entry)
    if code is None:
        code, _ = _compile(file, options)
        if entry is not None:
            _write(entry, code)
    return code


def resources(file: str, defines: tuple[str, ...], architecture: str) -> dict[str, Resources]:
    """Compile a file and say what each of its kernels needs, by the kernel's name."""
    _, log = _compile(file, (*_options(defines, architecture), "--ptxas-options=-v"))
    found = {}
    for name, stack, stores, loads, registers, rest in _REPORT.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Resources(
            registers=int(registers),
            shared=int(shared[1]) if shared else 0,
            local=int(stack),
            spilled=int(stores) + int(loads),
        )
    return found


def architecture(capability: tuple[int, int]) -> str:
    """Name what to compile for on a GPU of this compute capability: the newest that NVRTC knows and the GPU runs.

    Raises
    ------
    ValueError
        If the GPU is too old for the kernels, or too new for this NVRTC.
    """
    from cuda.bindings import nvrtc

    major, minor = capability
    if capability < OLDEST_CAPABILITY:
        raise ValueError(
            f"its compute capability is {major}.{minor} and the kernels need 8.0 (Ampere) or newer"
        )
    known = _check(nvrtc.nvrtcGetSupportedArchs())
    fitting = [number for number in known if number // 10 == major and number % 10 <= minor]
    if not fitting:
        raise ValueError(
            f"its compute capability is {major}.{minor}, unknown to NVRTC {'.'.join(map(str, version()))}; "
            "install a newer nvidia-cuda-nvrtc"
        )
    return "sm_90a" if max(fitting) == 90 else f"sm_{max(fitting)}"


def version() -> tuple[int, int]:
    """Return NVRTC's version.

    Raises
    ------
    ImportError, RuntimeError
        If NVRTC or its Python binding is not installed.
    """
    from cuda.bindings import nvrtc

    result, major, minor = nvrtc.nvrtcVersion()
    _check((result,))
    return major, minor


@functools.cache
def sources() -> dict[str, bytes]:
    """Every kernel source by its file name: beside the package in a checkout, within it where it is installed."""
    package = Path(__file__).resolve().parents[2]
    folder = next(place for place in (package / "kernels", package.parent / "kernels") if place.is_dir())
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.cu*"))}


def _options(defines: tuple[str, ...], architecture: str) -> tuple[str, ...]:
    return f"--gpu-architecture={architecture}", "-std=c++17", *defines


def _compile(file: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    from cuda.bindings import nvrtc

    headers = {name: text for name, text in sources().items() if name.endswith(".cuh")}
    program = _check(
        nvrtc.nvrtcCreateProgram(
            sources()[file],
            file.encode(),
            len(headers),
            list(headers.values()),
            [name.encode() for name in headers],
        )
    )
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"kernels/{file} does not compile with {' '.join(options)}:\n{log.decode()}")
        code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code), log.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _check(answer: tuple[Any, ...]) -> Any:
    """The value of an NVRTC call's answer (status, value)."""
    if int(answer[0]) != 0:
        raise RuntimeError(f"NVRTC failed: {answer[0].name}")
    return answer[1] if len(answer) > 1 else None


def _entry(file: str, options: tuple[str, ...]) -> Path | None:
    """Where the result belongs in the cache, or None where this user has no place for one."""
    digest = hashlib.sha256(repr((file, options, version(), sources())).encode()).hexdigest()
    folder = os.environ.get("FASTUNET_CACHE")
    try:
        home = Path(
            os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        )
    except RuntimeError:  # a user without a home
        return None
    return (Path(folder) if folder else home / "fastunet") / f"{Path(file).stem}-{digest[:32]}.cubin"


def _read(entry: Path) -> bytes | None:
    """A cached result, or None where there is none or it is damaged."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    code = content[hashlib.sha256().digest_size :]
    return code if content == hashlib.sha256(code).digest() + code else None


def _write(entry: Path, code: bytes) -> None:
    """Keep a result; where the folder cannot be written, the next process compiles again."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=entry.parent, prefix=f".{entry.name}.", delete=False) as file:
            try:
                file.write(hashlib.sha256(code).digest() + code)
                file.close()
                os.replace(file.name, entry)
            except OSError:
                os.unlink(file.name)
    except OSError:
        pass
