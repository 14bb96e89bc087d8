"""
What reads and writes hidden states at a named point of the network: steering vectors, linear probes, autoencoders.

Points have the names of TransformerLens, which SAELens writes into its files. Each is the input of one linear map of
the model, or lies in the frame of it, so the table of frames says how it turns:

    blocks.3.hook_resid_pre, hook_resid_mid, hook_resid_post    the residual stream before, in and after layer 3
    blocks.3.attn.hook_z                                        outputs of all query heads, one after the other
    blocks.3.mlp.hook_post                                      neurons, as `down_proj` reads them
    blocks.3.mlp.experts.hook_post, mlp.shared_expert.hook_post   those of experts

For `B = g·A` a hidden state `a` is `M (a + c)` in B, `c` a translation. Vectors turn as differences of hidden states,
probes and encoders so that what they read stays, decoders as vectors, and their biases as hidden states.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...checkpoints.weights import name_some
from ..action import GaugeTransformation
from .axes import Axes


# The linear map that reads a point, or reads in its frame, by the point's name inside a layer.
POINTS = {
    "hook_resid_pre": "self_attn.q_proj",
    "hook_resid_mid": "self_attn.q_proj",
    "hook_resid_post": "self_attn.q_proj",
    "attn.hook_z": "self_attn.o_proj",
    "mlp.hook_post": "mlp.down_proj",
    "mlp.experts.hook_post": "mlp.experts.down_proj",
    "mlp.shared_expert.hook_post": "mlp.shared_expert.down_proj",
}
BLOCK = re.compile(r"blocks\.(\d{1,6})\.([\w.]+?)")
# Parameters of an autoencoder: what reads, what writes, the biases of features, what no frame touches.
ENCODER, DECODER, OUTPUT_BIAS = "W_enc", "W_dec", "b_dec"
FEATURE_BIASES = ("b_enc", "b_gate", "b_mag")
UNTOUCHED = ("threshold", "log_threshold", "r_mag", "scaling_factor", "topk_threshold")
ARCHITECTURES = (None, "standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
# Normalisations of what an autoencoder reads that depend on lengths alone.
BY_LENGTH = ("expected_average_only_in", "constant_norm_rescale")
# A share of an encoder in one direction that is no rounding.
READS = 1e-4


@dataclass(frozen=True)
class Point:
    """
    A point of the network in A and in B.

    Args:
        axes (`Axes`): of the transformation.
        hook (`str`): its name.
        reader (`str`): the parameter whose second axis reads in its frame.
        size (`int`): its dimensions.
        shift (`torch.Tensor`, *optional*): the constant that translations add there, in A's frame.
    """

    axes: Axes
    hook: str
    reader: str
    size: int
    shift: torch.Tensor | None

    def reading(self, tensor: torch.Tensor, at: int) -> torch.Tensor:
        """A tensor that reads here along its axis `at`, carried over."""
        self.check(tensor, at)
        return self.axes.reading(self.reader, tensor, at).to(tensor.dtype)

    def writing(self, tensor: torch.Tensor, at: int, place: bool = False) -> torch.Tensor:
        """A tensor added here along its axis `at`, carried over; `place`: a hidden state, not a difference of two."""
        self.check(tensor, at)
        wide = tensor.to(torch.float64)
        if place and self.shift is not None:
            wide = wide + self.shift
        return self.axes.writing(self.reader, wide, at % wide.dim()).to(tensor.dtype)

    def check(self, tensor: torch.Tensor, at: int) -> None:
        """A `ValueError` if a tensor has another size than the point."""
        if not -tensor.dim() <= at < tensor.dim() or tensor.shape[at] != self.size:
            raise ValueError(
                f"`state` must have {self.size} dimensions at {self.hook!r}, got a tensor of the shape "
                f"{tuple(tensor.shape)}. Name the point that it was made for with `hook`."
            )

    @property
    def keeps_lengths(self) -> bool:
        """Whether a hidden state has the same length in A and in B."""
        return self.shift is None and self.axes.keeps_lengths(self.reader)


def point(axes: Axes, hook: str) -> Point:
    """
    The point of this name.

    Raises:
        ValueError: if the model has none.
    """
    config = axes.g.config
    match = BLOCK.fullmatch(re.sub(r"model\.layers\.(\d+)", r"blocks.\1.hook_resid_post", hook))
    layer, kind = (int(match[1]), match[2]) if match else (0, "")
    if not match or kind not in POINTS or layer >= config.num_hidden_layers:
        raise ValueError(
            f"`hook` must be blocks.N. with one of {', '.join(POINTS)}, and N below {config.num_hidden_layers}, got "
            f"{hook!r}. Name the point of the model that the tensors were made for."
        )
    if kind == "hook_resid_mid" and (config.use_parallel_residual or config.depth_solver is not None):
        raise ValueError(
            f"`hook` must be a point that the model has, got {hook!r}: its layers have no middle. Use hook_resid_pre "
            "or hook_resid_post."
        )
    reader = f"model.layers.{layer}.{POINTS[kind]}.weight"
    if kind == "hook_resid_pre" and config.local_frames:
        reader = f"model.layers.{layer}.transport.weight"
    if reader not in axes.shapes:
        has = [name for name, map_ in POINTS.items() if f"model.layers.{layer}.{map_}.weight" in axes.shapes]
        raise ValueError(f"`hook` must be a point that layer {layer} has, got {hook!r}. It has {', '.join(has)}.")
    shift = axes.input_shift(reader) if "resid" not in kind else None
    return Point(axes, hook, reader, axes.shapes[reader][1], shift)


def transport_features(
    state: Mapping[str, torch.Tensor],
    g: GaugeTransformation,
    hook: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Vectors, probes or an autoencoder of A, for `B = g·A`.

    Args:
        state (`Mapping[str, torch.Tensor]`): an autoencoder by SAELens' names (`W_enc` `[d_in, d_sae]`, `W_dec`
            `[d_sae, d_in]`, `b_enc`, `b_dec`), or vectors `[..., d]` and probes `weight` `[classes, d]` and `bias`.
            Where there are several points, each name begins with that of its own: `blocks.3.hook_resid_post.weight`.
        g (`GaugeTransformation`): brings A to B.
        hook (`str`, *optional*): the point, where names and settings do not say it.
        settings (`Mapping`, *optional*): the `cfg.json` of an autoencoder.

    Raises:
        ValueError: for points and kinds that have no exact form in another frame, or tensors that are unknown.
    """
    axes = Axes(g)
    settings = settings or {}
    hook = hook or of_settings(settings, "hook_name")
    if ENCODER in state:
        if hook is None:
            raise ValueError(
                "`hook` must name the point that the autoencoder reads, got none, and its `cfg.json` does not say it. "
                "Give it, as in blocks.3.hook_resid_post."
            )
        return _autoencoder(state, point(axes, hook), settings)
    result = {}
    for name, tensor in state.items():
        at, part = (hook, name) if hook is not None else _split(name)
        if part.rpartition(".")[2] == "bias":
            weight = name.removesuffix("bias") + "weight"
            if weight not in state:
                raise ValueError(
                    f"`state` must hold `{weight}` beside the bias `{name}` of a probe, got none. Add it."
                )
            result[name] = _less_shift(tensor, state[weight].to(torch.float64).T, point(axes, at).shift)
        elif part.rpartition(".")[2] == "weight":
            result[name] = point(axes, at).reading(tensor, tensor.dim() - 1)
        else:
            result[name] = point(axes, at).writing(tensor, -1)
    return result


def _split(name: str) -> tuple[str, str]:
    """The point that a name begins with, and the rest of it."""
    match = re.match(r"(blocks\.\d+\.(?:\w+\.)*?hook_\w+|model\.layers\.\d+)(?:\.|$)", name)
    if not match:
        raise ValueError(
            f"`hook` must name the point of the network that the tensors belong to, got none, and {name!r} does not "
            "begin with one. Give it, as in blocks.3.hook_resid_post."
        )
    return match[1], name[match.end() :]


def _autoencoder(state: Mapping[str, torch.Tensor], at: Point, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    known = {ENCODER, DECODER, OUTPUT_BIAS, *FEATURE_BIASES, *UNTOUCHED}
    if odd := state.keys() - known:
        raise ValueError(
            f"`state` must be an autoencoder of the architectures {', '.join(filter(None, ARCHITECTURES))}, got "
            f"{name_some(odd)}, of which it is not known how it turns."
        )
    check_autoencoder(at, settings)
    wide = state[ENCODER].to(torch.float64)
    applied = settings.get("apply_b_dec_to_input")
    if at.shift is not None and applied is None:
        raise ValueError(
            f"`settings` must say whether `apply_b_dec_to_input` is on, as a translation shifts {at.hook!r}, got "
            "nothing about it. Give the `cfg.json` of the autoencoder."
        )
    result = {}
    for name, tensor in state.items():
        if name == ENCODER:
            result[name] = at.reading(tensor, 0)
        elif name == DECODER:
            result[name] = at.writing(tensor, 1)
        elif name == OUTPUT_BIAS:
            result[name] = at.writing(tensor, 0, place=True)
        elif name in FEATURE_BIASES and not applied:
            scale = state["r_mag"].to(torch.float64).exp() if name == "b_mag" else 1.0
            result[name] = _less_shift(tensor, wide * scale, at.shift)
        else:
            result[name] = tensor
    return result


def _less_shift(bias: torch.Tensor, reader: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """A bias behind `reader` `[d, features]`, without what that sees of a translation."""
    return bias if shift is None else (bias.to(torch.float64) - shift @ reader).to(bias.dtype)


def of_settings(settings: Mapping[str, Any], name: str) -> Any:
    """A value of `cfg.json`, which older versions of SAELens have outside of `metadata`."""
    for place in (settings, settings.get("metadata") or {}, settings.get("meta") or {}):
        if place.get(name) is not None:
            return place[name]
    return None


def check_autoencoder(at: Point, settings: Mapping[str, Any]) -> None:
    """A `ValueError` if an autoencoder depends on more of hidden states than their frame keeps."""
    if (kind := settings.get("architecture")) not in ARCHITECTURES:
        raise ValueError(
            f"`settings` must be those of one autoencoder at one point, of the architectures "
            f"{', '.join(filter(None, ARCHITECTURES))}, got {kind!r}."
        )
    if (head := of_settings(settings, "hook_head_index")) is not None:
        raise ValueError(
            f"`settings` must be those of an autoencoder that reads all heads, got `hook_head_index={head}`: in the "
            "other model heads may have other numbers."
        )
    how = settings.get("normalize_activations") or "none"
    by_length = how in BY_LENGTH or settings.get("rescale_acts_by_decoder_norm")
    if how not in ("none", *BY_LENGTH):
        raise ValueError(
            f"`settings` must not read single coordinates, got `normalize_activations={how!r}`: a mean over "
            "coordinates is another number in another frame. Train one without it."
        )
    if by_length and not at.keeps_lengths:
        words = f"normalize_activations={how!r}" if how in BY_LENGTH else "rescale_acts_by_decoder_norm=True"
        raise ValueError(
            f"`settings` must not depend on lengths at {at.hook!r}, where {at.axes.frames_of(at.reader, 1)} stretches "
            f"them, got `{words}`. Fold it into the weights first, as SAELens does with `fold_W_dec_norm`."
        )


def check_mean(state: Mapping[str, torch.Tensor], settings: Mapping[str, Any], hook: str | None = None) -> None:
    """
    A `ValueError` if an autoencoder reads the mean over coordinates of a stream whose model has LayerNorms.

    To be called where A is the conversion of such a model: it has no mean there, as nothing else reads it. Whether
    hidden states were centred in training, `center_writing_weights` says; TransformerLens does so by default.
    """
    hook = hook or of_settings(settings, "hook_name") or ""
    loading = of_settings(settings, "model_from_pretrained_kwargs") or {}
    through_lens = of_settings(settings, "model_class_name") in (None, "HookedTransformer")
    if ENCODER not in state or "resid" not in hook or loading.get("center_writing_weights", through_lens):
        return
    encoder = state[ENCODER].to(torch.float64)
    share = float(encoder.mean(dim=0).norm() * len(encoder) ** 0.5 / encoder.norm())
    if share > READS:
        raise ValueError(
            f"`state` must not read the mean over coordinates of the residual stream, got a share of {share:.2g} of "
            "`W_enc` in that direction: a model with LayerNorms ignores it, and its conversion has removed it. Train "
            "the autoencoder on a model loaded with `center_writing_weights=True`, or take the mean out of `W_enc`, "
            "`W_dec` and `b_dec`, which leaves out what it explains."
        )
