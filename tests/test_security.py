"""Who can do what: another uid cannot attach, read, squat a name, or make us follow a link.

Users are real: root drops to them in processes of their own. The attacker goes first wherever a
race would let her, and what she finds to be in her way is the kernel's answer, not the library's.
`alice` is the victim, `bob` shares the group STAFF with her, `mallory` shares nothing.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import Party

import shmdomains
from shmdomains import (
    ConfigError,
    SegmentExists,
    SegmentNotFound,
    SegmentRefused,
)

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user"),
]

ALICE, BOB, MALLORY, STAFF = 54331, 54332, 54333, 54398
AsUser = Callable[..., Party]


@pytest.fixture
def sticky(segment_dir: Path) -> Path:
    """Where everybody may make files, as in /dev/shm and /tmp."""
    folder = segment_dir / "sticky"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def own(segment_dir: Path) -> Path:
    """A folder of Alice's own."""
    folder = segment_dir / "alice"
    folder.mkdir(mode=0o700)
    os.chown(folder, ALICE, ALICE)
    return folder


def refused(party: Party, *calls: str) -> None:
    for call in calls:
        with pytest.raises(PermissionError):
            party.do(call)


def attempts(path: Path) -> list[str]:
    """All that one may try with a path of another."""
    return [
        f"os.open({str(path)!r}, os.O_RDONLY)",
        f"os.open({str(path)!r}, os.O_RDWR)",
        f"os.truncate({str(path)!r}, 0)",
        f"os.chmod({str(path)!r}, 0o666)",
        f"os.unlink({str(path)!r})",
        f"os.rename({str(path)!r}, {str(path) + '-moved'!r})",
        f"DomainList.attach(path={str(path)!r})",
        f"DomainList.open(path={str(path)!r})",
        f"unlink(path={str(path)!r}, force=True)",
    ]


# --- what is another's ----------------------------------------------------------------------------


def test_a_private_segment_among_strangers(sticky: Path, as_user: AsUser) -> None:
    path = sticky / "s"
    alice = as_user(ALICE, STAFF)
    alice.tell(f"doms = DomainList.create(path={str(path)!r}, max_domains=8)")
    alice.tell("doms.define(xml('web1')).name")
    for party in (as_user(MALLORY), as_user(BOB, STAFF)):
        refused(party, *attempts(path))
        with pytest.raises(PermissionError):
            party.tell(f"os.link({str(path)!r}, {str(sticky / 'mine')!r})")
        with pytest.raises(SegmentExists):
            party.do(f"DomainList.create(path={str(path)!r})")
    assert alice.tell("[info.name for info in doms], doms.check().problems") == (["web1"], [])
    second = as_user(ALICE)
    assert second.tell(f"len(DomainList.attach(path={str(path)!r}))") == 1
    alice.tell("doms.unlink(force=True)")


def test_a_private_folder(own: Path, as_user: AsUser) -> None:
    alice = as_user(ALICE, SHMDOMAINS_DIR=str(own))
    alice.tell("doms = DomainList.create('s', max_domains=8)")
    for party in (as_user(MALLORY, SHMDOMAINS_DIR=str(own)), as_user(BOB, STAFF)):
        refused(party, *attempts(own / "s.segment"), f"os.listdir({str(own)!r})")
        assert party.tell("segments()") == []
        refused(party, f"DomainList.create(path={str(own / 'new')!r})")
        refused(party, f"os.mkdir({str(own / 'new')!r})", f"os.rmdir({str(own)!r})")
    alice.tell("doms.unlink()")


def test_descriptors_and_memory_of_a_process(sticky: Path, as_user: AsUser) -> None:
    """A memfd has no name, but /proc would lead to it."""
    alice = as_user(ALICE, STAFF)
    alice.tell("doms = DomainList(max_domains=8)")
    alice.tell(f"named = DomainList.create(path={str(sticky / 's')!r}, max_domains=8)")
    fds = alice.tell("doms._fd, named._fd")
    maps = os.listdir(f"/proc/{alice.pid}/map_files")
    second = as_user(ALICE)
    for fd in fds:  # the same user may
        second.tell(f"os.close(os.open('/proc/{alice.pid}/fd/{fd}', os.O_RDWR))")
    for party in (as_user(MALLORY), as_user(BOB, STAFF)):
        for fd in fds:
            refused(party, f"os.open('/proc/{alice.pid}/fd/{fd}', os.O_RDONLY)")
        refused(party, f"os.listdir('/proc/{alice.pid}/fd')", f"open('/proc/{alice.pid}/mem')")
        refused(party, f"os.open('/proc/{alice.pid}/map_files/{maps[0]}', os.O_RDONLY)")
        refused(party, f"os.kill({alice.pid}, 9)")
    alice.tell("named.unlink()")


def test_a_memfd_that_was_handed_on_can_not_be_cut_off(as_user: AsUser) -> None:
    """Who gets the descriptor may read and write; not truncate it, which would be SIGBUS for us."""
    alice, mallory = as_user(ALICE), as_user(MALLORY)
    alice.tell("doms = DomainList(max_domains=8); doms.define(xml('web1')).name")
    address = f"\0shmdomains-test-{os.getpid()}-handed-on"
    mallory.tell(
        f"import fcntl, socket\nserver = socket.socket(socket.AF_UNIX)\n"
        f"server.bind({address!r}); server.listen()"
    )
    alice.tell(
        f"import socket\nclient = socket.socket(socket.AF_UNIX); client.connect({address!r})\n"
        "socket.send_fds(client, [b'x'], [doms._fd]); client.close()"
    )
    mallory.tell("_, (fd,), _, _ = socket.recv_fds(server.accept()[0], 1, 1)")
    for call in (
        "os.ftruncate(fd, 0)",
        "os.ftruncate(fd, 1 << 40)",
        "fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)",
    ):
        refused(mallory, call)
    assert alice.tell("[info.name for info in doms], doms.check().problems") == (["web1"], [])


# --- names that are taken -------------------------------------------------------------------------

# What Mallory, or Bob, puts where Alice's segment is to be; `name` and `victim` are paths.
SQUATS: dict[str, str] = {
    "her own file": "open(name, 'wb').write(b'x' * 8192); os.chmod(name, 0o600)",
    "a file for all": "open(name, 'wb').close(); os.chmod(name, 0o666)",
    "a file for her group": "open(name, 'wb').close(); os.chmod(name, 0o660)",
    "a file of the common group": (
        "open(name, 'wb').close(); os.chown(name, -1, GROUP); os.chmod(name, 0o660)"
    ),
    "a segment for all": "DomainList.create(path=name).close(); os.chmod(name, 0o666)",
    "a segment of the common group": (
        "DomainList.create(path=name, max_domains=8, mode=0o660, group=GROUP).close()"
    ),
    "a link to the victim's file": "os.symlink(victim, name)",
    "a link to the victim's segment": "os.symlink(victim + '.segment', name)",
    "a link to nothing": "os.symlink(victim + '-not-there', name)",
    "a pipe": "os.mkfifo(name, 0o666); os.chmod(name, 0o666)",
    "a socket": "import socket; s = socket.socket(socket.AF_UNIX); s.bind(name); s.close()",
    "a folder": "os.mkdir(name, 0o777)",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("squat", SQUATS)
def test_a_name_that_was_squatted(sticky: Path, own: Path, as_user: AsUser, squat: str) -> None:
    """Alice is refused, in words of ours and at once; she writes nowhere and follows nothing."""
    name, victim = sticky / "s", own / "victim"
    alice, bob = as_user(ALICE, STAFF), as_user(BOB, STAFF)
    alice.tell(f"open({str(victim)!r}, 'w').write('precious')")
    alice.tell(f"other = DomainList.create(path={str(victim) + '.segment'!r}, max_domains=8)")
    bob.tell(f"name, victim, GROUP = {str(name)!r}, {str(victim)!r}, {STAFF}\n{SQUATS[squat]}")
    before = name.lstat()
    for call in ("attach", "open", "create"):
        with pytest.raises((SegmentRefused, SegmentExists)) as caught:
            alice.do(f"DomainList.{call}(path={str(name)!r})")
        assert call != "attach" or isinstance(caught.value, SegmentRefused)
        assert str(name) in str(caught.value)
    for force in (False, True):
        with pytest.raises(SegmentRefused):
            alice.tell(f"unlink(path={str(name)!r}, force={force})")
    after = name.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (
        before.st_ino,
        before.st_mode,
        before.st_size,
    )
    assert victim.read_text() == "precious"
    assert sorted(os.listdir(own)) == ["victim", "victim.segment"]
    assert alice.tell("len(other), other.check().problems") == (0, [])
    alice.tell("other.unlink()")


def test_a_hard_link_to_another_segment(sticky: Path, as_user: AsUser) -> None:
    """Where the kernel lets others make one, it would lead Alice to the wrong list of her own."""
    alice = as_user(ALICE)
    alice.tell(f"doms = DomainList.create(path={str(sticky / 'real')!r}, max_domains=8)")
    os.link(sticky / "real", sticky / "s")
    for name in ("s", "real"):
        with pytest.raises(SegmentRefused, match="another name"):
            alice.do(f"DomainList.attach(path={str(sticky / name)!r})")
    (sticky / "s").unlink()
    assert alice.tell(f"len(DomainList.attach(path={str(sticky / 'real')!r}))") == 0
    alice.tell("doms.unlink()")


# What Bob makes of the folder where Alice's named segments would go.
FOLDERS: dict[str, str] = {
    "his own": "os.mkdir(place, 0o700)",
    "open to all": "os.mkdir(place); os.chmod(place, 0o777)",
    "sticky": "os.mkdir(place); os.chmod(place, 0o1777)",
    "of the common group": (
        "os.mkdir(place); os.chown(place, -1, GROUP); os.chmod(place, 0o2750)\n"
        "DomainList.create(path=place + '/s.segment', mode=0o660, group=GROUP).close()"
    ),
    "a link to a folder of his": (
        "os.mkdir(place + '-bob', 0o755); os.symlink(place + '-bob', place)"
    ),
    "a link to a folder of hers": "os.symlink(victim, place)",
    "a link to nothing": "os.symlink(place + '-not-there', place)",
    "a file": "open(place, 'w').close()",
}


@pytest.fixture
def fallback() -> Iterator[Path]:
    """Alice's folder in /dev/shm, and what Bob makes for it."""
    place = Path(f"/dev/shm/shmdomains-{ALICE}")
    yield place
    for path in Path("/dev/shm").glob(f"{place.name}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@pytest.mark.parametrize("squat", FOLDERS)
def test_a_folder_that_was_squatted(fallback: Path, own: Path, as_user: AsUser, squat: str) -> None:
    alice = as_user(ALICE, STAFF, SHMDOMAINS_DIR="", XDG_RUNTIME_DIR="/proc")
    bob = as_user(BOB, STAFF)
    bob.tell(f"place, victim, GROUP = {str(fallback)!r}, {str(own)!r}, {STAFF}\n{FOLDERS[squat]}")
    for call in ("DomainList.open('s')", "DomainList.create('s')", "DomainList.open()"):
        with pytest.raises(SegmentRefused, match=str(fallback)):
            alice.do(call)
    with pytest.raises((SegmentRefused, SegmentNotFound)):
        alice.do("DomainList.attach('s')")
    with pytest.raises((SegmentRefused, SegmentNotFound)):
        alice.tell("unlink('s', force=True)")
    assert os.listdir(own) == []
    assert not Path(f"{fallback}-not-there").exists()


def test_a_folder_that_is_replaced_by_a_link(segment_dir: Path, as_user: AsUser) -> None:
    """In a folder where all may write and nothing is sticky, even her own folder can be moved."""
    loose = segment_dir / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    alice, mallory = as_user(ALICE), as_user(MALLORY)
    path = loose / "hers" / "s"
    alice.tell(f"doms = DomainList.create(path={str(path)!r}, max_domains=8)")
    mallory.tell(f"os.rename({str(loose / 'hers')!r}, {str(loose / 'moved')!r})")
    for target in ("moved", "mine"):
        mallory.tell(
            f"os.makedirs({str(loose / 'mine')!r}, exist_ok=True)\n"
            f"os.symlink({target!r}, {str(loose / 'hers')!r})"
        )
        for call in ("attach", "open", "create"):
            with pytest.raises(SegmentRefused, match="no directory"):
                alice.do(f"DomainList.{call}(path={str(path)!r})")
        mallory.tell(f"os.unlink({str(loose / 'hers')!r})")
    assert os.listdir(loose / "mine") == []
    shutil.rmtree(loose / "moved")


# --- a group --------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777], ids=oct)
def test_a_groups_segment(segment_dir: Path, own: Path, as_user: AsUser, umask: int) -> None:
    """Two of the group work in it, one outside gets nowhere; the umask has no say."""
    own.chmod(0o711)
    room = own / "room"
    path = room / "s"
    alice = as_user(ALICE, STAFF, umask=umask)
    alice.tell(
        f"doms = DomainList.create(path={str(path)!r}, max_domains=8, mode=0o660, group={STAFF})"
    )
    folder, file = room.stat(), path.stat()
    assert (folder.st_uid, folder.st_gid, stat.S_IMODE(folder.st_mode)) == (ALICE, STAFF, 0o2750)
    assert (file.st_uid, file.st_gid, stat.S_IMODE(file.st_mode)) == (ALICE, STAFF, 0o660)
    alice.tell("doms.define(xml('web1')).name")
    bob, mallory = as_user(BOB, STAFF), as_user(MALLORY)
    bob.tell(f"doms = DomainList.attach(path={str(path)!r})")
    bob.tell("with doms.get(name='web1') as dom: dom.pid = 6")
    assert alice.tell("doms.peek(name='web1').pid, doms.check().problems") == (6, [])
    bob.tell("dom = doms.get(name='web1')")
    with pytest.raises(shmdomains.LockTimeout, match=str(bob.pid)):
        alice.tell("doms.get(name='web1', timeout=0)")
    # The name stays its owner's.
    refused(bob, f"unlink(path={str(path)!r}, force=True)", "doms.unlink(force=True)")
    refused(bob, f"DomainList.create(path={str(room / 'mine')!r})")
    refused(mallory, *attempts(path))
    bob.tell("dom.unlock(); del dom; doms.close()")
    alice.tell("doms.unlink()")
    assert not path.exists()


def test_a_group_that_one_is_no_member_of(own: Path, as_user: AsUser) -> None:
    alice = as_user(ALICE)
    path = own / "s"
    with pytest.raises(SegmentRefused, match=str(STAFF)):
        alice.do(f"DomainList.create(path={str(path)!r}, mode=0o660, group={STAFF})")
    with pytest.raises(SegmentRefused, match=str(STAFF)):
        alice.do(f"DomainList.create(path={str(own / 'room' / 's')!r}, mode=0o660, group={STAFF})")
    assert not path.exists()
    alice.do(f"DomainList.create(path={str(path)!r}, max_domains=8).unlink()")


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o277, 0o777], ids=oct)
def test_the_umask_has_no_say(segment_dir: Path, own: Path, as_user: AsUser, umask: int) -> None:
    alice = as_user(ALICE, umask=umask, SHMDOMAINS_DIR=str(own / "new"))
    alice.tell("doms = DomainList.create('s', max_domains=8); doms.define(xml('web1')).name")
    assert stat.S_IMODE((own / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((own / "new" / "s.segment").stat().st_mode) == 0o600
    second = as_user(ALICE, SHMDOMAINS_DIR=str(own / "new"))
    assert second.tell("len(DomainList.attach('s'))") == 1
    alice.tell("doms.unlink(force=True)")


# --- files of an export, and of the config directories --------------------------------------------


@pytest.mark.parametrize(
    "squat",
    [
        "open(name, 'w').close(); os.chmod(name, 0o666)",
        "os.symlink(victim, name)",
        "os.symlink('bobs', name); open(bobs, 'w').close(); os.chmod(bobs, 0o666)",
        "os.mkfifo(name); os.chmod(name, 0o666); fd = os.open(name, os.O_RDWR)",
    ],
    ids=["a file for all", "a link to the victim's file", "a link to a file of his", "a pipe"],
)
def test_an_export_into_a_folder_of_all(
    sticky: Path, own: Path, as_user: AsUser, squat: str
) -> None:
    """Definitions hold passwords: nothing of them goes where Bob can read it."""
    name, victim, bobs = sticky / "domains.bin", own / "victim", sticky / "bobs"
    alice, bob = as_user(ALICE, umask=0), as_user(BOB)
    alice.tell(f"open({str(victim)!r}, 'w').write('precious')")
    alice.tell(
        "from shmdomains.cli import cli\nfrom click.testing import CliRunner\n"
        f"doms = DomainList.create(path={str(own / 's')!r}, max_domains=8)\n"
        "doms.define(xml('web1')).name"
    )
    bob.tell(f"name, victim, bobs = {str(name)!r}, {str(victim)!r}, {str(bobs)!r}\n{squat}")
    alice.tell(
        f"done = CliRunner().invoke(cli, ['-s', {str(own / 's')!r}, 'export', {str(name)!r}])"
    )
    assert alice.tell("done.exit_code") == 1
    assert alice.tell("done.output").startswith("error: ")
    assert victim.read_text() == "precious"
    assert not bobs.exists() or bobs.read_text() == ""
    assert name.is_symlink() or not name.is_file() or name.read_text() == ""
    alice.tell("doms.unlink()")


def test_files_of_an_export(own: Path, as_user: AsUser) -> None:
    """For its owner alone, whatever the umask and the folder."""
    own.chmod(0o777)
    alice, bob = as_user(ALICE, umask=0), as_user(BOB)
    alice.tell(
        "from shmdomains.cli import cli\nfrom click.testing import CliRunner\n"
        f"doms = DomainList.create(path={str(own / 'new' / 's')!r}, max_domains=8)\n"
        "doms.define(xml('web1')).name"
    )
    for target in ("domains.bin", "xml/"):
        alice.tell(
            f"done = CliRunner().invoke(cli, ['-s', {str(own / 'new' / 's')!r}, 'export', "
            f"{str(own) + '/' + target!r}])"
        )
        assert alice.tell("done.exit_code") == 0, alice.tell("done.output")
    refused(bob, f"open({str(own / 'domains.bin')!r})", f"os.listdir({str(own / 'xml')!r})")
    assert stat.S_IMODE((own / "domains.bin").stat().st_mode) == 0o600
    assert stat.S_IMODE((own / "xml" / "web1.xml").stat().st_mode) == 0o600
    alice.tell("doms.unlink()")


@pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
def test_files_of_a_config_directory(own: Path, as_user: AsUser, umask: int) -> None:
    alice = as_user(ALICE, umask=umask)
    etc = own / "etc"
    alice.tell(
        "from shmdomains.config import ConfigDirs\n"
        f"etc = ConfigDirs({str(etc)!r}); etc.save(definition('web1'))"
    )
    assert {name: stat.S_IMODE((etc / name).stat().st_mode) for name in os.listdir(etc)} == {
        "web1.xml": 0o600,
        ".lock": 0o600,
    }
    alice.tell("etc.save(definition('web1'))")
    refused(as_user(BOB), f"open({str(etc / '.lock')!r}, 'r+')", f"os.listdir({str(etc)!r})")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "squat",
    [
        "os.symlink(victim, lock)",
        "os.symlink('not-there', lock)",
        "os.mkfifo(lock)",
        "os.mkdir(lock)",
    ],
    ids=["a link to the victim's file", "a link to nothing", "a pipe", "a folder"],
)
def test_a_config_lock_that_was_squatted(
    sticky: Path, own: Path, as_user: AsUser, squat: str
) -> None:
    """Nothing is truncated or made through it."""
    victim = own / "victim"
    alice, bob = as_user(ALICE), as_user(BOB)
    alice.tell(f"open({str(victim)!r}, 'w').write('precious')")
    bob.tell(f"lock, victim = {str(sticky / '.lock')!r}, {str(victim)!r}\n{squat}")
    with pytest.raises(ConfigError, match=r"\.lock"):
        alice.tell(
            "from shmdomains.config import ConfigDirs\n"
            f"ConfigDirs({str(sticky)!r}).save(definition('web1'), timeout=1)"
        )
    assert victim.read_text() == "precious"
    assert os.listdir(sticky) == [".lock"]
