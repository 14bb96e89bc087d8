"""`TrainingArguments(optim="equivariant")`: the equivariant optimizer among those that `Trainer` knows by name."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported


if TYPE_CHECKING:
    from torch import nn

    from .optim import EquivariantOptimizer

NAME = "equivariant"
# The settings of `optim_args`, and how to read them from a string.
ARGUMENTS = {"momentum": float, "steps": int, "polar": str, "sharing": str}


class EquivariantFactory:
    """
    `Trainer(optimizer_cls_and_kwargs=(EquivariantFactory, {...}))` calls this with the model, so that the groups of
    parameters come from the table of frames.

    `lr`, `weight_decay` and `lr_multipliers` are as in [`equivariant_param_groups`], the rest as in
    [`EquivariantOptimizer`].
    """

    def __call__(
        self,
        model: "nn.Module",
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        lr_multipliers: dict[str, float] | None = None,
        **options: Any,
    ) -> "EquivariantOptimizer":
        # Here, as importing the package registers this and must stay quick.
        from .optim import EquivariantOptimizer, equivariant_param_groups

        groups = equivariant_param_groups(model, lr, weight_decay, lr_multipliers=lr_multipliers)
        return EquivariantOptimizer(groups, lr=lr, weight_decay=weight_decay, **options)


def register_with_trainer():
    """
    Make `"equivariant"` a valid value of `TrainingArguments.optim`, as soon as the library's trainer is loaded.

    `optim_args` takes `momentum`, `steps`, `polar`, `sharing`, and multipliers of the learning rate such as
    `embed_tokens=0.3`. Where the library has no table of optimizers to add to, `EquivariantFactory` is the way.
    """
    when_imported("transformers.training_args")(add_name)
    when_imported("transformers.trainer_optimizer")(add_handler)


def add_name(training_args: ModuleType):
    """Add a member to the names of optimizers, which a plain subclass of `Enum` cannot be asked for."""
    names: Any = training_args.OptimizerNames
    if NAME not in names._value2member_map_:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        names._member_map_[member._name_] = member
        names._value2member_map_[NAME] = member
        names._member_names_.append(member._name_)


def add_handler(trainer_optimizer: ModuleType):
    """Say what the name stands for."""
    add_name(trainer_optimizer)
    trainer_optimizer._OPTIMIZER_HANDLERS[trainer_optimizer.OptimizerNames(NAME)] = _from_arguments


def _from_arguments(context: Any) -> tuple[Any, dict[str, Any]]:
    """The factory and what `TrainingArguments` say; the shape that `Trainer` wants."""
    arguments = context.args
    options: dict[str, Any] = {
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        # `Trainer` trains one model with all processes that there are, step by step.
        "sharing": "all",
    }
    multipliers = {}
    for name, value in context.optim_args.items():
        try:
            if name in ARGUMENTS:
                options[name] = ARGUMENTS[name](value)
            else:
                multipliers[name] = float(value)
        except ValueError as error:
            raise ValueError(
                f"`optim_args` must be numbers for {name!r}, got {value!r}. It takes {', '.join(ARGUMENTS)}, and "
                "multipliers of the learning rate such as embed_tokens=0.3."
            ) from error
    return EquivariantFactory, options | {"lr_multipliers": multipliers}
