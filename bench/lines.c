/* lines.c - operations of the core, one by one, for lines.py to see what of the segment each touches.
 *
 *   lines trace   once under a tracer of loads and stores; prints first where everything lies
 *   lines time    nanoseconds of each operation, by one thread, everything in its cache
 *
 * Each operation calls what the binding calls, in its order.  Before and after it there is a store
 * into `marks`, which the tracer sees like any other.  The seed of the hash functions is set to a
 * constant, so that probes are as long in every run.
 */
#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { DOMAINS = 64, CHOSEN = 32, DEFINITION = 2300, DATA = 40, TIMED = 200 };

#define MUST(condition) \
    do { \
        if (!(condition)) fprintf(stderr, "lines: %s\n", #condition), exit(1); \
    } while (0)

uintptr_t lines_base, lines_size;
volatile unsigned char *lines_shadow;
static volatile uint64_t *marks; /* in a place that lines.py knows, too */
#define MARKS 0x200000000ul

static sd_segment *segment;
static sd_key by_uuid[2 * DOMAINS], by_name[2 * DOMAINS];
static unsigned char definition[DEFINITION], data[DATA], copied[DEFINITION + 64];
static uint32_t held;  /* the slot between two steps of an operation */
static sd_values values;

/* --- what the binding does ------------------------------------------------------------------- */

static void make_keys(void)
{
    for (unsigned number = 0; number < 2 * DOMAINS; number++) {
        by_uuid[number].what = SD_UUID_INDEX;
        by_uuid[number].uuid[0] = (number + 1) * 0x9E3779B97F4A7C15u;
        by_uuid[number].uuid[1] = (number + 1) * 0xF39CC0605CEDC835u;
        unsigned char *name = by_name[number].name;
        by_name[number].what = SD_NAME_INDEX;
        name[0] = (unsigned char)sprintf((char *)name + 1, "vm%u", number);
    }
}

static void find(const sd_key *key)
{
    MUST(sd_find_to_lock(segment, key, &held) == SD_OK);
    MUST(sd_slot_lock(segment, held, SD_SPIN) == SD_OK);
    MUST(sd_verify(segment, held, key, &values) == SD_OK);
    MUST(sd_load(&segment->slots[held].life) & 1);
}

static void unlock(void)
{
    sd_slot_unlock(segment, held, true);
}

static void commit(const sd_blob blobs[SD_BLOBS], bool told, uint32_t kind)
{
    const sd_news news = {told, {kind}, {values.id}, 0};
    MUST(sd_commit(segment, held, &values, blobs, NULL, &news, SD_FOREVER) == SD_OK);
}

static void read_blob(const sd_stored *stored)
{
    sd_prefetch_read(stored->at, stored->bytes);
    sd_copy_out(copied, stored->at, stored->bytes);
}

/* --- the operations -------------------------------------------------------------------------- */

static void get(unsigned number)
{
    find(&by_uuid[number]);
    unlock();
}

static void get_by_name(unsigned number)
{
    find(&by_name[number]);
    unlock();
}

static void patch(unsigned number)
{
    MUST(sd_list_lock(segment, SD_SPIN) == SD_OK);
    find(&by_uuid[number]);
    sd_list_unlock(segment);
    unlock();
}

static void peek(unsigned number)
{
    sd_view view;
    sd_stored stored;
    uint32_t slot;
    MUST(sd_find(segment, &by_uuid[number], &slot) == SD_OK);
    MUST(sd_view_begin(segment, slot, &view) == SD_OK);
    for (int b = SD_NEXT_DEFINITION; b < SD_BLOBS; b++) /* the definition was decoded before */
        if (sd_view_blob(segment, slot, &view, b, &stored) == SD_OK) read_blob(&stored);
    MUST(sd_view_blobs_check(segment, slot, &view) == SD_OK);
}

static void change(unsigned number)
{
    find(&by_uuid[number]);
    values.state ^= 2; /* running, paused */
    commit(NULL, true, values.state == 3 ? 3 : 4);
    unlock();
}

/* Nobody is told of a reason alone. */
static void change_untold(unsigned number)
{
    find(&by_uuid[number]);
    values.reason ^= 1;
    commit(NULL, false, 0);
    unlock();
}

static void change_data(unsigned number)
{
    sd_blob blobs[SD_BLOBS] = {[SD_DATA] = {true, data, DATA}};
    sd_stored stored;
    find(&by_uuid[number]);
    if (values.flags & SD_FLAG_PRESENT(SD_DATA)) {
        MUST(sd_blob_get(segment, held, &values, SD_DATA, &stored) == SD_OK);
        read_blob(&stored);
    }
    commit(blobs, false, 0);
    unlock();
}

static void replace(unsigned number)
{
    sd_blob blobs[SD_BLOBS] = {[SD_DEFINITION] = {true, definition, DEFINITION}};
    find(&by_uuid[number]);
    sd_prefetch_replace(segment, held);
    commit(blobs, true, SD_KIND(0, 1));
    unlock();
}

static void start(unsigned number)
{
    find(&by_uuid[number]);
    MUST(sd_take_id(segment, &values.id, SD_FOREVER) == SD_OK);
    values.state = 1;
    commit(NULL, true, 2);
    unlock();
}

static void stop(unsigned number)
{
    find(&by_uuid[number]);
    values.id = -1;
    values.state = 5;
    commit(NULL, true, 5);
    unlock();
}

static void define(unsigned number)
{
    const sd_news news = {1, {SD_KIND(0, 0)}, {-1}, 0};
    sd_blob blobs[SD_BLOBS] = {[SD_DEFINITION] = {true, definition, DEFINITION}};
    sd_values fresh = {.id = -1, .pid = -1, .state = 5, .flags = SD_FLAG_PERSISTENT};
    const sd_key *key = &by_uuid[number], *other = &by_name[number];
    sd_word *link = NULL;
    uint32_t slot;
    MUST(sd_list_lock(segment, SD_SPIN) == SD_OK);
    sd_prefetch_insert(segment);
    for (int twice = 0; twice < 2; twice++) { /* the rule asks, and then the store */
        MUST(sd_find(segment, key, &slot) == SD_MISS);
        MUST(sd_find(segment, other, &slot) == SD_MISS);
    }
    MUST(sd_free_slot(segment, &link, &held) == SD_OK);
    MUST(sd_slot_lock(segment, held, SD_TRY) == SD_OK);
    MUST(sd_insert(segment, held, link, key->uuid, other->name, &fresh, blobs, &news,
                   SD_FOREVER) == SD_OK);
    MUST(sd_values_get(segment, held, &values) == SD_OK);
    sd_list_unlock(segment);
    unlock();
}

/* By the handle that defined it, as counted.py does. */
static void discard(unsigned number)
{
    const sd_news news = {1, {SD_KIND(1, 0)}, {-1}, 0};
    (void)number;
    MUST(sd_list_lock(segment, SD_SPIN) == SD_OK);
    MUST(sd_slot_lock(segment, held, SD_SPIN) == SD_OK);
    MUST(sd_load(&segment->slots[held].life) & 1);
    MUST(sd_values_get(segment, held, &values) == SD_OK);
    MUST(sd_remove(segment, held, &news, SD_FOREVER) == SD_OK);
    unlock();
    sd_list_unlock(segment);
}

/* Somebody waits for a change of any domain. */
static void await_any(unsigned number)
{
    (void)number;
    sd_raise(&segment->header->any_waiting, sd_load(&segment->header->any_seq) + 1);
}

static void nothing(unsigned number)
{
    (void)number;
}

/* `before` and `after` make an operation possible again, and are not counted.  Those that store
 * data come last: before them no domain has any. */
static const struct {
    const char *name;
    void (*before)(unsigned number), (*run)(unsigned number), (*after)(unsigned number);
    unsigned first; /* number of the first domain */
} operations[] = {
    {"get", nothing, get, nothing, 0},
    {"get_by_name", nothing, get_by_name, nothing, 0},
    {"patch", nothing, patch, nothing, 0},
    {"peek", nothing, peek, nothing, 0},
    {"change_untold", nothing, change_untold, nothing, 0},
    {"change_awaited", await_any, change_untold, nothing, 0},
    {"change", nothing, change, nothing, 0},
    {"start", stop, start, nothing, 0},
    {"replace", nothing, replace, nothing, 0},
    {"define", nothing, define, discard, DOMAINS},
    {"remove", define, discard, nothing, DOMAINS},
    {"data", nothing, change_data, nothing, 0},
};
enum { OPERATIONS = sizeof operations / sizeof *operations };

/* --- where everything lies ------------------------------------------------------------------- */

static void lies(const char *name, const volatile void *at, uint64_t bytes, unsigned lines)
{
    printf("region %s %lu %lu %u\n", name, (unsigned long)(uintptr_t)at, (unsigned long)bytes,
           lines);
}

/* A part of the header goes from its first field to the next part's. */
static void print_regions(void)
{
    const sd_geometry *at = &segment->at;
    sd_header *header = segment->header;
    const struct {
        const char *name;
        const volatile void *from;
    } parts[] = {
        {"constants", header},
        {"poisoned", &header->poisoned},
        {"any_change", &header->any_waiting},
        {"list_lock", &header->list_mutex},
        {"list_seq", &header->list_seq},
        {"slot_count", &header->slot_count},
        {"list_why", &header->list_why},
        {"watermarks", &header->counters_committed},
        {"id_lock", &header->id_mutex},
        {"id_seq", &header->id_seq},
        {"event_lock", &header->event_mutex},
        {"event_count", &header->event_count},
        {"heap_lock", &header->heap_mutex},
        {"heap_counts", &header->heap_committed},
        {"heap_hints", (const char *)&header->heap_committed + SD_CACHE_LINE},
        {"", header + 1},
    };
    for (size_t i = 0; i + 1 < sizeof parts / sizeof *parts; i++) {
        const volatile char *from = parts[i].from, *to = parts[i + 1].from;
        lies(parts[i].name, from, (uint64_t)(to - from), 0);
    }
    const char *names[] = {"uuid_index", "name_index", "id_index"};
    for (int index = 0; index < SD_INDEXES; index++)
        for (unsigned level = 0; level < at->levels; level++)
            lies(names[index], segment->base + at->table[index][level],
                 8ull << (SD_INDEX_BITS + level), 0);
    lies("slot", segment->slots, at->max_slots * sizeof(sd_slot), 6);
    lies("names", segment->names, at->max_slots * sizeof(sd_names), 0);
    lies("counters", segment->blocks, SD_COUNTED_MAX * sizeof(sd_counters), 0);
    lies("waiters", segment->waiters, SD_WAITERS_MAX * sizeof(sd_waiter), 0);
    lies("ring", segment->ring, at->events * sizeof(sd_entry), 0);
    lies("map", segment->map, (at->heap_cells + 7) / 8, 0);
    lies("heap", segment->heap, at->heap_cells * SD_CELL, 0);
    printf("segment %lu %lu %lu\n", (unsigned long)lines_base, (unsigned long)lines_size,
           (unsigned long)(uintptr_t)lines_shadow);
    for (int i = 0; i < OPERATIONS; i++) printf("operation %s\n", operations[i].name);
    fflush(stdout);
}

/* --- runs ------------------------------------------------------------------------------------ */

static void fix_seed(int fd)
{
    sd_header *header = mmap(NULL, sizeof *header, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    MUST(header != MAP_FAILED);
    header->seed = 0x5EED;
    header->sum = sd_constants_sum(header);
    munmap(header, sizeof *header);
}

static void make(void)
{
    char why[200];
    int fd = memfd_create("lines", MFD_CLOEXEC);
    MUST(sd_format(fd, SD_KIND_ROBUST, 2 * DOMAINS, DOMAINS * 200, 4096) == SD_OK);
    fix_seed(fd);
    MUST(sd_map(fd, &segment, why, sizeof why) == SD_OK);
    for (unsigned number = 0; number < DOMAINS; number++) {
        define(number);
        start(number);
    }
}

static void run(int operation, unsigned turn, bool marked)
{
    unsigned number = operations[operation].first + turn % CHOSEN * (DOMAINS / CHOSEN);
    operations[operation].before(number);
    if (marked) marks[0] = 1;
    operations[operation].run(number);
    if (marked) marks[1 + operation] = 1;
    operations[operation].after(number);
}

static void trace(void)
{
    lines_base = (uintptr_t)segment->base;
    lines_size = segment->at.total_bytes;
    void *shadow = mmap(NULL, lines_size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    MUST(shadow != MAP_FAILED);
    lines_shadow = shadow;
    void *place = mmap((void *)MARKS, 4096, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    MUST(place == (void *)MARKS);
    marks = place;
    print_regions();
    for (int operation = 0; operation < OPERATIONS; operation++)
        for (unsigned turn = 0; turn < 3 * CHOSEN; turn++) /* warm, then each twice */
            run(operation, turn, turn >= CHOSEN);
}

/* Those that cannot be repeated by themselves are timed together with what goes before and after. */
static void time_all(void)
{
    for (int operation = 0; operation < OPERATIONS; operation++) {
        uint64_t least = UINT64_MAX;
        for (int round = 0; round < TIMED; round++) {
            uint64_t began = sd_now();
            for (unsigned turn = 0; turn < CHOSEN; turn++) run(operation, turn, false);
            uint64_t took = sd_now() - began;
            if (took < least) least = took;
        }
        printf("%s %.1f\n", operations[operation].name, (double)least / CHOSEN);
    }
    uint64_t least = UINT64_MAX;
    for (int round = 0; round < TIMED; round++) {
        uint64_t began = sd_now();
        for (int i = 0; i < 100; i++) sd_now_real();
        uint64_t took = sd_now() - began;
        if (took < least) least = took;
    }
    printf("clock %.1f\n", (double)least / 100);
}

int main(int count, char **arguments)
{
    if (count != 2) return fprintf(stderr, "usage: lines trace|time\n"), 2;
    memset(definition, 'x', sizeof definition);
    memset(data, 'y', sizeof data);
    make_keys();
    make();
    if (!strcmp(arguments[1], "trace")) trace();
    else time_all();
    return 0;
}
