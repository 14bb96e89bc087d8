"""Names of activations: the few formulas RiGPT has, under the many names stock configurations give them."""

# Several names for one formula; constants that are rounded in some of them make a difference below 1e-12.
RIGPT_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


def rigpt_activation(name: str, field: str) -> str:
    """
    RiGPT's name of a stock activation.

    Raises:
        ValueError: if RiGPT does not have this formula.
    """
    if name not in RIGPT_ACTIVATIONS:
        raise ValueError(
            f"`{field}` must be one of {', '.join(RIGPT_ACTIVATIONS)} to be converted exactly, got {name!r}. RiGPT "
            "has no other activations; replacing it by a similar one and fine-tuning is up to you."
        )
    return RIGPT_ACTIVATIONS[name]


def stock_activation(name: str) -> str:
    """The stock name of one of RiGPT's activations: GPT-2's own where it has one."""
    return "gelu_new" if name == "gelu_pytorch_tanh" else name
