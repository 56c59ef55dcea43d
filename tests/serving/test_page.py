"""The page of a server in a browser: a picture in, boxes drawn, in dark and light, on a desk and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import shapes
from scripts.load import Picture, known
from tests.serving.parts import TOKEN, Server, serving

pytest.importorskip("uvicorn", reason="uvicorn is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("neither chromium nor google-chrome is on the PATH", allow_module_level=True)

DROP = """([bytes, name, type]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, {type}));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


@pytest.fixture(scope="module")
def picture(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Picture:
    return known(shapes_model, shapes.write(tmp_path_factory.mktemp("drawn"), seed=8, count=1))[0]


@pytest.fixture(scope="module")
def server(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(shapes_model, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


def open_page(browser: Any, url: str, **options: Any) -> Any:
    """The page; it fails the test where a script fails or the browser complains."""
    page = browser.new_page(**options)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.goto(url)
    return page


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_is_dropped_and_its_boxes_are_seen(
    browser: Any, server: Server, picture: Picture, width: int, scheme: str
) -> None:
    page = open_page(browser, server.url, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert not page.locator("#result").is_visible()
    page.evaluate(DROP, [list(picture.data), "drawn.png", "image/png"])
    page.locator("#result").wait_for(state="visible")
    rows = page.locator("#rows tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [[one.name, f"{one.score:.2f}"] for one in picture.detections]
    assert f"{len(rows)} boxes by shapes.fused" in page.locator("#status").inner_text()

    # On the canvas a box's edge has the colour that its row in the table shows.
    for index, one in enumerate(picture.detections[:3]):
        edge = page.evaluate(
            "([box, width]) => { const canvas = document.getElementById('canvas'), zoom = canvas.width / width,"
            " at = canvas.getContext('2d'); const [left, middle] = [box[0] * zoom, (box[1] + box[3]) / 2 * zoom];"
            " return [...at.getImageData(left, middle, 1, 1).data] }",
            [one.box, shapes.SIZE],
        )
        mark = page.locator("#rows i").nth(index).evaluate("mark => getComputedStyle(mark).backgroundColor")
        assert mark == f"rgb({', '.join(map(str, edge[:3]))})"

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for element in page.locator("body *:visible").all():
        box = element.bounding_box()
        if box and element.evaluate("element => element.tagName") not in ("SCRIPT", "STYLE"):
            assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    lightness = page.evaluate("() => getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
    assert (sum(lightness) > 400) == (scheme == "dark")
    assert page.complaints == []
    page.close()


def test_a_picture_is_chosen_and_what_is_none_is_told(browser: Any, server: Server, picture: Picture) -> None:
    page = open_page(browser, server.url)
    page.set_input_files("#file", {"name": "drawn.png", "mimeType": "image/png", "buffer": picture.data})
    page.locator("#result").wait_for(state="visible")
    assert page.locator("#canvas").get_attribute("aria-label").split(", ")[0] == picture.detections[0].name
    assert page.complaints == []
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"<b>no</b>"})
    page.get_by_text("No answer: not a picture").wait_for()
    assert not page.locator("#result").is_visible()
    page.close()


def test_the_token_is_asked_for(browser: Any, shapes_model: Path, tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with serving(shapes_model, tmp_path, "--token-file", str(tmp_path / "token")) as server:
        page = open_page(browser, server.url)
        assert not page.locator("#key").is_visible()
        page.set_input_files("#file", {"name": "drawn.png", "mimeType": "image/png", "buffer": picture.data})
        page.get_by_text("No answer: a token is needed").wait_for()
        page.fill("#token", TOKEN)
        page.click("#key button")
        page.locator("#result").wait_for(state="visible")
        assert not page.locator("#key").is_visible()
        page.close()
