"""The store in shared memory: segments and their files, who holds what, and the native core.

This folder imports the vocabulary and, once they stand in `rules`, the rules; never what shows or
drives a list. It promises that the death of any process at any instruction loses nothing that was
committed, and blocks nobody for good where locks are robust.
"""
