/* ring.h - the last events, in a ring (layout.h, E1). */
#ifndef SHMDOMAINS_RING_H
#define SHMDOMAINS_RING_H

#include "fields.h"
#include "mutex.h"

/* What a commit is to be known for. */
#define SD_NEWS_MAX 8
typedef struct {
    unsigned count;
    uint32_t kind[SD_NEWS_MAX]; /* SD_KIND() */
    int32_t id[SD_NEWS_MAX];
    uint32_t pid; /* of a death */
} sd_news;

typedef struct {
    uint64_t number, life, kind, time, uuid[2];
    uint32_t pid;
    unsigned char name[SD_NAME_MAX + 1];
} sd_event;

/* Can there be events?  A damaged event lock cannot be had by anybody, now or later, so a list goes
 * on without events: they are no reason to refuse a commit. */
static inline bool sd_ring_works(const sd_segment *segment)
{
    return segment->at.events && sd_mutex_sound(&segment->header->event_mutex);
}

static inline bool sd_has_news(const sd_segment *segment, const sd_news *news)
{
    return news && news->count && sd_ring_works(segment);
}

/* Event lock held, until sd_ring_publish() or sd_ring_drop().  Write the entries of a commit that
 * comes next; returns the number of the last one, which a change stores in its field copy.
 * `life`: what the entry's commit stores (E1); `old_name`: of SD_RENAMED_FROM. */
uint64_t sd_ring_write(sd_segment *segment, uint32_t slot, int by, uint64_t life,
                       const uint64_t uuid[2], const unsigned char *name,
                       const unsigned char *old_name, const sd_news *news);
void sd_ring_publish(sd_segment *segment, uint64_t last);
/* Repair: publish what a dead writer committed, clear what it did not.  Never fails. */
int sd_ring_settle(sd_segment *segment);

/* The number of the last published event. No lock. */
uint64_t sd_ring_count(const sd_segment *segment);
/* SD_OK; SD_MISS: it was overwritten, was never recorded, or is damaged.  No lock. */
int sd_ring_read(const sd_segment *segment, uint64_t number, sd_event *event);
/* Whether the entry fits its checksum, or has moved meanwhile. */
bool sd_ring_sound(const sd_segment *segment, uint64_t number);
/* Is there an entry behind the last one, that a dead writer may have committed? */
bool sd_ring_unsettled(const sd_segment *segment);

#endif
