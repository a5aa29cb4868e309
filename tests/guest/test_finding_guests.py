"""A guest is named by its name, its PID or its monitor's socket, and by nothing that looks so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vmferry.errors import GuestError, Refused
from vmferry.guest.process import find, find_all, read_process

from .firmware_guests import Guests

SOCKET = "path=m.sock,server=on,wait=off"


def test_by_name_pid_and_path(guests: Guests) -> None:
    guest = guests.start("-S")
    assert guest.name == f"subject-{guests.directory.name}"
    assert guest.qmp == f"{guest.cwd}/m.sock"
    assert guest.exe == str(guests.qemu.path.resolve())
    assert find(guest.name) == guest
    assert find(str(guest.pid)) == guest
    assert find(guest.qmp) == guest
    assert guest in find_all()


def test_a_relative_path_counts_from_here(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = guests.start("-S")
    monkeypatch.chdir(guest.cwd)
    assert find("m.sock") == guest


@pytest.mark.parametrize(
    "monitor",
    [
        ("-qmp", "unix:m.sock,server,nowait"),
        ("--qmp", "unix:path=m.sock,server=on,wait=off"),
        (
            "-chardev",
            "socket,id=c,path=m.sock,server=on,wait=off",
            "-mon",
            "chardev=c,mode=control",
        ),
        ("-chardev", f"socket,id=c,{SOCKET}", "-qmp", "chardev:c"),
    ],
)
def test_every_way_to_write_a_monitor(guests: Guests, monitor: tuple[str, ...]) -> None:
    guest = guests.start("-S", monitor=monitor)
    assert find(guest.name).qmp == f"{guest.cwd}/m.sock"


def test_of_several_monitors_the_last(guests: Guests) -> None:
    first, last = "unix:a.sock,server=on,wait=off", "unix:b.sock,server=on,wait=off"
    guest = guests.start("-S", monitor=("-qmp", first, "-qmp", last))
    assert find(guest.name).qmp == f"{guest.cwd}/b.sock"
    assert find(f"{guest.cwd}/a.sock").qmp == f"{guest.cwd}/a.sock"


def test_two_of_one_name_are_told_apart_by_pid(guests: Guests) -> None:
    name = f"twin-{guests.directory.name}"
    one, other = guests.start("-S", name=name), guests.start("-S", name=f"guest={name}")
    with pytest.raises(Refused, match=f"several guests are called {name}") as refused:
        find(name)
    assert f"{one.pid}, {other.pid}" in str(refused.value)
    assert find(str(other.pid)) == other


def test_no_such_guest_names_those_there_are(guests: Guests) -> None:
    guest = guests.start("-S")
    with pytest.raises(Refused, match="no guest is called nobody") as refused:
        find("nobody")
    assert f"{guest.name} (pid {guest.pid})" in str(refused.value)
    with pytest.raises(Refused, match="there is no socket /nowhere/none"):
        find("/nowhere/none")


def test_a_guest_without_a_monitor_is_told_what_it_needs(guests: Guests) -> None:
    guests.spawn("-S", name="mute")
    with pytest.raises(Refused, match="has no QMP socket"):
        find("mute")


def test_a_wrapper_is_no_guest(guests: Guests) -> None:
    guest = guests.start("-S", name="wrapped")
    # Like sudo: the guest's command line stands in another process's.
    program = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        [*program, *guest.argv], cwd=guest.cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as wrapper:
        assert wrapper.stdout is not None
        wrapper.stdout.readline()
        assert find("wrapped") == guest
        assert find(guest.qmp) == guest
        with pytest.raises(Refused, match="does not serve it"):
            read_process(wrapper.pid)


def test_a_process_that_has_gone() -> None:
    with subprocess.Popen(["true"]) as child:
        pid = child.pid
        child.wait()
    with pytest.raises(GuestError, match="gone"):
        read_process(pid)


def test_a_stranger_may_not_look(guests: Guests) -> None:
    import os

    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    guest = guests.start("-S")
    script = "import os, sys\nos.setgid(65534); os.setuid(65534)\n" + (
        "from vmferry.errors import Refused\n"
        "try: process.find(sys.argv[1])\n"
        "except Refused as e: print(e)\n"
    )
    script = "from vmferry.guest import process\n" + script
    for reference in (str(guest.pid), guest.name, guest.qmp):
        done = subprocess.run(
            [sys.executable, "-c", script, reference],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        )
        assert "may be looked at" in done.stdout or "may not be looked at" in done.stdout
