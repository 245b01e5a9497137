/* core.h - the core, for the binding and the tests.
 *
 * The core knows slots, locks, indexes and blobs; nothing of XML, nothing of libvirt's rules, and
 * nothing of Python: a wait that must let other threads run or look at signals goes through
 * sd_wait_hook, which the binding sets.
 *
 * One subject a file, in the order in which they build on each other.  Each has a header of its
 * own, so that a call up does not compile; tests/test_core_order.py checks it.
 */
#ifndef SHMDOMAINS_CORE_H
#define SHMDOMAINS_CORE_H

#include "layout.h"         /* the segment, byte by byte */
#include "codes.h"          /* what functions answer */
#include "prefetch.h"       /* cache lines ahead of their use */
#include "sum.h"            /* the checksum of a blob */
#include "pack.h"           /* MessagePack, as much of it as counting takes */
#include "thread.h"         /* this process's threads, who else runs, the time */
#include "mutex.h"          /* one robust mutex */
#include "wait.h"           /* sleep until a word changes */
#include "observe.h"        /* be told by a descriptor that a word changed */
#include "segment.h"        /* create, attach, grow, unmap */
#include "unlock_for.h"     /* a mutex that another thread of this process holds */
#include "waiters.h"        /* who sleeps for a lock */
#include "settings.h"       /* what the list remembers for its users */
#include "index.h"          /* UUID, name, id -> slot */
#include "heap.h"           /* variable-size blobs */
#include "fields.h"         /* what a record says: values, name, blobs, views */
#include "ring.h"           /* the last events */
#include "rebuild.h"        /* what is derived, from what is committed */
#include "locks.h"          /* short locks, slot lock, list lock, and their repairs */
#include "named.h"          /* locks that belong to no domain */
#include "find.h"           /* from a key to a slot */
#include "scan.h"           /* the same without an index */
#include "record.h"         /* commit, insert, remove */
#include "check.h"          /* every invariant, from outside: what was seen so far */
#include "check_ring.h"     /* the last events */
#include "check_records.h"  /* record by record */
#include "check_sums.h"     /* numbers that must be equal */

#endif
