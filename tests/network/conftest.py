"""A network namespace of the test's own: bridge br0 with a tap and an uplink to a far end."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x0002 | 0x1000


@pytest.fixture
def open_tap() -> Callable[[str], int]:
    """Makes a tap as QEMU does; it is gone when the descriptor is closed."""

    def make(name: str) -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP_NO_PI))
        return descriptor

    return make


@pytest.fixture
def in_namespace() -> Callable[[Callable[[], Coroutine[object, object, None]]], None]:
    """Runs a coroutine function in a thread that has a network namespace of its own, which ends
    with the thread."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("needs root and /dev/net/tun")

    def run(work: Callable[[], Coroutine[object, object, None]]) -> None:
        failure: list[BaseException] = []

        def body() -> None:
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.unshare(CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
                asyncio.run(work())
            except BaseException as error:  # handed to the test's own thread
                failure.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]

    return run
