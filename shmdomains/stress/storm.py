"""`shmdomains stress`: a list of real domains, worker processes that use it hard, and the proof.

`run` loads a directory of libvirt domain XML into a list of its own, adds clones if asked for,
starts workers (worker.py), kills and replaces them at random moments if asked for, shows
how it goes (view.py), and at the end prints what was done and proven (proof.py). The
directory is only read: the list forgets it once it is loaded, so nothing that a worker defines or
removes reaches it. The list is in a memfd or, given a URL, beside the list that this names; for
several hosts, or a server that is killed too, on a server of its own (cluster.py). Nothing is left
behind, neither files nor lists nor processes.

With kills the storm ends quietly: all workers but one are killed and not replaced, and the one must
get on. A storm that stays busy never shows a lost wake-up.

Nothing waits for ever. A wait for a lock has a time-out that names the holder; a worker that makes
no progress is reported, with what it was doing and who holds the list, and killed. This process
starts no threads, so forking it is safe. Ctrl-C is looked at where nothing is half done (`_CtrlC`).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import threading
import time
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec
from rich.console import Console

from .. import config, opening
from ..errors import INTERRUPTED, ShmDomainsError
from ..memory.domain_list import DomainList
from . import cluster, proof, worker
from .journal import OWN, Journal, Page, Plan, Word, separator_for
from .view import View

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

    from ..opening import AnyDomainList

LOCK_TIMEOUT = 20.0  # seconds; recovering the indexes of a million domains is part of a wait
PROOF_TIMEOUT = 5.0
STALL = 45.0  # seconds without a finished operation
START_DEADLINE = 60.0
MEAN_LIFE = 0.1  # seconds that a worker works until it is killed, on average, beside its start
MEAN_LIFE_PER_DOMAIN = 2e-6
QUIET_STEPS = 200  # what the last worker still has to do once the others are dead
TICK = 0.05
BATCH = 1000  # clones per hold of the list lock
HOST_DEATHS = 0.1  # of the kills of workers on several hosts, those that kill all of one host


def run(
    config_dir: Path,
    *,
    workers: int = 4,
    seconds: float = 5,
    kill: bool = False,
    start: str = "fork",
    lock: str = "robust",
    domains: int | None = None,
    url: str | None = None,
    hosts: int = 1,
    kill_server: bool = False,
    console: Console,
) -> int:
    """Stress a list of the domains in `config_dir`; return the exit status.

    0: everything that was to be proven holds. 1: something is lost, torn or stuck, a worker failed,
    or nothing could be loaded. 130: interrupted by Ctrl-C, and nothing was wrong as far as it went.

    `seconds` is the length of the storm; `start` is ``"fork"``, ``"spawn"`` or ``"forkserver"``,
    `lock` ``"robust"`` or ``"multiprocessing"``; `domains` clones the loaded domains up to so many;
    `url` is of a list on another store, beside which the list of the storm is made. The workers are
    on so many `hosts`; with `kill`, now and then all of one host are killed at once. `kill_server`
    kills the server, too, and starts it again. Both take a server of their own without a `url`.
    """
    if min(workers, hosts) < 1 or not 0 < seconds < math.inf or (domains or 0) < 0:
        raise ValueError("workers, hosts and seconds are more than 0, domains is not negative")
    if kill_server and url is not None:
        raise ValueError("a server that others may use is not killed")
    view = View(console)
    context = multiprocessing.get_context(start)
    server: cluster.Server | None = None
    try:
        try:
            if url is None and (hosts > 1 or kill_server):
                server = cluster.Server()
                url = server.url
            doms, plan = _load(config_dir, workers, lock, domains, url, context, view)
        except (ShmDomainsError, OSError) as exc:
            view.say(f"stress: {exc}", "red")
            return 1
        plan = msgspec.structs.replace(plan, hosts=hosts, server_dies=kill_server)
        where = f"{lock} locks" if url is None else opening.shown(url)
        view.say(_announcement(plan, start, where, seconds, kill), "bold")
        try:
            dying = server if kill_server else None
            return _storm_and_prove(doms, plan, context, seconds, kill, dying, view)
        finally:
            _discard(doms)
    except KeyboardInterrupt:  # while loading or printing; the rest sees to it itself
        view.say("stress: interrupted", "yellow")
        return INTERRUPTED
    finally:
        if server is not None:
            server.end()


def _announcement(plan: Plan, start: str, where: str, seconds: float, kill: bool) -> str:
    workers, hosts = plan.workers, plan.hosts
    text = f"{plan.domains:,} domains, {workers} worker{'s' if workers > 1 else ''} "
    text += f"on {hosts} hosts " if hosts > 1 else ""
    text += f"({start}, {where}), {seconds:g} s"
    text += ", killed at random moments" if kill else ""
    return text + (", and so is the server" if plan.server_dies else "")


def _storm_and_prove(
    doms: AnyDomainList,
    plan: Plan,
    context: BaseContext,
    seconds: float,
    kill: bool,
    server: cluster.Server | None,
    view: View,
) -> int:
    journal = Journal(plan.workers, plan.domains, seconds)
    try:
        storm = _Storm(doms, journal, plan, context, view, kill, server)
        storm.run(seconds)
        with view.progress("proving") as show:
            timeout = min(PROOF_TIMEOUT, plan.lock_timeout)
            findings, cut_short = proof.prove(doms, journal, plan, timeout, show)
    finally:
        journal.close()
    view.table(journal, max(storm.elapsed, 0.001))  # Ctrl-C may have come before anything began
    view.say(storm.summary)
    for finding in findings:
        view.finding(finding)
    view.failures(storm.failures)
    if storm.interrupted or cut_short:
        view.say("interrupted; this is what was proven so far", "yellow")
    if storm.failures or not all(finding.holds for finding in findings):
        return 1
    return INTERRUPTED if storm.interrupted or cut_short else 0


# --- loading --------------------------------------------------------------------------------


def _load(
    config_dir: Path,
    workers: int,
    lock: str,
    domains: int | None,
    url: str | None,
    context: BaseContext,
    view: View,
) -> tuple[AnyDomainList, Plan]:
    files = config.scan(config_dir)
    if not files:
        raise FileNotFoundError(f"{config_dir} holds no *.xml file")
    need = max(len(files), domains or 0) + workers * OWN + 8
    doms: AnyDomainList
    if url is None:
        doms = DomainList(
            max_domains=need,
            max_bytes=_room_for(files, need),
            lock=cast(Literal["robust", "multiprocessing"], lock),
            context=context,
        )
    else:
        url = opening.beside(url, f"stress-{os.urandom(6).hex()}")
        doms = opening.create(url)
    try:
        loaded = _load_files(doms, config_dir, view)
        plan = Plan(
            tag=os.urandom(6),
            loaded=loaded,
            domains=max(len(loaded), domains or 0),
            workers=workers,
            separator=separator_for([name for _, name in loaded]),
            lock_timeout=LOCK_TIMEOUT,
            url=url or "",
        )
        _clone(doms, plan, view)
    except BaseException:
        _discard(doms)
        raise
    return doms, plan


def _discard(doms: AnyDomainList) -> None:
    with doms:
        doms.unlink(force=True)  # a memfd has no name


def _room_for(files: list[Path], count: int) -> int | None:
    """Bytes for definitions that are larger than usual; ``None``: the default will do."""
    average = sum(file.stat().st_size for file in files) / len(files)
    return None if average <= 4096 else max(count * int(16_384 + 4 * average), 256 << 20)


def _load_files(doms: AnyDomainList, config_dir: Path, view: View) -> list[tuple[bytes, str]]:
    with view.progress(f"loading {config_dir}") as show:
        report = doms.load_all_configs(config_dir, progress=show)
    # The directory is the user's: what the workers define and remove must not reach it.
    doms.forget_configs()
    for failure in report.failures[: proof.EXAMPLES]:
        view.say(f"not loaded: {failure}", "yellow")
    if not report.loaded:
        raise FileNotFoundError(f"no domain of {config_dir} could be loaded")
    return [(info.uuid.bytes, info.name) for info in doms.snapshot(definitions=False)]


def _clone(doms: AnyDomainList, plan: Plan, view: View) -> None:
    first = len(plan.loaded)
    if first == plan.domains:
        return
    originals = [info.definition for info in doms.snapshot()]
    with view.progress(f"cloning up to {plan.domains:,} domains") as show:
        for begin in range(first, plan.domains, BATCH):
            with doms.locked():
                for target in range(begin, min(begin + BATCH, plan.domains)):
                    clone = originals[target % first].replace(
                        uuid=plan.uuid_of(target), name=plan.name_of(target)
                    )
                    doms.assign_def(clone, True).unlock()
            show(min(begin + BATCH, plan.domains) - first, plan.domains - first)


# --- the storm ------------------------------------------------------------------------------


class _Post:
    """A worker's place: one process after the other."""

    def __init__(self, number: int, page: Page) -> None:
        self.number = number
        self.page = page
        self.process: BaseProcess | None = None
        self.started = 0.0
        self.readies = 0
        self.kill_at = math.inf
        self.killed = False
        self.steps = 0
        self.idle = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether this process got to work."""
        return self.page.words[Word.READY] > self.readies

    @property
    def label(self) -> str:
        pid = "" if self.process is None else f" (process {self.process.pid})"
        return f"worker {self.number}{pid}"


class _CtrlC:
    """Ctrl-C during the storm: kept until it is asked for, at a moment when nothing is half done.

    Python would raise it between any two instructions. Between the `waitpid` that reaps a worker
    and multiprocessing's note of it, for one: then that worker never ends for us, and its number,
    which is free, is what the next signal goes to. A context manager; in another thread than the
    main one, and where Ctrl-C is ignored, it does nothing.
    """

    def __init__(self) -> None:
        self._handler: Any = None  # whose place we take
        self._kept: tuple[Any, ...] | None = None

    def __enter__(self) -> _CtrlC:
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._handler = before
            signal.signal(signal.SIGINT, self._keep)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self.look()

    def _keep(self, *call: object) -> None:
        self._kept = call

    def look(self) -> None:
        """If it came: do what would have been done then, which is to raise `KeyboardInterrupt`."""
        call, self._kept = self._kept, None
        if call is not None:
            self._handler(*call)


class _Storm:
    """The workers, from the first start to the last end."""

    def __init__(
        self,
        doms: AnyDomainList,
        journal: Journal,
        plan: Plan,
        context: BaseContext,
        view: View,
        kill: bool,
        server: cluster.Server | None = None,
    ) -> None:
        self._doms = doms
        self._journal = journal
        self._plan = plan
        self._context = context
        self._view = view
        self._kill = kill
        self._server = server
        self._replacing = True
        self._posts = [_Post(number, page) for number, page in enumerate(journal.pages)]
        self._began = 0.0
        self._ticked = time.monotonic()
        self._ctrl_c = _CtrlC()
        self.elapsed = 0.0
        self.kills = self.host_deaths = 0
        self.interrupted = False
        self.failures: list[str] = []

    def run(self, seconds: float) -> None:
        """Let it blow for so long. Ctrl-C ends it early, and in order."""
        try:
            with self._ctrl_c:
                self._run(seconds)
        except KeyboardInterrupt:  # it came when all was over but the last look
            self.interrupted = True

    def _run(self, seconds: float) -> None:
        try:
            with self._view.progress("storm") as show:
                self._gather()
                self._blow(seconds, show)
                self._calm_down()
        except KeyboardInterrupt:
            self.interrupted = True
            self._view.say("interrupted; the workers finish what they do", "yellow")
        finally:
            self._end()

    @property
    def _living(self) -> list[_Post]:
        return [post for post in self._posts if post.process is not None]

    def _gather(self) -> None:
        """Start the workers, and the clock once all of them got to work."""
        start = self._context.get_start_method()
        if start == "forkserver":
            self._context.set_forkserver_preload([worker.__name__])
        if start != "fork":
            # Its own start unblocks SIGINT, which `_start` wants blocked while a child begins.
            resource_tracker.ensure_running()
        self._began = time.monotonic()
        for post in self._posts:
            self._start(post)
        while not all(post.is_ready for post in self._living) and not self.failures:
            self._tick(TICK)
        self._began = time.monotonic()

    def _blow(self, seconds: float, show: proof.Progress) -> None:
        end = self._began + seconds
        if self._kill:
            for post in self._living:
                self._choose_end_of(post)
        if self._server is not None:
            self._server.choose_end()
        while (now := time.monotonic()) < end and self._living and not self.failures:
            next_kill = min(post.kill_at for post in self._living)
            self._tick(max(min(next_kill - now, end - now, TICK), 0))
            self._view.note = self._state_of_things()
            show(int(min(now - self._began, seconds) * 1000), int(seconds * 1000))

    def _calm_down(self) -> None:
        """Kill all but one; what they held, and whom they should have woken, must not stop it."""
        self._replacing = False
        self.elapsed = time.monotonic() - self._began
        self._spare_server()
        ready = [post for post in self._living if post.is_ready]
        if not self._kill or len(self._living) < 2 or not ready or self.failures:
            return
        survivor = random.choice(ready)
        for post in self._living:
            post.kill_at = math.inf
        for post in self._living:
            if post is not survivor:
                self._tick(random.random() * 0.01)
                self._kill_worker(post)
        goal = survivor.page.words[Word.STEPS] + QUIET_STEPS
        while survivor.process and survivor.page.words[Word.STEPS] < goal and not self.failures:
            self._tick(TICK)

    def _end(self) -> None:
        """Stop and reap every worker; kill what does not stop."""
        self._replacing = False
        self.elapsed = self.elapsed or time.monotonic() - self._began
        self._spare_server()
        self._journal.stop()
        for post in self._posts:
            post.kill_at = math.inf
        try:
            while self._living:
                self._tick(TICK)
        except KeyboardInterrupt:
            self.interrupted = True
        for post in self._living:
            self._kill_worker(post)
        for post in self._living:
            cast("BaseProcess", post.process).join()
            self._reap(post)

    def _spare_server(self) -> None:
        if self._server is not None:
            self._server.spare()

    # --- one worker ---

    def _start(self, post: _Post) -> None:
        # Ctrl-C reaches the whole foreground group. A child begins with it blocked, and ignores it
        # as soon as it runs code of ours.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = self._context.Process(  # type: ignore[attr-defined]
                target=worker.work,
                args=(self._doms, self._journal, self._plan, post.number, random.getrandbits(64)),
                daemon=True,
            )
            post.readies = post.page.words[Word.READY]
            post.killed = False
            post.idle = 0.0
            post.kill_at = math.inf
            process.start()
            post.process = process
            post.started = time.monotonic()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _choose_end_of(self, post: _Post) -> None:
        # Where a start takes long (spawn), or rebuilding the index that a dead holder of the list
        # lock left (a million domains: half a second), workers live longer: else nothing gets done.
        now = time.monotonic()
        life = MEAN_LIFE + (now - post.started) + self._plan.domains * MEAN_LIFE_PER_DOMAIN
        post.kill_at = now + random.expovariate(1 / life)

    def _kill_worker(self, post: _Post) -> None:
        if post.process is not None and not post.killed:
            post.killed = True
            post.process.kill()

    def _kill_host_of(self, post: _Post) -> None:
        self.host_deaths += 1
        for other in self._living:
            if (other.number - post.number) % self._plan.hosts == 0:
                self._kill_worker(other)

    def _reap(self, post: _Post) -> None:
        """Take note of a process that ended, and put another in its place if it was killed."""
        process = post.process
        if process is None or process.exitcode is None:
            return
        label = post.label
        code = process.exitcode
        post.process = None
        process.join()
        process.close()
        if post.killed and code == -signal.SIGKILL:
            self.kills += 1
            if self._replacing:
                self._start(post)
                if random.random() < 0.05:  # some die while they attach
                    post.kill_at = time.monotonic() + random.random() * 0.02
            return
        self._judge(post, label, code)

    def _judge(self, post: _Post, label: str, code: int) -> None:
        if code == 0:
            if not self._journal.stopped:
                self.failures.append(f"{label} ended by itself")
        elif code < 0:
            name = signal.Signals(-code).name
            by_whom = ", and not by us: out of memory?" if code == -signal.SIGKILL else ""
            self.failures.append(f"{label} died of {name}{by_whom}; it was at: {post.page.doing}")
        elif post.page.text or not self.interrupted:
            self.failures.append(f"{label}: {post.page.text or f'exit status {code}'}")

    # --- all of them ---

    def _tick(self, timeout: float) -> None:
        """Wait a little for something to happen, and see to it. The only place where Ctrl-C is
        raised."""
        self._ctrl_c.look()
        sentinels = [cast("BaseProcess", post.process).sentinel for post in self._living]
        if sentinels:
            connection.wait(sentinels, timeout)
        now = time.monotonic()
        # A pause of ours - a stopped process group, a machine asleep - is not a worker's idleness.
        passed = min(now - self._ticked, 5 * TICK)
        self._ticked = now
        for post in self._living:
            self._reap(post)
        if self._server is not None:
            self._server.look(self._context)
        for post in self._living:
            self._look_after(post, now, passed)
        self._view.refresh()

    def _look_after(self, post: _Post, now: float, passed: float) -> None:
        if post.killed:
            return
        if post.kill_at <= now:
            self._kill_worker(post)
            if self._plan.hosts > 1 and random.random() < HOST_DEATHS:
                self._kill_host_of(post)
            return
        steps = post.page.words[Word.STEPS]
        if not post.is_ready:
            post.idle += passed
            if post.idle > START_DEADLINE:
                self._report_stall(post, "has not got to work")
        elif steps != post.steps:
            post.steps = steps
            post.idle = 0.0
            if self._kill and self._replacing and post.kill_at == math.inf:
                self._choose_end_of(post)
        else:
            post.idle += passed
            if post.idle > STALL:
                self._report_stall(post, f"has been busy to {post.page.doing}")

    def _report_stall(self, post: _Post, what: str) -> None:
        if post.killed:
            return
        others = "; ".join(
            f"{other.label}: {other.page.doing}" for other in self._living if other is not post
        )
        self.failures.append(
            f"{post.label} {what} for {post.idle:.0f} s; {self._list_holder()}; {others}"
        )
        self._replacing = False
        self._kill_worker(post)

    def _list_holder(self) -> str:
        try:
            with self._doms.locked(0):
                return "the list lock is free"
        except ShmDomainsError as exc:
            return str(exc)

    def _total(self, word: Word) -> int:
        return sum(page.words[word] for page in self._journal.pages)

    def _state_of_things(self) -> str:
        elapsed = max(time.monotonic() - self._began, 0.001)
        text = f"{self._total(Word.STEPS) / elapsed:,.0f} operations/s"
        if self._kill:
            text += f", {self.kills:,} kills, {self._total(Word.RECOVERIES):,} recoveries"
        if self._server is not None:
            text += f", server killed {_times(self._server.kills)}"
        return text

    @property
    def summary(self) -> str:
        """Kills and what followed from them, in a line."""
        text = f"{self._total(Word.MISSES):,} look-ups of what was gone meanwhile"
        if self._kill:
            text = (
                f"{self.kills:,} kills, {self._total(Word.RECOVERIES):,} recoveries (a domain was "
                f"taken over from a dead worker), {text}"
            )
        if self._plan.hosts > 1:
            text += f"\n{self._by_host}"
        if self._server is not None:
            lost, doubted, away = map(self._total, (Word.LOST, Word.DOUBTED, Word.AWAY))
            text += (
                f"\nserver killed {_times(self._server.kills)}: {lost:,} operations lost their "
                f"locks, {doubted:,} were in doubt, {away:,} found it away"
            )
        return text

    @property
    def _by_host(self) -> str:
        hosts = self._plan.hosts
        steps = [0] * hosts
        for post in self._posts:
            steps[post.number % hosts] += post.page.words[Word.STEPS]
        words = [f"{cluster.host_of(at, hosts)} {count:,}" for at, count in enumerate(steps)]
        died = f"; all workers of a host died at once {_times(self.host_deaths)}"
        return f"operations: {', '.join(words)}{died * self._kill}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"
