"""Run virtual machines: libvirt's operations over a list of domains, for any hypervisor.

- `hooks`: what a hypervisor's driver fills in.
- `guests`: a guest's begin and end, and what is done about a worker that died in between.
- `changes`: memory, vCPUs, title: of the guest that runs, and of the next one.
- `base`: `Driver`, libvirt's operations.
- `test`: `TestDriver`, which has no guests at all.

It stands on the public names of `shmdomains` only, as a driver of your own does.
"""

from .base import Driver
from .guests import Reconciled
from .hooks import Launched, Orphan
from .test import TestDriver

__all__ = ["Driver", "Launched", "Orphan", "Reconciled", "TestDriver"]
