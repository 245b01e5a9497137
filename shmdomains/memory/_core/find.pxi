# Finding: from a key to a locked domain.
#
# The index is probed without a lock, then only the slot of the hit is locked, so nobody waits for
# an unrelated domain. What a find returns was verified under the slot's lock. Handles that are not
# locked (from a pickle, or for `free`) are made here as well.

from libc.stdint cimport uint32_t, uint64_t

from shmdomains import errors

cdef enum:
    LIVES = 1  # in a slot's `life`: it is odd while a domain lives there


cdef Record find_with_list(Segment doms, object what, object uuid, object name, object id,
                           object timeout, object why):
    """The patch's find: the caller holds the list lock."""
    cdef sd_key key
    cdef uint64_t deadline = deadline_of(timeout)
    need_list(doms, what)
    if not make_key(&key, None, uuid, name, id):
        return None
    if why is None:
        return find_record(doms, &key, deadline, timeout)
    return find_for(doms, &key, deadline, timeout, why)


cdef Record find_for(Segment doms, const sd_key *key, uint64_t deadline, object timeout,
                     object why):
    """`find_record`, and the record says what it is locked for."""
    need_text(why)
    cdef Record record = find_record(doms, key, deadline, timeout)
    if record is not None:
        say(record, why)
    return record


cdef Record find_record(Segment doms, const sd_key *key, uint64_t deadline, object timeout):
    """Probe the index, lock that one slot, verify. None: there is no such domain.

    If the slot, once locked, holds another domain, the one that was meant was removed or renamed
    meanwhile; its key may be back in another slot, so the find begins again.
    """
    cdef uint32_t slot
    cdef int result
    cdef Record record
    cdef sd_thread *owner = begin_asking()
    if TASKS:
        need_room_for_lock()
    if owner.records != NULL:
        # With the list lock he may wait for any other; `find_in_slot` looks at the one it finds.
        if doms.segment.list_nonce != owner.nonce and sd_find(doms.segment, key, &slot) == SD_OK:
            need_not_held(doms, slot)
        may_wait(doms, deadline)
    while True:
        result = sd_find_to_lock(doms.segment, key, &slot)
        if result == SD_CORRUPT:
            result = sd_scan(doms.segment, key, &slot)
        if result == SD_DOUBT:
            if doms.segment.list_nonce == me().nonce and key.what != SD_ID_INDEX:
                raise_code(SD_CORRUPT, "find")
            result = find_under_lock(doms, key, &slot, deadline, timeout)
        if result == SD_MISS:
            return None
        if result != SD_OK:
            raise_code(result, "find")
        record = find_in_slot(doms, slot, key, deadline, timeout)
        if record is not None:
            return record


cdef int find_under_lock(Segment doms, const sd_key *key, uint32_t *slot, uint64_t deadline,
                         object timeout) except -1:
    """Probe once more under the index's lock: writers kept overtaking. SD_OK or SD_MISS."""
    cdef int result
    if key.what == SD_ID_INDEX:
        begin_wait(doms)
        result = sd_ids_lock(doms.segment, deadline)
        if result != SD_OK:
            end_wait(doms)
            return raise_poison_or_code(doms, result, "find by id")
        result = sd_find(doms.segment, key, slot)
        sd_ids_unlock(doms.segment)
        end_wait(doms)
        still_open(doms)
    else:
        # Holding a domain, only try: whoever holds the list lock may wait for that domain.
        acquire_list(doms, SD_TRY if holds_any(doms) else deadline, timeout)
        result = sd_find(doms.segment, key, slot)
        release_list(doms)
    if result == SD_CORRUPT:
        result = sd_scan(doms.segment, key, slot)
    if result == SD_OK or result == SD_MISS:
        return result
    return raise_code(result, "find")


cdef Record find_in_slot(Segment doms, uint32_t slot, const sd_key *key, uint64_t deadline,
                         object timeout):
    """Lock the slot, and hand out its domain if that still has the key."""
    cdef sd_slot *at = &doms.segment.slots[slot]
    cdef Record record
    cdef int result
    # Allocated before the lock is taken: the collector may run, and that runs anything.
    record = new_record(doms)
    if me().records != NULL:
        need_not_held(doms, slot)
    if acquire_slot(doms, slot, deadline) == SD_TIMEOUT:
        raise_timed_out(&at.owner, &at.mutex, at.why, describe(doms, slot), timeout)
    result = sd_verify(doms.segment, slot, key, &record.values)
    if result != SD_OK:
        release_slot(doms, slot, False)
        if result == SD_CORRUPT:
            raise_code(SD_CORRUPT, "lock a domain")
        need_sound_life(doms, slot)
        return None
    lead_to(record, slot)
    enter_thread(record)
    if record.values.flags & SD_FLAG_UNFINISHED:
        settle(record, deadline)
    return record


cdef Record new_record(Segment doms):
    cdef Record record = <Record>new_handle(doms.record_class, EMPTY)
    record.segment = doms
    return record


cdef int need_sound_life(Segment doms, uint32_t slot) except -1:
    """Raise if a damaged count hides whether a domain lives here: that is no answer."""
    if not sd_count_sound(sd_load(&doms.segment.slots[slot].life)):
        raise errors.SegmentCorrupt(
            f"whether a domain lives in slot {slot}, and which, is damaged")
    return 0


cdef object describe(Segment doms, uint32_t slot):
    """The slot's domain for an error message; its lock is not needed."""
    cdef sd_view view
    if sd_view_begin(doms.segment, slot, &view) == SD_OK:
        return f"domain {name_object(view.name)!r}"
    return "a domain"


cdef Record unlocked_handle(Segment doms, object key, object uuid, object name, object id):
    """To the domain with this key, or None; no lock is taken."""
    cdef sd_key wanted
    cdef uint32_t slot
    cdef int result
    cdef uint64_t life, deadline = sd_now() + SECOND
    cdef Record record
    need_open(doms)
    if not make_key(&wanted, key, uuid, name, id):
        return None
    while True:
        result = sd_find(doms.segment, &wanted, &slot)
        if result == SD_DOUBT or result == SD_CORRUPT:
            result = sd_scan(doms.segment, &wanted, &slot)
        if result == SD_MISS:
            return None
        if result == SD_OK:
            life = sd_load_acquire(&doms.segment.slots[slot].life)
            record = new_record(doms)
            lead_to(record, slot)
            record.life = life
            if life & LIVES and sd_matches(doms.segment, slot, &wanted):
                if sd_load_acquire(&doms.segment.slots[slot].life) == life:
                    return record
        elif result != SD_DOUBT:
            raise_code(result, "find")
        back_off(deadline)


cdef Record handle_to(Segment doms, uint32_t slot, uint64_t life, bytes uuid):
    cdef Record record
    need_open(doms)
    if slot >= slot_count(doms) or len(uuid) != 16:
        raise errors.DomainRemoved("this handle's domain does not exist in this list")
    record = new_record(doms)
    lead_to(record, slot)
    record.life = life
    uuid_words(uuid, record.uuid_raw)
    return record


cdef list live_handles(Segment doms, uint64_t flags):
    """Handles, not locked, to all domains, or to those whose committed fields have these flags."""
    cdef uint32_t slot
    cdef Record record
    cdef sd_values values
    cdef list found = []
    need_open(doms)
    for slot in range(slot_count(doms)):
        need_sound_life(doms, slot)
        if not sd_load(&doms.segment.slots[slot].life) & LIVES:
            continue
        if flags:
            sd_values_settled(doms.segment, slot, &values)
            if values.flags & flags != flags:
                continue
        record = new_record(doms)
        lead_to(record, slot)
        found.append(record)
    return found
