# What a task of asyncio awaits, or enters with ``async with``, to get a domain.
#
# Where the domain is free nothing is waited for: `Acquire` finds it at once, and the interpreter
# gets it from a `Ready`. Else `aio` has a coroutine for it. It stands here and not in Python since
# this is what each request of a server does.

cimport cython
from cpython.ref cimport Py_INCREF, PyObject
from libc.stdint cimport uint64_t

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
        held = self.held
        if held is not None and locked_or_none(held) is not None:  # else another task entered
            self.held = None
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
