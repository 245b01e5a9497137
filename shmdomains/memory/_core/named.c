/* named.c - locks that belong to no domain, found by their names.
 *
 * A name leads to one of 64 places, for as long as the segment lives.  Readers take no lock: a place
 * whose `taken` fits its name will never change.  Who gives a name holds the id lock, a short one
 * that every process of either kind of list may take, and looks again under it, so that of all who
 * come with the same new name one gives it a place and the others find it.  A death under the id
 * lock has the next holder rebuild the id index, which is needless here, and harmless.
 *
 * The lock itself is a slot's without a record: a robust mutex, also in lists with multiprocessing
 * locks, so that strangers may take it.  The death of a holder is told to the next one to whom the
 * lock is given; nothing is there to be repaired.
 */
#include "named.h"

#include "mutex.h"
#include "unlock_for.h"

/* In a sealed word, and never 0. */
static uint64_t sum_of(const sd_lock_name *name)
{
    uint64_t h = SD_MAGIC;
    for (size_t i = 0; i < sizeof name->text; i += 8) {
        h = (h ^ sd_bytes(name->text + i, 8)) * 0x9e3779b97f4a7c15ull;
        h ^= h >> 32;
    }
    return sd_seal(h | 1);
}

static int read_name(const sd_named *at, uint64_t taken, sd_lock_name *name)
{
    if (!taken) return SD_MISS;
    sd_copy_out(name->text, at->name, sizeof name->text);
    return taken == sum_of(name) && name->text[0] && name->text[0] <= SD_NAMED_NAME_MAX
               ? SD_OK
               : SD_CORRUPT;
}

int sd_named_get(const sd_segment *segment, unsigned place, sd_lock_name *name)
{
    const sd_named *at = &segment->named[place];
    return read_name(at, sd_load_acquire(&at->taken), name);
}

int sd_named_find(const sd_segment *segment, const sd_lock_name *name, unsigned *place)
{
    uint64_t wanted = sum_of(name);
    sd_lock_name there;
    bool damaged = false;
    for (unsigned i = 0; i < SD_NAMED_MAX; i++) {
        const sd_named *at = &segment->named[i];
        uint64_t taken = sd_load_acquire(&at->taken);
        if (!taken) break;
        int result = read_name(at, taken, &there);
        damaged |= result == SD_CORRUPT;
        if (taken != wanted || result != SD_OK) continue;
        if (memcmp(there.text, name->text, sizeof there.text)) continue;
        *place = i;
        return SD_OK;
    }
    return damaged ? SD_CORRUPT : SD_MISS;
}

/* Id lock held. */
static int give(sd_segment *segment, const sd_lock_name *name, unsigned *place)
{
    int result = sd_named_find(segment, name, place);
    if (result != SD_MISS) return result;
    for (unsigned i = 0; i < SD_NAMED_MAX; i++) {
        sd_named *at = &segment->named[i];
        if (sd_load(&at->taken)) continue;
        sd_copy_in(at->name, name->text, sizeof name->text);
        sd_publish(&at->taken, sum_of(name));
        *place = i;
        return SD_OK;
    }
    return SD_FULL;
}

int sd_named_give(sd_segment *segment, const sd_lock_name *name, unsigned *place,
                  uint64_t deadline)
{
    int result = sd_named_find(segment, name, place);
    if (result != SD_MISS) return result;
    result = sd_ids_lock(segment, deadline);
    if (result != SD_OK) return result;
    result = give(segment, name, place);
    sd_ids_unlock(segment);
    return result;
}

/* As sd_recover_slot(): an empty signature means that the holder had not signed, or that a recoverer
 * got so far before it died itself. */
static void recover(sd_segment *segment, sd_named *at)
{
    uint64_t who = sd_load(&at->owner.who), pid = sd_owner_pid(&at->owner, who);
    uint64_t victim = who ? who : SD_DIED_UNKNOWN;
    sd_note_death(segment, who, pid);
    for (int w = 0; w < SD_WHY_WORDS; w++)
        if (sd_load(&at->why[w])) sd_store(&at->why[w], 0);
    if (who ? sd_load(&at->died_who) != who : !sd_load(&at->died_who)) {
        if (!who) pid = 0;
        sd_store(&at->died_pid, (uint32_t)pid | sd_named_died_sum(victim, pid));
        sd_publish(&at->died_who, victim);
    }
    sd_publish(&at->owner.who, 0);
}

static int mutex_locked(sd_segment *segment, unsigned place, int locked)
{
    sd_named *at = &segment->named[place];
    if (locked != SD_OK && locked != SD_DIED) return locked;
    if (locked == SD_DIED) {
        recover(segment, at);
        sd_mutex_consistent(&at->mutex);
    }
    if (sd_poisoned(segment)) {
        sd_mutex_unlock(&at->mutex);
        return SD_POISONED;
    }
    sd_sign(&at->owner);
    segment->held++;
    sd_self()->held++;
    sd_count(&segment->counters->acquired);
    return SD_OK;
}

int sd_named_lock(sd_segment *segment, unsigned place, uint64_t deadline)
{
    sd_named *at = &segment->named[place];
    return mutex_locked(segment, place, sd_mutex_lock(&at->mutex, &at->owner, deadline));
}

int sd_named_wait(sd_segment *segment, unsigned place, uint64_t deadline)
{
    sd_named *at = &segment->named[place];
    return mutex_locked(segment, place, sd_mutex_wait(&at->mutex, &at->owner, deadline));
}

void sd_named_unlock(sd_segment *segment, unsigned place, bool delivered)
{
    sd_named *at = &segment->named[place];
    if (delivered && sd_load(&at->died_who)) sd_publish(&at->died_who, 0);
    if (sd_load(&at->why[0])) sd_store(&at->why[0], 0);
    segment->held--;
    sd_self()->held--;
    sd_publish(&at->owner.who, 0);
    sd_mutex_unlock(&at->mutex);
}

int sd_named_unlock_for(sd_segment *segment, unsigned place, sd_thread *holder, uint64_t nonce)
{
    sd_named *at = &segment->named[place];
    int result = sd_mutex_take_off_for(&at->mutex, holder, nonce);
    if (result != SD_OK) return result;
    if (sd_load(&at->why[0])) sd_store(&at->why[0], 0);
    segment->held--;
    holder->held--;
    sd_publish(&at->owner.who, 0);
    sd_mutex_release_for(&at->mutex, holder);
    return SD_OK;
}

int sd_named_died(const sd_segment *segment, unsigned place, uint64_t *who, uint64_t *pid)
{
    const sd_named *at = &segment->named[place];
    uint64_t word = sd_load(&at->died_pid);
    *who = sd_load(&at->died_who);
    *pid = (uint32_t)word;
    return !*who || word >> 32 << 32 == sd_named_died_sum(*who, *pid) ? SD_OK : SD_CORRUPT;
}

/* `why` ends at its first 0, so the first word is stored last. */
void sd_named_explain(sd_segment *segment, unsigned place, const char *why, size_t bytes)
{
    sd_word *to = segment->named[place].why;
    unsigned char text[SD_WHY_WORDS * 8] = {0};
    if (bytes > sizeof text) {
        bytes = sizeof text;
        while (bytes && ((unsigned char)why[bytes] & 0xc0) == 0x80) bytes--;
    }
    memcpy(text, why, bytes);
    sd_copy_in(to + 1, text + 8, sizeof text - 8);
    sd_publish(to, sd_bytes(text, 8));
}
