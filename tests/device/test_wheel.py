"""The wheel of this version that is sent to a device."""

from __future__ import annotations

import zipfile

from acmix_deploy.device import wheel


def test_beside_what_setuptools_leaves(tmp_path, monkeypatch):
    """In a clone `pip install .` makes a folder that Python finds before the package that is installed."""
    folder = tmp_path / "clone/acmix_deploy.egg-info"
    folder.mkdir(parents=True)
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: acmix-deploy\nVersion: 7\nRequires-Dist: seven\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    wheel.write_wheel(tmp_path / wheel.NAME)
    with zipfile.ZipFile(tmp_path / wheel.NAME) as archive:
        described = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "Requires-Dist: seven" in archive.read(described).decode()
