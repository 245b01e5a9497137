"""Memory, vCPUs, title, description: of the guest that runs (live) and of the next one (config).

An active domain has two definitions. What is changed live only is gone when the guest stops, and
what is changed in the config only begins with its next start. With neither word the definition
counts that is in use: live for an active domain, config for an inactive one, as in libvirt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import (
    DefinitionError,
    DomainActive,
    DomainDef,
    DomainInactive,
    DomainInfo,
    DomainTransient,
)
from .guests import Guests
from .words import INVALID_ARGUMENT, as_kind


class Changes(Guests):
    """The operations that change a definition."""

    def set_memory(
        self, key: Any, kib: int, live: bool | None = None, config: bool | None = None
    ) -> DomainInfo:
        """Give the guest so much of its memory, in KiB (virDomainSetMemoryFlags)."""
        if kib <= 0:
            raise as_kind("", DefinitionError("memory in virDomainSetMemoryFlags must not be zero"))

        def check(definition: DomainDef) -> None:
            if kib > definition.memory:
                raise as_kind(
                    INVALID_ARGUMENT, DefinitionError("cannot set memory higher than max memory")
                )

        return self._change(
            key,
            "set_memory",
            live,
            config,
            check,
            lambda definition: definition.replace(current_memory=kib),
            lambda info: self.set_guest_memory(info, kib),
        )

    def set_max_memory(
        self, key: Any, kib: int, live: bool | None = None, config: bool | None = None
    ) -> DomainInfo:
        """Set how much memory the next guest has, in KiB (virDomainSetMaxMemory)."""
        if kib <= 0:
            raise as_kind("", DefinitionError("memory in virDomainSetMemoryFlags must not be zero"))

        def refuse(info: DomainInfo) -> None:
            raise DomainActive("cannot resize the maximum memory on an active domain")

        return self._change(
            key,
            "set_max_memory",
            live,
            config,
            _anything,
            lambda definition: definition.replace(memory=kib),
            refuse,
        )

    def set_vcpus(
        self,
        key: Any,
        count: int,
        live: bool | None = None,
        config: bool | None = None,
        maximum: bool = False,
    ) -> DomainInfo:
        """Give the guest so many of its processors, or with `maximum` set how many the next one has
        (virDomainSetVcpusFlags)."""
        if count <= 0:
            raise as_kind(INVALID_ARGUMENT, DefinitionError("a guest has at least one processor"))

        def check(definition: DomainDef) -> None:
            if not maximum and count > definition.vcpus:
                text = f"requested cpu amount exceeds maximum ({count} > {definition.vcpus})"
                raise as_kind(INVALID_ARGUMENT, DefinitionError(text))

        def change(definition: DomainDef) -> DomainDef:
            if not maximum:
                return definition.replace(current_vcpus=count)
            current = min(definition.current_vcpus, count)
            return definition.replace(vcpus=count, current_vcpus=current)

        def of_guest(info: DomainInfo) -> None:
            if maximum:
                raise DomainActive("maximum vcpu count of a live domain can't be modified")
            self.set_guest_vcpus(info, count)

        return self._change(key, "set_vcpus", live, config, check, change, of_guest)

    def set_title(
        self, key: Any, text: str, live: bool | None = None, config: bool | None = None
    ) -> DomainInfo:
        """Set the title, of one line; an empty one is none (virDomainSetMetadata)."""
        return self._change(
            key,
            "set_title",
            live,
            config,
            _anything,
            lambda definition: definition.replace(title=text or None),
            _anything,
        )

    def set_description(
        self, key: Any, text: str, live: bool | None = None, config: bool | None = None
    ) -> DomainInfo:
        """Set the description; an empty one is none (virDomainSetMetadata)."""
        return self._change(
            key,
            "set_description",
            live,
            config,
            _anything,
            lambda definition: definition.replace(description=text or None),
            _anything,
        )

    def _change(
        self,
        key: Any,
        operation: str,
        live: bool | None,
        config: bool | None,
        check: Callable[[DomainDef], None],
        change: Callable[[DomainDef], DomainDef],
        of_guest: Callable[[DomainInfo], None],
    ) -> DomainInfo:
        """Check each definition that is meant, then change the guest, then both in one commit."""
        with self._job(key, operation) as dom:
            info = self.doms[dom]
            live, config = _affected(info, live, config)
            stored = info.next_definition or info.definition
            if live:
                check(info.definition)
            if config:
                check(stored)
            if live:
                of_guest(info)
            with self._running(dom, info):
                stored = dom.next_definition or dom.definition
                if live:
                    dom.definition = change(dom.definition)
                if info.is_active and info.persistent:
                    dom.next_definition = change(stored) if config else stored
                elif config:
                    dom.definition = change(stored)
                if config:
                    self.doms.save_config(dom, timeout=self.timeout)
            return self.doms[dom]


def _anything(_: object) -> None:
    """Nothing is refused, and nothing has to be done."""


def _affected(info: DomainInfo, live: bool | None, config: bool | None) -> tuple[bool, bool]:
    """Which of the two is meant (virDomainObjUpdateModificationImpact)."""
    if not live and not config:
        live, config = info.is_active, not info.is_active
    if live and not info.is_active:
        raise DomainInactive("domain is not running")
    if config and not info.persistent:
        raise DomainTransient("transient domains do not have any persistent config")
    return bool(live), bool(config)
