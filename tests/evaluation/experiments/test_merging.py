"""The experiment on barriers, small: it runs, what it writes is complete, and its permutations are permutations."""

import json
import shutil

import pytest
import torch
from torch import nn

from evaluation.experiments.merging import ALIGNED, LEARNED, PERMUTED, UNALIGNED, Options, main, permuted_mean, run
from rigpt_hf.symmetry import GaugeTransformation
from tests.models import tiny_config, tiny_model
from tests.tolerances import SYMMETRY


SMALL = {
    "pairs": 2,
    "hidden_size": 16,
    "vocabulary": 270,
    "context": 16,
    "batch": 8,
    "layers": 1,
    "steps": 24,
    "learning_rate": 2e-2,
    "learn": 6,
    "points": 3,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    passage = "The cat sat on the mat {i}. A dog, number {i}, looked at the cat and thought of {j} bones.\n\n"
    path.write_text("".join(passage.format(i=i, j=i * 7 % 13) for i in range(400)))
    return path


@pytest.fixture(scope="module")
def made(text):
    output = text.parent / "out"
    return output, run(Options(text=text, output=output, **SMALL))


@pytest.mark.full
def test_the_folder_holds_the_results_and_a_picture(made):
    output, results = made
    assert sorted(path.name for path in output.glob("[!.]*")) == ["paths.png", "results.json"]
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results, default=str))
    assert (output / "paths.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in output.parent.glob(".*.partial")] == []


@pytest.mark.full
def test_the_results_say_how_they_came_about(made):
    _, results = made
    assert results["options"] | SMALL == results["options"]
    assert set(results["versions"]) == {"rigpt_hf", "torch", "transformers"}
    assert results["text"] == "text.txt" and results["unit"] == "nats per token"
    assert results["training_tokens"] > results["held_out_tokens"] >= 4 * SMALL["context"]


@pytest.mark.full
def test_every_pair_is_measured_and_summarised(made):
    _, results = made
    check_pairs(results["pairs"], results["summary"])
    longer = results["twice_the_steps"]
    check_pairs(longer["pairs"], longer["summary"])
    for once, twice in zip(results["pairs"], longer["pairs"], strict=True):
        assert sum(twice["losses"]) < sum(once["losses"])


def check_pairs(pairs, summary):
    assert [pair["seeds"] for pair in pairs] == [(0, 1), (2, 3)]
    for pair in pairs:
        assert pair["losses"][0] != pair["losses"][1], "both models are one"
        path, middle = pair["path"], pair["merged"]["linear"]
        assert path["t"] == [0.0, 0.5, 1.0]
        assert path["before"][1] == pytest.approx(middle[UNALIGNED], rel=SYMMETRY[torch.float32])
        assert path["after"][1] == pytest.approx(middle[ALIGNED], rel=SYMMETRY[torch.float32])
        assert path["learned"][1] == pytest.approx(middle[LEARNED], rel=SYMMETRY[torch.float32])
        assert path["learned"][1] != path["after"][1], "nothing was learned"
        assert path["before"][::2] == pytest.approx(pair["losses"][::-1], rel=SYMMETRY[torch.float32])
        assert path["learned"][::2] == pytest.approx(pair["losses"][::-1], rel=SYMMETRY[torch.float32])
        assert path["after"][::2] == pytest.approx(pair["losses"][::-1], rel=SYMMETRY[torch.float32])
        assert set(pair["merged"]["spherical"]) == {UNALIGNED, PERMUTED, ALIGNED, LEARNED}
        assert pair["barrier_kept"] == path["barrier_after"] / path["barrier_before"]
        assert pair["barrier_kept_learned"] == path["barrier_learned"] / path["barrier_before"]
        assert path["barrier_after"] < path["barrier_before"]
    kept = [pair["barrier_kept"] for pair in pairs]
    assert summary["barrier_kept"]["mean"] == pytest.approx(sum(kept) / 2)
    assert summary["barrier_kept"]["least"] == min(kept) and summary["barrier_kept"]["most"] == max(kept)


@pytest.mark.full
def test_it_can_be_repeated(made, text, tmp_path):
    again = run(Options(text=text, output=tmp_path / "again", **SMALL | {"pairs": 1, "twice": False}))
    other = run(Options(text=text, output=tmp_path / "other", **SMALL | {"pairs": 1, "twice": False, "seed": 8}))
    assert "twice_the_steps" not in again
    assert again["pairs"] == made[1]["pairs"][:1]
    assert other["pairs"][0]["losses"] != again["pairs"][0]["losses"]


def test_what_is_somebody_elses_is_left_alone(text, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="`output` can be replaced only if all in it was written by"):
        run(Options(text=text, output=tmp_path, force=True, **SMALL))


def test_impossible_options_are_refused():
    for options, message in (
        ({"pairs": 0}, "`pairs` must be at least 1, got 0"),
        ({"learn": 0}, "`learn` must be at least 1, got 0"),
        ({"points": 1}, "`points` must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0.0"),
        ({"vocabulary": 100}, "`vocabulary` must be more than the 256 bytes and at most 1,048,576, got 100"),
        ({"activation": "tanh"}, "`hidden_act` must be one of .*, got 'tanh'"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**options)


@pytest.mark.full
def test_the_command_teaches_and_replaces_nothing_without_force(made, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--weight-decay" in shown and "independently trained" in shown
    assert main(["--pairs", "0"]) == 2 and "`--pairs` must be at least 1" in capsys.readouterr().err
    output = shutil.copytree(made[0], tmp_path / "out")
    before = (output / "results.json").read_bytes()
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | {"pairs": 1, "steps": 2}).items()]
    words += ["--no-twice"]
    words += [f"--text={text}", f"--output={output}"]
    assert main(words) == 2 and "`--output` must be empty or absent" in (said := capsys.readouterr().err)
    assert "or pass `--force` to replace it" in said and (output / "results.json").read_bytes() == before
    assert main([*words, "--force"]) == 0
    assert (output / "results.json").read_bytes() != before


def only_permuting(seed: int = 0) -> GaugeTransformation:
    """A random transformation that exchanges dimensions, heads and neurons, and turns nothing."""
    generator = torch.Generator().manual_seed(seed)
    g = GaugeTransformation.random(tiny_config(), generator, ["stream", "head_vo", "heads", "neurons"])
    for key, frame, element in list(g.items()):
        if not frame.group.exchanges:
            size = element.shape[-1]
            orders = [torch.randperm(size, generator=generator) for _ in element]
            g.elements[str(key)] = torch.stack([torch.eye(size, dtype=torch.float64)[order] for order in orders])
    return g


def test_permutations_alone_undo_permutations_and_no_rotation():
    model = tiny_model()

    @torch.no_grad()
    def difference(other: nn.Module) -> float:
        pairs = zip(permuted_mean(other, model, "linear").parameters(), model.parameters(), strict=True)
        return max(float((mean - own).abs().max() / own.abs().max()) for mean, own in pairs)

    assert difference(only_permuting()(model)) <= SYMMETRY[torch.float64]
    rotation = GaugeTransformation.random(model.config, torch.Generator().manual_seed(1), ["stream"])
    assert difference(rotation(model)) > 0.1
