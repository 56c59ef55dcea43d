"""Say what a device is, has and lacks, and whether verbs run there.

example:
  acmix-deploy device check bench-1
"""

from __future__ import annotations

import argparse

from acmix_deploy.cli.common import print_step, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="a name of `device add`, or a host as ssh takes it")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.device.check import look
    from acmix_deploy.device.session import DeviceSession
    from acmix_deploy.report.show_device import show_device

    with DeviceSession(options.device, progress=print_step) as session:
        found = look(session)
    show(options, found, show_device)
    return 0 if found.ready else 3
