"""Daemons in the test's own process, each with its own state directory and port on loopback."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from vmferry.host import api, client
from vmferry.host.daemon import Daemon, Settings
from vmferry.wire.messages import Hello


class Hosts:
    """Daemons of one test, ended with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[Daemon] = []

    async def start(self, name: str, hello: Hello | None = None) -> Daemon:
        daemon = Daemon(Settings(self._folder / name, name, "127.0.0.1", 0), hello)
        self._running.append(daemon)
        await daemon.start()
        return daemon

    async def pair(self, inviter: Daemon, joiner: Daemon) -> None:
        token = await self.ask(inviter, api.Invite())
        assert isinstance(token, api.Done)
        await self.ask(joiner, api.Pair(token=token.text))

    async def ask(self, daemon: Daemon, request: api.Request) -> api.Answer:
        return await client.ask(self._folder / daemon.identity.name, request)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Hosts]:
        try:
            yield self
        finally:
            for daemon in self._running:
                await daemon.end()
