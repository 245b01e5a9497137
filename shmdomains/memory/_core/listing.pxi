# Listing: all domains, or those that a filter takes, as a sequence of infos or as columns.
#
# What is listed is copied out of the segment as numbers and bytes, 40 of them and the name a
# domain. `Infos` makes a `DomainInfo` when somebody looks at one; columns are never objects. As in
# any read without a lock, each record is one moment's, the whole is not.

cimport cython
from cpython.bytearray cimport (PyByteArray_AS_STRING, PyByteArray_FromStringAndSize,
                                PyByteArray_Resize)
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    AHEAD = 6  # slots whose lines are fetched before they are read
    NAME_GUESS = 24  # bytes, of which room for names is made at first


cdef struct info_row:
    uint64_t uuid[2]
    uint64_t name_at
    int32_t number, process
    uint16_t state, reason
    uint8_t marks, damage, name_size


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Infos:
    """What `DomainList.list` and `snapshot` return: a sequence of `DomainInfo`s, each made when it
    is looked at. It does not change. Equal to a list of equal infos; a pickle is one."""
    cdef info_row *rows
    cdef uint64_t length, room
    cdef unsigned char *names
    cdef uint64_t names_used, names_room
    cdef list blobs  # `Blobs` of each, or None: taken with definitions=False

    def __init__(self):
        raise TypeError("a listing comes from a DomainList: list(), snapshot()")

    def __dealloc__(self):
        PyMem_Free(self.rows)
        PyMem_Free(self.names)

    def __len__(self):
        return self.length

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [info_at(self, place) for place in range(*at.indices(self.length))]
        place = PyNumber_Index(at)
        if place < 0:
            place += self.length
        if not 0 <= place < self.length:
            raise IndexError(f"there are {self.length} domains in this listing")
        return info_at(self, place)

    def __iter__(self):
        cdef InfosIterator iterator = InfosIterator.__new__(InfosIterator)
        iterator.infos = self
        return iterator

    def __contains__(self, value):
        return any(value == info for info in self)

    def __reversed__(self):
        return reversed(list(self))

    def index(self, *arguments):
        return list(self).index(*arguments)

    def count(self, value):
        return list(self).count(value)

    def copy(self):
        return list(self)

    def __add__(self, other):
        return list(self) + list(other)

    def __radd__(self, other):
        return list(other) + list(self)

    def __eq__(self, other):
        if not isinstance(other, (Infos, list)):
            return NotImplemented
        return len(other) == len(self) and list(self) == list(other)

    __hash__ = None

    def __reduce__(self):
        return list, (list(self),)

    def __repr__(self):
        return repr(list(self))


@cython.final
cdef class InfosIterator:
    cdef Infos infos
    cdef uint64_t next

    def __iter__(self):
        return self

    def __next__(self):
        if self.next == self.infos.length:
            raise StopIteration
        self.next += 1
        return info_at(self.infos, self.next - 1)


cdef DomainInfo info_at(Infos infos, uint64_t place):
    cdef const info_row *row = &infos.rows[place]
    cdef DomainInfo info = DomainInfo.__new__(DomainInfo)
    if infos.blobs is not None:
        info.blobs = infos.blobs[place]
    info.uuid_raw[0], info.uuid_raw[1] = row.uuid[0], row.uuid[1]
    info.number, info.process = row.number, row.process
    info.state_number, info.reason_number = row.state, row.reason
    info.marks, info.damage = row.marks, row.damage
    info.name_text = PyUnicode_DecodeUTF8(<const char *>infos.names + row.name_at, row.name_size,
                                          "replace")
    return info


cdef Infos list_infos(Segment doms, const listing_filter *filter, bint definitions):
    cdef uint32_t slot, slots
    cdef sd_view view
    cdef int damage
    cdef Blobs blobs = None
    cdef Infos infos = Infos.__new__(Infos)
    cdef uint64_t deadline = sd_now() + SECOND
    cdef bint filtered = filters(filter)
    need_open(doms)
    slots = slot_count(doms)
    if definitions:
        infos.blobs = []
    for slot in range(slots):
        if slot + AHEAD < slots:
            sd_view_prefetch(doms.segment, slot + AHEAD)
        if filtered and not may_match(doms, slot, filter):
            continue
        if definitions:
            blobs = Blobs.__new__(Blobs)
        if settle_view(doms, slot, NULL, blobs, False, deadline, &view, &damage):
            continue
        if damage == FIELDS or view_matches(&view, filter):
            add_row(infos, &view, damage, slots - slot)
            if definitions:
                infos.blobs.append(blobs)
    return infos


cdef int add_row(Infos infos, const sd_view *view, int damage, uint64_t most) except -1:
    """One more; there may be `most`."""
    cdef info_row *row
    cdef uint64_t size = view.name[0]
    if infos.length == infos.room:
        infos.room += most
        infos.rows = <info_row *>grown(infos.rows, infos.room * sizeof(info_row))
    if infos.names_used + size > infos.names_room:
        infos.names_room += most * NAME_GUESS + size
        infos.names = <unsigned char *>grown(infos.names, infos.names_room)
    row = &infos.rows[infos.length]
    row.uuid[0], row.uuid[1] = view.uuid[0], view.uuid[1]
    row.number, row.process = view.values.id, view.values.pid
    row.state, row.reason = view.values.state, view.values.reason
    row.marks, row.damage = marks_of(view.values.flags), <uint8_t>damage
    row.name_at, row.name_size = infos.names_used, <uint8_t>size
    memcpy(infos.names + infos.names_used, view.name + 1, size)
    infos.names_used += size
    infos.length += 1
    return 0


cdef void *grown(void *room, uint64_t bytes) except NULL:
    cdef void *larger = PyMem_Realloc(room, bytes)
    if larger == NULL:
        raise MemoryError
    return larger


# --- by columns ---

cdef enum:
    COLUMN_ID, COLUMN_PID, COLUMN_STATE, COLUMN_REASON
    COLUMN_PERSISTENT, COLUMN_AUTOSTART, COLUMN_ACTIVE, COLUMN_UUID
    COLUMN_NAME_ENDS
    COLUMNS

cdef int COLUMN_BYTES[COLUMNS]
COLUMN_BYTES[:] = [4, 4, 4, 4, 1, 1, 1, 16, 4]

cdef tuple COLUMN_NAMES = ("id", "pid", "state", "reason", "persistent", "autostart", "active",
                           "uuid", "name")


cdef tuple list_columns(Segment doms, const listing_filter *filter, tuple names):
    """(number of rows, name of a column -> its bytes, the UTF-8 of all names). The column of names
    says where each ends."""
    cdef unsigned char *to[COLUMNS]
    cdef list columns = [None] * COLUMNS
    cdef uint32_t slot, slots
    cdef uint64_t rows = 0, used = 0, room = 0
    cdef int column
    cdef sd_view view
    cdef bytearray texts = bytearray()
    cdef uint64_t deadline = sd_now() + SECOND
    need_open(doms)
    slots = slot_count(doms)
    for column in range(COLUMNS):
        to[column] = NULL
        if COLUMN_NAMES[column] in names:
            columns[column] = PyByteArray_FromStringAndSize(NULL, slots * COLUMN_BYTES[column])
            to[column] = <unsigned char *>PyByteArray_AS_STRING(columns[column])
    for slot in range(slots):
        if slot + AHEAD < slots:
            sd_view_prefetch(doms.segment, slot + AHEAD)
        if settle_column(doms, slot, to[COLUMN_NAME_ENDS] != NULL, deadline, &view):
            continue
        if not view_matches(&view, filter):
            continue
        if to[COLUMN_NAME_ENDS] != NULL:
            if used + view.name[0] > room:
                room += <uint64_t>(slots - slot) * NAME_GUESS + view.name[0]
                if room > INT32_MAX:
                    raise OverflowError("the names of this table have more than 2 GiB")
                PyByteArray_Resize(texts, room)
            memcpy(PyByteArray_AS_STRING(texts) + used, view.name + 1, view.name[0])
            used += view.name[0]
        for column in range(COLUMNS):
            if to[column] != NULL:
                put_cell(to[column], column, rows, &view, used)
        rows += 1
    for column in range(COLUMNS):
        if to[column] != NULL:
            PyByteArray_Resize(columns[column], rows * COLUMN_BYTES[column])
    PyByteArray_Resize(texts, used)
    return rows, {name: columns[COLUMN_NAMES.index(name)] for name in names}, texts


cdef int settle_column(Segment doms, uint32_t slot, bint named, uint64_t deadline,
                       sd_view *view) except -1:
    """One moment of a record. SD_OK or SD_MISS; raises if it is damaged."""
    cdef int result = SD_DOUBT
    cdef unsigned tries = 0
    while True:
        result = (sd_view_begin(doms.segment, slot, view) if named
                  else sd_view_fields(doms.segment, slot, view))
        if result == SD_MISS:
            return SD_MISS
        if result == SD_CORRUPT or result == SD_OK and named and not view.name[0]:
            return raise_code(SD_CORRUPT, "table")
        if result == SD_OK:
            return SD_OK
        tries += 1
        if tries > PATIENT_READS:
            back_off(deadline)


cdef inline void put_cell(unsigned char *to, int column, uint64_t row, const sd_view *view,
                          uint64_t name_end) noexcept:
    cdef int32_t number
    if column == COLUMN_UUID:
        memcpy(to + 16 * row, view.uuid, 16)
        return
    if column == COLUMN_PERSISTENT:
        to[row] = view.values.flags & SD_FLAG_PERSISTENT != 0
        return
    if column == COLUMN_AUTOSTART:
        to[row] = view.values.flags & SD_FLAG_AUTOSTART != 0
        return
    if column == COLUMN_ACTIVE:
        to[row] = view.values.id != -1
        return
    if column == COLUMN_ID:
        number = view.values.id
    elif column == COLUMN_PID:
        number = view.values.pid
    elif column == COLUMN_STATE:
        number = view.values.state
    elif column == COLUMN_REASON:
        number = view.values.reason
    else:
        number = <int32_t>name_end
    memcpy(to + 4 * row, &number, 4)
