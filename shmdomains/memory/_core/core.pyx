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
        uint64_t device, inode
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
        SD_FULL, SD_NO_MEMORY, SD_CORRUPT, SD_POISONED, SD_MISMATCH, SD_ERRNO, SD_DESCRIPTOR
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
    int sd_descriptor(const sd_segment *)
    uint64_t sd_committed_bytes(const sd_segment *)
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
cdef object ENCODE_DEFINITION = None
cdef object ENCODE_DATA = None
cdef object NOT_FOUND = None
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


def configure(*, states, reasons, decode, encode_definition, encode_data, not_found, parse_uuid,
              uuid_class, holders):
    """Hand the core what it needs of Python: the types that it makes, how values become bytes and
    back, words for errors. Called once.

    `encode_definition(record, definition)` checks that the definition is of this record.
    """
    global STATES, REASONS, DECODE, ENCODE_DEFINITION, ENCODE_DATA, NOT_FOUND
    global PARSE_UUID, UUID, SAFE_UNKNOWN, HOLDERS
    STATES, REASONS, DECODE = tuple(states), tuple(reasons), tuple(decode)
    ENCODE_DEFINITION, ENCODE_DATA, NOT_FOUND = encode_definition, encode_data, not_found
    PARSE_UUID, UUID, HOLDERS = parse_uuid, uuid_class, holders
    SAFE_UNKNOWN = uuid_class(int=0).is_safe


# --- waiting -------------------------------------------------------------------------------------

# An exception raised by a signal handler inside a wait travels past C code that knows nothing of
# Python; it is kept here until `fail` raises it. The GIL is held from one to the other.
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


cdef int fail(int result, object what) except -1:
    """Raise what a code of the core means, but for time-outs, which name the holder, and poison,
    which says why (`Segment.fail`)."""
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
    if result == SD_DESCRIPTOR:
        raise errors.DescriptorLost(
            f"{what}: no memory for the segment: this process closed its descriptor, and before "
            "Linux 5.14 memory is not committed without it; have it kept (files_preserve=[doms] "
            "for python-daemon), or attach anew by name")
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

    cdef object get(self, uint32_t slot, uint64_t life, uint64_t version):
        cdef uint32_t at = slot & (CACHE_SIZE - 1)
        cdef const cache_key *key = &self.keys[at]
        if key.slot == slot and key.life == life and key.version == version:
            return self.values[at]
        return None

    cdef void put(self, uint32_t slot, uint64_t life, uint64_t version, object value) noexcept:
        cdef uint32_t at = slot & (CACHE_SIZE - 1)
        cdef object _old = self.values[at]  # dropped last: that may run anything
        self.values[at] = value
        self.keys[at] = cache_key(life, version, slot)


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

    cdef object live_definition(self):
        cdef uint64_t version = self.version[SD_DEFINITION]
        if self.known is None:
            self.known = self.decoded.get(self.slot, self.life, version)
        if self.known is None:
            self.known = decode(SD_DEFINITION, self.definition, self.uuid_raw, version)
            self.decoded.put(self.slot, self.life, version, self.known)
        return self.known

    cdef object decode_or_none(self, int which, bytes blob):
        if blob is None:
            return None
        return decode(which, blob, self.uuid_raw, self.version[which])


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
        return blobs_of(self).live_definition()

    @property
    def next_definition(self):
        """What becomes the definition once the domain is inactive (libvirt's newDef), or None."""
        cdef Blobs blobs = blobs_of(self)
        return blobs.decode_or_none(SD_NEXT_DEFINITION, blobs.next_definition)

    @property
    def data(self):
        """The driver's own data, or None."""
        cdef Blobs blobs = blobs_of(self)
        return blobs.decode_or_none(SD_DATA, blobs.data)

    def __repr__(self):
        if self.damage:
            return "<DomainInfo damaged>"
        return (f"<DomainInfo {self.name_text!r} uuid={self.uuid} id={self.number} "
                f"state={state_of(self.state_number).name}>")


cdef int need_sound(Info info, int allowed=0) except -1:
    if info.damage > allowed:
        fail(SD_CORRUPT, "a domain")
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
            fail(result, "attach")
        self.segment = segment
        self.multiprocessing = segment.kind == SD_KIND_MULTIPROCESSING
        self.list_lock, self.slot_locks = list_lock, slot_locks
        self.record_class = record_class
        keep_spares(record_class, <void *>vacate)
        self.closed = False

    @classmethod
    def __class_getitem__(cls, handle_type):
        """For annotations, which name the class of the handles."""
        return cls

    # --- state of this attachment ---

    cdef int usable(self) except -1:
        if self.closed:
            raise errors.ListClosed("this DomainList is closed")
        if self.segment.epoch != sd_fork_epoch and sd_begin_in_child(self.segment) != SD_OK:
            raise errors.SegmentMismatch(
                "this process lives in another PID namespace than its parent, where the thread "
                "numbers in the locks mean nothing")
        return 0

    cdef void leave(self) noexcept:
        """A wait is over; the list may have been closed meanwhile."""
        if self.segment.inside:  # 0: a handler forked, and this is the child
            self.segment.inside -= 1
        if self.closed:
            sd_detach(self.segment)

    cdef uint32_t slots(self) except? 0:
        """How many there are; an error when that is damaged, and never an empty list for it."""
        cdef uint32_t slots
        if sd_slots(self.segment, &slots) != SD_OK:
            raise errors.SegmentCorrupt("the number of slots is damaged")
        return slots

    cdef int still_open(self) except -1:
        if self.closed:
            raise errors.ListClosed("this DomainList was closed during the wait")
        return 0

    def _close(self):
        """Give up this attachment; the mapping stays while handles refer to it."""
        if self.closed:
            return
        cdef sd_thread *thread = sd_self()
        # A signal handler may close the list, but what it interrupted still needs the list lock.
        if (self.segment.list_nonce == thread.nonce
                and self.segment.list_taker == <void *>self
                and thread.nested <= self.segment.list_nested):
            self.release_list()
        self.closed = True
        self.segment.open -= 1
        sd_detach(self.segment)

    cdef object definition_of(self, uint32_t slot, uint64_t life, const sd_values *values):
        cdef uint64_t extent
        cdef uint64_t uuid[2]
        cdef uint64_t version = values.version[SD_DEFINITION]  # decoding may run a signal handler
        value = self.decoded.get(slot, life, version)
        if value is not None:
            return value
        if not values.flags & SD_FLAG_PRESENT(SD_DEFINITION):
            decode(SD_DEFINITION, None, NULL, 0)
        uuid[0], uuid[1] = sd_load(&self.segment.slots[slot].uuid[0]), sd_load(
            &self.segment.slots[slot].uuid[1])
        if sd_blob_get(self.segment, slot, values, SD_DEFINITION, &extent) != SD_OK:
            fail(SD_CORRUPT, "definition")
        value = decode(SD_DEFINITION, copy_extent(self.segment, extent), uuid, version)
        self.decoded.put(slot, life, version, value)
        return value

    # --- locks ---

    cdef int timed_out(self, sd_owner *owner, pthread_mutex_t *mutex, object what,
                       object timeout) except -1:
        raise self.too_late(owner, mutex, what, timeout)

    cdef object too_late(self, sd_owner *owner, pthread_mutex_t *mutex, object what,
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

    cdef object poison(self):
        """Why the segment is poisoned, or None."""
        cdef sd_header *header = self.segment.header
        cdef uint64_t who, at
        cdef uint64_t reason = sd_load_acquire(&header.poisoned)
        if not reason:
            return None
        who, at = sd_load(&header.poisoned_who), sd_load(&header.poisoned_at)
        return HOLDERS.failed_repair(
            REPAIRS.get(reason), at - 1 if at else None, who & 0x3fffff,
            sd_load(&header.poisoned_pid), who >> 22, sd_load(&header.poisoned_when) / 1e9)

    cdef int fail(self, int result, object what) except -1:
        if result != SD_POISONED:
            return fail(result, what)
        raise errors.SegmentPoisoned(
            f"{what}: {self.poison()}; its domains can still be read (list, dumpxml): export "
            "them, unlink the segment and create a new one")

    cdef int take_mp(self, object lock, sd_owner *owner, uint64_t deadline,
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

    cdef int acquire_list(self, uint64_t deadline, object timeout) except -1:
        cdef int result
        cdef bint died
        cdef uint64_t who, pid
        cdef sd_segment *segment = self.segment
        segment.inside += 1
        try:
            if not self.multiprocessing:
                result = sd_list_lock(segment, deadline)
            else:
                result = self.take_mp(self.list_lock, &segment.header.list_owner, deadline,
                                      &who, &pid)
                if result == SD_OK or result == SD_DIED:
                    died = result == SD_DIED
                    result = sd_list_entered(segment, died)
                    if died:
                        sd_self().repair.who, sd_self().repair.pid = who, pid
                    if result != SD_OK:
                        sd_store(&segment.header.list_owner.who, 0)
                        self.list_lock.release()
            if result == SD_OK:
                segment.list_taker = <void *>self
                if self.closed:
                    self.release_list()
        finally:
            self.leave()
        if result == SD_OK:
            return self.still_open()
        if result == SD_TIMEOUT:
            self.timed_out(&segment.header.list_owner, &segment.header.list_mutex,
                           "the list lock", timeout)
        return self.fail(result, "lock the list")

    cdef int release_list(self) except -1:
        if not self.multiprocessing:
            sd_list_unlock(self.segment)
            return 0
        if self.list_lock is None:
            raise errors.LockKindMismatch("unlock through the DomainList that locked")
        sd_list_leaving(self.segment)
        self.list_lock.release()
        return 0

    cdef int acquire_slot(self, uint32_t slot, uint64_t deadline) except -1:
        """SD_OK or SD_TIMEOUT."""
        cdef int result
        cdef uint64_t who, pid
        cdef sd_slot *record = &self.segment.slots[slot]
        self.segment.inside += 1
        try:
            if not self.multiprocessing:
                result = sd_slot_lock(self.segment, slot, deadline)
            else:
                result = self.take_mp(None if self.slot_locks is None else self.slot_locks[slot],
                                      &record.owner, deadline, &who, &pid)
                if result == SD_DIED:
                    sd_self().repair.died = True
                    sd_self().repair.who, sd_self().repair.pid = who, pid
                    sd_recover_slot(self.segment, slot, who, pid)
                    result = SD_OK
                if result == SD_OK:
                    result = sd_slot_entered(self.segment, slot)
                    if result != SD_OK:
                        sd_store(&record.owner.who, 0)
                        self.slot_locks[slot].release()
            if result == SD_OK and self.closed:
                self.release_slot(slot, False)
        finally:
            self.leave()
        if result == SD_OK or result == SD_TIMEOUT:
            self.still_open()
            return result
        return self.fail(result, "lock a domain")

    cdef int release_slot(self, uint32_t slot, bint given) except -1:
        if not self.multiprocessing:
            sd_slot_unlock(self.segment, slot, given)
            return 0
        sd_slot_leaving(self.segment, slot, given)
        self.slot_locks[slot].release()
        return 0

    cdef void *hold_here(self, uint32_t slot, uint64_t life):
        """This thread's locked handle to the slot, or NULL. `life` 0: whichever life."""
        cdef void *at = sd_self().records
        while at != NULL:
            if ((<Record>at).slot == slot and (<Record>at).segment.segment == self.segment
                    and (life == 0 or (<Record>at).life == life)):
                return at
            at = (<Record>at).after
        return NULL

    cdef Record held_here(self, uint32_t slot, uint64_t life):
        """That handle, or None. One that is going away still holds the slot, but must not get a
        reference again: callbacks of weak references run then, and so may this thread, while
        another one drops its handle."""
        cdef void *at = self.hold_here(slot, life)
        if at == NULL or Py_REFCNT(at) == 0:
            return None
        return <Record>at

    cdef int not_held_here(self, uint32_t slot) except -1:
        if sd_self().records != NULL and self.hold_here(slot, 0) != NULL:
            raise errors.AlreadyLocked(f"this thread holds {self.describe(slot)} already")
        return 0

    cdef bint holds_any(self):
        cdef void *at = sd_self().records
        while at != NULL:
            if (<Record>at).segment.segment == self.segment:
                return True
            at = (<Record>at).after
        return False

    cdef int may_wait(self, uint64_t deadline) except -1:
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
        if deadline == SD_TRY or self.segment.list_nonce == thread.nonce or not self.holds_any():
            return 0
        raise errors.LockOrder(
            "this thread holds a domain and would wait for another; take both with lock_many(), "
            "or hold the list lock, or use timeout=0")

    cdef int need_list(self, object what) except -1:
        cdef sd_thread *thread = sd_self()
        self.usable()
        if self.segment.list_nonce != thread.nonce:
            raise errors.ListNotLocked(f"{what} needs the list lock: with doms.locked(): ...")
        if thread.nested > self.segment.list_nested:
            fail(SD_NESTED, what)
        return 0

    def _need_list_lock(self, what):
        """Raises `ListNotLocked`, or `ListClosed`, unless this thread holds the list lock."""
        self.need_list(what)

    def _need_ours(self, Record record not None):
        """A slot of another segment is just a number here, and somebody else's domain."""
        self.usable()
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
        self.usable()
        if sd_self().orphans != NULL:
            free_orphans(sd_self())
        if self.segment.list_nonce == sd_self().nonce:
            raise errors.AlreadyLocked("this thread holds the list lock already")
        if sd_self().records != NULL and self.holds_any():
            raise errors.LockOrder(
                "this thread holds a domain; the list lock comes first: unlock the domain, or take "
                "the list lock before it")
        self.acquire_list(deadline, timeout)

    def unlock(self):
        """Release the list lock. Raises `ListNotLocked`, or `NotOwner` in another thread."""
        cdef sd_thread *thread = sd_self()
        if self.segment != NULL and self.segment.list_nonce == thread.nonce:
            if thread.nested > self.segment.list_nested:
                fail(SD_NESTED, "unlock the list")
            self.release_list()
            if self.closed:
                sd_detach(self.segment)
            return
        self.usable()
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

    cdef bint make_key(self, sd_key *key, object uuid, object name, object id) except -1:
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

    cdef int find_for_sure(self, const sd_key *key, uint32_t *slot, uint64_t deadline,
                           object timeout) except -1:
        """Once more, under the lock of the index. SD_OK or SD_MISS."""
        cdef int result
        if key.what == SD_ID_INDEX:
            self.segment.inside += 1
            result = sd_ids_lock(self.segment, deadline)
            if result != SD_OK:
                self.leave()
                return self.fail(result, "find by id")
            result = sd_find(self.segment, key, slot)
            sd_ids_unlock(self.segment)
            self.leave()
            self.still_open()
        else:
            # While a domain is held the list lock may only be tried (its holder may want that one).
            self.acquire_list(SD_TRY if self.holds_any() else deadline, timeout)
            result = sd_find(self.segment, key, slot)
            self.release_list()
        if result == SD_OK or result == SD_MISS:
            return result
        return fail(result, "find")

    cdef Record look_up(self, const sd_key *key, uint64_t deadline, object timeout):
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
            if sd_find(self.segment, key, &slot) == SD_OK:
                self.not_held_here(slot)
            self.may_wait(deadline)
        while True:
            result = sd_find_to_lock(self.segment, key, &slot)
            if result == SD_DOUBT:
                if self.segment.list_nonce == sd_self().nonce and key.what != SD_ID_INDEX:
                    fail(SD_CORRUPT, "find")
                result = self.find_for_sure(key, &slot, deadline, timeout)
            if result == SD_MISS:
                return None
            if result != SD_OK:
                fail(result, "find")
            record = self.take(slot, key, 0, deadline, timeout)
            if record is not None:
                return record

    cdef Record take(self, uint32_t slot, const sd_key *key, uint64_t life, uint64_t deadline,
                     object timeout):
        """Lock the slot and hand out the domain if it is still the one that was meant."""
        cdef sd_slot *at = &self.segment.slots[slot]
        cdef Record record
        cdef int result
        # Made before the lock is taken: an allocation may run the collector, which runs anything.
        record = self.new_record()
        self.not_held_here(slot)
        if self.acquire_slot(slot, deadline) == SD_TIMEOUT:
            self.timed_out(&at.owner, &at.mutex, self.describe(slot), timeout)
        result = self.verify(slot, key, life, &record.values)
        if result != SD_OK:
            self.release_slot(slot, False)
            if result == SD_CORRUPT:
                fail(SD_CORRUPT, "lock a domain")
            self.sound_life(slot)
            return None
        record.lead_to(slot)
        record.enter_thread()
        return record

    cdef int verify(self, uint32_t slot, const sd_key *key, uint64_t life,
                    sd_values *values) noexcept:
        """Under the slot's lock: is it what was meant, a key or else a life?"""
        if key != NULL:
            return sd_verify(self.segment, slot, key, values)
        if sd_load(&self.segment.slots[slot].life) != life:
            return SD_MISS
        return sd_values_get(self.segment, slot, values)

    cdef Record new_record(self):
        cdef Record record = <Record>new_handle(self.record_class, EMPTY)
        record.segment = self
        return record

    cdef int sound_life(self, uint32_t slot) except -1:
        """What is damaged is neither there nor gone."""
        if not sd_count_sound(sd_load(&self.segment.slots[slot].life)):
            raise errors.SegmentCorrupt(
                f"whether a domain lives in slot {slot}, and which, is damaged")
        return 0

    cdef object describe(self, uint32_t slot):
        cdef sd_view view
        if sd_view_begin(self.segment, slot, &view) == SD_OK:
            return f"domain {name_object(view.name)!r}"
        return "a domain"

    def get(self, *, uuid=None, name=None, id=None, timeout=None):
        """The domain with this uuid, name or id, locked. No list lock needed.

        Exactly one key. `timeout` in seconds. Raises `DomainNotFound`, `LockTimeout`,
        `LockOrder` (this thread holds another domain and would wait), `AlreadyLocked`.
        """
        cdef sd_key key
        cdef uint64_t deadline = deadline_of(timeout)
        cdef Record record = None
        self.usable()
        if self.make_key(&key, uuid, name, id):
            record = self.look_up(&key, deadline, timeout)
        if record is None:
            raise NOT_FOUND(uuid, name, id)
        return record

    def lookup(self, *, uuid=None, name=None, id=None, timeout=None):
        """Like `get`, but None when there is no such domain."""
        cdef sd_key key
        cdef uint64_t deadline = deadline_of(timeout)
        self.usable()
        if not self.make_key(&key, uuid, name, id):
            return None
        return self.look_up(&key, deadline, timeout)

    def find_by_id(self, id, timeout=None):
        """The active domain with this id, locked, or None. List lock held by the caller
        (virDomainFindByID)."""
        return self.find("find_by_id", None, None, id, timeout)

    def find_by_uuid(self, uuid, timeout=None):
        """The domain with this UUID, locked, or None. List lock held by the caller
        (virDomainFindByUUID)."""
        return self.find("find_by_uuid", uuid, None, None, timeout)

    def find_by_name(self, name, timeout=None):
        """The domain with this name, locked, or None. List lock held by the caller
        (virDomainFindByName)."""
        return self.find("find_by_name", None, name, None, timeout)

    cdef Record find(self, object what, object uuid, object name, object id, object timeout):
        cdef sd_key key
        cdef uint64_t deadline = deadline_of(timeout)
        self.need_list(what)
        if not self.make_key(&key, uuid, name, id):
            return None
        return self.look_up(&key, deadline, timeout)

    # --- reading without any lock ---

    cdef Info view(self, uint32_t slot, const sd_key *key, bint blobs, uint64_t deadline):
        """A consistent view of the slot, or None when nothing lives there (or not `key`)."""
        cdef sd_view view
        cdef int result
        cdef int damage = 0
        cdef Info info = Info.__new__(Info)
        cdef unsigned tries = 0
        if blobs:
            info.blobs = Blobs.__new__(Blobs)
        while True:
            result = sd_view_begin(self.segment, slot, &view)
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
                result = self.copy_blobs(slot, &view, info.blobs)
                if result == SD_CORRUPT:
                    fail(result, "read")
                if result == SD_OK:
                    break
            tries += 1
            if tries > 100:
                back_off(deadline)
        if damage and key != NULL:
            fail(SD_CORRUPT, "read")
        info.damage = damage
        return fill(info, &view)

    cdef int copy_blobs(self, uint32_t slot, const sd_view *view, Blobs blobs) except? -1:
        """SD_OK, SD_CORRUPT, or SD_DOUBT: a writer came in between."""
        cdef bytes blob
        cdef uint64_t extent
        cdef int b, result
        blobs.decoded = self.decoded
        blobs.slot, blobs.life = slot, view.life
        blobs.uuid_raw[0], blobs.uuid_raw[1] = view.uuid[0], view.uuid[1]
        memcpy(blobs.version, view.values.version, sizeof(blobs.version))
        blobs.known = self.decoded.get(slot, view.life, view.values.version[SD_DEFINITION])
        for b in range(SD_DEFINITION if blobs.known is None else SD_NEXT_DEFINITION, 3):
            result = sd_view_extent(self.segment, slot, view, b, &extent)
            if result == SD_OK:
                blob = copy_extent(self.segment, extent)
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
        return sd_view_blobs_check(self.segment, slot, view)

    def _slots(self):
        """How many slots there are to `_salvage`; where their number is damaged, all that have
        memory."""
        cdef uint32_t slots = 0
        cdef uint64_t committed = sd_unsealed(sd_load_acquire(
            &self.segment.header.slots_committed))
        self.usable()
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
        self.usable()
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
        self.usable()
        if not self.make_key(&key, uuid, name, id):
            return None
        return self.look(&key, True, deadline)

    def _who_has(self, uuid, name):
        """The domain that has this uuid or, if none has, this name: a `DomainInfo` without
        definitions, or None. List lock held, so that the answer stands."""
        cdef sd_key key
        cdef Info info = None
        cdef uint64_t deadline = sd_now() + 1000000000
        self.need_list("assign_def")
        sd_ask_to_insert(self.segment)
        if uuid is not None:
            key.what = SD_UUID_INDEX
            uuid_words(uuid, key.uuid)
            info = self.look(&key, False, deadline)
        if info is None and set_name(key.name, name):
            key.what = SD_NAME_INDEX
            info = self.look(&key, False, deadline)
        return info

    cdef int find_either(self, sd_key *key) noexcept:
        """Whether a domain has the uuid of this key, or its name: as sd_find. List lock held."""
        cdef uint32_t slot
        cdef int result
        key.what = SD_UUID_INDEX
        result = sd_find(self.segment, key, &slot)
        if result != SD_MISS:
            return result
        key.what = SD_NAME_INDEX
        return sd_find(self.segment, key, &slot)

    cdef Info look(self, const sd_key *key, bint blobs, uint64_t deadline):
        cdef uint32_t slot
        cdef int result
        cdef unsigned tries = 0
        cdef Info info
        while True:
            result = sd_find(self.segment, key, &slot)
            if result == SD_MISS:
                return None
            if result == SD_OK:
                info = self.view(slot, key, blobs, deadline)
                if info is not None:
                    return info
            elif result != SD_DOUBT:
                fail(result, "peek")
            tries += 1
            if tries > 100:
                self.wake_recovery()
                back_off(deadline)

    cdef int wake_recovery(self) except -1:
        """An index that stays odd has a dead holder: repair it, if that takes no waiting. If that
        failed, nobody does it any more, and nobody need wait for it."""
        cdef sd_segment *segment = self.segment
        if sd_load(&segment.header.poisoned):
            self.fail(SD_POISONED, "find")
        if segment.list_nonce == sd_self().nonce:
            return 0
        if sd_ids_lock(segment, SD_TRY) == SD_OK:
            sd_ids_unlock(segment)
        if not sd_load(&segment.header.list_seq) & 1:
            return 0
        if not self.multiprocessing:
            if sd_list_lock(segment, SD_TRY) == SD_OK:
                sd_list_unlock(segment)
        elif self.list_lock is not None:
            try:
                self.acquire_list(SD_TRY, 0)
            except errors.LockTimeout:
                return 0
            self.release_list()
        return 0

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
        self.usable()
        for slot in range(self.slots()):
            if filtered and not self.chosen(slot, &what):
                continue
            info = self.view(slot, NULL, definitions, deadline)
            if info is None:
                continue
            if info.damage == FIELDS or wanted(info.number, info.marks, info.state_number, &what):
                found.append(info)
        return found

    cdef bint chosen(self, uint32_t slot, const asked *what) noexcept:
        """A first look that spares the copy of what the filter rejects."""
        cdef sd_view view
        cdef int result = sd_view_begin(self.segment, slot, &view)
        return result == SD_DOUBT or result == SD_CORRUPT or (
            result == SD_OK and wanted_view(&view, what))

    def _count_all(self, int active, int persistent, int autostart, unsigned states):
        cdef uint32_t slot
        cdef uint64_t total = 0
        cdef sd_view view
        cdef int result
        cdef asked what = asked(active, persistent, autostart, states)
        self.usable()
        for slot in range(self.slots()):
            result = sd_view_begin(self.segment, slot, &view)
            while result == SD_DOUBT:
                result = sd_view_begin(self.segment, slot, &view)
            if result == SD_CORRUPT:
                fail(result, "count")
            if result == SD_OK and wanted_view(&view, &what):
                total += 1
        return total

    def __len__(self):
        self.usable()
        cdef uint64_t live = sd_load(&self.segment.header.live)
        if live > self.segment.at.max_slots:
            fail(SD_CORRUPT, "count")
        return live

    def __contains__(self, uuid):
        cdef sd_key key
        self.usable()
        self.make_key(&key, uuid, None, None)
        return self.look(&key, False, sd_now() + 1000000000) is not None

    def __iter__(self):
        return iter(self.snapshot())

    # --- for the rules: what a store offers ---

    def _insert(self, uuid, name, bytes definition, int state, bint persistent, timeout, list made):
        """A new record, committed and locked. List lock held. It is put into `made`, a list of one
        place, before a signal handler can raise in the caller."""
        cdef sd_key key
        cdef sd_values values
        cdef sd_blob blobs[3]
        cdef uint32_t slot
        cdef sd_word *link
        cdef uint64_t deadline = deadline_of(timeout)
        cdef uint64_t epoch = sd_fork_epoch
        cdef Record record
        cdef int result
        self.need_list("assign_def")
        self.may_wait(deadline)
        uuid_words(uuid, key.uuid)
        if not set_name(key.name, name):
            raise errors.InvalidName(f"{name!r} can not be a domain's name")
        memset(&values, 0, sizeof(values))
        memset(blobs, 0, sizeof(blobs))
        values.id = values.pid = -1
        values.state = state
        values.flags = SD_FLAG_PERSISTENT if persistent else 0
        set_change(&blobs[SD_DEFINITION], definition)
        record = self.new_record()
        # The caller has looked, but a signal handler of this thread may have run since, and holds
        # what we hold. From here on it is told so.
        result = self.find_either(&key)
        if result == SD_OK:
            raise errors.DomainExists(
                f"a domain with the name '{name}' or the uuid {uuid_object(key.uuid)} was defined "
                "meanwhile by a signal handler of this thread")
        if result != SD_MISS:
            fail(result, f"define domain {name!r}")
        self.lock_free_slot(&slot, &link, deadline, timeout)
        result = sd_insert(self.segment, slot, link, key.uuid, key.name, &values, blobs, deadline)
        if result != SD_OK:
            if epoch == sd_fork_epoch:  # else it is our parent's
                self.release_slot(slot, False)
            self.fail(result, f"define domain {name!r}")
        record.lead_to(slot)
        record.own()
        made[0] = record
        return record

    cdef int lock_free_slot(self, uint32_t *slot, sd_word **link, uint64_t deadline,
                            object timeout) except -1:
        cdef int result, passed = 0
        cdef uint64_t patience = SD_TRY
        link[0] = NULL
        while True:
            result = sd_free_slot(self.segment, link, slot)
            if result == SD_FULL and passed and patience == SD_TRY:
                # All that is left is held by somebody: now there is nothing but to wait for one.
                link[0] = NULL
                patience = deadline
                continue
            if result != SD_OK:
                return fail(result, "define a domain")
            if self.acquire_slot(slot[0], patience) == SD_OK:
                return 0
            if patience != SD_TRY or deadline == SD_TRY:
                self.timed_out(&self.segment.slots[slot[0]].owner,
                               &self.segment.slots[slot[0]].mutex, "a free slot", timeout)
            passed += 1
            if passed > 64:
                patience = deadline

    def _remove(self, Record record, timeout=None):
        """Remove a record that this thread has locked; its lock is released. List lock held."""
        self._need_ours(record)
        cdef Record mine = record.mine_to_change()
        cdef uint64_t deadline = deadline_of(timeout)
        self.need_list("remove")
        cdef int result = sd_remove(self.segment, mine.slot, deadline)
        if result != SD_OK:
            self.fail(result, "remove a domain")
        mine.drop_changes()
        mine.disown(True)

    def _rename(self, Record record, name, bytes definition, bytes next_definition, timeout=None):
        """Name and definitions in one commit. List lock held; duplicates were looked for."""
        self._need_ours(record)
        cdef Record mine = record.mine_to_change()
        cdef uint64_t deadline = deadline_of(timeout)
        cdef unsigned char raw[252]
        cdef sd_blob blobs[3]
        self.need_list("rename")
        if not set_name(raw, name):
            raise errors.InvalidName(f"{name!r} can not be a domain's name")
        memset(blobs, 0, sizeof(blobs))
        set_change(&blobs[SD_DEFINITION], definition)
        if next_definition is not None:
            set_change(&blobs[SD_NEXT_DEFINITION], next_definition)
        cdef int result = sd_commit(self.segment, mine.slot, &mine.values, blobs, raw, deadline)
        if result != SD_OK:
            self.fail(result, f"rename to {name!r}")
        mine.reload()

    def _lock_record(self, uint32_t slot, uint64_t life, timeout=None):
        """The record in this slot, locked, if it still lives this life; else None."""
        cdef uint64_t deadline = deadline_of(timeout)
        self.usable()
        self.may_wait(deadline)
        if slot >= self.slots():
            return None
        return self.take(slot, NULL, life, deadline, timeout)

    def _handle(self, uint32_t slot, uint64_t life, bytes uuid):
        """An unlocked handle, for unpickling. It may be stale; locking it says so."""
        cdef Record record
        self.usable()
        if slot >= self.slots() or len(uuid) != 16:
            raise errors.DomainRemoved("this handle's domain does not exist in this list")
        record = self.new_record()
        record.lead_to(slot)
        record.life = life
        uuid_words(uuid, record.uuid_raw)
        return record

    def _handles(self):
        """Unlocked handles to every live record, in slot order."""
        cdef uint32_t slot
        cdef Record record
        cdef list found = []
        self.usable()
        for slot in range(self.slots()):
            self.sound_life(slot)
            if sd_load(&self.segment.slots[slot].life) & 1:
                record = self.new_record()
                record.lead_to(slot)
                found.append(record)
        return found

    def _set_settings(self, bytes settings):
        self.need_list("settings")
        cdef int result = sd_settings_set(self.segment, PyBytes_AS_STRING(settings), len(settings))
        if result != SD_OK:
            fail(result, "settings")

    def _settings(self):
        cdef unsigned char *room = <unsigned char *>malloc(SD_SETTINGS_BYTES)
        cdef uint64_t size
        if room == NULL:
            raise MemoryError
        try:
            self.usable()
            if sd_settings_get(self.segment, room, &size) != SD_OK:
                fail(SD_CORRUPT, "settings")
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
        """`DescriptorLost` when it is not the segment's any more."""
        self.usable()
        cdef int fd = sd_descriptor(self.segment)
        if fd < 0:
            raise errors.DescriptorLost(
                f"this process closed the descriptor of this segment (number {self.segment.fd}); "
                "whatever has the number now is left alone. Have it kept by whoever closes "
                "descriptors (files_preserve=[doms] for python-daemon), or attach anew by name")
        return fd

    @property
    def _inode(self):
        self.usable()
        return self.segment.device, self.segment.inode

    @property
    def _kind(self):
        return "multiprocessing" if self.multiprocessing else "robust"

    @property
    def _locks(self):
        return self.list_lock, self.slot_locks

    def _statistics(self):
        cdef sd_header *header
        cdef unsigned i
        self.usable()
        header = self.segment.header
        attached = [sd_load(&self.segment.attached[i]) for i in range(SD_ATTACHED_MAX)
                    if sd_load(&self.segment.attached[i])]
        return {
            "domains": sd_load(&header.live),
            "active": sd_load(&header.active),
            "max_domains": self.segment.at.max_slots,
            "slots": sd_slot_count(self.segment),
            "bytes_max": self.segment.at.total_bytes,
            "bytes_committed": sd_committed_bytes(self.segment),
            "heap_max": self.segment.at.heap_cells * SD_CELL,
            "heap_used": sd_load(&header.heap_used) * SD_CELL,
            "creator": (header.creator_pid & 0x3fffff, header.creator_who >> 22),
            "created": header.created / 1e9,
            "poisoned": self.poison(),
            "attached": [(word & 0x3fffff, word >> 22) for word in attached],
        }

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
        self.usable()
        check = sd_check_begin(self.segment, len(STATES), report, &found)
        if check == NULL:
            raise MemoryError
        self.segment.inside += 1
        try:
            if self.check_records(check):
                for part in range(SD_PARTS):
                    why = self.judge(check, part, deadline, timeout, &longest)
                    if why is not None:
                        open.append((SD_SUMS + part, why))
                for sum in range(SD_SUMS):
                    why = self.sum_up(check, sum, deadline, timeout, &longest)
                    if why is not None:
                        open.append((sum, why))
            if sd_check_overlooked(check):
                open.append((SD_SUMS, f"{sd_check_overlooked(check)} more records or entries look "
                             "wrong, too many to judge"))
            tally = sd_check_tally(check)[0]
        finally:
            sd_check_end(check)
            problems = list_faults(found.first)
            self.leave()
        return problems, tally, open, longest / 1e9

    cdef int between(self) except -1:
        """Between two parts of a long look: other threads and signal handlers run."""
        if PyErr_CheckSignals():
            return -1
        HOLDERS.pause()
        return self.still_open()

    cdef bint check_records(self, sd_check *check) except -1:
        cdef int result
        while True:
            result = sd_check_records(check, sd_now() + LOOK_NS)
            if result != SD_TIMEOUT:
                return result == SD_OK
            self.between()

    cdef object judge(self, sd_check *check, int part, uint64_t deadline, object timeout,
                      uint64_t *longest):
        """Look at a part's suspects under its lock: None, or why not at all of them."""
        cdef bint taken
        cdef uint64_t began
        while sd_check_suspects(check, part):
            try:
                taken = self.hold_part(part, deadline, timeout)
            except OUT_OF_REACH as exc:
                return f"{sd_check_suspects(check, part)} records or entries look wrong, but {exc}"
            began = sd_now()
            sd_check_judge(check, part, began + SD_CHECK_HOLD_NS)
            if taken:
                self.drop_part(part)
                longest[0] = max(longest[0], sd_now() - began)
            self.between()
        return None

    cdef object sum_up(self, sd_check *check, int sum, uint64_t deadline, object timeout,
                       uint64_t *longest):
        """Come to a verdict on a sum: None, or why there is none."""
        cdef int result, _tries, holds = 0, part = sd_check_part(sum)
        cdef bint taken
        cdef uint64_t began
        for _tries in range(WALKS if sum == SD_SUM_CELLS else LOOKS):
            if self.sum_freely(check, sum) == SD_OK:
                return None
        result = SD_DOUBT
        while result == SD_DOUBT or result == SD_TIMEOUT and holds < LOOKS:
            if sd_check_prepare(check, sum) == SD_ERRNO:
                raise MemoryError
            try:
                taken = self.hold_part(part, deadline, timeout)
            except OUT_OF_REACH as exc:
                return str(exc)
            holds += 1
            began = sd_now()
            result = sd_check_sum_held(check, sum,
                                       began + SD_CHECK_HOLD_NS if taken else SD_FOREVER)
            if taken:
                self.drop_part(part)
                longest[0] = max(longest[0], sd_now() - began)
            self.between()
        if result == SD_OK:
            return None
        return ("writers are at work, and to be sure they would have to be stopped for more than "
                f"{SD_CHECK_HOLD_NS // 1000000} ms; check again when they rest")

    cdef int sum_freely(self, sd_check *check, int sum) except -1:
        cdef int result
        while True:
            result = sd_check_sum(check, sum, sd_now() + LOOK_NS)
            if result == SD_ERRNO:
                raise MemoryError
            if result != SD_TIMEOUT:
                return result
            self.between()

    cdef bint hold_part(self, int part, uint64_t deadline, object timeout) except -1:
        """Take the lock of a part. False: there is nothing to give back: this thread has it, or the
        segment is poisoned, so that nobody gets it and what it protects stands still."""
        cdef int result
        if part == SD_PART_LIST and self.segment.list_nonce == sd_self().nonce:
            self.need_list("check")
            return False
        try:
            if part == SD_PART_LIST:
                # While a domain is held the list lock may only be tried.
                self.acquire_list(SD_TRY if self.holds_any() else deadline, timeout)
                return True
            result = sd_short_locks(self.segment, part == SD_PART_IDS, part == SD_PART_HEAP,
                                    deadline)
            if result != SD_OK:
                self.fail(result, "check")
        except errors.SegmentPoisoned:
            return False
        return True

    cdef int drop_part(self, int part) except -1:
        if part == SD_PART_LIST:
            return self.release_list()
        if part == SD_PART_IDS:
            sd_ids_unlock(self.segment)
        else:
            sd_heap_unlock(self.segment)
        return 0

    # --- recover ---

    def _recover(self, timeout=None):
        """Take each lock as its next holder would: (repairs, what is held, bytes freed).

        Repairs: (lock, name of the domain, `LockHolder` that died or None if the repair had been
        put off). Held: (lock, name of the domain, `LockHolder` or None).
        """
        cdef uint64_t freed, deadline = deadline_of(timeout)
        cdef list repairs = [], held = []
        self.usable()
        if self.multiprocessing and self.list_lock is None:
            raise errors.LockKindMismatch(
                "this list uses multiprocessing locks, which only processes can have that "
                "inherited the DomainList: recover through one of them")
        if sd_load_acquire(&self.segment.header.poisoned):
            self.fail(SD_POISONED, "recover")
        if self.segment.list_nonce != sd_self().nonce:
            self.recover_list(deadline, timeout, repairs, held)
        self.recover_short("id", &self.segment.header.id_mutex, deadline, timeout, repairs, held)
        self.recover_short("heap", &self.segment.header.heap_mutex, deadline, timeout, repairs,
                           held)
        self.segment.inside += 1
        try:
            freed = self.recover_slots(repairs, held)
        finally:
            self.leave()
        return repairs, held, freed * SD_CELL

    cdef int recover_list(self, uint64_t deadline, object timeout, list repairs,
                          list held) except -1:
        cdef sd_repair repair
        if self.holds_any():
            raise errors.LockOrder(
                "this thread holds a domain; the list lock comes first: unlock the domain")
        memset(&sd_self().repair, 0, sizeof(repair))
        try:
            self.acquire_list(deadline, timeout)
        except errors.LockTimeout as exc:
            held.append(("list", None, exc.holder))
            return 0
        repair = sd_self().repair
        self.release_list()
        note_repair(repairs, "list", None, &repair)
        return 0

    cdef int recover_short(self, object which, pthread_mutex_t *mutex, uint64_t deadline,
                           object timeout, list repairs, list held) except -1:
        cdef sd_repair repair
        cdef bint ids = mutex == &self.segment.header.id_mutex
        cdef uint32_t victim = sd_mutex_victim(mutex)
        cdef int result
        memset(&sd_self().repair, 0, sizeof(repair))
        self.segment.inside += 1
        result = sd_short_locks(self.segment, ids, not ids, deadline)
        repair = sd_self().repair
        if result == SD_OK:
            self.drop_part(SD_PART_IDS if ids else SD_PART_HEAP)
        self.leave()
        if result == SD_TIMEOUT:
            held.append((which, None, self.too_late(NULL, mutex, which, timeout).holder))
            return 0
        if result != SD_OK:
            return self.fail(result, "recover")
        repair.who = victim
        note_repair(repairs, which, None, &repair)
        return self.still_open()

    cdef uint64_t recover_slots(self, list repairs, list held) except? 1:
        """Each slot that is locked, was left locked, or has garbage that was put off."""
        cdef uint32_t slot
        cdef uint64_t freed = 0
        cdef sd_slot *at
        cdef sd_repair repair
        cdef bint busy
        for slot in range(self.slots()):
            if slot % 4096 == 4095:
                self.between()
            at = &self.segment.slots[slot]
            busy = sd_load(&at.owner.who) != 0 if self.multiprocessing else sd_mutex_busy(&at.mutex)
            if not busy and not sd_load(&at.dirty) or self.hold_here(slot, 0) != NULL:
                continue
            name = self.name_in(slot)
            memset(&sd_self().repair, 0, sizeof(repair))
            if self.acquire_slot(slot, SD_TRY) == SD_TIMEOUT:
                error = self.too_late(&at.owner, &at.mutex, name, 0)
                if error.holder is not None:
                    held.append(("domain", name, error.holder))
                continue
            if sd_load(&at.dirty):
                sd_tidy(self.segment, slot)
            repair = sd_self().repair
            self.release_slot(slot, False)
            freed += repair.freed
            note_repair(repairs, "domain", name, &repair)
        return freed

    cdef object name_in(self, uint32_t slot):
        """The name of the domain in a slot; None: none lives there."""
        cdef sd_view view
        cdef int result
        while True:
            result = sd_view_begin(self.segment, slot, &view)
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
    doms.release_list()
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
        if self.held_somewhere():
            abandon(self)
        if self.leads:
            self.segment.segment.handles -= 1
            if self.segment.closed:
                sd_detach(self.segment.segment)

    cdef void lead_to(self, uint32_t slot) noexcept:
        cdef sd_slot *at = &self.segment.segment.slots[slot]
        self.leads = True
        self.segment.segment.handles += 1
        self.slot = slot
        self.life = sd_load(&at.life)
        self.uuid_raw[0] = sd_load(&at.uuid[0])
        self.uuid_raw[1] = sd_load(&at.uuid[1])

    # --- who holds it ---

    cdef bint held_somewhere(self):
        """By a thread of this process that still runs. After a fork the nodes of the parent's
        threads are still there, with the epoch of before."""
        return (self.nonce != 0 and self.thread.epoch == sd_fork_epoch
                and self.thread.nonce == self.nonce)

    cdef Record mine_or_none(self):
        cdef sd_thread *thread = sd_self()
        if self.nonce == thread.nonce:
            return self
        if thread.records == NULL:
            return None
        return self.segment.held_here(self.slot, self.life)

    cdef Record mine(self):
        cdef Record mine = self.mine_or_none()
        if mine is None:
            raise errors.DomainNotLocked(
                f"domain {uuid_object(self.uuid_raw)} is not locked by this thread: with dom: ...")
        return mine

    cdef Record mine_to_change(self):
        """A signal handler may not change what the code that it interrupted is committing."""
        cdef Record mine = self.mine()
        if sd_self().nested > mine.nested:
            fail(SD_NESTED, "change a domain")
        return mine

    cdef int own(self) except -1:
        if sd_values_get(self.segment.segment, self.slot, &self.values) != SD_OK:
            self.segment.release_slot(self.slot, False)
            fail(SD_CORRUPT, "lock a domain")
        self.enter_thread()
        return 0

    cdef void enter_thread(self) noexcept:
        cdef sd_thread *thread = sd_self()
        self.nonce = thread.nonce
        self.thread = thread
        self.nested = thread.nested
        self.before = NULL
        self.after = thread.records
        if thread.records != NULL:
            (<Record>thread.records).before = <void *>self
        thread.records = <void *>self
        self.pending = 0
        self.touched = False
        self.depth = 0

    cdef void leave_thread(self) noexcept:
        if self.before != NULL:
            (<Record>self.before).after = self.after
        else:
            self.thread.records = self.after
        if self.after != NULL:
            (<Record>self.after).before = self.before
        self.nonce = 0

    cdef int disown(self, bint given) except -1:
        if self.nonce != sd_self().nonce:
            return 0  # a signal handler forked in a wait: it is our parent's
        self.leave_thread()
        return self.segment.release_slot(self.slot, given)

    cdef void reload(self) noexcept:
        sd_values_get(self.segment.segment, self.slot, &self.values)
        self.touched = False

    cdef void drop_changes(self) noexcept:
        if self.pending:
            self.pending = 0
            _objects, _blobs = self.objects, self.blobs  # may run anything as they go: last
            self.objects = self.blobs = None

    cdef int do_commit(self, uint64_t deadline) except -1:
        cdef sd_blob changes[3]
        cdef int b, result
        if not self.touched and not self.pending:
            return 0
        memset(changes, 0, sizeof(changes))
        for b in range(3):
            if self.pending >> b & 1:
                changes[b].change = True
                if self.blobs[b] is not None:
                    set_change(&changes[b], self.blobs[b])
        result = sd_commit(self.segment.segment, self.slot, &self.values, changes, NULL, deadline)
        if result != SD_OK:
            _objects, _blobs = self.objects, self.blobs  # may run anything as they go: later
            self.drop_changes()
            self.reload()
            return self.segment.fail(
                result, f"commit domain {uuid_object(self.uuid_raw)}; rolled back")
        self.reload()
        if self.pending & 1 and self.objects[SD_DEFINITION] is not None:
            self.segment.decoded.put(self.slot, self.life, self.values.version[SD_DEFINITION],
                                     self.objects[SD_DEFINITION])
        self.drop_changes()
        return 0

    @property
    def is_locked(self):
        """Whether this thread holds the domain. Needs no lock."""
        return self.mine_or_none() is not None

    @property
    def changed(self):
        """Whether there are changes that were not committed. Domain lock."""
        cdef Record mine = self.mine()
        return bool(mine.touched or mine.pending)

    def lock(self, timeout=None):
        """Lock the domain (virDomainLock).

        `timeout` in seconds: None waits for ever, 0 tries. Raises `LockTimeout` (it names the
        holder), `DomainRemoved`, `AlreadyLocked`, `LockOrder` (this thread holds another domain of
        the list, not the list lock, and would wait), `TooManyLocks`.
        """
        self.take(deadline_of(timeout), timeout)

    cdef int take(self, uint64_t deadline, object timeout) except -1:
        cdef sd_slot *at
        cdef void *held
        self.segment.usable()
        at = &self.segment.segment.slots[self.slot]
        held = self.segment.hold_here(self.slot, 0)
        if held != NULL:
            # The slot's mutex is ours: it may not be asked again, whichever domain lives there now.
            if (<Record>held).life == self.life:
                self.segment.not_held_here(self.slot)
            self.outlived()
        if sd_load(&at.life) != self.life:
            self.outlived()  # a life that ended does not come back: no need to wait for the slot
        self.segment.may_wait(deadline)
        if self.segment.acquire_slot(self.slot, deadline) == SD_TIMEOUT:
            self.segment.timed_out(&at.owner, &at.mutex, self.segment.describe(self.slot), timeout)
        if sd_load(&at.life) != self.life:
            self.segment.release_slot(self.slot, False)
            self.outlived()
        self.own()
        return 0

    cdef int outlived(self) except -1:
        self.segment.sound_life(self.slot)
        raise errors.DomainRemoved(
            f"domain {uuid_object(self.uuid_raw)} was removed; this handle outlived it")

    def try_lock(self):
        """Lock the domain if it is free: True, else False. Always allowed, whatever is held."""
        try:
            self.take(SD_TRY, 0)
        except errors.LockTimeout:
            return False
        return True

    def unlock(self, timeout=None):
        """Commit what was changed and release the lock (virDomainUnlock).

        When the commit fails (`SegmentFull`, `LockTimeout` of the core's own locks after `timeout`
        seconds, Ctrl-C) everything is rolled back, the domain is unlocked all the same, and the
        error is raised. Raises `DomainNotLocked`, or `NotOwner` in another thread.
        """
        self.give_back(timeout)

    def _release_unseen(self):
        """Unlock, if this thread holds it, by who was not given the domain: the next one still
        learns of the death of an earlier holder. What was not committed is rolled back.

        For the ``finally`` of a rule: in one call, so that no signal handler runs in between."""
        cdef Record mine = self.mine_or_none()
        if mine is None:
            return
        mine = mine.mine_to_change()
        mine.drop_changes()
        mine.disown(False)

    cdef int give_back(self, object timeout) except -1:
        cdef Record mine = self.mine_or_none()
        cdef uint64_t deadline = deadline_of(timeout)
        if mine is None:
            self.not_mine()
        if sd_self().nested > mine.nested:
            fail(SD_NESTED, "unlock a domain")
        if mine.touched or mine.pending:
            try:
                mine.do_commit(deadline)
            finally:
                mine.disown(True)
            return 0
        return mine.disown(True)

    cdef int not_mine(self) except -1:
        if self.held_somewhere():
            raise errors.NotOwner(
                f"another thread of this process holds domain {uuid_object(self.uuid_raw)}")
        raise errors.DomainNotLocked(
            f"domain {uuid_object(self.uuid_raw)} is not locked by this thread")

    def acquire(self, block=True, timeout=None):
        """`lock` in the manner of `multiprocessing.Lock`: True, or False when it was not free."""
        timeout = 0 if not block or (timeout is not None and timeout < 0) else timeout
        try:
            self.take(deadline_of(timeout), timeout)
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
        self.mine_to_change().do_commit(deadline_of(timeout))

    def rollback(self):
        """Forget all changes since the last commit. Domain lock."""
        cdef Record mine = self.mine_to_change()
        mine.drop_changes()
        mine.reload()

    def __enter__(self):
        cdef Record mine = self.mine_or_none()
        if mine is None:
            self.take(SD_FOREVER, None)
            mine = self
        mine = mine.mine_to_change()
        mine.depth += 1
        return self

    def __exit__(self, kind, value, traceback):
        cdef Record mine = self.mine_or_none()
        if mine is None:
            return
        if kind is not None:
            mine = mine.mine_to_change()
            mine.drop_changes()
            mine.reload()
        if mine.depth > 1:
            mine.depth -= 1  # an inner block; the outer one goes on
            return
        mine.give_back(None)

    # --- fields ---

    @property
    def uuid(self):
        """The domain's UUID. Needs no lock: it never changes."""
        return uuid_object(self.uuid_raw)

    @property
    def id(self):
        """The id of the running domain, -1 when it is inactive. Domain lock."""
        return self.mine().values.id

    @property
    def is_active(self):
        """Whether it runs: ``id != -1`` (virDomainIsActive). Domain lock."""
        return self.mine().values.id != -1

    @property
    def name(self):
        """The name. Domain lock; changed by `DomainList.rename`."""
        cdef unsigned char raw[252]
        cdef Record mine = self.mine()
        sd_name_get(self.segment.segment, self.slot, mine.values.flags, raw)
        if not raw[0]:
            fail(SD_CORRUPT, "name")
        return name_object(raw)

    @property
    def state(self):
        """The `DomainState`. Domain lock. Assigning sets the reason to 0, unknown."""
        return state_of(self.mine().values.state)

    @state.setter
    def state(self, value):
        cdef Record mine = self.mine_to_change()
        cdef long number = PyNumber_Index(value)
        if number < 0 or number >= len(STATES):
            raise ValueError(f"{value!r} is no DomainState")
        mine.values.state = <uint16_t>number
        mine.values.reason = 0
        mine.touched = True

    @property
    def reason(self):
        """Why it is in this state: a member of the state's reason enumeration. Domain lock."""
        cdef Record mine = self.mine()
        return reason_of(mine.values.state, mine.values.reason)

    @reason.setter
    def reason(self, value):
        cdef Record mine = self.mine_to_change()
        cdef long number = PyNumber_Index(value)
        if number < 0 or number > 0xffff:
            raise ValueError(f"a reason is a number from 0 to 65535, not {value!r}")
        mine.values.reason = <uint16_t>number
        mine.touched = True

    @property
    def persistent(self):
        """Whether the domain outlives its deactivation. Domain lock."""
        return self.mine().values.flags & SD_FLAG_PERSISTENT != 0

    @persistent.setter
    def persistent(self, bint value):
        self.mine_to_change().set_flag(SD_FLAG_PERSISTENT, value)

    @property
    def autostart(self):
        """Whether the domain is to be started with the host. Domain lock. Assigning changes the
        record only; `DomainList.set_autostart` makes the link on disk too."""
        return self.mine().values.flags & SD_FLAG_AUTOSTART != 0

    @autostart.setter
    def autostart(self, bint value):
        self.mine_to_change().set_flag(SD_FLAG_AUTOSTART, value)

    cdef int set_flag(self, uint64_t flag, bint value) except -1:
        if value:
            self.values.flags |= flag
        else:
            self.values.flags &= ~flag
        self.touched = True
        return 0

    @property
    def pid(self):
        """Process id of the hypervisor, or None. Domain lock."""
        cdef int32_t pid = self.mine().values.pid
        return None if pid == -1 else pid

    @pid.setter
    def pid(self, value):
        cdef Record mine = self.mine_to_change()
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
        cdef Record mine = self.mine()
        if mine.pending & 1:
            return mine.objects[SD_DEFINITION]
        return self.segment.definition_of(self.slot, self.life, &mine.values)

    @definition.setter
    def definition(self, value):
        cdef Record mine = self.mine_to_change()
        sd_ask_to_replace(self.segment.segment, self.slot)
        mine.set_blob(SD_DEFINITION, value, ENCODE_DEFINITION(self, value))

    @property
    def next_definition(self):
        """What becomes the definition once the domain is inactive (libvirt's newDef), or None.
        Domain lock."""
        return self.mine().blob_value(SD_NEXT_DEFINITION)

    @next_definition.setter
    def next_definition(self, value):
        cdef Record mine = self.mine_to_change()
        if value is None:
            mine.set_blob(SD_NEXT_DEFINITION, None, None)
        else:
            mine.set_blob(SD_NEXT_DEFINITION, value, ENCODE_DEFINITION(self, value))

    @property
    def data(self):
        """The driver's own data: any MessagePack value, or None. Domain lock.

        What is read is read-only (mappings are proxies, sequences tuples); assign to change it.
        Raises `TypeError` or `ValueError` for what MessagePack can not carry, and leaves it as it
        was.
        """
        return self.mine().blob_value(SD_DATA)

    @data.setter
    def data(self, value):
        cdef Record mine = self.mine_to_change()
        if value is None:
            mine.set_blob(SD_DATA, None, None)
            return
        encoded = ENCODE_DATA(value)
        mine.set_blob(SD_DATA, DECODE[SD_DATA](encoded), encoded)

    cdef int set_blob(self, int which, object value, bytes encoded) except -1:
        if encoded is not None and not 0 < len(encoded) <= SD_BLOB_MAX:
            raise errors.SegmentFull(f"a value of {len(encoded)} bytes; the limit is 16 MiB")
        if not self.pending:
            self.objects = [None, None, None]
            self.blobs = [None, None, None]
        self.objects[which] = value
        self.blobs[which] = encoded
        self.pending |= 1 << which
        return 0

    cdef object blob_value(self, int which):
        cdef uint64_t extent
        if self.pending >> which & 1:
            return self.objects[which]
        if not self.values.flags & SD_FLAG_PRESENT(which):
            return None
        if sd_blob_get(self.segment.segment, self.slot, &self.values, which, &extent) != SD_OK:
            fail(SD_CORRUPT, "read")
        return decode(which, copy_extent(self.segment.segment, extent), self.uuid_raw,
                      self.values.version[which])

    @property
    def previous_owner_died(self):
        """The `LockHolder` that died holding this domain since it was last handed back in order, or
        None. What it had not committed was rolled back. Domain lock."""
        cdef sd_slot *at
        cdef uint64_t who
        self.mine()
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
        sd_name_get(self.segment.segment, self.slot, self.mine().values.flags, mine)
        if not mine[0]:
            fail(SD_CORRUPT, "name")
        if uuid is None or not set_name(other, name):
            return False
        uuid_words(uuid, words)
        return (words[0] == self.uuid_raw[0] and words[1] == self.uuid_raw[1]
                and memcmp(mine, other, mine[0] + 1) == 0)

    def _take_id(self, timeout=None):
        """The next id, entered into this transaction; never given out again."""
        cdef Record mine = self.mine_to_change()
        cdef int32_t id
        cdef int result = sd_take_id(self.segment.segment, &id, deadline_of(timeout))
        if result == SD_FULL:
            raise errors.SegmentFull(
                "every id up to 2147483647 was given out; create a new segment")
        if result != SD_OK:
            self.segment.fail(result, "next id")
        mine.values.id = id
        mine.touched = True
        return id

    @property
    def _receipt(self):
        """Life and commits of the record: other than before if the holder's commit, or its remove,
        came about. Needs no lock."""
        cdef sd_slot *at
        if not self.leads:
            return 0, 0
        at = &self.segment.segment.slots[self.slot]
        return sd_load(&at.life), sd_load(&at.cur)

    def _drop_id(self):
        cdef Record mine = self.mine_to_change()
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
        cdef Record mine = self.mine_or_none()
        kind = type(self).__name__
        if mine is None:
            return f"<{kind} {uuid_object(self.uuid_raw)}>"
        return f"<{kind} {self.name!r} {uuid_object(self.uuid_raw)} locked>"


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
    record.leave_thread()
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
        fail(result, "create the segment")


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
