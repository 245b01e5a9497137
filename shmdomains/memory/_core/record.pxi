# `Record`, the handle to a domain.
#
# Methods are thin: who holds the domain, and what becomes of changes, stands in hold.pxi. Reading
# a field needs the domain's lock, but for `uuid`; assigning one changes the handle until a commit.

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport INT32_MAX, int32_t, uint16_t, uint32_t, uint64_t

from shmdomains import errors


@cython.no_gc_clear
cdef class Record:
    """A handle to one domain's record. `Domain` adds what a domain may do.

    One thread or task at a time holds a domain, through one handle. To it every other handle to the
    same domain stands for this one.
    """
    cdef Segment segment
    cdef uint32_t slot
    cdef uint64_t life
    cdef uint64_t uuid_raw[2]
    cdef uint64_t nonce      # of the owner who holds it through this handle, or 0
    cdef sd_thread *thread   # his node
    cdef unsigned nested     # how deep in signal handlers it was locked
    cdef unsigned depth      # of `with` blocks
    cdef bint leads          # to a slot; not while a find is locking that
    cdef void *before        # and `after`: neighbours among that owner's locked handles
    cdef void *after
    cdef sd_values values    # with the holder's changes
    cdef int32_t was_id      # what is committed, of what makes events
    cdef uint16_t was_state
    cdef uint64_t was_flags
    cdef sd_news noted       # events of the next commit that its changes do not tell of
    cdef bint touched        # `values` differ from what is committed
    cdef bint intends        # the holder said what it is going to do
    cdef bint says           # what it is doing, in the slot
    cdef unsigned pending    # changed blobs, one bit each
    cdef list changes        # their values, then their bytes; None clears
    cdef bint stale          # it may have some of a hold that ended otherwise
    cdef object __weakref__

    def __cinit__(self, *args, **kwargs):
        self.segment = NOWHERE

    def __init__(self, *args, **kwargs):
        raise TypeError("Domains come from a DomainList: get(), find_by_name(), assign_def(), ...")

    def __dealloc__(self):
        if held_somewhere(self):
            abandon(self)
        if self.leads:
            self.segment.segment.handles -= 1
            if self.segment.closed:
                sd_detach(self.segment.segment)

    # --- who holds it ---

    @property
    def is_locked(self):
        """Whether this thread holds the domain. Needs no lock."""
        return locked_or_none(self) is not None

    @property
    def changed(self):
        """Whether there are changes that were not committed. Domain lock."""
        cdef Record mine = need_locked(self)
        return bool(mine.touched or mine.pending)

    def lock(self, timeout=None, why=None):
        """Lock the domain (virDomainLock).

        `timeout` in seconds: None waits for ever, 0 tries. `why` is what it is locked for, as for
        `DomainList.get`. Raises `LockTimeout` (it names the
        holder), `DomainRemoved`, `AlreadyLocked`, `LockOrder` (this thread holds another domain of
        the list, not the list lock, and would wait), `TooManyLocks`.
        """
        if why is not None:
            need_text(why)
        lock_record(self, deadline_of(timeout), timeout)
        if why is not None:
            say(self, why)

    def try_lock(self):
        """Lock the domain if it is free: True, else False. Always allowed, whatever is held."""
        try:
            lock_record(self, SD_TRY, 0)
        except errors.LockTimeout:
            return False
        return True

    def unlock(self, timeout=None):
        """Commit what was changed and release the lock (virDomainUnlock).

        When the commit fails (`SegmentFull`, `LockTimeout` of the core's own locks after `timeout`
        seconds, Ctrl-C) everything is rolled back, the domain is unlocked all the same, and the
        error is raised. Raises `DomainNotLocked`, or `NotOwner` in another thread.
        """
        unlock_record(self, timeout)

    def _release_unseen(self):
        """Roll back and unlock, if this thread holds it, without consuming the notice of a death:
        the next holder still learns of it.

        For the ``finally`` of a rule: one call, so that no signal handler runs in between."""
        cdef Record mine = locked_or_none(self)
        if mine is None:
            return
        mine = need_changeable(mine)
        drop_changes(mine)
        end_hold(mine, False)

    def acquire(self, block=True, timeout=None):
        """`lock` in the manner of `multiprocessing.Lock`: True, or False when it was not free."""
        timeout = 0 if not block or (timeout is not None and timeout < 0) else timeout
        try:
            lock_record(self, deadline_of(timeout), timeout)
        except errors.LockTimeout:
            return False
        return True

    def release(self):
        """`unlock` in the manner of `multiprocessing.Lock`."""
        self.unlock()

    def commit(self, timeout=None):
        """Commit what was changed so far and keep the lock: a point of no return. Domain lock.

        On failure everything since the last commit is rolled back and the error raised.
        """
        commit_changes(need_changeable(self), deadline_of(timeout))

    def rollback(self):
        """Forget all changes since the last commit. Domain lock."""
        cdef Record mine = need_changeable(self)
        drop_changes(mine)
        reload_values(mine)

    def __enter__(self):
        enter_block(self)
        return self

    def __exit__(self, kind, value, traceback):
        leave_block(self, kind)

    # --- fields ---

    @property
    def uuid(self):
        """The domain's UUID. Needs no lock: it never changes."""
        return uuid_object(self.uuid_raw)

    @property
    def id(self):
        """The id of the running domain, -1 when it is inactive. Domain lock."""
        return need_locked(self).values.id

    @property
    def is_active(self):
        """Whether it runs: ``id != -1`` (virDomainIsActive). Domain lock."""
        return need_locked(self).values.id != -1

    @property
    def name(self):
        """The name. Domain lock; changed by `DomainList.rename`."""
        cdef unsigned char raw[252]
        cdef Record mine = need_locked(self)
        sd_name_get(self.segment.segment, self.slot, mine.values.flags, raw)
        if not raw[0]:
            raise_code(SD_CORRUPT, "name")
        return name_object(raw)

    @property
    def state(self):
        """The `DomainState`. Domain lock. Assigning sets the reason to 0, unknown."""
        return state_of(need_locked(self).values.state)

    @state.setter
    def state(self, value):
        assign_state(self, value)

    @property
    def reason(self):
        """Why it is in this state: a member of the state's reason enumeration. Domain lock."""
        cdef Record mine = need_locked(self)
        return reason_of(mine.values.state, mine.values.reason)

    @reason.setter
    def reason(self, value):
        need_changeable(self)
        cdef long number = PyNumber_Index(value)  # may run anything, an unlock, too
        cdef Record mine = need_changeable(self)
        if number < 0 or number > 0xffff:
            raise ValueError(f"a reason is a number from 0 to 65535, not {value!r}")
        mine.values.reason = <uint16_t>number
        mine.touched = True

    @property
    def persistent(self):
        """Whether the domain outlives its deactivation. Domain lock."""
        return need_locked(self).values.flags & SD_FLAG_PERSISTENT != 0

    @persistent.setter
    def persistent(self, bint value):
        set_flag(need_changeable(self), SD_FLAG_PERSISTENT, value)

    @property
    def autostart(self):
        """Whether the domain is to be started with the host. Domain lock. Assigning changes the
        record only; `DomainList.set_autostart` makes the link on disk too."""
        return need_locked(self).values.flags & SD_FLAG_AUTOSTART != 0

    @autostart.setter
    def autostart(self, bint value):
        set_flag(need_changeable(self), SD_FLAG_AUTOSTART, value)

    @property
    def pid(self):
        """Process id of the hypervisor, or None. Domain lock."""
        cdef int32_t pid = need_locked(self).values.pid
        return None if pid == -1 else pid

    @pid.setter
    def pid(self, value):
        need_changeable(self)
        cdef long number = -1 if value is None else PyNumber_Index(value)
        cdef Record mine = need_changeable(self)
        if value is not None and not 0 < number <= INT32_MAX:
            raise ValueError(f"{value!r} is no process id")
        mine.values.pid = <int32_t>number
        mine.values.started = 0 if number == -1 else process_start(<uint32_t>number)
        mine.touched = True

    @property
    def process_alive(self):
        """Whether the process runs that was assigned to `pid`, and not a later one of its number.
        Domain lock. False if `pid` is None."""
        cdef Record mine = need_locked(self)
        if mine.values.pid == -1 or not mine.values.started:
            return False
        return sd_process_runs(<uint32_t>mine.values.pid, mine.values.started)

    @property
    def definition(self):
        """The live definition (`DomainDef`). Domain lock.

        The same object each time while it does not change. Assigning replaces it with the next
        commit; its uuid and name must be the record's.
        """
        cdef Record mine = need_locked(self)
        if is_pending(mine, SD_DEFINITION):
            return mine.changes[SD_DEFINITION]
        return read_definition(self.segment, self.slot, self.life, &mine.values)

    @definition.setter
    def definition(self, value):
        need_changeable(self)
        sd_prefetch_replace(self.segment.segment, self.slot)
        encoded = encode_definition(self, value)
        set_blob(need_room(self), SD_DEFINITION, value, encoded)

    @property
    def next_definition(self):
        """What becomes the definition once the domain is inactive (libvirt's newDef), or None.
        Domain lock."""
        return read_blob(need_locked(self), SD_NEXT_DEFINITION)

    @next_definition.setter
    def next_definition(self, value):
        need_changeable(self)
        encoded = None if value is None else encode_definition(self, value)
        set_blob(need_room(self), SD_NEXT_DEFINITION, value, encoded)

    @property
    def data(self):
        """The driver's own data: any MessagePack value, or None. Domain lock.

        What is read is read-only (mappings are proxies, sequences tuples); assign to change it.
        Raises `TypeError` or `ValueError` for what MessagePack cannot carry, and leaves it as it
        was.
        """
        return read_data(need_locked(self))

    @data.setter
    def data(self, value):
        assign_data(self, value)

    def add(self, field, by=1):
        """Add to a named integer of `data`, which is a mapping; returns the sum. Part of the
        transaction. `DomainList.add` does it in one call.

        No data, or no such entry, counts as 0. Raises `DomainNotLocked`; `TypeError` if the data is
        no mapping or the entry no integer (a bool is none); `OverflowError` for a sum outside of
        -2^63 to 2^64 - 1. After an error the data is as it was.
        """
        return add_to_data(self, field, by)

    @property
    def previous_owner_died(self):
        """The `LockHolder` that died holding this domain since it was last handed back in order, or
        None. What it had not committed was rolled back. Domain lock."""
        cdef sd_slot *at
        cdef uint64_t who
        need_locked(self)
        at = &self.segment.segment.slots[self.slot]
        who = sd_load(&at.died_who)
        if not who:
            return None
        return HOLDERS.dead_holder(sd_who_tid(who) if who != SD_DIED_UNKNOWN else 0,
                                   <uint32_t>sd_load(&at.sum_and_pid), sd_who_start(who))

    # --- for the rules ---

    @property
    def _work(self):
        """What is under way in the domain (`rules.work.Work`), or None. Domain lock. Assigning
        replaces it with the next commit."""
        return read_blob(need_locked(self), SD_WORK)

    @_work.setter
    def _work(self, value):
        need_changeable(self)
        encoded = None if value is None else ENCODE_WORK(value)
        cdef Record mine = need_room(self)
        set_blob(mine, SD_WORK, value, encoded)
        set_unfinished(mine, value)

    def _commit_work(self, work, timeout=None, tuple events not None=()):
        """Commit this as what is under way, and tell of it with these events, pairs of type and
        detail; the other changes go on waiting. Domain lock."""
        need_changeable(self)
        encoded = None if work is None else ENCODE_WORK(work)  # may run anything, an unlock, too
        commit_work(need_changeable(self), work, encoded, deadline_of(timeout), events)

    @property
    def _intends(self):
        """Whether the holder said in this hold what it intends: a clean unlock ends that."""
        return need_locked(self).intends

    @_intends.setter
    def _intends(self, bint value):
        need_changeable(self).intends = value

    @property
    def _holding(self):
        """The handle through which this thread holds the domain. Domain lock."""
        return need_locked(self)

    @property
    def _block(self):
        """What `_lock_again` needs: depth of `with` blocks, and what the holder intends. Domain
        lock."""
        cdef Record mine = need_locked(self)
        return mine.depth, intention(mine) if mine.intends else None

    def _lock_again(self, block, timeout=None):
        """Lock the domain, and be in the `with` blocks of before: in one step, as far as signal
        handlers can tell."""
        cdef unsigned depth = block[0]
        intended = block[1]
        lock_record(self, deadline_of(timeout), timeout)
        self.depth = depth
        self.intends = intended is not None and intention(self) == intended

    def _note(self, uint32_t type, uint16_t detail=0):
        """An event that the next commit is to have, beside those of its changes. Domain lock."""
        cdef Record mine = need_changeable(self)
        add_news(&mine.noted, type, detail, mine.values.id)
        mine.touched = True

    def _is(self, uuid, name):
        """Whether these are the domain's uuid and name. Domain lock."""
        return is_identity(self, uuid, name)

    def _take_id(self, timeout=None):
        """The next id, entered into this transaction; never given out again."""
        cdef Record mine = need_changeable(self)
        cdef int32_t id
        cdef int result = sd_take_id(self.segment.segment, &id, deadline_of(timeout))
        if result == SD_FULL:
            raise errors.SegmentFull(
                "every id up to 2147483647 was given out; create a new segment")
        if result != SD_OK:
            raise_poison_or_code(self.segment, result, "next id")
        mine.values.id = id
        mine.touched = True
        return id

    @property
    def _receipt(self):
        """Life and commits of the record: they differ if a commit or a remove took effect since.
        Needs no lock."""
        cdef sd_slot *at
        if not self.leads:
            return 0, 0
        at = &self.segment.segment.slots[self.slot]
        return sd_load(&at.life), sd_load(&at.cur)

    def _drop_id(self):
        cdef Record mine = need_changeable(self)
        mine.values.id = -1
        mine.touched = True

    @property
    def _doms(self):
        return self.segment

    def _wait_for_change(self, timeout=None):
        """Release the lock, sleep until the domain has changed or the time is up, lock it again:
        whether it changed. `with` blocks go on."""
        return bool(wait_unlocked(self, deadline_of(timeout)))

    @property
    def _key(self):
        """(slot, life, uuid bytes): what a handle is in any process."""
        return self.slot, self.life, PyBytes_FromStringAndSize(<char *>self.uuid_raw, 16)

    def __eq__(self, other):
        if not isinstance(other, Record):
            return NotImplemented
        return (self.slot == (<Record>other).slot and self.life == (<Record>other).life
                and self.segment.segment == (<Record>other).segment.segment)

    def __hash__(self):
        return hash((self.slot, self.life))

    def __repr__(self):
        cdef Record mine = locked_or_none(self)
        kind = type(self).__name__
        if mine is None:
            return f"<{kind} {uuid_object(self.uuid_raw)}>"
        return f"<{kind} {self.name!r} {uuid_object(self.uuid_raw)} locked>"
