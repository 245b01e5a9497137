/* heap.h - variable-size blobs. */
#ifndef SHMDOMAINS_HEAP_H
#define SHMDOMAINS_HEAP_H

#include "segment.h"

#define SD_EXTENT_BYTES(extent) ((extent) & ((1ull << 25) - 1))
#define SD_EXTENT_CELL(extent) ((extent) >> 25)
#define SD_EXTENT(cell, bytes) ((uint64_t)(cell) << 25 | (bytes))

static inline uint64_t sd_cells(uint64_t bytes)
{
    return (bytes + SD_CELL - 1) / SD_CELL;
}

/* Is it a descriptor that may be followed?  0 is not. */
bool sd_extent_valid(const sd_segment *segment, uint64_t extent);

static inline sd_word *sd_extent_at(const sd_segment *segment, uint64_t extent)
{
    return segment->heap + SD_EXTENT_CELL(extent) * (SD_CELL / 8);
}

/* The bits of [cell, cell + cells) that lie in word `w` of the map. */
static inline uint64_t sd_map_bits(uint64_t w, uint64_t cell, uint64_t cells)
{
    uint64_t first = w * 64 > cell ? 0 : cell - w * 64;
    uint64_t end = cell + cells - w * 64;
    uint64_t low = ~0ull << first;
    return end >= 64 ? low : low & ((1ull << end) - 1);
}

/* Heap lock and slot lock held.  allocate: SD_FULL, SD_NO_MEMORY.  free: how many cells. */
int sd_heap_allocate(sd_segment *segment, sd_word *descriptor, uint64_t bytes);
uint64_t sd_heap_free(sd_segment *segment, sd_word *descriptor);
void sd_heap_mark(sd_segment *segment, uint64_t cell, uint64_t cells, bool used);

#endif
