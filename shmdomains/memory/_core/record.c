/* record.c - commit, insert and remove.
 *
 * A holder changes nothing in place.  sd_commit() writes new blobs into fresh extents, and small
 * data, the name and the fields into their spares; then one store of `cur` makes all of it current
 * (fields.c).
 * What was current before is garbage from then on, and is freed afterwards (locks.c).  So a holder
 * that dies leaves the old record or the new one, with some garbage.
 *
 * Insert and remove commit with one store of `life`.  A new domain is complete in its FREE slot
 * before that store.
 *
 * An index changes together with the commit, while its sequence is odd (I4, I5).  If it contradicts
 * itself there, it is made anew from what is committed.
 */
#include "record.h"

#include "locks.h"
#include "mutex.h"
#include "prefetch.h"
#include "rebuild.h"
#include "wait.h"

#include <errno.h>

/* --- prefetch -------------------------------------------------------------------------------- */

void sd_prefetch_replace(const sd_segment *segment, uint32_t slot)
{
    __builtin_prefetch(&segment->names[slot], 0);
    sd_prefetch_store(segment->slots[slot].extent);
}

void sd_prefetch_insert(const sd_segment *segment)
{
    uint64_t next = sd_load(&segment->header->free_head);
    if (!next || next > sd_slot_count(segment)) return;
    const sd_slot *record = &segment->slots[next - 1];
    sd_prefetch_store(&record->mutex);
    sd_prefetch_store(&record->copy0);
    sd_prefetch_store(&record->copy1);
    sd_prefetch_store(record->uuid);
    sd_prefetch_store(record->extent);
    sd_prefetch_store(&record->next_free);
    sd_prefetch_store(&segment->names[next - 1]);
}

/* Room for one more entry; the index's lock held. */
static int reserve(sd_segment *segment, int index)
{
    int result = sd_index_reserve(segment, index);
    if (result == SD_CORRUPT && sd_mend(segment, index) == SD_OK)
        result = sd_index_reserve(segment, index);
    return result;
}

/* --- commit ---------------------------------------------------------------------------------- */

/* Allocate the new blobs into the spare descriptors, all or nothing.  Heap lock held. */
static int allocate_blobs(sd_segment *segment, uint32_t slot, uint64_t flags,
                          const sd_blob blobs[SD_BLOBS])
{
    sd_slot *record = &segment->slots[slot];
    int result = SD_OK;
    sd_free_garbage(segment, slot);
    for (int b = 0; b < SD_BLOBS && result == SD_OK; b++) {
        if (!blobs[b].change || !blobs[b].bytes) continue;
        sd_word *spare = &record->extent[sd_place(flags, b)][!sd_choice(flags, b)];
        result = sd_heap_allocate(segment, spare, blobs[b].size + 8);
    }
    if (result != SD_OK) sd_free_garbage(segment, slot);
    return result;
}

/* Fill the fresh extents and let `values` choose them. */
static void fill_blobs(sd_segment *segment, uint32_t slot, const uint64_t uuid[2],
                       sd_values *values, const sd_blob blobs[SD_BLOBS])
{
    sd_slot *record = &segment->slots[slot];
    uint64_t version = sd_count_value(sd_load(&record->cur)) + 1;
    for (int b = 0; b < SD_BLOBS; b++) {
        if (!blobs[b].change) continue;
        values->version[b] = b == SD_NEXT_DEFINITION ? version | SD_BORN_NEXT : version;
        values->flags &= ~SD_FLAG_PRESENT(b);
        if (!blobs[b].bytes) continue;
        values->flags ^= SD_FLAG_CHOICE(b);
        values->flags |= SD_FLAG_PRESENT(b);
        int place = sd_place(values->flags, b);
        uint64_t extent = sd_load(&record->extent[place][sd_choice(values->flags, b)]);
        sd_word *to = sd_extent_at(segment, extent);
        sd_prefetch_write(to, blobs[b].size + 8);
        sd_blob_put(to, uuid, b, values->version[b], blobs[b].bytes, blobs[b].size);
    }
}

/* Does the new definition lie in the heap already, sound, as the next definition that goes? */
static bool is_next(const sd_segment *segment, uint32_t slot, const uint64_t uuid[2],
                    const sd_values *now, const sd_blob blobs[SD_BLOBS])
{
    const sd_blob *wanted = &blobs[SD_DEFINITION];
    sd_stored stored;
    uint64_t version = now->version[SD_NEXT_DEFINITION];
    if (!wanted->bytes || !blobs[SD_NEXT_DEFINITION].change) return false;
    if (!(now->flags & SD_FLAG_PRESENT(SD_NEXT_DEFINITION))) return false;
    if (sd_blob_get(segment, slot, now, SD_NEXT_DEFINITION, &stored) != SD_OK) return false;
    if (stored.bytes != wanted->size + 8) return false;
    if (memcmp((const void *)(stored.at + 1), wanted->bytes, wanted->size)) return false;
    return sd_load(stored.at) == sd_blob_sum(uuid, SD_NEXT_DEFINITION, version, wanted->bytes,
                                             wanted->size);
}

/* The next definition becomes the definition where it lies (I6); it leaves no next one. */
static void change_places(sd_values *values)
{
    const uint64_t both = SD_FLAG_CHOICE(SD_DEFINITION) | SD_FLAG_CHOICE(SD_NEXT_DEFINITION);
    uint64_t chosen = values->flags & both;
    values->flags ^= SD_FLAG_SWAPPED;
    if (chosen && chosen != both) values->flags ^= both;
    values->flags &= ~SD_FLAG_PRESENT(SD_NEXT_DEFINITION);
    values->version[SD_DEFINITION] = values->version[SD_NEXT_DEFINITION];
}

/* An index that contradicts itself after a commit is made anew.  If a record is damaged as well it
 * cannot be: then it stays as it is, and finds that meet a damaged entry look at the records.  A
 * repair that must succeed would poison the list here, for one damaged domain. */
static void mend_or_leave(sd_segment *segment, int index)
{
    if (sd_mend(segment, index) != SD_OK) sd_sequence_end(sd_index_sequence(segment, index));
}

/* The flip together with what the id index says (I4); id lock held, room reserved. */
static void flip_with_ids(sd_segment *segment, uint32_t slot, const sd_values *values, int32_t old)
{
    sd_header *header = segment->header;
    int result = SD_OK;
    sd_sequence_begin(&header->id_seq);
    if (values->id >= 0) {
        result = sd_index_insert(segment, SD_ID_INDEX, sd_hash_id(segment, values->id), slot);
        sd_store(&header->active, sd_load(&header->active) + 1);
    }
    sd_values_flip(&segment->slots[slot], values);
    if (result == SD_OK && old >= 0) {
        result = sd_index_delete(segment, SD_ID_INDEX, sd_hash_id(segment, old), slot);
        sd_store(&header->active, sd_load(&header->active) - 1);
    }
    /* The commit stands, whatever the index says. */
    if (result == SD_OK) sd_sequence_end(&header->id_seq);
    else mend_or_leave(segment, SD_ID_INDEX);
}

/* The flip together with what the name index says; list lock held, room reserved. */
static void flip_with_name(sd_segment *segment, uint32_t slot, const sd_values *values,
                           const unsigned char *old, const unsigned char *name)
{
    sd_header *header = segment->header;
    sd_sequence_begin(&header->list_seq);
    sd_values_flip(&segment->slots[slot], values);
    int gone = sd_index_delete(segment, SD_NAME_INDEX,
                               sd_hash_name(segment, old + 1, old[0]), slot);
    int listed = sd_index_insert(segment, SD_NAME_INDEX,
                                 sd_hash_name(segment, name + 1, name[0]), slot);
    if (gone == SD_OK && listed == SD_OK) sd_sequence_end(&header->list_seq);
    else mend_or_leave(segment, SD_NAME_INDEX);
}

/* After the commit: count it, and wake whoever waits for this domain, or for any (W1).  `before`:
 * the number of the commit before it. */
static void tell(sd_segment *segment, uint32_t slot, uint64_t before)
{
    sd_header *header = segment->header;
    sd_slot *record = &segment->slots[slot];
    uint64_t cur = sd_count_value(sd_load(&record->cur));
    sd_count(&segment->counters->commits);
    atomic_thread_fence(memory_order_seq_cst);
    sd_tell(&record->cur, &record->waiting, before + 1, cur);
    uint64_t seq = sd_load(&header->any_seq);
    if (__builtin_expect(sd_load(&header->any_waiting) <= seq, 1)) return;
    sd_crash_point();
    if (!atomic_compare_exchange_strong(&header->any_seq, &seq, seq + 1)) return;
    sd_wake(&header->any_seq);
    /* Without a lock `any_seq` may be further by now, and a waiter beyond that: it is loaded last. */
    uint64_t raised = sd_load_acquire(&header->any_waiting);
    sd_lower_damaged(&header->any_waiting, raised, sd_load(&header->any_seq) + 1);
}

/* All that comes before the flip: new blobs in the heap, where `next` chooses them. */
static int make_blobs(sd_segment *segment, uint32_t slot, const uint64_t uuid[2], sd_values *next,
                      const sd_blob blobs[SD_BLOBS], uint64_t deadline)
{
    int result = sd_short_locks(segment, SD_HEAP, deadline);
    if (result != SD_OK) return result;
    result = allocate_blobs(segment, slot, next->flags, blobs);
    sd_heap_unlock(segment);
    if (result == SD_OK) fill_blobs(segment, slot, uuid, next, blobs);
    return result;
}

/* Small data goes where `next` chooses it then (I7). */
static void put_small(sd_segment *segment, uint32_t slot, const uint64_t uuid[2], sd_values *next,
                      const sd_blob *data)
{
    uint64_t version = sd_count_value(sd_load(&segment->slots[slot].cur)) + 1;
    next->version[SD_DATA] = version | data->size << SD_SMALL_SHIFT;
    next->flags ^= SD_FLAG_CHOICE(SD_DATA);
    next->flags |= SD_FLAG_PRESENT(SD_DATA);
    sd_blob_put(sd_small_at(segment, slot, next->flags), uuid, SD_DATA, next->version[SD_DATA],
                data->bytes, data->size);
}

/* A name is about to come where small data lies (I7): the data is to go to the heap like any other
 * blob.  `copy` keeps its bytes.  What is damaged is not moved: it would get a sum that fits. */
static int move_small(const sd_segment *segment, uint32_t slot, const uint64_t uuid[2],
                      const sd_values *now, uint64_t copy[SD_SMALL_WORDS], sd_blob *data)
{
    sd_stored small;
    if (!(now->flags & SD_FLAG_PRESENT(SD_DATA)) || !sd_small_bytes(now)) return SD_OK;
    if (data->change) return SD_MISMATCH; /* no caller's: it could not come with the name at once */
    if (sd_blob_get(segment, slot, now, SD_DATA, &small) != SD_OK) return SD_CORRUPT;
    sd_copy_out(copy, small.at, small.bytes);
    if (copy[0] != sd_blob_sum(uuid, SD_DATA, now->version[SD_DATA], copy + 1, small.bytes - 8))
        return SD_CORRUPT;
    *data = (sd_blob){true, copy + 1, small.bytes - 8};
    return SD_OK;
}

/* The data that `next` chooses counts from now on, and nothing else that is new: a commit of its
 * own, which nobody sees.  The name comes right after it, and nothing in between can fail. */
static void leave_name_buffer(sd_slot *record, const sd_values *now, const sd_values *next)
{
    sd_values moved = *now;
    const uint64_t of_data = SD_FLAG_CHOICE(SD_DATA) | SD_FLAG_PRESENT(SD_DATA);
    moved.flags = (now->flags & ~of_data) | (next->flags & of_data);
    moved.version[SD_DATA] = next->version[SD_DATA];
    sd_values_flip(record, &moved);
}

/* The flip, with what belongs to it in indexes and events; their locks are held. */
static void flip(sd_segment *segment, uint32_t slot, const uint64_t uuid[2], const sd_values *now,
                 sd_values *next, const unsigned char *old_name, const unsigned char *name,
                 const sd_news *news)
{
    if (news)
        next->event = sd_ring_write(segment, slot, SD_BY_CHANGE,
                                    sd_load(&segment->slots[slot].life), uuid,
                                    name ? name : old_name, old_name, news);
    if (name)
        flip_with_name(segment, slot, next, old_name, name);
    else if (now->id != next->id)
        flip_with_ids(segment, slot, next, now->id);
    else
        sd_values_flip(&segment->slots[slot], next);
    if (news) sd_ring_publish(segment, next->event);
}

/* Which blobs go to the heap: a definition does not that lies there already, nor small data, unless
 * the name needs its place. */
static int sort_blobs(sd_segment *segment, uint32_t slot, const uint64_t uuid[2],
                      const sd_values *now, sd_values *next, const sd_blob changes[SD_BLOBS],
                      const unsigned char *name, uint64_t copy[SD_SMALL_WORDS],
                      sd_blob blobs[SD_BLOBS])
{
    memset(blobs, 0, SD_BLOBS * sizeof *blobs);
    if (changes) memcpy(blobs, changes, SD_BLOBS * sizeof *blobs);
    sd_blob *data = &blobs[SD_DATA];
    if (blobs[SD_DEFINITION].change && is_next(segment, slot, uuid, now, changes)) {
        change_places(next);
        blobs[SD_DEFINITION].change = false;
    }
    if (name) return move_small(segment, slot, uuid, now, copy, data);
    if (data->change && data->bytes && data->size <= SD_SMALL_MAX) {
        put_small(segment, slot, uuid, next, data);
        data->change = false;
    }
    return SD_OK;
}

int sd_commit(sd_segment *segment, uint32_t slot, sd_values *values,
              const sd_blob changes[SD_BLOBS], const unsigned char *name, const sd_news *news,
              uint64_t deadline)
{
    sd_blob blobs[SD_BLOBS]; /* those of the heap, if there are changes or a name */
    sd_slot *record = &segment->slots[slot];
    sd_values now, next = *values;
    unsigned char old_name[SD_NAME_MAX + 1];
    const uint64_t private_flags =
        ~(SD_FLAG_PERSISTENT | SD_FLAG_AUTOSTART | SD_FLAG_UNFINISHED);
    uint64_t copy[SD_SMALL_WORDS];
    bool new_blobs = false, tidy = sd_load(&record->dirty);
    const uint64_t uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    if (!sd_has_news(segment, news)) news = NULL;
    if (sd_values_get(segment, slot, &now) != SD_OK) return SD_CORRUPT;
    if (name || news) {
        sd_name_get(segment, slot, now.flags, old_name);
        if (name && !old_name[0]) return SD_CORRUPT;
    }
    const uint64_t before = sd_count_value(sd_load(&record->cur));
    int result = SD_OK;
    next.flags = (values->flags & ~private_flags) | (now.flags & private_flags);
    memcpy(next.version, now.version, sizeof next.version);
    next.event = now.event;
    if (changes || name) {
        result = sort_blobs(segment, slot, uuid, &now, &next, changes, name, copy, blobs);
        if (result != SD_OK) return result;
        tidy |= now.flags & SD_FLAG_PRESENT(SD_DATA) && !sd_small_bytes(&now) &&
                sd_small_bytes(&next); /* it leaves the heap */
        for (int b = 0; b < SD_BLOBS; b++) {
            tidy |= blobs[b].change;
            new_blobs |= blobs[b].change && blobs[b].bytes;
        }
    }
    int locks = (now.id != next.id ? SD_IDS : 0) | (news ? SD_EVENTS : 0);

    if (new_blobs) result = make_blobs(segment, slot, uuid, &next, blobs, deadline);
    else if (changes) fill_blobs(segment, slot, uuid, &next, blobs);
    if (result == SD_OK && locks) result = sd_short_locks(segment, locks, deadline);
    bool locked = result == SD_OK;
    /* An id that takes another one's place needs no room: a table is half empty at least. */
    if (locked && next.id >= 0 && now.id < 0) result = reserve(segment, SD_ID_INDEX);
    if (result == SD_OK) {
        if (name) {
            if (blobs[SD_DATA].bytes == copy + 1) leave_name_buffer(record, &now, &next);
            sd_name_set(segment, slot, uuid, &next, name);
        }
        flip(segment, slot, uuid, &now, &next, old_name, name, news);
        *values = next;
    }
    int error = errno; /* of SD_NO_MEMORY; a wait for a lock may change it */
    if (locked) sd_short_unlock(segment, locks);
    if (result == SD_OK) tell(segment, slot, before);
    /* In a child that a signal handler forked, the new blobs are its parent's. */
    if (result == SD_OK ? tidy : new_blobs && result != SD_FORKED) sd_tidy(segment, slot);
    errno = error;
    return result;
}

int sd_take_id(sd_segment *segment, int32_t *id, uint64_t deadline)
{
    sd_header *header = segment->header;
    int result = sd_ids_lock(segment, deadline);
    if (result != SD_OK) return result;
    uint64_t next = sd_unsealed(sd_load(&header->next_id));
    if (next == UINT64_MAX) result = SD_CORRUPT;
    else if (next >= SD_ID_END) result = SD_FULL;
    else sd_publish(&header->next_id, sd_seal(next + 1));
    sd_ids_unlock(segment);
    *id = (int32_t)next;
    return result;
}

/* --- insert and remove ----------------------------------------------------------------------- */

/* One more slot: commit memory, initialise the mutex, then count it.  A slot that is not counted is
 * nobody's, so what a dead grower left is done again.  List lock held. */
static int add_slots(sd_segment *segment)
{
    sd_header *header = segment->header;
    uint32_t count;
    uint64_t committed = sd_unsealed(sd_load(&header->slots_committed));
    if (sd_slots(segment, &count) != SD_OK) return SD_CORRUPT;
    if (count >= segment->at.max_slots) return SD_FULL;
    if (count == committed) {
        uint64_t more = segment->at.max_slots - count < 256 ? segment->at.max_slots - count : 256;
        int result = sd_commit_memory(segment, segment->at.slots + count * sizeof(sd_slot),
                                      more * sizeof(sd_slot));
        if (result == SD_OK)
            result = sd_commit_memory(segment, segment->at.names + count * sizeof(sd_names),
                                      more * sizeof(sd_names));
        if (result != SD_OK) return result;
        sd_publish(&header->slots_committed, sd_seal(count + more));
    }
    sd_slot *fresh = &segment->slots[count];
    if (sd_load(&fresh->cur) || sd_load(&fresh->life)) return SD_CORRUPT; /* it was used before */
    int result = sd_mutex_init(&fresh->mutex);
    if (result != SD_OK) return result;
    sd_store(&fresh->next_free, sd_load(&header->free_head));
    sd_publish(&header->slot_count, sd_seal(count + 1));
    sd_publish(&header->free_head, count + 1);
    return SD_OK;
}

int sd_free_slot(sd_segment *segment, sd_word **link, uint32_t *slot)
{
    sd_header *header = segment->header;
    sd_word *from = *link ? &segment->slots[*slot].next_free : &header->free_head;
    if (!sd_load(from)) {
        int result = add_slots(segment);
        if (result != SD_OK) return result;
        from = &header->free_head;
    }
    uint64_t next = sd_load(from);
    if (!next || next > sd_slot_count(segment)) return SD_CORRUPT;
    uint64_t life = sd_load(&segment->slots[next - 1].life);
    if (life & 1 || !sd_count_sound(life)) return SD_CORRUPT;
    *link = from;
    *slot = (uint32_t)(next - 1);
    return SD_OK;
}

/* All of a new domain but the flip, in a FREE slot: blobs, name and uuid; `next` chooses them. */
static int prepare(sd_segment *segment, uint32_t slot, const uint64_t uuid[2],
                   const unsigned char *name, sd_values *next, const sd_blob blobs[SD_BLOBS],
                   uint64_t deadline)
{
    sd_slot *record = &segment->slots[slot];
    sd_values now;
    if (!sd_count_sound(sd_load(&record->cur))) return SD_CORRUPT;
    sd_values_get(segment, slot, &now); /* the slot is FREE: any choice will do */
    next->flags &= SD_FLAG_PERSISTENT | SD_FLAG_AUTOSTART | SD_FLAG_UNFINISHED;
    next->flags |= now.flags & SD_FLAG_SWAPPED;
    for (int b = 0; b < SD_BLOBS; b++) next->flags |= now.flags & SD_FLAG_CHOICE(b);
    next->flags |= SD_FLAG_NAME; /* so that a first name lies where finds look first */
    int result = make_blobs(segment, slot, uuid, next, blobs, deadline);
    if (result != SD_OK) return result;
    sd_name_set(segment, slot, uuid, next, name);
    sd_store(&record->died_who, 0);
    sd_store(&record->uuid[0], uuid[0]);
    sd_store(&record->uuid[1], uuid[1]);
    sd_store(&record->sum_and_pid, sd_uuid_sum(uuid));
    return SD_OK;
}

/* Insert and remove take the event lock also without events: what `life` says of a dead writer's
 * has to be read before it changes (E1). */
static int event_lock_of(const sd_segment *segment)
{
    return sd_ring_works(segment) ? SD_EVENTS : 0;
}

int sd_insert(sd_segment *segment, uint32_t slot, sd_word *link, const uint64_t uuid[2],
              const unsigned char *name, const sd_values *values, const sd_blob blobs[SD_BLOBS],
              const sd_news *news, uint64_t deadline)
{
    sd_header *header = segment->header;
    sd_slot *record = &segment->slots[slot];
    sd_values next = *values;
    const uint64_t before = sd_count_value(sd_load(&record->cur));
    uint64_t life = sd_life_begun(sd_load(&record->life));
    int locks = event_lock_of(segment);
    if (!sd_has_news(segment, news)) news = NULL;
    int result = reserve(segment, SD_UUID_INDEX);
    if (result == SD_OK) result = reserve(segment, SD_NAME_INDEX);
    if (result == SD_OK) result = prepare(segment, slot, uuid, name, &next, blobs, deadline);
    if (result == SD_OK && locks) {
        result = sd_short_locks(segment, locks, deadline);
        if (result != SD_OK && result != SD_FORKED) sd_tidy(segment, slot);
    }
    if (result != SD_OK) return result;
    next.event = 0; /* not another domain's (E1) */
    if (news)
        next.event = sd_ring_write(segment, slot, SD_BY_LIFE, life, uuid, name, name, news);
    sd_values_flip(record, &next);
    sd_sequence_begin(&header->list_seq);
    sd_publish(&record->life, life);
    sd_store(link, sd_load(&record->next_free));
    int by_uuid = sd_index_insert(segment, SD_UUID_INDEX, sd_hash_uuid(segment, uuid), slot);
    int by_name = sd_index_insert(segment, SD_NAME_INDEX,
                                  sd_hash_name(segment, name + 1, name[0]), slot);
    sd_store(&header->live, sd_load(&header->live) + 1);
    if (by_uuid == SD_OK && by_name == SD_OK) sd_sequence_end(&header->list_seq);
    else mend_or_leave(segment, SD_NAME_INDEX);
    if (news) sd_ring_publish(segment, next.event);
    sd_short_unlock(segment, locks);
    tell(segment, slot, before);
    return SD_OK;
}

int sd_remove(sd_segment *segment, uint32_t slot, const sd_news *news, uint64_t deadline)
{
    sd_header *header = segment->header;
    sd_slot *record = &segment->slots[slot];
    sd_values now;
    unsigned char name[SD_NAME_MAX + 1];
    uint64_t event = 0, uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    if (!sd_count_sound(sd_load(&record->life))) return SD_CORRUPT;
    if (sd_values_get(segment, slot, &now) != SD_OK) return SD_CORRUPT;
    sd_name_get(segment, slot, now.flags, name); /* a damaged one makes the index be rebuilt */
    bool ids = now.id >= 0;
    const uint64_t before = sd_count_value(sd_load(&record->cur));
    uint64_t life = sd_life_ended(sd_load(&record->life));
    int locks = event_lock_of(segment) | (ids ? SD_IDS : 0);
    int result = locks ? sd_short_locks(segment, locks, deadline) : SD_OK;
    if (result != SD_OK) return result;
    if (sd_has_news(segment, news))
        event = sd_ring_write(segment, slot, SD_BY_LIFE, life, uuid, name, name, news);

    if (ids) sd_sequence_begin(&header->id_seq);
    sd_sequence_begin(&header->list_seq);
    sd_publish(&record->life, life);
    /* For those who wait for it (W1).  Two further, so that the same copy stays the current one. */
    sd_publish(&record->cur, sd_count_seal(before + 2));
    int by_uuid = sd_index_delete(segment, SD_UUID_INDEX, sd_hash_uuid(segment, uuid), slot);
    int by_name = sd_index_delete(segment, SD_NAME_INDEX,
                                  sd_hash_name(segment, name + 1, name[0]), slot);
    sd_store(&header->live, sd_load(&header->live) - 1);
    sd_store(&record->next_free, sd_load(&header->free_head));
    sd_publish(&header->free_head, slot + 1);
    if (by_uuid == SD_OK && by_name == SD_OK) sd_sequence_end(&header->list_seq);
    else mend_or_leave(segment, SD_NAME_INDEX);
    if (ids) {
        int entered = sd_index_delete(segment, SD_ID_INDEX, sd_hash_id(segment, now.id), slot);
        sd_store(&header->active, sd_load(&header->active) - 1);
        if (entered == SD_OK) sd_sequence_end(&header->id_seq);
        else mend_or_leave(segment, SD_ID_INDEX);
    }
    if (event) sd_ring_publish(segment, event);
    sd_short_unlock(segment, locks);
    tell(segment, slot, before);
    sd_tidy(segment, slot);
    return SD_OK;
}
