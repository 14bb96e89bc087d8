"""Numbers of a few bits, simulated: rounded to nearest on a grid that is symmetric around zero."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


# Added to the moments of the inputs, relative to their mean, so that directions never seen do not blow up.
DAMPING = 0.01
# Numbers in the names of modules: of layers, and of experts.
NUMBER = re.compile(r"\.\d+(?=\.)")


def rounded(values: torch.Tensor, bits: int = 4, group: int = 0) -> torch.Tensor:
    """
    Values `[..., n]` rounded to nearest, symmetric, the largest of each row or group exactly represented.

    Args:
        values: Rows share a scale: those of a weight are outputs, those of activations are tokens.
        bits: Of each number.
        group: Neighbours in a row that share a scale; 0 for all of them.

    Raises:
        ValueError: if `group` does not divide a row, or `bits` is below 2.
    """
    width = values.shape[-1]
    if bits < 2:
        raise ValueError(f"`bits` must be at least 2, one of them for the sign, got {bits}.")
    if group and width % group:
        raise ValueError(f"`group` must divide the {width} numbers of a row, got {group}.")
    # In half precision a scale and what is divided by it would be off by more than a step.
    work = values if values.dtype is torch.float64 else values.float()
    parts = work.reshape(-1, group or width)
    largest = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(work.dtype).tiny) / largest
    return ((parts / scale).round().clamp(-largest, largest) * scale).reshape(values.shape).to(values.dtype)


def compensated(weight: torch.Tensor, moments: torch.Tensor, bits: int = 4, group: int = 0) -> torch.Tensor:
    """
    A matrix `[m, n]` on the same grid as [`rounded`], column by column, with what a column loses made good by those
    that come after it (GPTQ: Frantar et al., arXiv 2210.17323).

    Args:
        weight: Rows are outputs.
        moments: `[n, n]`, the second moments of the inputs. With a multiple of the identity nothing is made good.
        bits, group: As for [`rounded`].

    Raises:
        ValueError: as [`rounded`], or if `moments` does not fit.
    """
    width = weight.shape[1]
    if moments.shape != (width, width):
        raise ValueError(f"`moments` must be [{width}, {width}], got {list(moments.shape)}.")
    rounded(weight, bits, group)  # refuses what it refuses
    left, grid = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    moments = moments.double()
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    largest, size = 2 ** (bits - 1) - 1, group or width
    for column in range(width):
        if column % size == 0:
            reach = left[:, column : column + size].abs().amax(dim=1)
            scale = reach.clamp_min(torch.finfo(torch.float64).tiny) / largest
        grid[:, column] = (left[:, column] / scale).round().clamp(-largest, largest) * scale
        lost = (left[:, column] - grid[:, column]) / inverse[column, column]
        left[:, column:] -= lost[:, None] * inverse[column, column:]
    return grid.to(weight.dtype)


def all_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """All linear maps with more than one output, by the names of their modules."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.shape[0] > 1
    }


def matrices_of(model: Any, leave: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """[`all_matrices`] but the head and those whose names end as `leave` says."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in all_matrices(model).items()
        if module is not head and name.rpartition(".")[2] not in leave
    }


def other_matrices(model: Any, covered: Iterable[str]) -> list[str]:
    """
    The matrices of a model outside the `covered` modules: names of all parameters of at least two dimensions
    longer than one that are no embedding and in none of these modules, such as the fused experts of Mixtral.
    """
    modules = set(covered)
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    embeddings.add(id(getattr(model.get_output_embeddings(), "weight", None)))
    return [
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in modules
        and id(parameter) not in embeddings
        and sum(size > 1 for size in parameter.shape) > 1
    ]


def in_short(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of parameters with `*` for their numbers, but where others, that are not among them, are named so too."""
    wanted = dict.fromkeys(names)
    others = {NUMBER.sub(".*", name) for name, _ in model.named_parameters() if name not in wanted}
    short = {name: NUMBER.sub(".*", name) for name in wanted}
    return list(dict.fromkeys(name if star in others else star for name, star in short.items()))


def rows_of(module: nn.Module) -> torch.Tensor:
    """The weight `[outputs, inputs]` of a linear map; GPT-2 keeps it the other way round."""
    weight: Any = module.weight
    return weight.T if isinstance(module, Conv1D) else weight
