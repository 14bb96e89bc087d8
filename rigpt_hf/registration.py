"""
Makes other libraries know RiGPT: each as soon as it is imported, and none is imported for it.

A model is registered when the last of the two is imported, the Auto classes or `modeling_rigpt`; the configuration
likewise. Whoever imports `rigpt_hf` and nothing else waits for neither torch nor transformers.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any
from warnings import catch_warnings, filterwarnings

from wrapt import when_imported, wrap_function_wrapper


MODEL_TYPE = "rigpt"
# Modules that import the Auto classes in the middle of themselves, and what says that they are done: the network
# imports them in turn.
UNFINISHED = {"modeling_utils": "PreTrainedModel", "modeling_layers": "GenericForTokenClassification"}


def register_configuration(configuration: ModuleType):
    """`AutoConfig` for our configuration, which carries its code into the folders it is saved to."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, configuration.RiGPTConfig, exist_ok=True)
    configuration.RiGPTConfig.register_for_auto_class()


def register_models(modeling: ModuleType):
    """
    An Auto class for each of our models, which carry their code into the folders they are saved to.

    `transformers serve` does not ask those, but looks for a class of that name in `transformers`.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for auto_class, name in modeling.AUTO_CLASSES.items():
        model_class = getattr(modeling, name)
        getattr(modeling_auto, auto_class).register(model_class.config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class)
        setattr(transformers, name, model_class)
    import_module(".quantized_rigpt", __package__).RiGPTQuantizer.simulate = staticmethod(simulate)


def simulate(model: Any, config: Any):
    """Simulate what folders of codes want and no kernel computes; their own code alone refuses it."""
    import_module(".quantization.simulated", __package__).simulate(model, config)


def import_configuration(_: ModuleType):
    """Import our configuration, now that there is an `AutoConfig` to register it with."""
    import_module(".configuration_rigpt", __package__)


def import_models(_: ModuleType):
    """Import our models, once there are Auto classes to register them with and nothing they need is half imported."""
    if "transformers.models.auto.modeling_auto" not in sys.modules:
        return
    for name, last in UNFINISHED.items():
        module = sys.modules.get(f"transformers.{name}")
        if module is not None and not hasattr(module, last):
            return
    import_module(".modeling_rigpt", __package__)


def register_with_peft(constants: ModuleType):
    """
    Which layers the adapters of PEFT go to, so that no `target_modules` need be given.

    RiGPT's linear maps have Llama's names, so whatever PEFT does with Llama by default it can do with RiGPT.
    """
    for name, table in vars(constants).items():
        if name.endswith("_MODULES_MAPPING") and isinstance(table, dict) and "llama" in table:
            table.setdefault(MODEL_TYPE, table["llama"])


def register_prompts(peft_model: ModuleType):
    """Sizes of virtual tokens and of prefixes, which PEFT takes from fields of the configuration that mean another."""
    wrap_function_wrapper(peft_model, "PeftModel.add_adapter", _add_adapter)


def _add_adapter(add_adapter: Any, model: Any, args: tuple, kwargs: dict) -> Any:
    adapter = kwargs["peft_config"] if "peft_config" in kwargs else args[1]
    config = model.config
    if adapter.is_prompt_learning and getattr(config, "model_type", None) == MODEL_TYPE:
        from .flow_rigpt import evaluations_per_layer

        kind = type(adapter).__name__
        if adapter.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
            evaluations = evaluations_per_layer(config)
            if evaluations is None:
                raise ValueError(
                    f"{kind} needs a cache, and with `depth_solver={config.depth_solver!r}` there is none. Use "
                    "PromptTuningConfig or LoraConfig, or a solver with fixed steps."
                )
            adapter.num_layers = config.num_hidden_layers * evaluations
        elif config.value_embedding_period is not None:
            raise ValueError(
                f"{kind} puts vectors before the tokens, and `value_embedding_period={config.value_embedding_period}` "
                "needs a token everywhere. Use PrefixTuningConfig or LoraConfig."
            )
        else:
            adapter.token_dim = config.lexical_size
    return add_adapter(*args, **kwargs)


# Tuners of PEFT that go by names of modules and would fail far from the reason: where, when they fit, what they need.
TUNERS = {
    "LNTuning": ("ln_tuning", lambda _: False, "norms with weights, which RiGPT's norms have not"),
    "AdaptionPrompt": ("adaption_prompt", lambda _: False, "the queries of Llama's attention"),
    "Shadow": (
        "shadow",
        lambda config: config.embedding_size is None and config.value_embedding_period is None,
        "a base model without projections (`embedding_size`) and value embeddings (`value_embedding_period`)",
    ),
}


def refuse_tuner(name: str, tuners: ModuleType):
    """Let a tuner of PEFT say at once and in one line that it needs what a RiGPT does not have."""
    _, fits, need = TUNERS[name]

    def init(constructor: Any, _: Any, args: tuple, kwargs: dict) -> Any:
        config = getattr(kwargs["model"] if "model" in kwargs else args[0], "config", None)
        if getattr(config, "model_type", None) == MODEL_TYPE and not fits(config):
            raise ValueError(f"{name}Config needs {need}. Use another adapter, such as LoraConfig.")
        return constructor(*args, **kwargs)

    wrap_function_wrapper(tuners, f"{name}Model.__init__", init)


def adapt_codes(lora: ModuleType):
    """Adapters of PEFT beside maps made of codes, which it does not know, and into which nothing can be merged."""
    wrap_function_wrapper(lora, "dispatch_default", _adapt_codes)


def _adapt_codes(dispatch: Any, _: Any, args: tuple, kwargs: dict) -> Any:
    from peft.tuners.lora.layer import Linear

    target = kwargs["target"] if "target" in kwargs else args[0]
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    # By name: a folder that was loaded with its own code has a class of its own.
    if type(base).__name__ != "QuantizedLinear" or not hasattr(base, "scales"):
        return dispatch(*args, **kwargs)

    class CodesWithAdapter(Linear):
        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError(
                "an adapter cannot be merged into codes, which have no place for it. Call `dequantize()` on the model "
                "that has none yet, and load the adapter there."
            )

    with catch_warnings():
        filterwarnings("ignore", "Unsupported layer type", UserWarning)
        return CodesWithAdapter(*args, **kwargs)


def register_conversion(opened: ModuleType):
    """The way from stock models to RiGPTs, for those who open checkpoints of any class below it."""

    def conversion() -> Any:
        from .conversion import opening

        return opening

    opened.register(conversion)


def register():
    """Wait for all of them."""
    from . import trainer_optimizer

    auto = "transformers.models.auto"
    hooks: list[tuple[str, Callable[[Any], Any]]] = [
        (f"{__package__}.configuration_rigpt", register_configuration),
        (f"{__package__}.modeling_rigpt", register_models),
        (f"{auto}.configuration_auto", import_configuration),
        (f"{auto}.modeling_auto", import_models),
        *((f"transformers.{module}", import_models) for module in UNFINISHED),
        (f"{__package__}.checkpoints.opened", register_conversion),
        ("peft.utils.constants", register_with_peft),
        ("peft.peft_model", register_prompts),
        ("peft.tuners.lora.model", adapt_codes),
        *((f"peft.tuners.{package}.model", partial(refuse_tuner, name)) for name, (package, *_) in TUNERS.items()),
    ]
    for name, act in hooks:
        when_imported(name)(act)
    trainer_optimizer.register_with_trainer()
