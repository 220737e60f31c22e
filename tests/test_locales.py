"""Any locale, and names in any script: one codec for paths, whatever the caller's environment says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import PROGRAM, Cloud, Result, add_blank

import nocloud


@pytest.fixture(params=["C", "en_US.ISO-8859-1"])
def locale(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a locale that has only some characters; one of them is made here, and nowhere else."""
    if request.param != "C":
        words = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / request.param)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"make test installs the package locales: {done.stderr}"
    return {"LC_ALL": request.param, "LOCPATH": str(tmp_path)}


def called(cloud: Cloud, locale: dict[str, str], *words: object, options: tuple[str, ...] = ("-IS",)) -> Result:
    """As `python3 nocloud.py`, which has no `-X utf8`; Python would choose that by itself in the locale C."""
    off = ("-X", "utf8=0") if locale["LC_ALL"] == "C" else ()
    return cloud.execute([sys.executable, *off, *options, PROGRAM, *words], env=locale)


@pytest.mark.parametrize("name", ["家", "é", "a\udcffb"])
def test_any_name_is_shown_in_any_locale(cloud: Cloud, locale: dict[str, str], name: str) -> None:
    """On stdout as it is, and in an error without being one itself."""
    folder = cloud.base / "shop/web" / name
    folder.mkdir(parents=True)
    (folder / f"{name}.conf").write_text("vmUuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8\n")
    environment = {**cloud.env, **locale}
    off = ["-X", "utf8=0"] if locale["LC_ALL"] == "C" else []
    argv = [sys.executable, *off, "-IS", str(PROGRAM), "vmrunning", "-a"]
    done = subprocess.run(argv, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done
    assert done.stdout == f"{name} shop/web stopped\n".encode("utf-8", "surrogateescape")
    called(cloud, locale, "vmssh", f"nope{name}").fails(1, "no such VM")


def test_a_home_in_another_script(tmp_path: Path, locale: dict[str, str], vms: None) -> None:
    """VMs start, are found, and leave nothing."""
    with Cloud(tmp_path / "家 é") as cloud:
        add_blank(cloud)
        called(cloud, locale, "vminstantiate", "-n", "blank", "-g", "shop", "-o", "name=web").ok()
        shown = called(cloud, locale, "vmrunning").ok()
        assert shown.stdout.startswith("web00 shop/default 10.")
        called(cloud, locale, "net", "--private", "status").ok()
        assert (
            "vmDisk=shop/default/web00/web00_0.img" in (cloud.folder("shop/default/web00") / "web00.conf").read_text()
        )
        called(cloud, locale, "vmstop", "-d", "-g", "shop").ok()
        assert not (cloud.base / ".net").exists()


def test_a_description_in_any_encoding_is_read_or_refused(cloud: Cloud, locale: dict[str, str]) -> None:
    argv = [sys.executable, "-IS", PROGRAM, "vmrun", "-f", "-", "--group", "shop"]
    done = cloud.execute(argv, input="家:1\n", env=locale)
    done.fails(2, "'家' is not allowed in a template name")
    words = [*map(str, argv)]
    raw = subprocess.run(words, input=b"\xff:1\n", capture_output=True, env={**cloud.env, **locale}, check=False)
    assert raw.returncode == 2 and b"stdin: not a text file in UTF-8" in raw.stderr and b"Traceback" not in raw.stderr


def test_python_is_always_called_the_same_way() -> None:
    """By the first line of the program, and by the program itself."""
    options = " ".join(nocloud.PYTHON_OPTIONS)
    assert PROGRAM.read_text().startswith(f"#!/usr/bin/env -S python3 {options}\n")
    assert nocloud.self_argv("x")[1:-2] == list(nocloud.PYTHON_OPTIONS)
    assert PROGRAM.read_text().count("sys.executable") == 4  # self_argv, and main() where the codec is another one


def test_a_character_that_is_none_is_shown(cloud: Cloud) -> None:
    """JSON may hold half of one; the byte beside it goes out as it came."""
    code = "nocloud.open_standard_streams(); nocloud.report.data('\\ud800\\udcff')"
    before = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import nocloud; "
    done = subprocess.run([sys.executable, "-IS", "-c", before + code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?\xff\n", b"")
