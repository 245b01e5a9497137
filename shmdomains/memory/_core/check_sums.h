/* check_sums.h - numbers that must be equal. */
#ifndef SHMDOMAINS_CHECK_SUMS_H
#define SHMDOMAINS_CHECK_SUMS_H

#include "check.h"

/* Without a lock.  SD_OK: it is right.  SD_DOUBT: it seems wrong, or writers were at work: try
 * again, or under the lock.  SD_TIMEOUT: call again to go on.  SD_ERRNO: no memory. */
int sd_check_sum(sd_check *check, int sum, uint64_t until);

/* With the part's lock held, or in a poisoned segment, where nobody gets it.  SD_OK: what is wrong
 * was reported.  SD_TIMEOUT: there is too much of it.  SD_DOUBT: it has grown since prepare(). */
int sd_check_prepare(sd_check *check, int sum); /* before the lock is taken; SD_ERRNO */
int sd_check_sum_held(sd_check *check, int sum, uint64_t until);

#endif
