/* fields.c - what a record says: values, name, blobs.
 *
 * Everything a holder changes is double-buffered.  It writes the spare name, spare extents and,
 * last, the spare copy of the fields, which chooses among them; then one store of `cur` makes the
 * copy current, and with it all that it chose.  So a holder that dies leaves the old record or the
 * new one, and garbage in what is spare (I1, I3).
 *
 * Every part is checked by its checksum before it is believed (layout.h, "Damage").
 *
 * A view is a record read without a lock, as under a seqlock: load life and cur, copy the fields,
 * load both again.  Blobs are copied after that, and checked by life and version (I3).
 */
#include "fields.h"

/* --- values ---------------------------------------------------------------------------------- */

static inline uint64_t rotated(uint64_t word, int by)
{
    return word << by | word >> (64 - by);
}

/* One flipped bit of the input flips one bit of the sum, so it never goes unseen.  Written out: the
 * compiler leaves a loop of rotations a loop, which is a tenth of a find. */
static inline uint64_t sum_of_fields(uint64_t cur, uint64_t ids, uint64_t status,
                                     const sd_values *values)
{
    const uint64_t *version = values->version;
    uint64_t sum = sd_count_value(cur) ^ rotated(ids, 5) ^ rotated(status, 11);
    sum ^= rotated(version[0], 17) ^ rotated(version[1], 34) ^ rotated(version[2], 51);
    sum ^= rotated(version[3], 4) ^ rotated(values->event, 23) ^ rotated(values->started, 37);
    sum ^= sum >> 2 * SD_SUM_BITS ^ sum >> 4 * SD_SUM_BITS;
    return (sum ^ sum >> SD_SUM_BITS) & ((1u << SD_SUM_BITS) - 1);
}

static inline const sd_fields *copy_of(const sd_slot *slot, uint64_t cur)
{
    return (cur & 1) ? &slot->copy1 : &slot->copy0;
}

/* False: they are damaged, or being written. */
static bool read_fields(const sd_slot *record, uint64_t cur, sd_values *values)
{
    const sd_fields *from = copy_of(record, cur);
    uint64_t ids = sd_load(&from->ids), status = sd_load(&from->status);
    values->id = (int32_t)(uint32_t)ids;
    values->pid = (int32_t)(uint32_t)(ids >> 32);
    values->state = (uint16_t)status;
    values->reason = (uint16_t)(status >> 16);
    uint64_t sum = status >> SD_SUM_SHIFT;
    status &= (1ull << SD_SUM_SHIFT) - 1;
    values->flags = status & ~0xffffffffull;
    values->version[0] = sd_load(&from->version[0]);
    values->version[1] = sd_load(&from->version[1]);
    values->version[2] = sd_load(&from->version[2]);
    values->version[3] = sd_load(&from->version[3]);
    values->event = sd_load(&from->event);
    values->started = sd_load(&from->started);
    return sum == sum_of_fields(cur, ids, status, values) && sd_count_sound(cur);
}

/* `cur`: the one that will make them current. */
static void write_fields(sd_fields *to, const sd_values *values, uint64_t cur)
{
    uint64_t ids = (uint32_t)values->id | (uint64_t)(uint32_t)values->pid << 32;
    uint64_t status = values->state | (uint64_t)values->reason << 16 | values->flags;
    sd_store(&to->ids, ids);
    sd_store(&to->status,
             status | sum_of_fields(cur, ids, status, values) << SD_SUM_SHIFT);
    for (int b = 0; b < SD_BLOBS; b++) sd_store(&to->version[b], values->version[b]);
    sd_store(&to->event, values->event);
    sd_store(&to->started, values->started);
}

int sd_values_get(const sd_segment *segment, uint32_t slot, sd_values *values)
{
    const sd_slot *record = &segment->slots[slot];
    return read_fields(record, sd_load(&record->cur), values) ? SD_OK : SD_CORRUPT;
}

int sd_values_settled(const sd_segment *segment, uint32_t slot, sd_values *values)
{
    const sd_slot *record = &segment->slots[slot];
    for (;;) {
        uint64_t cur = sd_load_acquire(&record->cur);
        bool sound = read_fields(record, cur, values);
        atomic_thread_fence(memory_order_acquire);
        if (sd_load(&record->cur) == cur) return sound ? SD_OK : SD_CORRUPT;
    }
}

void sd_values_flip(sd_slot *record, const sd_values *values)
{
    uint64_t cur = sd_load(&record->cur);
    uint64_t next = sd_count_seal(sd_count_value(cur) + 1);
    write_fields(cur & 1 ? &record->copy0 : &record->copy1, values, next);
    sd_publish(&record->cur, next);
}

/* --- name and uuid --------------------------------------------------------------------------- */

static uint32_t sum_of_identity(const sd_segment *segment, const uint64_t uuid[2],
                                const unsigned char *name)
{
    return (uint32_t)(sd_hash_uuid(segment, uuid) ^ sd_hash_name(segment, name + 1, name[0]));
}

void sd_name_get(const sd_segment *segment, uint32_t slot, uint64_t flags, unsigned char *name)
{
    const sd_slot *record = &segment->slots[slot];
    const sd_word *from = segment->names[slot].word[(flags & SD_FLAG_NAME) != 0];
    uint64_t uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    uint64_t first = sd_load(from);
    uint32_t sum = (uint32_t)first;
    first >>= 8 * SD_NAME_AT;
    memcpy(name, &first, 8 - SD_NAME_AT);
    if (name[0] > SD_NAME_MAX) name[0] = 0;
    for (unsigned at = 8 - SD_NAME_AT; at <= name[0]; at += 8) {
        const uint64_t word = sd_load(++from);
        memcpy(name + at, &word, 8);
    }
    if (name[0] && sum != sum_of_identity(segment, uuid, name)) name[0] = 0;
}

void sd_name_set(sd_segment *segment, uint32_t slot, const uint64_t uuid[2], sd_values *values,
                 const unsigned char *name)
{
    uint64_t first = sd_bytes(name, name[0] < 3 ? name[0] + 1u : 4u);
    uint32_t sum = sum_of_identity(segment, uuid, name);
    values->flags ^= SD_FLAG_NAME;
    sd_word *to = segment->names[slot].word[(values->flags & SD_FLAG_NAME) != 0];
    sd_store(to, sum | first << 8 * SD_NAME_AT);
    if (name[0] > 3) sd_copy_in(to + 1, name + 4, name[0] - 3u);
}

bool sd_uuid_sound(const sd_slot *record)
{
    uint64_t uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    return (sd_load(&record->sum_and_pid) & ~0xffffffffull) == sd_uuid_sum(uuid);
}

/* --- blobs ----------------------------------------------------------------------------------- */

sd_word *sd_small_at(const sd_segment *segment, uint32_t slot, uint64_t flags)
{
    sd_word *spare = segment->names[slot].word[!(flags & SD_FLAG_NAME)];
    return spare + SD_SMALL_WORDS * sd_choice(flags, SD_DATA);
}

int sd_blob_get(const sd_segment *segment, uint32_t slot, const sd_values *values, int blob,
                sd_stored *stored)
{
    const uint64_t flags = values->flags, small = sd_small_bytes(values);
    if (blob == SD_DATA && small) {
        *stored = (sd_stored){sd_small_at(segment, slot, flags), small + 8};
        return small <= SD_SMALL_MAX ? SD_OK : SD_CORRUPT;
    }
    const sd_slot *record = &segment->slots[slot];
    uint64_t extent = sd_load(&record->extent[sd_place(flags, blob)][sd_choice(flags, blob)]);
    *stored = (sd_stored){sd_extent_at(segment, extent), SD_EXTENT_BYTES(extent)};
    return sd_extent_valid(segment, extent) && stored->bytes > 8 ? SD_OK : SD_CORRUPT;
}

/* --- views ----------------------------------------------------------------------------------- */

int sd_view_fields(const sd_segment *segment, uint32_t slot, sd_view *view)
{
    const sd_slot *record = &segment->slots[slot];
    view->life = sd_load_acquire(&record->life);
    view->cur = sd_load_acquire(&record->cur);
    bool sound = sd_count_sound(view->life);
    if (sound && !(view->life & 1)) return SD_MISS;
    view->uuid[0] = sd_load(&record->uuid[0]);
    view->uuid[1] = sd_load(&record->uuid[1]);
    sound &= read_fields(record, view->cur, &view->values);
    if (sd_view_check(segment, slot, view) != SD_OK) return SD_DOUBT;
    return sound ? SD_OK : SD_CORRUPT;
}

int sd_view_begin(const sd_segment *segment, uint32_t slot, sd_view *view)
{
    int result = sd_view_fields(segment, slot, view);
    if (result != SD_OK && result != SD_CORRUPT) return result;
    sd_name_get(segment, slot, view->values.flags, view->name);
    return sd_view_check(segment, slot, view) == SD_OK ? result : SD_DOUBT;
}

int sd_view_blob(const sd_segment *segment, uint32_t slot, const sd_view *view, int blob,
                 sd_stored *stored)
{
    if (!(view->values.flags & SD_FLAG_PRESENT(blob))) return SD_MISS;
    if (sd_blob_get(segment, slot, &view->values, blob, stored) == SD_OK) return SD_OK;
    return sd_view_check(segment, slot, view) == SD_OK ? SD_CORRUPT : SD_DOUBT;
}

int sd_view_check(const sd_segment *segment, uint32_t slot, const sd_view *view)
{
    const sd_slot *record = &segment->slots[slot];
    atomic_thread_fence(memory_order_acquire);
    return sd_load(&record->life) == view->life && sd_load(&record->cur) == view->cur ? SD_OK
                                                                                     : SD_DOUBT;
}

/* A current blob, small data too, is not overwritten before a commit with another version of it, or
 * the end of this life.  So what was copied is whole, and belongs to the view, if neither has come
 * by now, however many other commits have.  (Asking for the same `cur` would be right as well, but each change of
 * state would send the reader back.) */
int sd_view_blobs_check(const sd_segment *segment, uint32_t slot, const sd_view *view)
{
    const sd_slot *record = &segment->slots[slot];
    sd_values now;
    atomic_thread_fence(memory_order_acquire);
    if (sd_values_settled(segment, slot, &now) != SD_OK) return sd_view_check(segment, slot, view);
    for (int b = 0; b < SD_BLOBS; b++)
        if (now.version[b] != view->values.version[b]) return SD_DOUBT;
    return sd_load(&record->life) == view->life ? SD_OK : SD_DOUBT;
}
