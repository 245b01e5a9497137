/* rebuild.c - what is derived, made again from what is committed.
 *
 *   list lock   UUID and name index, count, free list   from life, uuid, committed names
 *   id lock     id index, count                         from committed ids
 *   heap lock   map of used cells, count                from descriptors, current or spare
 *
 * The next holder runs one of these after a death, before the mutex is made consistent; and a
 * writer whose index contradicts itself runs it in the middle of its change.  They allocate
 * nothing, and can be cut off anywhere and begun again: a rebuilder that dies leaves the lock dead,
 * and the next holder runs the same function.  One that meets an impossible value poisons the
 * segment, saying where, and gives up.
 */
#include "rebuild.h"

#include "fields.h"

static int give_up(sd_segment *segment, uint64_t reason, uint64_t at)
{
    sd_poison(segment, reason, at);
    return SD_CORRUPT;
}

static int enter_identity(sd_segment *segment, uint32_t slot)
{
    const sd_slot *record = &segment->slots[slot];
    uint64_t uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    unsigned char name[SD_NAME_MAX + 1];
    sd_values values;
    if (sd_values_settled(segment, slot, &values) != SD_OK) return SD_CORRUPT;
    sd_name_get(segment, slot, values.flags, name);
    if (!name[0]) return SD_CORRUPT;
    int result = sd_index_insert(segment, SD_UUID_INDEX, sd_hash_uuid(segment, uuid), slot);
    if (result != SD_OK) return result;
    return sd_index_insert(segment, SD_NAME_INDEX, sd_hash_name(segment, name + 1, name[0]), slot);
}

int sd_rebuild_list(sd_segment *segment)
{
    sd_header *header = segment->header;
    uint64_t live = 0, head = 0;
    uint32_t slots;
    if (sd_slots(segment, &slots) != SD_OK) return give_up(segment, SD_POISON_LIST, 0);
    sd_sequence_begin(&header->list_seq);
    int result = sd_index_clear(segment, SD_UUID_INDEX);
    if (result == SD_OK) result = sd_index_clear(segment, SD_NAME_INDEX);
    if (result != SD_OK) return give_up(segment, SD_POISON_LIST, 0);
    for (uint32_t slot = slots; slot-- > 0;) {
        sd_slot *record = &segment->slots[slot];
        uint64_t life = sd_load(&record->life);
        /* A guess would be for good: a domain that nobody finds, or one that was removed. */
        if (!sd_count_sound(life)) return give_up(segment, SD_POISON_LIST, slot + 1ull);
        if (life & 1) {
            if (enter_identity(segment, slot) != SD_OK)
                return give_up(segment, SD_POISON_LIST, slot + 1ull);
            live++;
        } else {
            sd_store(&record->next_free, head);
            head = slot + 1;
        }
    }
    sd_store(&header->free_head, head);
    sd_store(&header->live, live);
    sd_sequence_end(&header->list_seq);
    return SD_OK;
}

/* No committed id changes meanwhile: every flip that changes one holds the id lock. */
int sd_rebuild_ids(sd_segment *segment)
{
    sd_header *header = segment->header;
    uint64_t active = 0;
    uint32_t slots;
    if (sd_slots(segment, &slots) != SD_OK) return give_up(segment, SD_POISON_IDS, 0);
    sd_sequence_begin(&header->id_seq);
    if (sd_index_clear(segment, SD_ID_INDEX) != SD_OK) return give_up(segment, SD_POISON_IDS, 0);
    for (uint32_t slot = 0; slot < slots; slot++) {
        sd_values values;
        uint64_t life = sd_load_acquire(&segment->slots[slot].life);
        if (!sd_count_sound(life)) return give_up(segment, SD_POISON_IDS, slot + 1ull);
        if (!(life & 1)) continue;
        if (sd_values_settled(segment, slot, &values) != SD_OK)
            return give_up(segment, SD_POISON_IDS, slot + 1ull);
        if (values.id < 0) continue;
        if (sd_index_insert(segment, SD_ID_INDEX, sd_hash_id(segment, values.id), slot) != SD_OK)
            return give_up(segment, SD_POISON_IDS, slot + 1ull);
        active++;
    }
    sd_store(&header->active, active);
    sd_sequence_end(&header->id_seq);
    return SD_OK;
}

static bool is_sound(const sd_segment *segment, uint32_t slot, int index)
{
    const sd_slot *record = &segment->slots[slot];
    unsigned char name[SD_NAME_MAX + 1];
    sd_values values;
    uint64_t life = sd_load_acquire(&record->life);
    if (!sd_count_sound(life)) return false;
    if (!(life & 1)) return true;
    if (sd_values_settled(segment, slot, &values) != SD_OK) return false;
    if (index == SD_ID_INDEX) return true;
    sd_name_get(segment, slot, values.flags, name);
    return name[0];
}

int sd_mend(sd_segment *segment, int index)
{
    sd_probe there; /* is there a table, or is the level damaged? */
    uint32_t slots;
    int last = index == SD_ID_INDEX ? SD_ID_INDEX : SD_NAME_INDEX;
    for (int i = index == SD_ID_INDEX ? SD_ID_INDEX : SD_UUID_INDEX; i <= last; i++)
        if (sd_probe_begin(segment, i, 0, &there) != SD_OK) return SD_CORRUPT;
    if (sd_slots(segment, &slots) != SD_OK) return SD_CORRUPT;
    for (uint32_t slot = 0; slot < slots; slot++)
        if (!is_sound(segment, slot, index)) return SD_CORRUPT;
    return index == SD_ID_INDEX ? sd_rebuild_ids(segment) : sd_rebuild_list(segment);
}

int sd_rebuild_heap(sd_segment *segment)
{
    sd_header *header = segment->header;
    uint32_t slots;
    uint64_t used = 0, top = 0, committed = sd_unsealed(sd_load(&header->heap_committed));
    if (committed > segment->at.heap_cells) return give_up(segment, SD_POISON_HEAP, 0);
    if (sd_slots(segment, &slots) != SD_OK) return give_up(segment, SD_POISON_HEAP, 0);
    sd_publish(&header->heap_turn, sd_load(&header->heap_turn) + 1);
    for (uint64_t w = 0; w * 64 < committed; w++)
        if (sd_load(&segment->map[w])) sd_store(&segment->map[w], 0);
    for (uint32_t slot = 0; slot < slots; slot++)
        for (int b = 0; b < SD_BLOBS; b++)
            for (int i = 0; i < 2; i++) {
                uint64_t extent = sd_load(&segment->slots[slot].extent[b][i]);
                if (!extent) continue;
                if (!sd_extent_valid(segment, extent))
                    return give_up(segment, SD_POISON_HEAP, slot + 1ull);
                uint64_t cells = sd_cells(SD_EXTENT_BYTES(extent));
                sd_heap_mark(segment, SD_EXTENT_CELL(extent), cells, true);
                used += cells;
                if (SD_EXTENT_CELL(extent) + cells > top) top = SD_EXTENT_CELL(extent) + cells;
            }
    sd_store(&header->heap_used, used);
    sd_store(&header->heap_rover, 0);
    sd_store(&header->heap_top, top);
    return SD_OK;
}
