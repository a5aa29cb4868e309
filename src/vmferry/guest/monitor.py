"""A guest's QMP monitor over qemu-qmp: every call with a limit, every failure a GuestError."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Mapping
from typing import NoReturn

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from vmferry.errors import GuestError

CALL_LIMIT_S = 10.0
CONNECT_LIMIT_S = 5.0

# Whatever qemu-qmp logs as an error also arrives here as an exception.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class CommandFailed(GuestError):
    """The monitor answered with an error."""

    def __init__(self, sentence: str, error_class: str, description: str) -> None:
        super().__init__(sentence)
        self.error_class = error_class
        """QMP's: CommandNotFound, DeviceNotFound, GenericError, ..."""
        self.description = description


class Monitor:
    """One connection to one guest's monitor. Commands go one at a time, in the order of calls."""

    def __init__(self, client: QMPClient, guest: str, server_pid: int = 0) -> None:
        self._client = client
        self._turn = asyncio.Lock()
        self.server_pid = server_pid
        """The process that listens on the socket; 0 where it cannot be seen from here."""
        self.guest = guest
        """How the guest is called in sentences."""

    @classmethod
    async def connect(
        cls, path: str, timeout_s: float = CONNECT_LIMIT_S, guest: str = ""
    ) -> Monitor:
        """Connects and negotiates. GuestError, also when somebody else holds the monitor: a QMP
        socket serves one client, and the second one is let in but never greeted."""
        guest = guest or f"at {path}"
        client = QMPClient(guest)
        endpoint = socket.socket(socket.AF_UNIX)
        endpoint.setblocking(False)
        try:
            # Connects at once, or would block because other clients wait in line.
            endpoint.connect(path)
            server_pid = peer_pid(endpoint)
            async with asyncio.timeout(timeout_s):
                await client.connect(endpoint)
        except (TimeoutError, BlockingIOError):
            endpoint.close()
            raise GuestError(
                f"the monitor of guest {guest} ({path}) is in use by somebody else, or the guest "
                f"hangs: no greeting came in {timeout_s:g} s. Close the other client, or give the "
                "guest a second QMP socket"
            ) from None
        except (QMPError, ConnectError, OSError, EOFError) as error:
            endpoint.close()
            cause = error.exc if isinstance(error, ConnectError) else error
            raise GuestError(
                f"the monitor of guest {guest} ({path}) does not answer: {_told(cause)}"
            ) from error
        except BaseException:
            endpoint.close()
            raise
        return cls(client, guest, server_pid)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        timeout_s: float = CALL_LIMIT_S,
        descriptor: int | None = None,
    ) -> object:
        """The command's answer. With `descriptor` a copy of it goes along (SCM_RIGHTS).

        GuestError when the guest is gone or silent; CommandFailed when it says no.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(timeout_s):
                    if descriptor is not None:
                        self._client.send_fd_scm(descriptor)
                    return await self._client.execute(command, arguments)
            except TimeoutError:
                raise GuestError(
                    f"guest {self.guest} did not answer {command} within {timeout_s:g} s"
                ) from None
            except ExecuteError as error:
                said = str(error)
                raise CommandFailed(
                    f"guest {self.guest} refused {command}: {said}", error.error_class, said
                ) from error
            except (QMPError, OSError, EOFError) as error:
                self._raise_broken(command, error)

    async def table(
        self, command: str, arguments: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        """The same for a command whose answer is an object."""
        answer = await self.execute(command, arguments)
        if not isinstance(answer, dict):
            raise GuestError(f"guest {self.guest} answered {command} with something else")
        return {str(key): value for key, value in answer.items()}

    async def rows(
        self, command: str, arguments: Mapping[str, object] | None = None
    ) -> list[dict[str, object]]:
        """The same for a command whose answer is a list of objects."""
        answer = await self.execute(command, arguments)
        if not isinstance(answer, list):
            raise GuestError(f"guest {self.guest} answered {command} with something else")
        return [
            {str(key): value for key, value in row.items()}
            for row in answer
            if isinstance(row, dict)
        ]

    async def hmp(self, line: str, timeout_s: float = CALL_LIMIT_S) -> str:
        """What the human monitor prints; it has no errors, only text."""
        return str(await self.execute("human-monitor-command", {"command-line": line}, timeout_s))

    async def stop(self) -> int:
        """Stops the vCPUs; the instant of STOP by the guest's host clock, in ns since the epoch.

        A guest that is stopped already has no such event: then it is the instant of the answer.
        """
        return await self._switch("stop", "STOP", running=False)

    async def cont(self) -> int:
        """Runs the vCPUs; the instant of RESUME (see `stop`). GuestError when they do not run."""
        return await self._switch("cont", "RESUME", running=True)

    async def running(self) -> bool:
        """Whether the vCPUs run."""
        return bool((await self.table("query-status")).get("running"))

    async def disconnect(self) -> None:
        """Never raises: qemu-qmp reports here again what broke the connection before."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CONNECT_LIMIT_S):
                await self._client.disconnect()

    async def _switch(self, command: str, name: str, *, running: bool) -> int:
        listener = EventListener(name)
        with self._client.listen(listener):
            await self.execute(command)
            # QEMU sends the event before the answer to the command that caused it.
            if listener.empty():
                answered_ns = time.time_ns()
                status = await self.table("query-status")
                if bool(status.get("running")) is not running:
                    raise GuestError(
                        f"guest {self.guest} is {status.get('status')} after {command}"
                    )
                if listener.empty():
                    return answered_ns
            event = await listener.get()
        return _instant_ns(event["timestamp"])

    def _raise_broken(self, command: str, error: Exception) -> NoReturn:
        raise GuestError(
            f"guest {self.guest} is gone, or closed its monitor, during {command}"
        ) from error


def _told(cause: Exception) -> str:
    if isinstance(cause, EOFError):
        return "it closed the connection"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__


def peer_pid(endpoint: socket.socket) -> int:
    """The process that listens at the other end of a connected unix socket."""
    credentials = endpoint.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[0])


def _instant_ns(timestamp: object) -> int:
    if not isinstance(timestamp, dict):
        return time.time_ns()
    return int(timestamp["seconds"]) * 1_000_000_000 + int(timestamp["microseconds"]) * 1000
