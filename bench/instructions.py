"""Instructions of the hot paths, counted by callgrind: what a regression guard can compare, since a
clock says something else on every machine and at every moment.

``python -m bench.instructions`` prints the counts beside the recorded ones; ``--record`` records
them (`make instructions`); ``--flat`` compares the counts of 1,000, 100,000 and 1,000,000 domains;
``--profile PATH`` prints where the instructions of one path go.

Counts belong to an architecture, a compiler (with CFLAGS, if any are set) and a Python: under
another key nothing is known, and nothing is claimed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parent / "shmdomains" / "memory" / "_core"
RECORDED = HERE / "instructions.json"
WITHIN = 0.15
SHORT, LONG = 50, 250  # as in counted.py and counted.c
MISSES = 32  # as in counted.c
LISTED = 1_000  # domains in the list whose rows are counted
# An index doubles, so its fill, and with it the length of a probe, hangs on the number of domains;
# these have equally full ones.
FLAT = (LISTED, 128 * LISTED, 1024 * LISTED)

Counts = dict[str, float]


def compiler() -> str:
    return os.environ.get("CC", "cc")


def missing() -> str | None:
    """Why nothing can be counted here, in one line."""
    if os.environ.get("SHMDOMAINS_SANITIZED") == "1":
        return "valgrind does not run what sanitizers watch"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed: apt install valgrind"
    if shutil.which(compiler()) is None:
        return "there is no C compiler: apt install gcc"
    text = "#include <valgrind/callgrind.h>\n"
    command = [compiler(), "-E", "-o", os.devnull, "-x", "c", "-"]
    if subprocess.run(command, input=text, text=True, capture_output=True).returncode:
        return "valgrind's header is not installed: apt install valgrind"
    return None


def key() -> str:
    """Architecture, compiler, Python."""
    says = subprocess.run(
        [compiler(), "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True
    ).stdout
    clang = re.search(r'__clang_version__ "([^" ]+)', says)
    gcc = re.search(r'__VERSION__ "([^" ]+)', says)
    made = f"clang {clang[1]}" if clang else f"gcc {gcc[1]}" if gcc else compiler()
    flags = os.environ.get("CFLAGS", "").strip()
    python = f"Python {platform.python_version()}"
    return ", ".join([platform.machine(), f"{made} {flags}".strip(), python])


class Counter:
    """The programs that are counted, built once."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shmdomains-bench-")
        self._mark = f"{self._folder.name}/mark.so"
        self._driver = f"{self._folder.name}/counted"
        self._run([compiler(), "-shared", "-fPIC", "-O2", "-o", self._mark, str(HERE / "mark.c")])
        sources = [str(path) for path in sorted(CORE.glob("*.c")) if path.name != "core.c"]
        options = ["-std=c11", "-O2", "-fvisibility=hidden", "-pthread", f"-I{CORE}"]
        command = [compiler(), *options, "-o", self._driver, str(HERE / "counted.c"), *sources]
        self._run(command)

    @staticmethod
    def _run(command: list[str]) -> None:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            timeout=1800,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr or done.stdout}")

    def _callgrind(self, out: str, program: list[str]) -> None:
        options = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        self._run(["valgrind", *options, *program])

    def _counted(self, name: str, program: list[str]) -> dict[str, Path]:
        """The dumps of a run, by what they were of."""
        out = f"{self._folder.name}/{name}"
        self._callgrind(out, program)
        dumps = {}
        for path in Path(self._folder.name).glob(f"{name}.*"):
            told = re.search(r"^desc: Trigger: Client Request: (.*)$", path.read_text(), re.M)
            if told:
                dumps[told[1]] = path
        return dumps

    def python(self, domains: int, listed: bool = True) -> dict[str, Path]:
        arguments = [str(HERE / "counted.py"), self._mark, str(domains), str(int(listed))]
        return self._counted(f"python{domains}", [sys.executable, *arguments])

    def core(self, domains: int) -> dict[str, Path]:
        return self._counted(f"core{domains}", [self._driver, str(domains)])

    def close(self) -> None:
        self._folder.cleanup()


def _total(path: Path) -> int:
    totals = re.search(r"^totals: (\d+)", path.read_text(), re.M)
    if totals is None:
        raise RuntimeError(f"no totals in {path}")
    return int(totals[1])


def per_operation(dumps: dict[str, Path]) -> Counts:
    """Instructions of one operation, from loops of two lengths."""
    names = [told.rpartition(" ")[0] for told in dumps if told.endswith(f" {SHORT}")]
    counts = {}
    for name in sorted(names):
        more = _total(dumps[f"{name} {LONG}"]) - _total(dumps[f"{name} {SHORT}"])
        operations = (LONG - SHORT) / (SHORT if name == "rows" else 1)
        operations *= MISSES if name == "core_miss" else 1
        counts[name] = round(more / operations, 1)
    return counts


def count(counter: Counter, domains: int = LISTED) -> Counts:
    return {
        **per_operation(counter.python(domains)),
        **per_operation(counter.core(domains)),
    }


def recorded(path: Path = RECORDED) -> dict[str, Counts]:
    known: dict[str, Counts] = json.loads(path.read_text()) if path.exists() else {}
    return known


def differences(counts: Counts, known: Counts) -> list[str]:
    """What is more than `WITHIN` away from what was recorded; less is news, too."""
    said = []
    for name in sorted({*counts, *known}):
        now, before = counts.get(name), known.get(name)
        if now is None or before is None:
            said.append(f"{name}: {now} instructions now, {before} recorded")
        elif abs(now / before - 1) > WITHIN:
            said.append(f"{name}: {now:.0f} instructions now, {before:.0f} recorded")
    return said


def flatness(counter: Counter, sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """The counts of every size; by name."""
    every = []
    for domains in sizes:
        counts = per_operation(counter.core(domains))
        if domains <= FLAT[1]:  # a million would take Python under valgrind minutes to make
            counts.update(per_operation(counter.python(domains, listed=False)))
        every.append(counts)
    return {name: [counts[name] for counts in every if name in counts] for name in every[0]}


def profile(counter: Counter, name: str) -> str:
    """Where the instructions of one path go, by function, an operation's worth."""
    dumps = {**counter.python(LISTED), **counter.core(LISTED)}
    annotated = subprocess.run(
        ["callgrind_annotate", "--auto=no", "--threshold=97", str(dumps[f"{name} {LONG}"])],
        capture_output=True,
        text=True,
    ).stdout
    lines = []
    for line in annotated.splitlines():
        found = re.match(r"\s*([\d,]+) \(\s*([\d.]+%)\)\s+(?:.*/)?(\S+:\S+)", line)
        if found:
            each = int(found[1].replace(",", "")) / (LONG / (SHORT if name == "rows" else 1))
            lines.append(f"{each:12.1f}  {found[2]:>7}  {found[3]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.instructions", description=__doc__)
    parser.add_argument("--record", action="store_true", help="these are the right ones from now")
    parser.add_argument("--flat", action="store_true", help="compare numbers of domains")
    parser.add_argument("--profile", metavar="PATH", help="where the instructions of it go")
    arguments = parser.parse_args()
    why = missing()
    if why is not None:
        print(why)
        return 1
    counter = Counter()
    try:
        if arguments.profile:
            print(profile(counter, arguments.profile))
            return 0
        if arguments.flat:
            for name, flat in flatness(counter, FLAT).items():
                print(f"{name:<14}", *(f"{counted:>10,.0f}" for counted in flat))
            return 0
        counts, known, ours = count(counter), recorded(), key()
        for name, now in counts.items():
            print(f"{name:<14} {now:>12,.0f} {known.get(ours, {}).get(name, float('nan')):>12,.0f}")
        if arguments.record:
            known[ours] = counts
            RECORDED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return 0
    finally:
        counter.close()


if __name__ == "__main__":
    sys.exit(main())
