"""
The fingerprint of a model: what tells whether another was made from it, in a few hundred kilobytes.

It is made of [`sketch`], which no choice of frames changes, and holds at most a hundredth as many numbers as the model
has parameters. Models of other widths, depths and numbers of heads have comparable fingerprints, as long as their
tokens mean the same: the tokens are what the directions that everything is held against are made of.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..checkpoints.folder import named_file
from ..frames import refuse_shared_frames
from ..modeling_rigpt import RiGPTForCausalLM
from .given import Model, given
from .progress import bar_to
from .sketch import KINDS, sketch


# Probes at most, and at least; numbers per parameter of the model, and bytes of all of them.
PROBES, LEAST, SHARE, BYTES = 32, 8, 0.01, 10**6
# Numbers that are hashed at a time.
CHUNK = 2**22
# Probes of the part by which the nearest of many are found first.
COARSE = 8
FORMAT, VERSION = "rigpt-fingerprint", "1"
COARSE_TENSOR, TENSOR = "coarse", "sketches"
FACTS = {"name", "class", "parameters", "layers", "salt"}


@dataclass(frozen=True)
class Fingerprint:
    """
    The fingerprint of a model.

    Args:
        sketches (`torch.Tensor` of shape `[layers, kinds, k, k]`): see [`sketch`].
        facts (`dict`): about the model: `name`, `model_type`, sizes, number of parameters.
    """

    sketches: torch.Tensor
    facts: Mapping[str, Any]

    def distance(self, other: "Fingerprint") -> float:
        """
        One less the mean similarity of the layers, in `[0, 1]`: 0 for gauge-equivalent models, near 1 for unrelated
        ones, 1 also where nothing can be compared. Layers are matched in their order; some of either model may be left
        out, and the mean is over as many as the shorter has.
        """
        return 1 - min(max(float(self.similarities(other).mean()), 0.0), 1.0)

    def similarities(self, other: "Fingerprint") -> torch.Tensor:
        """The similarity of matched layers, in order, and 0 for each that the shorter model has without a match."""
        likeness = self.likeness(other)
        matched = [float(likeness[row, column]) for row, column in in_order(likeness)]
        return torch.tensor(matched + [0.0] * (min(likeness.shape) - len(matched)), dtype=torch.float64)

    def likeness(self, other: "Fingerprint") -> torch.Tensor:
        """
        Cosines between the sketches of all pairs of layers, `[layers, layers of the other]`, mean over kinds.

        Raises:
            ValueError: if the two have different salts.
        """
        if self.facts.get("salt", 0) != other.facts.get("salt", 0):
            raise ValueError("`other` must have the same salt, got another. Make both fingerprints with one.")
        probes = min(self.sketches.shape[-1], other.sketches.shape[-1])
        ours, theirs = (_unit(side.sketches[..., :probes, :probes].double()) for side in (self, other))
        both = (ours.abs().sum(2) > 0).double() @ (theirs.abs().sum(2) > 0).double().T
        return torch.einsum("lkx,mkx->lm", ours, theirs) / both.clamp_min(1)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a `ValueError` if what is at `path` is not this program's."""
        with named_file(Path(path)) as place:
            place.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file that [`save`] writes."""
        whole = self.sketches.float().contiguous()
        coarse = whole[..., :COARSE, :COARSE].clone(memory_format=torch.contiguous_format)
        about = {"format": FORMAT, "version": VERSION, "facts": json.dumps(dict(self.facts))}
        return save({TENSOR: whole, COARSE_TENSOR: coarse}, about)

    @classmethod
    def load(cls, path: str | Path, coarse: bool = False) -> "Fingerprint":
        """
        Read what [`save`] wrote; `coarse`: only a small part, by which the nearest of many are found.

        Raises:
            ValueError: if it is no such file.
        """
        rule = f"`fingerprint` must be a file that `rigpt fingerprint` wrote, got {str(path)!r}"
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT or about.get("version") != VERSION:
                    raise ValueError(f"{rule}, which is none of version {VERSION}. Make it with this release.")
                tensor = file.get_tensor(COARSE_TENSOR if coarse else TENSOR)
                facts = json.loads(about["facts"])
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{rule}: it is missing, cut or damaged. Make it once more.") from error
        layers, kinds, *probes = tensor.shape if tensor.dim() == 4 else (0, 0)
        wanted = [COARSE, COARSE] if coarse else probes[:1] * 2
        if not layers or kinds != len(KINDS) or probes != wanted or not tensor.isfinite().all():
            raise ValueError(f"{rule}, whose numbers are damaged. Make it once more.")
        if not isinstance(facts, dict) or not facts.keys() >= FACTS:
            raise ValueError(f"{rule}, which does not say what it is of. Make it once more.")
        return cls(tensor, facts)


def is_fingerprint(path: str | Path) -> bool:
    """Whether a path is a file that [`Fingerprint.save`] wrote."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def fingerprints_in(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Files of a folder that hold fingerprints, and others, such as ones that were cut; hidden ones are neither."""
    found: tuple[list[Path], list[Path]] = ([], [])
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.name[0] != ".":
            found[not is_fingerprint(path)].append(path)
    return found


def nearest_of(fingerprint: Fingerprint, folder: str | Path, count: int = 5) -> list[tuple[Path, Fingerprint, float]]:
    """
    The nearest fingerprints in a folder, with their distances, the nearest first.

    A small part of each file is read, and the whole of those that are nearest by it. Other files are left alone.

    Raises:
        ValueError: if there is no fingerprint in the folder, or one is damaged.
    """
    paths, _ = fingerprints_in(folder)
    parts = [Fingerprint.load(path, coarse=True).sketches for path in paths]
    if not paths:
        raise ValueError(
            f"`folder` must hold fingerprints, got {str(folder)!r}, which has none. `rigpt fingerprint MODEL --output "
            "FILE` makes one."
        )
    own = fingerprint.sketches[..., :COARSE, :COARSE]
    rough = torch.zeros(len(parts), dtype=torch.float64)
    of_depth: dict[int, list[int]] = {}
    for index, part in enumerate(parts):
        of_depth.setdefault(len(part), []).append(index)
    for depth, places in of_depth.items():
        if depth == len(own):  # nothing is to be matched, and all are compared at once
            several = torch.stack([parts[place] for place in places])
            rough[places] = (_unit(several) * _unit(own)).sum(dim=-1).mean(dim=(1, 2)).double()
        else:
            for place in places:
                rough[place] = float(fingerprint.similarities(Fingerprint(parts[place], fingerprint.facts)).mean())
    chosen = rough.argsort(descending=True)[: max(4 * count, 20)].tolist()
    found = [(paths[place], Fingerprint.load(paths[place])) for place in chosen]
    return sorted(((*one, fingerprint.distance(one[1])) for one in found), key=lambda entry: entry[2])[:count]


def _unit(sketches: torch.Tensor) -> torch.Tensor:
    flat = sketches.flatten(-2)
    return flat / flat.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def in_order(likeness: torch.Tensor) -> list[tuple[int, int]]:
    """The pairs of rows and columns of `[n, m]`, both ascending, with the largest sum, by dynamic programming."""
    rows, columns = likeness.shape
    gains = likeness.tolist()
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            match = best[row - 1][column - 1] + gains[row - 1][column - 1]
            best[row][column] = max(match, best[row - 1][column], best[row][column - 1])
    pairs, row, column = [], rows, columns
    while row and column:
        if best[row][column] == best[row - 1][column]:
            row -= 1
        elif best[row][column] == best[row][column - 1]:
            column -= 1
        else:
            row, column = row - 1, column - 1
            pairs.append((row, column))
    return pairs[::-1]


def count_probes(layers: int, parameters: int) -> int:
    """The number of probes: as many as are worth it, within the limits on the numbers and bytes of a fingerprint."""
    numbers = min(SHARE * parameters, BYTES / 4 - layers * len(KINDS) * COARSE**2)
    affordable = int(max(numbers, 0) / (layers * len(KINDS))) ** 0.5
    return max(LEAST, min(PROBES, int(affordable)))


def salt_of(*models: Model) -> int:
    """
    64 bits of a hash of all weights of some models.

    Whoever changes a weight gets another salt: nobody can descend away from probes, or towards what they should show,
    that the result of the descent chooses (as Fiat and Shamir 1986 let a proof choose its own questions).
    """
    digest = hashlib.sha256()
    for model in models:
        source = given(model)
        for name in source.weights.shapes:
            tensor = source.weights.read(name).contiguous().flatten()
            digest.update(name.encode())
            for chunk in tensor.split(CHUNK):
                digest.update(chunk.view(torch.uint8).numpy())
    return int.from_bytes(digest.digest()[:8], "big")


@torch.no_grad()
def fingerprint(model: Model, *, salt: int = 0, progress: bool = False) -> Fingerprint:
    """
    The fingerprint of a model in memory, or of one on disk or on the Hub, read tensor by tensor.

    Args:
        model: A RiGPT; or the folder, file or id of any model that converts.
        salt: Of 64 bits; fingerprints of one salt are comparable. That of files is 0, and known to whoever wants to
            be far from one; a salt that [`salt_of`] takes from the models themselves is known to nobody before.
        progress: Show a progress bar.

    Raises:
        ValueError: if it is no such model, or its layers share their frames.
    """
    source = given(model)
    refuse_shared_frames(source.config, "A fingerprint")
    layers, parameters = source.config.num_hidden_layers, sum(map(prod, source.weights.shapes.values()))
    facts = {
        "name": source.name,
        "class": source.stock or RiGPTForCausalLM.__name__,
        "parameters": parameters,
        "layers": layers,
        "hidden_size": source.config.hidden_size,
        "vocab_size": source.config.vocab_size,
        "salt": salt,
    }
    with bar_to(len(source.weights.shapes), "Fingerprint", "tensor", progress) as bar:
        tick: Callable[[], Any] = bar.update
        probes = count_probes(layers, parameters)
        sketches = sketch(source.config, tuple(source.weights.shapes), source.weights.read, probes, salt, tick)
    return Fingerprint(sketches, facts)
