"""What the binding calls of C: the core (core.h), handles that are made and freed without Python's
allocator (handle.h), and of Python.h what Cython does not declare.

Declarations only, and of each struct only the fields that the binding reads. What a function
promises, which lock it needs and which codes it returns, stands in core.h.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "handle.h":
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
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1
    object PyDictProxy_New(object)
    void PyErr_Fetch(PyObject **, PyObject **, PyObject **)
    void PyErr_SetObject(object, object)
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
        sd_word dirty, waiting
        sd_word why[7]
        sd_owner owner
    ctypedef struct sd_named:
        pthread_mutex_t mutex
        sd_owner owner
        sd_word why[7]
    ctypedef struct sd_lock_name:
        unsigned char text[64]
    ctypedef struct sd_header:
        pthread_mutex_t list_mutex
        pthread_mutex_t id_mutex
        pthread_mutex_t heap_mutex
        pthread_mutex_t event_mutex
        sd_word event_count, event_waiting, any_seq, any_waiting
        sd_owner list_owner
        sd_word list_why[7]
        sd_word counters_committed
        sd_word poisoned, poisoned_at, poisoned_who, poisoned_pid, poisoned_when
        sd_word live, active, slots_committed, list_seq, heap_used
        uint64_t creator_who, creator_pid, created
    ctypedef struct sd_counters:
        sd_word who, acquired, contended, commits, recoveries, deaths, unlisted
        sd_word waits[25]
    ctypedef struct sd_geometry:
        uint64_t max_slots, heap_cells, events, total_bytes
    ctypedef struct sd_segment:
        int fd
        uint64_t device, inode
        unsigned users
        unsigned open
        unsigned handles
        unsigned inside
        sd_geometry at
        uint64_t kind
        uint64_t id[2]
        sd_header *header
        sd_named *named
        sd_slot *slots
        sd_word *attached
        sd_counters *blocks
        sd_counters *counters
        sd_counters own
        uint64_t list_nonce
        unsigned list_nested
        void *list_taker
        uint64_t epoch
    ctypedef struct sd_orphan:
        sd_segment *segment
        uint32_t slot
        bint named, list
        sd_orphan *next
    ctypedef struct sd_repair:
        bint repaired, died
        uint64_t who, pid, freed
    ctypedef struct sd_wait:
        sd_segment *segment
        uint64_t since
        int kind
        uint32_t number
        bint told, told_loop
        void *list
        sd_wait *outer
    ctypedef struct sd_waiting:
        uint64_t who, pid, since
        int kind
        uint32_t number
    ctypedef struct sd_thread:
        uint64_t nonce, who, pid, epoch
        unsigned held
        unsigned nested
        bint in_slice
        unsigned short_wait
        void *records
        void *named
        sd_orphan *orphans
        sd_repair repair
        sd_wait *wait
        sd_thread *kernel
        uint64_t kernel_nonce
        uint64_t stretch, stretch_of
        sd_thread *runs
        sd_thread *acts_for
        unsigned rooms
        bint asks, gives_up
        uint64_t until
    ctypedef struct sd_values:
        int32_t id, pid
        uint16_t state, reason
        uint64_t flags
        uint64_t version[4]
        uint64_t event, started
    ctypedef struct sd_news:
        unsigned count
        uint32_t kind[8]
        int32_t id[8]
    ctypedef struct sd_entry:
        pass
    ctypedef struct sd_event:
        uint64_t number, life, kind, time
        uint64_t uuid[2]
        uint32_t pid
        unsigned char name[252]
    ctypedef struct sd_key:
        int what
        uint64_t uuid[2]
        unsigned char name[252]
        int32_t id
    ctypedef struct sd_stored:
        const sd_word *at
        uint64_t bytes
    ctypedef struct sd_token:
        int kind
        int64_t number
        double real
        const unsigned char *bytes
        uint64_t size
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
    ctypedef struct sd_inbox:
        pass
    ctypedef struct sd_watch:
        void *data

    enum:
        SD_OK, SD_DIED, SD_TIMEOUT, SD_INTERRUPTED, SD_NESTED, SD_FORKED, SD_MISS, SD_DOUBT
        SD_FULL, SD_NO_MEMORY, SD_CORRUPT, SD_POISONED, SD_MISMATCH, SD_ERRNO, SD_DESCRIPTOR
        SD_KIND_ROBUST, SD_KIND_MULTIPROCESSING
        SD_UUID_INDEX, SD_NAME_INDEX, SD_ID_INDEX
        SD_DEFINITION, SD_NEXT_DEFINITION, SD_DATA, SD_WORK
        SD_PACK_NIL, SD_PACK_FALSE, SD_PACK_TRUE, SD_PACK_INT, SD_PACK_UNSIGNED, SD_PACK_FLOAT
        SD_PACK_STR, SD_PACK_BIN, SD_PACK_EXT, SD_PACK_ARRAY, SD_PACK_MAP, SD_PACK_ROOM
        SD_SMALL_MAX
        SD_HELD_MAX, SD_ATTACHED_MAX, SD_SETTINGS_BYTES, SD_SLOTS_MAX, SD_BLOB_MAX, SD_NAME_MAX
        SD_NAMED_MAX, SD_NAMED_NAME_MAX
        SD_CELL, SD_IDS, SD_EVENTS, SD_HEAP, SD_NEWS_MAX, SD_EVENTS_MAX, SD_RING_MIN
        SD_DIED_UNKNOWN, SD_HOLDER_DIED, SD_WHY_WORDS
        SD_PART_LIST, SD_PART_IDS, SD_PART_HEAP, SD_PARTS
        SD_SUM_CELLS, SD_SUMS
        SD_POISON_LIST, SD_POISON_IDS, SD_POISON_HEAP
        SD_LOCK_LIST, SD_LOCK_DOMAIN, SD_LOCK_MUTEX, SD_LOCK_JOB
        SD_COUNTED_MAX, SD_WAIT_SIZES
        SD_WATCH_CHANGE, SD_WATCH_MUTEX, SD_WATCH_TURN
    uint64_t SD_SINCE_DROPPED
    uint64_t SD_FOREVER, SD_TRY, SD_SPIN, SD_SLICE_NS, SD_CHECK_HOLD_NS
    uint64_t SD_FLAG_PERSISTENT, SD_FLAG_AUTOSTART
    uint64_t SD_FLAG_UNFINISHED
    uint64_t SD_FLAG_PRESENT(int)

    uint64_t sd_fork_epoch
    sd_thread *sd_self()
    sd_thread *sd_task_begin()
    void sd_task_end(sd_thread *)
    uint32_t sd_who_tid(uint64_t)
    uint64_t sd_who_start(uint64_t)
    uint64_t sd_identity(uint32_t, uint64_t)
    uint32_t sd_owner_pid(const sd_owner *, uint64_t)
    uint64_t sd_load(const sd_word *)
    uint64_t sd_load_acquire(const sd_word *)
    void sd_store(sd_word *, uint64_t)
    void sd_count(sd_word *)
    uint64_t sd_now()
    uint64_t SD_START_UNKNOWN
    uint64_t sd_process_start(uint32_t)
    bint sd_process_runs(uint32_t, uint64_t)
    uint32_t sd_process_of(uint32_t)
    bint sd_alive(uint64_t)
    uint64_t sd_geometry_fixed(uint64_t, uint64_t)
    int sd_format(int, uint64_t, uint64_t, uint64_t, uint64_t)
    int sd_map(int, sd_segment **, char *, size_t)
    int sd_descriptor(const sd_segment *)
    uint64_t sd_committed_bytes(const sd_segment *)
    void sd_detach(sd_segment *)
    void sd_unmap(sd_segment *)
    int sd_begin_in_child(sd_segment *, char *, size_t)
    int sd_mutex_slice(pthread_mutex_t *, uint64_t)
    uint32_t sd_mutex_owner(const pthread_mutex_t *)
    bint sd_mutex_awaited(const pthread_mutex_t *)
    uint32_t sd_mutex_victim(const pthread_mutex_t *)
    bint sd_mutex_busy(const pthread_mutex_t *)
    bint sd_mutex_watched()
    void sd_mutex_keep_waiters(pthread_mutex_t *)
    void sd_mutex_look(pthread_mutex_t *, const sd_owner *)
    uint32_t *sd_mutex_word(pthread_mutex_t *)
    int sd_list_lock(sd_segment *, uint64_t)
    int sd_list_wait(sd_segment *, uint64_t)
    int sd_list_entered(sd_segment *, bint)
    void sd_list_unlock(sd_segment *)
    bint sd_list_leave(sd_segment *, sem_t *, sd_thread *)
    int sd_list_unlock_for(sd_segment *, sd_thread *, uint64_t)
    int sd_slot_lock(sd_segment *, uint32_t, uint64_t)
    int sd_slot_wait(sd_segment *, uint32_t, uint64_t)
    int sd_slot_entered(sd_segment *, uint32_t)
    void sd_slot_unlock(sd_segment *, uint32_t, bint)
    int sd_slot_unlock_for(sd_segment *, uint32_t, sd_thread *, uint64_t)
    bint sd_slot_leave(sd_segment *, uint32_t, bint, uint64_t, sem_t *)
    void sd_why_set(sd_word *, const void *, size_t)
    void sd_why_clear(sd_word *)
    void sd_list_say(sd_segment *, const void *, size_t)
    uint32_t sd_next_taken(const sd_segment *, uint32_t, uint32_t)
    uint64_t sd_room(const sd_word *, uint64_t)
    void sd_wait_begin(sd_wait *, sd_segment *, int, uint32_t, void *)
    void sd_wait_end(sd_wait *)
    void sd_wait_note(sd_wait *, sd_segment *, int, uint32_t, void *)
    void sd_wait_forget(sd_wait *)
    uint32_t sd_waiters(const sd_segment *)
    bint sd_waiter_get(const sd_segment *, uint32_t, sd_waiting *)
    bint sd_take_over(sd_owner *, uint64_t)
    int sd_semaphore_try(sem_t *, sd_owner *)
    int sd_semaphore_slice(sem_t *, sd_owner *, uint64_t)
    bint sd_semaphore_leave(sem_t *, sd_owner *, uint64_t)
    void sd_recover_slot(sd_segment *, uint32_t, uint64_t, uint64_t)
    int sd_named_give(sd_segment *, const sd_lock_name *, unsigned *, uint64_t)
    int sd_named_get(const sd_segment *, unsigned, sd_lock_name *)
    int sd_named_wait(sd_segment *, unsigned, uint64_t)
    int sd_named_lock(sd_segment *, unsigned, uint64_t)
    void sd_named_unlock(sd_segment *, unsigned, bint)
    int sd_named_unlock_for(sd_segment *, unsigned, sd_thread *, uint64_t)
    int sd_named_died(const sd_segment *, unsigned, uint64_t *, uint64_t *)
    void sd_named_explain(sd_segment *, unsigned, const char *, size_t)
    int sd_ids_lock(sd_segment *, uint64_t)
    void sd_ids_unlock(sd_segment *)
    void sd_heap_unlock(sd_segment *)
    int sd_short_locks(sd_segment *, int, uint64_t)
    void sd_short_unlock(sd_segment *, int)
    void sd_tidy(sd_segment *, uint32_t)
    int sd_find(sd_segment *, const sd_key *, uint32_t *)
    int sd_mend(sd_segment *, int)
    int sd_scan(const sd_segment *, const sd_key *, uint32_t *)
    bint sd_matches(const sd_segment *, uint32_t, const sd_key *)
    int sd_find_to_lock(sd_segment *, const sd_key *, uint32_t *)
    int sd_verify(const sd_segment *, uint32_t, const sd_key *, sd_values *)
    int sd_values_get(const sd_segment *, uint32_t, sd_values *)
    int sd_values_settled(const sd_segment *, uint32_t, sd_values *)
    const unsigned char *sd_pack_next(const unsigned char *, const unsigned char *, sd_token *)
    unsigned char *sd_pack_int(unsigned char *, int64_t)
    unsigned char *sd_pack_float(unsigned char *, double)
    unsigned char *sd_pack_str(unsigned char *, const void *, uint32_t)
    unsigned char *sd_pack_map(unsigned char *, uint32_t)
    int sd_pack_add(const unsigned char *, uint64_t, const void *, uint32_t, int64_t,
                    unsigned char *, uint64_t *, sd_token *)
    uint64_t sd_blob_sum(const uint64_t *, int, uint64_t, const void *, uint64_t)
    void sd_name_get(const sd_segment *, uint32_t, uint64_t, unsigned char *)
    int sd_blob_get(const sd_segment *, uint32_t, const sd_values *, int, sd_stored *)
    uint64_t sd_small_bytes(const sd_values *)
    int sd_commit(sd_segment *, uint32_t, sd_values *, const sd_blob *, const unsigned char *,
                  const sd_news *, uint64_t)
    int sd_take_id(sd_segment *, int32_t *, uint64_t)
    void sd_prefetch_replace(const sd_segment *, uint32_t)
    void sd_prefetch_insert(const sd_segment *)
    int sd_free_slot(sd_segment *, sd_word **, uint32_t *)
    int sd_insert(sd_segment *, uint32_t, sd_word *, const uint64_t *, const unsigned char *,
                  const sd_values *, const sd_blob *, const sd_news *, uint64_t)
    int sd_remove(sd_segment *, uint32_t, const sd_news *, uint64_t)
    int sd_view_begin(const sd_segment *, uint32_t, sd_view *)
    int sd_view_fields(const sd_segment *, uint32_t, sd_view *)
    void sd_view_prefetch(const sd_segment *, uint32_t)
    int sd_view_blob(const sd_segment *, uint32_t, const sd_view *, int, sd_stored *)
    int sd_view_check(const sd_segment *, uint32_t, const sd_view *)
    int sd_view_blobs_check(const sd_segment *, uint32_t, const sd_view *)
    uint32_t sd_slot_count(const sd_segment *)
    int sd_slots(const sd_segment *, uint32_t *)
    uint64_t sd_unsealed(uint64_t)
    bint sd_count_sound(uint64_t)
    uint64_t sd_count_value(uint64_t)
    void sd_raise(sd_word *, uint64_t)
    int sd_sleep(const sd_word *, uint64_t, sd_word *, uint64_t, uint64_t)
    void sd_gate_enter()
    void sd_gate_leave()
    sd_inbox *sd_inbox_open()
    int sd_inbox_fd(const sd_inbox *)
    void sd_inbox_close(sd_inbox *)
    sd_watch *sd_inbox_take(sd_inbox *)
    int sd_watch_begin(sd_watch *, sd_inbox *, uint32_t *, uint32_t, int)
    void sd_watch_cancel(sd_watch *)
    int sd_events_lock_briefly(sd_segment *)
    void sd_events_settle_now(sd_segment *)
    void sd_events_unlock(sd_segment *)
    uint64_t sd_ring_count(const sd_segment *)
    int sd_ring_read(const sd_segment *, uint64_t, sd_event *)
    bint sd_ring_unsettled(const sd_segment *)
    bint sd_ring_works(const sd_segment *)
    int sd_settings_set(sd_segment *, const void *, uint64_t)
    int sd_settings_get(const sd_segment *, void *, uint64_t *)
    uint64_t SD_EXTENT_BYTES(uint64_t)
    sd_word *sd_extent_at(const sd_segment *, uint64_t)
    void sd_prefetch_read(const sd_word *, uint64_t)
    void sd_copy_out(void *, const sd_word *, size_t)

# What calls back into Python, so that the GIL stays held.
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
    int sd_check_ring(sd_check *, uint64_t)
    bint sd_check_ring_suspect(const sd_check *)
    void sd_check_ring_judge(sd_check *)
    int sd_check_prepare(sd_check *, int)
    int sd_check_judge(sd_check *, int, uint64_t)
    int sd_check_sum(sd_check *, int, uint64_t)
    int sd_check_sum_held(sd_check *, int, uint64_t)
