"""A Ray to run on: one that this process starts and guards with a token, or a cluster at an address.

Ray's own ports listen on every interface whatever it is told, so the token is the protection: each process that
starts a Ray makes a random one, and a client without it is refused.
"""

import os
import secrets
import socket
from types import TracebackType
from typing import Any

from headstart.trainer.errors import RunError

# Set before ray is imported: Ray reads them when it loads.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # The worker group is polled every 2 s by default, which doubles the time of a short fit (16 s to 8 s measured).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Workers keep the driver's directory, so that relative paths mean the same on both sides.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def set_environment(address: str | None = None) -> None:
    """Set Ray's environment for this process: no usage statistics, and a token.

    The embedded Ray gets a random token, one a process, unless `RAY_AUTH_TOKEN` is set already. With an address the
    token is the cluster's own, which the user puts into `RAY_AUTH_TOKEN` or `~/.ray/auth_token`.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ["RAY_AUTH_MODE"] = "token"
        # A process at each fit that asks whether a cloud wants its machines back, which nobody does here.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    elif "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _knock(address: str) -> None:
    """Raise OSError when nobody listens there: Ray itself tries for minutes before it says so."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class Connection:
    """Connects to Ray when it is first needed, and lets go of it at the end of the `with` block."""

    def __init__(self, address: str | None = None) -> None:
        self.address = address
        self._connected = False

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ray(self, *, num_workers: int = 1, dashboard: bool = False) -> Any:
        """Return the `ray` module, connected.

        The embedded Ray has a CPU slot for each of `num_workers` even where the machine has fewer cores; its
        dashboard, on loopback, runs only where asked for (Tune needs it). Raises `RunError` when no Ray answers at
        the address, or its folder cannot be used.
        """
        set_environment(self.address)
        import ray

        if self._connected:
            return ray
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if self.address is None:
            slots = max(os.cpu_count() or 1, num_workers)
            try:
                # "local", or it would join a Ray that runs on this machine already.
                ray.init("local", num_cpus=slots, include_dashboard=dashboard, dashboard_host="127.0.0.1", **common)
            except OSError as error:  # such as of a socket, whose path may have 107 bytes: Ray adds up to 68
                raise RunError(
                    f"cannot start Ray: {error}. Its files are in RAY_TMPDIR, or else TMPDIR: set RAY_TMPDIR to a "
                    "folder with a short path, such as /tmp, and run the same command again; what is finished is kept"
                ) from error
        else:
            try:
                _knock(self.address)
                ray.init(address=self.address, **common)
            except Exception as error:  # Ray raises a dozen kinds here, from ValueError to its own C++ ones
                raise RunError(
                    f"cannot connect to Ray at {self.address}: {error}. Start one with `ray start --head`, give its "
                    "address (or `auto` on the head's machine) and put its token into RAY_AUTH_TOKEN"
                ) from error
        self._connected = True
        return ray

    def close(self) -> None:
        """Disconnect, and stop the embedded Ray."""
        if self._connected:
            import ray

            ray.shutdown()
            self._connected = False
