/* lines.h - prefetches that can be counted.
 *
 * A tracer of loads and stores does not see a prefetch.  So this stands in for the core's
 * prefetch.h (-include): what is asked for becomes an access to the same place of a shadow of the
 * segment, a load where it is asked for to be read, a store where it is asked for to be written.
 */
#ifndef SHMDOMAINS_PREFETCH_H
#define SHMDOMAINS_PREFETCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

extern uintptr_t lines_base, lines_size;   /* of the segment; size 0: nothing is counted yet */
extern volatile unsigned char *lines_shadow;

static inline void lines_ask(const void *at, bool to_store)
{
    uintptr_t offset = (uintptr_t)at - lines_base;
    if (offset >= lines_size) return;
    if (to_store) lines_shadow[offset] = 1;
    else (void)lines_shadow[offset];
}

#define __builtin_prefetch(at, ...) lines_ask(at, false)

static inline void sd_prefetch_store(const void *at)
{
    lines_ask(at, true);
}

static inline void sd_prefetch_read(const _Atomic uint64_t *at, uint64_t bytes)
{
    const _Atomic uint64_t *end = at + (bytes < 4096 ? bytes : 4096) / 8;
    for (; at < end; at += 8) lines_ask((const void *)at, false);
}

static inline void sd_prefetch_write(const _Atomic uint64_t *at, uint64_t bytes)
{
    const _Atomic uint64_t *end = at + (bytes < 4096 ? bytes : 4096) / 8;
    for (; at < end; at += 8) lines_ask((const void *)at, true);
}

#endif
