# Who holds which lock, who waits for it, and what each process counted.
#
# Everything here only reads, and takes no lock. What it says was so a moment ago: each lock was
# held by the holder that is named, at some moment of the call. The slots are gone through in parts,
# so that other threads run meanwhile.

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

cdef enum:
    HOLDER_TRIES = 10  # until a lock does not change hands while its holder is read


cdef list taken_locks(Segment doms):
    """(kind, name, uuid, holder, how many wait, ns for which the first of them waits)."""
    need_open(doms)
    cdef dict waits = waits_by_lock(doms)
    cdef list found = []
    add_named_locks(doms, found, waits)
    add_list_lock(doms, found, waits)
    add_slot_locks(doms, found, waits)
    return found


cdef dict waits_for_jobs(Segment doms):
    """slot -> (how many wait for a job there, ns for which the first of them waits). The jobs
    themselves stand in the records."""
    need_open(doms)
    cdef uint64_t now = sd_now()
    return {number: (count, now - since if now > since else 0)
            for (kind, number), (count, since) in waits_by_lock(doms).items()
            if kind == SD_LOCK_JOB}


@cython.final
@cython.no_gc_clear
cdef class JobWait:
    """A thread waits for a job: it stands in the table of waiters for a ``with`` block."""
    cdef Segment doms
    cdef uint32_t slot
    cdef sd_wait *wait

    def __cinit__(self, Segment doms not None, Record record not None):
        self.doms, self.slot = doms, record.slot
        self.wait = <sd_wait *>malloc(sizeof(sd_wait))
        if self.wait == NULL:
            raise MemoryError

    def __enter__(self):
        need_open(self.doms)
        sd_wait_begin(self.wait, self.doms.segment, SD_LOCK_JOB, self.slot, <void *>self.doms)
        return self

    def __exit__(self, kind, value, traceback):
        sd_wait_end(self.wait)
        free(self.wait)
        self.wait = NULL

    def __dealloc__(self):
        # Whoever left the block without its end (CPython 3.14, gh-148874) is still in the table.
        if self.wait != NULL and sd_self().wait == self.wait:
            sd_wait_end(self.wait)
        free(self.wait)


cdef dict waits_by_lock(Segment doms):
    """(kind, number) -> (how many living threads wait, since when)."""
    cdef uint32_t place
    cdef sd_waiting waiting
    cdef dict waits = {}
    for place in range(sd_waiters(doms.segment)):
        if not sd_waiter_get(doms.segment, place, &waiting) or not sd_alive(waiting.who):
            continue
        lock = (waiting.kind, waiting.number)
        count, since = waits.get(lock, (0, waiting.since))
        waits[lock] = (count + 1, min(since, waiting.since))
    return waits


cdef int add_lock(list found, object kind, object name, object uuid, object holder,
                  object waits) except -1:
    cdef uint64_t now = sd_now(), since
    if holder is None and waits is None:
        return 0  # it was freed meanwhile
    count, since = (0, now) if waits is None else waits
    found.append((kind, name, uuid, holder, count, now - since if now > since else 0))
    return 0


cdef int add_list_lock(Segment doms, list found, dict waits) except -1:
    cdef sd_header *header = doms.segment.header
    return add_lock(found, "list", None, None,
                    holder_now(doms, &header.list_owner, &header.list_mutex, header.list_why),
                    waits.get((SD_LOCK_LIST, 0)))


cdef int add_named_locks(Segment doms, list found, dict waits) except -1:
    cdef unsigned place
    cdef sd_named *at
    for place in range(SD_NAMED_MAX):
        at = &doms.segment.named[place]
        held = holder_of_mutex(doms, &at.owner, &at.mutex, at.why, False)
        add_lock(found, "mutex", mutex_name(doms, place), None, held,
                 waits.get((SD_LOCK_MUTEX, place)))
    return 0


cdef object mutex_name(Segment doms, unsigned place):
    cdef sd_lock_name raw
    if place < SD_NAMED_MAX and sd_named_get(doms.segment, place, &raw) == SD_OK:
        return lock_name_object(&raw)
    return None


cdef int add_slot_locks(Segment doms, list found, dict waits) except -1:
    cdef uint32_t slots = slot_count(doms)
    cdef uint32_t slot = 0, end
    while slot < slots:
        end = min(slot + SLOTS_A_PART, slots)
        for slot in taken_slots(doms, slot, end, waits):
            add_slot_lock(doms, slot, found, waits)
        slot = end
        if slot < slots:
            between_parts(doms)
    return 0


cdef list taken_slots(Segment doms, uint32_t first, uint32_t end, dict waits):
    cdef uint32_t slot = sd_next_taken(doms.segment, first, end)
    cdef set slots = {number for kind, number in waits
                      if kind == SD_LOCK_DOMAIN and first <= number < end}
    while slot < end:
        slots.add(slot)
        slot = sd_next_taken(doms.segment, slot + 1, end)
    return sorted(slots)


cdef int add_slot_lock(Segment doms, uint32_t slot, list found, dict waits) except -1:
    cdef sd_view view
    cdef int _tries, result = SD_DOUBT
    cdef sd_slot *at = &doms.segment.slots[slot]
    holder = holder_now(doms, &at.owner, &at.mutex, at.why)
    for _tries in range(PATIENT_READS):
        result = sd_view_begin(doms.segment, slot, &view)
        if result != SD_DOUBT:
            break
    name = uuid = None
    if result == SD_OK and view.name[0]:
        name, uuid = name_object(view.name), uuid_object(view.uuid)
    return add_lock(found, "domain", name, uuid, holder, waits.get((SD_LOCK_DOMAIN, slot)))


cdef tuple holder_now(Segment doms, const sd_owner *owner, const pthread_mutex_t *mutex,
                      const sd_word *why):
    return holder_of_mutex(doms, owner, mutex, why, doms.multiprocessing)


cdef tuple holder_of_mutex(Segment doms, const sd_owner *owner, const pthread_mutex_t *mutex,
                           const sd_word *why, bint semaphore):
    """(tid, pid, start in ticks, seconds for which it is held, operation) of a lock's holder, dead
    or alive; None: nobody holds it. Who has the mutex and has not signed yet is known by its number
    only."""
    cdef uint64_t who = 0, since = 0
    cdef uint32_t tid = 0, pid = 0
    cdef int _tries
    operation = None
    for _tries in range(HOLDER_TRIES):
        who = sd_load_acquire(&owner.who)
        tid = sd_who_tid(who) if semaphore else sd_mutex_owner(mutex)
        since = sd_load(&owner.since) & ~SD_SINCE_DROPPED
        pid = sd_owner_pid(owner, who)
        operation = operation_at(why)
        if sd_load_acquire(&owner.who) == who:
            break
    if not tid and (not who or not semaphore and not sd_mutex_busy(mutex)):
        return None
    if tid and tid != sd_who_tid(who):
        return tid, sd_process_of(tid), 0, None, None
    tid = sd_who_tid(who)
    return (tid, pid or sd_process_of(tid), sd_who_start(who),
            (sd_now() - since) / 1e9 if since and since < sd_now() else None, operation)


cdef tuple own_counts(Segment doms):
    need_open(doms)
    return counts_of(doms.segment.counters)


cdef tuple counts_of(const sd_counters *block):
    cdef int i
    return (sd_load(&block.acquired), sd_load(&block.contended), sd_load(&block.commits),
            sd_load(&block.recoveries), sd_load(&block.deaths), sd_load(&block.unlisted),
            tuple([sd_load(&block.waits[i]) for i in range(SD_WAIT_SIZES)]))


cdef dict all_counts(Segment doms):
    """Of each living process that is attached and has a block, and of this one in any case."""
    cdef uint32_t place
    cdef uint64_t who
    cdef const sd_counters *block
    cdef const sd_counters *ours
    need_open(doms)
    ours = doms.segment.counters
    cdef dict found = {sd_load(&ours.who): counts_of(ours)}
    for place in range(sd_room(&doms.segment.header.counters_committed, SD_COUNTED_MAX)):
        block = &doms.segment.blocks[place]
        who = sd_load_acquire(&doms.segment.attached[place])
        if not who or block == ours or sd_load_acquire(&block.who) != who:
            continue
        counts = counts_of(block)
        if (sd_load_acquire(&block.who) == who
                and sd_process_runs(sd_who_tid(who), sd_who_start(who))):
            found[who] = counts
    return found
