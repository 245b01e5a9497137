# Owners: whoever holds a lock is a thread, an asyncio task or a greenlet.
#
# Who asks is `me()`, a node like a thread's (thread.h): what it holds hangs from there, and two
# owners exclude each other whatever thread they run on. The mutex belongs to the kernel's thread all
# the same, which takes and frees it for its tasks: so a mutex that names this very thread may be
# another task's. An owner waits in one of three ways:
#
#   a thread    blocks, in slices (waiting.pxi)
#   a task      is told `Blocked`, by an exception that says for which lock; `aio` waits for that and
#               asks again
#   a greenlet  lets its hub run meanwhile (`green`)
#
# In a process without tasks `me()` is one load more than `sd_self()`. They are found out about when
# something is locked while an event loop or greenlets are there, and from then on the running task is
# asked for each time.
#
# A task's node begins when it first asks for something here. It ends with the task: `task_over`
# rolls back and frees what it still holds.

cimport cython
from cpython.dict cimport PyDict_GetItem
from cpython.ref cimport Py_INCREF, PyObject
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset, strerror

import sys
import weakref

from shmdomains import errors


cdef extern from *:
    """
    /* A task runs in a context of its own, and so do most greenlets.  Plain code has none. */
    #define sd_has_context() (__Pyx_PyThreadState_Current->context != NULL)
    /* Which stretch of running this is: each time that a context is entered or left there is
     * another number, and a task is run, until it waits, by entering one. */
    static inline uint64_t sd_stretch(uint64_t *of)
    {
        PyThreadState *state = PyThreadState_Get();
        *of = state->id;
        return state->context_ver;
    }
    """
    bint sd_has_context()
    uint64_t sd_stretch(uint64_t *)

cdef enum:
    # Codes of the binding.
    OTHER_TASK = 1001    # another task of this thread holds it, and a wait would stop that task
    WOULD_BLOCK = 1002   # `BLOCKED` says for what
    BLOCKS = 1003        # what `how_to_wait` says
    SWITCHES = 1004
    SLEEPS = 16          # a kind beside SD_LOCK_*: a word that changes
    SETTLES = 17         # and another: what a dead process began with a domain and its file
    TASKS_HELD_MAX = 2000  # the kernel frees 2,048 locks of a thread

cdef bint TASKS = False      # whether this process has owners that are no threads
cdef bint GREENLETS = False  # whether greenlets are among them
cdef dict OWNERS = {}        # id of a task -> TaskOwner
cdef object RUNNING_LOOP = None  # asyncio's functions, once it is imported
cdef object CURRENT_TASK = None
cdef dict CURRENT_TASKS = None   # the same before Python 3.12, where the function is slow
cdef object GETCURRENT = None    # greenlet's
cdef Blocked BLOCKED = None      # what the next WOULD_BLOCK is about
cdef Blocked SETTLED = None  # by another thread, for the call that is made now
cdef object BEGINS = None    # callable: an asyncio task begins to be an owner
cdef object FREED = None     # callable: segment, kind, number, whether strangers wait; before it
                             # is freed
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


@cython.final
cdef class TaskOwner:
    """The node of a task, as long as that may run."""
    cdef sd_thread *node
    cdef sd_thread *worker  # that acts for it, or NULL
    cdef object task  # a weak reference

    def __dealloc__(self):
        if self.node != NULL and self.node.epoch == sd_fork_epoch:
            sd_task_end(self.node)


# --- who asks --------------------------------------------------------------------------------


cdef inline sd_thread *me() noexcept:
    """The node of whoever asks."""
    return whoever_asks() if TASKS else sd_self()


cdef sd_thread *whoever_asks() noexcept:
    cdef sd_thread *thread = sd_self()
    cdef sd_thread *found
    cdef uint64_t state, stretch
    cdef size_t task
    if thread.acts_for != NULL:
        return thread.acts_for
    if GREENLETS:  # they switch within a stretch
        task = running_here()
        return node_of(thread, task) if task else thread
    stretch = sd_stretch(&state)
    if stretch == thread.stretch and state == thread.stretch_of and thread.runs != NULL:
        return thread.runs
    task = running_here()
    found = node_of(thread, task) if task else thread
    thread.stretch, thread.stretch_of, thread.runs = stretch, state, found
    return found


cdef size_t running_here() noexcept:
    """The asyncio task that this thread runs, or else the greenlet; 0: no such thing."""
    cdef PyObject *found
    if sd_has_context():
        if RUNNING_LOOP is None:
            find_asyncio()
        loop = None if RUNNING_LOOP is None else RUNNING_LOOP()
        if loop is not None:
            if CURRENT_TASKS is not None:
                found = PyDict_GetItem(CURRENT_TASKS, loop)
                if found != NULL:
                    return <size_t>found
            else:
                task = CURRENT_TASK(loop)
                if task is not None:
                    return <size_t><void *>task
    if GREENLETS:
        task = GETCURRENT()
        if task.parent is not None:
            return <size_t><void *>task
    return 0


cdef sd_thread *node_of(sd_thread *thread, size_t task) noexcept:
    """The node of a task of this thread, a new one if it has none. Without memory the thread stands
    for its task."""
    cdef PyObject *known
    cdef TaskOwner owner
    key = task
    known = PyDict_GetItem(OWNERS, key)
    if known != NULL and (<TaskOwner>known).node.epoch == sd_fork_epoch:
        owner = <TaskOwner>known
        if owner.node.kernel != thread or owner.node.kernel_nonce != thread.nonce:
            move_task(owner.node, thread)
        return owner.node
    try:
        owner = begin_task(key, <object><PyObject *>task)
    except BaseException:
        return thread
    return thread if owner is None else owner.node


cdef void move_task(sd_thread *task, sd_thread *thread) noexcept:
    """Another thread runs the task's loop from here on. What it holds is the former one's."""
    if task.records != NULL or task.named != NULL or holds_list(task):
        return
    if task.kernel.runs == task:
        task.kernel.runs = NULL
    task.kernel, task.kernel_nonce, task.who = thread, thread.nonce, thread.who


cdef TaskOwner begin_task(object key, object task):
    cdef TaskOwner owner = TaskOwner()
    owner.node = sd_task_begin()
    if owner.node == NULL:
        return None
    owner.task = weakref.ref(task, TaskGone(key))
    for tell in ("add_done_callback", "rawlink"):  # asyncio's, gevent's
        tell = getattr(task, tell, None)
        if tell is not None:
            tell(task_over)
            break
    OWNERS[key] = owner
    if BEGINS is not None and runs_loop():
        BEGINS()
    return owner


@cython.final
cdef class TaskGone:
    """Called when a task is freed."""
    cdef object key

    def __init__(self, key):
        self.key = key

    def __call__(self, ref):
        end_owner(self.key)


def task_over(task):
    """A task came to its end: roll back and free what it holds."""
    end_owner(<size_t><void *>task)


cdef int end_owner(object key) except -1:
    cdef TaskOwner owner = OWNERS.pop(key, None)
    if owner is None:
        return 0
    if owner.node.kernel.runs == owner.node:
        owner.node.kernel.runs = NULL
    if owner.worker != NULL and owner.node.epoch == sd_fork_epoch:
        owner.worker.gives_up = True
        return 0  # `work_for` comes back here, with what that thread took freed
    return leave_owner(owner)


cdef int leave_owner(TaskOwner owner) except -1:
    if owner.node.epoch == sd_fork_epoch:
        leave_all(owner.node)
        HOLDERS.end_jobs(owner.node.nonce)
    return 0


def tasks_over(over):
    """End those of which ``over(task)`` is true; they will not run any more."""
    for key, one in list(OWNERS.items()):
        task = (<TaskOwner>one).task()
        if task is None or over(task):
            end_owner(key)


cdef int leave_all(sd_thread *owner) except -1:
    """Free what an owner holds that will not free it any more."""
    cdef Record record
    cdef Mutex mutex
    while owner.records != NULL and Py_REFCNT(owner.records):  # 0: it is being freed, and abandoned
        record = <Record>owner.records
        drop_changes(record)
        if runs_on_living(owner):
            abandon(record)
        else:
            leave_thread(record)
    while owner.named != NULL and Py_REFCNT(owner.named):
        mutex = <Mutex>owner.named
        if runs_on_living(owner):
            abandon_mutex(mutex)
        else:
            leave_mutex(mutex)
    for doms in list(LISTS_HELD):
        if (<Segment>doms).segment.list_nonce != owner.nonce or not runs_on_living(owner):
            continue
        if owner.kernel == sd_self():
            drop_list(doms, "a DomainList")
        else:
            drop_list_for(doms, owner.kernel, owner.kernel_nonce)
    return 0


cdef inline bint runs_on_living(const sd_thread *owner) noexcept:
    """Whether the thread still runs that has the locks of this owner."""
    return owner.kernel.nonce == owner.kernel_nonce and owner.kernel.epoch == sd_fork_epoch


# --- what errors call whoever asks -----------------------------------------------------------


cdef object this():
    return "this thread" if me() == sd_self() else "this task"


def thread():
    """A number for this thread, whichever task runs on it."""
    return sd_self().nonce


def owner():
    """A number for whoever asks: a thread or a task. No other one of this process, nor of its
    children, gets the same."""
    return me().nonce


def owner_words():
    """What errors call whoever asks."""
    return this()


# --- before a lock is asked for --------------------------------------------------------------


cdef inline sd_thread *begin_asking() noexcept:
    """Who asks for a lock. Frees what other threads dropped in our name."""
    cdef sd_thread *thread = sd_self()
    if thread.orphans != NULL:
        free_orphans(thread)
    if not TASKS:
        if not sd_has_context() or not look_for_tasks(thread):
            return thread
    return whoever_asks()


cdef bint look_for_tasks(sd_thread *thread) noexcept:
    """From here on the running task is asked for, if this thread runs an event loop. A stretch is
    looked at once: it is a task's or none's."""
    global TASKS
    cdef uint64_t state, stretch = sd_stretch(&state)
    if stretch == thread.stretch and state == thread.stretch_of and thread.runs == thread:
        return False
    find_asyncio()
    if RUNNING_LOOP is not None and RUNNING_LOOP() is not None:
        TASKS = True
        return True
    thread.stretch, thread.stretch_of, thread.runs = stretch, state, thread
    return False


cdef void find_asyncio() noexcept:
    global RUNNING_LOOP, CURRENT_TASK, CURRENT_TASKS
    events, tasks = sys.modules.get("asyncio.events"), sys.modules.get("asyncio.tasks")
    loop = getattr(events, "_get_running_loop", None)
    current = getattr(tasks, "current_task", None)
    if loop is None or current is None:
        return
    if sys.version_info < (3, 12):
        CURRENT_TASKS = getattr(tasks, "_current_tasks", None)
    CURRENT_TASK, RUNNING_LOOP = current, loop


cdef int look_for_greenlets() except -1:
    """When a list is attached, or used first in a child: from here on the running greenlet is asked
    for, if there are any."""
    global TASKS, GREENLETS, GETCURRENT
    current = getattr(sys.modules.get("greenlet"), "getcurrent", None)
    if current is None:
        return 0
    GETCURRENT = current
    find_asyncio()
    TASKS = GREENLETS = True
    if SWITCH is None:
        HOLDERS.look_for_gevent()
    return 0


cdef int need_room_for_lock() except -1:
    cdef unsigned held = sd_self().held
    if held >= TASKS_HELD_MAX:
        raise errors.TooManyLocks(
            f"the tasks of this thread hold {held} locks; unlock some: the kernel frees a limited "
            "number of locks when a thread dies")
    return 0


cdef inline void count_held(sd_thread *owner, int more) noexcept:
    """The core counts for the thread."""
    if owner != owner.kernel:
        owner.held += more


cdef list LISTS_HELD = []  # whose list lock a task holds


cdef int note_list(Segment doms) except -1:
    """The list lock that this thread just took is the owner's."""
    cdef sd_thread *owner = me()
    doms.segment.list_nonce = owner.nonce
    if owner != owner.kernel:
        LISTS_HELD.append(doms)
    return 0


cdef int forget_list(Segment doms) except -1:
    if doms in LISTS_HELD:
        LISTS_HELD.remove(doms)
    return 0


# --- waiting ---------------------------------------------------------------------------------


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
    cdef int result
    try:
        while True:
            result = SD_TIMEOUT
            if not must_queue(doms, kind, number, signed, mutex, deadline):
                result = lock_or_wait(doms, kind, number, SD_SPIN if deadline else SD_TRY)
            if result != SD_TIMEOUT or deadline == SD_TRY:
                return result
            result = how_to_wait(doms, kind, number, signed, mutex, deadline)
            if result == BLOCKS:
                return lock_or_wait(doms, kind, number, deadline)
            if result != SWITCHES:
                return result
            turn = SWITCH(BLOCKED, seconds_left(deadline), turn)
    finally:
        if turn is not None:
            turn.leave()


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
        "tasks; a wait that blocks the thread would never end: wait with shmdomains.aio in asyncio, "
        "with shmdomains.green in gevent")


cdef bint can_switch() except -1:
    """Whether whoever asks can let other greenlets run meanwhile."""
    return SWITCH is not None and sd_self().acts_for == NULL and CAN_SWITCH()


cdef bint runs_loop() noexcept:
    """Whether this thread runs an event loop of asyncio, which a wait stops."""
    return RUNNING_LOOP is not None and sd_has_context() and RUNNING_LOOP() is not None


cdef inline void tell_tasks(Segment doms, int kind, uint32_t number,
                            const pthread_mutex_t *mutex) noexcept:
    """A lock is about to be freed: tell those of this thread who wait for it. They run later."""
    if sd_self().rooms:
        tell_room(doms, kind, number, mutex != NULL and sd_mutex_awaited(mutex))


cdef void tell_room(Segment doms, int kind, uint32_t number, bint strangers) noexcept:
    FREED(<size_t>doms.segment, kind, number, strangers)


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
        owner = one
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
        if OWNERS.get(key) is not owner:  # the task ended meanwhile
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


# --- for `aio`, where each microsecond counts ------------------------------------------------

cdef object ENTER_LATER = None  # coroutine function: Acquire, Blocked -> the record
cdef object FIND_LATER = None   # the same, and it is not entered


def tasks_enter_by(enter_later, find_later, begins):
    """What `aio` does when a domain is not free, and when a task first asks for something."""
    global ENTER_LATER, FIND_LATER, BEGINS
    ENTER_LATER, FIND_LATER, BEGINS = enter_later, find_later, begins


cdef extern from *:
    """
    /* Of an awaitable that has its result: without it the interpreter has an exception made and
     * thrown for each. */
    static inline void sd_sends(PyObject *type, void *send)
    {
        ((PyTypeObject *)type)->tp_as_async->am_send = (sendfunc)send;
    }
    """
    ctypedef enum PySendResult:
        PYGEN_RETURN
    void sd_sends(object type, void *send)


@cython.final
@cython.freelist(8)
cdef class Ready:
    """Awaited, it is there at once."""
    cdef object value

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration(self.value)


cdef PySendResult send_ready(PyObject *ready, PyObject *_sent, PyObject **result) noexcept:
    result[0] = <PyObject *>(<Ready>ready).value
    Py_INCREF(<object>result[0])
    return PYGEN_RETURN


sd_sends(Ready, <void *>send_ready)


cdef Ready ready(object value):
    cdef Ready made = Ready.__new__(Ready)
    made.value = value
    return made


cdef Ready DONE = ready(None)


@cython.final
@cython.freelist(8)
cdef class Acquire:
    """What `get` and `lookup` of an `aio.AsyncDomainList` return: await it for the locked domain,
    or enter it with ``async with``, which commits and unlocks, or rolls back."""
    cdef Segment doms
    cdef object key, uuid, name, id, timeout, why
    cdef bint may_miss
    cdef readonly uint64_t until  # of `deadline`
    cdef Record held

    def find(self):
        """The locked domain."""
        cdef sd_key wanted
        cdef Record record = None
        cdef uint64_t end = deadline_of(self.timeout)
        need_open(self.doms)
        if make_key(&wanted, self.key, self.uuid, self.name, self.id):
            if self.why is None:
                record = find_record(self.doms, &wanted, end, self.timeout)
            else:
                record = find_for(self.doms, &wanted, end, self.timeout, self.why)
        if record is None and not self.may_miss:
            raise not_found(&wanted, self.key, self.uuid, self.name, self.id)
        return record

    cdef object now(self):
        """The same, or `Blocked`."""
        cdef sd_thread *thread = sd_self()
        cdef bint before = thread.asks
        cdef uint64_t until_before = thread.until
        if self.timeout is not None:
            self.until = deadline(self.timeout)
        thread.asks, thread.until = True, self.until
        try:
            return self.find()
        except WouldBlock as exc:
            return exc.blocked
        finally:
            thread.asks, thread.until = before, until_before

    def enter(self, Record record):
        """It begins its ``async with`` block."""
        self.held = record
        if record is not None:
            record.depth += 1
        return record

    def __await__(self):
        found = self.now()
        if type(found) is Blocked:
            return FIND_LATER(self, found).__await__()
        return ready(found)

    def __aenter__(self):
        found = self.now()
        if type(found) is Blocked:
            return ENTER_LATER(self, found)
        return ready(self.enter(found))

    def __aexit__(self, kind, value, traceback):
        held, self.held = self.held, None
        if held is not None:
            leave_block(held, kind)
        return DONE


cdef class AsyncSegment:
    """The finds of an `aio.AsyncDomainList`."""
    cdef readonly Segment plain

    def __cinit__(self, Segment plain not None):
        self.plain = plain

    def get(self, key=None, /, *, uuid=None, name=None, id=None, timeout=None, why=None):
        """The domain, locked for an ``async with`` block; arguments and errors as for
        `DomainList.get`. Or await it, and unlock it yourself."""
        cdef Acquire made = Acquire.__new__(Acquire)
        made.doms, made.key, made.timeout, made.why = self.plain, key, timeout, why
        made.uuid, made.name, made.id = uuid, name, id
        return made

    def lookup(self, key=None, /, *, uuid=None, name=None, id=None, timeout=None, why=None):
        """Like `get`, but None when there is no such domain."""
        cdef Acquire made = Acquire.__new__(Acquire)
        made.doms, made.key, made.timeout, made.why = self.plain, key, timeout, why
        made.uuid, made.name, made.id = uuid, name, id
        made.may_miss = True
        return made
