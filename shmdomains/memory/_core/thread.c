/* thread.c - this process's threads, who else runs, and the time.
 *
 * Each thread has a node, found through a thread-local pointer.  Its nonce names the thread for
 * good: it is never used again in this process or its children, so a handle that remembers a nonce
 * can tell its owner from every later thread.  A node belongs to one fork epoch: a forked child
 * sees its thread's node as foreign and begins it anew, owning nothing.  Nodes of ended threads go
 * to a lock-free list and are reused, never freed.  A task that runs on a thread has a node of its
 * own, with a nonce of its own, as long as it may own something.
 *
 * Other threads are known by /proc.  A number alone proves nothing, since it is reused, also within
 * one process: an identity adds when the thread started, in ticks of 10 ms.  The kernel gives
 * numbers in turn and comes back to one after 32,768 others at the earliest, so not within a tick.
 * If /proc cannot be read the answer is "it runs", and nothing is taken from anybody.
 */
#define _GNU_SOURCE
#include "thread.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t sd_fork_epoch = 1;
_Thread_local sd_thread *sd_this_thread __attribute__((tls_model("initial-exec")));
static _Atomic uint64_t nonces = 1;
static _Atomic(sd_thread *) idle_threads;
static pthread_key_t thread_key;
static pthread_mutex_t ends = PTHREAD_MUTEX_INITIALIZER;
static uint64_t start_of_self, start_epoch;

/* The child owns none of its parent's locks: under a new epoch every older nonce is foreign. */
static void after_fork_in_child(void)
{
    sd_fork_epoch++;
    pthread_mutex_init(&ends, NULL);
}

static void push_idle(sd_thread *thread)
{
    thread->next = atomic_load(&idle_threads);
    while (!atomic_compare_exchange_weak(&idle_threads, &thread->next, thread)) {}
}

static void thread_ended(void *thread)
{
    sd_thread *ended = thread;
    pthread_mutex_lock(&ends);
    ended->nonce = 0;
    pthread_mutex_unlock(&ends);
    ended->orphans = NULL; /* its locks die with the thread */
    sd_this_thread = NULL;
    push_idle(ended);
}

bool sd_thread_keep(const sd_thread *thread, uint64_t nonce)
{
    pthread_mutex_lock(&ends);
    if (nonce && thread->nonce == nonce && thread->epoch == sd_fork_epoch) return true;
    pthread_mutex_unlock(&ends);
    return false;
}

void sd_thread_let_go(void)
{
    pthread_mutex_unlock(&ends);
}

/* Taking the whole list and putting the rest back needs no guard against ABA. */
static sd_thread *pop_idle(void)
{
    sd_thread *first = atomic_exchange(&idle_threads, NULL);
    if (!first) return NULL;
    for (sd_thread *rest = first->next, *next; rest; rest = next) {
        next = rest->next;
        push_idle(rest);
    }
    return first;
}

__attribute__((constructor)) static void begin(void)
{
    pthread_atfork(NULL, NULL, after_fork_in_child);
    pthread_key_create(&thread_key, thread_ended);
}

uint64_t sd_identity(uint32_t tid, uint64_t start)
{
    return sd_who_tid(tid) | start << SD_TID_BITS;
}

bool sd_exhausted(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOMEM;
}

/* What a stat file of /proc says of a thread. */
typedef struct {
    char state;
    unsigned threads; /* of its process, as long as they are not reaped */
    uint64_t start;   /* ticks since boot */
} stat_line;

/* False: there is no such file, or errno is sd_exhausted(). */
static bool read_stat(uint32_t tid, stat_line *line)
{
    char path[40], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", tid);
    errno = 0;
    FILE *file = fopen(path, "re");
    if (!file) return false;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    /* The command in brackets may contain anything: count fields from its end.  State is the third,
     * the number of threads the 20th, the start the 22nd. */
    char *at = strrchr(text, ')');
    if (!at || at[1] != ' ') return false;
    line->state = at[2];
    for (int field = 2; field < 22 && at; field++) {
        at = strchr(at + 1, ' ');
        if (at && field == 19) line->threads = (unsigned)strtoul(at + 1, NULL, 10);
    }
    line->start = at ? strtoull(at + 1, NULL, 10) : 0;
    return at != NULL;
}

/* A thread that has ended, and is not reaped. */
static bool has_ended(const stat_line *line)
{
    return line->state == 'Z' || line->state == 'X';
}

uint64_t sd_process_start(uint32_t pid)
{
    stat_line line;
    if (read_stat(pid, &line)) return line.start;
    return sd_exhausted(errno) ? SD_START_UNKNOWN : 0;
}

bool sd_process_runs(uint32_t pid, uint64_t start)
{
    stat_line line;
    if (!read_stat(pid, &line)) return sd_exhausted(errno);
    /* The first thread may have ended before the others. */
    if (has_ended(&line) && line.threads <= 1) return false;
    return !start || line.start == start;
}

uint32_t sd_process_of(uint32_t tid)
{
    char path[40], line[128];
    unsigned pid = 0;
    snprintf(path, sizeof path, "/proc/%u/status", tid);
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    while (fgets(line, sizeof line, file) && sscanf(line, "Tgid: %u", &pid) != 1) {}
    fclose(file);
    return pid;
}

/* The file of a number is that of the thread, also where it is not its process's first; only the
 * list of /proc leaves the others out.  A zombie has one, and the first thread of a running process
 * may be one.  The kernel walks a thread's robust list before it makes it a zombie. */
bool sd_alive(uint64_t who)
{
    uint32_t tid = sd_who_tid(who);
    uint64_t then = sd_who_start(who);
    stat_line line;
    if (!tid) return false;
    if (read_stat(tid, &line)) return !has_ended(&line) && (!then || line.start == then);
    /* Hidden, or this process has no descriptor left to look. */
    return kill((pid_t)tid, 0) == 0 || errno != ESRCH;
}

bool sd_sleeps(uint32_t tid)
{
    stat_line line;
    return read_stat(tid, &line) && line.state == 'S';
}

/* It holds nothing yet. */
static void begin_owner(sd_thread *self, sd_thread *kernel)
{
    self->kernel = kernel;
    self->kernel_nonce = kernel->nonce;
    self->muted = 0;
    self->held = self->lists = self->nested = self->short_wait = 0;
    self->records = self->named = NULL;
    self->in_slice = false;
    self->orphans = NULL;
    self->awaited = NULL;
    self->wait = NULL;
    self->runs = self->acts_for = NULL;
    self->rooms = 0;
    self->asks = self->gives_up = false;
    self->until = 0;
}

sd_thread *sd_thread_begin(void)
{
    sd_thread *self = sd_this_thread;
    if (start_epoch != sd_fork_epoch) {
        start_of_self = sd_process_start((uint32_t)getpid());
        if (start_of_self == SD_START_UNKNOWN) start_of_self = 0; /* the next thread looks again */
        else start_epoch = sd_fork_epoch;
    }
    if (!self) {
        self = pop_idle();
        if (!self) self = calloc(1, sizeof *self);
        if (!self) abort(); /* a hundred bytes: nothing in this process could go on */
        sd_this_thread = self;
        pthread_setspecific(thread_key, self);
    }
    self->epoch = sd_fork_epoch;
    self->nonce = atomic_fetch_add(&nonces, 1);
    uint32_t tid = (uint32_t)syscall(SYS_gettid);
    uint64_t start = sd_process_start(tid); /* any thread's: see sd_alive() */
    self->pid = (uint64_t)getpid();
    self->process = sd_identity((uint32_t)self->pid, start_of_self);
    self->who = sd_identity(tid, start == SD_START_UNKNOWN ? 0 : start);
    begin_owner(self, self);
    return self;
}

/* --- tasks ----------------------------------------------------------------------------------- */

sd_thread *sd_task_begin(void)
{
    sd_thread *kernel = sd_self(), *task = pop_idle();
    if (!task) task = calloc(1, sizeof *task);
    if (!task) return NULL;
    task->epoch = kernel->epoch;
    task->nonce = atomic_fetch_add(&nonces, 1);
    task->pid = kernel->pid;
    task->process = kernel->process;
    task->who = kernel->who;
    begin_owner(task, kernel);
    return task;
}

void sd_task_end(sd_thread *task)
{
    task->nonce = 0;
    push_idle(task);
}

static uint64_t read_clock(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * SD_SECOND_NS + (uint64_t)now.tv_nsec;
}

uint64_t sd_now(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

uint64_t sd_now_coarse(void)
{
    return read_clock(CLOCK_MONOTONIC_COARSE);
}

uint64_t sd_now_real(void)
{
    return read_clock(CLOCK_REALTIME);
}
