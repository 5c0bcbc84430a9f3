"""The manifest of a package: what it says of the model, its parity, its variant and its files.

`load_manifest` reads it strictly: a field that the schema does not know, or that is missing, is an error that names it.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.serving.errors import PackageError, brief
from headstart.serving.plain import parse_plain, read_plain

SCHEMA = 2
MANIFEST = "manifest.json"
MOST_BYTES = 1 << 24  # of a manifest, and of a signature: a hundred times what a thousand labels and features take
_MOST_PIXELS = 1 << 27  # of an image: more than Pillow opens; a server warms a model with images of that size
FEATURES = "features"
PARITY_BATCHES = (1, 2, 16)
MOST_TOLERANCE = 0.5  # that of int8, the widest; `export.tolerance` of a recipe ends at 0.1
VARIANTS = ("fp32", "fp16", "int8")
MEND = "export the run again: headstart export RUN"
_SINCE = {"variant": 2, "provider_parity": 2, "drift": 2}  # the schema that brought a field of the manifest


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output of the graph."""

    name: str
    """Its name in the graph."""
    dtype: str
    """NumPy's name of its type."""
    shape: tuple[int | str, ...]
    """Sizes; a word stands for a size that is free."""


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """PyTorch against ONNX Runtime on the same validation images at one batch size."""

    batch: int
    """Images in one call."""
    num_images: int
    """Images compared, in calls of `batch`."""
    difference: float
    """Largest absolute difference of a logit."""
    relative_difference: float
    """`difference` over the largest absolute logit of PyTorch."""
    top1_agreement: float
    """Share of the images whose largest logit is the same class."""
    num_disagreements: int
    """Images whose top class differs although the two best logits are further apart than the tolerance."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The proof that the graph computes what PyTorch, or for a variant the fp32 graph, computed."""

    tolerance: float
    """Bound on `relative_difference`."""
    provider: str
    """Execution provider of ONNX Runtime that was compared."""
    rows: tuple[ParityRow, ...]
    """One for each of the batch sizes 1, 2 and 16."""

    def failure(self) -> str:
        """What does not hold, or an empty string.

        A row holds where its relative difference is within the tolerance and no top class differs beyond a
        tie, on as many images as its batch at least: a server takes its word for batches of that size. The comparisons
        are written so that a NaN fails them.
        """
        if not 0 < self.tolerance <= MOST_TOLERANCE:
            return f"its tolerance is {self.tolerance:g}; accepted: above 0, up to {MOST_TOLERANCE:g}"
        missing = set(PARITY_BATCHES) - {row.batch for row in self.rows if row.num_images >= row.batch}
        if missing:
            return f"batch {min(missing)} was not compared"
        for row in self.rows:
            if not 0 < row.batch <= row.num_images:
                return f"batch {row.batch} was compared on {row.num_images} images; accepted: at least as many"
            if not (0 <= row.difference < math.inf and 0 <= row.top1_agreement <= 1):
                return (
                    f"at batch {row.batch} its difference is {row.difference:g} and its share of agreement "
                    f"{row.top1_agreement:g}; accepted: from 0, and 0 to 1"
                )
            if not 0 <= row.relative_difference <= self.tolerance:
                return (
                    f"at batch {row.batch} the logits differ by {row.relative_difference:.3g} of the largest "
                    f"logit, above the tolerance of {self.tolerance:g}"
                )
            if row.num_disagreements != 0:
                return f"at batch {row.batch} {row.num_disagreements} of {row.num_images} images change class"
        return ""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A prediction beside the bare call that it makes, interleaved on the exporting machine."""

    batch: int
    """Images in one call."""
    shape: tuple[int, ...]
    """Shape of the input, [N, H, W, 3]."""
    runs: int
    """Timed calls of each."""
    provider: str
    """Execution provider."""
    threads: int
    """Threads of the session; 0 is one per core."""
    predict_p50_ms: float
    """Median of `Predictor.predict` in milliseconds."""
    session_run_p50_ms: float
    """Median of `session.run` in milliseconds."""
    ratio: float
    """The first over the second."""

    def failure(self) -> str:
        """What cannot be, or an empty string."""
        if len(self.shape) == 4 and min(self.shape) > 0 and math.prod(self.shape[1:]) <= 3 * _MOST_PIXELS:
            return ""
        return f"its shape is {brief(repr(self.shape))}; accepted: images [N, H, W, 3] of at most {_MOST_PIXELS} pixels"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """In which arithmetic the graph computes, and what that costs in accuracy and saves in time."""

    name: str = "fp32"
    """`fp32`, `fp16` or `int8`."""
    accuracy: float | None = None
    """Share of labelled validation images that this graph has right; None for fp32, which nothing is compared with."""
    fp32_accuracy: float | None = None
    """The same of the fp32 graph on the same images."""
    max_loss: float | None = None
    """How far `accuracy` may lie below `fp32_accuracy`."""
    num_images: int = 0
    """Validation images that both were measured on."""
    calibration_images: int = 0
    """Training images whose activations gave int8 its ranges, and fp16 the proof that it can hold them."""
    latency_ms: float | None = None
    """Median of `session.run` on one image in milliseconds, where it was timed."""
    fp32_latency_ms: float | None = None
    """The same of the fp32 graph, timed in turns with this one."""

    def failure(self) -> str:
        """What does not hold, or an empty string; written so that a NaN fails."""
        if self.name not in VARIANTS:
            return f"its name is {brief(repr(self.name))}; accepted: {', '.join(VARIANTS)}"
        if not all(0 <= share <= 1 for share in (self.accuracy, self.fp32_accuracy) if share is not None):
            return (
                f"its accuracies are {self.accuracy} and, of fp32, {self.fp32_accuracy}; accepted: shares from 0 to 1"
            )
        if self.max_loss is not None and not 0 <= self.max_loss < 1:
            return f"its max_loss is {self.max_loss:g}; accepted: 0 up to 1"
        if min(self.num_images, self.calibration_images) < 0:
            return f"it has {self.num_images} validation and {self.calibration_images} calibration images"
        if self.name == "fp32":
            return ""
        if self.accuracy is None or self.fp32_accuracy is None or self.max_loss is None or self.num_images < 1:
            return f"{self.name} was not compared with fp32 on validation images"
        if not self.accuracy >= self.fp32_accuracy - self.max_loss - 1e-9:  # shares of a count, rounded
            return (
                f"{self.name} has {self.accuracy:.4f} of {self.num_images} validation images right and fp32 "
                f"{self.fp32_accuracy:.4f}: more than {self.max_loss:g} is lost"
            )
        return ""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The training images' features, for comparison with those of live images."""

    output: str = "features"
    """Output of the graph that gives features, float32 [batch, D]: what the head takes."""
    mean: tuple[float, ...]
    """Their mean, [D]."""
    spread: float
    """Root mean square distance of a training image's features from that mean."""
    num_images: int
    """Training images."""

    def failure(self) -> str:
        """What cannot be, or an empty string."""
        if self.output != FEATURES or not self.mean or self.num_images < 1 or not all(map(math.isfinite, self.mean)):
            return f"its output is {brief(repr(self.output))}, with {len(self.mean)} means of {self.num_images} images"
        return "" if 0 < self.spread < math.inf else f"its spread is {self.spread}; accepted: a number above 0"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a package says about itself."""

    schema: int = SCHEMA
    """Version of this layout."""
    name: str
    """The run's name."""
    inputs: tuple[Tensor, ...]
    """`images`, uint8 [batch, height, width, 3]."""
    outputs: tuple[Tensor, ...]
    """`logits` and `probabilities`, float32 [batch, C]; with a `drift` record also `features`, float32 [batch, D]."""
    labels: tuple[str, ...]
    """Class names in the order of the outputs' columns."""
    preprocessing: dict[str, Any]
    """What the graph does to the pixels; for reading only, since it is inside the graph."""
    temperature: float
    """probabilities = softmax(logits / temperature)."""
    variant: Variant = field(default_factory=Variant)
    """In which arithmetic the graph computes."""
    parity: Parity
    """Comparison of fp32 with PyTorch, of another variant with the fp32 graph, on the CPU provider."""
    provider_parity: tuple[Parity, ...] = ()
    """The same on every other provider that loaded where the package was made."""
    drift: Drift | None = None
    """The training images' features, where the graph gives features."""
    latency: Latency | None = None
    """Timing on the exporting machine, where it was taken."""
    licence: str
    """Licence of the weights as found, `not stated` where there is none."""
    provenance: dict[str, Any]
    """Fingerprints of the recipe, the data and the source, and `versions` of what made the graph."""
    files: dict[str, str]
    """SHA-256 of every other file of the package, by its path in the folder."""
    created: str
    """When, as ISO 8601 in UTC."""

    @property
    def proven_on(self) -> tuple[str, ...]:
        """Execution providers with a parity record."""
        return tuple(parity.provider for parity in (self.parity, *self.provider_parity))

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_manifest(directory: Path) -> Manifest:
    """Read `manifest.json`; the files it lists are not looked at.

    Raises:
        PackageError: there is no package, its manifest is damaged, or it is of a newer schema.
    """
    path = Path(directory) / MANIFEST
    try:
        content = read_plain(path, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise PackageError(
            f"{directory} is no package: it has no {MANIFEST}; give a folder that headstart export RUN wrote"
        ) from None  # of no error of the machine, which a server would wait for to pass
    except (OSError, ValueError) as error:
        raise PackageError(f"{path} cannot be read ({error}); {MEND}") from error
    try:
        document = parse_plain(content)
        schema = document.get("schema") if isinstance(document, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise PackageError(f"{path} has schema {schema}, this version reads {SCHEMA}; install a newer headstart")
        manifest: Manifest = _read(Manifest, document, "manifest")
    except ValueError as error:
        raise PackageError(f"{path} is damaged: {error}; {MEND}") from error
    return manifest


def _read(kind: Any, value: Any, where: str) -> Any:
    """Turn parsed JSON into `kind`, a dataclass or a field's type, or raise ValueError naming the place."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        schema = value.get("schema") if kind is Manifest else SCHEMA
        known = [one.name for one in dataclasses.fields(kind) if schema not in range(1, _SINCE.get(one.name, 1))]
        if unknown := sorted(set(value) - set(known)):
            raise ValueError(f"{where}.{brief(unknown[0])} is not known to schema {schema}")
        if missing := [name for name in known if name not in value]:
            raise ValueError(f"{where}.{missing[0]} is missing")
        hints = typing.get_type_hints(kind)
        return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in known})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], item, f"{where}.{brief(key)}") for key, item in value.items()}
    if origin is types.UnionType:
        chosen = [option for option in arguments if dataclasses.is_dataclass(option) and isinstance(value, dict)]
        return _read(chosen[0], value, where) if chosen else _scalar(arguments, value, where)
    if origin in (tuple, dict):
        raise ValueError(f"{where} is {brief(repr(value))}; accepted: {'a list' if origin is tuple else 'an object'}")
    return value if kind is Any else _scalar((kind,), value, where)


def _scalar(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, kinds):
        names = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(f"{where} is {brief(repr(value))}; accepted: {names}")  # noqa: TRY004 (it is a file's content)
    return value
