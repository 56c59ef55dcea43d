"""The documentation is executed: commands, Python, links, names and generated parts."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
import torch
from torch import Tensor, nn

from acmix_deploy import cli, gate_run, verify
from acmix_deploy.errors import AcmixDeployError
from acmix_deploy.export import export
from acmix_deploy.families import FAMILIES
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.plan import Plan
from acmix_deploy.report.model import ExportReport
from acmix_deploy.targets import TARGETS
from acmix_deploy.verify.limits import TOLERANCES
from scripts import docs, pictures, shapes, terminal
from tests import ROOT
from tests.gate import parts as gate_parts

PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")))}
RUNNABLE = [  # the tutorial is run by test_tutorial.py
    name
    for name, path in PAGES.items()
    if re.search(r"^```(python|console)$", path.read_text(), re.M) and name != "docs/tutorial.md"
]


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks of a page."""
    pattern = re.compile(rf"^```({'|'.join(languages)})\n(.*?)^```$", re.M | re.S)
    return pattern.findall(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documentation takes for granted: model.pt with three blocks, ONNX files of it, photos, and test data."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, stride=64, padding=1)
    model = nn.Sequential(stem, *(ACmix(16, 16) for _ in range(3))).eval()
    torch.save(model, folder / "model.pt")
    export(model, folder / "model.onnx", opset=17)
    fuse(folder / "model.onnx", folder / "model.fused.onnx", expect=3)
    cv2 = pytest.importorskip("cv2", reason="needs opencv")
    photos = shapes.write(folder / "drawn", seed=11, count=2).rename(folder / "photos")
    for labels in (folder / "drawn/labels").iterdir():
        labels.rename(photos / labels.name)
    wide = str(photos / "0001.png")  # with a border, which `verify --pad` wants
    cv2.imwrite(wide, cv2.imread(wide)[:120])
    shutil.copytree(ROOT / "tests/data", folder / "tests/data")
    write_measurements(folder)
    return folder


def write_measurements(folder: Path) -> None:
    """What `gate run` would have written."""
    names = ["baseline", "candidate"]
    for name, files in (("old", 6), ("new", 6), ("measurements", 3)):
        (folder / name).mkdir()
        names += [f"{name}/{index}" for index in range(files)]
    for seed, name in enumerate(names):
        (folder / f"{name}.json").write_text(gate_parts.text(gate_parts.alone(seed=seed)))
    (folder / "gate.json").write_text(gate_parts.text(gate_parts.pair(0.9)))


LONG = "docs/cli.md", "docs/int8.md", "docs/detect.md", "docs/doctor.md", "docs/verify.md"


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_such(name: str) -> None:
    """Verbs and options, also of what is only shown, or run by `make soak` alone."""
    for language, content in blocks(PAGES[name], "console", "text"):
        start = r"\$ " if language == "console" else r"(?:\$ )?"
        for command in re.findall(rf"^{start}(acmix-deploy [^>|\n]+)", content, re.M):
            cli.parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.soak) if n in LONG else n for n in RUNNABLE])
def test_commands_and_code_run(
    name: str,
    prepared: Path,
    tmp_path: Path,
    faster_exporter: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    page = PAGES[name]
    if re.search("yolo|tests/data/shapes.pt", "".join(code for _, code in blocks(page, "python", "console"))):
        pytest.importorskip("ultralytics", reason="needs ultralytics")
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    if re.search(
        r" (detect|triton|deepstream) shapes.fused.onnx|Path\(\"shapes.fused.onnx",
        page.read_text(encoding="utf-8"),
    ):
        shutil.copy(request.getfixturevalue("shapes_model"), tmp_path)
    if " detector.onnx" in page.read_text(encoding="utf-8"):
        shutil.copy(request.getfixturevalue("shapes_model"), tmp_path / "detector.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Plan.model_fields["seconds"], "default", 0.1)
    for option, value in (("rounds", 1), ("seconds", 0.1)):
        monkeypatch.setitem(gate_run.__kwdefaults__, option, value)
    namespace: dict[str, object] = {}
    done = set[str]()
    for language, content in blocks(page, "python", "console"):
        if language == "python":
            if file := re.match(r"# (\w+\.py)\n", content):
                Path(file[1]).write_text(content, encoding="utf-8")
            with monkeypatch.context() as patched:
                if "eager=" in content:  # all is beyond its limit, so that it is run
                    patched.setitem(verify.__kwdefaults__, "tolerances", {**TOLERANCES, "float16": Tolerance(floor=0)})
                exec(compile(content, name, "exec"), namespace)
            continue
        for session in re.split(r"^\$ ", content, flags=re.M)[1:]:
            command, _, shown = session.partition("\n")
            if command == terminal.COMMAND:
                shown = terminal.block().partition("\n$ ")[2].partition("\n")[2].partition("```")[0]
            # Run by tests that have the compiler and TensorRT, or something in their place, or that take less time.
            if not command.startswith("acmix-deploy ") or (command == terminal.COMMAND and command in done):
                continue
            done.add(command)
            verbs = "plugin", "build", "gate run", "serve", "device"
            elsewhere = tuple(f"acmix-deploy {verb} " for verb in verbs)
            if command.startswith(elsewhere) or re.search(r"\.engine| --on |--validation", command):
                cli.parser().parse_args(shlex.split(command)[1:])
            else:
                capsys.readouterr()
                code = cli.main(shlex.split(command)[1:])
                printed = capsys.readouterr()
                assert code == 0, f"{command}\n{printed.err}"
                if command == terminal.COMMAND:  # whose lines the terminal broke
                    shown, printed_out = (re.sub(r"\s+", "\n", text) for text in (shown, printed.out))
                    assert lines_without_figures(shown) <= lines_without_figures(printed_out)
                else:
                    assert lines_without_figures(shown) <= lines_without_figures(printed.out)
    if name == "docs/python.md":
        verification = namespace["verification"]
        assert all(one.eager_error for one in verification.comparisons if one.candidate == "half")
    if name == "README.md":
        written = json.loads(Path("deploy/report.json").read_text(encoding="utf-8"))
        schema = json.loads((ROOT / "docs/schemas/export.json").read_text(encoding="utf-8"))
        assert set(schema["properties"]) == set(written)
        assert ExportReport.model_validate(written).fusion.fused == 3


def lines_without_figures(output: str) -> set[str]:
    """Titles, heads of tables and the like: what a command prints whatever model it is given."""
    return {" ".join(line.split()) for line in output.splitlines() if not re.search(r"\d", line)}


def test_the_error_that_is_shown_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "model.onnx"]) == 2
    assert capsys.readouterr().err == blocks(PAGES["docs/errors.md"], "text")[0][1]


def test_every_exit_code_is_explained() -> None:
    table = PAGES["docs/errors.md"].read_text(encoding="utf-8").partition("exit-codes:begin")[2]
    rows = dict(re.findall(r"^\| (\d+) \| .* \| (?:`(\w+)`)? ?\|$", table.partition("exit-codes:end")[0], re.M))
    kinds = {
        str(kind.exit_code): kind.__name__
        for kind in AcmixDeployError.__subclasses__()
        if kind.__module__ == AcmixDeployError.__module__
    }
    assert rows == {"0": "", **kinds, "130": "KeyboardInterrupt", "143": ""}


def test_generated_parts_are_current() -> None:
    stale = docs.differing()
    assert not stale, f"run `make docs`: {[path.name for path in stale]}"


def test_pictures_are_graphs(tmp_path: Path) -> None:
    """Of three ways to a sum: what keeps all values is left out, what pads or picks is joined, branches are not."""

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            padded = nn.functional.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 2:]
            return padded.relu().flatten(2).reshape(padded.shape) + x.sigmoid() + padded[:, :, :1]

    export(Block(), tmp_path / "block.onnx", input_shape=(1, 2, 4, 4), opset=17)
    file = pictures.looked_into(onnx.load(tmp_path / "block.onnx"))
    names = {box: ", ".join(box.text) for box in file.boxes}
    moves, last = "Pad, 2 Slice", "2 Add"
    assert {(names[source], names[box]) for box in file.boxes for source in box.sources} == {
        ("x", moves), ("x", "Sigmoid"), (moves, "Relu"), (moves, "Slice"), ("Relu", last), ("Sigmoid", last),
        ("Slice", last), (last, "y"),
    }  # fmt: skip
    written = {"x": 0, moves: 2 * (36 + 24 + 16), "Relu": 32, "Sigmoid": 32, "Slice": 8, last: 2 * 32, "y": 0}
    assert {names[box]: box.written * 32 for box in file.boxes} == written
    assert (file.written * 32, file.largest * 32) == (sum(written.values()), 2 * 36)


def test_the_block_is_what_its_page_says() -> None:
    """Each key copied 49 times and 6.25 times; q, k and v, the attention, the convolution and two sums."""
    plain, fused, standard = pictures.explained((1, 16, 8, 8)).values()
    assert plain.largest == 49
    assert (fused.written, fused.nodes) == (7, 7)
    gathered = [box.written for box in standard.boxes if "Gather" in box.types]
    assert sorted(gathered)[-2:] == [6.25, 6.25]
    assert {box.written for box in fused.boxes if "AcmixLocalAttention" in box.types} == {1}


@pytest.mark.soak
def test_pictures_are_current() -> None:
    for path, text in pictures.generated().items():
        assert path.read_text(encoding="utf-8") == text, f"run `make docs`: {path.name}"


def test_every_verb_and_option_is_described() -> None:
    verbs = cli.commands()
    assert {"export", "plugin build"} <= set(verbs)
    sections = re.split(r"^## ", PAGES["docs/cli.md"].read_text(), flags=re.M)
    for verb, command in verbs.items():
        (section,) = (section for section in sections if section.startswith(f"{verb}\n"))
        for action in command._actions:
            for option in action.option_strings or [action.dest.upper()]:
                assert option in ("-h", "--help") or re.search(rf"`[^`]*{option}\b", section), f"{verb} {option}"


def test_examples_of_verbs_are_commands() -> None:
    page = PAGES["docs/cli.md"]
    shown = {line for _, content in blocks(page, "console") for line in content.splitlines()}
    assert len(shown) > len(cli.commands())
    assert {line for line in shown if not line.startswith(("$ acmix-deploy ", "$ trtexec "))} == set()
    assert "\nWith `--end-to-end`: " in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name: str) -> None:
    page = PAGES[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path), target


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_named_targets_and_extras_exist() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES.values())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:^\$ |`)make ([a-z-]+)", text, re.M)
    assert named
    assert set(named) <= targets
    extras = re.findall(r"pip install '\.\[(\w+)\]'", text)
    assert extras
    assert set(extras) <= set(metadata.metadata("acmix-deploy").get_all("Provides-Extra") or ())


def test_quoted_reasons_and_faults_exist() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "acmix_deploy").rglob("*.py"))
    text = "".join(PAGES[f"docs/{name}.md"].read_text(encoding="utf-8") for name in ("pipeline", "devices"))
    tables = re.findall(r"^\| (?:reason|sentence) .*?\n\n", text, re.M | re.S)
    quoted = [row for table in tables for row in re.findall(r"^\| `([^`]+)`", table, re.M)]
    assert len(tables) == 3
    assert len(quoted) > 30
    for reason in quoted:
        assert reason in sources, reason


def test_the_comparison_tells_versions_dates_and_sources() -> None:
    """Of each tool, and of what was tried the version that is told of the tool."""
    text = PAGES["docs/comparison.md"].read_text(encoding="utf-8")
    assert re.search(r"^As of 20\d\d-\d\d-\d\d\.", text, re.M)
    hosts = set(re.findall(r"https?://([^/)]+)", text))
    known = {"docs.nvidia.com", "docs.pytorch.org", "docs.ultralytics.com", "github.com", "nvidia.github.io"}
    assert hosts == known, "a vendor's own pages"
    assert "http://" not in text
    rows = re.findall(r"^\| \[([\w-]+)\]\(https://\S+\) .* \| ([\d.]+), 20\d\d-\d\d \|$", text, re.M)
    assert len(rows) == 6
    assert all(f"### {tool}" in text for tool, _ in rows)
    tried = text.partition("<!-- tools:begin -->")[2].partition("<!-- tools:end -->")[0]
    packages = {"Ultralytics": "ultralytics-opencv-headless", "Polygraphy": "polygraphy", "ModelOpt": "nvidia-modelopt"}
    for tool, version in rows:
        assert tool not in packages or f"{packages[tool]} {version}" in tried, tool
    for line in tried.splitlines():
        if "| fails |" in line:
            assert "ModelOpt" in line
            assert "is not a registered function/op" in text


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.stem)
def test_pictures_are_well_formed_and_whole(path: Path) -> None:
    """Nothing is fetched for them, and in those of graphs no box lies on another or outside."""
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?:href|src)=\"(?!#)|url\((?!#)|@import", text)
    if path.parent.name != "graphs":
        return
    assert "prefers-color-scheme: dark" in text
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    boxes: list[tuple[float, float, float, float]] = []

    def visit(element: ElementTree.Element, x: float, y: float) -> None:
        if moved := re.match(r"translate\((\S+) (\S+)\)", element.get("transform", "")):
            x, y = x + float(moved[1]), y + float(moved[2])
        if element.tag.endswith("rect"):
            left, top = x + float(element.attrib["x"]), y + float(element.attrib["y"])
            boxes.append((left, top, left + float(element.attrib["width"]), top + float(element.attrib["height"])))
        for child in element:
            visit(child, x, y)

    visit(root, 0, 0)
    assert len(boxes) > 4
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1], (one, other)


def test_the_picture_of_detections_is_small() -> None:
    cv2 = pytest.importorskip("cv2", reason="needs opencv")
    found = cv2.imread(str(ROOT / "docs/found.webp"))
    assert found.shape[1] == 3 * 380 + 2 * 16
    assert (ROOT / "docs/found.webp").stat().st_size < 150_000


def test_what_the_front_page_says_is_taken() -> None:
    """How many families there are, and from which release to which."""
    page = PAGES["README.md"].read_text(encoding="utf-8")
    assert f"[{ ({10: 'ten'}[len(FAMILIES)]) } families]" in page
    for name, kind in (("TensorRT", "tensorrt"), ("JetPack", "jetpack")):
        releases = [
            tuple(map(int, target.partition("-")[2].split("."))) for target in TARGETS if target.startswith(f"{kind}-")
        ]
        first, last = (".".join(map(str, release)) for release in (min(releases), max(releases)))
        assert f"{name} {first} to {last}" in page


def test_the_layout_is_whole_and_in_the_order_of_imports() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    layout = page.partition("## Layout")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([\w/]+?)(?:\.py|/)`", row.split("|")[1]) for row in layout.splitlines() if row[:3] == "| `"]
    folders = {
        path.parent.name for path in ROOT.glob("[!.]*/*") if path.name in ("__init__.py", "CMakeLists.txt", "cli.md")
    }
    assert {name for row in rows[: len(folders)] for name in row} == folders
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("layers = [")[2].partition("]")[0]
    layers = [layer.split(" | ") for layer in re.findall(r'"(.+)"', contract)]
    assert [{*row} for row in rows[len(folders) :]] == [{*layer} for layer in layers]
