/* mutex.c - robust, process-shared mutexes that survive what was measured to break them.
 *
 * 1. An untimed lock can sleep for ever after kill -9: a woken waiter may die before it sets the
 *    waiters bit again.  So every wait is a loop of timed slices.
 * 2. A timed lock that gives up leaves the thread's list_op_pending dangling: the kernel would
 *    look at that address when the thread dies.  Locking and unlocking a robust mutex of the
 *    thread's own clears it, so that is done after every slice that timed out.
 * 3. A mutex is initialised once, before anybody can find it, and never touched by memory
 *    functions after that.
 * 4. After EOWNERDEAD what the mutex protects is repaired, then the mutex is made consistent, then
 *    used or unlocked, in this order.  If a repair fails the segment is poisoned first.  Unlocking
 *    without pthread_mutex_consistent() would make the mutex useless for ever.
 * 5. A flipped bit can name an owner that does not exist, the kernel walks only 2,048 locks of a
 *    dead thread, some sandboxes' kernels walk none, a mutex that was being freed for another thread
 *    is off its list (unlock_for.c), and after process_mrelease() (or the kernel's own OOM reaper, if
 *    the dead thread does not get to its end within two seconds) there is no list to walk any more.
 *    So a wait that lasts checks that the owner runs, and if it does not, marks its death as the
 *    kernel would.  The kind word is compared before each lock for the same reason.
 *
 * Callers check whether this thread holds the mutex already; pthread is never asked.
 */
#define _GNU_SOURCE
#include "mutex.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

static int mutex_kind; /* what glibc puts into __kind for our attributes */

int sd_mutex_init(pthread_mutex_t *mutex)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    int error = pthread_mutex_init(mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    if (!error) return SD_OK;
    errno = error;
    return SD_ERRNO;
}

__attribute__((constructor)) static void begin(void)
{
    pthread_mutex_t probe;
    if (sd_mutex_init(&probe) == SD_OK) mutex_kind = probe.__data.__kind;
}

static int outcome(int error)
{
    switch (error) {
    case 0: return SD_OK;
    case EOWNERDEAD: return SD_DIED;
    case EBUSY:
    case ETIMEDOUT: return SD_TIMEOUT;
    default: return SD_CORRUPT; /* ENOTRECOVERABLE, EINVAL: only damage leads there */
    }
}

bool sd_mutex_sound(const pthread_mutex_t *mutex)
{
    return __atomic_load_n(&mutex->__data.__kind, __ATOMIC_RELAXED) == mutex_kind;
}

static int try_lock(pthread_mutex_t *mutex)
{
    if (!sd_mutex_sound(mutex)) return SD_CORRUPT;
    return outcome(pthread_mutex_trylock(mutex));
}

uint32_t sd_mutex_owner(const pthread_mutex_t *mutex)
{
    return (uint32_t)__atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED) & FUTEX_TID_MASK;
}

/* Clear list_op_pending of this thread (2. above). */
static void forget_pending(void)
{
    static _Thread_local pthread_mutex_t own;
    static _Thread_local uint64_t ready; /* fork epoch: in a child the owner word is our parent's */
    if (ready != sd_fork_epoch) {
        if (sd_mutex_init(&own) != SD_OK) return;
        ready = sd_fork_epoch;
    }
    if (pthread_mutex_lock(&own) == 0) pthread_mutex_unlock(&own);
}

/* May this thread hold a mutex that it asks for?  Never one of the core's own short locks.  A slot
 * or list lock, if it holds any, or if this is a signal handler in the middle of a wait: the
 * interrupted code may hold one that is not recorded yet. */
static bool may_be_ours(void)
{
    const sd_thread *self = sd_self();
    return !self->short_wait && (self->nested || self->held || self->lists);
}

/* Whom the mutex names: who signed, if that is a thread of this number, else any of this number.
 *
 * A signature is never an older owner's, but for one moment: who takes the mutex of a dead holder
 * has the mutex and has not signed yet.  If its number is the dead one's, given out again, it would
 * pass for dead.  So the signature counts only while glibc's own copy of the owner is that number,
 * which means "consistent": glibc takes the copy away in the next instruction but one or two after
 * it took a dead one's mutex, and gives it back in pthread_mutex_consistent(), which comes after the
 * record was cleared or signed.  What is left are those one or two instructions, of exactly that
 * thread. */
static uint64_t named(const pthread_mutex_t *mutex, uint32_t tid, const sd_owner *owner)
{
    uint64_t who = owner ? sd_load(&owner->who) : 0;
    uint32_t copy = (uint32_t)__atomic_load_n(&mutex->__data.__owner, __ATOMIC_RELAXED);
    return sd_who_tid(who) == tid && copy == tid ? who : tid;
}

/* A mutex that names this very thread, and was signed by an earlier one of the same number: then it
 * cannot be one that interrupted code has taken and not recorded. */
static bool is_namesakes(uint64_t who)
{
    const sd_thread *self = sd_self();
    return !self->nested && sd_who_start(who) && sd_who_start(self->who) && who != self->who;
}

/* Mark the death of an owner that does not run (5. above): there is no thread of its number, or one
 * that started at another time than the owner, or a zombie.  The kernel takes an ending thread off
 * its locks before it is a zombie, and before its number can be reused, so none of these is a race.
 * A mutex that names *this* thread is an orphan too, unless it may be ours: then the caller is
 * turned away.  Waiters without an owner can only come from a flipped bit.  A short lock has no
 * signature: there a number that was given out again hides a death.
 *
 * What is left: between the last look and the exchange the mutex is freed (by the kernel, or by
 * another waiter's exchange), and a thread of the same number takes this very mutex.  The word is
 * the same again, and a lock that is held is given away.  We accept it:
 * - We come as far as the exchange only if the owner died and the kernel let it be, or died during
 *   this look, or the word was damaged.
 * - What the mutex names is looked up again right before the exchange, after /proc was read, so this
 *   thread has to lose its processor between these few instructions, and a thread with exactly this
 *   number, one of 32,768 to 4,194,304, has to hold exactly this mutex when we go on.
 * - A mark in the word, "looked at", under which the thread is asked for once more, is
 *   sound only if those who look exclude each other, for a late one would take another's mark for
 *   its own: one more robust lock, with the same question about its owner. */
static int bury_missing_owner(pthread_mutex_t *mutex, const sd_owner *owner)
{
    uint32_t word = (uint32_t)__atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED);
    uint32_t tid = word & FUTEX_TID_MASK;
    if (!word || word & FUTEX_OWNER_DIED) return SD_TIMEOUT;
    uint64_t who = named(mutex, tid, owner);
    if (tid == (uint32_t)syscall(SYS_gettid)) {
        if (may_be_ours() && !is_namesakes(who)) return SD_NESTED;
    } else if (tid && sd_alive(who)) {
        return SD_TIMEOUT;
    }
    if (named(mutex, tid, owner) != who) return SD_TIMEOUT;
    uint32_t dead = (word & FUTEX_WAITERS) | FUTEX_OWNER_DIED;
    __atomic_compare_exchange_n((uint32_t *)&mutex->__data.__lock, &word, dead, false,
                                __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return SD_TIMEOUT;
}

struct timespec sd_slice_end(uint64_t deadline)
{
    uint64_t until = sd_now() + SD_SLICE_NS;
    if (until > deadline) until = deadline;
    return (struct timespec){(time_t)(until / SD_SECOND_NS), (long)(until % SD_SECOND_NS)};
}

int sd_mutex_slice(pthread_mutex_t *mutex, uint64_t deadline)
{
    struct timespec at = sd_slice_end(deadline);
    if (!sd_mutex_sound(mutex)) return SD_CORRUPT;
    int result = outcome(pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &at));
    if (result == SD_OK || result == SD_DIED) return result;
    forget_pending();
    return result == SD_TIMEOUT ? bury_missing_owner(mutex, sd_self()->awaited) : result;
}

bool sd_mutex_watched(void)
{
    void *head;
    size_t size;
    return !syscall(SYS_get_robust_list, 0, &head, &size) || errno != ENOSYS;
}

uint32_t sd_mutex_victim(const pthread_mutex_t *mutex)
{
    uint32_t word = (uint32_t)__atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED);
    /* The kernel clears the number in the word; glibc's copy stays until the next lock. */
    uint32_t tid = (uint32_t)__atomic_load_n(&mutex->__data.__owner, __ATOMIC_RELAXED);
    return word & FUTEX_OWNER_DIED && tid == sd_who_tid(tid) ? tid : 0;
}

bool sd_mutex_busy(const pthread_mutex_t *mutex)
{
    return __atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED) != 0;
}

bool sd_mutex_awaited(const pthread_mutex_t *mutex)
{
    return (uint32_t)__atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED) & FUTEX_WAITERS;
}

static int wait_without_hook(pthread_mutex_t *mutex, uint64_t deadline)
{
    return mutex ? sd_mutex_slice(mutex, deadline) : SD_OK;
}

int (*sd_wait_hook)(pthread_mutex_t *mutex, uint64_t deadline) = wait_without_hook;
int (*sd_slice_hook)(pthread_mutex_t *mutex, uint64_t deadline) = wait_without_hook;

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield" ::: "memory");
#endif
}

/* Most holders are done within a microsecond; waking a sleeper takes thirty-five. */
static int try_and_spin(pthread_mutex_t *mutex)
{
    int result = try_lock(mutex);
    for (int turn = 0; result == SD_TIMEOUT && turn < 40; turn++) {
        for (int i = 0; i < 8; i++) relax();
        if (!sd_mutex_owner(mutex)) result = try_lock(mutex);
    }
    return result;
}

int sd_mutex_wait(pthread_mutex_t *mutex, const sd_owner *owner, uint64_t deadline)
{
    int result = SD_TIMEOUT;
    while (result == SD_TIMEOUT) {
        if (deadline != SD_FOREVER && sd_now() >= deadline) return SD_TIMEOUT;
        sd_self()->awaited = owner; /* each time: a handler in the hook may wait for another one */
        result = sd_wait_hook(mutex, deadline);
    }
    return result;
}

int sd_mutex_lock(pthread_mutex_t *mutex, const sd_owner *owner, uint64_t deadline)
{
    if (deadline == SD_TRY) {
        int result = try_lock(mutex);
        if (result == SD_TIMEOUT) result = bury_missing_owner(mutex, owner);
        return result == SD_TIMEOUT ? try_lock(mutex) : result;
    }
    int result = try_and_spin(mutex);
    if (result != SD_TIMEOUT || deadline == SD_SPIN) return result;
    return sd_mutex_wait(mutex, owner, deadline);
}

int sd_mutex_lock_briefly(pthread_mutex_t *mutex)
{
    int result = try_and_spin(mutex);
    if (result != SD_TIMEOUT) return result;
    sd_self()->awaited = NULL;
    return sd_slice_hook(mutex, SD_FOREVER);
}

void sd_mutex_consistent(pthread_mutex_t *mutex)
{
    pthread_mutex_consistent(mutex);
}

void sd_mutex_look(pthread_mutex_t *mutex, const sd_owner *owner)
{
    if (sd_mutex_sound(mutex)) bury_missing_owner(mutex, owner);
}

/* Only of a mutex that this thread has: the mark in a free one would lock it for good. */
void sd_mutex_keep_waiters(pthread_mutex_t *mutex)
{
    int word = __atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED);
    uint32_t tid = sd_who_tid(sd_self()->who);
    while (((uint32_t)word & FUTEX_TID_MASK) == tid && !(word & (int)FUTEX_WAITERS))
        if (__atomic_compare_exchange_n(&mutex->__data.__lock, &word, word | (int)FUTEX_WAITERS,
                                        false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return;
}
