"""Two plots of a run, as SVG: time per operation by contestant, and how that scales.

``python -m bench.plot FILE [FOLDER]``. Readable on light and on dark pages: nothing is drawn
behind the plot, lines and text have tones in the middle. The same figures make the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .contestants import ALL
from .results import Results

TEXT = "#7d8590"
OURS, LIMIT = "#e5534b", "#8b949e"
COLOURS = (OURS, "#f0883e", *("#b0872c", "#57a05a", "#3f8fd2", "#2fa3a3", "#9a75d6", "#c76bb0"))
MARKS = ("o", "o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "shmdomains",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": TEXT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
LIMITS = (
    ("lock", "lock + unlock in C"),
    ("statements", "the statements alone"),
    ("memcpy", "copy of 2 KB in C"),
)
OPERATIONS = (
    ("read_state", "find by UUID, read state"),
    ("by_id", "find by id"),
    ("miss", "find what is not there"),
    ("change_state", "change the state"),
    ("read_definition", "definition, seen before"),
    ("read_changed", "definition, changed since"),
    ("replace", "replace the definition"),
    ("read_data", "the driver's data, read"),
    ("change_data", "the driver's data, changed"),
    ("increment", "a number in it, one more"),
    ("define", "define"),
    ("remove", "remove"),
)


def _look(name: str) -> dict[str, Any]:
    at = [contestant.name for contestant in ALL].index(name)
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKS[at % len(MARKS)]}


def _operations(results: Results, plt: Any) -> Any:
    sizes = {figure.domains for figure in results.figures if figure.work == "read_state"}
    domains = min(sizes)
    figure, axes = plt.subplots(figsize=(9, 7))
    for contestant in ALL:
        points = [
            (seconds * 1e6, row)
            for row, (work, _) in enumerate(OPERATIONS)
            if (seconds := results.get(work, contestant.name, domains)) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            size = 70 if contestant is ALL[0] else 34
            axes.scatter(x, y, s=size, label=contestant.name, zorder=3, **_look(contestant.name))
    for work, title in LIMITS:
        found = [one.median for one in results.figures if one.work == work]
        if found:
            axes.axvline(found[0] * 1e6, color=LIMIT, linestyle="--", linewidth=1)
            axes.annotate(title, (found[0] * 1e6, -0.9), color=TEXT, fontsize=8, rotation=20)
    axes.set_xscale("log")
    axes.set_yticks(range(len(OPERATIONS)), [title for _, title in OPERATIONS])
    axes.set_ylim(len(OPERATIONS) - 0.4, -1.6)
    axes.set_xlabel(f"µs per operation, {domains:,} domains (less is better)")
    axes.grid(True, axis="x")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def _by_domains(results: Results, axes: Any) -> None:
    for contestant in ALL:
        points = sorted(
            (one.domains, one.median * 1e6)
            for one in results.figures
            if (one.work, one.contestant) == ("read_state", contestant.name)
        )
        if points:
            axes.plot(*zip(*points, strict=True), label=contestant.name, **_look(contestant.name))
    for (work, title), style in zip(LIMITS[:2], ("--", ":"), strict=True):
        found = [one.median * 1e6 for one in results.figures if one.work == work]
        if found:
            axes.axhline(found[0], color=LIMIT, linestyle=style, linewidth=1, label=title)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("domains")
    axes.set_ylabel("µs to find by UUID, locked, and read the state")


def _by_workers(results: Results, axes: Any) -> None:
    for contestant in ALL:
        for work, style in (("count random", "-"), ("count one", ":")):
            points = sorted(
                (one.workers, one.median)
                for one in results.figures
                if (one.work, one.contestant) == (work, contestant.name)
            )
            if points:
                axes.plot(*zip(*points, strict=True), linestyle=style, **_look(contestant.name))
    axes.set_yscale("log")
    axes.set_xticks(sorted({one.workers for one in results.figures}))
    axes.set_xlabel("worker processes (dotted: all on one domain)")
    axes.set_ylabel("changes a second, all together")


def _scaling(results: Results, plt: Any) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    _by_domains(results, left)
    _by_workers(results, right)
    for axes in (left, right):
        axes.grid(True, which="major")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9)
    figure.subplots_adjust(bottom=0.27, wspace=0.28)
    return figure


def draw(results: Results, folder: Path) -> list[Path]:
    """Where they were drawn; nowhere if matplotlib is not installed, and then it says so."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed: pip install '.[bench]'")
        return []
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    drawn = []
    with plt.rc_context(STYLE):
        for name, make in (("operations", _operations), ("scaling", _scaling)):
            figure = make(results, plt)
            path = folder / f"{name}.svg"
            metadata = {"Date": None, "Creator": None}
            figure.savefig(path, transparent=True, bbox_inches="tight", metadata=metadata)
            plt.close(figure)
            drawn.append(path)
    return drawn


if __name__ == "__main__":
    file = Path(sys.argv[1])
    draw(Results.load(file), Path(sys.argv[2]) if len(sys.argv) > 2 else file.parent)
