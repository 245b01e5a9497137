/* segment.c - create, attach, grow, unmap.
 *
 * A segment is formatted in a file that nobody can find yet (an unnamed temporary file, or a
 * memfd), then published by giving it a name: so nobody sees half a segment, and a killed creator
 * leaves nothing.  Naming, modes and flock are the caller's (segment_file.py).
 *
 * The mapping has its full size from the start; address space is free.  Memory is committed by
 * fallocate before it is touched, so that a full tmpfs is an error here and not SIGBUS there; not
 * by glibc's posix_fallocate(), whose emulation writes into bytes that may be in use.
 *
 * A process that daemonises closes all descriptors, ours too, and what it opens next gets their
 * numbers.  So a number is compared with the segment's file before each use (sd_descriptor()), and
 * whoever has lost it commits memory through the mapping.
 *
 * A process maps a segment once, however often it attaches: two mappings of one robust mutex in
 * one thread's list would be two locks to the kernel.
 */
#define _GNU_SOURCE
#include "segment.h"

#include "mutex.h"
#include "sum.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* the C library may be older than the kernel */
#endif

static sd_segment *mapped; /* of this process; the binding serialises calls */

/* --- geometry -------------------------------------------------------------------------------- */

static uint64_t whole_pages(uint64_t bytes)
{
    return (bytes + SD_PAGE - 1) & ~(uint64_t)(SD_PAGE - 1);
}

static uint64_t place(uint64_t *end, uint64_t bytes)
{
    uint64_t at = *end;
    *end += whole_pages(bytes);
    return at;
}

static uint64_t lay_out(sd_geometry *at, uint64_t max_slots, uint64_t heap_cells,
                        uint64_t events)
{
    uint64_t end = 2 * SD_PAGE;
    at->max_slots = max_slots;
    at->heap_cells = heap_cells;
    at->events = events;
    at->attached = place(&end, SD_ATTACHED_MAX * 8);
    at->settings = place(&end, 2 * (SD_SETTINGS_BYTES + 8));
    at->named = place(&end, SD_NAMED_MAX * sizeof(sd_named));
    at->levels = 1;
    while ((1ull << (SD_INDEX_BITS + at->levels - 1)) < 2 * max_slots) at->levels++;
    for (int index = 0; index < SD_INDEXES; index++)
        for (unsigned level = 0; level < at->levels; level++)
            at->table[index][level] = place(&end, 8ull << (SD_INDEX_BITS + level));
    at->slots = place(&end, max_slots * sizeof(sd_slot));
    at->names = place(&end, max_slots * sizeof(sd_names));
    at->counters = place(&end, SD_COUNTED_MAX * sizeof(sd_counters));
    at->waiters = place(&end, SD_WAITERS_MAX * sizeof(sd_waiter));
    at->ring = place(&end, events * sizeof(sd_entry));
    uint64_t fixed = end;
    at->map = place(&end, (heap_cells + 63) / 64 * 8);
    at->heap = place(&end, heap_cells * SD_CELL);
    at->total_bytes = end;
    return fixed;
}

int sd_geometry_make(sd_geometry *geometry, uint64_t max_slots, uint64_t heap_cells,
                     uint64_t events)
{
    memset(geometry, 0, sizeof *geometry);
    if (max_slots < 1 || max_slots > SD_SLOTS_MAX) return SD_FULL;
    if (heap_cells < 64 || heap_cells >= 1ull << (SD_SEAL_BITS - 1)) return SD_FULL;
    if (events > SD_EVENTS_MAX || events & (events - 1)) return SD_FULL;
    if (events && events < SD_RING_MIN) return SD_FULL;
    lay_out(geometry, max_slots, heap_cells, events);
    return SD_OK;
}

uint64_t sd_geometry_fixed(uint64_t max_slots, uint64_t events)
{
    sd_geometry unused;
    return max_slots && max_slots <= SD_SLOTS_MAX ? lay_out(&unused, max_slots, 64, events) : 0;
}

/* --- what must be equal between creator and attacher ----------------------------------------- */

/* Sizes and places of what is shared, the C library's mutex included. */
static uint64_t signature(void)
{
    const uint64_t shape[] = {sizeof(void *), sizeof(pthread_mutex_t), _Alignof(pthread_mutex_t),
                              offsetof(pthread_mutex_t, __data.__kind), sizeof(sd_header),
                              offsetof(sd_header, id_mutex), offsetof(sd_header, heap_mutex),
                              sizeof(sd_slot), offsetof(sd_slot, extent), sizeof(sd_names),
                              sizeof(sd_entry), offsetof(sd_header, event_mutex),
                              sizeof(sd_named), offsetof(sd_named, taken), sizeof(sd_counters),
                              sizeof(sd_waiter), SD_CELL, SD_INDEX_BITS, sd_sums_by_crc(),
                              0x0102030405060708ull};
    uint64_t h = SD_LAYOUT;
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        h = (h ^ shape[i]) * 0x9e3779b97f4a7c15ull;
    return h;
}

/* With another seed nothing would be found, and with another identity another segment's handles
 * would fit this one. */
uint64_t sd_constants_sum(const sd_header *header)
{
    uint64_t words[offsetof(sd_header, poisoned) / 8], h = SD_MAGIC;
    memcpy(words, header, sizeof words);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        h = (h ^ words[i]) * 0x9e3779b97f4a7c15ull;
        h ^= h >> 32;
    }
    return h;
}

/* Zeros where /proc does not say; SD_ERRNO when only this process cannot read it now. */
static int read_boot(uint64_t boot[2])
{
    char text[64] = "";
    unsigned char bytes[16] = {0};
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (!file && sd_exhausted(errno)) return SD_ERRNO;
    if (file) {
        if (!fgets(text, sizeof text, file)) text[0] = 0;
        fclose(file);
    }
    int n = 0;
    for (const char *at = text; *at && n < 32; at++) {
        const char *digits = "0123456789abcdef", *digit = strchr(digits, *at);
        if (!digit) continue;
        bytes[n / 2] = (unsigned char)(bytes[n / 2] << 4 | (digit - digits));
        n++;
    }
    memcpy(boot, bytes, 16);
    return SD_OK;
}

/* 0: unknown.  Before Linux 5.6 there is one time for all. */
static uint64_t read_namespace(const char *path)
{
    struct stat status;
    return stat(path, &status) ? 0 : (uint64_t)status.st_ino;
}

/* Whoever asks /proc whether the holder of a lock lives must meet that process there. */
static bool proc_is_ours(void)
{
    char number[16] = "";
    ssize_t length = readlink("/proc/self", number, sizeof number - 1);
    return length > 0 && strtoul(number, NULL, 10) == (unsigned long)getpid();
}

/* In another PID namespace the number of a thread means another one.  In another time namespace the
 * same thread seems to have started at another time, so whoever lives seems to be dead. */
static int compare_namespaces(uint64_t pid, uint64_t time, char *why, size_t n)
{
    uint64_t here = read_namespace("/proc/self/ns/pid");
    if (!here && pid) {
        snprintf(why, n, "cannot read /proc/self/ns/pid (%s), which says whether thread numbers "
                 "mean the same threads here; mount /proc here", strerror(errno));
        return SD_MISMATCH;
    }
    if (here && !proc_is_ours()) {
        snprintf(why, n, "/proc is another PID namespace's, and speaks of other threads under the "
                 "same numbers; mount /proc here (unshare --mount-proc)");
        return SD_MISMATCH;
    }
    if (here != pid) {
        snprintf(why, n, "made in another PID namespace, where thread numbers mean other threads");
        return SD_MISMATCH;
    }
    if (read_namespace("/proc/self/ns/time") != time) {
        snprintf(why, n, "made in another time namespace, where threads seem to have started at "
                 "other times, and the living would pass for dead");
        return SD_MISMATCH;
    }
    return SD_OK;
}

static int validate(const sd_header *header, uint64_t size, sd_geometry *at, char *why, size_t n)
{
    uint64_t boot[2];
    if (header->magic != SD_MAGIC) {
        snprintf(why, n, "the file is no shmdomains segment");
        return SD_MISMATCH;
    }
    if (header->layout != SD_LAYOUT) {
        snprintf(why, n, "layout version %llu, this library has %u; move its domains with 'export' "
                 "under the version that made it and 'import' under this one",
                 (unsigned long long)header->layout, SD_LAYOUT);
        return SD_MISMATCH;
    }
    if (header->signature != signature()) {
        snprintf(why, n, "made by a build with other sizes of shared structures (another C library "
                 "or architecture), or under an emulator");
        return SD_MISMATCH;
    }
    if (read_boot(boot) != SD_OK) return SD_ERRNO;
    if (memcmp(boot, header->boot, sizeof boot)) {
        snprintf(why, n, "made before this boot");
        return SD_MISMATCH;
    }
    if (compare_namespaces(header->pid_namespace, header->time_namespace, why, n) != SD_OK)
        return SD_MISMATCH;
    if (header->kind != SD_KIND_ROBUST && header->kind != SD_KIND_MULTIPROCESSING) {
        snprintf(why, n, "unknown kind of lock %llu", (unsigned long long)header->kind);
        return SD_CORRUPT;
    }
    if (sd_geometry_make(at, header->max_slots, header->heap_cells, header->events) != SD_OK ||
        at->total_bytes != header->total_bytes) {
        snprintf(why, n, "its limits contradict each other");
        return SD_CORRUPT;
    }
    if (size != at->total_bytes) {
        snprintf(why, n, "the file has %llu bytes instead of %llu: truncated",
                 (unsigned long long)size, (unsigned long long)at->total_bytes);
        return SD_CORRUPT;
    }
    if (header->sum != sd_constants_sum(header)) {
        snprintf(why, n, "what its creator wrote is damaged: the checksum does not fit");
        return SD_CORRUPT;
    }
    return SD_OK;
}

/* --- memory ---------------------------------------------------------------------------------- */

/* The mapping keeps the inode, so nothing else can get its number.
 *
 * Another thread may close the descriptor, and open a file in its place, between this look and the
 * use.  The kernel offers nothing against it, and who closes what it does not know beside running
 * threads breaks every library.  What is left to do in that moment is small: commit_file() changes
 * neither bytes nor size of a file, the rest is a close or a flock. */
int sd_descriptor(const sd_segment *segment)
{
    struct stat status;
    if (segment->fd < 0 || fstat(segment->fd, &status)) return -1;
    bool is_ours = status.st_dev == segment->device && status.st_ino == segment->inode;
    return is_ours ? segment->fd : -1;
}

/* The file has its full size: KEEP_SIZE makes no difference to it, only to one that is not ours. */
static int commit_file(int fd, uint64_t offset, uint64_t bytes)
{
    while (fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes))
        if (errno != EINTR) return SD_NO_MEMORY;
    return SD_OK;
}

/* For whoever has lost the descriptor.  Not for everybody: unlike fallocate it keeps what it got
 * before the room was out, and so the rest of the file system.  That does no harm to the segment:
 * the watermark is raised after success only, and who tries again commits the same pages. */
static int commit_mapped(sd_segment *segment, uint64_t offset, uint64_t bytes)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE); /* may be more than SD_PAGE */
    uint64_t from = offset & ~(page - 1), to = (offset + bytes + page - 1) & ~(page - 1);
    while (madvise(segment->base + from, to - from, MADV_POPULATE_WRITE)) {
        if (errno == EINTR) continue;
        if (errno == EINVAL) return SD_DESCRIPTOR; /* before Linux 5.14 */
        if (errno == EFAULT) errno = ENOSPC;       /* to touch it would be SIGBUS */
        return SD_NO_MEMORY;
    }
    return SD_OK;
}

int sd_commit_memory(sd_segment *segment, uint64_t offset, uint64_t bytes)
{
    int fd = sd_descriptor(segment);
    return fd < 0 ? commit_mapped(segment, offset, bytes) : commit_file(fd, offset, bytes);
}

uint64_t sd_room(const sd_word *watermark, uint64_t most)
{
    uint64_t has = sd_unsealed(sd_load_acquire(watermark));
    return has <= most ? has : 0;
}

bool sd_make_room(sd_segment *segment, sd_word *watermark, uint64_t region, uint64_t size,
                  uint64_t wanted, uint64_t most)
{
    uint64_t to = whole_pages(wanted * size) / size;
    while (sd_room(watermark, most) < wanted) {
        uint64_t word = sd_load(watermark), has = sd_unsealed(word);
        uint64_t from = has <= most ? has : 0;
        if (from >= wanted) continue;
        if (sd_commit_memory(segment, region + from * size, (to - from) * size) != SD_OK)
            return false;
        sd_crash_point();
        atomic_compare_exchange_strong(watermark, &word, sd_seal(to));
    }
    return true;
}

uint64_t sd_committed_bytes(const sd_segment *segment)
{
    const sd_geometry *at = &segment->at;
    const sd_header *header = segment->header;
    const sd_word *levels[SD_INDEXES] = {&header->list_level[0], &header->list_level[1],
                                         &header->id_level};
    uint64_t slots = sd_unsealed(sd_load(&header->slots_committed));
    uint64_t cells = sd_unsealed(sd_load(&header->heap_committed));
    uint64_t bytes = at->table[0][0];
    for (int index = 0; index < SD_INDEXES; index++) {
        uint64_t level = sd_unsealed(sd_load(levels[index]));
        for (uint64_t i = 0; i <= level && i < at->levels; i++)
            bytes += 8ull << (SD_INDEX_BITS + i);
    }
    uint64_t entries = sd_unsealed(sd_load(&header->ring_committed));
    bytes += whole_pages(sd_room(&header->counters_committed, SD_COUNTED_MAX) * sizeof(sd_counters));
    bytes += whole_pages(sd_room(&header->waiters_committed, SD_WAITERS_MAX) * sizeof(sd_waiter));
    if (entries <= at->events) bytes += whole_pages(entries * sizeof(sd_entry));
    if (slots <= at->max_slots)
        bytes += whole_pages(slots * sizeof(sd_slot)) + whole_pages(slots * sizeof(sd_names));
    if (cells <= at->heap_cells)
        bytes += whole_pages((cells + 7) / 8) + whole_pages(cells * SD_CELL);
    return bytes;
}

static void set_pointers(sd_segment *segment)
{
    const sd_geometry *at = &segment->at;
    segment->header = (sd_header *)segment->base;
    segment->attached = (sd_word *)(segment->base + at->attached);
    segment->named = (sd_named *)(segment->base + at->named);
    segment->slots = (sd_slot *)(segment->base + at->slots);
    segment->names = (sd_names *)(segment->base + at->names);
    segment->blocks = (sd_counters *)(segment->base + at->counters);
    segment->waiters = (sd_waiter *)(segment->base + at->waiters);
    segment->ring = (sd_entry *)(segment->base + at->ring);
    segment->map = (sd_word *)(segment->base + at->map);
    segment->heap = (sd_word *)(segment->base + at->heap);
    for (int index = 0; index < SD_INDEXES; index++)
        for (unsigned level = 0; level < at->levels; level++)
            segment->table[index][level] = (sd_word *)(segment->base + at->table[index][level]);
}

static int fill_header(sd_header *header, uint64_t kind, const sd_geometry *at)
{
    const sd_thread *self = sd_self();
    header->layout = SD_LAYOUT;
    header->signature = signature();
    if (read_boot(header->boot) != SD_OK) return SD_ERRNO;
    header->pid_namespace = read_namespace("/proc/self/ns/pid");
    header->time_namespace = read_namespace("/proc/self/ns/time");
    header->kind = kind;
    header->total_bytes = at->total_bytes;
    header->max_slots = at->max_slots;
    header->heap_cells = at->heap_cells;
    header->events = at->events;
    if (getrandom(header->id, 16, 0) != 16 || getrandom(&header->seed, 8, 0) != 8) return SD_ERRNO;
    header->creator_who = self->process;
    header->creator_pid = self->pid;
    header->created = sd_now_real();
    sd_store(&header->list_level[0], sd_seal(0));
    sd_store(&header->list_level[1], sd_seal(0));
    sd_store(&header->id_level, sd_seal(0));
    sd_store(&header->slot_count, sd_seal(0));
    sd_store(&header->slots_committed, sd_seal(0));
    sd_store(&header->heap_committed, sd_seal(0));
    sd_store(&header->event_count, sd_seal(0));
    sd_store(&header->ring_committed, sd_seal(0));
    sd_store(&header->counters_committed, sd_seal(0));
    sd_store(&header->waiters_committed, sd_seal(0));
    sd_store(&header->settings_choice, sd_seal(0));
    sd_store(&header->next_id, sd_seal(1)); /* libvirt never gives out 0 either */
    header->magic = SD_MAGIC;
    header->sum = sd_constants_sum(header);
    if (sd_mutex_init(&header->list_mutex) || sd_mutex_init(&header->id_mutex)) return SD_ERRNO;
    if (sd_mutex_init(&header->event_mutex)) return SD_ERRNO;
    return sd_mutex_init(&header->heap_mutex);
}

int sd_format(int fd, uint64_t kind, uint64_t max_slots, uint64_t heap_cells, uint64_t events)
{
    sd_geometry at;
    int result = sd_geometry_make(&at, max_slots, heap_cells, events);
    if (result != SD_OK) return result;
    if (ftruncate(fd, (off_t)at.total_bytes)) return SD_ERRNO;
    result = commit_file(fd, 0, at.table[0][0]);
    for (int index = 0; index < SD_INDEXES && result == SD_OK; index++)
        result = commit_file(fd, at.table[index][0], 8ull << SD_INDEX_BITS);
    if (result != SD_OK) return result;
    uint64_t bytes = at.named + SD_NAMED_MAX * sizeof(sd_named);
    unsigned char *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) return SD_ERRNO;
    result = fill_header((sd_header *)base, kind, &at);
    for (unsigned i = 0; i < SD_NAMED_MAX && result == SD_OK; i++)
        result = sd_mutex_init(&((sd_named *)(base + at.named))[i].mutex);
    munmap(base, bytes);
    return result;
}

/* --- who is attached ------------------------------------------------------------------------- */

/* Where this process counts from now on: the block of its place, or its own memory (V2). */
static void begin_counting(sd_segment *segment, unsigned place)
{
    uint64_t me = sd_self()->process;
    memset(&segment->own, 0, sizeof segment->own);
    segment->counters = &segment->own;
    if (place >= SD_COUNTED_MAX) return;
    if (!sd_make_room(segment, &segment->header->counters_committed, segment->at.counters,
                      sizeof(sd_counters), place + 1, SD_COUNTED_MAX))
        return;
    sd_counters *block = &segment->blocks[place];
    if (sd_load(&block->who) != me) {
        atomic_store_explicit(&block->who, 0, memory_order_release);
        atomic_thread_fence(memory_order_release);
        for (sd_word *word = &block->acquired; word < block->waits + SD_WAIT_SIZES; word++)
            atomic_store_explicit(word, 0, memory_order_relaxed);
        atomic_store_explicit(&block->who, me, memory_order_release);
    }
    segment->counters = block;
}

/* One word a process: its main thread's identity.  Written by the process itself, with compare-and-
 * swap on a word that is empty or names a process that is gone; a dead one's word stays until then.
 * The list is for people: nothing is decided by it alone.  Returns the place; SD_ATTACHED_MAX if all
 * are taken. */
static unsigned take_place(sd_segment *segment)
{
    const sd_thread *self = sd_self();
    uint64_t me = self->process;
    for (int pass = 0; pass < 2; pass++) {
        for (unsigned i = 0; i < SD_ATTACHED_MAX; i++) {
            uint64_t word = sd_load(&segment->attached[i]);
            if (word == me) return i;
            if (word && (pass == 0 || sd_process_runs(sd_who_tid(word), sd_who_start(word))))
                continue;
            sd_crash_point();
            if (atomic_compare_exchange_strong(&segment->attached[i], &word, me)) return i;
        }
    }
    return SD_ATTACHED_MAX;
}

static void enter_attached(sd_segment *segment)
{
    begin_counting(segment, take_place(segment));
}

static void leave_attached(sd_segment *segment)
{
    const sd_thread *self = sd_self();
    uint64_t me = self->process;
    segment->counters = &segment->own; /* another one may get the block */
    for (unsigned i = 0; i < SD_ATTACHED_MAX; i++) {
        uint64_t word = me;
        if (sd_load(&segment->attached[i]) != me) continue;
        sd_crash_point();
        atomic_compare_exchange_strong(&segment->attached[i], &word, 0);
        return;
    }
}

/* --- this process's mappings ----------------------------------------------------------------- */

static sd_segment *find_mapped(const struct stat *status)
{
    for (sd_segment *at = mapped; at; at = at->next)
        if (at->device == status->st_dev && at->inode == status->st_ino) return at;
    return NULL;
}

static int read_header(int fd, const struct stat *status, sd_header *header, char *why, size_t n)
{
    if ((uint64_t)status->st_size < sizeof *header ||
        pread(fd, header, sizeof *header, 0) != (ssize_t)sizeof *header) {
        snprintf(why, n, "the file has %lld bytes, too few for a segment",
                 (long long)status->st_size);
        return SD_MISMATCH;
    }
    return SD_OK;
}

/* A mapping keeps the open file that it was made from, and with it that file's flock.  So it is
 * made from an open file of its own: then closing `fd` releases the flock.  A process that may not
 * open the file anew (after setuid; without /proc) uses `fd`.
 *
 * Whoever reads all of a mapping fills the holes of its file, up to the largest size.  A core dump
 * does, so it leaves this mapping out: all of it, since what is committed grows, and one madvise
 * more each time would be no better a dump than a copy of the file.  mlockall(MCL_FUTURE) does, when
 * a mapping is made; it gives up on one that nobody may access, and does not come back when that
 * is allowed.  (mlockall(MCL_CURRENT) does it later; nothing here can keep it off.) */
static void *map_file(int fd, uint64_t bytes)
{
    char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int own = open(path, O_RDWR | O_CLOEXEC);
    if (own < 0 && sd_exhausted(errno)) return MAP_FAILED;
    void *base = mmap(NULL, bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, own < 0 ? fd : own, 0);
    if (own >= 0) close(own);
    if (base == MAP_FAILED) return base;
    madvise(base, bytes, MADV_DONTDUMP);
    if (!mprotect(base, bytes, PROT_READ | PROT_WRITE)) return base;
    int error = errno;
    munmap(base, bytes);
    errno = error;
    return MAP_FAILED;
}

static void unmap_left(void);

int sd_map(int fd, sd_segment **out, char *why, size_t why_size)
{
    struct stat status;
    sd_header header;
    why[0] = 0;
    unmap_left();
    if (fstat(fd, &status)) return SD_ERRNO;
    sd_segment *segment = find_mapped(&status);
    if (segment) {
        /* Who lost the descriptor gets it back, and the flock.  `fd` may have its number by now. */
        if (fd == segment->fd || sd_descriptor(segment) < 0) {
            int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
            if (own < 0) return SD_ERRNO;
            segment->fd = own;
        }
        segment->users++;
        segment->open++;
        *out = segment;
        return SD_OK;
    }
    segment = calloc(1, sizeof *segment);
    if (!segment) return SD_ERRNO;
    int result = read_header(fd, &status, &header, why, why_size);
    if (result == SD_OK)
        result = validate(&header, (uint64_t)status.st_size, &segment->at, why, why_size);
    if (result == SD_OK) {
        segment->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
        segment->base = segment->fd < 0 ? MAP_FAILED : map_file(fd, segment->at.total_bytes);
        if (segment->base == MAP_FAILED) {
            if (segment->fd >= 0) close(segment->fd);
            result = SD_ERRNO;
        }
    }
    if (result != SD_OK) {
        free(segment);
        return result;
    }
    segment->device = status.st_dev;
    segment->inode = status.st_ino;
    segment->kind = header.kind;
    segment->seed = header.seed;
    segment->pid_namespace = header.pid_namespace;
    segment->time_namespace = header.time_namespace;
    segment->epoch = sd_fork_epoch;
    memcpy(segment->id, header.id, sizeof segment->id);
    set_pointers(segment);
    segment->users = segment->open = 1;
    segment->next = mapped;
    mapped = segment;
    enter_attached(segment);
    *out = segment;
    return SD_OK;
}

/* In a forked child, before its first use: what the parent's threads hold is not ours. */
static void forget_parent(sd_segment *segment)
{
    if (segment->epoch == sd_fork_epoch) return;
    segment->held = segment->inside = 0;
    segment->list_nonce = 0;
    segment->list_taker = NULL;
    segment->list_says = false;
}

static bool runs_here(uint32_t tid)
{
    return tid && (!tgkill(getpid(), (pid_t)tid, 0) || errno != ESRCH);
}

/* The thread that has the lock.  The kernel goes by the mutex when a thread dies, so do we. */
static uint32_t holder_of(const sd_segment *segment, const pthread_mutex_t *mutex,
                          const sd_owner *owner)
{
    if (segment->kind == SD_KIND_ROBUST) return sd_mutex_owner(mutex);
    return sd_who_tid(sd_load(&owner->who));
}

/* Does a thread of ours hold a lock here?  `held` also counts locks that ended with their thread,
 * so it proves only that nothing is held. */
static bool is_held(const sd_segment *segment)
{
    const sd_header *header = segment->header;
    uint32_t slots;
    if (!segment->held) return false;
    if (sd_slots(segment, &slots) != SD_OK) return true; /* unknown: keep it */
    if (runs_here(holder_of(segment, &header->list_mutex, &header->list_owner))) return true;
    for (unsigned i = 0; i < SD_NAMED_MAX; i++) /* robust in lists of either kind */
        if (runs_here(sd_mutex_owner(&segment->named[i].mutex))) return true;
    for (uint32_t i = 0; i < slots; i++) {
        const sd_slot *slot = &segment->slots[i];
        if (runs_here(holder_of(segment, &slot->mutex, &slot->owner))) return true;
    }
    return false;
}

/* The mapping stays for objects that still refer to it.  Nothing in it can be locked any more, so
 * the process may map the segment anew.  Closing the descriptor releases the flock, unless a child
 * has inherited it. */
void sd_detach(sd_segment *segment)
{
    forget_parent(segment);
    if (segment->fd < 0 || segment->open || segment->handles) return;
    if (segment->inside || is_held(segment)) return;
    for (sd_segment **at = &mapped; *at; at = &(*at)->next) {
        if (*at != segment) continue;
        *at = segment->next;
        break;
    }
    leave_attached(segment);
    if (sd_descriptor(segment) >= 0) close(segment->fd);
    segment->fd = -1;
}

static void unmap_unused(sd_segment *segment)
{
    sd_detach(segment);
    if (segment->users || segment->fd >= 0) return;
    munmap(segment->base, segment->at.total_bytes);
    free(segment);
}

bool sd_is_mapped(const void *at, size_t bytes)
{
    for (const sd_segment *one = mapped; one; one = one->next) {
        uintptr_t from = (uintptr_t)at - (uintptr_t)one->base;
        if (from < one->at.total_bytes && one->at.total_bytes - from >= bytes) return true;
    }
    return false;
}

void sd_unmap(sd_segment *segment)
{
    segment->users--;
    unmap_unused(segment);
}

/* Those that were kept for a lock whose thread has ended by now. */
static void unmap_left(void)
{
    for (sd_segment *at = mapped, *next; at; at = next) {
        next = at->next;
        unmap_unused(at);
    }
}

int sd_begin_in_child(sd_segment *segment, char *why, size_t why_size)
{
    int result = compare_namespaces(segment->pid_namespace, segment->time_namespace, why, why_size);
    if (result != SD_OK) return result;
    forget_parent(segment);
    segment->epoch = sd_fork_epoch;
    enter_attached(segment);
    return SD_OK;
}

void sd_poison(sd_segment *segment, uint64_t reason, uint64_t at)
{
    sd_header *header = segment->header;
    const sd_thread *self = sd_self();
    if (sd_load(&header->poisoned)) return;
    sd_store(&header->poisoned_at, at);
    sd_store(&header->poisoned_who, self->who);
    sd_store(&header->poisoned_pid, self->pid);
    sd_store(&header->poisoned_when, sd_now_real());
    sd_publish(&header->poisoned, reason);
}
