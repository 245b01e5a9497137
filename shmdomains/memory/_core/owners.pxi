# Owners: whoever holds a lock is a thread, an asyncio task or a greenlet.
#
# Who asks is `me()`, a node like a thread's (thread.h): what it holds hangs from there, and two
# owners exclude each other whatever thread they run on. The mutex belongs to the kernel's thread
# all the same, which takes and frees it for its tasks: so a mutex that names this very thread may
# be another task's. An owner waits in one of three ways:
#
#   a thread    blocks, in slices (waiting.pxi)
#   a task      is told `Blocked`, by an exception that says for which lock; `aio` waits for that
#               and asks again (tasks.pxi)
#   a greenlet  lets its hub run meanwhile (`green`)
#
# In a process without tasks `me()` is one load more than `sd_self()`. They are found out about when
# something is locked while an event loop or greenlets are there, and from then on the running task
# is asked for each time.
#
# A task's node begins when it first asks for something here. It ends with the task: `task_over`
# rolls back and frees what it still holds.

cimport cython
from cpython.dict cimport PyDict_GetItem
from cpython.ref cimport PyObject
from libc.stdint cimport uint64_t

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
    TASKS_HELD_MAX = 2000  # the kernel frees 2,048 locks of a thread

cdef bint TASKS = False      # whether this process has owners that are no threads
cdef bint GREENLETS = False  # whether greenlets are among them
cdef bint SWITCHES_WITHIN = True  # whether they change within a stretch (sd_stretch)
cdef dict OWNERS = {}        # id of a task -> TaskOwner
cdef object RUNNING_LOOP = None  # asyncio's functions, once it is imported
cdef object CURRENT_TASK = None
cdef dict CURRENT_TASKS = None   # the same before Python 3.12, where the function is slow
cdef object GETCURRENT = None    # greenlet's
cdef object BEGINS = None    # callable: an asyncio task begins to be an owner


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
    if GREENLETS and SWITCHES_WITHIN:
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
        HOLDERS.owner_over(owner.node.nonce)
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
            abandon(record, True)
        else:
            leave_thread(record)
    while owner.named != NULL and Py_REFCNT(owner.named):
        mutex = <Mutex>owner.named
        if runs_on_living(owner):
            abandon_mutex(mutex, True)
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
    global TASKS, GREENLETS, GETCURRENT, SWITCHES_WITHIN
    current = getattr(sys.modules.get("greenlet"), "getcurrent", None)
    if current is None:
        return 0
    if current is not GETCURRENT:
        SWITCHES_WITHIN = switches_within(sys.modules["greenlet"])
    GETCURRENT = current
    find_asyncio()
    TASKS = GREENLETS = True
    if SWITCH is None:
        HOLDERS.look_for_gevent()
    return 0


cdef bint switches_within(object module) except -1:
    """Greenlets begin a new stretch with each switch, since they keep a context each; if that is
    not so, who runs is asked each time."""
    greenlet = getattr(module, "greenlet", None)
    if greenlet is None:
        return True
    before = stretch_now()
    inside = greenlet(stretch_now).switch()
    return inside == before or inside == stretch_now()


def stretch_now():
    """The number of this stretch of running (sd_stretch), and whose it is."""
    cdef uint64_t state, number = sd_stretch(&state)
    return number, state


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
