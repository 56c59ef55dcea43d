"""Names of devices, kept for the user in ``~/.config/acmix-deploy/devices.json``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.document import Document, parse_document, read_json, write_document
from acmix_deploy.errors import UserError, did_you_mean

FOLDER = "acmix-deploy"
"""Of this package on a device, where none is named."""
HOSTS = "Give user@host, a name of ~/.ssh/config or one of: acmix-deploy device list"


class Device(BaseModel):
    """Where a device is."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="what it is called here")
    host: str = Field(description="destination as ssh takes it")
    folder: str = Field(default=FOLDER, description="of this package there, beneath the home where it is relative")


class DevicesDocument(Document):
    """Result of ``acmix-deploy device list``, and what is kept."""

    document: Literal["device list"] = "device list"
    devices: tuple[Device, ...] = Field(default=(), description="by name")


def devices() -> tuple[Device, ...]:
    """Those that have a name. Raises UserError: the file cannot be read."""
    path = _path()
    return parse_document(DevicesDocument, read_json(path), path).devices if path.exists() else ()


def named(name: str) -> Device:
    """The device of a name or, where no device has it, the host that ssh knows by it.

    Raises:
        UserError: it is no destination for ssh.
    """
    if not name or name.startswith("-") or any(character.isspace() for character in name):
        raise UserError(f"{name!r} is no host", HOSTS)
    return next((device for device in devices() if device.name == name), Device(name=name, host=name))


def add(device: Device) -> None:
    """Keep a device, in the place of one of the same name."""
    _keep(*(known for known in devices() if known.name != device.name), device)


def remove(name: str) -> Device:
    """Forget a device. Raises UserError: none has that name."""
    found = {device.name: device for device in devices()}
    if name not in found:
        raise UserError(
            f"no device is called {name}", did_you_mean(name, found) or "List those that are: acmix-deploy device list"
        )
    _keep(*(device for device in found.values() if device.name != name))
    return found[name]


def _keep(*kept: Device) -> None:
    write_document(DevicesDocument(devices=tuple(sorted(kept, key=lambda device: device.name))), _path())


def _path() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base, "acmix-deploy", "devices.json")
