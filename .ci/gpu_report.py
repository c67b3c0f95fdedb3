"""Tables and a figure of what `.ci/gpu` measured.

gpu_report.py show FILE           prints tables of JSON lines and, as the last line, the gist
gpu_report.py draw PNG FILE...    draws the speed-up of every row
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Data = dict[str, Any]


def read(path: Path) -> list[Data]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def show(path: Path) -> int:
    """Prints what was measured; returns 1 if nothing was, or a row failed."""
    found = read(path) if path.exists() else []
    if not found:
        print("nothing was measured")
        return 1
    gists = [show_rows(data) if "preset" in data else show_operators(data) for data in found]
    print("; ".join(gists))
    return int(any(data.get("failed") for data in found))


def show_rows(data: Data) -> str:
    print(f"{data['preset']}, batch {data['batch']}, {data['dtype']}, {data['device']}")
    print(f"  {'':24} {'ms':>9} {'all ms':>9} {'x dense':>8} {'limit':>6} {'of it':>6} {'MiB':>8}")
    for row in data["rows"]:
        times = f"{row['ms']:9.1f} {row['total_ms']:9.1f} {text(row['speedup']):>8}"
        rest = f"{row['limit']:6.2f} {text(row['limit_fraction']):>6} {row['peak_mib']:8.0f}"
        doubt = f" unusable: {row['reason']}" if row["unusable"] else ""
        print(f"  {row['name']:24} {times} {rest}{doubt}")
    for name, error in data["failed"].items():
        print(f"  {name:24} failed: {error.splitlines()[0][:200]}")
    if data["left_out"]:
        print(f"  no time for {', '.join(data['left_out'])}")
    fastest = min(data["rows"], key=lambda row: row["total_ms"])
    dense = next((row for row in data["rows"] if row["name"] == "dense-eager"), None)
    over_eager = f", {dense['total_ms'] / fastest['total_ms']:.2f}x dense-eager" if dense else ""
    compared = f"{text(fastest['speedup'])}x of {fastest['limit']:.2f}x"
    return f"{data['preset']} b{data['batch']}: {fastest['name']} {compared}{over_eager}"


def show_operators(data: Data) -> str:
    copy = data["copy_gb_per_s"]
    branches = ", ".join(f"{name} {us:.0f} us" for name, us in data["branches_us"].items())
    print(f"{data['rows']} x {data['tokens']} x {data['width']}, {data['kept']} kept")
    print(f"  copy {copy:.0f} GB/s; dense {branches}")
    for form, times in data["us"].items():
        for name, us in times.items():
            rate = data["gb_per_s"][form][name]
            print(f"  {form:9} {name:9} {us:8.1f} us {rate:7.0f} GB/s {rate / copy:5.0%}")
    shares = [f"{share:.1%} {form}" for form, share in data["share"].items() if share is not None]
    return f"PTS+take+CTR of a branch, {data['rows']}x{data['tokens']}: {', '.join(shares)}"


def text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw(target: Path, sources: Sequence[Path]) -> None:
    from matplotlib.figure import Figure  # slow to import

    found = [data for path in sources if path.exists() for data in read(path)]
    bars = [
        (f"{data['preset']} b{data['batch']} {row['name']}", row["speedup"], row["limit"])
        for data in found
        for row in data["rows"]
        if row["speedup"] is not None and row["limit"] > 1
    ]
    if not bars:
        return
    names, speedups, limits = zip(*reversed(bars), strict=True)
    figure = Figure(figsize=(10, 1.5 + 0.25 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, speedups, color="#4c72b0", label="measured")
    axes.scatter(limits, names, 200, color="k", marker="|", label="limit: dense FLOPs / its FLOPs")
    axes.set_xlabel("speed-up over the dense row of the same kind")
    axes.legend(loc="lower right")
    figure.savefig(target)


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    first, *others = map(Path, paths)
    if verb == "show":
        sys.exit(show(first))
    draw(first, others)
