/* check.c - every invariant, from outside, and nobody waits for it longer than a slice.
 *
 * What a record says of itself is judged without any lock.  A view that stood still is one moment
 * of the record, what counts does not change while it counts, and descriptors, watermarks and
 * next_id are single words that are stored in the right order; so what is wrong there is wrong.
 *
 * What two places say of each other can be proved wrong only while neither moves, that is, with the
 * lock that protects both.  But what is wrong stays wrong: nobody mends it in passing.  So whatever
 * is seen in order at one moment, without a lock, is in order, and the lock is for the rest:
 *
 *   suspects   A record that an index does not lead to, an entry that leads to no domain, an extent
 *              that is not marked as used.  Each is looked at a few times; those that never look
 *              right are judged one by one with the lock held, a microsecond each, as many as there
 *              is time for; then the lock is dropped and taken again for the rest.
 *   cells      That a cell is named twice, or marked and nobody's, is seen by walking all
 *              descriptors.  A cell that moves from record to record during the walk may seem to
 *              be either, but hardly in every walk: what no walk has acquitted is judged by one
 *              more with the heap lock held.
 *   sums       Numbers that must be equal: entries and domains, free slots, used cells.  They are
 *              taken without a lock first, between two looks at the sequence (the turn of the
 *              heap); if nothing moved, that is the verdict, else they are taken with the lock
 *              held.
 *
 * A lock is held for SD_CHECK_HOLD_NS at most.  What can not be done in that time - a free list of
 * half a million slots, walking the descriptors of several million domains that do have a fault,
 * both only while writers never rest - gets no verdict instead of a wrong one.
 *
 * Nothing here stores into the segment; a checker that dies leaves nothing but the lock it held.
 */
#include "check.h"

#include "find.h"
#include "mutex.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define SUSPECTS_MAX 10000u
#define LOOKS 3          /* at a suspect, before it is one */
#define PATIENCE 256     /* steps between two looks at the clock */
#define SLACK (1u << 16) /* cells by which the heap may grow between preparing and holding */

/* What may be suspected; `where` is a slot, of the entries a place in the table. */
enum { LISTING, UUID_ENTRY, NAME_ENTRY, ID, ID_ENTRY, MARKS, KINDS };

static const int PART_OF_KIND[KINDS] = {
    [LISTING] = SD_PART_LIST, [UUID_ENTRY] = SD_PART_LIST, [NAME_ENTRY] = SD_PART_LIST,
    [ID] = SD_PART_IDS,       [ID_ENTRY] = SD_PART_IDS,    [MARKS] = SD_PART_HEAP,
};

static const int PART_OF_SUM[SD_SUMS] = {
    [SD_SUM_LISTED] = SD_PART_LIST, [SD_SUM_FREE] = SD_PART_LIST, [SD_SUM_IDS] = SD_PART_IDS,
    [SD_SUM_USED] = SD_PART_HEAP,   [SD_SUM_CELLS] = SD_PART_HEAP,
};

typedef struct {
    int kind;
    uint32_t where;
} sd_suspect;

/* How far one sum has got, and what it is. */
typedef struct {
    int stage; /* -1: not begun */
    uint64_t at, turn;
    uint32_t slots;
    bool broken; /* it can not be taken, which was reported */
    unsigned doubts;
    uint64_t entries[SD_INDEXES], free_slots, cells, ownerless, twice;
} sd_sum;

struct sd_check {
    sd_segment *segment;
    unsigned states;
    sd_report report; /* what is proved */
    void *context;
    sd_report say; /* `report`, or who only counts what may be no fault */
    void *ear;
    unsigned doubts;
    unsigned proved[SD_PARTS]; /* faults of suspects */
    sd_tally tally;
    bool begun;
    uint32_t slots, next; /* of the records, and the one to look at next */
    int index;            /* whose entries are looked at, from `entry` down, in a table of `mask` */
    uint64_t entry, mask;
    sd_suspect *suspects[SD_PARTS];
    uint32_t suspected[SD_PARTS];
    uint64_t overlooked;
    sd_sum sum[SD_SUMS];
    /* One bit a cell: named in this walk, and named again; marked and nobody's in every walk, and
     * named twice in every walk. */
    uint64_t *named, *again, *ownerless, *twice;
    uint64_t room, committed; /* cells that these have bits for, and that there are */
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
    check->mask = UINT64_MAX;
    for (int sum = 0; sum < SD_SUMS; sum++) check->sum[sum].stage = -1;
    for (int part = 0; part < SD_PARTS; part++) {
        check->suspects[part] = malloc(SUSPECTS_MAX * sizeof(sd_suspect));
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
    free(check->named), free(check->again), free(check->ownerless), free(check->twice);
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

int sd_check_part(int sum)
{
    return PART_OF_SUM[sum];
}

/* --- what a record says of itself ------------------------------------------------------------ */

/* SD_OK, SD_MISS, SD_DOUBT; SD_CORRUPT: no valid extent; SD_MISMATCH: it does not hold what was
 * written.  Without memory for a look it passes for sound. */
static int read_blob(const sd_segment *segment, uint32_t slot, const sd_view *view, int blob)
{
    uint64_t extent, sum;
    int result = sd_view_extent(segment, slot, view, blob, &extent);
    if (result != SD_OK) return result;
    uint64_t size = SD_EXTENT_BYTES(extent), version = view->values.version[blob];
    unsigned char *copy = malloc(size);
    if (!copy) return SD_OK;
    sd_copy_out(copy, sd_extent_at(segment, extent), size);
    memcpy(&sum, copy, sizeof sum);
    bool fits = sum == sd_blob_sum(view->uuid, blob, version, copy + 8, size - 8);
    free(copy);
    if (fits) return SD_OK;
    return sd_view_check(segment, slot, view) == SD_OK ? SD_MISMATCH : SD_DOUBT;
}

/* One moment of a record, and whether the blobs that count are there. */
static int read_record(const sd_segment *segment, uint32_t slot, sd_view *view,
                       int extents[SD_BLOBS])
{
    int result;
    do {
        result = sd_view_begin(segment, slot, view);
        for (int b = 0; b < SD_BLOBS && (result == SD_OK || result == SD_CORRUPT); b++) {
            extents[b] = read_blob(segment, slot, view, b);
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
            uint64_t extent = sd_load_acquire(&record->extent[b][i]); /* then the watermark */
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
        if (extents[b] == SD_CORRUPT)
            fault(check, "I2 extents", "slot %u: blob %d counts and has no valid extent", slot, b);
        if (extents[b] == SD_MISMATCH)
            fault(check, "I2 extents", "slot %u: blob %d does not fit its checksum", slot, b);
        if (view->values.version[b] > sd_count_value(view->cur))
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
        fault(check, "I1 identity",
              "slot %u has a name of 0 bytes, or name and uuid do not fit their checksum", slot);
    if (!sd_uuid_sound(&check->segment->slots[slot]) &&
        sd_view_check(check->segment, slot, view) == SD_OK)
        fault(check, "I1 identity", "slot %u has a uuid that does not fit its checksum", slot);
    if (values->state >= check->states)
        fault(check, "I3 fields", "slot %u has the unknown state %u", slot, values->state);
    if (values->id < 0) return;
    check->tally.active++;
    /* Loaded after the id, and stored before it was used. */
    uint64_t next_id = sd_unsealed(sd_load_acquire(&check->segment->header->next_id));
    if ((uint64_t)values->id >= next_id)
        fault(check, "I4 ids", "slot %u has id %d, which was not given out yet", slot, values->id);
}

/* --- suspects -------------------------------------------------------------------------------- */

static const char *const INDEX_NAMES[] = {"UUID", "name", "id"};

static void check_found(const sd_check *check, uint32_t slot, const sd_key *key)
{
    uint32_t found = UINT32_MAX;
    const char *index = INDEX_NAMES[key->what];
    int result = sd_find(check->segment, key, &found);
    if (result == SD_OK && found == slot) return;
    if (result == SD_OK)
        fault(check, "I5 index", "%s index leads from the key of slot %u to slot %u", index, slot,
              found);
    else
        fault(check, "I5 index", "%s index does not lead to slot %u", index, slot);
}

/* List lock: UUID and name lead to the slot. */
static void judge_listing(const sd_check *check, uint32_t slot)
{
    sd_view view;
    int result;
    do result = sd_view_begin(check->segment, slot, &view);
    while (result == SD_DOUBT);
    if (result == SD_MISS) return;
    sd_key key = {.what = SD_UUID_INDEX, .uuid = {view.uuid[0], view.uuid[1]}};
    check_found(check, slot, &key);
    key.what = SD_NAME_INDEX;
    memcpy(key.name, view.name, sizeof key.name);
    check_found(check, slot, &key);
}

static bool has_id(const sd_segment *segment, uint32_t slot, int32_t *id)
{
    sd_values values;
    if (!(sd_load_acquire(&segment->slots[slot].life) & 1)) return false;
    sd_values_settled(segment, slot, &values); /* damaged ones are reported with the record */
    *id = values.id;
    return values.id >= 0;
}

/* Id lock: the id leads to the slot. */
static void judge_id(const sd_check *check, uint32_t slot)
{
    sd_key key = {.what = SD_ID_INDEX};
    if (has_id(check->segment, slot, &key.id)) check_found(check, slot, &key);
}

/* List lock, of ids the id lock: the entry at this place, if there is one, is of a domain.  That it
 * is the only one, and the right one, follows from the domain's own and from the sum. */
static void judge_entry(const sd_check *check, int index, uint32_t where)
{
    const sd_segment *segment = check->segment;
    sd_probe probe;
    int32_t id;
    if (sd_probe_begin(segment, index, 0, &probe) != SD_OK || where > probe.mask) return;
    uint64_t entry = sd_load_acquire(&probe.table[where]);
    if (!entry) return;
    uint32_t slot = SD_ENTRY_SLOT(entry);
    bool lives = slot < sd_slot_count(segment) &&
                 (index == SD_ID_INDEX ? has_id(segment, slot, &id)
                                       : sd_load_acquire(&segment->slots[slot].life) & 1);
    if (!lives)
        fault(check, "I5 index", "%s index has an entry of slot %u, which has no such domain",
              INDEX_NAMES[index], slot);
}

static void judge_uuid_entry(const sd_check *check, uint32_t where)
{
    judge_entry(check, SD_UUID_INDEX, where);
}

static void judge_name_entry(const sd_check *check, uint32_t where)
{
    judge_entry(check, SD_NAME_INDEX, where);
}

static void judge_id_entry(const sd_check *check, uint32_t where)
{
    judge_entry(check, SD_ID_INDEX, where);
}

/* Heap lock: all that the slot names is marked as used. */
static void judge_marks(const sd_check *check, uint32_t slot)
{
    const sd_segment *segment = check->segment;
    uint64_t unmarked = 0;
    for (int b = 0; b < SD_BLOBS; b++)
        for (int i = 0; i < 2; i++) {
            uint64_t extent = sd_load_acquire(&segment->slots[slot].extent[b][i]);
            if (!extent || !sd_extent_valid(segment, extent)) continue;
            uint64_t cell = SD_EXTENT_CELL(extent), cells = sd_cells(SD_EXTENT_BYTES(extent));
            for (uint64_t w = cell / 64; w * 64 < cell + cells; w++)
                unmarked += (uint64_t)__builtin_popcountll(sd_map_bits(w, cell, cells) &
                                                           ~sd_load(&segment->map[w]));
        }
    if (unmarked)
        fault(check, "I2 map", "%llu cells are in use and not marked (slot %u)",
              (unsigned long long)unmarked, slot);
}

static void (*const JUDGE[KINDS])(const sd_check *, uint32_t) = {
    [LISTING] = judge_listing, [UUID_ENTRY] = judge_uuid_entry, [NAME_ENTRY] = judge_name_entry,
    [ID] = judge_id,           [ID_ENTRY] = judge_id_entry,     [MARKS] = judge_marks,
};

static void suspect(sd_check *check, int kind, uint32_t where)
{
    int part = PART_OF_KIND[kind];
    for (int look = 0; look < LOOKS; look++) {
        listen_for_doubts(check);
        JUDGE[kind](check, where);
        report_faults(check);
        if (!check->doubts) return;
    }
    if (check->suspected[part] == SUSPECTS_MAX)
        check->overlooked++;
    else
        check->suspects[part][check->suspected[part]++] = (sd_suspect){kind, where};
}

static void count_and_report(void *context, const char *invariant, const char *what)
{
    sd_check *check = context;
    check->doubts++;
    check->report(check->context, invariant, what);
}

int sd_check_judge(sd_check *check, int part, uint64_t until)
{
    check->doubts = 0;
    check->say = count_and_report;
    check->ear = check;
    while (check->suspected[part]) {
        const sd_suspect *one = &check->suspects[part][--check->suspected[part]];
        JUDGE[one->kind](check, one->where);
        if (sd_now() >= until) break;
    }
    check->proved[part] += check->doubts;
    report_faults(check);
    return check->suspected[part] ? SD_TIMEOUT : SD_OK;
}

/* --- all records, all entries ---------------------------------------------------------------- */

static void check_record(sd_check *check, uint32_t slot)
{
    sd_view view;
    int extents[SD_BLOBS];
    int result = read_record(check->segment, slot, &view, extents);
    unsigned named = check_descriptors(check, slot), counted = 0;
    if (named) suspect(check, MARKS, slot);
    if (!sd_mutex_sound(&check->segment->slots[slot].mutex))
        fault(check, "locks", "slot %u: its lock is damaged", slot);
    if (!sd_count_sound(view.life))
        fault(check, "I1 identity", "slot %u: whether a domain lives in it, and which, is damaged",
              slot);
    else if (result == SD_CORRUPT)
        fault(check, "I3 fields", "slot %u: its fields do not fit their checksum", slot);
    if (result != SD_MISS) { /* damaged fields, too: it says what is wrong with them */
        check->tally.domains++;
        check_values(check, slot, &view);
        counted = check_blobs(check, slot, &view, extents);
        suspect(check, LISTING, slot);
        if (view.values.id >= 0) suspect(check, ID, slot);
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
    if (sd_unsealed(sd_load(&header->next_id)) == UINT64_MAX)
        fault(check, "I4 ids", "the next id is damaged: nobody knows which were not given out");
    if (sd_unsealed(sd_load(&header->settings_choice)) == UINT64_MAX)
        fault(check, "settings", "which of the two counts is damaged");
    if (sd_load(&header->poisoned)) fault(check, "poisoned", "a repair failed");
    return SD_OK;
}

/* From the end of the table to its beginning: an entry that moves while somebody deletes moves the
 * same way, and is seen twice, not missed.  A table that is outgrown meanwhile is left. */
static int check_entries(sd_check *check, uint64_t until)
{
    static const int KIND_OF_ENTRY[] = {UUID_ENTRY, NAME_ENTRY, ID_ENTRY};
    for (; check->index < SD_INDEXES; check->index++, check->mask = UINT64_MAX) {
        sd_probe probe;
        while (sd_probe_begin(check->segment, check->index, 0, &probe) == SD_OK) {
            if (check->mask != probe.mask) {
                check->mask = probe.mask;
                check->entry = probe.mask + 1;
            }
            if (!check->entry) break;
            if (sd_load(&probe.table[--check->entry]))
                suspect(check, KIND_OF_ENTRY[check->index], (uint32_t)check->entry);
            if (is_late(check->entry, until)) return SD_TIMEOUT;
        }
    }
    return SD_OK;
}

int sd_check_records(sd_check *check, uint64_t until)
{
    if (!check->begun && check_header(check) != SD_OK) return SD_CORRUPT;
    check->begun = true;
    while (check->next < check->slots) {
        check_record(check, check->next++);
        if (is_late(check->next, until)) return SD_TIMEOUT;
    }
    return check_entries(check, until);
}

/* --- sums ------------------------------------------------------------------------------------ */

/* A stage goes on from `sum->at` and says whether it came to its end. */
typedef bool (*stage)(sd_check *check, sd_sum *sum, uint64_t until);

static bool count_entries(sd_check *check, sd_sum *sum, uint64_t until, int index)
{
    sd_probe probe;
    if (sd_probe_begin(check->segment, index, 0, &probe) != SD_OK) {
        fault(check, "I5 index", "%s index has an impossible level", INDEX_NAMES[index]);
        sum->broken = true;
        return true;
    }
    while (sum->at <= probe.mask) {
        sum->entries[index] += sd_load(&probe.table[sum->at++]) != 0;
        if (is_late(sum->at, until)) return false;
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
            fault(check, "free list", "leads nowhere or runs in a circle");
            sum->broken = true;
            return true;
        }
        const sd_slot *slot = &segment->slots[sum->at - 1];
        if (sd_load(&slot->life) & 1)
            fault(check, "free list", "slot %llu is on it and lives",
                  (unsigned long long)sum->at - 1);
        sum->at = sd_load(&slot->next_free);
        if (is_late(sum->free_slots, until)) return false;
    }
    return true;
}

static bool count_marks(sd_check *check, sd_sum *sum, uint64_t until)
{
    while (sum->at * 64 < check->committed) {
        sum->cells += (uint64_t)__builtin_popcountll(sd_load(&check->segment->map[sum->at++]));
        if (is_late(sum->at, until)) return false;
    }
    return true;
}

/* Enter an extent into the shadow of the map. */
static void name_cells(sd_check *check, uint32_t slot, uint64_t extent)
{
    uint64_t cell = SD_EXTENT_CELL(extent), end = cell + sd_cells(SD_EXTENT_BYTES(extent));
    /* Reported with its record; or, without the lock, the heap has grown meanwhile. */
    if (!sd_extent_valid(check->segment, extent) || end > check->committed) return;
    for (uint64_t w = cell / 64; w * 64 < end; w++) {
        uint64_t bits = sd_map_bits(w, cell, end - cell), twice = check->named[w] & bits;
        check->named[w] |= bits;
        if (!twice) continue;
        check->again[w] |= twice;
        fault(check, "I2 extents", "slot %u: cell %llu is named twice", slot,
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
        if (is_late(sum->at, until)) return false;
    }
    return true;
}

/* What was seen to be somebody's, or not marked, or named only once is in order for good. */
static bool acquit(sd_check *check, sd_sum *sum, uint64_t until)
{
    while (sum->at * 64 < check->committed) {
        uint64_t w = sum->at++;
        check->ownerless[w] &= sd_load(&check->segment->map[w]) & ~check->named[w];
        check->twice[w] &= check->again[w];
        sum->ownerless += (uint64_t)__builtin_popcountll(check->ownerless[w]);
        sum->twice += (uint64_t)__builtin_popcountll(check->twice[w]);
        if (is_late(sum->at, until)) return false;
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
        fault(check, "I5 index", "%s index has %llu entries for %llu domains", INDEX_NAMES[index],
              (unsigned long long)sum->entries[index], (unsigned long long)domains);
}

/* Where the indexes agree with each other and with every domain, the count is wrong. */
static void compare_listed(const sd_check *check, const sd_sum *sum)
{
    uint64_t live = sd_load(&check->segment->header->live), uuids = sum->entries[SD_UUID_INDEX];
    if (sd_load(&check->segment->header->list_seq) & 1)
        fault(check, "I5 sequence", "the list's sequence is odd");
    if (sum->broken) return;
    if (uuids == sum->entries[SD_NAME_INDEX] && uuids != live && !check->proved[SD_PART_LIST]) {
        fault(check, "counts", "%llu domains are counted, %llu are there",
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
        fault(check, "free list", "%llu free slots and %llu domains in %u slots",
              (unsigned long long)sum->free_slots, (unsigned long long)live, sum->slots);
}

static void compare_ids(const sd_check *check, const sd_sum *sum)
{
    uint64_t active = sd_load(&check->segment->header->active), ids = sum->entries[SD_ID_INDEX];
    if (sd_load(&check->segment->header->id_seq) & 1)
        fault(check, "I5 sequence", "the ids' sequence is odd");
    if (sum->broken || ids == active) return;
    if (check->proved[SD_PART_IDS])
        compare_entries(check, sum, SD_ID_INDEX, active);
    else
        fault(check, "counts", "%llu active domains are counted, %llu are there",
              (unsigned long long)active, (unsigned long long)ids);
}

static void compare_used(const sd_check *check, const sd_sum *sum)
{
    uint64_t used = sd_load(&check->segment->header->heap_used);
    if (used != sum->cells)
        fault(check, "I2 map", "the count of used cells is %llu, they are %llu",
              (unsigned long long)used, (unsigned long long)sum->cells);
}

static void compare_cells(const sd_check *check, const sd_sum *sum)
{
    if (sum->ownerless)
        fault(check, "I2 map", "%llu cells are marked and nobody's",
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
    switch (PART_OF_SUM[sum]) {
    case SD_PART_LIST: return sd_load_acquire(&header->list_seq);
    case SD_PART_IDS: return sd_load_acquire(&header->id_seq);
    default: return sd_load_acquire(&header->heap_turn);
    }
}

/* 0, of which nothing is walked, when that is damaged: it may be since the records were looked
 * at. */
static uint64_t cells_committed(const sd_check *check)
{
    uint64_t cells = sd_unsealed(sd_load_acquire(&check->segment->header->heap_committed));
    return cells <= check->segment->at.heap_cells ? cells : 0;
}

/* Bits for all cells; every walk begins anew if they were too few. */
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
    if (PART_OF_SUM[which] == SD_PART_HEAP) check->committed = cells_committed(check);
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
    if (PART_OF_SUM[which] != SD_PART_HEAP && sum->turn & 1) return false;
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
    listen_for_doubts(check);
    check->doubts = sum->doubts;
    result = go_on(check, which, until);
    sum->doubts = check->doubts;
    report_faults(check);
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
