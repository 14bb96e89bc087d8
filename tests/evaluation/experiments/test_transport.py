"""The experiment on transport, small: it runs, what it writes is complete, and what is exact is exact in it."""

import json

import pytest
import torch

from tests.tolerances import SYMMETRY


pytest.importorskip("peft")
from evaluation.experiments.transport import (
    AS_IT_IS,
    CARRIED,
    FITTED,
    KNOWN,
    OTHER,
    OWN,
    TUNED,
    Options,
    explained,
    learn_features,
    main,
    run,
)


SMALL = {
    "runs": 1,
    "hidden_size": 16,
    "vocabulary": 270,
    "context": 16,
    "batch": 8,
    "layers": 2,
    "steps": 24,
    "tuning_steps": 4,
    "tuning_rate": 1e-4,
    "rank": 2,
    "adapter_steps": 8,
    "features": 32,
    "feature_steps": 60,
    "learning_rate": 2e-2,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("transport")
    passage = "The cat sat on the mat {i}. A dog, number {i}, looked at the cat and thought of {j} bones.\n\n"
    (place / "text.txt").write_text("".join(passage.format(i=i, j=i * 7 % 13) for i in range(300)))
    return place / "out", run(Options(text=place / "text.txt", output=place / "out", **SMALL))


@pytest.mark.full
def test_the_folder_holds_the_results(made):
    output, results = made
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results, default=str))
    assert results["options"] | SMALL == results["options"] and results["hook"] == "blocks.0.hook_resid_post"
    assert set(results["summary"]) == {"A", TUNED, OTHER} and results["text"] == "text.txt"


@pytest.mark.full
def test_what_is_carried_to_the_disguised_does_what_it_did_before_the_disguise(made):
    """After so little tuning B is nearly A, and its disguise changes nothing that is carried through it."""
    (one,) = made[1]["runs"]
    assert 0 < one["tuned_change"] < 0.01
    tuned, a = one[TUNED], one["A"]
    assert tuned["loss"][KNOWN] == pytest.approx(a["loss"][OWN], rel=0.01)
    assert tuned["loss"][CARRIED] == pytest.approx(tuned["loss"][KNOWN], rel=0.01)
    assert tuned["explained_variance"][CARRIED] == pytest.approx(a["explained_variance"][OWN], abs=0.01)
    assert tuned["loss"][AS_IT_IS] > tuned["loss"][KNOWN] + 0.01
    for measured in (tuned, one[OTHER]):
        assert measured["explained_variance"][AS_IT_IS] < measured["explained_variance"][FITTED] - 0.1
        assert measured["explained_variance"][AS_IT_IS] < measured["explained_variance"][OWN] - 0.1


def test_an_autoencoder_of_states_that_it_can_hold_explains_them():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) + 2.0
    options = Options(features=16, feature_steps=400, sparsity=0.0)
    state = learn_features(x, options, 0)
    assert 0.98 < explained(state, x) <= 1
    worthless = {name: torch.zeros_like(tensor) for name, tensor in state.items()} | {"b_dec": x.mean(dim=0)}
    assert abs(explained(worthless, x)) <= SYMMETRY[torch.float32]


def test_the_program_explains_itself_and_refuses_bad_options(capsys, tmp_path):
    assert main(["--help"]) == 0 and "python -m evaluation.experiments.transport" in capsys.readouterr().out
    for words, said in (
        (["--hidden-size", "7", "--heads", "3"], "`--hidden-size` must be a multiple of `--heads`, got 7 and 3"),
        (["--feature-steps", "1"], "`--feature-steps` must be at least 2"),
        (["--vocabulary", "256"], "`--vocabulary` must be more than"),
    ):
        assert main([*words, "--output", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
