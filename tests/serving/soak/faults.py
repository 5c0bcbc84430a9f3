"""What goes wrong on purpose: deployments in two ways, a corrupt package, clients that die, a worker that is killed."""

import asyncio
import os
import random
import shutil
import signal
import socket
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.serving.soak.load import Tally, messages
from tests.serving.soak.versions import Version, corrupt, make_version
from tests.serving.soak.world import NAME, Server

RELOAD_S = 5.0
_KEPT = 2  # versions that stay in the repository


@dataclass
class Faults:
    """What was done to a server, and when."""

    server: Server
    repository: Path
    staging: Path
    """A folder on the repository's file system, where packages are made."""
    tally: Tally
    versions: dict[int, Version]
    deployed_at: dict[int, float] = field(default_factory=dict)
    clients_killed: int = 0
    corrupt_reason: str = ""
    """Why the server says that it refused the corrupt package."""
    restarted_s: float | None = None
    """From the kill of a worker to the next that runs."""

    async def reload(self, seconds: float) -> None:
        """A new version every five seconds, by `mv` and by `cp -r` in turn; one in between is corrupt."""
        end, number, corrupted = time.monotonic() + seconds, max(self.versions), False
        while True:
            due = time.monotonic() + RELOAD_S
            number += 1
            version = await asyncio.to_thread(make_version, self.staging, number)
            if not corrupted and time.monotonic() > end - 0.75 * seconds:
                corrupted = True
                await self._deploy_corrupt(version)
                number += 1
                version = await asyncio.to_thread(make_version, self.staging, number)
            self.versions[number] = version
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if time.monotonic() > end - RELOAD_S:  # the last one is given time to be seen
                return
            self.deployed_at[number] = time.monotonic()
            target = self.repository / NAME / str(number)
            if number % 2:
                await asyncio.to_thread(version.package.rename, target)
            else:
                await _run("cp", "-r", str(version.package), str(target))
                shutil.rmtree(version.package)
            for old in sorted((self.repository / NAME).iterdir(), key=lambda path: int(path.name))[:-_KEPT]:
                await asyncio.to_thread(shutil.rmtree, old)

    async def _deploy_corrupt(self, version: Version) -> None:
        """Copy a damaged package in, wait until it is refused, take it out."""
        package = await asyncio.to_thread(corrupt, version, self.staging)
        target = self.repository / NAME / str(version.number)
        await _run("cp", "-r", str(package), str(target))
        for _ in range(100):
            await asyncio.sleep(0.1)
            rows = await asyncio.to_thread(self.server.index)
            row = next((row for row in rows if row["version"] == str(version.number)), None)
            if row and row["state"] == "UNAVAILABLE" and "was changed" in row["reason"]:  # and not: still changing
                self.corrupt_reason = row["reason"]
                break
        shutil.rmtree(target)

    async def kill_clients(self) -> None:
        """Four times a second a client that dies within its request, or before its answer; ends when cancelled."""
        dice, loop = random.Random(3), asyncio.get_running_loop()
        message = messages()[0]
        while True:
            await asyncio.sleep(0.25)
            with socket.socket() as client:
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", self.server.port))
                cut = dice.choice((dice.randrange(1, len(message)), len(message)))
                await loop.sock_sendall(client, message[:cut])
                if dice.random() < 0.5:  # a process that is killed with unread data sends a reset
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await asyncio.sleep(dice.random() * 0.02)
            self.clients_killed += 1

    async def kill_worker(self, after: float) -> None:
        """SIGKILL one worker process, and wait for another in its place."""
        await asyncio.sleep(after)
        workers = self.server.workers()
        if not workers:
            return
        killed = time.monotonic()
        self.tally.killed_at.append(killed)
        os.kill(workers[0], signal.SIGKILL)
        while time.monotonic() < killed + 30:
            await asyncio.sleep(0.05)
            now = self.server.workers()
            if len(now) == len(workers) and workers[0] not in now:
                self.restarted_s = time.monotonic() - killed
                return


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        raise RuntimeError(f"{' '.join(command)} failed")
