"""A `define` that fails takes back what it made, and nothing that somebody else made or changed.

The failure is always the same: the config file cannot be written. Meanwhile another thread waits
for the new domain, gets it as it is unlocked, and makes use of it before it could be removed.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import DEADLINE, SOAK, Home, Party, thread_party, xml

from shmdomains import DomainList, transfer
from shmdomains.config import change
from shmdomains.errors import ConfigError, LockTimeout

UUID = "00000000-0000-0000-0000-00000000000a"
WEB1 = xml("web1", UUID)

LIST_IS_HELD = """
def list_is_held():
    if not doms.acquire(block=False):
        return True
    doms.release()
    return False
list_is_held()
"""

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def folder(doms: DomainList, tmp_path: Path) -> Path:
    doms.load_all_configs(tmp_path / "vm", tmp_path / "vm" / "autostart")
    return tmp_path / "vm"


@pytest.fixture
def third(doms: DomainList) -> Iterator[Party]:
    """One more thread that knows `doms`."""
    with thread_party(doms=doms) as party:
        yield party


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Make the next write of a config file, and no later one, do something and fail."""
    write = change._write_file

    def arrange(meanwhile: Callable[[], object]) -> None:
        def fail(path: Path, data: bytes) -> None:
            monkeypatch.setattr(change, "_write_file", write)
            meanwhile()
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

        monkeypatch.setattr(change, "_write_file", fail)

    return arrange


def until_the_list_is_held(party: Party) -> None:
    end = time.monotonic() + DEADLINE
    while not party.tell(LIST_IS_HELD):
        assert time.monotonic() < end


def test_what_a_failed_define_made_is_gone(
    doms: DomainList, folder: Path, failing: Callable[..., None]
) -> None:
    failing(lambda: None)
    with pytest.raises(ConfigError):
        doms.define(WEB1)
    assert len(doms) == 0
    assert list(folder.glob("*.xml")) == []
    doms.define(WEB1)
    assert doms.peek(name="web1").persistent
    assert (folder / "web1.xml").exists()


def test_a_define_that_waited_for_one_that_fails_stays(
    doms: DomainList, folder: Path, other: Party, third: Party, failing: Callable[..., None]
) -> None:
    def meanwhile() -> None:
        other.start(f"doms.define({xml('web1', UUID, memory=2048)!r}).name")
        until_the_list_is_held(third)  # and now it waits for the domain, which is ours

    failing(meanwhile)
    with pytest.raises(ConfigError):
        doms.define(WEB1)
    assert other.answer() == "web1"
    info = doms.peek(name="web1")
    assert info is not None and info.persistent and info.definition.memory == 2048
    assert "2048" in (folder / "web1.xml").read_text()


@pytest.mark.differs
@pytest.mark.parametrize(
    "use",
    [
        "dom.data = 'mine'",
        "dom.activate(); dom.commit(); dom.deactivate()",
        "dom.persistent = dom.persistent",
        "doms.save_config(dom)",
    ],
)
def test_a_domain_that_somebody_used_meanwhile_stays(
    doms: DomainList, folder: Path, other: Party, failing: Callable[..., None], use: str
) -> None:
    def meanwhile() -> None:
        other.start(f"dom = doms.get(name='web1')\n{use}\ndom.unlock()\ndoms.is_locked")
        assert other.is_waiting()

    failing(meanwhile)
    doms.lock()  # the other one is done before we can take back
    try:
        with pytest.raises(ConfigError):
            doms.define(WEB1)
    finally:
        doms.unlock()
    # With the list held throughout nobody came in between: it is gone, and the other one missed it.
    with pytest.raises(LookupError):
        other.answer()
    assert len(doms) == 0

    failing(meanwhile)
    taking_back = doms._take_back

    def after_the_other(*args: Any) -> None:
        args[0]._release_unseen()
        assert other.answer() is False
        taking_back(*args)

    doms._take_back = after_the_other  # type: ignore[method-assign]
    with pytest.raises(ConfigError):
        doms.define(WEB1)
    assert doms.peek(name="web1") is not None
    assert (folder / "web1.xml").exists() == ("save_config" in use)


def test_a_domain_that_somebody_only_looked_at_goes(
    doms: DomainList, folder: Path, other: Party, failing: Callable[..., None]
) -> None:
    def meanwhile() -> None:
        other.start("dom = doms.get(name='web1')\nname = dom.name\ndom.unlock()\nname")
        assert other.is_waiting()

    failing(meanwhile)
    with pytest.raises(ConfigError):
        doms.define(WEB1)
    assert len(doms) == 0
    with pytest.raises(LookupError):  # or it came in between
        assert other.answer() == "web1"
        other.tell("doms.get(name='web1')")


def test_what_cannot_be_taken_back_in_time_is_transient_and_said(
    doms: DomainList,
    folder: Path,
    other: Party,
    failing: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing(lambda: other.do("doms.lock()"))
    with pytest.raises(ConfigError):
        doms.define(WEB1, timeout=0.2)
    info = doms.peek(name="web1")
    assert info is not None and not info.persistent and not info.is_active
    assert "was not taken back" in caplog.text and UUID in caplog.text
    other.do("doms.unlock()")
    doms.undefine(name="web1")
    assert len(doms) == 0


@pytest.mark.timeout(60)
def test_taking_back_ends_in_time_though_the_lists_holder_is_stopped(
    home: Home, segment_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`define` waits for the directory's lock; meanwhile another process takes the list and is
    stopped. What was made cannot be taken back then, and nobody waits for that."""
    path = segment_dir / "list.segment"
    timeout = 0.5
    with DomainList.create(path=path, max_domains=16) as doms, thread_party() as busy:
        doms.load_all_configs(tmp_path)
        doms.define(xml("web0"))  # makes the directory's lock
        busy.do(f"import fcntl; f = open({str(tmp_path / '.lock')!r}, 'r+')")
        busy.do("fcntl.flock(f, fcntl.LOCK_EX)")
        stopped = home.begin("fork")
        stopped.do(f"doms = DomainList.attach(path={str(path)!r})")
        acquire = change._DirectoryLock.acquire

        def meanwhile(lock: Any, left: float | None) -> None:
            stopped.do("doms.lock()")
            os.kill(stopped.pid, signal.SIGSTOP)
            acquire(lock, left)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(change._DirectoryLock, "acquire", meanwhile)
            try:
                began = time.monotonic()
                with pytest.raises(LockTimeout, match="config directory"):
                    doms.define(WEB1, timeout=timeout)
                took = time.monotonic() - began
            finally:
                os.kill(stopped.pid, signal.SIGCONT)
        assert took < DEADLINE / 2  # without a limit it would take for ever
        assert "was not taken back" in caplog.text
        info = doms.peek(name="web1")
        assert info is not None and not info.persistent
        stopped.do("doms.unlock(); doms.close()")
        stopped.leave()
        busy.do("f.close()")
        doms.undefine("web1")


def test_a_new_domain_is_persistent_with_its_file_and_not_before(
    doms: DomainList, folder: Path, failing: Callable[..., None]
) -> None:
    seen = []
    failing(lambda: seen.append(doms.peek(name="web1").persistent))
    with pytest.raises(ConfigError):
        doms.define(WEB1)
    assert seen == [False]
    assert doms.define(WEB1).persistent


def test_an_import_that_fails_removes_nothing_that_was_used(
    doms: DomainList, other: Party, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    doms.define(WEB1)
    with open(tmp_path / "stream", "w+b") as stream:
        transfer.export_domains(doms, stream)
        doms.undefine(name="web1")
        for used in (False, True):
            stream.seek(0)

            def fill(*_: object, used: bool = used) -> None:
                if used:
                    other.start("dom = doms.get(name='web1')\ndom.data = 1\ndom.unlock()")
                    assert other.is_waiting()
                raise LockTimeout("made to fail")

            monkeypatch.setattr(transfer, "_fill", fill)
            taking_back = DomainList._take_back

            def after_the_other(*args: Any, used: bool = used, go_on: Any = taking_back) -> None:
                if used:
                    other.answer()
                go_on(*args)

            monkeypatch.setattr(DomainList, "_take_back", after_the_other)
            assert transfer.import_domains(doms, stream).imported == []
            assert (doms.peek(name="web1") is not None) == used
            monkeypatch.setattr(DomainList, "_take_back", taking_back)


NO_FILE_OF_MINE = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
failed = 0
while doms.peek(name="end") is None:
    try:
        doms.define({WEB1!r})
    except OSError:
        failed += 1
doms.close()
failed
"""


@pytest.mark.soak
def test_no_acknowledged_define_is_lost_to_another_one_that_fails(
    home: Home, segment_dir: Path, tmp_path: Path, tried: Callable[..., None]
) -> None:
    rounds = 2000 if SOAK else 300
    path = segment_dir / "list.segment"
    with DomainList.create(path=path) as doms:
        doms.load_all_configs(tmp_path / "vm")
        unlucky = home.begin("fork")
        unlucky.do(f"doms = DomainList.attach(path={str(path)!r})")
        unlucky.start(NO_FILE_OF_MINE)
        for _ in range(rounds):
            doms.define(WEB1)
            info = doms.peek(name="web1")
            assert info is not None and info.persistent
            assert (tmp_path / "vm" / "web1.xml").exists()
            doms.undefine(uuid=UUID)
        doms.define(xml("end"))
        assert unlucky.answer() > 0
        unlucky.leave()
    tried("defines beside one that cannot save its file", rounds)
