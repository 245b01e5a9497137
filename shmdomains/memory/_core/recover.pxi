# Recovering and salvaging: after a death, and after damage.
#
# Whoever takes a lock next repairs what a dead holder left. `recover_locks` takes every lock, and
# lists what it repaired and who holds the rest; it waits for the list lock and the short ones, not
# for domains. A change that finds no room has `reclaim` free what the dead hold, and is tried once
# more. `salvage_slot` reads what damage left of one record, without a lock or an index.

cimport libc.errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from shmdomains import errors

cdef enum:
    SLOTS_A_PART = 4096  # before other threads of this process run


cdef tuple recover_locks(Segment doms, object timeout):
    cdef uint64_t freed, deadline = deadline_of(timeout)
    cdef list repairs = [], held = []
    need_open(doms)
    if doms.multiprocessing and doms.list_lock is None:
        raise errors.LockKindMismatch(
            "this list uses multiprocessing locks, which only processes can have that "
            "inherited the DomainList: recover through one of them")
    if sd_load_acquire(&doms.segment.header.poisoned):
        raise_poison_or_code(doms, SD_POISONED, "recover")
    if doms.segment.list_nonce != me().nonce:
        recover_list(doms, deadline, timeout, repairs, held)
    recover_short(doms, "id", SD_IDS, &doms.segment.header.id_mutex, deadline, timeout, repairs,
                  held)
    if sd_ring_works(doms.segment):
        recover_short(doms, "event", SD_EVENTS, &doms.segment.header.event_mutex, deadline,
                      timeout, repairs, held)
    recover_short(doms, "heap", SD_HEAP, &doms.segment.header.heap_mutex, deadline, timeout,
                  repairs, held)
    begin_wait(doms)
    try:
        recover_named(doms, repairs, held)
        freed = recover_slots(doms, repairs, held)
    finally:
        end_wait(doms)
    return repairs, held, freed * SD_CELL


cdef int recover_list(Segment doms, uint64_t deadline, object timeout, list repairs,
                      list held) except -1:
    cdef sd_repair repair
    cdef pthread_mutex_t *at
    cdef sd_owner *owner
    if holds_any(doms):
        raise errors.LockOrder(
            f"{this()} holds a domain; the list lock comes first: unlock the domain")
    memset(&sd_self().repair, 0, sizeof(repair))
    at = &doms.segment.header.list_mutex
    owner = &doms.segment.header.list_owner
    if TASKS and held_beside(owner, NULL if doms.multiprocessing else at):
        deadline, timeout = SD_TRY, 0  # it is not waited for what another task has
    try:
        acquire_list(doms, deadline, timeout)
    except errors.LockTimeout as exc:
        held.append(("list", None, exc.holder))
        return 0
    repair = sd_self().repair
    release_list(doms)
    note_repair(repairs, "list", None, &repair)
    return 0


cdef int recover_short(Segment doms, object which, int lock, pthread_mutex_t *mutex,
                       uint64_t deadline, object timeout, list repairs, list held) except -1:
    cdef sd_repair repair
    cdef uint32_t victim = sd_mutex_victim(mutex)
    cdef int result
    memset(&sd_self().repair, 0, sizeof(repair))
    begin_wait(doms)
    result = sd_short_locks(doms.segment, lock, deadline)
    repair = sd_self().repair
    if result == SD_OK:
        sd_short_unlock(doms.segment, lock)
    end_wait(doms)
    if result == SD_TIMEOUT:
        held.append((which, None, timeout_error(NULL, mutex, NULL, which, timeout).holder))
        return 0
    if result != SD_OK:
        return raise_poison_or_code(doms, result, "recover")
    repair.who = victim
    note_repair(repairs, which, None, &repair)
    return still_open(doms)


cdef int recover_named(Segment doms, list repairs, list held) except -1:
    """Take each named lock that is locked."""
    cdef unsigned place
    cdef sd_lock_name raw
    cdef sd_named *at
    cdef sd_repair repair
    cdef int result
    for place in range(SD_NAMED_MAX):
        at = &doms.segment.named[place]
        if not sd_mutex_busy(&at.mutex) or held_mutex(doms, place) != NULL:
            continue
        name = None
        if sd_named_get(doms.segment, place, &raw) == SD_OK:
            name = lock_name_object(&raw)
        memset(&sd_self().repair, 0, sizeof(repair))
        result = SD_TIMEOUT
        if not (TASKS and held_beside(&at.owner, &at.mutex)):
            result = sd_named_lock(doms.segment, place, SD_TRY)
        if result == SD_TIMEOUT:
            error = timeout_error(&at.owner, &at.mutex, at.why, name, 0)
            if error.holder is not None:
                held.append(("mutex", name, error.holder))
            continue
        if result != SD_OK:
            raise_poison_or_code(doms, result, "recover")
        repair = sd_self().repair
        sd_named_unlock(doms.segment, place, False)
        note_repair(repairs, "mutex", name, &repair)
    return 0


cdef uint64_t recover_slots(Segment doms, list repairs, list held) except? 1:
    """Take the lock of each slot that is locked, or whose garbage was left. Returns cells freed."""
    cdef uint32_t slot
    cdef uint64_t freed = 0
    cdef sd_slot *at
    cdef sd_repair repair
    cdef bint busy
    for slot in range(slot_count(doms)):
        if slot % SLOTS_A_PART == SLOTS_A_PART - 1:
            between_parts(doms)
        at = &doms.segment.slots[slot]
        busy = sd_load(&at.owner.who) != 0 if doms.multiprocessing else sd_mutex_busy(&at.mutex)
        if not busy and not sd_load(&at.dirty) or held_pointer(doms, slot, 0) != NULL:
            continue
        name = read_name(doms, slot)
        memset(&sd_self().repair, 0, sizeof(repair))
        if acquire_slot(doms, slot, SD_TRY) == SD_TIMEOUT:
            error = timeout_error(&at.owner, &at.mutex, at.why, name, 0)
            if error.holder is not None:
                held.append(("domain", name, error.holder))
            continue
        if sd_load(&at.dirty):
            sd_tidy(doms.segment, slot)
        repair = sd_self().repair
        release_slot(doms, slot, False)
        freed += repair.freed
        note_repair(repairs, "domain", name, &repair)
    return freed


cdef bint reclaim(Segment doms, uint32_t held) noexcept:
    """Room was wanted and not there: free what only the dead hold, and garbage that was put off.
    Whether there was any. The caller holds slot `held`; the others' locks are only tried, so it
    waits for nobody, and who died there is told to the next holder all the same."""
    cdef uint64_t before = sd_self().repair.freed
    cdef int error = libc.errno.errno  # says why there is no memory
    try:
        reclaim_slots(doms, held)
    except Exception:  # the list was closed or poisoned: what is raised is why there is no room
        return False
    finally:
        libc.errno.errno = error
    return sd_self().repair.freed != before


cdef int reclaim_slots(Segment doms, uint32_t held) except -1:
    cdef uint32_t slot
    cdef sd_slot *at
    cdef bint busy, put_off
    for slot in range(slot_count(doms)):
        at = &doms.segment.slots[slot]
        busy = sd_load(&at.owner.who) != 0 if doms.multiprocessing else sd_mutex_busy(&at.mutex)
        if not busy and not sd_load(&at.dirty):
            continue
        if slot == held or sd_self().held >= SD_HELD_MAX or held_pointer(doms, slot, 0) != NULL:
            continue
        if acquire_slot(doms, slot, SD_TRY) == SD_TIMEOUT:
            continue
        if sd_load(&at.dirty):
            sd_tidy(doms.segment, slot)
        put_off = sd_load(&at.dirty) != 0
        release_slot(doms, slot, False)
        if put_off:
            return 0  # the heap's holder is stopped: one slice of waiting is enough
    return 0


cdef inline bint no_room(int result) noexcept:
    return result == SD_FULL or result == SD_NO_MEMORY


cdef int note_repair(list repairs, object lock, object name, const sd_repair *repair) except -1:
    cdef uint64_t who = repair.who
    if repair.died:
        died = HOLDERS.dead_holder(sd_who_tid(who), repair.pid, sd_who_start(who))
        repairs.append((lock, name, died))
    elif repair.repaired:
        repairs.append((lock, name, None))
    return 0


cdef uint64_t slots_to_salvage(Segment doms) except? 0:
    cdef uint32_t slots = 0
    cdef uint64_t committed
    need_open(doms)
    if sd_slots(doms.segment, &slots) == SD_OK:
        return slots
    committed = sd_unsealed(sd_load_acquire(&doms.segment.header.slots_committed))
    return committed if committed <= doms.segment.at.max_slots else 0


cdef object salvage_slot(Segment doms, uint32_t slot):
    cdef sd_view view
    cdef sd_stored stored
    cdef uint64_t deadline = sd_now() + SECOND
    cdef int result, b
    cdef unsigned tries = 0
    cdef list blobs, damaged
    cdef DomainInfo info = DomainInfo.__new__(DomainInfo)
    need_open(doms)
    if slot >= slots_to_salvage(doms):
        return None
    while True:
        result = sd_view_begin(doms.segment, slot, &view)
        if result == SD_MISS:
            return None
        info.damage = FIELDS if result == SD_CORRUPT else 0
        if result == SD_OK or result == SD_CORRUPT:
            blobs, damaged = [None] * BLOBS, [False] * BLOBS
            for b in range(BLOBS):
                result = sd_view_blob(doms.segment, slot, &view, b, &stored)
                if result == SD_OK:
                    blobs[b] = unsealed_blob(b, copy_stored(&stored), view.uuid,
                                             view.values.version[b])
                damaged[b] = result == SD_CORRUPT or (result == SD_OK and blobs[b] is None)
            if sd_view_check(doms.segment, slot, &view) == SD_OK:
                return fill_info(info, &view), blobs, damaged
        tries += 1
        if tries > PATIENT_READS:
            back_off(deadline)
