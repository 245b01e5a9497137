/* settings.h - what the list remembers for its users. */
#ifndef SHMDOMAINS_SETTINGS_H
#define SHMDOMAINS_SETTINGS_H

#include "segment.h"

int sd_settings_set(sd_segment *segment, const void *bytes, uint64_t size); /* list lock held */
/* Lock-free.  `out` has SD_SETTINGS_BYTES. */
int sd_settings_get(const sd_segment *segment, void *out, uint64_t *size);

#endif
