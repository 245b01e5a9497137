"""The package's imports point one way: from what people run down to the vocabulary.

All are read: those inside functions and under TYPE_CHECKING, those of stubs, the imports and
cimports of Cython's files. Arrows planted in a made-up tree show what is noticed.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmdomains

PACKAGE = Path(__file__).resolve().parent.parent / "shmdomains"

RANKS = [
    # The vocabulary.
    [
        "errors",
        "states",
        "events",
        "job",
        "names",
        "holder",
        "packing",
        "text",
        "files",
        "deadline",
        "lazy",
        "table",
    ],
    ["xml"],
    ["config"],
    ["rules"],
    ["memory"],
    ["postgres"],
    ["transfer", "libvirts", "aio", "green", "opening"],
    ["metrics", "look"],
    ["shmdomains"],  # the public names
    ["stress", "drivers"],
    ["cli"],
    ["examples"],
    ["__main__"],
]
"""The lowest first: each may import those above it in this table, and its own line."""

_RANK = {place: rank for rank, places in enumerate(RANKS) for place in places}
_CYTHON_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+c?import[ \t]+(\([^)]*\)|[^\n#]+)"
    r"|c?import[ \t]+([\w., \t]+))",
    re.MULTILINE,
)


def sources(root: Path) -> dict[str, list[Path]]:
    """The files of each module; its name is without the package's, which itself is `shmdomains`."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.p*")):
        if path.suffix in (".py", ".pyi", ".pyx", ".pxd", ".pxi"):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.setdefault(name or "shmdomains", []).append(path)
    return found


def imports(path: Path, root: Path) -> Iterator[tuple[str, list[str]]]:
    """Whatever a file imports from: the dotted name, absolute, and the names that are taken."""
    package = ("shmdomains", *path.parent.relative_to(root).parts)

    def absolute(dots: int, name: str) -> str:
        start = package[: len(package) + 1 - dots] if dots else ()
        return ".".join([*start, *([name] if name else [])])

    if path.suffix in (".py", ".pyi"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                yield absolute(node.level, node.module or ""), [one.name for one in node.names]
            elif isinstance(node, ast.Import):
                yield from ((one.name, []) for one in node.names)
        return
    for module, names, plain in _CYTHON_IMPORT.findall(path.read_text()):
        if module:
            name = module.lstrip(".")
            taken = [one.split()[0] for one in names.strip("() \t").split(",") if one.split()]
            yield absolute(len(module) - len(name), name), taken
        else:
            yield from ((one.split()[0], []) for one in plain.split(",") if one.split())


def arrows(root: Path) -> dict[str, set[str]]:
    """Which modules of the package each of its modules imports."""
    modules = sources(root)
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, paths in modules.items():
        for path in paths:
            for origin, taken in imports(path, root):
                if origin != "shmdomains" and not origin.startswith("shmdomains."):
                    continue
                inside = origin.partition(".")[2]
                submodules = {f"{inside}.{one}".lstrip(".") for one in taken} & modules.keys()
                found[name] |= submodules
                if len(submodules) < len(taken) or not taken:
                    found[name].add(inside or "shmdomains")
        found[name].discard(name)
    return found


def rank_of(module: str) -> int | None:
    return _RANK.get(module.partition(".")[0])


def faults(graph: dict[str, set[str]]) -> list[str]:
    said = []
    for module, targets in graph.items():
        if rank_of(module) is None:
            said.append(f"{module} has no rank")
        for target in sorted(targets):
            own, other = rank_of(module), rank_of(target)
            if own is not None and other is not None and own < other:
                said.append(f"{module} imports {target}, which ranks higher")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        said.append(f"a circle: {', '.join(sorted(set(error.args[1])))}")
    return said


def test_imports_point_one_way() -> None:
    graph = arrows(PACKAGE)
    assert {"errors", "xml.definition", "memory._core.core", "cli.commands"} <= graph.keys()
    assert faults(graph) == []


TREE = {
    "__init__.py": "from .transfer import DomainList\nfrom .errors import LockTimeout\n",
    "errors.py": "if TYPE_CHECKING:\n    from .holder import Holder\n",
    "holder.py": "import os\n",
    "xml/__init__.py": "",
    "xml/definition.py": "from ..errors import LockTimeout\nfrom .. import holder\n",
    "config/__init__.py": "from .load import load_all\n",
    "config/load.py": "from ..xml import definition\nfrom ..xml.definition import DomainDef\n",
    "memory/__init__.py": "",
    "memory/core.pyx": "from shmdomains import errors\nfrom libc.errno cimport errno\n",
    "memory/core.pyi": "from ..holder import Holder\n",
    "memory/find.pxi": "from ..errors cimport (\n    LockTimeout,\n)\n",
    "transfer.py": "from . import config\nfrom .memory import core\n",
    "cli.py": "def main():\n    from . import __version__\n    import shmdomains.transfer\n",
}


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("xml/definition.py", "from ..config import load_all", "xml.definition imports config,"),
        ("xml/definition.py", "from .. import config", "xml.definition imports config,"),
        ("xml/definition.py", "from ..config import load", "xml.definition imports config.load,"),
        ("xml/definition.py", "import shmdomains.config.load as l", "imports config.load,"),
        ("xml/__init__.py", "from ..transfer import DomainList", "xml imports transfer,"),
        ("config/load.py", "def f():\n    from ..memory import core", "imports memory.core,"),
        ("holder.py", "if TYPE_CHECKING:\n    from .xml import definition", "holder imports xml.d"),
        ("memory/core.pyx", "from shmdomains.cli cimport main", "memory.core imports cli,"),
        ("memory/core.pyx", "import os, shmdomains.cli", "memory.core imports cli,"),
        ("memory/core.pyx", "def f():\n    from .. import transfer", "imports transfer,"),
        ("memory/core.pyi", "from ..cli import main", "memory.core imports cli,"),
        ("memory/find.pxi", "from ..cli import (errors,\n  main)", "memory.find imports cli,"),
        ("memory/core.pxd", "cimport shmdomains.cli", "memory.core imports cli,"),
        ("transfer.py", "from . import DomainList", "transfer imports shmdomains,"),
        ("holder.py", "def f():\n    from . import errors", "a circle: errors, holder"),
        ("config/load.py", "from . import load_all", "a circle: config, config.load"),
        ("utils.py", "", "utils has no rank"),
    ],
)
def test_a_planted_arrow_is_noticed(tmp_path: Path, file: str, text: str, fault: str) -> None:
    for name, content in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert faults(arrows(tmp_path)) == []
    with open(tmp_path / file, "a") as grown:
        grown.write(text + "\n")
    said = faults(arrows(tmp_path))
    assert any(fault in one for one in said), said


def test_drivers_are_an_example_to_copy() -> None:
    """But for `qemu`, they import the public names of the package and each other."""
    for file in sorted((PACKAGE / "drivers").glob("*.py")):
        for one in ast.walk(ast.parse(file.read_text())):
            if isinstance(one, ast.ImportFrom) and (one.level > 1 or one.module == "shmdomains"):
                names = [alias.name for alias in one.names]
                public = set(shmdomains.__all__)
                assert (one.level, one.module) == (2, None), f"{file.name}: {ast.unparse(one)}"
                assert public.issuperset(names), f"{file.name}: {set(names) - public}"
