"""One connection to a device by the system's OpenSSH, and requests to what runs there, see :mod:`.remote`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from acmix_deploy.artifacts import no_space, replacing
from acmix_deploy.device import remote
from acmix_deploy.device.registry import HOSTS
from acmix_deploy.errors import AcmixDeployError, MissingComponent, UserError

# A constant: what the login shell of a device is given is made of no name.
_COMMAND = "exec python3 -c 'import sys; given = sys.stdin.buffer; exec(given.read(int(given.readline())))'"
_SCRIPT = Path(remote.__file__).read_bytes()
_BEAT_S = 5.0
_BLOCK = 1 << 18
_TOLD_S = 1.0
"""How often it is told how far a transfer is."""
_END_S = 25.0
"""What a device is given to end a program and say so; see remote._END_S."""
_NO_SPACE = (28, 122)  # ENOSPC and EDQUOT of Linux
_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4")
_AGAIN = "Give the same command again."

Answer = dict[str, Any]
Progress = Callable[[str], None]


class Unavailable(MissingComponent):
    """A device cannot be reached or is in use, whatever was to run there."""


class LinkLost(Unavailable):
    """The connection to a device ended in the middle of a request."""


class Link:
    """A connection; commands of one process share it (ControlMaster). Closed by ``close``, or as a context manager.

    Args:
        host: destination as ssh takes it: a name of ``~/.ssh/config``, ``user@host`` or ``ssh://user@host:port``.
        folder: of this package on the device, beneath its home where it is relative.
        name: what it is called in what is said.

    Raises:
        MissingComponent: there is no ssh here.
        Unavailable: the device cannot be reached, with ssh's reason.
    """

    def __init__(self, host: str, folder: str, name: str = "") -> None:
        self.host, self.folder, self.name = host, folder, name or host
        if shutil.which("ssh") is None:
            raise MissingComponent("ssh was not found", "Install OpenSSH's client: apt-get install openssh-client")
        with ExitStack() as stack:
            directory = tempfile.TemporaryDirectory(prefix="acmix-", dir="/tmp")  # a socket's path is short
            self._socket = Path(stack.enter_context(directory), "link")
            self._connect()
            stack.callback(self._disconnect)
            # Where this process is killed that channel ends, and with it the connection.
            next(iter(stack.enter_context(self.talk("hold"))))
            self._stack = stack.pop_all()

    def _connect(self) -> None:
        # In the foreground until it is authenticated, so that ssh can ask for a passphrase or about a host key.
        options = ("-M", "-N", "-f", "-S", self._socket, "-o", "ControlPersist=5", "-o", "ConnectTimeout=15", *_ALIVE)
        with tempfile.TemporaryFile() as said:  # a pipe would stay open as long as the connection
            done = subprocess.run(
                ["ssh", *options, "--", self.host],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                check=False,
            )
            said.seek(0)
            if done.returncode:
                raise _unreachable(self.host, said.read().decode(errors="replace"))

    def _disconnect(self) -> None:
        subprocess.run(
            ["ssh", "-S", self._socket, "-O", "exit", "--", self.host],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._stack.close()

    def ask(self, do: str, **request: Any) -> Answer:
        """The one answer to a request that has one. Raises as :meth:`talk` does."""
        with self.talk(do, **request) as talk:
            return next(iter(talk))

    @contextmanager
    def talk(self, do: str, **request: Any) -> Iterator[Talk]:
        """A request in a channel of its own, for as long as the block lasts.

        Raises:
            LinkLost: the connection ended.
            UserError: no space is left there, or a file there cannot be read or written.
            MissingComponent: there is no Python on the device.
        """
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                ["ssh", "-S", self._socket, "-o", "BatchMode=yes", "-T", "--", self.host, _COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,  # Ctrl-C is for this process, which tells the device
            )
            talk = Talk(self.name, process, said)
            try:
                talk.write(b"%d\n" % len(_SCRIPT), _SCRIPT)
                talk.write(json.dumps({"do": do, "folder": self.folder, **request}).encode(), b"\n")
                yield talk
            finally:
                talk.close()

    def send(self, files: Mapping[str, Path], progress: Progress) -> None:
        """Put files into the device's store, those that it does not have.

        Args:
            files: by SHA-256.
            progress: told what is being sent, and how fast.
        """
        known = {sha256: path.stat().st_size if path.exists() else None for sha256, path in files.items()}
        missing = self.ask("lacks", sizes=known)["missing"] if files else []
        if not missing:
            return
        if away := [files[sha256] for sha256 in missing if not files[sha256].exists()]:
            raise UserError(f"{away[0]} is not here, and {self.name} does not have it either", "Make it again.")
        sizes = {sha256: files[sha256].stat().st_size for sha256 in missing}
        missing.sort(key=lambda sha256: -sizes[sha256])
        names = _named([files[sha256].name for sha256 in missing])
        transfer = _Transfer(f"sending {names} to {self.name}", sizes, progress)
        entries = [{"sha256": sha256, "size": sizes[sha256]} for sha256 in missing]
        with self.talk("receive", files=entries) as talk:
            for sha256 in missing:
                with files[sha256].open("rb") as file:
                    while (block := file.read(_BLOCK)) and talk.write(block):
                        transfer.moved(len(block))
            talk.end()
            next(iter(talk))
        transfer.done()

    def fetch(self, job: str, targets: Mapping[str, Path], progress: Progress) -> None:
        """Bring files of a job here, each whole or not at all; those that it did not write are left out.

        Args:
            job: id of the job.
            targets: where files go, by their names in the job's folder.
            progress: told what is being fetched, and how fast.
        """
        if not targets:
            return
        with self.talk("fetch", job=job, names=[*targets]) as talk:
            talk.end()
            for told in talk:
                if "name" not in told:
                    break
                name, size = told["name"], told["size"]
                transfer = _Transfer(f"fetching {targets[name].name} from {self.name}", {name: size}, progress)
                with replacing(targets[name]) as temporary, temporary.open("wb") as file:
                    for block in talk.data(size):
                        file.write(block)
                        transfer.moved(len(block))
                transfer.done()


class Talk:
    """A request that was sent, and its answers; the connection's errors are raised while they are read."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], said: Any) -> None:
        self._name, self._process, self._said = name, process, said
        assert process.stdin
        assert process.stdout
        self._input, self._output = process.stdin, process.stdout
        self._writing = threading.Lock()
        self._closed = threading.Event()

    def write(self, *blocks: bytes) -> bool:
        """Send bytes; whether somebody reads them. Where not, the answers say why."""
        with self._writing, suppress(BrokenPipeError, ValueError):
            for block in blocks:
                self._input.write(block)
            self._input.flush()
            return True
        return False

    def end(self) -> None:
        """Nothing more is sent."""
        with self._writing, suppress(BrokenPipeError):
            self._input.close()

    def beat(self) -> None:
        """Send signs of life until this is closed, see remote._Link."""

        def beating() -> None:
            while not self._closed.wait(_BEAT_S):
                self.write(b"\n")

        threading.Thread(target=beating, daemon=True).start()

    def stop(self) -> None:
        """Ask for the program to be ended, and wait for that."""
        self.write(b"stop\n")
        timer = threading.Timer(_END_S, self._process.kill)
        timer.start()
        try:
            with suppress(AcmixDeployError):
                for _ in self:
                    pass
        finally:
            timer.cancel()

    def __iter__(self) -> Iterator[Answer]:
        """The answers, until there are no more."""
        told = False
        while (line := self._output.readline()).endswith(b"\n"):  # not half of one
            if remote.MARK not in line:
                continue  # of the login shell
            content: Answer = json.loads(line.partition(remote.MARK)[2])
            if "error" in content:
                raise self._error(content)
            told = True
            yield content
        code = self._process.wait()
        if code or not told:
            raise self._ended(code)

    def data(self, size: int) -> Iterator[bytes]:
        """The bytes behind an answer."""
        while size:
            block = self._output.read(min(_BLOCK, size))
            if not block:
                raise self._ended(self._process.wait())
            size -= len(block)
            yield block

    def close(self) -> None:
        self._closed.set()
        self.end()
        if self._process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._output.close()
        self._process.wait()

    def _error(self, told: Answer) -> AcmixDeployError:
        place = f"{told['path']} on {self._name}" if told.get("path") else f"files on {self._name}"
        if told["errno"] in _NO_SPACE:
            return no_space(place, told["error"])
        if told["errno"] is None:
            return MissingComponent(f"{self._name}: {told['error']}", _AGAIN)
        return UserError(
            f"{place} cannot be used: {told['error']}",
            "Have the folder made there once, so that it is yours, or choose another one: acmix-deploy device add "
            f"{self._name} --folder DIR",
        )

    def _ended(self, code: int) -> AcmixDeployError:
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")
        if code in (255, -signal.SIGTERM, -signal.SIGKILL):
            return LinkLost(f"the connection to {self._name} was lost{_last(said)}", _AGAIN)
        if code == 127 and "librar" not in said:  # that of a loader too, which says so
            return MissingComponent(f"{self._name} has no python3", "Install it there: apt-get install python3")
        return MissingComponent(
            f"python3 gave no answer on {self._name}: exit code {code}{_last(said)}",
            "Does python3 --version work there, by ssh?",
        )


class _Transfer:
    """How far a transfer is, told once a second."""

    def __init__(self, what: str, sizes: Mapping[str, int], progress: Progress) -> None:
        self._what, self._total, self._progress = what, sum(sizes.values()), progress
        self._moved, self._start = 0, time.monotonic()
        self._told = self._start
        progress(f"{what}: {self._total / 1e6:.1f} MB")

    def moved(self, count: int) -> None:
        self._moved += count
        if time.monotonic() > self._told + _TOLD_S:
            self._told = time.monotonic()
            self._progress(f"{self._what}: {self._moved / 1e6:.1f} of {self._total / 1e6:.1f} MB, {self._rate}")

    def done(self) -> None:
        if self._told > self._start:  # it took a while
            self._progress(f"{self._what}: {self._total / 1e6:.1f} MB, {self._rate}")

    @property
    def _rate(self) -> str:
        return f"{self._moved / 1e6 / max(time.monotonic() - self._start, 1e-3):.1f} MB/s"


def _named(names: Sequence[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first


def _last(said: str) -> str:
    """The last line of what ssh said, to stand behind a sentence."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""


_REASONS = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key is another one than that in known_hosts",
     "If the device was set up anew, remove the old key: ssh-keygen -R HOST, then look at the new one: ssh HOST"),
    (r"Host key verification failed", "its host key is not known here", "Look at it and accept it once: ssh HOST"),
    (r"Permission denied", "it does not let you in", "Give it your key: ssh-copy-id HOST"),
    (r"Could not resolve hostname", "there is no host of that name", HOSTS),
    (r"Connection refused", "no ssh server listens there",
     "Is sshd running, and on that port? Ports stand in ~/.ssh/config."),
    (r"timed out", "it does not answer", "Is it switched on, and in this network?"),
)  # fmt: skip


def _unreachable(host: str, said: str) -> Unavailable:
    for pattern, reason, hint in _REASONS:
        if re.search(pattern, said):
            return Unavailable(f"{host} cannot be reached: {reason}{_last(said)}", hint.replace("HOST", host))
    return Unavailable(f"{host} cannot be reached{_last(said)}", f"Does this work? ssh {host} true")
