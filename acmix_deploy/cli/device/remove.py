"""Forget a device, and remove what lies there if that is asked for.

example:
  acmix-deploy device remove bench-1 --files
"""

from __future__ import annotations

import argparse

from acmix_deploy.cli.common import print_step, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of a device that was added")
    parser.add_argument(
        "--files", action="store_true", help="also remove from it what was installed, sent and built there"
    )


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.device import registry
    from acmix_deploy.device.session import DeviceSession
    from acmix_deploy.report.show_device import show_devices

    if options.files:
        known = next((device for device in registry.devices() if device.name == options.name), None)
        if known:
            with DeviceSession(known, progress=print_step) as session:
                session.remove_files()
    registry.remove(options.name)
    show(options, registry.DevicesDocument(devices=registry.devices()), show_devices)
    return 0
