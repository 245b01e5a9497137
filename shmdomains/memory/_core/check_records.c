/* check_records.c - record by record: what it says of itself, and what makes it suspect.
 *
 * Faults of a record alone are proved by one view of it, without a lock.  What it and an index, or
 * it and the map, say of each other may be moving: it is looked at a few times, and what never
 * looks right is remembered as a suspect, to be judged with the lock of its part held (check.c).
 */
#include "check_records.h"

#include "check_ring.h"
#include "find.h"
#include "mutex.h"
#include "named.h"

#include <stdlib.h>

#define LOOKS 3 /* at a suspect, before it is one */

/* What may be suspected; `where` is a slot, of the entries a place in the table. */
enum { LISTING, UUID_ENTRY, NAME_ENTRY, ID, ID_ENTRY, MARKS, KINDS };

static const int PART_OF_KIND[KINDS] = {
    [LISTING] = SD_PART_LIST, [UUID_ENTRY] = SD_PART_LIST, [NAME_ENTRY] = SD_PART_LIST,
    [ID] = SD_PART_IDS,       [ID_ENTRY] = SD_PART_IDS,    [MARKS] = SD_PART_HEAP,
};

/* --- what a record says of itself ------------------------------------------------------------ */

/* SD_OK, SD_MISS, SD_DOUBT; SD_CORRUPT: no valid extent; SD_MISMATCH: it does not fit its checksum.
 * Without memory for a copy it passes for sound. */
static int read_blob(const sd_segment *segment, uint32_t slot, const sd_view *view, int blob)
{
    sd_stored stored;
    uint64_t sum;
    int result = sd_view_blob(segment, slot, view, blob, &stored);
    if (result != SD_OK) return result;
    uint64_t version = view->values.version[blob];
    unsigned char *copy = malloc(stored.bytes);
    if (!copy) return SD_OK;
    sd_copy_out(copy, stored.at, stored.bytes);
    memcpy(&sum, copy, sizeof sum);
    bool fits = sum == sd_blob_sum(view->uuid, blob, version, copy + 8, stored.bytes - 8);
    free(copy);
    if (fits) return SD_OK;
    return sd_view_check(segment, slot, view) == SD_OK ? SD_MISMATCH : SD_DOUBT;
}

/* One moment of a record, and whether its current blobs are there. */
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
                sd_fault(check, "I2 extents", "slot %u names cells outside of the heap", slot);
        }
    return extents;
}

static unsigned check_blobs(const sd_check *check, uint32_t slot, const sd_view *view,
                            const int extents[SD_BLOBS])
{
    unsigned counted = 0;
    for (int b = 0; b < SD_BLOBS; b++) {
        counted += extents[b] != SD_MISS && !(b == SD_DATA && sd_small_bytes(&view->values));
        if (extents[b] == SD_CORRUPT)
            sd_fault(check, "I2 extents", "slot %u: blob %d counts and has no valid extent", slot,
                     b);
        if (extents[b] == SD_MISMATCH)
            sd_fault(check, "I2 extents", "slot %u: blob %d does not fit its checksum", slot, b);
        if (sd_version_count(view->values.version[b]) > sd_count_value(view->cur))
            sd_fault(check, "I3 fields", "slot %u: blob %d is newer than its record", slot, b);
    }
    if (extents[SD_DEFINITION] == SD_MISS)
        sd_fault(check, "I3 fields", "slot %u has no definition", slot);
    return counted;
}

static void check_values(sd_check *check, uint32_t slot, const sd_view *view)
{
    const sd_values *values = &view->values;
    if (!view->name[0])
        sd_fault(check, "I1 identity",
                 "slot %u has a name of 0 bytes, or name and uuid do not fit their checksum", slot);
    if (!sd_uuid_sound(&check->segment->slots[slot]) &&
        sd_view_check(check->segment, slot, view) == SD_OK)
        sd_fault(check, "I1 identity", "slot %u has a uuid that does not fit its checksum", slot);
    sd_check_event_named(check, slot, values->event);
    if (values->state >= check->states)
        sd_fault(check, "I3 fields", "slot %u has the unknown state %u", slot, values->state);
    if (values->id < 0) return;
    check->tally.active++;
    /* It was stored before the id was used, and is loaded after it. */
    uint64_t next_id = sd_unsealed(sd_load_acquire(&check->segment->header->next_id));
    if ((uint64_t)values->id >= next_id)
        sd_fault(check, "I4 ids", "slot %u has id %d, which was not given out yet", slot,
                 values->id);
}

/* --- suspects -------------------------------------------------------------------------------- */

static void check_found(const sd_check *check, uint32_t slot, const sd_key *key)
{
    uint32_t found = UINT32_MAX;
    const char *index = SD_INDEX_NAMES[key->what];
    int result = sd_find(check->segment, key, &found);
    if (result == SD_OK && found == slot) return;
    if (result == SD_OK)
        sd_fault(check, "I5 index", "%s index leads from the key of slot %u to slot %u", index,
                 slot, found);
    else
        sd_fault(check, "I5 index", "%s index does not lead to slot %u", index, slot);
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

/* List lock, for ids the id lock: the entry at this place, if there is one, leads to a domain.
 * That it is the domain's only entry follows from judging the domain, and from the sum. */
static void judge_entry(const sd_check *check, int index, uint32_t where)
{
    const sd_segment *segment = check->segment;
    sd_probe probe;
    int32_t id;
    if (sd_probe_begin(segment, index, 0, &probe) != SD_OK || where > probe.mask) return;
    uint64_t entry = sd_load_acquire(&probe.table[where]);
    if (!entry) return;
    if (!sd_entry_sound(entry)) {
        sd_fault(check, "I5 index", "%s index has a damaged entry at place %u",
                 SD_INDEX_NAMES[index], where);
        return;
    }
    uint32_t slot = SD_ENTRY_SLOT(entry);
    bool lives = slot < sd_slot_count(segment) &&
                 (index == SD_ID_INDEX ? has_id(segment, slot, &id)
                                       : sd_load_acquire(&segment->slots[slot].life) & 1);
    if (!lives)
        sd_fault(check, "I5 index", "%s index has an entry of slot %u, which has no such domain",
                 SD_INDEX_NAMES[index], slot);
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
        sd_fault(check, "I2 map", "%llu cells are in use and not marked (slot %u)",
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
        sd_check_listen(check);
        JUDGE[kind](check, where);
        sd_check_speak(check);
        if (!check->doubts) return;
    }
    if (check->suspected[part] == SD_SUSPECTS_MAX)
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
    check->emit = count_and_report;
    check->emit_context = check;
    while (check->suspected[part]) {
        const sd_suspect *one = &check->suspects[part][--check->suspected[part]];
        JUDGE[one->kind](check, one->where);
        if (sd_now() >= until) break;
    }
    check->proved[part] += check->doubts;
    sd_check_speak(check);
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
        sd_fault(check, "locks", "slot %u: its lock is damaged", slot);
    if (!sd_count_sound(view.life))
        sd_fault(check, "I1 identity",
                 "slot %u: whether a domain lives in it, and which, is damaged", slot);
    else if (result == SD_CORRUPT)
        sd_fault(check, "I3 fields", "slot %u: its fields do not fit their checksum", slot);
    if (result != SD_MISS) { /* damaged fields as well: the rest may be wrong, too */
        check->tally.domains++;
        check_values(check, slot, &view);
        counted = check_blobs(check, slot, &view, extents);
        suspect(check, LISTING, slot);
        if (view.values.id >= 0) suspect(check, ID, slot);
    }
    if (named > counted) check->tally.garbage += named - counted;
}

/* A free lock is signed by nobody.  A thread that has ended signs nothing more, and the mutex that it
 * died with is not free before its signature is gone; so this is no passing state. */
static void check_signature(const sd_check *check, unsigned place)
{
    const sd_named *at = &check->segment->named[place];
    uint64_t who = sd_load_acquire(&at->owner.who);
    if (!who || sd_alive(who) || sd_mutex_busy(&at->mutex)) return;
    atomic_thread_fence(memory_order_acquire);
    if (sd_load(&at->owner.who) == who)
        sd_fault(check, "named locks", "place %u: it is free, and signed by a thread that ended",
                 place);
}

/* From the last to the first: places are taken from the first on, meanwhile, too. */
static void check_named(const sd_check *check)
{
    const sd_segment *segment = check->segment;
    sd_lock_name name;
    bool taken = false;
    for (unsigned i = SD_NAMED_MAX, first; i-- > 0;) {
        int result = sd_named_get(segment, i, &name);
        if (!sd_mutex_sound(&segment->named[i].mutex))
            sd_fault(check, "locks", "named lock at place %u: it is damaged", i);
        if (result == SD_CORRUPT)
            sd_fault(check, "named locks", "place %u: its name does not fit its checksum", i);
        if (result == SD_OK && sd_named_find(segment, &name, &first) == SD_OK && first != i)
            sd_fault(check, "named locks", "places %u and %u have one name", first, i);
        if (result == SD_MISS && taken)
            sd_fault(check, "named locks", "place %u has no name, and one after it has", i);
        taken |= result != SD_MISS;
        check_signature(check, i);
    }
}

static int check_header(sd_check *check)
{
    const sd_segment *segment = check->segment;
    const sd_header *header = segment->header;
    if (sd_unsealed(sd_load_acquire(&header->heap_committed)) > segment->at.heap_cells) {
        sd_fault(check, "heap", "its watermark lies behind its end");
        return SD_CORRUPT;
    }
    if (sd_slots(segment, &check->slots) != SD_OK)
        sd_fault(check, "counts", "the number of slots or its watermark is damaged");
    check->tally.slots = check->slots;
    if (!sd_mutex_sound(&header->list_mutex) || !sd_mutex_sound(&header->id_mutex) ||
        !sd_mutex_sound(&header->heap_mutex))
        sd_fault(check, "locks", "the list's, the ids' or the heap's lock is damaged");
    check_named(check);
    if (sd_unsealed(sd_load(&header->next_id)) == UINT64_MAX)
        sd_fault(check, "I4 ids", "the next id is damaged: nobody knows which were not given out");
    if (sd_unsealed(sd_load(&header->settings_choice)) == UINT64_MAX)
        sd_fault(check, "settings", "which of the two counts is damaged");
    if (sd_load(&header->poisoned)) sd_fault(check, "poisoned", "a repair failed");
    return SD_OK;
}

/* From the end of the table to its beginning: an entry that a delete moves back moves the same way,
 * and is seen twice, not missed.  When the table has grown the look begins again in the new one. */
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
            if (sd_check_late(check->entry, until)) return SD_TIMEOUT;
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
        if (sd_check_late(check->next, until)) return SD_TIMEOUT;
    }
    return check_entries(check, until);
}
