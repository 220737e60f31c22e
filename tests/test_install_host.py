"""What `make install` does to a host, and that `make uninstall` brings all of it back.

The host is this one, but nothing that is written reaches it: mounts, network and processes are a namespace's own.
"""

from __future__ import annotations

import os
import random
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest
from support import Result, clean_environment, eventually, is_alive
from test_install import Checkout
from test_zipapp import builder

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can set up a host")

HELPER = "/usr/lib/qemu/qemu-bridge-helper"
# The folders that are written to lie over the host's own: what an installation leaves is what is in `upper`.
WRITABLE = ("etc", "usr", "var")
ENTER = f"""set -e
mount --make-rprivate /
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs "$1"
for folder in {" ".join(WRITABLE)}; do
    mkdir -p "$1/upper/$folder" "$1/work/$folder"
    mount -t overlay overlay -o "lowerdir=/$folder,upperdir=$1/upper/$folder,workdir=$1/work/$folder" "/$folder"
done
mount -t tmpfs tmpfs /run
mkdir "$1/bin"
ip link set lo up
getent group kvm >/dev/null || groupadd --system kvm
echo ready
exec sleep infinity
"""
# Stands in for systemctl: does what the units say, and writes down what it was asked.
SYSTEMCTL = """#!/bin/sh
echo "$*" >>/run/asked
case $1 in
reload-or-restart) nocloud bridge start ;;
start) nocloud bridge dnsmasq >/dev/null 2>&1 & ;;
stop) pkill -x dnsmasq; nocloud bridge stop ;;
list-units) cat /run/groups 2>/dev/null ;;
is-active) pgrep -r R,S,D dnsmasq >/dev/null; exit ;;
restart) pkill -x dnsmasq; nocloud bridge dnsmasq >/dev/null 2>&1 & ;;
esac
exit 0
"""


class Host:
    """A host that may be changed: this machine's files below one's own, and no network but a loopback."""

    def __init__(self, folder: Path, checkout: Checkout) -> None:
        self.folder, self.checkout = folder, checkout
        folder.mkdir()
        words = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", ENTER]
        self._holder = subprocess.Popen(
            [*words, "sh", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=clean_environment(),
        )
        assert self._holder.stdout and self._holder.stdout.readline() == "ready\n"
        (self.pid,) = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self._before = self.changes()

    def run(self, script: str, **env: str) -> Result:
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--pid"]
        argv = [*enter, "sh", "-c", f"cd {self.checkout.folder}\n{script}"]
        done = subprocess.run(
            argv,
            env={
                **clean_environment(),
                "PATH": f"{self.folder}/bin:/usr/local/bin:{os.environ['PATH']}",
                "XDG_CACHE_HOME": str(self.checkout.cache),
                **env,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Result(argv, done.returncode, done.stdout, done.stderr)

    def program(self, name: str, script: str) -> None:
        """Have a program be another one."""
        self.run(f"cat >{self.folder}/bin/{name} <<'END'\n{script}\nEND\nchmod 755 {self.folder}/bin/{name}").ok()

    def make(self, goal: str, **env: str) -> Result:
        return self.run(f"make --no-print-directory PYTHON={builder()} {goal}", **env)

    @property
    def kvm(self) -> int:
        return int(self.run("getent group kvm").ok().stdout.split(":")[2])

    def file(self, path: str) -> Path:
        """A file as it is on this host."""
        return Path(f"/proc/{self.pid}/root{path}")

    def changes(self) -> dict[str, str]:
        """The files and folders that are not as this machine has them; accounts, which tools rewrite, as such."""
        upper = self.file(f"{self.folder}/upper")
        dull = ("/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow", "/etc/sub", "/etc/.pwd", "/var/lib/dpkg/")
        paths = [f"/{path.relative_to(upper)}" for path in upper.rglob("*")]
        found = {path: describe(self.file(path)) for path in paths if not path.startswith(dull)}
        found = {path: what for path, what in found.items() if what != describe(Path(path))}
        return {**found, "accounts": self.run("getent passwd; getent group; dpkg-statoverride --list").stdout}

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.kill()  # and with it, by --kill-child, everything in the namespace
        self._holder.communicate()
        eventually(lambda: not is_alive(int(self.pid)), "the namespace is gone")


def describe(path: Path) -> str:
    """Kind, mode, owner and content; '' where there is nothing."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return ""
    what = os.readlink(path) if path.is_symlink() else str(hash(path.read_bytes())) if path.is_file() else ""
    return f"{stat.filemode(info.st_mode)} {info.st_uid}:{info.st_gid} {what}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("checkout") / "nocloud")
    checkout.make("build").ok()
    return checkout


@pytest.fixture
def host(tmp_path: Path, built: Checkout) -> Iterator[Host]:
    probe = ["unshare", "--mount", "--net", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets root make no namespaces")
    with Host(tmp_path / "host", built) as host:
        yield host


def test_a_host_is_set_up_and_all_is_taken_back(host: Host) -> None:
    conf, helper = host.file("/etc/qemu/bridge.conf"), host.file(HELPER)
    host.run("mkdir -p /etc/qemu; printf 'allow virbr0' >/etc/qemu/bridge.conf; chgrp kvm /etc/qemu/bridge.conf").ok()
    conf.chmod(0o640)
    before = host.changes()
    done = host.make("install", SUDO_USER="nobody").ok()
    assert conf.read_text() == "allow virbr0\nallow nocloud\n"
    assert (conf.stat().st_mode & 0o7777, conf.stat().st_gid) == (0o640, host.kvm)
    assert (helper.stat().st_mode & 0o7777, helper.stat().st_gid) == (0o4750, host.kvm)
    assert f"root kvm 4750 {HELPER}" in host.run("dpkg-statoverride --list").stdout.splitlines()
    for said in (HELPER, "bridge.conf: allow nocloud", "192.168.1.0/24", "nocloud net up", "nocloud doctor"):
        assert said in done.stderr, done
    assert "nocloud-dnsmasq:" in host.run("getent passwd").stdout
    again = host.make("install").ok()
    assert "allow" not in again.stderr and HELPER not in again.stderr
    helper.chmod(0o755)
    assert HELPER in host.make("install").ok().stderr and helper.stat().st_mode & 0o7777 == 0o4750
    host.run("nocloud net up").ok()
    assert "192.168.1.1/24" in host.run("ip -br address show nocloud").stdout
    assert "nocloud" in host.run("nft list tables").stdout
    host.make("uninstall").ok()
    assert conf.read_text() == "allow virbr0\n"  # with a newline at its end
    conf.write_text("allow virbr0")
    assert host.changes() == before
    left = host.run("ls /sys/class/net /run; nft list ruleset; pgrep -r R,S,D dnsmasq").stdout.split()
    assert left == ["/run:", "/sys/class/net:", "lo"]


def test_what_others_set_up_stays(host: Host) -> None:
    """The helper is somebody's already; bridge.conf has lines that are dangerous, or forbid the bridge."""
    host.run(f"dpkg-statoverride --update --add root sudo 4710 {HELPER}").ok()
    host.run("mkdir -p /etc/qemu; printf '# mine\\nallow all\\ndeny  nocloud\\n' >/etc/qemu/bridge.conf").ok()
    before = host.changes()
    done = host.make("install").ok()
    for said in ("`deny nocloud` keeps VMs off", "`allow all`"):
        assert (
            f"warning: /etc/qemu/bridge.conf: the line {said}" in done.stderr or f"with the line {said}" in done.stderr
        )
    assert f"root sudo 4710 {HELPER}" in host.run("dpkg-statoverride --list").stdout.splitlines()
    host.run(f"dpkg-statoverride --remove {HELPER} && dpkg-statoverride --add root root 0755 {HELPER}").ok()
    host.file(HELPER).chmod(0o755)
    assert "dpkg-statoverride has another's entry" in host.make("install").ok().stderr
    host.run(f"dpkg-statoverride --remove {HELPER} && dpkg-statoverride --update --add root sudo 4710 {HELPER}").ok()
    host.make("uninstall").ok()
    assert host.changes() == before


def test_a_helper_without_dpkg(host: Host) -> None:
    """Where the package manager has no memory of modes, the mode is set, and set back unless somebody changed it."""
    host.run(f"rm $(command -v dpkg-statoverride); cp {HELPER} /usr/libexec/; chmod 750 /usr/libexec/{HELPER[14:]}")
    host.run(f"rm {HELPER}; chgrp daemon /usr/libexec/qemu-bridge-helper").ok()
    helper = host.file("/usr/libexec/qemu-bridge-helper")
    before = describe(helper)
    host.make("install").ok()
    assert (helper.stat().st_mode & 0o7777, helper.stat().st_gid) == (0o4750, host.kvm)
    host.make("uninstall").ok()
    assert describe(helper) == before
    host.make("install").ok()
    helper.chmod(0o4755)
    host.make("uninstall").ok()
    assert helper.stat().st_mode & 0o7777 == 0o4755


@pytest.mark.parametrize(
    ("release", "manager", "packages"),
    [
        ("ID=debian", "apt-get", "apt install qemu-system-x86 qemu-utils dnsmasq-base nftables qemu-system-common"),
        ("ID=ubuntu\nID_LIKE=debian", "apt-get", "apt install qemu-system-x86 qemu-utils dnsmasq-base nftables qemu-"),
        ("ID=fedora", "dnf", "dnf install qemu-system-x86-core qemu-img dnsmasq nftables qemu-common"),
        ("ID=arch", "pacman", "pacman -S qemu-system-x86 qemu-img dnsmasq nftables qemu-common"),
    ],
)
def test_what_is_missing_is_named_before_anything_changes(
    host: Host, release: str, manager: str, packages: str
) -> None:
    missing = ("qemu-system-x86_64", "qemu-img", "dnsmasq", "nft")
    host.run(f"rm -f {HELPER} /etc/os-release /usr/bin/apt-get; printf '{release}\\n' >/etc/os-release").ok()
    host.run(f"for each in {' '.join(missing)}; do rm -f $(command -v $each) /usr/sbin/$each; done").ok()
    host.program(manager, "#!/bin/sh\nexit 1")
    before = host.changes()
    done = host.make("install")
    told, hint = done.stderr.splitlines()[:2]
    assert done.status != 0 and told.endswith("nothing was changed") and hint.startswith(f"(hint: sudo {packages}")
    for name in (*missing, "qemu-bridge-helper"):
        assert name in told, done
    assert host.changes() == before


def test_a_free_subnet_is_chosen_and_stays(host: Host) -> None:
    conf = host.file("/usr/local/etc/nocloud_net.conf")
    host.run("ip link add lan type bridge; ip address add 192.168.1.7/24 dev lan; ip link set lan up").ok()
    host.run("ip link add vpn type bridge; ip link set vpn up; ip route add 192.168.200.0/23 dev vpn").ok()
    done = host.make("install").ok()
    assert "the bridge's network is 192.168.202.0/24, since lan has 192.168.1.7/24" in done.stderr
    assert "\nbridgeSubnet=192.168.202\nbridgeNet=${bridgeSubnet}.0/24\n" in conf.read_text()
    host.run("nocloud net up; ip address add 192.168.202.9/28 dev lan").ok()
    again = host.make("install").ok()  # VMs have addresses in it: while the bridge is up it stays
    assert "is 192.168.202.0/24\n" in again.stderr and "kept" not in again.stderr
    assert "192.168.202.1/24" in host.run("ip -br address show nocloud").stdout
    host.run("nocloud net down").ok()
    assert "is 192.168.203.0/24, since lan has 192.168.202.9/28" in host.make("install").ok().stderr
    host.make("uninstall").ok()
    assert not conf.exists()


def test_a_subnet_that_the_user_set_is_not_changed(host: Host) -> None:
    conf = host.file("/usr/local/etc/nocloud_net.conf")
    host.make("install").ok()
    conf.write_text(
        "bridgeSubnet=10.9.8\nbridgeNet=10.9.8.0/24\nbridgeIpAddress=10.9.8.1\nbridgeAddress=10.9.8.1/24\n"
        "bridgeDhcpStart=10.9.8.2\nbridgeDhcpStop=10.9.8.99\n"
    )
    before = host.changes()
    host.run("ip link add lan type bridge; ip address add 10.9.8.7/24 dev lan; ip link set lan up").ok()
    done = host.make("install")
    assert done.status != 0 and "10.9.8.0/24 is in use: lan has 10.9.8.7/24" in done.stderr
    assert host.changes() == before
    host.run("ip link delete lan").ok()
    assert f"kept: {conf.relative_to(host.file('/')).name}"[6:] in host.make("install").ok().stderr


def test_a_bridge_of_somebody_else_is_left_alone(host: Host) -> None:
    host.run("ip link add nocloud type bridge").ok()
    before = host.changes()
    done = host.make("install")
    assert done.status != 0 and "nocloud is there, and nocloud didn't make it" in done.stderr
    assert host.changes() == before
    host.run("echo bridgeInterface=vms >/etc/nocloud.conf").ok()
    assert "bridge.conf: allow vms" in host.make("install").ok().stderr
    host.make("uninstall").ok()
    host.file("/etc/nocloud.conf").unlink()
    assert host.changes() == before


def test_modules_are_loaded_now_and_at_each_boot(host: Host) -> None:
    host.program(
        "modprobe",
        """#!/bin/sh
case "$*" in
*vhost_net*) exit 1 ;;
--dry-run*) exit 0 ;;
*) echo "$*" >>/run/loaded ;;
esac""",
    )
    host.run("printf 'flags\\t\\t: fpu\\n\\nprocessor\\t: 1\\nflags\\t\\t: fpu svm nx\\n' >/run/cpuinfo").ok()
    host.run("mount --bind /run/cpuinfo /proc/cpuinfo").ok()
    done = host.make("install").ok()
    assert "kernel modules, now and at each boot: kvm_amd, tun\n" in done.stderr
    assert host.file("/run/loaded").read_text() == "-a kvm_amd tun\n"
    conf = host.file("/usr/local/lib/modules-load.d/nocloud.conf")
    assert [line for line in conf.read_text().splitlines() if line[0] != "#"] == ["kvm_amd", "tun"]
    host.program("modprobe", "#!/bin/sh\n[ $1 = --dry-run ] || { echo modprobe: no such thing >&2; exit 1; }")
    done = host.make("install").ok()
    assert "warning: kernel modules: modprobe: no such thing" in done.stderr and "now and at each" not in done.stderr


def test_the_units_are_enabled_started_stopped_and_disabled(host: Host) -> None:
    host.program("systemctl", SYSTEMCTL)
    host.run("mkdir -p /run/systemd/system").ok()
    host.run("mkdir -p /etc/systemd/system/default.target.wants").ok()
    before = host.changes()
    done = host.make("install").ok()
    units = "nocloud-bridge.service nocloud-dnsmasq.service nocloud-dnsmasq-reload.path"
    bridge, others = units.split(" ", 1)
    asked = host.file("/run/asked")
    words = asked.read_text().splitlines()
    asked_for = ["daemon-reload", f"enable {units}", f"reload-or-restart {bridge}", f"restart {others}"]
    assert [word for word in words if word in asked_for] == asked_for
    assert f"{units.replace(' ', ', ')}: run" in done.stderr
    assert host.run("pgrep -r R,S,D dnsmasq").status == 0
    host.make("install").ok()
    assert "restart nocloud-dnsmasq.service" in asked.read_text()  # of another version it may be
    # not while a group's unit is active
    host.file("/run/groups").write_text("nocloud@shop.service loaded active running nocloud's group shop\n")
    installed = host.changes()
    refused = host.make("uninstall")
    assert refused.status != 0 and "nocloud@shop.service; nothing was changed" in refused.stderr
    assert "systemctl stop nocloud@shop.service" in refused.stderr and host.changes() == installed
    host.file("/run/groups").unlink()
    asked.unlink()
    wants = host.file("/etc/systemd/system/default.target.wants/nocloud@shop.service")
    wants.parent.mkdir(parents=True, exist_ok=True)
    wants.symlink_to("/usr/local/lib/systemd/system/nocloud@.service")
    host.make("uninstall").ok()
    words = asked.read_text().splitlines()
    assert (
        f"disable {units} nocloud@shop.service" in words
        and words[-1] == "daemon-reload"
        and any(word.startswith("stop ") for word in words)
    )
    wants.unlink()  # which systemctl does
    assert host.changes() == before
    assert not host.file("/sys/class/net/nocloud").exists()


def test_it_is_refused_while_vms_run(host: Host) -> None:
    """Whoever's they are: who has VMs needs the program to stop them."""
    host.make("install").ok()
    installed = host.changes()
    vm = "setpriv --reuid=daemon --clear-groups qemu-system-x86_64 -nodefaults -display none -S -pidfile web00.pid"
    vm += " -chardev socket,id=qmp,path=qmp.sock,server=on,wait=off"
    host.run(f"install -d -o daemon /run/pf/web/web00; cd /run/pf/web/web00; {vm} >/dev/null 2>&1 &").ok()
    eventually(lambda: host.file("/run/pf/web/web00/web00.pid").exists(), "qemu runs", 20)
    done = host.make("uninstall")
    assert done.status != 0 and "VMs are running: pf/web/web00 of daemon; nothing was changed" in done.stderr
    assert host.changes() == installed
    host.run("kill $(cat /run/pf/web/web00/web00.pid)").ok()
    eventually(lambda: host.run("pgrep -r R,S,D qemu").status, "qemu has ended", 20)
    host.make("uninstall").ok()


@pytest.mark.long
def test_no_program_outlives_a_call_that_was_killed(host: Host) -> None:
    """Else it made the account after the next call had looked for it, and taken the rest away."""
    before = host.changes()
    slow = '#!/bin/sh\ncp "$1" /run/read; sleep 5; exec /usr/bin/systemd-sysusers /run/read >/dev/null 2>&1'
    host.program("systemd-sysusers", slow)
    host.run(
        f"{builder()} -IS nocloud.pyz setup --prefix=/usr/local & until pgrep -x sleep -a | grep -q 'sleep 5'\n"
        "do sleep 0.05; done; kill -9 $!; wait"
    )
    host.run(f"{builder()} -IS nocloud.pyz setup --prefix=/usr/local --undo").ok()
    eventually(lambda: host.run("pgrep -f 'sleep [5]|[s]ysusers'").status, "what was started has ended")
    assert host.changes() == before


@pytest.mark.long
def test_a_host_that_was_left_half_set_up(host: Host) -> None:
    """Killed at any instant, it is finished by the next call, or undone."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    instants = random.Random(seed)
    setup = f"{builder()} -IS nocloud.pyz setup --prefix=/usr/local"
    before = host.changes()
    for _ in range(3):
        host.run(f"timeout -s KILL {instants.uniform(0.1, 0.5):.2f} {setup}")
        host.run(f"timeout -s KILL {instants.uniform(0.05, 0.3):.2f} {setup} --undo")
    host.run(setup).ok()
    assert host.file(HELPER).stat().st_mode & 0o7777 == 0o4750
    host.run(f"timeout -s KILL {instants.uniform(0.05, 0.3):.2f} {setup} --undo")
    host.run(f"{setup} --undo").ok()
    assert host.changes() == before
