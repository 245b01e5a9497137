"""The store in shared memory: segments and their files, who holds what, and the native core.

This folder imports the vocabulary, `config` and `rules`, never `cli` or `stress`. It promises that
the death of any process at any instruction loses no committed change and, with robust locks, blocks
nobody for good.
"""
