"""What a model takes and gives, and whether a request fits: decided before it is queued, so that no request that was
malformed can spoil the batch of others.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart.serving.manifest import Tensor
from headstart.serving.server.errors import ServeError, bad_request
from headstart.serving.server.wire.encoded import pixels_input

if TYPE_CHECKING:
    from headstart.serving.server.wire.protocol import InferRequest

Key = tuple[tuple[int, ...], ...]

_LONGEST = 32
"""Sides of an image, the longer by the shorter. A model resizes the shorter to its own size before it cuts the middle
out: 153 bytes of PNG, 25,000 pixels by 1, would take 1.4 GB in one for 48 pixels, and 40 in one for 256."""


class Signature:
    """The inputs and outputs of a model, made ready to compare requests with.

    A model has rows where the first size of every input and output is free and the same word (or none). Only then
    are requests batched, and limited to `max_batch` rows.

    Args:
        model: its name, for messages.
        inputs, outputs: names, NumPy types and sizes; a word, None or -1 stands for a size that is free.
        max_batch: rows of one execution.
    """

    def __init__(self, model: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], max_batch: int) -> None:
        self.model = model
        self.output_names = [one.name for one in outputs]
        self.max_batch = max_batch
        first = {one.shape[0] if one.shape else 0 for one in (*inputs, *outputs)}
        words = {size for size in first if isinstance(size, str)}
        self._has_rows = bool(inputs) and len(words) <= 1 and all(map(_is_free, first))
        self.batchable = self._has_rows and max_batch > 1
        self._expected = [
            (
                one,
                np.dtype(one.dtype),
                len(one.shape),
                [(axis, size) for axis, size in enumerate(one.shape) if not _is_free(size)],
            )
            for one in inputs
        ]
        self._pixels = pixels_input(inputs)
        places: dict[str, list[tuple[str, int]]] = {}
        for one in inputs:
            for axis, size in enumerate(one.shape):
                # Nameless sizes may differ, but for the rows of a batch.
                word = "batch" if axis == 0 and self._has_rows else size
                if isinstance(word, str):
                    places.setdefault(word, []).append((one.name, axis))
        self._shared = [(word, found) for word, found in places.items() if len(found) > 1]

    def check(self, request: "InferRequest") -> tuple[int, Key]:
        """Compare a request with the model.

        Returns:
            its rows (1 where the model knows none), and what must agree with another to share a batch: the
            shape of each input behind the first size. Types need no comparison: they are the model's.

        Raises:
            ServeError: 400; an input or output that is unknown or missing, of another type or shape, or more
                rows than `max_batch`. A larger request is refused and not split: its parts would hold the queue
                for longer than any client was told.
        """
        inputs = request.inputs
        if len(inputs) != len(self._expected):
            raise self._names(inputs)
        key = []
        rows = 1
        for expected, dtype, rank, fixed in self._expected:
            array = inputs.get(expected.name)
            if array is None:
                raise self._names(inputs)
            shape = array.shape
            # What marks bfloat16, whose bits NumPy has as uint16, is no part of equality.
            if array.dtype != dtype or array.dtype.metadata or len(shape) != rank or 0 in shape:
                raise _misfit(expected, array)
            for axis, size in fixed:
                if shape[axis] != size:
                    raise _misfit(expected, array)
            if expected.name == self._pixels and max(shape[1:3]) > _LONGEST * min(shape[1:3]):
                raise bad_request(
                    f"an image has {shape[1]} rows of {shape[2]} pixels; accepted: sides up to {_LONGEST} times as "
                    "long as each other; cut it into pieces"
                )
            key.append(shape[1:])
            if self._has_rows:
                rows = shape[0]
        for word, places in self._shared:
            sizes = {inputs[name].shape[axis] for name, axis in places}
            if len(sizes) > 1:
                found = ", ".join(f"{name!r} has {inputs[name].shape[axis]}" for name, axis in places)
                raise bad_request(f"the size {word!r} differs between inputs: {found}; send the same")
        if request.outputs:
            for output in request.outputs:
                if output.name not in self.output_names:
                    raise bad_request(
                        f"{self.model} has no output {output.name[:80]!r}; accepted: {', '.join(self.output_names)}"
                    )
        if rows > self.max_batch:
            raise bad_request(
                f"the request has {rows} rows, {self.model} takes at most {self.max_batch} at once; "
                "send several requests"
            )
        return rows, tuple(key)

    def wanted(self, request: "InferRequest") -> list[str]:
        """The outputs to compute: those asked for, or all."""
        return list(dict.fromkeys(one.name for one in request.outputs)) if request.outputs else self.output_names

    def _names(self, inputs: dict[str, Any]) -> ServeError:
        names = [expected.name for expected, *_ in self._expected]
        missing = [name for name in names if name not in inputs]
        extra = [name[:80] for name in inputs if name not in names]
        problem = f"lacks the input {missing[0]!r}" if missing else f"has an input {extra[0]!r} that is not known"
        return bad_request(f"the request {problem}; {self.model} takes {', '.join(names)}")


def _is_free(size: int | str | None) -> bool:
    return not isinstance(size, int) or size < 0


def _misfit(expected: Tensor, array: Any) -> ServeError:
    found, accepted = (f"{_datatype(one.dtype)} {_words(one.shape)}" for one in (array, expected))
    return bad_request(f"the input {expected.name!r} is {found}; accepted: {accepted}, no size 0")


def _datatype(dtype: Any) -> str:
    if metadata := getattr(dtype, "metadata", None):
        return str(metadata["datatype"])
    return "BYTES" if str(dtype) == "object" else str(dtype)


def _words(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('free' if size in (None, -1) else str(size) for size in shape)}]"
