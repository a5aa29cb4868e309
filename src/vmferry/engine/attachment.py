"""What vmferry does inside a source's QEMU, and how it is undone.

Attaching makes one userfaultfd inside the process by ptrace, takes it out, and registers the RAM
blocks for asynchronous write protection. Nothing stays in the process: the descriptor is ours
alone, so the kernel takes every trace away when it is closed, or when we die.
"""

from __future__ import annotations

import asyncio

from vmferry import _core
from vmferry._core import Memory, PageSet, Tracker
from vmferry.errors import GuestError, Refused
from vmferry.guest.process import GuestProcess

DEMAND_PAGED_MIN_BYTES = 32 << 20
_NEVER_DEMAND_PAGED = ("vga", "vram", "rom", "bios", "flash", "acpi")


class Attachment:
    """The RAM of a running guest, readable and tracked."""

    def __init__(self, memory: Memory, tracker: Tracker) -> None:
        self.memory = memory
        self.tracker = tracker

    @classmethod
    async def make(cls, process: GuestProcess, memory: Memory) -> Attachment:
        """Attaches; Refused when the kernel does not let us, with the guest as it was."""

        def attach() -> Tracker:
            # Kernel-mode writes are marked too: an asynchronous fault is resolved in the kernel,
            # so the user-mode-only descriptor that any process may have is enough here.
            descriptor, _ = _core.inject_userfaultfd(
                process.pid, user_mode_only=True, keep_open=False
            )
            return Tracker(memory, descriptor)

        try:
            tracker = await asyncio.to_thread(attach)
        except PermissionError as error:
            raise Refused(
                f"not allowed to attach to guest {process.name} (pid {process.pid}): run the "
                "daemon as root, or as the guest's user with CAP_SYS_PTRACE"
            ) from error
        except ProcessLookupError as error:
            raise GuestError(f"guest {process.name} (pid {process.pid}) is gone") from error
        except (OSError, _core.CoreError) as error:
            raise Refused(
                f"guest {process.name} (pid {process.pid}) cannot be tracked: {error}; "
                "`vmferry check` says what this kernel lacks"
            ) from error
        return cls(memory, tracker)

    async def detach(self) -> None:
        """Leaves the guest as it was."""
        await asyncio.to_thread(self.tracker.close)


def demand_paged(name: str, length: int) -> bool:
    """Whether a block may be missing at the destination while its guest runs.

    Firmware, video memory and tables are small and read by the load of the device state; only
    main memory is worth paging on demand.
    """
    return length >= DEMAND_PAGED_MIN_BYTES and not any(w in name for w in _NEVER_DEMAND_PAGED)


def eager_pages(memory: Memory) -> PageSet:
    """All pages of the blocks that are not demand-paged."""
    pages = PageSet(memory.shape)
    for index, block in enumerate(memory.blocks):
        if not demand_paged(block.name, block.length):
            pages.add(index, 0, block.pages)
    return pages
