"""SCAN with and without its symmetry: what is trained on and asked, who learns, and runs that are not made twice."""

import json

import pytest
import torch

from evaluation.experiments.symmetry import learners, scan
from evaluation.experiments.symmetry.run_records import RunRecords
from rigpt_hf.demo.scan import ANSWER, END, IDS, VOCABULARY, encode, grammar, symmetries
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


@pytest.mark.parametrize("name", scan.SPLITS)
def test_commands_of_the_test_are_never_trained_on(name):
    commands = scan.Commands(name)
    rows = {words(ids) for ids, _ in zip(*commands.rows, strict=True)}
    assert rows and commands.test and commands.kept_back
    for kept in (commands.test, commands.kept_back):
        assert not rows & set(kept)
    assert len(rows) + len(commands.test) + len(commands.kept_back) == len(grammar())
    drawn = [words(row) for ids, _ in commands.batches(64, seed=1)(0) for row in ids]
    assert len(drawn) == 64 and set(drawn) <= rows
    if name in scan.SHOWN_OFTEN:
        assert sum(command == scan.SHOWN_OFTEN[name] for command, _ in drawn) >= 6


def test_batches_follow_their_seed():
    commands = scan.Commands("add-jump", longest=8)
    first, again, other = (commands.batches(16, seed)(0) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


def test_parts_hold_every_row_whole():
    examples = grammar()[::97]
    ids, labels = map(torch.from_numpy, encode(list(examples)))
    parts = list(scan.in_parts(ids, labels, 16))
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


def trained(name: str, steps: int = 120, **changes):
    learner, commands = scan.LEARNERS[name], scan.Commands("add-jump", longest=6)
    model = learners.make_model(learner, len(VOCABULARY), SIZES, seed=0)
    training = {"steps": steps, "rate": 0.01, "seed": 0, "symmetries": symmetries()} | changes
    return model, learners.train(learner, model, commands.batches(32, 1), **training), commands


def test_an_answer_is_right_if_the_model_would_generate_it():
    model, _, commands = trained("RiGPT", steps=250)
    asked = commands.kept_back[:24] + commands.test[:24]
    _, right = learners.answers(model, scan.in_parts(*scan.to_tensors(asked), 64))
    by_length = [words(row) for part, _ in scan.in_parts(*scan.to_tensors(asked), 64) for row in part]
    generated = []
    for command, actions in by_length:
        start = torch.tensor([[IDS["<s>"], *map(IDS.get, command), ANSWER]])
        ids = model.generate(start, do_sample=False, max_new_tokens=len(actions) + 1, eos_token_id=END, pad_token_id=0)
        generated.append(ids[0, start.shape[1] :].tolist() == [*map(IDS.get, actions), END])
    assert right.tolist() == generated
    assert 0 < right.mean() < 1  # so both kinds are met


@pytest.mark.parametrize("name", ["RiGPT, verbs", "RiGPT, verbs and directions", "RiGPT, permutations"])
def test_who_carries_a_symmetry_keeps_it(name):
    model, representation, commands = trained(name, steps=25)
    ids = scan.to_tensors(commands.test[:16])[0]
    held = learners.symmetry_of(model, representation.symmetry, representation, ids)
    assert held["distance"] < 1e-5 and held["symmetry_error_max"] < 1e-3
    sizes = learners.sizes_of(model, representation)
    assert sizes["free_parameters"] < 0.7 * sizes["parameters"]
    # The learner without it has none of it, and nothing less to choose.
    free, nothing, _ = trained("RiGPT", steps=25)
    assert (
        nothing is None and learners.symmetry_of(free, representation.symmetry, None, ids)["symmetry_error_max"] > 0.1
    )
    assert len(set(learners.sizes_of(free, None).values())) == 1


def test_no_run_is_made_twice(tmp_path, monkeypatch):
    small = {"steps": 1, "longest": 4, "hidden_size": 16, "layers": 1, "heads": 1}
    chosen = {"splits": ["add-jump", "around-right"], "only": "RiGPT, verbs", "seeds": 2}
    options = scan.Options(**chosen, **small, output=tmp_path / "runs" / "scan.json")
    runs = scan.run(options)
    assert len(runs) == len(learners.EQUIVARIANT_RATES) + 1 + 2
    first = min((run for run in runs[:3]), key=lambda run: run["kept_back_loss"])["rate"]
    assert {run["rate"] for run in runs[3:]} == {first}
    written = json.loads(options.output.read_text())
    assert written["runs"] == runs and written["settings"]["longest"] == 4

    def refuse(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(scan, "run_one", refuse)
    assert scan.run(options) == runs
    options.output.write_text(json.dumps(written | {"runs": runs[:-1]}))
    with pytest.raises(AssertionError, match="made again"):
        scan.run(options)


@pytest.mark.parametrize(
    "content, said",
    [
        ("no json", "a file of runs"),
        ("[1]", "a file of runs"),
        ('{"a": 1}', "a file of runs"),
        (None, "same settings"),
    ],
)
def test_a_file_of_something_else_stays(tmp_path, content, said):
    path = tmp_path / "mine.json"
    if content is None:
        RunRecords(path, "scan", {"steps": 1}).run(lambda: {"loss": 1.0}, seed=0)
    else:
        path.write_text(content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=said) as refused:
        RunRecords(path, "scan", {"steps": 2})
    assert str(path) in str(refused.value) and path.read_bytes() == before
