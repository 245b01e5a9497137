/* layout.h - the segment, byte by byte.
 *
 * One mapping, at its full size from the first moment.  Memory is committed region by region,
 * before use, and nothing is ever moved or shrunk.  Offsets are not stored: sd_geometry_make()
 * derives them from two limits (slots, heap cells), so a damaged header cannot point anywhere.
 *
 *   header       2 pages      limits, locks, counters
 *   attached     4,096 words  who is attached
 *   settings     2 x 8 KiB    what the list remembers for its users, double-buffered
 *   named        64 x 256 B   locks that belong to no domain, each with its name
 *   indexes      3 x levels   UUID, name, id -> slot; table k has 1024 << k entries
 *   slots        384 B each   mutex, identity, both field copies, extent descriptors
 *   names        512 B each   two name buffers a slot; small data lies in the spare one
 *   counters     256 B each   what each attached process counted
 *   waiters      64 B each    who sleeps for a lock
 *   ring         320 B each   the last events
 *   map          1 bit a cell which heap cells are in use
 *   heap         64 B a cell  the blobs
 *
 * Locks and their order:  named -> list -> slot (a second slot only under the list lock) -> id ->
 * event; the heap lock comes after a slot's, and is never held together with the id or the event
 * lock.  A second named lock is never waited for without a time-out.
 *
 * Fields, names, blobs and settings are double-buffered: one commit word says which of the two is
 * current, and the other one, the spare, is free to be written.
 *
 * Why it survives SIGKILL.  SIGKILL leaves a prefix of the stores that the victim executed.  The
 * kernel marks the robust mutexes it held, and the next holder repairs what the lock protects.  So
 * each rule below needs only compiler order.  Every commit word is stored by sd_publish(), a
 * release store *and* a release fence: a release store alone lets later stores move above it.
 *
 * I1  life, uuid and names change only under list lock + slot lock; the store of `life` commits an
 *     insert or a remove.  What is in the spare name buffer besides is I7's.
 * I2  A descriptor changes only under slot lock + heap lock.  Allocate: write the spare descriptor,
 *     then mark the map.  Free: clear the descriptor, then the map.  Every extent in use is named
 *     by a descriptor, so the map can be rebuilt from descriptors alone.  The rebuild keeps every
 *     extent that is named, current or spare: the slot's holder may be between allocating and
 *     committing.
 * I3  Field copies and `cur` change only under the slot lock: the spare copy first, then `cur`.
 *     Readers load life and cur, copy the fields, and load both again; then they copy blobs, and
 *     check that life and the committed versions are still the same.
 * I4  The id index, its sequence and next_id belong to the id lock, which is held from the first
 *     index store over the flip of `cur` to the last.  next_id is stored before an id is used.
 * I5  A sequence (a seqlock's) is odd from before the first identity commit store to after the last
 *     index store, and never while waiting for a lock.  Repair: seq |= 1, rebuild, seq + 1.  A
 *     lock-free hit is verified under the slot lock; a lock-free miss is believed only if the
 *     sequence was even and unchanged.
 * I6  A next definition becomes the definition where it lies: the commit toggles SWAPPED in the
 *     spare copy, and so `cur` says that the two blobs have changed places.  No descriptor, map or
 *     byte of the heap changes, so a domain can be stopped when the heap is full.  A dead writer
 *     has done it or not; the old definition is garbage like any other.  The blob keeps its version
 *     and with it its checksum.
 * I7  Data of up to SD_SMALL_MAX bytes lies in the spare name buffer, in one of its two halves, as
 *     SD_FLAG_CHOICE has it; its version says so, and how many bytes.  Slot lock: the half that does
 *     not count, then `cur`.  No descriptor, map or byte of the heap changes, so it takes no other
 *     lock.  A dead writer leaves garbage in the half that does not count.  A rename, which needs
 *     the whole buffer, moves small data to the heap in a commit of its own right before it writes
 *     the name there: in one commit, its death between the two would leave neither.  A death between
 *     those two commits leaves the name as it was, and the data in the heap.  What may fail comes
 *     before both, so a rename that failed has changed nothing.
 *
 * W1  Whoever waits for a commit sleeps on the low half of `cur`, which every commit changes, and
 *     the end of a domain, too.  It raises `waiting` to the number of the commit that it waits for,
 *     looks at `cur` again, and sleeps; the kernel compares once more.  The writer stores `cur`, a
 *     full fence, and looks whether `waiting` has reached that number: one of the two sees the
 *     other.  `waiting` is lowered only from a number that no waiter can have stored, which is
 *     damage, so nobody can hide a sleeper from a writer.  What a dead waiter left is behind `cur`
 *     after two commits at most.  A writer that dies between the store and the
 *     wake costs its waiters one slice.  `event_count` and `any_seq` are slept on in the same way.
 * E1  A commit with events holds the event lock.  It writes their entries behind `event_count`,
 *     commits, and then stores `event_count`: that publishes them.  The record tells whether the
 *     commit happened: a change stores the number of its last event in the field copy, an insert
 *     and a remove store `life`.  So the next holder of a dead writer's event lock publishes what
 *     it finds behind `event_count`, or clears it.  Commits without events copy the number along
 *     and never take the lock; an insert does not copy it, for it is another domain's.  An entry
 *     that is not published is cleared from the last to the first, so none of them passes for a
 *     later attempt's.  Where there is no memory for the entries, their numbers are published before
 *     the commit: readers then miss them.
 *
 * Who waits, and how often anybody did, is for people: nothing is decided by it, so it needs no lock.
 *
 * V1  A thread that is about to sleep for a lock takes a place of the table of waiters, by compare-
 *     and-swap of its `who`, and gives it back by another.  A dead waiter leaves its name, and the
 *     place is taken over once no free one is left.  Where there is no place, or no memory for one,
 *     the thread waits all the same, and is not listed.  The checksum is stored last, includes
 *     `who`, and is cleared first, so no words pass for another wait's.
 * V2  A process counts in the block of its place in the attached table, and nobody else writes that
 *     block: its threads do under the GIL.  So a count is a load and a store.  These stores alone
 *     have no crash point: each leaves a right count by itself, before it and after it, and nothing
 *     else depends on them.  The block counts only while its `who` is the process that the attached
 *     table has in this place, and that process runs; `who` is 0 while the next one clears it.  What
 *     a flipped bit makes of a number is believed, as there is nothing to compare it with.
 *
 * Damage.  A flipped bit must not make a wrong domain under a right name.  So what says which
 * domain this is, and in which state, carries a checksum: the header's constants (`sum`), name and
 * uuid, the uuid alone (for a find by id, which need not read the name), the field copies with
 * their `cur`, each blob, small data too, with uuid, kind and version.  Words that stand alone are
 * sealed with their own complement.  A checksum is written into the spare together with what it
 * covers, so it commits with it and needs no repair.  What is derived (indexes, counts, map, hints)
 * has no checksum: it is verified against the record, and rebuilt.
 *
 * Every word of the segment that changes after creation is a 64-bit word written by the inlines at
 * the end of this file; only the attached table, the
 * waiters' `who`, both watermarks of V1 and V2, and the owners of lock="multiprocessing" are written
 * by compare-and-swap, and the mutexes by glibc and by unlock_for.c.  Whoever watches a mutex that is
 * held, or has taken one after such a watch, sets FUTEX_WAITERS in it, as a waiter of glibc's does;
 * what a dead one leaves costs one wake of nobody (observe.c).
 */
#ifndef SHMDOMAINS_LAYOUT_H
#define SHMDOMAINS_LAYOUT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SD_MAGIC 0x31534e4d4f444853ull /* "SHDOMNS1", little endian */
#define SD_LAYOUT 7u

#define SD_CACHE_LINE 64
#define SD_PAGE 4096u
#define SD_ATTACHED_MAX 4096u
#define SD_COUNTED_MAX 1024u /* of the attached: whoever has a later place counts for itself */
#define SD_WAITERS_MAX 1024u
#define SD_SETTINGS_BYTES 8192u
#define SD_NAMED_MAX 64u
#define SD_NAMED_NAME_MAX 63u
#define SD_INDEXES 3
#define SD_INDEX_BITS 10 /* entries of table 0: 1 << 10 */
#define SD_INDEX_LEVELS 16
#define SD_SLOTS_MAX ((1u << 24) - 2) /* an index entry has 24 bits for slot + 1 */
#define SD_CELL 64u
#define SD_BLOBS 4
#define SD_BLOB_MAX (16u << 20)
#define SD_EXTENT_MAX (SD_BLOB_MAX + 8) /* a blob and its checksum, which comes first */
#define SD_NAME_MAX 251u
#define SD_SMALL_MAX 120u /* bytes of data that lie in the record, I7 */
#define SD_SMALL_WORDS 16  /* of them and their checksum, which comes first */
#define SD_HINTS 64
#define SD_ID_END (1ull << 31)
#define SD_EVENTS_MAX (1u << 24)
#define SD_RING_MIN 64u
#define SD_RING_STEP 256u /* entries that get memory at a time */

typedef _Atomic uint64_t sd_word;

enum { SD_KIND_ROBUST = 1, SD_KIND_MULTIPROCESSING = 2 };
enum { SD_UUID_INDEX = 0, SD_NAME_INDEX = 1, SD_ID_INDEX = 2 };
/* SD_WORK: what is under way in the domain, steps of a rule, intentions and jobs (rules/work.py). */
enum { SD_DEFINITION = 0, SD_NEXT_DEFINITION = 1, SD_DATA = 2, SD_WORK = 3 };

/* The changeable fields of a domain; two copies a slot, `cur & 1` says which one is current.
 * Slot lock (I3).  A dead writer leaves garbage in the spare copy; the next commit overwrites it.
 *
 * Each copy carries a checksum of itself and of the `cur` that it was written for, and `cur` one of
 * its own (sd_count_seal), so that no flipped bit makes another state of the domain. */
typedef struct {
    sd_word ids;               /* low half: id (int32, -1 inactive); high half: pid (int32, -1) */
    sd_word status;            /* bits 0-15 state, 16-31 reason, 32-50 SD_FLAG_*, 51.. checksum */
    sd_word version[SD_BLOBS]; /* value of `cur` that brought this blob in, and whether as the next
                                  definition (SD_BORN_NEXT), or as small data of how many bytes
                                  (SD_SMALL_SHIFT): decoders cache by it */
    sd_word event;   /* number of the domain's last event, or 0 (E1) */
    sd_word started; /* when process `pid` started, ticks since boot; 0: unknown, or there is none */
} sd_fields;

#define SD_FLAG_PERSISTENT (1ull << 32)
#define SD_FLAG_AUTOSTART (1ull << 33)
#define SD_FLAG_NAME (1ull << 34)               /* which name buffer is current */
#define SD_FLAG_SWAPPED (1ull << 35)            /* the two definitions have changed places, I6 */
#define SD_FLAG_UNFINISHED (1ull << 36)         /* SD_WORK has a step: settle it before all else */
#define SD_FLAG_CHOICE(b) (1ull << (40 + (b)))  /* which descriptor of blob b is current */
#define SD_FLAG_PRESENT(b) (1ull << (44 + (b))) /* whether there is a blob b at all */

/* One commit may bring in both definitions; this tells their versions apart, for good. */
#define SD_BORN_NEXT (1ull << 48)

/* Of the version of data: bytes that lie in the record (I7), or 0: they lie in the heap. */
#define SD_SMALL_SHIFT 56

#define SD_SUM_SHIFT 51
#define SD_SUM_BITS 13

/* The high half of sum_and_pid.  One flipped bit of the uuid flips one bit of the sum. */
static inline uint64_t sd_uuid_sum(const uint64_t uuid[2])
{
    uint64_t sum = uuid[0] ^ (uuid[1] << 23 | uuid[1] >> 41);
    return (sum ^ sum << 32) & ~0xffffffffull;
}

/* A thread's identity: its number, and when it started, which tells it apart from later threads of
 * the same number, those of its own process included.  tid | start in clock ticks since boot << 22.
 * A process's identity is that of its first thread. */
#define SD_TID_BITS 22 /* PID_MAX_LIMIT of the kernel is 1 << 22 */

static inline uint32_t sd_who_tid(uint64_t who)
{
    return (uint32_t)(who & ((1u << SD_TID_BITS) - 1));
}

static inline uint64_t sd_who_start(uint64_t who)
{
    return who >> SD_TID_BITS;
}

/* Who holds a lock.  A dead holder leaves its own identity there, and the next one moves it to
 * `died_*`.
 *
 * lock="robust": written by the holder after it has the lock, `who` last; `who` = 0 again just
 * before unlock, so empty means unknown, never an older owner.
 *
 * lock="multiprocessing": `who` *is* the lock.  0 -> me takes it, dead -> me takes it over, me -> 0
 * frees it, each by compare-and-swap; the semaphore is only where one sleeps (locks.c).  So there
 * is no instruction at which a death leaves the lock with nobody's name on it.  `pid` and `since`
 * are stored after `who` there; a dead one leaves those of an older owner, which `pid` shows. */
typedef struct {
    sd_word who;   /* sd_identity() */
    sd_word pid;   /* low half: the process's id; high half: the low half of the `who` that it
                      belongs to */
    sd_word since; /* CLOCK_MONOTONIC_COARSE, ns; above: SD_SINCE_DROPPED */
} sd_owner;

/* Another thread of the holder's process dropped the handle and could not free the lock
 * (unlock_for.c); the holder does when it next locks something, or ends.  Stored by that other
 * thread while the lock is held, for people only: if the holder dies at this very moment the next
 * one may be called so in a message. */
#define SD_SINCE_DROPPED (1ull << 63)

/* One domain.  Six cache lines; a find touches three of the first four, a change all four. */
#define SD_WHY_WORDS 7
typedef struct {
    /* line 0 */
    pthread_mutex_t mutex; /* the slot lock; initialised once, before slot_count passes it */
    sd_word life;    /* bit 0: LIVE; above: generation; sealed by sd_count_seal(), because a
                        flipped bit would hide a domain, or make a stale handle fit it: then the
                        record is damaged, and a rebuild of an index gives up.  List + slot lock
                        (I1); the commit store of an insert or a remove: a dead writer has done it
                        or not */
    sd_word cur;     /* commits so far; bit 0 picks the current copy.  Slot lock (I3); the commit
                        store of a change; never reset; sealed by sd_count_seal() */
    sd_word waiting; /* the largest `cur` that somebody sleeps on, or is about to (W1).  No lock: it
                        is only raised, by compare-and-swap.  A dead waiter leaves a number that is
                        too large for one commit, which wakes nobody */
    /* line 1, line 2 */
    sd_fields copy0, copy1; /* Slot lock (I3) */
    /* line 3 */
    sd_word uuid[2];     /* List + slot lock, while FREE (I1): a dead writer leaves a FREE slot */
    sd_owner owner;      /* Slot lock */
    sd_word sum_and_pid; /* high half: checksum of uuid, written with it (I1): a dead writer leaves
                            a FREE slot, and the next insert writes it again.  Low half: pid of
                            died_who, stored before it under the slot lock: a dead recoverer leaves
                            a dead mutex, and the next one stores it again */
    sd_word died_who;    /* sticky: a holder died; cleared by the clean unlock of a holder to whom
                            the domain was delivered, and by insert.  Slot lock; written before the
                            mutex is made consistent, so a dead recoverer leaves it for the next
                            one */
    sd_word dirty;       /* not 0: garbage waits to be freed.  Slot lock; set before the mutex is
                            made consistent and where freeing had to be put off; cleared after the
                            last extent is freed.  A dead writer leaves it set, or garbage with a
                            dead mutex, which is the same to the next holder */
    /* line 4 */
    sd_word extent[SD_BLOBS][2]; /* descriptors: cell << 25 | bytes; 0: none.  By place, which is
                                    the blob's number unless SD_FLAG_SWAPPED.  Slot + heap lock
                                    (I2); a dead writer's is whole, named and kept.  Garbage is
                                    freed by the slot's next holder, in a FREE slot also by whoever
                                    repairs the list */
    /* line 5 */
    sd_word next_free;         /* next FREE slot + 1.  List lock; rebuilt by its recovery */
    sd_word why[SD_WHY_WORDS]; /* what the holder said it is doing, UTF-8, for people; first word 0:
                                  nothing.  Slot lock; cleared by the holder that stored it, of a
                                  dead one by whoever recovers the slot.  Read without a lock: may
                                  be torn */
} sd_slot;

/* Two buffers a slot: in the first four bytes a checksum of name and uuid, then one byte of length
 * and the name, so that most names are one cache line.  List + slot lock, and only the spare buffer
 * (or either, in a FREE slot); a dead writer leaves garbage there.  Otherwise the spare buffer is
 * room for small data, in two halves: a checksum and the bytes.  Slot lock (I7). */
#define SD_NAME_AT 4u
typedef struct {
    sd_word word[2][32];
} sd_names;

/* A lock that belongs to no domain, found by its name.  Four cache lines.
 *
 * A place gets its name once, and keeps it: the bytes of the name first, then `taken`, which says
 * that they are there.  So whoever sees `taken` needs no lock to read the name, and nobody waits for
 * a lock that becomes another one.  Places are taken from the first to the last.
 *
 * The mutexes of all places are initialised while the segment is made, before it can be found: the
 * memory is there in any case, and so nobody has to ask whether a dead one had begun to initialise
 * a mutex, nor may a checker find one that is none yet. */
typedef struct {
    pthread_mutex_t mutex; /* written by glibc */
    sd_owner owner;        /* the holder of the mutex; a dead one's stays for the next holder */
    sd_word died_who;  /* sticky, as a slot's: a holder died.  The holder of the mutex; stored before
                          it is made consistent, cleared by the clean unlock of a holder who was
                          given the lock.  A dead recoverer leaves a dead mutex, and the next one
                          stores it again */
    sd_word died_pid;  /* low half: its process; high half: sd_named_died_sum(), so that a flipped bit
                          makes no death.  Stored before died_who, likewise */
    sd_word taken;     /* sealed sd_named_sum() of the name; 0: nobody's.  Id lock; the commit store
                          of a name.  A dead writer leaves 0, and the next one begins anew */
    sd_word unused[5];
    sd_word name[8];   /* one byte of length, then the name.  Id lock, while `taken` is 0; a dead
                          writer leaves garbage, which the next one overwrites */
    sd_word why[SD_WHY_WORDS]; /* as a slot's.  The holder of the mutex; cleared by it, of a dead one
                                  by whoever recovers the lock */
    sd_word unused_too;
} sd_named;

static inline uint64_t sd_named_died_sum(uint64_t who, uint64_t pid)
{
    uint64_t sum = who ^ who >> 32 ^ (uint32_t)pid * 0x9e3779b1ull;
    return sum << 32;
}

/* One event (E1).  Event lock; readers take none: they load `number`, copy, and load it again.  A
 * dead writer leaves an entry that is whole or has number 0; the lock's next holder judges it. */
typedef struct {
    sd_word number; /* sealed; stored first as 0 and last as it is */
    sd_word place;  /* bits 0-31 slot, 32-39 how many more events the same commit has, 40-63 pid of
                       a death */
    sd_word life;   /* `life` once the commit has happened; of a death: `died_who` */
    sd_word kind;   /* bits 0-7 type, 8-23 detail, 24-25 SD_BY_*; high half: id */
    sd_word time;   /* CLOCK_REALTIME, ns */
    sd_word uuid[2];
    sd_word sum;      /* of all the others */
    sd_word name[32]; /* one byte of length, then the name */
} sd_entry;

/* What a process counted (V2).  Its own stores, by sd_count(); a dead one leaves what it counted,
 * which nobody reads, until the next process that gets the place clears it. */
#define SD_WAIT_SIZES 25
typedef struct {
    sd_word who;        /* the process; stored last, and as 0 before the block is cleared */
    sd_word acquired;   /* list and slot locks */
    sd_word contended;  /* waits that slept, whether or not they got the lock */
    sd_word commits;    /* of changes, inserts and removes */
    sd_word recoveries; /* repairs after a death, or that had been put off */
    sd_word deaths;     /* locks whose holder had died */
    sd_word unlisted;   /* waits that found no place among the waiters */
    sd_word waits[SD_WAIT_SIZES]; /* of `contended`, those of less than 1 << i us and not less than
                                     half of that; the last one: all longer ones */
} sd_counters;

/* A thread that sleeps for a lock (V1).  Its own stores, once `who` is it. */
typedef struct {
    sd_word who;   /* sd_identity(), 0: a free place.  Compare-and-swap: 0 -> me or dead -> me takes
                      it, me -> 0 gives it back */
    sd_word pid;
    sd_word what;  /* SD_LOCK_*; high half: which one */
    sd_word since; /* CLOCK_MONOTONIC, ns */
    sd_word sum;   /* of the others; stored last, cleared first.  A dead writer leaves one that
                      does not fit, or that is its own */
    sd_word unused[3];
} sd_waiter;

/* What is waited for; the number is a slot's, or a mutex's. */
enum { SD_LOCK_LIST = 1, SD_LOCK_DOMAIN = 2, SD_LOCK_MUTEX = 3, SD_LOCK_JOB = 4 };

/* Which store is the commit: `cur`, `life`, or `died_who`. */
enum { SD_BY_CHANGE = 0, SD_BY_LIFE = 1, SD_BY_DEATH = 2 };
#define SD_HOLDER_DIED 100 /* the type of the only events that the core makes itself */
#define SD_RENAMED_FROM SD_KIND(1, 1) /* undefined, renamed: bears the name of before */
#define SD_DIED_UNKNOWN 1  /* in `died_who`: a holder died, nobody knows which */
#define SD_KIND(type, detail) ((uint64_t)(type) | (uint64_t)(detail) << 8)
#define SD_KIND_OF(kind) ((kind) & 0xffffff)
#define SD_KIND_BY(kind) ((int)((kind) >> 24 & 3))

typedef struct {
    /* page 0, line 0..: written by the creator before the file has a name; constant since */
    uint64_t magic, layout, signature;
    uint64_t boot[2];
    uint64_t pid_namespace; /* inode; 0: no /proc */
    uint64_t kind;
    uint64_t total_bytes, max_slots, heap_cells;
    uint64_t id[2]; /* of this segment, random */
    uint64_t seed;  /* of the hash functions, random */
    uint64_t creator_who, creator_pid, created; /* created: CLOCK_REALTIME, ns */
    uint64_t time_namespace; /* inode; 0: no /proc, or before Linux 5.6 */
    uint64_t events;         /* entries of the ring, a power of two, or 0: no events */

    /* Set once, by the holder of the lock whose repair failed; never cleared.  `poisoned` is stored
     * last: whoever dies before it leaves words that nobody reads, and the next one that fails
     * writes them again.  Two locks whose repairs fail at the same moment may mix the words, which
     * only people read. */
    _Alignas(SD_CACHE_LINE) sd_word poisoned; /* SD_POISON_* */
    sd_word poisoned_at;                      /* slot + 1 where it failed; 0: at no one slot */
    uint64_t sum; /* of the constants above; written by the creator with them */
    sd_word poisoned_who, poisoned_pid; /* whoever found it: as in sd_owner */
    sd_word poisoned_when;              /* CLOCK_REALTIME, ns */
    /* Of whoever waits for any change of the list.  No lock, compare-and-swap only: `any_waiting`
     * is raised to the number that is waited for, `any_seq` counts up where that is larger (W1).  A
     * line of their own: each find reads `poisoned`. */
    _Alignas(SD_CACHE_LINE) sd_word any_waiting;
    sd_word any_seq;

    /* The list lock and what it protects. */
    _Alignas(SD_CACHE_LINE) pthread_mutex_t list_mutex;
    sd_owner list_owner;
    /* Sequence, then level.  UUID and name index share one sequence.  A level is stored once its
     * table is committed and filled: a dead grower leaves the old level and an odd sequence. */
    _Alignas(SD_CACHE_LINE) sd_word list_seq; /* I5; odd after a death: the next holder rebuilds */
    sd_word list_level[2];    /* of the UUID and the name index; sealed */
    sd_word list_dirty;       /* not 0: a repair was put off, the next holder does it */
    sd_word live;             /* domains; derived: rebuilt by recovery */
    sd_word free_head;        /* first FREE slot + 1; derived: rebuilt by recovery */
    _Alignas(SD_CACHE_LINE) sd_word slot_count; /* slots with a mutex; stored after its init;
                                                   sealed: too few would hide domains */
    sd_word slots_committed;  /* slots and names with memory; stored once they have it; sealed */
    sd_word settings_choice;  /* bit 0: which settings buffer is current; sealed; the commit store
                                 of a change.  A dead writer leaves garbage in the spare one */
    /* What the holder of the list lock said it is doing, as `why` of a slot.  List lock; cleared by
     * the holder that stored it, of a dead one by the next holder. */
    _Alignas(SD_CACHE_LINE) sd_word list_why[SD_WHY_WORDS];
    /* How many of them have memory; sealed.  No lock: raised by compare-and-swap after the memory is
     * there, so a dead process leaves memory that the next one commits again.  A damaged one is 0. */
    _Alignas(SD_CACHE_LINE) sd_word counters_committed, waiters_committed;

    /* The id lock and what it protects. */
    _Alignas(SD_CACHE_LINE) pthread_mutex_t id_mutex;
    _Alignas(SD_CACHE_LINE) sd_word id_seq; /* as list_seq */
    sd_word id_level; /* as list_level; sealed */
    sd_word id_dirty; /* as list_dirty */
    sd_word next_id;  /* stored before the id is used: a death wastes one, never repeats one;
                         sealed */
    sd_word active;   /* entries of the id index; derived: rebuilt by recovery */

    /* The event lock and what it protects. */
    _Alignas(SD_CACHE_LINE) pthread_mutex_t event_mutex;
    sd_word event_dirty;    /* as list_dirty */
    sd_word event_waiting;  /* as `waiting` of a slot, of event_count: no lock */
    _Alignas(SD_CACHE_LINE) sd_word event_count; /* number of the last published event; sealed.  A
                                                    damaged one is made anew from the ring */
    sd_word ring_committed; /* entries with memory; stored after fallocate; sealed */

    /* The heap lock and what it protects. */
    _Alignas(SD_CACHE_LINE) pthread_mutex_t heap_mutex;
    _Alignas(SD_CACHE_LINE) sd_word heap_committed; /* cells with memory and map; stored after
                                                       fallocate; sealed */
    sd_word heap_used;  /* cells; derived: rebuilt by recovery */
    sd_word heap_dirty; /* as list_dirty */
    sd_word heap_rover; /* where the next search for a hole starts: a hint */
    sd_word heap_top;   /* the end of the last cell that was ever used: a hint */
    sd_word heap_turn;  /* counts map changes, so that a checker can read the map without the lock;
                           stored before the change */
    sd_word heap_hint[SD_HINTS]; /* cell + 1 of a freed extent by size: hints, checked on the map */
} sd_header;

_Static_assert(sizeof(sd_fields) == SD_CACHE_LINE, "a field copy is a cache line");
_Static_assert(sizeof(sd_slot) == 6 * SD_CACHE_LINE, "a slot is six cache lines");
_Static_assert(offsetof(sd_slot, copy0) == 64 && offsetof(sd_slot, uuid) == 192 &&
                   offsetof(sd_slot, extent) == 256 && offsetof(sd_slot, next_free) == 320,
               "lines of a slot");
_Static_assert(sizeof(sd_named) == 4 * SD_CACHE_LINE, "a named lock is four cache lines");
_Static_assert(sizeof(((sd_named *)0)->name) == 1 + SD_NAMED_NAME_MAX, "length and name");
_Static_assert(sizeof(sd_entry) == 5 * SD_CACHE_LINE, "an event is five cache lines");
_Static_assert(sizeof(sd_counters) == 4 * SD_CACHE_LINE, "a block of counters is four lines");
_Static_assert(sizeof(sd_waiter) == SD_CACHE_LINE, "a waiter is a cache line");
_Static_assert(sizeof(sd_names) == 2 * (SD_NAME_AT + 1 + SD_NAME_MAX), "two name buffers");
_Static_assert(2 * SD_SMALL_WORDS * sizeof(sd_word) == sizeof(sd_names) / 2 &&
                   8 + SD_SMALL_MAX == SD_SMALL_WORDS * sizeof(sd_word),
               "two halves of a name buffer");
_Static_assert(sizeof(sd_header) <= 2 * SD_PAGE, "the header has two pages");

/* --- the only stores into a published segment ------------------------------------------------ */

#ifdef SD_CRASH_POINTS
void sd_crash_point(void);
#else
#define sd_crash_point() ((void)0)
#endif

static inline uint64_t sd_load(const sd_word *word)
{
    return atomic_load_explicit(word, memory_order_relaxed);
}

static inline uint64_t sd_load_acquire(const sd_word *word)
{
    return atomic_load_explicit(word, memory_order_acquire);
}

/* The process of an owner that was read as `who`; 0: unknown. */
static inline uint32_t sd_owner_pid(const sd_owner *owner, uint64_t who)
{
    uint64_t pid = sd_load(&owner->pid);
    return pid >> 32 == (uint32_t)who ? (uint32_t)pid : 0;
}

static inline void sd_store(sd_word *word, uint64_t value)
{
    sd_crash_point();
    atomic_store_explicit(word, value, memory_order_relaxed);
}

/* One more, in this process's own counters (V2); the caller has the GIL. */
static inline void sd_count(sd_word *word)
{
    atomic_store_explicit(word, sd_load(word) + 1, memory_order_relaxed);
}

/* A commit word: no store before it may sink below it, none after it may rise above it. */
static inline void sd_publish(sd_word *word, uint64_t value)
{
    sd_crash_point();
    atomic_store_explicit(word, value, memory_order_release);
    atomic_thread_fence(memory_order_release);
}

/* Watermarks and the like carry their own complement: a flipped bit must not lead into a hole of
 * the file, where a read may be SIGBUS, nor hide what is there.  36 bits of value, 28 of check. */
#define SD_SEAL_BITS 36
static inline uint64_t sd_seal(uint64_t value)
{
    return (value & ((1ull << SD_SEAL_BITS) - 1)) | ~(value ^ value >> 28) << SD_SEAL_BITS;
}

static inline uint64_t sd_unsealed(uint64_t word) /* UINT64_MAX: damaged */
{
    uint64_t value = word & ((1ull << SD_SEAL_BITS) - 1);
    return sd_seal(value) == word ? value : UINT64_MAX;
}

/* `cur` and `life` have 48 bits of value and 16 of check; the 0 of fresh memory is a sound 0. */
#define SD_COUNT_BITS 48
static inline uint64_t sd_count_value(uint64_t word)
{
    return word & ((1ull << SD_COUNT_BITS) - 1);
}

static inline uint64_t sd_count_seal(uint64_t value)
{
    value = sd_count_value(value);
    return value | (value ^ value >> 16 ^ value >> 32) << SD_COUNT_BITS;
}

static inline bool sd_count_sound(uint64_t word)
{
    return sd_count_seal(word) == word;
}

/* `life` of the domain that begins here, and of the FREE slot after it. */
static inline uint64_t sd_life_begun(uint64_t life)
{
    return sd_count_seal(life | 1);
}

static inline uint64_t sd_life_ended(uint64_t life)
{
    return sd_count_seal((life | 1) + 1);
}

/* A word of up to 8 bytes, aligned or not; what is missing is 0. */
static inline uint64_t sd_bytes(const unsigned char *at, size_t bytes)
{
    uint64_t word = 0;
    memcpy(&word, at, bytes);
    return word;
}

/* Relaxed words in and out of the segment, by fours, since no compiler unrolls atomics.  `bytes`
 * need not be a multiple of 8: the last word is padded with zeros on the way in, and the segment
 * always has room for it. */
static inline void sd_copy_in(sd_word *to, const void *from, size_t bytes)
{
    const unsigned char *source = from;
    for (; bytes >= 32; bytes -= 32, source += 32, to += 4) {
        sd_store(to, sd_bytes(source, 8));
        sd_store(to + 1, sd_bytes(source + 8, 8));
        sd_store(to + 2, sd_bytes(source + 16, 8));
        sd_store(to + 3, sd_bytes(source + 24, 8));
    }
    for (; bytes >= 8; bytes -= 8, source += 8, to++) sd_store(to, sd_bytes(source, 8));
    if (bytes) sd_store(to, sd_bytes(source, bytes));
}

static inline void sd_copy_out(void *to, const sd_word *from, size_t bytes)
{
    unsigned char *target = to;
    for (; bytes >= 32; bytes -= 32, target += 32, from += 4) {
        const uint64_t value[4] = {sd_load(from), sd_load(from + 1), sd_load(from + 2),
                                   sd_load(from + 3)};
        memcpy(target, value, 32);
    }
    for (; bytes >= 8; bytes -= 8, target += 8, from++) {
        uint64_t value = sd_load(from);
        memcpy(target, &value, 8);
    }
    if (bytes) {
        uint64_t value = sd_load(from);
        memcpy(target, &value, bytes);
    }
}

#endif
