/* observe.c - watches: be told by a descriptor that a word of shared memory changed.
 *
 * A few threads of ours, the helpers, sleep on the words: with futex_waitv() each on 127 of them,
 * and on a control word that whoever adds a watch counts up.  Linux before 5.16 and some sandboxes
 * do not have it: there a helper sleeps on one word, as it does everywhere for a turn.  Helpers have
 * all signals blocked, run no Python, and never end.  One lock guards everything here.  It is held
 * for a look at 254 words at most, and over no system call that wakes anybody.
 *
 * Nothing that fired is lost on the way to the caller:
 * - A watch comes on its inbox's list under the lock.  If the inbox is not `signalled`, it becomes
 *   so, and its descriptor is written to after the lock is free.  `signalled` means: something was
 *   written since the last read, or is about to be.  Only a take that finds the list empty reads and
 *   clears it, under the lock.  So as long as anything is on the list the descriptor is readable, or
 *   about to be; a write that comes late makes it readable in vain, and the next take reads that
 *   away.
 * - An inbox that is closed while somebody is about to write keeps its descriptor until after that
 *   (`writers`), so nobody writes to a number that is another file's by then.
 *
 * No change of a word is lost:
 * - Before a helper sleeps it leaves the lock with `asleep` set.  A watch is added under the lock and
 *   counts `control` up; the kernel compares that with what the helper saw under the lock, so either
 *   the helper comes back or it is woken.
 * - The kernel queues the helper on a word only if that still has the value that was seen; who
 *   changes it wakes later than that, and finds the helper in the queue.  When anything ends the
 *   sleep, each word is looked at.  So what changes while a helper is on its way is found by the
 *   kernel when it sleeps again.
 * - What cannot be waited for (EFAULT, no memory) makes all watches of that helper fire.
 *
 * A robust mutex, as glibc and the kernel treat it.  Unlock stores 0 and wakes one sleeper, if
 * FUTEX_WAITERS was set; the kernel does so for a dead holder, with FUTEX_OWNER_DIED for 0.  So a
 * helper sets FUTEX_WAITERS, by compare-and-swap, while it is held: that is what every waiter does,
 * any process may at any time, the holder keeps it, and what a dead one leaves costs one wake of
 * nobody.  glibc's rule is: while anybody sleeps FUTEX_WAITERS is set, or one that was woken will
 * look.  A waiter that was woken and finds it held again sets FUTEX_WAITERS and sleeps on, and so
 * does a helper.  One that finds it free or dead takes it, with FUTEX_WAITERS.  A helper does not:
 * its watch fires, and it hands the wake on: it wakes one more.  Watches that are woken by that hand
 * it on again, so the chain ends at the first real waiter, or when nobody sleeps any more.
 * - Of several words that were woken the kernel names the last in our order, so those before it may
 *   have been woken, too: if they are free the wake is handed on, perhaps in vain.
 * - A watch that was cancelled while the kernel had it hands on without a look.  Its slot keeps the
 *   address of the word, which by then may be nobody's; a wake there wakes nobody, or somebody who
 *   looks and sleeps again.
 * - A helper that merely finds the mutex free was not woken: the wake went to another one.
 * The inbox is told first, and the wake handed on then: a loop is as far from running as a thread
 * that is woken, and whoever released the mutex and waits for its turn comes after both.  A process
 * that ends in between takes the wake with it: this is one slice for the others.
 *
 * A turn (SD_WATCH_TURN) that begins while the mutex is held is in the kernel's queue behind those
 * who sleep there, so an unlock wakes them first.  One that begins while it is free sleeps on the
 * free word.  There the wake is all there is to see, for afterwards the word is free again.  So a
 * turn has a helper of its own, which stays in the queue until it is woken.  A hold that begins and
 * ends before the helper has come to sleep is missed: this is one slice for its owner.
 *
 * Cancelling is safe and cheap: helpers look at watches and at words only under the lock, and only
 * at those that are in a slot.  So taking the watch out of its slot, under the lock, is all there is
 * to do.  The kernel may sleep on the word until the helper comes back for another reason; it reads
 * the word only when the sleep begins, and if that is unmapped by then (EFAULT) the helper goes on
 * without the slot.
 *
 * fork: no lock is taken before it.  In the child the helpers are gone, so the lock is made anew,
 * the lists of helpers and inboxes begin empty, and the parent's inboxes are closed; their memory
 * stays, and its generation says that they are dead.  Another thread may have been in the middle of
 * anything, so the list of inboxes only ever grows, by one store.  exec and exit need nothing:
 * threads end there, and what they look at is freed by its owner alone.
 */
#define _GNU_SOURCE
#include "observe.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The C library's headers may be older than the kernel. */
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
struct waitv {
    uint64_t value, address;
    uint32_t flags, reserved;
};
_Static_assert(sizeof(struct waitv) == 24, "what the kernel calls struct futex_waitv");
#define WORD_OF_32_BITS 2u

#define WATCHES 127          /* the kernel takes 128 words */
#define SLOTS (2 * WATCHES)  /* what is cancelled keeps its slot until the helper comes back */
#define HELPERS_MAX 512 /* of each sort: turns that come and go must not keep out others */
/* To be told of one word costs a helper about half a microsecond for each of the others, so it gets
 * more than these only when there are enough helpers. */
#define EASE 16
#define FEW 16
#define STACK_BYTES (128 * 1024)
/* How often a thread that sleeps on one word looks whether its watch was cancelled.  Nobody waits for
 * that but who needs a thread, and turns are short. */
#define LOOK_NS SD_SECOND_NS
#define LOOK_TURN_NS SD_SLICE_NS

enum { IDLE, ARMED, FIRED };

struct sd_inbox {
    sd_inbox *next;   /* all of this process, in use or not; set once */
    int fd;           /* -1: not in use */
    bool signalled, closed;
    unsigned writers; /* that are about to write to `fd` */
    uint64_t generation;
    sd_link armed, fired;
};

typedef struct {
    sd_watch *watch; /* NULL: it fired or was cancelled */
    uint32_t *word;
    uint32_t seen;
    int kind;
    int place;       /* among the words of the last sleep, from 1; 0: it was not there */
} slot;

typedef struct sd_helper {
    struct sd_helper *next;
    bool single;      /* sleeps on one word */
    bool asleep;      /* must be woken to see a new slot */
    uint32_t control; /* counted up with each new slot */
    unsigned live;    /* slots with a watch */
    unsigned used;    /* slots */
    slot slots[];
} helper;

/* What is to be done as soon as the lock is free. */
typedef struct {
    unsigned inboxes, words;
    sd_inbox *inbox[WATCHES];
    uint32_t *word[SLOTS]; /* one sleeper of each is woken */
} errands;

/* Somebody may close our number behind our back, as daemons do, and then it is another file's.  All
 * eventfds have one inode, which few other files have, and no file that is written to. */
static bool is_eventfd(int fd)
{
    static _Atomic uint64_t device, inode;
    struct stat status;
    if (!inode) {
        int one = eventfd(0, EFD_CLOEXEC);
        if (one < 0) return false;
        if (!fstat(one, &status)) {
            device = status.st_dev;
            inode = status.st_ino;
        }
        close(one);
    }
    return inode && !fstat(fd, &status) && status.st_dev == device && status.st_ino == inode;
}

static void close_own(int fd)
{
    if (is_eventfd(fd)) close(fd);
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t generation = 1;
static sd_inbox *inboxes;
static helper *helpers;
static unsigned helper_count[2]; /* of those that are not `single`, and of those that are */
static enum { UNKNOWN, MANY, ONE } way; /* how helpers sleep */

static void begin_in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    /* Nothing has run in the child yet, so these numbers are still ours. */
    for (sd_inbox *inbox = inboxes; inbox; inbox = inbox->next) {
        if (inbox->fd >= 0) close_own(inbox->fd);
        inbox->fd = -1;
    }
    inboxes = NULL;
    helpers = NULL;
    helper_count[false] = helper_count[true] = 0;
    generation++;
}

__attribute__((constructor)) static void begin(void)
{
    pthread_atfork(NULL, NULL, begin_in_child);
}

/* --- lists, inboxes ----------------------------------------------------------------------------- */

static void unlink_watch(sd_watch *watch)
{
    watch->link.before->after = watch->link.after;
    watch->link.after->before = watch->link.before;
    watch->state = IDLE;
}

static void link_watch(sd_watch *watch, sd_link *list, int state)
{
    watch->link = (sd_link){.before = list->before, .after = list};
    list->before->after = &watch->link;
    list->before = &watch->link;
    watch->state = state;
}

static sd_watch *first(const sd_link *list)
{
    return list->after == list ? NULL : (sd_watch *)list->after; /* `link` is its first field */
}

static int failed(int error)
{
    errno = error;
    return SD_ERRNO;
}

sd_inbox *sd_inbox_open(void)
{
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (fd < 0) return NULL;
    pthread_mutex_lock(&lock);
    sd_inbox *inbox = inboxes;
    while (inbox && inbox->fd >= 0) inbox = inbox->next;
    bool made = !inbox;
    if (made) inbox = calloc(1, sizeof *inbox);
    if (inbox) {
        inbox->armed = (sd_link){&inbox->armed, &inbox->armed};
        inbox->fired = (sd_link){&inbox->fired, &inbox->fired};
        inbox->signalled = inbox->closed = false;
        inbox->generation = generation;
        inbox->fd = fd;
    }
    if (inbox && made) {
        inbox->next = inboxes;
        __atomic_store_n(&inboxes, inbox, __ATOMIC_RELEASE); /* a fork may look at any moment */
    }
    pthread_mutex_unlock(&lock);
    if (inbox) return inbox;
    close(fd);
    errno = ENOMEM;
    return NULL;
}

int sd_inbox_fd(const sd_inbox *inbox)
{
    return inbox->closed ? -1 : inbox->fd;
}

static void leave_slot(sd_watch *watch)
{
    watch->helper->slots[watch->slot].watch = NULL;
    watch->helper->live--;
}

/* The number goes first: a child that is forked in between must not close it for another file. */
static void let_go(sd_inbox *inbox)
{
    int fd = inbox->fd;
    __atomic_store_n(&inbox->fd, -1, __ATOMIC_RELEASE);
    close_own(fd);
}

void sd_inbox_close(sd_inbox *inbox)
{
    if (inbox->generation != generation) return;
    pthread_mutex_lock(&lock);
    for (sd_watch *watch; (watch = first(&inbox->armed));) {
        leave_slot(watch);
        unlink_watch(watch);
    }
    for (sd_watch *watch; (watch = first(&inbox->fired));) unlink_watch(watch);
    inbox->closed = true;
    if (!inbox->writers) let_go(inbox);
    pthread_mutex_unlock(&lock);
}

sd_watch *sd_inbox_take(sd_inbox *inbox)
{
    uint64_t count;
    if (inbox->generation != generation) return NULL;
    pthread_mutex_lock(&lock);
    sd_watch *watch = first(&inbox->fired);
    if (watch) {
        unlink_watch(watch);
    } else if (!inbox->closed) {
        if (is_eventfd(inbox->fd) && read(inbox->fd, &count, sizeof count) < 0)
            count = 0; /* nothing was written */
        inbox->signalled = false;
    }
    pthread_mutex_unlock(&lock);
    return watch;
}

/* --- errands ------------------------------------------------------------------------------------ */

/* Under the lock.  The watch is on no list and in no slot. */
static void fire(sd_watch *watch, errands *errands)
{
    sd_inbox *inbox = watch->inbox;
    link_watch(watch, &inbox->fired, FIRED);
    if (inbox->signalled) return;
    inbox->signalled = true;
    inbox->writers++;
    errands->inbox[errands->inboxes++] = inbox;
}

/* Takes the lock for a moment. */
static void run(errands *errands)
{
    const uint64_t one = 1;
    for (unsigned i = 0; i < errands->inboxes; i++) {
        /* It fails only if it is readable anyway, by 2^64 - 2 writes. */
        int fd = errands->inbox[i]->fd;
        if (is_eventfd(fd) && write(fd, &one, sizeof one) < 0) continue;
    }
    for (unsigned i = 0; i < errands->words; i++)
        syscall(SYS_futex, errands->word[i], FUTEX_WAKE, 1);
    if (errands->inboxes) {
        pthread_mutex_lock(&lock);
        for (unsigned i = 0; i < errands->inboxes; i++) {
            sd_inbox *inbox = errands->inbox[i];
            if (!--inbox->writers && inbox->closed) let_go(inbox);
        }
        pthread_mutex_unlock(&lock);
    }
    errands->inboxes = errands->words = 0;
}

/* --- words -------------------------------------------------------------------------------------- */

static uint32_t load(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/* Have the unlock of a mutex wake somebody; what it is then goes to `seen`.  False: nobody holds it,
 * or its holder died. */
static bool ask_for_wake(uint32_t *word, uint32_t *seen)
{
    uint32_t value = load(word);
    while (value && !(value & FUTEX_OWNER_DIED)) {
        *seen = value | FUTEX_WAITERS;
        if (value == *seen) return true;
        if (__atomic_compare_exchange_n(word, &value, *seen, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED))
            return true;
    }
    return false;
}

/* Is there nothing to wait for? */
static bool is_due(slot *slot)
{
    uint32_t value = load(slot->word);
    if (slot->kind == SD_WATCH_CHANGE) return value != slot->seen;
    if (!value) return slot->kind == SD_WATCH_MUTEX || slot->seen;
    return !ask_for_wake(slot->word, &slot->seen);
}

/* --- helpers ------------------------------------------------------------------------------------ */

/* What ended a sleep: the place of a word that was woken, or one of these. */
enum { NO_WAKE = 0, NO_SLEEP = -1 };

/* Does the watch of this slot fire, after a sleep that ended so? */
static bool fires(slot *slot, int ended)
{
    if (ended == NO_SLEEP) return true;
    if (!slot->place) return false; /* the next sleep looks at it */
    if (is_due(slot)) return true;
    /* Of a mutex that is held a wake says nothing: its unlock will wake again. */
    return slot->place == ended && (slot->kind == SD_WATCH_CHANGE || !slot->seen);
}

/* Under the lock, after a sleep. */
static void settle(helper *self, int ended, errands *errands)
{
    for (unsigned i = 0; i < self->used; i++) {
        slot *slot = &self->slots[i];
        sd_watch *watch = slot->watch;
        if (watch) {
            if (!fires(slot, ended)) continue;
            leave_slot(watch);
            unlink_watch(watch);
            fire(watch, errands);
        }
        if (slot->place && slot->place <= ended && slot->kind != SD_WATCH_CHANGE)
            errands->word[errands->words++] = slot->word;
    }
}

/* Under the lock: the slots that are left, and what to sleep on. */
static unsigned prepare(helper *self, struct waitv *words)
{
    unsigned kept = 0;
    words[0] = (struct waitv){.value = self->control,
                              .address = (uintptr_t)&self->control,
                              .flags = WORD_OF_32_BITS | FUTEX_PRIVATE_FLAG};
    for (unsigned i = 0; i < self->used; i++) {
        if (!self->slots[i].watch) continue;
        slot *slot = &self->slots[kept];
        *slot = self->slots[i];
        slot->watch->slot = kept++;
        slot->place = (int)kept;
        words[kept] = (struct waitv){.value = slot->seen,
                                     .address = (uintptr_t)slot->word,
                                     .flags = WORD_OF_32_BITS};
    }
    self->used = kept;
    return kept;
}

static bool passing(int error)
{
    return error == EAGAIN || error == EINTR || error == ETIMEDOUT;
}

static int sleep_on_many(struct waitv *words, unsigned count, bool *works)
{
    long woken = syscall(SYS_futex_waitv, words, count + 1, 0, NULL, CLOCK_MONOTONIC);
    if (woken >= 0) return (int)woken;
    if (passing(errno)) return NO_WAKE;
    *works = errno == EFAULT || errno == ENOMEM;
    return NO_SLEEP;
}

static int sleep_on_one(const struct waitv *words, bool idle, bool turn)
{
    uint64_t until = sd_now() + (turn ? LOOK_TURN_NS : LOOK_NS);
    struct timespec at = {(time_t)(until / SD_SECOND_NS), (long)(until % SD_SECOND_NS)};
    const struct waitv *word = &words[!idle];
    int command = FUTEX_WAIT_BITSET | (idle ? FUTEX_PRIVATE_FLAG : 0);
    if (!syscall(SYS_futex, (uint32_t *)(uintptr_t)word->address, command, (uint32_t)word->value,
                 idle ? NULL : &at, NULL, FUTEX_BITSET_MATCH_ANY))
        return idle ? NO_WAKE : 1;
    return passing(errno) ? NO_WAKE : NO_SLEEP;
}

static void *help(void *argument)
{
    helper *self = argument;
    struct waitv words[1 + WATCHES];
    errands errands;
    errands.inboxes = errands.words = 0;
    prctl(PR_SET_NAME, "shmdomains");
    pthread_mutex_lock(&lock);
    for (;;) {
        bool works = true;
        unsigned count = prepare(self, words);
        bool turn = count && self->slots[0].kind == SD_WATCH_TURN;
        self->asleep = true;
        pthread_mutex_unlock(&lock);
        int ended = self->single ? sleep_on_one(words, !count, turn)
                                 : sleep_on_many(words, count, &works);
        pthread_mutex_lock(&lock);
        self->asleep = false;
        if (!works) {
            self->single = true;
            helper_count[false]--;
            helper_count[true]++;
            way = ONE;
        }
        settle(self, ended, &errands);
        if (!errands.inboxes && !errands.words) continue;
        pthread_mutex_unlock(&lock);
        run(&errands);
        pthread_mutex_lock(&lock);
    }
    return NULL;
}

static int start(helper *made)
{
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&thread, &attributes, help, made);
    if (error == EINVAL) { /* thread-local variables of the program need more than that */
        pthread_attr_destroy(&attributes);
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        error = pthread_create(&thread, &attributes, help, made);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

static bool has_waitv(void)
{
    return syscall(SYS_futex_waitv, NULL, 0, 0, NULL, CLOCK_MONOTONIC) < 0 && errno == EINVAL;
}

/* Under the lock; NULL: errno. */
static helper *make_helper(bool single)
{
    size_t slots = single ? 1 : SLOTS;
    int error = EAGAIN;
    if (helper_count[single] < HELPERS_MAX) {
        helper *made = calloc(1, sizeof *made + slots * sizeof made->slots[0]);
        if (!made) return NULL;
        made->single = single;
        error = start(made);
        if (!error) {
            made->next = helpers;
            helpers = made;
            helper_count[single]++;
            return made;
        }
        free(made);
    }
    errno = error;
    return NULL;
}

/* Under the lock: a helper with room; NULL: errno. */
static helper *find_helper(int kind)
{
    if (way == UNKNOWN) way = has_waitv() ? MANY : ONE;
    bool single = way == ONE || kind == SD_WATCH_TURN;
    unsigned watches = single ? 1 : WATCHES, slots = single ? 1 : SLOTS;
    helper *least = NULL;
    for (helper *one = helpers; one; one = one->next) {
        if (one->single != single || one->live >= watches || one->used >= slots) continue;
        if (!least || one->live < least->live) least = one;
    }
    if (least && (least->live < EASE || helper_count[single] >= FEW)) return least;
    helper *made = make_helper(single);
    return made ? made : least;
}

void sd_observe_singly(bool singly)
{
    pthread_mutex_lock(&lock);
    way = singly ? ONE : UNKNOWN;
    pthread_mutex_unlock(&lock);
}

/* --- watches ------------------------------------------------------------------------------------ */

/* Under the lock.  `poke`: the helper that must be woken. */
static int arm(sd_watch *watch, slot what, helper **poke)
{
    helper *found = find_helper(what.kind);
    if (!found) return SD_ERRNO;
    what.watch = watch;
    watch->helper = found;
    watch->slot = found->used;
    link_watch(watch, &watch->inbox->armed, ARMED);
    found->slots[found->used++] = what;
    found->live++;
    __atomic_fetch_add(&found->control, 1, __ATOMIC_RELEASE);
    if (found->asleep) *poke = found;
    found->asleep = false; /* the next one need not wake it again */
    return SD_OK;
}

int sd_watch_begin(sd_watch *watch, sd_inbox *inbox, uint32_t *word, uint32_t seen, int kind)
{
    errands errands;
    helper *poke = NULL;
    slot what = {.word = word, .seen = kind == SD_WATCH_CHANGE ? seen : 0, .kind = kind};
    int result = SD_OK;
    errands.inboxes = errands.words = 0;
    if ((uintptr_t)word % sizeof *word || kind < SD_WATCH_CHANGE || kind > SD_WATCH_TURN)
        return failed(EINVAL);
    if (inbox->generation != generation) return failed(EBADF);
    pthread_mutex_lock(&lock);
    if (watch->generation == generation && watch->state != IDLE) {
        result = failed(EBUSY);
    } else if (inbox->closed) {
        result = failed(EBADF);
    } else {
        watch->inbox = inbox;
        watch->generation = generation;
        watch->state = IDLE;
        if (is_due(&what)) fire(watch, &errands);
        else result = arm(watch, what, &poke);
    }
    pthread_mutex_unlock(&lock);
    if (errands.inboxes) run(&errands);
    if (poke) syscall(SYS_futex, &poke->control, FUTEX_WAKE_PRIVATE, 1);
    return result;
}

void sd_watch_cancel(sd_watch *watch)
{
    if (watch->generation != generation) return; /* it never began, or it is a parent's */
    pthread_mutex_lock(&lock);
    if (watch->state == ARMED) leave_slot(watch);
    if (watch->state != IDLE) unlink_watch(watch);
    pthread_mutex_unlock(&lock);
}
