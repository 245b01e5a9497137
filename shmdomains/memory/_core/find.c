/* find.c - from a key to a slot.
 *
 * A find takes no lock.  It probes the index, and compares the key with each candidate's record.  A
 * hit is a hint until sd_verify() has seen it under the slot's lock.  A miss is believed only if
 * the index's sequence was even and unchanged (I5); else a reader looks again, or scans the records.
 * A miss on the way to which a damaged record
 * was met is SD_CORRUPT: that record might be the domain.
 */
#include "find.h"

#include "prefetch.h"

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
    sd_view view;
    int result;
    do result = sd_view_begin(segment, slot, &view);
    while (result == SD_DOUBT);
    return result == SD_MISS || (result == SD_OK && view.name[0]);
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

/* Prefetch what comes next, all at once: one cache line after the other would take longer than
 * everything else in a find. */
static void to_read(const sd_segment *segment, uint32_t slot, const sd_key *key)
{
    (void)key;
    sd_view_prefetch(segment, slot);
    __builtin_prefetch(segment->slots[slot].extent, 0);
}

/* The same for the holder of the lock, for a store where it stores: a line that another process
 * wrote would be fetched twice, to be read and then to be written. */
static void to_hold(const sd_segment *segment, uint32_t slot, const sd_key *key)
{
    const sd_slot *record = &segment->slots[slot];
    sd_prefetch_store(&record->mutex);
    sd_prefetch_store(&record->copy0);
    sd_prefetch_store(&record->copy1);
    sd_prefetch_store(record->uuid);
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
        sd_probe_in_vain(&probe);
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
