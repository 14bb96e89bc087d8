"""Recovery: the smaller model learns the distributions that the larger gives, instead of the text."""

import copy
from typing import Any

import torch

from ..extras import needs
from ..modeling_rigpt import RiGPTForCausalLM
from ..optim import EquivariantOptimizer, equivariant_param_groups
from ..quantization.tuning import learn_logits


# The highest rates: of all weights by the equivariant optimizer, and of an adapter by AdamW.
LEARNING_RATES = {"full": 3e-5, "lora": 5e-4}


def recovered(
    model: RiGPTForCausalLM,
    teacher: RiGPTForCausalLM,
    tokens: torch.Tensor,
    steps: int,
    *,
    lora: int | None = None,
    learning_rate: float | None = None,
    mixed_precision: str = "no",
    batch: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> RiGPTForCausalLM:
    """
    A copy of a model after some steps that lower `KL(teacher || model)` of the next token.

    Args:
        model, teacher (`RiGPTForCausalLM`): stay as they are.
        tokens (`torch.Tensor` of shape `[N, S]`): windows to learn on, over and over in a drawn order.
        steps (`int`): their number.
        lora (`int`, *optional*): the rank of an adapter that learns by AdamW and is merged at the end. Where none is
            given all weights learn by the equivariant optimizer, so that the frame that the model comes in does not
            matter; a step then takes about four times as long.
        learning_rate (`float`, *optional*): the highest; 3e-5, and 5e-4 of an adapter, if not given.
        mixed_precision (`str`, defaults to `"no"`): `"bf16"` for products in bfloat16.
        batch (`int`, defaults to 1): windows of a step.
        seed (`int`, defaults to 0): of the order, and of the adapter.
        progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `RiGPTForCausalLM`: in evaluation mode, of the model's dtype.

    Raises:
        ValueError: if an argument is impossible, or a loss is not finite.
    """
    check_recovery(lora, learning_rate, mixed_precision)
    rate = learning_rate or LEARNING_RATES["full" if lora is None else "lora"]
    student: Any = copy.deepcopy(model).float()
    optimizer: torch.optim.Optimizer
    if lora is None:
        optimizer = EquivariantOptimizer(equivariant_param_groups(student, rate, weight_decay=0.0))
    else:
        student = _with_adapter(student, lora, seed)
        learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)
    learn_logits(
        student.eval(),
        teacher,
        tokens,
        optimizer,
        steps,
        batch=batch,
        seed=seed,
        desc="Recovering",
        progress=progress,
        autocast=torch.bfloat16 if mixed_precision == "bf16" else None,
    )
    return (student if lora is None else student.merge_and_unload()).to(model.dtype)


def check_recovery(lora: int | None, learning_rate: float | None, mixed_precision: str) -> None:
    """
    Refuse at once what [`recovered`] would refuse after long work.

    Raises:
        ValueError: if an argument is impossible.
        ImportError: if there shall be an adapter, and PEFT is not installed.
    """
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(f"`learning_rate` must be positive, got {learning_rate}. Leave it out for the usual one.")
    if mixed_precision not in ("no", "bf16"):
        raise ValueError(f"`mixed_precision` must be no or bf16, got {mixed_precision!r}. Leave it out for float32.")
    if lora is not None:
        if lora < 1:
            raise ValueError(f"`lora` must be a rank of at least 1, got {lora}. Take 32 or so.")
        with needs("train"):
            import peft  # noqa: F401


def _with_adapter(model: RiGPTForCausalLM, rank: int, seed: int) -> Any:
    """The model with an adapter at every linear map but the head."""
    import peft

    options = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, options)
