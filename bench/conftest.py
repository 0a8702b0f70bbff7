"""After a run with --benchmark-only: one line a measurement, with its rate and its ratio to fastunet's."""

import statistics

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [bench for bench in getattr(session, "benchmarks", []) if bench.stats.rounds]
    groups: dict[str, list] = {}
    for bench in benchmarks:
        groups.setdefault(bench.group or bench.name, []).append(bench)
    if not groups:
        return
    terminalreporter.section("ms | GFLOP/s (direct-equivalent) or GB/s | x fastunet")
    for group, members in groups.items():
        ours = [bench.stats.median for bench in members if "fastunet" in bench.name]
        for bench in members:
            rates = [
                f"{value} {name}" for name, value in bench.extra_info.items() if name in ("GFLOP/s", "GB/s")
            ]
            ratio = f"{bench.stats.median / statistics.median(ours):6.2f}" if ours else ""
            name = (bench.params or {}).get("engine", bench.name)
            milliseconds = f"{bench.stats.median * 1e3:10.2f}"
            terminalreporter.write_line(f"{group:55} {name:12} {milliseconds} {' '.join(rates):>16} {ratio}")
