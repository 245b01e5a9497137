/* untimed_lock.c - the negative control of the kill storms: what the core's timed waits are for.
 *
 * A library to be preloaded. Whoever waits for a robust mutex for a time waits for ever, so that a
 * wake-up that is lost is not made good by the end of a slice. The core is the one that users have:
 * it asks for the time, and gets what is here.
 */
#include <pthread.h>
#include <time.h>

int pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until)
{
    (void)clock;
    (void)until;
    return pthread_mutex_lock(mutex);
}
