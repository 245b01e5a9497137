/* index.h - UUID, name and id -> slot. */
#ifndef SHMDOMAINS_INDEX_H
#define SHMDOMAINS_INDEX_H

#include "segment.h"

uint64_t sd_hash_uuid(const sd_segment *segment, const uint64_t uuid[2]);
uint64_t sd_hash_name(const sd_segment *segment, const unsigned char *name, size_t bytes);
uint64_t sd_hash_id(const sd_segment *segment, int32_t id);

typedef struct {
    const sd_word *table;
    uint64_t mask, at, left, tag;
    bool damaged; /* an entry on the way, maybe the key's */
} sd_probe;

#define SD_ENTRY_SLOT(entry) ((uint32_t)((entry) & ((1u << 24) - 1)) - 1)

int sd_probe_begin(const sd_segment *segment, int index, uint64_t hash, sd_probe *probe);
/* SD_OK SD_MISS SD_CORRUPT: not found, and an entry on the way is damaged. */
int sd_probe_next(const sd_segment *segment, sd_probe *probe, uint32_t *slot);
/* What the last one led to was not it. */
void sd_probe_in_vain(sd_probe *probe);
bool sd_entry_sound(uint64_t entry);

/* All of these with the index's lock held and its sequence odd. */
int sd_index_insert(sd_segment *segment, int index, uint64_t hash, uint32_t slot);
int sd_index_delete(sd_segment *segment, int index, uint64_t hash, uint32_t slot);
int sd_index_clear(sd_segment *segment, int index);
/* Make room for one more, while the sequence is even.  SD_NO_MEMORY and SD_CORRUPT (an entry is
 * damaged) leave all as it was. */
int sd_index_reserve(sd_segment *segment, int index);

sd_word *sd_index_sequence(sd_segment *segment, int index);
void sd_sequence_begin(sd_word *sequence);
void sd_sequence_end(sd_word *sequence);

#endif
