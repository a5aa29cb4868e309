"""Calls injected into real processes, and keepers of them."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.core.conftest import Child, Start

from vmferry import _core as core

TIMES = 200


def inject(child: Child) -> None:
    descriptor, theirs = core.inject_userfaultfd(child.pid, user_mode_only=True, keep_open=False)
    assert theirs == -1
    os.close(descriptor)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_gone(pid: int) -> None:
    """Until a process has ended; reaps nothing."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], 30)[0]
    finally:
        os.close(pidfd)


# --- injection ---------------------------------------------------------------------------------


def test_a_process_that_waits_for_input_still_gets_it(child: Child) -> None:
    before = child.tell("descriptors")
    for _ in range(TIMES):
        inject(child)
    assert core.find_userfaultfd(child.pid) == []
    assert child.tell("descriptors") == before
    assert child.tell("mask") == []


def test_busy_threads_compute_rightly(child: Child) -> None:
    child.tell("busy", threads=3)
    for _ in range(TIMES):
        inject(child)
    result = child.tell("idle")
    assert isinstance(result, dict)
    assert result["wrong"] == 0
    assert all(result["rounds"])
    assert core.find_userfaultfd(child.pid) == []


def test_a_main_thread_in_user_code_is_taken_there(child: Child) -> None:
    before = child.maps()
    child.begin("spin", seconds=1)
    assert child.line() == "spinning"
    for _ in range(TIMES):
        inject(child)
    rounds = child.answer()
    assert isinstance(rounds, int)
    assert rounds > 0
    assert child.maps() == before


def test_a_sleep_is_neither_cut_nor_begun_anew(child: Child) -> None:
    child.begin("sleep", seconds=1)
    assert child.line() == "sleeping"
    for _ in range(20):
        inject(child)
    slept = child.answer()
    assert isinstance(slept, float)
    assert slept >= 1


def test_a_wait_for_a_signal_goes_on(child: Child) -> None:
    child.begin("wait_signal")
    assert child.line() == "waiting"
    for _ in range(20):
        inject(child)
    os.kill(child.pid, signal.SIGUSR1)
    assert child.answer() == signal.SIGUSR1


def test_signals_that_arrive_meanwhile_are_delivered(child: Child) -> None:
    child.tell("ring", every=0.0005)
    for _ in range(TIMES):
        inject(child)
    alarms = child.tell("ring", every=0)
    assert isinstance(alarms, int)
    assert alarms > 0
    assert child.tell("mask") == []


def test_a_stopped_process_stays_stopped(child: Child) -> None:
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    inject(child)
    keeper = core.make_keeper(child.pid)
    core.reap_keeper(child.pid, keeper)
    assert state(child.pid) in "Tt"
    os.kill(child.pid, signal.SIGCONT)
    assert child.tell("look", pages=[0]) == [0]


def test_a_stop_that_arrives_meanwhile_is_not_lost(child: Child) -> None:
    """SIGSTOP cannot be blocked: it meets the injection at any point, or comes before or after."""
    for _ in range(TIMES):
        thread = threading.Thread(target=os.kill, args=(child.pid, signal.SIGSTOP))
        thread.start()
        inject(child)
        thread.join()
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        os.kill(child.pid, signal.SIGCONT)
    assert child.tell("look", pages=[0]) == [0]


def test_errors_of_the_injected_call_are_told(child: Child) -> None:
    with pytest.raises(OSError, match="close in process") as caught:
        core.inject_close(child.pid, 999)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError, match="USERFAULTFD_IOC_NEW") as caught:
        core.inject_userfaultfd_from(child.pid, 0, keep_open=False)
    assert caught.value.errno in {errno.ENOTTY, errno.EINVAL}
    with pytest.raises(OSError, match="madvise") as caught:
        core.inject_discard(child.pid, 4097, 4096)
    assert caught.value.errno == errno.EINVAL
    assert child.tell("look", pages=[0]) == [0]


def test_a_process_that_is_not_there_is_told(child: Child) -> None:
    child.kill()
    with pytest.raises(ProcessLookupError):
        core.inject_close(child.pid, 0)
    with pytest.raises(ProcessLookupError):
        inject(child)
    with pytest.raises(ProcessLookupError):
        core.make_keeper(child.pid)


def test_our_own_child_that_dies_is_left_for_us_to_reap(start: Start) -> None:
    for _ in range(20):
        child = start(pages=1)
        thread = threading.Thread(target=child.process.kill)
        thread.start()
        with contextlib.suppress(ProcessLookupError):
            inject(child)
        thread.join()
        assert child.process.wait() == -signal.SIGKILL


def test_a_thread_that_waits_for_the_end_of_a_child_sees_no_trace_stop(child: Child) -> None:
    ended = []
    thread = threading.Thread(target=lambda: ended.append(os.waitpid(child.pid, 0)))
    thread.start()
    for _ in range(TIMES):
        inject(child)
    assert ended == []
    child.process.kill()
    thread.join()
    assert ended == [(child.pid, signal.SIGKILL)]


INJECT_FOR_EVER = """
import os, sys
from vmferry import _core as core
pid = int(sys.argv[1])
while True:
    descriptor, _ = core.inject_userfaultfd(pid, user_mode_only=True, keep_open=False)
    os.close(descriptor)
    print(flush=True)
    core.reap_keeper(pid, core.make_keeper(pid))
"""


def test_an_injector_that_is_killed_half_way_harms_nobody(child: Child) -> None:
    child.tell("busy", threads=2)
    before = child.maps()
    for rounds in range(1, 21):
        arguments = [sys.executable, "-c", INJECT_FOR_EVER, str(child.pid)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as injector:
            assert injector.stdout is not None
            for _ in range(rounds):
                assert injector.stdout.readline()
            injector.kill()
            # The tracer outlives it, holds the pipe open, and ends its work.
            injector.stdout.read()
        for keeper in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split():
            core.reap_keeper(child.pid, int(keeper))
    assert core.find_userfaultfd(child.pid) == []
    assert child.maps() == before
    result = child.tell("idle")
    assert isinstance(result, dict)
    assert result["wrong"] == 0


def test_a_userfaultfd_kept_open_outlives_ours(child: Child) -> None:
    descriptor, theirs = core.inject_userfaultfd(child.pid, user_mode_only=True, keep_open=True)
    assert not os.get_inheritable(descriptor)
    assert not os.get_blocking(descriptor)
    os.close(descriptor)
    assert core.find_userfaultfd(child.pid) == [theirs]
    core.inject_close(child.pid, theirs)
    assert core.find_userfaultfd(child.pid) == []


def test_a_userfaultfd_comes_from_a_device_that_is_open_there(child: Child) -> None:
    device = child.tell("open", path="/dev/userfaultfd")
    assert isinstance(device, int)
    descriptor, theirs = core.inject_userfaultfd_from(child.pid, device, keep_open=False)
    assert theirs == -1
    child.tell("close", descriptor=device)
    tracker = core.Tracker(child.memory, descriptor)
    tracker.scan()
    child.tell("write", pages=[3], value=1)
    assert tracker.scan().ranges(0) == [(3, 4)]


# --- the keeper --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["private", "memfd", "file"])
def test_memory_outlives_its_process(start: Start, kind: str) -> None:
    child = start(kind, 4096)
    child.tell("fill", pages=list(range(0, 4096, 3)))
    tracker = child.track()
    tracker.scan()
    child.tell("write", pages=[6, 7], value=4)
    digests = child.memory.digests()
    keeper = core.make_keeper(child.pid)
    child.tell("write", pages=[9], value=5)
    child.process.kill()
    assert child.process.wait() == -signal.SIGKILL
    kept = core.Memory(keeper, [child.block])
    after = kept.digests()
    assert core.differing_pages(digests, after) == [9]
    assert tracker.scan().ranges(0) == [(6, 8), (9, 10)]
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        os.kill(keeper, number)
    os.kill(keeper, signal.SIGSTOP)
    os.kill(keeper, signal.SIGCONT)
    assert kept.digests() == after
    assert list(Path(f"/proc/{keeper}/fd").iterdir()) == []
    assert Path(f"/proc/{keeper}/syscall").read_text().split()[0] in {"34", "running"}
    os.kill(keeper, signal.SIGKILL)
    wait_gone(keeper)
    with pytest.raises(core.CoreError):
        kept.digests()


def test_a_keeper_does_not_disturb_and_leaves_nothing(child: Child) -> None:
    child.tell("busy", threads=2)
    before = child.maps()
    for _ in range(50):
        keeper = core.make_keeper(child.pid)
        assert state(keeper) in "SR"
        core.reap_keeper(child.pid, keeper)
        assert not Path(f"/proc/{keeper}").exists()
    assert child.maps() == before
    result = child.tell("idle")
    assert isinstance(result, dict)
    assert result["wrong"] == 0


def test_a_keeper_passes_a_seccomp_filter_that_kills(child: Child) -> None:
    child.tell("fill", pages=[1])
    child.tell("forbid_new_processes")
    keeper = core.make_keeper(child.pid)
    assert child.tell("look", pages=[1]) == [2]
    child.process.kill()
    child.process.wait()
    assert core.Memory(keeper, [child.block]).read(0, 4096, 1) == b"\x02"
    os.kill(keeper, signal.SIGKILL)
    wait_gone(keeper)
