/* wait.h - sleep until a word changes, and wake whoever sleeps on it (layout.h, W1). */
#ifndef SHMDOMAINS_WAIT_H
#define SHMDOMAINS_WAIT_H

#include "mutex.h"

/* Sleep until `*word` is not `seen` any more, a slice at most, or until a signal comes.  `number` is
 * what makes the change known: `waiting` is raised to it first.  SD_OK: it changed, or may have;
 * SD_TIMEOUT: the slice is over.  No lock that a writer needs may be held. */
int sd_sleep(const sd_word *word, uint64_t seen, sd_word *waiting, uint64_t number,
             uint64_t deadline);
/* What sd_sleep() does first, for whoever looks at more than the word before it sleeps; a full fence
 * is part of it. */
void sd_raise(sd_word *waiting, uint64_t number);
/* Everybody who sleeps on the word. */
void sd_wake(sd_word *word);
/* After a slow wake: a number that no waiter can have stored is damage, and would cost every writer
 * a system call. */
void sd_lower_damaged(sd_word *waiting, uint64_t largest);

/* The writer's side: the word was just counted up to `last`; `first` is the number that came after
 * the old one.  The caller has a full fence between that store and this call. */
static inline void sd_tell(sd_word *word, sd_word *waiting, uint64_t first, uint64_t last)
{
    if (__builtin_expect(sd_load(waiting) < first, 1)) return;
    sd_wake(word);
    sd_lower_damaged(waiting, last + 1);
}

#endif
