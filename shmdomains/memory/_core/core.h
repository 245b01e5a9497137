/* core.h - what the files of the core offer each other and the binding.
 *
 * The core knows slots, locks, indexes and blobs; nothing of XML, nothing of libvirt's rules, and
 * nothing of Python: a wait that must let other threads run or look at signals goes through
 * sd_wait_hook, which the binding sets.
 *
 * Every function that can fail returns one of the SD_ codes below; SD_OK is 0.
 */
#ifndef SHMDOMAINS_CORE_H
#define SHMDOMAINS_CORE_H

#include <features.h>
#include <stdbool.h>
#include <sys/types.h>

#if !defined __linux__ || !defined __GLIBC__ || !__GLIBC_PREREQ(2, 30)
#error "shmdomains needs Linux and the GNU C library 2.30 or newer (robust mutexes)"
#endif

#include "layout.h"

#include <semaphore.h>

enum {
    SD_OK = 0,
    SD_DIED,        /* locked, and the holder before us died */
    SD_TIMEOUT,     /* the deadline passed */
    SD_INTERRUPTED, /* the wait hook wants out (a signal handler raised) */
    SD_NESTED,      /* this very thread has it: a signal handler asks in the middle of a wait */
    SD_FORKED,      /* a signal handler forked in the middle of a wait, and this is the child */
    SD_MISS,        /* not there */
    SD_DOUBT,       /* not seen, but writers were about: look again under the lock */
    SD_FULL,        /* no slot, no cell, no id left within the limits */
    SD_NO_MEMORY,   /* the system would not commit more memory (errno says why) */
    SD_CORRUPT,     /* a value in the segment can not be right */
    SD_POISONED,    /* the segment says that a repair failed */
    SD_MISMATCH,    /* another layout, machine, boot, PID namespace: see sd_map() */
    SD_ERRNO,       /* a system call failed; errno */
    SD_DESCRIPTOR   /* the segment's descriptor is needed, and it is not ours any more */
};

enum { SD_POISON_LIST = 1, SD_POISON_IDS = 2, SD_POISON_HEAP = 3 };

#define SD_FOREVER UINT64_MAX
#define SD_TRY 0ull
#define SD_SLICE_NS 50000000ull /* one lock slice: 50 ms */
#define SD_HELD_MAX 1000

/* --- geometry: where everything lies, from two limits ---------------------------------------- */

typedef struct {
    uint64_t max_slots, heap_cells, total_bytes;
    uint64_t attached, settings, slots, names, map, heap; /* offsets */
    unsigned levels;                                      /* of each index */
    uint64_t table[SD_INDEXES][SD_INDEX_LEVELS];          /* offsets */
} sd_geometry;

/* SD_FULL when the limits are out of range. */
int sd_geometry_make(sd_geometry *geometry, uint64_t max_slots, uint64_t heap_cells);
/* Bytes that a segment takes besides its heap and the heap's map. */
uint64_t sd_geometry_fixed(uint64_t max_slots);

/* --- a mapped segment, private to this process ----------------------------------------------- */

typedef struct sd_segment {
    unsigned char *base;
    int fd;                /* never used but through sd_descriptor(); -1: detached */
    dev_t device;
    ino_t inode;
    sd_geometry at;
    uint64_t kind, seed, id[2], pid_namespace;
    sd_header *header;
    sd_slot *slots;
    sd_names *names;
    sd_word *attached, *map, *heap;
    sd_word *table[SD_INDEXES][SD_INDEX_LEVELS];
    unsigned users;        /* objects of this process that refer to it */
    unsigned open;         /* those that were not closed */
    unsigned handles;      /* to its records, that are still referred to */
    unsigned inside;       /* threads of this process that wait */
    unsigned held;         /* locks that threads of this process took and did not give back, list
                              lock included; those that ended with one are still counted */
    uint64_t list_nonce;   /* the thread of ours that holds the list lock, or 0 */
    unsigned list_nested;  /* how deep in signal handlers it was then */
    void *list_taker;      /* the binding's object that took it */
    uint64_t epoch;        /* fork epoch in which we entered the attached table */
    struct sd_segment *next;
} sd_segment;

/* Format an empty file of any size as a segment (ours alone, not yet published).
 * SD_FULL: limits out of range.  SD_NO_MEMORY.  SD_ERRNO. */
int sd_format(int fd, uint64_t kind, uint64_t max_slots, uint64_t heap_cells);

/* The checksum of a header's constants. */
uint64_t sd_constants_sum(const sd_header *header);

/* Map the segment behind `fd`, or find it if this process has it mapped already.  `fd` stays the
 * caller's; the segment keeps a duplicate.  SD_MISMATCH with a reason in `why`; SD_CORRUPT;
 * SD_ERRNO. */
int sd_map(int fd, sd_segment **out, char *why, size_t why_size);
/* Give up what others can see of us - the entry in the attached table, the flock - once nothing is
 * open, nobody waits, and no handle or lock is left. */
void sd_detach(sd_segment *segment);
/* Drop one use; unmaps after the last one unless a lock of ours is held: then sd_map() does, once
 * its thread has ended. */
void sd_unmap(sd_segment *segment);
/* The segment of this process with this identity, or NULL. */
sd_segment *sd_mapped(const uint64_t id[2]);

/* The segment's descriptor, or -1 when this process closed it, whoever has its number now. */
int sd_descriptor(const sd_segment *segment);
/* Commit `bytes` at `offset`.  SD_NO_MEMORY with errno.  SD_DESCRIPTOR: it was lost, and this kernel
 * needs it. */
int sd_commit_memory(sd_segment *segment, uint64_t offset, uint64_t bytes);
/* The first reason stays.  Called by who holds the lock whose repair failed. */
/* As the watermarks have it. */
uint64_t sd_committed_bytes(const sd_segment *segment);
void sd_poison(sd_segment *segment, uint64_t reason, uint64_t at);
void sd_enter_attached(sd_segment *segment);
/* First use in a forked child: nothing of its parent's is held.  SD_MISMATCH: the child lives in
 * another PID namespace, where the thread numbers in locks mean nothing. */
int sd_begin_in_child(sd_segment *segment);
void sd_leave_attached(sd_segment *segment);

/* --- threads and processes ------------------------------------------------------------------- */

/* A lock whose handle was dropped by another thread than its owner: the owner frees it. */
typedef struct sd_orphan {
    sd_segment *segment;
    uint32_t slot;
    struct sd_orphan *next;
} sd_orphan;

/* What the last locks that a thread took needed of it, for who wants to tell: clear it, take a lock,
 * and look. */
typedef struct {
    bool repaired;     /* what the lock protects was rebuilt */
    bool died;         /* its holder had died */
    uint64_t who, pid; /* that holder as it had signed; 0: it had not */
    uint64_t freed;    /* cells of garbage */
} sd_repair;

/* One thread of this process.  Nodes are handed on when a thread ends and never freed, so a handle
 * may look at the node of its last owner: another nonce there says that the thread is gone. */
typedef struct sd_thread {
    uint64_t epoch;     /* of fork */
    uint64_t nonce;     /* this thread; never used again in this process or its children */
    uint64_t who;       /* see sd_identity() */
    uint64_t pid;
    unsigned held;      /* slots this thread holds, in all segments */
    unsigned lists;     /* list locks it holds */
    unsigned short_wait; /* it waits for one of the core's own short locks */
    unsigned nested;    /* signal handlers running inside a wait of this thread */
    void *records;      /* the binding's list of its locked handles */
    sd_orphan *orphans;
    sd_repair repair;
    struct sd_thread *next;
} sd_thread;

extern uint64_t sd_fork_epoch;
/* Every call asks for it, many of them more than once: not by a call of __tls_get_addr() each. The
 * price is a word of the few hundred bytes that the loader keeps for modules that are loaded late. */
extern _Thread_local sd_thread *sd_this_thread __attribute__((tls_model("initial-exec")));
sd_thread *sd_thread_begin(void);

static inline sd_thread *sd_self(void)
{
    sd_thread *self = sd_this_thread;
    if (__builtin_expect(self && self->epoch == sd_fork_epoch, 1)) return self;
    return sd_thread_begin();
}

/* A thread, told apart from later ones of the same number by when its process started:
 * tid | start << 22 (pids are below 2^22; start in clock ticks since boot). */
uint64_t sd_identity(uint32_t tid, uint64_t start);
/* Start of a process in clock ticks since boot, 0 when there is no such process,
 * SD_START_UNKNOWN when this process has no descriptor or memory left to look. */
#define SD_START_UNKNOWN UINT64_MAX
uint64_t sd_process_start(uint32_t pid);
/* Does the process run that started then?  0 is a start that nobody could look up, when any process
 * of this number will do.  Who can not look says yes: a wait goes on then, and nothing is taken. */
bool sd_process_runs(uint32_t pid, uint64_t start);
/* Was it this process's own lack of descriptors or memory? */
bool sd_exhausted(int error);
/* The process that thread `tid` belongs to, 0 when there is none. */
uint32_t sd_process_of(uint32_t tid);
/* Does the thread with this identity still run?  Yes if that can not be found out. */
bool sd_alive(uint64_t who);
uint64_t sd_now(void);        /* CLOCK_MONOTONIC, ns */
uint64_t sd_now_coarse(void); /* CLOCK_MONOTONIC_COARSE, ns */

/* --- lock.c ---------------------------------------------------------------------------------- */

/* Waits at most until `deadline` and at most one slice; called with `mutex` seen busy, and never
 * while one of the core's own short locks is held.  The binding's version lets other threads run
 * and looks at signals (SD_INTERRUPTED, SD_FORKED); with `mutex` NULL it only looks at signals. */
extern int (*sd_wait_hook)(pthread_mutex_t *mutex, uint64_t deadline);
/* The same without a look at signals: no Python runs in this thread meanwhile. */
extern int (*sd_slice_hook)(pthread_mutex_t *mutex, uint64_t deadline);

int sd_mutex_init(pthread_mutex_t *mutex);
/* SD_OK SD_DIED SD_TIMEOUT SD_CORRUPT; SD_NESTED; lock: SD_INTERRUPTED, SD_FORKED. */
int sd_mutex_try(pthread_mutex_t *mutex);
int sd_mutex_slice(pthread_mutex_t *mutex, uint64_t deadline); /* no signals, no hook */
int sd_mutex_lock(pthread_mutex_t *mutex, uint64_t deadline);
int sd_mutex_lock_briefly(pthread_mutex_t *mutex); /* one slice, signals left alone */
int sd_mutex_consistent(pthread_mutex_t *mutex);
void sd_mutex_unlock(pthread_mutex_t *mutex);
bool sd_mutex_sound(const pthread_mutex_t *mutex); /* its kind word is the one we gave it */
uint32_t sd_mutex_owner(const pthread_mutex_t *mutex);          /* tid, 0 if free */
/* The thread that died holding it; 0: nobody did, or it is not known. */
uint32_t sd_mutex_victim(const pthread_mutex_t *mutex);
bool sd_mutex_busy(const pthread_mutex_t *mutex); /* held, or left by a dead holder */

/* The list lock.  lock = the mutex, then entered(); unlock = leaving(), then the mutex.  For
 * lock="multiprocessing" the binding puts its own lock in the mutex's place. */
int sd_list_lock(sd_segment *segment, uint64_t deadline);
int sd_list_entered(sd_segment *segment, bool died);
void sd_list_leaving(sd_segment *segment);
void sd_list_unlock(sd_segment *segment);

/* A slot's lock, likewise.  `given`: whether the holder was given the domain, so that it may clear
 * what stands there about the death of an earlier one. */
int sd_slot_lock(sd_segment *segment, uint32_t slot, uint64_t deadline);
int sd_slot_entered(sd_segment *segment, uint32_t slot);
void sd_slot_leaving(sd_segment *segment, uint32_t slot, bool given);
void sd_slot_unlock(sd_segment *segment, uint32_t slot, bool given);

/* lock="multiprocessing": become the owner in place of a dead one.  False: somebody was faster. */
bool sd_take_over(sd_owner *owner, uint64_t dead);
/* Wait for the semaphore behind such a lock, a slice at most or until a signal comes, and sign if it
 * was to be had.  Without the GIL: Python ends the threads that want it back when it shuts down, and
 * a lock that was taken and not signed is locked for good.  SD_OK SD_TIMEOUT */
int sd_semaphore_slice(sem_t *semaphore, sd_owner *owner, uint64_t deadline);

int sd_ids_lock(sd_segment *segment, uint64_t deadline);
void sd_ids_unlock(sd_segment *segment);
/* The heap's is the last lock and may be wanted while the id lock is held, so signals are left
 * alone and it waits for a slice at most; who waits longer lets go of the id lock in between. */
int sd_heap_lock_briefly(sd_segment *segment);
void sd_heap_unlock(sd_segment *segment);

/* --- index.c --------------------------------------------------------------------------------- */

uint64_t sd_hash_uuid(const sd_segment *segment, const uint64_t uuid[2]);
uint64_t sd_hash_name(const sd_segment *segment, const unsigned char *name, size_t bytes);
uint64_t sd_hash_id(const sd_segment *segment, int32_t id);

typedef struct {
    const sd_word *table;
    uint64_t mask, at, left, tag;
} sd_probe;

#define SD_ENTRY_SLOT(entry) ((uint32_t)((entry) & ((1u << 24) - 1)) - 1)

int sd_probe_begin(const sd_segment *segment, int index, uint64_t hash, sd_probe *probe);
/* SD_OK SD_MISS SD_CORRUPT */
int sd_probe_next(const sd_segment *segment, sd_probe *probe, uint32_t *slot);

/* All of these with the index's lock held and its sequence odd. */
int sd_index_insert(sd_segment *segment, int index, uint64_t hash, uint32_t slot);
int sd_index_delete(sd_segment *segment, int index, uint64_t hash, uint32_t slot);
int sd_index_clear(sd_segment *segment, int index);
/* Make room for one more, while the sequence is even.  SD_NO_MEMORY leaves all as it was. */
int sd_index_reserve(sd_segment *segment, int index);
sd_word *sd_index_sequence(sd_segment *segment, int index);
void sd_sequence_begin(sd_word *sequence);
void sd_sequence_end(sd_word *sequence);

/* --- heap.c ---------------------------------------------------------------------------------- */

#define SD_EXTENT_BYTES(extent) ((extent) & ((1ull << 25) - 1))
#define SD_EXTENT_CELL(extent) ((extent) >> 25)
#define SD_EXTENT(cell, bytes) ((uint64_t)(cell) << 25 | (bytes))

static inline uint64_t sd_cells(uint64_t bytes)
{
    return (bytes + SD_CELL - 1) / SD_CELL;
}

/* Is it a descriptor that may be followed?  0 is not. */
bool sd_extent_valid(const sd_segment *segment, uint64_t extent);
static inline sd_word *sd_extent_at(const sd_segment *segment, uint64_t extent)
{
    return segment->heap + SD_EXTENT_CELL(extent) * (SD_CELL / 8);
}

/* Ask for a line that will be stored to.  Of __builtin_prefetch(at, 1) gcc makes one for reading
 * unless it is told that the processor has the other; one that has not takes this for nothing. */
static inline void sd_ask_to_store(const void *at)
{
#ifdef __x86_64__
    __asm__ volatile("prefetchw %0" : : "m"(*(const char *)at));
#else
    __builtin_prefetch(at, 1);
#endif
}

/* Ask for the lines of a blob before they are used; what a long one has beyond a page comes by
 * itself. */
static inline void sd_ask_to_read(const sd_word *at, uint64_t bytes)
{
    const sd_word *end = at + (bytes < SD_PAGE ? bytes : SD_PAGE) / 8;
    for (; at < end; at += SD_CACHE_LINE / 8) __builtin_prefetch(at, 0);
}

static inline void sd_ask_to_write(const sd_word *at, uint64_t bytes)
{
    const sd_word *end = at + (bytes < SD_PAGE ? bytes : SD_PAGE) / 8;
    for (; at < end; at += SD_CACHE_LINE / 8) sd_ask_to_store(at);
}

/* The bits of [cell, cell + cells) that lie in word `w` of the map. */
static inline uint64_t sd_map_bits(uint64_t w, uint64_t cell, uint64_t cells)
{
    uint64_t first = w * 64 > cell ? 0 : cell - w * 64;
    uint64_t end = cell + cells - w * 64;
    uint64_t low = ~0ull << first;
    return end >= 64 ? low : low & ((1ull << end) - 1);
}

/* Heap lock and slot lock held.  allocate: SD_FULL, SD_NO_MEMORY.  free: how many cells. */
int sd_heap_allocate(sd_segment *segment, sd_word *descriptor, uint64_t bytes);
uint64_t sd_heap_free(sd_segment *segment, sd_word *descriptor);
void sd_heap_mark(sd_segment *segment, uint64_t cell, uint64_t cells, bool used);

/* --- record.c -------------------------------------------------------------------------------- */

/* A private copy of the fields. */
typedef struct {
    int32_t id, pid;
    uint16_t state, reason;
    uint64_t flags;
    uint64_t version[SD_BLOBS];
} sd_values;

typedef struct {
    int what; /* SD_UUID_INDEX … SD_ID_INDEX */
    uint64_t uuid[2];
    unsigned char name[SD_NAME_MAX + 1]; /* length, then bytes */
    int32_t id;
} sd_key;

/* A change to a blob: keep, clear (bytes NULL), or set. */
typedef struct {
    bool change;
    const void *bytes;
    uint64_t size;
} sd_blob;

/* Find without any lock; a hit must be verified under the slot lock.  SD_OK SD_MISS SD_DOUBT
 * SD_CORRUPT.  Under the index's lock a miss is never in doubt. */
int sd_find(sd_segment *segment, const sd_key *key, uint32_t *slot);
/* The same, faster for who will lock what was found. */
int sd_find_to_lock(sd_segment *segment, const sd_key *key, uint32_t *slot);
/* Is it that domain?  A hint. */
bool sd_matches(const sd_segment *segment, uint32_t slot, const sd_key *key);
/* The same once its lock is held, and then the truth: SD_OK, and its committed values; SD_MISS;
 * SD_CORRUPT. */
int sd_verify(const sd_segment *segment, uint32_t slot, const sd_key *key, sd_values *values);

/* The committed values; slot lock held.  SD_CORRUPT: what was read can not be what was written. */
int sd_values_get(const sd_segment *segment, uint32_t slot, sd_values *values);
/* The committed values while others may commit: those of a `cur` that stood still. */
int sd_values_settled(const sd_segment *segment, uint32_t slot, sd_values *values);
/* name: 252 bytes, length first, 0: name or uuid is damaged.  The truth with the slot's or the list
 * lock held; without them a hint, or one look of sd_view_begin(). */
void sd_name_get(const sd_segment *segment, uint32_t slot, uint64_t flags, unsigned char *name);
/* Whether the uuid is the one that was written; the truth with the slot's or the list lock held. */
bool sd_uuid_sound(const sd_slot *record);
/* What stands in front of a blob: so that no other bytes pass for it, be they another domain's, of
 * another kind or of another time. */
uint64_t sd_blob_sum(const uint64_t uuid[2], int blob, uint64_t version, const void *bytes,
                     uint64_t size);
/* The extent of a blob that is present, checksum first; slot lock held.  SD_CORRUPT. */
int sd_blob_get(const sd_segment *segment, uint32_t slot, const sd_values *values, int blob,
                uint64_t *extent);

/* Ask for the lines that a change of the definition, or an insert, will touch; then it finds them
 * there once the caller has made the blob.  Nothing is promised by it. */
void sd_ask_to_replace(const sd_segment *segment, uint32_t slot);
void sd_ask_to_insert(const sd_segment *segment); /* list lock held */

/* Commit.  Slot lock held; with a new name also the list lock (and the caller has checked that
 * nobody has it).  On failure nothing has changed. */
int sd_commit(sd_segment *segment, uint32_t slot, const sd_values *values,
              const sd_blob blobs[SD_BLOBS], const unsigned char *name, uint64_t deadline);
/* The id lock if `ids`, and the heap lock if `heap`.  Signals run only while neither is held. */
int sd_short_locks(sd_segment *segment, bool ids, bool heap, uint64_t deadline);
/* The next id, never given out again.  Slot lock held. */
int sd_take_id(sd_segment *segment, int32_t *id, uint64_t deadline);

/* A FREE slot to try: see record.c.  List lock held. */
int sd_free_slot(sd_segment *segment, sd_word **link, uint32_t *slot);
/* A new domain in that slot, committed.  List lock and the slot's lock held; the caller has
 * checked for duplicates.  On failure nothing has changed. */
int sd_insert(sd_segment *segment, uint32_t slot, sd_word *link, const uint64_t uuid[2],
              const unsigned char *name, const sd_values *values, const sd_blob blobs[SD_BLOBS],
              uint64_t deadline);
/* Remove.  List lock and slot lock held. */
int sd_remove(sd_segment *segment, uint32_t slot, uint64_t deadline);
/* Free what no field copy counts, after a death or where freeing was put off.  Slot lock held. */
void sd_tidy(sd_segment *segment, uint32_t slot);

/* A committed record without any lock: begin, copy blobs that are wanted, then check that these are
 * still the view's (or, more than is needed, that nothing moved at all).
 * SD_OK (with an empty name if name or uuid is damaged), SD_MISS (not live), SD_DOUBT (a writer came
 * in between: again), SD_CORRUPT (nobody came, and the fields are damaged, or whether it is live; the
 * view is filled all the same, for who says what is wrong). */
typedef struct {
    uint64_t life, cur;
    uint64_t uuid[2];
    sd_values values;
    unsigned char name[SD_NAME_MAX + 1];
} sd_view;

int sd_view_begin(const sd_segment *segment, uint32_t slot, sd_view *view);
int sd_view_extent(const sd_segment *segment, uint32_t slot, const sd_view *view, int blob,
                   uint64_t *extent); /* SD_OK, SD_MISS (none), SD_DOUBT */
int sd_view_check(const sd_segment *segment, uint32_t slot, const sd_view *view);
int sd_view_blobs_check(const sd_segment *segment, uint32_t slot, const sd_view *view);

/* How many slots there are.  One look: the count may rise under the eyes of who holds only the id or
 * the heap lock, and the watermark is raised before it.  SD_CORRUPT: one of the two is damaged. */
static inline int sd_slots(const sd_segment *segment, uint32_t *slots)
{
    uint64_t count = sd_unsealed(sd_load_acquire(&segment->header->slot_count));
    uint64_t committed = sd_unsealed(sd_load(&segment->header->slots_committed));
    bool sound = committed <= segment->at.max_slots && count <= committed;
    *slots = sound ? (uint32_t)count : 0;
    return sound ? SD_OK : SD_CORRUPT;
}

static inline uint32_t sd_slot_count(const sd_segment *segment) /* 0 when damaged */
{
    uint32_t slots;
    sd_slots(segment, &slots);
    return slots;
}

static inline const sd_fields *sd_copy_of(const sd_slot *slot, uint64_t cur)
{
    return (cur & 1) ? &slot->copy1 : &slot->copy0;
}

/* --- settings (list lock held to write) ------------------------------------------------------ */

int sd_settings_set(sd_segment *segment, const void *bytes, uint64_t size);
/* Lock-free.  `out` has SD_SETTINGS_BYTES. */
int sd_settings_get(const sd_segment *segment, void *out, uint64_t *size);

/* --- recover.c: what the next holder repairs ------------------------------------------------- */

/* The first three poison the segment when they fail. */

int sd_recover_list(sd_segment *segment);
int sd_recover_ids(sd_segment *segment);
int sd_recover_heap(sd_segment *segment);
void sd_recover_slot(sd_segment *segment, uint32_t slot, uint64_t who, uint64_t pid);
void sd_tidy_free_slots(sd_segment *segment);

/* --- check.c: every invariant, from outside -------------------------------------------------- */

typedef void (*sd_report)(void *context, const char *invariant, const char *what);
typedef struct {
    uint64_t domains, active, slots, extents, cells, garbage;
} sd_tally;

/* What belongs together, by the lock that protects it. */
enum { SD_PART_LIST = 0, SD_PART_IDS = 1, SD_PART_HEAP = 2, SD_PARTS = 3 };

/* Numbers that must be equal. */
enum {
    SD_SUM_LISTED = 0, /* entries of UUID and name index, domains */
    SD_SUM_FREE = 1,   /* slots on the free list, and domains */
    SD_SUM_IDS = 2,    /* entries of the id index, active domains */
    SD_SUM_USED = 3,   /* cells that are marked, and their count */
    SD_SUM_CELLS = 4,  /* cells that are named, once, and marked */
    SD_SUMS = 5
};

#define SD_CHECK_HOLD_NS 30000000ull /* a checker's longest hold: less than a slice */

typedef struct sd_check sd_check;

/* NULL: no memory.  `states`: how many there are, which only the caller knows.  What is reported
 * is proved. */
sd_check *sd_check_begin(sd_segment *segment, unsigned states, sd_report report, void *context);
void sd_check_end(sd_check *check);

/* Without a lock: all that a record says of itself, and which records are suspect.  SD_TIMEOUT: not
 * all by `until`; call again to go on.  SD_CORRUPT: nothing more can be looked at. */
int sd_check_records(sd_check *check, uint64_t until);
const sd_tally *sd_check_tally(const sd_check *check);
uint32_t sd_check_suspects(const sd_check *check, int part);
uint64_t sd_check_overlooked(const sd_check *check); /* suspects that were too many to remember */

int sd_check_part(int sum);                          /* to which a sum belongs */

/* Without a lock.  SD_OK: it is right.  SD_DOUBT: it seems wrong, or others were at work: try again, or
 * under the lock.  SD_TIMEOUT: call again to go on.  SD_ERRNO: no memory. */
int sd_check_sum(sd_check *check, int sum, uint64_t until);

/* With the part's lock held, or in a poisoned segment, where nobody gets it.  judge: look at the
 * suspects again; SD_TIMEOUT: some are left.  sum_held: SD_OK: what is wrong was reported; SD_TIMEOUT:
 * there is too much of it; SD_DOUBT: it has grown since prepare(). */
int sd_check_prepare(sd_check *check, int sum); /* before the lock is taken; SD_ERRNO */
int sd_check_judge(sd_check *check, int part, uint64_t until);
int sd_check_sum_held(sd_check *check, int sum, uint64_t until);

#endif
