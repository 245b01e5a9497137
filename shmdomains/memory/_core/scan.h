/* scan.h - from a key to a slot, without an index. */
#ifndef SHMDOMAINS_SCAN_H
#define SHMDOMAINS_SCAN_H

#include "find.h"

/* As sd_find(), but slow, and never stopped by who stopped in the middle of a change, nor misled by
 * a damaged index.  A hit is a hint, a miss was true at some moment of the scan.  SD_OK SD_MISS
 * SD_CORRUPT, and SD_DOUBT: a record was being written all the time. */
int sd_scan(const sd_segment *segment, const sd_key *key, uint32_t *slot);

#endif
