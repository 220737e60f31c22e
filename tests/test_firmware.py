"""UEFI, secure boot and the TPM: which firmware is taken, what the command line says, and what a guest finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinyguest
from support import READY, Cloud, add_template, eventually, link_programs
from test_frozen import clone, freeze, present_chain

import nocloud

VM = "pf/web/web00"

# Which firmware ######################################################################################


def descriptor(folder: Path, **changes: Any) -> dict[str, Any]:
    """What a descriptor says of firmware in flash memory; its files are there."""
    files = {}
    for key, name in (("executable", "CODE"), ("nvram-template", "VARS")):
        (folder / name).write_bytes(bytes(4096))
        files[key] = {"filename": str(folder / name), "format": "raw"}
    mapping = {"device": "flash", **files, **changes.pop("mapping", {})}
    targets = [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}]
    return {"interface-types": ["uefi"], "mapping": mapping, "targets": targets, "features": [], **changes}


class Firmware:
    """Folders with descriptors, the later ones above the earlier ones."""

    def __init__(self, home: Path) -> None:
        self.folders = [home / name for name in ("share", "etc", "own")]

    def add(self, name: str, number: int = 0, /, **changes: Any) -> None:
        """A descriptor, which is told by the name of its code."""
        self.folders[number].mkdir(exist_ok=True)
        told = descriptor(self.folders[number], **changes)
        told["mapping"]["executable"]["filename"] = f"{number}/{name}"
        (self.folders[number] / f"{name}.json").write_text(json.dumps(told))

    def mask(self, name: str, number: int) -> None:
        self.folders[number].mkdir(exist_ok=True)
        (self.folders[number] / f"{name}.json").write_text("")

    def found(self, kind: str = "uefi", arch: str = "x86_64", machine: str = "pc-q35-7.2", size: int = 0) -> str:
        try:
            return nocloud.find_firmware(kind, arch, machine, size).code[0]
        except nocloud.MissingProgram as error:
            assert f"vmFirmware={kind}: no such firmware for {machine}" in str(error)
            return ""


@pytest.fixture
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Firmware:
    made = Firmware(tmp_path)
    monkeypatch.setattr(nocloud, "FIRMWARE_FOLDERS", tuple(map(str, made.folders)))
    return made


SECURE = ["secure-boot", "enrolled-keys", "requires-smm"]


def test_the_first_that_fits_by_its_name(firmware: Firmware) -> None:
    assert firmware.found() == ""
    firmware.add("60-plain")
    firmware.add("70-plain")
    firmware.add("50-can", features=["secure-boot", "requires-smm"])
    firmware.add("40-keys", features=SECURE)
    firmware.add("30-bios", 0, **{"interface-types": ["bios"]})
    firmware.add("20-memory", mapping={"device": "memory", "filename": "x"})
    firmware.add("10-stateless", mapping={"mode": "stateless"})
    firmware.add("00-arm", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    assert firmware.found() == "0/60-plain"  # rather one that leaves secure boot alone
    assert firmware.found("secure") == "0/40-keys"
    assert firmware.found("uefi", "aarch64", "virt-7.2") == "0/00-arm"
    assert firmware.found("secure", "aarch64", "virt-7.2") == firmware.found(machine="microvm") == ""
    assert firmware.found(size=4096) == "0/60-plain" and firmware.found(size=8192) == ""
    firmware.mask("60-plain", 1)
    assert firmware.found() == "0/70-plain"
    firmware.mask("70-plain", 2)
    assert firmware.found() == "0/50-can"  # all that there is


def test_the_hosts_and_the_users_own_come_first(firmware: Firmware) -> None:
    for number in (0, 1, 2):
        firmware.add("60", number)
        assert firmware.found() == f"{number}/60"
    (firmware.folders[1] / "50.json").write_text("{not json")
    with pytest.raises(nocloud.Error, match=r"50\.json: no descriptor of firmware as QEMU has them"):
        firmware.found()


def test_the_users_own_folder(cloud: Cloud) -> None:
    own = cloud.home / "config/qemu/firmware"
    own.mkdir(parents=True)
    told = descriptor(cloud.home, targets=[{"architecture": "riscv64", "machines": ["virt*"]}])
    (own / "60.json").write_text(json.dumps(told))
    code = "print(nocloud.find_firmware('uefi', 'riscv64', 'virt').code[0])"
    assert cloud.script(code).ok().stdout == f"{cloud.home}/CODE\n"


# A VM's own ##########################################################################################


def boots(cloud: Cloud, name: str, **settings: str) -> None:
    """Have a template, and so its clones, start with these settings."""
    conf = cloud.folder(f"templates/{name}") / f"{name}.conf"
    conf.write_text(nocloud.update_assignments(conf.read_text(), settings))


def clones(cloud: Cloud, *words: object, template: str = "blank", count: int = 1) -> None:
    argv = ("-n", template, "-g", "pf", "-t", "web", "-C", count, "-o", "name=web", *words)
    cloud.run("vminstantiate", *argv, timeout=300).ok()


def variables(cloud: Cloud, vm: str = VM, kind: str = "uefi") -> Path:
    return cloud.folder(vm) / "firmware" / kind


def put(path: Path, pattern: int) -> None:
    """Write 4 KB of a byte into the middle of a VM's variables."""
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} 256k 4k", path], check=True)


def holds(path: Path, pattern: int) -> bool:
    words = ["qemu-io", "-r", "-U", "-f", "qcow2", "-c", f"read -q -P {pattern} 256k 4k", str(path)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert "verification failed" in done.stdout or not done.returncode, done
    return not done.returncode


def tpms(cloud: Cloud) -> list[int]:
    return [pid for pid, words in cloud.processes().items() if words.split()[0].endswith("swtpm")]


@pytest.fixture
def uefi(blank: Cloud) -> Iterator[Cloud]:
    """A cloud whose template `blank` has UEFI and a TPM; its clones get as far as firmware does."""
    boots(blank, "blank", vmMem="96", vmFirmware="uefi", vmTpm="yes")
    yield blank


def test_what_this_host_lacks_is_said_before_a_clone_is_made(uefi: Cloud) -> None:
    boots(uefi, "blank", vmMachine="pc", vmFirmware="secure")
    said = "vmFirmware=secure: no such firmware for pc of x86_64 in /usr/share/qemu/firmware"
    uefi.run("vminstantiate", "-n", "blank").fails(127, said, "install")
    uefi.env["PATH"] = link_programs(uefi.home / "bin", "swtpm")
    uefi.run("vminstantiate", "-n", "blank").fails(127, "swtpm: not found; it is needed for this")
    assert not uefi.groups()
    boots(uefi, "blank", vmFirmware="efi")
    uefi.run("vminstantiate", "-n", "blank").fails(2, "vmFirmware=efi: expected one of bios, uefi, secure")


def test_each_has_variables_and_a_tpm_of_its_own(uefi: Cloud) -> None:
    """A clone's begin as its template's; a kind of firmware has its own ones, and a TPM ends with its VM."""
    clones(uefi)
    assert uefi.conf(VM)["vmFirmware"] == "uefi" and uefi.conf(VM)["vmTpm"] == "yes"
    assert len(tpms(uefi)) == 1 and (uefi.folder(VM) / "firmware/tpm").stat().st_mode & 0o777 == 0o700
    info = json.loads(subprocess.check_output(["qemu-img", "info", "-U", "--output=json", variables(uefi)]))
    assert info["format"] == "qcow2" and "backing-filename" not in info and info["actual-size"] < 256 << 10
    os.kill(uefi.qemu(VM), signal.SIGKILL)
    eventually(lambda: not tpms(uefi), "the TPM ends", 10)
    for _ in range(2):
        uefi.start("web00").ok()
        uefi.run("vmstop", "-n", "web00", "--kill").ok()
    eventually(lambda: not tpms(uefi), "the TPM ends", 10)
    put(variables(uefi), 7)
    uefi.run("vmtemplate", "new", "--from", "web00", "--no-clean").ok()
    assert holds(variables(uefi, "templates/new"), 7)
    assert not (uefi.folder("templates/new") / "firmware/tpm").exists()
    clones(uefi, template="new")
    assert holds(variables(uefi, "pf/web/web01"), 7)
    uefi.run("vmsnapshot", "old", "-n", "web00").ok()
    put(variables(uefi), 8)
    uefi.run("vmtemplate", "older", "--from", "web00@old", "--no-clean").ok()
    assert holds(variables(uefi, "templates/older"), 7)
    uefi.run("vmtemplate", "other", "--from", "web00", "--secure-boot", "--no-clean").ok()
    assert not (uefi.folder("templates/other") / "firmware").exists()
    boots(uefi, "new", vmFirmware="secure", vmTpm="no")
    clones(uefi, template="new")
    words = (uefi.folder("pf/web/web02") / "web02.command").read_text()
    assert "smm=on" in words and not variables(uefi, "pf/web/web02").exists()
    assert variables(uefi, "pf/web/web02", "secure").exists()
    uefi.run("vmstop", "-g", "pf", "-d").ok()
    assert not uefi.groups()


def test_snapshots_and_saved_memory(uefi: Cloud) -> None:
    """What firmware and TPM keep belongs to the VM, whether it runs or not."""
    clones(uefi)
    uefi.run("vmsnapshot", "ram", "--ram", "-g", "pf").ok()
    uefi.run("vmstop", "--save", "-n", "web00").ok()
    uefi.start("web00").ok()
    uefi.run("vmstop", "-n", "web00", "--kill").ok()
    state = uefi.folder(VM) / "firmware/tpm/mine"
    put(variables(uefi), 7)
    state.write_text("old")
    uefi.run("vmsnapshot", "off", "-g", "pf").ok()
    put(variables(uefi), 8)
    state.write_text("new")
    uefi.run("vmrollback", "off", "-g", "pf").ok()
    assert holds(variables(uefi), 7) and state.read_text() == "old"
    uefi.run("vmrollback", "ram", "-g", "pf").ok()
    assert uefi.qemu(VM) and len(tpms(uefi)) == 1  # it goes on
    assert not holds(variables(uefi), 7) and not state.exists()


@pytest.mark.parametrize("kind", ["--uefi", "--secure-boot"])
def test_clones_wake_up(cloud: Cloud, vms: None, kind: str) -> None:
    """Flash memory is taken over as other memory is, and goes to the clone's own variables."""
    image = cloud.home / "blank.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    add_template(cloud, image, "blank", "--mem", 96, "--cpu", 1, "--init", "systemd", kind)
    freeze(cloud)
    assert clone(cloud).stderr == ""
    name = cloud.conf("templates/blank")["vmFirmware"]
    assert present_chain(cloud)[1:] == ["blank.l1.img", "blank_0.img"]
    own = variables(cloud, "pf/default/web00", name)
    assert own.exists() and own.stat().st_ino != variables(cloud, "templates/blank", name).stat().st_ino


def test_what_is_said_when_a_template_is_made(blank: Cloud) -> None:
    image = blank.home / "blank.qcow2"
    for words, expected in (
        (("--uefi",), {"vmFirmware": "uefi"}),
        (("--secure-boot", "--tpm"), {"vmFirmware": "secure", "vmTpm": "yes"}),
        ((), {}),
    ):
        blank.run("vmtemplate", "new", "--image", image, *words).ok()
        conf = blank.conf("templates/new")
        assert {key: conf[key] for key in ("vmFirmware", "vmTpm") if key in conf} == expected
        blank.run("vmtemplate", "new", "--delete").ok()
    assert nocloud.asked_settings({"boot": "secure", "mem": ""}) == {"vmFirmware": "secure"}  # of a catalogue
    blank.run("vmtemplate", "blank", "--cold", "--uefi").fails(2, "--cold: what a template boots with is said when")
    boots(blank, "blank", vmTpm="yes", vmInit="systemd")
    blank.run("vmtemplate", "blank", "--warm").fails(2, "it has a TPM, which no two clones must share")
    blank.run("vmcreate", "-a", "-n", "blank", "--uefi").ok()
    assert blank.conf("templates/blank")["vmFirmware"] == "uefi"


# Guests ##############################################################################################

APPEND = tinyguest.SYSLINUX_CFG.partition("APPEND ")[2].strip()
LOOK = "cat /sys/class/tpm/tpm0/tpm_version_major; ls /sys/firmware/efi; dmesg | grep secureboot"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["uefi", "secure"])
def test_a_guest_finds_both(tiny: Cloud, guest_cache: Path, kind: str) -> None:
    """Firmware hands a kernel over that its own loader has read; with secure boot only since it is signed."""
    parts, initrd = tinyguest._parts(guest_cache), tiny.home / "initrd"
    variant = tinyguest._variant(None, {"IFNAME": "", "CLIENT_ID": "", "READS": "systemd cloud-init"})
    initrd.write_bytes((parts / "initrd").read_bytes() + variant)
    kernel = {"vmMem": "256", "vmKernel": f"{parts}/vmlinuz", "vmInitrd": str(initrd), "vmAppend": APPEND}
    boots(tiny, "tiny", **kernel, vmFirmware=kind, vmTpm="yes")
    clones(tiny, "-w", READY, template="tiny")
    version, *files, said = tiny.ssh("web00", LOOK).ok().lines
    assert version == "2" and "efivars" in files
    assert said.endswith("Secure boot enabled" if kind == "secure" else "Secure boot disabled")


# Long ################################################################################################

STATE = "ls -d /sys/firmware/efi /dev/tpm0; mokutil --sb-state 2>&1; findmnt -no SOURCE /"


@pytest.mark.long
def test_one_template_boots_both_ways(cloud: Cloud, vms: None) -> None:
    cloud.run("vmtemplate", "deb", "--build", "bookworm", "--include", "mokutil", "--mem", 512, timeout=900).ok()
    for number, (settings, expected) in enumerate(
        (
            ({}, ["EFI variables are not supported on this system"]),
            ({"vmFirmware": "uefi"}, ["/sys/firmware/efi", "SecureBoot disabled", "Platform is in Setup Mode"]),
            ({"vmFirmware": "secure", "vmTpm": "yes"}, ["/dev/tpm0", "/sys/firmware/efi", "SecureBoot enabled"]),
        )
    ):
        boots(cloud, "deb", **settings)
        clones(cloud, "-w", 600, template="deb")
        name = f"web{number:02d}"
        assert cloud.ssh(name, STATE).ok().lines == [*expected, "/dev/vda1"]
        cloud.run("vmstop", "-n", name, timeout=300).quiet()
    boots(cloud, "deb", vmTpm="no")
    cloud.run("vmtemplate", "deb", "--warm", timeout=600).ok()
    clones(cloud, "-w", READY, template="deb")
    assert "frozen" not in {path.name for path in cloud.folder("pf/web/web03").iterdir()}
    assert cloud.ssh("web03", "cat /proc/uptime; mokutil --sb-state").ok().lines[1:] == ["SecureBoot enabled"]
    assert "EFI stub" not in (cloud.folder("pf/web/web03") / "console.log").read_text(errors="replace")
