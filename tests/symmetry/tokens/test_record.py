"""The record of a symmetry in a folder: read as it was written, true of the weights, or not there."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rigpt_hf import RiGPTConfig, RiGPTForSequenceClassification
from rigpt_hf.conversion import export_model
from rigpt_hf.frames import table_of
from rigpt_hf.symmetry import (
    GaugeTransformation,
    merge,
    to_global_frame,
    to_local_frames,
)
from rigpt_hf.symmetry.alignment import check_alike
from rigpt_hf.symmetry.checkpoint import transform_checkpoint
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry, symmetrize
from rigpt_hf.token_symmetry_rigpt import SYMMETRY_FRAME
from tests.model.test_remote_code import WITHOUT_PACKAGE
from tests.models import COVER, noisy, over, tiny_config, tiny_model
from tests.processes import run
from tests.symmetry.options import generator
from tests.symmetry.tokens.groups import SYMMETRIES, VOCABULARY
from tests.symmetry.tokens.test_representation import ALL, PAIRED, represented
from tests.tolerances import SYMMETRY


GLOBAL = {option: values for option, values in ALL.items() if not {"local_frames", "post_norm"} & values.keys()}
LEARNED = "learned-untied-projected"  # has every kind of frame


def symmetric_model(option: str = LEARNED, name: str = "symmetric", **options):
    model, representation = represented(option, name, **options)
    return symmetrize(model, representation), representation


def random_turn(model, seed: int = 4) -> GaugeTransformation:
    return GaugeTransformation.random(model.config, generator(seed), "all")


@pytest.fixture(scope="module")
def turned(tmp_path_factory) -> Path:
    """A folder of a model with a symmetry, and of the same in another frame."""
    place = tmp_path_factory.mktemp("turned")
    model, _ = symmetric_model()
    model.save_pretrained(place / "plain")
    transform_checkpoint(place / "plain", place / "turned", random_turn(model), progress=False)
    return place


def away(folder: Path, model=None) -> float:
    """The distance of a folder's weights from the representation that it records."""
    return Representation.load(folder).distance(model or AutoModelForCausalLM.from_pretrained(folder))


@over([option for option in COVER if option in GLOBAL], GLOBAL)
def test_a_record_is_read_as_it_was_written(option, tmp_path):
    model, representation = symmetric_model(option, PAIRED.get(option, "symmetric"))
    assert model.config.token_symmetry == json.loads(json.dumps(representation.to_config()))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / SYMMETRY_FRAME).exists()
    loaded = Representation.load(tmp_path)
    assert loaded.symmetry == representation.symmetry and loaded.to_config() == representation.to_config()
    for one, other in zip(loaded.turned, representation.turned, strict=True):
        assert one.elements.keys() == other.elements.keys() and len(one.elements) > 0
        assert all(torch.equal(element, other.elements[key]) for key, element in one.elements.items())
    assert away(tmp_path) < SYMMETRY[torch.float64] < 0.1 < loaded.distance(tiny_model(**ALL[option]))
    nothing = torch.zeros_like(model.get_input_embeddings().weight)
    assert loaded.distance_of(["model.embed_tokens.weight"], lambda _: nothing) == 0
    # Another one for the same configuration is not what these weights have.
    other = Representation.choose(model.config, TokenSymmetry.named("cyclic", [range(40, 45)], VOCABULARY))
    assert other.distance(model) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.by_default(1)
def test_a_rotated_folder_has_the_conjugated_record(dtype, tmp_path):
    model, representation = symmetric_model(dtype=dtype)
    model.save_pretrained(tmp_path / "0")
    turns = [random_turn(model, seed) for seed in (4, 5)]
    for number, g in enumerate(turns):
        transform_checkpoint(tmp_path / str(number), tmp_path / str(number + 1), g, progress=False)
    for number in (1, 2):
        folder = tmp_path / str(number)
        assert json.loads((folder / "config.json").read_text())["token_symmetry"]["frame"] == SYMMETRY_FRAME
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert away(folder, loaded) < SYMMETRY[dtype] < 0.1 < representation.distance(loaded)
    # The two frames are one after the other, not one of them.
    saved = load_file(tmp_path / "2" / SYMMETRY_FRAME)
    expected = turns[1] @ turns[0]
    assert saved.keys() == expected.elements.keys() and len(saved) > 5
    assert max(float((saved[key] - element).abs().max()) for key, element in expected.elements.items()) == 0
    assert Representation.load(tmp_path / "1").distance(loaded) > 0.1
    # And back where it came from.
    transform_checkpoint(tmp_path / "2", tmp_path / "back", expected.inverse(), progress=False)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert away(tmp_path / "back", back) < SYMMETRY[dtype] > representation.distance(back)


def test_a_folder_without_a_record_gets_none(tmp_path):
    model = tiny_model(**ALL[LEARNED])
    model.save_pretrained(tmp_path / "source")
    transform_checkpoint(tmp_path / "source", tmp_path / "out", random_turn(model), progress=False)
    assert not (tmp_path / "out" / SYMMETRY_FRAME).exists()
    with pytest.raises(ValueError, match="must have a `token_symmetry` in its config.json, got .*out.* without"):
        Representation.load(tmp_path / "out")


def test_saving_what_was_loaded_brings_the_frame_along(turned, tmp_path):
    """However often, and over the folder itself."""
    place = turned / "turned"
    for target in (tmp_path / "a", tmp_path / "b", tmp_path / "b"):
        model = AutoModelForCausalLM.from_pretrained(place)
        model.save_pretrained(target)
        assert (target / SYMMETRY_FRAME).read_bytes() == (turned / "turned" / SYMMETRY_FRAME).read_bytes()
        assert away(target) < SYMMETRY[torch.float64]
        place = target
    # A folder that had another model with another frame gets this one's.
    other = AutoModelForCausalLM.from_pretrained(turned / "turned")
    transform_checkpoint(turned / "turned", tmp_path / "c", random_turn(other, 9), progress=False)
    other.save_pretrained(tmp_path / "c")
    assert away(tmp_path / "c") < SYMMETRY[torch.float64]
    assert Representation.from_config(other.config).distance(other) < SYMMETRY[torch.float64]


def test_the_record_needs_no_package_to_be_kept(turned, tmp_path):
    """Where the code of the folder is all there is, saving brings it and its frame along."""
    code = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
"""
    done = run("-c", WITHOUT_PACKAGE + code, turned / "turned", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert away(tmp_path / "out") < SYMMETRY[torch.float64]
    assert Representation.load(turned / "plain").distance(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) > 0.1


def test_a_frame_that_does_nothing_is_one(tmp_path):
    model, representation = symmetric_model("learned")
    model.save_pretrained(tmp_path)
    representation.conjugated(GaugeTransformation.identity(model.config)).save(tmp_path)
    assert away(tmp_path, model) < SYMMETRY[torch.float64] < 0.1 < away(tmp_path, tiny_model(**ALL["learned"]))


@pytest.mark.parametrize("name", ["config.json", SYMMETRY_FRAME])
def test_links_stay(name, tmp_path):
    """As in a folder of a cache; nothing is recorded, neither beside them."""
    model, representation = symmetric_model("learned")
    framed = representation.conjugated(GaugeTransformation.identity(model.config))
    model.save_pretrained(tmp_path)
    framed.save(tmp_path)
    path, target = tmp_path / name, tmp_path / "blob"
    path.rename(target).chmod(0o644)
    path.symlink_to("blob")
    before = {each.name: (each.lstat().st_mtime_ns, each.read_bytes()) for each in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"`folder` must be a file itself .*{name}', a link to 'blob'"):
        framed.save(tmp_path)
    assert path.is_symlink()
    assert before == {each.name: (each.lstat().st_mtime_ns, each.read_bytes()) for each in tmp_path.iterdir()}


def test_a_frame_out_of_reach_leaves_no_record(turned, tmp_path, caplog, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(turned / "turned")
    record = model.config.token_symmetry
    monkeypatch.setattr(model.config, "name_or_path", str(tmp_path / "gone"))
    model.save_pretrained(tmp_path / "out")
    assert "is not where the model was loaded from" in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["token_symmetry"] is None
    assert not (tmp_path / "out" / SYMMETRY_FRAME).exists()
    assert model.config.token_symmetry == record
    # `save` of the representation records it all the same.
    Representation.load(turned / "turned").save(tmp_path / "out")
    assert away(tmp_path / "out") < SYMMETRY[torch.float64]


@pytest.mark.full
def test_a_frame_that_was_replaced_is_not_that_of_a_model_in_memory(turned, tmp_path, caplog):
    place, record = tmp_path / "place", tmp_path / "out" / "config.json"
    transform_checkpoint(turned / "plain", place, random_turn(symmetric_model()[0], 6), progress=False)
    model = AutoModelForCausalLM.from_pretrained(place)
    g = random_turn(model, 5)
    transform_checkpoint(turned / "plain", place, g, force=True, progress=False)
    model.save_pretrained(tmp_path / "out")
    assert "is another one than when the model was loaded" in caplog.text
    assert json.loads(record.read_text())["token_symmetry"] is None and not (record.parent / SYMMETRY_FRAME).exists()
    with pytest.raises(ValueError, match="must hold the frame .* is another one, by its SHA-256"):
        Representation.from_config(model.config)
    # The same frame once more is as good as the one before.
    transform_checkpoint(turned / "plain", place, random_turn(model, 6), force=True, progress=False)
    model.save_pretrained(tmp_path / "out")
    assert away(tmp_path / "out") < SYMMETRY[torch.float64]


def test_a_record_without_a_hash_is_read_and_not_passed_on(turned, tmp_path, caplog):
    """As earlier versions wrote them: of which frame it is nobody can tell."""
    shutil.copytree(turned / "turned", tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    assert len(config["token_symmetry"].pop("frame_sha256")) == 64
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert away(tmp_path / "old") < SYMMETRY[torch.float64]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "out")
    assert "does not say of which token_symmetry.safetensors it is" in caplog.text
    assert AutoConfig.from_pretrained(tmp_path / "out").token_symmetry is None
    transform_checkpoint(tmp_path / "old", tmp_path / "new", random_turn(model), progress=False)
    assert away(tmp_path / "new") < SYMMETRY[torch.float64]


def test_saving_writes_through_no_link(turned, tmp_path, caplog):
    (tmp_path / "precious").write_text("keep me")
    model = AutoModelForCausalLM.from_pretrained(turned / "turned")
    for name, make in (("link", Path.symlink_to), ("pipe", lambda path, _: os.mkfifo(path))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / SYMMETRY_FRAME, tmp_path / "precious")
        model.save_pretrained(tmp_path / name)
        assert f"{name}/{SYMMETRY_FRAME}' is a link or no file" in caplog.text
        assert AutoConfig.from_pretrained(tmp_path / name).token_symmetry is None
    assert (tmp_path / "precious").read_text() == "keep me"


@pytest.mark.parametrize(("source", "dtype"), [("plain", torch.float64), ("turned", torch.bfloat16)])
def test_a_record_that_is_not_true_of_the_weights_is_not_carried_on(source, dtype, turned, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(turned / source).to(dtype)
    g, cases = random_turn(model, 8), {"kept": model, "not": noisy(model, 0.1)}
    for name, one in cases.items():
        one.save_pretrained(tmp_path / name)
        transform_checkpoint(tmp_path / name, tmp_path / f"{name}-out", g, progress=False, certificate=False)
        known = AutoConfig.from_pretrained(tmp_path / f"{name}-out").token_symmetry
        assert (known is not None) == (name == "kept") == (tmp_path / f"{name}-out" / SYMMETRY_FRAME).exists()
        lost = f"The token symmetry of {tmp_path / name} is not recorded: its weights are"
        assert (lost in caplog.text) == (name == "not")


def test_a_transformation_in_memory_clears_the_record():
    model, representation = symmetric_model()
    g = random_turn(model)
    moved = g(model)
    assert moved.config.token_symmetry is None and model.config.token_symmetry is not None
    assert representation.conjugated(g).distance(moved) < SYMMETRY[torch.float64] < representation.distance(moved)
    GaugeTransformation.identity(model.config).apply_(model)
    assert model.config.token_symmetry == representation.to_config()
    assert symmetrize(moved, representation.conjugated(g)).config.token_symmetry is None  # which needs a file


def test_what_is_no_longer_true_is_dropped(tmp_path, caplog):
    model, representation = symmetric_model("learned")
    local = to_local_frames(model)
    assert local.config.token_symmetry is None is to_global_frame(local).config.token_symmetry
    assert merge([model, tiny_model(1, **ALL["learned"])]).config.token_symmetry is None
    for size in (VOCABULARY, VOCABULARY + 3, 12):
        resized = copy.deepcopy(model)
        resized.resize_token_embeddings(size)
        kept = size == VOCABULARY
        assert (resized.config.token_symmetry is not None) == kept
        resized.save_pretrained(tmp_path / str(size))
        assert AutoConfig.from_pretrained(tmp_path / str(size)).token_symmetry == (
            representation.to_config() if kept else None
        )
    llama, _ = symmetric_model("gated", **ALL["no-biases"])
    assert llama.config.token_symmetry and "token_symmetry" not in export_model(llama, "llama").config.to_dict()
    # Another head has not been projected, and codes are rounded.
    model.save_pretrained(tmp_path / "model")
    classifier = RiGPTForSequenceClassification.from_pretrained(tmp_path / "model")
    classifier.save_pretrained(tmp_path / "classifier")
    assert "is of a language model, and this is a RiGPTForSequenceClassification" in caplog.text
    assert AutoConfig.from_pretrained(tmp_path / "classifier").token_symmetry is None
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    model.config.save_pretrained(tmp_path / "codes")
    assert "rounding to codes" in caplog.text
    assert AutoConfig.from_pretrained(tmp_path / "codes").token_symmetry is None


def test_nothing_else_depends_on_the_record():
    """Frames, and whether two models can be compared, are the same with and without."""
    model, representation = symmetric_model("learned")
    plain = copy.deepcopy(model)
    plain.config.token_symmetry = None
    assert table_of(model.config) is table_of(plain.config)
    check_alike(model.config, plain.config)
    assert RiGPTConfig.from_dict(plain.config.to_dict()).token_symmetry is None
    older = {key: value for key, value in plain.config.to_dict().items() if key != "token_symmetry"}
    assert RiGPTConfig.from_dict(older).token_symmetry is None
    assert model.config.base_model_tp_plan == plain.config.base_model_tp_plan
    assert Representation.trivial(model.config, representation.symmetry).to_config()["filling"]["frames"] == {}


RECORD = Representation.choose(tiny_config(), SYMMETRIES["cyclic"]()).to_config()
WRONG = [
    ({}, "must have objects `symmetry` and `filling`"),
    (RECORD | {"more": 1}, "must have objects `symmetry` and `filling`"),
    (RECORD | {"frame_sha256": 1}, "must have objects `symmetry` and `filling`"),
    (RECORD | {"symmetry": [1]}, "must have objects `symmetry` and `filling`"),
    (RECORD | {"frame": "../other.safetensors"}, "a `frame` that is null or 'token_symmetry.safetensors'"),
    (RECORD | {"symmetry": RECORD["symmetry"] | {"vocab_size": 62}}, "61 tokens or fewer, got one of 62"),
    (RECORD | {"symmetry": {}}, "61 tokens or fewer, got one of None"),
]


@pytest.mark.parametrize(("record", "message"), WRONG)
def test_what_is_no_record_is_no_configuration(record, message):
    with pytest.raises(ValueError, match="`token_symmetry`") as error:
        tiny_config(token_symmetry=record)
    assert message in str(error.value)
    assert tiny_config(token_symmetry=RECORD).token_symmetry == RECORD


FILLING = RECORD["filling"]
TRIVIAL = {"matrices": [], "permutations": [], "frames": {}}
MISFITS = {
    "no filling": ({"filling": {}}, {}, "'matrices'"),
    "another format": ({"symmetry": RECORD["symmetry"] | {"format": 7}}, {}, "`content` must be an object"),
    "cycles of words": ({"symmetry": RECORD["symmetry"] | {"generators": [[["a", "b"]]]}}, {}, "tokens that are text"),
    "nothing": ({"symmetry": RECORD["symmetry"] | {"generators": [[]]}}, {}, "must exchange some tokens"),
    "one token": ({"symmetry": RECORD["symmetry"] | {"generators": [[[5]]]}}, {}, "must exchange some tokens"),
    "no tokens": ({"symmetry": RECORD["symmetry"] | {"vocab_size": 0}}, {}, "`vocab_size` must be at least 1, got 0"),
    "no place": ({"filling": FILLING | {"permutations": [[[10**30]]]}}, {}, "a value in it is absent, impossible or"),
    "token twice": ({"symmetry": RECORD["symmetry"] | {"generators": [[[3, 3]]]}}, {}, "move every token once"),
    "ragged": ({"filling": FILLING | {"matrices": [[[1.0], [1.0, 2.0]]]}}, {}, "`token_symmetry` must be"),
    "no rotation": ({"filling": FILLING | {"matrices": [[[[2.0]]]]}}, {}, "orthogonal matrices"),
    "no permutation": ({"filling": FILLING | {"permutations": [[[0, 0]]]}}, {}, "orthogonal matrices"),
    "more generators": ({"filling": FILLING | {"permutations": [[[0, 1], [1, 0]]]}}, {}, "each of the 1 generators"),
    "other frames": ({"filling": TRIVIAL | {"frames": {"streams": ["matrices", []]}}}, {}, "'streams'"),
    "positions": ({"filling": TRIVIAL | {"frames": {"head_qk": ["matrices", []]}}}, {}, "'head_qk'"),
    "smaller": ({}, {"hidden_size": 8, "num_attention_heads": 4}, "'head_vo', where there is room for 2"),
    "local": ({}, {"local_frames": True}, "one frame for all layers"),
    "gained": ({}, {"post_norm": True}, "whose gains lie in one frame"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_record_that_does_not_fit_is_refused(case, tmp_path):
    change, options, message = MISFITS[case]
    config = tiny_config(**options, token_symmetry=RECORD | change)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        Representation.load(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert Representation.from_config(tiny_config(token_symmetry=RECORD)).to_config() == RECORD


def test_a_frame_that_is_not_there_or_does_not_fit_is_refused(turned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(turned / "turned")
    model.save_pretrained(tmp_path)
    place = tmp_path / SYMMETRY_FRAME
    elements = load_file(place)
    cases = {
        "is not there": lambda: place.unlink(),
        "`elements['stream']` must have the shape": lambda: save_file({"stream": torch.eye(3)[None]}, place),
        "must be keyed by frames of the config, got 'streams'": lambda: save_file({"streams": torch.eye(3)}, place),
        "cut or damaged": lambda: place.write_bytes(b"no tensors"),
    }
    for words, damage in cases.items():
        damage()
        for read in (Representation.load, lambda f: transform_checkpoint(f, tmp_path / "out", random_turn(model))):
            with pytest.raises(ValueError, match="must hold the frame that its `token_symmetry` names") as error:
                read(tmp_path)
            assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    save_file(elements, place)
    assert away(tmp_path) < SYMMETRY[torch.float64]


def test_given_transformations_cannot_be_recorded(tmp_path):
    model = tiny_model()
    symmetry = TokenSymmetry(VOCABULARY, [[[5, 6]]])
    made = Representation(symmetry, [GaugeTransformation.identity(model.config)])
    with pytest.raises(ValueError, match="must be made of parts to be recorded"):
        made.to_config()
    assert symmetrize(model, made).config.token_symmetry is None
    with pytest.raises(ValueError, match="`folder`"):
        Representation.trivial(model.config, symmetry).save(tmp_path)
