/* fields.h - what a record says: values, name, blobs; with the slot's lock, or as a view. */
#ifndef SHMDOMAINS_FIELDS_H
#define SHMDOMAINS_FIELDS_H

#include "heap.h"
#include "index.h"
#include "sum.h"

/* A private copy of the fields. */
typedef struct {
    int32_t id, pid;
    uint16_t state, reason;
    uint64_t flags;
    uint64_t version[SD_BLOBS];
    uint64_t event, started;
} sd_values;

/* The committed values; slot lock held.  SD_CORRUPT: they do not fit their checksum. */
int sd_values_get(const sd_segment *segment, uint32_t slot, sd_values *values);
/* The committed values while others may commit: those of a `cur` that stood still.  Only the fields
 * that the caller's lock pins may be believed together. */
int sd_values_settled(const sd_segment *segment, uint32_t slot, sd_values *values);
/* Write the spare copy, then `cur`: the commit.  Slot lock held. */
void sd_values_flip(sd_slot *record, const sd_values *values);

/* Which of the two descriptors of a blob is current. */
static inline int sd_choice(uint64_t flags, int blob)
{
    return (flags & SD_FLAG_CHOICE(blob)) != 0;
}

/* Where a blob's descriptors are (I6). */
static inline int sd_place(uint64_t flags, int blob)
{
    return blob >= SD_DATA ? blob : blob ^ ((flags & SD_FLAG_SWAPPED) != 0);
}

/* The value of `cur` in a version. */
static inline uint64_t sd_version_count(uint64_t version)
{
    return sd_count_value(version);
}

/* How many bytes of data lie in the record (I7); 0: it lies in the heap, or there is none. */
static inline uint64_t sd_small_bytes(const sd_values *values)
{
    return values->version[SD_DATA] >> SD_SMALL_SHIFT;
}

/* name: 252 bytes, length first; length 0, which no domain has: name or uuid is damaged.  The truth
 * with the slot's or the list lock held; without them a hint, or part of sd_view_begin(). */
void sd_name_get(const sd_segment *segment, uint32_t slot, uint64_t flags, unsigned char *name);
/* Write the spare name buffer and let `values` choose it.  List and slot lock held. */
void sd_name_set(sd_segment *segment, uint32_t slot, const uint64_t uuid[2], sd_values *values,
                 const unsigned char *name);
/* Does the uuid fit its checksum?  The truth with the slot's or the list lock held. */
bool sd_uuid_sound(const sd_slot *record);

/* Where a blob lies, checksum first. */
typedef struct {
    const sd_word *at;
    uint64_t bytes; /* with the checksum */
} sd_stored;

/* A blob that is present; slot lock held.  SD_CORRUPT: it lies nowhere. */
int sd_blob_get(const sd_segment *segment, uint32_t slot, const sd_values *values, int blob,
                sd_stored *stored);
/* The half of the spare name buffer that these flags choose. */
sd_word *sd_small_at(const sd_segment *segment, uint32_t slot, uint64_t flags);

/* A committed record without any lock: begin, copy the blobs that are wanted, then check that they
 * still belong to the view (or, more than is needed, that nothing moved at all).
 * SD_OK (with an empty name if name or uuid is damaged), SD_MISS (not live), SD_DOUBT (a writer
 * came in between: again), SD_CORRUPT (no writer came, and the fields or `life` are damaged; the
 * view is filled all the same, so that what is wrong can be told). */
typedef struct {
    uint64_t life, cur;
    uint64_t uuid[2];
    sd_values values;
    unsigned char name[SD_NAME_MAX + 1];
} sd_view;

int sd_view_begin(const sd_segment *segment, uint32_t slot, sd_view *view);
/* The same without the name. */
int sd_view_fields(const sd_segment *segment, uint32_t slot, sd_view *view);
/* Fetch what sd_view_begin() reads, all at once.  Of the two names it is nearly always the first. */
static inline void sd_view_prefetch(const sd_segment *segment, uint32_t slot)
{
    const sd_slot *record = &segment->slots[slot];
    __builtin_prefetch(&record->life, 0);
    __builtin_prefetch(&record->copy0, 0);
    __builtin_prefetch(&record->copy1, 0);
    __builtin_prefetch(record->uuid, 0);
    __builtin_prefetch(&segment->names[slot], 0);
}
int sd_view_blob(const sd_segment *segment, uint32_t slot, const sd_view *view, int blob,
                 sd_stored *stored); /* SD_OK, SD_MISS (none), SD_DOUBT, SD_CORRUPT */
int sd_view_check(const sd_segment *segment, uint32_t slot, const sd_view *view);
int sd_view_blobs_check(const sd_segment *segment, uint32_t slot, const sd_view *view);

#endif
