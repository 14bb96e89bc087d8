"""Experiments on symmetries of data: programs end to end, and runs that are not made twice."""

import errno
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.experiments.common import ranked, sweep
from evaluation.experiments.run_records import DIGEST, RunRecords
from evaluation.experiments.symmetry import blocks, chorales, found, modular, scan, words
from evaluation.experiments.symmetry.stock import StockSymmetry
from rigpt_hf.checkpoints import folder
from rigpt_hf.checkpoints.written import json_sha256, look
from rigpt_hf.cli.common import save_picture
from rigpt_hf.demo.learners import SYMMETRIC_RATES, Learner, Sizes, make_model
from rigpt_hf.pictures import figure, style
from rigpt_hf.symmetry.tokens import Representation, symmetry_error
from rigpt_hf.symmetry.tokens.blocks import BlockLinear
from tests.tolerances import SYMMETRY


def test_no_run_is_made_twice(tmp_path, monkeypatch):
    small = {"steps": 1, "longest": 4, "hidden_size": 16, "layers": 1, "heads": 1}
    chosen = {"splits": ["add-jump", "around-right"], "only": "RiGPT, verbs", "seeds": 2}
    options = scan.Options(**chosen, **small, output=tmp_path / "runs" / "scan.json", picture=tmp_path / "scan.png")
    runs = scan.run(options)
    assert options.picture.read_bytes().startswith(b"\x89PNG")
    assert len(runs) == len(SYMMETRIC_RATES) + 1 + 2
    first = min((run for run in runs[:3]), key=lambda run: run["kept_back_loss"])["rate"]
    assert {run["rate"] for run in runs[3:]} == {first}
    written = json.loads(options.output.read_text())
    assert [{**run, DIGEST: json_sha256(run)} for run in runs] == written["runs"] and written["settings"][
        "longest"
    ] == 4

    def refuse(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(scan, "run_one", refuse)
    assert scan.run(options) == runs
    options.output.write_text(json.dumps(written | {"runs": written["runs"][:-1]}))
    with pytest.raises(AssertionError, match="made again"):
        scan.run(options)


def test_a_run_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "runs.json"
    RunRecords(path, "test", {}).run(lambda: {"accuracy": 0.5}, seed=0)
    assert RunRecords(path, "test", {}).runs[0]["accuracy"] == 0.5
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(ValueError, match="as this program wrote it"):
        RunRecords(path, "test", {})


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


def test_what_is_written_right_after_a_run_stays(tmp_path, monkeypatch):
    """The file is another's as soon as it has its name."""
    path, put = tmp_path / "runs.json", folder._put
    records = RunRecords(path, "scan", {})
    records.run(lambda: {"loss": 1.0}, seed=0)
    records.run(lambda: {"loss": 1.0}, seed=1)

    def put_and_edit(*arguments):
        put(*arguments)
        path.write_text("years of work")

    with monkeypatch.context() as patched:
        patched.setattr(folder, "_put", put_and_edit)
        records.run(lambda: {"loss": 1.0}, seed=2)
    with pytest.raises(ValueError, match="`output` must stay as it is while this runs, got .*runs.json"):
        records.run(lambda: {"loss": 1.0}, seed=3)
    assert path.read_text() == "years of work"


def test_a_link_is_refused_before_a_run_is_made(tmp_path):
    path, link = tmp_path / "data.json", tmp_path / "runs.json"
    RunRecords(path, "scan", {}).run(lambda: {"loss": 1.0}, seed=0)
    link.symlink_to(path)
    with pytest.raises(ValueError, match="`output` must be a file itself to be replaced, got .*data.json'. Name what"):
        RunRecords(link, "scan", {})
    assert link.is_symlink() and len(RunRecords(link.resolve(), "scan", {}).runs) == 1
    link.unlink()
    link.symlink_to("nowhere")  # of which `--force` would say nothing that these programs have
    with pytest.raises(ValueError, match="`output` must be a file itself to be replaced, got .*nowhere'. Name what"):
        RunRecords(link, "scan", {})


def test_a_place_that_takes_no_file_is_refused_before_a_run_is_made():
    with pytest.raises(ValueError, match="`output` must be a place that can be written to, got '/proc/x.json'"):
        RunRecords(Path("/proc/x.json"), "scan", {}).run(lambda: pytest.fail("a run is made"), seed=0)


@pytest.mark.full
def test_a_picture_is_replaced_only_if_it_was_there_and_ours(tmp_path, monkeypatch, capsys):
    """Its runs are kept; what another has written there meanwhile is left, also if it is this program's."""
    spread, picture = words.spread, tmp_path / "words.png"
    shape = "--steps 2 --batch 2 --length 2 --longer 3 --hidden-size 8 --layers 1 --heads 1 --groups S3 --only RiGPT"
    given = [*shape.split(), "--seeds", "1", "--output", str(tmp_path / "words.json"), "--picture", str(picture)]

    def appears(values):
        save_picture(picture, look(picture), lambda: figure()[0])
        return spread(values)

    for _ in range(2):
        assert words.main(given) == 0, capsys.readouterr().err
    for there in (True, False):
        if not there:
            picture.unlink()
        before = (tmp_path / "words.json").read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(words, "spread", appears)
            assert words.main(given) == 2
        assert "`--picture` must stay as it is while this runs" in capsys.readouterr().err
        assert (tmp_path / "words.json").read_bytes() == before and picture.exists()
    assert words.main(given) == 0


def test_a_full_disk_names_the_picture(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(style, "encoded", full)
    monkeypatch.setattr(RunRecords, "best", lambda *_, **__: [])
    monkeypatch.setattr(RunRecords, "sweep", lambda *_, **__: [])
    assert words.main(["--output", str(tmp_path / "words.json"), "--picture", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert "`--picture` must be on a disk that has room for it" in error and not list(tmp_path.iterdir())


@pytest.mark.full
def test_words_are_learned_by_all_learners(tmp_path):
    shape = {"steps": 2, "batch": 4, "length": 3, "longer": 5, "hidden_size": 16, "layers": 1, "heads": 2}
    files = {"output": tmp_path / "words.json", "picture": tmp_path / "words.png"}
    options = words.Options(groups=["S3", "SO(2) steps"], seeds=1, **shape, **files)
    runs = words.run(options)
    assert options.picture.read_bytes().startswith(b"\x89PNG")
    assert len({(run["group"], run["learner"], run["rate"]) for run in runs}) == len(runs)
    assert 2 * 3 <= len(runs) / len(words.LEARNERS) <= 2 * (3 + words.FURTHER)
    of = {run["learner"]: run for run in runs if run["group"] == "S3"}
    assert all(len(run["accuracy"]) == options.longer for run in runs)
    assert of["RiGPT, symmetry"]["symmetry_error_max"] < 1e-3 < 0.01 < of["RiGPT"]["symmetry_error_max"]
    assert of["RiGPT, symmetry"]["free_parameters"] < of["RiGPT"]["parameters"] <= of[words.WIDE]["free_parameters"]


def test_the_wide_one_is_no_wider_than_it_must_be():
    _, renaming = words.problem("octahedral")
    sizes = Sizes(32, 2, 2, 9)
    width = words.width_of_as_many(25, sizes, renaming)

    def free(hidden_size):
        model = make_model(Learner(), 25, Sizes(hidden_size, 2, 2, 9), seed=0)
        resting = words.LEARNERS[words.WIDE].resting
        return Representation.choose(model.config, renaming, resting=resting).free_parameters(model)

    goal = make_model(Learner(), 25, sizes, seed=0).num_parameters()
    assert width > 32 and free(width - 4) < goal <= free(width)


def test_renamed_words_have_renamed_products():
    for group in words.GROUPS:
        table, renaming = words.problem(group)
        assert renaming.order > 1
        for row in renaming.permutations[:, : len(table)].numpy():
            assert (row[table] == table[row[:, None], row]).all()
        wrong = np.roll(np.arange(len(table)), 1)
        assert not (wrong[table] == table[wrong[:, None], wrong]).all()


@pytest.mark.full
def test_sums_and_products_are_learned_from_a_share_of_them(tmp_path):
    shape = {"steps": 40, "batch": 16, "hidden_size": 16, "layers": 1, "heads": 2, "prime": 7}
    files = {"output": tmp_path / "modular.json", "picture": tmp_path / "modular.png"}
    options = modular.Options(tasks=["sums"], shares=[0.5, 0.8], seeds=1, **shape, **files)
    runs = modular.run(options)
    assert options.picture.read_bytes().startswith(b"\x89PNG")
    assert 3 + 1 <= len(runs) / len(modular.LEARNERS) <= 3 + modular.FURTHER + 1
    # Rates are swept at the first share alone.
    assert sum(run["share"] == 0.8 for run in runs) == len(modular.LEARNERS)
    of = {name: [run for run in runs if run["learner"] == name] for name in modular.LEARNERS}
    assert all(run["symmetry_error_max"] < 1e-3 for run in of["RiGPT, symmetry"])
    assert all(run["symmetry_error_max"] > 0.05 for run in of["RiGPT"])
    assert max(run["train_accuracy"] for run in runs) > 0.5


@pytest.mark.parametrize("task", modular.TASKS)
def test_renamed_pairs_have_renamed_results(task):
    symmetry = modular.renaming(task, 13)
    ids, _ = modular.examples(task, 13)
    known = {tuple(row) for row in ids.tolist()}
    assert len(known) == 13**2 and symmetry.order == {"sums": 12, "products": 4}[task]
    for row in symmetry.permutations:
        assert {tuple(one) for one in row[ids].tolist()} == known
    assert {tuple(one) for one in ids.add(1).remainder(13).tolist()} != known
    parts = modular.split(len(ids), 0.3, seed=0)
    assert sorted(int(one) for part in parts for one in part) == list(range(len(ids))) and len(parts[0]) == 51


@pytest.mark.full
def test_a_symmetry_is_looked_for_along_the_training(tmp_path):
    shape = {"steps": 64, "batch": 16, "length": 3, "hidden_size": 16, "layers": 1, "heads": 2}
    files = {"output": tmp_path / "found.json", "picture": tmp_path / "found.png"}
    options = found.Options(groups=["S3"], seeds=1, **shape, **files)
    runs = found.run(options)
    assert options.picture.read_bytes().startswith(b"\x89PNG") and len(runs) == len(found.LEARNERS)
    for run in runs:
        assert [one["step"] for one in run["measured"]] == [0, 2, 4, 8, 16, 32, 64]
        for one in run["measured"]:
            assert all(0 < one[of]["weights"] < 1.5 and one[of]["function_mean"] > 0 for of in ("symmetry", "control"))
    table, symmetry = words.problem("S3")
    row = found.control(table, symmetry, seed=0).permutations[0, :6].numpy()
    assert sorted(row) == list(range(6)) and (row[table] != table[row[:, None], row]).any()


def test_a_best_rate_at_the_edge_is_left_for_further_ones(tmp_path):
    records = RunRecords(tmp_path / "runs.json", "test", {})

    def make(rate, seed):
        return {"loss": abs(math.log(rate / 0.02))}

    best = records.sweep(make, (0.001, 0.002, 0.004), "loss", 2, further=5, of="low")
    assert [run["rate"] for run in best] == [0.016] * 2
    assert records.sweep(make, (0.001, 0.002, 0.004), "loss", 2, further=5, of="low") == best, "also when it goes on"
    assert sorted(run["rate"] for run in records.done(seed=0)) == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
    assert records.sweep(make, (0.001, 0.002, 0.004), "loss", 1, further=1, of="short")[0]["rate"] == 0.008
    assert records.sweep(make, (0.04, 0.08), "loss", 1, further=5, of="high")[0]["rate"] == 0.02
    assert records.sweep(make, (0.5,), "loss", 1, further=5, of="one")[0]["rate"] == 0.5


def test_a_rate_that_diverges_is_never_the_best(tmp_path):
    nan, records = math.nan, RunRecords(tmp_path / "runs.json", "test", {})
    for diverged in (nan, math.inf):
        losses = {1.0: diverged, 2.0: 3.0, 4.0: 2.0, 8.0: diverged}
        made = partial(lambda losses, rate, seed: {"loss": losses[rate], "rate": rate}, losses)
        assert [run["rate"] for run in sweep(made, list(losses), 2, "loss")[1]] == [4.0, 4.0]
        assert [run["rate"] for run in records.sweep(made, list(losses), "loss", 2, of=str(diverged))] == [4.0, 4.0]
        assert min(losses.values(), key=ranked) == 2.0
        for one in (sweep, partial(records.sweep, of=f"none {diverged}")):
            rates = {"rates": [1.0, 8.0], "loss": "loss", "seeds": 1}
            with pytest.raises(ValueError, match=f"`rates` must have one at which training does not.*{diverged}, "):
                one(made, **rates)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if place else ()) for place, name in enumerate(scan.OTHERS)]
)
@pytest.mark.full
def test_other_carriers_keep_the_symmetry(name):
    small = {"steps": 30, "longest": 4, "hidden_size": 32, "layers": 2, "heads": 2, "splits": ["add-jump"]}
    run = scan.run_one(scan.Options(only=name, **small), "add-jump", name, lambda step, loss: None, 3e-3, 0)
    assert run["distance"] < 1e-6 and run["symmetry_error_max"] < 1e-3
    assert run["free_parameters"] < run["parameters"] / 2


def test_a_stock_model_whose_gains_differ_inside_an_orbit_has_no_symmetry():
    symmetry = scan.symmetries()[scan.BOTH]
    model = make_model(Learner("stock-gpt2"), symmetry.vocab_size, Sizes(32, 2, 2, 12), seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    keeper = StockSymmetry(model, symmetry, resting=0.25)
    ids = torch.randint(symmetry.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    assert keeper.distance(model) > 0.1 and symmetry_error(model, symmetry, ids).max > 0.1
    keeper.begin_(None)
    assert keeper.distance(model) < 1e-15 and symmetry_error(model, symmetry, ids).max < 1e-11
    with torch.no_grad():
        model.transformer.ln_f.weight[-1] += 1.0
    assert keeper.distance(model) > 1e-3 and symmetry_error(model, symmetry, ids).max > 1e-3


SCALE = [(0.0, 60), (0.0, 48), (1.0, 62), (1.25, 64), (9.0, 65)]


def test_chorales_are_onsets_and_pitch_classes():
    time = chorales.PITCHES - 1  # of a step of one sixteenth, less one
    tokens = [chorales.START, time + 1, 0, 0, time + 4, 2, time + 1, 4, time + 16, 5]
    assert chorales.encode(SCALE) == tokens
    symmetry = chorales.transposition()
    higher = chorales.encode([(onset, pitch + 1) for onset, pitch in SCALE])
    assert symmetry.order == 12 and symmetry.permutations[0][tokens].tolist() == higher
    assert chorales.windows([list(range(7)), list(range(3))], 3).tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


@pytest.mark.full
def test_chorales_are_learned_from_others(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    pieces = [[(n / 4, 48 + key + 2 * (n % 5)) for n in range(40)] for key in draw.integers(12, size=30)]
    monkeypatch.setattr(chorales, "corpus", lambda count: pieces[:count])
    shape = {"steps": 60, "batch": 8, "window": 16, "hidden_size": 32, "layers": 1, "heads": 2, "chorales": 20}
    files = {"output": tmp_path / "chorales.json", "picture": tmp_path / "chorales.png"}
    options = chorales.Options(only="RiGPT;RiGPT, symmetry", seeds=1, **shape, **files)
    runs = sorted(chorales.run(options), key=lambda run: -run["test_loss"])
    of = {run["learner"]: run for run in runs}  # the best rate of each
    assert options.picture.read_bytes().startswith(b"\x89PNG")
    assert of["RiGPT, symmetry"]["symmetry_error_max"] < 1e-3 < of["RiGPT"]["symmetry_error_max"]
    # Few of the keys were heard.
    assert of["RiGPT, symmetry"]["test_loss"] < min(math.log(12) - 0.2, of["RiGPT"]["test_loss"])


@pytest.mark.full
def test_blocks_are_timed_beside_full_maps(tmp_path, monkeypatch, capsys):
    passed, take_turns = [], blocks.take_turns

    def watched(actions, turns, **options):
        passed.append({name: action.args[0] for name, action in actions.items()})
        return take_turns(actions, turns, **options)

    monkeypatch.setattr(blocks, "take_turns", watched)
    shape = {"widths": [32], "head_dim": 8, "layers": 1, "rows": 2, "length": 6, "turns": 3}
    options = blocks.Options(**shape, output=tmp_path / "blocks.json")
    runs = blocks.run(options)
    assert len(runs) == 4 == len({(run["group"], run["kind"]) for run in runs}) and len(passed) == 8
    for run in runs:
        assert run["difference"] < SYMMETRY[torch.float64] and run["numbers_blocks"] < run["numbers_full"]
        assert all(len(turns) == 3 and min(turns) > 0 for name in blocks.TIMED for turns in run[name].values())
    for models in passed:
        assert not any(isinstance(module, BlockLinear) for module in models["full"].modules())
        assert any(isinstance(module, BlockLinear) for module in models["blocks"].modules())
    assert "octahedral" in capsys.readouterr().out
    assert blocks.faster({"full": [2.0, 4.0, 6.0], "blocks": [1.0, 1.0, 1.0]}) == "4.00 (2.00 to 6.00)"
    with pytest.raises(ValueError, match="`widths` must be multiples of 64, got \\[100\\]"):
        blocks.Options(widths=[100])
