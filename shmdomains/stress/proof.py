"""The proof at the end of a stress run: what the journal says against what the list holds.

Each `Finding` is one promise of the package. Everything is looked at through the public interface,
first without locks, as committed, then again under each domain's lock: taking it over from a dead
holder must not change what is committed. The workers are gone by then, so nothing moves.

A lock that nobody alive holds and that cannot be had within its time-out is *stuck*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from ..errors import Busy, LockTimeout, ShmDomainsError
from .journal import (
    OWN,
    Intent,
    Journal,
    Mark,
    Page,
    Plan,
    Word,
    Wrong,
    patient_peek,
    settle,
    verify,
)

if TYPE_CHECKING:
    from ..opening import AnyDomainList

EXAMPLES = 10  # problems that are shown of one finding
BATCH = 1000  # domains between two reports of progress

Progress = Callable[[int, int], None]


class Finding(msgspec.Struct):
    """One promise: what was looked at, and what contradicts it."""

    claim: str
    detail: str = ""
    problems: list[str] = []
    complete: bool = True

    @property
    def holds(self) -> bool:
        return not self.problems

    def blame(self, problem: str) -> None:
        self.problems.append(problem)


class _Expected(msgspec.Struct, frozen=True):
    """A domain that has to exist, and how often each worker acknowledged to have changed it."""

    uuid: bytes
    names: tuple[str, ...]
    changes: tuple[int, ...]
    doubtful: int | None = None  # the worker whose last change could not be settled


class Proof:
    """All findings about one run; `prove` fills them in, and may be interrupted."""

    def __init__(self, doms: AnyDomainList, journal: Journal, plan: Plan, timeout: float) -> None:
        self._doms = doms
        self._journal = journal
        self._plan = plan
        self._timeout = timeout
        self._doubtful_defines = 0
        self._changes = 0
        self._active: list[int] = []
        self.lost = Finding("every acknowledged change is there, and no other")
        self.exist = Finding("exactly the domains exist that should")
        self.torn = Finding("no record is torn")
        self.indexes = Finding("names, uuids and ids lead to the same domains")
        self.ids = Finding("no id was given out twice")
        self.locks = Finding("nothing stays locked")
        self.invariants = Finding("every invariant of the list holds")
        self.findings = [
            self.lost,
            self.exist,
            self.torn,
            self.indexes,
            self.ids,
            self.locks,
            self.invariants,
        ]
        for finding in self.findings:
            finding.complete = False

    def prove(self, progress: Progress | None = None) -> None:
        """Look at everything. An interrupt leaves what was not finished marked as such."""
        self._settle()
        total = self._plan.domains + self._plan.workers * OWN
        expected = existing = 0
        for done, one in enumerate(self._all_expected()):
            if progress is not None and done % BATCH == 0:
                progress(done, total)
            expected += 1
            existing += self._prove_domain(one)
        self._finish_domains(expected, existing)
        self._prove_ids()
        self._prove_list_lock(expected)
        self._prove_invariants()

    # --- what should be ---

    def _settle(self) -> None:
        for worker in range(self._plan.workers):
            try:
                settle(self._doms, self._journal, self._plan, worker, self._timeout)
            except Wrong as exc:
                self._blame(exc)
            except (Busy, LockTimeout) as exc:
                self._stuck(f"what worker {worker} was doing cannot be settled: {exc}")

    def _all_expected(self) -> Iterator[_Expected]:
        plan, pages = self._plan, self._journal.pages
        in_doubt = {
            page.words[Word.TARGET]: worker
            for worker, page in enumerate(pages)
            if page.words[Word.INTENT] == Intent.CHANGE and page.words[Word.TARGET] < plan.domains
        }
        for target in range(plan.domains):
            yield _Expected(
                plan.uuid_of(target),
                (plan.name_of(target),),
                tuple(page.acked[target] for page in pages),
                in_doubt.get(target),
            )
        for worker, page in enumerate(pages):
            yield from self._expected_own(worker, page)

    def _expected_own(self, worker: int, page: Page) -> Iterator[_Expected]:
        """What a worker defined itself, and has not removed or been about to remove."""
        plan = self._plan
        intent, target = page.words[Word.INTENT], page.words[Word.TARGET]
        if intent in (Intent.DEFINE, Intent.REMOVE):
            self._doubtful_defines += 1
        for place in range(OWN):
            serial, renames = page.own(place)
            if not serial or (intent == Intent.REMOVE and place == target):
                continue
            numbers = [renames, renames + 1] if intent == Intent.RENAME else [renames]
            changes = [0] * plan.workers
            changes[worker] = page.acked[plan.domains + place]
            doubtful = intent == Intent.CHANGE and target == plan.domains + place
            yield _Expected(
                plan.own_uuid(worker, serial),
                tuple(plan.own_name(worker, serial, number) for number in numbers),
                tuple(changes),
                worker if doubtful else None,
            )

    # --- what is ---

    def _prove_domain(self, expected: _Expected) -> bool:
        uuid = expected.uuid
        try:
            info = patient_peek(self._doms, uuid, self._timeout)
            if info is None:
                self.exist.blame(f"{expected.names[0]!r} {UUID(bytes=uuid)} is missing")
                return False
            if info.name not in expected.names:
                self.exist.blame(f"{expected.names[0]!r} {info.uuid} is called {info.name!r}")
            mark = verify(info, self._plan.workers)
            self._compare(info.name, mark, expected)
            self._prove_indexes(info.name, uuid, mark.id)
            self._prove_lock(info.name, uuid, mark)
        except Wrong as exc:
            self._blame(exc)
        except Busy as exc:
            self._stuck(f"{expected.names[0]!r} cannot be read: {exc}")
        except LockTimeout as exc:
            self._stuck(str(exc))
        except ShmDomainsError as exc:
            self.invariants.blame(f"{expected.names[0]!r}: {type(exc).__name__}: {exc}")
        return True

    def _compare(self, name: str, mark: Mark, expected: _Expected) -> None:
        for worker, (found, noted) in enumerate(zip(mark.by, expected.changes, strict=True)):
            if found == noted or (worker == expected.doubtful and found == noted + 1):
                continue
            self.lost.blame(
                f"{name!r} has {found} changes by worker {worker}, which acknowledged {noted}"
            )
        self._changes += mark.count

    def _prove_indexes(self, name: str, uuid: bytes, id: int) -> None:
        keys: list[dict[str, Any]] = [{"name": name}]
        if id != -1:
            keys.append({"id": id})
            self._active.append(id)
        for key in keys:
            info = self._doms.peek(**key, definitions=True)
            if info is None or info.uuid.bytes != uuid:
                found = "nothing" if info is None else f"{info.name!r} {info.uuid}"
                self.indexes.blame(f"{key} should lead to {name!r} {UUID(bytes=uuid)}, not {found}")

    def _prove_lock(self, name: str, uuid: bytes, mark: Mark) -> None:
        if len(self.locks.problems) >= EXAMPLES:
            self._timeout = min(self._timeout, 0.02)  # it is settled; only count the others
        dom = self._doms.lookup(uuid=uuid, timeout=self._timeout)
        if dom is None:
            self.indexes.blame(f"{name!r} {UUID(bytes=uuid)} was seen and cannot be locked")
            return
        with dom:
            if dom.previous_owner_died is not None:
                self._journal.pages[0].add(Word.RECOVERIES)
            if verify(dom, self._plan.workers) != mark:
                self.lost.blame(f"{name!r} changed when its lock was taken over")

    # --- the whole ---

    def _finish_domains(self, expected: int, existing: int) -> None:
        plan = self._plan
        count = self._doms.count()
        if not existing <= count <= existing + self._doubtful_defines:
            self.exist.blame(f"there are {count} domains, and {existing} of those that should be")
            self._name_strangers()
        own = expected - plan.domains
        self._say(
            self.exist,
            f"{len(plan.loaded):,} loaded, {plan.domains - len(plan.loaded):,} cloned, "
            f"{own:,} left of those that the workers defined",
        )
        flight, kept = (
            sum(p.words[w] for p in self._journal.pages) for w in (Word.IN_DOUBT, Word.KEPT)
        )
        doubts = f"; of {flight} in flight at a kill {kept} were kept" if flight else ""
        self._say(self.lost, f"{self._changes:,} changes in {existing:,} domains{doubts}")
        reads = sum(page.words[Word.READS] for page in self._journal.pages)
        self._say(self.torn, f"{reads:,} reads while it ran, {2 * existing:,} after it")
        self._say(self.indexes, f"{existing:,} names and uuids, {len(self._active):,} active ids")

    def _name_strangers(self) -> None:
        known = {one.uuid for one in self._all_expected()}
        strangers = [
            f"{info.name!r} {info.uuid} should not exist"
            for info in self._doms.snapshot(definitions=False)
            if info.uuid.bytes not in known
        ]
        self.exist.problems.extend(strangers[:EXAMPLES])

    def _prove_ids(self) -> None:
        logs = [page.ids[: page.words[Word.IDS]] for page in self._journal.pages]
        total = sum(len(log) for log in logs)
        # Ids count up from the list's creation; killed workers took a few that nobody noted.
        seen = bytearray(4 * total + 1_000_000)
        for id in (id for log in logs for id in log):
            if id >= len(seen):
                self.ids.blame(f"id {id} is far beyond the {total} that were given out")
            elif seen[id]:
                self.ids.blame(f"id {id} was given out twice")
            else:
                seen[id] = 1
        for id in self._active:
            if id >= len(seen) or not seen[id]:
                self.ids.blame(f"id {id} is in use, and nobody noted that it was given out")
        self._say(self.ids, f"{total:,} ids")

    def _prove_list_lock(self, expected: int) -> None:
        try:
            with self._doms.locked(self._timeout):
                pass
        except LockTimeout as exc:
            self._stuck(str(exc))
        self._say(self.locks, f"the list and {expected:,} domains were locked once more")

    def _prove_invariants(self) -> None:
        counts: dict[str, int] = {}
        try:
            report = self._doms.check(self._timeout)
            counts = report.counts
            self.invariants.problems.extend(f"{name}: {what}" for name, what in report.problems)
            for name, why in report.unsettled:
                self._stuck(f"check: {name}: {why}")
        except LockTimeout as exc:
            self._stuck(f"check: {exc}")
        looked_at = ", ".join(f"{number:,} {what}" for what, number in counts.items())
        self._say(self.invariants, looked_at)

    # --- saying it ---

    def _say(self, finding: Finding, detail: str) -> None:
        finding.detail = detail
        finding.complete = True

    def _blame(self, exc: Wrong) -> None:
        finding = self.torn if str(exc).startswith("torn") else self.lost
        finding.blame(str(exc))

    def _stuck(self, what: str) -> None:
        self.locks.blame(what)


def prove(
    doms: AnyDomainList,
    journal: Journal,
    plan: Plan,
    timeout: float,
    progress: Progress | None = None,
) -> tuple[list[Finding], bool]:
    """Return all findings, and whether Ctrl-C cut the proof short."""
    proof = Proof(doms, journal, plan, timeout)
    with suppress(KeyboardInterrupt):
        proof.prove(progress)
        return proof.findings, False
    return proof.findings, True
