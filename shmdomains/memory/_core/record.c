/* record.c - find, read, change and commit one domain.
 *
 * A holder changes nothing in place.  sd_commit() writes new blobs into fresh extents, the fields
 * into the copy that does not count, and then stores `cur`: that one store makes the new fields,
 * the new blobs and the new name count at once.  What counted before is garbage from then on and
 * is freed afterwards.  So a holder that dies leaves either the old record with some garbage, or
 * the new one with some garbage; garbage is what a descriptor names and no counting field copy
 * chooses.
 *
 * Lock-free readers (sd_view_*) take life and cur, copy the fields, and look at both again; blobs they
 * check by life and version (I3).
 */
#include "core.h"

#include <errno.h>

/* --- fields ---------------------------------------------------------------------------------- */

/* Each bit of what goes in is one bit of the sum, so one flipped bit never goes unseen. */
static uint64_t sum_of_fields(uint64_t cur, uint64_t ids, uint64_t status, const uint64_t *version)
{
    uint64_t sum = sd_count_value(cur) ^ (ids << 5 | ids >> 59) ^ (status << 11 | status >> 53);
    for (int b = 0; b < SD_BLOBS; b++)
        sum ^= version[b] << 17 * (b + 1) | version[b] >> (64 - 17 * (b + 1));
    sum ^= sum >> 2 * SD_SUM_BITS ^ sum >> 4 * SD_SUM_BITS;
    return (sum ^ sum >> SD_SUM_BITS) & ((1u << SD_SUM_BITS) - 1);
}

/* False: they are damaged, or somebody writes them. */
static bool read_fields(const sd_slot *record, uint64_t cur, sd_values *values)
{
    const sd_fields *from = sd_copy_of(record, cur);
    uint64_t ids = sd_load(&from->ids), status = sd_load(&from->status);
    values->id = (int32_t)(uint32_t)ids;
    values->pid = (int32_t)(uint32_t)(ids >> 32);
    values->state = (uint16_t)status;
    values->reason = (uint16_t)(status >> 16);
    uint64_t sum = status >> SD_SUM_SHIFT;
    status &= (1ull << SD_SUM_SHIFT) - 1;
    values->flags = status & ~0xffffffffull;
    for (int b = 0; b < SD_BLOBS; b++) values->version[b] = sd_load(&from->version[b]);
    return sum == sum_of_fields(cur, ids, status, values->version) && sd_count_sound(cur);
}

/* `cur`: the one that will make them count. */
static void write_fields(sd_fields *to, const sd_values *values, uint64_t cur)
{
    uint64_t ids = (uint32_t)values->id | (uint64_t)(uint32_t)values->pid << 32;
    uint64_t status = values->state | (uint64_t)values->reason << 16 | values->flags;
    sd_store(&to->ids, ids);
    sd_store(&to->status,
             status | sum_of_fields(cur, ids, status, values->version) << SD_SUM_SHIFT);
    for (int b = 0; b < SD_BLOBS; b++) sd_store(&to->version[b], values->version[b]);
}

static inline int choice_of(uint64_t flags, int blob)
{
    return (flags & SD_FLAG_CHOICE(blob)) != 0;
}

int sd_values_get(const sd_segment *segment, uint32_t slot, sd_values *values)
{
    const sd_slot *record = &segment->slots[slot];
    return read_fields(record, sd_load(&record->cur), values) ? SD_OK : SD_CORRUPT;
}

/* The committed values while others may commit: the copy chosen by a `cur` that stands still. Only
 * single fields of the result belong together where the caller holds the lock that pins them. */
int sd_values_settled(const sd_segment *segment, uint32_t slot, sd_values *values)
{
    const sd_slot *record = &segment->slots[slot];
    for (;;) {
        uint64_t cur = sd_load_acquire(&record->cur);
        bool sound = read_fields(record, cur, values);
        atomic_thread_fence(memory_order_acquire);
        if (sd_load(&record->cur) == cur) return sound ? SD_OK : SD_CORRUPT;
    }
}

static uint32_t sum_of_identity(const sd_segment *segment, const uint64_t uuid[2],
                                const unsigned char *name)
{
    return (uint32_t)(sd_hash_uuid(segment, uuid) ^ sd_hash_name(segment, name + 1, name[0]));
}

/* Damage is an empty name, which no domain has. */
void sd_name_get(const sd_segment *segment, uint32_t slot, uint64_t flags, unsigned char *name)
{
    const sd_slot *record = &segment->slots[slot];
    const sd_word *from = segment->names[slot].word[(flags & SD_FLAG_NAME) != 0];
    uint64_t uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    uint64_t first = sd_load(from);
    uint32_t sum = (uint32_t)first;
    first >>= 8 * SD_NAME_AT;
    memcpy(name, &first, 8 - SD_NAME_AT);
    if (name[0] > SD_NAME_MAX) name[0] = 0;
    for (unsigned at = 8 - SD_NAME_AT; at <= name[0]; at += 8) {
        const uint64_t word = sd_load(++from);
        memcpy(name + at, &word, 8);
    }
    if (name[0] && sum != sum_of_identity(segment, uuid, name)) name[0] = 0;
}

static inline uint64_t stir(uint64_t h, uint64_t word)
{
    return ((h << 5 | h >> 59) ^ word) * 0x9e3779b97f4a7c15ull;
}

/* Four lanes, since a multiplication takes longer than it takes to begin the next one; by name,
 * since in an array they would be kept in memory. */
uint64_t sd_blob_sum(const uint64_t uuid[2], int blob, uint64_t version, const void *bytes,
                     uint64_t size)
{
    const unsigned char *at = bytes;
    uint64_t p = uuid[0] ^ size, q = uuid[1], r = (uint64_t)blob, s = version, h;
    for (; size >= 32; size -= 32, at += 32) {
        p = stir(p, sd_bytes(at, 8));
        q = stir(q, sd_bytes(at + 8, 8));
        r = stir(r, sd_bytes(at + 16, 8));
        s = stir(s, sd_bytes(at + 24, 8));
    }
    for (; size >= 8; size -= 8, at += 8) p = stir(p, sd_bytes(at, 8));
    p = stir(p, sd_bytes(at, size));
    h = stir(0, p);
    h = stir(h ^ h >> 29, q);
    h = stir(h ^ h >> 29, r);
    h = stir(h ^ h >> 29, s);
    return h ^ h >> 32;
}

static bool holds_blob(const sd_segment *segment, uint64_t extent)
{
    return sd_extent_valid(segment, extent) && SD_EXTENT_BYTES(extent) > 8;
}

int sd_blob_get(const sd_segment *segment, uint32_t slot, const sd_values *values, int blob,
                uint64_t *extent)
{
    *extent = sd_load(&segment->slots[slot].extent[blob][choice_of(values->flags, blob)]);
    return holds_blob(segment, *extent) ? SD_OK : SD_CORRUPT;
}

bool sd_uuid_sound(const sd_slot *record)
{
    uint64_t uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    return (sd_load(&record->sum_and_pid) & ~0xffffffffull) == sd_uuid_sum(uuid);
}

/* --- find ------------------------------------------------------------------------------------ */

static bool same_name(const sd_segment *segment, uint32_t slot, const unsigned char *name)
{
    unsigned char other[SD_NAME_MAX + 1];
    sd_values values;
    if (sd_values_settled(segment, slot, &values) != SD_OK) return false;
    sd_name_get(segment, slot, values.flags, other);
    return other[0] == name[0] && !memcmp(other + 1, name + 1, name[0]);
}

static inline bool same_uuid(const sd_slot *record, const sd_key *key)
{
    return sd_load(&record->uuid[0]) == key->uuid[0] && sd_load(&record->uuid[1]) == key->uuid[1];
}

bool sd_matches(const sd_segment *segment, uint32_t slot, const sd_key *key)
{
    const sd_slot *record = &segment->slots[slot];
    sd_values values;
    uint64_t life = sd_load_acquire(&record->life);
    if (!(life & 1) || !sd_count_sound(life)) return false;
    switch (key->what) {
    case SD_UUID_INDEX: return same_uuid(record, key);
    case SD_NAME_INDEX: return same_name(segment, slot, key->name);
    default:
        return sd_values_settled(segment, slot, &values) == SD_OK && values.id == key->id;
    }
}

static uint64_t hash_of(const sd_segment *segment, const sd_key *key)
{
    switch (key->what) {
    case SD_UUID_INDEX: return sd_hash_uuid(segment, key->uuid);
    case SD_NAME_INDEX: return sd_hash_name(segment, key->name + 1, key->name[0]);
    default: return sd_hash_id(segment, key->id);
    }
}

static bool identity_sound(const sd_segment *segment, uint32_t slot)
{
    unsigned char name[SD_NAME_MAX + 1];
    sd_values values;
    if (sd_values_settled(segment, slot, &values) != SD_OK) return false;
    sd_name_get(segment, slot, values.flags, name);
    return name[0];
}

int sd_verify(const sd_segment *segment, uint32_t slot, const sd_key *key, sd_values *values)
{
    const sd_slot *record = &segment->slots[slot];
    unsigned char name[SD_NAME_MAX + 1];
    uint64_t life = sd_load(&record->life);
    if (!(life & 1) || !sd_count_sound(life)) return SD_MISS;
    if (key->what == SD_UUID_INDEX && !same_uuid(record, key)) return SD_MISS;
    if (sd_values_get(segment, slot, values) != SD_OK) return SD_CORRUPT;
    switch (key->what) {
    case SD_UUID_INDEX: return SD_OK;
    case SD_NAME_INDEX:
        sd_name_get(segment, slot, values->flags, name);
        if (!name[0]) return SD_CORRUPT;
        return memcmp(name, key->name, name[0] + 1u) ? SD_MISS : SD_OK;
    default:
        if (values->id != key->id) return SD_MISS;
        return sd_uuid_sound(record) ? SD_OK : SD_CORRUPT;
    }
}

static void to_read(const sd_segment *segment, uint32_t slot, const sd_key *key)
{
    (void)segment, (void)slot, (void)key;
}

/* Ask for what the holder of the lock will touch, all at once and, where it stores, as a writer: one
 * line after the other they take longer than everything else in a find, and a line that another
 * process wrote would be fetched twice, to be read and then to be written.  Of the names it is nearly
 * always the first. */
static void to_hold(const sd_segment *segment, uint32_t slot, const sd_key *key)
{
    const sd_slot *record = &segment->slots[slot];
    sd_ask_to_store(&record->mutex);
    sd_ask_to_store(record->uuid);
    sd_ask_to_store(&record->copy1);
    if (key->what == SD_NAME_INDEX) __builtin_prefetch(&segment->names[slot], 0);
}

/* An entry that leads to a domain whose identity is damaged makes a miss an error. */
__attribute__((always_inline)) static inline int find(
    sd_segment *segment, const sd_key *key, uint32_t *slot,
    void (*ask)(const sd_segment *, uint32_t, const sd_key *))
{
    sd_probe probe;
    bool damaged = false;
    sd_word *sequence = sd_index_sequence(segment, key->what);
    uint64_t before = sd_load_acquire(sequence);
    int result = sd_probe_begin(segment, key->what, hash_of(segment, key), &probe);
    while (result == SD_OK) {
        result = sd_probe_next(segment, &probe, slot);
        if (result != SD_OK) break;
        ask(segment, *slot, key);
        if (sd_matches(segment, *slot, key)) return SD_OK;
        uint64_t life = sd_load(&segment->slots[*slot].life);
        damaged |= !sd_count_sound(life) || (life & 1 && !identity_sound(segment, *slot));
    }
    if (result != SD_MISS) return result;
    atomic_thread_fence(memory_order_acquire);
    if (before & 1 || sd_load(sequence) != before) return SD_DOUBT;
    return damaged ? SD_CORRUPT : SD_MISS;
}

int sd_find(sd_segment *segment, const sd_key *key, uint32_t *slot)
{
    return find(segment, key, slot, to_read);
}

int sd_find_to_lock(sd_segment *segment, const sd_key *key, uint32_t *slot)
{
    return find(segment, key, slot, to_hold);
}

/* --- garbage --------------------------------------------------------------------------------- */

/* Free every descriptor that does not count; none, if which ones count is damaged.  Where it is
 * damaged whether a domain lives here at all, one does: what counts for it is kept.  How many cells
 * that was.  Slot and heap lock held. */
static uint64_t free_uncounted(sd_segment *segment, uint32_t slot)
{
    sd_slot *record = &segment->slots[slot];
    sd_values values;
    uint64_t cells = 0;
    uint64_t life = sd_load(&record->life);
    bool live = life & 1 || !sd_count_sound(life);
    if (sd_values_get(segment, slot, &values) != SD_OK && live) return 0;
    for (int b = 0; b < SD_BLOBS; b++)
        for (int i = 0; i < 2; i++) {
            bool counts = values.flags & SD_FLAG_PRESENT(b) && choice_of(values.flags, b) == i;
            if (!live || !counts) cells += sd_heap_free(segment, &record->extent[b][i]);
        }
    sd_publish(&record->dirty, 0);
    return cells;
}

/* The heap lock may be out of reach (its holder is stopped): then the next holder tidies. */
void sd_tidy(sd_segment *segment, uint32_t slot)
{
    sd_publish(&segment->slots[slot].dirty, 1);
    if (sd_heap_lock_briefly(segment) != SD_OK) return;
    sd_self()->repair.freed += free_uncounted(segment, slot);
    sd_heap_unlock(segment);
}

/* --- ahead ----------------------------------------------------------------------------------- */

void sd_ask_to_replace(const sd_segment *segment, uint32_t slot)
{
    __builtin_prefetch(&segment->names[slot], 0);
    sd_ask_to_store(segment->slots[slot].extent);
}

void sd_ask_to_insert(const sd_segment *segment)
{
    uint64_t next = sd_load(&segment->header->free_head);
    if (!next || next > sd_slot_count(segment)) return;
    const sd_slot *record = &segment->slots[next - 1];
    sd_ask_to_store(&record->mutex);
    sd_ask_to_store(record->uuid);
    sd_ask_to_store(&record->copy1);
    sd_ask_to_store(record->extent);
    sd_ask_to_store(&segment->names[next - 1]);
}

/* --- commit ---------------------------------------------------------------------------------- */

/* A wait of more than a slice starts again from the front. */
int sd_short_locks(sd_segment *segment, bool ids, bool heap, uint64_t deadline)
{
    for (;;) {
        int result = ids ? sd_ids_lock(segment, deadline) : SD_OK;
        if (result != SD_OK || !heap) return result;
        result = sd_heap_lock_briefly(segment);
        if (result == SD_OK) return SD_OK;
        if (ids) sd_ids_unlock(segment);
        if (result != SD_TIMEOUT) return result;
        result = sd_wait_hook(NULL, deadline);
        if (result != SD_OK) return result;
        if (deadline != SD_FOREVER && sd_now() >= deadline) return SD_TIMEOUT;
    }
}

/* Allocate the new blobs into the descriptors that do not count.  Heap lock held.  All or
 * nothing. */
static int allocate_blobs(sd_segment *segment, uint32_t slot, const sd_values *values,
                          const sd_blob blobs[SD_BLOBS])
{
    sd_slot *record = &segment->slots[slot];
    int result = SD_OK;
    free_uncounted(segment, slot);
    for (int b = 0; b < SD_BLOBS && result == SD_OK; b++) {
        if (!blobs[b].change || !blobs[b].bytes) continue;
        sd_word *spare = &record->extent[b][!choice_of(values->flags, b)];
        result = sd_heap_allocate(segment, spare, blobs[b].size + 8);
    }
    if (result != SD_OK) free_uncounted(segment, slot);
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
        values->version[b] = version;
        values->flags &= ~SD_FLAG_PRESENT(b);
        if (!blobs[b].bytes) continue;
        values->flags ^= SD_FLAG_CHOICE(b);
        values->flags |= SD_FLAG_PRESENT(b);
        uint64_t extent = sd_load(&record->extent[b][choice_of(values->flags, b)]);
        sd_word *to = sd_extent_at(segment, extent);
        sd_ask_to_write(to, blobs[b].size + 8); /* they come while the sum is computed */
        sd_store(to, sd_blob_sum(uuid, b, version, blobs[b].bytes, blobs[b].size));
        sd_copy_in(to + 1, blobs[b].bytes, blobs[b].size);
    }
}

static void write_spare_name(sd_segment *segment, uint32_t slot, const uint64_t uuid[2],
                             sd_values *values, const unsigned char *name)
{
    uint64_t first = sd_bytes(name, name[0] < 3 ? name[0] + 1u : 4u);
    uint32_t sum = sum_of_identity(segment, uuid, name);
    values->flags ^= SD_FLAG_NAME;
    sd_word *to = segment->names[slot].word[(values->flags & SD_FLAG_NAME) != 0];
    sd_store(to, sum | first << 8 * SD_NAME_AT);
    if (name[0] > 3) sd_copy_in(to + 1, name + 4, name[0] - 3u);
}

/* Spare copy, then `cur`: the commit. */
static void flip(sd_slot *record, const sd_values *values)
{
    uint64_t cur = sd_load(&record->cur);
    uint64_t next = sd_count_seal(sd_count_value(cur) + 1);
    write_fields(cur & 1 ? &record->copy0 : &record->copy1, values, next);
    sd_publish(&record->cur, next);
}

/* The flip together with what the id index says (I4); id lock held, room reserved. */
static int flip_with_ids(sd_segment *segment, uint32_t slot, const sd_values *values, int32_t old)
{
    sd_header *header = segment->header;
    int result = SD_OK;
    sd_sequence_begin(&header->id_seq);
    if (values->id >= 0) {
        result = sd_index_insert(segment, SD_ID_INDEX, sd_hash_id(segment, values->id), slot);
        sd_store(&header->active, sd_load(&header->active) + 1);
    }
    flip(&segment->slots[slot], values);
    if (result == SD_OK && old >= 0) {
        result = sd_index_delete(segment, SD_ID_INDEX, sd_hash_id(segment, old), slot);
        sd_store(&header->active, sd_load(&header->active) - 1);
    }
    /* The commit stands; an index that contradicts itself is rebuilt from what is committed. */
    if (result == SD_OK) sd_sequence_end(&header->id_seq);
    else sd_recover_ids(segment);
    return SD_OK;
}

/* The flip together with what the name index says; list lock held, room reserved. */
static void flip_with_name(sd_segment *segment, uint32_t slot, const sd_values *values,
                           const unsigned char *old, const unsigned char *name)
{
    sd_header *header = segment->header;
    sd_sequence_begin(&header->list_seq);
    flip(&segment->slots[slot], values);
    int result = sd_index_delete(segment, SD_NAME_INDEX,
                                 sd_hash_name(segment, old + 1, old[0]), slot);
    if (result == SD_OK)
        result = sd_index_insert(segment, SD_NAME_INDEX,
                                 sd_hash_name(segment, name + 1, name[0]), slot);
    if (result == SD_OK) sd_sequence_end(&header->list_seq);
    else sd_recover_list(segment);
}

int sd_commit(sd_segment *segment, uint32_t slot, const sd_values *values,
              const sd_blob blobs[SD_BLOBS], const unsigned char *name, uint64_t deadline)
{
    sd_slot *record = &segment->slots[slot];
    sd_values now, next = *values;
    unsigned char old_name[SD_NAME_MAX + 1];
    const uint64_t private_flags = ~(SD_FLAG_PERSISTENT | SD_FLAG_AUTOSTART);
    bool blob_changes = false, new_blobs = false;
    const uint64_t uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    if (sd_values_get(segment, slot, &now) != SD_OK) return SD_CORRUPT;
    if (name) {
        sd_name_get(segment, slot, now.flags, old_name);
        if (!old_name[0]) return SD_CORRUPT;
    }
    next.flags = (values->flags & ~private_flags) | (now.flags & private_flags);
    memcpy(next.version, now.version, sizeof next.version);
    for (int b = 0; b < SD_BLOBS; b++) {
        blob_changes |= blobs[b].change;
        new_blobs |= blobs[b].change && blobs[b].bytes;
    }
    bool ids = now.id != next.id, tidy = blob_changes || sd_load(&record->dirty);

    int result = sd_short_locks(segment, ids, new_blobs, deadline);
    if (result != SD_OK) return result;
    if (new_blobs) {
        result = allocate_blobs(segment, slot, &now, blobs);
        sd_heap_unlock(segment);
    }
    if (result == SD_OK && ids && next.id >= 0) result = sd_index_reserve(segment, SD_ID_INDEX);
    if (result != SD_OK) {
        int error = errno; /* of SD_NO_MEMORY; a wait may ask the kernel for the owner of a lock */
        if (ids) sd_ids_unlock(segment);
        if (new_blobs) sd_tidy(segment, slot);
        errno = error;
        return result;
    }
    fill_blobs(segment, slot, uuid, &next, blobs);
    if (name) {
        write_spare_name(segment, slot, uuid, &next, name);
        flip_with_name(segment, slot, &next, old_name, name);
    } else if (ids) {
        result = flip_with_ids(segment, slot, &next, now.id);
    } else {
        flip(record, &next);
    }
    if (ids) sd_ids_unlock(segment);
    if (tidy) sd_tidy(segment, slot);
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

/* More slots: commit, initialise each mutex, then count them.  Uncounted slots are nobody's, so a
 * grower that died half-way is simply overtaken.  List lock held. */
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
    if (sd_load(&fresh->cur) || sd_load(&fresh->life)) return SD_CORRUPT; /* somebody lived here */
    int result = sd_mutex_init(&fresh->mutex);
    if (result != SD_OK) return result;
    sd_store(&fresh->next_free, sd_load(&header->free_head));
    sd_publish(&header->slot_count, sd_seal(count + 1));
    sd_publish(&header->free_head, count + 1);
    return SD_OK;
}

/* The next candidate on the free list, behind `*link` (NULL: from its head), a new slot at its
 * end. The caller tries the slot's lock, and asks for the next one when somebody holds it (a
 * handle to a domain that is gone, in a process that was stopped): nobody may block an insert.
 * List lock held. */
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

static int prepare(sd_segment *segment, uint32_t slot, const uint64_t uuid[2],
                   const unsigned char *name, const sd_values *values,
                   const sd_blob blobs[SD_BLOBS], uint64_t deadline)
{
    sd_slot *record = &segment->slots[slot];
    sd_values next = *values, now;
    if (!sd_count_sound(sd_load(&record->cur))) return SD_CORRUPT;
    sd_values_get(segment, slot, &now); /* of a dead domain: any choice will do */
    int result = sd_short_locks(segment, false, true, deadline);
    if (result != SD_OK) return result;
    result = allocate_blobs(segment, slot, &now, blobs);
    sd_heap_unlock(segment);
    if (result != SD_OK) return result;
    next.flags &= SD_FLAG_PERSISTENT | SD_FLAG_AUTOSTART;
    for (int b = 0; b < SD_BLOBS; b++) next.flags |= now.flags & SD_FLAG_CHOICE(b);
    fill_blobs(segment, slot, uuid, &next, blobs);
    write_spare_name(segment, slot, uuid, &next, name);
    sd_store(&record->died_who, 0);
    sd_store(&record->uuid[0], uuid[0]);
    sd_store(&record->uuid[1], uuid[1]);
    sd_store(&record->sum_and_pid, sd_uuid_sum(uuid));
    flip(record, &next);
    return SD_OK;
}

int sd_insert(sd_segment *segment, uint32_t slot, sd_word *link, const uint64_t uuid[2],
              const unsigned char *name, const sd_values *values, const sd_blob blobs[SD_BLOBS],
              uint64_t deadline)
{
    sd_header *header = segment->header;
    sd_slot *record = &segment->slots[slot];
    int result = sd_index_reserve(segment, SD_UUID_INDEX);
    if (result == SD_OK) result = sd_index_reserve(segment, SD_NAME_INDEX);
    if (result == SD_OK) result = prepare(segment, slot, uuid, name, values, blobs, deadline);
    if (result != SD_OK) return result;
    sd_sequence_begin(&header->list_seq);
    sd_publish(&record->life, sd_life_begun(sd_load(&record->life)));
    sd_store(link, sd_load(&record->next_free));
    result = sd_index_insert(segment, SD_UUID_INDEX, sd_hash_uuid(segment, uuid), slot);
    if (result == SD_OK)
        result = sd_index_insert(segment, SD_NAME_INDEX,
                                 sd_hash_name(segment, name + 1, name[0]), slot);
    sd_store(&header->live, sd_load(&header->live) + 1);
    if (result == SD_OK) sd_sequence_end(&header->list_seq);
    else sd_recover_list(segment);
    return SD_OK;
}

int sd_remove(sd_segment *segment, uint32_t slot, uint64_t deadline)
{
    sd_header *header = segment->header;
    sd_slot *record = &segment->slots[slot];
    sd_values now;
    unsigned char name[SD_NAME_MAX + 1];
    uint64_t uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    if (!sd_count_sound(sd_load(&record->life))) return SD_CORRUPT;
    if (sd_values_get(segment, slot, &now) != SD_OK) return SD_CORRUPT;
    sd_name_get(segment, slot, now.flags, name); /* damaged: nothing is found, and all is rebuilt */
    bool ids = now.id >= 0;
    int result = sd_short_locks(segment, ids, false, deadline);
    if (result != SD_OK) return result;

    if (ids) sd_sequence_begin(&header->id_seq);
    sd_sequence_begin(&header->list_seq);
    sd_publish(&record->life, sd_life_ended(sd_load(&record->life)));
    int listed = sd_index_delete(segment, SD_UUID_INDEX, sd_hash_uuid(segment, uuid), slot);
    if (listed == SD_OK)
        listed = sd_index_delete(segment, SD_NAME_INDEX,
                                 sd_hash_name(segment, name + 1, name[0]), slot);
    sd_store(&header->live, sd_load(&header->live) - 1);
    sd_store(&record->next_free, sd_load(&header->free_head));
    sd_publish(&header->free_head, slot + 1);
    if (listed == SD_OK) sd_sequence_end(&header->list_seq);
    else sd_recover_list(segment);
    if (ids) {
        int entered = sd_index_delete(segment, SD_ID_INDEX, sd_hash_id(segment, now.id), slot);
        sd_store(&header->active, sd_load(&header->active) - 1);
        if (entered == SD_OK) sd_sequence_end(&header->id_seq);
        else sd_recover_ids(segment);
        sd_ids_unlock(segment);
    }
    sd_tidy(segment, slot);
    return SD_OK;
}

/* --- lock-free reading ----------------------------------------------------------------------- */

int sd_view_begin(const sd_segment *segment, uint32_t slot, sd_view *view)
{
    const sd_slot *record = &segment->slots[slot];
    view->life = sd_load_acquire(&record->life);
    view->cur = sd_load_acquire(&record->cur);
    bool sound = sd_count_sound(view->life);
    if (sound && !(view->life & 1)) return SD_MISS;
    view->uuid[0] = sd_load(&record->uuid[0]);
    view->uuid[1] = sd_load(&record->uuid[1]);
    sound &= read_fields(record, view->cur, &view->values);
    sd_name_get(segment, slot, view->values.flags, view->name);
    if (sd_view_check(segment, slot, view) != SD_OK) return SD_DOUBT;
    return sound ? SD_OK : SD_CORRUPT;
}

int sd_view_extent(const sd_segment *segment, uint32_t slot, const sd_view *view, int blob,
                   uint64_t *extent)
{
    if (!(view->values.flags & SD_FLAG_PRESENT(blob))) return SD_MISS;
    *extent = sd_load(&segment->slots[slot].extent[blob][choice_of(view->values.flags, blob)]);
    if (holds_blob(segment, *extent)) return SD_OK;
    return sd_view_check(segment, slot, view) == SD_OK ? SD_CORRUPT : SD_DOUBT;
}

int sd_view_check(const sd_segment *segment, uint32_t slot, const sd_view *view)
{
    const sd_slot *record = &segment->slots[slot];
    atomic_thread_fence(memory_order_acquire);
    return sd_load(&record->life) == view->life && sd_load(&record->cur) == view->cur ? SD_OK
                                                                                     : SD_DOUBT;
}

/* A blob that counts is not touched before a commit with another version of it, or the end of this
 * life; so what was copied is whole, and belongs to the view, if neither has come by now, however
 * many other commits have.  (To ask for the same `cur` would be right as well, but a reader would
 * be overtaken by each change of state.) */
int sd_view_blobs_check(const sd_segment *segment, uint32_t slot, const sd_view *view)
{
    const sd_slot *record = &segment->slots[slot];
    sd_values now;
    atomic_thread_fence(memory_order_acquire);
    if (sd_values_settled(segment, slot, &now) != SD_OK) return sd_view_check(segment, slot, view);
    for (int b = 0; b < SD_BLOBS; b++)
        if (now.version[b] != view->values.version[b]) return SD_DOUBT;
    return sd_load(&record->life) == view->life ? SD_OK : SD_DOUBT;
}
