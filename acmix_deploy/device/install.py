"""This package on a device: a virtual environment that sees the system's packages, with the wheel of this version."""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from acmix_deploy import __version__
from acmix_deploy.device.session import DeviceSession, Facts, Installed
from acmix_deploy.errors import MissingComponent
from acmix_deploy.process import run

EXTRAS = ("serve", "tensorrt")
"""Of this package, that a device gets: no PyTorch."""

_SCRIPT = Path(__file__).parent / "jetson" / "install.sh"
_OLDEST_GLIBC = 17  # 2.17, of manylinux2014


def install(session: DeviceSession, *, offline: bool = False) -> Installed:
    """Install the package on a device, or renew it.

    On a Jetson what JetPack leaves out is installed too, by its package manager, where it is not there yet.

    Args:
        session: the device.
        offline: download here what the package needs, for the device's Python and architecture, and send it.

    Raises:
        MissingComponent: the device's Python is too old, pip is not here, or something cannot be installed there.
        UserError: see :meth:`DeviceSession.run`.
    """
    facts = session.facts
    if not session.runs_package:
        session.need_package()
    wheel, digest = session.wheel
    files = {f"wheels/{wheel.name}": wheel, "install.sh": _SCRIPT}
    options: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        if offline:
            session.progress(f"downloading wheels for Python {facts.python} on {facts.machine}")
            download(wheel, facts, Path(folder))
            files |= {f"wheels/{path.name}": path for path in sorted(Path(folder).glob("*.whl"))}
            options = ["--no-index", "--find-links", "wheels"]
        session.note_installed(None)
        done = session.run(
            "device add --install",
            [["bash", "install.sh", facts.folder, f"wheels/{wheel.name}", *options]],
            files=files,
            progress=lambda step: session.progress(f"installing on {session.name}: {step}"),
        )
    if done.code:
        raise MissingComponent(
            f"the package cannot be installed on {session.name}: {done.last_words.removeprefix('error: ')}",
            "Without a network there: --offline. Where sudo asks for a password, install the system's packages once by "
            "hand: docs/devices.md#install.",
        )
    installed = Installed(version=__version__, wheel=digest)
    session.note_installed(installed)
    return installed


def download(wheel: Path, facts: Facts, folder: Path) -> None:
    """Wheels of everything that the package needs on a device, into ``folder``.

    pip chooses wheels of another platform, but reads conditions such as ``python_version < "3.11"`` as of here: what is
    missing by those of the device is asked for again.

    Raises:
        MissingComponent: pip is not here, or finds no wheel.
    """
    wanted = [f"{wheel}[{','.join(EXTRAS)}]"]
    while wanted:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        done = run([*command, "--only-binary=:all:", *_platform(facts), "--dest", folder, *wanted], name="pip download")
        if done.code:
            raise MissingComponent(f"pip finds no wheels for {facts.machine}: {done.last_words}")
        wanted = [str(requirement) for requirement in _lacking(folder, facts)]


def _platform(facts: Facts) -> list[str]:
    version = "".join(facts.python.split(".")[:2])
    glibc = int(facts.libc.partition(".")[2] or _OLDEST_GLIBC)
    tags = [f"manylinux_2_{minor}_{facts.machine}" for minor in range(glibc, _OLDEST_GLIBC - 1, -1)]
    tags += [f"manylinux2014_{facts.machine}", f"linux_{facts.machine}"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    abis = [word for abi in (f"cp{version}", "abi3", "none") for word in ("--abi", abi)]
    return [*platforms, "--python-version", version, "--implementation", "cp", *abis]


def _lacking(folder: Path, facts: Facts) -> Iterator[Requirement]:
    """What the wheels in a folder need on a device and is not among them."""
    needs: dict[str, list[Requirement]] = {
        canonicalize_name(path.name.partition("-")[0]): _needs(path) for path in folder.glob("*.whl")
    }
    environment = {
        "python_version": ".".join(facts.python.split(".")[:2]),
        "python_full_version": facts.python,
        "platform_machine": facts.machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    seen = set()
    left: list[tuple[str, frozenset[str]]] = [("acmix-deploy", frozenset(EXTRAS))]
    while left:
        name, extras = left.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for requirement in needs.get(name, []):
            marker = requirement.marker
            if marker and not any(marker.evaluate({**environment, "extra": extra}) for extra in (*extras, "")):
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in needs:
                requirement.marker = None
                yield requirement
            left.append((needed, frozenset(requirement.extras)))


def _needs(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(name).decode())
    return [Requirement(text) for text in headers.get_all("Requires-Dist", [])]
