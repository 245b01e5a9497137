# cython: language_level=3, binding=False, embedsignature=True, boundscheck=False, wraparound=False
"""The binding: `Segment`, `Record` and `Info` over the C core.

Thin: what is here is what must hold a Python object or look at a signal - handles, pending changes,
the cache of decoded definitions, `multiprocessing` locks, exceptions. Which lock a call needs is
checked here, before the C core is asked; what domains may do stands in domain.py and
domain_list.py.

Rules of this file. The GIL is held everywhere but inside one wait slice (`wait_hook`), and it
guards all that is private to the process: mappings, thread nodes, lists of locked handles. A
`Record` is held by the thread whose nonce it carries; a fork gives every thread a new nonce.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.ref cimport PyObject
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset, strerror, strncpy
from libc.errno cimport errno

import warnings

from shmdomains import errors

# A handle lives as long as a look-up, and to make and to free it as Python does - `__new__`, a
# subclass's way of deallocation, the collector's allocator - was a sixth of that. What dies of the
# one type that lists hand out waits here, whole but for what it led to, to be the next.
cdef extern from *:
    """
    #define SPARES 16
    static PyTypeObject *spared;       /* a heap type; it and its spares stay for good */
    static int (*vacate)(PyObject *);  /* let go of what it led to; false: it may not be kept */
    static PyObject *spares[SPARES];
    static int spare_count;

    static PyObject *new_handle(PyObject *type, PyObject *no_arguments)
    {
        if ((PyTypeObject *)type != spared || !spare_count)
            return ((PyTypeObject *)type)->tp_new((PyTypeObject *)type, no_arguments, NULL);
        PyObject *handle = spares[--spare_count];
        _Py_NewReference(handle);
        PyObject_GC_Track(handle);
        return handle;
    }

    static void free_handle(PyObject *handle)
    {
        PyTypeObject *type = Py_TYPE(handle);
        if (type == spared) {
            /* That its __del__ ran, if somebody gave Domain one, is not undone by a new life. */
            PyObject *weak = *(PyObject **)((char *)handle + type->tp_weaklistoffset);
            if (!type->tp_finalize && !weak && !PyObject_GC_IsFinalized(handle)) {
                PyObject_GC_UnTrack(handle);
                Py_SET_REFCNT(handle, 1); /* as Cython does for what runs in a deallocation */
                int keeps = vacate(handle);
                Py_SET_REFCNT(handle, 0);
                if (keeps && spare_count < SPARES) {
                    spares[spare_count++] = handle;
                    return;
                }
            } else if (type->tp_finalize) {
                if (PyObject_CallFinalizerFromDealloc(handle) < 0) return;
                type = Py_TYPE(handle); /* which that may have assigned */
            }
        }
        /* A subclass's own deallocation, which calls this one, leaves its type to the base. */
        spared->tp_base->tp_dealloc(handle);
        Py_DECREF(type);
    }

    static void keep_spares(PyObject *type, void *vacates)
    {
    #if !defined(Py_GIL_DISABLED) && !defined(Py_TRACE_REFS) && !defined(__SANITIZE_ADDRESS__)
        PyTypeObject *made = (PyTypeObject *)type;
        if (spared || !PyType_HasFeature(made, Py_TPFLAGS_HEAPTYPE) || made->tp_dictoffset
            || PyType_HasFeature(made->tp_base, Py_TPFLAGS_HEAPTYPE) /* drops the type itself */
            || made->tp_basicsize != made->tp_base->tp_basicsize || !made->tp_weaklistoffset)
            return;
        vacate = (int (*)(PyObject *))vacates;
        spared = (PyTypeObject *)Py_NewRef(type);
        spared->tp_dealloc = free_handle;
    #endif
    }
    """
    object new_handle(object type, object no_arguments)
    void keep_spares(object type, void *vacates)

cdef extern from "endian.h":
    uint64_t htobe64(uint64_t)

cdef extern from "Python.h":
    object PyNumber_Index(object)
    Py_ssize_t Py_REFCNT(void *) nogil
    unsigned long long PyLong_AsUnsignedLongLong(object) except? <unsigned long long>-1
    unsigned long long PyLong_AsUnsignedLongLongMask(object) except? <unsigned long long>-1
    int PyObject_GenericSetAttr(object, object, object) except -1
    bint PyUnicode_IS_COMPACT_ASCII(object)
    void *PyUnicode_1BYTE_DATA(object)
    int PyErr_CheckSignals()
    void PyErr_Fetch(PyObject **, PyObject **, PyObject **)
    void PyErr_Restore(PyObject *, PyObject *, PyObject *)
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL

cdef extern from "core.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct sem_t:
        pass
    ctypedef struct sd_word:
        pass
    ctypedef struct sd_owner:
        sd_word who, pid, since
    ctypedef struct sd_slot:
        pthread_mutex_t mutex
        sd_word life
        sd_word cur
        sd_word died_who
        sd_word sum_and_pid
        sd_word uuid[2]
        sd_word dirty
        sd_owner owner
    ctypedef struct sd_header:
        pthread_mutex_t list_mutex
        pthread_mutex_t id_mutex
        pthread_mutex_t heap_mutex
        sd_owner list_owner
        sd_word poisoned, poisoned_at, poisoned_who, poisoned_pid, poisoned_when
        sd_word live, active, slot_count, slots_committed, list_seq
        sd_word heap_committed, heap_used, id_level, list_level[2]
        uint64_t creator_who, creator_pid, created
    ctypedef struct sd_geometry:
        uint64_t max_slots, heap_cells, total_bytes
    ctypedef struct sd_segment:
        int fd
        unsigned open
        unsigned handles
        unsigned inside
        sd_geometry at
        uint64_t kind
        uint64_t id[2]
        sd_header *header
        sd_slot *slots
        sd_word *attached
        uint64_t list_nonce
        unsigned list_nested
        void *list_taker
        uint64_t epoch
    ctypedef struct sd_orphan:
        sd_segment *segment
        uint32_t slot
        sd_orphan *next
    ctypedef struct sd_repair:
        bint repaired, died
        uint64_t who, pid, freed
    ctypedef struct sd_thread:
        uint64_t nonce, who, pid, epoch
        unsigned held
        unsigned nested
        unsigned short_wait
        void *records
        sd_orphan *orphans
        sd_repair repair
    ctypedef struct sd_values:
        int32_t id, pid
        uint16_t state, reason
        uint64_t flags
        uint64_t version[3]
    ctypedef struct sd_key:
        int what
        uint64_t uuid[2]
        unsigned char name[252]
        int32_t id
    ctypedef struct sd_blob:
        bint change
        const void *bytes
        uint64_t size
    ctypedef struct sd_view:
        uint64_t life, cur
        uint64_t uuid[2]
        sd_values values
        unsigned char name[252]
    ctypedef struct sd_tally:
        uint64_t domains, active, slots, extents, cells, garbage
    ctypedef struct sd_check:
        pass

    enum:
        SD_OK, SD_DIED, SD_TIMEOUT, SD_INTERRUPTED, SD_NESTED, SD_FORKED, SD_MISS, SD_DOUBT
        SD_FULL, SD_NO_MEMORY, SD_CORRUPT, SD_POISONED, SD_MISMATCH, SD_ERRNO
        SD_KIND_ROBUST, SD_KIND_MULTIPROCESSING
        SD_UUID_INDEX, SD_NAME_INDEX, SD_ID_INDEX
        SD_DEFINITION, SD_NEXT_DEFINITION, SD_DATA
        SD_HELD_MAX, SD_ATTACHED_MAX, SD_SETTINGS_BYTES, SD_SLOTS_MAX, SD_BLOB_MAX, SD_NAME_MAX
        SD_CELL
        SD_PART_LIST, SD_PART_IDS, SD_PART_HEAP, SD_PARTS
        SD_SUM_LISTED, SD_SUM_FREE, SD_SUM_IDS, SD_SUM_USED, SD_SUM_CELLS, SD_SUMS
        SD_POISON_LIST, SD_POISON_IDS, SD_POISON_HEAP
    uint64_t SD_FOREVER, SD_TRY, SD_CHECK_HOLD_NS, SD_FLAG_PERSISTENT, SD_FLAG_AUTOSTART
    uint64_t SD_FLAG_PRESENT(int)

    uint64_t sd_fork_epoch
    sd_thread *sd_self()
    uint64_t sd_load(const sd_word *)
    uint64_t sd_load_acquire(const sd_word *)
    void sd_store(sd_word *, uint64_t)
    uint64_t sd_now()
    uint64_t SD_START_UNKNOWN
    uint64_t sd_process_start(uint32_t)
    bint sd_process_runs(uint32_t, uint64_t)
    uint32_t sd_process_of(uint32_t)
    bint sd_alive(uint64_t)
    int sd_geometry_make(sd_geometry *, uint64_t, uint64_t)
    uint64_t sd_geometry_fixed(uint64_t)
    int sd_format(int, uint64_t, uint64_t, uint64_t)
    int sd_map(int, sd_segment **, char *, size_t)
    void sd_detach(sd_segment *)
    void sd_unmap(sd_segment *)
    sd_segment *sd_mapped(const uint64_t *)
    int sd_begin_in_child(sd_segment *)
    int sd_mutex_slice(pthread_mutex_t *, uint64_t)
    uint32_t sd_mutex_owner(const pthread_mutex_t *)
    uint32_t sd_mutex_victim(const pthread_mutex_t *)
    bint sd_mutex_busy(const pthread_mutex_t *)
    int sd_list_lock(sd_segment *, uint64_t)
    int sd_list_entered(sd_segment *, bint)
    void sd_list_leaving(sd_segment *)
    void sd_list_unlock(sd_segment *)
    int sd_slot_lock(sd_segment *, uint32_t, uint64_t)
    int sd_slot_entered(sd_segment *, uint32_t)
    void sd_slot_leaving(sd_segment *, uint32_t, bint)
    void sd_slot_unlock(sd_segment *, uint32_t, bint)
    bint sd_take_over(sd_owner *, uint64_t)
    int sd_semaphore_slice(sem_t *, sd_owner *, uint64_t)
    void sd_recover_slot(sd_segment *, uint32_t, uint64_t, uint64_t)
    int sd_ids_lock(sd_segment *, uint64_t)
    void sd_ids_unlock(sd_segment *)
    void sd_heap_unlock(sd_segment *)
    int sd_short_locks(sd_segment *, bint, bint, uint64_t)
    void sd_tidy(sd_segment *, uint32_t)
    int sd_find(sd_segment *, const sd_key *, uint32_t *)
    int sd_find_to_lock(sd_segment *, const sd_key *, uint32_t *)
    int sd_verify(const sd_segment *, uint32_t, const sd_key *, sd_values *)
    int sd_values_get(const sd_segment *, uint32_t, sd_values *)
    uint64_t sd_blob_sum(const uint64_t *, int, uint64_t, const void *, uint64_t)
    void sd_name_get(const sd_segment *, uint32_t, uint64_t, unsigned char *)
    int sd_blob_get(const sd_segment *, uint32_t, const sd_values *, int, uint64_t *)
    int sd_commit(sd_segment *, uint32_t, const sd_values *, const sd_blob *, const unsigned char *,
                  uint64_t)
    int sd_take_id(sd_segment *, int32_t *, uint64_t)
    void sd_ask_to_replace(const sd_segment *, uint32_t)
    void sd_ask_to_insert(const sd_segment *)
    int sd_free_slot(sd_segment *, sd_word **, uint32_t *)
    int sd_insert(sd_segment *, uint32_t, sd_word *, const uint64_t *, const unsigned char *,
                  const sd_values *, const sd_blob *, uint64_t)
    int sd_remove(sd_segment *, uint32_t, uint64_t)
    int sd_view_begin(const sd_segment *, uint32_t, sd_view *)
    int sd_view_extent(const sd_segment *, uint32_t, const sd_view *, int, uint64_t *)
    int sd_view_check(const sd_segment *, uint32_t, const sd_view *)
    int sd_view_blobs_check(const sd_segment *, uint32_t, const sd_view *)
    uint32_t sd_slot_count(const sd_segment *)
    int sd_slots(const sd_segment *, uint32_t *)
    uint64_t sd_unsealed(uint64_t)
    bint sd_count_sound(uint64_t)
    int sd_settings_set(sd_segment *, const void *, uint64_t)
    int sd_settings_get(const sd_segment *, void *, uint64_t *)
    uint64_t SD_EXTENT_BYTES(uint64_t)
    sd_word *sd_extent_at(const sd_segment *, uint64_t)
    void sd_ask_to_read(const sd_word *, uint64_t)
    void sd_copy_out(void *, const sd_word *, size_t)

cdef extern from "core.h":
    int (*sd_wait_hook)(pthread_mutex_t *, uint64_t) noexcept
    int (*sd_slice_hook)(pthread_mutex_t *, uint64_t) noexcept
    ctypedef void (*sd_report)(void *, const char *, const char *) noexcept
    sd_check *sd_check_begin(sd_segment *, unsigned, sd_report, void *)
    void sd_check_end(sd_check *)
    const sd_tally *sd_check_tally(const sd_check *)
    uint32_t sd_check_suspects(const sd_check *, int)
    uint64_t sd_check_overlooked(const sd_check *)
    int sd_check_records(sd_check *, uint64_t)
    int sd_check_part(int)
    int sd_check_prepare(sd_check *, int)
    int sd_check_judge(sd_check *, int, uint64_t)
    int sd_check_sum(sd_check *, int, uint64_t)
    int sd_check_sum_held(sd_check *, int, uint64_t)

cdef object EMPTY = ()
cdef object BLOB_NAMES = ("definition", "next definition", "data")
cdef object REPAIRS = {
    SD_POISON_LIST: "of the UUID and the name index (list lock)",
    SD_POISON_IDS: "of the id index (id lock)",
    SD_POISON_HEAP: "of the map of used space (heap lock)",
}
cdef tuple STATES = None       # tuple: number -> DomainState
cdef tuple REASONS = None      # tuple: state -> {number: reason}
cdef tuple DECODE = None       # three callables: blob -> value
cdef object PARSE_UUID = None
cdef object UUID = None
cdef object SAFE_UNKNOWN = None
cdef object HOLDERS = None      # module holder: who is behind a pid, and LockTimeout

# What keeps a lock out of a checker's reach.
cdef object OUT_OF_REACH = (errors.LockTimeout, errors.LockKindMismatch, errors.LockOrder,
                            errors.SegmentCorrupt)

cdef enum:
    CACHE_SIZE = 4096
    IDENTITY = 1
    FIELDS = 2


def configure(*, states, reasons, decode, parse_uuid, uuid_class, holders):
    """Tell the core the types that it hands out. Called once, by the modules that define them."""
    global STATES, REASONS, DECODE, PARSE_UUID, UUID, SAFE_UNKNOWN, HOLDERS
    STATES, REASONS, DECODE = tuple(states), tuple(reasons), tuple(decode)
    PARSE_UUID, UUID, HOLDERS = parse_uuid, uuid_class, holders
    SAFE_UNKNOWN = uuid_class(int=0).is_safe


# --- waiting -------------------------------------------------------------------------------------

# An exception raised by a signal handler inside a wait travels past C code that knows nothing of
# Python; it is kept here until `raise_code` raises it. The GIL is held from one to the other.
cdef PyObject *kept_type = NULL
cdef PyObject *kept_value = NULL
cdef PyObject *kept_traceback = NULL


cdef int slice_hook(pthread_mutex_t *mutex, uint64_t deadline) noexcept:
    cdef int result
    with nogil:
        result = sd_mutex_slice(mutex, deadline)
    return result


cdef int wait_hook(pthread_mutex_t *mutex, uint64_t deadline) noexcept:
    cdef int result = SD_OK
    if mutex != NULL:
        result = slice_hook(mutex, deadline)
        if result != SD_TIMEOUT:
            return result
    return after_slice(result)


cdef int after_slice(int result) noexcept:
    """What is done between two slices, locks of this thread that others dropped and signals; then
    `result`, or what came of it."""
    cdef int raised
    cdef unsigned nested, short_wait
    cdef sd_thread *thread = sd_self()
    cdef uint64_t epoch = sd_fork_epoch
    # Whoever we wait for may be waiting for what another thread dropped in our name.
    if thread.orphans != NULL:
        free_orphans(thread)
    nested, short_wait = thread.nested, thread.short_wait
    thread.nested, thread.short_wait = nested + 1, 0
    raised = PyErr_CheckSignals()
    sd_self()  # begins anew in a child that a handler forked, and must not later than here
    thread.nested, thread.short_wait = nested, short_wait
    if raised:
        PyErr_Fetch(&kept_type, &kept_value, &kept_traceback)
        return SD_INTERRUPTED
    # What was locked before the wait is the parent's, and the child does not know what that was.
    return result if epoch == sd_fork_epoch else SD_FORKED


sd_wait_hook = wait_hook
sd_slice_hook = slice_hook


cdef uint64_t deadline_of(timeout) except? 1:
    """None for ever, 0 try, else seconds from now."""
    cdef double seconds
    if timeout is None:
        return SD_FOREVER
    seconds = timeout
    if not seconds >= 0:
        raise ValueError(f"timeout is {timeout!r}; None waits for ever, 0 tries, else seconds")
    if seconds == 0:
        return SD_TRY
    if seconds > 1e9:
        return SD_FOREVER
    return sd_now() + <uint64_t>(seconds * 1e9)


@cython.final
@cython.freelist(4)
cdef class Deadline:
    """One time-out over several waits. `timeout` in seconds: None waits for ever, 0 tries. Raises
    `ValueError` for a negative one."""
    cdef uint64_t end

    def __cinit__(self, timeout):
        self.end = deadline_of(timeout)

    def left(self):
        """What the next wait may take: its `timeout`."""
        cdef uint64_t now
        if self.end == SD_FOREVER:
            return None
        now = sd_now()
        return (self.end - now) / 1e9 if self.end > now else 0


cdef int raise_code(int result, object what) except -1:
    """Raise what a code of the core means, but for time-outs, which name the holder, and poison,
    which says why (`raise_poison_or_code`)."""
    global kept_type, kept_value, kept_traceback
    if result == SD_INTERRUPTED:
        PyErr_Restore(kept_type, kept_value, kept_traceback)
        kept_type = kept_value = kept_traceback = NULL
        return -1
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
    if result == SD_ERRNO:
        raise OSError(errno, strerror(errno).decode(), what)
    raise errors.SegmentCorrupt(
        f"{what}: the segment holds a value that can not be right ({result})")


cdef Py_ssize_t uuid_words(object value, uint64_t *words) except -1:
    cdef bytes raw
    if type(value) is str and canonical_uuid(value, <unsigned char *>words):
        return 0
    if type(value) is bytes and PyBytes_GET_SIZE(value) == 16:
        raw = value
    elif isinstance(value, UUID):
        # What `value.bytes` is; that takes as long as to find the domain. The upper half is the one
        # that a number which is no UUID's does not fit into.
        number = value.int
        words[0] = htobe64(PyLong_AsUnsignedLongLong(number >> 64))
        words[1] = htobe64(PyLong_AsUnsignedLongLongMask(number))
        return 0
    else:
        raw = PARSE_UUID(value).bytes
    memcpy(words, PyBytes_AS_STRING(raw), 16)
    return 0


cdef inline int hex_digit(unsigned char letter) noexcept:
    if c'0' <= letter <= c'9':
        return letter - c'0'
    letter |= 0x20
    return letter - c'a' + 10 if c'a' <= letter <= c'f' else -1


cdef bint canonical_uuid(str text, unsigned char *to) noexcept:
    """Read a UUID as it is usually written, 8-4-4-4-12; other spellings are names.parse_uuid's."""
    cdef const unsigned char *at
    cdef int i, high, low
    if not PyUnicode_IS_COMPACT_ASCII(text) or len(text) != 36:
        return False
    at = <const unsigned char *>PyUnicode_1BYTE_DATA(text)
    for i in range(16):
        if i in (4, 6, 8, 10):
            if at[0] != c'-':
                return False
            at += 1
        high, low = hex_digit(at[0]), hex_digit(at[1])
        if high < 0 or low < 0:
            return False
        to[i] = <unsigned char>(high << 4 | low)
        at += 2
    return True


cdef object uuid_object(const uint64_t *words):
    """A `uuid.UUID`. Its `__init__` would look at all that it was not given, for a microsecond."""
    cdef object uuid = UUID.__new__(UUID)
    PyObject_GenericSetAttr(uuid, "int", int.from_bytes((<const char *>words)[:16], "big"))
    PyObject_GenericSetAttr(uuid, "is_safe", SAFE_UNKNOWN)
    return uuid


cdef object name_object(const unsigned char *name):
    return PyUnicode_DecodeUTF8(<const char *>name + 1, name[0], "replace")


cdef bint set_name(unsigned char *to, object name) except -1:
    """False: no domain can have this name."""
    cdef Py_ssize_t size
    cdef const char *text
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    try:
        text = PyUnicode_AsUTF8AndSize(name, &size)
    except UnicodeEncodeError:
        return False
    if size < 1 or size > SD_NAME_MAX:
        return False
    to[0] = <unsigned char>size
    memcpy(to + 1, text, size)
    return True


# --- what stands in a record ---------------------------------------------------------------------

cdef object state_of(uint16_t state):
    if state >= len(STATES):
        raise errors.SegmentCorrupt(f"a domain has the unknown state {state}")
    return STATES[state]


cdef object reason_of(uint16_t state, uint16_t reason):
    if state >= len(REASONS):
        raise errors.SegmentCorrupt(f"a domain has the unknown state {state}")
    return REASONS[state].get(reason, reason)


cdef bytes unsealed_blob(int which, bytes blob, const uint64_t *uuid, uint64_t version):
    """A blob without its checksum, which comes first; None if that does not fit: it is damaged, or
    was written for another domain, kind or version."""
    cdef const char *raw = PyBytes_AS_STRING(blob)
    cdef uint64_t written, size = <uint64_t>PyBytes_GET_SIZE(blob) - 8
    memcpy(&written, raw, 8)
    if written != sd_blob_sum(uuid, which, version, raw + 8, size):
        return None
    return PyBytes_FromStringAndSize(raw + 8, <Py_ssize_t>size)


cdef object decode(int which, bytes blob, const uint64_t *uuid, uint64_t version):
    """What is in the heap was encoded by us: if it does not decode, it was damaged."""
    cdef object reason = "it is missing"
    if blob is not None:
        reason = "its checksum does not fit"
        blob = unsealed_blob(which, blob, uuid, version)
    if blob is not None:
        try:
            return DECODE[which](blob)
        except (ValueError, TypeError, OverflowError) as exc:
            reason = exc
    raise errors.SegmentCorrupt(
        f"the {BLOB_NAMES[which]} of a domain is damaged: {reason}") from None


cdef bytes copy_extent(sd_segment *segment, uint64_t extent):
    """A blob with its checksum."""
    cdef Py_ssize_t size = <Py_ssize_t>SD_EXTENT_BYTES(extent)
    cdef const sd_word *at = sd_extent_at(segment, extent)
    cdef bytes blob
    sd_ask_to_read(at, size)
    blob = PyBytes_FromStringAndSize(NULL, size)
    sd_copy_out(PyBytes_AS_STRING(blob), at, size)
    return blob


cdef struct cache_key:
    uint64_t life, version
    uint32_t slot


@cython.final
@cython.no_gc
cdef class Decoded:
    """The definitions that this process decoded last, at most one a place; a committed version of
    a domain's definition is decoded once while it stays here.

    A list and the infos that it handed out share it, and it leads to neither: definitions are
    immutable values. So no cycle runs through an `Info`, and the collector, which would otherwise
    look at each of 100,000 listed ones several times, need not know of them.
    """
    cdef cache_key *keys
    cdef list values

    def __cinit__(self):
        self.values = [None] * CACHE_SIZE
        self.keys = <cache_key *>PyMem_Calloc(CACHE_SIZE, sizeof(cache_key))
        if self.keys == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self.keys)


cdef object cached(Decoded decoded, uint32_t slot, uint64_t life, uint64_t version):
    cdef uint32_t at = slot & (CACHE_SIZE - 1)
    cdef const cache_key *key = &decoded.keys[at]
    if key.slot == slot and key.life == life and key.version == version:
        return decoded.values[at]
    return None


cdef void cache(Decoded decoded, uint32_t slot, uint64_t life, uint64_t version,
                object value) noexcept:
    cdef uint32_t at = slot & (CACHE_SIZE - 1)
    cdef object _old = decoded.values[at]  # dropped last: that may run anything
    decoded.values[at] = value
    decoded.keys[at] = cache_key(life, version, slot)


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
@cython.freelist(8)
cdef class Blobs:
    """What is large of an `Info` and was copied with it, decoded when first asked for.

    Filled before the `Info` is handed out, unless that is damaged; what is not filled leads
    nowhere, so nobody may make one, or an `Info`, from a pickle.
    """
    cdef Decoded decoded
    cdef uint32_t slot
    cdef uint64_t life
    cdef uint64_t uuid_raw[2]
    cdef uint64_t version[3]
    cdef object known  # the definition, if it was decoded before
    cdef bytes definition, next_definition, data


cdef object live_definition(Blobs blobs):
    cdef uint64_t version = blobs.version[SD_DEFINITION]
    if blobs.known is None:
        blobs.known = cached(blobs.decoded, blobs.slot, blobs.life, version)
    if blobs.known is None:
        blobs.known = decode(SD_DEFINITION, blobs.definition, blobs.uuid_raw, version)
        cache(blobs.decoded, blobs.slot, blobs.life, version, blobs.known)
    return blobs.known


cdef object decode_or_none(Blobs blobs, int which, bytes blob):
    if blob is None:
        return None
    return decode(which, blob, blobs.uuid_raw, blobs.version[which])


cdef enum:
    MARK_PERSISTENT = 1
    MARK_AUTOSTART = 2


cdef inline uint8_t marks_of(uint64_t flags) noexcept:
    return ((flags & SD_FLAG_PERSISTENT != 0) * MARK_PERSISTENT
            | (flags & SD_FLAG_AUTOSTART != 0) * MARK_AUTOSTART)


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
@cython.freelist(8)
cdef class Info:
    """One domain as it was committed at one moment. Immutable; reading it takes no lock.

    Comes from `DomainList.peek`, `snapshot`, `list` and iteration. Each is consistent in itself;
    the set that a snapshot gives is not one moment's.
    """
    # One cache line: somebody may list a million of them. So what it needs are functions behind it
    # and not `cdef` methods, for a table of which each of them would keep a pointer.
    cdef Blobs blobs    # None: taken without
    cdef object name_text
    cdef uint64_t uuid_raw[2]
    cdef int32_t number, process  # id and pid
    cdef uint16_t state_number, reason_number
    cdef uint8_t marks
    cdef uint8_t damage  # 0, IDENTITY or FIELDS: what is damaged is not handed out

    def __init__(self):
        raise TypeError("DomainInfos come from a DomainList: peek(), list(), snapshot()")

    @property
    def id(self):
        """The id of the running domain, -1 when it is inactive."""
        need_sound(self)
        return self.number

    @property
    def name(self):
        """The domain's name."""
        need_sound(self)
        return self.name_text

    @property
    def uuid(self):
        """The domain's UUID (`uuid.UUID`)."""
        need_sound(self)
        return uuid_object(self.uuid_raw)

    @property
    def state(self):
        """The `DomainState`."""
        need_sound(self)
        return state_of(self.state_number)

    @property
    def reason(self):
        """Why it is in this state: a member of the state's reason enumeration."""
        need_sound(self)
        return reason_of(self.state_number, self.reason_number)

    @property
    def persistent(self):
        """Whether the domain outlives its deactivation."""
        need_sound(self)
        return self.marks & MARK_PERSISTENT != 0

    @property
    def autostart(self):
        """Whether the domain is to be started with the host."""
        need_sound(self)
        return self.marks & MARK_AUTOSTART != 0

    @property
    def is_active(self):
        """Whether it runs (``id != -1``; libvirt's virDomainObjIsActive)."""
        need_sound(self)
        return self.number != -1

    @property
    def pid(self):
        """Process id of the hypervisor, or None."""
        need_sound(self)
        return None if self.process == -1 else self.process

    @property
    def definition(self):
        """The live definition (`DomainDef`), decoded when first asked for."""
        return live_definition(blobs_of(self))

    @property
    def next_definition(self):
        """What becomes the definition once the domain is inactive (libvirt's newDef), or None."""
        cdef Blobs blobs = blobs_of(self)
        return decode_or_none(blobs, SD_NEXT_DEFINITION, blobs.next_definition)

    @property
    def data(self):
        """The driver's own data, or None."""
        cdef Blobs blobs = blobs_of(self)
        return decode_or_none(blobs, SD_DATA, blobs.data)

    def __repr__(self):
        if self.damage:
            return "<DomainInfo damaged>"
        return (f"<DomainInfo {self.name_text!r} uuid={self.uuid} id={self.number} "
                f"state={state_of(self.state_number).name}>")


cdef int need_sound(Info info, int allowed=0) except -1:
    if info.damage > allowed:
        raise_code(SD_CORRUPT, "a domain")
    return 0


cdef Blobs blobs_of(Info info):
    need_sound(info, IDENTITY)  # they have checksums of their own
    if info.blobs is None:
        raise AttributeError(
            "this DomainInfo was taken with definitions=False; take it with definitions=True")
    return info.blobs


@cython.no_gc_clear
cdef class Segment:
    """A mapped segment: locks, look-ups, lock-free reading. `DomainList` adds the rules."""
    cdef sd_segment *segment
    cdef bint multiprocessing
    cdef readonly bint closed
    cdef object list_lock, slot_locks  # lock="multiprocessing"
    cdef object record_class
    cdef Decoded decoded
    cdef object __weakref__
    cdef dict __dict__

    def __cinit__(self, *args, **kwargs):
        self.segment = NULL
        self.closed = True

    def __dealloc__(self):
        if self.segment != NULL:
            if (self.segment.list_taker == <void *>self
                    and self.segment.list_nonce == sd_self().nonce):
                drop_list(self, "a DomainList")
            if not self.closed:
                self.segment.open -= 1
            sd_unmap(self.segment)
            self.segment = NULL

    def _attach(self, int fd, record_class, list_lock=None, slot_locks=None):
        """Map the segment behind `fd`, which stays the caller's. Once: handles count on it."""
        cdef char why[200]
        cdef sd_segment *segment
        cdef int result
        if self.segment != NULL:
            raise TypeError("this DomainList has its segment; make another one")
        self.decoded = Decoded()
        result = sd_map(fd, &segment, why, sizeof(why))
        if result == SD_MISMATCH:
            raise errors.SegmentMismatch(why.decode())
        if result == SD_CORRUPT:
            raise errors.SegmentCorrupt(why.decode())
        if result != SD_OK:
            raise_code(result, "attach")
        self.segment = segment
        self.multiprocessing = segment.kind == SD_KIND_MULTIPROCESSING
        self.list_lock, self.slot_locks = list_lock, slot_locks
        self.record_class = record_class
        keep_spares(record_class, <void *>vacate)
        self.closed = False

    # --- state of this attachment ---

    def _close(self):
        """Give up this attachment; the mapping stays while handles refer to it."""
        if self.closed:
            return
        cdef sd_thread *thread = sd_self()
        # A signal handler may close the list, but what it interrupted still needs the list lock.
        if (self.segment.list_nonce == thread.nonce
                and self.segment.list_taker == <void *>self
                and thread.nested <= self.segment.list_nested):
            release_list(self)
        self.closed = True
        self.segment.open -= 1
        sd_detach(self.segment)

    # --- locks ---

    def _need_list_lock(self, what):
        """Raises `ListNotLocked`, or `ListClosed`, unless this thread holds the list lock."""
        need_list(self, what)

    def _need_ours(self, Record record not None):
        """A slot of another segment is just a number here, and somebody else's domain."""
        need_open(self)
        if record.segment.segment != self.segment:
            raise errors.WrongList(
                f"domain {uuid_object(record.uuid_raw)} is of another list; call the list that it "
                "came from")

    @property
    def is_locked(self):
        """Whether this thread holds the list lock."""
        return self.segment != NULL and self.segment.list_nonce == sd_self().nonce

    def lock(self, timeout=None):
        """Take the list lock (the patch's driver lock).

        `timeout` in seconds: None waits for ever, 0 tries. Raises `AlreadyLocked`, `LockOrder`
        (this thread holds a domain of this list), `LockTimeout`, `ListClosed`.
        """
        cdef uint64_t deadline = deadline_of(timeout)
        need_open(self)
        if sd_self().orphans != NULL:
            free_orphans(sd_self())
        if self.segment.list_nonce == sd_self().nonce:
            raise errors.AlreadyLocked("this thread holds the list lock already")
        if sd_self().records != NULL and holds_any(self):
            raise errors.LockOrder(
                "this thread holds a domain; the list lock comes first: unlock the domain, or take "
                "the list lock before it")
        acquire_list(self, deadline, timeout)

    def unlock(self):
        """Release the list lock. Raises `ListNotLocked`, or `NotOwner` in another thread."""
        cdef sd_thread *thread = sd_self()
        if self.segment != NULL and self.segment.list_nonce == thread.nonce:
            if thread.nested > self.segment.list_nested:
                raise_code(SD_NESTED, "unlock the list")
            release_list(self)
            if self.closed:
                sd_detach(self.segment)
            return
        need_open(self)
        if self.segment.list_nonce and sd_load(&self.segment.header.list_owner.pid) == thread.pid:
            raise errors.NotOwner("another thread of this process holds the list lock")
        raise errors.ListNotLocked("this thread does not hold the list lock")

    def locked(self, timeout=None):
        """Hold the list lock for a ``with`` block; see `lock`.

            with doms.locked():
                dom = doms.find_by_name("web1")
        """
        return ListHold(self, timeout)

    def acquire(self, block=True, timeout=None):
        """`lock` in the manner of `multiprocessing.Lock`: True, or False when it was not free."""
        try:
            self.lock(0 if not block or (timeout is not None and timeout < 0) else timeout)
        except errors.LockTimeout:
            return False
        return True

    def release(self):
        """`unlock` in the manner of `multiprocessing.Lock`."""
        self.unlock()

    # --- finding ---

    def get(self, *, uuid=None, name=None, id=None, timeout=None):
        """The domain with this uuid, name or id, locked. No list lock needed.

        Exactly one key. `timeout` in seconds. Raises `DomainNotFound`, `LockTimeout`,
        `LockOrder` (this thread holds another domain and would wait), `AlreadyLocked`.
        """
        cdef sd_key key
        cdef uint64_t deadline = deadline_of(timeout)
        cdef Record record = None
        need_open(self)
        if make_key(&key, uuid, name, id):
            record = find_record(self, &key, deadline, timeout)
        if record is None:
            raise not_found(uuid, name, id)
        return record

    def lookup(self, *, uuid=None, name=None, id=None, timeout=None):
        """Like `get`, but None when there is no such domain."""
        cdef sd_key key
        cdef uint64_t deadline = deadline_of(timeout)
        need_open(self)
        if not make_key(&key, uuid, name, id):
            return None
        return find_record(self, &key, deadline, timeout)

    def find_by_id(self, id, timeout=None):
        """The active domain with this id, locked, or None. List lock held by the caller
        (virDomainFindByID)."""
        return find_with_list(self, "find_by_id", None, None, id, timeout)

    def find_by_uuid(self, uuid, timeout=None):
        """The domain with this UUID, locked, or None. List lock held by the caller
        (virDomainFindByUUID)."""
        return find_with_list(self, "find_by_uuid", uuid, None, None, timeout)

    def find_by_name(self, name, timeout=None):
        """The domain with this name, locked, or None. List lock held by the caller
        (virDomainFindByName)."""
        return find_with_list(self, "find_by_name", None, name, None, timeout)

    # --- reading without any lock ---

    def _slots(self):
        """How many slots there are to `_salvage`; where their number is damaged, all that have
        memory."""
        cdef uint32_t slots = 0
        cdef uint64_t committed = sd_unsealed(sd_load_acquire(
            &self.segment.header.slots_committed))
        need_open(self)
        if sd_slots(self.segment, &slots) == SD_OK:
            return slots
        return committed if committed <= self.segment.at.max_slots else 0

    def _salvage(self, uint32_t slot):
        """What can be read of one record, without a lock: None, or (a `DomainInfo` without
        definitions, the three blobs as bytes or None, which of them are damaged). Damaged fields
        may lead to a blob that does not count any more, never to another domain's."""
        cdef sd_view view
        cdef uint64_t extent, deadline = sd_now() + 1000000000
        cdef int result, b
        cdef unsigned tries = 0
        cdef list blobs, damaged
        cdef Info info = Info.__new__(Info)
        need_open(self)
        if slot >= self._slots():
            return None
        while True:
            result = sd_view_begin(self.segment, slot, &view)
            if result == SD_MISS:
                return None
            info.damage = FIELDS if result == SD_CORRUPT else 0
            if result == SD_OK or result == SD_CORRUPT:
                blobs, damaged = [None, None, None], [False, False, False]
                for b in range(3):
                    result = sd_view_extent(self.segment, slot, &view, b, &extent)
                    if result == SD_OK:
                        blobs[b] = unsealed_blob(b, copy_extent(self.segment, extent), view.uuid,
                                                 view.values.version[b])
                    damaged[b] = result == SD_CORRUPT or (result == SD_OK and blobs[b] is None)
                if sd_view_check(self.segment, slot, &view) == SD_OK:
                    return fill(info, &view), blobs, damaged
            tries += 1
            if tries > 100:
                back_off(deadline)

    def peek(self, *, uuid=None, name=None, id=None, timeout=1.0):
        """The committed state of one domain (`DomainInfo`), or None. Takes no lock and never waits
        for one.

        `timeout`: seconds after which a read that writers keep overtaking raises `Busy`.
        """
        cdef sd_key key
        cdef uint64_t deadline = deadline_of(timeout)
        need_open(self)
        if not make_key(&key, uuid, name, id):
            return None
        return read_by_key(self, &key, True, deadline)

    def _is_new(self, uuid, name):
        """Whether no domain has this uuid, and none this name. List lock held, so that only a
        signal handler of this thread can change it."""
        cdef sd_key key
        need_list(self, "assign_def")
        sd_ask_to_insert(self.segment)
        uuid_words(uuid, key.uuid)
        return bool(set_name(key.name, name)) and read_either(self, &key) == SD_MISS

    def _glance(self, *, uuid=None, name=None, id=None):
        """`peek` without definitions and data."""
        cdef sd_key key
        need_open(self)
        if not make_key(&key, uuid, name, id):
            return None
        return read_by_key(self, &key, False, sd_now() + 1000000000)

    def snapshot(self, definitions=True):
        """All domains as `DomainInfo`s of committed state. Takes no lock; each record is
        consistent in itself, the set is not one moment's. `definitions=False` leaves definitions
        and data out and is faster. Raises `Busy` when writers kept overtaking it for a second."""
        return self._list(-1, -1, -1, 0xffffffff, definitions)

    def _list(self, int active, int persistent, int autostart, unsigned states, bint definitions):
        cdef uint32_t slot
        cdef Info info
        cdef list found = []
        cdef uint64_t deadline = sd_now() + 1000000000
        cdef asked what = asked(active, persistent, autostart, states)
        cdef bint filtered = (active & persistent & autostart) >= 0 or states != 0xffffffff
        need_open(self)
        for slot in range(slot_count(self)):
            if filtered and not may_match(self, slot, &what):
                continue
            info = read_slot(self, slot, NULL, definitions, deadline)
            if info is None:
                continue
            if info.damage == FIELDS or wanted(info.number, info.marks, info.state_number, &what):
                found.append(info)
        return found

    def _count(self, int active, int persistent, int autostart, unsigned states):
        cdef uint32_t slot
        cdef uint64_t total = 0
        cdef sd_view view
        cdef int result
        cdef asked what = asked(active, persistent, autostart, states)
        need_open(self)
        for slot in range(slot_count(self)):
            result = sd_view_begin(self.segment, slot, &view)
            while result == SD_DOUBT:
                result = sd_view_begin(self.segment, slot, &view)
            if result == SD_CORRUPT:
                raise_code(result, "count")
            if result == SD_OK and wanted_view(&view, &what):
                total += 1
        return total

    def __len__(self):
        need_open(self)
        cdef uint64_t live = sd_load(&self.segment.header.live)
        if live > self.segment.at.max_slots:
            raise_code(SD_CORRUPT, "count")
        return live

    def __contains__(self, uuid):
        return self._glance(uuid=uuid) is not None

    def __iter__(self):
        return iter(self.snapshot())

    # --- for the rules: what a store offers ---

    def _create(self, uuid, name, bytes definition, bint persistent, timeout=None):
        """A new record, committed and locked. List lock held."""
        cdef sd_key key
        cdef sd_values values
        cdef sd_blob blobs[3]
        cdef uint32_t slot
        cdef sd_word *link
        cdef uint64_t deadline = deadline_of(timeout)
        cdef uint64_t epoch = sd_fork_epoch
        cdef Record record
        cdef int result
        need_list(self, "assign_def")
        may_wait(self, deadline)
        uuid_words(uuid, key.uuid)
        if not set_name(key.name, name):
            raise errors.InvalidName(f"{name!r} can not be a domain's name")
        memset(&values, 0, sizeof(values))
        memset(blobs, 0, sizeof(blobs))
        values.id = values.pid = -1
        values.state = 5
        values.flags = SD_FLAG_PERSISTENT if persistent else 0
        set_change(&blobs[SD_DEFINITION], definition)
        record = new_record(self)
        # The caller has looked, but a signal handler of this thread may have run since, and holds
        # what we hold. From here on it is told so.
        result = read_either(self, &key)
        if result == SD_OK:
            raise errors.DomainExists(
                f"a domain with the name '{name}' or the uuid {uuid_object(key.uuid)} was defined "
                "meanwhile by a signal handler of this thread")
        if result != SD_MISS:
            raise_code(result, f"define domain {name!r}")
        lock_free_slot(self, &slot, &link, deadline, timeout)
        result = sd_insert(self.segment, slot, link, key.uuid, key.name, &values, blobs, deadline)
        if result != SD_OK:
            if epoch == sd_fork_epoch:  # else it is our parent's
                release_slot(self, slot, False)
            raise_poison_or_code(self, result, f"define domain {name!r}")
        lead_to(record, slot)
        begin_hold(record)
        return record

    def _remove(self, Record record, timeout=None):
        """Remove a record that this thread has locked; its lock is released. List lock held."""
        self._need_ours(record)
        cdef Record mine = need_changeable(record)
        cdef uint64_t deadline = deadline_of(timeout)
        need_list(self, "remove")
        cdef int result = sd_remove(self.segment, mine.slot, deadline)
        if result != SD_OK:
            raise_poison_or_code(self, result, "remove a domain")
        drop_changes(mine)
        end_hold(mine, True)

    def _rename(self, Record record, name, bytes definition, bytes next_definition, timeout=None):
        """Name and definitions in one commit. List lock held; duplicates were looked for."""
        self._need_ours(record)
        cdef Record mine = need_changeable(record)
        cdef uint64_t deadline = deadline_of(timeout)
        cdef unsigned char raw[252]
        cdef sd_blob blobs[3]
        need_list(self, "rename")
        if not set_name(raw, name):
            raise errors.InvalidName(f"{name!r} can not be a domain's name")
        memset(blobs, 0, sizeof(blobs))
        set_change(&blobs[SD_DEFINITION], definition)
        if next_definition is not None:
            set_change(&blobs[SD_NEXT_DEFINITION], next_definition)
        cdef int result = sd_commit(self.segment, mine.slot, &mine.values, blobs, raw, deadline)
        if result != SD_OK:
            raise_poison_or_code(self, result, f"rename to {name!r}")
        reload_values(mine)

    def _lock_record(self, uint32_t slot, uint64_t life, timeout=None):
        """The record in this slot, locked, if it still lives this life; else None."""
        cdef uint64_t deadline = deadline_of(timeout)
        need_open(self)
        may_wait(self, deadline)
        if slot >= slot_count(self):
            return None
        return find_in_slot(self, slot, NULL, life, deadline, timeout)

    def _handle(self, uint32_t slot, uint64_t life, bytes uuid):
        """An unlocked handle, for unpickling. It may be stale; locking it says so."""
        cdef Record record
        need_open(self)
        if slot >= slot_count(self) or len(uuid) != 16:
            raise errors.DomainRemoved("this handle's domain does not exist in this list")
        record = new_record(self)
        lead_to(record, slot)
        record.life = life
        uuid_words(uuid, record.uuid_raw)
        return record

    def _live_handles(self):
        """Unlocked handles to every live record, in slot order."""
        cdef uint32_t slot
        cdef Record record
        cdef list found = []
        need_open(self)
        for slot in range(slot_count(self)):
            need_sound_life(self, slot)
            if sd_load(&self.segment.slots[slot].life) & 1:
                record = new_record(self)
                lead_to(record, slot)
                found.append(record)
        return found

    def _set_settings(self, bytes settings):
        need_list(self, "settings")
        cdef int result = sd_settings_set(self.segment, PyBytes_AS_STRING(settings), len(settings))
        if result != SD_OK:
            raise_code(result, "settings")

    def _settings(self):
        cdef unsigned char *room = <unsigned char *>malloc(SD_SETTINGS_BYTES)
        cdef uint64_t size
        if room == NULL:
            raise MemoryError
        try:
            need_open(self)
            if sd_settings_get(self.segment, room, &size) != SD_OK:
                raise_code(SD_CORRUPT, "settings")
            return PyBytes_FromStringAndSize(<char *>room, size)
        finally:
            free(room)

    @property
    def _identity(self):
        """Random, the segment's own: 16 bytes."""
        if self.segment == NULL:
            raise errors.ListClosed("this DomainList is closed")
        return PyBytes_FromStringAndSize(<char *>self.segment.id, 16)

    @property
    def _fd(self):
        need_open(self)
        return self.segment.fd

    @property
    def _kind(self):
        return "multiprocessing" if self.multiprocessing else "robust"

    @property
    def _locks(self):
        return self.list_lock, self.slot_locks

    def _statistics(self):
        cdef sd_header *header
        cdef unsigned i
        need_open(self)
        header = self.segment.header
        attached = [sd_load(&self.segment.attached[i]) for i in range(SD_ATTACHED_MAX)
                    if sd_load(&self.segment.attached[i])]
        return { "domains": sd_load(&header.live), "active": sd_load(&header.active),
                "max_domains": self.segment.at.max_slots, "slots": sd_slot_count(self.segment),
                "bytes_max": self.segment.at.total_bytes,
                "heap_max": self.segment.at.heap_cells * SD_CELL,
                "heap_used": sd_load(&header.heap_used) * SD_CELL,
                "creator": (header.creator_pid & 0x3fffff, header.creator_who >> 22),
                "created": header.created / 1e9, "poisoned": why_poisoned(self),
                "attached": [(word & 0x3fffff, word >> 22) for word in attached], }

    # --- check ---

    def _check(self, timeout=None):
        """Look at every invariant: (problems, counts, what there is no verdict on, longest hold).

        No verdict: pairs of a number and why; 0 to 4 are the sums of core.h, 5 to 7 suspects that
        are left of the list, the ids, the heap. The hold is in seconds.
        """
        cdef faults found = {"first": NULL, "count": 0}
        cdef uint64_t longest = 0, deadline = deadline_of(timeout)
        cdef sd_check *check
        cdef sd_tally tally
        cdef int part, sum
        cdef list open = []
        need_open(self)
        check = sd_check_begin(self.segment, len(STATES), report, &found)
        if check == NULL:
            raise MemoryError
        self.segment.inside += 1
        try:
            if check_records(self, check):
                for part in range(SD_PARTS):
                    why = judge_part(self, check, part, deadline, timeout, &longest)
                    if why is not None:
                        open.append((SD_SUMS + part, why))
                for sum in range(SD_SUMS):
                    why = judge_sum(self, check, sum, deadline, timeout, &longest)
                    if why is not None:
                        open.append((sum, why))
            if sd_check_overlooked(check):
                open.append((SD_SUMS, f"{sd_check_overlooked(check)} more records or entries look "
                             "wrong, too many to judge"))
            tally = sd_check_tally(check)[0]
        finally:
            sd_check_end(check)
            problems = list_faults(found.first)
            end_wait(self)
        return problems, tally, open, longest / 1e9

    # --- recover ---

    def _recover(self, timeout=None):
        """Take each lock as its next holder would: (repairs, what is held, bytes freed).

        Repairs: (lock, name of the domain, `LockHolder` that died or None if the repair had been
        put off). Held: (lock, name of the domain, `LockHolder` or None).
        """
        cdef uint64_t freed, deadline = deadline_of(timeout)
        cdef list repairs = [], held = []
        need_open(self)
        if self.multiprocessing and self.list_lock is None:
            raise errors.LockKindMismatch(
                "this list uses multiprocessing locks, which only processes can have that "
                "inherited the DomainList: recover through one of them")
        if sd_load_acquire(&self.segment.header.poisoned):
            raise_poison_or_code(self, SD_POISONED, "recover")
        if self.segment.list_nonce != sd_self().nonce:
            recover_list(self, deadline, timeout, repairs, held)
        recover_short(self, "id", &self.segment.header.id_mutex, deadline, timeout, repairs, held)
        recover_short(self, "heap", &self.segment.header.heap_mutex, deadline, timeout, repairs,
                      held)
        self.segment.inside += 1
        try:
            freed = recover_slots(self, repairs, held)
        finally:
            end_wait(self)
        return repairs, held, freed * SD_CELL


cdef int need_open(Segment doms) except -1:
    if doms.closed:
        raise errors.ListClosed("this DomainList is closed")
    if doms.segment.epoch != sd_fork_epoch and sd_begin_in_child(doms.segment) != SD_OK:
        raise errors.SegmentMismatch(
            "this process lives in another PID namespace than its parent, where the thread "
            "numbers in the locks mean nothing")
    return 0


cdef void end_wait(Segment doms) noexcept:
    """A wait is over; the list may have been closed meanwhile."""
    if doms.segment.inside:  # 0: a handler forked, and this is the child
        doms.segment.inside -= 1
    if doms.closed:
        sd_detach(doms.segment)


cdef uint32_t slot_count(Segment doms) except? 0:
    """How many there are; an error when that is damaged, and never an empty list for it."""
    cdef uint32_t slots
    if sd_slots(doms.segment, &slots) != SD_OK:
        raise errors.SegmentCorrupt("the number of slots is damaged")
    return slots


cdef int still_open(Segment doms) except -1:
    if doms.closed:
        raise errors.ListClosed("this DomainList was closed during the wait")
    return 0


cdef object read_definition(Segment doms, uint32_t slot, uint64_t life, const sd_values *values):
    cdef uint64_t extent
    cdef uint64_t uuid[2]
    cdef uint64_t version = values.version[SD_DEFINITION]  # decoding may run a signal handler
    value = cached(doms.decoded, slot, life, version)
    if value is not None:
        return value
    if not values.flags & SD_FLAG_PRESENT(SD_DEFINITION):
        decode(SD_DEFINITION, None, NULL, 0)
    uuid[0], uuid[1] = sd_load(&doms.segment.slots[slot].uuid[0]), sd_load(
        &doms.segment.slots[slot].uuid[1])
    if sd_blob_get(doms.segment, slot, values, SD_DEFINITION, &extent) != SD_OK:
        raise_code(SD_CORRUPT, "definition")
    value = decode(SD_DEFINITION, copy_extent(doms.segment, extent), uuid, version)
    cache(doms.decoded, slot, life, version, value)
    return value


cdef int raise_timed_out(Segment doms, sd_owner *owner, pthread_mutex_t *mutex, object what,
                         object timeout) except -1:
    raise timeout_error(doms, owner, mutex, what, timeout)


cdef object timeout_error(Segment doms, sd_owner *owner, pthread_mutex_t *mutex, object what,
                          object timeout):
    """The error that names the holder. `owner` NULL: only the mutex knows."""
    cdef uint64_t who = sd_load(&owner.who) if owner != NULL else 0
    cdef uint64_t since = sd_load(&owner.since) if owner != NULL else 0
    cdef uint32_t tid = <uint32_t>(who & 0x3fffff) if who else sd_mutex_owner(mutex)
    # Finding out takes a descriptor; the owner wrote it down as well.
    cdef uint32_t pid = sd_process_of(tid) if tid else 0
    if not pid and who:
        pid = <uint32_t>sd_load(&owner.pid)
    return HOLDERS.lock_timeout(what, timeout, tid, pid,
                                who >> 22 if who else 0,
                                (sd_now() - since) / 1e9 if who and since else None)


cdef object why_poisoned(Segment doms):
    """Why the segment is poisoned, or None."""
    cdef sd_header *header = doms.segment.header
    cdef uint64_t who, at
    cdef uint64_t reason = sd_load_acquire(&header.poisoned)
    if not reason:
        return None
    who, at = sd_load(&header.poisoned_who), sd_load(&header.poisoned_at)
    return HOLDERS.failed_repair(
        REPAIRS.get(reason), at - 1 if at else None, who & 0x3fffff,
        sd_load(&header.poisoned_pid), who >> 22, sd_load(&header.poisoned_when) / 1e9)


cdef int raise_poison_or_code(Segment doms, int result, object what) except -1:
    if result != SD_POISONED:
        return raise_code(result, what)
    raise errors.SegmentPoisoned(
        f"{what}: {why_poisoned(doms)}; its domains can still be read (list, dumpxml): export "
        "them, unlink the segment and create a new one")


cdef int lock_semaphore(object lock, sd_owner *owner, uint64_t deadline,
                 uint64_t *died_who, uint64_t *died_pid) except -1:
    """A multiprocessing.Lock; SD_DIED: its holder was dead and we stand in its place."""
    cdef uint64_t who
    cdef int result
    cdef sem_t *semaphore
    cdef sd_thread *thread = sd_self()
    if lock is None:
        raise errors.LockKindMismatch(
            "this list uses multiprocessing locks, which only processes can have that "
            "inherited the DomainList; a stranger may read it: snapshot(), list(), peek()")
    if lock.acquire(False):
        return SD_OK
    semaphore = <sem_t *><size_t>lock._semlock.handle
    while True:
        who = sd_load_acquire(&owner.who)
        if who == thread.who:
            return SD_NESTED  # a signal handler, or the collector, took it and kept it
        if who and not sd_alive(who) and sd_take_over(owner, who):
            died_who[0], died_pid[0] = who, sd_load(&owner.pid)
            return SD_DIED
        if deadline != SD_FOREVER and sd_now() >= deadline:
            return SD_TIMEOUT
        with nogil:
            result = sd_semaphore_slice(semaphore, owner, deadline)
        if result == SD_OK:
            return SD_OK
        result = after_slice(result)
        if result != SD_TIMEOUT:
            return result


cdef int acquire_list(Segment doms, uint64_t deadline, object timeout) except -1:
    cdef int result
    cdef bint died
    cdef uint64_t who, pid
    cdef sd_segment *segment = doms.segment
    segment.inside += 1
    try:
        if not doms.multiprocessing:
            result = sd_list_lock(segment, deadline)
        else:
            result = lock_semaphore(doms.list_lock, &segment.header.list_owner, deadline, &who,
                                    &pid)
            if result == SD_OK or result == SD_DIED:
                died = result == SD_DIED
                result = sd_list_entered(segment, died)
                if died:
                    sd_self().repair.who, sd_self().repair.pid = who, pid
                if result != SD_OK:
                    sd_store(&segment.header.list_owner.who, 0)
                    doms.list_lock.release()
        if result == SD_OK:
            segment.list_taker = <void *>doms
            if doms.closed:
                release_list(doms)
    finally:
        end_wait(doms)
    if result == SD_OK:
        return still_open(doms)
    if result == SD_TIMEOUT:
        raise_timed_out(doms, &segment.header.list_owner, &segment.header.list_mutex,
                        "the list lock", timeout)
    return raise_poison_or_code(doms, result, "lock the list")


cdef int release_list(Segment doms) except -1:
    if not doms.multiprocessing:
        sd_list_unlock(doms.segment)
        return 0
    if doms.list_lock is None:
        raise errors.LockKindMismatch("unlock through the DomainList that locked")
    sd_list_leaving(doms.segment)
    doms.list_lock.release()
    return 0


cdef int acquire_slot(Segment doms, uint32_t slot, uint64_t deadline) except -1:
    """SD_OK or SD_TIMEOUT."""
    cdef int result
    cdef uint64_t who, pid
    cdef sd_slot *record = &doms.segment.slots[slot]
    doms.segment.inside += 1
    try:
        if not doms.multiprocessing:
            result = sd_slot_lock(doms.segment, slot, deadline)
        else:
            result = lock_semaphore(None if doms.slot_locks is None else doms.slot_locks[slot],
                                    &record.owner, deadline, &who, &pid)
            if result == SD_DIED:
                sd_self().repair.died = True
                sd_self().repair.who, sd_self().repair.pid = who, pid
                sd_recover_slot(doms.segment, slot, who, pid)
                result = SD_OK
            if result == SD_OK:
                result = sd_slot_entered(doms.segment, slot)
                if result != SD_OK:
                    sd_store(&record.owner.who, 0)
                    doms.slot_locks[slot].release()
        if result == SD_OK and doms.closed:
            release_slot(doms, slot, False)
    finally:
        end_wait(doms)
    if result == SD_OK or result == SD_TIMEOUT:
        still_open(doms)
        return result
    return raise_poison_or_code(doms, result, "lock a domain")


cdef int release_slot(Segment doms, uint32_t slot, bint given) except -1:
    if not doms.multiprocessing:
        sd_slot_unlock(doms.segment, slot, given)
        return 0
    sd_slot_leaving(doms.segment, slot, given)
    doms.slot_locks[slot].release()
    return 0


cdef void *held_pointer(Segment doms, uint32_t slot, uint64_t life):
    """This thread's locked handle to the slot, or NULL. `life` 0: whichever life."""
    cdef void *at = sd_self().records
    while at != NULL:
        if ((<Record>at).slot == slot and (<Record>at).segment.segment == doms.segment
                and (life == 0 or (<Record>at).life == life)):
            return at
        at = (<Record>at).after
    return NULL


cdef Record held_here(Segment doms, uint32_t slot, uint64_t life):
    """That handle, or None. One that is going away still holds the slot, but must not get a
    reference again: callbacks of weak references run then, and so may this thread, while
    another one drops its handle."""
    cdef void *at = held_pointer(doms, slot, life)
    if at == NULL or Py_REFCNT(at) == 0:
        return None
    return <Record>at


cdef int need_not_held(Segment doms, uint32_t slot) except -1:
    if sd_self().records != NULL and held_pointer(doms, slot, 0) != NULL:
        raise errors.AlreadyLocked(f"this thread holds {describe(doms, slot)} already")
    return 0


cdef bint holds_any(Segment doms):
    cdef void *at = sd_self().records
    while at != NULL:
        if (<Record>at).segment.segment == doms.segment:
            return True
        at = (<Record>at).after
    return False


cdef int may_wait(Segment doms, uint64_t deadline) except -1:
    """Before a wait for a domain: a second one is waited for only under the list lock."""
    cdef sd_thread *thread = sd_self()
    if thread.orphans != NULL:
        free_orphans(thread)
    if thread.records == NULL:
        return 0
    if thread.held >= SD_HELD_MAX:
        raise errors.TooManyLocks(
            f"this thread holds {thread.held} domains; unlock some: the kernel frees a limited "
            "number of locks when a thread dies")
    if deadline == SD_TRY or doms.segment.list_nonce == thread.nonce or not holds_any(doms):
        return 0
    raise errors.LockOrder(
        "this thread holds a domain and would wait for another; take both with lock_many(), "
        "or hold the list lock, or use timeout=0")


cdef int need_list(Segment doms, object what) except -1:
    cdef sd_thread *thread = sd_self()
    need_open(doms)
    if doms.segment.list_nonce != thread.nonce:
        raise errors.ListNotLocked(f"{what} needs the list lock: with doms.locked(): ...")
    if thread.nested > doms.segment.list_nested:
        raise_code(SD_NESTED, what)
    return 0


cdef bint make_key(sd_key *key, object uuid, object name, object id) except -1:
    """False: no domain can have this key."""
    if (uuid is not None) + (name is not None) + (id is not None) != 1:
        raise TypeError("give exactly one of uuid=, name=, id=")
    if uuid is not None:
        key.what = SD_UUID_INDEX
        uuid_words(uuid, key.uuid)
        return True
    if name is not None:
        key.what = SD_NAME_INDEX
        return set_name(key.name, name)
    if not isinstance(id, int):
        raise TypeError(f"an id is an int, not {type(id).__name__}")
    key.what = SD_ID_INDEX
    if id < 0 or id > 0x7fffffff:
        return False
    key.id = id
    return True


cdef int find_under_lock(Segment doms, const sd_key *key, uint32_t *slot, uint64_t deadline,
                         object timeout) except -1:
    """Once more, under the lock of the index. SD_OK or SD_MISS."""
    cdef int result
    if key.what == SD_ID_INDEX:
        doms.segment.inside += 1
        result = sd_ids_lock(doms.segment, deadline)
        if result != SD_OK:
            end_wait(doms)
            return raise_poison_or_code(doms, result, "find by id")
        result = sd_find(doms.segment, key, slot)
        sd_ids_unlock(doms.segment)
        end_wait(doms)
        still_open(doms)
    else:
        # While a domain is held the list lock may only be tried (its holder may want that one).
        acquire_list(doms, SD_TRY if holds_any(doms) else deadline, timeout)
        result = sd_find(doms.segment, key, slot)
        release_list(doms)
    if result == SD_OK or result == SD_MISS:
        return result
    return raise_code(result, "find")


cdef Record find_record(Segment doms, const sd_key *key, uint64_t deadline, object timeout):
    """Probe, lock that one slot, verify; None: not there.

    A hit that turns out to be another domain once it is locked was removed or renamed
    meanwhile; the look-up begins again, for its key may have come back in another slot.
    """
    cdef uint32_t slot
    cdef int result
    cdef Record record
    cdef sd_thread *thread = sd_self()
    if thread.orphans != NULL:
        free_orphans(thread)
    if thread.records != NULL:
        if sd_find(doms.segment, key, &slot) == SD_OK:
            need_not_held(doms, slot)
        may_wait(doms, deadline)
    while True:
        result = sd_find_to_lock(doms.segment, key, &slot)
        if result == SD_DOUBT:
            if doms.segment.list_nonce == sd_self().nonce and key.what != SD_ID_INDEX:
                raise_code(SD_CORRUPT, "find")
            result = find_under_lock(doms, key, &slot, deadline, timeout)
        if result == SD_MISS:
            return None
        if result != SD_OK:
            raise_code(result, "find")
        record = find_in_slot(doms, slot, key, 0, deadline, timeout)
        if record is not None:
            return record


cdef Record find_in_slot(Segment doms, uint32_t slot, const sd_key *key, uint64_t life,
                         uint64_t deadline, object timeout):
    """Lock the slot and hand out the domain if it is still the one that was meant."""
    cdef sd_slot *at = &doms.segment.slots[slot]
    cdef Record record
    cdef int result
    # Made before the lock is taken: an allocation may run the collector, which runs anything.
    record = new_record(doms)
    need_not_held(doms, slot)
    if acquire_slot(doms, slot, deadline) == SD_TIMEOUT:
        raise_timed_out(doms, &at.owner, &at.mutex, describe(doms, slot), timeout)
    result = verify(doms, slot, key, life, &record.values)
    if result != SD_OK:
        release_slot(doms, slot, False)
        if result == SD_CORRUPT:
            raise_code(SD_CORRUPT, "lock a domain")
        need_sound_life(doms, slot)
        return None
    lead_to(record, slot)
    enter_thread(record)
    return record


cdef int verify(Segment doms, uint32_t slot, const sd_key *key, uint64_t life,
                sd_values *values) noexcept:
    """Under the slot's lock: is it what was meant, a key or else a life?"""
    if key != NULL:
        return sd_verify(doms.segment, slot, key, values)
    if sd_load(&doms.segment.slots[slot].life) != life:
        return SD_MISS
    return sd_values_get(doms.segment, slot, values)


cdef Record new_record(Segment doms):
    cdef Record record = <Record>new_handle(doms.record_class, EMPTY)
    record.segment = doms
    return record


cdef int need_sound_life(Segment doms, uint32_t slot) except -1:
    """What is damaged is neither there nor gone."""
    if not sd_count_sound(sd_load(&doms.segment.slots[slot].life)):
        raise errors.SegmentCorrupt(
            f"whether a domain lives in slot {slot}, and which, is damaged")
    return 0


cdef object describe(Segment doms, uint32_t slot):
    cdef sd_view view
    if sd_view_begin(doms.segment, slot, &view) == SD_OK:
        return f"domain {name_object(view.name)!r}"
    return "a domain"


cdef object not_found(object uuid, object name, object id):
    # libvirt's words (virDomainObjListFindBy*).
    if uuid is not None:
        if not isinstance(uuid, str):
            uuid = UUID(bytes=uuid) if isinstance(uuid, bytes) else uuid
        return errors.DomainNotFound(f"no domain with matching uuid '{uuid}'")
    if name is not None:
        return errors.DomainNotFound(f"no domain with matching name '{name}'")
    return errors.DomainNotFound(f"no domain with matching id {id}")


cdef Record find_with_list(Segment doms, object what, object uuid, object name, object id,
                           object timeout):
    cdef sd_key key
    cdef uint64_t deadline = deadline_of(timeout)
    need_list(doms, what)
    if not make_key(&key, uuid, name, id):
        return None
    return find_record(doms, &key, deadline, timeout)


cdef Info read_slot(Segment doms, uint32_t slot, const sd_key *key, bint blobs, uint64_t deadline):
    """A consistent view of the slot, or None when nothing lives there (or not `key`)."""
    cdef sd_view view
    cdef int result
    cdef int damage = 0
    cdef Info info = Info.__new__(Info)
    cdef unsigned tries = 0
    if blobs:
        info.blobs = Blobs.__new__(Blobs)
    while True:
        result = sd_view_begin(doms.segment, slot, &view)
        if result == SD_MISS:
            return None
        damage = FIELDS if result == SD_CORRUPT else 0
        if damage:
            break
        if result == SD_OK:
            damage = 0 if view.name[0] else IDENTITY
            if key != NULL and not view_matches(&view, key):
                return None
            if not blobs:
                break
            result = read_blobs(doms, slot, &view, info.blobs)
            if result == SD_CORRUPT:
                raise_code(result, "read")
            if result == SD_OK:
                break
        tries += 1
        if tries > 100:
            back_off(deadline)
    if damage and key != NULL:
        raise_code(SD_CORRUPT, "read")
    info.damage = damage
    return fill(info, &view)


cdef int read_blobs(Segment doms, uint32_t slot, const sd_view *view, Blobs blobs) except? -1:
    """SD_OK, SD_CORRUPT, or SD_DOUBT: a writer came in between."""
    cdef bytes blob
    cdef uint64_t extent
    cdef int b, result
    blobs.decoded = doms.decoded
    blobs.slot, blobs.life = slot, view.life
    blobs.uuid_raw[0], blobs.uuid_raw[1] = view.uuid[0], view.uuid[1]
    memcpy(blobs.version, view.values.version, sizeof(blobs.version))
    blobs.known = cached(doms.decoded, slot, view.life, view.values.version[SD_DEFINITION])
    for b in range(SD_DEFINITION if blobs.known is None else SD_NEXT_DEFINITION, 3):
        result = sd_view_extent(doms.segment, slot, view, b, &extent)
        if result == SD_OK:
            blob = copy_extent(doms.segment, extent)
        elif result == SD_MISS:
            blob = None
        else:
            return result
        if b == SD_DEFINITION:
            blobs.definition = blob
        elif b == SD_NEXT_DEFINITION:
            blobs.next_definition = blob
        else:
            blobs.data = blob
    return sd_view_blobs_check(doms.segment, slot, view)


cdef int read_either(Segment doms, sd_key *key) noexcept:
    """Whether a domain has the uuid of this key, or its name: as sd_find. List lock held."""
    cdef uint32_t slot
    cdef int result
    key.what = SD_UUID_INDEX
    result = sd_find(doms.segment, key, &slot)
    if result != SD_MISS:
        return result
    key.what = SD_NAME_INDEX
    return sd_find(doms.segment, key, &slot)


cdef Info read_by_key(Segment doms, const sd_key *key, bint blobs, uint64_t deadline):
    cdef uint32_t slot
    cdef int result
    cdef unsigned tries = 0
    cdef Info info
    while True:
        result = sd_find(doms.segment, key, &slot)
        if result == SD_MISS:
            return None
        if result == SD_OK:
            info = read_slot(doms, slot, key, blobs, deadline)
            if info is not None:
                return info
        elif result != SD_DOUBT:
            raise_code(result, "peek")
        tries += 1
        if tries > 100:
            wake_recovery(doms)
            back_off(deadline)


cdef int wake_recovery(Segment doms) except -1:
    """An index that stays odd has a dead holder: repair it, if that takes no waiting. If that
    failed, nobody does it any more, and nobody need wait for it."""
    cdef sd_segment *segment = doms.segment
    if sd_load(&segment.header.poisoned):
        raise_poison_or_code(doms, SD_POISONED, "find")
    if segment.list_nonce == sd_self().nonce:
        return 0
    if sd_ids_lock(segment, SD_TRY) == SD_OK:
        sd_ids_unlock(segment)
    if not sd_load(&segment.header.list_seq) & 1:
        return 0
    if not doms.multiprocessing:
        if sd_list_lock(segment, SD_TRY) == SD_OK:
            sd_list_unlock(segment)
    elif doms.list_lock is not None:
        try:
            acquire_list(doms, SD_TRY, 0)
        except errors.LockTimeout:
            return 0
        release_list(doms)
    return 0


cdef bint may_match(Segment doms, uint32_t slot, const asked *what) noexcept:
    """A first look that spares the copy of what the filter rejects."""
    cdef sd_view view
    cdef int result = sd_view_begin(doms.segment, slot, &view)
    return result == SD_DOUBT or result == SD_CORRUPT or (
        result == SD_OK and wanted_view(&view, what))


cdef int lock_free_slot(Segment doms, uint32_t *slot, sd_word **link, uint64_t deadline,
                        object timeout) except -1:
    cdef int result, passed = 0
    cdef uint64_t patience = SD_TRY
    link[0] = NULL
    while True:
        result = sd_free_slot(doms.segment, link, slot)
        if result == SD_FULL and passed and patience == SD_TRY:
            # All that is left is held by somebody: now there is nothing but to wait for one.
            link[0] = NULL
            patience = deadline
            continue
        if result != SD_OK:
            return raise_code(result, "define a domain")
        if acquire_slot(doms, slot[0], patience) == SD_OK:
            return 0
        if patience != SD_TRY or deadline == SD_TRY:
            raise_timed_out(doms, &doms.segment.slots[slot[0]].owner,
                            &doms.segment.slots[slot[0]].mutex, "a free slot", timeout)
        passed += 1
        if passed > 64:
            patience = deadline


cdef int between_parts(Segment doms) except -1:
    """Between two parts of a long look: other threads and signal handlers run."""
    if PyErr_CheckSignals():
        return -1
    HOLDERS.pause()
    return still_open(doms)


cdef bint check_records(Segment doms, sd_check *check) except -1:
    cdef int result
    while True:
        result = sd_check_records(check, sd_now() + LOOK_NS)
        if result != SD_TIMEOUT:
            return result == SD_OK
        between_parts(doms)


cdef object judge_part(Segment doms, sd_check *check, int part, uint64_t deadline, object timeout,
                       uint64_t *longest):
    """Look at a part's suspects under its lock: None, or why not at all of them."""
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
    """Come to a verdict on a sum: None, or why there is none."""
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
    """Take the lock of a part. False: there is nothing to give back: this thread has it, or the
    segment is poisoned, so that nobody gets it and what it protects stands still."""
    cdef int result
    if part == SD_PART_LIST and doms.segment.list_nonce == sd_self().nonce:
        need_list(doms, "check")
        return False
    try:
        if part == SD_PART_LIST:
            # While a domain is held the list lock may only be tried.
            acquire_list(doms, SD_TRY if holds_any(doms) else deadline, timeout)
            return True
        result = sd_short_locks(doms.segment, part == SD_PART_IDS, part == SD_PART_HEAP,
                                deadline)
        if result != SD_OK:
            raise_poison_or_code(doms, result, "check")
    except errors.SegmentPoisoned:
        return False
    return True


cdef int drop_part(Segment doms, int part) except -1:
    if part == SD_PART_LIST:
        return release_list(doms)
    if part == SD_PART_IDS:
        sd_ids_unlock(doms.segment)
    else:
        sd_heap_unlock(doms.segment)
    return 0


cdef int recover_list(Segment doms, uint64_t deadline, object timeout, list repairs,
                      list held) except -1:
    cdef sd_repair repair
    if holds_any(doms):
        raise errors.LockOrder(
            "this thread holds a domain; the list lock comes first: unlock the domain")
    memset(&sd_self().repair, 0, sizeof(repair))
    try:
        acquire_list(doms, deadline, timeout)
    except errors.LockTimeout as exc:
        held.append(("list", None, exc.holder))
        return 0
    repair = sd_self().repair
    release_list(doms)
    note_repair(repairs, "list", None, &repair)
    return 0


cdef int recover_short(Segment doms, object which, pthread_mutex_t *mutex, uint64_t deadline,
                       object timeout, list repairs, list held) except -1:
    cdef sd_repair repair
    cdef bint ids = mutex == &doms.segment.header.id_mutex
    cdef uint32_t victim = sd_mutex_victim(mutex)
    cdef int result
    memset(&sd_self().repair, 0, sizeof(repair))
    doms.segment.inside += 1
    result = sd_short_locks(doms.segment, ids, not ids, deadline)
    repair = sd_self().repair
    if result == SD_OK:
        drop_part(doms, SD_PART_IDS if ids else SD_PART_HEAP)
    end_wait(doms)
    if result == SD_TIMEOUT:
        held.append((which, None, timeout_error(doms, NULL, mutex, which, timeout).holder))
        return 0
    if result != SD_OK:
        return raise_poison_or_code(doms, result, "recover")
    repair.who = victim
    note_repair(repairs, which, None, &repair)
    return still_open(doms)


cdef uint64_t recover_slots(Segment doms, list repairs, list held) except? 1:
    """Each slot that is locked, was left locked, or has garbage that was put off."""
    cdef uint32_t slot
    cdef uint64_t freed = 0
    cdef sd_slot *at
    cdef sd_repair repair
    cdef bint busy
    for slot in range(slot_count(doms)):
        if slot % 4096 == 4095:
            between_parts(doms)
        at = &doms.segment.slots[slot]
        busy = sd_load(&at.owner.who) != 0 if doms.multiprocessing else sd_mutex_busy(&at.mutex)
        if not busy and not sd_load(&at.dirty) or held_pointer(doms, slot, 0) != NULL:
            continue
        name = read_name(doms, slot)
        memset(&sd_self().repair, 0, sizeof(repair))
        if acquire_slot(doms, slot, SD_TRY) == SD_TIMEOUT:
            error = timeout_error(doms, &at.owner, &at.mutex, name, 0)
            if error.holder is not None:
                held.append(("domain", name, error.holder))
            continue
        if sd_load(&at.dirty):
            sd_tidy(doms.segment, slot)
        repair = sd_self().repair
        release_slot(doms, slot, False)
        freed += repair.freed
        note_repair(repairs, "domain", name, &repair)
    return freed


cdef object read_name(Segment doms, uint32_t slot):
    """The name of the domain in a slot; None: none lives there."""
    cdef sd_view view
    cdef int result
    while True:
        result = sd_view_begin(doms.segment, slot, &view)
        if result != SD_DOUBT:
            return name_object(view.name) if result == SD_OK else None


cdef int note_repair(list repairs, object lock, object name, const sd_repair *repair) except -1:
    cdef uint64_t who = repair.who
    if repair.died:
        repairs.append((lock, name, HOLDERS.dead_holder(who & 0x3fffff, repair.pid, who >> 22)))
    elif repair.repaired:
        repairs.append((lock, name, None))
    return 0


# What a check finds is kept outside of Python while it holds locks: making an object may run the
# collector, and that may run anything.
cdef struct fault:
    char invariant[32]
    char what[200]
    fault *next

cdef struct faults:
    fault *first
    unsigned count

cdef enum:
    FAULTS_MAX = 1000
    LOOK_NS = 5000000  # of a look without a lock, before other threads of this process run
    LOOKS = 3          # without a lock, before one under it
    WALKS = 20         # over the descriptors, of which each acquits two of three that moved


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


cdef void drop_list(Segment doms, object what) noexcept:
    """A list, or the hold of its lock, is going away while this thread holds that."""
    release_list(doms)
    if doms.closed:
        sd_detach(doms.segment)
    if warnings is not None:
        warnings.warn(f"{what} was dropped while this thread held its lock, which is freed: "
                      "use 'with doms.locked()'", ResourceWarning, stacklevel=1)


cdef void free_orphans(sd_thread *thread) noexcept:
    """Locks of this thread whose handles another thread dropped."""
    cdef sd_orphan *orphan
    while thread.orphans != NULL:
        orphan = thread.orphans
        thread.orphans = orphan.next
        sd_slot_unlock(orphan.segment, orphan.slot, False)
        sd_detach(orphan.segment)
        free(orphan)


cdef int back_off(uint64_t deadline) except -1:
    cdef int raised
    if sd_now() >= deadline:
        raise errors.Busy("writers kept overtaking this read; try again, or lock the domain")
    raised = PyErr_CheckSignals()
    if raised:
        return -1
    HOLDERS.pause()
    return 0


cdef bint view_matches(const sd_view *view, const sd_key *key) noexcept:
    if key.what == SD_UUID_INDEX:
        return view.uuid[0] == key.uuid[0] and view.uuid[1] == key.uuid[1]
    if key.what == SD_NAME_INDEX:
        return view.name[0] == key.name[0] and not memcmp(view.name + 1, key.name + 1, key.name[0])
    return view.values.id == key.id


cdef Info fill(Info info, const sd_view *view):
    info.uuid_raw[0], info.uuid_raw[1] = view.uuid[0], view.uuid[1]
    info.number, info.process = view.values.id, view.values.pid
    info.state_number, info.reason_number = view.values.state, view.values.reason
    info.marks = marks_of(view.values.flags)
    info.name_text = name_object(view.name)
    return info


# What a list is asked for; -1 does not ask.
cdef struct asked:
    int active, persistent, autostart
    unsigned states  # a bit each


cdef bint wanted(int32_t id, uint8_t marks, uint16_t state, const asked *what) noexcept:
    """libvirt's virDomainObjMatchFilter."""
    if what.active >= 0 and (id != -1) != what.active:
        return False
    if what.persistent >= 0 and (marks & MARK_PERSISTENT != 0) != what.persistent:
        return False
    if what.autostart >= 0 and (marks & MARK_AUTOSTART != 0) != what.autostart:
        return False
    # In C only: a Python number that finds no memory would make this say no.
    if what.states == <unsigned>0xffffffff:
        return True
    return state < 32 and (what.states >> state & <unsigned>1) != 0


cdef bint wanted_view(const sd_view *view, const asked *what) noexcept:
    return wanted(view.values.id, marks_of(view.values.flags), view.values.state, what)


cdef int set_change(sd_blob *blob, bytes value) except -1:
    if len(value) > SD_BLOB_MAX:
        raise errors.SegmentFull(f"a blob of {len(value)} bytes; the limit is 16 MiB")
    blob.change = True
    blob.bytes = PyBytes_AS_STRING(value)
    blob.size = len(value)
    return 0


@cython.final
@cython.no_gc_clear
cdef class ListHold:
    """The list lock for a ``with`` block. No signal handler runs between the end of the wait and
    the first line of the block, nor in `__exit__`, so Ctrl-C can not leave the list locked.

    But for CPython 3.14, which may raise between `__enter__` and the block (gh-148874): then this
    object is dropped without `__exit__`, and unlocks.
    """
    cdef Segment doms
    cdef object timeout
    cdef uint64_t nonce  # of the thread that is in the block, or 0

    def __init__(self, Segment doms not None, timeout):
        self.doms, self.timeout = doms, timeout

    def __enter__(self):
        self.doms.lock(self.timeout)
        self.nonce = sd_self().nonce
        return self.doms

    def __exit__(self, kind, value, traceback):
        self.nonce = 0
        if self.doms.is_locked:
            self.doms.unlock()

    def __dealloc__(self):
        if self.nonce and self.nonce == sd_self().nonce and self.doms.is_locked:
            drop_list(self.doms, "what locked() of a DomainList gave")


@cython.no_gc_clear
cdef class Record:
    """A handle to one domain's record. `Domain` adds what a domain may do.

    A handle is locked by one thread at a time. Any handle to the same domain may be used by that
    thread meanwhile: they lead to the one that was locked.
    """
    cdef Segment segment
    cdef uint32_t slot
    cdef uint64_t life
    cdef uint64_t uuid_raw[2]
    cdef uint64_t nonce      # of the thread that holds it through this handle, or 0
    cdef sd_thread *thread
    cdef unsigned nested     # how deep in signal handlers it was locked
    cdef unsigned depth      # of `with` blocks
    cdef bint leads          # to a slot; not yet while that is being locked
    cdef void *before
    cdef void *after         # neighbours among that thread's locked handles
    cdef sd_values values    # as changed by the holder
    cdef bint touched        # `values` differ from what is committed
    cdef unsigned pending    # blobs to commit, one bit each
    cdef list objects        # what they decode to
    cdef list blobs          # what they are in the heap; None clears
    cdef object __weakref__

    def __cinit__(self, *args, **kwargs):
        self.segment = NOWHERE

    def __init__(self, *args, **kwargs):
        raise TypeError("Domains come from a DomainList: get(), find_by_name(), assign_def(), ...")

    def __dealloc__(self):
        if held_somewhere(self):
            abandon(self)
        if self.leads:
            self.segment.segment.handles -= 1
            if self.segment.closed:
                sd_detach(self.segment.segment)

    # --- who holds it ---

    @property
    def is_locked(self):
        """Whether this thread holds the domain. Needs no lock."""
        return locked_or_none(self) is not None

    @property
    def changed(self):
        """Whether there are changes that were not committed. Domain lock."""
        cdef Record mine = need_locked(self)
        return bool(mine.touched or mine.pending)

    def lock(self, timeout=None):
        """Lock the domain (virDomainLock).

        `timeout` in seconds: None waits for ever, 0 tries. Raises `LockTimeout` (it names the
        holder), `DomainRemoved`, `AlreadyLocked`, `LockOrder` (this thread holds another domain of
        the list, not the list lock, and would wait), `TooManyLocks`.
        """
        lock_record(self, deadline_of(timeout), timeout)

    def try_lock(self):
        """Lock the domain if it is free: True, else False. Always allowed, whatever is held."""
        try:
            lock_record(self, SD_TRY, 0)
        except errors.LockTimeout:
            return False
        return True

    def unlock(self, timeout=None):
        """Commit what was changed and release the lock (virDomainUnlock).

        When the commit fails (`SegmentFull`, `LockTimeout` of the core's own locks after `timeout`
        seconds, Ctrl-C) everything is rolled back, the domain is unlocked all the same, and the
        error is raised. Raises `DomainNotLocked`, or `NotOwner` in another thread.
        """
        unlock_record(self, timeout)

    def _pass_on(self):
        """Unlock, if this thread holds it, by who was not given the domain: the next one still
        learns of the death of an earlier holder. What was not committed is rolled back.

        For the ``finally`` of a rule: in one call, so that no signal handler runs in between."""
        cdef Record mine = locked_or_none(self)
        if mine is None:
            return
        mine = need_changeable(mine)
        drop_changes(mine)
        end_hold(mine, False)

    def acquire(self, block=True, timeout=None):
        """`lock` in the manner of `multiprocessing.Lock`: True, or False when it was not free."""
        timeout = 0 if not block or (timeout is not None and timeout < 0) else timeout
        try:
            lock_record(self, deadline_of(timeout), timeout)
        except errors.LockTimeout:
            return False
        return True

    def release(self):
        """`unlock` in the manner of `multiprocessing.Lock`."""
        self.unlock()

    def commit(self, timeout=None):
        """Commit what was changed so far and keep the lock: a point of no return. Domain lock.

        On failure everything since the last commit is rolled back and the error raised.
        """
        commit_changes(need_changeable(self), deadline_of(timeout))

    def rollback(self):
        """Forget all changes since the last commit. Domain lock."""
        cdef Record mine = need_changeable(self)
        drop_changes(mine)
        reload_values(mine)

    def __enter__(self):
        cdef Record mine = locked_or_none(self)
        if mine is None:
            lock_record(self, SD_FOREVER, None)
            mine = self
        mine = need_changeable(mine)
        mine.depth += 1
        return self

    def __exit__(self, kind, value, traceback):
        cdef Record mine = locked_or_none(self)
        if mine is None:
            return
        if kind is not None:
            mine = need_changeable(mine)
            drop_changes(mine)
            reload_values(mine)
        if mine.depth > 1:
            mine.depth -= 1  # an inner block; the outer one goes on
            return
        unlock_record(mine, None)

    # --- fields ---

    @property
    def uuid(self):
        """The domain's UUID. Needs no lock: it never changes."""
        return uuid_object(self.uuid_raw)

    @property
    def id(self):
        """The id of the running domain, -1 when it is inactive. Domain lock."""
        return need_locked(self).values.id

    @property
    def is_active(self):
        """Whether it runs: ``id != -1`` (virDomainIsActive). Domain lock."""
        return need_locked(self).values.id != -1

    @property
    def name(self):
        """The name. Domain lock; changed by `DomainList.rename`."""
        cdef unsigned char raw[252]
        cdef Record mine = need_locked(self)
        sd_name_get(self.segment.segment, self.slot, mine.values.flags, raw)
        if not raw[0]:
            raise_code(SD_CORRUPT, "name")
        return name_object(raw)

    @property
    def state(self):
        """The `DomainState`. Domain lock. Assigning sets the reason to 0, unknown."""
        return state_of(need_locked(self).values.state)

    @state.setter
    def state(self, value):
        cdef Record mine = need_changeable(self)
        cdef long number = PyNumber_Index(value)
        if number < 0 or number >= len(STATES):
            raise ValueError(f"{value!r} is no DomainState")
        mine.values.state = <uint16_t>number
        mine.values.reason = 0
        mine.touched = True

    @property
    def reason(self):
        """Why it is in this state: a member of the state's reason enumeration. Domain lock."""
        cdef Record mine = need_locked(self)
        return reason_of(mine.values.state, mine.values.reason)

    @reason.setter
    def reason(self, value):
        cdef Record mine = need_changeable(self)
        cdef long number = PyNumber_Index(value)
        if number < 0 or number > 0xffff:
            raise ValueError(f"a reason is a number from 0 to 65535, not {value!r}")
        mine.values.reason = <uint16_t>number
        mine.touched = True

    @property
    def persistent(self):
        """Whether the domain outlives its deactivation. Domain lock."""
        return need_locked(self).values.flags & SD_FLAG_PERSISTENT != 0

    @persistent.setter
    def persistent(self, bint value):
        set_flag(need_changeable(self), SD_FLAG_PERSISTENT, value)

    @property
    def autostart(self):
        """Whether the domain is to be started with the host. Domain lock. Assigning changes the
        record only; `DomainList.set_autostart` makes the link on disk too."""
        return need_locked(self).values.flags & SD_FLAG_AUTOSTART != 0

    @autostart.setter
    def autostart(self, bint value):
        set_flag(need_changeable(self), SD_FLAG_AUTOSTART, value)

    @property
    def pid(self):
        """Process id of the hypervisor, or None. Domain lock."""
        cdef int32_t pid = need_locked(self).values.pid
        return None if pid == -1 else pid

    @pid.setter
    def pid(self, value):
        cdef Record mine = need_changeable(self)
        cdef long number = -1 if value is None else PyNumber_Index(value)
        if value is not None and not 0 < number <= 0x7fffffff:
            raise ValueError(f"{value!r} is no process id")
        mine.values.pid = <int32_t>number
        mine.touched = True

    @property
    def definition(self):
        """The live definition (`DomainDef`). Domain lock.

        The same object each time while it does not change. Assigning replaces it with the next
        commit; its uuid and name must be the record's.
        """
        cdef Record mine = need_locked(self)
        if mine.pending & 1:
            return mine.objects[SD_DEFINITION]
        return read_definition(self.segment, self.slot, self.life, &mine.values)

    @definition.setter
    def definition(self, value):
        cdef Record mine = need_changeable(self)
        sd_ask_to_replace(self.segment.segment, self.slot)
        set_blob(mine, SD_DEFINITION, value, self._encode_definition(value))

    @property
    def next_definition(self):
        """What becomes the definition once the domain is inactive (libvirt's newDef), or None.
        Domain lock."""
        return read_blob(need_locked(self), SD_NEXT_DEFINITION)

    @next_definition.setter
    def next_definition(self, value):
        cdef Record mine = need_changeable(self)
        if value is None:
            set_blob(mine, SD_NEXT_DEFINITION, None, None)
        else:
            set_blob(mine, SD_NEXT_DEFINITION, value, self._encode_definition(value))

    @property
    def data(self):
        """The driver's own data: any MessagePack value, or None. Domain lock.

        What is read is read-only (mappings are proxies, sequences tuples); assign to change it.
        Raises `TypeError` or `ValueError` for what MessagePack can not carry, and leaves it as it
        was.
        """
        return read_blob(need_locked(self), SD_DATA)

    @data.setter
    def data(self, value):
        cdef Record mine = need_changeable(self)
        if value is None:
            set_blob(mine, SD_DATA, None, None)
            return
        encoded = self._encode_data(value)
        set_blob(mine, SD_DATA, DECODE[SD_DATA](encoded), encoded)

    @property
    def previous_owner_died(self):
        """The `LockHolder` that died holding this domain since it was last handed back in order, or
        None. What it had not committed was rolled back. Domain lock."""
        cdef sd_slot *at
        cdef uint64_t who
        need_locked(self)
        at = &self.segment.segment.slots[self.slot]
        who = sd_load(&at.died_who)
        if not who:
            return None
        return HOLDERS.dead_holder(who & 0x3fffff if who != 1 else 0,
                                   <uint32_t>sd_load(&at.sum_and_pid), who >> 22)

    # --- for the rules ---

    def _is(self, uuid, name):
        """Whether these are the domain's uuid and name. Domain lock."""
        cdef uint64_t words[2]
        cdef unsigned char mine[252]
        cdef unsigned char other[252]
        sd_name_get(self.segment.segment, self.slot, need_locked(self).values.flags, mine)
        if not mine[0]:
            raise_code(SD_CORRUPT, "name")
        if uuid is None or not set_name(other, name):
            return False
        uuid_words(uuid, words)
        return (words[0] == self.uuid_raw[0] and words[1] == self.uuid_raw[1]
                and memcmp(mine, other, mine[0] + 1) == 0)

    def _take_id(self, timeout=None):
        """The next id, entered into this transaction; never given out again."""
        cdef Record mine = need_changeable(self)
        cdef int32_t id
        cdef int result = sd_take_id(self.segment.segment, &id, deadline_of(timeout))
        if result == SD_FULL:
            raise errors.SegmentFull(
                "every id up to 2147483647 was given out; create a new segment")
        if result != SD_OK:
            raise_poison_or_code(self.segment, result, "next id")
        mine.values.id = id
        mine.touched = True
        return id

    @property
    def _stamp(self):
        """Life and commits of the record: other than before if the holder's commit, or its remove,
        came about. Needs no lock."""
        cdef sd_slot *at
        if not self.leads:
            return 0, 0
        at = &self.segment.segment.slots[self.slot]
        return sd_load(&at.life), sd_load(&at.cur)

    def _drop_id(self):
        cdef Record mine = need_changeable(self)
        mine.values.id = -1
        mine.touched = True

    @property
    def _segment(self):
        return self.segment

    @property
    def _key(self):
        """(slot, life, uuid bytes): what a handle is in any process."""
        return self.slot, self.life, PyBytes_FromStringAndSize(<char *>self.uuid_raw, 16)

    def __eq__(self, other):
        if not isinstance(other, Record):
            return NotImplemented
        return (self.slot == (<Record>other).slot and self.life == (<Record>other).life
                and self.segment.segment == (<Record>other).segment.segment)

    def __hash__(self):
        return hash((self.slot, self.life))

    def __repr__(self):
        cdef Record mine = locked_or_none(self)
        kind = type(self).__name__
        if mine is None:
            return f"<{kind} {uuid_object(self.uuid_raw)}>"
        return f"<{kind} {self.name!r} {uuid_object(self.uuid_raw)} locked>"


cdef void lead_to(Record record, uint32_t slot) noexcept:
    cdef sd_slot *at = &record.segment.segment.slots[slot]
    record.leads = True
    record.segment.segment.handles += 1
    record.slot = slot
    record.life = sd_load(&at.life)
    record.uuid_raw[0] = sd_load(&at.uuid[0])
    record.uuid_raw[1] = sd_load(&at.uuid[1])


cdef bint held_somewhere(Record record):
    """By a thread of this process that still runs. After a fork the nodes of the parent's
    threads are still there, with the epoch of before."""
    return (record.nonce != 0 and record.thread.epoch == sd_fork_epoch
            and record.thread.nonce == record.nonce)


cdef Record locked_or_none(Record record):
    cdef sd_thread *thread = sd_self()
    if record.nonce == thread.nonce:
        return record
    if thread.records == NULL:
        return None
    return held_here(record.segment, record.slot, record.life)


cdef Record need_locked(Record record):
    cdef Record mine = locked_or_none(record)
    if mine is None:
        raise errors.DomainNotLocked(
            f"domain {uuid_object(record.uuid_raw)} is not locked by this thread: with dom: ...")
    return mine


cdef Record need_changeable(Record record):
    """A signal handler may not change what the code that it interrupted is committing."""
    cdef Record mine = need_locked(record)
    if sd_self().nested > mine.nested:
        raise_code(SD_NESTED, "change a domain")
    return mine


cdef int begin_hold(Record record) except -1:
    if sd_values_get(record.segment.segment, record.slot, &record.values) != SD_OK:
        release_slot(record.segment, record.slot, False)
        raise_code(SD_CORRUPT, "lock a domain")
    enter_thread(record)
    return 0


cdef void enter_thread(Record record) noexcept:
    cdef sd_thread *thread = sd_self()
    record.nonce = thread.nonce
    record.thread = thread
    record.nested = thread.nested
    record.before = NULL
    record.after = thread.records
    if thread.records != NULL:
        (<Record>thread.records).before = <void *>record
    thread.records = <void *>record
    record.pending = 0
    record.touched = False
    record.depth = 0


cdef void leave_thread(Record record) noexcept:
    if record.before != NULL:
        (<Record>record.before).after = record.after
    else:
        record.thread.records = record.after
    if record.after != NULL:
        (<Record>record.after).before = record.before
    record.nonce = 0


cdef int end_hold(Record record, bint given) except -1:
    if record.nonce != sd_self().nonce:
        return 0  # a signal handler forked in a wait: it is our parent's
    leave_thread(record)
    return release_slot(record.segment, record.slot, given)


cdef void reload_values(Record record) noexcept:
    sd_values_get(record.segment.segment, record.slot, &record.values)
    record.touched = False


cdef void drop_changes(Record record) noexcept:
    if record.pending:
        record.pending = 0
        _objects, _blobs = record.objects, record.blobs  # may run anything as they go: last
        record.objects = record.blobs = None


cdef int commit_changes(Record record, uint64_t deadline) except -1:
    cdef sd_blob changes[3]
    cdef int b, result
    if not record.touched and not record.pending:
        return 0
    memset(changes, 0, sizeof(changes))
    for b in range(3):
        if record.pending >> b & 1:
            changes[b].change = True
            if record.blobs[b] is not None:
                set_change(&changes[b], record.blobs[b])
    result = sd_commit(record.segment.segment, record.slot, &record.values, changes, NULL, deadline)
    if result != SD_OK:
        _objects, _blobs = record.objects, record.blobs  # may run anything as they go: later
        drop_changes(record)
        reload_values(record)
        return raise_poison_or_code(record.segment, result,
                                    f"commit domain {uuid_object(record.uuid_raw)}; rolled back")
    reload_values(record)
    if record.pending & 1 and record.objects[SD_DEFINITION] is not None:
        cache(record.segment.decoded, record.slot, record.life,
              record.values.version[SD_DEFINITION], record.objects[SD_DEFINITION])
    drop_changes(record)
    return 0


cdef int lock_record(Record record, uint64_t deadline, object timeout) except -1:
    cdef sd_slot *at
    cdef void *held
    need_open(record.segment)
    at = &record.segment.segment.slots[record.slot]
    held = held_pointer(record.segment, record.slot, 0)
    if held != NULL:
        # The slot's mutex is ours: it may not be asked again, whichever domain lives there now.
        if (<Record>held).life == record.life:
            need_not_held(record.segment, record.slot)
        raise_outlived(record)
    if sd_load(&at.life) != record.life:
        raise_outlived(record)  # a life that ended does not come back: no need to wait for the slot
    may_wait(record.segment, deadline)
    if acquire_slot(record.segment, record.slot, deadline) == SD_TIMEOUT:
        raise_timed_out(record.segment, &at.owner, &at.mutex, describe(record.segment, record.slot),
                        timeout)
    if sd_load(&at.life) != record.life:
        release_slot(record.segment, record.slot, False)
        raise_outlived(record)
    begin_hold(record)
    return 0


cdef int raise_outlived(Record record) except -1:
    need_sound_life(record.segment, record.slot)
    raise errors.DomainRemoved(
        f"domain {uuid_object(record.uuid_raw)} was removed; this handle outlived it")


cdef int unlock_record(Record record, object timeout) except -1:
    cdef Record mine = locked_or_none(record)
    cdef uint64_t deadline = deadline_of(timeout)
    if mine is None:
        raise_not_locked(record)
    if sd_self().nested > mine.nested:
        raise_code(SD_NESTED, "unlock a domain")
    if mine.touched or mine.pending:
        try:
            commit_changes(mine, deadline)
        finally:
            end_hold(mine, True)
        return 0
    return end_hold(mine, True)


cdef int raise_not_locked(Record record) except -1:
    if held_somewhere(record):
        raise errors.NotOwner(
            f"another thread of this process holds domain {uuid_object(record.uuid_raw)}")
    raise errors.DomainNotLocked(
        f"domain {uuid_object(record.uuid_raw)} is not locked by this thread")


cdef int set_flag(Record record, uint64_t flag, bint value) except -1:
    if value:
        record.values.flags |= flag
    else:
        record.values.flags &= ~flag
    record.touched = True
    return 0


cdef int set_blob(Record record, int which, object value, bytes encoded) except -1:
    if encoded is not None and not 0 < len(encoded) <= SD_BLOB_MAX:
        raise errors.SegmentFull(f"a value of {len(encoded)} bytes; the limit is 16 MiB")
    if not record.pending:
        record.objects = [None, None, None]
        record.blobs = [None, None, None]
    record.objects[which] = value
    record.blobs[which] = encoded
    record.pending |= 1 << which
    return 0


cdef object read_blob(Record record, int which):
    cdef uint64_t extent
    if record.pending >> which & 1:
        return record.objects[which]
    if not record.values.flags & SD_FLAG_PRESENT(which):
        return None
    if sd_blob_get(record.segment.segment, record.slot, &record.values, which, &extent) != SD_OK:
        raise_code(SD_CORRUPT, "read")
    return decode(which, copy_extent(record.segment.segment, extent), record.uuid_raw,
                  record.values.version[which])


cdef bint vacate(Record record) noexcept:
    """Make a handle that is going away lead nowhere, if that is all there is to do."""
    # Changes of a hold that ended with its thread, or was the parent's, may be there still.
    if record.nonce or record.objects is not None or record.segment.closed:
        return False
    if record.leads:
        record.leads = False
        record.segment.segment.handles -= 1
    # Its next life is seen, through the collector, before it leads to anything.
    record.slot = 0
    record.life = 0
    record.segment = NOWHERE
    return True


cdef class Records(list):
    """Records for a ``with`` block, which commits and unlocks each, or rolls each back. As in
    `ListHold`, no signal handler runs before the first line of the block, nor in `__exit__` but in
    the waits of a commit, which then fails alone."""

    def __enter__(self):
        for record in self:
            record.__enter__()
        return self

    def __exit__(self, kind, value, traceback):
        cdef Py_ssize_t at = len(self)
        failure = None
        while at:  # which allocates nothing: without memory, too, they are unlocked
            at -= 1
            try:
                self[at].__exit__(kind, value, traceback)
            except BaseException as exc:
                failure = failure or exc
        if failure is not None:
            raise failure


cdef void abandon(Record record) noexcept:
    """A locked handle is going away: say so, roll back, and let its own thread free the lock."""
    cdef sd_orphan *orphan
    cdef sd_thread *self = sd_self()
    cdef uint32_t slot = record.slot
    cdef bint here = record.nonce == self.nonce
    leave_thread(record)
    if record.segment.multiprocessing:
        record.thread.held -= 1
        self.held += 1
        sd_slot_leaving(record.segment.segment, slot, False)
        record.segment.slot_locks[slot].release()
    elif here:
        sd_slot_unlock(record.segment.segment, slot, False)
    else:
        orphan = <sd_orphan *>malloc(sizeof(sd_orphan))
        if orphan != NULL:
            orphan.segment = record.segment.segment
            orphan.slot = slot
            orphan.next = record.thread.orphans
            record.thread.orphans = orphan
    if warnings is not None:  # the interpreter may be going down
        warnings.warn("a Domain that was still locked was dropped; its changes are rolled back "
                      "and the lock is freed: use 'with'", ResourceWarning, stacklevel=1)


# Where a handle leads that no list made.
cdef Segment NOWHERE = Segment()


# --- creating a segment --------------------------------------------------------------------------

MAX_DOMAINS = SD_SLOTS_MAX


def format_segment(int fd, kind, uint64_t max_domains, max_bytes):
    """Make the empty file behind `fd` a segment. `max_bytes` None: about 16 KiB a domain."""
    cdef uint64_t fixed = sd_geometry_fixed(max_domains)
    cdef uint64_t cells
    if not fixed:
        raise ValueError(f"max_domains is 1 to {SD_SLOTS_MAX}, not {max_domains}")
    if max_bytes is None:
        cells = max(max_domains * 256, 1 << 20)
    elif max_bytes < fixed + (1 << 20):
        raise ValueError(f"max_bytes for {max_domains} domains is at least {fixed + (1 << 20)}")
    else:
        cells = <uint64_t>((max_bytes - fixed - 8192) * 8 // (SD_CELL * 8 + 1))
    cdef uint64_t number = (SD_KIND_MULTIPROCESSING if kind == "multiprocessing"
                            else SD_KIND_ROBUST)
    cdef int result = sd_format(fd, number, max_domains, cells)
    if result != SD_OK:
        raise_code(result, "create the segment")


def process_start(uint32_t pid):
    """Start of a process in clock ticks since boot; 0: there is none, or nobody can say."""
    cdef uint64_t start = sd_process_start(pid)
    return 0 if start == SD_START_UNKNOWN else start


def process_runs(uint32_t pid, uint64_t start):
    """Whether the process that started then still runs; a start of 0 is not known."""
    return sd_process_runs(pid, start)


def process_of(uint32_t tid):
    """The process that a thread belongs to; 0: there is none."""
    return sd_process_of(tid)
