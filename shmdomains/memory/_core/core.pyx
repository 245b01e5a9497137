# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
# cython: embedsignature=True, embedsignature.format=clinic
"""The binding: `Segment`, `Record` and `DomainInfo` over the C core, which c.pxd declares.

Only what must hold a Python object or look at a signal is here: handles, pending changes, the
cache of decoded definitions, `multiprocessing` locks, exceptions. Which lock a call needs is
checked here, before the C core is called; what domains may do stands in `rules`.

It is one module, since the C core's registry, fork epoch and thread nodes must exist once in a
process; so the files of its subjects are included. Methods are thin and call functions in the file
of their subject. *find* locks what it returns, *read* takes no lock, *need* raises when something
is missing.

Rules of these files: the GIL is held everywhere except in a slice of a wait (waiting.pxi), and
guards what is private to the process: mappings, thread nodes, lists of locked handles. A `Record`
is held by the owner whose nonce it carries; a fork gives every thread a new nonce. An allocation
may run the collector and freeing an object a `__del__`, and these may run anything.
"""

from .c cimport *

cdef enum:
    # Which the compiler of this file does not know:
    BLOBS = 4  # SD_BLOBS
    SMALL_WORDS = 16  # SD_SMALL_WORDS
    SMALL_MAX = 120  # SD_SMALL_MAX

cdef object EMPTY = ()

# What `configure` is given.
cdef tuple STATES = None    # number -> DomainState
cdef tuple REASONS = None   # number of a state -> {number: reason}
cdef tuple DECODE = None    # kind of a blob -> callable: bytes -> value
cdef object ENCODE_DEFINITION = None  # callable: record, definition -> bytes
cdef object ENCODE_DATA = None        # callable: value -> bytes
cdef object ENCODE_INTO = None        # msgspec's: value, bytearray
cdef object DEFINITION = None         # the class of definitions
cdef object ADD_TO = None             # callable: data, field, by -> data, sum
cdef object ENCODE_WORK = None        # callable: Work -> bytes
cdef object SETTLE = None             # callable: list, locked record, timeout
cdef object NOT_FOUND = None          # callable: uuid, name, id -> DomainNotFound
cdef object KEY_OF = None             # callable: key by position -> {keyword: key}
cdef object INFO = None               # the module that says what any DomainInfo says
cdef object PARSE_UUID = None
cdef object UUID = None
cdef object SAFE_UNKNOWN = None
cdef object HOLDERS = None  # the module that says who is behind a pid, and makes LockTimeout


def configure(*, states, reasons, decode, encode_definition, encode_data, encode_into, definition,
              added, encode_work, settle, not_found, key_of, info, parse_uuid, uuid_class,
              holders):
    """Hand the core what it needs of Python: the types that it makes, how values become bytes and
    back, words for errors. Called once.

    `encode_definition(record, definition)` checks that the definition is of this record.
    """
    global STATES, REASONS, DECODE, ENCODE_DEFINITION, ENCODE_DATA, ENCODE_WORK, SETTLE
    global ENCODE_INTO, DEFINITION, ADD_TO
    global NOT_FOUND, KEY_OF, INFO, PARSE_UUID, UUID, SAFE_UNKNOWN, HOLDERS
    STATES, REASONS, DECODE = tuple(states), tuple(reasons), tuple(decode)
    ENCODE_DEFINITION, ENCODE_DATA, NOT_FOUND = encode_definition, encode_data, not_found
    ENCODE_INTO, DEFINITION, ADD_TO = encode_into, definition, added
    ENCODE_WORK, SETTLE, KEY_OF, INFO = encode_work, settle, key_of, info
    PARSE_UUID, UUID, HOLDERS = parse_uuid, uuid_class, holders
    SAFE_UNKNOWN = uuid_class(int=0).is_safe


include "owners.pxi"    # who asks: a thread, a task, a greenlet
include "tasks.pxi"     # how tasks and greenlets wait
include "waiting.pxi"   # time-outs, signals, what a code of the core raises
include "holders.pxi"   # who holds a lock
include "keys.pxi"      # uuid, name, id
include "flat.pxi"      # flat values of the data, to bytes and back
include "info.pxi"      # DomainInfo: a committed state, decoded and cached
include "locks.pxi"     # the list's lock and a slot's, of either kind
include "find.pxi"      # from a key to a locked domain
include "held.pxi"      # who holds which lock, who waits, what was counted
include "read.pxi"      # without a lock: one, many, filtered
include "listing.pxi"   # all of them, as infos or as columns
include "change.pxi"    # create, remove, rename; settings
include "check.pxi"     # every invariant
include "recover.pxi"   # after a death; salvage after damage
include "sleep.pxi"     # until a domain, the list or the events change
include "news.pxi"      # which events a commit makes
include "hold.pxi"      # a thread's hold of a domain, and its changes
include "count.pxi"     # a number in the data goes up
include "named.pxi"     # named locks, which belong to no domain
include "record.pxi"    # Record, the handle
include "many.pxi"      # Records, and many domains in one call
include "segment.pxi"   # Segment, the attachment; format_segment
include "awaited.pxi"   # what a task awaits to get a domain
