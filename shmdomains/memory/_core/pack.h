/* pack.h - MessagePack, as much of it as counting in a driver's data takes.
 *
 * The data of a domain is MessagePack (spec.md of github.com/msgpack).  Two things are done with it
 * often enough to be done here: small flat values become bytes and back (flat.pxi), and a number in
 * a map is added to without a look at the rest.  All else is msgpack's.  The bytes are those that
 * msgpack for Python writes: the shortest form of each value.
 */
#ifndef SHMDOMAINS_PACK_H
#define SHMDOMAINS_PACK_H

#include "codes.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    SD_PACK_NIL,
    SD_PACK_FALSE,
    SD_PACK_TRUE,
    SD_PACK_INT,      /* `number` */
    SD_PACK_UNSIGNED, /* `number`, as uint64_t: it is beyond int64_t */
    SD_PACK_FLOAT,    /* `real` */
    SD_PACK_STR,      /* `bytes`, `size` */
    SD_PACK_BIN,      /* likewise */
    SD_PACK_EXT,      /* likewise, behind a byte of type */
    SD_PACK_ARRAY,    /* `size` values follow */
    SD_PACK_MAP       /* `size` pairs follow */
};

typedef struct {
    int kind;
    int64_t number;
    double real;
    const unsigned char *bytes;
    uint64_t size;
} sd_token;

/* The next value, of an array or a map its head; returns where it ends, NULL: the bytes end before. */
const unsigned char *sd_pack_next(const unsigned char *at, const unsigned char *end,
                                  sd_token *token);

/* Write a value, a head; return where it ends.  At most 9 bytes, for a string 5 and its own. */
unsigned char *sd_pack_int(unsigned char *to, int64_t number);
unsigned char *sd_pack_unsigned(unsigned char *to, uint64_t number);
unsigned char *sd_pack_float(unsigned char *to, double real);
unsigned char *sd_pack_str(unsigned char *to, const void *bytes, uint32_t size);
unsigned char *sd_pack_bin(unsigned char *to, const void *bytes, uint32_t size);
unsigned char *sd_pack_map(unsigned char *to, uint32_t pairs);

/* Is it one value whose maps have strings as keys, without extension types, and not very deep?  Such
 * a one can be decoded. */
bool sd_pack_plain(const unsigned char *at, uint64_t bytes);

/* How much longer a value may get by sd_pack_add(), besides the key. */
#define SD_PACK_ROOM 24

/* `to` becomes `from`, a map, with `by` added to the number that `key` leads to; one that is not
 * there is 0.  `to` has room for all of `from`, the key, and SD_PACK_ROOM.
 * SD_OK: `size` is that of `to`, `sum` the new number, which is SD_PACK_INT or SD_PACK_UNSIGNED.
 * SD_MISS: `from` is no map, SD_MISMATCH: there is no integer; `sum->kind` is what there is.
 * SD_FULL: the sum is none of MessagePack's, -2^63 to 2^64 - 1.  SD_CORRUPT: not MessagePack. */
int sd_pack_add(const unsigned char *from, uint64_t bytes, const void *key, uint32_t key_size,
                int64_t by, unsigned char *to, uint64_t *size, sd_token *sum);

#endif
