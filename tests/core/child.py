"""A process with one piece of memory that does what it is told, a JSON line at a time.

Run as a program by the tests; standard library only, so that it starts fast.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import signal
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

PAGE = 4096
MADV_PAGEOUT = 21
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
libc = ctypes.CDLL(None, use_errno=True)


def map_memory(kind: str, pages: int, path: str) -> mmap.mmap:
    length = pages * PAGE
    if kind == "private":
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        return memory
    if kind == "private-huge":
        return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if kind.startswith("huge"):
        descriptor = os.memfd_create("ram", os.MFD_HUGETLB)
    elif kind.startswith("memfd"):
        descriptor = os.memfd_create("ram")
    else:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, length)
    flags = mmap.MAP_PRIVATE if kind.endswith("private") else mmap.MAP_SHARED
    memory = mmap.mmap(descriptor, length, flags=flags)
    os.close(descriptor)
    return memory


class Busy:
    """Threads that compute without the interpreter's lock and notice a wrong result."""

    def __init__(self, threads: int) -> None:
        self.stop = False
        self.rounds = [0] * threads
        self.wrong = 0
        self.data = os.urandom(1 << 16)
        self.right = hashlib.sha256(self.data).digest()
        self.threads = [threading.Thread(target=self.work, args=(n,)) for n in range(threads)]
        for thread in self.threads:
            thread.start()

    def work(self, number: int) -> None:
        while not self.stop:
            if hashlib.sha256(self.data).digest() != self.right:
                self.wrong += 1
            self.rounds[number] += 1

    def end(self) -> dict[str, object]:
        self.stop = True
        for thread in self.threads:
            thread.join()
        return {"rounds": self.rounds, "wrong": self.wrong}


def forbid_new_processes() -> None:
    """A filter that kills the process at what a new one needs, as QEMU's sandbox does."""
    load, jump, give = 0x20, 0x15, 0x06
    numbers = (56, 57, 435, 112, 436)  # clone, fork, clone3, setsid, close_range
    program = [struct.pack("HBBI", load, 0, 0, 0)]
    for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
        program.append(struct.pack("HBBI", jump, left, 0, number))
    program.append(struct.pack("HBBI", give, 0, 0, 0x7FFF0000))
    program.append(struct.pack("HBBI", give, 0, 0, 0x80000000))
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, 2, header):
        raise OSError(ctypes.get_errno(), "prctl")


class Child:
    """One method an order, named as the order is; its arguments are the order's."""

    def __init__(self, kind: str, pages: int, path: str) -> None:
        self.memory = map_memory(kind, pages, path)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.view = memoryview(self.memory)
        self.threads: Busy | None = None
        self.alarms = 0
        signal.signal(signal.SIGALRM, self.at_alarm)

    def at_alarm(self, *_: object) -> None:
        self.alarms += 1

    def page(self, page: int) -> memoryview:
        return self.view[page * PAGE : (page + 1) * PAGE]

    def write(self, pages: list[int], value: int) -> None:
        for page in pages:
            self.page(page)[:8] = struct.pack("Q", value)

    def fill(self, pages: list[int]) -> None:
        for page in pages:
            self.page(page)[:] = struct.pack("Q", page + 1) * 512

    def look(self, pages: list[int]) -> list[int]:
        return [self.page(page)[0] for page in pages]

    def read_into(self, pages: list[int]) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(b"\x55" * PAGE)
            file.flush()
            for page in pages:
                os.preadv(file.fileno(), [self.page(page)], 0)

    def discard(self, page: int, count: int) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED, page * PAGE, count * PAGE)

    def punch(self, page: int, count: int) -> None:
        self.memory.madvise(mmap.MADV_REMOVE, page * PAGE, count * PAGE)

    def evict(self) -> None:
        self.memory.madvise(MADV_PAGEOUT)

    def busy(self, threads: int) -> None:
        self.threads = Busy(threads)

    def idle(self) -> dict[str, object]:
        assert self.threads is not None
        return self.threads.end()

    def spin(self, seconds: float) -> int:
        """The main thread in user code, never in a system call for long."""
        print("spinning", flush=True)
        end = time.monotonic() + seconds
        total = 0
        while time.monotonic() < end:
            total += sum(range(1000)) == 499500
        return total

    def ring(self, every: float) -> int:
        """SIGALRM from now on, or with 0 no more; how many there were."""
        signal.setitimer(signal.ITIMER_REAL, every, every)
        return self.alarms

    def sleep(self, seconds: float) -> float:
        print("sleeping", flush=True)
        began = time.monotonic()
        time.sleep(seconds)
        return time.monotonic() - began

    def wait_signal(self) -> int | None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        print("waiting", flush=True)
        info = signal.sigtimedwait({signal.SIGUSR1}, 60)
        return None if info is None else int(info.si_signo)

    def mask(self) -> list[int]:
        return sorted(int(number) for number in signal.pthread_sigmask(0, set()))

    def forbid_new_processes(self) -> None:
        forbid_new_processes()

    def open(self, path: str) -> int:
        return os.open(path, os.O_RDWR)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def descriptors(self) -> list[str]:
        return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def main() -> None:
    child = Child(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    print(json.dumps({"address": child.address}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(child, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main()
