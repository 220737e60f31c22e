"""`sudo make` on a real machine: a Debian guest with systemd, from a template of our own, over ssh; and a reboot."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import has_subordinate_ids
from support import Cloud, until
from test_install import Checkout

pytestmark = pytest.mark.long

PACKAGES = (
    "make", "sudo", "qemu-system-x86", "qemu-utils", "dnsmasq-base", "nftables", "iptables", "passt", "openssh-client",
    "libpam-systemd", "systemd-resolved", "udhcpc", "bind9-dnsutils",
)  # fmt: skip
VM = "real/host/m00"

# Rules as Docker makes them, at each boot before ours.
DOCKER = """[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=iptables -N DOCKER-USER
ExecStart=iptables -A DOCKER-USER -j RETURN
ExecStart=iptables -A FORWARD -j DOCKER-USER
ExecStart=iptables -P FORWARD DROP
[Install]
WantedBy=multi-user.target
"""

# An ordinary user: alice, who may use sudo, and bob, who may have VMs on the bridge.
PREPARE = f"""set -e
cat >/etc/systemd/system/docker.service <<'END'
{DOCKER}END
systemctl enable --now docker.service
for user in alice bob; do useradd --create-home --shell /bin/bash $user; done
ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
echo 'alice ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/alice
install -d -o alice -g alice /home/alice/nocloud
base64 -d | tar xz -C /home/alice/nocloud
chown -R alice:alice /home/alice/nocloud
"""

# All that isn't a log, a cache or a home: what an uninstalled nocloud must not have changed.
SURVEY = """
find /boot /etc /lib /opt /srv /usr /var -xdev \\
    \\( -path /var/log -o -path /var/cache -o -path /var/tmp -o -path /var/lib/systemd \\) -prune \\
    -o ! -name '*-' ! -name .pwd.lock ! -name statoverride-old ! -name 'sub[ug]id' -printf '%p %y %m %u:%g %l\\n' | sort
getent passwd | grep -v ^bob; getent group | sed 's/:[^:]*$//'; dpkg-statoverride --list
cat /etc/qemu/bridge.conf 2>/dev/null || :
nft --stateless list ruleset; iptables -S; ip -o link | cut -d: -f2
ls -A /run/nocloud /var/lib/nocloud 2>/dev/null || :
"""

# A namespace that stands in for a VM: what asks for an address there, and is known by the name that it gave.
STAND_IN = """set -e
cat >/tmp/udhcpc <<'END'
#!/bin/sh
[ "$1" != bound ] || { ip address replace $ip/$mask dev $interface; ip route replace default via $router; }
END
chmod 755 /tmp/udhcpc
ip netns add guest
trap 'ip netns delete guest' EXIT
ip link add standin type veth peer name eth0 netns guest
ip link set standin master nocloud up
ip -n guest link set eth0 up
ip netns exec guest udhcpc -q -n -t 20 -i eth0 -x hostname:standin -s /tmp/udhcpc
ip -4 -n guest -br address show eth0
dig +short @192.168.1.1 standin.nocloud
getent ahostsv4 standin.nocloud
outside=$(ip -4 route show default | sed 's/.*via \\([^ ]*\\).*/\\1/;q')
ip netns exec guest ping -c 3 -W 5 $outside
"""


class Machine:
    """The guest; what is done in it says what it said where it fails."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud

    def root(self, script: str, input: str = "", timeout: float = 240) -> str:
        argv = self.cloud.argv("ssh", VM, "bash", "-c", f"'{quoted(script)}'")
        done = self.cloud.execute(argv, input=input, timeout=timeout)
        assert done.status == 0, f"in the guest:\n{script}\n-> {done.status}\n{done.stdout}\n{done.stderr}"
        return done.stdout + re.sub("^nocloud ssh: waiting .*\n", "", done.stderr, flags=re.M)

    def fails(self, script: str) -> str:
        return self.root(f"! {{ {script}; }} 2>&1")

    def user(self, name: str, script: str, timeout: float = 240) -> str:
        return self.root(f'su - {name} -c "$(cat)"', script, timeout)

    def eventually(self, script: str, seconds: float = 90) -> None:
        self.root(f"for i in $(seq {seconds:.0f}); do {{ {script}; }} >/dev/null 2>&1 && exit; sleep 1; done; {script}")


def quoted(script: str) -> str:
    return script.replace("'", "'\\''")


@contextlib.contextmanager
def debian_machine(home: Path) -> Iterator[Machine]:
    """A clone of a template with these packages; that is built, or where NOCLOUD_TEST_CACHE is set was once."""
    if not shutil.which("mmdebstrap"):
        pytest.fail("mmdebstrap is not installed: make test installs what the tests need")
    if os.geteuid() != 0 and not has_subordinate_ids():
        pytest.skip("this user has no subordinate uids in /etc/subuid")
    key = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    kept = Path(os.environ.get("NOCLOUD_TEST_CACHE", "/nonexistent"), f"machine-{key}.qcow2")
    with Cloud(home) as cloud:
        if kept.exists():
            cloud.run("vmtemplate", "machine", "--image", kept, "--init", "systemd", "--mem", 1536, timeout=300).ok()
        else:
            words = ("--build", "bookworm", "--include", ",".join(PACKAGES), "--mem", 1536)
            cloud.run("vmtemplate", "machine", *words, timeout=1500).ok()
            if kept.parent.is_dir():
                part = kept.with_suffix(f".{os.getpid()}")
                shutil.copyfile(cloud.base / "templates/machine/machine_0.img", part)
                part.rename(kept)
        clone = ("-n", "machine", "-g", "real", "-t", "host", "-o", "name=m;cpu=2", "-w", 600)
        cloud.run("vminstantiate", *clone, timeout=700).ok()
        yield Machine(cloud)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, vms: None) -> Iterator[Machine]:
    with debian_machine(tmp_path_factory.mktemp("machine") / "home") as machine:
        yield machine


def test_sudo_make_on_a_real_machine(machine: Machine, tmp_path: Path, survived: Callable[[str, int], None]) -> None:
    checkout = Checkout(tmp_path / "nocloud")
    checkout.make("build").ok()
    archive = subprocess.run(["tar", "cz", "-C", checkout.folder, "."], capture_output=True, check=True).stdout
    machine.root(PREPARE, base64.b64encode(archive).decode())
    before = machine.root(SURVEY)

    said = machine.user("alice", "cd nocloud && sudo make")
    for words in (
        "is in /usr/local",
        "members of kvm",
        "allow nocloud",
        "192.168.1.0/24",
        "nocloud doctor",
    ):
        assert words in said, said
    assert "build.sh" not in said  # what was there was up to date
    assert machine.root("find /home/alice/nocloud -user root") == ""
    machine.root("usermod -aG kvm bob")
    check_the_bridge(machine)
    check_the_units(machine)
    check_a_members_vm(machine)
    machine.root(STAND_IN)
    check_a_kept_group(machine)
    check_a_clock_that_jumps(machine)
    survived("the clock a day on, and two back", 1)

    reboot(machine)
    check_the_bridge(machine)
    assert machine.root("journalctl --boot --no-pager _PID=1 | grep cycle || :") == ""
    machine.eventually("systemctl is-active nocloud@shop")
    machine.eventually("getent ahostsv4 web00.shop.nocloud | grep ^192.168.1.")
    machine.user("bob", "qemu-io -U -r -c 'read -P 0x5a 0 4096' vms/shop/web/web00/web00_0.img | grep -v failed")
    machine.root(STAND_IN)

    again = machine.root("make -C /home/alice/nocloud install; ls -A /sys/class/net/nocloud/brif")
    assert "kept" not in again and "tap0" in again  # a VM that is on the bridge stays there
    machine.root("nocloud doctor")
    refused = machine.fails("make -C /home/alice/nocloud uninstall")
    assert "nocloud@shop.service, shop/web/web00 of bob; nothing was changed" in refused, refused
    machine.root("systemctl stop nocloud@shop")
    check_a_users_own_unit(machine)
    machine.user("alice", "cd nocloud && sudo make uninstall")
    machine.root("rm -r /etc/systemd/system/nocloud@shop.service.d")  # bob's own
    after = machine.root(SURVEY)
    assert set(after.splitlines()) ^ set(before.splitlines()) == set()
    assert machine.root("find /home/alice/nocloud -user root") == ""


def check_the_bridge(machine: Machine) -> None:
    """Both services are active, the bridge is up, and dnsmasq is no root's."""
    for unit in ("nocloud-bridge", "nocloud-dnsmasq", "nocloud-dnsmasq-reload.path"):  # of several, one would do
        machine.eventually(f"systemctl is-active {unit}")
    assert "192.168.1.1/24" in machine.root("ip -br address show nocloud")
    assert machine.root("ps -o user:20= -C dnsmasq").split() == ["nocloud-dnsmasq"]
    assert "failed" not in machine.root("systemctl list-units --failed --plain --no-legend 'nocloud*'")


def check_the_units(machine: Machine) -> None:
    machine.root("systemd-analyze verify --man=no /usr/local/lib/systemd/system/nocloud*")
    machine.root("systemd-analyze verify --man=no nocloud@shop.service")
    for unit in ("nocloud-dnsmasq", "nocloud-dnsmasq-reload"):
        level = machine.root(f"systemd-analyze security --no-pager {unit}.service | tail -1")
        assert " OK " in level or " SAFE " in level or " PERFECT " in level, level


def check_a_members_vm(machine: Machine) -> None:
    """A VM of an ordinary member of kvm is on the bridge, and its name is in DNS at once."""
    machine.user(
        "bob",
        "printf 'vmBaseDir=~/vms\\nvmStopTimeout=2\\nvmAccel=tcg\\n' >.nocloud.conf\n"
        "qemu-img create -q -f qcow2 blank.qcow2 8M\n"
        "vmtemplate blank --image blank.qcow2 --init none --mem 32 --cpu 1\n"
        "echo '*:*:*:*:*:*,ignore' >/var/lib/nocloud/published/$(cat /proc/sys/kernel/random/uuid)",  # and nobody cares
    )
    said = machine.user(
        "bob",
        "vminstantiate -n blank -g shop -t web -o name=web && "
        "dig +short @192.168.1.1 web00.shop.nocloud && getent ahostsv4 web00.shop.nocloud && vmrunning",
    )
    assert "web00 shop/web 192.168.1." in said and "left to DHCP" not in said, said
    assert machine.root("stat -c %U /var/lib/nocloud/hosts/*").split() == ["root"]
    assert machine.root("ls /sys/class/net/nocloud/brif").strip()
    outsider = "su - nobody -s /bin/sh -c '/usr/lib/qemu/qemu-bridge-helper --br=nocloud --fd=3'"
    assert "Permission denied" in machine.fails(outsider)


def check_a_kept_group(machine: Machine) -> None:
    """`systemctl stop` keeps a group with its data; enabled, it starts with the machine."""
    machine.user("bob", "vmstop -g shop && qemu-io -c 'write -P 0x5a 0 4096' vms/shop/web/web00/web00_0.img")
    machine.root(
        "set -e; mkdir /etc/systemd/system/nocloud@shop.service.d\n"
        "printf '[Service]\\nUser=bob\\n' >/etc/systemd/system/nocloud@shop.service.d/user.conf\n"
        "systemctl daemon-reload; systemctl enable --now nocloud@shop"
    )
    machine.eventually("su - bob -c vmrunning | grep web00")
    machine.root("systemctl stop nocloud@shop")
    assert "web00 shop/web stopped" in machine.user("bob", "vmrunning -a")
    assert "failed" not in machine.root("systemctl is-failed nocloud@shop || :")
    machine.root("systemctl start nocloud@shop")
    machine.eventually("su - bob -c vmrunning | grep web00")


def check_a_clock_that_jumps(machine: Machine) -> None:
    """With VMs running, the host's clock goes a day on, then two back: they stay, others join, and names resolve."""
    for jump in ("1 day", "-2 days", "1 day"):
        machine.root(f"date --set='{jump}'")
        assert "web00 shop/web 192.168.1." in machine.user("bob", "vmrunning")
        machine.user("bob", "vminstantiate -n blank -g jump -o name=more && vmrunning -g jump")
        machine.eventually("getent ahostsv4 more00.jump.nocloud | grep ^192.168.1.", 20)
        machine.user("bob", "vmstop -d -g jump")
    machine.eventually("nocloud doctor", 20)  # the bridge's dnsmasq is started anew for who has gone


def check_a_users_own_unit(machine: Machine) -> None:
    """The same by `systemctl --user`."""
    machine.root("loginctl enable-linger bob")
    machine.eventually("systemctl is-active user@$(id -u bob)")
    systemctl = "XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user"
    machine.user("bob", f"{systemctl} enable --now nocloud@shop")
    machine.eventually("su - bob -c vmrunning | grep web00")
    refused = machine.fails("make -C /home/alice/nocloud uninstall")
    assert "VMs are running: shop/web/web00 of bob; nothing was changed" in refused, refused
    machine.user("bob", f"{systemctl} disable --now nocloud@shop && ! {systemctl} is-failed nocloud@shop")
    assert "web00 shop/web stopped" in machine.user("bob", "vmrunning -a")


def reboot(machine: Machine) -> None:
    boot = machine.root("cat /proc/sys/kernel/random/boot_id")
    machine.cloud.ssh(VM, "systemctl reboot")

    def is_back() -> bool:
        done = machine.cloud.ssh(VM, "cat /proc/sys/kernel/random/boot_id", timeout=300)
        return done.status == 0 and bool(done.stdout.strip()) and done.stdout.strip() not in boot

    assert until(is_back, 400, 2), machine.cloud.folder(VM).joinpath("console.log").read_text(errors="replace")[-3000:]
