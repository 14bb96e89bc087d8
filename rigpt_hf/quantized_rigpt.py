"""
Quantized models as Transformers loads and saves them: what a `quantization_config` says, and who makes the modules.

Importing this file registers both with the library, so that a folder loads with `import rigpt_hf` or, where the code
comes from the folder, with `trust_remote_code=True`. Modules and kernels are in `packed_rigpt.py`.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .packed_rigpt import GROUPS, Coded, QuantizedEmbedding, QuantizedLinear, pack


METHOD = "rigpt"
TABLE, HEAD = "model.embed_tokens", "lm_head"
STORED = ("codes", "scales", "gain")


class RiGPTQuantizationConfig(QuantizationConfigMixin):
    """
    How the weights of a RiGPT are stored.

    Args:
        bits (`int`, defaults to 4): of the codes of linear maps: 3, 4 or 8; 3 are stored as 4.
        group (`int`, *optional*): neighbours in a row that share a scale: 32, 64 or 128; the whole row if not given.
        table_bits (`int`, defaults to 8): of the tables of tokens, which have a scale for each row.
        activation_bits, cache_bits (`int`, *optional*):
            What inputs of maps, and keys and values, were rounded to when the codes were chosen: 4 or 8.
        modules_with_gain (`list[str]`, *optional*): modules whose inputs have factors.
        modules_to_not_convert (`list[str]`, *optional*): modules that have weights instead of codes.
        exceptions (`dict[str, dict]`, *optional*): modules with other `bits` or another `group`, which are given.
        recipe (`dict`, *optional*):
            what made the codes. Where activations or a cache are simulated its `turned`, `seed` and `frame` say how.
        dequantize (`bool`, defaults to `False`): load weights in place of codes, in float32 at least; never saved.

    Raises:
        ValueError: if a value is none of those, or a field is unknown.
    """

    def __init__(
        self,
        bits: int = 4,
        group: int | None = None,
        table_bits: int = 8,
        activation_bits: int | None = None,
        cache_bits: int | None = None,
        modules_with_gain: Any = None,
        modules_to_not_convert: Any = None,
        exceptions: Any = None,
        recipe: Any = None,
        dequantize: bool = False,
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        if unknown:
            raise ValueError(
                f"`quantization_config` must have fields that are known here, got {next(iter(unknown))!r:.80}. Load "
                "it with the version of rigpt-hf that wrote it, or take that out."
            )
        one_of("quant_method", quant_method, (METHOD,))
        self.quant_method = quant_method
        self.bits, self.group, self.table_bits = bits, group, table_bits
        self.activation_bits, self.cache_bits = activation_bits, cache_bits
        self.modules_with_gain = names_of("modules_with_gain", modules_with_gain)
        self.modules_to_not_convert = names_of("modules_to_not_convert", modules_to_not_convert)
        self.exceptions, self.recipe, self.dequantize = exceptions or {}, recipe, dequantize
        one_of("bits", bits, (3, 4, 8))
        one_of("group", group, (None, *GROUPS))
        one_of("table_bits", table_bits, (4, 8))
        one_of("activation_bits", activation_bits, (None, 4, 8))
        one_of("cache_bits", cache_bits, (None, 4, 8))
        one_of("dequantize", dequantize, (False, True))
        if not isinstance(self.exceptions, Mapping):
            raise ValueError(f"`exceptions` must map names of modules to bits and groups, got {exceptions!r:.80}.")
        for name, form in self.exceptions.items():
            if not isinstance(form, Mapping) or set(form) != {"bits", "group"}:
                raise ValueError(f"`exceptions` must give `bits` and `group` of {name!r:.80}, got {form!r:.80}.")
            one_of(f"exceptions[{name!r:.80}]['bits']", form["bits"], (3, 4, 8))
            one_of(f"exceptions[{name!r:.80}]['group']", form["group"], (None, *GROUPS))
        if not isinstance(recipe, Mapping | None):
            raise ValueError(f"`recipe` must be a dictionary of what made the codes, got {recipe!r:.80}.")

    def to_dict(self) -> dict[str, Any]:
        """All fields but the wish of one loading."""
        return {name: value for name, value in copy.deepcopy(self.__dict__).items() if name != "dequantize"}

    def default(self, name: str) -> tuple[int, int | None]:
        """Bits and group of a module that is no exception."""
        return (self.table_bits, None) if name in (TABLE, HEAD) else (self.bits, self.group)

    def form(self, name: str) -> tuple[int, int | None]:
        """Bits and group of a module."""
        given = self.exceptions.get(name)
        return self.default(name) if given is None else (given["bits"], given["group"])


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """Raise a `ValueError` if a field has a value that it cannot have."""
    if not any(type(value) is type(one) and value == one for one in allowed):
        *first, last = map(repr, allowed)
        wanted = f"{', '.join(first)} or {last}" if first else last
        raise ValueError(f"`{name}` of a `quantization_config` must be {wanted}, got {value!r:.80}.")


def names_of(field: str, given: Any) -> list[str]:
    """A field that lists modules."""
    given = [] if given is None else given
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"`{field}` of a `quantization_config` must list names of modules, got {given!r:.80}.")
    return list(given)


class RiGPTQuantizer(HfQuantizer):
    """
    Puts modules of codes in the place of those of weights before a folder of codes is loaded, and back again.

    Attributes:
        simulate (`Callable`, *optional*):
            `(model, quantization_config)`: makes a loaded model round its activations or its cache, for which there
            are no kernels. Without it, codes that were chosen for that are refused.
    """

    quantization_config: RiGPTQuantizationConfig
    simulate: Callable[[Any, RiGPTQuantizationConfig], None] | None = None

    def __init__(self, quantization_config: RiGPTQuantizationConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "`quantization_config` must belong to a folder of codes, got one of rigpt for a model of weights. "
                "Make the folder by `rigpt quantize`."
            )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what would silently be another function here."""
        for field in ("activation_bits", "cache_bits"):
            bits = getattr(self.quantization_config, field)
            if bits is not None and type(self).simulate is None:
                raise ValueError(
                    f"`{field}={bits}` of a `quantization_config` needs a kernel or a simulation of one, and there is "
                    "none here. `import rigpt_hf`, which has one."
                )
        if self.turned and self.quantization_config.activation_bits is None:
            raise ValueError(
                f"`activation_bits` of a `quantization_config` must say what {self.turned[0]!r} reads, which is "
                "turned before it is rounded, got None. Write the bits that were there."
            )

    @property
    def turned(self) -> list[str]:
        """The modules whose codes belong to inputs that were turned before."""
        return (self.quantization_config.recipe or {}).get("turned") or []

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Weights in the place of codes lose nothing."""
        wide = self.quantization_config.dequantize
        return torch.promote_types(dtype, torch.float32) if wide else dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Called for a model of meta tensors: no weight is made."""
        place(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Freeze the codes and pack them for kernels, which the loader does not know."""
        for module in model.modules():
            if isinstance(module, Coded):
                for parameter in (module.codes, module.scales, module.gain):
                    if parameter is not None:
                        parameter.requires_grad_(False)
                if isinstance(module, QuantizedLinear) and not self.quantization_config.dequantize:
                    module.prepare()
        if self.quantization_config.dequantize:
            return self._dequantize(model, model.dtype)
        wants = self.quantization_config.activation_bits or self.quantization_config.cache_bits
        if wants and (simulate := type(self).simulate) is not None:
            simulate(model, self.quantization_config)
        return model

    @torch.no_grad()
    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for field in ("activation_bits", "cache_bits"):
            if (bits := getattr(self.quantization_config, field)) is not None:
                raise ValueError(
                    f"`{field}={bits}` of a `quantization_config` is simulated, and weights alone would be another "
                    "function. Give the model that was quantized."
                )
        for name, module in list(model.named_modules()):
            if not isinstance(module, Coded):
                continue
            with torch.device("meta"):
                if isinstance(module, QuantizedEmbedding):
                    plain: nn.Module = nn.Embedding(*module.shape)
                else:
                    plain = nn.Linear(*reversed(module.shape), bias=module.bias is not None)
                    plain.bias = module.bias
            is_copy = name == HEAD and model.config.tie_word_embeddings
            table = model.get_input_embeddings()
            plain.weight = table.weight if is_copy else nn.Parameter(module.dense(dtype or module.dtype))
            model.set_submodule(name, plain.train(module.training))
        for inner in model.modules():
            inner.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model.to(dtype or model.dtype)

    def is_serializable(self) -> bool:
        """Codes and scales are plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are: derivatives go through."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Kernels are operators that the compiler knows."""
        return True


def convertible(model: Any) -> dict[str, nn.Module]:
    """The linear maps and tables of a RiGPT, but not another head than that of tokens, under names of a causal LM."""
    prefix = model.base_model_prefix
    base = getattr(model, prefix, model)
    named = {f"{prefix}.{name}": module for name, module in base.named_modules()}
    if (head := getattr(model, HEAD, None)) is not None:
        named[HEAD] = head
    return {name: module for name, module in named.items() if type(module) in (nn.Linear, nn.Embedding)}


def place(model: Any, config: RiGPTQuantizationConfig) -> None:
    """Put empty modules of codes in the place of those of weights; a copy of the table has its codes, too."""
    left = set(config.modules_to_not_convert)
    for name, module in convertible(model).items():
        if name in left:
            continue
        bits, group = config.form(name)
        rows, columns = module.weight.shape
        if columns % (group or columns):
            raise ValueError(
                f"`group` must divide the {columns} inputs of {name!r}, got {group}. Give that module a `group` of "
                "its own in `exceptions`."
            )
        form = rows, columns, bits, group, name in config.modules_with_gain
        if isinstance(module, nn.Embedding):
            coded: Coded = QuantizedEmbedding(*form)
        else:
            coded = QuantizedLinear(*form, bias=module.bias is not None)
        base = getattr(model, model.base_model_prefix, None)
        own = name if base is not None else name.removeprefix(f"{model.base_model_prefix}.")
        model.set_submodule(own, coded.train(module.training))
    if getattr(model, HEAD, None) is not None and model.config.tie_word_embeddings:
        table, head = model.get_input_embeddings(), model.lm_head
        if isinstance(table, Coded) and isinstance(head, Coded):
            names = [name for name in STORED if getattr(table, name) is not None]
            model._tied_weights_keys = {f"{HEAD}.{name}": f"{TABLE}.{name}" for name in names}
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    # Plans of tensor parallelism know weights and would leave scales behind.
    for inner in model.modules():
        if getattr(inner, "_tp_plan", None):
            inner._tp_plan = {}


@torch.no_grad()
def to_quantized(model: Any, codes: Mapping[str, Any], config: RiGPTQuantizationConfig) -> Any:
    """
    A model of codes, from one of weights and from what rounds them.

    Args:
        model (`RiGPTForCausalLM`): its class, configuration and what has no codes; left as it is.
        codes (`Mapping[str, Codes]`):
            by name of a linear map or table: `codes` `[m, n]` of int8, `scales` `[m, n / group]`, `bits`, `group` and
            an optional `gain` `[n]`. A head that is tied to its table has none of its own.
        config (`RiGPTQuantizationConfig`): what is said of all; what differs is added to a copy of it.

    Raises:
        ValueError: if codes are not those of a module, out of their range or not as the module's shape, or layers are
            read in a way that needs weights.
    """
    if model.config.depth_interpolation == "linear":
        raise ValueError(
            "`depth_interpolation='linear'` adds weights of neighbouring layers, and codes cannot be added. Keep the "
            "weights of this model."
        )
    modules = convertible(model)
    tied = model.config.tie_word_embeddings
    if unknown := set(codes) - set(modules):
        raise ValueError(f"`codes` must be those of linear maps and tables, got {sorted(unknown)[0]!r}.")
    if tied and HEAD in codes:
        raise ValueError(f"`codes` of {HEAD!r} are those of {TABLE!r}, to which it is tied, got two. Leave them out.")
    written = copy.deepcopy(config)
    given = {**codes, HEAD: codes[TABLE]} if tied and TABLE in codes else codes
    written.modules_to_not_convert = [name for name in modules if name not in given]
    written.modules_with_gain = [name for name in modules if name in given and given[name].gain is not None]
    forms = {name: (given[name].bits, given[name].group) for name in modules if name in given}
    odd = {name: form for name, form in forms.items() if form != config.default(name)}
    written.exceptions = {name: {"bits": bits, "group": group} for name, (bits, group) in odd.items()}
    RiGPTQuantizationConfig(**written.to_dict())  # raises for bits and groups that there are not

    plain = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in given}
    tensors = {name: tensor.detach().clone() for name, tensor in plain.items()}
    for name in codes:
        check_codes(name, codes[name], modules[name])
        tensors[f"{name}.codes"] = pack(codes[name].codes, codes[name].bits)
        tensors[f"{name}.scales"] = codes[name].scales.to(torch.float16)
        if codes[name].gain is not None:
            tensors[f"{name}.gain"] = codes[name].gain.to(torch.float16)
        if getattr(modules[name], "bias", None) is not None:
            tensors[f"{name}.bias"] = modules[name].bias.detach().clone()
    if tied:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{HEAD}.")}
    whole = copy.deepcopy(model.config)
    whole.quantization_config = written.to_dict()
    dtype = model.dtype
    made = type(model).from_pretrained(None, config=whole, state_dict=tensors, dtype=dtype)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)


def check_codes(name: str, given: Any, module: nn.Module) -> None:
    """Raise a `ValueError` if codes are not those of a module."""
    rows, columns = module.weight.shape
    group = given.group or columns
    if tuple(given.codes.shape) != (rows, columns) or given.codes.dtype != torch.int8:
        raise ValueError(
            f"`codes` of {name!r} must be int8 of shape {(rows, columns)}, got {given.codes.dtype} of "
            f"{tuple(given.codes.shape)}."
        )
    if columns % group or tuple(given.scales.shape) != (rows, columns // group):
        raise ValueError(
            f"`scales` of {name!r} must be those of groups of {group} in {columns} inputs of {rows} rows, got the "
            f"shape {tuple(given.scales.shape)}."
        )
    reach = 2 ** (given.bits - 1)
    if int(given.codes.min()) < -reach or int(given.codes.max()) >= reach:
        raise ValueError(
            f"`codes` of {name!r} must lie from {-reach} to {reach - 1}, got {int(given.codes.min())} to "
            f"{int(given.codes.max())}."
        )
    if not torch.equal(given.scales.to(torch.float16).to(given.scales.dtype), given.scales):
        raise ValueError(
            f"`scales` of {name!r} must be finite numbers of float16. Round them before codes are chosen."
        )
    gain = given.gain
    if gain is not None and (tuple(gain.shape) != (columns,) or not torch.equal(gain.half().to(gain), gain)):
        raise ValueError(f"`gain` of {name!r} must be {columns} finite numbers of float16, got {gain!r:.80}.")


def has_codes(module: nn.Module) -> bool:
    """Whether a module is made of codes, be its class that of the package or of a folder's own code."""
    return hasattr(module, "codes") and hasattr(module, "scales")


def refuse_missing(names: Any) -> None:
    """Raise a `ValueError` if a loader found no codes or scales, in whose place it would leave arbitrary numbers."""
    if lost := [name for name in names if name.rpartition(".")[2] in STORED]:
        raise ValueError(
            f"`{sorted(lost)[0]}` must be stored for a map that has codes, got none. Write the model again."
        )


def register() -> None:
    """Make the library know both, unless the other of the package and a folder's code has done so."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(RiGPTQuantizationConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(RiGPTQuantizer)


register()
