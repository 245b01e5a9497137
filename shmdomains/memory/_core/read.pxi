# Reading: what is committed, without any lock.
#
# A reader copies and checks that no writer came in between, else it copies again; it never waits
# for a lock and never blocks a writer, and a writer that was stopped does not stop it. Each record
# is consistent in itself, a listing is not one moment's. A record that is written all the time
# until the deadline raises `Busy`.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from shmdomains import errors

cdef enum:
    ALL_STATES = 0xffffffff
    # What of a record's blobs an info gets.
    WITHOUT = 0
    WITH = 1
    PEEKED = 2  # the definition, which is large, later, unless the cache has room for it


cdef uint32_t slot_count(Segment doms) except? 0:
    """How many slots were ever used. Raises if that is damaged: it is not an empty list."""
    cdef uint32_t slots
    if sd_slots(doms.segment, &slots) != SD_OK:
        raise errors.SegmentCorrupt("the number of slots is damaged")
    return slots


cdef DomainInfo read_slot(Segment doms, uint32_t slot, const sd_key *key, int wants,
                          uint64_t deadline):
    """A consistent copy of the slot. None: no domain lives there, or not the one of `key`."""
    cdef sd_view view
    cdef int damage = 0
    cdef DomainInfo info = DomainInfo.__new__(DomainInfo)
    if wants != WITHOUT:
        info.blobs = Blobs.__new__(Blobs)
    if settle_view(doms, slot, key, info.blobs, wants == PEEKED, deadline, &view, &damage):
        return None
    if damage and key != NULL:
        raise_code(SD_CORRUPT, "read")
    info.damage = damage
    return fill_info(info, &view)


cdef int settle_view(Segment doms, uint32_t slot, const sd_key *key, Blobs blobs, bint later,
                     uint64_t deadline, sd_view *view, int *damage) except -1:
    """Look until no writer came in between; the same moment's blobs go into `blobs`, unless that is
    None. SD_OK or SD_MISS."""
    cdef int result
    cdef unsigned tries = 0
    while True:
        result = sd_view_begin(doms.segment, slot, view)
        if result == SD_MISS:
            return SD_MISS
        if result == SD_CORRUPT:
            damage[0] = FIELDS
            return SD_OK
        if result == SD_OK:
            damage[0] = 0 if view.name[0] else IDENTITY
            if key != NULL and not has_key(view, key):
                return SD_MISS
            if blobs is None:
                return SD_OK
            result = read_blobs(doms, slot, view, blobs, later)
            if result == SD_CORRUPT:
                raise_code(result, "read")
            if result == SD_OK:
                return SD_OK
            empty(blobs)  # of what was copied so far some may be gone
        tries += 1
        if tries > PATIENT_READS:
            back_off(deadline)


cdef void empty(Blobs blobs) noexcept:
    blobs.definition = blobs.next_definition = blobs.data = blobs.work = None
    blobs.known = blobs.known_data = None
    blobs.later.bytes = 0


cdef int read_blobs(Segment doms, uint32_t slot, const sd_view *view, Blobs blobs,
                    bint later) except? -1:
    """Copy the blobs that the view leads to into empty `blobs`, but not those that are in the
    cache, nor, if `later`, the definition, unless the cache has room for it, or the caller holds
    the domain: then it is what he made, and the next holder may replace it. SD_DOUBT: a writer came
    in between, read again."""
    cdef bytes blob
    cdef sd_stored stored
    cdef uint64_t version
    cdef bytes copied = None
    cdef int b, result
    blobs.decoded = doms.decoded
    blobs.slot, blobs.life = slot, view.life
    blobs.uuid_raw[0], blobs.uuid_raw[1] = view.uuid[0], view.uuid[1]
    memcpy(blobs.version, view.values.version, sizeof(blobs.version))
    version = view.values.version[SD_DEFINITION]
    keep_definition(blobs, cached(doms.decoded, SD_DEFINITION, slot, view.life, version))
    if view.values.flags & SD_FLAG_PRESENT(SD_DATA):
        blobs.known_data = cached(doms.decoded, SD_DATA, slot, view.life,
                                  view.values.version[SD_DATA])
    for b in range(BLOBS):
        if not view.values.flags & SD_FLAG_PRESENT(b):
            continue
        if b == SD_DEFINITION and (blobs.known is not None or blobs.definition is not None):
            continue
        if b == SD_DATA and blobs.known_data is not None:
            continue
        result = sd_view_blob(doms.segment, slot, view, b, &stored)
        if result != SD_OK:
            return result
        if later and b == SD_DEFINITION and not has_place(doms.decoded, slot) and (
                me().records == NULL or held_pointer(doms, slot, 0) == NULL):
            blobs.later = stored
            continue
        blob = copy_stored(&stored)
        if b == SD_DEFINITION:
            blobs.definition = copied = blob
        elif b == SD_NEXT_DEFINITION:
            blobs.next_definition = blob
        elif b == SD_DATA:
            blobs.data = blob
        else:
            blobs.work = blob
    result = sd_view_blobs_check(doms.segment, slot, view)
    if result == SD_OK and later and copied is not None:
        cache(doms.decoded, SD_DEFINITION, slot, view.life, version, copied)
    return result


cdef DomainInfo read_by_key(Segment doms, const sd_key *key, int wants, uint64_t deadline):
    """The committed state of a domain, or None. An index that is in the middle of a change, maybe
    of somebody who was stopped, or that is damaged, is passed by. Raises `Busy` at the deadline."""
    cdef uint32_t slot
    cdef int result
    cdef unsigned tries = 0
    cdef DomainInfo info
    while True:
        result = sd_find(doms.segment, key, &slot)
        if result == SD_DOUBT and tries > PATIENT_READS or result == SD_CORRUPT:
            result = sd_scan(doms.segment, key, &slot)
        if result == SD_MISS:
            return None
        if result == SD_OK:
            info = read_slot(doms, slot, key, wants, deadline)
            if info is not None:
                return info
        elif result != SD_DOUBT:
            raise_code(result, "peek")
        tries += 1
        if tries > PATIENT_READS:
            wake_recovery(doms)
        if tries > PATIENT_READS + 1:
            back_off(deadline)


cdef int read_either(Segment doms, sd_key *key) noexcept:
    """Whether a domain has the uuid of this key, or its name: as sd_find. An index that is damaged
    is made anew. List lock held."""
    cdef int result = find_either(doms, key)
    if result == SD_CORRUPT and sd_mend(doms.segment, SD_UUID_INDEX) == SD_OK:
        result = find_either(doms, key)
    return result


cdef int find_either(Segment doms, sd_key *key) noexcept:
    cdef uint32_t slot
    cdef int result
    key.what = SD_UUID_INDEX
    result = sd_find(doms.segment, key, &slot)
    if result != SD_MISS:
        return result
    key.what = SD_NAME_INDEX
    return sd_find(doms.segment, key, &slot)


cdef object read_name(Segment doms, uint32_t slot):
    """The name of the domain in a slot. None: none lives there, or it is damaged."""
    cdef sd_view view
    cdef int result
    while True:
        result = sd_view_begin(doms.segment, slot, &view)
        if result != SD_DOUBT:
            return name_object(view.name) if result == SD_OK else None


cdef int wake_recovery(Segment doms) except -1:
    """An index that stays odd may have a dead holder: take its lock, which repairs it, if that
    takes no waiting. If a repair failed before nobody will do it, and the records are read."""
    cdef sd_segment *segment = doms.segment
    if sd_load(&segment.header.poisoned):
        return 0
    if segment.list_nonce == me().nonce:
        return 0
    if sd_ids_lock(segment, SD_TRY) == SD_OK:
        sd_ids_unlock(segment)
    if not sd_load(&segment.header.list_seq) & 1:
        return 0
    if not doms.multiprocessing:
        if sd_list_lock(segment, SD_TRY) == SD_OK:
            sd_list_unlock(segment)
    elif doms.list_lock is not None:
        try:
            acquire_list(doms, SD_TRY, 0)
        except errors.LockTimeout:
            return 0
        release_list(doms)
    return 0


cdef struct listing_filter:
    int active, persistent, autostart  # -1: either
    unsigned states  # a bit each; ALL_STATES: any, known or not


cdef bint matches(int32_t id, uint8_t marks, uint16_t state, const listing_filter *filter) noexcept:
    """libvirt's virDomainObjMatchFilter."""
    if filter.active >= 0 and (id != -1) != filter.active:
        return False
    if filter.persistent >= 0 and (marks & MARK_PERSISTENT != 0) != filter.persistent:
        return False
    if filter.autostart >= 0 and (marks & MARK_AUTOSTART != 0) != filter.autostart:
        return False
    # C numbers only: a Python number may find no memory, and that would read as False.
    if filter.states == ALL_STATES:
        return True
    return state < 32 and (filter.states >> state & <unsigned>1) != 0


cdef bint view_matches(const sd_view *view, const listing_filter *filter) noexcept:
    return matches(view.values.id, marks_of(view.values.flags), view.values.state, filter)


cdef bint may_match(Segment doms, uint32_t slot, const listing_filter *filter) noexcept:
    """Whether it is worth a copy. What cannot be read yet, or is damaged, is."""
    cdef sd_view view
    cdef int result = sd_view_fields(doms.segment, slot, &view)
    return result == SD_DOUBT or result == SD_CORRUPT or (
        result == SD_OK and view_matches(&view, filter))


cdef bint filters(const listing_filter *filter) noexcept:
    """Whether it leaves anything out."""
    return ((filter.active & filter.persistent & filter.autostart) >= 0
            or filter.states != ALL_STATES)


cdef tuple list_marked(Segment doms):
    """Infos without definitions, a mark of each, and how many domains are damaged. A mark is
    another one whenever anything but the data and the jobs of a domain is, its first 24 bytes
    whenever the definition may be; it costs no copy. Its next 8 are when the process started."""
    cdef uint32_t slot
    cdef uint64_t mark[7]
    cdef int result
    cdef unsigned tries, damaged = 0
    cdef sd_view view
    cdef list infos = [], marks = []
    cdef uint64_t deadline = sd_now() + SECOND
    need_open(doms)
    for slot in range(slot_count(doms)):
        tries = 0
        result = sd_view_begin(doms.segment, slot, &view)
        while result == SD_DOUBT:
            tries += 1
            if tries > PATIENT_READS:
                back_off(deadline)
            result = sd_view_begin(doms.segment, slot, &view)
        if result == SD_OK and view.name[0]:
            infos.append(fill_info(DomainInfo.__new__(DomainInfo), &view))
            mark[0], mark[1], mark[2] = slot, view.life, view.values.version[SD_DEFINITION]
            mark[3], mark[4] = view.values.started, view.values.flags
            mark[5] = <uint64_t><uint32_t>view.values.id << 32 | <uint32_t>view.values.pid
            mark[6] = view.values.state
            marks.append(PyBytes_FromStringAndSize(<const char *>mark, sizeof(mark)))
        elif result != SD_MISS:
            damaged += 1
    return infos, marks, damaged


cdef uint64_t count_domains(Segment doms, const listing_filter *filter) except? 0:
    cdef uint32_t slot
    cdef uint64_t total = 0
    cdef sd_view view
    cdef int result
    need_open(doms)
    for slot in range(slot_count(doms)):
        result = sd_view_fields(doms.segment, slot, &view)
        while result == SD_DOUBT:
            result = sd_view_fields(doms.segment, slot, &view)
        if result == SD_CORRUPT:
            raise_code(result, "count")
        if result == SD_OK and view_matches(&view, filter):
            total += 1
    return total


cdef dict read_statistics(Segment doms):
    cdef sd_header *header
    cdef unsigned i
    need_open(doms)
    header = doms.segment.header
    attached = [sd_load(&doms.segment.attached[i]) for i in range(SD_ATTACHED_MAX)
                if sd_load(&doms.segment.attached[i])]
    return {
        "domains": sd_load(&header.live),
        "active": sd_load(&header.active),
        "max_domains": doms.segment.at.max_slots,
        "slots": sd_slot_count(doms.segment),
        "bytes_max": doms.segment.at.total_bytes,
        "events": doms.segment.at.events,
        "bytes_committed": sd_committed_bytes(doms.segment),
        "heap_max": doms.segment.at.heap_cells * SD_CELL,
        "heap_used": sd_load(&header.heap_used) * SD_CELL,
        "creator": (sd_who_tid(header.creator_pid), sd_who_start(header.creator_who)),
        "created": header.created / 1e9,
        "poisoned": why_poisoned(doms),
        "attached": [(sd_who_tid(word), sd_who_start(word)) for word in attached],
    }
