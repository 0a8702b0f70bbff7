"""After a run with --benchmark-only: a line for each measurement; fastunet's say how many times as fast it is."""

from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [bench for bench in getattr(session, "benchmarks", []) if bench.stats.rounds]
    groups: dict[str, list] = {}
    for bench in benchmarks:
        groups.setdefault(bench.group or bench.name, []).append(bench)
    if not groups:
        return
    terminalreporter.section("ms | GFLOP/s (direct-equivalent) or GB/s | % of peak | times as fast as others")
    for group, members in groups.items():
        for bench in members:
            median, told = bench.stats.median, bench.extra_info
            rates = [f"{told[unit]:9.1f} {unit:7}" for unit in ("GFLOP/s", "GB/s") if unit in told]
            share = f"{told['% of peak']:5.1f} %" if "% of peak" in told else ""
            others = [other for other in members if "fastunet" in bench.name and "fastunet" not in other.name]
            ratios = ", ".join(f"{other.stats.median / median:6.2f} x {_engine(other)}" for other in others)
            line = (
                f"{group:55} {_engine(bench):12} {median * 1e3:10.2f} {' '.join(rates):17} {share:7} {ratios}"
            )
            terminalreporter.write_line(line.rstrip())


def _engine(bench: Any) -> str:
    return (bench.params or {}).get("engine", bench.name)
