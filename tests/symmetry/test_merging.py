"""Merging after alignment: what an average of models is, and what it does to the loss."""

import copy
import itertools
import json
import math
from functools import cache

import pytest
import torch
from torch import nn

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.pictures import save
from rigpt_hf.pictures.symmetry import plot_paths
from rigpt_hf.symmetry import LossPath, gauge_distance, loss_path, merge
from rigpt_hf.symmetry.merging import average
from tests.models import SYMMETRIES, over, randomise_, tiny_model, tokens
from tests.symmetry.options import SEARCHED, SHALLOW, cases, difference, disguise
from tests.tolerances import SYMMETRY


methods = pytest.mark.parametrize("method", ["linear", "spherical"])


@torch.no_grad()
def functions_differ(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of logits, relative to the largest."""
    first, second = (model(tokens(2, 13), use_cache=False).logits for model in (a, b))
    return float((first - second).abs().max() / second.abs().max())


def relative(model: nn.Module) -> nn.Module:
    """A disguised relative: an alignment of the two needs only a few sweeps."""
    return disguise(randomise_(copy.deepcopy(model), seed=5, scale=0.1))


@over(SEARCHED, SYMMETRIES)
@pytest.mark.by_default(2)
def test_the_frames_that_models_come_in_do_not_matter(option):
    a = tiny_model(**SHALLOW[option])
    b = relative(a)
    merged = merge([a, b], (0.6, 0.4))
    in_others = merge([disguise(a, 3), disguise(b, 2)], (0.6, 0.4))
    assert difference(in_others, disguise(merged, 3)) <= SYMMETRY[torch.float64]
    plain, turned = (merge([a, other], (0.6, 0.4), aligned=False) for other in (b, disguise(b, 2)))
    assert functions_differ(plain, turned) > 0.1


def test_weights_at_the_ends_and_beyond():
    a = tiny_model(num_hidden_layers=2)
    b = relative(a)
    start, end, beyond = (merge([a, b], parts) for parts in ((1, 0), (0, 1), (2, -1)))
    assert difference(start, a) <= SYMMETRY[torch.float64]
    assert functions_differ(end, b) <= SYMMETRY[torch.float64]
    assert difference(end, b) > 0.1, "B has not been brought into the frames of A"
    assert functions_differ(a, b) > 0.1, "both ends are the same"
    for outer, parameter, other in zip(beyond.parameters(), a.parameters(), end.parameters(), strict=True):
        expected = 2 * parameter - other
        assert (outer - expected).abs().max() <= SYMMETRY[torch.float64] * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "method"),
    cases([("rotary-learned", "spherical")], [("learned-untied-projected", "linear"), ("squared-distance", "linear")]),
)
@pytest.mark.full
def test_unrelated_models_in_any_frames(name, method):
    """Where alignment has most to choose it still makes one choice, whatever the frames."""
    models, parts = [tiny_model(seed=seed, **SHALLOW[name]) for seed in (0, 9, 11)], (0.5, 0.2, 0.3)
    merged = merge(models, parts, method=method)
    others = [models[0], disguise(models[2], 3), disguise(models[1], 2)]
    assert difference(merge(others, (0.5, 0.3, 0.2), method=method), merged) <= SYMMETRY[torch.float64]
    assert difference(merge(models, (0.5, 0.3, 0.2), method=method), merged) > 1e-3, "the weights do nothing"


@methods
@pytest.mark.by_default(1)
def test_a_model_merged_with_its_disguises_is_itself(turned, method):
    model, other, _ = turned("learned-untied-projected")
    group = [model, other, disguise(model, 3)]
    assert difference(merge(group, method=method), model) <= SYMMETRY[torch.float64]
    assert functions_differ(merge(group, method=method, aligned=False), model) > 0.1


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_spherical_is_the_great_circle_of_directions_and_the_mean_of_norms(t):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 7, generator=generator, dtype=torch.float64) * scale for scale in (1.0, 3.0))
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    direction = (math.sin((1 - t) * angle) * a / a.norm() + math.sin(t * angle) * b / b.norm()) / math.sin(angle)
    expected = ((1 - t) * a.norm() + t * b.norm()) * direction
    found = average([{"w": a}, {"w": b}], [1 - t, t], "spherical")["w"]
    assert (found - expected).abs().max() <= SYMMETRY[torch.float64]
    straight = average([{"w": a}, {"w": b}], [1 - t, t], "linear")["w"]
    assert (straight - ((1 - t) * a + t * b)).abs().max() <= SYMMETRY[torch.float64]
    if 0 < t < 1:
        assert (found - straight).abs().max() > 0.1, "both methods give the same"


def test_the_spherical_mean_of_three():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    parts = [0.5, 0.2, 0.3]
    mean = average([{"w": tensor} for tensor in tensors], parts, "spherical")["w"]
    for order in ([1, 2, 0], [2, 1, 0], [0, 2, 1]):
        turned = average([{"w": tensors[i]} for i in order], [parts[i] for i in order], "spherical")["w"]
        assert (turned - mean).abs().max() <= SYMMETRY[torch.float64]
    norms = sum(part * tensor.norm() for part, tensor in zip(parts, tensors, strict=True))
    assert abs(mean.norm() - norms) <= SYMMETRY[torch.float64] * norms
    # A Karcher mean is where the logarithms of all points, weighted, cancel.
    top, pull = mean / mean.norm(), torch.zeros_like(mean)
    for part, tensor in zip(parts, tensors, strict=True):
        tangent = tensor / tensor.norm()
        cosine = (tangent * top).sum()
        tangent = tangent - cosine * top
        pull += part * torch.atan2(tangent.norm(), cosine) * tangent / tangent.norm()
    assert pull.norm() <= SYMMETRY[torch.float64]
    straight = average([{"w": tensor} for tensor in tensors], parts, "linear")["w"]
    assert (straight / straight.norm() - top).norm() > 1e-3, "the iteration had nothing to do"
    same = average([{"w": tensors[0]}] * 3, parts, "spherical")["w"]
    assert (same - tensors[0]).abs().max() <= SYMMETRY[torch.float64]


def test_where_there_is_no_direction_the_spherical_mean_is_linear():
    a = torch.arange(1.0, 7.0, dtype=torch.float64)
    for b in (torch.zeros_like(a), -a):
        for t in (0.25, 0.5):
            found = average([{"w": a}, {"w": b}], [1 - t, t], "spherical")["w"]
            assert found.isfinite().all()
            if b.norm() == 0 or t == 0.5:
                assert torch.equal(found, average([{"w": a}, {"w": b}], [1 - t, t], "linear")["w"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_is_the_first_ones(dtype):
    model = tiny_model(num_hidden_layers=2)
    merged = merge([tiny_model(num_hidden_layers=2, dtype=dtype), disguise(model, dtype=torch.float32)])
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert not merged.training
    # Both are one model, rounded, so that the mean is it as well, rounded once more.
    assert difference(merged.double(), model) <= 4 * max(torch.finfo(dtype).eps, 1e-7)


@pytest.mark.parametrize("aligned", [True, False])
def test_tied_stays_tied_and_untied_untied(turned, aligned):
    for name, tied in (("learned-projected", True), ("untied-projected", False)):
        model, other, _ = turned(name)
        merged = merge([model, other], aligned=aligned)
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
        assert merged.state_dict().keys() == model.state_dict().keys()


@methods
@pytest.mark.by_default(1)
def test_a_merged_model_is_an_ordinary_checkpoint_of_its_own(turned, method, tmp_path):
    a, b, _ = turned("rotary")
    merged = merge([a, b, relative(a)], method=method)
    merged.save_pretrained(tmp_path)
    loaded = RiGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert functions_differ(loaded, merged) == 0
    with torch.no_grad():
        for parameter in merged.parameters():  # shares nothing with the others, which the fixture watches
            parameter.zero_()


REFUSED = {
    "one model": (1, {}, r"`models` must be at least two, got 1\. Add another\."),
    "no models": (0, {}, r"`models` must be at least two, got 0\."),
    "method": (2, {"method": "cubic"}, r"`method` must be one of linear, spherical, got 'cubic'\."),
    "sum": (
        2,
        {"weights": (0.5, 0.4)},
        r"`weights` must sum to 1, got \[0\.5, 0\.4\], whose sum is 0\.9\. Divide them by it\.",
    ),
    "number": (2, {"weights": (1.0,)}, r"`weights` must be 2 numbers, one per model, got \[1\.0\]\. Give 2\."),
    "negative": (
        2,
        {"weights": (1.5, -0.5), "method": "spherical"},
        r"`weights` must not be negative for `method='spherical'`, got \[1\.5, -0\.5\]\. Use 'linear'\.",
    ),
}


@pytest.mark.parametrize(("count", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_merged_is_refused(count, options, message):
    with pytest.raises(ValueError, match=message):
        merge([tiny_model()] * count, **options)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1), (torch.bfloat16, 1e33), (torch.float32, 1e33), (torch.float64, 1e303)]
)
def test_an_average_that_leaves_the_range_of_numbers_is_refused(dtype, size):
    a, b = (tiny_model(num_hidden_layers=1, seed=seed, dtype=dtype) for seed in (0, 1))
    for parameter in (*a.parameters(), *b.parameters()):
        parameter.data *= size
    rule = rf"`models` must give weights that are finite numbers in {str(dtype)[6:]}, got NaN or infinity in `model\."
    with pytest.raises(ValueError, match=rule):
        merge([a, b], (10_000_001, -10_000_000), aligned=False)
    merge([a, b], (2, -1), aligned=False)


def test_models_of_two_shapes_are_refused():
    for attempt in (merge, lambda pair: merge(pair, aligned=False), lambda pair: loss_path(*pair, lambda model: 0.0)):
        with pytest.raises(ValueError, match="`model` and `reference` must have the same `num_hidden_layers`"):
            attempt([tiny_model(), tiny_model(num_hidden_layers=2)])


def test_a_way_of_one_point_is_refused():
    with pytest.raises(ValueError, match=r"`points` must be at least 2, the two ends, got 1\."):
        loss_path(tiny_model(), tiny_model(seed=9), lambda model: 0.0, points=1)


def test_the_barrier_is_the_largest_excess_over_the_straight_line():
    path = LossPath([0.0, 0.5, 0.75, 1.0], before=[2.0, 5.0, 4.0, 4.0], after=[2.0, 2.9, 3.4, 4.0])
    assert path.barrier_before == 2.0 and path.barrier_after == 0
    facts = json.loads(json.dumps(path.to_dict()))
    assert facts["barrier_before"] == 2.0 and facts["barrier_after"] == 0 and facts["before"] == path.before


def test_pictures_of_paths(tmp_path):
    path = LossPath([0.0, 0.5, 1.0], [2.0, 5.0, 2.1], [2.0, 2.9, 2.1])
    save(plot_paths([path, path]), tmp_path / "paths.png")
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")
    save(plot_paths([path], title="One way"), tmp_path / "no-suffix", "svg")
    assert "<svg" in (tmp_path / "no-suffix").read_text()


def test_paths_that_coincide_are_all_seen_and_ends_have_names():
    losses = [2.0, 2.1, 2.2]
    (panel,) = plot_paths([LossPath([0.0, 0.5, 1.0], losses, losses, losses)], names=("a" * 60 + "-end", "my_$b")).axes
    widths = [line.get_linewidth() for line in panel.lines]
    assert len(widths) == 3 and all(wide >= 2 * narrow for wide, narrow in itertools.pairwise(widths))
    texts = [label.get_text() for label in panel.get_xticklabels()]
    assert texts[0] == "0\nmy_$b" and texts[-1].endswith("aaa-end") and len(texts[-1]) < 40


# A text to learn: every token depends on the two before it, so that attention has something to do.
VOCABULARY, CONTEXT, TRAINING_WINDOWS, HELD_OUT_WINDOWS = 24, 16, 600, 60
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 80, 16, 1e-2, 0.1
# The barrier that is left after alignment is a small part of the one before (about a twentieth here).
CLEARLY_LOWER = 0.3


def markov_windows(seed: int = 0) -> torch.Tensor:
    """Token ids `[windows, CONTEXT]` of a random Markov chain of second order."""
    generator = torch.Generator().manual_seed(seed)
    last, second_last = (scale * torch.randn(VOCABULARY, VOCABULARY, generator=generator) for scale in (2.5, 1.5))
    law = (last[:, None] + second_last[None]).softmax(dim=-1)
    windows = torch.randint(VOCABULARY, (TRAINING_WINDOWS + HELD_OUT_WINDOWS, CONTEXT), generator=generator)
    for position in range(2, CONTEXT):
        chances = law[windows[:, position - 1], windows[:, position - 2]]
        windows[:, position] = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return windows


def trained(windows: torch.Tensor, seed: int) -> nn.Module:
    """A small model with an initialisation and an order of the text of its own."""
    torch.manual_seed(seed)
    config = RiGPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
    )
    model = RiGPTForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def school():
    """Three models that learned one text independently, and the loss of a model on text that they have not seen."""
    return taught()


@cache
def taught():
    """Once for all files whose tests look at them."""
    windows = markov_windows()
    held_out = windows[TRAINING_WINDOWS:]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return model(held_out, labels=held_out, use_cache=False).loss.item()

    models = [trained(windows[:TRAINING_WINDOWS], seed) for seed in range(3)]
    assert all(loss(model) < math.log(VOCABULARY) - 1 for model in models), "they have not learned"
    return models, loss


@pytest.mark.full
def test_alignment_lowers_the_barrier_between_independently_trained_models(school):
    models, loss = school
    ratios = []
    for i, j in ((0, 1), (1, 2), (2, 0)):
        path = loss_path(models[i], models[j], loss, points=3)
        assert path.t == [0.0, 0.5, 1.0] and path.barrier_before > 0.3, "there is no barrier to lower"
        for losses in (path.before, path.after):
            for found, own in zip((losses[0], losses[-1]), (loss(models[j]), loss(models[i])), strict=True):
                assert found == pytest.approx(own, abs=SYMMETRY[torch.float32] * own)
        ratios.append(path.barrier_after / path.barrier_before)
        print(f"{i} to {j}: barrier {path.barrier_before:.3f} -> {path.barrier_after:.3f} nats per token")
    assert sum(ratios) / len(ratios) < CLEARLY_LOWER and max(ratios) < 2 * CLEARLY_LOWER


@methods
@pytest.mark.full
def test_merging_trained_models_needs_alignment(school, method):
    models, loss = school
    worst = max(loss(model) for model in models)
    aligned, plain = (loss(merge(models, method=method, aligned=aligned)) for aligned in (True, False))
    print(f"{method}: models at most {worst:.3f}, merged {aligned:.3f}, as they are {plain:.3f}")
    assert aligned < worst + CLEARLY_LOWER * (plain - worst)
    assert plain > worst + 0.3


@pytest.mark.full
def test_a_trained_model_and_its_disguise(school):
    models, loss = school
    model, other = models[0], disguise(models[0])
    own = loss(model)
    assert abs(loss(merge([model, other])) - own) <= SYMMETRY[torch.float32] * own
    assert loss(merge([model, other], aligned=False)) > own + 0.3
    path = loss_path(other, model, loss, points=3)
    assert abs(path.barrier_after) <= SYMMETRY[torch.float32] * own
    assert path.barrier_before > 0.3
    assert gauge_distance(model, other) < SYMMETRY[torch.float32]
    ends = loss_path(other, model, loss, points=2)
    assert ends.t == [0.0, 1.0] and ends.barrier_before == ends.barrier_after == 0
