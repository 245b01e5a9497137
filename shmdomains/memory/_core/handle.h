/*
 * Handles that are kept for reuse. A handle lives as long as a find; to make and free it as Python
 * does (`__new__`, a subclass's deallocation, the collector's allocator) took a ninth of a find's
 * instructions, so up to 128 dead handles are kept: many that are locked at once have them, too.
 *
 * One type has spares: the first one given to `keep_spares`, the Domain that lists hand out. A
 * handle is kept only if nothing can tell that it had a life before: no weak reference, no
 * `__del__`, and `vacates` says that it leads nowhere. Where that is not sure (a build without the
 * GIL, Py_TRACE_REFS, AddressSanitizer, a type of another shape) there are no spares, and Python's
 * own way is taken. The GIL is held throughout.
 */
#ifndef SHMDOMAINS_HANDLE_H
#define SHMDOMAINS_HANDLE_H

#include <Python.h>

#include "layout.h"

_Static_assert(SD_BLOBS == 4 && SD_SMALL_WORDS == 16 && SD_SMALL_MAX == 120, "numbers of core.pyx");

#define SPARES 128
static PyTypeObject *spared;       /* a heap type; it and its spares stay for good */
static int (*vacate_handle)(PyObject *);  /* make it lead nowhere; false: it may not be kept */
static PyObject *spares[SPARES];
static int spare_count;

static inline PyObject *new_handle(PyObject *type, PyObject *no_arguments)
{
    if ((PyTypeObject *)type != spared || !spare_count)
        return ((PyTypeObject *)type)->tp_new((PyTypeObject *)type, no_arguments, NULL);
    PyObject *handle = spares[--spare_count];
    _Py_NewReference(handle);
    PyObject_GC_Track(handle);
    return handle;
}

static inline void free_handle(PyObject *handle)
{
    PyTypeObject *type = Py_TYPE(handle);
    if (type == spared) {
        /* A finalizer runs once in a life, which a new life would not undo. */
        PyObject *weak = *(PyObject **)((char *)handle + type->tp_weaklistoffset);
        if (!type->tp_finalize && !weak && !PyObject_GC_IsFinalized(handle)) {
            PyObject_GC_UnTrack(handle);
            Py_SET_REFCNT(handle, 1); /* as Cython does for what runs in a deallocation */
            int keeps = vacate_handle(handle);
            Py_SET_REFCNT(handle, 0);
            if (keeps && spare_count < SPARES) {
                spares[spare_count++] = handle;
                return;
            }
        } else if (type->tp_finalize) {
            if (PyObject_CallFinalizerFromDealloc(handle) < 0) return;
            type = Py_TYPE(handle); /* the finalizer may have assigned another */
        }
    }
    /* A subclass's own deallocation, which calls this one, leaves its type to the base. */
    spared->tp_base->tp_dealloc(handle);
    Py_DECREF(type);
}

static inline void keep_spares(PyObject *type, void *vacates)
{
#if !defined(Py_GIL_DISABLED) && !defined(Py_TRACE_REFS) && !defined(__SANITIZE_ADDRESS__)
    PyTypeObject *made = (PyTypeObject *)type;
    if (spared || !PyType_HasFeature(made, Py_TPFLAGS_HEAPTYPE) || made->tp_dictoffset
        || PyType_HasFeature(made->tp_base, Py_TPFLAGS_HEAPTYPE) /* drops the type itself */
        || made->tp_basicsize != made->tp_base->tp_basicsize || !made->tp_weaklistoffset)
        return;
    vacate_handle = (int (*)(PyObject *))vacates;
    spared = (PyTypeObject *)Py_NewRef(type);
    spared->tp_dealloc = free_handle;
#else
    (void)type, (void)vacates;
#endif
}

#endif
