# News: which events a commit makes, from what was committed before and what is now.
#
# Types and details are libvirt's (virDomainEventType and the enumerations of its details); those
# from HOLDER_DIED on are ours. `rules.events` says the same in Python, for stores without a core,
# and the conformance suite compares the two. It stands here because every commit asks.

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

cdef enum:
    DEFINED = 0
    UNDEFINED = 1
    STARTED = 2
    SUSPENDED = 3
    RESUMED = 4
    STOPPED = 5
    SHUTDOWN = 6
    PMSUSPENDED = 7
    CRASHED = 8
    AUTOSTART = 101
    ADDED = 0         # details of DEFINED
    UPDATED = 1
    RENAMED = 2
    RENAMED_FROM = 1  # of UNDEFINED
    WAKEUP = 4        # of STARTED
    BY_CRASH = 2      # of STOPPED
    NO_STATE = 0      # DomainState
    IS_RUNNING = 1
    IS_BLOCKED = 2
    IS_PAUSED = 3
    IS_SHUTDOWN = 4
    IS_CRASHED = 6
    IS_PMSUSPENDED = 7
    STARTING_UP = 11  # PausedReason
    REASONS_KNOWN = 16

# The detail for each reason of the new state, as in libvirt's QEMU driver; a driver's own reasons
# have 0.
cdef uint16_t[REASONS_KNOWN] STARTED_BY = [0, 0, 1, 2, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]
cdef uint16_t[REASONS_KNOWN] STARTED_PAUSED_BY = [0, 0, 1, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0]
cdef uint16_t[REASONS_KNOWN] SUSPENDED_BY = [0, 0, 1, 0, 0, 2, 3, 5, 0, 0, 0, 0, 7, 8, 6, 0]
cdef uint16_t[REASONS_KNOWN] RESUMED_BY = [0, 0, 1, 2, 2, 0, 1, 0, 0, 0, 3, 4, 0, 0, 0, 0]
cdef uint16_t[REASONS_KNOWN] STOPPED_BY = [0, 0, 1, 2, 3, 4, 5, 6, 5, 0, 0, 0, 0, 0, 0, 0]


cdef inline uint16_t state_told(const sd_values *values) noexcept:
    """A domain that is paused only because it is starting up was not suspended by anybody, so that
    nobody is told: not of the pause, and not of its end. But one that was suspended, shutting down,
    crashed or pmsuspended, and starts up anew with its id, is told as resumed or woken as the pause
    begins."""
    if values.state == IS_PAUSED and values.reason == STARTING_UP:
        return NO_STATE
    return values.state


cdef inline void remember_state(Record record) noexcept:
    """What is committed, to be compared when changes are."""
    record.was_id = record.values.id
    record.was_state = state_told(&record.values)
    record.was_flags = record.values.flags


cdef inline void add_news(sd_news *news, uint32_t type, uint16_t detail, int32_t id) noexcept:
    if news.count < SD_NEWS_MAX:
        news.kind[news.count] = type | <uint32_t>detail << 8
        news.id[news.count] = id
        news.count += 1


cdef inline uint16_t detail_of(const uint16_t *details, uint16_t reason) noexcept:
    return details[reason] if reason < REASONS_KNOWN else 0


cdef bint has_news(Record record) noexcept:
    """Whether anything changed that can be an event: a look at a few words, for most commits
    change none of them."""
    cdef uint64_t flags = record.was_flags ^ record.values.flags
    return (record.was_id != record.values.id or record.was_state != state_told(&record.values)
            or flags & (SD_FLAG_PERSISTENT | SD_FLAG_AUTOSTART) != 0
            or record.pending & (1 << SD_DEFINITION | 1 << SD_NEXT_DEFINITION) != 0
            or record.noted.count != 0)


cdef void collect_news(Record record, sd_news *news) noexcept:
    cdef const sd_values *now = &record.values
    cdef bint was_persistent = record.was_flags & SD_FLAG_PERSISTENT != 0
    cdef bint persistent = now.flags & SD_FLAG_PERSISTENT != 0
    cdef bint stopped = record.was_id >= 0 and record.was_id != now.id
    news[0] = record.noted
    if persistent and not was_persistent:
        add_news(news, DEFINED, ADDED, now.id)
    elif persistent and not stopped and is_redefined(record):
        add_news(news, DEFINED, UPDATED, now.id)
    if record.was_id != now.id:
        if record.was_id >= 0:
            add_end(record, news)
        if now.id >= 0:
            add_start(now, news)
    elif now.id >= 0 and record.was_state != state_told(now):
        add_change_of_state(record, news)
    if was_persistent and not persistent:
        add_news(news, UNDEFINED, 0, now.id)
    if (record.was_flags ^ now.flags) & SD_FLAG_AUTOSTART:
        add_news(news, AUTOSTART, now.flags & SD_FLAG_AUTOSTART != 0, now.id)


cdef void add_end(Record record, sd_news *news) noexcept:
    """A domain that has another id by now was restarted: nobody knows why it ended."""
    cdef const sd_values *now = &record.values
    cdef uint16_t detail = 0
    if now.id < 0 and now.state == IS_CRASHED:
        if record.was_state != IS_CRASHED:
            add_news(news, CRASHED, 0, record.was_id)
        detail = BY_CRASH
    elif now.id < 0:
        detail = detail_of(STOPPED_BY, now.reason)
    add_news(news, STOPPED, detail, record.was_id)


cdef void add_start(const sd_values *now, sd_news *news) noexcept:
    if state_told(now) == IS_PAUSED:
        add_news(news, STARTED, detail_of(STARTED_PAUSED_BY, now.reason), now.id)
        add_news(news, SUSPENDED, detail_of(SUSPENDED_BY, now.reason), now.id)
    else:
        add_news(news, STARTED,
                 detail_of(STARTED_BY, now.reason) if now.state == IS_RUNNING else 0, now.id)


cdef inline bint is_working(uint16_t state) noexcept:
    return state == IS_RUNNING or state == IS_BLOCKED or state == NO_STATE


cdef bint is_redefined(Record record) noexcept:
    if is_pending(record, SD_DEFINITION):
        return True
    return (is_pending(record, SD_NEXT_DEFINITION)
            and record.changes[BLOBS + SD_NEXT_DEFINITION] is not None)


cdef void add_change_of_state(Record record, sd_news *news) noexcept:
    cdef uint16_t state = state_told(&record.values), reason = record.values.reason
    cdef int32_t id = record.values.id
    if state == IS_PAUSED:
        add_news(news, SUSPENDED, detail_of(SUSPENDED_BY, reason), id)
    elif is_working(state) and record.was_state == IS_PMSUSPENDED:
        add_news(news, STARTED, WAKEUP, id)
    elif is_working(state) and not is_working(record.was_state):
        add_news(news, RESUMED, detail_of(RESUMED_BY, reason) if state == IS_RUNNING else 0, id)
    elif state == IS_SHUTDOWN:
        add_news(news, SHUTDOWN, 0, id)
    elif state == IS_CRASHED:
        add_news(news, CRASHED, 0, id)
    elif state == IS_PMSUSPENDED:
        add_news(news, PMSUSPENDED, 0, id)


cdef void news_of_end(Record record, sd_news *news) noexcept:
    """Of a removal: only what is committed counts."""
    memset(news, 0, sizeof(sd_news))
    if record.was_id >= 0:
        add_news(news, STOPPED, 0, record.was_id)
    if record.was_flags & SD_FLAG_PERSISTENT:
        add_news(news, UNDEFINED, 0, record.was_id)
