"""List the devices that have a name.

example:
  acmix-deploy device list
"""

from __future__ import annotations

import argparse

from acmix_deploy.cli.common import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.device.registry import DevicesDocument, devices
    from acmix_deploy.report.show_device import show_devices

    show(options, DevicesDocument(devices=devices()), show_devices)
    return 0
