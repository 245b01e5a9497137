/* prefetch.h - fetch cache lines before they are used.  Hints: nothing depends on them. */
#ifndef SHMDOMAINS_PREFETCH_H
#define SHMDOMAINS_PREFETCH_H

#include "layout.h"

/* For a store.  gcc turns __builtin_prefetch(at, 1) into a prefetch for reading unless it is told
 * that the processor has the other one; a processor that has not ignores this instruction. */
static inline void sd_prefetch_store(const void *at)
{
#ifdef __x86_64__
    __asm__ volatile("prefetchw %0" : : "m"(*(const char *)at));
#else
    __builtin_prefetch(at, 1);
#endif
}

/* The lines of a blob; beyond a page the processor prefetches by itself. */
static inline void sd_prefetch_read(const sd_word *at, uint64_t bytes)
{
    const sd_word *end = at + (bytes < SD_PAGE ? bytes : SD_PAGE) / 8;
    for (; at < end; at += SD_CACHE_LINE / 8) __builtin_prefetch(at, 0);
}

static inline void sd_prefetch_write(const sd_word *at, uint64_t bytes)
{
    const sd_word *end = at + (bytes < SD_PAGE ? bytes : SD_PAGE) / 8;
    for (; at < end; at += SD_CACHE_LINE / 8) sd_prefetch_store(at);
}

#endif
