/* check_records.h - record by record: what it says of itself, and suspects. */
#ifndef SHMDOMAINS_CHECK_RECORDS_H
#define SHMDOMAINS_CHECK_RECORDS_H

#include "check.h"

/* Without a lock: all that a record says of itself, and which records are suspect.  SD_TIMEOUT: not
 * all by `until`; call again to go on.  SD_CORRUPT: nothing more can be looked at. */
int sd_check_records(sd_check *check, uint64_t until);

/* With the part's lock held, or in a poisoned segment, where nobody gets it: look at the suspects
 * again.  SD_TIMEOUT: some are left. */
int sd_check_judge(sd_check *check, int part, uint64_t until);

#endif
