"""The command line by itself: usage, sentences, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from tests.cli.host_processes import command

from vmferry.cli.move import move
from vmferry.cli.options import parse_duration
from vmferry.errors import Refused
from vmferry.strategies import METHODS


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["move"],
        ["move", "g"],
        ["move", "g", "h", "--strategy", "teleport"],
        ["move", "g", "h", "--no-such-option"],
        ["pair"],
        ["pair", "a", "b"],
    ],
)
def test_a_wrong_use_is_one_sentence(arguments: list[str]) -> None:
    outcome = command(*arguments)
    assert outcome.code == 2
    assert outcome.is_one_sentence()
    assert outcome.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["invite"],
        ["pair", "x"],
        ["cancel", "g"],
        ["move", "g", "h"],
        ["move", "g", "h", "--max-downtime", "soon"],
        ["check", "", "h"],
        ["host", "--listen", "nowhere"],
        ["host", "--listen", "127.0.0.1:0", "--name", "no good"],
        ["host", "--listen", "192.0.2.77:0", "--name", "a"],
    ],
)
def test_a_refusal_is_one_sentence(tmp_path: Path, arguments: list[str]) -> None:
    outcome = command(*arguments, state=tmp_path / "state")
    assert outcome.code == 1
    assert outcome.is_one_sentence()


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    listing = command("--help")
    assert listing.code == 0
    for name in ("host", "invite", "pair", "check", "ls", "move", "cancel"):
        assert f" {name} " in listing.out
        assert command(name, "--help").code == 0
    script = (
        "import sys, vmferry.cli.main as m\n"
        "try: m.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'vmferry._core', 'asyncio', 'msgspec', 'cryptography', 'pyroute2', 'qemu'}\n"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_strategy_can_be_chosen() -> None:
    assert set(get_args(get_type_hints(move)["strategy"])) == set(METHODS)


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("0.3s", 0.3), ("2min", 120), ("800us", 0.0008)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "ms", "-1s", "0ms", "1h", "1e3s", "nan s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(Refused, match="is not a duration"):
        parse_duration(text)


def test_check_says_each_thing_on_a_line(tmp_path: Path) -> None:
    checked = command("check", "no-such-guest", state=tmp_path)
    assert checked.code == 1
    assert "this host:\n" in checked.out
    assert "MISSING guest no-such-guest" in checked.out
    assert checked.err == ""
