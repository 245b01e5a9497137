/* sum.h - the checksum of a blob. */
#ifndef SHMDOMAINS_SUM_H
#define SHMDOMAINS_SUM_H

#include "layout.h"

/* What stands in front of a blob, so that no other bytes pass for it: another domain's, of another
 * kind, or of another time.  The version tells the two kinds of definition apart. */
uint64_t sd_blob_sum(const uint64_t uuid[2], int blob, uint64_t version, const void *bytes,
                     uint64_t size);
/* Write the blob behind its checksum. */
void sd_blob_put(sd_word *to, const uint64_t uuid[2], int blob, uint64_t version, const void *bytes,
                 uint64_t size);
/* Does this processor make them by CRC-32C?  Part of the segment's signature: all who share one must
 * agree. */
bool sd_sums_by_crc(void);

#endif
