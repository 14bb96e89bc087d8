"""The configuration of RiGPT: every option, its default and every cross-check between options."""

import copy
import math
import os
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from .layers_rigpt import check_experts, check_layers, fill_in_layer_types
from .neurons_rigpt import check_neurons
from .norms_rigpt import check_head_norms
from .parallel_rigpt import pipeline_parallel_plan, tensor_parallel_plan
from .rope_rigpt import check_learned_frequencies, check_rope_types, check_rotation
from .rope_rigpt import default_rotary_frequencies as default_rotary_frequencies
from .rope_rigpt import rotary_frequencies as rotary_frequencies
from .scores_rigpt import SCORES
from .token_symmetry_rigpt import check_token_symmetry, reason_not_to_save


if TYPE_CHECKING:
    # The library copies what a file imports along with it: by this line a configuration brings the network.
    from .modeling_rigpt import RiGPTModel  # noqa: F401

    # Never None once `__post_init__` has filled it in.
    IntFilledIn = Any
    RopeFilledIn = Any
else:
    IntFilledIn = int | None
    RopeFilledIn = RopeParameters | dict | None

logger = logging.get_logger(__name__)
# Whichever class is saved, the folder loads as any of them.
AUTO_CLASSES = {
    "AutoModel": "RiGPTModel",
    "AutoModelForCausalLM": "RiGPTForCausalLM",
    "AutoModelForSequenceClassification": "RiGPTForSequenceClassification",
    "AutoModelForTokenClassification": "RiGPTForTokenClassification",
    "AutoModelForQuestionAnswering": "RiGPTForQuestionAnswering",
}
POSITION_EMBEDDING_TYPES = ("learned", "rotary", "alibi")
# Solvers of torchdiffeq that make `depth_steps` steps per layer, with their evaluations of the field per step.
FIXED_STEP_SOLVERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
# And those that choose their steps.
ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
DEPTH_INTERPOLATIONS = ("constant", "linear")
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "relu2", "silu")
# Same formula, evaluated by PyTorch in one pass over memory instead of eight.
ACTIVATION_SYNONYMS = {"gelu_new": "gelu_pytorch_tanh"}
# The least and the largest value of every size; a layer takes about a millisecond to make, and memory.
LARGEST = 2**31 - 1
SIZES = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    (1, LARGEST),
) | {"head_dim": (1, 2**20), "num_hidden_layers": (0, 10_000), "max_position_embeddings": (1, LARGEST)}


@strict
class RiGPTConfig(PreTrainedConfig):
    r"""
    Configuration of a RiGPT, a decoder whose hidden space has no preferred basis.

    Fields that Llama has as well keep Llama's name and meaning. The defaults give a model of GPT-2's size.

    Args:
        vocab_size (`int`, defaults to 50257):
            Number of tokens `V`.
        embedding_size (`int`, *optional*):
            Lexical size `D`, the length of a token's embedding. When given, `project_in` (`[d, D]`) carries embeddings
            into the stream and `project_out` (`[D, d]`) carries it back into the last hidden state, so that a rotation
            of the stream never touches the table of tokens; `D` may differ from `hidden_size`. `None`: no projections,
            the embeddings are vectors of the stream.
        hidden_size (`int`, defaults to 768):
            Stream size `d`.
        intermediate_size (`int`, *optional*):
            Neurons per layer `F`. Defaults to `4 * hidden_size`.
        num_hidden_layers (`int`, defaults to 12):
            Number of layers.
        num_attention_heads (`int`, defaults to 12):
            Query heads `H`.
        num_key_value_heads (`int`, *optional*):
            Key and value heads `K`, a divisor of `H`. Defaults to `num_attention_heads`.
        head_dim (`int`, *optional*):
            Dimensions per head `h`. Defaults to `hidden_size // num_attention_heads`.
        hidden_act (`str`, defaults to `"gelu_pytorch_tanh"`):
            One of `"gelu"`, `"gelu_pytorch_tanh"` (GPT-2's `"gelu_new"` is accepted and is the same function),
            `"relu"`, `"relu2"`, `"silu"`.
        gated_mlp (`bool`, defaults to `False`):
            `act(gate(x)) * up(x)` instead of `act(up(x))`.
        attention_bias (`bool`, defaults to `False`):
            Biases on the query, key and value maps.
        attention_output_bias (`bool`, defaults to `False`):
            Bias on the attention's output map.
        mlp_bias (`bool`, defaults to `False`):
            Biases on all maps of the MLP, those of each expert and of routers among them.
        swiglu_limit (`float`, *optional*):
            `L`, which bounds what the neurons of a gated MLP read, as in gpt-oss: `act(α gate)/α · (up + 1)`, with
            gates of at most `L` and `up` between `-L` and `L`. `None`: `act(gate) · up`.
        swiglu_alpha (`float`, defaults to 1.0):
            `α`. Needs `swiglu_limit`.
        num_experts (`int`, *optional*):
            Experts per layer `E`, as in Mixtral and Qwen-MoE: MLPs of which a token goes through those that a router,
            `mlp.gate`, gives the largest probabilities. `None`: one MLP for all tokens.
        num_experts_per_tok (`int`, defaults to 2):
            Experts that a token goes through.
        norm_topk_prob (`bool`, defaults to `False`):
            Their weights are divided by their sum; otherwise they are the probabilities among all experts.
        moe_intermediate_size (`int`, *optional*):
            Neurons of each expert. Defaults to `intermediate_size`, which is that of layers without experts.
        shared_expert_intermediate_size (`int`, *optional*):
            Neurons of one more expert, `mlp.shared_expert`, which every token goes through, by a share that
            `mlp.shared_expert_gate` says. `None`: there is none.
        mlp_only_layers (`list[int]`, *optional*):
            Numbers of layers without experts, with one MLP for all tokens.
        output_router_logits (`bool`, defaults to `False`):
            Return the logits of routers, and add how unequally tokens are spread over experts to the loss.
        router_aux_loss_coef (`float`, defaults to 0.0):
            The share of that in the loss.
        output_bias (`bool`, defaults to `False`):
            Bias on `project_out`; needs `embedding_size`.
        position_embedding_type (`str`, defaults to `"rotary"`):
            `"learned"`: a table of `max_position_embeddings` vectors of the stream. `"rotary"`: a one-parameter
            rotation group acting on queries and keys. `"alibi"`: `slope · distance` is taken from every score, with a
            slope for each head, `self_attn.alibi.weight`, that is not learned (arXiv 2108.12409). Distances are
            counted in tokens that are seen, whatever `position_ids` say beyond where packed sequences begin.
        rope_parameters (`dict`, *optional*):
            `rope_type`, `rope_theta` and what else the library's rope types need; or such a dictionary for each of
            the `layer_types`. Only with `"rotary"`.
        rotary_learned_frequencies (`bool`, defaults to `False`):
            Learn the frequencies, one set per layer and key-value head, starting from those of `rope_parameters`.
        no_rope_layers (`list[int]`, *optional*):
            For every layer 1 if positions turn its heads, 0 if it has none (NoPE). `None`: all are turned.
        max_position_embeddings (`int`, defaults to 1024):
            Longest sequence the model is made for.
        layer_types (`list[str]`, *optional*):
            For every layer `"full_attention"`, which sees everything before it, or `"sliding_attention"`. `None`: all
            are full, or, with a `sliding_window`, all slide.
        sliding_window (`int`, *optional*):
            Positions that a query of a sliding layer sees, its own among them.
        attention_score (`str`, defaults to `"dot"`):
            `"dot"`: `q·k`. `"squared_distance"`: `q·k - λ|k|²/2`, which for `λ = 1` is `-|q-k|²/2` up to a constant of
            the query. `"distance"`: `(1-λ) q·k - λ|q-k|`. `λ`, one per head, is the learned
            `self_attn.distance_weight`.
        attention_sinks (`bool`, defaults to `False`):
            A logit for each head in every softmax, the learned `self_attn.sinks`, to which no key belongs, as in
            gpt-oss: probabilities sum to less than 1.
        qk_norm (`bool`, defaults to `False`):
            Normalise queries and keys before the score.
        qk_norm_over (`str`, defaults to `"head"`):
            What has the length that they are divided by; needs `qk_norm`. `"head"`: each head its own. `"all"`: all
            heads of a layer together, as in OLMo 2, where a vector of gains then has an entry per dimension of each.
        qk_norm_gain (`str`, *optional*):
            What else the norms of queries and keys have, in `self_attn.q_norm.weight` and `k_norm.weight`; needs
            `qk_norm`. `"vector"`: a gain per dimension of the head, `g n(q)`, which all heads of a layer share, as in
            Qwen3, unless they are normalised together; heads of queries and keys then have a preferred basis, up to
            signs. `"vector_per_head"`: every head has gains of its own, as in Cohere and StableLM. `"metric"`: a map
            `L` for each head that says what is a length, `q / sqrt(|L q|²/h + eps)`;
            `|L q|² = qᵀ Lᵀ L q` is positive whatever is learned, and `L` turns along with its head, so no basis is
            preferred. `None`: nothing, `n(q)`.
        qk_norm_bias (`bool`, defaults to `False`):
            A vector behind those norms that turns with its head, `self_attn.q_norm.bias` and `k_norm.bias`, as
            Persimmon has; needs `qk_norm`.
        use_parallel_residual (`bool`, defaults to `False`):
            Attention and MLP of a layer read the same stream, and both are added to it; otherwise the MLP reads what
            attention has written.
        attn_logit_softcapping (`float`, *optional*):
            `c` in `c tanh(score / c)`, which bounds scores before the softmax, as in Gemma 2.
        final_logit_softcapping (`float`, *optional*):
            The same for logits. The head applied to the last hidden state then gives the logits before it.
        pre_norm (`bool`, defaults to `True`):
            Attention and MLP read `n(x)`; without, which needs `post_norm`, the stream itself, as in OLMo 2.
        post_norm (`bool`, defaults to `False`):
            What attention and MLP write is normalised, with a gain for each dimension: `x + Q (g n(y))`. The gains are
            in a frame of their own, from which the frozen orthogonal map `carry` leads into the stream.
        embedding_norm (`bool`, defaults to `False`):
            Start the stream from `n(x0)` instead of `x0`, so that every token begins with the same length.
        embedding_norm_map (`bool`, defaults to `False`):
            Start it from `M n(x0) + b`: `embedding_map`, an affine map behind that norm, is BLOOM's gain and bias in
            any frame. Needs `embedding_norm`.
        value_embedding_period (`int`, *optional*):
            Every so many layers, counted back from the last and without the first, a token adds a vector of its own
            to the value of every key-value head, through a gate that reads the stream. `None`: nowhere. Such a model
            needs `input_ids`.
        local_frames (`bool`, defaults to `False`):
            Give every layer a frame of its own; frozen orthogonal maps, `transport`, carry the stream from each to the
            next and from the last back. At first identities. See [`rigpt_hf.symmetry.to_local_frames`].
        depth_solver (`str`, *optional*):
            Read depth as time: the stream follows `dx/dt = layer(x) - x` from layer to layer, integrated by this
            solver of torchdiffeq (the extra `flow`). With fixed steps: `"euler"` (whose single step per layer is the
            ordinary network), `"midpoint"`, `"heun2"`, `"heun3"`, `"rk4"`. With steps of its own choice: `"dopri5"`,
            `"dopri8"`, `"bosh3"`, `"fehlberg2"`, `"adaptive_heun"`: those look at all positions at once, so later
            tokens bear on earlier ones within the tolerances, and there is no cache. `None`: the ordinary network.
        depth_steps (`int`, defaults to 1):
            Steps per layer of a solver with fixed steps.
        depth_interpolation (`str`, defaults to `"constant"`):
            Weights between the layers: `"constant"` keeps a layer's until the next, `"linear"` interpolates. Weights
            of neighbours are then added, so all layers share the frames of their heads and neurons.
        depth_rtol (`float`, defaults to 1e-5), depth_atol (`float`, defaults to 1e-6):
            Tolerances of a solver that chooses its steps: the root mean square of its error against
            `depth_atol + depth_rtol * rms(x)`, with the stream `x` at a layer's beginning as a whole, not coordinate
            by coordinate, so that no basis has a say in the steps.
        depth_adjoint (`bool`, defaults to `False`):
            Gradients from the adjoint equation, solved backwards, instead of through the steps of the solver: memory
            does not grow with the steps, and gradients are exact only in the limit of many.
        rms_norm_eps (`float`, defaults to 1e-5):
            `eps` in `n(x) = x / sqrt(mean(x²) + eps)`.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the Gaussian initial weights.
        attention_dropout (`float`, defaults to 0.0):
            Dropout of attention probabilities.
        residual_dropout (`float`, defaults to 0.0):
            Probability that the output of an attention or MLP block is dropped for a token, the whole vector at once:
            dropping single coordinates would prefer a basis.
        embedding_dropout (`float`, defaults to 0.0):
            The same for the embedding of a token.
        tie_word_embeddings (`bool`, defaults to `True`):
            Use the table of tokens for the output as well.
        use_cache (`bool`, defaults to `True`):
            Return keys and values for fast generation.
        token_symmetry (`dict`, *optional*):
            The record of a symmetry of the tokens that the weights have: `rigpt_hf.symmetry.tokens.Representation`
            reads and writes it. Neither shapes nor the function depend on it. It states what was so when it was made;
            whether the weights have it is measured by `Representation.distance`, `rigpt card` and `rigpt rotate`.
        converted_from (`str`, *optional*):
            A record alone: the `model_type` of the stock class that was converted into this model, or that its first
            ancestor was. `rigpt export` takes it for the class to go back to.

    Raises:
        ValueError: if a value or a combination of values is impossible; the message names the field and the rule.

    Example:

    ```python
    >>> from rigpt_hf import RiGPTConfig, RiGPTForCausalLM

    >>> config = RiGPTConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=2, vocab_size=1000)
    >>> model = RiGPTForCausalLM(config)
    ```
    """

    model_type = "rigpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    vocab_size: int = 50257
    embedding_size: int | None = None
    hidden_size: int = 768
    intermediate_size: IntFilledIn = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: IntFilledIn = None
    head_dim: IntFilledIn = None
    hidden_act: str = "gelu_pytorch_tanh"
    gated_mlp: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = False
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    mlp_only_layers: list[int] | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0
    output_bias: bool = False
    position_embedding_type: str = "rotary"
    rope_parameters: RopeFilledIn = None
    rotary_learned_frequencies: bool = False
    no_rope_layers: list[int] | None = None
    max_position_embeddings: int = 1024
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    attention_score: str = "dot"
    attention_sinks: bool = False
    qk_norm: bool = False
    qk_norm_over: str = "head"
    qk_norm_gain: str | None = None
    qk_norm_bias: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    pre_norm: bool = True
    post_norm: bool = False
    use_parallel_residual: bool = False
    embedding_norm: bool = False
    embedding_norm_map: bool = False
    value_embedding_period: int | None = None
    local_frames: bool = False
    depth_solver: str | None = None
    depth_steps: int = 1
    depth_interpolation: str = "constant"
    depth_rtol: float = 1e-5
    depth_atol: float = 1e-6
    depth_adjoint: bool = False
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    token_symmetry: dict | None = None
    converted_from: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_experts is not None and self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        self.hidden_act = ACTIVATION_SYNONYMS.get(self.hidden_act, self.hidden_act)
        rotary = self.position_embedding_type == "rotary"
        if not rotary and self.rope_parameters:
            raise ValueError(
                "`rope_parameters` has a meaning only with `position_embedding_type='rotary'`, got "
                f"{self.rope_parameters} with {self.position_embedding_type!r}. Leave it out."
            )
        self._check_size("num_hidden_layers")  # before anything is listed for each of them
        fill_in_layer_types(self)
        self._check_choice("attention_score", tuple(SCORES))  # which the plan reads
        if rotary and isinstance(self.rope_parameters, dict):  # before the base class looks for the type
            check_rope_types(self)
        self.base_model_tp_plan = tensor_parallel_plan(self)
        self.base_model_pp_plan = pipeline_parallel_plan(self)
        super().__post_init__(**kwargs)
        if not rotary:  # the base class fills in rotary defaults for every config that has the field
            self.rope_parameters = None
        self.validate_architecture()  # `@strict` does so too, but hides the `ValueError` in an exception of its own

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        As for every config; it brings the code of all models along, and names them for the Auto classes.

        The record of a token symmetry comes along with its frame. Where it would not be true of what is saved, or the
        frame is not any more where the model was loaded from, it is left out with a warning. It is not measured again:
        after weights were changed by hand, set `config.token_symmetry` to `None`.
        """
        models = {auto_class: f"modeling_rigpt.{name}" for auto_class, name in AUTO_CLASSES.items()}
        self.auto_map = models | (getattr(self, "auto_map", None) or {})
        saved = self
        if self.token_symmetry is not None and (reason := reason_not_to_save(self, save_directory)):
            logger.warning(f"`token_symmetry` is not saved to {str(save_directory)!r}: {reason}.")
            saved = copy.copy(self)
            saved.token_symmetry = None
        super(RiGPTConfig, saved).save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As for every config; fields among the keyword arguments, which `from_pretrained` takes, are checked too."""
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in RiGPTConfig.__annotations__}
        if "depth_solver" in changes and changes["depth_solver"] is None:
            # What only a solver has goes with it.
            changes = {"depth_steps": 1, "depth_interpolation": "constant", "depth_adjoint": False} | changes
        return super().from_dict(config_dict | changes, **kwargs)

    def validate_architecture(self):
        """Cross-checks between fields; called by `@strict` after construction and before saving."""
        self._check_choice("attention_score", tuple(SCORES))
        check_head_norms(self)
        self._check_choice("position_embedding_type", POSITION_EMBEDDING_TYPES)
        self._check_choice("hidden_act", ACTIVATIONS)
        for name in SIZES:
            self._check_size(name)
        if self.embedding_size is not None:
            self._check_size("embedding_size")
        if self.value_embedding_period is not None:
            self._check_size("value_embedding_period")
            if self.num_hidden_layers < 2:
                raise ValueError(
                    "`value_embedding_period` needs `num_hidden_layers` of at least 2, as the first layer has none, "
                    f"got {self.num_hidden_layers}. Leave it out."
                )
        self._check_depth()
        self._check_norms()
        check_layers(self)
        check_experts(self)
        check_neurons(self)
        for name in ("rms_norm_eps", "initializer_range"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, got {getattr(self, name)}.")
        for name in ("attention_dropout", "residual_dropout", "embedding_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` is a probability in [0, 1), got {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` must be a multiple of `num_key_value_heads`, got {self.num_attention_heads} "
                f"and {self.num_key_value_heads}. Every key-value head serves the same number of query heads."
            )
        if self.output_bias and self.embedding_size is None:
            raise ValueError(
                "`output_bias` is the bias of `project_out` and needs `embedding_size`, got `embedding_size=None`. "
                "Set `embedding_size` (it may equal `hidden_size`) or leave `output_bias` out."
            )
        if self.token_symmetry is not None:
            check_token_symmetry(self)
        if self.position_embedding_type == "rotary":
            check_rotation(self)
        if self.rotary_learned_frequencies:
            check_learned_frequencies(self)

    def _check_norms(self):
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}. Leave it out for no bound.")
        if not (self.pre_norm or self.post_norm):
            raise ValueError(
                "`pre_norm=False` needs `post_norm=True`, got False: nothing else would bound what layers read."
            )
        if self.embedding_norm_map and not self.embedding_norm:
            raise ValueError(
                "`embedding_norm_map` is behind the norm of embeddings and needs `embedding_norm=True`, got False. "
                "Set `embedding_norm`, or leave `embedding_norm_map` out."
            )
        if self.post_norm and self.local_frames:
            raise ValueError(
                "`post_norm=True` has one map from the frame of its gains into that of the stream, got "
                "`local_frames=True`, where each layer has a stream of its own. Leave one of them."
            )

    def _check_depth(self):
        self._check_choice("depth_interpolation", DEPTH_INTERPOLATIONS)
        self._check_size("depth_steps")
        for name in ("depth_rtol", "depth_atol"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")
        if self.depth_solver is None:
            for name, default in (("depth_steps", 1), ("depth_interpolation", "constant"), ("depth_adjoint", False)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(f"`{name}` needs a `depth_solver`, got {value!r} without. Name one, or leave it.")
            return
        self._check_choice("depth_solver", (*FIXED_STEP_SOLVERS, *ADAPTIVE_SOLVERS))
        if self.depth_solver in ADAPTIVE_SOLVERS and self.depth_steps != 1:
            raise ValueError(
                f"`depth_steps` must be 1 for `depth_solver={self.depth_solver!r}`, which chooses its steps, got "
                f"{self.depth_steps}. Set `depth_rtol` and `depth_atol` instead."
            )
        if self.depth_interpolation == "linear":
            if self.value_embedding_period is not None:
                raise ValueError(
                    "`depth_interpolation='linear'` needs layers with the same parameters, got "
                    f"`value_embedding_period={self.value_embedding_period}`. Use 'constant', or leave one of them."
                )
            if self.local_frames:
                raise ValueError(
                    "`depth_interpolation='linear'` adds weights of neighbouring layers and needs one frame for all, "
                    "got `local_frames=True`. Use 'constant', or `rigpt_hf.symmetry.to_global_frame`."
                )

    def _check_choice(self, name: str, choices: tuple[str, ...]):
        if (value := getattr(self, name)) not in choices:
            shown = repr(value) if len(str(value)) <= 80 else f"'{str(value)[:77]}...'"
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {shown}.")

    def _check_size(self, name: str):
        value, (least, most) = getattr(self, name), SIZES.get(name, (1, LARGEST))
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if value > most:
            raise ValueError(f"`{name}` must be at most {most}, got {value:.3g}.")

    @property
    def lexical_size(self) -> int:
        """Length of a token's embedding: `embedding_size`, or `hidden_size` where there are no projections."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size


__all__ = ["RiGPTConfig"]
