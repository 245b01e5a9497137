/* bare.c - a list and a domain that do nothing, for the statements of a find: what the interpreter
 * itself takes for `with doms.get(uuid=uuid) as dom: state = dom.state`, whoever is asked. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyObject *get(PyObject *self, PyObject *const *values, Py_ssize_t count, PyObject *names)
{
    (void)values, (void)count, (void)names;
    Py_INCREF(self);
    return self;
}

static PyObject *enter(PyObject *self, PyObject *unused)
{
    (void)unused;
    Py_INCREF(self);
    return self;
}

static PyObject *leave(PyObject *self, PyObject *const *values, Py_ssize_t count)
{
    (void)self, (void)values, (void)count;
    Py_RETURN_NONE;
}

static PyObject *state(PyObject *self, void *unused)
{
    (void)self, (void)unused;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"get", (PyCFunction)(void (*)(void))get, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"__enter__", enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))leave, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef attributes[] = {{"state", state, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot slots[] = {{Py_tp_methods, methods}, {Py_tp_getset, attributes}, {0, NULL}};
static PyType_Spec type = {"bare.Bare", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT, slots};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "bare", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_bare(void)
{
    PyObject *made = PyModule_Create(&module), *bare = PyType_FromSpec(&type);
    if (made && bare && PyModule_AddObject(made, "Bare", bare) == 0) return made;
    Py_XDECREF(bare);
    Py_XDECREF(made);
    return NULL;
}
