"""The destination's command line, made from the source's.

Everything that is not known to collide or to be meaningless elsewhere stays as it was, unknown
options included: a wrong one ends the new QEMU at its start, before anything is touched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmferry.errors import Refused
from vmferry.guest.options import Settings, Word, words

QMP_NAME = "vmferry.qmp"
SOCKET_PATH_MAX_BYTES = 107
"""sun_path of unix(7), less the closing zero."""
SHARED_MEMORY = Path("/dev/shm")
_DROPPED = {
    "daemonize": "-daemonize is left out: vmferry watches the process itself",
    "loadvm": "-loadvm is left out: the state comes from the source",
}
_SILENTLY_DROPPED = ("incoming", "S")
_CHARACTER_OPTIONS = ("qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb")


@dataclass(frozen=True)
class Places:
    """Where the new guest's own things go."""

    directory: Path
    """Fresh, private, and writable for the guest's user."""
    taps: dict[str, str] = field(default_factory=dict)
    """Names of taps here: by their name at the source, or, for one that has none in the command
    line, by its netdev's id or its NIC's MAC in lower case."""
    machine: str = ""
    """The versioned machine type that an alias (`q35`) meant at the source."""


@dataclass(frozen=True)
class Rewritten:
    """A command line for the destination."""

    argv: list[str]
    changes: list[str]
    """What differs from the source's, a sentence each."""
    qmp: str
    """Path of vmferry's own QMP socket."""
    files: list[Path]
    """Files and sockets that the new QEMU makes and that are nobody else's."""


def rewrite(argv: Sequence[str], places: Places) -> Rewritten:
    """The command line for a guest that waits for an incoming move.

    Rewriting a rewritten one again changes paths, not its length. Refused for what cannot be
    started elsewhere.
    """
    return _Rewriting(list(argv), places).run()


class _Rewriting:
    """One pass over a command line."""

    def __init__(self, argv: list[str], places: Places) -> None:
        self._argv = argv
        self._places = places
        self._out: list[str] = argv[:1]
        self._changes: list[str] = []
        self._files: list[Path] = []
        self._numbers: dict[str, int] = {}
        self._macs = _macs(argv)
        self._persistent = _persistent_memory(argv)
        self._machine_seen = False

    def run(self) -> Rewritten:
        for word in words(self._argv):
            self._take(word)
        if self._places.machine and not self._machine_seen:
            self._out += ["-machine", self._places.machine]
            self._changes.append(f"the machine type is {self._places.machine}, as at the source")
        qmp = self._socket(QMP_NAME)
        address = Settings("", {"server": "on", "wait": "off"})
        self._out += ["-qmp", f"unix:{_comma(qmp)},{address}", "-incoming", "defer", "-S"]
        return Rewritten(self._out, self._changes, qmp, self._files)

    def _take(self, word: Word) -> None:
        name, value = word.name, word.value
        if name in _SILENTLY_DROPPED or (value is not None and _is_ours(name, value)):
            return
        if name in _DROPPED:
            self._changes.append(_DROPPED[name])
            return
        if name == "snapshot":
            raise Refused(
                "the guest runs with -snapshot: what it wrote is in a temporary file of its QEMU, "
                "so it cannot be moved"
            )
        if name == "add-fd":
            raise Refused(
                "the guest was started with -add-fd: its files were handed over as descriptors "
                "that cannot be opened elsewhere, so it cannot be moved"
            )
        if name == "drive" and value is not None and Settings.parse(value).on("snapshot"):
            raise Refused(
                "the guest has a -drive with snapshot=on: what it wrote there is in a temporary "
                "file of its QEMU, so it cannot be moved"
            )
        new = value if value is None else self._value(name, value)
        if new == value:
            self._out += word.raw
        else:
            assert new is not None
            self._out += [word.raw[0], new]

    def _value(self, name: str, value: str) -> str:
        if name in _CHARACTER_OPTIONS or (name == "vnc" and value.startswith("unix:")):
            return self._character(name, value)
        change = {
            "chardev": self._chardev,
            "pidfile": lambda _: str(self._file("pid")),
            "D": lambda _: str(self._file("qemu.log")),
            "netdev": self._netdev,
            "nic": self._netdev,
            "net": self._netdev,
            "object": self._object,
            "mem-path": lambda path: self._mem_path(path, "ram"),
            "machine": self._machine,
            "M": self._machine,
            "readconfig": self._readconfig,
        }.get(name)
        return value if change is None else change(value)

    def _readconfig(self, value: str) -> str:
        self._changes.append(f"-readconfig {value} is kept unread: it must be there too")
        return value

    # --- character devices --------------------------------------------------------------------

    def _character(self, option: str, value: str) -> str:
        kind, colon, rest = value.partition(":")
        prefix = ""
        if kind == "mon" and colon:
            prefix, (kind, colon, rest) = "mon:", rest.partition(":")
        if kind == "unix" and colon:
            settings = Settings.parse(rest)
            if option != "vnc" and not settings.on("server"):
                return value
            settings.head = self._socket(self._numbered(option, "sock"))
            settings.pairs.pop("path", None)
            self._changes.append(f"-{option} listens on {settings.head}")
            return f"{prefix}unix:{settings}"
        if kind == "file" and colon:
            settings = Settings.parse(rest)
            settings.head = str(self._file(self._numbered(option, "out")))
            self._changes.append(f"-{option} writes to {settings.head}")
            return f"{prefix}file:{settings}"
        return value

    def _chardev(self, value: str) -> str:
        settings = Settings.parse(value)
        pairs = settings.pairs
        if settings.head == "socket" and "fd" in pairs and not settings.on("server"):
            raise Refused(
                f"chardev {pairs.get('id')} is a connection that was handed over as a descriptor, "
                "which cannot be opened elsewhere, so the guest cannot be moved"
            )
        if settings.head == "socket" and settings.on("server"):
            if "path" in pairs or "fd" in pairs:
                pairs.pop("fd", None)
                pairs["path"] = self._socket(self._numbered("chardev", "sock"))
                pairs |= {"server": "on", "wait": "off"}
                self._changes.append(f"chardev {pairs.get('id')} listens on {pairs['path']}")
        elif settings.head == "file" and "path" in pairs:
            pairs["path"] = str(self._file(self._numbered("chardev", "out")))
            self._changes.append(f"chardev {pairs.get('id')} writes to {pairs['path']}")
        if "logfile" in pairs:
            pairs["logfile"] = str(self._file(self._numbered("chardev", "log")))
            self._changes.append(f"chardev {pairs.get('id')} is logged to {pairs['logfile']}")
        return value if Settings.parse(value) == settings else str(settings)

    # --- network ------------------------------------------------------------------------------

    def _netdev(self, value: str) -> str:
        settings = Settings.parse(value)
        pairs = settings.pairs
        if (settings.head or pairs.get("type", "")) != "tap" or "helper" in pairs:
            return value
        handed_over = "fd" in pairs or "fds" in pairs
        queues = max(len(pairs.get(key, "").split(":")) for key in ("fds", "vhostfds"))
        for key in ("fd", "fds", "vhostfd", "vhostfds"):
            pairs.pop(key, None)
        if queues > 1:
            pairs["queues"] = str(queues)
        tap = self._tap_of(pairs)
        if handed_over and not tap:
            raise Refused(
                f"the tap of netdev {pairs.get('id', '')} was handed over as a descriptor, and "
                "nothing says what it is to be called here"
            )
        if tap:
            pairs["ifname"] = tap
        pairs |= {"script": "no", "downscript": "no"}
        if Settings.parse(value) == settings:
            return value
        self._changes.append(
            f"tap {tap or 'of the next free name'} is made and joined to its bridge by vmferry, "
            "not by a script or a descriptor that was handed over"
        )
        return str(settings)

    def _tap_of(self, pairs: dict[str, str]) -> str:
        netdev = pairs.get("id", "")
        mac = pairs.get("mac", pairs.get("macaddr", self._macs.get(netdev, ""))).lower()
        taps, old = self._places.taps, pairs.get("ifname", "")
        return taps.get(old) or taps.get(netdev) or taps.get(mac) or old

    # --- memory and machine -------------------------------------------------------------------

    def _object(self, value: str) -> str:
        settings = Settings.parse(value)
        pairs = settings.pairs
        if settings.first("qom-type") != "memory-backend-file" or settings.on("readonly"):
            return value
        path = pairs.get("mem-path", "")
        if pairs.get("id") in self._persistent:
            raise Refused(
                f"memory {pairs.get('id')} is an NVDIMM on {path}, a disk in all but name, so the "
                "guest cannot be moved"
            )
        pairs["mem-path"] = self._mem_path(path, pairs.get("id", "ram"))
        return value if pairs["mem-path"] == path else str(settings)

    def _mem_path(self, path: str, block: str) -> str:
        # Never the same inode as the source's, and never an old file: QEMU keeps old contents.
        name = f"vmferry-{self._places.directory.name}-{re.sub(r'[^A-Za-z0-9_.-]', '_', block)}"
        old = Path(path)
        if "huge" in old.name:
            # A hugetlbfs mount itself: QEMU makes a file without a name in it.
            return path
        new = (old.parent if "huge" in old.parent.name else SHARED_MEMORY) / name
        self._files.append(new)
        self._changes.append(f"memory {block} is a new file, {new}")
        return str(new)

    def _machine(self, value: str) -> str:
        settings = Settings.parse(value)
        kind = settings.first("type")
        if not kind:
            return value
        self._machine_seen = True
        if not self._places.machine or kind == self._places.machine:
            return value
        if settings.head:
            settings.head = self._places.machine
        else:
            settings.pairs["type"] = self._places.machine
        self._changes.append(f"machine {kind} is {self._places.machine}, as at the source")
        return str(settings)

    # --- places -------------------------------------------------------------------------------

    def _numbered(self, stem: str, suffix: str) -> str:
        number = self._numbers[stem] = self._numbers.get(stem, 0) + 1
        return f"{stem}-{number}.{suffix}"

    def _file(self, name: str) -> Path:
        path = self._places.directory / name
        self._files.append(path)
        return path

    def _socket(self, name: str) -> str:
        path = str(self._file(name))
        if len(path.encode()) > SOCKET_PATH_MAX_BYTES:
            raise Refused(
                f"the path {path} is too long for a socket (at most {SOCKET_PATH_MAX_BYTES} "
                "bytes): give the daemon a shorter state directory"
            )
        return path


def _macs(argv: Sequence[str]) -> dict[str, str]:
    """MACs of -device by the netdev they use."""
    found: dict[str, str] = {}
    for word in words(argv):
        if word.name == "device" and word.value is not None:
            pairs = Settings.parse(word.value).pairs
            if "netdev" in pairs and "mac" in pairs:
                found[pairs["netdev"]] = pairs["mac"]
    return found


def _persistent_memory(argv: Sequence[str]) -> set[str]:
    """Memory backends that an NVDIMM keeps its contents in."""
    devices = [Settings.parse(w.value) for w in words(argv) if w.name == "device" and w.value]
    return {d.pairs.get("memdev", "") for d in devices if d.first("driver") == "nvdimm"}


def _is_ours(option: str, value: str) -> bool:
    """Whether an earlier move has added it."""
    if option != "qmp" or not value.startswith("unix:"):
        return False
    settings = Settings.parse(value.removeprefix("unix:"))
    return Path(settings.first("path")).name == QMP_NAME


def _comma(text: str) -> str:
    return text.replace(",", ",,")
