#!/usr/bin/env -S python3 -X utf8 -IS
# SPDX-License-Identifier: MIT
"""nocloud: a mini-cloud on one Linux machine.

One line, ``debian12:5:web:mem=1024;name=web``, becomes five virtual machines that run, have names
and addresses, and answer ssh and ansible; one command later they are gone without a trace.

The module is read top to bottom: each section uses only those above it.  Nothing happens at import.
Modules that only some commands need are imported at their first use: a listing must start fast.

    Errors, records, reports         exit statuses, the errors, the only prints
    Files, locks, waits              files that land by rename, locks, threads, waits
    Settings                         one row a key; configuration files, parsed and never run; the files of etc/
    Programs                         finding and starting other programs, nobody else does; processes and their signals
    Disks                            qemu-img, and whether an image can be trusted
    QMP                              the client of qemu's control socket
    VMs that the bash tools started  finding and reaching a qemu that is not ours
    Names and the VM tree            what things may be called, where a VM's files are, whether it runs
    qemu and its command line        which qemu, acceleration; the words that start a VM
    Networks                         what both kinds share: taps, addresses, dnsmasq and what it knows
    The private network              namespaces of our own, the way out, ports inside
    The host's bridge                root's side: bridge, firewalls, DHCP; and the user's
    Ports                            ports of this host that lead to VMs, and the process that forwards them
    Shared folders                   folders of this host that guests mount, and the daemon that serves them
    Identity                         MAC, keys, credentials and seeds; ssh's options
    Catalogue and downloads          what there is to have, and getting it verified
    Templates                        making, changing, deleting them; layers
    Building templates               from a distribution's packages
    Clones                           what is asked for, checked; names, addresses, disks made
    Stopping and destroying          power button, plug, and away with it
    Starting                         from a conf to a qemu that answers; saved and frozen guests that go on
    Waiting until ready              from there to a guest that is ready, and ssh into it; many at once
    Snapshots                        what VMs were at a moment, and back to it
    Changing VMs                     one by one, or a group to what its description says
    Work in a template's guest       cleaning, upgrades, templates of VMs; stopping with care
    Consoles                         screens, the serial line, the monitor, logs
    Supervisor                       vmrun's loop
    Inventory                        lists for people, JSON for ansible
    Doctor                           checks, and the commands that mend
    Export and import                VMs for other engines and for another nocloud; VMs from one
    Command lines                    how commands and options are declared and parsed
    Commands                         what each command does with its words: templates, VMs
    Commands for ways in and hosts   likewise: what connects to VMs, and what looks after the host
    Completion and manual            what is offered while one types; the man page
    Installation                     what make install puts on a host, and takes away
    Dispatch                         main()
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib
import io
import os
import re
import signal
import stat
import struct
import sys
import time
from collections import ChainMap, Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence

TYPE_CHECKING = False  # typing costs 7 ms at start-up and nothing here needs it at run time
if TYPE_CHECKING:
    import argparse
    import asyncio
    import base64
    import binascii
    import codecs
    import ctypes
    import difflib
    import fnmatch
    import glob
    import grp
    import gzip
    import hashlib
    import http.client
    import ipaddress
    import json
    import pwd
    import resource
    import select
    import selectors
    import shlex
    import shutil
    import socket
    import ssl
    import subprocess
    import tarfile
    import termios
    import textwrap
    import threading
    import tty
    import zipfile
    import zlib
    from dataclasses import dataclass as record
    from typing import Any
else:

    class Module:
        """A module of the standard library, which is imported when something of it is first asked for."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self.name), name)
            setattr(self, name, value)
            return value

    _LATER = (
        "argparse", "asyncio", "base64", "binascii", "codecs", "ctypes", "difflib", "fnmatch", "glob",
        "grp", "gzip", "hashlib", "ipaddress", "json", "pwd", "resource", "select", "selectors", "shlex", "shutil",
        "socket", "ssl", "subprocess", "tarfile", "termios", "textwrap", "threading", "tty", "zipfile", "zlib",
    )  # fmt: skip
    globals().update({name: Module(name) for name in _LATER})

__version__ = "0.1.0"


# Errors, records, reports ############################################################################
#
# Exit statuses, the one family of errors, and the only place that writes to stdout and stderr.
# Errors are raised low and caught in main() alone.

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DIFFERS = 3
EXIT_TIMEOUT = 124  # as timeout(1)
EXIT_MISSING = 127  # as the shell: unknown command, missing program
EXIT_INTERRUPTED = 130  # as the shell: 128 + SIGINT

MIB = 1 << 20
GIB = 1 << 30
TEXT = "utf-8-sig"  # files that people write: without the byte order mark that some editors begin them with

if not TYPE_CHECKING:

    def record(cls: Any) -> Any:
        """A class of plain values, whose fields are declared once: `__init__` and `__slots__` from its annotations.  A
        type checker takes it for dataclasses.dataclass, whose import takes 27 ms; `__post_init__` serves as there.  Two
        are equal only where they are one, a record is no one's base, and a default is one that can't be changed."""
        fields = tuple(cls.__annotations__)
        body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        defaults = {name: body.pop(name) for name in fields if name in body}
        finish = body.get("__post_init__")

        def init(self: Any, *values: Any, **named: Any) -> None:
            given = {**defaults, **dict(zip(fields, values)), **named}
            if len(values) > len(fields) or given.keys() != set(fields):
                raise TypeError(f"{cls.__name__} takes {', '.join(fields)}")
            for name, value in given.items():
                setattr(self, name, value)
            if finish:
                finish(self)

        return type(cls)(cls.__name__, cls.__bases__, {**body, "__slots__": fields, "__init__": init})


class Error(Exception):
    """What could not be done, in one line, after the name of the `vm` that it is about; `hint` says what to do."""

    status = EXIT_FAILED

    def __init__(self, text: str, hint: str = "", status: int | None = None, vm: Any = None) -> None:
        super().__init__(text)
        self.text, self.hint, self.vm = text, hint, vm
        if status is not None:
            self.status = status

    def __str__(self) -> str:
        return f"{self.vm}: {self.text}" if self.vm else self.text


class UsageError(Error):
    """The command line, or a file the user wrote, isn't what it should be."""

    status = EXIT_USAGE


class NotFound(Error):
    """No VM, group or template of that name."""


class WrongState(Error):
    """The thing is there, but not in the state that the command needs."""


class MissingProgram(Error):
    """A program that has to be there isn't."""

    status = EXIT_MISSING


class TimedOut(Error):
    """A wait ran out."""

    status = EXIT_TIMEOUT


class CommandFailed(Error):
    """An external program ended with a status other than 0; `output` is what it wrote."""

    def __init__(self, argv: Sequence[str], returncode: int, output: str) -> None:
        self.argv, self.returncode, self.output = list(argv), returncode, output
        super().__init__(f"{os.path.basename(argv[0])}: {last_line(output) or describe_status(returncode)}")


class QMPError(Error):
    """qemu said no, or what it said is not QMP."""


class QMPClosed(QMPError):
    """qemu closed the connection: it ended."""


class Parsing:
    """The context of each parser of what comes from outside: whatever it raises but an Error or an OSError means that
    it didn't understand, and becomes an Error of this kind, with this text."""

    def __init__(self, kind: type[Error], text: str) -> None:
        self.kind, self.text = kind, text

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, raised: object, trace: object) -> None:
        if isinstance(raised, Exception) and not isinstance(raised, (Error, OSError)):
            raise self.kind(self.text) from None


def last_line(text: str) -> str:
    """The last line of `text` that says something, cut to a length that fits an error message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def describe_status(returncode: int) -> str:
    """`exit status 1`, or the name of the signal where subprocess reports one (a negative number)."""
    if returncode >= 0:
        return f"exit status {returncode}"
    names = {each.value: each.name for each in signal.Signals}  # not those between SIGRTMIN and SIGRTMAX
    return f"killed by {names.get(-returncode, f'signal {-returncode}')}"


class Reporter:
    """What the user reads: data on stdout, everything else on stderr, a line at a time."""

    def __init__(self) -> None:
        self.program = "nocloud"
        self.debug = False
        self._stages: set[str] = set()
        self._unfinished = False

    def data(self, text: str) -> None:
        """A line on stdout, flushed: scripts read it as it comes."""
        self._finish_line()
        if not text.isascii():
            text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", text)  # JSON's halves stand for no byte
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def log(self, text: str) -> None:
        """A line of vmrun's log, with the time; who reads it may go away, the work goes on."""
        now = time.time_ns()
        stamp = time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(now // 10**9))
        try:
            self.data(f"{stamp}.{now % 10**9:09d} {printable(text)}")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())

    def say(self, text: str) -> None:
        """A line on stderr, in one write so that parallel ones don't mix."""
        self._finish_line()
        self._write(printable(text) + "\n")

    def warn(self, text: str) -> None:
        self.say(f"{self.program}: warning: {text}")

    def error(self, error: Error) -> None:
        self.say(f"{self.program}: {error}")
        named = re.compile("(?:^|; )(?:see|its console:) (/[^;]+)")  # a file that may have gone with what failed
        hint = named.sub(
            lambda found: found[0] if os.path.exists(re.sub(r":\d+$", "", found[1])) else "", error.hint
        ).removeprefix("; ")
        if hint:
            self.say(f"(hint: {hint})")

    def progress(self, stage: str, detail: str = "") -> None:
        """How far long work is: one line that is rewritten on a terminal; elsewhere a line for each stage, once."""
        try:
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        except OSError:  # it is no terminal, or that has gone
            if stage not in self._stages:
                self.say(stage)
        else:
            self._unfinished = True
            self._write("\r\x1b[K" + printable(f"{stage} {detail}".strip())[: width - 1])
        self._stages.add(stage)

    def _finish_line(self) -> None:
        """Take a progress line off the terminal before another line comes."""
        if self._unfinished:
            self._unfinished = False
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        """On stderr; where nobody reads it any more, the work goes on, and its exit status stays its own."""
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stderr.fileno())


report = Reporter()


def printable(text: str) -> str:
    """`text` in one line, without control characters: file names and guests' words are input."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" if ord(c) < 256 else "?" for c in text)


def without_escapes(text: str) -> str:
    """`text` without what moves a terminal's cursor, sets its modes, colours, title (ECMA-48, DEC's and xterm's)."""
    own = r"\x1b\[[0-9;?!]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[78=>McDEH]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"
    return re.sub(own, "", text)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def did_you_mean(word: str, names: Iterable[str], otherwise: str = "", before: str = "") -> str:
    """`before` and the question whether the name most like `word` is meant; `otherwise` where none is like it."""
    lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(word.lower(), lower, 1)
    return f"{before}did you mean {lower[found[0]]}?" if found else otherwise


def quoted(*paths: str) -> str:
    return shlex.join(paths)


# Files, locks, waits #################################################################################
#
# Small pieces of the file system that every section uses.  Files land by rename; what a command that returned 0 has
# done survives a power cut; locks are flock on what only the folder's owner can open, and go with the folder.


def read_text(path: str) -> str:
    """The text of a small file; OSError where it can't be read."""
    with open(path, encoding=TEXT, errors="surrogateescape") as file:
        return file.read()


def read_existing(path: str) -> str:
    """The text of a small file; '' where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return read_text(path)
    return ""


def read_tail(path: str) -> str:
    """The last 4096 bytes of a log, as text; '' where there is none."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(file.fileno()) - 4096))
        return file.read().decode("utf-8", "replace")
    return ""


def write_file(path: str, content: str | bytes, mode: int = 0o600, durable: bool = True) -> None:
    """Write `path` so that a reader, or a power cut, sees the old file or the new one, never half of it; it is on the
    disk then, unless `durable` is off: for what is written anew at need, or in a folder that lands later."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    temporary = f"{path}.{os.getpid()}.{os.urandom(3).hex()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask says
            file.write(data)
            if durable:
                file.flush()
                os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        remove_file(temporary)
        raise
    if durable:
        sync(os.path.dirname(path) or ".")


def sync(path: str) -> None:
    """Have a file's content, or the names in a folder, on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def append_line(path: str, text: str) -> None:
    """Add a line to a log that others write to as well."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with open(fd, "a", encoding="utf-8", errors="replace") as file:
        file.write(printable(text) + "\n")


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def remove_file(path: str) -> None:
    """Remove a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_empty(path: str) -> None:
    """Remove a folder if nothing is in it."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def remove_tree(folder: str) -> None:
    """Remove a folder and what is in it; symlinks in it are removed, never followed."""
    if os.path.islink(folder):
        raise Error(f"{folder}: is a symlink; it is not removed", "remove it yourself")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def make_private_folder(path: str) -> None:
    """A folder that only its owner enters: it holds keys or sockets.  Those above it that weren't there are so, too."""
    if not os.path.exists(os.path.dirname(path) or "."):
        make_private_folder(os.path.dirname(path))
    os.makedirs(path, 0o700, exist_ok=True)
    info = os.stat(path)  # one that others could write to stays as it is: who relies on what is in it looks for that
    if info.st_mode & 0o077 and not info.st_mode & 0o022 and info.st_uid == os.geteuid():
        os.chmod(path, 0o700)


def existing_parent(folder: str) -> str:
    """The folder itself, or the nearest one above it that is there."""
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder


def names_in(path: str, wanted: Callable[[os.DirEntry[str]], bool] = lambda entry: True) -> list[str]:
    """The names of what is in a folder, sorted; none where there is no such folder, or we may not look."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if wanted(entry))
    return []


def folders_in(path: str) -> list[str]:
    """The names of the folders in `path`, sorted, without the hidden ones."""
    return names_in(path, lambda entry: entry.name[0] != "." and entry.is_dir())


def free_bytes(path: str) -> int:
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def file_digest(path: str, algorithm: str = "sha256") -> str:
    """The checksum of a file, in hexadecimal, read in pieces of 1 MB."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(MIB), b""):
            digest.update(piece)
    return digest.hexdigest()


def untrusted(path: str, info: os.stat_result | None = None) -> str:
    """Why a configuration file must not be used, or '': it has to be the caller's or root's, and only theirs to write,
    or their own group's (user-private groups are Debian's default)."""
    info = info or os.stat(path)
    if info.st_uid not in (os.geteuid(), 0):
        return "it belongs to another user"
    if info.st_mode & stat.S_IWOTH or (info.st_mode & stat.S_IWGRP and info.st_gid not in (os.getegid(), 0)):
        return "others may write to it"
    return ""


def read_trusted(path: str) -> tuple[str, str]:
    """(the text of a configuration file, at most 1 MB, '') or ('', why it must not be used, see untrusted)."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        reason = untrusted(path, os.fstat(file.fileno()))  # of what is open: the name may be another file's by now
        return "" if reason else file.read(MIB).decode(TEXT, "surrogateescape"), reason


def process_file(pid: int, name: str) -> str:
    """A file of /proc/PID; '' where the process has ended or is not ours to look at."""
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:  # a list of VMs asks every process of the host
            return file.read().decode("utf-8", "surrogateescape")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


class FolderLock:
    """A `flock` on a folder, kept until `release` or the end of the `with`; who waits longer than a second says so.
    Who can open a file can lock it, for ever: where others may look into the folder, the lock is on a file in it that
    only its owner can open, gone when none has it; a sticky folder's users share it, lock and all.  What is locked may
    be removed or replaced meanwhile, so it is compared with what the path names now."""

    def __init__(self, path: str, shared: bool = False, wait: float = 600.0, make: bool = False) -> None:
        """`make`: the folder is made where it isn't there, as often as someone else removes it meanwhile."""
        self.path = path
        self._shared, self._wait, self._make = shared, wait, make
        self._fd = self._folder = -1  # what is locked; the folder that it is in, where it is a file

    def __enter__(self) -> FolderLock:
        deadline = time.monotonic() + self._wait
        while True:
            if self._make:
                make_private_folder(self.path)
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                info = os.fstat(self._fd)
                if info.st_mode & 0o077 and not info.st_mode & stat.S_ISVTX:
                    self._fd, self._folder = -1, self._fd
                    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                    self._fd = os.open(".lock", flags, 0o600, dir_fd=self._folder)
                self._acquire(deadline)
                if os.path.samestat(info, os.stat(self.path)) and os.fstat(self._fd).st_nlink:
                    return self
            except BaseException as error:
                self.release()
                if not (self._make and isinstance(error, FileNotFoundError)):
                    raise
            self.release()

    def _acquire(self, deadline: float) -> None:
        operation = (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        said = time.monotonic() + 1.0
        while True:
            try:
                return fcntl.flock(self._fd, operation)
            except BlockingIOError:
                now = time.monotonic()
            if now >= deadline:
                raise WrongState(f"{self.path}: another command is at work on it", "try again when it has ended")
            if now >= said:
                said = deadline
                report.say(f"{report.program}: waiting for another command to finish with {self.path}")
            time.sleep(0.02)

    def release(self) -> None:
        if self._folder >= 0 and self._fd >= 0:
            with contextlib.suppress(OSError):  # another one has it
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._fd).st_nlink:
                    os.unlink(".lock", dir_fd=self._folder)
        for fd in (self._fd, self._folder):
            if fd >= 0:
                os.close(fd)
        self._fd = self._folder = -1

    def __exit__(self, *exc: object) -> None:
        self.release()


def is_locked(path: str) -> bool:
    """Whether someone holds the folder's lock, or may hold it; a folder that is gone isn't locked."""
    try:
        with FolderLock(path, wait=0):
            return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (WrongState, OSError):
        return True


def lock_holder(path: str) -> tuple[str, int]:
    """Who holds the write lock on a pidfile: ("running", pid), ("stopped", 0), or ("unknown", 0) where the file can't
    be read, the holder is in another pid namespace (pid 0), or there is no lock service. qemu locks its `-pidfile` for
    as long as it lives (util/oslib-posix.c): a stale file or a reused pid can't deceive."""
    layout = "hhqqi4x"  # struct flock of Linux on 64-bit machines: l_type, l_whence, l_start, l_len, l_pid
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except (FileNotFoundError, NotADirectoryError):
        return "stopped", 0
    except OSError:
        return "unknown", 0
    kind, _, _, _, pid = struct.unpack(layout, answer)
    if kind == fcntl.F_UNLCK:
        return "stopped", 0
    return ("running", pid) if pid > 1 else ("unknown", 0)


class Cancellation:
    """Set when the main thread is interrupted, so that the threads that wait give up instead of being waited for;
    `children` are the programs that they wait for just now."""

    def __init__(self) -> None:
        self.requested = False
        self.children: set[subprocess.Popen[bytes]] = set()

    def check(self) -> None:
        if self.requested:
            raise Error("interrupted", status=EXIT_INTERRUPTED)

    def request(self) -> None:
        """End what is waited for.  SIGTERM: ssh takes its ProxyCommand with it, which SIGKILL would leave."""
        self.requested = True
        for child in list(self.children):
            child.terminate()


cancellation = Cancellation()


def wait_for(ready: Callable[[], bool], seconds: float, interval: float = 0.02) -> bool:
    """Ask until `ready` says yes or the time is over; what it said last.  A cancelled wait ends at once."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() >= deadline:
            return False
        cancellation.check()
        time.sleep(interval)
    return True


def readable(file: Any, seconds: float) -> bool:
    """Whether there is something to read, or its end, within `seconds`.  A cancelled wait ends at once."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return wait_for(lambda: bool(poll.poll(max(0, min(seconds, 0.1)) * 1000)), seconds, 0)


def in_parallel(work: Callable[[Any], Any], items: Sequence[Any], workers: int = 0) -> list[Any]:
    """`work(item)` for each item, a VM, at once; the results in order, the Error of the item that raised it among them.
    Anything else that is raised is a defect and goes on to the caller."""
    if len(items) < 2:
        return [result_of(work, item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(max_workers=workers or min(32, len(items)))
    try:  # around the submits too: a signal may come between two of them, and the first thread would be waited for
        return [future.result() for future in [pool.submit(result_of, work, item) for item in items]]
    except BaseException:
        cancellation.request()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def result_of(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except (Error, OSError) as raised:
        error = error_from_os(raised) if isinstance(raised, OSError) else raised
        error.vm = error.vm or item
        return error


def raise_first(results: Iterable[Any]) -> None:
    """Raise the first Error that workers have come back with."""
    for result in results:
        if isinstance(result, Error):
            raise result


def error_from_os(error: OSError) -> Error:
    """An OSError as the one line that a user can act on."""
    hints = {
        errno.ENOSPC: "free some disk space, or put vmBaseDir on a larger file system",
        errno.EDQUOT: "the disk quota is used up",
        errno.EACCES: "check its owner and permissions",
        errno.EROFS: "the file system is read-only",
    }
    name = f"{error.filename}: " if error.filename else ""
    return Error(f"{name}{error.strerror or error}", hints.get(error.errno or 0, ""))


# Settings ############################################################################################
#
# One row a key: the reader, the writer, --help and the README's table come from it.  Configuration files
# were bash files once; here they are parsed, and nothing in them is ever executed.


@record
class Setting:
    """A key: what its values must be, what it is without a file, and who reads it.  `check` raises ValueError, saying
    what was expected.  `where` is `config` (configuration files, the environment), `vm` (a VM's own conf), `both`, or
    `unused` (read without a warning, for old files' sake).  `inherited`: a clone's conf gets it from its template's.
    `harmless`: it can't have anything run or opened, so it counts in a ./.nocloud.conf, which may be somebody's."""

    key: str
    check: Callable[[str], object]
    default: str
    where: str
    help: str
    inherited: bool = False
    harmless: bool = False


def whole_number(low: int, high: int, unit: str = "") -> Callable[[str], int]:
    """A check for a plain decimal number in a range; `unit` is named in the error."""

    def check(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,12}", text) and low <= int(text) <= high:
            return int(text)
        raise ValueError(f"a whole number from {low} to {high}{', in ' + unit if unit else ''}")

    return check


def one_of(*words: str) -> Callable[[str], str]:
    return matching("|".join(map(re.escape, words)), f"one of {', '.join(words)}")


def yes_no(text: str) -> str:
    """A check for a switch, however people write it: `yes` or `no`, which it is where nothing is said."""
    words = {"": "no", "0": "no", "false": "no", "off": "no", "1": "yes", "true": "yes", "on": "yes"}
    return one_of("yes", "no")(words.get(text.lower(), text.lower()))


def matching(pattern: str, expected: str) -> Callable[[str], str]:
    """A check for text that fits a pattern, which is compiled when it is used first."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise ValueError(expected)

    return check


def is_ipv4(text: str) -> bool:
    """Whether a word of a file that others write is an IPv4 address."""
    return bool(re.fullmatch(_IPV4, text))


# It ends up in ssh's arguments and in the guest's files.
LOGIN_NAME = matching("[a-z_][a-z0-9_-]{0,31}", "a login name (lower case letters, digits, '_' and '-')")
# A card's: a group's first byte is odd
MAC_ADDRESS = matching("(?!00(:00){5})[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}", "a MAC, as 00:50:56:12:34:56")
INTERFACE_NAME = matching("[A-Za-z0-9][A-Za-z0-9._-]{0,14}", "a name of at most 15 letters, digits, '.', '_' and '-'")
HOST_NAME = matching("[A-Za-z0-9][A-Za-z0-9._-]{0,252}", "an address or a name")
UUID = matching("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", "a UUID")
_BYTE = "(?:[1-9]?[0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"  # no shorter form, as 127.1 or 0, which would be 0.0.0.0, and none in octal
IPV4_ADDRESS = matching(f"({_IPV4})?", "an IPv4 address")
IPV4_PREFIX = matching(f"{_IPV4}/([89]|[12][0-9]|30)", "an IPv4 address and the length of a prefix, as 192.168.1.1/24")
_PORT = "(?:[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_PUBLISHED = rf"(?:(?!22[4-9]|2[3-5][0-9]){_IPV4}:)?{_PORT}:(?!0+\b){_PORT}"
PORTS = matching(rf"({_PUBLISHED}(,{_PUBLISHED})*)?", "[IP:]HOST:GUEST, ports of TCP (no others), comma-separated")
_SHARE = r"/[^:,\0-\x1f]*:(?:/[.]*[\w@+-][\w.@+-]*)+(?::rw)?"
SHARES = matching(rf"(?a:{_SHARE}(,{_SHARE}){{0,7}})", "HOSTDIR:GUESTDIR[:rw], plain paths, at most 8")
IMAGE_FORMATS = matching("(qcow2|raw)(,(qcow2|raw))*", "qcow2 or raw for each disk, comma-separated")
MACHINE_TYPE = matching("[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", "a machine type of qemu, as pc-q35-7.2")
MEMORY_MB = whole_number(16, 16 * 1024 * 1024, "MB")
CPU_COUNT = whole_number(1, 512)
CPU_CAP = whole_number(0, 100, "per cent")
DISK_GB = whole_number(1, 1024 * 1024, "GB")
SECONDS = whole_number(0, 86400, "seconds")
CLONE_COUNT = whole_number(1, 1000)
INIT_KINDS = ("auto", "systemd", "cloud-init", "ssh", "none")
INIT_KIND = one_of(*INIT_KINDS)
# As the kernel and qemu call architectures, as Debian calls them, and qemu's machine for them.
ARCHES = {"x86_64": ("amd64", "q35"), "aarch64": ("arm64", "virt")}
ARCH = one_of(*ARCHES)
FIRMWARE_KIND = one_of("bios", "uefi", "secure")
NETWORK_KIND = one_of("auto", "bridge", "private")

SETTINGS = (
    Setting("vmBaseDir", str, "", "config", "the VM tree"),
    Setting("vmMem", MEMORY_MB, "512", "both", "memory in MB of new templates", inherited=True, harmless=True),
    Setting("vmCpu", CPU_COUNT, "2", "both", "processors, likewise", inherited=True, harmless=True),
    Setting("vmCpuCap", CPU_CAP, "", "both", "per cent of a processor; 0: no limit", inherited=True, harmless=True),
    Setting("vmCreateDiskSize", DISK_GB, "10", "config", "disk size in GB of new templates", harmless=True),
    Setting("vmCount", CLONE_COUNT, "1", "config", "how many clones vminstantiate makes", harmless=True),
    Setting("vmGroup", str, "group", "config", "the group of new clones", harmless=True),
    Setting("vmSubGroup", str, "default", "config", "the type of new clones", harmless=True),
    Setting("vmDefaultGroup", str, "", "config", "the same as vmGroup", harmless=True),
    Setting("vmDefaultSubGroup", str, "", "config", "the same as vmSubGroup", harmless=True),
    Setting("vmCreateGroup", str, "templates", "config", "the group of vmcreate's VMs; no other yet", harmless=True),
    Setting("isoDir", str, "~/Documents/distribs/linux", "config", "where ISO images are looked up by name"),
    Setting("vmDiskExt", one_of("img", "qcow2"), "img", "config", "the extension of disk images"),
    Setting("vmUser", LOGIN_NAME, "root", "both", "who vmssh and ansible log in as", inherited=True),
    Setting("vmAccel", one_of("auto", "kvm", "tcg"), "auto", "both", "kvm (hardware), tcg (software)", inherited=True),
    Setting("vmNetwork", NETWORK_KIND, "auto", "both", "bridge (the host's), private (no root), auto"),
    Setting("vmHostAccess", yes_no, "no", "config", "yes: VMs may open connections to the host itself"),
    Setting("vmStopTimeout", SECONDS, "30", "config", "seconds that a guest has to shut down", harmless=True),
    Setting("vmWaitTimeout", SECONDS, "300", "config", "seconds to wait for a VM to be ready", harmless=True),
    Setting("vmDownloadTimeout", whole_number(1, 3600, "seconds"), "30", "config", "seconds that a download may stall",
            harmless=True),
    Setting("vmExtraOpts", str, "", "both", "more words for qemu's command line", inherited=True),
    Setting("vmQemu", str, "", "config", "the qemu program, by default qemu-system-ARCH or /usr/libexec/qemu-kvm"),
    Setting("vmBridgeHelper", str, "", "config", "the qemu-bridge-helper program"),
    Setting("vmVirtiofsd", str, "", "config", "the virtiofsd program, which shares folders"),
    Setting("vmInventoryHosts", one_of("address", "name"), "address", "config", "what ansible's hosts are called"),
    Setting("bridgeInterface", INTERFACE_NAME, "nocloud", "config", "the host's bridge"),
    Setting("bridgeAddress", IPV4_PREFIX, "192.168.1.1/24", "config", "its address"),
    Setting("bridgeNet", IPV4_PREFIX, "192.168.1.0/24", "config", "its network"),
    Setting("bridgeSubnet", str, "192.168.1", "config", "the first three numbers of that network"),
    Setting("bridgeIpAddress", IPV4_ADDRESS, "192.168.1.1", "config", "the bridge's address without the mask"),
    Setting("bridgeDhcpStart", IPV4_ADDRESS, "192.168.1.2", "config", "the first address that VMs get"),
    Setting("bridgeDhcpStop", IPV4_ADDRESS, "192.168.1.254", "config", "the last one"),
    Setting("bridgeLeases", str, "", "config", "the DHCP server's lease file"),
    Setting("vmName", str, "", "vm", "its name"),
    Setting("vmDisk", str, "", "vm", "its system disk, relative to vmBaseDir"),
    Setting("vmExtraDisk", str, "", "vm", "its other disks, comma-separated"),
    Setting("vmDiskFormat", IMAGE_FORMATS, "", "vm", "the format of each disk, found out once and kept"),
    Setting("vmPlugged", whole_number(0, 4), "0", "vm", "how many of its disks, the last ones, came while it runs"),
    Setting("vmUuid", UUID, "", "vm", "its UUID, made once and kept"),
    Setting("vmMac", MAC_ADDRESS, "", "vm", "its network card's address"),
    Setting("vmAddress", IPV4_ADDRESS, "", "vm", "its IPv4 address"),
    Setting("vmTemplate", str, "", "vm", "the template that it was cloned from"),
    Setting("vmInit", INIT_KIND, "ssh", "vm", "how hostname and keys get into it", inherited=True),
    Setting("vmMachine", MACHINE_TYPE, "", "vm", "qemu's machine type; none: pc, as bash ran it", inherited=True),
    Setting("vmArch", ARCH, "x86_64", "vm", "its processor's architecture: x86_64 or aarch64", inherited=True),
    Setting("vmFirmware", FIRMWARE_KIND, "bios", "vm", "bios, uefi, or secure (signed systems)", inherited=True),
    Setting("vmTpm", yes_no, "no", "vm", "yes: it has a TPM 2.0 (swtpm)", inherited=True),
    Setting("vmLayout", one_of("1", "2"), "1", "vm", "which devices it has besides; those that had fewer keep theirs"),
    Setting("vmBalloon", yes_no, "yes", "vm", "yes: memory that it has no use for goes back to the host"),
    Setting("vmCold", yes_no, "no", "both", "yes: it boots at its first start, too", harmless=True),
    Setting("vmGui", yes_no, "no", "vm", "yes: it has a screen"),
    Setting("vmKernel", str, "", "vm", "a kernel to boot directly", inherited=True),
    Setting("vmInitrd", str, "", "vm", "its initial ramdisk", inherited=True),
    Setting("vmAppend", str, "", "vm", "its command line", inherited=True),
    Setting("vmPorts", PORTS, "", "vm", "ports of this host that lead to it: IP:HOST:GUEST, comma-separated"),
    Setting("vmShares", SHARES, "", "vm", "folders of this host, HOSTDIR:GUESTDIR[:rw], comma-separated"),
    Setting("vmSource", str, "", "vm", "where a template came from"),
    Setting("vmChecksum", str, "", "vm", "the checksum of what it was made from"),
    *(
        Setting(key, str, "", "unused", "of old configuration files; not used", harmless=True)
        for key in (
            "netInterface", "vmMemVid", "vmSpicePassword", "vmBackend", "vmSystemType", "vmConfExt", "vmPidExt",
            "vmDefaultContext", "vmDefaultType", "vmCreateContext", "vmCreateType",
        )
    ),
)  # fmt: skip
SETTING = {setting.key: setting for setting in SETTINGS}


@record
class Assignment:
    """A KEY=VALUE line of a file: its line number, the value after expansion, and the variables it named."""

    line: int
    key: str
    value: str
    used: set[str]


# Compiled at first use: most commands of a user without a configuration file read none.
_PLAIN = r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=([A-Za-z0-9_./:,+@%-]*)(?:[ \t]+#.*|[ \t]*)$"
_START = r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)="
_VARIABLE = r"\$(?P<brace>\{)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?(brace)(?::-(?P<word>[^{}`$\\\"']*))?\})"
# The pieces of a value, outside double quotes and inside; which of the two it is, each `"` changes.
_PIECES = (
    rf"""(?P<quote>")|{_VARIABLE}|'(?P<single>[^'\0]*)'|\\(?P<char>[^\0])|(?P<text>[^ \t'"$\\`;&|<>(){{}}\0]+)""",
    rf"""(?P<quote>")|{_VARIABLE}|\\(?P<char>["$\\`])|(?P<text>[^"$\\`\0]+|\\)""",
)


def split_lines(text: str) -> list[str]:
    """The lines of a file.  str.splitlines() also splits at characters that bash takes as part of a value."""
    return text.rstrip("\n").split("\n") if text.strip("\n") else []


def parse_assignments(text: str, name: str, known: MutableMapping[str, str]) -> list[Assignment]:
    """The assignments of a file in the sh subset that the contract allows; `known` are the variables it may use.
    Raises UsageError naming FILE:LINE for anything else: a command, a substitution, an open quote."""
    variables = ChainMap[str, str]({}, known)
    found: list[Assignment] = []
    match = re.compile(_PLAIN, re.ASCII).match
    for number, raw in enumerate(split_lines(text), 1):
        line = raw.strip(" \t\r")
        if not line or line[0] == "#":
            continue
        plain, used = match(line), set[str]()
        try:
            if plain:
                key, value = plain.groups()
            else:
                if not (start := re.compile(_START, re.ASCII).match(line)):
                    raise ValueError(f"not a KEY=value line: {line[:60]!r}")
                key, value = start.group(1), _read_value(line[start.end() :], variables, used)
        except ValueError as error:
            hint = "only KEY=value lines with quotes, $VAR and comments are read, never run"
            raise UsageError(f"{name}:{number}: {error}", hint) from None
        variables[key] = value
        found.append(Assignment(number, key, value, used))
    return found


def _read_value(text: str, variables: Mapping[str, str], used: set[str]) -> str:
    """A value, perhaps a comment: bare words, '…' and "…" side by side, as sh joins them; `used` gets its variables.
    Raises ValueError where what no piece of a value begins with is neither a comment nor nothing."""
    patterns = [re.compile(each, re.ASCII) for each in _PIECES]
    home = re.match(r"~(?=[/\s]|$)", text)
    parts = [os.path.expanduser("~")] if home else []
    position, quoted = home.end() if home else 0, False
    while piece := patterns[quoted].match(text, position):
        position = piece.end()
        if piece["quote"]:
            quoted = not quoted
        elif piece["name"]:
            used.add(piece["name"])
            parts.append(variables.get(piece["name"]) or piece["word"] or "")
        else:
            parts.append(piece[piece.lastgroup or 0])
    char, comment = text[position : position + 1], text[position:].lstrip(" \t")
    said = {
        "$": "a '$' that is neither $NAME, ${NAME} nor ${NAME:-word}: commands are not run here",
        "'": "a ' that is not closed",
        "\\": "a \\ at the end of the line: a value is one line",
    }
    if quoted and char != "$":
        raise ValueError(f"{char!r} in quotes: commands are not run here" if char else 'a " that is not closed')
    if char not in ("", " ", "\t"):
        raise ValueError(said.get(char, f"{char!r} outside quotes: commands are not run here"))
    if comment and comment[0] != "#":
        raise ValueError(f"more than one word after '=': {comment[:40]!r} (quote the value)")
    return "".join(parts)


def quote_value(value: str) -> str:
    """`value` as bash and parse_assignments read it back."""
    if re.fullmatch(r"[A-Za-z0-9_./:,+@%-]*", value):
        return value
    if "\n" in value or "\r" in value or "\0" in value:
        raise UsageError(f"{value[:40]!r}: a value is one line")
    return "'" + value.replace("'", "'\\''") + "'"


def update_assignments(text: str, changes: Mapping[str, str]) -> str:
    """`text` with these keys set: in their own lines where they have one, else at the end; all else is kept."""
    left = dict(changes)
    lines: list[str] = []
    for line in split_lines(text):
        start = re.compile(_START, re.ASCII).match(line.strip(" \t"))
        key = start.group(1) if start else ""
        if key not in changes:
            lines.append(line)
        elif key in left:
            lines.append(f"{key}={quote_value(left.pop(key))}")
    lines += [f"{key}={quote_value(value)}" for key, value in left.items()]
    return "\n".join(lines) + "\n"


def checked(check: Callable[[str], Any], text: str, what: str) -> Any:
    """What a check makes of a text.  Raises UsageError, which begins with `what`, where it expected another one."""
    try:
        return check(text)
    except ValueError as error:
        raise UsageError(f"{what}: expected {error}") from None


def check_setting(key: str, value: str, origin: str) -> None:
    """Raise UsageError, naming `origin`, where the value isn't one that the key takes."""
    setting = SETTING.get(key)
    if setting and (value or setting.default):
        checked(setting.check, value, f"{origin}: {key}={value}")


class Config:
    """The settings in force: the defaults, then each file, then the environment."""

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._values = {setting.key: setting.default for setting in SETTINGS if setting.where in ("config", "both")}
        self._values.update(values or {})

    def __getitem__(self, key: str) -> str:
        return self._values[key]

    def number(self, key: str) -> int:
        return int(self._values[key])

    def set(self, key: str, value: str, origin: str) -> None:
        check_setting(key, value, origin)
        empty = SETTING[key].default if SETTING[key].check is yes_no else ""  # as in a VM's conf
        self._values[key] = value or empty
        same = {"vmDefaultGroup": "vmGroup", "vmDefaultSubGroup": "vmSubGroup"}.get(key)
        if same and value:
            self._values[same] = value

    def read(self, path: str, warn: Callable[[str], None] = report.warn) -> None:
        """Take the settings of a file, if others can't write to it; `warn` is told of that, and of unknown keys."""
        text, reason = read_trusted(path)
        if reason:
            warn(f"{path} is skipped: {reason}")
            return
        allowed = path != LOCAL_CONF or is_allowed(path, text)
        try:
            self.take(text, path, warn, allowed)
        except UsageError as error:
            if allowed:
                raise
            warn(str(error))  # somebody's repository keeps no one from working

    def take(self, text: str, path: str, warn: Callable[[str], None], allowed: bool = True) -> None:
        """Take the settings of a file's text; where it isn't `allowed` to set all, only the harmless ones."""
        assignments = parse_assignments(text, path, ChainMap(self._values, os.environ))
        used = {name for assignment in assignments for name in assignment.used}
        refused = []
        for assignment in assignments:
            origin = f"{path}:{assignment.line}"
            if assignment.key in SETTING and not (allowed or SETTING[assignment.key].harmless):
                refused.append(assignment.key)
            elif assignment.key in SETTING:
                self.set(assignment.key, assignment.value, origin)
            elif assignment.key not in used:
                warn(f"{origin}: unknown key {assignment.key}{did_you_mean(assignment.key, SETTING, before=', ')}")
        if refused:
            warn(f"{path}: not used, as they can have things run or opened: {', '.join(refused)} ({ALLOW} allows them)")

    def read_environment(self) -> None:
        """Take the settings of the environment's variables."""
        by_name = {f"NOCLOUD_{key}".upper(): key for key in SETTING}
        for name, value in os.environ.items():
            if key := by_name.get(name.upper()):
                self.set(key, value, name)
        if os.environ.get("NOCLOUD_NOKVM", "") not in ("", "0"):
            self.set("vmAccel", "tcg", "NOCLOUD_NOKVM")


def program_path() -> str:
    """The real file of this program: the zipapp, or nocloud.py in a checkout."""
    archive = getattr(globals().get("__loader__"), "archive", None)  # a zipimporter's
    return os.path.realpath(archive or __file__)


def packaged(name: str, place: str = "etc") -> str:
    """The text of a file of `etc/` (or `systemd/`) as it came with the program: beside it, in the zipapp inside it; ''
    where there is none: nocloud.py copied alone does what needs none of them."""
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), place, name)
    with contextlib.suppress(OSError):
        return bytes.decode(globals()["__loader__"].get_data(path))
    return ""


def need_packaged(name: str, place: str = "etc") -> str:
    """packaged() of a file that the work can't be done without.  Raises Error where it isn't there."""
    if text := packaged(name, place):
        return text
    raise Error(f"{place}/{name} is missing: {program_path()} was copied without it", "nocloud.pyz is all in one file")


def guest_script(name: str, root: bool = False, **given: object) -> str:
    """A script of etc/guest for a guest's shell, after assignments of what it is given; `root`: it is run by root, or
    by a login that may become root without a password."""
    values = "".join(f"{key}={shlex.quote(str(value))}\n" for key, value in given.items())
    script = values + need_packaged(f"guest/{name}")
    return f's=; [ "$(id -u)" = 0 ] || s="sudo -n"; exec $s sh -c {shlex.quote(script)}' if root else script


def filled(text: str, words: Mapping[str, Any]) -> str:
    """A packaged text, its words between two @ filled in."""
    return re.sub(r"@(\w+)@", lambda found: str(words[found[1]]), text)


def packaged_list(name: str) -> list[str]:
    """The lines of a packaged file but for comments and empty ones."""
    return [line for line in packaged(name).splitlines() if line and not line.startswith("#")]


def packaged_files(folder: str) -> list[str]:
    """The paths, relative to it and sorted, of all files below a folder of `etc/`; packaged() reads them."""
    origin, start = os.path.dirname(os.path.realpath(__file__)), os.path.join("etc", folder, "")
    if os.path.isfile(origin):
        with zipfile.ZipFile(origin) as archive:
            names = archive.namelist()
    else:
        walk = os.walk(os.path.join(origin, start))
        names = [os.path.relpath(os.path.join(place, name), origin) for place, _, files in walk for name in files]
    return sorted(name[len(start) :] for name in names if name.startswith(start))


def home_folder() -> str:
    """The user's home; /nonexistent where there is none, so that nothing lands in the current folder, or in /."""
    path = os.path.expanduser("~") if os.environ.get("HOME", "~") else ""
    return path if os.path.isabs(path) else "/nonexistent"


def config_home() -> str:
    """nocloud's own configuration folder, where its key lies."""
    return os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.join(home_folder(), ".config"), "nocloud")


def own_prefix() -> str:
    """PREFIX of this program where it is installed, else where installations go by default."""
    folder, name = os.path.split(program_path())
    return os.path.dirname(folder) if (os.path.basename(folder), name) == ("bin", "nocloud") else "/usr/local"


def cache_home() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(home_folder(), ".cache"), "nocloud")


def installed_settings() -> str:
    """The settings file of an installation: PREFIX/etc/nocloud_net.conf, beside PREFIX/bin."""
    return os.path.join(os.path.dirname(os.path.dirname(program_path())), "etc", "nocloud_net.conf")


LOCAL_CONF = "./.nocloud.conf"
ALLOW = f"nocloud trust {LOCAL_CONF}"


def config_files() -> list[str]:
    """The files to read, in order: the installation's, the first of the user's that may be used (and those before it,
    which are told of and skipped), and on top of it the current folder's."""
    names = ("~/.nocloud.conf", f"{config_home()}/nocloud.conf", "/etc/nocloud.conf")
    own = list(filter(os.path.isfile, map(os.path.expanduser, names)))
    first = next((number for number, path in enumerate(own) if not untrusted(path)), len(own))
    found = [*filter(os.path.isfile, [installed_settings()]), *own[: first + 1]]
    is_local = os.path.isfile(LOCAL_CONF) and not any(os.path.samefile(path, LOCAL_CONF) for path in found)
    return [*found, *([LOCAL_CONF] if is_local else [])]


def allowing_line(path: str, text: str) -> str:
    """What `trusted` says of a file that is allowed as it is: a line of sha256sum(1)."""
    return f"{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()}  {os.path.realpath(path)}"


def is_allowed(path: str, text: str) -> bool:
    place = os.path.join(config_home(), "trusted")
    return os.path.isfile(place) and allowing_line(path, text) in split_lines(read_trusted(place)[0])


def allow_file(path: str) -> None:
    """Have all settings of a file count as long as it is what it is now.  Raises Error where that can't be."""
    text, reason = read_trusted(path)
    line = allowing_line(path, text)
    if reason or not line.isprintable():
        raise Error(f"{path}: {reason or 'its path has control characters'}", "use a copy of your own")
    Config().read(os.path.realpath(path))
    make_private_folder(config_home())
    append_line(os.path.join(config_home(), "trusted"), line)


def load_config() -> Config:
    """The configuration in force.  Raises UsageError for a file or a variable that is wrong."""
    config = Config()
    for path in config_files():
        config.read(path)
    config.read_environment()
    return config


def base_folder(config: Config) -> str:
    """vmBaseDir as an absolute path without symlinks; its default is the bash tools' place if that is there."""
    path, old = os.path.expanduser(config["vmBaseDir"]), os.path.expanduser("~/Documents/kvm/VMs")
    if not path:
        data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
        path = old if os.path.isdir(old) else os.path.join(data, "nocloud", "kvm")
    if path.startswith("~"):
        raise UsageError(f"vmBaseDir={path}: no such user or no home folder", "set vmBaseDir to an absolute path")
    return os.path.realpath(path)


# Programs ############################################################################################
#
# The only place that starts processes: argv lists, never a shell, a fixed locale, nothing on stdin unless given.

# The package manager, how it installs, its column of etc/packages, counted after the program's, and the distributions
# that have it, as os-release names them.
_INSTALLERS = (
    ("apt-get", "apt install", 0, ("debian", "ubuntu")), ("dnf", "dnf install", 1, ("fedora", "rhel")),
    ("pacman", "pacman -S", 2, ("arch",)),
)  # fmt: skip
GUEST_OUTPUT = 64 << 10  # how much of what a guest says is kept: the last bytes


def find_program(name: str) -> str:
    """The path of a program, or ''.  The sbin folders are looked in too: a Debian user's PATH lacks them."""
    places = [*os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/local/sbin", "/usr/sbin", "/sbin"]
    paths = (os.path.join(place, name) for place in places if place)  # of a `name` that is a path: that path
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), "")


def need_program(name: str) -> str:
    """The path of a program; raises MissingProgram with the command that installs it here."""
    if path := find_program(name):
        return path
    base = os.path.basename(name)
    raise MissingProgram(f"{base}: not found; it is needed for this", install_command(base))


def os_release() -> dict[str, str]:
    """os-release(5) of the host; empty where there is none."""
    return parse_os_release(read_existing("/etc/os-release"))


def parse_os_release(text: str) -> dict[str, str]:
    return dict(re.findall(r"""^(\w+)=["']?([^"'\n]*)["']?$""", text, re.M))


def choose_installer(release: Mapping[str, str]) -> tuple[str, int]:
    """(how packages are installed, column of etc/packages) with the package managers that are there, or ("", 0).  The
    distribution decides between several: Debian has a game called pacman, and dnf as well."""
    family = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    rows = [row for row in _INSTALLERS if find_program(row[0])]
    rows.sort(key=lambda row: not set(row[3]) & set(family))
    return (rows[0][1], rows[0][2]) if rows else ("", 0)


def package_of(program: str, column: int) -> str:
    """The package that brings a program; the program's own name where the table has nothing else."""
    names = (program, f"{program}@{os_release().get('VERSION_CODENAME')}")
    rows = (line.split() for line in packaged_list("packages"))
    return next((packages[column] for name, *packages in rows if name in names), program)


def install_command(*programs: str) -> str:
    """The command that installs these programs here, or advice where no package manager is known."""
    words, column = choose_installer(os_release())
    packages = dict.fromkeys(package_of(program, column) for program in programs)
    if not words:
        return f"install {' and '.join(programs)} from your distribution's packages"
    return f"sudo {words} {' '.join(packages)}"


def traced(argv: Sequence[str]) -> list[str]:
    """`argv` with the program's path, as it is about to run: shown under --debug.  Raises MissingProgram."""
    words = [need_program(argv[0]), *argv[1:]]
    if report.debug:
        report.say(f"+ {quoted(*words)}")
    return words


def popen(argv: Sequence[str], env: Mapping[str, str] | None = None, **how: Any) -> subprocess.Popen[bytes]:
    """Start a program, `how` as subprocess.Popen says; in English, stdin empty by default.  Raises MissingProgram."""
    inherited = {key: value for key, value in os.environ.items() if key != "LANGUAGE"}
    environment = {**inherited, "LC_ALL": "C.UTF-8", **(env or {})}
    return subprocess.Popen(traced(argv), env=environment, **{"stdin": subprocess.DEVNULL, **how})


def run(
    argv: Sequence[str],
    *,
    input: bytes | None = None,
    check: bool = True,
    timeout: float | None = 60,
    merge: bool = True,
    **how: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, `how` as for popen(); its stdout as text, its stderr mixed in unless `merge` is off.
    Raises MissingProgram, CommandFailed (unless `check` is off) and TimedOut after `timeout` seconds."""
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    stderr = subprocess.STDOUT if merge else subprocess.PIPE
    with popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, **how) as child:
        cancellation.children.add(child)
        try:
            said = child.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            raise TimedOut(f"{argv[0]}: no end after {timeout:.0f} s") from None
        except BaseException:
            child.kill()
            raise
        finally:
            cancellation.children.discard(child)
    output, errors = ((each or b"").decode("utf-8", "replace") for each in said)
    if check and child.returncode:
        raise CommandFailed(argv, child.returncode, output + errors)
    return subprocess.CompletedProcess(argv, child.returncode, output, errors)


def piped(source: Sequence[str], argv: Sequence[str]) -> Iterator[bytes]:
    """What a program makes of what another one writes, in pieces of 1 MB.  Raises CommandFailed where it fails."""
    pipe = subprocess.PIPE
    with popen(source, stdout=pipe) as first, popen(argv, stdin=first.stdout, stdout=pipe, stderr=pipe) as child:
        assert first.stdout and child.stdout and child.stderr
        first.stdout.close()  # ours
        yield from iter(functools.partial(child.stdout.read, MIB), b"")
        said = child.stderr.read().decode("utf-8", "replace")
    if child.returncode:
        raise CommandFailed(argv, child.returncode, said)


def flush(path: str) -> None:
    """Have all that was written to a file system on its disk: one flush for many files (syncfs(2), by coreutils)."""
    run(["sync", "-f", path], timeout=None)


def land(moves: Mapping[str, str]) -> None:
    """Rename files or folders of one file system into place: their content is on the disk before, their names after."""
    for part, path in moves.items():
        flush(part)
        os.rename(part, path)
    flush(path)


def end_session(leader: subprocess.Popen[bytes], seconds: float | None) -> None:
    """End a program and its session.  SIGTERM first, and `seconds` (None: all that it wants) to clean up: ssh takes its
    ProxyCommand with it, mmdebstrap its half-made system."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(leader.pid, number)
            leader.wait(seconds)


def run_watched(
    argv: Sequence[str],
    on_line: Callable[[str], None] = lambda line: None,
    timeout: float = 0,
    host: Process | None = None,
    **how: Any,
) -> tuple[int, str]:
    """Run a long program, or one that a guest has write what it likes, `how` as for popen(), each line going to
    `on_line`; (exit status, the last GUEST_OUTPUT bytes of what it wrote).  Its session ends when we are interrupted,
    with TimedOut after `timeout` seconds (0: never), and as soon as `host` has ended, the qemu that it talks to."""
    child = popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **how)
    assert child.stdout
    cancellation.children.add(child)
    deadline = time.monotonic() + (timeout or float("inf"))
    said = rest = b""
    try:
        with child.stdout as output:
            while True:
                if time.monotonic() > deadline:
                    raise TimedOut(f"{argv[0]}: no end after {timeout:.0f} s")
                if host and host.ended():
                    end_session(child, 5)
                    break
                if readable(output, 0.25):
                    if not (piece := os.read(output.fileno(), 65536)):
                        break
                    said = (said + piece)[-GUEST_OUTPUT:]
                    *lines, rest = (rest + piece).split(b"\n")
                    rest = rest[-GUEST_OUTPUT:]
                    for line in lines:
                        on_line(line[-GUEST_OUTPUT:].decode("utf-8", "replace"))
        if rest:
            on_line(rest.decode("utf-8", "replace"))
        return child.wait(), said.decode("utf-8", "replace")
    except BaseException:
        end_session(child, 5 if timeout else None)
        raise
    finally:
        cancellation.children.discard(child)


def try_run(argv: Sequence[str], timeout: float, guest: bool = False) -> tuple[int, str]:
    """(exit status, output) of a program that may fail; (-1, why) where it doesn't end within `timeout` seconds.  Where
    a `guest` has it write what it likes, only the end of that is kept."""
    try:
        if guest:
            return run_watched(argv, timeout=timeout)
        done = run(argv, check=False, timeout=timeout)
    except TimedOut as error:
        return -1, str(error)
    return done.returncode, done.stdout


_spawned: set[subprocess.Popen[bytes]] = set()


def reap() -> None:
    """Take the exit statuses of what was spawned and has ended: while we live, it would be a zombie."""
    _spawned.difference_update([child for child in list(_spawned) if child.poll() is not None])


def spawn(argv: Sequence[str], log: str, **how: Any) -> subprocess.Popen[bytes]:
    """popen() of a program that outlives us: a session of its own, its output appended to the file `log` (0600)."""
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as output:
        child = popen(argv, stdout=output, stderr=output, start_new_session=True, **how)
    _spawned.add(child)
    return child


def become(argv: Sequence[str]) -> None:
    """Replace this process by a program: stdin, terminal and exit status are then the program's own."""
    words = traced(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec hands that on
        signal.signal(number, signal.SIG_DFL)
    os.execv(words[0], words)


# prctl(2), PR_SET_PDEATHSIG: set where nothing but an exec follows, for entering a namespace would clear it.
TIE = ("setpriv", "--pdeathsig", "KILL", "--")


def tie(words: Sequence[str]) -> list[str]:
    """Words that run others so that they end when this process does, also where it was killed before they knew."""
    return [*TIE, "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid()), *words]


def user_name(uid: int | None = None) -> str:
    """The login of a user, by default of whoever calls this; his number where he has none, as in some containers."""
    uid = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# As in the `#!` line: paths have one codec, whatever the locale, in confs, in /proc and for qemu.
PYTHON_OPTIONS = ("-X", "utf8", "-IS")


def self_argv(*words: str) -> list[str]:
    """The argv that calls this program again, with the same interpreter and the caller's PYTHON* variables unheeded."""
    return [sys.executable or "python3", *PYTHON_OPTIONS, program_path(), *words]


def ensure_utf8() -> None:
    """Begin again in UTF-8 mode where `python3 nocloud.pyz` was called in a locale that has another codec."""
    if sys.executable and sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, *PYTHON_OPTIONS, *sys.argv])


def fork_session() -> int:
    """fork(2): the child's pid, and 0 in the child, which goes on as we are, in a session of its own."""
    pid = os.fork()
    if not pid:
        os.setsid()
    return pid


def fork_child(work: Callable[[], None], keep: Sequence[int]) -> int:
    """Do `work` in a child, a session of its own, that keeps nothing of ours but the descriptors `keep`; its pid.  It
    closes nothing by itself: our locks, and the pipe of a caller's `$(...)`, would live as long as it does.  What
    `work` imports must have been imported before: another thread may hold the import lock."""
    import ctypes  # noqa: F401
    import subprocess  # noqa: F401

    if pid := fork_session():
        return pid
    try:
        signal.set_wakeup_fd(-1)  # a supervisor's, shared with us
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in keep:
                os.closerange(fd, fd + 1)  # which passes over the listing's own, closed by now
        work()
    finally:
        os._exit(EXIT_FAILED)


class Process(contextlib.AbstractContextManager["Process"]):
    """A process that we may signal, held by a pidfd: its number can't become another's meanwhile."""

    def __init__(self, pid: int) -> None:
        if pid <= 1:
            raise WrongState(f"process {pid} is none of ours")
        self.pid = pid
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = -1

    def fileno(self) -> int:
        """The pidfd, which becomes readable when the process ends; -1 where it has ended before."""
        return self._fd

    def signal(self, number: int) -> None:
        if self._fd >= 0:
            try:
                signal.pidfd_send_signal(self._fd, number)
            except ProcessLookupError:
                pass
            except PermissionError:
                said = f"process {self.pid} belongs to another user"
                raise Error(said, "call this as that user, or as root") from None

    def ended(self, seconds: float = 0) -> bool:
        """Whether it has ended, waiting for that up to `seconds`."""
        return self._fd < 0 or readable(self._fd, seconds)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- how much processor time a process gets

CGROUPS = "/sys/fs/cgroup"
CPU_PERIOD = 100_000  # in µs: the kernel's default, and systemd's
# cgroups(7): by version 1's controller, or version 2, the folder, the file that limits, and its text for a quota in µs
CPU_LIMITS = {"cpu": ("cpu/", "cpu.cfs_quota_us", "{}"), "": ("", "cpu.max", f"{{}} {CPU_PERIOD}")}


@functools.cache
def scope_words(percent: int) -> list[str]:
    """What has systemd start a program in a scope, root's or the user's, that gets at most that much of one processor;
    none for 0, and where systemd makes none here."""
    user, quota = ["--user"] if os.geteuid() else [], f"--property=CPUQuota={percent}%"
    words = ["systemd-run", *user, "--scope", "--quiet", "--collect", quota, "--"]
    can = percent and os.path.isdir("/run/systemd/system") and find_program(words[0])
    return words if can and not try_run([*words, "true"], 10)[0] else []


def limit_process(pid: int, percent: int, name: str) -> bool:
    """Whether a process gets at most that much of one processor: by its scope, or else a cgroup that is made now."""
    quota = str(percent * CPU_PERIOD // 100)
    for folder, file, text in () if scope_words(percent) else CPU_LIMITS.values():
        place = f"{CGROUPS}/{folder}{name}"
        try:
            os.mkdir(place)
            for path, said in ((f"{place}/{file}", text.format(quota)), (f"{place}/cgroup.procs", str(pid))):
                with open(path, "r+") as stream:  # never made: it isn't there where this is no cgroup
                    stream.write(said)
        except OSError:
            remove_empty(place)
    found = [line.split(":", 2) for line in process_file(pid, "cgroup").splitlines()]
    limits = [(*CPU_LIMITS[kind], path) for _, kinds, path in found for kind in kinds.split(",") if kind in CPU_LIMITS]
    return any(read_existing(f"{CGROUPS}/{at}{path}/{file}").split()[:1] == [quota] for at, file, _, path in limits)


# Disks ###############################################################################################
#
# qemu-img.  An image's format is found out once, when it comes in, checked, and always named from then on.


class WrongImage(Error):
    """A file that can't be a VM's disk."""


def image_info(path: str, format: str) -> dict[str, Any]:
    """`qemu-img info` of an image of this format; raises WrongImage where it can't be read.  -U: a running VM locks it.
    Absolute, here and below: a relative name with a colon would be a protocol (nbd:HOST:PORT, json:{…})."""
    try:
        answer = run(["qemu-img", "info", "-U", "--output=json", "-f", format, os.path.abspath(path)], merge=False)
    except CommandFailed as failed:
        raise WrongImage(f"{path}: not a disk image that qemu-img can read: {last_line(failed.output)}") from None
    info: dict[str, Any] = json.loads(answer.stdout)
    return info


# What is given instead of a disk: where it has which bytes (see file(1)), what it is, what helps.
PACKERS = {"gzip": b"\x1f\x8b", "xz": b"\xfd7zXZ\0", "bzip2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}
FORMATS = {"vmdk": b"KDMV", "vhdx": b"vhdxfile", "vpc": b"conectix", "vdi": b"<<< "}
NO_DISKS = (
    (0x8001, b"CD001", "an ISO image", "vmcreate -n NAME -i {}"),
    (0, b"LUKS\xba\xbe", "an encrypted disk (LUKS)", "cryptsetup open {} X; dd if=/dev/mapper/X of=X.img"),
    (257, b"ustar", "a tar archive, as OVA files are", "tar -xf {}"),
    (0, b"PK\3\4", "a zip archive", "unzip {}"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {}"),
    *((0, magic, f"compressed by {name}", f"{name} -d {{}}") for name, magic in PACKERS.items()),
    *((0, magic, f"a {name} image", "qemu-img convert -O qcow2 {} NEW") for name, magic in FORMATS.items()),
)


def foreign_image_format(path: str, shown: str = "") -> str:
    """The format of an image from outside, called `shown`: qcow2 or raw, whole, on no other file; else raises
    WrongImage. qemu-img isn't asked: an image may name any of the host's files as its backing or data, for guests to
    read."""
    shown = shown or path
    with open(path, "rb") as file:
        head = file.read(0x8006)
    for offset, magic, what, way in NO_DISKS:
        if head.startswith(magic, offset):
            name = path if shown == path else shown.rpartition("/")[2]
            raise WrongImage(f"{shown}: {what}; only qcow2 and raw are taken", way.format(quoted(name)))
    header, size = qcow2_header(path), os.path.getsize(path)
    if header and (header.outside or header.backing):
        how = f"stands on another file, {header.backing}" if header.backing else "keeps its data in another file"
        raise WrongImage(f"{shown}: refused: the image {how}")
    if header and image_info(path, "qcow2").get("encrypted"):
        raise WrongImage(f"{shown}: refused: the image is encrypted", "see qemu-img(1), --object secret")
    if not header and not looks_bootable(path):
        said = f"{shown}: neither a qcow2 image nor a raw disk with a boot sector"
        raise WrongImage(said, "is it a disk image at all?")
    if (header.end if header else partitions_end(head)) > size or (header and not is_sound(path)):
        said = f"{shown}: it ends before its data does, or is damaged: an incomplete download?"
        raise WrongImage(said, "get it again, and compare its checksum")
    return "qcow2" if header else "raw"


def partitions_end(head: bytes) -> int:
    """Where the partitions of a raw disk end, in bytes; 0 where it has none: its file system may begin in sector 0.
    GPT: the last sector, where its copy is, at byte 32 of the header in sector 1 (UEFI 2.10, 5.3.2).  MBR: four entries
    from byte 446 on: flag, type, first sector, number of sectors."""
    if head[512:520] == b"EFI PART":
        return 512 * (1 + int.from_bytes(head[544:552], "little"))
    entries = [struct.unpack_from("<B3xB3xII", head, at) for at in range(446, 510, 16)]
    if (head[11:13] == b"\0\2" and head[21] >= 0xF0) or any(flag & 0x7F for flag, *_ in entries):
        return 0  # FAT or NTFS: bytes in a sector, kind of medium
    return 512 * max(first + count if kind not in (0, 0xEE) else 0 for _, kind, first, count in entries)


def looks_bootable(path: str) -> bool:
    """Whether a raw image begins with a boot sector (55 AA at its end): any file at all is "raw" to qemu-img."""
    with open(path, "rb") as file:
        return file.read(512)[510:512] == b"\x55\xaa"


@record
class Qcow2:
    """What the header of a qcow2 image says: the file that it stands on, or '', and the format of that, or '';
    `outside`: its data is in another file; `end`: where its tables end in the file, `size`: its guest's disk; bytes."""

    backing: str
    format: str
    outside: bool
    end: int
    size: int


def qcow2_header(path: str) -> Qcow2 | None:
    """The header of a qcow2 image (QEMU docs/interop/qcow2.txt); None: it is none.  Big-endian magic, version, offset
    (in the first cluster, of 2 MB at most) and length of the backing file's name, where the tables are; bit 2 of
    version 3's incompatible features is the data file; extension 0xE2792ACA is the backing file's format. qemu-img
    takes 15 ms, and opens what that names.  What is no regular file isn't opened: a guest may have led us here."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return None
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        head = file.read(4096).ljust(4096, b"\0")
        magic, version, offset, length, bits, disk, *tables, features, position = struct.unpack_from(
            ">4sIQIIQ4xIQQI12xQ20xI", head
        )
        if magic != b"QFI\xfb":
            return None
        file.seek(min(offset, 2 * MIB))
        name = file.read(min(length, 1023)).partition(b"\0")[0] if offset else b""
    kind, size, position, format = 1, 0, position if version >= 3 else 72, b""
    while kind and position <= len(head) - 8:
        kind, size = struct.unpack_from(">II", head, position)
        format = head[position + 8 : position + 8 + size] if kind == 0xE2792ACA else format
        position += 8 + (size + 7) // 8 * 8
    entries, l1, refcounts, clusters = tables
    end = max(l1 + 8 * entries, refcounts + (clusters << min(bits, 21)))
    return Qcow2(os.fsdecode(name), os.fsdecode(format), version >= 3 and bool(features & 4), end, disk)


def image_size(path: str) -> int:
    """The bytes of the guest's disk in a qcow2 or raw image."""
    header = qcow2_header(path)
    return header.size if header else os.path.getsize(path)


def disk_format(path: str) -> str:
    """qcow2 where the header says so, else raw: bash trees hold both, and their confs don't say which.  A guest writes
    what it likes into a raw disk, such a header too: what is found out is kept, see known_formats."""
    return "qcow2" if qcow2_header(path) else "raw"


def backing_chain(disk: str, format: str, followed: Callable[[str], bool]) -> list[str]:
    """The real paths of the files under a disk of this format ('': what it looks like).  What a guest wrote into a raw
    disk isn't asked, nor is a file that isn't to be `followed`, see Tree.followable: it is named, and the last one."""
    found: list[str] = []
    path = os.path.realpath(disk)
    while format != "raw" and len(found) < 64:  # a chain that names itself must end too
        header = qcow2_header(path)
        if not header or not header.backing:
            break
        path, format = os.path.realpath(os.path.join(os.path.dirname(path), header.backing)), header.format
        found.append(path)
        if not followed(path) or not os.path.exists(path):
            break
    return found


def known_formats(vm: VM) -> list[str]:
    """The format of each disk of a VM: what its conf says, else what it looks like now, which its conf says from then
    on: asked at each start, a guest could write a qcow2 header into its raw disk, and read any file of the host."""
    disks, known = vm.disks(), [each for each in vm.get("vmDiskFormat").split(",") if each]
    if len(known) > len(disks):
        said = f"vmDiskFormat names {plural(len(known), 'format')} for {plural(len(disks), 'disk')}"
        hint = f"mend it in {vm.conf_file}: as many formats as there are disks in vmDisk and vmExtraDisk"
        raise UsageError(said, hint, vm=vm)
    formats = [*known, *(first_format(vm, disk) for disk in disks[len(known) :])]
    if formats != known and os.access(vm.folder, os.W_OK):  # a template may be someone else's
        vm.write_conf({"vmDiskFormat": ",".join(formats)})
    return formats


def first_format(vm: VM, disk: str) -> str:
    """The format of a disk that came from the bash tools, or was added by hand.  A header that leads out of the tree
    may be the guest's own work: whose it is, only the user knows."""
    header = qcow2_header(disk)
    if not header:
        return "raw"
    inside = vm.tree.followable()
    strays = [path for path in backing_chain(disk, "qcow2", inside) if not inside(path)]
    if strays or header.outside:
        said = f"its disk {disk} needs a file outside the tree: {strays[0] if strays else 'its data file'}"
        hint = f"the guest may have written that itself; if not, set vmDiskFormat=qcow2 in {vm.conf_file}"
        raise WrongImage(said, hint, vm=vm)
    return "qcow2"


def create_disk(disk: str, gigabytes: int = 0, *below: str) -> None:
    """A qcow2 disk, of 200 KB while it is empty; `below`: words for its backing file, whose size it has without one."""
    size = [f"{gigabytes}G"] if gigabytes else []
    run(["qemu-img", "create", "-q", "-f", "qcow2", *below, os.path.abspath(disk), *size])


def create_overlay(disk: str, backing: str, format: str, gigabytes: int = 0) -> None:
    """A disk that stands on a file of this format, which it names relative to its own folder: a tree can be moved."""
    path = os.path.relpath(os.path.realpath(backing), os.path.realpath(os.path.dirname(disk)))
    create_disk(disk, gigabytes, "-F", format, "-b", path)


def is_sound(disk: str) -> bool:
    """Whether a qcow2 image's own tables are consistent; clusters that are only lost (status 3) do no harm."""
    words = ["qemu-img", "check", "-q", "-f", "qcow2", os.path.abspath(disk)]
    return run(words, check=False, timeout=600).returncode in (0, 3)


def find_iso_writer() -> list[str]:
    """The words that call a program which writes ISO images, all with mkisofs' options; [] where there is none."""
    writers = (["xorriso", "-as", "mkisofs"], ["genisoimage"], ["mkisofs"])
    return next((words for words in writers if find_program(words[0])), [])


def convert_image(source: str, format: str, target: str, *options: str) -> None:
    """A qcow2 copy of an image, self-contained unless `options` name what it stands on; unused space takes none."""
    paths = [os.path.abspath(source), os.path.abspath(target)]
    run(["qemu-img", "convert", "-f", format, "-O", "qcow2", *options, *paths], timeout=None)


def compress_image(source: str, format: str, target: str) -> None:
    """A compressed, self-contained qcow2 of an image: a third of the size for 3 s; zlib, lacking zstd, takes 20 s."""
    try:
        convert_image(source, format, target, "-c", "-W", "-m", "8", "-o", "compression_type=zstd")
    except CommandFailed:
        convert_image(source, format, target)


def copy_variables(source: str, format: str, target: str) -> None:
    """A copy of UEFI's variables, of 20 KB and what is written to them.  It stands on nothing: a firmware's package
    replaces its files when it is upgraded.  -U: a template that runs on a layer can be cloned."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    convert_image(source, format, target + ".part", "-U", "-c", "-o", "cluster_size=4096")
    os.rename(target + ".part", target)


def set_writable(path: str, writable: bool) -> None:
    """Give the owner the right to write to a file, or take it away from everyone; someone else's stays as it is."""
    info = os.stat(path)
    mode = stat.S_IMODE(info.st_mode)
    wanted = mode | stat.S_IWUSR if writable else mode & ~0o222
    if wanted != mode and info.st_uid == os.geteuid():
        os.chmod(path, wanted)


def converted_size(source: str, format: str) -> int:
    """The bytes that convert_image's copy will take; more than the image itself where that is compressed."""
    words = ["measure", "--output=json", "-f", format, "-O", "qcow2", os.path.abspath(source)]
    return int(json.loads(run(["qemu-img", *words], merge=False).stdout)["required"])


# QMP #################################################################################################
#
# A blocking client with a deadline (QEMU docs/interop/qmp-spec.rst).  Replies are matched by id; events
# that come before a reply are kept.


class QMP(contextlib.AbstractContextManager["QMP"]):
    """A connection to a VM's qmp.sock, or the QMP socket of that name in a folder, or to `connection`; with a deadline.
    Raises QMPClosed where qemu ended, TimedOut at the deadline, QMPError for what the server refuses."""

    def __init__(self, folder: str, seconds: float = 5.0, name: str = "qmp.sock", connection: Any = None) -> None:
        self.events: list[dict[str, Any]] = []
        self._serial = 0
        self._buffer = b""
        self._deadline = time.monotonic() + seconds
        self._socket: socket.socket = connection or connect_unix(folder, name, seconds)
        try:
            self._greet()
        except BaseException:
            self._socket.close()
            raise

    def _greet(self) -> None:
        """What comes before the first command."""
        self._next()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """What the command returns.  Of arguments' names, `_` stands for `-`."""
        self._serial += 1
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command, "id": self._serial, **({"arguments": given} if given else {})}
        self._send(json.dumps(request).encode() + b"\n")
        while True:
            message = self._next()
            asked = message.get("id", self._serial if "error" in message else 0)  # none, of what qemu can't read
            if asked == self._serial:
                if "error" in message:
                    raise QMPError(f"qemu: {command}: {message['error'].get('desc', 'refused')}")
                return message.get("return")
            if "event" in message:
                self.events.append(message)

    def monitor(self, line: str) -> str:
        """What the monitor for humans answers."""
        return str(self.execute("human-monitor-command", command_line=line))

    def allow(self, seconds: float) -> None:
        """Set the deadline anew, for a command that may take long."""
        self._deadline = time.monotonic() + seconds

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._receive()
        line, self._buffer = self._buffer.split(b"\n", 1)
        return parse_qmp(line)

    def give(self, fd: int, name: str) -> None:
        """Give qemu a descriptor, which commands call by this name."""
        socket.send_fds(self._socket, [b" "], [fd])
        self.execute("getfd", fdname=name)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:
            raise QMPClosed("qemu closed its control socket") from None

    def _receive(self) -> None:
        """Add what comes next to the buffer."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimedOut("qemu: no answer on its control socket")
        self._socket.settimeout(left)
        try:
            piece = self._socket.recv(65536)
        except socket.timeout:  # TimeoutError itself only since Python 3.10
            return
        except OSError:
            piece = b""
        if not piece:
            raise QMPClosed("qemu closed its control socket")
        self._buffer += piece
        if len(self._buffer) > 16 * MIB:
            raise QMPError("qemu: an answer without an end")

    def close(self) -> None:
        self._socket.close()

    def __exit__(self, *exc: object) -> None:
        self.close()


def connect_unix(folder: str, name: str, seconds: float) -> socket.socket:
    """Connect to a socket in a folder whose path may be longer than the 107 bytes that sun_path holds."""
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(seconds)
        connection.connect(f"/proc/self/fd/{place}/{name}")
        return connection
    except OSError as error:
        connection.close()
        raise QMPClosed(f"{name}: {error.strerror or error}") from None
    finally:
        os.close(place)


def listen_unix(folder: str, name: str) -> socket.socket:
    """Listen at a socket in a folder, as connect_unix() connects; no other user may."""
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    path, listener = f"/proc/self/fd/{place}/{name}", socket.socket(socket.AF_UNIX)
    try:
        remove_file(path)
        listener.bind(path)
        os.chmod(path, 0o600)  # in time: nobody can connect before listen(2)
        listener.listen()
        return listener
    except OSError:
        listener.close()
        raise
    finally:
        os.close(place)


def parse_qmp(line: bytes | str) -> dict[str, Any]:
    """A QMP message; raises QMPError where it is none."""
    with Parsing(QMPError, "qemu: what it said on its control socket is not QMP"):
        message: dict[str, Any] = json.loads(line)
        return {**message, **{key: {**message[key]} for key in ("data", "error") if key in message}}


# VMs that the bash tools started #####################################################################
#
# What is only here for trees and VMs that bash made: a qemu without our sockets is found in /proc by the disk that it
# writes to, and talked to by the monitor that it has.  It can go when nobody has such VMs any more.


def file_key(path: str) -> tuple[int, int] | None:
    """What makes two names the same file, whatever links are between; None where there is none."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return None
    return (info.st_dev, info.st_ino) if stat.S_ISREG(info.st_mode) else None


def suboptions(text: str) -> dict[str, str]:
    """The `key=value` pairs of a qemu option; a doubled comma belongs to the value."""
    parts = text.replace(",,", "\0").split(",")
    return {key: value for key, _, value in (part.replace("\0", ",").partition("=") for part in parts)}


def is_qemu(pid: int) -> bool:
    """Whether a process is an emulator by its name, which the kernel cuts: no qemu-img that works on a disk."""
    return process_file(pid, "comm").startswith(("qemu-system", "qemu-kvm", "qemu\n", "kvm\n"))


class QemuProcess:
    """A running qemu, as its command line and its open files in /proc show it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._command_line = process_file(pid, "cmdline")
        self.words = self._command_line.rstrip("\0").split("\0")
        self.is_ours = ",path=qmp.sock,server=on,wait=off\0" in self._command_line  # nocloud's, whoever started it
        self.uid, self.folder = -1, ""
        with contextlib.suppress(OSError):  # it has ended, or we may not look
            self.uid = os.stat(f"/proc/{pid}").st_uid
            self.folder = os.readlink(f"/proc/{pid}/cwd")

    def is_alive(self) -> bool:
        """A pid may be another process's by now, and one that nobody has waited for yet has no words any more."""
        return process_file(self.pid, "cmdline") == self._command_line != ""

    def values(self, *names: str) -> list[str]:
        """The values of these options, in their order; qemu takes one dash and two."""
        pairs = zip(self.words, self.words[1:])
        return [value for name, value in pairs if name[:1] == "-" and name.lstrip("-") in names]

    @property
    def mac(self) -> str:
        """The address of its network card, or ''."""
        for options in map(suboptions, self.values("device", "net", "nic", "netdev")):
            found = options.get("mac") or options.get("macaddr") or ""
            if re.fullmatch(r"[0-9a-fA-F]{1,2}(:[0-9a-fA-F]{1,2}){5}", found):
                return ":".join(f"{int(each, 16):02x}" for each in found.split(":"))
        return ""

    @functools.cached_property
    def written(self) -> set[tuple[int, int] | None] | None:
        """The files that it has open to write to them; None where we may not look."""
        folder, found = f"/proc/{self.pid}/fd", set()
        try:
            names = os.listdir(folder)
        except OSError:
            return None
        for name in names:
            flags = re.search("^flags:.*([0-7])$", process_file(self.pid, f"fdinfo/{name}"), re.M)
            if flags and int(flags[1]) & os.O_ACCMODE != os.O_RDONLY:
                found.add(file_key(f"{folder}/{name}"))
        return found - {None}

    def runs(self, vm: VM) -> bool:
        """Whether it writes to a VM's system disk, not only to one on it; where we may not look, its words tell."""
        if self.is_ours:
            return self.folder == vm.folder
        for disk in vm.disks()[:1]:
            if self.written is None:
                return any(name in word for word in self.words for name in (disk, os.path.relpath(disk, vm.base)))
            return file_key(disk) in self.written
        return False


@functools.cache
def qemus() -> list[QemuProcess]:
    """All users' qemus: /proc is read once in a process's life."""
    return [QemuProcess(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_qemu(pid)]


def unlocked_qemu(vm: VM) -> QemuProcess | None:
    """The qemu that runs a VM without a locked pidfile: the bash tools started it, or someone removed the file."""
    for process in qemus():
        with contextlib.suppress(Error):  # its conf can't be read; root may own one as well
            if process.uid in (os.geteuid(), 0) and process.runs(vm) and process.is_alive():
                return process
    return None


def foreign_qemu(vm: VM) -> QemuProcess | None:
    """The qemu that runs a VM, where that was started by the bash tools, or by hand; None where nocloud did it."""
    state, pid = lock_holder(vm.pid_file)
    if state == "unknown" or (state == "running" and os.path.exists(vm.file("qmp.sock"))):
        return None
    process = unlocked_qemu(vm) if state == "stopped" else QemuProcess(pid)
    return process if process and is_qemu(process.pid) and not process.is_ours else None


class HMP(QMP):
    """The same over qemu's monitor for humans, on telnet or a plain socket, as the bash tools opened it: version,
    prompt; what is typed comes back with a line editor's escapes (util/readline.c), the answer, the prompt again."""

    PROMPT = b"(qemu) "
    # Telnet's negotiation (RFC 854: IAC, WILL to DONT, option) and a terminal's control sequences
    NOISE = re.compile(rb"\xff[\xfb-\xfe].|\x1b\[[0-9;]*[A-Za-z]", re.S)

    def _greet(self) -> None:
        if not self._answer().startswith("QEMU "):
            raise QMPError("qemu: what answers in its monitor's place is no monitor")

    def execute(self, command: str, **arguments: Any) -> Any:
        """For commands that QMP calls the same: system_powerdown, quit."""
        self.monitor(command)

    def monitor(self, line: str) -> str:
        self._send(line.encode("utf-8", "surrogateescape") + b"\n")
        return self._answer().partition("\n")[2]

    def _answer(self) -> str:
        while not self._buffer.endswith(self.PROMPT):
            self._receive()
        text, self._buffer = self.NOISE.sub(b"", self._buffer[: -len(self.PROMPT)]), b""
        return text.decode("utf-8", "replace").replace("\r\n", "\n")


def connect_foreign(process: QemuProcess, vm: VM, seconds: float) -> HMP:
    """A connection to a monitor that the bash tools opened: `-monitor unix:PATH,…`, or `-monitor telnet:HOST:PORT,…`
    where it listens on this host's loopback, in the network namespace that we are in: else the port isn't qemu's."""
    for options in map(suboptions, process.values("monitor")):
        way, _, place = next(iter(options)).partition(":")
        host, _, port = place.rpartition(":")
        try:
            if way == "unix":
                paths = [os.path.join(folder, place) for folder in (process.folder or "/", vm.base, vm.folder)]
                path = next(filter(os.path.exists, paths), place)
                return HMP("", seconds, connection=connect_unix(os.path.dirname(path), os.path.basename(path), seconds))
            here = os.path.samefile(f"/proc/{process.pid}/ns/net", "/proc/self/ns/net")
            if way == "telnet" and here and host in ("", "localhost", "127.0.0.1", "0.0.0.0"):
                return HMP("", seconds, connection=socket.create_connection(("127.0.0.1", int(port)), seconds))
        except (QMPClosed, OSError, ValueError, OverflowError):
            continue  # another one, perhaps
    raise QMPClosed("nocloud didn't start it, and its qemu has no monitor to talk to", vm=vm)


# Names and the VM tree ###############################################################################
#
# What things may be called, and where each file of a VM lies.  A VM is a folder; whether it runs is asked
# of its pidfile each time and stored nowhere.

TEMPLATES = "templates"
RESERVED_GROUPS = ("all", "ungrouped")  # ansible's own
MAKING, REMOVING = ".new-", ".del-"  # folders of VMs that aren't there yet, or any more
MANAGER_PID, MANAGER_LOG = ".vmrun.pid", ".vmrun.log"  # of the vmrun that manages a group, in the group's folder


def checked_name(kind: str, name: str) -> str:
    """`name` if something new may be called so, else UsageError naming the character.  A VM's name is a DNS label (RFC
    1123); groups, types and templates may have dots and underscores."""
    hint = "use letters, digits and '-'" if kind == "VM" else "use letters, digits, '.', '_' and '-'"
    if not name:
        raise UsageError(f"the {kind} name is empty", hint)
    if stray := re.search("[^A-Za-z0-9-]" if kind == "VM" else "[^A-Za-z0-9._-]", name):
        raise UsageError(f"{name!r}: {stray[0]!r} is not allowed in a {kind} name", hint)
    if not name[0].isalnum():
        raise UsageError(f"{name!r}: a {kind} name can't start with {name[0]!r}", "start with a letter or a digit")
    if kind == "VM" and name[-1] == "-":
        raise UsageError(f"{name!r}: a VM name can't end with '-'", "end with a letter or a digit")
    if len(name) > 63:
        raise UsageError(f"{name!r}: a {kind} name has at most 63 characters, this one has {len(name)}")
    return name


def checked_group(name: str) -> str:
    """A group that clones may be made in."""
    checked_name("group", name)
    if name.lower() in (TEMPLATES, *RESERVED_GROUPS):
        raise UsageError(f"{name!r} is reserved and can't be a group of clones", "choose another name")
    return name


class FileOf:
    """The path of a file in a VM's folder; {} in its name is the VM's name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, vm: VM, owner: object) -> str:
        return os.path.join(vm.folder, self.name.format(vm.name))


class VM:
    """A VM or a template: its place in the tree, and the name of each of its files, once."""

    __slots__ = ("tree", "group", "type", "name", "folder", "woke", "_conf")

    conf_file = FileOf("{}.conf")
    pid_file = FileOf("{}.pid")
    log_file = FileOf("{}.log")
    command_file = FileOf("{}.command")
    console_log = FileOf("console.log")
    old_console_log = FileOf("console.log.1")  # what was in it before, where it became too long
    credentials_file = FileOf("credentials")  # the SMBIOS string that hands keys and hostname to systemd (0600)
    seed_folder = FileOf("seed")  # what cloud-init in the guest reads (0700: the host key is in it)
    user_data_file = FileOf("user-data")  # what the user adds to the seed, as it was when the VM was made (0600)
    host_key = FileOf("ssh_host_ed25519_key")  # made on the host (0600), its public half beside it
    mounted_file = FileOf("mounted")  # the vmShares that the guest was told to mount
    configured_file = FileOf("configured")  # there once the guest has been configured, over ssh or by its cloud-init;
    # with something in it while it has to be told that it is called otherwise now
    frozen_file = FileOf("frozen")  # there until its first start: the frozen layer that it can wake up on
    saved_file = FileOf("saved")  # memory and devices of a guest that goes on there at its next start
    still_file = FileOf("still")  # there while a command has it stand still
    late_file = FileOf("late")  # there until its clock is set, which stood still
    snapshots_folder = FileOf("snapshots")
    firmware_folder = FileOf("firmware")  # what its firmware keeps: UEFI's variables, and in `tpm` what its TPM does
    tpm_folder = FileOf("firmware/tpm")
    ready_file = FileOf("ready")  # there once a wait has seen it ready since it was started

    def __init__(self, tree: Tree, group: str, type: str, name: str, folder: str = "") -> None:
        self.tree, self.group, self.type, self.name = tree, group, type, name
        self.folder = folder or os.path.join(tree.base, group, type, name)
        self.woke = 0.0  # the seconds that it took, where this process had it wake up
        self._conf: dict[str, str] | None = None

    def __str__(self) -> str:
        """How messages name it, and commands find it: NAME, or where others are called so GROUP/NAME, or
        GROUP/TYPE/NAME. The tree is asked, so this is for a message, not for a list of all VMs."""
        others = [vm for vm in self.tree.find(self.name) if vm.full_name != self.full_name]
        if any(vm.group == self.group for vm in others):
            return self.full_name
        return f"{self.group}/{self.name}" if others else self.name

    @property
    def base(self) -> str:
        """vmBaseDir, which its conf names disks relative to."""
        return self.tree.base

    @property
    def is_template(self) -> bool:
        return self.group == TEMPLATES

    @property
    def is_in_making(self) -> bool:
        """Whether its folder is not yet where it will be; whoever makes it holds the folder's lock."""
        return os.path.basename(self.folder).startswith(MAKING)

    @property
    def place(self) -> str:
        """GROUP/TYPE, or `templates`: the second column of every list."""
        return f"{self.group}/{self.type}" if self.type else self.group

    @property
    def host_name(self) -> str:
        """What it is called on the network: its name; a '-' stands for what the bash tools allowed and DNS doesn't."""
        return re.sub(r"[^A-Za-z0-9_-]", "-", self.name)[:63].strip("-") or "vm"

    @property
    def dns_name(self) -> str:
        """NAME.GROUP on the network."""
        return f"{self.host_name}.{re.sub(r'[^A-Za-z0-9._-]', '-', self.group)}"

    @property
    def full_name(self) -> str:
        """GROUP/TYPE/NAME: says which VM is meant even where names are the same."""
        return f"{self.place}/{self.name}"

    def file(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def disk_name(self, number: int, extension: str) -> str:
        return f"{self.name}_{number}.{extension}"

    @property
    def variables_file(self) -> str:
        """UEFI's variables, what boots among them (qcow2); those of secure boot, with its keys, are others."""
        return os.path.join(self.firmware_folder, self.get("vmFirmware"))

    def relative(self, name: str) -> str:
        """A file of this VM, relative to vmBaseDir, as the conf names disks."""
        return os.path.join(*(part for part in (self.group, self.type, self.name, name) if part))

    def exists(self) -> bool:
        return os.path.isfile(self.conf_file)

    def is_readable(self) -> bool:
        """Whether its conf can be used."""
        with contextlib.suppress(Error):
            return bool(self.conf)
        return False

    def state(self) -> tuple[str, int]:
        """("running", pid of qemu), ("stopped", 0) or ("unknown", 0)."""
        state, pid = lock_holder(self.pid_file)
        unlocked = unlocked_qemu(self) if state == "stopped" else None
        return ("running", unlocked.pid) if unlocked else (state, pid)

    def is_running(self) -> bool:
        return self.state()[0] == "running"

    @property
    def conf(self) -> dict[str, str]:
        """Its conf, read once.  Raises UsageError where it can't be trusted or understood."""
        if self._conf is not None:
            return self._conf
        try:
            text, reason = read_trusted(self.conf_file)
        except FileNotFoundError:
            raise NotFound(f"its conf is gone: {self.conf_file}", vm=self) from None
        except OSError as error:
            raise error_from_os(error) from None
        if reason:
            hint = f"chown it to you, and chmod go-w {self.conf_file}"
            raise UsageError(f"{self.conf_file} is not used: {reason}", hint)
        values: dict[str, str] = {}
        for assignment in parse_assignments(text, self.conf_file, ChainMap({"vmBaseDir": self.base}, os.environ)):
            check_setting(assignment.key, assignment.value, f"{self.conf_file}:{assignment.line}")
            values[assignment.key] = assignment.value
        self._conf = values
        return values

    def get(self, key: str) -> str:
        """A setting of this VM, for all code: what its conf says (a clone's got the inherited keys when it was made),
        else the configuration, for keys that it has, else the default.  `auto` of a key in both says nothing."""
        setting, said = SETTING[key], self.conf.get(key, "")
        return self.tree.config[key] if setting.where == "both" and said in ("", "auto") else said or setting.default

    def number(self, key: str) -> int:
        return int(self.get(key))

    def settings(self) -> dict[str, str]:
        """All of them that a VM has, by their keys, as `get` says."""
        return {each.key: self.get(each.key) for each in SETTINGS if each.where in ("both", "vm")}

    def inherited(self) -> dict[str, str]:
        """What the conf of a clone, or of a template that is made of it, gets of its conf."""
        return {key: value for key, value in self.conf.items() if value and key in SETTING and SETTING[key].inherited}

    def reread(self) -> None:
        """Forget what its conf said: another command may have changed it while its lock was waited for."""
        self._conf = None

    def write_conf(self, changes: Mapping[str, str]) -> None:
        """Set these keys in its conf; everything else in it, comments too, stays."""
        try:
            text = read_text(self.conf_file)
            mode = os.stat(self.conf_file).st_mode & 0o644  # never wider than it was: old ones hold a password
        except FileNotFoundError:
            text, mode = "", 0o644
        write_file(self.conf_file, update_assignments(text, changes), mode, durable=not self.is_in_making)
        self._conf = None

    def path(self, disk: str) -> str:
        """Where a disk that a conf names lies: absolute, relative to vmBaseDir, or to the VM's own folder."""
        if os.path.isabs(disk):
            return disk
        own = self.file(disk)
        return own if "/" not in disk and os.path.exists(own) else os.path.join(self.base, disk)

    def disks(self) -> list[str]:
        """The paths of its disks: the system disk, then the others in order."""
        names = [self.get("vmDisk"), *self.get("vmExtraDisk").split(",")]
        return [self.path(name.strip()) for name in names if name.strip()]

    def chains(self, followed: Callable[[str], bool] | None = None) -> Iterator[tuple[str, list[str]]]:
        """Each of its disks with the real paths of the files under it, by the format that its conf tells; `followed`:
        what Tree.followable() gives, for who asks many VMs."""
        disks, followed = self.disks(), followed or self.tree.followable()
        formats = [*map(str.strip, self.get("vmDiskFormat").split(",")), *("" for _ in disks)]
        for disk, format in zip(disks, formats):
            yield disk, backing_chain(disk, format, followed) if os.path.exists(disk) else []

    def below(self, followed: Callable[[str], bool] | None = None) -> list[str]:
        """The files under its system disk; none where it has no disk."""
        return next(self.chains(followed), ("", []))[1]


class Tree:
    """vmBaseDir: finds what is in it.  Where a VM's conf doesn't say something, `config` does."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.base = base_folder(config)
        self.managed = ""  # the group whose manager this process is

    def prepare(self) -> None:
        """Make the tree's folder, or say why that can't be.  One that is there keeps its mode."""
        try:
            if not os.path.isdir(self.base):
                make_private_folder(self.base)
        except OSError as error:
            raise Error(f"vmBaseDir {self.base}: {error.strerror}", "set vmBaseDir to a folder of yours") from None
        if not os.access(self.base, os.W_OK | os.X_OK):
            raise Error(f"vmBaseDir {self.base}: you may not write there", "set vmBaseDir to a folder of yours")

    def lock(self) -> FolderLock:
        """The lock under which names, MACs and addresses are allotted."""
        return FolderLock(self.base)

    def groups(self) -> list[str]:
        return [name for name in folders_in(self.base) if name != TEMPLATES]

    def group_called(self, name: str) -> str:
        """The group that is called so, in whatever case; `name` itself where there is none yet."""
        return next((each for each in sorted(self.groups(), key=name.__ne__) if each.lower() == name.lower()), name)

    def types(self, group: str) -> list[str]:
        """The types of a group; the templates have one, without a name."""
        return folders_in(os.path.join(self.base, group)) if group != TEMPLATES else [""]

    def all_types(self) -> set[str]:
        return {type for group in self.groups() for type in self.types(group)}

    def vms(self, group: str = "", type: str = "", name: str = "") -> Iterator[VM]:
        """The VMs of the tree that have a conf, templates last, else by group, type and name; of a `name`, in small
        letters, only those that are called so, in whatever case."""
        return (vm for vm in self._folders(group, type) if name in ("", vm.name.lower()) and vm.exists())

    def _folders(self, group: str, type: str = "") -> Iterator[VM]:
        """What would be VMs if each folder in their place were one's."""
        for each in [group] if group else [*self.groups(), TEMPLATES]:
            for kind in [kind for kind in self.types(each) if type in ("", kind)]:
                for folder in folders_in(os.path.join(self.base, each, kind)):
                    yield VM(self, each, kind, folder)

    def strays(self, group: str = "") -> Iterator[VM]:
        """What isn't taken for a VM: its folder was renamed by hand, or has a system disk, and no conf any more."""
        for vm in self._folders(group):
            names = [] if vm.exists() else names_in(vm.folder)
            confs = [name[: -len(".conf")] for name in names if name.endswith(".conf")]
            if confs or any(re.fullmatch(r".+_0\.(img|qcow2)", name) for name in names):
                yield VM(self, vm.group, vm.type, [*confs, vm.name][0], vm.folder)

    def told_strays(self, group: str = "") -> Iterator[tuple[str, str]]:
        """Of each of them, what isn't found, and the command that mends it."""
        for vm in self.strays(group):
            right = os.path.join(os.path.dirname(vm.folder), vm.name)
            text, mend = f"{vm.folder} is no VM: {vm.name}.conf is gone", begin_conf(vm)
            if right != vm.folder:
                wanted = f"{os.path.basename(vm.folder)}.conf"
                text = f"{vm.folder} is no VM: {vm.name}.conf is in it, and not {wanted} (renamed by hand?)"
                mend = f"mv {quoted(vm.folder, home_folder() if os.path.exists(right) else right)}"
            yield text, mend

    def running(self, group: str = "") -> Iterator[VM]:
        return (vm for vm in self.vms(group) if vm.is_running())

    def templates(self) -> Iterator[VM]:
        return self.vms(TEMPLATES)

    def template(self, name: str) -> VM:
        return VM(self, TEMPLATES, "", name)

    def need_template(self, name: str) -> VM:
        template = self.template(name)
        if "/" in name and self.find(name):
            raise UsageError(f"{name} is a VM, not a template", f"vmtemplate NAME --from {name} makes one of it")
        if name not in folders_in(os.path.join(self.base, TEMPLATES)) or not template.exists():
            checked_name("template", name)  # one that bash made is called as it is
            raise no_such("template", name, [each.name for each in self.templates()], TEMPLATES_HINT)
        return template

    def unfinished(self, group: str = "", prefixes: tuple[str, ...] = (MAKING,)) -> Iterator[VM]:
        """VMs that are being made just now, or were when their maker was killed; with REMOVING half-removed ones."""
        for each in [group] if group else [*self.groups(), TEMPLATES]:
            for kind in self.types(each):
                place = os.path.join(self.base, each, kind)
                for entry in names_in(place):
                    if entry.startswith(prefixes):
                        yield VM(self, each, kind, entry[len(MAKING) :], os.path.join(place, entry))

    def find(self, words: str) -> list[VM]:
        """All VMs that NAME, GROUP/NAME or GROUP/TYPE/NAME can mean; names are compared without case."""
        parts = words.split("/")
        if len(parts) > 3 or not all(parts) or any(part in (".", "..") for part in parts):
            return []
        group = self.group_called(parts[0]) if len(parts) > 1 else ""
        return list(self.vms(group, parts[1] if len(parts) == 3 else "", parts[-1].lower()))

    def unique_names(self) -> dict[str, list[str]]:
        """What a VM, by its full name, is called among hosts: NAME.GROUP and NAME, where no other is called so."""
        names = {vm.full_name: [vm.dns_name, vm.host_name] for vm in self.vms()}
        count = Counter(name.lower() for each in names.values() for name in each)
        return {vm: [name for name in each if count[name.lower()] == 1] for vm, each in names.items()}

    def need(
        self,
        words: str | None,
        group: str | None = None,
        type: str | None = None,
        *,
        first: Callable[[VM], bool] | None = None,
        address_of: Callable[[VM], str] | None = None,
    ) -> VM:
        """The one VM that a command's words mean, by the same rules for all.  `words` are NAME, GROUP/NAME or
        GROUP/TYPE/NAME, compared without case, or the address of a running VM, where `address_of` tells that.  `group`
        and `type`, the options -g and -t, leave out what is elsewhere.  Where several fit, those count that `first`
        chooses, if any: running ones for what is done to those, templates for what is mostly done to templates; without
        it no guess is made: it may be destroyed.  Raises NotFound, with the nearest name, or all names that fit."""
        if words is None:
            raise UsageError("which VM? give -n NAME", VMS_HINT)
        if address_of and re.fullmatch(r"[0-9]+(\.[0-9]+){3}", words):
            found = [vm for vm in self.running() if address_of(vm) == words]
        else:
            found = self.find(words)
        fit = [vm for vm in found if group in (None, vm.group) and type in (None, vm.type)]
        if first and len(fit) > 1:
            fit = [vm for vm in fit if first(vm)] or fit
        if len(fit) == 1:
            return fit[0]
        if fit:
            names = ", ".join(vm.full_name for vm in fit)
            raise NotFound(f"{words}: several VMs are called so: {names}", "name the group too: GROUP/NAME")
        if group == TEMPLATES and not type:
            raise no_such("template", words, [each.name for each in self.templates()], TEMPLATES_HINT)
        place = f" in {'/'.join(filter(None, (group, type)))}" if group else f" of type {type}" if type else ""
        if found:
            raise NotFound(f"{words}: no such VM{place}", f"did you mean {found[0].full_name}?")
        if kind := "group" if words in self.groups() else "type" if words in self.all_types() else "":
            text = f"{words}: no such VM{place}, but a {kind}"
            raise NotFound(text, f"vmrunning -a -{kind[0]} {words} lists its VMs")
        raise no_such(f"VM{place}", words, [vm.name for vm in self.vms(group or "", type or "")], VMS_HINT)

    def need_group(self, group: str | None, type: str | None = None) -> None:
        """Raise NotFound, with the nearest name, where the group isn't there, or in it the type; None: any."""
        if group == "":
            raise UsageError("the group name is empty", "vmrunning -a lists the groups")
        if group not in (None, TEMPLATES, *self.groups()):
            raise no_such("group", str(group), self.groups(), VMS_HINT)
        types = self.types(group) if group else self.all_types()
        if type is not None and type not in types:
            raise no_such(f"type in {group}" if group else "type", type, types, VMS_HINT)

    def followable(self) -> Callable[[str], bool]:
        """What tells whether a disk may stand on a file: on what is in the tree or in the folder of a template, which
        may be a link to elsewhere, and on the disks that templates name."""
        templates = list(self.templates())
        folders = tuple(os.path.realpath(each) + os.sep for each in (self.base, *(vm.folder for vm in templates)))
        disks = {os.path.realpath(disk) for vm in templates if vm.is_readable() for disk in vm.disks()}
        return lambda path: path in disks or path.startswith(folders)

    def clones(self, template: VM) -> list[VM]:
        """The VMs and templates, finished or not, whose disk stands on one in the template's folder, old or new."""
        folder, followed = os.path.realpath(template.folder), self.followable()
        mine = {os.path.realpath(disk) for disk in template.disks()[:1]}
        found = []
        # In this order: one may be finished between the looks
        for vm in [*self.unfinished(), *self.vms(), *self.strays()]:
            with contextlib.suppress(Error, OSError):  # a conf that can't be read names no template
                if vm.folder != template.folder and (
                    vm.get("vmTemplate") == template.name
                    or any(path in mine or os.path.dirname(path) == folder for path in vm.below(followed))
                ):
                    found.append(vm)
        return found


def begin_conf(vm: VM) -> str:
    """The command that begins the conf anew of a VM that has lost what was in it, and keeps its disk."""
    there = [name for name in names_in(vm.folder) if re.fullmatch(rf"{re.escape(vm.name)}_0\.\w+", name)]
    lines = quoted(f"vmName={vm.name}", f"vmDisk={vm.relative([*there, f'{vm.name}_0.img'][0])}")
    return f"printf '%s\\n' {lines} | tee -a {quoted(vm.conf_file)}"


VMS_HINT = "vmrunning -a lists them"
TEMPLATES_HINT = "vmtemplate --list shows what is there, vmtemplate --list --available what can be"


def no_such(kind: str, name: str, names: Iterable[str], hint: str) -> NotFound:
    """The error for a name that there isn't; the nearest of `names` is its hint, else `hint`."""
    return NotFound(f"{name}: no such {kind}", did_you_mean(name, names, hint))


def left_over(tree: Tree, group: str = "") -> Iterator[str]:
    """The folders that killed commands left half-made or half-removed, in a group or in all: no maker locks them."""
    folders = (vm.folder for vm in tree.unfinished(group, (MAKING, REMOVING)))
    return (folder for folder in folders if not os.path.islink(folder) and not is_locked(folder))


def sweep(tree: Tree, group: str) -> None:
    """Remove what commands that were killed left of a group.  Call it under the tree's lock."""
    for folder in left_over(tree, group):
        remove_tree(folder)
    if group != tree.managed and manager_of(tree, group)[0] == "stopped":
        for name in (MANAGER_PID, MANAGER_LOG):
            remove_file(os.path.join(tree.base, group, name))


def manager_of(tree: Tree, group: str) -> tuple[str, int]:
    """The vmrun that manages a group: ("running", pid), ("stopped", 0) or ("unknown", 0).  Not for the manager itself:
    closing the file would give up the lock that it holds on it (fcntl(2))."""
    return lock_holder(os.path.join(tree.base, group, MANAGER_PID))


def remove_vm(vm: VM) -> None:
    """Remove a VM's folder, for who holds its lock: it is no VM any more before the first file is gone."""
    doomed = os.path.join(os.path.dirname(vm.folder), REMOVING + vm.name)
    remove_tree(doomed)  # a killed command's
    os.rename(vm.folder, doomed)
    sync(os.path.dirname(doomed))
    remove_tree(doomed)


def remove_if_empty(tree: Tree, group: str) -> None:
    """Remove a group's folder, and those of its types, where nothing is in them."""
    for type in tree.types(group):
        remove_empty(os.path.join(tree.base, group, type))
    remove_empty(os.path.join(tree.base, group))


# qemu and its command line ###########################################################################
#
# Which qemu there is and what it can do; and, pure, the words that start a VM: settings and descriptors in, list of
# words out.  Every device has a PCI address of its own, so that one disk more renames no network card in the guest.


@record
class Qemu:
    """A qemu binary and what it can do, asked of the binary itself over QMP in one run."""

    path: str
    version: str
    machine: str  # the versioned name of its newest q35, or virt
    options: frozenset[str]
    arch: str = "x86_64"  # of its guests


def probe_qemu(config: Config, arch: str) -> Qemu:
    """What the qemu program for an architecture is and has; RHEL and kin keep the host's in /usr/libexec."""
    usual, configured = [f"qemu-system-{arch}"], ""
    if arch == os.uname().machine:
        usual, configured = [*usual, "/usr/libexec/qemu-kvm"], config["vmQemu"]
    path = need_program(configured or next(filter(find_program, usual), usual[0]))
    asked = ["qmp_capabilities", "query-version", "query-machines", "query-command-line-options", "quit"]
    words = "".join(json.dumps({"execute": name, "id": name}) + "\n" for name in asked)
    argv = [path, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]
    answer = run(argv, input=words.encode(), merge=False, check=False)
    try:
        messages = [parse_qmp(line) for line in answer.stdout.splitlines()]
        replies = {message.get("id"): message["return"] for message in messages if "return" in message}
        number = replies["query-version"]["qemu"]
        release = (number["major"], number["minor"], number["micro"])
        _, kind = ARCHES.get(arch, ("", "virt"))
        machine = next((each["name"] for each in replies["query-machines"] if each.get("alias") == kind), kind)
        options = frozenset(each["option"] for each in replies["query-command-line-options"])
    except (QMPError, KeyError, TypeError):
        raise Error(f"{path}: it doesn't answer as qemu does: {last_line(answer.stderr + answer.stdout)}") from None
    version = ".".join(map(str, release))
    if release < (6, 2):
        hint = f"{install_command(os.path.basename(path))}  # or set vmQemu to a newer one"
        raise Error(f"{path}: qemu {version} is too old: 6.2 or newer is needed", hint)
    return Qemu(path, version, machine, options, arch)


def connect_qemu(vm: VM, seconds: float = 5.0) -> QMP:
    """A connection to the qemu of a running VM: our socket in its folder, or a monitor that the bash tools gave it."""
    foreign = foreign_qemu(vm)
    return connect_foreign(foreign, vm, seconds) if foreign else QMP(vm.folder, seconds)


def ask_qemu(vm: VM, command: str, seconds: float = 5.0) -> Any:
    """What a command returns; None where the qemu is ending, refuses, or doesn't answer in time."""
    with contextlib.suppress(QMPError, TimedOut, OSError), connect_qemu(vm, seconds) as qemu:
        return qemu.execute(command)
    return None


# -- what a guest does


DISK_FULL, DISK_ERROR = "paused (disk full)", "paused (disk error)"
SHARE_LOST = "running (without a shared folder)"
WAKING = "waking"
DEAD = ("internal-error", "guest-panicked", "shutdown", WAKING)  # no power button helps
AT_WORK = ("running", "stopped", "unknown", "prelaunch", "inmigrate", "finish-migrate", "restore-vm", "save-vm")


def guest_state(vm: VM) -> str:
    """What a VM does: `running`, `stopped`, `unknown`, or what QMP's RunState calls it (paused, guest-panicked …).
    io-error is two: qemu pauses the guest where the host's disk is full, and where it fails.  SHARE_LOST: a folder's
    daemon has ended, what uses that in the guest hangs.  WAKING: its command was killed before the guest knew which VM
    it is.  A qemu of the bash tools', or one that doesn't answer in a second, is running: no list waits longer."""
    state, _ = vm.state()
    if state != "running" or foreign_qemu(vm):
        return state
    if os.path.exists(vm.frozen_file) and not is_locked(vm.folder):
        return WAKING
    try:
        with QMP(vm.folder, 1.0) as qemu:
            state = str(qemu.execute("query-status")["status"])
            if state == "io-error":
                full = any(each.get("io-status") == "nospace" for each in qemu.execute("query-block"))
                return DISK_FULL if full else DISK_ERROR
            chardevs = qemu.execute("query-chardev") if state == "running" and vm.get("vmShares") else []
            if any(re.match("share.*disconnected:", each["label"] + each["filename"]) for each in chardevs):
                return SHARE_LOST
            return "paused" if state == "postmigrate" else state
    except (Error, OSError, LookupError, TypeError, AttributeError):
        return "running"


# -- acceleration


def choose_accel(wanted: str, qemu: Qemu) -> str:
    """kvm or tcg.  Raises Error where kvm is asked for and isn't to be had; that it works is the asker's word then."""
    reason, mend = kvm_missing(qemu.arch) if wanted != "tcg" else ("", "")
    if reason and wanted == "kvm":
        raise Error(f"vmAccel=kvm: {reason}", f"{mend}; vmAccel=auto goes on without, slowly")
    if wanted == "auto" and not reason:
        reason, _ = kvm_failure(qemu)
    return "tcg" if reason or wanted == "tcg" else "kvm"


KVM_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}  # by the processor's flag


def kvm_missing(arch: str = "") -> tuple[str, str]:
    """(why there is no hardware acceleration for guests, what mends that); ('', '') where there is."""
    if arch not in ("", os.uname().machine):
        return f"guests for {arch} are emulated on {os.uname().machine}", f"a host that is {arch} has it"
    words = read_text("/proc/cpuinfo").split()
    mend = next((f"sudo modprobe {module}" for flag, module in KVM_MODULES.items() if flag in words), "")
    if not mend and "hypervisor" in words:
        mend = "this is a VM: turn on nested virtualization on its host, and give it the host's CPU"
    mend = mend or "turn on VT-x (Intel) or SVM (AMD) in the machine's firmware setup"
    if not os.path.exists("/dev/kvm"):
        return "there is no /dev/kvm", mend
    if reason := device_denied("/dev/kvm"):
        return f"you may not open /dev/kvm ({reason})", device_command("/dev/kvm", "kvm")
    if "flags" in words and not KVM_MODULES.keys() & words:  # x86's word for them; some kernels list none
        return "the processor shows neither vmx nor svm (no nested virtualization here)", mend
    return "", ""


def kvm_failure(qemu: Qemu, anew: bool = False) -> tuple[str, str]:
    """(why no guest runs though /dev/kvm opens, what may mend that), or ('', '').  What a try showed is kept for this
    kernel and this qemu, a failure for an hour only: the host may just have been too busy.  `anew`: it is tried now."""
    path, mend = os.path.join(cache_home(), "kvm"), "a newer kernel or qemu may mend that; vmAccel=kvm uses it anyway"
    host, (was, _, reason) = f"{os.uname().release} {qemu.path} {qemu.version}", read_existing(path).partition("\n")
    if anew or was != host or (reason and time.time() - os.stat(path).st_mtime > 3600):
        reason = try_kvm(qemu)
        with contextlib.suppress(OSError):  # a home that is read-only: it is tried each time
            if was or not anew:  # who only looks makes no file
                make_private_folder(cache_home())
                write_file(path, f"{host}\n{reason}", durable=False)
    return reason, reason and mend


# Guests that end their qemu at once.  SeaBIOS finds no disk, and resets (qemu(1), -boot reboot-timeout).  On arm64
# three instructions in memory, `mov w0, 0x8; movk w0, 0x8400, lsl 16; hvc 0`, call PSCI's SYSTEM_OFF (Arm DEN0022).
KVM_TRIES = {
    "x86_64": ["-boot", "reboot-timeout=0"],
    "aarch64": [
        "-machine", "gic-version=max", "-device", "loader,addr=0x40200000,data=0x72b0800052800100,data-len=8",
        "-device", "loader,addr=0x40200008,data=0xd4000002,data-len=4", "-device", "loader,addr=0x40200000,cpu-num=0",
    ],
}  # fmt: skip


def try_kvm(qemu: Qemu) -> str:
    """Why a guest with nothing to do gets nowhere within 2 s, or ''."""
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-machine", qemu.machine, "-m", "64"]
    words += ["-accel", "kvm", "-cpu", "host", "-no-reboot", *KVM_TRIES.get(qemu.arch, ())]
    status, said = try_run([qemu.path, *words], 2)
    lines = [line for line in said.splitlines() if "warning:" not in line]
    return f"a guest does not run with it: {lines[0] if lines else f'status {status}'}" if status else ""


def device_denied(path: str) -> str:
    """Why this user can't open a device, or ''.  It is tried: to access(2), root in a container has every right."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def device_command(path: str, group: str) -> str:
    """The command that lets this user open a device: through the group that it belongs to, or that it ought to."""
    info, user, mend = os.stat(path), user_name(), f"sudo chgrp {group} {path} && sudo chmod 660 {path} && "
    if os.geteuid() == 0:
        return f"in a container: give it the device {path}"
    if info.st_gid and info.st_mode & 0o060 == 0o060:
        with contextlib.suppress(KeyError):  # in a container it may have no name
            group, mend = grp.getgrgid(info.st_gid).gr_name, ""
    try:
        if user in grp.getgrnam(group).gr_mem and not mend:
            return f"newgrp {group}  # or log in again: {user} was made a member of it since"
    except KeyError:
        mend = f"sudo groupadd --system {group} && {mend}"
    return f"{mend}sudo usermod -aG {group} {user}  # and log in again"


# -- firmware

# The last one with a file of that name counts.  $XDG_CONFIG_HOME/qemu/firmware has the user's own.
FIRMWARE_FOLDERS = ("/usr/share/qemu/firmware", "/etc/qemu/firmware", "qemu/firmware")
MACHINE_ALIASES = {"": "pc-i440fx-", "pc": "pc-i440fx-", "q35": "pc-q35-", "virt": "virt-"}  # of whatever version


@record
class Firmware:
    """UEFI: (path, format) of its code and of what its variables begin as, and what it can and wants."""

    code: tuple[str, str]
    variables: tuple[str, str]
    features: frozenset[str]


def find_firmware(kind: str, arch: str, machine: str, size: int = 0) -> Firmware:
    """The firmware of a vmFirmware that isn't bios for a type of machine, by QEMU's descriptors (docs/interop/
    firmware.json); `size`: of the variables that there are, in bytes.  Raises MissingProgram."""
    named: dict[str, str] = {}  # an empty file takes away what was called so before
    for folder in (os.path.join(os.path.dirname(config_home()), each) for each in FIRMWARE_FOLDERS):
        named.update({name: os.path.join(folder, name) for name in names_in(folder) if name.endswith(".json")})
    found = [read_firmware(path, kind, arch, machine) for _, path in sorted(named.items())]
    fit = [each for each in found if each and size in (0, image_size(each.variables[0]))]
    if not fit:
        text = f"vmFirmware={kind}: no such firmware for {machine or LEGACY_MACHINE} of {arch} in {FIRMWARE_FOLDERS[0]}"
        raise MissingProgram(text, install_command(f"uefi-{arch}"))
    return min(fit, key=lambda each: "secure-boot" in each.features)  # the first; for uefi rather one that can't do it


def read_firmware(path: str, kind: str, arch: str, machine: str) -> Firmware | None:
    """What a descriptor describes, where that is a firmware of this kind in flash memory, for such a machine."""
    with Parsing(Error, f"{path}: no descriptor of firmware as QEMU has them"):
        told = json.loads(read_text(path).strip() or "{}")
        flash, features = told.get("mapping", {}), frozenset(told.get("features", ()))
        targets = [(each["architecture"], glob) for each in told.get("targets", ()) for glob in each["machines"]]
        name = MACHINE_ALIASES.get(machine, machine)
        fits = any(of == arch and fnmatch.fnmatchcase(name, glob) for of, glob in targets)
        fits = fits and (flash["device"], flash.get("mode", "split")) == ("flash", "split")
        if not fits or "uefi" not in told["interface-types"] or ("enrolled-keys" in features) != (kind == "secure"):
            return None
        files = [flash[key] for key in ("executable", "nvram-template")]
        code, variables = ((str(each["filename"]), str(each["format"])) for each in files)
        return Firmware(code, variables, features)


def firmware_of(vm: VM, arch: str) -> Firmware | None:
    """The firmware that a VM, or a clone of a template, has; None: the BIOS that comes with qemu.  Raises
    MissingProgram where this host lacks it, or the TPM that it is to have."""
    kind, there = vm.get("vmFirmware"), os.path.exists(vm.variables_file)
    if yes_no(vm.get("vmTpm")) == "yes":
        need_program("swtpm")
    size = image_size(vm.variables_file) if there else 0
    return find_firmware(kind, arch, vm.get("vmMachine"), size) if kind != "bios" else None


# -- the command line

# The slot of each device on PCI bus 0; whoever is in one stays there, or a guest's network card gets another name.
# 0x00 and 0x1f are the chipset's; 0x01 is free with q35, but pc has its ISA bridge and IDE there.  So a device for both
# takes its slot from the disks, from their end, where MAX_DISKS ends too; a device for q35 alone may take 0x01.
PCI_SLOTS = {
    "share": 0x01, "vga": 0x02, "nic": 0x03, **{f"disk{number}": 0x04 + number for number in range(23)},
    "seed": 0x1B, "usb": 0x1C, "rng": 0x1D, "balloon": 0x1E,
}  # fmt: skip
LAYOUT = "2"  # of new VMs, see layout_args()
HOTPLUG_SLOT, HOTPLUG_PORTS = PCI_SLOTS["disk22"], 4  # of layout 2, which has a disk less
MAX_DISKS = sum(name.startswith("disk") for name in PCI_SLOTS) - 1
LEGACY_MACHINE = "pc"  # what the bash tools ran, and still run where a conf names no machine

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
SEED_ISO, AGENT_SOCKET, RECORD_SOCKET = "seed.iso", "agent.sock", "record.sock"  # in the VM's folder


def comma(text: str) -> str:
    """A value inside a qemu option: its commas are doubled."""
    return text.replace(",", ",,")


@record
class Machine:
    """All that qemu's command line depends on, as plain values; '' for none."""

    qemu: Qemu
    accel: str
    name: str
    settings: Mapping[str, str]  # the VM's, by their keys: a builder reads what it needs
    disks: list[tuple[str, str, str]]  # (path, format, serial)
    pid_file: str
    credentials: str
    extra: list[str]
    iso: str = ""  # an image to boot from
    screen: str = ""  # one of SCREENS
    seed: str = ""  # a folder, or an image of one
    record: str = ""  # where qemu's events are written to
    memory: str = ""  # the file that its memory is in
    wakes: bool = False  # what it did is loaded; it changes its own copy of that file only
    below: Sequence[tuple[str, str]] = ()  # (path, format) of what its first disk stands on, the nearest first
    firmware: Firmware | None = None  # None: BIOS
    variables: str = ""  # the file of that firmware's
    tpm: int = -1  # a connection to its TPM

    def but(self, **changes: object) -> Machine:
        return Machine(**{**{name: getattr(self, name) for name in Machine.__annotations__}, **changes})


def qemu_argv(machine: Machine, tap: int, vhost: int = -1, shares: Sequence[int] = ()) -> list[str]:
    """The whole command line, given the descriptors of its tap, of vhost-net (-1: none) and of its folders' daemons; in
    it paths are relative to the VM's folder, qemu's working directory."""
    return [
        machine.qemu.path, *machine_args(machine), *cpu_args(machine), *firmware_args(machine), *layout_args(machine),
        *disk_args(machine), *iso_args(machine), *seed_args(machine), *net_args(machine, tap, vhost),
        *console_args(machine), *exchange_args(machine), *memory_args(machine),
        *(["-incoming", "defer"] if machine.wakes else []), *share_args(machine, shares), *screen_args(machine),
        *monitor_args(machine), *kernel_args(machine), *machine.extra,
    ]  # fmt: skip


def machine_args(machine: Machine) -> list[str]:
    """-name comes first: it is what one looks for in ps.  The VGA stays without a screen, too: Debian's boot loader
    hangs without one; arm64 has another, for its caches and VGA's memory don't go together."""
    arm = machine.qemu.arch == "aarch64"
    sandbox = ["-sandbox", SANDBOX] if "sandbox" in machine.qemu.options else []
    return [
        "-name", f"guest={comma(machine.name)}", "-nodefaults", "-no-user-config",
        "-machine", (machine.settings["vmMachine"] or LEGACY_MACHINE) + (",gic-version=max" if arm else ""),
        "-m", f"{machine.settings['vmMem']}M", "-uuid", machine.settings["vmUuid"],
        "-vga", "none", "-device", f"{'virtio-gpu-pci' if arm else 'VGA'},addr={PCI_SLOTS['vga']:#x}",
        "-display", "none", "-rtc", "base=utc", *sandbox,
    ]  # fmt: skip


def cpu_args(machine: Machine) -> list[str]:
    cpus = int(machine.settings["vmCpu"])  # to qemu a leading zero says octal
    smp = ["-smp", f"{cpus},sockets=1,cores={cpus},threads=1"]
    if machine.accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host", *smp]
    # Arm's own way to sign pointers takes long when it is emulated.
    signing = ",pauth-impdef=on" if machine.qemu.arch == "aarch64" else ""
    return ["-accel", "tcg,thread=multi", "-cpu", f"max{signing}", *smp]


def firmware_args(machine: Machine) -> list[str]:
    """Credentials go in by file: a `value=` would be read in /proc by every local user; the hostname is no secret."""
    words = ["-boot", "menu=off,strict=on"]
    if machine.credentials:
        words += ["-smbios", f"type=11,path={comma(machine.credentials)}"]
        words += ["-smbios", f"type=11,value=io.systemd.credential:system.hostname={machine.name}"]
    if machine.firmware:
        (code, format), smm = machine.firmware.code, ",smm=on" if "requires-smm" in machine.firmware.features else ""
        place = f"read-only=on,file.driver=file,file.filename={comma(code)}"
        words += ["-blockdev", f"driver={format},node-name=flash0,{place}", "-blockdev"]
        words += [f"driver=qcow2,node-name=flash1,file.driver=file,file.filename={comma(machine.variables)}"]
        words += ["-machine", f"pflash0=flash0,pflash1=flash1{smm}"]
        words += ["-global", "driver=cfi.pflash01,property=secure,value=on"] if smm else []
    if machine.tpm >= 0:
        device = "tpm-tis-device" if machine.settings["vmMachine"].startswith("virt") else "tpm-crb"
        words += ["-chardev", f"socket,id=tpm0,fd={machine.tpm}", "-tpmdev", "emulator,id=tpm0,chardev=tpm0"]
        words += ["-device", f"{device},tpmdev=tpm0"]
    return words


def disk_args(machine: Machine) -> list[str]:
    """vda, vdb … in order, each with a serial, for /dev/disk/by-id/virtio-NAME_1: 20 bytes (VIRTIO_BLK_ID_BYTES), of a
    long name the end, which tells disks apart.  -blockdev, not -drive: nothing is guessed from content."""
    words: list[str] = []
    first = 1 if machine.iso or machine.settings["vmKernel"] else 0
    unplugged = len(machine.disks) - int(machine.settings["vmPlugged"])
    below = ""  # else it leaves the host's page cache as a clone wakes (file-posix.c, raw_co_invalidate_cache)
    for depth, (path, format) in enumerate(machine.below, 1):
        at = "backing." * depth
        below += f",{at}driver={format},{at}file.driver=file,{at}file.filename={comma(path)},{at}file.drop-cache=off"
    for number, (path, format, serial) in enumerate(machine.disks):
        node = f"disk{number}"
        words += [
            "-blockdev",
            f"driver={format},node-name={node},discard=unmap,detect-zeroes=unmap"
            f",file.driver=file,file.filename={comma(path)},file.discard=unmap{'' if number else below}",
            "-device",
            f"virtio-blk-pci,drive={node},"
            + (f"addr={PCI_SLOTS[node]:#x}" if number < unplugged else f"bus=port{number - unplugged}")
            + f",bootindex={first + number},serial={comma(serial[-20:])}",
        ]
    return words


def iso_args(machine: Machine) -> list[str]:
    """The ISO in a CD drive, and first in the boot order.

    ide-cd on the controller that the machine has anyway (q35: AHCI, pc: PIIX3's IDE; both call its first bus ide.0):
    SeaBIOS boots from it, and it is the one drive that every installer's kernel finds.  A scsi-cd needs virtio_scsi,
    which older installers lack; on virtio-blk, or as a USB stick, many look for no CD at all.  arm64's virt has no IDE.
    """
    if not machine.iso:
        return []
    arm, scsi = machine.qemu.arch == "aarch64", f"virtio-scsi-pci,id=scsi0,addr={PCI_SLOTS['seed']:#x}"
    return [
        "-blockdev", f"driver=raw,node-name=iso,read-only=on,file.driver=file,file.filename={comma(machine.iso)}",
        *(["-device", scsi] if arm else []),
        "-device", f"{'scsi-cd,bus=scsi0.0' if arm else 'ide-cd,bus=ide.0'},drive=iso,bootindex=0",
    ]  # fmt: skip


def seed_args(machine: Machine) -> list[str]:
    """cloud-init's NoCloud volume, after all disks: read only, and there at each boot, since cloud-init looks at it.
    On virtio-blk: Debian's cloud kernels have no IDE and SATA drivers; without a bootindex: never booted.  SMBIOS type
    1's serial tells of a seed before disks are looked at (ds-identify): one that shows up late is waited for."""
    if not machine.seed:
        return []
    if os.path.basename(machine.seed) == SEED_ISO:
        node = f"driver=raw,node-name=seed,read-only=on,file.driver=file,file.filename={comma(machine.seed)}"
    else:  # a FAT file system that qemu makes up of the folder's files
        node = f"driver=vvfat,node-name=seed,read-only=on,dir={comma(machine.seed)},label=CIDATA"
    return [
        "-blockdev", node,
        "-device", f"virtio-blk-pci,drive=seed,addr={PCI_SLOTS['seed']:#x},serial=seed",
        "-smbios", "type=1,serial=ds=nocloud",
    ]  # fmt: skip


@functools.cache
def choose_seed(qemu: Qemu) -> str:
    """How a seed is attached: `vvfat`, or `iso` where the binary lacks that (RHEL's), as `-drive format=help` says; the
    QMP schema doesn't heed which drivers may be used.  Raises MissingProgram where no ISO can be written either."""
    if "vvfat" in run([qemu.path, "-drive", "format=help"], check=False, merge=False).stdout.split():
        return "vvfat"
    if find_iso_writer():
        return "iso"
    said = f"{qemu.path} has no vvfat driver, and no program writes ISO images: one of them makes cloud-init's seed"
    raise MissingProgram(said, install_command("xorriso"))


def net_args(machine: Machine, tap: int, vhost: int) -> list[str]:
    """The tap comes as an open descriptor and goes away with qemu.  romfile= leaves the PXE ROM out: quicker start."""
    if tap < 0:
        return []
    kernel_side = f",vhost=on,vhostfd={vhost}" if vhost >= 0 else ""
    return [
        "-netdev", f"tap,id=net0,fd={tap}{kernel_side}",
        "-device", f"virtio-net-pci,netdev=net0,mac={machine.settings['vmMac']},addr={PCI_SLOTS['nic']:#x},romfile=",
    ]  # fmt: skip


def console_args(machine: Machine) -> list[str]:
    """The serial line is a socket for vmconsole and a log at the same time, of this start; logappend=on: what writes
    to it in the middle, after etc/console.sh has emptied it, would leave a hole before that."""
    chardev = "socket,id=serial0,path=serial.sock,server=on,wait=off,logfile=console.log,logappend=on"
    words = ["-chardev", chardev, "-serial", "chardev:serial0"]
    if machine.settings["vmLayout"] != "1":
        words += ["-chardev", f"socket,id=serial1,path={AGENT_SOCKET},server=on,wait=off", "-serial", "chardev:serial1"]
    return words


def layout_args(machine: Machine) -> list[str]:
    """What came with layout 2: a generation ID that tells the guest's kernel that it is a copy (vmgenid), a serial line
    by which a guest that wakes is told who it is, and PCIe ports for disks that come while it runs; pc has none."""
    if machine.settings["vmLayout"] == "1":
        return []
    words = ["-device", "vmgenid,guid=auto"]
    for number in range(HOTPLUG_PORTS) if "q35" in machine.settings["vmMachine"] else ():
        place = f"addr={HOTPLUG_SLOT:#x}.{number},multifunction=on,chassis={number + 1}"
        words += ["-device", f"pcie-root-port,id=port{number},{place}"]
    return words


def memory_args(machine: Machine) -> list[str]:
    """Memory in a file, for the one who freezes to write; or privately, what a clone changes being its own (QEMU
    docs/system/vm-templating.rst).  A balloon would cut what it gives back out of everybody's file: they have none.  It
    is called as it would be without a file: a qemu that has none can take it up again (qemu(1), memory-backend)."""
    if not machine.memory:
        return []
    share = "off" if machine.wakes else "on"
    place = f"size={machine.settings['vmMem']}M,mem-path={comma(machine.memory)},share={share}"
    name = "id=pc.ram,x-use-canonical-path-for-ramblock-id=off"
    return ["-object", f"memory-backend-file,{name},{place}", "-machine", "memory-backend=pc.ram"]


def exchange_args(machine: Machine) -> list[str]:
    """What host and guest give each other: randomness, of which one that has just been switched on has little, and
    memory that the guest has no use for (free-page-reporting)."""
    words = ["-object", "rng-random,id=rng0,filename=/dev/urandom"]
    words += ["-device", f"virtio-rng-pci,rng=rng0,addr={PCI_SLOTS['rng']:#x}"]
    if machine.settings["vmBalloon"] != "no":
        words += ["-device", f"virtio-balloon-pci,addr={PCI_SLOTS['balloon']:#x},free-page-reporting=on"]
    return words


def share_args(machine: Machine, shares: Sequence[int]) -> list[str]:
    """Folders of the host, functions of one slot, each by a connection to its daemon, which maps the guest's memory."""
    if not shares:
        return []
    memory = f"memory-backend-memfd,id=ram0,size={machine.settings['vmMem']}M,share=on"
    words = ["-object", memory, "-machine", "memory-backend=ram0"]
    for number, fd in enumerate(shares):
        name, address = f"share{number}", f"{PCI_SLOTS['share']:#x}.{number}"
        words += ["-chardev", f"socket,id={name},fd={fd}"]
        words += ["-device", f"vhost-user-fs-pci,chardev={name},tag={name},addr={address},multifunction=on"]
    return words


# The servers of a VM's screen, by what they speak; the first that the binary has is taken.
SCREENS = {"spice": ["-spice", "unix=on,addr=spice.sock,disable-ticketing=on"], "vnc": ["-vnc", "unix:vnc.sock"]}


def screen_args(machine: Machine) -> list[str]:
    """A screen on a unix socket in the VM's folder: who may connect is who may open the socket, so no password.  The
    tablet makes the guest's pointer stay under the viewer's; USB, because every system has a driver for it."""
    if not machine.screen:
        return []
    tablet = ["-device", f"qemu-xhci,id=usb0,addr={PCI_SLOTS['usb']:#x}", "-device", "usb-tablet,bus=usb0.0"]
    keys = ["-device", "usb-kbd,bus=usb0.0"] if machine.qemu.arch == "aarch64" else []  # x86 has PS/2's
    return [*SCREENS[machine.screen], *tablet, *keys]


def choose_screen(qemu: Qemu) -> str:
    """What the binary can show a screen with: `spice`, `vnc` or ''.  `-spice help` knows: of a SPICE module of its own
    (Debian) the QMP schema names what isn't installed, query-command-line-options leaves out what is."""
    if "disable-ticketing" in run([qemu.path, "-spice", "help"], check=False).stdout:
        return "spice"
    return "vnc" if "vnc" in qemu.options else ""


def monitor_args(machine: Machine) -> list[str]:
    """QMP for the commands, and the monitor for humans, which vmmanage joins to a terminal.  A second QMP's log is the
    record: qemu writes its events there whether or not a client is connected."""
    words = [
        "-chardev", "socket,id=qmp0,path=qmp.sock,server=on,wait=off", "-mon", "chardev=qmp0,mode=control",
        "-chardev", "socket,id=monitor0,path=monitor.sock,server=on,wait=off",
        "-mon", "chardev=monitor0,mode=readline", "-pidfile", machine.pid_file,
    ]  # fmt: skip
    if machine.record:
        place = f"path={RECORD_SOCKET},server=on,wait=off,logfile={comma(machine.record)},logappend=off"
        words += ["-chardev", f"socket,id=record0,{place}", "-mon", "chardev=record0,mode=control"]
    return words


def kernel_args(machine: Machine) -> list[str]:
    """qemu gives its loader of kernels bootindex 0, as we do an ISO, which boots first (hw/i386/x86.c)."""
    if machine.iso:
        return []
    words = (("-kernel", "vmKernel"), ("-initrd", "vmInitrd"), ("-append", "vmAppend"))
    return [word for option, key in words if machine.settings[key] for word in (option, machine.settings[key])]


# -- what a start leaves in a VM's folder

# And the pidfile.  The credentials stay, for whoever starts it by hand.
RUNTIME_FILES = ("qmp.sock", "serial.sock", "monitor.sock", "spice.sock", "vnc.sock", AGENT_SOCKET, RECORD_SOCKET)


def screen_of(vm: VM) -> str:
    """What a running VM's screen speaks, or '' where it has none."""
    return next((screen for screen in SCREENS if os.path.exists(vm.file(f"{screen}.sock"))), "")


def cgroup_name(vm: VM) -> str:
    """What the cgroup that limits a VM is called: by its folder, which is there whatever its conf says."""
    info = os.stat(vm.folder)
    return f"nocloud-{info.st_dev}-{info.st_ino}"


def remove_runtime_files(vm: VM) -> None:
    for folder, _, _ in CPU_LIMITS.values():
        remove_empty(f"{CGROUPS}/{folder}{cgroup_name(vm)}")
    for path in (*map(vm.file, RUNTIME_FILES), vm.ready_file, vm.still_file, vm.pid_file):
        remove_file(path)


# Networks ############################################################################################
#
# What both networks have: a VM gets a tap as an open descriptor, the commands a way to its ports, and dnsmasq a file
# for each VM that has a name and an address.

DOMAIN = "nocloud"


class Network:
    """What the lifecycle needs of a network."""

    kind = ""
    hosts: HostFiles | Inbox  # the VMs that have names on it

    def up(self, keep: bool = False) -> None:
        """Bring up what isn't up, where that is ours to do.  Raises Error where the network can't be had."""

    def hold(self) -> Any:
        """A context in which the network is up and stays up."""
        self.up()
        return contextlib.nullcontext()

    def admit(self, vms: Iterable[VM]) -> None:
        """Take note that these VMs get taps next: for many at once that is quicker."""

    def tap(self, vm: VM | None = None) -> tuple[int, int]:
        """(tap, vhost-net or -1): descriptors for qemu, of a VM; the tap is gone when the last one is closed."""
        raise NotImplementedError

    def socket(self) -> socket.socket:
        """A TCP socket, not yet connected, that reaches the VMs."""
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)

    def enter(self, argv: Sequence[str]) -> tuple[list[str], list[int]]:
        """(words, descriptors to pass on) that run `argv` where the network is."""
        return list(argv), []

    def move_in(self) -> None:
        """Put this process, of one thread, where the network is, and where names resolve as its VMs resolve them."""

    def allot(self, taken: set[str], uuid: str) -> str:
        """A free address for the VM, added to `taken`; '' where the network's DHCP server decides."""
        return ""

    def fits(self, address: str) -> bool:
        """Whether a VM can keep the address that it was allotted."""
        return bool(address)

    def address(self, vm: VM) -> str:
        return vm.get("vmAddress")

    def publish(self, vm: VM) -> None:
        """Make the VM's names resolve and its address its own."""
        self.hosts.publish(vm)

    def withdraw(self, uuids: Sequence[str]) -> None:
        """Forget VMs that are gone."""

    def proxy_command(self) -> str:
        """ssh's ProxyCommand that gets there; '' where the VMs are reached directly."""
        return ""

    def open(self) -> None:
        """Open what threads will need: it can't be opened once there are threads."""

    def close(self) -> None:
        """Close what this process holds of it; the network itself stays."""


def vhost_net() -> int:
    """/dev/vhost-net, which moves packets without leaving the kernel, or -1 where it can't be had."""
    with contextlib.suppress(OSError):
        return os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC)
    return -1


def nft_rules(name: str, **defines: str) -> bytes:
    """nft(8)'s input: `defines`, and a file of etc/.  Raises Error where nocloud.py was copied without that."""
    return "".join([*(f"define {key} = {value}\n" for key, value in defines.items()), need_packaged(name)]).encode()


def write_proc(path: str, value: str) -> None:
    """Write a sysctl, or another file of /proc, that isn't so already."""
    if read_text(path).strip() != value:
        with open(path, "w", encoding="ascii") as file:
            file.write(value)


# -- addresses


def ip_json(*words: str) -> list[dict[str, Any]]:
    """What `ip -json` says (ip(8))."""
    answer = json.loads(run(["ip", "-json", "-4", *words]).stdout or "[]")
    return [each for each in answer if each]


def networks_in_use(without: str = "") -> Iterator[tuple[str, ipaddress.IPv4Network]]:
    """(who, network) of each address and route of the host but those of the interface `without`, default routes, and
    the two halves of the world that a VPN has instead."""
    for card in ip_json("address"):
        for each in card.get("addr_info", ()):
            if card["ifname"] != without:
                own = f"{each['local']}/{each['prefixlen']}"
                yield f"{card['ifname']} has {own}", ipaddress.IPv4Network(own, strict=False)
    for route in ip_json("route", "show", "table", "all"):
        # a route of the kernel's own is that of an address above
        others = route.get("type") not in ("local", "broadcast") and route.get("protocol") != "kernel"
        if others and is_ipv4(route["dst"].partition("/")[0]) and route.get("dev") != without:
            network = ipaddress.IPv4Network(route["dst"])
            if network.prefixlen > 1:
                yield f"there is a route to {route['dst']}" + (f" by {route['dev']}" if "dev" in route else ""), network


def first_free(networks: Iterable[str], taken: Iterable[ipaddress.IPv4Network]) -> str:
    """The first of these networks, as 10.88.0.0/24, that overlaps none that is taken; '' where all do."""
    others = list(taken)
    return next((each for each in networks if not any(map(ipaddress.IPv4Network(each).overlaps, others))), "")


# -- daemons


def daemon_pid(pid_file: str) -> int:
    """The pid of the daemon that wrote the file, or 0; it names the file on its command line, and a reused pid doesn't.
    Raises OSError where that can't be found out, for want of descriptors say: it isn't started a second time then."""
    try:
        pid = int(read_text(pid_file))
        words = read_text(f"/proc/{pid}/cmdline").split("\0")
    except (FileNotFoundError, NotADirectoryError, PermissionError, ProcessLookupError, ValueError):
        return 0
    return pid if any(word.endswith(pid_file) for word in words) else 0


def end_process(find: Callable[[], int]) -> None:
    """End the process whose pid `find` finds, and wait for that; asked again once a pidfd is open: no other is hit."""
    if pid := find():
        with Process(pid) as process:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if find() == pid:
                    process.signal(number)
                    process.ended(3.0)


def end_strays(program: str, pid_file: str) -> None:
    """End the daemons that would be named in the file, had who started them not been killed at once."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        if process_file(pid, "comm") == f"{program}\n" and f"{pid_file}\0" in process_file(pid, "cmdline"):
            with contextlib.suppress(Error):  # another user's
                end_process(functools.partial(int, pid))


def stop_daemon(pid_file: str) -> None:
    end_process(lambda: daemon_pid(pid_file))
    remove_file(pid_file)


def dnsmasq_argv(interface: str, hosts: HostFiles, *words: str) -> list[str]:
    """dnsmasq(8), 2.90, for the VMs of a bridge, with `words`.  It leaves the foreground when it serves.  Not -d: in
    debug mode one idle TCP client of port 53 stops DNS and DHCP for all."""
    return [
        "dnsmasq", "--quiet-dhcp", "--conf-file=/dev/null", "--no-hosts",
        f"--interface={interface}", "--except-interface=lo", "--bind-interfaces",
        f"--domain={DOMAIN}", f"--local=/{DOMAIN}/", "--domain-needed", "--bogus-priv",
        "--dhcp-authoritative", "--dhcp-rapid-commit", "--no-ping", "--dhcp-ignore-clid",
        f"--dhcp-hostsdir={hosts.folder_of('dhcp')}", f"--hostsdir={hosts.folder_of('hosts')}", *words,
    ]  # fmt: skip


# -- what dnsmasq knows of the VMs


def host_names(name: str) -> list[str]:
    """What a VM NAME.GROUP, or a template, is called in DNS, the full name first."""
    parts = dict.fromkeys((name.lower(), name.lower().partition(".")[0]))
    return [each for part in parts for each in (f"{part}.{DOMAIN}", part)]


def small_file(path: str) -> tuple[os.stat_result, str]:
    """(whose and how old, text); a link, a pipe and what is over 4 KB count for nothing.  Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        info = os.fstat(file.fileno())
        small = stat.S_ISREG(info.st_mode) and info.st_size <= 4096
        return info, file.read(4096).decode("utf-8", "surrogateescape") if small else ""


def small_files(folder: str) -> list[tuple[str, os.stat_result, str]]:
    """The name too, of each that isn't hidden, the oldest first: by its last change, a time that nobody can set."""
    found = []
    for name in names_in(folder):
        with contextlib.suppress(OSError):  # gone meanwhile, or none of ours
            if name[0] != ".":
                found.append((name, *small_file(os.path.join(folder, name))))
    return sorted(found, key=lambda each: (each[1].st_ctime_ns, each[0]))


def has_text(path: str, text: str) -> bool:
    return os.path.isfile(path) and small_file(path)[1] == text


class HostFiles:
    """The VMs that have names and addresses: for each a file in `dhcp/` and one in `hosts/` of `folder`, named by its
    UUID; dnsmasq sees a new one at once (inotify)."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def folder_of(self, kind: str) -> str:
        return os.path.join(self.folder, kind)

    def prepare(self) -> None:
        for kind in ("dhcp", "hosts"):
            make_private_folder(self.folder_of(kind))

    def publish(self, vm: VM) -> None:
        """Make the VM's names resolve, and its address its own.  A name that another VM has stays the other's."""
        self.prepare()
        uuid, address = vm.get("vmUuid"), vm.get("vmAddress")
        taken = {word for other, words in self._files("hosts") if other != uuid for word in words[1:]}
        names = [each for each in host_names(vm.host_name if vm.is_template else vm.dns_name) if each not in taken]
        self.write("hosts", uuid, " ".join([address, *names]) if names else "")
        self.write("dhcp", uuid, f"{vm.get('vmMac')},{address},{vm.host_name},infinite")  # no lease is remembered

    def write(self, kind: str, uuid: str, line: str, mode: int = 0o600) -> None:
        """Where it isn't so already; through a name with a leading dot, which dnsmasq passes over."""
        hidden, path = (os.path.join(self.folder_of(kind), name) for name in ("." + uuid, uuid))
        if not has_text(path, f"{line}\n"):
            write_file(hidden, f"{line}\n", mode, durable=False)  # each start of the VM writes it
            os.replace(hidden, path)

    def lines(self, kind: str) -> dict[str, str]:
        """UUID → line, the oldest first."""
        return {uuid: text.partition("\n")[0] for uuid, _, text in small_files(self.folder_of(kind))}

    def _files(self, kind: str) -> list[tuple[str, list[str]]]:
        return [(uuid, re.findall(r"[^,\s]+", line)) for uuid, line in self.lines(kind).items()]

    def orphans(self, known: set[str]) -> list[str]:
        """The UUIDs that have files here though no such VM is known: its folder was removed by hand."""
        return [uuid for uuid, _ in self._files("dhcp") if uuid not in known]

    def addresses(self) -> set[str]:
        """The addresses that VMs have: also those whose conf can't be read just now."""
        return {word for _, words in self._files("dhcp") for word in words if is_ipv4(word)}

    def members(self) -> Iterator[tuple[str, str, str]]:
        """(name, MAC, address) of each VM; the name in full."""
        names = {uuid: words[1] for uuid, words in self._files("hosts") if len(words) > 1}
        for uuid, words in self._files("dhcp"):
            if len(words) == 4 and is_ipv4(words[1]):
                yield names.get(uuid, words[2]), words[0].lower(), words[1]

    def withdraw(self, uuids: Sequence[str]) -> bool:
        """Remove the files of VMs; the next oldest VM of a name gets the bare name.  Whether there were any."""
        paths = [os.path.join(self.folder_of(kind), uuid) for uuid in uuids for kind in ("dhcp", "hosts")]
        paths = list(filter(os.path.exists, paths))
        for path in paths:
            remove_file(path)
        named = [(uuid, words) for uuid, words in self._files("hosts") if len(words) > 1] if paths else []
        taken = {word for _, words in named for word in words}
        for uuid, words in named:
            bare = words[1].partition(".")[0]
            if bare not in taken:
                taken.add(bare)
                self.write("hosts", uuid, " ".join([*words, f"{bare}.{DOMAIN}", bare]))
        return bool(paths)


class Inbox:
    """What users say of their VMs on a network that they share: a file each, named by the VM's UUID, `ADDRESS MAC
    NAME.GROUP`, or ADDRESS alone, held for a VM in the making.  Each user can add files and remove only his own; what
    is in others' is input.  A comment says of which tree the VM is, not by its path, which tells others too much."""

    FORM = re.compile(
        r"([0-9.]{7,15})(?: ((?:[0-9a-f]{2}:){5}[0-9a-f]{2}) ([A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9._-]{1,63})?))?\n"
        r"(# tree [0-9a-f]{16}\n)"
    )

    def __init__(self, folder: str, tree: str) -> None:
        self.folder, self._tree = folder, tree

    @property
    def mark(self) -> str:
        return f"# tree {hashlib.sha256(self._tree.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}\n"

    def denied(self) -> bool:
        """Whether this user may not use it."""
        return not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK)

    def entries(self) -> Iterator[tuple[str, os.stat_result, list[str]]]:
        """(UUID, whose and how old, [address, MAC, name, mark]) of each file, the oldest first; '': not said."""
        for uuid, info, text in small_files(self.folder):
            match = self.FORM.fullmatch(text)
            if match and re.fullmatch("[0-9A-Fa-f-]{36}", uuid) and is_ipv4(match.group(1)):
                yield uuid, info, [each or "" for each in match.groups()]

    def publish(self, vm: VM) -> None:
        name = vm.host_name if vm.is_template else vm.dns_name
        self._write(vm.get("vmUuid"), f"{vm.get('vmAddress')} {vm.get('vmMac').lower()} {name}")

    def reserve(self, uuid: str, address: str) -> bool:
        """Hold an address for a VM that is being made, unless another one has it.  Not under a lock, which whoever may
        take it could keep: who finds another's file that isn't younger than his own, or one with a MAC, which
        publishing makes young again, gives way.  Of two at once both may, and neither has it with the other."""
        self._write(uuid, address)
        others = [each for each in self.entries() if each[2][0] == address]
        ages = {other: 0 if words[1] else info.st_ctime_ns for other, info, words in others}
        mine = ages.pop(uuid, 0)
        return all(mine < age for age in ages.values())

    def _write(self, uuid: str, line: str) -> None:
        """Where it isn't so already: its age counts."""
        path, text = os.path.join(self.folder, uuid), f"{line}\n{self.mark}"
        if not has_text(path, text):
            write_file(path, text, 0o640, durable=False)

    def orphans(self, known: set[str]) -> list[str]:
        """The UUIDs of this tree's VMs that are here though no such VM is known: its folder was removed by hand."""
        mine = [each[0] for each in self.entries() if each[1].st_uid == os.geteuid() and each[2][3] == self.mark]
        return [uuid for uuid in mine if uuid not in known]

    def withdraw(self, uuids: Sequence[str]) -> bool:
        """Remove the files of VMs that are gone.  Whether there were any."""
        paths = list(filter(os.path.lexists, (os.path.join(self.folder, uuid) for uuid in uuids)))
        for path in paths:
            try:
                remove_file(path)
            except PermissionError:
                report.warn(f"{path} stays: it is another user's")
        return bool(paths)


# The private network #################################################################################
#
# A bridge, dnsmasq and a way out in namespaces of our own, which need no root; one for each VM tree.

BRIDGE, BRIDGE_MAC = "nocloud", "02:00:6e:63:00:01"  # the bridge inside the private network


# -- namespaces, entered by descriptors

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWNS = 0x10000000, 0x40000000, 0x20000  # linux/sched.h


def trim_memory() -> None:
    """Give freed memory back to the system: where no bytecode was cached, 12 MB that compiling this module took."""
    with contextlib.suppress(AttributeError):  # a libc other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def libc_call(name: str, *numbers: int) -> None:
    """unshare(2) or setns(2) of libc; module os has them only from Python 3.12 on."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*numbers):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


class Namespaces:
    """A user and a network namespace, held open."""

    def __init__(self, pid: int, *files: str) -> None:
        """Those that a process is in, or that it has open as these files of its /proc folder."""
        places = files or ("ns/user", "ns/net")
        self.user, self.net = (os.open(f"/proc/{pid}/{place}", os.O_RDONLY | os.O_CLOEXEC) for place in places)

    def enter(self) -> None:
        """Put this process, of one thread, inside: the user namespace first, since it gives the right to the other."""
        libc_call("setns", self.user, CLONE_NEWUSER)
        libc_call("setns", self.net, CLONE_NEWNET)

    def close(self) -> None:
        os.close(self.user)
        os.close(self.net)


def ask_child(work: Callable[[], None], keep: Sequence[int] = ()) -> tuple[int, str]:
    """(pid, why it failed or '') of a child of fork_child() that has done `work`, or has become another program."""
    mine, its = os.pipe()

    def attempt_it() -> None:
        try:
            work()
        except (OSError, Error) as error:
            os.write(its, str(error).encode())

    pid = fork_child(attempt_it, (its, *keep))
    os.close(its)
    with open(mine, "rb") as pipe:
        return pid, pipe.read().decode("utf-8", "replace")


def new_namespaces(subnet: str, rules: bytes = b"") -> Namespaces:
    """Namespaces of our own that have the private network's bridge, and these rules for nft(8), and that forward.  A
    child makes them, as `unshare -Urn` does, but the errno of a refusal stays known.  A bridge without a MAC of its own
    takes its lowest port's: guests would lose the gateway."""
    uid, gid, sleep = os.geteuid(), os.getegid(), tie(["sleep", "10"])
    batch = (
        f"link set lo up\nlink add {BRIDGE} address {BRIDGE_MAC} type bridge forward_delay 0 no_linklocal_learn 1\n"
        f"addr add {subnet}.1/24 dev {BRIDGE}\nlink set {BRIDGE} up\n"
    )

    def make_and_wait() -> None:
        libc_call("unshare", CLONE_NEWUSER | CLONE_NEWNET)
        write_proc("/proc/self/setgroups", "deny")  # first: gid_map is refused to ordinary users otherwise
        write_proc("/proc/self/uid_map", f"0 {uid} 1")
        write_proc("/proc/self/gid_map", f"0 {gid} 1")
        run(["ip", "-batch", "-"], input=batch.encode())
        write_proc("/proc/sys/net/ipv4/ip_forward", "1")
        if rules:
            run(["nft", "-f", "-"], input=rules)
        become(sleep)

    pid, reason = ask_child(make_and_wait)
    try:
        if reason:
            raise namespaces_denied(reason)
        return Namespaces(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Gate:
    """A child inside that opens taps and sockets: they stay in its namespace wherever their descriptors go."""

    def __init__(self, spaces: Namespaces) -> None:
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self.pid = fork_child(lambda: serve_gate(spaces, its), keep=(its.fileno(), spaces.user, spaces.net))
        its.close()

    def open(self, kind: bytes) -> int:
        """A descriptor: `tap NAME`, on the network's bridge, or `tcp`, a socket.  OSError: the gate's words."""
        with self._lock:
            self._socket.send(kind)
            text, fds, _, _ = socket.recv_fds(self._socket, 256, 1)
        if not fds:
            raise BrokenPipeError(errno.EPIPE, text.decode("utf-8", "replace") or "the private network is gone")
        os.set_inheritable(fds[0], False)
        return fds[0]

    def close(self) -> None:
        self._socket.close()
        os.waitpid(self.pid, 0)


def serve_gate(spaces: Namespaces, asked: socket.socket) -> None:
    """In the gate: answer each request with a descriptor, or why there is none, until the other end is gone."""
    spaces.enter()
    for words in iter(lambda: asked.recv(64).decode().split(), []):
        try:
            fd = make_tap(words[1]) if words[0] == "tap" else socket.socket().detach()
        except OSError as error:
            asked.send(str(error_from_os(error)).encode())
        else:
            socket.send_fds(asked, [b"+"], [fd])
            os.close(fd)


# linux/sockios.h, linux/if_tun.h, linux/if.h
TUNSETIFF, SIOCSIFFLAGS, SIOCBRADDIF = 0x400454CA, 0x8914, 0x89A2
IFF_UP, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x1, 0x2, 0x1000, 0x4000


def tap_name() -> str:
    """As no other tap is called, nor was: nft goes on with what it was told of that one."""
    return f"tap{os.urandom(5).hex()}"


def make_tap(card: str) -> int:
    """A tap of this name on the bridge of the private network that we are in, for `-netdev tap,fd=N`."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", card.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
            bridged = struct.pack("16si20x", BRIDGE.encode(), socket.if_nametoindex(card))
            fcntl.ioctl(control, SIOCBRADDIF, bridged)
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", card.encode(), IFF_UP))
    except BaseException:
        os.close(tap)
        raise
    return tap


# -- the network

# pasta's end inside has addresses that are no one's: the block that RFC 7335 set apart for the inside ends of tunnels.
# Copied from the host, as pasta does by default, they would hide the host's own network from here.
OUT_INTERFACE, OUT_ADDRESS, OUT_GATEWAY, OUT_DNS = "out", "192.0.0.2", "192.0.0.1", "192.0.0.3"
RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x10, 0x40  # linux/rtnetlink.h
FOLLOW_SECONDS = 2.0  # between looks at resolv.conf; the rest is told by netlink


def name_servers() -> list[str]:
    """The servers of resolv.conf(5) that have an IPv4 address, in their order."""
    servers = re.findall(r"^nameserver[ \t]+(\S+)", read_existing("/etc/resolv.conf"), re.M)
    return list(filter(is_ipv4, servers))


def host_addresses() -> list[str]:
    """This host's IPv4 addresses, or ranges of them, without the loopback's: /proc/net/fib_trie needs no program."""
    leaves = re.findall(r"-- (\S+)\n(?: +/\d+ \S+ [A-KM-Z].*\n)*? +(/\d+) host LOCAL", read_text("/proc/net/fib_trie"))
    return sorted({address + length for address, length in leaves if address[:4] != "127."})


def host_state() -> str:
    """What the private network copies of the host, as text: its servers, its addresses, which way it goes out."""
    ways = re.findall(r"^(\S+)\t00000000\t", read_text("/proc/net/route"), re.M)
    return "\n\n".join("\n".join(each) for each in (name_servers(), host_addresses(), ways))


class PrivateNetwork(Network):
    """A bridge, dnsmasq and pasta in a user and a network namespace of our own; one for each VM tree, its state in
    `.net/`.  The holder, which keeps the namespaces, is proved by the lock on its pidfile.  Changes are made under the
    folder's lock, exclusive; who needs the network to stay holds it shared."""

    kind = "private"

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.folder = os.path.join(tree.base, ".net")
        self.hosts: HostFiles = HostFiles(self.folder)
        self.used = False  # this command may leave it without a VM, and ends it then
        self._gate: Gate | None = None
        self._cards: dict[tuple[str, str], str] = {}  # (MAC, address) → the tap that nft knows them to have
        self._spaces: Namespaces | None = None

    def file(self, name: str) -> str:
        return os.path.join(self.folder, name)

    # addresses and names

    def subnet(self) -> str:
        """The first three numbers of its addresses, chosen once and kept: addresses stay what they are."""
        path = self.file("subnet")
        if not os.path.exists(path):
            make_private_folder(self.folder)
            write_file(path, free_subnet([network for _, network in networks_in_use()]) + "\n")
        text = read_text(path).strip()
        if not re.fullmatch(r"10\.[0-9]{1,3}\.[0-9]{1,3}", text):
            raise Error(f"{path}: {text!r} is not the beginning of an address", f"echo 10.88.0 >{path}")
        return text

    def allot(self, taken: set[str], uuid: str) -> str:
        subnet = self.subnet()
        for number in range(2, 255):
            address = f"{subnet}.{number}"
            if address not in taken:
                taken.add(address)
                return address
        raise Error(f"no address is free in {subnet}.0/24", "destroy VMs that are not needed, or use another vmBaseDir")

    def withdraw(self, uuids: Sequence[str]) -> None:
        """Remove their files. dnsmasq forgets a DHCP host only on SIGHUP, and not the address that it had given to it;
        on SIGHUP version 2.90 also crashes if hosts have tags.  So it is started anew, which takes 40 ms."""
        if self.hosts.withdraw(uuids) and self.holder():
            # where the last VM is gone another command, the group's vmrun say, may have ended the network
            with contextlib.suppress(FileNotFoundError), FolderLock(self.folder):
                if self.holder():
                    stop_daemon(self.file("dnsmasq.pid"))
                    self._complete()

    # up and down

    def holder(self) -> int:
        """The pid of the process that keeps the namespaces, or 0.  Raises Error where that can't be found out."""
        state, pid = lock_holder(self.file("holder.pid"))
        if state == "unknown":
            raise Error(f"can't tell whether the private network is up: {self.file('holder.pid')} can't be looked at")
        return pid

    def hold(self) -> Any:
        """The folder's lock, held shared.  Another command may have ended the network that we know and made it anew."""
        self.used = True
        stack = contextlib.ExitStack()
        for _ in range(5):
            stack.enter_context(FolderLock(self.folder, shared=True, make=True))
            if self.is_complete():
                break
            stack.close()
            self.up()
        else:
            log = self.file("dnsmasq.log")
            said = last_line(read_tail(log)) or "its dnsmasq ends"
            raise Error(f"the private network doesn't stay up: {said}", f"see {log}")
        net = (read_text(self.file("holder.pid")).split() or ["ns/net"])[-1]
        if self._spaces and not os.path.samestat(os.fstat(self._spaces.net), os.stat(f"/proc/{self.holder()}/{net}")):
            self.close()
        self.gate()
        return stack

    def is_complete(self) -> bool:
        # Without a pidfile pasta didn't start, with the host as it is: that isn't tried again by each command.
        pasta = daemon_pid(self.file("pasta.pid")) or not os.path.exists(self.file("pasta.pid"))
        return bool(self.holder() and daemon_pid(self.file("dnsmasq.pid")) and pasta and self.is_current())

    def is_current(self) -> bool:
        """Whether what was copied from the host is what the host has now."""
        return read_existing(self.file("host")) == host_state()

    def up(self, keep: bool = False) -> None:
        """Bring up what isn't up.  `keep`: it stays though no VM is on it yet, until the last that comes has gone."""
        self.used = True
        with FolderLock(self.folder, make=True):
            self._complete()
            if keep:
                write_file(self.file("kept"), "", durable=False)

    def _complete(self) -> None:
        """Start what is missing: the holder, dnsmasq, pasta; copy anew what the host has.  Call it under the lock."""
        for name in ("ip", "dnsmasq", "nsenter"):
            need_program(name)
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            said = "the private network can't be made: you may not open /dev/net/tun"
            raise Error(said, "sudo chmod 666 /dev/net/tun")
        if not self.holder():
            self.close()
            self._start_holder()
        if not (find_program("pasta") and find_program("nft")):
            report.say(f"{report.program}: the private network has no way out (pasta and nft would give it one)")
        self._serve()

    def _serve(self) -> None:
        """Start dnsmasq and pasta where they don't run, and have them and the packet filter know the host as it is."""
        state, servers = host_state(), name_servers()
        # A server on the loopback is reached by OUT_DNS, which pasta passes on to the first one that it finds at start.
        local = "".join(each for each in servers[:1] if each[:4] == "127.")
        reached = [OUT_DNS if each == local else each for each in servers if each == local or each[:4] != "127."]
        upstream = "".join(f"nameserver {each}\n" for each in reached)
        write_file(self.file("upstream.conf"), upstream, durable=False)
        if not daemon_pid(self.file("dnsmasq.pid")):
            end_strays("dnsmasq", self.file("dnsmasq.pid"))
            self.hosts.prepare()
            # User and group empty: it can't change to others in a namespace of one id.  No lease file: every address is
            # fixed, and a lease of a VM that is gone would keep its address from the next one.
            self._run_inside(dnsmasq_argv(
                BRIDGE, self.hosts, "--user=", "--group=",
                f"--pid-file={self.file('dnsmasq.pid')}", f"--log-facility={self.file('dnsmasq.log')}",
                f"--resolv-file={self.file('upstream.conf')}", "--strict-order", "--leasefile-ro",
                f"--dhcp-range={self.subnet()}.0,static,255.255.255.0,infinite", "--dhcp-ignore-names",
            ))  # fmt: skip
        try:
            if find_program("nft"):
                self._filter()
                if not os.path.exists(self.file("pasta.dns")) or read_text(self.file("pasta.dns")) != local:
                    stop_daemon(self.file("pasta.pid"))
                    write_file(self.file("pasta.dns"), local, durable=False)
                if find_program("pasta") and not daemon_pid(self.file("pasta.pid")):
                    self._start_pasta(["--dns-forward", OUT_DNS] if local else [])
        except Error as error:  # it still serves
            if not daemon_pid(self.file("pasta.pid")):
                remove_file(self.file("pasta.pid"))
            report.warn(f"the private network has no way out: {error}")
        write_file(self.file("host"), state, durable=False)

    def _start_holder(self) -> None:
        """A child that keeps the namespaces open, new ones or a survivor's, and follows the host from outside.  It
        locks its pidfile, which says as what it has them open, before that gets its name: there means whole."""
        # of the VMs that run on though the last holder was killed
        survivor = next((vm.state()[1] for vm in self._users() if vm.is_readable() and vm.state()[1]), 0)
        spaces = Namespaces(survivor) if survivor else new_namespaces(self.subnet())

        def hold_namespaces() -> None:
            words = [f"fd/{fd}" for fd in (spaces.user, spaces.net)]
            new = self.file("holder.new")
            fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, " ".join(words).encode())
            os.replace(new, self.file("holder.pid"))
            for each in (fd, spaces.user, spaces.net):
                os.set_inheritable(each, True)
            known = {"vmBaseDir": self.tree.base, "vmHostAccess": self.tree.config["vmHostAccess"]}
            os.environ.update({f"NOCLOUD_{key}": value for key, value in known.items()})
            os.chdir("/")
            become(self_argv("net", "follow", *words))

        pid, reason = ask_child(hold_namespaces, (spaces.user, spaces.net))
        spaces.close()
        if reason:
            os.waitpid(pid, 0)
            raise Error(f"the private network can't be made: {reason}")

    def follow(self, places: Sequence[str]) -> None:
        """What the holder does until it is ended: pass on what changes on the host.  It must not look at its own
        pidfile: the lock would be gone when that is closed."""
        self._spaces = Namespaces(os.getpid(), *places)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as changes:
            changes.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE))
            changes.settimeout(FOLLOW_SECONDS)
            while True:
                trim_memory()
                with contextlib.suppress(OSError):  # nothing has changed in that time, or more than it keeps
                    changes.recv(65536)
                with contextlib.suppress(OSError, Error):
                    if not self.is_current():
                        with FolderLock(self.folder, shared=True):
                            self._serve()

    def _start_pasta(self, words: Sequence[str]) -> None:
        """The way out, pasta(1), which leaves the foreground when its interface is there.  By default it opens on the
        host's 0.0.0.0 what listens inside, and gives the gateway's address to the host's loopback: all of that is off.
        As root it would become nobody, who may not enter.  It gets in by a process inside: dnsmasq."""
        pid_file = self.file("pasta.pid")
        remove_file(pid_file)
        argv = [
            "pasta", "--ipv4-only", "--pid", pid_file, "--log-file", self.file("pasta.log"),
            *(["--runas", "0:0"] if os.geteuid() == 0 else []),
            "-t", "none", "-u", "none", "-T", "none", "-U", "none", "--no-map-gw",
            "--config-net", "--ns-ifname", OUT_INTERFACE, "--address", OUT_ADDRESS, "--netmask", "29",
            "--gateway", OUT_GATEWAY, *words, str(daemon_pid(self.file("dnsmasq.pid"))),
        ]  # fmt: skip
        run(argv, cwd="/")

    def _filter(self) -> None:
        """pasta knows one address inside, so the VMs leave under that (nft(8)).  To the host they would come as one of
        its own programs: unless vmHostAccess says yes they begin nothing there, whatever its address."""
        closed = [] if yes_no(self.tree.config["vmHostAccess"]) == "yes" else host_addresses()
        rules = nft_rules("private.nft", out=OUT_INTERFACE, guests=BRIDGE)
        rules += "".join(f"add element ip {DOMAIN} host {{ {each} }}\n" for each in closed).encode()
        self._run_inside(["nft", "-f", "-"], rules)
        among = nft_rules("guests.nft", gateway=f"{self.subnet()}.1", mac=BRIDGE_MAC)
        self._run_inside(["nft", "-f", "-"], among, check=False)  # doctor tells

    def _run_inside(self, argv: Sequence[str], input: bytes | None = None, check: bool = True) -> int:
        words, fds = self.enter(argv)
        done = run(words, input=input, pass_fds=fds, cwd="/", check=False)
        if check and done.returncode:
            raise CommandFailed(argv, done.returncode, done.stdout)  # nsenter's name would say nothing
        return done.returncode

    def down(self) -> None:
        """End it and all inside; subnet and names stay for VMs that the tree has.  Call it under the lock."""
        for name in ("dnsmasq.pid", "pasta.pid"):
            stop_daemon(self.file(name))
        end_process(self.holder)
        for name in (
            "holder.pid", "holder.new", "dnsmasq.log", "pasta.log", "pasta.dns", "kept", "host",
            "upstream.conf", "resolv.conf", "nsswitch.conf",
        ):  # fmt: skip
            remove_file(self.file(name))
        for name in ("dhcp", "hosts"):
            remove_empty(self.file(name))
        if not {"dhcp", "hosts"} & set(names_in(self.folder)):
            remove_file(self.file("subnet"))
            remove_empty(self.folder)

    def down_if_unused(self) -> None:
        """`net down`: refused while VMs are on it.  Twice is harmless."""
        if not os.path.isdir(self.folder):
            return
        with FolderLock(self.folder):
            if users := ", ".join([vm.name for vm in self._users()][:10]):
                raise WrongState(f"the private network is in use by {users}", "vmstop -g GROUP stops a group")
            self.down()

    def tend(self) -> None:
        """End it where its last VM has ended; where VMs are on it, or it was asked to stay, start what was killed.  The
        first and the last that a command does.  Nothing happens while another command is at work on it."""
        if not self.used and not os.path.exists(self.file("holder.pid")):
            return
        try:
            with FolderLock(self.folder, wait=0):
                kept = not self.used and os.path.exists(self.file("kept"))
                wanted = os.path.exists(self.file("holder.pid")) and (kept or any(True for _ in self._users()))
                if not wanted:
                    self.down()
                elif not self.is_complete():
                    self._complete()
        except (WrongState, FileNotFoundError):
            pass
        except (Error, OSError) as error:
            report.warn(f"the private network is not whole: {error}")

    def _users(self) -> Iterator[VM]:
        """The VMs that are on it: running, or not known to have stopped; a template in the making may be booted too."""
        for vm in [*self.tree.unfinished(), *self.tree.vms()]:
            runs = vm.state()[0] != "stopped" and not foreign_qemu(vm)
            if runs and not (vm.is_readable() and vm.get("vmNetwork") == "bridge"):
                yield vm

    # what others use it for

    def namespaces(self) -> Namespaces:
        """Its namespaces, open; the holder is asked again after, so that a reused pid is never entered."""
        if self._spaces is None:
            if not self.holder():
                self.tend()  # it was killed, perhaps, and VMs run on
            if not (pid := self.holder()):
                raise WrongState("the private network is not up", "nocloud net --private up")
            spaces = Namespaces(pid, *read_text(self.file("holder.pid")).split())
            if self.holder() != pid:
                spaces.close()
                raise WrongState("the private network has just gone down", "try again")
            self._spaces = spaces
        return self._spaces

    def open(self) -> None:
        self.gate()

    def close(self) -> None:
        if self._gate:
            self._gate.close()
        if self._spaces:
            self._spaces.close()
        self._gate = self._spaces = None
        self._cards.clear()

    def gate(self) -> Gate:
        """The gate; opened before threads are, since it forks."""
        if self._gate is None:
            self._gate = Gate(self.namespaces())
        return self._gate

    def admit(self, vms: Iterable[VM]) -> None:
        """From no other VM's tap comes what has the MACs and addresses of these, where nft has rules for bridges."""
        pairs = {(vm.get("vmMac"), vm.get("vmAddress")) for vm in vms}
        cards = {pair: tap_name() for pair in pairs if all(pair) and pair not in self._cards}
        if cards and find_program("nft"):
            macs, addresses = zip(*cards)
            own, has = ([f'"{card}" . {each}' for card, each in zip(cards.values(), of)] for of in (macs, addresses))
            sets = {"macs": macs, "addresses": addresses, "own": own, "has": has}
            rules = [f"add element bridge {DOMAIN} {name} {{ {', '.join(each)} }}\n" for name, each in sets.items()]
            with contextlib.suppress(Error):
                if not self._run_inside(["nft", "-f", "-"], "".join(rules).encode(), check=False):
                    self._cards.update(cards)

    def tap(self, vm: VM | None = None) -> tuple[int, int]:
        pair = (vm.get("vmMac"), vm.get("vmAddress")) if vm else ("", "")
        if vm and pair not in self._cards:
            self.admit([vm])
        try:
            return self.gate().open(f"tap {self._cards.pop(pair, tap_name())}".encode()), vhost_net()
        except OSError as error:
            raise Error(f"no tap for the private network: {error.strerror}") from None

    def socket(self) -> socket.socket:
        return socket.socket(fileno=self.gate().open(b"tcp"))

    def enter(self, argv: Sequence[str]) -> tuple[list[str], list[int]]:
        """nsenter keeps session, folder and descriptors, and becomes the program."""
        spaces = self.namespaces()
        ways = [f"--user=/proc/self/fd/{spaces.user}", f"--net=/proc/self/fd/{spaces.net}"]
        program = find_program(argv[0]) or argv[0]
        return ["nsenter", *ways, "--preserve-credentials", "--", program, *argv[1:]], [spaces.user, spaces.net]

    def move_in(self) -> None:
        """In a mount namespace: glibc asks dnsmasq, and neither systemd-resolved nor nscd, which are outside."""
        self.namespaces().enter()
        try:
            libc_call("unshare", CLONE_NEWNS)
            for folder in filter(os.path.isdir, ("/run/systemd/resolve", "/run/nscd")):
                run(["mount", "-n", "-t", "tmpfs", "tmpfs", folder])
            self._replace("/etc/resolv.conf", f"search {DOMAIN}\nnameserver {self.subnet()}.1\n")
            if os.path.exists("/etc/nsswitch.conf"):  # musl has none
                lines = read_text("/etc/nsswitch.conf")
                self._replace("/etc/nsswitch.conf", re.sub(r"(?m)^\s*hosts:.*", "hosts: files dns", lines))
        except (OSError, Error) as error:
            report.warn(f"names of VMs don't resolve: {error}")

    def _replace(self, path: str, text: str) -> None:
        """Have a file be another one in this mount namespace; it may be a link into a folder that is hidden here."""
        place, own = os.path.realpath(path), self.file(os.path.basename(path))
        write_file(own, text, 0o644, durable=False)
        os.close(os.open(place, os.O_CREAT | os.O_CLOEXEC, 0o644))
        run(["mount", "-n", "--bind", own, place])

    def proxy_command(self) -> str:
        """ssh runs outside: inside, root's files in ssh_config.d look foreign to it, and the home is root's."""
        words = ["env", f"NOCLOUD_vmBaseDir={self.tree.base}", *self_argv("net", "--fdpass", "connect")]
        way = shlex.join(words).replace("%", "%%")
        return f"{way} %h %p"

    def connect(self, address: str, port: int, hand_over: bool = False) -> None:
        """Join stdin and stdout to a port inside.  Raises Error where nothing answers there.  `hand_over`: give the
        connection itself to ssh, over the socket that is our stdout (ssh_config(5), ProxyUseFdpass), and be done."""
        if is_ipv4(address):
            self.namespaces().enter()
        else:
            self.move_in()
        try:
            connection = socket.create_connection((address, port), 30)
        except OSError as error:
            raise Error(f"{address}:{port}: {error.strerror or 'no answer within 30 s'}") from None
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not hand_over:
            relay(connection)
            return
        with socket.socket(fileno=os.dup(1)) as ssh:
            socket.send_fds(ssh, [b"\0"], [connection.fileno()])

    def status(self) -> Iterator[str]:
        """Lines for people: whether it is up, and who is on it."""
        if not self.holder():
            yield "private network: down"
            return
        yield f"private network: up, {self.subnet()}.0/24, state in {self.folder}"
        for name in ("dnsmasq", "pasta"):
            pid = daemon_pid(self.file(f"{name}.pid"))
            yield f"{name}: process {pid}" if pid else f"{name}: not running"
        for vm in self._users():
            if vm.is_readable():
                yield f"{vm.name} {vm.place} {vm.get('vmMac')} {vm.get('vmAddress')}"


# What forbids user namespaces, when it has this value, and the value that allows them.
USERNS_SETTINGS = (
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ("kernel/unprivileged_userns_clone", "0", "1"),
    ("user/max_user_namespaces", "0", "65536"),
    ("user/max_net_namespaces", "0", "65536"),
)


def namespaces_denied(reason: str) -> Error:
    """Why there is no private network, with the command that mends it where that is known."""
    for name, forbids, allows in USERNS_SETTINGS:
        path = f"/proc/sys/{name}"
        if read_existing(path).strip() == forbids:
            text = f"the private network can't be made: this host grants no user namespaces ({reason})"
            return Error(text, f"sudo sysctl -w {name.replace('/', '.')}={allows}")
    hint = "in a container, its seccomp profile must allow unshare; or use the host's bridge: vmNetwork=bridge"
    return Error(f"the private network can't be made: {reason}", hint)


def free_subnet(taken: Sequence[ipaddress.IPv4Network]) -> str:
    """The first /24 of 10.88 to 10.127 that overlaps none of these networks, as `10.88.0`.  A VPN may claim all of
    10.0.0.0/8: where nothing is left, only narrower networks count."""
    for widest in (2, 9, 17):
        subnets = (f"10.{number >> 8}.{number & 255}.0/24" for number in range(88 << 8, 128 << 8))
        if free := first_free(subnets, (network for network in taken if network.prefixlen >= widest)):
            return free.removesuffix(".0/24")
    said = "no subnet is free between 10.88.0.0 and 10.127.255.0: this host has routes to all of them"
    raise Error(said, "vmNetwork=bridge")


# -- joining a connection to stdin and stdout


def relay(connection: socket.socket) -> None:
    """Join stdin and stdout to the connection; each end of file is passed on, and both ends end it."""
    for fd in (0, 1):
        os.set_blocking(fd, True)  # a terminal that another program shares may not be
    send = (lambda: os.read(0, MIB), connection.sendall, lambda: connection.shutdown(socket.SHUT_WR))
    sender = threading.Thread(target=pump, args=send, daemon=True)
    sender.start()
    pump(lambda: connection.recv(MIB), lambda data: write_all(1, data), lambda: os.close(1))
    sender.join()


def pump(source: Callable[[], bytes], sink: Callable[[bytes], object], finish: Callable[[], object]) -> None:
    """From source to sink, until the one ends or the other is gone; then `finish`, if that is still there."""
    with contextlib.suppress(OSError):
        for data in iter(source, b""):
            sink(data)
    with contextlib.suppress(OSError):
        finish()


# The host's bridge ###################################################################################
#
# What root does to the host for a bridge that all users share, what is undone again, and how a user's VM gets on it.


# -- what is wanted, and what is there

STATE_FOLDER = "/var/lib/nocloud"  # the leases, what users publish of their VMs, and what of that is served
SETUP_FOLDER = "/run/nocloud-setup"  # the lock of who installs
RUN_FOLDER = "/run/nocloud"  # what `up` switched on; gone with the next boot, as that is
MADE_BY_US = "made by nocloud"  # the comment of each rule of ours
OUR_MAC = "02:6e:63"  # a bridge whose MAC begins so is one of ours; locally administered
SYSTEMD_UNITS = ("nocloud-bridge.service", "nocloud-dnsmasq.service", "nocloud-dnsmasq-reload.path")


class BridgeSettings:
    """The host's bridge as the settings want it.  Raises UsageError where they contradict each other."""

    def __init__(self, config: Config) -> None:
        self.interface, self.address = config["bridgeInterface"], config["bridgeAddress"].partition("/")[0]
        self.network = ipaddress.IPv4Network(config["bridgeAddress"], strict=False)
        self.net = str(self.network)
        for key in ("bridgeIpAddress", "bridgeNet", "bridgeDhcpStart", "bridgeDhcpStop"):
            if not (config[key] == self.net if key == "bridgeNet" else self.holds(config[key])):
                said = f"{key}={config[key]} doesn't fit bridgeAddress={config['bridgeAddress']}"
                hint = "see etc/nocloud_net.conf, where bridgeNet and what comes after it follow bridgeSubnet"
                raise UsageError(said, hint)
        ends = (config["bridgeDhcpStart"], config["bridgeDhcpStop"])
        self.first, self.last = sorted(map(ipaddress.IPv4Address, ends))
        # The upper quarter is for guests that nobody allotted an address to: one that is allotted to a VM must not be
        # leased to another guest in the same moment.
        self.first_dynamic = self.last - max(1, (int(self.last) - int(self.first) + 1) // 4) + 1
        # A bridge without a MAC of its own takes its lowest port's, and guests would lose the gateway.
        self.mac = OUR_MAC + "".join(f":{int(number):02x}" for number in self.address.split(".")[1:])

    def holds(self, address: str) -> bool:
        return is_ipv4(address) and ipaddress.IPv4Address(address) in self.network

    def allots(self, address: str) -> bool:
        """Whether it is one for VMs."""
        ours = self.holds(address) and address != self.address
        return ours and self.first <= ipaddress.IPv4Address(address) < self.first_dynamic


def overlapping(settings: BridgeSettings) -> str:
    """Who has addresses of the bridge's network already, or ''."""
    return next((who for who, at in networks_in_use(settings.interface) if at.overlaps(settings.network)), "")


def choose_bridge_subnet(config: Config) -> tuple[str, str]:
    """(a subnet that nothing on this host overlaps, why it isn't the configured one or '')."""
    settings = BridgeSettings(config)
    if not (clash := overlapping(settings)):
        return config["bridgeSubnet"], ""
    subnets = (f"192.168.{number}.0/24" for number in (*range(200, 255), *range(2, 200)))  # homes have the low ones
    if free := first_free(subnets, (network for _, network in networks_in_use(settings.interface))):
        return free.removesuffix(".0/24"), clash
    raise Error("no subnet is free in 192.168.0.0/16", "set bridgeSubnet to one of 10.0.0.0/8 in etc/nocloud_net.conf")


def free_bridge_subnet(config: Config, path: str) -> str:
    """Make the settings file `path` name a subnet that nothing on this host overlaps, where the one configured isn't;
    what was chosen, in words.  Only bridgeSubnet's line is written.  Raises Error where others don't follow it."""
    net = BridgeSettings(config).net
    subnet, clash = choose_bridge_subnet(config)
    if not clash:
        return f"the bridge's network is {net}"
    text, config = update_assignments(read_text(path), {"bridgeSubnet": subnet}), Config()
    config.take(text, path, warn=lambda text: None)
    if not BridgeSettings(config).holds(f"{subnet}.0"):
        said = f"{path}: bridgeNet and bridgeAddress don't follow bridgeSubnet"
        raise Error(said, f"set them to {subnet}.0/24 by hand")
    write_file(path, text, 0o644)
    return f"the bridge's network is {subnet}.0/24, not {net}: {clash} (written to {path})"


def bridge_is_ours(interface: str) -> bool:
    return read_existing(f"/sys/class/net/{interface}/address").startswith(OUR_MAC)


def need_root(what: str, besides: str = "") -> None:
    if os.geteuid() != 0:
        raise Error(f"{what} needs root; nothing was changed", f"sudo does it{besides}")


# -- the host's firewalls
#
# A packet passes only if every table lets it pass, so our own table can't undo what another one drops: where Docker,
# ufw, firewalld or plain iptables rules are, they are told to accept the bridge.  Each rule carries a comment of ours.


def has_nft_table(table: str) -> bool:
    return try_run(["nft", "list", "table", *table.split()], 30)[0] == 0


def iptables_programs() -> list[str]:
    """The iptables whose filter table is in use; those on nft and the old ones may both be.  Where it isn't, no rule is
    needed, and the first one would leave a table behind."""
    legacy = "filter" in read_existing("/proc/net/ip_tables_names").split()
    in_use = (("iptables-nft", has_nft_table("ip filter")), ("iptables-legacy", legacy))
    found = [next(filter(find_program, (name, "iptables")), "") for name, used in in_use if used]
    return list(filter(None, found))


def iptables_rules(program: str) -> list[list[str]]:
    """The words of each line of `iptables -S`: -P CHAIN POLICY, -N CHAIN, -A CHAIN RULE."""
    return [shlex.split(line) for line in run([program, "-w", "10", "-S"]).stdout.splitlines() if line.startswith("-")]


def missing_rules(program: str, interface: str) -> list[list[str]]:
    """The rules of etc/iptables, where they aren't just those that are there, in chains that don't just accept: in one
    that does they would leave an empty chain behind.  Docker jumps to DOCKER-USER first, and leaves it to the owner."""
    rules = iptables_rules(program)
    there = [rule[1:] for rule in rules if MADE_BY_US in rule]
    others = [rule for rule in rules if MADE_BY_US not in rule]
    busy = {"DOCKER-USER", *(chain for action, chain, *rule in others if action == "-A" or rule == ["DROP"])}
    words = {"GUESTS": interface, "FORWARD": "DOCKER-USER" if ["-N", "DOCKER-USER"] in rules else "FORWARD"}
    needed = [filled(line, words).split() for line in packaged_list("iptables")]
    end = ["-m", "comment", "--comment", MADE_BY_US, "-j", "ACCEPT"]
    wanted = [[*rule, *end] for rule in needed if rule[0] in busy]
    return wanted if sorted(wanted) != sorted(there) else []


def close_iptables(program: str) -> None:
    for action, chain, *rule in iptables_rules(program):
        if action == "-A" and MADE_BY_US in rule:
            run([program, "-w", "10", "-D", chain, *rule])


def ufw_runs() -> bool:
    return bool(find_program("ufw")) and "Status: active" in try_run(["ufw", "status"], 30)[1]


def firewalld_zone(interface: str) -> str | None:
    """The zone of firewalld that the interface is in, '' for none; None where firewalld doesn't run."""
    if not find_program("firewall-cmd") or try_run(["firewall-cmd", "--state"], 30)[0]:
        return None
    status, said = try_run(["firewall-cmd", f"--get-zone-of-interface={interface}"], 30)
    return said.strip() if status == 0 else ""


def open_firewalls(interface: str) -> None:
    """Have each firewall that runs here accept the guests' DHCP, DNS and what is forwarded for them."""
    for program in iptables_programs():
        if wanted := missing_rules(program, interface):
            close_iptables(program)
        for chain, *rule in wanted:
            run([program, "-w", "10", "-I", chain, *rule])
    if ufw_runs():  # in the words that `ufw show added` gives back; answers to what guests ask for pass by themselves
        place = f"allow in on {interface}"
        for words in (f"{place} to any port 67 proto udp", f"{place} to any port 53", f"route {place}"):
            run(["ufw", *words.split(), "comment", MADE_BY_US])
    if firewalld_zone(interface) not in (None, "trusted"):
        run(["firewall-cmd", "--zone=trusted", f"--change-interface={interface}"])


def close_firewalls(interface: str) -> None:
    """Take away exactly what open_firewalls added.  ufw's rules outlive its end, and are looked for wherever it is."""
    for program in iptables_programs():
        close_iptables(program)
    added = try_run(["ufw", "show", "added"], 30)[1] if find_program("ufw") else ""
    for line in added.splitlines():
        if line.startswith("ufw ") and line.endswith(f"comment '{MADE_BY_US}'"):
            rule = shlex.split(line)[1:-2]
            at = 1 if rule[0] == "route" else 0
            run(["ufw", *rule[:at], "delete", *rule[at:]])
    if firewalld_zone(interface) == "trusted":
        run(["firewall-cmd", "--zone=trusted", f"--remove-interface={interface}"])


def dropping_chains(interface: str) -> list[str]:
    """The chains of other nft tables that drop what they don't name, and don't name the bridge: nobody can undo that
    but their owner.  Those of iptables, ufw and firewalld are told in their own way."""
    status, said = try_run(["nft", "-j", "list", "chains"], 30)
    chains = [each["chain"] for each in json.loads(said)["nftables"] if "chain" in each] if status == 0 else []
    drops = [each for each in chains if each.get("policy") == "drop" and each.get("hook") in ("forward", "input")]
    drops = [each for each in drops if each["table"] not in ("filter", "firewalld")]
    found = [f"{each['family']} {each['table']} {each['name']}" for each in drops if each["family"] in ("ip", "inet")]
    accepts = f'iifname "{interface}" accept'
    return [chain for chain in found if accepts not in try_run(["nft", "list", "chain", *chain.split()], 5)[1]]


# -- up and down


def sysctl_file(interface: str, name: str, family: str = "ipv4") -> str:
    return f"/proc/sys/net/{family}/conf/{interface}/{name}"


def forwards(interface: str) -> bool:
    """Whether the kernel forwards what comes in by an interface; True where it doesn't say."""
    return read_existing(sysctl_file(interface, "forwarding")).strip() != "0"


class BridgeSetup:
    """What root does to the host for the bridge, and its dnsmasq: units of systemd where these are installed.  `down`
    takes away exactly what `up` did, half done or not, by what is there: the bridge is known by its MAC, rules by their
    comments.  Only which interfaces were made to forward is written down, before it is done."""

    def __init__(self, config: Config) -> None:
        self.settings = BridgeSettings(config)
        self.interface = self.settings.interface
        self.closed = yes_no(config["vmHostAccess"]) == "no"
        self.inbox, self.served = Inbox(INBOX, "?"), HostFiles(STATE_FOLDER)
        self.forwarding = os.path.join(RUN_FOLDER, "forwarding")
        self.pid_file, self.log = (os.path.join(RUN_FOLDER, f"dnsmasq.{name}") for name in ("pid", "log"))

    def is_there(self) -> bool:
        return os.path.exists(f"/sys/class/net/{self.interface}")

    def check(self) -> None:
        """Raise where the bridge can't be: a program is missing, the name or the network is someone else's."""
        for name in ("ip", "nft"):
            need_program(name)
        if self.is_there() and not bridge_is_ours(self.interface):
            said = f"{self.interface} is there, and nocloud didn't make it; it is left alone"
            raise WrongState(said, "VMs use it as it is; bridgeInterface=NAME makes another one")
        if clash := overlapping(self.settings):
            hint = "another one: bridgeSubnet in etc/nocloud_net.conf; `nocloud bridge subnet` writes one that is free"
            raise WrongState(f"the bridge's network {self.settings.net} is in use: {clash}", hint)

    def up(self) -> None:
        """`nocloud net up` of root: the bridge with DHCP and DNS."""
        need_root("the host's bridge", "; or use a network of your own, which needs no root: nocloud net --private up")
        self.check()
        if units_installed():
            systemctl("reload-or-restart", SYSTEMD_UNITS[0])  # also where it is up: somebody may have flushed the rules
            systemctl("start" if self.answers() else "restart", *SYSTEMD_UNITS[1:])
            self.tell_resolver()
        else:
            need_program("dnsmasq")
            self.start()
            self.serve()
        self.wait(10)

    def down(self) -> None:
        """`nocloud net down` of root."""
        need_root("the host's bridge", "; nocloud net --private down ends a network of your own")
        self.check_unused()
        if units_installed():
            systemctl("stop", *reversed(SYSTEMD_UNITS))
        self.stop()

    def start(self) -> None:
        """Make what isn't there of the bridge alone.  Where that fails nothing stays."""
        need_root("the host's bridge")
        self.check()
        with FolderLock(RUN_FOLDER, make=True):
            new, first = not self.is_there(), not os.path.exists(STATE_FOLDER)
            try:
                prepare_state_folder()
                self._make_bridge()
                guests = f'"{self.interface}"'
                closed = guests if self.closed else '"/"'  # which no interface is called
                rules = nft_rules("bridge.nft", guests=guests, closed=closed, subnet=self.settings.net)
                guarded = "".join(f'add element ip {DOMAIN} guarded {{ "{each}" }}\n' for each in self._forward())
                run(["nft", "-f", "-"], input=rules + guarded.encode())
                open_firewalls(self.interface)
            except BaseException:
                if new:
                    self._take_down()
                    remove_empty(RUN_FOLDER)
                if first:
                    remove_tree(STATE_FOLDER)
                raise
            self.tell_resolver()
        self.accept()
        for chain in dropping_chains(self.interface):
            report.warn(f"nft chain {chain} drops what it doesn't name: guests need iifname {self.interface} accepted")

    def _make_bridge(self) -> None:
        """The bridge and its address.  Before it is up: the kernel would take a guest for its IPv6 router."""
        name, wanted = self.interface, f"{self.settings.address}/{self.settings.network.prefixlen}"
        if not self.is_there():
            words = f"link add name {name} address {self.settings.mac} type bridge forward_delay 0"
            run(["ip", *words.split()])
        if os.path.exists(sysctl_file(name, "accept_ra", "ipv6")):
            write_proc(sysctl_file(name, "accept_ra", "ipv6"), "0")
        there = [each for card in ip_json("address", "show", "dev", name) for each in card.get("addr_info", ())]
        if [f"{each['local']}/{each['prefixlen']}" for each in there] != [wanted]:
            run(["ip", "-4", "address", "flush", "dev", name])
            run(["ip", "address", "add", wanted, "brd", "+", "dev", name])
        run(["ip", "link", "set", name, "up"])

    def _forward(self) -> list[str]:
        """Let the kernel forward for the guests; the interfaces that forward only since we made them.  Whether a packet
        is forwarded is asked of the interface that it came in by: the bridge, and for the answers those of the default
        routes. net.ipv4.ip_forward, which Docker and libvirt set, would open all of them."""
        write_proc(sysctl_file(self.interface, "forwarding"), "1")
        if read_text("/proc/sys/net/ipv4/ip_forward").strip() == "1":
            return []
        quiet = [each for each in outgoing_interfaces() if not forwards(each)]
        ours = sorted({*quiet, *self._forwarders()})
        write_file(self.forwarding, "".join(f"{each}\n" for each in ours))
        for each in ours:
            write_proc(sysctl_file(each, "forwarding"), "1")
        return ours

    def _forwarders(self) -> list[str]:
        """The interfaces that `up` made forward, and that are still there."""
        names = read_existing(self.forwarding).split()
        return [name for name in names if os.path.exists(sysctl_file(name, "forwarding"))]

    def tell_resolver(self) -> None:
        """Have systemd-resolved ask us for our names, and for nothing else; it forgets that with the interface."""
        if not resolved_runs():
            report.say(
                f"{report.program}: VMs' names don't resolve on this host itself, which runs no systemd-resolved; "
                f"have its resolver ask {self.settings.address} for {DOMAIN}, or use vmssh"
            )
            return
        told = {"dns": self.settings.address, "domain": f"~{DOMAIN}", "dnssec": "no", "dnsovertls": "no"}
        for verb, value in told.items():
            status, said = try_run(["resolvectl", verb, self.interface, value], 30)
            if status:
                report.warn(f"VMs' names don't resolve on this host itself: resolvectl {verb}: {last_line(said)}")
                return

    def stop(self) -> None:
        """Take it away, and a dnsmasq that no unit runs; refused while something is attached to it."""
        need_root("the host's bridge")
        with FolderLock(RUN_FOLDER, make=True):
            self.check_unused()
            stop_daemon(self.pid_file)
            remove_file(self.log)
            self._take_down()
        remove_empty(RUN_FOLDER)

    def check_unused(self) -> None:
        if ports := names_in(f"/sys/class/net/{self.interface}/brif") if bridge_is_ours(self.interface) else []:
            said = f"the bridge {self.interface} is in use: {plural(len(ports), 'VM')} on it ({', '.join(ports[:5])})"
            raise WrongState(said, "vmrunning lists a user's VMs; vmstop -g GROUP stops a group")

    def _take_down(self) -> None:
        close_firewalls(self.interface)
        for family in ("ip", "inet"):
            if has_nft_table(f"{family} {DOMAIN}"):
                run(["nft", "delete", "table", family, DOMAIN])
        if read_text("/proc/sys/net/ipv4/ip_forward").strip() == "0":  # else another one wants them to forward by now
            for each in self._forwarders():
                write_proc(sysctl_file(each, "forwarding"), "0")
        remove_file(self.forwarding)
        if bridge_is_ours(self.interface):
            run(["ip", "link", "delete", self.interface])

    # its dnsmasq

    def argv(self) -> list[str]:
        """As its own user, which systemd starts it as, it can't change to another.  The host's /etc/resolv.conf names
        the servers that it asks.  A guest of its own name, that nobody published, is known by that."""
        settings = self.settings
        user, group, pid_file, log = "", "", "", "-"
        if os.geteuid() == 0:
            user, group = account(DNSMASQ_USERS)[0], account(("kvm",), group=True)[0]
            pid_file, log = self.pid_file, self.log
        return dnsmasq_argv(
            settings.interface, self.served, f"--user={user}", f"--group={group}",
            f"--host-record={own_name()},{own_name()}.{DOMAIN},{settings.address}",  # not a guest's that says so
            f"--pid-file={pid_file}", f"--log-facility={log}",
            f"--dhcp-range={settings.first_dynamic},{settings.last},{settings.network.netmask},12h",
            f"--dhcp-leasefile={LEASES}",
        )  # fmt: skip

    def answers(self) -> bool:
        """Whether something serves DNS at the bridge's address."""
        return any(address == self.settings.address for address, _ in bound_sockets("udp", 53))

    def wait(self, seconds: float, pid: str = "") -> None:
        """Return when it serves.  Raises TimedOut after `seconds`, or when the process `pid` has ended before."""
        wait_for(lambda: self.answers() or bool(pid and not os.path.exists(f"/proc/{pid}")), seconds, 0.1)
        if not self.answers():
            raise TimedOut(f"dnsmasq doesn't answer at {self.settings.address}", "journalctl -u nocloud-dnsmasq")

    def forget(self) -> None:
        """Take the leases of VMs that are gone out of the file, while dnsmasq doesn't run."""
        members = {(mac, address) for _, mac, address in self.served.members()}
        lines = read_existing(LEASES).splitlines(True)
        kept = []
        for line in lines:
            mac, address = [*line.split(), "", "", ""][1:3]
            if not self.settings.allots(address) or (mac.lower(), address) in members:
                kept.append(line)
        if kept != lines:
            with open(LEASES, "r+", encoding="utf-8", errors="surrogateescape") as file:  # the folder is root's
                file.writelines(kept)
                file.truncate()

    def accept(self) -> None:
        """Have dnsmasq serve what users say of their VMs, as far as that is theirs to say, and forget what is gone."""
        if connected_network(self.interface) != self.settings.net or not os.path.isdir(INBOX):
            return
        with FolderLock(STATE_FOLDER):
            stale = False
            for kind, wanted in self._allowed().items():
                for uuid, line in self.served.lines(kind).items():
                    stale |= line[:1] not in ("", "#") and line != wanted.get(uuid)
                    if uuid not in wanted:
                        remove_file(os.path.join(self.served.folder_of(kind), uuid))
                for uuid, line in wanted.items():
                    self.served.write(kind, uuid, line, 0o640)
        if stale and units_installed():  # not waited for: the next change would be missed
            run(["systemctl", "--no-block", "try-restart", SYSTEMD_UNITS[1]])
        elif stale and daemon_pid(self.pid_file):
            self.serve(anew=True)

    def _allowed(self) -> dict[str, dict[str, str]]:
        """The lines of both kinds, by UUID: an address of the range and a MAC that no other VM has, and those of its
        names that none has.  What is served stays with its VM; else who came first has it."""
        asked, had = {}, {uuid: set(line.split()) for uuid, line in self.served.lines("hosts").items()}
        for uuid, line in self.served.lines("dhcp").items():
            had.setdefault(uuid, set()).update(re.findall(r"[^#,\s]+", line)[:2])
        for uuid, _, (address, mac, name, _) in self.inbox.entries():
            if self.settings.allots(address):
                names = [each for each in host_names(name) if name and not FOREIGN.search(each)]
                asked[uuid] = (address, mac, name.partition(".")[0], names)
        owners = {word: uuid for uuid, each in asked.items() for word in {*each[:2], *each[3]} & had.get(uuid, set())}
        owners.update(dict.fromkeys(("localhost", os.uname().nodename.lower(), *host_names(own_name())), ""))
        # in this order: who finds himself in the second is in both
        found: dict[str, dict[str, str]] = {"hosts": {}, "dhcp": {}}
        for uuid, (address, mac, label, names) in asked.items():
            if all(owners.get(each, uuid) == uuid for each in (address, mac) if each):
                own = [each for each in (address, *names) if owners.setdefault(each, uuid) == uuid]
                owners[mac] = uuid
                found["hosts"][uuid] = " ".join(own) if len(own) > 1 else ""
                found["dhcp"][uuid] = f"{mac},{address},{label},1h" if mac else f"# {address}"
        return found

    def serve(self, anew: bool = False) -> None:
        """As a daemon of our own, unless it runs; anew where that is asked, or the bridge has got another address."""
        with FolderLock(RUN_FOLDER, make=True):
            if anew or not daemon_pid(self.pid_file) or not self.answers():
                stop_daemon(self.pid_file)
                self.forget()
                run(self.argv(), cwd="/")


def own_name() -> str:
    """What this host is called, without a domain."""
    return os.uname().nodename.partition(".")[0].lower()


def outgoing_interfaces() -> set[str]:
    """The interfaces of the default routes, among them the two halves of the world that a VPN has instead."""
    defaults = ("default", "0.0.0.0/1", "128.0.0.0/1")
    routes = [each for each in ip_json("route", "show", "table", "all") if each["dst"] in defaults]
    return {way["dev"] for route in routes for way in (route, *route.get("nexthops", ())) if "dev" in way}


def resolved_runs() -> bool:
    return os.path.exists("/run/systemd/resolve") and bool(find_program("resolvectl"))


# -- its dnsmasq


def bound_sockets(kind: str, port: int) -> list[tuple[str, int]]:
    """(address, pid) of the sockets of `udp` or `tcp` that wait at a port (ss(8)); another user's pid is 0.  What is
    bound to no address has 0.0.0.0; so has a socket of IPv6 that takes IPv4's too, which ss shows as *."""
    words, found = ["ss", "--no-header", "--listening", "--numeric", "--processes", f"--{kind}", f"sport = {port}"], []
    for line in run(words, merge=False).stdout.splitlines():
        address, pid = re.split("[%:]", line.split()[3])[0], re.search(r"pid=(\d+)", line)
        found.append((address.replace("*", "0.0.0.0"), int(pid.group(1)) if pid else 0))
    return found


def account(names: Sequence[str], group: bool = False) -> tuple[str, int]:
    """(name, id) of the first user, or group, of these that there is; root where there is none."""
    for name in names:
        with contextlib.suppress(KeyError):
            return name, grp.getgrnam(name).gr_gid if group else pwd.getpwnam(name).pw_uid
    return "root", 0


DNSMASQ_USERS = ("nocloud-dnsmasq", "dnsmasq", "nobody")
INBOX, LEASES, CHANGED = (os.path.join(STATE_FOLDER, name) for name in ("published", "dnsmasq.leases", "changed"))
# What others may be called: names that end in a country's domain or one of RFC 1591, or have more than two parts.
FOREIGN = re.compile(rf"\.(..|com|edu|gov|int|mil|net|org|arpa)$|\..*\.(?!{DOMAIN}$)[^.]*$")


def prepare_state_folder() -> None:
    """What members of kvm publish their VMs in, each removing only their own; what is served, for root to write to; the
    lease file; `changed`, which they write to, for systemd to have the folder looked at."""
    group = account(("kvm",), group=True)[1]
    served = HostFiles(STATE_FOLDER)
    for path, mode in ((INBOX, 0o3770), (served.folder_of("dhcp"), 0o2750), (served.folder_of("hosts"), 0o2750)):
        os.makedirs(path, exist_ok=True)
        os.chown(path, 0, group)
        os.chmod(path, mode)
    for path, mode, owner in ((LEASES, 0o644, (account(DNSMASQ_USERS)[1], -1)), (CHANGED, 0o660, (0, group))):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode))
        os.chown(path, *owner)
        os.chmod(path, mode)


# -- systemd


def systemd_runs() -> bool:
    return os.path.isdir("/run/systemd/system")


def units_installed() -> bool:
    """Whether systemd runs here and knows our units."""
    return systemd_runs() and try_run(["systemctl", "cat", SYSTEMD_UNITS[0]], 30)[0] == 0


def systemctl(verb: str, *units: str) -> None:
    """Raises Error with the unit's own last words."""
    status, said = try_run(["systemctl", verb, *units], 120)
    if status:
        words = [word for unit in units for word in ("--unit", unit)]
        _, log = try_run(["journalctl", "--no-pager", "--output=cat", "--lines=20", *words], 30)
        told = [line for line in log.splitlines() if line.startswith(("nocloud", "dnsmasq"))]
        raise Error(told[-1] if told else last_line(said), f"journalctl -u {units[0]}")


def active_groups() -> list[str]:
    """The nocloud@GROUP units of the system that are not stopped."""
    if not systemd_runs():
        return []
    states = "--state=active,activating,reloading,deactivating"
    _, said = try_run(["systemctl", "list-units", "--plain", "--no-legend", states, "nocloud@*.service"], 30)
    return re.findall(r"^nocloud@\S+", said, re.M)


# -- a user's VM on it


class HostBridge(Network):
    """The host's bridge: a tap from qemu-bridge-helper.  Where nocloud made it, and the user may write to its folders,
    addresses and names are as in a private network; elsewhere the DHCP server decides, and its lease file tells."""

    kind = "bridge"

    def __init__(self, config: Config, tree: Tree | None = None) -> None:
        self.config = config
        self.interface = config["bridgeInterface"]
        self.helper_places = [config["vmBridgeHelper"]] if config["vmBridgeHelper"] else HELPERS
        self.lease_places = [config["bridgeLeases"]] if config["bridgeLeases"] else LEASE_FILES
        self.hosts: Inbox = Inbox(INBOX, tree.base if tree else "?")
        self.served = HostFiles(STATE_FOLDER)

    # addresses and names

    @functools.cached_property
    def publishes(self) -> bool:
        """Whether this user allots addresses here; said once where the rights for it are missing."""
        if not (bridge_is_ours(self.interface) and os.path.isdir(STATE_FOLDER)):
            return False
        if self.hosts.denied():
            why = f"you may not write to {INBOX}; who is in the group kvm may"
        elif connected_network(self.interface) != BridgeSettings(self.config).net:
            why = f"{self.interface} is not the bridge of your settings, where bridgeNet={self.config['bridgeNet']}"
        else:
            why = self.unwatched()
        if why:
            report.warn(f"addresses and names on {self.interface} are left to DHCP: {why}")
        return not why

    def unwatched(self) -> str:
        """Why nobody takes what this user publishes, or ''; root does that itself."""
        unit = SYSTEMD_UNITS[2]
        runs = not os.geteuid() or (systemd_runs() and not try_run(["systemctl", "is-active", "--quiet", unit], 30)[0])
        return "" if runs else f"{unit} doesn't run, which takes what users publish"

    def allot(self, taken: set[str], uuid: str) -> str:
        """An address below those that DHCP gives to others, held by a file."""
        if not self.publishes:
            return ""
        settings = BridgeSettings(self.config)
        published = {words[0] for other, _, words in self.hosts.entries() if other != uuid}
        taken |= {settings.address, *published, *self.served.addresses(), *self.leases().values()}
        for number in range(int(settings.first), int(settings.first_dynamic)):
            address = str(ipaddress.IPv4Address(number))
            if address not in taken:
                taken.add(address)
                if self.hosts.reserve(uuid, address):
                    return address
        self.withdraw([uuid])
        raise Error(f"no address is free on {self.interface}, {settings.net}", "destroy VMs that are not needed")

    def fits(self, address: str) -> bool:
        """Not after the bridge has got another network."""
        return bool(address) and (not self.publishes or BridgeSettings(self.config).allots(address))

    def publish(self, vm: VM) -> None:
        """Raises Error where another VM has its MAC or address."""
        if vm.get("vmAddress") and self.publishes:
            super().publish(vm)
            member = (vm.get("vmMac").lower(), vm.get("vmAddress"))
            if not self._taken_over(lambda: any(each[1:] == member for each in self.served.members())):
                text = f"{member[1]} isn't served on {self.interface}: another VM has it, or the MAC {member[0]}"
                raise Error(text, "nocloud net status; nocloud doctor", vm=vm)

    def withdraw(self, uuids: Sequence[str]) -> None:
        if uuids and self.hosts.withdraw(uuids) and self.publishes:
            self._taken_over(lambda: not {*uuids} & {*names_in(self.served.folder_of("dhcp"))})

    def _taken_over(self, done: Callable[[], bool]) -> bool:
        """Have what changed taken over: by us as root, else by a unit that watches a file.  Whether it was in 30 s."""
        if os.geteuid() == 0:
            BridgeSetup(self.config).accept()
            return done()
        for _ in range(30):  # what changes while the unit is at work it doesn't notice
            with open(CHANGED, "r+", encoding="ascii") as file:
                file.write(f"{time.time_ns()}\n")
            if wait_for(done, 1.0):
                return True
        return False

    # attaching to it

    def helper(self) -> str:
        """The path of qemu-bridge-helper, or ''."""
        return next(filter(find_program, self.helper_places), "")

    def why_not(self) -> str:
        """Why this user can't put a VM on the bridge, or ''."""
        if self.why_down():
            return self.why_down()
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):  # the helper gives up root's rights before it opens that
            return "you may not open /dev/net/tun"
        faults = [text for text, _ in self.helper_faults()] or [text for bad, text, _ in self.list_faults() if bad]
        return "".join(faults[:1])

    def why_down(self) -> str:
        """Why nobody can, or ''."""
        if not os.path.isdir(f"/sys/class/net/{self.interface}/bridge"):
            return f"there is no bridge {self.interface}"
        if not int(read_text(f"/sys/class/net/{self.interface}/flags"), 16) & IFF_UP:
            return f"the bridge {self.interface} is down"
        return ""

    def helper_faults(self) -> Iterator[tuple[str, str]]:
        """Why this user can't use qemu-bridge-helper, which root's rights are needed for, and what mends it."""
        place = self.helper() or next(filter(os.path.isfile, self.helper_places), "")
        if not place:
            yield "qemu-bridge-helper is not there", install_command("qemu-bridge-helper")
            return
        info = os.stat(place)
        if os.geteuid() and (info.st_uid or not info.st_mode & stat.S_ISUID):
            yield f"{place} is not setuid root", f"sudo chown root {place} && sudo chmod u+s {place}"
        elif not os.access(place, os.X_OK):
            yield f"you may not run {place}", group_command(info.st_gid)

    def list_faults(self) -> Iterator[tuple[bool, str, str]]:
        """(whether it keeps VMs off the bridge, what, what mends it) of the helper's list, which the helper reads as
        the user that calls it.  What isn't named is denied, and a line that denies wins."""
        name, path = self.interface, helper_list()
        allow = f"sudo mkdir -p {os.path.dirname(path)} && echo 'allow {name}' | sudo tee -a {path}"
        try:
            rules = helper_rules(path)
        except FileNotFoundError:
            yield True, f"there is no {path}", allow
            return
        except OSError:
            yield True, f"{path}: you may not read it", f"sudo chmod a+rX {os.path.dirname(path)} {path}"
            return
        line = "^[[:space:]]*{}[[:space:]]\\+{}[[:space:]]*$"
        for rule in (("deny", "all"), ("deny", name)):
            if rule in rules:
                text = f"{rules[rule]}: the line `{' '.join(rule)}` keeps VMs off the bridge {name}"
                yield True, text, f"sudo sed -i '/{line.format(*rule)}/d' {rules[rule]}"
        if ("allow", "all") in rules:
            path = rules["allow", "all"]
            text = f"{path}: with the line `allow all` users may put VMs on every bridge of this host"
            yield False, text, f"sudo sed -i 's/{line.format('allow', 'all')}/allow {name}/' {path}"
        elif ("allow", name) not in rules:
            yield True, f"{path} has no line: allow {name}", allow

    def up(self, keep: bool = False) -> None:
        """Raise where this user can't attach to it; setting it up is root's."""
        if reason := self.why_not():
            absent = not os.path.isdir(f"/sys/class/net/{self.interface}/bridge")
            mend = "root makes it: nocloud net up" if absent else "nocloud doctor says what mends it"
            hint = f"{mend}; a new group can be on the private network: NOCLOUD_vmNetwork=private"
            raise Error(f"the network {self.interface} is not to be had: {reason}", hint)

    def tap(self, vm: VM | None = None) -> tuple[int, int]:
        """The helper makes the tap, puts it on the bridge and sends it over a socket pair (qemu-bridge-helper.c)."""
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with mine, its:
            words = ["--use-vnet", f"--br={self.interface}", f"--fd={its.fileno()}"]
            run([self.helper() or "qemu-bridge-helper", *words], pass_fds=[its.fileno()])
            mine.settimeout(5)
            _, fds, _, _ = socket.recv_fds(mine, 16, 1)
        if not fds:
            raise Error(f"qemu-bridge-helper gave no tap on {self.interface}")
        os.set_inheritable(fds[0], False)
        return fds[0], vhost_net()

    def address(self, vm: VM) -> str:
        """What the DHCP server gave to the VM's MAC, or ''.  The bash tools drew another MAC at each start."""
        if foreign := foreign_qemu(vm):
            return self.leases().get(foreign.mac, "")
        return vm.get("vmAddress") or self.leases().get(vm.get("vmMac"), "")

    def status(self) -> Iterator[str]:
        """Lines for people: whether it is up, and who is on it."""
        there = os.path.exists(f"/sys/class/net/{self.interface}")
        net = connected_network(self.interface)
        yield f"bridge {self.interface}: " + (f"up, {net}" if net else "down, without an address" if there else "down")
        if not there:
            return
        if bridge_is_ours(self.interface):
            server = BridgeSetup(self.config)
            yield "dnsmasq: " + (f"answers at {server.settings.address}" if server.answers() else "not running")
        leased = {mac: (address, name, until) for mac, address, name, until in self.lease_lines()}
        for name, mac, address in self.served.members():
            has = leased.pop(mac, ("", "", 0))
            yield printable(f"{name} {mac} {address} " + (lease_text(has[2]) if has[0] == address else "no lease"))
        for mac, (address, name, until) in leased.items():
            yield printable(f"{name} {mac} {address} {lease_text(until)}")

    def leases(self) -> dict[str, str]:
        """MAC → address of dnsmasq's lease file."""
        return {mac: address for mac, address, _, _ in self.lease_lines()}

    def lease_lines(self) -> Iterator[tuple[str, str, str, int]]:
        """(MAC, address, name, end) of dnsmasq's lease file: `EXPIRY MAC ADDRESS NAME CLIENT-ID` a line."""
        for place in self.lease_places:
            if os.path.isfile(place) and os.access(place, os.R_OK):
                for words in map(str.split, read_text(place).splitlines()):
                    if len(words) >= 4 and is_ipv4(words[2]):
                        until = int(words[0]) if re.fullmatch("[0-9]{1,11}", words[0]) else 0
                        yield words[1].lower(), words[2], words[3], until
                return


LEASE_FILES = (LEASES, "/var/lib/misc/dnsmasq.leases", "/var/lib/dnsmasq/dnsmasq.leases")
HELPERS = ("/usr/lib/qemu/qemu-bridge-helper", "/usr/libexec/qemu-bridge-helper", "/usr/lib/qemu-bridge-helper")
HELPER_LISTS = ("/etc/qemu/bridge.conf", "/etc/qemu-kvm/bridge.conf")  # the second one in RHEL and its kin


def lease_text(until: int) -> str:
    return "leased until " + time.strftime("%Y-%m-%d %H:%M", time.localtime(until)) if until else "leased for ever"


def connected_network(interface: str) -> str:
    """The network that the interface has an address in, as 192.168.1.0/24, or ''."""
    there = os.path.exists(f"/sys/class/net/{interface}")
    routes = ip_json("route", "show", "dev", interface, "scope", "link") if there else []
    return routes[0]["dst"] if routes else ""


def helper_list() -> str:
    """The file that says which bridges qemu-bridge-helper may put VMs on."""
    return next(filter(os.path.exists, HELPER_LISTS), HELPER_LISTS[0])


def helper_rules(path: str, depth: int = 8) -> dict[tuple[str, str], str]:
    """(verb, name) → file of each line, allow or deny, of such a list and what it includes, where that can be read, as
    for the helper (qemu-bridge-helper.c): a user can have his own.  Raises OSError where the list itself can't."""
    found = {}
    for line in read_text(path).splitlines():
        verb, name = [*line.split(None, 1), "", ""][:2]
        if verb == "include":
            with contextlib.suppress(OSError, ValueError):  # the latter for a NUL in its name
                found.update(helper_rules(name.strip(), depth - 1) if depth else {})
        elif verb and not verb.startswith("#"):
            found[verb, name.strip()] = path
    return found


def group_command(gid: int) -> str:
    """What makes this user a member of a group."""
    group = str(gid)
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(gid).gr_name
    return f"sudo usermod -aG {group} {user_name()}  # and log in again"


# Ports ###############################################################################################
#
# A port of this host that leads to one of a VM's.  Whoever starts the VM opens the listener, outside, and hands it to
# the network's forwarder: a process of ours that runs where the VMs are, and ends with the last VM that has a port.


def parse_ports(text: str) -> list[tuple[str, int, int]]:
    """(IP, port of the host or 0, port of the guest) of each that vmPorts names."""
    words = (["127.0.0.1", *each.split(":")][-3:] for each in text.split(",") if each)
    return [(ip, int(host), int(guest)) for ip, host, guest in words]


def ports_of(vm: VM) -> list[tuple[str, int, int]]:
    """Those of a VM; none where its conf can't be read."""
    return parse_ports(vm.get("vmPorts")) if vm.is_readable() else []


def join_ports(ports: Iterable[tuple[str, int, int]]) -> str:
    return ",".join(f"{ip}:{host}:{guest}" for ip, host, guest in ports)


def numbered_ports(text: str, number: int) -> str:
    """The ports of the VM of that number in a set of clones: HOST counts up.  Raises UsageError after the last one."""
    ports = join_ports((ip, host and host + number, guest) for ip, host, guest in parse_ports(text))
    return str(checked(PORTS, ports, f"port={ports}"))


def free_ports(tree: Tree, ports: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """`ports` with a number for each HOST 0: no VM's, below outgoing ones' (32768).  Call it under the tree's lock."""
    taken = {host for vm in tree.vms() for _, host, _ in ports_of(vm)}
    taken |= set(map(int, re.findall(r":([0-9]+) ", run(["ss", "-Hltn"]).stdout)))
    free = (number for number in range(20000, 32768) if number not in taken)
    return [(ip, host or next(free, 0), guest) for ip, host, guest in ports]


def clash(one: str, other: str) -> bool:
    """Whether the same port can't be opened at both addresses of this host."""
    return one == other or "0.0.0.0" in (one, other)


def listen(tree: Tree, ip: str, host: int) -> socket.socket:
    """A listener of this host.  Raises Error, which says who has the port where that can be known.  One that is taken
    is tried for a second: it may be a VM's that has ended just now."""
    what = f"port {host} of {ip} can't be published"
    for _ in range(50):
        try:
            return socket.create_server((ip, host), backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                hint = f"sudo sysctl -w net.ipv4.ip_unprivileged_port_start={host}"
                reason = str(error.strerror).partition(" (")[0]
                raise Error(f"{what}: {reason}", hint if error.errno == errno.EACCES else "") from None
        time.sleep(0.02)
    raise Error(f"{what}: {port_owner(tree, ip, host)} has it", "publish another one")


def port_owner(tree: Tree, ip: str, host: int) -> str:
    """Who listens at a port of this host: a VM, or the process that ss(8) shows, if it is this user's."""
    for vm in tree.running():
        if any(host == its and clash(ip, at) for at, its, _ in ports_of(vm)):
            return vm.full_name
    pid = next((pid for at, pid in bound_sockets("tcp", host) if pid and clash(ip, at)), 0)
    return f"{process_file(pid, 'comm').strip()} (process {pid})" if pid else "another user"


class Forwarder:
    """The way to the process that forwards the ports of a network's VMs: a socket in a folder of `.net`.  Someone is
    behind it as long as it can be connected to; who ends properly removes it."""

    def __init__(self, tree: Tree, network: Network) -> None:
        self.tree, self.network = tree, network
        self.folder = os.path.join(tree.base, ".net", f"ports-{network.kind}")
        self.path, self.log_file = (os.path.join(self.folder, name) for name in ("socket", "log"))

    def is_there(self) -> bool:
        try:
            connect_unix(self.folder, "socket", 30).close()
        except (QMPClosed, FileNotFoundError):
            return False
        return True

    def ask(self, text: str, *fds: int) -> set[str]:
        """Tell it something; the ports that it serves then, as IP:HOST.  Raises Error where it doesn't answer.  With a
        listener for it, `fds`, it is started where it isn't there."""
        if not fds and not self.is_there():
            return set()
        with FolderLock(self.folder, make=True):  # under which it ends, too
            if not self.is_there():
                with listen_unix(self.folder, "socket") as control:
                    words = self_argv("forward", self.network.kind, str(control.fileno()))
                    environment = {"NOCLOUD_vmBaseDir": self.tree.base}
                    spawn(words, log=self.log_file, cwd="/", pass_fds=[control.fileno()], env=environment)
            with connect_unix(self.folder, "socket", 30) as control:
                socket.send_fds(control, [text.encode()], fds)
                answer = b"".join(iter(lambda: control.recv(65536), b"")).decode()
        if not answer:
            raise Error(f"ports are not forwarded: {last_line(read_tail(self.log_file)) or 'no answer'}")
        return set(answer.split()[1:])

    def open(self, stack: Any, ports: Iterable[tuple[str, int, int]]) -> dict[str, tuple[int, socket.socket]]:
        """IP:HOST → (the port of the guest, a listener, which the ExitStack closes)."""
        return {f"{ip}:{host}": (guest, stack.enter_context(listen(self.tree, ip, host))) for ip, host, guest in ports}

    def serve(self, vm: VM, listeners: Mapping[str, tuple[int, socket.socket]]) -> None:
        """Hand it the listeners of a VM that runs."""
        for place, (guest, listener) in listeners.items():
            address = self.network.address(vm) or vm.full_name
            self.ask(f"serve {place} {guest} {vm.state()[1]} {address}", listener.fileno())

    def mend(self, vm: VM) -> None:
        """Have it serve what it doesn't, though the VM runs; what can't be is said."""
        try:
            with contextlib.ExitStack() as stack:
                served = self.ask("list")
                ports = [each for each in ports_of(vm) if f"{each[0]}:{each[1]}" not in served]
                self.serve(vm, self.open(stack, ports))
        except (Error, OSError) as error:
            report.warn(f"{vm}: {error}")

    def end(self) -> bool:
        """For the process itself, when it has nothing to do: leave nothing behind, unless someone is about to ask."""
        try:
            with FolderLock(self.folder, wait=0):
                remove_tree(self.folder)
        except (WrongState, FileNotFoundError):
            return not os.path.exists(self.folder)
        remove_empty(os.path.dirname(self.folder))
        return True


class Forwarding:
    """What the forwarder does, in one thread.  `close` ends what it serves, by IP:HOST."""

    def __init__(self, forwarder: Forwarder, control: socket.socket) -> None:
        self.forwarder, self.control = forwarder, control
        self.close: dict[str, Callable[[], None]] = {}
        self.most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.most, self.most))
        self.loop = asyncio.new_event_loop()
        self.loop.add_reader(control, self._asked)

    def run(self) -> None:
        trim_memory()
        while self.close or not self.forwarder.end():
            if not self.close:
                self.loop.call_later(0.05, self.loop.stop)
            self.loop.run_forever()

    def _asked(self) -> None:
        """Someone connects who asks something, Forwarder.ask(), or only whether we live."""
        with self.control.accept()[0] as asker:
            asker.settimeout(5)
            text, fds, _, _ = socket.recv_fds(asker, 4096, 1)
            if not text:
                return
            verb, *words = text.decode().split()
            if verb == "serve" and fds:  # else there were no descriptors left
                self._serve(socket.socket(fileno=fds[0]), *words)
            elif verb == "drop":
                self._drop(words[0])
            asker.sendall(" ".join([verb, *self.close]).encode())

    def _drop(self, place: str) -> None:
        if place in self.close:
            self.close.pop(place)()
            self.loop.call_later(0.05, self.loop.stop)  # what came by it has to end, too

    def _serve(self, listener: socket.socket, place: str, port: str, pid: str, address: str) -> None:
        """Join what comes to `listener` to a port of the VM whose qemu is the process `pid`, as long as that runs."""
        process = Process(int(pid))
        links: set[Any] = set()

        def accept() -> None:
            try:
                client = listener.accept()[0]
            except OSError:
                return  # it has hung up already
            if client.fileno() > self.most - 16:  # the lowest number that is free: so many are in use
                client.close()
                return
            link = self.loop.create_task(self._join(client, address, int(port)))
            links.add(link)
            link.add_done_callback(links.discard)

        def close() -> None:
            for each in (listener, process):
                self.loop.remove_reader(each)
                each.close()
            for link in links:
                link.cancel()

        self._drop(place)
        if process.fileno() < 0:  # it has ended by now
            listener.close()
            return
        self.close[place] = close
        listener.setblocking(False)
        self.loop.add_reader(listener, accept)
        self.loop.add_reader(process, self._drop, place)

    async def _join(self, client: socket.socket, address: str, port: int) -> None:
        """Join a connection to one of the guest's until both directions have ended; where that can't be, reset both.
        By recv and send: splice(2), through pipes of 64 KB or 1 MB, was no faster when it was measured."""

        async def flow(source: socket.socket, sink: socket.socket) -> None:
            while data := await self.loop.sock_recv(source, MIB):
                await self.loop.sock_sendall(sink, data)
                await asyncio.sleep(0)  # the others' turn: neither waits where it needn't
            sink.shutdown(socket.SHUT_WR)

        with contextlib.suppress(OSError, Error), client, socket.socket() as guest:
            for end in (client, guest):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # to close is to reset
            if not is_ipv4(address):  # only DHCP knows it
                address = self.forwarder.network.address(self.forwarder.tree.need(address))
                if not address:  # connect(2) would take none for this host
                    return
            await self.loop.sock_connect(guest, (address, port))
            flows = [self.loop.create_task(flow(*ends)) for ends in ((client, guest), (guest, client))]
            try:
                await asyncio.gather(*flows)
            finally:
                for each in flows:
                    each.cancel()
                await asyncio.gather(*flows, return_exceptions=True)
            for end in (client, guest):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


# Shared folders ######################################################################################
#
# Folders of this host that a guest mounts (virtiofs).  Each has a daemon, root in namespaces of its own: etc/share.sh.

VIRTIOFSD = ("virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
FIRST_LOGIN = 1000  # uid and gid of the user that a guest's vmUser is, if not root


def parse_shares(text: str) -> list[tuple[str, str, bool]]:
    """(folder of the host, folder of the guest, whether it may write there) of each that vmShares names."""
    return [(host, guest, bool(rw)) for host, guest, *rw in (each.split(":") for each in text.split(",") if each)]


def check_shares(config: Config, vm: VM, shares: str) -> tuple[list[str], list[str]]:
    """What serves them, as choose_virtiofsd() says.  Raises where a VM, or a clone of this template, can't share these
    folders, or one is not the user's own, or has to do with one that no guest may see."""
    if not shares:
        return [], []
    for host, _, _ in parse_shares(shares):
        if os.path.realpath(host) != host or not os.path.isdir(host):
            raise NotFound(f"share={host}: no such folder", f"mkdir -p {quoted(host)}")
        if os.stat(host).st_uid != os.geteuid():
            raise UsageError(f"share={host}: it is {user_name(os.stat(host).st_uid)}'s", "share a folder of your own")
        for place in (vm.tree.base, config_home(), "~/.ssh", "~/.gnupg"):
            secret = os.path.realpath(os.path.expanduser(place))
            if os.path.commonpath((secret, host)) in (secret, host):
                raise UsageError(f"share={host}: no guest may get at {secret}", "share another folder")
    if "q35" not in vm.get("vmMachine"):
        raise Error("share=: only machines of type q35 share folders", f"see vmMachine in {vm.conf_file}")
    return choose_virtiofsd(config, vm.get("vmUser"))


def choose_virtiofsd(config: Config, login: str) -> tuple[list[str], list[str]]:
    """(what makes it root in namespaces, the daemon up to its socket) for a guest where `login` has the user's files.
    From version 1.13 on it translates ids: all that the guest makes is the user's.  Before, only the guest's root can
    make files.  And it ends where it can't drop the user's groups: that takes other gids in there, by newgidmap(1)."""
    found = [config["vmVirtiofsd"]] if config["vmVirtiofsd"] else filter(None, map(find_program, VIRTIOFSD))
    path, space = need_program(next(iter(found), VIRTIOFSD[0])), ["--mount", "--net", "--ipc", "--user"]
    if "--translate-uid" in run([path, "--help"], check=False).stdout:
        rules = (f"host:0:{0 if login == 'root' else FIRST_LOGIN}:1", f"squash-guest:0:0:{2**32 - 1}")
        ids = [f"--translate-{kind}={rule}" for kind in ("uid", "gid") for rule in rules]
        daemon = [path, "--shared-dir=/mnt", "--sandbox=chroot", "--log-level=error", *ids]
        return ["unshare", *space, "--map-root-user"], daemon
    if login != "root":
        hint = "set vmVirtiofsd to a virtiofsd 1.13 or newer, which translates ids"
        raise Error(f"share=: by {path} your files are root's in the guest, and its vmUser is {login}", hint)
    daemon = [path, "-f", "-o", "source=/mnt,sandbox=chroot,log_level=err"]
    if os.geteuid():
        need_program("newgidmap")
        return ["unshare", *space, "--map-user=0", "--map-group=0", "--map-groups=auto"], daemon
    return ["setpriv", "--clear-groups", "unshare", *space, "--map-root-user"], daemon


def serve_shares(config: Config, vm: VM, stack: Any) -> list[int]:
    """Start the daemons of a VM that is to start; qemu's connections to them, which the ExitStack closes.  A daemon
    ends with its connection: with qemu, or, before there is one, with us."""
    enter, daemon = check_shares(config, vm, vm.get("vmShares"))
    connections = []
    for host, _, writable in parse_shares(vm.get("vmShares")):
        script = ["sh", "-c", need_packaged("share.sh"), "sh", host, "rw" if writable else "ro"]
        with listen_unix(vm.folder, "share.sock") as listener:
            connections.append(stack.enter_context(connect_unix(vm.folder, "share.sock", 5)).fileno())
            remove_file(vm.file("share.sock"))
            argv = [*enter, *script, *daemon, f"--fd={listener.fileno()}"]
            spawn(argv, log=vm.log_file, cwd=host, pass_fds=[listener.fileno()])
    return connections


# Identity ############################################################################################
#
# Who a VM is: UUID, MAC, host key, login keys, hostname; and how ssh is called so that it checks that.
# Key material goes by files of mode 0600, never through arguments, messages or logs.


def new_identity(taken: set[str]) -> tuple[str, str]:
    """A UUID (random, RFC 4122 version 4) and its MAC: 00:50:56 and the UUID's first three bytes, not among `taken`."""
    while True:
        uuid = read_text("/proc/sys/kernel/random/uuid").strip()  # random(4); module uuid costs an import
        mac = mac_of_uuid(uuid)
        if mac not in taken:
            taken.add(mac)
            return uuid, mac


def mac_of_uuid(uuid: str) -> str:
    digits = uuid.replace("-", "").lower()
    return f"00:50:56:{digits[0:2]}:{digits[2:4]}:{digits[4:6]}"


def own_key() -> str:
    """nocloud's own login key, made at first need; the path of its private half (ed25519, no passphrase)."""
    path = os.path.join(config_home(), "id_ed25519")
    if not os.path.exists(path):
        with FolderLock(config_home(), make=True):
            if not os.path.exists(path):
                make_key(path + ".new", "nocloud")
                land({path + ".new.pub": path + ".pub", path + ".new": path})
    return path


def make_key(path: str, comment: str) -> None:
    """An ed25519 key pair, landed by rename, the public half first: who sees the private one sees both."""
    temporary = f"{path}.{os.urandom(3).hex()}.tmp"
    try:
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", temporary])
        os.replace(temporary + ".pub", path + ".pub")
        os.replace(temporary, path)
    finally:
        remove_file(temporary)
        remove_file(temporary + ".pub")


def user_keys(kind: str = "") -> list[str]:
    """The user's own keys in ~/.ssh: the private ones' paths, or with kind=".pub" all public ones'."""
    folder = os.path.expanduser("~/.ssh")
    if kind:
        return [os.path.join(folder, name) for name in names_in(folder) if name.endswith(kind)]
    names = ("id_ed25519", "id_ecdsa", "id_ecdsa_sk", "id_ed25519_sk", "id_rsa", "id_dsa")  # ssh's own defaults
    return [path for path in (os.path.join(folder, name) for name in names) if os.path.exists(path)]


def login_keys() -> list[str]:
    """The public keys that may log in to a new VM, a line each: nocloud's and the user's."""
    lines: list[str] = []
    for path in [own_key() + ".pub", *user_keys(".pub")]:
        try:
            text = read_text(path)
        except OSError as error:
            report.warn(f"{path}: {error.strerror}; this key is not planted")
            continue
        lines += [line.strip() for line in text.splitlines() if re.match(r"(ssh|ecdsa|sk)-\S+ +\S", line.strip())]
    return list(dict.fromkeys(lines))


class KnownHosts:
    """The host keys of a tree's VMs: a known_hosts file of our own (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).  A line
    names the VM's UUID, for vmssh's HostKeyAlias, and its address, for ansible, whose hosts are addresses."""

    def __init__(self, tree: Tree) -> None:
        self.path = os.path.join(tree.base, ".known_hosts")
        self._tree = tree

    def _entries(self) -> list[tuple[list[str], str]]:
        """(what it names, the host key as `ssh-ed25519 AAAA…`) of each line."""
        lines = (line.strip().partition(" ") for line in read_existing(self.path).splitlines())
        return [(names.split(","), key) for names, _, key in lines if key]

    def names(self) -> set[str]:
        """What its lines name: UUIDs and addresses."""
        return {name for names, _ in self._entries() for name in names}

    def knows(self, uuid: str) -> bool:
        return uuid in self.names()

    def key(self, uuid: str) -> str:
        """The host key of a VM; '' where none is known."""
        return next((key for names, key in self._entries() if uuid in names), "")

    def update(self, add: Mapping[str, tuple[str, str]], remove: Sequence[str] = ()) -> None:
        """Set lines, uuid → (address, public key), and take those of `remove` away.  An address names one VM only."""
        with self._tree.lock():
            old = self._entries()
            gone = {*remove, *add, *(address for address, _ in add.values() if address)}
            new = [(names, key) for names, key in old if not gone & set(names)]
            for uuid, (address, key) in add.items():
                new.append(([uuid, address] if address else [uuid], " ".join(key.split()[:2])))
            if not new:
                remove_file(self.path)
            elif new != old:
                write_file(self.path, "".join(f"{','.join(names)} {key}\n" for names, key in new))


# nocloud's own way in, whatever else is done to a guest's logins: sshd (sshd_config(5)) looks here first.  Who has the
# key is root, or whoever there is; without its default user, which user-data can keep from being made, root is.
LOGIN_KEYS = "/etc/ssh/nocloud_keys"
LOGIN_LINE = f"AuthorizedKeysFile {LOGIN_KEYS} .ssh/authorized_keys .ssh/authorized_keys2"


def credentials(vm: VM, keys: Sequence[str]) -> bytes:
    """The SMBIOS type 11 string with what systemd in the guest sets up before sshd, and cloud-init, start
    (systemd.system-credentials(7)).  tmpfiles.extra (systemd 252, tmpfiles.d(5)) carries files: host key, login keys,
    and what is cloud-init's where there is one; `ssh.authorized_keys.root` would only write where no file is.  The
    first boot's hostname comes by DHCP, or from system.hostname (systemd 254): PID 1 has set it by the time that
    /etc/hostname is written.  /etc/hosts, for `hostname -f`, only where there is none, as in templates of ours."""
    lines = []
    for kind, path, mode, owner, content in identity_files(vm, keys):
        if vm.get("vmInit") == "systemd" and path.endswith("/.ssh/authorized_keys"):
            lines.append(f"d {os.path.dirname(path)} 0700 {owner} {owner} -")
        lines.append(f"{kind} {path} {mode} {owner} {owner} - {_base64(content)}")
    extra = _base64("\n".join(lines) + "\n")
    return f"io.systemd.credential.binary:tmpfiles.extra={extra}".encode()


def identity_files(vm: VM, keys: Sequence[str]) -> list[tuple[str, str, str, str, str]]:
    """What is written in a guest to make it this VM: (how, path, mode, owner, content) of each file.  How, as
    tmpfiles.d(5) says it with content in base64 (~): over what is there (f+~), or where no file is (f~)."""
    full = f"{vm.name if vm.is_template else vm.dns_name}.{DOMAIN}"
    hosts = f"127.0.0.1 localhost\n127.0.1.1 {full} {vm.name}\n::1 localhost ip6-localhost ip6-loopback\n"
    owner, text = vm.get("vmUser"), "\n".join(keys) + "\n"
    home = "/root" if owner == "root" else f"/home/{owner}"
    files = [
        ("f+~", "/etc/ssh/ssh_host_ed25519_key", "0600", "root", read_text(vm.host_key)),
        ("f+~", "/etc/ssh/ssh_host_ed25519_key.pub", "0644", "root", read_text(vm.host_key + ".pub")),
        ("f+~", "/etc/ssh/sshd_config.d/00-nocloud.conf", "0644", "root", LOGIN_LINE + "\n"),
        ("f+~", LOGIN_KEYS, "0644", "root", text),
    ]
    if vm.get("vmInit") == "systemd":
        files += [
            ("f+~", "/etc/hostname", "0644", "root", vm.name + "\n"),
            ("f~", "/etc/hosts", "0644", "root", hosts),
            ("f+~", f"{home}/.ssh/authorized_keys", "0600", owner, text),
        ]
    return files


def waking_words(vm: VM, keys: Sequence[str], token: str) -> bytes:
    """What the agent in a guest that wakes up is told, see etc/guest/agent.py."""
    message = {
        "token": token, "random": _base64(os.urandom(48).hex()), "name": vm.name, "mac": vm.get("vmMac"),
        "id": vm.get("vmUuid").replace("-", ""), "files": identity_files(vm, keys), "time": time.time(),
    }  # fmt: skip
    return b"".join(_json(message).splitlines()) + b"\n"


def _base64(text: str) -> str:
    return binascii.b2a_base64(text.encode("utf-8", "surrogateescape"), newline=False).decode()


def takes_seed(vm: VM) -> bool:
    """Whether a cloud-init seed is attached: not to VMs of the bash tools, whose cloud-init would see a new machine."""
    return vm.get("vmInit") in ("cloud-init", "auto")


# How user-data begins that cloud-init knows (its explanation/format); a MIME message is known by its header.
USER_DATA_STARTS = ("#!", "#cloud-config", "#include", "#cloud-boothook", "#part-handler", "## template: jinja")


def read_user_data(path: str) -> bytes:
    """A file of the user's own additions, at most 1 MB.  Raises UsageError where cloud-init would pass over it."""
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode) and not path.startswith("/dev/fd/"):  # a shell's <(…) has a writer
            raise UsageError(f"{path}: a pipe, and no file", "write it into a file")
        with open(path, "rb") as file:
            data = file.read(MIB + 1)
            if data[:2] == b"\x1f\x8b":  # cloud-init takes that, too
                file.seek(0)
                data = gzip.GzipFile(fileobj=file).read(MIB + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: {reason}", "user-data=FILE is what cloud-init is given besides") from None
    data = data.removeprefix(b"\xef\xbb\xbf")  # see TEXT
    if len(data) > MIB:
        raise UsageError(f"{path}: more than 1 MB", "let the guest fetch the rest: #include, or a script")
    if re.match(rb"\s*#cloud-config\s", data, re.I) and not is_mime(data):
        check_yaml(path, data)
    if not is_mime(data) and not data.lstrip().lower().startswith(tuple(start.encode() for start in USER_DATA_STARTS)):
        hint = f"it begins with one of {', '.join(USER_DATA_STARTS)}, or is a MIME message"
        raise UsageError(f"{path}: cloud-init would not know what to do with it", hint)
    return data


def check_yaml(path: str, data: bytes) -> None:
    """Raise where a #cloud-config is no YAML.  Where the host has no reader of that, the guest's cloud-init tells."""
    code = "import sys, yaml\ntry: yaml.safe_load(sys.stdin.buffer)\nexcept yaml.YAMLError as e: sys.exit(str(e))"
    python = "/usr/bin/python3"  # the one that distributions' python3-yaml is for
    done = run([python, "-I", "-c", code], input=data, check=False) if os.access(python, os.X_OK) else None
    if done and done.returncode and "Traceback" not in done.stdout:
        raise UsageError(f"{path}: cloud-init would drop it, it is not YAML: {' '.join(done.stdout.split())}")


def is_mime(user_data: bytes) -> bool:
    """As cloud-init finds it out (cloudinit/user_data.py, convert_string)."""
    return b"mime-version:" in user_data[:4096].lower()


def default_user_data() -> bytes:
    """What all clones are given that are given nothing else; b"" for none.  Guests obey it as root."""
    path = os.path.join(config_home(), "user-data")
    if not os.path.exists(path):
        return b""
    if reason := untrusted(path):
        raise UsageError(f"{path} is not used: {reason}", f"chown it to you, and chmod go-w {path}")
    return read_user_data(path)


def seed_files(vm: VM, keys: Sequence[str], added: bytes = b"") -> dict[str, bytes]:
    """The files of the seed, by name (cloud-init, reference/datasources/nocloud); `added` is the user's user-data.
    JSON is YAML, and its writer quotes whatever comes: no name and no key becomes a line of its own.  The instance is
    the VM's UUID: another one makes cloud-init begin anew, the same one leaves the guest as it is."""
    # DHCP on the network card, which is found by its MAC whatever it is called (cloud-init's format, version 2).  It is
    # renamed to eth0: what cloud-init writes for ifupdown or NetworkManager goes by the name alone.
    card = {"match": {"macaddress": vm.get("vmMac")}, "set-name": "eth0", "dhcp4": True, "dhcp-identifier": "mac"}
    return {
        "meta-data": _json({"instance-id": vm.get("vmUuid"), "local-hostname": vm.name}),
        "network-config": _json({"version": 2, "ethernets": {"eth0": card}}),
        "user-data": user_data(vm, keys, added),
    }


def user_data(vm: VM, keys: Sequence[str], added: bytes) -> bytes:
    """etc/guest/user-data, a MIME message whose parts cloud-init merges in order: of a key the last one counts.  So the
    user's wins over our defaults; login and host key, which vmssh stands on, over the user's; our login keys go to the
    end of his (Merge-Type), not in their place.  The boothook runs even where no later part can be read."""
    if added and not is_mime(added):
        head = b'Content-Type: text/plain\nContent-Disposition: attachment; filename="user-data"\n'
        added = head + b"Content-Transfer-Encoding: base64\n\n" + base64.encodebytes(added)
    user, boundary, lines = vm.get("vmUser"), f"nocloud-{vm.get('vmUuid')}", list(map(printable_ascii, keys))
    login = {"disable_root": False} if user == "root" else {"user": {"name": user}}
    words = {
        "BOUNDARY": boundary, "NAME": json.dumps(vm.name), "FQDN": json.dumps(f"{vm.name}.{vm.group}.{DOMAIN}"),
        "HOOK": guest_script("login.sh", KEYS="\n".join(lines), FILE=LOGIN_KEYS, LINE=LOGIN_LINE),
        "ADDED": f"--{boundary}\n{added.lstrip().decode('utf-8', 'surrogateescape')}" if added else "",
        "LOGIN": json.dumps(login)[1:-1], "KEYS": json.dumps({"ssh_authorized_keys": lines}, indent=1),
        "PRIVATE": json.dumps(read_text(vm.host_key)),
        "PUBLIC": json.dumps(printable_ascii(read_text(vm.host_key + ".pub").strip())),
    }  # fmt: skip
    return filled(need_packaged("guest/user-data"), words).encode("utf-8", "surrogateescape")


def printable_ascii(text: str) -> str:
    """A line of a key file as every reader of YAML takes it: a key's comment may be in any encoding."""
    return re.sub(r"[^ -~]", "?", text)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


# What the user's ssh configuration doesn't decide, since it would lead elsewhere or keep the keys away (ssh_config(5)).
# Agents, forwarding, the environment, ciphers and all the rest are his.  `+`: ssh's own list, and with it ed25519.
OWN_WAY = {
    "Port": "22", "AddressFamily": "inet", "CanonicalizeHostname": "no",
    "PubkeyAuthentication": "yes", "PreferredAuthentications": "publickey,keyboard-interactive,password",
    "HostKeyAlgorithms": "+ssh-ed25519", "PubkeyAcceptedKeyTypes": "+ssh-ed25519",
    "ServerAliveInterval": "15",  # a VM that is switched off closes no connection: ssh ends, after 45 s
}  # fmt: skip
# Nor what a call of ours does.  The last two came with OpenSSH 8.7; `*` covers what the user's own IgnoreUnknown says.
OWN_CALL = {
    "IgnoreUnknown": "*", "RemoteCommand": "none", "RequestTTY": "auto", "StdinNull": "no",
    "ForkAfterAuthentication": "no",
}  # fmt: skip


def ssh_options(**values: str) -> list[str]:
    """The words of a call of ssh that set these (ssh_config(5))."""
    return [word for name, value in values.items() for word in ("-o", f"{name}={value}")]


def ssh_path(path: str) -> str:
    """A path as a value in ssh's configuration language: quoted, and % is not a token."""
    return '"' + path.replace("%", "%%") + '"'


def ssh_trust_options(known_hosts: str, strict: bool) -> list[str]:
    """Our known_hosts and no other; unknown keys are refused, or pinned at the first contact where none was planted."""
    return ssh_options(
        UserKnownHostsFile=ssh_path(known_hosts), GlobalKnownHostsFile="/dev/null",
        StrictHostKeyChecking="yes" if strict else "accept-new", UpdateHostKeys="no", HashKnownHosts="no",
        CheckHostIP="no",
    )  # fmt: skip


def ssh_key_options(planted: bool) -> list[str]:
    """Which keys ssh offers.  Where ours was planted, no others but the user's default ones: an agent full of keys
    would use up the tries that a server grants (MaxAuthTries, 6); and no password is asked for that nobody has."""
    words = [word for path in (own_key(), *user_keys()) for word in ssh_options(IdentityFile=ssh_path(path))]
    only = {"IdentitiesOnly": "yes", "PreferredAuthentications": "publickey"} if planted else {"IdentitiesOnly": "no"}
    return [*words, *ssh_options(**only)]


def ssh_way(network: Network, trust: Sequence[str], keys: Sequence[str]) -> list[str]:
    """How ssh, and what calls it, gets into the VMs of a network, whatever the user's own configuration says."""
    proxy = network.proxy_command()
    way = {"ProxyCommand": proxy, "ProxyUseFdpass": "yes"} if proxy else {"ProxyCommand": "none"}
    return [*trust, *keys, *ssh_options(**OWN_WAY, **way)]  # of two values the first counts


def ssh_host(vm: VM, address: str) -> list[str]:
    """Where it is, whose host key is expected, and who logs in."""
    return ssh_options(HostName=address, HostKeyAlias=vm.get("vmUuid"), User=vm.get("vmUser"))


def ssh_block(cloud: Cloud, vm: VM, names: Sequence[str], *words: str) -> str:
    """A block of ssh_config(5) that gives these names to a VM; `words` as of ssh_options()."""
    network, known = cloud.network_of(vm), cloud.known_hosts
    trust = ssh_trust_options(known.path, strict=known.knows(vm.get("vmUuid")))
    way = ssh_way(network, trust, ssh_key_options(is_planted(vm)))
    words = (*words, *ssh_options(ControlPath="none"), *ssh_host(vm, network.address(vm)), *way)
    return "\n    ".join([f"Host {' '.join(names)}", *(word.replace("=", " ", 1) for word in words[1::2])]) + "\n\n"


class SshConfig:
    """An ssh configuration with the VMs' names, which lies in the tree.  Where the user asked for that, ~/.ssh/config
    includes it, and it is written anew as VMs come and go."""

    # What may be this host's or the Internet's, as github of a group com is, and all of a group io.
    OTHERS = r"localhost(\..*)?|.*\.(..|com|net|org|edu|gov|mil|int|info|dev|app|cloud|local|lan|home)"

    def __init__(self, cloud: Cloud) -> None:
        self.cloud, self.path = cloud, os.path.join(cloud.tree.base, ".ssh_config")

    def users(self, name: str) -> str:
        """A file of the user's, where ssh looks for it: it heeds no HOME."""
        return os.path.join(pwd.getpwuid(os.getuid()).pw_dir, ".ssh", name)

    def text(self) -> tuple[str, list[str]]:
        """(a block for each VM, what is not offered, and why)."""
        names, patterns = self.cloud.tree.unique_names(), self._patterns()
        blocks, left = [], []
        for vm in (vm for vm in self.cloud.tree.vms() if not vm.is_template and vm.is_readable()):
            own = names[vm.full_name]
            why = {name: self._taken(vm, name, own, patterns) for name in (vm.dns_name, vm.host_name)}
            full = [f"{vm.dns_name}.{DOMAIN}", f"{vm.group}/{vm.name}"] if vm.dns_name in own else []
            if not vm.get("vmUuid") or not self.cloud.network_of(vm).address(vm):
                full, why = [], {vm.full_name: "it has no address yet"}
            left += [f"{name}: {reason}" for name, reason in why.items() if reason]
            if full:
                blocks.append(ssh_block(self.cloud, vm, [*full, *(name for name in why if not why[name])]))
        return "".join([*(f"# not offered: {each}\n" for each in left), *blocks]), left

    def _taken(self, vm: VM, name: str, own: Sequence[str], patterns: Sequence[str]) -> str:
        """Why the VM doesn't get this name, or ''."""
        if name not in own:
            return "another VM is called so"
        if "." in vm.group or re.fullmatch(self.OTHERS, name.lower()):
            return "it may be a name of this host's or the Internet's"
        if any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns):
            return f"{self.users('config')} has it"
        file = self.users("known_hosts")
        known = os.path.exists(file) and not run(["ssh-keygen", "-F", name, "-f", file], check=False).returncode
        return f"{file} has it" if known else ""

    def _patterns(self) -> list[str]:
        """What the Host and Match lines of the user's configuration name, but for what means any host."""
        files, found = [self.users("config")], []
        for path in files:  # grows by what is included
            for line in read_text(path).splitlines() if os.path.isfile(path) else ():
                keyword, *words = re.split(r'[\s=,"]+', line.strip())
                if keyword.lower() == "include":
                    places = (self.users(re.sub("^~/", "../", word)) for word in words if word)
                    files += sorted({each for place in places for each in glob.glob(place)} - {self.path, *files})
                elif keyword.lower() in ("host", "match"):
                    found += [word for word in words if re.search("[^*?.]", word)]
        return found

    def write(self) -> list[str]:
        """Write the file; what it doesn't offer, and why."""
        with self.cloud.tree.lock():
            text, left = self.text()
            write_file(self.path, text)
        return left

    def refresh(self) -> None:
        """VMs came or went: write the file anew, where it is used."""
        try:
            if os.path.exists(self.path):
                self.write()
        except (Error, OSError) as error:  # of less weight than what has been done
            report.warn(f"{self.path} is not up to date: {error}")

    def include(self, wanted: bool) -> None:
        """Have ~/.ssh/config begin with the one Include, which is in no block of a host's there; or take it away."""
        if re.search(r"[^\w ./+,:@=-]", self.path):
            raise Error(f"{self.path}: ssh's Include can't take this path", "set vmBaseDir to a plainer one")
        path, line, old = os.path.realpath(self.users("config")), f'Include "{self.path}"'.encode(), b""
        with FolderLock(os.path.dirname(self.users("config")), make=True):
            if os.path.exists(path):
                if not os.path.isfile(path):
                    raise Error(f"{path}: not a regular file")
                with open(path, "rb") as file:
                    old = file.read()
            rest = [each for each in old.splitlines(keepends=True) if each.strip() != line]
            new = b"".join([line + b"\n", *rest] if wanted else rest)
            if new != old:
                write_file(path, new)


def is_planted(vm: VM) -> bool:
    """Whether keys and host key are sure to get into the guest before its first contact."""
    return vm.get("vmInit") in ("systemd", "cloud-init")


def is_renamed(vm: VM) -> bool:
    """Whether its guest knows itself by another name."""
    return bool(read_existing(vm.configured_file)) and vm.get("vmInit") != "none"


# Catalogue and downloads #############################################################################
#
# What can be had by name, and how an image comes: one connection at a time, and nothing that a server says is believed.


# -- the catalogue: data, in files that users extend; a line of a later file wins over an earlier one

CATALOGUE = "nocloud_templates.conf"
MIRRORS = "mirrors"  # the section that is no entry
DIGEST_LENGTHS = {"sha512": 128, "sha256": 64, "md5": 32}


def web_address(text: str) -> str:
    """A URL that can be downloaded from; a password in it would end up in confs and messages."""
    if re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[!-?A-Z\\^-~])[!-?A-Z\\^-~]*", text):  # brackets: of an IPv6 address
        return text
    raise ValueError("an address that begins with http:// or https://, without spaces or a login")


def checksum_text(text: str) -> str:
    """ALGORITHM:HEX."""
    algorithm, _, digest = text.lower().partition(":")
    if re.fullmatch("[0-9a-f]+", digest) and len(digest) == DIGEST_LENGTHS.get(algorithm):
        return f"{algorithm}:{digest}"
    raise ValueError("sha512:HEX or sha256:HEX, with all digits")


ENTRY_KEYS: dict[str, Callable[[str], object]] = {
    "title": str, "kind": one_of("cloud", "classic"), "arch": ARCH,
    "image": lambda text: [web_address(word) for word in text.split() or [text]],
    "checksums": str, "algorithm": one_of("sha512", "sha256", "md5"), "checksum": checksum_text, "base": web_address,
    "last": whole_number(0, 999), "key": str, "user": LOGIN_NAME, "init": INIT_KIND, "boot": FIRMWARE_KIND,
    "mem": MEMORY_MB, "cpu": CPU_COUNT,
}  # fmt: skip


@record
class Entry:
    """A system that the catalogue names: the values of its lines, checked; '' where it has no such line."""

    name: str
    origin: str
    values: dict[str, str]

    def __getitem__(self, key: str) -> str:
        return self.values.get(key, "")

    def need(self, key: str) -> str:
        if not self[key]:
            raise UsageError(f"{self.origin}: [{self.name}] has no line {key} =")
        return self[key]


class Catalogue:
    """All entries, by name, and where downloads are sent instead of where the entries say."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.mirrors: dict[str, str] = {}

    def read(self, text: str, file: str) -> None:
        """Take the lines of a file.  Raises UsageError naming FILE:LINE."""
        section = ""
        for number, raw in enumerate(text.splitlines(), 1):
            line = re.split(r"(?:^|\s)#", raw, maxsplit=1)[0].strip()
            if not line:
                continue
            key, equals, value = (part.strip() for part in line.partition("="))
            origin, shown = f"{file}:{number}", f"{key} = {value}"
            header = re.fullmatch(r"\[\s*(\S+)\s*\]", line)
            try:
                if header:
                    section = header[1]
                    if section != MIRRORS:
                        entry = Entry(section, origin, {"kind": "cloud", "arch": "x86_64"})
                        self.entries.setdefault(checked_name("template", section), entry)
                elif not (section and equals and key):
                    raise UsageError(f"expected [NAME] or KEY = VALUE, not {line[:60]!r}")
                elif section == MIRRORS:
                    self.mirrors[checked(web_address, key, shown)] = checked(web_address, value, shown)
                elif key in ENTRY_KEYS:
                    checked(ENTRY_KEYS[key], value, shown)
                    self.entries[section].values[key] = value
                else:
                    report.warn(f"{origin}: unknown key {key}{did_you_mean(key, ENTRY_KEYS, before=', ')}")
            except UsageError as error:
                raise UsageError(f"{origin}: {error}", error.hint) from None

    def mirrored(self, url: str) -> str:
        """Where to ask for a URL: the mirror of the longest beginning that has one."""
        start = max(filter(url.startswith, self.mirrors), key=len, default="")
        return self.mirrors[start] + url[len(start) :] if start else url

    def need(self, name: str, arch: str = "") -> Entry:
        """The entry of that name; NAME-arm64 where that is for this machine's architecture, or the one asked for."""
        checked_name("template", name)
        if name not in self.entries:
            hint = did_you_mean(name, self.entries, "vmtemplate --list --available shows what there is")
            raise NotFound(f"{name}: not in the catalogue", hint)
        entry, wanted = self.entries[name], arch or os.uname().machine
        if entry["arch"] != wanted:
            entry = self.entries.get(f"{name}-{ARCHES.get(wanted, [''])[0]}", entry)
        if arch not in ("", entry["arch"]):
            raise NotFound(f"{name}: not in the catalogue for {arch}", f"it is there for {entry['arch']}")
        return entry


def load_catalogue() -> Catalogue:
    """The packaged one, and the files on disk that add to it: the installation's, then the user's."""
    catalogue = Catalogue()
    catalogue.read(packaged(CATALOGUE), CATALOGUE)
    installed = os.path.join(os.path.dirname(installed_settings()), CATALOGUE)
    for path in filter(os.path.isfile, (installed, os.path.join(config_home(), "templates.conf"))):
        text, reason = read_trusted(path)
        if reason:
            report.warn(f"{path} is skipped: {reason}")
        else:
            catalogue.read(text, path)
    return catalogue


def catalogue_rows(tree: Tree) -> list[tuple[str, str, str, str]]:
    """(name, "there" or "-", login, title) of all that can be downloaded."""
    there = {template.name for template in tree.templates()}
    return [
        (entry.name, "there" if entry.name in there else "-", entry["user"] or "-", entry["title"] or "-")
        for entry in load_catalogue().entries.values()
    ]


def catalogue_help() -> str:
    """The end of vmtemplate's help."""
    try:
        names = " ".join(load_catalogue().entries)
    except Error as error:
        names = str(error)
    indented = textwrap.fill(names, 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return f"NAME alone downloads it. The catalogue has:\n{indented}"


# -- download: lengths are counted, waits are bounded, and only what hashes to the published checksum is used

PIECE = 256 * 1024
TRIES = 4  # in a row without getting on
WORTH_IT = MIB  # getting on by less doesn't count: an endless trickle has to end
SLOWEST = 1024  # bytes a second
TEXT_LIMIT = 4 * MIB  # of a checksum file


class WebError(Error):
    """A server didn't give what it was asked for."""


class Absent(WebError):
    """It says that there is no such file."""


class Exhausted(WebError):
    """It has no more bytes of the file than were there already."""


class TryAgain(WebError):
    """It may do so in a moment."""


class Altered(WebError):
    """What has arrived is not what was published."""


def status_error(url: str, code: int, reason: str) -> WebError:
    """An HTTP status that is no success, as one line; TryAgain where another try makes sense."""
    if code in (404, 410):
        return Absent(f"{url}: the server has no such file ({code})", "the catalogue may be older than the server")
    if code == 416:
        return Exhausted(f"{url}: the server has no more of it")
    if 300 <= code < 400:
        where = "around in circles" if "infinite loop" in reason else "to something that is no web server"
        return WebError(f"{url}: refused: the server sends us {where} ({code})")
    kind = TryAgain if code >= 500 or code in (408, 425, 429) else WebError
    return kind(f"{url}: the server says {code} {reason}")


def web_error(url: str, error: Exception) -> WebError:
    """What urllib and the layers under it raise, as one line; TryAgain where another try makes sense."""
    reason = getattr(error, "reason", "") or error
    if hasattr(error, "code"):
        return status_error(url, error.code, str(reason))
    if isinstance(reason, ssl.SSLCertVerificationError):
        refused = f"{url}: the server's certificate is refused: {reason.verify_message}"
        return WebError(refused, "this machine's clock may be wrong, or a proxy stand in between")
    if isinstance(reason, socket.gaierror):
        return WebError(f"{url}: {reason.strerror}", "is this machine online? A proxy goes into https_proxy")
    return TryAgain(f"{url}: {'too slow: ' if isinstance(reason, (TimeoutError, socket.timeout)) else ''}{reason}")


class Web:
    """Asks web servers, by the proxies of the environment; raises Error, and nothing else, where they don't answer."""

    def __init__(self, seconds: float) -> None:
        import urllib.request

        class Redirects(urllib.request.HTTPRedirectHandler):
            http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.9 and 3.10 don't know it

            def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
                # From https to anything less, or to something that is no web server.
                if not newurl.startswith(("https://", "http://") if req.full_url.startswith("http://") else "https://"):
                    refused = f"{req.full_url}: refused: the server sends us on to {newurl[:200]}, which isn't https"
                    raise WebError(refused)
                return super().redirect_request(req, fp, 302 if code == 308 else code, msg, headers, newurl)

        self.seconds, self._opener = seconds, urllib.request.build_opener(Redirects)

    def open(self, url: str, start: int = 0, method: str = "GET") -> http.client.HTTPResponse:
        """The answer to a request for the file, from byte `start` on if the server can (206), else whole (200)."""
        import http.client
        import urllib.request

        headers = {"User-Agent": f"nocloud/{__version__}", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(url, headers=headers, method=method)
        with Parsing(WebError, f"{url}: the server's answer, or where it sends us on to, is not understood"):
            try:
                answer = self._opener.open(request, timeout=self.seconds)
            except (OSError, http.client.HTTPException) as error:
                raise web_error(url, error) from None
        folder = answer.url.partition("?")[0].endswith("/")
        if folder or answer.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            answer.close()
            problem = "is a folder, not a file" if folder else "a web page came, not a file"
            raise WebError(f"{url}: {problem}", "open it in a browser: a proxy or a login may stand between")
        return answer  # type: ignore[no-any-return]

    def pieces(self, url: str, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        """The body, as it arrives.  (read() would wait for a whole PIECE.)  Raises TryAgain where it comes too slowly
        to get anywhere: a socket's own timeout starts anew with each byte."""
        import http.client

        since, count = time.monotonic(), 0
        while True:
            try:
                piece = answer.read1(PIECE)
            except (OSError, http.client.HTTPException) as error:
                raise web_error(url, error) from None
            if not piece:
                return
            count += len(piece)
            if time.monotonic() - since > self.seconds:
                if count < SLOWEST * self.seconds:
                    raise TryAgain(f"{url}: too slow: less than {SLOWEST} bytes a second")
                since, count = time.monotonic(), 0
            yield piece

    def text(self, url: str) -> str:
        """A small text file."""
        return self.patiently(lambda: self._text(url))  # type: ignore[no-any-return]

    def _text(self, url: str) -> str:
        data = bytearray()
        with self.open(url) as answer:
            for piece in self.pieces(url, answer):
                data += piece
                if len(data) > TEXT_LIMIT:
                    raise WebError(f"{url}: longer than {TEXT_LIMIT // MIB} MB: not a text file")
            if answer.length:
                raise TryAgain(f"{url}: the server broke off")
        return data.decode("utf-8", "replace")

    def patiently(self, work: Callable[[], Any], position: Callable[[], int] = lambda: 0) -> Any:
        """The result of `work`, tried again after a pause as long as there is hope; `position` tells how far it is.
        The pauses are 1, 2 and 4 seconds, or as much shorter as the setting is shorter than its default."""
        tries = 0
        while True:
            before = position()
            try:
                return work()
            except TryAgain as error:
                tries = 1 if position() - before >= WORTH_IT else tries + 1
                if tries == TRIES:
                    hint = "the same command goes on where this one stopped"
                    raise WebError(f"{error} ({TRIES} tries)", hint) from None
            time.sleep(min(1.0, self.seconds / 30) * 2 ** (tries - 1))


ROOM_HINT = "free some disk space, or put XDG_CACHE_HOME and vmBaseDir on larger file systems"


class Progress:
    """How far a download is: a bar on a terminal, elsewhere a line now and then; and whether there is room for it."""

    LINE_EVERY, BAR_EVERY, WIDTH = 15.0, 0.1, 24

    def __init__(self, name: str, base: str, pieces: int = 1) -> None:
        """`base`: the folder that a disk as large as the image is made in afterwards, at least."""
        self.name, self.base, self.pieces = name, base, pieces
        self.total, self.done, self.kept = 0, 0, 0
        self.started = self._shown = time.monotonic()

    def expect(self, size: int, folder: str) -> None:
        """Know from the first piece how much will come into the folder: all pieces but the last are of one size.
        Raises Error where that and the template's disk don't fit."""
        if self.total:
            return
        self.total = max(0, size) * self.pieces
        wanted = {folder: self.total - self.done, self.base: self.total}
        if os.stat(folder).st_dev == os.stat(self.base).st_dev:
            wanted = {self.base: sum(wanted.values())}
        for place, need in wanted.items():
            check_room(place, need, hint=ROOM_HINT)

    def advance(self, count: int) -> None:
        self.done += count
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self._shown < (self.BAR_EVERY if terminal else self.LINE_EVERY):
            return
        self._shown, rate = now, (self.done - self.kept) / max(now - self.started, 0.001)
        part = min(1.0, self.done / self.total) if self.total else 0.0
        bar = f"[{'#' * int(self.WIDTH * part):.<{self.WIDTH}}] {int(100 * part)}% " if self.total else "downloading "
        text = f"{self.done // MIB}{f' of {self.total // MIB}' if self.total else ''} MB, {rate / MIB:.1f} MB/s"
        left = (self.total - self.done) / rate if rate and self.total > self.done else 0
        text += f", {left // 60:.0f}:{left % 60:02.0f} left" if left else ""
        report.progress(f"{self.name}: {bar if terminal else ''}{text}")

    def finish(self) -> None:
        seconds = time.monotonic() - self.started
        kept = f", {self.kept // MIB} MB of them before" if self.kept else ""
        report.say(f"{self.name}: downloaded {self.done / MIB:.1f} MB in {seconds:.0f} s{kept}")


class Transfer:
    """A file that comes into `path`, after what is in it already; each byte of it, the old ones too, goes to `sink`.
    `urls` are tried in turn; one at which no file is, is taken out."""

    def __init__(
        self, web: Web, urls: list[str], path: str, sink: Callable[[bytes], object], progress: Progress, strict: bool
    ) -> None:
        """`strict`: another tag is another file; they differ between the mirrors that a redirector chooses from."""
        self.web, self.urls, self.path, self.sink, self.progress, self.strict = web, urls, path, sink, progress, strict
        self.done, self.total, self.tag = 0, -1, ""

    def run(self) -> None:
        """Fetch it all."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(self.path, flags, 0o600), "r+b", buffering=0) as file:
            for piece in iter(lambda: file.read(PIECE), b""):
                self.sink(piece)
                self.done += len(piece)
            self.progress.done += self.done
            self.progress.kept += self.done
            self.web.patiently(lambda: self._receive(file), lambda: self.done)

    def _receive(self, file: io.FileIO) -> None:
        url = self.urls[0]
        try:
            answer = self.web.open(url, self.done)
        except Absent:
            if len(self.urls) == 1:
                raise
            del self.urls[0]
            self._receive(file)
            return
        except Exhausted:
            if self.done < self.total:
                raise
            return  # it is all here, or another file: the checksum knows
        with answer:
            skip = self._align(url, answer)
            self.progress.expect(self.total, os.path.dirname(self.path))
            for piece in self.web.pieces(url, answer):
                new = piece[skip:]
                skip -= len(piece) - len(new)
                self.sink(new)
                try:
                    check_reserve(os.path.dirname(self.path))  # it may be longer than it was said to be
                except Error:
                    file.truncate(0)
                    raise
                write_all(file.fileno(), new)
                self.done += len(new)
                self.progress.advance(len(new))
            if answer.length or (self.total >= 0 and self.done < self.total):
                raise TryAgain(f"{url}: the server broke off after {self.done // MIB} MB")

    def _align(self, url: str, answer: http.client.HTTPResponse) -> int:
        """How many bytes of this answer we have already.  Raises Altered where it is of another file than ours."""
        total, skip = answer.length if answer.length is not None else -1, self.done
        if answer.status == 206:
            part = answer.headers.get("Content-Range", "").strip()
            found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]+/([0-9]{1,18}|\*)", part)
            if not found or int(found.group(1)) != self.done:
                raise Altered(f"{url}: the server sent another part than it was asked for")
            total, skip = int(found.group(2)) if found.group(2) != "*" else -1, 0
        tag = answer.headers.get("ETag", "") or answer.headers.get("Last-Modified", "")
        if 0 <= total < max(self.done, self.total) or (self.strict and self.tag not in ("", tag)):
            raise Altered(f"{url}: the file on the server has changed meanwhile", "try again")
        self.total, self.tag = max(total, self.total), tag
        return skip


# -- published checksums


def parse_checksums(text: str, algorithm: str) -> list[tuple[str, str]]:
    """(file name or '', digest) of each line that says one: `HASH  NAME`, `HASH *NAME`, `ALG (NAME) = HASH`, `HASH`."""
    digest = f"[0-9a-f]{{{DIGEST_LENGTHS[algorithm]}}}"
    pattern = re.compile(rf"(?:{algorithm}\s*\((.+)\)\s*=\s*)?({digest})(?:\s+\*?(\S.*))?", re.I)
    found = filter(None, (pattern.fullmatch(line.strip()) for line in text.splitlines()))
    return [(os.path.basename(match[1] or match[3] or ""), match[2].lower()) for match in found]


def choose_listed(listed: Sequence[tuple[str, str]], wanted: str) -> tuple[str, str]:
    """The (name, digest) that a checksum file gives for the file `wanted`, whose name may hold `*`.  A file published
    for one image alone may name nothing, or the image's dated name; one for many may give the same digest for `latest`
    and for a dated name, which is taken then: it doesn't move.  Raises ValueError where it gives none, or two."""
    extension = os.path.splitext(wanted)[1]
    fitting = [each for each in listed if fnmatch.fnmatchcase(each[0], wanted)]
    if not fitting and len(listed) == 1 and listed[0][0].endswith(("", extension)[bool(listed[0][0])]):
        fitting = [(listed[0][0] or wanted, listed[0][1])]
    if not fitting:
        raise ValueError("doesn't list")
    # Ordered by the numbers in the names: text and numbers alternate.
    splits = (re.split("([0-9]{1,18})", each[0]) for each in fitting)
    parts = [[int(part) if place % 2 else part for place, part in enumerate(split)] for split in splits]
    name, digest = fitting[parts.index(max(parts))]
    if any(each != digest for other, each in fitting if other == name):
        raise ValueError("has two checksums for")
    same = [other for other, each in listed if each == digest and other.endswith(extension) and other != name]
    dated = [other for other in same if re.search("[0-9]{6}|Build[0-9]", other)]
    return (dated or [name])[0], digest


# -- the classic kind: a compressed image in pieces


# By what a server says of its images.  xz -9 takes 65 MB of memory: a stream can ask for 4 GB.
UNPACKERS = {"xz": ["xz", "-dc", "--memlimit-decompress=128MiB"], "gzip": ["gzip", "-dc"], "": ["cat"]}


# -- images that came


def check_room(folder: str, need: int, shown: str = "", what: str = "the image takes {} MB", hint: str = "") -> None:
    """Raise where a folder, which messages call `shown`, has less than `need` bytes free."""
    free = free_bytes(folder)
    if need > free:
        raise Error(f"{shown or folder}: {what.format(need // MIB)}, {free // MIB} MB are free", hint)


RESERVE = 64 * MIB


def check_reserve(folder: str) -> None:
    """Raise where so little room is left in a folder that what comes into it without an end would have taken it all."""
    check_room(folder, RESERVE, what="what comes there has no end in sight, {} MB are kept free", hint=ROOM_HINT)


class CachedImage:
    """An image's place in the user's cache; `with` holds it: two commands that want the same image download or build it
    once.  An interrupted download stays and is gone on with; so do images, for some time after their last use."""

    KEPT = 30 * 86400.0

    def __init__(self, name: str, algorithm: str = "sha256", digest: str = "") -> None:
        """`digest`: '' for an image that is made on this machine, whose checksum is kept in a file beside it, and for
        one of which nobody knows what it must be, and which isn't kept."""
        self.algorithm, self.digest = algorithm, digest
        self.folder = os.path.join(cache_home(), "images", name)
        self.image, self._checksum = os.path.join(self.folder, "image"), os.path.join(self.folder, "sha256")

    def __enter__(self) -> CachedImage:
        images = os.path.dirname(self.folder)
        try:
            make_private_folder(images)
        except OSError as error:
            hint = "what is downloaded or built is kept there: set XDG_CACHE_HOME to a folder of yours"
            raise Error(f"{images}: {error.strerror}", hint) from None
        for folder in (cache_home(), images):
            if reason := untrusted(folder):
                raise Error(f"{folder}: {reason}", "set XDG_CACHE_HOME to a folder of yours")
        self._forget(lambda folder: time.time() - os.stat(folder).st_mtime > self.KEPT)
        self._lock = FolderLock(self.folder, wait=86400, make=True).__enter__()
        return self

    def _forget(self, useless: Callable[[str], bool]) -> None:
        """Remove those others that are useless, and that no command is at work on."""
        images = os.path.dirname(self.folder)
        for folder in [os.path.join(images, name) for name in folders_in(images)]:
            with contextlib.suppress(WrongState, FileNotFoundError):  # someone uses it, or has just removed it
                if folder != self.folder and useless(folder):
                    with FolderLock(folder, wait=0):
                        remove_tree(folder)

    def is_there(self) -> bool:
        """Whether the image is there, whole: it is read again each time, so that nothing in the cache needs a flush."""
        digest = self.digest or read_tail(self._checksum).strip()
        if not digest:
            self.clear()  # nothing could tell whether what is gone on with is the same
        if not os.path.isfile(self.image):
            return False
        if file_digest(self.image, self.algorithm) != digest:
            report.warn(f"{self.image} is damaged, it is {'downloaded' if self.digest else 'built'} again")
            self.clear()
            return False
        os.utime(self.folder)
        return True

    def keep(self, disk: str) -> None:
        """Take a copy of a disk in place of all whose name differs in its last part; without it builds take longer."""
        self.clear()
        try:
            shutil.copyfile(disk, self.image)
            write_file(self._checksum, file_digest(self.image) + "\n")  # one that has none isn't used
        except OSError as error:
            report.warn(f"the build isn't kept in the cache: {error_from_os(error)}")
            self.clear()
        same = self.folder.rpartition("-")[0] + "-"
        self._forget(lambda folder: folder.startswith(same))

    def clear(self) -> None:
        for name in names_in(self.folder):
            os.unlink(os.path.join(self.folder, name))

    def __exit__(self, kind: object, raised: object, trace: object) -> None:
        if isinstance(raised, (Altered, WrongImage)) or not (self.digest or os.path.exists(self._checksum)):
            self.clear()  # the next call begins anew
        for name in names_in(self.folder):
            path = os.path.join(self.folder, name)
            if os.path.getsize(path) == 0:
                os.unlink(path)
        remove_empty(self.folder)
        self._lock.release()


class Source:
    """An image on a server, and what it must hash to ('': nobody knows); of `urls` the first left is its origin."""

    pieces = 1

    def __init__(self, web: Web, urls: list[str], algorithm: str, digest: str) -> None:
        self.web, self.urls, self.algorithm, self.digest = web, urls, algorithm, digest

    def fetch(self, folder: str, progress: Progress) -> None:
        """Make `image` in the folder, going on with what is there.  Raises Altered for what wasn't published."""
        digest, part = hashlib.new(self.algorithm), os.path.join(folder, "image.part")
        self.receive(part, digest.update, progress)
        found = digest.hexdigest()
        if self.digest not in ("", found):
            refused = f"{self.urls[0]}: refused: its {self.algorithm} checksum is not the published one"
            raise Altered(refused, "it was cut short, altered, or replaced just now; try again later")
        self.digest = found
        os.rename(part, os.path.join(folder, "image"))
        progress.finish()

    def receive(self, part: str, sink: Callable[[bytes], object], progress: Progress) -> None:
        """Have the image in the file `part`, and give each byte of it to `sink`."""
        Transfer(self.web, self.urls, part, sink, progress, strict=not self.digest).run()


class ClassicSource(Source):
    """An image that a server of the bash tools has: BASE/NAME.img/NAME.img.000… up to the piece number `last`."""

    def __init__(self, web: Web, base: str, name: str, last: int, algorithm: str, digest: str) -> None:
        super().__init__(web, [f"{base}/{name}.img/"], algorithm, digest)
        self.base, self.name, self.pieces = base, name, last + 1

    def receive(self, part: str, sink: Callable[[bytes], object], progress: Progress) -> None:
        try:
            kind = self.web.text(f"{self.base}/compression").strip()
        except Absent:
            kind = ""
        kind, folder = kind if kind in UNPACKERS else "", os.path.dirname(part)
        extension = {"xz": ".xz", "gzip": ".gz"}.get(kind, "")
        names = [f"{self.name}.img.{number:03d}{extension}" for number in range(self.pieces)]
        paths = [os.path.join(folder, name) for name in names]
        for name, path in zip(names, paths):
            Transfer(self.web, [self.urls[0] + name], path, len, progress, False).run()  # nobody looks into them yet
        try:
            with open(part, "wb") as image:
                for piece in piped(["cat", *paths], UNPACKERS[kind]):
                    sink(piece)
                    check_reserve(folder)
                    if piece.count(0) == len(piece):
                        image.seek(len(piece), os.SEEK_CUR)  # takes no space
                    else:
                        image.write(piece)
                image.truncate()
        except BaseException as error:
            remove_file(part)  # the compressed pieces stay, and are less
            if isinstance(error, CommandFailed):
                raise Altered(f"the compressed image is damaged, or ends in the middle: {error}") from None
            raise
        for path in paths:
            os.unlink(path)


def resolve(catalogue: Catalogue, entry: Entry, web: Web) -> Source:
    """What an entry means just now: its checksum file is read first, and says which file is the image."""
    import urllib.parse

    classic = entry["kind"] == "classic"
    images = [entry.need("base").rstrip("/") + f"/{entry.name}.img"] if classic else entry.need("image").split()
    if entry["checksum"]:
        algorithm, _, digest = checksum_text(entry["checksum"]).partition(":")
        names = []
    else:
        algorithm, wanted = entry.need("algorithm"), images[0].rpartition("/")[2]
        address = urllib.parse.urljoin(images[0], entry.need("checksums"))
        checked(web_address, address, f"{entry.origin}: [{entry.name}]: checksums = {entry['checksums']}")
        listed, digest = read_checksums(web, catalogue.mirrored(address), algorithm, wanted)
        names = [listed] if listed != wanted else []
    if algorithm == "md5":  # what old servers publish: it shows a damaged download, and no more than that
        if not classic:
            raise UsageError(f"{entry.origin}: [{entry.name}]: md5 proves nothing: sha512 or sha256 is needed")
        report.warn(f"{entry.name}: an md5 checksum shows damage, but not who made the image")
    if classic:
        base = catalogue.mirrored(images[0]).rpartition("/")[0]
        return ClassicSource(web, base, entry.name, int(entry.need("last")), algorithm, digest)
    urls = [urllib.parse.urljoin(url, urllib.parse.quote(name)) for name in names for url in images]
    urls = [catalogue.mirrored(url) for url in [*urls, *(url for url in images if "*" not in url)]]
    return Source(web, urls, algorithm, digest)


def read_checksums(web: Web, url: str, algorithm: str, wanted: str) -> tuple[str, str]:
    """(name of the image, digest) as a published checksum file gives them."""
    text = web.text(url)
    with Parsing(WebError, f"{url}: the checksum file is not understood"):
        listed = parse_checksums(text, algorithm)
    if not listed:
        what = "it is a web page" if text.lstrip().startswith("<") else f"it holds no {algorithm} checksums"
        raise WebError(f"{url}: not the checksum file that was expected: {what}")
    try:
        return choose_listed(listed, wanted)
    except ValueError as error:
        raise WebError(f"{url}: the checksum file {error} {wanted}", "the catalogue is older than the server") from None


def publishers_key(entry: Entry) -> tuple[str, str]:
    """(path, public half) of the private ssh key that a classic entry names: it opens the image at its first start.
    Raises Error where it can't be used, before anything is downloaded."""
    file = entry.origin.rpartition(":")[0]
    path = os.path.join(os.path.dirname(os.path.abspath(file)), os.path.expanduser(entry["key"]))
    if not os.path.isfile(path):
        raise NotFound(f"{entry.name}: the key of its publisher isn't there: {path}", f"see {entry.origin}")
    try:
        return path, run(["ssh-keygen", "-y", "-P", "", "-f", path]).stdout.split()[1]
    except CommandFailed as failed:
        said = f"{path}: ssh can't use this key: {last_line(failed.output)}"
        raise Error(said, "chmod 600 it; it must have no passphrase") from None


def published_conf(source: ClassicSource) -> dict[str, str]:
    """Memory and processors as BASE/NAME.conf gives them; nothing else in it is heeded."""
    url, found = f"{source.base}/{source.name}.conf", {}
    for assignment in parse_assignments(source.web.text(url)[: 64 * 1024], url, {}):
        if assignment.key in ("vmMem", "vmCpu"):
            check_setting(assignment.key, assignment.value, f"{url}:{assignment.line}")
            found[assignment.key] = assignment.value
    return found


# Templates ###########################################################################################
#
# A template is made in a folder of its own (.new-NAME) and renamed in place last.


def check_new_template(tree: Tree, name: str) -> None:
    """Raise where there is a template of that name."""
    if os.path.lexists(tree.template(checked_name("template", name)).folder):
        raise WrongState(f"{name}: there is such a template already", f"vmtemplate --delete {name}")


class NewTemplate:
    """A template that is being made: `with` leaves a whole template, or nothing.  `read_only`: its disk is complete; an
    installer is still to write the disk of one that isn't."""

    def __init__(self, cloud: Cloud, name: str, read_only: bool = True) -> None:
        self.cloud, self._read_only = cloud, read_only
        self.final = cloud.tree.template(checked_name("template", name))
        place = os.path.dirname(self.final.folder)
        self.vm = VM(cloud.tree, TEMPLATES, "", name, os.path.join(place, MAKING + name))
        self._done = False

    def __enter__(self) -> NewTemplate:
        tree = self.cloud.tree
        tree.prepare()
        os.makedirs(os.path.dirname(self.final.folder), exist_ok=True)
        with tree.lock():
            sweep(tree, TEMPLATES)
            check_new_template(tree, self.final.name)
            if os.path.lexists(self.vm.folder):
                raise WrongState("another command is making it just now", vm=self.final)
            os.mkdir(self.vm.folder, 0o755)
            self._lock = FolderLock(self.vm.folder, wait=0).__enter__()
        return self

    @property
    def disk(self) -> str:
        """Where its disk is to be made."""
        return self.vm.file(self.vm.disk_name(0, self.cloud.config["vmDiskExt"]))

    def write_conf(self, settings: Mapping[str, str]) -> None:
        """Write a conf that it can be started with where it is being made."""
        disk = {"vmDisk": os.path.basename(self.disk), "vmDiskFormat": "qcow2"}
        self.vm.write_conf({"vmName": self.vm.name, **disk, **settings})

    def finish(self, settings: Mapping[str, str]) -> VM:
        """Write its conf and put it in its place."""
        name, (uuid, _) = os.path.basename(self.disk), new_identity(set())
        os.chmod(self.disk, 0o444 if self._read_only else 0o644)
        remove_file(self.vm.conf_file)  # nothing stays of a first start
        self.write_conf({"vmDisk": self.final.relative(name), "vmUuid": uuid, **settings})
        land({self.vm.folder: self.final.folder})
        self._done = True
        return self.final

    def __exit__(self, *exc: object) -> None:
        if not self._done:
            remove_tree(self.vm.folder)
            remove_empty(os.path.dirname(self.vm.folder))
        self._lock.release()


def import_image(new: NewTemplate, path: str, shown: str = "") -> None:
    """Make the disk of a new template from an image of unknown origin, which messages call `shown`."""
    format = foreign_image_format(path, shown)
    check_room(new.vm.folder, converted_size(path, format), new.cloud.tree.base, hint="free some disk space")
    convert_image(path, format, new.disk)


ASKED = {"mem": "vmMem", "cpu": "vmCpu", "user": "vmUser", "init": "vmInit", "arch": "vmArch", "boot": "vmFirmware"}
SWITCHES = {"uefi": ("vmFirmware", "uefi"), "secure_boot": ("vmFirmware", "secure"), "tpm": ("vmTpm", "yes")}


def asked_settings(given: Mapping[str, Any]) -> dict[str, str]:
    """What options, or lines of the catalogue, say of these, as settings."""
    asked = {key: str(given[name]) for name, key in ASKED.items() if given.get(name)}
    return {**asked, **dict(pair for name, pair in SWITCHES.items() if given.get(name))}


def template_settings(cloud: Cloud, asked: Mapping[str, str]) -> dict[str, str]:
    """What a new template's clones start with: `asked`, else what is configured."""
    configured = {key: cloud.config[key] for key in ("vmMem", "vmCpu", "vmUser")}
    arch = asked.get("vmArch") or os.uname().machine
    firmware = {"vmFirmware": "uefi"} if arch == "aarch64" else {}
    machine = {"vmArch": arch, "vmMachine": cloud.qemu(arch).machine, **firmware}
    return {**configured, "vmInit": "auto", **machine, **asked}


def template_from_image(cloud: Cloud, name: str, path: str, settings: Mapping[str, str], expected: str = "") -> VM:
    """A template from a qcow2 or raw image on this machine; its checksum is recorded, and compared with `expected`."""
    if not os.path.isfile(path):
        problem = "a folder, not a file" if os.path.isdir(path) else "no such file"
        raise NotFound(f"{path}: {problem}", "--image takes a qcow2 or raw disk image")
    with NewTemplate(cloud, name) as new:
        algorithm = expected.partition(":")[0] or "sha256"
        checksum = f"{algorithm}:{file_digest(path, algorithm)}"
        if expected not in ("", checksum):
            raise Error(f"{path}: its checksum is {checksum}", "it is not the image that the checksum was made of")
        import_image(new, path)
        return new.finish({**settings, "vmSource": os.path.abspath(path), "vmChecksum": checksum})


def template_from_source(
    cloud: Cloud, name: str, source: Source, settings: Mapping[str, str], first_start: Callable[..., None] | None = None
) -> None:
    """Download, verify, make the template; `first_start`, given the NewTemplate, does what its guest needs before."""
    cloud.tree.prepare()
    with CachedImage(f"{source.algorithm}-{source.digest or name}", source.algorithm, source.digest) as cached:
        if cached.is_there():
            report.say(f"{name}: the image is in the cache: {cached.folder}")
        else:
            source.fetch(cached.folder, Progress(name, cloud.tree.base, source.pieces))
        with NewTemplate(cloud, name) as new:
            import_image(new, cached.image, source.urls[0])
            if first_start:
                new.write_conf(settings)
                first_start(new)
            checksum = f"{source.algorithm}:{source.digest}"
            new.finish({**settings, "vmSource": source.urls[0], "vmChecksum": checksum})


def template_from_url(cloud: Cloud, name: str, url: str, settings: Mapping[str, str], expected: str) -> None:
    """A template from an image of the web; `expected`: the checksum that the user gives, or '' for none."""
    check_new_template(cloud.tree, name)
    algorithm, _, digest = (expected or "sha256:").partition(":")
    web = Web(cloud.config.number("vmDownloadTimeout"))
    template_from_source(cloud, name, Source(web, [url], algorithm, digest), settings)


def template_from_catalogue(cloud: Cloud, name: str, asked: Mapping[str, str], take_over: Callable[..., None]) -> None:
    """Download what the catalogue has under that name; `asked` are the settings of the command line.  `take_over`,
    given a NewTemplate and a `key`, plants the user's keys in a classic image, which that key opens."""
    catalogue = load_catalogue()
    entry = catalogue.need(name, asked.get("vmArch", ""))
    check_new_template(cloud.tree, name)
    source = resolve(catalogue, entry, Web(cloud.config.number("vmDownloadTimeout")))
    settings, first_start = entry_settings(cloud, entry, asked, source), None
    if isinstance(source, ClassicSource) and entry["key"]:
        first_start = functools.partial(take_over, key=publishers_key(entry))
    template_from_source(cloud, name, source, settings, first_start)
    if isinstance(source, ClassicSource) and not first_start:
        report.say(f"{name}: the catalogue names no key of its publisher; only keys that are in the image will open it")


def entry_settings(cloud: Cloud, entry: Entry, asked: Mapping[str, str], source: Source) -> dict[str, str]:
    """What the clones start with: as the command line says, else the entry, else (classic) the publisher's conf."""
    if not isinstance(source, ClassicSource):
        return template_settings(cloud, {**asked_settings(entry.values), **asked})
    published = published_conf(source)
    settings = template_settings(cloud, {"vmInit": "ssh", **published, **asked_settings(entry.values), **asked})
    del settings["vmMachine"]  # without it a VM runs as the bash tools ran it, whose guests know their card's name
    return settings


# -- layers
#
# The disk of a template that has clones is never written.  A change goes to a layer, a new overlay in its folder, which
# the conf names once that ended well; until then, and if it never does, the template is what it was.  Nothing is stored
# of that: qemu's own record says how the guest ended, the disks' headers say what stands on what.


def check_no_clones(cloud: Cloud, template: VM) -> None:
    """Raise, naming them, where clones depend on the template's disk."""
    if clones := cloud.tree.clones(template):
        places = [os.path.relpath(vm.folder, vm.base).replace(MAKING, "") for vm in clones[:20]]
        names = ", ".join(places) + (" …" if len(clones) > 20 else "")
        ways = {True: "vmtemplate --delete deletes templates", False: "vmstop -d destroys clones"}
        hint = ", ".join(dict.fromkeys(ways[each.is_template] for each in clones))
        raise WrongState(f"{dependents(clones)} would break: {names}", hint, vm=template)


class Layer:
    """A new top for a template's disk, while a guest writes to it; `record`: qemu's account of how that ended, which
    counts once a greeting in it arms it: not while nocloud is at work in the guest.  A frozen one never becomes its
    disk: its `manifest` says what its guest was, whose `memory` and `state`, of the devices, are beside it."""

    def __init__(self, template: VM, name: str) -> None:
        self.template, self.name = template, name
        self.path = template.file(name)
        self.record = template.file(name + RECORD)
        self.memory, self.state = self.path + MEMORY, self.path + STATE
        self.manifest = self.path + FROZEN

    def arm(self) -> None:
        """From now on the guest's own end, and nothing else, makes this the template's disk."""
        QMP(self.template.folder, name=RECORD_SOCKET).close()

    def ended_well(self) -> bool:
        """Whether the guest shut down, by itself or by the power button, and the image is whole.  `reason` tells of a
        qemu told to quit or signalled (QEMU qapi/run-state.json, ShutdownCause); a killed one leaves no event."""
        armed, cause = False, ""
        with open(self.record, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    message = parse_qmp(line)
                except QMPError:
                    continue  # a crash of the host may leave anything
                armed = armed or "QMP" in message
                if message.get("event") == "SHUTDOWN":
                    cause = str(message.get("data", {}).get("reason"))
        return armed and cause == "guest-shutdown" and is_sound(self.path)

    def adopt(self) -> None:
        """Make it the template's disk, in the form in which the conf names disks; whole on the disk before that."""
        set_writable(self.path, False)
        sync(self.path)
        folder, disk = os.path.realpath(self.template.folder), self.template.disks()[0]
        if os.path.realpath(os.path.dirname(disk)) == folder:
            name = os.path.join(os.path.dirname(self.template.get("vmDisk")), self.name)
        else:
            name = self.template.relative(self.name)
        formats = ["qcow2", *known_formats(self.template)[1:]]
        if frozen_layer(self.template):
            hint = f"vmtemplate {self.template.name} --warm freezes it anew"
            report.say(f"{report.program}: {self.template} has changed: new clones boot, they don't wake up; {hint}")
        self.template.write_conf({"vmDisk": name, "vmDiskFormat": ",".join(formats)})
        remove_file(self.record)

    def remove(self) -> None:
        """Remove it, and all that goes with it."""
        self.forget()
        remove_file(self.path)
        remove_file(self.record)

    def forget(self) -> None:
        """Remove the frozen memory; clones that woke up on it keep what they have open."""
        for path in (self.manifest, self.memory, self.state):
            remove_file(path)

    def frozen_size(self) -> int:
        """The bytes on disk that its frozen memory takes."""
        return sum(os.stat(path).st_blocks * 512 for path in (self.memory, self.state) if os.path.exists(path))


RECORD, FROZEN, MEMORY, STATE = ".record", ".frozen", ".memory", ".state"


def frozen_layer(template: VM) -> Layer | None:
    """The layer on the template's present disk that its clones can wake up on."""
    names = [name[: -len(FROZEN)] for name in names_in(template.folder) if name.endswith(FROZEN)]
    if not names:
        return None
    layer = Layer(template, max(names, key=functools.partial(layer_number, template)))
    base = os.path.realpath(template.disks()[0])
    return layer if backing_chain(layer.path, "qcow2", lambda path: False) == [base] else None


def layer_number(template: VM, name: str) -> int:
    """N of NAME.lN.img, the name of a template's layer; 0 for any other file's."""
    match = re.fullmatch(re.escape(template.name) + r"\.l([0-9]{1,6})\.(?:img|qcow2)", name)
    return int(match.group(1)) if match else 0


def own_disks(template: VM) -> list[str]:
    """The names of a template's own system disks: its layers, and where its conf names one, the one below them."""
    names = names_in(template.folder)
    found = [name for name in names if layer_number(template, name)]
    if any(layer_number(template, os.path.basename(disk)) for disk in template.disks()[:1]):
        found += [name for name in names if name in (template.disk_name(0, "img"), template.disk_name(0, "qcow2"))]
    return found


def unused_by_itself(template: VM) -> list[str]:
    """Those of its own disks that its present disk doesn't stand on."""
    own, disk = own_disks(template), template.disks()[:1]
    if not own or not disk:
        return []
    os.stat(disk[0])  # where it is gone, nothing is unused
    frozen = frozen_layer(template)
    chain = {os.path.realpath(disk[0]), *template.below(), *([os.path.realpath(frozen.path)] if frozen else [])}
    return [name for name in own if os.path.realpath(template.file(name)) not in chain]


def next_layer(template: VM) -> Layer:
    """The next layer's names; nothing is made."""
    number = 1 + max((layer_number(template, name) for name in names_in(template.folder)), default=0)
    extension = "qcow2" if template.disks()[0].endswith(".qcow2") else "img"
    return Layer(template, f"{template.name}.l{number}.{extension}")


def new_layer(template: VM) -> Layer:
    """An empty layer on the template's present disk.  Call it under the template's lock, when it has been settled."""
    layer = next_layer(template)
    create_overlay(layer.path, template.disks()[0], known_formats(template)[0])
    return layer


def settle(cloud: Cloud, template: VM, warn: bool = True) -> None:
    """Let a change that ended well be the template's, drop one that didn't, and remove what nothing stands on any more.
    Nothing happens while it runs.  Call it under the template's lock, exclusive.  `warn`: of a change that is lost."""
    template.reread()
    if template.state()[0] != "stopped" or not template.disks():
        return
    remove_runtime_files(template)  # of a command that was killed, and its guest with it
    lost = False
    for layer in [Layer(template, name) for name in unused_by_itself(template)]:
        if os.path.exists(layer.record):
            base = os.path.realpath(template.disks()[0])
            if backing_chain(layer.path, "qcow2", lambda path: False) == [base] and layer.ended_well():
                layer.adopt()
            else:
                lost = True
                layer.remove()
            remove_file(template.command_file)  # it would write to a disk that clones may stand on now
    for name in names_in(template.folder):
        if name.endswith(RECORD) and layer_number(template, name[: -len(RECORD)]):
            remove_file(template.file(name))  # of one that was adopted just before a crash
    remove_unused(cloud.tree, template)
    if lost and not is_planted(template):  # the host key that was pinned may be of the guest that is lost
        cloud.known_hosts.update({}, [template.get("vmUuid")])
    if lost and warn:
        report.warn(f"{template}: it was not shut down properly: what was changed is lost, it is as it was before")


def flatten(cloud: Cloud, template: VM) -> None:
    """Give a template that nobody stands on a disk that stands on nothing, where there is room; under its lock, when it
    has been settled.  It is complete before the conf names it; one that isn't is unused, and removed."""
    template.reread()
    disk = template.disks()[0]
    if not template.below() or cloud.tree.clones(template):
        return
    if converted_size(disk, "qcow2") > free_bytes(template.folder):
        report.warn(f"{template}: no room to make one disk of its layers; it stays as it is")
        return
    whole = next_layer(template)
    try:
        compress_image(disk, "qcow2", whole.path)
        whole.adopt()
    finally:
        remove_unused(cloud.tree, template)


def remove_unused(tree: Tree, template: VM) -> None:
    """Remove the template's own disks that neither it nor any other VM or template stands on."""
    if not (unused := unused_by_itself(template)):
        return
    used: list[str] = []
    followed = tree.followable()
    try:
        # First: one may be finished between the looks; its conf may name no disk yet
        for vm in (*tree.unfinished(), *tree.strays()):
            for name in [name for name in names_in(vm.folder) if name.endswith((".img", ".qcow2"))]:
                used += backing_chain(vm.file(name), "", followed)
        for vm in tree.vms():
            if vm.folder != template.folder and vm.exists():
                used += [path for _, chain in vm.chains(followed) for path in chain]
    except (Error, OSError):
        return  # one has just been finished or destroyed, perhaps: the next command looks again
    for layer in [Layer(template, name) for name in unused]:
        if os.path.realpath(layer.path) in used:
            layer.forget()
        else:
            layer.remove()


def settle_stopped(cloud: Cloud, templates: Iterable[VM], wait: float = 600.0) -> None:
    """Settle those templates that have something to settle, and say what is lost; `wait`: for the lock of each."""
    for template in templates:
        # It may be at work elsewhere, someone else's, or just gone: whoever changes it settles it.
        with contextlib.suppress(Error, OSError):
            left = unused_by_itself(template) or os.path.exists(template.file(RUNTIME_FILES[0]))
            if left and template.state()[0] == "stopped":
                with FolderLock(template.folder, wait=wait):
                    settle(cloud, template)


def need_stopped(cloud: Cloud, vm: VM) -> None:
    """Raise where a VM isn't known to be stopped; a template's last change is settled.  Call it under its lock."""
    vm.reread()
    state, _ = vm.state()
    if state != "stopped":
        why = "it is running" if state == "running" else f"can't tell whether it runs: {vm.pid_file}"
        raise WrongState(why, f"vmstop -n {vm}", vm=vm)
    if os.path.exists(vm.saved_file):
        raise WrongState("its memory is saved", f"vm -n {vm} starts it; vmstop --discard -n {vm} forgets that", vm=vm)
    if vm.is_template:
        settle(cloud, vm)


def runs_on_layer(template: VM) -> bool:
    """Whether a template that runs leaves its own disk alone, so that it can be cloned meanwhile."""
    with contextlib.suppress(OSError):  # a disk is gone
        if any(os.path.exists(Layer(template, name).record) for name in unused_by_itself(template)):
            words = ["qemu-img", "info", "-f", known_formats(template)[0], os.path.abspath(template.disks()[0])]
            return not run(words, check=False).returncode  # a qemu that writes to it would keep this one out
    return False


def dependents(vms: Sequence[VM]) -> str:
    """`2 clones and 1 template`."""
    templates = sum(vm.is_template for vm in vms)
    counts = [(len(vms) - templates, "clone"), (templates, "template")]
    return " and ".join(plural(count, noun) for count, noun in counts if count)


def make_cold(cloud: Cloud, name: str) -> int:
    """Remove a template's frozen memory, so many bytes; clones that woke up on it run on."""
    template = cloud.tree.need_template(name)
    with FolderLock(template.folder):
        if not (layer := frozen_layer(template)):
            raise WrongState("it isn't frozen", f"vmtemplate {name} --warm freezes it", vm=template)
        size = layer.frozen_size()
        layer.forget()
        remove_unused(cloud.tree, template)
    return size


def delete_template(cloud: Cloud, name: str) -> None:
    """Remove a template that no clone depends on; refused, naming the clones, otherwise."""
    template = cloud.tree.need_template(name)
    with FolderLock(template.folder):
        check_no_clones(cloud, template)
        if template.state()[0] != "stopped":
            raise WrongState("the template is running", f"vmstop -n {template}", vm=template)
        if os.path.islink(template.folder):
            raise Error(f"{template.folder} is a symlink: nothing behind it is removed", "remove it yourself")
        remove_vm(template)
    remove_empty(os.path.dirname(template.folder))


# -- from an ISO, and changed later


def find_iso(config: Config, name: str) -> str:
    """The absolute path of an ISO 9660 image, all that a BIOS boots from a CD (ECMA-119, 8.4: CD001 in sector 16):
    `name` is a path, or a name in isoDir, `.iso` understood."""
    folder = os.path.expanduser(config["isoDir"])
    places = [name] if "/" in name else [name, os.path.join(folder, name), os.path.join(folder, name + ".iso")]
    path = next(filter(os.path.isfile, places), "")
    if not path:
        others = [] if "/" in name else names_in(folder)
        raise no_such("ISO image", name, others, f"-i takes a path, or a name in isoDir, {folder}")
    with open(path, "rb") as file:
        file.seek(16 * 2048 + 1)
        if file.read(5) != b"CD001":
            raise Error(f"{path}: not an ISO image", "vmtemplate NAME --image FILE takes disk images")
    return os.path.abspath(path)


# -- what there is


def disk_usage(path: str) -> int:
    """The bytes on disk of a file, or of a folder with all that is in it."""
    inside = (os.path.join(place, name) for place, folders, files in os.walk(path) for name in folders + files)
    return sum(os.lstat(each).st_blocks * 512 for each in [path, *inside] if os.path.lexists(each))


def told_of(vm: VM, error: Error | OSError) -> str:
    """What a list says of a VM that it can't look at."""
    if isinstance(error, FileNotFoundError):
        return f"{vm.full_name}: its disk is gone: {error.filename} (moved by hand? see vmDisk in {vm.conf_file})"
    return f"{vm.full_name}: {error_from_os(error)}" if isinstance(error, OSError) else str(error)


def template_rows(cloud: Cloud) -> list[tuple[str, str, str, str]]:
    """(name, size on disk, number of clones and whether they wake up warm, where from) of each template."""
    rows = []
    for template in cloud.tree.templates():
        try:
            disks = {*template.disks(), *map(template.file, own_disks(template))}
            size, frozen = sum(os.stat(disk).st_blocks * 512 for disk in disks), frozen_layer(template)
            size += frozen.frozen_size() if frozen else 0
            source = template.get("vmSource") or "-"
        except (Error, OSError) as error:
            report.warn(told_of(template, error))
            continue
        clones = (dependents(cloud.tree.clones(template)) or "0 clones") + (", warm" if frozen else "")
        rows.append((template.name, f"{size / MIB:.0f} MB", clones, source))
    return rows


def disk_rows(tree: Tree) -> Iterator[str]:
    """Each template with its system disks, under each of these what stands on it, indented, with sizes on disk."""
    owners: dict[str, VM] = {}
    below: dict[str, list[str]] = {}  # what each disk stands on
    followed = tree.followable()
    for vm in tree.vms():
        try:
            own = list(map(vm.file, own_disks(vm) if vm.is_template else ()))
            layers = [path for path in own if layer_number(vm, os.path.basename(path))]  # never raw
            chains = [*vm.chains(followed)][:1] + [(path, backing_chain(path, "qcow2", followed)) for path in layers]
            for disk, chain in chains:
                os.stat(disk)
                if chain and not os.path.exists(chain[-1]):
                    report.warn(f"{vm.full_name}: what its disk stands on is gone: {chain[-1]}")
                below[os.path.realpath(disk)] = chain
            owners.update((os.path.realpath(path), vm) for path in [*vm.disks()[:1], *own])
        except (Error, OSError) as error:
            report.warn(told_of(vm, error))
    for text, _ in tree.told_strays():
        report.warn(text)
    above: dict[str, set[str]] = {}  # what stands on each disk, '' for none
    for path in owners:
        above.setdefault(next((lower for lower in below.get(path, ()) if lower in owners), ""), set()).add(path)

    def row(depth: int, name: str, paths: Iterable[str]) -> str:
        size = sum(os.stat(path).st_blocks * 512 for path in paths if os.path.exists(path))
        return f"{'  ' * depth}{name}  {size / MIB:.1f} MB"

    def rows(path: str, depth: int, under: VM | None) -> Iterator[str]:
        """A disk and what stands on it; where it stands on another's, `under`, or on none, its template comes first."""
        owner, name, said = owners[path], os.path.basename(path), ""
        if not owner.is_template:
            name = owner.full_name
        elif layer := frozen_layer(owner):
            said = "  new clones wake up on this" if path == os.path.realpath(layer.path) else ""
        elif path == os.path.realpath(owner.disks()[0]):
            said = "  new clones stand on this"
        if owner.is_template and owner is not under:
            parts = (each + part for each, vm in owners.items() if vm is owner for part in ("", MEMORY, STATE))
            yield row(depth, owner.name, parts)
            depth += 1
        yield row(depth, name, [path]) + said
        for each in (path + MEMORY, path + STATE):
            if os.path.exists(each):
                yield row(depth + 1, os.path.basename(each), [each])
        for upper in sorted(above.get(path, ()), key=lambda each: (owners[each] is owner, each)):
            yield from rows(upper, depth + 1, owner)

    for path in sorted(path for path in above.get("", ()) if owners[path].is_template):
        yield from rows(path, 0, None)
    for group in tree.groups():
        yield f"group {group}, all files  {disk_usage(os.path.join(tree.base, group)) / MIB:.1f} MB"
    yield f"cache  {disk_usage(cache_home()) / MIB:.1f} MB"


# Building templates ##################################################################################
#
# From packages: mmdebstrap installs them; all that follows works on plain files that belong to the caller, so that it
# needs neither root nor a mount nor a boot.

BUILD_TMP_MB = 1200  # mmdebstrap's own tree, in $TMPDIR
BUILD_WORK_MB = 1700  # the tar, the tree, the raw disk and the qcow2, in the VM tree

APT_OPTION = 'APT::Cmd::Pattern-Only "true"'  # else a name with a dot that no package has is a regular expression

KERNEL_OPTIONS = "rootfstype=ext4 rootflags=noatime console=tty0 console=ttyS0,115200"


class BuildProgress:
    """Turns what mmdebstrap and apt say into a progress line, by etc/build/stages; keeps what a failure needs."""

    def __init__(self, suite: str) -> None:
        self.suite, self.total, self.size, self.cause = suite, 0, "", ""
        self.counts: Counter[str] = Counter()
        self.stages = [line.split("|") for line in packaged_list("build/stages")]
        self.started = time.monotonic()

    def __call__(self, line: str) -> None:
        if report.debug:
            report.say(line)
        if line.startswith("E: "):
            self.cause = self.cause or line[3:].strip()  # the rest follows from what was said first
        if found := re.search(r"(\d+) newly installed", line):  # a new run of apt begins
            self.total, self.counts = int(found.group(1)), Counter()
        if found := re.match(r"Need to get (\S+ .?B)", line):
            self.size = f", {found.group(1)}"
        for start, stage in self.stages:
            if line.startswith(start) and (self.total or not stage.endswith(" packages")):
                self.counts[stage] += 1
                of = f"{min(self.counts[stage], self.total)}/{self.total}" if stage.endswith(" packages") else ""
                self.tell(stage + (self.size if start == "Get:" else ""), of)

    def tell(self, stage: str, detail: str = "") -> None:
        seconds = f"({time.monotonic() - self.started:.0f} s)"
        report.progress(f"{self.suite}: {stage}", f"{detail} {seconds}".strip())


# What is built, and where its packages come from: the host's own mirrors, where the host is of that distribution.


@record
class Distribution:
    """What all suites of a distribution have in common: `keyring` is the package that its archive's keys are in,
    `components` what is used of that archive, `kernel` the package of its kernel for virtual machines."""

    id: str
    name: str
    keyring: str
    components: str
    kernel: str

    @property
    def keys(self) -> str:
        """The file that the keyring's package has the keys in, on Debian, Ubuntu and Fedora."""
        return f"/usr/share/keyrings/{self.id}-archive-keyring.gpg"


DEBIAN = Distribution("debian", "Debian", "debian-archive-keyring", "main", "linux-image-cloud-amd64")
UBUNTU = Distribution("ubuntu", "Ubuntu", "ubuntu-keyring", "main universe", "linux-image-virtual")
UBUNTU_SUITES = ("jammy", "noble")  # every other name is looked for in Debian's archive
WITHOUT_CREDENTIALS = ("bullseye", "jammy")  # systemd 247 and 249: credentials over SMBIOS came with 252
SUITES = ("bookworm", "trixie", *UBUNTU_SUITES)
BUILD_HINT = "--build bookworm, trixie, jammy or noble"


class Build:
    """What a template is built from.  `init`: how its clones get hostname and keys, `seeded`: by cloud-init in any
    case; `more`: packages that were asked for besides ours; `sources`: lines for apt; `gigabytes`: its disk's size;
    `arch`: as Debian calls it."""

    def __init__(
        self, suite: str, more: Sequence[str], gigabytes: int, seeded: bool = False, arch: str = "x86_64"
    ) -> None:
        self.suite, self.more, self.gigabytes, self.arch = suite, more, gigabytes, ARCHES[arch][0]
        self.distribution = UBUNTU if suite in UBUNTU_SUITES else DEBIAN
        seeded = seeded or suite in WITHOUT_CREDENTIALS
        self.init, takers = ("cloud-init", ["cloud-init", "cloud-guest-utils"]) if seeded else ("systemd", [])
        ours = [each for each in packaged_list("build/packages") if (each, self.arch) != ("grub-pc-bin", "arm64")]
        self.packages = [self.distribution.kernel.replace("amd64", self.arch), *ours, *takers, *more]
        self.sources: list[str] = []

    @property
    def title(self) -> str:
        return f"packages of {self.suite}" + (f", with {', '.join(self.more)}" if self.more else "")


def host_archives(distribution: Distribution) -> list[tuple[str, str, str]]:
    """(URI, suite, component) of what the host's apt uses of a distribution's own archives.  apt-get(8) reads both
    formats of its sources for us; others' archives, which serve suites of the same names, have another origin."""
    if not find_program("apt-get"):
        return []
    wanted = ("Created-By: Packages", "Target-Of: deb", f"Origin: {distribution.name}")
    query = ["apt-get", "indextargets", "--format", "$(REPO_URI)|$(RELEASE)|$(COMPONENT)", *wanted]
    rows = (line.split("|") for line in run(query, check=False, merge=False).stdout.splitlines())
    return [(uri, suite, component) for uri, suite, component in rows]


def package_sources(
    suite: str, distribution: Distribution, archives: Iterable[tuple[str, str, str]], host: Mapping[str, str]
) -> list[str]:
    """apt source lines for the suite, from the host's own mirrors, as host_archives() names them; none where it is of
    another distribution: mmdebstrap knows the public ones.  `host`: what os-release says of it.  Raises Error where the
    keys that all this is verified with aren't there."""
    if not os.path.isfile(distribution.keys):
        said = f"{suite}: {distribution.keys} is missing: no package of {distribution.name} can be verified without it"
        raise Error(said, f"sudo apt install {distribution.keyring}")
    codename = host.get("VERSION_CODENAME", "") if host.get("ID") == distribution.id else ""
    # Debian's unstable has no updates of its own.
    pockets = ("",) if suite in ("sid", "unstable", "experimental") else ("", "-updates", "-security")
    wanted = {codename + pocket: suite + pocket for pocket in pockets} if codename else {}
    found: dict[str, set[str]] = {}
    for uri, name, component in archives:
        if name in wanted:
            found.setdefault(f"deb [signed-by={distribution.keys}] {uri} {wanted[name]}", set()).add(component)
    lines = [
        f"{line} {' '.join(sorted(components)) if suite == codename else distribution.components}"
        for line, components in sorted(found.items())
        if "main" in components
    ]
    return lines if any(f" {suite} " in line for line in lines) else []


def package_names(text: str) -> list[str]:
    """The names of a comma-separated list, spelt as Debian Policy 5.6.1 says: to apt, `ssh-` would take ssh away."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+.]", name):
            raise ValueError(f"package names with commas between them; {name!r} is none")
    return list(dict.fromkeys(names))


def plan_build(suite: str, more: Sequence[str], gigabytes: int, seeded: bool, arch: str) -> Build:
    """What is to be built; raises for what can be known to be missing before the work starts."""
    if not re.fullmatch(r"[a-z][a-z0-9.-]{0,62}", suite):
        raise UsageError(f"{suite!r} is no name of a suite", BUILD_HINT)
    check_builder()
    build, archives = Build(suite, more, gigabytes, seeded, arch), []
    if build.distribution is DEBIAN or arch == os.uname().machine:  # Ubuntu has others for arm64
        archives = host_archives(build.distribution)
    build.sources = package_sources(suite, build.distribution, archives, os_release())
    return build


def check_builder() -> None:
    """Raise where no template can be built.  mmdebstrap needs a range of uids to be root over, unless it is root."""
    for name in ("mmdebstrap", "mke2fs", "debugfs", "qemu-img"):
        need_program(name)
    if os.uname().machine not in ARCHES:
        raise Error("templates are built on x86-64 and arm64 only", "vmtemplate NAME --image FILE takes an image")
    if os.geteuid() == 0:
        return
    need_program("newuidmap")
    user, names = user_name(), ("/etc/subuid", "/etc/subgid")
    ranges = {name: read_existing(name) for name in names}
    for name in names:
        if not re.search(rf"^({re.escape(user)}|{os.geteuid()}):", ranges[name], re.M):
            taken = re.findall(r":(\d+):(\d+)$", "\n".join(ranges.values()), re.M)
            free = max([100000, *(int(first) + int(count) for first, count in taken)])  # as useradd(8) begins
            hint = " ".join(f"--add-{kind}s {free}-{free + 65535}" for kind in ("subuid", "subgid"))
            said = f"{user} has no range in {name}, and without it only root can build"
            raise Error(said, f"sudo usermod {hint} {user}")


def build_tmpdir() -> str:
    """Where mmdebstrap works: others must be able to enter it, so it can't be in the VM tree."""
    for name in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp"):
        if name and os.path.isdir(name) and others_may_enter(name) and free_bytes(name) >= BUILD_TMP_MB * MIB:
            return name
    raise Error(f"no folder for temporary files has {BUILD_TMP_MB} MB free", "TMPDIR=FOLDER names another")


def others_may_enter(folder: str) -> bool:
    """Whether any user gets to a folder: root of a user namespace, who isn't the caller, is any user."""
    folder = os.path.realpath(folder)
    above = os.path.dirname(folder)
    return bool(os.stat(folder).st_mode & stat.S_IXOTH) and (above == folder or others_may_enter(above))


def install_packages(build: Build, archive: str, progress: BuildProgress) -> None:
    """A tar of the installed system (mmdebstrap(1), mode unshare: the same as root and as an ordinary user)."""
    # Spares bookworm usrmerge, and with it all of perl. It fails for noble.
    hooks = "/usr/share/mmdebstrap/hooks/maybe-merged-usr" if build.distribution is DEBIAN else ""
    # The keys of its own sources mmdebstrap has to find: the host's apt doesn't trust another distribution.
    given = ["--skip=check/signed-by"] if build.sources else []
    argv = [
        "mmdebstrap", "--verbose", "--mode=unshare", "--format=tar", "--variant=minbase",
        f"--architectures={build.arch}", "--skip=output/dev", *given,
        *([f"--hook-dir={hooks}"] if os.path.isdir(hooks) else []),
        *[f"--dpkgopt={option}" for option in packaged_list("build/dpkg.cfg")], "--aptopt=" + APT_OPTION,
        "--components=" + build.distribution.components.replace(" ", ","),  # for its own sources, where we give none
        "--include=" + ",".join(build.packages), "--customize-hook=" + need_packaged("build/target.sh"),
        build.suite, archive, *build.sources,
    ]  # fmt: skip
    env = {"TMPDIR": build_tmpdir(), "INITRD": "No", "DEBIAN_FRONTEND": "noninteractive", "ARCH": build.arch}
    if run_watched(argv, progress, env=env)[0]:
        raise build_error(build, progress.cause or "mmdebstrap failed")


def apt_proxies() -> dict[str, str]:
    """The proxies of the host's apt.conf, for the environment: mmdebstrap's apt doesn't read that file, nor do we."""
    if not find_program("apt-config"):
        return {}
    words = [word for kind in ("http", "https") for word in (f"{kind}_proxy", f"Acquire::{kind}::Proxy")]
    text = run(["apt-config", "shell", *words], check=False, merge=False).stdout
    found = re.findall(r"^(\w+)='([^']+://[^']+)'$", text, re.M)  # there is also DIRECT
    return {name: value for name, value in found if name not in os.environ}


def build_error(build: Build, cause: str) -> Error:
    """What apt or mmdebstrap said, as an Error that says what helps."""
    missing = re.search(r"repository '(\S+) .*does not have a Release file", cause)
    if missing:
        return no_such(f"suite on {missing.group(1)}", build.suite, SUITES, BUILD_HINT)
    if "NO_PUBKEY" in cause or "is not signed" in cause:
        return Error(f"{build.suite}: {cause}", f"sudo apt install {build.distribution.keyring}")
    if "foreign architecture" in cause or "neither be executed" in cause:
        return Error(f"{build.suite}: {cause}", install_command("arch-test", "qemu-user-static"))
    unknown = re.match(r"Unable to locate package (\S+)|Package '(\S+)' has no installation candidate", cause)
    if unknown:
        name = unknown.group(1) or unknown.group(2)
        return NotFound(f"{name}: no such package in {build.suite}", "apt-cache search finds names")
    return Error(f"{build.suite}: {cause}", "--debug shows the whole command, and what it says")


# From the tar to a tree that belongs to the caller, and from that to a disk: no mount, no loop device.


def unpack_system(archive: str, tree: str) -> dict[str, tuple[int, int]]:
    """Extract the tar as whoever we are; the owners, (uid, gid), that its members should have had."""
    owners: dict[str, tuple[int, int]] = {}

    def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        for member in tar:
            if member.isdev() or ".." in member.name.split("/"):
                continue
            owners[os.path.normpath(member.name)] = (member.uid, member.gid)
            member.uid, member.gid = os.geteuid(), os.getegid()
            yield member

    with tarfile.open(archive) as tar:
        tar.extraction_filter = lambda member, path: member  # the default of Python 3.14 would drop setuid bits
        tar.extractall(tree, members=members(tar), numeric_owner=True)
    return owners


def put_file(tree: str, name: str, content: str = "", link: str = "") -> None:
    """Write a file, or make a symlink, over what is there."""
    path = os.path.join(tree, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    remove_file(path)
    if link:
        os.symlink(link, path)
    else:
        write_file(path, content, 0o644, durable=False)


def clean_system(tree: str) -> None:
    """Take out what must be each clone's own, and what only costs space."""
    for pattern in packaged_list("build/litter"):
        for path in glob.glob(os.path.join(glob.escape(tree), pattern)):
            if os.path.isdir(path) and not os.path.islink(path):
                remove_tree(path)
            else:
                os.unlink(path)


def configure_system(tree: str, disk_uuid: str, build: Build) -> None:
    """Make a bootable template of the installed system."""
    clean_system(tree)
    os.makedirs(os.path.join(tree, "dev"), exist_ok=True)  # output/dev leaves the folder out as well
    kernel, initrd = boot_links(tree)
    options = KERNEL_OPTIONS.replace("ttyS0", "ttyAMA0") if build.arch == "arm64" else KERNEL_OPTIONS
    words = {"DISTRIBUTION": build.distribution.name, "OPTIONS": options}
    words.update({"UUID": disk_uuid, "KERNEL": kernel, "INITRD": initrd})
    for name in packaged_files("build/tree"):
        text = filled(packaged(f"build/tree/{name}"), words)
        if name != "etc/hosts" or build.init != "systemd":  # else each clone's own names it, see credentials()
            put_file(tree, name, text)
        wanted = re.search(r"^WantedBy=(.+)$", text, re.M)
        if wanted:
            put_file(tree, f"etc/systemd/system/{wanted.group(1)}.wants/{os.path.basename(name)}", link=f"/{name}")
    for line in packaged_list("build/links"):
        name, target = line.split()
        put_file(tree, name, link=target)


def boot_links(tree: str) -> tuple[str, str]:
    """The links that kernel packages keep pointing to the newest kernel and initramfs: in /, Ubuntu's in /boot."""
    for kernel in ("vmlinuz", "boot/vmlinuz"):
        if os.path.islink(os.path.join(tree, kernel)):
            initrd = kernel.replace("vmlinuz", "initrd.img")
            target = os.readlink(os.path.join(tree, kernel)).replace("vmlinuz", "initrd.img")
            put_file(tree, initrd, link=target)  # INITRD=No spared this link too
            return kernel, initrd
    raise Error("the kernel's package has left no link vmlinuz")


SECTOR = 512
ESP_START = 2048  # in sectors: 1 MB, where everyone aligns; the boot loader for a BIOS lives in the gap before
PARTITION_START = ESP_START + 32768  # the root, which grows, comes last; the 16 MB before it are for UEFI
# Named one by one: hosts differ in their defaults, and boot loaders lag behind (orphan_file, metadata_csum_seed).
EXT4_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)


def make_filesystem(tree: str, raw: str, size: int, disk_uuid: str) -> None:
    """An ext4 that fills a disk of `size` bytes, at the partition's place (mke2fs(8)); unused space stays a hole."""
    with open(raw, "wb") as file:
        file.truncate(size)
    # Not lazy: each clone would write out the inode tables in the background, 160 MB into its overlay.
    options = f"offset={PARTITION_START * SECTOR},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
    blocks = (size - PARTITION_START * SECTOR) // 1024
    argv = [
        "mke2fs", "-q", "-F", "-t", "ext4", "-O", EXT4_FEATURES, "-I", "256", "-m", "1", "-L", "root",
        "-U", disk_uuid, "-E", options, "-d", tree, raw, f"{blocks}k",
    ]  # fmt: skip
    run(argv, timeout=600)


def restore_owners(tree: str, raw: str, owners: Mapping[str, tuple[int, int]], script: str) -> None:
    """Have debugfs(8) set the owners of all files: mke2fs took them from the tree, where they are the caller's."""
    lines = []
    for folder, folders, files in os.walk(tree):
        for name in folders + files:
            inside = os.path.relpath(os.path.join(folder, name), tree)
            uid, gid = owners.get(inside, (0, 0))
            lines += [f'sif "/{inside}" uid {uid}\n', f'sif "/{inside}" gid {gid}\n']
    write_file(script, "".join(lines), durable=False)
    done = run(["debugfs", "-w", "-f", script, f"{raw}?offset={PARTITION_START * SECTOR}"], timeout=600, merge=False)
    said = [line for line in done.stderr.splitlines() if line and not line.startswith("debugfs ")]
    if said:  # its exit status is 0 whatever happened
        raise Error(f"debugfs: {said[0]}")


def write_boot_loaders(tree: str, raw: str, size: int, esp: str) -> None:
    """What grub-install does to a disk's first sectors: boot.img, a partition table, and core.img right behind it.
    That is where both images expect it by default: boot.img loads sector 1, core.img's own first sector the rest from
    sector 2 (GRUB 2.06, grub-core/boot/i386/pc).  UEFI looks into the partition that the image `esp` is copied to."""
    boot, core, names = bytearray(440), b"", ("usr/lib/grub/i386-pc/boot.img", "boot/grub/core.img")
    paths = [os.path.join(tree, name) for name in names]
    if os.path.exists(paths[0]):  # arm64 has no BIOS
        with open(paths[0], "rb") as file, open(paths[1], "rb") as image:
            boot, core = bytearray(file.read(440)), image.read()
    if len(core) > (ESP_START - 1) * SECTOR:
        raise Error("the boot loader doesn't fit before the first partition")
    boot[0x66:0x68] = b"\x90\x90"  # take the drive from the BIOS: grub-install does so for hard disks
    chs, sectors = b"\xfe\xff\xff", size // SECTOR - PARTITION_START
    root = struct.pack("<B3sB3sII", 0x80, chs, 0x83, chs, PARTITION_START, sectors)  # the first entry, wherever it lies
    uefi = struct.pack("<B3sB3sII", 0, chs, 0xEF, chs, ESP_START, PARTITION_START - ESP_START)
    table = bytes(boot) + os.urandom(4) + bytes(2) + root + uefi + bytes(32) + b"\x55\xaa"
    with open(raw, "r+b") as file, open(esp, "rb") as image:
        file.write(table + core)
        file.seek(ESP_START * SECTOR)
        shutil.copyfileobj(image, file)


def build_disk(build: Build, new: NewTemplate) -> None:
    """Make a new template's disk: a bootable qcow2."""
    check_room(new.vm.folder, BUILD_WORK_MB * MIB, new.cloud.tree.base, "building takes {} MB for a while")
    work = new.vm.file("work")
    os.mkdir(work, 0o700)
    archive, tree, raw = (os.path.join(work, name) for name in ("root.tar", "tree", "disk.raw"))
    size, (disk_uuid, _) = build.gigabytes * GIB, new_identity(set())
    progress = BuildProgress(build.suite)
    progress.tell("fetching the list of packages")
    install_packages(build, archive, progress)
    progress.tell("configuring the system")
    owners, esp = unpack_system(archive, tree), os.path.join(work, "esp")
    os.rename(os.path.join(tree, "boot/esp"), esp)
    configure_system(tree, disk_uuid, build)
    progress.tell("making the file system")
    make_filesystem(tree, raw, size, disk_uuid)
    restore_owners(tree, raw, owners, os.path.join(work, "owners"))
    write_boot_loaders(tree, raw, size, esp)
    progress.tell("making the disk")
    compress_image(raw, "raw", new.disk)
    megabytes = os.path.getsize(new.disk) // MIB
    report.say(f"{build.suite}: built in {time.monotonic() - progress.started:.0f} s, {megabytes} MB")
    remove_tree(work)


# What was built is kept for the next template of the same: under what went into it, nocloud's own code and files
# included, and what the archives held then.


def build_recipe(build: Build) -> str:
    """A short name for all that decides about the result but the packages' versions."""
    parts = [file_digest(program_path()), *(name + packaged(f"build/{name}") for name in packaged_files("build"))]
    parts += [build.suite, build.arch, *build.packages, *build.sources, str(build.gigabytes)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def archive_state(build: Build, web: Web) -> str:
    """A short name for what the archives hold just now: which versions, by the checksums of their indices.  They are
    asked, since what the host's apt knows may be old; where one can't be, being no web server, wanting a login or not
    answering, or where mmdebstrap chooses them, it is the date.  Raises NotFound where there is no such suite."""
    if not build.sources:
        return time.strftime("%Y%m%d")
    seen: list[str] = []
    for line in build.sources:
        _, archive, suite, *components = re.sub(r"\[.*?\]", "", line).split()
        parts = "|".join(map(re.escape, components))
        index = rf"^ ([0-9a-f]{{64}}) +\d+ (?:{parts})/binary-(?:{build.arch}|all)/Packages$"
        try:
            text = web.text(f"{web_address(archive).rstrip('/')}/dists/{suite}/InRelease")
        except Absent:
            raise no_such(f"suite on {archive}", build.suite, SUITES, BUILD_HINT) from None
        except (WebError, ValueError):
            return time.strftime("%Y%m%d")
        seen += [line, *(re.findall(index, text, re.M) or [text])]
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]


def template_from_packages(cloud: Cloud, name: str, build: Build, settings: Mapping[str, str], again: bool) -> None:
    """A template from a suite's packages: self-contained and bootable, with ssh, DHCP, python3 and no identity.  What
    was built before from the same packages is used, unless `again`."""
    os.environ.update(apt_proxies())
    web = Web(min(10, cloud.config.number("vmDownloadTimeout")))
    cached = CachedImage(f"build-{build_recipe(build)}-{archive_state(build, web)}")
    cloud.tree.prepare()
    with cached, NewTemplate(cloud, name) as new:
        if not again and cached.is_there():
            report.say(f"{name}: the build is in the cache: {cached.folder}")
            shutil.copyfile(cached.image, new.disk)
        else:
            build_disk(build, new)
            cached.keep(new.disk)
        new.finish({**settings, "vmSource": build.title})


# Clones ##############################################################################################
#
# What is asked for, and making it.  What is done to a VM is done under its lock; who was killed in the middle leaves a
# tree that the next command finds consistent.


class Cloud:
    """What the commands of one call work on: the configuration, the tree, the networks, the qemu binary."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tree = Tree(config)
        self.known_hosts = KnownHosts(self.tree)
        self.private = PrivateNetwork(self.tree)
        self.bridge = HostBridge(config, self.tree)
        self.networks: dict[str, Network] = {"private": self.private, "bridge": self.bridge}
        self.forwarders = {kind: Forwarder(self.tree, network) for kind, network in self.networks.items()}

    @functools.cache
    def qemu(self, arch: str) -> Qemu:
        """The qemu binary for guests of an architecture, probed once."""
        return probe_qemu(self.config, arch)

    @functools.cache
    def accel(self, wanted: str, arch: str) -> str:
        """kvm or tcg, for a vmAccel; said once where it is tcg though nobody asked for it."""
        if (accel := choose_accel(wanted, self.qemu(arch))) != wanted and accel == "tcg":
            why = "nocloud doctor acceleration says why" if arch == os.uname().machine else f"they are for {arch}"
            report.warn(f"no hardware acceleration, guests will be slow ({why})")
        return accel

    def prepare(self, vms: Iterable[VM]) -> None:
        """Find what runs these VMs, or clones of templates: what that says is said before there are threads."""
        for arch in sorted({vm.get("vmArch") for vm in vms if vm.is_readable()}):
            self.accel(self.config["vmAccel"], arch)

    @functools.cache
    def screen(self, arch: str) -> str:
        """What shows the screens, one of SCREENS; '', and said once, where the qemu binary has neither."""
        if not (screen := choose_screen(self.qemu(arch))):
            report.warn(f"{self.qemu(arch).path} has neither SPICE nor VNC: VMs have no screen")
        return screen

    def network_of(self, vm: VM) -> Network:
        return self.networks[self.network_kind(vm)]

    def network_kind(self, vm: VM) -> str:
        """Which network a VM is on.  The bash tools knew the host's bridge only."""
        return "bridge" if foreign_qemu(vm) else self.chosen_network(vm.get("vmNetwork"))

    def mend_ports(self) -> None:
        """Where a forwarder was killed, have another one do what it did."""
        lost = [kind for kind, each in self.forwarders.items() if os.path.exists(each.path) and not each.is_there()]
        for vm in self.tree.running() if lost else ():
            if ports_of(vm) and self.network_kind(vm) in lost:
                # Another command may be at work on it, at this perhaps
                with contextlib.suppress(WrongState, FileNotFoundError), FolderLock(vm.folder, wait=0):
                    self.forwarders[self.network_kind(vm)].mend(vm)

    def chosen_network(self, wanted: str) -> str:
        """bridge or private, for a vmNetwork: `auto` is what this host has now."""
        return wanted if wanted != "auto" else "private" if self.bridge.why_not() else "bridge"

    def close(self) -> None:
        """Close what this process holds of the networks."""
        for network in self.networks.values():
            network.close()

    def __enter__(self) -> Cloud:
        self.private.tend()
        self.mend_ports()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.private.used:
            self.private.tend()
        self.close()


@record
class CloneOption:
    """An option of a set of clones, in a description file or after -o."""

    name: str
    metavar: str  # what its value is, '' where it takes none; a FILE's name is relative to the description file
    sets: str  # the setting that the clones get, which checks the value; or else the field of CloneRequest
    help: str
    check: Callable[[str], Any] = str  # raises ValueError, saying what was expected, or UsageError without `NAME=`

    @property
    def text(self) -> str:
        return f"{self.name}={self.metavar}" if self.metavar else self.name


def disk_sizes(text: str) -> list[int]:
    """A check for the sizes of extra disks."""
    sizes = [checked(DISK_GB, each, each) for each in map(str.strip, text.split(","))]
    if len(sizes) >= MAX_DISKS:
        raise UsageError(f"{text}: at most {MAX_DISKS - 1} extra disks")
    return sizes


def name_prefix(text: str) -> str:
    """A check for a prefix such that prefix + number is a name, or for names, which have a comma after or between."""
    if not text:
        raise UsageError(" is empty", "name=web makes web00, web01 …")
    try:
        for name in full_names(text) or [text + "00"]:
            checked_name("VM", name)
    except UsageError as error:
        raise UsageError(f"{text}: {error}", error.hint) from None
    return text


def full_names(text: str) -> list[str]:
    """The names that a `name=` gives whole: web00,front and, of a single one, `front,`."""
    return text.removesuffix(",").split(",") if "," in text else []


CLONE_OPTIONS = (
    CloneOption("mem", "MB", "vmMem", "memory in MB"),
    CloneOption("cpu", "N", "vmCpu", "processors"),
    CloneOption("disk", "GB", "disk", "size of the system disk in GB", DISK_GB),
    CloneOption("dsk", "GB,GB", "disks", "extra disks, in GB (vdb, vdc, …)", disk_sizes),
    CloneOption("name", "PREFIX", "prefix", "how names begin, or all names: web00,front; else UUIDs", name_prefix),
    CloneOption("user-data", "FILE", "user_data", "a file for cloud-init", read_user_data),
    CloneOption("port", "[IP:]HOST:GUEST", "vmPorts", "ports of this host that lead to it; HOST counts up per VM"),
    CloneOption("share", "HOSTDIR:GUESTDIR[:rw]", "vmShares", "folders of this host; read-only without :rw"),
    CloneOption("gui", "", "vmGui", "with a screen"),
    CloneOption("cold", "", "vmCold", "it boots, though its template is frozen"),
    CloneOption("cap", "PERCENT", "vmCpuCap", "a limit of CPU time, in per cent of a processor"),
)  # fmt: skip
CLONE_OPTION = {option.name: option for option in CLONE_OPTIONS}


@record
class CloneRequest:
    """A set of equal clones: a line of a description file, or the command line's options."""

    origin: str  # FILE:LINE, '' for the command line
    template: str
    count: int
    type: str
    settings: dict[str, str]  # what their confs have instead of the template's
    disk: int = 0  # GB of the system disk; 0: as large as the template's
    disks: Sequence[int] = ()  # GB of the others
    user_data: bytes = b""
    prefix: str = ""  # of their names, or those, see full_names(); '': they are called by their UUIDs

    def set_options(self, text: str, folder: str = "") -> None:
        """CLONE_OPTIONS, in any order, separated by `;`.  Files are looked for in the folder.  Raises UsageError."""
        for word in text.split(";"):
            name, separator, value = map(str.strip, word.partition("="))
            if option := CLONE_OPTION.get(name):
                self._set_option(option, value if separator else None, folder)
            elif name:
                hint = f"options are {' '.join(each.text for each in CLONE_OPTIONS)}, separated by ';'"
                raise UsageError(f"unknown option {name!r}{did_you_mean(name, CLONE_OPTION, before=', ')}", hint)
        if (names := full_names(self.prefix)) and len({name.lower() for name in names}) != self.count:
            raise UsageError(f"name={self.prefix}: {plural(len(names), 'name')} for a COUNT of {self.count}")

    def _set_option(self, option: CloneOption, given: str | None, folder: str) -> None:
        value = given or ""
        if not option.metavar:
            if given is not None:
                raise UsageError(f"{option.name} takes no value")
            value = "yes"
        elif option.metavar == "FILE":
            value = os.path.join(folder, os.path.expanduser(value))
        elif option.sets == "vmShares":
            place = functools.partial(os.path.join, folder)
            value = re.sub("[^:,]+(?=:/)", lambda host: os.path.realpath(place(os.path.expanduser(host[0]))), value)
        setting = SETTING.get(option.sets)
        try:
            result = checked(setting.check if setting else option.check, value, value)
        except UsageError as error:
            raise UsageError(f"{option.name}={error}", error.hint) from None
        if setting:
            self.settings[option.sets] = str(result)
        else:
            setattr(self, option.sets, result)


def parse_description(text: str, name: str, default_type: str) -> list[CloneRequest]:
    """The lines of a description file, TEMPLATE:COUNT[:TYPE[:OPTIONS]].  Raises UsageError naming FILE:LINE."""
    requests = []
    for number, raw in enumerate(split_lines(text), 1):
        origin, line = f"{name}:{number}", raw.split("#", 1)[0].strip()
        if not line:
            continue
        try:
            template, *fields = (field.strip() for field in line.split(":", 3))
            if not fields or "\0" in line:
                raise UsageError(f"{line[:60]!r}: expected TEMPLATE:COUNT[:TYPE[:OPTIONS]], and no NUL in it")
            count, type, options = [*fields, "", ""][:3]
            checked_name("template", template)
            type = checked_name("type", type or default_type)
            requests.append(CloneRequest(origin, template, checked(CLONE_COUNT, count, f"COUNT {count!r}"), type, {}))
            requests[-1].set_options(options, os.path.dirname(name))
        except UsageError as error:
            raise UsageError(f"{origin}: {error}", error.hint) from None
    if not requests:
        raise UsageError(f"{name}: no VM is described in it", "a line is TEMPLATE:COUNT[:TYPE[:OPTIONS]]")
    return requests


def read_description(path: str, default_type: str, allow_share: str | None = None) -> list[CloneRequest]:
    """What a description file, of at most 1 MB, asks for; `-` is stdin.  A stranger's must not open one's home, so the
    folders that it shares are in its own one, or in `allow_share`."""
    name = "stdin" if path == "-" else path
    try:
        with open(0 if path == "-" else path, encoding=TEXT, closefd=path != "-") as file:
            requests = parse_description(file.read(MIB), name, default_type)
    except UnicodeDecodeError:
        raise UsageError(f"{name}: not a text file in UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "-f takes a description file") from None
    places = [*([] if path == "-" else [os.path.dirname(path) or "."]), *([allow_share] if allow_share else [])]
    for request in requests:
        for host, _, _ in parse_shares(request.settings.get("vmShares", "")):
            if not any(os.path.commonpath((host, place)) == place for place in map(os.path.realpath, places)):
                text = f"{request.origin}: share={host}: it is not below the file's own folder"
                raise UsageError(text, f"--allow-share {quoted(host)} allows it")
    return requests


def group_of_file(path: str) -> str:
    """A description file's name without its last extension is the group's name."""
    if path == "-":
        raise UsageError("which group? a description from stdin has no name", "give --group GROUP too")
    return checked_group(os.path.splitext(os.path.basename(path))[0])


@record
class NewClone:
    """A clone to be made."""

    vm: VM
    template: VM
    request: CloneRequest
    uuid: str
    format: str  # of the template's disk
    frozen: str  # the layer that it can wake up on, '' for none
    lock: FolderLock | None = None


CLONE_BYTES = 512 * 1024  # what an empty overlay, its keys and its logs take, rounded up


def check_requests(
    cloud: Cloud, group: str, requests: Sequence[CloneRequest], force: bool, freed: Sequence[int] = ()
) -> None:
    """All that can be known before the first VM is made; it names the FILE:LINE.  `freed`: ports of VMs that go."""
    checked_group(group)
    asked: list[tuple[str, int, str]] = []
    memory = images = 0
    for request in requests:
        try:
            template = cloud.tree.need_template(request.template)
            check_clonable(template)
            check_collision(cloud.tree, group, request.type)
            check_disk_size(template, request.disk)
            check_ports(cloud.tree, request, asked, freed)
            check_shares(cloud.config, template, request.settings.get("vmShares", ""))
            qemu = cloud.qemu(template.get("vmArch"))
            firmware_of(template, qemu.arch)
            if takes_seed(template):
                choose_seed(qemu)
                request.user_data = request.user_data or default_user_data()
            elif request.user_data:
                text = f"user-data=: {template.name} takes no seed, its vmInit is {template.get('vmInit')}"
                raise UsageError(text, "vmtemplate NAME --build SUITE --init cloud-init makes one")
            memory += request.count * int(request.settings.get("vmMem") or template.get("vmMem"))
            images += request.count * (1 + len(request.disks))
            total = memory_mb("MemTotal")
            if 0 < total < memory and not force:
                text = f"{memory} MB of memory are asked for up to here, the host has {total} MB"
                raise Error(text, "ask for less, or say --force")
            room, what = existing_parent(cloud.tree.base), f"{plural(images, 'image')} up to here take {{}} MB"
            check_room(room, images * CLONE_BYTES + MIB, cloud.tree.base, what, ROOM_HINT)
        except Error as error:
            error.text, error.vm = f"{request.origin}: {error}" if request.origin else str(error), None
            raise
    warn_of_memory(memory)


def check_clonable(template: VM) -> None:
    """Raise where the template runs on its own disk, or has no disk that can be read."""
    state, _ = template.state()
    if state == "running" and not runs_on_layer(template):
        raise WrongState("the template is running and can't be cloned", f"vmstop -n {template}", vm=template)
    if state == "unknown":
        raise WrongState(f"can't tell whether the template is running ({template.pid_file})", vm=template)
    if not (disks := template.disks()):
        raise Error("the template's conf names no disk", f"see vmDisk in {template.conf_file}", vm=template)
    known = template.get("vmDiskFormat").partition(",")[0]
    try:
        format = disk_format(disks[0]) if known else first_format(template, disks[0])
        bootable = known == "raw" or format == "qcow2" or looks_bootable(disks[0])
    except OSError as error:
        raise Error(f"its disk can't be read: {disks[0]}: {error.strerror}", vm=template) from None
    if not bootable or (known == "qcow2" and format == "raw"):
        text = f"its disk is not a {known or 'qcow2 or raw'} image: {disks[0]}"
        raise Error(text, "make it again: vmtemplate NAME --image FILE", vm=template)


def check_ports(tree: Tree, request: CloneRequest, asked: list[tuple[str, int, str]], freed: Sequence[int]) -> None:
    """Raise where a port is another VM's of the same description (`asked`: by whom), or isn't to be had now."""
    for number in range(request.count):
        for ip, host, _ in parse_ports(numbered_ports(request.settings.get("vmPorts", ""), number)):
            if others := [who for at, its, who in asked if host and host == its and clash(ip, at)]:
                raise UsageError(f"port={host}: {others[0]} asks for port {host} of {ip} too")
            asked.append((ip, host, request.origin or "another of the VMs"))
            if host not in freed:
                listen(tree, ip, host).close()


def check_disk_size(template: VM, gigabytes: int) -> None:
    """Raise UsageError where a clone's system disk would be smaller than the template's (0: as large)."""
    if not gigabytes:
        return
    disk = template.disks()[0]
    known = template.get("vmDiskFormat").partition(",")[0]
    size = image_info(disk, known or first_format(template, disk))["virtual-size"]
    if gigabytes * GIB < size:
        text = f"disk={gigabytes}: the disk of {template.name} has {size / GIB:g} GB, and a clone's is never smaller"
        raise UsageError(text, "disk=GB makes the system disk larger, dsk=GB,GB adds disks")


def check_collision(tree: Tree, group: str, type: str) -> None:
    """Ansible knows groups by GROUP, GROUP_TYPE and type_TYPE: two things must not get one name."""
    known = {f"{each}_{kind}": f"{each}/{kind}" for each in tree.groups() for kind in tree.types(each)}
    known.update({each: each for each in tree.groups() if each not in known})
    if f"{group}_".startswith("type_"):
        known.setdefault(group, "type_TYPE, the VMs of a type in all groups")
    for name, what in ((f"{group}_{type}", f"{group}/{type}"), (group, group)):
        if known.get(name, what) != what:
            both = "" if name == what else f": both are {name}"
            raise UsageError(f"{what}: ansible would mix it up with {known[name]}{both}", "choose another name")


def memory_mb(kind: str) -> int:
    """The host's memory in MB: all of it (`MemTotal`) or `MemAvailable`; 0 where /proc/meminfo doesn't say."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", read_text("/proc/meminfo"), re.M)
    return int(found.group(1)) // 1024 if found else 0


def warn_of_memory(asked: int) -> None:
    """Say so where it is more than what is available now."""
    if (available := memory_mb("MemAvailable")) and asked > available:
        report.warn(f"{asked} MB of memory are asked for, {available} MB are available now")


def reserve(cloud: Cloud, group: str, requests: Sequence[CloneRequest], clones: list[NewClone]) -> list[str]:
    """Allot names, UUIDs, MACs and addresses under the tree's lock, each held by a conf in a locked folder, .new-NAME;
    `clones` has it as soon as there is something to clean up.  Returns the UUIDs of VMs that are gone, yet known."""
    tree = cloud.tree
    with tree.lock():
        for each in {group, *tree.groups()}:
            sweep(tree, each)
            remove_if_empty(tree, each)  # an export's, killed
        kind = group_network(cloud, group)
        taken = Taken(tree)
        names = {vm.name.lower() for vm in taken.vms if vm.group == group}
        known = taken.uuids | {vm.get("vmUuid") for vm in tree.templates() if vm.is_readable()}
        orphans = [uuid for each in cloud.networks.values() for uuid in each.hosts.orphans(known) if taken.complete]
        taken.addresses |= cloud.private.hosts.addresses()
        for request in requests:
            check_collision(tree, group, request.type)  # again, now that nobody else can make one
            template = tree.need_template(request.template) if request.template else tree.template("")
            if not request.template:  # it comes from elsewhere
                template._conf = {}
            format = "".join(known_formats(template)[:1])
            # None of someone else's template, whose lock isn't ours to take
            layer = frozen_layer(template) if request.template and os.access(template.folder, os.W_OK) else None
            frozen = layer.name if layer else ""
            for number, name in enumerate(next_names(names, request)):
                uuid, mac = (request.settings.get(key, "") for key in ("vmUuid", "vmMac"))
                if uuid and (uuid in taken.uuids or mac in taken.macs):
                    raise WrongState(f"{name}: it is in this tree already", "without its keys it would be another one")
                uuid, mac = (uuid, mac) if uuid else new_identity(taken.macs)
                taken.uuids, taken.macs = taken.uuids | {uuid}, taken.macs | {mac}
                clone = NewClone(VM(tree, group, request.type, name or uuid), template, request, uuid, format, frozen)
                clones.append(clone)
                address = cloud.networks[kind].allot(taken.addresses, uuid)
                ports = numbered_ports(request.settings.get("vmPorts", ""), number)
                own = {"vmUuid": uuid, "vmNetwork": kind, "vmMac": mac, "vmAddress": address}
                own["vmLayout"] = LAYOUT if request.settings.get("vmArch", template.get("vmArch")) == "x86_64" else "1"
                own.update({"vmPorts": ports} if ports else {})
                vm = clone.vm
                os.makedirs(os.path.dirname(vm.folder), exist_ok=True)
                vm.folder = os.path.join(os.path.dirname(vm.folder), MAKING + vm.name)
                os.mkdir(vm.folder, 0o700)
                clone.lock = FolderLock(vm.folder, wait=0).__enter__()
                fixed = {key: template.get(key) for key in ("vmMem", "vmCpu", "vmUser")}  # whatever is configured later
                settings = {"vmName": vm.name, "vmInit": "auto", **fixed, **template.inherited(), **request.settings}
                vm.write_conf({**settings, "vmDisk": "", "vmExtraDisk": "", **own, "vmTemplate": template.name})
    return orphans


class Taken:
    """The names, MACs and addresses that are in use in a tree, by finished and unfinished VMs."""

    def __init__(self, tree: Tree) -> None:
        self.vms = [*tree.unfinished(), *tree.vms()]  # in this order: one may be finished between the looks
        self.uuids: set[str] = set()
        self.macs: set[str] = set()
        self.addresses: set[str] = set()
        self.complete = True  # False: a VM whose conf can't be used has a name and an address, too
        for vm in self.vms:
            try:
                self.uuids |= {vm.get("vmUuid"), vm.get("vmUuid").lower()}
                self.macs.add((vm.get("vmMac") or mac_of_uuid(vm.get("vmUuid"))).lower())
                self.addresses.add(vm.get("vmAddress"))
            except NotFound:
                continue  # it has just been finished, or destroyed
            except Error as error:
                self.complete = False
                report.warn(str(error))


def group_network(cloud: Cloud, group: str) -> str:
    """All VMs of a group share a network: that of the VMs it has, or for a new group what is configured now."""
    kinds = (vm.conf.get("vmNetwork") for vm in cloud.tree.vms(group) if vm.is_readable())  # what was made, no default
    kind = next((kind for kind in kinds if kind in ("bridge", "private")), cloud.config["vmNetwork"])
    return cloud.chosen_network(kind)


def next_names(names: set[str], request: CloneRequest) -> list[str]:
    """The next names of a prefix: two digits from 00 (100 after 99), after the highest there is; '' for a UUID."""
    if not request.prefix:
        return [""] * request.count
    found = full_names(request.prefix)
    if clash := [name for name in found if name.lower() in names]:
        raise UsageError(f"name={clash[0]}: there is such a VM in the group", "choose another name")
    if not found:
        first = max((number_of(request.prefix, name) for name in names), default=-1) + 1
        found = [f"{request.prefix}{number:02d}" for number in range(first, first + request.count)]
    checked_name("VM", found[-1])
    names.update(name.lower() for name in found)
    return found


def number_of(prefix: str, name: str) -> int:
    """The number in a name that is this prefix and a number, whatever the case; -1 in another one."""
    found = re.fullmatch(re.escape(prefix) + "([0-9]{2,})", name, re.IGNORECASE | re.ASCII)
    return int(found[1]) if found else -1


def finish_clones(cloud: Cloud, clones: Sequence[NewClone], whole: bool = False) -> list[VM | Error]:
    """Make them, then put them in their places: from then on they are VMs; or Errors, where they couldn't be made.
    `whole`: that is raised, before any is in its place."""
    of = {clone.vm: clone for clone in clones}

    def place(vm: VM) -> VM:
        final = VM(vm.tree, vm.group, vm.type, vm.name)
        os.rename(vm.folder, final.folder)
        return final

    made = in_parallel(lambda vm: make_clone(cloud, of[vm]), list(of), workers=2 * (os.cpu_count() or 1))
    flush(cloud.tree.base)  # once for all of them
    raise_first(made if whole else ())
    made = [each if isinstance(each, Error) else result_of(place, each) for each in made]
    flush(cloud.tree.base)
    return made


def make_clone(cloud: Cloud, clone: NewClone) -> VM:
    """Make its disks and keys."""
    vm, template, request = clone.vm, clone.template, clone.request
    disk = os.path.realpath(template.disks()[0]) if request.template else ""  # what has come from elsewhere has them
    system, *extra = (vm.disk_name(n, cloud.config["vmDiskExt"]) for n in range(1 + len(request.disks)))
    if disk:
        create_overlay(vm.file(system), disk, clone.format, request.disk)
        for name, size in zip(extra, request.disks):
            create_disk(vm.file(name), size)
    if (is_planted(vm) or takes_seed(vm)) and not os.path.exists(vm.host_key):  # with `auto` nothing may take it
        make_key(vm.host_key, f"root@{vm.name}")
    if request.user_data:
        write_file(vm.user_data_file, request.user_data, durable=False)
    if os.path.exists(template.variables_file):  # what boots
        copy_variables(template.variables_file, "qcow2", vm.variables_file)
    formats = ",".join(["qcow2"] * (1 + len(extra)))
    disks = {"vmDisk": vm.relative(system), "vmExtraDisk": ",".join(map(vm.relative, extra)), "vmDiskFormat": formats}
    late = "a disk is grown" if request.disk else "folders are shared" if vm.get("vmShares") else ""
    if clone.frozen and vm.get("vmCold") == "no":
        if late:
            report.say(f"{report.program}: {vm} boots: {late} at boot only")
        else:
            write_file(vm.frozen_file, clone.frozen, durable=False)
            disks["vmBalloon"] = "no"
    vm.write_conf(disks)
    if disk and not os.path.exists(disk):  # someone else's template may go though it is cloned
        raise Error(f"its disk has just gone: {disk}", "ask the template's owner for it", vm=template)
    return vm


def make_clones(cloud: Cloud, group: str, requests: Sequence[CloneRequest]) -> list[VM | Error]:
    """Make the clones that are asked for, in parallel; what could not be made is an Error in its place."""
    with making(cloud, group, requests) as clones:
        return finish_clones(cloud, clones)


@contextlib.contextmanager
def making(cloud: Cloud, group: str, requests: Sequence[CloneRequest]) -> Iterator[list[NewClone]]:
    """The clones that are asked for, to be made; those that haven't been finished in the end are removed."""
    cloud.tree.prepare()
    templates = [cloud.tree.need_template(name) for name in sorted({request.template for request in requests} - {""})]
    settle_stopped(cloud, templates)
    clones: list[NewClone] = []
    with contextlib.ExitStack() as stack:
        for template in templates:
            if os.access(template.folder, os.W_OK):  # else it is someone else's, whose lock isn't ours to take
                stack.enter_context(FolderLock(template.folder, shared=True))
            template.reread()
            check_clonable(template)
            set_writable(template.disks()[0], False)
        own_key()
        try:
            orphans = reserve(cloud, group, requests, clones)
            yield clones
        finally:
            failed = [clone for clone in clones if not clone.lock or os.path.isdir(clone.vm.folder)]
            for clone in clones:
                if clone.lock:  # before it is taken, vm.folder may still be the final one
                    if clone in failed:
                        remove_tree(clone.vm.folder)
                    clone.lock.release()
            cloud.bridge.withdraw([clone.uuid for clone in failed])  # an address was held for each
            with cloud.tree.lock():
                remove_if_empty(cloud.tree, group)
    if orphans:  # not under those locks: who starts a template takes the network's first
        forget_identity(cloud, orphans)


def publish_keys(cloud: Cloud, vms: Sequence[VM]) -> None:
    """Make these VMs known to ssh: the host keys that are planted, and their names."""
    lines = {vm.get("vmUuid"): (vm.get("vmAddress"), read_text(vm.host_key + ".pub")) for vm in vms if is_planted(vm)}
    if lines:
        cloud.known_hosts.update(lines)
    SshConfig(cloud).refresh()


def forget_identity(cloud: Cloud, uuids: Sequence[str]) -> None:
    """Take VMs that are gone out of what is known of them outside their folders."""
    for network in cloud.networks.values():
        network.withdraw(uuids)
    cloud.known_hosts.update({}, uuids)
    SshConfig(cloud).refresh()


# Stopping and destroying #############################################################################
#
# The power button, the plug, and what goes with a VM.  A template is stopped with care: see the work in its guest.


def stop_locked(vm: VM, seconds: float) -> bool:
    """What `stop` does, for who holds the VM's lock."""
    state, pid = vm.state()
    if state == "unknown":
        raise WrongState(f"can't tell whether it runs: {vm.pid_file}", "stop it as the user who started it", vm=vm)
    proper = True
    if state == "running":
        with Process(pid) as process:
            if vm.state() == ("running", pid):  # the pidfd is of the process that holds the lock
                proper = seconds > 0 and press_power_button(vm, process, seconds)
                if not proper:
                    pull_the_plug(vm, process)
    remove_runtime_files(vm)
    return proper


def press_power_button(vm: VM, process: Process, seconds: float) -> bool:
    """Whether the guest shut down in time.  The button is pressed every 3 s: a guest that is booting misses it.
    Raises WrongState where a full disk has paused it: the plug would cost it what it couldn't write."""
    if (state := wake(vm, resume=True)) in (DISK_FULL, DISK_ERROR):
        raise WrongState(f"it is {state}", f"{remedy(vm, state)}; --kill switches it off as it is", vm=vm)
    if state in DEAD or os.path.exists(vm.frozen_file):  # whose lock is ours
        return False
    deadline, said = time.monotonic() + seconds, False
    while (left := deadline - time.monotonic()) > 0:
        ask_qemu(vm, "system_powerdown")
        if process.ended(min(3.0, left)):
            return True
        if not said and left > 3.0:
            report.say(f"{report.program}: waiting for {vm} to shut down, for up to {seconds:.0f} s")
        said = True
    return False


def pull_the_plug(vm: VM, process: Process) -> None:
    """End qemu: `quit` (it flushes its disks), then SIGTERM, then SIGKILL."""
    ask_qemu(vm, "quit", 2.0)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.ended(2.0):
            return
        process.signal(number)
    if not process.ended(10.0):
        raise Error(f"qemu, process {process.pid}, doesn't end", vm=vm)


def wake(vm: VM, resume: bool = False) -> str:
    """Its state, after a guest that a full disk paused, or with `resume` anyone, was told to go on."""
    state = guest_state(vm)
    if (state == "inmigrate" or (state == "paused" and os.path.exists(vm.still_file))) and not resume:
        result_of(release_still, vm)
        state = guest_state(vm)
    if state == DISK_FULL and free_bytes(vm.folder) < MIB:
        return state  # it would stop again, perhaps only when we have looked
    if state in (DISK_FULL, DISK_ERROR, "paused" if resume else ""):
        remove_file(vm.saved_file)  # by a command that was killed before it switched the guest off: it is old now
        ask_qemu(vm, "cont")  # it may be in that state for another reason: the state tells
        wait_for(lambda: guest_state(vm) != "running", 0.5, 0.1)  # what couldn't be written is tried again
        state = guest_state(vm)
    return state


def release_still(vm: VM) -> None:
    """Have a guest go on that a command which was killed had stand still; not while one is at work on it."""
    with FolderLock(vm.folder, wait=0):
        if not end_half_start(vm):
            with QMP(vm.folder) as qemu:
                go_on_after_kill(vm, qemu)


def end_half_start(vm: VM) -> bool:
    """End a qemu that was to load saved memory when its command was killed; whether there was one.  Under the lock."""
    if half := guest_state(vm) == "inmigrate":
        stop_locked(vm, 0)
    adopt_kept(vm)
    return half


def kept_for(vm: VM, disk: str) -> str:
    """The folder of what a VM is to go on with once its conf names a disk: memory, and what its firmware keeps."""
    return vm.file(f"{MAKING}kept-{os.path.basename(disk)}-")


def adopt_kept(vm: VM) -> None:
    """Have a VM that was rolled back go on with what goes with its disk, and with nothing else."""
    for folder in [vm.file(name) for name in names_in(vm.folder) if name.startswith(f"{MAKING}kept-")]:
        for name in names_in(folder) if folder == kept_for(vm, vm.disks()[0]) else ():
            if os.path.isdir(vm.file(name)):
                remove_tree(vm.file(name))
            os.replace(os.path.join(folder, name), vm.file(name))
        remove_tree(folder)  # where it isn't empty, who made it was killed before the conf was written


def go_on_after_kill(vm: VM, qemu: QMP) -> None:
    """The same, for who holds the VM's lock.  What memory had been saved by then is none to go on with any more."""
    if os.path.exists(vm.still_file):
        remove_file(vm.saved_file)
        qemu.execute("cont")
        remove_file(vm.still_file)


def need_awake(vm: VM) -> None:
    """wake(), raising WrongState for a guest that does nothing, and won't by itself."""
    if (state := wake(vm)) not in (*AT_WORK, SHARE_LOST):
        raise WrongState(f"it is {state}", remedy(vm, state), vm=vm)


def remedy(vm: VM, state: str) -> str:
    """The command that gets a guest out of a state."""
    if state in DEAD:
        return f"vmstop --kill -n {vm}"
    if state == SHARE_LOST:
        return f"vmstop -n {vm}  # and start it again; {vm.log_file} may tell why"
    room = f"  # once there is room in {vm.folder}" if state == DISK_FULL else ""
    return (f"vmmanage -n {vm} system_wakeup" if state == "suspended" else f"vmresume -n {vm}") + room


def destroy(cloud: Cloud, vm: VM) -> None:
    """Switch a VM off at once and remove its folder, and nothing else; never through a symlink."""
    if not os.path.lexists(vm.folder):
        return  # another command was faster
    for folder in (vm.folder, os.path.dirname(vm.folder), os.path.dirname(os.path.dirname(vm.folder))):
        if os.path.islink(folder) and folder != cloud.tree.base:
            raise Error(f"{folder} is a symlink: nothing behind it is removed", "remove it yourself", vm=vm)
    if vm.is_template or not vm.exists():
        raise WrongState(f"{vm.folder}: that is no clone")
    try:
        with FolderLock(vm.folder):
            stop_locked(vm, 0)
            remove_vm(vm)
    except FileNotFoundError:
        if os.path.lexists(vm.folder):
            raise


def destroy_all(cloud: Cloud, vms: Sequence[VM], group: str = "") -> list[Error]:
    """Destroy VMs in parallel, what is known of them elsewhere, what killed commands left in `group`; the errors."""
    uuids = {vm: vm.get("vmUuid") for vm in vms if vm.is_readable()}
    if not vms and not os.path.isdir(cloud.tree.base):
        return []
    cloud.private.used = True
    results = in_parallel(lambda vm: destroy(cloud, vm), vms)
    forget = [uuids[vm] for vm, result in zip(vms, results) if uuids.get(vm) and not isinstance(result, Error)]
    with cloud.tree.lock():
        for each in {vm.group for vm in vms} | ({group} & set(cloud.tree.groups())):
            sweep(cloud.tree, each)
            remove_if_empty(cloud.tree, each)
    # After what mustn't be left: this may fail, on a full disk say.
    results.append(result_of(lambda _: forget_identity(cloud, forget), None))
    settle_stopped(cloud, cloud.tree.templates(), wait=0)  # the last clone on an old layer is gone, perhaps
    return [result for result in results if isinstance(result, Error)]


SHUTDOWN_SECONDS = 120  # what is to be kept has more time than vmstop gives a VM


# Starting ############################################################################################
#
# From a conf to a qemu that answers, with a guest that boots, or goes on where it was saved, or its template frozen.


def start(cloud: Cloud, vm: VM, iso: str = "", gui: bool = False) -> None:
    """Start a VM, by who holds its lock, on a network that is up; its qemu answers when this returns.  `iso`: boot from
    this image; `gui`: with a screen, this time.  Raises WrongState where it runs, Error with qemu's own words."""
    end_half_start(vm)
    state, _ = vm.state()
    if state == "running":
        raise WrongState("it is running already", vm=vm)
    if state == "unknown":
        raise WrongState(f"can't tell whether it runs: {vm.pid_file}", "look as the user who started it", vm=vm)
    layer = None
    if vm.is_template:
        settle(cloud, vm)
        if stands := "has clones" if cloud.tree.clones(vm) else "is frozen" if frozen_layer(vm) else "":
            layer = new_layer(vm)
        else:
            for disk in vm.disks():
                set_writable(disk, True)  # cloning made it read-only
    try:
        if not (go_on(cloud, vm, iso, gui) or thaw(cloud, vm, iso, gui)):
            if vm.get("vmPlugged") != "0":
                vm.write_conf({"vmPlugged": "0"})
            start_locked(cloud, vm, describe_machine(cloud, vm, iso, gui, layer))
        if layer:
            layer.arm()
            report.say(f"{report.program}: {vm} {stands}: what changes becomes a new layer when it shuts down")
    except BaseException:
        if layer:
            stop_locked(vm, 0)
            layer.remove()
        raise


def start_locked(cloud: Cloud, vm: VM, machine: Machine, tied: bool = False) -> None:
    """Start the qemu of a VM that is stopped, by who holds its lock.  `tied`: it ends when this process does."""
    remove_runtime_files(vm)
    network, forwarder = cloud.network_of(vm), cloud.forwarders[cloud.network_kind(vm)]
    with contextlib.ExitStack() as stack:
        listeners = forwarder.open(stack, parse_ports(vm.get("vmPorts")))
        tap, vhost = network.tap(vm)
        for fd in (tap, vhost):
            if fd >= 0:
                stack.callback(os.close, fd)
        network.publish(vm)
        remove_file(vm.log_file)  # the daemons begin it
        shares = serve_shares(cloud.config, vm, stack)
        machine = machine.but(tpm=serve_tpm(vm, stack))
        launch(vm, machine, network, tap, vhost, shares, tied)
        forwarder.serve(vm, listeners)


def serve_tpm(vm: VM, stack: Any) -> int:
    """Start a VM's swtpm(8), which ends with its connection; qemu's end, which the ExitStack closes; -1: no TPM."""
    if yes_no(vm.get("vmTpm")) == "no":
        return -1
    make_private_folder(vm.tpm_folder)
    ours, its = map(stack.enter_context, socket.socketpair())
    place = f"dir={os.path.relpath(vm.tpm_folder, vm.folder)},mode=0600"
    control = f"type=unixio,clientfd={its.fileno()}"
    words = ["swtpm", "socket", "--tpm2", "--tpmstate", place, "--ctrl", control, "--terminate"]
    spawn(words, log=vm.log_file, cwd=vm.folder, pass_fds=[its.fileno()])
    its.close()
    return int(ours.fileno())


def ensure_identity(cloud: Cloud, vm: VM) -> None:
    """A VM that bash made may have no UUID, MAC or address: they are made now, and kept; as is a port that is free."""
    kind = cloud.chosen_network(vm.get("vmNetwork"))
    fits, ports = cloud.networks[kind].fits(vm.get("vmAddress")), parse_ports(vm.get("vmPorts"))
    chosen = all(host for _, host, _ in ports)
    if fits and chosen and vm.get("vmUuid") and vm.get("vmMac") and vm.conf.get("vmNetwork") == kind:
        return
    with cloud.tree.lock():
        taken = Taken(cloud.tree)
        uuid = vm.get("vmUuid") or new_identity(taken.macs)[0]
        changes = {"vmUuid": uuid, "vmMac": vm.get("vmMac") or mac_of_uuid(uuid), "vmNetwork": kind}
        if not chosen:
            changes["vmPorts"] = join_ports(free_ports(cloud.tree, ports))
        if not fits:
            changes["vmAddress"] = cloud.networks[kind].allot(taken.addresses, uuid)
        vm.write_conf({key: value for key, value in changes.items() if value != vm.conf.get(key)})
    if not fits and os.path.exists(vm.host_key + ".pub"):  # planted, and the address was another one
        publish_keys(cloud, [vm])


def give_identity(cloud: Cloud, vm: VM) -> None:
    """What a VM needs before its first start, for who holds its lock."""
    ensure_identity(cloud, vm)
    if (is_planted(vm) or takes_seed(vm)) and not os.path.exists(vm.host_key):
        make_key(vm.host_key, f"root@{vm.name}")
    publish_keys(cloud, [vm])


def describe_machine(cloud: Cloud, vm: VM, iso: str = "", gui: bool = False, layer: Layer | None = None) -> Machine:
    """What qemu's command line is built from, on a layer or its own disk; writes what it hands over, or lacked."""
    ensure_identity(cloud, vm)
    paths = [layer.path, *vm.disks()[1:]] if layer else vm.disks()
    for path in paths:
        if not os.path.exists(path):
            raise Error(f"its disk is gone: {path}", f"see vmDisk and vmExtraDisk in {vm.conf_file}", vm=vm)
    formats = ["qcow2", *known_formats(vm)[1:]] if layer else known_formats(vm)
    named = enumerate(zip(paths, formats))
    disks = [(os.path.relpath(path, vm.folder), format, f"{vm.name}_{n}") for n, (path, format) in named]
    with Parsing(UsageError, f"vmExtraOpts: a quotation mark or a backslash without its end: {vm.get('vmExtraOpts')}"):
        extra = shlex.split(vm.get("vmExtraOpts"))
    if planted := is_planted(vm) and os.path.exists(vm.host_key):
        write_file(vm.credentials_file, credentials(vm, login_keys()), durable=False)
    has_screen = gui or yes_no(vm.get("vmGui")) == "yes"
    qemu = cloud.qemu(vm.get("vmArch"))
    if (firmware := firmware_of(vm, qemu.arch)) and not os.path.exists(vm.variables_file):
        copy_variables(*firmware.variables, vm.variables_file)
    return Machine(
        qemu=qemu, accel=cloud.accel(vm.get("vmAccel"), qemu.arch), name=vm.name, settings=vm.settings(), disks=disks,
        pid_file=os.path.basename(vm.pid_file), credentials=os.path.basename(vm.credentials_file) if planted else "",
        seed=write_seed(cloud, vm, takes_seed(vm) and not iso),  # an installer would take it for its users' answers
        extra=extra, iso=iso, screen=cloud.screen(qemu.arch) if has_screen else "",
        record=os.path.basename(layer.record) if layer else "", firmware=firmware,
        variables=os.path.relpath(vm.variables_file, vm.folder),
    )  # fmt: skip


def write_seed(cloud: Cloud, vm: VM, wanted: bool) -> str:
    """Write the seed anew for this start; its folder or image, relative to the VM's; '' where there is none to be."""
    remove_tree(vm.seed_folder)
    if not wanted or not os.path.exists(vm.host_key):
        return ""
    added = b""
    if os.path.exists(vm.user_data_file):
        with open(vm.user_data_file, "rb") as file:
            added = file.read()
    make_private_folder(vm.seed_folder)
    files = {os.path.join(vm.seed_folder, name): data for name, data in seed_files(vm, login_keys(), added).items()}
    for path, data in files.items():
        write_file(path, data, durable=False)
    folder = os.path.basename(vm.seed_folder)
    if choose_seed(cloud.qemu(vm.get("vmArch"))) == "vvfat":
        return folder
    image = os.path.join(vm.seed_folder, SEED_ISO)
    # Rock Ridge and Joliet keep the names in lower case.
    run([*find_iso_writer(), "-quiet", "-output", image, "-volid", "cidata", "-joliet", "-rock", *files])
    os.chmod(image, 0o600)
    return os.path.join(folder, SEED_ISO)


NO_LIMIT = "systemd gives it no scope with a CPU quota here, and you may make no cgroup that limits processor time"
CONSOLE_BYTES, CONSOLE_SECONDS = 24 * MIB, "20"  # how long console.log may get, and how often that is looked at


def launch(vm: VM, machine: Machine, network: Network, tap: int, vhost: int, shares: list[int], tied: bool) -> None:
    """Start qemu in the VM's folder and its network; done when its pidfile is locked and QMP answers."""
    if tied:
        need_program(TIE[0])
    words, cap = qemu_argv(machine, tap, vhost, shares), int(vm.get("vmCpuCap") or 0)
    words, fds = network.enter(tie(words) if tied else words)
    script = command_script(vm, qemu_argv(machine.but(memory="", wakes=False, below=(), tpm=-1), 3), network)
    write_file(vm.command_file, script, 0o700, durable=False)
    for path in (vm.console_log, vm.old_console_log):
        remove_file(path)
    with open(os.open(vm.console_log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as console:
        fcntl.flock(console, fcntl.LOCK_EX)  # qemu's from now on: that tells what bounds the log whether it runs
        # A template's folder may be entered by others, and who may write to a socket of qemu's owns the guest.
        kept = [fd for fd in (*fds, tap, vhost, machine.tpm, *shares, console.fileno()) if fd >= 0]
        process = spawn([*scope_words(cap), *words], log=vm.log_file, cwd=vm.folder, pass_fds=kept, umask=0o077)
    try:
        bound = ["sh", "-c", "\n".join(packaged_list("console.sh")), "sh", str(CONSOLE_BYTES), CONSOLE_SECONDS]
        spawn(bound, log=os.devnull, cwd=vm.folder, umask=0o077)
        if not wait_for(lambda: process.poll() is not None or answers(vm, process.pid), 30, 0.05):
            raise TimedOut("qemu did not answer within 30 s", f"see {vm.log_file}", vm=vm)
        if process.returncode is not None:
            said = read_tail(vm.log_file)
            said = said.partition("\n")[0] if shares or machine.tpm >= 0 else said  # what a daemon said is the cause
            raise Error(f"qemu did not start: {last_line(said)}", f"see {vm.log_file}", vm=vm)
        if cap and not limit_process(process.pid, cap, cgroup_name(vm)):
            report.warn(f"{vm}: vmCpuCap={cap} is not enforced: {NO_LIMIT}")
    except BaseException:
        process.kill()
        process.wait()
        remove_runtime_files(vm)
        raise


def answers(vm: VM, pid: int) -> bool:
    """Whether the qemu that we started holds its pidfile and answers over QMP.  Raises QMPError where it refuses."""
    with contextlib.suppress(QMPClosed, TimedOut, OSError), QMP(vm.folder) as qemu:
        return vm.state() == ("running", pid) and bool(qemu.execute("query-status"))
    return False


def write_memory(qemu: QMP, path: str) -> None:
    """Write the memory and the devices of a guest that stands still to a new file, which is there only when whole."""
    part = path + ".part"
    remove_file(part)
    qemu.allow(3600)
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            migrate(qemu, file.fileno(), shared=False)
        land({part: path})
        os.utime(path)
    except BaseException:
        remove_file(part)
        raise


def migrate(qemu: QMP, fd: int, shared: bool) -> None:
    """Write a guest's devices, and its memory where that isn't shared, to a descriptor."""
    prepare_migration(qemu, fd, shared)
    qemu.execute("migrate", uri="fd:state")
    wait_for(lambda: qemu.execute("query-migrate")["status"] in ("completed", "failed"), 3600, 0.05)
    if (answer := qemu.execute("query-migrate"))["status"] != "completed":
        raise Error(f"qemu could not write the guest's state: {answer.get('error-desc', 'it takes too long')}")


def prepare_migration(qemu: QMP, fd: int, shared: bool) -> None:
    """Have a qemu write to, or read from, a descriptor as fast as it goes; `shared`: memory in a shared file stays.
    The network card is announced once, at once, when a frozen guest's has no link.  Never can't be asked for: qemu 7.2
    has no timer for that then, and crashes when the guest resets the card (hw/net/virtio-net.c, virtio_net_reset)."""
    qemu.execute("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": shared}])
    qemu.execute("migrate-set-parameters", announce_rounds=1, max_bandwidth=1 << 40)
    qemu.give(fd, "state")


def load_memory(qemu: QMP, path: str, shared: bool) -> None:
    """Load what `migrate` wrote; the guest stands still then."""
    with open(path, "rb") as file:
        prepare_migration(qemu, file.fileno(), shared)
        qemu.execute("migrate-incoming", uri="fd:state")
        if not wait_for(lambda: qemu.execute("query-status")["status"] != "inmigrate", 600, 0.01):
            raise TimedOut("qemu: the guest's state isn't loaded")


def save(vm: VM) -> None:
    """Keep a guest's memory on disk and switch it off: its next start goes on there."""
    need_awake(vm)
    with FolderLock(vm.folder):
        state, pid = vm.state()
        if state != "running":
            raise WrongState(f"it is {state}, there is nothing to save", vm=vm)
        if vm.is_template or foreign_qemu(vm) or vm.get("vmShares") or os.path.exists(vm.frozen_file):
            why = "a template, with shared folders, not quite awake, or started by the bash tools"
            raise WrongState(f"it can't be saved: {why}", f"vmstop -n {vm} shuts it down", vm=vm)
        check_room(vm.folder, (vm.number("vmMem") + 64) * MIB, vm.base, "its memory takes up to {} MB", ROOM_HINT)
        if screen_of(vm):  # which it may have had for this time only
            vm.write_conf({"vmGui": "yes"})
        with Process(pid) as process, QMP(vm.folder) as qemu, stand_still([(vm, qemu)]):
            write_memory(qemu, vm.saved_file)
            qemu.close()  # it serves one client at a time
            pull_the_plug(vm, process)
        for path in (*vm.disks(), vm.saved_file):
            os.utime(path)  # the clock may have gone back since a disk was written to
        remove_runtime_files(vm)


@contextlib.contextmanager
def stand_still(guests: Iterable[tuple[VM, QMP]]) -> Iterator[None]:
    """Guests, those of them that are at work, stand still as long as the `with`; wake() mends what a kill leaves."""
    stopped: list[tuple[VM, QMP]] = []
    try:
        for vm, qemu in guests:
            if qemu.execute("query-status")["status"] == "running":
                stopped.append((vm, qemu))
                write_file(vm.still_file, "", durable=False)
                qemu.execute("stop")
        yield
    finally:
        for vm, qemu in stopped:
            qemu.allow(5)
            if not isinstance(result_of(lambda qemu: qemu.execute("cont"), qemu), Error):
                remove_file(vm.still_file)


def last_words(vm: VM, error: BaseException) -> str:
    """Why memory wasn't loaded: an error's text, but where qemu ended what that wrote last."""
    said = last_line(read_tail(vm.log_file)) if isinstance(error, QMPClosed) else ""
    return said or str(getattr(error, "text", error))


def saved_is_current(vm: VM) -> bool:
    """Whether there is memory that was saved, and no disk has been written to since."""
    saved = os.path.exists(vm.saved_file) and os.stat(vm.saved_file).st_mtime_ns
    return bool(saved) and all(os.stat(disk).st_mtime_ns <= saved for disk in vm.disks())


def go_on(cloud: Cloud, vm: VM, iso: str, gui: bool) -> bool:
    """Start a VM where it was saved, and forget that when it goes on; False where it wasn't.  By who holds its lock."""
    if not os.path.exists(vm.saved_file):
        return False
    hint = f"vmstop --discard -n {vm} forgets its saved memory: it boots then, as after a power cut"
    if not saved_is_current(vm):
        raise WrongState("its disks have changed since its memory was saved", hint, vm=vm)
    start_locked(cloud, vm, describe_machine(cloud, vm, iso, gui).but(wakes=True))
    try:
        with QMP(vm.folder, 600) as qemu:
            write_file(vm.still_file, "", durable=False)
            load_memory(qemu, vm.saved_file, shared=False)
            write_file(vm.late_file, "", durable=False)
            remove_file(vm.saved_file)
            sync(vm.folder)  # before it goes on: never from there twice
            qemu.execute("cont")
            remove_file(vm.still_file)
    except BaseException as error:
        why = last_words(vm, error)
        stop_locked(vm, 0)
        if isinstance(error, Error):
            raise Error(f"it can't go on where it was saved: {why}", hint, vm=vm) from None
        raise
    return True


WAKE_SECONDS = 60  # emulated guests that wake up together take their time


def thaw(cloud: Cloud, vm: VM, iso: str = "", gui: bool = False) -> bool:
    """Have a clone go on where its template was frozen, by who holds its lock; False where it has to boot, having said
    why.  Until its guest says that it is this VM the frozen file stays: who finds that begins anew, on a new disk."""
    if not (name := read_existing(vm.frozen_file)):
        return False
    template, began = cloud.tree.template(vm.get("vmTemplate")), time.monotonic()
    layer = Layer(template, name)
    memory = os.path.relpath(layer.memory, vm.folder)
    try:
        renew_disk(vm, layer.path, "qcow2")
        whole = describe_machine(cloud, vm, iso, gui)
        chain = [vm.disks()[0], *backing_chain(vm.disks()[0], "qcow2", lambda path: True)]
        below = [(path, header.format) for above, path in zip(chain, chain[1:]) if (header := qcow2_header(above))]
        machine, others = whole.but(disks=whole.disks[:1], memory=memory, wakes=True, below=below), whole.disks[1:]
        token = check_frozen(layer, machine)
        if len(others) > HOTPLUG_PORTS:
            raise Error(f"{len(others)} disks besides, and not at most {HOTPLUG_PORTS}, can be plugged in")
        start_locked(cloud, vm, machine)
        with QMP(vm.folder, WAKE_SECONDS) as qemu:
            load_memory(qemu, layer.state, shared=True)
            qemu.execute("cont")
            for number, disk in enumerate(others):
                plug_disk(qemu, number + 1, number, *disk)
        if others:
            vm.write_conf({"vmPlugged": str(len(others))})
        if (told := talk(vm, waking_words(vm, login_keys(), token), WAKE_SECONDS)) != "done":
            raise Error(f"the agent in it said: {printable(told) or 'nothing'}", vm=vm)
        write_file(vm.configured_file, "", durable=False)
        with QMP(vm.folder) as qemu:
            qemu.execute("set_link", name="net0", up=True)
        vm.woke, awake = time.monotonic() - began, True
    except BaseException as error:
        why, awake = last_words(vm, error), False
        stop_locked(vm, 0)
        if not isinstance(error, (Error, OSError)):
            raise
        cancellation.check()
        renew_disk(vm, template.disks()[0], known_formats(template)[0])
        report.say(f"{report.program}: {vm} boots: {why}")
    remove_file(vm.frozen_file)
    sync(vm.folder)
    return awake


def renew_disk(vm: VM, backing: str, format: str) -> None:
    """Give a VM that never ran a new system disk on a template's."""
    remove_file(vm.disks()[0])
    create_overlay(vm.disks()[0], backing, format)


def frozen_facts(machine: Machine) -> dict[str, Any]:
    """What must be the same where memory and devices of a guest are taken over: all but whose they are."""
    nobody = machine.but(
        name="", settings={**machine.settings, "vmUuid": "", "vmMac": ""},
        disks=[("", format, "") for _, format, _ in machine.disks], pid_file="", credentials="",
        seed=machine.seed and "seed", memory="", record="", wakes=False, below=(),
    )  # fmt: skip
    binary = os.stat(machine.qemu.path)
    return {
        "words": qemu_argv(nobody, 3),
        "qemu": [machine.qemu.version, binary.st_size, binary.st_mtime],
        "kernel": os.uname().release if machine.accel == "kvm" else "",
    }


def check_frozen(layer: Layer, machine: Machine) -> str:
    """The agent's token, where what was frozen in a layer is whole, and is a machine like this.  Else raises Error."""
    was, token = read_manifest(layer)
    now = frozen_facts(machine)
    for key, what in (("qemu", "another qemu"), ("kernel", "another kernel of this host")):
        if was[key] != now[key]:
            raise Error(f"it was frozen by {what}; vmtemplate {layer.template.name} --warm freezes it anew")
    if was["words"] != now["words"]:
        differing = [word for word in now["words"] if word not in was["words"]] or ["fewer devices"]
        raise Error(f"{layer.template.name} was frozen as another machine, not with {' '.join(differing)}")
    return token


def read_manifest(layer: Layer, deep: bool = False) -> tuple[dict[str, Any], str]:
    """What a freeze noted: frozen_facts(), the agent's token.  Error where memory (`deep`: all of it) has changed."""
    with Parsing(Error, f"{layer.manifest} can't be read"):
        manifest = json.loads(read_text(layer.manifest))
        noted = {key: manifest["machine"][key] for key in ("words", "qemu", "kernel")}, str(manifest["token"])
        same = memory_facts(layer) == manifest["memory"]
        same = same and not (deep and file_digest(layer.memory) != manifest["sha256"])
    if not same:
        raise Error(f"{layer.memory} isn't as it was left; vmtemplate {layer.template.name} --warm makes it anew")
    return noted


def memory_facts(layer: Layer) -> list[int]:
    """What tells that a file with a guest's memory is the one that was written, and hasn't been written since."""
    info = os.stat(layer.memory)
    return [info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns]


def add_image(qemu: QMP, node: str, path: str, format: str = "qcow2", **options: object) -> None:
    """Have a qemu open an image, as disk_args() would have it."""
    file = {"driver": "file", "filename": path, "discard": "unmap"}
    image = {"driver": format, "discard": "unmap", "detect-zeroes": "unmap", "file": file}
    qemu.execute("blockdev-add", node_name=node, **image, **options)


def plug_disk(qemu: QMP, number: int, port: int, path: str, format: str, serial: str) -> None:
    """Plug a disk into a running guest, as disk_args() would have it at its next start."""
    node, bus = f"disk{number}", f"port{port}"
    add_image(qemu, node, path, format)
    qemu.execute("device_add", driver="virtio-blk-pci", id=node, drive=node, bus=bus, serial=serial[-20:])

    def is_read() -> bool:
        stats = qemu.execute("query-blockstats")
        return any(node in each.get("qdev", "").split("/") and each["stats"]["rd_operations"] for each in stats)

    wait_for(is_read, 10)  # the guest has named it then: the next one gets the next name


def talk(vm: VM, words: bytes, seconds: float) -> str:
    """Say a line to the agent in the guest; its answer, of at most 4 KB."""
    said = b""
    with connect_unix(vm.folder, AGENT_SOCKET, seconds) as line:
        line.sendall(words)
        while b"\n" not in said and len(said) < 4096 and readable(line, seconds) and (piece := line.recv(4096)):
            said += piece
    return said.partition(b"\n")[0].decode("ascii", "replace")


def command_script(vm: VM, argv: Sequence[str], network: Network) -> str:
    """A shell script that starts the VM by hand: qemu's very words, in its folder and network; no shares, no TPM."""
    # an option a line: its value begins with no dash
    words = "".join((" \\\n  " if word[:1] == "-" else " ") + shlex.quote(word) for word in argv)
    tap = self_argv("net", f"--tap={vm.full_name}", f"--{network.kind}", "exec")  # as descriptor 3
    before = shlex.join(["env", f"NOCLOUD_vmBaseDir={vm.tree.base}", *tap])
    start = f"#!/bin/sh\n# Starts {vm.name} by hand, as nocloud does.\ncd {shlex.quote(vm.folder)} &&\n"
    return f"{start}exec {before}{words}\n"


# Waiting until ready #################################################################################
#
# From a qemu that answers to a guest that is ready, and what it is told over ssh on the way.


class Wait:
    """A wait for one VM: which of STAGES it is at, in their order, and until when."""

    def __init__(self, cloud: Cloud, vm: VM, seconds: float, say: bool = False, limit: str = "") -> None:
        """`limit`: the option that `seconds` come from, by default vmWaitTimeout."""
        self.limit = limit or "vmWaitTimeout"
        self.cloud, self.vm, self.network = cloud, vm, cloud.network_of(vm)
        self.stage = self._told = "address"
        self.tell: Callable[[VM, str], None] = lambda vm, stage: None  # hears of each new stage
        self._started = time.monotonic()
        self._deadline = self._started + seconds
        self._say_at = self._started + 1.0 if say else float("inf")
        self._checked = self._woken = 0.0
        self.denied = 0.0  # since when no login is let in

    def check(self) -> None:
        """Raise where the VM ended, the time is over or the user interrupts; say once what is waited for."""
        cancellation.check()
        now, vm = time.monotonic(), self.vm
        if now - self._checked > 0.5:
            self._checked = now
            if not vm.is_running():
                raise WrongState(f"it stopped while it was waited for{self.console()}", f"see {vm.log_file}", vm=vm)
            if now - self._woken > 5.0:
                self._woken = now
                need_awake(vm)
        if self.stage != self._told:
            self._told = self.stage
            self.tell(vm, self.stage)
        if now >= self._say_at:
            self._say_at = float("inf")
            report.say(f"{report.program}: waiting for {vm}: {STAGES[self.stage][0]}")
        if now >= self._deadline:
            text = f"not ready after {now - self._started:.0f} s: waiting for {STAGES[self.stage][0]}{self.console()}"
            raise TimedOut(text, f"{self.limit} sets the longest wait; its console: {vm.console_log}", vm=vm)

    def tries(self) -> Iterator[float]:
        """For a loop that tries something until it does: how many seconds a try may take.  Raises as `check` does."""
        while True:
            self.check()
            yield max(5.0, min(60.0, self._deadline - time.monotonic()))
            time.sleep(0.2)

    def console(self) -> str:
        """The last lines that the guest wrote on its console, for an error message."""
        said = read_tail(self.vm.old_console_log) + read_tail(self.vm.console_log)
        lines = [printable(line.strip())[:160] for line in without_escapes(said).splitlines() if line.strip()]
        return f"; its console says: {' | '.join(lines[-3:])}" if lines else "; its console says nothing"


STAGES = {  # what is waited for; and what the VM does meanwhile, in a line that a terminal has room for
    "address": ("the guest to ask for its address", "booting"),
    "ssh": ("ssh to answer", "starting ssh"),  # with its server's banner
    "configured": ("its configuration", "configuring"),
    "cloud-init": ("cloud-init in the guest to finish", "in cloud-init"),  # which lets us in already
}


class WaitProgress:
    """How far VMs are that are waited for: on a terminal one line about all, elsewhere one for each new stage."""

    def __init__(self, vms: Iterable[VM] = ()) -> None:
        self.stages = dict.fromkeys(vms, "address")

    def tell(self, vm: VM, stage: str) -> None:
        if vm not in self.stages:
            return  # it has gone meanwhile
        self.stages[vm] = stage
        self.show()
        if stage != "failed" and not sys.stderr.isatty():
            said = f"waiting for {vm.name}: {STAGES[stage][0]}" if stage in STAGES else f"{vm.name} is {stage}"
            report.say(f"{report.program}: {said}")

    def show(self) -> None:
        """Draw the line, while there is something to wait for."""
        counts = Counter(self.stages.values())
        doing = {"failed": "failed", **{stage: word for stage, (_, word) in STAGES.items()}}
        words = [f"{counts[stage]} {word}" for stage, word in doing.items() if counts[stage]]
        if sys.stderr.isatty() and counts["ready"] + counts["failed"] < len(self.stages):
            report.progress(", ".join([f"{counts['ready']} of {len(self.stages)} ready", *words]))


def wait_ssh(wait: Wait) -> None:
    """Return when the guest's ssh server says its banner (RFC 4253, 4.2)."""
    for number, _ in enumerate(wait.tries()):
        if address := wait.network.address(wait.vm):
            wait.stage = stage_of_port(wait.network, address, min(1.0, 0.1 + 0.1 * number))
            if wait.stage == "configured":
                return


def stage_of_port(network: Network, address: str, seconds: float = 1.0) -> str:
    """The stage that a try to connect shows: silence (`address`), an answer (`ssh`), an SSH banner (`configured`)."""
    with network.socket() as connection:
        connection.settimeout(seconds)  # a SYN that is lost is sent again only after a second (RFC 6298)
        if connection.connect_ex((address, 22)) not in (0, errno.ECONNREFUSED, errno.ECONNRESET):
            return "address"
        # An emulated guest takes its time, and each try that is given up costs it more.
        with contextlib.suppress(OSError):
            if readable(connection, 15.0) and connection.recv(4) == b"SSH-":
                return "configured"
    return "ssh"


def wait_ready(wait: Wait) -> None:
    """Return when the VM is ready: ssh answers, and the guest is configured as its vmInit says."""
    wait_ssh(wait)
    find_init_kind(wait)
    if (kind := wait.vm.get("vmInit")) != "none":
        configure(wait, kind == "cloud-init")
    mount_shares(wait)
    set_clock(wait)
    write_file(wait.vm.ready_file, "", durable=False)


def find_init_kind(wait: Wait) -> None:
    """Where vmInit is `auto`, find out at the first contact, and keep, whether the guest took its seed: who shows the
    host key from that has a cloud-init, which is done with it before sshd starts.  No other key is accepted then."""
    vm, known = wait.vm, wait.cloud.known_hosts
    if vm.get("vmInit") != "auto" or not os.path.isdir(vm.seed_folder):
        return
    pin_host_key(wait)
    planted = read_text(vm.host_key + ".pub").split()[:2]
    kind = "cloud-init" if known.key(vm.get("vmUuid")).split() == planted else "ssh"
    keep_shown(vm, "vmInit", kind)
    if kind == "ssh" and os.path.exists(vm.user_data_file):
        warn_of_guest(vm, "it has no cloud-init, so the user-data that it was given does nothing")


def keep_shown(vm: VM, key: str, value: str) -> None:
    """Keep in its conf what a running guest has shown."""
    try:
        with contextlib.nullcontext() if vm.is_in_making else FolderLock(vm.folder):  # who makes it holds its lock
            vm.write_conf({key: value})
    except FileNotFoundError:
        raise NotFound("it is gone", vm=vm) from None


def warn_of_guest(vm: VM, text: str) -> None:
    """Say it, and in the VM's log: this may be a helper that nobody sees."""
    append_line(vm.log_file, f"{vm}: {text}")
    report.warn(f"{vm}: {text}")


NOT_YET = 75  # as sysexits.h: try again
DENIED_SECONDS = 5  # where sshd is not started after what plants the keys


def configure(wait: Wait, cloud_init: bool = False, once: bool = False) -> None:
    """Log in with nocloud's own key, and set the hostname where it isn't what it should be.  `cloud_init`: that has
    set it; return when it has ended, or, with `once`, is at work.  Raises Error where it failed, with causes."""
    vm, patience = wait.vm, 0
    if not cloud_init:
        if not os.path.exists(vm.configured_file) or is_renamed(vm):
            pin_host_key(wait)
            run_in_guest(wait, guest_script("hostname.sh", NAME=vm.host_name))
            write_file(vm.configured_file, "")
        return
    for seconds in wait.tries():
        script = guest_script("cloud-init.sh", PATIENCE=patience, NOT_YET=NOT_YET)
        status, output = ssh_batch(wait.cloud, vm, script, seconds)
        login = vm.get("vmUser")
        if login != "root" and status == 255 and "Permission denied" in output:
            status, output = ssh_batch(wait.cloud, vm, script, seconds, "root")
            if status in (0, 1, 2):  # cloud-init has ended, and has not made its default user
                keep_shown(vm, "vmUser", "root")
                warn_of_guest(vm, f"{login} can't log in there, root can: vmssh and ansible are root from now on")
        if status in (0, 1, 2):
            told = os.path.exists(vm.configured_file)
            write_file(vm.configured_file, "")
            check_cloud_init(vm, status, output, told)
            return
        if status != NOT_YET:
            check_login(wait, status, output)
        elif once:
            return
        else:
            wait.stage, patience = "cloud-init", 15


def check_cloud_init(vm: VM, status: int, output: str, told: bool) -> None:
    """Raise where it failed (1); warn, once, where it left something out (2).  `output`: the causes, in its words."""
    given = f" ({vm.user_data_file})" if os.path.exists(vm.user_data_file) else ""
    causes = " | ".join(printable(line.strip()) for line in output.splitlines() if line.strip())[:1000]
    if status == 1:
        hint = f"vmssh {vm} gets in; see /var/log/cloud-init-output.log there"
        raise Error(f"cloud-init failed in it{given}: {causes}", hint, vm=vm)
    if status == 2 and not told:
        warn_of_guest(vm, f"cloud-init in it did not do all that it was given{given}: {causes}")


def mount_shares(wait: Wait) -> None:
    """Have the guest mount what is shared with it, now and at each boot.  Over ssh, whatever its vmInit: tmpfiles.d
    would come too late for the first boot, and cloud-init tells nobody what it couldn't mount."""
    vm, shares = wait.vm, wait.vm.get("vmShares")
    if shares == read_existing(vm.mounted_file) or vm.get("vmInit") == "none":
        return
    folders = (f"share{n} {guest} {'rw' if rw else 'ro'}" for n, (_, guest, rw) in enumerate(parse_shares(shares)))
    run_in_guest(wait, guest_script("shares.sh", True, SHARES="\n".join(folders)))
    write_file(vm.mounted_file, shares)


def is_late(vm: VM) -> bool:
    """Whether its clock is to be set: it stood still."""
    return os.path.exists(vm.late_file) and vm.get("vmInit") != "none"


def set_clock(wait: Wait) -> None:
    """Tell a guest that stood still what time it is."""
    if is_late(wait.vm):
        run_in_guest(wait, guest_script("clock.sh", True, NOW=time.time()))
        remove_file(wait.vm.late_file)


def run_in_guest(wait: Wait, script: str) -> None:
    """Run a script in the guest once that lets us in, after sshd answers (pam_nologin).  Raises as check_login()."""
    for seconds in wait.tries():
        status, output = ssh_batch(wait.cloud, wait.vm, script, seconds)
        if not status:
            return
        check_login(wait, status, output)


def check_login(wait: Wait, status: int, output: str) -> None:
    """Raise where another try would end the same; ssh's own failures have status 255 (ssh(1))."""
    vm, words = wait.vm, last_line(output)
    if "REMOTE HOST IDENTIFICATION" in output or "Host key verification failed" in words:
        hint = "destroy it if you can't explain that; --init auto is for templates that may have no cloud-init"
        raise Error("its host key is not the one that was planted or pinned", hint, vm=vm)
    if "Permission denied" in words and not is_planted(vm):
        hint = "put your key into the template, or set vmInit=none in its conf"
        raise Error(f"none of your keys lets {vm.get('vmUser')} in, so its hostname can't be set", hint, vm=vm)
    if "Permission denied" in words:
        wait.denied = wait.denied or time.monotonic()
        if time.monotonic() - wait.denied > DENIED_SECONDS:
            hint = f"vmconsole -s -n {vm} is another way in; its console: {vm.console_log}"
            raise Error(f"the key that was planted lets nobody in: {words}{wait.console()}", hint, vm=vm)
    elif status not in (255, -1):
        raise Error(f"it can't be configured over ssh: {words}", vm=vm)


def pin_host_key(wait: Wait) -> None:
    """Where no host key was planted, the one seen at the first contact is the VM's from now on."""
    cloud, vm = wait.cloud, wait.vm
    if cloud.known_hosts.knows(uuid := vm.get("vmUuid")):
        return
    place = vm.file(f"known_hosts.{os.urandom(3).hex()}")
    try:
        for seconds in wait.tries():
            trust = ssh_trust_options(place, strict=False)
            try_run([*ssh_argv(cloud, vm, BATCH, trust, ssh_key_options(True)), "true"], seconds, guest=True)
            if lines := read_existing(place).splitlines():
                break
        cloud.known_hosts.update({uuid: (vm.get("vmAddress"), lines[0].split(" ", 1)[1])})
    finally:
        remove_file(place)


def ssh_batch(cloud: Cloud, vm: VM, script: str, timeout: float, user: str = "") -> tuple[int, str]:
    """Run a command in the guest with nocloud's own key and no ssh configuration of the user's; (status, output)."""
    first = [*BATCH, *(["-l", user] if user else [])]
    return try_run([*ssh_argv(cloud, vm, first), script], timeout, guest=True)


BATCH = ("-F", "none", *ssh_options(BatchMode="yes", ConnectTimeout="20"))  # nobody is asked anything


def ssh_argv(
    cloud: Cloud, vm: VM, first: Sequence[str] = (), trust: Sequence[str] = (), keys: Sequence[str] = ()
) -> list[str]:
    """ssh's argv up to the host: who is checked, with which keys, by which way.  `first`: options that win, for of two
    values ssh takes the first, and -N excludes a SessionType before it."""
    network, address = cloud.network_of(vm), cloud.network_of(vm).address(vm)
    trust = trust or ssh_trust_options(cloud.known_hosts.path, strict=True)
    way = ssh_way(network, trust, keys or ssh_key_options(is_planted(vm)))
    call = ssh_options(**OWN_CALL, SessionType="default", ControlPath="none")
    return ["ssh", *first, *call, *ssh_host(vm, address), *way, address]


SSH_FLAGS = "46AaCfGgKkMNnqsTtXxYy"  # ssh(1): its options, but for -V and -v, and those that take a value
SSH_VALUES = "BbcDEeFIiJLlmOopQRSWw"


def split_ssh_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the options that ssh's words begin with, with their values; the rest)."""
    count = 0
    while count < len(words) and re.match("-[^-]", words[count]):  # the value may be the next word
        count += 2 if re.fullmatch(f"-[^{SSH_VALUES}]*[{SSH_VALUES}]", words[count]) else 1
    return list(words[:count]), list(words[count:])


def start_all(
    cloud: Cloud, vms: Sequence[VM], started: Callable[[VM], None] = lambda vm: None, held: bool = False, **how: Any
) -> list[Error | None]:
    """Start VMs in parallel, `how` as start() says, after the networks that they need; for each None, or why it doesn't
    run.  `started` hears of each as soon as it runs; `held`: the caller has their locks."""

    def start_one(vm: VM) -> None:
        cancellation.check()
        with contextlib.nullcontext() if held else FolderLock(vm.folder):
            start(cloud, vm, **how)
        started(vm)

    kinds = {vm: cloud.network_kind(vm) for vm in vms if vm.is_readable() and not foreign_qemu(vm)}
    with contextlib.ExitStack() as stack:
        for kind in sorted({*kinds.values()}):
            stack.enter_context(cloud.networks[kind].hold())
            cloud.networks[kind].admit([vm for vm in kinds if kinds[vm] == kind])
        return in_parallel(start_one, vms)


def start_stopped(cloud: Cloud, vms: Sequence[VM], iso: str = "", gui: bool = False) -> list[Error]:
    """Start VMs, or templates; the errors."""
    cloud.prepare(vms)
    for vm in vms:
        with FolderLock(vm.folder):
            give_identity(cloud, vm)
    return [error for error in start_all(cloud, vms, iso=iso, gui=gui) if error]


def instantiate(
    cloud: Cloud, group: str, requests: Sequence[CloneRequest], started: Callable[[VM], None] = lambda vm: None
) -> tuple[list[VM], list[Error]]:
    """Make the clones and start them, in parallel; (those that run, the errors).  A clone that doesn't start goes."""
    cloud.prepare(cloud.tree.template(request.template) for request in requests)
    cloud.networks[group_network(cloud, group)].up()  # where that can't be, nothing is made
    made = make_clones(cloud, group, requests)
    errors = [result for result in made if isinstance(result, Error)]
    vms = [result for result in made if isinstance(result, VM)]
    problem = result_of(lambda _: publish_keys(cloud, vms), None)  # one file has the keys of all
    same = [Error(problem.text, problem.hint, problem.status, vm) for vm in vms] if problem else []
    results = same or start_all(cloud, vms, started)
    errors += filter(None, results)
    if failed := [vm for vm, error in zip(vms, results) if error and not vm.is_running()]:  # by another command
        errors += destroy_all(cloud, failed)
    return [vm for vm in vms if vm not in failed], errors


def wait_all(cloud: Cloud, vms: Sequence[VM], seconds: float, limit: str = "") -> list[Error]:
    """Wait for VMs in parallel until each is ready, and tell how far they are.  `limit`: as Wait says."""
    progress = WaitProgress(vms)

    def wait_one(vm: VM) -> None:
        wait, end = Wait(cloud, vm, seconds, limit=limit), "failed"
        wait.tell = progress.tell
        try:
            wait_ready(wait)
            end = "ready"
        finally:
            progress.tell(vm, end)

    progress.show()
    try:
        results = in_parallel(wait_one, vms, workers=len(vms) or 1)
    except KeyboardInterrupt:
        report.say(f"{report.program}: these VMs run on: {', '.join(vm.name for vm in vms)}")
        raise
    return [result for result in results if isinstance(result, Error)]


def configure_later(cloud: Cloud, vms: Sequence[VM]) -> None:
    """Start a process for the VMs that must be configured over ssh.  What it can't finish, the next vmssh does."""
    vms = [vm for vm in vms if vm.is_readable() and vm.get("vmInit") != "none"]
    late = [vm for vm in vms if vm.get("vmShares") or is_late(vm) or is_renamed(vm)]
    if names := [vm.full_name for vm in vms if vm.get("vmInit") in ("auto", "ssh") or vm in late]:
        spawn(self_argv("configure", *names), log=os.devnull, cwd="/", env={"NOCLOUD_vmBaseDir": cloud.tree.base})


# Snapshots ###########################################################################################
#
# What VMs were at a moment: their confs, and their disks, which get new overlays to write to; and, if that is wanted,
# their memory.  A group is the unit: all its VMs stand still before the first one is sealed.

MAX_SNAPSHOTS = 16  # files under a disk: what is read is looked for in each


class Snapshot:
    """A VM as it was: a folder with the conf, which names the disks that nobody writes to any more, and the memory."""

    def __init__(self, vm: VM, name: str) -> None:
        self.vm, self.name, self.folder = vm, name, os.path.join(vm.snapshots_folder, name)
        # The last: names of all VMs that it was taken of, and, after a space, of those beside them in their groups.
        files = ("conf", "memory", "firmware", "members")
        self.conf, self.memory, self.firmware, self.members = (os.path.join(self.folder, each) for each in files)

    def source(self) -> VM:
        """The VM with the conf that it had."""
        old = VM(self.vm.tree, self.vm.group, self.vm.type, self.vm.name, self.vm.folder)
        found = parse_assignments(read_text(self.conf), self.conf, {"vmBaseDir": old.base})
        old._conf = {each.key: each.value for each in found}
        return old

    def size(self) -> int:
        """The bytes on disk that its memory, and its disks where no other snapshot has them, take."""
        others = [disk for each in snapshots_of(self.vm) if each.name != self.name for disk in each.source().disks()]
        own = [disk for disk in self.source().disks() if disk not in others]
        return sum(os.stat(path).st_blocks * 512 for path in (self.memory, *own) if os.path.exists(path))


def snapshots_of(vm: VM) -> list[Snapshot]:
    """Its snapshots, the oldest first."""
    found = [Snapshot(vm, name) for name in folders_in(vm.snapshots_folder)]
    return sorted((each for each in found if os.path.exists(each.conf)), key=lambda each: os.stat(each.conf).st_mtime)


def need_snapshots(vms: Iterable[VM], name: str) -> list[Snapshot]:
    """The snapshots of this name that these VMs have.  Raises NotFound where none has one."""
    every = [each for vm in vms for each in snapshots_of(vm)]
    if not (found := [each for each in every if each.name == name]):
        raise no_such("snapshot", name, sorted({each.name for each in every}), "vmsnapshot -L lists them")
    return found


@contextlib.contextmanager
def locked(vms: Iterable[VM]) -> Iterator[None]:
    """The locks of VMs are held, taken in one order by all commands."""
    with contextlib.ExitStack() as stack:
        for vm in sorted(vms, key=lambda vm: vm.full_name):
            stack.enter_context(FolderLock(vm.folder))
            vm.reread()
            end_half_start(vm)
        yield


def new_overlays(vm: VM, disks: Sequence[str], formats: Sequence[str]) -> dict[str, str]:
    """Make overlays on disks of the VM; what its conf says when it is to write to them."""
    names = names_in(vm.folder)
    number = 1 + max((int(found[1]) for name in names if (found := re.search(r"\.s(\d{1,9})\.", name))), default=0)
    made = []
    for place, (disk, format) in enumerate(zip(disks, formats)):
        made.append(f"{vm.name}_{place}.s{number}.{vm.tree.config['vmDiskExt']}")
        create_overlay(vm.file(made[-1]), disk, format)
    sync(vm.folder)
    system, *others = map(vm.relative, made)
    more = {"vmExtraDisk": ",".join(others)} if others else {}
    return {"vmDisk": system, **more, "vmDiskFormat": ",".join(["qcow2"] * len(made))}


def node_of(overlay: str) -> str:
    """What qemu is to call an overlay."""
    return "disk" + "".join(re.findall(r"_(\d+)\.(s\d+)\.", overlay)[-1])


class Sealing:
    """A VM that a snapshot is being taken of, by who holds its lock."""

    def __init__(self, vm: VM, name: str) -> None:
        self.vm, self.final, self.new = vm, Snapshot(vm, name), Snapshot(vm, MAKING + name)
        self.qemu = QMP(vm.folder, 600) if vm.is_running() else None
        self.overlays: dict[str, str] = {}  # of a running one: the nodes that are written to, and which are to be
        self.sealed = False  # of a running one: whether the overlays may be written to

    def prepare(self) -> None:
        """All that can be done while the guest runs on.  Its conf names the new overlays before qemu writes to them:
        until it does there is nothing in them, so that the VM starts with what it had, whatever happens."""
        vm = self.vm
        clear_up(vm, self.qemu)
        disks, nodes = vm.disks(), nodes_of(self.qemu, vm, devices=True) if self.qemu else {}
        if self.qemu and not all(os.path.realpath(disk) in nodes for disk in disks):
            raise WrongState("its qemu writes to other disks than its conf names", f"vmstop -n {vm}", vm=vm)
        os.makedirs(self.new.folder, 0o700)
        changes = new_overlays(vm, disks, known_formats(vm))
        screen = {"vmGui": "yes"} if self.qemu and screen_of(vm) else {}  # it may have it for this time only
        write_file(self.new.conf, update_assignments(read_text(vm.conf_file), screen))
        vm.write_conf(changes)
        for disk, overlay in zip(disks, vm.disks()):
            if self.qemu:
                add_image(self.qemu, node_of(overlay), os.path.basename(overlay), backing=None)
                self.overlays[nodes[os.path.realpath(disk)]] = node_of(overlay)

    def seal(self) -> None:
        """From now on its old disks are what they are; a copy is made of what its firmware keeps."""
        if os.path.exists(self.vm.firmware_folder):
            shutil.copytree(self.vm.firmware_folder, self.new.firmware)
        pairs = [{"node": node, "overlay": overlay} for node, overlay in self.overlays.items()]
        if self.qemu:
            self.sealed = True  # for all that is known until qemu has answered
            self.qemu.execute("transaction", actions=[{"type": "blockdev-snapshot", "data": pair} for pair in pairs])

    def undo(self) -> None:
        """Go on as it was; overlays that are written to already stay, and are merged."""
        if os.path.exists(self.final.folder):
            os.rename(self.final.folder, self.new.folder)
        if self.qemu:
            self.qemu.allow(3600)
        clear_up(self.vm, self.qemu if self.vm.is_running() else None, unwritten=not self.sealed)


def nodes_of(qemu: QMP, vm: VM, devices: bool = False) -> dict[str, str]:
    """The names that qemu calls its images by, by their real paths; `devices`: of those alone that it writes to."""
    if devices:
        found = [each["inserted"] for each in qemu.execute("query-block") if "inserted" in each]
    else:
        found = qemu.execute("query-named-block-nodes", flat=True)
    names = {each["node-name"]: each["file"] for each in found if each["drv"] in ("qcow2", "raw")}
    for node, name in names.items():  # of one whose backing file was given, too (QEMU docs/system/images.rst, json:)
        names[node] = json.loads(name[5:])["file"]["filename"] if name.startswith("json:") else name
    return {os.path.realpath(os.path.join(vm.folder, name)): node for node, name in names.items()}


def take_snapshot(cloud: Cloud, vms: Sequence[VM], name: str, ram: bool, flush_guests: bool) -> None:
    """Snapshots of VMs, all of one moment; where one can't be taken there is none, and all go on.
    `ram`: with the memory of those that run; `flush_guests`: they write out first what they hold."""
    checked_name("snapshot", name)
    with locked(vms):
        check_snapshots(vms, name, ram)
        if flush_guests:
            raise_first(in_parallel(lambda vm: flush_guest(cloud, vm), [vm for vm in vms if vm.is_running()]))
        taken, groups = {vm.full_name for vm in vms}, {vm.group for vm in vms}
        there = [each.full_name for each in cloud.tree.vms() if each.group in groups]
        members = "\n".join(each if each in taken else f" {each}" for each in there)
        sealings: list[Sealing] = []
        try:
            for vm in vms:
                sealings.append(Sealing(vm, name))
                sealings[-1].prepare()
                write_file(sealings[-1].new.members, members)
            running = {each.vm: (each.qemu, each.new.memory) for each in sealings if each.qemu}
            with stand_still((vm, qemu) for vm, (qemu, _) in running.items()):
                for each in sealings:
                    each.seal()
                if ram:
                    raise_first(in_parallel(lambda vm: write_memory(*running[vm]), list(running)))
            land({each.new.folder: each.final.folder for each in sealings})
        except BaseException:
            for each in reversed(sealings):  # the last one may have had no room: what it leaves goes first
                result_of(lambda each: each.undo(), each)
            raise
        finally:
            for qemu in [each.qemu for each in sealings if each.qemu]:
                qemu.close()


def flush_guest(cloud: Cloud, vm: VM) -> None:
    """Have a guest write out what it holds.  Raises Error where it can't be asked."""
    need_awake(vm)
    status, said = ssh_batch(cloud, vm, "sync", 60)
    if status:
        raise Error(f"its guest has not written out what it holds: {last_line(said)}", "leave out --sync", vm=vm)


def check_snapshots(vms: Sequence[VM], name: str, ram: bool) -> None:
    """Raise where a snapshot of one of them can't be taken."""
    for vm in vms:
        if foreign_qemu(vm) or vm.is_template or vm.state()[0] == "unknown":
            raise WrongState("no snapshot is taken of it: a template, or not started by nocloud", vm=vm)
        if any(each.name.lower() == name.lower() for each in snapshots_of(vm)):
            raise WrongState(f"it has a snapshot {name}", f"vmsnapshot --delete {name} -n {vm}", vm=vm)
        if os.path.exists(vm.saved_file) and not vm.is_running():
            raise WrongState("its memory is saved", f"start it: vm -n {vm}", vm=vm)
        if (depth := len(own_chain(vm, vm.disks()[0]))) > MAX_SNAPSHOTS:
            hint = f"vmsnapshot --delete NAME -n {vm}, of one of {', '.join(each.name for each in snapshots_of(vm))}"
            raise WrongState(f"its disk stands on {depth - 1} snapshots, {MAX_SNAPSHOTS} is the most", hint, vm=vm)
        if depth > MAX_SNAPSHOTS - 4:
            report.warn(f"{vm}: its disk stands on {depth - 1} snapshots, {MAX_SNAPSHOTS} is the most")
        if ram and vm.get("vmShares"):
            raise WrongState("it has shared folders, whose state can't be kept", "leave out --ram", vm=vm)
    need = sum((vm.number("vmMem") + 64) * MIB for vm in vms if vm.is_running()) if ram else MIB
    if vms:
        check_room(vms[0].folder, need, vms[0].base, "the snapshots take up to {} MB", ROOM_HINT)


def own_chain(vm: VM, disk: str) -> list[str]:
    """A disk, and those under it that are the VM's own, as real paths."""
    chain = [os.path.realpath(disk), *backing_chain(disk, "", vm.tree.followable())]
    return [path for path in chain if os.path.dirname(path) == os.path.realpath(vm.folder)]


def roll_back(snapshot: Snapshot) -> list[str]:
    """Have a VM that is off be what it was, by who holds its lock, memory included; disks it got since, which stay."""
    vm, old, followed = snapshot.vm, snapshot.source(), snapshot.vm.tree.followable()
    files = {disk: {os.path.realpath(disk), *backing_chain(disk, "", followed)} for disk in vm.disks() + old.disks()}
    was, aside = set().union(*map(files.__getitem__, old.disks())), []
    for disk in [disk for disk in vm.disks() if not was & files[disk]]:
        aside.append(re.sub(r"(\.s\d+)?(\.[^./]*)?$", rf".{os.urandom(3).hex()}\2", disk, count=1))
        os.link(disk, aside[-1])  # merge_unused() takes its old name away
    changes = new_overlays(vm, old.disks(), old.get("vmDiskFormat").split(","))
    os.mkdir(kept := kept_for(vm, changes["vmDisk"]), 0o700)
    if os.path.exists(snapshot.memory):
        os.link(snapshot.memory, memory := os.path.join(kept, os.path.basename(vm.saved_file)))
        os.utime(memory)
    if os.path.exists(snapshot.firmware):
        shutil.copytree(snapshot.firmware, os.path.join(kept, os.path.basename(vm.firmware_folder)))
    flush(kept)
    write_file(vm.conf_file, update_assignments(read_text(snapshot.conf), changes), 0o644)
    vm.reread()
    remove_file(vm.saved_file)
    adopt_kept(vm)
    clear_up(vm, None)
    return aside


def delete_snapshot(snapshot: Snapshot) -> None:
    """Forget a snapshot, and merge what only it had, running or not; by who holds the VM's lock."""
    vm, saved = snapshot.vm, saved_is_current(snapshot.vm)
    remove_tree(doomed := os.path.join(vm.snapshots_folder, REMOVING + snapshot.name))
    os.rename(snapshot.folder, doomed)
    sync(vm.snapshots_folder)
    try:
        with QMP(vm.folder, 3600) if vm.is_running() else contextlib.nullcontext() as qemu:
            clear_up(vm, qemu)
    finally:
        if saved:
            os.utime(vm.saved_file)


def clear_up(vm: VM, qemu: QMP | None, unwritten: bool = False) -> None:
    """Remove what failed or killed commands left, and merge what nothing needs; by who holds the lock.  A conf names
    again what it did before overlays that nobody wrote to: qemu tells that, of a VM that is off `unwritten`."""
    if qemu:
        go_on_after_kill(vm, qemu)
        for job in qemu.execute("query-block-jobs"):
            qemu.execute("block-job-cancel", device=job["device"])
        wait_for(lambda: not qemu.execute("query-block-jobs"), 60)
    else:
        remove_file(vm.still_file)
    for name in names_in(vm.snapshots_folder, lambda entry: entry.name.startswith((MAKING, REMOVING))):
        left, overlays = Snapshot(vm, name), set(map(os.path.realpath, vm.disks()))
        if name.startswith(MAKING) and os.path.exists(left.conf):
            if qemu:
                unwritten = not overlays <= set(nodes_of(qemu, vm, devices=True))
            if unwritten:
                was = left.source().conf
                vm.write_conf({key: was[key] for key in ("vmDisk", "vmExtraDisk", "vmDiskFormat") if key in was})
            for overlay in overlays if unwritten else ():
                with contextlib.suppress(QMPError):  # one that it hasn't been told of
                    if qemu:
                        qemu.execute("blockdev-del", node_name=node_of(overlay))
        remove_tree(left.folder)
    remove_empty(vm.snapshots_folder)
    merge_unused(vm, qemu)


def merge_unused(vm: VM, qemu: QMP | None = None) -> None:
    """Remove the overlays that neither the VM nor a snapshot stands on, and merge a file that none of them names into
    the only one that stands on it.  What is there is whole at any time: data only goes up."""
    sources = [vm, *(each.source() for each in snapshots_of(vm))]
    named = {os.path.realpath(disk) for source in sources for disk in source.disks()}
    images = {os.path.realpath(vm.file(name)) for name in names_in(vm.folder) if name.endswith((".img", ".qcow2"))}
    ours = {path for path in images if re.search(r"\.s\d+\.", os.path.basename(path))}
    aside = {path for path in images if re.search(r"\.[0-9a-f]{6}\.\w+$", path)}
    twice = {os.stat(path).st_ino for path in aside}
    for path in images - named - aside:
        if os.stat(path).st_ino in twice:  # roll_back() gave it another name
            remove_file(path)
            images.discard(path)
    chains = {path: own_chain(vm, path) for path in named | images if os.path.exists(path)}
    used = {each for path, chain in chains.items() if path in named or path not in ours for each in chain}
    for path in ours - used:
        remove_file(path)
    while True:
        uppers: dict[str, list[str]] = {}
        for path in used:
            for lower in own_chain(vm, path)[1:2]:
                uppers.setdefault(lower, []).append(path)
        alone = [(lower, above[0]) for lower, above in uppers.items() if lower not in named and len(above) == 1]
        if not alone:
            return
        merge(vm, *alone[0], qemu)
        used.discard(alone[0][0])


def merge(vm: VM, lower: str, upper: str, qemu: QMP | None) -> None:
    """Have an overlay stand on what the file under it stands on, with all that was in that; which goes."""
    header = qcow2_header(upper)
    under = qcow2_header(lower) if header and header.format == "qcow2" else None
    below = os.path.join(os.path.dirname(lower), under.backing) if under and under.backing else ""
    relative = os.path.relpath(os.path.realpath(below), os.path.dirname(upper)) if below else ""
    check_room(vm.folder, os.stat(lower).st_blocks * 512, vm.base, "merging takes up to {} MB", ROOM_HINT)
    nodes = nodes_of(qemu, vm) if qemu else {}
    if qemu and upper in nodes:
        base = {"base_node": nodes[os.path.realpath(below)], "backing_file": relative} if below else {}
        qemu.execute("block-stream", job_id="merge", device=nodes[upper], auto_finalize=False, **base)
        wait_for(lambda: all(each["status"] == "pending" for each in qemu.execute("query-block-jobs")), 3600, 0.05)
        qemu.monitor(f"qemu-io {nodes[upper]} flush")  # before the header says that nothing is below any more
        with contextlib.suppress(QMPError):  # it failed, and is gone
            qemu.execute("job-finalize", id="merge")
        wait_for(lambda: not qemu.execute("query-block-jobs"), 60, 0.05)
    else:
        format = ["-F", under.format] if under and under.format else []
        run(["qemu-img", "rebase", "-q", "-f", "qcow2", *format, "-b", relative, upper], timeout=None)
    if not (now := qcow2_header(upper)) or now.backing != relative:
        raise Error(f"{lower} could not be merged into {upper}", f"see {vm.log_file}", vm=vm)
    sync(upper)
    remove_file(lower)


def snapshot_rows(tree: Tree, group: str) -> Iterator[tuple[str, ...]]:
    """(name, group, when, size on disk, whether with memory, VMs) of each snapshot, the oldest first."""
    found: dict[tuple[str, str], list[Snapshot]] = {}
    for vm in tree.vms(group):
        for each in snapshots_of(vm) if not vm.is_template and vm.is_readable() else ():
            found.setdefault((each.name, vm.group), []).append(each)
    when = {key: min(os.stat(each.conf).st_mtime for each in those) for key, those in found.items()}
    for key in sorted(found, key=when.__getitem__):
        those = found[key]
        memory = any(os.path.exists(each.memory) for each in those)
        day = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when[key]))
        names, size = ",".join(each.vm.name for each in those), sum(each.size() for each in those)
        yield *key, day, f"{size / MIB:.0f} MB", "memory" if memory else "-", names


# Changing VMs ########################################################################################
#
# One by one, or a group to what a description says.  A plan is made of what there is each time, and each of its steps
# is whole: who was interrupted plans anew, and does what is left.

DESCRIBED = {option.sets: option for option in CLONE_OPTIONS if option.sets in SETTING}
LIVE = ("vmPorts", "vmCold")  # what needs no restart


@record
class Present:
    """A VM that there is, as plans look at it."""

    name: str
    type: str
    template: str
    settings: Mapping[str, str]  # those of DESCRIBED
    sizes: Sequence[int]  # of its disks, in bytes
    unnamed: bool = False  # its name is its UUID
    running: bool = False
    halted: bool = False  # whoever made it or stopped it to change it was killed before it started
    vm: Any = None
    user_data: bytes = b""


@record
class Step:
    """What a plan does to a VM, or why nothing: a line of it."""

    verb: str
    name: str
    text: str = ""
    vm: Any = None  # that there is
    request: CloneRequest | None = None  # for the VM alone, as it is described
    do: Callable[[Cloud, VM], None] | None = None  # for who holds the VM's lock
    restart: bool = False
    loses: bool = False  # what is on a disk

    @property
    def line(self) -> str:
        return f"{self.verb} {self.name}{self.text and ': '}{self.text}{' (restart)' if self.restart else ''}"


def look(vm: VM) -> Present:
    """A VM, or a template with what its clones get."""
    state, _ = vm.state()
    if state == "unknown" and not vm.is_template:
        raise WrongState(f"can't tell whether it runs: {vm.pid_file}", "look as the user who started it", vm=vm)
    settings = {}
    for key in DESCRIBED:
        setting = SETTING[key]
        value = setting.default if vm.is_template and not setting.inherited and setting.where == "vm" else vm.get(key)
        settings[key] = value and str(setting.check(value))
    sizes = [
        header.size if format == "qcow2" and (header := qcow2_header(disk)) else os.path.getsize(disk)
        for disk, format in zip(vm.disks(), known_formats(vm))
    ]
    # Not one that bash made, which writes neither.
    halted = state == "stopped" and not os.path.exists(vm.command_file) and bool(vm.get("vmUuid"))
    # The template of one that bash made is told by what its disk stands on.
    below = {os.path.dirname(path) for path in ([] if vm.get("vmTemplate") else vm.below())}
    found = (each.name for each in vm.tree.templates() if os.path.realpath(each.folder) in below)
    template, unnamed = vm.get("vmTemplate") or next(found, ""), vm.name == vm.get("vmUuid")
    given = b""
    with contextlib.suppress(FileNotFoundError), open(vm.user_data_file, "rb") as file:
        given = file.read()
    return Present(vm.name, vm.type, template, settings, sizes, unnamed, state == "running", halted, vm, given)


def plan(requests: Sequence[CloneRequest], present: Sequence[Present], templates: Mapping[str, Present]) -> list[Step]:
    """What makes of a group's VMs those that are described.  Raises UsageError, with FILE:LINE, for what can't be."""
    pairs = match(requests, present, templates)
    kept = [vm for _, vm in pairs]
    steps = [Step("destroy", vm.name, vm=vm.vm, loses=True) for vm in present if vm not in kept]
    for request, vm in pairs:
        if vm:
            steps += list(compare(request, vm, templates)) or [Step("keep", vm.name)]
        else:
            steps.append(Step("create", request.prefix[:-1] or f"a VM of type {request.type}", request=request))
    for step in steps:
        if step.verb == "shrink" and step.request:
            raise UsageError(f"{step.request.origin}: {step.name}: {step.text}, and a disk never shrinks")
    return steps


def match(
    requests: Sequence[CloneRequest], present: Sequence[Present], templates: Mapping[str, Present]
) -> list[tuple[CloneRequest, Present | None]]:
    """A request for each single VM that is described, with the VM that there is: by type and name, of a prefix the
    lowest numbers, new ones in the gaps; without a name by type and template, those first that are as described."""
    left = {(vm.type, vm.name.lower()): vm for vm in present}
    given = [name.lower() for request in requests for name in full_names(request.prefix)]
    for name in given:
        if given.count(name) > 1:
            raise UsageError(f"{requests[0].origin.rpartition(':')[0]}: name={name}: it is in two lines")
    taken = {*given, *(name for _, name in left)}
    pairs: list[tuple[CloneRequest, Present | None]] = []
    unnamed: list[CloneRequest] = []
    for request in requests:
        there = [name for type, name in left if type == request.type and name not in given]
        for number, name in enumerate(full_names(request.prefix) or numbered_names(request, there, taken)):
            settings = dict(request.settings)
            if "vmPorts" in settings:
                settings["vmPorts"] = numbered_ports(settings["vmPorts"], number)
            rest = request.disk, request.disks, request.user_data, f"{name}," if name else ""
            one = CloneRequest(request.origin, request.template, 1, request.type, settings, *rest)
            if name:
                pairs.append((one, left.pop((request.type, name.lower()), None)))
            else:
                unnamed.append(one)
    for exact in (True, False):
        for one in list(unnamed):
            fits = (
                key for key, vm in left.items() if vm.unnamed and (vm.type, vm.template) == (one.type, one.template)
                and not (exact and any(compare(one, vm, templates)))
            )  # fmt: skip
            if found := next(fits, None):
                pairs.append((one, left.pop(found)))
                unnamed.remove(one)
    return pairs + [(one, None) for one in unnamed]


def numbered_names(request: CloneRequest, there: Iterable[str], taken: set[str]) -> list[str]:
    """As many names of a prefix as are asked for: the lowest of those that are `there`, then new ones, `taken` now."""
    if not request.prefix:
        return [""] * request.count
    numbers = {number: name for name in there if (number := number_of(request.prefix, name)) >= 0}
    found = dict(sorted(numbers.items())[: request.count])
    for number in range(request.count + len(taken)):
        name = f"{request.prefix}{number:02d}"
        if len(found) < request.count and name.lower() not in taken:
            taken.add(name.lower())
            found[number] = name
    return [found[number] for number in sorted(found)]


def compare(request: CloneRequest, vm: Present, templates: Mapping[str, Present]) -> Iterator[Step]:
    """What makes a VM the one that is described.  Of a system disk of which nothing is said the size is right."""

    def step(verb: str, text: str, do: Any = None, restart: bool = False, loses: bool = False) -> Step:
        return Step(verb, vm.name, text, vm.vm, request, do, restart and vm.running, loses)

    if request.template != vm.template:
        yield step("replace", f"template {vm.template or 'none'} → {request.template}", loses=True)
        return
    if vm.user_data != (request.user_data or (vm.user_data and default_user_data())):
        yield step("replace", "another user-data", loses=True)
    wanted = {**templates[vm.template].settings, **request.settings}
    has = parse_ports(vm.settings["vmPorts"])
    chosen = {(ip, guest): host for ip, host, guest in has}  # for a HOST 0
    ports = [(ip, host or chosen.get((ip, guest), 0), guest) for ip, host, guest in parse_ports(wanted["vmPorts"])]
    wanted["vmPorts"] = vm.settings["vmPorts"] if sorted(ports) == sorted(has) else join_ports(ports)
    for live in (True, False):
        changes = {key: wanted[key] for key in DESCRIBED if wanted[key] != vm.settings[key] and (key in LIVE) == live}
        words = [f"{DESCRIBED[key].name} {vm.settings[key] or 'none'} → {changes[key] or 'none'}" for key in changes]
        if changes:
            yield step("change", ", ".join(words), functools.partial(change_settings, changes=changes), not live)
    sizes = [request.disk, *request.disks]
    for number in range(max(len(sizes), len(vm.sizes))):
        size, there = (each[number] if number < len(each) else 0 for each in (sizes, vm.sizes))
        there = -(-there // GIB) * GIB if number else there  # those that nocloud makes have whole GB
        name = f"vd{chr(ord('a') + number)}" if number else "disk"
        if number and not size:  # as all after it
            do = functools.partial(remove_disk, number=len(sizes))
            yield step("remove", f"{name} of {there / GIB:g} GB", do, restart=True, loses=True)
        elif number and not there:
            yield step("add", f"disk of {size} GB", functools.partial(add_disk, gigabytes=size))
        elif size and size * GIB != there:
            do = functools.partial(grow_disk, gigabytes=size, number=number)
            yield step("grow" if size * GIB > there else "shrink", f"{name} {there / GIB:g} → {size} GB", do)
    if vm.halted:
        yield step("start", "")


def plan_group(cloud: Cloud, group: str, requests: Sequence[CloneRequest], replace: bool, force: bool) -> list[Step]:
    """The plan for a group, all of which can be done as far as that is known before."""
    checked_group(group)
    templates = {}
    for request in requests:
        try:
            templates[request.template] = look(cloud.tree.need_template(request.template))
        except NotFound as error:
            error.text = f"{request.origin}: {error.text}"
            raise
    steps = plan(requests, [look(vm) for vm in cloud.tree.vms(group)], templates)
    anew = [step.vm for step in steps if step.verb == "replace" and replace]
    steps = [step for step in steps if step.verb == "replace" or step.vm not in anew]
    for number, step in enumerate(steps):
        if step.verb == "replace" and not replace:
            steps[number] = Step("keep", step.name, f"{step.text} (--replace)")
    asked = requests_for("replace", steps) + requests_for("create", steps)
    gone = [step for step in steps if step.verb in ("destroy", "replace")]
    freed = [host for step in gone for _, host, _ in parse_ports(step.vm.get("vmPorts"))]
    check_requests(cloud, group, asked, force, freed)
    for step in steps:
        if step.request and step.verb == "change":
            check_shares(cloud.config, step.vm, step.request.settings.get("vmShares", ""))
    return steps


def requests_for(verb: str, steps: Sequence[Step]) -> list[CloneRequest]:
    return [step.request for step in steps if step.verb == verb and step.request]


def describe(cloud: Cloud, group: str) -> Iterator[str]:
    """The lines of a description of which a group is what it says; what none can say of a VM is in comments."""
    found, templates, sets = [look(vm) for vm in cloud.tree.vms(group)], dict[str, Present](), list[list[Present]]()
    for vm in found:
        if not vm.template:
            raise WrongState("it stands on no template: no description can say what it is", vm=vm.vm)
        templates[vm.template] = templates.get(vm.template) or look(cloud.tree.need_template(vm.template))

    def stem(vm: Present) -> str:
        return vm.name.rstrip("0123456789")

    def key(vm: Present) -> tuple[object, ...]:
        return vm.type, vm.template, options_of(vm, templates[vm.template]), vm.unnamed or stem(vm)

    def order(vm: Present) -> Any:
        return *map(str, key(vm)), parse_ports(vm.settings["vmPorts"]) if vm.unnamed else (len(vm.name), vm.name)

    for vm in sorted(found, key=order):
        last = sets[-1] if sets else []
        ports = last and result_of(functools.partial(numbered_ports, last[0].settings["vmPorts"]), len(last))
        if last and key(last[0]) == key(vm) and ports == vm.settings["vmPorts"]:
            last.append(vm)
        else:
            sets.append([vm])
    for these in sets:
        vm, prefix, names = these[0], stem(these[0]), [each.name for each in these]
        alike = {each.name for each in found if prefix and stem(each).lower() == prefix.lower()}
        is_whole = alike == {f"{prefix}{number:02d}" for number in range(len(these))}
        name = "" if vm.unnamed else "name=" + (prefix if is_whole else ",".join(names if names[1:] else [*names, ""]))
        ports = vm.settings["vmPorts"] and f"port={vm.settings['vmPorts'].replace('127.0.0.1:', '')}"
        options = ";".join(filter(None, (name, options_of(vm, templates[vm.template]), ports)))
        yield f"{vm.template}:{len(these)}:{vm.type}:{options}"
        template = templates[vm.template].vm
        for each in these:
            own = ((row.key, each.vm.get(row.key)) for row in SETTINGS if row.inherited and row.key not in DESCRIBED)
            yield from (f"# {each.name}: {key}={value}" for key, value in own if value != template.get(key))


def options_of(vm: Present, template: Present) -> str:
    """What a description says of a VM but its name and ports."""
    own = [(each, vm.settings[key]) for key, each in DESCRIBED.items() if vm.settings[key] != template.settings[key]]
    words = [f"{each.name}={value}" for each, value in own if each.metavar and each.sets != "vmPorts"]
    words += [each.name for each, value in own if value == "yes" and not each.metavar]
    if vm.sizes[:1] != template.sizes[:1] and vm.sizes and not vm.sizes[0] % GIB:
        words.append(f"disk={vm.sizes[0] // GIB}")
    if vm.sizes[1:]:
        words.append("dsk=" + ",".join(str(-(-size // GIB)) for size in vm.sizes[1:]))
    if vm.user_data and vm.user_data != default_user_data():
        words.append(f"user-data={vm.vm.user_data_file}")
    return ";".join(words)


# -- doing it, for who holds the VM's lock


def change_settings(cloud: Cloud, vm: VM, changes: Mapping[str, str]) -> None:
    """Set what its conf says; its ports are these at once."""
    if "vmPorts" in changes:
        set_ports(cloud, vm, parse_ports(changes["vmPorts"]))
    vm.write_conf({key: value for key, value in changes.items() if key != "vmPorts"})


def set_ports(cloud: Cloud, vm: VM, wanted: Sequence[tuple[str, int, int]]) -> Sequence[tuple[str, int, int]]:
    """Publish these ports of a VM and no others, at once where it runs; the new ones."""
    has, forwarder = parse_ports(vm.get("vmPorts")), cloud.forwarders[cloud.network_kind(vm)]
    with contextlib.ExitStack() as stack:
        if vm.is_running():
            forwarder.mend(vm)  # of a VM that was started by hand, perhaps
            stack.callback(forwarder.mend, vm)  # where it fails since another has a port, these are what they were
        stack.enter_context(cloud.tree.lock())
        kept, new = [each for each in has if each in wanted], [each for each in wanted if each not in has]
        for ip, host, _ in [each for each in has if each not in wanted and vm.is_running()]:  # else another may have it
            forwarder.ask(f"drop {ip}:{host}")
        new = free_ports(cloud.tree, new)
        listeners = forwarder.open(stack, new)
        if vm.is_running():
            forwarder.serve(vm, listeners)
        vm.write_conf({"vmPorts": join_ports([*kept, *new])})
    return new


def grow_disk(cloud: Cloud, vm: VM, gigabytes: int, number: int = 0) -> None:
    """Make a disk larger, while it runs too; never smaller, and never under the clones of a template."""
    disk = vm.disks()[number] if number < len(vm.disks()) else ""
    if not os.path.exists(disk):
        raise Error(f"its disk is gone: {disk}", f"see vmDisk in {vm.conf_file}", vm=vm)
    format = known_formats(vm)[number]
    size = image_info(disk, format)["virtual-size"]
    if gigabytes * GIB < size:
        raise Error(f"its disk has {size / GIB:g} GB and never shrinks", "-d takes a larger size, in GB", vm=vm)
    if gigabytes * GIB > size:
        if vm.is_template:
            check_no_clones(cloud, vm)
        set_writable(disk, True)
        with QMP(vm.folder) if vm.is_running() else contextlib.nullcontext() as qemu:
            node = nodes_of(qemu, vm, devices=True).get(os.path.realpath(disk)) if qemu else None
            if qemu and node:
                qemu.execute("block_resize", node_name=node, size=gigabytes * GIB)
            else:
                run(["qemu-img", "resize", "-q", "-f", format, disk, f"{gigabytes}G"])


def add_disk(cloud: Cloud, vm: VM, gigabytes: int) -> None:
    """Make another disk, and plug it in where the guest runs and has a port for it; else it is there at its next start.
    Its conf names it before the guest has it: what a guest has written to is never forgotten."""
    disks, plugged = vm.disks(), vm.number("vmPlugged")
    if len(disks) >= MAX_DISKS:
        raise UsageError(f"it has {len(disks)} disks, {MAX_DISKS} is the most", vm=vm)
    names = (vm.disk_name(number, cloud.config["vmDiskExt"]) for number in range(len(disks), 1000))
    name = next(name for name in names if not os.path.lexists(vm.file(name)))
    create_disk(vm.file(name), gigabytes)
    extra = ",".join(filter(None, (vm.get("vmExtraDisk"), vm.relative(name))))
    conf = {"vmExtraDisk": extra, "vmDiskFormat": ",".join([*known_formats(vm), "qcow2"])}
    with QMP(vm.folder, 60) if vm.is_running() else contextlib.nullcontext() as qemu:
        ports = HOTPLUG_PORTS if vm.get("vmLayout") != "1" and "q35" in vm.get("vmMachine") else 0
        there = nodes_of(qemu, vm, devices=True) if qemu and plugged < ports else {}
        fits = there and all(os.path.realpath(disk) in there for disk in disks)  # none before it is yet to come
        vm.write_conf({**conf, "vmPlugged": str(plugged + 1)} if fits else conf)
        if qemu and fits:
            plug_disk(qemu, len(disks), plugged, name, "qcow2", f"{vm.name}_{len(disks)}")
        elif qemu:
            report.say(f"{report.program}: {vm} has its new disk at its next start")


def check_removal(cloud: Cloud, vm: VM, number: int) -> None:
    """Raise where a disk can't be taken away from a VM now."""
    need_stopped(cloud, vm)
    disks = vm.disks()
    if not 0 < number < len(disks):
        raise UsageError(f"it has no disk {number}", f"it has {plural(len(disks), 'disk')}, the first one is 0", vm=vm)
    if snapshots_of(vm):
        raise WrongState("its snapshots have that disk, too", f"vmsnapshot --delete NAME -n {vm}", vm=vm)


def remove_disk(cloud: Cloud, vm: VM, number: int) -> None:
    """Take a disk away from a VM that is switched off, with what is on it."""
    check_removal(cloud, vm, number)
    disk, names, formats = vm.disks()[number], vm.get("vmExtraDisk").split(","), [*known_formats(vm)]
    del names[number - 1], formats[number]
    vm.write_conf({"vmExtraDisk": ",".join(names), "vmDiskFormat": ",".join(formats)})
    for path in own_chain(vm, disk):
        remove_file(path)


def move_vm(cloud: Cloud, vm: VM, group: str, type: str, name: str) -> VM:
    """Give a VM that is off another group, type or name; it, there.  Disks, keys, address and UUID stay.  Up to the
    rename it is what it was: a conf under the new name, whose disks are found in either place, is there before."""
    tree, new = cloud.tree, VM(cloud.tree, checked_group(group), checked_name("type", type), checked_name("VM", name))
    with FolderLock(vm.folder):
        need_stopped(cloud, vm)
        if vm.is_template or snapshots_of(vm):
            raise WrongState("a template, or a VM with snapshots, stays what it is called, and where it is", vm=vm)
        with tree.lock():
            check_collision(tree, group, type)
            others = [each for each in (*tree.unfinished(group), *tree.vms(group)) if each.folder != vm.folder]
            if name.lower() in (each.name.lower() for each in others):
                raise UsageError(f"{group}: there is a VM {name} in it", "choose another name")
            if others and group_network(cloud, group) != cloud.network_kind(vm):
                raise WrongState(f"the VMs of {group} are on another network than it", vm=vm)
            changes = {"vmName": name}
            for key in ("vmDisk", "vmExtraDisk"):
                here, disks = (f"{vm.folder}/", f"{vm.full_name}/"), vm.get(key).split(",")
                changes[key] = ",".join(disk.removeprefix(here[0]).removeprefix(here[1]) for disk in disks)
            text = update_assignments(read_text(vm.conf_file), changes)
            write_file(vm.file(os.path.basename(new.conf_file)), text, os.stat(vm.conf_file).st_mode & 0o644)
            if name != vm.name:
                write_file(vm.configured_file, vm.name)
                if os.path.exists(vm.command_file):  # that tells that it has been started
                    os.replace(vm.command_file, vm.file(os.path.basename(new.command_file)))
            os.makedirs(os.path.dirname(new.folder), exist_ok=True)
            os.rename(vm.folder, new.folder)
            sync(os.path.dirname(new.folder))
            remove_if_empty(tree, vm.group)
        if name != vm.name:
            for path in (vm.conf_file, vm.log_file):
                remove_file(new.file(os.path.basename(path)))
    cloud.network_of(new).withdraw([*filter(None, [new.get("vmUuid")])])
    if cloud.network_kind(new) == "bridge":
        cloud.network_of(new).publish(new)
    SshConfig(cloud).refresh()
    return new


def apply_lock(tree: Tree, group: str) -> str:
    """The folder that is locked while a description is applied to a group."""
    return os.path.join(tree.base, f".apply-{group}")


def carry_out(
    cloud: Cloud, group: str, steps: Sequence[Step], restart: bool, wait: Callable[[Sequence[VM]], list[Error]]
) -> list[Error]:
    """Do what a plan says; the errors.  What has VMs off for a while is done one VM at a time, up to the first error.
    `restart`: what needs a restart, too; `wait`: for what has been started."""

    def make(requests: list[CloneRequest]) -> list[Error]:
        made, failed = instantiate(cloud, group, requests) if requests else ([], [])
        return failed + wait(made)

    errors = destroy_all(cloud, [step.vm for step in steps if step.verb == "destroy"])
    for step in steps:
        if step.do and not step.restart:
            errors += filter(None, [result_of(functools.partial(change, cloud, steps=[step]), step.vm)])
    halted = [step.vm for step in steps if step.verb == "start"]
    errors += start_stopped(cloud, halted) if halted else []
    errors += wait([vm for vm in halted if vm.is_running()]) + make(requests_for("create", steps))
    for step in steps:
        if step.verb == "replace" and not errors:
            errors += destroy_all(cloud, [step.vm]) + make(requests_for("replace", [step]))
    for vm in dict.fromkeys(step.vm for step in steps if step.restart):
        if not restart:
            report.say(f"{report.program}: {vm} needs a restart for that: --restart, or vmapply while it is off")
        elif not errors:
            its = [step for step in steps if step.vm is vm and step.restart]
            error = result_of(functools.partial(change, cloud, steps=its, restart=True), vm)
            errors += [error] if error else wait([vm])
    return errors


def change(cloud: Cloud, vm: VM, steps: Sequence[Step], restart: bool = False) -> None:
    """Do what a plan has for a VM, which is restarted for it if that is wanted."""
    with FolderLock(vm.folder):
        vm.reread()
        if restart and vm.is_running():
            remove_file(vm.command_file)  # of one that isn't there a plan says that it is to be started
            seconds = cloud.config.number("vmStopTimeout")
            if not stop_locked(vm, seconds):
                report.warn(f"no shutdown within {seconds} s, switched off: {vm.name}")
        if not vm.is_running():
            need_stopped(cloud, vm)
        for step in steps:
            if step.do:
                step.do(cloud, vm)
        if restart:
            raise_first(start_all(cloud, [vm], held=True))


# Work in a template's guest ##########################################################################
#
# A template, or one that is being made, is booted for a while and shut down properly.  Its qemu ends with this command,
# however that ends; a layer counts only once the work is done.


class OwnGuest(contextlib.AbstractContextManager["OwnGuest"]):
    """A guest that runs for nocloud's own work in it, on a layer or its VM's disk; `with` leaves it switched off."""

    def __init__(self, cloud: Cloud, vm: VM, layer: Layer | None = None, memory: str = "", **settings: str) -> None:
        """Boot it, its memory in this file, with these settings.  The caller holds its lock, and it is stopped."""
        self.cloud, self.vm, self.layer = cloud, vm, layer
        self.keys = ssh_key_options(is_planted(vm))
        give_identity(cloud, vm)
        with cloud.network_of(vm).hold():
            machine = describe_machine(cloud, vm, layer=layer)
            self.machine = machine.but(memory=memory, settings={**machine.settings, **settings})
            start_locked(cloud, vm, self.machine, tied=True)
        self._process = Process(vm.state()[1])

    def wait(self, until: Callable[[Wait], None] = wait_ready) -> Wait:
        """Return when it is ready for what is to be done in it, and its host key is known."""
        wait = Wait(self.cloud, self.vm, self.cloud.config.number("vmWaitTimeout"), say=True)
        until(wait)
        pin_host_key(wait)
        return wait

    def run(self, script: str, seconds: float, on_line: Callable[[str], None] = lambda line: None) -> tuple[int, str]:
        """Run a script in it, giving each line that it writes to `on_line`; (its status, 255 where ssh failed, what it
        says last).  Raises TimedOut after `seconds`."""
        words = ssh_argv(self.cloud, self.vm, BATCH, keys=self.keys)
        tied = tie([need_program(words[0]), *words[1:], script])
        status, said = run_watched(tied, on_line, timeout=seconds, host=self._process)
        if status and not self.vm.is_running():
            raise WrongState("its guest ended in the middle of the work", f"see {self.vm.console_log}", vm=self.vm)
        return status, said

    def output(self, script: str, seconds: float = 120) -> str:
        """What a script says in it.  Raises Error where its status isn't 0."""
        status, said = self.run(script, seconds)
        if status:
            raise Error(last_line(said) or describe_status(status), vm=self.vm)
        return said

    def finish(self) -> None:
        """Take out what a clone must not inherit, and end it properly: that makes its layer count.  Raises Error."""
        self.output(cleaning_script(self.vm))
        forget_guest(self.cloud, self.vm)
        if self.layer:
            self.layer.arm()
        seconds = max(SHUTDOWN_SECONDS, self.cloud.config.number("vmStopTimeout"))
        if not press_power_button(self.vm, self._process, seconds):
            raise Error(f"its guest did not shut down within {seconds} s", f"see {self.vm.console_log}", vm=self.vm)

    def __exit__(self, *exc: object) -> None:
        with self._process as process:
            if not process.ended():
                pull_the_plug(self.vm, process)
        remove_runtime_files(self.vm)


@contextlib.contextmanager
def guest_on_layer(cloud: Cloud, template: VM, ram: bool = False, **asked: str) -> Iterator[tuple[OwnGuest, Layer]]:
    """A stopped template's guest on a new layer, settled in the end.  `ram`: its memory in the layer's file."""
    with FolderLock(template.folder):
        need_stopped(cloud, template)
        layer = new_layer(template)
        try:
            guest = OwnGuest(cloud, template, layer, os.path.basename(layer.memory) if ram else "", **asked)
        except BaseException:
            layer.remove()
            raise
    try:
        with guest:
            yield guest, layer
    finally:
        with FolderLock(template.folder):
            settle(cloud, template, warn=False)


def forget_guest(cloud: Cloud, vm: VM) -> None:
    """What is known of a guest that has been cleaned: its name is to be set again, its host key may be another."""
    remove_file(vm.configured_file)
    remove_file(vm.mounted_file)
    if not is_planted(vm):
        cloud.known_hosts.update({}, [vm.get("vmUuid")])


def cleaning_script(vm: VM) -> str:
    """Takes out of a guest what makes it this one: a clone must make, or be given, its own.  Login keys and
    the host key go where each clone gets them planted; elsewhere the clones need what is there."""
    planted = is_planted(vm)
    keys = "\n".join(line.split()[1] for line in login_keys()) if planted else ""
    return guest_script("clean.sh", True, PLANTED="yes" if planted else "", KEYS=keys, INIT=vm.get("vmInit"))


def clean_at_shutdown(cloud: Cloud, template: VM) -> None:
    """Have a guest with systemd clean itself when it shuts down, perhaps without us; vmstop alone cleans others."""
    unit = need_packaged("guest/nocloud-clean.service")
    script = guest_script("clean-at-shutdown.sh", True, SCRIPT=cleaning_script(template), UNIT=unit)
    ssh_batch(cloud, template, script, 60)


def clean_running(cloud: Cloud, template: VM) -> None:
    """Clean a template that runs and is about to be shut down, where its guest lets us in."""
    network = cloud.network_of(template)
    address = network.address(template)
    try:
        reached = bool(address) and stage_of_port(network, address) == "configured"
        if reached and cloud.known_hosts.knows(template.get("vmUuid")):
            status, output = ssh_batch(cloud, template, cleaning_script(template), 60)
            forget_guest(cloud, template)
            if status and is_planted(template):
                raise Error(last_line(output))
    except Error as error:
        report.warn(f"{template}: it keeps what tells it from others: {error.text}")


def stop(cloud: Cloud, vm: VM, seconds: float) -> bool:
    """Shut a VM down: the power button, and after `seconds` the plug (0: at once).  False where it had to be pulled.
    Raises WrongState where it can't be told whether it runs."""
    with FolderLock(vm.folder):
        if vm.is_template and seconds > 0 and vm.is_running():
            clean_running(cloud, vm)
        proper = stop_locked(vm, seconds)
        if vm.is_template:
            settle(cloud, vm)
        return proper


def stop_all(cloud: Cloud, vms: Sequence[VM], seconds: float | None = None) -> list[Error]:
    """Stop VMs in parallel; one warning line names those whose plug had to be pulled.  `seconds`: by default
    vmStopTimeout, and longer for a template on a layer, which would be lost."""
    cloud.private.used = True
    settle_stopped(cloud, (vm for vm in vms if vm.is_template))
    running = [vm for vm in vms if vm.state()[0] != "stopped"]
    with contextlib.suppress(Error):  # a guest that can't be reached isn't cleaned, but stopped all the same
        for kind in {cloud.network_kind(vm) for vm in running if vm.is_template and vm.is_readable()}:
            cloud.networks[kind].open()  # before there are threads
    usual = cloud.config.number("vmStopTimeout") if seconds is None else seconds
    longer = seconds is None and 0 < usual < SHUTDOWN_SECONDS
    graces = {vm: SHUTDOWN_SECONDS if longer and vm.is_template and runs_on_layer(vm) else usual for vm in running}
    results = in_parallel(lambda vm: stop(cloud, vm, graces[vm]), running, workers=len(running) or 1)
    for grace in dict.fromkeys(graces.values()):
        pulled = [vm.name for vm, result in zip(running, results) if graces[vm] == grace and result is False]
        if pulled and grace:
            report.warn(f"no shutdown within {grace:.0f} s, switched off: {', '.join(pulled)}")
    return [result for result in results if isinstance(result, Error)]


# The scripts of etc/guest/upgrade; a system's is that of the ID, or else an ID_LIKE, of its os-release(5).
UPGRADES = ("debian", "arch", "fedora", "suse", "alpine")
UPGRADE_SECONDS = 3 * 3600  # emulated guests are slow


def upgrade_script(name: str, release: Mapping[str, str]) -> str:
    """What upgrades a guest of that os-release.  Raises Error where nobody has said how that is done."""
    id = release.get("ID", "")
    for word in (id, *release.get("ID_LIKE", "").split()):
        if word in UPGRADES:
            return guest_script(f"upgrade/{word}.sh", True, ID=id)
    shown = release.get("PRETTY_NAME") or release.get("ID") or "without /etc/os-release"
    hint = f"upgrade it by hand: vm -n {name}, then vmstop -n {TEMPLATES}/{name}"
    raise Error(f"{name}: its system is {printable(shown)}: nocloud doesn't know how to upgrade that", hint)


def upgrade(cloud: Cloud, name: str, seconds: float) -> None:
    """Upgrade a template's system on a layer, which becomes its disk when all went well; else it is as it was."""
    template = cloud.tree.need_template(name)
    with guest_on_layer(cloud, template) as (guest, layer):
        try:
            guest.wait()
            release = parse_os_release(guest.output(guest_script("os-release.sh")))
            script = upgrade_script(name, release)
            report.say(f"{report.program}: {template}: upgrading {release.get('PRETTY_NAME') or release['ID']}")
            try:
                status, _ = guest.run(script, seconds, lambda line: report.say(line.rstrip("\r").rpartition("\r")[2]))
            except TimedOut:
                text = f"no end of the upgrade after {seconds:.0f} s"
                raise TimedOut(text, "--timeout S gives it longer", vm=template) from None
            if status:
                raise Error(f"the upgrade failed: {describe_status(status)}", vm=template)
            guest.finish()
        except Error as error:
            error.text += "; the template is as it was"
            raise
    if os.path.basename(template.disks()[0]) != layer.name:
        raise Error("its guest did not end well; the template is as it was", f"see {template.console_log}", vm=template)
    with FolderLock(template.folder):
        flatten(cloud, template)


REST_SECONDS = 30  # systemd ends what belongs to a login that is over after 10


def freeze(cloud: Cloud, name: str, asked: Mapping[str, str]) -> Layer:
    """Boot a template once, plant the agent, have its guest come to rest, and keep that in a layer for clones to wake
    up on; the manifest makes it count.  `asked`: memory and processors, which its clones start with from then on."""
    template = cloud.tree.need_template(name)
    if template.get("vmInit") != "systemd":
        text = f"{name}: its vmInit is {template.get('vmInit')}: only guests with systemd can be told who they are"
        raise UsageError(text, "vmtemplate NAME --build SUITE makes such a template")
    if template.get("vmArch") != "x86_64":
        raise Error(f"{name}: it is for {template.get('vmArch')}: only x86_64 guests can be frozen", "its clones boot")
    if yes_no(template.get("vmTpm")) == "yes":
        raise UsageError(f"{name}: it has a TPM, which no two clones must share: they boot")
    what, size = "its memory, in a file, takes up to {} MB", int(asked.get("vmMem") or template.get("vmMem"))
    check_room(template.folder, (size + 256) * MIB, cloud.tree.base, what, ROOM_HINT)
    with guest_on_layer(cloud, template, True, **asked, vmLayout=LAYOUT, vmBalloon="no") as (guest, layer):
        guest.wait()
        report.say(f"{report.program}: {template} is ready; it comes to rest, and its memory is kept")
        token = os.urandom(16).hex()
        words = {"AGENT": need_packaged("guest/agent.py"), "MAC": template.get("vmMac"), "TOKEN": token}
        guest.output(guest_script("freeze.sh", True, **words, PATIENCE=REST_SECONDS))
        with QMP(template.folder, 600) as qemu, open(layer.state, "xb") as state:
            qemu.execute("set_link", name="net0", up=False)
            said = talk(template, _json({"token": token}).replace(b"\n", b" ") + b"\n", REST_SECONDS + 60)
            if said != "at rest":
                raise Error(f"the agent in it said: {printable(said) or 'nothing'}", vm=template)
            qemu.execute("stop")
            migrate(qemu, state.fileno(), shared=True)
        for path in (layer.memory, layer.state, layer.path):
            os.chmod(path, 0o600)
            sync(path)
        facts = {"machine": frozen_facts(guest.machine), "memory": memory_facts(layer), "token": token}
        write_file(layer.manifest, json.dumps({**facts, "sha256": file_digest(layer.memory)}))
    if asked:
        with FolderLock(template.folder):
            template.write_conf(asked)
    return layer


# -- templates of VMs


def template_from_vm(cloud: Cloud, name: str, words: str, asked: Mapping[str, str], layered: bool, clean: bool) -> VM:
    """A template of a VM, or a template, that is stopped, or of VM@SNAPSHOT: of its system disk and its settings.
    `asked`: settings that it is to have instead; `layered`: it stands on what the VM's disk stands on; `clean`: it is
    booted once, as itself and on no one's disk, to take out what clones must not inherit."""
    words, at, kept = words.partition("@")
    source = cloud.tree.need(words)
    if at and not kept:
        raise UsageError(f"--from {words}@: the snapshot's name is empty", "vmsnapshot -L lists them")
    with NewTemplate(cloud, name) as new:
        with FolderLock(source.folder):
            if kept:
                source = need_snapshots([source], kept)[0].source()
            else:
                need_stopped(cloud, source)
            copy_disk(source, new, layered)
            settings = {"vmInit": "auto", **source.inherited(), **asked}
            new.write_conf(settings)
            place, own = Snapshot(source, kept).folder if kept else source.folder, new.vm.variables_file
            if os.path.exists(variables := os.path.join(place, os.path.relpath(own, new.vm.folder))):
                copy_variables(variables, "qcow2", own)
        if len(source.disks()) > 1:
            left = ", ".join(map(os.path.basename, source.disks()[1:]))
            report.warn(f"{name}: a template has a system disk only, these are left out: {left}")
        if clean:
            hint = f"vmtemplate {name} --from {source.full_name} --no-clean takes it as it is"
            in_new_guest(cloud, new, OwnGuest.wait, hint)
        return new.finish({**settings, "vmSource": source.full_name + (kept and f"@{kept}")})


def template_as_is(cloud: Cloud, words: str) -> str:
    """A new template of a VM as it is now, running or not, for clones, as long as they stand on it; its name."""
    vm, moment = cloud.tree.need(words), f"clone-{os.urandom(3).hex()}"
    stem, taken = vm.full_name.replace("/", "."), names_in(os.path.join(cloud.tree.base, TEMPLATES))
    name = next(each for each in (stem, *(f"{stem}.{number}" for number in range(2, 1000))) if each not in taken)
    check_new_template(cloud.tree, name)
    report.say(f"{report.program}: {vm} is copied into the template {name}, which its clones stand on")
    if not vm.is_running():
        return template_from_vm(cloud, name, words, {}, False, True).name
    result_of(lambda vm: flush_guest(cloud, vm), vm)  # where it can't be asked: as after a power cut
    take_snapshot(cloud, [vm], moment, ram=False, flush_guests=False)
    try:
        return template_from_vm(cloud, name, f"{words}@{moment}", {}, False, True).name
    finally:
        with locked([vm]):
            delete_snapshot(Snapshot(vm, moment))


def copy_disk(source: VM, new: NewTemplate, layered: bool) -> None:
    """The system disk of a VM as that of a new template: one file, or an overlay on what the VM's disk stands on."""
    disk = source.disks()[0] if source.disks() else ""
    if not os.path.exists(disk):
        raise Error(f"its disk is gone: {disk}", f"see vmDisk in {source.conf_file}", vm=source)
    format = known_formats(source)[0]
    if not layered:
        check_room(new.vm.folder, converted_size(disk, format), new.cloud.tree.base, hint="free some disk space")
        compress_image(disk, format, new.disk)
        return
    chain = [os.path.realpath(disk), *source.below()]
    own = 1 if source.is_template else len(own_chain(source, disk))  # files that nobody else stands on
    if own == len(chain):
        raise WrongState("its disk stands on no other, there is nothing to share", "leave out --layer", vm=source)
    backing = os.path.relpath(chain[own], os.path.realpath(new.vm.folder))  # as deep in the tree as where it will lie
    kind = image_info(chain[own - 1], "qcow2").get("backing-filename-format") or disk_format(chain[own])
    convert_image(disk, format, new.disk, "-B", backing, "-F", kind)


def in_new_guest(cloud: Cloud, new: NewTemplate, work: Callable[[OwnGuest], object], hint: str) -> None:
    """Boot a template that is being made, on an identity that is thrown away after it, and do `work` in its guest.
    Then it is cleaned and shut down.  Nothing is left of that in its folder but the disk and the conf."""
    vm = new.vm
    vm.write_conf({"vmUuid": new_identity(set())[0]})
    try:
        with OwnGuest(cloud, vm) as guest:
            work(guest)
            guest.finish()
    except Error as error:
        error.vm, error.hint = error.vm or vm, "; ".join(filter(None, (error.hint, hint)))
        raise
    finally:
        forget_identity(cloud, [vm.get("vmUuid")])
        remove_tree(vm.tpm_folder)
        for name in names_in(vm.folder):
            if os.path.isdir(path := vm.file(name)) and path != vm.firmware_folder:
                remove_tree(path)
            elif path not in (new.disk, vm.conf_file, vm.firmware_folder):
                remove_file(path)


def take_over(cloud: Cloud, new: NewTemplate, key: tuple[str, str]) -> None:
    """Plant the user's keys and ours in a classic image, and take publishers_key() out, as the bash tools did."""
    path, public = key

    def work(guest: OwnGuest) -> None:
        guest.keys = ssh_options(IdentityFile=ssh_path(path), IdentitiesOnly="yes")
        for seconds in guest.wait(wait_ssh).tries():
            status, said = guest.run("true", seconds)
            if not status:
                break
            if "Permission denied" in said:
                raise Error(f"no key lets {guest.vm.get('vmUser')} in: {last_line(said)}", vm=guest.vm)
        guest.output(guest_script("plant-keys.sh", KEYS="\n".join(login_keys())))
        guest.keys = ssh_key_options(True)  # from here on ours opens it, which proves that it can
        guest.output(guest_script("remove-key.sh", True, KEY=public))

    in_new_guest(cloud, new, work, f"is {path} the key of its publisher?")


# Consoles ############################################################################################
#
# A VM's screen in a viewer, its serial line in this terminal, what it wrote there, and qemu's monitor.  The terminal's
# modes are put back however that ends.

VIEWERS = {  # by what the screen speaks; TigerVNC's vncviewer takes a path, remote-viewer does VNC over TCP only
    "spice": (("remote-viewer", "spice+unix://"), ("spicy", "--uri=spice+unix://")),
    "vnc": (("vncviewer", ""),),
}
VIEWER_SECONDS = 5.0  # a viewer that runs for so long without a word is up, whether qemu says so or not


def has_display() -> bool:
    """Whether a window can be opened here."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def need_ours(vm: VM, what: str) -> None:
    """Raise where the bash tools started it."""
    if foreign_qemu(vm):
        hint = f"vmmanage -n {vm} is its monitor; started anew, by vm or vmrun -r, it has one"
        raise WrongState(f"nocloud didn't start it, so its {what} isn't at hand", hint, vm=vm)


def open_screen(vm: VM) -> None:
    """Open a running VM's screen in a window, which stays; up when this returns.  Error has the viewer's words."""
    screen, place = screen_of(vm), os.open(vm.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    path, log = vm.file(f"{screen}.sock"), vm.file("viewer.log")
    # A socket's path has at most 107 bytes, and the viewers differ in how they read odd characters of a URI.
    if len(os.fsencode(path)) > 107 or not re.fullmatch(r"[A-Za-z0-9/._-]+", path):
        path = f"/proc/self/fd/{place}/{screen}.sock"
    try:
        if not (viewers := [(program, before + path) for program, before in VIEWERS[screen] if find_program(program)]):
            names = [program for program, _ in VIEWERS[screen]]
            raise MissingProgram(f"no viewer for its screen: {' or '.join(names)} is needed", install_command(names[0]))
        remove_file(log)
        child = spawn(viewers[0], log=log, cwd="/", pass_fds=[place])
    finally:
        os.close(place)
    wait_for(lambda: child.poll() is not None or has_viewer(vm), VIEWER_SECONDS, 0.1)
    if child.returncode:
        said = last_line(read_tail(log)) or describe_status(child.returncode)
        raise Error(f"{viewers[0][0]}: {said}", f"its serial console: vmconsole -s -n {vm}", vm=vm)


def has_viewer(vm: VM) -> bool:
    """Whether a viewer is connected to the VM's screen."""
    screen = screen_of(vm)
    known = (ask_qemu(vm, f"query-{screen}", 1.0) if screen else None) or {}
    return bool(known.get("channels") or known.get("clients"))


def open_screens(vms: Sequence[VM]) -> None:
    """Open the screens of those that have one; without a display that is said, and they go on without a window."""
    if (shown := [vm for vm in vms if screen_of(vm)]) and not has_display():
        names = ", ".join(vm.name for vm in shown[:10]) + (" …" if len(shown) > 10 else "")
        way = f"vmconsole -s -n {shown[0]} is its serial console"
        report.say(f"{report.program}: no display here, no window for {names}: {way}")
        return
    for error in filter(None, in_parallel(open_screen, shown)):
        report.warn(str(error))


def screenshot(vm: VM) -> bytes:
    """The screen of a running VM, which each has, as a PNG."""
    need_ours(vm, "screen")
    name = f"screenshot.{os.urandom(3).hex()}.tmp"
    try:
        with QMP(vm.folder) as qemu:
            qemu.execute("screendump", filename=name)  # in its folder, for its user only
        with open(vm.file(name), "rb") as file:
            return png_of(file.read())
    finally:
        remove_file(vm.file(name))


def png_of(ppm: bytes) -> bytes:
    """A PNG (RFC 2083) of a PPM of 8 bits, which every qemu writes; PNG only since 7.1, and where built with libpng."""
    with Parsing(Error, "qemu: what it wrote of its screen is no PPM"):
        kind, size, depth, pixels = ppm.split(b"\n", 3)
        width, height = map(int, size.split())
        if (kind, depth, len(pixels)) != (b"P6", b"255", 3 * width * height):
            raise ValueError
    rows = (pixels[at : at + 3 * width] for at in range(0, len(pixels), 3 * width))
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),  # 8 bits; 2: red, green, blue
        b"IDAT" + zlib.compress(b"".join(b"\0" + row for row in rows)),  # 0: no filter
        b"IEND",
    )
    framed = (struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


# -- the serial console and the monitor, on stdin and stdout

SERIAL_LEAVE = b"[\x1d]"  # Ctrl-], as telnet's
MONITOR_LEAVE = b"[\x04\x1d]"  # Ctrl-D too
# Ctrl-C drops a line.  qemu's editor doesn't know it, but what goes to the end and takes words away (util/readline.c).
CTRL_C, DROP_LINE = b"\x03", b"\x05" + b"\x17" * 64 + b"\r"
LINE_QUIET = 2.0  # where stdin is no terminal, the session ends when the guest has said nothing for so long after it


def connect_line(vm: VM, name: str, what: str) -> socket.socket:
    """A line of qemu's, by its socket.  It serves one client, and the next would wait in silence: so that is asked."""
    with QMP(vm.folder) as qmp:
        devices = {each["label"]: each["filename"] for each in qmp.execute("query-chardev")}
    if not devices[f"{name}0"].startswith("disconnected:"):
        raise WrongState(f"its {what} is open elsewhere already", "only one at a time can have it", vm=vm)
    return connect_unix(vm.folder, f"{name}.sock", 5.0)


def join_line(vm: VM, connection: socket.socket, greeting: str, leave: bytes, drop: bytes = CTRL_C) -> None:
    """Join a line to stdin and stdout; a terminal is raw meanwhile, also when a SystemExit passes.  `drop`: what Ctrl-C
    stands for.  TCSANOW: the other ways wait until the terminal has shown everything, which a stopped one never has."""
    with connection:
        if not os.isatty(0):
            ended = relay_line(connection, leave, drop)
        else:
            report.say(f"{report.program}: {greeting}")
            modes = termios.tcgetattr(0)
            try:
                tty.setraw(0, termios.TCSANOW)
                ended = relay_line(connection, leave, drop)
            finally:
                termios.tcsetattr(0, termios.TCSANOW, modes)
            report.say("")
    if ended:
        report.say(f"{report.program}: {vm} has ended")


def relay_line(connection: socket.socket, leave: bytes, drop: bytes) -> bool:
    """Until a key that leaves, or silence after the end of stdin (False), or the end of the guest (True)."""
    for fd in (0, 1):
        os.set_blocking(fd, True)  # a terminal that another program shares may not be
    connection.setblocking(False)  # a guest that takes nothing mustn't keep what it says from being shown
    typed, more = b"", True
    while typed or more or not os.isatty(0):
        readers: list[socket.socket | int] = [connection, 0] if more and not typed else [connection]
        # Never without end: Python sees a signal that came just before the call only after it.
        readable, writable, _ = select.select(readers, [connection] if typed else [], [], LINE_QUIET)
        if not (typed or more or readable):
            break
        try:
            if writable:
                typed = typed[connection.send(typed) :]
            data = connection.recv(65536) if connection in readable else None
        except OSError:
            data = b""
        if data == b"":
            return True
        write_all(1, data or b"")
        if 0 in readable:
            try:
                data = os.read(0, 4096)
            except OSError:
                data = b""  # the terminal is gone
            before, *rest = re.split(leave, data, maxsplit=1)
            typed, more = before.replace(CTRL_C, drop), bool(data) and not rest
    return False


def log_pieces(process: Process | None, path: str, old: str = "") -> Iterator[bytes]:
    """A log, after what was in it before it became too long (`old`); then what comes until the process ends.  Where
    etc/console.sh empties it meanwhile, the rest of what it had is in `old`."""

    def rest(path: str, start: int) -> Iterator[bytes]:
        if os.path.exists(path):
            with open(path, "rb") as file:
                file.seek(start)
                yield from iter(lambda: file.read(65536), b"")

    with open(path, "rb", buffering=0) as log:  # a buffer would still have what was emptied
        yield from rest(old, 0)
        while True:
            ended = not process or process.ended(0.2)  # before the look, so that this is the last one
            if os.fstat(log.fileno()).st_size < log.tell():
                yield from rest(old, log.tell())
                log.seek(0)
            yield from iter(lambda: log.read(65536), b"")
            yield b""  # nothing more just now
            if ended:
                return


def for_terminal(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What a guest wrote, without what only its own terminal should obey."""
    decode, held = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
    unfinished = r"\r{0,9}(?:\x1b(?:\][^\x07\x1b]{0,99}\x1b?|[^A-Za-z]{0,20}))?\Z"
    for piece in pieces:
        text = without_escapes(held + decode(piece))
        held = re.findall(unfinished, text)[0]  # goes on in the next piece
        lines = re.split(r"\r+\n?|\n", text[: len(text) - len(held)])  # what overwrites a line is one of its own
        yield "\n".join(map(printable, lines)).encode()


MONITOR_SECONDS = 3600.0  # a savevm or a backup takes its time


def monitor_command(vm: VM, line: str) -> None:
    """One command for humans.  Raises Error with the monitor's words where it refuses.  A connection for each: qemu
    serves one at a time, and a vmstop must get through while someone sits here."""
    try:
        with connect_qemu(vm) as qemu:
            qemu.allow(MONITOR_SECONDS)
            answer = qemu.monitor(line).replace("\r\n", "\n").rstrip("\n")
    except QMPClosed:
        if line.strip() in ("q", "quit"):
            return
        raise
    # Only its words tell a complaint from an answer (monitor/hmp.c, hmp_handle_error).
    if answer.startswith(("unknown command:", "Error: ")) or answer.endswith("for more information"):
        raise Error("; ".join(answer.splitlines()), f"vmmanage -n {vm} help", vm=vm)
    if answer:
        report.data(answer)


def monitor_session(vm: VM) -> int:
    """qemu's own monitor in this terminal, where there is one and qemu has it; else commands from stdin, one a line.
    1 if one of those was refused that come from no terminal."""
    status, terminal = EXIT_DONE, os.isatty(0)
    greeting = f"qemu's monitor of {vm.name}; Ctrl-D leaves, `quit` switches {vm.name} off"
    if terminal and os.isatty(1) and os.path.exists(vm.file("monitor.sock")) and not foreign_qemu(vm):
        join_line(vm, connect_line(vm, "monitor", "monitor"), greeting, MONITOR_LEAVE, DROP_LINE)
        return EXIT_DONE
    if terminal:
        report.say(f"{report.program}: {greeting}")
    for line in filter(None, map(str.strip, sys.stdin)):
        try:
            monitor_command(vm, line)
        except QMPClosed:
            report.say(f"{report.program}: {vm} has ended")
            break
        except Error as error:
            status = EXIT_FAILED
            report.say(f"{report.program}: {error}")
    return EXIT_DONE if terminal else status


# Supervisor ##########################################################################################
#
# vmrun.  One loop sleeps until a signal, the end of a qemu or a worker wakes it; it alone keeps the state and
# writes the log.  Workers, threads that end, start, await and stop VMs; what they find out they post to the loop.


@contextlib.contextmanager
def managed(tree: Tree, group: str) -> Iterator[None]:
    """A vmrun's claim on a group: a pidfile in its folder, locked as long as we live; taken, given back and, after a
    SIGKILL, swept away under the tree's lock.  Raises WrongState where another vmrun has the group."""
    folder = os.path.join(tree.base, group)
    tree.prepare()
    with tree.lock():
        state, pid = manager_of(tree, group)
        if state != "stopped":
            who = f"vmrun (process {pid})" if pid else "a vmrun of another user"
            raise WrongState(f"{group}: {who} manages it already", f"vmrun -s {group} stops it")
        os.makedirs(folder, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(os.path.join(folder, MANAGER_PID), flags, 0o600)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tree.managed = group
    try:
        yield
    finally:
        with tree.lock():
            for name in (MANAGER_PID, MANAGER_LOG):
                remove_file(os.path.join(folder, name))
            os.close(fd)
            tree.managed = ""
            remove_if_empty(tree, group)


def go_to_background() -> tuple[int | None, int]:
    """Go on in a child, a session of its own, whose caller returns once all VMs are ready.  In the child (None, where
    let_caller_go() tells that); in the caller (exit status, -1), when the child has told it or ended."""
    hear, talk = os.pipe()
    if not (pid := fork_session()):
        os.close(hear)
        return None, talk
    os.close(talk)
    with open(hear, "rb") as pipe:
        try:
            said = pipe.read()
        except (KeyboardInterrupt, SystemExit) as stopped:
            # ^C and SIGTERM are meant for the child too; when the terminal goes away, SIGHUP, it goes on.
            if not isinstance(stopped, SystemExit) or stopped.code == 128 + signal.SIGTERM:
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
            raise
    return said[0] if said else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -1


def let_caller_go(talk: int, status: int, log_file: str) -> None:
    """In that child: let the caller go, and write to a log from now on.  In the foreground, -1: nothing."""
    if talk < 0:
        return
    sys.stdout.flush()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(log_file, flags, 0o600), "ab") as log, open(os.devnull, "rb") as null:
        for file, number in ((null, 0), (log, 1), (log, 2)):
            os.dup2(file.fileno(), number)
    with open(talk, "wb") as caller:
        caller.write(bytes([status]))


@record
class Member:
    """A running VM that the supervisor watches."""

    vm: VM
    process: Process
    ready: bool = False
    full: bool = False  # the disk under it is, so its guest is paused
    lost: bool = False  # it has lost a shared folder, which doesn't come back while it runs


# What the loop is about: the group runs; or vmrun ends, and its VMs are destroyed, stopped and kept, or left running.
RUN, DESTROY, KEEP, LEAVE = "run", "destroy", "keep", "leave"
LOOK_SECONDS = 2.0  # between looks at the tree for VMs that others started


class Supervisor:
    """The loop of one vmrun.  `on_ready` is called when all VMs are ready, or are known not to get ready."""

    def __init__(self, cloud: Cloud, group: str, end: str, on_ready: Callable[[int], None]) -> None:
        """Takes the signals over for good: none interrupts it again.  `end`: the goal that SIGINT and SIGTERM set."""
        self.cloud, self.group, self._end_goal = cloud, group, end
        self.goal = RUN
        self.status = EXIT_DONE
        self._on_ready: Callable[[int], None] | None = on_ready
        self._members: dict[str, Member] = {}
        self._jobs: set[Any] = set()  # the futures of workers
        self._starting, self._ending = True, RUN
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._progress = WaitProgress()
        self._posts: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        # What wakes it: bytes on a socket, of signals (their numbers) and workers' posts (0); and the end of a qemu
        self._bell, self._button = socket.socketpair()
        for each in (self._bell, self._button):
            each.setblocking(False)
        signal.set_wakeup_fd(self._button.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, frame: None)
        self._selector.register(self._bell, selectors.EVENT_READ, self._woken)

    def run(self, begin: Callable[[Callable[[VM], None]], list[Error]]) -> int:
        """Have `begin` start the VMs, telling each to its argument; watch the group to its end; the exit status."""

        def spawned(vm: VM) -> None:
            self._post(lambda: self._adopt(vm, f"of {vm.type} type has been spawned in {vm.group} group"))

        self._job(lambda: begin(spawned), self._begun)
        try:
            while not self._advance():
                seconds = 0.25 if cancellation.requested else None
                if self.goal == RUN and not self._starting:
                    seconds = max(0.0, self._look_at - time.monotonic()) if self._members else 0.1
                for key, _ in self._selector.select(seconds):
                    key.data()
                self._look()
                self._progress.show()  # again, below what has been logged
            return self.status
        except BaseException:
            cancellation.request()  # else the workers would be waited for, and no signal heard
            raise

    def _post(self, call: Callable[[], None]) -> None:
        """From any thread: have the loop call this."""
        self._posts.append(call)
        with contextlib.suppress(BlockingIOError):  # it is full of others, so the loop wakes anyway
            self._button.send(b"\0")

    def _woken(self) -> None:
        numbers = self._bell.recv(4096)
        for _ in range(len(self._posts)):
            self._posts.popleft()()
        goals: dict[int, str] = {signal.SIGUSR1: KEEP, signal.SIGHUP: LEAVE}
        words = {DESTROY: "destroying all VMs of", KEEP: "shutting down and keeping the VMs of"}
        for goal in [goals.get(number, self._end_goal) for number in filter(None, numbers)]:
            # Who has asked to keep the VMs may still have them destroyed, but not the other way round
            if self.goal not in (DESTROY, goal) and (self.goal == RUN or goal == DESTROY):
                report.log(f"{words.get(goal, 'leaving; these go on running: the VMs of')} {self.group} group")
                self.goal, self._progress = goal, WaitProgress()  # nothing is waited for any more

    def _adopt(self, vm: VM, how: str) -> None:
        """Watch a VM that runs, whoever started it, and wait until it is ready."""
        report.log(f"{vm.name} {how}")
        state, pid = vm.state()
        process = Process(pid) if state == "running" else None
        if not process or process.fileno() < 0 or vm.state() != (state, pid):
            report.log(f"{vm.name} has vanished")
            return
        member = self._members[vm.folder] = Member(vm, process)
        self._selector.register(process, selectors.EVENT_READ, lambda: self._gone(member))
        report.log(f"{vm.name} has console vmconsole -n {vm.name} -g {vm.group} -t {vm.type}")
        for ip, host, guest in ports_of(vm):
            report.log(f"{vm.name} has port {ip}:{host} for its port {guest}")
        if self.goal == RUN:
            self._progress.stages[vm] = "address"
            if isinstance(result := result_of(lambda vm: self.cloud.network_of(vm).open(), vm), Error):
                self._waited(member, result)
            else:
                self._job(lambda: self._wait(vm), lambda result: self._waited(member, result))

    def _gone(self, member: Member) -> None:
        """Its qemu has ended."""
        self._selector.unregister(member.process)
        member.process.close()
        del self._members[member.vm.folder]
        self._progress.stages.pop(member.vm, None)
        words = {DESTROY: "has been switched off", KEEP: "has been stopped"}
        end = "has been saved" if os.path.exists(member.vm.saved_file) else "has vanished"
        report.log(f"{member.vm.name} {words.get(self._ending, end)}")

    def _look(self) -> None:
        """Now and then: take over what others have started.  A VM that is watched is not looked at."""
        if self.goal != RUN or self._starting or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        reap()
        self.cloud.mend_ports()
        for vm in self.cloud.tree.vms(self.group):
            if vm.folder not in self._members and vm.is_running():
                self._adopt(vm, "has joined")
        low = free_bytes(self.cloud.tree.base) < RESERVE
        members = self._members.values()
        asked = [each for each in members if low or each.full or (each.vm.is_readable() and each.vm.get("vmShares"))]
        if asked and not self._jobs:
            self._job(lambda: in_parallel(wake, [each.vm for each in asked]), lambda states: self._awake(asked, states))

    def _awake(self, members: Sequence[Member], states: Sequence[str]) -> None:
        """Log whose disk has become full, who could go on, and who has lost a shared folder."""
        for member, state in zip(members, states):
            vm = member.vm
            if state == DISK_FULL and not member.full:
                report.log(f"{vm.name} is {state}, and goes on when there is room in {vm.folder}")
                member.full = True
            elif state == SHARE_LOST and not member.lost:
                report.log(f"{vm.name} is {state}: {remedy(vm, state)}")
                member.lost = True
            elif state in ("running", SHARE_LOST) and member.full:
                report.log(f"{vm.name} goes on")
                member.full = False

    def _job(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Do `work` in a thread, then `done` with its result, or its Error, in the loop; a defect is raised there."""
        from concurrent.futures import ThreadPoolExecutor

        def finish(job: Any) -> None:
            self._jobs.discard(job)
            done(job.result())

        pool = ThreadPoolExecutor(1)  # of its own: the thread ends with its work
        job = pool.submit(result_of, lambda _: work(), None)
        self._jobs.add(job)
        job.add_done_callback(lambda job: self._post(lambda: finish(job)))
        pool.shutdown(wait=False)

    def _begun(self, errors: list[Error] | Error) -> None:
        self._starting = False
        self._failed(errors)
        if self.goal == RUN:
            vms = sorted((member.vm for member in self._members.values()), key=lambda vm: vm.full_name)
            self._job(lambda: open_screens([vm for vm in vms if not has_viewer(vm)]), lambda _: None)

    def _failed(self, errors: list[Error] | Error) -> None:
        """Say what a worker couldn't do, but for what it was kept from."""
        if cancellation.requested:
            return
        for error in [errors] if isinstance(errors, Error) else errors:
            report.error(error)
            self.status = EXIT_FAILED

    def _wait(self, vm: VM) -> None:
        wait = Wait(self.cloud, vm, self.cloud.config.number("vmWaitTimeout"))
        wait.tell = lambda vm, stage: self._post(lambda: self._progress.tell(vm, stage))
        address = next(found for _ in wait.tries() if (found := wait.network.address(vm)))
        if vm.woke:
            self._post(lambda: report.log(f"{vm.name} woke up in {vm.woke:.1f} s"))
        self._post(lambda: report.log(f"{vm.name} has IP {address}"))
        wait_ready(wait)

    def _waited(self, member: Member, result: Error | None) -> None:
        if self._members.get(member.vm.folder) is not member or cancellation.requested:
            return
        self._progress.stages[member.vm] = "failed" if result else "ready"
        if result:
            report.log(f"{member.vm.name} is not ready: {result.text}")
        else:
            member.ready = True
            report.log(f"{member.vm.name} is ready")

    def _advance(self) -> bool:
        """Once the workers have ended: rest, or do what the goal asks for; whether that is done."""
        if self.goal == RUN and not self._starting and not self._members and not self._is_held():
            self.goal = LEAVE
        if self._jobs:
            if self._ending != self.goal and (self.goal == DESTROY or not self._starting):
                cancellation.request()
        elif self.goal == RUN:  # all is quiet: nothing is held open that only waits need
            self.cloud.close()
            if self._on_ready:
                late = not all(member.ready for member in self._members.values())
                self._on_ready(self.status or (EXIT_TIMEOUT if late else EXIT_DONE))
                self._on_ready = None
        else:
            cancellation.requested = False
            if self._ending == self.goal:
                return True
            self._ending = self.goal
            self._job(self._end, self._failed)
        return False

    def _is_held(self) -> bool:
        """Whether a VM of the group runs, or a command is at work on it: a rollback has them all off for a while."""
        vms = self.cloud.tree.vms(self.group)
        busy = is_locked(apply_lock(self.cloud.tree, self.group))
        return busy or any(vm.is_running() or is_locked(vm.folder) for vm in vms)

    def _end(self) -> list[Error]:
        """What the goal asks for."""
        if self._ending == LEAVE:
            configure_later(self.cloud, [member.vm for member in self._members.values() if not member.ready])
            return []
        vms = list(self.cloud.tree.vms(self.group))
        return destroy_all(self.cloud, vms) if self._ending == DESTROY else stop_all(self.cloud, vms)


def check_new_group(vms: Sequence[VM], group: str) -> None:
    """Raise where a group that is to be made has VMs."""
    if vms:
        hint = f"vmrun -r {group} runs them, vmstop -d -g {group} destroys them, --add adds to them"
        raise WrongState(f"{group}: the group has VMs already", hint)


def supervise(
    cloud: Cloud, group: str, requests: Sequence[CloneRequest], new: bool, gui: bool, talk: int, end: str
) -> int:
    """Run a group's VMs and those asked for, to its end; the exit status.  `new`: it must have none yet; `gui`: its own
    get a screen, this time; `talk`: who waits in let_caller_go(); `end`: what ^C does."""
    log_file = os.path.join(cloud.tree.base, group, MANAGER_LOG)
    supervisor = Supervisor(cloud, group, end, lambda status: let_caller_go(talk, status, log_file))
    with managed(cloud.tree, group):
        old = list(cloud.tree.vms(group))
        if new:
            check_new_group(old, group)
        if not old and not requests:
            raise NotFound(f"{group}: there are no VMs in it", "vmrun -f FILE makes them")
        if group_network(cloud, group) == "private":
            with cloud.private.hold():
                pass  # the network comes up, and is opened, while there are no threads yet
        cloud.prepare([*old, *(cloud.tree.template(request.template) for request in requests)])

        def begin(spawned: Callable[[VM], None]) -> list[Error]:
            stopped = [vm for vm in old if not vm.is_running()]
            for vm in old:
                if vm not in stopped:
                    spawned(vm)  # it is taken over as it is
            for vm in stopped:
                with FolderLock(vm.folder):
                    give_identity(cloud, vm)
            results = start_all(cloud, stopped, spawned, gui=gui)
            errors = [error for vm, error in zip(stopped, results) if error and not vm.is_running()]
            return errors + (instantiate(cloud, group, requests, spawned)[1] if requests else [])

        trim_memory()
        return supervisor.run(begin)


def stop_managed(cloud: Cloud, group: str) -> None:
    """Have the vmrun that manages a group shut its VMs down and keep them; returns when that is done."""
    cloud.tree.need_group(group)
    state, pid = manager_of(cloud.tree, group)
    if state == "unknown":
        raise WrongState(f"{group}: another user's vmrun manages it", "call this as that user, or as root")
    if state == "stopped":
        raise WrongState(f"{group}: no vmrun manages it", f"vmstop -g {group} stops its VMs")
    with Process(pid) as process:
        if manager_of(cloud.tree, group) == (state, pid):
            process.signal(signal.SIGUSR1)
        process.ended(float("inf"))
    if left := [vm.name for vm in cloud.tree.running(group)]:
        raise Error(f"{group}: these VMs still run: {', '.join(left)}", f"vmstop -g {group} stops them")


# Inventory ###########################################################################################
#
# Rows for people, JSON for scripts and for ansible.


def listed(tree: Tree, group: str = "", type: str = "", every: bool = False) -> Iterator[tuple[VM, str, int]]:
    """(VM, what it does, pid of its qemu or 0) of the running ones, or of every one, whose disks are looked for too."""
    for text, mend in tree.told_strays(group):
        report.warn(f"{text}; mended by: {mend}")
    vms = [(vm, *vm.state()) for vm in tree.vms(group, type)]
    asked = iter(in_parallel(guest_state, [vm for vm, state, _ in vms if state == "running"]))
    for vm, state, pid in vms:
        for disk in vm.disks() if every and vm.is_readable() else ():
            if not os.path.exists(disk):
                report.warn(told_of(vm, FileNotFoundError(0, "", disk)))
        if state == "running" or every:
            saved = state == "stopped" and os.path.exists(vm.saved_file)
            yield vm, next(asked) if state == "running" else "saved" if saved else state, pid


def vm_rows(cloud: Cloud, group: str = "", type: str = "", *, every: bool = False) -> Iterator[str]:
    """A line per running VM, NAME GROUP/TYPE IP, or for every one, NAME GROUP/TYPE STATE IP; IP once it has one.  STATE
    is there in any case where a guest doesn't run though its qemu does."""
    for vm, state, _ in listed(cloud.tree, group, type, every):
        words = (vm.name, vm.place, state if every or state != "running" else "", address_of(cloud, vm))
        yield " ".join(filter(None, words))


def process_usage(pid: int) -> tuple[float, float, int] | None:
    """(seconds since its start, seconds of processors that it has used, bytes that it has in memory) of a process."""
    # proc(5), from the third field on: before that stands its name, in brackets, in which anything may be.
    if not (fields := process_file(pid, "stat").rpartition(")")[2].split()):
        return None  # it has ended
    ticks = os.sysconf("SC_CLK_TCK")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / ticks
    return round(age, 2), (int(fields[11]) + int(fields[12])) / ticks, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def vm_facts(cloud: Cloud, vm: VM, state: str, pid: int) -> dict[str, Any]:
    """What --json says of a VM, each key always; None is what isn't known, or what a VM that doesn't run hasn't."""
    values = vm.settings() if vm.is_readable() else {}  # what is amiss with its conf, address_of says
    disks = [path for path in vm.disks() if os.path.exists(path)] if values else []
    address = address_of(cloud, vm)
    age, used, resident = process_usage(pid) or (None, None, None)
    seen = "address" if not address else "ready" if os.path.exists(vm.ready_file) else None
    own = {name: values.get(f"vm{name.title()}") or None for name in ("template", "user", "uuid", "mac", "network")}
    return {
        "name": vm.name, "group": vm.group, "type": vm.type or None, "state": state, "stage": seen if pid else None,
        "address": address or None, **own,
        "ports": [{"ip": ip, "host": host, "guest": guest} for ip, host, guest in ports_of(vm)],
        "mem_mb": int(values["vmMem"]) if values else None, "cpus": int(values["vmCpu"]) if values else None,
        "pid": pid or None, "uptime_seconds": age, "cpu_seconds": used, "resident_bytes": resident,
        "disk_bytes": sum(os.stat(path).st_blocks * 512 for path in disks), "folder": vm.folder,
    }  # fmt: skip


USAGE_SECONDS = 0.5  # what `now` is, in a table: the kernel counts in hundredths


def usage_rows(cloud: Cloud, group: str = "", type: str = "", every: bool = False) -> Iterator[tuple[str, ...]]:
    """(name, place, state, address, uptime, processor time now in percent of one, memory, ports): `-` for none."""
    vms = list(listed(cloud.tree, group, type, every))
    before = [process_usage(pid) for _, _, pid in vms]
    time.sleep(USAGE_SECONDS if vms else 0)
    for (vm, state, pid), then in zip(vms, before):
        now, cells = process_usage(pid), ["-", "-", "-"]
        if then and now:
            age, load = int(now[0]), 100 * (now[1] - then[1]) / (now[0] - then[0])
            cells = [f"{age // 3600}:{age // 60 % 60:02}:{age % 60:02}", f"{load:.0f}%", f"{now[2] // MIB} MB"]
        yield (vm.name, vm.place, state, address_of(cloud, vm) or "-", *cells, join_ports(ports_of(vm)) or "-")


def address_of(cloud: Cloud, vm: VM) -> str:
    return reached_at(cloud, vm)[1]


def reached_at(cloud: Cloud, vm: VM) -> tuple[str, str]:
    """The kind of a VM's network, and its address: '' where it has none yet or its conf is useless (which is said)."""
    try:
        kind = cloud.network_kind(vm)
        return kind, cloud.networks[kind].address(vm)
    except Error as error:
        report.warn(str(error))
        return "", ""


def inventory(cloud: Cloud) -> dict[str, Any]:
    """ansible's script inventory of the running VMs that have an address."""
    running = [(vm, *reached) for vm in cloud.tree.running() if (reached := reached_at(cloud, vm))[1]]
    by_name = cloud.config["vmInventoryHosts"] == "name"
    taken = {"all", "ungrouped", "localhost", *cloud.tree.groups()}
    names = cloud.tree.unique_names() if by_name else {}
    known = cloud.known_hosts.names()
    types: dict[str, dict[str, None]] = {}
    groups: dict[str, Any] = {}
    hostvars: dict[str, Any] = {}

    @functools.cache
    def ssh_args(network: str, is_known: bool, planted: bool) -> str:
        trust = ssh_trust_options(cloud.known_hosts.path, is_known)
        way = ssh_way(cloud.networks[network], trust, ssh_key_options(planted))
        return shlex.join([*ssh_options(**OWN_CALL, HostName="%h"), *way])

    for group in dict.fromkeys(vm.group for vm, *_ in running):
        members = [each for each in running if each[0].group == group]
        users = [vm.get("vmUser") for vm, *_ in members]
        user = max(users, key=users.count)
        kinds: dict[str, Any] = {}
        for vm, network, address in members:
            host = next((name for name in reversed(names.get(vm.full_name, [])) if name not in taken), address)
            kind = f"{group}_{vm.type or TEMPLATES}"
            kinds.setdefault(kind, {"hosts": []})["hosts"].append(host)
            types.setdefault(f"type_{vm.type}", {})[kind] = None
            words = ssh_args(network, vm.get("vmUuid") in known, is_planted(vm))
            hostvars[host] = host_variables(vm, user, words, address if by_name else "")
        for name, values in [*kinds.items(), (group, {"children": list(kinds), "vars": {"ansible_user": user}})]:
            groups.setdefault(name, {}).update(values)
    types.pop("type_", None)  # of templates
    of_types = {name: {"children": list(kinds)} for name, kinds in types.items()}
    return {**of_types, **groups, "_meta": {"hostvars": hostvars}}


def host_variables(vm: VM, user: str, ssh_args: str, address: str) -> dict[str, Any]:
    """What ansible is told of a host; `user`: who logs in to those of its group; `address`: where that isn't its name.
    The way in is here and not at the group, so that no group_vars of a playbook replaces it."""
    uuid, login = vm.get("vmUuid"), vm.get("vmUser")
    names = {"name": vm.name, "group": vm.group, "type": vm.type or TEMPLATES}
    names.update(template=vm.get("vmTemplate"), uuid=uuid)
    values: dict[str, Any] = {f"nocloud_{key}": value for key, value in names.items()}
    # ansible's own is named by the address, which another VM had before, or has in another tree
    values["ansible_control_path"] = f"%(directory)s/{uuid or vm.full_name.replace('/', '-')}"
    alias = f"-o HostKeyAlias={uuid} " if uuid else ""
    values.update(ansible_port=22, ansible_ssh_common_args=alias + ssh_args)
    values["ansible_ssh_extra_args"] = "-o SessionType=default"  # sftp has one of its own
    values.update({"ansible_host": address} if address else {})
    return values if login == user else {**values, "ansible_user": login}


# Doctor ##############################################################################################
#
# What VMs need of this host: a check a row, and for what isn't well the command that mends it.  It only looks: nothing
# is started, mended or written, and no finding keeps another check from its turn.

OK, WARNING, WRONG = "ok", "warning", "wrong"  # wrong: as it is, no VM starts
PLENTY_OF_SPACE = 2 * GIB


class Patient:
    """What the checks look at: the configuration as far as it can be read, and its cloud.  `told`: what the check that
    is at work found not well: state, text and the command that mends it; `deep`: whether big files are read whole."""

    def __init__(self, deep: bool = False) -> None:
        self.deep = deep
        self.told: list[tuple[str, str, str]] = []
        self.config = Config()
        for path in config_files():
            said: list[str] = []
            try:
                self.config.read(path, said.append)
            except (UsageError, OSError) as error:
                text = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
                self.tell(WRONG, text, settings_command(path, text))
            for text in said:
                self.tell(WARNING, text, settings_command(path, text))
        try:
            self.config.read_environment()
        except UsageError as error:
            self.tell(WRONG, str(error), f"unset {str(error).partition(':')[0]}")
        try:
            self.cloud = Cloud(self.config)
        except Error as error:
            self.tell(WRONG, str(error), f"export NOCLOUD_vmBaseDir={home_folder()}/vms")
            self.config.set("vmBaseDir", os.path.join(home_folder(), "vms"), "")
            self.cloud = Cloud(self.config)
        self.told_of_config = self.told
        self.tree = self.cloud.tree
        self.bridge = self.cloud.bridge
        self.has_bridge = os.path.exists(f"/sys/class/net/{self.bridge.interface}")
        self.foreign = self.has_bridge and not bridge_is_ours(self.bridge.interface)
        self.network = "private"
        with contextlib.suppress(Error, OSError):
            self.network = self.cloud.chosen_network(self.config["vmNetwork"])

    def tell(self, state: str, text: str, mend: str) -> None:
        self.told.append((state, text, mend))


# -- commands that mend


def self_command(words: str) -> str:
    """A call of this program by root.  sudo looks for it in the system's folders only (sudoers(5), secure_path)."""
    ours = program_path()
    known = any(os.path.realpath(f"{place}/nocloud") == ours for place in ("/usr/local/bin", "/usr/bin"))
    return f"sudo {'nocloud' if known else quoted(ours)} {words}"


def by_owner(path: str, command: str) -> str:
    """`command`, with sudo where what it changes is another user's."""
    return command if os.path.exists(path) and os.stat(path).st_uid == os.geteuid() else f"sudo {command}"


def trust_command(path: str) -> str:
    """What makes a file, or a folder, one that only its user or root writes to."""
    if os.stat(path).st_uid not in (os.geteuid(), 0):
        return f"sudo chown {user_name()} {quoted(path)} && chmod go-w {quoted(path)}"
    return by_owner(path, f"chmod go-w {quoted(path)}")


def settings_command(path: str, text: str) -> str:
    """What has a file be read: a comment of the line that is wrong, which a message names FILE:LINE; or rights."""
    if ALLOW in text:
        return ALLOW
    if found := re.match(rf"{re.escape(path)}:(\d+):", text):
        return by_owner(path, f"sed -i '{found.group(1)}s/^/# /' {quoted(path)}")
    return trust_command(path) if os.access(path, os.R_OK) else by_owner(path, f"chmod a+r {quoted(path)}")


# -- the configuration and the tree


def examine_configuration(patient: Patient) -> str:
    patient.told = patient.told_of_config
    return ", ".join(config_files()) or "the defaults"


def examine_tree(patient: Patient) -> str:
    base = patient.tree.base
    place = existing_parent(base)
    if os.path.lexists(base) and not os.path.isdir(base):
        patient.tell(WRONG, f"{base}: is no folder", by_owner(base, f"mv {quoted(base, base + '.old')}"))
    elif os.statvfs(place).f_flag & os.ST_RDONLY:
        mend = f'sudo mount -o remount,rw "$(findmnt -no TARGET -T {quoted(place)})"'
        patient.tell(WRONG, f"{place}: the file system is read-only", mend)
    elif not os.access(place, os.W_OK | os.X_OK):
        patient.tell(WRONG, f"{place}: you may not write there", f"sudo install -d -o {user_name()} {quoted(base)}")
    elif place == base and untrusted(base):
        patient.tell(WARNING, f"{base}: {untrusted(base)}", trust_command(base))
    if place != base:
        return f"{base}, made with the first VM"
    return f"{base}, which others may look into (chmod 700 keeps them out)" if os.stat(base).st_mode & 0o077 else base


def examine_space(patient: Patient) -> str:
    place = existing_parent(patient.tree.base)
    free, cache = free_bytes(place), cache_home()
    text = f"{free // MIB} MB are free in {place}"
    if free < PLENTY_OF_SPACE:
        mend = "vmBaseDir=FOLDER in ~/.nocloud.conf, on a larger file system"
        if os.path.isdir(cache) and os.stat(cache).st_dev == os.stat(place).st_dev:
            mend = f"rm -rf {quoted(cache)}"  # all of it can be made again
        patient.tell(WRONG if free < 4 * CLONE_BYTES else WARNING, text, mend)
    return text


def examine_vms(patient: Patient) -> str:
    """What killed commands and vanished files left in the tree, and guests that don't run though their qemu does."""
    tree = patient.tree
    if folders := list(left_over(tree)):
        text = f"{plural(len(folders), 'folder')} of commands that were killed"
        patient.tell(WARNING, text, f"rm -rf {quoted(*folders)}")
    for text, mend in tree.told_strays():
        patient.tell(WARNING, text, mend)
    vms, followed = list(tree.vms()), tree.followable()
    for vm in vms:
        try:
            if not vm.conf:  # it keeps its disk: the conf is begun anew
                patient.tell(WARNING, f"{vm.conf_file} is empty", begin_conf(vm))
                continue
        except Error as error:
            patient.tell(WARNING, str(error), settings_command(vm.conf_file, str(error)))
            continue
        examine_disks(patient, vm, followed)
        problem = result_of(lambda vm: check_shares(patient.config, vm, vm.get("vmShares")), vm)
        if isinstance(problem, Error):
            patient.tell(WARNING, f"{vm.full_name}: {problem}", problem.hint)
    for vm, state in zip(vms, in_parallel(guest_state, vms)):
        if state not in AT_WORK:
            patient.tell(WARNING, f"{vm.full_name} is {state}", remedy(vm, state))
    templates = sum(vm.is_template for vm in vms)
    return f"{plural(len(vms) - templates, 'VM')}, {plural(templates, 'template')}, nothing left over"


def examine_disks(patient: Patient, vm: VM, followed: Callable[[str], bool]) -> None:
    """A VM whose disk, or what that lies on, is gone."""
    try:
        needed = [path for disk, chain in vm.chains(followed) for path in (disk, *chain)]
    except OSError as error:
        patient.tell(WARNING, f"{vm.full_name}: {error.filename}: {error.strerror}", f"sudo chmod a+r {error.filename}")
        return
    for path in [path for path in needed if not os.path.exists(path)][:1]:
        command = f"vmtemplate --delete {quoted(vm.name)}"
        if not vm.is_template:
            command = f"vmstop -d -n {quoted(vm.full_name)}"
        # the last resort: what is lost may be on a disk that isn't mounted just now
        mend = f"{command}  # destroys it; do so only if {printable(path)} can't be brought back"
        patient.tell(WARNING, f"{vm.full_name} can't start: {path} is gone", mend)


def examine_frozen(patient: Patient) -> str:
    """What clones of frozen templates wake up on."""
    layers = [layer for each in patient.tree.templates() if each.is_readable() and (layer := frozen_layer(each))]
    for layer in layers:
        if isinstance(found := result_of(lambda layer: read_manifest(layer, patient.deep), layer), Error):
            patient.tell(WARNING, found.text, f"vmtemplate {quoted(layer.template.name)} --warm")
    return f"{plural(len(layers), 'template')} frozen" + (", all memory read" if patient.deep else "")


# -- what runs the VMs


def examine_qemu(patient: Patient) -> str:
    qemu, _ = patient.cloud.qemu(os.uname().machine), need_program("qemu-img")
    package = install_command(f"qemu-system-{os.uname().machine}")
    patient.tell(OK, f"{qemu.path}, version {qemu.version}", "")
    if "sandbox" not in qemu.options:
        patient.tell(WARNING, f"{qemu.path} was built without -sandbox: it runs unconfined", package)
    if not choose_screen(qemu):
        patient.tell(WARNING, f"{qemu.path} has neither SPICE nor VNC: VMs have no screen", package)
    try:
        choose_seed(qemu)
    except MissingProgram as error:
        patient.tell(WARNING, str(error), error.hint)
    return ""


def examine_acceleration(patient: Patient) -> str:
    wanted = patient.config["vmAccel"]
    if wanted == "tcg":
        return "software emulation, as vmAccel=tcg asks for"
    reason, mend = kvm_missing()
    if not reason:
        reason, mend = kvm_failure(patient.cloud.qemu(os.uname().machine), anew=True)
    if reason:
        text = f"no hardware acceleration, guests will be slow: {reason}"
        patient.tell(WRONG if wanted == "kvm" else WARNING, text, mend)
    return "hardware acceleration (KVM)"


def examine_ssh(patient: Patient) -> str:
    return f"{need_program('ssh')}, {need_program('ssh-keygen')}"


def examine_keys(patient: Patient) -> str:
    """nocloud's key, made at first need, and the user's, whole and his alone; without any he logs in with nocloud's."""
    own = os.path.join(config_home(), "id_ed25519")
    folder, is_there = existing_parent(os.path.dirname(own)), os.path.exists(own)
    for path in ([own] if is_there else []) + user_keys():
        if os.stat(path).st_mode & 0o077:
            state, mend = WRONG if path == own else WARNING, by_owner(path, f"chmod 600 {quoted(path)}")
            patient.tell(state, f"{path}: others may read it; ssh won't use it", mend)
    if is_there and not os.access(own, os.R_OK):
        patient.tell(WRONG, f"{own}: you may not read it", f"sudo chown {user_name()} {quoted(own)}")
    elif is_there and not os.path.exists(own + ".pub"):
        patient.tell(WRONG, f"{own}.pub is gone", f"ssh-keygen -y -f {quoted(own)} >{quoted(own + '.pub')}")
    elif not is_there and not os.access(folder, os.W_OK | os.X_OK):
        patient.tell(WRONG, f"{folder}: you may not write there, for nocloud's key", "export XDG_CONFIG_HOME=FOLDER")
    if not user_keys(".pub"):
        patient.tell(WARNING, "no key of yours, ~/.ssh/*.pub, to plant in VMs", "ssh-keygen -t ed25519")
    return f"{plural(len(user_keys('.pub')), 'key')} of yours, and nocloud's own"


def examine_building(patient: Patient) -> str:
    check_builder()
    return "vmtemplate --build has what it needs"


# -- the private network


def examine_namespaces(patient: Patient) -> str:
    need_program("ip")
    new_namespaces("10.88.0").close()
    try:
        new_namespaces("10.88.0", nft_rules("guests.nft", gateway="10.88.0.1", mac=BRIDGE_MAC)).close()
    except Error:
        text = "VMs on the private network can take each other's addresses: nft has no rules for bridges here"
        patient.tell(WARNING, text, f"{install_command('nft')}  # and have a kernel with CONFIG_NF_TABLES_BRIDGE")
    return "this user may make namespaces"


def examine_tun(patient: Patient) -> str:
    """For both networks: qemu-bridge-helper opens it as the user that calls it."""
    path = "/dev/net/tun"
    if not os.path.exists(path):
        mend = "sudo modprobe tun"
        if os.path.isdir("/sys/class/misc/tun"):
            mend = f"sudo mkdir -p /dev/net && sudo mknod {path} c 10 200 && sudo chmod 666 {path}"
        elif not os.path.exists(f"/lib/modules/{os.uname().release}"):
            mend = f"in a container: give it the device {path}"
        patient.tell(WRONG, f"there is no {path}", mend)
    elif device_denied(path):
        patient.tell(WRONG, f"you may not open {path} ({device_denied(path)})", f"sudo chmod 666 {path}")
    return path


def examine_private_network(patient: Patient) -> str:
    if missing := [name for name in ("ip", "dnsmasq", "nsenter") if not find_program(name)]:
        text = f"not found, and the private network needs it: {', '.join(missing)}"
        patient.tell(WRONG, text, install_command(*missing))
    return "ip, dnsmasq and nsenter"


def examine_way_out(patient: Patient) -> str:
    if missing := [name for name in ("pasta", "nft") if not find_program(name)]:
        text = f"VMs on the private network don't reach the Internet: {' and '.join(missing)} not found"
        patient.tell(WARNING, text, install_command(*missing))
    network = patient.cloud.private
    if network.holder() and not network.is_current():
        text = "the private network doesn't know this host's present name servers, addresses or routes"
        patient.tell(WARNING, text, "nocloud net --private up")
    return "pasta"


def examine_private_subnet(patient: Patient) -> str:
    """Once it is chosen it is kept; a VPN that came later may have it as well."""
    network = patient.cloud.private
    if not os.path.exists(network.file("subnet")):
        return "a free one is chosen with the first VM"
    subnet = network.subnet()
    own = ipaddress.IPv4Network(f"{subnet}.0/24")
    if clash := [network for _, network in networks_in_use() if network.prefixlen > 8 and network.overlaps(own)]:
        text = f"this host has {clash[0]} too: VMs don't reach that, on {own}"
        mend = f"nocloud net --private down && rm -f {quoted(network.file('subnet'))}"
        if any(True for _ in patient.tree.vms()):
            mend = "VMs keep their addresses for life: end that network while they are in use, or use another vmBaseDir"
        patient.tell(WARNING, text, mend)
    return f"{subnet}.0/24"


# -- the host's bridge


def examine_bridge(patient: Patient) -> str:
    name, why = patient.bridge.interface, patient.bridge.why_down()
    if not patient.has_bridge and patient.config["vmNetwork"] != "bridge":
        return f"there is none called {name}: VMs are on the private network"
    if why:
        patient.tell(WRONG, why, f"sudo ip link set {name} up" if patient.foreign else self_command("net up"))
    return f"{name} is up"


def examine_bridge_helper(patient: Patient) -> str:
    for text, mend in patient.bridge.helper_faults():
        patient.tell(WRONG, text, mend)
    return patient.bridge.helper()


def examine_bridge_conf(patient: Patient) -> str:
    for keeps_off, text, mend in patient.bridge.list_faults():
        patient.tell(WRONG if keeps_off else WARNING, text, mend)
    return f"{helper_list()} allows {patient.bridge.interface}"


def examine_dnsmasq(patient: Patient) -> str:
    """Whether the bridge's dnsmasq serves there, and if not, who has its ports."""
    wanted = BridgeSettings(patient.config).address
    for kind, port in (("udp", 53), ("tcp", 53), ("udp", 67)):
        for address, pid in sorted(bound_sockets(kind, port), reverse=True):  # at no address: 0.0.0.0, comes last
            if address not in ("0.0.0.0", wanted):
                continue
            if (kind, address) == ("udp", wanted) and (not pid or STATE_FOLDER in process_file(pid, "cmdline")):
                return f"DHCP and DNS are served at {wanted}"
            who, mend = "another user's process", self_command("doctor")
            if pid:
                who = f"{process_file(pid, 'comm').strip()}, process {pid}"
                unit = re.search(r"/([^/\n]+\.service)$", process_file(pid, "cgroup"), re.M)
                mend = f"sudo systemctl disable --now {unit.group(1)}" if unit else f"sudo kill {pid}"
            patient.tell(WRONG, f"no DHCP and DNS at {wanted}: port {port} ({kind}) is taken by {who}", mend)
            return ""
    need_program("dnsmasq")
    patient.tell(WRONG, f"no DHCP and DNS at {wanted}", self_command("net up"))
    return ""


def examine_publishing(patient: Patient) -> str:
    """Whether this user's VMs get addresses and names of their own on the bridge."""
    unwatched = patient.bridge.unwatched()
    if not os.path.isdir(INBOX):
        patient.tell(WARNING, f"{INBOX} is gone: DHCP decides on addresses and names", self_command("net up"))
    elif patient.bridge.hosts.denied():
        text = f"you may not write to {INBOX}: DHCP decides on your VMs' addresses and names"
        patient.tell(WARNING, text, group_command(os.stat(INBOX).st_gid))
    elif unwatched and systemd_runs():
        text = f"DHCP decides on your VMs' addresses and names: {unwatched}"
        patient.tell(WARNING, text, f"sudo systemctl start {SYSTEMD_UNITS[2]}")
    return f"DHCP decides on names and addresses: {unwatched}" if unwatched else f"names and addresses go to {INBOX}"


def examine_forwarding(patient: Patient) -> str:
    """Whether the kernel forwards, and the host's packet filters let the guests' packets pass; only root sees those."""
    name, mend, is_root = patient.bridge.interface, self_command("net up"), os.geteuid() == 0
    for each in (name, *sorted(outgoing_interfaces())):
        if not forwards(each):
            patient.tell(WARNING, f"guests have no way out: {each} doesn't forward", mend)
    if not find_program("nft"):
        patient.tell(WARNING, "nft is not found", install_command("nft"))
    elif is_root:
        for family, what in (("ip", "guests have no way out"), ("inet", "guests reach this host")):
            if not has_nft_table(f"{family} {DOMAIN}"):
                patient.tell(WARNING, f"{what}: nocloud's own rules are gone (nft table {family} {DOMAIN})", mend)
        for program in iptables_programs():
            if missing_rules(program, name):
                patient.tell(WARNING, f"{program} has rules, and doesn't accept the bridge", mend)
        for chain in dropping_chains(name):
            rules = (f"iifname {name} accept", f"oifname {name} ct state established,related accept")
            mend = " && ".join(f"sudo nft insert rule {chain} {rule}" for rule in rules)
            patient.tell(WARNING, f"nft chain {chain} drops what guests send", mend)
    filters = "the packet filters let guests pass" if is_root else "only root sees the packet filters"
    return f"{name} forwards; {filters}"


def examine_firewalld(patient: Patient) -> str:
    name, zone = patient.bridge.interface, firewalld_zone(patient.bridge.interface)
    if zone is None:
        return "it doesn't run"
    if zone != "trusted":
        where = f"in its zone {zone}" if zone else "in none of its zones"
        mend = f"sudo firewall-cmd --zone=trusted --change-interface={name}"
        patient.tell(WARNING, f"it runs, and {name} is {where}: guests get no address", mend)
    return f"{name} is in its zone trusted"


def examine_ufw(patient: Patient) -> str:
    if os.geteuid() != 0:
        return "only root may ask it" if find_program("ufw") else "it doesn't run"
    if not ufw_runs():
        return "it doesn't run"
    if MADE_BY_US not in try_run(["ufw", "show", "added"], 5)[1]:
        patient.tell(WARNING, "it runs, and doesn't let guests pass", self_command("net up"))
    return "it lets guests pass"


def examine_bridge_subnet(patient: Patient) -> str:
    settings = BridgeSettings(patient.config)
    clash, there = overlapping(settings), connected_network(settings.interface)
    if clash:
        mend = " && ".join(map(self_command, ("bridge subnet", "net down", "net up")))
        patient.tell(WARNING, f"{settings.net} is in use: {clash}", mend)
    elif there not in ("", settings.net) and not patient.foreign:
        patient.tell(WARNING, f"the bridge has {there}, and the settings say {settings.net}", self_command("net up"))
    return settings.net


def examine_names(patient: Patient) -> str:
    """Whether this host itself resolves the guests' names."""
    address, why, mend = patient.config["bridgeIpAddress"], "", self_command("net up")
    if resolved_runs():
        asks = f"~{DOMAIN}" in try_run(["resolvectl", "domain", patient.bridge.interface], 5)[1]
    else:
        asks = name_servers()[:1] == [address]
        why = ", which runs no systemd-resolved; vmssh needs none"
        mend = f"{install_command('resolvectl')} && {mend}"
    if not asks:
        patient.tell(WARNING, f"VMs' names don't resolve on this host{why}", mend)
    return f"this host asks {address} for them"


Check = Callable[[Patient], str]  # tells the patient what isn't well; the words for all is well


def by_name(*checks: Check) -> dict[str, Check]:
    return {check.__name__[len("examine_") :].replace("_", "-"): check for check in checks}


CHECKS = by_name(
    examine_configuration, examine_tree, examine_space, examine_vms, examine_frozen, examine_qemu, examine_acceleration,
    examine_ssh, examine_keys, examine_building, examine_namespaces, examine_tun, examine_private_network,
    examine_private_subnet, examine_way_out, examine_bridge,
)  # fmt: skip
BRIDGE_CHECKS = by_name(  # where there is one, or where there ought to be
    examine_bridge_helper, examine_bridge_conf, examine_bridge_subnet, examine_dnsmasq, examine_publishing,
    examine_forwarding, examine_firewalld, examine_ufw, examine_names,
)  # fmt: skip
ALL_CHECKS = {**CHECKS, **BRIDGE_CHECKS}
OURS_ONLY = ("dnsmasq", "publishing", "forwarding", "firewalld", "ufw", "names")  # else its owner's
NEEDED_ON = {  # what is wrong there is a warning where VMs are on another network
    **dict.fromkeys(("namespaces", "private-network", "private-subnet"), "private"),
    **dict.fromkeys(("bridge", *BRIDGE_CHECKS), "bridge"),
    "building": "neither",  # VMs of other templates run
}


def examine(names: Sequence[str], deep: bool = False) -> Iterator[dict[str, str]]:
    """All findings, or those of the checks that are named, as they are found: each the `name` of its check, its
    `state`, `text`, and the command to `mend` it, '' where it is well.  `deep`: big files are read whole."""
    for name in [each for each in names if each not in ALL_CHECKS]:
        raise UsageError(f"{name}: no such check", did_you_mean(name, ALL_CHECKS, f"one of {', '.join(ALL_CHECKS)}"))
    patient = Patient(deep)
    for name in ALL_CHECKS if names or patient.has_bridge or patient.config["vmNetwork"] == "bridge" else CHECKS:
        if not names or name in names:
            yield from examine_one(name, patient)


def examine_one(name: str, patient: Patient) -> Iterator[dict[str, str]]:
    """A check's findings; one that fails by itself tells why, whatever this host did to it."""
    patient.told, well = [], f"{patient.bridge.interface} was not made by nocloud: what its owner set holds"
    try:
        if not (name in OURS_ONLY and patient.foreign):
            well = ALL_CHECKS[name](patient)
    except Error as error:
        patient.tell(WRONG, str(error), error.hint)
    except Exception as error:
        if report.debug:
            raise
        patient.tell(WARNING, f"it can't be looked at: {type(error).__name__}: {error}", "nocloud doctor --debug")
    for state, text, mend in patient.told or [(OK, well, "")]:
        badness = WARNING if state == WRONG and NEEDED_ON.get(name, patient.network) != patient.network else state
        command = mend if os.geteuid() else re.sub(r"\bsudo ", "", mend)
        yield {"name": name, "state": badness, "text": printable(text), "mend": command}


def bridge_faults(config: Config) -> Iterator[str]:
    """What isn't well with the host's bridge, where there is one, a line each, for `net status`: what doctor finds."""
    names = ["bridge", "tun", *BRIDGE_CHECKS]
    names.remove("names")  # `net up` told of these
    for finding in examine(names) if os.path.exists(f"/sys/class/net/{config['bridgeInterface']}") else ():
        if finding["state"] != OK:
            yield f"wrong: {finding['text']} (mended by: {finding['mend']})"


# Export and import ###################################################################################
#
# VMs for other engines, whose formats are the texts of etc/export, and for another nocloud, which trusts nothing that
# it is given.  An export is a folder that lands by rename, or a tar archive of one.

# What the conf of an imported VM may say; what no export carries; and what each engine isn't given besides.
CARRIED = (
    "vmMem", "vmCpu", "vmInit", "vmUser", "vmMachine", "vmFirmware", "vmArch", "vmPorts", "vmUuid", "vmMac",
)  # fmt: skip
LEFT = ("vmShares", "vmTpm", "vmExtraOpts", "vmKernel", "vmInitrd", "vmAppend", "vmCpuCap", "vmGui")
ENGINES = {"nocloud": (), "libvirt": ("vmPorts",), "incus": ("vmPorts", "vmExtraDisk"), "kubevirt": ("vmAddress",)}
MANIFEST, ARCHIVES = "manifest.json", {"zstd": ".tar.zst", "xz": ".tar.xz"}


def export(cloud: Cloud, vms: Sequence[VM], place: str, asked: argparse.Namespace) -> None:
    """Write what an engine takes, a folder or an archive of it: all, or nothing.  `asked`: how, as the options say."""
    if len({checked_group(vm.group) for vm in vms}) != 1 or len({checked_name("VM", vm.name) for vm in vms}) < len(vms):
        raise UsageError("these are VMs of several groups, or of one name, or none", "vmrunning -a lists them")
    packer = next(filter(find_program, ARCHIVES), "zstd") if asked.tar else ""
    place = os.path.abspath(place) + ARCHIVES.get(packer, "")
    part = f"{place}.{os.getpid()}.tmp"
    if os.path.lexists(place):
        raise WrongState(f"{place}: it is there already", "name another place")
    need = sum(converted_size(*disk) for vm in vms for disk in zip(vm.disks(), known_formats(vm)))
    check_room(os.path.dirname(place), need * (2 if packer else 1), what="the disks take up to {} MB")
    os.mkdir(part, 0o700)
    try:
        disks = [(vm, [*export_disks(cloud, vm, part, asked)]) for vm in vms]
        told = [tell(*each, number, part, asked) for number, each in enumerate(disks, 2)]
        for name, text in texts(cloud, told, vms[0].group, asked):
            write_file(os.path.join(part, name), text, 0o700 if text.startswith("#!") else 0o600, durable=False)
        if packer:
            names = sorted(os.listdir(part), key=MANIFEST.__ne__)
            words = ["--format=gnu", "--owner=0", "--group=0", f"--use-compress-program={need_program(packer)} -T0"]
            run(["tar", "-C", part, *words, "-cf", f"{part}/tar", *names], timeout=None, umask=0o077)
        land({f"{part}/tar" if packer else part: place})
    finally:
        remove_tree(part)
    for vm in vms:
        keys = [key for key in (*LEFT, *ENGINES[asked.to]) if vm.get(key) not in ("", SETTING[key].default)]
        files = {"its user-data": vm.user_data_file, "its firmware's variables": vm.variables_file}
        others = {"its snapshots": snapshots_of(vm), **{what: os.path.exists(path) for what, path in files.items()}}
        for left in [f"{key}, {SETTING[key].help}" for key in keys] + [name for name in others if others[name]]:
            report.say(f"{vm.name}: not exported: {left}")


def export_disks(cloud: Cloud, vm: VM, part: str, asked: argparse.Namespace) -> Iterator[str]:
    """Write a VM's disks; their names."""
    for number, ((disk, below), format) in enumerate(zip(vm.chains(), known_formats(vm))):
        target = os.path.join(part, vm.disk_name(number, "qcow2"))
        header = qcow2_header(disk) if asked.chain and below else None
        if asked.clean and not number:  # as the disk of a template that is made of a VM
            with NewTemplate(cloud, f"export-{os.urandom(4).hex()}") as new:
                copy_disk(vm, new, layered=False)
                new.write_conf({"vmInit": "auto", **vm.inherited()})
                if os.path.exists(vm.variables_file):
                    copy_variables(vm.variables_file, "qcow2", new.vm.variables_file)
                in_new_guest(cloud, new, OwnGuest.wait, "without --clean it is taken as it is")
                convert_image(new.disk, "qcow2", target)
        elif header:
            base = f"base-{os.stat(below[0]).st_ino}.qcow2"
            if not os.path.exists(os.path.join(part, base)):
                convert_image(below[0], header.format or "qcow2", os.path.join(part, base))
            convert_image(disk, format, target, "-B", base, "-F", "qcow2")
        else:
            convert_image(disk, format, target)
        yield os.path.basename(target)


def fill(text: str, words: Mapping[str, Any]) -> str:
    """A text with each @word@ filled in; lines that begin with %WORD stand for each of that list, with its words."""

    def each(found: re.Match[str]) -> str:
        lines = re.sub(r"(?m)^%\w+ ?", "", found[0])
        return "".join(fill(lines, {**words, **one}) for one in words[found[1]])

    return filled(re.sub(r"(?m)^%(\w+)\b.*\n(?:%\1\b.*\n)*", each, text), words)


def tell(vm: VM, files: list[str], number: int, part: str, asked: argparse.Namespace) -> dict[str, Any]:
    """What manifests and texts say of a VM, whose disks these files are."""
    firmware, info = vm.get("vmFirmware"), image_info(os.path.join(part, files[0]), "qcow2")
    paths = {name: os.path.join(part, name) for name in files if asked.to == "nocloud"}
    given = [key for key in (CARRIED if asked.with_keys else CARRIED[:-2]) if vm.get(key)]
    left = [key for key in LEFT if vm.get(key) != SETTING[key].default]
    return {
        **{key[2:].lower(): value for key, value in vm.settings().items()}, "name": vm.name, "type": vm.type,
        "host": re.sub("^(?=[0-9])", "vm-", vm.name.lower())[:56].strip("-"),  # a label as of RFC 1035
        "address": vm.get("vmAddress") or f"10.126.0.{number}", "arch": vm.get("vmArch"),
        "machine": "q35" if "q35" in vm.get("vmMachine") else "pc", "gb": -(-info["virtual-size"] // GIB),
        "disk": [{"number": n, "file": name, "dev": f"vd{chr(97 + n)}"} for n, name in enumerate(files)],
        "port": [{"outer": outer, "inner": inner} for _, outer, inner in parse_ports(vm.get("vmPorts")) if outer],
        **{kind: [{}] * (kind == firmware) for kind in ("bios", "uefi", "secure")},
        "settings": {**{key: vm.get(key) for key in given}, **dict.fromkeys(left)},
        "files": {name: [os.path.getsize(path), file_digest(path)] for name, path in paths.items()},
        "key": read_existing(vm.host_key) if asked.with_keys else "",
    }  # fmt: skip


def texts(cloud: Cloud, vms: list[dict[str, Any]], group: str, asked: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(name, text) of what goes beside the disks: a manifest, or what is in etc/export, once or for each VM."""
    if asked.to == "nocloud":
        facts = {"nocloud": 1, "group": group, "description": list[str]()}
        facts["vms"] = [{key: vm[key] for key in ("name", "type", "settings", "files", "key")} for vm in vms]
        with contextlib.suppress(Error):  # of VMs that stand on no template
            facts["description"] = [*describe(cloud, group)]
        yield MANIFEST, json.dumps(facts, indent=1)
    keys = [{"line": " ".join(line.split()[:2])} for line in login_keys()]
    words = {
        "group": group, "subnet": vms[0]["address"].rpartition(".")[0], "vm": vms, "login": keys,
        "keys": _base64("".join(each["line"] + "\n" for each in keys)), "fresh": [{}] * bool(asked.file or asked.clean),
        "date": int(time.time()),
    }  # fmt: skip
    for name in packaged_files(f"export/{asked.to}"):
        for vm in vms if "NAME" in name else [{"name": ""}]:
            yield name.replace("NAME", vm["name"]), fill(need_packaged(f"export/{asked.to}/{name}"), {**words, **vm})


def exported_files(path: str) -> Generator[tuple[str, int, Any], None, None]:
    """(name, bytes, what to read them from) of each file of an export, as it comes out of tar.  Only plain headers are
    taken: nothing but these 512 bytes is read before it has been looked at (tar(5))."""
    place = os.path.realpath(path)
    names = sorted(names_in(place), key=MANIFEST.__ne__)
    words = ["tar", "-C", place, "--format=gnu", "-cf", "-", "-T", os.devnull, "--", *names]  # which may be none
    if not os.path.isdir(path):
        if not os.path.isfile(path):  # a pipe may have no writer
            raise NotFound(f"{path!r}: no such folder or file", "nocloud export --to nocloud writes one")
        with open(place, "rb") as file:
            head = file.read(8)
        packer = next(([name, "-qqdcM512MiB"] for name in ARCHIVES if head.startswith(PACKERS[name])), ["cat"])
        words = [*packer, place]
    reader, writer = os.pipe()
    with popen(words, stdout=writer), open(reader, "rb") as stream:
        os.close(writer)
        while (block := stream.read(512)) != bytes(512):
            with Parsing(Error, f"{path}: it is damaged, or no tar archive"):
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0:
                raise Error(f"{path}: refused: {info.name} in it is no plain file")
            yield info.name, info.size, stream
            stream.read(-info.size % 512)


def parse_manifest(data: bytes, path: str) -> tuple[str, list[tuple[CloneRequest, dict[str, Any], str]]]:
    """(the group, for each VM what is asked for, its files' bytes and SHA-256, and its host key or '') that a manifest
    says.  Confs are written anew from what may be in them."""
    with Parsing(Error, f"{path}: {MANIFEST} is not one that this nocloud's export wrote"):
        said, found = json.loads(data), []
        for vm in {1: said["vms"]}[said["nocloud"]]:  # by the version of its form
            name, settings, files = checked_name("VM", vm["name"]), vm["settings"], vm["files"]
            known = {key: value for key, value in settings.items() if key in CARRIED and value}
            for key in settings:
                check_setting(key, known.get(key, ""), name)
                if key not in known:
                    report.warn(f"{name}: not taken over: {key}")
            if known.get("vmInit") == "none" and "vmUuid" not in known:
                text = f"{name}: its vmInit is none: nobody can make another machine of it"
                raise WrongState(text, "nocloud export --with-keys has it stay the one that it is")
            uuid = known.get("vmUuid", "").lower()
            known.update({"vmUuid": uuid, "vmMac": known.get("vmMac", mac_of_uuid(uuid)).lower()} if uuid else {})
            ports = parse_ports(known.get("vmPorts", ""))
            known["vmPorts"] = join_ports(("127.0.0.1", host, guest) for _, host, guest in ports)
            disks = {f"{name}_{number}.qcow2" for number in range(len(files))}
            right = all(isinstance(size, int) and size >= 0 for size, _ in files.values())
            if not right or files.keys() != disks or not 0 < len(disks) <= MAX_DISKS:
                raise ValueError
            type = checked_name("type", vm["type"])
            request = CloneRequest("", "", 1, type, known, 0, [0] * (len(disks) - 1), b"", f"{name},")
            found.append((request, files, vm["key"].encode("ascii").decode()))
        return checked_group(said["group"]), found


def import_vms(cloud: Cloud, path: str, group: str | None) -> list[VM]:
    """Make the VMs of an export, in `group` or one that is called as theirs was: all of them, or none."""
    cloud.tree.prepare()
    with contextlib.closing(exported_files(path)) as come:
        name, size, source = next(come, ("", 0, None))
        if name != MANIFEST or size > 16 * MIB or not source:
            raise Error(f"{path}: it doesn't begin with {MANIFEST}", "nocloud export --to nocloud writes what does")
        theirs, asked = parse_manifest(source.read(size), path)
        for request in [each for each, _, _ in asked if each.settings.get("vmMachine")]:
            machine = cloud.qemu(request.settings.get("vmArch") or SETTING["vmArch"].default).machine
            request.settings["vmMachine"] = machine  # that host's qemu may have newer ones
        check_room(cloud.tree.base, sum(size for _, files, _ in asked for size, _ in files.values()), hint=ROOM_HINT)
        place = checked_group(group or cloud.tree.group_called(theirs))
        with making(cloud, place, [request for request, _, _ in asked]) as clones:
            places = {}
            for clone, (_, files, key) in zip(clones, asked):
                places.update({name: (clone.vm, *each) for name, each in files.items()})
                if key:
                    write_file(clone.vm.host_key, key)
                    public = run(["ssh-keygen", "-y", "-P", "", "-f", clone.vm.host_key], merge=False).stdout
                    write_file(clone.vm.host_key + ".pub", public)
            for name, size, source in come:
                vm, left, digest = places.pop(name, (None, -1, ""))
                if not vm or size != left:
                    raise Error(f"{path}: refused: {name} in it is not what {MANIFEST} says")
                target = vm.file(name.removesuffix("qcow2") + cloud.config["vmDiskExt"])
                with open(target, "xb", opener=functools.partial(os.open, mode=0o600)) as file:
                    while left > 0 and (piece := source.read(min(left, MIB))):
                        left -= file.write(piece)
                if file_digest(target) != digest:
                    raise Error(f"{path}: {name} in it is damaged")
                if foreign_image_format(target, name) != "qcow2":
                    raise WrongImage(f"{name}: refused: it is no qcow2 image")
            if places:
                raise Error(f"{path}: {min(places)} is not in it")
            raise_first(made := finish_clones(cloud, clones, whole=True))
    publish_keys(cloud, vms := [vm for vm in made if isinstance(vm, VM)])
    return vms


# Command lines #######################################################################################
#
# How a command is declared, once, and how the words of its call are parsed: argv[0] or the first word says which
# command, and only that command's parser is built.

# What a shell offers for a value that is called so: kinds of WORD_KINDS or SHELL_KINDS, several joined by `+`.
OFFERED = {
    "GROUP": "any-group", "TYPE": "type", "TEMPLATE": "template", "VM": "vm", "HOST": "address", "ISO": "iso+file",
    "FILE": "file", "FILE|URL": "file", "FOLDER": "folder", "DIR": "folder",
}  # fmt: skip


@record
class Option:
    """An option of a command, as its help shows it: `-w --wait [SECONDS]`, where the value may be left out.  `default`:
    the setting whose value it replaces, and is checked as, where no other `check` is given.  `complete`: what a shell
    offers for the value, as in OFFERED, whose word for the value counts if this is empty; or the words themselves."""

    usage: str
    help: str
    check: Callable[[str], Any] = str
    default: str = ""
    complete: str | tuple[str, ...] = ""

    def __post_init__(self) -> None:
        if self.default and self.check is str:
            self.check = SETTING[self.default].check
        self.complete = self.complete or OFFERED.get(self.value, "")

    @property
    def names(self) -> list[str]:
        return [word for word in self.usage.split() if word.startswith("-")]

    @property
    def value(self) -> str:
        """What its value is called in the help; '' where it takes none."""
        word = self.usage.split()[-1]
        return "" if word.startswith("-") else word.strip("[]")

    @property
    def is_optional(self) -> bool:
        """Whether the value may be left out."""
        return self.usage.endswith("]")


@record
class Command:
    """A command: how it is called, its options, what it does (declare() gives those).  `complete`: what a shell offers
    for each operand, as of an Option.  `more`: its help's end.  `passes`: letters of another program's options, which
    its operands begin with.  `bare`: it gets no Cloud, but the configuration; `unconfigured`: of that the defaults."""

    name: str
    alias: str = ""
    operands: str = ""
    complete: tuple[str | tuple[str, ...], ...] = ()
    more: Callable[[], str] = str
    passes: str = ""
    hidden: bool = False
    bare: bool = False
    unconfigured: bool = False
    options: tuple[Option, ...] = ()
    function: Any = None
    help: str = ""

    @property
    def usage(self) -> str:
        """What comes after its name."""
        return " ".join(filter(None, ("[options]" if self.options else "", self.operands)))


COMMANDS: dict[str, Command] = {}
ALIASES: dict[str, Command] = {}


def declare(command: Command, *options: Option) -> Callable[[Any], Any]:
    """Declare the command that the function under it does.  The first line of its docstring is its help."""

    def declared(function: Any) -> Any:
        COMMANDS[command.name] = command
        if command.alias:
            ALIASES[command.alias] = command
        command.options, command.function, command.help = options, function, function.__doc__.strip()
        return function

    return declared


GENERAL_OPTIONS = (  # every command has them
    Option("-h --help", "show this help"),
    Option("-v --version", "show the version"),
    Option("--debug", "show each external command; tracebacks"),
)


def visible_commands() -> list[Command]:
    return [each for each in COMMANDS.values() if not each.hidden]


def find_command(argv: Sequence[str]) -> tuple[Command | None, str, list[str]]:
    """(command, the name it was called by, its words); None for `nocloud` alone.  UsageError (127): no such name."""
    name, words = os.path.basename(argv[0]), list(argv[1:])
    of_ansible = not name.startswith("nocloud") and words[:1] in (["--list"], ["--host"])
    if name in ALIASES or of_ansible or name.endswith("inventory"):  # the latter: a link in a folder of inventories
        return ALIASES.get(name) or ALIASES["vminventory"], name, words
    if words[:1] == ["--debug"]:
        words = words[1:]
    if words == ["help"]:
        words = []
    if not words or words[0].startswith("-"):
        return None, "nocloud", words
    word = words[0]
    if not (found := COMMANDS.get(word) or ALIASES.get(word)):
        rows = (line.split(": ") for line in packaged_list("elsewhere"))
        ours = next((f"here it is {each}" for each, theirs in rows if word in theirs.split()), "")
        hint = ours or did_you_mean(word, [each.name for each in visible_commands()], "nocloud -h lists them")
        raise UsageError(f"{word}: no such command", hint, EXIT_MISSING)
    return found, f"nocloud {word}", words[1:]


def split_operands(command: Command, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options, operands) as getopts parts them: options end at the first operand, or at `--`.  A
    command whose operands are not another program's words takes options after them: vmtemplate NAME --image FILE."""
    options: list[str] = []
    operands: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word == "--":
            return options, [*operands, *words[index:]]
        if not word.startswith("-") or word == "-" or word[1] in command.passes:
            operands.append(word)
            if "..." in command.operands:  # another program's words
                return options, [*operands, *words[index:]]
            continue
        options.append(word)
        option, before = option_with_value(command, word)
        waits = option and before == word and not before.endswith("=")
        if option and waits and index < len(words) and (not option.is_optional or re.fullmatch("[0-9]+", words[index])):
            # joined to its option: argparse would take a value that begins with a dash for an option
            options[-1:] = [] if word.startswith("--") or len(word) == 2 else [word[:-1]]
            options.append(f"{option.names[-1]}={words[index]}")
            index += 1
    return options, operands


def option_with_value(command: Command, word: str) -> tuple[Option | None, str]:
    """(the option in a word that takes a value, the word up to that value): -C in -C5 and -dC, --count in --count=5."""
    takes = {name: option for option in command.options if option.value for name in option.names}
    if word.startswith("--"):
        name, equals, _ = word.partition("=")
        return takes.get(name), name + equals
    for position, letter in enumerate(word[1:], 2):
        if f"-{letter}" in takes:
            return takes[f"-{letter}"], word[:position]
    return None, word


def build_parser(command: Command, program: str, config: Config) -> argparse.ArgumentParser:
    """The parser of one command; its help shows the defaults in force."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(message, f"{program} -h shows how it is called")

    def convert(check: Callable[[str], Any], text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {error}") from None

    parser = Parser(
        prog=program, usage=f"%(prog)s {command.usage}", description=command.help, allow_abbrev=False, add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=terminal_width()),
    )  # fmt: skip
    for option in (*command.options, *GENERAL_OPTIONS):
        extra: dict[str, Any] = {"action": "store_true"}
        text = option.help + (f" [{config[option.default]}]" if option.default else "")
        if option.value:
            extra = {"metavar": option.value, "type": functools.partial(convert, option.check)}
            if option.is_optional:
                extra.update(nargs="?", const=True)
        parser.add_argument(*option.names, help=text.replace("%", "%%"), **extra)
    return parser


def terminal_width() -> int:
    """Columns for the help.  argparse's own way imports shutil, and with it bz2 and lzma, for each option declared."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(1).columns or 80) - 2  # some serial lines say 0
    return 78


def exclusive(args: argparse.Namespace, *names: str) -> str:
    """The one of these options that is given, or ''."""
    if len(given := [name for name in names if getattr(args, name) not in (None, False)]) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} exclude each other")
    return given[0] if given else ""


def no_more(words: Sequence[str], way: str = "") -> None:
    """Raise where there are words; `way`: how the first of them could have been given."""
    if words:
        hint = f"{way} {words[0]}" if way else "-h shows how it is called"
        raise UsageError(f"{words[0]!r}: one word too many", hint)


def one_operand(words: Sequence[str], name: str) -> str:
    if not words:
        raise UsageError(f"{name} is missing", "-h shows how it is called")
    no_more(words[1:])
    return words[0]


# Commands ############################################################################################
#
# What can be typed.  One declaration a command serves its vm* name, the subcommand and the help; the function under it
# turns words into values and calls the sections above.  It returns the exit status; None: EXIT_DONE.

# Several commands have these.
GROUP = Option("-g --group GROUP", "only this group")
TYPE = Option("-t --type TYPE", "only this type")
WAIT = Option("-w --wait [SECONDS]", "return when all are ready", default="vmWaitTimeout")
FORCE = Option("--force", "though it is more memory than the host has")
YES = Option("-y --yes", "don't ask")
WHICH_VM = "the VM: NAME, GROUP/NAME or GROUP/TYPE/NAME"
VM_OPTIONS = (Option("-n --name NAME", WHICH_VM, complete="vm"), GROUP, TYPE)
RUNNING_VM_OPTIONS = (Option("-n --name NAME", WHICH_VM, complete="running-vm"), GROUP, TYPE)
FIRMWARE = (
    Option("--uefi", "boot with UEFI"),
    Option("--secure-boot", "boot with UEFI, and signed systems only"),
    Option("--tpm", "have a TPM 2.0 (swtpm)"),
)
WHICH_VMS = (Option("-g --group GROUP", "the group"), TYPE, VM_OPTIONS[0])


# Options of vmtemplate, and the one that they go with.
GOES_WITH = {"sha256": "image", "sha512": "image", "insecure": "image", "include": "build", "rebuild": "build"}
GOES_WITH |= {"layer": "from", "no_clean": "from"}


@declare(
    Command("template", "vmtemplate", "[NAME]", ("template-name",), more=catalogue_help),
    Option("-L --list", "list the templates: name, size, clones, where from"),
    Option("--available", "list what can be downloaded: name, whether it is there, login, system"),
    Option("--image FILE|URL", "make NAME from a qcow2 or raw image"),
    Option("--sha256 HEX", "the image's checksum; a URL needs one", lambda text: checksum_text(f"sha256:{text}")),
    Option("--sha512 HEX", "likewise", lambda text: checksum_text(f"sha512:{text}")),
    Option("--insecure", "take the image at a URL without a checksum"),
    Option("--build SUITE", "make NAME from packages: Debian bookworm, trixie, Ubuntu jammy, noble", complete=SUITES),
    Option("--include PACKAGE,…", "more packages for --build", package_names),
    Option("--rebuild", "--build anew, though the cache has one of the same packages"),
    Option("--from VM", "make NAME of a VM that is stopped (GROUP/TYPE/NAME), or of a snapshot of it: VM@SNAPSHOT"),
    Option("--layer", "with --from: share what the VM's disk stands on, instead of copying it"),
    Option("--no-clean", "with --from: keep machine-id, host keys, logs"),
    Option("--warm", "freeze NAME when it has booted: from then on its clones wake up instead of booting"),
    Option("--cold", "forget that"),
    Option("--tree", "show templates, their layers and what stands on them, groups and the cache, with sizes on disk"),
    Option("--prune", "remove what nothing needs: the cache, layers, what killed commands left; it is listed first"),
    YES,
    Option("--delete", "delete NAME; refused while clones depend on it"),
    Option("--mem MB", "memory its clones start with", default="vmMem"),
    Option("--cpu N", "processors its clones start with", default="vmCpu"),
    Option("--user LOGIN", "who logs in to its clones", default="vmUser"),
    Option("--init KIND", "how hostname and keys get in: " + ", ".join(INIT_KINDS), INIT_KIND, complete=INIT_KINDS),
    Option("--arch ARCH", "what its clones' processor is: " + ", ".join(ARCHES), ARCH, complete=tuple(ARCHES)),
    *FIRMWARE,
)  # fmt: skip
def cmd_template(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """get and keep templates"""
    if args.list or args.available or args.tree or args.prune:
        no_more(words)
        show_templates(cloud, args)
        return
    name = one_operand(words, "NAME")
    exclusive(args, "sha256", "sha512", "insecure")
    way = exclusive(args, "image", "build", "from", "delete", "warm", "cold")
    for option, wanted in GOES_WITH.items():
        if exclusive(args, option) and way != wanted:
            raise UsageError(f"--{option.replace('_', '-')} goes with --{wanted}")
    asked = asked_settings(vars(args))
    if way in ("delete", "warm", "cold") and asked.keys() & {"vmArch", "vmFirmware", "vmTpm"}:
        raise UsageError(f"--{way}: what a template boots with is said when it is made")
    if way == "delete":
        delete_template(cloud, name)
    elif way == "warm":
        layer = freeze(cloud, name, asked)
        report.say(f"{name}: frozen; its memory takes {layer.frozen_size() / MIB:.0f} MB, --cold gives them back")
    elif way == "cold":
        size = make_cold(cloud, name)
        report.say(f"{name}: {size / MIB:.0f} MB are given back, once no clone runs that woke up on them")
    elif way == "from":
        template_from_vm(cloud, name, getattr(args, "from"), asked, args.layer, not args.no_clean)
    elif way == "build":
        check_new_template(cloud.tree, name)
        size = cloud.config.number("vmCreateDiskSize")
        arch = args.arch or os.uname().machine
        build = plan_build(args.build, args.include or [], size, args.init == "cloud-init", arch)
        settings = template_settings(cloud, {"vmInit": build.init, **asked})
        template_from_packages(cloud, name, build, settings, args.rebuild)
    elif way == "image":
        template_from_address(cloud, name, args, template_settings(cloud, asked))
    else:
        template_from_catalogue(cloud, name, asked, functools.partial(take_over, cloud))


def show_templates(cloud: Cloud, args: argparse.Namespace) -> None:
    """--available, --list and --tree; --prune: remove what nothing needs, but for what a command is at work on."""
    if args.available or args.list:
        report_table(catalogue_rows(cloud.tree) if args.available else template_rows(cloud))
        return
    if args.tree:
        report_table([[row] for row in disk_rows(cloud.tree)])
        return
    settle_stopped(cloud, cloud.tree.templates())
    images = os.path.join(cache_home(), "images")
    found = {os.path.join(images, name): "made, or downloaded, anew when it is wanted" for name in folders_in(images)}
    found.update(dict.fromkeys(left_over(cloud.tree), "left by a command that was killed"))
    unused = [folder for folder in found if not is_locked(folder)]
    report_table([(f"{disk_usage(folder) / MIB:.1f} MB", folder, found[folder]) for folder in unused])
    if unused:
        confirm(args, "They will be removed.")
    for folder in unused:
        with FolderLock(folder, wait=0):
            remove_tree(folder)


def template_from_address(cloud: Cloud, name: str, args: argparse.Namespace, settings: Mapping[str, str]) -> None:
    """--image: a path, or a URL."""
    expected = args.sha256 or args.sha512 or ""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", args.image):
        template_from_image(cloud, name, args.image, settings, expected)
        return
    try:
        web_address(args.image)
    except ValueError as error:
        raise UsageError(f"{args.image}: expected {error}, or a path") from None
    if not expected and not args.insecure:
        hint = "give --sha256 HEX or --sha512 HEX, or --insecure"
        raise UsageError(f"{args.image}: nothing says what it must be", hint)
    template_from_url(cloud, name, args.image, settings, expected)


def report_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows on stdout, their columns aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] if rows else []
    for row in rows:
        report.data("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]))


@declare(
    Command("create", "vmcreate"),
    Option("-n --name NAME", "the template; with -a a template, or a VM (GROUP/NAME)", complete="adjusted"),
    Option("-i --iso ISO", "boot from this ISO: a path, or a name in isoDir"),
    Option("-m --mem MB", "memory", default="vmMem"),
    Option("-c --cpu CPUS", "processors", default="vmCpu"),
    Option("-C --cpu-cap PERCENT", "a limit of CPU time, of one processor; 0: none", CPU_CAP),
    Option("-d --disk GB", "disk size; with -a: grow to", default="vmCreateDiskSize"),
    Option("-a --adjust", "change an existing one: only what is given"),
    *FIRMWARE,
)
def cmd_create(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """make a template from an ISO, or adjust one"""
    for value, name in ((args.name, "-n NAME"), (args.adjust or args.iso, "-i ISO")):
        if not value:
            raise UsageError(f"{name} is missing", "-h shows how it is called")
    if cloud.config["vmCreateGroup"] != TEMPLATES and not args.adjust:
        report.warn(f"vmCreateGroup={cloud.config['vmCreateGroup']}: not used, what vmcreate makes is a template")
    iso = find_iso(cloud.config, args.iso) if args.iso else ""
    asked = {**asked_settings(vars(args)), **({"vmCpuCap": str(args.cpu_cap)} if args.cpu_cap is not None else {})}
    if args.adjust:
        if not asked and not args.disk and not iso:
            raise UsageError("nothing to adjust: give -m, -c, -C or -d", "-h shows how it is called")
        vm = cloud.tree.need(args.name, first=lambda vm: vm.is_template)
        if iso and vm.is_template:
            check_no_clones(cloud, vm)  # what boots from the ISO may write to the disk
        with FolderLock(vm.folder):
            need_stopped(cloud, vm)
            if args.disk:
                grow_disk(cloud, vm, args.disk)
            if asked:
                vm.write_conf(asked)
    else:
        settings = template_settings(cloud, asked)
        warn_of_memory(int(settings["vmMem"]))
        with NewTemplate(cloud, args.name, read_only=False) as new:
            create_disk(new.disk, args.disk or cloud.config.number("vmCreateDiskSize"))
            vm = new.finish(settings)
    if iso:
        if error := start_all(cloud, [vm], iso=iso, gui=True)[0]:
            if not args.adjust:
                delete_template(cloud, vm.name)
            raise error
        report.say(f"{report.program}: {vm} boots {iso}; when it is done: vmstop -n {vm}")
        open_screens([vm])


@declare(
    Command("change", "vmchange", "[VM]", ("vm",)),
    Option("-n --vm VM", WHICH_VM),
    Option("-m --mem MB", "memory", MEMORY_MB), Option("-c --cpu CPUS", "processors", CPU_COUNT),
    Option("-C --cap PERCENT", "a limit of CPU time, in per cent of a processor", CPU_CAP),
    Option("-d --disk GB", "grow its system disk to this size, while it runs too", DISK_GB),
    Option("--add-disk GB", "another disk, while it runs too", DISK_GB),
    Option("--remove-disk N", "destroy its disk N, with what is on it; 1 is vdb", whole_number(1, MAX_DISKS)),
    Option("--ports PORTS", "the ports that it has from now on: [IP:]HOST:GUEST,…; '' for none", PORTS),
    Option("--name NEW", "call it so from now on"),
    Option("--group GROUP", "move it to this group", complete="group"),
    Option("--type TYPE", "move it to this type"), YES,
)  # fmt: skip
def cmd_change(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """change a VM that is switched off; its ports and disks while it runs, too"""
    vm = cloud.tree.need(one_operand(words, "VM") if args.vm is None else args.vm)
    given = {"vmMem": args.mem, "vmCpu": args.cpu, "vmCpuCap": args.cap, "vmPorts": args.ports}
    changes = {key: str(value) for key, value in given.items() if value is not None}
    place = [args.group or vm.group, args.type or vm.type, args.name or vm.name]
    moves = place != [vm.group, vm.type, vm.name]
    if not (changes or args.disk or args.add_disk or args.remove_disk or moves):
        raise UsageError("nothing to change: say what", "-h shows how it is called")
    if args.remove_disk:
        check_removal(cloud, vm, args.remove_disk)
        confirm(args, f"what is on disk {args.remove_disk} of {vm} will be gone.", needed=True)
    vm = move_vm(cloud, vm, *place) if moves else vm  # first: what can't be done costs no disk
    with FolderLock(vm.folder):
        vm.reread()
        if changes.keys() - set(LIVE) or args.remove_disk or not vm.is_running():
            need_stopped(cloud, vm)
        change_settings(cloud, vm, changes)
        for value, do in ((args.disk, grow_disk), (args.remove_disk, remove_disk), (args.add_disk, add_disk)):
            if value:
                do(cloud, vm, value)


COLD = Option("--cold", "have them boot, though their template is frozen (vmtemplate --warm)")
ALLOW_SHARE = Option("--allow-share DIR", "with -f: share= may name folders below DIR, too, not only below FILE's own")


@declare(
    Command("instantiate", "vminstantiate"),
    Option("-n --template TEMPLATE", "the template to clone, or GROUP/TYPE/NAME: a VM, as it is now"),
    Option("-C --count COUNT", "how many", default="vmCount"),
    Option("-g --group GROUP", "the group they belong to", default="vmGroup", complete="group"),
    Option("-t --type TYPE", "their type", default="vmSubGroup"),
    Option("-f --file FILE", "make what a description file lists; the file's name is the group's"),
    Option("-o --options OPTIONS", "; ".join(each.text for each in CLONE_OPTIONS)),
    ALLOW_SHARE, COLD, WAIT,
    Option("--dry-run", "check everything, say what would be made, make nothing"), FORCE,
)  # fmt: skip
def cmd_instantiate(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """make clones of a template and start them"""
    group, requests = requests_of(cloud, args)
    for request in requests if args.cold else ():
        request.settings["vmCold"] = "yes"
    with contextlib.ExitStack() as undo:
        if "/" in requests[0].template and cloud.tree.find(requests[0].template) and not args.dry_run:
            requests[0].template = template_as_is(cloud, requests[0].template)
            undo.callback(result_of, functools.partial(delete_template, cloud), requests[0].template)
        check_requests(cloud, group, requests, args.force)
        if args.dry_run:
            for request in requests:
                report.data(f"{request.template}: {plural(request.count, 'clone')} in {group}/{request.type}")
            return EXIT_DONE
        vms, errors = instantiate(cloud, group, requests)
        if vms:
            undo.pop_all()
    errors += end_start(cloud, args, vms)
    for vm in vms:
        report.data(vm.name)
    open_screens(vms)
    return report_errors(errors)


def requests_of(cloud: Cloud, args: argparse.Namespace) -> tuple[str, list[CloneRequest]]:
    """The group and the sets of clones that the command line asks for."""
    type = checked_name("type", cloud.config["vmSubGroup"] if args.type is None else args.type)
    group = args.group
    if args.file is not None:
        for given, name in ((args.template, "-n"), (args.count, "-C"), (args.options, "-o")):
            if given is not None:
                raise UsageError(f"-f and {name} exclude each other", "the description file says it all")
        group = cloud.tree.group_called(group_of_file(args.file)) if group is None else group
        return group, read_description(args.file, type, args.allow_share)
    if args.allow_share is not None:
        raise UsageError("--allow-share goes with -f FILE only")
    if not args.template:
        raise UsageError("which template? give -n TEMPLATE, or -f FILE", TEMPLATES_HINT)
    request = CloneRequest("", args.template, args.count or cloud.config.number("vmCount"), type, {})
    try:
        request.set_options(args.options or "")
    except UsageError as error:
        raise UsageError(f"-o: {error}", error.hint) from None
    return cloud.config["vmGroup"] if group is None else group, [request]


def report_errors(errors: Sequence[Error]) -> int:
    """Say each error; the exit status that they amount to."""
    for error in errors:
        report.error(error)
    statuses = {error.status for error in errors}
    return statuses.pop() if len(statuses) == 1 else EXIT_FAILED if statuses else EXIT_DONE


@declare(
    Command("run", "vmrun"),
    Option("-f --file FILE", "make what a description file lists (-: stdin), and run it; ^C destroys it all"),
    Option("-r --resume GROUP", "run GROUP's VMs, which were kept; ^C stops them and keeps them", complete="group"),
    Option("-s --stop GROUP", "have the vmrun that manages GROUP stop and keep its VMs", complete="managed-group"),
    Option("-g --gui", "each VM has a screen"),
    Option("--group GROUP", "with -f: the group's name, instead of the file's", complete="group"),
    ALLOW_SHARE, COLD,
    Option("--add", "with -f: though the group has VMs already; they are run too"),
    Option("--apply", "with -f: first have the group be what FILE says, as vmapply does; ^C keeps its VMs"),
    Option("--background", "return when all VMs are ready"),
    Option("--destroy", "with -r or --apply: ^C destroys them"), YES, FORCE,
)  # fmt: skip
def cmd_run(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """run a group in the foreground"""
    if sum(each is not None for each in (args.file, args.resume, args.stop)) != 1:
        raise UsageError("give exactly one of -f FILE, -r GROUP and -s GROUP", "-h shows how it is called")
    for name in ("group", "allow_share", "cold", "add", "apply", "force"):
        if args.file is None and getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} goes with -f FILE only")
    if args.destroy and args.resume is None and not args.apply:
        raise UsageError("--destroy goes with -r GROUP and --apply only")
    if args.gui and args.stop is not None:
        raise UsageError("-g goes with -f FILE and -r GROUP")
    if args.stop is not None:
        stop_managed(cloud, args.stop)
        return EXIT_DONE
    status, talk = go_to_background() if args.background else (None, -1)
    return run_group(cloud, args, talk) if status is None else status


def run_group(cloud: Cloud, args: argparse.Namespace, talk: int) -> int:
    """vmrun -f and -r, in the foreground (`talk`: -1) or in the child of go_to_background()."""
    group, requests = args.resume, []
    if args.file is not None:
        group = args.group or cloud.tree.group_called(group_of_file(args.file))
    if args.apply:
        vars(args).update(dict.fromkeys(("dry_run", "restart", "replace", "wait")))  # vmapply's
        status = apply(cloud, group, read_description(args.file, cloud.config["vmSubGroup"], args.allow_share), args)
        if status:
            return status
    elif args.file is not None:
        requests = read_description(args.file, cloud.config["vmSubGroup"], args.allow_share)
        if not args.add:
            check_new_group(list(cloud.tree.vms(group)), group)  # else its own ports would be in the way
        check_requests(cloud, group, requests, args.force)
        for key, given in (("vmGui", args.gui), ("vmCold", args.cold)):
            for request in requests if given else ():
                request.settings[key] = "yes"
    elif group == TEMPLATES:
        raise UsageError("templates are not run as a group", "vm -n NAME runs one")
    else:
        cloud.tree.need_group(group)
    end = KEEP if (args.resume is not None or args.apply) and not args.destroy else DESTROY
    return supervise(cloud, group, requests, bool(requests) and not args.add, args.gui, talk, end)


@declare(
    Command("apply", "vmapply"),
    Option("-f --file FILE", "the description (-: stdin); the file's name is the group's"),
    Option("-g --group GROUP", "the group, if not the file's name", complete="group"),
    Option("--describe", "write the description that GROUP is"),
    Option("--dry-run", f"only show the plan; exit status {EXIT_DIFFERS}: there is something to do"),
    Option("--restart", "restart VMs, one at a time, where that is needed"),
    Option("--replace", "make VMs anew, one at a time, of another template or user-data; their disks are lost"),
    WAIT, ALLOW_SHARE, YES, FORCE,
)  # fmt: skip
def cmd_apply(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """make a group what a description file says: make, change and destroy VMs"""
    if args.describe:
        if not args.group:
            raise UsageError("-g GROUP is missing", "vmrunning -a lists the groups")
        cloud.tree.need_group(args.group)
        for line in describe(cloud, args.group):
            report.data(line)
        return EXIT_DONE
    if args.file is None:
        raise UsageError("-f FILE is missing", "-h shows how it is called")
    group = cloud.tree.group_called(group_of_file(args.file)) if args.group is None else args.group
    return apply(cloud, group, read_description(args.file, cloud.config["vmSubGroup"], args.allow_share), args)


def apply(cloud: Cloud, group: str, requests: Sequence[CloneRequest], args: argparse.Namespace) -> int:
    """Show the plan for a group, and do what it says; the exit status."""
    with contextlib.ExitStack() as stack:
        if not args.dry_run:
            cloud.tree.prepare()
            stack.enter_context(FolderLock(apply_lock(cloud.tree, group), make=True))
            stack.callback(remove_empty, apply_lock(cloud.tree, group))
        steps = plan_group(cloud, group, requests, bool(args.replace), args.force)
        todo = [step for step in steps if step.verb != "keep"]
        for step in steps:
            if todo or step.text:
                report.data(step.line)
        if not todo:
            report.data("nothing to do")
        if args.dry_run:
            return EXIT_DIFFERS if todo else EXIT_DONE
        if lost := [step.line for step in steps if step.loses and (args.restart or not step.restart)]:
            confirm(args, f"{'; '.join(lost)}: what is on these disks will be gone.", needed=True)
        return report_errors(carry_out(cloud, group, todo, args.restart, functools.partial(end_start, cloud, args)))


@declare(
    Command("port", "vmport", "[[IP:]HOST:GUEST]"),
    *VM_OPTIONS,
    Option("-L --list", "list published ports: NAME GROUP/TYPE IP:HOST GUEST"),
    Option("--delete", "publish it no more"),
)
def cmd_port(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """publish a VM's TCP ports on this host, until it is destroyed: 8080:80, on 127.0.0.1 if no IP is said"""
    every = args.list and args.name is None
    vm = None if every else cloud.tree.need(args.name, args.group, args.type, first=VM.is_running)
    if not vm or args.list:
        no_more(words)
        cloud.tree.need_group(args.group, args.type)
        for each in [vm] if vm else cloud.tree.vms(args.group or "", args.type or ""):
            for ip, host, guest in ports_of(each):
                report.data(f"{each.name} {each.place} {ip}:{host} {guest}")
        return
    asked = checked(PORTS, one_operand(words, "[IP:]HOST:GUEST") or "-", repr(words[0]))
    with FolderLock(vm.folder):
        vm.reread()
        has, ports = parse_ports(vm.get("vmPorts")), parse_ports(asked)
        if args.delete and (stray := [each for each in ports if each not in has]):
            raise NotFound(f"{join_ports(stray)} is not published", "vmport -L lists what is", vm=vm)
        new = set_ports(cloud, vm, [each for each in has if each not in ports] if args.delete else [*has, *ports])
    for ip, host, guest in new:
        report.data(f"{vm.name} {vm.place} {ip}:{host} {guest}")


@declare(
    Command("running", "vmrunning", more=lambda: packaged("help/vmrunning")), GROUP, TYPE,
    Option("-a --all", "the stopped ones too, with their state"),
    Option("-l --long", "a table: NAME GROUP/TYPE STATE IP UPTIME CPU MEMORY PORTS; what its qemu uses now"),
    Option("--json", "a JSON list of objects with all that is known; null is what isn't, or what it hasn't"),
)  # fmt: skip
def cmd_running(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """list running VMs: NAME GROUP/TYPE IP"""
    form = exclusive(args, "long", "json")
    cloud.tree.need_group(args.group, args.type)
    group, type = args.group or "", args.type or ""
    if form == "long":
        rows = list(usage_rows(cloud, group, type, args.all))
        report_table([("NAME", "PLACE", "STATE", "ADDRESS", "UPTIME", "CPU", "MEMORY", "PORTS"), *rows])
    elif form == "json":
        found = listed(cloud.tree, group, type, args.all)
        report.data(json.dumps([vm_facts(cloud, *each) for each in found], indent=2))
    else:
        for row in vm_rows(cloud, group, type, every=args.all):
            report.data(row)


@declare(
    Command("stop", "vmstop", "[VM…]", ("vm",)), *WHICH_VMS,
    Option("-d --destroy", "destroy them too: disks, settings, everything"),
    Option("--kill", "switch off at once instead of shutting down"),
    Option("--timeout S", "seconds before switching off", default="vmStopTimeout"),
    Option("--save", "keep their memory on disk: they go on there at their next start"),
    Option("--discard", "forget memory that was saved: they boot at their next start"), YES,
)  # fmt: skip
def cmd_stop(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """stop a group, a type of it or single VMs"""
    way = exclusive(args, "destroy" if args.destroy else "kill", "save", "discard")  # to destroy is to switch off
    try:
        vms = chosen_vms(cloud, args, words)
    except NotFound as error:  # to destroy what is gone already is no error, but said: the name may be mistyped
        if not args.destroy or args.name is not None or words:
            raise
        error.text += ", so there is nothing to destroy"
        report.error(error)
        vms = []
    if args.destroy:
        if args.group == TEMPLATES or any(vm.is_template for vm in vms):
            raise UsageError("templates are not destroyed with vmstop", "vmtemplate --delete NAME")
        if kept := sum(len(snapshots_of(vm)) for vm in vms):
            confirm(args, f"{plural(len(vms), 'VM')} with {plural(kept, 'snapshot')} will be gone.")
        errors = destroy_all(cloud, vms, args.group or "")
    elif way == "save":
        running = [vm for vm in vms if vm.is_running() or args.name or words]
        errors = [each for each in in_parallel(save, running) if each]
    elif way == "discard":
        errors = []
        with locked(vms):
            for vm in vms:
                remove_file(vm.saved_file)
    else:
        errors = stop_all(cloud, vms, 0 if args.kill else args.timeout)
    return report_errors(errors)


def chosen_vms(cloud: Cloud, args: argparse.Namespace, words: Sequence[str] = ()) -> list[VM]:
    """The VMs that -g, -t and -n mean, or `words`, their names.  Raises NotFound where there are none."""
    names = [*([] if args.name is None else [args.name]), *words]
    if "" in names:
        raise UsageError("the VM's name is empty", "vmrunning lists the VMs")
    if names:
        found = [cloud.tree.need(name, args.group, args.type) for name in names]
        return list({vm.full_name: vm for vm in found}.values())
    cloud.tree.need_group(args.group, args.type)
    if args.group is None:
        raise UsageError("which group? give -g GROUP, or -n VM", "vmrunning lists them")
    return [vm for vm in cloud.tree.vms(args.group) if args.type in (None, vm.type)]


def split_name(args: argparse.Namespace, words: list[str]) -> tuple[str | None, list[str]]:
    """The VM's name, what -n says or else the first word, and the words that are left."""
    return (args.name, words) if args.name is not None or not words else (words[0], words[1:])


def confirm(args: argparse.Namespace, question: str, needed: bool = False) -> None:
    """On a terminal, without -y: go on after a yes.  Elsewhere it is said, and done; Error where -y is `needed`."""
    asks = sys.stdin.isatty() and sys.stderr.isatty()
    if not args.yes and not asks and needed:
        raise Error(f"{question} Nothing has been done", "-y says that it is meant")
    if args.yes or not asks:
        report.say(f"{report.program}: {question}")
        return
    report.say(f"{report.program}: {question} Go on? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Error("nothing has been done")


@declare(Command("start", "vmstart", "[VM…]", ("vm",)), *WHICH_VMS, WAIT)
def cmd_start(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """start VMs that are stopped, and don't connect to them"""
    asked = chosen_vms(cloud, args, words)
    vms = [vm for vm in asked if not vm.is_running()]
    errors = start_stopped(cloud, vms)
    errors += filter(None, in_parallel(need_awake, [vm for vm in asked if vm not in vms]))
    return report_errors([*errors, *end_start(cloud, args, [vm for vm in vms if vm.is_running()])])


def end_start(cloud: Cloud, args: argparse.Namespace, vms: Sequence[VM]) -> list[Error]:
    """What is left to do for VMs that have just been started: with -w until they are ready; the errors."""
    if args.wait is None:
        configure_later(cloud, vms)
        return []
    seconds, limit = (cloud.config.number("vmWaitTimeout"), "") if args.wait is True else (args.wait, "-w SECONDS")
    return wait_all(cloud, vms, seconds, limit)


@declare(Command("pause", "vmpause", "[VM…]", ("running-vm",)), *WHICH_VMS)
def cmd_pause(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """have VMs stand still"""
    return tell_running(cloud, args, words, "stop")


@declare(Command("resume", "vmresume", "[VM…]", ("running-vm",)), *WHICH_VMS)
def cmd_resume(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """have VMs go on that stand still"""
    return tell_running(cloud, args, words, "cont")


def tell_running(cloud: Cloud, args: argparse.Namespace, words: Sequence[str], command: str) -> int:
    """Give qemu's command to each of the VMs that runs."""

    def tell(vm: VM) -> None:
        with FolderLock(vm.folder):
            if not vm.is_running():
                raise WrongState("it is not running", vm=vm)
            with connect_qemu(vm) as qemu:
                remove_file(vm.saved_file)  # by a command that was killed: it is old from now on
                qemu.execute(command)
            remove_file(vm.still_file)

    vms = [vm for vm in chosen_vms(cloud, args, words) if vm.is_running() or args.name or words]
    return report_errors([each for each in in_parallel(tell, vms) if each])


@declare(
    Command("snapshot", "vmsnapshot", "[NAME]"), *WHICH_VMS,
    Option("-L --list", "list the snapshots: name, group, when, size on disk, memory, VMs"),
    Option("--ram", "keep what is in the memory of those that run, too"),
    Option("--sync", "have the guests write out first what they hold"),
    Option("--delete", "delete the snapshot NAME"),
)  # fmt: skip
def cmd_snapshot(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """keep what VMs are at this moment"""
    if args.list:
        no_more(words)
        if args.group:
            cloud.tree.need_group(args.group)
        report_table(list(snapshot_rows(cloud.tree, args.group or "")))
        return
    name = one_operand(words, "NAME")
    if args.delete:
        everywhere = args.group is args.type is args.name is None
        chosen = list(cloud.tree.vms()) if everywhere else chosen_vms(cloud, args)
        with locked(each.vm for each in need_snapshots(chosen, name)):
            for each in need_snapshots(chosen, name):
                delete_snapshot(each)
    else:
        take_snapshot(cloud, chosen_vms(cloud, args), name, bool(args.ram), bool(args.sync))


@declare(Command("rollback", "vmrollback", "NAME"), *WHICH_VMS, YES, Option("--exact", "destroy the VMs made since"))
def cmd_rollback(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """go back to a snapshot; what has changed since is lost"""
    name, vms = one_operand(words, "NAME"), chosen_vms(cloud, args)
    found = need_snapshots(vms, name)
    others = [vm for vm in vms if vm not in [each.vm for each in found]]
    then = {vm for each in found for vm in read_existing(each.members).splitlines()}
    made = [vm for vm in others if then and not {vm.full_name, f" {vm.full_name}"} & then] if args.exact else []
    gone = f" Destroyed will be {', '.join(vm.name for vm in made)}." if made else ""
    lost = f"{plural(len(found), 'VM')} will be as in {name}; what has changed since is lost.{gone}"
    confirm(args, lost, needed=bool(made))
    with locked(vms):
        found = need_snapshots(vms, name)
        check_room(vms[0].folder, len(found) * MIB, vms[0].base, "going back takes up to {} MB", ROOM_HINT)
        again = [each.vm for each in found if each.vm.is_running() or os.path.exists(each.memory)]
        raise_first(in_parallel(lambda vm: stop_locked(vm, 0), [each.vm for each in found]))
        for each in found:
            for disk in roll_back(each):
                report.say(f"{each.vm}: it has got a disk since, which is kept: {disk}")
        if left := [vm.name for vm in others if vm not in made]:
            report.say(f"not in {name}, and left as they are: {', '.join(left)}")
        missing = sorted(each for each in then - {vm.full_name for vm in cloud.tree.vms()} if each[:1] != " ")
        if missing and args.name is None:
            report.say(f"in {name}, but destroyed since, with what it was then: {', '.join(missing)}")
        errors = [error for error in start_all(cloud, again, held=True) if error]
    configure_later(cloud, [vm for vm in again if vm.is_running()])
    return report_errors(errors + (destroy_all(cloud, made) if made else []))


def running_vm(cloud: Cloud, words: str | None, group: str | None = None, type: str | None = None) -> VM:
    """The running VM that `words`, -g and -t mean."""
    vm = cloud.tree.need(words, group, type, first=VM.is_running, address_of=lambda vm: address_of(cloud, vm))
    state, _ = vm.state()
    if state != "running":
        hint = f"vmstart {vm} starts it" if state == "stopped" else f"vmrunning -a shows its state: {state}"
        raise WrongState("it is not running", hint, vm=vm)
    return vm


# Commands for ways in and hosts ######################################################################
#
# The same for what connects to VMs, and for what is about this host and its networks.


@declare(Command("ssh", "vmssh", "[LOGIN@]VM [WORDS...]", ("running-vm",), passes=SSH_FLAGS + SSH_VALUES))
def cmd_ssh(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """ssh into a VM, or run a command in it; ssh's options, before or after the VM, are ssh's"""
    options, rest = split_ssh_words(words)
    if not rest:
        raise UsageError("which VM?", "vmssh VM|IP [WORDS...]; vmrunning lists the VMs")
    login, _, name = rest[0].rpartition("@")
    become_ssh(cloud, running_vm(cloud, name), rest[1:], first=[*options, *(["-l", login] if login else [])])


def become_ssh(cloud: Cloud, vm: VM, words: Sequence[str], fresh: bool = False, first: Sequence[str] = ()) -> None:
    """Wait until one can log in to a running VM, then be ssh: stdin, terminal and exit status are its own."""
    wait_login(cloud, vm, fresh)
    options, command = split_ssh_words(words)
    become([*ssh_argv(cloud, vm, [*first, *options]), *command])


def wait_login(cloud: Cloud, vm: VM, fresh: bool = False) -> None:
    """Wait for a running VM's ssh; then its host key is known, and its name set.  `fresh`: it has just been started."""
    if not vm.get("vmUuid"):  # bash started it: its host key is pinned under a UUID all the same
        with FolderLock(vm.folder):
            vm.write_conf({"vmUuid": new_identity(set())[0]})
    wait = Wait(cloud, vm, cloud.config.number("vmWaitTimeout"), say=True)
    wait_ssh(wait)
    find_init_kind(wait)
    pin_host_key(wait)
    template = fresh and vm.is_template and vm.get("vmInit") != "none"
    seeded = vm.get("vmInit") == "cloud-init" and not os.path.exists(vm.configured_file)
    try:
        if template or seeded or vm.get("vmInit") in ("ssh", "auto") or is_renamed(vm):
            configure(wait, cloud_init=seeded, once=True)
        if template:
            clean_at_shutdown(cloud, vm)
        set_clock(wait)
        mount_shares(wait)  # last: that may fail
    except Error as error:
        report.warn(str(error))


@declare(
    Command("ssh-config"),
    Option("--install", "have ~/.ssh/config include it, and keep it up to date as VMs come and go"),
    Option("--remove", "take that away again"),
)
def cmd_ssh_config(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """print an ssh configuration with the VMs' names, for ssh, scp, sftp, rsync, git and editors"""
    ours = SshConfig(cloud)
    if not exclusive(args, "install", "remove"):
        report.data(ours.text()[0].rstrip("\n"))
        return
    if args.install:
        cloud.tree.prepare()
        for each in ours.write():
            report.say(f"{report.program}: not offered: {each}")
    ours.include(args.install)
    if args.remove:
        remove_file(ours.path)


@declare(
    Command("cp", "vmcp", "SRC… DST", ("running-vm+file",), more=lambda: packaged("help/vmcp")),
    Option("-r --recursive", "folders too"),
    Option("-p --preserve", "keep times and modes"),
    Option("-O --old", "scp's old protocol, for a guest that has scp and no sftp-server"),
    Option("--sync", "by rsync: only what differs; folders, links, times and modes too"),
)
def cmd_cp(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """copy files into VMs, out of them, and between them"""
    if len(words) < 2:
        raise UsageError("SRC and DST are needed", "vmcp FILE VM:PATH, or vmcp VM:PATH FILE")
    found = [find_places(cloud, word) for word in words]
    if not (inside := [vm for places in found for vm, _ in places if vm]):
        raise UsageError("none of them is in a VM", "VM:PATH is, and ./a:b is a file of this host")
    if any(len(places) > 1 for places in found[:-1]):
        raise UsageError("several VMs to copy from", "only DST may be a pattern that several fit")
    if "-" in words and (args.sync or len(words) > 2 or len(inside) > 1):
        raise UsageError("- is for one file, in one VM, without --sync")
    if "-" in words:
        head, _, path = next(word for word in words if word != "-").partition(":")
        script = f"cat {'<' if words[1] == '-' else '>'}{shlex.quote(path.removeprefix('~/'))}"
        login = head.rpartition("@")[0]
        become_ssh(cloud, inside[0], [script], first=["-l", login] if login else [])
    sources, targets = [places[0] for places in found[:-1]], dict(found[-1])
    if len(targets) == 1:
        become(copy_argv(cloud, args, [*sources, *targets.items()]))
    copy = functools.partial(copy_argv, cloud, args)
    results = in_parallel(lambda vm: run(copy([*sources, (vm, targets[vm])]), timeout=None), list(targets))
    return report_errors([each for each in results if isinstance(each, Error)])


def find_places(cloud: Cloud, word: str) -> list[tuple[VM | None, str]]:
    """An operand of vmcp: (its VM, None for this host; as scp is told it); several where it is a pattern of VMs."""
    head, colon, path = word.partition(":")
    login, at, name = head.rpartition("@")
    if not colon or word[0] in "./":
        return [(None, word)]
    if re.search("[*?[]", name):
        way = (lambda vm: vm.name, lambda vm: f"{vm.group}/{vm.name}", lambda vm: vm.full_name)[min(2, name.count("/"))]
        vms = [vm for vm in cloud.tree.running() if fnmatch.fnmatchcase(way(vm).lower(), name.lower())]
    else:
        vms = [running_vm(cloud, name)]
    if not vms:
        raise NotFound(f"{name}: no such running VM", VMS_HINT)
    return [(vm, f"{login}{at}{copy_host(vm)}:{path}") for vm in vms]


def copy_host(vm: VM) -> str:
    """What scp and rsync are told as its host: no name of another VM's, which one with dots could become."""
    return vm.get("vmUuid") if "." in vm.full_name else vm.full_name.replace("/", ".")


def copy_argv(cloud: Cloud, args: argparse.Namespace, places: Sequence[tuple[VM | None, str]]) -> list[str]:
    """scp, or rsync, with a configuration for the VMs of these places, after which the user's own counts."""
    call, blocks = ssh_options(**OWN_CALL, SessionType="default"), []
    for vm in [vm for vm, _ in places if vm]:
        wait_login(cloud, vm)
        blocks.append(ssh_block(cloud, vm, [copy_host(vm)], *call))
    fd = os.memfd_create("ssh_config", 0)
    write_all(fd, "".join(["IgnoreUnknown *\n", *blocks, "Host *\n    Include config\n"]).encode())
    config, spelt = f"/proc/{os.getpid()}/fd/{fd}", [word for _, word in places]  # ssh closes what it inherits
    if args.sync:
        shown = ["--info=progress2"] if sys.stdout.isatty() else []
        return ["rsync", "-a", *shown, "-e", f"ssh -F {config}", "--", *spelt]
    flags = {"-3": places[0][0] and places[-1][0], "-r": args.recursive, "-p": args.preserve, "-O": args.old}
    return ["scp", "-F", config, *(flag for flag, given in flags.items() if given), "--", *spelt]


@declare(
    Command("vm", "vm", "[WORDS...]"),
    Option("-n --name NAME", "the VM, or the template", complete="vm"),
    Option("-g --group GROUP", "its group [templates]"),
    Option("-t --type TYPE", "its type"),
    Option("-i --iso ISO", "boot this ISO first: a path, a name in isoDir, or none"),
    Option("-G --gui", "start it with a screen, and don't connect"),
)
def cmd_vm(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """run a VM and connect to it by ssh"""
    iso = "" if args.iso in (None, "none") else find_iso(cloud.config, args.iso)
    if args.group:
        cloud.tree.need_group(args.group)
    vm = cloud.tree.need(args.name, args.group or None, args.type or None, first=lambda vm: vm.is_template)
    if fresh := not vm.is_running():
        for error in start_stopped(cloud, [vm], iso, args.gui):
            raise error
    elif iso:
        raise WrongState("it runs already, without that ISO", f"vmstop -n {vm} stops it", vm=vm)
    elif args.gui and not screen_of(vm):
        raise WrongState("it runs without a screen", f"vmconsole -s -n {vm}", vm=vm)
    if args.gui:
        open_screens([vm])
    else:
        become_ssh(cloud, vm, words, fresh)


@declare(
    Command("upgrade", "vmupgrade", "TEMPLATE", ("template",)),
    Option("--timeout S", f"the longest that it may take, in seconds [{UPGRADE_SECONDS}]", SECONDS),
)
def cmd_upgrade(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """upgrade the system of a template; its clones stay as they are"""
    name = one_operand(words, "TEMPLATE")
    upgrade(cloud, name.removeprefix(f"{TEMPLATES}/"), UPGRADE_SECONDS if args.timeout is None else args.timeout)


@declare(
    Command("inventory", "vminventory"),
    Option("--list", "the inventory as JSON, for ansible"),
    Option("--host HOST", "the variables of one host as JSON"),
)
def cmd_inventory(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """what runs, for ansible (--list) and for people"""
    if args.list or args.host is not None:
        known = inventory(cloud)
        report.data(json.dumps(known if args.list else known["_meta"]["hostvars"].get(args.host, {}), indent=2))
    else:
        for row in vm_rows(cloud):
            report.data(row)


@declare(
    Command(
        "net", operands="up | down | status | exec CMD... | connect ADDR PORT",
        complete=(("up", "down", "status", "exec", "connect"),), bare=True,
    ),
    Option("--private", "up, down, status: the user's own network, which needs no root"),
    Option("--bridge", "the host's bridge, which is root's"),
    Option("--tap [VM]", "exec: open a tap on the network, of a VM's, as descriptor 3"),
    Option("--fdpass", "connect: hand the connection itself to ssh (ProxyUseFdpass)"),
)  # fmt: skip
def cmd_net(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """the network between the VMs: up, down, status; exec and connect go into the private one"""
    verb, rest = (words[0], words[1:]) if words else ("", [])
    kind = kind_of_network(config, args, rest) if verb in ("up", "down", "status") else ""
    with contextlib.closing(Cloud(config)) as cloud:  # as it is: a ProxyCommand must be quick, `down` is what it says
        private, bridge = cloud.private, cloud.bridge
        if verb == "status":
            lines = (*bridge.status(), *bridge_faults(config)) if kind != "private" else ()
            for line in (*lines, *(private.status() if kind != "bridge" else ())):
                report.data(line)
        elif kind and kind != "private":
            BridgeSetup(config).up() if verb == "up" else BridgeSetup(config).down()
        elif verb == "up":
            cloud.tree.prepare()
            private.up(keep=True)
        elif verb == "down":
            private.down_if_unused()
        elif verb == "exec":
            vm = cloud.tree.need(args.tap) if isinstance(args.tap, str) else None
            run_inside(bridge if args.bridge else private, rest, bool(args.tap), vm)
        elif verb == "follow":  # the network's holder
            private.follow(rest)
        elif verb == "connect":
            if len(rest) != 2 or not rest[0]:
                raise UsageError("connect takes an address and a port", "nocloud net connect 10.88.0.2 22")
            address = checked(HOST_NAME, rest[0], repr(rest[0]))
            private.connect(address, checked(whole_number(1, 65535), rest[1], repr(rest[1])), args.fdpass)
        else:
            raise UsageError(f"{verb or 'no verb'}: expected up, down, status, exec or connect")


def run_inside(network: Network, argv: Sequence[str], tap: bool, vm: VM | None) -> None:
    """`net exec`: become a program in the network; `tap`: it gets one, of `vm` if there is one, as descriptor 3."""
    if not argv:
        raise UsageError("which command?", "nocloud net exec CMD...")
    if not find_program(argv[0]) and package_of(argv[0], 0) == argv[0]:
        raise MissingProgram(f"{argv[0]}: not found")  # any word may stand there: no package is guessed
    need_program(argv[0])
    if not tap:
        network.move_in()
        become(argv)
    with network.hold():
        fd, _ = network.tap(vm)
    network.close()  # descriptor 3 may be one of its own
    os.dup2(fd, 3)
    words, fds = network.enter(argv)
    for each in (3, *fds):  # exec closes what else is open
        os.set_inheritable(each, True)
    become(words)


def kind_of_network(config: Config, args: argparse.Namespace, rest: Sequence[str]) -> str:
    """Which network `net up` and its like are about, by the options, which may come after the verb too; else by
    vmNetwork; else root means the host's bridge.  `auto` leaves it open: `status` shows both, else it is the bridge."""
    flags = {*(f"--{name}" for name in ("private", "bridge") if getattr(args, name)), *rest}
    no_more(sorted(flags - {"--private", "--bridge"}))
    if len(flags) > 1:
        raise UsageError("--private and --bridge: one of them")
    asked = flags.pop()[2:] if flags else config["vmNetwork"]
    return "bridge" if asked == "auto" and os.geteuid() == 0 else asked


@declare(
    Command(
        "bridge", "nocloud-bridge", "start | stop | accept | dnsmasq | ready | subnet [FILE]",
        (("start", "stop", "accept", "dnsmasq", "ready", "subnet"), "file"), bare=True,
    )
)  # fmt: skip
def cmd_bridge(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """the host's bridge, for its units: start, stop; serve what users publish; dnsmasq itself; a free subnet"""
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if verb == "subnet":
        file = one_operand(rest, "FILE") if rest else installed_settings()
        need_root("setting the bridge's network")
        report.say(free_bridge_subnet(config, file))
        return
    no_more(rest)
    setup = BridgeSetup(config)
    if verb == "accept":
        need_root("taking what users publish")
        setup.accept()
    elif verb == "dnsmasq":
        setup.forget()
        become([*setup.argv(), "--keep-in-foreground"])
    elif verb == "ready":
        setup.wait(60, os.environ.get("MAINPID", ""))  # systemd.exec(5)
    elif verb in ("start", "stop"):
        setup.start() if verb == "start" else setup.stop()
    else:
        raise UsageError(f"{verb or 'no verb'}: expected start, stop, accept, dnsmasq, ready or subnet")


@declare(
    Command("console", "vmconsole", "[VM]", ("running-vm",)),
    *RUNNING_VM_OPTIONS,
    Option("-s --serial", "its serial console in this terminal; Ctrl-] leaves"),
    Option("--screenshot FILE", "write what its screen shows into FILE, a PNG"),
)
def cmd_console(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """a VM's screen; with -s, or without a display, its serial console"""
    exclusive(args, "serial", "screenshot")
    name, words = split_name(args, words)
    no_more(words)
    vm = running_vm(cloud, name, args.group, args.type)
    if args.screenshot is not None:
        picture = screenshot(vm)
        with open(args.screenshot, "wb") as file:
            file.write(picture)
        return
    missing = "no display here" if not has_display() else "" if screen_of(vm) else f"{vm.name} runs without a screen"
    if not args.serial and not missing:
        open_screen(vm)
        return
    if not args.serial:
        report.say(f"{report.program}: {missing}: its serial console instead")
    need_ours(vm, "serial console")
    line = connect_line(vm, "serial", "serial console")
    join_line(vm, line, f"the serial console of {vm}; Ctrl-] leaves", SERIAL_LEAVE)


@declare(
    Command("log", "vmlog", "[VM]", ("vm",)),
    *VM_OPTIONS,
    Option("-f --follow", "go on with what comes, until it ends"),
    Option("-q --qemu", "what its qemu said, instead"),
)
def cmd_log(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """show what a VM wrote on its serial console since it was started"""
    name, words = split_name(args, words)
    no_more(words)
    vm = cloud.tree.need(name, args.group, args.type, first=VM.is_running)
    state, pid = vm.state() if args.follow else ("", 0)
    paths = (vm.log_file,) if args.qemu else (vm.console_log, vm.old_console_log)
    if not os.path.exists(paths[0]):
        text = f"it has no {os.path.basename(paths[0])}: nocloud hasn't started it yet"
        raise NotFound(text, f"vm -n {vm} starts it", vm=vm)
    pieces = log_pieces(Process(pid) if state == "running" else None, *paths)
    reader = select.poll()
    reader.register(1, 0)
    for piece in for_terminal(pieces) if os.isatty(1) else pieces:
        write_all(1, piece)
        if reader.poll(0):  # `vmlog -f | grep -m 1 login`: nobody reads any more
            return


@declare(Command("manage", "vmmanage", "[VM] [WORDS...]", ("running-vm",)), *RUNNING_VM_OPTIONS)
def cmd_manage(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> int:
    """qemu's monitor of a VM; with WORDS, just that command; where -n names the VM, all words are"""
    name, words = split_name(args, words)
    vm = running_vm(cloud, name, args.group, args.type)
    if words:
        monitor_command(vm, " ".join(words))
        return EXIT_DONE
    return monitor_session(vm)


@declare(
    Command(
        "doctor", operands="[CHECKS]", complete=(tuple(ALL_CHECKS),), unconfigured=True,
        more=lambda: textwrap.fill(f"CHECKS, all by default: {', '.join(ALL_CHECKS)}.", 78, break_on_hyphens=False),
    ),
    Option("--json", "a JSON list: name, state, text, mend"),
    Option("--deep", "read the memory of frozen templates too: a checksum of it was kept"),
)  # fmt: skip
def cmd_doctor(config: Config, args: argparse.Namespace, words: list[str]) -> int:
    """look at this host, and say what isn't well and which command mends it"""
    findings = []
    for finding in examine(words, args.deep):
        findings.append(finding)
        if not args.json:
            report.data(f"{finding['state']:<9}{finding['name']}: {finding['text']}")
            if finding["mend"]:
                report.data(f"{'':9}{printable(finding['mend'])}")
    if args.json:
        report.data(json.dumps(findings, indent=2))
    return EXIT_FAILED if any(finding["state"] == WRONG for finding in findings) else EXIT_DONE


@declare(
    Command("export", operands="[VM…] DIR", complete=("vm+folder",)),
    *WHICH_VMS,
    Option("-f --file FILE", "what a description file asks for; nothing of it needs to be there but its templates"),
    Option("--to ENGINE", f"for whom: {', '.join(ENGINES)}", one_of(*ENGINES), complete=tuple(ENGINES)),
    Option("--tar", "one file, DIR.tar.zst, or .xz where zstd isn't there"),
    Option("--with-keys", "to nocloud: they stay the machines that they are, with the host keys that nocloud made"),
    Option("--clean", "take machine-id, host keys, logs out of a copy of each system disk, which is booted for that"),
    Option("--chain", "to libvirt: disks share copies of what they stand on, instead of being one file each"),
)
def cmd_export(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """write VMs that are stopped as another engine takes them, or another nocloud"""
    if not words or not args.to:
        raise UsageError("--to ENGINE is missing" if words else "DIR is missing", "-h shows how it is called")
    for name, engine in (("with_keys", "nocloud"), ("chain", "libvirt")):
        if exclusive(args, name, "clean") == name and args.to != engine:
            raise UsageError(f"--{name.replace('_', '-')} goes with --to {engine}")
    if args.file is not None:
        group = group_of_file(args.file) if args.group is None else checked_group(args.group)
        requests = read_description(args.file, cloud.config["vmSubGroup"], os.sep)
        for each in requests:
            check_disk_size(cloud.tree.need_template(each.template), each.disk)
        with making(cloud, f"export-{os.urandom(4).hex()}", requests) as clones:  # for as long as that takes
            for clone in clones:
                vm = make_clone(cloud, clone)
                names = {key: map(os.path.basename, vm.get(key).split(",")) for key in ("vmDisk", "vmExtraDisk")}
                vm.write_conf({key: ",".join(each) for key, each in names.items()})
                vm.group = group
            export(cloud, [clone.vm for clone in clones], words[-1], args)
        return
    vms = chosen_vms(cloud, args, words[:-1])
    with locked(vms):
        for vm in vms:
            need_stopped(cloud, vm)
            ensure_identity(cloud, vm)
        export(cloud, vms, words[-1], args)
    if not args.clean:
        report.say("the disks carry their guests' own keys and machine-id; --clean takes them out of copies")


@declare(
    Command("import", operands="DIR|FILE", complete=("file+folder",)),
    Option("-g --group GROUP", "the group that they are to be in, if not the one that they were in", complete="group"),
)
def cmd_import(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """make VMs of what nocloud export --to nocloud has written; nothing in it is trusted"""
    for vm in import_vms(cloud, one_operand(words, "DIR|FILE"), args.group):
        report.data(vm.name)


@declare(Command("links", operands="DIR", complete=("folder",), bare=True))
def cmd_links(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """make the vm* commands in DIR, as symlinks to this program"""
    folder = one_operand(words, "DIR")
    os.makedirs(folder, exist_ok=True)
    program = program_path()
    for name in (*ALIASES, "nocloud"):
        path = os.path.join(folder, name)
        if os.path.islink(path):
            os.unlink(path)
        elif os.path.realpath(path) == program:
            continue
        elif os.path.lexists(path):
            hint = "move it away, or choose another folder"
            raise WrongState(f"{path}: is there and is no symlink; it is kept", hint)
        os.symlink(program, path)


@declare(Command("trust", operands="FILE", complete=("file",), unconfigured=True))
def cmd_trust(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """have all settings of a ./.nocloud.conf count, as long as it isn't changed"""
    allow_file(one_operand(words, "FILE"))


@declare(Command("forward", operands="private|bridge FD", hidden=True, bare=True))
def cmd_forward(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """forward the ports of a network's VMs that are handed over at the socket FD"""
    cloud = Cloud(config)
    kind, fd = [*words, "", ""][:2]
    if kind not in cloud.forwarders or not fd.isdecimal():
        raise UsageError("this is started by what publishes ports", "vmport -h")
    if kind == "private":
        cloud.private.namespaces().enter()
    Forwarding(cloud.forwarders[kind], socket.socket(fileno=int(fd))).run()


@declare(Command("configure", operands="VM...", hidden=True))
def cmd_configure(cloud: Cloud, args: argparse.Namespace, words: list[str]) -> None:
    """do over ssh what can only be done there, for VMs that have just been started"""
    vms = [vm for name in words for vm in cloud.tree.find(name) if vm.is_readable()]
    for kind in {cloud.network_kind(vm) for vm in vms}:
        cloud.networks[kind].open()  # before there are threads
    for error in wait_all(cloud, vms, cloud.config.number("vmWaitTimeout")):
        if error.vm.exists():
            append_line(error.vm.log_file, f"nocloud: not configured: {error}")


# Completion and manual ###############################################################################
#
# What comes from the declarations above: the words that a shell offers while one types, which its script in
# etc/completion asks for; and the manual page of etc/man, which tests/docs.py keeps up to date, as README.md's tables.

PROBE = "\0"  # stands for the word that is being typed: no argument can have it
SHELL_KINDS = ("file", "folder")  # which the shells complete by themselves


class Typed:
    """A command line that is being typed, up to the cursor.  The last word, to be completed, is `prefix`, an option
    that its value is joined to, and `value`.  `words`: what to offer, each with its help; `files`: the one of
    SHELL_KINDS that it can be besides, or ''.  `given`: the options before it, with their values."""

    def __init__(self, config: Config, words: Sequence[str]) -> None:
        self.config, self.tree = config, Tree(config)
        *before, self.value = words
        self.prefix = self.files = ""
        self.given: dict[str, str] = {}
        self.words: dict[str, str] = {}
        self.command, _, rest = find_command(before)
        if self.command:
            wanted = self._wanted(self.command, rest)
            if isinstance(wanted, str):
                kinds = wanted.split("+")
                self.files = next((kind for kind in kinds if kind in SHELL_KINDS), "")
                found = (word for kind in kinds if kind in WORD_KINDS for word in WORD_KINDS[kind](self))
                wanted = tuple(word for word in found if word.isprintable())
            self.words = wanted if isinstance(wanted, dict) else dict.fromkeys(wanted, "")
        elif not rest and self.value.startswith("-"):
            self.words = option_names(GENERAL_OPTIONS)
        elif not rest:
            self.words = {each.name: each.help for each in visible_commands()}

    def _wanted(self, command: Command, words: Sequence[str]) -> str | tuple[str, ...] | dict[str, str]:
        """What the value can be: an Option's `complete`, or words with their help; by what the parser makes of it."""
        probe = "-" + PROBE if self.value.startswith("-") else PROBE
        options, operands = split_operands(command, [*words, probe])
        last = "" if operands[-1:] == [probe] else options.pop()
        for word in options:
            option, prefix = option_with_value(command, word)
            self.given.update(dict.fromkeys(option.names, word[len(prefix) :]) if option else {word: ""})
        if not last:
            others = split_ssh_words(operands)[0] if command.passes else []
            kinds, at = command.complete, len(operands) - len(others)
            at = min(at, len(kinds)) if "…" in command.operands else at
            return dict(enumerate(kinds, 1)).get(at, "")
        option, prefix = option_with_value(command, self.value if last == probe else last)
        if option and last != probe:  # split_operands() has joined it to the option
            return option.complete
        if option and (self.value != prefix or prefix.endswith("=")):
            self.prefix, self.value = prefix, self.value[len(prefix) :]
            return option.complete
        known = (*command.options, *GENERAL_OPTIONS)
        return option_names(each for each in known if not self.given.keys() & set(each.names))

    def vms(self, wanted: Callable[[VM], bool] = VM.exists) -> list[str]:
        """What the wanted VMs, in the group and of the type that are named, can be called: NAME where that is enough.
        GROUP/NAME, or GROUP/TYPE/NAME, where a group is being typed, and where several have the name."""
        left = [vm for vm in self.tree.vms(self.given.get("-g", ""), self.given.get("-t", "")) if wanted(vm)]
        names: list[str] = []
        ways: list[Callable[[VM], str]] = [lambda vm: vm.name, lambda vm: f"{vm.group}/{vm.name}"]
        for way in ways[min(2, self.value.count("/")) :]:
            count = Counter(map(way, left))
            names += [way(vm) for vm in left if count[way(vm)] == 1]
            left = [vm for vm in left if count[way(vm)] > 1]
        return names + [vm.full_name for vm in left]


WORD_KINDS: dict[str, Callable[[Typed], Iterable[str]]] = {
    "vm": Typed.vms,
    "running-vm": lambda typed: typed.vms(VM.is_running),
    "adjusted": lambda typed: typed.vms() if {"-a", "--adjust"} & typed.given.keys() else [],
    "group": lambda typed: typed.tree.groups(),
    "any-group": lambda typed: [*typed.tree.groups(), TEMPLATES],
    "managed-group": lambda typed: [each for each in typed.tree.groups() if manager_of(typed.tree, each)[1]],
    "type": lambda typed: [vm.type for vm in typed.tree.vms(typed.given.get("-g", "")) if vm.type],
    "template": lambda typed: [vm.name for vm in typed.tree.templates()],
    "catalogue": lambda typed: load_catalogue().entries,
    "template-name": lambda typed: WORD_KINDS["template" if "--delete" in typed.given else "catalogue"](typed),
    "iso": lambda typed: [
        name for name in names_in(os.path.expanduser(typed.config["isoDir"])) if name.lower().endswith(".iso")
    ],
    # Those in the confs: to read the bridge's leases is not worth it.
    "address": lambda typed: [vm.get("vmAddress") for vm in typed.tree.running() if vm.is_readable()],
}


def option_names(options: Iterable[Option]) -> dict[str, str]:
    """All names of these options, each with its help."""
    return {name: option.help for option in options for name in option.names}


BASH_PART = r"""\s+|'([^']*)('?)|"((?:\\.?|[^"\\])*)("?)|\\(.?)|([^\s'"\\]+)"""
BASH_SPECIAL = {"": r"[^\w@%+=:,./-]", '"': r'[\\"$`]', "'": "(?!)"}  # by the quote that is open: what to escape


def read_bash(line: str) -> tuple[list[str], str, str]:
    """(a line's words as bash reads them, nothing in them run; the last one as it was typed; the quote open in it)."""
    words, raw, quote = [""], "", ""
    for part in re.finditer(BASH_PART, line, re.S):
        if part[0].isspace():
            words, raw, quote = [*words, ""] if raw else words, "", ""
            continue
        single, single_end, double, double_end, escaped, plain = part.groups("")
        words[-1] += single + re.sub(r'\\([\\"$`])', r"\1", double) + escaped + plain
        raw += part[0]
        quote = part[0][0] if part[0][0] in "'\"" and not single_end + double_end else ""
    return words, raw, quote


def answer_bash(config: Config, line: str = "", replaced: str = "") -> list[str]:
    """For COMP_LINE up to the cursor, and what readline replaces: what follows the last COMP_WORDBREAKS, unquoted."""
    words, raw, _ = read_bash(line)
    typed = Typed(config, words)
    kept, _, quote = read_bash(raw[: len(raw) - len(replaced)] if raw.endswith(replaced) else "")
    start, special = kept[-1], "(?!)" if typed.files else BASH_SPECIAL[quote]
    found = [typed.prefix + word for word in typed.words if word.startswith(typed.value)]
    return [
        typed.files.replace("folder", "directory"), typed.prefix[len(start) :], start[len(typed.prefix) :], typed.value,
        *(re.sub(special, r"\\\g<0>", word[len(start) :]) for word in found),
    ]  # fmt: skip


def answer_words(config: Config, *words: str) -> list[str]:
    """For zsh and fish: each word with a tab and its help."""
    typed = Typed(config, words)
    return [typed.files, typed.prefix, *(f"{word}\t{help}" for word, help in typed.words.items())]


SHELLS: dict[str, tuple[Callable[..., list[str]], str]] = {
    # what its script is told, and where in an installation's share that is
    "bash": (answer_bash, "bash-completion/completions/nocloud"),
    "zsh": (answer_words, "zsh/site-functions/_nocloud"),
    "fish": (answer_words, "fish/vendor_completions.d/nocloud.fish"),
}


@declare(Command("complete", operands="SHELL WORDS...", hidden=True, bare=True))
def cmd_complete(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """what a shell's script offers for a line that is being typed; nothing is started, mended or written for that"""
    if not words or words[0] not in SHELLS:
        raise UsageError(f"which shell? one of {', '.join(SHELLS)}")
    answer = SHELLS[words[0]][0](config, *words[1:])
    if not any("\n" in line for line in answer):
        report.data("\n".join(answer))


def completion(shell: str) -> str:
    """A shell's script, which completes for all names of the program."""
    names = " ".join(("nocloud", "nocloud.pyz", *ALIASES))
    return need_packaged(f"completion/nocloud.{shell}").replace("@NAMES@", names)


@declare(Command("completion", operands="bash | zsh | fish", complete=(tuple(SHELLS),), bare=True))
def cmd_completion(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """print a shell's completion of all commands, as in: source <(nocloud completion bash)"""
    if (shell := one_operand(words, "the shell")) not in SHELLS:
        raise UsageError(f"{shell}: no completion for that shell", f"one of {', '.join(SHELLS)}")
    report.data(completion(shell).rstrip("\n"))


def manual() -> str:
    """The page nocloud(1); tests/docs.py has written into it what is declared here."""
    return need_packaged("man/nocloud.man").replace("@VERSION@", __version__)


@declare(Command("man", bare=True))
def cmd_man(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """show the manual page; nocloud man >nocloud.1 writes it"""
    page = manual().rstrip("\n")
    if sys.stdout.isatty() and find_program("man"):
        fd = os.memfd_create("nocloud.1", 0)
        write_all(fd, page.encode())
        become(["man", "-l", f"/proc/{os.getpid()}/fd/{fd}"])
    report.data(page)


# Installation ########################################################################################
#
# What `make install` puts on a host and `make uninstall` takes away.  All is looked at before anything is changed, and
# each change is written down before it is made: one that was cut short is finished by the next call, or undone.

INSTALL_RECORD = "share/nocloud/installed.json"  # below PREFIX
INSTALLED_CONFS = ("nocloud_net.conf", "nocloud_templates.conf")
GROUP_UNIT = "nocloud@.service"
UNITS = (*SYSTEMD_UNITS, "nocloud-dnsmasq-reload.service", GROUP_UNIT)
SYSUSERS = "nocloud-sysusers.conf"


@record
class InstalledFile:
    """A file: where it goes, its content, or where the link points.  `conf`: what users changed in it is kept."""

    path: str
    content: bytes = b""
    link: str = ""
    mode: int = 0o644
    conf: bool = False

    def fingerprint(self) -> str:
        """As Installation.fingerprint()."""
        return f"link {self.link}" if self.link else f"sha256 {hashlib.sha256(self.content).hexdigest()}"


def planned_files(prefix: str) -> Iterator[InstalledFile]:
    """What an installation consists of: this program, its names, its settings, what comes with it, and its units."""
    with open(program_path(), "rb") as file:
        yield InstalledFile(f"{prefix}/bin/nocloud", file.read(), mode=0o755)
    for name in ALIASES:
        yield InstalledFile(f"{prefix}/bin/{name}", link="nocloud")
    for name in INSTALLED_CONFS:
        yield InstalledFile(f"{prefix}/etc/{name}", need_packaged(name).encode(), conf=True)
    yield from planned_documents(prefix)
    units = [(name, "system", name) for name in UNITS]
    for source, kind, name in (*units, (GROUP_UNIT, "user", GROUP_UNIT), (SYSUSERS, "sysusers.d", "nocloud.conf")):
        text = need_packaged(source, "systemd").replace("@BINDIR@", f"{prefix}/bin")
        yield InstalledFile(f"{systemd_folder(prefix, kind)}/{name}", text.encode())


def planned_documents(prefix: str) -> Iterator[InstalledFile]:
    """The manual and the completion scripts; bash, fish and man look for a command's under the command's own name."""
    texts = {"man/man1/nocloud.1": manual(), **{place: completion(shell) for shell, (_, place) in SHELLS.items()}}
    for place, text in texts.items():
        folder, name = os.path.split(f"{prefix}/share/{place}")
        yield InstalledFile(f"{folder}/{name}", text.encode())
        for alias in ALIASES if name.startswith("nocloud") else ():
            yield InstalledFile(f"{folder}/{name.replace('nocloud', alias)}", link=name)


def systemd_folder(prefix: str, name: str) -> str:
    """Where systemd reads `system`, `sysusers.d` and their like for this PREFIX (systemd.unit(5), sysusers.d(5))."""
    base = f"{prefix}/lib" if prefix in ("/usr", "/usr/local") else "/etc"
    return f"{base}/systemd/{name}" if name in ("system", "user") else f"{base}/{name}"


class Installation:
    """What is installed below one PREFIX, and the record of it; `root` is DESTDIR, '' for this host.  The record is
    written before each change, so that a call that was killed can be finished, or undone."""

    def __init__(self, prefix: str, root: str = "") -> None:
        """Raises UsageError where PREFIX can't stand in a unit file, Error where the record can't be relied on."""
        if not re.fullmatch(r"(/(?!\.\.?(/|$))[A-Za-z0-9._+-]+)+/*", prefix):
            raise UsageError(f"PREFIX={prefix}: expected an absolute path of letters, digits and ._+-")
        self.prefix, self.root = prefix.rstrip("/"), root.rstrip("/")
        self.record = self.real(f"{self.prefix}/{INSTALL_RECORD}")
        self.files: dict[str, list[str]] = {}  # path: the fingerprints that it had as we put it there
        self.folders: list[str] = []  # those that weren't there before
        self.host: dict[str, Any] = {}  # what was changed on the host, and how it was before
        self.exists = os.path.exists(self.record)
        if not self.exists:
            return
        if reason := untrusted(self.record):
            raise Error(f"{self.record}: {reason}; it says what to remove, so it is not used", "chown root, chmod 644")
        try:
            known = json.loads(read_text(self.record))
            self.files, self.folders, self.host = dict(known["files"]), list(known["folders"]), dict(known["host"])
        except (ValueError, KeyError, TypeError) as error:
            raise Error(f"{self.record}: is damaged: {error!r}", "move it away, and install again") from None

    def real(self, path: str) -> str:
        return self.root + path

    def save(self, **host: Any) -> None:
        """Write the record, with what is going to be changed on the host."""
        self.host.update(host)
        known = {"version": __version__, "files": self.files, "folders": self.folders, "host": self.host}
        write_file(self.record, json.dumps(known, indent=1) + "\n", 0o644)

    def fingerprint(self, path: str) -> str:
        """What is there: `sha256 HEX`, `link TARGET`, `folder`, or ''."""
        path = self.real(path)
        if os.path.islink(path):
            return f"link {os.readlink(path)}"
        return "folder" if os.path.isdir(path) else f"sha256 {file_digest(path)}" if os.path.exists(path) else ""

    def check(self, files: Sequence[InstalledFile]) -> None:
        """Raise where something is in the way that neither an installation nor `nocloud links` put there."""
        blocked = []
        for each in files:
            there, path = self.fingerprint(each.path), self.real(each.path)
            known = there in ("", each.fingerprint()) or (there != "folder" and (each.conf or each.path in self.files))
            target = os.path.basename(os.path.realpath(path)) if each.link and os.path.islink(path) else ""
            if not known and target not in ("nocloud", "nocloud.pyz", "nocloud.py"):
                blocked.append(path)
        if blocked:
            text = f"in the way, and not installed by nocloud: {', '.join(blocked)}"
            raise WrongState(text, "move them away, or set another PREFIX")

    def is_changed(self, each: InstalledFile) -> bool:
        """Whether the user's own configuration is there, which is kept."""
        return each.conf and self.fingerprint(each.path) not in ("", each.fingerprint(), *self.files.get(each.path, ()))

    def put(self, files: Sequence[InstalledFile]) -> list[str]:
        """Put the files there, keeping the configuration that the user changed; what there is to say of that."""
        writes, said = [], []
        for each in files:
            if not self.is_changed(each):
                writes += [each] if self.fingerprint(each.path) != each.fingerprint() else []
                continue
            said.append(f"kept: {self.real(each.path)}, which was changed")
            if each.fingerprint() not in self.files.get(each.path, ()):  # else the user has seen this version before
                said[-1] += f"; the new version is {self.real(each.path)}.new"
                writes.append(InstalledFile(f"{each.path}.new", each.content))
        planned = {each.path for each in files}
        stale = [path for path in self.files if not {path, path.removesuffix(".new")} & planned]
        for each in (*files, *writes):
            self.files[each.path] = list(dict.fromkeys([*self.files.get(each.path, ()), each.fingerprint()]))
        missing: list[str] = []
        for path in (f"{self.prefix}/{INSTALL_RECORD}", *(each.path for each in (*files, *writes))):
            folder = os.path.dirname(path)
            while not os.path.isdir(self.real(folder)) and folder not in missing:
                missing.append(folder)
                folder = os.path.dirname(folder)
        missing.sort(key=len)
        self.folders = list(dict.fromkeys([*self.folders, *missing]))
        os.makedirs(os.path.dirname(self.record), exist_ok=True)
        self.save()  # first: it names the folders
        for folder in missing:
            os.makedirs(self.real(folder), exist_ok=True)
            os.chmod(self.real(folder), 0o755)  # whatever the umask says
        self._sweep()
        for each in writes:
            if each.link:
                remove_file(self.real(each.path))
                os.symlink(each.link, self.real(each.path))
            else:
                write_file(self.real(each.path), each.content, each.mode)
        for path in stale:
            self._remove(path)
        self.save()
        return said

    def _remove(self, path: str) -> None:
        if self.fingerprint(path) != "folder":
            remove_file(self.real(path))
        self.files.pop(path)

    def _sweep(self) -> None:
        """Remove what a killed call left of a file that it was writing: of those in the record, or of that itself."""
        for path in (self.record, *map(self.real, self.files)):
            for left in glob.glob(f"{glob.escape(path)}.*.tmp"):
                remove_file(left)

    def take_away(self) -> list[str]:
        """Remove the files and the record of them; the paths of configuration that was changed, and is kept."""
        kept = []
        self._sweep()
        for path, prints in list(self.files.items()):
            is_conf = os.path.dirname(path) == f"{self.prefix}/etc" and path.endswith(".conf")
            if is_conf and self.fingerprint(path) not in ("", *prints):
                kept.append(self.real(path))
            else:
                self._remove(path)
        remove_file(self.record)
        for folder in sorted(self.folders, key=len, reverse=True):
            remove_empty(self.real(folder))
        return kept


# -- the host

KVM_GROUP = "kvm"  # whose members run VMs on the host's bridge, with hardware acceleration
NEEDED_PROGRAMS = ("qemu-img", "ip", "dnsmasq", "nft", "ssh", "ssh-keygen", "nsenter")


class HostSetup:
    """What an installation changes on this host beside its own files; each part is harmless the second time.  How it
    was before is remembered in the installation's record, so that `undo` brings that back and no more."""

    def __init__(self, installation: Installation, config: Config) -> None:
        self.installation, self.config, self.before = installation, config, installation.host
        self.interface = config["bridgeInterface"]
        self.acl: str = self.before.get("acl") or helper_list()

    def make_accounts(self) -> None:
        """The group kvm and the user that dnsmasq runs as; systemd-sysusers(8) has the list in a file of ours."""
        users = [name for name in DNSMASQ_USERS[:1] if not account((name,))[1]]
        groups = [name for name in (KVM_GROUP,) if not account((name,), group=True)[1]]
        self.installation.save(users=self.before.get("users") or users, groups=self.before.get("groups") or groups)
        if find_program("systemd-sysusers"):
            # It dies with us: after a kill the next call may undo it all, and it would make the user after that
            run([*TIE, "systemd-sysusers", f"{systemd_folder(self.installation.prefix, 'sysusers.d')}/nocloud.conf"])
        elif groups:
            run(["groupadd", "--system", KVM_GROUP])

    def allow_helper(self) -> str:
        """Let members of kvm use it, where it is nobody's yet; what was done."""
        path = os.path.realpath(HostBridge(self.config).helper())
        if (info := os.stat(path)).st_mode & stat.S_ISUID:
            return ""
        override = find_program("dpkg-statoverride")
        known = try_run([override, "--list", path], 30)[1].split()[:3] if override else []
        if known and known != ["root", KVM_GROUP, "4750"]:
            report.warn(f"{path}: dpkg-statoverride has another's entry for it, which is kept; so only root may use it")
            return ""
        before = {"path": path, "mode": stat.S_IMODE(info.st_mode), "group": info.st_gid, "override": bool(override)}
        if not known:  # else it was made by a call that was killed, or the mode was changed after
            self.installation.save(helper=before)
        if override and not known:
            run([override, "--add", "root", KVM_GROUP, "4750", path])
        os.chown(path, 0, account((KVM_GROUP,), group=True)[1])
        os.chmod(path, 0o4750)
        return f"{path}: members of {KVM_GROUP} may use it (root:{KVM_GROUP} 4750)"

    def allow_bridge(self) -> str:
        """Have the helper put VMs on our bridge, and say what others' lines do; what was done."""
        folder, said = os.path.dirname(self.acl), ""
        made = [path for path in (self.acl, folder) if not os.path.exists(path)]
        if self.acl in made or ("allow", self.interface) not in helper_rules(self.acl):
            allowed = [*self.before.get("allowed", ()), self.interface]
            self.installation.save(acl=self.acl, allowed=allowed, made=[*self.before.get("made", ()), *made])
            os.makedirs(folder, 0o755, exist_ok=True)
            text = read_existing(self.acl)
            rewrite(self.acl, text + ("\n" if text and not text.endswith("\n") else "") + f"allow {self.interface}\n")
            said = f"{self.acl}: allow {self.interface}"
        for _, fault, _ in HostBridge(self.config).list_faults():
            report.warn(f"{fault}; remove it")
        return said

    def undo(self) -> None:
        """Bring back how it was: the helper's list, the helper, the accounts."""
        ours = [["allow", interface] for interface in self.before.get("allowed", ())]
        lines = read_existing(self.acl).splitlines(True)
        kept = [line for line in lines if line.split() not in ours]
        if not kept and self.acl in self.before.get("made", ()):
            remove_file(self.acl)
        elif kept != lines:
            rewrite(self.acl, "".join(kept))
        if os.path.dirname(self.acl) in self.before.get("made", ()):
            remove_empty(os.path.dirname(self.acl))
        helper = self.before.get("helper", {"path": "", "override": False})
        path = helper["path"]
        if helper["override"]:
            try_run(["dpkg-statoverride", "--remove", path], 30)
        if os.path.exists(path) and stat.S_IMODE(os.stat(path).st_mode) == 0o4750:
            os.chown(path, 0, helper["group"])
            os.chmod(path, helper["mode"])
        for program, names in (("userdel", "users"), ("groupdel", "groups")):
            for name in self.before.get(names, ()):
                status, said = try_run([program, name], 30)
                if status and "does not exist" not in said:
                    report.warn(f"{program} {name}: {last_line(said)}")

    def start_units(self) -> str:
        if not systemd_runs():
            return "no systemd runs here, so nothing starts with the host: nocloud net up sets the bridge up"
        run(["systemctl", "daemon-reload"])
        run(["systemctl", "enable", *SYSTEMD_UNITS])
        ran = try_run(["systemctl", "is-active", "--quiet", SYSTEMD_UNITS[1]], 30)[0] == 0
        BridgeSetup(self.config).up()
        if ran:
            systemctl("restart", *SYSTEMD_UNITS[1:])  # they may be another version's
        return f"{', '.join(SYSTEMD_UNITS)}: run, now and from each boot on"


def rewrite(path: str, text: str) -> None:
    """Change a file of the host's, keeping its owner and mode, and through a symlink."""
    path = os.path.realpath(path)
    info = os.stat(path) if os.path.exists(path) else None
    write_file(path, text, stat.S_IMODE(info.st_mode) if info else 0o644)
    if info:
        os.chown(path, info.st_uid, info.st_gid)


def installed_config(installation: Installation) -> Config:
    """The settings that the host's bridge goes by: the installation's, then those of /etc."""
    config = Config()
    for path in (installation.real(f"{installation.prefix}/etc/{INSTALLED_CONFS[0]}"), "/etc/nocloud.conf"):
        if os.path.isfile(path):
            config.read(path)
    return config


def plan_subnet(installation: Installation, files: Sequence[InstalledFile]) -> str:
    """Have the settings that are to be installed name a free subnet; what was chosen.  It stays while the bridge is up,
    and where the user changed the file.  Raises WrongState where it can't be, or such a bridge is somebody else's."""
    settings = next(each for each in files if os.path.basename(each.path) == INSTALLED_CONFS[0])
    config = installed_config(installation)
    is_up = bridge_is_ours(config["bridgeInterface"])
    changed, bridge = installation.is_changed(settings), BridgeSetup(config)
    if not is_up and (changed or bridge.is_there()):
        bridge.check()
    if changed:
        return ""
    subnet, why = (config["bridgeSubnet"], "") if is_up else choose_bridge_subnet(config)
    if subnet != Config()["bridgeSubnet"]:
        settings.content = update_assignments(settings.content.decode(), {"bridgeSubnet": subnet}).encode()
    since = f", since {why} (bridgeSubnet in {settings.path})" if why else ""
    return f"the bridge's network is {subnet}.0/24{since}"


def install(installation: Installation, only_look: bool) -> None:
    """Put it there, set the host up for it, and say what was done; all that can be in the way is looked at before.
    Raises MissingProgram naming each, and one command that installs their packages."""
    files, modules, subnet, on_host = [*planned_files(installation.prefix)], [], "", not installation.root
    if on_host:
        qemu = f"qemu-system-{os.uname().machine}"
        missing = [] if find_program(qemu) or find_program("/usr/libexec/qemu-kvm") else [qemu]
        missing += [name for name in NEEDED_PROGRAMS if not find_program(name)]
        missing += [] if HostBridge(installed_config(installation)).helper() else ["qemu-bridge-helper"]
        if missing:
            raise MissingProgram(f"not here yet: {', '.join(missing)}; nothing was changed", install_command(*missing))
        words = read_text("/proc/cpuinfo").split()
        wanted = [*(module for flag, module in KVM_MODULES.items() if flag in words), "vhost_net", "tun"]
        # A missing one would fail the boot's unit; in a container there is no modprobe
        probe = ["modprobe", "--dry-run", "--quiet"]
        modules = [each for each in wanted if find_program(probe[0]) and not try_run([*probe, each], 30)[0]]
        text = "".join(f"{line}\n" for line in ("# of nocloud: what its VMs want", *modules))
        place = f"{systemd_folder(installation.prefix, 'modules-load.d')}/nocloud.conf"
        files += [InstalledFile(place, text.encode())] if modules else []
    installation.check(files)
    if on_host:
        subnet = plan_subnet(installation, files)
    if only_look:
        return
    said = installation.put(files)
    if on_host:
        setup = HostSetup(installation, installed_config(installation))
        setup.make_accounts()
        said += [setup.allow_helper(), setup.allow_bridge()]
        status, told = try_run(["modprobe", "-a", *modules], 60) if modules else (-1, "")
        if told:
            report.warn(f"kernel modules: {last_line(told)}")
        said += [] if status else [f"kernel modules, now and at each boot: {', '.join(modules)}"]
        said += [subnet, setup.start_units()]
        said += ["nocloud doctor, called by who is to run VMs, looks whether all is well"]
    for line in (f"nocloud {__version__} is in {installation.real(installation.prefix)}", *filter(None, said)):
        report.say(line)


def undo_installation(installation: Installation) -> None:
    """Take it away, and say what stays.  Twice is harmless.  Raises WrongState where VMs run."""
    place = installation.real(installation.prefix)
    if not installation.exists:
        report.say(f"nothing is installed in {place}")
        return
    if not installation.root:
        units, ours = active_groups(), [each for each in qemus() if each.is_ours and each.folder]  # whoever's they are
        running = [f"{'/'.join(each.folder.split('/')[-3:])} of {user_name(each.uid)}" for each in ours]
        if units or running:
            stop = f"systemctl stop {' '.join(units)}" if units else "vmstop -g GROUP stops a group and keeps it"
            raise WrongState(f"VMs are running: {', '.join((*units, *sorted(running)))}; nothing was changed", stop)
        setup = HostSetup(installation, installed_config(installation))
        if systemd_runs():
            # systemctl lists only the template that groups' units are instances of
            groups = {os.path.basename(path) for path in glob.glob("/etc/systemd/system/*.wants/nocloud@*.service")}
            try_run(["systemctl", "disable", *SYSTEMD_UNITS, *sorted(groups)], 60)
        if bridge_is_ours(setup.interface):
            BridgeSetup(setup.config).down()
        setup.undo()
        for folder in (STATE_FOLDER, RUN_FOLDER):  # leases, published names, and what `up` keeps while it is up
            remove_tree(folder)
    kept = installation.take_away()
    if not installation.root and systemd_runs():
        try_run(["systemctl", "daemon-reload"], 60)
    report.say(f"nocloud is no longer in {place}")
    for path in kept:
        report.say(f"kept: {path}, which was changed")


@declare(
    Command("setup", hidden=True, bare=True),
    Option("--prefix FOLDER", "where to; by default where this program is installed, else /usr/local"),
    Option("--destdir FOLDER", "for packaging: only the files, and all of them below this folder"),
    Option("--check", "only look whether it could be done"),
    Option("--undo", "take away what was installed"),
)
def cmd_setup(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """install this program on the host, as `make install` does"""
    exclusive(args, "check", "undo")
    root = os.path.abspath(args.destdir) if args.destdir else ""
    if not root and os.geteuid() != 0:
        text = "this changes the host, so it needs root; nothing was changed"
        raise Error(text, "with sudo, or, for the files alone, DESTDIR=FOLDER")
    installation = Installation(args.prefix or own_prefix(), root)
    with contextlib.nullcontext() if root else FolderLock(SETUP_FOLDER, make=True):
        undo_installation(installation) if args.undo else install(installation, args.check)
        remove_empty(SETUP_FOLDER)


# -- groups from the boot on

OUR_UNIT = "# Written by `nocloud enable`; it goes with the last group.\n"
OF_USER = Option("--user", "by your own systemd, as for everybody but root")


def at_boot(config: Config, args: argparse.Namespace, words: Sequence[str], wanted: bool) -> None:
    """Have systemd run a group, now and from each boot on, or no more; by a unit of ours where none is installed."""
    tree, user = Tree(config), ["--user"] if args.user or os.geteuid() else []
    group = checked_group(tree.group_called(one_operand(words, "GROUP")))
    folder = f"{os.path.dirname(config_home())}/systemd/user" if user else "/etc/systemd/system"
    path = f"{folder}/{GROUP_UNIT}"

    def call(*words: str) -> None:
        status, said = try_run(["systemctl", *user, *words], 330)  # more than the unit's own
        if status:
            hint = "without systemd, have what starts at boot call vmrun -r GROUP --background"
            raise Error(f"systemctl {' '.join(words)}: {last_line(said)}", hint)

    call("daemon-reload")
    is_ours = read_existing(path).startswith(OUR_UNIT)
    if not wanted:
        call("disable", "--now", f"nocloud@{group}")
        if is_ours and not glob.glob(f"{glob.escape(folder)}/*.wants/nocloud@*.service"):
            remove_file(path)
            call("daemon-reload")
        return
    tree.need_group(group)
    if is_ours or try_run(["systemctl", *user, "cat", GROUP_UNIT], 30)[0]:
        program = " ".join(self_argv())
        if not re.fullmatch(rf"[\w/.+@:-]+ {' '.join(PYTHON_OPTIONS)} [\w/.+@:-]+", program):
            raise Error(f"{program}: such a path can't stand in a unit", "move the program to a simpler one")
        os.makedirs(folder, exist_ok=True)
        unit = OUR_UNIT + need_packaged(GROUP_UNIT, "systemd")
        write_file(path, unit.replace("@BINDIR@/nocloud", program), 0o644)
        call("daemon-reload")
    is_managed = manager_of(tree, group)[0] != "stopped"
    call("enable", *([] if is_managed else ["--now"]), f"nocloud@{group}")
    report.say(f"{group}: runs from each boot on" + (", and a vmrun has it now" if is_managed else " and now"))
    if user and not os.path.exists(f"/var/lib/systemd/linger/{user_name()}"):  # loginctl(1)
        report.warn(f"only while {user_name()} is logged in, until: loginctl enable-linger {user_name()}")
    for key in sorted(key for key in os.environ if key.startswith("NOCLOUD_")):
        report.warn(f"{key} of this shell is not known there; the configuration file may say it")


@declare(Command("enable", operands="GROUP", complete=("group",), bare=True), OF_USER)
def cmd_enable(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """run a group from now on, and from each boot on"""
    at_boot(config, args, words, True)


@declare(Command("disable", operands="GROUP", complete=("group",), bare=True), OF_USER)
def cmd_disable(config: Config, args: argparse.Namespace, words: list[str]) -> None:
    """shut a group's VMs down, keep them, and run them no more at boot"""
    at_boot(config, args, words, False)


# Dispatch ############################################################################################
#
# The program itself: which command is meant, what it raises, and its exit status.


def run_command(argv: Sequence[str]) -> int:
    """Find the command, parse its words, do it; the exit status."""
    report.debug = report.debug or list(argv[1:2]) == ["--debug"]
    command, report.program, words = find_command(argv)
    options, operands = split_operands(command, words) if command else (words, [])
    if {"-v", "--version"} & set(options):
        report.data(f"nocloud {__version__}")
        return EXIT_DONE
    if command is None:
        for word in options:
            if word not in ("-h", "--help", "--debug"):
                raise UsageError(f"{word}: no such option", "nocloud -h lists the commands")
        wrap = textwrap.TextWrapper(terminal_width(), subsequent_indent=" " * 30, break_on_hyphens=False)
        rows = [wrap.fill(f"  {each.name:<12} {each.alias:<14} {each.help}") for each in visible_commands()]
        usage = "usage: nocloud COMMAND [options], or by the command's own name"
        about = ("nocloud: a mini-cloud on one Linux machine", usage, "\n".join(rows))
        report.data("\n\n".join([*about, "nocloud COMMAND -h shows a command's options."]))
        return EXIT_DONE
    report.debug = report.debug or "--debug" in options
    config = Config() if command.unconfigured else load_config()
    args = None
    if options or command.options:  # else nothing is to parse: argparse costs 17 ms, and a TAB has to be quick
        parser = build_parser(command, report.program, config)
        args = parser.parse_args(options)
        for key in [key for key, value in vars(args).items() if value == []]:
            setattr(args, key, "--")  # the value that argparse drops, up to Python 3.12
        if args.help:
            report.data("\n\n".join(part.rstrip("\n") for part in (parser.format_help(), command.more()) if part))
            return EXIT_DONE
    for option in command.options if args else ():
        if option.value == "GROUP" and getattr(args, key := option.names[-1][2:]):
            setattr(args, key, Tree(config).group_called(getattr(args, key)))
    if not command.operands:
        free = {each.names[0] for each in command.options if getattr(args, each.names[-1][2:], None) is None}
        no_more(operands, next((f"{report.program} {way}" for way in ("-n", "-g") if way in free), ""))
    with contextlib.nullcontext(config) if command.bare or command.unconfigured else Cloud(config) as what:
        status: int | None = command.function(what, args, operands)
    return status or EXIT_DONE


def open_standard_streams() -> None:
    """Descriptors 0 to 2 are never another file's, whatever the caller closed; names go out as they came in."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd < 3:
        fd = os.dup(fd)
    os.close(fd)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status.  The only place that catches errors."""
    ensure_utf8()
    open_standard_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):  # as ^C does: what is half-made is removed on the way out
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        return run_command(sys.argv if argv is None else argv)
    except Error as error:
        report.error(error)
        return error.status
    except KeyboardInterrupt:
        report.say(f"{report.program}: interrupted")
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.filename is None:  # stdout, perhaps: what is left in its buffer is not written, nor complained about
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return EXIT_FAILED
        if report.debug:
            raise
        report.error(error_from_os(error))
        return EXIT_FAILED
    except Exception as error:
        if report.debug:
            raise
        text = f"{type(error).__name__}: {error}"
        report.error(Error(f"a defect in nocloud: {text}", "run it again with --debug, and report what it shows"))
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
