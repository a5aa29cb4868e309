"""The probe of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vmferry.host import probe
from vmferry.host.probe import OPTIONAL


def test_every_capability_is_one_line_with_a_way_out() -> None:
    found = probe.probe()
    names = [capability.name for capability in found]
    assert len(set(names)) == len(names)
    assert set(names) >= OPTIONAL
    for capability in found:
        assert "\n" not in capability.detail
        assert capability.ok or capability.remedy


def test_it_leaves_nothing_behind() -> None:
    def children() -> list[str]:
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()

    def descriptors() -> list[Path]:
        return sorted(Path("/proc/self/fd").iterdir())

    before = children(), descriptors()
    probe.probe()
    assert (children(), descriptors()) == before


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = {capability.name: capability for capability in probe.probe()}
    assert not found["shaping"].ok
    assert "install" in found["shaping"].remedy
    assert not found["qemu"].ok


def test_a_refused_trial_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(probe, "_open_userfaultfd", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    found = {capability.name: capability for capability in probe.probe()}
    for name in ("userfaultfd", "write-tracking", "namespaces", "tap"):
        assert not found[name].ok
        assert "not permitted" in found[name].detail
