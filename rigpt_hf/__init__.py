"""
RiGPT: a GPT with no preferred basis. Importing this package registers it with the Auto classes of Transformers.

That takes no time: what is named here is imported when it is first used, and RiGPT is registered when Transformers is
imported, whichever of the two comes first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register
from .version import __version__


if TYPE_CHECKING:
    from .configuration_rigpt import RiGPTConfig
    from .modeling_rigpt import (
        RiGPTForCausalLM,
        RiGPTForQuestionAnswering,
        RiGPTForSequenceClassification,
        RiGPTForTokenClassification,
        RiGPTModel,
        RiGPTPreTrainedModel,
    )

__all__ = [
    "RiGPTConfig",
    "RiGPTForCausalLM",
    "RiGPTForQuestionAnswering",
    "RiGPTForSequenceClassification",
    "RiGPTForTokenClassification",
    "RiGPTModel",
    "RiGPTPreTrainedModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "configuration_rigpt" if name == "RiGPTConfig" else "modeling_rigpt"
    globals()[name] = getattr(import_module(f".{module}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
