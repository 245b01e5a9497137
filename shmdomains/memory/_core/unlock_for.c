/* unlock_for.c - free a robust mutex that another thread of this process holds.
 *
 * pthread_mutex_unlock() is the owner's alone: a robust mutex stands in the list that the kernel
 * walks when its owner dies, and only the owner changes that list.  But a handle may be dropped in
 * another thread while the owner sleeps somewhere for hours.  Then whoever drops it does here what
 * glibc's unlock does, on the owner's list.  The list is doubly linked (LP64), its head is known to
 * the kernel (get_robust_list), and the GIL stands in for a lock of it:
 *
 * 1. The core takes and frees mutexes under the GIL, but for the slices of a wait.  The owner says
 *    that it is in one (`in_slice`, which changes under the GIL); then it is left alone, and frees
 *    the mutex after the slice.  Otherwise it is in Python, asks for the GIL, or is in somebody
 *    else's code, and no operation of ours on its list is under way.  So it is, too, where a signal
 *    handler runs between two slices: the slice has ended, and nothing is pending.
 * 2. The owner cannot end meanwhile: the last thing of ours that an ending thread does waits for
 *    sd_thread_let_go().  So its list's head, which is memory of that thread, stays.
 * 3. What stands in the list must be ours, all of it: in a mapping of ours, with our kind, and named
 *    as this thread's.  If anything else does, or an operation is pending, the owner is in the
 *    middle of code with robust mutexes of its own (LMDB has some), and is left alone.
 *
 * What remains is such code that *begins* to lock one of its own, without the GIL, after we looked.
 * Locking puts a mutex first: it reads the head's `next`, stores `prev` of the one that was first,
 * `next` and `prev` of its own, then the head's `next`.  Unlocking that one again stores `prev` of
 * what follows, then the head's `next`.  So
 *
 * - the walk is safe: it reads the head once, and the `next` of ours, which nobody else changes;
 * - where ours is not the first, the four words that we touch are no words of theirs;
 * - where ours is the first (take_first), the head's `next` is changed by compare-and-swap.  If it
 *    was read before that, and is used after it, ours is back in the list, behind theirs.  That is
 *    seen: whoever locks says so in `list_op_pending` before it reads and until it has stored, a
 *    barrier in all threads (membarrier) has it see our change or us see its word, and it stores
 *    `prev` of ours, where we left 0.  In that case we give up: the list is as if we had not been
 *    there.  tests/model/unlock_for.py goes through every interleaving of it.
 *
 * An owner that has said so may wait for the mutex that it asks for; it reads the head afterwards, so
 * we need not wait for it when it sleeps.  What is left open: an owner that is neither asleep nor
 * gets a processor for a whole slice, just between these few instructions of foreign code, which has
 * to have begun within the few microseconds of ours.
 *
 * SIGKILL may come between any two stores.  The kernel goes by `next` only, and each store leaves a
 * list that is whole, with the mutex or without it.  Without it, the mutex names a thread that has
 * died, and nobody marks it: whoever waits for it sees after a slice that this thread does not run,
 * and buries it (mutex.c, 5.).  Its signature is cleared last, right before the mutex is freed, so it
 * is taken for exactly that thread.  The word is freed by compare-and-swap: where the kernel, which
 * had begun to walk the list as the process died, has marked the death already, the mark stays.
 */
#define _GNU_SOURCE
#include "unlock_for.h"

#include <errno.h>
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

#if __SIZEOF_POINTER__ == 8 && __PTHREAD_MUTEX_HAVE_PREV

#define LIST_LIMIT 2048 /* as the kernel's */

/* glibc's list: `next` and `prev` of each hold the address of another one's `next`.  The head is of
 * the same shape. */
typedef struct {
    uintptr_t prev, next;
} entry;

_Static_assert(sizeof(((pthread_mutex_t *)0)->__data.__list) == sizeof(entry), "two pointers");

static entry *entry_at(uintptr_t address)
{
    return (entry *)(address - offsetof(entry, next));
}

static uintptr_t address_of(entry *at)
{
    return (uintptr_t)&at->next;
}

static uintptr_t get(const uintptr_t *from)
{
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

static void put(uintptr_t *to, uintptr_t value)
{
    sd_crash_point();
    __atomic_store_n(to, value, __ATOMIC_SEQ_CST);
}

static bool swap(uintptr_t *at, uintptr_t from, uintptr_t to)
{
    sd_crash_point();
    return __atomic_compare_exchange_n(at, &from, to, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* A full barrier in every thread of this process that runs now. */
static bool barrier_in_all(void)
{
    return !syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
}

static bool has_barrier(void)
{
    return !syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0)
           && barrier_in_all();
}

/* The mutex whose entry has this address is one of ours, and the thread's. */
static bool is_ours(uintptr_t address, uint32_t tid)
{
    const pthread_mutex_t *mutex =
        (const pthread_mutex_t *)(address - offsetof(pthread_mutex_t, __data.__list.__next));
    return address % sizeof address == 0 && sd_is_mapped(mutex, sizeof *mutex)
           && sd_mutex_sound(mutex) && sd_mutex_owner(mutex) == tid;
}

/* Everything in the list is ours, and `wanted` is in it: then what comes before it, else NULL. */
static entry *before(entry *head, uintptr_t wanted, uint32_t tid)
{
    entry *at = head, *found = NULL;
    for (int n = 0; n <= LIST_LIMIT; n++) {
        uintptr_t next = get(&at->next);
        if (next == address_of(head)) return found;
        if (!is_ours(next, tid)) return NULL;
        if (next == wanted) found = at;
        at = entry_at(next);
    }
    return NULL;
}

/* Until the thread is in the middle of no operation on its list that began before this call. */
static void settle(const struct robust_list_head *head, uint32_t tid, uint64_t until)
{
    const struct timespec moment = {0, 20000};
    for (;;) {
        barrier_in_all();
        if (!__atomic_load_n(&head->list_op_pending, __ATOMIC_ACQUIRE)) break;
        if (sd_sleeps(tid) || sd_now() >= until) break;
        nanosleep(&moment, NULL);
    }
    barrier_in_all();
}

/* The thread may be locking a mutex of its own at any moment.  False: it did, and ours is in the list
 * as before, or behind that one.
 *
 * `prev` of ours is the head at first, and says nothing: it becomes 0, and after another look it is
 * still 0 unless something was put before ours.  That it is the head again means that what was put
 * there is gone, or is about to be. */
static bool take_first(struct robust_list_head *list, entry *head, entry *ours, entry *after,
                       uint32_t tid)
{
    uint64_t until = sd_now() + SD_SLICE_NS;
    uintptr_t first = address_of(head), mine = address_of(ours);
    if (!swap(&head->next, mine, address_of(after))) return false;
    for (;;) {
        settle(list, tid, until);
        uintptr_t next = get(&head->next);
        barrier_in_all();
        uintptr_t prev = get(&ours->prev);
        if (next == mine) {
            swap(&ours->prev, 0, first);
            return false;
        }
        if (!prev) break;
        if (prev != first) return false;
        swap(&ours->prev, first, 0);
    }
    swap(&after->prev, mine, first); /* else something was put before that one */
    return true;
}

static bool take_off(pthread_mutex_t *mutex, uint32_t tid)
{
    struct robust_list_head *list = NULL;
    entry *ours = (entry *)&mutex->__data.__list;
    size_t size = 0;
    if (!sd_mutex_sound(mutex) || sd_mutex_owner(mutex) != tid) return false;
    if (__atomic_load_n(&mutex->__data.__owner, __ATOMIC_RELAXED) != (int)tid) return false;
    if (syscall(SYS_get_robust_list, tid, &list, &size) || !list || size != sizeof *list)
        return false;
    if (list->futex_offset != (long)offsetof(pthread_mutex_t, __data.__lock)
                                  - (long)offsetof(pthread_mutex_t, __data.__list.__next))
        return false;
    if (!has_barrier() || __atomic_load_n(&list->list_op_pending, __ATOMIC_ACQUIRE)) return false;
    entry *head = entry_at((uintptr_t)&list->list);
    entry *prev = before(head, address_of(ours), tid);
    if (!prev || get(&ours->prev) != address_of(prev)) return false;
    entry *after = entry_at(get(&ours->next));
    if (get(&after->prev) != address_of(ours)) return false;
    if (prev == head) {
        if (!take_first(list, head, ours, after, tid)) return false;
    } else {
        put(&after->prev, address_of(prev));
        put(&prev->next, address_of(after));
        put(&ours->prev, 0);
    }
    put(&ours->next, 0);
    return true;
}

#else

static bool take_off(pthread_mutex_t *mutex, uint32_t tid)
{
    (void)mutex;
    (void)tid;
    return false;
}

#endif

int sd_mutex_take_off_for(pthread_mutex_t *mutex, const sd_thread *thread, uint64_t nonce)
{
    if (thread->in_slice) return SD_TIMEOUT;
    if (!sd_thread_keep(thread, nonce)) return SD_MISS;
    if (take_off(mutex, sd_who_tid(thread->who))) return SD_OK;
    sd_thread_let_go();
    return SD_MISS;
}

/* Of the pthread functions only unlock frees a mutex, and it asks who calls. */
void sd_mutex_release_for(pthread_mutex_t *mutex, const sd_thread *thread)
{
    uint32_t tid = sd_who_tid(thread->who);
    uint32_t *lock = (uint32_t *)&mutex->__data.__lock;
    uint32_t word = __atomic_load_n(lock, __ATOMIC_RELAXED);
    sd_crash_point();
    mutex->__data.__nusers--;
    sd_crash_point();
    __atomic_store_n(&mutex->__data.__owner, 0, __ATOMIC_RELAXED);
    sd_crash_point();
    while ((word & (FUTEX_TID_MASK | FUTEX_OWNER_DIED)) == tid) {
        if (!__atomic_compare_exchange_n(lock, &word, 0, false, __ATOMIC_RELEASE,
                                         __ATOMIC_RELAXED))
            continue;
        if (word & FUTEX_WAITERS) syscall(SYS_futex, lock, FUTEX_WAKE, 1, NULL, NULL, 0);
        break;
    }
    sd_thread_let_go();
}
