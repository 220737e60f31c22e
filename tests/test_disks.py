"""Disk images: what comes from outside is looked at before anything is made of it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from support import Cloud, nothing_made

import nocloud


def create(path: Path, *words: object) -> Path:
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", *map(str, words), str(path)]
    if "-b" not in words:
        argv.append("1M")
    subprocess.run(argv, cwd=path.parent, check=True)
    return path


def bootable(path: Path) -> Path:
    path.write_bytes(bytes(510) + b"\x55\xaa" + bytes(1 << 20))
    return path


def test_formats_of_images_from_outside(tmp_path: Path) -> None:
    assert nocloud.foreign_image_format(str(create(tmp_path / "a.qcow2"))) == "qcow2"
    assert nocloud.foreign_image_format(str(bootable(tmp_path / "b.img"))) == "raw"


def test_an_image_on_another_file_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "base")
    image = create(tmp_path / "over", "-F", "qcow2", "-b", "base")
    with pytest.raises(nocloud.Error, match=r"refused.*base"):
        nocloud.foreign_image_format(str(image))
    image = create(tmp_path / "secret", "-u", "-F", "raw", "-b", "/etc/shadow", "-o", "size=1M")
    with pytest.raises(nocloud.Error, match=r"refused.*/etc/shadow"):
        nocloud.foreign_image_format(str(image))


def test_an_image_with_a_data_file_is_refused(tmp_path: Path) -> None:
    image = create(tmp_path / "image", "-o", f"data_file={tmp_path}/data,data_file_raw=on")
    with pytest.raises(nocloud.Error, match=r"refused.*data"):
        nocloud.foreign_image_format(str(image))


def test_a_header_that_says_json_is_refused(tmp_path: Path) -> None:
    """`json:{…}` as the backing file's name opens anything that qemu can."""
    name = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": "/etc/passwd"}})
    image = create(tmp_path / "image", "-u", "-F", "raw", "-b", f"json:{name}", "-o", "size=1M")
    with pytest.raises(nocloud.Error):
        nocloud.foreign_image_format(str(image))


@pytest.mark.parametrize("format", ["vmdk", "vdi", "vpc", "vhdx"])
def test_other_formats_are_refused_with_the_way_out(tmp_path: Path, format: str) -> None:
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", format, image, "1M"], check=True)
    with pytest.raises(nocloud.Error, match=format) as raised:
        nocloud.foreign_image_format(str(image))
    assert "qemu-img convert" in raised.value.hint


@pytest.mark.parametrize("content", [b"QFI\xfb" + b"\xff" * 2000, b"QFI\xfb\0\0\0\x63" + bytes(600)])
def test_corrupt_images(tmp_path: Path, content: bytes) -> None:
    image = tmp_path / "image"
    image.write_bytes(content)
    with pytest.raises(nocloud.Error) as raised:
        nocloud.foreign_image_format(str(image))
    assert "image" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a b", "a,b", "a:b", "-a", "nbd:localhost:1", "json:{}", "ü"])
def test_names_of_image_files_are_names_of_files(cloud: Cloud, name: str) -> None:
    """Not options, protocols or lists for qemu-img."""
    image = cloud.home / name
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "plain", "1M"], cwd=cloud.home, check=True)
    (cloud.home / "plain").rename(image)
    cloud.run("vmtemplate", "t", f"--image={name}").ok()
    assert (cloud.base / "templates/t/t_0.img").exists()


def test_overlay_and_disk(tmp_path: Path) -> None:
    create(tmp_path / "base")
    nocloud.create_overlay(str(tmp_path / "over"), str(tmp_path / "base"), "qcow2")
    nocloud.create_disk(str(tmp_path / "disk"), 3)
    info = nocloud.image_info(str(tmp_path / "over"), "qcow2")
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base", "qcow2")
    assert nocloud.image_info(str(tmp_path / "disk"), "qcow2")["virtual-size"] == 3 << 30
    assert (tmp_path / "over").stat().st_blocks * 512 <= 256 * 1024


def test_a_copy_stands_alone(tmp_path: Path) -> None:
    bootable(tmp_path / "raw")
    nocloud.convert_image(str(tmp_path / "raw"), "raw", str(tmp_path / "copy"))
    info = nocloud.image_info(str(tmp_path / "copy"), "qcow2")
    assert info["format"] == "qcow2" and "backing-filename" not in info
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "raw", "copy"], cwd=tmp_path, check=True)


def test_read_only(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(0o664)
    file.chmod(0o664)
    nocloud.set_writable(str(file), False)
    nocloud.set_writable(str(file), False)
    assert file.stat().st_mode & 0o777 == 0o444
    if os.geteuid() == 0:
        file.chmod(0o664)
        os.chown(file, 65534, 65534)
        nocloud.set_writable(str(file), False)
        assert file.stat().st_mode & 0o777 == 0o664  # someone else's stays as it is


def test_digest(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert nocloud.file_digest(str(file)) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_format_of_a_disk_by_its_header(tmp_path: Path) -> None:
    assert nocloud.disk_format(str(create(tmp_path / "a"))) == "qcow2"
    assert nocloud.disk_format(str(bootable(tmp_path / "b"))) == "raw"
    (tmp_path / "c").touch()
    assert nocloud.disk_format(str(tmp_path / "c")) == "raw"


def test_a_name_in_a_header_ends_at_a_nul(tmp_path: Path) -> None:
    """A guest may write such a header into its own raw disk."""
    disk = tmp_path / "raw.img"
    start = struct.pack(">4sIQI", b"QFI\xfb", 3, 104, 5)
    disk.write_bytes(start.ljust(104, b"\0") + b"x\0img" + bytes(1000))
    found = nocloud.qcow2_header(str(disk))
    assert found and (found.backing, found.format, found.outside) == ("x", "", False)
    assert nocloud.backing_chain(str(disk), "", lambda path: True) == [str(tmp_path / "x")]
    assert nocloud.backing_chain(str(disk), "raw", lambda path: True) == []


# What came only in part, or is no disk ###############################################################

CUT = "it ends before its data does, or is damaged: an incomplete download?"


@pytest.mark.parametrize("how", [(), ("-c",)])
def test_a_qcow2_image_that_was_cut_short(tmp_path: Path, how: tuple[str, ...]) -> None:
    """Anywhere: in its header, in a table, between the tables, in the data."""
    whole, image = tmp_path / "whole", tmp_path / "image"
    (tmp_path / "raw").write_bytes(os.urandom(4 << 20))
    subprocess.run(["qemu-img", "convert", *how, "-f", "raw", "-O", "qcow2", tmp_path / "raw", whole], check=True)
    content = whole.read_bytes()
    assert nocloud.foreign_image_format(str(whole)) == "qcow2"
    for size in (8, 90, 200, 70000, 150000, 196608, 200000, 262144, 300000, 1 << 20, 4 << 20):
        image.write_bytes(content[:size])
        with pytest.raises(nocloud.Error) as raised:
            nocloud.foreign_image_format(str(image))
        assert raised.value.text == f"{image}: {CUT}" or size < 200, raised.value.text


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_a_raw_disk_that_was_cut_short(tmp_path: Path, label: str) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    script = f"label: {label}\nstart=2048, size=4096\nstart=8192, size={(64 << 11) - 8192 - 2048}\n"
    subprocess.run(["sfdisk", "-q", image], input=script, text=True, check=True)
    assert nocloud.foreign_image_format(str(image)) == "raw"
    os.truncate(image, 60 << 20)
    with pytest.raises(nocloud.WrongImage, match="ends before its data does"):
        nocloud.foreign_image_format(str(image))


def test_a_raw_disk_without_partitions(tmp_path: Path) -> None:
    """The code or the text of a file system's boot sector is no table of partitions."""
    image = bootable(tmp_path / "image")
    with image.open("r+b") as file:
        file.seek(446)
        file.write(b"No bootable system on this disk, press a key to try again")
    assert nocloud.foreign_image_format(str(image)) == "raw"
    with image.open("r+b") as file:
        file.write(b"\xeb\x3c\x90mkfs.fat\0\2\4\1\0\2\0\2\0\0\xf8")
        file.seek(446)
        file.write(b"\x80" + b"\xff" * 15)
    assert nocloud.foreign_image_format(str(image)) == "raw"


@pytest.mark.parametrize(
    ("at", "start", "what", "hint"),
    [
        (0x8001, b"CD001", "an ISO image", "vmcreate -n NAME -i"),
        (0, b"LUKS\xba\xbe", "LUKS", "cryptsetup open"),
        (257, b"ustar\x0000", "a tar archive", "tar -xf"),
        (0, b"PK\3\4", "a zip archive", "unzip"),
        (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x"),
        (0, b"\x1f\x8b\x08", "compressed by gzip", "gzip -d"),
        (0, b"\xfd7zXZ\0", "compressed by xz", "xz -d"),
        (0, b"BZh9", "compressed by bzip2", "bzip2 -d"),
        (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "zstd -d"),
        (0, b"KDMV", "a vmdk image", "qemu-img convert"),
    ],
)
def test_what_is_no_disk_is_named_with_what_helps(cloud: Cloud, at: int, start: bytes, what: str, hint: str) -> None:
    image = cloud.home / "an image"
    image.write_bytes((bytes(at) + start).ljust(1 << 16, b"\0")[: 1 << 16])
    with open(image, "r+b") as file:  # it would pass for a raw disk
        file.seek(510)
        file.write(b"\x55\xaa")
    with nothing_made(cloud):
        done = cloud.run("vmtemplate", "bad", "--image", image).fails(1, str(image), what, hint)
    assert f"'{image}'" in done.stderr and "; only qcow2 and raw are taken" in done.stderr


def test_an_encrypted_image(tmp_path: Path) -> None:
    image = create(tmp_path / "image")
    with image.open("r+b") as file:
        file.seek(32)
        file.write(struct.pack(">I", 1))  # crypt_method: AES
    with pytest.raises(nocloud.WrongImage, match="is encrypted"):
        nocloud.foreign_image_format(str(image))


# What a guest may have written #######################################################################


def header(name: str, version: int = 3, features: int = 0) -> bytes:
    """The first 64 KB of a disk whose guest wants `name` to be read."""
    start = struct.pack(">4sIQI", b"QFI\xfb", version, 104, len(name.encode())).ljust(72, b"\0")
    return (struct.pack(">72sQ", start, features).ljust(104, b"\0") + name.encode()).ljust(1 << 16, b"\0")


def add_raw(base: Path, place: str, content: bytes, recorded: str = "") -> Path:
    """A VM, or a template, as the bash tools made them, with a raw disk; its folder."""
    folder = base / place
    folder.mkdir(parents=True)
    name = folder.name
    conf = f"vmName={name}\nvmMem=64\nvmCpu=1\nvmDisk={place}/{name}_0.img\nvmUuid=\nvmExtraDisk=\n"
    (folder / f"{name}.conf").write_text(conf + (f"vmDiskFormat={recorded}\n" if recorded else ""))
    (folder / f"{name}_0.img").write_bytes(content)
    return folder


def test_what_a_guest_wrote_into_a_raw_disk_opens_nothing(cloud: Cloud) -> None:
    """Not where the conf says what the disk is, and elsewhere nothing that isn't a file of the tree."""
    fifo, secret = cloud.home / "fifo", cloud.home / "secret"
    os.mkfifo(fifo)
    create(secret)
    (cloud.base / "pf").mkdir(parents=True)
    (cloud.base / "pf/device").symlink_to("/dev/tty")
    named = [str(fifo), str(secret), "/proc/self/mem", f"{cloud.base}/pf/device", "bad00_0.img", "x" * 1000, "\n"]
    for number, name in enumerate(named):
        for recorded in ("", "raw"):
            for place in (f"templates/t{recorded}{number:02d}", f"pf/x/bad{recorded}{number:02d}"):
                add_raw(cloud.base, place, header(name, features=4 * (number % 2)), recorded)
    for words in LISTS:
        trace = cloud.home / "trace"
        opened = ["strace", "-f", "-qq", "-e", "trace=open,openat", "-o", str(trace)] if shutil.which("strace") else []
        shown = cloud.execute([*opened, *cloud.argv(words[0], *words[1:])], timeout=60)
        assert "Traceback" not in shown.stderr and "a defect in" not in shown.stderr, repr(shown)
        if opened:
            assert not [name for name in named[:4] if f'"{name}"' in trace.read_text()], repr(shown)


LISTS = (
    ["vmtemplate", "--list"], ["vmtemplate", "--tree"], ["vmrunning", "-a"], ["vminventory"], ["vminventory", "--list"],
    ["doctor"],
)  # fmt: skip


def spoil(folder: Path, kind: str) -> None:
    """Make one thing about a VM, or a template, wrong."""
    conf, disk = folder / f"{folder.name}.conf", folder / f"{folder.name}_0.img"
    others = {"pid": f"{folder.name}.pid", "layer": f"{folder.name}.l1.img"}
    what, _, how = kind.partition(" ")
    path = {"conf": conf, "disk": disk}.get(what) or folder / others.get(what, what)
    path.unlink(missing_ok=True)
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "device":
        path.symlink_to("/dev/full")
    elif how == "noise":
        path.write_bytes(bytes(range(256)) * 64)
    elif how == "qcow2":
        path.write_bytes(b"QFI\xfb" + b"\xff" * 8000)
    elif how == "itself":
        path.write_bytes(header(disk.name))


def test_a_defect_of_one_vm_hides_no_other(cloud: Cloud) -> None:
    """Whatever is wrong with some, all lists show the others."""
    hows = ("", "fifo", "folder", "loop", "device", "noise", "qcow2", "itself")
    kinds = [f"{what} {how}" for what in ("conf", "disk", "pid", "layer") for how in hows]
    for number, kind in enumerate(kinds):
        for place in (f"templates/t{number:02d}", f"pf/x/bad{number:02d}"):
            spoil(add_raw(cloud.base, place, bytes(1024)), kind)
    for place in ("templates/good", "pf/x/zgood"):
        add_raw(cloud.base, place, bytes(1024))
    create(cloud.base / "pf/x/zgood/zgood_0.img", "-F", "raw", "-b", cloud.base / "templates/good/good_0.img")
    for words in LISTS:
        shown = cloud.run(words[0], *words[1:], timeout=60)
        assert "Traceback" not in shown.stderr and "a defect in" not in shown.stderr, repr(shown)
        if words[0] != "doctor":
            assert shown.status == 0 and ("good" in shown.stdout or words[0] == "vminventory"), repr(shown)
    shown = cloud.run("vmtemplate", "--list")
    assert next(line for line in shown.lines if line.startswith("good ")).split()[3:5] == ["1", "clone"]
    shutil.rmtree(cloud.base)  # nothing of it can be stopped
