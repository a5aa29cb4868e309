"""Puts into the cache, or on the system, what the lab needs and does not find."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from vmferry.errors import FerryError
from vmferry.lab import qemus
from vmferry.lab.apt import Apt
from vmferry.lab.cache import cache_dir, cache_lock

QEMU_PACKAGES = [
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "seabios",
    "ipxe-qemu",
]
_TOOLS = {"gcc": "gcc", "qemu-img": "qemu-utils", "dpkg-deb": "dpkg"}
_STATIC_LIBC = Path("/usr/lib/x86_64-linux-gnu/libc.a")
_SECOND_QEMU = {
    # Debian release -> QEMU's major versions there and the archive that has each.
    "bookworm": {7: "bookworm", 10: "bookworm-backports"},
}


def fetch(say: Callable[[str], None] = lambda _: None) -> None:
    """Fetches whatever is missing; quick when all is there. FerryError names what failed.

    `say` is told what is under way, a line each.
    """
    with cache_lock():
        apt = Apt(cache_dir() / "apt")
        _fetch_tools(apt, say)
        if kernel_in_cache() is None:
            metapackage = "linux-image-cloud-amd64"
            say("downloading a Debian cloud kernel")
            names = [n for n in apt.dependencies(metapackage) if n.startswith("linux-image-")]
            if not names:
                raise FerryError(f"{metapackage} of {apt.codename} names no kernel.")
            apt.unpack(names[:1], cache_dir() / "kernel" / names[0].removeprefix("linux-image-"))
        _fetch_second_qemu(apt, say)


def kernel_in_cache() -> Path | None:
    """The newest unpacked kernel package (with boot/ and its modules), if there is one."""
    found = sorted(cache_dir().glob("kernel/*/boot/vmlinuz-*"), key=lambda p: p.stat().st_mtime)
    return found[-1].parents[1] if found else None


def _fetch_tools(apt: Apt, say: Callable[[str], None]) -> None:
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    if not _STATIC_LIBC.exists():
        missing.append("libc6-dev")
    if shutil.which(qemus.SYSTEM_BINARY) is None:
        missing += ["qemu-system-x86", "seabios", "ipxe-qemu"]
    if missing:
        say(f"installing {', '.join(missing)}")
        apt.install(missing)


def _fetch_second_qemu(apt: Apt, say: Callable[[str], None]) -> None:
    """Beside the system's QEMU the other one that this Debian release offers."""
    offered = _SECOND_QEMU.get(apt.codename, {})
    there = {binary.version[0] for binary in qemus.available()}
    for major, archive in offered.items():
        if major in there:
            continue
        tree = cache_dir() / "qemu" / str(major)
        say(f"downloading QEMU {major} from {archive}")
        apt.unpack(QEMU_PACKAGES, tree, release=archive)
        program = tree / "usr/bin" / qemus.SYSTEM_BINARY
        if subprocess.run([program, "--version"], capture_output=True, check=False).returncode:
            libraries = [n for n in apt.dependencies("qemu-system-x86") if n.startswith("lib")]
            say("installing the libraries of QEMU")
            apt.install(libraries)
