/* check_ring.h - the ring of events, and what the records say of it. */
#ifndef SHMDOMAINS_CHECK_RING_H
#define SHMDOMAINS_CHECK_RING_H

#include "check.h"

/* Without a lock: every entry, each by itself.  SD_TIMEOUT: not all by `until`; call again to go
 * on. */
int sd_check_ring(sd_check *check, uint64_t until);
/* A record names an event: remember the largest number. */
void sd_check_event_named(sd_check *check, uint32_t slot, uint64_t event);
/* Whether a record names an event that has not happened, as a commit may that is under way. */
bool sd_check_ring_suspect(const sd_check *check);
/* With the event lock held, or in a poisoned segment, where nobody gets it. */
void sd_check_ring_judge(sd_check *check);

#endif
