"""Real guests: a QEMU per domain (extra ``qemu``: ``pip install 'shmdomains[qemu]'``).

- `accepted`: what a definition may say, and what of it has no effect.
- `command`: from a definition to a command line.
- `process`: a guest's process: started so that it outlives its worker, found again, ended.
- `monitor`: what is said to QEMU (QMP).
- `driver`: `QemuDriver`, the hooks of `Driver`.
"""

import importlib.util

# A package named `qemu` may be another one, without `qmp`.
if importlib.util.find_spec("qemu") is None or importlib.util.find_spec("qemu.qmp") is None:
    raise ImportError("QemuDriver needs qemu.qmp: pip install 'shmdomains[qemu]'")

from .driver import QemuDriver

__all__ = ["QemuDriver"]
