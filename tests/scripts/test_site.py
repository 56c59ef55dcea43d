"""The documentation as a site: built once, then looked at, and broken in every way that `make site` has to notice."""

from __future__ import annotations

import inspect
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import acmix_deploy
from tests import ROOT
from tests.scripts.test_docs import anchors

pytest.importorskip("zensical", reason="needs zensical, for Python 3.11 or newer")
from scripts import site


def copy_to(root: Path) -> Path:
    """A checkout whose pages may be changed."""
    for name in ("docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, root / name)
    for path in ROOT.iterdir():
        if path.name not in ("build", "out") and not path.name.startswith(".") and not (root / path.name).exists():
            (root / path.name).symlink_to(path)
    return root


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_to(tmp_path_factory.mktemp("site"))
    assert site.main(root) == 0
    return root / site.SITE


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A site of two pages without problems."""
    (tmp_path / "index.html").write_text(
        '<a href="./cli.html"></a><a href="cli.html#x-y"></a><img src="a/b.svg#only-dark">'
    )
    (tmp_path / "cli.html").write_text('<a href="https://a.b/c"></a><h1 id="x-y"></h1><a href="a/b.svg"></a>')
    (tmp_path / "404.html").write_text('<a href="/index.html"></a>')
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.svg").write_text("")
    (tmp_path / "a/c.css").write_text('a{background:url("data:image/svg+xml,http://www.w3.org")}')
    return tmp_path


def test_every_page_of_the_documentation_is_there(built: Path) -> None:
    pages = {path.stem for path in ROOT.glob("docs/*.md")} - {"README"}
    assert {path.stem for path in built.glob("*.html")} == pages | {
        "index", "overview", "api", "contributing", "changes", "404",
    }  # fmt: skip
    assert (built / "plugins/resources.csv").read_bytes() == (ROOT / "plugins/resources.csv").read_bytes()
    assert (built / "schemas/export.json").is_file()


def test_broken_pages_do_not_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = copy_to(tmp_path)
    monkeypatch.setattr(site, "api", lambda: "# Takes the longest\n")
    with (root / "docs/verify.md").open("a", encoding="utf-8") as page:
        page.write("\n[a](gone.md), [b](cli.md#gone-too), [c](../scripts/gone.py)\n")
    (root / "docs/report.md").unlink()
    assert site.main(root) == 1
    told = capfd.readouterr().err
    for name in ("gone.md", "cli.md#gone-too", "report.md"):
        assert name in told


def test_a_name_that_does_not_exist_does_not_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = copy_to(tmp_path)
    shutil.rmtree(root / "docs")
    (root / "docs").mkdir()
    monkeypatch.setattr(acmix_deploy, "__all__", ["UserError", "gone"])
    monkeypatch.setitem(acmix_deploy._WHERE, "gone", "errors:gone")
    assert site.main(root) == 1
    assert "acmix_deploy.gone" in capfd.readouterr().err


def test_nothing_is_told_of_what_is_right(small: Path) -> None:
    assert site.problems(small) == []


@pytest.mark.parametrize(
    ("html", "told"),
    [
        ('<a href="gone.html">x</a>', "no gone.html"),
        ('<a href="cli.html#gone">x</a>', "no cli.html#gone"),
        ('<a href="#gone">x</a>', "no #gone"),
        ('<a href="a">x</a>', "no a"),
        ('<img src="gone.svg">', "no gone.svg"),
        ('<img src="a/b.svg" srcset="a/b.svg 1x, gone.svg 2x">', "no gone.svg"),
        ('<img src="https://a.b/c.svg">', "fetches https://a.b/c.svg"),
        ('<script src="https://a.b/c.js"></script>', "fetches https://a.b/c.js"),
        ('<link rel="stylesheet" href="//a.b/c.css">', "fetches //a.b/c.css"),
        ('<style>@import "https://a.b/c.css"</style>', "fetches https://a.b/c.css"),
        ('<i style="background: url(//a.b/c.png)"></i>', "fetches //a.b/c.png"),
    ],
)
def test_broken_html_is_told(small: Path, html: str, told: str) -> None:
    with (small / "cli.html").open("a") as page:
        page.write(html)
    assert site.problems(small) == [f"cli.html: {told}"]


def test_a_page_outside_the_navigation_is_told(small: Path) -> None:
    (small / "lost.html").write_text("")
    assert site.problems(small) == ["lost.html: not in the navigation of mkdocs.yml"]


def test_a_font_of_another_host_is_told(small: Path) -> None:
    (small / "a/c.css").write_text('@font-face{src:url("https://a.b/c.woff2")}')
    assert site.problems(small) == ["a/c.css: fetches https://a.b/c.woff2"]


def test_links_and_pictures_are_written_to_match(tmp_path: Path) -> None:
    for name in ("docs/a/dark.svg", "docs/a/light.svg", "plugins/x.csv", "LICENSE"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    page = """[a](../CONTRIBUTING.md#tests) [b](../plugins/x.csv) [c](other.md) [d](https://a.b/c.md) [e](#x)
[f](../README.md) [g](../LICENSE)
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="a/dark.svg">
  <img alt="A" src="a/light.svg" width="9">
</picture>

```text
[b](../plugins/x.csv)
```
"""
    found = site.adapted(tmp_path, "docs/page.md", page)
    assert (
        found
        == """[a](contributing.md#tests) [b](plugins/x.csv) [c](other.md) [d](https://a.b/c.md) [e](#x)
[f](overview.md) [g](LICENSE.txt)
<img alt="A" src="a/light.svg#only-light" width="9"><img alt="A" src="a/dark.svg#only-dark" width="9">

```text
[b](../plugins/x.csv)
```
"""
    )
    copied = {path.relative_to(tmp_path / site.PAGES).as_posix() for path in (tmp_path / site.PAGES).rglob("*.*")}
    assert copied == {"a/dark.svg", "a/light.svg", "plugins/x.csv", "LICENSE.txt"}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_a_page_is_the_same_in_a_repository(built: Path, name: str) -> None:
    """Markdown is read by two readers with rules of their own; CommonMark's is that of a repository."""
    shown = (built / site.place(name)).with_suffix(".html").read_text(encoding="utf-8")
    article = shown.partition("<article")[2].partition("</article>")[0]
    article = re.sub(r"<img[^>]*#only-dark[^>]*>", "", article)  # a picture for both colours is one with a choice there
    there = MarkdownIt("commonmark").enable("table").render((ROOT / name).read_text(encoding="utf-8"))

    def tags(html: str) -> Counter[str]:
        return Counter(re.findall(r"<(li|tr|pre|h[1-6]|ol|ul|img|blockquote)\b", html))

    def codes(html: str) -> Counter[str]:
        found = re.findall(r"<code[^>]*>(.*?)</code>", html, re.S)
        return Counter(" ".join(unescape(re.sub(r"<[^>]+>", "", code)).split()) for code in found)

    assert tags(article) == tags(there)
    assert codes(article) == codes(there)
    assert anchors(ROOT / name) == set(re.findall(r'<h[1-6] id="([^"]*)"', article))


@pytest.mark.parametrize(
    ("built", "finished"),
    [
        (
            '<div class="language-console highlight"><pre><span></span><code><span class="gp">$ </span>a<span> </span>'
            "&quot;b&quot; &gt;<span>c</span>\n<span class='go'>so $ it is</span>\n$ d\n</code></pre></div>",
            '<div class="language-console highlight" data-copy="a &quot;b&quot; &gt;c\nd"><pre>',
        ),
        (
            '<div class="language-text highlight"><pre><span></span><code>a --b\n</code></pre></div>',
            '<div class="language-text highlight"><pre><span></span><code>a --b\n</code></pre></div>',
        ),
        ("<code>--a b a-c</code>", '<code><span class="word">--a</span> b <span class="word">a-c</span></code>'),
        (f"<code>{'a-' * 20}</code>", f"<code>{'a-' * 20}</code>"),
        ('<p><img alt="" src="a.svg" /></p>', '<p class="drawing"><a href="a.svg"><img alt="" src="a.svg" /></a></p>'),
        ('<p><img alt="" src="a.webp" /></p>', '<p><img alt="" src="a.webp" /></p>'),
    ],
)
def test_a_page_is_finished(built: str, finished: str) -> None:
    assert site.finish(built).startswith(finished)


def fields(value: type) -> set[str]:
    """Of a Pydantic model, a dataclass or a named tuple, without those of its base."""
    return {name for name in vars(value).get("__annotations__", ()) if name[0] != "_"}


def section(page: str, name: str) -> str:
    """What the page has of a name, as text."""
    alias = rf'<h[23] id="acmix_deploy\.(?:{name}\.)?{name}"'
    html = re.split(r"(?=<h[23] id=)", page)
    (found,) = (part for part in html if re.match(alias, part))
    return " ".join(unescape(re.sub(r"<[^>]+>", "", found)).split())


@pytest.mark.parametrize("name", acmix_deploy.__all__)
def test_the_interface_is_described(built: Path, name: str) -> None:
    page = (built / "api.html").read_text(encoding="utf-8")
    text = section(page, name)
    if name == "__version__":
        return
    value = getattr(acmix_deploy, name)
    summary = re.sub(r":\w+:`~?([^`]*)`|`+", r"\1", (inspect.getdoc(value) or "").partition("\n\n")[0])
    assert summary
    assert " ".join(summary.split()) in text
    expected = {*inspect.signature(value).parameters} if inspect.isfunction(value) else fields(value)
    missing = {word for word in expected if not re.search(rf"\b{word}\b", text)}
    assert not missing
    assert not re.search(r":(func|meth|class|data|attr|mod):|\b(Args|Raises|Returns):\n|``", text)


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Quiet, directory=built)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (executable := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield running
        running.close()


def test_a_search_finds_and_nothing_else_is_asked(browser: Any, address: str) -> None:
    with browser.new_page() as page:
        hosts = set()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        for seconds in (0.5, 2, 8):  # until results are there, and in order, of which this takes the first
            page.goto(f"{address}/index.html")
            page.get_by_role("button", name="Search").click()
            page.wait_for_function("document.activeElement?.tagName === 'DIV'")  # a closed shadow root
            page.keyboard.type("calibration")
            page.wait_for_timeout(1000 * seconds)
            page.keyboard.press("Enter")
            page.wait_for_timeout(500 * seconds)
            if "int8.html" in page.url:
                break
        assert re.search(r"/int8\.html\?.*#calibration$", page.url)
        for name in ("api", "cli", "mathematics", "pictures"):
            page.goto(f"{address}/{name}.html")
        assert hosts == {address.removeprefix("http://")}


def test_what_is_copied_runs(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(f"{address}/cli.html#fuse")
    block = page.locator("#fuse ~ .language-console").first
    shown = block.locator("code").inner_text().splitlines()
    assert {line[:15] for line in shown} == {"$ acmix-deploy "}
    block.get_by_role("button").click()
    page.get_by_text("Copied to clipboard").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").splitlines() == [line[2:] for line in shown]
    page.context.close()


def test_a_phone_shows_no_empty_titles_and_no_torn_option(browser: Any, address: str) -> None:
    with browser.new_page(viewport={"width": 390, "height": 844}) as page:
        page.goto(f"{address}/devices.html")
        shown = [head.is_visible() for head in page.locator("thead").all() if not head.inner_text().strip()]
        assert shown
        assert not any(shown)
        page.goto(f"{address}/cli.html")
        assert page.locator("thead").first.is_visible()
        torn = "words => words.filter(word => word.getClientRects().length > 1).map(word => word.innerText)"
        assert page.locator(".word").count() > 100
        assert page.locator(".word").evaluate_all(torn) == []


@pytest.mark.parametrize("system", ["light", "dark"])
def test_colours_follow_the_system_and_the_toggle_and_pictures_do_too(browser: Any, address: str, system: str) -> None:
    shown = """() => {
        const image = kind => getComputedStyle(document.getElementById(kind)).display !== 'none'
        return [getComputedStyle(document.body).colorScheme, image('light'), image('dark')]
    }"""
    images = "".join(f'<img id="{kind}" src="path.svg#only-{kind}">' for kind in ("light", "dark"))
    with browser.new_page(color_scheme=system) as page:
        page.goto(f"{address}/index.html")
        page.evaluate("html => document.querySelector('article').insertAdjacentHTML('beforeend', html)", images)
        assert page.evaluate(shown) == [system, system == "light", system == "dark"]
        seen = []
        for title in ("Switch to light", "Switch to dark", "Follow the system"):
            page.get_by_title(title).click()
            seen.append(page.evaluate(shown))
        assert seen == [["light", True, False], ["dark", False, True], [system, system == "light", system == "dark"]]


def test_nothing_hangs_over_the_edge_of_a_phone(browser: Any, address: str, built: Path) -> None:
    with browser.new_page(viewport={"width": 390, "height": 844}) as page:
        for file in built.glob("*.html"):
            page.goto(f"{address}/{file.name}")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), file.name
