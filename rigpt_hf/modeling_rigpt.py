"""RiGPT: a GPT with no preferred basis. Reads top to bottom; needs only its sibling files, torch and transformers.

Shapes: B batch, S positions, V vocabulary, D lexical size, d stream size, F neurons.

    x0     = U E[token] + P[position]       U: project_in [d, D]    E: embed_tokens [V, D]    P: embed_positions
    x0     = n(x0)                          with `embedding_norm`
    n(x)   = x / sqrt(mean(x²) + eps)       commutes with every rotation of the stream
    x      = T x                            with `local_frames`, before each layer and after the last; T orthogonal
    x     += O attention(n(x))              o_proj, q_proj, k_proj, v_proj
    x     += D act(A n(x))                  down_proj, up_proj (and gate_proj)
    logits = E (G n(x) + b)                 G: project_out [D, d]   E: lm_head, tied or separate

With `depth_solver` the two lines of a layer are the increment that a flow follows: `depth_rigpt.py`.
No parameter acts on single coordinates of the stream, so turning the stream by any orthogonal Q, weights included,
changes no logit. How each parameter turns is the table of frames in `rigpt_hf.symmetry`.
"""

from itertools import pairwise

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_rigpt import (
    RiGPTAttention,
    RiGPTLinear,
    RiGPTRotaryEmbedding,
    check_distance_backend,
    check_paged_cache,
    packed_lengths,
)
from .configuration_rigpt import ADAPTIVE_SOLVERS, RiGPTConfig
from .depth_rigpt import flow_through, make_room, torchdiffeq, use_of_cache
from .hub_rigpt import RiGPTHubMixin
from .loss_rigpt import causal_lm_loss
from .stream_rigpt import RiGPTRMSNorm, RiGPTTransport, RiGPTVectorDropout, freeze_transports


class RiGPTMLP(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: RiGPTConfig):
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = RiGPTLinear(*sizes, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = RiGPTLinear(*sizes, bias=config.mlp_bias)
        self.down_proj = RiGPTLinear(*reversed(sizes), bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class RiGPTDecoderLayer(GradientCheckpointingLayer):
    """Two residual lines around parameter-free norms; with `depth_solver` the flow that they are an Euler step of."""

    def __init__(self, config: RiGPTConfig, layer_idx: int):
        super().__init__()
        self.transport = RiGPTTransport(config.hidden_size) if config.local_frames else None
        self.input_layernorm = RiGPTRMSNorm(config.rms_norm_eps)
        self.self_attn = RiGPTAttention(config, layer_idx)
        self.post_attention_layernorm = RiGPTRMSNorm(config.rms_norm_eps)
        self.mlp = RiGPTMLP(config)
        self.dropout = RiGPTVectorDropout(config.residual_dropout)
        for writer in (self.self_attn.o_proj, self.mlp.down_proj):
            writer.writes_to_residual = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        following: nn.Module | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`hidden_states` `[B, S, d]`; `following`: the next layer, towards whose weights a flow may go."""
        if self.transport is not None:
            hidden_states = self.transport(hidden_states)
        if self.self_attn.config.depth_solver is not None:
            return flow_through(self, following, hidden_states, **kwargs)
        return self.block(hidden_states, **kwargs)

    def block(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """The two lines."""
        attention_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attention_output)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class RiGPTPreTrainedModel(RiGPTHubMixin, PreTrainedModel):
    """Loading, saving, initialisation and the choice of an attention backend."""

    config: RiGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RiGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": RiGPTDecoderLayer, "attentions": RiGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """
        Gaussian weights; maps between frames Haar-orthogonal. Neither law changes under a rotation.

        Maps that write to the residual stream are scaled by `1/sqrt(2·layers)` as in GPT-2.
        """
        if isinstance(module, RiGPTAttention):
            module.reset_own_parameters()
        elif isinstance(module, RiGPTTransport):
            init.eye_(module.weight)
        elif getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        elif getattr(module, "carries_between_frames", False):
            # On the side, in float32: the decomposition behind it does not exist in 16 bits.
            init.copy_(module.weight, nn.init.orthogonal_(torch.empty_like(module.weight, dtype=torch.float32)))
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
        freeze_transports(model)
        return (model, report) if wanted else model

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As for every model; the tables of values get as many rows as that of the tokens."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, RiGPTAttention) and module.value_embedding is not None:
                resized = self._get_resized_embeddings(module.value_embedding, embeddings.num_embeddings)
                module.value_embedding = resized
        return embeddings

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The backend to use: the one asked for if it can express `attention_score`, else a `ValueError`."""
        if self.config.attention_score == "distance":
            requested_attention = requested_attention or "eager"
            check_distance_backend(requested_attention.removeprefix("paged|"))
        if requested_attention and requested_attention.startswith("paged|"):
            check_paged_cache(self.config, requested_attention)
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class RiGPTModel(RiGPTPreTrainedModel):
    """Embedding, decoder layers, last norm and the way back to the lexical frame: the head's input."""

    def __init__(self, config: RiGPTConfig):
        super().__init__(config)
        if config.depth_solver is not None:
            config.validate_architecture()  # fields may have been set since the config was made
            torchdiffeq()
        # No `padding_idx`: where padding is the end-of-text token, as for GPT-2, that token must keep learning.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.lexical_size)
        self.project_in = None
        if config.embedding_size is not None:
            self.project_in = RiGPTLinear(config.embedding_size, config.hidden_size, bias=False)
            self.project_in.carries_between_frames = True
        self.embed_positions, self.rotary_emb = None, None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif not config.rotary_learned_frequencies:
            self.rotary_emb = RiGPTRotaryEmbedding(config)
        self.embedding_norm = RiGPTRMSNorm(config.rms_norm_eps) if config.embedding_norm else None
        self.dropout = RiGPTVectorDropout(config.embedding_dropout)
        self.layers = nn.ModuleList(RiGPTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.transport = RiGPTTransport(config.hidden_size) if config.local_frames else None
        self.norm = RiGPTRMSNorm(config.rms_norm_eps)
        self.project_out = None
        if config.embedding_size is not None:
            self.project_out = RiGPTLinear(config.hidden_size, config.embedding_size, bias=config.output_bias)
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
            outputs.last_hidden_state = self.project_out(outputs.last_hidden_state)  # [B, S, D]
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """As [`RiGPTModel.forward`], but with the normalised stream `[B, S, d]` as `last_hidden_state`."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if input_ids is None and self.config.value_embedding_period is not None:
            raise ValueError(
                "`inputs_embeds` must be left out with `value_embedding_period="
                f"{self.config.value_embedding_period}`, whose layers look up vectors of their own. Pass `input_ids`."
            )
        if kwargs.get("cache") is not None:  # that of continuous batching
            check_paged_cache(self.config, self.config._attn_implementation)
        if self.config.depth_solver is not None:
            use_cache = use_of_cache(self.config, past_key_values, use_cache, kwargs.get("cache") is not None)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # Under pipeline parallelism a later stage is handed the stream of the stage before as its embeddings.
        first_stage = not self.layers or not isinstance(self.layers[0], nn.Identity)
        hidden_states = inputs_embeds
        if first_stage and self.project_in is not None:
            hidden_states = self.project_in(inputs_embeds)  # [B, S, d]

        # Packing is looked for only where there is no cache; an empty one made here must not hide it.
        mask_cache = past_key_values
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if self.config.depth_solver is not None and past_key_values is not None:
            make_room(past_key_values, self.config)
        positions_given = position_ids is not None
        if not positions_given:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=mask_cache,
            position_ids=position_ids,
        )
        may_be_packed = positions_given and attention_mask is None and mask_cache is None
        if (
            may_be_packed
            and is_flash_attention_requested(self.config)
            and not {"cache", "cu_seq_lens_q"} & set(kwargs)
        ):
            kwargs.update(packed_lengths(position_ids, len(hidden_states)))

        if first_stage:
            if self.embed_positions is not None:
                hidden_states = hidden_states + self.embed_positions(position_ids)
            if self.embedding_norm is not None:
                hidden_states = self.embedding_norm(hidden_states)
            hidden_states = self.dropout(hidden_states)
        tokens = {} if self.config.value_embedding_period is None else {"input_ids": input_ids}
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)

        for layer, following in pairwise([*self.layers, None]):
            beyond = {"following": following} if self.config.depth_interpolation == "linear" else {}
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **tokens,
                **beyond,
                **kwargs,
            )
        if self.transport is not None:
            hidden_states = self.transport(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


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
        self.lm_head = RiGPTLinear(config.lexical_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()
        if config.base_model_pp_plan is None:
            self._pp_plan = {}

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
            `CausalLMOutputWithPast`; `logits` `[B, S, V]`, `loss` in nats per token when `labels` are given.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RiGPTForSequenceClassification(GenericForSequenceClassification, RiGPTPreTrainedModel):
    """RiGPT with a linear classifier on the last token's last hidden state, in the head's place."""

    def __init__(self, config: RiGPTConfig):
        # Past the generic constructor, which finds the base model through the Auto classes: those do not know this
        # one when the file travels as remote code.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = RiGPTModel(config)
        self.score = nn.Linear(config.lexical_size, config.num_labels, bias=False)
        self.post_init()


__all__ = ["RiGPTForCausalLM", "RiGPTForSequenceClassification", "RiGPTModel", "RiGPTPreTrainedModel"]
