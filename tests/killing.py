"""Processes that a test may kill, and a hand in the bytes of a segment.

A `Nursery` is a clean, single-threaded helper process that forks children on request, so the test
process itself never forks: it may have threads by then. Each child runs one function of a test
module with a pipe to the test, is known by a pidfd (no number is ever killed twice), and dies with
its nursery. What a child raises comes out of `Child.hear`; a child that says nothing for `DEADLINE`
seconds fails the test instead of hanging it.

`Planted` reads and writes the words of a segment through its file, at the places that the C headers
give (the driver `core_test.c` prints them); nothing here knows a number of the layout.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import mmap
import os
import pickle
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from shmdomains import Domain, DomainDef, DomainList

TESTS = Path(__file__).resolve().parent
CORE = TESTS.parent / "shmdomains" / "memory" / "_core"
DEADLINE = 10.0
WAITERS = 0x80000000  # of a robust mutex's first word, as in linux/futex.h
OWNER_DIED = 0x40000000
TID_MASK = 0x3FFFFFFF


class ChildDied(AssertionError):
    """The child ended without a word."""


def xml(name: str, uuid: object = None, memory: int = 1024, title: str = "") -> str:
    """A definition as small as it gets."""
    return (
        f"<domain type='kvm'><name>{name}</name>{f'<uuid>{uuid}</uuid>' if uuid else ''}"
        f"{f'<title>{title}</title>' if title else ''}<memory>{memory}</memory>"
        "<os><type>hvm</type></os></domain>"
    )


@contextmanager
def soon(what: str, seconds: float = DEADLINE) -> Iterator[None]:
    """What happens inside may take this long and no longer."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"{what} took {took:.1f} s"


def until(condition: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    """Look again and again until it is so; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.0005)


# --- children -------------------------------------------------------------------------------------


class Child:
    """A process of ours: talk to it, kill it, wait for its end."""

    def __init__(self, pid: int, pidfd: int, conn: Connection) -> None:
        self.pid, self.pidfd, self.conn = pid, pidfd, conn

    def tell(self, message: object = None) -> None:
        try:
            self.conn.send(message)
        except BrokenPipeError:  # it is over, and may have said why
            self.hear()
            raise

    def hear(self, timeout: float = DEADLINE) -> Any:
        assert self.conn.poll(timeout), f"process {self.pid} said nothing for {timeout} s"
        try:
            kind, message = self.conn.recv()
        except (EOFError, ConnectionResetError):
            raise ChildDied(f"process {self.pid} died") from None
        assert kind == "said", f"process {self.pid} raised\n{message}"
        return message

    def ask(self, message: object = None, timeout: float = DEADLINE) -> Any:
        self.tell(message)
        return self.hear(timeout)

    def signal(self, number: int) -> None:
        if self.conn.closed:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def is_alive(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def join(self, timeout: float = DEADLINE) -> None:
        gone = select.select([self.pidfd], [], [], timeout)[0]
        assert gone, f"process {self.pid} did not end within {timeout} s"

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.signal(signal.SIGKILL)
        self.join()

    def close(self) -> None:
        if self.conn.closed:
            return
        self.kill()
        self.conn.close()
        os.close(self.pidfd)


class Pipe:
    """A child's end."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn

    def say(self, message: object = None) -> None:
        self.conn.send(("said", message))

    def listen(self) -> Any:
        """Wait for the test's next word; the end of the test ends the process."""
        try:
            return self.conn.recv()
        except EOFError:
            os._exit(0)

    def rest(self) -> NoReturn:
        """Wait to be killed."""
        while True:
            self.listen()


def _run(conn: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> NoReturn:
    status = 1
    try:
        function(Pipe(conn), *arguments)
        status = 0
    except BaseException:
        with suppress(OSError):
            conn.send(("raised", traceback.format_exc()))
    finally:
        os._exit(status)


def fork(function: Callable[..., Any], *arguments: Any) -> Child:
    """Fork the calling process, which is a nursery's child itself."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        ours.close()
        _run(Connection(theirs.detach()), function, arguments)
    theirs.close()
    # Nobody waits for it, so its number stays its own until we end.
    return Child(pid, os.pidfd_open(pid), Connection(ours.detach()))


class Nursery:
    """A clean process that forks children for a test. A context manager.

    `packages`: where it looks for shmdomains first, if not where the test has it from. `more` is
    put into its environment.
    """

    def __init__(self, *packages: Path, **more: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = os.pathsep.join(map(str, [*packages, TESTS, *sys.path]))
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": paths} | more,
        )
        theirs.close()
        self._socket.settimeout(3 * DEADLINE)
        self.children: list[Child] = []

    def start(self, function: Callable[..., Any], *arguments: Any) -> Child:
        """Run ``function(pipe, *arguments)`` of a test module in a new process."""
        ours, theirs = socket.socketpair()
        home = sys.modules[function.__module__].__file__
        assert home is not None
        request = pickle.dumps((Path(home).stem, function.__qualname__, arguments))
        socket.send_fds(self._socket, [request], [theirs.fileno()])
        theirs.close()
        answer, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
        assert fds, f"no child: {answer.decode(errors='replace')}"
        child = Child(int(answer), fds[0], Connection(ours.detach()))
        self.children = [one for one in self.children if not one.conn.closed]
        self.children.append(child)
        return child

    def clear(self) -> None:
        """Kill every child that there is."""
        for child in self.children:
            child.signal(signal.SIGKILL)
        for child in self.children:
            child.close()
        self.children.clear()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.clear()
        finally:
            self._socket.close()
            self._process.wait(DEADLINE)


def _serve(number: int) -> None:
    """The nursery: one request, one fork, one answer."""
    requests = socket.socket(fileno=number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ends with its test, not before
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody collects the dead
    pidfds: list[int] = []
    while True:
        request, fds, _, _ = socket.recv_fds(requests, 1 << 18, 1)
        if not request:
            break
        try:
            module, name, arguments = pickle.loads(request)
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
        except Exception:
            requests.send(traceback.format_exc().encode()[-60000:])
            continue
        for gone in select.select(pidfds, [], [], 0)[0] if len(pidfds) > 100 else []:
            os.close(gone)
            pidfds.remove(gone)
        gate, opener = os.pipe()  # it may not end before there is a pidfd of it
        pid = os.fork()
        if not pid:
            requests.close()
            os.close(opener)
            for pidfd in pidfds:
                os.close(pidfd)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.read(gate, 1)
            os.close(gate)
            _run(Connection(fds[0]), function, arguments)
        pidfds.append(os.pidfd_open(pid))
        for fd in (fds[0], gate, opener):
            os.close(fd)
        socket.send_fds(requests, [str(pid).encode()], [pidfds[-1]])
    for pidfd in pidfds:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def asleep(pid: int) -> bool:
    """Whether the process sleeps in a system call."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


# --- a segment's bytes ----------------------------------------------------------------------------


@functools.cache
def driver(sanitize: bool = False) -> Path | None:
    """The C driver, compiled against the core's files; None: there is no compiler here.

    With `sanitize`, which takes seconds longer, under ASan and UBSan where their libraries are.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    program = _built() / ("core_test.sanitized" if sanitize else "core_test")
    if program.exists():  # another process of this session has made it
        return program
    made = program.with_name(f"{program.name}.{os.getpid()}")
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{CORE}", "-pthread"]
    command += ["-DSD_CRASH_POINTS"]
    command += ["-o", str(made), str(TESTS / "core_test.c"), *map(str, _SOURCES)]
    plain = ["-O0"]
    checked = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    for options in (checked, plain) if sanitize else (plain,):
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        if done.returncode == 0:
            return made.replace(program)
    raise AssertionError(done.stderr)


BUILT = "SHMDOMAINS_TEST_BUILT"
"""The environment's name for the folder of what is compiled once for all processes of a session."""


def _built() -> Path:
    if BUILT in os.environ:
        return Path(os.environ[BUILT])
    home = tempfile.TemporaryDirectory(prefix="shmdomains-test-")
    _homes.append(home)
    return Path(home.name)


_homes: list[tempfile.TemporaryDirectory[str]] = []
_SOURCES = sorted(path for path in CORE.glob("*.c") if path.name != "core.c")


def sealed(value: int) -> int:
    """A watermark and the like, as the core writes it: with its complement."""
    return (value | ~(value ^ value >> 28) << 36) & (1 << 64) - 1


def waiter_sum(who: int, pid: int, what: int, since: int) -> int:
    """The checksum of a waiter, as the core writes it."""
    value = who
    for word in (pid, what, since):
        value = (value ^ word) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
        value ^= value >> 29
    return value


def counted(value: int) -> int:
    """`life` or `cur`, as the core writes it: 48 bits, and 16 to check them."""
    value &= (1 << 48) - 1
    return value | ((value ^ value >> 16 ^ value >> 32) & 0xFFFF) << 48


def listed(value: int) -> int:
    """An entry of an index, as the core writes it: 56 bits, and 8 to check them."""
    value &= (1 << 56) - 1
    return value | ((value << 8) * 0x9E3779B97F4A7C15 >> 56 & 0xFF) << 56


class Planted:
    """The words of a segment, to be read and damaged through its file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        program = driver()
        assert program is not None
        self.path = Path(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        lines = subprocess.run(
            [program, "layout", path], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        self.at = {name: int(value) for name, value in (line.split() for line in lines)}

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Planted:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Offsets of words

    def header(self, field: str) -> int:
        return self.at[f"header.{field}"]

    def slot(self, number: int, field: str) -> int:
        return self.at["slots"] + number * self.at["slot.size"] + self.at[f"slot.{field}"]

    def named(self, place: int, field: str) -> int:
        return self.at["named"] + place * self.at["named.size"] + self.at[f"named.{field}"]

    def name(self, number: int, buffer: int) -> int:
        """Where its length stands, and the name behind that."""
        size = self.at["names.size"]
        return self.at["names"] + number * size + buffer * size // 2 + self.at["names.length"]

    def small(self, number: int) -> int:
        """Where small data lies that was the first of its domain, checksum first: the second half
        of the second name buffer."""
        size = self.at["names.size"]
        return self.at["names"] + number * size + size * 3 // 4

    def copy(self, number: int, field: str) -> int:
        """A field in the copy that counts."""
        copy = "copy1" if self.read(self.slot(number, "cur")) & 1 else "copy0"
        return self.slot(number, copy) + self.at[f"fields.{field}"]

    def extent(self, number: int, blob: int) -> int:
        """The descriptor of a blob that is there; a domain of a test has one of the two."""
        places = [self.slot(number, "extent") + 8 * (2 * blob + i) for i in range(2)]
        [place] = [place for place in places if self.read(place)]
        return place

    def event(self, number: int, field: str) -> int:
        """A field of an event in the ring."""
        place = number % self.read(self.header("events"))
        return self.at["ring"] + place * self.at["entry.size"] + self.at[f"entry.{field}"]

    def watermark(self, at: int) -> int:
        """A word that carries its complement: 36 bits of value."""
        return self.read(at) & (1 << 36) - 1

    def entries(self, index: int) -> list[int]:
        """The places of an index's entries in the table that counts."""
        level = self.watermark(
            self.header("list_level") + 8 * index if index < 2 else self.header("id_level")
        )
        table = self.at[f"table.{index}.{level}"]
        return [at for at in range(table, table + (8192 << level), 8) if self.read(at)]

    def entry(self, index: int, slot: int) -> int:
        """The place of a slot's entry in an index."""
        [place] = [at for at in self.entries(index) if self.read(at) & 0xFFFFFF == slot + 1]
        return place

    def leave_waiter(self, place: int, who: int, pid: int, slot: int) -> None:
        """As a thread that sleeps for this slot's lock. The table has memory already."""
        at, what, since = self.at["waiters"] + place * self.at["waiter.size"], 2 | slot << 32, 1
        words = {"who": who, "pid": pid, "what": what, "since": since}
        for field, value in {**words, "sum": waiter_sum(**words)}.items():
            self.write(at + self.at[f"waiter.{field}"], value)

    def leave_garbage(self, number: int) -> None:
        """As whoever died between allocating a blob of 130 bytes for this slot and committing."""
        cell = self.watermark(self.header("heap_committed")) - 64
        self.write(self.slot(number, "extent") + 8 * 2, cell << 25 | 130)
        self.write(self.at["map"] + cell // 8, 7)
        used = self.header("heap_used")
        self.write(used, self.read(used) + 3)

    # Words

    def read(self, at: int, size: int = 8) -> int:
        return int.from_bytes(os.pread(self._fd, size, at), sys.byteorder)

    def write(self, at: int, value: int, size: int = 8) -> None:
        assert os.pwrite(self._fd, value.to_bytes(size, sys.byteorder), at) == size

    def flip(self, at: int, bit: int, size: int = 4) -> None:
        self.write(at, self.read(at, size) ^ 1 << bit, size)

    @contextmanager
    def changed(self, at: int, value: int, size: int = 8) -> Iterator[None]:
        """Another value for a while."""
        before = self.read(at, size)
        self.write(at, value, size)
        try:
            yield
        finally:
            self.write(at, before, size)

    def await_waiter(self, mutex: int) -> None:
        """Until somebody sleeps for this mutex."""
        until(lambda: self.read(mutex, 4) & WAITERS, "somebody waits for the lock")


# --- what libc and the kernel say -----------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)


def robust_head() -> int:
    """struct robust_list_head of this thread: list, distance from entry to word, pending entry."""
    number = {"x86_64": 274, "aarch64": 100}[platform.machine()]
    head, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert libc.syscall(number, 0, ctypes.byref(head), ctypes.byref(size)) == 0
    assert head.value is not None
    return head.value


def list_op_pending() -> int | None:
    """The kernel's robust list of this thread: the lock operation that it is in the middle of."""
    return ctypes.c_void_p.from_address(robust_head() + 16).value


def robust_list() -> list[int]:
    """The entries of this thread's robust list. It is whole: `prev` of each says what is before."""
    head, found = robust_head(), []
    at = head
    while (following := ctypes.c_void_p.from_address(at).value) != head:
        assert following is not None and len(found) < 2048
        assert ctypes.c_void_p.from_address(following - 8).value == at
        found.append(following)
        at = following
    assert ctypes.c_void_p.from_address(head - 8).value == at
    return found


@contextmanager
def raw_mutex(path: str | os.PathLike[str], at: int) -> Iterator[int]:
    """The address of a mutex of a segment in a mapping of our own, behind the library's back."""
    with open(path, "r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    view = ctypes.c_char.from_buffer(mapping)
    yield ctypes.addressof(view) + at
    del view
    mapping.close()


def hold(pipe: Pipe, path: str, *steps: str) -> None:
    """`hold_in` a list that the child attaches."""
    hold_in(pipe, attach(path), *steps)


def attach(path: str) -> Any:
    """The list at a path, or at a URL."""
    if not path.startswith("postgresql:"):
        return DomainList.attach(path=path)
    from shmdomains.postgres import PostgresDomainList

    return PostgresDomainList.attach(path)


def hold_in(pipe: Pipe, doms: DomainList, *steps: str) -> None:
    """A child that takes what the steps say, says its pid, and lets go when it is told to.

    ``list`` takes the list lock, ``commit`` commits every domain held, ``change=N`` sets the data
    of every domain held to N, ``new=NAME`` defines a domain and holds it; anything else is the name
    of a domain to lock.
    """
    held: list[Domain] = []
    for step in steps:
        what, _, value = step.partition("=")
        if what == "list":
            doms.lock(DEADLINE)
        elif what == "commit":
            for dom in held:
                dom.commit(DEADLINE)
        elif what == "change":
            for dom in held:
                dom.data = int(value)
        elif what == "new":
            held.append(doms.assign_def(DomainDef.from_xml(xml(value)), True, DEADLINE))
        else:
            held.append(doms.get(name=step, timeout=DEADLINE if doms.is_locked or not held else 0))
    pipe.say(os.getpid())
    pipe.listen()
    for dom in held:
        dom.unlock()
    if doms.is_locked:
        doms.unlock()
    pipe.say("free")
    pipe.rest()


def hold_mutex(pipe: Pipe, path: str, at: int) -> None:
    """A child that holds one of the segment's mutexes until it is told to let go."""
    with raw_mutex(path, at) as mutex:
        pipe.say(libc.pthread_mutex_lock(ctypes.c_void_p(mutex)))
        pipe.listen()
        pipe.say(libc.pthread_mutex_unlock(ctypes.c_void_p(mutex)))


if __name__ == "__main__":
    # Under its own name, so that classes pickled by a test are the same here.
    importlib.import_module("killing")._serve(int(sys.argv[1]))
