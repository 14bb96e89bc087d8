"""Which stock classes convert, what that costs, and where the results go back to: read off the tables of families."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from ..checkpoints.read import silent
from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from .experts import experts_of
from .families import ARCHITECTURES, TARGETS
from .maps import Architecture, Family
from .neutral import refuse_options


@dataclass(frozen=True)
class FamilyRow:
    """
    An architecture that converts, as a row of the table.

    Args:
        name (`str`), class_name (`str`): the `model_type` and the stock class.
        refused (`tuple[str, ...]`): options without an exact form.
        parameters, products (`dict[bool, float]`): how many more parameters a result has, and products with maps per
            token, relative to a stock model of default size, by whether embeddings are tied.
        targets (`tuple[str, ...]`): names of the targets that a result can be exported to.
    """

    name: str
    class_name: str
    refused: tuple[str, ...]
    parameters: dict[bool, float]
    products: dict[bool, float]
    targets: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON, whose names are texts."""
        costs = {
            name: {"tied" if tied else "untied": more for tied, more in getattr(self, name).items()}
            for name in ("parameters", "products")
        }
        return asdict(self) | costs


@silent()  # some configurations of the library warn of their own defaults
def overview() -> list[FamilyRow]:
    """A row for each architecture; no model gets memory for its weights."""
    rows = []
    for name, entry in ARCHITECTURES.items():
        costs = {
            tied: _costs(entry, partial(CONFIG_MAPPING[name], tie_word_embeddings=tied)) for tied in (True, False)
        }
        parameters, products = ({tied: cost[part] for tied, cost in costs.items()} for part in (0, 1))
        targets = exportable(entry.rigpt_config(CONFIG_MAPPING[name](), None), entry.family)
        rows.append(FamilyRow(name, entry.class_name, tuple(entry.refused), parameters, products, tuple(targets)))
    return rows


def exportable(config: RiGPTConfig, family: Family) -> Iterator[str]:
    """Names of the targets that have all options of a model converted from a family, whatever its weights are."""
    for name, target in TARGETS.items():
        try:
            refuse_options(config, {}, target)
        except ValueError:
            continue
        # LayerNorm takes away a direction, which other norms leave in use.
        possible = family.centred or not target.family.centred
        if possible and (target.family.norm_bias or not config.output_bias):
            yield name


def _costs(entry: Architecture, make_config: Any) -> tuple[float, float]:
    """Parameters and products that are added, as a part of what the stock model has."""
    counts = []
    for layers in (1, 2):  # all layers are alike, so two sizes give every size
        config = make_config()
        config.num_hidden_layers = layers  # lists of layers may be longer
        rigpt_config = entry.rigpt_config(config, None)
        if getattr(config, "head_dim", 0) is None:  # which some classes leave open, and then compute with
            config.head_dim = rigpt_config.head_dim
        with torch.device("meta"):
            stock, result = getattr(transformers, entry.class_name)(config), RiGPTForCausalLM(rigpt_config)
        counts.append(torch.tensor([_counted(stock), _counted(result)]))
    one, two = counts
    before, after = one + (make_config().num_hidden_layers - 1) * (two - one)
    parameters, products = (after / before.double() - 1).tolist()
    return parameters, products


def _counted(model: Any) -> tuple[int, int]:
    """Parameters of a model, and the numbers in its maps for a token, but the tables of tokens and positions."""
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)} | {"lm_head"}
    experts = experts_of(model.config)
    used = model.config.num_experts_per_tok / experts if experts else 1.0  # of experts, those that a token meets
    return model.num_parameters(), round(
        sum(
            weight.numel() * (used if ".experts." in name else 1)
            for name, weight in model.named_parameters()
            if weight.dim() > 1 and name.rpartition(".")[0] not in tables
        )
    )
