"""A process with one piece of memory for the page streams, filled, and touched by threads.

Run as a program by the tests and the bench; a JSON line in, a JSON line out.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import sys
import threading
import time

PAGE = 4096
WORDS = (
    b"static struct page *ferry(unsigned long address, int order) { return NULL; }\n\t/* of */ if "
)


def text_page(rng: random.Random) -> bytes:
    """Like source code: words in a random order."""
    words = WORDS.split()
    line = b" ".join(rng.choices(words, k=PAGE // 4))
    return line[:PAGE].ljust(PAGE, b".")


class Child:
    """One method an order; its arguments are the order's."""

    def __init__(self, kind: str, pages: int) -> None:
        length = pages * PAGE
        if kind == "memfd":
            descriptor = os.memfd_create("ram")
            os.ftruncate(descriptor, length)
            self.memory = mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED)
            self.give_back = mmap.MADV_REMOVE
        else:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self.memory = mmap.mmap(-1, length, flags=flags)
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)
            self.give_back = mmap.MADV_DONTNEED
        self.pages = pages
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.view = memoryview(self.memory)
        self.latencies: list[float] = []
        self.writer: threading.Thread | None = None
        self.stop = False

    def page(self, page: int) -> memoryview:
        return self.view[page * PAGE : (page + 1) * PAGE]

    def fill(self, seed: int, like: str = "random") -> None:
        rng = random.Random(seed)
        if like == "random":
            for start in range(0, self.pages, 256):
                stop = min(start + 256, self.pages)
                self.view[start * PAGE : stop * PAGE] = rng.randbytes((stop - start) * PAGE)
            return
        stock = [text_page(rng) for _ in range(64)]
        for page in range(self.pages):
            self.page(page)[:] = stock[page % 64]
            self.page(page)[: 4 * 8 * 8 : 8] = rng.randbytes(4 * 8)

    def write(self, seed: int, pages: list[int]) -> None:
        rng = random.Random(seed)
        for page in pages:
            self.page(page)[:] = rng.randbytes(PAGE)

    def zero(self, pages: list[int]) -> None:
        for page in pages:
            self.page(page)[:] = bytes(PAGE)

    def discard(self, page: int, count: int) -> None:
        self.memory.madvise(self.give_back, page * PAGE, count * PAGE)

    def start_writer(self, seed: int) -> None:
        """Rewrites random pages until `stop_writer`."""
        rng = random.Random(seed)

        def work() -> None:
            while not self.stop:
                self.page(rng.randrange(self.pages))[:] = rng.randbytes(PAGE)

        self.writer = threading.Thread(target=work)
        self.writer.start()

    def stop_writer(self) -> None:
        self.stop = True
        assert self.writer is not None
        self.writer.join()

    def digest(self) -> str:
        """Over the hashes of all pages in order."""
        whole = hashlib.sha256()
        for page in range(self.pages):
            whole.update(hashlib.sha256(self.page(page)).digest())
        return whole.hexdigest()

    def touch(self, seed: int, threads: int, pause: float = 0.0, most: int | None = None) -> str:
        """The same, but each page read first in a random order by threads: sha256 of a page gives
        the interpreter's lock up, so that several of them wait for pages at once. `most` bounds
        the pages that are read."""
        order = list(range(self.pages))
        random.Random(seed).shuffle(order)
        del order[self.pages if most is None else most :]
        found: list[bytes] = [b""] * self.pages
        self.latencies = []

        def work(share: list[int]) -> None:
            for page in share:
                began = time.perf_counter()
                found[page] = hashlib.sha256(self.page(page)).digest()
                self.latencies.append(time.perf_counter() - began)
                if pause:
                    time.sleep(pause)

        workers = [threading.Thread(target=work, args=(order[n::threads],)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return hashlib.sha256(b"".join(found)).hexdigest()

    def discard_while(self, seed: int, rounds: int, most: int) -> list[int]:
        """Gives random ranges back, each page of them at once read again; must be zero. Returns
        the pages that were not."""
        rng = random.Random(seed)
        wrong = []
        for _ in range(rounds):
            count = rng.randint(1, most)
            page = rng.randrange(self.pages - count)
            self.discard(page, count)
            wrong += [p for p in range(page, page + count) if any(self.page(p))]
        return wrong

    def touch_latencies_us(self) -> list[float]:
        return sorted(latency * 1e6 for latency in self.latencies)


def main() -> None:
    child = Child(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"address": child.address}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(child, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main()
