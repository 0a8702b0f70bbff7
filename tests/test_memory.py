"""Amounts of memory, and what machine and container leave, read from made-up /proc and /sys trees."""

import pytest

from fastunet.memory import available_bytes, format_bytes, parse_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("2G", 2 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("800m", 800 << 20),
        ("12KB", 12288),
        ("4096", 4096),
        (7, 7),
    ],
)
def test_amounts(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "G", "2X", "-1G", "0", "1e9", "2 G B"])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match="800M"):
        parse_bytes(text)


def test_amounts_for_people():
    assert [format_bytes(n) for n in (2048, 382 << 20, 1.44 * GIB, 23 * GIB)] == [
        "2 KiB",
        "382 MiB",
        "1.4 GiB",
        "23 GiB",
    ]


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:  {8 * GIB // 1024} kB\n"}


def test_a_machine_without_limits(tmp_path):
    assert available_bytes(write(tmp_path, MACHINE)) == 8 * GIB


def test_this_machine_has_memory():
    assert available_bytes() > 1 << 20


@pytest.mark.parametrize("limited", ["a/b", "a", ""])
def test_cgroup_2_limits_of_every_enclosing_group_count(tmp_path, limited):
    files = {
        **MACHINE,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "100\n",
        f"sys/fs/cgroup/{limited}/memory.max": f"{3 * GIB}\n",
        f"sys/fs/cgroup/{limited}/memory.current": f"{2 * GIB}\n",
        f"sys/fs/cgroup/{limited}/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
    }
    assert available_bytes(write(tmp_path, files)) == 3 * GIB // 2


def test_cgroup_1(tmp_path):
    files = {
        **MACHINE,
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 4096\n",
    }
    assert available_bytes(write(tmp_path, files)) == GIB + 4096


def test_a_limit_of_the_address_space(tmp_path):
    files = {
        **MACHINE,
        "proc/self/limits": f"Limit  Soft  Hard\nMax address space  {5 * GIB}  unlimited  bytes\n",
        "proc/self/statm": "0 0 0 0 0 0 0\n",
    }
    assert available_bytes(write(tmp_path, files)) == 5 * GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path):
    files = {
        **MACHINE,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "100\n",
        "sys/fs/cgroup/memory.current": "200\n",
    }
    assert available_bytes(write(tmp_path, files)) == 0
