"""QEMU's command line as words: which word is an option, and what stands inside one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_SWITCHES = """
    h help version nographic snapshot S s daemonize no-reboot no-shutdown no-acpi no-hpet
    no-fd-bootchk no-user-config nouserconfig nodefaults enable-kvm full-screen usb
    win2k-hack portrait singlestep one-insn-per-tb preconfig only-migratable mem-prealloc
    old-param semihosting enable-sync-profile xen-attach xen-domid-restrict sdl curses
    no-quit no-frame alt-grab ctrl-grab audio-help enable-fips async-teardown perfmap
    jitdump
"""
_WITHOUT_VALUE = frozenset(_SWITCHES.split())
"""Options of QEMU 7.2 and 10.0 that are followed by no value."""
_FREE_TEXT = frozenset(("append", "prom-env"))
"""Options whose value may begin with a dash."""


@dataclass(frozen=True)
class Word:
    """One option with its value, or a positional word (the name is empty)."""

    name: str
    """Without the dashes."""
    value: str | None
    raw: tuple[str, ...]
    """The words as they stood in argv."""


def words(argv: Sequence[str]) -> Iterator[Word]:
    """The words after argv[0], as QEMU itself reads them (`--x` is `-x`)."""
    at = 1
    while at < len(argv):
        raw = argv[at]
        at += 1
        if not _is_option(raw):
            yield Word("", raw, (raw,))
            continue
        name = raw.removeprefix("-").removeprefix("-")
        # An option that is not known here may be a switch: it must not swallow the next one.
        takes = name not in _WITHOUT_VALUE and at < len(argv)
        if takes and (name in _FREE_TEXT or not _is_option(argv[at])):
            yield Word(name, argv[at], (raw, argv[at]))
            at += 1
        else:
            yield Word(name, None, (raw,))


@dataclass
class Settings:
    """The inside of a value: `first,key=value,...` or a JSON object.

    `head` is the bare first part (a type, an id, a path); the values of a JSON object are kept as
    they are, and read as text.
    """

    head: str
    pairs: dict[str, str]
    json: dict[str, object] | None = None
    head_key: str = ""
    """The key of the first part, where a JSON object names it (`type`, `qom-type`, `driver`)."""
    earlier: list[tuple[str, str]] = field(default_factory=list)
    """Pairs whose key came again later, as a list is written (`host-nodes=0,host-nodes=2`)."""

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Commas that are doubled stand for one; a bare key is `on`, as `nokey` is `off`."""
        if text.lstrip().startswith("{"):
            return cls._parse_json(text)
        parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
        head = "" if "=" in parts[0] else parts.pop(0)
        pairs: dict[str, str] = {}
        earlier: list[tuple[str, str]] = []
        for part in parts:
            key, equals, value = part.partition("=")
            if equals:
                if key in pairs:
                    earlier.append((key, pairs[key]))
                pairs[key] = value
            elif key in ("nowait", "noserver", "nodelay"):
                pairs[key.removeprefix("no")] = "off" if key != "nodelay" else "on"
            elif key:
                pairs[key] = "on"
        return cls(head, pairs, earlier=earlier)

    @classmethod
    def _parse_json(cls, text: str) -> Settings:
        try:
            read: object = json.loads(text)
        except ValueError:
            return cls(text, {})
        if not isinstance(read, dict):
            return cls(text, {})
        whole = {str(key): value for key, value in read.items()}
        head_key = next((k for k in ("type", "qom-type", "driver") if k in whole), "")
        pairs = {key: _as_text(value) for key, value in whole.items() if key != head_key}
        return cls(str(whole.get(head_key, "")), pairs, whole, head_key)

    def __str__(self) -> str:
        if self.json is not None:
            kept = {
                key: self.json[key] if _as_text(self.json.get(key)) == value else _as_json(value)
                for key, value in self.pairs.items()
            }
            first: dict[str, object] = {self.head_key: self.head} if self.head_key else {}
            return json.dumps(first | kept, separators=(",", ":"))
        pairs = [
            f"{key}={_escaped(value)}"
            for key, last in self.pairs.items()
            for value in (*(v for k, v in self.earlier if k == key), last)
        ]
        return ",".join([_escaped(self.head), *pairs] if self.head else pairs)

    def first(self, key: str) -> str:
        """The bare first part, or the value of the key that it stands for."""
        return self.head or self.pairs.get(key, "")

    def on(self, key: str) -> bool:
        """Whether a switch is on."""
        return self.pairs.get(key, "off") in ("on", "yes", "true", "y")


def guest_name(argv: Sequence[str]) -> str:
    """From `-name X` or `-name guest=X,...`; empty without one."""
    for word in words(argv):
        if word.name == "name" and word.value:
            return Settings.parse(word.value).first("guest")
    return ""


def qmp_sockets(argv: Sequence[str]) -> list[str]:
    """Paths of the unix sockets on which QMP is served, in the order of the command line."""
    chardevs: dict[str, str] = {}
    served: list[str | tuple[str]] = []
    for word in words(argv):
        if word.value is None:
            continue
        if word.name in ("qmp", "qmp-pretty"):
            path = unix_server(word.value)
            if path:
                served.append(path)
            elif word.value.startswith("chardev:"):
                served.append((word.value.removeprefix("chardev:"),))
        elif word.name == "chardev":
            settings = Settings.parse(word.value)
            if settings.head == "socket" and settings.on("server") and "path" in settings.pairs:
                chardevs[settings.pairs.get("id", "")] = settings.pairs["path"]
        elif word.name == "mon":
            settings = Settings.parse(word.value)
            if settings.pairs.get("mode") == "control":
                served.append((settings.first("chardev"),))
    paths = [chardevs.get(s[0], "") if isinstance(s, tuple) else s for s in served]
    return [path for path in paths if path]


def unix_server(text: str) -> str:
    """The path in `unix:PATH,server=on,...`; empty when it is no server on a unix socket."""
    if not text.startswith("unix:"):
        return ""
    settings = Settings.parse(text.removeprefix("unix:"))
    return settings.first("path") if settings.on("server") else ""


def _is_option(word: str) -> bool:
    return len(word) > 1 and word.startswith("-")


def _escaped(text: str) -> str:
    return text.replace(",", ",,")


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else json.dumps(value)


def _as_json(text: str) -> object:
    return {"on": True, "off": False}.get(text, text)
