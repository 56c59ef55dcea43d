"""A device that is connected: what it is, what is installed there, and programs that run there."""

from __future__ import annotations

import getpass
import hashlib
import json
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from acmix_deploy import __version__
from acmix_deploy.artifacts import check_output, sha256, sidecar
from acmix_deploy.device import wheel
from acmix_deploy.device.link import Link, LinkLost, Talk, Unavailable
from acmix_deploy.device.registry import Device, named
from acmix_deploy.document import read_json
from acmix_deploy.errors import AcmixDeployError, CheckFailed, Inconclusive, MissingComponent, UserError
from acmix_deploy.manifest import KIND as ENGINE
from acmix_deploy.manifest import Machine
from acmix_deploy.process import ending

Progress = Callable[[str], None]

WAIT_S = 600.0
"""How long a command waits for a device that is in use, where nobody says."""
OLDEST = (3, 10)
"""Python that the package runs on."""
CLOCK_S = 60.0
"""By how much the clock of a device may be wrong before it is said."""

_ERRORS = {error.exit_code: error for error in (CheckFailed, UserError, MissingComponent, Inconclusive)}
_MACHINE = (
    "from acmix_deploy.engine.process import find_backend; from acmix_deploy.manifest import this_machine; "
    "print(this_machine(find_backend(None)).model_dump_json())"
)
_DAY = 86400


class Installed(BaseModel):
    """The package as it was installed on a device."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str
    wheel: str = Field(description="SHA-256 of the wheel")


class Facts(BaseModel):
    """What a device says of itself before anything is installed there."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    folder: str = Field(description="absolute path of the package's folder there")
    python: str
    machine: str = Field(description="its architecture, such as aarch64")
    libc: str = Field(description="such as glibc 2.35")
    boot: str = Field(description="id of its last start")
    time: float = Field(description="its clock, in seconds since 1970")
    free: int = Field(description="bytes that are free for the folder")
    jetson: str = Field(description="model of the board, empty where it tells none")
    release: str = Field(description="Jetson Linux")
    tensorrt: str | None = Field(description="release of TensorRT's library")
    cuda: str | None = Field(description="release of CUDA in /usr/local/cuda")
    installed: Installed | None = None
    used: dict[str, int] = Field(description="bytes in parts of the folder")
    tools: dict[str, str] = Field(description="paths of programs")


class Ended(NamedTuple):
    """How a program ended on a device."""

    code: int
    stdout: str
    said: list[str]
    """Lines on stderr, without those that told what was being done."""
    job: str
    found: bool
    """Whether it was begun by an earlier command."""
    sizes: dict[str, int]
    """Of what it wrote, in bytes."""
    digests: dict[str, str]
    """SHA-256 of the engines that it wrote."""

    @property
    def last_words(self) -> str:
        """The last line on stderr."""
        return next((line for line in reversed(self.said) if line.strip()), "nothing on stderr")


class DeviceSession:
    """See the module. A context manager; the connection is open while it is entered.

    Args:
        device: its name, or a host that ssh knows.
        detach: have what runs there go on when the connection is lost.
        wait: seconds to wait for a device that is in use.
        progress: told what is being done.

    Raises:
        MissingComponent: it cannot be reached, or has no Python.
        UserError: ``device`` is no host.
    """

    def __init__(
        self,
        device: str | Device,
        *,
        detach: bool = False,
        wait: float = WAIT_S,
        progress: Progress = lambda step: None,
    ) -> None:
        self.device = named(device) if isinstance(device, str) else device
        self.detach, self.wait, self.progress = detach, wait, progress
        self._stack = ExitStack()
        self._taken: list[str] = []

    def __enter__(self) -> DeviceSession:
        self.progress(f"connecting to {self.device.name}")
        with ExitStack() as stack:
            self._link = stack.enter_context(Link(self.device.host, self.device.folder, self.name))
            self._ask_facts()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _ask_facts(self) -> None:
        asked = time.time()
        self.facts = Facts.model_validate(self._link.ask("facts"))
        self.clock_s = self.facts.time - (asked + time.time()) / 2

    # -----------------------------------------------------------------------------------------------------------------
    # What is there

    @property
    def name(self) -> str:
        """What the device is called here."""
        return self.device.name

    @property
    def python(self) -> str:
        """The interpreter that has the package."""
        return f"{self.facts.folder}/venv/bin/python"

    @property
    def command(self) -> tuple[str, str]:
        """What runs a verb. A script by its path: with -m a folder of the user's could stand in for a package."""
        return self.python, f"{self.facts.folder}/venv/bin/acmix-deploy"

    @cached_property
    def wheel(self) -> tuple[Path, str]:
        """This package as a wheel, and its SHA-256."""
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder, wheel.NAME)
        wheel.write_wheel(path)
        return path, sha256(path)

    @property
    def clock(self) -> str:
        """How far the device's clock is from the one here, in words."""
        return f"the clock of {self.name} is {_duration(abs(self.clock_s))} {'ahead' if self.clock_s > 0 else 'behind'}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What stands out on the device, of what figures that are measured there depend on."""
        wrong = abs(self.clock_s) > CLOCK_S
        return (*[f"{self.clock}; times in what it measures are its own"] * wrong, *self._taken)

    @property
    def _makes(self) -> list[str | None]:
        """What decides on what is built there."""
        machine = self.machine.model_dump_json() if self.runs_package and self.machine else None
        return [self.wheel[1], machine, self.facts.tensorrt, self.facts.cuda, self.facts.release]

    @property
    def runs_package(self) -> bool:
        """Whether the device's Python is new enough."""
        return tuple(map(int, self.facts.python.split(".")[:2])) >= OLDEST

    def need_package(self) -> None:
        """Raises MissingComponent: the package does not run there, is not installed, or not as it is here."""
        if not self.runs_package:
            raise MissingComponent(
                f"{self.name} has Python {self.facts.python}; {'.'.join(map(str, OLDEST))} is needed",
                "Without the package `export --on` builds plugin and engine there, by CMake and trtexec.",
            )
        install = f"Install it: acmix-deploy device add {self.name} --install"
        installed = self.facts.installed
        if installed is None:
            raise MissingComponent(f"acmix-deploy is not installed in {self.facts.folder} of {self.name}", install)
        if installed.wheel != self.wheel[1]:
            other = f", here is {__version__}" if installed.version != __version__ else " of another build than is here"
            raise MissingComponent(
                f"{self.name} has acmix-deploy {installed.version}{other}", install.replace("Install", "Renew")
            )

    @cached_property
    def machine(self) -> Machine | None:
        """TensorRT and the GPU there; None where no TensorRT can be imported."""
        done = self.run("ask for TensorRT", [[self.python, "-c", _MACHINE]], alone=False)
        try:
            return Machine.model_validate_json(done.stdout)
        except ValidationError:
            return None

    # -----------------------------------------------------------------------------------------------------------------
    # Programs

    def run(
        self,
        what: str,
        commands: Sequence[Sequence[str]],
        *,
        files: Mapping[str, Path] | None = None,
        writes: Mapping[str, Path | None] | None = None,
        alone: bool = True,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> Ended:
        """Run programs one after the other, until one fails, in a folder of the job that both sides know it by.

        The same call finds what an earlier one began detached and did not take, and what was to be kept.

        Args:
            what: it is, for others who wait for the device.
            commands: programs with their arguments.
            files: what they read, by its path in the folder where they run. Of an engine that the device keeps
                the manifest is enough.
            writes: what they write, by its path there, and where it goes here; None leaves it there.
            alone: hold the device, so that nothing else runs there meanwhile.
            keep: leave the job there if it succeeds.
            progress: told what the programs say that they do.

        Raises:
            LinkLost: the connection ended; the message says what becomes of the programs.
            Unavailable: the device is in use.
            MissingComponent: there is no such program.
            UserError: no space is left on either side.
        """
        progress = progress or self.progress
        files, writes = files or {}, writes or {}
        for target in filter(None, writes.values()):
            check_output(target, *files.values())
        digests = {name: _digest(path) for name, path in files.items()}
        self._link.send({digests[name]: path for name, path in files.items()}, progress)
        # Others who give the same command at the same time share what is kept, or detached, and nothing else.
        shared = alone and (keep or self.detach)
        own = [*self._makes, self.facts.boot if not keep else ""] if shared else uuid.uuid4().hex
        identity = [commands, sorted(digests.items()), sorted(writes), own]
        job = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        targets = {f"work/{name}": target for name, target in writes.items() if target}
        request = {
            "job": job,
            "commands": commands,
            "files": digests,
            "writes": [*writes],
            "keeps": [name for name in writes if name.endswith(".engine")],
            "alone": alone,
            "wait": self.wait,
            "detach": self.detach and alone,
            "kept": keep,
            "who": _who(),
            "what": what,
        }
        try:
            ended, said, found = self._follow(request, progress)
        except LinkLost as error:
            fate, hint = (
                ("goes on", "Give the same command again to take what comes of it.")
                if self.detach
                else ("is ended there", "Give the same command again; with --detach it goes on without a connection.")
            )
            raise LinkLost(f"{error.message}; what ran there {fate}", hint) from error
        except (KeyboardInterrupt, SystemExit):
            if not self.detach:
                with suppress(AcmixDeployError):  # such as the rounds that a gate has measured
                    self._link.fetch(job, {name: to for name, to in targets.items() if to.suffix == ".json"}, progress)
                    self._link.ask("drop", job=job)
            raise
        if ended is None:
            raise MissingComponent(f"{what} was ended on {self.name} from outside", "Give the same command again.")
        if "refused" in ended:
            self._link.ask("drop", job=job)
            raise MissingComponent(f"{ended['program']} does not run on {self.name}: {ended['refused']}")
        with tempfile.TemporaryDirectory() as folder:
            stdout = Path(folder, "stdout")
            self._link.fetch(job, {"stdout": stdout}, lambda step: None)
            self._link.fetch(job, targets, progress)
            printed = stdout.read_text(encoding="utf-8", errors="replace")
        if ended["code"] or not keep:
            self._link.ask("drop", job=job)
        return Ended(ended["code"], printed, said, job, found, ended["sizes"], ended["digests"])

    def _follow(self, request: Mapping[str, Any], progress: Progress) -> tuple[dict[str, Any] | None, list[str], bool]:
        said: list[str] = []
        found = over = False
        with self._link.talk("run", **request) as talk, _stopping(talk, self.detach):
            talk.beat()
            for told in talk:
                if "line" in told:
                    line = told["line"]
                    if not line.endswith(" ..."):
                        said.append(line)
                    elif not over:
                        progress(line.removesuffix(" ..."))
                elif "waiting" in told:
                    progress(f"waiting for {self.name}: {_holder(told['waiting'])}")
                elif "found" in told:
                    found, over = True, told["over"]
                    said_when = f"begun {_ago(told['found'], self.clock_s)} by an earlier command"
                    progress(f"found on {self.name}, {said_when}")
                    if not request["kept"]:
                        self._taken.append(f"what {request['what']} gives was {said_when}")
                elif "broken" in told:
                    how = "restarted" if told["rebooted"] else "broke off"
                    progress(f"{self.name} {how} when this ran there before; it runs again")
                elif "refused" in told:
                    raise self._in_use(told["what"])
                elif "ended" in told:
                    return told["ended"], said, found
        return None, said, found

    def _in_use(self, holder: Mapping[str, Any]) -> Unavailable:
        return Unavailable(
            f"{self.name} is in use: {_holder(holder)}", "Wait longer with --wait SECONDS, or try again later."
        )

    def path(self, job: str, name: str) -> str:
        """Where a file of a job that was kept lies on the device."""
        return f"{self.facts.folder}/jobs/{job}/work/{name}"

    def check(self, ended: Ended) -> None:
        """Raises what a program of this package ended with, as its type and in its words."""
        if ended.code == 0:
            return
        if ended.code == -signal.SIGKILL:
            raise MissingComponent(
                f"{self.name} ended what ran there, as the system does when memory runs out",
                "End other programs there, or make swap space.",
            )
        lines = [line for line in ended.said if line.strip()]
        start = max((index for index, line in enumerate(lines) if line.startswith("error: ")), default=None)
        if start is None:
            raise MissingComponent(f"what ran on {self.name} {_how(ended.code)}: {ended.last_words}")
        message, *hint = lines[start:]
        kind = _ERRORS.get(ended.code, MissingComponent)
        raise kind(f"on {self.name}: {message.removeprefix('error: ')}", "\n".join(hint))

    def remove_files(self) -> None:
        """Remove what was installed, sent and built there; other things in the folder stay.

        Raises:
            MissingComponent: the device is in use.
        """
        told = self._link.ask("remove", alone=True, wait=self.wait, who=_who(), what="device remove --files")
        if "refused" in told:
            raise self._in_use(told["what"])

    def note_installed(self, installed: Installed | None) -> None:
        """Have the device tell what was installed; nothing while that changes."""
        self._link.ask("note_installed", installed=installed.model_dump() if installed else None)
        self._ask_facts()


@contextmanager
def _stopping(talk: Talk, detach: bool) -> Iterator[None]:
    """End what runs on the device where this command is interrupted, unless it is detached."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if not detach:
            talk.stop()
        raise


def _digest(path: Path) -> str:
    """SHA-256 of a file; of one that is not here but stays on a device, as its sidecar says."""
    if not path.exists() and sidecar(path).is_file():
        content = read_json(sidecar(path))
        if isinstance(content, dict) and content.get("kind") == ENGINE:
            return str(content["sha256"])
    return sha256(path)


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _holder(told: Mapping[str, Any]) -> str:
    if not told:
        return "somebody runs something there"
    since = datetime.fromtimestamp(told["since"]).strftime("%H:%M")
    return f"{told['who']} runs {told['what']} there since {since}"


def _how(code: int) -> str:
    how = ending(code)
    return f"ended with {how}" if code >= 0 else f"was ended by {how}"


def _ago(started: Mapping[str, Any], clock_s: float) -> str:
    return f"{_duration(max(0.0, time.time() + clock_s - started.get('time', 0)))} ago"


def _duration(seconds: float) -> str:
    for unit, name in ((_DAY, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
