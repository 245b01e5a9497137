# Locks: of the list and of a slot, of either kind, and what this thread may wait for.
#
# `lock="robust"` locks are the core's mutexes. `lock="multiprocessing"` locks are Python
# objects, on whose semaphores the core lets threads sleep, and whose holder is written into the
# segment so that a dead one's lock can be taken over. A thread waits for a second domain only
# while it holds the list lock. A list that is closed during a wait stays mapped until the wait
# is over, and the wait raises `ListClosed`.

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

import warnings

from shmdomains import errors


# What to do where a lock is another thread's.
cdef object ONE_THREAD = "lock, use and unlock in one thread; in asyncio use shmdomains.aio"


cdef object other_thread(uint64_t who, object what):
    """What an error says of a lock that another thread of this process holds, or another task."""
    if who == sd_self().who:
        return (f"another task of this thread holds {what}, or the thread itself outside of its "
                f"tasks, not {this()}: lock, use and unlock in one task")
    return (f"thread {sd_who_tid(who)} of this process holds {what}, not this thread; locks belong "
            f"to threads: {ONE_THREAD}")


cdef int need_open(Segment doms) except -1:
    """Raise `ListClosed` if it is closed. In a child, the first call makes the mapping its own."""
    if doms.closed:
        raise errors.ListClosed("this DomainList is closed")
    if doms.segment.epoch != sd_fork_epoch:
        return begin_in_child(doms)
    return 0


cdef int begin_in_child(Segment doms) except -1:
    cdef char why[200]
    if sd_begin_in_child(doms.segment, why, sizeof(why)) == SD_OK:
        return look_for_greenlets()
    raise errors.SegmentMismatch(f"this process was forked from one that had attached: "
                                 f"{why.decode()}")


cdef inline void begin_wait(Segment doms) noexcept:
    """The mapping stays until `end_wait`, whoever closes the list meanwhile."""
    doms.segment.inside += 1


cdef void end_wait(Segment doms) noexcept:
    if doms.segment.inside:  # 0: this is a child that a handler forked
        doms.segment.inside -= 1
    if doms.closed:
        sd_detach(doms.segment)


cdef int still_open(Segment doms) except -1:
    if doms.closed:
        raise errors.ListClosed("this DomainList was closed during the wait")
    return 0


cdef int need_ours(Segment doms, Record record) except -1:
    need_open(doms)
    if record.segment.segment != doms.segment:
        raise errors.WrongList(
            f"domain {uuid_object(record.uuid_raw)} is of another list; call the list that it "
            "came from")
    return 0


cdef int need_list(Segment doms, object what) except -1:
    """Raise unless the caller holds the list lock, and is not a handler that interrupted that."""
    need_open(doms)
    if doms.segment.list_nonce != me().nonce:
        raise errors.ListNotLocked(f"{what} needs the list lock: with doms.locked(): ...")
    if sd_self().nested > doms.segment.list_nested:
        raise_code(SD_NESTED, what)
    return 0


cdef int lock_list(Segment doms, object timeout, object why) except -1:
    cdef uint64_t deadline = deadline_of(timeout)
    cdef bytes operation
    if why is not None:
        need_text(why)
    cdef sd_thread *owner = begin_asking()
    need_open(doms)
    if doms.segment.list_nonce == owner.nonce:
        raise errors.AlreadyLocked(f"{this()} holds the list lock already")
    if owner.records != NULL and holds_any(doms):
        raise errors.LockOrder(
            f"{this()} holds a domain; the list lock comes first: unlock the domain, or take "
            "the list lock before it")
    acquire_list(doms, deadline, timeout)
    if why is not None:
        operation = as_operation(why)
        sd_list_say(doms.segment, PyBytes_AS_STRING(operation), PyBytes_GET_SIZE(operation))
    return 0


cdef int unlock_list(Segment doms) except -1:
    cdef sd_thread *owner = me()
    if doms.segment != NULL and doms.segment.list_nonce == owner.nonce:
        if sd_self().nested > doms.segment.list_nested:
            raise_code(SD_NESTED, "unlock the list")
        release_list(doms)
        if doms.closed:
            sd_detach(doms.segment)
        return 0
    need_open(doms)
    if doms.segment.list_nonce and list_owner_pid(doms) == owner.pid:
        raise errors.NotOwner(
            other_thread(sd_load(&doms.segment.header.list_owner.who), "the list lock"))
    raise errors.ListNotLocked(f"{this()} does not hold the list lock")


cdef uint32_t list_owner_pid(Segment doms) noexcept:
    cdef sd_owner *owner = &doms.segment.header.list_owner
    return sd_owner_pid(owner, sd_load(&owner.who))


@cython.final
@cython.no_gc_clear
cdef class ListHold:
    """The list lock for a ``with`` block. No signal handler runs between the end of the wait and
    the first line of the block, nor in `__exit__`, so Ctrl-C cannot leave the list locked.

    CPython 3.14 alone may raise between `__enter__` and the block (gh-148874): then this object is
    dropped without `__exit__`, and unlocks.
    """
    cdef Segment doms
    cdef object timeout, why
    cdef uint64_t nonce  # of whoever is in the block, or 0

    def __init__(self, Segment doms not None, timeout, why):
        self.doms, self.timeout, self.why = doms, timeout, why

    def __enter__(self):
        self.doms.lock(self.timeout, self.why)
        self.nonce = me().nonce
        return self.doms

    def __exit__(self, kind, value, traceback):
        self.nonce = 0
        if self.doms.is_locked:
            self.doms.unlock()

    def __dealloc__(self):
        if self.nonce and self.nonce == me().nonce and self.doms.is_locked:
            drop_list(self.doms, "what locked() of a DomainList gave")


cdef void drop_list(Segment doms, object what) noexcept:
    """Unlock for a list, or a `ListHold`, that is freed while its lock is held."""
    release_list(doms)
    if doms.closed:
        sd_detach(doms.segment)
    if warnings is not None:
        warnings.warn(f"{what} was dropped while {this()} held its lock, which is freed: "
                      "use 'with doms.locked()'", ResourceWarning, stacklevel=1)


cdef int drop_list_for(Segment doms, sd_thread *holder, uint64_t nonce) except -1:
    """The same for another thread, whose task held it and is over."""
    forget_list(doms)
    if doms.multiprocessing:
        sd_list_leave(doms.segment, semaphore_of(doms.list_semaphore), holder)
    elif sd_list_unlock_for(doms.segment, holder, nonce) != SD_OK:
        leave_orphan(holder, doms.segment, 0, False, True)
    if doms.closed:
        sd_detach(doms.segment)
    return 0


cdef int lock_semaphore(Segment doms, object lock, sd_owner *owner, int kind, uint32_t number,
                        uint64_t deadline, uint64_t *died_who, uint64_t *died_pid) except -1:
    """Take a `multiprocessing.Lock`. SD_DIED: its holder was dead, and this thread took it over."""
    cdef sd_wait wait
    cdef bint waits = False
    cdef int result, how
    cdef sem_t *semaphore
    cdef object turn = None
    if lock is None:
        raise errors.LockKindMismatch(
            "this list uses multiprocessing locks, which only processes can have that "
            "inherited the DomainList (by fork, as an argument of Process, in initargs of a pool); "
            "a stranger may read it: snapshot(), list(), peek()")
    semaphore = semaphore_of(lock)
    if not (TASKS and must_queue(doms, kind, number, owner, NULL, deadline)):
        if sd_semaphore_try(semaphore, owner) == SD_OK:
            return SD_OK
    try:
        while True:
            result = take_from_dead(owner, died_who, died_pid)
            if result != SD_TIMEOUT:
                return result
            if not TASKS:
                break
            how = how_to_wait(doms, kind, number, owner, NULL, deadline)
            if how == BLOCKS:
                break
            if how != SWITCHES:
                return how
            turn = SWITCH(BLOCKED, seconds_left(deadline), turn)
            result = sd_semaphore_try(semaphore, owner)
            if result == SD_OK:
                return SD_OK
    finally:
        if turn is not None:
            leave_turn(turn, doms, kind, number, result == SD_OK or result == SD_DIED, semaphore)
    while True:
        result = take_from_dead(owner, died_who, died_pid)
        if result == SD_TIMEOUT and (deadline == SD_FOREVER or sd_now() < deadline):
            if not waits:
                sd_wait_begin(&wait, doms.segment, kind, number, <void *>doms)
                waits = True
            with nogil:
                result = sd_semaphore_slice(semaphore, owner, deadline)
            if result == SD_TIMEOUT:
                result = after_slice(result)
                if result == SD_TIMEOUT:
                    continue
        if waits:
            sd_wait_end(&wait)
        return result


cdef int take_from_dead(sd_owner *owner, uint64_t *died_who, uint64_t *died_pid) noexcept:
    """SD_DIED: this thread took a dead one's lock over. SD_TIMEOUT: its holder lives. SD_NESTED:
    this thread has it: a signal handler, or the collector, took and kept it."""
    cdef uint64_t who = sd_load_acquire(&owner.who)
    cdef uint32_t pid = sd_owner_pid(owner, who)
    if who == sd_self().who:
        return SD_TIMEOUT if TASKS else SD_NESTED
    if who and not sd_alive(who) and sd_take_over(owner, who):
        died_who[0], died_pid[0] = who, pid
        return SD_DIED
    return SD_TIMEOUT


cdef inline sem_t *semaphore_of(object semaphore) except NULL:
    return <sem_t *><size_t>semaphore.handle


cdef int need_kept(bint kept, object what) except -1:
    """Raise if another thread took over what this one held and released."""
    if kept:
        return 0
    raise errors.NotOwner(
        f"{what} was no longer this thread's when it unlocked: another one found its owner record "
        "damaged, took this thread for dead and took over; both may have changed it: look with "
        "check()")


cdef int acquire_list(Segment doms, uint64_t deadline, object timeout) except -1:
    """The list lock, of either kind, whatever this thread holds. `timeout` is for the error."""
    cdef int result
    cdef bint died
    cdef uint64_t who, pid
    cdef sd_segment *segment = doms.segment
    begin_wait(doms)
    try:
        if not doms.multiprocessing:
            if TASKS:
                result = lock_as_task(doms, SD_LOCK_LIST, 0, &segment.header.list_owner,
                                      &segment.header.list_mutex, deadline)
            else:
                result = sd_list_lock(segment, SD_SPIN if deadline else SD_TRY)
                if result == SD_TIMEOUT and deadline:
                    result = wait_for_list(doms, deadline)
        else:
            result = lock_semaphore(doms, doms.list_semaphore, &segment.header.list_owner,
                                    SD_LOCK_LIST, 0, deadline, &who, &pid)
            if result == SD_OK or result == SD_DIED:
                died = result == SD_DIED
                result = sd_list_entered(segment, died)
                if died:
                    sd_self().repair.who, sd_self().repair.pid = who, pid
                if result != SD_OK:
                    sd_semaphore_leave(semaphore_of(doms.list_semaphore),
                                       &segment.header.list_owner, sd_self().who)
        if result == SD_OK:
            segment.list_taker = <void *>doms
            if TASKS:
                note_list(doms)
            if doms.closed:
                release_list(doms)
    finally:
        end_wait(doms)
    if result == SD_OK:
        return still_open(doms)
    if result == SD_TIMEOUT:
        raise_timed_out(&segment.header.list_owner, &segment.header.list_mutex,
                        segment.header.list_why, "the list lock", timeout)
    if result == OTHER_TASK:
        return raise_other_task("the list lock")
    return raise_poison_or_code(doms, result, "lock the list")


cdef int wait_for_list(Segment doms, uint64_t deadline) noexcept:
    cdef sd_wait wait
    sd_wait_begin(&wait, doms.segment, SD_LOCK_LIST, 0, <void *>doms)
    cdef int result = sd_list_wait(doms.segment, deadline)
    sd_wait_end(&wait)
    return result


cdef int wait_for_slot(Segment doms, uint32_t slot, uint64_t deadline) noexcept:
    cdef sd_wait wait
    sd_wait_begin(&wait, doms.segment, SD_LOCK_DOMAIN, slot, <void *>doms)
    cdef int result = sd_slot_wait(doms.segment, slot, deadline)
    sd_wait_end(&wait)
    return result


cdef int release_list(Segment doms) except -1:
    if not doms.multiprocessing:
        if TASKS:
            if not tell_tasks(doms, SD_LOCK_LIST, 0, &doms.segment.header.list_mutex):
                return 0
            forget_list(doms)
        sd_list_unlock(doms.segment)
        return 0
    if doms.list_lock is None:
        raise errors.LockKindMismatch("unlock through the DomainList that locked")
    if TASKS:
        if not tell_tasks(doms, SD_LOCK_LIST, 0, NULL):
            return 0
        forget_list(doms)
    return need_kept(sd_list_leave(doms.segment, semaphore_of(doms.list_semaphore),
                                   sd_self()), "the list lock")


cdef int acquire_slot(Segment doms, uint32_t slot, uint64_t deadline) except -1:
    """Returns SD_OK or SD_TIMEOUT."""
    cdef int result
    cdef uint64_t who, pid
    cdef sd_slot *at = &doms.segment.slots[slot]
    begin_wait(doms)
    try:
        if not doms.multiprocessing:
            if TASKS:
                result = lock_as_task(doms, SD_LOCK_DOMAIN, slot, &at.owner, &at.mutex, deadline)
            else:
                result = sd_slot_lock(doms.segment, slot, SD_SPIN if deadline else SD_TRY)
                if result == SD_TIMEOUT and deadline:
                    result = wait_for_slot(doms, slot, deadline)
        else:
            lock = None if doms.slot_semaphores is None else doms.slot_semaphores[slot]
            result = lock_semaphore(doms, lock, &at.owner, SD_LOCK_DOMAIN, slot, deadline, &who,
                                    &pid)
            if result == SD_DIED:
                sd_count(&doms.segment.counters.deaths)
                sd_self().repair.died = True
                sd_self().repair.who, sd_self().repair.pid = who, pid
                sd_recover_slot(doms.segment, slot, who, pid)
                result = SD_OK
            if result == SD_OK:
                result = sd_slot_entered(doms.segment, slot)
                if result != SD_OK:
                    sd_semaphore_leave(semaphore_of(doms.slot_semaphores[slot]), &at.owner,
                                       sd_self().who)
        if result == SD_OK and doms.closed:
            release_slot(doms, slot, False)
    finally:
        end_wait(doms)
    if result == SD_OK or result == SD_TIMEOUT:
        still_open(doms)
        return result
    if result == OTHER_TASK:
        return raise_other_task(describe(doms, slot))
    return raise_poison_or_code(doms, result, "lock a domain")


cdef int release_slot(Segment doms, uint32_t slot, bint delivered) except -1:
    """`delivered`: the caller saw the domain, and with it the notice of an earlier holder's death;
    else the next holder gets that notice."""
    if TASKS and not tell_tasks(doms, SD_LOCK_DOMAIN, slot, &doms.segment.slots[slot].mutex):
        return 0
    if not doms.multiprocessing:
        sd_slot_unlock(doms.segment, slot, delivered)
        return 0
    if not sd_slot_leave(doms.segment, slot, delivered, sd_self().who,
                         semaphore_of(doms.slot_semaphores[slot])):
        need_kept(False, describe(doms, slot))
    return 0


cdef void *held_pointer(Segment doms, uint32_t slot, uint64_t life):
    """The caller's locked handle to the slot, or NULL. `life` 0: any."""
    cdef void *at = me().records
    while at != NULL:
        if ((<Record>at).slot == slot and (<Record>at).segment.segment == doms.segment
                and (life == 0 or (<Record>at).life == life)):
            return at
        at = (<Record>at).after
    return NULL


cdef Record held_here(Segment doms, uint32_t slot, uint64_t life):
    """That handle, or None. A handle that is being freed still holds the slot, and code runs
    meanwhile (callbacks of weak references): it must not get a reference again."""
    cdef void *at = held_pointer(doms, slot, life)
    if at == NULL or Py_REFCNT(at) == 0:
        return None
    return <Record>at


cdef int need_not_held(Segment doms, uint32_t slot) except -1:
    cdef sd_slot *at = &doms.segment.slots[slot]
    if not sd_load(&at.owner.who) and not sd_mutex_busy(&at.mutex):
        return 0  # nobody holds it: a thousand handles need not be looked at
    if me().records != NULL and held_pointer(doms, slot, 0) != NULL:
        raise errors.AlreadyLocked(f"{this()} holds {describe(doms, slot)} already")
    return 0


cdef bint holds_any(Segment doms):
    cdef void *at = me().records
    while at != NULL:
        if (<Record>at).segment.segment == doms.segment:
            return True
        at = (<Record>at).after
    return False


cdef bint holds_any_but(Segment doms, Record record):
    cdef void *at = me().records
    while at != NULL:
        if (<Record>at).segment.segment == doms.segment:
            if record is None or (<Record>at).slot != record.slot:
                return True
        at = (<Record>at).after
    return False


cdef int may_wait(Segment doms, uint64_t deadline) except -1:
    """Raise if the caller may not wait for a domain: for a second one he may wait only under the
    list lock, or two could wait for each other."""
    cdef sd_thread *owner = begin_asking()
    if TASKS:
        need_room_for_lock()
    if owner.records == NULL:
        return 0
    if owner.held >= SD_HELD_MAX:
        raise errors.TooManyLocks(
            f"{this()} holds {owner.held} locks; unlock some: the kernel frees a limited "
            "number of locks when a thread dies")
    if deadline == SD_TRY or doms.segment.list_nonce == owner.nonce or not holds_any(doms):
        return 0
    raise errors.LockOrder(
        f"{this()} holds a domain and would wait for another; take both with lock_many(), "
        "or hold the list lock, or use timeout=0")


cdef void free_orphans(sd_thread *thread) noexcept:
    """Free the locks of this thread whose handles another thread dropped and could not free."""
    cdef sd_orphan *orphan
    while thread.orphans != NULL:
        orphan = thread.orphans
        thread.orphans = orphan.next
        if orphan.list:
            sd_list_unlock(orphan.segment)
        elif orphan.named:
            sd_named_unlock(orphan.segment, orphan.slot, False)
        else:
            sd_slot_unlock(orphan.segment, orphan.slot, False)
        sd_detach(orphan.segment)
        free(orphan)


cdef object free_for(sd_thread *thread, uint64_t nonce, sd_segment *segment, uint32_t slot,
                     bint named):
    """Free a lock that `thread` holds and whose handle another thread dropped, or leave that to
    `thread`. Returns when it is freed."""
    cdef int result
    cdef sd_word *since
    if named:
        result = sd_named_unlock_for(segment, slot, thread, nonce)
    else:
        result = sd_slot_unlock_for(segment, slot, thread, nonce)
    if result == SD_OK:
        return "is freed"
    leave_orphan(thread, segment, slot, named)
    since = &segment.named[slot].owner.since if named else &segment.slots[slot].owner.since
    sd_store(since, sd_load(since) | SD_SINCE_DROPPED)
    if result == SD_TIMEOUT:
        return "is freed within 0.1 s, by that thread, which waits for another lock"
    return "is freed when that thread next locks something, or ends"


cdef void leave_orphan(sd_thread *thread, sd_segment *segment, uint32_t slot, bint named,
                       bint list_lock=False) noexcept:
    """A lock for `thread` to free. Without memory for it, the lock ends with its thread."""
    cdef sd_orphan *orphan = <sd_orphan *>malloc(sizeof(sd_orphan))
    if orphan == NULL:
        return
    orphan.segment, orphan.slot, orphan.named, orphan.list = segment, slot, named, list_lock
    orphan.next = thread.orphans
    thread.orphans = orphan
