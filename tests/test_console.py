"""vmconsole and vmmanage: screens, the serial console and qemu's monitor, through a real pseudo-terminal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import READY, Cloud, Terminal, add_blank, eventually, kill_hard, link_programs

UP, TAB, CTRL_C, CTRL_D, LEAVE = "\x1b[A", "\t", "\x03", "\x04", "\x1d"


@pytest.fixture(scope="module")
def web(shared: Cloud) -> Cloud:
    """pf/web/web00, a tiny guest that is ready; it has no screen."""
    shared.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", "name=web", "-w", READY).ok()
    return shared


@pytest.fixture
def still(blank: Cloud) -> Cloud:
    """pf/default/b00, whose guest says nothing."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=b").ok()
    return blank


# The serial console ##################################################################################


def test_serial_console_in_a_terminal(web: Cloud) -> None:
    with Terminal(web, "vmconsole", "-n", "web00", "-s") as terminal:
        assert "Ctrl-]" in terminal.see("leaves\r\n")
        terminal.raw()
        terminal.type("\r")
        terminal.see("web00:/# ")
        terminal.type("echo a$((40 + 2))b; stty -a | grep -c icanon\r")
        terminal.see("a42b\r\n")
        terminal.see("web00:/# ")
        terminal.type("half a line")
        terminal.see("half a line")
        terminal.type(CTRL_C)  # is the guest's: its shell drops the line
        terminal.see("web00:/# ")
        terminal.type("echo again$((1+1))\r")
        terminal.see("again2")
        terminal.type(LEAVE)
        terminal.ends(0)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=str
)
def test_serial_console_gives_the_terminal_back(web: Cloud, number: int, status: int) -> None:
    with Terminal(web, "vmconsole", "-n", "web00", "-s") as terminal:
        terminal.see("leaves")
        terminal.raw()
        terminal.process.send_signal(number)
        terminal.ends(status)


def test_serial_console_when_nobody_reads_the_terminal(web: Cloud) -> None:
    """The terminal is full and the command can't write on: it ends at the signal all the same."""
    with Terminal(web, "vmconsole", "-n", "web00", "-s") as terminal:
        terminal.see("leaves")
        terminal.raw()
        terminal.type("\rhead -c 100000 /dev/zero | tr '\\0' x; echo\r")
        time.sleep(1)  # nothing tells from outside that the terminal is full
        terminal.process.send_signal(signal.SIGTERM)
        terminal.process.wait(10)
        assert terminal.restored()
    web.run("vmconsole", "-n", "web00", "-s", input="\n").ok()


def test_one_serial_console_at_a_time(web: Cloud) -> None:
    with Terminal(web, "vmconsole", "-n", "web00", "-s") as terminal:
        terminal.raw()
        web.run("vmconsole", "-sn", "web00").fails(1, "web00", "open elsewhere")
        terminal.type("\recho still$((1+1))\r")
        terminal.see("still2")
        terminal.type(LEAVE)
        terminal.ends(0)
    with Terminal(web, "vmconsole", "-n", "web00", "-s") as terminal:
        terminal.see("leaves")
        terminal.raw()
        terminal.type(LEAVE)
        terminal.ends(0)


@pytest.mark.parametrize("end", ["", LEAVE + "not sent"], ids=["end of file", "Ctrl-]"])
def test_serial_console_in_a_pipe(web: Cloud, end: str) -> None:
    done = web.run("vmconsole", "-s", "-n", "web00", input="echo p$((40+2))p\n" + end).ok()
    assert "p42p" in done.stdout
    assert "not sent" not in done.stdout
    assert done.stderr == ""


def test_much_input_at_once(web: Cloud) -> None:
    """More than the UART takes at once, less than the 4 KB of a guest's tty: it comes whole, and all the answers."""
    lines = "".join(f"echo l$(({number}))l\n" for number in range(150))
    done = web.run("vmconsole", "-s", "-n", "web00", input="stty -echo\n" + lines + "stty echo\n").ok()
    assert re.findall(r"l(\d+)l\n", done.stdout) == [str(number) for number in range(150)]


def test_console_ends_with_the_guest(still: Cloud) -> None:
    with Terminal(still, "vmconsole", "-s", "-n", "b00") as terminal:
        terminal.see("leaves")
        terminal.raw()
        still.run("vmstop", "-n", "b00", "--kill").ok()
        terminal.see("b00 has ended")
        terminal.ends(0)


@pytest.mark.long
def test_console_without_a_display_is_the_serial_one(web: Cloud) -> None:
    done = web.run("vmconsole", "-n", "web00", input="echo s$((1+1))s\n").ok()
    assert "no display" in done.stderr
    assert "s2s" in done.stdout
    done = web.run("vmconsole", "-n", "web00", input="", env={"DISPLAY": ":9"}).ok()
    assert "without a screen" in done.stderr


@pytest.mark.parametrize("name", ["vmconsole", "vmmanage"])
def test_which_vm(web: Cloud, name: str) -> None:
    web.run(name).fails(2, "-n NAME")
    web.run(name, "-n", "web01").fails(1, "web01", "no such VM", "web00")
    web.run(name, "-n", "web00", "-g", "other").fails(1, "web00", "no such VM")
    web.run(name, "-n", "tiny").fails(1, "tiny", "not running")
    words = ["info", "status"] if name == "vmmanage" else ["-s"]
    for way in (["web00"], ["pf/web00"], ["pf/web/web00"], ["web00", "-g", "pf"], ["web00", "-g", "pf", "-t", "web"]):
        web.run(name, "-n", *way, *words).ok()


# Screens #############################################################################################

# A viewer that notes how it was called, connects, speaks enough of RFB to count as a client, and ends with the VM.
VIEWER = """#!{python}
import os, socket, sys
with open(os.environ["HOME"] + "/" + os.path.basename(sys.argv[0]), "w") as file:
    file.write(" ".join(sys.argv[1:]))
screen = socket.socket(socket.AF_UNIX)
screen.connect(sys.argv[-1].split("//", 1)[-1] if "//" in sys.argv[-1] else sys.argv[-1])
if sys.argv[-1].endswith("vnc.sock"):
    for answer in (b"", b"RFB 003.008\\n", b"\\1", b"\\1"):
        screen.sendall(answer)
        screen.recv(4096)
else:
    link = (0).to_bytes(4, "little") + bytes([1, 0]) + bytes(8) + (18).to_bytes(4, "little")
    screen.sendall(b"REDQ" + b"".join(n.to_bytes(4, "little") for n in (2, 2, len(link))) + link)
    assert screen.recv(4) == b"REDQ"
while screen.recv(4096):
    pass
"""


@pytest.fixture
def viewers(tmp_path: Path) -> dict[str, str]:
    """An environment with a display and no viewer; `put_viewer` adds some."""
    path = link_programs(tmp_path / "bin", "remote-viewer", "spicy", "vncviewer")
    return {"DISPLAY": ":9", "PATH": f"{tmp_path / 'viewers'}:{path}"}


def put_viewer(env: dict[str, str], name: str, script: str = VIEWER) -> None:
    folder = Path(env["PATH"].split(":", 1)[0])
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(script.replace("{python}", "/usr/bin/env -S python3 -IS"))
    (folder / name).chmod(0o755)


def without_spice(cloud: Cloud) -> dict[str, str]:
    """An environment whose qemu has no SPICE, as RHEL's."""
    path = cloud.home / "qemu"
    path.write_text(
        '#!/bin/sh\ncase " $* " in *" -spice "*) echo "-spice: spice support is disabled" >&2; exit 1;; esac\n'
        'exec qemu-system-x86_64 "$@"\n'
    )
    path.chmod(0o755)
    return {"NOCLOUD_vmQemu": str(path)}


@pytest.fixture(scope="session")
def spice() -> None:
    shown = subprocess.run(["qemu-system-x86_64", "-spice", "help"], capture_output=True, check=False).stdout
    if b"disable-ticketing" not in shown:
        pytest.skip("this qemu has no SPICE")


def make_gui(cloud: Cloud, env: dict[str, str] | None = None, options: str = "name=b;gui") -> str:
    """Make pf/default/b00 with a screen; what was said."""
    return cloud.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", options, env=env).ok().stderr


def network_sockets(pid: int) -> list[str]:
    """The TCP and UDP sockets of a process, as /proc/net names them; qemu has a network namespace of its own."""
    own = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [
        line
        for name in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
    ]
    return [line for line in rows if f"socket:[{line.split()[9]}]" in own]


@pytest.mark.long
@pytest.mark.parametrize("program", ["remote-viewer", "spicy"])
def test_spice_in_a_viewer(blank: Cloud, viewers: dict[str, str], spice: None, program: str) -> None:
    assert "no display" in make_gui(blank)
    blank.run("vmconsole", "-n", "b00", env=viewers).fails(127, "remote-viewer or spicy")
    put_viewer(viewers, program)
    blank.run("vmconsole", "-n", "b00", env=viewers).quiet()
    uri = f"spice+unix://{blank.folder('pf/default/b00')}/spice.sock"
    assert (blank.home / program).read_text().endswith(uri)
    assert not network_sockets(blank.qemu("pf/default/b00"))


def test_vnc_where_qemu_has_no_spice(blank: Cloud, viewers: dict[str, str]) -> None:
    make_gui(blank, without_spice(blank))
    folder = blank.folder("pf/default/b00")
    assert not (folder / "spice.sock").exists()
    put_viewer(viewers, "vncviewer")
    done = blank.run("vmconsole", "-n", "b00", env=viewers).quiet()
    assert done.seconds < 4  # it saw that the viewer had connected
    assert (blank.home / "vncviewer").read_text() == f"{folder}/vnc.sock"
    assert not network_sockets(blank.qemu("pf/default/b00"))


def test_gui_opens_a_window(blank: Cloud, viewers: dict[str, str]) -> None:
    put_viewer(viewers, "vncviewer")
    assert make_gui(blank, viewers | without_spice(blank)) == ""
    assert (blank.home / "vncviewer").exists()
    blank.run("vmstop", "-n", "b00", "--kill").ok()
    assert not (blank.folder("pf/default/b00") / "vnc.sock").exists()


@pytest.mark.long
def test_vmrun_opens_windows(blank: Cloud, viewers: dict[str, str]) -> None:
    """Once: who is there already is not joined by another viewer."""
    env = viewers | without_spice(blank) | {"NOCLOUD_vmWaitTimeout": "1"}
    put_viewer(env, "vncviewer")
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=b").ok()
    blank.run("vmstop", "-g", "pf", "--kill").ok()
    assert blank.run("vmrun", "-r", "pf", "-g", "--background", env=env).status == 124
    told = blank.home / "vncviewer"
    assert told.read_text().endswith("/b00/vnc.sock")
    (manager,) = (pid for pid, words in blank.processes().items() if "-r pf" in words)
    kill_hard(manager)
    told.unlink()
    assert blank.run("vmrun", "-r", "pf", "--background", env=env).status == 124
    assert not told.exists()
    blank.run("vmstop", "-d", "-g", "pf").ok()


def test_a_viewer_that_fails(blank: Cloud, viewers: dict[str, str]) -> None:
    fake = "#!/bin/sh\necho 'cannot open display: :9' >&2\nexit 1\n"
    for name in ("remote-viewer", "vncviewer"):
        put_viewer(viewers, name, fake)
    assert "warning: b00: " in make_gui(blank, viewers)  # it runs all the same
    blank.run("vmconsole", "-n", "b00", env=viewers).fails(1, "b00", "cannot open display", "vmconsole -s")


def test_a_long_or_odd_path(cloud: Cloud, viewers: dict[str, str], tmp_path: Path, vms: None) -> None:
    base = tmp_path / "home" / ("a long, odd path" * 8)
    put_viewer(viewers, "vncviewer")
    with Cloud(tmp_path / "home2", base) as other:
        add_blank(other)
        make_gui(other, without_spice(other))
        other.run("vmconsole", "-n", "b00", env=viewers).quiet()
        assert (other.home / "vncviewer").read_text().startswith("/proc/self/fd/")


def test_a_screen_changes_nothing_else(blank: Cloud) -> None:
    """The same devices at the same places, the sandbox on, and files for the owner alone."""
    make_gui(blank)
    make_gui(blank, options="name=c")
    words = [blank.folder(f"pf/default/{name}") / f"{name}.command" for name in ("b00", "c00")]
    addresses = [re.findall(r"'?(\S+?),\S*?addr=(0x[0-9a-f]+)", path.read_text()) for path in words]
    assert set(addresses[0]) - set(addresses[1]) == {("qemu-xhci", "0x1c")}
    assert set(addresses[1]) <= set(addresses[0])
    status = Path(f"/proc/{blank.qemu('pf/default/b00')}/status").read_text()
    assert re.search(r"^Seccomp:\s+2$", status, re.M)
    for path in blank.folder("pf/default/b00").glob("*.sock"):
        assert path.stat().st_mode & 0o077 == 0


# The monitor #########################################################################################


def test_monitor_words(web: Cloud) -> None:
    assert "web00_0.img" in web.run("vmmanage", "-n", "web00", "info", "block").ok().stdout
    assert web.run("vmmanage", "-n", "web00", "info status").ok().stdout == "VM status: running\n"
    web.run("vmmanage", "-n", "web00", b"info \xe9".decode(errors="surrogateescape")).fails(1, "JSON")
    web.run("vmmanage", "-n", "web00", "--", "cont").quiet()
    for words in (["frobnicate"], ["info", "nonsense"], ["device_del", "nothing"], ["screendump"]):
        web.run("vmmanage", "-n", "web00", *words).fails(1, "web00: ")


def test_monitor_in_a_pipe(web: Cloud) -> None:
    done = web.run("vmmanage", "-n", "web00", input="info status\n\ninfo name\n").ok()
    assert done.stdout == "VM status: running\nweb00\n"
    done = web.run("vmmanage", "-n", "web00", input="frobnicate\ninfo status")
    assert (done.status, done.stdout) == (1, "VM status: running\n")
    assert "frobnicate" in done.stderr


def test_monitor_in_a_terminal(web: Cloud) -> None:
    with Terminal(web, "vmmanage", "-n", "web00") as terminal:
        assert "Ctrl-D" in terminal.see("(qemu) ")
        terminal.type("info statuX\x7fs\r")
        terminal.see("VM status: running\r\n")
        terminal.see("(qemu) ")
        terminal.type("half a line")
        terminal.see("half a line")
        terminal.type(CTRL_C)
        terminal.see("(qemu) ")
        terminal.type(UP + "\r")
        terminal.see("VM status: running\r\n")
        terminal.type("info chard" + TAB + "\r")
        terminal.see("serial0: filename=")
        terminal.type("frobnicate\r")
        terminal.see("unknown command: 'frobnicate'")
        terminal.see("(qemu) ")
        terminal.type(CTRL_D)
        terminal.ends(0)
    with Terminal(web, "vmmanage", "-n", "web00") as terminal:  # the history is kept
        terminal.see("(qemu) ")
        terminal.type(UP + UP + "\r")
        terminal.see("serial0: filename=")
        terminal.see("(qemu) ")
        terminal.type("quit")
        terminal.see("quit")
        terminal.type(CTRL_D)
        terminal.ends(0)
    with Terminal(web, "vmmanage", "-n", "web00") as terminal:  # half a line isn't
        terminal.see("(qemu) ")
        terminal.type("\r")
        terminal.see("(qemu) ")
        terminal.type(LEAVE)
        terminal.ends(0)


def test_one_terminal_at_the_monitor_at_a_time(web: Cloud) -> None:
    with Terminal(web, "vmmanage", "-n", "web00") as terminal:
        terminal.see("(qemu) ")
        with Terminal(web, "vmmanage", "-n", "web00") as other:
            other.see("its monitor is open elsewhere already")
            other.ends(1)
        assert web.run("vmmanage", "-n", "web00", "info", "name").ok().stdout == "web00\n"
        assert web.run("vmmanage", "-n", "web00", input="info name\n").ok().stdout == "web00\n"
        terminal.type(CTRL_D)
        terminal.ends(0)


def test_monitor_of_a_qemu_without_a_line_for_it(still: Cloud) -> None:
    """One that runs since before there was one: a command a line, as in a pipe."""
    (still.folder("pf/default/b00") / "monitor.sock").unlink()
    with Terminal(still, "vmmanage", "-n", "b00") as terminal:
        assert "Ctrl-D" in terminal.see("switches b00 off\r\n")
        terminal.type("info name\n")
        terminal.see("b00\r\n")
        terminal.type("frobnicate\n")
        terminal.see("unknown command: 'frobnicate'")
        terminal.type(CTRL_D)
        terminal.ends(0)


def test_monitor_gives_the_terminal_back(web: Cloud) -> None:
    with Terminal(web, "vmmanage", "-n", "web00") as terminal:
        terminal.see("(qemu) ")
        terminal.type("half a line")
        terminal.see("half a line")
        assert not terminal.restored()
        terminal.process.send_signal(signal.SIGTERM)
        terminal.ends(143)


def test_who_sits_at_the_monitor_blocks_nobody(still: Cloud) -> None:
    with Terminal(still, "vmmanage", "-n", "b00") as terminal:
        terminal.see("(qemu) ")
        terminal.type("info name\r")
        terminal.see("b00")
        assert still.run("vmstop", "-n", "b00", "--kill").ok().seconds < 3
        terminal.type("info name\r")
        terminal.see("b00 has ended")
        terminal.ends(0)


def test_quit_switches_off(still: Cloud) -> None:
    still.run("vmmanage", "-n", "b00", "quit").quiet()
    eventually(lambda: still.run("vmrunning", "-g", "pf").stdout == "", "b00 has stopped", 10)
