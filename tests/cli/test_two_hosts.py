"""Two daemons on one machine, and the commands that a user types."""

from __future__ import annotations

import json
import signal

import pytest
from tests.cli.host_processes import HostProcess, StartHost, command


def _paired(start_host: StartHost) -> tuple[HostProcess, HostProcess]:
    a, b = start_host("a"), start_host("b")
    token = a.run("invite").out.strip()
    paired = b.run("pair", token)
    assert (paired.code, paired.out) == (0, "b and a are paired.\n")
    return a, b


def test_hosts_pair_and_list_each_other(start_host: StartHost) -> None:
    a, b = _paired(start_host)
    for here, there in ((a, b), (b, a)):
        listing = json.loads(here.run("ls", "--json").out)
        assert [(peer["name"], peer["port"]) for peer in listing["peers"]] == [
            (there.name, there.port)
        ]
        assert f"{there.name}     127.0.0.1:{there.port}" in here.run("ls").out


def test_pairing_outlives_the_daemons(start_host: StartHost) -> None:
    a, b = _paired(start_host)
    assert a.end() == 0
    assert b.end(signal.SIGKILL) == -signal.SIGKILL
    # The socket that the killed one left is no hindrance; the port is its own again.
    a, b = start_host("a"), start_host("b", f"127.0.0.1:{b.port}")
    checked = a.run("check", "", "b")
    assert "host b:\n  ok      connection" in checked.out


def test_a_token_is_used_once(start_host: StartHost) -> None:
    a, b = start_host("a"), start_host("b")
    token = a.run("invite").out.strip()
    a.run("invite")
    assert b.run("pair", token).code == 0
    again = start_host("c").run("pair", token)
    assert again.code == 1
    assert again.is_one_sentence()
    assert "was used" in again.err


def test_a_wrong_token_is_refused(start_host: StartHost) -> None:
    a, b = start_host("a"), start_host("b")
    token = a.run("invite").out.strip()
    wrong = b.run("pair", token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB"))
    assert wrong.code == 1
    assert wrong.is_one_sentence()
    assert "does not know this token" in wrong.err
    assert json.loads(b.run("ls", "--json").out)["peers"] == []
    assert b.run("pair", "nonsense").is_one_sentence()


def test_an_unpaired_host_is_told_so(start_host: StartHost) -> None:
    a, b = _paired(start_host)
    assert b.run("unpair", "a").code == 0
    checked = a.run("check", "", "b")
    assert checked.code == 1
    assert "is a still paired there" in checked.out
    moved = b.run("move", "1", "a")
    assert moved.code == 1
    assert moved.is_one_sentence()
    assert "No host a is paired" in moved.err or "no host a is paired" in moved.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_in_order(start_host: StartHost, number: signal.Signals) -> None:
    a = start_host("a")
    assert (a.state / "control.sock").stat().st_mode & 0o777 == 0o600
    assert a.end(number) == 0
    assert not (a.state / "control.sock").exists()
    assert "Traceback" not in a.log.read_text()
    after = a.run("ls")
    assert after.code == 1
    assert after.is_one_sentence()
    assert "vmferry host" in after.err


def test_a_second_daemon_is_refused(start_host: StartHost) -> None:
    a = start_host("a")
    same_state = command("host", "--listen", "127.0.0.1:0", "--state", str(a.state))
    assert same_state.code == 1
    assert same_state.is_one_sentence()
    assert "runs already" in same_state.err
    other_state = a.state.with_name("other")
    same_port = command(
        "host", "--listen", f"127.0.0.1:{a.port}", "--state", str(other_state), "--name", "x"
    )
    assert same_port.code == 1
    assert same_port.is_one_sentence()
    assert "--listen" in same_port.err
    assert a.run("ls").code == 0


def test_a_move_of_no_guest_is_refused(start_host: StartHost) -> None:
    a, _ = _paired(start_host)
    moved = a.run("move", "no-such-guest", "b")
    assert moved.code == 1
    assert moved.is_one_sentence()
    assert moved.out == ""
    as_json = a.run("move", "no-such-guest", "b", "--json")
    report = json.loads(as_json.out)
    assert (report["outcome"], report["destination"]) == ("failed", "b")
    assert "no-such-guest" in report["error"]
    assert as_json.is_one_sentence()


def test_cancelling_nothing_is_refused(start_host: StartHost) -> None:
    cancelled = start_host("a").run("cancel", "g")
    assert cancelled.code == 1
    assert cancelled.is_one_sentence()
