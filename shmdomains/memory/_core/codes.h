/* codes.h - what a function of the core answers, and how long it may wait.
 *
 * Every function that can fail returns one of the SD_ codes; SD_OK is 0.
 */
#ifndef SHMDOMAINS_CODES_H
#define SHMDOMAINS_CODES_H

#include <features.h>
#include <stdint.h>

#if !defined __linux__ || !defined __GLIBC__ || !__GLIBC_PREREQ(2, 30)
#error "shmdomains needs Linux and the GNU C library 2.30 or newer (robust mutexes)"
#endif

enum {
    SD_OK = 0,
    SD_DIED,        /* locked, and the holder before us died */
    SD_TIMEOUT,     /* the deadline passed */
    SD_INTERRUPTED, /* the wait hook wants out (a signal handler raised) */
    SD_NESTED,      /* this very thread has it: a signal handler asks in the middle of a wait */
    SD_FORKED,      /* a signal handler forked in the middle of a wait, and this is the child */
    SD_MISS,        /* not there */
    SD_DOUBT,       /* not seen, but writers came in between: look again under the lock */
    SD_FULL,        /* no slot, no cell, no id left within the limits */
    SD_NO_MEMORY,   /* the system would not commit more memory (errno says why) */
    SD_CORRUPT,     /* a value in the segment is impossible */
    SD_POISONED,    /* the segment says that a repair failed */
    SD_MISMATCH,    /* another layout, machine, boot, PID namespace: see sd_map() */
    SD_ERRNO,       /* a system call failed; errno */
    SD_DESCRIPTOR   /* the segment's descriptor is needed, and it is not ours any more */
};

enum { SD_POISON_LIST = 1, SD_POISON_IDS = 2, SD_POISON_HEAP = 3 };

/* Deadlines are of sd_now(). */
#define SD_FOREVER UINT64_MAX
#define SD_TRY 0ull
#define SD_SPIN 1ull /* try, spin for a moment, and do not sleep */
#define SD_SLICE_NS 50000000ull /* one lock slice: 50 ms */
#define SD_HELD_MAX 1000

#endif
