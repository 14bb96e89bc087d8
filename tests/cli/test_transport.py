"""The verb that carries adapters, autoencoders and vectors, as a person meets it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from rigpt_hf.checkpoints.named import load_rigpt
from rigpt_hf.symmetry import GaugeTransformation, transport
from tests.cli.conftest import in_one_line
from tests.devices import StandIn
from tests.model.agreement import assert_different, assert_same, difference
from tests.models import randomise_, tiny_config, tiny_model, tokens
from tests.tolerances import CONVERSION


peft = pytest.importorskip("peft")
HOOK = "blocks.1.hook_resid_post"
CFG = {"architecture": "standard", "apply_b_dec_to_input": True, "metadata": {"hook_name": HOOK}}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, what was made for it, a transformation of all frames, and the turned model."""
    folder = tmp_path_factory.mktemp("transport")
    model = tiny_model()
    model.save_pretrained(folder / "a")
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), "all")
    g.save(folder / "g.safetensors")
    g(model).save_pretrained(folder / "b")
    tiny_model(converted_from="gpt2").save_pretrained(folder / "gpt2")
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    for name, options in {"lora": {}, "dora": {"use_dora": True}}.items():
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets, **options)
        adapted = randomise_(peft.get_peft_model(load_rigpt(str(folder / "a")), settings), 1, 0.1)
        adapted.save_pretrained(folder / name)
    (folder / "sae").mkdir()
    draw = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (32, 9), "W_dec": (9, 32), "b_enc": (9,), "b_dec": (32,)}
    save_file(
        {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()},
        folder / "sae" / "sae_weights.safetensors",
    )
    save_file({"sparsity": torch.ones(9)}, folder / "sae" / "sparsity.safetensors")
    (folder / "sae" / "cfg.json").write_text(json.dumps(CFG))
    save_file({HOOK: torch.randn(2, 32, generator=draw).double()}, folder / "v.safetensors", {"made": "today"})
    return folder


@torch.no_grad()
def logits(model: str | Path, adapter: Path | None = None) -> torch.Tensor:
    loaded = load_rigpt(str(model))
    if adapter is not None:
        loaded = peft.PeftModel.from_pretrained(loaded, adapter).eval()
    return loaded(tokens(2, 9), use_cache=False).logits


def test_an_adapter_works_on_the_turned_model(done, place, tmp_path):
    out = done(
        "transport",
        place / "lora",
        tmp_path / "out",
        "--from",
        place / "a",
        "--transformation",
        place / "g.safetensors",
    )
    assert "Carried 45 tensors of an adapter through: " in out and "It has biases (`lora_bias`)" in out
    expected = logits(place / "a", place / "lora")
    assert difference(logits(place / "b", tmp_path / "out"), expected) <= CONVERSION[torch.float64]
    assert_different(logits(place / "b", place / "lora"), expected, "the adapter as it was")
    assert_different(logits(place / "a"), expected, "no adapter")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None and settings["lora_bias"] is True
    back = ("--to", place / "a", "--transformation", place / "g.safetensors", "--inverse")
    done("transport", tmp_path / "out", tmp_path / "back", *back)
    assert difference(logits(place / "a", tmp_path / "back"), expected) <= CONVERSION[torch.float64]
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        place / "a"
    )


@pytest.mark.parametrize(
    "made_on, said", [("a", ""), ("copy", ""), ("b", "whose weights are not"), ("x/y", "not seen")]
)
def test_an_adapter_of_another_model_is_noticed(done, place, tmp_path, caplog, made_on, said):
    """Not of a copy, and of a model that is not here it is said that nothing is known."""
    shutil.copytree(place / "lora", tmp_path / "lora")
    shutil.copytree(place / "a", tmp_path / "copy")
    base = {"copy": str(tmp_path / "copy"), "x/y": "x/y"}.get(made_on, str(place / made_on))
    path = tmp_path / "lora/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    words = ("--from", place / "a", "--transformation", place / "g.safetensors")
    caplog.clear()
    done("transport", tmp_path / "lora", tmp_path / "out", *words)
    notices = [record.message for record in caplog.records if "was made on" in record.message]
    assert [said in notice for notice in notices] == [True] * bool(said)


def test_the_transformation_is_found_where_none_is_given(done, place, tmp_path):
    command = ("transport", place / "lora", tmp_path / "out", "--from", place / "a", "--to", place / "b")
    with StandIn() as device:
        out = done(*command, "--device", "cuda")
    assert device.seen["matmul"] > 20
    assert "Distance that alignment leaves between the two" in out
    assert_same(logits(place / "b", tmp_path / "out"), logits(place / "a", place / "lora"))


def test_autoencoders_and_vectors_are_carried_in_their_layout(done, rigpt, place, tmp_path):
    g = GaugeTransformation.load(place / "g.safetensors", tiny_config())
    file = ("--from", place / "a", "--transformation", place / "g.safetensors")
    done("transport", place / "sae", tmp_path / "sae", *file)
    assert sorted(path.name for path in (tmp_path / "sae").glob("[!.]*")) == [
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text()) == CFG
    before, after = (load_file(folder / "sae" / "sae_weights.safetensors") for folder in (place, tmp_path))
    expected = transport(before, g, hook=HOOK, settings=CFG)
    assert before.keys() == after.keys() and all(torch.equal(after[name], expected[name]) for name in after)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert_different(after["W_dec"], before["W_dec"])
    done("transport", place / "v.safetensors", tmp_path / "v.safetensors", *file)
    given, carried = (load_file(folder / "v.safetensors")[HOOK] for folder in (place, tmp_path))
    assert torch.equal(carried, transport({"v": given}, g, hook=HOOK)["v"])
    assert_different(carried, given)
    done("transport", place / "v.safetensors", tmp_path / "other.safetensors", *file, "--hook", "blocks.0.attn.hook_z")
    assert_different(load_file(tmp_path / "other.safetensors")[HOOK], carried)
    refused = rigpt("transport", place / "v.safetensors", tmp_path / "v.safetensors", *file)
    assert "must not exist yet" in in_one_line(refused)
    done("transport", place / "v.safetensors", tmp_path / "v.safetensors", *file, "--force")
    assert [path.name for path in tmp_path.rglob("*.partial")] == []


def test_bad_input_ends_in_one_line_and_leaves_nothing(rigpt, place, tmp_path):
    file = ("--from", place / "a", "--transformation", place / "g.safetensors")
    stock, gpt2 = tmp_path / "stock", place / "gpt2"
    for folder in (stock, tmp_path / "pickled", tmp_path / "raw", tmp_path / "nothing"):
        folder.mkdir()
    settings = json.loads((place / "lora" / "adapter_config.json").read_text())
    (tmp_path / "pickled" / "adapter_config.json").write_text(json.dumps(settings))
    of_gpt2 = tmp_path / "of-gpt2"
    of_gpt2.mkdir()
    GPT2Config(n_embd=8, n_head=2, n_layer=1).save_pretrained(tmp_path / "base")
    for folder, base, kind in ((stock, None, "LlamaForCausalLM"), (of_gpt2, str(tmp_path / "base"), None)):
        changed = settings | {"auto_mapping": kind and {"base_model_class": kind}, "base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        save_file(load_file(place / "lora" / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    raw = CFG | {"metadata": CFG["metadata"] | {"model_from_pretrained_kwargs": {"center_writing_weights": False}}}
    (tmp_path / "raw" / "cfg.json").write_text(json.dumps(raw))
    save_file(load_file(place / "sae" / "sae_weights.safetensors"), tmp_path / "raw" / "sae_weights.safetensors")
    save_file({"v": torch.ones(32, dtype=torch.long)}, tmp_path / "codes.safetensors")
    save_file({"v": torch.full((32,), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((place / "v.safetensors").read_bytes()[:40])
    v = place / "v.safetensors"
    for arguments, words in (
        ((place / "dora", "x", *file), "got DoRA: it divides each coordinate"),
        ((tmp_path / "absent", "x", *file), "`STATE` must be the folder of an adapter of PEFT or of an autoencoder"),
        ((tmp_path / "nothing", "x", *file), "in which there is no adapter_config.json or cfg.json"),
        ((tmp_path / "pickled", "x", *file), "in which there is no adapter_model.safetensors"),
        ((place / "sae", "x"), "must name the two models, or `--transformation` the file of what lies between them"),
        ((place / "sae", "x", "--from", place / "a"), "Add `--to MODEL`"),
        ((stock, "x", *file), "must be an adapter of a RiGPT, got one of LlamaForCausalLM"),
        ((of_gpt2, "x", *file), "must be an adapter of a RiGPT, got one of the model in "),
        ((tmp_path / "raw", "x", "--from", gpt2, *file[2:]), "must not read the mean over coordinates"),
        ((v, "x", *file, "--hook", "blocks.9.hook_resid_pre"), "`--hook` must be blocks.N."),
        ((v, "x", "--from", place / "a", "--transformation", v), "`--transformation` must be a file that `rig"),
        ((tmp_path / "codes.safetensors", "x", *file), "must hold numbers of floating point, got torch.int64 in 'v'"),
        ((tmp_path / "nan.safetensors", "x", *file), "must hold finite numbers"),
        ((tmp_path / "cut.safetensors", "x", *file), "`STATE` must be a file of safetensors"),
        ((v, v, *file), "`OUTPUT` must not"),
        ((place / "lora", "x", *file, "--inverse", "--to", "no/model/at/all"), "`--to` must be the folder of a saved"),
    ):  # fmt: skip
        state, output, *rest = arguments
        line = in_one_line(rigpt("transport", state, tmp_path / output, *rest))
        assert words in line, f"{words} is not in: {line}"
        assert not (tmp_path / "x").exists()
    assert [path.name for path in tmp_path.rglob("*.partial")] == []
