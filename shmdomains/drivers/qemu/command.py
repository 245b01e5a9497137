"""From a definition to QEMU's command line (libvirt's qemuBuildCommandLine).

`command` is a pure function of the definition and the `Place` where the guest's sockets are: it
starts nothing and looks for no file, so what a definition gets can be read and tested without QEMU.
Whatever it does not know is refused (`accepted`). It needs QEMU 6.2 or newer, which takes devices
as JSON: no value can then be taken for another option.

The guest is made stopped (``-S``), so that its record can be committed before it runs, and stays
when it has powered off (``-no-shutdown``), so that whoever looks later sees how it ended.
"""

from __future__ import annotations

from uuid import UUID

from ...xml import document
from ...xml.definition import DomainDef
from ...xml.document import Element
from .accepted import check, machine_of
from .devices import Devices
from .disks import Disks
from .words import Place, comma, number_of, there

_ON = {"yes": "on", "no": "off", "on": "on", "off": "off"}


def command(definition: DomainDef, uuid: UUID, place: Place) -> list[str]:
    """The command line, its program first.

    Raises `DefinitionError`, naming element and line, for what the driver does not know.
    """
    root, _ = document.parse(definition.to_xml())
    check(root)
    return _Builder(definition, root, uuid, place).build()


def program(definition: DomainDef) -> str:
    """The emulator: the definition's, or the one of its architecture on the ``PATH``."""
    return definition.emulator or f"qemu-system-{_qemu_arch(definition)}"


def _qemu_arch(definition: DomainDef) -> str:
    return "i386" if definition.os.arch == "i686" else "x86_64"


class _Builder(Disks, Devices):
    """The machine, and the parts in QEMU's order."""

    def build(self) -> list[str]:
        self._check_os()
        self._say("-name", f"guest={comma(self._def.name)},debug-threads=on")
        self._say("-uuid", str(self._uuid))
        self._say("-S", "-no-shutdown", "-no-user-config", "-nodefaults", "-daemonize")
        self._say("-pidfile", self._place.pidfile)
        self._say("-display", "none")
        self._machine_and_cpu()
        self._say("-m", f"size={self._def.memory}k")
        self._vcpus()
        self._clock()
        self._power()
        self._monitors()
        self._boot()
        for element in self._devices("controller"):
            self._controller(element)
        self._disks()
        self._lines()
        self._graphics_and_video()
        self._small_devices()
        return [program(self._def), *self._words]

    # --- the machine ----------------------------------------------------------------------

    def _check_os(self) -> None:
        if self._def.os.type != "hvm":
            kind = self._root.find("os/type")
            raise document.refusal("the QEMU driver knows os type 'hvm' only", there(kind))

    def _machine_and_cpu(self) -> None:
        features, kvm = self._root.find("features"), self._place.kvm and self._def.type == "kvm"
        options = [machine_of(there(self._root.find("os/type"))), "usb=off"]
        if features is None or features.find("acpi") is None:
            options.append("acpi=off")  # as libvirt: what the definition does not have is not there
        vmport = None if features is None else features.find("vmport")
        if vmport is not None:
            options.append(f"vmport={vmport.get('state') or 'on'}")
        hpet = self._timer("hpet")
        if hpet is not None and hpet.get("present"):
            options.append(f"hpet={_ON[hpet.get('present', '')]}")
        self._say("-machine", ",".join(options), "-accel", "kvm" if kvm else "tcg")
        self._cpu(kvm)

    def _cpu(self, kvm: bool) -> None:
        cpu = self._root.find("cpu")
        if cpu is None:
            return
        mode = cpu.get("mode") or "custom"
        named = cpu.find("model")
        model = "" if named is None else document.text_of(named).strip()
        if mode != "custom":
            if model:
                raise document.refusal("a model is for mode 'custom'", there(named))
            model = "host" if kvm and mode != "maximum" else "max"
        words = [comma(model)]
        for feature in cpu.iterfind("feature"):
            name, policy = feature.get("name"), feature.get("policy") or "require"
            if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise document.refusal("a feature has a name", feature)
            words.append(f"{name}={'on' if policy in ('force', 'require') else 'off'}")
        if not model:
            if len(words) > 1:
                raise document.refusal("features need a model", cpu)
            return
        self._say("-cpu", ",".join(words))

    def _vcpus(self) -> None:
        words = f"cpus={self._def.current_vcpus},maxcpus={self._def.vcpus}"
        if not self._def.current_vcpus:
            raise document.refusal("a guest needs a vCPU", self._element("vcpu"))
        topology = self._root.find("cpu/topology")
        if topology is not None:
            product = 1
            for name in ("sockets", "dies", "cores", "threads"):
                count = number_of(topology, name, 1)
                product *= count
                words += f",{name}={count}"
            if product != self._def.vcpus:
                text = f"CPU topology has {product} vCPUs, the maximum is {self._def.vcpus}"
                raise document.refusal(text, topology)
        self._say("-smp", words)

    def _timer(self, name: str) -> Element | None:
        return self._root.find(f"clock/timer[@name='{name}']")

    def _clock(self) -> None:
        clock = self._root.find("clock")
        base = "utc" if clock is None else clock.get("offset") or "utc"
        words = f"base={base}"
        for timer in self._root.iterfind("clock/timer"):
            name, policy = timer.get("name"), timer.get("tickpolicy")
            if name != "hpet" and timer.get("present") == "no":
                raise document.refusal(f"timer '{name}' cannot be left out", timer)
            if name == "rtc" and policy == "catchup":
                words += ",driftfix=slew"
            elif name == "pit" and policy in ("delay", "discard"):
                if self._place.kvm and self._def.type == "kvm":  # QEMU's own pit has no policy
                    self._say("-global", f"kvm-pit.lost_tick_policy={policy}")
            elif policy is not None and (name, policy) not in (("rtc", "delay"), ("hpet", "delay")):
                text = f"the QEMU driver does not know tickpolicy '{policy}' of timer '{name}'"
                raise document.refusal(text, timer)
        self._say("-rtc", words)

    def _power(self) -> None:
        chip = "ICH9-LPC" if self._q35 else "PIIX4_PM"
        for tag, name in (("suspend-to-mem", "disable_s3"), ("suspend-to-disk", "disable_s4")):
            element = self._root.find(f"pm/{tag}")
            if element is not None and element.get("enabled"):
                self._say("-global", f"{chip}.{name}={int(element.get('enabled') == 'no')}")
        if self._def.on_reboot == "destroy":
            self._say("-action", "reboot=shutdown")
        if self._def.on_reboot in ("preserve", "rename-restart"):
            text = f"the QEMU driver does not know on_reboot '{self._def.on_reboot}'"
            raise document.refusal(text, self._element("on_reboot"))
        self._say("-action", "panic=pause")

    def _monitors(self) -> None:
        for name, path in (("monitor", self._place.monitor), ("events", self._place.events)):
            self._socket(name, path)
            self._say("-mon", f"chardev={name},mode=control")

    def _boot(self) -> None:
        os = self._element("os")
        devices = [str(one.get("dev")) for one in os.iterfind("boot")]
        self._first_of_class = {name: place for place, name in reversed([*enumerate(devices, 1)])}
        words = ["strict=on"]
        menu = os.find("bootmenu")
        if menu is not None and menu.get("enable"):
            words.append(f"menu={_ON[menu.get('enable', '')]}")
            if menu.get("timeout"):
                words.append(f"splash-time={number_of(menu, 'timeout', 0)}")
        self._say("-boot", ",".join(words))
        for tag, option in (("kernel", "-kernel"), ("initrd", "-initrd"), ("cmdline", "-append")):
            element = os.find(tag)
            if element is not None and document.text_of(element):
                self._say(option, document.text_of(element))

    def _controller(self, element: Element) -> None:
        kind, model = element.get("type"), element.get("model")
        if kind == "scsi" and model not in (None, "virtio-scsi"):
            text = f"the QEMU driver does not know SCSI controller '{model}'; it knows virtio-scsi"
            raise document.refusal(text, element)
        if (
            kind == "usb"
            and model == "none"
            and self._root.find("devices/input[@bus='usb']") is not None
        ):
            raise document.refusal("a USB device needs a USB controller", element)
