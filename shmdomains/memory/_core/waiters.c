/* waiters.c - who sleeps for a lock, and for how long waits lasted.
 *
 * A thread enters the table when it is about to sleep, and leaves it when the wait has ended; a lock
 * that is free costs nothing here.  It looks for a free place from one on that depends on its number,
 * so that many who come at once do not go through the same places; where there is none the table
 * grows by a page, up to its end; then a few places are asked whether their thread is dead.  Only a
 * few, for each question is a look into /proc, and the lock that is waited for may be free by then.
 * What it does not find is not looked for any longer: the thread waits without being listed.
 */
#define _GNU_SOURCE
#include "waiters.h"

#define DEAD_ASKED 8

static uint64_t sum_of(uint64_t who, uint64_t pid, uint64_t what, uint64_t since)
{
    uint64_t sum = who;
    const uint64_t words[] = {pid, what, since};
    for (int i = 0; i < 3; i++) {
        sum = (sum ^ words[i]) * 0x9e3779b97f4a7c15ull;
        sum ^= sum >> 29;
    }
    return sum;
}

static bool take(sd_waiter *waiter, uint64_t from, uint64_t me)
{
    if (sd_load(&waiter->who) != from) return false;
    sd_crash_point();
    return atomic_compare_exchange_strong(&waiter->who, &from, me);
}

static uint32_t find_place(sd_segment *segment, uint64_t me)
{
    sd_word *watermark = &segment->header->waiters_committed;
    uint32_t room, start = 0;
    for (;;) {
        room = sd_waiters(segment);
        if (room) start = sd_who_tid(me) % room;
        for (uint32_t i = 0; i < room; i++) {
            uint32_t place = (start + i) % room;
            if (take(&segment->waiters[place], 0, me)) return place;
        }
        if (room == SD_WAITERS_MAX) break;
        if (!sd_make_room(segment, watermark, segment->at.waiters, sizeof(sd_waiter), room + 1,
                          SD_WAITERS_MAX))
            break;
    }
    for (uint32_t i = 0; i < DEAD_ASKED && i < room; i++) {
        uint32_t place = (start + i) % room;
        uint64_t who = sd_load(&segment->waiters[place].who);
        if (who == me) continue; /* another task of this thread */
        if (!sd_alive(who) && take(&segment->waiters[place], who, me)) return place;
    }
    return SD_WAITERS_MAX;
}

void sd_wait_note(sd_wait *wait, sd_segment *segment, int kind, uint32_t number, void *list)
{
    sd_thread *self = sd_self();
    uint64_t what = (uint64_t)kind | (uint64_t)number << 32, now = sd_now();
    *wait = (sd_wait){.segment = segment, .epoch = sd_fork_epoch, .who = self->who, .since = now,
                      .kind = kind, .number = number, .list = list};
    wait->place = find_place(segment, self->who);
    if (wait->place == SD_WAITERS_MAX) {
        sd_count(&segment->counters->unlisted);
        return;
    }
    sd_waiter *waiter = &segment->waiters[wait->place];
    sd_store(&waiter->pid, self->pid);
    sd_store(&waiter->what, what);
    sd_store(&waiter->since, now);
    sd_publish(&waiter->sum, sum_of(self->who, self->pid, what, now));
}

static void count_wait(sd_counters *counters, uint64_t ns)
{
    uint64_t us = ns / 1000;
    int size = us ? 64 - __builtin_clzll(us) : 0;
    sd_count(&counters->contended);
    sd_count(&counters->waits[size < SD_WAIT_SIZES ? size : SD_WAIT_SIZES - 1]);
}

void sd_wait_forget(sd_wait *wait)
{
    if (wait->epoch != sd_fork_epoch) return; /* a handler forked: the wait is the parent's */
    if (wait->place < SD_WAITERS_MAX) {
        sd_waiter *waiter = &wait->segment->waiters[wait->place];
        sd_store(&waiter->sum, 0); /* this wait must not pass for this thread's next one */
        take(waiter, wait->who, 0);
    }
    count_wait(wait->segment->counters, sd_now() - wait->since);
}

void sd_wait_begin(sd_wait *wait, sd_segment *segment, int kind, uint32_t number, void *list)
{
    sd_thread *self = sd_self();
    sd_wait_note(wait, segment, kind, number, list);
    wait->outer = self->wait;
    self->wait = wait;
}

void sd_wait_end(sd_wait *wait)
{
    if (wait->epoch != sd_fork_epoch) return;
    sd_self()->wait = wait->outer;
    sd_wait_forget(wait);
}

uint32_t sd_waiters(const sd_segment *segment)
{
    return (uint32_t)sd_room(&segment->header->waiters_committed, SD_WAITERS_MAX);
}

bool sd_waiter_get(const sd_segment *segment, uint32_t place, sd_waiting *out)
{
    const sd_waiter *waiter = &segment->waiters[place];
    uint64_t sum = sd_load_acquire(&waiter->sum);
    uint64_t what = sd_load(&waiter->what);
    out->pid = sd_load(&waiter->pid);
    out->since = sd_load(&waiter->since);
    out->who = sd_load(&waiter->who);
    out->kind = (int)(what & 0xffffffff);
    out->number = (uint32_t)(what >> 32);
    return out->who && sum == sum_of(out->who, out->pid, what, out->since);
}
