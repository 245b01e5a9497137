"""The command ``nodeinfo``: what this host has for its domains."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import click

from .tables import print_lines

_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")


@click.command()
def nodeinfo() -> None:
    """Show this host's CPUs and memory."""
    print_lines(f"{label + ':':<20} {value}" for label, value in _pairs())


def _pairs() -> Iterator[tuple[str, str]]:
    threads = [path for path in _CPUS.glob("cpu[0-9]*") if _is_online(path)]
    cores = {(_number(path, "physical_package_id"), _number(path, "core_id")) for path in threads}
    sockets = len({socket for socket, _ in cores}) or 1
    cells = len(list(_NODES.glob("node[0-9]*"))) or 1
    yield "CPU model", os.uname().machine
    yield "CPU(s)", str(len(threads) or os.cpu_count() or 1)
    yield "CPU frequency", f"{_megahertz()} MHz"
    # Sockets are counted per cell where they can be, as libvirt does.
    yield "CPU socket(s)", str(max(sockets // cells, 1))
    yield "Core(s) per socket", str(max(len(cores) // sockets, 1))
    yield "Thread(s) per core", str(max(len(threads) // max(len(cores), 1), 1))
    yield "NUMA cell(s)", str(cells)
    yield "Memory size", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 10} KiB"


def _is_online(cpu: Path) -> bool:
    # The first one often cannot be switched off, and has no such file.
    return _text(cpu / "online").strip() != "0"


def _number(cpu: Path, what: str) -> int:
    text = _text(cpu / "topology" / what).strip()
    return int(text) if re.fullmatch("-?[0-9]+", text) else 0


def _megahertz() -> int:
    match = re.search(r"^cpu MHz\s*:\s*([0-9]+)", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return int(match[1]) if match else 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
