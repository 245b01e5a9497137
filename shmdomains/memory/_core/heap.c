/* heap.c - variable-size blobs, in cells of 64 bytes, with one bit a cell.
 *
 * What is in use is known twice: by the map, and by the descriptors in the slots, and the
 * descriptors are right (I2).  After a death with the heap lock held the map is rebuilt from them.
 * So the order is: allocate = descriptor, then map; free = descriptor cleared, then map.
 *
 * Where to look is kept as hints, checked on the map before they are believed, so a dead writer's
 * hint does no harm.  The search tries, in this order: the extent of this size that was freed last;
 * if there are holes, a few words of the map from the rover on, which goes round; above the last
 * cell ever used; behind the watermark, which is raised.  Only a heap that cannot be extended is
 * searched from end to end.  Looking at all holes each time, or giving up where the rover stands
 * still, were both slow: definitions that grow a little leave holes that are a little too small.
 */
#include "heap.h"

#define GROW_CELLS (1u << 14) /* 1 MiB */
#define SEARCH_CELLS (64u * 64) /* 64 words of the map */

bool sd_extent_valid(const sd_segment *segment, uint64_t extent)
{
    uint64_t bytes = SD_EXTENT_BYTES(extent), cell = SD_EXTENT_CELL(extent);
    uint64_t committed = sd_unsealed(sd_load_acquire(&segment->header->heap_committed));
    if (committed > segment->at.heap_cells) return false;
    if (!bytes || bytes > SD_EXTENT_MAX) return false;
    return cell < committed && sd_cells(bytes) <= committed - cell;
}

void sd_heap_mark(sd_segment *segment, uint64_t cell, uint64_t cells, bool used)
{
    for (uint64_t w = cell / 64; w * 64 < cell + cells; w++) {
        uint64_t bits = sd_map_bits(w, cell, cells), word = sd_load(&segment->map[w]);
        sd_store(&segment->map[w], used ? word | bits : word & ~bits);
    }
}

static bool is_free(const sd_segment *segment, uint64_t cell, uint64_t cells, uint64_t committed)
{
    if (cell >= committed || cells > committed - cell) return false;
    for (uint64_t w = cell / 64; w * 64 < cell + cells; w++)
        if (sd_load(&segment->map[w]) & sd_map_bits(w, cell, cells)) return false;
    return true;
}

/* First run of `cells` free cells that starts in [from, until).  False: none. */
static bool search(const sd_segment *segment, uint64_t cells, uint64_t from, uint64_t until,
                   uint64_t committed, uint64_t *found)
{
    uint64_t start = from, at = from;
    while (start < until && at < committed) {
        uint64_t word = sd_load(&segment->map[at / 64]) >> (at % 64);
        uint64_t span = 64 - at % 64;
        if (word == 0) {
            at += span;
        } else {
            uint64_t gap = (uint64_t)__builtin_ctzll(word);
            if (at + gap - start >= cells) break;
            word >>= gap;
            uint64_t taken = word == ~0ull ? 64 : (uint64_t)__builtin_ctzll(~word);
            at += gap + taken;
            start = at;
        }
        if (at - start >= cells) break;
    }
    if (start >= until || !is_free(segment, start, cells, committed)) return false;
    *found = start;
    return true;
}

/* Free cells at the very end of what is committed, `most` at the most. */
static uint64_t free_tail(const sd_segment *segment, uint64_t committed, uint64_t most)
{
    uint64_t tail = 0;
    while (tail < most && tail < committed) {
        uint64_t cell = committed - tail - 1;
        if (sd_load(&segment->map[cell / 64]) >> (cell % 64) & 1) break;
        tail++;
    }
    return tail;
}

/* Commit room, and its map, behind the watermark, so that `cells` are free below its new place. */
static int extend(sd_segment *segment, uint64_t cells, uint64_t committed, uint64_t *found)
{
    uint64_t room = segment->at.heap_cells - committed;
    uint64_t tail = free_tail(segment, committed, cells);
    uint64_t missing = cells - tail;
    *found = committed - tail;
    if (!missing) return SD_OK;
    if (missing > room) return SD_FULL;
    uint64_t more = missing > GROW_CELLS ? missing : GROW_CELLS;
    if (more > room) more = room;
    uint64_t first = committed / 8, last = (committed + more + 7) / 8;
    int result = sd_commit_memory(segment, segment->at.map + first, last - first);
    if (result == SD_OK)
        result = sd_commit_memory(segment, segment->at.heap + committed * SD_CELL, more * SD_CELL);
    if (result != SD_OK) return result;
    sd_publish(&segment->header->heap_committed, sd_seal(committed + more));
    return SD_OK;
}

/* A hole, searched from where the last search ended. */
static bool search_on(sd_segment *segment, uint64_t cells, uint64_t top, uint64_t committed,
                      uint64_t *found)
{
    sd_header *header = segment->header;
    uint64_t rover = sd_load(&header->heap_rover);
    if (rover >= top) rover = 0;
    uint64_t until = rover + SEARCH_CELLS < top ? rover + SEARCH_CELLS : top;
    bool is_there = search(segment, cells, rover, until, committed, found);
    sd_store(&header->heap_rover, is_there ? *found + cells : until);
    return is_there;
}

static int find_room(sd_segment *segment, uint64_t cells, uint64_t *found)
{
    sd_header *header = segment->header;
    uint64_t committed = sd_unsealed(sd_load(&header->heap_committed));
    if (committed > segment->at.heap_cells) return SD_CORRUPT;
    uint64_t hint = sd_load(&header->heap_hint[cells % SD_HINTS]);
    if (hint && is_free(segment, hint - 1, cells, committed)) {
        *found = hint - 1;
        return SD_OK;
    }
    uint64_t top = sd_load(&header->heap_top);
    if (top > committed) top = committed;
    bool is_holed = sd_load(&header->heap_used) < top - top / 16;
    if (is_holed && search_on(segment, cells, top, committed, found)) return SD_OK;
    if (is_free(segment, top, cells, committed)) {
        *found = top;
        return SD_OK;
    }
    int result = extend(segment, cells, committed, found);
    if (result == SD_OK) return result;
    return search(segment, cells, 0, committed, committed, found) ? SD_OK : result;
}

int sd_heap_allocate(sd_segment *segment, sd_word *descriptor, uint64_t bytes)
{
    sd_header *header = segment->header;
    uint64_t cell, cells = sd_cells(bytes);
    if (!bytes || bytes > SD_EXTENT_MAX) return SD_FULL;
    int result = find_room(segment, cells, &cell);
    if (result != SD_OK) return result;
    sd_publish(&header->heap_turn, sd_load(&header->heap_turn) + 1);
    sd_publish(descriptor, SD_EXTENT(cell, bytes));
    sd_heap_mark(segment, cell, cells, true);
    sd_store(&header->heap_used, sd_load(&header->heap_used) + cells);
    if (cell + cells > sd_load(&header->heap_top)) sd_store(&header->heap_top, cell + cells);
    return SD_OK;
}

uint64_t sd_heap_free(sd_segment *segment, sd_word *descriptor)
{
    sd_header *header = segment->header;
    uint64_t extent = sd_load(descriptor);
    if (!extent) return 0;
    uint64_t cells = sd_cells(SD_EXTENT_BYTES(extent));
    bool valid = sd_extent_valid(segment, extent);
    sd_publish(&header->heap_turn, sd_load(&header->heap_turn) + 1);
    sd_publish(descriptor, 0);
    if (!valid) return 0;
    sd_heap_mark(segment, SD_EXTENT_CELL(extent), cells, false);
    sd_store(&header->heap_used, sd_load(&header->heap_used) - cells);
    sd_store(&header->heap_hint[cells % SD_HINTS], SD_EXTENT_CELL(extent) + 1);
    return cells;
}
