# Changing the list: create, remove and rename records, and the list's settings.
#
# Each needs the list lock and is one commit of the core: it happens as a whole or not at all, even
# if the process dies in the middle. What the holder of a domain changes is committed in hold.pxi.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from shmdomains import errors

cdef enum:
    SLOTS_TRIED = 64  # and passed over because they are held, before one is waited for
    SHUT_OFF = 5  # DomainState.SHUTOFF


cdef DomainInfo read_identity(Segment doms, object uuid, object name):
    """Whose uuid it is or, if nobody's, whose name; and ask for the lines of an insert, which comes
    next if it is nobody's."""
    cdef sd_key key
    cdef DomainInfo info = None
    cdef uint64_t deadline = sd_now() + SECOND
    need_list(doms, "assign_def")
    sd_prefetch_insert(doms.segment)
    if uuid is not None:
        key.what = SD_UUID_INDEX
        uuid_words(uuid, key.uuid)
        info = read_by_key(doms, &key, False, deadline)
    if info is None and set_name(key.name, name):
        key.what = SD_NAME_INDEX
        info = read_by_key(doms, &key, False, deadline)
    return info


cdef Record insert_record(Segment doms, object uuid, object name, bytes definition, int state,
                          bint persistent, object timeout, object work):
    cdef sd_key key
    cdef uint64_t deadline = deadline_of(timeout)
    cdef Record record
    cdef int result
    encoded = None if work is None else ENCODE_WORK(work)  # may run anything, an unlock, too
    need_list(doms, "assign_def")
    may_wait(doms, deadline)
    uuid_words(uuid, key.uuid)
    if not set_name(key.name, name):
        raise errors.InvalidName(f"{name!r} cannot be a domain's name")
    record = new_record(doms)
    # The caller has looked, but a signal handler of this thread holds the list lock, too, and may
    # have defined the domain since. From here on a handler is refused.
    result = read_either(doms, &key)
    if result == SD_OK:
        raise errors.DomainExists(
            f"a domain with the name '{name}' or the uuid {uuid_object(key.uuid)} was defined "
            "meanwhile by a signal handler of this thread")
    if result != SD_MISS:
        raise_code(result, f"define domain {name!r}")
    insert_into(record, &key, definition, state, persistent, deadline, timeout, work, encoded)
    return record


cdef Record assign_new(Segment doms, object definition, bint persistent, object timeout):
    """Insert a domain that nobody has yet, with the usual definition. None: it is another case."""
    cdef sd_key key
    cdef uint64_t seen, deadline = deadline_of(timeout)
    cdef Record record
    need_list(doms, "assign_def")
    if type(definition) is not DEFINITION or definition.uuid is None:
        return None
    sd_prefetch_insert(doms.segment)
    seen = sd_load(&doms.segment.header.list_seq)
    uuid_words(definition.uuid, key.uuid)
    if not set_name(key.name, definition.name) or read_either(doms, &key) != SD_MISS:
        return None
    encoded = packed(definition)
    record = new_record(doms)
    # Those two may have run anything; from here on a signal handler is refused.
    need_list(doms, "assign_def")
    may_wait(doms, deadline)
    if sd_load(&doms.segment.header.list_seq) != seen or PyBytes_GET_SIZE(encoded) > SD_BLOB_MAX:
        return None
    insert_into(record, &key, encoded, SHUT_OFF, persistent, deadline, timeout, None, None)
    return record


cdef int insert_into(Record record, const sd_key *key, bytes definition, int state,
                     bint persistent, uint64_t deadline, object timeout, object work,
                     bytes encoded) except -1:
    """The new domain in a free slot, committed and locked through this handle. No domain has its
    uuid or its name. List lock held."""
    cdef Segment doms = record.segment
    cdef sd_values values
    cdef sd_blob blobs[BLOBS]
    cdef sd_news news
    cdef uint32_t slot
    cdef sd_word *link
    cdef uint64_t epoch = sd_fork_epoch
    cdef int result
    memset(&values, 0, sizeof(values))
    memset(blobs, 0, sizeof(blobs))
    values.id = values.pid = -1
    values.state = <uint16_t>state
    values.flags = SD_FLAG_PERSISTENT if persistent else 0
    memset(&news, 0, sizeof(news))
    if persistent:
        add_news(&news, DEFINED, ADDED, -1)
    set_change(&blobs[SD_DEFINITION], definition)
    if work is not None:
        set_change(&blobs[SD_WORK], encoded)
        values.flags |= SD_FLAG_UNFINISHED if work.step is not None else 0
    lock_free_slot(doms, &slot, &link, deadline, timeout)
    result = sd_insert(doms.segment, slot, link, key.uuid, key.name, &values, blobs, &news,
                       deadline)
    if no_room(result) and reclaim(doms, slot):
        result = sd_insert(doms.segment, slot, link, key.uuid, key.name, &values, blobs, &news,
                           deadline)
    if result != SD_OK:
        if epoch == sd_fork_epoch:  # else the lock is the parent's
            release_slot(doms, slot, False)
        return raise_poison_or_code(doms, result, f"define domain {name_object(key.name)!r}")
    lead_to(record, slot)
    begin_hold(record)
    return 0


cdef int lock_free_slot(Segment doms, uint32_t *slot, sd_word **link, uint64_t deadline,
                        object timeout) except -1:
    """A free slot, locked, and the word that links to it. Passes over slots that somebody holds
    while there are others."""
    cdef int result, passed = 0
    cdef uint64_t patience = SD_TRY
    link[0] = NULL
    while True:
        result = sd_free_slot(doms.segment, link, slot)
        if result == SD_FULL and passed and patience == SD_TRY:
            # Every slot that is left is held by somebody: wait for one.
            link[0] = NULL
            patience = deadline
            continue
        if result != SD_OK:
            return raise_code(result, "define a domain")
        if acquire_slot(doms, slot[0], patience) == SD_OK:
            return 0
        if patience != SD_TRY or deadline == SD_TRY:
            raise_timed_out(&doms.segment.slots[slot[0]].owner,
                            &doms.segment.slots[slot[0]].mutex,
                            doms.segment.slots[slot[0]].why, "a free slot", timeout)
        passed += 1
        if passed > SLOTS_TRIED:
            patience = deadline


cdef int set_change(sd_blob *blob, bytes value) except -1:
    if len(value) > SD_BLOB_MAX:
        raise errors.SegmentFull(f"a blob of {len(value)} bytes; the limit is 16 MiB")
    blob.change = True
    blob.bytes = PyBytes_AS_STRING(value)
    blob.size = len(value)
    return 0


cdef int remove_record(Segment doms, Record record, object timeout) except -1:
    need_ours(doms, record)
    cdef Record mine = need_changeable(record)
    cdef uint64_t deadline = deadline_of(timeout)
    need_list(doms, "remove")
    cdef sd_news news
    news_of_end(mine, &news)
    cdef int result = sd_remove(doms.segment, mine.slot, &news, deadline)
    if result != SD_OK:
        raise_poison_or_code(doms, result, "remove a domain")
    drop_changes(mine)
    return end_hold(mine, True)


cdef int rename_record(Segment doms, Record record, object name, bytes definition,
                       bytes next_definition, object timeout, object work) except -1:
    need_ours(doms, record)
    need_changeable(record)
    encoded = None if work is None else ENCODE_WORK(work)  # may run anything, an unlock, too
    cdef Record mine = need_changeable(record)
    cdef uint64_t deadline = deadline_of(timeout)
    cdef unsigned char raw[252]
    cdef sd_blob blobs[BLOBS]
    need_list(doms, "rename")
    if not set_name(raw, name):
        raise errors.InvalidName(f"{name!r} cannot be a domain's name")
    memset(blobs, 0, sizeof(blobs))
    set_change(&blobs[SD_DEFINITION], definition)
    if next_definition is not None:
        set_change(&blobs[SD_NEXT_DEFINITION], next_definition)
    blobs[SD_WORK].change = mine.values.flags & SD_FLAG_PRESENT(SD_WORK) != 0
    if work is not None:
        set_change(&blobs[SD_WORK], encoded)
    set_unfinished(mine, work)
    if mine.values.flags & SD_FLAG_PERSISTENT:
        add_news(&mine.noted, UNDEFINED, RENAMED_FROM, mine.values.id)
        add_news(&mine.noted, DEFINED, RENAMED, mine.values.id)
    cdef int result = sd_commit(doms.segment, mine.slot, &mine.values, blobs, raw, &mine.noted,
                                deadline)
    if no_room(result) and reclaim(doms, mine.slot):
        result = sd_commit(doms.segment, mine.slot, &mine.values, blobs, raw, &mine.noted,
                           deadline)
    if result != SD_OK:
        reload_values(mine)
        raise_poison_or_code(doms, result, f"rename to {name!r}")
    reload_values(mine)


cdef int write_settings(Segment doms, bytes settings) except -1:
    need_list(doms, "settings")
    cdef int result = sd_settings_set(doms.segment, PyBytes_AS_STRING(settings), len(settings))
    if result != SD_OK:
        raise_code(result, "settings")


cdef bytes read_settings(Segment doms):
    cdef unsigned char *room = <unsigned char *>malloc(SD_SETTINGS_BYTES)
    cdef uint64_t size
    if room == NULL:
        raise MemoryError
    try:
        need_open(doms)
        if sd_settings_get(doms.segment, room, &size) != SD_OK:
            raise_code(SD_CORRUPT, "settings")
        return PyBytes_FromStringAndSize(<char *>room, size)
    finally:
        free(room)
