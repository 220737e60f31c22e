"""VMs that leave for another nocloud or another engine, and what comes in from elsewhere, which nobody trusts."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tinyguest
from support import DATA, READY, ROOT, Cloud, add_template, eventually, nothing_made, replace_program
from test_layers import add_stub, disk_of, second_sector, stub_image

import nocloud


@pytest.fixture
def stub(cloud: Cloud, vms: None) -> Cloud:
    add_stub(cloud)
    return cloud


@pytest.fixture
def other(tmp_path: Path, cloud: Cloud) -> Iterator[Cloud]:
    """A colleague's nocloud."""
    with Cloud(tmp_path / "other") as other:
        yield other


def mark(disk: Path) -> None:
    """Write what a guest could have written to a disk of its."""
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 512 512", disk], check=True, capture_output=True)


def image(disk: Path) -> dict[str, Any]:
    words = ["qemu-img", "info", "--output=json", str(disk)]
    return json.loads(subprocess.run(words, check=True, capture_output=True).stdout)  # type: ignore[no-any-return]


def yaml(path: Path) -> list[Any]:
    """The documents of a YAML file, as the distribution's reader understands them."""
    code = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(sys.stdin))))"
    with path.open() as file:
        done = subprocess.run(["/usr/bin/python3", "-Ic", code], stdin=file, check=True, capture_output=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# For another nocloud ##################################################################################


@pytest.mark.parametrize("tar", [False, True])
def test_a_group_for_a_colleague(stub: Cloud, other: Cloud, tar: bool) -> None:
    words = "name=web;dsk=1,2;port=8080:80"
    stub.run("vminstantiate", "-n", "stub", "-C", 2, "-g", "pf", "-t", "web", "-o", words).ok()
    done = stub.run("export", "-g", "pf", "--to", "nocloud", "out")
    done.fails(1, "it is running", "vmstop -n web00")
    stub.run("vmstop", "-g", "pf", "--kill").ok()
    mark(disk_of(stub, "pf/web/web01"))
    done = stub.run("export", "-g", "pf", "--to", "nocloud", "--with-keys", "out", *(["--tar"] if tar else [])).ok()
    assert "machine-id" in done.stderr
    out = stub.home / ("out.tar.zst" if tar else "out")
    assert out.exists() and out.stat().st_mode & 0o077 == 0
    other.env["NOCLOUD_vmGroup"] = "x"
    assert other.run("import", out).ok().lines == ["web00", "web01"]
    old, new = (cloud.conf("pf/web/web01") for cloud in (stub, other))
    for key in ("vmMem", "vmCpu", "vmInit", "vmUuid", "vmMac", "vmMachine", "vmUser"):
        assert old[key] == new[key], key
    assert new["vmPorts"] == "127.0.0.1:8081:80" and not new["vmTemplate"]
    assert new["vmDisk"] == "pf/web/web01/web01_0.img" and new["vmDiskFormat"] == "qcow2,qcow2,qcow2"
    made = other.base / new["vmDisk"]
    assert "backing-filename" not in image(made) and second_sector(made) == b"Z" * 512
    assert [image(other.base / disk)["virtual-size"] >> 30 for disk in new["vmExtraDisk"].split(",")] == [1, 2]
    with nothing_made(other):
        other.run("import", out).fails(2, "name=web00", "there is such a VM")
        other.run("import", out, "-g", "two").fails(1, "web00: it is in this tree already")
    assert {path.name for path in stub.home.glob("out*")} == {out.name}
    assert not list(other.base.rglob(".new-*")) and not (other.base / "two").exists()


@pytest.mark.long
def test_with_keys_it_is_the_same_machine_and_without_another_one(tiny: Cloud, other: Cloud) -> None:
    tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-o", "name=web", "-w", READY).ok()
    tiny.ssh("web00", "echo kept >/root/file; sync").ok()
    tiny.run("vmstop", "-g", "pf").ok()
    for name, words in (("same", ["--with-keys"]), ("new", []), ("clean", ["--clean"])):
        tiny.run("export", "web00", "--to", "nocloud", name, "--tar", *words).ok()
        other.run("import", tiny.home / f"{name}.tar.zst", "-g", name).ok()
    # The tiny guest heeds its credentials once for each UUID; systemd does at each boot.
    other.env["XDG_CONFIG_HOME"] = tiny.env["XDG_CONFIG_HOME"]
    keys = {}
    for group in ("same", "new", "clean"):
        other.run("vmstart", "-g", group, "-w", READY).ok()
        assert other.ssh(f"{group}/web00", "cat /root/file; hostname").ok().lines == ["kept", "web00"]
        keys[group] = other.ssh(f"{group}/web00", "cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub").ok().stdout.strip()
        other.run("vmstop", "-g", group, "--kill").ok()
    old = (tiny.folder("pf/default/web00") / "ssh_host_ed25519_key.pub").read_text().split()[1]
    assert keys["same"] == old and len(set(keys.values())) == 3
    uuids = {group: other.conf(f"{group}/default/web00")["vmUuid"] for group in keys}
    assert uuids["same"] == tiny.conf("pf/default/web00")["vmUuid"] and len(set(uuids.values())) == 3


@pytest.mark.long
def test_a_colleague_gets_into_debian(debian: Cloud, other: Cloud) -> None:
    """Whose nocloud has another key: that is planted, while the machine is the same; cleaned it is another one."""
    debian.run("vminstantiate", "-n", "deb", "-g", "pf", "-o", "name=web", "-w", 300, timeout=320).ok()
    look = "cat /etc/machine-id; hostname; cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub; cat /root/file"
    old = debian.ssh("web00", f"echo kept >/root/file; {look}").ok().lines
    debian.run("vmstop", "-g", "pf", "--timeout", 90, timeout=120).ok()
    debian.run("export", "web00", "--to", "nocloud", "same", "--with-keys", "--tar", timeout=300).ok()
    debian.run("export", "web00", "--to", "nocloud", "clean", "--clean", "--tar", timeout=600).ok()
    debian.run("vmstop", "-d", "-g", "pf").ok()
    found = []
    for group in ("same", "clean"):
        other.run("import", debian.home / f"{group}.tar.zst", "-g", group).ok()
        (debian.home / f"{group}.tar.zst").unlink()
        other.run("vmstart", "-g", group, "-w", 300, timeout=320).ok()
        found.append(other.ssh(f"{group}/web00", look).ok().lines)
        other.run("vmstop", "-d", "-g", group).ok()
    assert found[0] == old and found[1][1::2] == ["web00", "kept"]
    assert found[1][0] != old[0] and found[1][2] != old[2]


# What nobody trusts ###################################################################################


class Archive:
    """An export that is written by hand; each method of a test's own spoils it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "disk", "1M"], check=True)
        self.disk = (folder / "disk").read_bytes()
        files = {"web00_0.qcow2": [len(self.disk), hashlib.sha256(self.disk).hexdigest()]}
        self.vm: dict[str, Any] = {
            "name": "web00",
            "type": "web",
            "settings": {"vmInit": "ssh"},
            "files": files,
            "key": "",
        }
        self.manifest: dict[str, Any] = {"nocloud": 1, "group": "pf", "vms": [self.vm]}
        self.more: list[tarfile.TarInfo] = []
        self.name = "web00_0.qcow2"

    def put(self, disk: bytes) -> None:
        self.disk = disk
        self.vm["files"]["web00_0.qcow2"] = [len(disk), hashlib.sha256(disk).hexdigest()]

    def add(self, name: str, **how: Any) -> None:
        member = tarfile.TarInfo(name)
        for key, value in how.items():
            setattr(member, key, value)
        self.more.append(member)

    def write(self) -> Path:
        path = self.folder / "x.tar"
        data = json.dumps(self.manifest).encode()
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, content in (("manifest.json", data), (self.name, self.disk)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            for member in self.more:
                tar.addfile(member, io.BytesIO(bytes(member.size)))
        return path


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def qcow2(folder: Path, *words: str) -> bytes:
    (folder / "secret").write_bytes(b"secret".ljust(1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, folder / "evil", "1M"], check=True)
    return (folder / "evil").read_bytes()


def test_an_import_takes_what_it_may_and_names_the_rest(cloud: Cloud, archive: Archive) -> None:
    archive.vm["settings"].update(
        vmMem="256", vmPorts="0.0.0.0:8080:80", vmShares="/etc:/mnt", vmExtraOpts="-s", vmKernel="/boot/vmlinuz",
        vmQemu="/bin/false", vmDisk="/etc/shadow", other="x", vmUser="me",
    )  # fmt: skip
    done = cloud.run("import", archive.write()).ok()
    assert done.lines == ["web00"]
    for key in ("vmShares", "vmExtraOpts", "vmKernel", "vmQemu", "vmDisk", "other"):
        assert f"web00: not taken over: {key}\n" in done.stderr
    conf = cloud.conf("pf/web/web00")
    assert {key: conf[key] for key in ("vmMem", "vmPorts", "vmUser", "vmInit", "vmDisk")} == {
        "vmMem": "256", "vmPorts": "127.0.0.1:8080:80", "vmUser": "me", "vmInit": "ssh",
        "vmDisk": "pf/web/web00/web00_0.img",
    }  # fmt: skip
    assert not {"vmShares", "vmExtraOpts", "vmKernel", "vmQemu", "other"} & set(conf)
    assert conf["vmUuid"] and conf["vmMac"] and conf["vmAddress"]
    cloud.run("import", archive.folder / "x.tar", "-g", "two").ok()
    uuids = {cloud.conf(f"{group}/web/web00")["vmUuid"] for group in ("pf", "two")}
    assert len(uuids) == 2


UUID = "f1f3c3e9-1111-4111-8111-111111111111"


def twins(archive: Archive, vmUuid: str, other: str) -> None:
    """A second VM whose UUID, or the MAC that is made of it, is the first one's."""
    archive.vm["settings"].update(vmUuid=vmUuid)
    settings = {**archive.vm["settings"], "vmUuid": other}
    archive.manifest["vms"].append({**archive.vm, "name": "b", "settings": settings, "files": {"b_0.qcow2": [1, "x"]}})


SPOILED: dict[str, tuple[Callable[[Archive], object], str]] = {
    "a path that leaves": (lambda it: setattr(it, "name", "../web00_0.qcow2"), "refused: ../web00_0.qcow2"),
    "an absolute path": (lambda it: it.add("/etc/cron.d/x"), "refused: /etc/cron.d/x"),
    "a folder": (lambda it: it.add("x", type=tarfile.DIRTYPE), "no plain file"),
    "a symlink": (lambda it: it.add("x", type=tarfile.SYMTYPE, linkname="/etc"), "no plain file"),
    "a hard link": (lambda it: it.add("x", type=tarfile.LNKTYPE, linkname="/etc/shadow"), "no plain file"),
    "a device": (lambda it: it.add("x", type=tarfile.CHRTYPE, devmajor=1, devminor=1), "no plain file"),
    "a pipe": (lambda it: it.add("x", type=tarfile.FIFOTYPE), "no plain file"),
    "a long name": (lambda it: it.add("x" * 300), "no plain file"),
    "a file that isn't named": (lambda it: it.add("x", size=9), "refused: x in it"),
    "a file twice": (lambda it: it.add("web00_0.qcow2", size=len(it.disk)), "refused: web00_0.qcow2"),
    "a file that is longer": (lambda it: setattr(it, "disk", it.disk + b"x"), "refused: web00_0.qcow2"),
    "other bytes": (lambda it: setattr(it, "disk", it.disk[:-1] + b"x"), "damaged"),
    "a file that is missing": (lambda it: it.vm["files"].update({"web00_1.qcow2": [9, "x"]}), "web00_1.qcow2 is not"),
    "more than there is room": (lambda it: it.vm["files"].update({"web00_1.qcow2": [1 << 60, "x"]}), "are free"),
    "less than nothing": (lambda it: it.vm["files"].update({"web00_1.qcow2": [-1, "x"]}), "not one that"),
    "a file of another name": (lambda it: it.vm["files"].update({"../x": [9, "x"]}), "not one that"),
    "no files": (lambda it: it.vm["files"].clear(), "not one that"),
    "a number that is none": (lambda it: it.vm["files"].update({"web00_1.qcow2": ["9", "x"]}), "not one that"),
    "a number with a point": (lambda it: it.vm["files"].update({"web00_0.qcow2": [9.0, "x"]}), "not one that"),
    "a name that leaves": (lambda it: it.vm.update(name="../x"), "not allowed in a VM name"),
    "a type that leaves": (lambda it: it.vm.update(type=".."), "type name can't start"),
    "the templates": (lambda it: it.manifest.update(group="templates"), "reserved"),
    "a group that leaves": (lambda it: it.manifest.update(group="a/../.."), "not allowed in a group name"),
    "two of a name": (lambda it: it.manifest["vms"].append(it.vm), "there is such a VM"),
    "another version": (lambda it: it.manifest.update(nocloud=2), "not one that"),
    "a list": (lambda it: it.manifest.update(vms={"a": 1}), "not one that"),
    "a wrong value": (lambda it: it.vm["settings"].update(vmMem="$(reboot)"), "vmMem=$(reboot)"),
    "a value that is no text": (lambda it: it.vm["settings"].update(vmMem=64), "not one that"),
    "two lines": (lambda it: it.vm["settings"].update(vmUser="me\nvmKernel=/x"), "vmUser="),
    "nobody's init": (lambda it: it.vm["settings"].update(vmInit="none"), "its vmInit is none"),
    "a manifest too long": (lambda it: it.manifest.update(x="x" * (1 << 24)), "it doesn't begin with manifest.json"),
    "half a character": (lambda it: it.vm.update(key="\ud800"), "not one that"),
    "two of a UUID": (lambda it: twins(it, vmUuid=UUID, other=UUID.upper()), "it is in this tree already"),
    "two of a MAC": (lambda it: twins(it, vmUuid=UUID, other=UUID.replace("-1", "-4")), "it is in this tree already"),
    "a group's MAC": (lambda it: it.vm["settings"].update(vmUuid=UUID, vmMac="01:00:5e:00:00:01"), "vmMac="),
    "a key that is none": (lambda it: it.vm.update(key="-----BEGIN"), "ssh-keygen: "),
    "a raw disk": (lambda it: it.put(bytes(510) + b"\x55\xaa" + bytes(512)), "no qcow2 image"),
    "no disk": (lambda it: it.put(b"hello"), "web00_0.qcow2: neither"),
    "half a disk": (lambda it: it.put(it.disk[:70000]), "it ends before its data does"),
    "a backing file": (
        lambda it: it.put(qcow2(it.folder, "-F", "raw", "-b", str(it.folder / "secret"))),
        "refused: the image stands on another file",
    ),
    "a data file": (
        lambda it: it.put(qcow2(it.folder, "-o", f"data_file={it.folder / 'data'},data_file_raw=on")),
        "refused: the image keeps its data in another file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_an_archive_that_is_spoiled_leaves_nothing(cloud: Cloud, archive: Archive, what: str) -> None:
    spoil, said = SPOILED[what]
    spoil(archive)
    path = archive.write()
    cloud.base.mkdir()
    with nothing_made(cloud):
        done = cloud.run("import", path)
        assert done.status in (1, 2)
        done.fails(done.status, said)


def endless(tar: bytes) -> bytes:
    """The first file has less than no bytes, which is all that come to who reads them (tar(5): size, checksum)."""
    head = tar[:124] + b"\xff" * 12 + tar[136:148] + b" " * 8 + tar[156:512]
    return head[:148] + f"{sum(head):06o}\0 ".encode() + head[156:] + tar[512:]


def test_what_is_no_archive(cloud: Cloud, archive: Archive, tmp_path: Path) -> None:
    whole = archive.write().read_bytes()
    cloud.base.mkdir()
    for data, said in (
        (whole[:700], "not one that"),
        (whole[:3000], "damaged"),
        (b"", "damaged, or no tar"),
        (bytes(1024), "doesn't begin with"),
        (b"\x28\xb5\x2f\xfd" + whole, "damaged, or no tar"),
        (endless(whole), "manifest.json in it is no plain file"),
    ):
        (tmp_path / "y.tar").write_bytes(data)
        with nothing_made(cloud):
            cloud.run("import", tmp_path / "y.tar").fails(1, said)
    os.mkfifo(tmp_path / "pipe")
    for path in ("nothing", "pipe"):
        cloud.run("import", tmp_path / path).fails(1, f"{path}': no such folder or file")
    folder = tmp_path / "folder"
    folder.mkdir()
    cloud.run("import", folder).fails(1, "doesn't begin with")
    (folder / "manifest.json").write_text(json.dumps(archive.manifest))
    (folder / "web00_0.qcow2").symlink_to("/etc/shadow")
    with nothing_made(cloud):
        cloud.run("import", folder).fails(1, "web00_0.qcow2 in it is no plain file")
    (folder / "web00_0.qcow2").unlink()
    (folder / "web00_0.qcow2").write_bytes(archive.disk)
    cloud.run("import", folder).ok()


def test_an_import_is_whole(stub: Cloud, other: Cloud) -> None:
    """One VM that can't be made, and none is; a group's name in another case is that group's."""
    stub.run("vminstantiate", "-n", "stub", "-C", 2, "-g", "pf", "-t", "web", "-o", "name=web").ok()
    stub.run("vmstop", "-g", "pf", "--kill").ok()
    stub.run("export", "-g", "pf", "--to", "nocloud", "--with-keys", "out").ok()
    code = """
make = nocloud.make_clone
def fail(cloud, clone):
    if clone.vm.name == "web01":
        raise nocloud.Error("no room")
    return make(cloud, clone)
nocloud.make_clone = fail
sys.exit(nocloud.main(["nocloud", "import", *sys.argv[1:]]))"""
    with nothing_made(other):
        other.script(code, stub.home / "out").fails(1, "no room")
    add_template(other, stub_image(other), "x.frozen", "--mem", 32, "--cpu", 1, "--init", "none")
    other.run("vminstantiate", "-n", "x.frozen", "-g", "PF", "-o", "name=mine").ok()
    other.run("import", stub.home / "out").ok()
    assert other.groups() == ["PF"]


def test_what_is_interrupted_or_has_no_room_leaves_nothing(stub: Cloud, archive: Archive, tmp_path: Path) -> None:
    path = archive.write()
    stall = 'case $1 in convert | check) touch "$HOME/busy"; exec sleep 60;; esac; exec $REAL "$@"'
    stalled = replace_program(tmp_path / "stalled", "qemu-img", stall)
    for words in (["export", "old00", "--to", "libvirt", "out"], ["import", path]):
        with nothing_made(stub):
            child = stub.spawn(*words, env={"PATH": stalled})
            eventually((stub.home / "busy").exists, "it is at work")
            (stub.home / "busy").unlink()
            child.terminate()
            assert child.wait(30) == 143 and not list(stub.home.glob("out*"))
    huge = 'if [ $1 = measure ]; then echo "{\\"required\\": 1152921504606846976}"; else exec $REAL "$@"; fi'
    full = replace_program(tmp_path / "full", "qemu-img", huge)
    done = stub.run("export", "old00", "--to", "incus", "out", env={"PATH": full})
    done.fails(1, "the disks take up to 1099511627776 MB", "MB are free")
    assert not list(stub.home.glob("out*"))


# For other engines ####################################################################################


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory, vms: None) -> Iterator[Cloud]:
    """A cloud with a description, and what is exported of it for each engine; no VM is made."""
    with Cloud(tmp_path_factory.mktemp("described") / "home") as cloud:
        add_template(cloud, stub_image(cloud), "stub", "--mem", 32, "--cpu", 1, "--init", "systemd")
        (cloud.home / "shop").write_text(
            "stub:2:web:name=web;mem=64;disk=2;port=8080:80,0.0.0.0:9000:90\nstub:1:Sql:name=DB,;cpu=3;dsk=1;cap=50\n"
        )
        (cloud.home / ".ssh").mkdir()
        (cloud.home / ".ssh/id_ed25519.pub").write_text("ssh-ed25519 AAAAmine me@<home>&'\"\n")
        for engine in ("libvirt", "incus", "kubevirt", "nocloud"):
            done = cloud.run("export", "-f", "shop", "--to", engine, engine).ok()
            assert "machine-id" not in done.stderr and "DB: not exported: vmCpuCap" in done.stderr
            assert ("web00: not exported: vmPorts" in done.stderr) == (engine in ("libvirt", "incus"))
        assert not (cloud.base / "shop").exists() and not cloud.processes()
        yield cloud


def test_a_description_is_enough(described: Cloud, tmp_path: Path) -> None:
    out = described.home / "libvirt"
    names = {f"{name}.xml" for name in ("web00", "web01", "DB", "network")}
    disks = {"web00_0.qcow2", "web01_0.qcow2", "DB_0.qcow2", "DB_1.qcow2"}
    assert {path.name for path in out.iterdir()} == {*names, *disks, "define.sh", "README"}
    assert [image(out / name)["virtual-size"] >> 30 for name in ("web00_0.qcow2", "DB_1.qcow2")] == [2, 1]
    assert all("backing-filename" not in image(out / name) for name in disks)
    with Cloud(tmp_path / "other") as other:
        assert other.run("import", described.home / "nocloud").ok().lines == ["web00", "web01", "DB"]
        conf = other.conf("shop/web/web01")
        assert (conf["vmMem"], conf["vmPorts"]) == ("64", "127.0.0.1:8081:80,127.0.0.1:9001:90")
        assert (other.folder("shop/web/web01") / "ssh_host_ed25519_key").exists()


def test_libvirt(described: Cloud) -> None:
    out = described.home / "libvirt"
    vm, network = (ElementTree.parse(out / name).getroot() for name in ("DB.xml", "network.xml"))
    assert [vm.findtext(each) for each in ("name", "memory", "vcpu")] == ["DB", "32", "3"]
    assert [each.get("file") for each in vm.iter("source")][:2] == [
        f"/var/lib/libvirt/images/{name}" for name in ("DB_0.qcow2", "DB_1.qcow2")
    ]
    assert [each.get("dev") for each in vm.iter("target")] == ["vda", "vdb"]
    mac, hosts = vm.find(".//mac").get("address"), {each.get("name"): each for each in network.findall(".//dhcp/host")}  # type: ignore[union-attr]
    assert hosts["DB"].get("mac") == mac and set(hosts) == {"web00", "web01", "DB"}
    assert len({each.get("ip") for each in hosts.values()}) == 3
    keys = base64.b64decode(re.findall("root=([^<]*)<", (out / "DB.xml").read_text())[0]).decode().splitlines()
    assert len(keys) == 2 and "ssh-ed25519 AAAAmine" in keys
    subprocess.run(["shellcheck", out / "define.sh"], check=True)
    assert (out / "define.sh").stat().st_mode & 0o111 and "\ndefine DB\n" in (out / "define.sh").read_text()


def test_incus(described: Cloud, tmp_path: Path) -> None:
    """The documented format of an image's metadata, and what the script calls."""
    out = described.home / "incus"
    metadata = yaml(out / "DB.metadata.yaml")[0]
    assert metadata["architecture"] == os.uname().machine and isinstance(metadata["creation_date"], int)
    assert set(metadata) <= {"architecture", "creation_date", "expiry_date", "properties", "templates"}
    assert all(isinstance(each, str) for each in metadata["properties"].values())
    assert len(yaml(out / "user-data")[0]["ssh_authorized_keys"]) == 2
    subprocess.run(["shellcheck", out / "launch.sh"], check=True)
    log = tmp_path / "log"
    script = f'case $1-$2 in network-show) exit 1;; cluster-list) printf "one\\ntwo\\n";; esac; echo "$@" >>{log}'
    path = replace_program(tmp_path / "bin", "incus", script)
    subprocess.run([out / "launch.sh"], check=True, env={**os.environ, "PATH": path}, capture_output=True)
    said = log.read_text()
    assert (
        "network create nocloud --target one\nnetwork create nocloud --target two\nnetwork create nocloud ipv4" in said
    )
    assert re.search(r"^image import \S+/DB.tar.gz DB_0.qcow2 --alias shop-DB$", said, re.M)
    assert re.search(
        r"^init shop-DB db --vm .*root,size=1GiB -c limits.memory=32MiB -c limits.cpu=3 .*csm=true", said, re.M
    )
    assert re.search(r"^config device set web00 eth0 ipv4.address=10\.[0-9.]+ hwaddr=00:50:56:", said, re.M)
    assert said.count("\nstart ") == 3 and "user-data=#cloud-config\nssh_authorized_keys:\n  - ssh-ed25519 " in said


def conforms(value: Any, schema: dict[str, Any], definitions: dict[str, Any], place: str = "") -> None:
    """An object is what an OpenAPI schema says: it has what is required, and nothing that isn't known."""
    schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    kinds = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}
    if str(schema.get("type")) in kinds and schema.get("format") != "int-or-string":
        assert isinstance(value, kinds[schema["type"]]), place
    if isinstance(value, list):
        for each in value:
            conforms(each, schema["items"], definitions, place)
    elif isinstance(value, dict) and "properties" in schema:
        assert set(schema.get("required", ())) <= set(value) <= set(schema["properties"]), (place, sorted(value))
        for name, each in value.items():
            conforms(each, schema["properties"][name], definitions, f"{place}.{name}")


def test_kubevirt(described: Cloud) -> None:
    """Its published schema (see tests/data/kubevirt.json)."""
    definitions = json.loads((DATA / "kubevirt.json").read_text())["definitions"]
    out = described.home / "kubevirt"
    label = re.compile("[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
    for name in ("web00", "web01", "DB"):
        vm, *services = yaml(out / f"{name}.yaml")
        conforms(vm, definitions["v1.VirtualMachine"], definitions)
        spec = vm["spec"]["template"]["spec"]
        assert label.fullmatch(vm["metadata"]["name"]) and vm["metadata"]["name"] == name.lower()
        assert [each["name"] for each in spec["volumes"]] == [
            each["name"] for each in spec["domain"]["devices"]["disks"]
        ]
        paths = [each["containerDisk"]["path"] for each in spec["volumes"] if "containerDisk" in each]
        said = (out / f"{name}.Containerfile").read_text()
        assert paths and re.findall(r"^ADD --chown=107:107 (\S+) /disk/$", said, re.M) == [path[6:] for path in paths]
        assert all((out / path[6:]).exists() for path in paths)
        assert len(services) == (0 if name == "DB" else 2)
        for service in services:
            assert (service["apiVersion"], service["kind"]) == ("v1", "Service") and len(service["spec"]["ports"]) == 1
            assert service["spec"]["selector"].items() <= vm["spec"]["template"]["metadata"]["labels"].items()
            assert label.fullmatch(service["metadata"]["name"])
    assert [each["spec"]["ports"][0] for each in services] == []
    web01 = yaml(out / "web01.yaml")[1:]
    assert [each["spec"]["ports"] for each in web01] == [
        [{"port": 8081, "targetPort": 80}], [{"port": 9001, "targetPort": 90}]
    ]  # fmt: skip
    seed = next(each["cloudInitNoCloud"] for each in spec["volumes"] if "cloudInitNoCloud" in each)
    assert seed["userData"].startswith("#cloud-config\nssh_authorized_keys:\n  - ssh-ed25519 ")


WORDS: dict[str, Any] = {
    "name": "web00", "host": "web00", "uuid": "0d8e5a4c-9a3c-4f8e-8b57-5f3c1a2b3c4d", "mac": "00:50:56:0d:8e:5a",
    "cpu": 2, "mem": 512, "machine": "q35", "arch": "x86_64", "group": "pf", "subnet": "10.88.0", "gb": 2, "date": 1,
    "address": "10.88.0.2", "keys": "QQ==", "login": [{"line": "ssh-ed25519 A"}], "bios": [], "uefi": [], "secure": [],
    "disk": [{"number": 0, "file": "web00_0.qcow2", "dev": "vda"}], "port": [{"outer": 8080, "inner": 80}],
}  # fmt: skip


@pytest.mark.parametrize("firmware", ["bios", "uefi", "secure"])
def test_firmwares(tmp_path: Path, firmware: str) -> None:
    definitions = json.loads((DATA / "kubevirt.json").read_text())["definitions"]
    for fresh in (0, 1):
        words = {**WORDS, firmware: [{}], "fresh": [{}] * fresh}
        for engine, name in (("kubevirt", "NAME.yaml"), ("libvirt", "NAME.xml"), ("incus", "launch.sh")):
            text = nocloud.fill((ROOT / "etc/export" / engine / name).read_text(), {**words, "vm": [words]})
            (tmp_path / name).write_text(text)
            assert not re.search(r"(?m)^%|@\w+@", text)
        vm = yaml(tmp_path / "NAME.yaml")[0]
        conforms(vm, definitions["v1.VirtualMachine"], definitions)
        boot = vm["spec"]["template"]["spec"]["domain"]["firmware"]["bootloader"]
        assert boot == ({"bios": {}} if firmware == "bios" else {"efi": {"secureBoot": firmware == "secure"}})
        domain = ElementTree.parse(tmp_path / "NAME.xml").getroot()
        assert [each.get("firmware") for each in domain.iter("os")] == [None if firmware == "bios" else "efi"]
        assert ("root=QQ==" in (tmp_path / "NAME.xml").read_text()) == bool(fresh)
        if validate := shutil.which("virt-xml-validate"):
            subprocess.run([validate, tmp_path / "NAME.xml", "domain"], check=True, capture_output=True)
        said = re.findall(
            r"(?m)^launch web00 web00 .* (true|false) (true|false)$", (tmp_path / "launch.sh").read_text()
        )
        assert said == [("true" if firmware == "bios" else "false", "true" if firmware == "secure" else "false")]


def test_a_chain_is_shared(stub: Cloud) -> None:
    stub.run("vminstantiate", "-n", "stub", "-C", 2, "-g", "pf", "-o", "name=web").ok()
    stub.run("vmstop", "-g", "pf", "--kill").ok()
    mark(disk_of(stub, "pf/default/web01"))
    stub.run("vmsnapshot", "before", "-g", "pf").ok()
    stub.run("export", "-g", "pf", "--to", "libvirt", "--chain", "out").ok()
    out = stub.home / "out"
    stub.run("export", "web00", "--to", "libvirt", "out").says(1, f"{out}: it is there already", "name another place")
    below = [image(out / f"web0{number}_0.qcow2")["backing-filename"] for number in (0, 1)]
    assert all((out / each).exists() and "/" not in each for each in below)
    assert second_sector(out / "web01_0.qcow2") == b"Z" * 512
    for name in ("web00", "web01"):
        words = ["qemu-img", "compare", "-q", str(out / f"{name}_0.qcow2"), str(disk_of(stub, f"pf/default/{name}"))]
        subprocess.run(words, check=True)


def test_what_is_left_out_is_told(stub: Cloud) -> None:
    conf = stub.folder("kept/x/old00") / "old00.conf"
    conf.write_text(conf.read_text() + "vmFirmware=uefi\nvmGui=yes\n")
    (conf.parent / "firmware").mkdir()
    (conf.parent / "firmware/uefi").touch()
    said = stub.run("export", "old00", "--to", "nocloud", "out").ok().stderr
    assert "old00: not exported: its firmware's variables" in said and "old00: not exported: vmGui, " in said


def test_what_cannot_be_exported(stub: Cloud) -> None:
    with nothing_made(stub):
        stub.run("export", "old00", "out").fails(2, "--to ENGINE is missing")
        stub.run("export").fails(2, "DIR is missing")
        stub.run("export", "old00", "--to", "xen", "out").fails(2, "libvirt")
        stub.run("export", "old00", "--to", "incus", "--with-keys", "out").fails(
            2, "--with-keys goes with --to nocloud"
        )
        stub.run("export", "old00", "--to", "incus", "--chain", "out").fails(2, "--chain goes with --to libvirt")
        stub.run("export", "old00", "--to", "nocloud", "--with-keys", "--clean", "out").fails(2, "exclude")
        stub.run("export", "nobody", "--to", "libvirt", "out").fails(1, "nobody")
        stub.run("export", "old00", "templates/stub", "--to", "libvirt", "out").fails(2, "reserved")
        stub.run("export", "old00", "--to", "libvirt", "no/such/out").fails(1, "no/such")
    assert not list(stub.home.glob("*out*"))


# libvirt of its own: in namespaces with which everything in them ends, its folders empty. What comes out of ssh is
# the last that is said.
LIBVIRT = r"""
ip link set lo up
mount -t sysfs none /sys
for folder in /run /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
    mkdir -p $folder; mount -t tmpfs none $folder
done
for name in passwd group; do
    cp /etc/$name /run/$name; mount --bind /run/$name /etc/$name
done
echo 'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin' >>/etc/passwd
echo 'libvirt-qemu:x:64055:' >>/etc/group
cat >/etc/libvirt/qemu.conf <<'END'
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
END
export LIBVIRT_DEFAULT_URI=qemu:///system
virtlogd -d; libvirtd -d
for i in $(seq 100); do ! virsh list >/dev/null 2>&1 || break; sleep 0.2; done
TYPE=qemu "$OUT/define.sh" >&2 && virsh start web00 >&2 || exit
for i in $(seq 90); do
    if ssh -F none -i "$KEY" -o BatchMode=yes -o UserKnownHostsFile="$KNOWN" -o ConnectTimeout=2 root@$ADDRESS \
        'cat /root/file; hostname; cat /sys/class/net/*/address' 2>"$ERRORS"; then
        virsh destroy web00 >&2; exit 0
    fi
    sleep 1
done
cat "$ERRORS" /var/log/libvirt/qemu/* >&2; exit 1
"""


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="libvirt's network is root's")
def test_libvirt_runs_what_was_exported(tiny: Cloud) -> None:
    """The same machine: what is on its disk, name, MAC, address and host key."""
    if not shutil.which("libvirtd", path="/usr/sbin:/usr/bin"):
        pytest.fail("libvirtd is not installed: make test-all installs it")
    tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-o", "name=web", "-w", READY).ok()
    tiny.ssh("web00", "echo kept >/root/file; sync").ok()
    tiny.run("vmstop", "-g", "pf").ok()
    tiny.run("export", "-g", "pf", "--to", "libvirt", "out").ok()
    out, conf = tiny.home / "out", tiny.conf("pf/default/web00")
    for name, kind in (("web00.xml", "domain"), ("network.xml", "network")):
        subprocess.run(["virt-xml-validate", out / name, kind], check=True, capture_output=True)
    host_key = (tiny.folder("pf/default/web00") / "ssh_host_ed25519_key.pub").read_text()
    (tiny.home / "known").write_text(f"{conf['vmAddress']} {host_key}")
    env = {
        "OUT": str(out), "KEY": str(tiny.home / "config/nocloud/id_ed25519"), "ADDRESS": conf["vmAddress"],
        "KNOWN": str(tiny.home / "known"), "ERRORS": str(tiny.home / "errors"),
    }  # fmt: skip
    words = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", LIBVIRT]
    done = tiny.execute(words, env={**env, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}, timeout=240)
    said = done.ok().lines
    assert said[:2] == ["kept", "web00"] and conf["vmMac"] in said


# LXD of its own, likewise. It can't run VMs here (vhost_vsock), but knows an image from what is none.
LXD = r"""
ip link set lo up
mount -t sysfs none /sys
mount -t tmpfs none /run
export LXD_DIR=/run/lxd PATH="$TREE/usr/bin:$TREE/usr/sbin:$PATH" LD_LIBRARY_PATH="$TREE/usr/lib/$(uname -m)-linux-gnu"
mkdir /run/lxd
lxd --group root >/run/log 2>&1 &
for i in $(seq 150); do ! [ -S /run/lxd/unix.socket ] || break; sleep 0.2; done
lxc info >/dev/null || { cat /run/log >&2; exit 1; }
INCUS=lxc "$OUT/launch.sh" >&2
lxc network show nocloud
lxc image list --format csv --columns latd
"""
LXD_PACKAGES = ["lxd", "lxd-client", "libdqlite0", "libraft2", "liblxc1", "squashfs-tools", "attr"]


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="LXD is root's")
def test_lxd_imports_the_image(described: Cloud, tmp_path: Path) -> None:
    tree = tinyguest.unpack(tmp_path, LXD_PACKAGES)
    words = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", LXD]
    env = {"OUT": str(described.home / "incus"), "TREE": str(tree), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    done = described.execute(words, env=env, timeout=120).ok()
    assert f"shop-web00,{os.uname().machine},VIRTUAL-MACHINE,web00 of the group shop" in done.lines, repr(done)
    assert re.search(r"ipv4.address: 10\.[0-9.]+\.1/24", done.stdout), repr(done)
