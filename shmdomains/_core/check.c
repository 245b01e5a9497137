/* check.c - every invariant, from outside, and nobody waits for it longer than a slice.
 *
 * What a record says of itself is judged without any lock.  A view that stood still is one moment
 * of the record, what counts does not change while it counts, and descriptors, watermarks and next_id
 * are single words that are stored in the right order; so what is wrong there is wrong.
 *
 * What two places say of each other can be judged only while neither moves, that is, with the lock
 * that protects both.  There are two kinds of it:
 *
 *   suspects   Records to which an index does not lead.  Each is looked at again a few times, and
 *              those that stay are judged one by one with the lock held: a microsecond each, as
 *              many as there is time for, then the lock is dropped and taken again for the rest.
 *   counts     Numbers that must be equal: domains, entries, free slots; cells named, cells marked.
 *              They are counted without a lock first, between two looks at the sequence (the turn
 *              of the heap); if nothing moved and all fits, that is the proof.  Else they are
 *              counted once more with the lock held, for SD_CHECK_HOLD_NS at most.  Who has more
 *              than can be counted in that time (some two million domains) and writers who never
 *              rest gets no verdict instead of a wrong one.
 *
 * Nothing here stores into the segment; a checker that dies leaves nothing but the lock it held.
 */
#include "core.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define SUSPECTS_MAX 10000u
#define LOOKS 3     /* at a suspect, before it is one */
#define PATIENCE 256 /* steps between two looks at the clock */
#define SLACK (1u << 16) /* cells by which the heap may grow between preparing and holding */
#define UNCOUNTED UINT64_MAX

/* How far the counting of one part has got, and what it found. */
typedef struct {
    int stage; /* -1: not begun */
    uint64_t at;
    uint64_t turn; /* of the part when it began */
    uint32_t slots;
    uint64_t domains, entries[SD_INDEXES], free_slots;
    uint64_t cells, unnamed, unmarked;
} sd_count;

struct sd_check {
    sd_segment *segment;
    unsigned states;
    sd_report report; /* what is proved */
    void *context;
    sd_report say; /* `report`, or who only counts what may be no fault */
    void *ear;
    unsigned doubts;
    uint32_t slots, next; /* of the records, and the one to look at next */
    sd_tally tally;
    uint32_t *suspects[SD_PARTS];
    uint32_t suspected[SD_PARTS];
    uint64_t overlooked;
    sd_count count[SD_PARTS];
    uint64_t *named; /* shadow of the map: cells that descriptors name */
    uint64_t named_cells, committed;
};

__attribute__((format(printf, 3, 4))) static void
fault(const sd_check *check, const char *invariant, const char *format, ...)
{
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    check->say(check->ear, invariant, text);
}

static void doubt(void *doubts, const char *invariant, const char *what)
{
    (void)invariant, (void)what;
    ++*(unsigned *)doubts;
}

/* From here on what is said is no more than a doubt. */
static void listen_for_doubts(sd_check *check)
{
    check->doubts = 0;
    check->say = doubt;
    check->ear = &check->doubts;
}

static void report_faults(sd_check *check)
{
    check->say = check->report;
    check->ear = check->context;
}

static bool is_late(uint64_t step, uint64_t until)
{
    return step % PATIENCE == PATIENCE - 1 && sd_now() >= until;
}

/* --- begin and end --------------------------------------------------------------------------- */

sd_check *sd_check_begin(sd_segment *segment, unsigned states, sd_report report, void *context)
{
    sd_check *check = calloc(1, sizeof *check);
    if (!check) return NULL;
    check->segment = segment;
    check->states = states;
    check->report = report;
    check->context = context;
    for (int part = 0; part < SD_PARTS; part++) check->count[part].stage = -1;
    for (int part = 0; part < SD_PART_HEAP; part++) {
        check->suspects[part] = malloc(SUSPECTS_MAX * sizeof(uint32_t));
        if (check->suspects[part]) continue;
        sd_check_end(check);
        return NULL;
    }
    report_faults(check);
    return check;
}

void sd_check_end(sd_check *check)
{
    if (!check) return;
    for (int part = 0; part < SD_PARTS; part++) free(check->suspects[part]);
    free(check->named);
    free(check);
}

const sd_tally *sd_check_tally(const sd_check *check)
{
    return &check->tally;
}

uint32_t sd_check_suspects(const sd_check *check, int part)
{
    return check->suspected[part];
}

uint64_t sd_check_overlooked(const sd_check *check)
{
    return check->overlooked;
}

/* --- what a record says of itself ------------------------------------------------------------ */

/* One moment of a record, and whether the blobs that count have extents. */
static int read_record(const sd_segment *segment, uint32_t slot, sd_view *view,
                       int extents[SD_BLOBS])
{
    int result;
    do {
        result = sd_view_begin(segment, slot, view);
        for (int b = 0; b < SD_BLOBS && result == SD_OK; b++) {
            uint64_t extent;
            extents[b] = sd_view_extent(segment, slot, view, b, &extent);
            if (extents[b] == SD_DOUBT) result = SD_DOUBT;
        }
    } while (result == SD_DOUBT);
    return result;
}

static unsigned check_descriptors(sd_check *check, uint32_t slot)
{
    const sd_slot *record = &check->segment->slots[slot];
    unsigned extents = 0;
    for (int b = 0; b < SD_BLOBS; b++)
        for (int i = 0; i < 2; i++) {
            uint64_t extent = sd_load(&record->extent[b][i]);
            if (!extent) continue;
            extents++;
            check->tally.extents++;
            if (sd_extent_valid(check->segment, extent))
                check->tally.cells += sd_cells(SD_EXTENT_BYTES(extent));
            else
                fault(check, "I2 extents", "slot %u names cells outside of the heap", slot);
        }
    return extents;
}

static unsigned check_blobs(const sd_check *check, uint32_t slot, const sd_view *view,
                            const int extents[SD_BLOBS])
{
    unsigned counted = 0;
    for (int b = 0; b < SD_BLOBS; b++) {
        counted += extents[b] != SD_MISS;
        if (extents[b] != SD_OK && extents[b] != SD_MISS)
            fault(check, "I2 extents", "slot %u: blob %d counts and has no valid extent", slot, b);
        if (view->values.version[b] > view->cur)
            fault(check, "I3 fields", "slot %u: blob %d is newer than its record", slot, b);
    }
    if (extents[SD_DEFINITION] == SD_MISS)
        fault(check, "I3 fields", "slot %u has no definition", slot);
    return counted;
}

static void check_values(sd_check *check, uint32_t slot, const sd_view *view)
{
    const sd_values *values = &view->values;
    if (!view->name[0])
        fault(check, "I1 identity", "slot %u has a name of 0 bytes, or of too many", slot);
    if (values->state >= check->states)
        fault(check, "I3 fields", "slot %u has the unknown state %u", slot, values->state);
    if (values->id < 0) return;
    check->tally.active++;
    /* Loaded after the id, and stored before it was used. */
    if ((uint64_t)values->id >= sd_load_acquire(&check->segment->header->next_id))
        fault(check, "I4 ids", "slot %u has id %d, which was not given out yet", slot, values->id);
}

/* --- suspects -------------------------------------------------------------------------------- */

static void check_found(const sd_check *check, uint32_t slot, const sd_key *key, const char *index)
{
    uint32_t found = UINT32_MAX;
    int result = sd_find(check->segment, key, &found);
    if (result == SD_OK && found == slot) return;
    if (result == SD_OK)
        fault(check, "I5 index", "%s index leads from the key of slot %u to slot %u", index, slot,
              found);
    else
        fault(check, "I5 index", "%s index does not lead to slot %u", index, slot);
}

/* The truth with the list lock held. */
static void judge_listing(const sd_check *check, uint32_t slot)
{
    sd_view view;
    int result;
    do result = sd_view_begin(check->segment, slot, &view);
    while (result == SD_DOUBT);
    if (result != SD_OK) return;
    sd_key key = {.what = SD_UUID_INDEX, .uuid = {view.uuid[0], view.uuid[1]}};
    check_found(check, slot, &key, "UUID");
    if (!view.name[0]) return;
    key.what = SD_NAME_INDEX;
    memcpy(key.name, view.name, sizeof key.name);
    check_found(check, slot, &key, "name");
}

/* The truth with the id lock held. */
static void judge_id(const sd_check *check, uint32_t slot)
{
    sd_values values;
    if (!(sd_load_acquire(&check->segment->slots[slot].life) & 1)) return;
    sd_values_settled(check->segment, slot, &values);
    if (values.id < 0) return;
    sd_key key = {.what = SD_ID_INDEX, .id = values.id};
    check_found(check, slot, &key, "id");
}

static void (*const JUDGE[])(const sd_check *, uint32_t) = {
    [SD_PART_LIST] = judge_listing,
    [SD_PART_IDS] = judge_id,
};

static void suspect(sd_check *check, int part, uint32_t slot)
{
    for (int look = 0; look < LOOKS; look++) {
        listen_for_doubts(check);
        JUDGE[part](check, slot);
        report_faults(check);
        if (!check->doubts) return;
    }
    if (check->suspected[part] < SUSPECTS_MAX)
        check->suspects[part][check->suspected[part]++] = slot;
    else
        check->overlooked++;
}

int sd_check_judge(sd_check *check, int part, uint64_t until)
{
    while (check->suspected[part]) {
        JUDGE[part](check, check->suspects[part][--check->suspected[part]]);
        if (sd_now() >= until) break;
    }
    return check->suspected[part] ? SD_TIMEOUT : SD_OK;
}

/* --- all records ----------------------------------------------------------------------------- */

static void check_record(sd_check *check, uint32_t slot)
{
    sd_view view;
    int extents[SD_BLOBS];
    int result = read_record(check->segment, slot, &view, extents);
    unsigned named = check_descriptors(check, slot), counted = 0;
    if (!sd_mutex_sound(&check->segment->slots[slot].mutex))
        fault(check, "locks", "slot %u: its lock is damaged", slot);
    if (result == SD_OK) {
        check->tally.domains++;
        check_values(check, slot, &view);
        counted = check_blobs(check, slot, &view, extents);
        suspect(check, SD_PART_LIST, slot);
        if (view.values.id >= 0) suspect(check, SD_PART_IDS, slot);
    }
    if (named > counted) check->tally.garbage += named - counted;
}

static int check_header(sd_check *check)
{
    const sd_segment *segment = check->segment;
    const sd_header *header = segment->header;
    if (sd_unsealed(sd_load_acquire(&header->heap_committed)) > segment->at.heap_cells) {
        fault(check, "heap", "its watermark lies behind its end");
        return SD_CORRUPT;
    }
    if (sd_slots(segment, &check->slots) != SD_OK)
        fault(check, "counts", "the number of slots or its watermark is damaged");
    check->tally.slots = check->slots;
    if (!sd_mutex_sound(&header->list_mutex) || !sd_mutex_sound(&header->id_mutex) ||
        !sd_mutex_sound(&header->heap_mutex))
        fault(check, "locks", "the list's, the ids' or the heap's lock is damaged");
    if (sd_load(&header->poisoned)) fault(check, "poisoned", "a repair failed");
    return SD_OK;
}

int sd_check_records(sd_check *check, uint64_t until)
{
    if (!check->next && check_header(check) != SD_OK) return SD_CORRUPT;
    while (check->next < check->slots) {
        check_record(check, check->next++);
        if (is_late(check->next, until)) return check->next < check->slots ? SD_TIMEOUT : SD_OK;
    }
    return SD_OK;
}

/* --- counts ---------------------------------------------------------------------------------- */

/* A stage goes on from `count->at` and says whether it came to its end. */
typedef bool (*stage)(sd_check *check, sd_count *count, uint64_t until);

static bool count_domains(sd_check *check, sd_count *count, uint64_t until)
{
    const sd_slot *slots = check->segment->slots;
    while (count->at < count->slots) {
        count->domains += sd_load(&slots[count->at++].life) & 1;
        if (is_late(count->at, until)) return false;
    }
    return true;
}

static bool count_active(sd_check *check, sd_count *count, uint64_t until)
{
    while (count->at < count->slots) {
        uint32_t slot = (uint32_t)count->at++;
        sd_values values;
        if (sd_load_acquire(&check->segment->slots[slot].life) & 1) {
            sd_values_settled(check->segment, slot, &values);
            count->domains += values.id >= 0;
        }
        if (is_late(count->at, until)) return false;
    }
    return true;
}

static const char *const INDEX_NAMES[] = {"UUID", "name", "id"};

static bool count_entries(sd_check *check, sd_count *count, uint64_t until, int index)
{
    sd_probe probe;
    if (sd_probe_begin(check->segment, index, 0, &probe) != SD_OK) {
        fault(check, "I5 index", "%s index has an impossible level", INDEX_NAMES[index]);
        count->entries[index] = UNCOUNTED;
        return true;
    }
    while (count->at <= probe.mask) {
        count->entries[index] += sd_load(&probe.table[count->at++]) != 0;
        if (is_late(count->at, until)) return false;
    }
    return true;
}

static bool count_uuids(sd_check *check, sd_count *count, uint64_t until)
{
    return count_entries(check, count, until, SD_UUID_INDEX);
}

static bool count_names(sd_check *check, sd_count *count, uint64_t until)
{
    return count_entries(check, count, until, SD_NAME_INDEX);
}

static bool count_ids(sd_check *check, sd_count *count, uint64_t until)
{
    return count_entries(check, count, until, SD_ID_INDEX);
}

/* `at`: slot + 1 of the one behind the last free slot that was counted. */
static bool walk_free_list(sd_check *check, sd_count *count, uint64_t until)
{
    const sd_segment *segment = check->segment;
    if (!count->free_slots) count->at = sd_load(&segment->header->free_head);
    while (count->at) {
        if (count->at > count->slots || ++count->free_slots > count->slots) {
            fault(check, "free list", "leads nowhere or runs in a circle");
            count->free_slots = UNCOUNTED;
            return true;
        }
        const sd_slot *slot = &segment->slots[count->at - 1];
        if (sd_load(&slot->life) & 1)
            fault(check, "free list", "slot %llu is on it and lives",
                  (unsigned long long)count->at - 1);
        count->at = sd_load(&slot->next_free);
        if (is_late(count->free_slots, until)) return false;
    }
    return true;
}

/* Enter an extent into the shadow map; two descriptors may not name one cell. */
static void name_cells(sd_check *check, sd_count *count, uint32_t slot, uint64_t extent)
{
    uint64_t cell = SD_EXTENT_CELL(extent), end = cell + sd_cells(SD_EXTENT_BYTES(extent));
    /* Reported with its record; or, without the lock, the heap has grown meanwhile. */
    if (!sd_extent_valid(check->segment, extent) || end > check->committed) return;
    count->cells += end - cell;
    for (uint64_t w = cell / 64; w * 64 < end; w++) {
        uint64_t bits = sd_map_bits(w, cell, end - cell), twice = check->named[w] & bits;
        check->named[w] |= bits;
        if (!twice) continue;
        fault(check, "I2 extents", "slot %u: cell %llu is named twice", slot,
              (unsigned long long)(w * 64) + (unsigned)__builtin_ctzll(twice));
        return;
    }
}

static bool count_cells(sd_check *check, sd_count *count, uint64_t until)
{
    while (count->at < count->slots) {
        uint32_t slot = (uint32_t)count->at++;
        for (int b = 0; b < SD_BLOBS; b++)
            for (int i = 0; i < 2; i++) {
                uint64_t extent = sd_load(&check->segment->slots[slot].extent[b][i]);
                if (extent) name_cells(check, count, slot, extent);
            }
        if (is_late(count->at, until)) return false;
    }
    return true;
}

static bool compare_map(sd_check *check, sd_count *count, uint64_t until)
{
    while (count->at * 64 < check->committed) {
        uint64_t map = sd_load(&check->segment->map[count->at]), named = check->named[count->at];
        count->unnamed += (uint64_t)__builtin_popcountll(map & ~named);
        count->unmarked += (uint64_t)__builtin_popcountll(named & ~map);
        count->at++;
        if (is_late(count->at, until)) return false;
    }
    return true;
}

static const stage STAGES[SD_PARTS][5] = {
    [SD_PART_LIST] = {count_domains, count_uuids, count_names, walk_free_list},
    [SD_PART_IDS] = {count_active, count_ids},
    [SD_PART_HEAP] = {count_cells, compare_map},
};

/* --- what must be equal ---------------------------------------------------------------------- */

static void compare_entries(const sd_check *check, const sd_count *count, int index)
{
    if (count->entries[index] != UNCOUNTED && count->entries[index] != count->domains)
        fault(check, "I5 index", "%s index has %llu entries for %llu domains", INDEX_NAMES[index],
              (unsigned long long)count->entries[index], (unsigned long long)count->domains);
}

static void compare_list(const sd_check *check, const sd_count *count)
{
    uint64_t live = sd_load(&check->segment->header->live);
    if (sd_load(&check->segment->header->list_seq) & 1)
        fault(check, "I5 sequence", "the list's sequence is odd");
    compare_entries(check, count, SD_UUID_INDEX);
    compare_entries(check, count, SD_NAME_INDEX);
    if (count->free_slots != UNCOUNTED && count->free_slots + count->domains != count->slots)
        fault(check, "free list", "%llu free slots and %llu domains in %u slots",
              (unsigned long long)count->free_slots, (unsigned long long)count->domains,
              count->slots);
    if (live != count->domains)
        fault(check, "counts", "%llu domains are counted, %llu are there",
              (unsigned long long)live, (unsigned long long)count->domains);
}

static void compare_ids(const sd_check *check, const sd_count *count)
{
    uint64_t active = sd_load(&check->segment->header->active);
    if (sd_load(&check->segment->header->id_seq) & 1)
        fault(check, "I5 sequence", "the ids' sequence is odd");
    compare_entries(check, count, SD_ID_INDEX);
    if (active != count->domains)
        fault(check, "counts", "%llu active domains are counted, %llu are there",
              (unsigned long long)active, (unsigned long long)count->domains);
}

static void compare_heap(const sd_check *check, const sd_count *count)
{
    uint64_t used = sd_load(&check->segment->header->heap_used);
    if (count->unnamed)
        fault(check, "I2 map", "%llu cells are marked and nobody's",
              (unsigned long long)count->unnamed);
    if (count->unmarked)
        fault(check, "I2 map", "%llu cells are in use and not marked",
              (unsigned long long)count->unmarked);
    if (used != count->cells)
        fault(check, "I2 map", "the count of used cells is %llu, they are %llu",
              (unsigned long long)used, (unsigned long long)count->cells);
}

static void (*const COMPARE[])(const sd_check *, const sd_count *) = {
    [SD_PART_LIST] = compare_list,
    [SD_PART_IDS] = compare_ids,
    [SD_PART_HEAP] = compare_heap,
};

/* --- counting -------------------------------------------------------------------------------- */

static uint64_t turn_of(const sd_check *check, int part)
{
    const sd_header *header = check->segment->header;
    switch (part) {
    case SD_PART_LIST: return sd_load_acquire(&header->list_seq);
    case SD_PART_IDS: return sd_load_acquire(&header->id_seq);
    default: return sd_load_acquire(&header->heap_turn);
    }
}

/* The shadow map is made, and its memory touched, before a lock is taken. */
int sd_check_prepare(sd_check *check, int part)
{
    if (part != SD_PART_HEAP) return SD_OK;
    uint64_t most = check->segment->at.heap_cells;
    uint64_t cells = sd_unsealed(sd_load_acquire(&check->segment->header->heap_committed));
    if (cells > most) return SD_CORRUPT;
    cells = cells + SLACK < most ? cells + SLACK : most;
    if (cells > check->named_cells) {
        free(check->named);
        check->named_cells = 0;
        check->named = malloc((cells / 64 + 1) * 8);
        if (!check->named) return SD_ERRNO;
        check->named_cells = cells;
    }
    memset(check->named, 0, (check->named_cells / 64 + 1) * 8);
    return SD_OK;
}

/* SD_DOUBT: the heap has grown over the shadow map. */
static int begin_count(sd_check *check, int part)
{
    sd_count *count = &check->count[part];
    memset(count, 0, sizeof *count);
    count->turn = turn_of(check, part);
    sd_slots(check->segment, &count->slots);
    if (part != SD_PART_HEAP) return SD_OK;
    check->committed = sd_unsealed(sd_load_acquire(&check->segment->header->heap_committed));
    if (check->committed <= check->named_cells) return SD_OK;
    count->stage = -1;
    return SD_DOUBT;
}

static int go_on(sd_check *check, int part, uint64_t until)
{
    sd_count *count = &check->count[part];
    for (; STAGES[part][count->stage]; count->stage++, count->at = 0)
        if (!STAGES[part][count->stage](check, count, until)) return SD_TIMEOUT;
    COMPARE[part](check, count);
    count->stage = -1;
    return SD_OK;
}

int sd_check_count(sd_check *check, int part, uint64_t until)
{
    sd_count *count = &check->count[part];
    int result = SD_OK;
    if (count->stage < 0) {
        result = sd_check_prepare(check, part);
        if (result == SD_OK) result = begin_count(check, part);
        if (result != SD_OK) return result;
        listen_for_doubts(check);
    }
    result = go_on(check, part, until);
    if (result != SD_OK) return result;
    report_faults(check);
    uint32_t slots;
    sd_slots(check->segment, &slots);
    atomic_thread_fence(memory_order_acquire);
    bool moved = turn_of(check, part) != count->turn || slots != count->slots;
    return moved || check->doubts ? SD_DOUBT : SD_OK;
}

int sd_check_count_held(sd_check *check, int part, uint64_t until)
{
    int result = begin_count(check, part);
    if (result != SD_OK) return result;
    report_faults(check);
    result = go_on(check, part, until);
    check->count[part].stage = -1;
    return result;
}
