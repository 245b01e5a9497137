/* thread.h - this process's threads, who else runs, and the time. */
#ifndef SHMDOMAINS_THREAD_H
#define SHMDOMAINS_THREAD_H

#include "layout.h"

struct sd_segment;
struct sd_wait;

/* A lock whose handle was dropped by another thread than its owner, or whose task ended there, and
 * which only the owner can free (unlock_for.c). */
typedef struct sd_orphan {
    struct sd_segment *segment;
    uint32_t slot; /* or the place of a named lock */
    bool named, list;
    struct sd_orphan *next;
} sd_orphan;

/* What this thread's recent lock calls repaired.  Clear, lock, read. */
typedef struct {
    bool repaired;     /* what the lock protects was rebuilt */
    bool died;         /* its holder had died */
    uint64_t who, pid; /* that holder as it had signed; 0: it had not */
    uint64_t freed;    /* cells of garbage */
} sd_repair;

/* An owner of locks: one thread of this process, or a task that runs on one.  Nodes are reused when
 * their owner ends and never freed, so a handle may look at the node of its last owner: another
 * nonce there says that the owner is gone.
 *
 * The kernel knows threads only.  A task's locks are its thread's mutexes, which that thread takes
 * and frees; of a task's node the core uses nothing.  The binding keeps in it what it keeps in a
 * thread's: nonce, held, records, named. */
typedef struct sd_thread {
    uint64_t epoch;      /* of fork */
    uint64_t nonce;      /* this owner; never used again in this process or its children */
    uint64_t who;        /* sd_identity() */
    uint64_t pid;
    uint64_t process;    /* its sd_identity() */
    struct sd_thread *kernel; /* the thread that this task runs on; of a thread, itself */
    uint64_t kernel_nonce;    /* that thread's, then */
    unsigned held;       /* slots and named locks this thread holds, in all segments */
    unsigned lists;      /* list locks it holds */
    unsigned short_wait; /* it waits for one of the core's own short locks */
    unsigned nested;     /* signal handlers running inside a wait of this thread */
    bool in_slice;       /* it waits for a mutex without the GIL; changes under the GIL */
    uint64_t muted;      /* until then it does not wait to tell of a death (locks.c) */
    void *records;       /* the binding's list of its locked handles */
    void *named;         /* and of the named locks that it holds */
    sd_orphan *orphans;
    sd_repair repair;
    const sd_owner *awaited; /* signs for the mutex that this thread waits for; NULL: nobody does */
    struct sd_wait *wait;    /* the wait for a list or slot lock that this thread is in, or NULL */
    /* The binding's: */
    uint64_t stretch, stretch_of; /* when it last looked who runs on this thread, */
    struct sd_thread *runs;       /* and who did; NULL: look */
    struct sd_thread *acts_for; /* the owner for whom this thread works; NULL: itself */
    unsigned rooms;             /* locks that tasks of this thread wait for (rooms.py) */
    bool asks;                  /* it must not block: whoever called it waits elsewhere */
    bool gives_up;              /* whoever it works for does not want it any more */
    uint64_t until;             /* deadline of a call that asks, and has asked before; or 0 */
    struct sd_thread *next;
} sd_thread;

extern uint64_t sd_fork_epoch;
/* Every call reads it, many more than once, so not through __tls_get_addr().  That takes one word
 * of the few hundred bytes that the loader keeps for modules that are loaded late. */
extern _Thread_local sd_thread *sd_this_thread __attribute__((tls_model("initial-exec")));
sd_thread *sd_thread_begin(void);
/* A node for a task of this thread, and its end.  NULL: no memory. */
sd_thread *sd_task_begin(void);
void sd_task_end(sd_thread *task);

static inline sd_thread *sd_self(void)
{
    sd_thread *self = sd_this_thread;
    if (__builtin_expect(self && self->epoch == sd_fork_epoch, 1)) return self;
    return sd_thread_begin();
}

/* No thread of this process ends until sd_thread_let_go().  False: this one has, or is about to.  A
 * moment only. */
bool sd_thread_keep(const sd_thread *thread, uint64_t nonce);
void sd_thread_let_go(void);

/* What sd_who_tid() and sd_who_start() take apart. */
uint64_t sd_identity(uint32_t tid, uint64_t start);
/* Start of a process in clock ticks since boot, 0 when there is no such process,
 * SD_START_UNKNOWN when this process has no descriptor or memory left to look. */
#define SD_START_UNKNOWN UINT64_MAX
uint64_t sd_process_start(uint32_t pid);
/* Does the process run that started then, and was not killed?  With start 0, which nobody could
 * look up, any process of this number will do.  If it cannot be found out the answer is yes: then
 * a wait goes on, and nothing is taken. */
bool sd_process_runs(uint32_t pid, uint64_t start);
/* Was it this process's own lack of descriptors or memory? */
bool sd_exhausted(int error);
/* The process that thread `tid` belongs to, 0 when there is none. */
uint32_t sd_process_of(uint32_t tid);
/* Does the thread with this identity still run?  Yes if that cannot be found out. */
bool sd_alive(uint64_t who);

/* Does it wait in the kernel right now?  No if that cannot be found out. */
bool sd_sleeps(uint32_t tid);

#define SD_SECOND_NS 1000000000ull
uint64_t sd_now(void);        /* CLOCK_MONOTONIC, ns */
uint64_t sd_now_coarse(void); /* CLOCK_MONOTONIC_COARSE, ns */
uint64_t sd_now_real(void);   /* CLOCK_REALTIME, ns */

#endif
