"""Files made to run something when they are loaded: a restricted load runs nothing, whatever it says of them.

Pickles are written opcode by opcode, so that they are not what ``pickle.dumps`` would make. Each is proven to be an
attack by an ordinary unpickler.
"""

from __future__ import annotations

import copyreg
import gc
import io
import marshal
import os
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from acmix_deploy import yolo
from acmix_deploy.checkpoint import load
from acmix_deploy.errors import AcmixDeployError, UserError

# ---------------------------------------------------------------------------------------------------------------------
# A small assembler

STOP = b"."
EXTENSIONS = {200: ("posix", "system"), 60_000: ("os", "system"), 70_000: ("subprocess", "getoutput")}


def name(path: str) -> bytes:
    """GLOBAL: ``package:attribute``."""
    package, _, attribute = path.partition(":")
    return f"c{package}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    """REDUCE."""
    return function + several(*arguments) + b"R"


def new(kind: bytes, *arguments: bytes) -> bytes:
    """NEWOBJ."""
    return kind + several(*arguments) + b"\x81"


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def build(instance: bytes, state: bytes) -> bytes:
    return instance + state + b"b"


def extension(code: int) -> bytes:
    """EXT1, EXT2 or EXT4: a function by its number in copyreg."""
    for width, opcode in ("B", 0x82), ("H", 0x83), ("i", 0x84):
        if code < 256 ** struct.calcsize(width):
            return bytes([opcode]) + struct.pack(f"<{width}", code)
    raise ValueError(code)


SYSTEM = name("posix:system")


def shell(canary: Path) -> bytes:
    return text(f"touch {canary}")


def python(canary: Path) -> bytes:
    return text(f"open({str(canary)!r}, 'w').close()")


def harm(canary: Path) -> bytes:
    """The plainest attack, as a pickle."""
    return call(SYSTEM, shell(canary)) + STOP


def inner(canary: Path) -> bytes:
    """The path of a checkpoint with an attack in it."""
    path = canary.with_name("inner.pt")
    path.write_bytes(archive(harm(canary)))
    return text(str(path))


def source(canary: Path, file: str) -> bytes:
    """The path of a Python file with an attack in it."""
    path = canary.with_name(file)
    path.write_text(f"open({str(canary)!r}, 'w').close()\ndef entry():\n    pass\n")
    return text(str(path))


def setstate(instance: bytes, canary: Path) -> bytes:
    """The first BUILD makes os.system the instance's __setstate__, the second calls it."""
    return build(build(instance, mapping(__setstate__=SYSTEM)), shell(canary))


def function(canary: Path) -> bytes:
    """A function of any arguments, made of its code."""
    code = compile(f"lambda *_: open({str(canary)!r}, 'w').close()", "", "eval").co_consts[0]
    return call(name("types:FunctionType"), call(name("marshal:loads"), data(marshal.dumps(code))), b"}")


def module(kind: str, **state: bytes) -> bytes:
    """A module, with what a module has to have."""
    hooks = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")
    needed = dict.fromkeys(("_parameters", "_buffers", "_modules", *hooks), b"}")
    return build(new(name(kind)), mapping(training=b"\x89", inplace=b"\x89", **{**needed, **state}))


def hooked(hooks: str, canary: Path) -> bytes:
    """A module that is allowed, and calls what it is told to when it is used or saved."""
    return module("torch.nn.modules.activation:ReLU", **{hooks: b"}K\x01" + function(canary) + b"s"})


def slept(attack: bytes) -> bytes:
    """An attack that goes on beside, and time for it."""
    return attack + b"0" + call(name("time:sleep"), b"G" + struct.pack(">d", 0.3))


def options(function: str, **chosen: bytes) -> bytes:
    """A function with keyword arguments set: NEWOBJ and BUILD of a partial."""
    state = several(name(function), b")", mapping(**chosen), b"N")
    return build(new(name("functools:partial"), name(function)), state)


ATTACKS: dict[str, Callable[[Path], bytes]] = {
    # os.system by every opcode that makes or calls something
    "GLOBAL, REDUCE": lambda c: call(SYSTEM, shell(c)),
    "os instead of posix": lambda c: call(name("os:system"), shell(c)),
    "STACK_GLOBAL": lambda c: call(b"\x8c\x05posix\x8c\x06system\x93", shell(c)),
    "STACK_GLOBAL of long strings": lambda c: call(text("posix") + text("system") + b"\x93", shell(c)),
    "STACK_GLOBAL by way of the memo": lambda c: call(
        b"\x8c\x05posix\x94" + b"0" + b"\x8c\x06system\x94" + b"0" + b"h\x00h\x01\x93", shell(c)
    ),
    "INST": lambda c: b"(S'touch " + str(c).encode() + b"'\niposix\nsystem\n",
    "OBJ": lambda c: b"(" + SYSTEM + shell(c) + b"o",
    "NEWOBJ": lambda c: new(name("builtins:tuple"), new(name("builtins:map"), SYSTEM, listed(shell(c)))),
    "NEWOBJ_EX": lambda c: (
        name("builtins:frozenset") + several(new(name("builtins:map"), SYSTEM, listed(shell(c)))) + b"}\x92"
    ),
    "EXT1": lambda c: call(extension(200), shell(c)),
    "EXT2": lambda c: call(extension(60_000), shell(c)),
    "EXT4": lambda c: call(extension(70_000), shell(c)),
    "BUILD of a namespace": lambda c: setstate(new(name("argparse:Namespace")), c),
    "BUILD of a module": lambda c: setstate(new(name("torch.nn.modules.container:Sequential")), c),
    "BUILD of a slot": lambda c: build(
        new(name("argparse:Namespace")), several(b"N", mapping(x=call(SYSTEM, shell(c))))
    ),
    "behind a memo": lambda c: SYSTEM + b"q\x05" + b"0" + b"h\x05" + several(shell(c)) + b"R",
    "behind a long memo": lambda c: SYSTEM + b"r\0\1\0\0" + b"0" + b"j\0\1\0\0" + several(shell(c)) + b"R",
    "behind a text memo": lambda c: SYSTEM + b"p9\n" + b"0" + b"g9\n" + several(shell(c)) + b"R",
    "dropped from the stack": lambda c: call(SYSTEM, shell(c)) + b"0" + b"}",
    "in a frame": lambda c: b"\x95" + struct.pack("<Q", len(call(SYSTEM, shell(c)))) + call(SYSTEM, shell(c)),
    "a key": lambda c: b"}" + call(SYSTEM, shell(c)) + b"Ns",
    "a value": lambda c: mapping(epoch=call(SYSTEM, shell(c))),
    "an entry": lambda c: b"]" + call(SYSTEM, shell(c)) + b"a",
    "an entry of a set": lambda c: b"\x8f(" + call(SYSTEM, shell(c)) + b"\x90",
    "an entry of a frozen set": lambda c: b"(" + call(SYSTEM, shell(c)) + b"\x91",
    # reduced things that are called again
    "getattr of an import": lambda c: call(
        call(name("builtins:getattr"), call(name("builtins:__import__"), text("os")), text("system")), shell(c)
    ),
    "attrgetter": lambda c: call(
        call(call(name("operator:attrgetter"), text("system")), call(name("builtins:__import__"), text("os"))), shell(c)
    ),
    "methodcaller": lambda c: call(
        call(name("operator:methodcaller"), text("system"), shell(c)), call(name("importlib:import_module"), text("os"))
    ),
    "partial of a partial": lambda c: call(
        call(name("functools:partial"), call(name("functools:partial"), SYSTEM), shell(c))
    ),
    "fifty calls deep": lambda c: call(fifty_deep(call(name("functools:partial"), SYSTEM, shell(c)))),
    "starmap": lambda c: call(
        name("builtins:list"), call(name("itertools:starmap"), SYSTEM, listed(several(shell(c))))
    ),
    "functools.reduce": lambda c: call(
        name("functools:reduce"), name("builtins:open"), listed(text(str(c)), text("w"))
    ),
    "copyreg": lambda c: call(
        name("copyreg:_reconstructor"),
        name("builtins:bytes"),
        name("builtins:bytes"),
        call(name("builtins:map"), SYSTEM, listed(shell(c))),
    ),
    "when it is collected": lambda c: call(
        name("weakref:finalize"), call(name("collections:OrderedDict")), SYSTEM, shell(c)
    ),
    # builtins
    "eval": lambda c: call(name("builtins:eval"), python(c)),
    "exec": lambda c: call(name("builtins:exec"), python(c)),
    "eval of Python 2": lambda c: call(name("__builtin__:eval"), python(c)),
    "open": lambda c: call(name("builtins:open"), text(str(c)), text("w")),
    "a function made of code": lambda c: call(function(c)),
    "a dotted name": lambda c: b"\x80\x04" + call(name("torch:os.system"), shell(c)),
    "a dotted name of an allowed package": lambda c: (
        b"\x80\x04" + call(name("torch.nn.functional:torch.os.system"), shell(c))
    ),
    # the standard library
    "Popen": lambda c: slept(call(name("subprocess:Popen"), listed(text("touch"), text(str(c))))),
    "check_output": lambda c: call(name("subprocess:check_output"), listed(text("touch"), text(str(c)))),
    "popen": lambda c: call(
        call(name("operator:methodcaller"), text("read")), call(name("os:popen"), shell(c))
    ),
    "posix_spawn": lambda c: slept(
        call(name("os:posix_spawn"), text("/bin/sh"), listed(text("sh"), text("-c"), shell(c)), b"}")
    ),
    "timeit": lambda c: call(name("timeit:timeit"), python(c), text("pass"), name("time:perf_counter"), b"K\x01"),
    "code": lambda c: (
        b"\x80\x04"
        + call(name("code:InteractiveInterpreter.runsource"), call(name("code:InteractiveInterpreter")), python(c))
    ),
    "cProfile": lambda c: call(name("cProfile:run"), python(c), text(os.devnull)),
    "runpy": lambda c: call(name("runpy:run_path"), source(c, "script.py")),
    "a thread": lambda c: slept(call(name("_thread:start_new_thread"), SYSTEM, several(shell(c)))),
    "Path": lambda c: b"\x80\x04" + call(name("pathlib:Path.touch"), call(name("pathlib:PosixPath"), text(str(c)))),
    "ctypes": lambda c: call(
        call(name("builtins:getattr"), call(name("ctypes:CDLL"), b"N"), text("system")), data(f"touch {c}".encode())
    ),
    "logging": lambda c: call(name("logging:FileHandler"), text(str(c))),
    # another unpickler
    "pickle.loads": lambda c: call(name("pickle:loads"), data(harm(c))),
    "_pickle.loads": lambda c: call(name("_pickle:loads"), data(harm(c))),
    "torch.load": lambda c: call(options("torch:load", weights_only=b"\x89"), inner(c)),
    "torch.serialization.load": lambda c: call(options("torch.serialization:load", weights_only=b"\x89"), inner(c)),
    "torch.storage": lambda c: call(name("torch.storage:_load_from_bytes"), data(archive(harm(c)))),
    "numpy.load": lambda c: call(name("numpy:load"), numpy_file(c), b"N", b"\x88"),
    "an array that is a file": lambda c: call(
        call(name("operator:methodcaller"), text("tofile"), text(str(c))), call(name("numpy:zeros"), b"K\x01")
    ),
    "an array made by a function": lambda c: call(
        name("numpy:fromfunction"), function(c), several(b"K\x01")
    ),
    "state of an array": lambda c: build(
        call(name("numpy._core.multiarray:_reconstruct"), name("numpy:ndarray"), several(b"K\0"), data(b"b")),
        several(b"K\x01", several(b"K\x01"), call(name("numpy:dtype"), text("O")), b"\x89",
                listed(call(SYSTEM, shell(c)))),
    ),
    "state of transforms": lambda c: build(
        new(name("torchvision.transforms.transforms:Compose")), mapping(transforms=listed(call(SYSTEM, shell(c))))
    ),
    "transforms that are called": lambda c: call(
        call(name("torchvision.transforms.transforms:Lambda"), function(c)), b"N"
    ),
    "a dotted name of torchvision": lambda c: (
        b"\x80\x04" + call(name("torchvision.transforms.functional:torch.os.system"), shell(c))
    ),
    "torch.hub": lambda c: call(options("torch.hub:load", source=text("local")), hub(c), text("entry")),
    # what PyTorch and its own dependencies evaluate
    "sympy": lambda c: call(name("sympy:sympify"), text(f"__import__('os').system('touch {c}')")),
    "torch.fx": lambda c: call(name("torch.fx.graph_module:_forward_from_src"), python(c), b"}"),
    "collect_env": lambda c: call(name("torch.utils.collect_env:run"), shell(c)),
    "numpy's runstring": lambda c: call(name("numpy.testing._private.utils:runstring"), python(c), b"}"),
    "an allowed function calls it": lambda c: call(
        name("torch._tensor:_rebuild_from_type_v2"), SYSTEM, name("torch:Tensor"), several(shell(c)), b"N"
    ),
    # modules that call something later
    "a hook of state_dict": lambda c: hooked("_state_dict_hooks", c),
    "a hook before state_dict": lambda c: hooked("_state_dict_pre_hooks", c),
    "a hook of forward": lambda c: hooked("_forward_hooks", c),
    "a child": lambda c: module("torch.nn.modules.container:Sequential", _modules=mapping(a=call(SYSTEM, shell(c)))),
    "forward": lambda c: module("torch.nn.modules.activation:ReLU", forward=function(c)),
    # classes that are not here
    "state of a class that is not here": lambda c: module("models.common:ACmix", x=call(SYSTEM, shell(c))),
    "BUILD of a class that is not here": lambda c: setstate(new(name("models.common:ACmix")), c),
    "an argument of a class that is not here": lambda c: new(name("__main__:Net"), call(SYSTEM, shell(c))),
}  # fmt: skip


def fifty_deep(value: bytes) -> bytes:
    for _ in range(50):
        value = call(name("functools:partial"), value)
    return value


def numpy_file(canary: Path) -> bytes:
    """The path of an array of objects: a header and a pickle."""
    path = canary.with_name("objects.npy")
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + harm(canary))
    return text(str(path))


def hub(canary: Path) -> bytes:
    """The path of a folder that torch.hub imports."""
    source(canary, "hubconf.py")
    return text(str(canary.parent))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """As torch.save writes: a ZIP file with the pickle and the storages in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for record, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **records}.items():
            file.writestr(f"archive/{record}", content)
    return buffer.getvalue()


def old(pickled: bytes) -> bytes:
    """As torch.save wrote before 1.6: three pickles, then the object and the names of its storages."""
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps([], 2)


def tar(pickled: bytes) -> bytes:
    """As torch.save wrote before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for record in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(record)
            entry.size = len(pickled)
            file.addfile(entry, io.BytesIO(pickled))
    return buffer.getvalue()


FORMS: tuple[Callable[[bytes], bytes], ...] = (archive, old, tar, lambda pickled: pickled)


# ---------------------------------------------------------------------------------------------------------------------
# Whether something ran

_FORBIDDEN = {
    "code.__new__", "ctypes.dlopen", "ctypes.dlsym", "os.chmod", "os.exec", "os.fork", "os.link",
    "os.posix_spawn", "os.putenv", "os.remove", "os.rename", "os.symlink", "os.system", "pickle.find_class",
    "pty.spawn", "socket.bind", "socket.connect", "subprocess.Popen",
}  # fmt: skip
_watching: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for seen in _watching:
        if event in _FORBIDDEN:
            seen.append(event)
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            seen.append(f"open {arguments[0]}")


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Everything is imported that a load needs; os.system has numbers that the opcodes EXT1 to EXT4 know."""
    sys.addaudithook(_hook)  # there is no way to remove it
    path = tmp_path_factory.mktemp("first") / "a.pt"
    torch.save(nn.Sequential(nn.ReLU()), path)
    load(path)
    for code, (package, attribute) in EXTENSIONS.items():
        copyreg.add_extension(package, attribute, code)
    yield
    for code, (package, attribute) in EXTENSIONS.items():
        copyreg.remove_extension(package, attribute, code)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What the interpreter tells of calls, files and processes meanwhile."""
    seen: list[str] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def use(path: Path, **options: Any) -> None:
    """Load a file and do with it what an export does first: take its state, run it."""
    loaded: Any = load(path, **options).module
    loaded.state_dict()
    loaded(torch.ones(1))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_restricted_load_runs_nothing(tmp_path: Path, attack: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    pickled = ATTACKS[attack](canary) + STOP
    for form in FORMS:
        path.write_bytes(form(pickled))
        with watched() as seen, suppress(AcmixDeployError, pickle.UnpicklingError, NotImplementedError):
            use(path)
        assert not seen
    gc.collect()
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_ordinary_load_runs_it(tmp_path: Path, attack: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Else it were no attack, and the test above no test."""
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    path.write_bytes(archive(ATTACKS[attack](canary) + STOP))
    with suppress(Exception):
        use(path, trust=True)
    gc.collect()
    assert canary.exists()


def test_there_are_enough() -> None:
    assert len(ATTACKS) >= 50


def test_the_watch_sees_an_ordinary_unpickler() -> None:
    with watched() as seen:
        pickle.loads(call(name("builtins:len"), listed()) + STOP)
    assert seen == ["pickle.find_class"]


@pytest.mark.parametrize("attack", ["GLOBAL, REDUCE", "eval", "torch.load", "a hook of forward", "a dotted name"])
def test_what_is_refused_is_named(tmp_path: Path, attack: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive(ATTACKS[attack](tmp_path / "canary") + STOP))
    with pytest.raises(UserError, match=r"restricted load refuses: .*(system|eval|partial|marshal)"):
        load(path)


# ---------------------------------------------------------------------------------------------------------------------
# Files that ask for more than there is

LIMIT_MB, LIMIT_S = 400, 20.0
UNPACKED = {
    "an archive that unpacks to 100 MB",
    "a storage that unpacks to 100 MB",
    "one number shown as 10**12",
    "many tensors of one number",
}


def storage(key: str, kind: str, numbers: int) -> bytes:
    """BINPERSID: a storage in a file of its own."""
    return several(text("storage"), name(f"torch:{kind}"), text(key), text("cpu"), integer(numbers)) + b"Q"


def integer(value: int) -> bytes:
    content = value.to_bytes(8, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def tensor(stored: bytes, size: list[int], stride: list[int]) -> bytes:
    shape = (several(*map(integer, numbers)) for numbers in (size, stride))
    return call(name("torch._utils:_rebuild_tensor_v2"), stored, integer(0), *shape, b"\x89", b"}")


def doubled(times: int) -> bytes:
    """A list of lists that prints as 2**times entries."""
    return b"]q\x00" + b"".join(b"0](h%ch%ceq%c" % (n, n, n + 1) for n in range(times))


OVERSIZED: dict[str, Callable[[], bytes]] = {
    "an archive that unpacks to 100 MB": lambda: archive(b"N" * 10**8 + STOP, zipfile.ZIP_DEFLATED),
    "a storage that unpacks to 100 MB": lambda: archive(
        mapping(w=tensor(storage("0", "FloatStorage", 25 * 10**6), [25 * 10**6], [1])) + STOP,
        zipfile.ZIP_DEFLATED,
        **{"data/0": bytes(10**8)},
    ),
    "one number shown as 10**12": lambda: archive(
        mapping(w=tensor(storage("0", "HalfStorage", 1), [10**6, 10**6], [0, 0])) + STOP, **{"data/0": b"\0\0"}
    ),
    "many tensors of one number": lambda: archive(
        mapping(**{f"w{n}": tensor(storage("0", "HalfStorage", 1), [10**7], [0]) for n in range(100)}) + STOP,
        **{"data/0": b"\0\0"},
    ),
    "a storage larger than its file": lambda: archive(
        mapping(w=tensor(storage("0", "FloatStorage", 2**50), [2**50], [1])) + STOP, **{"data/0": b"\0\0\0\0"}
    ),
    "a storage of 2**50 numbers in an old file": lambda: old(
        mapping(w=tensor(storage_of_old_file(2**50), [2**50], [1])) + STOP
    ),
    "a string of 4 GB": lambda: archive(b"X\xff\xff\xff\xffshort."),
    "a string of 2**62 bytes": lambda: archive(b"\x8d" + struct.pack("<Q", 2**62) + b"short."),
    "bytes of 2**62": lambda: archive(b"\x8e" + struct.pack("<Q", 2**62) + b"short."),
    "a number of 2 GB": lambda: archive(b"\x8b\xff\xff\xff\x7f1."),
    "a frame of 2**62 bytes": lambda: archive(b"\x95" + struct.pack("<Q", 2**62) + b"N."),
    "a memo of 2**32 entries": lambda: archive(b"Nr\xff\xff\xff\xff."),
    "lists 200000 deep": lambda: archive(b"]" * 200_000 + b"a" * 199_999 + STOP),
    "tuples 200000 deep": lambda: archive(b")" + b"\x85" * 200_000 + STOP),
    "marks without an end": lambda: archive(b"(" * 200_000 + STOP),
    "lists that print as 2**100 entries": lambda: archive(doubled(100) + STOP),
    "a list in itself": lambda: archive(b"]q\x00h\x00a."),
    "a module in itself": lambda: archive(
        new(name("torch.nn.modules.container:Sequential")) + b"q\x00" + mapping(
            training=b"\x89", _parameters=b"}", _buffers=b"}", _modules=mapping(a=b"h\x00")
        ) + b"b."
    ),
    "modules 1500 deep": lambda: archive(nested(1500) + STOP),
    "nothing at all": lambda: archive(b""),
    "an end alone": lambda: archive(STOP),
}  # fmt: skip


def storage_of_old_file(numbers: int) -> bytes:
    parts = [text("storage"), name("torch:FloatStorage"), text("0"), text("cpu"), integer(numbers), b"N"]
    return several(*parts) + b"Q"


def nested(depth: int) -> bytes:
    pickled = module("torch.nn.modules.activation:ReLU")
    for _ in range(depth):
        pickled = module("torch.nn.modules.container:Sequential", _modules=mapping(a=pickled))
    return pickled


@pytest.mark.parametrize("form", OVERSIZED)
def test_an_oversized_file_is_refused_and_takes_little(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(OVERSIZED[form]())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError) as caught:
        load(path, arch="torch.nn:Identity")
    assert len(str(caught.value)) < 2000
    assert ("which no checkpoint does" in caught.value.message) is (form in UNPACKED)
    assert time.monotonic() - start < LIMIT_S
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < LIMIT_MB


@pytest.mark.parametrize("place", ["names", "channels", "imgsz"])
def test_what_would_print_as_more_than_there_is_memory(tmp_path: Path, place: str) -> None:
    """An entry that metadata repeats, as a list of lists of the same list."""
    pytest.importorskip("ultralytics", reason="needs ultralytics")
    model: Any = yolo.build("p5", num_classes=2)
    entry: list[Any] = []
    for _ in range(100):
        entry = [entry, entry]
    model.names, model.args, model.yaml["channels"] = {0: "a", 1: "b"}, {"imgsz": 64}, 3
    path = tmp_path / "a.pt"
    torch.save(model, path)
    load(path)
    if place == "names":
        model.names = {0: "a", 1: entry}
    elif place == "channels":
        model.yaml["channels"] = entry
    else:
        model.args = {"imgsz": entry}
    torch.save(model, path)
    with pytest.raises(UserError, match="holds what cannot be used: TypeError"):
        load(path)
