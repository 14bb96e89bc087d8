"""A symmetry of data: a finite group that exchanges tokens; how one says which, and how it is kept."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from operator import index
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch

from ...checkpoints.source import shown
from .group import FiniteGroup
from .orders import cycles, joined, order_in_words, order_of


Cycles = tuple[tuple[int, ...], ...]
Tokens = Sequence[int] | Sequence[str]
FORMAT = "rigpt token symmetry"


class TokenSymmetry:
    """
    A finite group that acts on a vocabulary by exchanging tokens, given by generators.

    A model has it if relabelling what it reads relabels what it says: `f(π x) = π f(x)`.

    Args:
        vocab_size (`int`): number of tokens.
        generators: each a list of cycles; the cycle `[3, 7, 5]` moves token 3 to 7, 7 to 5 and 5 to 3. One of a single
            token moves nothing, and is not kept.
        special (`Sequence[int]`, *optional*): tokens that must stay.

    Raises:
        ValueError: if there are no tokens, or a generator is no permutation of them or moves a special one.
    """

    def __init__(self, vocab_size: int, generators: Sequence[Sequence[Sequence[int]]], special: Sequence[int] = ()):
        if vocab_size < 1:
            raise ValueError(f"`vocab_size` must be at least 1, got {vocab_size}. Give the size of the vocabulary.")
        self.vocab_size = vocab_size
        kept: list[Cycles] = []
        stay = set(special)
        for number, given in enumerate(generators):
            cycles = [tuple(_id(token) for token in cycle) for cycle in given]
            kept.append(tuple(cycle for cycle in cycles if len(cycle) > 1))
            named = Counter(token for cycle in cycles for token in cycle)
            moved = {token for cycle in kept[-1] for token in cycle}
            for wrong, rule in (
                ([token for token, times in named.items() if times > 1], "move every token once"),
                ([token for token in named if not 0 <= token < vocab_size], f"have tokens from 0 to {vocab_size - 1}"),
                (moved & stay, "leave special tokens where they are"),
            ):
                if wrong:
                    raise ValueError(
                        f"`generators` must {rule}, got token {shown(min(wrong))} in generator {number}. Correct its "
                        "cycles."
                    )
        self.generators: tuple[Cycles, ...] = tuple(kept)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenSymmetry) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: "TokenSymmetry") -> "TokenSymmetry":
        """The group that the generators of both generate."""
        if self.vocab_size != other.vocab_size:
            raise ValueError(
                f"`other` must be of the same vocabulary, got {other.vocab_size} and {self.vocab_size} tokens. Make "
                "both for one tokenizer."
            )
        return TokenSymmetry(self.vocab_size, self.generators + other.generators)

    @classmethod
    def named(
        cls,
        name: str,
        tokens: Sequence[Tokens],
        vocab_size: int | None = None,
        tokenizer: Any = None,
    ) -> "TokenSymmetry":
        """
        A cyclic, dihedral or symmetric group that acts alike on several lists of tokens.

        Args:
            name (`str`): `"cyclic"`, `"dihedral"` or `"symmetric"`.
            tokens: lists of one length: what is at one place in them moves together, such as `[["jump", "walk"],
                ["JUMP", "WALK"]]`. Ids, or strings with a tokenizer.
            vocab_size (`int`, *optional*), tokenizer (*optional*): the vocabulary; one of them must be given.

        Raises:
            ValueError: for another name, lists of different lengths, or strings that are no single token.
        """
        lengths = {len(one) for one in tokens}
        if name not in NAMED or len(lengths) != 1:
            raise ValueError(
                f"`tokens` must be lists of one length, and `name` one of {', '.join(NAMED)}, got the lengths "
                f"{sorted(lengths)} and {name!r}. Correct them."
            )
        columns = [token_ids(one, tokenizer) for one in tokens]
        orders = NAMED[name](lengths.pop())
        generators = [[[ids[place] for place in cycle] for ids in columns for cycle in order] for order in orders]
        return cls(*_vocabulary(vocab_size, tokenizer, generators))

    @classmethod
    def from_exchanges(
        cls, exchanges: Sequence[Sequence[Tokens]], vocab_size: int | None = None, tokenizer: Any = None
    ) -> "TokenSymmetry":
        """The group of generators that are lists of cycles of ids, or of strings with a tokenizer; else as `named`."""
        generators = [[token_ids(cycle, tokenizer) for cycle in cycles] for cycles in exchanges]
        return cls(*_vocabulary(vocab_size, tokenizer, generators))

    @classmethod
    def of_table(
        cls, kind: str, table: Any, tokens: Tokens, vocab_size: int | None = None, tokenizer: Any = None
    ) -> "TokenSymmetry":
        """
        The symmetry of products in a finite group whose elements are tokens.

        Args:
            kind (`str`): `"conjugations"`, or `"automorphisms"`, which are all that respect products.
            table: `table[a][b]` is the number of the product of elements `a` and `b`, `[n, n]`.
            tokens: the token of each element.
            vocab_size, tokenizer: as of `named`.

        Raises:
            ValueError: for another kind, or a table that is not that of a group.
        """
        maps = {"conjugations": conjugations, "automorphisms": automorphisms}
        if kind not in maps:
            raise ValueError(f"`kind` must be conjugations or automorphisms, got {kind!r}. Take one of them.")
        ids = np.array(token_ids(tokens, tokenizer))
        rows = maps[kind](_checked(table))
        return cls(
            *_vocabulary(vocab_size, tokenizer, [[ids[cycle].tolist() for cycle in cycles(row)] for row in rows])
        )

    @cached_property
    def points(self) -> np.ndarray:
        """The tokens that move, sorted."""
        return np.array(
            sorted({token for cycles in self.generators for cycle in cycles for token in cycle}), dtype=int
        )

    @cached_property
    def group(self) -> FiniteGroup:
        """The group as permutations of `points`."""
        return FiniteGroup(np.searchsorted(self.points, self.permutations.numpy()[:, self.points]))

    def check_vocabulary(self, config: Any) -> None:
        """A `ValueError` if a model of this configuration has fewer tokens."""
        if config.vocab_size < self.vocab_size:
            raise ValueError(
                f"`symmetry` must be of the model's vocabulary, got {self.vocab_size} tokens for a table of "
                f"{config.vocab_size}. Make it with the model's tokenizer."
            )

    def relabelled(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[vocabulary, ...]` after a generator: a token's goes to the place of the token that it becomes."""
        moved = rows.clone()
        moved[self.permutations[number].to(rows.device)] = rows[: self.vocab_size]
        return moved

    @property
    def order(self) -> int:
        """The number of elements; an [`OrderError`] if they cannot be counted, see `order_of`."""
        return order_of(self.generators)

    @property
    def order_in_words(self) -> str:
        """The number of elements, or how large it is at least, as a person reads it."""
        return order_in_words(self.generators)

    @cached_property
    def permutations(self) -> torch.Tensor:
        """Where each generator moves every token, `[generators, vocabulary]`."""
        moved = torch.arange(self.vocab_size).repeat(len(self.generators), 1)
        for row, generator in zip(moved, self.generators, strict=True):
            # All at once, as there may be thousands.
            after = [token for cycle in generator for token in cycle[1:] + cycle[:1]]
            row[[token for cycle in generator for token in cycle]] = torch.tensor(after, dtype=torch.long)
        return moved

    @cached_property
    def orbits(self) -> list[list[int]]:
        """The sets of tokens that are moved to each other, without those that rest."""
        return joined(cycle for cycles in self.generators for cycle in cycles)

    def to_dict(self) -> dict[str, Any]:
        """The content that `from_dict` reads; plain JSON."""
        generators = [[list(cycle) for cycle in cycles] for cycles in self.generators]
        return {"format": FORMAT, "vocab_size": self.vocab_size, "generators": generators}

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], special: Sequence[int] = (), tokenizer: Any = None
    ) -> "TokenSymmetry":
        """
        The symmetry that `to_dict` wrote; by hand, tokens may be strings for a tokenizer, which also knows the
        `vocab_size` if that is left out.

        Raises:
            ValueError: if it is something else.
        """
        try:
            check_format(content)
            if not all(isinstance(one, list) for cycles in content["generators"] for one in (cycles, *cycles)):
                raise _no_symmetry(content)
            generators = [[token_ids(cycle, tokenizer) for cycle in cycles] for cycles in content["generators"]]
            size = content.get("vocab_size")
            return cls(_vocabulary(None, tokenizer, [])[0] if size is None else size, generators, special)
        except TypeError as error:
            raise _no_symmetry(content) from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON; a `ValueError` if something is at `path` that this program did not write."""
        from ...checkpoints.folder import named_file

        with named_file(Path(path)) as place:
            place.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, special: Sequence[int] = (), tokenizer: Any = None) -> "TokenSymmetry":
        """Read what `save` wrote; arguments and errors as of `from_dict`, with the file."""
        content = read_content(path)
        with _of_file(path):
            return cls.from_dict(content, special, tokenizer)


def read_content(path: str | Path) -> Any:
    """The content of a file that `save` wrote, its tokens still unread; a `ValueError` if it is something else."""
    from ...checkpoints.written import parse_json
    from ...text.files import read_text

    if not Path(path).is_file():
        raise ValueError(f"`symmetry` must be a file, got {str(path)!r}. Write one with `TokenSymmetry.save`.")
    text = read_text(Path(path), "symmetry")
    try:
        content = parse_json(text)
    except ValueError as error:
        reason = getattr(error, "msg", error)
        raise ValueError(f"`symmetry` must be a file of JSON, got {str(path)!r}: {reason}. Mend it.") from error
    with _of_file(path):
        check_format(content)
    return content


@contextmanager
def _of_file(path: str | Path) -> Iterator[None]:
    """Says of an error which file it is of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"`symmetry` must hold exchanges of tokens, got {str(path)!r}: {error}") from error


def check_format(content: Any) -> None:
    """A `ValueError` if this is not what `to_dict` writes, as far as one sees without its tokens."""
    kinds = {"format": (str,), "vocab_size": (int, NoneType), "generators": (list,)}
    if not isinstance(content, Mapping) or any(type(content.get(name)) not in kind for name, kind in kinds.items()):
        raise _no_symmetry(content)
    if content["format"] != FORMAT:
        raise _no_symmetry(content)


def _no_symmetry(content: Any) -> ValueError:
    return ValueError(
        f"`content` must be an object with the format {FORMAT!r}, vocab_size and generators, got "
        f"{str(content)[:80]!r}. Write it with `TokenSymmetry.save`."
    )


def _cyclic(n: int) -> list[list[list[int]]]:
    return [[list(range(n))]]


def _dihedral(n: int) -> list[list[list[int]]]:
    return [*_cyclic(n), [[i, n - 1 - i] for i in range(n // 2)]]


def _symmetric(n: int) -> list[list[list[int]]]:
    return [*_cyclic(n), [[0, 1]]]


# Generators by the number of things, as cycles.
NAMED = {"cyclic": _cyclic, "dihedral": _dihedral, "symmetric": _symmetric}


def token_ids(tokens: Tokens, tokenizer: Any) -> list[int]:
    """
    Ids of tokens that are ids already or, with a tokenizer, strings.

    Raises:
        ValueError: if a string is no single token.
    """
    ids, vocabulary = [], {} if tokenizer is None else tokenizer.get_vocab()
    for token in tokens:
        if isinstance(token, str):
            if tokenizer is None:
                got = shown(repr(token))
                raise ValueError(f"`tokenizer` must be given for tokens that are text, got none with {got}.")
            found = [vocabulary[token]] if token in vocabulary else None
            found = found or tokenizer(token, add_special_tokens=False)["input_ids"]
            if len(found) != 1 or found[0] == tokenizer.unk_token_id != vocabulary.get(token):
                spaced = "" if behind_a_space(token, tokenizer) is None else f" {token}"
                hint = f"{shown(repr(spaced))} is one, as words behind a space are: write that. " if spaced else ""
                raise ValueError(
                    f"`tokens` must be single tokens of the tokenizer, got {shown(repr(token))}, which is none. {hint}"
                    "Take others, or add it to the tokenizer."
                )
            token = found[0]
        ids.append(_id(token))
    return ids


def behind_a_space(token: str, tokenizer: Any) -> int | None:
    """The id of a word as it is behind a space, if that is a single token."""
    found = tokenizer(f" {token}", add_special_tokens=False)["input_ids"]
    return found[0] if len(found) == 1 and found[0] != tokenizer.unk_token_id else None


def _id(token: Any) -> int:
    if isinstance(token, bool) or not hasattr(token, "__index__"):
        got = shown(repr(token))
        raise ValueError(f"`tokens` must be whole numbers, or text with a tokenizer, got {got}. Correct it.")
    return index(token)


def _vocabulary(vocab_size: int | None, tokenizer: Any, generators: list) -> tuple[int, list, list[int]]:
    if vocab_size is None and tokenizer is None:
        raise ValueError("`vocab_size` or `tokenizer` must be given, got neither.")
    special = [] if tokenizer is None else list(tokenizer.all_special_ids)
    # Ids may have gaps.
    return vocab_size or max(tokenizer.get_vocab().values()) + 1, generators, special


def _checked(table: Any) -> np.ndarray:
    """A multiplication table, if it is that of a group: rows and columns are permutations, and products associate."""
    array = np.asarray(table)
    n = len(array)
    whole = array.shape == (n, n) and array.dtype.kind in "iu"
    lines = whole and all(
        (np.sort(array, axis=axis) == np.expand_dims(np.arange(n), 1 - axis)).all() for axis in (0, 1)
    )
    if not (lines and (array[array] == array[:, array]).all()):
        raise ValueError(
            f"`table` must be the multiplication table of a group, numbers from 0 on, got shape {array.shape}. Every "
            "row and column must have every number once, and products must associate."
        )
    return array


def conjugations(table: np.ndarray) -> list[np.ndarray]:
    """Permutations `x → g x g⁻¹` that generate all of them, from a multiplication table."""
    unit = int((table == np.arange(len(table))).all(axis=1).argmax())
    inverse = (table == unit).argmax(axis=1)
    return generating([table[table[g], inverse[g]] for g in range(len(table))])


def automorphisms(table: np.ndarray) -> list[np.ndarray]:
    """Permutations that respect products and generate all that do, from a multiplication table."""
    n = len(table)
    unit = int((table == np.arange(n)).all(axis=1).argmax())
    words, generators = {unit: (unit, unit)}, []
    for element in range(n):
        if element not in words:
            generators.append(element)
            queue = list(words)
            for one in queue:  # which grows meanwhile
                for g in generators:
                    made = int(table[one, g])
                    if made not in words:
                        words[made] = (one, g)
                        queue.append(made)
    # Only an element of the same order can be an image.
    orders, powers = np.ones(n, dtype=int), np.arange(n)
    while (powers != unit).any():
        orders += powers != unit
        powers = np.where(powers == unit, unit, table[powers, np.arange(n)])
    found = []
    for images in product(*((orders == orders[g]).nonzero()[0].tolist() for g in generators)):
        send = dict(zip(generators, images, strict=True))
        image = np.full(n, -1)
        image[unit] = unit
        for element, (one, g) in list(words.items())[1:]:  # each after those that it is made of
            image[element] = table[image[one], send[g]]
        if len(set(image)) == n and (image[table] == table[image[:, None], image]).all():
            found.append(image)
    return generating(found)


def generating(permutations: list[np.ndarray]) -> list[np.ndarray]:
    """Some of the permutations that generate the same group as all."""
    kept: list[np.ndarray] = []
    order = 1
    for one in permutations:
        larger = FiniteGroup(np.array([*kept, one])).order
        if larger > order:
            kept.append(one)
            order = larger
    return kept
