/* check_sums.c - numbers that must be equal.
 *
 * A sum is taken in stages, each of which can be cut off by the clock and gone on with.  Without a
 * lock it is a verdict only if the sequence (the turn of the heap) was even and unchanged from its
 * beginning to its end; a fault seen otherwise is a doubt (check.c).
 *
 * For the cells, a shadow of the map is made from the descriptors.  Two more bits a cell last from
 * walk to walk: marked and nobody's, named twice.  Each walk clears the bits of what it saw in
 * order.  When none is left all is right; else one more walk with the lock held has the verdict.
 */
#include "check_sums.h"

#include "heap.h"
#include "index.h"

#include <stdlib.h>

#define SLACK (1u << 16) /* cells by which the heap may grow between preparing and holding */

/* A stage goes on from `sum->at` and says whether it came to its end. */
typedef bool (*stage)(sd_check *check, sd_sum *sum, uint64_t until);

static bool count_entries(sd_check *check, sd_sum *sum, uint64_t until, int index)
{
    sd_probe probe;
    if (sd_probe_begin(check->segment, index, 0, &probe) != SD_OK) {
        sd_fault(check, "I5 index", "%s index has an impossible level", SD_INDEX_NAMES[index]);
        sum->broken = true;
        return true;
    }
    while (sum->at <= probe.mask) {
        sum->entries[index] += sd_load(&probe.table[sum->at++]) != 0;
        if (sd_check_late(sum->at, until)) return false;
    }
    return true;
}

static bool count_uuids(sd_check *check, sd_sum *sum, uint64_t until)
{
    return count_entries(check, sum, until, SD_UUID_INDEX);
}

static bool count_names(sd_check *check, sd_sum *sum, uint64_t until)
{
    return count_entries(check, sum, until, SD_NAME_INDEX);
}

static bool count_ids(sd_check *check, sd_sum *sum, uint64_t until)
{
    return count_entries(check, sum, until, SD_ID_INDEX);
}

/* `at`: the next slot of the list, + 1. */
static bool walk_free_list(sd_check *check, sd_sum *sum, uint64_t until)
{
    const sd_segment *segment = check->segment;
    if (!sum->free_slots) sum->at = sd_load(&segment->header->free_head);
    while (sum->at) {
        if (sum->at > sum->slots || ++sum->free_slots > sum->slots) {
            sd_fault(check, "free list", "leads nowhere or runs in a circle");
            sum->broken = true;
            return true;
        }
        const sd_slot *slot = &segment->slots[sum->at - 1];
        if (sd_load(&slot->life) & 1)
            sd_fault(check, "free list", "slot %llu is on it and lives",
                     (unsigned long long)sum->at - 1);
        sum->at = sd_load(&slot->next_free);
        if (sd_check_late(sum->free_slots, until)) return false;
    }
    return true;
}

static bool count_marks(sd_check *check, sd_sum *sum, uint64_t until)
{
    while (sum->at * 64 < check->committed) {
        sum->cells += (uint64_t)__builtin_popcountll(sd_load(&check->segment->map[sum->at++]));
        if (sd_check_late(sum->at, until)) return false;
    }
    return true;
}

/* Enter an extent into the shadow of the map. */
static void name_cells(sd_check *check, uint32_t slot, uint64_t extent)
{
    uint64_t cell = SD_EXTENT_CELL(extent), end = cell + sd_cells(SD_EXTENT_BYTES(extent));
    /* Either it is reported with its record, or, without the lock, the heap has grown meanwhile. */
    if (!sd_extent_valid(check->segment, extent) || end > check->committed) return;
    for (uint64_t w = cell / 64; w * 64 < end; w++) {
        uint64_t bits = sd_map_bits(w, cell, end - cell), twice = check->named[w] & bits;
        check->named[w] |= bits;
        if (!twice) continue;
        check->again[w] |= twice;
        sd_fault(check, "I2 extents", "slot %u: cell %llu is named twice", slot,
                 (unsigned long long)(w * 64) + (unsigned)__builtin_ctzll(twice));
        return;
    }
}

static bool walk_descriptors(sd_check *check, sd_sum *sum, uint64_t until)
{
    while (sum->at < sum->slots) {
        uint32_t slot = (uint32_t)sum->at++;
        for (int b = 0; b < SD_BLOBS; b++)
            for (int i = 0; i < 2; i++) {
                uint64_t extent = sd_load(&check->segment->slots[slot].extent[b][i]);
                if (extent) name_cells(check, slot, extent);
            }
        if (sd_check_late(sum->at, until)) return false;
    }
    return true;
}

/* A cell that one walk saw named, or not marked, or named only once is in order for good. */
static bool acquit(sd_check *check, sd_sum *sum, uint64_t until)
{
    while (sum->at * 64 < check->committed) {
        uint64_t w = sum->at++;
        check->ownerless[w] &= sd_load(&check->segment->map[w]) & ~check->named[w];
        check->twice[w] &= check->again[w];
        sum->ownerless += (uint64_t)__builtin_popcountll(check->ownerless[w]);
        sum->twice += (uint64_t)__builtin_popcountll(check->twice[w]);
        if (sd_check_late(sum->at, until)) return false;
    }
    return true;
}

static const stage STAGES[SD_SUMS][3] = {
    [SD_SUM_LISTED] = {count_uuids, count_names},
    [SD_SUM_FREE] = {walk_free_list},
    [SD_SUM_IDS] = {count_ids},
    [SD_SUM_USED] = {count_marks},
    [SD_SUM_CELLS] = {walk_descriptors, acquit},
};

/* --- what must be equal ---------------------------------------------------------------------- */

static void compare_entries(const sd_check *check, const sd_sum *sum, int index, uint64_t domains)
{
    if (sum->entries[index] != domains)
        sd_fault(check, "I5 index", "%s index has %llu entries for %llu domains",
                 SD_INDEX_NAMES[index], (unsigned long long)sum->entries[index],
                 (unsigned long long)domains);
}

/* Where the indexes agree with each other and with every domain, the count is wrong. */
static void compare_listed(const sd_check *check, const sd_sum *sum)
{
    uint64_t live = sd_load(&check->segment->header->live), uuids = sum->entries[SD_UUID_INDEX];
    if (sd_load(&check->segment->header->list_seq) & 1)
        sd_fault(check, "I5 sequence", "the list's sequence is odd");
    if (sum->broken) return;
    if (uuids == sum->entries[SD_NAME_INDEX] && uuids != live && !check->proved[SD_PART_LIST]) {
        sd_fault(check, "counts", "%llu domains are counted, %llu are there",
                 (unsigned long long)live, (unsigned long long)uuids);
        return;
    }
    compare_entries(check, sum, SD_UUID_INDEX, live);
    compare_entries(check, sum, SD_NAME_INDEX, live);
}

static void compare_free(const sd_check *check, const sd_sum *sum)
{
    uint64_t live = sd_load(&check->segment->header->live);
    if (!sum->broken && sum->free_slots + live != sum->slots)
        sd_fault(check, "free list", "%llu free slots and %llu domains in %u slots",
                 (unsigned long long)sum->free_slots, (unsigned long long)live, sum->slots);
}

static void compare_ids(const sd_check *check, const sd_sum *sum)
{
    uint64_t active = sd_load(&check->segment->header->active), ids = sum->entries[SD_ID_INDEX];
    if (sd_load(&check->segment->header->id_seq) & 1)
        sd_fault(check, "I5 sequence", "the ids' sequence is odd");
    if (sum->broken || ids == active) return;
    if (check->proved[SD_PART_IDS])
        compare_entries(check, sum, SD_ID_INDEX, active);
    else
        sd_fault(check, "counts", "%llu active domains are counted, %llu are there",
                 (unsigned long long)active, (unsigned long long)ids);
}

static void compare_used(const sd_check *check, const sd_sum *sum)
{
    uint64_t used = sd_load(&check->segment->header->heap_used);
    if (used != sum->cells)
        sd_fault(check, "I2 map", "the count of used cells is %llu, they are %llu",
                 (unsigned long long)used, (unsigned long long)sum->cells);
}

static void compare_cells(const sd_check *check, const sd_sum *sum)
{
    if (sum->ownerless)
        sd_fault(check, "I2 map", "%llu cells are marked and nobody's",
                 (unsigned long long)sum->ownerless);
}

static void (*const COMPARE[SD_SUMS])(const sd_check *, const sd_sum *) = {
    [SD_SUM_LISTED] = compare_listed, [SD_SUM_FREE] = compare_free, [SD_SUM_IDS] = compare_ids,
    [SD_SUM_USED] = compare_used,     [SD_SUM_CELLS] = compare_cells,
};

/* --- taking a sum ---------------------------------------------------------------------------- */

static uint64_t turn_of(const sd_check *check, int sum)
{
    const sd_header *header = check->segment->header;
    switch (sd_check_part(sum)) {
    case SD_PART_LIST: return sd_load_acquire(&header->list_seq);
    case SD_PART_IDS: return sd_load_acquire(&header->id_seq);
    default: return sd_load_acquire(&header->heap_turn);
    }
}

/* 0, so that nothing is walked, if the watermark is damaged, which may have happened meanwhile. */
static uint64_t cells_committed(const sd_check *check)
{
    uint64_t cells = sd_unsealed(sd_load_acquire(&check->segment->header->heap_committed));
    return cells <= check->segment->at.heap_cells ? cells : 0;
}

/* Bits for all cells; all walks begin again if there were too few. */
static int make_room(sd_check *check)
{
    uint64_t most = check->segment->at.heap_cells, cells = cells_committed(check);
    uint64_t **maps[] = {&check->named, &check->again, &check->ownerless, &check->twice};
    cells = cells + SLACK < most ? cells + SLACK : most;
    check->room = 0;
    for (int i = 0; i < 4; i++) {
        free(*maps[i]);
        *maps[i] = malloc((cells / 64 + 1) * 8);
        if (!*maps[i]) return SD_ERRNO;
    }
    check->room = cells;
    memset(check->ownerless, 0xff, (cells / 64 + 1) * 8);
    memset(check->twice, 0xff, (cells / 64 + 1) * 8);
    return SD_OK;
}

int sd_check_prepare(sd_check *check, int which)
{
    return which == SD_SUM_CELLS ? make_room(check) : SD_OK;
}

/* SD_DOUBT: the heap has grown over the bits. */
static int begin_sum(sd_check *check, int which)
{
    sd_sum *sum = &check->sum[which];
    memset(sum, 0, sizeof *sum);
    sum->turn = turn_of(check, which);
    sd_slots(check->segment, &sum->slots);
    if (sd_check_part(which) == SD_PART_HEAP) check->committed = cells_committed(check);
    if (which != SD_SUM_CELLS) return SD_OK;
    if (check->committed > check->room) {
        check->room = 0;
        sum->stage = -1;
        return SD_DOUBT;
    }
    memset(check->named, 0, (check->room / 64 + 1) * 8);
    memset(check->again, 0, (check->room / 64 + 1) * 8);
    return SD_OK;
}

static int go_on(sd_check *check, int which, uint64_t until)
{
    sd_sum *sum = &check->sum[which];
    for (; STAGES[which][sum->stage]; sum->stage++, sum->at = 0)
        if (!STAGES[which][sum->stage](check, sum, until)) return SD_TIMEOUT;
    COMPARE[which](check, sum);
    sum->stage = -1;
    return SD_OK;
}

/* An odd sequence: somebody is in the middle of it. */
static bool stood_still(const sd_check *check, int which)
{
    const sd_sum *sum = &check->sum[which];
    uint32_t slots;
    if (sd_check_part(which) != SD_PART_HEAP && sum->turn & 1) return false;
    atomic_thread_fence(memory_order_acquire);
    sd_slots(check->segment, &slots);
    return turn_of(check, which) == sum->turn && slots == sum->slots;
}

int sd_check_sum(sd_check *check, int which, uint64_t until)
{
    sd_sum *sum = &check->sum[which];
    int result = SD_OK;
    if (sum->stage < 0) {
        if (!check->room) result = sd_check_prepare(check, which);
        if (result == SD_OK) result = begin_sum(check, which);
        if (result != SD_OK) return result;
    }
    sd_check_listen(check);
    check->doubts = sum->doubts;
    result = go_on(check, which, until);
    sum->doubts = check->doubts;
    sd_check_speak(check);
    if (result != SD_OK) return result;
    if (which == SD_SUM_CELLS) return sum->ownerless || sum->twice ? SD_DOUBT : SD_OK;
    return sum->doubts || !stood_still(check, which) ? SD_DOUBT : SD_OK;
}

int sd_check_sum_held(sd_check *check, int which, uint64_t until)
{
    int result = begin_sum(check, which);
    if (result == SD_OK) result = go_on(check, which, until);
    check->sum[which].stage = -1;
    return result;
}
