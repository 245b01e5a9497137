"""Extents, the map of used cells, and the commit of a slot (I2, I3; heap.c, record.c).

Claims, in every state:
- The descriptor that counts in a living slot names an extent that holds what was committed, whole.
- While nobody holds the heap lock (and nobody died with it), no cell is named by two descriptors,
  the map is what the descriptors say, and so is the count of used cells.
- While nobody holds a slot's lock and its `dirty` is 0, the slot names nothing but what counts.
- A reader without a lock, if it finds `life` and `cur` as before after reading the fields, and
  `life` and the blob's version as before after reading the blob, has read fields that one `cur`
  committed, and the blob that belongs to them.

A slot has one blob here. A commit writes: `dirty` 0 and the uncounted descriptors cleared, the
spare descriptor, the map, the count; (heap lock freed) the cells; the spare field copy (which
descriptor counts, the blob's version, the `cur` that it is written for); `cur`; `dirty` 1; under
the heap lock again the old descriptor cleared, the map, the count, `dirty` 0. A commit of fields
only writes the spare copy and `cur`. `life` is odd while a domain lives in the slot, and never the
same for two of them. The cells of a blob hold (slot, version), version being the `cur` that brings
it in, so that every byte says where it belongs.
"""

from __future__ import annotations

from typing import Any

from .explorer import BUSY, DIED, FREE, Memory, Model, Steps, Word
from .operations import after_all, attempt, call, consistent, fail, load, lock, store, unlock
from .subject import Subject, process

RULES = {
    "named at once": "an extent is named by a descriptor before the heap lock is freed",
    "one word": "a descriptor is one word: cell and length change together",
    "uncounted kept": "a rebuild of the map keeps extents that do not count (yet)",
    "count rebuilt": "a rebuild counts the used cells anew",
    "spare descriptor": "a blob is written where no descriptor that counts leads",
    "fill, then flip": "a blob is written before `cur` lets it count",
    "copy, then flip": "the spare field copy is written before `cur` lets it count",
    "flip, then free": "the old extent is freed after the store of `cur`, never above it",
    "insert frees": "an insert frees what a dead predecessor left before it allocates",
    "insert commits last": "`life` is stored after all else of an insert",
    "death tidies": "who finds a dead holder marks the slot dirty and frees its garbage",
    "commit tidies": "who leaves garbage marks the slot dirty before it tries the heap lock",
    "dirty remembered": "a commit frees first what an earlier one could not",
    "counter": "a reader compares the whole of `cur`, not only which copy counts",
    "look again": "a reader looks at life and `cur` again after it has read the fields",
    "version again": "a reader looks at life and version again after it has read a blob",
}

UNNEEDED = {
    "descriptor, then map": "an extent is named before the map says that it is used",
    "clear, then map": "a descriptor is cleared before the map says that its cells are free",
}
"""Orders that the code keeps although the claims hold without: a death between the two stores
leaves the heap lock dead, and the rebuild asks the descriptors alone."""

Extent = tuple[int, int] | None  # first cell, cells
HEAP = "heap lock"


class Heap(Subject):
    """Slots over a few cells. The first `free` are FREE; the others have a blob of one cell."""

    rules = RULES | UNNEEDED

    def __init__(
        self, slots: int = 2, cells: int = 4, width: int = 64, free: int = 0, dropped: str = ""
    ):
        super().__init__(dropped)
        self.slots, self.cells, self.width, self.free_slots = slots, cells, width, free

    def words(self) -> dict[Word, Any]:
        free = self.free_slots
        words: dict[Word, Any] = {"used": self.slots - free}
        for w in range(0, self.cells, self.width):
            words["map", w] = frozenset(range(max(w, free), min(self.slots, w + self.width)))
        for slot in range(self.slots):
            words.update({("life", slot): int(slot >= free), ("cur", slot): 0, ("dirty", slot): 0})
            words.update({("copy", slot, 0): (0, 0, 0), ("copy", slot, 1): (0, 0, 0)})
            words.update({("extent", slot, 0): (slot, 1) if slot >= free else None})
            words["extent", slot, 1] = None
        for cell in range(self.cells):
            words["cell", cell] = (cell, 0)
        return words

    def locks(self) -> list[Word]:
        return [HEAP, *self.slot_locks()]

    # --- the heap ---

    def lock_heap(self) -> Steps:
        yield from self.entered((yield lock(HEAP)))

    def entered(self, outcome: str) -> Steps:
        if outcome == DIED:
            yield call(self.rebuild)
            yield consistent(HEAP)

    def rebuild(self) -> Steps:
        """sd_rebuild_heap: the map and the count, from descriptors alone."""
        yield from self.empty_map()
        used = 0
        for slot in range(self.slots):
            for which in (0, 1):
                kept = yield call(self.kept, slot, which)
                if kept:
                    yield call(self.mark, kept, True)
                    used += kept[1]
        if self.follows("count rebuilt"):
            yield store("used", used)

    def empty_map(self) -> Steps:
        for w in range(0, self.cells, self.width):
            if (yield load(("map", w))):
                yield store(("map", w), frozenset())

    def kept(self, slot: int, which: int) -> Steps:
        extent = yield load(("extent", slot, which))
        if not extent or self.follows("uncounted kept"):
            return extent
        counting = yield call(self.counting, slot)
        if which == counting[0]:
            return extent
        yield store(("extent", slot, which), None)
        return None

    def mark(self, extent: tuple[int, int], used: bool) -> Steps:
        cells = frozenset(range(extent[0], extent[0] + extent[1]))
        for w in range(0, self.cells, self.width):
            bits = cells & frozenset(range(w, w + self.width))
            if bits:
                word = yield load(("map", w))
                yield store(("map", w), word | bits if used else word - bits)

    def find_room(self, size: int) -> Steps:
        used: set[int] = set()
        for w in range(0, self.cells, self.width):
            used |= yield load(("map", w))
        for first in range(self.cells - size + 1):
            if used.isdisjoint(range(first, first + size)):
                return first
        return None

    def allocate(self, slot: int, which: int, size: int) -> Steps:
        first = yield call(self.find_room, size)
        if first is None:
            return None
        if not self.follows("named at once"):
            yield call(self.mark, (first, size), True)
        elif self.follows("descriptor, then map"):
            yield call(self.name_extent, slot, which, (first, size))
            yield call(self.mark, (first, size), True)
        else:
            yield call(self.mark, (first, size), True)
            yield call(self.name_extent, slot, which, (first, size))
        yield call(self.add, "used", size)
        return first, size

    def name_extent(self, slot: int, which: int, extent: tuple[int, int]) -> Steps:
        if not self.follows("one word"):
            # The cell first; the length that stood there may be of a longer extent.
            yield store(("extent", slot, which), (extent[0], 2))
        yield store(("extent", slot, which), extent)

    def free(self, slot: int, which: int) -> Steps:
        extent = yield load(("extent", slot, which))
        if not extent:
            return
        if self.follows("clear, then map"):
            yield store(("extent", slot, which), None)
            yield call(self.mark, extent, False)
        else:
            yield call(self.mark, extent, False)
            yield store(("extent", slot, which), None)
        yield call(self.add, "used", -extent[1])

    # --- a slot ---

    def lock_slot(self, slot: int) -> Steps:
        """sd_slot_lock, but for who died: see `slots`."""
        if (yield lock(("slot lock", slot))) == DIED:
            if self.follows("death tidies"):
                yield call(self.tidy, slot)
            yield consistent(("slot lock", slot))

    def counting(self, slot: int) -> Steps:
        """(which descriptor counts, its version), slot lock held."""
        cur = yield load(("cur", slot))
        return (yield load(("copy", slot, cur & 1)))

    def free_uncounted(self, slot: int) -> Steps:
        life = yield load(("life", slot))
        counts = (yield call(self.counting, slot))[0]
        for which in (0, 1):
            if not life & 1 or which != counts:
                yield call(self.free, slot, which)
        yield store(("dirty", slot), 0)

    def tidy(self, slot: int) -> Steps:
        """sd_tidy: whoever cannot have the heap lock leaves it to the next holder."""
        if self.follows("commit tidies"):
            yield store(("dirty", slot), 1)
        outcome = yield attempt(HEAP)
        if outcome == BUSY:
            return
        yield from self.entered(outcome)
        yield call(self.free_uncounted, slot)
        yield unlock(HEAP)

    def prepare(self, slot: int, which: int, size: int) -> Steps:
        """allocate_blobs: all uncounted descriptors freed, then the spare one used."""
        yield call(self.lock_heap)
        if self.follows("insert frees") or (yield load(("life", slot))) & 1:
            yield call(self.free_uncounted, slot)
        extent = yield call(self.allocate, slot, which, size)
        yield unlock(HEAP)
        if extent and not self.follows("named at once"):
            yield store(("extent", slot, which), extent)
        return extent is not None

    def fill(self, slot: int, which: int, version: int) -> Steps:
        extent = yield load(("extent", slot, which))
        if extent:
            for cell in range(extent[0], extent[0] + extent[1]):
                yield store(("cell", cell), (slot, version))

    def flip(self, slot: int, which: int, version: int) -> Steps:
        spare = ("copy", slot, version & 1)
        if self.follows("copy, then flip"):
            yield store(spare, (which, version, version))
            yield store(("cur", slot), version)
        else:
            yield store(("cur", slot), version)
            yield store(spare, (which, version, version))

    # --- processes ---

    @process
    def commit(self, slot: int, *sizes: int) -> Steps:
        """Hold the slot's lock and commit a blob of each of these sizes in turn; 0: fields only."""
        yield call(self.lock_slot, slot)
        if (yield load(("life", slot))) & 1:
            for size in sizes:
                yield call(*((self.commit_blob, slot, size) if size else (self.reflip, slot)))
        yield unlock(("slot lock", slot))

    def commit_blob(self, slot: int, size: int) -> Steps:
        version = (yield load(("cur", slot))) + 1
        old = (yield call(self.counting, slot))[0]
        if not self.follows("spare descriptor"):
            yield call(self.fill, slot, old, version)
            yield call(self.flip, slot, old, version)
        elif (yield call(self.prepare, slot, 1 - old, size)):
            yield call(self.change, slot, old, version)
        yield call(self.tidy, slot)

    def reflip(self, slot: int) -> Steps:
        cur = yield load(("cur", slot))
        which, version, _ = yield load(("copy", slot, cur & 1))
        yield store(("copy", slot, cur + 1 & 1), (which, version, cur + 1))
        yield store(("cur", slot), cur + 1)

    def change(self, slot: int, old: int, version: int) -> Steps:
        if not self.follows("flip, then free"):
            yield call(self.fill, slot, 1 - old, version)
            yield store(("copy", slot, version & 1), (1 - old, version, version))
            yield store(("extent", slot, old), None)
            yield store(("cur", slot), version)
        elif self.follows("fill, then flip"):
            yield call(self.fill, slot, 1 - old, version)
            yield call(self.flip, slot, 1 - old, version)
        else:
            yield call(self.flip, slot, 1 - old, version)
            yield call(self.fill, slot, 1 - old, version)

    @process
    def touch(self, slot: int) -> Steps:
        """A commit without a blob; it asks for the heap lock only to free what was left over."""
        yield call(self.lock_slot, slot)
        dirty = yield load(("dirty", slot))
        if dirty and self.follows("dirty remembered"):
            yield call(self.tidy, slot)
        elif dirty:
            yield store(("dirty", slot), 0)
        yield unlock(("slot lock", slot))

    @process
    def remove(self, slot: int) -> Steps:
        yield call(self.lock_slot, slot)
        life = yield load(("life", slot))
        yield store(("life", slot), (life | 1) + 1)
        yield call(self.tidy, slot)
        yield unlock(("slot lock", slot))

    @process
    def insert(self, slot: int, size: int) -> Steps:
        """Into a FREE slot (that nobody else picks it is the list lock's business: see `index`)."""
        yield call(self.lock_slot, slot)
        if not (yield load(("life", slot))) & 1:
            yield call(self.insert_blob, slot, size)
        yield unlock(("slot lock", slot))

    def insert_blob(self, slot: int, size: int) -> Steps:
        version = (yield load(("cur", slot))) + 1
        life = (yield load(("life", slot))) | 1
        which = 1 - (yield call(self.counting, slot))[0]
        if not (yield call(self.prepare, slot, which, size)):
            return
        if not self.follows("insert commits last"):
            yield store(("life", slot), life)
        yield call(self.fill, slot, which, version)
        yield call(self.flip, slot, which, version)
        if self.follows("insert commits last"):
            yield store(("life", slot), life)

    @process
    def read(self, slot: int) -> Steps:
        """sd_view_begin, the blob's bytes, sd_view_blobs_check."""
        life = yield load(("life", slot))
        cur = yield load(("cur", slot))
        if not life & 1:
            return
        which, version, written_for = yield load(("copy", slot, cur & 1))
        if self.follows("look again"):
            if (yield load(("life", slot))) != life:
                return
            if self.moved(cur, (yield load(("cur", slot)))):
                return
        if written_for != cur:
            yield fail(f"accepts the fields of {written_for} as those of {cur}")
        extent = yield load(("extent", slot, which))
        found = []
        for cell in range(extent[0], extent[0] + extent[1]) if extent else ():
            found.append((yield load(("cell", cell))))
        if self.follows("version again"):
            if (yield call(self.settled_version, slot)) != version:
                return
            if (yield load(("life", slot))) != life:
                return
        if not found or set(found) != {(slot, version)} or version > cur:
            yield fail(f"accepts {found} as version {version} of slot {slot} at {cur}")

    def settled_version(self, slot: int) -> Steps:
        return (yield from self.settled("copy", slot))[1]

    def moved(self, before: int, after: int) -> bool:
        return before != after if self.follows("counter") else (before ^ after) & 1 != 0

    def audit(self) -> Steps:
        yield after_all()
        yield call(self.lock_heap)
        yield unlock(HEAP)
        for slot in range(self.slots):
            yield call(self.lock_slot, slot)
            if (yield load(("dirty", slot))):
                yield call(self.tidy, slot)
            yield unlock(("slot lock", slot))

    # --- what must hold ---

    def claim(self, memory: Memory) -> str | None:
        for slot in range(self.slots):
            wrong = self.slot_claim(memory, slot)
            if wrong:
                return f"slot {slot}: {wrong}"
        return self.heap_claim(memory) if memory[HEAP] == FREE else None

    def slot_claim(self, memory: Memory, slot: int) -> str | None:
        life, cur = memory["life", slot], memory["cur", slot]
        which, version, written_for = memory["copy", slot, cur & 1]
        if memory["slot lock", slot] == FREE and not memory["dirty", slot]:
            for other in (0, 1):
                if memory["extent", slot, other] and not (life & 1 and other == which):
                    return "it is not dirty and names an extent that does not count"
        if not life & 1:
            return None
        if written_for != cur:
            return "the copy that counts is an older one"
        return self.blob_claim(memory, slot, which, version)

    def blob_claim(self, memory: Memory, slot: int, which: int, version: int) -> str | None:
        extent: Extent = memory["extent", slot, which]
        if not extent:
            return "the descriptor that counts names nothing"
        for cell in range(extent[0], extent[0] + extent[1]):
            if memory["cell", cell] != (slot, version):
                return f"version {version} is committed and cell {cell} holds something else"
        return None

    def heap_claim(self, memory: Memory) -> str | None:
        named: list[int] = []
        for slot in range(self.slots):
            for which in (0, 1):
                extent: Extent = memory["extent", slot, which]
                if extent:
                    named.extend(range(extent[0], extent[0] + extent[1]))
        marked = {c for w in range(0, self.cells, self.width) for c in memory["map", w]}
        if len(set(named)) != len(named):
            return f"cells are named twice: {sorted(named)}"
        if marked != set(named):
            return f"the map says {sorted(marked)}, the descriptors {sorted(named)}"
        return None if memory["used"] == len(named) else "the count of used cells is wrong"


def two_holders(kills: int = 2, **how: Any) -> Model:
    heap = Heap(2, 4, **how)
    return heap.model(heap.commit(0, 2, 1), heap.commit(1, 1), kills=kills)


def hand_over(kills: int = 2, **how: Any) -> Model:
    """One slot, from dead hand to dead hand, beside somebody who has the heap lock at times."""
    heap = Heap(2, 4, **how)
    return heap.model(heap.commit(0, 1), heap.touch(0), heap.commit(1, 1), kills=kills)


def reuse(kills: int = 1, **how: Any) -> Model:
    heap = Heap(2, 5, **how)
    return heap.model(heap.remove(0), heap.insert(0, 2), heap.commit(1, 1), kills=kills)


def reader(kills: int = 0, **how: Any) -> Model:
    heap = Heap(2, 4, **how)
    writer = heap.commit(0, 0, 1, 1)
    return heap.model(writer, heap.commit(1, 1), heap.read(0), kills=kills)


def reader_of_reused(kills: int = 1, **how: Any) -> Model:
    heap = Heap(1, 3, **how)
    return heap.model(heap.remove(0), heap.insert(0, 2), heap.read(0), kills=kills)


def beside(kills: int = 1, **how: Any) -> Model:
    """A repair of the heap while another holder is between allocating and committing."""
    heap = Heap(2, 4, **how)
    return heap.model(heap.commit(0, 1), heap.commit(1, 1), heap.touch(1), kills=kills)


def inserts(kills: int = 1, **how: Any) -> Model:
    """Two for the same FREE slot, beside somebody who has the heap lock at times."""
    heap = Heap(2, 5, free=1, **how)
    return heap.model(heap.insert(0, 1), heap.insert(0, 1), heap.commit(1, 1), kills=kills)


def full(kills: int = 2, **how: Any) -> Model:
    """Room for one of them only."""
    heap = Heap(2, 3, **how)
    return heap.model(heap.commit(0, 1), heap.commit(1, 1), heap.touch(1), kills=kills)


def three_holders(kills: int = 2, **how: Any) -> Model:
    heap = Heap(3, 6, width=2, **how)
    return heap.model(heap.commit(0, 2), heap.commit(1, 1), heap.commit(2, 2), kills=kills)


def quick_writers(**how: Any) -> Model:
    """Four commits in one hold, so that the same field copy and extent come round again."""
    heap = Heap(2, 4, **how)
    return heap.model(heap.commit(0, 1, 0, 1, 1), heap.read(0), heap.commit(1, 1), kills=0)


MODELS = {
    "two holders": two_holders,
    "two holders, straddling map words": lambda: two_holders(width=2),
    "hand-over": hand_over,
    "remove and insert": reuse,
    "reader": reader,
    "reader of a reused slot": reader_of_reused,
    "full": full,
    "repair beside": beside,
    "two inserts": inserts,
    "unneeded: descriptor, then map": lambda: two_holders(dropped="descriptor, then map"),
    "unneeded: clear, then map": lambda: two_holders(dropped="clear, then map"),
}
SOAK = {
    "three holders": three_holders,
    "hand-over, three kills": lambda: hand_over(kills=3),
    "remove and insert, two kills": lambda: reuse(kills=2),
    "reader, a kill": lambda: reader(kills=1),
    "reader of a quick writer": quick_writers,
}
CONTROLS = {
    "named at once": beside,
    "one word": two_holders,
    "uncounted kept": beside,
    "count rebuilt": two_holders,
    "spare descriptor": two_holders,
    "fill, then flip": two_holders,
    "copy, then flip": two_holders,
    "flip, then free": two_holders,
    "insert frees": inserts,
    "insert commits last": reuse,
    "death tidies": hand_over,
    "commit tidies": hand_over,
    "dirty remembered": hand_over,
    "counter": quick_writers,
    "look again": quick_writers,
    "version again": reader,
}
