"""A file system whose power can be cut: on a loop device, in a mount namespace of its own."""

from __future__ import annotations

import fcntl
import os
import shlex
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support import Cloud, Result, eventually, kill_all, processes_with, until

SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): Linux fs/ext4/ext4.h, fs/xfs/libxfs/xfs_fs.h; btrfs has it from 6.19 on
LOSE_ALL, LOSE_DATA = (
    2,
    1,
)  # NOLOGFLUSH: as a cut of the power; LOGFLUSH: the names had got to the disk, the data hadn't
# How each is made, and mounted so that it writes out what it can lose every second.
KINDS = {"ext4": ("-q -F", "loop,commit=1"), "xfs": ("-q -f", "loop"), "btrfs": ("-q -f", "loop,commit=1")}


class CannotCut(Exception):
    """This machine, or this user, has no such file system; says why."""


class CutDisk:
    """A file system in the file `disk` of a folder, mounted on its `mnt`: only processes of its namespace see it there.

    `seen` is the same folder for everyone else.  The namespace ends with its holder, and that with us: it reads a pipe.
    """

    def __init__(self, folder: Path, kind: str = "ext4") -> None:
        self.kind, (how, self._options) = kind, KINDS[kind]
        self.image, self.mount = folder / "disk", folder / "mnt"
        if os.geteuid():
            raise CannotCut("only root mounts a loop device")
        self.mount.mkdir()
        words = ["unshare", "--mount", "--propagation=private", "sh", "-c", "echo; exec cat"]
        self._holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            assert self._holder.stdout
            said = self._holder.stdout.readline().decode().strip()
            if said:
                raise CannotCut(said)
            self.seen = Path(f"/proc/{self._holder.pid}/root{self.mount}")
            with self.image.open("wb") as file:
                file.truncate(2 << 30)
            self._run(f"mkfs.{kind}", *how.split(), self.image)
            self.plug_in()
            if kind == "btrfs":
                self._try_cut()
        except BaseException:
            self._end()
            raise

    def inside(self, *argv: object) -> list[str]:
        """The words that run a program in the namespace; paths below `seen` become what they are called there."""
        words = [str(word).replace(str(self.seen), str(self.mount)) for word in argv]
        return ["nsenter", f"--target={self._holder.pid}", "--mount", "--", *words]

    def _run(self, *argv: object) -> None:
        done = subprocess.run(self.inside(*argv), capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotCut(f"{argv[0]}: {done.stderr.strip()}")

    def plug_in(self) -> None:
        """Mount it: the journal is replayed.  What was only in memory is lost."""
        self._run("mount", "-t", self.kind, "-o", self._options, self.image, self.mount)

    def _try_cut(self) -> None:
        try:
            self.cut()
        except OSError as error:
            self.unplug()
            raise CannotCut(f"{self.kind}: {error.strerror}") from None
        self.unplug()
        self.plug_in()

    def cut(self, how: int = LOSE_ALL) -> None:
        """From now on nothing gets to the disk."""
        place = os.open(self.seen, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(place, SHUTDOWN, struct.pack("I", how))
        finally:
            os.close(place)

    def unplug(self) -> None:
        """Unmount it, as soon as the last process has gone that used it."""
        done = ["?"]

        def unmounted() -> bool:
            umount = subprocess.run(self.inside("umount", self.mount), capture_output=True, text=True, check=False)
            done[0] = umount.stderr
            return not umount.returncode

        assert until(unmounted, 20), done[0]

    def save(self) -> Path:
        """A copy of what is on it now."""
        copy = self.image.with_suffix(".saved")
        self.unplug()
        subprocess.run(["cp", "--sparse=always", self.image, copy], check=True)
        self.plug_in()
        return copy

    def restore(self, copy: Path) -> None:
        self.unplug()
        subprocess.run(["cp", "--sparse=always", copy, self.image], check=True)
        self.plug_in()

    def close(self) -> None:
        try:
            self.unplug()
        finally:
            self._end()

    def _end(self) -> None:
        self._holder.communicate()


class CutCloud(Cloud):
    """A cloud whose home, the tree in it, is on such a disk."""

    def __init__(self, disk: CutDisk) -> None:
        self.disk = disk
        super().__init__(disk.seen / "home")
        self.env = {key: value.replace(str(disk.seen), str(disk.mount)) for key, value in self.env.items()}

    def execute(self, argv: Iterable[object], *more: Any, **how: Any) -> Result:
        return super().execute(self.disk.inside(*argv), *more, **how)

    def begin(self, commands: Iterable[Iterable[object]]) -> subprocess.Popen[bytes]:
        """Start commands, one after the other as long as they return 0; the next cut ends them."""
        script = " && ".join(shlex.join(self.disk.inside(*words)) for words in commands)
        quiet: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(["sh", "-c", script], env=self.env, cwd="/", start_new_session=True, **quiet)

    def spawn(self, *_: object, **__: object) -> subprocess.Popen[str]:
        raise NotImplementedError  # what it starts isn't in the namespace

    def processes(self) -> dict[int, str]:
        return processes_with(str(self.disk.mount))

    def cut(self, how: int = LOSE_ALL) -> None:
        """The power fails, and comes back: no process is left, and on the disk is what had got there."""
        self.disk.cut(how)
        kill_all(self.processes())
        eventually(lambda: not self.processes(), "all processes are dead", 20)
        self.disk.unplug()
        self.disk.plug_in()
