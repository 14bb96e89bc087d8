"""Verbs on a model with the record of a token symmetry: it is carried along, or dropped and said to be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry, symmetrize
from rigpt_hf.token_symmetry_rigpt import SYMMETRY_FRAME
from tests.cli.conftest import in_one_line
from tests.models import tiny_config, tiny_model
from tests.symmetry.options import generator
from tests.tolerances import SYMMETRY


OPTIONS = {"position_embedding_type": "learned", "tie_word_embeddings": False}
CYCLIC = TokenSymmetry.named("cyclic", [range(5, 9), range(20, 24)], 61)
CHOSEN = Representation.choose(tiny_config(**OPTIONS), CYCLIC)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models with one symmetry in one representation, the first in another frame, and one without."""
    place = tmp_path_factory.mktemp("models")
    a, b = (symmetrize(tiny_model(seed, **OPTIONS), CHOSEN) for seed in (0, 1))
    a.save_pretrained(place / "a")
    b.save_pretrained(place / "b")
    tiny_model(2, **OPTIONS).save_pretrained(place / "free")
    g = GaugeTransformation.random(a.config, generator(3), "all")
    g(a).save_pretrained(place / "turned")
    CHOSEN.conjugated(g).save(place / "turned")
    return place


def away(folder: Path, representation: Representation | None = None) -> float:
    """The distance of a folder's weights from a representation, that which it records if none is given."""
    representation = representation or Representation.load(folder)
    return representation.distance(RiGPTForCausalLM.from_pretrained(folder))


def recorded(folder: Path) -> dict | None:
    return json.loads((folder / "config.json").read_text())["token_symmetry"]


@pytest.mark.full
def test_rotate_twice(done, models, tmp_path):
    done("rotate", models / "a", tmp_path / "once", "--frames", "all", "--save-transformation", tmp_path / "g")
    done("rotate", tmp_path / "once", tmp_path / "twice", "--frames", "all", "--seed", 5)
    for name in ("once", "twice"):
        assert away(tmp_path / name) < SYMMETRY[torch.float64] < 0.1 < away(tmp_path / name, CHOSEN)
    assert away(tmp_path / "twice", Representation.load(tmp_path / "once")) > 0.1
    done("rotate", tmp_path / "once", tmp_path / "back", "--transformation", tmp_path / "g", "--inverse")
    assert away(tmp_path / "back") < SYMMETRY[torch.float64] > away(tmp_path / "back", CHOSEN)


def test_canonicalize_and_export(done, models, tmp_path):
    done("canonicalize", models / "turned", tmp_path / "canonical")
    assert away(tmp_path / "canonical") < SYMMETRY[torch.float64] < 0.1 < away(tmp_path / "canonical", CHOSEN)


def test_merge_keeps_what_the_merged_weights_have(done, models, tmp_path):
    """In one representation without alignment they have it; with a model that has none they do not."""
    out = done("merge", models / "a", models / "b", tmp_path / "both", "--unaligned")
    assert "not recorded" not in out and recorded(tmp_path / "both") == CHOSEN.to_config()
    assert away(tmp_path / "both") < SYMMETRY[torch.float64]
    out = done("merge", models / "a", models / "free", tmp_path / "none", "--unaligned")
    assert f"The token symmetry of {models / 'a'} is not recorded: merged weights are" in out
    assert recorded(tmp_path / "none") is None and away(tmp_path / "none", CHOSEN) > 0.1
    # All of the first, in its own frame.
    done("merge", models / "turned", models / "free", tmp_path / "first", "--weights", "1,0")
    assert away(tmp_path / "first") < SYMMETRY[torch.float64]
    assert (tmp_path / "first" / SYMMETRY_FRAME).read_bytes() == (models / "turned" / SYMMETRY_FRAME).read_bytes()


def test_info_says_what_is_recorded(done, models):
    for name in ("a", "turned"):
        out = done("info", models / name)
        assert "order 4, 8 tokens move (as recorded)" in out and "matrices" not in out
    assert "tokens move" not in done("info", models / "free")


@pytest.mark.parametrize("change", [{"vocab_size": 0}, {"generators": [[[3, 3]]]}, {"generators": 7}])
def test_info_names_the_folder_of_a_record_that_cannot_be_read(rigpt, models, tmp_path, change):
    shutil.copytree(models / "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["token_symmetry"]["symmetry"] |= change
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    line = in_one_line(rigpt("info", tmp_path / "a"))
    assert f"`SOURCE` must have a record of a token symmetry that can be read, got '{tmp_path / 'a'}': `" in line


def test_models_with_and_without_a_record_are_compared(rigpt, models):
    """They differ, and not by their options."""
    code, out, err = rigpt("diff", models / "turned", models / "free")
    assert code == 1 and "B is unrelated to A" in out and "token_symmetry" not in out + err


def test_a_lost_frame_ends_in_one_line(rigpt, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models / "turned", folder)
    elements = load_file(folder / SYMMETRY_FRAME)
    save_file({"stream": torch.eye(3)[None]}, folder / SYMMETRY_FRAME)
    for damage in ("", "lost"):
        if damage:
            (folder / SYMMETRY_FRAME).unlink()
        for arguments in (("rotate", folder, tmp_path / "out"), ("merge", folder, folder, tmp_path / "out")):
            line = in_one_line(rigpt(*arguments))
            assert "must hold the frame that its `token_symmetry` names" in line and SYMMETRY_FRAME in line
    assert not (tmp_path / "out").exists()
    save_file(elements, folder / SYMMETRY_FRAME)
    assert rigpt("rotate", folder, tmp_path / "out")[0] == 0
