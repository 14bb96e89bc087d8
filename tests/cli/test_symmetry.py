"""The verbs that use the freedom of a RiGPT, as a person meets them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast

from rigpt_hf import RiGPTForSequenceClassification, symmetry
from rigpt_hf.checkpoints.named import load_rigpt
from rigpt_hf.checkpoints.opened import Stored, find_model
from rigpt_hf.checkpoints.vocabulary import check_same_vocabulary
from rigpt_hf.symmetry import GaugeTransformation, merging
from tests.cli.conftest import in_one_line
from tests.models import tiny_config, tiny_model
from tests.tolerances import SYMMETRY


OPTIONS = {"position_embedding_type": "learned", "tie_word_embeddings": False}  # has every kind of frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "rigpt"
    tiny_model(**OPTIONS).save_pretrained(path)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def largest_difference(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and len(first) > 15
    return max(float((first[name] - second[name]).abs().max() / first[name].abs().max()) for name in first)


def test_rotate_turns_stream_and_heads_by_the_seed(done, folder, tmp_path):
    out = done("rotate", folder, tmp_path / "a", "--seed", 3)
    assert "equal up to rounding" in out and f"Written to {tmp_path / 'a'}" in out
    assert json.loads((tmp_path / "a" / "certificate.json").read_text())["passed"]
    g = GaugeTransformation.random(tiny_config(**OPTIONS), torch.Generator().manual_seed(3))
    g(tiny_model(**OPTIONS)).save_pretrained(tmp_path / "expected")
    assert largest_difference(tmp_path / "a", tmp_path / "expected") <= SYMMETRY[torch.float64]
    done("rotate", folder, tmp_path / "b", "--seed", 4)
    assert largest_difference(tmp_path / "a", tmp_path / "b") > 0.1


WAYS = [("--frames", "all", "--t", "-1"), ("--frames", "all"), ("--frames", "stream,heads"), ("--t", 0.3), ()]


@pytest.mark.parametrize("way", [*WAYS[:2], *(pytest.param(way, marks=pytest.mark.full) for way in WAYS[2:])])
def test_what_was_saved_is_undone(done, folder, tmp_path, way):
    saved = tmp_path / "kept" / "g.safetensors"
    out = done("rotate", folder, tmp_path / "there", "--save-transformation", saved, *way)
    assert f"--transformation {saved} --inverse" in out
    done("rotate", tmp_path / "there", tmp_path / "back", "--transformation", saved, "--inverse")
    assert largest_difference(tmp_path / "back", folder) <= SYMMETRY[torch.float64]
    assert largest_difference(tmp_path / "there", folder) > 0.1, "nothing was turned"
    assert sorted(path.name for path in tmp_path.rglob("*.partial")) == []


def test_what_was_saved_is_repeated_and_walked(done, folder, tmp_path):
    g = tmp_path / "g.safetensors"
    GaugeTransformation.random(tiny_config(**OPTIONS), torch.Generator().manual_seed(0), "all", special=True).save(g)
    half = tmp_path / "half.safetensors"
    steps = [("whole",), ("nothing", "--t", 0), ("there", "--t", 0.5, "--save-transformation", half)]
    steps += [("again",), ("back", "--t", 0.5, "--inverse")]
    for name, *way in steps:
        source = tmp_path / "there" if name == "back" else folder
        done("rotate", source, tmp_path / name, "--transformation", g, *way)
    assert largest_difference(tmp_path / "whole", tmp_path / "again") == 0
    for name in ("nothing", "back"):
        assert largest_difference(tmp_path / name, folder) <= SYMMETRY[torch.float64]
    for other in (folder, tmp_path / "whole"):
        assert largest_difference(tmp_path / "there", other) > 0.05
    done("rotate", folder, tmp_path / "by-half", "--transformation", half)
    assert largest_difference(tmp_path / "by-half", tmp_path / "there") <= SYMMETRY[torch.float64]


def test_rotate_takes_dtype_and_shards(done, folder, tmp_path):
    done("rotate", folder, tmp_path / "out", "--dtype", "float32", "--max-shard-size", "20KB")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert load_rigpt(str(tmp_path / "out")).dtype is torch.float32
    assert "equal up to rounding" in done("verify", folder, tmp_path / "out")


def test_force_replaces_model_and_file(rigpt, folder, tmp_path):
    files = tmp_path / "g.safetensors", tmp_path / "out" / "model.safetensors"
    command = ("rotate", folder, tmp_path / "out", "--save-transformation", files[0])
    assert rigpt(*command)[0] == 0
    before = [file.read_bytes() for file in files]
    assert rigpt(*command, "--seed", 1)[0] == 2
    assert before == [file.read_bytes() for file in files]
    assert rigpt(*command, "--seed", 1, "--force")[0] == 0
    assert all(old != file.read_bytes() for old, file in zip(before, files, strict=True))


@pytest.mark.parametrize("verb", ["merge", "canonicalize"])
@pytest.mark.by_default(1)
def test_of_two_at_once_the_later_refuses(verb, rigpt, done, folder, tmp_path, monkeypatch):
    """Also with `--force`: what another has written since the check was not there when it was given."""
    module, name = {"merge": (merging, "merge"), "canonicalize": (symmetry, "canonical_gauge")}[verb]
    original, output = getattr(module, name), tmp_path / "out"
    command = (verb, folder, *[folder] * (verb == "merge"), output, *["--unaligned"] * (verb == "merge"))

    def meanwhile(*arguments, **options):
        monkeypatch.setattr(module, name, original)
        done(*command)
        return original(*arguments, **options)

    for force in ((), ("--force",)):
        monkeypatch.setattr(module, name, meanwhile)
        code, _, err = rigpt(*command, *force)
        assert code == 2 and "must stay as it is while this runs" in err.splitlines()[-1] and output.is_dir()
        shutil.rmtree(output)


def test_a_certificate_that_fails_leaves_nothing(rigpt, folder, tmp_path):
    shear = torch.eye(32, dtype=torch.float64)[None]
    shear[0, 0, 1] = 0.5
    save_file({"stream": shear}, tmp_path / "shear.safetensors")
    arguments = ("--transformation", tmp_path / "shear.safetensors", "--save-transformation", tmp_path / "kept")
    code, _, err = rigpt("rotate", folder, tmp_path / "out", *arguments)
    assert code == 2 and "`--transformation` must leave the function of" in err
    assert {path.name for path in tmp_path.iterdir()} == {"shear.safetensors"}


def test_a_certificate_that_fails_names_the_frames_that_were_given(rigpt, folder, tmp_path, monkeypatch):
    def sheared(config, frames, seed, t):
        shear = torch.eye(32, dtype=torch.float64)[None]
        shear[0, 0, 1] = 0.5
        return GaugeTransformation(config, {"stream": shear})

    monkeypatch.setattr("rigpt_hf.cli.symmetry.random_transformation", sheared)
    code, _, err = rigpt("rotate", folder, tmp_path / "out", "--frames", "stream")
    assert code == 2 and "`--frames` 'stream' leaves the function alone up to rounding" in err
    assert "finer `--dtype`" in err and "transformation" not in err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def places(folder, tmp_path_factory) -> dict[str, Path]:
    """What the arguments of bad command lines name."""
    root = tmp_path_factory.mktemp("places")
    (root / "full").mkdir()
    (root / "full" / "precious.txt").write_text("keep me")
    (root / "text.txt").write_text("Some text.")
    GPT2Config(vocab_size=61).save_pretrained(root / "gpt2")
    BertConfig(vocab_size=61).save_pretrained(root / "bert")
    tiny_model(attention_bias=False).save_pretrained(root / "plain")
    config = tiny_config()
    config.architectures = [RiGPTForSequenceClassification.__name__]
    config.save_pretrained(root / "headless")
    generator = torch.Generator().manual_seed(0)
    GaugeTransformation.random(tiny_config(**OPTIONS), generator, "all").save(root / "g")
    names = {"OUT": "out", "FULL": "full", "GPT2": "gpt2", "PLAIN": "plain", "HEADLESS": "headless", "G": "g"}
    names |= {"BERT": "bert", "TEXT": "text.txt", "INSIDE": "out/g.safetensors"}
    found = {key: root / name for key, name in names.items()}
    return found | {"ROOT": root, "RIGPT": folder, "MODEL": folder / "model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("GPT2", "OUT"), "`SOURCE` must be a folder with `model.safetensors` or"),
        (("BERT", "OUT"), "`model_type='bert'` cannot be converted: no weight map has been written for it"),
        (("RIGPT", "OUT", "--as-source"), "`--as-source` is for models of a stock class, got"),
        (("TEXT", "OUT"), "`SOURCE` must be a folder, an id on the Hub, or one file"),
        (("HEADLESS", "OUT"), "`SOURCE` must be a RiGPTForCausalLM, got"),
        (("no/such/folder", "OUT"), "`SOURCE` must be the folder of a saved model or the id of a repository"),
        (("RIGPT", "FULL"), "or pass `--force` to replace it"),
        (("RIGPT", "RIGPT"), "`OUTPUT` must not replace what is read"),
        (("RIGPT", "OUT", "--inverse"), "`--inverse` undoes a transformation in a file, got none. Name it with"),
        (("RIGPT", "OUT", "--transformation", "G", "--frames", "stream"), "`--frames` says what to turn at random"),
        (("RIGPT", "OUT", "--transformation", "G", "--t", "0.5"), "`--t` must be 1 for the `--transformation` in"),
        (("RIGPT", "OUT", "--transformation", "absent"), "`--transformation` must be a file, got 'absent'"),
        (("RIGPT", "OUT", "--transformation", "TEXT"), "`--transformation` must be a file that `rigpt rotate --save"),
        (
            ("RIGPT", "OUT", "--transformation", "MODEL"),
            "`--transformation` must be a file that `rigpt rotate --save",
        ),
        (("RIGPT", "OUT", "--frames", "spin"), "position_shift, head, shifts, all, got 'spin'. Take one of these."),
        (("RIGPT", "OUT", "--frames", "head, streem"), "got 'streem'. Did you mean 'stream'?"),
        (("RIGPT", "OUT", "--frames", "local"), "`--frames` must name frames of this configuration, got 'local'"),
        (("RIGPT", "OUT", "--frames", ","), "`--frames` must name frames that this configuration has, got ','"),
        (("PLAIN", "OUT", "--frames", "shifts"), "`--frames` must name frames that this configuration has, got 'shi"),
        (("RIGPT", "OUT", "--t", "nan"), "`--t` must be a finite number, got nan"),
        (("RIGPT", "OUT", "--t", "half"), "Invalid value for '--t'"),
        (("RIGPT", "OUT", "--dtype", "int8"), "`--dtype` must be one of float64, float32"),
        (("RIGPT", "OUT", "--max-shard-size", "big"), "`--max-shard-size` must be a number of bytes or a text"),
        (("RIGPT", "OUT", "--revision", "main"), "`--revision` names a version on the Hub"),
        (("RIGPT", "OUT", "--save-transformation", "TEXT"), "must not exist yet, got"),
        (("RIGPT", "OUT", "--save-transformation", "FULL"), "`--save-transformation` must be a file, got the folder"),
        (("RIGPT", "OUT", "--save-transformation", "INSIDE"), "must not lie in each other"),
        (("RIGPT",), "Missing argument 'output'. See rigpt rotate --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_ends_in_one_line(rigpt, folder, places, arguments, message):
    before = sorted(places["ROOT"].rglob("*"))
    assert message in in_one_line(rigpt("rotate", *(places.get(argument, argument) for argument in arguments)))
    assert sorted(places["ROOT"].rglob("*")) == before, "something was left behind or lost"


class TestLoading:
    def test_a_rigpt(self, folder):
        model = load_rigpt(str(folder))
        assert not model.training and model.dtype is torch.float64
        assert load_rigpt(str(folder), torch.float32).dtype is torch.float32

    def test_weights_that_are_not_those_of_the_configuration(self, folder, tmp_path):
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        for problem in ("lacks", "has no place for"):
            tensors = weights(folder)
            if problem == "lacks":
                del tensors["lm_head.weight"]
            else:
                tensors["model.layers.1.self_attn.extra"] = torch.ones(2)
            save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
            message = f"`source` must hold the weights of its configuration, .* {problem} `"
            with pytest.raises(ValueError, match=message):
                load_rigpt(str(tmp_path))


class TestSameVocabulary:
    def make(self, path: Path, vocabulary: str | None = "abcd", merges=(("a", "b"),), **options) -> Stored:
        tiny_config(**options).save_pretrained(path)
        if vocabulary is not None:
            ids = {token: index for index, token in enumerate(["ab", "cd", *vocabulary])}
            backend = Tokenizer(models.BPE(ids, list(merges)))
            PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
        return find_model(path)

    def test_the_same(self, tmp_path, caplog):
        check_same_vocabulary(self.make(tmp_path / "a"), self.make(tmp_path / "b"))
        assert not caplog.records
        check_same_vocabulary(self.make(tmp_path / "a"), self.make(tmp_path / "padded", vocab_size=64))
        assert not caplog.records
        damaged = self.make(tmp_path / "d")
        (damaged.folder / "tokenizer.json").write_text("{")
        for other in (self.make(tmp_path / "c", None), damaged):
            check_same_vocabulary(self.make(tmp_path / "a"), other)
            assert caplog.records.pop().message.endswith("not both have a tokenizer that loads here.")

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (
                {"vocab_size": 5},
                "one vocabulary, but for padding, got 61 tokens in .*a' and 5 in .*b', and 5 by the tokenizer",
            ),
            ({"vocabulary": "abdc"}, "differ in 2 tokens, such as 'c': id 4 in .*a', id 5 in .*b'. Take two models"),
            ({"vocabulary": "abcde"}, "'e': absent in .*a', id 6 in .*b'"),
            ({"merges": (("c", "d"),)}, "merge characters differently"),
        ],
        ids=["another size", "another order", "another token", "other merges"],
    )
    def test_another(self, tmp_path, other, message):
        a, b = self.make(tmp_path / "a"), self.make(tmp_path / "b", **other)
        with pytest.raises(ValueError, match=message):
            check_same_vocabulary(a, b)
