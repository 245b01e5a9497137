/* locks.c - the segment's locks, and what their next holder repairs.
 *
 *   short locks   id lock and heap lock: held by the core alone, for moments
 *   slot lock     one domain; the user's
 *   list lock     which domains there are; the user's
 *
 * To enter a lock: take the mutex, repair what a dead holder left, make the mutex consistent.  To
 * leave: unlock.  Slot and list lock have an owner record, which the holder signs and clears; a
 * slot's is signed after the repair, the list's before it.  The repairs:
 *
 *   id, heap      rebuild the index, or the map
 *   slot          nothing is wrong with the record: remember the death, free the garbage
 *   list          rebuild both indexes, and free the garbage in FREE slots, where nobody else looks
 *
 * A repair allocates nothing and can be cut off anywhere and begun again.  One that is put off sets
 * the lock's dirty word, and the next holder does it.  If one fails the segment is poisoned, and
 * nobody enters any more.
 *
 * Garbage is what a descriptor names and the current fields do not choose.
 */
#define _GNU_SOURCE
#include "locks.h"

#include "fields.h"
#include "mutex.h"
#include "rebuild.h"
#include "ring.h"
#include "unlock_for.h"

#include <errno.h>

/* --- owner records --------------------------------------------------------------------------- */

static inline void sign(sd_owner *owner, const sd_thread *self)
{
    sd_store(&owner->pid, self->pid | self->who << 32);
    sd_store(&owner->since, sd_now_coarse());
    sd_publish(&owner->who, self->who);
}

void sd_sign(sd_owner *owner)
{
    sign(owner, sd_self());
}

/* lock="multiprocessing".  Whoever's name is in `who` has the lock, whatever the semaphore says;
 * tests/model/semaphore.py has every interleaving of it.  A death leaves `who` empty, and the lock
 * free, or it leaves a name, and sd_take_over() asks whether that thread lives.
 *
 * The semaphore keeps those who wait asleep, and its value is a hint.  It should be 1 while the
 * lock is free.  A death after me -> 0 and before the post, or between the wait and 0 -> me, leaves
 * it 0: then who waits finds the empty name at the end of its slice, and its unlock posts again.
 * Who takes the lock without a token - over, or from between those two - leaves one too many:
 * that wakes somebody for nothing, and is used up by it. */
static bool exchange(sd_owner *owner, uint64_t from, uint64_t to)
{
    sd_crash_point();
    return atomic_compare_exchange_strong(&owner->who, &from, to);
}

bool sd_take_over(sd_owner *owner, uint64_t dead)
{
    const sd_thread *self = sd_self();
    if (!exchange(owner, dead, self->who)) return false;
    sign(owner, self);
    return true;
}

int sd_semaphore_try(sem_t *semaphore, sd_owner *owner)
{
    while (sem_trywait(semaphore) && errno == EINTR) {}
    return sd_take_over(owner, 0) ? SD_OK : SD_TIMEOUT;
}

int sd_semaphore_slice(sem_t *semaphore, sd_owner *owner, uint64_t deadline)
{
    struct timespec at = sd_slice_end(deadline);
    sem_clockwait(semaphore, CLOCK_MONOTONIC, &at); /* woken or not: the name decides */
    return sd_take_over(owner, 0) ? SD_OK : SD_TIMEOUT;
}

bool sd_semaphore_leave(sem_t *semaphore, sd_owner *owner, uint64_t who)
{
    int value = 0;
    if (!exchange(owner, who, 0)) return false;
    sd_crash_point();
    if (sem_getvalue(semaphore, &value) || value <= 0) sem_post(semaphore);
    return true;
}

void sd_note_death(sd_segment *segment, uint64_t who, uint64_t pid)
{
    sd_repair *repair = &sd_self()->repair;
    repair->died = true;
    repair->who = who;
    repair->pid = pid;
    sd_count(&segment->counters->deaths);
}

static void note_repair(sd_segment *segment)
{
    sd_self()->repair.repaired = true;
    sd_count(&segment->counters->recoveries);
}

/* --- the core's own short locks -------------------------------------------------------------- */

/* Enter a short lock: rebuild if its holder died or a repair was put off.  If that fails, unlock;
 * the mutex is made consistent all the same. */
static int entered_short(sd_segment *segment, pthread_mutex_t *mutex, sd_word *dirty, int locked,
                         int (*rebuild)(sd_segment *))
{
    if (locked != SD_OK && locked != SD_DIED) return locked;
    int result = SD_OK;
    if (locked == SD_DIED) sd_note_death(segment, 0, 0);
    if (locked == SD_DIED || sd_load(dirty)) {
        sd_store(dirty, 1);
        if (rebuild(segment) == SD_OK) {
            sd_publish(dirty, 0);
            note_repair(segment);
        } else {
            result = SD_POISONED;
        }
    }
    if (result == SD_OK && sd_poisoned(segment)) result = SD_POISONED;
    if (locked == SD_DIED) sd_mutex_consistent(mutex);
    if (result != SD_OK) sd_mutex_unlock(mutex);
    return result;
}

int sd_ids_lock(sd_segment *segment, uint64_t deadline)
{
    sd_header *header = segment->header;
    sd_thread *self = sd_self();
    self->short_wait++;
    int locked = sd_mutex_lock(&header->id_mutex, NULL, deadline);
    self->short_wait--;
    return entered_short(segment, &header->id_mutex, &header->id_dirty, locked, sd_rebuild_ids);
}

void sd_ids_unlock(sd_segment *segment)
{
    sd_mutex_unlock(&segment->header->id_mutex);
}

static int lock_briefly(sd_segment *segment, pthread_mutex_t *mutex, sd_word *dirty,
                        int (*rebuild)(sd_segment *))
{
    sd_thread *self = sd_self();
    self->short_wait++;
    int locked = sd_mutex_lock_briefly(mutex);
    self->short_wait--;
    return entered_short(segment, mutex, dirty, locked, rebuild);
}

int sd_events_lock_briefly(sd_segment *segment)
{
    sd_header *header = segment->header;
    return lock_briefly(segment, &header->event_mutex, &header->event_dirty, sd_ring_settle);
}

void sd_events_settle_now(sd_segment *segment)
{
    sd_header *header = segment->header;
    int locked = sd_mutex_lock(&header->event_mutex, NULL, SD_TRY);
    if (entered_short(segment, &header->event_mutex, &header->event_dirty, locked,
                      sd_ring_settle) == SD_OK)
        sd_events_unlock(segment);
}

void sd_events_unlock(sd_segment *segment)
{
    sd_mutex_unlock(&segment->header->event_mutex);
}

int sd_heap_lock_briefly(sd_segment *segment)
{
    sd_header *header = segment->header;
    return lock_briefly(segment, &header->heap_mutex, &header->heap_dirty, sd_rebuild_heap);
}

void sd_heap_unlock(sd_segment *segment)
{
    sd_mutex_unlock(&segment->header->heap_mutex);
}

/* A wait for the event or the heap lock that takes more than a slice begins again with the id
 * lock. */
int sd_short_locks(sd_segment *segment, int which, uint64_t deadline)
{
    for (;;) {
        int result = which & SD_IDS ? sd_ids_lock(segment, deadline) : SD_OK;
        if (result != SD_OK || !(which & ~SD_IDS)) return result;
        result = which & SD_EVENTS ? sd_events_lock_briefly(segment)
                                   : sd_heap_lock_briefly(segment);
        if (result == SD_OK) return SD_OK;
        sd_short_unlock(segment, which & SD_IDS);
        if (result != SD_TIMEOUT) return result;
        result = sd_wait_hook(NULL, deadline);
        if (result != SD_OK) return result;
        if (deadline != SD_FOREVER && sd_now() >= deadline) return SD_TIMEOUT;
    }
}

void sd_short_unlock(sd_segment *segment, int which)
{
    if (which & SD_HEAP) sd_heap_unlock(segment);
    if (which & SD_EVENTS) sd_events_unlock(segment);
    if (which & SD_IDS) sd_ids_unlock(segment);
}

/* --- garbage --------------------------------------------------------------------------------- */

/* Nothing is freed if the fields, which say what is current, are damaged.  If `life` is damaged, a
 * domain is taken to live here: what is current is kept. */
uint64_t sd_free_garbage(sd_segment *segment, uint32_t slot)
{
    sd_slot *record = &segment->slots[slot];
    sd_values values;
    uint64_t cells = 0;
    uint64_t life = sd_load(&record->life);
    bool live = life & 1 || !sd_count_sound(life);
    if (sd_values_get(segment, slot, &values) != SD_OK && live) return 0;
    for (int place = 0; place < SD_BLOBS; place++)
        for (int i = 0; i < 2; i++) {
            if (!sd_load(&record->extent[place][i])) continue; /* nearly all of them */
            int b = sd_place(values.flags, place); /* it is its own inverse */
            bool current = values.flags & SD_FLAG_PRESENT(b) && sd_choice(values.flags, b) == i &&
                           !(b == SD_DATA && sd_small_bytes(&values));
            if (!live || !current) cells += sd_heap_free(segment, &record->extent[place][i]);
        }
    sd_publish(&record->dirty, 0);
    return cells;
}

/* The heap lock is out of reach if its holder is stopped: then the slot's next holder tidies. */
void sd_tidy(sd_segment *segment, uint32_t slot)
{
    sd_publish(&segment->slots[slot].dirty, 1);
    if (sd_heap_lock_briefly(segment) != SD_OK) return;
    sd_self()->repair.freed += sd_free_garbage(segment, slot);
    sd_heap_unlock(segment);
}

/* --- a slot's lock --------------------------------------------------------------------------- */

/* Where the event lock's holder is stopped, one slice of waiting is enough for all that this thread
 * recovers within a second. */
static bool events_lock_for_death(sd_segment *segment)
{
    sd_thread *self = sd_self();
    sd_header *header = segment->header;
    if (!sd_ring_works(segment)) return false;
    if (sd_now() < self->muted) {
        int locked = sd_mutex_lock(&header->event_mutex, NULL, SD_TRY);
        return entered_short(segment, &header->event_mutex, &header->event_dirty, locked,
                             sd_ring_settle) == SD_OK;
    }
    if (sd_events_lock_briefly(segment) == SD_OK) return true;
    self->muted = sd_now() + SD_SECOND_NS;
    return false;
}

/* The event of a death, whose commit is the store of `died_who`; event lock held if it is not 0.
 * Where that lock's holder is stopped for longer than a slice there is no event: the domain matters
 * more. */
static uint64_t announce_death(sd_segment *segment, uint32_t slot, uint64_t victim, uint64_t pid)
{
    const sd_slot *record = &segment->slots[slot];
    const uint64_t uuid[2] = {sd_load(&record->uuid[0]), sd_load(&record->uuid[1])};
    unsigned char name[SD_NAME_MAX + 1];
    sd_values values;
    if (!segment->at.events || !(sd_load(&record->life) & 1)) return 0;
    if (sd_values_get(segment, slot, &values) != SD_OK) return 0;
    sd_name_get(segment, slot, values.flags, name);
    const sd_news news = {1, {SD_KIND(SD_HOLDER_DIED, 0)}, {values.id}, (uint32_t)pid};
    if (!events_lock_for_death(segment)) return 0;
    return sd_ring_write(segment, slot, SD_BY_DEATH, victim, uuid, name, name, &news);
}

/* --- what a holder is doing ------------------------------------------------------------------- */

void sd_why_set(sd_word why[SD_WHY_WORDS], const void *text, size_t size)
{
    uint64_t words[SD_WHY_WORDS] = {0};
    memcpy(words, text, size < sizeof words ? size : sizeof words - 1);
    for (int w = SD_WHY_WORDS - 1; w >= 0; w--)
        if (sd_load(&why[w]) != words[w]) sd_store(&why[w], words[w]);
}

void sd_why_clear(sd_word why[SD_WHY_WORDS])
{
    for (int w = 0; w < SD_WHY_WORDS; w++)
        if (sd_load(&why[w])) sd_store(&why[w], 0);
}

/* The record itself is sound: the old one or the new one.  If the owner record is empty, either the
 * holder died before it signed, or a recoverer got this far before it died itself: then what
 * `died_who` says already stays. */
void sd_recover_slot(sd_segment *segment, uint32_t slot, uint64_t who, uint64_t pid)
{
    sd_slot *record = &segment->slots[slot];
    uint64_t victim = who ? who : SD_DIED_UNKNOWN;
    sd_count(&segment->counters->recoveries);
    sd_why_clear(record->why);
    if (who ? sd_load(&record->died_who) != who : !sd_load(&record->died_who)) {
        uint64_t sum = sd_load(&record->sum_and_pid) & ~0xffffffffull;
        uint64_t event = announce_death(segment, slot, victim, pid);
        sd_store(&record->sum_and_pid, sum | (who ? (uint32_t)pid : 0));
        sd_publish(&record->died_who, victim);
        if (event) {
            sd_ring_publish(segment, event);
            sd_events_unlock(segment);
        }
    } else if (sd_ring_unsettled(segment) && events_lock_for_death(segment)) {
        /* A recoverer may have died before us, in the event of this death.  `died_who` says that it
         * happened, until somebody clears it. */
        sd_events_unlock(segment);
    }
    sd_tidy(segment, slot);
}

static inline int enter_slot(sd_segment *segment, uint32_t slot)
{
    sd_thread *self = sd_self();
    if (sd_poisoned(segment)) return SD_POISONED;
    sign(&segment->slots[slot].owner, self);
    segment->held++;
    self->held++;
    sd_count(&segment->counters->acquired);
    return SD_OK;
}

int sd_slot_entered(sd_segment *segment, uint32_t slot)
{
    return enter_slot(segment, slot);
}

/* What is left to do when the mutex was asked for. */
static inline int slot_locked(sd_segment *segment, uint32_t slot, int locked)
{
    sd_slot *record = &segment->slots[slot];
    pthread_mutex_t *mutex = &record->mutex;
    if (locked != SD_OK && locked != SD_DIED) return locked;
    if (locked == SD_DIED) {
        uint64_t who = sd_load(&record->owner.who), pid = sd_owner_pid(&record->owner, who);
        sd_note_death(segment, who, pid);
        sd_recover_slot(segment, slot, who, pid);
        /* We sign only after this: a recoverer that dies in between must not pass for the holder
         * that had the domain. */
        sd_publish(&record->owner.who, 0);
        sd_mutex_consistent(mutex);
    }
    int result = enter_slot(segment, slot);
    if (result != SD_OK) sd_mutex_unlock(mutex);
    return result;
}

int sd_slot_lock(sd_segment *segment, uint32_t slot, uint64_t deadline)
{
    sd_slot *record = &segment->slots[slot];
    return slot_locked(segment, slot, sd_mutex_lock(&record->mutex, &record->owner, deadline));
}

int sd_slot_wait(sd_segment *segment, uint32_t slot, uint64_t deadline)
{
    sd_slot *record = &segment->slots[slot];
    return slot_locked(segment, slot, sd_mutex_wait(&record->mutex, &record->owner, deadline));
}

uint32_t sd_next_taken(const sd_segment *segment, uint32_t slot, uint32_t end)
{
    bool robust = segment->kind == SD_KIND_ROBUST;
    for (; slot < end; slot++) {
        const sd_slot *record = &segment->slots[slot];
        if (robust ? sd_mutex_busy(&record->mutex) : sd_load(&record->owner.who) != 0) break;
    }
    return slot;
}

static inline void leave_slot(sd_segment *segment, sd_slot *record, sd_thread *holder,
                              bool delivered)
{
    if (delivered && sd_load(&record->died_who)) sd_publish(&record->died_who, 0);
    segment->held--;
    holder->held--;
}

void sd_slot_unlock(sd_segment *segment, uint32_t slot, bool delivered)
{
    sd_slot *record = &segment->slots[slot];
    leave_slot(segment, record, sd_self(), delivered);
    sd_publish(&record->owner.who, 0);
    sd_mutex_unlock(&record->mutex);
}

int sd_slot_unlock_for(sd_segment *segment, uint32_t slot, sd_thread *holder, uint64_t nonce)
{
    sd_slot *record = &segment->slots[slot];
    int result = sd_mutex_take_off_for(&record->mutex, holder, nonce);
    if (result != SD_OK) return result;
    leave_slot(segment, record, holder, false);
    sd_publish(&record->owner.who, 0);
    sd_mutex_release_for(&record->mutex, holder);
    return SD_OK;
}

bool sd_slot_leave(sd_segment *segment, uint32_t slot, bool delivered, uint64_t who,
                   sem_t *semaphore)
{
    sd_slot *record = &segment->slots[slot];
    leave_slot(segment, record, sd_self(), delivered && sd_load(&record->owner.who) == who);
    return sd_semaphore_leave(semaphore, &record->owner, who);
}

/* --- the list lock --------------------------------------------------------------------------- */

/* A process that dies between a remove's commit and its end, or while it fills a slot for an
 * insert, leaves blobs in a FREE slot, which nobody locks until it is used again.  It dies with the
 * list lock, so the list lock's next holder frees them.  (A living remover that could not get the
 * heap lock leaves them, too; they wait for the slot's next user, or for this.)  A slot's lock is
 * only tried: its holder has a handle to a domain that is gone, or waits for the heap; if it dies
 * as well, the slot's next user frees what it leaves.  List lock held, so that no FREE slot becomes
 * LIVE meanwhile; robust locks only, since the core does not know the others. */
static void tidy_free_slots(sd_segment *segment)
{
    uint32_t slots = sd_slot_count(segment);
    for (uint32_t slot = 0; slot < slots; slot++) {
        const sd_slot *record = &segment->slots[slot];
        uint64_t named = 0;
        for (int b = 0; b < SD_BLOBS; b++)
            named |= sd_load(&record->extent[b][0]) | sd_load(&record->extent[b][1]);
        if (!named || sd_load(&record->life) & 1) continue;
        if (sd_slot_lock(segment, slot, SD_TRY) != SD_OK) continue;
        sd_tidy(segment, slot);
        bool put_off = sd_load(&record->dirty);
        sd_slot_unlock(segment, slot, false);
        if (put_off) return; /* the heap's holder is stopped: one slice of waiting is enough */
    }
}

int sd_list_entered(sd_segment *segment, bool died)
{
    sd_header *header = segment->header;
    uint64_t who = sd_load(&header->list_owner.who), pid = sd_owner_pid(&header->list_owner, who);
    if (died) sd_why_clear(header->list_why);
    sign(&header->list_owner, sd_self()); /* before the repair: if we die in it, that must be seen */
    if (died || sd_load(&header->list_dirty)) {
        sd_store(&header->list_dirty, 1);
        if (sd_rebuild_list(segment) != SD_OK) return SD_POISONED;
        if (segment->kind == SD_KIND_ROBUST) tidy_free_slots(segment);
        sd_publish(&header->list_dirty, 0);
        note_repair(segment);
        /* After the free slots, whose dead holders are noted in the same place. */
        sd_repair *repair = &sd_self()->repair;
        repair->died = died;
        repair->who = died ? who : 0;
        repair->pid = died ? pid : 0;
        if (died) sd_count(&segment->counters->deaths);
    }
    if (sd_poisoned(segment)) return SD_POISONED;
    segment->list_nonce = sd_self()->nonce;
    segment->list_nested = sd_self()->nested;
    segment->held++;
    sd_self()->lists++;
    sd_count(&segment->counters->acquired);
    return SD_OK;
}

static inline int list_locked(sd_segment *segment, int locked)
{
    pthread_mutex_t *mutex = &segment->header->list_mutex;
    if (locked != SD_OK && locked != SD_DIED) return locked;
    int result = sd_list_entered(segment, locked == SD_DIED);
    if (locked == SD_DIED) sd_mutex_consistent(mutex);
    if (result != SD_OK) {
        sd_store(&segment->header->list_owner.who, 0);
        sd_mutex_unlock(mutex);
    }
    return result;
}

int sd_list_lock(sd_segment *segment, uint64_t deadline)
{
    sd_header *header = segment->header;
    return list_locked(segment, sd_mutex_lock(&header->list_mutex, &header->list_owner, deadline));
}

int sd_list_wait(sd_segment *segment, uint64_t deadline)
{
    sd_header *header = segment->header;
    return list_locked(segment, sd_mutex_wait(&header->list_mutex, &header->list_owner, deadline));
}

void sd_list_say(sd_segment *segment, const void *text, size_t size)
{
    segment->list_says = true;
    sd_why_set(segment->header->list_why, text, size);
}

static inline void leave_list(sd_segment *segment, sd_thread *holder)
{
    if (segment->list_says) sd_why_clear(segment->header->list_why);
    segment->list_says = false;
    segment->list_nonce = 0;
    segment->list_taker = NULL;
    segment->held--;
    holder->lists--;
}

void sd_list_unlock(sd_segment *segment)
{
    leave_list(segment, sd_self());
    sd_publish(&segment->header->list_owner.who, 0);
    sd_mutex_unlock(&segment->header->list_mutex);
}

int sd_list_unlock_for(sd_segment *segment, sd_thread *holder, uint64_t nonce)
{
    pthread_mutex_t *mutex = &segment->header->list_mutex;
    int result = sd_mutex_take_off_for(mutex, holder, nonce);
    if (result != SD_OK) return result;
    leave_list(segment, holder);
    sd_publish(&segment->header->list_owner.who, 0);
    sd_mutex_release_for(mutex, holder);
    return SD_OK;
}

bool sd_list_leave(sd_segment *segment, sem_t *semaphore, sd_thread *holder)
{
    leave_list(segment, holder);
    return sd_semaphore_leave(semaphore, &segment->header->list_owner, holder->who);
}
