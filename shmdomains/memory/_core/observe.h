/* observe.h - watches: be told by a descriptor that a word of shared memory changed.
 *
 * For whoever must not sleep on the word: a thread that runs an event loop.  All of it belongs to
 * this process; the one thing that it ever stores into a segment is FUTEX_WAITERS (observe.c).
 *
 * A watch fires once, and is then on the list of its inbox, whose descriptor is readable while
 * anything is on that list.  It may fire with nothing changed, so whoever takes it looks for himself.
 * It may also be late without bound: a process that is killed between a store and its wake tells
 * nobody.  So whoever waits looks once a slice, too.
 *
 * Any thread may call any of these, but a signal handler.  In a forked child the watches and inboxes
 * of its parent are dead: their descriptors are closed before fork() returns, and every call on them
 * is allowed and does nothing.
 */
#ifndef SHMDOMAINS_OBSERVE_H
#define SHMDOMAINS_OBSERVE_H

#include "mutex.h"

#include <stdbool.h>
#include <stdint.h>

enum {
    SD_WATCH_CHANGE, /* fires when the word is not `seen`; who changes it wakes all (sd_wake()) */
    SD_WATCH_MUTEX,  /* sd_mutex_word(): fires when it is unlocked, or its holder died */
    SD_WATCH_TURN    /* the same, but others are let in first.  Begun while it is held, by us or
                        anybody: those who sleep for it are woken before us.  Begun while it is
                        free: it fires when one that had to wait has been there, or with nobody
                        there never; so the first is better */
};

typedef struct sd_inbox sd_inbox;
struct sd_helper;

typedef struct sd_link {
    struct sd_link *before, *after;
} sd_link;

/* Memory of the caller, all zero at first, which stays until the watch was taken or cancelled, and
 * so does the word.  `data` is the caller's, the rest is for observe.c. */
typedef struct sd_watch {
    sd_link link; /* on one of its inbox's two lists */
    sd_inbox *inbox;
    struct sd_helper *helper;
    unsigned slot;       /* of the helper */
    int state;
    uint64_t generation; /* of fork */
    void *data;
} sd_watch;

sd_inbox *sd_inbox_open(void); /* NULL: errno */
/* To be polled, and for nothing else; -1: the inbox is closed or a parent's. */
int sd_inbox_fd(const sd_inbox *inbox);
/* Cancels what is armed and forgets what fired.  The inbox must not be used after that. */
void sd_inbox_close(sd_inbox *inbox);
/* The watch that fired first of those that were not taken; it may begin again.  NULL: there is none,
 * and the descriptor is not readable before one fires.  So take until it is NULL, or come again. */
sd_watch *sd_inbox_take(sd_inbox *inbox);

/* `seen` counts for SD_WATCH_CHANGE only.  What is there already fires at once.  SD_OK, or SD_ERRNO:
 * EBUSY: this watch is armed, or was not taken; EINVAL: not a word; EBADF: the inbox is closed;
 * ENOMEM, EAGAIN: no memory, no thread, or too many of both: look again after a slice instead. */
int sd_watch_begin(sd_watch *watch, sd_inbox *inbox, uint32_t *word, uint32_t seen, int kind);
/* After that the watch is on no list, and it and its word may be freed.  Any state will do. */
void sd_watch_cancel(sd_watch *watch);

static inline uint32_t *sd_mutex_word(pthread_mutex_t *mutex)
{
    return (uint32_t *)&mutex->__data.__lock;
}

/* For the tests: from now on a thread for each watch, as where there is no futex_waitv(). */
void sd_observe_singly(bool singly);

#endif
