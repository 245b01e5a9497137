/* limits.c - what the machine itself takes for the steps that nobody can leave out.
 *
 *   limits ROUNDS     prints a name and the nanoseconds of one, line by line:
 *     lock            an uncontended robust, process-shared mutex: lock and unlock
 *     line            a cache line from one process that stores to it to another, and back, halved
 *     hand-over       from one process to another that sleeps on a futex, and back, halved
 *     memcpy          a definition of 2 KB, out of 64 MB of them in random order
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { DEFINITION = 2048, DEFINITIONS = 32768 };

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static void *shared(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) perror("limits: mmap"), exit(1);
    return at;
}

static double lock_and_unlock(long rounds)
{
    pthread_mutex_t *mutex = shared(sizeof *mutex);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(mutex, &attributes);
    double begin = now();
    for (long i = 0; i < rounds; i++) {
        pthread_mutex_lock(mutex);
        pthread_mutex_unlock(mutex);
    }
    return (now() - begin) / (double)rounds;
}

/* The other one may be waiting for this processor. */
static void spin_for(_Atomic uint32_t *word, uint32_t value)
{
    for (int spins = 0; atomic_load(word) != value;)
        if (++spins % 10000 == 0) sched_yield();
}

/* Move to the n-th of the processors that this process may use. */
static void move_to(int n)
{
    cpu_set_t allowed, one;
    sched_getaffinity(0, sizeof allowed, &allowed);
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && n-- == 0) CPU_SET(cpu, &one);
    if (CPU_COUNT(&one)) sched_setaffinity(0, sizeof one, &one);
}

static double pass_line(long rounds)
{
    _Atomic uint32_t *turn = shared(4096);
    cpu_set_t allowed;
    sched_getaffinity(0, sizeof allowed, &allowed);
    pid_t child = fork();
    if (child < 0) perror("limits: fork"), exit(1);
    move_to(child ? 0 : 1);
    if (!child) {
        for (long i = 0; i < rounds; i++) spin_for(turn, 1), atomic_store(turn, 0);
        _exit(0);
    }
    double begin = now();
    for (long i = 0; i < rounds; i++) atomic_store(turn, 1), spin_for(turn, 0);
    double took = now() - begin;
    waitpid(child, NULL, 0);
    sched_setaffinity(0, sizeof allowed, &allowed);
    return took / (double)(2 * rounds);
}

static void wait_for(_Atomic uint32_t *word, uint32_t value)
{
    for (uint32_t seen; (seen = atomic_load(word)) != value;)
        syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

static void set(_Atomic uint32_t *word, uint32_t value)
{
    atomic_store(word, value);
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static double hand_over(long rounds)
{
    _Atomic uint32_t *turn = shared(4096);
    pid_t child = fork();
    if (child < 0) perror("limits: fork"), exit(1);
    if (!child) {
        for (long i = 0; i < rounds; i++) wait_for(turn, 1), set(turn, 0);
        _exit(0);
    }
    double begin = now();
    for (long i = 0; i < rounds; i++) set(turn, 1), wait_for(turn, 0);
    double took = now() - begin;
    waitpid(child, NULL, 0);
    return took / (double)(2 * rounds);
}

static double copy(long rounds)
{
    unsigned char *all = shared((size_t)DEFINITION * DEFINITIONS), mine[DEFINITION];
    uint32_t drawn = 1;
    memset(all, 1, (size_t)DEFINITION * DEFINITIONS);
    double begin = now();
    for (long i = 0; i < rounds; i++) {
        drawn = drawn * 1664525u + 1013904223u;
        memcpy(mine, all + (size_t)DEFINITION * (drawn >> 17), DEFINITION);
        __asm__ volatile("" : : "r"(mine) : "memory");
    }
    return (now() - begin) / (double)rounds;
}

int main(int count, char **arguments)
{
    long rounds = count > 1 ? atol(arguments[1]) : 0;
    if (rounds < 1000) return fprintf(stderr, "usage: limits ROUNDS (1000 at least)\n"), 2;
    printf("lock %.2f\n", lock_and_unlock(rounds));
    printf("line %.2f\n", pass_line(rounds / 10));
    printf("hand-over %.2f\n", hand_over(rounds / 100));
    printf("memcpy %.2f\n", copy(rounds));
    return 0;
}
