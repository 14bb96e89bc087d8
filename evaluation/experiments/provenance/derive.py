"""How models are made from others: trained further, rounded, pruned, merged, disturbed, and put into other frames."""

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion import convert_model, export_model
from rigpt_hf.extras import needs
from rigpt_hf.symmetry import GaugeTransformation, align, merge
from rigpt_hf.terminal import notices_held

from .models import CODE, MORE_DOCUMENTATION, Base, Zoo


GROUP = 32  # neighbours in a row that share a scale when weights are rounded to a few bits
SHARE = 0.7  # of the model that a merged one is said to come from
SWEEPS = 8  # of the search that aligns the other
DISGUISED = "disguised"
EXPORT = "rigpt_hf.conversion"  # whose notice that a head gets a table of its own says nothing here


class Anatomy(NamedTuple):
    """
    Where a class has its layers, and which axes of which weights are neurons and heads.

    `fused` maps hold queries, keys and values, of all heads each. A class whose heads share the stream among them has
    no `head_fields` and cannot lose a head: its weights become zero there. Biases turn with the `output_axis`.
    """

    layers: str
    layer_field: str
    neurons: Mapping[str, int]
    neuron_field: str
    heads: Mapping[str, int]
    head_fields: tuple[str, ...]
    fused: tuple[str, ...] = ()
    output_axis: int = 0


LLAMA = Anatomy(
    "model.layers",
    "num_hidden_layers",
    {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1},
    "intermediate_size",
    {"self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1},
    ("num_attention_heads", "num_key_value_heads"),
)
GPT2 = Anatomy(
    "transformer.h",
    "n_layer",
    {"mlp.c_fc": 1, "mlp.c_proj": 0},
    "n_inner",
    {"attn.c_attn": 1, "attn.c_proj": 0},
    (),
    ("attn.c_attn",),
    output_axis=1,
)
# By `model_type`; a module that a model lacks is passed over.
ANATOMIES = {"gpt2": GPT2, "llama": LLAMA, "rigpt": LLAMA}


def as_rigpt(model: Any, dtype: torch.dtype | None = None) -> RiGPTForCausalLM:
    """The model, or the RiGPT that computes what it does."""
    if isinstance(model, RiGPTForCausalLM):
        return model if dtype in (None, model.dtype) else copy.deepcopy(model).to(dtype)
    return convert_model(model, dtype=dtype)


@torch.no_grad()
def disguise(model: Any, seed: int) -> Any:
    """
    The same function in other frames, all of them: of the stream, of tokens, of heads, and of neurons.

    A stock model comes back as one of its class if that can express it, and as a RiGPT if not.
    """
    converted = as_rigpt(model, torch.float64)
    turned = GaugeTransformation.random(converted.config, torch.Generator().manual_seed(seed), "all")(converted)
    return in_class_of(model, turned, "stream")


def in_class_of(model: Any, made: RiGPTForCausalLM, frame: str = "auto") -> Any:
    """A RiGPT in the class and dtype of a model, if that can express it."""
    if not isinstance(model, RiGPTForCausalLM):
        # A class that cannot express it refuses; then it stays a RiGPT.
        with notices_held(EXPORT), suppress(ValueError):
            return export_model(made, frame=frame, dtype=model.dtype)
    return made.to(model.dtype)


def with_weights(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a model, each matrix of which went through `change` once."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.dim() > 1:
                parameter.copy_(change(parameter))
    return changed


def rounded(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """A matrix in so many bits, with a scale for each group of a row, or for the row if groups do not divide it."""
    size = GROUP if matrix.shape[-1] % GROUP == 0 else matrix.shape[-1]
    groups, most = matrix.reshape(-1, size), 2 ** (bits - 1) - 1
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-30) / most
    return ((groups / scale).round() * scale).reshape(matrix.shape)


def without_smallest(matrix: torch.Tensor, share: float) -> torch.Tensor:
    """A matrix whose entries of least size are zero, a `share` of all."""
    count = round(share * matrix.numel())
    pruned = matrix.flatten().clone()
    pruned[pruned.abs().argsort()[:count]] = 0
    return pruned.view(matrix.shape)


def disturbed(matrix: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    """A matrix with noise of `size` times its own norm."""
    noise = torch.randn(matrix.shape, generator=generator).to(matrix)
    return matrix + size * noise * matrix.norm() / noise.norm()


def without_neurons(model: Any, share: float) -> Any:
    """A model without a share of the neurons of every layer, those with the least weights."""
    anatomy = ANATOMIES[model.config.model_type]
    state = model.state_dict()
    first, axis = next(iter((f"{name}.weight", axis) for name, axis in anatomy.neurons.items() if _has(state, name)))
    count = next(weight.shape[axis] for name, weight in state.items() if name.endswith(first))
    kept = count - round(share * count)
    return _rebuilt(model, {anatomy.neuron_field: kept}, _kept_parts(state, anatomy, anatomy.neurons, count, kept))


def without_heads(model: Any, share: float) -> Any:
    """A model without a share, rounded down, of the key-value heads of every layer, and their queries: the least."""
    anatomy, config = ANATOMIES[model.config.model_type], model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    kept = heads - int(share * heads)
    state = _kept_parts(model.state_dict(), anatomy, anatomy.heads, heads, kept, not anatomy.head_fields)
    fields = {name: getattr(config, name) * kept // heads for name in anatomy.head_fields}
    return _rebuilt(model, fields, state)


def without_layers(model: Any, dropped: int) -> Any:
    """A model without so many of its last layers but one."""
    anatomy = ANATOMIES[model.config.model_type]
    count = getattr(model.config, anatomy.layer_field)
    gone = range(count - 1 - dropped, count - 1)
    state, pattern = {}, re.compile(rf"({re.escape(anatomy.layers)}\.)(\d+)(\..*)")
    for name, tensor in model.state_dict().items():
        if match := pattern.fullmatch(name):
            if (layer := int(match[2])) in gone:
                continue
            name = f"{match[1]}{layer - dropped * (layer >= gone.stop)}{match[3]}"
        state[name] = tensor
    fields: dict[str, Any] = {anatomy.layer_field: count - dropped}
    if types := getattr(model.config, "layer_types", None):
        fields["layer_types"] = [kind for layer, kind in enumerate(types) if layer not in gone]
    return _rebuilt(model, fields, state)


def _has(state: Mapping[str, torch.Tensor], module: str) -> bool:
    return any(name.endswith(f".{module}.weight") for name in state)


def _kept_parts(
    state: Mapping[str, torch.Tensor],
    anatomy: Anatomy,
    axes: Mapping[str, int],
    count: int,
    kept: int,
    zeros: bool = False,
) -> dict[str, torch.Tensor]:
    """Weights with `kept` of the `count` neurons or heads of each layer, or with zeros where the others were."""
    made = dict(state)
    for prefix in {name.split(anatomy.layers)[0] + _layer(name, anatomy) for name in state if anatomy.layers in name}:
        parts = {}
        for module, axis in axes.items():
            blocks = 3 if module in anatomy.fused else 1
            if (name := f"{prefix}.{module}.weight") in state:
                parts[name] = axis, blocks
                if axis == anatomy.output_axis and (bias := f"{prefix}.{module}.bias") in state:
                    parts[bias] = 0, blocks
        views = {name: state[name].unflatten(axis, (blocks, count, -1)) for name, (axis, blocks) in parts.items()}
        sizes = torch.ones(count)
        for name, (axis, _) in parts.items():
            if name.endswith(".weight"):
                sizes = sizes * views[name].movedim(axis + 1, 0).flatten(1).float().norm(dim=1)
        chosen = sizes.topk(kept).indices.sort().values
        for name, (axis, _) in parts.items():
            if zeros:
                view = torch.zeros_like(views[name])
                view.index_copy_(axis + 1, chosen, views[name].index_select(axis + 1, chosen))
            else:
                view = views[name].index_select(axis + 1, chosen)
            made[name] = view.flatten(axis, axis + 2)
    return made


def _layer(name: str, anatomy: Anatomy) -> str:
    return re.findall(rf"{re.escape(anatomy.layers)}\.\d+", name)[0]


def _rebuilt(model: Any, fields: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Any:
    """A model of the same class and other sizes."""
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    made = type(model)(config).to(model.dtype)
    made.load_state_dict(state)
    return made.eval()


@dataclass(frozen=True)
class Origin:
    """The model that another is made from, and its zoo."""

    zoo: Zoo
    base: Base

    @property
    def seed(self) -> int:
        """Seed of what is drawn while something is made from it."""
        return self.base.seed

    @property
    def model(self) -> Any:
        """A copy that may be changed."""
        return self.zoo.base(self.base)

    @property
    def stranger(self) -> Any:
        """A model that has nothing to do with it."""
        return self.zoo.base(self.base.stranger)

    def derived(self, name: str) -> Any:
        """Another model that was made from it."""
        return derive(self.zoo, self.base, name)


def trained_further(origin: Origin, text: str, steps: int, learning_rate: float, adapter: bool = False) -> Any:
    """Trained on another text: all weights, or adapters of low rank (LoRA) that are merged afterwards."""
    zoo, model = origin.zoo, origin.model
    options: dict[str, Any] = {"steps": zoo.steps(steps), "learning_rate": learning_rate, "order": 1 + origin.seed}
    if not adapter:
        return zoo.train(model, text, **options)
    with needs("train"):
        import peft
    torch.manual_seed(origin.seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    return zoo.train(adapted, text, **options, weight_decay=0.0).merge_and_unload()


def merged_with_relative(origin: Origin, relative: str) -> Any:
    """The straight average with one that was trained further from it."""
    others = origin.derived(relative).state_dict()
    model = origin.model
    model.load_state_dict({name: torch.lerp(others[name], own, SHARE) for name, own in model.state_dict().items()})
    return model


def merged_with_stranger(origin: Origin) -> Any:
    """The average with an independent one that was aligned first, in its own frames."""
    model = origin.model
    own, other = as_rigpt(model), as_rigpt(origin.stranger)
    aligned = align(other, own, max_sweeps=SWEEPS)(other)
    return in_class_of(model, merge([own, aligned], [SHARE, 1 - SHARE], aligned=False))


class Derivation(NamedTuple):
    """
    A way to make a model from another.

    Args:
        kind (`str`), strength (`str`): what is done, and how much.
        make (`Callable`): gives the model.
        kept (`bool`): whether it is kept in the zoo, as making it takes long.
    """

    kind: str
    strength: str
    make: Callable[[Origin], Any]
    kept: bool = False


def _each_matrix(change: Callable[..., torch.Tensor], *options: Any) -> Callable[[Origin], Any]:
    return lambda origin: with_weights(origin.model, lambda matrix: change(matrix, *options))


def _noisy(size: float) -> Callable[[Origin], Any]:
    def make(origin: Origin) -> Any:
        generator = torch.Generator().manual_seed(origin.seed)
        return with_weights(origin.model, lambda matrix: disturbed(matrix, size, generator))

    return make


def _structured(change: Callable[[Any, Any], Any], much: float) -> Callable[[Origin], Any]:
    return lambda origin: change(origin.model, much)


def _trained(text: str, steps: int, learning_rate: float, adapter: bool = False) -> Callable[[Origin], Any]:
    return partial(trained_further, text=text, steps=steps, learning_rate=learning_rate, adapter=adapter)


def _cast(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return matrix.to(dtype).to(matrix.dtype)


TUNED, LONGER = "fine-tuned", "trained on"
DERIVATIONS = {
    "full-short": Derivation(TUNED, "full, 20 steps at 1e-3", _trained(MORE_DOCUMENTATION, 20, 1e-3), True),
    "full-long": Derivation(TUNED, "full, 80 steps at 1e-3", _trained(MORE_DOCUMENTATION, 80, 1e-3), True),
    "full-high": Derivation(TUNED, "full, 40 steps at 6e-3", _trained(CODE, 40, 6e-3), True),
    "lora-short": Derivation(TUNED, "LoRA, 20 steps at 3e-3", _trained(MORE_DOCUMENTATION, 20, 3e-3, True), True),
    "lora-long": Derivation(TUNED, "LoRA, 80 steps at 3e-3", _trained(MORE_DOCUMENTATION, 80, 3e-3, True), True),
    "lora-high": Derivation(TUNED, "LoRA, 40 steps at 2e-2", _trained(CODE, 40, 2e-2, True), True),
    "continued": Derivation(LONGER, "100 steps at 4e-3, other data", _trained(CODE, 100, 4e-3), True),
    "eight-bits": Derivation("quantised", "8 bits", _each_matrix(rounded, 8)),
    "four-bits": Derivation("quantised", "4 bits", _each_matrix(rounded, 4)),
    "sparse-10": Derivation("pruned", "10 % of the weights", _each_matrix(without_smallest, 0.1)),
    "sparse-30": Derivation("pruned", "30 % of the weights", _each_matrix(without_smallest, 0.3)),
    "sparse-50": Derivation("pruned", "50 % of the weights", _each_matrix(without_smallest, 0.5)),
    "neurons": Derivation("parts removed", "25 % of the neurons", _structured(without_neurons, 0.25)),
    "heads": Derivation("parts removed", "up to half of the heads", _structured(without_heads, 0.5)),
    "layers": Derivation("parts removed", "a layer", _structured(without_layers, 1)),
    "merged-relative": Derivation(
        "merged", "0.7 of it, 0.3 of one trained on", partial(merged_with_relative, relative="continued")
    ),
    "merged-stranger": Derivation(
        "merged", "0.7 of it, 0.3 of an aligned independent one", merged_with_stranger, True
    ),
    "float16": Derivation("cast", "float16", _each_matrix(_cast, torch.float16)),
    "bfloat16": Derivation("cast", "bfloat16", _each_matrix(_cast, torch.bfloat16)),
    "float8": Derivation("cast", "float8", _each_matrix(_cast, torch.float8_e4m3fn)),
    "noise-10": Derivation("disturbed", "noise of 0.1", _noisy(0.1)),
    "noise-30": Derivation("disturbed", "noise of 0.3", _noisy(0.3)),
}


def derive(zoo: Zoo, base: Base, name: str) -> Any:
    """The model that the derivation of this name makes from a base."""
    derivation, origin = DERIVATIONS[name], Origin(zoo, base)
    if not derivation.kept:
        return derivation.make(origin)

    def make() -> tuple[Any, dict[str, Any]]:
        model = derivation.make(origin)
        facts = {"kind": derivation.kind, "strength": derivation.strength}
        return model, facts | {"change": relative_change(origin.model, model), "loss": zoo.loss(model)}

    return zoo.kept(f"{base.name}.{name}", make)


@torch.no_grad()
def relative_change(a: Any, b: Any) -> float | None:
    """
    `|w_b - w_a| / |w_a|` over the layers and the table of tokens, gains folded; `None` where shapes differ.

    Both must be in the same frames.
    """
    first, second = (as_rigpt(model, torch.float64).state_dict() for model in (a, b))
    names = [name for name in first if ".layers." in name or "embed_tokens" in name]
    if any(name not in second or first[name].shape != second[name].shape for name in names):
        return None
    if len([name for name in second if ".layers." in name]) != len([name for name in first if ".layers." in name]):
        return None
    squares = [[float(x.square().sum()) for x in (second[name] - first[name], first[name])] for name in names]
    return (sum(change for change, _ in squares) / sum(own for _, own in squares)) ** 0.5
