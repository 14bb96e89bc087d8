"""The record of a token symmetry on the way to the Hub and back."""

import pytest
import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry, symmetrize
from rigpt_hf.token_symmetry_rigpt import SYMMETRY_FRAME
from tests.models import tiny_model
from tests.symmetry.options import generator
from tests.tolerances import SYMMETRY


@pytest.mark.parametrize("way", ["publish", "push"])
@pytest.mark.by_default(1)
def test_the_record_arrives_with_its_frame(hub, tmp_path, rigpt, way):
    model = tiny_model(dtype=torch.float32)
    chosen = Representation.choose(model.config, TokenSymmetry(61, [[[5, 6, 7]]]))
    turn = GaugeTransformation.random(model.config, generator())
    turn(symmetrize(model, chosen)).save_pretrained(tmp_path / "model")
    chosen.conjugated(turn).save(tmp_path / "model")
    code, _, err = rigpt("publish", tmp_path / "model", "me/tiny", *(["--dry-run"] if way == "push" else []))
    assert code == 0, err
    if way == "push":
        RiGPTForCausalLM.from_pretrained(tmp_path / "model").push_to_hub("me/tiny")
    files = hub.files("me/tiny")
    assert files[SYMMETRY_FRAME] == (tmp_path / "model" / SYMMETRY_FRAME).read_bytes()
    assert b"A group of order 3 exchanges 3 tokens: 5, 6, 7." in files["README.md"]
    loaded = RiGPTForCausalLM.from_pretrained("me/tiny")
    assert Representation.load("me/tiny").distance(loaded) < SYMMETRY[torch.float32] < 0.1 < chosen.distance(loaded)
    # From the cache it comes along when the model is saved, as from a folder.
    loaded.save_pretrained(tmp_path / "again")
    assert Representation.load(tmp_path / "again").distance(loaded) < SYMMETRY[torch.float32]
    code, _, err = rigpt("rotate", "me/tiny", tmp_path / "turned")
    assert code == 0, err
    turned = RiGPTForCausalLM.from_pretrained(tmp_path / "turned")
    assert Representation.load(tmp_path / "turned").distance(turned) < SYMMETRY[torch.float32]
    assert Representation.load("me/tiny").distance(turned) > 0.1
