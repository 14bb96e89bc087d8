"""Apertus, to export to: queries and keys are normalised, and its activation xIELU has ReLU² as a special case."""

import math

from transformers import ApertusForCausalLM

from .llama import ATTENTION_BIASES, LLAMA, ROTARY, UNGATED, kin_target


_L = "model.layers.{i}"
_ATTENTION_NORM, _MLP_NORM = ({"norm": f"{_L}.{name}_layernorm"} for name in ("attention", "feedforward"))

APERTUS = LLAMA.varied(
    "Apertus",
    {
        "q_proj": _ATTENTION_NORM,
        "k_proj": _ATTENTION_NORM,
        "v_proj": _ATTENTION_NORM,
        "gate_proj": None,
        "up_proj": _MLP_NORM,
    },
    options=ATTENTION_BIASES,
)
# xIELU is `a x² + b x` for x > 0 and `(expm1(min(x, eps)) - x) c + b x` else, where `a = softplus(alpha_p)`,
# `b = beta` and `c = beta + softplus(alpha_n)`: ReLU² for a = 1, b = c = 0. A softplus reaches 0 by underflow.
CONSTANTS = {
    f"{_L}.self_attn.q_norm.weight": 1.0,
    f"{_L}.self_attn.k_norm.weight": 1.0,
    f"{_L}.mlp.act_fn.alpha_p": math.log(math.expm1(1.0)),
    f"{_L}.mlp.act_fn.alpha_n": -1000.0,
    f"{_L}.mlp.act_fn.beta": 0.0,
    f"{_L}.mlp.act_fn.eps": -1e-6,
}
TARGETS = {
    "apertus": kin_target(
        ApertusForCausalLM,
        APERTUS,
        f"{ROTARY}, an ungated MLP of ReLU² and q/k normalisation",
        {
            **UNGATED,
            "qk_norm": lambda config: config.qk_norm,
            "hidden_act": lambda config: config.hidden_act == "relu2",
        },
        CONSTANTS,
        hidden_act="xielu",
    ),
}
