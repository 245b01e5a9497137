"""Run virtual machines: libvirt's operations over a list of domains, for any hypervisor.

- `hooks`: what a hypervisor's driver fills in.
- `guests`: a guest's begin and end, and what is done about a worker that died in between.
- `changes`: memory, vCPUs, title: of the guest that runs, and of the next one.
- `base`: `Driver`, libvirt's operations.
- `test`: `TestDriver`, which has no guests at all.

- `supervision`: guests that do something by themselves, and the worker that watches them.
- `qemu`: `QemuDriver`, a real machine for each domain.

All but `qemu` stand on the public names of `shmdomains` only, as a driver of your own does: they
are the example to copy. `qemu` is part of the package, and shares its parsers and its words.
"""

from .base import Driver
from .guests import Reconciled
from .hooks import Launched, Orphan
from .test import TestDriver

__all__ = ["Driver", "Launched", "Orphan", "Reconciled", "TestDriver"]
