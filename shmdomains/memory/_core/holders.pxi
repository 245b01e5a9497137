# Holders: who holds a lock, as errors name them, and why a segment is poisoned.
#
# A holder is one word in the segment, `who`: the thread's number and its start, for the kernel
# reuses numbers. Everything here only reads; nothing waits.

from libc.stdint cimport uint32_t, uint64_t

from shmdomains import errors

cdef object REPAIRS = {
    SD_POISON_LIST: "of the UUID and the name index (list lock)",
    SD_POISON_IDS: "of the id index (id lock)",
    SD_POISON_HEAP: "of the map of used space (heap lock)",
}


cdef enum:
    OPERATION_MAX = 55  # bytes, and one 0 that ends them
    OPERATION_BYTES = 56


cdef int need_text(object why) except -1:
    if not isinstance(why, str):
        raise TypeError(f"why is a str, what the lock is for, not {type(why).__name__}")
    return 0


cdef bytes as_operation(str why):
    """What a holder says it is doing, as the segment keeps it."""
    cdef bytes text = why.replace("\0", "").encode("utf-8", "replace")
    if len(text) > OPERATION_MAX:
        text = text[:OPERATION_MAX].decode("utf-8", "ignore").encode()
    return text


cdef object operation_at(const sd_word *why):
    """What the holder says it is doing, or None. It may change meanwhile."""
    cdef char text[OPERATION_BYTES]
    if why == NULL or not sd_load(why):
        return None
    sd_copy_out(text, why, OPERATION_BYTES)
    return text[:OPERATION_BYTES].partition(b"\0")[0].decode("utf-8", "replace") or None


cdef int raise_timed_out(sd_owner *owner, pthread_mutex_t *mutex, const sd_word *why, object what,
                         object timeout) except -1:
    raise timeout_error(owner, mutex, why, what, timeout)


cdef object error_of_wait(Segment doms, const sd_wait *wait, uint64_t waited):
    """The error that a wait would end with if it timed out now."""
    cdef sd_header *header = doms.segment.header
    cdef sd_slot *at
    cdef sd_named *named
    timeout = waited / <double>SECOND
    if wait.kind == SD_LOCK_LIST:
        return timeout_error(&header.list_owner, &header.list_mutex, header.list_why,
                             "the list lock", timeout)
    if wait.kind == SD_LOCK_MUTEX:
        named = &doms.segment.named[wait.number]
        return timeout_error(&named.owner, &named.mutex, named.why,
                             f"mutex {mutex_name(doms, wait.number)!r}", timeout)
    if wait.kind == SD_LOCK_JOB:
        return error_of_job(doms, wait.number, timeout)
    at = &doms.segment.slots[wait.number]
    return timeout_error(&at.owner, &at.mutex, at.why, describe(doms, wait.number), timeout)


cdef object error_of_job(Segment doms, uint32_t slot, object timeout):
    info = read_slot(doms, slot, NULL, True, sd_now() + SECOND)
    jobs = () if info is None else info.jobs
    held = f"; held by {jobs[0].operation} of {jobs[0].holder}" if jobs else ""
    return errors.LockTimeout(
        f"a job of {describe(doms, slot)} was not to be had within {timeout:.3g} s{held}")


cdef object timeout_error(sd_owner *owner, pthread_mutex_t *mutex, const sd_word *why, object what,
                          object timeout):
    """The error that names the holder. `owner` NULL: only the mutex knows."""
    operation = operation_at(why)
    cdef uint64_t who = sd_load(&owner.who) if owner != NULL else 0
    cdef uint64_t since = sd_load(&owner.since) if owner != NULL else 0
    cdef bint dropped = since & SD_SINCE_DROPPED != 0
    since &= ~SD_SINCE_DROPPED
    cdef uint32_t tid = sd_who_tid(who) if who else sd_mutex_owner(mutex)
    # Asking the kernel takes a descriptor; if there is none, the owner wrote its pid down.
    cdef uint32_t pid = sd_process_of(tid) if tid else 0
    if not pid and who:
        pid = sd_owner_pid(owner, who)
    return HOLDERS.lock_timeout(what, timeout, tid, pid, sd_who_start(who),
                                (sd_now() - since) / 1e9 if who and since else None,
                                dropped and who, operation)


cdef object why_poisoned(Segment doms):
    """Why the segment is poisoned, or None."""
    cdef sd_header *header = doms.segment.header
    cdef uint64_t who, at
    cdef uint64_t reason = sd_load_acquire(&header.poisoned)
    if not reason:
        return None
    who, at = sd_load(&header.poisoned_who), sd_load(&header.poisoned_at)
    return HOLDERS.failed_repair(
        REPAIRS.get(reason), at - 1 if at else None, sd_who_tid(who),
        sd_load(&header.poisoned_pid), sd_who_start(who), sd_load(&header.poisoned_when) / 1e9)


cdef int raise_poison_or_code(Segment doms, int result, object what) except -1:
    """As `raise_code`; SD_POISONED says what failed, and what can still be done."""
    if result != SD_POISONED:
        return raise_code(result, what)
    raise errors.SegmentPoisoned(
        f"{what}: {why_poisoned(doms)}; its domains can still be read (list, dumpxml): export "
        "them, unlink the segment and create a new one")


def process_start(uint32_t pid):
    """When a process started, in clock ticks since boot; 0: there is none, or it is not known."""
    cdef uint64_t start = sd_process_start(pid)
    return 0 if start == SD_START_UNKNOWN else start


def caller():
    """Who calls: process, thread, and when the thread started, in clock ticks since boot."""
    cdef sd_thread *self = me()
    return self.pid, sd_who_tid(self.who), sd_who_start(self.who)


def deaths_are_told():
    """Whether the kernel marks the robust mutexes of a thread that dies."""
    return sd_mutex_watched()


def thread_runs(uint32_t tid, uint64_t start):
    """Whether the thread that started then still runs. A start of 0, not known, fits any."""
    return sd_alive(sd_identity(tid, start))


def process_runs(uint32_t pid, uint64_t start):
    """Whether the process that started then still runs. A start of 0, not known, fits any."""
    return sd_process_runs(pid, start)
