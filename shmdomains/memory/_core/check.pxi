# Checking every invariant, while others work.
#
# First everything is looked at without a lock; what looks wrong is a suspect, and judged again
# under the lock that protects it, for at most SD_CHECK_HOLD_NS at a time. So a fault that is
# reported is one, and writers are hardly held up; where there is no verdict, it is said why.

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport strncpy

from shmdomains import errors

cdef enum:
    FAULTS_MAX = 1000
    LOOK_NS = 5000000  # of a look without a lock, before other threads of this process run
    LOOKS = 3          # without a lock, before one under it
    EVENTS = SD_PARTS  # one part more: the ring
    WALKS = 20         # over the descriptors, of which each acquits two of three that moved

# What a checker that does not get a lock reports instead of a verdict.
cdef object OUT_OF_REACH = (errors.LockTimeout, errors.LockKindMismatch, errors.LockOrder,
                            errors.SegmentCorrupt)


# While a check holds locks it makes no Python object: the collector may run, and that runs
# anything. So what it finds is kept in C.
cdef struct fault:
    char invariant[32]
    char what[200]
    fault *next


cdef struct faults:
    fault *first
    unsigned count


cdef void report(void *context, const char *invariant, const char *what) noexcept:
    cdef faults *found = <faults *>context
    cdef fault *one
    found.count += 1
    if found.count > FAULTS_MAX:
        return
    one = <fault *>malloc(sizeof(fault))
    if one == NULL:
        return
    strncpy(one.invariant, invariant, 31)
    strncpy(one.what, what, 199)
    one.invariant[31] = one.what[199] = 0
    one.next = found.first
    found.first = one


cdef list list_faults(fault *one):
    cdef fault *next
    cdef list found = []
    while one != NULL:
        found.append((one.invariant.decode(), one.what.decode("utf-8", "replace")))
        next = one.next
        free(one)
        one = next
    found.reverse()
    return found


cdef bint check_records(Segment doms, sd_check *check) except -1:
    cdef int result
    while True:
        result = sd_check_records(check, sd_now() + LOOK_NS)
        if result != SD_TIMEOUT:
            return result == SD_OK
        between_parts(doms)


cdef object check_events(Segment doms, sd_check *check, uint64_t deadline, object timeout,
                         uint64_t *longest):
    """The ring, and whether a record names an event that has not happened. None, or why there is no
    verdict."""
    cdef bint taken
    cdef uint64_t began
    while sd_check_ring(check, sd_now() + LOOK_NS) == SD_TIMEOUT:
        between_parts(doms)
    if not sd_check_ring_suspect(check):
        return None
    try:
        taken = hold_part(doms, EVENTS, deadline, timeout)
    except OUT_OF_REACH as exc:
        return f"a record names an event that has not happened, but {exc}"
    began = sd_now()
    sd_check_ring_judge(check)
    if taken:
        drop_part(doms, EVENTS)
        longest[0] = max(longest[0], sd_now() - began)
    return None


cdef object judge_part(Segment doms, sd_check *check, int part, uint64_t deadline, object timeout,
                       uint64_t *longest):
    """Look at a part's suspects under its lock. None, or why some are left."""
    cdef bint taken
    cdef uint64_t began
    while sd_check_suspects(check, part):
        try:
            taken = hold_part(doms, part, deadline, timeout)
        except OUT_OF_REACH as exc:
            return f"{sd_check_suspects(check, part)} records or entries look wrong, but {exc}"
        began = sd_now()
        sd_check_judge(check, part, began + SD_CHECK_HOLD_NS)
        if taken:
            drop_part(doms, part)
            longest[0] = max(longest[0], sd_now() - began)
        between_parts(doms)
    return None


cdef object judge_sum(Segment doms, sd_check *check, int sum, uint64_t deadline, object timeout,
                      uint64_t *longest):
    """Come to a verdict on a sum. None, or why there is none."""
    cdef int result, _tries, holds = 0, part = sd_check_part(sum)
    cdef bint taken
    cdef uint64_t began
    for _tries in range(WALKS if sum == SD_SUM_CELLS else LOOKS):
        if sum_freely(doms, check, sum) == SD_OK:
            return None
    result = SD_DOUBT
    while result == SD_DOUBT or result == SD_TIMEOUT and holds < LOOKS:
        if sd_check_prepare(check, sum) == SD_ERRNO:
            raise MemoryError
        try:
            taken = hold_part(doms, part, deadline, timeout)
        except OUT_OF_REACH as exc:
            return str(exc)
        holds += 1
        began = sd_now()
        result = sd_check_sum_held(check, sum,
                                   began + SD_CHECK_HOLD_NS if taken else SD_FOREVER)
        if taken:
            drop_part(doms, part)
            longest[0] = max(longest[0], sd_now() - began)
        between_parts(doms)
    if result == SD_OK:
        return None
    return ("writers are at work, and to be sure they would have to be stopped for more than "
            f"{SD_CHECK_HOLD_NS // 1000000} ms; check again when they rest")


cdef int sum_freely(Segment doms, sd_check *check, int sum) except -1:
    cdef int result
    while True:
        result = sd_check_sum(check, sum, sd_now() + LOOK_NS)
        if result == SD_ERRNO:
            raise MemoryError
        if result != SD_TIMEOUT:
            return result
        between_parts(doms)


cdef bint hold_part(Segment doms, int part, uint64_t deadline, object timeout) except -1:
    """Take the lock of a part. False: there is nothing to give back. This thread holds it already,
    or the segment is poisoned: then nobody gets it, and what it protects stands still."""
    cdef int result
    if part == SD_PART_LIST and doms.segment.list_nonce == me().nonce:
        need_list(doms, "check")
        return False
    try:
        if part == SD_PART_LIST:
            # Holding a domain, only try: see find_under_lock.
            acquire_list(doms, SD_TRY if holds_any(doms) else deadline, timeout)
            return True
        result = sd_short_locks(doms.segment, lock_of_part(part), deadline)
        if result != SD_OK:
            raise_poison_or_code(doms, result, "check")
    except errors.SegmentPoisoned:
        return False
    return True


cdef inline int lock_of_part(int part) noexcept:
    if part == EVENTS:
        return SD_EVENTS
    return SD_IDS if part == SD_PART_IDS else SD_HEAP


cdef int drop_part(Segment doms, int part) except -1:
    if part == SD_PART_LIST:
        return release_list(doms)
    sd_short_unlock(doms.segment, lock_of_part(part))
    return 0


cdef tuple check_segment(Segment doms, object timeout):
    cdef faults found = {"first": NULL, "count": 0}
    cdef uint64_t longest = 0, deadline = deadline_of(timeout)
    cdef sd_check *check
    cdef sd_tally tally
    cdef int part, sum
    cdef list open = []
    need_open(doms)
    check = sd_check_begin(doms.segment, len(STATES), report, &found)
    if check == NULL:
        raise MemoryError
    begin_wait(doms)
    try:
        if check_records(doms, check):
            for part in range(SD_PARTS):
                why = judge_part(doms, check, part, deadline, timeout, &longest)
                if why is not None:
                    open.append((SD_SUMS + part, why))
            for sum in range(SD_SUMS):
                why = judge_sum(doms, check, sum, deadline, timeout, &longest)
                if why is not None:
                    open.append((sum, why))
        why = check_events(doms, check, deadline, timeout, &longest)
        if why is not None:
            open.append((SD_SUMS + EVENTS, why))
        if sd_check_overlooked(check):
            open.append((SD_SUMS, f"{sd_check_overlooked(check)} more records or entries look "
                         "wrong, too many to judge"))
        tally = sd_check_tally(check)[0]
    finally:
        sd_check_end(check)
        problems = list_faults(found.first)
        end_wait(doms)
    return problems, tally, open, longest / 1e9
