"""Finding a guest: a process that serves QMP on a unix socket named in its command line."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vmferry.errors import GuestError, Refused
from vmferry.guest.monitor import peer_pid
from vmferry.guest.options import guest_name, qmp_sockets


@dataclass(frozen=True)
class GuestProcess:
    """A guest as the kernel shows it."""

    pid: int
    start_time: int
    """Field 22 of /proc/PID/stat: with the pid it names one process for ever."""
    name: str
    """From `-name`; `pid-N` without one."""
    argv: list[str]
    exe: str
    cwd: str
    uid: int
    gid: int
    qmp: str
    """Path of the monitor's unix socket, absolute; of several the last one."""


def find(reference: str) -> GuestProcess:
    """By path of a QMP socket, PID or name. Refused with the sentence for the user."""
    if "/" in reference or Path(reference).is_socket():
        return _find_by_path(reference)
    if reference.isdecimal() and Path("/proc", reference).is_dir():
        try:
            return read_process(int(reference))
        except (GuestError, Refused):
            named = [p for p in find_all() if p.name == reference]
            if not named:
                raise
            return _only(named, reference)
    return _only([p for p in find_all() if p.name == reference], reference)


def find_all() -> list[GuestProcess]:
    """Every guest of this host that may be looked at, by ascending PID.

    A host is a network namespace: what lies in another one is named by PID or by its socket.
    """
    found: list[GuestProcess] = []
    here = Path("/proc/self/ns/net").stat().st_ino
    for pid in _pids():
        try:
            if Path(f"/proc/{pid}/ns/net").stat().st_ino == here:
                found.append(read_process(pid))
        except OSError:
            continue
        except (GuestError, Refused):
            continue
    return found


def read_process(pid: int) -> GuestProcess:
    """GuestError when there is no such process (any more), Refused when it is no guest or may not
    be looked at."""
    proc = Path("/proc", str(pid))
    try:
        argv = _argv(pid)
        if not argv:
            raise GuestError(f"process {pid} is gone")
        name = guest_name(argv) or f"pid-{pid}"
        sockets = qmp_sockets(argv)
        if not sockets:
            raise Refused(
                f"process {pid} has no QMP socket in its command line; a guest needs one, for "
                "example -qmp unix:/run/NAME.qmp,server=on,wait=off"
            )
        cwd = str((proc / "cwd").readlink())
        exe = str((proc / "exe").readlink()).removesuffix(" (deleted)")
        qmp = _last_served(pid, sockets)
        status = (proc / "status").read_text()
        start_time = start_time_of(pid)
    except PermissionError as error:
        raise Refused(
            f"process {pid} may not be looked at: run vmferry as root or as its owner"
        ) from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GuestError(f"process {pid} is gone") from error
    if qmp is None:
        raise Refused(
            f"process {pid} names a QMP socket in its command line but does not serve it "
            "(a wrapper around a guest, or one that has not started yet)"
        )
    return GuestProcess(
        pid=pid,
        start_time=start_time,
        name=name,
        argv=argv,
        exe=exe,
        cwd=cwd,
        uid=_identity(status, "Uid:"),
        gid=_identity(status, "Gid:"),
        qmp=os.path.normpath(Path(cwd, qmp)),
    )


def _find_by_path(reference: str) -> GuestProcess:
    wanted = os.path.realpath(reference)
    hidden = False
    found: list[GuestProcess] = []
    for pid in _pids():
        try:
            argv = _argv(pid)
            sockets = qmp_sockets(argv)
            if not sockets:
                continue
            cwd = Path("/proc", str(pid), "cwd").readlink()
            if all(os.path.realpath(Path(cwd, path)) != wanted for path in sockets):
                continue
            process = read_process(pid)
        except PermissionError:
            hidden = True
            continue
        except (GuestError, Refused, OSError):
            continue
        # The socket that was named is the one that is free for us.
        found.append(replace(process, qmp=wanted))
    if len(found) > 1:
        # The path of the older ones was taken over: only the newest can be reached through it.
        server = _server_of(wanted)
        found = [process for process in found if process.pid == server]
    if found:
        return found[0]
    if hidden:
        raise Refused(
            f"no guest with the QMP socket {reference} may be looked at: run vmferry as root or as "
            "the guest's owner"
        )
    if not Path(wanted).exists():
        raise Refused(f"there is no socket {reference}; {_those_there_are()}")
    raise Refused(
        f"no running guest has {reference} as a QMP socket in its command line; "
        f"{_those_there_are()}"
    )


def _only(candidates: list[GuestProcess], name: str) -> GuestProcess:
    match candidates:
        case [one]:
            return one
        case []:
            pids = [pid for pid in _pids() if _safe_name(pid) == name]
            for pid in pids:
                read_process(pid)
            raise Refused(f"no guest is called {name}; {_those_there_are()}")
    pids = ", ".join(str(p.pid) for p in candidates)
    raise Refused(f"several guests are called {name} (pids {pids}): name one by its pid")


def _those_there_are() -> str:
    guests = find_all()
    if not guests:
        return "no guest with a QMP socket runs here"
    return "the guests here are " + ", ".join(f"{g.name} (pid {g.pid})" for g in guests)


def _pids() -> Iterator[int]:
    yield from sorted(int(e.name) for e in Path("/proc").iterdir() if e.name.isdecimal())


def _argv(pid: int) -> list[str]:
    raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [os.fsdecode(word) for word in raw.removesuffix(b"\0").split(b"\0")] if raw else []


def _safe_name(pid: int) -> str:
    try:
        return guest_name(_argv(pid))
    except OSError:
        return ""


def _last_served(pid: int, sockets: list[str]) -> str | None:
    """The last of these paths on which this very process listens.

    A wrapper has the guest's command line in its own, and the keeper of a guest shares the guest's
    memory and so its command line; neither holds the socket.
    """
    listening: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        # Flag 0x10000 is __SO_ACCEPTCON: it listens.
        if len(fields) == 8 and int(fields[3], 16) & 0x10000:
            listening[f"socket:[{fields[6]}]"] = fields[7]
    held: set[str] = set()
    for entry in Path("/proc", str(pid), "fd").iterdir():
        try:
            held.add(listening[str(entry.readlink())])
        except (KeyError, FileNotFoundError):
            continue
    return next((path for path in reversed(sockets) if path in held), None)


def _server_of(path: str) -> int:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except OSError:
            return 0
        return peer_pid(probe)


def start_time_of(pid: int) -> int:
    """Field 22 of /proc/PID/stat. OSError when there is no such process."""
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return int(stat.rpartition(")")[2].split()[19])


def _identity(status: str, key: str) -> int:
    line = next(line for line in status.splitlines() if line.startswith(key))
    return int(line.split()[2])
