"""The state directory of a daemon, and the lock that makes it one daemon's."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from vmferry.errors import Refused
from vmferry.host.api import SOCKET_NAME

STATE_VARIABLE = "VMFERRY_STATE"
SYSTEM_STATE_DIR = Path("/var/lib/vmferry")
SOCKET_PATH_BYTES_MAX = 107
"""sun_path, without its terminating zero."""


def state_dir(named: Path | None) -> Path:
    """The directory that `--state`, the environment or the default names."""
    if named is not None:
        return named.absolute()
    if from_environment := os.environ.get(STATE_VARIABLE):
        return Path(from_environment).absolute()
    if os.geteuid() == 0:
        return SYSTEM_STATE_DIR
    from platformdirs import user_state_path

    return user_state_path("vmferry")


def socket_path(directory: Path) -> Path:
    """The daemon's local socket. Refused when the path is too long for one."""
    path = directory / SOCKET_NAME
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise Refused(
            f"the path {path} is too long for a socket ({SOCKET_PATH_BYTES_MAX} bytes at most); "
            "choose a shorter --state"
        )
    return path


def occupy(directory: Path) -> int:
    """Makes the directory (0700) and takes its lock: a descriptor to be kept for life.

    Refused when another daemon has it, or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        lock = os.open(directory / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(
            f"the state directory {directory} cannot be used ({error.strerror}); "
            "choose another with --state"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise Refused(
            f"a daemon with the state directory {directory} runs already; "
            "stop it, or choose another directory with --state"
        ) from error
    return lock
