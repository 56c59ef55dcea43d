"""The HTML report: all that the documents say, whatever they are called, and as a browser shows it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acmix_deploy.artifacts import Artifact, write_artifact
from acmix_deploy.cli import main
from acmix_deploy.errors import UserError
from acmix_deploy.exported import ExportResult, ReferenceReport
from acmix_deploy.families import BlockReport
from acmix_deploy.fusion import FusionReport
from acmix_deploy.fusion.fuse import FusedBlock
from acmix_deploy.gate.samples import GateSamples, Measured, Round, Turn
from acmix_deploy.gate.verdict import Comparison as GateVerdict
from acmix_deploy.gate.verdict import Judged
from acmix_deploy.profile import Machine, Profile, ProfileDocument
from acmix_deploy.profile.layers import Layer
from acmix_deploy.profile.monitor import Conditions, Power
from acmix_deploy.report import plots
from acmix_deploy.report.documents import GateDocument, VerifyDocument
from acmix_deploy.report.folder import read_folder
from acmix_deploy.report.html import write_html
from acmix_deploy.report.model import ExportReport, FileReport
from acmix_deploy.verify import Comparison, DetectionComparison, Verification
from acmix_deploy.verify.detections import Detection, DetectionPair, ImageComparison
from acmix_deploy.verify.layers import LayerError, LayerErrors, Mend
from acmix_deploy.verify.limits import DETECTION_LIMITS
from tests import ROOT

HOSTILE = "<script>alert('1')</script>\"&amp;$\\frac{1}{0}$ {{ 7 * 7 }}\x07\u202e注意力" + "_long" * 40
SHOWN = HOSTILE.replace("\x07\u202e", "··")
MACHINE = Machine(
    cpu="CPU & <b>Sons</b>", cores=2, system="Linux", versions={"onnxruntime": "1.31"}, gpu="Orin (sm_87)"
)
FILE = "in \"quotes\" & 'more'.onnx"


def samples(median: float, count: int = 200) -> tuple[float, ...]:
    return tuple(median * np.exp(0.05 * np.random.default_rng(int(median * 1000)).standard_normal(count)))


def profile(file: str, median: float, **more: Any) -> Profile:
    return Profile(
        file=file, provider="CPUExecutionProvider", threads=2, samples_ms=samples(median), machine=MACHINE, **more
    )


def layers(name: str) -> tuple[Layer, ...]:
    places = [
        ("acmix_0.attention", "acmix_0", 3.0),
        ("acmix_1.attention", "acmix_1", 2.0),
        (name, name, 4.0),
        ("/m", "other", 1.0),
    ]
    return tuple(Layer(name=layer, kind="Conv", block=block, median_ms=ms) for layer, block, ms in places)


def power() -> Power:
    return Power.of([Conditions(power_w=12.5, gpu_mhz=1300.0)] * 3, inference_ms=4.0, images=1)


def comparison(candidate: str, value: float, limit: float, **more: Any) -> Comparison:
    shapes = {"images": (1, 3, 64, 64)}
    return Comparison(
        candidate=candidate, precision="float32", output="boxes", input_shapes=shapes, limit=limit,
        max_abs=value, relative_l2=value, cosine=1.0, **more,
    )  # fmt: skip


def detected(candidate: str, images: list[Path], name: str = "circle") -> DetectionComparison:
    """In each image one detection lost and one kept."""
    box = Detection(name=name, score=0.9, box=(4, 4, 20, 24))
    other = Detection(name="ring", score=0.8, box=(30, 30, 50, 50))
    pairs = (
        DetectionPair(reference=box, candidate=None, iou=0),
        DetectionPair(reference=other, candidate=other, iou=1),
    )
    return DetectionComparison(
        candidate=candidate, precision="int8", confidence=0.25, limits=DETECTION_LIMITS["int8"],
        images=tuple(ImageComparison(image=image, size=(64, 64), pairs=pairs) for image in images),
    )  # fmt: skip


def along(name: str, count: int = 30) -> LayerErrors:
    """A chain of tensors in a fused block and out of it, of which the last are infinite."""

    def layer(index: int) -> LayerError:
        error = {"relative_l2": 1e-4 * 1.2**index} if index < count - 1 else {"problem": "3 of 4 values are NaN"}
        return LayerError(
            tensor=f"tensor {index}", node=f"{index} {name}", operator="Conv", scores=False, limit=0.01,
            block=f"acmix_{index // 10} {name}" if index % 10 < 4 else "", sources=(f"tensor {index - 1}",),
            end=index == count - 1, mend=Mend(option="--float32", nodes=(f"{index} {name}",)), **error,
        )  # fmt: skip

    return LayerErrors(
        candidate=name, precision="float16", float32=("decode",), inputs=(), unshared=7, chosen=2,
        layers=tuple(map(layer, range(count))),
    )  # fmt: skip


def exported(folder: Path, name: str, images: list[Path]) -> ExportReport:
    def file(role: str, size: int, median: float) -> FileReport:
        artifact = Artifact(path=folder / f"{role} {FILE}", kind=role, sha256="0" * 64, versions={})
        return FileReport(artifact=artifact, size_bytes=size, nodes=10, profile=profile(f"{role} {name}", median))

    return ExportReport(
        reference=ReferenceReport(),
        model=name,
        notes=(f"note of {name}",),
        blocks=(BlockReport(name=name, class_name="ACmix", family="acmix", status="left alone", reason="no bias"),),
        export=ExportResult(
            exporter="dynamo", opset=18, ir_version=10, inputs=(), outputs=(), checked_shapes=(), relative_l2=0
        ),
        fusion=FusionReport(
            blocks=[
                FusedBlock(name=name, family="acmix", fused=True, operator="AcmixLocalAttention", relative_l2=3e-7),
                FusedBlock(name="Softmax_7", family="acmix", fused=False, reason="its scale is not that of head_dim"),
            ],
            nodes_before=363, nodes_after=253, opset=18,
        ),
        files={"plain": file("plain", 13_650_000, 16.0), "fused": file("fused", 4_940_000, 5.0)},
        verification=Verification(
            reference="PyTorch",
            comparisons=(comparison(f"plain {name}", 2e-7, 1e-5), comparison(f"fused {name}", 3e-2, 1e-5)),
            detections=(detected(f"fused {name}", images, name),) if images else (),
        ),
        seconds={"export": 1.5},
        next_steps=("acmix-deploy plugin build",),
    )  # fmt: skip


def measured(model: str, median: float, started: datetime, rounds: int = 6) -> Measured:
    turns = [Turn(samples_ms=samples(median + 0.01 * index, 40), started=started) for index in range(rounds)]
    return Measured(
        model=model, kind="onnx", provider="CPUExecutionProvider", machine=MACHINE,
        rounds=tuple(Round(index=index, turns=(turn,)) for index, turn in enumerate(turns)),
    )  # fmt: skip


def write(document: Any, path: Path) -> Path:
    path.write_text(document.model_dump_json(by_alias=True, indent=2), encoding="utf-8")
    return path


def draw_image(path: Path, width: int = 64, height: int = 64) -> Path:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), noise)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every document, all names hostile."""
    path = tmp_path_factory.mktemp("every")
    image = draw_image(path / FILE.replace(".onnx", ".png"))
    write(exported(path, HOSTILE, [image]), path / "report.json")
    files = [profile(HOSTILE, 12.0, layers=layers(HOSTILE), power=power()), profile(FILE, 4.0, layers=layers("neck"))]
    write(ProfileDocument(profiles=files), path / 'profile "1".json')
    verification = Verification(
        reference=FILE,
        comparisons=(comparison(HOSTILE, 0.1, 1e-5),),
        detections=(detected(HOSTILE, [path / "gone.png"]),),
        layers=(along(HOSTILE),),
    )
    write(VerifyDocument(**verification.model_dump()), path / "verify.json")
    start = datetime(2026, 5, 1, 9, tzinfo=timezone.utc)
    for index in range(8):
        when = start + timedelta(days=index)
        pair = GateSamples(
            baseline=measured(FILE, 5.0, when), candidate=measured(HOSTILE, 5.0 + (index > 3), when), interleaved=True
        )
        write(pair, path / f"gate-{7 - index}.json")
    judged = Judged(
        metric="p50", outcome="fail", reason="too slow", rounds=(6, 6), ratio=1.2, low=1.1, high=1.3, spread=0.01
    )
    verdict = GateVerdict(baseline=FILE, candidate=HOSTILE, paired=True, judged=(judged,))
    write(GateDocument(tolerance=0.03, comparisons=(verdict,)), path / "verdict.json")
    return path


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("page") / "report.html"
    write_html(folder, target)
    return target


class Parsed(HTMLParser):
    """Elements with their attributes, text, and rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text, self.inside = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data

    def row(self, *start: str) -> list[str]:
        (found,) = (row for row in self.rows if row[: len(start)] == [*start])
        return found


@pytest.fixture(scope="module")
def parsed(page: Path) -> Parsed:
    return Parsed(page.read_text(encoding="utf-8"))


def test_tells_what_the_documents_say(parsed: Parsed) -> None:
    assert parsed.row("Softmax_7")[-1] == "its scale is not that of head_dim", "why something was not fused"
    assert parsed.row(SHOWN, "ACmix")[-1] == "no bias"
    assert "363 nodes became 253" in parsed.text
    assert parsed.row(f"fused {SHOWN}", "boxes")[2:] == ["3.0e-02", "3.0e-02", "1.0e-05", "1.0000000", "FAILED"]
    assert parsed.row(f"plain {SHOWN}", "boxes")[-1] == "ok"
    assert parsed.row(f"fused {SHOWN}", "1")[1:7] == ["1", "2", "1", "1", "0", "0"], "detections"
    worst = [row for row in parsed.rows if row[2:3] and row[2].startswith("tensor ")]
    assert [row[2] for row in worst] == [f"tensor {index}" for index in range(29, 19, -1)]
    assert worst[0] == [f"29 {SHOWN}", "Conv", "tensor 29", "", "3 of 4 values are NaN", "1.0e-02", "beyond"]
    assert worst[-1][3:] == [f"acmix_2 {SHOWN}", "3.8e-03", "1.0e-02", "ok"]
    assert f"{SHOWN} leaves the limit of 1.0e-02 first at 26 {SHOWN} (relative L2 1.1e-02); keep it" in parsed.text
    figures = [f"{np.percentile(samples(4.0), q):.3f}" for q in (50, 90, 95, 99)]
    assert parsed.row(FILE, figures[0])[1:5] == figures
    assert parsed.rows.count(["acmix_0.attention", "Conv", "acmix_0", "3.000", "30.0%"]) == 2
    assert ["acmix_0", "3.000", "30.0%", "3.000", "30.0%"] in parsed.rows
    assert ["acmix, all 2", "5.000", "50.0%", "5.000", "50.0%"] in parsed.rows
    assert parsed.row(SHOWN, "1300")[-2:] == ["12.5", "50.0"], "W and mJ"
    assert parsed.row(f"fused {FILE}", "10")[2] == "4.94"
    assert ["CPU", MACHINE.cpu] in parsed.rows
    assert ["GPU", "Orin (sm_87)"] in parsed.rows
    assert parsed.row(SHOWN, "p50")[4:] == ["+20.0%", "+10.0% to +30.0%", "1.0%", "6", "fail"]
    history = [row for row in parsed.rows if row[1:2] and row[1].startswith("gate-")]
    assert [row[:2] for row in history] == [[f"2026-05-0{day} 09:00", f"gate-{8 - day}.json"] for day in range(1, 9)]
    assert re.search(r"A step: from gate-3\.json on 1\.(19|20)\d times the time", parsed.text)
    for words in (f"note of {SHOWN}", "acmix-deploy plugin build", "gone.png cannot be read to draw"):
        assert words in parsed.text


def test_errors_along_a_graph_are_drawn_for_both_widths() -> None:
    """Blocks are named where there is room; equal tensors and a model without blocks can be drawn too."""
    steps = [plots.Step(error.relative_l2, error.limit, error.passed, error.block) for error in along("n").layers]
    wide, narrow = plots.depth(steps)
    assert [wide.count(f">acmix_{block} n<") for block in range(3)] == [1, 1, 1]
    assert [narrow.count(f">acmix_{block} n<") for block in range(3)] == [1, 0, 1]
    assert wide.count("var(--bad)") == 4, "three beyond the limit, and one that could not be compared"
    for few in ([], [plots.Step(0.0, 1e-5, True, "")], steps[:1]):
        assert "<svg" in plots.depth(few).wide


def test_a_histogram_of_errors_has_its_limit_in_it() -> None:
    wide, narrow = plots.histogram([1e-6, 3e-4, 4e-4, 2e-3], 1e-2)
    for drawn in (wide, narrow):
        assert {">1e-06<", ">1e-02<"} <= {*re.findall(r">1e-\d\d<", drawn)}
        assert drawn.count("var(--ink)") == 1
    assert "<svg" in plots.histogram([0.5], np.inf).wide


def test_names_stay_text(parsed: Parsed, page: Path) -> None:
    assert {tag for tag, _ in parsed.elements} & {
        "script",
        "iframe",
        "object",
        "link",
        "base",
        "form",
        "foreignobject",
    } == set()
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action"):
            assert re.match(r"#|data:image/jpeg;base64,", attributes.get(name) or "#"), attributes
        assert "url(" not in (attributes.get("style") or "").replace("url(#", "")
    assert "{{ 7 * 7 }}" in parsed.text
    assert "default-src 'none'" in page.read_text(encoding="utf-8")
    alternatives = [attributes["alt"] for tag, attributes in parsed.elements if tag == "img"]
    assert all(FILE.replace(".onnx", ".png") in str(text) for text in alternatives)
    assert len(alternatives) == 2, "of the image that is there"


def test_colours_of_plots_are_those_of_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    light, dark = (set(re.findall(r"--([\w-]+):", part)) for part in text.split("prefers-color-scheme: dark")[:2])
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used <= light
    assert light <= dark
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert drawings
    assert not [found for drawing in drawings for found in re.findall(r"(?:fill|stroke): #\w+", drawing)]
    identifiers = re.findall(r' id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


def positions(svg: str) -> tuple[dict[str, float], list[float]]:
    """Where the numbers of the axis stand, and the x of the markers."""
    axis = {
        text: float(x) for x, text in re.findall(r'<text [^>]*text-anchor: middle[^>]* x="([\d.]+)"[^>]*>([^<]+)<', svg)
    }
    return axis, [
        float(x) for x in re.findall(r'<use x="([\d.]+)" y="[\d.]+" style="fill: var\(--(?:accent|bad)\)"', svg)
    ]


def test_dots_stand_where_the_axis_says() -> None:
    axis, dots = positions(plots.distributions({"a": [10, 20, 30], "b": [40, 50, 90]}).wide)
    (first, left), *_, (last, right) = axis.items()
    scale = (right - left) / (float(last) - float(first))
    assert [float(first) + (dot - left) / scale for dot in dots] == pytest.approx([20, 50], abs=0.1)
    axis, dots = positions(
        plots.errors([plots.Error("a", 1e-3, 1e-2, True), plots.Error("b", 1.0, 1e-2, False)]).narrow
    )
    assert dots == pytest.approx([axis["1e-03"], axis["1e+00"]], abs=0.1)


def test_bars_are_as_long_as_what_they_stand_for(page: Path) -> None:
    svg = plots.bars({"$\\alpha$": [("hue-1", 1.0), ("grey-3", 3.0)], "b": [("hue-1", 2.0)]}, "ms").wide
    assert "$\\alpha$" in svg, "a name is no formula"
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="fill: var\(--(?:hue-1|grey-3)\)', svg)
    ends = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", path)] for path in paths]
    lengths = [max(xs) - min(xs) for xs in ends]
    assert [length / lengths[0] for length in lengths] == pytest.approx([1, 3, 2])
    assert {f"fill: var(--{name})" in page.read_text(encoding="utf-8") for name in ("hue-0", "hue-1", "grey-0")} == {
        True
    }


def test_the_longest_layers_come_first(tmp_path: Path) -> None:
    many = tuple(Layer(name=f"layer {ms}", kind="Conv", block="other", median_ms=ms) for ms in range(1, 21))
    write(ProfileDocument(profiles=[profile(FILE, 4.0, layers=many)]), tmp_path / "profile.json")
    write_html(tmp_path, tmp_path / "report.html")
    rows = [row for row in Parsed((tmp_path / "report.html").read_text(encoding="utf-8")).rows if "Conv" in row]
    assert [row[0] for row in rows] == [f"layer {ms}" for ms in range(20, 5, -1)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [0.0, 0.0], [1e-3, 1e3], [1, 1, 1, 9]])
def test_any_samples_can_be_drawn(values: list[float]) -> None:
    assert plots.distributions({HOSTILE: values, "": values}).wide.count('fill: var(--accent)" href') == 2


@pytest.mark.filterwarnings("error")
def test_errors_of_nothing_and_of_zero_can_be_drawn() -> None:
    errors = [plots.Error("nothing", None, 0.0, False), plots.Error("exact", 0.0, 0.0, True)]
    assert "exact" in plots.errors(errors).wide
    assert "none" in plots.bars({"none": []}, "ms").narrow


def test_pictures_are_few_and_small(tmp_path: Path) -> None:
    images = [draw_image(tmp_path / f"{index}.png", 1500, 2000) for index in range(4)]
    found = tuple(detected(f"candidate {index}", images) for index in range(6))
    document = VerifyDocument(reference="r", comparisons=(comparison("c", 0, 1),), detections=found)
    write(document, tmp_path / "verify.json")
    write_html(tmp_path, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert len(pictures) == 2 * 12
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    shapes = {cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), 1).shape for data in pictures}
    assert shapes == {(560, 420, 3)}


def test_what_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "verify.json", tmp_path / "good.json")
    written = json.loads((folder / "verify.json").read_text(encoding="utf-8"))
    files = {
        "broken.json": (folder / "report.json").read_bytes()[:5000],
        "later.json": json.dumps(written | {"schema": 2}).encode(),
        "lacking.json": json.dumps(written | {"comparisons": [{}]}).encode(),
        "infinite.json": b'{"document": "verify", "reference": "r", "comparisons": [], "x": [1e999]}',
        "other.json": b'{"name": "package"}',
        "times.json": b"[]",
        "text.json": b'"text"',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"a file with a sidecar")
    write_artifact(tmp_path / "model.onnx", "plain")
    found = read_folder(tmp_path)
    assert list(found.documents) == ["good.json"]
    assert len(found.notes) == len(files) + 1
    for note, name in zip(found.notes, sorted([*files, "folder.json"]), strict=True):
        assert name in note
    write_html(tmp_path, tmp_path / "report.html")
    text = Parsed((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert all(name in text for name in files)


def test_a_word_has_no_colour_of_its_own(tmp_path: Path) -> None:
    """Files may have the names of verdicts."""
    document = VerifyDocument(reference="r", comparisons=(comparison("ok", 1, 0.1), comparison("FAILED", 0.01, 0.1)))
    write(document, tmp_path / "verify.json")
    write_html(tmp_path, tmp_path / "report.html")
    elements = Parsed((tmp_path / "report.html").read_text(encoding="utf-8")).elements
    states = [attributes["class"] for tag, attributes in elements if tag == "td" and attributes.get("class")]
    assert [state for state in states if state in ("good", "bad")] == ["bad", "good"]


def test_times_of_trtexec_are_read(tmp_path: Path) -> None:
    times = [{"computeMs": 2.0 + index, "h2dMs": 0, "d2hMs": 0, "latencyMs": 3} for index in range(3)]
    (tmp_path / "times.json").write_text(json.dumps(times), encoding="utf-8")
    write_html(tmp_path, tmp_path / "report.html")
    assert Parsed((tmp_path / "report.html").read_text(encoding="utf-8")).row("times.json", "3.000")


def test_a_folder_with_nothing_to_tell(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no document to report on"):
        write_html(tmp_path, tmp_path / "report.html")
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json is not JSON"):
        write_html(tmp_path, tmp_path / "report.html")
    with pytest.raises(UserError, match="is not a folder"):
        write_html(tmp_path / "a.json", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(folder / "verify.json", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "verify.json" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "new" / "r.html"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema"], printed["documents"]) == (1, ["verify.json"])
    assert Path(printed["file"]).is_file()
    monkeypatch.delitem(sys.modules, "acmix_deploy.report.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(tmp_path)]) == 3
    assert "pip install 'acmix-deploy[report]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Any:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if not (executable := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip(f"no Chromium on the PATH ({', '.join(names)})")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


# What hangs over the right edge of the page, outside of what scrolls; and text too faint or too small to be read.
OVERHANGING = """() => [...document.querySelectorAll('body *')].filter(it => !it.closest('.scroll > *') &&
    it.getBoundingClientRect().right > innerWidth + 1).map(it => it.outerHTML.slice(0, 200))"""
FAINT = """() => {
    const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(it => it / 255).map(it =>
        it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const page = light(getComputedStyle(document.body).backgroundColor);
    return [...document.querySelectorAll('h1, h3, p, a, td, th, li, figcaption, summary, text')].filter(it => {
        const style = getComputedStyle(it), ink = light(it.matches('text') ? style.fill : style.color);
        return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05) < 4.5;
    }).map(it => it.outerHTML.slice(0, 200)); }"""
SCALES = """() => [...document.querySelectorAll('figure svg')].map(it => [it, it.getBoundingClientRect().width]).filter(
    ([it, width]) => width).map(([it, width]) => width / it.viewBox.baseVal.width)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser: Any, page: Path, width: int, scheme: str) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    told, asked = [], []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("dialog", lambda dialog: told.append(dialog.message))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(it => it.open = true)")
    (ROOT / "out").mkdir(exist_ok=True)
    tab.screenshot(path=ROOT / "out" / f"report-{width}-{scheme}.png", full_page=True)
    assert told == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(OVERHANGING) == []
    assert tab.evaluate(FAINT) == []
    scales = tab.evaluate(SCALES)
    assert len(scales) >= 5
    assert min(scales) > 0.95, "text in plots is no smaller than it was drawn"
    assert all(tab.evaluate("[...document.images].map(it => it.naturalWidth > 0)"))
    bright = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(bright) > 600) == (scheme == "light")
    tab.close()
