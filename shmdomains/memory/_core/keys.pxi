# Keys: what a caller names a domain by, a uuid, a name or an id, and how the segment spells it.
#
# Whatever is no uuid, or of the wrong type, raises; a well-typed name or id that no domain can
# have is simply not found. Nothing here takes a lock.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint64_t
from libc.string cimport memcmp, memcpy


cdef object ID_MAX = 0x7fffffff  # an object: it is compared with objects

cdef enum:
    UUID_DIGITS = 32  # a shorter string is no uuid in any form


cdef Py_ssize_t uuid_words(object value, uint64_t *words) except -1:
    """A uuid, in any form that callers may use, as the segment holds it. Raises as
    names.parse_uuid does."""
    cdef bytes raw
    if type(value) is str and canonical_uuid(value, <unsigned char *>words):
        return 0
    if type(value) is bytes and PyBytes_GET_SIZE(value) == 16:
        raw = value
    elif isinstance(value, UUID):
        # As `value.bytes`, which takes as long as the find itself. A number that is too large for a
        # UUID overflows the upper half, so only that one is checked.
        number = value.int
        words[0] = htobe64(PyLong_AsUnsignedLongLong(number >> 64))
        words[1] = htobe64(PyLong_AsUnsignedLongLongMask(number))
        return 0
    else:
        raw = PARSE_UUID(value).bytes
    memcpy(words, PyBytes_AS_STRING(raw), 16)
    return 0


cdef inline int hex_digit(unsigned char letter) noexcept:
    if c'0' <= letter <= c'9':
        return letter - c'0'
    letter |= 0x20
    return letter - c'a' + 10 if c'a' <= letter <= c'f' else -1


cdef bint canonical_uuid(str text, unsigned char *to) noexcept:
    """Read the usual spelling, 8-4-4-4-12. False: names.parse_uuid has to look at it."""
    cdef const unsigned char *at
    cdef int i, high, low
    if not PyUnicode_IS_COMPACT_ASCII(text) or len(text) != 36:
        return False
    at = <const unsigned char *>PyUnicode_1BYTE_DATA(text)
    for i in range(16):
        if i in (4, 6, 8, 10):
            if at[0] != c'-':
                return False
            at += 1
        high, low = hex_digit(at[0]), hex_digit(at[1])
        if high < 0 or low < 0:
            return False
        to[i] = <unsigned char>(high << 4 | low)
        at += 2
    return True


cdef object uuid_object(const uint64_t *words):
    """A `uuid.UUID`, past its `__init__`, which checks six alternatives for a microsecond."""
    cdef object uuid = UUID.__new__(UUID)
    PyObject_GenericSetAttr(uuid, "int", int.from_bytes((<const char *>words)[:16], "big"))
    PyObject_GenericSetAttr(uuid, "is_safe", SAFE_UNKNOWN)
    return uuid


cdef object name_object(const unsigned char *name):
    return PyUnicode_DecodeUTF8(<const char *>name + 1, name[0], "replace")


cdef bint set_name(unsigned char *to, object name) except -1:
    """A name as the segment holds it: its length, then UTF-8. False: no domain can have it."""
    cdef Py_ssize_t size
    cdef const char *text
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    try:
        text = PyUnicode_AsUTF8AndSize(name, &size)
    except UnicodeEncodeError:
        return False
    if size < 1 or size > SD_NAME_MAX:
        return False
    to[0] = <unsigned char>size
    memcpy(to + 1, text, size)
    return True


cdef bint make_key(sd_key *key, object any, object uuid, object name, object id) except -1:
    """The one key that is given, `any` by position. False: no domain can have it."""
    if (any is not None) + (uuid is not None) + (name is not None) + (id is not None) != 1:
        raise TypeError(
            "give exactly one key: uuid=, name= or id=, or one by position: an int is an id, a "
            "UUID or a string in its form a uuid, any other string a name")
    if any is not None:
        return make_any_key(key, any)
    if uuid is not None:
        key.what = SD_UUID_INDEX
        uuid_words(uuid, key.uuid)
        return True
    if name is not None:
        key.what = SD_NAME_INDEX
        return set_name(key.name, name)
    if not isinstance(id, int):
        raise TypeError(f"an id is an int, not {type(id).__name__}")
    key.what = SD_ID_INDEX
    if id < 0 or id > ID_MAX:
        return False
    key.id = id
    return True


cdef bint make_any_key(sd_key *key, object any) except -1:
    """A key by position: values.key_of, whose usual cases are here without a detour."""
    if type(any) is str:
        if canonical_uuid(any, <unsigned char *>key.uuid):
            key.what = SD_UUID_INDEX
            return True
        if len(any) < UUID_DIGITS:
            key.what = SD_NAME_INDEX
            return set_name(key.name, any)
    elif type(any) is UUID or type(any) is bytes and PyBytes_GET_SIZE(any) == 16:
        key.what = SD_UUID_INDEX
        uuid_words(any, key.uuid)
        return True
    found = KEY_OF(any)
    return make_key(key, None, found.get("uuid"), found.get("name"), found.get("id"))


cdef object not_found(const sd_key *key, object any, object uuid, object name, object id):
    """The error for what has no such key, in libvirt's words."""
    if any is None:
        return NOT_FOUND(uuid, name, id)
    if key.what == SD_UUID_INDEX:
        return NOT_FOUND(uuid_object(key.uuid), None, None)
    return NOT_FOUND(None, any, None) if key.what == SD_NAME_INDEX else NOT_FOUND(None, None, any)


cdef bint has_key(const sd_view *view, const sd_key *key) noexcept:
    """Whether what a view shows is the domain of this key."""
    if key.what == SD_UUID_INDEX:
        return view.uuid[0] == key.uuid[0] and view.uuid[1] == key.uuid[1]
    if key.what == SD_NAME_INDEX:
        return view.name[0] == key.name[0] and not memcmp(view.name + 1, key.name + 1, key.name[0])
    return view.values.id == key.id
