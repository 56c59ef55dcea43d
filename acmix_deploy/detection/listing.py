"""Which image files are meant by a folder, by the YAML file of a data set, or by a text file that lists them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acmix_deploy.errors import MissingComponent, UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_SPLITS = ("val", "validation", "train")  # the first that is there
_DATASETS = ("", "datasets", "../datasets")  # where Ultralytics keeps data sets, from the folder that one works in


def listed(source: Path) -> list[Path]:
    """The files that look like images by their suffix, in the order of their paths.

    Args:
        source: a folder, without those below it where it holds an image itself; the YAML file of a data set, of which
            the images of ``val`` count, else of ``train``: folders with all below them, text files, or a list of these,
            beneath ``path``, as Ultralytics reads it; or a text file with a path on each line, ``./`` being its folder.

    Raises:
        UserError: there is no such thing, or it does not say where images are.
        MissingComponent: the package that reads YAML is not installed.
    """
    if source.is_dir():
        return in_folder(source) or _below(source)
    if source.is_file() and source.suffix.lower() in (".yaml", ".yml"):
        return sorted(path for place in _of_data_set(source) for path in _beneath(place))
    if source.is_file() and source.suffix.lower() == ".txt":
        return sorted(_beneath(source))
    raise UserError(
        f"{source} is not a folder, nor a data set's .yaml, nor a .txt that lists images",
        "Give the folder that the images lie in.",
    )


def in_folder(folder: Path) -> list[Path]:
    """The files of a folder itself that look like images by their suffix, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _below(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(found)


def _beneath(place: Path) -> Iterator[Path]:
    """The images that a folder holds or that a text file lists."""
    if place.is_dir():
        yield from _below(place)
        return
    try:
        lines = place.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{place} is neither a folder nor a list of images: {error}") from error
    for line in filter(None, map(str.strip, lines)):
        path = place.parent / line if line.startswith("./") or not Path(line).exists() else Path(line)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


def _of_data_set(file: Path) -> list[Path]:
    """The folders and lists of images that a data set's YAML file names."""
    data = _yaml(file)
    split = next((name for name in _SPLITS if isinstance(data, dict) and data.get(name)), None)
    if split is None:
        raise UserError(
            f"{file} names no images: it has neither {' nor '.join(_SPLITS)}", "Give the YAML file of a data set."
        )
    named = data[split] if isinstance(data[split], list) else [data[split]]
    root = str(data.get("path") or "")
    roots = [folder / root for folder in (*map(Path, _DATASETS), file.parent)] if root else [file.parent]
    found = []
    for entry in map(str, named):
        tried = [root / name for root in roots for name in (entry, entry.removeprefix("../"))]
        place = next((place for place in tried if place.exists()), None)
        if place is None:
            looked = ", ".join(dict.fromkeys(str(place) for place in tried))
            raise UserError(
                f"{file} names {split}: {entry}, which is not there (looked for {looked})",
                "Download the data set, or mend its path. Nothing is downloaded here.",
            )
        found.append(place)
    return found


def _yaml(file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingComponent(
            "reading a data set's YAML file needs PyYAML, which is not installed",
            "Run: pip install 'acmix-deploy[images]', or give the folder of images itself.",
        ) from error
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
