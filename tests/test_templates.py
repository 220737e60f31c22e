"""Templates: made of images, listed, deleted; whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from support import Cloud, add_blank, eventually, nothing_made, replace_program


def qcow2(path: Path, *words: object) -> Path:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *map(str, words), path, "8M"], cwd=path.parent, check=True
    )
    return path


def bootable(path: Path) -> Path:
    path.write_bytes(bytes(510) + b"\x55\xaa" + b"data" * 1000 + bytes(1 << 20))
    return path


def info(path: Path) -> dict[str, object]:
    shown = subprocess.run(["qemu-img", "info", "-U", "--output=json", path], capture_output=True, check=True)
    answer: dict[str, object] = json.loads(shown.stdout)
    return answer


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_made_of_an_image(cloud: Cloud, kind: str) -> None:
    image = qcow2(cloud.home / "image") if kind == "qcow2" else bootable(cloud.home / "image")
    cloud.run("vmtemplate", "mine", "--image", image, "--mem", 64, "--cpu", 3, "--user", "ann", "--init", "ssh").ok()
    disk = cloud.base / "templates/mine/mine_0.img"
    assert info(disk)["format"] == "qcow2" and "backing-filename" not in info(disk)
    assert disk.stat().st_mode & 0o777 == 0o444
    subprocess.run(["qemu-img", "compare", "-q", image, disk], check=True)
    conf = cloud.conf("templates/mine")
    wanted = {
        "vmName": "mine",
        "vmDisk": "templates/mine/mine_0.img",
        "vmMem": "64",
        "vmCpu": "3",
        "vmUser": "ann",
        "vmInit": "ssh",
        "vmSource": str(image),
        "vmChecksum": "sha256:" + hashlib.sha256(image.read_bytes()).hexdigest(),
    }
    assert wanted.items() <= conf.items()
    assert re.fullmatch(r"pc-q35-\d+\.\d+", conf["vmMachine"])
    assert sorted(os.listdir(cloud.base / "templates")) == ["mine"]


def test_by_default_settings_and_auto(cloud: Cloud) -> None:
    (cloud.home / ".nocloud.conf").write_text("vmMem=123\nvmUser=bob\nvmDiskExt=qcow2\n")
    cloud.run("vmtemplate", "--image", qcow2(cloud.home / "image"), "mine").ok()
    conf = cloud.conf("templates/mine")
    assert (conf["vmMem"], conf["vmCpu"], conf["vmUser"], conf["vmInit"]) == ("123", "2", "bob", "auto")
    assert conf["vmDisk"] == "templates/mine/mine_0.qcow2"


def test_one_that_is_there_already(cloud: Cloud) -> None:
    disk = add_blank(cloud)
    before = disk.stat()
    with nothing_made(cloud):
        cloud.run("vmtemplate", "blank", "--image", cloud.home / "blank.qcow2").fails(1, "blank", "already")
    assert disk.stat() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ""),
        (b"just a text\n" * 100, "boot sector"),
        (b"QFI\xfb", ""),
        (b"QFI\xfb" + b"\xff" * 4000, ""),
    ],
)
def test_garbage_is_refused(cloud: Cloud, content: bytes, said: str) -> None:
    image = cloud.home / "image"
    image.write_bytes(content)
    with nothing_made(cloud):
        cloud.run("vmtemplate", "bad", "--image", image).fails(1, str(image), said)
    assert not cloud.base.exists() or not os.listdir(cloud.base)


def test_an_image_on_a_backing_file_is_refused(cloud: Cloud) -> None:
    image = cloud.home / "image"
    argv: list[str | Path] = [
        "qemu-img",
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        "/etc/shadow",
        image,
        "1M",
    ]
    subprocess.run(argv, check=True)
    cloud.run("vmtemplate", "bad", "--image", image).fails(1, "refused", "/etc/shadow")
    data = qcow2(cloud.home / "image2", "-o", f"data_file={cloud.home}/data,data_file_raw=on")
    cloud.run("vmtemplate", "bad", "--image", data).fails(1, "refused", "data")
    assert not (cloud.base / "templates").exists()


def test_no_such_image_and_no_file(cloud: Cloud) -> None:
    cloud.run("vmtemplate", "bad", "--image", "/nonexistent/x.qcow2").fails(1, "/nonexistent/x.qcow2")
    cloud.run("vmtemplate", "bad", "--image", cloud.home).fails(1, str(cloud.home))
    cloud.run("vmtemplate", "bad", "--image", "/dev/zero").fails(1, "/dev/zero")
    assert not (cloud.base / "templates").exists()


@pytest.mark.parametrize("name", ["../x", "a,b", "x" * 64, "", "ü", "-x", ".x", "a/b"])
def test_bad_names(cloud: Cloud, name: str) -> None:
    image = qcow2(cloud.home / "image")
    cloud.run("vmtemplate", "--image", image, "--", name).fails(2)
    cloud.run("vmtemplate", "--build", "bookworm", "--", name).fails(2)
    assert not cloud.base.exists() or not os.listdir(cloud.base)


# What apt would take for something else than the name of a package: a pattern, a removal, a file, a release.
NO_PACKAGES = ("", "jq,", "ssh-", "J", "j", "a b", "-o=x", "~nssh", "?all", "./x.deb", "jq/sid", "jq=1", "jq*", "é1")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--image", "x"),
        ("a", "b", "--image", "x"),
        ("a", "--mem", "1G"),
        ("a", "--cpu", "0"),
        ("a", "--user", "-x"),
        ("a", "--init", "magic"),
        ("a", "--image", "x", "--build", "bookworm"),
        ("a", "--delete", "--image", "x"),
        ("a", "--include", "jq"),
        ("a", "--rebuild"),
        ("a", "--delete", "--rebuild"),
        ("a", "--image", "x", "--include", "jq"),
        *[("a", "--build", "bookworm", "--include", packages) for packages in NO_PACKAGES],
        ("--delete",),
        ("-L", "a"),
    ],
)
def test_wrong_words(cloud: Cloud, words: tuple[str, ...]) -> None:
    with nothing_made(cloud):
        cloud.run("vmtemplate", *words).fails(2)


def test_interrupted_and_failed_copies_leave_nothing(cloud: Cloud) -> None:
    image = qcow2(cloud.home / "image")
    script = f'case "$1" in convert) touch {cloud.home}/begun; sleep 5; exit 1;; esac; exec "$REAL" "$@"'
    path = replace_program(cloud.home / "bin", "qemu-img", script)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        child = cloud.spawn("vmtemplate", "x", "--image", str(image), env={"PATH": path})
        eventually((cloud.home / "begun").exists, "the copy has begun")
        os.killpg(child.pid, number)
        _, stderr = child.communicate(timeout=20)
        assert child.returncode == status and "Traceback" not in stderr
        assert not (cloud.base / "templates").exists()
        (cloud.home / "begun").unlink()
    (cloud.home / "bin/qemu-img").write_text(
        '#!/bin/sh\n[ "$1" = convert ] && { echo "no luck" >&2; exit 1; }\nexec /usr/bin/qemu-img "$@"\n'
    )
    done = cloud.run("vmtemplate", "x", "--image", image, env={"PATH": path})
    assert done.status == 1 and "no luck" in done.stderr
    assert not (cloud.base / "templates").exists()


def test_killed_in_the_middle_the_next_one_cleans_up(cloud: Cloud) -> None:
    image = qcow2(cloud.home / "image")
    script = f'case "$1" in convert) touch {cloud.home}/begun; sleep 60;; esac; exec "$REAL" "$@"'
    path = replace_program(cloud.home / "bin", "qemu-img", script)
    child = cloud.spawn("vmtemplate", "x", "--image", str(image), env={"PATH": path})
    eventually((cloud.home / "begun").exists, "the copy has begun")
    cloud.run("vmtemplate", "x", "--image", image).fails(1, "just now")
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert cloud.run("vmtemplate", "-L").ok().stdout == ""
    cloud.run("vmtemplate", "x", "--image", image).ok()
    assert os.listdir(cloud.base / "templates") == ["x"]


def test_list(cloud: Cloud, vms: None) -> None:
    assert cloud.run("vmtemplate", "--list").ok().stdout == ""
    add_blank(cloud)
    add_blank(cloud, "other")
    cloud.run("vminstantiate", "-n", "blank", "-C", 2).ok()
    rows = [re.split(r" {2,}", line) for line in cloud.run("vmtemplate", "-L").ok().lines]
    assert [row[0] for row in rows] == ["blank", "other"]
    assert [row[2] for row in rows] == ["2 clones", "0 clones"]
    assert [row[3] for row in rows] == [str(cloud.home / "blank.qcow2"), str(cloud.home / "other.qcow2")]
    assert all(re.fullmatch(r"\d+ MB", row[1]) for row in rows)
    assert cloud.run("vmtemplate", "--list").stdout == cloud.run("vmtemplate", "-L").stdout


def test_delete(cloud: Cloud, vms: None) -> None:
    add_blank(cloud)
    cloud.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web").ok()
    with nothing_made(cloud):
        cloud.run("vmtemplate", "--delete", "blank").fails(1, "1 clone", "pf/default/web00", "vmstop -d")
    cloud.run("vmstop", "-d", "-g", "pf").quiet()
    cloud.run("vmtemplate", "blank", "--delete").quiet()
    assert not (cloud.base / "templates").exists()
    cloud.run("vmtemplate", "--delete", "blank").fails(1, "no such template")


def test_delete_sees_clones_by_their_disks(cloud: Cloud) -> None:
    """A clone whose conf names no template, as the bash tools wrote it."""
    add_blank(cloud)
    folder = cloud.base / "pf/web/web00"
    folder.mkdir(parents=True)
    (folder / "web00.conf").write_text("vmName=web00\nvmDisk=web00_0.img\n")
    argv: list[str | Path] = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        "../../../templates/blank/blank_0.img",
        folder / "web00_0.img",
    ]
    subprocess.run(argv, check=True)
    cloud.run("vmtemplate", "--delete", "blank").fails(1, "pf/web/web00")


def test_delete_never_follows_a_symlink(cloud: Cloud) -> None:
    disk = add_blank(cloud)
    outside = cloud.home / "outside"
    disk.parent.rename(outside)
    disk.parent.symlink_to(outside)
    cloud.run("vmtemplate", "--delete", "blank").fails(1, "symlink")
    assert (outside / "blank_0.img").exists() and disk.parent.is_symlink()


def test_an_unknown_suite_leaves_nothing(cloud: Cloud) -> None:
    done = cloud.run("vmtemplate", "x", "--build", "nosuchsuite")
    assert done.status in (1, 2) and "nosuchsuite" in done.stderr and "Traceback" not in done.stderr, repr(done)
    assert not (cloud.base / "templates").exists()


def test_more_packages_are_handed_to_mmdebstrap(cloud: Cloud) -> None:
    """The program is replaced by one that shows its words and says what apt says of a package that isn't there."""
    script = 'printf "%s\\n" "$@" >>"$HOME/words"; echo "E: Unable to locate package nosuch"; exit 1'
    path = replace_program(cloud.home / "bin", "mmdebstrap", script)
    done = cloud.run("vmtemplate", "x", "--build", "bookworm", "--include", "g++, jq,jq,lib.so", env={"PATH": path})
    assert done.status == 1 and "nosuch: no such package in bookworm" in done.stderr, repr(done)
    words = (cloud.home / "words").read_text().splitlines()
    packages = next(word for word in words if word.startswith("--include=")).partition("=")[2].split(",")
    assert packages[-3:] == ["g++", "jq", "lib.so"] and "openssh-server" in packages
    assert not (cloud.base / "templates").exists()


@pytest.mark.long
def test_an_unknown_package_leaves_nothing(cloud: Cloud) -> None:
    """The second name would be a regular expression to apt, which fits `jq`."""
    for name in ("no-such-package", "j.+jq"):
        done = cloud.run("vmtemplate", "x", "--build", "bookworm", "--include", name, timeout=600)
        assert done.status == 1 and f"{name}: no such package in bookworm" in done.stderr, repr(done)
        assert not (cloud.base / "templates").exists()


def test_build_without_its_tool_names_it(cloud: Cloud, tmp_path: Path) -> None:
    from support import link_programs

    path = link_programs(tmp_path / "bin", "mmdebstrap")
    done = cloud.run("vmtemplate", "x", "--build", "bookworm", env={"PATH": path})
    done.fails(127, "mmdebstrap")
    assert not (cloud.base / "templates").exists()
