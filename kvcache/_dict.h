/* dict.get that never borrows: without a GIL another thread may let go of the value at any time. */
#ifndef KVCACHE_DICT_H
#define KVCACHE_DICT_H

#include <Python.h>

/* The value, or None where there is none; NULL, with an error, where the key's __hash__ or __eq__ raises. */
static inline PyObject *kv_find_in(PyObject *dict, PyObject *key)
{
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *value;
    if (PyDict_GetItemRef(dict, key, &value) < 0)
        return NULL;
#else
    PyObject *value = PyDict_GetItemWithError(dict, key);
    if (!value && PyErr_Occurred())
        return NULL;
    Py_XINCREF(value);
#endif
    return value ? value : Py_NewRef(Py_None);
}

#endif
