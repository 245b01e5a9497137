"""What the tests share: definitions, stores of both lock kinds, a place for named segments, other
parties, and the promise that nothing is left behind.

A second store is tested by adding it to `helpers.STORES`.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import helpers
import killing
import other_user
import pg_servers
import psutil
import pytest
from helpers import STORES, Home, Party, Process, Store, problems, thread_party
from killing import Child, Nursery, Planted, driver
from shell import WEB1, invoke

from shmdomains import DomainDef, DomainList

SHARED = [Path("/dev/shm"), Path("/run/shmdomains")]
"""Where segments and semaphores lie; tmpfs, so what is left there is memory lost until reboot."""


@pytest.fixture(scope="session")
def xml() -> Callable[..., str]:
    """``xml(name, uuid=None, memory=…, title=…, extra=…)``: domain XML."""
    return helpers.xml


@pytest.fixture(scope="session")
def definition() -> Callable[..., DomainDef]:
    """``definition(name, uuid=None, …)``: the same, parsed."""
    return helpers.definition


@pytest.fixture(params=STORES, ids=lambda store: store.name)
def store(request: pytest.FixtureRequest) -> Store:
    """Each kind of store in turn."""
    return request.param


@pytest.fixture
def doms(store: Store, request: pytest.FixtureRequest) -> Iterator[DomainList]:
    """An empty list with room for 64 domains. After the test all its invariants must hold."""
    doms = store.make()
    yield doms
    if not doms.closed:
        assert problems(doms, request) == []
        doms.close()


@pytest.fixture
def other(doms: DomainList) -> Iterator[Party]:
    """Another thread of this process that knows `doms`."""
    with thread_party(doms=doms) as party:
        yield party


# --- PostgreSQL ---------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _server_of_lists(request: pytest.FixtureRequest) -> Iterator[None]:
    """The server of the store ``postgres``. Begun first if a test's name has that, since its
    parties must know it, too; else when a list is asked for."""
    with ExitStack() as stack:

        def begin() -> None:
            server = stack.enter_context(pg_servers.Server(max_connections="300"))
            os.environ["SHMDOMAINS_TEST_SERVER"] = server.url(by="socket")

        helpers.begin_server = begin
        if any("postgres" in getattr(item, "name", "") for item in request.session.items):
            begin()
        yield


# --- named segments ----------------------------------------------------------------------------


def _tmpfs_folder() -> str:
    return tempfile.mkdtemp(prefix=f"shmdomains-test-{os.getpid()}-", dir="/dev/shm")


@pytest.fixture
def segment_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder on tmpfs, of our own, where named segments go during the test."""
    folder = _tmpfs_folder()
    monkeypatch.setenv("SHMDOMAINS_DIR", folder)
    yield Path(folder)
    shutil.rmtree(folder)


# --- other processes ---------------------------------------------------------------------------


class _Kept:
    """A helper process for the whole session, replaced when a test left it stuck or dead."""

    def __init__(self, kind: type[Process], folder: str) -> None:
        self._kind, self._folder = kind, folder
        self._process: Any = None

    def get(self) -> Any:
        if self._process is None or not self._process.is_well:
            self.drop()
            self._process = self._kind(SHMDOMAINS_DIR=self._folder)
        return self._process

    def drop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def end(self) -> None:
        if self._process is not None:
            self._process.end()


@pytest.fixture(scope="session")
def _common_dir() -> Iterator[str]:
    folder = _tmpfs_folder()
    yield folder
    left = os.listdir(folder)
    shutil.rmtree(folder)
    assert left == []


@pytest.fixture(scope="session")
def _home_keeper(_common_dir: str) -> Iterator[_Kept]:
    kept = _Kept(Home, _common_dir)
    yield kept
    kept.end()


@pytest.fixture(scope="session")
def _stranger_keeper(_common_dir: str) -> Iterator[_Kept]:
    kept = _Kept(Process, _common_dir)
    yield kept
    kept.end()


@pytest.fixture
def home(_home_keeper: _Kept) -> Iterator[Home]:
    """A clean process to fork from. What it was told, and its children, go after the test."""
    home: Home = _home_keeper.get()
    try:
        yield home
        home.party.tell("forget")
        codes = home.party.tell("gc.collect(); reap()")
        assert [code for code in codes if code != 0] == []
    except BaseException:
        _home_keeper.drop()
        raise


@pytest.fixture
def stranger(_stranger_keeper: _Kept) -> Iterator[Party]:
    """A process that has nothing in common with the home but where named segments are."""
    process: Process = _stranger_keeper.get()
    try:
        yield process.party
        process.party.tell("forget")
        process.party.tell("gc.collect()")
    except BaseException:
        _stranger_keeper.drop()
        raise


_numbers = itertools.count()


@pytest.fixture
def segment_name() -> str:
    """A name that no other test uses."""
    return f"test-{os.getpid()}-{next(_numbers)}"


# --- nothing is left ---------------------------------------------------------------------------


def _entries() -> set[Path]:
    # Other test runs on this machine have folders of their own there.
    return {
        entry
        for place in SHARED
        if place.is_dir()
        for entry in place.iterdir()
        if not entry.name.startswith("shmdomains-test-") or f"-{os.getpid()}-" in entry.name
    }


def _is_a_strangers(entry: Path) -> bool:
    """Whether somebody who does not belong to this test run has it in use."""
    us = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in psutil.process_iter():
        if process.pid not in us:
            with suppress(OSError, psutil.Error):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                if str(entry) in maps:
                    return True
    return False


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def _gone(look: Callable[[], set[Any]], before: set[Any]) -> set[Any]:
    """What is there now and was not before; things on their way out get a few seconds."""
    end = time.monotonic() + 5
    while (left := look() - before) and time.monotonic() < end:
        time.sleep(0.02)
    return left


@pytest.fixture
def nothing_left(_home_keeper: _Kept, _stranger_keeper: _Kept) -> Iterator[None]:
    """Fails the test that leaves an entry in /dev/shm or a child process."""
    _home_keeper.get(), _stranger_keeper.get()
    entries, children = _entries(), _children()
    yield
    left = _gone(_children, children)
    replaced = {kept.get().process.pid for kept in (_home_keeper, _stranger_keeper)}
    assert {child for child in left if child.pid not in replaced} == set(), "children left"
    left = {entry for entry in _gone(_entries, entries) if not _is_a_strangers(entry)}
    assert left == set(), "left in shared memory"


# --- what the sanitizers leave out ---------------------------------------------------------------

_GREENLETS = "greenlet copies stacks as a whole, which ASan takes for an overflow"
_UNSANITIZED = {
    "test_crash_points.py": "it loads a build of the core of its own, which is not sanitized",
    "test_model.py": "no line of the core runs in it",
    "test_bench.py": "it runs other libraries, which are not ours to judge",
    "test_exhaustion.py::test_listing_without_memory": "their allocator has its space already",
    "test_exhaustion.py::test_a_document_without_memory": "their allocator has its space already",
    "test_storms.py::test_the_same_storms_hang": "it preloads a library, as they do",
    "test_green.py": _GREENLETS,
    "test_green_ends.py": _GREENLETS,
    "test_servers.py::test_many_requests_on_one_thread[gevent]": _GREENLETS,
    "test_servers.py::test_a_list_that_is_made_before_the_fork[gevent]": _GREENLETS,
    "test_green_faults.py": _GREENLETS,
}
"""Tests that tell nothing under ``make sanitize``, by the beginning of their name, and why."""


_SLICES = {
    "test_conformance.py": 5,
    "test_jobs.py": 6,
    "test_named_locks.py": 2,
    "test_state_machine.py": 4,
    "test_cli_postgres.py": 3,
    "test_pg_adversary.py": 2,
    "test_pg_embedded.py": 3,
    "test_pg_faults.py": 5,
    "test_pg_greens.py": 2,
    "test_pg_kills.py": 6,
    "test_pg_leases.py": 3,
    "test_pg_servers.py": 6,
    "test_pg_storms.py": 2,
    "test_pg_tasks.py": 3,
}
"""Of the tests on PostgreSQL in these files every n-th runs in ``make test``, by its name's sum, so
that they take three minutes; all of them run in ``make soak``."""


_left_to_soak: list[int] = []


def _is_on_postgres(item: pytest.Item) -> bool:
    return item.path.name.startswith(("test_pg_", "test_cli_postgres")) or "postgres" in item.name


def _is_left_to_soak(item: pytest.Item) -> bool:
    every = _SLICES.get(item.path.name, 1)
    return _is_on_postgres(item) and zlib.crc32(item.name.encode()) % every != 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if helpers.SOAK:
        for item in items:
            if _is_on_postgres(item):
                item.add_marker(pytest.mark.soak)
    elif len(items) > 1000:  # whoever names a file wants all of it
        left = [item for item in items if _is_left_to_soak(item)]
        _left_to_soak.append(len(left))
        items[:] = [item for item in items if not _is_left_to_soak(item)]
        config.hook.pytest_deselected(items=left)
    if os.environ.get("SHMDOMAINS_SANITIZED") != "1":
        return
    for item in items:
        if _is_on_postgres(item):
            item.add_marker(pytest.mark.skip(reason="under sanitizers: the server is not ours"))
        for name, reason in _UNSANITIZED.items():
            if item.nodeid.startswith(f"tests/{name}"):
                item.add_marker(pytest.mark.skip(reason=f"under sanitizers: {reason}"))


# --- what was tried ----------------------------------------------------------------------------

_tried: dict[str, int] = {}


@pytest.fixture
def tried() -> Callable[[str, int], None]:
    """``tried(what, times)``: adds to the figures that stand at the end of a run."""

    def add(what: str, times: int) -> None:
        _tried[what] = _tried.get(what, 0) + times

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for count in _left_to_soak:
        terminalreporter.line(f"{count:,} more of the tests on PostgreSQL run in `make soak`")
    if _tried:
        terminalreporter.section("what was tried")
        for what, times in _tried.items():
            terminalreporter.line(f"{times:>12,}  {what}")


# --- signals -----------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    # A shell has Ctrl-C ignored by what it starts with `&`, and by all that this starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Processes that are killed do not clean up: what they compile has one place for the session.
    built = tempfile.mkdtemp(prefix=f"shmdomains-test-{os.getpid()}-")
    os.environ[killing.BUILT] = built
    config.add_cleanup(lambda: shutil.rmtree(built, ignore_errors=True))


# --- collections -------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Collections that a test asks for look at what its module made. At all that pytest keeps each
    took a tenth of a second, and a run asks for more than a thousand of them."""
    gc.collect()
    gc.freeze()


# --- victims and damage: killing.py ------------------------------------------------------------


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """A clean process that forks the children of a module's tests."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def start(nursery: Nursery) -> Iterator[Callable[..., Child]]:
    """``start(function, *arguments)``: a child, gone after the test."""
    yield nursery.start
    nursery.clear()


@pytest.fixture
def as_user(nursery: Nursery, segment_dir: Path) -> Iterator[Callable[..., Party]]:
    """``as_user(user, *groups, umask=0o022, NAME=value…)``: a process of another user, who may walk
    into the folder of the segments."""
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    segment_dir.chmod(0o755)

    def begin(user: int, *groups: int, umask: int = 0o022, **more: str) -> Party:
        environment = {"SHMDOMAINS_DIR": str(segment_dir), "HOME": "/", **more}
        return Party(nursery.start(other_user.act_as, user, list(groups), umask, environment).conn)

    yield begin
    nursery.clear()


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where a test may create a segment."""
    return str(tmp_path / "list.segment")


@pytest.fixture
def planted(doms: DomainList, path: str) -> Iterator[Planted]:
    """The words of the segment at `path`, to be read and damaged."""
    if driver() is None:
        pytest.fail("no C compiler, so nobody says where the words of a segment lie")
    with Planted(path) as planted:
        yield planted


# --- PostgreSQL: pg_servers.py -----------------------------------------------------------------


@pytest.fixture(scope="session")
def pg_server() -> Iterator[pg_servers.Server]:
    """One server for the whole session; whoever kills or freezes one makes one of its own."""
    pg_servers.need()
    with pg_servers.Server(max_connections="300") as server:
        yield server


@pytest.fixture
def pg_url(pg_server: pg_servers.Server, segment_name: str) -> str:
    """The URL of a list that no other test uses."""
    return pg_server.url(segment_name)


# --- the command line --------------------------------------------------------------------------


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "etc"
    directory.mkdir()
    (directory / "web1.xml").write_text(
        helpers.xml("web1", WEB1, memory=2048, vcpus=2, title="Front end")
    )
    for name in ("db1", "Web2", "café ☕"):
        (directory / f"{name}.xml").write_text(helpers.xml(name))
    return directory


@pytest.fixture
def loaded(segment_dir: Path, config_dir: Path) -> Iterator[DomainList]:
    """The segment ``default``, loaded from `config_dir`."""
    (config_dir / "autostart").mkdir()
    invoke("load", config_dir)
    with DomainList.attach() as doms:
        yield doms
        assert doms.closed or doms.check().problems == []
