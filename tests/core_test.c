/* core_test.c - the core without Python: edge cases against reference models, and where things lie.
 *
 *   core_test layout FILE      print the place of every field of a segment, for tests that plant damage
 *   core_test index SEED       insert and delete against a model: runs that wrap round the table's end,
 *                              equal hashes, growth
 *   core_test heap SEED        allocate and free against a map of owners, for awkward sizes of heap;
 *                              refusals only where there is no room; the map rebuilt from descriptors
 *   core_test views SEED       readers without a lock among writers: never a mixture of two commits,
 *                              never a miss of what is there
 *   core_test check SEED       a checker stops when its time is up, and goes on where it was
 *   core_test stores SEED      the same between every two stores of a writer, and the words that only
 *                              change while a sequence is odd change only then
 *
 *   core_test threads SEED     threads that define, rename, change, start, stop, remove and find as
 *                              they like, each as if it were a process of its own
 *
 * Exit status 0 if all held; otherwise it says what did not, and dies.
 */
#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* What to look at before each store into a segment. */
static void (*before_store)(void);

#ifdef SD_CRASH_POINTS
void sd_crash_point(void)
{
    if (before_store) before_store();
}
#endif

#ifdef __SANITIZE_THREAD__
/* ThreadSanitizer of gcc 12 does not know pthread_mutex_clocklock (linked with --wrap), so the lock
 * would seem to be taken by nobody; it knows this one. */
int __wrap_pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock,
                                   const struct timespec *until)
{
    struct timespec now, at;
    clock_gettime(clock, &now);
    clock_gettime(CLOCK_REALTIME, &at);
    int64_t ns = (int64_t)(until->tv_sec - now.tv_sec) * 1000000000 + until->tv_nsec - now.tv_nsec;
    ns = at.tv_nsec + (ns < 0 ? 0 : ns);
    at.tv_sec += ns / 1000000000;
    at.tv_nsec = ns % 1000000000;
    return pthread_mutex_timedlock(mutex, &at);
}
#endif

static uint64_t random_state;

static uint64_t draw(uint64_t *state, uint64_t below)
{
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return (*state >> 11) % below;
}

static uint64_t roll(uint64_t below)
{
    return draw(&random_state, below);
}

#define MUST(condition, ...)                                                          \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);          \
            fprintf(stderr, " " __VA_ARGS__);                                         \
            fprintf(stderr, "\n");                                                    \
            abort();                                                                  \
        }                                                                             \
    } while (0)

static sd_segment *make(uint64_t slots, uint64_t cells)
{
    sd_segment *segment;
    char why[200];
    int fd = memfd_create("core_test", MFD_CLOEXEC);
    MUST(fd >= 0);
    MUST(sd_format(fd, SD_KIND_ROBUST, slots, cells, 64) == SD_OK);
    MUST(sd_map(fd, &segment, why, sizeof why) == SD_OK, "%s", why);
    return segment;
}

/* --- layout ------------------------------------------------------------------------------------- */

#define PLACE(prefix, type, field) \
    printf(prefix "." #field " %zu\n", offsetof(type, field))
#define HEADER(field) PLACE("header", sd_header, field)
#define SLOT(field) PLACE("slot", sd_slot, field)

static void print_header(void)
{
    HEADER(magic), HEADER(layout), HEADER(signature), HEADER(boot), HEADER(pid_namespace);
    HEADER(kind), HEADER(total_bytes), HEADER(max_slots), HEADER(heap_cells);
    HEADER(poisoned), HEADER(poisoned_at), HEADER(poisoned_who), HEADER(poisoned_pid);
    HEADER(poisoned_when), HEADER(list_mutex), HEADER(list_owner), HEADER(list_seq), HEADER(list_level);
    HEADER(list_dirty), HEADER(live), HEADER(slot_count), HEADER(slots_committed);
    HEADER(free_head), HEADER(id_mutex), HEADER(id_seq), HEADER(id_level), HEADER(id_dirty);
    HEADER(next_id), HEADER(active), HEADER(heap_mutex), HEADER(heap_committed);
    HEADER(heap_used), HEADER(heap_dirty), HEADER(heap_hint), HEADER(settings_choice);
    HEADER(event_mutex), HEADER(event_dirty), HEADER(event_waiting), HEADER(event_count);
    HEADER(ring_committed), HEADER(events);
    HEADER(any_waiting), HEADER(any_seq);
    HEADER(counters_committed), HEADER(waiters_committed), HEADER(list_why);
}

static void print_waiters(const sd_geometry *at)
{
    printf("counters %lu\nwaiters %lu\n", at->counters, at->waiters);
    printf("counters.size %zu\nwaiter.size %zu\n", sizeof(sd_counters), sizeof(sd_waiter));
    printf("waiters.max %u\n", SD_WAITERS_MAX);
    PLACE("waiter", sd_waiter, who), PLACE("waiter", sd_waiter, pid);
    PLACE("waiter", sd_waiter, what), PLACE("waiter", sd_waiter, since);
    PLACE("waiter", sd_waiter, sum), PLACE("counters", sd_counters, acquired);
}

static void print_slot(void)
{
    SLOT(mutex), SLOT(life), SLOT(cur), SLOT(died_who), SLOT(sum_and_pid), SLOT(uuid), SLOT(copy0);
    SLOT(copy1), SLOT(owner), SLOT(extent), SLOT(dirty), SLOT(next_free), SLOT(waiting), SLOT(why);
    printf("slot.size %zu\nnames.size %zu\n", sizeof(sd_slot), sizeof(sd_names));
    printf("names.length %u\n", SD_NAME_AT);
    PLACE("fields", sd_fields, ids), PLACE("fields", sd_fields, status);
    PLACE("fields", sd_fields, version), PLACE("fields", sd_fields, event);
    printf("entry.size %zu\n", sizeof(sd_entry));
    PLACE("entry", sd_entry, number), PLACE("entry", sd_entry, kind), PLACE("entry", sd_entry, name);
    PLACE("owner", sd_owner, who), PLACE("owner", sd_owner, pid);
    PLACE("mutex", pthread_mutex_t, __data.__lock), PLACE("mutex", pthread_mutex_t, __data.__kind);
    PLACE("mutex", pthread_mutex_t, __data.__owner);
}

static int layout(const char *path)
{
    sd_header header;
    sd_geometry at;
    int fd = open(path, O_RDONLY);
    MUST(fd >= 0 && pread(fd, &header, sizeof header, 0) == sizeof header);
    MUST(sd_geometry_make(&at, header.max_slots, header.heap_cells, header.events) == SD_OK);
    print_header();
    print_slot();
    print_waiters(&at);
    printf("attached %lu\nattached.max %u\nsettings %lu\n", at.attached, SD_ATTACHED_MAX, at.settings);
    printf("named %lu\nnamed.size %zu\n", at.named, sizeof(sd_named));
    PLACE("named", sd_named, mutex), PLACE("named", sd_named, owner);
    PLACE("named", sd_named, died_who), PLACE("named", sd_named, taken);
    PLACE("named", sd_named, name), PLACE("named", sd_named, why);
    printf("slots %lu\nnames %lu\nmap %lu\nheap %lu\nlevels %u\n", at.slots, at.names, at.map,
           at.heap, at.levels);
    printf("ring %lu\n", at.ring);
    for (int index = 0; index < SD_INDEXES; index++)
        for (unsigned level = 0; level < at.levels; level++)
            printf("table.%d.%u %lu\n", index, level, at.table[index][level]);
    close(fd);
    return 0;
}

/* --- index ---------------------------------------------------------------------------------------- */

#define KEYS 6000

static uint64_t hash[KEYS];
static bool present[KEYS];

/* Homes in a few places round the end of a table, of every level up to 2^20; some hashes equal. */
static uint64_t crowded_hash(void)
{
    uint64_t low = (0u - 4u + (uint32_t)roll(8)) & 0xfffff;
    if (roll(4) == 0) return low;
    return low | roll(1 << 12) << 20;
}

static bool leads_to(const sd_segment *segment, uint32_t key)
{
    sd_probe probe;
    uint32_t slot;
    MUST(sd_probe_begin(segment, SD_UUID_INDEX, hash[key], &probe) == SD_OK);
    for (;;) {
        int result = sd_probe_next(segment, &probe, &slot);
        if (result == SD_MISS) return false;
        MUST(result == SD_OK);
        if (slot == key) return true;
    }
}

static uint64_t entries(const sd_segment *segment)
{
    uint64_t level = sd_unsealed(sd_load(&segment->header->list_level[0])), n = 0;
    for (uint64_t i = 0; i < 1ull << (SD_INDEX_BITS + level); i++)
        n += sd_load(&segment->table[SD_UUID_INDEX][level][i]) != 0;
    return n;
}

static void compare(const sd_segment *segment, uint32_t keys, uint64_t expected)
{
    for (uint32_t key = 0; key < keys; key++)
        MUST(leads_to(segment, key) == present[key], "key %u, present %d", key, present[key]);
    MUST(entries(segment) == expected);
    MUST(!(sd_load(&segment->header->list_seq) & 1));
}

static void toggle(sd_segment *segment, uint32_t key)
{
    sd_header *header = segment->header;
    uint64_t live = sd_load(&header->live);
    if (!present[key]) MUST(sd_index_reserve(segment, SD_UUID_INDEX) == SD_OK);
    sd_sequence_begin(&header->list_seq);
    if (present[key]) {
        MUST(sd_index_delete(segment, SD_UUID_INDEX, hash[key], key) == SD_OK);
        MUST(sd_index_delete(segment, SD_UUID_INDEX, hash[key], key) == SD_CORRUPT);
    } else {
        MUST(sd_index_insert(segment, SD_UUID_INDEX, hash[key], key) == SD_OK);
    }
    sd_sequence_end(&header->list_seq);
    present[key] = !present[key];
    sd_store(&header->live, present[key] ? live + 1 : live - 1);
}

static int test_index(void)
{
    sd_segment *segment = make(KEYS, 64);
    sd_store(&segment->header->slots_committed, sd_seal(KEYS));
    sd_store(&segment->header->slot_count, sd_seal(KEYS));
    /* Small and crowded: looked at after every step. */
    for (uint32_t key = 0; key < 60; key++) hash[key] = crowded_hash();
    for (int step = 0; step < 6000; step++) {
        toggle(segment, (uint32_t)roll(60));
        compare(segment, 60, sd_load(&segment->header->live));
    }
    for (uint32_t key = 0; key < 60; key++)
        if (present[key]) toggle(segment, key);
    /* Growing over several levels, with deletions in between. */
    for (uint32_t key = 0; key < KEYS; key++)
        hash[key] = roll(10) ? roll(1ull << 32) : crowded_hash();
    for (int round = 0; round < 8; round++) {
        uint32_t until = KEYS * (uint32_t)(round + 1) / 8;
        for (int step = 0; step < 2000; step++) toggle(segment, (uint32_t)roll(until));
        for (uint32_t key = 0; key < until; key++)
            if (!present[key] && roll(3)) toggle(segment, key);
        compare(segment, KEYS, sd_load(&segment->header->live));
    }
    MUST(sd_unsealed(sd_load(&segment->header->list_level[0])) >= 3, "it did not grow");
    sd_sequence_begin(&segment->header->list_seq);
    MUST(sd_index_clear(segment, SD_UUID_INDEX) == SD_OK);
    sd_sequence_end(&segment->header->list_seq);
    memset(present, 0, sizeof present);
    compare(segment, KEYS, 0);
    sd_unmap(segment);
    return 0;
}

/* --- heap -------------------------------------------------------------------------------------------- */

#define BLOBS 900

typedef struct {
    sd_segment *segment;
    uint64_t cells;
    uint16_t *owner; /* of each cell: blob + 1, or 0 */
    sd_word *blob[BLOBS];
} heap_model;

static uint64_t longest_gap(const heap_model *at, uint64_t committed)
{
    uint64_t longest = 0, gap = 0;
    for (uint64_t cell = 0; cell < committed; cell++) {
        gap = at->owner[cell] ? 0 : gap + 1;
        if (gap > longest) longest = gap;
    }
    return longest;
}

static void fill(const heap_model *at, unsigned b)
{
    uint64_t extent = sd_load(at->blob[b]), cell = SD_EXTENT_CELL(extent);
    for (uint64_t i = 0; i < sd_cells(SD_EXTENT_BYTES(extent)); i++) {
        MUST(cell + i < at->cells, "blob %u at cell %lu", b, cell + i);
        MUST(!at->owner[cell + i], "cell %lu belongs to blob %u", cell + i, at->owner[cell + i] - 1);
        at->owner[cell + i] = (uint16_t)(b + 1);
        for (int w = 0; w < 8; w++) sd_store(sd_extent_at(at->segment, extent) + i * 8 + w, b * 8 + w);
    }
}

static void empty(const heap_model *at, unsigned b)
{
    uint64_t extent = sd_load(at->blob[b]), cell = SD_EXTENT_CELL(extent);
    for (uint64_t i = 0; i < sd_cells(SD_EXTENT_BYTES(extent)); i++) {
        MUST(at->owner[cell + i] == b + 1);
        at->owner[cell + i] = 0;
        for (int w = 0; w < 8; w++)
            MUST(sd_load(sd_extent_at(at->segment, extent) + i * 8 + w) == b * 8 + w, "overwritten");
    }
}

static bool is_marked(const sd_segment *at, uint64_t cell)
{
    return sd_load(&at->map[cell / 64]) >> cell % 64 & 1;
}

static void compare_map(const heap_model *at)
{
    uint64_t used = 0, committed = sd_unsealed(sd_load(&at->segment->header->heap_committed));
    MUST(committed <= at->cells);
    for (uint64_t cell = 0; cell < committed; cell++) {
        used += at->owner[cell] != 0;
        MUST(is_marked(at->segment, cell) == (at->owner[cell] != 0), "cell %lu", cell);
    }
    MUST(sd_load(&at->segment->header->heap_used) == used);
}

static void allocate(heap_model *at, unsigned b)
{
    sd_header *header = at->segment->header;
    uint64_t kind = roll(20);
    uint64_t bytes = kind < 14 ? 1 + roll(700) : kind < 19 ? 1 + roll(64 * 200) : 1 + roll(at->cells * 96);
    uint64_t cells = sd_cells(bytes);
    int result = sd_heap_allocate(at->segment, at->blob[b], bytes);
    uint64_t committed = sd_unsealed(sd_load(&header->heap_committed));
    if (result == SD_OK) {
        MUST(SD_EXTENT_BYTES(sd_load(at->blob[b])) == bytes);
        MUST(sd_extent_valid(at->segment, sd_load(at->blob[b])));
        fill(at, b);
        return;
    }
    MUST(result == SD_FULL && !sd_load(at->blob[b]));
    MUST(cells > at->cells - committed, "refused %lu cells with %lu uncommitted", cells,
         at->cells - committed);
    MUST(longest_gap(at, committed) < cells, "refused %lu cells with a gap of %lu", cells,
         longest_gap(at, committed));
}

static void test_heap_of(uint64_t cells)
{
    heap_model at = {make(BLOBS, cells), cells, calloc(cells, 2), {0}};
    for (unsigned b = 0; b < BLOBS; b++) {
        sd_word *link = NULL;
        uint32_t slot;
        sd_store(&at.segment->header->free_head, 0); /* a new one each time */
        MUST(sd_free_slot(at.segment, &link, &slot) == SD_OK);
        at.blob[b] = &at.segment->slots[slot].extent[b % SD_BLOBS][b / SD_BLOBS % 2];
    }
    MUST(sd_heap_lock_briefly(at.segment) == SD_OK);
    sd_word unused = 0;
    MUST(sd_heap_allocate(at.segment, &unused, 0) == SD_FULL);
    MUST(sd_heap_allocate(at.segment, &unused, SD_EXTENT_MAX + 1) == SD_FULL && !sd_load(&unused));
    for (int step = 0; step < 3000; step++) {
        unsigned b = (unsigned)roll(1 + roll(BLOBS));
        if (sd_load(at.blob[b])) {
            empty(&at, b);
            sd_heap_free(at.segment, at.blob[b]);
            MUST(!sd_load(at.blob[b]));
        } else {
            allocate(&at, b);
        }
        if (step % 64) continue;
        compare_map(&at);
        for (uint64_t w = 0; w * 64 < sd_unsealed(sd_load(&at.segment->header->heap_committed)); w++)
            if (!roll(3)) sd_store(&at.segment->map[w], roll(1ull << 52));
        sd_store(&at.segment->header->heap_used, 7);
        MUST(sd_rebuild_heap(at.segment) == SD_OK);
        for (uint64_t cell = sd_unsealed(sd_load(&at.segment->header->heap_committed)); cell % 64; cell++)
            MUST(!is_marked(at.segment, cell), "a cell behind the end");
        compare_map(&at);
    }
    sd_heap_unlock(at.segment);
    free(at.owner);
    sd_unmap(at.segment);
}

static int test_heap(void)
{
    static const uint64_t sizes[] = {64, 65, 127, 128, 1000, 16384, 16385, 40001};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) test_heap_of(sizes[i]);
    return 0;
}

/* --- views and finds among writers ---------------------------------------------------------------- */

#define DOMAINS 4
#define COMMITS 30000
#define STABLE 420 /* so that its runs are as long as a table of 1,024 allows */
#define PASSERS 80
#define ROUNDS 400

static _Thread_local sd_segment *shared;
static sd_segment *segment; /* of the main thread */
static _Atomic int writers_left;
static _Atomic uint64_t accepted, doubted;
static const uint64_t seed_word = 0x9e3779b97f4a7c15ull;

/* Bits of the number of a record which its name does not follow from. */
#define SAME_NAME 27
#define NAMESAKES 8

static void spell_name(uint64_t k, unsigned char *name)
{
    k &= ~((uint64_t)(NAMESAKES - 1) << SAME_NAME);
    int n = snprintf((char *)name + 1, SD_NAME_MAX, "domain-%lu-%.*s", k, (int)(k % 200),
                     "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                     "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                     "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");
    name[0] = (unsigned char)n;
}

static const sd_news NEWS = {2, {SD_KIND(1, 2), SD_KIND(3, 4)}, {5, 6}, 0};

/* Everything of a record follows from one number, but for the data: that follows from `started`,
 * since a commit with a name leaves it as it is. */
static uint64_t spell(uint64_t k, uint64_t data, sd_values *values, uint64_t words[SD_BLOBS][64],
                      sd_blob blobs[SD_BLOBS])
{
    memset(values, 0, sizeof *values);
    values->id = -1;
    values->pid = (int32_t)(k & 0x7fffffff);
    values->state = (uint16_t)(k & 7);
    values->reason = (uint16_t)(k >> 3);
    values->flags = k & 8 ? SD_FLAG_PERSISTENT : SD_FLAG_AUTOSTART | SD_FLAG_UNFINISHED;
    values->started = data;
    for (int b = 0; b < SD_BLOBS; b++) {
        uint64_t from = b == SD_DATA ? data : k, n = 1 + (from * seed_word >> (8 * b)) % 64;
        for (uint64_t i = 0; i < 64; i++) words[b][i] = from * seed_word + i + b;
        blobs[b] = (sd_blob){true, b && from % 5 == 0 ? NULL : words[b], n * 8};
    }
    /* More often than not in the record, and just not any more. */
    uint64_t turn = data * seed_word >> 40;
    if (turn % 4) blobs[SD_DATA].size = turn % 4 == 1 ? SD_SMALL_MAX - 2 + turn / 4 % 4
                                                      : 1 + turn / 4 % SD_SMALL_MAX;
    return k;
}

static void domain_uuid(uint64_t n, uint64_t uuid[2])
{
    uuid[0] = n + 1;
    uuid[1] = ~n;
}

static uint32_t add(uint64_t n, uint64_t k)
{
    uint64_t words[SD_BLOBS][64], uuid[2];
    sd_values values;
    sd_blob blobs[SD_BLOBS];
    unsigned char name[SD_NAME_MAX + 1];
    sd_word *link = NULL;
    uint32_t slot;
    domain_uuid(n, uuid);
    spell(k, k, &values, words, blobs);
    spell_name(k, name);
    MUST(sd_free_slot(shared, &link, &slot) == SD_OK);
    MUST(sd_slot_lock(shared, slot, SD_FOREVER) == SD_OK);
    MUST(sd_insert(shared, slot, link, uuid, name, &values, blobs, &NEWS, SD_FOREVER) == SD_OK);
    sd_slot_unlock(shared, slot, true);
    return slot;
}

/* What a process keeps for itself is guarded by its interpreter's lock, which is not here: so each
 * thread has its own, of the same mapping, as if it were a process. */
static sd_segment *process_of_its_own(void)
{
    static _Thread_local sd_segment own;
    own = *segment;
    own.held = 0;
    return &own;
}

static void *change(void *argument)
{
    shared = process_of_its_own();
    uint64_t state = *(uint64_t *)argument, words[SD_BLOBS][64];
    for (int i = 0; i < COMMITS; i++) {
        sd_values values;
        sd_blob blobs[SD_BLOBS];
        unsigned char name[SD_NAME_MAX + 1];
        uint32_t slot = (uint32_t)draw(&state, DOMAINS);
        uint64_t k = (uint64_t)i << 8 | *(uint64_t *)argument % 251;
        spell_name(k, name);
        MUST(sd_list_lock(shared, SD_FOREVER) == SD_OK);
        MUST(sd_slot_lock(shared, slot, SD_FOREVER) == SD_OK);
        MUST(sd_values_get(shared, slot, &values) == SD_OK);
        spell(k, values.started, &values, words, blobs);
        blobs[SD_DATA].change = false;
        MUST(sd_commit(shared, slot, &values, blobs, name, &NEWS, SD_FOREVER) == SD_OK);
        /* Some that leave the name, as small data does. */
        for (uint64_t same = draw(&state, NAMESAKES); same; same--) {
            spell(k | same << SAME_NAME, k + same, &values, words, blobs);
            MUST(sd_commit(shared, slot, &values, blobs, NULL, NULL, SD_FOREVER) == SD_OK);
        }
        /* And one of fields only, which a reader of the blobs need not mind. */
        memset(blobs, 0, sizeof blobs);
        MUST(sd_values_get(shared, slot, &values) == SD_OK);
        MUST(sd_commit(shared, slot, &values, blobs, NULL, NULL, SD_FOREVER) == SD_OK);
        sd_slot_unlock(shared, slot, true);
        sd_list_unlock(shared);
    }
    atomic_fetch_sub(&writers_left, 1);
    return NULL;
}

/* Domains that come and go, so that entries are shifted. */
static void *pass(void *unused)
{
    static uint32_t slots[PASSERS];
    (void)unused;
    shared = process_of_its_own();
    for (int round = 0; round < ROUNDS; round++) {
        for (uint64_t n = 0; n < PASSERS; n++) {
            MUST(sd_list_lock(shared, SD_FOREVER) == SD_OK);
            slots[n] = add(1000 + n, 1ull << 30 | n << 8 | 255);
            sd_list_unlock(shared);
        }
        for (uint64_t n = 0; n < PASSERS; n++) {
            MUST(sd_list_lock(shared, SD_FOREVER) == SD_OK);
            MUST(sd_slot_lock(shared, slots[n], SD_FOREVER) == SD_OK);
            MUST(sd_remove(shared, slots[n], &NEWS, SD_FOREVER) == SD_OK);
            sd_slot_unlock(shared, slots[n], true);
            sd_list_unlock(shared);
        }
    }
    atomic_fetch_sub(&writers_left, 1);
    return NULL;
}

static void check_view(const sd_view *view, uint64_t found[SD_BLOBS][64], const uint64_t *size,
                       const uint64_t *sum)
{
    uint64_t words[SD_BLOBS][64], k = (uint64_t)(uint32_t)view->values.pid;
    unsigned char name[SD_NAME_MAX + 1];
    sd_values values;
    sd_blob blobs[SD_BLOBS];
    spell(k, view->values.started, &values, words, blobs);
    spell_name(k, name);
    MUST(view->values.state == values.state && view->values.reason == values.reason);
    MUST((view->values.flags & (SD_FLAG_PERSISTENT | SD_FLAG_AUTOSTART | SD_FLAG_UNFINISHED)) ==
         values.flags);
    MUST(!memcmp(view->name, name, (size_t)name[0] + 1), "name of another commit");
    for (int b = 0; b < SD_BLOBS; b++) {
        MUST(size[b] == (blobs[b].bytes ? blobs[b].size : 0), "blob %d of another commit", b);
        MUST(!memcmp(found[b], words[b], size[b]), "blob %d is torn", b);
        MUST(sd_version_count(view->values.version[b]) <= sd_count_value(view->cur));
        MUST(!size[b] || sum[b] == sd_blob_sum(view->uuid, b, view->values.version[b], found[b], size[b]),
             "blob %d does not fit its checksum", b);
    }
}

static void look(uint32_t slot)
{
    sd_view view;
    uint64_t found[SD_BLOBS][64], size[SD_BLOBS] = {0}, sum[SD_BLOBS] = {0};
    int result = sd_view_begin(shared, slot, &view);
    if (result == SD_MISS) return;
    MUST(result == SD_OK || result == SD_DOUBT, "it said %d", result);
    for (int b = 0; b < SD_BLOBS && result == SD_OK; b++) {
        sd_stored stored;
        result = sd_view_blob(shared, slot, &view, b, &stored);
        MUST(result != SD_CORRUPT);
        if (result == SD_OK) {
            size[b] = stored.bytes - 8;
            if (size[b] > sizeof found[b]) size[b] = sizeof found[b]; /* torn: the check says so */
            sum[b] = sd_load(stored.at);
            sd_copy_out(found[b], stored.at + 1, size[b]);
        }
        if (result == SD_MISS) result = SD_OK;
    }
    if (result == SD_OK) result = sd_view_blobs_check(shared, slot, &view);
    if (result == SD_OK) check_view(&view, found, size, sum);
    atomic_fetch_add(result == SD_OK ? &accepted : &doubted, 1);
}

static void *read_on(void *argument)
{
    shared = process_of_its_own();
    uint64_t state = *(uint64_t *)argument;
    while (atomic_load(&writers_left)) {
        for (uint32_t slot, n = 0; n < STABLE; n++) {
            sd_key key = {.what = SD_UUID_INDEX};
            domain_uuid(n, key.uuid);
            int result = sd_find(shared, &key, &slot);
            MUST(result == SD_OK || result == SD_DOUBT, "a domain that is there was missed");
            MUST(result != SD_OK || slot == n);
            if (n % 64 == 0) look((uint32_t)draw(&state, DOMAINS));
        }
    }
    return NULL;
}

static void complain(void *context, const char *invariant, const char *what)
{
    *(int *)context += 1;
    fprintf(stderr, "%s: %s\n", invariant, what);
}

/* All of a segment that nobody changes, without a lock: no fault, no suspect, and all of it fits. */
static sd_tally check_at_rest(sd_segment *segment)
{
    int problems = 0;
    sd_check *check = sd_check_begin(segment, 1u << 16, complain, &problems);
    MUST(check && sd_check_records(check, SD_FOREVER) == SD_OK && !problems);
    for (int part = 0; part < SD_PARTS; part++) MUST(!sd_check_suspects(check, part));
    for (int sum = 0; sum < SD_SUMS; sum++)
        MUST(sd_check_sum(check, sum, SD_FOREVER) == SD_OK, "sum %d", sum);
    sd_tally tally = *sd_check_tally(check);
    sd_check_end(check);
    return tally;
}

static int test_views(void)
{
    pthread_t threads[5];
    uint64_t seeds[5];
    segment = shared = make(2000, 100000);
    MUST(sd_list_lock(shared, SD_FOREVER) == SD_OK);
    for (uint64_t n = 0; n < STABLE; n++) MUST(add(n, n) == n);
    sd_list_unlock(shared);
    atomic_store(&writers_left, 3);
    for (int i = 0; i < 5; i++) {
        seeds[i] = roll(1ull << 50) + 1;
        void *(*body)(void *) = i < 2 ? change : i == 2 ? pass : read_on;
        MUST(!pthread_create(&threads[i], NULL, body, &seeds[i]));
    }
    for (int i = 0; i < 5; i++) pthread_join(threads[i], NULL);
    sd_tally tally = check_at_rest(shared);
    MUST(tally.domains == STABLE && !tally.garbage);
    MUST(accepted > 100, "only %lu reads were not overtaken", accepted);
    printf("%lu reads, %lu overtaken\n", accepted, doubted);
    sd_unmap(shared);
    return 0;
}

/* --- a checker's time --------------------------------------------------------------------------- */

#define MANY 3000
#define STEPS 256 /* between two looks at the clock */

static void hear(void *context, const char *invariant, const char *what)
{
    (void)invariant, (void)what;
    ++*(int *)context;
}

/* With no time at all each call does one batch of steps and no more, so a lock is never held for
 * longer than the time given and one batch; and no fault is lost or told twice on the way. */
static int test_check(void)
{
    int faults = 0, calls = 0;
    unsigned lost = 50 + (unsigned)roll(500);
    shared = make(MANY + 10, 100000);
    MUST(sd_list_lock(shared, SD_FOREVER) == SD_OK);
    for (uint64_t n = 0; n < MANY; n++) MUST(add(n, n << 8) == n);
    check_at_rest(shared);
    for (uint32_t slot = 0; slot < lost; slot++) {
        uint64_t uuid[2];
        domain_uuid(slot, uuid);
        MUST(!sd_index_delete(shared, SD_UUID_INDEX, sd_hash_uuid(shared, uuid), slot));
    }
    sd_check *check = sd_check_begin(shared, 1u << 16, hear, &faults);
    MUST(check);
    while (sd_check_records(check, 0) == SD_TIMEOUT) calls++;
    MUST(calls >= MANY / STEPS && !faults, "%d calls, %d faults", calls, faults);
    MUST(sd_check_suspects(check, SD_PART_LIST) == lost);
    for (unsigned left = lost; left; left--) {
        MUST(sd_check_suspects(check, SD_PART_LIST) == left);
        MUST(sd_check_judge(check, SD_PART_LIST, 0) == (left > 1 ? SD_TIMEOUT : SD_OK));
    }
    MUST(faults == (int)lost, "%d faults for %u lost entries", faults, lost);
    MUST(sd_check_sum_held(check, SD_SUM_LISTED, 0) == SD_TIMEOUT);
    MUST(sd_check_sum_held(check, SD_SUM_LISTED, SD_FOREVER) == SD_OK && faults == (int)lost + 1);
    for (int sum = 0; sum < SD_SUMS; sum++) {
        int result;
        for (calls = 0; (result = sd_check_sum(check, sum, 0)) == SD_TIMEOUT;) calls++;
        MUST(result == (sum == SD_SUM_LISTED ? SD_DOUBT : SD_OK), "sum %d", sum);
        MUST(calls || sum == SD_SUM_FREE, "sum %d was taken in one go", sum);
    }
    MUST(faults == (int)lost + 1);
    /* The watermark is damaged under the checker's eyes: no walk behind it, and no walk for ever. */
    sd_word *watermark = &shared->header->heap_committed;
    sd_store(watermark, sd_load(watermark) ^ 1ull << 35);
    for (int sum = SD_SUM_USED; sum < SD_SUMS; sum++) {
        MUST(sd_check_prepare(check, sum) == SD_OK);
        MUST(sd_check_sum_held(check, sum, SD_FOREVER) == SD_OK);
    }
    MUST(faults == (int)lost + 2);
    sd_check_end(check);
    sd_list_unlock(shared);
    sd_unmap(shared);
    return 0;
}

/* --- between two stores ------------------------------------------------------------------------ */

static uint64_t sums[2]; /* of what changes only while the list's, the ids' sequence is odd */
static uint64_t stores;

static uint64_t sum_table(int index, uint64_t sum)
{
    for (uint64_t i = 0; i < 1u << SD_INDEX_BITS; i++)
        sum = sum * seed_word + sd_load(&shared->table[index][0][i]);
    return sum;
}

static void sum_up(uint64_t now[2])
{
    now[0] = sum_table(SD_NAME_INDEX, sum_table(SD_UUID_INDEX, 0));
    now[1] = sum_table(SD_ID_INDEX, 0);
    for (uint32_t slot = 0; slot < sd_slot_count(shared); slot++)
        now[0] += sd_load(&shared->slots[slot].life) * (slot + seed_word);
}

/* A checker at this moment, without a lock: it may suspect, and blames nobody. */
static void blame_nobody(void)
{
    int faults = 0;
    sd_check *check = sd_check_begin(shared, 1u << 16, complain, &faults);
    MUST(check && sd_check_records(check, SD_FOREVER) == SD_OK);
    for (int sum = 0; sum < SD_SUMS; sum++) sd_check_sum(check, sum, SD_FOREVER);
    MUST(!faults, "a checker blames who is at work");
    sd_check_end(check);
}

/* Somebody who looks at this moment: nothing that is there is missed, no record is torn. */
static void inspect(void)
{
    uint64_t now[2];
    sum_up(now);
    MUST(now[0] == sums[0] || sd_load(&shared->header->list_seq) & 1, "an index moved unseen");
    MUST(now[1] == sums[1] || sd_load(&shared->header->id_seq) & 1, "the id index moved unseen");
    memcpy(sums, now, sizeof sums);
    stores++;
    for (uint32_t slot, n = 0; n < DOMAINS; n++) {
        sd_key key = {.what = SD_UUID_INDEX};
        domain_uuid(n, key.uuid);
        int result = sd_find(shared, &key, &slot);
        MUST(result == SD_OK || result == SD_DOUBT, "a domain that is there was missed");
        MUST(result != SD_OK || slot == n);
    }
    for (uint32_t slot = 0; slot < sd_slot_count(shared); slot++) look(slot);
    if (stores % 5 == 0) blame_nobody();
}

/* Rename a domain and change all of it, or all but the name, or start or stop it. */
static void work_on(uint32_t slot, uint64_t k)
{
    uint64_t words[SD_BLOBS][64];
    sd_values values;
    sd_blob blobs[SD_BLOBS] = {{0}};
    unsigned char name[SD_NAME_MAX + 1];
    MUST(sd_slot_lock(shared, slot, SD_FOREVER) == SD_OK);
    sd_values_get(shared, slot, &values);
    bool start = values.id < 0 && k % 3 == 0, stop = values.id >= 0;
    if (start) MUST(sd_take_id(shared, &values.id, SD_FOREVER) == SD_OK);
    if (stop) values.id = -1;
    if (!start && !stop) {
        spell(k, values.started, &values, words, blobs), spell_name(k, name);
        blobs[SD_DATA].change = false;
    }
    MUST(sd_commit(shared, slot, &values, blobs, start || stop ? NULL : name,
                   start ? &NEWS : NULL, SD_FOREVER) == SD_OK);
    for (uint64_t same = start || stop ? 0 : k / 3 % NAMESAKES; same; same--) {
        spell(k | same << SAME_NAME, k + same, &values, words, blobs);
        MUST(sd_commit(shared, slot, &values, blobs, NULL, NULL, SD_FOREVER) == SD_OK);
    }
    sd_slot_unlock(shared, slot, true);
}

static int test_stores(void)
{
    uint32_t passer = 0;
    shared = make(500, 100000);
    MUST(sd_list_lock(shared, SD_FOREVER) == SD_OK);
    for (uint64_t n = 0; n < DOMAINS; n++) MUST(add(n, n) == n);
    sum_up(sums);
    before_store = inspect;
    for (uint64_t k = 100; k < 500; k++) {
        uint64_t what = roll(3);
        if (what == 0 && !passer) {
            passer = add(k, 1ull << 30 | k << 8 | 255);
        } else if (what == 1 && passer) {
            MUST(sd_slot_lock(shared, passer, SD_FOREVER) == SD_OK);
            MUST(sd_remove(shared, passer, NULL, SD_FOREVER) == SD_OK);
            sd_slot_unlock(shared, passer, true);
            passer = 0;
        } else {
            work_on((uint32_t)roll(DOMAINS), k << 8);
        }
    }
    before_store = NULL;
    sd_list_unlock(shared);
    check_at_rest(shared);
#ifdef SD_CRASH_POINTS
    MUST(stores > 10000, "only %lu stores were seen", stores);
#endif
    sd_unmap(shared);
    return 0;
}

/* --- as they like ----------------------------------------------------------------------------- */

#define WORKERS 4
#define TURNS 40000

/* Start or stop it, with nothing but its own lock. */
static void start_or_stop(uint32_t slot)
{
    sd_blob blobs[SD_BLOBS] = {{0}};
    sd_values values;
    MUST(sd_slot_lock(shared, slot, SD_FOREVER) == SD_OK);
    MUST(sd_values_get(shared, slot, &values) == SD_OK);
    if (values.id >= 0) values.id = -1;
    else MUST(sd_take_id(shared, &values.id, SD_FOREVER) == SD_OK);
    MUST(sd_commit(shared, slot, &values, blobs, NULL, NULL, SD_FOREVER) == SD_OK);
    sd_slot_unlock(shared, slot, true);
}

/* Find it by a key that it has at this moment; whoever is found has it when it is locked. */
static void find_by_id(uint32_t slot)
{
    sd_key key = {.what = SD_ID_INDEX};
    sd_view view;
    if (sd_view_begin(shared, slot, &view) != SD_OK || view.values.id < 0) return;
    key.id = view.values.id;
    int result = sd_find(shared, &key, &slot);
    MUST(result == SD_OK || result == SD_MISS || result == SD_DOUBT, "it said %d", result);
    if (result != SD_OK || sd_slot_lock(shared, slot, SD_FOREVER) != SD_OK) return;
    result = sd_verify(shared, slot, &key, &view.values);
    MUST(result == SD_OK || result == SD_MISS, "it said %d", result);
    sd_slot_unlock(shared, slot, true);
}

/* Come, or go. */
static uint32_t toggle_passer(uint64_t number, uint32_t passer, uint64_t k)
{
    if (!passer) return add(1000 + number, 1ull << 30 | k);
    MUST(sd_slot_lock(shared, passer, SD_FOREVER) == SD_OK);
    MUST(sd_remove(shared, passer, NULL, SD_FOREVER) == SD_OK);
    sd_slot_unlock(shared, passer, true);
    return 0;
}

static void *do_as_you_like(void *argument)
{
    uint64_t number = *(uint64_t *)argument % WORKERS, state = *(uint64_t *)argument;
    uint32_t passer = 0;
    shared = process_of_its_own();
    for (uint64_t turn = 1; turn <= TURNS; turn++) {
        uint64_t k = (turn << 8 | number) + (1 << 8), what = draw(&state, 8);
        uint32_t slot = (uint32_t)draw(&state, DOMAINS);
        if (what < 2) {
            MUST(sd_list_lock(shared, SD_FOREVER) == SD_OK);
            if (what) passer = toggle_passer(number, passer, k);
            else work_on(slot, k);
            sd_list_unlock(shared);
        } else if (what < 4) {
            start_or_stop(slot);
        } else if (what == 4) {
            find_by_id(slot);
        } else {
            look((uint32_t)draw(&state, sd_slot_count(shared)));
        }
    }
    return NULL;
}

static int test_threads(void)
{
    pthread_t threads[WORKERS];
    uint64_t seeds[WORKERS];
    segment = shared = make(500, 100000);
    MUST(sd_list_lock(shared, SD_FOREVER) == SD_OK);
    for (uint64_t n = 0; n < DOMAINS; n++) MUST(add(n, n) == n);
    sd_list_unlock(shared);
    for (uint64_t i = 0; i < WORKERS; i++) {
        seeds[i] = (roll(1ull << 50) + 1) * WORKERS + i;
        MUST(!pthread_create(&threads[i], NULL, do_as_you_like, &seeds[i]));
    }
    for (int i = 0; i < WORKERS; i++) pthread_join(threads[i], NULL);
    check_at_rest(shared);
    MUST(accepted > 100, "only %lu reads were not overtaken", accepted);
    sd_unmap(shared);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 3) return 2;
    random_state = strtoull(argv[2], NULL, 10) * 2654435761u + 88172645463325252ull;
    if (!strcmp(argv[1], "layout")) return layout(argv[2]);
    if (!strcmp(argv[1], "index")) return test_index();
    if (!strcmp(argv[1], "heap")) return test_heap();
    if (!strcmp(argv[1], "views")) return test_views();
    if (!strcmp(argv[1], "stores")) return test_stores();
    if (!strcmp(argv[1], "threads")) return test_threads();
    if (!strcmp(argv[1], "check")) return test_check();
    return 2;
}
