"""RAM blocks: complete, and at the address where the guest itself sees their content."""

from __future__ import annotations

import asyncio
import re

import pytest

from vmferry._core import Memory
from vmferry.errors import Refused
from vmferry.guest.qemu import Qemu
from vmferry.guest.ramblocks import (
    Mapping,
    RamBlock,
    check_main_memory,
    parse_ram_blocks,
    place,
)

from .firmware_guests import Guests

MIB = 1 << 20


def blocks_of(guests: Guests, *words: str, booted: bool = True) -> tuple[list[RamBlock], Memory]:
    """The RAM blocks of a new guest. It is `booted` when firmware tables are in their blocks."""
    guest = guests.start(*words, *([] if booted else ["-S"]))

    async def scenario() -> list[RamBlock]:
        qemu = await Qemu.attach(guest)
        text = str((await qemu.monitor.table("x-query-ramblock"))["human-readable-text"])
        found = await qemu.ram()
        # Every line below the headline is a block.
        assert len(found) == len(text.strip().splitlines()) - 1
        await qemu.close()
        return found

    found = asyncio.run(scenario())
    return found, Memory(guest.pid, [ram.block for ram in found])


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_each_block_has_its_content(guests: Guests, machine: str) -> None:
    found, memory = blocks_of(
        guests, "-M", machine, "-vga", "std", "-device", "e1000", booted=False
    )
    names = [ram.block.name for ram in found]
    assert {"pc.ram", "pc.bios", "pc.rom", "/rom@etc/acpi/tables", "/rom@etc/acpi/rsdp"} <= set(
        names
    )
    for index, ram in enumerate(found):
        assert ram.block.length % 4096 == 0
        assert 0 < ram.used <= ram.block.length
        assert (ram.block.page_size, ram.block.shared) == (4096, False)
        name = ram.block.name.rpartition("/")[2]
        if name.endswith(".rom") and name != "pc.rom":
            # The mark of an option ROM.
            assert memory.read(index, 0, 2) == b"\x55\xaa"
        elif name == "rsdp":
            assert memory.read(index, 0, 8) == b"RSD PTR "
        elif name == "tables":
            assert memory.read(index, 0, 4) == b"FACS"
        elif name == "pc.bios":
            # The jump at the reset vector.
            assert memory.read(index, ram.block.length - 16, 1) == b"\xea"
    assert sum(name.endswith("vga.rom") for name in names) == 1


def test_blocks_of_one_size_are_not_mixed_up(guests: Guests) -> None:
    """The guest's physical addresses tell which is which."""
    words = ["-M", "q35", "-m", "64", "-smp", "2", "-S"]
    for node in range(2):
        words += ["-object", f"memory-backend-ram,id=r{node},size=32M"]
        words += ["-numa", f"node,nodeid={node},memdev=r{node},cpus={node}"]
    guest = guests.start(*words)

    async def scenario() -> None:
        qemu = await Qemu.attach(guest)
        found = await qemu.ram()
        memory = Memory(guest.pid, [ram.block for ram in found])
        names = [ram.block.name for ram in found]
        for node in range(2):
            assert found[names.index(f"r{node}")].block.length == 32 * MIB
            memory.write(names.index(f"r{node}"), 5 * MIB, bytes([0x11 * (node + 1)] * 8))
        for node in range(2):
            said = await qemu.monitor.hmp(f"xp /1xg {node * 32 * MIB + 5 * MIB:#x}")
            seen = re.search(r"0x([0-9a-f]+)\s*$", said.strip())
            assert seen is not None
            assert seen[1] == f"{0x11 * (node + 1):02x}" * 8
        await qemu.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("backend", "shared"),
    [
        ("memory-backend-memfd,id=m,size=32M,share=on", True),
        ("memory-backend-memfd,id=m,size=32M,share=off", False),
        ("memory-backend-file,id=m,size=32M,share=on,mem-path={folder}/ram", True),
        ("memory-backend-ram,id=m,size=32M,share=off", False),
    ],
)
def test_shared_memory_is_told(guests: Guests, backend: str, shared: bool) -> None:
    found, memory = blocks_of(
        guests,
        *("-object", backend.format(folder=guests.directory), "-M", "pc,memory-backend=m"),
        booted=False,
    )
    index = next(i for i, ram in enumerate(found) if ram.block.name == "m")
    assert found[index].block.length == 32 * MIB
    assert found[index].block.shared is shared
    assert [ram.block.name for ram in found if ram.block.shared] == (["m"] if shared else [])
    if "mem-path" in backend:
        memory.write(index, MIB, b"seen in the file")
        assert (guests.directory / "ram").read_bytes()[MIB:][:16] == b"seen in the file"


OLD_TABLE = """\
              Block Name    PSize              Offset               Used              Total
                   {0}    4 KiB  0x0000000000000000 0x0000000002000000 0x0000000002000000
                   {1}    4 KiB  0x0000000002000000 0x0000000002000000 0x0000000002000000
    /rom@etc/acpi/rsdp    4 KiB  0x0000000004000000 0x0000000000001000 0x0000000000001000
"""


def mapping(start: int, length: int, *, ram: bool = True) -> Mapping:
    return Mapping(start, start + length, False, ram)


def test_placing_by_size_and_order() -> None:
    rows = parse_ram_blocks(OLD_TABLE.format("a", "b c"))
    assert [row.name for row in rows] == ["a", "b c", "/rom@etc/acpi/rsdp"]
    mappings = [
        mapping(0x10000000, 32 * MIB),
        mapping(0x20000000, 32 * MIB),
        mapping(0x40000000, 32 * MIB, ram=False),
        mapping(0x50000000, 4096),
    ]
    assert place(rows, mappings) == {
        "a": 0x20000000,
        "b c": 0x10000000,
        "/rom@etc/acpi/rsdp": 0x50000000,
    }


@pytest.mark.parametrize(
    ("printed", "size"), [("   4 KiB", 4096), ("   2 MiB", 2 * MIB), ("   1 GiB", 1 << 30)]
)
def test_page_sizes(printed: str, size: int) -> None:
    rows = parse_ram_blocks(OLD_TABLE.format("a", "b").replace("   4 KiB", printed))
    assert [row.page_size for row in rows] == [size] * 3


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_doubtful_size_is_not_guessed(extra: int) -> None:
    rows = parse_ram_blocks(OLD_TABLE.format("a", "b"))
    mappings = [mapping(0x10000000 * (1 + i), 32 * MIB) for i in range(2 + extra)]
    assert place(rows, [*mappings, mapping(0x90000000, 4096)]) == {"/rom@etc/acpi/rsdp": 0x90000000}


def test_a_block_without_an_address_is_refused(
    guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmferry.guest import ramblocks

    guest = guests.start("-S")
    monkeypatch.setattr(ramblocks, "_read_mappings", lambda pid, with_flags: [])

    async def scenario() -> None:
        qemu = await Qemu.attach(guest)
        with pytest.raises(Refused, match=r"RAM block .* was not found"):
            await qemu.ram()
        await qemu.close()

    asyncio.run(scenario())


def test_main_memory_is_where_qemu_says(guests: Guests) -> None:
    guest = guests.start("-S")

    async def scenario() -> None:
        qemu = await Qemu.attach(guest)
        said = await qemu.monitor.hmp("gpa2hva 0")
        found = {ram.block.name: ram.block.address for ram in await qemu.ram()}
        check_main_memory(said, found, "g")
        found["pc.ram"] += 2 * MIB
        with pytest.raises(Refused, match=r"RAM block pc\.ram of guest g was looked for"):
            check_main_memory(said, found, "g")
        await qemu.close()

    asyncio.run(scenario())
