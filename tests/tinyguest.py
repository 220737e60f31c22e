"""The tiny guest that nocloud's tests boot: from qemu's start to ssh in a few seconds, in 128 MB, without KVM.

Debian's cloud kernel with busybox and dropbear in an initramfs, started by syslinux from a FAT partition; what the guest
keeps (/etc, /root) lives on an ext4 partition after it. Made from packages by an ordinary user: no mount, no loop device.
The host needs apt, dpkg-deb, mke2fs, qemu-img, mtools and syslinux.

The one for arm64 is the same, started by the signed GRUB, which the firmware finds where removable disks have it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import lzma
import os
import pathlib
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

SECTOR = 512
FAT_START = 2048  # in sectors; 1 MiB, as every partitioning tool aligns
FAT_SECTORS = {"amd64": 24 * 2048, "arm64": 64 * 2048}
DATA_SECTORS = 64 * 2048
MBR = pathlib.Path("/usr/lib/SYSLINUX/mbr.bin")

# What they depend on comes along by itself; what isn't a module is built in.
BOOT_MODULES = [
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio-rng",
    "evdev",
    "button",
    "ext4",
    "dmi-sysfs",
    "virtiofs",
]
# Only loaded where a cloud-init seed is attached.
SEED_MODULES = ["vfat", "nls_ascii", "nls_cp437", "nls_utf8", "nls_iso8859-1", "isofs"]

# no_timer_check: on a busy host the kernel's test of the emulated timer fails now and then, and it panics.
# The kernel's self-tests of its ciphers cost as many instructions as the rest of the boot: half the time without KVM.
SYSLINUX_CFG = """\
DEFAULT tinyguest
PROMPT 0
TIMEOUT 0
NOESCAPE 1
LABEL tinyguest
  KERNEL vmlinuz
  INITRD initrd,variant
  APPEND console=ttyS0 no_timer_check mitigations=off panic=5 cryptomgr.notests initcall_blacklist=crypto_kdf108_init
"""

GRUB_CFG = """\
linux /vmlinuz console=ttyAMA0 mitigations=off panic=5 cryptomgr.notests initcall_blacklist=crypto_kdf108_init
initrd /initrd /variant
boot
"""

INIT = r"""#!/bin/sh
# PID 1: one pass from the bare kernel to ssh, then it waits for the signal to stop.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root

say() { echo "tinyguest: $*"; }

stop() { # poweroff|reboot|halt
    trap '' USR1 USR2 TERM INT
    say "$1"
    sleep 0.2 # the ssh session that asked for it still reports its exit status
    kill -TERM -1; sleep 0.2; kill -KILL -1 # -1: every process but this one
    cd /
    umount /etc /root; umount /data || mount -o remount,ro /data
    sync
    busybox "$1" -f
}

mount_all() {
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run
    mkdir -p /dev/pts /dev/disk/by-id; mount -t devpts devpts /dev/pts
    for m in $(cat /lib/modules/boot); do insmod "/lib/modules/$m.ko"; done
    mount -t ext4 -o noatime /dev/vda2 /data || return
    # /data/etc comes last and by rename: its presence says that the first boot got through this.
    [ -d /data/etc ] || { chown 0:0 /data; cp -a /root /etc /run/; cp -a /run/root /data/; cp -a /run/etc /data/new; sync; mv /data/new /data/etc; }
    mount -o bind /data/etc /etc; mount -o bind /data/root /root
}

disk_links() { # what udev would make
    for d in /sys/block/vd*; do
        [ -s "$d/serial" ] && ln -sf "/dev/${d##*/}" "/dev/disk/by-id/virtio-$(cat "$d/serial")"
    done
}

host_key() { # the OpenSSH one where it was planted, else dropbear's own, kept from the first boot on
    k=/etc/dropbear/dropbear_ed25519_host_key
    [ -s /etc/ssh/ssh_host_ed25519_key ] && { rm -f $k; dropbearconvert openssh dropbear /etc/ssh/ssh_host_ed25519_key $k; }
    [ -s $k ] || dropbearkey -t ed25519 -f $k
}

trap 'stop poweroff' USR2
trap 'stop reboot' TERM INT
trap 'stop halt' USR1

mount_all
. /etc/tinyguest.conf
ip link set lo up
network &
disk_links
case " $READS " in *" systemd "*) read_credentials;; esac
case " $READS " in *" cloud-init "*) read_seed;; *) rm /bin/cloud-init;; esac
[ -s /etc/hostname ] && hostname -F /etc/hostname
: > /run/named # network waits for this: the lease is asked for by name
host_key
[ -e /etc/fstab ] && mount -a
while :; do dropbear -F -E -s -r /etc/dropbear/dropbear_ed25519_host_key; sleep 1; done &
[ -e /bin/cloud-init ] && finish_seed &
acpid -f -l /dev/null &
say "ready after $(cut -d' ' -f1 /proc/uptime) s"
tty=/dev/ttyS0; [ -e /sys/class/tty/ttyAMA0 ] && tty=/dev/ttyAMA0
while :; do setsid -c sh -l < $tty > $tty 2>&1; sleep 1; done &
while :; do wait; sleep 1; done
"""

READ_CREDENTIALS = r"""#!/bin/sh
# What systemd does with the strings of SMBIOS type 11, once per instance (the machine's UUID).
id="smbios $(cat /sys/class/dmi/id/product_uuid)"
[ "$(cat /etc/credentials-id 2> /dev/null)" = "$id" ] && exit
umask 077
mkdir -p /run/credentials; cd /run/credentials || exit
for raw in /sys/firmware/dmi/entries/11-*/raw; do
    [ -e "$raw" ] && tail -c +6 "$raw" | tr '\0' '\n' # 5 bytes of header, then the strings
done | while read -r line; do
    name=${line%%=*}; value=${line#*=}
    case $name in
    io.systemd.credential.binary:*) echo "$value" | base64 -d > "${name#*:}";;
    io.systemd.credential:*) echo "$value" > "${name#*:}";;
    esac
done
[ -z "$(ls)" ] && exit
[ -e tmpfiles.extra ] && tmpfiles < tmpfiles.extra
keys=/root/.ssh/authorized_keys
# Like systemd: only where there is none.
[ -e ssh.authorized_keys.root ] && [ ! -e $keys ] && mkdir -p /root/.ssh && cp ssh.authorized_keys.root $keys
[ -e system.hostname ] && hostname "$(cat system.hostname)"
echo "$id" > /etc/credentials-id
echo "tinyguest: read credentials:" *
"""

TMPFILES = r"""#!/bin/sh
# tmpfiles.d lines on stdin, as far as a credential needs them: f, f+, f~, f+~ and d.
while read -r type path mode user group age arg || [ "$type" ]; do
    [ "$mode" = - ] && mode=; [ "$user" = - ] && user=root; [ "$group" = - ] && group=root
    umask 022
    case $type in
    '' | '#'*) continue;;
    d*) mkdir -p "$path"; mode=${mode:-755};;
    f*)
        case $type in *+*) ;; *) [ -e "$path" ] && continue;; esac
        mkdir -p "${path%/*}"
        umask 077
        case $type in *'~'*) echo "$arg" | base64 -d > "$path";; *) printf %b "$arg" > "$path";; esac
        mode=${mode:-644};;
    *) echo "tinyguest: tmpfiles: unknown line type $type $path"; continue;;
    esac
    chown "$user:$group" "$path"; chmod "$mode" "$path"
done
"""

READ_SEED = r"""#!/bin/sh
# What cloud-init does with a NoCloud seed, once per instance-id: the name, the login keys, the ed25519 host key; it
# leaves what is to run later, in order, in /run/user-data. It reads JSON as nocloud writes it, a value a line.
mkdir -p /run/cloud-init /run/user-data /var/log
for m in $(cat /lib/modules/seed); do insmod "/lib/modules/$m.ko"; done
dev=$(findfs LABEL=CIDATA 2> /dev/null || findfs LABEL=cidata 2> /dev/null) || { : > /run/cloud-init/disabled; exit; }
mkdir -p /run/seed; mount -o ro -t vfat "$dev" /run/seed 2> /dev/null || mount -o ro -t iso9660 "$dev" /run/seed || exit
cd /run/seed || exit

meta() { sed -n "s/^ *\"$1\": \"\(.*\)\",*$/\1/p" meta-data; }

parts() { # user-data as files 1, 2 …: the parts of a MIME message, or all of it as one
    cd /run/parts || exit
    boundary=$(sed -n 's/^Content-Type: multipart.*boundary="\(.*\)".*/\1/p' ../seed/user-data | head -n 1)
    [ "$boundary" ] || { cp ../seed/user-data 1; return; }
    awk -v b="--$boundary" '$0 == b "--" { exit } $0 == b { n++; head = 1; next } !n { next }
        head && tolower($0) ~ /^content-transfer-encoding: base64/ { print > (n ".base64") }
        head && /^Content-Type: text.cloud-boothook/ { print > (n ".boothook") }
        head { if ($0 == "") head = 0; next } { print > n }' ../seed/user-data
    for f in *.base64; do [ -e "$f" ] && { base64 -d "${f%.*}" > "$f"; mv "$f" "${f%.*}"; }; done
}

cloud_config() { # the ed25519 host key, the login keys; runcmd in block style
    key=$(sed -n 's/^ *"ed25519_private": "\(.*\)",*$/\1/p' "$1")
    [ "$key" ] && printf %b "$key" > /etc/ssh/ssh_host_ed25519_key
    awk '/^ "ssh_authorized_keys": / { on = 1; next } /^ \]/ { on = 0 } on { sub(/^ *"/, ""); sub(/",?$/, ""); print }' \
        "$1" >> /root/.ssh/authorized_keys
    awk '/^runcmd:/ { on = 1; next } on && sub(/^ *- +/, "") { print; next } { on = 0 }' "$1" > "/run/user-data/$1"
}

id="seed $(meta instance-id)"
if [ "$id" != "seed " ] && [ "$(cat /etc/instance-id 2> /dev/null)" != "$id" ]; then
    umask 077
    mkdir -p /run/parts /root/.ssh /etc/ssh
    rm -f /etc/dropbear/* /etc/ssh/ssh_host_*
    name=$(meta local-hostname); [ "$name" ] && echo "$name" > /etc/hostname
    parts
    for f in $(ls | grep -v boothook | sort -n); do
        [ -e "$f.boothook" ] && { sh "$f"; continue; }
        case $(head -n 1 "$f") in
        '#cloud-config'*) cloud_config "$f";;
        '#!'*) cp "$f" "/run/user-data/$f";;
        *) echo "2026-11-26 01:26:24,516 - __init__.py[WARNING]: Unhandled part $f" >> /var/log/cloud-init-output.log;;
        esac
    done
    echo "$id" > /etc/instance-id
    echo "tinyguest: read $id from $dev"
fi
cd /; umount /run/seed
"""

FINISH_SEED = r"""#!/bin/sh
# cloud-init's last stage: what the user wants to be run, while ssh answers already.
cd /run/user-data 2> /dev/null || exit
errors=
for f in $(ls | sort -n); do
    sh -e "$f" >> /var/log/cloud-init-output.log 2>&1 || errors='"scripts-user failed"'
done
[ -z "$errors" ] || echo "scripts.py[WARNING]: Failed to run module scripts-user" >> /var/log/cloud-init-output.log
printf '{\n "v1": {\n  "errors": [%s]\n }\n}\n' "$errors" > /run/cloud-init/new
mv /run/cloud-init/new /run/cloud-init/result.json
"""

CLOUD_INIT = r"""#!/bin/sh
[ "$1" = clean ] && exec rm -f /etc/instance-id /etc/credentials-id
[ "$1" = status ] || exit 2
if [ ! -e /run/cloud-init/result.json ]; then echo "status: running"
elif grep -q failed /run/cloud-init/result.json; then echo "status: error"; exit 1
else echo "status: done"; fi
"""

NETWORK = r"""#!/bin/sh
# Finds the network card, names it as systemd would, and asks for an address for ever.
. /etc/tinyguest.conf

predictable() { # PCI address -> name
    for s in /sys/bus/pci/slots/*; do
        [ "$(cat "$s/address" 2> /dev/null)" = "${1%.*}" ] && { echo "ens${s##*/}"; return; }
    done
    bus=${1#*:}; bus=${bus%%:*}; slot=${1##*:}; slot=${slot%.*}
    echo "enp$((0x$bus))s$((0x$slot))"
}

find_card() {
    for dev in /sys/bus/virtio/drivers/virtio_net/virtio*; do
        [ -d "$dev/net" ] || continue
        pci=$(readlink -f "$dev/.."); nic=$(predictable "${pci##*/}"); old=$(ls "$dev/net")
        [ "$old" = "$nic" ] || ip link set "$old" name "$nic"
        [ -z "$IFNAME" ] || [ "$IFNAME" = "$nic" ] && return
        echo "tinyguest: network card $nic is not $IFNAME, left alone"
    done
    return 1
}

until find_card; do sleep 2; done
ip link set "$nic" up
until [ -e /run/named ]; do usleep 20000; done
name=$(hostname)
set -- -f -i "$nic" -s /bin/udhcpc-hook -t 3 -T 1 -A 1
[ "$name" != "(none)" ] && set -- "$@" -x "hostname:$name"
[ "$CLIENT_ID" ] && set -- "$@" -C -x "0x3d:$CLIENT_ID"
while :; do udhcpc "$@"; sleep 1; done
"""

UDHCPC_HOOK = r"""#!/bin/sh
# udhcpc's script: address, router, name servers, and a name where there is none in /etc/hostname.
case $1 in bound | renew) ;; *) exit 0;; esac
ifconfig "$interface" "$ip" netmask "$subnet"
for r in $router; do ip route replace default via "$r"; break; done
{ [ "$domain" ] && echo "search $domain"; for s in $dns; do echo "nameserver $s"; done; } > /run/resolv.conf
[ "$hostname" ] && [ ! -s /etc/hostname ] && hostname "$hostname"
[ "$1" = bound ] && echo "tinyguest: $interface has $ip"
exit 0
"""

SCRIPTS = {
    "init": INIT,
    "bin/read_credentials": READ_CREDENTIALS,
    "bin/tmpfiles": TMPFILES,
    "bin/read_seed": READ_SEED,
    "bin/finish_seed": FINISH_SEED,
    "bin/cloud-init": CLOUD_INIT,
    "bin/network": NETWORK,
    "bin/udhcpc-hook": UDHCPC_HOOK,
    # Where busybox's acpid looks for what the power button does.
    "etc/acpi/PWRF/00000080": "#!/bin/sh\nexec kill -USR2 1\n",
}

ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "group": "root:x:0:\n",
    "hosts": "127.0.0.1 localhost\n",
    "nsswitch.conf": "hosts: files dns\n",
    "os-release": 'ID=tinyguest\nNAME="Tiny guest"\nPRETTY_NAME="Tiny guest"\nVERSION_ID=1\n',
    "profile": "PS1='\\h:\\w\\$ '\n",
}

FOLDERS = ["bin", "data", "dev", "etc/dropbear", "lib/modules", "lib64", "proc", "run", "sys", "tmp", "usr/lib", "var"]
DROPBEAR = ["usr/sbin/dropbear", "usr/bin/dropbearkey", "usr/bin/dropbearconvert"]


class Cpio:
    """An initramfs in the making; everything in it belongs to root, whoever builds it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.names: set[str] = set()

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self.names.add(name)
        fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        header = "070701" + "".join(f"{field:08x}" for field in fields) + name + "\0"
        for part in (header.encode(), content):
            self.data += part + bytes(-len(part) % 4)

    def folder(self, name: str, mode: int = 0o755) -> None:
        """Add a folder and those above it, each once: the kernel makes none by itself."""
        if name and name not in self.names:
            self.folder(os.path.dirname(name))
            self._add(name, stat.S_IFDIR | mode)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self.folder(os.path.dirname(name))
        self._add(name, stat.S_IFREG | mode, content)

    def link(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int) -> None:
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        self._add("TRAILER!!!", 0)
        return bytes(self.data)


def _run(*argv: str | pathlib.Path, cwd: pathlib.Path | None = None) -> str:
    """Run a program; its stdout. mke2fs is in sbin, which an ordinary user's PATH lacks."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    env = {**os.environ, "PATH": path, "LC_ALL": "C", "MTOOLS_SKIP_CHECK": "1"}
    program = shutil.which(argv[0], path=path)
    if program is None:
        raise RuntimeError(f"tinyguest: {argv[0]} is not installed")
    done = subprocess.run(
        [program, *argv[1:]], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"tinyguest: {' '.join(map(str, argv))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


# The sandbox user _apt may not write into our 0700 folder; apt would only warn.
ROOT_APT = ("-o", "APT::Sandbox::User=root")


def _packages(arch: str, options: Sequence[str]) -> list[str]:
    """busybox, the kernel that the metapackage points to, and dropbear with everything it depends on."""
    kernel = [
        line.split()[-1]
        for line in _run("apt-cache", *options, "depends", "-i", f"linux-image-cloud-{arch}").splitlines()
        if "Depends: linux-image-" in line
    ]
    closure = _run("apt-cache", *options, "depends", "-i", "--recurse", "dropbear-bin").splitlines()
    names = [line for line in closure if line[:1].isalnum() and ":" not in line]
    return ["busybox-static", *kernel[:1], *names, *(["grub-efi-arm64-signed"] if arch == "arm64" else [])]


def _foreign(work: pathlib.Path) -> list[str]:
    """Options for an apt of its own, which knows the host's archives but arm64's packages."""
    for name in ("apt/state/lists/partial", "apt/cache/archives/partial"):
        (work / name).mkdir(parents=True)
    (work / "apt/status").touch()
    values = {"APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "root"}
    values |= {"Dir::State": f"{work}/apt/state", "Dir::Cache": f"{work}/apt/cache"}
    values["Dir::State::status"] = f"{work}/apt/status"
    options = [word for key, value in values.items() for word in ("-o", f"{key}={value}")]
    _run("apt-get", *options, "update", "-q")
    return options


def unpack(work: pathlib.Path, packages: list[str], options: Sequence[str] = ROOT_APT) -> pathlib.Path:
    """Download packages and lay them out under one folder."""
    _run("apt-get", *options, "download", "-q", *packages, cwd=work)
    tree = work / "tree"
    for deb in sorted(work.glob("*.deb")):
        _run("dpkg-deb", "-x", deb, tree)
    return tree


def _one(tree: pathlib.Path, name: str) -> pathlib.Path:
    """The file of that name. Where it lies depends on how far the suite has merged /usr."""
    found = [path for path in tree.rglob(name) if path.is_file() and not path.is_symlink()]
    if not found:
        raise RuntimeError(f"tinyguest: no {name} in the packages")
    return found[0]


def _add_programs(cpio: Cpio, tree: pathlib.Path, own: pathlib.Path) -> None:
    """busybox under all its names, which this machine's `own` tells, and dropbear's three programs."""
    busybox = _one(tree, "bin/busybox")
    for path in DROPBEAR:
        cpio.file(f"bin/{os.path.basename(path)}", (tree / path).read_bytes(), 0o755)
    cpio.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in _run(_one(own, "bin/busybox"), "--list").split():
        if applet != "busybox" and f"bin/{applet}" not in SCRIPTS:
            cpio.link(f"bin/{applet}", "busybox")


def _add_foreign_libraries(cpio: Cpio, tree: pathlib.Path) -> None:
    """All that came with dropbear: no loader of arm64's runs here to tell what it needs."""
    for folder in tree.rglob("aarch64-linux-gnu"):
        for path in (path for path in folder.glob("lib*.so.*") if path.name.rpartition(".so.")[2].isdigit()):
            cpio.file(f"lib/{path.name}", path.read_bytes(), 0o755)
    cpio.file("lib/ld-linux-aarch64.so.1", _one(tree, "ld-linux-aarch64.so.1").read_bytes(), 0o755)


def _add_libraries(cpio: Cpio, tree: pathlib.Path) -> None:
    """What dropbear is linked with, found by its own loader (the host's may be older than these libraries)."""
    loader = _one(tree, "ld-linux-x86-64.so.2")
    path = ":".join(str(folder) for folder in tree.rglob("x86_64-linux-gnu") if folder.is_dir())
    for program in DROPBEAR:
        for line in _run(loader, "--library-path", path, "--list", tree / program).splitlines():
            soname, arrow, target = line.partition(" => ")
            library = f"lib/{soname.strip()}"
            if arrow and library not in cpio.names:
                cpio.file(library, pathlib.Path(target.split(" (")[0]).read_bytes(), 0o755)
    cpio.file("lib64/ld-linux-x86-64.so.2", loader.read_bytes(), 0o755)


def _module(path: pathlib.Path) -> bytes:
    """A module's content; newer suites ship them compressed."""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def _load_order(paths: dict[str, pathlib.Path], names: list[str]) -> list[str]:
    """The modules and what they depend on, in an order that insmod can load."""
    order: list[str] = []
    for name in (name.replace("-", "_") for name in names):
        if name in paths:
            depends = _module(paths[name]).partition(b"\0depends=")[2].partition(b"\0")[0].decode()
            order += [*_load_order(paths, depends.split(",")), name]
    return list(dict.fromkeys(order))


def _add_modules(cpio: Cpio, tree: pathlib.Path) -> None:
    """The drivers, and the lists by which init loads them: busybox's modprobe would want a modules.dep."""
    paths = {path.name.split(".")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")}
    boot = _load_order(paths, BOOT_MODULES)
    seed = [name for name in _load_order(paths, SEED_MODULES) if name not in boot]
    for stage, names in (("boot", boot), ("seed", seed)):
        cpio.file(f"lib/modules/{stage}", "\n".join(names).encode())
        for name in names:
            cpio.file(f"lib/modules/{name}.ko", _module(paths[name]))


def _initrd(tree: pathlib.Path, own: pathlib.Path) -> bytes:
    cpio = Cpio()
    for folder in FOLDERS:
        cpio.folder(folder)
    cpio.folder("root", 0o700)
    for name, target in (
        ("sbin", "bin"),
        ("usr/bin", "../bin"),
        ("usr/sbin", "../bin"),
        ("etc/resolv.conf", "../run/resolv.conf"),
    ):
        cpio.link(name, target)
    cpio.device("dev/console", 5, 1)
    for name, script in SCRIPTS.items():
        cpio.file(name, script.encode(), 0o755)
    for name, text in ETC.items():
        cpio.file(f"etc/{name}", text.encode())
    _add_programs(cpio, tree, own)
    (_add_libraries if own is tree else _add_foreign_libraries)(cpio, tree)
    _add_modules(cpio, tree)
    return cpio.finish()


def _parts(cache: pathlib.Path, arch: str = "amd64") -> pathlib.Path:
    """The folder with vmlinuz and initrd, the same for every variant: only the first build downloads."""
    parts = cache / f"tinyguest-parts-{_digest(*([arch] if arch != 'amd64' else []))}"
    if not parts.is_dir():
        with tempfile.TemporaryDirectory(prefix="tinyguest-", dir=cache) as folder:
            work = pathlib.Path(folder)
            (work / "own").mkdir()
            options = _foreign(work) if arch == "arm64" else ROOT_APT
            tree, made = unpack(work, _packages(arch, options), options), work / "made"
            own = tree if arch == "amd64" else unpack(work / "own", _packages("amd64", ROOT_APT))
            made.mkdir()
            (made / "initrd").write_bytes(_initrd(tree, own))
            shutil.copyfile(_one(tree, "vmlinuz-*"), made / "vmlinuz")
            if arch == "arm64":
                shutil.copyfile(_one(tree, "grubaa64.efi.signed"), made / "bootaa64.efi")
            made.rename(parts)
    return parts


def _variant(key: str | None, settings: dict[str, str]) -> bytes:
    """A second initramfs, laid over the first one: what distinguishes this image."""
    cpio = Cpio()
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in settings.items()]
    cpio.file("etc/tinyguest.conf", "".join(lines).encode())
    if key:
        cpio.folder("root", 0o700)
        cpio.folder("root/.ssh", 0o700)
        cpio.file("root/.ssh/authorized_keys", f"{key.strip()}\n".encode(), 0o600)
    return cpio.finish()


def _boot_partition(work: pathlib.Path, parts: pathlib.Path, variant: bytes, arch: str) -> pathlib.Path:
    (work / "variant").write_bytes(variant)
    (work / "syslinux.cfg").write_text(SYSLINUX_CFG)
    (work / "grub.cfg").write_text(GRUB_CFG)
    image, sectors = work / "fat.img", FAT_SECTORS[arch]
    with image.open("wb") as file:
        file.truncate(sectors * SECTOR)
    # -H: syslinux's boot sector finds itself by the count of sectors before the partition.
    _run("mformat", "-i", image, "-T", str(sectors), "-h", "16", "-s", "63", "-H", str(FAT_START), "::")
    _run("mcopy", "-i", image, parts / "vmlinuz", parts / "initrd", work / "variant", work / "syslinux.cfg", "::")
    if arch == "arm64":
        _run("mmd", "-i", image, "::EFI", "::EFI/BOOT", "::EFI/debian")
        _run("mcopy", "-i", image, parts / "bootaa64.efi", "::EFI/BOOT")
        _run("mcopy", "-i", image, work / "grub.cfg", "::EFI/debian")
    else:
        _run("syslinux", "--install", image)
    return image


def _data_partition(work: pathlib.Path) -> pathlib.Path:
    image = work / "data.img"
    with image.open("wb") as file:
        file.truncate(DATA_SECTORS * SECTOR)
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0", image)
    return image


def _mbr(arch: str) -> bytes:
    """syslinux's boot code, the active FAT16 partition, or UEFI's, the Linux one. CHS fields are zero: LBA counts."""
    first, sectors = (0x80, 0x0E) if arch == "amd64" else (0, 0xEF), FAT_SECTORS[arch]
    rows = ((*first, FAT_START, sectors), (0, 0x83, FAT_START + sectors, DATA_SECTORS))
    table = b"".join(struct.pack("<B3xB3xII", *row) for row in rows)
    return MBR.read_bytes().ljust(446, b"\0")[:446] + table.ljust(64, b"\0") + b"\x55\xaa"


def _assemble(work: pathlib.Path, parts: pathlib.Path, variant: bytes, arch: str) -> pathlib.Path:
    """The whole disk, as qcow2."""
    raw, image = work / "disk.raw", work / "disk.qcow2"
    with raw.open("wb") as disk:
        disk.write(_mbr(arch))
        disk.seek(FAT_START * SECTOR)
        for part in (_boot_partition(work, parts, variant, arch), _data_partition(work)):
            disk.write(part.read_bytes())
    _run("qemu-img", "convert", "-O", "qcow2", raw, image)
    return image


def _digest(*variant: object) -> str:
    """Names a cache entry by this file's text and the variant."""
    return hashlib.sha256(pathlib.Path(__file__).read_bytes() + repr(variant).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _locked(cache: pathlib.Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "tinyguest.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(
    cache: pathlib.Path,
    key: str | None = None,
    *,
    ifname: str = "",
    client_id: str = "",
    reads: str = "systemd cloud-init",
    arch: str = "amd64",
) -> pathlib.Path:
    """The path of the image (qcow2), made at the first call for this variant.

    key: a public key that may log in as root. ifname: configure no network card but the one of this predictable name.
    client_id: DHCP client id, in hex; every clone sends the same one. reads: where the guest looks for its identity
    (without `cloud-init` it has no such command either). arch: as Debian calls it.
    """
    cache = cache.absolute()
    settings = {"IFNAME": ifname, "CLIENT_ID": client_id, "READS": reads}
    image = cache / f"tinyguest-{_digest(key, settings, *([arch] if arch != 'amd64' else []))}.qcow2"
    with _locked(cache):
        if not image.exists():
            parts = _parts(cache, arch)
            with tempfile.TemporaryDirectory(prefix="tinyguest-", dir=cache) as work:
                _assemble(pathlib.Path(work), parts, _variant(key, settings), arch).rename(image)
    return image


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print("usage: tinyguest.py OUT.qcow2 [KEY.pub]", file=sys.stderr)
        return 2
    key = pathlib.Path(sys.argv[2]).read_text() if len(sys.argv) == 3 else None
    with tempfile.TemporaryDirectory() as cache:
        shutil.move(build(pathlib.Path(cache), key), sys.argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
