# Sleeping until something changes: a domain, any domain, the number of events.
#
# No lock is taken. Each call sleeps one slice at most where signal handlers can run, then they do;
# whoever waits looks again and calls again. A stamp is what the word was before the look, so a
# change that came between the look and the sleep ends the sleep at once (layout.h, W1).

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport int32_t, uint32_t, uint64_t

import threading

from shmdomains import errors

cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident()


cdef int sleep_on(Segment doms, const sd_word *word, uint64_t seen, sd_word *waiting,
                  uint64_t number, uint64_t deadline, const sd_word *life=NULL,
                  uint64_t lives=0) except -1:
    """A slice at most. 1: the word changed, or may have; 0: it is as it was."""
    cdef int result
    if TASKS:
        result = sleep_as_task(doms, word, seen, waiting, number, deadline, life, lives)
        if result != BLOCKS:
            return result
    begin_wait(doms)
    with nogil:
        result = sd_sleep(word, seen, waiting, number, deadline)
    result = after_slice(result)
    end_wait(doms)
    if result != SD_OK and result != SD_TIMEOUT:
        return raise_code(result, "wait")
    still_open(doms)
    return result == SD_OK


cdef tuple read_with_stamp(Segment doms, Record record, bint blobs):
    """What is committed, or None once the domain is removed, and the stamp of before the look."""
    cdef sd_slot *at
    cdef uint64_t cur
    cdef DomainInfo info
    need_ours(doms, record)
    at = &doms.segment.slots[record.slot]
    cur = sd_load_acquire(&at.cur)
    if sd_load_acquire(&at.life) != record.life:
        need_sound_life(doms, record.slot)
        return None, cur
    info = read_slot(doms, record.slot, NULL, blobs, sd_now() + SECOND)
    if info is None or sd_load_acquire(&at.life) != record.life:
        return None, cur
    need_sound(info)
    return info, cur


cdef int sleep_on_record(Segment doms, Record record, uint64_t stamp, uint64_t deadline) except -1:
    """1: the domain changed, or may have; 0: it is as it was. Signal handlers run in one thread
    only, so the others look at the record after a slice and sleep on, without the GIL; but whoever
    waits for a job (`JobWait`) looks after each slice whether its holder lives."""
    cdef sd_slot *at
    cdef int result = SD_TIMEOUT
    cdef uint64_t number = sd_count_value(stamp) + 1
    cdef sd_thread *thread = sd_self()
    need_ours(doms, record)
    at = &doms.segment.slots[record.slot]
    if sd_load_acquire(&at.life) != record.life:
        return 1
    if TASKS or runs_handlers() or thread.wait != NULL:
        return sleep_on(doms, &at.cur, stamp, &at.waiting, number, deadline, &at.life,
                        record.life)
    begin_wait(doms)
    with nogil:
        while result == SD_TIMEOUT:
            result = sd_sleep(&at.cur, stamp, &at.waiting, number, deadline)
            if sd_load_acquire(&at.life) != record.life:
                result = SD_OK
            if doms.closed or thread.orphans != NULL or sd_now() >= deadline:
                break
        sd_gate_enter()
    sd_gate_leave()
    result = after_slice(result)
    end_wait(doms)
    if result != SD_OK and result != SD_TIMEOUT:
        return raise_code(result, "wait")
    still_open(doms)
    return result == SD_OK


cdef bint runs_handlers() except -1:
    """Whether this may be the thread that runs signal handlers."""
    cdef sd_thread *thread = sd_self()
    return (sd_who_tid(thread.who) == thread.pid
            or threading.main_thread().ident == PyThread_get_thread_ident())


cdef int wait_unlocked(Record record, uint64_t deadline) except -1:
    """Release the domain, sleep until it has changed or the deadline, lock it again: whether it
    changed. Its notice of a death is kept, for the holder may not have looked at it yet. On an
    error, but for `UncommittedChanges`, the domain is not locked."""
    cdef Record mine = need_changeable(record)
    cdef unsigned depth
    cdef uint64_t stamp, again
    cdef bint changed
    need_open(mine.segment)
    if mine.touched or mine.pending:
        raise errors.UncommittedChanges(f"domain {uuid_object(mine.uuid_raw)} has changes that "
                                        "nobody would see while this waits")
    intended = intention(mine) if mine.intends else None
    depth = mine.depth
    stamp = sd_load_acquire(&mine.segment.segment.slots[mine.slot].cur)
    end_hold(mine, False)
    changed = sleep_on_record(mine.segment, mine, stamp, deadline)
    while not changed and sd_now() < deadline:
        changed = sleep_on_record(mine.segment, mine, stamp, deadline)
    again = max(deadline, sd_now() + SD_SLICE_NS)
    lock_record(mine, again, seconds_left(again))
    mine.depth = depth
    mine.intends = intended is not None and intention(mine) == intended
    return changed


cdef object intention(Record record):
    """What a holder intends or intended, or None. Domain lock."""
    work = read_blob(record, SD_WORK)
    return None if work is None else work.intended


cdef int sleep_on_list(Segment doms, uint64_t stamp, uint64_t deadline) except -1:
    cdef sd_header *header
    need_open(doms)
    header = doms.segment.header
    return sleep_on(doms, &header.any_seq, stamp, &header.any_waiting, stamp + 1, deadline)


cdef int arm_list(Segment doms, uint64_t stamp) except -1:
    """Writers count `any_seq` up from here on; before the list is looked at."""
    need_open(doms)
    sd_raise(&doms.segment.header.any_waiting, stamp + 1)
    return 0


cdef int sleep_on_events(Segment doms, uint64_t count, uint64_t deadline) except -1:
    """Until there are more than `count` events. A writer that died after its commit and before it
    published the event is made good here, at the end of a slice."""
    cdef sd_header *header
    cdef uint64_t seen
    cdef int changed
    need_open(doms)
    header = doms.segment.header
    seen = sd_load_acquire(&header.event_count)  # before the look: what comes after it is noticed
    if sd_ring_count(doms.segment) > count:
        return 1
    if sd_self().asks and sd_ring_unsettled(doms.segment):  # a task does not come back from a slice
        sd_events_settle_now(doms.segment)
        if sd_ring_count(doms.segment) > count:
            return 1
    changed = sleep_on(doms, &header.event_count, seen, &header.event_waiting, count + 1, deadline)
    if sd_ring_count(doms.segment) > count:
        return 1
    if not changed and sd_ring_unsettled(doms.segment):
        begin_wait(doms)
        if sd_events_lock_briefly(doms.segment) == SD_OK:
            sd_events_unlock(doms.segment)
        end_wait(doms)
        still_open(doms)
    return sd_ring_count(doms.segment) > count


cdef tuple read_event(Segment doms, uint64_t number):
    """(number, time in ns, type, detail, uuid, name, id, who died, its pid), or None: it is
    gone."""
    cdef sd_event event
    need_open(doms)
    if sd_ring_read(doms.segment, number, &event) != SD_OK:
        return None
    return (number, event.time, event.kind & 0xff, event.kind >> 8 & 0xffff,
            uuid_object(event.uuid), name_object(event.name) if event.name[0] else None,
            <int32_t><uint32_t>(event.kind >> 32), event.life, event.pid)


cdef list read_changed(Segment doms, bytearray marks, bint blobs):
    """The committed states of the domains that changed since `marks`, which are brought up to date:
    16 bytes a slot, life and commits. Those that are gone are not in it. One that is damaged is,
    and says so when it is asked."""
    cdef uint32_t slot
    cdef uint64_t life, cur
    cdef uint64_t *mark
    cdef sd_slot *at
    cdef DomainInfo info
    cdef list found = []
    cdef uint32_t slots = slot_count(doms)
    if len(marks) < 16 * <size_t>slots:
        marks.extend(bytes(16 * slots - len(marks)))
    for slot in range(slots):
        at = &doms.segment.slots[slot]
        cur = sd_load_acquire(&at.cur)
        life = sd_load_acquire(&at.life)
        mark = <uint64_t *>PyByteArray_AS_STRING(marks) + 2 * slot
        if mark[0] == life and mark[1] == cur:
            continue
        if life & LIVES:
            try:
                info = read_slot(doms, slot, NULL, blobs, sd_now() + SECOND)
            except BaseException:
                marks[:] = bytes(len(marks))  # the caller learns of none: all of them next time
                raise
            if info is not None:
                found.append(info)
        mark = <uint64_t *>PyByteArray_AS_STRING(marks) + 2 * slot
        mark[0], mark[1] = life, cur
    return found
