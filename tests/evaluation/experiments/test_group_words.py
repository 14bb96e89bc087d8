"""The programs that measure groups and four bits: data that is right, numbers that mean what they say."""

import json

import numpy as np
import pytest
import torch

from evaluation.experiments import four_bits, group_words
from rigpt_hf.evaluation.rounding import compensated
from rigpt_hf.symmetry import GaugeTransformation
from tests.models import tiny_model


TABLES = {name: group_words.multiplication_table(make()) for name, make in group_words.GROUPS.items()}


def test_tables_are_those_of_groups():
    for name in TABLES:
        table = TABLES[name]
        size = {"SO(2) steps": 12, "S3": 6, "octahedral": 24, "A5": 60}[name]
        assert table.shape == (size, size)
        everything = set(range(size))
        assert all(set(line) == everything for line in [*table, *table.T])
        neutral = [e for e in range(size) if all(table[e] == np.arange(size))]
        assert len(neutral) == 1 and all(table[:, neutral[0]] == np.arange(size))
        draw = np.random.default_rng(0)
        for a, b, c in draw.integers(0, size, (200, 3)):
            assert table[table[a, b], c] == table[a, table[b, c]]
        commutes = bool((table == table.T).all())
        assert commutes is (name == "SO(2) steps")


def test_the_group_of_the_icosahedron_is_not_solvable():
    solvable = {name: make().is_solvable for name, make in group_words.GROUPS.items()}
    assert solvable == {"SO(2) steps": True, "S3": True, "octahedral": True, "A5": False}


def test_words_ask_for_their_products():
    table = TABLES["A5"]
    words = group_words.Words(table, 20, 7, seed=3)
    assert len(words) == 20
    for row in range(20):
        ids, labels = words[row]["input_ids"].tolist(), words[row]["labels"].tolist()
        assert len(ids) == len(labels) == 8 and ids[-1] == 60 and labels[0] == -100
        product = ids[0]
        for place in range(7):
            product = product if place == 0 else table[product, ids[place]]
            assert labels[place + 1] == product
    again, other = group_words.Words(table, 20, 7, seed=3), group_words.Words(table, 20, 7, seed=4)
    assert torch.equal(again.input_ids, words.input_ids) and not torch.equal(other.input_ids, words.input_ids)


class Oracle(torch.nn.Module):
    """Knows the table, but only up to a length."""

    def __init__(self, table, reach):
        super().__init__()
        self.table, self.reach, self.weight = table, reach, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, len(self.table) + 1)
        for row, ids in enumerate(input_ids[:, :-1].tolist()):
            product = ids[0]
            for place, element in enumerate(ids[: self.reach]):
                product = product if place == 0 else self.table[product, element]
                logits[row, place, product] = 50.0
        return type("Output", (), {"logits": logits})


def test_what_is_right_is_counted_by_length():
    options = group_words.Options(length=5, longer=9)
    table = TABLES["S3"]
    everything = group_words.measure(Oracle(table, 9), table, options)
    assert everything["trained_length"] == everything["longer"] == 1.0 and everything["loss"] < 1e-6
    half = group_words.measure(Oracle(table, 5), table, options)
    assert half["trained_length"] == 1.0 and abs(half["longer"] - 1 / 6) < 0.06
    assert half["accuracy"][:5] == [1.0] * 5 and len(half["accuracy"]) == 9


def test_contenders_have_one_size():
    for name in group_words.CONTENDERS:
        options = group_words.Options()
        sizes = {
            each: sum(p.numel() for p in group_words.make_model(each, 25, options, 0).parameters())
            for each in (name, "RiGPT")
        }
        # The stock model has positions and biases, RiGPT projections.
        assert abs(sizes[name] / sizes["RiGPT"] - 1) < 0.05


@pytest.mark.full
def test_group_words_from_end_to_end(tmp_path):
    options = dict(only="RiGPT;stock GPT-2", groups="S3", seeds=2, steps=60, batch=32, length=3, longer=5)
    options |= {"hidden_size": 32, "layers": 1, "output": tmp_path / "out"}
    results = group_words.run(group_words.Options(**options))
    assert len(results["runs"]) == 2 * (3 + 1)
    assert group_words.Options(rates="0.02, 0.3").sweep("RiGPT") == (0.02, 0.3)
    for name in ("RiGPT", "stock GPT-2"):
        chosen = group_words.chosen(results, "S3", name)
        assert [run["seed"] for run in chosen] == [0, 1] and len({run["rate"] for run in chosen}) == 1
        assert all(run["accuracy"][0] > 0.9 and run["trained_length"] > 0.4 for run in chosen)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"] == results["runs"]
    assert (tmp_path / "out" / "group-words.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="`output` must be empty or absent"):
        group_words.run(group_words.Options(**options))


def test_impossible_words_are_refused():
    for options, message in (
        ({"groups": "E8"}, "`groups` must name some of SO"),
        ({"only": "GPT-5"}, "`only` must name some of stock GPT-2, RiGPT"),
        ({"longer": 8}, "`longer` must be more than `length`, got 8 and 8"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"rates": "fast"}, "`rates` must be positive numbers separated by commas, got 'fast'"),
        ({"rates": "0.1,-0.1"}, "`rates` must be positive numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            group_words.Options(**options)


def test_rounding_to_four_bits():
    for group in (0, 4, 8):
        weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
        result = four_bits.rounded(weight, group=group)
        parts, kept = result.reshape(-1, group or 16), weight.reshape(-1, group or 16)
        scale = kept.abs().amax(1, keepdim=True) / 7
        levels = parts / scale
        assert (levels - levels.round()).abs().max() < 1e-4 and levels.abs().max() < 7.01
        assert ((parts - kept).abs() <= scale / 2 * (1 + 1e-5)).all()
        assert torch.allclose(parts.abs().amax(1), kept.abs().amax(1))
        assert not torch.allclose(result, weight, atol=1e-3)
        with pytest.raises(ValueError, match="`group` must divide the 16 numbers of a row, got 5"):
            four_bits.rounded(weight, group=5)


def test_compensation_makes_good_what_inputs_see():
    """Where inputs are correlated the outputs are nearer; where they are not, it is rounding to nearest."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    assert torch.allclose(compensated(weight, torch.eye(16)), four_bits.rounded(weight))
    assert torch.allclose(compensated(weight, torch.eye(16), group=4), four_bits.rounded(weight, group=4))
    mixing = torch.randn(16, 16, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 16)[:, None]
    inputs = torch.randn(400, 16, generator=generator, dtype=torch.float64) @ mixing
    moments = inputs.T @ inputs
    for group in (0, 8):
        nearest, better = four_bits.rounded(weight, group=group), compensated(weight, moments, group=group)
        errors = [float((inputs @ (each - weight).T).norm()) for each in (nearest, better)]
        assert errors[1] < 0.8 * errors[0]
        assert float((better - weight).norm()) > float((nearest - weight).norm())
    with pytest.raises(ValueError, match=r"`moments` must be \[16, 16\], got \[3, 3\]"):
        compensated(weight, torch.eye(3))


@pytest.fixture
def model_and_tokens(tmp_path):
    model = tiny_model(dtype=torch.float32, attention_bias=False)
    GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), "stream").apply_(model)
    model.save_pretrained(tmp_path / "model")
    np.random.default_rng(0).integers(3, 61, 33 * 16).astype("<u2").tofile(tmp_path / "tokens.bin")
    return model, tmp_path


def test_the_law_of_rounding_noise(model_and_tokens):
    """The error of every output is that of the weights over the gain of the inputs."""
    _, folder = model_and_tokens
    options = four_bits.Options(folder / "tokens.bin", [folder / "model"], 8, 32, output=folder / "out.json")
    (result,) = four_bits.run(options)
    assert len(result["per_matrix"]) == 3 * 6
    for entry in result["per_matrix"].values():
        assert entry["stable_rank"] >= 1 and 0.05 < entry["weight_error"] < 0.2
        predicted = entry["weight_error"] / entry["gain"]
        assert entry["output_error"] == pytest.approx(predicted, rel=0.25)
    plain = result["loss"]
    assert all(abs(result[f"loss, scale per {group}"] - plain) > 1e-6 for group in ("row", "group 32"))
    assert abs(result["loss, compensated, scale per row"] - plain) > 1e-6
    assert abs(result["loss at equal error"] - plain) > 1e-6
    assert json.loads((folder / "out.json").read_text()) == [result]
    left = four_bits.Options(
        folder / "tokens.bin", [folder / "model"], 8, 32, modules_to_not_convert=("v_proj", "o_proj")
    )
    (other,) = four_bits.run(left)
    assert len(other["per_matrix"]) == 3 * 4 and other["left alone"] == ["v_proj", "o_proj"]
    assert other["loss"] == plain and other["loss, scale per row"] != result["loss, scale per row"]
    with pytest.raises(ValueError, match="`output` must not exist"):
        four_bits.run(options)


def test_tokens_must_be_enough(model_and_tokens, capsys):
    _, folder = model_and_tokens
    assert four_bits.main([str(folder / "tokens.bin"), str(folder / "model")]) == 2
    assert "`--windows` must fit into the 528 tokens" in capsys.readouterr().err
