"""A stand-in for the CPU of a Jetson: Debian for aarch64 in a folder, run by qemu-user. It has no GPU.

    python -m scripts.aarch64 ROOT               download and make it, with all that the tests install in it
    python -m scripts.aarch64 ROOT PROGRAM ...   run a program there

Packages are unpacked alone, as `mmdebstrap --variant=extract` does: under emulation their scripts would take an hour.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from acmix_deploy.device import install, wheel
from acmix_deploy.device.session import Facts
from acmix_deploy.errors import CheckFailed, MissingComponent
from acmix_deploy.plugin.toolchain import PYPI_CUDA
from scripts.resources import read_table

RELEASE = "bookworm"
FACTS = Facts.model_construct(python="3.11.2", machine="aarch64", libc="glibc 2.36")
"""Of that release."""
PACKAGES = ("base-files", "bash", "coreutils", "dash", "python3-pip", "python3-venv", "cmake", "g++", "make")

CPU = "cortex-a76"
"""The nearest that qemu knows to the Cortex-A78AE of an Orin."""
_CPUINFO = """\
processor\t: {core}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd42
CPU revision\t: 1

"""
"""What an Orin says of a core. Without it ONNX Runtime reads that of this machine and crashes."""

# Linux 6.7 and later have a binfmt_misc of its own for each user namespace: nothing outside is changed.
_NAMESPACES = """
set -e
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
cat /usr/lib/binfmt.d/qemu-aarch64.conf >/proc/sys/fs/binfmt_misc/register
mount -t proc none "$0/proc"
mount --rbind /dev "$0/dev"
mount --rbind /sys "$0/sys"
mount --bind "$0/cpuinfo" "$0/proc/cpuinfo"
exec chroot "$0" "$@"
"""


def make(root: Path) -> None:
    """Make the root, or renew the wheels in one that is there.

    Raises:
        MissingComponent: mmdebstrap is not here, or there is no wheel.
        CheckFailed: mmdebstrap or pip failed.
    """
    if not (root / "cpuinfo").is_file():
        if not shutil.which("mmdebstrap"):
            raise MissingComponent("mmdebstrap was not found", "apt-get install mmdebstrap")
        part = root.with_name(f"{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        packages = f"--include={','.join(PACKAGES)}"
        _run(["mmdebstrap", "--variant=extract", "--architectures=arm64", packages, RELEASE, part])
        for name, program in (("c++", "g++"), ("cc", "gcc")):  # elsewhere scripts of the packages make them
            (part / "usr/bin" / name).symlink_to(program)
        (part / "cpuinfo").write_text("".join(_CPUINFO.format(core=core) for core in range(2)))
        part.rename(root)
    shutil.rmtree(root / "wheels", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, wheel.NAME)
        wheel.write_wheel(package)
        install.download(package, FACTS, root / "wheels")
    (root / "wheels" / wheel.NAME).unlink(missing_ok=True)  # what is tested is that of the test
    cuda = [f"{name}=={read_table()[0]}.*" for name in PYPI_CUDA]
    platform = ["--only-binary=:all:", "--platform", "manylinux2014_aarch64", "--no-deps"]
    _run([sys.executable, "-m", "pip", "download", "--quiet", *platform, "--dest", root / "wheels", *cuda])


def enter(root: Path) -> list[str | Path]:
    """What stands before a command that runs in the root: user namespaces, or proot where they cannot be used.

    Raises:
        MissingComponent: there is no root, no qemu-user, or neither of the two works.
    """
    if not (root / "cpuinfo").is_file():
        raise MissingComponent(f"{root} holds no Debian for aarch64", f"Run: python -m scripts.aarch64 {root}")
    if not shutil.which("qemu-aarch64-static"):
        raise MissingComponent("qemu-aarch64-static was not found", "apt-get install qemu-user-static")
    unshare = [
        "unshare",
        "--map-root-user",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        _NAMESPACES,
        root,
    ]
    binds = ["-b", "/proc", "-b", "/dev", "-b", "/sys", "-b", f"{root}/cpuinfo:/proc/cpuinfo"]
    for prefix in (unshare, ["proot", "-q", "qemu-aarch64-static", *binds, "-w", "/", "-r", root]):
        # A proot before 5.4 asks this machine whether a file can be read.
        if shutil.which(str(prefix[0])) and run(prefix, "test", "-r", "/cpuinfo").returncode == 0:
            return prefix
    raise MissingComponent(
        "programs for aarch64 do not run here: user namespaces have no binfmt_misc, and there is no proot 5.4 or newer",
        "Use Linux 6.7 or newer, or install proot.",
    )


def run(prefix: list[str | Path], *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in the root, behind what :func:`enter` gave; options are those of ``subprocess.run``."""
    # pip would compile a thousand modules that nobody imports.
    environment = {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "QEMU_CPU": CPU,
        "PIP_NO_COMPILE": "1",
    }
    options = {"capture_output": True, "text": True, **options}
    return subprocess.run([*prefix, *command], check=False, env=environment, **options)


def _run(command: list[str | Path]) -> None:
    if subprocess.run(command, check=False).returncode:
        raise CheckFailed(f"{command[0]} failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    root = arguments.root.absolute()
    if not arguments.command:
        make(root)
    return run(enter(root), *(arguments.command or ["uname", "-a"]), capture_output=False).returncode


if __name__ == "__main__":
    sys.exit(main())
