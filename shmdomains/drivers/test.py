"""`TestDriver`: libvirt's ``test:///default``, in which a domain is all that there is of a guest.

For trying things out, and for tests of what stands on a driver: every operation does to the record
what it would do for a real guest, at once. A guest that is asked to shut down does.
"""

from __future__ import annotations

from typing import ClassVar

from .base import Driver


class TestDriver(Driver):
    """A driver whose guests are nothing but records.

    >>> from shmdomains import DomainList
    >>> driver = TestDriver(DomainList())
    >>> info = driver.define("<domain type='test'><name>web1</name><memory>1024</memory>"
    ...                      "<os><type>hvm</type></os></domain>")
    >>> driver.start("web1").state.words, driver.shutdown("web1").state.words
    ('running', 'shut off')
    """

    __test__ = False  # pytest would take it for tests
    name: ClassVar[str] = "test"
