"""The store on PostgreSQL: the same list for the processes of more than one host.

This folder imports the vocabulary, `rules`, and of `memory` what says who a process is.
"""
