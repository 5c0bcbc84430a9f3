"""Variants of a package: the same model in fp16 or int8, each in a package of its own, refused where it loses accuracy.

    make_variant(
        "int8", Path("runs/demo/package"), Path("runs/demo/package-int8"), samples=validation_images,
        validation=zip(validation_images, labels), calibration=training_images, max_loss=0.01,
    )

`headstart.serving.arithmetic` converts the graph. Accuracy and parity are measured on the CPU provider, parity also on
others that load. The CPU has hardly any fp16 operators: ONNX Runtime computes fp16 graphs in fp32 there, from weights
rounded to fp16, so that only a GPU profits from them. Needs onnx and not torch.
"""

import datetime
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from headstart.serving.arithmetic import convert_body
from headstart.serving.errors import PackageError
from headstart.serving.graph import MAX_INLINE_BYTES, save
from headstart.serving.manifest import MANIFEST, SCHEMA, Manifest, Variant
from headstart.serving.ort import onnxruntime
from headstart.serving.package import MODEL, digest, new_package, verify
from headstart.serving.parity import Images, Logits, prove_parity, prove_providers
from headstart.serving.runtime import INPUT, OUTPUTS, Predictor, measure_latency, medians_ms, open_session

PARITY_TOLERANCES = {"fp16": 0.02, "int8": 0.5}
"""Largest difference of a logit from fp32, relative to the largest. Wide for int8, where it finds a conversion that
broke (at one batch size, say) and the accuracy on validation images is what decides."""

_TRIAL = """
import json, pathlib, sys
import numpy
from headstart.serving.runtime import INPUT, open_session
session = open_session(pathlib.Path(sys.argv[1]))
for _ in range(2):
    session.run(None, {INPUT: numpy.full([1, *json.loads(sys.argv[2])], 127, numpy.uint8)})
"""


def make_variant(
    name: str,
    source: Path,
    directory: Path,
    *,
    samples: Sequence[Images],
    validation: Iterable[tuple[Images, int]],
    calibration: Iterable[Images],
    max_loss: float,
    latency_runs: int = 0,
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> Manifest:
    """Write the variant `name` of the package `source` as the package `directory`, or raise and leave what was there.

    The manifest keeps the source's labels, licence, preprocessing, drift record and provenance, to which the SHA-256
    of the fp32 graph is added. Its parity is with the fp32 graph, within `PARITY_TOLERANCES`.

    Args:
        name: `fp16` or `int8`.
        source: an fp32 package.
        directory: the variant's folder; an earlier package there is replaced, anything else is refused.
        samples: real images for parity and timing, uint8 [H, W, 3], of any sizes.
        validation: images uint8 [H, W, 3] and the numbers of their labels; both graphs see each once.
        calibration: training images, uint8 [H, W, 3], whose activations give int8 its ranges and must not be too large
            for fp16.
        max_loss: how far the variant's accuracy may lie below that of fp32 on the same images.
        latency_runs: timed calls for the latency records; 0 leaves them out.
        max_inline_bytes: weights beyond this go to `model.onnx.data`.

    Raises:
        PackageError: the source is no fp32 package, the graph cannot be converted, or the variant loses too much.
        ValueError: an argument that cannot be.
    """
    if name not in PARITY_TOLERANCES:
        raise ValueError(f"name is {name!r}; accepted: {', '.join(PARITY_TOLERANCES)}")
    if not 0 <= max_loss < 1:
        raise ValueError(f"max_loss is {max_loss}; accepted: 0 up to 1")
    original = verify(source)
    if original.variant.name != "fp32":
        raise PackageError(f"{source} is {original.variant.name} itself; give the fp32 package that it is from")
    fp32 = open_session(source / MODEL)
    graph, calibration_images = convert_body(name, source / MODEL, calibration)
    with new_package(directory) as folder:
        save(graph, folder / MODEL, max_inline_bytes)
        try_out(folder / MODEL, samples[0].shape)
        session = open_session(folder / MODEL)
        accuracy, fp32_accuracy, num_images = _accuracies(session, fp32, validation)
        variant = Variant(
            name=name,
            accuracy=accuracy,
            fp32_accuracy=fp32_accuracy,
            max_loss=max_loss,
            num_images=num_images,
            calibration_images=calibration_images,
        )
        if failure := variant.failure():
            raise PackageError(f"{failure}; leave {name} out of export.variants, or raise export.max_loss")
        proof = _logits(fp32), samples, original.temperature, len(original.labels), PARITY_TOLERANCES[name], "fp32"
        manifest = replace(
            original,
            schema=SCHEMA,
            variant=variant,
            parity=prove_parity(session, *proof),
            provider_parity=prove_providers(folder / MODEL, *proof),
            latency=None,
            provenance={**original.provenance, "fp32": original.files[MODEL]},
            files={path.name: digest(path) for path in sorted(folder.iterdir())},
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if latency_runs:
            manifest = _timed(manifest, Predictor(folder), fp32, samples[0], latency_runs)
            (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return verify(folder)


def try_out(model: Path, shape: tuple[int, ...]) -> None:
    """Load a graph and run it twice, on a grey image uint8 [H, W, 3], in a process of its own.

    ONNX Runtime 1.31 ends with a segmentation fault while it optimises some converted graphs for a CPU (a vision
    transformer with Gelu in fp16): that must take down neither the run nor, later, a server.

    Raises:
        PackageError: that process was ended by a signal; other failures are for the caller to meet.
    """
    # -P: nothing is imported from the folder that the user is in.
    command = [sys.executable, "-P", "-c", _TRIAL, str(model), json.dumps(shape)]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode
    if code < 0:
        raise PackageError(
            f"ONNX Runtime {onnxruntime.__version__} crashes on the converted graph ({signal.Signals(-code).name}); "
            "leave this variant out of export.variants"
        )


def _logits(session: onnxruntime.InferenceSession) -> Callable[[Images], Logits]:
    def logits(images: Images) -> Logits:
        found: Logits = session.run(OUTPUTS[:1], {INPUT: images})[0]
        return found

    return logits


def _accuracies(
    session: onnxruntime.InferenceSession, fp32: onnxruntime.InferenceSession, images: Iterable[tuple[Images, int]]
) -> tuple[float, float, int]:
    """Shares of the images that each has right, and their number."""
    right = np.array(
        [[int(_logits(one)(image[None]).argmax()) == label for one in (session, fp32)] for image, label in images]
    )
    if not len(right):
        raise ValueError("validation is empty; accepted: at least one image with the number of its label")
    accuracy, fp32_accuracy = right.mean(axis=0)
    return float(accuracy), float(fp32_accuracy), len(right)


def _timed(
    manifest: Manifest, predictor: Predictor, fp32: onnxruntime.InferenceSession, image: Images, runs: int
) -> Manifest:
    """The manifest with its latency, and with that of both graphs timed in turns."""
    feed = {INPUT: image[None]}
    ours, theirs = medians_ms([partial(one.run, OUTPUTS, feed) for one in (predictor.session, fp32)], runs)
    return replace(
        manifest,
        latency=measure_latency(predictor, image, runs),
        variant=replace(manifest.variant, latency_ms=ours, fp32_latency_ms=theirs),
    )
