# Waiting: time-outs, what runs between two slices of a wait, and what a code of the core raises.
#
# The core waits in slices, each by a call of `wait_hook`: the slice without the GIL, then signal
# handlers run, a slow wait is logged, and locks are freed whose handles another thread dropped. So
# a wait ends when the lock is free, at its deadline (SD_TIMEOUT), or at most a slice after a
# handler raised (SD_INTERRUPTED) or forked (SD_FORKED, in the child).

cimport cython
from cpython.ref cimport PyObject
from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.string cimport strerror

from shmdomains import errors

cdef enum:
    SECOND = 1000000000  # in nanoseconds, as all times of the core
    SLOW_AFTER = 5000000000  # a wait is slow
    PATIENT_READS = 100  # that writers overtook, before a reader lets other threads run

# What a handler raised inside a wait passes through C that knows nothing of Python; it is kept
# here until `raise_code` raises it. The GIL is held in between.
cdef PyObject *kept_type = NULL
cdef PyObject *kept_value = NULL
cdef PyObject *kept_traceback = NULL


cdef int slice_hook(pthread_mutex_t *mutex, uint64_t deadline) noexcept:
    cdef int result
    cdef sd_thread *thread = sd_self()
    thread.in_slice = True  # the only place where mutexes are taken and freed without the GIL
    with nogil:
        result = sd_mutex_slice(mutex, deadline)
    thread.in_slice = False
    if thread.orphans != NULL:
        free_orphans(thread)
    return result


cdef int wait_hook(pthread_mutex_t *mutex, uint64_t deadline) noexcept:
    cdef int result = SD_OK
    if mutex != NULL:
        result = slice_hook(mutex, deadline)
        if result != SD_TIMEOUT:
            return result
    return after_slice(result)


cdef int after_slice(int result) noexcept:
    """Between two slices: free what other threads dropped in our name, run signal handlers.
    Returns `result`, SD_INTERRUPTED or SD_FORKED."""
    cdef int raised
    cdef unsigned nested, short_wait
    cdef bint asks
    cdef uint64_t until
    cdef sd_thread *thread = sd_self()
    cdef uint64_t epoch = sd_fork_epoch
    # Whoever we wait for may be waiting for one of those locks.
    if thread.orphans != NULL:
        free_orphans(thread)
    if thread.gives_up:
        PyErr_SetObject(WorkGivenUp, None)
        PyErr_Fetch(&kept_type, &kept_value, &kept_traceback)
        return SD_INTERRUPTED
    nested, short_wait = thread.nested, thread.short_wait
    asks, until = thread.asks, thread.until
    thread.nested, thread.short_wait = nested + 1, 0
    thread.asks, thread.until = False, 0  # a handler's waits are its own
    raised = PyErr_CheckSignals()
    if not raised and epoch == sd_fork_epoch and thread.wait != NULL:
        raised = look_how_long(thread.wait)
    sd_self()  # first: in a child that a handler forked this resets the thread
    thread.nested, thread.short_wait = nested, short_wait
    thread.asks, thread.until = asks, until
    if raised:
        PyErr_Fetch(&kept_type, &kept_value, &kept_traceback)
        return SD_INTERRUPTED
    # What was locked before the wait is the parent's, and the child cannot tell what that was.
    return result if epoch == sd_fork_epoch else SD_FORKED


cdef bint look_how_long(sd_wait *wait) noexcept:
    """Log a wait that is slow, once. True: an exception is set, of a signal handler that ran
    meanwhile."""
    cdef Segment doms = <Segment>wait.list
    cdef uint64_t waited = sd_now() - wait.since
    cdef object raised = None
    if TASKS and wait.outer == NULL and not wait.told_loop and runs_loop():
        wait.told_loop = True
        try:
            HOLDERS.stops_loop(error_of_wait(doms, wait, waited))
        except BaseException as exc:
            PyErr_SetObject(type(exc), exc)
            return True
    if wait.told or not doms.slow_after_ns or waited < doms.slow_after_ns:
        return False
    wait.told = True
    try:
        HOLDERS.slow_wait(error_of_wait(doms, wait, waited))
    except BaseException as exc:
        raised = exc
    if raised is None:
        return False
    PyErr_SetObject(type(raised), raised)
    return True


sd_wait_hook = wait_hook
sd_slice_hook = slice_hook


cdef uint64_t deadline_of(timeout) except? 1:
    """None for ever, 0 try, else seconds from now."""
    cdef double seconds
    if timeout is None:
        return SD_FOREVER
    if TASKS and sd_self().until and timeout:
        return sd_self().until  # the call begins anew, its time does not
    seconds = timeout
    if not seconds >= 0:
        raise ValueError(f"timeout is {timeout!r}; None waits for ever, 0 tries, else seconds")
    if seconds == 0:
        return SD_TRY
    if seconds > 1e9:
        return SD_FOREVER
    return sd_now() + <uint64_t>(seconds * SECOND)


cdef object seconds_left(uint64_t deadline):
    """The `timeout` that a deadline leaves."""
    cdef uint64_t now
    if deadline == SD_FOREVER:
        return None
    now = sd_now()
    return (deadline - now) / <double>SECOND if deadline > now else 0


@cython.final
@cython.freelist(4)
cdef class Deadline:
    """One time-out over several waits. `timeout` in seconds: None waits for ever, 0 tries, a
    negative one is a `ValueError`."""
    cdef uint64_t end

    def __cinit__(self, timeout):
        self.end = deadline_of(timeout)

    def left(self):
        """The `timeout` of the next wait."""
        return seconds_left(self.end)


cdef int raise_code(int result, object what) except -1:
    """Raise what a code of the core means. Not for a time-out whose holder is known
    (`raise_timed_out`), nor where the segment may be poisoned (`raise_poison_or_code`)."""
    global kept_type, kept_value, kept_traceback, BLOCKED
    if result == SD_INTERRUPTED:
        PyErr_Restore(kept_type, kept_value, kept_traceback)
        kept_type = kept_value = kept_traceback = NULL
        return -1
    if result == WOULD_BLOCK:
        blocked, BLOCKED = BLOCKED, None  # it keeps the list
        raise WouldBlock(blocked)
    if result == SD_TIMEOUT:
        raise errors.LockTimeout(
            f"{what}: one of the segment's own short locks was not free in time")
    if result == SD_NESTED:
        raise errors.LockOrder(
            f"{what}: this thread is in the middle of using it: a signal handler interrupted it "
            "there, or kept what was waited for; set a flag in the handler and do it afterwards")
    if result == SD_FORKED:
        raise errors.LockOrder(
            f"{what}: a signal handler forked in the middle of a wait, and the child holds nothing "
            "of what its parent holds; let it end in the handler, or set a flag there and fork "
            "afterwards")
    if result == SD_FULL:
        raise errors.SegmentFull(
            f"{what}: the segment is full; create it with larger max_domains or max_bytes")
    if result == SD_NO_MEMORY:
        raise errors.SegmentFull(
            f"{what}: no memory for the segment ({strerror(errno).decode()}); free some in its "
            "file system or memory cgroup and try again")
    if result == SD_DESCRIPTOR:
        raise errors.DescriptorLost(
            f"{what}: no memory for the segment: this process closed its descriptor, and before "
            "Linux 5.14 memory is not committed without it; have it kept (files_preserve=[doms] "
            "for python-daemon), or attach anew by name")
    if result == SD_ERRNO:
        raise OSError(errno, strerror(errno).decode(), what)
    raise errors.SegmentCorrupt(
        f"{what}: the segment holds a value that cannot be right ({result})")


cdef int back_off(uint64_t deadline) except -1:
    """Let other threads and signal handlers run before a read is tried again."""
    if sd_now() >= deadline:
        raise errors.Busy("writers kept overtaking this read; try again, or lock the domain")
    if PyErr_CheckSignals():
        return -1
    HOLDERS.pause()
    return 0


cdef int between_parts(Segment doms) except -1:
    """Between two parts of a long look: let other threads and signal handlers run."""
    if PyErr_CheckSignals():
        return -1
    HOLDERS.pause()
    return still_open(doms)
