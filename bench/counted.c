/* counted.c - the hot paths of the core without Python, run under callgrind by instructions.py.
 *
 *   counted DOMAINS    find, lock, read, unlock; the same with a change of state; a miss
 *
 * Each loop is counted at two lengths, so that what it takes to begin one cancels out.
 */
#define _GNU_SOURCE
#include "core.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <valgrind/callgrind.h>

#define MUST(condition) \
    do { \
        if (!(condition)) fprintf(stderr, "counted: %s\n", #condition), exit(1); \
    } while (0)

static sd_segment *segment;
static uint64_t domains;

static void make_key(uint64_t number, sd_key *key)
{
    key->what = SD_UUID_INDEX;
    key->uuid[0] = (number + 1) * 0x9E3779B97F4A7C15u;
    key->uuid[1] = (number + 1) * 0xF39CC0605CEDC835u;
}

static void add(uint64_t number)
{
    sd_key key;
    sd_values values = {.id = -1, .state = 1};
    sd_blob blobs[SD_BLOBS] = {{true, "definition", 10}};
    unsigned char name[SD_NAME_MAX + 1] = {0};
    sd_word *link = NULL;
    uint32_t slot;
    make_key(number, &key);
    name[0] = (unsigned char)sprintf((char *)name + 1, "vm%lu", (unsigned long)number);
    MUST(sd_list_lock(segment, SD_FOREVER) == SD_OK);
    MUST(sd_free_slot(segment, &link, &slot) == SD_OK);
    MUST(sd_slot_lock(segment, slot, SD_FOREVER) == SD_OK);
    MUST(sd_insert(segment, slot, link, key.uuid, name, &values, blobs, NULL, SD_FOREVER) == SD_OK);
    sd_slot_unlock(segment, slot, true);
    sd_list_unlock(segment);
}

static uint32_t take(uint64_t number, sd_values *values)
{
    sd_key key;
    uint32_t slot;
    make_key(number % domains, &key);
    MUST(sd_find(segment, &key, &slot) == SD_OK);
    MUST(sd_slot_lock(segment, slot, SD_FOREVER) == SD_OK);
    MUST(sd_matches(segment, slot, &key));
    sd_values_get(segment, slot, values);
    return slot;
}

static void get(int count)
{
    sd_values values;
    for (int i = 0; i < count; i++)
        sd_slot_unlock(segment, take((uint64_t)i * 7919, &values), true);
}

static void change(int count)
{
    sd_values values;
    for (int i = 0; i < count; i++) {
        uint32_t slot = take((uint64_t)i * 7919, &values);
        values.state ^= 2;
        MUST(sd_commit(segment, slot, &values, NULL, NULL, NULL, SD_FOREVER) == SD_OK);
        sd_slot_unlock(segment, slot, true);
    }
}

/* Where a probe ends differs from key to key, so a miss is the mean of many: MISSES of
 * instructions.py. */
static void miss(int count)
{
    sd_key key;
    uint32_t slot;
    for (int i = 0; i < count * 32; i++) {
        make_key(domains + (uint64_t)i, &key);
        MUST(sd_find(segment, &key, &slot) == SD_MISS);
    }
}

int main(int count, char **arguments)
{
    static const struct {
        const char *name;
        void (*run)(int count);
    } loops[] = {{"core_get", get}, {"core_change", change}, {"core_miss", miss}};
    char why[200], name[40];
    domains = count > 1 ? strtoull(arguments[1], NULL, 10) : 0;
    MUST(domains);
    int fd = memfd_create("counted", MFD_CLOEXEC);
    MUST(sd_format(fd, SD_KIND_ROBUST, domains, domains * 4 + 1024, 1024) == SD_OK);
    MUST(sd_map(fd, &segment, why, sizeof why) == SD_OK);
    for (uint64_t number = 0; number < domains; number++) add(number);
    for (size_t at = 0; at < sizeof loops / sizeof *loops; at++) {
        loops[at].run(50);
        for (int length = 50; length <= 250; length += 200) {
            snprintf(name, sizeof name, "%s %d", loops[at].name, length);
            CALLGRIND_START_INSTRUMENTATION;
            CALLGRIND_ZERO_STATS;
            loops[at].run(length);
            CALLGRIND_DUMP_STATS_AT(name);
            CALLGRIND_STOP_INSTRUMENTATION;
        }
    }
    return 0;
}
