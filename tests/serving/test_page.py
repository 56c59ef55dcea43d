"""The page of a server in a browser: pictures and a camera in, boxes drawn, dark and light, on a desk and a phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from acmix_deploy import __version__
from scripts import shapes
from scripts.load import Picture, known
from tests.serving.parts import PICTURE, TOKEN, Server, serving

pytest.importorskip("uvicorn", reason="uvicorn is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("neither chromium nor google-chrome is on the PATH", allow_module_level=True)

FAKE_CAMERA = "--use-fake-device-for-media-stream"
ORANGE, BLUE, GREEN = "#e69f00", "#56b4e9", "#009e73"
"""The colours of classes 0, 1 and 2."""

DROP = """files => {
    const data = new DataTransfer();
    for (const [bytes, name, type] of files) data.items.add(new File([new Uint8Array(bytes)], name, {type}));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
}"""

PIXEL = """([x, y, width]) => {
    const canvas = document.getElementById("canvas"), zoom = canvas.width / width;
    const [red, green, blue] = canvas.getContext("2d").getImageData(x * zoom, y * zoom, 1, 1).data;
    return "#" + [red, green, blue].map(value => value.toString(16).padStart(2, "0")).join("");
}"""

WATCH = """
    window.flying = window.most = window.early = 0;
    const ask = fetch, encode = HTMLCanvasElement.prototype.toBlob;
    window.fetch = (...given) => {
        most = Math.max(most, ++flying);
        return ask(...given).finally(() => flying--);
    };
    HTMLCanvasElement.prototype.toBlob = function (...given) { early += flying; return encode.apply(this, given); };
"""
"""Requests that are under way, the most of them at a time, and those that were when a frame was taken."""

REFUSE_CAMERA = "MediaDevices.prototype.getUserMedia = async () => { throw new DOMException('', 'NotReadableError'); }"
SILENT_CAMERA = """
    MediaDevices.prototype.getUserMedia = async () => {
        const canvas = Object.assign(document.createElement("canvas"), {width: 64, height: 48});
        const stream = canvas.captureStream(0);
        window.look = () => { canvas.getContext("2d").fillRect(0, 0, 64, 48); stream.getTracks()[0].requestFrame(); };
        return stream;
    };
"""
LATE_CAMERA = """
    const open = MediaDevices.prototype.getUserMedia;
    MediaDevices.prototype.getUserMedia = async function (...given) {
        const stream = await open.apply(this, given);
        await new Promise(resolve => setTimeout(resolve, 300));
        return window.late = stream;
    };
"""

HURRY = "const wait = setTimeout; window.setTimeout = (work, ms) => wait(work, ms / 20);"
"""What a server says that it needs until it is asked again takes less here."""


@pytest.fixture(scope="module")
def drawn(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    return known(shapes_model, shapes.write(tmp_path_factory.mktemp("drawn"), seed=8, count=6))


@pytest.fixture(scope="module")
def picture(drawn: list[Picture]) -> Picture:
    return drawn[0]


@pytest.fixture(scope="module")
def server(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(shapes_model, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        yield running


@contextmanager
def chromium(driver: Any, *flags: str) -> Iterator[Any]:
    running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *flags])
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser(driver: Any) -> Iterator[Any]:
    with chromium(driver, FAKE_CAMERA, "--use-fake-ui-for-media-stream") as running:
        yield running


@contextmanager
def opened(browser: Any, url: str, *, refused: str = "", script: str = "", **options: Any) -> Iterator[Any]:
    """The page; the test fails where a script does, or where the browser complains of what is not ``refused``."""
    page = browser.new_page(**options)
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    if script:
        page.add_init_script(script)
    page.goto(url)
    yield page
    page.close()
    expected = re.compile(rf"Failed to load resource: .*({refused}).*")
    assert [told for told in complaints if not (refused and expected.fullmatch(told))] == []


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    with opened(browser, server.url, viewport={"width": 1280, "height": 900}) as page:
        page.get_by_text("shapes.fused").wait_for()
        yield page


def choose(page: Any, *files: bytes | tuple[str, bytes]) -> None:
    """Choose pictures, and wait until they are answered."""
    named = [one if isinstance(one, tuple) else (f"{index}.png", one) for index, one in enumerate(files)]
    page.set_input_files("#file", [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in named])
    page.locator("#status", has_text=re.compile(r"pictures? answered")).wait_for()


def answer(page: Any, *detections: dict[str, Any], model: dict[str, Any] | None = None, timing: str = "") -> None:
    """Have the page told this, of a picture of 60 x 40 pixels, and of a model in place of that of the server."""
    told = {
        "document": "model response", "schema": 1, "model": "told", "version": "1", "task": "detect", "width": 64,
        "classes": {"0": "cat", "1": "dog"}, "height": 32, "max_batch": 1, "confidence": 0.25, "max_bytes": 2**26,
    }  # fmt: skip
    image = {
        "width": 60,
        "height": 40,
        "detections": [{"name": "cat", "score": 0.9, "box": [4, 4, 16, 36], **one} for one in detections],
    }
    found = {"document": "detect response", "schema": 1, "model": "told", "images": [image]}
    page.route("**/v1/model", lambda route: route.fulfill(json={**told, **(model or {})}))
    headers = {"server-timing": timing} if timing else {}
    page.route("**/v1/detect", lambda route: route.fulfill(json=found, headers=headers))
    page.reload()


def pixel(page: Any, x: float, y: float, width: int = 60) -> str:
    """Its colour, where the picture is ``width`` pixels wide."""
    colour: str = page.evaluate(PIXEL, [x, y, width])
    return colour


def rows(page: Any) -> list[list[str]]:
    return [row.split("\t") for row in page.locator("#rows tr").all_inner_texts()]


def as_rows(picture: Picture) -> list[list[str]]:
    return [
        [one.name, f"{one.score:.2f}", ", ".join(f"{int(edge + 0.5)}" for edge in one.box)]
        for one in picture.detections
    ]


def assert_fits(page: Any, width: int) -> None:
    """Nothing reaches beyond the window, so that nobody scrolls sideways."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = """(elements, width) => elements.filter(one => !["SCRIPT", "STYLE"].includes(one.tagName))
        .map(one => [one.tagName, one.id, one.getBoundingClientRect()])
        .filter(([tag, id, box]) => box.width && (box.left < 0 || box.right > width))"""
    assert page.locator("body *:visible").evaluate_all(beyond, width) == []


def colours(page: Any, selector: str) -> tuple[list[int], list[int]]:
    """Red, green and blue of a text, and of what is behind it."""
    found: tuple[list[int], list[int]] = page.locator(selector).first.evaluate("""one => {
        const text = getComputedStyle(one).color;
        while (one && /rgba/.test(getComputedStyle(one).backgroundColor)) one = one.parentElement;
        return [text, getComputedStyle(one).backgroundColor].map(colour => colour.match(/\\d+/g).map(Number));
    }""")
    return found


def contrast(one: list[int], other: list[int]) -> float:
    """Source: WCAG 2.2, contrast ratio and relative luminance."""

    def luminance(colour: list[int]) -> float:
        parts = [value / 255 for value in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_is_dropped_and_its_boxes_are_seen(
    browser: Any, server: Server, picture: Picture, width: int, scheme: str
) -> None:
    view = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with opened(browser, server.url, **view) as page:
        page.get_by_text("shapes.fused").wait_for()
        assert not page.locator("#result").is_visible()
        assert_fits(page, width)
        page.evaluate(DROP, [[list(picture.data), "drawn.png", "image/png"]])
        page.get_by_text("1 picture answered").wait_for()
        assert rows(page) == as_rows(picture)
        assert page.locator("#count").inner_text() == f"{len(picture.detections)} found"
        assert page.locator("#caption").inner_text() == "drawn.png, 160 \N{MULTIPLICATION SIGN} 160 pixels"

        # On the canvas a box's edge has the colour that its row in the table shows.
        for index, one in enumerate(picture.detections[:3]):
            edge = pixel(page, one.box[0], (one.box[1] + one.box[3]) / 2, shapes.SIZE)
            mark = page.locator("#rows i").nth(index).evaluate("mark => getComputedStyle(mark).backgroundColor")
            assert mark == f"rgb({', '.join(str(byte) for byte in bytes.fromhex(edge[1:]))})"

        assert_fits(page, width)
        assert (sum(colours(page, "body")[0]) > 400) == (scheme == "dark")
        for selector in ("#about", "summary", ".first", "#camera", "#status", "#caption", "#found th", "#rows td"):
            assert contrast(*colours(page, selector)) >= 4.5, selector  # WCAG 2.2, success criterion 1.4.3


def test_the_model_is_told_before_anything_is_asked(page: Any) -> None:
    about = (
        f"Task detect · input 160 \N{MULTIPLICATION SIGN} 160 pixels · up to 8 in a run · acmix-deploy {__version__}"
    )
    assert page.locator("#about").inner_text() == about
    assert page.title() == "shapes.fused"
    page.get_by_text("6 classes").click()
    assert page.locator("#names li").all_inner_texts() == [f"{i} {name}" for i, name in enumerate(shapes.NAMES)]


def test_many_pictures_and_what_is_none_among_them(browser: Any, server: Server, drawn: list[Picture]) -> None:
    """Each is asked for by itself, so that a broken one spoils no other."""
    markup = "<img src=x onerror=document.title='no'>.png"
    files = [*(one.data for one in drawn[:3]), (markup, b"<b>no</b>"), *(one.data for one in drawn[3:]), b""]
    right = [as_rows(one) for one in drawn]
    with opened(browser, server.url, script=WATCH, refused="415") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        choose(page, *files)
        told = page.locator("#status").inner_text()
        assert told == f"6 pictures answered, 2 refused: {markup}: not a picture in one of JPEG, PNG, WEBP, and others"
        assert [url for url in asked if "detect" in url] == [f"{server.url}/v1/detect"] * len(files)
        assert page.evaluate("most") == 4
        options = page.get_by_role("option")
        assert options.locator("canvas").count() == 6
        assert page.locator("#pictures img").count() == 0
        assert rows(page) == right[0]

        # By keyboard; nothing is asked for again.
        options.first.focus()
        order = [*right[:3], [], *right[3:], []]
        for key, index in (("ArrowRight", 1), ("ArrowDown", 2), ("ArrowRight", 3), ("ArrowRight", 4), ("ArrowUp", 3),
                           ("End", 7), ("ArrowRight", 7), ("Home", 0), ("ArrowLeft", 0)):  # fmt: skip
            page.keyboard.press(key)
            option = options.nth(index)
            playwright.expect(page.locator("#caption")).to_contain_text(option.get_attribute("title").split(":")[0])
            assert option.evaluate("option => option === document.activeElement")
            assert page.locator("[role=option][aria-selected=true]").count() == 1
            assert rows(page) == order[index]
            broken = index in (3, 7)
            assert page.locator("#canvas").is_visible() == page.locator("#steps").is_visible() == (not broken)
            assert page.get_by_text("not a picture in one of").count() == 1 + broken
        page.locator("#file").focus()
        options.nth(5).click()
        playwright.expect(page.locator("#caption")).to_contain_text("5.png")
        page.locator("#rows tr").first.focus()
        page.keyboard.press("ArrowRight")  # from a row too
        playwright.expect(page.locator("#caption")).to_contain_text("6.png")
        assert page.title() == "shapes.fused"

        # Others take their place.
        choose(page, drawn[1].data)
        playwright.expect(page.locator("#caption")).to_contain_text("0.png")
        assert rows(page) == right[1]
        assert not page.locator("#pictures").is_visible()
        assert len([url for url in asked if "detect" in url]) == len(files) + 1


def test_one_picture_that_is_none(browser: Any, server: Server, picture: Picture) -> None:
    with opened(browser, server.url, refused="400|415") as page:
        for data, why in ((b"<b>no</b>", "not a picture in"), (picture.data[:300], "the picture cannot be decoded")):
            choose(page, picture.data)
            assert page.locator("#canvas").is_visible()
            choose(page, data)
            assert why in page.locator("#status").inner_text()
            assert why in page.locator("#problem").inner_text()
            assert rows(page) == []
            assert not page.locator("#canvas").is_visible()


def test_a_picture_of_too_many_bytes_is_not_sent(page: Any) -> None:
    asked: list[str] = []
    answer(page, model={"max_bytes": len(PICTURE)})
    page.on("request", lambda request: asked.append(request.url))
    choose(page, PICTURE, PICTURE + b"x")
    assert page.locator("#status").inner_text().startswith("1 picture answered, 1 refused: 1.png: it is larger than")
    assert len(asked) == 1


def test_a_server_that_has_much_to_do_is_asked_again(browser: Any, server: Server, picture: Picture) -> None:
    with opened(browser, server.url, script=HURRY, refused="429|503") as page:
        statuses = [429, 503]
        page.route("**/v1/detect", lambda route: refuse(route, statuses.pop(0)) if statuses else route.continue_())
        choose(page, picture.data)
        assert rows(page) == as_rows(picture)
        statuses = [429] * 6
        choose(page, picture.data)
        assert page.locator("#status").inner_text() == "0 pictures answered, 1 refused: 0.png: told 429"
        assert len(statuses) == 1


def refuse(route: Any, status: int) -> None:
    route.fulfill(status=status, json={"error": f"told {status}", "request_id": "a"}, headers={"retry-after": "1"})


def test_a_server_that_is_gone_is_told(browser: Any, server: Server, picture: Picture) -> None:
    with opened(browser, server.url, refused="502|net::ERR_FAILED") as page:
        page.route("**/v1/model", lambda route: route.abort())
        page.reload()
        page.get_by_text("No answer: the server does not answer").wait_for()
        page.locator("#file").set_input_files(
            [{"name": f"{index}.png", "mimeType": "image/png", "buffer": picture.data} for index in range(2)]
        )
        page.get_by_text("Not answered yet").wait_for()
        page.unroute("**/v1/model")
        page.get_by_role("option").nth(1).click()
        page.get_by_text("2 pictures answered").wait_for()
        choose(page, picture.data)
        assert rows(page) == as_rows(picture)

        answers: list[Callable[[Any], None]] = [
            lambda route: route.abort(),
            lambda route: route.fulfill(status=502, body="<html>"),
            lambda route: route.fulfill(status=200, body="<html>"),
        ]

        def answer_next(route: Any) -> None:
            answers.pop(0)(route)

        whys = ["the server does not answer", "the server answers with 502", "the server answers with 200"]
        page.route("**/v1/detect", answer_next)
        for why in whys:
            choose(page, picture.data)
            assert page.locator("#status").inner_text() == f"0 pictures answered, 1 refused: 0.png: {why}"


def test_the_slider_filters_without_asking_again(page: Any, picture: Picture) -> None:
    asked: list[str] = []
    choose(page, picture.data)
    page.on("request", lambda request: asked.append(request.url))
    slider, scores = page.get_by_label("Score at least"), [one.score for one in picture.detections]
    assert (slider.get_attribute("min"), slider.input_value(), slider.get_attribute("max")) == ("0.25", "0.25", "1")
    last = picture.detections[-1]
    place = last.box[0], (last.box[1] + last.box[3]) / 2
    with_box = pixel(page, *place, shapes.SIZE)
    for least in (0.5, 0.9, 1.0, 0.25):
        slider.fill(str(least))
        kept = [row for row, score in zip(as_rows(picture), scores, strict=True) if score >= least]
        assert rows(page) == kept
        shown = "" if len(kept) == len(scores) else f", {len(kept)} shown"
        assert page.locator("#count").inner_text() == f"{len(scores)} found{shown}"
        assert page.locator("#least").inner_text() == f"{least:.2f}"
        assert (pixel(page, *place, shapes.SIZE) == with_box) == (last.score >= least)
        names = ", ".join(row[0] for row in kept) or "nothing found"
        assert page.locator("#canvas").get_attribute("aria-label") == names
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#least").inner_text() == "0.26"
    assert asked == []


def test_the_slider_begins_where_the_server_does(page: Any) -> None:
    for confidence, begins in ((0.0, "0"), (0.4, "0.4"), (0.125, "0.12")):
        answer(page, {"score": max(confidence, 0.001)}, model={"confidence": confidence})
        choose(page, PICTURE)
        assert page.get_by_label("Score at least").input_value() == begins
        assert len(rows(page)) == 1


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_a_row_that_is_pointed_at_has_its_box_shown(page: Any, by: str) -> None:
    answer(page, {"box": [4, 4, 16, 36]}, {"box": [40, 4, 56, 36], "name": "dog"}, {"box": [20, 20, 36, 36]})
    choose(page, PICTURE)
    at = [(4, 20), (40, 20), (20, 28)]  # on the left edges
    assert [pixel(page, *place) for place in at] == [ORANGE, BLUE, ORANGE]
    table_rows = page.locator("#rows tr")
    if by == "mouse":
        table_rows.nth(1).hover()
    else:
        table_rows.first.focus()
        page.keyboard.press("ArrowDown")
        assert [row.get_attribute("tabindex") for row in table_rows.all()] == ["-1", "0", "-1"]
    assert pixel(page, *at[1]) == BLUE
    assert ORANGE not in (pixel(page, *at[0]), pixel(page, *at[2]))
    zoom = page.evaluate("canvas.width / canvas.clientWidth * 60 / canvas.width")  # pixels of the picture in one of CSS
    assert pixel(page, 40 + 1.6 * zoom, 20) == BLUE  # twice as wide
    if by == "mouse":
        page.locator("#about").hover()
    else:
        for key, index in (("End", 2), ("ArrowDown", 2), ("Home", 0), ("ArrowUp", 0)):
            page.keyboard.press(key)
            assert table_rows.nth(index).evaluate("row => row === document.activeElement")
        page.get_by_label("Score at least").focus()
    assert [pixel(page, *place) for place in at] == [ORANGE, BLUE, ORANGE]


def test_masks_keypoints_rotated_boxes_and_classes_are_drawn(page: Any) -> None:
    """In their places, in the pixels of the picture."""
    plain = "#777777"  # of a file that the browser cannot show
    square, hole = [[4.0, 4], [28, 4], [28, 36], [4, 36]], [[40.0, 20], [56, 20], [56, 36], [40, 36]]
    answer(page, {"box": [2, 2, 58, 38], "mask": [square, hole]}, model={"task": "segment"})
    choose(page, b"none")
    orange, grey = (bytes.fromhex(colour[1:]) for colour in (ORANGE, plain))
    blend = "#" + bytes(round(0.4 * a + 0.6 * b) for a, b in zip(orange, grey, strict=True)).hex()
    for place in ((16, 20), (48, 28)):
        inside = bytes.fromhex(pixel(page, *place)[1:])
        assert max(abs(a - b) for a, b in zip(inside, bytes.fromhex(blend[1:]), strict=True)) <= 1
    assert (pixel(page, 48, 12), pixel(page, 34, 20)) == (plain, plain)
    assert (pixel(page, 4, 20), pixel(page, 40, 28), pixel(page, 2, 20)) == (ORANGE, ORANGE, ORANGE)

    points = [[20.0, 10.0, 0.9], [40.0, 10.0, 0.2], [30, 30, 0.51]]
    answer(page, {"box": [2, 2, 58, 38], "keypoints": points}, {"box": [2, 2, 58, 38], "keypoints": [[10.0, 20.0]]},
           model={"task": "pose"})  # fmt: skip
    choose(page, b"none")
    assert [pixel(page, *point[:2]) for point in points] == [ORANGE, plain, ORANGE]
    assert pixel(page, 10, 20) == ORANGE

    corners = [[30.0, 5.0], [50.0, 20.0], [30.0, 35.0], [10.0, 20.0]]
    answer(page, {"name": "dog", "box": [10, 5, 50, 35], "corners": corners}, model={"task": "obb"})
    choose(page, b"none")
    edges = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in zip(corners, [*corners[1:], corners[0]], strict=True)]
    for edge in edges:  # slanted ones are smooth
        found = bytes.fromhex(pixel(page, *edge)[1:])
        assert max(abs(a - b) for a, b in zip(found, bytes.fromhex(BLUE[1:]), strict=True)) < 30
    assert [pixel(page, x, y) for x, y in ((10, 30), (50, 30), (30, 20), (45, 34.9))] == [plain] * 4

    told = [{"name": name, "score": score, "box": [0, 0, 60, 40]} for name, score in (("dog", 0.7), ("cat", 0.2))]
    answer(page, *told, model={"task": "classify", "confidence": 0})
    choose(page, b"none")
    assert [row[:2] for row in rows(page)] == [["dog", "0.70"], ["cat", "0.20"]]
    labels = [pixel(page, 2 * 60 / 960, y * 60 / 960) for y in range(4, 60)]
    assert {BLUE, ORANGE} <= {*labels}  # one below the other


def test_nothing_found(page: Any) -> None:
    answer(page)
    choose(page, PICTURE)
    assert page.locator("#count").inner_text() == "Nothing found"
    assert rows(page) == []
    assert page.locator("#canvas").get_attribute("aria-label") == "nothing found"


def test_names_are_texts(page: Any) -> None:
    name = "<img src=x onerror=\"document.title='no'\"><b>&amp;"
    classes = {"0": name, "1": "</script><script>document.title='no'</script>"}
    answer(page, {"name": name, "box": [4, 4, 16, 36]}, model={"model": name, "classes": classes})
    choose(page, (name, PICTURE), (name, PICTURE))
    assert page.title() == name
    assert rows(page)[0][0] == page.locator("h1").inner_text() == name
    page.get_by_text("2 classes").click()
    assert page.locator("#names li").all_inner_texts() == [f"{index} {text}" for index, text in classes.items()]
    assert page.locator("img, b, body script:not(:last-of-type)").count() == 0


def test_classes_without_names_and_longer_ones_fit(page: Any) -> None:
    many = {"classes": {str(index): "a long name of a class " * 4 + str(index) for index in range(200)}}
    boxes = [{"name": "7", "box": [4, 4, 16, 36]}, {"name": "8", "box": [3000, 3000, 4000, 4000]}]
    for model, names in (({"classes": {}}, False), (many, True)):
        answer(page, *boxes, *[{"name": "x" * 300, "box": [1, 1, 9, 9]}] * 100, model={"model": "m" * 200, **model})
        choose(page, *[("n" * 200 + ".png", PICTURE)] * 40)
        assert page.locator("#classes").is_visible() == names
        if names:
            page.get_by_text("200 classes").click()
        colours = page.locator("#rows i").evaluate_all("all => all.slice(0, 2).map(mark => mark.style.background)")
        assert colours == ["rgb(230, 159, 0)", "rgb(86, 180, 233)"]  # as of classes 0 and 1
        for width in (390, 768, 769, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert_fits(page, width)


def times(page: Any) -> dict[str, float]:
    found = [row.split("\t") for row in page.locator("#steps tr").all_inner_texts()]
    return {row[0]: float(row[-1].removesuffix(" ms")) for row in found}


def test_the_time_of_each_step_is_seen(page: Any, picture: Picture) -> None:
    choose(page, picture.data)
    found = times(page)
    assert [*found] == ["read the request", "decode", "wait for a run", "to the model and back",
        "fit to its input", "model", "boxes of its output",
                        "write the answer", "network, browser", "round trip"]  # fmt: skip
    *parts, trip = found.values()
    assert trip == pytest.approx(sum(parts), abs=0.5)
    assert 1 < found["model"] < trip

    answer(page, timing='decode;dur=1.25, db;desc="a, b";dur=2, run;dur=30.04, another;dur=1, cached')
    choose(page, PICTURE)
    found = times(page)
    assert [*found.items()][:3] == [("decode", 1.3), ("model", 30.0), ("another", 1)]
    answer(page)
    choose(page, PICTURE)
    assert [*times(page)] == ["network, browser", "round trip"]

    answer(page, timing="decode;dur=5, model;dur=60000")  # as of a clock that is wrong
    choose(page, PICTURE)
    bars = page.locator("#steps div").evaluate_all("all => all.map(bar => bar.style.width)")
    assert (times(page)["network, browser"], bars[1]) == (0, "100%")
    assert_fits(page, 1280)


def test_the_token_is_asked_for(browser: Any, shapes_model: Path, tmp_path: Path, drawn: list[Picture]) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with (
        serving(shapes_model, tmp_path, "--token-file", str(tmp_path / "token")) as server,
        opened(browser, server.url, refused="401") as page,
    ):
        page.get_by_text("No answer: a token is needed").wait_for()
        page.set_input_files("#file", [{"name": "a", "mimeType": "", "buffer": one.data} for one in drawn[:2]])
        page.get_by_label("Token").fill(TOKEN + "x")
        page.keyboard.press("Enter")
        page.wait_for_timeout(200)
        assert page.locator("#key").is_visible()
        assert "shapes" not in page.inner_text("body")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Use this token").click()
        page.get_by_text("2 pictures answered").wait_for()
        assert rows(page) == as_rows(drawn[0])
        assert not page.locator("#key").is_visible()

        page.evaluate("document.getElementById('token').value = 'another one'")
        page.set_input_files("#file", [{"name": "a", "mimeType": "", "buffer": one.data} for one in drawn[:2]])
        page.locator("#key").wait_for()
        page.get_by_label("Token").fill(TOKEN)
        page.keyboard.press("Enter")
        page.get_by_text("2 pictures answered").wait_for()


def test_a_camera_is_looked_through(browser: Any, server: Server, drawn: list[Picture]) -> None:
    with opened(browser, server.url, script=WATCH + HURRY, refused="429|503") as page:
        caption = page.locator("#caption")
        choose(page, drawn[0].data, drawn[1].data)
        page.evaluate("most = early = 0, performance.clearResourceTimings()")
        page.get_by_role("button", name="Start the camera").click()
        playwright.expect(caption).to_have_text(re.compile(r"Camera: [1-9][\d.]* images per second, 640 . 480 pixels"))
        # A disc on green, with squares in the corners, and a clock
        playwright.expect(page.locator("#rows")).to_contain_text("circle")
        assert page.locator("[aria-selected=true]").count() == 0
        first = page.evaluate("canvas.toDataURL()")
        page.wait_for_function("first => canvas.toDataURL() !== first", arg=first)
        page.wait_for_function("() => performance.getEntriesByType('resource').length > 7")
        found = times(page)
        assert next(iter(found)) == "JPEG in the browser"
        *parts, trip = [*found.values()][1:]
        assert trip == pytest.approx(sum(parts), abs=0.5)
        told, ends = page.evaluate("""() => [parseFloat(document.getElementById("caption").textContent.split(": ")[1]),
            performance.getEntriesByType("resource").map(entry => entry.responseEnd).slice(-20)]""")
        assert told == pytest.approx(1e3 * (len(ends) - 1) / (ends[-1] - ends[0]), rel=0.3)
        assert page.evaluate("[most, early]") == [1, 0]  # a frame is taken when the last one is answered

        # What is refused is told once and counted, and it goes on.
        statuses = [429, 503, 503]
        page.route("**/v1/detect", lambda route: refuse(route, statuses.pop(0)) if statuses else route.continue_())
        playwright.expect(caption).to_contain_text(re.compile("without an answer 1 . 429, 2 . 503"))
        assert page.locator("#status").inner_text() == "Frames stay without an answer: told 503"
        playwright.expect(page.locator("#rows")).to_contain_text("circle")
        page.unroute("**/v1/detect")

        # A row that is pointed at stays so from a frame to the next, and the slider filters.
        page.locator("#rows tr").first.focus()
        page.wait_for_timeout(300)
        assert page.locator("#rows tr:focus").count() == 1
        page.get_by_label("Score at least").fill("1")
        assert rows(page) == []
        page.get_by_label("Score at least").fill("0.25")

        page.get_by_role("button", name="Stop the camera").click()
        assert page.evaluate("document.getElementById('video').srcObject") is None
        page.wait_for_timeout(200)
        before = page.evaluate("performance.getEntriesByType('resource').length")
        page.wait_for_timeout(300)
        assert page.evaluate("performance.getEntriesByType('resource').length") == before

        # A picture ends it too.
        page.get_by_role("button", name="Start the camera").click()
        playwright.expect(caption).to_contain_text("images per second")
        page.get_by_role("option").nth(1).click()
        playwright.expect(caption).to_contain_text("1.png")
        assert rows(page) == as_rows(drawn[1])
        page.get_by_role("button", name="Start the camera").wait_for()
        assert page.evaluate("flying") == 0


def test_a_camera_that_is_unplugged_and_pictures_that_were_not_answered(
    browser: Any, server: Server, drawn: list[Picture]
) -> None:
    with opened(browser, server.url) as page:
        held: list[Any] = []

        def hold_two(route: Any) -> None:
            held.append(route) if len(held) < 2 else route.continue_()

        page.get_by_text("shapes.fused").wait_for()
        page.route("**/v1/detect", hold_two)
        page.set_input_files("#file", [{"name": "a", "mimeType": "", "buffer": one.data} for one in drawn[:2]])
        page.get_by_text("Looking ...").wait_for()
        page.get_by_role("button", name="Start the camera").click()
        playwright.expect(page.locator("#caption")).to_contain_text("images per second")
        page.evaluate("document.getElementById('video').srcObject.getTracks()[0].dispatchEvent(new Event('ended'))")
        page.get_by_text("The camera is gone: it was unplugged").wait_for()
        page.get_by_role("button", name="Start the camera").wait_for()
        page.get_by_role("option").nth(1).click()
        page.get_by_text("2 pictures answered").wait_for()
        assert rows(page) == as_rows(drawn[1])


def test_a_camera_that_is_stopped_before_it_is_there(browser: Any, server: Server) -> None:
    with opened(browser, server.url, script=LATE_CAMERA) as page:
        asked: list[str] = []
        page.get_by_text("shapes.fused").wait_for()
        page.on("request", lambda request: asked.append(request.url))
        page.get_by_role("button", name="Start the camera").click()
        page.get_by_text("Waiting for the camera").wait_for()
        page.get_by_role("button", name="Stop the camera").click()
        page.wait_for_function("() => window.late && late.getTracks().every(track => track.readyState === 'ended')")
        assert page.get_by_role("button", name="Start the camera").is_visible()
        assert asked == []


def test_a_camera_that_is_on_and_gives_no_images_is_told(browser: Any, server: Server) -> None:
    with opened(browser, server.url, script=SILENT_CAMERA) as page:
        page.get_by_role("button", name="Start the camera").click()
        page.get_by_text("The camera is on and gives no images").wait_for()
        page.evaluate("window.gives = setInterval(look, 50)")
        playwright.expect(page.locator("#caption")).to_contain_text("images per second")
        playwright.expect(page.locator("#status")).to_be_empty()
        page.evaluate("clearInterval(gives)")
        page.get_by_text("The camera is on and gives no images").wait_for()
        page.get_by_role("button", name="Stop the camera").click()
        playwright.expect(page.locator("#status")).to_be_empty()


@pytest.mark.parametrize(
    ("flags", "script", "why"),
    [
        ([FAKE_CAMERA, "--use-fake-ui-for-media-stream=deny"], "", "it is not allowed"),
        ([FAKE_CAMERA + "=device-count=0", "--use-fake-ui-for-media-stream"], "", "there is none"),
        ([], "delete Navigator.prototype.mediaDevices", "browsers give it to pages from https"),
        ([], REFUSE_CAMERA, "another program has it"),
    ],
    ids=["denied", "none", "no https", "in use"],
)
def test_why_there_is_no_camera_is_told(driver: Any, server: Server, flags: list[str], script: str, why: str) -> None:
    with chromium(driver, *flags) as browser, opened(browser, server.url, script=script) as page:
        page.get_by_role("button", name="Start the camera").click()
        page.get_by_text(f"No camera: {why}").wait_for()
        assert page.get_by_role("button", name="Start the camera").is_visible()


def test_all_is_reached_by_keyboard_and_seen_where_it_is(page: Any, drawn: list[Picture]) -> None:
    choose(page, drawn[0].data, drawn[1].data)
    reached = []
    page.locator("body").click(position={"x": 1, "y": 1})
    for _ in range(6):
        page.keyboard.press("Tab")
        name, outline = page.evaluate("""() => {
            const one = document.activeElement, style = getComputedStyle(one.closest("label") || one);
            return [one.id || one.role || one.localName, style.outlineStyle + " " + style.outlineWidth];
        }""")
        reached.append(name)
        assert outline == "solid 3px", name
    assert reached == ["summary", "file", "camera", "score", "option", "tr"]
    for role, name in (("button", "Choose pictures"), ("slider", "Score at least"), ("listbox", "Pictures"),
                       ("option", "0.png"), ("heading", "shapes.fused"), ("table", "8 found")):  # fmt: skip
        assert page.get_by_role(role, name=name).count() == 1, name


def test_what_the_page_may_do(server: Server) -> None:
    """Its own inline script and style, requests to its own server, and pictures; the camera, and no microphone."""
    answered = server.client.get("/")
    assert answered.headers["content-security-policy"] == (
        "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert answered.headers["permissions-policy"] == "camera=(self), microphone=(), geolocation=()"
    assert not re.search(r"https?://|@import|innerHTML", answered.text)
