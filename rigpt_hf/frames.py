"""
The table of frames: how every axis of every parameter turns. The single source of truth; nothing else may know it.

A *frame* is a space whose basis is a free choice; a *group* says which choices leave the function alone; an *axis* of
a parameter lists the frames it turns with and its role in each (see `groups/`), innermost first. [`table_of`] gives
the [`Table`] of a configuration, which answers all questions about it.

    frame           group                                                    axes that carry it
    stream          O(d), as `n(x)` needs the length of x                    in and out of every layer, positions,
                                                                             gates
    entry           O(d), with `embedding_norm_map`, in front of that map;   project_in or embeddings, positions,
                    the stream's own if a tied head reads it directly        embedding_map (covectors)
    local           O(d), each layer's own stream, with `local_frames`       the same of its layer; the transports
                                                                             into it and out of it
    lexical         GL(D)                                                    embeddings, project_in; head if tied
    output          GL(D), only with an untied head                          project_out, lm_head, score, qa_outputs
    head_qk         per key-value head: what leaves the attention score      queries (vectors), keys (covectors),
                    and rotary positions alone                               biases behind their norms, λ, learned
                                                                             frequencies
    head_vo         per key-value head: GL(h)                                values, value embeddings (vectors), o_proj
                                                                             (covectors)
    gains           scalings of the gains of queries against those of        gains of the norms of queries and keys
                    keys, signs of gains (`qk_norm_gain="vector"`); per      (and, by signs, queries and keys), biases
                    key-value head where every head has gains of its own     behind them, λ
                    (`"vector_per_head"`, or `qk_norm_over="all"`)
    query_norm      per query head: O(h)                                     the maps of the norms of queries, which
                    (`qk_norm_gain="metric"`)                                turn with head_qk on their other side
    key_norm        per key-value head: O(h)                                 those of keys
    heads           permutations of key-value heads, and of the query heads  everything that has an entry per head
                    inside one
    neurons         permutations, and the scalings the activation allows     rows of up and gate, columns of down
                    (none with `swiglu_limit`)
    expert_neurons  the same for each expert of a layer                      blocks of rows of up and gate of the
                                                                             experts, of columns of their down
    shared_neurons  the same for the expert that all tokens share            its up, gate and down
    experts         permutations of the experts of a layer                   what has a block per expert, rows of the
                                                                             router, columns of the biases that they
                                                                             write
    key_shift       a constant added to all keys, where positions leave it   k bias, q bias; with `qk_norm` those
                    alone: the softmax does not see it                       behind the norms
    value_shift     a constant added to all values arrives as a constant,    v bias, o_proj bias
                    as probabilities sum to 1                                (down_proj bias where that is not there
                                                                             and `use_parallel_residual` is);
                                                                             not beside `attention_sinks`
    residual_shift  a constant moved from the MLP's output to attention's,   o_proj bias, down_proj bias
                    which are added up, with `use_parallel_residual`;        (columns of the experts' down_bias)
                    to all experts, if their weights sum to 1
    router_shift    a vector added to all rows of a router adds one number   rows of the router
                    to all of its logits: the softmax does not see it
    router_bias_shift  the same number added to all biases of a router       bias of the router
    position_shift  a constant moved from all tokens to all positions        embeddings, positions (untied head)

The last six are translations: they add to parameters where the others multiply; `_shifts` says what and where.
"""

import torch

from .configuration_rigpt import RiGPTConfig, rotary_frequencies
from .groups import (
    ExpertPermutations,
    GainScalings,
    HalfTurns,
    HeadPermutations,
    MatrixGroup,
    NeuronGroup,
    Stretch,
    Translations,
    general_linear,
    orthogonal,
)
from .layers_rigpt import is_sparse, is_turned, layer_type, of_layer
from .norms_rigpt import gain_vectors
from .scores_rigpt import SCORES
from .table import Axis, Frame, FrameKey, Move, Shift, Table, Turn, layer_of, pattern_of


__all__ = [
    "Frame",
    "FrameKey",
    "Table",
    "is_choice_of_frames",
    "is_token_table",
    "is_transport",
    "layer_of",
    "refuse_shared_frames",
    "table_of",
]
FIXED: Axis = ()
# `act(a z) = a^p act(z)` for a > 0; activations that are not listed allow no scaling.
DEGREES = {"relu": 1, "relu2": 2}
ATTENTION, MLP = "model.layers.*.self_attn.", "model.layers.*.mlp."
# Parameters that carry the residual stream from one local frame to the next: into a layer, and after the last.
TRANSPORTS = ("model.layers.*.transport.weight", "model.transport.weight")
CARRY = "model.carry.weight"


# Parameters with a row for every token. Nothing turns that axis, but a symmetry of the data exchanges what is on it.
TOKEN_TABLES = ("model.embed_tokens.weight", ATTENTION + "value_embedding.weight", "lm_head.weight")


def _frames(config: RiGPTConfig, layer: int) -> dict[str, Frame]:
    """The frames a configuration has in a layer, by kind, in the order in which they act on an axis."""
    heads, repeats = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    sparse = is_sparse(config, layer)
    shifts = _shifts(config, sparse)
    table = {"stream": Frame(orthogonal(config.hidden_size))}
    if _has_entry(config):
        table["entry"] = Frame(orthogonal(config.hidden_size))
    if config.local_frames:
        table["local"] = Frame(orthogonal(config.hidden_size), per_layer=True)
    if config.embedding_size is not None:
        table["lexical"] = Frame(general_linear(config.embedding_size))
        if not config.tie_word_embeddings:
            table["output"] = Frame(general_linear(config.embedding_size))
    score = _score_group(config, layer)
    # Interpolation adds weights of neighbouring layers, which must then be in the same frame.
    own = config.depth_interpolation == "constant"
    after = None
    if vectors := gain_vectors(config):
        stretch, after = SCORES[config.attention_score].stretch, "gains"
        of_head = vectors == "own"
        gains = GainScalings(config.head_dim, stretch, score.planes, repeats if of_head else 1)
        table["gains"] = Frame(gains, heads if of_head else 1, own, carrier="heads" if of_head else None)
    metric = config.qk_norm_gain == "metric"
    table["head_qk"] = Frame(score, heads, per_layer=own, carrier="heads", after=after, stacked=metric)
    if metric:
        for kind, role, copies in (("query_norm", "query", heads * repeats), ("key_norm", "key_value", heads)):
            group = orthogonal(config.head_dim)
            table[kind] = Frame(group, copies, own, carrier="heads", carried=role, after="head_qk", stacked=True)
    table["head_vo"] = Frame(general_linear(config.head_dim), heads, per_layer=own, carrier="heads")
    table["heads"] = Frame(HeadPermutations(heads, repeats), per_layer=own)
    table |= _frames_of_mlp(config, sparse, own)
    still, key_shift = _unturned(config, layer), SCORES[config.attention_score].key_shift
    # Under a bound, or beside a logit without a key, what all keys have is no constant any more.
    bounded = config.attn_logit_softcapping is not None or config.attention_sinks
    biased = config.qk_norm_bias if config.qk_norm else config.attention_bias
    if biased and still and not bounded and key_shift != "never":
        # Unless λ multiplies it, a constant per layer stays a constant when it is interpolated.
        constant = own or key_shift == "alone"
        table["key_shift"] = Frame(Translations(config.head_dim, still), heads, constant, shift=shifts["key_shift"])
    # A constant that the values write may be taken back by the MLP's bias too, unless gains stand behind the two.
    parallel_bias = config.use_parallel_residual and config.mlp_bias and not config.post_norm
    # Those of experts, by their weights, if these sum to 1.
    parallel_bias = parallel_bias and (not sparse or config.norm_topk_prob)
    # Probabilities sum to less than 1 beside a sink.
    whole = config.attention_bias and not config.attention_sinks
    if whole and (config.attention_output_bias or parallel_bias):
        table["value_shift"] = Frame(Translations(config.head_dim), heads, own, shift=shifts["value_shift"])
    if config.attention_output_bias and parallel_bias:
        # A constant per layer stays a constant when it is interpolated.
        table["residual_shift"] = Frame(Translations(config.hidden_size), 1, True, shift=shifts["residual_shift"])
    if sparse:
        table["router_shift"] = Frame(Translations(config.hidden_size), 1, True, shift=shifts["router_shift"])
        if config.mlp_bias:
            table["router_bias_shift"] = Frame(Translations(1), 1, True, shift=shifts["router_bias_shift"])
    if config.position_embedding_type == "learned" and not config.tie_word_embeddings:
        table["position_shift"] = Frame(Translations(config.lexical_size), shift=shifts["position_shift"])
    return table


def _frames_of_mlp(config: RiGPTConfig, sparse: bool, own: bool) -> dict[str, Frame]:
    """The frames of the neurons of a layer."""

    def neurons(size: int) -> NeuronGroup:
        if config.swiglu_limit is not None:  # which a scaled neuron would meet elsewhere
            return NeuronGroup(size)
        return NeuronGroup(size, DEGREES.get(config.hidden_act), config.gated_mlp)

    if not sparse:
        return {"neurons": Frame(neurons(config.intermediate_size), per_layer=own)}
    count, size = config.num_experts, config.moe_intermediate_size
    assert count is not None and size is not None
    frames = {"expert_neurons": Frame(neurons(size), count, own, carrier="experts")}
    if config.shared_expert_intermediate_size is not None:
        frames["shared_neurons"] = Frame(neurons(config.shared_expert_intermediate_size), per_layer=own)
    return frames | {"experts": Frame(ExpertPermutations(count, 1), per_layer=own)}


def _score_group(config: RiGPTConfig, layer: int) -> MatrixGroup | HalfTurns:
    """The group that leaves the attention score of a head alone."""
    # A metric says what is a length, and turns along.
    lengths = config.qk_norm and config.qk_norm_gain != "metric"
    stretch: Stretch = "none" if lengths else SCORES[config.attention_score].stretch
    moving = len(_frequencies(config, layer))
    turned = set(range(config.head_dim)) - set(_unturned(config, layer))
    # Rotary positions turn dimension i together with i + r/2.
    planes = tuple((i, i + moving) for i in range(moving) if i in turned)
    if gain_vectors(config):
        return HalfTurns(config.head_dim, planes)
    return MatrixGroup(config.head_dim, stretch, planes, movable=config.rotary_learned_frequencies and moving > 0)


def _has_entry(config: RiGPTConfig) -> bool:
    """Whether the stream begins in a frame of its own; not where the head reads the same vectors from its end."""
    return config.embedding_norm_map and not (config.tie_word_embeddings and config.embedding_size is None)


def _unturned(config: RiGPTConfig, layer: int) -> tuple[int, ...]:
    """Dimensions of a head that positions leave alone: outside of all planes, or in planes of frequency zero."""
    frequencies = _frequencies(config, layer)
    half = len(frequencies)
    resting = [] if config.rotary_learned_frequencies else [i for i, value in enumerate(frequencies) if value == 0]
    return tuple(sorted([*resting, *(i + half for i in resting), *range(2 * half, config.head_dim)]))


def _frequencies(config: RiGPTConfig, layer: int) -> list[float]:
    """Radians per position of the planes of a layer's heads; none where positions do not turn them."""
    return rotary_frequencies(of_layer(config, layer))[0].tolist() if is_turned(config, layer) else []


def _rows(config: RiGPTConfig) -> dict[str, tuple[Axis, ...]]:
    """
    The table: parameter name, with `*` for the number of a layer, to one entry per axis; a single entry runs over all
    axes of the tensor together. In the order of a model's parameters, in which sums over them are taken.

    Names are those of `RiGPTForCausalLM` and of `RiGPTForSequenceClassification`; a table lists a parameter whether or
    not this configuration has it, except where an option changes how it turns.
    """
    stream, stream_in = (Turn("stream"),), (Turn("stream", "covector"),)
    projected = config.embedding_size is not None
    entry, entry_in = ((Turn("entry"),), (Turn("entry", "covector"),)) if _has_entry(config) else (stream, stream_in)
    lexical = (Turn("lexical"),) if projected else entry
    # A tied table serves twice: embeddings are vectors, and the head pairs them with covectors.
    output = (Turn("lexical", "covector"),) if config.tie_word_embeddings else (Turn("output"),)
    untied_head = (Turn("output", "covector"),) if projected else stream_in
    head = lexical if config.tie_word_embeddings else untied_head
    vectors = gain_vectors(config)

    def scaled(*roles: str) -> list[Axis]:
        return [(Turn("gains", role),) if vectors else FIXED for role in roles]

    def queries(scales: Axis) -> Axis:
        return (Turn("head_qk"), *scales, Turn("heads", "query"))

    def keys(scales: Axis) -> Axis:
        return (Turn("head_qk", "covector"), *scales, Turn("heads", "key_value"))

    query_rows, key_rows, query_bias, key_bias, lengths = scaled(
        "query_rows", "key_rows", "query_bias", "key_bias", "metric"
    )
    query, key = queries(query_rows), keys(key_rows)
    each = {role: (Turn("heads", role),) if vectors == "own" else FIXED for role in ("query", "key_value")}
    query_norm: tuple[Axis, ...] = ((Turn("gains", "query_gain"), *each["query"]),)
    key_norm: tuple[Axis, ...] = ((Turn("gains", "key_gain"), *each["key_value"]),)
    if config.qk_norm_gain == "metric":
        # The second axis pairs with queries and keys; heads change places last.
        inside, exchanged = Turn("head_qk", "covector", stacked=True), Turn("heads", "query", stacked=True)
        query_norm = ((Turn("query_norm"),), (inside, exchanged))
        inside, exchanged = Turn("head_qk", stacked=True), Turn("heads", "key_value", stacked=True)
        key_norm = ((Turn("key_norm"),), (inside, exchanged))
    value = (Turn("head_vo"), Turn("heads", "key_value"))
    value_in = (Turn("head_vo", "covector"), Turn("heads", "query"))
    # Axes that write and read inside of a layer; the frame before the first layer's is the stream's.
    inner = "local" if config.local_frames else "stream"
    layer_out, layer_in = (Turn(inner),), (Turn(inner, "covector"),)
    # Behind the maps that write there are gains, in a frame without freedom; `carry` leads out of it.
    written = FIXED if config.post_norm else layer_out
    before = (Turn("local", "covector", step=-1),)
    active, linear, down = ((Turn("neurons", role),) for role in ("active", "linear", "down"))
    up = linear if config.gated_mlp else active
    factors = ("active", "linear" if config.gated_mlp else "active", "down")
    shared = [(Turn("shared_neurons", role),) for role in factors]
    expert = [(Turn("expert_neurons", role), Turn("experts", role)) for role in factors]
    row = (Turn("experts", "router"),)
    return {
        "model.embed_tokens.weight": (FIXED, lexical),
        "model.project_in.weight": (entry, (Turn("lexical", "covector"),)),
        "model.embed_positions.weight": (FIXED, entry),
        "model.embedding_map.weight": (stream, entry_in),
        "model.embedding_map.bias": (stream,),
        TRANSPORTS[0]: (layer_out, before),
        ATTENTION + "distance_weight": ((Turn("head_qk", "metric"), *lengths, Turn("heads", "query")),),
        ATTENTION + "sinks": ((Turn("heads", "query"),),),
        ATTENTION + "rotary_frequencies": ((Turn("head_qk", "planes"), Turn("heads", "key_value")),),
        ATTENTION + "q_proj.weight": (query, layer_in),
        ATTENTION + "q_proj.bias": (query,),
        ATTENTION + "k_proj.weight": (key, layer_in),
        ATTENTION + "k_proj.bias": (key,),
        ATTENTION + "v_proj.weight": (value, layer_in),
        ATTENTION + "v_proj.bias": (value,),
        ATTENTION + "o_proj.weight": (written, value_in),
        ATTENTION + "o_proj.bias": (written,),
        ATTENTION + "q_norm.bias": (queries(query_bias),),
        ATTENTION + "q_norm.weight": query_norm,
        ATTENTION + "k_norm.bias": (keys(key_bias),),
        ATTENTION + "k_norm.weight": key_norm,
        ATTENTION + "value_embedding.weight": (FIXED, value),
        ATTENTION + "value_gate.weight": ((Turn("heads", "key_value"),), layer_in),
        ATTENTION + "alibi.weight": ((Turn("heads", "query"),),),
        MLP + "gate_proj.weight": (active, layer_in),
        MLP + "gate_proj.bias": (active,),
        MLP + "up_proj.weight": (up, layer_in),
        MLP + "up_proj.bias": (up,),
        MLP + "down_proj.weight": (written, down),
        MLP + "down_proj.bias": (written,),
        MLP + "gate.weight": (row, layer_in),
        MLP + "gate.bias": (row,),
        MLP + "experts.down_bias": (written, row),
        MLP + "experts.gate_proj.weight": (expert[0], layer_in),
        MLP + "experts.gate_proj.bias": (expert[0],),
        MLP + "experts.up_proj.weight": (expert[1], layer_in),
        MLP + "experts.up_proj.bias": (expert[1],),
        MLP + "experts.down_proj.weight": (written, expert[2]),
        MLP + "shared_expert.gate_proj.weight": (shared[0], layer_in),
        MLP + "shared_expert.gate_proj.bias": (shared[0],),
        MLP + "shared_expert.up_proj.weight": (shared[1], layer_in),
        MLP + "shared_expert.up_proj.bias": (shared[1],),
        MLP + "shared_expert.down_proj.weight": (written, shared[2]),
        MLP + "shared_expert.down_proj.bias": (written,),
        MLP + "shared_expert_gate.weight": (FIXED, layer_in),
        MLP + "shared_expert_gate.bias": (FIXED,),
        "model.layers.*.attention_output_norm.weight": (FIXED,),
        "model.layers.*.mlp_output_norm.weight": (FIXED,),
        CARRY: (stream, FIXED),
        TRANSPORTS[1]: (stream, before),
        "model.project_out.weight": (output, stream_in),
        "model.project_out.bias": (output,),
        "lm_head.weight": (FIXED, head),
        "score.weight": (FIXED, head),
        "score.bias": (FIXED,),
        "qa_outputs.weight": (FIXED, head),
        "qa_outputs.bias": (FIXED,),
    }


def _shifts(config: RiGPTConfig, sparse: bool) -> dict[str, Shift]:
    """
    The table of translations of a layer, which has experts or not, by kind of frame; parameters with `*` for its
    number.
    """
    heads, repeats = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads

    def per_query_head(vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(heads, 1, -1).expand(-1, repeats, -1).reshape(heads * repeats, -1)

    whole = Move(lambda c: c)
    # What is added last: in front of a norm a constant would not stay one.
    last = "norm.bias" if config.qk_norm else "proj.bias"
    keys = {ATTENTION + f"k_{last}": whole}
    if SCORES[config.attention_score].key_shift == "with_query":
        # (q + λc)·(k + c) - λ|k + c|²/2 differs from q·k - λ|k|²/2 by what is the same for all keys.
        keys[ATTENTION + f"q_{last}"] = Move(
            lambda c, weight: (weight[:, None] * per_query_head(c)).flatten(), (ATTENTION + "distance_weight",)
        )
    attention_bias, mlp_bias = ATTENTION + "o_proj.bias", MLP + "down_proj.bias"
    # The biases of experts are columns, and their weights sum to 1 where anything moves them.
    all_experts = (slice(None), None) if sparse else ...
    if sparse:
        mlp_bias = MLP + "experts.down_bias"
    written, columns = (attention_bias, ...) if config.attention_output_bias else (mlp_bias, all_experts)
    values = {
        ATTENTION + "v_proj.bias": whole,
        written: Move(
            lambda c, output: (-output @ per_query_head(c).flatten())[columns], (ATTENTION + "o_proj.weight",)
        ),
    }
    between = {mlp_bias: Move(lambda c: c[all_experts]), attention_bias: Move(lambda c: -c)}
    tokens, into = "model.embed_tokens.weight", "model.project_in.weight"
    away = Move(lambda c: -c) if config.embedding_size is None else Move(lambda c, into: -(into @ c), (into,))
    return {
        "key_shift": Shift(ATTENTION + f"k_{last}", keys),
        "value_shift": Shift(ATTENTION + "v_proj.bias", values),
        "residual_shift": Shift(mlp_bias, between, axis=0),
        "router_shift": Shift(MLP + "gate.weight", {MLP + "gate.weight": whole}),
        "router_bias_shift": Shift(MLP + "gate.bias", {MLP + "gate.bias": whole}, axis=None),
        "position_shift": Shift(tokens, {tokens: whole, "model.embed_positions.weight": away}),
    }


def refuse_shared_frames(config: RiGPTConfig, what: str) -> None:
    """Raises a `ValueError` for `what` has not been worked out where layers share the frames of heads and neurons."""
    if config.depth_interpolation != "constant":
        raise ValueError(
            f"{what} needs layers with frames of their own, got `depth_interpolation="
            f"{config.depth_interpolation!r}`, which adds weights of neighbours. Use 'constant'."
        )


# Tables are kept for so many configurations, by all fields but one on which none depends, and which is long.
KEPT = 32
FIELDS = [name for name in RiGPTConfig.__annotations__ if name != "token_symmetry"]
_TABLES: dict[tuple[str, ...], Table] = {}


def table_of(config: RiGPTConfig) -> Table:
    """The table of a configuration; made once for the values that its fields have now."""
    fields = vars(config)  # much quicker than `getattr`, which Transformers wraps, and asked for at every step
    values = tuple(repr(fields[name] if name in fields else getattr(config, name, None)) for name in FIELDS)
    if values not in _TABLES:
        if len(_TABLES) >= KEPT:
            _TABLES.pop(next(iter(_TABLES)))
        layers = _frames_by_layer(config)
        _TABLES[values] = Table(_kinds(layers) or _frames(config, 0), _rows(config), layers)
    return _TABLES[values]


def _frames_by_layer(config: RiGPTConfig) -> list[dict[str, Frame]]:
    """The frames of every layer; worked out once for all layers that are alike."""
    count = config.num_hidden_layers
    alike = [(layer_type(config, layer), is_turned(config, layer), is_sparse(config, layer)) for layer in range(count)]
    known = {kind: _frames(config, alike.index(kind)) for kind in dict.fromkeys(alike)}
    return [known[kind] for kind in alike]


def _kinds(layers: list[dict[str, Frame]]) -> dict[str, Frame]:
    """All kinds of frames that layers have, from the layer with most of them where it has it."""
    kinds: dict[str, Frame] = {}
    for frames in sorted(layers, key=len, reverse=True):
        kinds |= {kind: frame for kind, frame in frames.items() if kind not in kinds}
    return kinds


def is_transport(name: str) -> bool:
    """Whether a parameter carries the residual stream from one local frame to the next."""
    return pattern_of(name) in TRANSPORTS


def is_choice_of_frames(name: str) -> bool:
    """Whether a parameter leads from one frame to another and is frozen: nothing is learned in it."""
    return is_transport(name) or name == CARRY


def is_token_table(name: str) -> bool:
    """Whether a parameter has a row for every token, on its first axis."""
    return pattern_of(name) in TOKEN_TABLES
