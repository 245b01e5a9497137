/* recover.c - what the next holder repairs.
 *
 * Each function runs with the lock concerned held, before its mutex is made consistent.  All of
 * them allocate nothing, start from what is committed, and can be cut off anywhere and begun
 * again: a recoverer that dies leaves the lock dead, and the next one runs the same function.  One
 * that meets a value it can not believe poisons the segment, saying where, and gives up.
 *
 *   list lock   UUID and name index, number, free list   from life, uuid, committed names
 *               and the blobs left in FREE slots         nobody else would look there
 *   id lock     id index                                 from committed ids
 *   heap lock   map of used cells                        from descriptors, counted or not
 *   slot lock   nothing is wrong with the record: garbage to free, and the death to remember
 */
#include "core.h"

/* The repair can not be done: `at` is slot + 1, or 0 for no one slot. */
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

int sd_recover_list(sd_segment *segment)
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
        /* Either way would be for good: a domain that nobody finds, or one that was removed. */
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

/* Nobody else can change a committed id meanwhile: every flip that does so holds the id lock. */
int sd_recover_ids(sd_segment *segment)
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

int sd_recover_heap(sd_segment *segment)
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

/* The record is the old one or the new one.  Remember who died - nobody knows when the owner
 * record is empty: then a recoverer got this far before it died itself, or the holder died before
 * it signed - and free the garbage if the heap lock is to be had. */
void sd_recover_slot(sd_segment *segment, uint32_t slot, uint64_t who, uint64_t pid)
{
    sd_slot *record = &segment->slots[slot];
    if (who || !sd_load(&record->died_who)) {
        uint64_t sum = sd_load(&record->sum_and_pid) & ~0xffffffffull;
        sd_store(&record->sum_and_pid, sum | (who ? (uint32_t)pid : 0));
        sd_publish(&record->died_who, who ? who : 1);
    }
    sd_tidy(segment, slot);
}

/* Who dies between a remove's commit and its end, or while it fills a slot for an insert, leaves
 * blobs in a FREE slot, which nobody locks until it is used again; but all of them die with the
 * list lock.  (A living remover that could not get the heap lock leaves them, too; they wait for
 * the slot's next user, or for this.)  A slot's lock is only tried: its holder has a handle to a
 * domain that is gone, or waits for the heap; what it leaves, if it dies as well, is freed by the
 * slot's next user.  List lock held, so that no FREE slot becomes LIVE meanwhile; robust locks
 * only, since the core does not know the others. */
void sd_tidy_free_slots(sd_segment *segment)
{
    uint32_t slots = sd_slot_count(segment);
    for (uint32_t slot = 0; slot < slots; slot++) {
        const sd_slot *record = &segment->slots[slot];
        uint64_t named = 0;
        for (int b = 0; b < SD_BLOBS; b++)
            named |= sd_load(&record->extent[b][0]) | sd_load(&record->extent[b][1]);
        if (!named || sd_load(&record->life) & 1) continue;
        if (sd_slot_lock(segment, slot, SD_TRY) != SD_OK) continue;
        sd_tidy(segment, slot);
        bool put_off = sd_load(&record->dirty);
        sd_slot_unlock(segment, slot, false);
        if (put_off) return; /* the heap's holder is stopped: one slice of waiting is enough */
    }
}
