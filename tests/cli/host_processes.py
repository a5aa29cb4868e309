"""Real daemons and real commands, as a user runs them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, "-m", "vmferry.cli.main"]
COMMAND_LIMIT_S = 60


@dataclass(frozen=True)
class Outcome:
    """How one command ended."""

    code: int
    out: str
    err: str

    def is_one_sentence(self) -> bool:
        """Whether stderr holds one line, of vmferry's own."""
        lines = self.err.strip().splitlines()
        return (
            len(lines) == 1 and lines[0].startswith("vmferry: ") and lines[0].endswith((".", "?"))
        )


def command(*arguments: str, state: Path | None = None) -> Outcome:
    """Runs one command to its end."""
    environment = {key: value for key, value in os.environ.items() if key != "VMFERRY_STATE"}
    if state is not None:
        environment["VMFERRY_STATE"] = str(state)
    done = subprocess.run(
        [*COMMAND, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class HostProcess:
    """A daemon as a process of its own."""

    def __init__(self, state: Path, name: str, listen: str = "127.0.0.1:0") -> None:
        self.state = state
        self.name = name
        self.log = state.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "host", "--listen", listen, "--state", str(state), "--name", name],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        # The line comes when both sockets listen; the end of the stream when it could not start.
        self.line = self.process.stdout.readline()
        port = re.search(r":(\d+),", self.line)
        self.port = int(port[1]) if port else 0

    def run(self, *arguments: str) -> Outcome:
        """A command that talks to this daemon."""
        return command(*arguments, state=self.state)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and waits for the end."""
        self.process.send_signal(number)
        return self.process.wait(COMMAND_LIMIT_S)


StartHost = Callable[..., HostProcess]
