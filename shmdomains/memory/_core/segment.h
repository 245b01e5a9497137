/* segment.h - a segment's geometry, and this process's mapping of it. */
#ifndef SHMDOMAINS_SEGMENT_H
#define SHMDOMAINS_SEGMENT_H

#include "codes.h"
#include "layout.h"

#include <sys/types.h>

/* Where everything lies, from three limits. */
typedef struct {
    uint64_t max_slots, heap_cells, events, total_bytes;
    uint64_t attached, settings, named, slots, names; /* offsets */
    uint64_t counters, waiters, ring, map, heap;
    unsigned levels;                                      /* of each index */
    uint64_t table[SD_INDEXES][SD_INDEX_LEVELS];          /* offsets */
} sd_geometry;

/* SD_FULL when the limits are out of range. */
int sd_geometry_make(sd_geometry *geometry, uint64_t max_slots, uint64_t heap_cells,
                     uint64_t events);
/* Bytes that a segment takes besides its heap and the heap's map. */
uint64_t sd_geometry_fixed(uint64_t max_slots, uint64_t events);

/* A mapped segment, private to this process. */
typedef struct sd_segment {
    unsigned char *base;
    int fd;                /* never used but through sd_descriptor(); -1: detached */
    dev_t device;
    ino_t inode;
    sd_geometry at;
    uint64_t kind, seed, id[2], pid_namespace, time_namespace;
    sd_header *header;
    sd_named *named;
    sd_slot *slots;
    sd_names *names;
    sd_counters *blocks;   /* of all processes */
    sd_counters *counters; /* ours: one of `blocks`, or `own` where there is none for us */
    sd_counters own;
    sd_waiter *waiters;
    sd_entry *ring;
    sd_word *attached, *map, *heap;
    sd_word *table[SD_INDEXES][SD_INDEX_LEVELS];
    unsigned users;        /* objects of this process that refer to it */
    unsigned open;         /* those that were not closed */
    unsigned handles;      /* to its records, that are still referred to */
    unsigned inside;       /* threads of this process that wait */
    unsigned held;         /* locks, the list lock included, that threads of this process took and
                              did not release; also counts those that ended with their thread */
    uint64_t list_nonce;   /* the thread of ours that holds the list lock, or 0 */
    unsigned list_nested;  /* how deep in signal handlers it was then */
    void *list_taker;      /* the binding's object that took it */
    bool list_says;        /* it said what it is doing */
    uint64_t epoch;        /* fork epoch in which we entered the attached table */
    struct sd_segment *next;
} sd_segment;

/* Format an empty file of any size as a segment (ours alone, not yet published).
 * SD_FULL: limits out of range.  SD_NO_MEMORY.  SD_ERRNO. */
int sd_format(int fd, uint64_t kind, uint64_t max_slots, uint64_t heap_cells, uint64_t events);

/* The checksum of a header's constants. */
uint64_t sd_constants_sum(const sd_header *header);

/* Map the segment behind `fd`, or find it if this process has it mapped already.  `fd` stays the
 * caller's; the segment keeps a duplicate.  SD_MISMATCH with a reason in `why`; SD_CORRUPT;
 * SD_ERRNO. */
int sd_map(int fd, sd_segment **out, char *why, size_t why_size);
/* Give up what others can see of us - the entry in the attached table, the flock - once nothing is
 * open, nobody waits, and no handle or lock is left. */
void sd_detach(sd_segment *segment);
/* Drop one use; unmaps after the last one unless a lock of ours is held: then a later sd_map()
 * does, once that lock's thread has ended. */
void sd_unmap(sd_segment *segment);
/* Do these bytes lie in a segment that this process has mapped and not given up? */
bool sd_is_mapped(const void *at, size_t bytes);
/* First use in a forked child: nothing of its parent's is held.  SD_MISMATCH with a reason in
 * `why`: the child lives in another PID or time namespace, or that cannot be told. */
int sd_begin_in_child(sd_segment *segment, char *why, size_t why_size);

/* The segment's descriptor, or -1 when this process closed it, whoever has its number now. */
int sd_descriptor(const sd_segment *segment);
/* Commit `bytes` at `offset`.  SD_NO_MEMORY with errno.  SD_DESCRIPTOR: it was lost, and this
 * kernel needs it. */
int sd_commit_memory(sd_segment *segment, uint64_t offset, uint64_t bytes);

/* Memory for the first `wanted` places of a region that nobody has a lock for: of `most`, each of
 * `size` bytes, which divide a page. */
bool sd_make_room(sd_segment *segment, sd_word *watermark, uint64_t region, uint64_t size,
                  uint64_t wanted, uint64_t most);
/* How many have it; 0 when the watermark is damaged. */
uint64_t sd_room(const sd_word *watermark, uint64_t most);

/* What is committed, as the watermarks have it. */
uint64_t sd_committed_bytes(const sd_segment *segment);

/* The first reason stays.  Called by the holder of the lock whose repair failed; `at` is slot + 1,
 * or 0 for no one slot. */
void sd_poison(sd_segment *segment, uint64_t reason, uint64_t at);

static inline bool sd_poisoned(const sd_segment *segment)
{
    return __builtin_expect(sd_load(&segment->header->poisoned) != 0, 0);
}

/* How many slots there are.  Both words are loaded here once, the count first: it may rise while
 * the caller holds only the id or the heap lock, and the watermark is raised before it.
 * SD_CORRUPT: one of the two is damaged. */
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

#endif
