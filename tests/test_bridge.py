"""The host's bridge, in namespaces that stand in for a host: never on the machine's own network."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tinyguest
from support import (
    NOBODY,
    PROGRAM,
    ROOT,
    Cloud,
    Result,
    add_blank,
    add_template,
    eventually,
    kill_all,
    pids,
    replace_program,
)

import nocloud

OUTSIDE = "203.0.113.2"
DNSMASQ = 64999  # the uid of nocloud-dnsmasq
USERS = 64001, 64002  # the first one is in the group kvm


class Host:
    """A host of its own: eth0 leads to a router that knows nothing of VMs; /run, /var/lib and /etc are scratch."""

    def __init__(self, cloud: Cloud, busybox: Path) -> None:
        self.cloud, self.busybox = cloud, busybox
        self.children: list[subprocess.Popen[str]] = []
        # Only in here: outside, root's `net down` would mean the bridge of the machine.
        self.variables = {"NOCLOUD_vmNetwork": "auto"}
        etc = cloud.home / "etc"
        subprocess.run(["cp", "-a", "/etc", etc], check=False)  # what goes away meanwhile isn't needed
        (etc / "qemu").mkdir(exist_ok=True)
        (etc / "qemu/bridge.conf").write_text("allow nocloud\n")
        (etc / "resolv.conf").unlink(missing_ok=True)
        (etc / "resolv.conf").write_text("")
        if not re.search("^kvm:", (etc / "group").read_text(), re.M):
            with (etc / "group").open("a") as file:
                file.write("kvm:x:64998:\n")
        with (etc / "passwd").open("a") as file:
            for name, uid in (("nocloud-dnsmasq", DNSMASQ), *((f"u{uid}", uid) for uid in USERS)):
                file.write(f"{name}:x:{uid}:{uid}::/run/{name}:/bin/sh\n")
        mounts = "mount -t sysfs sysfs /sys && mount -t tmpfs run /run && mount -t tmpfs lib /var/lib"
        self.pid = self.namespaces(f"{mounts} && mount --bind {etc} /etc && ip link set lo up")
        self.router = self.namespaces("ip link set lo up", inside=self.pid)
        self.shell(
            f"ip link add eth0 type veth peer name eth0 netns {self.router}; ip addr add 203.0.113.1/24 dev eth0;"
            f"ip link set eth0 up; ip route add default via {OUTSIDE}"
        ).ok()
        self.at(self.router, "sh", "-c", f"ip addr add {OUTSIDE}/24 dev eth0; ip link set eth0 up").ok()

    def namespaces(self, script: str, inside: int = 0) -> int:
        """The pid of a process that holds a network and a mount namespace, in which `script` was run."""
        way = ["nsenter", "-t", str(inside), "-n", "-m", "--"] if inside else []
        child = subprocess.Popen(
            [*way, "unshare", "-n", "-m", "sh", "-c", f"{script}; echo ready; exec sleep infinity"],
            stdout=subprocess.PIPE,
            text=True,
            env=self.cloud.env,
        )
        self.children.append(child)
        assert child.stdout and child.stdout.readline() == "ready\n"
        return child.pid

    def at(self, pid: int, *argv: object, env: dict[str, str] | None = None, timeout: float = 60) -> Result:
        """A program in the namespaces of a process."""
        words = ["nsenter", "-t", pid, "-n", "-m", f"--wd={self.cloud.home}", "--", *argv]
        return self.cloud.execute(words, env=self.variables | (env or {}), timeout=timeout)

    def run(self, name: str, *words: object, env: dict[str, str] | None = None, timeout: float = 150) -> Result:
        return self.at(self.pid, *self.cloud.argv(name, *words), env=env, timeout=timeout)

    def shell(self, script: str, env: dict[str, str] | None = None) -> Result:
        return self.at(self.pid, "sh", "-c", script, env=env)

    def state(self) -> str:
        """What `down` must leave as it was."""
        said = self.shell(
            "nft list ruleset; ip -br link; ip -br -4 address; ip -4 route show table all; ls /run;"
            "grep -s . /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/*/forwarding;"
            "grep -qs filter /proc/net/ip_tables_names && iptables-legacy -S"
        ).stdout
        return re.sub(r"packets \d+ bytes \d+", "", said)

    def guest(self, mac: str, name: str) -> tuple[int, dict[str, str]]:
        """A namespace that stands in for a VM on the bridge, and what DHCP told it."""
        pid = self.namespaces("ip link set lo up", inside=self.pid)
        port = f"tap{pid}"
        self.shell(
            f"ip link add {port} type veth peer name ens3 address {mac} netns {pid} &&"
            f"ip link set {port} master nocloud up"
        ).ok()
        told = self.cloud.home / f"lease{pid}"
        hook = self.cloud.home / "hook"
        hook.write_text(
            '#!/bin/sh\n[ "$1" = bound ] || exit 0\n'
            'ip addr add "$ip/$mask" dev ens3; ip route add default via "$router"\n'
            f'printf "%s\\n" "$ip" "$router" "$dns" "$domain" > {self.cloud.home}/lease$GUEST\n'
        )
        hook.chmod(0o755)
        words = ["-i", "ens3", "-f", "-n", "-q", "-t", "8", "-T", "2", "-s", hook, "-x", f"hostname:{name}"]
        self.at(pid, "sh", "-c", "ip link set ens3 up").ok()
        self.at(pid, self.busybox, "udhcpc", *words, env={"GUEST": str(pid)}).ok()
        return pid, dict(zip(("address", "router", "dns", "domain"), told.read_text().splitlines()))

    def resolve(self, pid: int, name: str, server: str = "192.168.1.1") -> str:
        """What the bridge's DNS says to a guest, or to the host itself."""
        said = self.at(pid, self.busybox, "nslookup", "-type=a", name, server).stdout
        return "".join(re.findall(r"^Address: ([0-9.]+)$", said, re.M))

    def reaches(self, pid: int, address: str) -> bool:
        return self.at(pid, self.busybox, "ping", "-c", "1", "-W", "1", address).status == 0

    def is_here(self, pid: int) -> bool:
        """Whether a process is in this host's network namespace."""
        try:
            return os.readlink(f"/proc/{pid}/ns/net") == os.readlink(f"/proc/{self.pid}/ns/net")
        except OSError:
            return False

    def unplug(self) -> None:
        """Take all guests off the bridge."""
        self.shell("for port in $(ls /sys/class/net/nocloud/brif); do ip link delete $port; done")

    def spawn(self, *argv: object, at: int = 0) -> subprocess.Popen[str]:
        """A program on the host, or in the namespaces of a process, that goes on; its output is thrown away."""
        words = ["nsenter", "-t", str(at or self.pid), "-n", "-m", "--", *map(str, argv)]
        null, env = subprocess.DEVNULL, self.cloud.env | self.variables
        child = subprocess.Popen(words, stdin=null, stdout=null, stderr=null, text=True, env=env, cwd="/")
        self.children.append(child)
        return child

    def close(self) -> None:
        self.unplug()
        self.run("net", "down", "--bridge")
        kill_all(pid for pid in pids() if pid != self.pid and self.is_here(pid))
        for child in self.children:
            child.kill()
            child.communicate()


@pytest.fixture(scope="session")
def busybox(guest_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """busybox, which has a DHCP client, unpacked: its package would drive others out."""
    kept = guest_cache / "busybox"
    if not kept.exists():
        work = tmp_path_factory.mktemp("busybox")
        subprocess.run(
            ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "busybox-static"],
            cwd=work, check=True, capture_output=True,
        )  # fmt: skip
        subprocess.run(["dpkg-deb", "-x", *work.glob("*.deb"), work / "tree"], check=True)
        shutil.copyfile(next(work.rglob("bin/busybox")), kept.with_suffix(".new"))
        kept.with_suffix(".new").chmod(0o755)
        kept.with_suffix(".new").rename(kept)
    return kept


@pytest.fixture
def host(cloud: Cloud, busybox: Path) -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("the host's bridge is root's")
    host = Host(cloud, busybox)
    try:
        yield host
    finally:
        host.close()


DOCKER = "-P FORWARD DROP", "-N DOCKER-USER", "-A DOCKER-USER -j RETURN", "-A FORWARD -j DOCKER-USER"
FIREWALLS = {
    "none": "true",
    "closed": "iptables-nft -A INPUT -i lo -j ACCEPT; iptables-nft -P INPUT DROP; iptables-nft -P FORWARD DROP",
    "docker": "; ".join([*(f"iptables-nft {rule}" for rule in DOCKER), "echo 1 > /proc/sys/net/ipv4/ip_forward"]),
    "legacy": "; ".join(f"iptables-legacy {rule}" for rule in DOCKER),
}


LONG = {"closed", "legacy"}


@pytest.mark.parametrize(
    "firewall", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in FIREWALLS]
)
def test_a_guest_gets_address_name_and_a_way_out(host: Host, firewall: str) -> None:
    """Whatever else filters packets on this host; and `down` leaves that as it was."""
    host.shell(FIREWALLS[firewall]).ok()
    before = host.state()
    host.run("net", "up").ok()
    assert "made by nocloud" in host.state()
    up = host.state()
    host.run("net", "up").ok()
    assert host.state() == up
    guest, told = host.guest("00:50:56:00:00:01", "stand-in")
    assert re.fullmatch(r"192\.168\.1\.\d+", told["address"]) and told["domain"] == "nocloud"
    assert told["router"] == told["dns"] == "192.168.1.1"
    assert host.resolve(guest, "stand-in.nocloud") == host.resolve(host.pid, "stand-in") == told["address"]
    assert host.reaches(guest, OUTSIDE), host.state()
    other, its = host.guest("00:50:56:00:00:02", "other")
    assert its["address"] != told["address"] and host.reaches(other, told["address"])
    # Nobody outside begins a connection, though he knows the way.
    host.at(host.router, "ip", "route", "add", "192.168.1.0/24", "via", "203.0.113.1").ok()
    assert not host.reaches(host.router, told["address"])
    host.run("net", "down").fails(1, "in use", "2 VMs")
    assert host.reaches(guest, OUTSIDE)
    host.unplug()
    host.run("net", "down").quiet()
    assert host.state() == before
    host.run("net", "down").quiet()
    assert not host.cloud.processes().keys() - {child.pid for child in host.children}


def test_the_host_becomes_no_router_for_others(host: Host) -> None:
    """eth0 forwards so that answers reach the guests; what comes in by it for another network is dropped."""
    other = host.namespaces("ip link set lo up", inside=host.pid)
    host.shell(
        f"ip link add side type veth peer name ens3 netns {other};"
        "ip addr add 198.51.100.1/24 dev side; ip link set side up"
    ).ok()
    script = "ip addr add 198.51.100.2/24 dev ens3; ip link set ens3 up; ip route add default via 198.51.100.1"
    host.at(other, "sh", "-c", script).ok()
    host.at(host.router, "ip", "route", "add", "198.51.100.0/24", "via", "203.0.113.1").ok()
    assert not host.reaches(host.router, "198.51.100.2")
    host.run("net", "up").ok()
    assert host.shell("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/*/forwarding").stdout.count("1") == 2
    assert not host.reaches(host.router, "198.51.100.2")
    host.shell("echo 1 > /proc/sys/net/ipv4/ip_forward").ok()  # somebody wants a router: the next `up` heeds that
    host.run("net", "up").ok()
    assert host.reaches(host.router, "198.51.100.2")
    host.run("net", "down").quiet()
    assert host.reaches(host.router, "198.51.100.2")


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ("ip link add lan type bridge; ip addr add 192.168.1.7/24 dev lan", "lan has 192.168.1.7/24"),
        (
            "ip link add vpn type bridge; ip link set vpn up; ip route add 192.168.0.0/16 dev vpn",
            "192.168.0.0/16 by vpn",
        ),
    ],
)
def test_an_overlap_is_named_and_another_subnet_found(host: Host, script: str, named: str) -> None:
    host.shell(f"{script}; ip link add x type bridge; ip addr add 192.168.200.1/25 dev x").ok()
    before = host.state()
    host.run("net", "up").fails(1, "192.168.1.0/24 is in use", named, "nocloud bridge subnet")
    host.run("bridge", "start").fails(1, named)
    assert host.state() == before
    file = host.cloud.home / "nocloud_net.conf"
    shutil.copyfile(ROOT / "etc/nocloud_net.conf", file)
    done = host.run("bridge", "subnet", file)
    if "vpn" in script:
        done.fails(1, "no subnet is free")
        assert file.read_text() == (ROOT / "etc/nocloud_net.conf").read_text()
        return
    assert named in done.ok().stderr and "192.168.201.0/24" in done.stderr
    changed = [
        line for line in file.read_text().splitlines() if line not in (ROOT / "etc/nocloud_net.conf").read_text()
    ]
    assert changed == ["bridgeSubnet=192.168.201"]
    shutil.copyfile(file, host.cloud.home / ".nocloud.conf")
    assert "192.168.201.0/24" in host.run("bridge", "subnet", file).ok().stderr
    host.run("net", "up").ok()
    assert "192.168.201.1/24" in host.state()
    _, told = host.guest("00:50:56:00:00:01", "x")
    assert told["address"].startswith("192.168.201.")


def test_a_subnet_is_not_written_where_the_other_lines_would_not_follow(host: Host) -> None:
    host.shell("ip link add lan type bridge; ip addr add 192.168.1.7/24 dev lan").ok()
    file = host.cloud.home / "x.conf"
    file.write_text("bridgeNet=192.168.1.0/24\n")
    host.run("bridge", "subnet", file).fails(1, str(file), "by hand")
    assert file.read_text() == "bridgeNet=192.168.1.0/24\n"


@pytest.mark.parametrize(
    "setting", ["bridgeNet=10.0.0.0/24", "bridgeDhcpStop=192.168.2.9", "bridgeDhcpStart=", "bridgeAddress=192.168.1.1"]
)
def test_settings_that_contradict_each_other(cloud: Cloud, setting: str) -> None:
    (cloud.home / ".nocloud.conf").write_text(f"{setting}\n")
    cloud.run("bridge", "dnsmasq").fails(2, setting.partition("=")[0])


def test_a_bridge_that_is_up_follows_its_settings(host: Host) -> None:
    host.run("net", "up").ok()
    text = (ROOT / "etc/nocloud_net.conf").read_text()
    (host.cloud.home / ".nocloud.conf").write_text(text.replace("bridgeSubnet=192.168.1\n", "bridgeSubnet=10.7.7\n"))
    assert any(line.startswith("wrong: the bridge has") for line in host.run("net", "status").ok().lines)
    host.run("net", "up").ok()
    assert host.run("net", "status").ok().lines[:2] == [
        "bridge nocloud: up, 10.7.7.0/24", "dnsmasq: answers at 10.7.7.1",
    ]  # fmt: skip
    assert "192.168.1." not in host.state()
    _, told = host.guest("00:50:56:00:00:01", "x")
    assert told["address"].startswith("10.7.7.") and told["dns"] == "10.7.7.1"


def test_a_bridge_that_is_not_ours_is_left_alone(host: Host) -> None:
    host.shell("ip link add nocloud type bridge; ip addr add 10.1.1.1/24 dev nocloud; ip link set nocloud up").ok()
    before = host.state()
    host.run("net", "up").fails(1, "nocloud didn't make it", "bridgeInterface")
    host.run("net", "down").quiet()
    assert host.state() == before


def test_an_up_that_fails_leaves_nothing(host: Host) -> None:
    """And what a killed one left, `down` takes away."""
    before = host.state()
    path = replace_program(host.cloud.home / "bin", "nft", 'case "$*" in "-f -") exit 1;; esac; exec "$REAL" "$@"')
    host.run("net", "up", env={"PATH": path}).fails(1, "nft")
    assert host.state() == before and host.shell("ls /var/lib").stdout == ""
    path = replace_program(
        host.cloud.home / "bin", "nft", 'case "$*" in "-f -") kill -9 $PPID;; esac; exec "$REAL" "$@"'
    )
    assert host.run("net", "up", env={"PATH": path}).status == -9
    assert "nocloud" in host.state()
    host.run("net", "down").quiet()
    assert host.state() == before


def test_systemd_resolved_is_told(host: Host) -> None:
    path = replace_program(host.cloud.home / "bin", "resolvectl", f'echo "$@" >> {host.cloud.home}/said')
    assert "don't resolve on this host" in host.run("net", "up").ok().stderr
    host.shell("mkdir -p /run/systemd/resolve").ok()
    assert host.run("net", "up", env={"PATH": path}).ok().stderr == ""
    assert (host.cloud.home / "said").read_text().splitlines() == [
        "dns nocloud 192.168.1.1",
        "domain nocloud ~nocloud",
        "dnssec nocloud no",
        "dnsovertls nocloud no",
    ]


def test_firewalld_and_ufw_are_told_and_told_off(host: Host) -> None:
    """Programs in their place that keep what they are told, as those do."""
    home = host.cloud.home
    firewalld = f'case "$*" in --get-zone*) cat {home}/zone;; *--change*) echo trusted > {home}/zone;;'
    replace_program(home / "bin", "firewall-cmd", firewalld + f" *--remove*) : > {home}/zone;; esac")
    ufw = f'case "$*" in status) echo "Status: active";; "show added") cat {home}/added;;'
    ufw += f' *delete*) echo "$*" >> {home}/deleted;; *" comment made by nocloud")'
    ufw += f""" echo "ufw ${{*%% comment*}} comment 'made by nocloud'" >> {home}/added;; *) exit 1;; esac"""
    path = replace_program(home / "bin", "ufw", ufw)
    (home / "zone").write_text("")
    (home / "added").write_text("Added user rules (see 'ufw status' for running firewall):\nufw allow 22/tcp\n")
    host.run("net", "up", env={"PATH": path}).ok()
    assert (home / "zone").read_text() == "trusted\n"
    assert "ufw route allow in on nocloud comment 'made by nocloud'\n" in (home / "added").read_text()
    host.run("net", "down", env={"PATH": path}).quiet()
    assert (home / "zone").read_text() == ""
    deleted = (home / "deleted").read_text().splitlines()
    assert len(deleted) == 3 and "route delete allow in on nocloud" in deleted
    assert "delete allow in on nocloud to any port 67 proto udp" in deleted


def test_a_foreign_table_that_drops_is_named(host: Host) -> None:
    host.shell(
        "nft add table inet mine &&"
        "nft add chain inet mine passing '{ type filter hook forward priority 0; policy drop; }'"
    )
    assert "inet mine passing" in host.run("net", "up").ok().stderr


def test_an_ordinary_user_is_told_and_nothing_changes(cloud: Cloud) -> None:
    env = {"NOCLOUD_vmNetwork": "auto", "HOME": "/nonexistent"}
    for words in (("net", "up"), ("net", "down"), ("net", "up", "--bridge"), ("bridge", "start"), ("bridge", "stop")):
        argv = cloud.argv(*words)
        if os.geteuid() == 0:
            argv = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", *argv]
        cloud.execute(argv, env=env, cwd=Path("/")).fails(
            1, "needs root; nothing was changed", "--private" if words[0] == "net" else "sudo does it"
        )
    assert not os.path.exists("/sys/class/net/nocloud") and not cloud.processes()
    cloud.run("net", "up", "--bridge", "--private").fails(2, "one of them")
    cloud.run("net", "up", "--bridg").fails(2, "--bridg")


def capabilities() -> list[str]:
    """setpriv's words for what the unit grants."""
    text = (ROOT / "systemd/nocloud-dnsmasq.service").read_text()
    match = re.search(r"^AmbientCapabilities=(.*)$", text, re.M)
    assert match
    names = match.group(1).lower().replace("cap_", "+").replace(" ", ",")
    return [
        f"--inh-caps=-all,{names}",
        f"--ambient-caps=-all,{names}",
        f"--bounding-set=-all,{names}",
        "--no-new-privs",
    ]


def test_dnsmasq_runs_as_the_unit_starts_it(host: Host, busybox: Path) -> None:
    """In the foreground as a user of its own, who has the unit's capabilities and its group, and no more."""
    host.run("bridge", "start").ok()
    host.run("bridge", "start").ok()
    ids = ["--reuid", DNSMASQ, "--regid", DNSMASQ, "--groups", host.shell("getent group kvm").stdout.split(":")[2]]
    argv = ["env", "HOME=/nonexistent", "setpriv", *ids, *capabilities(), sys.executable, "-IS", PROGRAM]
    server = host.spawn(*argv, "bridge", "dnsmasq")
    eventually(lambda: "0101A8C0:0035" in host.shell("cat /proc/net/udp").stdout, "dnsmasq answers")
    assert f"Uid:\t{DNSMASQ}\t{DNSMASQ}\t" in Path(f"/proc/{server.pid}/status").read_text()
    publish(host, "/one", "pf/web00").ok()
    eventually(lambda: host.resolve(host.pid, "web00.pf.nocloud") == "192.168.1.2", "it sees what is published")
    assert "name = web00.pf.nocloud" in host.at(host.pid, busybox, "nslookup", "192.168.1.2", "192.168.1.1").stdout
    guest, told = host.guest("00:50:56:00:00:01", "stand-in")
    assert host.resolve(guest, "stand-in") == told["address"]
    host.shell("echo 1 00:50:56:00:00:09 192.168.1.9 gone '*' >> /var/lib/nocloud/dnsmasq.leases").ok()
    server.terminate()
    assert server.wait(10) == 0
    server = host.spawn(*argv, "bridge", "dnsmasq")  # what a unit does where VMs are gone
    eventually(lambda: "0101A8C0:0035" in host.shell("cat /proc/net/udp").stdout, "dnsmasq answers")
    leases = host.shell("cat /var/lib/nocloud/dnsmasq.leases").stdout
    assert told["address"] in leases and "gone" not in leases
    assert host.resolve(guest, "stand-in") == told["address"]
    server.terminate()
    server.wait(10)
    host.unplug()
    host.run("bridge", "stop").quiet()
    host.run("bridge", "stop").quiet()


# What guests reach ###################################################################################

PORT = 8080
ACCEPT = """import socket, sys
s = socket.create_server(("", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    s.accept()
"""
ANSWER = """import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 53))
while True:
    asked, who = s.recvfrom(512)
    end = asked.index(b"\\0", 12) + 5
    record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\0\\0\\4" + socket.inet_aton(sys.argv[2])
    s.sendto(asked[:2] + b"\\x81\\x80" + asked[4:6] + b"\\0\\1\\0\\0\\0\\0" + asked[12:end] + record, who)
"""


def listen(host: Host, at: int = 0) -> None:
    """A service on all addresses of the host, or of the router."""
    host.spawn(sys.executable, "-c", ACCEPT, PORT, at=at)
    place = at or host.pid
    eventually(lambda: f":{PORT:04X}" in host.at(place, "cat", "/proc/net/tcp6").stdout, "it listens")


class PrivateGuest:
    """What a VM on the private network of such a host sees: a namespace on the bridge in there."""

    ADDRESS, MAC = "10.88.0.200", "00:50:56:00:00:c8"

    def __init__(self, host: Host) -> None:
        self.host = host

    def run(self, *argv: object, address: str = ADDRESS, mac: str = MAC) -> Result:
        script = (
            "unshare -n sleep infinity & pid=$!; trap 'kill $pid' EXIT;"
            'until [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do :; done;'
            f"ip link add t$pid type veth peer name ens3 address {mac} netns $pid &&"
            "ip link set t$pid master nocloud up;"
            f"nsenter -t $pid -n sh -c 'ip addr add {address}/24 dev ens3; ip link set ens3 up;"
            'ip route add default via 10.88.0.1\'; nsenter -t $pid -n -- "$@"'
        )
        return self.host.run("net", "exec", "sh", "-c", script, "sh", *argv)

    def reaches(self, address: str, port: int = PORT) -> bool:
        code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
        return self.run(sys.executable, "-c", code, address, port).status == 0

    def resolve(self, name: str = "www.example.org") -> str:
        said = self.run(self.host.busybox, "nslookup", "-type=a", name, "10.88.0.1").stdout
        return "".join(re.findall(r"^Address: ([0-9.]+)$", said, re.M))


@pytest.fixture
def neighbours(host: Host, vms: None) -> Iterator[tuple[dict[str, str], PrivateGuest]]:
    """On the private network: the conf of pf/default/x00, which runs, and a guest beside it."""
    add_blank(host.cloud)
    host.variables["NOCLOUD_vmNetwork"] = "private"
    host.run("net", "up", "--private").ok()
    host.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=x").ok()
    yield host.cloud.conf("pf/default/x00"), PrivateGuest(host)
    host.run("vmstop", "-d", "-g", "pf").quiet()
    host.run("net", "down", "--private").ok()


def test_a_vm_cannot_pass_for_another_or_for_the_network(
    host: Host, neighbours: tuple[dict[str, str], PrivateGuest]
) -> None:
    """Neither with its address nor with its MAC; it answers no DHCP.  What is nobody's may be anybody's."""
    conf, guest = neighbours
    ping = (host.busybox, "ping", "-c", "1", "-W", "2", "10.88.0.1")
    assert guest.run(*ping).status == 0
    assert guest.run(*ping, address=conf["vmAddress"]).status == 1
    assert guest.run(*ping, mac=conf["vmMac"]).status == 1
    assert guest.run(*ping, mac=nocloud.BRIDGE_MAC).status == 1
    code = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', int(sys.argv[1])));"
    code += "s.sendto(b'x', ('10.88.0.1', 9))"
    for port, arrives in ((67, False), (68, True)):
        script = (
            "nft delete table ip t 2>/dev/null; nft add table ip t; nft add counter ip t seen;"
            "nft add chain ip t c '{ type filter hook input priority 0; }';"
            f"nft add rule ip t c udp sport {port} udp dport 9 counter name seen"
        )
        host.run("net", "exec", "sh", "-c", script).ok()
        guest.run(sys.executable, "-c", code, port).ok()
        counted = host.run("net", "exec", "nft", "list", "counter", "ip", "t", "seen").ok().stdout
        assert ("packets 1 " in counted) == arrives, counted


SEND = """
import os, socket, sys, time
card, end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW), time.monotonic() + 60
card.bind(("ens3", 0))
while not os.path.exists(sys.argv[1]) and time.monotonic() < end:
    for frame in sys.argv[2:]:
        card.send(bytes.fromhex(frame).ljust(60, bytes(1)))
    time.sleep(0.1)
"""


def test_nor_by_frames_that_a_bridge_treats_in_its_own_way(
    host: Host, neighbours: tuple[dict[str, str], PrivateGuest]
) -> None:
    """To multicast addresses of the link alone, whose sender it learns before any rule; of VLAN 0, which is none."""
    conf, guest = neighbours
    own, theirs = (mac.replace(":", "") for mac in (guest.MAC, conf["vmMac"]))
    address = socket.inet_aton(conf["vmAddress"]).hex()
    arp = f"0806 0001 0800 06 04 0001 {own} {address} 000000000000 0a580001"
    frames = [f"0180c2{number:06x} {theirs} 88cc" for number in (2, 3, 14)]
    frames += [f"ffffffffffff {own} {tag} {arp}" for tag in ("", "81000000", "88a80000", "81000000 81000000")]
    last, done = "02:00:00:00:00:99", host.cloud.home / "done"
    frames.append(f"ffffffffffff {last.replace(':', '')} 88b5")
    look = "bridge fdb show br nocloud; ip neigh"
    with ThreadPoolExecutor(1) as beside:
        sent = beside.submit(guest.run, sys.executable, "-c", SEND, done, *frames)
        wait = f"timeout 50 sh -c 'until bridge fdb show br nocloud | grep -q {last}; do sleep 0.1; done' && {look}"
        seen = host.run("net", "exec", "sh", "-c", wait).ok().stdout
        done.touch()
        sent.result().ok()
    places = [line for line in seen.splitlines() if conf["vmMac"].lower() in line or conf["vmAddress"] in line]
    assert not [line for line in places if re.search(rf"dev t\d|{guest.MAC}", line)], seen


@pytest.mark.parametrize("access", ["no", pytest.param("yes", marks=pytest.mark.long)])
def test_guests_on_the_bridge_begin_nothing_on_the_host(host: Host, access: str) -> None:
    """By none of its addresses, IPv6 included, nor by a port that something like Docker leads elsewhere."""
    for place in (host.pid, host.router):
        listen(host, place)
    host.shell(
        "nft add table ip docker; nft add chain ip docker c '{ type nat hook prerouting priority dstnat; }';"
        f"nft add rule ip docker c ip daddr 203.0.113.1 tcp dport 81 dnat to {OUTSIDE}:{PORT}"
    ).ok()
    host.variables["NOCLOUD_vmHostAccess"] = access
    host.run("net", "up").ok()
    guest, told = host.guest("00:50:56:00:00:01", "stand-in")
    host.shell("ip addr add 203.0.113.77/24 dev eth0").ok()
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"

    def reaches(address: str, port: int = PORT) -> bool:
        return host.at(guest, sys.executable, "-c", code, address, port).status == 0

    places = [("192.168.1.1", PORT), ("203.0.113.1", PORT), ("203.0.113.77", PORT), ("203.0.113.1", 81)]
    link = re.search(r"inet6 (fe80\S+)/", host.shell("ip -6 -o addr show dev nocloud").stdout)
    places += [(f"{link.group(1)}%ens3", PORT)] if link else []
    if access == "yes":
        eventually(lambda: reaches(*places[-1]), "the guest's own IPv6 address is settled")
    assert [reaches(*place) for place in places] == [access == "yes"] * len(places)
    assert reaches(OUTSIDE) and host.reaches(guest, "192.168.1.1")
    assert host.resolve(guest, "stand-in.nocloud") == told["address"]
    listen(host, guest)
    assert host.at(host.pid, sys.executable, "-c", code, told["address"], PORT).status == 0, "answers don't pass"
    host.unplug()
    host.run("net", "down").quiet()
    assert "made by nocloud" not in host.state()


def test_vms_on_the_private_network_begin_nothing_on_the_host(host: Host) -> None:
    """By none of its addresses, also one that comes later."""
    guest = PrivateGuest(host)
    for place in (host.pid, host.router):
        listen(host, place)
    host.run("net", "up", "--private").ok()
    assert guest.reaches(OUTSIDE) and not guest.reaches("203.0.113.1")
    host.run("net", "down", "--private").quiet()
    host.variables["NOCLOUD_vmHostAccess"] = "yes"
    host.run("net", "up", "--private").ok()
    assert guest.reaches("203.0.113.1")
    host.run("net", "down", "--private").quiet()
    del host.variables["NOCLOUD_vmHostAccess"]
    host.run("net", "up", "--private").ok()
    host.shell("ip addr add 203.0.113.77/24 dev eth0; ip addr add 198.51.100.7/24 dev lo").ok()
    eventually(lambda: not guest.reaches("203.0.113.77"), "a new address is closed to VMs", 10)
    assert not guest.reaches("198.51.100.7")
    host.shell("ip addr del 203.0.113.77/24 dev eth0").ok()
    host.at(host.router, "ip", "addr", "add", "203.0.113.77/24", "dev", "eth0").ok()
    eventually(lambda: guest.reaches("203.0.113.77"), "it is another host's by now", 10)
    host.run("net", "down", "--private").quiet()


@pytest.mark.long
def test_the_private_network_follows_the_hosts_name_servers(host: Host) -> None:
    """All of them, in their order, without a command; and the next command does what a holder that hangs didn't."""
    resolv_conf = host.cloud.home / "etc/resolv.conf"
    for at, address, answer in ((host.pid, "127.0.0.53", "192.0.2.53"), (host.router, OUTSIDE, "192.0.2.2")):
        host.spawn(sys.executable, "-c", ANSWER, address, answer, at=at)
    guest = PrivateGuest(host)

    def answers(address: str) -> bool:
        return guest.resolve() == address

    resolv_conf.write_text("nameserver 127.0.0.53\n")
    host.run("net", "up", "--private").ok()
    eventually(lambda: guest.resolve() == "192.0.2.53", "the server on the host's loopback answers", 10)
    steps = {
        f"search example.org\nnameserver {OUTSIDE}\n": "192.0.2.2",
        "nameserver 127.0.0.53\n": "192.0.2.53",
        f"nameserver fe80::1%eth0\nnameserver 203.0.113.99\nnameserver {OUTSIDE}\n": "192.0.2.2",
    }
    for text, answer in steps.items():
        resolv_conf.write_text(text)
        eventually(functools.partial(answers, answer), f"{text!r} is heeded", 20)
    (holder,) = (pid for pid, words in host.cloud.processes().items() if " net follow " in words)
    os.kill(holder, signal.SIGSTOP)
    resolv_conf.write_text("nameserver 127.0.0.53\n")
    doctor = host.run("doctor", env={"NOCLOUD_vmNetwork": "private"}).stdout
    assert "present name servers" in doctor and "nocloud net --private up" in doctor
    host.run("net", "up", "--private").ok()
    eventually(lambda: guest.resolve() == "192.0.2.53", "`net up` notices", 10)
    os.kill(holder, signal.SIGCONT)
    host.run("net", "down", "--private").quiet()


def test_a_default_route_that_comes_later_is_a_way_out(host: Host) -> None:
    listen(host, host.router)
    host.shell("ip route del default").ok()
    guest = PrivateGuest(host)
    assert "no way out" in host.run("net", "up", "--private").ok().stderr
    assert not guest.reaches(OUTSIDE)
    host.shell(f"ip route add default via {OUTSIDE}").ok()
    eventually(lambda: guest.reaches(OUTSIDE), "VMs have a way out", 20)
    host.run("net", "down", "--private").quiet()


# VMs on it ###########################################################################################


def register() -> str:
    """What users publish of their VMs, and what of that is served, for a shell on the host."""
    return "cd /var/lib/nocloud; grep -s '' published/* dhcp/* hosts/*; true"


def test_a_vm_has_its_address_and_name_at_once(host: Host, tiny_image: Path, vms: None) -> None:
    """By qemu's own bridge helper; and both go with it, also what dnsmasq remembers."""
    cloud = host.cloud
    add_template(cloud, tiny_image)
    host.variables["NOCLOUD_vmNetwork"] = "bridge"
    host.run("vminstantiate", "-n", "tiny").fails(
        1, "there is no bridge nocloud", "nocloud net up", "vmNetwork=private"
    )
    host.variables["NOCLOUD_vmNetwork"] = "auto"
    host.run("net", "up").ok()
    host.run("vminstantiate", "-n", "tiny", "-g", "pf", "-o", "name=web").ok()
    assert host.resolve(host.pid, "web00.pf.nocloud") == host.resolve(host.pid, "web00") == "192.168.1.2"
    conf = cloud.conf("pf/default/web00")
    assert (conf["vmNetwork"], conf["vmAddress"]) == ("bridge", "192.168.1.2")
    assert host.run("vmssh", "web00", "hostname; ip -4 -o addr", timeout=120).ok().stdout.startswith("web00\n")
    assert "192.168.1.2/24" in host.run("vmssh", "web00", "ip -4 -o addr").ok().stdout
    assert host.run("vmrunning").ok().lines == ["web00 pf/default 192.168.1.2"]
    shown = host.run("net", "status").ok().stdout
    assert f"web00.pf.nocloud {conf['vmMac']} 192.168.1.2 leased until " in shown and "wrong:" not in shown, shown
    host.run("net", "down").fails(1, "in use", "1 VM")
    host.run("vmstop", "-d", "-g", "pf").quiet()
    assert host.resolve(host.pid, "web00.pf.nocloud") == ""
    assert host.shell(register()).stdout == host.shell("cat /var/lib/nocloud/dnsmasq.leases").stdout == ""
    host.run("net", "down").quiet()
    host.shell("ip link add nocloud type bridge; ip link set nocloud up; echo > /etc/qemu/bridge.conf").ok()
    host.run("vm", "-n", "tiny", env={"NOCLOUD_vmNetwork": "bridge"}).fails(1, "no line: allow nocloud")


@pytest.mark.long
def test_a_vm_that_bash_started_is_reached(host: Host, guest_cache: Path, vms: None) -> None:
    """Its address is what DHCP gave to the MAC on its command line; from then on it is a VM like any other."""
    cloud, mac = host.cloud, "52:54:00:12:34:ab"
    key, folder = cloud.home / ".ssh/id_ed25519", cloud.folder("pf/web/web00")
    for place in (key.parent, folder):
        place.mkdir(0o700, parents=True)
    cloud.execute(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key]).ok()
    disk, conf = folder / "web00_0.img", folder / "web00.conf"
    shutil.copyfile(tinyguest.build(guest_cache, key.with_suffix(".pub").read_text(), ifname="ens3", reads=""), disk)
    conf.write_text("vmName=web00\nvmMem=96\nvmCpu=1\nvmDisk=pf/web/web00/web00_0.img\n")
    host.run("net", "up").ok()
    qemu = host.spawn(
        "qemu-system-x86_64", "-m", 96, "-display", "none", "-drive", f"file={disk},if=virtio",
        "-netdev", "bridge,id=net0,br=nocloud", "-device", f"virtio-net-pci,netdev=net0,mac={mac},addr=3",
        "-monitor", "telnet:127.0.0.1:4444,server,nowait",
    )  # fmt: skip
    eventually(lambda: len(host.run("vmrunning").ok().stdout.split()) == 3, "it has an address", 90)
    _, _, address = host.run("vmrunning").ok().stdout.split()
    assert host.run("vmssh", "web00", "cat /sys/class/net/ens3/address; hostname").ok().lines == [mac, "web00"]
    known = host.run("vminventory", "--host", address).ok().stdout
    assert f"HostKeyAlias={cloud.conf('pf/web/web00')['vmUuid']}" in known
    assert host.run("vmmanage", "-n", "web00", "info status").ok().stdout == "VM status: running\n"
    host.run("vmstop", "-g", "pf", "--timeout", 60).quiet()
    assert qemu.wait(5) == 0
    # Started by us, it has a MAC and an address of its own, for good.
    host.run("vm", "-n", "web00", "-g", "pf", "hostname").ok()
    assert host.run("vmrunning").ok().stdout.split()[2] == cloud.conf("pf/web/web00")["vmAddress"] != address
    host.run("vmstop", "-d", "-g", "pf").quiet()


def publish(host: Host, base: str, *vms: str, then: str = "") -> Result:
    """VMs GROUP/NAME get an address and are published from a tree of their own; no clone is made."""
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r}); import nocloud
config = nocloud.load_config()
config.set('vmBaseDir', {base!r}, '')
tree = nocloud.Tree(config)
bridge = nocloud.HostBridge(config, tree)
for word in sys.argv[1:]:
    group, name = word.split('/')
    uuid, mac = nocloud.new_identity(set())
    vm = nocloud.VM(tree, group, 'default', name)
    vm.get = {{'vmUuid': uuid, 'vmMac': mac, 'vmAddress': bridge.allot(set(), uuid)}}.get
    {then or "bridge.publish(vm)"}
    print(vm.get('vmAddress'))
"""
    script = script.replace("vm = nocloud.VM(", "vm = type('V', (nocloud.VM,), {})(")
    return host.at(host.pid, sys.executable, "-IS", "-c", script, *vms)


def test_addresses_and_names_are_shared_out_among_all_trees(host: Host) -> None:
    host.run("net", "up", env={"NOCLOUD_bridgeDhcpStop": "192.168.1.9"}).ok()
    host.variables["NOCLOUD_bridgeDhcpStop"] = "192.168.1.9"
    assert publish(host, "/one", "pf/web00", "pf/web01").ok().lines == ["192.168.1.2", "192.168.1.3"]
    assert publish(host, "/two", "pf/web00", "q/web01").ok().lines == ["192.168.1.4", "192.168.1.5"]
    names = {name: host.resolve(host.pid, name) for name in ("web00.pf.nocloud", "web00", "web01", "web01.q.nocloud")}
    assert list(names.values()) == ["192.168.1.2", "192.168.1.2", "192.168.1.3", "192.168.1.5"]
    # The upper quarter of the range is DHCP's own: there is one address left, held though its VM was never made.
    assert publish(host, "/one", "pf/x00", then="pass").ok().lines == ["192.168.1.6"]
    assert publish(host, "/one", "pf/y00", then="pass").ok().lines == ["192.168.1.7"]
    assert "no address is free" in publish(host, "/two", "pf/z00").stderr
    assert "web00" not in host.shell("cat /var/lib/nocloud/hosts/* | grep 192.168.1.4").stdout
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import nocloud\n"
        "config = nocloud.load_config()\nconfig.set('vmBaseDir', sys.argv[1], '')\n"
        "print(*nocloud.HostBridge(config, nocloud.Tree(config)).hosts.orphans(set()))"
    )
    for base, count in (("/one", 4), ("/two", 2), ("/three", 0)):
        assert len(host.at(host.pid, sys.executable, "-IS", "-c", code, base).ok().stdout.split()) == count


def test_an_address_is_given_back_and_changed_with_the_network(host: Host, vms: None) -> None:
    """A clone that can't be made holds none; a kept VM gets another one where the bridge has another network."""
    cloud = host.cloud
    add_blank(cloud)
    host.run("net", "up").ok()
    path = replace_program(cloud.home / "bin", "qemu-img", 'case "$1" in create) exit 1;; esac; exec "$REAL" "$@"')
    host.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=x", env={"PATH": path}).fails(1, "x00")
    assert host.shell(register()).stdout == ""
    host.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=x").ok()
    assert cloud.conf("pf/default/x00")["vmAddress"] == "192.168.1.2"
    host.run("vmstop", "-g", "pf", "--kill").ok()
    host.run("net", "down").quiet()
    text = (ROOT / "etc/nocloud_net.conf").read_text()
    (cloud.home / ".nocloud.conf").write_text(text.replace("bridgeSubnet=192.168.1\n", "bridgeSubnet=10.7.7\n"))
    host.run("net", "up").ok()
    host.run("vm", "-n", "x00", "-g", "pf", "-G").ok()
    assert cloud.conf("pf/default/x00")["vmAddress"] == "10.7.7.2"
    assert host.resolve(host.pid, "x00.pf.nocloud", "10.7.7.1") == "10.7.7.2"
    host.run("vmstop", "-d", "-g", "pf").quiet()


class Member:
    """A member of kvm, on a host where something stands in for systemd and its path unit."""

    def __init__(self, host: Host, uid: int = USERS[0], member: bool = True) -> None:
        self.host, self.uid, self.home = host, uid, f"/run/u{uid}"
        kvm = host.shell("getent group kvm").stdout.split(":")[2]
        groups = ["--groups", kvm] if member else ["--clear-groups"]
        self.user = ["setpriv", "--reuid", uid, "--regid", uid, *groups, "--inh-caps=-all", "env", "-i"]
        if host.shell(f"mkdir {self.home} && chown {uid}:{uid} {self.home}").status == 0:
            watch_changes(host)

    def call(self, *words: object, **variables: str) -> Result:
        known = {"HOME": self.home, "PATH": "/run/units:/usr/bin:/usr/sbin", "NOCLOUD_vmNetwork": "auto", **variables}
        own = [f"{key}={value}" for key, value in known.items()]
        return self.host.at(self.host.pid, *self.user, f"--chdir={self.home}", *own, *words)

    def says(self, address: str, mac: str, name: str, uuid: str = "") -> str:
        """Write a file by hand, and wait until it has been looked at; its UUID."""
        self.count = getattr(self, "count", 0) + 1
        uuid = uuid or f"{self.uid:08x}-0000-4000-8000-{self.count:012x}"
        line = f"{address} {mac} {name}" if mac else address
        text = f"{line}\\n# tree 0123456789abcdef\\n"
        self.call("sh", "-c", f"printf '{text}' > /var/lib/nocloud/published/{uuid}").ok()
        self.host.run("bridge", "accept").quiet()
        return uuid


def watch_changes(host: Host) -> None:
    """Programs in the place of systemd and its path unit: whoever writes to `changed` has `bridge accept` run."""
    if host.shell("mkdir -p /run/systemd/system /run/units").ok() and not host.shell("ls /run/units").stdout:
        host.shell(
            f"cp {PROGRAM} /run/nocloud.py && chmod 644 /run/nocloud.py;"
            "printf '#!/bin/sh\\n[ $1 = is-active ]\\n' > /run/units/systemctl && chmod 755 /run/units/systemctl"
        ).ok()
        host.variables["PATH"] = f"/run/units:{host.cloud.env['PATH']}"
        accept = " ".join(map(str, host.cloud.argv("bridge", "accept")))
        watch = "seen=; while sleep 0.1; do now=$(stat -c %y /var/lib/nocloud/changed);"
        host.spawn("sh", "-c", f'{watch} [ "$now" = "$seen" ] || {accept}; seen=$now; done')


def served(host: Host) -> str:
    return host.shell("cd /var/lib/nocloud; cat dhcp/* hosts/*").stdout


def test_what_others_put_into_the_folder_is_input(host: Host) -> None:
    host.run("net", "up").ok()
    host.shell(
        "cd /var/lib/nocloud/published; mkfifo fifo; ln -s /dev/zero zero; head -c 9999 /dev/urandom > noise;"
        "mkdir folder; printf '\\377,192.168.1.2,\\n' > bytes"
    ).ok()
    assert publish(host, "/one", "pf/web00").ok().lines == ["192.168.1.2"]
    assert "web00.pf.nocloud" in host.run("net", "status").ok().stdout


def test_no_member_owns_the_dhcp_and_dns_of_others(host: Host) -> None:
    """What a member of kvm says counts where it has the form, is of his own VM, and nobody else has it."""
    host.run("net", "up").ok()
    assert publish(host, "/one", "pf/web00").ok().lines == ["192.168.1.2"]
    before, mallory = served(host), Member(host)
    mac = before.partition(",")[0]
    for folder in ("dhcp", "hosts", "."):
        assert mallory.call("sh", "-c", f"echo > /var/lib/nocloud/{folder}/x").status != 0
    everybody = "echo '*:*:*:*:*:*,ignore' > /var/lib/nocloud/published/aaaaaaaa-0000-4000-8000-000000000000"
    mallory.call("sh", "-c", everybody).ok()
    for number, (address, its_mac, name) in enumerate((
        ("*:*:*:*:*:*,ignore", "", ""),
        ("192.168.1.9", "*:*:*:*:*:*", "x.pf"),
        ("192.168.1.9", "00:50:56:00:00:77", "x.pf,ignore"),
        ("192.168.1.9", "00:50:56:00:00:77", "x.pf\\n192.168.1.9 deb.debian.org"),
        ("192.168.1.9", "00:50:56:00:00:77", "x.pf gateway"),
        ("192.168.1.1", "00:50:56:00:00:77", "x.pf"),  # the host's
        ("192.168.1.254", "00:50:56:00:00:77", "x.pf"),  # DHCP's own
        ("203.0.113.2", "00:50:56:00:00:77", "x.pf"),
        ("192.168.1.2", "00:50:56:00:00:77", "x.pf"),  # another VM's
        ("192.168.1.02", "00:50:56:00:00:77", "x.pf"),
        ("192.168.1.9", mac, "x.pf"),
    )):  # fmt: skip
        mallory.says(address, its_mac, name, f"bbbbbbbb-0000-4000-8000-{number:012x}")
        assert served(host) == before, (address, its_mac, name)
    mallory.says("192.168.1.9", "00:50:56:00:00:77", "deb.debian.org")
    mallory.says("192.168.1.10", "00:50:56:00:00:78", "github.com")
    mallory.says("192.168.1.11", "00:50:56:00:00:79", "web00.pf")
    mallory.says("192.168.1.12", "00:50:56:00:00:7a", f"{os.uname().nodename.partition('.')[0]}.pf")
    names = {"deb.debian.org", "github.com", "web00.pf.nocloud", "web00", os.uname().nodename.lower()}
    words = [line.split() for line in served(host).splitlines() if "," not in line]
    assert {word for line in words for word in line if word in names and line[0] != "192.168.1.2"} == set()
    assert host.resolve(host.pid, "deb.debian.org") == ""
    assert host.resolve(host.pid, "deb.debian.org.nocloud") == "192.168.1.9"
    assert host.resolve(host.pid, "web00") == "192.168.1.2"
    assert host.resolve(host.pid, os.uname().nodename.partition(".")[0]) == "192.168.1.1"
    guest, told = host.guest(mac, os.uname().nodename)
    assert told["address"] == "192.168.1.2", "DHCP serves the VM as before"
    own = os.uname().nodename.partition(".")[0]
    assert host.resolve(guest, own) == host.resolve(guest, f"{own}.nocloud") == "192.168.1.1"


def test_what_is_served_stays_its_vms(host: Host) -> None:
    """Whoever says later that it is his doesn't get it, though his file looks older or is older; nor what is held."""
    host.run("net", "up").ok()
    mallory = Member(host)
    older = mallory.says("192.168.1.5", "00:50:56:00:00:77", "x.pf")
    assert publish(host, "/one", "pf/web00").ok().lines == ["192.168.1.2"]
    before = served(host)
    for uuid in (older, ""):
        said = mallory.says("192.168.1.5", "00:50:56:00:00:77", "web00.pf", uuid)
        mallory.call("touch", "-d", "2001-01-01", f"/var/lib/nocloud/published/{said}").ok()
        host.run("bridge", "accept").quiet()
        assert host.resolve(host.pid, "web00.pf.nocloud") == "192.168.1.2"
        assert "192.168.1.2 web00.pf.nocloud web00.nocloud web00\n" in served(host)
    for uuid in (older, ""):
        mallory.says("192.168.1.2", "00:50:56:00:00:77", "x.pf", uuid)
    assert before.splitlines()[-1] in served(host).splitlines() and served(host).count("192.168.1.2") == 2
    # Held for one that isn't made yet, by a file that is its owner's to change later.
    held = Member(host, USERS[1])
    uuid = held.says("192.168.1.7", "", "")
    mallory.says("192.168.1.7", "00:50:56:00:00:78", "y.pf")
    held.says("192.168.1.7", "00:50:56:00:00:79", "z.pf", uuid)
    assert host.resolve(host.pid, "z.pf.nocloud") == "192.168.1.7" and host.resolve(host.pid, "y.pf.nocloud") == ""


def test_no_member_can_keep_others_from_publishing(host: Host) -> None:
    """Not by a lock on the folder, which he may open."""
    host.run("net", "up").ok()
    mallory = Member(host)
    hold = "import fcntl, os, signal; fcntl.flock(os.open('/var/lib/nocloud/published', 0), fcntl.LOCK_EX);"
    words = [
        *mallory.user,
        f"PATH={os.environ['PATH']}",
        "python3",
        "-IS",
        "-c",
        hold + "print(1, flush=True); signal.pause()",
    ]
    child = subprocess.Popen(
        ["nsenter", "-t", str(host.pid), "-n", "-m", "--", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout and child.stdout.read(1) == "1"
        assert publish(host, "/one", "pf/web00").ok().stderr == ""
        assert host.resolve(host.pid, "web00.pf.nocloud") == "192.168.1.2"
    finally:
        child.kill()
        child.communicate()


def test_a_member_whom_nothing_serves_is_left_to_dhcp(host: Host) -> None:
    """And told so, and by doctor what mends it."""
    host.run("net", "up").ok()
    member = Member(host)
    program = ("python3", "-IS", "/run/nocloud.py")
    assert member.call(*program, "doctor", "publishing").ok().stdout.startswith("ok ")
    host.shell("echo '#!/bin/sh' > /run/units/systemctl; echo exit 3 >> /run/units/systemctl").ok()
    said = member.call(*program, "doctor", "publishing").stdout
    assert "reload.path doesn't run" in said and "sudo systemctl start nocloud-dnsmasq-reload.path" in said
    code = "import sys; sys.path.insert(0, '/run'); import nocloud; c = nocloud.load_config();"
    code += "print([nocloud.HostBridge(c).allot(set(), 'x')])"
    done = member.call("python3", "-IS", "-c", code).ok()
    assert done.stdout == "['']\n" and "left to DHCP: nocloud-dnsmasq-reload.path doesn't run" in done.stderr


def test_two_at_once_never_get_one_address(host: Host) -> None:
    """Nor do many, who know nothing of each other but their files."""
    host.run("net", "up").ok()
    vms = [f"g{number}/x{each:02}" for number in range(4) for each in range(6)]
    ways = ThreadPoolExecutor(4)
    done = list(ways.map(lambda at: publish(host, f"/{at}", *vms[at * 6 : at * 6 + 6]).ok(), range(4)))
    addresses = [line for each in done for line in each.lines]
    assert len(set(addresses)) == len(addresses) == len(vms)
    assert sum("," in line for line in served(host).splitlines()) == len(vms)


def test_publishing_loses_no_address_to_who_reserves_it_meanwhile(tmp_path: Path) -> None:
    """The file is younger then than the other's; the second looks at the first's only after that."""
    inbox, (first, second) = nocloud.Inbox(str(tmp_path), "/1"), (nocloud.new_identity(set())[0] for _ in range(2))
    assert inbox.reserve(first, "192.168.1.2")
    (tmp_path / second).write_text(f"192.168.1.2\n{inbox.mark}")
    published = f"192.168.1.2 00:50:56:aa:00:01 x00.g\n{inbox.mark}"
    time.sleep(0.02)  # more than a tick of the clock that files are dated by
    (tmp_path / first).write_text(published)
    assert not inbox.reserve(second, "192.168.1.2")


@pytest.mark.long
def test_ordinary_users_share_the_bridge(host: Host, vms: None) -> None:
    """By the setuid helper: who is in the group kvm allots and publishes, others are served by DHCP."""
    host.run("net", "up").ok()
    host.shell("cp /usr/lib/qemu/qemu-bridge-helper /run/helper && chmod 4755 /run/helper").ok()
    # The helper opens this as its caller, who may on every distribution.
    host.shell("mknod /run/tun c 10 200 && chmod 666 /run/tun && mount --bind /run/tun /dev/net/tun").ok()
    users = {uid: Member(host, uid, uid == USERS[0]) for uid in USERS}

    def call(uid: int, *words: object) -> Result:
        return users[uid].call(*words, NOCLOUD_vmBridgeHelper="/run/helper", NOCLOUD_NOKVM="1")

    for uid in USERS:
        nocloud_py = ("python3", "-IS", "/run/nocloud.py")
        call(uid, "qemu-img", "create", "-q", "-f", "qcow2", "blank.qcow2", "8M").ok()
        words = ("--image", "blank.qcow2", "--mem", 32, "--cpu", 1, "--init", "none")
        call(uid, *nocloud_py, "template", "blank", *words).ok()
        options = f"name=web;port={uid}:80"
        done = call(uid, *nocloud_py, "instantiate", "-n", "blank", "-g", "pf", "-o", options).ok()
        assert done.stdout == "web00\n"
        assert ("left to DHCP" in done.stderr and "kvm" in done.stderr) == (uid == USERS[1]), done
        conf = call(uid, "sh", "-c", "cat .local/share/nocloud/kvm/pf/default/web00/web00.conf").ok().stdout
        assert "vmNetwork=bridge\n" in conf
        assert ("vmAddress=192.168.1.2\n" in conf) == (uid == USERS[0])
    assert host.resolve(host.pid, "web00.pf.nocloud") == "192.168.1.2"
    # A port, by a server in the guest's stead; the other VM's address nobody knows, for it has asked for none.
    host.shell("ip addr add 192.168.1.2/32 dev nocloud").ok()
    page = "print(s.create_server(('192.168.1.2', 80)).accept()[0].sendall(b'hello'))"
    server = subprocess.Popen(
        ["nsenter", "-t", str(host.pid), "-n", sys.executable, "-c", f"import socket as s; {page}"]
    )
    try:
        read = "import socket as s; print(s.create_connection(('127.0.0.1', {})).recv(9))"
        look = (sys.executable, "-c", read.format(USERS[0]))
        eventually(lambda: host.at(host.pid, *look).stdout == "b'hello'\n", "the port leads to the VM's address", 20)
    finally:
        server.kill()
        server.wait()
    host.shell("ip addr delete 192.168.1.2/32 dev nocloud").ok()
    assert "ConnectionResetError" in host.at(host.pid, sys.executable, "-c", read.format(USERS[1])).stderr
    host.run("net", "down").fails(1, "2 VMs")
    modes = host.shell("stat -c '%u %G %a' /var/lib/nocloud/published/* /var/lib/nocloud/hosts/*").ok().stdout
    assert modes == "64001 kvm 640\n0 kvm 640\n"
    assert "web00.pf.nocloud" in call(USERS[0], *nocloud_py, "net", "status").ok().stdout
    for uid in USERS:
        call(uid, *nocloud_py, "net", "up").fails(1, "needs root; nothing was changed")
        call(uid, *nocloud_py, "stop", "-d", "-g", "pf").ok()
    eventually(lambda: not host.shell("ss -Hltn | grep 127.0.0.1:6400").stdout, "no port is open")
    assert host.resolve(host.pid, "web00.pf.nocloud") == ""
    assert host.shell(register()).stdout == ""
    host.run("net", "down").quiet()


def test_status_tells_what_is_wrong(host: Host) -> None:
    assert host.run("net", "status").ok().lines == ["bridge nocloud: down"]
    both = host.run("net", "status", env={"NOCLOUD_vmNetwork": "private"}).ok().lines
    assert both == ["private network: down"]
    host.shell("iptables-nft -P FORWARD DROP").ok()
    host.run("net", "up").ok()
    assert host.run("net", "status").ok().lines == [
        "bridge nocloud: up, 192.168.1.0/24", "dnsmasq: answers at 192.168.1.1",
    ]  # fmt: skip
    host.shell(
        "nft delete table ip nocloud; iptables-nft -F FORWARD; echo 0 > /proc/sys/net/ipv4/conf/eth0/forwarding;"
        "kill $(cat /run/nocloud/dnsmasq.pid); ip link add lan type bridge; ip addr add 192.168.1.9/30 dev lan"
    ).ok()
    eventually(lambda: "not running" in host.run("net", "status").ok().stdout, "dnsmasq has ended")
    wrong = [line for line in host.run("net", "status").ok().lines if line.startswith("wrong: ")]
    for words in (
        "lan has 192.168.1.9/30",
        "eth0 doesn't forward",
        "no DHCP and DNS",
        "nft table",
        "doesn't accept the bridge",
    ):
        assert sum(words in line for line in wrong) == 1, wrong
    host.shell("ip link delete lan").ok()
    host.run("net", "up").ok()
    assert "wrong" not in host.run("net", "status").ok().stdout


# The units ###########################################################################################


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units as an installation has them."""
    folder = tmp_path_factory.mktemp("units")
    program = folder / "nocloud"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for path in (ROOT / "systemd").iterdir():
        (folder / path.name).write_text(path.read_text().replace("@BINDIR@", str(folder)))
    return folder


def analyze(*words: object) -> subprocess.CompletedProcess[str]:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze")
    argv = ["systemd-analyze", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})


@pytest.mark.parametrize("name", ["nocloud-dnsmasq", "nocloud-dnsmasq-reload"])
def test_the_units_that_read_what_others_say_are_hardened(units: Path, name: str) -> None:
    done = analyze("security", "--offline=true", "--no-pager", units / f"{name}.service")
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert match and float(match.group(1)) <= 2.5, done.stdout + done.stderr


def test_every_unit_is_what_the_program_knows(units: Path) -> None:
    for name in nocloud.SYSTEMD_UNITS:
        assert (units / name).exists()
    assert "KillSignal=SIGUSR1" in (units / "nocloud@.service").read_text()
