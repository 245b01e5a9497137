/* foreign_robust.c - somebody else's code that uses robust mutexes of its own, without the GIL.
 *
 * For test_dropped.py, which calls it by ctypes in a thread whose handles another thread drops.
 */
#include <pthread.h>

int make(pthread_mutex_t *mutex)
{
    pthread_mutexattr_t robust;
    pthread_mutexattr_init(&robust);
    pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
    return pthread_mutex_init(mutex, &robust);
}

/* Lock one, or one inside the other, over and over, until it is told to stop. */
long busy(pthread_mutex_t *one, pthread_mutex_t *two, volatile int *begun, volatile int *stop,
          int idle)
{
    long turns = 0;
    for (; !*stop; turns++) {
        pthread_mutex_lock(one);
        if (turns & 1) pthread_mutex_lock(two);
        if (turns & 1) pthread_mutex_unlock(two);
        pthread_mutex_unlock(one);
        *begun = 1;
        for (volatile int i = 0; i < idle; i++) {}
    }
    return turns;
}
