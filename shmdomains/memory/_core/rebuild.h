/* rebuild.h - what is derived, made again from what is committed. */
#ifndef SHMDOMAINS_REBUILD_H
#define SHMDOMAINS_REBUILD_H

#include "segment.h"

/* With the lock concerned held.  They poison the segment when they fail: SD_CORRUPT. */
int sd_rebuild_list(sd_segment *segment);
/* An index has a damaged entry and its lock is held: rebuild it, unless a record is damaged, too.
 * SD_CORRUPT: then nothing has changed, and nothing is poisoned. */
int sd_mend(sd_segment *segment, int index);
int sd_rebuild_ids(sd_segment *segment);
int sd_rebuild_heap(sd_segment *segment);

#endif
