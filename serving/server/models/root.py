"""The folder that a repository is of, read in a thread."""

import asyncio
import logging
from pathlib import Path

from headstart.serving.server.errors import unavailable
from headstart.serving.server.models.folder import Folder, scan

_LOG = logging.getLogger(__name__)


class Root:
    """A folder of models, or a link to one.

        folders = await Root(Path("models")).scan()
        folders["demo"].versions

    Args:
        path: of the folder or the link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unreadable = ""
        """Why it cannot be read, as it was last told."""

    async def scan(self) -> dict[str, Folder]:
        """What it holds; why it cannot be read is in the log, once for each reason: what is loaded serves on.

        Raises:
            ServeError: 503, where it cannot be read.
        """
        try:
            folders = await asyncio.to_thread(scan, self.path)
        except (OSError, RuntimeError) as error:  # the latter: there is no thread to read it in
            if str(error) != self._unreadable:
                self._unreadable = str(error)
                _LOG.error("%s cannot be read, what is loaded serves on: %s", self.path, error)
            raise unavailable("the repository cannot be read; the server's log says why") from error
        if self._unreadable:
            self._unreadable = ""
            _LOG.info("%s can be read again", self.path)
        return folders
