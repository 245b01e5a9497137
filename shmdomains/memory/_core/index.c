/* index.c - UUID, name and id -> slot.
 *
 * Open addressing, linear probing, one 64-bit word an entry:
 *
 *     check (8 bits) << 56 | hash (32 bits) << 24 | slot + 1        0: empty
 *
 * The hash carries the home position (its low bits) and rejects nearly every other key without a
 * look at the slot; growing and deleting need no look at the slots either.  The check is of the
 * entry's other bits: each flipped bit of an entry, or of an empty place, is seen, and no entry
 * becomes an empty place by one.  A probe that passes a damaged entry is no miss but SD_CORRUPT:
 * that might be the key's.  Whoever moves entries gives up when there is one, and it is rebuilt.  Deletion shifts later
 * entries back instead of leaving tombstones, so tables never wear out.  That moves entries while
 * lock-free readers probe, which the sequence covers: a hit is verified under the slot's lock, a
 * miss is believed only if the sequence was even and unchanged (I5).
 *
 * Tables grow by doubling.  Table k lies at a fixed place.  It is committed, zeroed and filled
 * while the sequence is odd, then one store of `level` makes it current.  Old tables stay: a late
 * reader may still be in one, where it verifies hits and doubts misses.
 */
#include "index.h"

#define HASH_BITS 32
#define HASH_MASK ((1ull << HASH_BITS) - 1)
#define SLOT_BITS 24
#define CHECK_AT (SLOT_BITS + HASH_BITS)

_Static_assert(SD_INDEX_BITS + SD_INDEX_LEVELS - 1 <= HASH_BITS, "a hash has the home position");

static inline uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t h = (a ^ (b << 32 | b >> 32)) * 0x9e3779b97f4a7c15ull;
    h ^= h >> 32;
    h = (h + b) * 0xd6e8feb86659fd93ull;
    h ^= h >> 32;
    return h;
}

static inline uint64_t finish(uint64_t h)
{
    h *= 0xd6e8feb86659fd93ull;
    return (h ^ h >> 32) & HASH_MASK;
}

uint64_t sd_hash_uuid(const sd_segment *segment, const uint64_t uuid[2])
{
    return finish(mix(uuid[0] ^ segment->seed, uuid[1]));
}

uint64_t sd_hash_name(const sd_segment *segment, const unsigned char *name, size_t bytes)
{
    uint64_t h = segment->seed ^ bytes;
    for (; bytes; name += 8) {
        uint64_t word = 0;
        size_t n = bytes < 8 ? bytes : 8;
        memcpy(&word, name, n);
        h = mix(h, word);
        bytes -= n;
    }
    return finish(h);
}

uint64_t sd_hash_id(const sd_segment *segment, int32_t id)
{
    return finish(mix(segment->seed, (uint32_t)id));
}

/* The top of a product, of all but the check itself.  A flipped bit i changes the product by the
 * factor << i + 8; no 8 bits of the factor in a row are all 0 or all 1, nor are those that are left
 * of it at its end, so the top changes, whatever is carried. */
static inline uint64_t check_of(uint64_t entry)
{
    return (entry << (64 - CHECK_AT)) * 0x9e3779b97f4a7c15ull >> CHECK_AT;
}

static inline bool is_sound(uint64_t entry)
{
    return check_of(entry) == entry >> CHECK_AT;
}

static inline uint64_t hash_of(uint64_t entry)
{
    return entry >> SLOT_BITS & HASH_MASK;
}

static inline uint64_t entry_of(uint64_t hash, uint32_t slot)
{
    uint64_t entry = hash << SLOT_BITS | (slot + 1);
    return entry | check_of(entry) << CHECK_AT;
}

sd_word *sd_index_sequence(sd_segment *segment, int index)
{
    return index == SD_ID_INDEX ? &segment->header->id_seq : &segment->header->list_seq;
}

static sd_word *level_of(const sd_segment *segment, int index)
{
    return index == SD_ID_INDEX ? &segment->header->id_level : &segment->header->list_level[index];
}

static sd_word *count_of(const sd_segment *segment, int index)
{
    return index == SD_ID_INDEX ? &segment->header->active : &segment->header->live;
}

void sd_sequence_begin(sd_word *sequence)
{
    sd_publish(sequence, sd_load(sequence) | 1);
}

void sd_sequence_end(sd_word *sequence)
{
    sd_publish(sequence, sd_load(sequence) + 1);
}

/* The current table.  SD_CORRUPT if the level is impossible. */
static int current(const sd_segment *segment, int index, sd_word **table, uint64_t *mask)
{
    uint64_t level = sd_unsealed(sd_load_acquire(level_of(segment, index)));
    if (level >= segment->at.levels) return SD_CORRUPT;
    *table = segment->table[index][level];
    *mask = (1ull << (SD_INDEX_BITS + level)) - 1;
    return SD_OK;
}

int sd_probe_begin(const sd_segment *segment, int index, uint64_t hash, sd_probe *probe)
{
    sd_word *table;
    int result = current(segment, index, &table, &probe->mask);
    if (result != SD_OK) return result;
    probe->table = table;
    probe->at = hash & probe->mask;
    probe->left = probe->mask + 1;
    probe->tag = hash;
    probe->damaged = false;
    return SD_OK;
}

int sd_probe_next(const sd_segment *segment, sd_probe *probe, uint32_t *slot)
{
    for (; probe->left; probe->left--) {
        uint64_t entry = sd_load_acquire(&probe->table[probe->at]);
        probe->at = (probe->at + 1) & probe->mask;
        if (!entry) break;
        if (hash_of(entry) != probe->tag) {
            probe->damaged |= !is_sound(entry);
            continue;
        }
        /* An entry is stored after its slot is counted; a larger number is damage. */
        *slot = SD_ENTRY_SLOT(entry);
        if (*slot >= sd_slot_count(segment)) {
            probe->damaged = true;
            continue;
        }
        probe->left--;
        return SD_OK;
    }
    return probe->damaged ? SD_CORRUPT : SD_MISS;
}

void sd_probe_in_vain(sd_probe *probe)
{
    probe->damaged |= !is_sound(sd_load(&probe->table[(probe->at - 1) & probe->mask]));
}

bool sd_entry_sound(uint64_t entry)
{
    return is_sound(entry);
}

static int put(sd_word *table, uint64_t mask, uint64_t entry)
{
    uint64_t at = hash_of(entry) & mask;
    for (uint64_t left = mask + 1; left; left--, at = (at + 1) & mask) {
        if (sd_load(&table[at])) continue;
        sd_publish(&table[at], entry);
        return SD_OK;
    }
    return SD_CORRUPT;
}

int sd_index_insert(sd_segment *segment, int index, uint64_t hash, uint32_t slot)
{
    sd_word *table;
    uint64_t mask;
    int result = current(segment, index, &table, &mask);
    return result == SD_OK ? put(table, mask, entry_of(hash, slot)) : result;
}

/* Close the gap at `hole`: move back each later entry of the run whose home does not lie behind the
 * hole.  Each is copied before it is overwritten, so no entry is ever out of the table. */
static int shift_back(sd_word *table, uint64_t mask, uint64_t hole)
{
    uint64_t at = hole;
    for (uint64_t left = mask; left; left--) {
        at = (at + 1) & mask;
        uint64_t entry = sd_load(&table[at]);
        if (!entry) break;
        if (!is_sound(entry)) return SD_CORRUPT;
        uint64_t home = hash_of(entry) & mask;
        if (((at - home) & mask) < ((at - hole) & mask)) continue;
        sd_publish(&table[hole], entry);
        hole = at;
    }
    sd_publish(&table[hole], 0);
    return SD_OK;
}

int sd_index_delete(sd_segment *segment, int index, uint64_t hash, uint32_t slot)
{
    sd_word *table;
    uint64_t mask, entry = entry_of(hash, slot);
    int result = current(segment, index, &table, &mask);
    if (result != SD_OK) return result;
    uint64_t at = hash & mask;
    for (uint64_t left = mask + 1; left; left--, at = (at + 1) & mask) {
        uint64_t found = sd_load(&table[at]);
        if (!found) return SD_CORRUPT;
        if (found != entry) continue;
        return shift_back(table, mask, at);
    }
    return SD_CORRUPT;
}

int sd_index_clear(sd_segment *segment, int index)
{
    sd_word *table;
    uint64_t mask;
    int result = current(segment, index, &table, &mask);
    if (result != SD_OK) return result;
    for (uint64_t i = 0; i <= mask; i++)
        if (sd_load(&table[i])) sd_store(&table[i], 0);
    return SD_OK;
}

static int grow(sd_segment *segment, int index, const sd_word *table, uint64_t mask)
{
    sd_word *level = level_of(segment, index), *sequence = sd_index_sequence(segment, index);
    uint64_t next = sd_unsealed(sd_load(level)) + 1, wider = mask * 2 + 1;
    if (next >= segment->at.levels) return SD_FULL;
    int result = sd_commit_memory(segment, segment->at.table[index][next], (wider + 1) * 8);
    if (result != SD_OK) return result;
    for (uint64_t i = 0; i <= mask; i++)
        if (!is_sound(sd_load(&table[i]))) return SD_CORRUPT;
    sd_word *target = segment->table[index][next];
    sd_sequence_begin(sequence);
    /* An earlier grower may have died and left entries here. */
    for (uint64_t i = 0; i <= wider; i++)
        if (sd_load(&target[i])) sd_store(&target[i], 0);
    for (uint64_t i = 0; i <= mask; i++) {
        uint64_t entry = sd_load(&table[i]);
        if (entry) put(target, wider, entry);
    }
    sd_publish(level, sd_seal(next));
    sd_sequence_end(sequence);
    return SD_OK;
}

int sd_index_reserve(sd_segment *segment, int index)
{
    sd_word *table;
    uint64_t mask;
    int result = current(segment, index, &table, &mask);
    if (result != SD_OK) return result;
    uint64_t count = sd_load(count_of(segment, index));
    if (count > sd_slot_count(segment)) return SD_CORRUPT; /* more than there are slots */
    if ((count + 1) * 2 <= mask + 1) return SD_OK;
    return grow(segment, index, table, mask);
}
