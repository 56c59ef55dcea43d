"""A device for tests: Debian's sshd on 127.0.0.1, with keys, a port, a HOME, programs and a Python of its own.

The product calls `ssh HOST` as anybody does. That reads the configuration in the home that passwd names, whatever $HOME
is, so `client/ssh`, first on PATH, is ssh with the configuration of the test (`ssh -F`). It has these hosts:

    bench      the device
    behind     the same by way of bench (ProxyJump)
    stranger   the same, whose key is in no known_hosts file
    refused    the same, which does not take the user's key
    nowhere    a port on which nobody listens

A session there differs from that of a real device in this: its user is the one who runs the tests, since another needs
changes to the system; sshd is started for each connection (`sshd -i`), which a daemon does too; and a ForceCommand, the
script `session`, sets the environment before it does what sshd would have done. It holds no secrets of the machine, but
nothing keeps it from reading the machine's files.

Faults are methods of `Device` and of its `link`. What they change holds for sessions that start later: a command over a
connection that stands (ControlMaster) is a new session, a mount namespace is one of a new connection.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pwd
import shlex
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.device.proxy import Proxy

SSHD = Path("/usr/sbin/sshd")
# Of what the tests have, what a device lacks: this package, and what only an export needs.
NOT_THERE = ("acmix_deploy", "__editable__", "torch", "functorch", "triton-", "ultralytics", "thop", "onnxscript")
_STAYS = ("acmix-deploy.lock", ".ses")  # ours, and ONNX Runtime's
PROGRAMS = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")

SSHD_CONFIG = """\
HostKey "{root}/host_key"
AuthorizedKeysFile "{root}/authorized_keys"
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitUserRC no
PrintMotd no
UseDNS no
AcceptEnv LANG LC_*
Subsystem sftp {sftp}
SetEnv "HOME={root}/home"
ForceCommand "{root}/session"
"""

SSH_CONFIG = """\
Host nowhere
    Port 1
Host stranger
    UserKnownHostsFile none
Host refused
    IdentityFile "{root}/host_key"
Host * !refused
    IdentityFile "{root}/user_key"
Host behind
    ProxyJump bench
Host *
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentitiesOnly yes
    IdentityAgent none
    HostKeyAlias bench
    UserKnownHostsFile "{root}/known_hosts"
    GlobalKnownHostsFile none
    # The default took 0.25 s a connection.
    KexAlgorithms curve25519-sha256
"""

SESSION = """\
#!/bin/sh
cd {root}/home
export TMPDIR={root}/tmp LOOPBACK_DEVICE={root}
. {root}/environment
. {root}/profile
if [ -z "$SSH_ORIGINAL_COMMAND" ]; then
    exec /bin/sh
fi
exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"
"""


@functools.cache
def missing() -> str:
    """What this machine lacks to play the device, as a reason to skip; nothing where it lacks nothing."""
    for program, package in {"ssh": "client", "ssh-keygen": "client", str(SSHD): "server"}.items():
        if not shutil.which(program):
            return f"no {program}: apt-get install openssh-{package}"
    if sys.prefix == sys.base_prefix:
        return "the tests run outside of a virtual environment, so that what they have cannot be kept from the device"
    try:
        user = pwd.getpwuid(os.getuid())
    except KeyError:
        return f"sshd knows no user {os.getuid()}: it is not in /etc/passwd"
    if user.pw_shell and not os.access(user.pw_shell, os.X_OK):
        return f"sshd runs commands by the user's shell, and {user.pw_shell} is not there"
    if os.getuid() == 0:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/etc/shadow").read_text().splitlines()
            hashed = next(line.split(":")[1] for line in lines if line.startswith(f"{user.pw_name}:"))
            if hashed.startswith("!"):
                return f"sshd does not let {user.pw_name} in: the account is locked in /etc/shadow"
    return ""


class Device:
    """A device that is new: nothing is installed there and nothing runs.

    home: where its sessions start, and their HOME.
    tmp: their TMPDIR.
    bin: what stands first on their PATH, before the programs of this machine.
    client: a folder that is to be first on the PATH of what calls ssh.
    link: the line to it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home, self.tmp, self.bin, self.client = (root / name for name in ("home", "tmp", "bin", "client"))
        self._programs = root / "programs"  # links to the machine's, made where some are to be hidden
        self._sessions: list[subprocess.Popen[bytes]] = []
        self._variables: dict[str, str | Path] = {}
        self._inside: list[str] = []
        for folder in (self.home, self.tmp, self.bin, self.client):
            folder.mkdir(parents=True)
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd locks itself in; the service makes it
        self._make_keys()
        self._make_python()
        self.link = Proxy(self._serve)
        values = {"root": root, "port": self.link.port, "user": pwd.getpwuid(os.getuid()).pw_name, "sftp": _sftp()}
        (root / "sshd_config").write_text(SSHD_CONFIG.format(**values))
        (root / "ssh_config").write_text(SSH_CONFIG.format(**values))
        _program(root / "session", SESSION.format(root=shlex.quote(str(root))))
        ssh, config, calls = shutil.which("ssh"), *(shlex.quote(str(root / name)) for name in ("ssh_config", "calls"))
        text = f"""#!/bin/sh\n{{ printf '%s\\0' "$@"; echo; }} >> {calls}\nexec {ssh} -F {config} "$@"\n"""
        _program(self.client / "ssh", text)
        self.profile("")

    def ssh(self, command: str, host: str = "bench", stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        """What a user's `ssh HOST COMMAND` answers."""
        line: list[str | Path] = [self.client / "ssh", "-o", "BatchMode=yes", host, command]
        done = subprocess.run(line, input=stdin, capture_output=True, check=False, timeout=60)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def calls(self) -> list[list[str]]:
        """The arguments of each ssh that was started, but for those of the test's configuration."""
        path = self.root / "calls"
        lines = path.read_text().split("\0\n") if path.exists() else []
        return [line.split("\0") for line in lines if line]

    def left(self) -> list[object]:
        """What commands that ended should not have left: connections, processes, sockets, files but those to keep."""
        found: list[object] = []
        until(lambda: not (self.link.open or self.processes()))
        found += ["a connection"] * self.link.open
        found += [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in self.processes()]
        sockets = {Path(call[call.index("-S") + 1]).parent for call in self.calls() if "-S" in call}
        found += [path for path in sockets if path.exists()]
        found += [path for path in self.tmp.iterdir() if path.name not in _STAYS]
        found += [*self.home.glob("*/jobs/*"), *self.home.glob("*/store/.*")]
        found += [
            path for path in self.home.glob("*/.*") if path.parent.name[0] != "." and path.name != ".acmix-deploy"
        ]
        return found

    def log(self) -> str:
        """What sshd says of its connections."""
        path = self.root / "sshd.log"
        return path.read_text() if path.exists() else ""

    def profile(self, commands: str) -> None:
        """Have each session start with these commands of sh, as a ~/.bashrc that prints."""
        (self.root / "profile").write_text(f"{commands}\n")

    def program(self, name: str, text: str) -> None:
        """Put a script on the device's PATH, before what has this name."""
        _program(self.bin / name, text)

    def without(self, pattern: str) -> None:
        """Take programs from its PATH: those whose name matches, such as "cmake" or "python*"."""
        if not self._programs.exists():
            self._programs.mkdir()
            folders = [Path(folder) for folder in reversed(PROGRAMS)]
            for name, path in {path.name: path for folder in folders for path in folder.glob("*")}.items():
                (self._programs / name).symlink_to(path)
            self.set(PATH=f"{self.bin}:{self._programs}")
        for path in (*self.bin.glob(pattern), *self._programs.glob(pattern)):
            path.unlink()

    def old_python(self) -> bool:
        """Make Python 3.8 of JetPack 5 of its python3; where this machine has none (False), today's, which says so."""
        installed = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob("versions/3.8.*/bin/python3.8")
        for python in (os.environ.get("ACMIX_OLD_PYTHON"), shutil.which("python3.8"), *installed):
            if python and subprocess.run([python, "-c", ""], check=False, capture_output=True).returncode == 0:
                self.program("python3", f'#!/bin/sh\nexec {shlex.quote(str(python))} "$@"\n')
                return True
        version = "collections.namedtuple('Version', 'major minor micro releaselevel serial')(3, 8, 10, 'final', 0)"
        line = f"import collections, sys; sys.version_info = {version}; sys.version = '3.8.10 (default)'\n"
        (self._user_site() / "old.pth").write_text(line)
        return False

    def clock(self, shift: int) -> None:
        """Have its programs see a time that is off by so many seconds; times of files stay right. Skips without cc."""
        self.set(LD_PRELOAD=_world(self.root), LOOPBACK_CLOCK_SHIFT=str(shift))

    def reboot(self) -> None:
        """End all that runs there and all connections, forget TMPDIR and have another boot id. Skips without cc."""
        boot = self.root / "boot_id"
        self.set(LD_PRELOAD=_world(self.root), LOOPBACK_BOOT_ID=boot)
        self.link.down()
        self.kill()
        boot.write_text(f"{uuid.uuid4()}\n")
        shutil.rmtree(self.tmp)
        self.tmp.mkdir()
        self.link.up()

    @contextlib.contextmanager
    def small_disk(self, folder: Path, size: str) -> Iterator[Path]:
        """Mount so much space ("2m") on a folder of the device; yields where the test finds it.

        Only connections made inside the block see it: it is a mount in a namespace of its own, so that nothing of the
        machine changes. Skips where neither the user nor a user namespace may mount.
        """
        folder.mkdir(parents=True, exist_ok=True)
        mount = f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(folder))} && echo ready && exec sleep 1d"
        root = os.getuid() == 0
        command: list[str] = ["unshare", *([] if root else ["--user", "--map-root-user"]), "--mount", "sh", "-c", mount]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stderr is not None
            if holder.stdout.readline() != "ready\n":
                pytest.skip(f"no small disk: {holder.stderr.read().strip()}")
            self._inside = ["nsenter", "--target", str(holder.pid), "--mount"]
            if not root:  # back to the user's own number, else sshd takes itself for root
                ids = [f"--map-user={os.getuid()}", f"--map-group={os.getgid()}"]
                self._inside += ["--user", "--preserve-credentials", "unshare", "--user", *ids]
            try:
                yield Path(f"/proc/{holder.pid}/root{folder}")
            finally:
                self._inside = []
                self.link.cut()
                self.kill()
                holder.kill()

    def processes(self) -> list[int]:
        """What runs there: processes that a session started, and theirs."""
        mark = f"LOOPBACK_DEVICE={self.root}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # of another user, or gone
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def kill(self) -> None:
        """End all that runs there, and the connections."""

        def none_left() -> bool:
            running = self.processes()
            for pid in running:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return not running

        self.link.cut()
        for session in self._sessions:
            session.kill()
            session.wait()
        if not until(none_left):
            raise TimeoutError(f"processes {self.processes()} do not end")

    def close(self) -> None:
        """End all that runs there and all connections, and remove its folder."""
        self.link.close()
        self.kill()
        shutil.rmtree(self.root)

    def _serve(self, socket: int) -> None:
        command = [*self._inside, str(SSHD), "-i", "-f", f"{self.root}/sshd_config", "-E", f"{self.root}/sshd.log"]
        self._sessions = [session for session in self._sessions if session.poll() is None]
        with (self.root / "sshd.log").open("ab") as log:
            self._sessions.append(subprocess.Popen(command, stdin=socket, stdout=socket, stderr=log))

    def _make_keys(self) -> None:
        for name in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.root / name)]
            subprocess.run(command, check=True)
        shutil.copy(self.root / "user_key.pub", self.root / "authorized_keys")
        (self.root / "known_hosts").write_text(f"bench {(self.root / 'host_key.pub').read_text()}")

    def _make_python(self) -> None:
        """That of the tests, with their packages but NOT_THERE, as those of the system are."""
        python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
        # Not a link: Python looks for its library beside the name that it was called by.
        self.program("python3", f'#!/bin/sh\nexec {shlex.quote(str(python))} "$@"\n')
        packages = _packages()
        (self._user_site() / "packages.pth").write_text(f"{packages}\n")
        if libraries := [*packages.glob("tensorrt_rtx_libs/libtensorrt_rtx.so.1")]:
            # The ONNX parser of TensorRT-RTX asks for the library by a name that its package does not have.
            (self.root / "lib").mkdir()
            (self.root / "lib/libtensorrt_rtx.so").symlink_to(libraries[0])
            self._variables["LD_LIBRARY_PATH"] = f"{self.root / 'lib'}:{libraries[0].parent}"
        self.set(PATH=":".join([str(self.bin), *PROGRAMS]))

    def _user_site(self) -> Path:
        folder = Path(site.getusersitepackages().replace(site.getuserbase(), str(self.home / ".local"), 1))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def set(self, **variables: str | Path) -> None:
        self._variables.update(variables)
        lines = [f"export {name}={shlex.quote(str(value))}\n" for name, value in self._variables.items()]
        (self.root / "environment").write_text("".join(lines))


@contextlib.contextmanager
def device(root: Path) -> Iterator[Device]:
    """A new device in a folder that is not there, nor afterwards. Skips where there is no sshd."""
    if reason := missing():
        pytest.skip(reason)
    made = Device(root)
    try:
        yield made
    finally:
        print(made.log())  # pytest shows it where a test failed
        made.close()


@functools.cache
def _packages() -> Path:
    """Links to the packages of the tests but NOT_THERE."""
    folder = Path(tempfile.mkdtemp(prefix="packages"))
    atexit.register(shutil.rmtree, folder)
    for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(packages).iterdir():
            if not path.name.startswith(NOT_THERE) and path.name != "triton":
                (folder / path.name).symlink_to(path)
    return folder


def until(condition: Callable[[], object], seconds: float = 5) -> bool:
    """Wait for what comes true a little later, such as that a connection has ended: whether it did."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _sftp() -> str:
    places = [Path(folder) / "sftp-server" for folder in ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh")]
    return str(next((path for path in places if path.exists()), places[0]))


def _world(folder: Path) -> Path:
    library = folder / "world.so"
    if not library.exists():
        if not (compiler := shutil.which("cc")):
            pytest.skip("no C compiler")
        source = Path(__file__).with_name("world.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library
