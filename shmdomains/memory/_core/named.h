/* named.h - locks that belong to no domain, found by their names. */
#ifndef SHMDOMAINS_NAMED_H
#define SHMDOMAINS_NAMED_H

#include "locks.h"

/* A name as it lies in the segment: one byte of length, then the bytes; the rest is 0. */
typedef struct {
    unsigned char text[SD_NAMED_NAME_MAX + 1];
} sd_lock_name;

/* The place of the lock with this name, which stays for good.  find: takes no lock.  give: the name
 * gets a place if it has none.
 * SD_OK SD_MISS (find)  SD_FULL: all places have other names.  SD_CORRUPT: this name has no place
 * that can be read, and one that cannot may be its.  give also what sd_ids_lock() answers. */
int sd_named_find(const sd_segment *segment, const sd_lock_name *name, unsigned *place);
int sd_named_give(sd_segment *segment, const sd_lock_name *name, unsigned *place,
                  uint64_t deadline);
/* What stands there.  SD_OK, SD_MISS: no name.  SD_CORRUPT: one that cannot be read. */
int sd_named_get(const sd_segment *segment, unsigned place, sd_lock_name *name);

/* Take it: as sd_mutex_lock(), SD_OK also after a death, and SD_POISONED.  Unlock: `delivered` as for
 * a slot. */
int sd_named_lock(sd_segment *segment, unsigned place, uint64_t deadline);
int sd_named_wait(sd_segment *segment, unsigned place, uint64_t deadline); /* after SD_SPIN */
void sd_named_unlock(sd_segment *segment, unsigned place, bool delivered);
/* As sd_slot_unlock_for(). */
int sd_named_unlock_for(sd_segment *segment, unsigned place, sd_thread *holder, uint64_t nonce);
/* Who died holding it since it was last unlocked in order.  SD_OK, with `who` 0 if nobody did;
 * SD_CORRUPT.  The lock is held. */
int sd_named_died(const sd_segment *segment, unsigned place, uint64_t *who, uint64_t *pid);

/* Say what the lock is held for; cut off between two characters where it is too long.  The lock is
 * held. */
void sd_named_explain(sd_segment *segment, unsigned place, const char *why, size_t bytes);

#endif
