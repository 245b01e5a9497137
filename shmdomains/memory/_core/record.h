/* record.h - change, insert and remove a domain. */
#ifndef SHMDOMAINS_RECORD_H
#define SHMDOMAINS_RECORD_H

#include "ring.h"

/* A change to a blob: keep, clear (bytes NULL), or set. */
typedef struct {
    bool change;
    const void *bytes;
    uint64_t size;
} sd_blob;

/* Prefetch what a change of the definition, or an insert, will touch, while the caller still makes
 * the blob. */
void sd_prefetch_replace(const sd_segment *segment, uint32_t slot);
void sd_prefetch_insert(const sd_segment *segment); /* list lock held */

/* Commit.  Slot lock held; with a new name also the list lock (and the caller has checked that the
 * name is free).  `blobs` NULL: none changes; `news` NULL: no events.  `values` become what is
 * committed.  On failure nothing has changed. */
int sd_commit(sd_segment *segment, uint32_t slot, sd_values *values, const sd_blob blobs[SD_BLOBS],
              const unsigned char *name, const sd_news *news, uint64_t deadline);
/* The next id, never given out again.  Slot lock held. */
int sd_take_id(sd_segment *segment, int32_t *id, uint64_t deadline);

/* The next candidate on the free list, behind `*link` (NULL: from its head), and a new slot at its
 * end.  The caller tries the slot's lock and asks for the next one when somebody holds it (a handle
 * to a domain that is gone, in a process that was stopped): nobody may block an insert.  List lock
 * held. */
int sd_free_slot(sd_segment *segment, sd_word **link, uint32_t *slot);
/* A new domain in that slot, committed.  List lock and the slot's lock held; the caller has
 * checked for duplicates.  On failure nothing has changed. */
int sd_insert(sd_segment *segment, uint32_t slot, sd_word *link, const uint64_t uuid[2],
              const unsigned char *name, const sd_values *values, const sd_blob blobs[SD_BLOBS],
              const sd_news *news, uint64_t deadline);
/* Remove.  List lock and slot lock held. */
int sd_remove(sd_segment *segment, uint32_t slot, const sd_news *news, uint64_t deadline);

#endif
