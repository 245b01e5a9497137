/* crash_points.c - the hook of the test build: SIGKILL at the n-th store into a segment.
 *
 * Linked into a second build of the core (SD_CRASH_POINTS, see the Makefile), which only
 * crash_driver.py ever loads. The hook runs *before* each store, so a process that dies at point n
 * has made n - 1 stores.
 */
#define _GNU_SOURCE
#include "core.h"

#include <signal.h>
#include <unistd.h>

#define SEEN __attribute__((visibility("default")))

SEEN long sd_crash_count; /* stores so far, the one to come included */
SEEN long sd_crash_at;    /* 0: never */

/* So that the same operation makes the same stores in every run: hashes depend on the seed. */
SEEN int sd_crash_settle_seed(int fd)
{
    sd_header header;
    if (pread(fd, &header, sizeof header, 0) != sizeof header) return -1;
    header.seed = 0x6465657320656874ull;
    header.sum = sd_constants_sum(&header);
    return pwrite(fd, &header, sizeof header, 0) == sizeof header ? 0 : -1;
}

void sd_crash_point(void)
{
    if (++sd_crash_count != sd_crash_at) return;
    kill(getpid(), SIGKILL);
    for (;;) pause();
}
