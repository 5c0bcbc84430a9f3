"""From PyTorch to a package: the stages become one graph, the graph is proven and laid in its folder.

The only module of this room that imports torch. `headstart.serving.graph` cuts and joins ONNX graphs,
`headstart.serving.parity` compares the result with PyTorch.
"""

import copy
import datetime
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from headstart.serving.errors import PackageError, first_line
from headstart.serving.graph import MAX_INLINE_BYTES, OnnxStage, convert, cut, inlined, join, opsets, save
from headstart.serving.manifest import MANIFEST, Drift, Latency, Manifest
from headstart.serving.ort import onnxruntime
from headstart.serving.package import MODEL, digest, new_package, verify
from headstart.serving.parity import Images, Logits, prove_parity, prove_providers, same_size
from headstart.serving.runtime import Predictor, describe, measure_latency, open_session

__all__ = ["MAX_INLINE_BYTES", "OnnxStage", "export_graph", "export_package", "prove_parity"]

_SMALLEST_OPSET = 18  # the first whose Resize has antialias
_PROBES = (2, 3, 2)  # images in each of the batches that are traced


class _Chain(nn.Module):
    """Stages in a row; the last chain of a package ends in logits [N, C] and their probabilities [N, C]."""

    def __init__(self, stages: Sequence[nn.Module], temperature: float | None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.temperature = temperature

    def forward(self, batch: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        for stage in self.stages:
            batch = stage(batch)
        return batch if self.temperature is None else (batch, torch.softmax(batch / self.temperature, dim=1))


def export_package(
    directory: Path,
    *,
    name: str,
    stages: Sequence[nn.Module | OnnxStage],
    labels: Sequence[str],
    temperature: float,
    reference: Callable[[Images], Logits],
    samples: Sequence[Images],
    preprocessing: Mapping[str, Any],
    licence: str,
    provenance: Mapping[str, Any],
    drift: Drift | None = None,
    opset: int = 20,
    tolerance: float = 1e-3,
    latency_runs: int = 0,
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> Manifest:
    """Write the package `directory`, or raise and leave what was there.

        export_package(
            Path("runs/demo/package"), name="demo", stages=[preprocess, backbone, head],
            labels=["cat", "dog"], temperature=1.2, samples=validation_images,
            reference=lambda images: model(torch.from_numpy(images)).numpy(), licence="BSD-3-Clause",
            preprocessing={"resize": 256, "crop": 224}, provenance={"recipe": fingerprint},
        )

    Args:
        directory: the package's folder; an earlier package there is replaced, anything else is refused.
        name: the run's name.
        stages: their composition takes images uint8 [N, H, W, 3] to logits [N, C]; copied to the CPU, in eval
            mode.
        labels: C distinct class names.
        temperature: probabilities = softmax(logits / temperature).
        reference: PyTorch's own answer, images uint8 [n, H, W, 3] -> logits float32 [n, C].
        samples: real validation images, uint8 [H, W, 3], of any sizes.
        preprocessing: what the first stage does, for the manifest.
        licence: licence of the weights as found.
        provenance: fingerprints for the manifest; the versions of the libraries are added.
        drift: moments of the training images' features; with it the graph also gives `features`, float32 [batch, D]:
            what the last stage takes.
        opset: of the graph; raised to that of an ONNX stage that is newer.
        tolerance: bound on the difference of a logit, relative to the largest absolute logit; at most 0.5.
        latency_runs: timed calls for the manifest's latency record; 0 leaves it out.
        max_inline_bytes: weights beyond this go to `model.onnx.data`.

    Raises:
        PackageError: the stages cannot be exported or joined, or the graph does not compute what `reference`
            does.
        ValueError: an argument that cannot be.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; accepted: a number above 0")
    if opset < _SMALLEST_OPSET:
        raise ValueError(f"opset is {opset}; accepted: {_SMALLEST_OPSET} or newer, whose Resize has antialias")
    if not samples or any(image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 for image in samples):
        raise ValueError("samples must be at least one uint8 image [H, W, 3]")
    if not labels or len(set(labels)) != len(labels):
        raise ValueError(f"labels are {list(labels)}; accepted: distinct names")
    num_features = len(drift.mean) if drift else None
    graph = export_graph(stages, temperature, same_size(samples, 2), len(labels), opset, num_features)
    with new_package(directory) as folder:
        save(graph, folder / MODEL, max_inline_bytes)
        session = open_session(folder / MODEL)
        proof = reference, samples, temperature, len(labels), tolerance
        manifest = Manifest(
            name=name,
            inputs=describe(session.get_inputs()),
            outputs=describe(session.get_outputs()),
            labels=tuple(labels),
            preprocessing=dict(preprocessing),
            temperature=float(temperature),
            parity=prove_parity(session, *proof),
            provider_parity=prove_providers(folder / MODEL, *proof),
            drift=drift,
            licence=licence,
            provenance={**provenance, "versions": _versions(graph)},
            files={path.name: digest(path) for path in sorted(folder.iterdir())},
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        del session
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if latency_runs:
            manifest = replace(manifest, latency=_latency(folder, samples[0], latency_runs))
            (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return verify(folder)


def export_graph(
    stages: Sequence[nn.Module | OnnxStage],
    temperature: float,
    sample: Images,
    num_labels: int,
    opset: int = 20,
    num_features: int | None = None,
) -> onnx.ModelProto:
    """One graph of all stages: `images` uint8 [batch, height, width, 3] -> `logits`, `probabilities`, maybe `features`.

    Neighbouring modules are exported together; ONNX stages are cut out of their files, brought to the common
    opset and joined. Nothing in the graph tells of the machine it was exported on.

    Three batches of different sizes are traced through the stages, and what differs between them is free in
    the graph. The modules up to where the images' size stops to matter, the preprocessing, are exported apart
    from the backbone: in one piece torchvision's ViT, DenseNet and ConvNeXt fail on the symbolic sizes
    (PyTorch 2.15), and MobileNetV2 takes 13 s for 8.6. So give the preprocessing as a stage of its own.

    Args:
        stages: see `export_package`.
        temperature: of the probabilities.
        sample: uint8 [2, H, W, 3].
        num_labels: C.
        opset: the smallest to use.
        num_features: D, where what the last stage takes is to be the output `features`, float32 [batch, D].
    """
    if not stages:
        raise ValueError("stages is empty; accepted: modules and ONNX stages from images to logits")
    cuts = {index: cut(stage) for index, stage in enumerate(stages) if isinstance(stage, OnnxStage)}
    opset = max([opset, *(opsets(graph)[""] for graph in cuts.values())])
    probes = _probes(sample)
    pieces: list[_Piece] = []
    for index, stage in enumerate(stages):
        if isinstance(stage, OnnxStage):
            pieces.append(_Piece(probes=probes, graph=convert(cuts[index], opset, stage)))
        else:
            apart = num_features is not None and index == len(stages) - 1
            if not pieces or apart or pieces[-1].graph or _is_free(pieces[-1].probes) != _is_free(probes):
                pieces.append(_Piece(probes=probes))
            pieces[-1].modules.append(copy.deepcopy(stage).cpu().eval())
        probes = [_pass(stage, pieces[-1], probe) for probe in probes]
    if any(tuple(probe.shape[1:]) != (num_labels,) for probe in probes):
        raise PackageError(
            f"the stages turn {_PROBES[0]} images into logits {list(probes[0].shape)}; "
            f"accepted: [{_PROBES[0]}, {num_labels}], one column for each of the labels"
        )
    head = len(pieces) - 1
    if num_features is not None:
        _check_features(pieces[head].probes[0], num_features)
    if pieces[-1].graph:
        pieces.append(_Piece(probes=probes))
    for piece in pieces:
        piece.graph = piece.graph or _export(piece, temperature if piece is pieces[-1] else None, opset)
    graphs = [piece.graph for piece in pieces if piece.graph]
    inputs = [(piece.probes[0].numpy().dtype, _sizes(piece.probes)) for piece in pieces]
    return join(graphs, inputs, opset, num_labels, head if num_features is not None else None)


@dataclass(kw_only=True)
class _Piece:
    """Stages that become one graph."""

    probes: list[torch.Tensor]
    """What the first of them takes, in every traced batch."""
    modules: list[nn.Module] = field(default_factory=list)
    """The stages, where they are modules."""
    graph: onnx.ModelProto | None = None
    """The cut of an ONNX file, or the exported modules."""


def _probes(sample: Images) -> list[torch.Tensor]:
    """Batches of real pixels in three sizes, one wider and one higher: uint8 [n, H, W, 3] each."""
    height, width = (min(size, 256) for size in sample.shape[1:3])
    sizes = ((height, width), (height + 3, 2 * width + 5), (2 * height + 5, width + 3))
    probes = []
    for num_images, (high, wide) in zip(_PROBES, sizes, strict=True):
        crop = np.resize(sample, (num_images, *sample.shape[1:]))[:, :high, :wide]
        margins = ((0, 0), (0, high - crop.shape[1]), (0, wide - crop.shape[2]), (0, 0))
        probes.append(torch.from_numpy(np.pad(crop, margins, mode="edge")))
    return probes


def _sizes(probes: Sequence[torch.Tensor]) -> list[int | str]:
    """Sizes of the axes; a word where they differ between the probes."""
    shapes = [tuple(probe.shape) for probe in probes]
    if len({len(shape) for shape in shapes}) > 1:
        raise PackageError(f"a stage gives shapes {shapes}; accepted: one number of axes for images of any size")
    axes = enumerate(zip(*shapes, strict=True))
    return ["batch" if axis == 0 else sizes[0] if len(set(sizes)) == 1 else f"size{axis}" for axis, sizes in axes]


def _is_free(probes: Sequence[torch.Tensor]) -> bool:
    """Whether the size of the images still matters."""
    return any(isinstance(size, str) for size in _sizes(probes)[1:])


def _pass(stage: nn.Module | OnnxStage, piece: _Piece, probe: torch.Tensor) -> torch.Tensor:
    """The output of a stage, the newest of `piece`, for one traced batch."""
    try:
        if piece.graph:
            session = open_session(piece.graph.SerializeToString())
            output = torch.from_numpy(session.run(None, {piece.graph.graph.input[0].name: probe.numpy()})[0])
        else:
            with torch.no_grad():
                output = piece.modules[-1](probe)
        if not isinstance(output, torch.Tensor) or output.ndim < 1 or len(output) != len(probe):
            raise TypeError("its output is not a tensor with a row for each image")
    # A module may raise anything, and ONNX Runtime's exceptions have no common base below Exception.
    except Exception as error:
        name = str(stage.path) if isinstance(stage, OnnxStage) else type(stage).__name__
        raise PackageError(
            f"the stage {name} cannot take the {probe.dtype} {list(probe.shape)} before it: {first_line(error)}; "
            f"accepted: stages that lead from images of any size, uint8 [N, H, W, 3], to logits [N, C]"
        ) from error
    return output


def _check_features(probe: torch.Tensor, num_features: int) -> None:
    if probe.dtype != torch.float32 or tuple(probe.shape[1:]) != (num_features,):
        raise PackageError(
            f"the last stage takes {probe.dtype} {list(probe.shape)}; accepted, to record drift: features float32 "
            f"[{len(probe)}, {num_features}], as many as the drift record has means"
        )


def _export(piece: _Piece, temperature: float | None, opset: int) -> onnx.ModelProto:
    """The graph of a piece of modules."""
    free = {axis: torch.export.Dim(size) for axis, size in enumerate(_sizes(piece.probes)) if isinstance(size, str)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's remarks on its own workings
            program = torch.onnx.export(
                _Chain(piece.modules, temperature).eval(),
                (piece.probes[0],),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(free,),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        root: BaseException = error
        while root.__cause__ is not None:  # the exporter wraps the reason in pages of advice
            root = root.__cause__
        raise PackageError(
            f"PyTorch cannot export the model to ONNX: {first_line(root)}; choose another architecture, or "
            f"mend the model so that torch.onnx.export(dynamo=True) takes it"
        ) from error
    if program is None:
        raise PackageError("PyTorch exported no graph; accepted: what torch.onnx.export(dynamo=True) takes")
    return inlined(program.model_proto)


def _latency(folder: Path, image: Images, runs: int) -> Latency:
    predictor = Predictor(folder)
    predictor.warm_up()
    return measure_latency(predictor, image, runs)


def _versions(graph: onnx.ModelProto) -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "opset": str(opsets(graph)[""]),
    }
