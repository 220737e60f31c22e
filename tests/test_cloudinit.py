"""cloud-init's seeds: what is in them, how they are attached, and guests that take them."""

from __future__ import annotations

import importlib
import json
import re
import stat
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import READY, Cloud, add_template, eventually, link_programs, nothing_made, pids, proc_words
from test_lifecycle import secrets

import nocloud

yaml: Any = importlib.import_module("yaml")  # ansible has it; it brings no types

UUID = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----\n"


def fake_clone(base: Path, name: str = "web00", user: str = "root", comment: str = "root@web00") -> nocloud.VM:
    vm = nocloud.VM(str(base), "pf", "web", name)
    Path(vm.folder).mkdir(parents=True, exist_ok=True)
    mac = nocloud.mac_of_uuid(UUID)
    vm.write_conf({"vmName": name, "vmUser": user, "vmUuid": UUID, "vmMac": mac, "vmInit": "cloud-init"})
    Path(vm.host_key).write_text(PRIVATE)
    Path(vm.host_key + ".pub").write_text(f"ssh-ed25519 AAAAhost {comment}\n")
    return vm


def cloud_config(files: dict[str, str]) -> dict[str, Any]:
    first, _, rest = files["user-data"].partition("\n")
    assert first == "#cloud-config"
    found = yaml.safe_load(files["user-data"])
    assert found == json.loads(rest)
    assert isinstance(found, dict)
    return found


# The seed ############################################################################################


def test_what_a_seed_says(tmp_path: Path) -> None:
    files = nocloud.seed_files(fake_clone(tmp_path), ["ssh-ed25519 AAAA one", "ssh-rsa BBBB"])
    assert yaml.safe_load(files["meta-data"]) == {"instance-id": UUID, "local-hostname": "web00"}
    assert yaml.safe_load(files["network-config"]) == {
        "version": 2,
        "ethernets": {
            "eth0": {
                "match": {"macaddress": "00:50:56:6b:a7:b8"},
                "set-name": "eth0",
                "dhcp4": True,
                "dhcp-identifier": "mac",
            }
        },
    }
    assert cloud_config(files) == {
        "hostname": "web00",
        "fqdn": "web00.pf.nocloud",
        "preserve_hostname": False,
        "prefer_fqdn_over_hostname": False,
        "disable_root": False,
        "ssh_authorized_keys": ["ssh-ed25519 AAAA one", "ssh-rsa BBBB"],
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": PRIVATE, "ed25519_public": "ssh-ed25519 AAAAhost root@web00"},
        "growpart": {"mode": "auto", "devices": ["/"]},
        "resize_rootfs": True,
        "package_update": False,
        "package_upgrade": False,
    }


def test_another_login_is_the_default_user(tmp_path: Path) -> None:
    config = cloud_config(nocloud.seed_files(fake_clone(tmp_path, user="debian"), ["ssh-rsa A"]))
    assert config["user"] == {"name": "debian"} and "disable_root" not in config


LABEL = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", fullmatch=True)
COMMENT = st.text(st.characters(exclude_characters="\n\r"), max_size=60)


@given(LABEL, st.lists(COMMENT, max_size=4), COMMENT)
def test_nothing_in_a_name_or_a_key_is_more_than_text(
    tmp_path_factory: pytest.TempPathFactory, name: str, comments: list[str], own: str
) -> None:
    """yes, 0x10 and 1e3 are names, too; a comment may hold quotes, colons, control and astral characters."""
    base = tmp_path_factory.getbasetemp() / "names"
    printable = own.encode("ascii", "replace").decode()  # our own key's comment is ours
    vm = fake_clone(base, name, comment=printable)
    keys = [f"ssh-ed25519 AAAA{number} {comment}" for number, comment in enumerate(comments)]
    files = nocloud.seed_files(vm, keys)
    assert all(set(text) <= set(string.printable) for text in files.values())
    config = cloud_config(files)
    assert config["hostname"] == name == yaml.safe_load(files["meta-data"])["local-hostname"]
    assert [key.split(" ")[:2] for key in config["ssh_authorized_keys"]] == [key.split(" ")[:2] for key in keys]
    assert config["ssh_keys"]["ed25519_private"] == PRIVATE
    assert set(config) == set(cloud_config(nocloud.seed_files(vm, [])))


def test_old_vms_get_no_seed(tmp_path: Path) -> None:
    """A VM that bash made has no vmInit: what its cloud-init would do to it now is not wanted."""
    vm = fake_clone(tmp_path)
    assert nocloud.takes_seed(vm)
    conf = Path(vm.conf_file)
    conf.write_text(conf.read_text().replace("vmInit=cloud-init\n", ""))
    assert not nocloud.takes_seed(nocloud.VM(vm.base, vm.group, vm.type, vm.name))


# How it is attached ##################################################################################


def without_vvfat(cloud: Cloud) -> None:
    """A qemu as RHEL builds it."""
    path = cloud.home / "qemu"
    path.write_text(
        '#!/bin/sh\n[ "$*" = "-drive format=help" ] && { echo "Supported formats: file qcow2 raw"; exit; }\n'
        'exec qemu-system-x86_64 "$@"\n'
    )
    path.chmod(0o755)
    cloud.env["NOCLOUD_vmQemu"] = str(path)


def test_this_qemu_has_vvfat(cloud: Cloud, vms: None) -> None:
    code = "print(nocloud.choose_seed(nocloud.probe_qemu(nocloud.load_config())))"
    assert cloud.script(code).ok().stdout == "vvfat\n"
    without_vvfat(cloud)
    assert cloud.script(code).ok().stdout == "iso\n"


def test_neither_vvfat_nor_an_iso_writer(cloud: Cloud, tiny_image: Path, vms: None) -> None:
    """The package is named, before anything is made."""
    add_template(cloud, tiny_image, "tiny", "--init", "cloud-init")
    without_vvfat(cloud)
    cloud.env["PATH"] = link_programs(cloud.home / "bin", "xorriso", "genisoimage", "mkisofs")
    with nothing_made(cloud):
        cloud.run("vminstantiate", "-n", "tiny", "-g", "x").fails(127, "vvfat", "xorriso")
        cloud.run("vminstantiate", "-n", "tiny", "-g", "x", "--dry-run").fails(127, "vvfat", "xorriso")


# Guests ##############################################################################################


@pytest.fixture(scope="module")
def seeded(shared: Cloud, tiny_image: Path) -> Iterator[Cloud]:
    """A cloud with the template `seeded`, and two clones of it."""
    add_template(shared, tiny_image, "seeded", "--mem", 96, "--cpu", 1, "--init", "cloud-init")
    options = ("-C", 2, "-g", "ci", "-o", "name=s;dsk=1", "-w", READY)
    done = shared.run("vminstantiate", "--debug", "-n", "seeded", *options).ok()
    (shared.home / "debug").write_text(done.stderr)
    yield shared


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_each_clone_is_who_its_seed_says(seeded: Cloud) -> None:
    """Name, keys, and the host key from the first contact on; the seed is after the data disk."""
    known = (seeded.base / ".known_hosts").read_text()
    assert known.count("\n") == 2
    for name in ("s00", "s01"):
        folder = seeded.folder(f"ci/default/{name}")
        conf = seeded.conf(f"ci/default/{name}")
        public = (folder / "ssh_host_ed25519_key.pub").read_text().split()[1]
        assert f"{conf['vmUuid']},{conf['vmAddress']} ssh-ed25519 {public}\n" in known
        script = (
            "hostname; cat /etc/instance-id /root/.ssh/authorized_keys; findfs LABEL=CIDATA; cat /sys/block/vd?/serial"
        )
        said = seeded.ssh(name, script).ok().stdout
        assert said.startswith(f"{name}\nseed {conf['vmUuid']}\n")
        assert (seeded.home / "config/nocloud/id_ed25519.pub").read_text() in said
        assert "\n/dev/vdc1\n" in said and said.endswith(f"{name}_0{name}_1seed")
        assert (folder / "configured").exists()


def test_the_key_is_nowhere_but_in_the_seed(seeded: Cloud) -> None:
    folder = seeded.folder("ci/default/s00")
    assert modes(folder / "seed") == {"user-data": 0o600, "meta-data": 0o600, "network-config": 0o600}
    assert modes(folder)["seed"] == 0o700
    texts = {str(pid): " ".join(proc_words(pid, "cmdline")) for pid in pids()}
    texts |= {name: (folder / name).read_text(errors="replace") for name in ("s00.command", "s00.conf", "s00.log")}
    texts["--debug"] = (seeded.home / "debug").read_text()
    found = secrets(seeded)
    assert found[2] in (folder / "seed/user-data").read_text()
    assert not [place for place, text in texts.items() for secret in found if secret in text]
    assert "dir=seed," in texts["s00.command"]


def test_started_again_it_is_the_same(seeded: Cloud) -> None:
    """The same instance: cloud-init does nothing a second time, here after a start by hand."""
    look = "cat /etc/ssh/ssh_host_ed25519_key; wc -l < /root/.ssh/authorized_keys; cat /root/file"
    before = seeded.ssh("s00", f"echo kept > /root/file; {look}").ok().stdout
    seeded.run("vmstop", "-n", "s00").quiet()
    argv = [seeded.folder("ci/default/s00") / "s00.command"]
    child = subprocess.Popen(argv, env=seeded.env, cwd=seeded.home, stdin=subprocess.DEVNULL)
    try:
        eventually(lambda: "s00 " in seeded.run("vmrunning").stdout or child.poll() is not None, "s00 runs")
        assert seeded.ssh("s00", look).ok().stdout == before
        seeded.run("vmstop", "-d", "-g", "ci").quiet()
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.wait()


def test_without_vvfat_the_seed_is_an_iso(seeded: Cloud) -> None:
    before = dict(seeded.env)
    without_vvfat(seeded)
    try:
        seeded.run("vminstantiate", "-n", "seeded", "-g", "iso", "-o", "name=i", "-w", READY).ok()
        folder = seeded.folder("iso/default/i00")
        assert modes(folder / "seed")["seed.iso"] == 0o600
        assert re.search(r"driver=raw,node-name=seed,.*filename=seed/seed.iso", (folder / "i00.command").read_text())
        said = seeded.ssh("i00", "hostname; findfs LABEL=cidata").ok().stdout
        assert said == "i00\n/dev/vdb\n"
    finally:
        seeded.env = before
    seeded.run("vmstop", "-d", "-g", "iso").quiet()
