# `Segment`: an attachment to a segment, and making a new one.
#
# Methods are thin: what they do stands in the file of its subject (locks, find, read, change,
# check, recover). Attaching and closing are here, and who keeps the mapping: the list while it is
# open, each handle, each wait.

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t

from shmdomains import errors

MAX_DOMAINS = SD_SLOTS_MAX
MIN_EVENTS = SD_RING_MIN
MAX_EVENTS = SD_EVENTS_MAX
EVENT_BYTES = sizeof(sd_entry)


@cython.no_gc_clear
cdef class Segment:
    """A mapped segment: its locks, finding, reading. `DomainList` adds the rules."""
    cdef sd_segment *segment
    cdef bint multiprocessing
    cdef readonly bint closed
    cdef object list_lock, slot_locks  # lock="multiprocessing"
    # What those lock with. The collector may have cleared them when a locked handle is freed with
    # its list; it clears no tuple.
    cdef object list_semaphore
    cdef tuple slot_semaphores
    cdef object record_class
    cdef Decoded decoded
    cdef uint64_t slow_after_ns
    cdef object __weakref__
    cdef dict __dict__

    def __cinit__(self, *args, **kwargs):
        self.segment = NULL
        self.closed = True
        self.slow_after_ns = SLOW_AFTER

    def __dealloc__(self):
        if self.segment != NULL:
            if (self.segment.list_taker == <void *>self
                    and self.segment.list_nonce == me().nonce):
                drop_list(self, "a DomainList")
            if not self.closed:
                self.segment.open -= 1
            sd_unmap(self.segment)
            self.segment = NULL

    def _attach(self, int fd, record_class, list_lock=None, slot_locks=None):
        """Map the segment behind `fd`, which stays the caller's. Once: handles rely on it."""
        cdef char why[200]
        cdef sd_segment *segment
        cdef int result
        if self.segment != NULL:
            raise TypeError("this DomainList has its segment; make another one")
        self.decoded = Decoded()
        result = sd_map(fd, &segment, why, sizeof(why))
        if result == SD_MISMATCH:
            raise errors.SegmentMismatch(why.decode())
        if result == SD_CORRUPT:
            raise errors.SegmentCorrupt(why.decode())
        if result != SD_OK:
            raise_code(result, "attach")
        self.segment = segment
        self.decoded.segment = segment
        segment.users += 1
        self.multiprocessing = segment.kind == SD_KIND_MULTIPROCESSING
        self.list_lock, self.slot_locks = list_lock, slot_locks
        if list_lock is not None:
            self.list_semaphore = list_lock._semlock
            self.slot_semaphores = tuple([lock._semlock for lock in slot_locks])
        self.record_class = record_class
        keep_spares(record_class, <void *>vacate)
        look_for_greenlets()
        self.closed = False

    def _close(self):
        """Give up this attachment; the mapping stays while handles refer to it."""
        if self.closed:
            return
        cdef sd_thread *thread = sd_self()
        # A signal handler may close the list, but the code it interrupted still needs the lock.
        if (self.segment.list_nonce == me().nonce
                and self.segment.list_taker == <void *>self
                and thread.nested <= self.segment.list_nested):
            release_list(self)
        self.closed = True
        self.segment.open -= 1
        sd_detach(self.segment)

    @classmethod
    def __class_getitem__(cls, handle_type):
        """For annotations, which name the class of the handles."""
        return cls

    # --- locks ---

    def _need_list_lock(self, what):
        """Raises `ListNotLocked`, or `ListClosed`, unless this thread holds the list lock."""
        need_list(self, what)

    def _need_ours(self, Record record not None):
        """Raises `WrongList` for a domain of another list: its slot is somebody else's here."""
        need_ours(self, record)

    @property
    def is_locked(self):
        """Whether this thread holds the list lock."""
        return self.segment != NULL and self.segment.list_nonce == me().nonce

    def lock(self, timeout=None, why=None):
        """Take the list lock (the patch's driver lock).

        `timeout` in seconds: None waits for ever, 0 tries. `why` is what it is taken for, as for
        `get`. Raises `AlreadyLocked`, `LockOrder`
        (this thread holds a domain of this list), `LockTimeout`, `ListClosed`.
        """
        lock_list(self, timeout, why)

    def unlock(self):
        """Release the list lock. Raises `ListNotLocked`, or `NotOwner` in another thread."""
        unlock_list(self)

    def locked(self, timeout=None, why=None):
        """Hold the list lock for a ``with`` block; see `lock`.

            with doms.locked():
                dom = doms.find_by_name("web1")
        """
        return ListHold(self, timeout, why)

    def acquire(self, block=True, timeout=None):
        """`lock` in the manner of `multiprocessing.Lock`: True, or False when it was not free."""
        try:
            self.lock(0 if not block or (timeout is not None and timeout < 0) else timeout)
        except errors.LockTimeout:
            return False
        return True

    def release(self):
        """`unlock` in the manner of `multiprocessing.Lock`."""
        self.unlock()

    def mutex(self, name, timeout=None, *, why=None):
        """A lock for what belongs to no domain: a `Mutex`, not yet locked.

            with doms.mutex("scheduler", timeout=0) as held:
                ...

        Every process that asks for this name gets the same lock; a name is 1 to 63 bytes of UTF-8.
        A list has 64 of them, and a name is never given back: the 65th is `TooManyMutexes`.
        `timeout` in seconds is for the ``with`` block: None waits for ever, 0 tries. `why` says,
        in up to 56 bytes, what it is held for, to whoever looks.

        Named locks come before the list and its domains: whoever holds one may wait for those, and
        whoever holds those may only try one (`timeout=0`), else `LockOrder`. Waiting for a second
        one while holding one needs a timeout. They are robust mutexes in lists of either kind, so a
        stranger to a list with multiprocessing locks may take them, too.
        """
        return Mutex(self, name, timeout, why)

    # --- finding ---

    def get(self, key=None, /, *, uuid=None, name=None, id=None, timeout=None, why=None):
        """The domain with this uuid, name or id, locked. No list lock needed.

        Exactly one key, by keyword or by position in virsh's order: an ``int`` is an id, a
        `uuid.UUID`, 16 bytes or a string in a UUID's form a uuid, any other string a name.
        `timeout` in seconds. `why` says what the domain is locked for, for whoever waits: it
        stands in their `LockTimeout` and in `locks`, cut to 55 bytes of UTF-8, until the domain is
        unlocked. Raises `DomainNotFound`, `LockTimeout`,
        `LockOrder` (this thread holds another domain and would wait), `AlreadyLocked`.
        """
        cdef sd_key wanted
        cdef uint64_t deadline = deadline_of(timeout)
        cdef Record record
        need_open(self)
        if make_key(&wanted, key, uuid, name, id):
            if why is None:
                record = find_record(self, &wanted, deadline, timeout)
            else:
                record = find_for(self, &wanted, deadline, timeout, why)
            if record is not None:
                return record
        raise not_found(&wanted, key, uuid, name, id)

    def lookup(self, key=None, /, *, uuid=None, name=None, id=None, timeout=None, why=None):
        """Like `get`, but None when there is no such domain."""
        cdef sd_key wanted
        cdef uint64_t deadline = deadline_of(timeout)
        need_open(self)
        if not make_key(&wanted, key, uuid, name, id):
            return None
        if why is None:
            return find_record(self, &wanted, deadline, timeout)
        return find_for(self, &wanted, deadline, timeout, why)

    def find_by_id(self, id, timeout=None, why=None):
        """The active domain with this id, locked, or None. List lock held by the caller
        (virDomainFindByID)."""
        return find_with_list(self, "find_by_id", None, None, id, timeout, why)

    def find_by_uuid(self, uuid, timeout=None, why=None):
        """The domain with this UUID, locked, or None. List lock held by the caller
        (virDomainFindByUUID)."""
        return find_with_list(self, "find_by_uuid", uuid, None, None, timeout, why)

    def find_by_name(self, name, timeout=None, why=None):
        """The domain with this name, locked, or None. List lock held by the caller
        (virDomainFindByName)."""
        return find_with_list(self, "find_by_name", None, name, None, timeout, why)

    def add(self, key=None, /, field=None, by=1, timeout=None, *, uuid=None, name=None, id=None):
        """Add to a named integer of a domain's data and commit it; returns the sum.

        Exactly one key, by position as `get` takes it or by keyword. The domain is locked, changed
        and unlocked in this call. Raises what `get` and `Domain.add` raise: `AlreadyLocked` if this
        thread holds the domain, which has `add`, too.
        """
        cdef sd_key wanted
        cdef uint64_t deadline = deadline_of(timeout)
        need_open(self)
        if field is None:
            raise TypeError("say which integer of the data: doms.add('web1', 'requests')")
        if make_key(&wanted, key, uuid, name, id):
            sum = add_by_key(self, &wanted, field, by, deadline, timeout)
            if sum is not None:
                return sum
        raise not_found(&wanted, key, uuid, name, id)

    # --- many at once (many.pxi) ---

    def _lock_all(self, list wanted not None, Records taken not None, Deadline deadline not None):
        """Lock each of these keys and handles, in this order. List lock held."""
        lock_all(self, wanted, taken, deadline)

    def _get_all(self, list keys not None, Records taken not None, Deadline deadline not None):
        """Lock each of these keys, in this order. List lock held."""
        get_all(self, keys, taken, deadline)

    def _assign_all(self, list definitions not None, persistent, Deadline deadline not None,
                    list places not None):
        """The short way of `assign_defs` for domains that are all new, a handle to each place; or
        False: the rule has to look at them. List lock held."""
        if not all_new(self, definitions):
            return False
        assign_all(self, definitions, bool(persistent), deadline, places)
        return True

    def _update_all(self, pairs, Deadline deadline not None, checked, note):
        """`rules.many.ManyRules.update_many`."""
        return update_all(self, pairs, deadline, checked, note)

    def _remove_all(self, list wanted not None, Deadline deadline not None, note):
        """`rules.many.ManyRules.remove_many`, with the list lock held."""
        return remove_all(self, wanted, deadline, note)

    # --- who holds what (held.pxi) ---

    @property
    def slow_after(self):
        """After how many seconds a wait for a lock is logged, once, as a warning of the logger
        ``shmdomains.wait``, with who holds the lock; 0: never. Of this list object in this process;
        5 at first. It is looked at about every 50 ms."""
        return self.slow_after_ns / <double>SECOND

    @slow_after.setter
    def slow_after(self, seconds):
        cdef double after = seconds
        if not 0 <= after <= 1e9:
            raise ValueError(f"slow_after is 0 (never) or more seconds, not {seconds!r}")
        self.slow_after_ns = <uint64_t>(after * SECOND)

    def _waits_for_jobs(self):
        """Slot -> (how many wait for a job there, ns for which the first of them waits)."""
        return waits_for_jobs(self)

    def _taken(self):
        """Every lock that is held or waited for, as `held.LockInfo` is made of. Takes no lock."""
        return taken_locks(self)

    def _counts(self):
        """What this process counted, as `held.Statistics` is made of."""
        return own_counts(self)

    def _all_counts(self):
        """For each living process that is attached, by a number that no other process gets."""
        return all_counts(self)

    # --- reading without any lock ---

    def peek(self, key=None, /, *, uuid=None, name=None, id=None, timeout=1.0, definitions=None):
        """The committed state of one domain (`DomainInfo`), or None. Takes no lock and never waits
        for one.

        One key, as for `get`. `timeout`: seconds after which a read that writers keep overtaking
        raises `Busy`. The info is of one moment, its definition too. `definitions`: True reads it
        now; False leaves definitions and data out; None is True in a list of up to 4,096 domains.
        In a larger one it reads the definition when it is asked for, which raises `Busy` if it was
        replaced meanwhile, for copying it takes longer than all the rest.
        """
        cdef sd_key wanted
        cdef uint64_t deadline = deadline_of(timeout)
        need_open(self)
        if not make_key(&wanted, key, uuid, name, id):
            return None
        if definitions is None:
            return read_by_key(self, &wanted, PEEKED, deadline)
        return read_by_key(self, &wanted, WITH if definitions else WITHOUT, deadline)

    def _who_has(self, uuid, name):
        """The domain that has this uuid or, if none has, this name: a `DomainInfo` without
        definitions, or None. List lock held, so that the answer stands."""
        return read_identity(self, uuid, name)

    def snapshot(self, definitions=True):
        """All domains as `DomainInfo`s of committed state. Takes no lock; each record is
        consistent in itself, the set is not one moment's. `definitions=False` leaves definitions
        and data out and is faster. Raises `Busy` when writers kept overtaking it for a second."""
        cdef listing_filter every = listing_filter(-1, -1, -1, ALL_STATES)
        return list_infos(self, &every, definitions)

    def _list(self, int active, int persistent, int autostart, unsigned states, bint definitions):
        cdef listing_filter filter = listing_filter(active, persistent, autostart, states)
        return list_infos(self, &filter, definitions)

    def _columns(self, int active, int persistent, int autostart, unsigned states,
                 tuple names not None):
        """What `rules.many.ManyRules.table` is made of: see list_columns."""
        cdef listing_filter filter = listing_filter(active, persistent, autostart, states)
        return list_columns(self, &filter, names)

    def _marked(self):
        """Each domain, and what tells whether its definition or its process is another one by now:
        see list_marked."""
        return list_marked(self)

    def _count_all(self, int active, int persistent, int autostart, unsigned states):
        cdef listing_filter filter = listing_filter(active, persistent, autostart, states)
        return count_domains(self, &filter)

    def __len__(self):
        need_open(self)
        cdef uint64_t live = sd_load(&self.segment.header.live)
        if live > self.segment.at.max_slots:
            raise_code(SD_CORRUPT, "count")
        return live

    def __contains__(self, key):
        """Whether a domain has this key, as for `get`; of a handle or an info, whether its domain
        is there."""
        cdef sd_key wanted
        need_open(self)
        if not make_key(&wanted, key, None, None, None):
            return False
        return read_by_key(self, &wanted, False, sd_now() + SECOND) is not None

    def __iter__(self):
        return iter(self.snapshot())

    # --- for the rules: waiting and events (sleep.pxi) ---

    def _handle_of(self, key=None, /, *, uuid=None, name=None, id=None):
        """An unlocked handle to the domain with this key, or None. Takes no lock."""
        return unlocked_handle(self, key, uuid, name, id)

    def _holds_other(self, Record record):
        """Whether this thread holds a domain of this list other than this one."""
        return holds_any_but(self, record)

    def _look(self, Record record not None, bint definitions=True):
        """(`DomainInfo` or None once it is removed, stamp). Takes no lock."""
        return read_with_stamp(self, record, definitions)

    def _sleep(self, Record record not None, uint64_t stamp, timeout=None):
        """Sleep until the domain has changed since the stamp, a slice at most. Takes no lock."""
        return bool(sleep_on_record(self, record, stamp, deadline_of(timeout)))

    def _list_stamp(self):
        """The stamp for `_sleep_on_list`; changes from now on are noticed there."""
        need_open(self)
        cdef uint64_t stamp = sd_load_acquire(&self.segment.header.any_seq)
        arm_list(self, stamp)
        return stamp

    def _sleep_on_list(self, uint64_t stamp, timeout=None):
        """Sleep until any domain has changed since `_list_stamp`, a slice at most."""
        return bool(sleep_on_list(self, stamp, deadline_of(timeout)))

    def _marks(self):
        """What `_changed` needs to remember, empty."""
        return bytearray()

    def _changed(self, bytearray marks not None, bint definitions=True):
        """The committed states of what changed since the last call with these marks (empty at
        first)."""
        need_open(self)
        return read_changed(self, marks, definitions)

    @property
    def _events_max(self):
        need_open(self)
        return self.segment.at.events

    @property
    def _event_count(self):
        """The number of the last event; 0: none yet."""
        need_open(self)
        return sd_ring_count(self.segment)

    def _read_event(self, uint64_t number):
        """(number, ns since the epoch, type, detail, uuid, name, id, `who` and pid of a death), or
        None if it was overwritten, or never recorded."""
        return read_event(self, number)

    def _sleep_on_events(self, uint64_t count, timeout=None):
        """Sleep until there are more than `count` events, a slice at most."""
        return bool(sleep_on_events(self, count, deadline_of(timeout)))

    # --- for the rules: what a store offers ---

    def _insert(self, uuid, name, bytes definition, int state, bint persistent, timeout, list made,
                work=None):
        """A new record, committed and locked. List lock held. It is put into `made`, a list of one
        place, before a signal handler can raise in the caller."""
        made[0] = insert_record(self, uuid, name, definition, state, persistent, timeout, work)
        return made[0]

    def _assign_new(self, definition, persistent, timeout, list made):
        """The short way of `assign_def` for a domain that is new, as `_insert`; or None: the rule
        has to look at it. List lock held."""
        made[0] = assign_new(self, definition, bool(persistent), timeout)
        return made[0]

    def _remove(self, Record record not None, timeout=None):
        """Remove a record that this thread has locked; its lock is released. List lock held."""
        remove_record(self, record, timeout)

    def _rename(self, Record record not None, name, bytes definition, bytes next_definition,
                timeout=None, work=None):
        """Name, definitions and what is under way in one commit. List lock held; duplicates were
        looked for."""
        rename_record(self, record, name, definition, next_definition, timeout, work)

    def _handle(self, uint32_t slot, uint64_t life, bytes uuid):
        """An unlocked handle, for unpickling. It may be stale; locking it says so."""
        return handle_to(self, slot, life, uuid)

    def _handles(self):
        """Unlocked handles to every live record, in slot order."""
        return live_handles(self, 0)

    def _unfinished(self):
        """Unlocked handles to the records with a step that waits to be settled."""
        return live_handles(self, SD_FLAG_UNFINISHED)

    def _with_work(self):
        """Unlocked handles to the records in which something is under way."""
        return live_handles(self, SD_FLAG_PRESENT(SD_WORK))

    @property
    def _owner(self):
        """A number for whoever calls, a thread or a task."""
        return owner()

    @property
    def _this(self):
        """What errors call whoever calls."""
        return this()

    def _job_wait(self, Record record not None):
        """For a ``with`` block: this thread waits for a job of the domain."""
        return JobWait(self, record)

    def _set_settings(self, bytes settings):
        """What the list remembers for the rules, replaced as a whole. List lock held."""
        write_settings(self, settings)

    def _settings(self):
        """What `_set_settings` stored; empty before that."""
        return read_settings(self)

    def _mutex_names(self):
        """The names of the named locks that there are. Takes no lock."""
        return named_locks(self)

    @property
    def _identity(self):
        """Random, the segment's own: 16 bytes."""
        if self.segment == NULL:
            raise errors.ListClosed("this DomainList is closed")
        return PyBytes_FromStringAndSize(<char *>self.segment.id, 16)

    @property
    def _fd(self):
        """`DescriptorLost` when it is not the segment's any more."""
        need_open(self)
        cdef int fd = sd_descriptor(self.segment)
        if fd < 0:
            raise errors.DescriptorLost(
                f"this process closed the descriptor of this segment (number {self.segment.fd}); "
                "whatever has the number now is left alone. Have it kept by whoever closes "
                "descriptors (files_preserve=[doms] for python-daemon), or attach anew by name")
        return fd

    @property
    def _inode(self):
        need_open(self)
        return self.segment.device, self.segment.inode

    @property
    def _kind(self):
        return "multiprocessing" if self.multiprocessing else "robust"

    @property
    def _locks(self):
        return self.list_lock, self.slot_locks

    def _statistics(self):
        return read_statistics(self)

    # --- after a death, or damage ---

    def _check(self, timeout=None):
        """Check every invariant: (problems, counts, without a verdict, longest hold in seconds).

        Without a verdict: pairs (number, why); 0 to 4 are the sums of core.h, 5 to 8 the suspects
        that are left of the list, the ids, the heap.
        """
        return check_segment(self, timeout)

    def _recover(self, timeout=None):
        """Take each lock as its next holder would: (repairs, what is held, bytes freed).

        Repairs: (lock, name of the domain, `LockHolder` that died, or None if an earlier holder
        left the repair). Held: (lock, name of the domain, `LockHolder` or None).
        """
        return recover_locks(self, timeout)

    def _slots(self):
        """How many slots there are to `_salvage`; all that have memory if their number is
        damaged."""
        return slots_to_salvage(self)

    def _salvage(self, uint32_t slot):
        """What can be read of one record, without a lock: None, or (a `DomainInfo` without
        definitions, the three blobs as bytes or None, which of them are damaged). Damaged fields
        may lead to an outdated blob of this domain, never to another domain's."""
        return salvage_slot(self, slot)


# The list of a handle that no list made, or that waits to be reused.
cdef Segment NOWHERE = Segment()


def format_segment(int fd, kind, uint64_t max_domains, max_bytes, uint64_t events):
    """Make the empty file behind `fd` a segment. `max_bytes` None: about 16 KiB a domain; `events`:
    a power of two, or 0."""
    cdef uint64_t fixed = sd_geometry_fixed(max_domains, events)
    cdef uint64_t cells
    if not fixed:
        raise ValueError(f"max_domains is 1 to {SD_SLOTS_MAX}, not {max_domains}")
    if max_bytes is None:
        cells = max(max_domains * 256, 1 << 20)
    elif max_bytes < fixed + (1 << 20):
        raise ValueError(f"max_bytes for {max_domains} domains is at least {fixed + (1 << 20)}")
    else:
        cells = <uint64_t>((max_bytes - fixed - 8192) * 8 // (SD_CELL * 8 + 1))
    cdef uint64_t number = (SD_KIND_MULTIPROCESSING if kind == "multiprocessing"
                            else SD_KIND_ROBUST)
    cdef int result = sd_format(fd, number, max_domains, cells, events)
    if result != SD_OK:
        raise_code(result, "create the segment")
