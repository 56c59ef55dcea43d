"""What a program prints, how it ended, and that it ends with whoever waits for it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from acmix_deploy.errors import MissingComponent
from acmix_deploy.process import importing_here, run


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


@pytest.mark.parametrize("streamed", [False, True])
def test_what_a_program_prints_and_how_it_ends(streamed: bool) -> None:
    heard: list[str] = []
    each_line = heard.append if streamed else None
    echo = "import sys; print(sys.stdin.read()); print('more'); sys.stderr.write('a\\nlast\\n\\n'); sys.exit(3)"
    done = run(python(echo), "given", each_line=each_line)
    assert (done.code, done.stdout, done.last_words, done.how) == (3, "given\nmore\n", "last", "exit code 3")
    assert heard == (["given\n", "more\n"] if streamed else [])
    for signal in ("SIGKILL", "SIGSEGV"):
        killed = run(
            python(f"import os, signal; os.kill(os.getpid(), signal.{signal})"), "x" * 10**6, each_line=each_line
        )
        assert (killed.how, killed.killed) == (signal, signal == "SIGKILL")
        assert killed.last_words == "nothing on stderr"
    filled = "import sys; sys.stderr.buffer.write(b'\\xff' * 10**6); print('end')"
    assert run(python(filled), each_line=each_line).stdout == "end\n", "neither pipe blocks the other"


def test_it_ends_when_it_is_late_or_cannot_begin(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(MissingComponent, match=r"the sleeper did not answer within 1 seconds"):
        run(python("import time; time.sleep(60)"), timeout=1, name="the sleeper")
    assert time.monotonic() - start < 20
    with pytest.raises(MissingComponent, match=r"nothing does not run: No such file"):
        run([tmp_path / "nothing"])


def test_it_ends_when_this_is_interrupted() -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt) as interrupted:
        run(python("import os, time; print(os.getpid(), flush=True); time.sleep(60)"), each_line=interrupt)
    assert not psutil.pid_exists(int(str(interrupted.value)))


def test_another_python_imports_what_this_one_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("print('found')")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(python("import only_here"), environment=importing_here()).stdout == "found\n"
