"""Reading the config directory: finding the files and parsing them, here and in other processes.

An error in one file becomes its `LoadFailure` and never stops the others. No filelock is taken: a
file is replaced by a rename, so a reader never sees half of one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import operator
import os
import re
import stat
import sys
from collections import deque
from collections.abc import Callable, Container, Generator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from ..errors import ConfigError, DefinitionError
from ..files import reported
from ..lazy import LazyModule
from ..names import SUFFIX, parse_uuid
from ..text import shown_path
from ..xml.definition import DomainDef, EncodedDef
from .report import LoadFailure

if TYPE_CHECKING:
    import subprocess
    from multiprocessing import connection
else:
    subprocess = LazyModule("subprocess")
    connection = LazyModule("multiprocessing.connection")

logger = logging.getLogger(__package__)

MAX_FILE_BYTES = 16 << 20  # as a definition in the segment
BATCH = 64  # files per hold of the list lock, and at most per message to a parsing worker


Stamp = tuple[int, int, int, int, int]
"""Identifies a file's content: device, inode, size, times of the last changes."""


_NAMES = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
stamp_of: Callable[[os.stat_result], Stamp] = operator.attrgetter(*_NAMES)


class ParsedFile(NamedTuple):
    path: str  # making a Path takes as long as reading the file
    stamp: Stamp | None
    result: DomainDef | EncodedDef | LoadFailure  # encoded if another process parsed it

    def is_stale(self) -> bool:
        """Whether the file was replaced, changed or removed since it was read."""
        try:
            return self.stamp != stamp_of(os.stat(self.path))
        except OSError:
            return True


def scan(config_dir: str | os.PathLike[str]) -> list[Path]:
    """Return every ``*.xml`` of the directory but dot-files, sorted; none if it does not exist.

    `ConfigError` if it cannot be read, or is no directory (virDomainObjListLoadAllConfigs).

    >>> scan("/no/such/directory")
    []
    """
    return [Path(path) for path in scan_paths(Path(config_dir))]


def scan_paths(directory: Path) -> list[str]:
    """`scan` that returns strings: a `Path` for each would take long."""
    return scan_all(directory)[0]


def scan_all(directory: Path) -> tuple[list[str], list[Path]]:
    """`scan_paths`, and the ``*.xml`` that it skips because their names begin with a dot."""
    with reported(directory):
        try:
            names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))
        except FileNotFoundError:
            return [], []
    inside = os.path.join(directory, "")
    skipped = [directory / name for name in names if name.startswith(".")]
    return [inside + name for name in names if not name.startswith(".")], skipped


def file_of(directory: Path, name: str, uuid: UUID | None, others: Container[str]) -> Path | None:
    """Return the file that holds the domain but is not named after it; ``None`` if there is none.

    `others`: the names of the other domains. A load uses a file of such a name for that domain
    only, so it is not read here. In a directory of a hundred thousand files few are left to read.
    """
    for path in scan_paths(directory):
        if os.path.basename(path)[: -len(SUFFIX)] in others:
            continue
        found = parse_file(path).result
        if isinstance(found, DomainDef) and found.name == name and found.uuid in (None, uuid):
            return Path(path)
    return None


def parse_file(path: str) -> ParsedFile:
    """Read one config file; an error becomes its `LoadFailure`.

    Only a regular file (or a link to one) of at most 16 MiB is read, so a FIFO, a device or a
    directory cannot hang the caller or fill its memory.

    >>> print(parse_file("/no/such/file.xml").result)
    /no/such/file.xml: No such file or directory
    """
    stamp = None
    try:
        stamp, data = _read(path)
        return ParsedFile(path, stamp, DomainDef.from_xml(data))
    except DefinitionError as exc:
        failure = LoadFailure(Path(path), exc.line, str(exc))
    except OSError as exc:
        failure = LoadFailure(Path(path), None, exc.strerror or str(exc))
    except Exception as exc:  # one file never stops the others, whatever is wrong with our parser
        logger.exception("%s: the parser failed", shown_path(path))
        failure = LoadFailure(Path(path), None, f"the parser failed: {type(exc).__name__}: {exc}")
    return ParsedFile(path, stamp, failure)


_UUID = re.compile(rb"<uuid>\s*([0-9a-fA-F -]+?)\s*</uuid>")


def first_uuid(path: str) -> UUID | None:
    """Return the first uuid in a config file without parsing it, which would take far longer;
    ``None`` if there is none to be seen.

    >>> first_uuid("/no/such/file.xml") is None
    True
    """
    with suppress(OSError, DefinitionError):
        found = _UUID.search(_read(path)[1])
        return None if found is None else parse_uuid(found[1].decode())
    return None


_TO_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def _read(path: str) -> tuple[Stamp, bytes]:
    # Opening a device may have side effects, so check first. A FIFO may take the file's place
    # before the open, so do not block, and check again.
    _check_regular(os.stat(path))
    fd = os.open(path, _TO_READ)
    try:
        status = os.fstat(fd)
        _check_regular(status)
        data = os.read(fd, min(status.st_size, MAX_FILE_BYTES) + 1)
        if len(data) != status.st_size:  # being written, or in a filesystem that gives no size
            with open(fd, "rb", closefd=False) as file:
                data += file.read(MAX_FILE_BYTES + 1 - len(data))
    finally:
        os.close(fd)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(errno.EFBIG, f"more than {MAX_FILE_BYTES >> 20} MiB")
    return stamp_of(status), data


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(errno.EINVAL, "not a regular file")


# --- parsing in other processes -------------------------------------------------------------


# Not multiprocessing's workers: spawn and forkserver run the caller's main module again, daemonic
# processes may not start others, and they outlive a killed parent. These end with their input.
# Standard output goes to standard error, so that nothing printed gets between the answers.
_WORKER_CODE = """\
import os, sys
from multiprocessing.connection import Connection
requests = Connection(os.dup(0), writable=False)
answers = Connection(os.dup(1), readable=False)
os.dup2(2, 1)
sys.path[:] = requests.recv()
from shmdomains.config.parse import _serve
_serve(requests, answers)
"""

# One file's answer: plain tuples, strings and the encoded definition. Unpickling a Path, UUID,
# named tuple or definition would cost the parent more than the worker saves.
_Answer = tuple[Stamp | None, tuple[str, bytes | None, bytes] | LoadFailure]
_READY: list[_Answer] = []


def _serve(requests: connection.Connection, answers: connection.Connection) -> None:
    """Run in a worker: report ready, then parse lists of paths until the parent closes the pipe or
    is gone."""
    with suppress(EOFError, BrokenPipeError):
        answers.send(_READY)
        while True:
            paths: list[str] = requests.recv()
            answers.send([_answer(parse_file(path)) for path in paths])


def _answer(item: ParsedFile) -> _Answer:
    result = item.result.decoded() if isinstance(item.result, EncodedDef) else item.result
    if isinstance(result, LoadFailure):
        return item.stamp, result
    try:
        encoded = EncodedDef.of(result)
        return item.stamp, (encoded.name, encoded.uuid, encoded.blob)
    except DefinitionError as exc:
        return item.stamp, LoadFailure(Path(item.path), exc.line, str(exc))


def _answered(path: str, answer: _Answer) -> ParsedFile:
    stamp, result = answer
    return ParsedFile(
        path, stamp, result if isinstance(result, LoadFailure) else EncodedDef(*result)
    )


class _Worker:
    """Another process that parses. Nobody waits for it until it is ready; if it dies, its files are
    parsed in this process."""

    _AHEAD = 2  # lists of paths: it works on one while its answer to another waits to be read

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._given: deque[tuple[int, list[str]]] = deque()
        self._pipes = ExitStack()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER_CODE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the parent, which stops its workers
            )
            stdin, stdout = self._process.stdin, self._process.stdout
            assert stdin is not None and stdout is not None
            with stdin, stdout:
                self._requests = self._pipe(os.dup(stdin.fileno()), readable=False)
                self._answers = self._pipe(os.dup(stdout.fileno()), writable=False)
            with suppress(OSError):  # refused to a user who has many pipes
                fcntl.fcntl(self._answers.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)
            # A request of at most half the pipe never blocks: the worker may be waiting for us.
            self._most = fcntl.fcntl(self._requests.fileno(), fcntl.F_GETPIPE_SZ) // 2
            self._requests.send(sys.path)
        except OSError as exc:
            self._give_up(exc)

    def _pipe(
        self, fd: int, *, readable: bool = True, writable: bool = True
    ) -> connection.Connection:
        return self._pipes.enter_context(connection.Connection(fd, readable, writable))

    def has(self, number: int) -> bool:
        return any(given == number for given, _ in self._given)

    def may_take(self, paths: list[str]) -> bool:
        if self._process is None or not self._ready or len(self._given) == self._AHEAD:
            return False
        return not self._given or sum(len(path) + 32 for path in paths) * 2 < self._most

    def take(self, number: int, paths: list[str]) -> None:
        self._given.append((number, paths))
        try:
            self._requests.send(paths)
        except OSError as exc:
            self._give_up(exc)

    def collect(self, wait: bool) -> dict[int, list[ParsedFile]]:
        """The files that it has parsed, by number; `wait` waits for at least one answer."""
        found: dict[int, list[ParsedFile]] = {}
        try:
            while self._process is not None and (self._answers.poll(0) or (wait and not found)):
                answers: list[_Answer] = self._answers.recv()
                if not self._ready:
                    self._ready = True
                    continue
                number, paths = self._given[0]
                pairs = zip(paths, answers, strict=True)
                found[number] = [_answered(path, answer) for path, answer in pairs]
                self._given.popleft()
        except Exception as exc:  # whatever the pipe holds, no file is lost
            self._give_up(exc)
        if self._process is None:
            for number, paths in self._given:
                found[number] = [parse_file(path) for path in paths]
            self._given.clear()
        return found

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        self._pipes.close()
        process.wait()

    def _give_up(self, exc: Exception) -> None:
        pid = None if self._process is None else self._process.pid
        logger.warning(
            "parsing worker %s is lost (%s): its files are parsed in this process", pid, exc
        )
        self.stop()


def parse_files(paths: list[str], workers: int | None) -> Generator[ParsedFile, None, None]:
    """Parse the files in the order of `paths`; without `workers` in this process only.

    With `workers` of 2 or more that many processes parse ahead, including this one. The others are
    new interpreters, not forks (a fork of a process with threads may hang), and do not import
    ``__main__``. If a worker dies, this is logged and its files are parsed here. Negative `workers`
    is a `ValueError`.

    >>> [str(item.result) for item in parse_files(["/no/b.xml"], None)]
    ['/no/b.xml: No such file or directory']
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be None or at least 0, not {workers}")
    if not workers or workers == 1 or len(paths) < 2:
        return (parse_file(path) for path in paths)
    return _parse_with_workers(paths, workers)


def _parse_with_workers(paths: list[str], count: int) -> Generator[ParsedFile, None, None]:
    """Parse in order, with `count` processes including this one.

    Whoever is free takes the next list of paths, so nobody waits for a slow or starting worker.
    There is a limit, since results parsed ahead are kept in memory.
    """
    size = max(1, min(BATCH, len(paths) // count))
    chunks = [paths[at : at + size] for at in range(0, len(paths), size)]
    parsed: dict[int, list[ParsedFile]] = {}
    following = 0
    pool: list[_Worker] = []
    try:
        while len(pool) < min(count, len(chunks)) - 1:
            pool.append(_Worker())
        for number in range(len(chunks)):
            while number not in parsed:
                for worker in pool:
                    parsed.update(worker.collect(wait=False))
                    while following < len(chunks) and worker.may_take(chunks[following]):
                        worker.take(following, chunks[following])
                        following += 1
                if following < len(chunks) and len(parsed) < 8 * count:
                    following += 1
                    parsed[following - 1] = [parse_file(path) for path in chunks[following - 1]]
                elif number not in parsed:
                    owner = next(worker for worker in pool if worker.has(number))
                    parsed.update(owner.collect(wait=True))
            yield from parsed.pop(number)
    finally:
        for worker in pool:
            worker.stop()
