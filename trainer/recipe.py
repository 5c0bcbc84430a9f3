"""A run, written down: the dataclasses that a recipe's YAML file is read into.

Every field is documented by the string under it. Values that cannot be are refused in `__post_init__` with a
`ValueError` that names the field and what is accepted; `headstart.cluster.recipe_file` adds the path to it.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["auto", "feature", "finetune", "full", "scratch"]
Size = int | float | Literal["rest"]


# For pydantic, which reads recipes at the edge: no unknown keys, and no True where a count is asked for.
_STRICT = {"extra": "forbid", "strict": True}


def _require(condition: bool, field_name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{field_name} is {value!r}; accepted: {accepted}")


@dataclass(frozen=True, kw_only=True)
class Split:
    """How labelled images are divided; a count, a fraction of all images, or `rest`.

    Parts that the data brings win. Where it brings validation or test, what it lacks is carved from its training
    images, which keep all that is left; `rest` is then what all three sizes would leave of them.
    """

    __pydantic_config__ = _STRICT

    train: Size = 0.7
    """Images to learn from."""
    validation: Size = 0.15
    """Images that choose between sources, heads and modes."""
    test: Size = "rest"
    """Images that only the finished model sees."""

    def __post_init__(self) -> None:
        sizes = {"train": self.train, "validation": self.validation, "test": self.test}
        for name, size in sizes.items():
            if size == "rest":
                continue
            _require(not isinstance(size, bool), f"data.split.{name}", size, "a count, a fraction or rest")
            if isinstance(size, int):
                _require(size >= 1, f"data.split.{name}", size, "a count of at least 1")
            else:
                _require(0 < float(size) < 1, f"data.split.{name}", size, "a fraction between 0 and 1")
        rests = [name for name, size in sizes.items() if size == "rest"]
        _require(len(rests) <= 1, "data.split", rests, "`rest` for one part at most")
        fractions = sum(size for size in sizes.values() if isinstance(size, float))
        _require(
            fractions <= 1 + 1e-9,
            "data.split",
            fractions,
            "fractions that add up to 1 at most; set all three parts",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """The target task's labelled images."""

    __pydantic_config__ = _STRICT

    path: str
    """A folder of class folders, a .csv, a .npz, or a name such as `torchvision:CIFAR10`."""
    kind: Literal["images"] = "images"
    """What a sample is."""
    split: Split = field(default_factory=Split)
    """Used for the parts that the data does not bring."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What to do with files that are not readable images: refuse the run, or list and skip them."""

    def __post_init__(self) -> None:
        _require(bool(self.path.strip()), "data.path", self.path, "a folder, a .csv, a .npz or a name")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Fine-tuning, and the control that is trained from a random initialisation."""

    __pydantic_config__ = _STRICT

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 32
    """Images a step, over all workers together; two or more for each."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: float = 3e-4
    """Peak rate of the backbone in modes `finetune` and `full`."""
    scratch_learning_rates: tuple[float, float, float] = (3e-4, 1e-3, 3e-3)
    """Peak rates tried by mode `scratch`; validation chooses."""
    weight_decay: float = 0.01
    """Decoupled for adamw, an L2 penalty for sgd; not applied to biases and norms."""
    warmup: float = 0.1
    """Share of the steps that ramp up linearly before the cosine comes down."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on CUDA devices that support it, fp32 elsewhere."""
    workers: int = 2
    """Processes under Ray Train, each with a GPU of its own where there are any: no more than there are GPUs.
    Without, each has a CPU."""

    def __post_init__(self) -> None:
        _require(1 <= self.epochs <= 10_000, "train.epochs", self.epochs, "1 to 10,000")
        _require(self.workers >= 1, "train.workers", self.workers, "at least 1")
        _require(
            # One image a step has no variance for BatchNorm to divide by.
            self.batch_size >= 2 * self.workers and self.batch_size % self.workers == 0,
            "train.batch_size",
            self.batch_size,
            f"a multiple of train.workers ({self.workers}), with two images or more for each",
        )
        for name in ("learning_rate", "scratch_learning_rates"):
            value = getattr(self, name)
            rates = value if isinstance(value, tuple) else (value,)
            _require(all(0 < rate < 100 for rate in rates), f"train.{name}", value, "rates above 0 and below 100")
        _require(0 <= self.weight_decay < 1, "train.weight_decay", self.weight_decay, "0 up to 1")
        _require(0 <= self.warmup < 1, "train.warmup", self.warmup, "0 up to 1")


@dataclass(frozen=True, kw_only=True)
class Search:
    """The bank of linear heads that auditions a source: every combination is one head."""

    __pydantic_config__ = _STRICT

    learning_rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    """Rates of AdamW on scaled features, or of SGD as `train.optimizer` has it."""
    weight_decays: tuple[float, ...] = (1e-2, 0.3, 1.0, 3.0)
    """Decoupled weight decays."""
    seeds: tuple[int, ...] = (0,)
    """Initialisations."""
    epochs: int = 100
    """Passes over the cached training features."""
    batch_size: int = 64
    """Features a step."""

    def __post_init__(self) -> None:
        for name in ("learning_rates", "weight_decays", "seeds"):
            _require(len(getattr(self, name)) >= 1, f"search.{name}", getattr(self, name), "at least one value")
        _require(
            all(0 < rate < 100 for rate in self.learning_rates),
            "search.learning_rates",
            self.learning_rates,
            "rates above 0 and below 100",
        )
        _require(
            all(0 <= decay < math.inf for decay in self.weight_decays),
            "search.weight_decays",
            self.weight_decays,
            "finite, 0 or more",
        )
        _require(all(0 <= seed < 2**32 for seed in self.seeds), "search.seeds", self.seeds, "0 to 2**32 - 1")
        _require(1 <= self.epochs <= 100_000, "search.epochs", self.epochs, "1 to 100,000")
        _require(self.batch_size >= 1, "search.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The ONNX package."""

    __pydantic_config__ = _STRICT

    opset: int = 20
    """ONNX operator set, 18 (the first with antialiased resize) to 23."""
    tolerance: float = 1e-3
    """Largest difference of a logit between PyTorch and ONNX Runtime, relative to the largest logit."""
    features: bool = True
    """Whether the graph also gives the features, and the manifest the training features' mean, to watch for drift."""
    variants: tuple[Literal["fp16", "int8"], ...] = ()
    """Packages beside the fp32 one, smaller and in other arithmetic."""
    max_loss: float = 0.01
    """How far a variant's accuracy on the validation images may lie below that of fp32."""

    def __post_init__(self) -> None:
        _require(18 <= self.opset <= 23, "export.opset", self.opset, "18 to 23")
        _require(0 < self.tolerance <= 0.1, "export.tolerance", self.tolerance, "above 0, up to 0.1")
        distinct = len(set(self.variants)) == len(self.variants)
        _require(distinct, "export.variants", self.variants, "each once at most")
        _require(0 <= self.max_loss < 1, "export.max_loss", self.max_loss, "0 up to 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run's numbers."""

    __pydantic_config__ = _STRICT

    name: str
    """Names the run, its directory and the source task it becomes."""
    data: Data
    sources: Literal["all"] | tuple[str, ...] = "all"
    """`all`, or names and specs: NAME, torchvision:ARCH, file:PATH#ARCH, onnx:PATH, source:PATH."""
    shortlist: int = 50
    """With `all`, how many finished runs get an audition at most: those nearest by energy distance."""
    seed: int = 0
    """Decides splits, initialisations, orders and resamples."""
    mode: Mode = "auto"
    """`auto` chooses between feature and finetune on validation."""
    train: Train = field(default_factory=Train)
    search: Search = field(default_factory=Search)
    export: Export = field(default_factory=Export)

    def __post_init__(self) -> None:
        accepted = "up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit"
        legal = self.name[:1].isalnum() and all(c.isalnum() or c in "._-" for c in self.name) and len(self.name) <= 100
        _require(legal and self.name.isascii(), "name", self.name, accepted)
        _require(self.sources == "all" or len(self.sources) >= 1, "sources", self.sources, "all, or at least one")
        _require(self.shortlist >= 0, "shortlist", self.shortlist, "0 or more")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
