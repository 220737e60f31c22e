"""Each language's own tool finds nothing to say: ruff and mypy, as pyproject.toml says, shellcheck, systemd-analyze …

This is what `make check` runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

PYTHON = (("ruff", "check"), ("ruff", "format", "--check", "--diff"), ("mypy",))

# What a file is written in, by how it begins, or by how its name ends.
SHELLS = {"#!/bin/sh": "sh", "#!/usr/bin/env bash": "bash"}
TOOLS = {
    "sh": ("shellcheck",),
    "bash": ("shellcheck",),
    ".bash": ("bash", "-n"),
    ".zsh": ("zsh", "-n"),
    ".fish": ("fish", "--no-execute"),
    ".man": ("mandoc", "-T", "lint"),
}
OTHERS = [ROOT / "build.sh", *(ROOT / "tests").glob("*.sh"), *(ROOT / ".ci").iterdir(), *(ROOT / "etc").rglob("*")]
FILES = [
    (TOOLS[language], str(path.relative_to(ROOT)))
    for path in sorted(filter(Path.is_file, OTHERS))
    for language in [SHELLS.get(path.read_text().partition("\n")[0], path.suffix)]
    if language in TOOLS
]
UNITS = [
    path
    for folder in (ROOT / "systemd", ROOT / "etc")
    for path in sorted(folder.rglob("*.*"))
    if path.suffix in (".service", ".path")
]


def find(name: str) -> str:
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not path:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed; make check installs it")
    return path


def check(*words: str, cwd: Path = ROOT) -> None:
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run([find(words[0]), *words[1:]], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if words[0] not in ("ruff", "mypy"):
        assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("words", PYTHON, ids=" ".join)
def test_python(words: tuple[str, ...]) -> None:
    check(*words)


@pytest.mark.parametrize(("words", "name"), FILES, ids=[f"{' '.join(words)} {name}" for words, name in FILES])
def test_other_languages(words: tuple[str, ...], name: str) -> None:
    check(*words, name)


def test_every_script_is_checked() -> None:
    """None hides behind another first line."""
    checked = {name for _, name in FILES}
    scripts = {path for path in OTHERS if path.suffix == ".sh" or "usr/lib" in str(path)}
    assert {str(path.relative_to(ROOT)) for path in scripts if path.is_file()} <= checked
    assert len(UNITS) == len({path.name for path in UNITS}) >= 11


@pytest.mark.parametrize("unit", UNITS, ids=[path.name for path in UNITS])
def test_units(tmp_path: Path, unit: Path) -> None:
    """The host's and the guests', among all others: they name each other."""
    for name in ("nocloud", "dnsmasq"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    for path in UNITS:
        (tmp_path / path.name).write_text(path.read_text().replace("@BINDIR@", str(tmp_path)))
        (tmp_path / path.name.replace("@.", "@web.")).write_text((tmp_path / path.name).read_text())
    check("systemd-analyze", "verify", "--man=no", unit.name.replace("@.", "@web."), cwd=tmp_path)
