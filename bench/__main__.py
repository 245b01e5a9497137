"""``python -m bench quick | full | show FILE``: measure and print, or print what was measured.

`full` keeps its figures in results/full.json and draws the two plots beside it; `quick` does so in
build/bench, since a quick run is for whoever runs it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from . import plot, tables, targets
from .results import Results
from .run import FULL, QUICK, Runner

KEPT = Path(__file__).parent / "results"


def show(results: Results, console: Console) -> None:
    for table in tables.tables(results):
        console.print(table)
    console.print(targets.table(results))
    for name, why in results.skipped.items():
        console.print(f"skipped: {name}: {why}", highlight=False)
    for failure in results.failed:
        console.print(f"failed: {failure}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("what", choices=("quick", "full", "show"))
    parser.add_argument("file", nargs="?", type=Path, help="show: figures of an earlier run")
    parser.add_argument("--into", type=Path, help="folder for figures and plots")
    arguments = parser.parse_args()
    console = Console(width=max(Console().width, 150))
    if arguments.what == "show":
        show(Results.load(arguments.file or KEPT / "full.json"), console)
        return 0
    full = arguments.what == "full"
    results = Runner(FULL if full else QUICK, console).run()
    into = arguments.into or (KEPT if full else Path("build") / "bench")
    into.mkdir(parents=True, exist_ok=True)
    results.save(into / f"{arguments.what}.json")
    show(results, console)
    for path in plot.draw(results, into):
        console.print(f"drawn: {path}", highlight=False)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
