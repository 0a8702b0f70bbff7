"""What peers.py measured as tables: on a terminal, each row judged by its aim, and for the README."""

import statistics
from typing import Any, NamedTuple

Results = dict[str, Any]
"""What peers.py writes as JSON: about the run, and "rows" of one engine each with the milliseconds of every round."""
Row = dict[str, Any]


class Pair(NamedTuple):
    """The slower is to take `least` times as long as the faster; `aim` would be better."""

    slower: str
    faster: str = "fastunet"
    least: float | None = None
    aim: float | None = None


TILE = 572
AIMS = {
    ("inference", 64): [
        Pair("PyTorch, channels_last", "fastunet", 3.6, 4.0),
        Pair("PyTorch, compiled and frozen", "fastunet", 3.2, 3.6),
        Pair("ONNX Runtime", "fastunet", 2.8, 3.2),
        Pair("OpenVINO", "fastunet", 2.8, 3.2),
        Pair("ncnn", "fastunet", 1.6, 1.8),
        Pair("OpenVINO, bfloat16", "fastunet", 1.35, 1.5),
        Pair("fastunet, one thread", "fastunet", 1.85),
        Pair("PyTorch, AVX2", "fastunet, AVX2", 2.8),
        Pair("PyTorch, channels_last", "fastunet, direct", 1.0),
    ],
    **{
        ("training step", base): [
            Pair(f"PyTorch, {way}", "fastunet", *bounds)
            for way in ("contiguous", "channels_last", "compiled")
        ]
        for base, bounds in ((16, (2.5, 3.0)), (32, (3.0, 4.0)), (64, (3.6, 4.2)))
    },
}
AIMS["training step", 64].append(Pair("PyTorch, bfloat16 autocast", "fastunet", 1.8, 2.1))
BESIDE = (Pair("PyTorch, AVX2", "fastunet, AVX2"), Pair("PyTorch, channels_last", "fastunet, direct"))
"""Compared in rows of their own."""
MEMORY = 320.0
"""MB of inference at base 64, at most."""
MEMORY_RATIO = 0.85, 0.65
"""Of a training step to PyTorch's in channels_last, at most, and the aim."""
LOGITS_ERROR, GRADIENTS_RATIO = 3e-6, 3.0
"""Accuracy at base 64, at most (peers_accuracy.py)."""


def heading(results: Results) -> str:
    return f"{results['machine']}; {_versions(results)}\n{results['date']}, {_conditions(results)}"


def _versions(results: Results) -> str:
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def _conditions(results: Results) -> str:
    return f"tile {results['tile']}, {results['threads']} thread{'s' if results['threads'] > 1 else ''}"


def sections(results: Results) -> list[tuple[str, int]]:
    """What was measured, at which base."""
    return list(dict.fromkeys((row["what"], row["base"]) for row in results["rows"]))


def section(results: Results, what: str, base: int) -> str:
    """Times, ratios and memory of one kind of pass at one size."""
    rows = [row for row in results["rows"] if (row["what"], row["base"]) == (what, base)]
    timed = {row["engine"]: row for row in rows if "ms" in row}
    aims = {pair[:2]: pair for pair in AIMS.get((what, base), []) if results["tile"] == TILE}
    rounds = max((len(row["ms"]) for row in timed.values()), default=0)
    cells = [
        (
            f"{what}, base {base}, {rounds} rounds",
            "ms",
            "x fastunet",
            "least to most",
            "at least",
            "aim",
            "",
            "MB",
        )
    ]
    for name, row in timed.items():
        compared = _compared(aims.get((name, "fastunet"), Pair(name)), timed)
        cells.append((name, f"{statistics.median(row['ms']):.1f}", *compared, _megabytes(row)))
    for pair in BESIDE:
        if pair.slower in timed and pair.faster in timed:
            compared = _compared(aims.get(pair[:2], pair), timed)
            cells.append((f"{pair.slower} / {pair.faster}", "", *compared, ""))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    lines += [f"{row['engine']}: left out, {row['left_out']}" for row in rows if "left_out" in row]
    return "\n".join(lines + _memory(timed, what, base, results["tile"]))


def _compared(pair: Pair, timed: dict[str, Row]) -> tuple[str, str, str, str, str]:
    """Ratio, its range, what is asked, and whether that is reached."""
    if pair.faster not in timed:
        return "", "", "", "", ""
    ratios = _ratios(timed[pair.slower], timed[pair.faster])
    ratio = statistics.median(ratios)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    least, aim = ("" if bound is None else f"{bound:g}" for bound in pair[2:])
    return f"{ratio:.2f}", spread, least, aim, _verdict(ratio, *pair[2:])


def _ratios(slower: Row, faster: Row) -> list[float]:
    """One of each round."""
    return [one / other for one, other in zip(slower["ms"], faster["ms"], strict=True)]


def _verdict(value: float, least: float | None, aim: float | None = None) -> str:
    if least is None:
        return ""
    if value < least:
        return "MISSED"
    return "reached" if aim is None or value < aim else "aim reached"


def _megabytes(row: Row) -> str:
    return "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"


def _memory(timed: dict[str, Row], what: str, base: int, tile: int) -> list[str]:
    """The verdict on fastunet's peak."""
    peaks = {name: row["peak_mb"] for name, row in timed.items() if row["peak_mb"]}
    ours, theirs = peaks.get("fastunet"), peaks.get("PyTorch, channels_last")
    if what == "inference" and (base, tile) == (64, TILE) and ours:
        return [f"peak memory {ours:.0f} MB, at most {MEMORY:.0f}: {_verdict(-ours, -MEMORY)}"]
    if what == "training step" and ours and theirs:
        least, aim = MEMORY_RATIO
        found = _verdict(-ours / theirs, -least, -aim)
        return [
            f"peak memory {ours / theirs:.2f} of PyTorch's in channels_last, at most {least}, aim {aim}: {found}"
        ]
    return []


def accuracy(results: Results) -> str:
    found = results.get("accuracy")
    if not found:
        return "accuracy: not measured"
    logits, gradients = found["logits"], found["gradients"]
    ratio = gradients["fastunet"] / gradients["PyTorch"]
    lines = [
        f"logits: rms error / standard deviation {logits['fastunet']:.1e}, PyTorch float32 {logits['PyTorch']:.1e}",
        f"gradients: median relative error {gradients['fastunet']:.1e}, {ratio:.2f} times PyTorch float32's",
    ]
    if (found["base"], results["tile"]) == (64, TILE):
        lines[0] += f"; at most {LOGITS_ERROR:.0e}: {_verdict(-logits['fastunet'], -LOGITS_ERROR)}"
        lines[1] += f"; at most {GRADIENTS_RATIO:g}: {_verdict(-ratio, -GRADIENTS_RATIO)}"
    return "\n".join([f"accuracy against float64, base {found['base']}", *lines])


def terminal(results: Results) -> str:
    parts = [section(results, *one) for one in sections(results)]
    return "\n\n".join([heading(results), *parts, accuracy(results)])


def readme(results: Results) -> str:
    """Markdown: a table of inference and one of training, a column of times for each base."""
    counts = [len(row["ms"]) for row in results["rows"] if "ms" in row]
    rounds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
    parts = [
        f"`python bench/peers.py` on {results['date'].partition(' ')[0]}: {_conditions(results)}, "
        f"{results['machine']}; {_versions(results)}. Engines take turns within one run, each in its best "
        f"configuration and a process of its own; medians of {rounds} rounds. In brackets the time beside fastunet's "
        "of the same round; memory is the peak beyond the interpreter's and the libraries' own."
    ]
    if left_out := {row["engine"]: row["left_out"] for row in results["rows"] if "left_out" in row}:
        parts.append(
            "Left out: " + "; ".join(f"{name} ({reason})" for name, reason in left_out.items()) + "."
        )
    for what in dict.fromkeys(what for what, _ in sections(results)):
        rows = {
            (row["engine"], row["base"]): row
            for row in results["rows"]
            if row["what"] == what and "ms" in row
        }
        bases = sorted({base for _, base in rows})
        lines = [
            f"| {what} | {' | '.join(f'base {base}' for base in bases)} | peak MB, base {bases[-1]} |",
            "|---" * (len(bases) + 2) + "|",
        ]
        for engine in dict.fromkeys(engine for engine, _ in rows):
            times = " | ".join(_cell(rows, engine, base) for base in bases)
            last = rows.get((engine, bases[-1]))
            lines.append(f"| {engine} | {times} | {_megabytes(last) if last else '-'} |")
        parts.append("\n".join(lines))
    if found := results.get("accuracy"):
        ratio = found["gradients"]["fastunet"] / found["gradients"]["PyTorch"]
        parts.append(
            f"Against float64 at base {found['base']}: logits are off by {found['logits']['fastunet']:.1e} of their "
            f"standard deviation (PyTorch's float32 {found['logits']['PyTorch']:.1e}), gradients, in the median, "
            f"{ratio:.1f} times as far as PyTorch's float32."
        )
    return "\n\n".join(parts)


def _cell(rows: dict[tuple[str, int], Row], engine: str, base: int) -> str:
    """`173 ms (2.1x)`."""
    row, ours = rows.get((engine, base)), rows.get(("fastunet", base))
    if row is None:
        return "-"
    milliseconds = statistics.median(row["ms"])
    told = f"{milliseconds:.{0 if milliseconds >= 100 else 1}f} ms"
    if ours is None or ours is row:
        return told
    return f"{told} ({statistics.median(_ratios(row, ours)):.1f}x)"
