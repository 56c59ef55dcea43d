"""Give a device a name, and install this package there or renew it.

example:
  acmix-deploy device add bench-1 user@10.0.0.7 --folder /opt/acmix-deploy
  acmix-deploy device add bench-1 --install
  acmix-deploy device add jetson.local --install --offline
"""

from __future__ import annotations

import argparse

from acmix_deploy.cli.common import print_step, progress, show
from acmix_deploy.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="what it is to be called here")
    parser.add_argument(
        "host", nargs="?", help="user@host, or a name of ~/.ssh/config (default: as before, or the name itself)"
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="folder of this package there (default: acmix-deploy in the user's home)"
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="install this version there, beside the system's packages; on a Jetson with those that JetPack leaves out",
    )
    parser.add_argument(
        "--offline", action="store_true", help="with --install: download what it needs here, and send it"
    )


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.device import registry
    from acmix_deploy.device.check import look
    from acmix_deploy.device.install import install
    from acmix_deploy.device.session import DeviceSession
    from acmix_deploy.report.show_device import show_device

    if options.offline and not options.install:
        raise UserError("--offline says how to install, and nothing is to be installed", "Add --install.")
    before = registry.named(options.name)
    given = {"host": options.host, "folder": options.folder}
    device = before.model_copy(update={name: value for name, value in given.items() if value is not None})
    registry.named(device.host)
    session = DeviceSession(device, progress=print_step)
    with session, progress() as session.progress:
        if options.install:
            install(session, offline=options.offline)
        found = look(session)
    registry.add(device)
    show(options, found, show_device)
    return 0
