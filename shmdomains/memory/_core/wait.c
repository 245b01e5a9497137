/* wait.c - sleep until a word changes, and wake whoever sleeps on it.
 *
 * The kernel compares the low half of a word with what the sleeper saw, and puts it to sleep, as one
 * step as far as wakers can tell.  What remains is that writers do not want a system call for each
 * commit.  So a sleeper says first, in `waiting`, for which number it waits; rule W1 of layout.h
 * says why no sleeper is overlooked, and tests/model/waiting.py goes through every interleaving.
 *
 * A counter of sleepers instead would have to be counted down by the dead, and a flag that is cleared
 * hides a sleeper that set it a moment too early.
 */
#define _GNU_SOURCE
#include "wait.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half of a word comes first");

void sd_raise(sd_word *waiting, uint64_t number)
{
    uint64_t seen = sd_load(waiting);
    while (seen < number) {
        sd_crash_point();
        if (atomic_compare_exchange_weak(waiting, &seen, number)) break;
    }
    atomic_thread_fence(memory_order_seq_cst);
}

int sd_sleep(const sd_word *word, uint64_t seen, sd_word *waiting, uint64_t number,
             uint64_t deadline)
{
    struct timespec at = sd_slice_end(deadline);
    sd_raise(waiting, number);
    if (sd_load_acquire(word) != seen) return SD_OK;
    long slept = syscall(SYS_futex, word, FUTEX_WAIT_BITSET, (uint32_t)seen, &at, NULL,
                         FUTEX_BITSET_MATCH_ANY);
    if (!slept || errno == EAGAIN) return SD_OK;
    return sd_load_acquire(word) != seen ? SD_OK : SD_TIMEOUT;
}

void sd_wake(sd_word *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX);
}

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

static void open_gate_in_child(void)
{
    pthread_mutex_init(&gate, NULL);
}

__attribute__((constructor)) static void begin(void)
{
    pthread_atfork(NULL, NULL, open_gate_in_child);
}

void sd_gate_enter(void)
{
    pthread_mutex_lock(&gate);
}

void sd_gate_leave(void)
{
    pthread_mutex_unlock(&gate);
}

void sd_lower_damaged(sd_word *waiting, uint64_t raised, uint64_t largest)
{
    if (raised <= largest) return;
    sd_crash_point();
    atomic_compare_exchange_strong(waiting, &raised, largest);
}
