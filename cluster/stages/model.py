"""A model of a run: a source's backbone and a head on it; and heads on the disk."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from headstart.cluster.stages.context import Context
from headstart.trainer.backbones.backbone import Backbone
from headstart.trainer.errors import SourceError
from headstart.trainer.files import write_atomically
from headstart.trainer.recipe import Mode
from headstart.trainer.selection.sources import Candidate, find_source


@dataclass(frozen=True, kw_only=True)
class Model:
    """A backbone and the head on it: what is evaluated, exported and registered."""

    source: str
    mode: Mode
    backbone: Backbone
    head: nn.Linear

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [N, C] for features [N, D] of this model's backbone."""
        with torch.no_grad():
            logits: Tensor = self.head(features)
        return logits


def ranked_source(context: Context, name: str) -> Candidate:
    """Return a source of the ranking by its name; raises `SourceError` where it is not there as it was ranked."""
    ranked = context.run.result("rank")
    try:
        candidate = find_source(name, context.recipe.sources, context.cache)
        if ranked is not None and candidate.fingerprint != ranked["sources"][name]:
            raise SourceError("another one has its name by now: this run's heads are not for its features")
    except SourceError as error:  # the name of a user's own file has its digest in it
        raise SourceError(
            f"source {name} was taken away, or altered, since it was ranked. To rank again: "
            f"headstart run {context.run.path / 'recipe.yaml'} --out {context.run.path}"
        ) from error
    return candidate


def load_source(context: Context, name: str) -> Backbone:
    """Load a source of the ranking, as `ranked_source` finds it."""
    return ranked_source(context, name).load(context.cache)


def auditioned(context: Context, name: str) -> Model:
    """Return the frozen source with its best head: the model of mode `feature`."""
    head = load_head(context.run.private / "heads" / f"{name}.safetensors")
    return Model(source=name, mode="feature", backbone=load_source(context, name), head=head)


def save_head(path: Path, head: nn.Linear) -> None:
    """Store a head as safetensors: weight [C, D], bias [C]."""
    write_atomically(path, save({name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()}))


def load_head(path: Path) -> nn.Linear:
    """Read a head that `save_head` wrote."""
    state = load_file(path)
    head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
    head.load_state_dict(state)
    return head.eval()
