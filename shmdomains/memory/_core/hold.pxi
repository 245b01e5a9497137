# Holds: an owner has a domain locked, through one handle, and changes it.
#
# A hold begins with the slot's lock and ends with it. In between the handle stands in the list of
# its owner, and what is changed is kept in the handle; nobody else sees it before
# `commit_changes`. A handle that is freed while it is locked is rolled back and unlocked
# (`abandon`); a dead process's hold was never written, so the next holder finds what was committed.

from cpython.dict cimport PyDict_Copy
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset

import warnings

from shmdomains import errors


cdef void lead_to(Record record, uint32_t slot) noexcept:
    """The handle is to the domain that lives in this slot now."""
    cdef sd_slot *at = &record.segment.segment.slots[slot]
    record.leads = True
    record.segment.segment.handles += 1
    record.slot = slot
    record.life = sd_load(&at.life)
    record.uuid_raw[0] = sd_load(&at.uuid[0])
    record.uuid_raw[1] = sd_load(&at.uuid[1])


cdef bint held_somewhere(Record record):
    """Whether a running thread or task of this process holds it. After a fork the nodes of the
    parent's threads are still there, with the epoch of before."""
    return (record.nonce != 0 and record.thread.epoch == sd_fork_epoch
            and record.thread.nonce == record.nonce and runs_on_living(record.thread))


cdef Record locked_or_none(Record record):
    """The handle through which the caller holds the domain: this one, or another one to it."""
    cdef sd_thread *owner = me()
    if record.nonce == owner.nonce:
        return record
    if owner.records == NULL:
        return None
    return held_here(record.segment, record.slot, record.life)


cdef Record need_locked(Record record):
    """That handle, or `DomainNotLocked`."""
    cdef Record mine = locked_or_none(record)
    if mine is None:
        raise errors.DomainNotLocked(
            other_thread(record.thread.who, f"domain {uuid_object(record.uuid_raw)}")
            if held_somewhere(record) else
            f"domain {uuid_object(record.uuid_raw)} is not locked by {this()}: with dom: ...")
    return mine


cdef Record need_changeable(Record record):
    """That handle. Raises in a signal handler that interrupted the holder: it may be committing."""
    cdef Record mine = need_locked(record)
    if sd_self().nested > mine.nested:
        raise_code(SD_NESTED, "change a domain")
    return mine


cdef Record need_room(Record record):
    """The same, with room for a changed blob, so that `set_blob` runs nothing before the change is
    complete."""
    cdef Record mine = need_changeable(record)
    while mine.changes is None:
        room = [None] * (2 * BLOBS)  # the collector may run anything, a change or an unlock, too
        mine = need_changeable(record)
        if mine.changes is None:
            mine.changes = room
    return mine


cdef int begin_hold(Record record) except -1:
    """The slot is locked: the handle is the caller's from here on."""
    if sd_values_get(record.segment.segment, record.slot, &record.values) != SD_OK:
        release_slot(record.segment, record.slot, False)
        raise_code(SD_CORRUPT, "lock a domain")
    enter_thread(record)
    return 0


cdef void enter_thread(Record record) noexcept:
    cdef sd_thread *owner = me()
    record.nonce = owner.nonce
    record.thread = owner
    record.nested = sd_self().nested
    record.before = NULL
    record.after = owner.records
    if owner.records != NULL:
        (<Record>owner.records).before = <void *>record
    owner.records = <void *>record
    if TASKS:
        count_held(owner, 1)
    record.stale |= record.pending != 0
    record.pending = 0
    record.touched = False
    record.intends = False
    record.says = False
    record.depth = 0
    record.noted.count = 0
    remember_state(record)


cdef void leave_thread(Record record) noexcept:
    if record.before != NULL:
        (<Record>record.before).after = record.after
    else:
        record.thread.records = record.after
    if record.after != NULL:
        (<Record>record.after).before = record.before
    record.nonce = 0
    if TASKS:
        count_held(record.thread, -1)
    if record.says:
        unsay(record)


cdef int end_hold(Record record, bint delivered) except -1:
    if record.nonce != me().nonce:
        return 0  # a signal handler forked in a wait: the lock is the parent's
    leave_thread(record)
    return release_slot(record.segment, record.slot, delivered)


cdef inline bint is_pending(Record record, int which) noexcept:
    """Whether a change of this blob waits for the commit."""
    return record.pending >> which & 1


cdef void reload_values(Record record) noexcept:
    sd_values_get(record.segment.segment, record.slot, &record.values)
    record.touched = False
    record.noted.count = 0
    remember_state(record)


cdef void drop_changes(Record record, bint committed=False) noexcept:
    """They are no more. What was just committed need not be decoded."""
    cdef unsigned pending = record.pending
    cdef list changes
    cdef int b
    if not pending:
        return
    record.pending = 0
    changes, record.changes = record.changes, None  # to free one may run anything
    if committed:
        remember_changes(record, pending, changes)
    for b in range(BLOBS):
        if pending >> b & 1:
            changes[b] = changes[BLOBS + b] = None
    if record.changes is None:
        record.changes = changes


cdef void remember_changes(Record record, unsigned pending, list changes) noexcept:
    cdef Decoded decoded = record.segment.decoded
    cdef uint32_t slot = record.slot
    cdef uint64_t life = record.life
    cdef uint64_t data = record.values.version[SD_DATA]  # what leaves the cache may run anything
    if pending >> SD_DEFINITION & 1 and changes[SD_DEFINITION] is not None:
        cache(decoded, SD_DEFINITION, slot, life, record.values.version[SD_DEFINITION],
              changes[SD_DEFINITION])
    value = changes[SD_DATA]
    if (pending >> SD_DATA & 1 and value is not None and value is not UNDECODED
            and PyBytes_GET_SIZE(changes[BLOBS + SD_DATA]) <= CACHED_MAX):
        cache(decoded, SD_DATA, slot, life, data, value)


cdef int commit_changes(Record record, uint64_t deadline) except -1:
    """All of them or none; on failure they are rolled back."""
    cdef sd_blob changes[BLOBS]
    cdef const sd_blob *changed = NULL
    cdef sd_news news
    cdef const sd_news *told = NULL
    cdef int b, result
    if not record.touched and not record.pending:
        return 0
    if record.pending:
        changed = changes
        memset(changes, 0, sizeof(changes))
        for b in range(BLOBS):
            if is_pending(record, b):
                changes[b].change = True
                if record.changes[BLOBS + b] is not None:
                    set_change(&changes[b], record.changes[BLOBS + b])
    if has_news(record):
        collect_news(record, &news)
        told = &news
    result = sd_commit(record.segment.segment, record.slot, &record.values, changed, NULL, told,
                       deadline)
    if no_room(result) and reclaim(record.segment, record.slot):
        result = sd_commit(record.segment.segment, record.slot, &record.values, changed, NULL,
                           told, deadline)
    if result != SD_OK:
        reload_values(record)
        drop_changes(record)
        return raise_poison_or_code(record.segment, result,
                                    f"commit domain {uuid_object(record.uuid_raw)}; rolled back")
    record.touched = False
    record.noted.count = 0
    remember_state(record)
    drop_changes(record, True)
    return 0


cdef int commit_work(Record record, object work, bytes encoded, uint64_t deadline,
                     tuple events) except -1:
    """What is under way, and nothing else: the other changes go on waiting, whatever comes of it.
    `work` replaces a change of it that waits, too; encoding it may run anything, so the caller has.
    `events`: those of this commit, pairs of type
    and detail."""
    cdef sd_blob changes[BLOBS]
    cdef sd_values waiting
    cdef sd_news noted, news
    cdef const sd_news *told = NULL
    cdef bint touched
    cdef int result
    cdef uint64_t public = SD_FLAG_PERSISTENT | SD_FLAG_AUTOSTART
    memset(&news, 0, sizeof(news))
    for type, detail in events:
        add_news(&news, type, detail, record.was_id)
    if news.count:
        told = &news
    memset(changes, 0, sizeof(changes))
    changes[SD_WORK].change = True
    if encoded is not None:
        set_change(&changes[SD_WORK], encoded)
    waiting, touched, noted = record.values, record.touched, record.noted
    reload_values(record)
    set_unfinished(record, work)
    result = sd_commit(record.segment.segment, record.slot, &record.values, changes, NULL, told,
                       deadline)
    if no_room(result) and reclaim(record.segment, record.slot):
        result = sd_commit(record.segment.segment, record.slot, &record.values, changes, NULL,
                           told, deadline)
    reload_values(record)
    record.noted = noted
    if touched:
        record.touched = True
        record.values.id, record.values.pid = waiting.id, waiting.pid
        record.values.state, record.values.reason = waiting.state, waiting.reason
        record.values.started = waiting.started
        record.values.flags = (waiting.flags & public) | (record.values.flags & ~public)
    record.stale |= is_pending(record, SD_WORK)
    record.pending &= ~(1 << SD_WORK)
    if result != SD_OK:
        raise_poison_or_code(record.segment, result,
                             f"note what is begun with domain {uuid_object(record.uuid_raw)}")
    return 0


cdef int set_unfinished(Record record, object work) except -1:
    return set_flag(record, SD_FLAG_UNFINISHED, work is not None and work.step is not None)


cdef int end_intention(Record record) except -1:
    """What the holder intended is done: the record forgets it with the next commit."""
    work = read_blob(record, SD_WORK)
    if work is not None and work.intended is not None:
        work = work.without_intention()
        encoded = None if work is None else ENCODE_WORK(work)  # may run anything, an unlock, too
        set_blob(need_room(record), SD_WORK, work, encoded)
    record.intends = False
    return 0


cdef int say(Record record, object why) except -1:
    """What the holder is doing, for whoever waits. Domain lock held."""
    cdef bytes operation = as_operation(why)
    record.says = True
    sd_why_set(record.segment.segment.slots[record.slot].why, PyBytes_AS_STRING(operation),
               PyBytes_GET_SIZE(operation))
    return 0


cdef void unsay(Record record) noexcept:
    sd_why_clear(record.segment.segment.slots[record.slot].why)


cdef int lock_record(Record record, uint64_t deadline, object timeout) except -1:
    cdef sd_slot *at
    cdef void *held
    need_open(record.segment)
    at = &record.segment.segment.slots[record.slot]
    held = held_pointer(record.segment, record.slot, 0)
    if held != NULL:
        # The caller has the slot's lock and must not ask for it, whichever domain lives there.
        if (<Record>held).life == record.life:
            need_not_held(record.segment, record.slot)
        raise_outlived(record)
    if sd_load(&at.life) != record.life:
        raise_outlived(record)  # a life that ended does not come back: no need to wait
    may_wait(record.segment, deadline)
    if acquire_slot(record.segment, record.slot, deadline) == SD_TIMEOUT:
        raise_timed_out(&at.owner, &at.mutex, at.why, describe(record.segment, record.slot),
                        timeout)
    if sd_load(&at.life) != record.life:
        release_slot(record.segment, record.slot, False)
        raise_outlived(record)
    begin_hold(record)
    if record.values.flags & SD_FLAG_UNFINISHED:
        settle(record, deadline)
    return 0


cdef int settle(Record record, uint64_t deadline) except -1:
    """Finish, or undo, what a rule began with this record and a file and did not end: its process
    died, for a living one keeps the domain locked. On an error the domain is unlocked again.

    That waits for the directory's lock and writes files. So a task has another thread do it, and
    takes the domain, settled or not, when it asks again."""
    cdef Blocked blocked
    if TASKS and sd_self().asks and deadline != SD_TRY:
        if SETTLED is not None and SETTLED.is_to(record):
            return 0
        blocked = Blocked()
        blocked.doms, blocked.kind = record.segment, SETTLES
        blocked.number, blocked.lives = record.slot, record.life
        end_hold(record, False)
        raise WouldBlock(blocked)
    try:
        SETTLE(record.segment, record, seconds_left(deadline))
    except BaseException:
        if locked_or_none(record) is not None:
            drop_changes(record)
            end_hold(record, False)
        raise
    return 0


cdef int raise_outlived(Record record) except -1:
    need_sound_life(record.segment, record.slot)
    raise errors.DomainRemoved(
        f"domain {uuid_object(record.uuid_raw)} was removed; this handle outlived it")


cdef int unlock_record(Record record, object timeout) except -1:
    cdef Record mine = locked_or_none(record)
    cdef uint64_t deadline = deadline_of(timeout)
    if mine is None:
        raise_not_locked(record)
    return unlock_held(mine, deadline)


cdef int unlock_held(Record mine, uint64_t deadline) except -1:
    """Through the handle that holds it."""
    if sd_self().nested > mine.nested:
        raise_code(SD_NESTED, "unlock a domain")
    if mine.touched or mine.pending or mine.intends:
        try:
            if mine.intends:
                end_intention(mine)
            commit_changes(mine, deadline)
        except BaseException:
            drop_changes(mine)
            raise
        finally:
            end_hold(mine, True)
        return 0
    leave_thread(mine)
    return release_slot(mine.segment, mine.slot, True)


cdef int enter_block(Record record) except -1:
    """The beginning of a ``with`` block."""
    cdef Record mine
    if not TASKS and sd_has_context():
        look_for_tasks(sd_self())
    mine = locked_or_none(record)
    if mine is None:
        lock_record(record, SD_FOREVER, None)
        mine = record
    mine = need_changeable(mine)
    mine.depth += 1
    return 0


cdef int leave_block(Record record, object kind) except -1:
    """The end of a ``with`` block; `kind`: of the exception that ended it."""
    cdef Record mine = locked_or_none(record)
    if mine is None:
        return 0
    if kind is not None:
        mine = need_changeable(mine)
        drop_changes(mine)
        reload_values(mine)
        mine.intends = False
    if mine.depth > 1:
        mine.depth -= 1  # an inner block; the outer one goes on
        return 0
    return unlock_held(mine, SD_FOREVER)


cdef int raise_not_locked(Record record) except -1:
    if held_somewhere(record):
        raise errors.NotOwner(
            other_thread(record.thread.who, f"domain {uuid_object(record.uuid_raw)}"))
    raise errors.DomainNotLocked(
        f"domain {uuid_object(record.uuid_raw)} is not locked by {this()}")


cdef int set_flag(Record record, uint64_t flag, bint value) except -1:
    if value:
        record.values.flags |= flag
    else:
        record.values.flags &= ~flag
    record.touched = True
    return 0


cdef int set_blob(Record record, int which, object value, bytes encoded) except -1:
    """A change that waits for the commit, of a record from `need_room`. What it replaces goes last:
    its end may run anything."""
    if encoded is not None and not 0 < len(encoded) <= SD_BLOB_MAX:
        raise errors.SegmentFull(f"a value of {len(encoded)} bytes; the limit is 16 MiB")
    record.pending |= 1 << which
    _former = record.changes[which]
    record.changes[which] = value
    record.changes[BLOBS + which] = encoded
    return 0


cdef object read_blob(Record record, int which):
    """The holder's own change, else what is committed, else None. Domain lock held."""
    cdef sd_stored stored
    if is_pending(record, which):
        return record.changes[which]
    if not record.values.flags & SD_FLAG_PRESENT(which):
        return None
    if sd_blob_get(record.segment.segment, record.slot, &record.values, which, &stored) != SD_OK:
        raise_code(SD_CORRUPT, "read")
    return decode_stored(which, &stored, record.uuid_raw, record.values.version[which])


cdef bytes encode_definition(Record record, object value):
    """The bytes of a definition that is the record's. Domain lock."""
    cdef bytes encoded
    if type(value) is DEFINITION and is_identity(record, value.uuid, value.name):
        encoded = packed(value)
        if PyBytes_GET_SIZE(encoded) <= SD_BLOB_MAX:
            return encoded
    return ENCODE_DEFINITION(record, value)  # it makes the error


cdef bint is_identity(Record record, object uuid, object name) except -1:
    """Whether these are the domain's uuid and name. Domain lock."""
    cdef uint64_t words[2]
    cdef unsigned char mine[252]
    cdef unsigned char other[252]
    sd_name_get(record.segment.segment, record.slot, need_locked(record).values.flags, mine)
    if not mine[0]:
        raise_code(SD_CORRUPT, "name")
    if uuid is None or not set_name(other, name):
        return False
    uuid_words(uuid, words)
    return (words[0] == record.uuid_raw[0] and words[1] == record.uuid_raw[1]
            and memcmp(mine, other, mine[0] + 1) == 0)


cdef int assign_state(Record record, object value) except -1:
    need_changeable(record)
    cdef long number = PyNumber_Index(value)  # may run anything, an unlock, too
    cdef Record mine = need_changeable(record)
    if number < 0 or number >= len(STATES):
        raise ValueError(f"{value!r} is no DomainState")
    mine.values.state = <uint16_t>number
    mine.values.reason = 0
    mine.touched = True
    return 0


cdef int assign_data(Record record, object value) except -1:
    cdef bytes encoded
    need_changeable(record)
    # Each new object may run the collector, and that anything: an unlock, a change of `value`.
    flat = value
    if type(value) is dict and len(<dict>value) <= FLAT_PAIRS:
        flat = PyDict_Copy(value)
    decoded = UNDECODED
    encoded = None if value is None else encode_flat(flat)
    if value is None:
        decoded = None
    elif encoded is not None:
        decoded = PyDictProxy_New(flat) if type(flat) is dict else flat
    else:
        encoded = packed(value) if is_plain(value, PLAIN_DEPTH) else ENCODE_DATA(value)
        # Else it may be that it cannot be decoded: what it holds may have changed after the look.
        if not sd_pack_plain(<const unsigned char *>PyBytes_AS_STRING(encoded),
                             PyBytes_GET_SIZE(encoded)):
            decoded = DECODE[SD_DATA](encoded)
    return set_blob(need_room(record), SD_DATA, decoded, encoded)


cdef object read_data(Record record):
    """`read_blob` of the data, decoded once."""
    cdef sd_stored stored
    cdef uint64_t version = record.values.version[SD_DATA]  # decoding may run a signal handler
    cdef uint32_t slot = record.slot
    cdef uint64_t life = record.life
    cdef Decoded decoded = record.segment.decoded
    if is_pending(record, SD_DATA):
        value = record.changes[SD_DATA]
        if value is not UNDECODED:
            return value
        encoded = record.changes[BLOBS + SD_DATA]
        value = DECODE[SD_DATA](encoded)
        if is_pending(record, SD_DATA) and record.changes[BLOBS + SD_DATA] is encoded:
            record.changes[SD_DATA] = value
        return value
    if not record.values.flags & SD_FLAG_PRESENT(SD_DATA):
        return None
    value = cached(decoded, SD_DATA, slot, life, version)
    if value is None:
        if sd_blob_get(record.segment.segment, slot, &record.values, SD_DATA, &stored) != SD_OK:
            raise_code(SD_CORRUPT, "read")
        value = decode_stored(SD_DATA, &stored, record.uuid_raw, version)
        if stored.bytes <= CACHED_MAX:
            cache(decoded, SD_DATA, slot, life, version, value)
    return value


cdef object read_definition(Segment doms, uint32_t slot, uint64_t life, const sd_values *values):
    """The committed definition, from the cache or decoded. Domain lock held."""
    cdef sd_stored stored
    cdef uint64_t uuid[2]
    cdef uint64_t version = values.version[SD_DEFINITION]  # decoding may run a signal handler
    value = cached(doms.decoded, SD_DEFINITION, slot, life, version)
    if value is not None and type(value) is not bytes:  # its bytes: somebody peeked at it
        return value
    if not values.flags & SD_FLAG_PRESENT(SD_DEFINITION):
        decode(SD_DEFINITION, None, NULL, 0)
    uuid[0] = sd_load(&doms.segment.slots[slot].uuid[0])
    uuid[1] = sd_load(&doms.segment.slots[slot].uuid[1])
    if sd_blob_get(doms.segment, slot, values, SD_DEFINITION, &stored) != SD_OK:
        raise_code(SD_CORRUPT, "definition")
    value = decode_stored(SD_DEFINITION, &stored, uuid, version)
    cache(doms.decoded, SD_DEFINITION, slot, life, version, value)
    return value


cdef bint vacate(Record record) noexcept:
    """Make a dead handle lead nowhere, so that it can be reused (handle.h). False: it has more to
    let go of."""
    # `pending`: changes of a hold that ended with its thread, or was the parent's.
    if record.nonce or record.pending or record.segment.closed:
        return False
    if record.changes is not None and (record.stale or len(record.changes) != 2 * BLOBS):
        return False  # the collector empties the list of a handle that it frees
    if record.leads:
        record.leads = False
        record.segment.segment.handles -= 1
    # The collector shows the reused handle to others before `lead_to` is called.
    record.slot = 0
    record.life = 0
    record.segment = NOWHERE
    return True


cdef void abandon(Record record, bint task_over=False) noexcept:
    """A locked handle is freed, or its task is over: warn, roll back, and unlock, also for another
    thread."""
    cdef sd_thread *thread = sd_self()
    cdef uint32_t slot = record.slot
    cdef bint here = record.thread.kernel == thread
    leave_thread(record)
    if record.segment.multiprocessing:
        record.thread.kernel.held -= 1
        thread.held += 1
        sd_slot_leave(record.segment.segment, slot, False, record.thread.who,
                      semaphore_of(record.segment.slot_semaphores[slot]))
    elif here:
        sd_slot_unlock(record.segment.segment, slot, False)
    else:
        freed = free_for(record.thread.kernel, record.thread.kernel_nonce,
                         record.segment.segment, slot, False)
    if TASKS and here:
        tell_tasks(record.segment, SD_LOCK_DOMAIN, slot, NULL)
    if warnings is None:  # the interpreter may be going down
        return
    if task_over:
        warnings.warn(f"a task ended while it held {describe(record.segment, slot)} locked; its "
                      "changes are rolled back and the lock is freed: use 'async with'",
                      ResourceWarning, stacklevel=1)
        return
    if here or record.segment.multiprocessing:
        warnings.warn("a Domain that was still locked was dropped; its changes are rolled back "
                      "and the lock is freed: use 'with'", ResourceWarning, stacklevel=1)
        return
    warnings.warn("a Domain that was still locked was dropped in another thread than the one that "
                  f"locked it, thread {sd_who_tid(record.thread.who)}; its changes are rolled "
                  f"back, and the lock {freed}: {ONE_THREAD}", ResourceWarning, stacklevel=1)
