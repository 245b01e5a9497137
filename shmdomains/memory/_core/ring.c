/* ring.c - the last events, in a ring.
 *
 * Event n has its place n modulo the size of the ring.  A writer holds the event lock; it makes the
 * entries of its commit, commits, and stores `event_count`.  A reader takes no lock: it copies the
 * entry between two loads of its number, and believes it if the number and the checksum fit.
 *
 * After a death with the event lock held the entries behind `event_count` are judged by the record:
 * sd_ring_settle().  Rule E1 of layout.h says why the record still tells the truth then, and
 * tests/model/events.py goes through every interleaving.
 *
 * The ring gets its memory in steps, as it is first used.  Where there is none an event has no
 * entry, and counts as missed: no commit fails for it.
 */
#include "ring.h"

#include "wait.h"

#define FIRST_WORDS (offsetof(sd_entry, name) / 8)
#define PID_SHIFT 40 /* in `place` */

static sd_entry *entry_of(const sd_segment *segment, uint64_t number)
{
    return &segment->ring[number & (segment->at.events - 1)];
}

static bool has_memory(const sd_segment *segment, uint64_t number)
{
    uint64_t committed = sd_unsealed(sd_load_acquire(&segment->header->ring_committed));
    return committed <= segment->at.events && (number & (segment->at.events - 1)) < committed;
}

/* Memory for the entries up to this one, from the first that has none.  The place of an event comes
 * after that of the one before, or is the first, so it is one step at most, unless the watermark was
 * damaged: then it begins again, and what has memory keeps it. */
static bool make_room(sd_segment *segment, uint64_t number)
{
    while (!has_memory(segment, number)) {
        uint64_t committed = sd_unsealed(sd_load(&segment->header->ring_committed));
        if (committed > segment->at.events) committed = 0;
        uint64_t more = segment->at.events - committed;
        if (more > SD_RING_STEP) more = SD_RING_STEP;
        if (sd_commit_memory(segment, segment->at.ring + committed * sizeof(sd_entry),
                             more * sizeof(sd_entry)) != SD_OK)
            return false;
        sd_publish(&segment->header->ring_committed, sd_seal(committed + more));
    }
    return true;
}

/* Not the checksum of a blob, which takes longer to begin than all of this. */
static uint64_t sum_of(const uint64_t words[FIRST_WORDS], const unsigned char *name)
{
    const uint64_t odd = 0x9e3779b97f4a7c15ull;
    uint64_t sum = 0, size = name[0] + 1u;
    for (size_t i = 0; i < FIRST_WORDS - 1; i++) sum = ((sum << 5 | sum >> 59) ^ words[i]) * odd;
    for (; size > 8; size -= 8, name += 8)
        sum = ((sum << 5 | sum >> 59) ^ sd_bytes(name, 8)) * odd;
    sum = ((sum << 5 | sum >> 59) ^ sd_bytes(name, size)) * odd;
    return sum ^ sum >> 32;
}

static void write_entry(sd_entry *to, const uint64_t words[FIRST_WORDS], const unsigned char *name)
{
    sd_publish(&to->number, 0);
    sd_copy_in(&to->place, words + 1, (FIRST_WORDS - 1) * 8);
    sd_copy_in(to->name, name, name[0] + 1u);
    sd_publish(&to->number, words[0]);
}

/* A damaged count: the largest number in the ring. */
static uint64_t count_anew(const sd_segment *segment)
{
    uint64_t count = 0, committed = sd_unsealed(sd_load(&segment->header->ring_committed));
    for (uint64_t i = 0; i < committed && committed <= segment->at.events; i++) {
        uint64_t number = sd_unsealed(sd_load(&segment->ring[i].number));
        if (number != UINT64_MAX && number > count) count = number;
    }
    return count;
}

uint64_t sd_ring_count(const sd_segment *segment)
{
    uint64_t count = sd_unsealed(sd_load_acquire(&segment->header->event_count));
    return __builtin_expect(count != UINT64_MAX, 1) ? count : count_anew(segment);
}

/* Event lock held: a damaged count is stored anew.  The records know events that have no entry. */
static uint64_t mended_count(sd_segment *segment)
{
    uint64_t count = sd_unsealed(sd_load(&segment->header->event_count));
    if (__builtin_expect(count != UINT64_MAX, 1)) return count;
    count = count_anew(segment);
    for (uint32_t slot = 0; slot < sd_slot_count(segment); slot++) {
        sd_values values;
        if (sd_values_settled(segment, slot, &values) == SD_OK && values.event > count)
            count = values.event;
    }
    sd_publish(&segment->header->event_count, sd_seal(count));
    return count;
}

uint64_t sd_ring_write(sd_segment *segment, uint32_t slot, int by, uint64_t life,
                       const uint64_t uuid[2], const unsigned char *name,
                       const unsigned char *old_name, const sd_news *news)
{
    uint64_t count = mended_count(segment), last = count + news->count, now = sd_now_real();
    bool room = true;
    for (unsigned i = 1; i <= news->count; i++) room &= make_room(segment, count + i);
    if (!room) {
        sd_ring_publish(segment, last);
        return last;
    }
    for (unsigned i = 0; i < news->count; i++) {
        uint64_t left = news->count - 1 - i;
        uint64_t words[FIRST_WORDS] = {sd_seal(count + 1 + i),
                                       slot | left << 32 | (uint64_t)news->pid << PID_SHIFT,
                                       life,
                                       news->kind[i] | (uint64_t)by << 24 |
                                           (uint64_t)(uint32_t)news->id[i] << 32,
                                       now,
                                       uuid[0],
                                       uuid[1],
                                       0};
        const unsigned char *whose = news->kind[i] == SD_RENAMED_FROM ? old_name : name;
        words[7] = sum_of(words, whose);
        write_entry(entry_of(segment, count + 1 + i), words, whose);
    }
    return last;
}

void sd_ring_publish(sd_segment *segment, uint64_t last)
{
    sd_header *header = segment->header;
    uint64_t count = sd_ring_count(segment);
    if (count >= last) return; /* without entries: before the commit */
    sd_publish(&header->event_count, sd_seal(last));
    atomic_thread_fence(memory_order_seq_cst);
    sd_tell(&header->event_count, &header->event_waiting, count + 1, last);
}

/* A copy of an entry that did not move meanwhile, and fits its checksum. */
static bool copy_entry(const sd_segment *segment, uint64_t number, uint64_t words[FIRST_WORDS],
                       unsigned char name[SD_NAME_MAX + 1])
{
    if (!segment->at.events || !number || !has_memory(segment, number)) return false;
    const sd_entry *from = entry_of(segment, number);
    words[0] = sd_load_acquire(&from->number);
    if (words[0] != sd_seal(number)) return false;
    sd_copy_out(words + 1, &from->place, (FIRST_WORDS - 1) * 8);
    sd_copy_out(name, from->name, SD_NAME_MAX + 1);
    atomic_thread_fence(memory_order_acquire);
    if (sd_load(&from->number) != words[0] || name[0] > SD_NAME_MAX) return false;
    return words[7] == sum_of(words, name);
}

bool sd_ring_sound(const sd_segment *segment, uint64_t number)
{
    uint64_t words[FIRST_WORDS];
    unsigned char name[SD_NAME_MAX + 1];
    if (copy_entry(segment, number, words, name)) return true;
    return sd_load(&entry_of(segment, number)->number) != sd_seal(number);
}

/* Did the commit of this entry happen? */
static bool is_committed(const sd_segment *segment, const uint64_t words[FIRST_WORDS], uint64_t last)
{
    uint32_t slot = (uint32_t)words[1];
    sd_values values;
    if (slot >= sd_slot_count(segment)) return false;
    const sd_slot *record = &segment->slots[slot];
    if (SD_KIND_BY(words[3]) == SD_BY_DEATH) return sd_load(&record->died_who) == words[2];
    if (sd_load_acquire(&record->life) != words[2]) return false;
    if (SD_KIND_BY(words[3]) == SD_BY_LIFE) return true;
    return sd_values_settled(segment, slot, &values) == SD_OK && values.event == last;
}

/* From the last to the first: whoever dies here leaves the first, and the next one goes on. */
static void clear_entries(sd_segment *segment, uint64_t first, uint64_t last)
{
    for (uint64_t number = last; number >= first; number--) {
        if (!has_memory(segment, number)) continue;
        sd_word *at = &entry_of(segment, number)->number;
        if (sd_load(at) == sd_seal(number)) sd_publish(at, 0);
    }
}

int sd_ring_settle(sd_segment *segment)
{
    uint64_t words[FIRST_WORDS], count = mended_count(segment);
    unsigned char name[SD_NAME_MAX + 1];
    if (!copy_entry(segment, count + 1, words, name)) return SD_OK;
    uint64_t left = words[1] >> 32 & 0xff, last = count + 1 + left;
    if (left >= SD_NEWS_MAX) return SD_OK;
    if (is_committed(segment, words, last)) sd_ring_publish(segment, last);
    else clear_entries(segment, count + 1, last);
    return SD_OK;
}

bool sd_ring_unsettled(const sd_segment *segment)
{
    uint64_t next = sd_ring_count(segment) + 1;
    if (!segment->at.events || !has_memory(segment, next)) return false;
    return sd_load(&entry_of(segment, next)->number) == sd_seal(next);
}

int sd_ring_read(const sd_segment *segment, uint64_t number, sd_event *event)
{
    uint64_t words[FIRST_WORDS];
    if (number > sd_ring_count(segment)) return SD_MISS;
    if (!copy_entry(segment, number, words, event->name)) return SD_MISS;
    event->number = number;
    event->pid = (uint32_t)(words[1] >> PID_SHIFT);
    event->life = words[2];
    event->kind = words[3];
    event->time = words[4];
    event->uuid[0] = words[5];
    event->uuid[1] = words[6];
    return SD_OK;
}
