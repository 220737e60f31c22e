"""KVM for real, on any machine: software emulation emulates SVM, so that a Debian guest of nocloud has a /dev/kvm that
works, and in it nocloud runs guests. Those are slower than emulated ones, so all waits are long; each has its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT
from test_install import Checkout
from test_machine import VM, Machine, debian_machine

pytestmark = pytest.mark.long

# What nocloud is called with in there; a command that hangs is killed long before the test is.
INSIDE = """set -e
export NOCLOUD_vmAccel=kvm NOCLOUD_vmNetwork=private NOCLOUD_vmBaseDir=/root/vms NOCLOUD_vmWaitTimeout=600
nocloud() { timeout -k 9 800 /root/nocloud.pyz "$@"; }
"""

# Freezing and waking up with a guest that has no system: in place of its agent, the host's side is told what that says.
WARM = """
import sys
sys.path.insert(0, "/root/source")
import nocloud
nocloud.talk = lambda vm, words, seconds: "at rest" if vm.is_template else "done"
nocloud.OwnGuest.wait = lambda guest: None
nocloud.OwnGuest.output = lambda guest, script: ""
sys.exit(nocloud.main(["nocloud", *sys.argv[1:]]))
"""


class Host(Machine):
    """The guest as a host, with nocloud.pyz and a template `tiny`."""

    def nocloud(self, script: str) -> str:
        return self.root(INSIDE + script, timeout=900)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path, vms: None) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("kvm")
    checkout = Checkout(folder / "source")
    checkout.make("build").ok()
    with debian_machine(folder / "home") as machine:
        host, name = Host(machine.cloud), VM.rpartition("/")[2]
        image = folder / "tiny.qcow2"
        image.symlink_to(tiny_image)
        host.root("modprobe -a kvm_amd vhost_net; mkdir source")
        host.cloud.run("vmcp", checkout.folder / "nocloud.pyz", image, f"{name}:/root/").ok()
        host.cloud.run("vmcp", "-r", ROOT / "nocloud.py", ROOT / "etc", f"{name}:/root/source/").ok()
        host.nocloud("nocloud template tiny --image tiny.qcow2 --mem 96 --cpu 1 --init systemd")
        yield host


def test_what_the_machine_is_good_for(host: Host) -> None:
    """A try may take too long here, where two layers of software stand for one of hardware; it fails for no other
    reason, and vmAccel=kvm goes on without one."""
    host.root("grep -qw svm /proc/cpuinfo && test -w /dev/kvm")
    said = host.nocloud("NOCLOUD_vmAccel=auto nocloud doctor acceleration || :")
    assert "hardware acceleration (KVM)" in said or "a guest does not run with it: /usr/bin/qemu" in said, said
    assert "not run" not in said or "no end after 2 s" in said, said


def test_a_clone(host: Host) -> None:
    """From its start with KVM, the host's processor and vhost-net to a proper end, and back to a moment in between."""
    host.nocloud("nocloud instantiate -n tiny -g pf -o name=k -w 600")
    words = host.root("tr '\\0' ' ' </proc/$(cat /root/vms/pf/default/k00/k00.pid)/cmdline")
    assert " -accel kvm -cpu host " in words and ("vhost=on" in words or host.fails("test -c /dev/vhost-net") == "")
    clocks = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
    said = host.nocloud(f"nocloud ssh k00 'cat {clocks}; grep -c hypervisor /proc/cpuinfo; echo before >/run/state'")
    assert "kvm-clock" in said, said
    host.nocloud("nocloud snapshot one -g pf --ram && nocloud ssh k00 'echo after >/run/state'")
    host.nocloud("nocloud rollback one -g pf -y")
    assert host.nocloud("nocloud ssh k00 cat /run/state 2>/dev/null") == "before\n"
    host.nocloud("nocloud stop -g pf --timeout 300")
    console = host.root("tail -c 2000 /root/vms/pf/default/k00/console.log")
    assert "tinyguest: poweroff" in console, console
    host.nocloud("nocloud stop -d -g pf")


def test_a_clone_that_wakes_up(host: Host) -> None:
    host.root("cat >warm.py", WARM)
    warm = "timeout -k 9 300 python3 -IS /root/warm.py"
    host.nocloud(
        "qemu-img create -q -f qcow2 blank.qcow2 8M\n"
        "nocloud template blank --image blank.qcow2 --mem 32 --cpu 1 --init systemd\n"
        f"{warm} template blank --warm"
    )
    said = host.nocloud(f"{warm} instantiate -n blank -g warm -o name=w -C 2; nocloud running; nocloud template -L")
    assert "boots" not in said and said.count("/default ") == 2 and "warm" in said, said
    assert host.root("grep -l -e '-accel kvm' /root/vms/warm/default/*/*.command").count("\n") == 2
    host.nocloud("nocloud stop -d -g warm")
