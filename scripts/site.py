"""Build the documentation as a site: lay the pages out in build/site, build them into out/site, and check the result.

In the repository pages stand in two folders and link to each other, to pictures and to sources. On the site all pages
are in one folder, beside copies of what else they link to, and links are written to match. Zensical tells of links
between pages that lead nowhere; :func:`problems` looks at the built pages, and so at pictures, raw HTML, the
navigation and the Python interface too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert

import acmix_deploy

ROOT = Path(__file__).resolve().parents[1]
PAGES, SITE = Path("build/site"), Path("out/site")

_RENAMED = {
    "docs/README.md": "index.md",
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "LICENSE": "LICENSE.txt",
}
_LINK = re.compile(r"""(\]\(|\b(?:src|srcset|href)=")([^)"\s]+)""")
_PICTURE = re.compile(
    r"""<picture>\s*<source\s+(?=[^>]*media="\(prefers-color-scheme: (dark|light)\)")[^>]*srcset="([^"]+)"[^>]*>\s*"""
    r"""(<img\s[^>]*src=")([^"]+)("[^>]*>)\s*</picture>"""
)
_CELL = re.compile(r"(?<=`)[^`\n]*\\\|[^`\n]*(?=`)")
_STYLED = re.compile(r"""(?:url\(|@import )\s*["']?((?:https?:)?//[^"')]+)""")
_FORMULA = re.compile(r"""<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>""", re.S)
_CONSOLE = re.compile(r"""<div class="language-(?:console|text) highlight">(?=(.*?)</code>)""", re.S)
_INLINE = re.compile(r"(?<!<span></span>)<code>[^<]*</code>")
_WORD = re.compile(r"(?<=[\s>])(?=[^\s<]*-)[^\s<]{1,32}(?=[\s<])")
_DRAWING = re.compile(r"""<p>((?:<img [^>]*src="([^"#]+\.svg)[^>]*>)+)</p>""")


def main(root: Path = ROOT) -> int:
    lay_out(root)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    built = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if built.returncode:
        print(re.sub(r"\x1b\[[\d;]*m", "", built.stdout), file=sys.stderr)
        return 1
    for file in (root / SITE).glob("*.html"):
        file.write_text(finish(file.read_text(encoding="utf-8")), encoding="utf-8")
    found = [line for line in built.stdout.splitlines() if line.startswith("griffe: ")] + problems(root / SITE)
    for problem in found:
        print(problem, file=sys.stderr)
    if not found:
        print(root / SITE / "index.html")
    return int(bool(found))


def lay_out(root: Path) -> None:
    """Write the pages to build/site, and beside them the files that they link to."""
    shutil.rmtree(root / PAGES, ignore_errors=True)
    (root / PAGES).mkdir(parents=True)
    pages = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for page in (*pages, *root.glob("docs/*.md")):
        name = page.relative_to(root).as_posix()
        target = root / PAGES / place(name)
        target.write_text(adapted(root, name, page.read_text(encoding="utf-8")), encoding="utf-8")
    (root / PAGES / "api.md").write_text(api(), encoding="utf-8")
    shutil.copy(ROOT / "scripts/site.css", root / PAGES)


def place(name: str) -> str:
    """Where a file of the repository is on the site."""
    return _RENAMED.get(name) or name.removeprefix("docs/")


def adapted(root: Path, name: str, text: str) -> str:
    """A page as it is on the site. Files that are no pages are copied when a page links to them."""

    def link(match: re.Match[str]) -> str:
        file, hash_, anchor = match[2].partition("#")
        if not file or urlsplit(file).scheme:
            return match[0]
        file = os.path.normpath(Path(name).parent / file)
        if (root / file).is_file() and not file.endswith(".md"):
            target = root / PAGES / place(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, target)
        return match[1] + place(file) + hash_ + anchor

    def picture(match: re.Match[str]) -> str:
        scheme, theirs, head, ours, tail = match.groups()
        other = "light" if scheme == "dark" else "dark"
        return f"{head}{ours}#only-{other}{tail}{head}{theirs}#only-{scheme}{tail}"

    def cell(match: re.Match[str]) -> str:
        return match[0].replace(r"\|", "|")  # which Python-Markdown would show

    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.M | re.S)
    return "".join(
        part if part.lstrip().startswith("```") else _PICTURE.sub(picture, _CELL.sub(cell, _LINK.sub(link, part)))
        for part in parts
    )


def api() -> str:
    """The page of the Python interface: what ``acmix_deploy.__all__`` names, for mkdocstrings."""
    groups: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": [], "Version": ["__version__"]}
    for name in sorted({*acmix_deploy.__all__} - {"__version__"}, key=str.lower):
        error = acmix_deploy._WHERE[name].startswith("errors:")
        groups["Errors" if error else "Functions" if name.islower() else "Classes"].append(name)
    lines = ["# Python API", "", "All of this is imported from `acmix_deploy`, as [Python](python.md) shows by task."]
    for group, names in groups.items():
        lines += ["", f"## {group}"]
        for name in names:
            module = f"{name}." if find_spec(f"acmix_deploy.{name}") else ""  # of the same name
            lines += ["", f"::: acmix_deploy.{module}{name}"]
    return "\n".join([*lines, ""])


def finish(html: str) -> str:
    """A built page with what Markdown has no words for."""

    def formula(match: re.Match[str]) -> str:  # TeX to MathML, which browsers draw without a script
        drawn = convert(unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")
        return f'<{match[1]} class="arithmatex">{drawn}</{match[1]}>'

    def console(match: re.Match[str]) -> str:  # what the button copies: commands, without prompts and output
        shown = unescape(re.sub(r"<[^>]+>", "", match[1]))
        commands = re.findall(r"^\$ (.*)", shown, re.M)
        return match[0].replace(">", f' data-copy="{escape(chr(10).join(commands))}">') if commands else match[0]

    def code(match: re.Match[str]) -> str:  # a browser breaks lines behind the hyphens of an option
        return _WORD.sub(r'<span class="word">\g<0></span>', match[0])

    def drawing(match: re.Match[str]) -> str:  # a phone shows a part, and by itself the whole
        return f'<p class="drawing"><a href="{match[2]}">{match[1]}</a></p>'

    html = _CONSOLE.sub(console, _INLINE.sub(code, _DRAWING.sub(drawing, html)))
    return _FORMULA.sub(formula, html)


class Page(HTMLParser):
    """What a page is called at, leads to and fetches."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.ids |= {told[name] for name in ("id", "name") if name in told}
        if tag == "a" and "href" in told:
            self.links.append(told["href"].removeprefix("./"))
        elif tag == "link" and "href" in told:
            self.fetched.append(told["href"])
        self.fetched += [told["src"]] if "src" in told else []
        self.fetched += [part.split()[0] for part in told.get("srcset", "").split(",") if part.strip()]


def problems(site: Path) -> list[str]:
    """What is wrong with built pages: links that lead nowhere, pages that no navigation has, and other hosts."""
    pages = {file.name: Page(file) for file in site.glob("*.html")}
    found = []
    for name, page in pages.items():
        for link in (*page.links, *page.fetched):
            scheme, host, path, _, anchor = urlsplit(unquote(link))
            target = path.removeprefix("/") or name
            if scheme or host:
                found += [f"{name}: fetches {link}"] if link in page.fetched and scheme != "data" else []
            elif not (site / target).is_file() or (
                target in pages and anchor and unquote(anchor) not in pages[target].ids
            ):
                found.append(f"{name}: no {link}")
    lost = pages.keys() - {"index.html", "404.html", *pages["index.html"].links}
    found += [f"{name}: not in the navigation of mkdocs.yml" for name in sorted(lost)]
    for file in (*site.glob("*.html"), *site.rglob("*.css")):
        urls = _STYLED.findall(file.read_text(encoding="utf-8"))
        found += [f"{file.relative_to(site)}: fetches {url}" for url in urls]
    return found


if __name__ == "__main__":
    sys.exit(main())
