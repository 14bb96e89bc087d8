"""Training among the weights that have a symmetry: what a loop needs, and a callback for `Trainer`."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ...optim import EquivariantOptimizer, full_tensor, shard_like, unwrapped_name, update_of
from .filling import Filling
from .isotypic import EQUAL
from .representation import Representation
from .symmetry import TokenSymmetry


RECORD = "token_symmetry"


def record(representation: Representation, config: Any) -> None:
    """Write a representation, as it was chosen, into a model's configuration."""
    if representation.filling is None or representation.frame is not None:
        raise ValueError(
            "`representation` must be as `Representation.choose` or `filled` makes it, got another. Make it so."
        )
    content = {"symmetry": representation.symmetry.to_dict(), "filling": representation.filling.to_dict()}
    setattr(config, RECORD, content | {"frame": None})


def recorded(config: Any) -> Representation | None:
    """The representation that a configuration has on record; `None` without one."""
    if (content := getattr(config, RECORD, None)) is None:
        return None
    symmetry = TokenSymmetry.from_dict(content["symmetry"])
    return Representation.filled(config, symmetry, Filling.from_dict(content["filling"]))


def representation_of(model: nn.Module, symmetry: TokenSymmetry | None, kind: str) -> Representation | None:
    """
    The representation to train a model in: the one on its record if that is of this symmetry, else one that is chosen
    and put there; arguments as of [`Representation.choose`]. Without a symmetry to keep, none stays on the record.
    """
    config: Any = model.config
    known = recorded(config)
    if symmetry is None:
        if known is not None:
            warnings.warn("The model has a symmetry on record, which training without it does not keep.", stacklevel=2)
            setattr(config, RECORD, None)
        return None
    if known is None or known.symmetry != symmetry:
        known = Representation.choose(config, symmetry, kind=kind)
        record(known, config)
    return known


class SymmetricTraining:
    """
    Keeps the weights of a model in training among those that have a symmetry.

    Start with `symmetrize_`, call `project_gradients_` after the backward passes of a step (and the reduction over
    processes, and `unscale_`), before gradients are clipped. Updates that turn with their frames then stay.

    Args:
        model: A RiGPT, also as DDP, FSDP2 or `torch.compile` wrap it; with shards all processes must do alike.
        representation: How it carries the symmetry.
        project_weights: Whether the loop calls `project_weights_` after each step, so that any optimizer will do.

    Raises:
        ValueError: if the representation changes lengths, as after a stretch of the model.
    """

    def __init__(self, model: nn.Module, representation: Representation, project_weights: bool = False):
        self.representation, self.project_weights = representation, project_weights
        self.parameters = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
        frame = representation.frame
        # What is kept is a linear space, also in a frame that was reached by a translation.
        self._turn = None if frame is None else frame._linear()
        self._undo = None if self._turn is None else self._turn.inverse()
        # Frames in which the group does more than exchange coordinates, up to signs.
        self._mixed = set()
        for one in representation.turned:
            for key, place, element in one.items():
                if (element - place.group.compact(element)).abs().max() > EQUAL:
                    raise ValueError(
                        f"`representation` must keep lengths in training, got one that does not in the frame "
                        f"{str(key)!r}: the model was stretched or shifted. Train its canonical form."
                    )
                if (element - element.double().round()).abs().max() > EQUAL:
                    self._mixed.add(key)

    def check_optimizer(self, optimizer: Any) -> None:
        """
        A `ValueError` if steps of an optimizer leave the symmetry: if it scales coordinates one by one which the
        representation mixes. Of an unknown optimizer that is assumed.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # as Accelerate wraps it
        if self.project_weights or isinstance(optimizer, torch.optim.SGD):
            return
        names, table = {id(parameter): name for name, parameter in self.parameters.items()}, self.representation.table
        default = "polar" if isinstance(optimizer, torch.optim.Muon) else "coordinatewise"
        for group in optimizer.param_groups:
            rule = group.get("update_rule") if isinstance(optimizer, EquivariantOptimizer) else default
            for name in (names[id(parameter)] for parameter in group["params"]):
                keys = {turned.key for turned in table.turns(name)}
                if rule == "coordinatewise" != update_of(table, name).rule and keys & self._mixed:
                    raise ValueError(
                        f"`optim` must not scale coordinates that the symmetry mixes, got one that does "
                        f"({type(optimizer).__name__}, in {name}), whose steps leave it. Take the equivariant one, "
                        "`symmetry_kind` permutation, or `symmetry_project_weights`."
                    )

    def project_gradients_(self) -> None:
        """Replace all gradients by their parts that keep the symmetry."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self._project_(gradients)

    def project_weights_(self) -> None:
        """Replace all weights by the nearest that have the symmetry."""
        self._project_(self.parameters)

    @torch.no_grad()
    def symmetrize_(self) -> None:
        """The same in float64, each parameter with the norm that it had."""
        for name, parameter in self.parameters.items():
            whole = self.representation.project_state({name: full_tensor(parameter.detach())}, keep_norms=True)
            parameter.copy_(shard_like(whole[name], parameter))

    @torch.no_grad()
    def distance(self) -> float:
        """How far the weights are from having the symmetry, `|θ - Pθ| / |θ|`."""
        away = total = 0.0
        for name, parameter in self.parameters.items():
            weight = full_tensor(parameter.detach()).double()
            away += float((weight - self.representation.project_state({name: weight})[name]).square().sum())
            total += float(weight.square().sum())
        return (away / total) ** 0.5

    @torch.no_grad()
    def _project_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            self._project_whole_(tensors)
            return
        for name, tensor in tensors.items():
            # Rows that stay rows are projected where they are; of the rest one is put together at a time.
            rowwise = self._turn is None and self.representation.axes(name, tensor.shape)[0] is None
            whole = tensor.to_local() if rowwise else full_tensor(tensor)  # type: ignore[attr-defined]
            if whole.numel():
                self._project_whole_({name: whole})
            if not rowwise:
                tensor.copy_(shard_like(whole, tensor))

    def _project_whole_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._turn is None or self._undo is None:
            self.representation.project_tensors_(tensors)
            return
        algebra = torch.promote_types(next(iter(tensors.values())).dtype, torch.float32)
        moved = self._undo.state_dict(tensors, algebra)
        self.representation.project_tensors_(moved)
        for name, tensor in self._turn.state_dict(moved, algebra).items():
            tensors[name].copy_(tensor)


class SymmetryCallback(TrainerCallback):
    """
    Keeps a symmetry in `Trainer` and the trainers that come from it, and logs the distance from it.

    The trainer clips gradients before this projects them: by the norm that they had before, which is larger.

    Args:
        representation, project_weights: As of [`SymmetricTraining`]; the model's configuration gets the record.

    Raises:
        ValueError: when training begins, if the optimizer's steps leave the symmetry.
    """

    def __init__(self, representation: Representation, project_weights: bool = False):
        self.representation, self.project_weights = representation, project_weights

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Check the optimizer, and begin from symmetric weights; a run that goes on has them."""
        self.training = SymmetricTraining(parts["model"], self.representation, self.project_weights)
        self.training.check_optimizer(parts["optimizer"])
        known = recorded(parts["model"].config)
        if known is None or known.symmetry != self.representation.symmetry:
            record(self.representation, parts["model"].config)
        if not state.global_step:
            self.training.symmetrize_()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Project gradients."""
        self.training.project_gradients_()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Project weights, if asked to."""
        if self.project_weights:
            self.training.project_weights_()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **parts: Any) -> None:
        """Add the distance to an entry of the log."""
        if logs is not None and "loss" in logs:
            logs["symmetry_distance"] = state.log_history[-1]["symmetry_distance"] = self.training.distance()
