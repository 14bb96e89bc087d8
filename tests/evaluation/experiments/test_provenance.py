"""The experiment on provenance, small: what is made from a model is what it says, and so are rates and intervals."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation.experiments.provenance import derive as derivations
from evaluation.experiments.provenance import models as zoo_models
from evaluation.experiments.provenance.derive import (
    DERIVATIONS,
    derive,
    disguise,
    disturbed,
    relative_change,
    rounded,
    with_weights,
    without_heads,
    without_layers,
    without_neurons,
    without_smallest,
)
from evaluation.experiments.provenance.models import (
    CODE,
    DOCUMENTATION,
    ROLES,
    SHAPES,
    SIZES,
    Base,
    Size,
    Zoo,
    bases,
    independent_pairs,
    relation,
)
from evaluation.experiments.provenance.pairs import Measurements, Pair, Specimen, pairs_with
from evaluation.experiments.provenance.program import Options, main, run
from evaluation.experiments.provenance.rates import (
    MAY_BE_MISSED,
    Scored,
    auc,
    auc_interval,
    choose_threshold,
    cross_verdicts,
    multiplicities,
    rate,
    rates_by_distance,
    roc,
    upper_bound,
)
from evaluation.experiments.provenance.statistics import STATISTICS, stored_matrices
from tests.tolerances import NOISE, SYMMETRY


TINY = Size(32, 3, 4, 12, 2e-2)
SETTINGS = {"vocabulary": 270, "context": 16, "batch": 4}
CHEAP = ("full-short", "lora-short", "four-bits", "layers", "merged-relative", "continued", "noise-30")
REPORTED = ("full-short", "four-bits", "layers", "noise-30")
SHAPE_NAMES = list(SHAPES)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    passage = "The cat sat on the mat {i}. A dog, number {i}, looked at the cat and thought of {j} bones.\n\n"
    path.write_text("".join(passage.format(i=i, j=i * 7 % 13) for i in range(400)))
    return path


@pytest.fixture(scope="module")
def tiny():
    """Small models, and few ways to make others from them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo_models, "SIZES", {"small": TINY})
        for name in set(DERIVATIONS) - set(CHEAP):
            patch.delitem(DERIVATIONS, name)
        yield


@pytest.fixture(scope="module")
def zoo(tiny, text):
    return Zoo(text.parent / "zoo", text, **SETTINGS, steps=1.0)


def made(shape: str, dtype: torch.dtype = torch.float64):
    """A model whose gains are not 1 and whose biases are not 0."""
    torch.manual_seed(0)
    model = SHAPES[shape](TINY, SETTINGS["vocabulary"], SETTINGS["context"]).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def difference(a, b) -> float:
    ids = torch.randint(SETTINGS["vocabulary"], (2, 12), generator=torch.Generator().manual_seed(0))
    first, second = (model(ids, use_cache=False).logits for model in (a, b))
    return float((first - second).abs().max() / first.abs().max())


def test_base_models_have_random_weights_of_their_own():
    models = bases(list(SIZES), SHAPE_NAMES)
    assert len(models) == len(SIZES) * len(SHAPES) * len(ROLES)
    assert len({model.seed for model in models}) == len(models)
    for model in models:
        assert model.teacher is None or model.teacher.half == model.half
        assert model not in (model.stranger, model.bystander) and model.stranger != model.bystander
        assert model.stranger.half == model.bystander.half == model.half
    pairs = list(independent_pairs(models))
    assert len(pairs) >= 150 and all(a != b for a, b in pairs)
    kinds = {relation(a, b) for a, b in pairs}
    assert kinds == {"another size or shape", "distilled", "other data", "other seed"}
    first = [Base("small", "llama", index) for index in range(len(ROLES))]
    assert [relation(first[0], first[index]) for index in (1, 3, 4)] == ["other seed", "other data", "distilled"]
    assert relation(first[4], first[6]) == "distilled" and first[4].teacher == first[6].teacher


def test_models_are_trained_once_and_learn(zoo, monkeypatch):
    first, second, student = (zoo.base(Base("small", "llama", index)) for index in (0, 1, 4))
    facts = json.loads((zoo.cache / "small-llama-0" / "facts.json").read_text())
    assert facts["loss"] < facts["first"] and facts["steps"] == TINY.steps
    weights = [
        dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"] for model in (first, second, student)
    ]
    for other in weights[1:]:
        cosine = torch.cosine_similarity(weights[0].flatten(), other.flatten(), dim=0)
        assert abs(cosine) < 5 / math.sqrt(other.numel()), "the two began alike"
    monkeypatch.setattr(Zoo, "train", None)
    again = zoo.base(Base("small", "llama", 0))
    assert difference(first, again) == 0.0 and difference(first, second) > 0.1
    assert {CODE, DOCUMENTATION} < set(zoo.rows)
    with pytest.raises(ValueError, match="`cache` must be of a zoo with the same settings, got .*'steps': 1.0"):
        Zoo(zoo.cache, None, **SETTINGS, steps=2.0)


@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_a_disguise_keeps_the_function_and_no_matrix(shape):
    model = made(shape)
    turned = disguise(model, 3)
    assert type(turned) is type(model)
    assert difference(model, turned) <= SYMMETRY[torch.float32]  # in which a Llama has its norms
    before, after = stored_matrices(model), stored_matrices(turned)
    looked = 0
    for name in before:
        if "layers" in name and before[name].shape == after[name].shape:
            change = (before[name] - after[name]).norm() / before[name].norm()
            assert change > 0.5, name
            looked += 1
    assert looked >= 6 * TINY.layers
    noisy = with_weights(model, lambda matrix: disturbed(matrix, 0.3, torch.Generator().manual_seed(0)))
    assert difference(model, noisy) > 1e-3  # what is no disguise is seen


def test_matrices_are_rounded_pruned_and_disturbed_as_much_as_is_said():
    matrix = torch.randn(12, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = rounded(matrix, 4).view(-1, derivations.GROUP)
    assert all(len(group.unique()) <= 15 for group in groups) and max(len(group.unique()) for group in groups) > 8
    errors = [float((rounded(matrix, bits) - matrix).norm() / matrix.norm()) for bits in (8, 4)]
    assert errors[0] < 0.01 < errors[1] < 0.15
    assert torch.equal(rounded(rounded(matrix, 8), 8), rounded(matrix, 8))
    for share in (0.1, 0.5):
        pruned = without_smallest(matrix, share)
        assert int((pruned == 0).sum()) == round(share * matrix.numel())
        kept = pruned != 0
        assert torch.equal(pruned[kept], matrix[kept]) and matrix[~kept].abs().max() < matrix[kept].abs().min()
    noisy = disturbed(matrix, 0.3, torch.Generator().manual_seed(0))
    assert float((noisy - matrix).norm() / matrix.norm()) == pytest.approx(0.3, rel=SYMMETRY[torch.float64])


@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_what_is_removed_was_the_least(shape):
    model = made(shape)
    anatomy = derivations.ANATOMIES[model.config.model_type]
    size = sum(parameter.numel() for parameter in model.parameters())
    for smaller, axes, kept in (
        (without_neurons(model, 0.25), anatomy.neurons, 0.75),
        (without_heads(model, 0.5), anatomy.heads, 0.5),
    ):
        name, axis = next((n, axes[n]) for n in axes if any(key.endswith(f"{n}.weight") for key in model.state_dict()))
        own, left = (
            next(t for k, t in m.state_dict().items() if k.endswith(f"0.{name}.weight")) for m in (model, smaller)
        )
        if axes is anatomy.heads and not anatomy.head_fields:
            assert left.shape == own.shape
            assert int((left.movedim(axis, 0).flatten(1) == 0).all(1).sum()) == own.shape[axis] * (1 - kept)
        else:
            assert left.shape[axis] == own.shape[axis] * kept
            assert sum(parameter.numel() for parameter in smaller.parameters()) < size
        assert difference(model, smaller) > 1e-3
    shorter = without_layers(model, 1)
    names = [key for key in model.state_dict() if ".2." in key]
    assert names and all(
        torch.equal(model.state_dict()[key], shorter.state_dict()[key.replace(".2.", ".1.")]) for key in names
    )
    assert not any(".2." in key for key in shorter.state_dict())


def test_neurons_that_do_nothing_are_the_first_to_go():
    model = made("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::4] = 0
    assert difference(model, without_neurons(model, 0.25)) <= SYMMETRY[torch.float32]
    assert difference(model, without_neurons(model, 0.5)) > 1e-3


@pytest.mark.full
def test_derivations_of_a_trained_model_change_it_as_they_say(zoo):
    base = Base("small", "rigpt", 0)
    model = zoo.base(base)
    change = {name: relative_change(model, derive(zoo, base, name)) for name in CHEAP}
    assert change.pop("layers") is None
    assert change["noise-30"] == pytest.approx(0.3, rel=NOISE)
    assert 0 < change["merged-relative"] < change["continued"]
    assert change["merged-relative"] == pytest.approx((1 - derivations.SHARE) * change["continued"], rel=NOISE)
    assert all(value > 1e-4 for value in change.values())
    assert relative_change(model, model) == 0.0
    assert not any("lora" in name for name, _ in derive(zoo, base, "lora-short").named_parameters())
    assert (zoo.cache / f"{base.name}.full-short").is_dir() and not (zoo.cache / f"{base.name}.four-bits").exists()


def test_pairs_are_of_the_kind_that_they_are_called(tiny):
    models = bases(["small"], ["llama"])
    parts = pairs_with(models[1], models, sources=2)
    assert [pair.a.index for pair in parts["independent"]] == [0] and all(p.independent for p in parts["independent"])
    derived = [pair for pair in parts["derived"] if not pair.independent]
    assert len(derived) == 1 + 2 * len(CHEAP) == len(parts["derived"]) / 2
    assert {pair.a for pair in derived} == {models[1]}
    assert len({pair.name for pair in parts["derived"]}) == len(parts["derived"])
    # Nothing of the model that it is held against is in a merged one.
    assert all(pair.a not in (pair.b.base, pair.b.base.stranger) for pair in parts["derived"] if pair.independent)
    assert "derived" not in pairs_with(models[2], models, sources=2)
    pair = Pair(models[1], Specimen(models[1], "layers", disguised=True))
    assert pair.b.name == "small-llama-1.layers.disguised"
    assert pair.scored(0.5).half == 1 and pair.scored(None).score == -math.inf


@pytest.mark.parametrize("name", list(STATISTICS))
@pytest.mark.by_default(2)
def test_statistics_find_a_model_itself_and_not_another(name):
    statistic = STATISTICS[name]
    for shape in ["llama"] if name == "alignment" else SHAPE_NAMES:  # alignment looks at converted models alone
        model, other = made(shape, torch.float32), SHAPES[shape](TINY, SETTINGS["vocabulary"], SETTINGS["context"])
        noisy = with_weights(model, lambda matrix: disturbed(matrix, 0.1, torch.Generator().manual_seed(0)))
        itself, near, far = (statistic(model, one) for one in (model, noisy, other))
        assert itself == pytest.approx(1.0, abs=SYMMETRY[torch.float32])
        assert itself > near > far


@torch.no_grad()
def test_awm_sees_through_permutations_signs_and_heads_and_through_no_rotation():
    model = made("llama")
    generator = torch.Generator().manual_seed(0)
    size = TINY.hidden_size
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0).double()
    order = torch.randperm(size, generator=generator)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]

    def turned(change):
        sides = dict(stored_matrices(model))
        for key, matrix in sides.items():
            if key.endswith(("q_proj", "k_proj", "embed_tokens")):
                sides[key] = change(matrix)
            if key.endswith(("q_proj", "k_proj")):
                sides[key] = rotation @ sides[key]
        return sides

    likeness = STATISTICS["AWM"].likeness
    own = stored_matrices(model)
    assert likeness(own, turned(lambda m: m[:, order] * signs)) == pytest.approx(1.0, abs=SYMMETRY[torch.float64])
    assert likeness(own, turned(lambda m: m @ rotation)) < 0.5


def test_unbiased_alignment_is_that_of_the_paper():
    """Song et al.: the estimate by its own sums, not by centred kernels."""
    from evaluation.experiments.provenance.statistics import _alignment, _centred

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    kernels = [side @ side.T for side in (x, y)]

    def estimate(k, m):
        k, m = (one - one.diag().diag() for one in (k, m))
        n, ones = len(k), torch.ones(len(k), dtype=torch.float64)
        mixed = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones @ k @ m @ ones)
        return float(((k @ m).trace() + mixed) / (n * (n - 3)))

    wanted = estimate(*kernels) / math.sqrt(estimate(kernels[0], kernels[0]) * estimate(kernels[1], kernels[1]))
    assert _alignment(*map(_centred, kernels)) == pytest.approx(wanted, rel=SYMMETRY[torch.float64])


def pair(a: int, b: int, likeness: float | None, **changes) -> Scored:
    """Models with even numbers are in one half, those with odd ones in the other."""
    return replace(Scored((f"m{a}", f"m{b}"), (a % 2, b % 2), a != b, "noise", "0.3", False, likeness), **changes)


def test_auc_of_known_sets():
    assert auc([3, 4], [1, 2]) == 1.0 and auc([1, 2], [3, 4]) == 0.0
    assert auc([1, 3], [2, 4]) == 0.25 and auc([1, 1], [1, 1]) == 0.5
    assert auc([-math.inf, 3], [-math.inf, 2]) == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert math.isnan(auc([], [1.0]))
    # To count a pair twice is to have it twice.
    assert auc([1, 3], [2, 4], (np.array([1, 2]), np.array([3, 1]))) == auc([1, 3, 3], [2, 2, 2, 4])
    points = roc([3, 4], [1, 3])
    assert points == [(4.0, 0.0, 0.5), (3.0, 0.5, 1.0), (1.0, 1.0, 1.0)]


def test_intervals_know_which_pairs_share_a_model():
    draw = np.random.default_rng(0)
    apart = [pair(2 * i, 2 * i + 1, float(value)) for i, value in enumerate(draw.normal(size=60))]
    # The same numbers, all with one of four models, each of which moves its pairs together.
    crowd = [pair(i % 4, 10 + i, one.likeness + 2 * (i % 4), kind="noise") for i, one in enumerate(apart)]
    derived = [pair(i, i, 1.0) for i in (0, 1, 2, 3)]
    widths = [each.high - each.low for each in (auc_interval(derived, apart), auc_interval(derived, crowd))]
    assert 0 < widths[0] < widths[1]
    counts = multiplicities([pair(0, 1, 0.0), pair(0, 0, 0.0), pair(1, 0, 0.0)], resamples=200)
    assert np.array_equal(counts[:, 0], counts[:, 2]) and set(counts[:, 1]) == {0, 1, 2}
    assert np.array_equal(counts[:, 0], counts[:, 1] * (2 - counts[:, 1]))


def test_bounds_where_nothing_happened():
    assert upper_bound(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59)) and upper_bound(3, 3) == 1.0
    pairs = [pair(a, b, 0.0) for a in range(8) for b in range(a)]
    never, once = rate(pairs, [False] * 28), rate(pairs, [True] + [False] * 27)
    assert never.value == never.high == 0.0 and 0 < never.pairs_upper < never.apart_upper < 1
    assert (never.models, never.apart) == (8, 4) and never.apart_upper == pytest.approx(1 - 0.05 ** (1 / 4))
    assert rate([pair(a, a, 0.0) for a in range(8)], [False] * 8).apart == 8
    assert once.count == 1 and once.low <= once.value <= once.high
    assert (
        once.pairs_upper > never.pairs_upper
        and once.apart_upper > never.apart_upper
        and math.isnan(rate([], []).value)
    )


def test_a_threshold_of_one_half_is_reported_on_the_other():
    first = [pair(0, 2, 0.1), pair(0, 4, 0.3), pair(0, 0, 0.7), pair(2, 2, 0.2)]
    assert choose_threshold(first) == pytest.approx(0.3) and choose_threshold(first) > 0.3  # it accuses nobody
    second = [pair(1, 3, 0.6), pair(3, 5, None), pair(1, 1, 0.9), pair(3, 3, 0.4)]
    across = [pair(0, 1, 5.0)]
    found = cross_verdicts([*first, *second, *across])
    assert found.thresholds == pytest.approx((0.3, 0.6))
    assert (found.false_accusations.count, found.false_accusations.total) == (1, 4)
    (missed,) = found.missed.values()
    assert (missed.count, missed.total) == (1, 4)
    assert choose_threshold([pair(0, 2, 0.5)]) == math.inf
    assert choose_threshold([pair(0, 0, 0.4)]) == 0.4
    far = [pair(0, 0, index / 100) for index in range(100)]
    assert choose_threshold([*far, pair(0, 2, -1.0)]) == pytest.approx(MAY_BE_MISSED)


def test_rates_by_distance_are_those_of_the_pairs():
    pairs = [pair(0, 2, 0.1), pair(0, 4, 0.6), pair(1, 1, 0.9), pair(1, 1, 0.55, kind="cast"), pair(3, 3, None)]
    table = rates_by_distance(pairs, "it")
    at = table["distance"].index(0.4)
    assert table["independent"][at] == 0.5 and table["independent"][at - 1] == 0.0
    assert table["derived"]["noise"][table["distance"].index(0.11)] == 0.5 and table["derived"]["cast"][-1] == 1.0
    assert table["independent_upper"][0] > table["independent_upper_by_pair"][0] > 0
    assert table["derived_pairs"] == {"noise": 2, "cast": 1} and len(json.dumps(table)) < 20_000


@pytest.fixture(scope="module")
def report(tiny, text):
    folder = text.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small", TINY)
        for name in set(CHEAP) - set(REPORTED):
            patch.delitem(DERIVATIONS, name)
        options = Options(
            ["small"],
            ["llama"],
            ["raw spectra", "AWM"],
            text=text,
            cache=text.parent / "zoo",
            steps=1.0,
            output=folder / "it.json",
            picture=folder / "it.png",
            **SETTINGS,
        )
        yield options, run(options)


@pytest.mark.full
def test_the_results_hold_all_pairs_and_rates(report):
    options, results = report
    assert json.loads(options.output.read_text())["pairs"] == json.loads(json.dumps(results["pairs"]))
    assert options.picture.read_bytes().startswith(b"\x89PNG")
    derived = [each for each in results["pairs"] if not each["independent"]]
    assert len(derived) == 2 * (1 + 2 * len(REPORTED))
    assert len(results["pairs"]) == 2 * len(derived) + len(ROLES) * (len(ROLES) - 1) / 2
    for each in derived:
        assert each["change"] is None or each["change"] > 0
    assert any(each["change"] for each in derived)
    for name, each in results["statistics"].items():
        assert 0.5 < each["auc"]["value"] <= 1.0 and each["auc"]["low"] <= each["auc"]["value"] <= each["auc"]["high"]
        assert each["independent_pairs"] + each["auc"]["pairs"] == len(results["pairs"])
        kinds = {kind for kind in each["auc_by_kind"] if not kind.endswith("disguised")}
        assert each["cost_of_disguise"].keys() == kinds - {"disguised: all frames"} and kinds
        assert results["rates"][name]["independent_pairs"] == each["independent_pairs"]
    # A statistic that knows permutations of the stream, and no rotation of it, finds less after one.
    likeness = {disguised: [] for disguised in (False, True)}
    for each in derived:
        likeness[each["disguised"]].append(each["likeness"]["AWM"])
    assert max(likeness[True]) < 0.5 < max(likeness[False])


@pytest.mark.full
def test_what_was_measured_is_not_measured_again(report, monkeypatch):
    options, results = report
    monkeypatch.setattr(Measurements, "_of_base", None)
    monkeypatch.setattr(Zoo, "train", None)
    again = run(replace(options, force=True))
    assert again["pairs"] == results["pairs"]
    with pytest.raises(ValueError, match="`output`"):
        run(options)


def test_impossible_options_are_refused(capsys, monkeypatch):
    for options, message in (
        ({"sizes": ["huge"]}, "`sizes` must name some of small, large, got 'huge'"),
        ({"shapes": []}, "`shapes` must name some of gpt2, llama, rigpt, got none"),
        ({"statistics": ["luck"]}, "`statistics` must name some of raw spectra, .*, got 'luck'"),
        ({"sources": 1}, "`sources` must be at least 2, got 1"),
        ({"sources": 9}, "`sources` must be at most 8, got 9"),
        ({"steps": 0.0}, "`steps` must be positive, got 0.0"),
        ({"vocabulary": 100}, "`vocabulary` must be more than the 256 bytes and at most 1,048,576, got 100"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**options)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--help"]) == 0
    assert "--sources" in (shown := capsys.readouterr().out) and "independently" in shown
    assert main(["--sources", "1"]) == 2 and "`--sources` must be at least 2" in capsys.readouterr().err
