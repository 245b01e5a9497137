/* pack.c - MessagePack, as much of it as counting in a driver's data takes (pack.h). */
#include "pack.h"

#include <string.h>

/* Big-endian numbers of 1, 2, 4 and 8 bytes. */
static uint64_t big(const unsigned char *at, unsigned bytes)
{
    uint64_t value = 0;
    while (bytes--) value = value << 8 | *at++;
    return value;
}

static unsigned char *put_big(unsigned char *to, unsigned char head, uint64_t value, unsigned bytes)
{
    *to++ = head;
    for (unsigned i = bytes; i-- > 0;) *to++ = (unsigned char)(value >> 8 * i);
    return to;
}

/* --- reading --------------------------------------------------------------------------------- */

static const unsigned char *unsigned_number(sd_token *token, uint64_t value,
                                            const unsigned char *end)
{
    token->kind = value > INT64_MAX ? SD_PACK_UNSIGNED : SD_PACK_INT;
    token->number = (int64_t)value;
    return end;
}

static const unsigned char *number(sd_token *token, int64_t value, const unsigned char *end)
{
    token->kind = SD_PACK_INT;
    token->number = value;
    return end;
}

static const unsigned char *bare(sd_token *token, int kind, uint64_t size, const unsigned char *end)
{
    token->kind = kind;
    token->size = size;
    return end;
}

static const unsigned char *real(sd_token *token, const unsigned char *at, unsigned bytes)
{
    uint64_t wide = big(at, bytes);
    uint32_t narrow = (uint32_t)wide;
    float single;
    token->kind = SD_PACK_FLOAT;
    if (bytes == 8) {
        memcpy(&token->real, &wide, 8);
    } else {
        memcpy(&single, &narrow, 4);
        token->real = single;
    }
    return at + bytes;
}

/* `size` bytes at `at`, behind their head. */
static const unsigned char *run(sd_token *token, int kind, uint64_t size, const unsigned char *at,
                                const unsigned char *end)
{
    token->kind = kind;
    token->bytes = at;
    token->size = size;
    return size <= (uint64_t)(end - at) ? at + size : NULL;
}

const unsigned char *sd_pack_next(const unsigned char *at, const unsigned char *end,
                                  sd_token *token)
{
    /* Bytes of number or length that follow the heads 0xc0 to 0xdf. */
    static const unsigned char FOLLOW[32] = {0, 0, 0, 0, 1, 2, 4, 1, 2, 4, 4, 8, 1, 2, 4, 8,
                                             1, 2, 4, 8, 0, 0, 0, 0, 0, 1, 2, 4, 2, 4, 2, 4};
    if (at >= end) return NULL;
    const unsigned char head = *at++;
    if (head < 0x80) return number(token, head, at);
    if (head < 0x90) return bare(token, SD_PACK_MAP, head & 15, at);
    if (head < 0xa0) return bare(token, SD_PACK_ARRAY, head & 15, at);
    if (head < 0xc0) return run(token, SD_PACK_STR, head & 31, at, end);
    if (head >= 0xe0) return number(token, (int8_t)head, at);
    const unsigned follow = FOLLOW[head - 0xc0];
    if (follow > (uint64_t)(end - at)) return NULL;
    const uint64_t value = big(at, follow);
    const unsigned char *next = at + follow;
    switch (head) {
    case 0xc0: return bare(token, SD_PACK_NIL, 0, next);
    case 0xc2: return bare(token, SD_PACK_FALSE, 0, next);
    case 0xc3: return bare(token, SD_PACK_TRUE, 0, next);
    case 0xc4: case 0xc5: case 0xc6: return run(token, SD_PACK_BIN, value, next, end);
    case 0xc7: case 0xc8: case 0xc9: return run(token, SD_PACK_EXT, value + 1, next, end);
    case 0xca: case 0xcb: return real(token, at, follow);
    case 0xcc: case 0xcd: case 0xce: case 0xcf: return unsigned_number(token, value, next);
    case 0xd0: return number(token, (int8_t)value, next);
    case 0xd1: return number(token, (int16_t)value, next);
    case 0xd2: return number(token, (int32_t)value, next);
    case 0xd3: return number(token, (int64_t)value, next);
    case 0xd4: case 0xd5: case 0xd6: case 0xd7: case 0xd8:
        return run(token, SD_PACK_EXT, (1u << (head - 0xd4)) + 1, next, end);
    case 0xd9: case 0xda: case 0xdb: return run(token, SD_PACK_STR, value, next, end);
    case 0xdc: case 0xdd: return bare(token, SD_PACK_ARRAY, value, next);
    case 0xde: case 0xdf: return bare(token, SD_PACK_MAP, value, next);
    default: return NULL; /* 0xc1, which is nothing */
    }
}

/* Behind a value and all that is in it. */
static const unsigned char *skip(const unsigned char *at, const unsigned char *end)
{
    sd_token token;
    for (uint64_t left = 1; left && at; left--) {
        at = sd_pack_next(at, end, &token);
        if (!at) return NULL;
        if (token.kind == SD_PACK_ARRAY) left += token.size;
        if (token.kind == SD_PACK_MAP) left += 2 * token.size;
    }
    return at;
}

#define PLAIN_DEPTH 100

/* Behind a value that is plain; NULL: it is not. */
static const unsigned char *plain(const unsigned char *at, const unsigned char *end, int depth)
{
    sd_token token, key;
    at = sd_pack_next(at, end, &token);
    if (!at || token.kind == SD_PACK_EXT || !depth) return NULL;
    const bool is_map = token.kind == SD_PACK_MAP;
    if (!is_map && token.kind != SD_PACK_ARRAY) return at;
    for (uint64_t left = token.size; left && at; left--) {
        if (is_map) {
            at = sd_pack_next(at, end, &key);
            if (!at || key.kind != SD_PACK_STR) return NULL;
        }
        at = plain(at, end, depth - 1);
    }
    return at;
}

bool sd_pack_plain(const unsigned char *at, uint64_t bytes)
{
    return plain(at, at + bytes, PLAIN_DEPTH) == at + bytes;
}

/* --- writing --------------------------------------------------------------------------------- */

unsigned char *sd_pack_unsigned(unsigned char *to, uint64_t value)
{
    if (value >> 32) return put_big(to, 0xcf, value, 8);
    if (value >> 16) return put_big(to, 0xce, value, 4);
    if (value >> 8) return put_big(to, 0xcd, value, 2);
    if (value >> 7) return put_big(to, 0xcc, value, 1);
    return put_big(to, (unsigned char)value, 0, 0);
}

unsigned char *sd_pack_int(unsigned char *to, int64_t value)
{
    if (value >= 0) return sd_pack_unsigned(to, (uint64_t)value);
    if (value >= -32) return put_big(to, (unsigned char)value, 0, 0);
    if (value >= INT8_MIN) return put_big(to, 0xd0, (uint64_t)value, 1);
    if (value >= INT16_MIN) return put_big(to, 0xd1, (uint64_t)value, 2);
    if (value >= INT32_MIN) return put_big(to, 0xd2, (uint64_t)value, 4);
    return put_big(to, 0xd3, (uint64_t)value, 8);
}

unsigned char *sd_pack_float(unsigned char *to, double value)
{
    uint64_t word;
    memcpy(&word, &value, 8);
    return put_big(to, 0xcb, word, 8);
}

unsigned char *sd_pack_str(unsigned char *to, const void *bytes, uint32_t size)
{
    if (size < 32) to = put_big(to, (unsigned char)(0xa0 | size), 0, 0);
    else if (size < 1u << 8) to = put_big(to, 0xd9, size, 1);
    else if (size < 1u << 16) to = put_big(to, 0xda, size, 2);
    else to = put_big(to, 0xdb, size, 4);
    memcpy(to, bytes, size);
    return to + size;
}

unsigned char *sd_pack_bin(unsigned char *to, const void *bytes, uint32_t size)
{
    if (size < 1u << 8) to = put_big(to, 0xc4, size, 1);
    else if (size < 1u << 16) to = put_big(to, 0xc5, size, 2);
    else to = put_big(to, 0xc6, size, 4);
    memcpy(to, bytes, size);
    return to + size;
}

unsigned char *sd_pack_map(unsigned char *to, uint32_t pairs)
{
    if (pairs < 16) return put_big(to, (unsigned char)(0x80 | pairs), 0, 0);
    if (pairs < 1u << 16) return put_big(to, 0xde, pairs, 2);
    return put_big(to, 0xdf, pairs, 4);
}

/* --- counting -------------------------------------------------------------------------------- */

/* Where the value of `key` begins in a map whose pairs are all that is between `at` and `end`; of
 * several, the last one: that is what a reader gets.  NULL: it has none.  False: not MessagePack. */
static bool value_of(const unsigned char *at, const unsigned char *end, uint64_t pairs,
                     const void *key, uint32_t key_size, const unsigned char **value)
{
    sd_token token;
    *value = NULL;
    for (; pairs && at; pairs--) {
        const unsigned char *next = sd_pack_next(at, end, &token);
        if (next && token.kind == SD_PACK_STR) {
            if (token.size == key_size && !memcmp(token.bytes, key, key_size)) *value = next;
        } else {
            next = skip(at, end);
        }
        at = next ? skip(next, end) : NULL;
    }
    return at == end;
}

static bool is_number(const sd_token *token)
{
    return token->kind == SD_PACK_INT || token->kind == SD_PACK_UNSIGNED;
}

/* False: the sum is no number of MessagePack's. */
static bool add(sd_token *sum, int64_t by)
{
    uint64_t was = (uint64_t)sum->number, beyond;
    int64_t total;
    if (sum->kind == SD_PACK_INT) {
        if (!__builtin_add_overflow(sum->number, by, &total)) return number(sum, total, NULL), true;
        if (by < 0) return false;
    }
    if (__builtin_add_overflow(was, by, &beyond)) return false;
    unsigned_number(sum, beyond, NULL);
    return true;
}

static unsigned char *put_number(unsigned char *to, const sd_token *token)
{
    return token->kind == SD_PACK_INT ? sd_pack_int(to, token->number)
                                      : sd_pack_unsigned(to, (uint64_t)token->number);
}

int sd_pack_add(const unsigned char *from, uint64_t bytes, const void *key, uint32_t key_size,
                int64_t by, unsigned char *to, uint64_t *size, sd_token *sum)
{
    sd_token map;
    unsigned char *begin = to;
    const unsigned char *end = from + bytes, *pairs = sd_pack_next(from, end, &map);
    if (!pairs) return SD_CORRUPT;
    sum->kind = map.kind;
    if (map.kind != SD_PACK_MAP) return SD_MISS;
    const unsigned char *value;
    if (!value_of(pairs, end, map.size, key, key_size, &value)) return SD_CORRUPT;
    if (value) {
        const unsigned char *rest = sd_pack_next(value, end, sum);
        if (!is_number(sum)) return SD_MISMATCH;
        if (!add(sum, by)) return SD_FULL;
        memcpy(to, from, (size_t)(value - from));
        to = put_number(to + (value - from), sum);
        memcpy(to, rest, (size_t)(end - rest));
        *size = (uint64_t)(to + (end - rest) - begin);
        return SD_OK;
    }
    *sum = (sd_token){.kind = SD_PACK_INT, .number = by};
    to = sd_pack_map(to, (uint32_t)map.size + 1);
    memcpy(to, pairs, (size_t)(end - pairs));
    to = sd_pack_str(to + (end - pairs), key, key_size);
    *size = (uint64_t)(put_number(to, sum) - begin);
    return SD_OK;
}
