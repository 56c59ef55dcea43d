"""What a device is, has and lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, computed_field

from acmix_deploy.device.registry import Device
from acmix_deploy.device.session import CLOCK_S, DeviceSession
from acmix_deploy.doctor.diagnosis import Component
from acmix_deploy.document import Document
from acmix_deploy.errors import MissingComponent


class DeviceDocument(Document):
    """Result of ``acmix-deploy device add`` and ``device check``."""

    document: Literal["device"] = "device"
    device: Device = Field(description="its name, host and folder, as they are kept here")
    folder: str = Field(description="absolute path of the package's folder there")
    components: tuple[Component, ...] = Field(description="what it is, has and lacks")

    @computed_field(description="whether verbs run there")  # type: ignore[prop-decorator]
    @property
    def ready(self) -> bool:
        return any(component.name == PACKAGE and component.state == "ok" for component in self.components)


PACKAGE = "acmix-deploy there"


def look(session: DeviceSession) -> DeviceDocument:
    """Raises what :meth:`DeviceSession.run` raises."""
    return DeviceDocument(device=session.device, folder=session.facts.folder, components=tuple(components(session)))


def components(session: DeviceSession) -> Iterator[Component]:
    """What stands before anything that runs on a device."""
    facts = session.facts
    used = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in facts.used.items() if size)
    yield Component(
        name="device",
        state="ok",
        found=f"{session.device.host}, {facts.folder}, {facts.free / 1e9:.1f} GB free{', used: ' * bool(used)}{used}",
    )
    if facts.jetson:
        yield Component(name="board", state="ok", found=", ".join(filter(None, (facts.jetson, facts.release))))
    if abs(session.clock_s) > CLOCK_S:
        yield Component(
            name="clock",
            state="fault",
            found=session.clock,
            advice="Set it: sudo timedatectl set-ntp true. Certificates are not valid at a wrong time.",
        )
    python = f"Python {facts.python}, {facts.machine}, {facts.libc}"
    try:
        session.need_package()
    except MissingComponent as error:
        yield Component(name=PACKAGE, state="missing", found=f"{error.message}; {python}", advice=error.hint)
    else:
        assert facts.installed
        yield Component(name=PACKAGE, state="ok", found=f"{facts.installed.version}, {python}")
    machine = session.machine if facts.installed and session.runs_package else None
    if machine:
        yield Component(name="TensorRT there", state="ok", found=f"{machine.tensorrt}, {machine.device}")
    elif facts.tensorrt:
        yield Component(name="TensorRT there", state="ok", found=f"{facts.tensorrt}, its library")
    else:
        yield Component(name="TensorRT there", state="missing", found="none; no engine can be built there")
