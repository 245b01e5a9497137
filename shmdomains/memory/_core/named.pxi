# Named locks: `Mutex`, a handle to one, and what a thread may wait for while it holds some.
#
# Named locks come first in the order, before the list. Each is a robust mutex, in lists of either
# kind. A hold begins and ends with the mutex; in between the handle stands in the list of its
# thread. To that thread every other handle to the same lock stands for this one.

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

import warnings
from functools import partial

from shmdomains import errors


cdef object lock_name_object(const sd_lock_name *name):
    return (<const char *>name.text)[1:1 + name.text[0]].decode("utf-8", "backslashreplace")


cdef int make_lock_name(sd_lock_name *to, object name) except -1:
    cdef bytes encoded
    if not isinstance(name, str):
        raise TypeError(f"the name of a lock is a str, not {type(name).__name__}")
    encoded = name.encode()
    if not 0 < len(encoded) <= SD_NAMED_NAME_MAX:
        raise ValueError(
            f"the name of a lock is 1 to {SD_NAMED_NAME_MAX} bytes of UTF-8, not {len(encoded)}")
    memset(to, 0, sizeof(sd_lock_name))
    to.text[0] = <unsigned char>len(encoded)
    memcpy(to.text + 1, <const char *>encoded, len(encoded))
    return 0


cdef list named_locks(Segment doms):
    """The names, in the order in which they were given. A damaged one is left out."""
    cdef unsigned place
    cdef sd_lock_name raw
    need_open(doms)
    return [lock_name_object(&raw) for place in range(SD_NAMED_MAX)
            if sd_named_get(doms.segment, place, &raw) == SD_OK]


cdef object what_of(Mutex mutex):
    return f"mutex {mutex.name!r}"


cdef void *held_mutex(Segment doms, unsigned place) noexcept:
    """The caller's handle that holds the lock, or NULL."""
    cdef void *at = me().named
    while at != NULL:
        if (<Mutex>at).place == place and (<Mutex>at).doms.segment == doms.segment:
            return at
        at = (<Mutex>at).after
    return NULL


cdef bint holds_named(Segment doms) noexcept:
    cdef void *at = me().named
    while at != NULL:
        if (<Mutex>at).doms.segment == doms.segment:
            return True
        at = (<Mutex>at).after
    return False


cdef int may_wait_for_named(Segment doms, uint64_t deadline, object what) except -1:
    cdef sd_thread *owner = me()
    if TASKS:
        need_room_for_lock()
    if owner.held >= SD_HELD_MAX:
        raise errors.TooManyLocks(
            f"{this()} holds {owner.held} locks; unlock some: the kernel frees a limited "
            "number of locks when a thread dies")
    if deadline == SD_TRY:
        return 0
    if doms.segment.list_nonce == owner.nonce or owner.records != NULL and holds_any(doms):
        raise errors.LockOrder(
            f"{this()} holds the list or a domain and would wait for {what}; named locks come "
            "first: take it before, or use timeout=0")
    if deadline == SD_FOREVER and holds_named(doms):
        raise errors.LockOrder(
            f"{this()} holds a named lock and would wait for {what}, perhaps for ever; give it "
            "a timeout")
    if deadline == SD_FOREVER and HOLDERS.holds_job(me().nonce):
        raise errors.LockOrder(
            f"{this()} holds a job and would wait for {what}, perhaps for ever; named locks "
            "come first: take it before, or give it a timeout")
    return 0


cdef int lock_mutex(Mutex mutex, object timeout) except -1:
    cdef sd_named *at
    if try_mutex(mutex, deadline_of(timeout)) == SD_TIMEOUT:
        at = &mutex.doms.segment.named[mutex.place]
        raise_timed_out(&at.owner, &at.mutex, at.why, what_of(mutex), timeout)
    return 0


cdef int try_mutex(Mutex mutex, uint64_t deadline) except -1:
    """SD_OK or SD_TIMEOUT."""
    cdef Segment doms = mutex.doms
    cdef int result
    cdef sd_named *at = &doms.segment.named[mutex.place]
    need_open(doms)
    begin_asking()
    if held_mutex(doms, mutex.place) != NULL:
        raise errors.AlreadyLocked(f"{this()} holds {what_of(mutex)} already")
    may_wait_for_named(doms, deadline, what_of(mutex))
    begin_wait(doms)
    try:
        if TASKS:
            result = lock_as_task(doms, SD_LOCK_MUTEX, mutex.place, &at.owner, &at.mutex, deadline)
        else:
            result = sd_named_lock(doms.segment, mutex.place, SD_SPIN if deadline else SD_TRY)
            if result == SD_TIMEOUT and deadline:
                result = wait_for_named(doms, mutex.place, deadline)
        if result == SD_OK:
            if doms.closed:
                sd_named_unlock(doms.segment, mutex.place, False)
            else:
                enter_mutex(mutex)
    finally:
        end_wait(doms)
    if result == SD_OK:
        still_open(doms)
        return result
    if result == SD_TIMEOUT:
        still_open(doms)
        return result
    if result == OTHER_TASK:
        return raise_other_task(what_of(mutex))
    return raise_poison_or_code(doms, result, f"lock {what_of(mutex)}")


cdef int wait_for_named(Segment doms, unsigned place, uint64_t deadline) noexcept:
    cdef sd_wait wait
    sd_wait_begin(&wait, doms.segment, SD_LOCK_MUTEX, place, <void *>doms)
    cdef int result = sd_named_wait(doms.segment, place, deadline)
    sd_wait_end(&wait)
    return result


cdef void enter_mutex(Mutex mutex) noexcept:
    cdef sd_thread *owner = me()
    mutex.nonce, mutex.thread, mutex.nested = owner.nonce, owner, sd_self().nested
    mutex.before, mutex.after = NULL, owner.named
    if owner.named != NULL:
        (<Mutex>owner.named).before = <void *>mutex
    owner.named = <void *>mutex
    if TASKS:
        count_held(owner, 1)
    if mutex.why is not None:
        sd_named_explain(mutex.doms.segment, mutex.place, <const char *><bytes>mutex.why,
                         len(<bytes>mutex.why))


cdef void leave_mutex(Mutex mutex) noexcept:
    if mutex.before != NULL:
        (<Mutex>mutex.before).after = mutex.after
    else:
        mutex.thread.named = mutex.after
    if mutex.after != NULL:
        (<Mutex>mutex.after).before = mutex.before
    mutex.nonce = 0
    if TASKS:
        count_held(mutex.thread, -1)


cdef int unlock_mutex(Mutex mutex) except -1:
    cdef Segment doms = mutex.doms
    cdef Mutex mine = need_mutex(mutex)
    if sd_self().nested > mine.nested:
        raise_code(SD_NESTED, f"unlock {what_of(mutex)}")
    if TASKS and not tell_tasks(doms, SD_LOCK_MUTEX, mutex.place,
                                &doms.segment.named[mutex.place].mutex):
        return 0
    leave_mutex(mine)
    sd_named_unlock(doms.segment, mutex.place, True)
    if doms.closed:
        sd_detach(doms.segment)
    return 0


cdef Mutex need_mutex(Mutex mutex):
    """The handle through which the caller holds the lock."""
    cdef void *held = held_mutex(mutex.doms, mutex.place)
    cdef sd_owner *owner
    if held != NULL:
        return <Mutex>held
    owner = &mutex.doms.segment.named[mutex.place].owner
    if sd_owner_pid(owner, sd_load(&owner.who)) == sd_self().pid:
        raise errors.NotOwner(other_thread(sd_load(&owner.who), what_of(mutex)))
    raise errors.MutexNotLocked(f"{this()} does not hold {what_of(mutex)}")


cdef void abandon_mutex(Mutex mutex, bint task_over=False) noexcept:
    """A handle that holds the lock is freed, or its task is over: unlock, also for another
    thread."""
    cdef sd_segment *segment = mutex.doms.segment
    cdef bint here = mutex.thread.kernel == sd_self()
    leave_mutex(mutex)
    if here:
        sd_named_unlock(segment, mutex.place, False)
    else:
        freed = free_for(mutex.thread.kernel, mutex.thread.kernel_nonce, segment, mutex.place,
                         True)
    if TASKS and here:
        tell_tasks(mutex.doms, SD_LOCK_MUTEX, mutex.place, NULL)
    if mutex.doms.closed:
        sd_detach(segment)
    if warnings is None:  # the interpreter may be going down
        return
    if task_over:
        warnings.warn(f"a task ended while it held {what_of(mutex)}, which is freed: use "
                      "'async with'", ResourceWarning, stacklevel=1)
        return
    if here:
        warnings.warn(f"{what_of(mutex)} was dropped while it was locked, and is freed: use "
                      "'with'", ResourceWarning, stacklevel=1)
        return
    warnings.warn(f"{what_of(mutex)} was dropped in another thread than the one that locked it, "
                  f"thread {sd_who_tid(mutex.thread.who)}, and {freed}: {ONE_THREAD}",
                  ResourceWarning, stacklevel=1)


@cython.final
@cython.no_gc_clear
cdef class Mutex:
    """A named lock of a `DomainList`; `DomainList.mutex` gives it.

    A thread holds it, and its death frees it: the next holder sees `previous_owner_died`. It is
    not recursive. ``with`` waits for as long as `mutex` was told; `lock` and `acquire` take a
    timeout of their own. To its holder every other `Mutex` of the same lock stands for it.

    >>> from shmdomains import DomainList
    >>> with DomainList().mutex("scheduler", timeout=0) as held:
    ...     held.name, held.is_locked, held.previous_owner_died
    ('scheduler', True, None)
    """
    cdef Segment doms
    cdef unsigned place
    cdef object timeout
    cdef object why          # bytes, or None
    cdef readonly str name
    cdef uint64_t nonce      # of the owner who holds it through this handle, or 0
    cdef sd_thread *thread
    cdef unsigned nested     # how deep in signal handlers it was locked
    cdef void *before        # and `after`: neighbours among that owner's named locks
    cdef void *after
    cdef object __weakref__

    def __init__(self, Segment doms not None, name, timeout=None, why=None):
        if self.doms is not None:
            raise TypeError("this Mutex has its lock; DomainList.mutex() gives another one")
        cdef sd_lock_name wanted
        cdef unsigned place
        cdef int result
        cdef uint64_t deadline = deadline_of(timeout)
        need_open(doms)
        make_lock_name(&wanted, name)
        # A short lock is free in a moment: who would only try the mutex waits that long for a name.
        if deadline != SD_FOREVER:
            deadline = max(deadline, sd_now() + SECOND)
        begin_wait(doms)
        result = sd_named_give(doms.segment, &wanted, &place, deadline)
        end_wait(doms)
        still_open(doms)
        if result == SD_FULL:
            raise errors.TooManyMutexes(
                f"mutex {name!r}: this list has {SD_NAMED_MAX} named locks already, which is the "
                "limit, and a name is never given back; use one of those names")
        if result != SD_OK:
            raise_poison_or_code(doms, result, f"name mutex {name!r}")
        self.why = None if why is None else why.encode() or None
        self.name, self.place, self.timeout, self.doms = name, place, timeout, doms

    def __dealloc__(self):
        if (self.nonce and self.thread.epoch == sd_fork_epoch
                and self.thread.nonce == self.nonce and runs_on_living(self.thread)):
            abandon_mutex(self)

    @property
    def is_locked(self):
        """Whether this thread holds it."""
        return held_mutex(self.doms, self.place) != NULL

    @property
    def previous_owner_died(self):
        """The `LockHolder` that died holding it since it was last unlocked in order, or None. Only
        for its holder, else `MutexNotLocked`."""
        died = self._last_death()
        return None if died is None else died()

    def _last_death(self):
        """None, or what describes the same later, for that takes a moment."""
        cdef uint64_t who, pid
        need_mutex(self)
        if sd_named_died(self.doms.segment, self.place, &who, &pid) != SD_OK:
            raise_code(SD_CORRUPT, f"who died holding mutex {self.name!r}")
        if not who:
            return None
        return partial(HOLDERS.dead_holder, sd_who_tid(who) if who != SD_DIED_UNKNOWN else 0,
                       <uint32_t>pid, sd_who_start(who))

    def lock(self, timeout=None):
        """Take it. `timeout` in seconds: None waits for ever, 0 tries.

        Raises `LockTimeout` (it names the holder), `AlreadyLocked`, `LockOrder` (this thread holds
        the list or a domain of it and would wait; or it holds another named lock of the list and
        would wait without a timeout), `TooManyLocks`, `ListClosed`.
        """
        lock_mutex(self, timeout)

    def try_lock(self):
        """Take it if it is free: True, else False. Always allowed, whatever is held."""
        return try_mutex(self, SD_TRY) == SD_OK

    def unlock(self):
        """Release it. Raises `MutexNotLocked`, or `NotOwner` if another thread holds it."""
        unlock_mutex(self)

    def acquire(self, block=True, timeout=None):
        """`lock` in the manner of `multiprocessing.Lock`: True, or False when it was not free."""
        timeout = 0 if not block or (timeout is not None and timeout < 0) else timeout
        return try_mutex(self, deadline_of(timeout)) == SD_OK

    def release(self):
        """`unlock` in the manner of `multiprocessing.Lock`."""
        unlock_mutex(self)

    def __enter__(self):
        lock_mutex(self, self.timeout)
        return self

    def __exit__(self, kind, value, traceback):
        if held_mutex(self.doms, self.place) != NULL:
            unlock_mutex(self)

    def __reduce__(self):
        why = None if self.why is None else self.why.decode()
        return HOLDERS.restore_part, (self.doms, "mutex", (self.name, self.timeout), {"why": why})

    def __repr__(self):
        return f"<Mutex {self.name!r}{' locked' if self.is_locked else ''}>"
