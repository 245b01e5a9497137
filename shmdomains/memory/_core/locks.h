/* locks.h - the segment's locks, and what their next holder repairs. */
#ifndef SHMDOMAINS_LOCKS_H
#define SHMDOMAINS_LOCKS_H

#include "segment.h"
#include "thread.h"

#include <semaphore.h>

/* Write the caller's name into the owner record of a lock that it has. */
void sd_sign(sd_owner *owner);
/* Into what this thread's calls repaired: whose lock it was. */
void sd_note_death(sd_segment *segment, uint64_t who, uint64_t pid);

/* The list lock.  lock = the mutex, then entered().  For lock="multiprocessing" the binding puts a
 * semaphore in the mutex's place, and unlocks by leave(), which answers false if another thread
 * has taken the lock over: only a damaged owner record leads there. */
int sd_list_lock(sd_segment *segment, uint64_t deadline);
int sd_list_wait(sd_segment *segment, uint64_t deadline); /* after SD_TIMEOUT of SD_SPIN */
int sd_list_entered(sd_segment *segment, bool died);
void sd_list_unlock(sd_segment *segment);
bool sd_list_leave(sd_segment *segment, sem_t *semaphore, sd_thread *holder);
/* For another thread, which holds it; results as of sd_slot_unlock_for(). */
int sd_list_unlock_for(sd_segment *segment, sd_thread *holder, uint64_t nonce);

/* A slot's lock, likewise.  `delivered`: the holder's caller got the domain, so what the record
 * says about the death of an earlier holder has been told, and is cleared. */
int sd_slot_lock(sd_segment *segment, uint32_t slot, uint64_t deadline);
int sd_slot_wait(sd_segment *segment, uint32_t slot, uint64_t deadline);
int sd_slot_entered(sd_segment *segment, uint32_t slot);
void sd_slot_unlock(sd_segment *segment, uint32_t slot, bool delivered);
bool sd_slot_leave(sd_segment *segment, uint32_t slot, bool delivered, uint64_t who,
                   sem_t *semaphore); /* `who`: a thread of ours, which has it */
/* Unlock for another thread of ours, which has it, and whose handle to it is gone; GIL held.  SD_OK;
 * else the thread has to do it itself: SD_TIMEOUT, at the end of the slice that it is in; SD_MISS,
 * when it next calls. */
int sd_slot_unlock_for(sd_segment *segment, uint32_t slot, sd_thread *holder, uint64_t nonce);
/* Remember that its holder died, and free the garbage.  Slot lock held. */
void sd_recover_slot(sd_segment *segment, uint32_t slot, uint64_t who, uint64_t pid);

/* What the holder is doing, for people: UTF-8, at most 55 bytes, cut behind them.  The list's is
 * cleared when it is unlocked, a slot's by who stored it, before it unlocks. */
void sd_why_set(sd_word why[SD_WHY_WORDS], const void *text, size_t size);
void sd_why_clear(sd_word why[SD_WHY_WORDS]);
void sd_list_say(sd_segment *segment, const void *text, size_t size);
/* The first slot from `slot` on whose lock is held, or was by somebody who died; else `end`. */
uint32_t sd_next_taken(const sd_segment *segment, uint32_t slot, uint32_t end);

/* lock="multiprocessing": become the owner in place of a dead one (0: of nobody), and sign.  False:
 * somebody was faster. */
bool sd_take_over(sd_owner *owner, uint64_t dead);
/* Take such a lock if it is free; slice: sleep on its semaphore before, a slice at most or until a
 * signal comes, without the GIL.  SD_OK SD_TIMEOUT */
int sd_semaphore_try(sem_t *semaphore, sd_owner *owner);
int sd_semaphore_slice(sem_t *semaphore, sd_owner *owner, uint64_t deadline);
/* Free such a lock.  False: it is not `who`'s. */
bool sd_semaphore_leave(sem_t *semaphore, sd_owner *owner, uint64_t who);

/* The core's own short locks, in this order; the heap's is never held with another one. */
enum { SD_IDS = 1, SD_EVENTS = 2, SD_HEAP = 4 };
int sd_ids_lock(sd_segment *segment, uint64_t deadline);
void sd_ids_unlock(sd_segment *segment);
/* Signals are left alone, and the wait is a slice at most: the id lock may be held.  Whoever has to
 * wait longer releases that first. */
int sd_events_lock_briefly(sd_segment *segment);
/* If nobody has that lock: what its dead holder left unpublished is settled. */
void sd_events_settle_now(sd_segment *segment);
void sd_events_unlock(sd_segment *segment);
int sd_heap_lock_briefly(sd_segment *segment);
void sd_heap_unlock(sd_segment *segment);
/* Several of them: a sum of SD_IDS, SD_EVENTS, or SD_HEAP.  Signals are looked at only while none is
 * held. */
int sd_short_locks(sd_segment *segment, int which, uint64_t deadline);
void sd_short_unlock(sd_segment *segment, int which);

/* Free every descriptor that is not current: how many cells.  Slot and heap lock held. */
uint64_t sd_free_garbage(sd_segment *segment, uint32_t slot);
/* The same with the slot lock held, or later if the heap lock is out of reach. */
void sd_tidy(sd_segment *segment, uint32_t slot);

#endif
