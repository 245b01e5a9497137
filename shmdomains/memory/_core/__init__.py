"""The native core: C11 behind one thin Cython binding. Start with layout.h."""
