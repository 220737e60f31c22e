"""The QMP client, against a server that can misbehave in every way."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nocloud

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
Answer = Callable[[socket.socket, dict[str, object]], None]


def reply(connection: socket.socket, request: dict[str, object], **message: object) -> None:
    connection.sendall(json.dumps({**message, "id": request["id"]}).encode() + b"\r\n")


@contextlib.contextmanager
def server(folder: Path, answer: Answer, greeting: bytes = GREETING) -> Iterator[list[dict[str, object]]]:
    """A qmp.sock whose commands, after the capabilities, get `answer`; what was asked is collected."""
    asked: list[dict[str, object]] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "qmp.sock"))
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            connection.sendall(greeting)
            with connection.makefile("rb") as lines:
                for line in lines:
                    request = json.loads(line)
                    asked.append(request)
                    if request["execute"] == "qmp_capabilities":
                        reply(connection, request, **{"return": {}})
                    else:
                        answer(connection, request)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        assert not thread.is_alive()


def test_a_command_and_its_arguments(tmp_path: Path) -> None:
    with server(tmp_path, lambda c, r: reply(c, r, **{"return": {"running": True}})) as asked:
        with nocloud.QMP(str(tmp_path)) as qmp:
            assert qmp.execute("query-status") == {"running": True}
            assert qmp.execute("x", a=1, b="c") == {"running": True}
        assert [each["execute"] for each in asked] == ["qmp_capabilities", "query-status", "x"]
        assert asked[2]["arguments"] == {"a": 1, "b": "c"} and "arguments" not in asked[1]


def test_messages_in_pieces_and_together(tmp_path: Path) -> None:
    def answer(connection: socket.socket, request: dict[str, object]) -> None:
        text = (
            b'{"event": "A", "data": {"x": "\xc3\xbc"}}\r\n'
            + json.dumps({"return": 1, "id": request["id"]}).encode()
            + b"\r\n"
        )
        for byte in text:
            connection.sendall(bytes([byte]))

    with server(tmp_path, answer), nocloud.QMP(str(tmp_path)) as qmp:
        assert qmp.execute("x") == 1
        assert qmp.execute("x") == 1
        assert [event["event"] for event in qmp.events] == ["A", "A"]


def test_events_before_the_reply_are_kept(tmp_path: Path) -> None:
    def answer(connection: socket.socket, request: dict[str, object]) -> None:
        connection.sendall(b'{"event": "SHUTDOWN"}\n{"event": "STOP"}\n')
        reply(connection, request, **{"return": {}})

    with server(tmp_path, answer), nocloud.QMP(str(tmp_path)) as qmp:
        assert qmp.execute("x") == {}
        assert [event["event"] for event in qmp.events] == ["SHUTDOWN", "STOP"]


def test_a_reply_to_another_id_is_not_ours(tmp_path: Path) -> None:
    def answer(connection: socket.socket, request: dict[str, object]) -> None:
        connection.sendall(b'{"return": "old", "id": "4711"}\n')
        reply(connection, request, **{"return": "new"})

    with server(tmp_path, answer), nocloud.QMP(str(tmp_path)) as qmp:
        assert qmp.execute("x") == "new"


def test_a_refusal_says_what_the_server_said_and_goes_on(tmp_path: Path) -> None:
    def answer(connection: socket.socket, request: dict[str, object]) -> None:
        if request["execute"] == "bad":
            reply(connection, request, error={"class": "GenericError", "desc": "not today"})
        else:
            reply(connection, request, **{"return": 2})

    with server(tmp_path, answer), nocloud.QMP(str(tmp_path)) as qmp:
        with pytest.raises(nocloud.QMPError, match="not today") as raised:
            qmp.execute("bad")
        assert not isinstance(raised.value, nocloud.QMPClosed)
        assert qmp.execute("good") == 2


def test_a_start_does_not_wait_for_a_qemu_that_refuses(tmp_path: Path) -> None:
    vm: Any = SimpleNamespace(folder=str(tmp_path), state=lambda: ("running", 4711))
    assert not nocloud.answers(vm, 4711)  # it has no socket yet
    refuse: Answer = lambda c, r: reply(c, r, error={"class": "GenericError", "desc": "not today"})  # noqa: E731
    with server(tmp_path, refuse), pytest.raises(nocloud.QMPError, match="not today"):
        nocloud.answers(vm, 4711)


def test_the_end_of_the_connection_is_the_end_of_qemu(tmp_path: Path) -> None:
    def answer(connection: socket.socket, request: dict[str, object]) -> None:
        connection.sendall(b'{"return": {')
        connection.shutdown(socket.SHUT_RDWR)

    with server(tmp_path, answer), nocloud.QMP(str(tmp_path)) as qmp:
        with pytest.raises(nocloud.QMPClosed):
            qmp.execute("x")
        with pytest.raises(nocloud.QMPClosed):
            qmp.execute("x")


def test_silence_ends_at_the_deadline(tmp_path: Path) -> None:
    started = time.monotonic()
    runs_out = pytest.raises(nocloud.TimedOut)
    with server(tmp_path, lambda c, r: None), nocloud.QMP(str(tmp_path), seconds=0.3) as qmp, runs_out:
        qmp.execute("x")
    assert 0.2 < time.monotonic() - started < 5


def test_a_chatterer_without_an_answer_ends_at_the_deadline(tmp_path: Path) -> None:
    def answer(connection: socket.socket, request: dict[str, object]) -> None:
        with contextlib.suppress(OSError):
            for _ in range(2000):
                connection.sendall(b'{"event": "NOISE"}\n')
                time.sleep(0.005)

    started = time.monotonic()
    with server(tmp_path, answer), nocloud.QMP(str(tmp_path), seconds=0.5) as qmp, pytest.raises(nocloud.TimedOut):
        qmp.execute("x")
    assert time.monotonic() - started < 5


def test_a_server_without_a_greeting(tmp_path: Path) -> None:
    with server(tmp_path, lambda c, r: None, greeting=b""), pytest.raises(nocloud.TimedOut):
        nocloud.QMP(str(tmp_path), seconds=0.3)


@pytest.mark.parametrize("words", [b"SSH-2.0-x\n", b"[1, 2]\n", b"null\n", b"\xff\xfe\n", b'{"QMP": \n'])
def test_what_is_not_qmp(tmp_path: Path, words: bytes) -> None:
    with server(tmp_path, lambda c, r: None, greeting=words):
        with pytest.raises(nocloud.QMPError) as raised:
            nocloud.QMP(str(tmp_path), seconds=2)
        assert not isinstance(raised.value, nocloud.QMPClosed)


def test_no_socket_and_a_dead_one(tmp_path: Path) -> None:
    with pytest.raises(nocloud.QMPClosed):
        nocloud.QMP(str(tmp_path))
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "qmp.sock"))
    dead.close()
    with pytest.raises(nocloud.QMPClosed):
        nocloud.QMP(str(tmp_path))


def test_a_folder_with_a_long_path(tmp_path: Path) -> None:
    """sun_path holds 107 bytes."""
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    link = tmp_path / "l"
    link.symlink_to(folder)
    with server(link, lambda c, r: reply(c, r, **{"return": 3})), nocloud.QMP(str(folder)) as qmp:
        assert qmp.execute("x") == 3


def test_a_socket_that_cannot_be_made_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, error in (("x" * 108, "too long"), ("folder", "directory")):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match=error) as raised:
            nocloud.listen_unix(str(tmp_path), name)
        assert raised.tb and os.listdir("/proc/self/fd") == before
