"""The segment's protocol as models that a machine walks through: see `explorer`.

One module a subject: `heap`, `free_slots` (the garbage in them), `sums` (checksums and seals),
`index`, `ids`, `slots` (a slot's lock), `growth`, `unlock_for` (another thread's list). Each begins
with what it claims, offers `MODELS` (which hold) and `CONTROLS` (one rule dropped in each; all must
break); `subject` is what they share. Not modelled: weak memory (the core needs compiler order),
`lock="multiprocessing"`, time.

When the protocol is to change, change the model first.
"""
