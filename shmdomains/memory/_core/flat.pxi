# The data's values, to MessagePack and back.
#
# Flat ones are encoded and decoded here, in one pass over a buffer on the stack: numbers, strings,
# and maps of them, as most data is: {"vnc": 5901, "requests": 7}. Larger and deeper ones of the
# usual types are msgspec's (`packed`). Whatever else there is, and all errors, are left to
# `values.encode_data` and `decode_data`. All ways give the same bytes and values.

from cpython.bytearray cimport (PyByteArray_AS_STRING, PyByteArray_FromStringAndSize,
                                PyByteArray_GET_SIZE)
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_Next, PyDict_SetItem
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    FLAT_MAX = SMALL_MAX  # bytes
    FLAT_PAIRS = 60  # each takes two bytes at least
    FLAT_ROOM = SMALL_MAX + 16  # so that what is too long is seen once it is written
    PLAIN_DEPTH = 50
    BUFFER_BYTES = 4096
    BUFFER_KEPT = 65536


cdef list SPARE_BUFFERS = []  # of `packed`: never more than there were calls at once


cdef bytes packed(object value):
    """`packing.pack`, without a frame of Python's: what is encoded most are values of 2 KB."""
    cdef bytearray buffer
    cdef bytes made
    if SPARE_BUFFERS:
        buffer = SPARE_BUFFERS.pop()
    else:
        buffer = PyByteArray_FromStringAndSize(NULL, BUFFER_BYTES)
    ENCODE_INTO(value, buffer)
    made = PyBytes_FromStringAndSize(PyByteArray_AS_STRING(buffer), PyByteArray_GET_SIZE(buffer))
    if PyByteArray_GET_SIZE(buffer) <= BUFFER_KEPT:
        SPARE_BUFFERS.append(buffer)
    return made


cdef object UNDECODED = object()  # a change of the data that nobody has read yet


cdef bytes encode_flat(object value):
    """The value's bytes. None: it is not flat, or not small, or an error."""
    cdef unsigned char buffer[FLAT_ROOM]
    cdef unsigned char *at = buffer
    cdef const unsigned char *end = buffer + FLAT_ROOM
    cdef PyObject *key
    cdef PyObject *one
    cdef Py_ssize_t place = 0
    if type(value) is not dict:
        at = put_flat(at, end, value)
    elif len(<dict>value) > FLAT_PAIRS:
        return None
    else:
        at = sd_pack_map(at, <uint32_t>len(<dict>value))
        while at != NULL and PyDict_Next(value, &place, &key, &one):
            if type(<object>key) is not str:
                return None
            at = put_flat(at, end, <object>key)
            if at != NULL:
                at = put_flat(at, end, <object>one)
    if at == NULL or at - buffer > FLAT_MAX:
        return None
    return PyBytes_FromStringAndSize(<char *>buffer, at - buffer)


cdef bint is_plain(object value, int depth) except -1:
    """Whether msgspec encodes it to the bytes that msgpack does, which can be decoded: exact types,
    keys that are strings, not deep."""
    cdef PyObject *key
    cdef PyObject *one
    cdef Py_ssize_t place = 0
    cdef int beyond = 0
    if value is None or type(value) in (str, bytes, float, bool):
        return True
    if type(value) is int:
        PyLong_AsLongLongAndOverflow(value, &beyond)
        return not beyond
    if not depth:
        return False
    if type(value) is list:
        for item in <list>value:
            if not is_plain(item, depth - 1):
                return False
        return True
    if type(value) is tuple:
        for item in <tuple>value:
            if not is_plain(item, depth - 1):
                return False
        return True
    if type(value) is not dict:
        return False
    while PyDict_Next(value, &place, &key, &one):
        if type(<object>key) is not str or not is_plain(<object>one, depth - 1):
            return False
    return True


cdef unsigned char *put_flat(unsigned char *at, const unsigned char *end, object value) noexcept:
    """Write one that holds no other. NULL: not this one, or not before `end`."""
    cdef Py_ssize_t size = 0
    cdef int beyond = 0
    cdef long long number
    if end - at < 9:
        return NULL
    if type(value) is int:
        number = PyLong_AsLongLongAndOverflow(value, &beyond)
        return NULL if beyond else sd_pack_int(at, number)
    if type(value) is str:
        if not PyUnicode_IS_COMPACT_ASCII(value):
            return NULL
        size = len(<str>value)
        if end - at < size + 5:
            return NULL
        return sd_pack_str(at, PyUnicode_1BYTE_DATA(value), <uint32_t>size)
    if type(value) is float:
        return sd_pack_float(at, <double>value)
    if value is None or value is True or value is False:
        at[0] = 0xc0 if value is None else 0xc3 if value is True else 0xc2
        return at + 1
    return NULL


cdef object decode_flat(const unsigned char *at, uint64_t size):
    """The value of these bytes, read-only. UNDECODED: it is not flat."""
    cdef const unsigned char *end = at + size
    cdef sd_token token
    cdef uint64_t pairs
    cdef dict found
    at = sd_pack_next(at, end, &token)
    if at == NULL:
        return UNDECODED
    if token.kind != SD_PACK_MAP:
        return taken(&token) if at == end else UNDECODED
    found = {}
    pairs = token.size
    while pairs:
        pairs -= 1
        at = sd_pack_next(at, end, &token)
        if at == NULL or token.kind != SD_PACK_STR:
            return UNDECODED
        key = taken(&token)
        at = sd_pack_next(at, end, &token)
        if at == NULL:
            return UNDECODED
        one = taken(&token)
        if one is UNDECODED:
            return UNDECODED
        PyDict_SetItem(found, key, one)
    return PyDictProxy_New(found) if at == end else UNDECODED


cdef object taken(const sd_token *token):
    """The value of a token that holds no other; else UNDECODED."""
    if token.kind == SD_PACK_STR:
        return PyUnicode_DecodeUTF8(<const char *>token.bytes, <Py_ssize_t>token.size, NULL)
    if token.kind == SD_PACK_INT:
        return token.number
    if token.kind == SD_PACK_UNSIGNED:
        return <uint64_t>token.number
    if token.kind == SD_PACK_FLOAT:
        return token.real
    if token.kind == SD_PACK_NIL:
        return None
    if token.kind == SD_PACK_TRUE or token.kind == SD_PACK_FALSE:
        return token.kind == SD_PACK_TRUE
    if token.kind == SD_PACK_BIN:
        return PyBytes_FromStringAndSize(<const char *>token.bytes, <Py_ssize_t>token.size)
    return UNDECODED
