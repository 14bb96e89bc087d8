"""
SCAN: commands such as "jump around left twice" and the actions they mean (Lake and Baroni 2018), from the grammar.

20,910 commands in all. A split keeps some of them for the test, so that a rule must be carried over to words for which
it was never shown.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from ..symmetry.tokens import TokenSymmetry


VERBS, DIRECTIONS = ("walk", "look", "run", "jump"), ("left", "right")
TURNS = {"left": "LTURN", "right": "RTURN"}
SPECIAL = ("<pad>", "<s>", "<answer>", "<end>")
WORDS = (*VERBS, "turn", *DIRECTIONS, "opposite", "around", "twice", "thrice", "and", "after")
ACTIONS = (*(verb.upper() for verb in VERBS), *TURNS.values())
VOCABULARY = (*SPECIAL, *WORDS, *ACTIONS)
IDS = {token: index for index, token in enumerate(VOCABULARY)}
PAD, START, ANSWER, END = (IDS[token] for token in SPECIAL)


def symmetries() -> dict[str, TokenSymmetry]:
    """Exchanges of words and, alike, of actions that keep what commands mean: of verbs, of directions, and of both."""
    verbs = TokenSymmetry.named(
        "cyclic", [[IDS[verb] for verb in VERBS], [IDS[verb.upper()] for verb in VERBS]], len(IDS)
    )
    ways = [[IDS[way] for way in DIRECTIONS], [IDS[TURNS[way]] for way in DIRECTIONS]]
    directions = TokenSymmetry.named("cyclic", ways, len(IDS))
    return {"verbs": verbs, "directions": directions, "verbs and directions": verbs | directions}


class Example(NamedTuple):
    """A command and its actions, both as words."""

    command: tuple[str, ...]
    actions: tuple[str, ...]


@cache
def grammar() -> tuple[Example, ...]:
    """All commands, with their meaning."""
    simple = [Example((verb,), (verb.upper(),)) for verb in VERBS]
    for verb, way in product((*VERBS, "turn"), DIRECTIONS):
        act, turn = () if verb == "turn" else (verb.upper(),), (TURNS[way],)
        simple += [
            Example((verb, way), turn + act),
            Example((verb, "opposite", way), turn * 2 + act),
            Example((verb, "around", way), (turn + act) * 4),
        ]
    repeated = [
        Example((*one.command, *more), one.actions * times)
        for one in simple
        for more, times in (((), 1), (("twice",), 2), (("thrice",), 3))
    ]
    both = [
        Example(
            (*one.command, word, *other.command),
            one.actions + other.actions if word == "and" else other.actions + one.actions,
        )
        for one, other in product(repeated, repeated)
        for word in ("and", "after")
    ]
    return (*repeated, *both)


def _has(*words: str) -> Callable[[Example], bool]:
    """Whether a command has these words next to each other."""
    return lambda one: any(one.command[at : at + len(words)] == words for at in range(len(one.command)))


# What is kept for the test.
HELD_OUT: dict[str, Callable[[Example], bool]] = {
    "add-jump": lambda one: "jump" in one.command and len(one.command) > 1,
    "around-right": _has("around", "right"),
    "add-turn-left": lambda one: _has("turn", "left")(one) and len(one.command) > 2,
    "length": lambda one: len(one.actions) > 22,
}


def split(name: str, longest: int | None = None, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """
    Commands to train on and to test on.

    Args:
        name: `"simple"` (a fifth at random), or a key of `HELD_OUT`.
        longest: Answers of at most so many actions.
        seed: Of the random fifth.
    """
    chosen = [one for one in grammar() if longest is None or len(one.actions) <= longest]
    if name == "simple":
        out = np.random.default_rng(seed).random(len(chosen)) < 0.2
    else:
        out = np.array([HELD_OUT[name](one) for one in chosen])
    train, test = ([one for one, held in zip(chosen, out, strict=True) if held == kept] for kept in (False, True))
    return train, test


def encode(examples: list[Example], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """
    Token ids `[examples, length]`, and labels that are -100 outside of the answers and their end.

    Args:
        examples: To encode.
        length: At least the longest; that one if not given.
    """
    rows = [([START, *map(IDS.get, one.command), ANSWER], [*map(IDS.get, one.actions), END]) for one in examples]
    length = length or max(len(a) + len(b) for a, b in rows)
    ids, labels = np.full((len(rows), length), PAD), np.full((len(rows), length), -100)
    for row, (asked, answer) in enumerate(rows):
        whole = len(asked) + len(answer)
        ids[row, :whole] = asked + answer
        labels[row, len(asked) : whole] = answer
    return ids, labels
