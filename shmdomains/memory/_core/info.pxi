# Infos: what was committed of a domain, copied out of the segment and checked.
#
# `DomainInfo` is what is read without a lock, `Blobs` the large part of it, `Decoded` the cache of
# definitions and of data. Every blob carries a checksum over its bytes, its domain's uuid, its kind
# and its version, and is checked before it is decoded. What is damaged raises `SegmentCorrupt`; it
# is never handed out.

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from shmdomains import errors

cdef enum:
    CACHE_SIZE = 4096  # a power of two
    CACHED_MAX = 4096  # bytes of data that is remembered decoded
    IDENTITY = 1       # the name is damaged
    FIELDS = 2         # state, id and the other values are
    MARK_PERSISTENT = 1
    MARK_AUTOSTART = 2

cdef object BLOB_NAMES = ("definition", "next definition", "data", "work under way")


cdef object state_of(uint16_t state):
    if state >= len(STATES):
        raise errors.SegmentCorrupt(f"a domain has the unknown state {state}")
    return STATES[state]


cdef object reason_of(uint16_t state, uint16_t reason):
    if state >= len(REASONS):
        raise errors.SegmentCorrupt(f"a domain has the unknown state {state}")
    return REASONS[state].get(reason, reason)


cdef bytes unsealed_blob(int which, bytes blob, const uint64_t *uuid, uint64_t version):
    """The blob behind its checksum. None if that does not fit: the blob is damaged, or belongs to
    another domain, kind or version."""
    cdef const char *raw = PyBytes_AS_STRING(blob)
    cdef uint64_t written, size = <uint64_t>PyBytes_GET_SIZE(blob) - 8
    memcpy(&written, raw, 8)
    if written != sd_blob_sum(uuid, which, version, raw + 8, size):
        return None
    return PyBytes_FromStringAndSize(raw + 8, <Py_ssize_t>size)


cdef object decode(int which, bytes blob, const uint64_t *uuid, uint64_t version):
    """The value of a blob. We encoded it, so one that does not decode was damaged."""
    cdef object reason = "it is missing"
    if blob is not None:
        reason = "its checksum does not fit"
        blob = unsealed_blob(which, blob, uuid, version)
    if blob is not None:
        try:
            return DECODE[which](blob)
        except (ValueError, TypeError, OverflowError) as exc:
            reason = exc
    raise_damaged(which, reason)


cdef int raise_damaged(int which, object reason) except -1:
    raise errors.SegmentCorrupt(
        f"the {BLOB_NAMES[which]} of a domain is damaged: {reason}") from None


cdef bytes copy_stored(const sd_stored *stored):
    """A blob and the checksum before it."""
    cdef bytes blob
    sd_prefetch_read(stored.at, stored.bytes)
    blob = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>stored.bytes)
    sd_copy_out(PyBytes_AS_STRING(blob), stored.at, stored.bytes)
    return blob


cdef object decode_stored(int which, const sd_stored *stored, const uint64_t *uuid,
                          uint64_t version):
    """The value of a blob that nobody changes meanwhile."""
    cdef uint64_t copy[SMALL_WORDS]
    if which != SD_DATA or stored.bytes > sizeof(copy):
        return decode(which, copy_stored(stored), uuid, version)
    sd_copy_out(copy, stored.at, stored.bytes)
    return decode_small(copy, stored.bytes, uuid, version)


cdef object decode_small(const uint64_t *copy, uint64_t size, const uint64_t *uuid,
                         uint64_t version):
    """The value of data of at most SD_SMALL_MAX bytes, behind its checksum."""
    if copy[0] == sd_blob_sum(uuid, SD_DATA, version, copy + 1, size - 8):
        try:
            value = decode_flat(<const unsigned char *>(copy + 1), size - 8)
        except UnicodeDecodeError:
            value = UNDECODED
        if value is not UNDECODED:
            return value
    return decode(SD_DATA, PyBytes_FromStringAndSize(<const char *>copy, <Py_ssize_t>size), uuid,
                  version)


cdef struct cache_key:
    uint64_t life, version
    uint32_t slot


@cython.final
@cython.no_gc
cdef class Decoded:
    """The cache of decoded definitions and data, one place of each for each of CACHE_SIZE slots: a
    committed version is decoded once while it stays here. In place of a definition there may be its
    bytes behind their checksum, once somebody peeked at it.

    A list and its infos share the cache, and it leads to neither: what is in it are immutable
    values. So no cycle runs through a `DomainInfo`, and the collector need not visit them, which it
    would do several times for each of 100,000 listed ones. It keeps the mapping for them.
    """
    cdef sd_segment *segment
    cdef cache_key *keys
    cdef list values

    def __cinit__(self):
        self.segment = NULL
        self.values = [None] * (2 * CACHE_SIZE)
        self.keys = <cache_key *>PyMem_Calloc(2 * CACHE_SIZE, sizeof(cache_key))
        if self.keys == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self.keys)
        if self.segment != NULL:
            sd_unmap(self.segment)


cdef inline uint32_t cache_place(int which, uint32_t slot) noexcept:
    return (slot & (CACHE_SIZE - 1)) + (CACHE_SIZE if which == SD_DATA else 0)


cdef object cached(Decoded decoded, int which, uint32_t slot, uint64_t life, uint64_t version):
    """The value of this version of a definition or of data, or None."""
    cdef uint32_t at = cache_place(which, slot)
    cdef const cache_key *key = &decoded.keys[at]
    if key.slot == slot and key.life == life and key.version == version:
        return decoded.values[at]
    return None


cdef bint has_place(Decoded decoded, uint32_t slot) noexcept:
    """Whether no other domain has the definition's place: in a list of up to CACHE_SIZE domains
    none ever has."""
    cdef const cache_key *key = &decoded.keys[cache_place(SD_DEFINITION, slot)]
    return key.slot == slot or not key.version


cdef void cache(Decoded decoded, int which, uint32_t slot, uint64_t life, uint64_t version,
                object value) noexcept:
    cdef uint32_t at = cache_place(which, slot)
    cdef object _old = decoded.values[at]  # freed last: that may run anything
    decoded.values[at] = value
    decoded.keys[at] = cache_key(life, version, slot)


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
@cython.freelist(8)
cdef class Blobs:
    """The definitions and data of a `DomainInfo`: copied with it, decoded when first asked for.

    The definition of one that was peeked at is copied once, and its bytes stand in the cache until
    somebody decodes them. Where another domain has that place, so that the list is larger than the
    cache, it is copied when it is asked for: until then `later` is where it lies. Its checksum
    covers its version, so what is copied is of that moment, or does not pass.

    Filled before the `DomainInfo` is handed out, unless the record is damaged. One that is not
    filled has no cache, so neither this nor a `DomainInfo` can be made from a pickle.
    """
    cdef Decoded decoded
    cdef uint32_t slot
    cdef uint64_t life
    cdef uint64_t uuid_raw[2]
    cdef uint64_t version[BLOBS]
    cdef sd_stored later
    cdef object known       # the definition, once it is decoded
    cdef object known_data  # the data, if it is
    cdef bytes definition, next_definition, data, work


cdef object live_definition(Blobs blobs):
    cdef uint64_t version = blobs.version[SD_DEFINITION]
    if blobs.known is None:
        found = cached(blobs.decoded, SD_DEFINITION, blobs.slot, blobs.life, version)
        keep_definition(blobs, found)
    if blobs.known is None:
        if blobs.definition is None and blobs.later.bytes:
            blobs.definition = definition_of_then(blobs)
        blobs.known = decode(SD_DEFINITION, blobs.definition, blobs.uuid_raw, version)
        cache(blobs.decoded, SD_DEFINITION, blobs.slot, blobs.life, version, blobs.known)
    return blobs.known


cdef inline void keep_definition(Blobs blobs, object found) noexcept:
    """What the cache has of it, if anything: decoded, or its bytes."""
    if type(found) is bytes:
        blobs.definition = found
    else:
        blobs.known = found


cdef bytes definition_of_then(Blobs blobs):
    """What lies where the definition lay, and raise `Busy` if that is another one's by now."""
    cdef sd_view view
    cdef int result = SD_DOUBT
    cdef uint64_t version = blobs.version[SD_DEFINITION]
    cdef bytes blob = copy_stored(&blobs.later)
    if unsealed_blob(SD_DEFINITION, blob, blobs.uuid_raw, version) is not None:
        return blob
    while result == SD_DOUBT:
        result = sd_view_begin(blobs.decoded.segment, blobs.slot, &view)
    if (result == SD_OK and view.life == blobs.life
            and view.values.version[SD_DEFINITION] == version):
        return blob  # still current, so it is damaged
    raise errors.Busy(
        f"the definition of domain {uuid_object(blobs.uuid_raw)} was replaced after this "
        "DomainInfo was taken, before its definition was asked for; peek again, or take both at "
        "once: peek(..., definitions=True)")


cdef object data_of(Blobs blobs):
    cdef uint64_t version = blobs.version[SD_DATA]
    if blobs.known_data is None and blobs.data is not None:
        blobs.known_data = decode(SD_DATA, blobs.data, blobs.uuid_raw, version)
        if PyBytes_GET_SIZE(blobs.data) <= CACHED_MAX:
            cache(blobs.decoded, SD_DATA, blobs.slot, blobs.life, version, blobs.known_data)
    return blobs.known_data


cdef object decode_or_none(Blobs blobs, int which, bytes blob):
    if blob is None:
        return None
    return decode(which, blob, blobs.uuid_raw, blobs.version[which])


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
@cython.freelist(8)
cdef class DomainInfo:
    """One domain as it was committed at one moment. Immutable; reading it takes no lock.

    Comes from `DomainList.peek`, `snapshot`, `list` and iteration. Each is consistent in itself;
    the set that a snapshot gives is not one moment's. Equal to another one of the same content;
    a pickle carries the content, as `shmdomains.rules.info.DomainInfo`.
    """
    # One cache line, for somebody may list a million of them.
    cdef Blobs blobs    # None: taken with definitions=False
    cdef object name_text
    cdef uint64_t uuid_raw[2]
    cdef int32_t number, process  # id and pid
    cdef uint16_t state_number, reason_number
    cdef uint8_t marks
    cdef uint8_t damage  # 0, or what is damaged, IDENTITY or FIELDS, and not handed out

    def __init__(self):
        raise TypeError("DomainInfos come from a DomainList: peek(), list(), snapshot()")

    @property
    def id(self):
        """The id of the running domain, -1 when it is inactive."""
        need_sound(self)
        return self.number

    @property
    def name(self):
        """The domain's name."""
        need_sound(self)
        return self.name_text

    @property
    def uuid(self):
        """The domain's UUID (`uuid.UUID`)."""
        need_sound(self)
        return uuid_object(self.uuid_raw)

    @property
    def state(self):
        """The `DomainState`."""
        need_sound(self)
        return state_of(self.state_number)

    @property
    def reason(self):
        """Why it is in this state: a member of the state's reason enumeration."""
        need_sound(self)
        return reason_of(self.state_number, self.reason_number)

    @property
    def persistent(self):
        """Whether the domain outlives its deactivation."""
        need_sound(self)
        return self.marks & MARK_PERSISTENT != 0

    @property
    def autostart(self):
        """Whether the domain is to be started with the host."""
        need_sound(self)
        return self.marks & MARK_AUTOSTART != 0

    @property
    def is_active(self):
        """Whether it runs (``id != -1``; libvirt's virDomainObjIsActive)."""
        need_sound(self)
        return self.number != -1

    @property
    def pid(self):
        """Process id of the hypervisor, or None."""
        need_sound(self)
        return None if self.process == -1 else self.process

    @property
    def host(self):
        """This host: a segment is one machine's."""
        return HOLDERS.this_host()

    @property
    def definition(self):
        """The live definition (`DomainDef`), decoded when first asked for.

        Of an info that was peeked at in a list of more than 4,096 domains it is read only then,
        too. If it was replaced meanwhile that raises `Busy`: see `DomainList.peek`."""
        return live_definition(blobs_of(self))

    @property
    def next_definition(self):
        """What becomes the definition once the domain is inactive (libvirt's newDef), or None."""
        cdef Blobs blobs = blobs_of(self)
        return decode_or_none(blobs, SD_NEXT_DEFINITION, blobs.next_definition)

    @property
    def data(self):
        """The driver's own data, or None."""
        return data_of(blobs_of(self))

    @property
    def _work(self):
        """What is under way (`rules.work.Work`), or None."""
        cdef Blobs blobs = blobs_of(self)
        return decode_or_none(blobs, SD_WORK, blobs.work)

    @property
    def jobs(self):
        """The jobs on the domain (`JobInfo`): one async job and one other at most. Whether their
        holders live is looked up now."""
        return INFO.jobs_of(self._work, HOLDERS.describe)

    def to_dict(self):
        """What ``json.dumps`` takes: words for state and reason, `id` None for an inactive one,
        definitions as XML, if the info was taken with them."""
        return INFO.to_dict(self)

    def __eq__(self, other):
        return INFO.equal(self, other)

    def __hash__(self):
        return INFO.hash_of(self)

    def __reduce__(self):
        return INFO.reduced(self)

    def __repr__(self):
        return "<DomainInfo damaged>" if self.damage else INFO.shown(self)


cdef int need_sound(DomainInfo info, int allowed=0) except -1:
    if info.damage > allowed:
        raise_code(SD_CORRUPT, "a domain")
    return 0


cdef Blobs blobs_of(DomainInfo info):
    need_sound(info, IDENTITY)  # a damaged name says nothing of blobs, which have checksums
    if info.blobs is None:
        raise AttributeError(INFO.TAKEN_WITHOUT)
    return info.blobs


cdef inline uint8_t marks_of(uint64_t flags) noexcept:
    return ((flags & SD_FLAG_PERSISTENT != 0) * MARK_PERSISTENT
            | (flags & SD_FLAG_AUTOSTART != 0) * MARK_AUTOSTART)


cdef DomainInfo fill_info(DomainInfo info, const sd_view *view):
    info.uuid_raw[0], info.uuid_raw[1] = view.uuid[0], view.uuid[1]
    info.number, info.process = view.values.id, view.values.pid
    info.state_number, info.reason_number = view.values.state, view.values.reason
    info.marks = marks_of(view.values.flags)
    info.name_text = name_object(view.name)
    return info
