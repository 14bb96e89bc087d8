"""Options that stock models lack, and the weights at which each of them is not there."""

import torch

from ..configuration_rigpt import RiGPTConfig


# Parameters of an option by the end of their names, with the value at which it does nothing. A gate in front of
# vectors that are zero may be anything.
NEUTRAL: dict[str, dict[str, float | None]] = {
    "attention_score": {"distance_weight": 0.0},
    "value_embedding_period": {"value_embedding.weight": 0.0, "value_gate.weight": None},
}
# Options without parameters: the function is another one, whatever the weights are.
FUNCTIONS = {"embedding_norm": False, "depth_solver": None}


def refuse_options(config: RiGPTConfig, state: dict[str, torch.Tensor]) -> set[str]:
    """
    Names of the parameters that a stock model can do without.

    Args:
        config (`RiGPTConfig`), state (`dict[str, torch.Tensor]`): of the RiGPT to export.

    Raises:
        ValueError: if an option is in use that no stock model has; the message names it.
    """
    for option, stock in FUNCTIONS.items():
        if (value := getattr(config, option)) != stock:
            raise ValueError(
                f"`{option}={value!r}` has no counterpart in stock models, whose value is {stock!r}. Keep this "
                "model as RiGPT."
            )
    idle = set()
    for option, parameters in NEUTRAL.items():
        for ending, neutral in parameters.items():
            for name in (name for name in state if name.endswith(f".{ending}")):
                if neutral is not None and not bool((state[name] == neutral).all()):
                    raise ValueError(
                        f"`{option}={getattr(config, option)!r}` has no counterpart in stock models unless every "
                        f"`{ending}` is {neutral:g}, where it does nothing. Keep this model as RiGPT."
                    )
                idle.add(name)
    return idle
