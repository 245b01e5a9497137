"""What is imported when: the modules that ``import shmdomains`` and a command bring.

Modules are named and counted, no clock is read: what is imported once too often would be noticed on
a slow machine only.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import xml

import shmdomains
from shmdomains import DomainList, files
from shmdomains.lazy import LazyModule
from shmdomains.memory import holder

ROOT = Path(shmdomains.__file__).parents[1]
HEAVY = {
    *("lxml", "psutil", "filelock", "rich", "multiprocessing", "subprocess", "tempfile"),
    *("psycopg", "psycopg_binary", "socket", "textual", "libvirt", "qemu", "gunicorn"),
}
"""What only XML, config files, error messages, other locks and stores, and colours need."""

LIBRARY, PROGRAM = 112, 150
"""So many modules at most, Python's own among them: 82 and 122 with CPython 3.11."""

_AFTER = """
import sys
before = set(sys.modules)
try:
    exec(sys.argv.pop(1))
finally:
    print(*(sys.modules.keys() - before), sep="\\n", file=sys.stderr)
"""


def imported(code: str, *args: str) -> set[str]:
    """The modules that a fresh Python has after `code`, beyond those that it starts with."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _AFTER, code, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def heavy(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules} & HEAVY


def test_the_library_imports_what_every_worker_needs() -> None:
    modules = imported("import shmdomains")
    assert "shmdomains.memory._core.core" in modules
    assert heavy(modules) == set()
    assert not {module for module in modules if module.startswith("shmdomains.postgres")}
    assert "click" not in modules
    assert len(modules) <= LIBRARY, sorted(modules)


@pytest.mark.parametrize("command", [["list", "--all"], ["dominfo", "web1"], ["undefine", "web1"]])
def test_a_command_imports_what_it_needs(segment_dir: Path, command: list[str]) -> None:
    with DomainList.create(max_domains=10) as doms:
        doms.define(xml("web1"))
    modules = imported("from shmdomains.cli import main; main()", *command)
    assert "click" in modules
    assert heavy(modules) == set()
    assert len(modules) <= PROGRAM, sorted(modules)


def test_what_is_heavy_is_imported_when_it_is_needed() -> None:
    read = "import shmdomains; shmdomains.DomainDef.from_xml(sys.argv[1])"
    assert heavy(imported(read, xml("web1"))) == {"lxml"}


def test_a_lazy_module_is_the_module() -> None:
    lazy = LazyModule("lxml.etree")
    from lxml import etree

    assert lazy.Element is etree.Element
    with pytest.raises(AttributeError):
        _ = lazy.nothing_of_the_kind


def test_what_can_not_be_imported_now_is_an_oserror() -> None:
    with pytest.raises(OSError, match="no_such_module cannot be imported now: No module named"):
        _ = LazyModule("no_such_module").anything


def test_preload_imports_it_now() -> None:
    modules = imported("import shmdomains; shmdomains.preload()")
    assert heavy(modules) >= {"lxml", "psutil", "filelock"}


def test_without_a_descriptor_nothing_is_imported_and_nothing_happens() -> None:
    imported(
        """
import resource, shmdomains
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
with shmdomains.DomainList(max_domains=8) as doms:
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        doms.define(sys.argv[1])
    except OSError:
        pass
    else:
        raise AssertionError("lxml was there")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(doms) == 0
    doms.define(sys.argv[1])
    assert len(doms) == 1 and doms.check().problems == []
""",
        xml("web1"),
    )


def test_a_holder_is_not_known_where_psutil_can_not_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (files, holder):
        monkeypatch.setattr(module, "psutil", LazyModule("no_such_module"))
    assert holder.command_of(os.getpid()) is None
    assert holder.process_started(1) is None
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert files.flock_holder(os.fstat(file.fileno())) == "its holder is not known"


def test_a_handler_waits_for_an_import_of_its_thread(tmp_path: Path) -> None:
    """In the middle of it, it would find a module without half of its names."""
    (tmp_path / "signalled.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGALRM)\nvalue = 7\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code = """
import signal
from shmdomains.lazy import LazyModule
lazy, seen = LazyModule("signalled"), []
signal.signal(signal.SIGALRM, lambda *_: seen.append(lazy.value))
assert lazy.value == 7 and seen == [7]
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr


def test_a_fork_waits_for_an_import_of_another_thread(tmp_path: Path) -> None:
    """Forked in the middle of it, the child would wait for ever: it does not have that thread."""
    (tmp_path / "slow.py").write_text(
        "import builtins\nbuiltins.begun.set()\nbuiltins.forking.wait(20)\nvalue = 7\n"
    )
    code = """
import builtins, os, signal, threading
builtins.begun, builtins.forking = threading.Event(), threading.Event()
from shmdomains.lazy import LazyModule
os.register_at_fork(before=builtins.forking.set)  # the last one that is registered is called first
slow = LazyModule("slow")
thread = threading.Thread(target=lambda: slow.value)
thread.start()
builtins.begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(slow.value)
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
