"""How much a call may hold beside its inputs and its result."""

DEFAULT_MEMORY = 256 * 2**20
"""Bytes, where the caller does not say and less than that will do."""


def fit_memory(memory: int | None, least: int, what: str = "") -> int:
    """The bytes to keep to: as given, or by default, but then at least what is needed.

    ValueError: a bound that was given and is less; `what` says, after a comma, what takes it.
    """
    if memory is None:
        return max(DEFAULT_MEMORY, least)
    if memory < least:
        raise ValueError(f"memory is {memory} bytes; accepted: at least {least}{what}")
    return memory
