/* waiters.h - who sleeps for a lock: for people who ask what is stuck (layout.h, V1). */
#ifndef SHMDOMAINS_WAITERS_H
#define SHMDOMAINS_WAITERS_H

#include "mutex.h"
#include "segment.h"

/* A wait of this thread, on its stack while it lasts; a task's lies elsewhere. */
typedef struct sd_wait {
    sd_segment *segment;
    uint64_t epoch;        /* of fork: in a child the wait is its parent's */
    uint64_t who;
    uint64_t since;        /* sd_now() */
    int kind;              /* SD_LOCK_* */
    uint32_t number;
    uint32_t place;        /* in the table; SD_WAITERS_MAX: not listed */
    bool told;             /* that it is slow: once a wait */
    bool told_loop;        /* and that it stops an event loop */
    void *list;            /* the binding's object that waits */
    struct sd_wait *outer; /* the wait that a signal handler of this thread interrupted */
} sd_wait;

/* Before the first slice, and after the last one, however the wait ended. */
void sd_wait_begin(sd_wait *wait, sd_segment *segment, int kind, uint32_t number, void *list);
void sd_wait_end(sd_wait *wait);
/* The same for a task, beside which others of its thread wait and run. */
void sd_wait_note(sd_wait *wait, sd_segment *segment, int kind, uint32_t number, void *list);
void sd_wait_forget(sd_wait *wait);

/* What a place of the table says. */
typedef struct {
    uint64_t who, pid, since;
    int kind;
    uint32_t number;
} sd_waiting;

/* How many places there are to look at. */
uint32_t sd_waiters(const sd_segment *segment);
/* False: nobody, or somebody who is just coming or going, or damage.  Who it is may be dead. */
bool sd_waiter_get(const sd_segment *segment, uint32_t place, sd_waiting *out);

#endif
