"""Two hosts, one guest under load and its outside client, on which faults are played."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from tests.faults import traces
from tests.faults.witness import Witness

from vmferry.errors import FerryError
from vmferry.guest.process import GuestProcess
from vmferry.host.channel import PEER_SILENCE_S
from vmferry.lab.client import OutsideClient
from vmferry.lab.guests import GuestCounts, LabGuest, Load
from vmferry.lab.hosts import LabHost, host_name
from vmferry.lab.lab import Lab, other
from vmferry.lab.network import HOSTS, HostName
from vmferry.report.records import Report

LIMIT_S = 40.0
"""For any state to be reached: the longest is a cut link noticed and a verdict delivered."""
LOOK_S = 0.02
SMALL = Load(area_mib=32, megabytes_per_s=20)


@dataclass
class Stage:
    """One lab for many rows: a row leaves the guest running, at either host."""

    lab: Lab
    guest: LabGuest
    client: OutsideClient
    holds: dict[HostName, str] = field(default_factory=dict)

    @classmethod
    async def open(cls, lab: Lab) -> Stage:
        """Boots the guest; it has a second monitor, which vmferry leaves free."""
        await lab.start_hosts()
        extra = ("-qmp", f"unix:{lab.directory}/second.qmp,server=on,wait=off")
        guest = await lab.boot_guest(load=SMALL, memory_mib=256, extra=extra)
        return cls(lab, guest, await lab.start_client(guest), dict.fromkeys(HOSTS, ""))

    async def hold(self, steps: str) -> None:
        """Sees to it that both daemons run and hold these steps, `side:step[,side:step...]`."""
        here, _ = self.guest.locate()
        for host in HOSTS:
            side = "source" if host == here else "destination"
            mine = ",".join(s for s in steps.split(",") if s.startswith(side + ":"))
            daemon = self.lab.hosts[host]
            for held in daemon.state_dir.glob("held-*"):
                held.unlink()
            if daemon.process.returncode is None and self.holds[host] == mine:
                continue
            await daemon.end()
            await self.lab.start_host(host, {"VMFERRY_HOLD": mine})
            self.holds[host] = mine

    async def restart(self, host: HostName) -> None:
        """Starts a killed daemon anew, without holds."""
        await self.lab.start_host(host, {"VMFERRY_HOLD": ""})
        self.holds[host] = ""

    @asynccontextmanager
    async def attempt(self, strategy: str = "pre-copy", hold: str = "") -> AsyncGenerator[Attempt]:
        """A move that is under way; with `hold`, once all these steps are reached."""
        await self.hold(hold)
        here, process = self.guest.locate()
        there = other(here)
        before = await self.guest.counts()
        left = set(_arrivals(self.lab.hosts[there]))
        async with Witness(self.lab.topology, self.guest.name) as witness:
            command = await self.lab.hosts[here].begin(
                *("move", self.guest.name, host_name(there), "--strategy", strategy, "--json"),
            )
            attempt = Attempt(self, here, there, process, before, left, witness, command)
            try:
                for step in hold.split(",") if hold else ():
                    await attempt.held(step)
                yield attempt
            finally:
                with contextlib.suppress(ProcessLookupError):
                    command.kill()
                await command.wait()
                await asyncio.to_thread(self.lab.topology.cut, restore=True)

    @contextmanager
    def without_its_disk(self) -> Generator[None]:
        """Takes the disk's name away: whoever opens it anew does not find it."""
        disk = self.guest.spec.disk
        hidden = disk.rename(disk.with_suffix(".hidden"))
        try:
            yield
        finally:
            hidden.rename(disk)

    async def move(self, strategy: str = "pre-copy") -> Report:
        """An ordinary move to the other host, with every page compared."""
        await self.hold("")
        outcome = await self.lab.move(self.guest, strategy, verify=True)
        verification = outcome.report.verification
        assert verification is not None
        assert verification.pages_differing == 0
        return outcome.report


@dataclass
class Attempt:
    """One move that something happens to."""

    stage: Stage
    here: HostName
    there: HostName
    process: GuestProcess
    """The source's QEMU."""
    before: GuestCounts
    left: set[Path]
    """What was in the destination's directory before."""
    witness: Witness
    command: asyncio.subprocess.Process
    said: str = ""

    def __post_init__(self) -> None:
        self._log_begin = len(self.destination.log.read_text())

    @property
    def source(self) -> LabHost:
        return self.stage.lab.hosts[self.here]

    @property
    def destination(self) -> LabHost:
        return self.stage.lab.hosts[self.there]

    def arriving(self) -> list[int]:
        """The guest's processes at the destination."""
        name, topology = self.stage.guest.name, self.stage.lab.topology
        return traces.processes_called(topology, self.there, name)

    async def held(self, step: str) -> None:
        """Waits until a step, `side:step`, is held."""
        path = self._held(step)

        async def problems() -> list[str]:
            if path.exists():
                return []
            if self.command.returncode is not None:
                raise AssertionError(f"the move ended before {step}: {await self.end()}")
            return [f"{step} is not reached"]

        await _until(problems)

    def release(self, step: str) -> None:
        """Lets a held step go on; without effect when its daemon is gone."""
        self._held(step).unlink(missing_ok=True)

    async def cut(self) -> None:
        """Cuts the migration link."""
        await asyncio.to_thread(self.stage.lab.topology.cut)

    async def restore(self) -> None:
        """Mends it."""
        await asyncio.to_thread(self.stage.lab.topology.cut, restore=True)

    async def kill_arriving(self) -> None:
        """Kills the QEMU that waits at the destination."""
        (pid,) = self.arriving()
        os.kill(pid, signal.SIGKILL)

    async def arrival_is_over(self) -> None:
        """Returns when the destination's daemon has given the guest up and said so."""

        async def problems() -> list[str]:
            said = self.destination.log.read_text()[self._log_begin :]
            over = f"The arrival of guest {self.process.name} from {self.source.name} is over."
            return [] if over in said else ["the destination has not given up"]

        await _until(problems)

    async def some_bytes_have_gone(self, count: int) -> None:
        """Returns when the pages are well under way."""
        gone = self.stage.lab.topology.migration_bytes
        begin = await asyncio.to_thread(gone)

        async def problems() -> list[str]:
            left = begin + count - await asyncio.to_thread(gone)
            return [f"{left} bytes are still to go"] if left > 0 else []

        await _until(problems)

    async def phase(self, wanted: str) -> None:
        """Returns when the source's daemon says that the move is in this phase."""

        async def problems() -> list[str]:
            again = await self.source.run("move", self.process.name, self.destination.name)
            return [] if f"({wanted})" in again.err else [again.err]

        await _until(problems)

    async def runs_at_the_destination(self) -> None:
        """Returns when the QEMU there runs, whatever is left elsewhere."""

        async def problems() -> list[str]:
            return [] if await self.witness.look() == self.arriving() else ["it does not run there"]

        await _until(problems)

    async def silence(self) -> None:
        """Long enough that both ends of a cut connection have noticed it."""
        await asyncio.sleep(PEER_SILENCE_S + 2)

    def interrupt(self) -> None:
        """Ctrl-C at `vmferry move`."""
        self.command.send_signal(signal.SIGINT)

    async def end(self) -> Report | None:
        """How `vmferry move` ended; None when it printed no report (`said` has its words)."""
        async with asyncio.timeout(LIMIT_S):
            out, err = await self.command.communicate()
        self.said = (err or b"").decode()
        return msgspec.json.decode(out, type=Report) if out.strip() else None

    def _held(self, step: str) -> Path:
        side, _, name = step.partition(":")
        daemon = self.source if side == "source" else self.destination
        return daemon.state_dir / f"held-{side}-{name}"

    # --- the promise ------------------------------------------------------------------------------

    async def assert_untouched(self) -> None:
        """The guest runs at the source as if nothing had been tried, and nothing is left of it."""
        await _until(self._left_at_the_source)
        await _until(self._left_at_the_destination)
        await self._assert_runs(self.here, self.process.pid)

    async def assert_goes_on(self, limit_s: float = LIMIT_S) -> None:
        """The guest runs at the source, where nothing is left of the move."""
        await _until(self._left_at_the_source, limit_s)

    async def assert_moved(self) -> None:
        """The guest runs at the destination, and nothing is left of it at the source."""

        async def problems() -> list[str]:
            name, topology = self.stage.guest.name, self.stage.lab.topology
            there = self.arriving()
            if len(there) != 1:
                return [f"processes {there} at the destination"]
            here = traces.processes_called(topology, self.here, name)
            found = [f"processes {here} at the source"] if here else []
            running = await self.witness.look()
            return found + ([] if running == there else [f"{running} run"])

        await _until(problems)
        await self._assert_runs(self.there, self.arriving()[0])

    async def _assert_runs(self, host: HostName, pid: int) -> None:
        """At that host, alone, sound, and reached by its client."""
        stage = self.stage
        mark = stage.client.mark()
        counts = await stage.guest.counts()
        assert stage.guest.locate()[0] == host
        assert counts.ticks > self.before.ticks
        assert counts.pages_written > self.before.pages_written
        while counts.disk_operations == self.before.disk_operations:
            counts = await stage.guest.counts()
        assert (counts.corrupt, counts.disk_bad, counts.died) == (0, 0, 0)
        assert await self.witness.look() == [pid]
        assert self.witness.looks > 0
        assert self.witness.sightings == [], "two QEMUs of the guest ran at a time"
        window = await stage.client.window(mark)
        assert window.echoes_lost < window.echoes_sent, "the guest is not reached by its client"
        while window.tcp_replies == 0:
            # Its TCP waits for longer and longer between its repetitions, as it should.
            window = await stage.client.window(mark)
        assert window.tcp_intact

    async def _left_at_the_source(self) -> list[str]:
        pid, topology = self.process.pid, self.stage.lab.topology
        found = [
            f"process {extra} at the source"
            for extra in traces.processes_called(topology, self.here, self.process.name)
            if extra != pid
        ]
        found += await asyncio.to_thread(lambda: list(traces.in_process(self.process)))
        if await self.witness.look() != [pid]:
            found.append("the QEMU at the source does not run")
        nodes = await self.witness.ask(pid, "query-named-block-nodes")
        assert isinstance(nodes, list)
        found += [f"node {n['node-name']}" for n in nodes if "vmferry" in str(n["node-name"])]
        return found

    async def _left_at_the_destination(self) -> list[str]:
        found = [f"process {pid} at the destination" for pid in self.arriving()]
        links = await asyncio.to_thread(self.stage.lab.topology.links, self.there)
        tap = self.stage.guest.spec.tap
        found += [f"tap {tap} at the destination"] if tap in links else []
        new = set(_arrivals(self.destination)) - self.left
        return found + [f"{path} at the destination" for path in sorted(new)]


def _arrivals(host: LabHost) -> list[Path]:
    folder = host.state_dir / "guests"
    return list(folder.iterdir()) if folder.is_dir() else []


async def _until(problems: Callable[[], Awaitable[list[str]]], limit_s: float = LIMIT_S) -> None:
    """Returns when there are no problems; AssertionError with the last ones when time is up."""
    found = ["nothing was looked at"]
    try:
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    found = await problems()
                except (FerryError, KeyError) as error:
                    found = [str(error) or repr(error)]
                if not found:
                    return
                # There is no event for the absence of things.
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        raise AssertionError("; ".join(found)) from None
