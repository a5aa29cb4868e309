"""Two processes and the page streams between them, for the tests and the bench."""

from __future__ import annotations

import datetime
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vmferry import _core as core

CHILD = Path(__file__).with_name("touching_child.py")
TOKEN = bytes(range(16))
T = TypeVar("T")


class Child:
    """A running `touching_child.py`."""

    def __init__(self, pages: int, kind: str = "private") -> None:
        self.pages = pages
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), kind, str(pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        answer = self.answer()
        assert isinstance(answer, dict)
        block = core.Block("ram", answer["address"], pages * 4096, 4096, kind == "memfd")
        self.memory = core.Memory(self.pid, [block])

    def begin(self, do: str, **order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> object:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def tell(self, do: str, **order: object) -> object:
        self.begin(do, **order)
        return self.answer()

    def all_pages(self) -> core.PageSet:
        return pages_of(self.memory, range(self.pages))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def pages_of(memory: core.Memory, pages: range | list[int]) -> core.PageSet:
    found = core.PageSet(memory.shape)
    if isinstance(pages, range) and pages.step == 1:
        found.add(0, pages.start, pages.stop)
        return found
    for page in pages:
        found.add(0, page, page + 1)
    return found


@dataclass
class Host:
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes

    def trusts(self, *peers: Host) -> core.Credentials:
        return core.Credentials(self.certificate, self.key, [peer.certificate for peer in peers])


def make_host(name: str) -> Host:
    key = Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("vmferry")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, None)
    )
    return Host(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def in_background(call: Callable[[], T]) -> Callable[[], T]:
    """Starts `call` on a thread; the result waits for it and gives or raises what it did."""
    outcome: list[T | BaseException] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result() -> T:
        thread.join(60)
        assert not thread.is_alive(), "still running after 60 s"
        found = outcome[0]
        if isinstance(found, BaseException):
            raise found
        return found

    return result


SOURCE = make_host("source")
DESTINATION = make_host("destination")


def tcp_pair(
    through: Callable[[socket.socket, socket.socket], None] | None = None,
) -> tuple[int, int]:
    """Descriptors of a connected pair; with `through`, that gets the two middle sockets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        if through is None:
            return client.detach(), accepted.detach()
        last = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        through(accepted, last)
        return client.detach(), far.detach()


def stream_pair(
    urgent: bool = False,
    through: Callable[[socket.socket, socket.socket], None] | None = None,
) -> tuple[core.Stream, core.Stream]:
    """(source's end, destination's end)."""
    near, far = tcp_pair(through)
    accepted = in_background(lambda: core.Stream.accept(far, DESTINATION.trusts(SOURCE)))
    connected = core.Stream.connect(near, SOURCE.trusts(DESTINATION), TOKEN, urgent)
    token, is_urgent, stream = accepted()
    assert (token, is_urgent) == (TOKEN, urgent)
    return connected, stream


class Way:
    """A sender and a receiver, connected."""

    def __init__(
        self,
        source: core.Memory,
        destination: core.Memory,
        streams: int = 2,
        through: Callable[[socket.socket, socket.socket], None] | None = None,
    ) -> None:
        bulk = [stream_pair(False, through) for _ in range(streams)]
        urgent = stream_pair(True, through)
        self.sender = core.Sender(source, [near for near, _ in bulk], urgent[0])
        self.receiver = core.Receiver(destination, [far for _, far in bulk], urgent[1])
        self.waited = in_background(self.receiver.wait)

    def finish(self) -> None:
        self.sender.finish()
        self.waited()
