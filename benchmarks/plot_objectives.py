"""docs/objectives.png from the last result line of each comparison that benchmarks/objectives.py recorded.

    python benchmarks/plot_objectives.py [--out docs/objectives.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import record

COMPARISONS = {"equal samples": "o", "equal operations, 1 of the budget": "s", "equal operations, 0.5 of the budget": "^"}


def difference(cell: dict[str, Any]) -> tuple[float, float, float] | None:
    """(points, low, high) of a cell of a result line's table; None for what everything stands beside."""
    points = next((value for key, value in cell.items() if key.startswith("minus_")), None)
    return None if points is None else (points, *cell["interval"])


def draw(lines: dict[str, dict[str, Any]], out: Path) -> None:
    """lines: comparison -> result line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first = next(iter(lines.values()))
    tasks, arms = first["tasks"], [arm for arm, row in first["table"].items() if difference(next(iter(row.values()))) is not None]
    base = next(arm for arm in first["table"] if arm not in arms)
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.5 * len(tasks) + 1.5, 0.42 * len(arms) + 1.6), sharey=True, layout="constrained")
    for axis, task in zip(axes, tasks, strict=True):
        for shift, (name, line) in enumerate(lines.items()):
            for place, arm in enumerate(arms):
                if arm not in line["table"]:
                    continue
                points, low, high = difference(line["table"][arm][task])
                told_apart = line["table"][arm][task]["told_apart"]  # before the bounds were rounded
                height = len(arms) - place - 0.24 * (shift - (len(lines) - 1) / 2)
                axis.plot([low, high], [height] * 2, color=f"C{shift}", linewidth=1.3)
                axis.plot(points, height, COMPARISONS[name], color=f"C{shift}", markersize=5, markerfacecolor=f"C{shift}" if told_apart else "white")
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_title(f"{task}\n{base}: {first['table'][base][task]['accuracy']:g} %", fontsize=10)
        axis.set_yticks(range(1, len(arms) + 1), [_label(arm, first["table"][arm], tasks[0], base) for arm in reversed(arms)])
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.supxlabel(f"probe accuracy on test, points above {base} (or the arm named), 95 % interval over seeds and pictures; filled: 0 lies outside", fontsize=9)
    handles = [plt.Line2D([], [], color=f"C{i}", marker=COMPARISONS[name], label=name.replace(", 1 of the budget", "")) for i, name in enumerate(lines)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(lines), frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _label(arm: str, row: dict[str, Any], task: str, base: str) -> str:
    beside = next(key for key in row[task] if key.startswith("minus_")).removeprefix("minus_").replace("_", " ")
    return arm if beside == base else f"{arm}\n(beside {beside})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=record.RESULTS.parents[1] / "docs" / "objectives.png")
    arguments = parser.parse_args()
    found = {name: record.recorded("objectives", {"name": f"objectives, {name}", "split": "test"}) for name in COMPARISONS}
    lines = {name: line for name, line in found.items() if line is not None}
    if not lines:
        raise SystemExit(f"{record.RESULTS / 'objectives.jsonl'}: holds no comparison of test; benchmarks/objectives.py writes them")
    draw(lines, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
