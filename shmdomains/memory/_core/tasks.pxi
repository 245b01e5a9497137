# Tasks that wait: what a thread does by blocking, a task or a greenlet does here.
#
# Before a lock is tried, a task looks whether others of its thread came before (`must_queue`); if
# it is not free, `how_to_wait` says how it waits: a greenlet by SWITCH, an asyncio task by an
# exception, `WouldBlock`, that goes through the rules up to `attempt`, whose caller awaits what it
# names and then calls again. So what is called by `attempt` begins anew each time.
#
# What is waited for is a `Blocked`. Its lock's end is told by FREED if a task of this thread has
# it, else by a `Watch` on the mutex (observe.h), whose `Inbox` is in the thread's event loop. The
# queues stand in ``memory/rooms.py``.

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset, strerror

from shmdomains import errors

cdef extern from "Python.h":
    int Py_AddPendingCall(int (*)(void *) except -1, void *) noexcept

cdef enum:
    # Codes of the binding.
    OTHER_TASK = 1001    # another task of this thread holds it, and a wait would stop that task
    WOULD_BLOCK = 1002   # `BLOCKED` says for what
    BLOCKS = 1003        # what `how_to_wait` says
    SWITCHES = 1004
    SLEEPS = 16          # a kind beside SD_LOCK_*: a word that changes
    SETTLES = 17         # and another: what a dead process began with a domain and its file

cdef Blocked BLOCKED = None      # what the next WOULD_BLOCK is about
cdef Blocked SETTLED = None  # by another thread, for the call that is made now
cdef object FREED = None     # callable: segment, kind, number of what is freed now, strangers?
cdef object MAY_TRY = None   # callable: segment, kind, number -> whether it is this task's turn
cdef object CAN_SWITCH = None  # callable: whether this is a greenlet with a hub
cdef object SWITCH = None    # callable: Blocked, seconds, turn -> turn; lets other greenlets run


class WouldBlock(Exception):
    """A task would have to wait; `blocked` says for what. Never leaves `aio`."""

    def __init__(self, blocked):
        self.blocked = blocked


@cython.final
cdef class Blocked:
    """What a task waits for: a lock, or a word that changes."""
    cdef Segment doms
    cdef readonly int kind         # SD_LOCK_*, SLEEPS or SETTLES
    cdef readonly uint32_t number
    cdef const sd_word *word       # SLEEPS: it differs from `seen` by then,
    cdef uint64_t seen
    cdef const sd_word *life       # or this, if it is not NULL, from `lives`
    cdef uint64_t lives            # of SETTLES, the domain's

    @property
    def key(self):
        """The same for all that wait for this lock."""
        return <size_t>self.doms.segment, self.kind, self.number

    @property
    def sleeps(self):
        """Whether it is no lock, but a change."""
        return self.kind == SLEEPS

    @property
    def settles(self):
        """Whether `settle` is to be called in another thread, and then asked again."""
        return self.kind == SETTLES

    def settle(self, uint64_t until):
        cdef uint64_t deadline = until or SD_FOREVER
        cdef Record record
        need_open(self.doms)
        record = new_record(self.doms)
        lead_to(record, self.number)
        record.life = self.lives
        try:
            lock_record(record, deadline, seconds_left(deadline))
        except errors.DomainRemoved:
            return
        end_hold(record, False)

    cdef bint is_to(self, Record record):
        return (self.doms.segment == record.segment.segment and self.number == record.slot
                and self.lives == record.life)

    @property
    def changed(self):
        """Whether what is slept for came, or its writer may have died before it told."""
        return (self.doms.closed or sd_load_acquire(self.word) != self.seen
                or self.life != NULL and sd_load_acquire(self.life) != self.lives
                or self.word == &self.doms.segment.header.event_count
                and sd_ring_unsettled(self.doms.segment))

    @property
    def beside(self):
        """Whether another task of this thread has the lock: its end is told by `FREED`."""
        return held_beside(signature_of(self), mutex_of(self))

    def look(self):
        """After each slice: mark the death of a holder that nobody marked."""
        cdef pthread_mutex_t *mutex = mutex_of(self)
        if mutex != NULL and not self.doms.closed:
            sd_mutex_look(mutex, signature_of(self))

    @property
    def holder(self):
        """Who has the lock, as it is signed; 0: nobody, or one who has not signed yet."""
        return sd_load(&signature_of(self).who)

    def keep_waiters(self):
        """The caller waited, and may have taken the lock: then whoever still waits is woken when
        it is freed."""
        cdef pthread_mutex_t *mutex = mutex_of(self)
        if mutex != NULL:
            sd_mutex_keep_waiters(mutex)


cdef const sd_owner *signature_of(Blocked blocked) noexcept:
    cdef sd_segment *segment = blocked.doms.segment
    if blocked.kind == SD_LOCK_LIST:
        return &segment.header.list_owner
    if blocked.kind == SD_LOCK_DOMAIN:
        return &segment.slots[blocked.number].owner
    return &segment.named[blocked.number].owner


cdef pthread_mutex_t *mutex_of(Blocked blocked) noexcept:
    """NULL: the lock is a semaphore."""
    cdef sd_segment *segment = blocked.doms.segment
    if blocked.kind == SD_LOCK_MUTEX:
        return &segment.named[blocked.number].mutex
    if blocked.doms.multiprocessing:
        return NULL
    if blocked.kind == SD_LOCK_LIST:
        return &segment.header.list_mutex
    return &segment.slots[blocked.number].mutex


@cython.final
@cython.no_gc_clear
cdef class Inbox:
    """Where the watches of one thread tell that they fired; `fileno` is for its event loop."""
    cdef sd_inbox *inbox

    def __cinit__(self):
        self.inbox = sd_inbox_open()
        if self.inbox == NULL:
            raise OSError(errno, strerror(errno).decode(), "eventfd")

    def fileno(self):
        return sd_inbox_fd(self.inbox)

    def take(self):
        """The next `Watch` that fired, or None."""
        cdef sd_watch *watch = sd_inbox_take(self.inbox)
        return None if watch == NULL else <object>watch.data

    def __dealloc__(self):
        if self.inbox != NULL:
            sd_inbox_close(self.inbox)


@cython.final
@cython.no_gc_clear
cdef class Watch:
    """Tells an inbox once when a lock may be free, or something changed; ``fired`` is what the
    inbox's thread calls then."""
    cdef sd_watch watch
    cdef Inbox inbox
    cdef Segment doms        # whose mapping stays, or None
    cdef readonly object fired

    def __cinit__(self, Inbox inbox not None, fired):
        memset(&self.watch, 0, sizeof(self.watch))
        self.watch.data = <void *>self
        self.inbox, self.fired = inbox, fired

    def begin(self, Blocked blocked not None, bint turn=False):
        """False: there is no way; look after each slice. `turn`: let others have the lock first."""
        cdef pthread_mutex_t *mutex
        cdef uint32_t *word
        cdef int kind = SD_WATCH_CHANGE
        if self.doms is None:
            begin_wait(blocked.doms)
            self.doms = blocked.doms
        if blocked.kind == SLEEPS:
            word = <uint32_t *>blocked.word
        else:
            mutex = mutex_of(blocked)
            if mutex == NULL:
                return False
            word = sd_mutex_word(mutex)
            kind = SD_WATCH_TURN if turn else SD_WATCH_MUTEX
        return sd_watch_begin(&self.watch, self.inbox.inbox, word, <uint32_t>blocked.seen,
                              kind) == SD_OK

    def cancel(self):
        sd_watch_cancel(&self.watch)
        doms, self.doms = self.doms, None
        if doms is not None:
            end_wait(doms)

    def __dealloc__(self):
        sd_watch_cancel(&self.watch)
        if self.doms is not None:
            end_wait(self.doms)


# --- before a lock is tried, and when it is not free ------------------------------------------


cdef inline bint held_beside(const sd_owner *signed, const pthread_mutex_t *mutex) noexcept:
    """Whether another owner of this very thread has the lock. The caller does not."""
    cdef sd_thread *thread = sd_self()
    if sd_load(&signed.who) != thread.who:
        return False
    return mutex == NULL or sd_mutex_owner(mutex) == sd_who_tid(thread.who)


cdef bint must_queue(Segment doms, int kind, uint32_t number, const sd_owner *signed,
                     const pthread_mutex_t *mutex, uint64_t deadline) except -1:
    """Whether a lock is not even tried: it is another task's of this thread, or others of this
    thread wait for it, and whoever asks can stand in their queue."""
    cdef sd_thread *thread
    if held_beside(signed, mutex):
        return True
    thread = sd_self()
    if not thread.rooms or deadline == SD_TRY or not (thread.asks or can_switch()):
        return False
    return not MAY_TRY(<size_t>doms.segment, kind, number)


cdef int how_to_wait(Segment doms, int kind, uint32_t number, const sd_owner *signed,
                     const pthread_mutex_t *mutex, uint64_t deadline) except -1:
    """For a lock that is not free. BLOCKS: as a thread does; SWITCHES: by SWITCH, and then try
    again; else a code to give up with."""
    cdef Blocked blocked
    global BLOCKED
    if deadline != SD_FOREVER and sd_now() >= deadline:
        return SD_TIMEOUT
    if not sd_self().asks and not can_switch():
        return OTHER_TASK if held_beside(signed, mutex) else BLOCKS
    blocked = Blocked()
    blocked.doms, blocked.kind, blocked.number = doms, kind, number
    BLOCKED = blocked
    return WOULD_BLOCK if sd_self().asks else SWITCHES


cdef int sleep_as_task(Segment doms, const sd_word *word, uint64_t seen, sd_word *waiting,
                       uint64_t number, uint64_t deadline, const sd_word *life,
                       uint64_t lives) except -1:
    """As `sleep_on`; BLOCKS: as a thread does."""
    cdef Blocked blocked
    cdef bint asks = sd_self().asks
    if not asks and not can_switch():
        return BLOCKS
    sd_raise(waiting, number)
    if sd_load_acquire(word) != seen:
        return 1
    if deadline != SD_FOREVER and sd_now() >= deadline:
        return 0
    blocked = Blocked()
    blocked.doms, blocked.kind, blocked.word, blocked.seen = doms, SLEEPS, word, seen
    blocked.life, blocked.lives = life, lives
    if asks:
        raise WouldBlock(blocked)
    SWITCH(blocked, seconds_left(deadline), None)
    still_open(doms)
    return sd_load_acquire(word) != seen


cdef int lock_as_task(Segment doms, int kind, uint32_t number, const sd_owner *signed,
                      pthread_mutex_t *mutex, uint64_t deadline) except -1:
    """A mutex, in a process with tasks: what the core's function for it returns, or a code of the
    binding."""
    cdef object turn = None
    cdef int result = SD_TIMEOUT
    try:
        while True:
            result = SD_TIMEOUT
            if not must_queue(doms, kind, number, signed, mutex, deadline):
                result = lock_or_wait(doms, kind, number, SD_SPIN if deadline else SD_TRY)
            if result != SD_TIMEOUT or deadline == SD_TRY:
                return result
            result = how_to_wait(doms, kind, number, signed, mutex, deadline)
            if result == BLOCKS:
                result = lock_or_wait(doms, kind, number, deadline)
                return result
            if result != SWITCHES:
                return result
            turn = SWITCH(BLOCKED, seconds_left(deadline), turn)
    finally:
        if turn is not None:
            leave_turn(turn, doms, kind, number, result == SD_OK, NULL)


cdef int leave_turn(object turn, Segment doms, int kind, uint32_t number, bint taken,
                    sem_t *semaphore) except -1:
    """A signal handler may raise in here, where nobody's record says that the lock is `taken`."""
    try:
        turn.leave()
    except BaseException:
        try:
            turn.leave()  # whoever stays keeps out the others
        finally:
            if taken:
                free_taken(doms, kind, number, semaphore)
        raise
    return 0


cdef int free_taken(Segment doms, int kind, uint32_t number, sem_t *semaphore) except -1:
    if semaphore == NULL and kind == SD_LOCK_LIST:
        return release_list(doms)
    if semaphore == NULL and kind == SD_LOCK_DOMAIN:
        return release_slot(doms, number, False)
    if semaphore == NULL:
        if tell_tasks(doms, kind, number, &doms.segment.named[number].mutex):
            sd_named_unlock(doms.segment, number, False)
    elif tell_tasks(doms, kind, number, NULL):
        sd_semaphore_leave(semaphore, &doms.segment.header.list_owner if kind == SD_LOCK_LIST
                           else &doms.segment.slots[number].owner, sd_self().who)
    return 0


cdef int lock_or_wait(Segment doms, int kind, uint32_t number, uint64_t deadline) noexcept:
    """Of these deadlines SD_TRY and SD_SPIN do not wait."""
    cdef bint waits = deadline != SD_TRY and deadline != SD_SPIN
    if kind == SD_LOCK_LIST:
        return (wait_for_list(doms, deadline) if waits else sd_list_lock(doms.segment, deadline))
    if kind == SD_LOCK_DOMAIN:
        return (wait_for_slot(doms, number, deadline) if waits
                else sd_slot_lock(doms.segment, number, deadline))
    return (wait_for_named(doms, number, deadline) if waits
            else sd_named_lock(doms.segment, number, deadline))


cdef int raise_other_task(object what) except -1:
    raise errors.AlreadyLocked(
        f"{what} is held by another task of this thread, or by the thread itself outside of its "
        "tasks; a wait that blocks the thread would never end: wait with shmdomains.aio in "
        "asyncio, with shmdomains.green in gevent")


cdef bint can_switch() except -1:
    """Whether whoever asks can let other greenlets run meanwhile."""
    return SWITCH is not None and sd_self().acts_for == NULL and CAN_SWITCH()


cdef bint runs_loop() noexcept:
    """Whether this thread runs an event loop of asyncio, which a wait stops."""
    return RUNNING_LOOP is not None and sd_has_context() and RUNNING_LOOP() is not None


cdef inline bint tell_tasks(Segment doms, int kind, uint32_t number,
                            const pthread_mutex_t *mutex) noexcept:
    """A lock is about to be freed: tell those of this thread who wait for it. They run later.
    False: a signal handler forked meanwhile, and the lock is the parent's."""
    if sd_self().rooms:
        return tell_room(doms, kind, number, mutex != NULL and sd_mutex_awaited(mutex))
    return True


cdef bint tell_room(Segment doms, int kind, uint32_t number, bint strangers) noexcept:
    cdef uint64_t epoch = sd_fork_epoch
    try:
        FREED(<size_t>doms.segment, kind, number, strangers)
    except BaseException as exc:
        raise_soon(exc)
    return epoch == sd_fork_epoch


cdef int raise_soon(object exc) except -1:
    """What a signal handler raised where the lock must be freed first."""
    Py_INCREF(exc)
    if Py_AddPendingCall(raise_now, <void *>exc):
        Py_DECREF(exc)
        raise exc
    return 0


cdef int raise_now(void *raised) except -1 with gil:
    exc = <object>raised
    Py_DECREF(exc)
    raise exc


def tasks_with(*, freed, may_try, can_switch=None, switch=None):
    """What `rooms` and `green` do when tasks wait."""
    global FREED, MAY_TRY, CAN_SWITCH, SWITCH, TASKS
    FREED, MAY_TRY, TASKS = freed, may_try, True
    if switch is not None:
        CAN_SWITCH, SWITCH = can_switch, switch
        look_for_greenlets()


def rooms_here(int more):
    """Locks that tasks of this thread wait for."""
    cdef sd_thread *thread = sd_self()
    if more >= 0 or thread.rooms:  # none: this is a child
        thread.rooms += more


def deadline(timeout):
    """When a time-out that begins now is over; 0: it has none, or is 0."""
    cdef uint64_t end = 0 if timeout is None else deadline_of(timeout)
    return 0 if end == SD_TRY or end == SD_FOREVER else end


def seconds_until(uint64_t end):
    """How much of a deadline is left."""
    return seconds_left(end)


def attempt(uint64_t until, function, args, kwargs, Blocked settled=None):
    """Call it so that it does not block: what it returns, or `Blocked`. Then it is called again,
    and begins anew; so it leaves nothing locked that it would not on a time-out. `until`: of
    `deadline`, for each time-out in there that is not 0. `settled`: what was settled since."""
    global SETTLED
    cdef sd_thread *thread = sd_self()
    cdef bint before = thread.asks
    cdef uint64_t until_before = thread.until
    thread.asks, thread.until, SETTLED = True, until, settled
    try:
        return function(*args) if not kwargs else function(*args, **kwargs)
    except WouldBlock as exc:
        return exc.blocked
    finally:
        thread.asks, thread.until, SETTLED = before, until_before, None


def work_for(uint64_t nonce, function, args, kwargs):
    """Call it in this thread for the owner with this number, who waits for its end. It must not
    keep a lock that it takes: that would be this thread's."""
    cdef sd_thread *thread = sd_self()
    cdef TaskOwner owner
    for key, one in list(OWNERS.items()):
        owner, of = one, key
        if owner.node.nonce == nonce:
            break
    else:
        raise RuntimeError("the task is over")
    thread.acts_for, owner.worker = owner.node, thread
    try:
        return function(*args, **kwargs)
    finally:
        thread.acts_for = owner.worker = NULL
        thread.gives_up = False
        if OWNERS.get(of) is not owner:  # the task ended meanwhile
            leave_owner(owner)


@cython.final
cdef class Worker:
    """The thread that makes it, for another one to tell it that its work is not wanted any more."""
    cdef sd_thread *thread
    cdef uint64_t nonce

    def __cinit__(self):
        self.thread = sd_self()
        self.nonce = self.thread.nonce
        self.thread.gives_up = False

    def give_up(self):
        """Its wait, this one or its next, ends with `WorkGivenUp` within a slice."""
        if self.thread.nonce == self.nonce:
            self.thread.gives_up = True


def is_given_up():
    """Whether whoever this thread works for does not want it any more. For a wait that is not in
    here: after each slice it ends with `WorkGivenUp`."""
    return sd_self().gives_up


class WorkGivenUp(BaseException):
    """Whoever a thread worked for does not want it any more. Never leaves `aio`."""


@cython.final
@cython.no_gc_clear
cdef class TaskWait:
    """A task waits for a lock: it stands in the table of waiters until `end`."""
    cdef Blocked blocked
    cdef sd_wait *wait

    def __init__(self, Blocked blocked not None):
        need_open(blocked.doms)
        self.blocked = blocked
        self.wait = <sd_wait *>malloc(sizeof(sd_wait))
        if self.wait == NULL:
            raise MemoryError
        sd_wait_note(self.wait, blocked.doms.segment, blocked.kind, blocked.number,
                     <void *>blocked.doms)
        self.wait.told_loop = True  # it does not stop its loop
        begin_wait(blocked.doms)

    def look(self):
        """After each slice: log a wait that is slow, once. Whether it goes on: false once the list
        is closed."""
        if self.blocked.doms.closed:
            return False
        if look_how_long(self.wait):
            PyErr_Fetch(&kept_type, &kept_value, &kept_traceback)
            raise_code(SD_INTERRUPTED, None)
        return True

    def end(self):
        if self.wait == NULL:
            return
        sd_wait_forget(self.wait)
        free(self.wait)
        self.wait = NULL
        end_wait(self.blocked.doms)

    def __dealloc__(self):
        if self.wait != NULL:
            sd_wait_forget(self.wait)
            free(self.wait)
            end_wait(self.blocked.doms)


def holds_locks():
    """Whether whoever asks holds any lock."""
    cdef sd_thread *asking = me()
    return asking.records != NULL or asking.named != NULL or holds_list(asking)


cdef bint holds_list(const sd_thread *owner):
    for doms in LISTS_HELD:
        if (<Segment>doms).segment.list_nonce == owner.nonce:
            return True
    return False
