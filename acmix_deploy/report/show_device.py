"""Devices, for a person."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from acmix_deploy.device.check import DeviceDocument
from acmix_deploy.device.registry import DevicesDocument
from acmix_deploy.report.show_doctor import component_rows
from acmix_deploy.report.tables import table


def show_device(found: DeviceDocument, console: Console) -> None:
    """Print what a device is, has and lacks."""
    console.print(Text(found.device.name, style="bold"), component_rows(found.components))
    if found.ready:
        console.print(f"\nVerbs run there: acmix-deploy profile MODEL --on {found.device.name}")


def show_devices(found: DevicesDocument, console: Console) -> None:
    """Print the devices that have a name."""
    if not found.devices:
        console.print("No device has a name. Add one: acmix-deploy device add NAME HOST")
        return
    rows = table("name", "host", "folder")
    for device in found.devices:
        rows.add_row(device.name, device.host, device.folder)
    console.print(rows)
