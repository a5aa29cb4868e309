"""The Rust core: it moves bytes, in batches, without the GIL, and has no opinion on what and when.

Every method that may take longer than a few microseconds releases the GIL; call it through
`asyncio.to_thread`. Pages are 4096 bytes; a page is named by the index of its block and its index
in that block, whatever the page size of the mapping.
"""

from collections.abc import Sequence
from typing import final

PAGE_SIZE: int

class CoreError(Exception):
    """Something the kernel or the peer refused; the message says what."""

class StreamClosed(CoreError):
    """A page stream ended or broke before its work was done."""

class PageCorrupt(CoreError):
    """A batch whose checksum does not match its content arrived."""

class Cancelled(CoreError):
    """`cancel()` was called while the call was running."""

# --- a foreign process -------------------------------------------------------------------------

def inject_userfaultfd(pid: int, *, user_mode_only: bool, keep_open: bool) -> tuple[int, int]:
    """Makes a userfaultfd inside `pid` by ptrace and takes a copy: (ours, its number there).

    With `keep_open` it stays open there too, so that it outlives this process; otherwise it is
    closed there again and the second number is -1. OSError carries the errno of the injected call.
    """

def inject_userfaultfd_from(pid: int, device: int, *, keep_open: bool) -> tuple[int, int]:
    """The same through /dev/userfaultfd, open in `pid` as `device` (kernel-mode faults)."""

def inject_close(pid: int, descriptor: int) -> None: ...
def inject_discard(pid: int, address: int, length: int) -> None:
    """madvise(MADV_DONTNEED) inside `pid`: the range becomes a hole (private RAM)."""

def find_userfaultfd(pid: int) -> list[int]:
    """Numbers of the userfaultfds open in `pid` (for tests: a guest left as it was has none)."""

def make_keeper(pid: int) -> int:
    """Makes the keeper of `pid` (recovery.md 7): returns the pid of a child sharing its memory.

    It has no descriptors, blocks all signals and only pauses. `pid` itself is not disturbed.
    """

def reap_keeper(pid: int, keeper: int) -> None:
    """Kills the keeper of a process that lives on, and lets that process reap it."""

@final
class Block:
    """One RAM block as it lies in a process: `length` bytes at `address`."""

    def __new__(
        cls, name: str, address: int, length: int, page_size: int = 4096, shared: bool = False
    ) -> Block: ...
    @property
    def name(self) -> str: ...
    @property
    def address(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def shared(self) -> bool: ...
    @property
    def pages(self) -> int:
        """Length in 4 KiB pages."""

@final
class PageSet:
    """A set of pages of a guest, a bit a page. Sets of unlike shape do not mix (ValueError)."""

    def __new__(cls, shape: Sequence[int]) -> PageSet:
        """The empty set over blocks of so many pages each."""
    @property
    def shape(self) -> list[int]: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __eq__(self, other: object) -> bool: ...
    def __or__(self, other: PageSet) -> PageSet: ...
    def __and__(self, other: PageSet) -> PageSet: ...
    def __sub__(self, other: PageSet) -> PageSet: ...
    def add(self, block: int, start: int, stop: int) -> None:
        """Adds pages [start, stop) of a block."""
    def discard(self, block: int, start: int, stop: int) -> None: ...
    def contains(self, block: int, page: int) -> bool: ...
    def count(self, block: int) -> int: ...
    def ranges(self, block: int) -> list[tuple[int, int]]:
        """Maximal runs [start, stop) in ascending order."""

@final
class Memory:
    """The RAM blocks of one process, read and written by process_vm_readv/writev."""

    def __new__(cls, pid: int, blocks: Sequence[Block]) -> Memory: ...
    @property
    def pid(self) -> int: ...
    @property
    def blocks(self) -> list[Block]: ...
    @property
    def shape(self) -> list[int]: ...
    def read(self, block: int, offset: int, length: int) -> bytes: ...
    def write(self, block: int, offset: int, data: bytes) -> None: ...
    def populated(self) -> PageSet:
        """Pages that hold something: present or swapped (private), in the file (shared)."""
    def digests(self) -> bytes:
        """xxh3-64 of every page of every block, 8 bytes each, little endian; 0 for a page of
        zeros or a hole. Reads only populated pages, so it populates nothing."""

def differing_pages(a: bytes, b: bytes) -> list[int]:
    """Where two digest vectors differ, at most the first 64; unlike lengths: ValueError."""

def count_differing(a: bytes, b: bytes) -> int: ...

@final
class Tracker:
    """Dirty tracking of a process from outside: userfaultfd WP_ASYNC and PAGEMAP_SCAN."""

    def __new__(cls, memory: Memory, userfaultfd: int) -> Tracker:
        """Takes over the descriptor, enables the features and registers every block."""
    def scan(self) -> PageSet:
        """Pages written since the last scan, armed again in the same step; the first scan
        returns every populated page that was ever written (not those that only show zeros)."""
    def close(self) -> None:
        """Unregisters every block and closes the descriptor; twice is harmless."""

# --- page streams ------------------------------------------------------------------------------

@final
class Credentials:
    """This host's certificate and key and the certificates of the peers it trusts (PEM)."""

    def __new__(cls, certificate: bytes, key: bytes, peers: Sequence[bytes]) -> Credentials: ...

@final
class Stream:
    """One page stream: a connected TCP socket under TLS 1.3, both ends authenticated."""

    @staticmethod
    def connect(socket: int, credentials: Credentials, token: bytes, urgent: bool) -> Stream:
        """Client handshake on a connected socket (taken over), then says which move (16 bytes)
        it belongs to. Blocks until the server has answered, at most 10 s."""
    @staticmethod
    def accept(socket: int, credentials: Credentials) -> tuple[bytes, bool, Stream]:
        """Server side: (token, urgent, stream)."""
    def close(self) -> None: ...

@final
class Progress:
    pages: int
    """Pages sent so far, duplicates included, zero pages included."""
    zero_pages: int
    payload_bytes: int
    """Bytes before encoding."""
    wire_bytes: int
    """Bytes given to the sockets, headers included, TLS overhead not."""
    remaining: int
    """Pages of the running push or pull that are not sent yet."""
    by_encoding: dict[str, int]
    """Wire bytes of page payload by encoding: raw, lz4, zstd, zero."""

@final
class Sender:
    """The source's end of the page streams."""

    def __new__(cls, memory: Memory, bulk: Sequence[Stream], urgent: Stream) -> Sender: ...
    def push(self, pages: PageSet) -> None:
        """Sends these pages and returns when the destination has installed them all."""
    def discard(self, pages: PageSet) -> None:
        """Tells the destination that these pages are holes now: they read as zeros there."""
    def serve(self, missing: PageSet) -> None:
        """Post-copy: hands the set of missing pages to the destination, which arms its
        userfaultfd for them, and starts answering its requests; returns when it is armed.
        Pages of the demand-paged blocks outside `missing` are zero there."""
    def pull(self) -> None:
        """Active push of what is still missing while requests go on being answered; returns
        when every missing page is installed."""
    def set_rate(self, bytes_per_second: int) -> None:
        """Cap over all streams together; 0 takes it away."""
    def set_memory(self, memory: Memory) -> None:
        """Reads from another process of the same layout from now on (the keeper)."""
    def progress(self) -> Progress: ...
    def cancel(self) -> None:
        """Makes the running call raise Cancelled and closes the streams."""
    def finish(self) -> None:
        """Orderly end: the receiver's `wait` returns. Then the streams close."""

@final
class FaultStats:
    network_faults: int
    """Guest accesses that had to ask over the network."""
    served_under_way: int
    """Accesses served by a page that was already under way when the fault came."""
    zero_faults: int
    """Accesses to pages known to be zero, served at once here."""
    latency_us_p50: float
    latency_us_p99: float
    latency_us_max: float
    stall_ms: float
    """Wall time in which at least one access waited for a page."""
    discarded_pages: int
    """Pages that the guest gave back (balloon) while pages were missing."""

@final
class Receiver:
    """The destination's end: one thread a stream installs what arrives."""

    def __new__(cls, memory: Memory, bulk: Sequence[Stream], urgent: Stream) -> Receiver: ...
    def serve_faults(self, userfaultfd: int, blocks: Sequence[int], record_digests: bool) -> None:
        """Post-copy: enables the features, and answers faults in these blocks once the source's
        set of missing pages has come (it registers the blocks then). Takes over the descriptor."""
    def wait(self) -> None:
        """Returns at the source's orderly end; raises when a stream breaks or a page is corrupt."""
    @property
    def missing(self) -> int:
        """Pages still missing (post-copy)."""
    @property
    def pages_installed(self) -> int: ...
    def fault_stats(self) -> FaultStats: ...
    def installed_digests(self) -> bytes:
        """With `record_digests`: the digest of each page as it was installed; 0 where none was."""
    def discarded(self) -> PageSet:
        """Pages that the guest gave back while pages were missing."""
    def release(self) -> None:
        """Unregisters the userfaultfd and closes it; the guest depends on nothing from now on."""
    def cancel(self) -> None: ...
