"""The private network: made by the first VM, gone with the last, closed to the host."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import (
    PROGRAM,
    READY,
    Cloud,
    eventually,
    interfaces,
    is_alive,
    kill_hard,
    nothing_made,
    open_ports,
    replace_program,
)

import nocloud


@pytest.mark.parametrize(
    ("networks", "subnet"),
    [
        ("", "10.88.0"),
        ("192.168.1.0/24", "10.88.0"),
        ("10.88.0.0/24", "10.88.1"),
        ("10.88.0.128/25", "10.88.1"),
        ("10.88.0.0/16", "10.89.0"),
        ("10.88.0.0/15", "10.90.0"),
        ("10.88.0.5/32", "10.88.1"),
        ("10.88.0.1/32 10.88.1.255/32", "10.88.2"),
        ("10.89.0.0/16", "10.88.0"),
        # A VPN's two halves of the world are a default route in disguise; and where all is claimed, the narrower count.
        ("0.0.0.0/1 128.0.0.0/1", "10.88.0"),
        ("10.0.0.0/8 10.88.0.0/24", "10.88.1"),
        (" ".join(f"10.{n}.0.0/18 10.{n}.64.0/18 10.{n}.128.0/17" for n in range(88, 128)), None),
    ],
)
def test_free_subnet(networks: str, subnet: str | None) -> None:
    taken = list(map(ipaddress.IPv4Network, networks.split()))
    if subnet:
        assert nocloud.free_subnet(taken) == subnet
    else:
        with pytest.raises(nocloud.Error, match="no subnet is free"):
            nocloud.free_subnet([*taken, *(next(each.subnets()) for each in taken if each.prefixlen == 17)])


def test_the_hosts_addresses() -> None:
    """As ip(8) has them; the loopback's are no way to the host from elsewhere."""
    shown = subprocess.run(["ip", "-4", "-br", "address"], capture_output=True, text=True, check=True).stdout
    known = {f"{address}/32" for address in re.findall(r"([0-9.]+)/\d+", shown) if not address.startswith("127.")}
    assert known <= set(nocloud.host_addresses()) and not [a for a in nocloud.host_addresses() if a.startswith("127.")]


def daemons(cloud: Cloud) -> dict[str, int]:
    """The network's processes by the name of their program."""
    found: dict[str, int] = {}
    for pid, words in cloud.processes().items():
        for name in ("dnsmasq", "pasta"):
            if words.split(" ", 1)[0].rpartition("/")[2] == name:
                found[name] = pid
        if " net follow " in words:
            found["holder"] = pid
    return found


def lines(cloud: Cloud) -> list[str]:
    return cloud.run("net", "status").ok().lines


# Without VMs #########################################################################################


def test_up_and_down_twice(cloud: Cloud, vms: None) -> None:
    before = interfaces()
    assert lines(cloud) == ["private network: down"]
    cloud.run("net", "down").quiet()
    cloud.run("net", "up").ok()
    first = daemons(cloud)
    cloud.run("net", "up").ok()
    assert daemons(cloud) == first and {"dnsmasq", "holder"} <= set(first)
    assert re.match(r"private network: up, 10\.\d+\.\d+\.0/24", lines(cloud)[0])
    assert open_ports(cloud) == set()
    assert not {name for name in interfaces() - before if name.startswith(("tap", "nocloud", "out"))}
    assert (cloud.base / ".net").stat().st_mode & 0o777 == 0o700
    cloud.run("net", "down").quiet()
    cloud.run("net", "down").quiet()
    assert not cloud.processes()
    assert lines(cloud) == ["private network: down"]
    assert not (cloud.base / ".net").exists()


def test_commands_need_it_up(cloud: Cloud) -> None:
    cloud.run("net", "exec", "true").fails(1, "not up")
    cloud.run("net", "connect", "10.88.0.2", "22").fails(1)
    cloud.run("net", "connect", "web00", "22").fails(1, "not up")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("left",),
        ("up", "x"),
        ("down", "x"),
        ("status", "x"),
        ("exec",),
        ("connect",),
        ("connect", "10.88.0.2"),
        ("connect", "10.88.0.2", "0"),
        ("connect", "10.88.0.2", "65536"),
        ("connect", "web 00", "22"),
        ("connect", "", "22"),
    ],
)
def test_wrong_words(cloud: Cloud, words: tuple[str, ...]) -> None:
    cloud.run("net", *words).fails(2)
    assert not cloud.processes()


def test_two_commands_at_once_make_one_network(cloud: Cloud, vms: None) -> None:
    children = [cloud.spawn("net", "up") for _ in range(4)]
    for child in children:
        _, stderr = child.communicate(timeout=60)
        assert child.returncode == 0, stderr
    running = [words.split(" ", 1)[0].rpartition("/")[2] for words in cloud.processes().values()]
    assert sorted(set(running)) == sorted(running)
    cloud.run("net", "down").quiet()


def test_exec_goes_in_and_gives_the_status(cloud: Cloud, vms: None) -> None:
    cloud.run("net", "up").ok()
    assert cloud.run("net", "exec", "sh", "-c", "exit 7").status == 7
    assert cloud.run("net", "exec", "cat", input="x").ok().stdout == "x"
    shown = cloud.run("net", "exec", "ip", "-o", "-4", "addr").ok().stdout
    assert re.search(r"\bnocloud +inet 10\.\d+\.\d+\.1/24", shown)
    cloud.run("net", "exec", "no-such-program").fails(127, "no-such-program")
    assert cloud.run("net", "exec", "echo", "-g", "-h").ok().stdout == "-g -h\n"
    assert "uid=0" in cloud.run("net", "exec", "id").ok().stdout


def test_it_is_another_network_for_each_tree(cloud: Cloud, tmp_path: Path, vms: None) -> None:
    cloud.run("net", "up").ok()
    with Cloud(tmp_path / "second") as other:
        other.run("net", "up").ok()
        names = [each.run("net", "exec", "readlink", "/proc/self/ns/net").ok().stdout for each in (cloud, other)]
        assert names[0] != names[1] != os.readlink("/proc/self/ns/net")


def test_the_subnet_is_kept_while_there_are_vms(cloud: Cloud, vms: None) -> None:
    """Addresses stay what they are, though the host has got a route to them meanwhile."""
    cloud.base.mkdir()
    (cloud.base / ".net").mkdir(0o700)
    (cloud.base / ".net/subnet").write_text("10.99.7\n")
    cloud.run("net", "up").ok()
    assert "10.99.7.0/24" in lines(cloud)[0]
    cloud.run("net", "down").quiet()
    (cloud.base / ".net").mkdir(0o700)
    (cloud.base / ".net/subnet").write_text("10.99.7; x\n")
    cloud.run("net", "up").fails(1, "subnet")


def test_without_pasta_it_serves_and_says_so(cloud: Cloud, tmp_path: Path, vms: None) -> None:
    from support import link_programs

    done = cloud.run("net", "up", env={"PATH": link_programs(tmp_path / "bin", "pasta", "passt")}).ok()
    assert "no way out" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "pasta" not in daemons(cloud)


def test_without_its_rules_it_serves_and_says_so(cloud: Cloud, vms: None) -> None:
    """nocloud.py copied alone: nothing is let out that no rule keeps from the host."""
    alone = cloud.home / "nocloud.py"
    shutil.copyfile(PROGRAM, alone)
    done = cloud.execute([sys.executable, "-IS", alone, "net", "up"]).ok()
    assert "no way out: etc/private.nft is missing" in done.stderr and len(done.stderr.splitlines()) == 1, done
    assert "pasta" not in daemons(cloud) and "dnsmasq" in daemons(cloud)


def test_namespaces_denied_names_a_way_out(cloud: Cloud, vms: None) -> None:
    """Where the kernel grants no user namespaces: inside one whose limit is 0."""
    deny = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    argv = ["unshare", "-Ur", "sh", "-c", deny, "sh", *cloud.argv("net", "up")]
    done = cloud.execute(argv)
    if "max_user_namespaces" in done.stderr:
        pytest.skip("this kernel has no such limit")
    done.fails(1, "private network", "bridge")
    assert not cloud.processes()


def test_a_dnsmasq_that_ends_is_an_error(blank: Cloud) -> None:
    """At once, or after a while: it isn't started again and again."""
    path = replace_program(blank.home / "bin", "dnsmasq", "echo 'no luck' >&2; exit 5")
    with nothing_made(blank):
        blank.run("vminstantiate", "-n", "blank", env={"PATH": path}).fails(1, "dnsmasq: no luck")
    path = replace_program(blank.home / "bin", "dnsmasq", "exec >/dev/null 2>&1; sleep 0.2")
    words = ("net", "--tap", "--private", "exec", "true")
    blank.run(*words, env={"PATH": path}).fails(1, "the private network doesn't stay up: its dnsmasq ends")
    blank.run("net", "down").quiet()


def test_few_descriptors_orphan_nothing(cloud: Cloud, vms: None) -> None:
    """What can't be found out for want of them is an error: nothing is taken for ended that runs."""
    cloud.run("net", "up").ok()
    code = (
        "import errno, os, resource\n"
        "folder = sys.argv[1]\n"
        "network = nocloud.PrivateNetwork(nocloud.Tree(nocloud.load_config()))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), 4096))\n"
        "for ask in (lambda: nocloud.daemon_pid(folder + '/dnsmasq.pid'), network.holder, network.down):\n"
        "    try:\n"
        "        print('it says', ask())\n"
        "    except (OSError, nocloud.Error) as error:\n"
        "        print('error')\n"
    )
    assert cloud.script(code, cloud.base / ".net").ok().lines == ["error"] * 3
    for limit in range(13, 17):
        cloud.run("net", "up").ok()
        cloud.execute(["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *cloud.argv("net", "down")])
        cloud.run("net", "down").quiet()
        assert not cloud.processes(), limit


# With VMs ############################################################################################


@pytest.fixture(scope="module")
def two(shared: Cloud) -> Iterator[Cloud]:
    """web00 in the groups one and two."""
    for group in ("one", "two"):
        words = ("-g", group, "-o", "name=web", *(("-w", READY) if group == "one" else ()))
        shared.run("vminstantiate", "-n", "tiny", *words).ok()
    yield shared


def resolve(cloud: Cloud, name: str) -> str:
    """What the network's own DNS server says, asked from inside."""
    server = ".".join(cloud.conf("one/default/web00")["vmAddress"].split(".")[:3]) + ".1"
    code = (
        "import socket, struct, sys\n"
        "name, server = sys.argv[1:]\n"
        "query = struct.pack('>6H', 1, 0x100, 1, 0, 0, 0)\n"
        "query += b''.join(bytes([len(part)]) + part.encode() for part in name.split('.'))\n"
        "query += b'\\0' + struct.pack('>2H', 1, 1)\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5); s.sendto(query, (server, 53))\n"
        "answer = s.recv(512)\n"
        "print('.'.join(map(str, answer[-4:])) if struct.unpack_from('>H', answer, 6)[0] else 'nothing')\n"
    )
    return cloud.run("net", "exec", "python3", "-c", code, name, server).ok().stdout.strip()


def test_names_resolve_for_both_groups(two: Cloud) -> None:
    one, other = (two.conf(f"{group}/default/web00")["vmAddress"] for group in ("one", "two"))
    assert one != other
    assert resolve(two, "web00.one") == resolve(two, "web00.one.nocloud") == one
    assert resolve(two, "web00.two") == resolve(two, "web00.two.nocloud") == other
    assert resolve(two, "web00") == resolve(two, "web00.nocloud") == one  # the older one's
    assert resolve(two, "nothere.nocloud") == "nothing"


def test_names_resolve_in_exec_and_connect(two: Cloud) -> None:
    """As in the VMs: whatever the host's own resolver is."""
    one, other = (two.conf(f"{group}/default/web00")["vmAddress"] for group in ("one", "two"))
    names = ("web00", "web00.one", "web00.nocloud", "web00.two", "web00.two.nocloud")
    code = "import socket, sys; print(*map(socket.gethostbyname, sys.argv[1:]))"
    done = two.run("net", "exec", "python3", "-c", code, *names).ok()
    assert done.stdout.split() == [one, one, one, other, other] and done.stderr == ""
    done = two.run("net", "connect", "web00.one", "22", input="SSH-2.0-x\r\n", timeout=30)
    assert done.stdout.startswith("SSH-2.0-")
    two.run("net", "connect", "nothere.nocloud", "22").fails(1, "nothere.nocloud:22: ")


def test_the_hosts_resolver_is_not_asked_inside(cloud: Cloud, vms: None) -> None:
    """systemd-resolved's files and nscd's socket are hidden, though /etc/resolv.conf is a link to one of them."""
    etc, run = cloud.home / "etc", cloud.home / "host-run"
    subprocess.run(["cp", "-a", "/etc", etc], check=False, stderr=subprocess.DEVNULL)  # what an ordinary user may read
    for folder in ("systemd/resolve", "nscd"):
        (run / folder).mkdir(parents=True)
    (run / "nscd/socket").touch()
    (run / "systemd/resolve/stub-resolv.conf").write_text("nameserver 127.0.0.53\n")
    for name in ("resolv.conf", "nsswitch.conf"):
        (etc / name).unlink(missing_ok=True)
    (etc / "resolv.conf").symlink_to("/run/systemd/resolve/stub-resolv.conf")
    (etc / "nsswitch.conf").write_text("passwd: files\n hosts:  mymachines resolve [!UNAVAIL=return] files\n")
    look = (
        "cat /etc/resolv.conf /etc/nsswitch.conf; ls /run/nscd /run/systemd/resolve;"
        "python3 -c 'import socket; print(socket.gethostbyname(\"web00.pf\"))'"
    )
    net, hosts = shlex.join(cloud.argv("net")), cloud.base / ".net/hosts"
    script = (
        f"mount --bind {etc} /etc && mount --bind {run} /run && {net} up && echo 10.88.0.77 web00.pf >{hosts}/x && "
        f"{net} exec sh -c {shlex.quote(look)}; cat /etc/resolv.conf; ls /run/nscd; rm {hosts}/x; {net} down"
    )
    done = cloud.execute(["unshare", "-m" if os.geteuid() == 0 else "-Urm", "sh", "-c", script]).ok()
    assert re.fullmatch(
        r"search nocloud\nnameserver 10\.[0-9.]+\.1\npasswd: files\nhosts: files dns\n"
        r"/run/nscd:\n\n/run/systemd/resolve:\nstub-resolv.conf\n10\.88\.0\.77\nnameserver 127\.0\.0\.53\nsocket\n",
        done.stdout,
    ), repr(done)


def test_both_are_reached_and_reach_each_other(two: Cloud) -> None:
    other = two.conf("two/default/web00")["vmAddress"]
    assert two.ssh("two/web00", "hostname").ok().stdout == "web00\n"
    assert f"({other})" in two.ssh("one/web00", "ping -c 1 -W 5 web00.two").ok().stdout
    two.ssh(other, "true").ok()


def test_connect_joins_a_port(two: Cloud) -> None:
    address = two.conf("one/default/web00")["vmAddress"]
    child = two.spawn("net", "connect", address, "22")
    assert child.stdout is not None and child.stdin is not None
    assert os.read(child.stdout.fileno(), 8) == b"SSH-2.0-"
    child.kill()
    child.wait()
    done = two.run("net", "connect", address, "22", input="SSH-2.0-x\r\n", timeout=30)
    assert done.stdout.startswith("SSH-2.0-")  # its input ended, the server went away: so does it
    two.run("net", "connect", address, "81").fails(1, f"{address}:81", "refused")


def test_no_port_of_the_host_is_open(two: Cloud) -> None:
    """Nothing of ours listens outside; what listens inside (dnsmasq, the guests' ssh) isn't seen out here."""
    assert open_ports(two) == set()


def test_a_guest_cannot_reach_the_hosts_loopback(two: Cloud) -> None:
    """Not by the gateway's address, nor by pasta's."""
    reached = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]

    def accept() -> None:
        try:
            server.accept()
        except OSError:
            return
        reached.set()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        gateway = ".".join(two.conf("one/default/web00")["vmAddress"].split(".")[:3]) + ".1"
        places = (gateway, "192.0.0.1", "192.0.0.2", "192.0.0.3", "127.0.0.1")
        code = "import socket, sys; socket.create_connection((sys.argv[1], sys.argv[2]), 2)"
        tries = [two.spawn("net", "exec", "python3", "-c", code, place, port) for place in places]
        script = "".join(f"(nc -w 2 {place} {port} < /dev/null && echo reached {place}) & " for place in places)
        assert two.ssh("one/web00", f"{script} wait; echo tried").ok().stdout == "tried\n"
        for child in tries:
            assert "Error" in child.communicate(timeout=60)[1] and child.returncode != 0
        assert not reached.is_set()
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def test_down_is_refused_while_vms_run(two: Cloud) -> None:
    two.run("net", "down").fails(1, "web00", "vmstop")
    assert "up" in lines(two)[0]


def test_a_killed_dnsmasq_is_restarted_by_the_next_command(two: Cloud) -> None:
    kill_hard(daemons(two)["dnsmasq"])
    assert any("dnsmasq: not running" in line for line in lines(two))
    two.run("net", "up").ok()
    assert "dnsmasq" in daemons(two)
    assert resolve(two, "web00.two") == two.conf("two/default/web00")["vmAddress"]


def test_a_dnsmasq_without_its_pidfile_makes_way(cloud: Cloud, vms: None) -> None:
    """Who started it was killed before that was written."""
    cloud.run("net", "--private", "up").ok()
    (cloud.base / ".net/dnsmasq.pid").unlink()
    cloud.run("net", "--private", "up").quiet()
    assert sum(words.split()[0].endswith("/dnsmasq") for words in cloud.processes().values()) == 1
    cloud.run("net", "--private", "down").quiet()


def test_another_users_stray_is_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose process is called like ours, with our file among its words, holds up nobody's network."""
    stray = tmp_path / "dnsmasq"
    shutil.copy(shutil.which("sleep") or "", stray)
    child = subprocess.Popen([stray, "60", "0"])
    asked = []

    def refuse(find: Callable[[], int]) -> None:
        asked.append(find())
        raise nocloud.Error("it belongs to another user")

    try:
        eventually(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "dnsmasq\n", "it runs")
        monkeypatch.setattr(nocloud, "end_process", refuse)
        nocloud.end_strays("dnsmasq", "60")
        assert child.pid in asked
    finally:
        child.kill()
        child.wait()


def test_a_full_disk_keeps_nobody_from_making_room(two: Cloud) -> None:
    """What the network would have written has time; what mends it hasn't."""
    code = """
def full(network):
    raise OSError(28, "No space left on device")
nocloud.PrivateNetwork.is_complete = lambda network: False
nocloud.PrivateNetwork._complete = full
sys.exit(nocloud.main(["vmrunning"]))"""
    done = two.script(code).ok()
    assert len(done.lines) == 2 and "the private network is not whole: " in done.stderr


def test_a_killed_pasta_is_restarted_by_the_next_start(two: Cloud) -> None:
    if "pasta" not in daemons(two):
        pytest.skip("pasta isn't installed")
    kill_hard(daemons(two)["pasta"])
    two.run("vminstantiate", "-n", "tiny", "-g", "more", "-o", "name=x").ok()
    assert "pasta" in daemons(two)
    two.run("vmstop", "-d", "-g", "more").quiet()


def test_a_killed_holder_is_put_back_while_a_vm_runs(two: Cloud) -> None:
    """The namespaces live in qemu; a new holder finds them there, and everything goes on."""
    inside = two.run("net", "exec", "readlink", "/proc/self/ns/net").ok().stdout
    kill_hard(daemons(two)["holder"])
    two.run("net", "up").ok()
    assert two.run("net", "exec", "readlink", "/proc/self/ns/net").ok().stdout == inside
    assert two.ssh("one/web00", "hostname").ok().stdout == "web00\n"
    assert resolve(two, "web00.one") == two.conf("one/default/web00")["vmAddress"]


def test_vmssh_heals_what_was_killed(two: Cloud) -> None:
    """The next command, whichever it is, puts back what it needs."""
    kill_hard(daemons(two)["holder"])
    done = two.ssh("one/web00", "hostname")
    two.run("net", "up").ok()  # the tests below need it
    assert done.ok().stdout == "web00\n"


def test_a_destroyed_vms_names_go_and_the_heir_gets_the_bare_one(two: Cloud) -> None:
    other = two.conf("two/default/web00")["vmAddress"]
    two.run("vmstop", "-d", "-g", "one").quiet()
    (two.base / "one/default/web00").mkdir(parents=True)  # resolve() reads the subnet from there
    (two.base / "one/default/web00/web00.conf").write_text(f"vmAddress={other}\n")
    try:
        assert resolve(two, "web00.one") == "nothing"
        assert resolve(two, "web00") == other
    finally:
        (two.base / "one/default/web00/web00.conf").unlink()
        os.removedirs(two.base / "one/default/web00")


def test_it_ends_with_its_last_vm_though_that_was_killed(two: Cloud) -> None:
    """The last test with the two: qemu is killed; the next command that stops or lists by group ends the network."""
    pid = two.qemu("two/default/web00")
    kill_hard(pid)
    two.run("vmstop", "-d", "-g", "two").quiet()
    assert not two.processes() and not is_alive(pid)
    assert not (two.base / ".net").exists()


# The host's bridge ###################################################################################


def test_a_bridge_that_is_not_there_is_an_error_with_a_way_out(cloud: Cloud, vms: None) -> None:
    from support import add_blank, nothing_made

    add_blank(cloud)
    cloud.env["NOCLOUD_bridgeInterface"] = "nosuchbridge"
    with nothing_made(cloud):
        done = cloud.run("vminstantiate", "-n", "blank", env={"NOCLOUD_vmNetwork": "bridge"})
        done.fails(1, "nosuchbridge", "NOCLOUD_vmNetwork=private")
    cloud.run("vminstantiate", "-n", "blank", "-o", "name=x", env={"NOCLOUD_vmNetwork": "auto"}).ok()
    assert cloud.conf("group/default/x00")["vmNetwork"] == "private"
    cloud.run("vminstantiate", "-n", "blank", "-o", "name=x", env={"NOCLOUD_vmNetwork": "bridge"}).ok()
    assert cloud.conf("group/default/x01")["vmNetwork"] == "private"  # a group's network is decided once


def test_leases_of_dnsmasq(tmp_path: Path) -> None:
    file = tmp_path / "leases"
    file.write_text(
        "1700000000 00:50:56:AB:cd:ef 192.168.1.7 web00 01:00\n"
        "duid 00:01:00\n"
        "1700000000 1234 fe80::1 x 00:01\n"
        "\n"
        "garbage\n"
    )
    config = nocloud.Config({"bridgeLeases": str(file)})
    assert nocloud.HostBridge(config).leases() == {"00:50:56:ab:cd:ef": "192.168.1.7"}
    assert nocloud.HostBridge(nocloud.Config({"bridgeLeases": str(tmp_path / "no")})).leases() == {}


@pytest.mark.parametrize(
    "line", ["1 00:50:56:ab:cd:ef 999.1.1.1 x *", "1 00:50:56:ab:cd:ef 1.2.3.4;x x *", "1 x 1.2.3 y *"]
)
def test_a_lease_file_is_input(tmp_path: Path, line: str) -> None:
    """A line that is no lease is passed over, and the others count."""
    file = tmp_path / "leases"
    file.write_text(f"{line}\n1700000000 00:50:56:00:00:01 192.168.1.8 web01 *\n")
    leases = nocloud.HostBridge(nocloud.Config({"bridgeLeases": str(file)})).leases()
    assert leases == {"00:50:56:00:00:01": "192.168.1.8"}


def test_a_tap_comes_from_the_bridge_helper(tmp_path: Path) -> None:
    """A helper of ours in the place of qemu's, which sends a descriptor the same way."""
    helper = tmp_path / "helper"
    helper.write_text(
        "#!/usr/bin/env python3\nimport os, socket, sys\n"
        f"open({str(tmp_path / 'words')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        "fd = int(sys.argv[-1].partition('=')[2])\n"
        "socket.send_fds(socket.socket(fileno=os.dup(fd)), [b'+'], [os.open('/dev/null', os.O_RDWR)])\n"
    )
    helper.chmod(0o755)
    bridge = nocloud.HostBridge(nocloud.Config({"vmBridgeHelper": str(helper), "bridgeInterface": "br7"}))
    tap, vhost = bridge.tap()
    assert os.readlink(f"/proc/self/fd/{tap}") == "/dev/null" and not os.get_inheritable(tap)
    for fd in (tap, vhost):
        if fd >= 0:
            os.close(fd)
    assert re.fullmatch(r"--use-vnet --br=br7 --fd=\d+", (tmp_path / "words").read_text())
    helper.write_text("#!/bin/sh\necho 'access denied by acl file' >&2; exit 1\n")
    with pytest.raises(nocloud.Error, match="access denied by acl file"):
        bridge.tap()
    assert subprocess.run(["true"], check=True).returncode == 0


def test_the_bridge_helpers_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it includes counts as well, where it can be read; a line that denies wins over all that allow."""
    conf, more = tmp_path / "bridge.conf", tmp_path / "more.conf"
    conf.write_text(f"# allow br9\n\n  allow   br7 \ninclude {more}\n")
    more.write_text("deny all\nallow br8")
    rules = nocloud.helper_rules(str(conf))
    assert rules == {("allow", "br7"): str(conf), ("deny", "all"): str(more), ("allow", "br8"): str(more)}
    monkeypatch.setattr(nocloud, "HELPER_LISTS", (str(conf),))
    bridge = nocloud.HostBridge(nocloud.Config({"bridgeInterface": "br7"}))
    ((keeps_off, text, mend),) = bridge.list_faults()
    assert keeps_off and text.startswith(f"{more}: the line `deny all`") and mend.endswith(f" {more}")
    more.write_text(f"include {conf}\n")  # in a circle
    assert set(nocloud.helper_rules(str(conf))) == {("allow", "br7")} and not [*bridge.list_faults()]
    more.unlink()
    assert set(nocloud.helper_rules(str(conf))) == {("allow", "br7")}
    conf.unlink()
    assert [text for _, text, _ in bridge.list_faults()] == [f"there is no {conf}"]


@pytest.mark.parametrize(
    ("name", "defines"),
    [
        ("private.nft", {"out": "out", "guests": "nocloud"}),
        ("bridge.nft", {"guests": '"br-7.x"', "closed": '"/"', "subnet": "192.168.1.0/24"}),
        ("guests.nft", {"gateway": "192.168.1.1", "mac": "02:6e:63:a8:01:01"}),
    ],
)
def test_nft_accepts_the_rules(name: str, defines: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the file is missing, no network is left without rules."""
    rules = nocloud.nft_rules(name, **defines)
    argv = ["unshare", "-Urn", "nft", "--check", "--file", "-"]
    done = subprocess.run(argv, input=rules, capture_output=True, check=False)
    if b"unshare" in done.stderr:
        pytest.skip("no user namespaces here")
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
    monkeypatch.setattr(nocloud, "packaged", lambda *words: "")
    with pytest.raises(nocloud.Error, match=rf"etc/{name} is missing"):
        nocloud.nft_rules(name, **defines)
