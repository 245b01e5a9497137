/* check_ring.c - the ring of events, and what the records say of it.
 *
 * An entry is rewritten with its number 0 meanwhile, so one that stood still and does not fit its
 * checksum is a fault, seen without a lock.  No entry is numbered higher than one commit can be
 * ahead of the count.  That there is none where one should be is no fault: there may have been no
 * memory for it.
 *
 * A record names its last event before that is published, and a dead writer's may stay so; with the
 * event lock, whose holder settles that, the count has reached it.
 */
#include "check_ring.h"

#include "mutex.h"
#include "ring.h"

static void check_entry(const sd_check *check, uint64_t place)
{
    const sd_segment *segment = check->segment;
    uint64_t word = sd_load_acquire(&segment->ring[place].number), number = sd_unsealed(word);
    if (!word) return;
    if (number == UINT64_MAX || !number || (number & (segment->at.events - 1)) != place)
        sd_fault(check, "E1 events", "place %llu of the ring has a damaged number",
                 (unsigned long long)place);
    else if (number > sd_ring_count(segment) + SD_NEWS_MAX)
        sd_fault(check, "E1 events", "event %llu is in the ring and has not happened",
                 (unsigned long long)number);
    else if (!sd_ring_sound(segment, number))
        sd_fault(check, "E1 events", "event %llu does not fit its checksum",
                 (unsigned long long)number);
}

static bool check_words(sd_check *check)
{
    const sd_segment *segment = check->segment;
    const sd_header *header = segment->header;
    uint64_t committed = sd_unsealed(sd_load_acquire(&header->ring_committed));
    if (!sd_mutex_sound(&header->event_mutex))
        sd_fault(check, "locks", "the events' lock is damaged");
    if (sd_unsealed(sd_load(&header->event_count)) == UINT64_MAX)
        sd_fault(check, "E1 events", "the number of events is damaged");
    if (committed > segment->at.events) {
        sd_fault(check, "E1 events", "the ring's watermark is damaged");
        return false;
    }
    check->ring_size = committed;
    return true;
}

int sd_check_ring(sd_check *check, uint64_t until)
{
    if (!check->ring_begun && !check_words(check)) return SD_CORRUPT;
    check->ring_begun = true;
    while (check->ring_next < check->ring_size) {
        check_entry(check, check->ring_next++);
        if (sd_check_late(check->ring_next, until)) return SD_TIMEOUT;
    }
    return SD_OK;
}

void sd_check_event_named(sd_check *check, uint32_t slot, uint64_t event)
{
    if (event <= check->event_named) return;
    check->event_named = event;
    check->event_named_by = slot;
}

bool sd_check_ring_suspect(const sd_check *check)
{
    return check->event_named > sd_ring_count(check->segment);
}

void sd_check_ring_judge(sd_check *check)
{
    if (!sd_check_ring_suspect(check)) return;
    sd_fault(check, "E1 events", "slot %u names event %llu, which has not happened",
             check->event_named_by, (unsigned long long)check->event_named);
}
