"""RiGPT: a GPT with no preferred basis. Importing this package registers it with the Auto classes of Transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_rigpt import RiGPTConfig
from .modeling_rigpt import RiGPTForCausalLM, RiGPTForSequenceClassification, RiGPTModel, RiGPTPreTrainedModel
from .peft_targets import register_with_peft
from .trainer_optimizer import register_with_trainer
from .version import __version__


AutoConfig.register("rigpt", RiGPTConfig)
AutoModel.register(RiGPTConfig, RiGPTModel)
AutoModelForCausalLM.register(RiGPTConfig, RiGPTForCausalLM)
AutoModelForSequenceClassification.register(RiGPTConfig, RiGPTForSequenceClassification)

# So that saved folders carry the code and load where this package is not installed.
RiGPTConfig.register_for_auto_class()
RiGPTModel.register_for_auto_class("AutoModel")
RiGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
RiGPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

register_with_peft()
register_with_trainer()

__all__ = [
    "RiGPTConfig",
    "RiGPTForCausalLM",
    "RiGPTForSequenceClassification",
    "RiGPTModel",
    "RiGPTPreTrainedModel",
    "__version__",
]
