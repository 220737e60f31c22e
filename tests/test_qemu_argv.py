"""qemu's command line: pure, so golden files say it all. UPDATE=1 rewrites them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DATA, Cloud

import nocloud

GOLDEN = DATA / "argv"


def qemu(*options: str) -> nocloud.Qemu:
    return nocloud.Qemu(
        "/usr/bin/qemu-system-x86_64", "7.2.0", "pc-q35-7.2", frozenset(options or ("sandbox", "spice"))
    )


SETTINGS = {
    "vmUuid": "6ba7b810-9dad-41d1-80b4-00c04fd430c8",
    "vmMachine": "pc-q35-7.2",
    "vmMem": "512",
    "vmCpu": "2",
    "vmMac": "00:50:56:6b:a7:b8",
}


def machine(**changes: Any) -> nocloud.Machine:
    """A VM as it is by default, but for these changes: of its settings, by their keys, and of the rest."""
    settings = {each.key: each.default for each in nocloud.SETTINGS if each.where in ("both", "vm")} | SETTINGS
    values: dict[str, Any] = {
        "qemu": qemu(),
        "accel": "tcg",
        "name": "web00",
        "settings": settings | {key: changes.pop(key) for key in list(changes) if key in settings},
        "disks": [("web00_0.img", "qcow2", "web00_0")],
        "pid_file": "web00.pid",
        "credentials": "",
        "extra": [],
    }
    return nocloud.Machine(**{**values, **changes})


def arm64(**changes: Any) -> nocloud.Machine:
    tool = nocloud.Qemu("/usr/bin/qemu-system-aarch64", "7.2.0", "virt-7.2", frozenset({"sandbox"}), "aarch64")
    return machine(qemu=tool, vmArch="aarch64", vmMachine="virt-7.2", **changes)


FIRMWARE = nocloud.Firmware(("/a,b/CODE.fd", "raw"), ("/a,b/VARS.fd", "raw"), frozenset())
SECURE = nocloud.Firmware(("/x/CODE.qcow2", "qcow2"), ("/x/V", "raw"), frozenset({"secure-boot", "requires-smm"}))
DISKS = [(f"web00_{number}.img", "qcow2", f"web00_{number}") for number in range(4)]

CASES: dict[str, tuple[Any, ...]] = {
    "plain": (machine(), 5, -1),
    "kvm-vhost": (machine(accel="kvm", vmMem="4096", vmCpu="8"), 5, 6),
    "credentials": (machine(credentials="credentials"), 5, -1),
    "data-disks": (machine(disks=DISKS), 5, -1),
    "raw-disk": (machine(disks=[("web00_0.img", "raw", "web00_0")]), 5, -1),
    "as-bash-ran-it": (machine(vmMachine=""), 5, -1),
    "no-sandbox": (machine(qemu=qemu("spice")), 5, -1),
    "no-network": (machine(), -1, -1),
    "kernel": (machine(vmKernel="vmlinuz", vmInitrd="initrd.img", vmAppend="console=ttyS0 root=/dev/vda"), 5, -1),
    "extra": (machine(extra=["-s", "-global", "x=y"]), 5, -1),
    "commas": (machine(name="a,b", disks=[("c,d/e,,f.img", "qcow2", "a,b_0")], credentials="g,h"), 5, -1),
    "seed": (machine(disks=DISKS[:2], seed="seed"), 5, -1),
    "seed-iso": (machine(credentials="credentials", seed="seed/seed.iso"), 5, -1),
    "shares": (machine(vmMem="640"), 5, -1, [7, 9]),
    "long-name": (machine(name="x" * 63, disks=[("x_0.img", "qcow2", "x" * 63 + "_0")]), 5, -1),
    "layout-2": (machine(vmLayout="2", disks=DISKS[:2]), 5, -1),
    "layout-2-pc": (machine(vmLayout="2", vmMachine="pc"), 5, -1),
    "plugged": (machine(vmLayout="2", vmPlugged="2", disks=DISKS), 5, -1),
    "frozen": (machine(vmLayout="2", vmBalloon="no", memory="t.l1.img.memory", record="t.l1.img.record"), 5, -1),
    "waking": (machine(vmLayout="2", vmBalloon="no", memory="../a,b/t.l1.img.memory", wakes=True), 5, -1),
    "uefi": (machine(firmware=FIRMWARE, variables="firmware/uefi", vmFirmware="uefi"), 5, -1),
    "secure-tpm": (machine(firmware=SECURE, variables="firmware/secure", vmFirmware="secure", tpm=7), 5, -1),
    "tpm": (machine(tpm=7), 5, -1),
    "tpm-arm": (machine(tpm=7, vmMachine="virt-7.2"), 5, -1),
    "going-on": (machine(vmLayout="2", wakes=True), 5, -1),
    "arm64": (arm64(seed="seed"), 5, -1),
    "arm64-kvm": (arm64(accel="kvm", disks=DISKS), 5, 6),
    "arm64-iso": (arm64(iso="/x.iso"), 5, -1),
}


def one_a_line(argv: list[str]) -> str:
    """An option and its value share a line."""
    lines: list[str] = []
    for word in argv:
        if lines and re.fullmatch(r"-[a-z][a-z-]*", lines[-1]) and not word.startswith("-"):
            lines[-1] += " " + word
        else:
            lines.append(word)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    text = one_a_line(nocloud.qemu_argv(*CASES[name]))
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE") == "1":
        GOLDEN.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text


def test_every_golden_file_is_a_case() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("kernel", ["", "vmlinuz"])
@pytest.mark.parametrize("iso", ["", "/x.iso"])
def test_what_boots_first_is_one_thing(kernel: str, iso: str) -> None:
    """qemu refuses two devices with the same bootindex, and its loader of a kernel takes 0."""
    argv = nocloud.qemu_argv(machine(disks=DISKS, vmKernel=kernel, iso=iso), 5)
    order = [match.group(1) for word in argv for match in re.finditer(r"bootindex=([0-9]+)", word)]
    order += ["0"] if "-kernel" in argv else []
    assert len(order) == len(set(order)) and sorted(order)[0] == "0"
    assert ("-kernel" in argv) == (kernel != "" and iso == "")  # an ISO that is given boots first


def addresses(argv: list[str]) -> list[str]:
    return [match.group(1) for word in argv for match in re.finditer(r"\baddr=(0x[0-9a-f]+)", word)]


def devices(argv: list[str]) -> list[str]:
    return [argv[number + 1] for number, word in enumerate(argv) if word == "-device"]


def test_slots() -> None:
    """Each device has a slot of its own, none of the chipset's; the bash tools' guests know the card by its slot."""
    slots = nocloud.PCI_SLOTS
    assert len(set(slots.values())) == len(slots) and set(slots.values()) <= set(range(1, 31))
    assert slots["share"] == 1  # the slot that q35 alone has free
    assert (slots["nic"], slots["disk0"], nocloud.MAX_DISKS) == (3, 4, 22)  # layout 2 has one less


@given(st.integers(1, nocloud.MAX_DISKS), st.booleans(), st.booleans(), st.booleans())
def test_every_device_has_a_pci_address_of_its_own(disks: int, credentials: bool, network: bool, seed: bool) -> None:
    many = [(f"{number}.img", "qcow2", f"d_{number}") for number in range(disks)]
    for kind in (machine, arm64):
        built = kind(disks=many, credentials="credentials" if credentials else "", seed="seed" if seed else "")
        argv = nocloud.qemu_argv(built, 5 if network else -1)
        used = addresses(argv)
        assert len(used) == len(set(used)) == len(devices(argv))
        assert all(1 <= int(address, 16) <= 0x1E for address in used)  # 0x1f: the chipset of q35


def test_the_network_card_stays_where_it_is() -> None:
    """One disk more renames no card in the guest; slot 3 is where the bash tools had it."""
    for count in (1, 2, 4):
        argv = nocloud.qemu_argv(machine(disks=DISKS[:count]), 5)
        (card,) = (each for each in devices(argv) if "virtio-net" in each)
        assert "addr=0x3," in card + ","


@pytest.mark.parametrize("plugged", range(nocloud.HOTPLUG_PORTS + 1))
def test_layout_2(plugged: int) -> None:
    """With as many disks as may be, nothing is where something is; a disk that was plugged in stays where it is."""
    many = [(f"{number}.img", "qcow2", f"d_{number}") for number in range(nocloud.MAX_DISKS)]
    built = machine(vmLayout="2", vmPlugged=str(plugged), disks=many, seed="seed", memory="m", vmBalloon="no")
    argv = nocloud.qemu_argv(built, 5)
    assert not [each for each in devices(argv) if "balloon" in each]
    used = re.findall(r"addr=(0x[0-9a-f]+(?:\.\d)?)", " ".join(argv))
    assert len(used) == len(set(used))
    disks = [each for each in devices(argv) if "virtio-blk" in each and "drive=seed" not in each]
    assert [re.findall("bus=(port[0-9])", each) for each in disks[-plugged:] if plugged] == [
        [f"port{number}"] for number in range(plugged)
    ]
    assert all("bus=" not in each for each in disks[: len(disks) - plugged])


def test_disks_are_in_order() -> None:
    argv = nocloud.qemu_argv(machine(disks=DISKS), 5)
    disks = [each for each in devices(argv) if "virtio-blk" in each]
    assert [re.findall(r"drive=disk(\d+).*addr=(\w+).*bootindex=(\d+).*serial=(\w+)", each) for each in disks] == [
        [(str(number), hex(4 + number), str(number), f"web00_{number}")] for number in range(4)
    ]


def test_the_seed_is_the_last_disk_and_never_booted() -> None:
    many = [(f"{number}.img", "qcow2", f"d_{number}") for number in range(nocloud.MAX_DISKS)]
    for seed in ("seed", "seed/seed.iso"):
        disks = [each for each in devices(nocloud.qemu_argv(machine(disks=many, seed=seed), 5)) if "virtio-blk" in each]
        slots = [int(address, 16) for address in addresses(disks)]
        assert slots == sorted(slots) and len(slots) == nocloud.MAX_DISKS + 1
        assert "drive=seed" in disks[-1] and "bootindex" not in disks[-1]


def test_no_format_is_left_to_guessing() -> None:
    for case in CASES.values():
        argv = nocloud.qemu_argv(*case)
        assert "-drive" not in argv and "-hda" not in argv
        for number, word in enumerate(argv):
            if word == "-blockdev" and not argv[number + 1].startswith("driver=vvfat,"):  # no image: a folder
                assert re.match(r"driver=(qcow2|raw),", argv[number + 1])
                assert ",file.driver=file," in argv[number + 1]


def test_nothing_listens_on_tcp_and_nothing_runs_as_a_daemon() -> None:
    for case in CASES.values():
        argv = nocloud.qemu_argv(*case)
        assert not [word for word in argv if re.search(r"tcp:|\bhost=|\bport=", word)]
        assert "-daemonize" not in argv and "-vnc" not in argv and "-spice" not in argv


@given(st.text(min_size=1))
def test_commas_are_doubled(text: str) -> None:
    doubled = nocloud.comma(text)
    assert doubled.replace(",,", "") == text.replace(",", "")
    assert doubled.count(",") == 2 * text.count(",")


def test_serials_fit_in_20_bytes_and_tell_disks_apart() -> None:
    for name in ("web00", "x" * 63):
        argv = nocloud.disk_args(machine(disks=[(f"{n}", "qcow2", f"{name}_{n}") for n in range(12)]))
        serials = [match.group(1) for word in argv for match in re.finditer(r"serial=(\S+)$", word)]
        assert len(set(serials)) == 12 and all(len(serial) <= 20 for serial in serials)


def test_memory_and_processors() -> None:
    argv = nocloud.qemu_argv(machine(vmMem="640", vmCpu="3"), 5)
    assert argv[argv.index("-m") + 1] == "640M"
    assert argv[argv.index("-smp") + 1].startswith("3,")


# The binary ##########################################################################################


def test_the_real_binary_is_probed(cloud: Cloud, vms: None) -> None:
    code = "q = nocloud.probe_qemu(nocloud.load_config(), 'x86_64')\n"
    code += "print(q.path, q.version, q.machine, 'sandbox' in q.options)"
    words = cloud.script(code).ok().stdout.split()
    assert "qemu" in words[0] and re.fullmatch(r"\d+\.\d+\.\d+", words[1])
    assert re.fullmatch(r"pc-q35-\d+\.\d+", words[2]) and words[3] in ("True", "False")


def fake_qemu(cloud: Cloud, *replies: str) -> None:
    path = cloud.home / "fake-qemu"
    path.write_text("#!/bin/sh\ncat > /dev/null\n" + "".join(f"echo '{reply}'\n" for reply in replies))
    path.chmod(0o755)
    cloud.env["NOCLOUD_vmQemu"] = str(path)


def test_a_qemu_that_is_too_old(cloud: Cloud) -> None:
    fake_qemu(
        cloud,
        '{"return": {"qemu": {"major": 6, "minor": 1, "micro": 0}, "package": ""}, "id": "query-version"}',
        '{"return": [], "id": "query-machines"}',
        '{"return": [], "id": "query-command-line-options"}',
    )
    code = "try: nocloud.probe_qemu(nocloud.load_config(), 'x86_64')\nexcept nocloud.Error as error: print(error)"
    assert "6.1.0" in cloud.script(code).ok().stdout


@pytest.mark.parametrize("reply", ["this is no qemu", '{"QMP": {}}', "[1]", "null"])
def test_a_program_that_is_no_qemu(cloud: Cloud, reply: str) -> None:
    fake_qemu(cloud, reply)
    image = cloud.home / "x.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    cloud.run("vmtemplate", "x", "--image", image).fails(1, "fake-qemu")


# Acceleration ########################################################################################


def trier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> nocloud.Qemu:
    """A qemu that does this when it is tried with KVM, and notes that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "qemu").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/tries\n{script}\n')
    (tmp_path / "qemu").chmod(0o755)
    return nocloud.Qemu(str(tmp_path / "qemu"), "7.2.0", "pc-q35-7.2", frozenset())


def tries(tmp_path: Path) -> int:
    return (tmp_path / "tries").read_text().count("-accel kvm -cpu host")


def test_a_device_of_a_group_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, which has the host's device and other groups."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "stat", lambda path: SimpleNamespace(st_gid=54321, st_mode=0o20660))
    assert "sudo chgrp kvm /dev/kvm && " in nocloud.device_command("/dev/kvm", "kvm")


def test_tcg_is_said_only_where_it_was_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = trier(tmp_path, monkeypatch, "exit 0")
    assert nocloud.choose_accel("tcg", tool) == "tcg"
    reason, _ = nocloud.kvm_missing()
    assert nocloud.choose_accel("auto", tool) == ("tcg" if reason else "kvm")
    if reason:
        with pytest.raises(nocloud.Error, match="vmAccel=kvm") as caught:
            nocloud.choose_accel("kvm", tool)
        assert reason in caught.value.text and "vmAccel=auto" in caught.value.hint


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 0", ""),
        ("echo qemu: warning: odd; echo 'qemu: error: no MSR 0x10a'; echo more; kill -ABRT $$", "no MSR 0x10a"),
        ("exit 1", "status 1"),
        ("exec sleep 60", "no end after 2 s"),
    ],
)
def test_kvm_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str) -> None:
    """What opens may be useless: the answer is kept for this kernel and this qemu; a failure doesn't stay for good."""
    tool = trier(tmp_path, monkeypatch, script)
    assert told in nocloud.kvm_failure(tool, anew=True)[0] and not (tmp_path / "cache").exists()
    (tmp_path / "tries").unlink()
    reason, mend = nocloud.kvm_failure(tool)
    assert told in reason and bool(reason) == bool(mend) == bool(told)
    assert nocloud.kvm_failure(tool) == (reason, mend) and tries(tmp_path) == 1
    (tmp_path / "qemu").write_text((tmp_path / "qemu").read_text().rpartition("\n" + script)[0] + "\nexit 0\n")
    later = nocloud.Qemu(tool.path, "7.2.1", tool.machine, tool.options)
    assert nocloud.kvm_failure(later) == ("", "") and tries(tmp_path) == 2
    kept = tmp_path / "cache/nocloud/kvm"
    for age, reason in ((3000, "old"), (4000, "")):
        kept.write_text(kept.read_text().partition("\n")[0] + "\nold")
        os.utime(kept, (time.time() - age,) * 2)
        assert nocloud.kvm_failure(later)[0] == reason
    assert nocloud.kvm_failure(later, anew=True) == ("", "") and tries(tmp_path) == 4


@pytest.mark.parametrize(("arch", "machine"), [("x86_64", "q35"), ("aarch64", "virt")])
def test_the_guest_that_is_tried_ends_by_itself(tmp_path: Path, arch: str, machine: str) -> None:
    """Emulated, too, long before the try does."""
    if not shutil.which(f"qemu-system-{arch}"):
        pytest.skip(f"no qemu-system-{arch}")
    script = tmp_path / "qemu"
    emulated = '$(echo "$@" | sed "s/-accel kvm -cpu host/-accel tcg -cpu max/")'
    script.write_text(f"#!/bin/sh\nexec qemu-system-{arch} {emulated}\n")
    script.chmod(0o755)
    assert nocloud.try_kvm(nocloud.Qemu(str(script), "7.2.0", machine, frozenset(), arch)) == ""


def test_guests_for_another_processor_are_emulated() -> None:
    other = "aarch64" if os.uname().machine == "x86_64" else "x86_64"
    tool = nocloud.Qemu("/nonexistent", "7.2.0", "virt-7.2", frozenset(), other)
    assert nocloud.choose_accel("auto", tool) == "tcg"
    with pytest.raises(nocloud.Error, match=f"vmAccel=kvm: guests for {other} are emulated on {os.uname().machine}"):
        nocloud.choose_accel("kvm", tool)


def test_a_guest_is_emulated_where_kvm_only_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if nocloud.kvm_missing()[0]:
        monkeypatch.setattr(nocloud, "kvm_missing", lambda arch: ("", ""))
    tool = trier(tmp_path, monkeypatch, "echo no MSR; exit 1")
    assert nocloud.choose_accel("auto", tool) == "tcg" and tries(tmp_path) == 1
    assert nocloud.choose_accel("kvm", tool) == "kvm" and tries(tmp_path) == 1
