"""The destination's QEMU does not take the device state: by a synthetic guest, which can be told
to fail where a real one does so only when something is wrong with it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.faults import traces
from tests.faults.conftest import Play
from tests.faults.stage import Stage

from vmferry.guest.monitor import Monitor
from vmferry.guest.process import read_process
from vmferry.lab import synthetic
from vmferry.report.records import Report


@pytest.mark.parametrize("strategy", ["pre-copy", "post-copy"])
@pytest.mark.parametrize("failure", ["load", "crash", "save"])
def test_the_guest_goes_on(play: Play, tmp_path: Path, strategy: str, failure: str) -> None:
    async def scene(stage: Stage) -> None:
        await stage.hold("")
        here, there = stage.lab.hosts["a"], stage.lab.hosts["b"]
        name = f"failing-{failure}"
        guest = await synthetic.start(tmp_path, name=name, extra=("-fail", failure))
        try:
            before = await synthetic.check(guest.check_path)
            done = await here.run(
                "move", str(guest.qmp_path), there.name, "--strategy", strategy, "--json"
            )
            assert done.code == 1
            report = msgspec.json.decode(done.out, type=Report)
            assert report.outcome == "failed"
            assert "runs on at host-a" in report.error
            monitor = await Monitor.connect(str(guest.qmp_path))
            assert await monitor.running()
            await monitor.disconnect()
            after = await synthetic.check(guest.check_path, sweep=True)
            assert after.writes > before.writes
            assert (after.corrupt, after.differing) == (0, 0)
            assert list(traces.in_process(read_process(guest.pid))) == []
            assert traces.processes_called(stage.lab.topology, "b", name) == []
            guests = there.state_dir / "guests"
            assert [path for path in guests.iterdir() if name in path.name] == []
        finally:
            await guest.end()

    play(scene)
