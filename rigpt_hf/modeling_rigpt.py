"""RiGPT: a GPT with no preferred basis. Reads top to bottom; needs only its sibling files, torch and transformers.

Shapes: B batch, S new positions, T positions including the cache, V vocabulary, D lexical size, d stream size, H query
heads, K key-value heads, h dims per head, r <= h rotated dims, F neurons.

    x0     = U E[token] + P[position]       U: project_in [d, D]    E: embed_tokens [V, D]    P: embed_positions
    x0     = n(x0), or M n(x0) + b          with `embedding_norm`, `embedding_norm_map`; M, b: embedding_map
    n(x)   = x / sqrt(mean(x²) + eps)       commutes with every rotation of the stream
    x      = T x                            with `local_frames`, before each layer and after the last; T orthogonal
    x     += O attention(n(x))              o_proj, q_proj, k_proj, v_proj; with `qk_norm` q_norm, k_norm
    x     += D act(A n(x))                  down_proj, up_proj (and gate_proj); experts: `mlp_rigpt.py`
    x     += O attention(n(x)) + D act(A n(x))      both lines as one, with `use_parallel_residual`
    x     += Q (g n(y))                     with `post_norm`, for `y` in the place of the two; Q: carry, orthogonal
    logits = E (G n(x) + b)                 G: project_out [D, d]   E: lm_head, tied or separate

The lines of a layer are in `decoder_rigpt.py`, scores other than the dot product and sinks beside them in
`scores_rigpt.py`; with `depth_solver` the two lines are the increment that a flow follows: `flow_rigpt.py`; rotary
positions are in `rope_rigpt.py`, positions as biases of scores in `alibi_rigpt.py`, norms of queries and keys in
`norms_rigpt.py`, bounds of neurons in `neurons_rigpt.py`, products of few rows, the loss and the gradient of a tied
table in `kernels_rigpt.py`, maps and tables made of codes in `packed_rigpt.py` and `quantized_rigpt.py`.
No parameter acts on single coordinates of the stream, so turning the stream by any orthogonal Q, weights included,
changes no logit. How each parameter turns is the table of frames in `rigpt_hf.symmetry`.
"""

from collections.abc import Mapping
from itertools import repeat
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .alibi_rigpt import RiGPTAlibi
from .configuration_rigpt import ADAPTIVE_SOLVERS, AUTO_CLASSES, RiGPTConfig
from .decoder_rigpt import RiGPTAttention, RiGPTDecoderLayer, RiGPTRMSNorm, RiGPTTransport, RiGPTVectorDropout
from .flow_rigpt import neighbours, prepare_cache, torchdiffeq
from .hub_rigpt import RiGPTHubMixin
from .kernels_rigpt import causal_lm_loss, linear, packed_lengths, tied_ends
from .layers_rigpt import FULL, SLIDING, by_layer_type, of_layer_type
from .mlp_rigpt import RiGPTExperts, RiGPTRouter, load_balancing_loss
from .norms_rigpt import RiGPTHeadNorm
from .quantized_rigpt import has_codes, refuse_missing
from .rope_rigpt import RiGPTRotaryEmbedding, rope_kinds
from .scores_rigpt import SCORES, capable


class RiGPTPreTrainedModel(RiGPTHubMixin, PreTrainedModel):
    """Loading, saving, initialisation and the choice of an attention backend."""

    config: RiGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RiGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "following"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": RiGPTDecoderLayer,
        "attentions": RiGPTAttention,
        "router_logits": OutputRecorder(RiGPTRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """
        Gaussian weights; maps between frames Haar-orthogonal. Neither law changes under a rotation.

        Maps that write to the residual stream are scaled by `1/sqrt(2·layers)` as in GPT-2.
        """
        if isinstance(module, RiGPTAttention | RiGPTHeadNorm | RiGPTAlibi | RiGPTExperts):
            module.reset_own_parameters()
        elif isinstance(module, RiGPTTransport):
            init.eye_(module.weight)
        elif isinstance(module, RiGPTRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif getattr(module, "carries_between_frames", False):
            # On the side, whole and in float32: the decomposition behind it exists neither in shards nor in 16 bits.
            whole = torch.empty(module.weight.shape, dtype=torch.float32, device=module.weight.device)
            init.copy_(module.weight, nn.init.orthogonal_(whole))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif getattr(module, "writes_to_residual", False):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """
        As for every model; what is frozen by its nature is so again.

        Raises:
            ValueError: if the weights have local frames and the configuration has not, which is another function.
        """
        wanted = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if any(name.endswith("transport.weight") for name in report["unexpected_keys"]):
            raise ValueError(
                "`local_frames` must be True for weights that have them, got False. Load them as they are, then call "
                "`rigpt_hf.symmetry.to_global_frame`."
            )
        refuse_missing(report["missing_keys"])
        freeze_transports(model)
        return (model, report) if wanted else model

    @property
    def dtype(self) -> torch.dtype:
        """As for every model; where the table is made of codes, what it answers in."""
        table = self.get_input_embeddings()
        return table.dtype if has_codes(table) else super().dtype

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """
        As for every model; the tables of values get as many rows as that of the tokens.

        New rows have no symmetry, and those that are gone may have been moved: a recorded one is dropped.
        """
        before = self.config.vocab_size
        if has_codes(self.get_input_embeddings()) and new_num_tokens not in (None, before):
            raise ValueError(
                f"`new_num_tokens` must be {before} for a table of codes, got {new_num_tokens}. Call `dequantize()` "
                "first."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if embeddings.num_embeddings != before:
            self.config.token_symmetry = None
        for module in self.modules():
            if isinstance(module, RiGPTAttention) and module.value_embedding is not None:
                resized = self._get_resized_embeddings(module.value_embedding, embeddings.num_embeddings)
                module.value_embedding = resized
        return embeddings

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The backend to use: the one asked for if it can express the scores, else a `ValueError`."""
        score = SCORES[self.config.attention_score]
        if demands := score.demands(self.config):
            # Without one asked for the quickest that all can use.
            able = capable(demands)
            requested_attention = requested_attention or ("sdpa" if "sdpa" in able else able[0])
            score.check_backend(requested_attention, demands)
        if requested_attention and requested_attention.startswith("paged|"):
            score.check_paged(requested_attention, self.config)
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


def freeze_transports(model: nn.Module) -> None:
    """Once more after loading, which makes every parameter a trainable one."""
    for module in model.modules():
        if isinstance(module, RiGPTTransport | RiGPTAlibi):
            module.weight.requires_grad_(False)


class RiGPTModel(RiGPTPreTrainedModel):
    """Embedding, decoder layers, last norm and the way back to the lexical frame: the head's input."""

    def __init__(self, config: RiGPTConfig):
        super().__init__(config)
        config.validate_architecture()  # fields may have been set since the config was made
        if config.depth_solver is not None:
            torchdiffeq()
        # No `padding_idx`: where padding is the end-of-text token, as for GPT-2, that token must keep learning.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.lexical_size)
        self.project_in = None
        if config.embedding_size is not None:
            self.project_in = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
            self.project_in.carries_between_frames = True
        self.embed_positions, self.rotary_emb = None, None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "rotary" and not config.rotary_learned_frequencies:
            kinds = {kind: RiGPTRotaryEmbedding(of_layer_type(config, kind)) for kind in rope_kinds(config)}
            self.rotary_emb = nn.ModuleDict(kinds) if by_layer_type(config.rope_parameters) else kinds[FULL]
        self.embedding_norm = RiGPTRMSNorm(config.rms_norm_eps) if config.embedding_norm else None
        self.embedding_map = None
        if config.embedding_norm_map:
            self.embedding_map = nn.Linear(config.hidden_size, config.hidden_size)
            self.embedding_map.carries_between_frames = True
        self.dropout = RiGPTVectorDropout(config.embedding_dropout)
        self.layers = nn.ModuleList(RiGPTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.transport = RiGPTTransport(config.hidden_size) if config.local_frames else None
        self.carry = RiGPTTransport(config.hidden_size) if config.post_norm else None
        self.norm = RiGPTRMSNorm(config.rms_norm_eps)
        self.project_out = None
        if config.embedding_size is not None:
            self.project_out = nn.Linear(config.hidden_size, config.embedding_size, bias=config.output_bias)
            self.project_out.carries_between_frames = True
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `[B, S]`), or inputs_embeds (of shape `[B, S, D]`): one of the two.
            attention_mask (`torch.Tensor` of shape `[B, T]`, *optional*): 1 for tokens to attend to, 0 for padding.
            position_ids (`torch.LongTensor` of shape `[B, S]`, *optional*):
                Defaults to counting on from the cache. Ids that restart mark packed sequences, which then do not see
                each other, if neither a mask nor a cache is given.
            past_key_values (`Cache`, *optional*), use_cache (`bool`, *optional*): keys and values of earlier calls.

        Returns:
            `BaseModelOutputWithPast`; the head applied to `last_hidden_state` `[B, S, D]` is the logits.
            `hidden_states`, one more than layers, are vectors `[B, S, d]` of the stream, the last of them normalised.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, or only embeddings where
                `value_embedding_period` asks for tokens.
        """
        outputs = self.residual_stream(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **(kwargs | {"return_dict": True}),
        )
        # Under pipeline parallelism an earlier stage has no last norm and hands the stream to the next.
        if self.project_out is not None and not isinstance(self.norm, nn.Identity):
            outputs.last_hidden_state = linear(self.project_out, outputs.last_hidden_state)  # [B, S, D]
        return outputs

    @merge_with_config_defaults
    @capture_outputs
    def residual_stream(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        looked_up: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        As [`RiGPTModel.forward`], but with the normalised stream `[B, S, d]` as `last_hidden_state`.

        `looked_up`: the embeddings `[B, S, D]` of the tokens, where they are known.
        """
        check_inputs(self.config, input_ids, inputs_embeds, kwargs)
        given_cache, given_positions = past_key_values, position_ids
        past_key_values, use_cache = prepare_cache(self.config, past_key_values, use_cache, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) if looked_up is None else looked_up
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        hidden_states = self.first_hidden_states(inputs_embeds, position_ids)  # [B, S, d]
        # Packing is looked for only where there is no cache; an empty one made here must not hide it.
        masks = attention_mask
        if not isinstance(masks, dict):  # generation makes them itself for a cache of fixed size
            masks = causal_masks(self.config, hidden_states, attention_mask, given_cache, position_ids)
        packed = given_positions is not None and attention_mask is None and given_cache is None
        if packed and is_flash_attention_requested(self.config) and not {"cache", "cu_seq_lens_q"} & set(kwargs):
            kwargs.update(packed_lengths(position_ids, len(hidden_states)))

        rotations = self.rotations(hidden_states, position_ids)
        own = {
            kind: {"attention_mask": mask, "position_embeddings": rotations.get(kind, rotations.get(FULL))}
            for kind, mask in masks.items()
        }
        kwargs |= {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        if self.config.value_embedding_period is not None:
            kwargs["input_ids"] = input_ids
        if self.carry is not None:
            kwargs["carry"] = self.carry
        kinds = self.config.layer_types or repeat(FULL)
        for (layer, beyond), kind in zip(neighbours(self.layers, self.config), kinds, strict=False):
            hidden_states = layer(hidden_states, **kwargs, **own[kind], **beyond)
        if self.transport is not None:
            # A draft by early exit goes through the frames of the layers that it leaves out.
            for layer in [*self.layers][self.config.num_hidden_layers :]:
                hidden_states = layer.transport(hidden_states)
            hidden_states = self.transport(hidden_states)
        output = BaseModelOutputWithPast if self.config.num_experts is None else MoeModelOutputWithPast
        return output(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def rotations(self, hidden_states: torch.Tensor, position_ids: torch.LongTensor) -> dict[str, Any]:
        """Cosines and sines `[B, S, r]` of the positions by type of layer; under one type if all share them."""
        if self.rotary_emb is None:
            return {}
        if not isinstance(self.rotary_emb, nn.ModuleDict):
            return {FULL: self.rotary_emb(hidden_states, position_ids)}
        return {kind: rotary(hidden_states, position_ids) for kind, rotary in self.rotary_emb.items()}

    def first_hidden_states(self, inputs_embeds: torch.Tensor, position_ids: torch.LongTensor) -> torch.Tensor:
        """The beginning of the stream `[B, S, d]`, from embeddings `[B, S, D]` and positions `[B or 1, S]`."""
        # Under pipeline parallelism a later stage is handed the stream of the stage before as its embeddings.
        if self.layers and isinstance(self.layers[0], nn.Identity):
            return inputs_embeds
        hidden_states = inputs_embeds if self.project_in is None else linear(self.project_in, inputs_embeds)
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        if self.embedding_norm is not None:
            hidden_states = self.embedding_norm(hidden_states)
        if self.embedding_map is not None:
            hidden_states = linear(self.embedding_map, hidden_states)
        return self.dropout(hidden_states)


def causal_masks(
    config: RiGPTConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.LongTensor | None = None,
    **kwargs,
) -> dict[str, Any]:
    """The mask of every type of layer, in the form that the attention backend takes."""
    makers = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
    kinds = dict.fromkeys(config.layer_types or [FULL])
    return {kind: makers[kind](config, inputs_embeds, attention_mask, past_key_values, position_ids) for kind in kinds}


def check_inputs(config: RiGPTConfig, input_ids: Any, inputs_embeds: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for inputs that a model of this configuration cannot take."""
    if (input_ids is None) ^ (inputs_embeds is not None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is None and config.value_embedding_period is not None:
        raise ValueError(
            f"`inputs_embeds` must be left out with `value_embedding_period={config.value_embedding_period}`, whose "
            "layers look up vectors of their own. Pass `input_ids`."
        )
    if kwargs.get("cache") is not None:  # that of continuous batching
        SCORES[config.attention_score].check_paged(config._attn_implementation, config)


class RiGPTForCausalLM(RiGPTPreTrainedModel, GenerationMixin):
    """RiGPT with a language-modelling head, tied to the table of tokens or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: RiGPTConfig):
        super().__init__(config)
        self.model = RiGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.lexical_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()
        if config.base_model_pp_plan is None:
            self._pp_plan = {}

    create_masks_for_generate = staticmethod(causal_masks)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As for every model; none for a solver that chooses its steps from all positions at once."""
        if self.config.depth_solver in ADAPTIVE_SOLVERS:
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    f"`inputs_embeds` cannot start a generation with `depth_solver={self.config.depth_solver!r}`, "
                    "which has no cache to keep them in. Pass `input_ids`, or use a solver with fixed steps."
                )
            generation_config.use_cache = False
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        As [`RiGPTModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `[B, S]`, *optional*):
                Tokens to predict, -100 where there is nothing to learn; shifted inside. `num_items_in_batch` among the
                keyword arguments divides the summed loss instead of the count of this batch.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Compute logits only for the last so many positions, or for these positions; 0 means all.

        Returns:
            `CausalLMOutputWithPast`; `logits` `[B, S, V]`, `loss` in nats per token when `labels` are given. With
            experts `MoeCausalLMOutputWithPast`, and with `output_router_logits` its `router_logits` `[B·S, E]` of each
            layer that has some, and `aux_loss`, a share of which is part of `loss`.
        """
        # What somebody has put in the place of the base model need not know what is looked up already.
        table = self.model.embed_tokens if type(self.model) is RiGPTModel else None
        looked_up, head = tied_ends(table, self.lm_head, input_ids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
            **({} if looked_up is None else {"looked_up": looked_up}),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = outputs.last_hidden_state[:, kept]
        logits = linear(self.lm_head, last) if head is None else nn.functional.linear(last, head)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = {
            "logits": logits,
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        if self.config.num_experts is None:
            return CausalLMOutputWithPast(loss=loss, **output)
        aux_loss = None
        if (router_logits := outputs.router_logits) is not None:
            aux_loss = load_balancing_loss(self.config, router_logits, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, router_logits=router_logits, **output)


def with_head(model: RiGPTPreTrainedModel, config: RiGPTConfig, **head: nn.Module) -> None:
    """
    The constructor of a RiGPT with another head, which reads the last hidden state.

    In place of the generic ones, which find the base model through the Auto classes: those do not know this one when
    the file travels as remote code.
    """
    PreTrainedModel.__init__(model, config)
    model.num_labels = config.num_labels
    model.model = RiGPTModel(config)
    for name, module in head.items():
        model.add_module(name, module)
    model.post_init()


class RiGPTForSequenceClassification(GenericForSequenceClassification, RiGPTPreTrainedModel):
    """RiGPT with a linear classifier of the last token, in the head's place."""

    def __init__(self, config: RiGPTConfig):
        with_head(self, config, score=nn.Linear(config.lexical_size, config.num_labels, bias=False))


class RiGPTForTokenClassification(GenericForTokenClassification, RiGPTPreTrainedModel):
    """RiGPT with a linear classifier of every token, in the head's place."""

    def __init__(self, config: RiGPTConfig):
        score = nn.Linear(config.lexical_size, config.num_labels)
        with_head(self, config, score=score, dropout=RiGPTVectorDropout(config.residual_dropout))


class RiGPTForQuestionAnswering(GenericForQuestionAnswering, RiGPTPreTrainedModel):
    """RiGPT with a linear score of every token as the first and the last of an answer, in the head's place."""

    def __init__(self, config: RiGPTConfig):
        with_head(self, config, qa_outputs=nn.Linear(config.lexical_size, 2))


__all__ = [*AUTO_CLASSES.values(), "RiGPTPreTrainedModel"]
