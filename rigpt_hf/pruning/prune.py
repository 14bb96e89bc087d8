"""Fewer neurons, heads and dimensions of heads: a smaller RiGPT, fitted to the function of the larger."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checkpoints.read import quiet_loading
from ..configuration_rigpt import RiGPTConfig, rotary_frequencies
from ..frames import FrameKey, layer_of, refuse_shared_frames, table_of
from ..layers_rigpt import is_turned, of_layer
from ..modeling_rigpt import RiGPTForCausalLM
from ..symmetry.contraction import decomposable, weights_of
from ..table import Turned
from .elimination import eliminate
from .ranks import pairing_maps, plane_choice, value_maps


Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """
    How much a model shall lose.

    Args:
        neurons: Part of the neurons of every layer, from 0 to below 1.
        heads: Query heads of every layer.
        rank: Dimensions of each head that stay; `None`: all.
    """

    neurons: float = 0.0
    heads: int = 0
    rank: int | None = None

    def check(self, config: RiGPTConfig) -> None:
        """Raises a `ValueError` if a configuration does not allow it."""
        if not (self.neurons or self.heads or self.rank is not None):
            raise ValueError("`neurons`, `heads` or `rank` must say what shall go, got none of them. Give one.")
        refuse_shared_frames(config, "Pruning")
        self._check_neurons(config)
        self._check_heads(config)
        self._check_rank(config)

    def _check_neurons(self, config: RiGPTConfig) -> None:
        if not 0 <= self.neurons < 1:
            raise ValueError(
                f"`neurons` must be a part of them, from 0 to below 1, got {self.neurons}. Take 0.2 or so."
            )
        if self.neurons and not int(self.neurons * config.intermediate_size):
            raise ValueError(
                f"`neurons` must leave out one of the {config.intermediate_size} at least, got {self.neurons}. Take "
                "more."
            )
        if self.neurons and config.num_experts is not None:
            raise ValueError(
                f"`neurons` must be 0 for a model with experts, got {self.neurons} and `num_experts="
                f"{config.num_experts}`: calibration sees too few tokens of each. Take `heads` or `rank`."
            )

    def _check_heads(self, config: RiGPTConfig) -> None:
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        multiple = 1 if groups == heads else groups
        if not 0 <= self.heads < heads or self.heads % multiple:
            number = (
                "" if multiple == 1 else f" and a multiple of the {groups} key-value heads, each of which loses some"
            )
            raise ValueError(f"`heads` must be at least 0, less than {heads}{number}, got {self.heads}.")

    def _check_rank(self, config: RiGPTConfig) -> None:
        if self.rank is None:
            return
        if not 1 <= self.rank <= config.head_dim:
            raise ValueError(f"`rank` must be from 1 to the `head_dim` {config.head_dim}, got {self.rank}.")
        if config.attention_score != "dot" or config.qk_norm:
            option = "qk_norm=True" if config.qk_norm else f"attention_score={config.attention_score!r}"
            raise ValueError(
                f"`rank` needs scores that are products of queries and keys, got `{option}`. Leave it out."
            )
        turned = [layer for layer in range(config.num_hidden_layers) if is_turned(config, layer)]
        whole = all(2 * len(rotary_frequencies(of_layer(config, layer))[0]) == config.head_dim for layer in turned)
        if turned and not whole:
            raise ValueError(
                "`rank` needs positions that turn whole heads, as planes of two dimensions go, got "
                f"`rope_parameters={config.rope_parameters}`. Leave it out."
            )
        if turned and self.rank % 2:
            raise ValueError(f"`rank` must be even, as planes of two dimensions go, got {self.rank}. Take one less.")


@torch.no_grad()
@decomposable()
def prune(
    model: RiGPTForCausalLM, moments: Iterable[Mapping[str, torch.Tensor]], sizes: Sizes, progress: bool = False
) -> RiGPTForCausalLM:
    """
    A smaller model: what a part would have written is fitted by what stays, with the moments as the measure.

    Args:
        model (`RiGPTForCausalLM`): stays as it is.
        moments (`Iterable[Mapping[str, torch.Tensor]]`): second moments `[n, n]` of the inputs of linear maps, by the
            names of their modules, of one layer after the other as [`moments_by_layer`] gives them, or of several
            together: of `down_proj` for neurons, of `o_proj` for heads and ranks, of `q_proj` and `k_proj` for ranks.
        sizes (`Sizes`): what goes.
        progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `RiGPTForCausalLM`: of the model's dtype.

    Raises:
        ValueError: if the configuration does not allow it, or moments are missing or not finite.
    """
    sizes.check(model.config)
    weights = weights_of(model)
    pruning = _Pruning(model.config, weights, sizes)
    left = dict.fromkeys(range(model.config.num_hidden_layers))
    with tqdm(total=len(left), desc="Pruning", unit="layer", disable=not progress) as bar:
        for part in moments:
            for layer in [layer for layer in left if any(layer_of(f"{name}.weight") == layer for name in part)]:
                del left[layer]
                pruning.layer(layer, part)
                bar.update()
    if left:
        raise ValueError(f"`moments` must be of every layer, got none of layer {next(iter(left))}. Calibrate again.")
    smaller = made(pruning.config(), weights, model.dtype)
    smaller.generation_config = model.generation_config
    return smaller.train(model.training)


class _Pruning:
    """Weights of a model, in float64, that get smaller layer by layer."""

    def __init__(self, config: RiGPTConfig, weights: Weights, sizes: Sizes):
        self.source, self.table, self.weights, self.sizes = config, table_of(config), weights, sizes
        self.query_heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.own = self.query_heads == self.key_value_heads  # every query head has keys and values of its own
        self.gone = int(sizes.neurons * config.intermediate_size)
        self.given: Mapping[str, torch.Tensor] = {}

    def layer(self, layer: int, moments: Mapping[str, torch.Tensor]) -> None:
        """Make a layer smaller."""
        self.given = moments
        if self.sizes.heads:
            self.heads(layer, self.sizes.heads)
        if self.sizes.rank is not None:
            self.rank(layer, self.sizes.rank)
        if self.gone:
            self.neurons(layer, self.gone)

    def moments(self, name: str) -> torch.Tensor:
        """The moments of what a matrix reads."""
        module = name.removesuffix(".weight")
        if module not in self.given:
            raise ValueError(f"`moments` must have those of the inputs of {module!r}, got {len(self.given)} others.")
        if not self.given[module].isfinite().all():
            raise ValueError(f"`moments` must be finite, got NaN or infinity in those of {module!r}. Calibrate again.")
        return self.given[module].double()

    def config(self) -> RiGPTConfig:
        """The configuration of the smaller model."""
        heads, rank = self.sizes.heads, self.sizes.rank
        changed: dict[str, Any] = {
            "num_attention_heads": self.query_heads - heads,
            "num_key_value_heads": self.key_value_heads - (heads if self.own else 0),
            "head_dim": self.source.head_dim if rank is None else rank,
            "intermediate_size": self.source.intermediate_size - self.gone,
            "token_symmetry": None,
        }
        if rank is not None and any(is_turned(self.source, layer) for layer in range(self.source.num_hidden_layers)):
            changed["rotary_learned_frequencies"] = True
        return RiGPTConfig(**(self.source.to_dict() | changed))

    def change(self, key: FrameKey, how: Callable[[Turned, torch.Tensor], torch.Tensor | None]) -> None:
        """Change every parameter that carries a frame: `how` maps the axis and `[length, rest]` to a shorter one."""
        for name, turned in self.table.walk(key):
            if name not in self.weights:
                continue
            tensor = self.weights[name]
            front = how(turned, turned.unfold(tensor))
            if front is None:
                continue
            shape = list(tensor.shape)
            shape[0 if turned.flat else turned.dim] = -1
            self.weights[name] = turned.fold(front, torch.Size(shape)).contiguous()

    def map_of(self, kind: str, layer: int, role: str, at: int) -> str:
        """The name of the matrix whose axis `at` carries a frame of a layer in a role."""
        carriers = self.table.carriers(FrameKey(kind, layer), role)
        (name,) = (
            name for name, dim in carriers if dim == at and name in self.weights and self.weights[name].dim() > 1
        )
        return name

    def neurons(self, layer: int, count: int) -> None:
        """Leave out neurons of a layer."""
        name = self.map_of("neurons", layer, "down", 1)
        kept, self.weights[name] = eliminate(self.weights[name], self.moments(name), count)
        self.change(FrameKey("neurons", layer), lambda turned, front: front[kept])

    def heads(self, layer: int, count: int) -> None:
        """Leave out query heads of a layer, and the keys and values that only they read."""
        name, size = self.map_of("head_vo", layer, "covector", 1), self.source.head_dim
        groups = 1 if self.own else self.key_value_heads
        kept, self.weights[name] = eliminate(self.weights[name], self.moments(name), count, size, groups)
        self.kept_inputs = (kept[:, None] * size + torch.arange(size)).flatten()

        def of_heads(turned: Turned, front: torch.Tensor) -> torch.Tensor | None:
            if turned.role == "key_value" and not self.own:
                return None
            heads = self.query_heads if turned.role == "query" else self.key_value_heads
            return front.unflatten(0, (heads, -1))[kept].flatten(0, 1)

        self.change(FrameKey("heads", layer), of_heads)

    def rank(self, layer: int, rank: int) -> None:
        """Fewer dimensions of the heads of a layer."""
        size, groups = self.source.head_dim, self.key_value_heads - (self.sizes.heads if self.own else 0)
        name = self.map_of("head_vo", layer, "covector", 1)
        moments = self.moments(name)
        if self.sizes.heads:
            moments = moments[self.kept_inputs][:, self.kept_inputs]
        blocks = torch.stack([moments[i : i + size, i : i + size] for i in range(0, len(moments), size)])
        of_values = blocks.unflatten(0, (groups, -1)).sum(dim=1)
        reading = self.weights[name].unflatten(1, (groups, -1, size)).permute(1, 2, 0, 3).flatten(1, 2)
        self._project(FrameKey("head_vo", layer), *value_maps(reading, of_values, rank))

        queries, keys = (self._outputs(layer, role, groups) for role in ("vector", "covector"))
        if is_turned(self.source, layer):
            maps = self._planes(layer, queries, keys, rank // 2)
            pair = maps, maps
        else:
            pair = pairing_maps(queries, keys, rank)
        # Scores are divided by the root of the size of a head.
        self._project(FrameKey("head_qk", layer), (rank / size) ** 0.5 * pair[0], pair[1])

    def _outputs(self, layer: int, role: str, groups: int) -> torch.Tensor:
        """The second moments `[groups, h, h]` of queries or keys, summed over the heads of a group."""
        name = self.map_of("head_qk", layer, role, 0)
        rows = self.weights[name].unflatten(0, (groups, -1, self.source.head_dim))
        return (rows @ self.moments(name) @ rows.mT).sum(dim=1)

    def _planes(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
        """The maps `[groups, 2 · count, h]` that keep the planes worth most; their frequencies become parameters."""
        ((name, _),) = self.table.carriers(FrameKey("head_qk", layer), "planes")
        chosen, size = plane_choice(queries, keys, self.source.head_dim // 2, count), self.source.head_dim
        frequencies = self.weights.get(name)
        if frequencies is None:
            frequencies = rotary_frequencies(of_layer(self.source, layer))[0].double().expand(len(chosen), -1)
        self.weights[name] = frequencies.gather(1, chosen)
        return torch.eye(size, dtype=torch.float64)[torch.cat([chosen, chosen + size // 2], dim=1)]

    def _project(self, key: FrameKey, vectors: torch.Tensor, covectors: torch.Tensor) -> None:
        """Replace every axis that a frame of heads turns by its image under maps `[groups, R, h]`."""
        maps = {"vector": vectors, "covector": covectors}

        def image(turned: Turned, front: torch.Tensor) -> torch.Tensor | None:
            if turned.role not in maps:
                return None
            chosen = maps[turned.role]
            blocks = front.reshape(len(chosen), -1, chosen.shape[2], front.shape[1])
            return (chosen[:, None] @ blocks).flatten(0, 2)

        self.change(key, image)


def made(config: RiGPTConfig, weights: Weights, dtype: torch.dtype) -> RiGPTForCausalLM:
    """A model of some weights; frequencies stay in single precision at least."""
    with quiet_loading():
        model = RiGPTForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    assert weights.keys() == dict(model.named_parameters()).keys()
    return model
