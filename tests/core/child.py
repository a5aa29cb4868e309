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
    if kind.startswith("memfd"):
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


def spin(seconds: float) -> int:
    """The main thread in user code, never in a system call for long."""
    end = time.monotonic() + seconds
    total = 0
    while time.monotonic() < end:
        total += sum(range(1000)) == 499500
    return total


def main() -> None:
    memory = map_memory(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    view = memoryview(memory)
    busy: Busy | None = None
    alarms = 0

    def at_alarm(*_: object) -> None:
        nonlocal alarms
        alarms += 1

    signal.signal(signal.SIGALRM, at_alarm)
    print(json.dumps({"address": address}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        result: object = None
        match order["do"]:
            case "write":
                for page in order["pages"]:
                    view[page * PAGE : page * PAGE + 8] = struct.pack("Q", order["value"])
            case "fill":
                for page in order["pages"]:
                    view[page * PAGE : (page + 1) * PAGE] = struct.pack("Q", page + 1) * 512
            case "look":
                result = [view[page * PAGE] for page in order["pages"]]
            case "read-into":
                with tempfile.TemporaryFile() as file:
                    file.write(b"\x55" * PAGE)
                    file.flush()
                    for page in order["pages"]:
                        os.preadv(file.fileno(), [view[page * PAGE : (page + 1) * PAGE]], 0)
            case "discard":
                memory.madvise(mmap.MADV_DONTNEED, order["page"] * PAGE, order["count"] * PAGE)
            case "punch":
                memory.madvise(mmap.MADV_REMOVE, order["page"] * PAGE, order["count"] * PAGE)
            case "evict":
                memory.madvise(MADV_PAGEOUT)
            case "busy":
                busy = Busy(order["threads"])
            case "idle":
                assert busy is not None
                result = busy.end()
            case "spin":
                print("spinning", flush=True)
                result = spin(order["seconds"])
            case "alarms":
                signal.setitimer(signal.ITIMER_REAL, order["every"], order["every"])
            case "no-alarms":
                signal.setitimer(signal.ITIMER_REAL, 0)
                result = alarms
            case "sleep":
                print("sleeping", flush=True)
                began = time.monotonic()
                time.sleep(order["seconds"])
                result = time.monotonic() - began
            case "wait-signal":
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
                print("waiting", flush=True)
                info = signal.sigtimedwait({signal.SIGUSR1}, 60)
                result = None if info is None else int(info.si_signo)
            case "mask":
                result = sorted(int(number) for number in signal.pthread_sigmask(0, set()))
            case "forbid-new-processes":
                forbid_new_processes()
            case "open":
                result = os.open(order["path"], os.O_RDWR)
            case "close":
                os.close(order["descriptor"])
            case "descriptors":
                result = sorted(entry.name for entry in Path("/proc/self/fd").iterdir())
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
