"""The one probe of a machine: what is there for vmferry, and what to do where it is missing.

`vmferry check` prints it, and tests skip by it. Everything is tried, not guessed from versions,
and nothing is left behind.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TRIAL_LIMIT_S = 20.0
"""For one trial program to end."""

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_USERFAULTFD_IOC_NEW = 0xAA00
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
_UFFD_FEATURE_WP_ASYNC = 1 << 15
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_CAP_SYS_PTRACE = 19


@dataclass(frozen=True)
class Capability:
    """One thing a machine has or lacks; `remedy` says what to do where it is not `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


OPTIONAL = frozenset(
    {
        "userfaultfd-device",
        "namespaces",
        "bridge",
        "tap",
        "shaping",
        "kvm",
        "kvm-hardware",
        "hugepages",
        "cgroup",
    }
)
"""These widen what can be moved or tested; without any of the others no real guest can be moved."""


def probe() -> list[Capability]:
    """All capabilities of this machine, in the order in which a user wants to read them."""
    return [trial() for trial in _TRIALS]


def _root() -> Capability:
    if os.geteuid() == 0:
        return Capability("root", True, "runs as root")
    return Capability(
        "root",
        False,
        f"runs as user {os.geteuid()}",
        "run as root; the simulator and a synthetic guest of your own work without",
    )


def _kernel() -> Capability:
    release = platform.release()
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    return Capability(
        "kernel",
        version >= (6, 7),
        f"Linux {release}",
        "take a kernel of 6.7 or later: PAGEMAP_SCAN came with it",
    )


def _open_userfaultfd() -> int:
    """A userfaultfd for kernel-mode faults, too. OSError."""
    number = _SYS_USERFAULTFD.get(platform.machine())
    if number is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
        if descriptor >= 0:
            return descriptor
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(device)


def _userfaultfd() -> Capability:
    name = "userfaultfd"
    try:
        os.close(_open_userfaultfd())
    except OSError as error:
        return Capability(
            name,
            False,
            f"refused ({error.strerror})",
            "run as root, or set sysctl vm.unprivileged_userfaultfd=1",
        )
    return Capability(name, True, "serves faults of user and kernel mode")


def _userfaultfd_device() -> Capability:
    name = "userfaultfd-device"
    try:
        os.close(os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = "a kernel of 6.1 or later has it; only guests without root's rights need it"
        return Capability(name, False, f"/dev/userfaultfd: {error.strerror}", remedy)
    return Capability(name, True, "/dev/userfaultfd opens")


def _write_tracking() -> Capability:
    name = "write-tracking"
    remedy = "take a kernel of 6.7 or later with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP"
    try:
        descriptor = _open_userfaultfd()
    except OSError as error:
        return Capability(name, False, f"no userfaultfd ({error.strerror})", remedy)
    try:
        request = struct.pack("QQQ", _UFFD_API, 0, 0)
        _, features, _ = struct.unpack("QQQ", fcntl.ioctl(descriptor, _UFFDIO_API, request))
    except OSError as error:
        return Capability(name, False, f"UFFDIO_API: {error.strerror}", remedy)
    finally:
        os.close(descriptor)
    ok = bool(features & _UFFD_FEATURE_WP_ASYNC)
    words = "is there" if ok else "is missing"
    return Capability(name, ok, f"asynchronous write protection {words}", remedy)


def _ptrace() -> Capability:
    name = "ptrace"
    status = Path("/proc/self/status").read_text()
    effective = dict(re.findall(r"^(\w+):\s*(\w+)$", status, re.M))["CapEff"]
    try:
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip()
    except OSError:
        scope = "0"
    if scope == "3":
        return Capability(name, False, "kernel.yama.ptrace_scope is 3", "set it to 1 and reboot")
    ok = bool(int(effective, 16) >> _CAP_SYS_PTRACE & 1)
    words = "may" if ok else "may not"
    detail = f"{words} trace other users' processes (yama ptrace_scope {scope})"
    return Capability(name, ok, detail, "run as root, or give CAP_SYS_PTRACE")


def _attach() -> Capability:
    """The whole way into a process of another program: userfaultfd by ptrace, arm, scan, undo."""
    name = "attach"
    try:
        from vmferry import _core
    except ImportError as error:
        remedy = "build the core: `make build`"
        return Capability(name, False, f"the compiled core is missing ({error})", remedy)
    remedy = "see the lines on ptrace, userfaultfd and kernel above"
    try:
        with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as sleeper:
            try:
                block = _core.Block("probe", *_wait_for_heap(sleeper.pid))
                descriptor, _ = _core.inject_userfaultfd(
                    sleeper.pid, user_mode_only=False, keep_open=False
                )
                tracker = _core.Tracker(_core.Memory(sleeper.pid, [block]), descriptor)
                pages = len(tracker.scan())
                tracker.close()
            finally:
                sleeper.kill()
    except (OSError, _core.CoreError) as error:
        return Capability(name, False, str(error), remedy)
    detail = f"a process's writes were tracked from outside ({pages} pages, tried)"
    return Capability(name, pages > 0, detail, remedy)


def _wait_for_heap(pid: int) -> tuple[int, int]:
    """(address, length) of the heap of a process that has just been started. OSError."""
    end = time.monotonic() + TRIAL_LIMIT_S
    while time.monotonic() < end:
        # Before its exec is over the maps are those of this program.
        if Path(f"/proc/{pid}/comm").read_text().strip() == "sleep":
            maps = Path(f"/proc/{pid}/maps").read_text()
            if found := re.search(r"^(\w+)-(\w+) rw.*\[heap\]$", maps, re.MULTILINE):
                start, stop = int(found[1], 16), int(found[2], 16)
                return start, stop - start
        time.sleep(0.001)
    raise OSError("the trial program did not start")


def _in_namespace(name: str, script: str, works: str, remedy: str) -> Capability:
    """Runs a script in a network namespace that goes away with it."""
    for program, package in (("unshare", "util-linux"), ("ip", "iproute2"), ("tc", "iproute2")):
        if shutil.which(program) is None:
            detail = f"the program {program} is missing"
            return Capability(name, False, detail, f"install {package}")
    try:
        done = subprocess.run(
            ["unshare", "--net", "sh", "-ec", script],
            capture_output=True,
            text=True,
            timeout=TRIAL_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Capability(name, False, str(error), remedy)
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["refused"])[-1]
        return Capability(name, False, words, remedy)
    return Capability(name, True, works)


def _namespaces() -> Capability:
    return _in_namespace(
        "namespaces",
        "ip link set lo up",
        "network namespaces can be made",
        "run as root, outside a container that forbids them; the lab needs them",
    )


def _bridge() -> Capability:
    return _in_namespace(
        "bridge",
        "ip link add br0 type bridge; ip link add v0 type veth peer name v1; "
        "ip link set v0 master br0",
        "bridges and veth pairs can be made",
        "load the kernel modules bridge and veth",
    )


def _tap() -> Capability:
    return _in_namespace(
        "tap",
        "ip tuntap add dev vft0 mode tap",
        "taps can be made",
        "load the kernel module tun, and give access to /dev/net/tun",
    )


def _shaping() -> Capability:
    return _in_namespace(
        "shaping",
        "ip link set lo up; tc qdisc add dev lo root tbf rate 1gbit burst 128k latency 50ms",
        "links can be shaped (tc tbf)",
        "load the kernel module sch_tbf; without it benches run unshaped only",
    )


def _kvm() -> Capability:
    name = "kvm"
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        remedy = "switch virtualisation on; without it guests run under TCG"
        return Capability(name, False, f"/dev/kvm: {error.strerror}", remedy)
    try:
        version = fcntl.ioctl(device, _KVM_GET_API_VERSION, 0)
        os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
    except OSError as error:
        remedy = "another hypervisor may hold it; without it guests run under TCG"
        return Capability(name, False, f"/dev/kvm makes no machine ({error.strerror})", remedy)
    finally:
        os.close(device)
    return Capability(name, True, f"/dev/kvm makes machines (API {version})")


def _kvm_hardware() -> Capability:
    name = "kvm-hardware"
    flags = re.search(r"^(flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    words = flags[2].split() if flags else []
    has = [flag for flag in ("vmx", "svm") if flag in words]
    ok = bool(has) or platform.machine() == "aarch64"
    detail = f"the CPU has {has[0]}" if has else "the CPU shows neither vmx nor svm"
    remedy = "switch (nested) virtualisation on; stock kernels boot under TCG only here"
    return Capability(name, ok, detail, remedy)


def qemu_binaries() -> dict[str, str]:
    """Paths of the QEMU system emulators in PATH for this machine, and their versions."""
    found: dict[str, str] = {}
    names = {f"qemu-system-{platform.machine()}", "qemu-kvm"}
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    candidates = [folder / name for folder in folders for name in sorted(names)]
    for path in [*candidates, Path("/usr/libexec/qemu-kvm")]:
        if not os.access(path, os.X_OK) or str(path.resolve()) in found:
            continue
        try:
            text = subprocess.run(
                [path, "--version"],
                capture_output=True,
                text=True,
                timeout=TRIAL_LIMIT_S,
                check=False,
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue
        if version := re.search(r"version (\d+\.\d+\.\d+)", text):
            found[str(path.resolve())] = version[1]
    return found


def _qemu() -> Capability:
    found = qemu_binaries()
    detail = ", ".join(f"{path} {version}" for path, version in found.items())
    package = "qemu-system-x86" if platform.machine() == "x86_64" else "qemu-system-arm"
    return Capability("qemu", bool(found), detail or "none in PATH", f"install {package}")


def _hugepages() -> Capability:
    counts = []
    for folder in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*")):
        total = int((folder / "nr_hugepages").read_text())
        free = int((folder / "free_hugepages").read_text())
        counts.append((int(folder.name.removeprefix("hugepages-").removesuffix("kB")), free, total))
    detail = ", ".join(f"{free} of {total} free at {size} KiB" for size, free, total in counts)
    remedy = "set sysctl vm.nr_hugepages; only guests on hugetlbfs need them"
    ok = any(free for _, free, _ in counts)
    return Capability("hugepages", ok, detail or "the kernel has none", remedy)


def _cgroup() -> Capability:
    version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
    remedy = "version 1 works; a manager that kills a guest's whole group also ends its keeper"
    return Capability("cgroup", version == 2, f"version {version}", remedy)


def _memory() -> Capability:
    text = Path("/proc/meminfo").read_text()
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}
    total, free = kib["MemTotal"] >> 10, kib["MemAvailable"] >> 10
    detail = f"{free} MiB available of {total} MiB, swap {kib.get('SwapTotal', 0) >> 10} MiB"
    return Capability("memory", free >= 1024, detail, "free some: a guest needs its size here")


_TRIALS: list[Callable[[], Capability]] = [
    _root,
    _kernel,
    _userfaultfd,
    _userfaultfd_device,
    _write_tracking,
    _ptrace,
    _attach,
    _namespaces,
    _bridge,
    _tap,
    _shaping,
    _kvm,
    _kvm_hardware,
    _qemu,
    _hugepages,
    _cgroup,
    _memory,
]
