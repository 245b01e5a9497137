/* observe_test.c - watches (observe.c), on real robust mutexes, across fork and SIGKILL.
 *
 *   observe_test [one] PART
 *
 * `one`: with a thread for each watch, as where there is no futex_waitv().
 *
 *   inbox     what is readable when, and in which order
 *   words     changed before, changed after, woken without a change; many at once
 *   unlock    fires when another process unlocks, and is not woken for anything else
 *   death     fires when another process is killed that holds it
 *   chain     watches of three processes, live and cancelled, hand a wake on to the one real waiter
 *   both      two words woken at once: the kernel names one of them
 *   turn      while a mutex is free others are let in first
 *   queue     while it is held those who sleep for it are first
 *   turns     many woken at once: none is overlooked
 *   cancel    threads cancel what others wake; words and watches are unmapped at once
 *   close     an inbox that is closed while its watches fire
 *   fork      in the middle of all that
 *   speed     how long from a wake until the descriptor is readable
 *
 * Nothing here looks at a word again after a while, as users must: a wake-up that is lost hangs the
 * program, and its alarm ends it.  Who has to sleep first is counted in the kernel: a requeue of a
 * word's sleepers to the same word says how many there are.
 *
 * Exit status 0 if all held; otherwise it says what did not, and dies.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PATIENCE 60 /* seconds for a part; far beyond what a loaded machine needs */
#define FOREVER 600 /* seconds of a wait that must be ended by a wake */

#define MUST(condition, ...)                                                 \
    do {                                                                     \
        if (!(condition)) {                                                  \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, " " __VA_ARGS__);                                \
            fprintf(stderr, "\n");                                           \
            abort();                                                         \
        }                                                                    \
    } while (0)

static bool one_each;

/* --- tools -------------------------------------------------------------------------------------- */

static void *shared(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(memory != MAP_FAILED);
    return memory;
}

static void wake(uint32_t *word, int most)
{
    syscall(SYS_futex, word, FUTEX_WAKE, most);
}

/* Threads that sleep on the word in the kernel, of any process; -1: its value is another one. */
static long sleepers(uint32_t *word, uint32_t value)
{
    return syscall(SYS_futex, word, FUTEX_CMP_REQUEUE, 0, (void *)(uintptr_t)INT_MAX, word, value);
}

static uint32_t value_of(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void set(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static void await_value(const uint32_t *word, uint32_t value)
{
    while (value_of(word) < value) sched_yield();
}

static void await_sleepers(uint32_t *word, long many)
{
    while (sleepers(word, value_of(word)) != many) sched_yield();
}

static bool readable(sd_inbox *inbox, int patience)
{
    struct pollfd one = {.fd = sd_inbox_fd(inbox), .events = POLLIN};
    MUST(one.fd >= 0);
    return poll(&one, 1, patience) == 1;
}

static sd_watch *next(sd_inbox *inbox)
{
    for (;;) {
        sd_watch *watch = sd_inbox_take(inbox);
        if (watch) return watch;
        readable(inbox, -1);
    }
}

static void arm(sd_watch *watch, sd_inbox *inbox, uint32_t *word, uint32_t seen, int kind)
{
    while (sd_watch_begin(watch, inbox, word, seen, kind) != SD_OK) {
        /* The threads of what was cancelled come back. */
        MUST((one_each || kind == SD_WATCH_TURN) && errno == EAGAIN, "%s", strerror(errno));
        sched_yield();
    }
}

static sd_inbox *open_inbox(void)
{
    sd_inbox *inbox = sd_inbox_open();
    MUST(inbox, "%s", strerror(errno));
    return inbox;
}

static pid_t start(void)
{
    fflush(NULL);
    pid_t pid = fork();
    MUST(pid >= 0);
    if (!pid) alarm(PATIENCE);
    return pid;
}

static void finish(pid_t pid, int signal)
{
    int status;
    if (signal) kill(pid, signal);
    MUST(waitpid(pid, &status, 0) == pid);
    if (signal) MUST(WIFSIGNALED(status) && WTERMSIG(status) == signal, "%x", status);
    else MUST(!status, "status %x", status);
}

static void lock_for_good(pthread_mutex_t *mutex)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += FOREVER;
    MUST(!pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until));
}

/* --- the parts ---------------------------------------------------------------------------------- */

static void test_inbox(void)
{
    sd_inbox *inbox = open_inbox();
    sd_watch a = {.data = &a}, b = {.data = &b};
    uint32_t *word = shared(4096);
    MUST(!readable(inbox, 0) && !sd_inbox_take(inbox));
    arm(&a, inbox, word, 1, SD_WATCH_CHANGE);
    arm(&b, inbox, word, 2, SD_WATCH_CHANGE);
    MUST(sd_watch_begin(&a, inbox, word, 1, SD_WATCH_CHANGE) == SD_ERRNO && errno == EBUSY);
    MUST(readable(inbox, 0));
    MUST(sd_inbox_take(inbox) == &a && a.data == &a);
    MUST(readable(inbox, 0)); /* who takes one and goes is told again */
    MUST(sd_inbox_take(inbox) == &b);
    MUST(!sd_inbox_take(inbox) && !readable(inbox, 0));
    /* Once more, and what fired is cancelled. */
    arm(&a, inbox, word, 1, SD_WATCH_CHANGE);
    MUST(readable(inbox, 0));
    sd_watch_cancel(&a);
    sd_watch_cancel(&a);
    MUST(!sd_inbox_take(inbox) && !readable(inbox, 0));
    arm(&b, inbox, word, 1, SD_WATCH_CHANGE);
    MUST(readable(inbox, 0) && sd_inbox_take(inbox) == &b);
    uint32_t *odd = (uint32_t *)((char *)word + 2);
    MUST(sd_watch_begin(&a, inbox, odd, 1, SD_WATCH_CHANGE) == SD_ERRNO && errno == EINVAL);
    sd_inbox_close(inbox);
    munmap(word, 4096);
}

/* Each of them fires once; more than one helper can take. */
static void test_words(void)
{
    enum { MANY = 1000 };
    unsigned many = one_each ? 400 : MANY;
    static sd_watch watches[MANY];
    static unsigned fired[MANY];
    sd_inbox *inbox = open_inbox();
    uint32_t *words = shared(MANY * 64);
    for (unsigned round = 0; round < 20; round++) {
        for (unsigned i = 0; i < many; i++) {
            fired[i] = 0;
            watches[i].data = &fired[i];
            arm(&watches[i], inbox, &words[i * 16], round, SD_WATCH_CHANGE);
        }
        MUST(!sd_inbox_take(inbox));
        if (round % 2) await_sleepers(&words[(many - 1) * 16], 1);
        for (unsigned i = 0; i < many; i++) {
            uint32_t *word = &words[(i * 7919 + round) % many * 16];
            set(word, round + 1);
            wake(word, INT_MAX);
        }
        for (unsigned i = 0; i < many; i++) ++*(unsigned *)next(inbox)->data;
        for (unsigned i = 0; i < many; i++) MUST(fired[i] == 1, "%u of round %u", i, round);
        MUST(!sd_inbox_take(inbox) && !readable(inbox, 0));
    }
    /* A wake that changes nothing. */
    arm(&watches[0], inbox, words, 20, SD_WATCH_CHANGE);
    await_sleepers(words, 1);
    wake(words, 1);
    MUST(next(inbox) == &watches[0]);
    if (one_each) { /* there is an end, and it is told */
        unsigned i = 0;
        while (i < MANY && sd_watch_begin(&watches[i], inbox, &words[i * 16], value_of(&words[i * 16]),
                                          SD_WATCH_CHANGE) == SD_OK)
            i++;
        MUST(i >= 400 && i <= 512 && errno == EAGAIN, "%u", i);
    }
    sd_inbox_close(inbox);
}

typedef struct {
    pthread_mutex_t mutex;
    uint32_t step; /* how far they all are */
} stage;

static stage *make_stage(void)
{
    stage *made = shared(4096);
    MUST(sd_mutex_init(&made->mutex) == SD_OK);
    return made;
}

static void test_unlock(void)
{
    stage *stage = make_stage();
    uint32_t *word = sd_mutex_word(&stage->mutex);
    sd_inbox *inbox = open_inbox();
    sd_watch watch = {0};
    arm(&watch, inbox, word, 0, SD_WATCH_MUTEX); /* it is free */
    MUST(readable(inbox, 0) && sd_inbox_take(inbox) == &watch && !sd_inbox_take(inbox));
    pid_t pid = start();
    if (!pid) {
        for (uint32_t i = 0; i < 200; i++) {
            await_value(&stage->step, 3 * i); /* while it is held again nothing fires */
            pthread_mutex_lock(&stage->mutex);
            set(&stage->step, 3 * i + 1);
            await_value(&stage->step, 3 * i + 2);
            pthread_mutex_unlock(&stage->mutex);
        }
        _exit(0);
    }
    for (uint32_t i = 0; i < 200; i++) {
        await_value(&stage->step, 3 * i + 1);
        arm(&watch, inbox, word, 0, SD_WATCH_MUTEX);
        MUST(value_of(word) & FUTEX_WAITERS);
        if (i % 2) await_sleepers(word, 1);
        if (i % 4 == 1) wake(word, INT_MAX);
        MUST(!sd_inbox_take(inbox), "it is held");
        set(&stage->step, 3 * i + 2);
        MUST(next(inbox) == &watch);
        set(&stage->step, 3 * i + 3);
    }
    finish(pid, 0);
    sd_inbox_close(inbox);
}

static void test_death(void)
{
    stage *stage = make_stage();
    uint32_t *word = sd_mutex_word(&stage->mutex);
    sd_inbox *inbox = open_inbox();
    sd_watch watch = {0};
    for (int i = 0; i < 50; i++) {
        set(&stage->step, 0);
        pid_t pid = start();
        if (!pid) {
            pthread_mutex_lock(&stage->mutex);
            set(&stage->step, 1);
            for (;;) pause();
        }
        await_value(&stage->step, 1);
        arm(&watch, inbox, word, 0, SD_WATCH_MUTEX);
        if (i % 2) await_sleepers(word, 1);
        finish(pid, SIGKILL);
        MUST(next(inbox) == &watch);
        MUST(value_of(word) & FUTEX_OWNER_DIED);
        arm(&watch, inbox, word, 0, i % 3 ? SD_WATCH_MUTEX : SD_WATCH_TURN); /* nobody repaired it */
        MUST(sd_inbox_take(inbox) == &watch);
        MUST(pthread_mutex_lock(&stage->mutex) == EOWNERDEAD);
        pthread_mutex_consistent(&stage->mutex);
        pthread_mutex_unlock(&stage->mutex);
    }
    sd_inbox_close(inbox);
}

enum { OBSERVERS = 3, EACH = 8, ROUNDS = 150 };

/* A process with watches on the mutex; half of them are cancelled when they are in the kernel. */
static void observe(stage *stage, uint32_t *others)
{
    uint32_t *word = sd_mutex_word(&stage->mutex);
    sd_watch watches[EACH] = {{.data = NULL}};
    sd_inbox *inbox = open_inbox();
    sd_observe_singly(one_each);
    for (uint32_t round = 1; round <= ROUNDS; round++) {
        await_value(&stage->step, 10 * round);
        for (int i = 0; i < EACH; i++) arm(&watches[i], inbox, word, 0, SD_WATCH_MUTEX);
        __atomic_fetch_add(others, 1, __ATOMIC_RELEASE);
        await_value(&stage->step, 10 * round + 1);
        MUST(!sd_inbox_take(inbox));
        for (int i = round % 2; i < EACH; i += 2) sd_watch_cancel(&watches[i]);
        __atomic_fetch_add(others, 1, __ATOMIC_RELEASE);
        for (int i = 0; i < EACH / 2; i++)
            MUST((next(inbox) - watches) % 2 != round % 2, "it was cancelled");
        __atomic_fetch_add(others, 1, __ATOMIC_RELEASE);
    }
    await_value(&stage->step, 10 * ROUNDS + 10); /* an exit would take a wake with it */
    _exit(0);
}

static void test_chain(void)
{
    stage *stage = make_stage();
    uint32_t *word = sd_mutex_word(&stage->mutex), *others = &stage->step + 16;
    pid_t pids[OBSERVERS + 1];
    for (int i = 0; i < OBSERVERS; i++)
        if (!(pids[i] = start())) observe(stage, others);
    /* The one that must have it. */
    if (!(pids[OBSERVERS] = start())) {
        for (uint32_t round = 1; round <= ROUNDS; round++) {
            await_value(&stage->step, 10 * round + 2);
            lock_for_good(&stage->mutex);
            set(&stage->step, 10 * round + 5);
            pthread_mutex_unlock(&stage->mutex);
        }
        _exit(0);
    }
    for (uint32_t round = 1; round <= ROUNDS; round++) {
        set(others, 0);
        pthread_mutex_lock(&stage->mutex);
        set(&stage->step, 10 * round);
        await_value(others, OBSERVERS);
        await_sleepers(word, OBSERVERS * EACH); /* before the waiter, so they are woken first */
        set(&stage->step, 10 * round + 1);
        await_value(others, 2 * OBSERVERS);
        set(&stage->step, 10 * round + 2);
        await_sleepers(word, OBSERVERS * EACH + 1); /* what was cancelled is still there */
        pthread_mutex_unlock(&stage->mutex);
        await_value(&stage->step, 10 * round + 5);
        await_value(others, 3 * OBSERVERS);
    }
    set(&stage->step, 10 * ROUNDS + 10);
    for (int i = 0; i <= OBSERVERS; i++) finish(pids[i], 0);
}

/* Two words that look like mutexes, each with a watch of ours and behind that a real waiter, are woken
 * by one system call, so the helper cannot come back in between. */
static void test_both(void)
{
    uint32_t *words = shared(4096), *steps = words + 256;
    sd_inbox *inbox = open_inbox();
    sd_watch watches[2] = {{.data = NULL}};
    pid_t pids[2];
    for (int i = 0; i < 2; i++) {
        if ((pids[i] = start())) continue;
        for (uint32_t round = 1; round <= ROUNDS; round++) {
            await_value(&steps[i], 2 * round);
            for (uint32_t value; (value = value_of(&words[i]));)
                syscall(SYS_futex, &words[i], FUTEX_WAIT, value, NULL);
            set(&steps[i], 2 * round + 1);
        }
        _exit(0);
    }
    for (uint32_t round = 1; round <= ROUNDS; round++) {
        for (int i = 0; i < 2; i++) {
            set(&words[i], (uint32_t)getpid());
            arm(&watches[i], inbox, &words[i], 0, SD_WATCH_MUTEX);
        }
        for (int i = 0; i < 2; i++) await_sleepers(&words[i], 1);
        for (int i = 0; i < 2; i++) {
            set(&steps[i], 2 * round);
            await_sleepers(&words[i], 2);
        }
        set(&words[0], 0), set(&words[1], 0);
        MUST(syscall(SYS_futex, &words[0], FUTEX_WAKE_OP, 1, (void *)(uintptr_t)1, &words[1],
                     FUTEX_OP(FUTEX_OP_SET, 0, FUTEX_OP_CMP_EQ, 0)) == 2);
        for (int i = 0; i < 2; i++) await_value(&steps[i], 2 * round + 1);
        for (int i = 0; i < 2; i++) next(inbox);
    }
    for (int i = 0; i < 2; i++) finish(pids[i], 0);
    sd_inbox_close(inbox);
}

/* A wake that is handed on may come late, and is not a turn's to wonder about: each of these has a
 * mutex, or a word, that no watch was on before. */
enum { TURNS = 100 };

/* Begun while it is free. */
static void test_turn(void)
{
    stage *stages[TURNS];
    sd_inbox *inbox = open_inbox();
    sd_watch turn = {0};
    for (int i = 0; i < TURNS; i++) stages[i] = make_stage();
    pid_t pid = start();
    if (!pid) {
        for (int i = 0; i < TURNS; i++) {
            await_value(&stages[i]->step, 1);
            pthread_mutex_lock(&stages[i]->mutex);
            sd_mutex_keep_waiters(&stages[i]->mutex); /* as if it had waited */
            set(&stages[i]->step, 2);
            await_value(&stages[i]->step, 3);
            pthread_mutex_unlock(&stages[i]->mutex);
        }
        _exit(0);
    }
    for (int i = 0; i < TURNS; i++) {
        uint32_t *word = sd_mutex_word(&stages[i]->mutex);
        arm(&turn, inbox, word, 0, SD_WATCH_TURN);
        await_sleepers(word, 1);
        MUST(value_of(word) == 0 && !sd_inbox_take(inbox));
        set(&stages[i]->step, 1);
        await_value(&stages[i]->step, 2);
        MUST(!sd_inbox_take(inbox), "it is held");
        set(&stages[i]->step, 3);
        MUST(next(inbox) == &turn);
    }
    finish(pid, 0);
    sd_inbox_close(inbox);
}

/* Begun while we hold it, and another process sleeps for it: that one is first. */
static void test_queue(void)
{
    stage *stages[TURNS];
    sd_inbox *inbox = open_inbox();
    sd_watch turn = {0};
    for (int i = 0; i < TURNS; i++) {
        stages[i] = make_stage();
        pthread_mutex_lock(&stages[i]->mutex);
    }
    pid_t pid = start();
    if (!pid) {
        for (int i = 0; i < TURNS; i++) {
            lock_for_good(&stages[i]->mutex);
            set(&stages[i]->step, 1);
            await_value(&stages[i]->step, 2);
            pthread_mutex_unlock(&stages[i]->mutex);
        }
        _exit(0);
    }
    for (int i = 0; i < TURNS; i++) {
        uint32_t *word = sd_mutex_word(&stages[i]->mutex);
        await_sleepers(word, 1);
        arm(&turn, inbox, word, 0, SD_WATCH_TURN);
        await_sleepers(word, 2);
        pthread_mutex_unlock(&stages[i]->mutex);
        await_value(&stages[i]->step, 1);
        MUST(!sd_inbox_take(inbox), "it was another one's turn");
        set(&stages[i]->step, 2);
        MUST(next(inbox) == &turn);
    }
    finish(pid, 0);
    /* With nobody before us. */
    pthread_mutex_lock(&stages[0]->mutex);
    arm(&turn, inbox, sd_mutex_word(&stages[0]->mutex), 0, SD_WATCH_TURN);
    pthread_mutex_unlock(&stages[0]->mutex);
    MUST(next(inbox) == &turn);
    sd_inbox_close(inbox);
}

/* Woken one after the other, while other watches fire: none is overlooked, though no word changes. */
static void test_turns(void)
{
    enum { TIMES = 200, AT_ONCE = 20 };
    sd_watch watches[AT_ONCE] = {{.data = NULL}}, between = {0};
    sd_inbox *inbox = open_inbox();
    uint32_t *words = shared(4 * AT_ONCE * TIMES), *counter = shared(4096);
    for (uint32_t round = 0; round < TIMES; round++, words += AT_ONCE) {
        for (int i = 0; i < AT_ONCE; i++) arm(&watches[i], inbox, &words[i], 0, SD_WATCH_TURN);
        arm(&between, inbox, counter, round, SD_WATCH_CHANGE);
        for (int i = 0; i < AT_ONCE; i++) await_sleepers(&words[i], 1);
        for (unsigned i = 0; i < AT_ONCE; i++) {
            wake(&words[(i * 7 + round) % AT_ONCE], 1);
            if (i != round % AT_ONCE) continue;
            set(counter, round + 1);
            wake(counter, INT_MAX);
        }
        for (int i = 0; i <= AT_ONCE; i++) next(inbox);
        MUST(!sd_inbox_take(inbox));
    }
    sd_inbox_close(inbox);
}

/* --- storms ------------------------------------------------------------------------------------- */

static uint32_t stop;

static void *change_and_wake(void *argument)
{
    uint32_t *words = argument;
    for (unsigned i = 0; !value_of(&stop); i = (i + 1) % 64) {
        __atomic_fetch_add(&words[i * 16], 1, __ATOMIC_RELEASE);
        wake(&words[i * 16], INT_MAX);
    }
    return NULL;
}

static uint32_t draw(uint32_t *state)
{
    *state ^= *state << 13, *state ^= *state >> 17, *state ^= *state << 5;
    return *state;
}

/* Watches that are begun and, fired or not, cancelled: their memory goes at once. */
static void *begin_and_cancel(void *argument)
{
    uint32_t *words = argument, random = (uint32_t)(uintptr_t)&argument | 1;
    sd_inbox *inbox = open_inbox();
    for (int round = 0; round < (one_each ? 500 : 3000); round++) {
        sd_watch *watches[8];
        uint32_t *own = shared(4096);
        int kind[8];
        for (int i = 0; i < 8; i++) {
            uint32_t *word = draw(&random) % 2 ? &words[draw(&random) % 64 * 16] : &own[i];
            kind[i] = word == &own[i] ? SD_WATCH_TURN : SD_WATCH_CHANGE;
            watches[i] = calloc(1, sizeof *watches[i]);
            if (sd_watch_begin(watches[i], inbox, word, value_of(word), kind[i]) != SD_OK)
                MUST((one_each || kind[i] == SD_WATCH_TURN) && errno == EAGAIN, "%s",
                     strerror(errno));
        }
        if (draw(&random) % 2) sched_yield();
        if (draw(&random) % 4 == 0) wake(&own[draw(&random) % 8], 1);
        for (sd_watch *watch; draw(&random) % 4 && (watch = sd_inbox_take(inbox));)
            memset(watch, 0, sizeof *watch);
        for (int i = 0; i < 8; i++) sd_watch_cancel(watches[i]);
        MUST(!sd_inbox_take(inbox));
        for (int i = 0; i < 8; i++) free(watches[i]);
        munmap(own, 4096);
    }
    sd_inbox_close(inbox);
    return NULL;
}

static void test_cancel(void)
{
    uint32_t *words = shared(4096);
    pthread_t threads[3], changer;
    set(&stop, 0);
    MUST(!pthread_create(&changer, NULL, change_and_wake, words));
    for (int i = 0; i < 3; i++) MUST(!pthread_create(&threads[i], NULL, begin_and_cancel, words));
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    set(&stop, 1);
    pthread_join(changer, NULL);
}

/* The number of a closed inbox is soon a socket's: what is written there was not meant for it. */
static void test_close(void)
{
    uint32_t *words = shared(4096);
    pthread_t changer;
    set(&stop, 0);
    MUST(!pthread_create(&changer, NULL, change_and_wake, words));
    for (int round = 0; round < (one_each ? 300 : 3000); round++) {
        sd_watch *watches = calloc(8, sizeof *watches);
        sd_inbox *inbox = open_inbox();
        int ends[2];
        for (int i = 0; i < 8; i++) {
            uint32_t *word = &words[(i * 8 + round) % 64 * 16];
            if (sd_watch_begin(&watches[i], inbox, word, value_of(word), SD_WATCH_CHANGE) != SD_OK)
                MUST(one_each && errno == EAGAIN, "%s", strerror(errno));
        }
        if (round % 2) sched_yield();
        sd_inbox_close(inbox);
        free(watches);
        MUST(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends));
        for (int turn = 0; turn < 10; turn++) sched_yield();
        char byte;
        for (int i = 0; i < 2; i++)
            MUST(read(ends[i], &byte, 1) < 0 && errno == EAGAIN, "somebody wrote into a socket");
        close(ends[0]), close(ends[1]);
    }
    set(&stop, 1);
    pthread_join(changer, NULL);
}

/* A child of a process that is in the middle of anything. */
static void in_child(sd_inbox *parents, sd_watch *armed, uint32_t *word)
{
    sd_watch own = {0}, *watch;
    MUST(sd_inbox_fd(parents) == -1);
    MUST(!sd_inbox_take(parents));
    MUST(sd_watch_begin(&own, parents, word, 0, SD_WATCH_CHANGE) == SD_ERRNO && errno == EBADF);
    sd_watch_cancel(armed);
    sd_inbox_close(parents);
    sd_inbox *inbox = open_inbox();
    arm(armed, inbox, word, 0, SD_WATCH_CHANGE); /* its memory may be used again */
    arm(&own, inbox, word, 0, SD_WATCH_CHANGE);
    MUST(!sd_inbox_take(inbox));
    await_sleepers(word, 2);
    set(word, 1);
    wake(word, INT_MAX);
    watch = next(inbox);
    MUST(watch == armed || watch == &own);
    MUST(next(inbox) != watch);
    sd_inbox_close(inbox);
    _exit(0);
}

static void test_fork(void)
{
    uint32_t *words = shared(4096), *mine = shared(4096), *childs = shared(4096);
    pthread_t threads[2], changer;
    sd_inbox *inbox = open_inbox();
    sd_watch watch = {0}, fired = {0};
    set(&stop, 0);
    MUST(!pthread_create(&changer, NULL, change_and_wake, words));
    for (int i = 0; i < 2; i++) MUST(!pthread_create(&threads[i], NULL, begin_and_cancel, words));
    for (uint32_t i = 0; i < 50; i++) {
        arm(&watch, inbox, mine, i, SD_WATCH_CHANGE);
        if (i % 2) arm(&fired, inbox, mine, i + 1, SD_WATCH_CHANGE);
        set(childs, 0);
        pid_t pid = start();
        if (!pid) in_child(inbox, &watch, childs);
        finish(pid, 0);
        if (i % 2) MUST(readable(inbox, 0) && sd_inbox_take(inbox) == &fired, "a child took it");
        MUST(!sd_inbox_take(inbox));
        set(mine, i + 1);
        wake(mine, INT_MAX);
        MUST(next(inbox) == &watch);
    }
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    set(&stop, 1);
    pthread_join(changer, NULL);
    sd_inbox_close(inbox);
}

/* --- speed -------------------------------------------------------------------------------------- */

static int by_size(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* From before the wake of another process until the poll of this one returns, in microseconds. */
static void time_wakes(unsigned beside)
{
    enum { TIMES = 2000 };
    static uint64_t took[TIMES], begun[TIMES], cancelled[TIMES];
    static sd_watch watches[1000];
    uint32_t *words = shared(1001 * 64), *word = words + 1000 * 16, *asked = shared(4096);
    uint64_t *at = shared(4096);
    sd_inbox *inbox = open_inbox();
    sd_watch watch = {0};
    for (unsigned i = 0; i < beside; i++)
        arm(&watches[i], inbox, &words[i * 16], 0, SD_WATCH_CHANGE);
    pid_t pid = start();
    if (!pid) {
        for (uint32_t i = 0; i < TIMES; i++) {
            uint32_t before;
            while ((before = value_of(asked)) < i + 1)
                syscall(SYS_futex, asked, FUTEX_WAIT, before, NULL);
            await_sleepers(word, 1);
            *at = sd_now();
            set(word, i + 1);
            wake(word, INT_MAX);
        }
        _exit(0);
    }
    for (uint32_t i = 0; i < TIMES; i++) {
        uint64_t before = sd_now();
        arm(&watch, inbox, word, i, SD_WATCH_CHANGE);
        begun[i] = sd_now() - before;
        if (!one_each) { /* there, a thread that sleeps for nobody would be counted */
            before = sd_now();
            sd_watch_cancel(&watch);
            cancelled[i] = sd_now() - before;
            arm(&watch, inbox, word, i, SD_WATCH_CHANGE);
        }
        set(asked, i + 1);
        wake(asked, 1);
        MUST(readable(inbox, -1));
        took[i] = sd_now() - *at;
        MUST(next(inbox) == &watch && !sd_inbox_take(inbox));
    }
    finish(pid, 0);
    qsort(took, TIMES, sizeof *took, by_size);
    qsort(begun, TIMES, sizeof *begun, by_size);
    qsort(cancelled, TIMES, sizeof *cancelled, by_size);
    printf("%u other watches: wake to readable %.1f us at the median (9 of 10: %.1f), begin %.1f "
           "(%.1f), cancel %.2f (%.2f)\n", beside, took[TIMES / 2] / 1e3, took[TIMES * 9 / 10] / 1e3,
           begun[TIMES / 2] / 1e3, begun[TIMES * 9 / 10] / 1e3, cancelled[TIMES / 2] / 1e3,
           cancelled[TIMES * 9 / 10] / 1e3);
    sd_inbox_close(inbox);
}

static void test_speed(void)
{
    time_wakes(0);
    if (one_each) return;
    time_wakes(20);
    time_wakes(125);
    time_wakes(1000);
}

int main(int count, char **arguments)
{
    static const struct {
        const char *name;
        void (*test)(void);
    } parts[] = {{"inbox", test_inbox},   {"words", test_words}, {"unlock", test_unlock},
                 {"death", test_death},   {"chain", test_chain}, {"both", test_both},
                 {"turn", test_turn},
                 {"queue", test_queue},   {"turns", test_turns}, {"cancel", test_cancel},
                 {"close", test_close},   {"fork", test_fork},   {"speed", test_speed}};
    one_each = count == 3 && !strcmp(arguments[1], "one");
    MUST(count == 2 + one_each, "usage: observe_test [one] PART");
    alarm(PATIENCE);
    sd_observe_singly(one_each);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (strcmp(parts[i].name, arguments[1 + one_each])) continue;
        parts[i].test();
        return 0;
    }
    MUST(false, "no such part");
}
