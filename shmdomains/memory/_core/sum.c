/* sum.c - the checksum of a blob.
 *
 * It covers the bytes, the domain, the kind and the version.  Any one flipped bit, and any damage to
 * up to 32 neighbouring bits, changes it for sure; other damage passes by chance, one in 2^64 (with
 * CRC-32C: one in 2^32 or fewer).  It is no defence against somebody who wants to pass: whoever may
 * write the segment is trusted.
 *
 * Four lanes, because each step of one takes longer than starting the next one; four variables,
 * because the compiler would keep an array in memory.  A step is one instruction where the processor
 * has CRC-32C, four elsewhere.  A blob is summed while it is copied into the heap: both read it once.
 */
#include "sum.h"

typedef struct {
    uint64_t p, q, r, s;
} lanes;

static inline uint64_t stir(uint64_t h, uint64_t word)
{
    return ((h << 5 | h >> 59) ^ word) * 0x9e3779b97f4a7c15ull;
}

#define KEEP(n, word) sd_store(to + (n), word)
#define DROP(n, word) (void)to

/* The four functions below. */
#define LANES(name, target, step, put)                                                           \
    target static lanes name(lanes at, const unsigned char *bytes, uint64_t size, sd_word *to)   \
    {                                                                                            \
        uint64_t p = at.p, q = at.q, r = at.r, s = at.s;                                         \
        for (; size >= 32; size -= 32, bytes += 32, to += 4) {                                   \
            const uint64_t a = sd_bytes(bytes, 8), b = sd_bytes(bytes + 8, 8);                   \
            const uint64_t c = sd_bytes(bytes + 16, 8), d = sd_bytes(bytes + 24, 8);             \
            put(0, a), put(1, b), put(2, c), put(3, d);                                          \
            p = step(p, a), q = step(q, b), r = step(r, c), s = step(s, d);                      \
        }                                                                                        \
        for (; size > 8; size -= 8, bytes += 8, to++) {                                          \
            const uint64_t a = sd_bytes(bytes, 8);                                               \
            put(0, a), p = step(p, a);                                                           \
        }                                                                                        \
        const uint64_t last = sd_bytes(bytes, size);                                             \
        if (size) put(0, last);                                                                  \
        return (lanes){step(p, last), q, r, s};                                                  \
    }

LANES(stirred, , stir, DROP)
LANES(stirred_in, , stir, KEEP)

#ifdef __x86_64__
#define SSE42 __attribute__((target("sse4.2")))
LANES(crc, SSE42, __builtin_ia32_crc32di, DROP)
LANES(crc_in, SSE42, __builtin_ia32_crc32di, KEEP)

bool sd_sums_by_crc(void)
{
    return __builtin_cpu_supports("sse4.2");
}
#else
#define crc stirred
#define crc_in stirred_in

bool sd_sums_by_crc(void)
{
    return false;
}
#endif

static inline lanes begin(const uint64_t uuid[2], int blob, uint64_t version, uint64_t size)
{
    uint64_t kind = blob < SD_DATA ? 0 : (uint64_t)blob - 1;
    return (lanes){uuid[0] ^ size, uuid[1], kind, version};
}

/* A CRC has only 32 bits, and knows only those of what it began with. */
static inline uint64_t joined(lanes first, lanes last)
{
    uint64_t h = stir(first.p, last.p);
    h = stir(h ^ h >> 29, first.q);
    h = stir(h ^ h >> 29, last.q);
    h = stir(h ^ h >> 29, first.r << 32 ^ last.r);
    h = stir(h ^ h >> 29, first.s);
    h = stir(h ^ h >> 29, last.s);
    return h ^ h >> 32;
}

uint64_t sd_blob_sum(const uint64_t uuid[2], int blob, uint64_t version, const void *bytes,
                     uint64_t size)
{
    lanes first = begin(uuid, blob, version, size);
    return joined(first, sd_sums_by_crc() ? crc(first, bytes, size, NULL)
                                          : stirred(first, bytes, size, NULL));
}

void sd_blob_put(sd_word *to, const uint64_t uuid[2], int blob, uint64_t version, const void *bytes,
                 uint64_t size)
{
    lanes first = begin(uuid, blob, version, size);
    sd_store(to, joined(first, sd_sums_by_crc() ? crc_in(first, bytes, size, to + 1)
                                                : stirred_in(first, bytes, size, to + 1)));
}
