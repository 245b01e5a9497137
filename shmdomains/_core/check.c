/* check.c - every invariant, from outside.
 *
 * One look walks slots, indexes, free list, descriptors and map without a lock and reports what
 * does not fit.  Writers may be at work, so a look also says whether the segment stood still; the
 * caller looks again, and in the end holds the list, id and heap locks for one look.
 */
#include "core.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    sd_segment *segment;
    sd_report report;
    void *context;
    sd_tally *tally;
    uint64_t *named; /* shadow of the map: cells that descriptors name */
    uint64_t committed;
} look;

__attribute__((format(printf, 3, 4))) static void
fault(const look *at, const char *invariant, const char *format, ...)
{
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    at->report(at->context, invariant, text);
}

static void check_found(const look *at, uint32_t slot, const sd_key *key, const char *index)
{
    uint32_t found = UINT32_MAX;
    int result = sd_find(at->segment, key, &found);
    if (result == SD_OK && found == slot) return;
    if (result == SD_OK)
        fault(at, "I5 index", "%s index leads from the key of slot %u to slot %u", index, slot,
              found);
    else
        fault(at, "I5 index", "%s index does not lead to slot %u", index, slot);
}

static void check_identity(const look *at, uint32_t slot, const sd_view *view)
{
    sd_key key = {.what = SD_UUID_INDEX, .uuid = {view->uuid[0], view->uuid[1]}};
    check_found(at, slot, &key, "UUID");
    if (!view->name[0])
        fault(at, "I1 identity",
              "slot %u has a name of 0 bytes, or name and uuid do not fit their checksum", slot);
    key.what = SD_NAME_INDEX;
    memcpy(key.name, view->name, sizeof key.name);
    check_found(at, slot, &key, "name");
    if (view->values.id < 0) return;
    key.what = SD_ID_INDEX;
    key.id = view->values.id;
    check_found(at, slot, &key, "id");
    at->tally->active++;
    if ((uint64_t)view->values.id >= sd_unsealed(sd_load(&at->segment->header->next_id)))
        fault(at, "I4 ids", "slot %u has id %d, which was not given out yet", slot,
              view->values.id);
}

/* True also when writers were about, or there is no memory for a look. */
static bool holds_what_was_written(const sd_segment *segment, uint32_t slot, const sd_view *view,
                                   int blob, uint64_t extent)
{
    uint64_t size = SD_EXTENT_BYTES(extent);
    unsigned char *copy = malloc(size);
    uint64_t sum;
    if (!copy) return true;
    sd_copy_out(copy, sd_extent_at(segment, extent), size);
    memcpy(&sum, copy, sizeof sum);
    uint64_t version = view->values.version[blob];
    bool fits = sum == sd_blob_sum(view->uuid, blob, version, copy + 8, size - 8);
    free(copy);
    return fits || sd_view_check(segment, slot, view) != SD_OK;
}

static void check_blobs(const look *at, uint32_t slot, const sd_view *view)
{
    uint64_t extent;
    for (int b = 0; b < SD_BLOBS; b++) {
        int result = sd_view_extent(at->segment, slot, view, b, &extent);
        if (result != SD_OK && result != SD_MISS)
            fault(at, "I2 extents", "slot %u: blob %d counts and has no valid extent", slot, b);
        if (result == SD_OK && !holds_what_was_written(at->segment, slot, view, b, extent))
            fault(at, "I2 extents", "slot %u: blob %d does not fit its checksum", slot, b);
        if (view->values.version[b] > sd_cur_value(view->cur))
            fault(at, "I3 fields", "slot %u: blob %d is newer than its record", slot, b);
    }
    if (!(view->values.flags & SD_FLAG_PRESENT(SD_DEFINITION)))
        fault(at, "I3 fields", "slot %u has no definition", slot);
}

/* Enter the extent into the shadow map; two descriptors may not name one cell. */
static void name_cells(const look *at, uint32_t slot, uint64_t extent)
{
    uint64_t cell = SD_EXTENT_CELL(extent), end = cell + sd_cells(SD_EXTENT_BYTES(extent));
    if (!sd_extent_valid(at->segment, extent) || end > at->committed) {
        fault(at, "I2 extents", "slot %u names cells outside of the heap", slot);
        return;
    }
    at->tally->extents++;
    at->tally->cells += end - cell;
    for (; cell < end; cell++) {
        uint64_t bit = 1ull << (cell % 64);
        if (at->named[cell / 64] & bit) {
            fault(at, "I2 extents", "slot %u: cell %llu is named twice", slot,
                  (unsigned long long)cell);
            return;
        }
        at->named[cell / 64] |= bit;
    }
}

static void check_slot(const look *at, uint32_t slot)
{
    const sd_slot *record = &at->segment->slots[slot];
    sd_view view;
    int result;
    do result = sd_view_begin(at->segment, slot, &view);
    while (result == SD_DOUBT);
    unsigned extents = 0, counted = 0;
    for (int b = 0; b < SD_BLOBS; b++) {
        if (result != SD_MISS && view.values.flags & SD_FLAG_PRESENT(b)) counted++;
        for (int i = 0; i < 2; i++) {
            uint64_t extent = sd_load(&record->extent[b][i]);
            if (!extent) continue;
            extents++;
            name_cells(at, slot, extent);
        }
    }
    if (extents > counted) at->tally->garbage += extents - counted;
    if (!sd_mutex_sound(&record->mutex)) fault(at, "locks", "slot %u: its lock is damaged", slot);
    if (result == SD_MISS) return;
    at->tally->domains++;
    sd_values values;
    if (sd_values_settled(at->segment, slot, &values) != SD_OK)
        fault(at, "I3 fields", "slot %u: its fields do not fit their checksum", slot);
    check_identity(at, slot, &view);
    check_blobs(at, slot, &view);
}

static void check_entries(const look *at, int index, const char *name, uint64_t expected)
{
    const sd_segment *segment = at->segment;
    uint64_t entries = 0;
    sd_probe probe;
    if (sd_probe_begin(segment, index, 0, &probe) != SD_OK) {
        fault(at, "I5 index", "%s index has an impossible level", name);
        return;
    }
    for (uint64_t i = 0; i <= probe.mask; i++) entries += sd_load(&probe.table[i]) != 0;
    if (entries != expected)
        fault(at, "I5 index", "%s index has %llu entries for %llu domains", name,
              (unsigned long long)entries, (unsigned long long)expected);
}

static void check_free_list(const look *at, uint32_t slots)
{
    const sd_segment *segment = at->segment;
    uint64_t free_slots = 0, next = sd_load(&segment->header->free_head);
    while (next) {
        if (next > slots || ++free_slots > slots) {
            fault(at, "free list", "leads nowhere or runs in a circle");
            return;
        }
        if (sd_load(&segment->slots[next - 1].life) & 1)
            fault(at, "free list", "slot %llu is on it and lives", (unsigned long long)next - 1);
        next = sd_load(&segment->slots[next - 1].next_free);
    }
    if (free_slots + at->tally->domains != slots)
        fault(at, "free list", "%llu free slots and %llu domains in %u slots",
              (unsigned long long)free_slots, (unsigned long long)at->tally->domains, slots);
}

static void check_map(const look *at)
{
    uint64_t unnamed = 0, unmarked = 0;
    for (uint64_t w = 0; w * 64 < at->committed; w++) {
        uint64_t map = sd_load(&at->segment->map[w]);
        unnamed += (uint64_t)__builtin_popcountll(map & ~at->named[w]);
        unmarked += (uint64_t)__builtin_popcountll(at->named[w] & ~map);
    }
    if (unnamed)
        fault(at, "I2 map", "%llu cells are marked and nobody's", (unsigned long long)unnamed);
    if (unmarked)
        fault(at, "I2 map", "%llu cells are in use and not marked", (unsigned long long)unmarked);
    if (sd_load(&at->segment->header->heap_used) != at->tally->cells)
        fault(at, "I2 map", "the count of used cells is %llu, they are %llu",
              (unsigned long long)sd_load(&at->segment->header->heap_used),
              (unsigned long long)at->tally->cells);
}

static void check_counts(const look *at)
{
    const sd_header *header = at->segment->header;
    if (sd_load(&header->live) != at->tally->domains)
        fault(at, "counts", "%llu domains are counted, %llu are there",
              (unsigned long long)sd_load(&header->live), (unsigned long long)at->tally->domains);
    if (sd_load(&header->active) != at->tally->active)
        fault(at, "counts", "%llu active domains are counted, %llu are there",
              (unsigned long long)sd_load(&header->active), (unsigned long long)at->tally->active);
    if (!sd_mutex_sound(&header->list_mutex) || !sd_mutex_sound(&header->id_mutex) ||
        !sd_mutex_sound(&header->heap_mutex))
        fault(at, "locks", "the list's, the ids' or the heap's lock is damaged");
    if (sd_load(&header->list_seq) & 1) fault(at, "I5 sequence", "the list's sequence is odd");
    if (sd_load(&header->id_seq) & 1) fault(at, "I5 sequence", "the ids' sequence is odd");
    if (sd_unsealed(sd_load(&header->next_id)) == UINT64_MAX)
        fault(at, "I4 ids", "the next id is damaged: nobody knows which were not given out");
    if (sd_unsealed(sd_load(&header->settings_choice)) == UINT64_MAX)
        fault(at, "settings", "which of the two counts is damaged");
    if (sd_load(&header->poisoned))
        fault(at, "poisoned", "a repair failed (%llu, at %llu)",
              (unsigned long long)sd_load(&header->poisoned),
              (unsigned long long)sd_load(&header->poisoned_at));
}

int sd_check(sd_segment *segment, sd_report report, void *context, sd_tally *tally, int *still)
{
    const sd_header *header = segment->header;
    uint64_t turns[3] = {sd_load_acquire(&header->list_seq), sd_load_acquire(&header->id_seq),
                         sd_load_acquire(&header->heap_turn)};
    look at = {segment, report, context, tally, NULL, 0};
    at.committed = sd_unsealed(sd_load_acquire(&header->heap_committed));
    memset(tally, 0, sizeof *tally);
    *still = true;
    if (at.committed > segment->at.heap_cells) {
        fault(&at, "heap", "its watermark lies behind its end");
        return SD_OK;
    }
    at.named = calloc(at.committed / 64 + 1, 8);
    if (!at.named) return SD_ERRNO;
    uint32_t slots;
    if (sd_slots(segment, &slots) != SD_OK)
        fault(&at, "counts", "the number of slots or its watermark is damaged");
    tally->slots = slots;
    for (uint32_t slot = 0; slot < slots; slot++) check_slot(&at, slot);
    check_entries(&at, SD_UUID_INDEX, "UUID", tally->domains);
    check_entries(&at, SD_NAME_INDEX, "name", tally->domains);
    check_entries(&at, SD_ID_INDEX, "id", tally->active);
    check_free_list(&at, slots);
    check_map(&at);
    check_counts(&at);
    free(at.named);
    atomic_thread_fence(memory_order_acquire);
    *still = turns[0] == sd_load(&header->list_seq) && turns[1] == sd_load(&header->id_seq) &&
             turns[2] == sd_load(&header->heap_turn);
    return SD_OK;
}

int sd_check_hold(sd_segment *segment, uint64_t deadline)
{
    return sd_short_locks(segment, true, true, deadline);
}

void sd_check_release(sd_segment *segment)
{
    sd_heap_unlock(segment);
    sd_ids_unlock(segment);
}
