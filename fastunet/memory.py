"""How much memory this process may still take, and how people write amounts of it."""

import os
import re
from pathlib import Path

UNLIMITED = 1 << 60
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_bytes(text: str | int) -> int:
    """Read an amount of memory: `2G`, `800M`, `1.5GiB` or plain bytes; K, M, G, T are powers of 1024.

    Raises
    ------
    ValueError
        If the text is no such amount, or 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", str(text).upper())
    amount = int(float(match[1]) * 2 ** _UNITS[match[2]]) if match else 0
    if amount < 1:
        raise ValueError(f"memory is {str(text)!r}; expected an amount such as 800M, 2G or a number of bytes")
    return amount


def format_bytes(amount: float) -> str:
    """Write an amount of memory for people: `1.4 GiB`, `382 MiB`, `12 KiB`."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if amount >= 2**power:
            value = amount / 2**power
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{amount / 1024:.0f} KiB"


def resident_bytes() -> int:
    """Bytes of memory this process takes, libraries included; 0 where there is no /proc."""
    pages = _text(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes this process can still take: the least of what machine, container and address-space limit leave.

    The machine's figure is MemAvailable of /proc/meminfo; a container's is its limit (cgroup v2 `memory.max`,
    v1 `memory.limit_in_bytes`, its own and every enclosing group's) less what it uses, where file cache that
    the kernel would drop does not count as used. Where there is no /proc, half of the physical memory.

    Parameters
    ----------
    root : where /proc and /sys are looked for
    """
    machine = _numbers(root / "proc/meminfo").get("MemAvailable:")
    if machine is None:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, OSError, ValueError):
            return 4 << 30
    return max(0, min(machine * 1024, _container_bytes(root), _address_space_bytes(root)))


def _container_bytes(root: Path) -> int:
    mount = root / "sys/fs/cgroup"
    free = UNLIMITED
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, group = line.split(":", 2)[1:]
        if controllers == "":
            base, limit_name, usage_name, cache_name = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit_name, usage_name = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_name = "total_inactive_file"
        else:
            continue
        # Inside a container the group's own path may not be mounted; its limits then lie at the mount itself.
        path = Path(group.lstrip("/"))
        for folder in {base / path, *(base / parent for parent in path.parents), base}:
            limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
            if limit.isdigit() and usage.isdigit():
                cache = _numbers(folder / "memory.stat").get(cache_name, 0)
                free = min(free, int(limit) - int(usage) + cache)
    return free


def _address_space_bytes(root: Path) -> int:
    soft = re.search(r"Max address space +(\d+)", _text(root / "proc/self/limits"))
    pages = _text(root / "proc/self/statm").split()
    return int(soft[1]) - int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if soft and pages else UNLIMITED


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _numbers(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
