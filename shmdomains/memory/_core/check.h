/* check.h - a check under way: what it has seen so far, and how it reports. */
#ifndef SHMDOMAINS_CHECK_H
#define SHMDOMAINS_CHECK_H

#include "segment.h"
#include "thread.h"

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
#define SD_SUSPECTS_MAX 10000u
#define SD_CHECK_STEPS 256 /* between two looks at the clock */

typedef struct {
    int kind;
    uint32_t where;
} sd_suspect;

/* How far one sum has got, and what it is. */
typedef struct {
    int stage; /* -1: not begun */
    uint64_t at, turn;
    uint32_t slots;
    bool broken; /* it cannot be taken, which was reported */
    unsigned doubts;
    uint64_t entries[SD_INDEXES], free_slots, cells, ownerless, twice;
} sd_sum;

typedef struct sd_check {
    sd_segment *segment;
    unsigned states;
    sd_report report; /* what is proved */
    void *context;
    sd_report emit; /* `report`, or one that only counts what may be no fault */
    void *emit_context;
    unsigned doubts;
    unsigned proved[SD_PARTS]; /* faults of suspects */
    sd_tally tally;
    bool begun;
    uint32_t slots, next; /* of the records, and the one to look at next */
    int index;            /* whose entries are looked at, from `entry` down, in a table of `mask` */
    uint64_t entry, mask;
    sd_suspect *suspects[SD_PARTS];
    uint32_t suspected[SD_PARTS];
    uint64_t overlooked;
    bool ring_begun;
    uint64_t ring_size, ring_next; /* places of the ring, and the one to look at next */
    uint64_t event_named;          /* the last event that a record names, and which */
    uint32_t event_named_by;
    sd_sum sum[SD_SUMS];
    /* One bit a cell: named in this walk, and named again; marked and nobody's in every walk, and
     * named twice in every walk. */
    uint64_t *named, *again, *ownerless, *twice;
    uint64_t room, committed; /* cells that these have bits for, and that there are */
} sd_check;

/* NULL: no memory.  `states`: how many there are, which only the caller knows.  Only what is proved
 * is reported. */
sd_check *sd_check_begin(sd_segment *segment, unsigned states, sd_report report, void *context);
void sd_check_end(sd_check *check);

const sd_tally *sd_check_tally(const sd_check *check);
uint32_t sd_check_suspects(const sd_check *check, int part);
uint64_t sd_check_overlooked(const sd_check *check); /* suspects that were too many to remember */
int sd_check_part(int sum);                          /* to which a sum belongs */

/* For the two kinds of checks. */
extern const char *const SD_INDEX_NAMES[SD_INDEXES];
__attribute__((format(printf, 3, 4))) void
sd_fault(const sd_check *check, const char *invariant, const char *format, ...);
/* From here on a fault is only counted, in `doubts`. */
void sd_check_listen(sd_check *check);
/* From here on a fault is reported. */
void sd_check_speak(sd_check *check);

static inline bool sd_check_late(uint64_t step, uint64_t until)
{
    return step % SD_CHECK_STEPS == SD_CHECK_STEPS - 1 && sd_now() >= until;
}

#endif
