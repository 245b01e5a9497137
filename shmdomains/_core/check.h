/* check.h - every invariant, from outside. */
#ifndef SHMDOMAINS_CHECK_H
#define SHMDOMAINS_CHECK_H

#include "segment.h"

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

/* NULL: no memory.  `states`: how many there are, which only the caller knows.  Only what is proved
 * is reported. */
sd_check *sd_check_begin(sd_segment *segment, unsigned states, sd_report report, void *context);
void sd_check_end(sd_check *check);

/* Without a lock: all that a record says of itself, and which records are suspect.  SD_TIMEOUT: not
 * all by `until`; call again to go on.  SD_CORRUPT: nothing more can be looked at. */
int sd_check_records(sd_check *check, uint64_t until);
const sd_tally *sd_check_tally(const sd_check *check);
uint32_t sd_check_suspects(const sd_check *check, int part);
uint64_t sd_check_overlooked(const sd_check *check); /* suspects that were too many to remember */

int sd_check_part(int sum); /* to which a sum belongs */

/* Without a lock.  SD_OK: it is right.  SD_DOUBT: it seems wrong, or writers were at work: try
 * again, or under the lock.  SD_TIMEOUT: call again to go on.  SD_ERRNO: no memory. */
int sd_check_sum(sd_check *check, int sum, uint64_t until);

/* With the part's lock held, or in a poisoned segment, where nobody gets it.  judge: look at the
 * suspects again; SD_TIMEOUT: some are left.  sum_held: SD_OK: what is wrong was reported;
 * SD_TIMEOUT: there is too much of it; SD_DOUBT: it has grown since prepare(). */
int sd_check_prepare(sd_check *check, int sum); /* before the lock is taken; SD_ERRNO */
int sd_check_judge(sd_check *check, int part, uint64_t until);
int sd_check_sum_held(sd_check *check, int sum, uint64_t until);

#endif
