"""Proof that a graph computes what PyTorch does: both run on real images and every difference is recorded.

A variant is held against the fp32 graph in the same way. Either comes as a function from images to logits, so neither
torch nor onnx is imported.
"""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headstart.serving.device import Device, open_on
from headstart.serving.errors import PackageError, first_line
from headstart.serving.manifest import PARITY_BATCHES, Parity, ParityRow
from headstart.serving.ort import onnxruntime
from headstart.serving.runtime import CPU, INPUT, OUTPUTS

Images: TypeAlias = NDArray[np.uint8]
Logits: TypeAlias = NDArray[np.float32]

_LOG = logging.getLogger(__name__)
_MEND = {
    "PyTorch": "choose another source, or raise export.tolerance if that difference is acceptable",
    "fp32": "leave this variant out of export.variants",
}
# TensorRT plans anew for every size of an image, minutes each; Azure's runs nothing itself.
_NOT_PROVEN = {CPU, "TensorrtExecutionProvider", "AzureExecutionProvider"}
_PROBABILITY_TOLERANCE = 1e-5  # of a float32 softmax over up to thousands of classes


def prove_parity(
    session: onnxruntime.InferenceSession,
    reference: Callable[[Images], Logits],
    samples: Sequence[Images],
    temperature: float,
    num_labels: int,
    tolerance: float = 1e-3,
    against: str = "PyTorch",
) -> Parity:
    """Compare a session with PyTorch, or with what `against` names, on real images at batches 1, 2 and 16.

    At least 8 images go through at each batch size; single images keep their own sizes. A difference is
    measured against the largest absolute logit of `reference`; the class may differ only where its two best
    logits are closer than the tolerance. The probabilities are held to be softmax(logits / temperature).

    Raises:
        PackageError: beyond the tolerance, not finite, of another shape, or the graph does not run.
    """
    rows = []
    for size in PARITY_BATCHES:
        ours, theirs = [], []
        for images in _batches(samples, size):
            try:
                logits, probabilities = session.run(OUTPUTS, {INPUT: images})
            # ONNX Runtime's exceptions have no common base below Exception.
            except Exception as error:
                raise PackageError(
                    f"the exported graph does not run on images {list(images.shape)}: {first_line(error)}; "
                    f"{_MEND[against]}"
                ) from error
            _check_probabilities(logits, probabilities, temperature)
            ours.append(logits)
            theirs.append(np.asarray(reference(images), np.float32))
            if theirs[-1].shape != (len(images), num_labels) or logits.shape != theirs[-1].shape:
                raise PackageError(
                    f"{against}'s logits are {list(theirs[-1].shape)} and the graph's {list(logits.shape)}; "
                    f"accepted: [{len(images)}, {num_labels}], one column for each of the labels"
                )
        rows.append(_compare(np.concatenate(ours), np.concatenate(theirs), size, tolerance))
    parity = Parity(tolerance=tolerance, provider=session.get_providers()[0], rows=tuple(rows))
    if failure := parity.failure():
        raise PackageError(
            f"the exported graph does not compute what {against} does: {failure}; nothing was written: {_MEND[against]}"
        )
    return parity


def prove_providers(
    model: Path,
    reference: Callable[[Images], Logits],
    samples: Sequence[Images],
    temperature: float,
    num_labels: int,
    tolerance: float = 1e-3,
    against: str = "PyTorch",
    *,
    providers: Sequence[str] | None = None,
) -> tuple[Parity, ...]:
    """`prove_parity` on every provider beside the CPU that loads on this machine, opened as the server opens it.

    One that does not agree has no record and a warning in the log: the package is good on the others.
    """
    found = []
    for provider in onnxruntime.get_available_providers() if providers is None else providers:
        if providers is None and provider in _NOT_PROVEN:
            continue
        try:
            with _silence():
                session = open_on(Device(provider=provider), model)
        except PackageError:
            continue  # it is compiled in and its libraries, or the device, are missing here
        try:
            found.append(prove_parity(session, reference, samples, temperature, num_labels, tolerance, against))
        except PackageError as error:
            _LOG.warning("no parity on %s, and so no record of it: %s", provider, error)
    return tuple(found)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what ONNX Runtime and its search for CUDA's libraries say of a provider that does not load."""
    onnxruntime.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # ONNX Runtime's default


def _compare(ours: Logits, theirs: Logits, size: int, tolerance: float) -> ParityRow:
    """One row of the record, from logits [n, C]; a NaN makes it one that does not hold."""
    scale = max(float(np.abs(theirs).max()), float(np.finfo(np.float32).tiny))
    difference = float(np.abs(ours - theirs).max())
    differs = ours.argmax(axis=1) != theirs.argmax(axis=1)
    best = np.sort(theirs, axis=1)[:, -2:]
    tied = best[:, -1] - best[:, 0] < tolerance * scale
    return ParityRow(
        batch=size,
        num_images=len(ours),
        difference=difference,
        relative_difference=difference / scale,
        top1_agreement=float(1 - differs.mean()),
        num_disagreements=int((differs & ~tied).sum()),
    )


def _check_probabilities(logits: Logits, probabilities: Logits, temperature: float) -> None:
    exponents = logits.astype(np.float64) / temperature
    expected = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    off = max(float(np.abs(probabilities - expected).max()), float(np.abs(probabilities.sum(axis=1) - 1).max()))
    if not off <= _PROBABILITY_TOLERANCE:
        raise PackageError(f"the graph's probabilities are {off:.3g} away from softmax(logits / {temperature:g})")


def _batches(samples: Sequence[Images], size: int) -> Iterator[Images]:
    """8 images or `size`, as a new uint8 [size, H, W, 3] at a time: PyTorch takes no read-only array."""
    num_images = max(size, 8)
    if size == 1:
        yield from (samples[index % len(samples)][None].copy() for index in range(num_images))
    else:
        images = same_size(samples, num_images)
        yield from (images[start : start + size] for start in range(0, num_images, size))


def same_size(samples: Sequence[Images], num_images: int) -> Images:
    """Images of the commonest size, or else cropped to the smallest and repeated: uint8 [n, H, W, 3]."""
    shape, frequency = Counter(image.shape for image in samples).most_common(1)[0]
    if frequency >= num_images:
        return np.stack([image for image in samples if image.shape == shape][:num_images])
    chosen = samples[:num_images]
    height, width = (min(image.shape[axis] for image in chosen) for axis in (0, 1))
    cropped = []
    for image in chosen:
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        cropped.append(image[top : top + height, left : left + width])
    return np.stack([cropped[index % len(cropped)] for index in range(num_images)])
