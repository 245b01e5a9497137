"""Whether a wheel works where nothing can be compiled: ``check_wheel.py WHEEL SAMPLES``.

The wheel is installed into a fresh environment, with a PATH on which no compiler is found and with
source distributions refused for what it depends on. Then it is used from an empty folder, out of
sight of the source tree: imported, asked for help, and put through a second of the main job.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang", "c99", "c++", "g++")


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = [name for name in names if name.endswith((".c", ".h", ".pyx", ".pxd", ".pxi"))]
    if sources:
        sys.exit(f"{wheel.name} carries sources: {' '.join(sources)}")
    for wanted in (
        "shmdomains/py.typed",
        "shmdomains/memory/_core/core.pyi",
        "shmdomains/metrics/alerts.yml",
        "shmdomains/metrics/dashboard.json",
    ):
        if wanted not in names:
            sys.exit(f"{wheel.name} lacks {wanted}")
    if not any(fnmatch(name, "shmdomains/memory/_core/core.*.so") for name in names):
        sys.exit(f"{wheel.name} lacks the core")


def check_use(wheel: Path, samples: Path, room: Path) -> None:
    scripts = room / "venv" / "bin"
    python = scripts / "python"
    path = str(scripts)
    if any(shutil.which(compiler, path=path) for compiler in COMPILERS):
        sys.exit(f"there is a compiler in {path}: this check would prove nothing")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": path, "PYTHONNOUSERSITE": "1"}

    def run(*command: str | Path) -> None:
        print("+", *(Path(command[0]).name, *command[1:]), flush=True)
        subprocess.run(command, check=True, cwd=room, env=environment, stdin=subprocess.DEVNULL)

    subprocess.run([sys.executable, "-m", "venv", room / "venv"], check=True)
    quiet = ("--quiet", "--disable-pip-version-check")
    run(python, "-m", "pip", "install", *quiet, "--only-binary", ":all:", wheel)
    run(python, "-c", "import shmdomains; print(shmdomains.__file__)")
    run(scripts / "shmdomains", "--help")
    run(scripts / "shmdomains", "stress", samples, "--workers", "2", "--seconds", "1", "--kill")


def main() -> None:
    wheel, samples = (Path(argument).resolve() for argument in sys.argv[1:])
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as room:
        try:
            check_use(wheel, samples, Path(room))
        except subprocess.CalledProcessError as error:
            sys.exit(f"{wheel.name}: {Path(error.cmd[0]).name} ended with {error.returncode}")


if __name__ == "__main__":
    main()
