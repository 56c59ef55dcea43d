"""What runs on a device, in its own Python from 3.8 on: sent there with every request, and nothing of it stays.

Standard library alone. A request is a line of JSON on stdin, with bytes behind it where files are sent; an answer is a
line of JSON on stdout behind :data:`MARK`, since a login shell may print before. Names come as JSON and go to the
system as lists of arguments: no shell sees them.

In the folder of a device: ``venv`` with the package, ``store`` with files by their SHA-256, and ``jobs``, a folder
each: ``work``, where the program runs, ``stdout`` and ``stderr``, ``started.json``, ``ended.json``. A job's ``lock`` is
held as long as the process that keeps it lives; ``stop`` asks that one to end the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MARK = b"\x1eacmix "
_BEAT_S = 60.0
"""Without a sign of life from the other side for so long the connection counts as lost."""
_KEPT_S = 30 * 86400
"""How long a file stays in the store that nothing asks for."""
_LOST_S = 7 * 86400
"""After how long a job counts as forgotten whose result nobody took."""
_MARK = ".acmix-deploy"
"""File in a folder of this package."""
_END_S = 10.0
"""What a program is given to end when it is asked to."""
_BLOCK = 1 << 20
_PR_SET_PDEATHSIG = 1


def answer(content: dict[str, Any]) -> None:
    """Send a line of JSON."""
    sys.stdout.buffer.write(b"\n" + MARK + json.dumps(content).encode() + b"\n")
    sys.stdout.buffer.flush()


def hold(request: dict[str, Any]) -> None:
    """Keep a channel open until the other side closes it, or is gone."""
    answer({"held": True})
    for _ in sys.stdin.buffer:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# What is there


def facts(request: dict[str, Any]) -> None:
    """What the device is and has, as far as its Python alone can tell."""
    folder = _folder(request)
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    answer(
        {
            "folder": str(folder),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "libc": " ".join(platform.libc_ver()),
            "boot": _boot(),
            "time": time.time(),
            "free": shutil.disk_usage(str(existing)).free,
            "jetson": _text("/proc/device-tree/model"),
            "release": _text("/etc/nv_tegra_release").partition("\n")[0],
            "tensorrt": _tensorrt(),
            "cuda": _cuda(),
            "installed": _read(folder / "installed.json"),
            "used": {name: _size(folder / name) for name in ("venv", "store", "jobs")},
            "tools": {name: path for name, path in ((tool, _tool(tool)) for tool in _TOOLS) if path},
        }
    )


_TOOLS = {"cmake": [], "trtexec": ["/usr/src/tensorrt/bin/trtexec"], "nvcc": ["/usr/local/cuda/bin/nvcc"]}


def _tool(name: str) -> str | None:
    return next((path for path in (shutil.which(name), *_TOOLS[name]) if path and os.access(path, os.X_OK)), None)


def _tensorrt() -> str | None:
    """The release of TensorRT's library, such as 8.5.2; nothing where there is none."""
    for name in ("libnvinfer.so", "libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so.8"):
        try:
            number = int(ctypes.CDLL(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
        major, minor, patch = (10000, 100, 1) if number >= 100000 else (1000, 100, 1)
        return f"{number // major}.{number % major // minor}.{number % minor // patch}"
    return None


def _cuda() -> str | None:
    try:
        return str(json.loads(_text("/usr/local/cuda/version.json"))["cuda"]["version"])
    except (ValueError, KeyError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Files


def lacks(request: dict[str, Any]) -> None:
    """Those of some files, given with their sizes, that are not in the store as a whole."""
    store = _folder(request) / "store"
    missing = []
    for sha256, size in request["sizes"].items():
        try:
            os.utime(str(store / sha256))
            whole = size is None or (store / sha256).stat().st_size == size
        except OSError:
            whole = False
        missing += [] if whole else [sha256]
    answer({"missing": missing})


def receive(request: dict[str, Any]) -> None:
    """Files into the store, each whole and as its SHA-256 says, or not at all."""
    store = _own(request) / "store"
    store.mkdir(exist_ok=True)
    for old in store.iterdir():  # what no job has and nothing asked for in long
        with contextlib.suppress(OSError):
            if old.stat().st_nlink == 1 and time.time() - old.stat().st_mtime > _KEPT_S:
                old.unlink()
    for entry in request["files"]:
        with tempfile.NamedTemporaryFile(dir=str(store), prefix=".receiving") as file:
            digest, left = hashlib.sha256(), entry["size"]
            while left:
                block = sys.stdin.buffer.read(min(_BLOCK, left))
                if not block:
                    raise EOFError("the connection ended while a file was sent")
                file.write(block)
                digest.update(block)
                left -= len(block)
            file.flush()
            os.fsync(file.fileno())
            if digest.hexdigest() != entry["sha256"]:
                raise ValueError("a file arrived with another SHA-256")
            _link(Path(file.name), store / entry["sha256"])
    answer({"received": len(request["files"])})


def fetch(request: dict[str, Any]) -> None:
    """Files of a job's folder, each behind an answer with its name and size; those that are not there are left out."""
    job = _job(request)
    for name in request["names"]:
        path = job / name
        if path.is_file():
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                answer({"name": name, "size": size})
                left = size
                while left:
                    block = file.read(min(_BLOCK, left))
                    if not block:
                        raise EOFError(f"{name} became shorter while it was sent")
                    sys.stdout.buffer.write(block)
                    left -= len(block)
    answer({"fetched": True})


def drop(request: dict[str, Any]) -> None:
    """Remove a job."""
    shutil.rmtree(str(_job(request)), ignore_errors=True)
    answer({"dropped": True})


def remove(request: dict[str, Any]) -> None:
    """All that was installed, sent and built in the folder, and the folder where nothing else is in it."""
    folder = _own(request)
    with _device_lock(request, _Link()):
        for part in [folder / name for name in ("venv", "store", "jobs", "installed.json", "timing.cache", _MARK)]:
            shutil.rmtree(str(part)) if part.is_dir() else _remove(part)
        if not any(folder.iterdir()):
            folder.rmdir()
    answer({"removed": True})


def note_installed(request: dict[str, Any]) -> None:
    """Keep what was installed, see ``facts``; nothing while it changes."""
    path = _own(request) / "installed.json"
    if request["installed"]:
        _write(path, request["installed"])
    else:
        _remove(path)
    answer({"noted": True})


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


def run(request: dict[str, Any]) -> None:
    """Run programs in a job of their own, or find the one that the same command began before, and follow it."""
    _own(request)
    job = _job(request)
    link = _Link()
    holder = None
    if not _found(job):
        with _device_lock(request, link) as device:
            if not _found(job):  # nor begun by another while this one waited
                started, ended = (_read(job / f"{name}.json") for name in ("started", "ended"))
                if started and not ended:
                    answer({"broken": started, "rebooted": started.get("boot") != _boot()})
                shutil.rmtree(str(job), ignore_errors=True)
                _sweep(job.parent)
                holder = _start(request, job, device.fileno())
    if holder is None:
        answer({"found": _read(job / "started.json") or {}, "over": (job / "ended.json").exists()})
    _follow(job, link, bool(request["detach"]), holder)


def _sweep(jobs: Path) -> None:
    """Remove jobs that ended long ago, and were not to be kept."""
    for job in jobs.glob("*"):
        started = _read(job / "started.json")
        if started and not started.get("kept") and time.time() - started["time"] > _LOST_S and not _found(job, False):
            shutil.rmtree(str(job), ignore_errors=True)


def _found(job: Path, over: bool = True) -> bool:
    """Whether a job runs or, where it may be ``over``, has ended by itself and waits to be taken."""
    if not job.is_dir():
        return False
    with (job / "lock").open("a") as lock:
        running = not _locked(lock)
    ended = _read(job / "ended.json")
    return running or (over and ended is not None and not ended.get("stopped"))


class _Link:
    """The other side: it sends a line now and then, ``stop`` where the program is to end, and nothing more when it is
    gone."""

    def __init__(self) -> None:
        self.last, self.open, self.stop = time.monotonic(), True, False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self.last, self.stop = time.monotonic(), self.stop or line.strip() == b"stop"
        self.open = False

    @property
    def lost(self) -> bool:
        return not self.open or time.monotonic() - self.last > _BEAT_S


def _device_lock(request: dict[str, Any], link: _Link) -> Any:
    """The file that is locked while something runs, held; one for all folders and users of the device."""
    if not request["alone"]:
        return tempfile.TemporaryFile()  # which nobody else locks
    path = Path(tempfile.gettempdir()) / "acmix-deploy.lock"
    if not path.exists():
        mask = os.umask(0)
        try:
            path.open("a").close()
        finally:
            os.umask(mask)
    # Reading is enough to lock, where another user lets nobody write.
    file = os.fdopen(os.open(str(path), os.O_RDONLY | os.O_NOFOLLOW))
    deadline, told = time.monotonic() + request["wait"], None
    while not _locked(file):
        holder = _read(path) or {}
        if time.monotonic() > deadline:
            raise _Refused("held", holder)
        if holder != told:
            answer({"waiting": holder})
            told = holder
        time.sleep(0.2)
        if link.lost or link.stop:  # asked last, so that nothing begins of which nobody hears
            raise KeyboardInterrupt
    with contextlib.suppress(OSError), os.fdopen(os.open(str(path), os.O_WRONLY | os.O_NOFOLLOW), "w") as holder_file:
        holder_file.truncate(0)
        json.dump({"who": request["who"], "what": request["what"], "since": time.time()}, holder_file)
    return file


def _start(request: dict[str, Any], job: Path, device: int) -> int:
    """Lay out a job, start its keeper, and return what holds the program as long as it is open, see :func:`_keep`."""
    work, store = job / "work", _folder(request) / "store"
    work.mkdir(parents=True)
    for name, sha256 in request["files"].items():
        target = work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.utime(str(store / sha256))
        try:
            os.link(str(store / sha256), str(target))
        except OSError:
            shutil.copyfile(str(store / sha256), str(target))
    for name in request["writes"]:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
    _write(
        job / "started.json",
        {
            "boot": _boot(),
            "time": time.time(),
            "who": request["who"],
            "what": request["what"],
            "kept": request["kept"],
        },
    )
    reader, holder = os.pipe()
    ready, told = os.pipe()
    if os.fork() == 0:
        try:
            os.setsid()
            os.close(holder)
            os.close(ready)
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            _keep(request, job, device, None if request["detach"] else reader, told)
        finally:
            os._exit(0)
    os.close(reader)
    os.close(told)
    os.read(ready, 1)  # the keeper holds the job's lock
    os.close(ready)
    return holder


def _keep(request: dict[str, Any], job: Path, device: int, attached: int | None, told: int) -> None:
    """Run the programs of a job one after the other and write how the last one ended.

    The program is ended when that is asked for, and where it is ``attached``, when the other end of that pipe is
    closed: whoever follows it is gone then, however that came. It does not outlive this process.
    """
    libc = ctypes.CDLL(None)
    with (job / "lock").open("a") as lock, (job / "stdout").open("ab") as out, (job / "stderr").open("ab") as err:
        _locked(lock)
        os.write(told, b".")
        os.close(told)
        ended: dict[str, Any] = {}
        for command in request["commands"]:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=str(job / "work"),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                    pass_fds=(device,),
                    preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509  has no threads
                )
            except OSError as error:
                ended = {"refused": str(error.strerror), "program": command[0]}
                break
            stopped = False
            while process.poll() is None:
                if _gone(attached) or (job / "stop").exists():
                    stopped = True
                    _end(process)
                time.sleep(0.05)
            ended = {"code": process.returncode, "stopped": stopped}
            if stopped or process.returncode:
                break
        try:
            store = _folder(request) / "store"
            ended["digests"] = {name: _store(job / "work" / name, store) for name in request["keeps"]}
            written = {name: job / "work" / name for name in request["writes"]}
            ended["sizes"] = {name: path.stat().st_size for name, path in written.items() if path.is_file()}
            _write(job / "ended.json", ended)
        except OSError as error:  # no space is left; what it wrote may be half of it
            shutil.rmtree(str(job / "work"), ignore_errors=True)
            out.truncate(0)
            _write(job / "ended.json", _error(error))
        if ended.get("stopped") and _gone(attached):
            shutil.rmtree(str(job), ignore_errors=True)


def _gone(attached: int | None) -> bool:
    return attached is not None and bool(select.select([attached], [], [], 0)[0])


def _end(process: Any) -> None:
    """Ask a program and what it started to end, and end them if they do not."""
    for sign, patience in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _END_S)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return


def _follow(job: Path, link: _Link, detached: bool, holder: int | None) -> None:
    """Tell what a program says on stderr, line by line, and how it ends."""
    position, rest = 0, b""
    asked = False
    while True:
        ended = _read(job / "ended.json")
        if not job.is_dir():
            return  # taken by the same command, given elsewhere
        with (job / "lock").open("a") as lock:
            alive = not _locked(lock)
        with (job / "stderr").open("rb") as file:
            file.seek(position)
            fresh = file.read()
        position += len(fresh)
        *lines, rest = (rest + fresh).split(b"\n")
        for line in lines + [rest] * bool(ended is not None and rest):
            answer({"line": line.decode(errors="replace")})
        if ended is not None:
            if "error" in ended or (ended.get("stopped") and not link.stop):  # nobody takes anything of it
                shutil.rmtree(str(job), ignore_errors=True)
            answer(ended if "error" in ended else {"ended": ended})
            return
        if not alive and _read(job / "ended.json") is None:
            answer({"broken": _read(job / "started.json") or {}, "rebooted": False})
            shutil.rmtree(str(job), ignore_errors=True)
            return
        if link.stop or (link.lost and not detached):
            if not asked:
                (job / "stop").touch()
                asked = True
        elif link.lost:
            return
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# What they share


def _error(error: Exception) -> dict[str, Any]:
    """An error as an answer."""
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    return {"error": getattr(error, "strerror", None) or str(error), "errno": number, "path": path and str(path)}


class _Refused(Exception):
    """Something that is told by a word and what belongs to it."""


def _own(request: dict[str, Any]) -> Path:
    """The folder, to be written to; it is marked, so that nothing of others is taken for ours."""
    folder = _folder(request)
    if not (folder / _MARK).exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise OSError(errno.EEXIST, "it holds something else, and has to be a folder of its own", str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
    return folder


def _folder(request: dict[str, Any]) -> Path:
    folder = Path(os.path.normpath(str(Path.home() / Path(request["folder"]).expanduser())))
    if folder in (Path.home(), *Path.home().parents):  # where others have a `store` or `jobs`
        raise OSError(errno.EINVAL, "it has to be a folder of its own", str(folder))
    return folder


def _job(request: dict[str, Any]) -> Path:
    return _folder(request) / "jobs" / str(request["job"])


def _boot() -> str:
    return _text("/proc/sys/kernel/random/boot_id")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or half of one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda temporary: temporary.write_text(json.dumps(content)))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its name and rename it, so that its name never holds half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        _remove(temporary)


def _link(path: Path, target: Path) -> None:
    """Have a file under another name too, from now on read-only, so that it stays what its SHA-256 says."""
    path.chmod(0o444)
    _replace(target, lambda temporary: os.link(str(path), str(temporary)))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _store(path: Path, store: Path) -> str:
    """Put a file that a job wrote where it is found when it is sent again; its SHA-256, empty without a file."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    store.mkdir(parents=True, exist_ok=True)
    _link(path, store / digest.hexdigest())
    return digest.hexdigest()


def _size(path: Path) -> int:
    if not path.is_dir():
        return 0
    return sum(file.lstat().st_size for file in _files(path))


def _files(path: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(str(path)):
        yield from (Path(folder, name) for name in names)


def _locked(file: Any) -> bool:
    """Lock a file for this process and its children; whether that was possible."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def main(functions: Sequence[Callable[[dict[str, Any]], None]]) -> None:
    """Answer the request on stdin."""
    request = json.loads(sys.stdin.buffer.readline())
    try:
        {function.__name__: function for function in functions}[request["do"]](request)
    except _Refused as error:
        word, what = error.args
        answer({"refused": word, "what": what})
    except (OSError, EOFError, ValueError) as error:
        answer(_error(error))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    status = 1
    try:
        main((hold, facts, lacks, receive, fetch, drop, remove, note_installed, run))
        sys.stdout.buffer.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)  # a thread may be reading stdin, which Python would call a fatal error
