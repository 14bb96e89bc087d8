"""Commands of SCAN that are trained on and asked for, and who learns them: with a symmetry, by seeing it, without."""

import pytest
import torch

from rigpt_hf.demo import learners
from rigpt_hf.demo.commands import SHOWN_OFTEN, Commands, in_parts, to_tensors
from rigpt_hf.demo.learners import Learner
from rigpt_hf.demo.scan import ANSWER, END, HELD_OUT, IDS, VOCABULARY, encode, grammar, symmetries
from rigpt_hf.symmetry.tokens import TokenSymmetry


SIZES = learners.Sizes(hidden_size=32, layers=2, heads=2, positions=24)
MEANING = {one.command: one.actions for one in grammar()}


def words(ids: torch.Tensor) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Command and actions of a row."""
    tokens = ids.tolist()
    said = tokens.index(ANSWER)
    return tuple(VOCABULARY[t] for t in tokens[1:said]), tuple(
        VOCABULARY[t] for t in tokens[said + 1 : tokens.index(END)]
    )


@pytest.mark.parametrize("name", ["simple", *HELD_OUT])
@pytest.mark.by_default(2)
def test_commands_of_the_test_are_never_trained_on(name):
    commands = Commands(name)
    rows = {words(ids) for ids, _ in zip(*commands.rows, strict=True)}
    assert rows and commands.test and commands.kept_back
    for kept in (commands.test, commands.kept_back):
        assert not rows & set(kept)
    assert len(rows) + len(commands.test) + len(commands.kept_back) == len(grammar())
    drawn = [words(row) for ids, _ in commands.batches(64, seed=1)(0) for row in ids]
    assert len(drawn) == 64 and set(drawn) <= rows
    if name in SHOWN_OFTEN:
        assert sum(command == SHOWN_OFTEN[name] for command, _ in drawn) >= 6


def test_batches_follow_their_seed():
    commands = Commands("add-jump", longest=8)
    first, again, other = (commands.batches(16, seed)(0) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


def test_parts_hold_every_row_whole():
    examples = grammar()[::97]
    ids, labels = map(torch.from_numpy, encode(list(examples)))
    parts = list(in_parts(ids, labels, 16))
    assert {words(row) for part, _ in parts for row in part} == set(examples)
    assert sum(int((part >= 0).sum()) for _, part in parts) == int((labels >= 0).sum())
    assert sum(part.numel() for part, _ in parts) < 0.7 * ids.numel()


def test_relabelled_commands_mean_what_they_say():
    ids, labels = map(torch.from_numpy, encode(list(grammar()[:200])))
    moved, asked = learners.Relabelling(symmetries()["verbs and directions"], seed=0)(ids, labels)
    assert all(MEANING[command] == actions for command, actions in map(words, moved))
    assert torch.equal(asked[labels >= 0], moved[labels >= 0]) and torch.equal(asked < 0, labels < 0)
    assert (moved != ids).any(1).float().mean() > 0.5
    # An exchange of commands alone keeps no meaning.
    wrong = TokenSymmetry.named("cyclic", [[IDS["walk"], IDS["jump"]]], len(VOCABULARY))
    spoilt, _ = learners.Relabelling(wrong, seed=0)(ids, labels)
    assert not all(MEANING[command] == actions for command, actions in map(words, spoilt))


def trained(learner: Learner, steps: int = 120, **changes):
    commands = Commands("add-jump", longest=6)
    model = learners.make_model(learner, len(VOCABULARY), SIZES, seed=0)
    training = {"steps": steps, "rate": 0.01, "seed": 0, "symmetries": symmetries()} | changes
    return model, learners.train(learner, model, commands.batches(32, 1), **training), commands


@pytest.mark.full
def test_an_answer_is_right_if_the_model_would_generate_it():
    model, _, commands = trained(Learner(), steps=250)
    asked = commands.kept_back[:24] + commands.test[:24]
    _, right = learners.answers(model, in_parts(*to_tensors(asked), 64))
    by_length = [words(row) for part, _ in in_parts(*to_tensors(asked), 64) for row in part]
    generated = []
    for command, actions in by_length:
        start = torch.tensor([[IDS["<s>"], *map(IDS.get, command), ANSWER]])
        ids = model.generate(start, do_sample=False, max_new_tokens=len(actions) + 1, eos_token_id=END, pad_token_id=0)
        generated.append(ids[0, start.shape[1] :].tolist() == [*map(IDS.get, actions), END])
    assert right.tolist() == generated
    assert 0 < right.mean() < 1  # so both kinds are met


@pytest.mark.parametrize(
    "name, kind",
    [
        ("verbs and directions", "irreducible"),
        ("verbs", "permutation"),
        pytest.param("verbs", "irreducible", marks=pytest.mark.full),
        pytest.param("verbs and directions", "permutation", marks=pytest.mark.full),
    ],
)
@pytest.mark.full
def test_who_carries_a_symmetry_keeps_it(name, kind):
    model, representation, commands = trained(Learner(carries=name, kind=kind), steps=25)
    ids = to_tensors(commands.test[:16])[0]
    held = learners.symmetry_of(model, representation.symmetry, representation, ids)
    assert held["distance"] < 1e-5 and held["symmetry_error_max"] < 1e-3
    sizes = learners.sizes_of(model, representation)
    assert sizes["free_parameters"] < 0.7 * sizes["parameters"]
    # The learner without it has none of it, and nothing less to choose.
    free, nothing, _ = trained(Learner(), steps=25)
    assert (
        nothing is None and learners.symmetry_of(free, representation.symmetry, None, ids)["symmetry_error_max"] > 0.1
    )
    assert len(set(learners.sizes_of(free, None).values())) == 1
