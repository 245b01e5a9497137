/* mutex.h - one robust, process-shared mutex. */
#ifndef SHMDOMAINS_MUTEX_H
#define SHMDOMAINS_MUTEX_H

#include "codes.h"
#include "thread.h"

#include <time.h>

/* Wait for a mutex that was seen busy, at most until `deadline` and at most one slice; never called
 * while one of the core's own short locks is held.  The binding sets it, to let other threads run
 * and to look at signals (SD_INTERRUPTED, SD_FORKED); with `mutex` NULL it only looks at
 * signals. */
extern int (*sd_wait_hook)(pthread_mutex_t *mutex, uint64_t deadline);
/* The same without a look at signals: no Python runs in this thread meanwhile. */
extern int (*sd_slice_hook)(pthread_mutex_t *mutex, uint64_t deadline);

int sd_mutex_init(pthread_mutex_t *mutex);
/* SD_OK SD_DIED SD_TIMEOUT SD_CORRUPT SD_NESTED; lock also SD_INTERRUPTED, SD_FORKED. */
int sd_mutex_slice(pthread_mutex_t *mutex, uint64_t deadline); /* no signals, no hook */
/* `owner`: the record that holders of this mutex sign after they have it, and clear before they
 * unlock; NULL: there is none. */
int sd_mutex_lock(pthread_mutex_t *mutex, const sd_owner *owner, uint64_t deadline);
/* The same without the first try, and without spinning: for whoever was told SD_TIMEOUT. */
int sd_mutex_wait(pthread_mutex_t *mutex, const sd_owner *owner, uint64_t deadline);
int sd_mutex_lock_briefly(pthread_mutex_t *mutex); /* one slice, signals left alone */
void sd_mutex_consistent(pthread_mutex_t *mutex);
bool sd_mutex_sound(const pthread_mutex_t *mutex); /* its kind word is the one we gave it */
uint32_t sd_mutex_owner(const pthread_mutex_t *mutex); /* tid, 0 if free */
/* The thread that died holding it; 0: nobody did, or it is not known. */
uint32_t sd_mutex_victim(const pthread_mutex_t *mutex);
/* Does the kernel tell the next holder of a robust mutex that its holder died?  If not it is found
 * out by looking, a slice later. */
bool sd_mutex_watched(void);
/* Does somebody sleep for it?  Perhaps not any more. */
bool sd_mutex_awaited(const pthread_mutex_t *mutex);
bool sd_mutex_busy(const pthread_mutex_t *mutex); /* held, or left by a dead holder */
/* One look whether its owner runs, as each slice of a wait has it: for whoever waits without slices.
 * If it does not, its death is marked, and the next try gets SD_DIED. */
void sd_mutex_look(pthread_mutex_t *mutex, const sd_owner *owner);
/* If this thread holds it, its unlock will wake one who sleeps on it.  For whoever took it without a
 * wait while others may sleep.  It is a bit of glibc's that any process may set while it is held; a
 * dead holder leaves it set, and that costs one wake of nobody. */
void sd_mutex_keep_waiters(pthread_mutex_t *mutex);

static inline void sd_mutex_unlock(pthread_mutex_t *mutex)
{
    pthread_mutex_unlock(mutex);
}

/* When a slice that begins now ends, for a timed wait on CLOCK_MONOTONIC. */
struct timespec sd_slice_end(uint64_t deadline);

#endif
