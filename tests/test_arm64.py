"""Guests for another processor: a tiny one for arm64, started by UEFI, and emulated where this machine is no arm64."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinyguest
from support import Cloud, add_template

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which("qemu-system-aarch64"), reason="no qemu-system-aarch64"),
]

VM = "pf/web/arm00"
WAIT = "400"


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory, guest_cache: Path, vms: None) -> Iterator[Cloud]:
    """A cloud with a template for arm64, and a clone that is ready."""
    with Cloud(tmp_path_factory.mktemp("arm64") / "home") as cloud:
        image = tinyguest.build(guest_cache, arch="arm64")
        add_template(cloud, image, "tiny", "--mem", 256, "--cpu", 1, "--init", "systemd", "--arch", "aarch64")
        words = ("-g", "pf", "-t", "web", "-o", "name=arm;dsk=1", "-w", WAIT)
        done = cloud.run("vminstantiate", "-n", "tiny", *words, env={"NOCLOUD_NOKVM": "0"}, timeout=500).ok()
        if os.uname().machine != "aarch64":
            assert done.stderr.count("guests will be slow (they are for aarch64)") == 1, done
            assert done.stderr.count("slow") == 1, done
        yield cloud


def test_it_is_what_its_conf_says(arm: Cloud) -> None:
    conf = arm.conf(VM)
    assert (conf["vmArch"], conf["vmFirmware"], conf["vmMachine"][:5]) == ("aarch64", "uefi", "virt-")
    assert arm.conf("templates/tiny")["vmArch"] == "aarch64"


def test_it_is_itself_and_stays_so(arm: Cloud) -> None:
    """Name, keys, address, disks: as on x86-64; and it heeds the power button."""
    script = "uname -m; hostname; cd /dev/disk/by-id; ls; cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub"
    first = arm.ssh("arm00", script).ok()
    planted = (arm.folder(VM) / "ssh_host_ed25519_key.pub").read_text().split()[1]
    assert first.lines[:2] == ["aarch64", "arm00"] and "virtio-arm00_1" in first.stdout and planted in first.stdout
    arm.run("vmstop", "-g", "pf", "--timeout", 120).ok()
    assert "tinyguest: poweroff" in (arm.folder(VM) / "console.log").read_text(errors="replace")
    arm.run("vmstart", "arm00", "-w", WAIT, timeout=500).ok()
    again = arm.ssh("arm00", script).ok()
    assert again.stdout == first.stdout


def test_its_memory_comes_back(arm: Cloud) -> None:
    arm.ssh("arm00", "echo before >/run/state").ok()
    arm.run("vmsnapshot", "one", "-g", "pf", "--ram").ok()
    arm.ssh("arm00", "echo after >/run/state").ok()
    arm.run("vmrollback", "one", "-g", "pf", "-y").ok()
    assert arm.ssh("arm00", "cat /run/state").ok().stdout == "before\n"


def test_what_it_has_not(arm: Cloud, tmp_path: Path) -> None:
    arm.run("vmtemplate", "tiny", "--warm").fails(1, "only x86_64 guests can be frozen")
    words = ("-n", "tiny", "-g", "pf", "-o", f"share={tmp_path}:/mnt")
    arm.run("vminstantiate", *words).fails(1, "only machines of type q35 share folders")


def test_it_leaves_and_comes_back(arm: Cloud) -> None:
    """With the devices that there are for arm64."""
    arm.run("vmstop", "-g", "pf", "--kill").ok()
    arm.run("export", "arm00", "--to", "nocloud", "out").ok()
    arm.run("import", "out", "-g", "x").ok()
    assert (arm.conf("x/web/arm00")["vmArch"], arm.conf("x/web/arm00")["vmLayout"]) == ("aarch64", "1")
    arm.run("vmstart", "-g", "x").ok()
    arm.run("vmstop", "-d", "-g", "x").ok()


# Built from packages #################################################################################

# How the kernel knows a program for arm64: by its ELF header. O, C, F: binfmt_misc of the kernel's documentation.
FORMAT = r":nocloud-test:M::\x7fELF\x02\x01\x01" + r"\x00" * 9 + r"\x02\x00\xb7\x00:"
FORMAT += r"\xff" * 7 + r"\x00" + r"\xff" * 8 + r"\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:OCF"
FOLDER = "/proc/sys/fs/binfmt_misc"


@pytest.fixture
def emulation() -> Iterator[list[str]]:
    """Words before a command that runs programs for arm64, by an emulator that the kernel knows for so long."""
    if not shutil.which("arch-test") or not shutil.which("qemu-aarch64-static") or os.geteuid() != 0:
        pytest.skip("programs for arm64 are emulated for root, by qemu-user-static, and looked for by arch-test")
    mount = f"mount -t binfmt_misc none {FOLDER}"
    known = f"arch-test arm64 >/dev/null 2>&1 || printf %s '{FORMAT}' >{FOLDER}/register"
    yield ["unshare", "-m", "sh", "-ec", f'{mount}; {known}; exec "$@"', "sh"]
    # Before Linux 6.7 it was everybody's, and outlived the mount.
    forget = f"{mount}; [ ! -e {FOLDER}/nocloud-test ] || echo -1 >{FOLDER}/nocloud-test"
    subprocess.run(["unshare", "-m", "sh", "-ec", forget], check=True)


def test_a_template_is_built_from_packages(cloud: Cloud, vms: None, emulation: list[str]) -> None:
    words = cloud.argv("vmtemplate", "deb", "--build", "bookworm", "--arch", "aarch64", "--mem", 512)
    cloud.execute([*emulation, *words], timeout=2400).ok()
    conf = cloud.conf("templates/deb")
    assert (conf["vmArch"], conf["vmFirmware"], conf["vmInit"]) == ("aarch64", "uefi", "systemd")
    cloud.run("vminstantiate", "-n", "deb", "-g", "pf", "-t", "web", "-o", "name=arm", "-w", 900, timeout=1000).ok()
    said = cloud.ssh("arm00", "uname -m; hostname; cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub").ok()
    planted = (cloud.folder(VM) / "ssh_host_ed25519_key.pub").read_text().split()[1]
    assert said.lines == ["aarch64", "arm00", planted]
    cloud.run("vmstop", "-g", "pf", "--timeout", 120).ok()
