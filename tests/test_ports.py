"""Ports of the host that lead to VMs: published while the VM runs, by one process a network, on loopback."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import NOBODY, PROGRAM, READY, Cloud, eventually, is_alive, kill_hard, open_ports, processes_with

import nocloud

REFUSED = (ConnectionRefusedError, ConnectionResetError)


def free() -> int:
    """A port that nobody has now, of those that no outgoing connection gets."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with socket.socket() as one:
            try:
                one.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def forwarders(cloud: Cloud) -> list[int]:
    return [pid for pid, words in cloud.processes().items() if " forward " in words]


def listening(cloud: Cloud) -> set[str]:
    """IP:PORT of what this cloud's processes listen at outside of its network."""
    found = set()
    for each in open_ports(cloud):
        address, _, port = each.split()[1].partition(":")
        words = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
        text = socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words)
        found.add(f"{text}:{int(port, 16)}")
    return found


def ask(port: int, data: bytes = b"x") -> bytes:
    """What comes back until the other side ends, after we have ended ours."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def refuses(port: int) -> bool:
    try:
        ask(port)
    except REFUSED:
        return True
    return False


def get(port: int, path: str = "/") -> bytes:
    return ask(port, f"GET {path} HTTP/1.0\r\n\r\n".encode()).partition(b"\r\n\r\n")[2]


# The forwarder alone #################################################################################

# A server inside the network, in a VM's stead. What is asked for ends the input: `echo` gives it back, then the length;
# `big N` sends N bytes; `early` ends its side at once, and its answer is to be had at the other port.
SERVER = """
import hashlib, socket, socketserver, sys

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        verb = self.rfile.readline().split()
        if verb[0] == b"echo":
            data = self.rfile.read()
            self.wfile.write(data + b" %d" % len(data))
        elif verb[0] == b"sum":
            self.wfile.write(hashlib.sha256(self.rfile.read()).hexdigest().encode())
        elif verb[0] == b"big":
            for _ in range(int(verb[1])):
                self.wfile.write(bytes(range(256)) * 4096)
        elif verb[0] == b"hold":
            self.wfile.write(b"held")
            self.rfile.read()

class Server(socketserver.ThreadingTCPServer):
    request_queue_size, daemon_threads, allow_reuse_address = 4096, True, True

server = Server(("0.0.0.0", int(sys.argv[1])), Handler)
print("up", flush=True)
server.serve_forever()
"""
SERVE = """
import socket
cloud = nocloud.Cloud(nocloud.load_config())
place, port, pid, address = sys.argv[1:]
with socket.create_server(("127.0.0.1", int(place.split(":")[1])), backlog=4096) as listener:
    print(*cloud.forwarders["private"].ask(f"serve {place} {port} {pid} {address}", listener.fileno()))
"""


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory, vms: None) -> Iterator[tuple[Cloud, int, subprocess.Popen[str]]]:
    """A network with a server in it that has a port of the host, as a VM would; the port, the server."""
    with Cloud(tmp_path_factory.mktemp("inside") / "home") as cloud:
        cloud.run("net", "up").ok()
        server = cloud.spawn("net", "exec", sys.executable, "-c", SERVER, 80)
        assert server.stdout and server.stdout.readline() == "up\n"
        port = free()
        serve(cloud, port, 80, server.pid)
        yield cloud, port, server
        server.kill()
        eventually(lambda: not forwarders(cloud), "the forwarder ends with the last that it served")
        assert not list((cloud.base / ".net").glob("ports*"))


def serve(cloud: Cloud, port: int, guest: int, pid: int) -> None:
    gateway = re.findall(r"\bnocloud +inet ([0-9.]+)", cloud.run("net", "exec", "ip", "-o", "-4", "addr").ok().stdout)
    done = cloud.script(SERVE, f"127.0.0.1:{port}", guest, pid, gateway[0]).ok()
    assert f"127.0.0.1:{port}" in done.stdout.split()


def test_a_half_closed_connection_gets_its_answer(inside: tuple[Cloud, int, subprocess.Popen[str]]) -> None:
    _, port, _ = inside
    assert ask(port, b"echo\nhello") == b"hello 5"
    data = os.urandom(8 << 20)
    assert ask(port, b"sum\n" + data) == hashlib.sha256(data).hexdigest().encode()
    assert ask(port, b"big 8\n") == bytes(range(256)) * 4096 * 8


def test_a_thousand_connections_at_once(inside: tuple[Cloud, int, subprocess.Popen[str]]) -> None:
    cloud, port, _ = inside
    connections = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(1000)]
    try:
        for each in connections:
            each.sendall(b"hold\n")
        assert all(each.recv(4) == b"held" for each in connections)
        assert ask(port, b"echo\n") == b" 0"
        assert forwarders(cloud)
    finally:
        for each in connections:
            each.close()
    [pid] = forwarders(cloud)
    eventually(lambda: len(os.listdir(f"/proc/{pid}/fd")) < 40, "it has closed them, too")


def test_a_slow_reader_keeps_nobody_waiting(inside: tuple[Cloud, int, subprocess.Popen[str]]) -> None:
    cloud, port, _ = inside
    [pid] = forwarders(cloud)
    with socket.create_connection(("127.0.0.1", port), 30) as slow:
        slow.sendall(b"big 100\n")
        assert slow.recv(1) == b"\0"
        assert ask(port, b"echo\nhello") == b"hello 5"
        status = Path(f"/proc/{pid}/status").read_text()
        assert int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) < 90 * 1024, "what isn't read is not kept here"
        slow.shutdown(socket.SHUT_WR)
        left = 100 * (1 << 20) - 1
        while left:
            piece = slow.recv(min(1 << 20, left))
            assert piece
            left -= len(piece)
        assert slow.recv(1) == b""


def test_where_nobody_listens_it_is_reset_at_once(inside: tuple[Cloud, int, subprocess.Popen[str]]) -> None:
    cloud, port, server = inside
    other = free()
    serve(cloud, other, 81, server.pid)
    assert refuses(other)
    assert ask(port, b"echo\nhello") == b"hello 5"


def test_it_costs_nothing_while_nothing_happens(inside: tuple[Cloud, int, subprocess.Popen[str]]) -> None:
    cloud, port, _ = inside
    [pid] = forwarders(cloud)
    switches = re.compile(r"^voluntary_ctxt_switches:\s+(\d+)", re.M)

    def woken() -> int:
        return int(switches.findall(Path(f"/proc/{pid}/status").read_text())[0])

    with socket.create_connection(("127.0.0.1", port), 30) as quiet:
        quiet.sendall(b"hold\n")
        assert quiet.recv(4) == b"held"
        before = woken()
        assert not threading.Event().wait(1.0) and woken() <= before + 1


def test_it_ends_with_the_process_that_it_is_for(inside: tuple[Cloud, int, subprocess.Popen[str]]) -> None:
    """Its listener is gone, and what came by it is reset; the others' stay."""
    cloud, port, _ = inside
    stand_in = subprocess.Popen(["sleep", "60"], env=cloud.env)
    other = free()
    serve(cloud, other, 80, stand_in.pid)
    with socket.create_connection(("127.0.0.1", other), 30) as held:
        held.sendall(b"hold\n")
        assert held.recv(4) == b"held"
        stand_in.kill()
        stand_in.wait()
        with pytest.raises(ConnectionResetError):
            held.recv(1)
    eventually(lambda: refuses(other), "its listener is closed")
    with pytest.raises(AssertionError):
        serve(cloud, other, 80, stand_in.pid)
    assert refuses(other), "who has ended by now isn't served"
    assert ask(port, b"echo\nhello") == b"hello 5"


# What a port may be ##################################################################################


def test_numbers_count_up() -> None:
    assert nocloud.numbered_ports("8080:80,0:22,0.0.0.0:1:443", 2) == "127.0.0.1:8082:80,127.0.0.1:0:22,0.0.0.0:3:443"
    assert nocloud.parse_ports("") == [] and nocloud.numbered_ports("", 7) == ""
    with pytest.raises(nocloud.UsageError, match="65536"):
        nocloud.numbered_ports("65000:80", 536)


def test_what_two_lines_ask_for_is_told_before_anything_is_made(blank: Cloud) -> None:
    port = free()
    file = blank.home / "pf"
    file.write_text(f"blank:2:web:port={port}:80\n\nblank:1:sql:port=0.0.0.0:{port + 1}:80\n")
    where = f"{file}:3: port={port + 1}: {file}:1 asks for port {port + 1} of 0.0.0.0 too"
    blank.run("vminstantiate", "-f", file).says(2, where)
    assert not (blank.base / "pf").exists()


def test_a_port_that_is_taken_is_told_before_anything_is_made(blank: Cloud) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        words = ("-n", "blank", "-g", "pf", "-o", f"name=web;port=0.0.0.0:{port}:80")
        done = blank.run("vminstantiate", *words)
    name = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
    who = f"{name} (process {os.getpid()}) has it"
    done.says(1, f"port {port} of 0.0.0.0 can't be published: {who}", "publish another one")
    assert not (blank.base / "pf").exists()


def test_a_port_below_1024_names_the_sysctl(blank: Cloud) -> None:
    argv = blank.argv("vminstantiate", "-n", "blank", "-o", "port=80:80", "--dry-run")
    deny = "echo 1024 >/proc/sys/net/ipv4/ip_unprivileged_port_start && exec setpriv --bounding-set=-net_bind_service "
    argv = ["unshare", "-Urn", "sh", "-c", deny + '--inh-caps=-net_bind_service "$@"', "sh", *argv]
    done = blank.execute(argv)
    hint = "sudo sysctl -w net.ipv4.ip_unprivileged_port_start=80"
    done.says(1, "port 80 of 127.0.0.1 can't be published: Permission denied", hint)
    blank.run("vminstantiate", "-n", "blank", "-o", "port=192.0.2.1:8080:80", "--dry-run").says(
        1, "port 8080 of 192.0.2.1 can't be published: Cannot assign requested address"
    )


# VMs #################################################################################################


def test_a_ports_life(blank: Cloud) -> None:
    """It is there while the VM runs, whoever starts it, on loopback; HOST 0 is chosen once, and kept."""
    first = free()
    assert listening(blank) == set()
    blank.run("vminstantiate", "-n", "blank", "-C", 2, "-g", "pf", "-o", f"name=web;port={first}:80,0:22").ok()
    confs = [blank.conf(f"pf/default/web0{n}")["vmPorts"] for n in range(2)]
    found = [re.fullmatch(rf"127\.0\.0\.1:{first + n}:80,127\.0\.0\.1:(\d+):22", confs[n]) for n in range(2)]
    chosen = [int(each[1]) for each in found if each]
    assert len(set(chosen)) == 2 and all(20000 <= each < 32768 for each in chosen)
    both = [{f"127.0.0.1:{first + n}", f"127.0.0.1:{chosen[n]}"} for n in range(2)]
    assert listening(blank) == both[0] | both[1]
    shown = blank.run("vmport", "-L").ok().lines
    rows = [f"web0{n} pf/default 127.0.0.1:{p} {g}" for n in range(2) for p, g in ((first + n, 80), (chosen[n], 22))]
    assert shown == rows
    assert blank.run("vmport", "-L", "-n", "web01").ok().lines == rows[2:]
    [pid] = forwarders(blank)  # one for all of them

    blank.run("vminstantiate", "-n", "blank", "-o", f"port={first}:80").says(
        1, f"port {first} of 127.0.0.1 can't be published: pf/default/web00 has it", "publish another one"
    )
    blank.run("vmstop", "-n", "web00", "--kill").ok()
    assert listening(blank) == both[1] and forwarders(blank) == [pid]
    blank.start("web00").ok()  # at once
    assert listening(blank) == both[0] | both[1]
    assert blank.conf("pf/default/web00")["vmPorts"] == confs[0]

    kill_hard(pid)
    assert listening(blank) == set()
    blank.run("vmrunning").ok()
    assert listening(blank) == both[0] | both[1] and forwarders(blank) != [pid]

    more = free()
    blank.run("vmport", "-n", "web00", f"{more}:81").ok()
    assert f"127.0.0.1:{more}" in listening(blank)
    blank.run("vmport", "-n", "web00", f"{more}:81").quiet()  # twice is nothing
    blank.run("vmport", "-n", "web00", f"{more}:81", "--delete").quiet()
    assert listening(blank) == both[0] | both[1]
    assert blank.conf("pf/default/web00")["vmPorts"] == confs[0]

    [pid] = forwarders(blank)
    blank.run("vmstop", "-d", "-g", "pf").quiet()
    eventually(lambda: not is_alive(pid), "the forwarder ends with the last VM")
    assert listening(blank) == set() and not list((blank.base / ".net").glob("ports*"))


def test_who_is_off_closes_no_port_of_others(blank: Cloud) -> None:
    port = free()
    for group in ("a", "b"):
        blank.run("vminstantiate", "-n", "blank", "-g", group, "-o", f"name={group};port={port}:80").ok()
        if group == "a":
            blank.run("vmstop", "-g", group, "--kill").ok()
    assert listening(blank) == {f"127.0.0.1:{port}"}
    blank.run("vmport", "-n", "a00", f"{port}:80", "--delete").quiet()
    assert not blank.conf("a/default/a00")["vmPorts"] and listening(blank) == {f"127.0.0.1:{port}"}
    blank.run("vmport", "-n", "b00", f"{port}:80", "--delete").quiet()
    assert listening(blank) == set()


def test_a_supervisor_tells_its_ports_and_mends_them(blank: Cloud) -> None:
    port = free()
    (blank.home / "pf").write_text(f"blank:1:web:name=web;port=0.0.0.0:{port}:80\n")
    child = blank.spawn("vmrun", "-f", blank.home / "pf")
    assert child.stdout
    line = next(line for line in child.stdout if "has port" in line)
    assert re.match(rf"\S+ \S+ web00 has port 0\.0\.0\.0:{port} for its port 80\n", line)
    [pid] = forwarders(blank)
    kill_hard(pid)
    eventually(lambda: listening(blank) == {f"0.0.0.0:{port}"}, "the forwarder is back", 15)
    child.terminate()
    assert child.communicate(timeout=60) and child.returncode == 0
    eventually(lambda: not blank.processes(), "nothing is left")


def test_ports_that_are_not_forwarded_are_told_and_mended(blank: Cloud) -> None:
    """The VM runs all the same, and the next `vmport` about it does what could not be done."""
    blank.run("net", "up").ok()
    log = blank.base / ".net/ports-private/log"
    log.mkdir(parents=True)  # it can't be written to
    port = free()
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", f"name=web;port={port}:80").fails(1, "web00", str(log))
    assert listening(blank) == set()
    log.rmdir()
    assert blank.run("vmport", "-n", "web00", f"{port}:80").ok().stdout == ""
    assert listening(blank) == {f"127.0.0.1:{port}"}


PAGE = "mkdir -p /srv && echo hello >/srv/index.html && httpd -h /srv"


@pytest.mark.long
def test_a_page_of_a_guest(tiny: Cloud) -> None:
    """In and out by name and port: what a browser on the host would see."""
    port = free()
    tiny.run("vminstantiate", "-n", "tiny", "-g", "shop", "-o", f"name=web;port={port}:80", "-w", READY).ok()
    assert refuses(port)  # nobody listens there yet
    tiny.ssh("web00", PAGE).ok()
    assert get(port) == b"hello\n"


GREEN = "<title>A page of web00</title><body bgcolor=#00ff00><h1>hello, browser</h1>"


def browse(folder: Path, url: str, *words: str) -> str:
    """The document that a Chromium without a display has of a page, once it has shown it; it is green."""
    picture, quiet = folder / "page.png", "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"  # it asks no DNS for servers of its own
    argv = ["chromium-headless-shell", "--no-sandbox", f"--user-data-dir={folder}", f"--host-resolver-rules={quiet}"]
    argv += [
        "--disable-background-networking",
        "--window-size=320,200",
        f"--screenshot={picture}",
        "--dump-dom",
        *words,
    ]
    done = subprocess.run([*argv, url], stdout=subprocess.PIPE, timeout=180, check=True, text=True)
    data = picture.read_bytes()
    start = data.index(b"IDAT") + 4
    pixels = zlib.decompressobj().decompress(data[start:], 4)
    assert pixels[1:4] == b"\0\xff\0", "the first pixel, after its line's filter"
    return done.stdout


@pytest.mark.long
def test_a_browser_opens_a_page_by_port_and_by_name(tiny: Cloud, tmp_path: Path) -> None:
    if not shutil.which("chromium-headless-shell"):
        pytest.skip("needs chromium-headless-shell, which make test-all installs")
    port, socks = free(), 0
    tiny.run("vminstantiate", "-n", "tiny", "-g", "shop", "-o", f"name=web;port={port}:80", "-w", READY).ok()
    tiny.ssh("web00", f"mkdir -p /srv && echo '{GREEN}' >/srv/index.html && httpd -h /srv").ok()
    document = browse(tmp_path, f"http://127.0.0.1:{port}/")
    assert "<title>A page of web00</title>" in document and "<h1>hello, browser</h1>" in document

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        socks = one.getsockname()[1]
    tunnel = tiny.spawn("vmssh", "web00", "-N", "-D", socks)
    eventually(lambda: f"127.0.0.1:{socks}" in listening(tiny), "ssh listens", 60)
    proxy = f"--proxy-server=socks5://127.0.0.1:{socks}"
    for name in ("web00", "web00.shop.nocloud"):
        assert "<h1>hello, browser</h1>" in browse(tmp_path, f"http://{name}/", proxy)
    tiny.run("vmstop", "--kill", "-n", "web00").ok()
    assert tunnel.wait(60), "it ends with the VM"


@pytest.mark.long
def test_much_and_many_and_again(tiny: Cloud) -> None:
    port = free()
    tiny.run("vminstantiate", "-n", "tiny", "-g", "shop", "-o", f"name=web;port={port}:80", "-w", READY).ok()
    tiny.ssh("web00", f"{PAGE} && truncate -s 200M /srv/big").ok()
    url = f"http://127.0.0.1:{port}/"
    done = tiny.execute(["curl", "-sS", "-o", "/dev/null", "-w", "%{size_download}", url + "big"], timeout=300).ok()
    assert int(done.stdout) == 200 << 20
    connections = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(1000)]
    try:
        connections[0].sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert connections[0].recv(4) == b"HTTP"
    finally:
        for each in connections:
            each.close()
    tiny.run("vmstop", "-n", "web00").ok()
    with pytest.raises(ConnectionRefusedError):
        ask(port)
    tiny.start("web00").ok()
    tiny.ssh("web00", PAGE).ok()
    [pid] = forwarders(tiny)
    assert tiny.execute(["curl", "-sS", url]).ok().stdout == "hello\n"
    kill_hard(pid)
    tiny.run("vmrunning").ok()
    assert tiny.execute(["curl", "-sS", url]).ok().stdout == "hello\n"


@pytest.mark.long
def test_a_browsers_way_by_name_ends_with_the_vm(tiny: Cloud) -> None:
    """`vmssh VM -N -D PORT`: what asks it for web00.shop is answered; when the VM is switched off, so is ssh."""
    tiny.run("vminstantiate", "-n", "tiny", "-g", "shop", "-o", "name=web", "-w", READY).ok()
    tiny.ssh("web00", PAGE).ok()
    port = free()
    child = tiny.spawn("vmssh", "web00", "-N", "-D", port)
    curl = ["curl", "-sS", "--socks5-hostname", f"127.0.0.1:{port}", "http://web00.shop/"]
    eventually(lambda: tiny.execute(curl).stdout == "hello\n", "the page by its name")
    assert listening(tiny) <= {f"127.0.0.1:{port}", f"::1:{port}"}
    tiny.run("vmstop", "-n", "web00", "--kill").ok()
    assert child.wait(90) == 255


# A server at the VM's own address, in the place of a guest that isn't there.
ORDINARY = """
set -e
alias vms='python3 -IS ./nocloud.py'
qemu-img create -q -f qcow2 blank.qcow2 8M
vms template blank --image blank.qcow2 --mem 32 --cpu 1 --init none
trap 'vms stop -d -g pf' EXIT
vms instantiate -n blank -g pf -o name=web\\;port=$PORT:80
address=$(sed -n s/^vmAddress=//p vms/pf/default/web00/web00.conf)
vms net exec ip addr add $address/32 dev nocloud
code="import socket as s; l = s.create_server(('$address', 80)); print(flush=True); c = l.accept()[0]; c.recv(999)
c.send(b'hello')"
vms net exec python3 -c "$code" >up &
until [ -s up ]; do sleep 0.05; done
ss -Hltn
curl -sS --http0.9 http://127.0.0.1:$PORT/
"""


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="who isn't root is one already")
def test_an_ordinary_user_publishes(public_folder: Path, vms: None) -> None:
    port, uid = free(), NOBODY
    (public_folder / "nocloud.py").write_text(PROGRAM.read_text())
    os.chown(public_folder, uid, uid)
    tun = "mknod tun c 10 200 && chmod 666 tun && mount --bind tun /dev/net/tun && rm tun"
    user = f"setpriv --reuid {uid} --regid {uid} --clear-groups --inh-caps=-all"
    variables = {"HOME": public_folder, "PORT": port, "NOCLOUD_vmBaseDir": public_folder / "vms", "NOCLOUD_NOKVM": 1}
    env = [f"{key}={value}" for key, value in variables.items()]
    script = f'{tun} && exec {user} env -i PATH=/usr/bin:/usr/sbin NOCLOUD_vmNetwork=private "$@"'
    argv = ["unshare", "-m", "sh", "-c", script, "sh", *env, "bash", "-O", "expand_aliases", "-c", ORDINARY]
    done = subprocess.run(argv, cwd=public_folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.endswith("\nhello"), done
    assert f" 127.0.0.1:{port} " in done.stdout
    eventually(lambda: not processes_with(str(public_folder)), "nothing of it is left")
