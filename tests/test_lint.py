"""ruff and mypy, as the configuration in pyproject.toml says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT


def program(name: str) -> str:
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not path:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed; make test installs it")
    return path


@pytest.mark.parametrize("words", [("ruff", "check"), ("ruff", "format", "--check", "--diff"), ("mypy",)], ids=" ".join)
def test_clean(words: tuple[str, ...]) -> None:
    done = subprocess.run([program(words[0]), *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
