"""The signals at which a server ends."""

import signal


def end_signals() -> list[signal.Signals]:
    """SIGTERM, SIGINT, and but under nohup SIGHUP: a terminal that is closed would end the process at once."""
    hang_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hang_up]
