"""The machine and the QEMUs of these tests are those of the lab's."""

from tests.lab.conftest import binary, machine

__all__ = ["binary", "machine"]
