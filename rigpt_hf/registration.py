"""
Makes other libraries know RiGPT: each as soon as it is imported, and none is imported for it.

A model is registered when the last of the two is imported, the Auto classes or `modeling_rigpt`; the configuration
likewise. Whoever imports `rigpt_hf` and nothing else waits for neither torch nor transformers.
"""

import sys
from importlib import import_module
from types import ModuleType

from wrapt import when_imported


MODEL_TYPE = "rigpt"
# Modules that import the Auto classes in the middle of themselves, and what says that they are done: the network
# imports them in turn.
UNFINISHED = {"modeling_utils": "PreTrainedModel", "modeling_layers": "GenericForSequenceClassification"}


def register_configuration(configuration: ModuleType):
    """`AutoConfig` for our configuration, which carries its code into the folders it is saved to."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, configuration.RiGPTConfig, exist_ok=True)
    configuration.RiGPTConfig.register_for_auto_class()


def register_models(modeling: ModuleType):
    """An Auto class for each of our models, which carry their code into the folders they are saved to."""
    from transformers.models.auto import modeling_auto

    for auto_class, model_class in (
        ("AutoModel", modeling.RiGPTModel),
        ("AutoModelForCausalLM", modeling.RiGPTForCausalLM),
        ("AutoModelForSequenceClassification", modeling.RiGPTForSequenceClassification),
    ):
        getattr(modeling_auto, auto_class).register(model_class.config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class)


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


def register():
    """Wait for all of them."""
    from . import trainer_optimizer

    auto = "transformers.models.auto"
    for name, act in (
        (f"{__package__}.configuration_rigpt", register_configuration),
        (f"{__package__}.modeling_rigpt", register_models),
        (f"{auto}.configuration_auto", import_configuration),
        (f"{auto}.modeling_auto", import_models),
        *((f"transformers.{module}", import_models) for module in UNFINISHED),
        ("peft.utils.constants", register_with_peft),
    ):
        when_imported(name)(act)
    trainer_optimizer.register_with_trainer()
