"""`shmdomains stress`: workers that use one list hard and are killed, and the proof that it held.

`storm` is the run, `worker` what it starts, `journal` what workers write down, `proof` what is
compared at the end, `view` what is shown. This folder uses the package as its users do; only `cli`
imports it. It promises to change nothing that it is given and to leave nothing behind.
"""
