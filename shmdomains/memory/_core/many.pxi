# Many domains in one call: locked, changed or removed one after the other.
#
# What the rules do with each stands in `rules/many.py`; here is the same for the usual domain, one
# in which nothing is under way, without a step of Python's between two of them. The unusual ones
# are the rules'.

from cpython.list cimport PyList_Append
from libc.stdint cimport uint64_t

from shmdomains import errors


cdef class Records(list):
    """Locked records for a ``with`` block, which commits and unlocks each, or rolls each back. As
    in `ListHold`, no signal handler runs before the first line of the block, nor in `__exit__`,
    except in the wait of a commit: then that one commit fails."""

    def __enter__(self):
        for record in <list>self:
            enter_block(<Record?>record)
        return self

    def __exit__(self, kind, value, traceback):
        cdef Py_ssize_t at = len(self)
        failure = None
        while at:  # allocates nothing: they are unlocked even when there is no memory
            at -= 1
            try:
                leave_block(<Record?>(<list>self)[at], kind)
            except BaseException as exc:
                failure = failure or exc
        if failure is not None:
            raise failure


cdef int lock_all(Segment doms, list wanted, Records taken, Deadline deadline) except -1:
    """Lock each, handles as they are, and put it into `taken`, in this order. List lock held."""
    for one in wanted:
        if isinstance(one, Record):
            doms._lock_one(one, taken, deadline)
        else:
            get_into(doms, one, taken, deadline)
    return 0


cdef int get_all(Segment doms, list keys, Records taken, Deadline deadline) except -1:
    """The same by keys alone: a handle stands for its uuid."""
    for one in keys:
        get_into(doms, one, taken, deadline)
    return 0


cdef int get_into(Segment doms, object one, Records taken, Deadline deadline) except -1:
    cdef sd_key key
    cdef Record record = None
    if make_any_key(&key, one):
        record = find_record(doms, &key, deadline.end, seconds_left(deadline.end))
    if record is None:
        raise not_found(&key, one, None, None, None)
    try:
        PyList_Append(taken, record)
    except MemoryError:
        end_hold(record, False)
        raise
    return 0


cdef bint all_new(Segment doms, list definitions) except -1:
    """Whether these are usual definitions with uuids, of domains that nobody has, and no two of one
    domain. List lock held."""
    cdef sd_key key
    cdef set names = set()
    cdef set uuids = set()
    need_list(doms, "assign_defs")
    for one in definitions:
        if type(one) is not DEFINITION or one.uuid is None:
            return False
        uuid_words(one.uuid, key.uuid)
        if not set_name(key.name, one.name) or read_either(doms, &key) != SD_MISS:
            return False
        names.add(one.name)
        uuids.add(one.uuid.int)
    return len(names) == len(uuids) == len(definitions)


cdef int assign_all(Segment doms, list definitions, bint persistent, Deadline deadline,
                    list places) except -1:
    """Insert these new domains; each handle goes to its place, a list of one, once it is locked."""
    cdef Record record
    cdef Py_ssize_t at
    for at in range(len(definitions)):
        record = assign_new(doms, definitions[at], persistent, seconds_left(deadline.end))
        if record is None:
            raise errors.DomainExists(
                f"domain {definitions[at].name!r} was defined meanwhile by a signal handler of "
                "this thread")
        (<list?>places[at])[0] = record
    return 0


cdef object update_all(Segment doms, object pairs, Deadline deadline, object checked, object note):
    """Change each by itself; how many. `checked(key, fields)` is asked for all that is not usual,
    and `note(error, text)` says how many were done before an error."""
    cdef sd_key key
    cdef list wanted = []
    cdef uint64_t done = 0
    need_open(doms)
    for one, fields in pairs:
        if not is_usual(fields):
            fields = checked(one, fields)
        make_any_key(&key, one)  # the error for what is no key
        wanted.append((one, fields))
    try:
        for one, fields in wanted:
            update_one(doms, one, <dict>fields, deadline)
            done += 1
    except BaseException as exc:
        note(exc, f"{done} of {len(wanted)} domains were changed before")
        raise
    return done


cdef bint is_usual(object fields) except -1:
    """Whether a change needs no check before others are done: a state, or data, which is checked
    when it is encoded."""
    if type(fields) is not dict:
        return False
    for field, value in (<dict>fields).items():
        if field == "state":
            if type(value) is not type(STATES[0]):
                return False
        elif field != "data":
            return False
    return True


cdef int update_one(Segment doms, object one, dict fields, Deadline deadline) except -1:
    cdef sd_key key
    cdef Record record = None
    if make_any_key(&key, one):
        record = find_record(doms, &key, deadline.end, seconds_left(deadline.end))
    if record is None:
        raise not_found(&key, one, None, None, None)
    try:
        for field, value in fields.items():
            if field == "state":
                assign_state(record, value)
            elif field == "data":
                assign_data(record, value)
            else:
                setattr(record, field, value)
        if record.touched or record.pending:
            commit_changes(need_changeable(record), deadline.end)
    finally:
        if locked_or_none(record) is not None:
            drop_changes(record)
            end_hold(record, False)  # a death is left for a holder who is told
    return 0


cdef object remove_all(Segment doms, list wanted, Deadline deadline, object note):
    """Remove each inactive domain, in a commit of its own; how many. List lock held."""
    cdef sd_key key
    cdef uint64_t done = 0
    need_list(doms, "remove_many")
    for one in wanted:
        if not isinstance(one, Record):
            make_any_key(&key, one)  # the error for what is no key
            continue
        need_ours(doms, <Record>one)
        if locked_or_none(<Record>one) is not None:
            raise errors.DomainLocked(
                f"{this()} holds domain {uuid_object((<Record>one).uuid_raw)}; unlock it first")
    try:
        for one in wanted:
            if not remove_idle(doms, one, deadline):
                doms.remove_inactive(one, deadline.left())
            done += 1
    except BaseException as exc:
        note(exc, f"{done} of {len(wanted)} domains were removed before")
        raise
    return done


cdef bint remove_idle(Segment doms, object one, Deadline deadline) except -1:
    """Remove it, unless it is active or something is under way in it, or it is not there: then the
    rule has the words."""
    cdef sd_key key
    cdef Record record
    if isinstance(one, Record):
        key.what = SD_UUID_INDEX
        key.uuid[0], key.uuid[1] = (<Record>one).uuid_raw[0], (<Record>one).uuid_raw[1]
    elif not make_any_key(&key, one):
        return False
    record = find_record(doms, &key, deadline.end, seconds_left(deadline.end))
    if record is None:
        return False
    try:
        if isinstance(one, Record) and one != record:
            return False  # its domain was removed, and another one has the uuid
        if record.values.id != -1 or record.values.flags & SD_FLAG_PRESENT(SD_WORK):
            return False
        remove_record(doms, record, seconds_left(deadline.end))
        return True
    finally:
        if locked_or_none(record) is not None:
            end_hold(record, False)
