"""
An optimizer without a preferred basis: training from a rotated start is the rotated training.

How a parameter is updated follows from how it turns (`rigpt_hf/frames.py`); the rules:

    polar           matrices between two frames: momentum, then the polar factor, as in Muon; of each head by itself
    rows            tables whose rows are vectors of a frame: Adam with one second moment per row
    vectors         biases of a frame: Adam with one second moment per vector, i.e. per head or for the stream
    coordinatewise  what does not rotate (λ, frequencies, biases of neurons): Adam

Every one of these commutes with rotations and permutations of all frames. Stretches, which no norm survives, are
not covered: of those weight decay takes care (`symmetry/conservation.py`).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .dealing import Box, Layout, boxes_of, inside
from .exchange import layout_of, map_blocks
from .groups import UPDATE_RULES
from .polar import COEFFICIENTS, exact_polar, newton_schulz, working_dtype
from .sharing import agreeing_group, full_tensor, local_like, shard_like, shared_work


POLAR_METHODS = (*COEFFICIENTS, "svd")
SHARING = ("auto", "all", "none")
# The root mean square of AdamW's updates in units of its learning rate, measured in language models (Liu et al., arXiv
# 2502.16982): with it, learning rates and weight decays of AdamW carry over.
ADAMW_RMS = 0.2


class Sharded(NamedTuple):
    """A matrix in shards, its group, and the local shards of its gradient and momentum."""

    group: dict[str, Any]
    parameter: DTensor
    gradient: torch.Tensor
    buffer: torch.Tensor


class EquivariantOptimizer(torch.optim.Optimizer):
    """
    Updates that turn along with the frames of a RiGPT: polar factors for matrices, Adam with shared second moments for
    the rest. An ordinary optimizer otherwise: state dicts, closures, schedulers, learning rates that are tensors.

    Where parameters are shards, as under FSDP2, HSDP and tensor parallelism, every polar factor is made by one
    process, and none holds more than one whole matrix at a time; under DDP with `sharing="all"` the processes share
    the work, too. DeepSpeed and FSDP1 hand out flat pieces, which have no polar factor: they end in an error.

    Args:
        params: Groups from [`equivariant_param_groups`].
        lr: Learning rate of groups that have none of their own, in AdamW's usual units: updates of matrices are scaled
            to the root mean square that AdamW's have.
        momentum: Momentum of matrices, with Nesterov's correction.
        betas: Decay of Adam's first and second moments.
        eps: Added to the root of second moments.
        weight_decay: Decoupled weight decay of groups that have none of their own.
        polar: `"newton_schulz"`; `"polar_express"`: the same iterations with other coefficients, nearer to the factor;
            or `"svd"`: exact, slow, for tests.
        steps: Iterations of the first two.
        sharing: `"auto"`: share work among the processes that hold the shards of a parameter; `"all"`: also among all
            processes of the default group where they are about to do the same, as under DDP. Every step asks all of
            them, so all must step equally often: not for ensembles, sweeps and pipeline stages, whose processes would
            wait for each other for ever. `"none"`: every process does all of it.

    Raises:
        ValueError: if a group does not say its update rule, or a number is out of its range.
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
        """As for every optimizer; the group must say its update rule."""
        if not isinstance(param_group, dict) or param_group.get("update_rule") not in UPDATE_RULES:
            raise ValueError(
                "`params` must be groups that say how their parameters turn, got one without an `update_rule`. Pass "
                "`equivariant_param_groups(model)`, not `model.parameters()`."
            )
        param_group.setdefault("blocks", 1)
        param_group.setdefault("dim", 0)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        As for every optimizer.

        Raises:
            ValueError: if the state is that of another optimizer, or of other parameters.
        """
        rules = [
            [group.get("update_rule") for group in groups]
            for groups in (self.param_groups, state_dict["param_groups"])
        ]
        if rules[0] != rules[1]:
            raise ValueError(
                "`state_dict` must be that of an `EquivariantOptimizer` for the same model, got groups with the rules "
                f"{rules[1]} instead of {rules[0]}. Go on with the optimizer that saved it (AdamW's groups have no "
                "rule), or begin without its state."
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One update; `closure` recomputes the loss, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check()
        self._step_matrices([group for group in self.param_groups if group["update_rule"] == "polar"])
        for group in self.param_groups:
            if group["update_rule"] != "polar":
                self._step_adam(group)
        return loss

    def _check(self) -> None:
        for group in self.param_groups:
            shapes = group.get("shapes") or [list(parameter.shape) for parameter in group["params"]]
            for parameter, shape in zip(group["params"], shapes, strict=True):
                if list(parameter.shape) != shape and parameter.shape[1:] == torch.Size(shape[1:]) != torch.Size():
                    raise ValueError(
                        f"`params` must have as many rows as when the optimizer was made, got {list(parameter.shape)} "
                        f"where it was {shape}: a table was resized since. Make a new optimizer after "
                        "`resize_token_embeddings`."
                    )
                if list(parameter.shape) != shape or (group["update_rule"] == "polar" and parameter.dim() != 2):
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
        shards: list[Sharded] = []
        for group in groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [local_like(parameter.grad, parameter) for parameter in parameters]
            buffers = [local_like(self._state(parameter, "momentum_buffer"), parameter) for parameter in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            weights = [local_like(parameter, parameter) for parameter in parameters]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            own = zip(parameters, gradients, buffers, strict=True)
            shards += [Sharded(group, *tensors) for tensors in own if isinstance(tensors[0], DTensor)]
            whole = [index for index, parameter in enumerate(parameters) if not isinstance(parameter, DTensor)]
            if not whole:
                continue
            directions = torch._foreach_mul([buffers[index] for index in whole], group["momentum"])
            torch._foreach_add_(directions, [gradients[index] for index in whole])
            for index, direction in zip(whole, directions, strict=True):
                blocks = torch.stack(direction.chunk(group["blocks"], group["dim"]))  # [blocks, m, n]
                key = (*blocks.shape[1:], blocks.dtype, blocks.device, group["polar"], group["steps"])
                places.append((group, parameters[index], key, sum(len(part) for part in stacks.get(key, []))))
                stacks.setdefault(key, []).append(blocks)
        if shards:
            self._step_shards(shards)
        if not stacks:
            return
        factors = self._polar_factors({key: torch.cat(stacks.pop(key)) for key in list(stacks)})
        for group, parameter, key, start in places:
            blocks = factors[key][start : start + group["blocks"]]
            update = torch.cat(list(blocks), group["dim"]) * _rate(group, key[:2])
            parameter.sub_(update.to(parameter.dtype))

    @torch.compiler.disable
    def _step_shards(self, shards: list[Sharded]) -> None:
        """Matrices in shards: no process puts together more than one at a time."""
        alike: dict[tuple, list[tuple[Sharded, Layout]]] = {}
        for matrix in shards:
            group, parameter = matrix.group, matrix.parameter
            layout = layout_of(parameter, group["blocks"], group["dim"])
            if layout is None or self.defaults["sharing"] == "none":
                _step_gathered(matrix)
                continue
            key = (parameter.device_mesh, matrix.gradient.dtype, parameter.device, group["polar"], group["steps"])
            alike.setdefault(key, []).append((matrix, layout))
        for (_, dtype, device, method, steps), matrices in alike.items():
            # Digits that the iterations would drop anyway are not sent.
            kept = (dtype, dtype if method == "svd" else working_dtype(dtype, device))
            like = torch.empty(0, dtype=min(kept, key=lambda one: one.itemsize), device=device)
            _step_alike(matrices, partial(_polar_factor, method=method, steps=steps), like)

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

        Only where they are said to step together is anything sent: having a process group says nothing, as ensembles,
        sweeps and pipeline stages have one too.
        """
        if self.defaults["sharing"] != "all":
            return None
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
            vectors = group["update_rule"] == "vectors"
            # A vector may lie across the borders of shards; it is short, so it is put together.
            square = _shared_square(full_tensor(gradient) if vectors else gradient, group)
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
                mean = full_tensor(mean).reshape(group["blocks"], -1)
            update = group["lr"] * (mean / root).reshape(parameter.shape)
            parameter.sub_(shard_like(update, parameter))

    def _state(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def _step_alike(
    matrices: list[tuple[Sharded, Layout]], function: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor
) -> None:
    """Matrices on one mesh, each block on the process that it is dealt to."""
    mesh = matrices[0][0].parameter.device_mesh
    process = mesh.mesh.flatten().tolist().index(dist.get_rank())
    boxes = [boxes_of(layout)[process] for _, layout in matrices]

    def read(index: int, box: Box) -> torch.Tensor:
        matrix, place = matrices[index][0], inside(box, boxes[index])
        return torch.add(matrix.gradient[place], matrix.buffer[place], alpha=matrix.group["momentum"])

    def write(index: int, box: Box, factor: torch.Tensor) -> None:
        matrix, layout = matrices[index]
        weights = matrix.parameter.to_local()[inside(box, boxes[index])]
        update = factor.to(matrix.gradient.dtype) * _rate(matrix.group, layout.block_shape)
        weights.sub_(update.to(weights.dtype))

    map_blocks([layout for _, layout in matrices], mesh, read, function, write, like)


def _step_gathered(matrix: Sharded) -> None:
    """One matrix, put together on every process."""
    group, parameter = matrix.group, matrix.parameter
    local = torch.add(matrix.gradient, matrix.buffer, alpha=group["momentum"])
    place: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    direction = DTensor.from_local(local, parameter.device_mesh, parameter.placements, **place).full_tensor()
    blocks = torch.stack(direction.chunk(group["blocks"], group["dim"]))
    factors = _polar_factor(blocks, group["polar"], group["steps"])
    update = torch.cat(list(factors), group["dim"]) * _rate(group, blocks.shape[1:])
    parameter.sub_(shard_like(update, parameter))


def _rate(group: dict[str, Any], shape: Sequence[int]) -> float | torch.Tensor:
    """The factor of a polar factor of this shape that has the root mean square of AdamW's updates."""
    return group["lr"] * (ADAMW_RMS * max(shape) ** 0.5)


def _polar_factor(stack: torch.Tensor, method: str, steps: int) -> torch.Tensor:
    return exact_polar(stack) if method == "svd" else newton_schulz(stack, steps, method)


def _shared_square(gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """The mean square over what turns together: `[V, 1]` of rows, `[blocks, 1]` of vectors, each of coordinates."""
    match group["update_rule"]:
        case "rows":
            return gradient.square().mean(-1, keepdim=True)
        case "vectors":
            return gradient.reshape(group["blocks"], -1).square().mean(-1, keepdim=True)
        case _:
            return gradient.square()
