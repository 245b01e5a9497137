/* every_store.c - stop a process at every instruction that stores into a segment, and say what the
 * kernel would make of its locks if SIGKILL came just there.
 *
 * Linked into the test build of the core beside crash_points.c; trace_driver.py calls it, with the
 * victim as its child.  Nothing here relies on the inlines of layout.h: the victim's mapping is
 * made read-only, so that each store into it is a fault.  At a fault the mapping is made writable,
 * that one instruction is executed, and the mapping is made read-only again.  Then the whole
 * segment is compared with what it was.  A change that no fault announced, by a system call say,
 * is seen before the next store, and is an error.
 *
 * What a death leaves is more than the bytes: the kernel walks the dead thread's robust list and
 * marks its locks.  The list's head and the entry that is pending lie in the thread's own memory,
 * and change without a fault.  They change in the C library, around the stores into a mutex; so an
 * instruction outside the core that stored is followed by single steps until the core is reached
 * again, with a look at the list after each.  `sd_trace_every` takes the whole way in single steps,
 * to see that no more comes to light.
 *
 * One victim at a time, of one thread.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>

#define SEEN __attribute__((visibility("default")))

enum {
    SD_TRACE_FOUND,  /* the segment has a name and is mapped: from here on it is watched */
    SD_TRACE_BEFORE, /* a store comes next; everything before it is done */
    SD_TRACE_STORE,  /* it was made */
    SD_TRACE_STEP,   /* no byte changed, but a death would mark other locks */
    SD_TRACE_END     /* the victim ended */
};

#define MOST 64

typedef struct {
    uint64_t kind;
    uint64_t points;        /* crash points that were passed, the one for this store included */
    uint64_t place;         /* offset of the store */
    uint64_t instruction;   /* its offset in the core; 0: it lies outside */
    uint64_t in_mutex;      /* the store is one into a mutex */
    uint64_t is_time;       /* the store is one of the time since when a lock is held, or the next */
    uint64_t is_counter;    /* the store is one of what the process counts */
    uint64_t lost;          /* offset of a lock that this death would leave taken; 0: none */
    uint64_t words, deaths; /* how many of the following */
    uint64_t word[MOST][2];  /* offset and new value of what has changed */
    uint64_t death[MOST][2]; /* offset and value of the 32-bit words that the kernel would write */
    uint64_t status;         /* END: as waitpid() gives it */
} sd_trace_event;

SEEN long sd_trace_every; /* not 0: everything in single steps */
SEEN long sd_trace_steps; /* single steps so far */

#if defined(__x86_64__)

#include <fcntl.h>
#include <inttypes.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/ptrace.h> /* after sys/ptrace.h */

#define HIDDEN __attribute__((visibility("hidden")))
#define MUST(condition, ...)                                                          \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: %s: %m ", __FILE__, __LINE__, #condition);       \
            fprintf(stderr, " " __VA_ARGS__);                                         \
            fprintf(stderr, "\n");                                                    \
            abort();                                                                  \
        }                                                                             \
    } while (0)

extern long sd_crash_count;
extern const char __ehdr_start[] HIDDEN, etext[] HIDDEN; /* the core begins, its code ends */

static pid_t victim;
static char path[4096];
static uint64_t base, size;       /* of the victim's mapping; 0: not there */
static unsigned char *now, *seen; /* the segment, and what it was at the last look */
static int file = -1;
static sd_geometry at;
static bool fresh;        /* the victim has not moved since it was given to us */
static bool at_fault;     /* it stands before a store, to this place */
static uint64_t fault;
static bool outside;      /* of the core, after a store from there */
static int signal_to_give;
static uint64_t marked[MOST], marks; /* deaths that were told last */

/* --- the victim's registers and memory ------------------------------------------------------- */

/* A system call that the victim can be sent to: it was forked from us, so it has it, too. */
__asm__(".pushsection .text\n"
        "sd_trace_gate: syscall\n"
        "nop\n"
        ".popsection\n");
extern const char sd_trace_gate[] HIDDEN;

static struct user_regs_struct registers(void)
{
    struct user_regs_struct all;
    MUST(ptrace(PTRACE_GETREGS, victim, NULL, &all) == 0);
    return all;
}

static uint64_t read_word(uint64_t address)
{
    errno = 0;
    long word = ptrace(PTRACE_PEEKDATA, victim, address, NULL);
    MUST(errno == 0);
    return (uint64_t)word;
}

/* One instruction, which must not raise a signal. */
static void step(void)
{
    int status;
    MUST(ptrace(PTRACE_SINGLESTEP, victim, NULL, NULL) == 0);
    MUST(waitpid(victim, &status, __WALL) == victim);
    MUST(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP, "status %x", status);
}

static void protect(int protection)
{
    struct user_regs_struct saved = registers(), call = saved;
    saved.orig_rax = call.orig_rax = ~0ull; /* nothing to restart */
    call.rip = (uint64_t)sd_trace_gate;
    call.rax = SYS_mprotect;
    call.rdi = base;
    call.rsi = size;
    call.rdx = (uint64_t)protection;
    MUST(ptrace(PTRACE_SETREGS, victim, NULL, &call) == 0);
    step();
    MUST(registers().rax == 0);
    MUST(ptrace(PTRACE_SETREGS, victim, NULL, &saved) == 0);
}

static bool in_core(uint64_t instruction)
{
    return instruction >= (uint64_t)__ehdr_start && instruction < (uint64_t)etext;
}

/* --- the segment ----------------------------------------------------------------------------- */

static void forget(void)
{
    if (now) munmap(now, size), munmap(seen, size);
    if (file >= 0) close(file);
    now = seen = NULL;
    file = -1;
    base = size = 0;
}

/* Where the victim has the file with this inode mapped. */
static bool find_mapping(ino_t inode)
{
    char name[64], line[5000];
    snprintf(name, sizeof name, "/proc/%d/maps", (int)victim);
    FILE *maps = fopen(name, "re");
    MUST(maps);
    while (!base && fgets(line, sizeof line, maps)) {
        uint64_t begin, end, other;
        char access[5];
        int fields = sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %*s %*s %" SCNu64, &begin, &end,
                            access, &other);
        if (fields == 4 && other == inode && access[1] == 'w') base = begin, size = end - begin;
    }
    fclose(maps);
    return base;
}

/* Tell what has changed since the last look.  What was never written to has no memory yet. */
static void compare(sd_trace_event *event)
{
    for (off_t begin, end = 0; (begin = lseek(file, end, SEEK_DATA)) >= 0;) {
        end = lseek(file, begin, SEEK_HOLE);
        MUST(end > begin);
        for (off_t page = begin; page < end; page += SD_PAGE) {
            if (!memcmp(now + page, seen + page, SD_PAGE)) continue;
            for (off_t i = page; i < page + (off_t)SD_PAGE; i += 8) {
                if (!memcmp(now + i, seen + i, 8)) continue;
                MUST(event->words < MOST, "more than one store");
                event->word[event->words][0] = (uint64_t)i;
                memcpy(&event->word[event->words++][1], now + i, 8);
            }
            memcpy(seen + page, now + page, SD_PAGE);
        }
    }
}

/* Watch the mapping if there is one of a file that has its name. */
static bool watch(void)
{
    struct stat status;
    if (stat(path, &status) || !find_mapping(status.st_ino)) return false;
    file = open(path, O_RDONLY | O_CLOEXEC);
    now = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_NORESERVE, file, 0);
    seen = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                0);
    MUST(file >= 0 && now != MAP_FAILED && seen != MAP_FAILED);
    const sd_header *header = (const sd_header *)now;
    MUST(sd_geometry_make(&at, header->max_slots, header->heap_cells, header->events) == SD_OK);
    MUST(at.total_bytes == size);
    for (off_t begin, end = 0; (begin = lseek(file, end, SEEK_DATA)) >= 0;) {
        end = lseek(file, begin, SEEK_HOLE);
        memcpy(seen + begin, now + begin, (size_t)(end - begin));
    }
    protect(PROT_READ);
    return true;
}

#define HEADER_MUTEXES 4
#define MUTEXES_BEFORE_SLOTS (HEADER_MUTEXES + SD_NAMED_MAX)

static uint64_t mutexes(void)
{
    return MUTEXES_BEFORE_SLOTS + sd_unsealed(((const sd_header *)now)->slot_count);
}

static uint64_t mutex_place(uint64_t number)
{
    const uint64_t places[] = {offsetof(sd_header, list_mutex), offsetof(sd_header, id_mutex),
                               offsetof(sd_header, event_mutex), offsetof(sd_header, heap_mutex)};
    if (number < HEADER_MUTEXES) return places[number];
    if (number < MUTEXES_BEFORE_SLOTS)
        return at.named + (number - HEADER_MUTEXES) * sizeof(sd_named) + offsetof(sd_named, mutex);
    return at.slots + (number - MUTEXES_BEFORE_SLOTS) * sizeof(sd_slot) + offsetof(sd_slot, mutex);
}

/* Of the slots not yet counted, too: a mutex is initialised before. */
static bool in_mutex(uint64_t place)
{
    for (uint64_t i = 0; i < MUTEXES_BEFORE_SLOTS; i++)
        if (place - mutex_place(i) < sizeof(pthread_mutex_t)) return true;
    uint64_t slot = (place - at.slots) / sizeof(sd_slot);
    return place >= at.slots && slot < at.max_slots &&
           place - mutex_place(MUTEXES_BEFORE_SLOTS + slot) < sizeof(pthread_mutex_t);
}

/* Nothing depends on a store there, and none is a crash point (layout.h, V2). */
static bool is_counter(uint64_t place)
{
    return place >= at.counters && place < at.waiters;
}

static bool is_time(uint64_t place)
{
    if (is_counter(place)) return true;
    if (place == offsetof(sd_header, list_owner) + offsetof(sd_owner, since)) return true;
    if (place >= at.named && place < at.table[0][0])
        return (place - at.named) % sizeof(sd_named) ==
               offsetof(sd_named, owner) + offsetof(sd_owner, since);
    if (place >= at.ring && place < at.map)
        return (place - at.ring) % sizeof(sd_entry) == offsetof(sd_entry, time);
    return place >= at.slots && place < at.names &&
           (place - at.slots) % sizeof(sd_slot) ==
               offsetof(sd_slot, owner) + offsetof(sd_owner, since);
}

/* --- what the kernel would do to its locks: exit_robust_list() in kernel/futex/core.c ---------- */

static uint32_t lock_word(uint64_t place)
{
    uint32_t word;
    memcpy(&word, now + place, 4);
    return word;
}

/* handle_futex_death().  Waiters stay noted; of a lock that nobody has or somebody else has taken,
 * pending or not, nothing is written.  Locks that do not lie in the segment are not ours to tell. */
static void bury(sd_trace_event *event, uint64_t address)
{
    if (address < base || address - base >= size) return;
    uint64_t place = address - base;
    uint32_t word = lock_word(place);
    if ((word & FUTEX_TID_MASK) != (uint32_t)victim) return;
    for (uint64_t i = 0; i < event->deaths; i++)
        if (event->death[i][0] == place) return; /* a list in disorder may go in circles */
    MUST(event->deaths < MOST);
    uint64_t i = event->deaths++; /* in the order of places: who is marked first does not matter */
    for (; i && event->death[i - 1][0] > place; i--)
        memcpy(event->death[i], event->death[i - 1], sizeof event->death[i]);
    event->death[i][0] = place;
    event->death[i][1] = (word & FUTEX_WAITERS) | FUTEX_OWNER_DIED;
}

static void bury_all(sd_trace_event *event)
{
    struct robust_list_head *head;
    size_t bytes;
    MUST(syscall(SYS_get_robust_list, victim, &head, &bytes) == 0);
    event->deaths = 0;
    if (!head) return;
    uint64_t pending = read_word((uint64_t)&head->list_op_pending) & ~1ull;
    uint64_t to_word = read_word((uint64_t)&head->futex_offset);
    uint64_t entry = read_word((uint64_t)&head->list.next) & ~1ull;
    for (int left = ROBUST_LIST_LIMIT; entry != (uint64_t)&head->list && left; left--) {
        uint64_t next = read_word(entry) & ~1ull;
        if (entry != pending) bury(event, entry + to_word);
        entry = next;
    }
    if (pending) bury(event, pending + to_word);
}

/* A lock in the victim's name that is not among them would stay taken. */
static void look_for_lost(sd_trace_event *event)
{
    for (uint64_t i = 0; i < mutexes(); i++) {
        uint64_t place = mutex_place(i), death = 0;
        if ((lock_word(place) & FUTEX_TID_MASK) != (uint32_t)victim) continue;
        while (death < event->deaths && event->death[death][0] != place) death++;
        if (death == event->deaths) event->lost = place;
    }
}

/* Whether it is other locks than were told last. */
static bool look_at_locks(sd_trace_event *event)
{
    bury_all(event);
    look_for_lost(event);
    bool same = marks == event->deaths;
    for (uint64_t i = 0; same && i < marks; i++) same = marked[i] == event->death[i][0];
    marks = event->deaths;
    for (uint64_t i = 0; i < marks; i++) marked[i] = event->death[i][0];
    return !same;
}

/* --- from stop to stop ----------------------------------------------------------------------- */

/* The caller wants to be the victim of its parent; it stops here until that one goes on.
 * Returns 0, or why it cannot be. */
SEEN int sd_trace_me(void)
{
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL)) return errno;
    return raise(SIGSTOP) ? errno : 0;
}

/* Follow a child that has stopped in sd_trace_me(), and watch the segment with this path. */
SEEN void sd_trace_begin(int pid, const char *segment)
{
    forget();
    victim = pid;
    fresh = true;
    at_fault = outside = false;
    signal_to_give = 0;
    marks = 0;
    MUST(strlen(segment) < sizeof path);
    strcpy(path, segment);
    long options = PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE |
                   PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACEEXEC;
    MUST(ptrace(PTRACE_SETOPTIONS, victim, NULL, options) == 0);
}

static void tell(sd_trace_event *event, int kind)
{
    event->kind = (uint64_t)kind;
    event->points = read_word((uint64_t)&sd_crash_count);
    look_at_locks(event);
}

static void describe(sd_trace_event *event)
{
    event->place = fault;
    event->in_mutex = in_mutex(fault);
    event->is_time = is_time(fault);
    event->is_counter = is_counter(fault);
}

/* The victim stands before a store. */
static void tell_before(sd_trace_event *event, uint64_t address)
{
    uint64_t instruction = registers().rip;
    at_fault = true;
    fault = address - base;
    describe(event);
    event->instruction = in_core(instruction) ? instruction - (uint64_t)__ehdr_start : 0;
    compare(event);
    tell(event, SD_TRACE_BEFORE);
}

static void make_store(sd_trace_event *event)
{
    at_fault = false;
    protect(PROT_READ | PROT_WRITE);
    step();
    protect(PROT_READ);
    sd_trace_steps++;
    outside = !in_core(registers().rip);
    describe(event);
    compare(event);
    tell(event, SD_TRACE_STORE);
}

static bool is_our_fault(int status, uint64_t *address)
{
    siginfo_t info;
    if (!base || WSTOPSIG(status) != SIGSEGV) return false;
    MUST(ptrace(PTRACE_GETSIGINFO, victim, NULL, &info) == 0);
    *address = (uint64_t)info.si_addr;
    return info.si_code == SEGV_ACCERR && *address - base < size;
}

/* The mapping comes and goes with system calls. */
static bool found_after_call(void)
{
    struct ptrace_syscall_info call;
    MUST(ptrace(PTRACE_GET_SYSCALL_INFO, victim, sizeof call, &call) > 0);
    bool entry = call.op == PTRACE_SYSCALL_INFO_ENTRY;
    if (entry && base && call.entry.nr == SYS_munmap && call.entry.args[0] == base) forget();
    return !entry && !base && watch();
}

static void resume(int *status)
{
    int how = base && (sd_trace_every || outside) ? PTRACE_SINGLESTEP : PTRACE_SYSCALL;
    MUST(ptrace(how, victim, NULL, signal_to_give) == 0);
    MUST(waitpid(victim, status, __WALL) == victim);
    signal_to_give = 0;
}

/* Go on to the next event. */
SEEN void sd_trace_next(sd_trace_event *event)
{
    int status;
    uint64_t address;
    memset(event, 0, sizeof *event);
    if (at_fault) {
        make_store(event);
        return;
    }
    bool first = fresh;
    fresh = false;
    if (first && watch()) {
        tell(event, SD_TRACE_FOUND);
        return;
    }
    for (;;) {
        resume(&status);
        if (!WIFSTOPPED(status)) {
            event->status = (uint64_t)status;
            if (base) compare(event);
            event->kind = SD_TRACE_END;
            forget();
            return;
        }
        MUST(status >> 16 == 0, "the victim starts threads or processes");
        if (is_our_fault(status, &address)) {
            tell_before(event, address);
            return;
        }
        if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
            if (!found_after_call()) continue;
            tell(event, SD_TRACE_FOUND);
            return;
        }
        if (WSTOPSIG(status) != SIGTRAP) {
            signal_to_give = WSTOPSIG(status);
            continue;
        }
        sd_trace_steps++;
        outside = outside && !in_core(registers().rip);
        if (!look_at_locks(event)) continue;
        tell(event, SD_TRACE_STEP);
        return;
    }
}

/* End the victim here and now.  Its mapping is made writable first: the kernel marks locks with the
 * rights of the dying. */
SEEN void sd_trace_kill(void)
{
    protect(PROT_READ | PROT_WRITE);
    MUST(kill(victim, SIGKILL) == 0);
    MUST(waitpid(victim, NULL, __WALL) == victim);
    forget();
}

#else

SEEN int sd_trace_me(void)
{
    return ENOSYS; /* the registers of other processors have other names */
}

#endif
