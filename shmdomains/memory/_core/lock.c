/* lock.c - robust, process-shared mutexes that survive what was measured to break them.
 *
 * 1. An untimed lock can sleep for ever after kill -9: a woken waiter may die before it sets the
 *    waiters bit again.  So every wait is a timed one, in slices, looping.
 * 2. A timed lock that gives up leaves the thread's list_op_pending dangling: the kernel would
 *    look at that address when the thread dies.  Locking and unlocking a robust mutex of the
 *    thread's own clears it, so that is done after every slice that ended in a time-out.
 * 3. A mutex is initialised once, before anybody can find it, and never touched by memory
 *    functions after that.
 * 4. After EOWNERDEAD a mutex is repaired, then made consistent, then used or unlocked, in this
 *    order.  If a repair fails the segment is poisoned first; unlocking without
 *    pthread_mutex_consistent() would make the mutex useless for ever.
 * 5. A flipped bit can make an owner that does not exist, and the kernel walks only 2,048 locks of
 *    a dead thread.  So a wait that lasts checks that the owner runs, and marks its death as the
 *    kernel would if it does not.  The kind word is compared before each lock for the same reason.
 *
 * Who holds what is checked by the callers before they come here: pthread is never asked.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* --- threads, processes, time ---------------------------------------------------------------- */

uint64_t sd_fork_epoch = 1;
_Thread_local sd_thread *sd_this_thread __attribute__((tls_model("initial-exec")));
static _Atomic uint64_t nonces = 1;
static _Atomic(sd_thread *) idle_threads;
static pthread_key_t thread_key;
static uint64_t start_of_self, start_epoch;
static int mutex_kind; /* what glibc puts into __kind for our attributes */

/* The child owns none of its parent's locks: a new epoch makes every nonce of before foreign. */
static void after_fork_in_child(void)
{
    sd_fork_epoch++;
}

static void push_idle(sd_thread *thread)
{
    thread->next = atomic_load(&idle_threads);
    while (!atomic_compare_exchange_weak(&idle_threads, &thread->next, thread)) {}
}

static void thread_ended(void *thread)
{
    sd_thread *ended = thread;
    ended->nonce = 0;
    ended->orphans = NULL; /* its locks die with the thread */
    sd_this_thread = NULL;
    push_idle(ended);
}

/* Taking the whole list and putting the rest back needs no guard against reuse in between. */
static sd_thread *pop_idle(void)
{
    sd_thread *first = atomic_exchange(&idle_threads, NULL);
    if (!first) return NULL;
    for (sd_thread *rest = first->next, *next; rest; rest = next) {
        next = rest->next;
        push_idle(rest);
    }
    return first;
}

__attribute__((constructor)) static void begin(void)
{
    pthread_mutex_t probe;
    pthread_atfork(NULL, NULL, after_fork_in_child);
    pthread_key_create(&thread_key, thread_ended);
    if (sd_mutex_init(&probe) == SD_OK) mutex_kind = probe.__data.__kind;
}

uint64_t sd_identity(uint32_t tid, uint64_t start)
{
    return (tid & ((1u << 22) - 1)) | start << 22;
}

bool sd_exhausted(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOMEM;
}

/* State letter and start (ticks since boot) out of a stat file of /proc; false: no such file, or
 * with errno sd_exhausted(). */
static bool read_stat(const char *path, char *state, uint64_t *start)
{
    char text[1024];
    errno = 0;
    FILE *file = fopen(path, "re");
    if (!file) return false;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    /* The command in brackets may hold anything: count from behind it.  State is the third field,
     * the start the 22nd. */
    char *at = strrchr(text, ')');
    if (!at || at[1] != ' ') return false;
    *state = at[2];
    for (int field = 2; field < 22 && at; field++) at = strchr(at + 1, ' ');
    *start = at ? strtoull(at + 1, NULL, 10) : 0;
    return at != NULL;
}

uint64_t sd_process_start(uint32_t pid)
{
    char path[40], state;
    uint64_t start = 0;
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    if (read_stat(path, &state, &start)) return start;
    return sd_exhausted(errno) ? SD_START_UNKNOWN : 0;
}

bool sd_process_runs(uint32_t pid, uint64_t start)
{
    uint64_t now = sd_process_start(pid);
    return now && (!start || now == start || now == SD_START_UNKNOWN);
}

uint32_t sd_process_of(uint32_t tid)
{
    char path[40], line[128];
    unsigned pid = 0;
    snprintf(path, sizeof path, "/proc/%u/status", tid);
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    while (fgets(line, sizeof line, file) && sscanf(line, "Tgid: %u", &pid) != 1) {}
    fclose(file);
    return pid;
}

bool sd_alive(uint64_t who)
{
    uint32_t tid = (uint32_t)(who & ((1u << 22) - 1));
    uint32_t pid = sd_process_of(tid);
    if (!pid) return tid && (kill((pid_t)tid, 0) == 0 || errno != ESRCH); /* /proc may be hidden */
    if (!sd_process_runs(pid, who >> 22)) return false;
    /* A zombie has files in /proc, and the leader of a running process may be one. */
    char path[64], state;
    uint64_t ignored;
    snprintf(path, sizeof path, "/proc/%u/task/%u/stat", pid, tid);
    if (!read_stat(path, &state, &ignored)) return sd_exhausted(errno);
    return state != 'Z' && state != 'X';
}

sd_thread *sd_thread_begin(void)
{
    sd_thread *self = sd_this_thread;
    if (start_epoch != sd_fork_epoch) {
        start_of_self = sd_process_start((uint32_t)getpid());
        if (start_of_self == SD_START_UNKNOWN) start_of_self = 0; /* the next thread looks again */
        else start_epoch = sd_fork_epoch;
    }
    if (!self) {
        self = pop_idle();
        if (!self) self = calloc(1, sizeof *self);
        if (!self) abort(); /* 80 bytes: nothing else in this process could go on either */
        sd_this_thread = self;
        pthread_setspecific(thread_key, self);
    }
    self->epoch = sd_fork_epoch;
    self->nonce = atomic_fetch_add(&nonces, 1);
    self->pid = (uint64_t)getpid();
    self->who = sd_identity((uint32_t)syscall(SYS_gettid), start_of_self);
    self->held = self->lists = self->nested = self->short_wait = 0;
    self->records = NULL;
    self->orphans = NULL;
    return self;
}

static uint64_t read_clock(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

uint64_t sd_now(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

uint64_t sd_now_coarse(void)
{
    return read_clock(CLOCK_MONOTONIC_COARSE);
}

/* --- one mutex ------------------------------------------------------------------------------- */

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

static int outcome(int error)
{
    switch (error) {
    case 0: return SD_OK;
    case EOWNERDEAD: return SD_DIED;
    case EBUSY:
    case ETIMEDOUT: return SD_TIMEOUT;
    default: return SD_CORRUPT; /* ENOTRECOVERABLE, EINVAL: no path of ours leads there */
    }
}

bool sd_mutex_sound(const pthread_mutex_t *mutex)
{
    return __atomic_load_n(&mutex->__data.__kind, __ATOMIC_RELAXED) == mutex_kind;
}

int sd_mutex_try(pthread_mutex_t *mutex)
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
 * or a list lock, if it holds any, or if this is a signal handler in the middle of a wait: what
 * the interrupted code holds may not be on record yet. */
static bool may_be_ours(void)
{
    const sd_thread *self = sd_self();
    return !self->short_wait && (self->nested || self->held || self->lists);
}

/* Mark the death of an owner that does not exist (5. above).  A thread that ends is taken off its
 * locks by the kernel before its number can be free, so a number without a thread is no race.  A
 * mutex that names *this* thread is an orphan too, unless it may be ours: then the caller is
 * turned away.  Waiters without an owner are nobody's doing but a flipped bit's.
 *
 * What is left: between the look for the thread and the exchange the mutex is freed (by the kernel,
 * or by another waiter's exchange), the number is given to a new thread, and that one takes this
 * very mutex.  The word is the same again, and a lock that is held is given away.  It is let be:
 * - We come as far as the exchange only if the owner died since the load above, a few hundred
 *   nanoseconds ago, or the word was damaged.
 * - A new thread needs tens of microseconds to get to a lock, so this one has to lose its processor
 *   between these two instructions, while exactly this number, one of 32,768 to 4,194,304, is the
 *   next to be given out, and its thread has to hold this mutex, of all, when we go on.
 * - A second look with the owner record decides nothing: a new owner has the mutex before it has
 *   signed.  A mark in the word, "looked at", under which the thread is asked for once more, is
 *   sound only if those who look exclude each other, for one who is late would take another's mark
 *   for its own: one more robust lock, with the same question about its owner. */
static int bury_missing_owner(pthread_mutex_t *mutex)
{
    uint32_t word = (uint32_t)__atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED);
    uint32_t tid = word & FUTEX_TID_MASK;
    if (!word || word & FUTEX_OWNER_DIED) return SD_TIMEOUT;
    if (tid == (uint32_t)syscall(SYS_gettid)) {
        if (may_be_ours()) return SD_NESTED;
    } else if (tid && (kill((pid_t)tid, 0) == 0 || errno != ESRCH)) {
        return SD_TIMEOUT;
    }
    uint32_t dead = (word & FUTEX_WAITERS) | FUTEX_OWNER_DIED;
    __atomic_compare_exchange_n((uint32_t *)&mutex->__data.__lock, &word, dead, false,
                                __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return SD_TIMEOUT;
}

static struct timespec end_of_slice(uint64_t deadline)
{
    uint64_t until = sd_now() + SD_SLICE_NS;
    if (until > deadline) until = deadline;
    return (struct timespec){(time_t)(until / 1000000000ull), (long)(until % 1000000000ull)};
}

int sd_mutex_slice(pthread_mutex_t *mutex, uint64_t deadline)
{
    struct timespec at = end_of_slice(deadline);
    if (!sd_mutex_sound(mutex)) return SD_CORRUPT;
    int result = outcome(pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &at));
    if (result == SD_OK || result == SD_DIED) return result;
    forget_pending();
    return result == SD_TIMEOUT ? bury_missing_owner(mutex) : result;
}

uint32_t sd_mutex_victim(const pthread_mutex_t *mutex)
{
    uint32_t word = (uint32_t)__atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED);
    /* The kernel takes the number out of the word; glibc's copy stays until the next one locks. */
    uint32_t tid = (uint32_t)__atomic_load_n(&mutex->__data.__owner, __ATOMIC_RELAXED);
    return word & FUTEX_OWNER_DIED && tid < 1u << 22 ? tid : 0;
}

bool sd_mutex_busy(const pthread_mutex_t *mutex)
{
    return __atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED) != 0;
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

/* Most holders are gone within a microsecond; waking a sleeper costs thirty-five. */
static int try_and_spin(pthread_mutex_t *mutex)
{
    int result = sd_mutex_try(mutex);
    for (int turn = 0; result == SD_TIMEOUT && turn < 40; turn++) {
        for (int i = 0; i < 8; i++) relax();
        if (!sd_mutex_owner(mutex)) result = sd_mutex_try(mutex);
    }
    return result;
}

int sd_mutex_lock(pthread_mutex_t *mutex, uint64_t deadline)
{
    if (deadline == SD_TRY) {
        int result = sd_mutex_try(mutex);
        if (result == SD_TIMEOUT) result = bury_missing_owner(mutex);
        return result == SD_TIMEOUT ? sd_mutex_try(mutex) : result;
    }
    int result = try_and_spin(mutex);
    while (result == SD_TIMEOUT) {
        if (deadline != SD_FOREVER && sd_now() >= deadline) return SD_TIMEOUT;
        result = sd_wait_hook(mutex, deadline);
    }
    return result;
}

int sd_mutex_lock_briefly(pthread_mutex_t *mutex)
{
    int result = try_and_spin(mutex);
    return result == SD_TIMEOUT ? sd_slice_hook(mutex, SD_FOREVER) : result;
}

int sd_mutex_consistent(pthread_mutex_t *mutex)
{
    return pthread_mutex_consistent(mutex) ? SD_CORRUPT : SD_OK;
}

void sd_mutex_unlock(pthread_mutex_t *mutex)
{
    pthread_mutex_unlock(mutex);
}

/* --- owner records --------------------------------------------------------------------------- */

static void sign(sd_owner *owner)
{
    const sd_thread *self = sd_self();
    sd_store(&owner->pid, self->pid);
    sd_store(&owner->since, sd_now_coarse());
    sd_publish(&owner->who, self->who);
}

int sd_semaphore_slice(sem_t *semaphore, sd_owner *owner, uint64_t deadline)
{
    struct timespec at = end_of_slice(deadline);
    if (sem_clockwait(semaphore, CLOCK_MONOTONIC, &at)) return SD_TIMEOUT;
    sign(owner);
    return SD_OK;
}

bool sd_take_over(sd_owner *owner, uint64_t dead)
{
    sd_crash_point();
    return atomic_compare_exchange_strong(&owner->who, &dead, sd_self()->who);
}

static inline bool poisoned(const sd_segment *segment)
{
    return __builtin_expect(sd_load(&segment->header->poisoned) != 0, 0);
}

/* For who asks what the lock needed: see sd_repair. */
static void note_death(uint64_t who, uint64_t pid)
{
    sd_repair *repair = &sd_self()->repair;
    repair->died = true;
    repair->who = who;
    repair->pid = pid;
}

/* --- the list lock --------------------------------------------------------------------------- */

int sd_list_entered(sd_segment *segment, bool died)
{
    sd_header *header = segment->header;
    uint64_t who = sd_load(&header->list_owner.who), pid = sd_load(&header->list_owner.pid);
    sign(&header->list_owner); /* before the repair: who dies in it must be known to be dead */
    if (died || sd_load(&header->list_dirty)) {
        sd_store(&header->list_dirty, 1);
        if (sd_recover_list(segment) != SD_OK) return SD_POISONED;
        if (segment->kind == SD_KIND_ROBUST) sd_tidy_free_slots(segment);
        sd_publish(&header->list_dirty, 0);
        /* After the free slots, whose holders may have died as well. */
        note_death(died ? who : 0, died ? pid : 0);
        sd_self()->repair.died = died;
        sd_self()->repair.repaired = true;
    }
    if (poisoned(segment)) return SD_POISONED;
    segment->list_nonce = sd_self()->nonce;
    segment->list_nested = sd_self()->nested;
    segment->held++;
    sd_self()->lists++;
    return SD_OK;
}

int sd_list_lock(sd_segment *segment, uint64_t deadline)
{
    pthread_mutex_t *mutex = &segment->header->list_mutex;
    int locked = sd_mutex_lock(mutex, deadline);
    if (locked != SD_OK && locked != SD_DIED) return locked;
    int result = sd_list_entered(segment, locked == SD_DIED);
    if (locked == SD_DIED) sd_mutex_consistent(mutex);
    if (result != SD_OK) {
        sd_store(&segment->header->list_owner.who, 0);
        sd_mutex_unlock(mutex);
    }
    return result;
}

void sd_list_leaving(sd_segment *segment)
{
    sd_publish(&segment->header->list_owner.who, 0);
    segment->list_nonce = 0;
    segment->list_taker = NULL;
    segment->held--;
    sd_self()->lists--;
}

void sd_list_unlock(sd_segment *segment)
{
    sd_list_leaving(segment);
    sd_mutex_unlock(&segment->header->list_mutex);
}

/* --- a slot's lock --------------------------------------------------------------------------- */

int sd_slot_entered(sd_segment *segment, uint32_t slot)
{
    sd_slot *record = &segment->slots[slot];
    if (poisoned(segment)) return SD_POISONED;
    sign(&record->owner);
    segment->held++;
    sd_self()->held++;
    return SD_OK;
}

int sd_slot_lock(sd_segment *segment, uint32_t slot, uint64_t deadline)
{
    sd_slot *record = &segment->slots[slot];
    pthread_mutex_t *mutex = &record->mutex;
    int locked = sd_mutex_lock(mutex, deadline);
    if (locked != SD_OK && locked != SD_DIED) return locked;
    if (locked == SD_DIED) {
        uint64_t who = sd_load(&record->owner.who), pid = sd_load(&record->owner.pid);
        note_death(who, pid);
        sd_recover_slot(segment, slot, who, pid);
        /* Signed only after this: who dies in between must not pass for the one who had the
         * domain. */
        sd_publish(&record->owner.who, 0);
        sd_mutex_consistent(mutex);
    }
    int result = sd_slot_entered(segment, slot);
    if (result != SD_OK) sd_mutex_unlock(mutex);
    return result;
}

void sd_slot_leaving(sd_segment *segment, uint32_t slot, bool given)
{
    sd_slot *record = &segment->slots[slot];
    if (given && sd_load(&record->died_who)) sd_publish(&record->died_who, 0);
    sd_publish(&record->owner.who, 0);
    segment->held--;
    sd_self()->held--;
}

void sd_slot_unlock(sd_segment *segment, uint32_t slot, bool given)
{
    sd_slot_leaving(segment, slot, given);
    sd_mutex_unlock(&segment->slots[slot].mutex);
}

/* --- the core's own short locks -------------------------------------------------------------- */

/* Entering a short lock: repair if its holder died or a repair was put off; when that fails let go,
 * consistent all the same. */
static int entered_short(sd_segment *segment, pthread_mutex_t *mutex, sd_word *dirty, int locked,
                         int (*recover)(sd_segment *))
{
    if (locked != SD_OK && locked != SD_DIED) return locked;
    int result = SD_OK;
    if (locked == SD_DIED) note_death(0, 0);
    if (locked == SD_DIED || sd_load(dirty)) {
        sd_store(dirty, 1);
        if (recover(segment) == SD_OK) {
            sd_publish(dirty, 0);
            sd_self()->repair.repaired = true;
        } else {
            result = SD_POISONED;
        }
    }
    if (result == SD_OK && poisoned(segment)) result = SD_POISONED;
    if (locked == SD_DIED) sd_mutex_consistent(mutex);
    if (result != SD_OK) sd_mutex_unlock(mutex);
    return result;
}

int sd_ids_lock(sd_segment *segment, uint64_t deadline)
{
    sd_header *header = segment->header;
    sd_thread *self = sd_self();
    self->short_wait++;
    int locked = sd_mutex_lock(&header->id_mutex, deadline);
    self->short_wait--;
    return entered_short(segment, &header->id_mutex, &header->id_dirty, locked, sd_recover_ids);
}

void sd_ids_unlock(sd_segment *segment)
{
    sd_mutex_unlock(&segment->header->id_mutex);
}

int sd_heap_lock_briefly(sd_segment *segment)
{
    sd_header *header = segment->header;
    sd_thread *self = sd_self();
    self->short_wait++;
    int locked = sd_mutex_lock_briefly(&header->heap_mutex);
    self->short_wait--;
    return entered_short(segment, &header->heap_mutex, &header->heap_dirty, locked,
                         sd_recover_heap);
}

void sd_heap_unlock(sd_segment *segment)
{
    sd_mutex_unlock(&segment->header->heap_mutex);
}
