"""The release workflow: its steps, run here as far as they need no network and no GitHub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from acmix_deploy import __version__
from scripts.release import CHANGELOG, main, notes
from tests.scripts.test_package import dist  # noqa: F401  a fixture

CHECKOUT = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((CHECKOUT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
TAG = f"v{__version__}"
DATED = f"# Changelog\n\n## [{__version__}] - 2026-12-01\n\n- It runs.\n\n## [0.0.1] - 2020-01-01\n\n- It began.\n"


def steps(job):
    return {step["name"]: step for step in WORKFLOW["jobs"][job]["steps"] if "run" in step}


def run_step(step, folder, tag=TAG, **environment):
    """A step as a runner runs it; the programs in ``bin`` of the folder come first."""
    given = {"GITHUB_REF_NAME": tag, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(command, check=False, cwd=folder, env=given | environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """What the steps of a release read of a checkout, with a dated changelog and this Python."""
    for name in ("acmix_deploy/__init__.py", "scripts/__init__.py", "scripts/release.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(DATED)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def test_jobs():
    """Built, then installed on every Python that the package names, then attached; no step gives it to an index."""
    jobs = WORKFLOW["jobs"]
    assert list(jobs) == ["build", "install", "attach"]
    assert (jobs["install"]["needs"], jobs["attach"]["needs"]) == ("build", "install")
    assert WORKFLOW[True]["push"]["tags"] == ["v*"]  # YAML 1.1 reads "on" as true
    project = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    pythons = jobs["install"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert [each for each in pythons if f'"Programming Language :: Python :: {each}"' not in project] == []
    ran = " ".join(step["run"] for job in jobs for step in steps(job).values())
    assert "twine upload" not in ran
    for job in jobs.values():
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
    writers = [name for name, job in jobs.items() if job.get("permissions") == {"contents": "write"}]
    assert (WORKFLOW["permissions"], writers) == ({"contents": "read"}, ["attach"])


def test_every_step_is_run_by_a_test():
    assert {name for job in WORKFLOW["jobs"] for name in steps(job)} == {"tag", "dist", "install", "use", "attach"}


def test_tag(checkout):
    step = steps("build")["tag"]
    assert run_step(step, checkout).returncode == 0
    wrong = run_step(step, checkout, "v9.9.9")
    assert wrong.returncode == 2
    assert f"the version in acmix_deploy/__init__.py is {__version__}" in wrong.stderr
    (checkout / "CHANGELOG.md").write_text(DATED.replace("2026-12-01", "Unreleased"))
    assert f"has no heading ## [{__version__}]" in run_step(step, checkout).stderr


def test_dist():
    """The step is a target of make, whose commands tests/scripts/test_package.py runs without isolation."""
    assert steps("build")["dist"]["run"] == "make dist"
    said = subprocess.run(
        ["make", "-n", "-o", ".venv/ready", "dist"], check=True, cwd=CHECKOUT, capture_output=True, text=True
    )
    commands = [line.partition("bin/")[2] for line in said.stdout.splitlines() if "bin/" in line]
    assert commands[-2:] == ["python -m build --outdir dist .", "twine check --strict dist/*"]


@pytest.mark.soak
def test_install(checkout, dist):  # noqa: F811
    """The wheel, with what pip finds for it in an index."""
    shutil.rmtree(checkout / "acmix_deploy")  # the job has no checkout
    (checkout / "dist").mkdir()
    shutil.copy(next(dist.glob("*.whl")), checkout / "dist")
    for name in ("install", "use"):
        done = run_step(steps("install")[name], checkout)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "This machine" in done.stdout


def test_use(checkout):
    """Another version than the tag's ends it."""
    shutil.rmtree(checkout / "acmix_deploy")  # the job has no checkout
    program = checkout / "clean/bin/acmix-deploy"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{CHECKOUT}" exec "{sys.executable}" -m acmix_deploy.cli "$@"\n')
    program.chmod(0o755)
    done = run_step(steps("install")["use"], checkout)
    assert done.returncode == 0, done.stderr
    assert "This machine" in done.stdout
    assert run_step(steps("install")["use"], checkout, "v9.9.9").returncode == 1


def test_attach(checkout):
    """Both files and the notes, by a program that stands for GitHub's."""
    (checkout / "dist").mkdir()
    for name in ("a.whl", "a.tar.gz"):
        (checkout / "dist" / name).touch()
    (checkout / "bin/gh").write_text('#!/bin/sh\necho "$@"\ncat notes.md\n')
    (checkout / "bin/gh").chmod(0o755)
    done = run_step(steps("attach")["attach"], checkout)
    words = f"release create {TAG} dist/a.tar.gz dist/a.whl --verify-tag --title {TAG} --notes-file notes.md"
    assert done.stdout.splitlines() == [words, "- It runs."]
    assert run_step(steps("attach")["attach"], checkout, "v9.9.9").returncode == 2


def test_notes():
    """Of the version before, as the changelog has them."""
    found = notes("v0.1.0", CHANGELOG.read_text(encoding="utf-8"), "0.1.0")
    assert found.startswith("The first release.")
    assert "## [" not in found
    assert main([]) == 2
