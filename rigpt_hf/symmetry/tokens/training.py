"""Training among the weights that have a symmetry: what a loop needs, and a callback for `Trainer`."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ...frames import FrameKey
from ...optim import EquivariantOptimizer, config_of, full_tensor, shard_like, unwrapped_name, update_of
from .isotypic import EQUAL
from .representation import Representation
from .symmetry import TokenSymmetry


logger = logging.getLogger(__name__)


def recorded(config: Any) -> Representation | None:
    """The representation that a configuration has on record, as [`Representation.from_config`]; `None` without one."""
    if getattr(config, "token_symmetry", None) is None:
        return None
    return Representation.from_config(config)


def representation_of(model: nn.Module, symmetry: TokenSymmetry | None, kind: str) -> Representation | None:
    """
    The representation to train a model in: the one on its record if that is of this symmetry, else one that is chosen
    and put there; arguments as of [`Representation.choose`]. Without a symmetry to keep, none stays on the record.
    """
    config: Any = model.config
    known = recorded(config)
    if symmetry is None:
        if known is not None:
            logger.warning("The model has a symmetry on record, which training without `symmetry` does not keep.")
            config.token_symmetry = None
        return None
    if known is None or known.symmetry != symmetry:
        known = Representation.choose(config, symmetry, kind=kind)
        config.token_symmetry = known.to_config()
    return known


class SymmetricTraining:
    """
    Keeps the weights of a model in training among those that have a symmetry.

    `begin_`; in each step `project_gradients_` after the backward passes (and the reduction over processes, and
    `unscale_`) and before gradients are clipped; `end_step_` after the optimizer. Updates that turn with their frames
    stay then, up to rounding.

    Args:
        model: A RiGPT, also as DDP, FSDP2 or `torch.compile` wrap it; with shards all processes must do alike.
        representation: How it carries the symmetry; `None` does nothing at all.
        project_weights: Project weights at the end of steps too, so that any optimizer will do.

    Raises:
        ValueError: if the representation changes lengths, as after a stretch of the model.
    """

    def __init__(self, model: nn.Module, representation: Representation | None, project_weights: bool = False):
        self.project_weights, self.config = project_weights, config_of(model)
        self.parameters = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
        self._use(representation)

    def _use(self, representation: Representation | None) -> None:
        # Frames in which the group does more than exchange coordinates, up to signs.
        self._mixed: set[FrameKey] = set()
        for one in representation.turned if representation else ():
            for key, place, element in one.items():
                if (element - place.group.compact(element)).abs().max() > EQUAL:
                    raise ValueError(
                        "`representation` must keep lengths in training, got one that does not in the frame "
                        f"{str(key)!r}: the model was stretched or shifted. Train its canonical form."
                    )
                if (element - element.double().round()).abs().max() > EQUAL:
                    self._mixed.add(key)
        self._turn = self._undo = None
        if representation and representation.frame:
            # What is kept is a linear space, also in a frame that was reached by a translation.
            self._turn = representation.frame.linear()
            self._undo = self._turn.inverse()
            representation = Representation(representation.symmetry, representation.transformations, self._turn)
        self.representation = representation

    def begin_(self, optimizer: Any) -> None:
        """
        Bring the weights to the symmetry, each parameter with the norm that it had.

        Raises:
            ValueError: if steps of the optimizer leave it, see `check_optimizer`.
        """
        self.check_optimizer(optimizer)
        for name, parameter in self.parameters.items():
            if self.representation is not None:
                weight = full_tensor(parameter.detach())
                whole = self.representation.project_state({name: weight}, keep_norms=True)[name]
                parameter.detach().copy_(shard_like(whole, parameter))

    def resume_(self, config: Any, optimizer: Any) -> bool:
        """
        Go on with weights that are those of a checkpoint, in the representation that it has on record: irreducible
        ones are found numerically, so another machine would find others than the run began with.

        Args:
            config: Of the model in the checkpoint.
            optimizer: As of `begin_`.

        Returns:
            `bool`: whether it has this symmetry. If not, weights are brought to it, and moments do not fit.
        """
        known = recorded(config)
        if self.representation is None or known is None or known.symmetry != self.representation.symmetry:
            self.begin_(optimizer)
            return self.representation is None
        self._use(known)
        self.config.token_symmetry = config.token_symmetry
        self.check_optimizer(optimizer)
        return True

    def check_optimizer(self, optimizer: Any) -> None:
        """
        A `ValueError` if steps of an optimizer leave the symmetry: if it scales coordinates one by one which the
        representation mixes. Of an unknown optimizer that is assumed.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # as Accelerate wraps it
        if self.representation is None or self.project_weights or isinstance(optimizer, torch.optim.SGD):
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
        self._project_({name: p.grad for name, p in self.parameters.items() if p.grad is not None})

    def end_step_(self) -> None:
        """Replace the weights by the nearest that have the symmetry, if that was asked for."""
        if self.project_weights:
            self._project_(self.parameters)

    @torch.no_grad()
    def distance(self) -> float:
        """How far the weights are from having the symmetry, `|θ - Pθ| / |θ|`; 0 without one."""
        away, total = 0.0, 1e-300
        for name, parameter in self.parameters.items():
            if self.representation is not None:
                weight = full_tensor(parameter.detach()).double()
                away += float((weight - self.representation.project_state({name: weight})[name]).square().sum())
                total += float(weight.square().sum())
        return (away / total) ** 0.5

    @torch.no_grad()
    def _project_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.representation is None:
            return
        if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            self._project_whole_(self.representation, tensors)
            return
        for name, tensor in tensors.items():
            # Rows that stay rows are projected where they are; of the rest one is put together at a time.
            rowwise = self._turn is None and self.representation.axes(name, tensor.shape)[0] is None
            whole = tensor.to_local() if rowwise else full_tensor(tensor)
            if whole.numel():
                self._project_whole_(self.representation, {name: whole})
            if not rowwise:
                tensor.copy_(shard_like(whole, tensor))

    def _project_whole_(self, representation: Representation, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._turn is None or self._undo is None:
            representation.project_tensors_(tensors)
            return
        algebra = torch.promote_types(next(iter(tensors.values())).dtype, torch.float32)
        moved = self._undo.state_dict(tensors, algebra)
        representation.project_tensors_(moved)
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
        if state.global_step:
            self.training.check_optimizer(parts["optimizer"])
        else:
            self.training.begin_(parts["optimizer"])
        known = recorded(self.training.config)
        if known is None or known.symmetry != self.representation.symmetry:
            self.training.config.token_symmetry = self.representation.to_config()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Project gradients."""
        self.training.project_gradients_()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Project weights, if asked to."""
        self.training.end_step_()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **parts: Any) -> None:
        """Add the distance to an entry of the log."""
        if logs is not None and "loss" in logs:
            logs["symmetry_distance"] = state.log_history[-1]["symmetry_distance"] = self.training.distance()
