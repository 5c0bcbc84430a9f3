"""Tensors out of a weights file and into a module, strictly.

Nothing of a file is run: safetensors are read as they are, anything else by `torch.load(weights_only=True)`
and turned into safetensors once. What does not fit the architecture, or is not finite, is refused by name.
"""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from headstart.trainer.backbones.architectures import Architecture
from headstart.trainer.backbones.weights import WeightsFile, locked
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.files import write_atomically

_SHOWN = 3  # mismatching tensors of each kind that an error names


def read_tensors(weights: WeightsFile, cache: Path) -> dict[str, Tensor]:
    """Return the tensors of a verified file by name, on the CPU.

    A torch file may be a state dict or hold one under `state_dict` or `model`; a `module.` before every name,
    which DataParallel leaves, is taken off. It is converted once, to
    `<cache>/weights/<digest>-<name>.safetensors`, which is used later if it still holds the same tensors.
    Raises `SourceError` for anything else.
    """
    if weights.path.suffix == ".safetensors":
        try:
            return dict(load_file(weights.path))
        except SafetensorError as error:
            raise SourceError(f"{weights.path} is no safetensors file: {error}") from error
    prefix = f"{weights.sha256[:16]}-"
    converted = cache / "weights" / f"{prefix}{weights.path.stem.removeprefix(prefix)}.safetensors"
    tensors = _converted(converted, weights.sha256)
    if tensors is None:
        tensors = _state_dict(weights.path)
        _convert(tensors, converted, weights.sha256)
    return tensors


def tensors_fingerprint(tensors: Mapping[str, Tensor], *identity: str) -> str:
    """Return the SHA-256 over `identity` and every tensor's name, type, shape and bytes, in the order of
    names."""
    digest = hashlib.sha256("\n".join(identity).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], architecture: Architecture, origin: str) -> None:
    """Copy published tensors into `module`; every tensor of both must be accounted for.

    Raises `SourceError` naming the first missing, unexpected and misshapen tensors, or one with NaN or
    infinity.
    """
    own = {name: tensor for key, tensor in tensors.items() if (name := architecture.own_name(key)) is not None}
    wanted = module.state_dict()
    # Files from before torch 0.4 do not count batches; the count plays no part in the features.
    missing = [name for name in wanted if name not in own and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in own if name not in wanted]
    shapes = [
        f"{name} {list(own[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in own and own[name].shape != tensor.shape
    ]
    faults = [
        f"{kind}: {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if faults:
        raise SourceError(
            f"{origin} does not fit {architecture.name}: {'; '.join(faults)}. Name the architecture that "
            "these weights were made with"
        )
    for name, tensor in own.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SourceError(f"{origin} has NaN or infinite values in tensor {name}; use weights of a sound training")
    module.load_state_dict({**wanted, **own})


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        # PyTorch's own advice comes first: to read the file without protection, which none should take.
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        reason = said.splitlines()[0].partition(". ")[0]
        raise SourceError(
            f"{path} cannot be read as weights alone ({reason}); save model.state_dict(), or a safetensors file"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise SourceError(f"{path} holds no state dict; save model.state_dict(), or {{'state_dict': ...}}")
    names = [str(name) for name in content]
    prefix = "module." if all(name.startswith("module.") for name in names) else ""
    return {
        name.removeprefix(prefix): tensor.detach().clone().contiguous()
        for name, tensor in zip(names, content.values(), strict=True)
    }


def _converted(path: Path, origin: str) -> dict[str, Tensor] | None:
    """Return the tensors of an earlier conversion; None where there is none or it no longer is what was
    written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = dict(load_file(path))
    except (SafetensorError, OSError):
        return None
    sound = metadata.get("origin") == origin and metadata.get("tensors") == tensors_fingerprint(tensors)
    return tensors if sound else None


def _convert(tensors: Mapping[str, Tensor], path: Path, origin: str) -> None:
    try:
        with locked(path):
            metadata = {"origin": origin, "tensors": tensors_fingerprint(tensors)}
            write_atomically(path, save(dict(tensors), metadata))
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error}; free space there, or set HEADSTART_CACHE to another disk's folder"
        ) from error
