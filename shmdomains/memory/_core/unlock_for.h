/* unlock_for.h - free a robust mutex that another thread of this process holds. */
#ifndef SHMDOMAINS_UNLOCK_FOR_H
#define SHMDOMAINS_UNLOCK_FOR_H

#include "mutex.h"
#include "segment.h"

/* Take the mutex off the list by which the kernel would find it when `thread` dies.  The caller has
 * the GIL, and the thread's handle to the lock is gone.
 *
 * SD_OK: done, the thread cannot end before sd_mutex_release_for(), which must follow.
 * SD_TIMEOUT: the thread is in a slice of a wait, and looks at its orphans at the end of it.
 * SD_MISS: it cannot be done, and nothing has changed: the thread has to unlock it itself. */
int sd_mutex_take_off_for(pthread_mutex_t *mutex, const sd_thread *thread, uint64_t nonce);
void sd_mutex_release_for(pthread_mutex_t *mutex, const sd_thread *thread);

#endif
