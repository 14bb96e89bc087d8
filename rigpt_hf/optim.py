"""
An optimizer without a preferred basis: training from a rotated start is the rotated training.

How a parameter is treated follows from how it turns (`frames.py`):

    polar      matrices between two frames: momentum, then the polar factor, as in Muon; of each head by itself
    rows       tables whose rows are vectors of a frame: Adam with one second moment per row
    vectors    biases of a frame: Adam with one second moment per vector, i.e. per head or for the stream
    elements   what does not rotate (λ, frequencies, biases of neurons): Adam

Every one of these commutes with rotations and permutations of all frames. Stretches, which no norm survives, are
not covered: of those weight decay takes care (`symmetry/conservation.py`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from .configuration_rigpt import RiGPTConfig
from .frames import table_of
from .polar import exact_polar, newton_schulz
from .workshare import agreeing_group, group_of_shards, local_like, shared_work, whole


Treatment = Literal["polar", "rows", "vectors", "elements"]
TREATMENTS: tuple[Treatment, ...] = ("polar", "rows", "vectors", "elements")
POLAR_METHODS = ("newton_schulz", "svd")
SHARING = ("auto", "all", "none")
# The root mean square of AdamW's updates in units of its learning rate, measured in language models (Liu et al., arXiv
# 2502.16982): with it, learning rates and weight decays of AdamW carry over.
ADAMW_RMS = 0.2


@dataclass(frozen=True)
class Rule:
    """
    How a parameter is updated.

    Args:
        treatment: One of `TREATMENTS`.
        blocks: Into how many parts it falls that are treated by themselves, one per head.
        dim: The axis along which it falls into them.
    """

    treatment: Treatment
    blocks: int = 1
    dim: int = 0


def treatment_of(config: Any, name: str) -> Rule:
    """
    How the parameter `name` is updated, read from the table of frames.

    Raises:
        ValueError: if the table of frames has no such parameter.
    """
    table = table_of(config)
    # How many vectors each axis holds, each of a frame of its own; 0 if it holds none.
    parts = [0] * table.rank(name)
    for turned in table.turns(name):
        if turned.role in ("vector", "covector"):
            parts[turned.dim] = table.frames[turned.key].copies
        elif parts[turned.dim] and turned.role == "query":
            parts[turned.dim] = table.frames[turned.key].group.count("query")
    if len(parts) == 1:
        return Rule("vectors", parts[0]) if parts[0] else Rule("elements")
    if len({turned.dim for turned in table.turns(name)}) < len(parts):
        return Rule("rows")
    # Neurons only change places, but a matrix from or to a frame has them on its other side.
    dim = 1 if parts[1] > max(parts[0], 1) else 0
    return Rule("polar", max(parts[dim], 1), dim)


def equivariant_param_groups(
    model: nn.Module,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    *,
    multipliers: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """
    Groups of a model's trainable parameters by treatment, read from the table of frames.

    Weight decay applies to matrices and tables; vectors and single numbers have none, as is usual.

    Args:
        model: A RiGPT, also as DDP, FSDP2 or `torch.compile` wrap it.
        lr: Learning rate as one would give it to AdamW.
        weight_decay: Decoupled, as a rate: a step takes `lr · weight_decay` of the weights away.
        multipliers: What `lr` is multiplied by, by treatment (`"rows"`) or by the end of a parameter's name
            (`"distance_weight"`) or module (`"embed_tokens"`), which go first; 1 if not given.

    Raises:
        ValueError: if the model is no RiGPT, the table of frames lacks a parameter, or `multipliers` names nothing
            that there is.
    """
    config = config_of(model)
    # By name, as a class that came with a checkpoint's own code is another one.
    if not any(getattr(kind, "model_type", None) == RiGPTConfig.model_type for kind in type(config).__mro__):
        raise ValueError(
            f"`model` must be a RiGPT, got a {type(model).__name__} with a {type(config).__name__}, which is not in "
            "the table of frames. Convert it with `rigpt convert`, or use another optimizer."
        )
    multipliers = dict(multipliers or {})
    unused = set(multipliers)
    groups: dict[tuple[Rule, float], dict[str, Any]] = {}
    for wrapped, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = unwrapped_name(wrapped)
        rule = treatment_of(config, name)
        pieces = name.split(".")[-2:]  # module and parameter
        key = next((piece for piece in reversed(pieces) if piece in multipliers), rule.treatment)
        unused -= {*pieces, rule.treatment}
        factor = multipliers.get(key, 1.0)
        group = groups.setdefault(
            (rule, factor),
            {
                "params": [],
                "names": [],
                "shapes": [],
                "treatment": rule.treatment,
                "blocks": rule.blocks,
                "dim": rule.dim,
                "lr": lr * factor,
                "weight_decay": weight_decay if rule.treatment in ("polar", "rows") else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
        group["shapes"].append(list(parameter.shape))
    if unused - set(TREATMENTS):
        raise ValueError(
            f"`multipliers` must be keyed by {', '.join(TREATMENTS)} or modules of the model, got "
            f"{', '.join(sorted(unused - set(TREATMENTS)))}. Take names such as embed_tokens or q_proj."
        )
    return list(groups.values())


def config_of(model: nn.Module) -> Any:
    """The configuration of a model, whatever is wrapped around it."""
    while not hasattr(model, "config"):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise ValueError(
                f"`model` must be a RiGPT, got a {type(model).__name__} without a configuration. Pass the model."
            )
        model = inner
    return model.config


def unwrapped_name(name: str) -> str:
    """The name of a parameter without what DDP, `torch.compile` and activation checkpointing put into it."""
    wrappers = ("module", "_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(piece for piece in name.split(".") if piece not in wrappers)


class EquivariantOptimizer(torch.optim.Optimizer):
    """
    Updates that turn along with the frames of a RiGPT: polar factors for matrices, Adam with shared second moments for
    the rest. An ordinary optimizer otherwise: state dicts, closures, schedulers, learning rates that are tensors.

    Under FSDP2, and under DDP with `sharing="all"`, the polar factors, which all processes need, are shared among
    them. DeepSpeed and FSDP1 hand out flat pieces of parameters, which have no polar factor: they end in an error.

    Args:
        params: What [`equivariant_param_groups`] gives.
        lr: Learning rate of groups that have none of their own, in AdamW's usual units: updates of matrices are scaled
            to the root mean square that AdamW's have.
        momentum: Of matrices, with Nesterov's correction.
        betas: Of Adam's first and second moments.
        eps: Added to the root of second moments.
        weight_decay: Of groups that have none of their own; decoupled.
        polar: `"newton_schulz"`, or `"svd"`: exact, slow, for tests.
        steps: Iterations of Newton–Schulz.
        sharing: `"auto"`: share work among the processes that hold the shards of FSDP2; `"all"`: also among all
            processes of the default group where they are about to do the same, as under DDP. Every step asks all of
            them, so all must step equally often: not for ensembles, sweeps and pipeline stages, whose processes would
            wait for each other for ever. `"none"`: every process does all of it.

    Raises:
        ValueError: if a group does not say its treatment, or a number is out of its range.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        polar: str = "newton_schulz",
        steps: int = 5,
        sharing: str = "auto",
    ):
        for name, value, valid, rule in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
            ("eps", eps, eps > 0, "positive"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("polar", polar, polar in POLAR_METHODS, f"one of {', '.join(POLAR_METHODS)}"),
            ("steps", steps, steps >= 1, "at least 1"),
            ("sharing", sharing, sharing in SHARING, f"one of {', '.join(SHARING)}"),
        ):
            if not valid:
                raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "polar": polar,
            "steps": steps,
            "sharing": sharing,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for every optimizer; the group must say its treatment."""
        if not isinstance(param_group, dict) or param_group.get("treatment") not in TREATMENTS:
            raise ValueError(
                "`params` must be groups that say how their parameters turn, got one without a `treatment`. Pass "
                "`equivariant_param_groups(model)`, not `model.parameters()`."
            )
        param_group.setdefault("blocks", 1)
        param_group.setdefault("dim", 0)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One update; `closure` recomputes the loss, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check()
        matrices = [group for group in self.param_groups if group["treatment"] == "polar"]
        self._step_matrices(matrices)
        for group in self.param_groups:
            if group["treatment"] != "polar":
                self._step_adam(group)
        return loss

    def _check(self) -> None:
        for group in self.param_groups:
            shapes = group.get("shapes") or [list(parameter.shape) for parameter in group["params"]]
            for parameter, shape in zip(group["params"], shapes, strict=True):
                if list(parameter.shape) != shape or (group["treatment"] == "polar" and parameter.dim() != 2):
                    raise ValueError(
                        f"`params` must have their own shapes, got {list(parameter.shape)} where a model has {shape}: "
                        "DeepSpeed's ZeRO and FSDP1 flatten parameters, and a flat piece has no frames to turn with. "
                        "Use DDP or FSDP2."
                    )
                if parameter.grad is not None and parameter.grad.is_sparse:
                    raise ValueError(
                        "`params` must have dense gradients, got a sparse one. Use `nn.Embedding(sparse=False)`."
                    )

    def _step_matrices(self, groups: list[dict[str, Any]]) -> None:
        stacks: dict[tuple, list[torch.Tensor]] = {}
        places: list[tuple[dict[str, Any], torch.Tensor, tuple, int]] = []
        for group in groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            buffers = [self._state(parameter, "momentum_buffer") for parameter in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            directions = torch._foreach_mul(buffers, group["momentum"])
            torch._foreach_add_(directions, gradients)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for parameter, direction in zip(parameters, directions, strict=True):
                blocks = into_blocks(whole(direction), group["blocks"], group["dim"])
                key = (*blocks.shape[1:], blocks.dtype, blocks.device, group["polar"], group["steps"])
                places.append((group, parameter, key, sum(len(part) for part in stacks.get(key, []))))
                stacks.setdefault(key, []).append(blocks)
        if not stacks:
            return
        # Whole matrices are large under FSDP2, so the parts go as soon as they are put together.
        factors = self._polar_factors({key: torch.cat(stacks.pop(key)) for key in list(stacks)})
        for group, parameter, key, start in places:
            size = ADAMW_RMS * max(key[:2]) ** 0.5
            blocks = factors[key][start : start + group["blocks"]]
            update = from_blocks(blocks, group["dim"]) * (group["lr"] * size)
            parameter.sub_(local_like(update, parameter))

    def _polar_factors(self, stacks: dict[tuple, torch.Tensor]) -> dict[tuple, torch.Tensor]:
        if dist.is_available() and dist.is_initialized():
            return self._shared_polar_factors(stacks)
        return {key: _polar_factor(stack, *key[-2:]) for key, stack in stacks.items()}

    @torch.compiler.disable
    def _shared_polar_factors(self, stacks: dict[tuple, torch.Tensor]) -> dict[tuple, torch.Tensor]:
        group = self._sharing_group(stacks)
        factors: dict[tuple, torch.Tensor] = {}
        # One collective holds one dtype, and all that a method has to do.
        for kind in dict.fromkeys(key[2:] for key in stacks):
            keys = [key for key in stacks if key[2:] == kind]
            function = partial(_polar_factor, method=kind[-2], steps=kind[-1])
            results = shared_work([stacks[key] for key in keys], function, group)
            factors.update(zip(keys, results, strict=True))
        return factors

    def _sharing_group(self, stacks: dict[tuple, torch.Tensor]) -> Any:
        """
        The processes that are about to compute the same factors; `None` if they do not, or are not to share.

        Only where they are known to step together is anything sent: having a process group says nothing, as
        ensembles, sweeps and pipeline stages have one too.
        """
        sharing = self.defaults["sharing"]
        if sharing == "none":
            return None
        polar = (group for group in self.param_groups if group["treatment"] == "polar")
        shards = group_of_shards([weight for group in polar for weight in group["params"] if weight.grad is not None])
        if shards is not None or sharing == "auto":
            return shards
        # One row of each matrix says as much as all of it, and is quickly sent.
        facts = [str([(tuple(stack.shape), stack.dtype, *key[-2:]) for key, stack in stacks.items()])]
        facts += [stack[:, 0].flatten().cpu().double().sum().item().hex() for stack in stacks.values()]
        return agreeing_group(" ".join(facts), next(iter(stacks.values())).device)

    def _step_adam(self, group: dict[str, Any]) -> None:
        first, second = group["betas"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            gradient = parameter.grad
            vectors = group["treatment"] == "vectors"
            # A vector may lie across the borders of shards; it is short, so it is put together.
            square = _shared_square(whole(gradient) if vectors else gradient, group)
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(gradient)
                state["exp_avg_sq"] = torch.zeros_like(square)
            step = state["step"].add_(1)
            state["exp_avg"].lerp_(gradient, 1 - first)
            state["exp_avg_sq"].lerp_(square, 1 - second)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            mean = state["exp_avg"] / (1 - first**step)
            root = (state["exp_avg_sq"] / (1 - second**step)).sqrt() + group["eps"]
            if vectors:
                mean = whole(mean).reshape(group["blocks"], -1)
            update = group["lr"] * (mean / root).reshape(parameter.shape)
            parameter.sub_(local_like(update, parameter))

    def _state(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def _polar_factor(stack: torch.Tensor, method: str, steps: int) -> torch.Tensor:
    return exact_polar(stack) if method == "svd" else newton_schulz(stack, steps)


def _shared_square(gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """The mean square over what turns together: `[V, 1]` of rows, `[blocks, 1]` of vectors, each of elements."""
    match group["treatment"]:
        case "rows":
            return gradient.square().mean(-1, keepdim=True)
        case "vectors":
            return gradient.reshape(group["blocks"], -1).square().mean(-1, keepdim=True)
        case _:
            return gradient.square()


def into_blocks(matrix: torch.Tensor, blocks: int, dim: int) -> torch.Tensor:
    """`[blocks, m, n]` from a matrix that falls into as many along one axis."""
    return torch.stack(matrix.chunk(blocks, dim))


def from_blocks(blocks: torch.Tensor, dim: int) -> torch.Tensor:
    """The matrix again."""
    return torch.cat(list(blocks), dim)
