"""Builds the lab guest's initrd: one static program and the kernel modules that it needs."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.errors import FerryError
from vmferry.lab.cache import cache_dir, cache_lock
from vmferry.lab.downloads import kernel_in_cache

PROGRAMS = Path(__file__).parent / "programs"
_WANTED_MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "virtio_balloon")
_COMPILE_LIMIT_S = 120


@dataclass(frozen=True)
class GuestImage:
    """What `-kernel` and `-initrd` take."""

    kernel: Path
    initrd: Path


def build() -> GuestImage:
    """From the cache when neither sources nor kernel have changed. FerryError says what failed."""
    tree = kernel_in_cache()
    if tree is None:
        raise FerryError("There is no guest kernel in the cache; run `make demo` once.")
    kernel = next((tree / "boot").glob("vmlinuz-*"))
    with cache_lock():
        sources = sorted((PROGRAMS / "guest").iterdir())
        fingerprint = content_hash([*sources, Path(__file__)], kernel.name)
        initrd = cache_dir() / "guest" / f"initrd-{fingerprint}"
        if not initrd.exists():
            initrd.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=initrd.parent, prefix=".build-") as work:
                init = Path(work, "init")
                compile_c(sources, init, ["-static"])
                files = [("init", init.read_bytes(), 0o755)]
                for number, module in enumerate(_modules(tree)):
                    content = _uncompressed(module)
                    name = module.name.partition(".")[0]
                    files.append((f"modules/{number:02}-{name}.ko", content, 0o644))
                packed = Path(work, "initrd")
                # Level 1: the guest inflates it under emulation, and it is small anyway.
                packed.write_bytes(gzip.compress(_cpio(files), 1, mtime=0))
                packed.rename(initrd)
    return GuestImage(kernel, initrd)


def compile_c(sources: Iterable[Path], into: Path, options: Sequence[str] = ()) -> None:
    """Compiles C sources (headers among them are skipped) with the system's gcc."""
    units = [str(s) for s in sources if s.suffix == ".c"]
    gcc = shutil.which("gcc")
    if gcc is None:
        raise FerryError("The lab needs gcc; run `make demo` once, which installs it.")
    done = subprocess.run(
        [gcc, "-O2", "-Wall", "-Wextra", "-D_GNU_SOURCE", *options, "-s", "-o", into, *units],
        capture_output=True,
        text=True,
        check=False,
        timeout=_COMPILE_LIMIT_S,
    )
    if done.returncode != 0:
        raise FerryError(f"The lab's programs do not compile: {done.stderr.strip()}")


def content_hash(files: Iterable[Path], *more: str) -> str:
    """Names what is built from these files."""
    digest = hashlib.sha256("\0".join(more).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _modules(tree: Path) -> list[Path]:
    """The wanted modules and all they need, each after what it needs."""
    modules_dir = next((tree / "lib/modules").iterdir(), None) or next(
        (tree / "usr/lib/modules").iterdir()
    )
    by_name = {
        path.name.partition(".")[0].replace("-", "_"): path for path in modules_dir.rglob("*.ko*")
    }
    builtin_list = modules_dir / "modules.builtin"
    builtin = {
        Path(line).name.partition(".")[0].replace("-", "_")
        for line in (builtin_list.read_text().split() if builtin_list.exists() else ())
    }
    ordered: list[Path] = []

    def take(name: str) -> None:
        if name in builtin:
            return
        path = by_name.get(name)
        if path is None:
            raise FerryError(f"The guest kernel has no module {name}.")
        if path in ordered:
            return
        for needed in _needs(path):
            take(needed)
        ordered.append(path)

    for wanted in _WANTED_MODULES:
        take(wanted)
    return ordered


def _needs(module: Path) -> list[str]:
    """The `depends=` entry of its .modinfo section."""
    found = re.search(rb"\0depends=([^\0]*)\0", _uncompressed(module))
    names = found[1].decode() if found else ""
    return [name.replace("-", "_") for name in names.split(",") if name]


def _uncompressed(module: Path) -> bytes:
    raw = module.read_bytes()
    return lzma.decompress(raw) if module.suffix == ".xz" else raw


def _cpio(files: Iterable[tuple[str, bytes, int]]) -> bytes:
    """The "newc" format of the kernel's Documentation/driver-api/early-userspace."""
    entries: list[tuple[str, bytes, int]] = [
        (directory, b"", 0o040755) for directory in ("proc", "dev", "modules")
    ]
    entries += [(name, content, 0o100000 | mode) for name, content, mode in files]
    entries.append(("TRAILER!!!", b"", 0))
    archive = bytearray()
    for inode, (name, content, mode) in enumerate(entries, 1):
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        archive += os.fsencode(name) + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
