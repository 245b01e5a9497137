# Counting: a number in the data goes up without the data becoming Python objects and back.
#
# The data is a map, and the number one of its values. The bytes before and after it are copied as
# they are (pack.c); the change waits for the commit like any other. What is damaged is refused, for
# it would get a checksum that fits.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef enum:
    COUNTED_ROOM = 512  # bytes on the stack; what may be longer gets memory
    EMPTY_MAP = 0x80


cdef object add_to_data(Record record, object field, object by):
    """Add, and return the sum. Domain lock."""
    cdef unsigned char room[COUNTED_ROOM]
    cdef unsigned char *to = room
    cdef uint64_t words[SMALL_WORDS]
    cdef const unsigned char *at = <const unsigned char *>words
    cdef const char *key
    cdef Py_ssize_t key_size
    cdef uint64_t size
    cdef sd_token sum
    cdef int beyond = 0, result
    cdef int64_t step
    cdef Record mine
    mine = need_changeable(record)
    if type(field) is not str or type(by) is not int:
        return add_as_values(record, field, by)
    key = PyUnicode_AsUTF8AndSize(field, &key_size)
    step = PyLong_AsLongLongAndOverflow(by, &beyond)
    if beyond:
        return add_as_values(record, field, by)
    mine = need_room(record)
    base = packed_data(mine, words, &size)
    if base is not None:
        at = <const unsigned char *>PyBytes_AS_STRING(base)
    if size + key_size + SD_PACK_ROOM > COUNTED_ROOM:
        longer = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size + key_size + SD_PACK_ROOM)
        to = <unsigned char *>PyBytes_AS_STRING(longer)
    result = sd_pack_add(at, size, key, <uint32_t>key_size, step, to, &size, &sum)
    if result != SD_OK:
        return add_as_values(record, field, by)
    set_blob(mine, SD_DATA, UNDECODED, PyBytes_FromStringAndSize(<char *>to, <Py_ssize_t>size))
    return sum.number if sum.kind == SD_PACK_INT else <uint64_t>sum.number


cdef bytes packed_data(Record mine, uint64_t *words, uint64_t *size):
    """The bytes of the data with the holder's change, an empty map if there is none; or None: they
    are in `words`."""
    cdef sd_stored stored
    cdef uint64_t version = mine.values.version[SD_DATA]
    cdef bytes packed = None
    if is_pending(mine, SD_DATA):
        packed = mine.changes[BLOBS + SD_DATA]
        if packed is not None:
            size[0] = <uint64_t>PyBytes_GET_SIZE(packed)
            return packed
    if is_pending(mine, SD_DATA) or not mine.values.flags & SD_FLAG_PRESENT(SD_DATA):
        words[0], size[0] = EMPTY_MAP, 1
        return None
    if sd_blob_get(mine.segment.segment, mine.slot, &mine.values, SD_DATA, &stored) != SD_OK:
        raise_code(SD_CORRUPT, "add to the data")
    size[0] = stored.bytes - 8
    if stored.bytes > 8 * SMALL_WORDS:
        packed = unsealed_blob(SD_DATA, copy_stored(&stored), mine.uuid_raw, version)
        if packed is None:
            raise_damaged(SD_DATA, "its checksum does not fit")
        return packed
    sd_copy_out(words, stored.at + 1, size[0])
    if sd_load(stored.at) != sd_blob_sum(mine.uuid_raw, SD_DATA, version, words, size[0]):
        raise_damaged(SD_DATA, "its checksum does not fit")
    return None


cdef object add_as_values(Record record, object field, object by):
    """The same by `values.added`, which also has the words for what is no integer."""
    data, sum = ADD_TO(read_data(need_locked(record)), field, by)
    assign_data(record, data)
    return sum


cdef object add_by_key(Segment doms, const sd_key *key, object field, object by,
                       uint64_t deadline, object timeout):
    """Find, lock, add, commit, unlock; the sum. None: there is no such domain."""
    cdef Record record = find_record(doms, key, deadline, timeout)
    if record is None:
        return None
    try:
        sum = add_to_data(record, field, by)
        commit_changes(need_changeable(record), deadline)
    finally:
        if locked_or_none(record) is not None:
            end_hold(record, False)  # a death is left for a holder who is told
    return sum
