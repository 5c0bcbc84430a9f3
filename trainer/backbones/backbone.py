"""A backbone ready to use: images in, pooled features [N, D] out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from headstart.trainer.backbones.architectures import Architecture, build_architecture, find_architecture
from headstart.trainer.backbones.card import SourceCard
from headstart.trainer.backbones.onnx_graph import GRAPH_VERSION, OnnxGraph, cut_graph
from headstart.trainer.backbones.tensors import load_tensors, read_tensors, tensors_fingerprint
from headstart.trainer.backbones.weights import WeightsFile, fetch_weights
from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing

__all__ = ["Backbone", "build_architecture", "load_backbone"]


@dataclass(kw_only=True, eq=False)
class Backbone:
    """A source's feature extractor with its own preprocessing.

    backbone = load_backbone(card, cache)
    features = backbone.features(backbone.preprocess(images))  # uint8 [N, H, W, 3] -> float32 [N, D]
    """

    name: str
    """The source card's."""
    architecture: str
    """The card's; for a graph with the tensor that was found."""
    module: nn.Module | None
    """Pixels [N, C, S, S] float32 -> [N, D]; in eval mode when loaded, None for a graph."""
    preprocessing: Preprocessing
    """The card's."""
    num_features: int
    """D."""
    fingerprint: str
    """SHA-256 over the weights' bytes, the architecture and the version of its layer and pooling."""
    onnx: OnnxGraph | None = None
    """The graph, where there is no module."""
    preprocess: Preprocess = field(init=False, repr=False)
    """uint8 [N, H, W, 3] -> pixels [N, C, S, S] float32."""

    def __post_init__(self) -> None:
        self.preprocess = Preprocess(self.preprocessing)

    @property
    def tunable(self) -> bool:
        """Whether there is a module to train; a graph serves mode `feature` alone."""
        return self.module is not None

    @property
    def graph(self) -> Path | None:
        """The file of the ONNX graph, for composition at export; None for a module."""
        return self.onnx.path if self.onnx is not None else None

    @property
    def input_name(self) -> str:
        """The graph's input; empty for a module."""
        return self.onnx.input_name if self.onnx is not None else ""

    @property
    def output_name(self) -> str:
        """The graph's output [N, D]; empty for a module."""
        return self.onnx.output_name if self.onnx is not None else ""

    @property
    def device(self) -> torch.device:
        """Where its features are computed: the first CUDA device for a module, where there is one."""
        return torch.device("cuda:0" if self.module is not None and torch.cuda.is_available() else "cpu")

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries that compute features, and of a GPU its name: their rounding follows from them."""
        found = {"torch": str(torch.__version__)}
        if self.device.type != "cpu":
            found["device"] = torch.cuda.get_device_name(self.device)
        if self.onnx is not None:
            import onnxruntime

            found["onnxruntime"] = onnxruntime.__version__
        return found

    def features(self, pixels: Tensor) -> Tensor:
        """Return float32 features [N, D] of pixels [N, C, S, S], without gradient.

        A module follows the pixels to their device and is left in eval mode; a graph runs and answers on the
        CPU.
        """
        if self.onnx is not None:
            return self.onnx(pixels)
        if self.module is None:
            raise TypeError("a backbone has a module or a graph")
        self.module.to(pixels.device).eval()
        with torch.no_grad():
            features: Tensor = self.module(pixels)
        return features.float()


def load_backbone(
    card: SourceCard,
    cache: Path,
    *,
    base: Path | None = None,
    unreachable: set[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Backbone:
    """Return the backbone that a card describes, its weights fetched into `cache` and verified.

    `base` is the card's folder, for weights that lie beside it; `unreachable` collects hosts that do not
    answer. Raises `SourceError` for an unknown architecture, weights that are missing, changed, not finite or
    of another architecture, and preprocessing that does not fit; `RunError` where the cache cannot be
    written.
    """

    def fetch() -> WeightsFile:
        return fetch_weights(card.weights, card.sha256, cache, base=base, unreachable=unreachable, progress=progress)

    if card.architecture.startswith("onnx:"):
        return _graph_backbone(card, fetch(), cache)
    architecture = find_architecture(card.architecture)
    architecture.check(card.preprocessing)  # before a download that would be in vain
    return _module_backbone(card, architecture, fetch(), cache)


def _graph_backbone(card: SourceCard, weights: WeightsFile, cache: Path) -> Backbone:
    graph = cut_graph(weights, card.architecture.removeprefix("onnx:"), card.preprocessing, cache)
    return Backbone(
        name=card.name,
        architecture=f"onnx:{graph.tensor}",
        module=None,
        preprocessing=card.preprocessing,
        num_features=graph.num_features,
        fingerprint=tensors_fingerprint({}, weights.sha256, graph.tensor, GRAPH_VERSION),
        onnx=graph,
    )


def _module_backbone(card: SourceCard, architecture: Architecture, weights: WeightsFile, cache: Path) -> Backbone:
    tensors = read_tensors(weights, cache)
    if any(name.startswith("backbone.") for name in tensors):  # of an earlier run: `backbone.` and `head.`
        tensors = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    with torch.random.fork_rng(devices=[]):  # the initialisation is overwritten: it must not move the run's own draws
        module = architecture.build().float().eval()  # whatever torch.set_default_dtype says
    load_tensors(module, tensors, architecture, card.weights)
    _trial(module, architecture, card.preprocessing)
    return Backbone(
        name=card.name,
        architecture=card.architecture,
        module=module,
        preprocessing=card.preprocessing,
        num_features=architecture.num_features,
        fingerprint=tensors_fingerprint(module.state_dict(), architecture.name, str(architecture.version)),
    )


def _trial(module: nn.Module, architecture: Architecture, preprocessing: Preprocessing) -> None:
    """Pass one black image through: the one sure test that an architecture takes this crop."""
    pixels = torch.zeros(1, preprocessing.channels, preprocessing.crop, preprocessing.crop, dtype=torch.float32)
    try:
        with torch.no_grad():
            features = module(pixels)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise SourceError(
            f"{architecture.name} cannot take crops of {preprocessing.crop} pixels "
            f"({str(error).splitlines()[0]}); set the card's preprocessing.crop to {architecture.crop}"
        ) from error
    if features.shape != (1, architecture.num_features):
        raise SourceError(
            f"{architecture.name} gives {list(features.shape)} for a crop of {preprocessing.crop} pixels, "
            f"not [1, {architecture.num_features}]; set the card's preprocessing.crop to {architecture.crop}"
        )
