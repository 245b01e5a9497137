/* find.h - from a key to a slot. */
#ifndef SHMDOMAINS_FIND_H
#define SHMDOMAINS_FIND_H

#include "fields.h"

typedef struct {
    int what; /* SD_UUID_INDEX ... SD_ID_INDEX */
    uint64_t uuid[2];
    unsigned char name[SD_NAME_MAX + 1]; /* length, then bytes */
    int32_t id;
} sd_key;

/* Find without any lock; a hit must be verified under the slot lock.  SD_OK SD_MISS SD_DOUBT
 * SD_CORRUPT.  Under the index's lock a miss is never in doubt. */
int sd_find(sd_segment *segment, const sd_key *key, uint32_t *slot);
/* The same, faster if the caller is going to lock what it finds. */
int sd_find_to_lock(sd_segment *segment, const sd_key *key, uint32_t *slot);
/* Is it that domain?  A hint. */
bool sd_matches(const sd_segment *segment, uint32_t slot, const sd_key *key);
/* The same once its lock is held, and then the truth: SD_OK, and its committed values; SD_MISS;
 * SD_CORRUPT. */
int sd_verify(const sd_segment *segment, uint32_t slot, const sd_key *key, sd_values *values);

#endif
