"""To look instead of read: what a list does now, and who held what when.

- `picture`: one look at a list, as values.
- `screen`: such looks, one after the other, on a terminal (extra ``top``).
- `guests`: what the guests' processes use; the metrics ask it, too.
- `trace`: looks at a high rate, as a file for Perfetto.

Nothing here takes a lock of a list or of a domain, so it shows also what is stuck.
"""
