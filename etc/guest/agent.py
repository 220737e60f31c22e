"""Waits in a guest that is frozen, and tells each clone that wakes up who it is.

Started by root in a template's guest, with the name of its network card, its token and how long it may take to come to
rest. The host speaks to it on the second serial port, a line of JSON each time. No process is started here, and nothing
is imported once it waits: in a clone that has just woken up everything takes its time.
"""

import base64
import contextlib
import fcntl
import glob
import json
import os
import pwd
import signal
import socket
import struct
import sys
import termios
import time
import tty

RNDRESEEDCRNG = 0x5207  # linux/random.h: cloud kernels have no driver for vmgenid, which would have done it
SIOCGIFADDR, SIOCSIFHWADDR = 0x8915, 0x8924  # netdevice(7)
CARD, TOKEN, SECONDS = sys.argv[1], sys.argv[2], int(sys.argv[3])
# The template's own: its host keys and leases.
PATTERNS = "/etc/ssh/ssh_host_*", "/var/lib/dhcp/*.lease*", "/var/lib/NetworkManager/*.lease"
JOURNALS = "/run/log/journal/", "/var/log/journal/"
CHANNEL = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def hear(line):
    """The next message that has the token; the host speaks first."""
    while True:
        data = b""
        while not data.endswith(b"\n"):
            data += os.read(line, 4096)
        try:
            message = json.loads(data)
            if message["token"] == TOKEN:
                return message
        except (ValueError, LookupError, TypeError):
            pass


def has_address():
    try:
        fcntl.ioctl(CHANNEL, SIOCGIFADDR, struct.pack("16s16x", CARD.encode()))
        return True
    except OSError:
        return False


def has_sessions():
    """Whether anybody is logged in, or has been just now, as far as systemd knows (cgroups(7), version 2)."""
    try:
        with open("/sys/fs/cgroup/user.slice/cgroup.events") as file:
            return "populated 1" in file.read()
    except OSError:
        return False


def come_to_rest():
    """Return what processes() does."""
    deadline = time.monotonic() + SECONDS
    while (has_address() or has_sessions()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = processes()
    for pattern in PATTERNS:
        glob.glob(pattern)  # compiles them
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
    return found


def processes():
    """Those that keep what a clone has of its own: sshds that keep their host keys, and the journal's. Up to OpenSSH
    9.7 each connection's process is another sshd (sshd.c, "rexec"), which reads the keys itself."""
    servers, journals = [], []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        place = "/proc/" + pid
        name = read(place + "/comm").strip()
        if name == "systemd-journal":
            journals.append(int(pid))
        elif name == "sshd" and "\nPPid:\t1\n" in read(place + "/status"):
            servers += [] if "rexec cleanup in" in read(place + "/exe") else [int(pid)]
    return servers, journals


def become(message, servers):
    time.clock_settime(time.CLOCK_REALTIME, message["time"])
    with open("/dev/urandom", "wb", buffering=0) as pool:
        pool.write(base64.b64decode(message["random"]))
        try:
            fcntl.ioctl(pool, RNDRESEEDCRNG)
        except OSError:
            pass  # before Linux 4.14; what was written counts all the same
    old = {"name": socket.gethostname(), "id": read("/etc/machine-id").strip()}
    write("/etc/machine-id", message["id"] + "\n", 0o444, "root")
    for pattern in PATTERNS:
        for path in glob.glob(pattern):
            os.unlink(path)
    for kind, path, mode, owner, content in message["files"]:
        if kind != "f~" or old["name"] in read(path):  # that is written only where there is none, or ours
            write(path, content, int(mode, 8), owner)
    for pid in servers:
        os.kill(pid, signal.SIGHUP)
    if os.path.exists("/var/lib/systemd/random-seed"):
        write("/var/lib/systemd/random-seed", base64.b64encode(os.urandom(512)).decode(), 0o600, "root")
    for place in JOURNALS:
        if os.path.isdir(place + old["id"]):
            os.rename(place + old["id"], place + message["id"])
            os.symlink(message["id"], place + old["id"])  # for the process that goes on with the old name
    address = bytes.fromhex(message["mac"].replace(":", ""))
    fcntl.ioctl(CHANNEL, SIOCSIFHWADDR, struct.pack("16sH6s8x", CARD.encode(), 1, address))
    socket.sethostname(message["name"])
    os.sync()  # before it counts


def tell_others(journals):
    """What can wait until the network is up and somebody has logged in: all that starts processes."""
    for path in glob.glob("/sys/block/vda/uevent") + glob.glob("/sys/block/vda/vda*/uevent"):
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write("change")  # its serial is another: udev looks again
    for pid in journals:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM)  # it has the old machine-id; systemd starts it anew
    for path in filter(os.path.islink, glob.glob(JOURNALS[0] + "*") + glob.glob(JOURNALS[1] + "*")):
        os.unlink(path)


def read(path):
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def write(path, content, mode, owner):
    user = pwd.getpwnam(owner)
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        os.fchmod(file.fileno(), mode)
        os.fchown(file.fileno(), user.pw_uid, user.pw_gid)
        file.write(content)


def main():
    line = os.open("/dev/ttyS1", os.O_RDWR | os.O_NOCTTY)
    os.fchmod(line, 0o600)
    fcntl.ioctl(line, termios.TIOCEXCL)
    tty.setraw(line)
    speeds = termios.tcgetattr(line)
    speeds[4] = speeds[5] = termios.B115200  # at 9600 its interrupts would come so much later
    termios.tcsetattr(line, termios.TCSANOW, speeds)
    pwd.getpwnam("root")  # loads what answers that
    os.unlink(__file__)  # that is waited for
    hear(line)
    servers, journals = come_to_rest()
    os.write(line, b"at rest\n")
    message = hear(line)
    try:
        become(message, servers)
        os.write(line, b"done\n")
    except Exception as error:
        os.write(line, repr(error).encode()[:500] + b"\n")
    os.close(line)
    time.sleep(5)
    tell_others(journals)


main()
