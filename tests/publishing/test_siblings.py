"""Adapters and files in GGUF, in repositories of their own."""

import copy
import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion import convert_model
from rigpt_hf.conversion.gguf import export_gguf
from rigpt_hf.publishing.repository import repository_files
from rigpt_hf.publishing.upload import foreign
from tests.conversion.sources import stock_model
from tests.model.agreement import difference
from tests.models import tokens
from tests.publishing.conftest import WRITE
from tests.publishing.test_publish import load_elsewhere
from tests.tolerances import SYMMETRY


BASE = "me/tiny"


@pytest.fixture
def adapter(folder, tmp_path):
    """An adapter that was trained on the model in `folder`, as PEFT saves it."""
    model = get_peft_model(RiGPTForCausalLM.from_pretrained(folder), LoraConfig(r=2, lora_alpha=4))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    record = {"data": "/home/me/notes.txt", "model": str(folder)}
    result = {"steps": 3, "tokens": 99, "measured_on": "held-out", "loss_before": 3.5, "loss_after": 2.25}
    (tmp_path / "adapter/finetune.json").write_text(json.dumps({"options": record, "result": result}))
    return tmp_path / "adapter"


@pytest.fixture
def gguf(tmp_path):
    convert_model(stock_model("llama-tied", torch.float32)).save_pretrained(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "my-gguf", progress=False)
    return tmp_path / "my-gguf"


def point_to(adapter, base: str) -> None:
    """Let an adapter name another model as its own."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def published(contents) -> dict[str, bytes]:
    return {file.path: file.read() for file in contents.files}


@pytest.mark.slow
def test_an_adapter_loads_from_its_own_repository(hub, folder, adapter, place, rigpt):
    assert rigpt("publish", folder, BASE)[0] == 0
    given = ["--base", BASE, "--collection", "My RiGPT"]
    for repo in ("adapter", "me/adapter"):  # the second time nothing is new
        code, out, err = rigpt("publish", adapter, repo, *given)
        assert code == 0, err
    assert 'PeftModel.from_pretrained(model, "me/adapter", revision="' in out and "Collection: " in out
    assert "Left out" not in out
    files = hub.files("me/adapter")
    assert set(files) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "finetune.json"
    }  # fmt: skip
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    card = files["README.md"].decode()
    for line in (
        f"base_model: {BASE}", "base_model_relation: adapter", "library_name: peft", "# adapter\n",
        "| text | notes.txt |",
        'model = PeftModel.from_pretrained(model, "me/adapter")\n', "| maps that it changes | q_proj, v_proj |",
        "| rank | 2, scaled by 4 / 2 |", "| after | 2.2500 nats per token |",
    ):  # fmt: skip
        assert line in card, line
    for content in files.values():
        assert str(folder.parent).encode() not in content, "no path of this machine goes out"
    assert list(hub.collections.values()) == [["me/adapter"]]

    loaded = AutoModelForCausalLM.from_pretrained("me/adapter").eval()
    own = RiGPTForCausalLM.from_pretrained(folder).eval()
    logits = {model: model(tokens(2, 7)).logits.detach() for model in (loaded, own)}
    own.load_adapter(str(adapter))
    assert difference(logits[loaded], own(tokens(2, 7)).logits.detach()) <= SYMMETRY[torch.float32]
    assert difference(logits[loaded], logits[own]) > 0.01, "the adapter does something"

    # A stranger needs no package of ours: the model brings its code.
    assert load_elsewhere(hub.endpoint, place, [("me/adapter", "main")])[0].startswith("transformers_modules.me.tiny")
    assert difference(torch.load(place / "main.pt"), logits[loaded]) <= SYMMETRY[torch.float32]

    code, _, err = rigpt("publish", adapter, "me/adapter", "--base", BASE, "--collection", " ", "--dry-run")
    assert code == 2 and "`--collection` must be a title" in err

    # What lies there is updated by its own kind alone.
    code, _, err = rigpt("publish", folder, "me/adapter")
    assert code == 2 and "`REPO` must be new, or hold a RiGPT to update" in err
    code, _, err = rigpt("publish", adapter, BASE, *given)
    assert code == 2 and "or hold an adapter to update" in err and "'rigpt'" in err
    assert rigpt("publish", folder, "me/adapter", "--force")[0] == 0
    assert not [name for name in hub.files("me/adapter") if name.startswith("adapter")]
    # But beside a model an adapter is somebody's own, and stays.
    mine = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"mine"}
    hub.put_files(BASE, hub.files(BASE) | mine)
    assert rigpt("publish", folder, BASE)[0] == 0
    assert hub.files(BASE).items() >= mine.items()


def test_a_model_in_gguf_and_its_certificate(hub, gguf, rigpt):
    code, out, err = rigpt("publish", gguf, "small", "--base", BASE)
    assert code == 0, err
    assert "llama-cli -hf me/small" in out
    files = hub.files("me/small")
    assert set(files) == {".gitattributes", "README.md", "my-gguf-F32.gguf", "certificate.json"}
    card = files["README.md"].decode()
    for line in (
        f"base_model: {BASE}",
        "base_model_relation: quantized",
        "llama-cli -hf me/small\n",
        "A RiGPT, a GPT-class",
        "my-gguf-F32.gguf |",
    ):
        assert line in card, line
    assert str(gguf.parent) not in files["certificate.json"].decode() + card

    # A certificate of a file that was changed, or of one of several, stays at home.
    shutil.copyfile(gguf / "my-gguf-F32.gguf", gguf / "other.gguf")
    contents = repository_files(gguf, base=BASE)
    assert "certificate.json" not in published(contents) and "of one of 2 files" in contents.notes[0]
    (gguf / "my-gguf-F32.gguf").unlink()
    contents = repository_files(gguf, base=BASE)
    assert "certificate.json" not in published(contents) and "changed or copied" in contents.notes[0]
    card = published(contents)["README.md"].decode()
    assert "Where the weights come from" not in card and "RiGPT, a GPT-class" not in card


def test_headers_of_gguf_are_looked_at(tmp_path):
    """Files of other programs: a path in the header is said, and an ending that the Hub does not know refused."""
    from gguf import GGUFWriter

    for name, path in {"a.gguf": "/home/me/secret/matrix.dat", "b.gguf": "matrix.dat"}.items():
        writer = GGUFWriter(tmp_path / name, "llama")
        writer.add_string("quantize.imatrix.file", path)
        writer.add_string("tokenizer.chat_template", "/a/b")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (note,) = repository_files(tmp_path, base=BASE).notes
    assert note.startswith("a.gguf has a path in its header") and "quantize.imatrix.file is '/home/me" in note
    (tmp_path / "a.gguf").rename(tmp_path / "a.GGUF")
    with pytest.raises(ValueError, match=r"end in .gguf, got .* with 'a.GGUF'. Name it a.gguf"):
        repository_files(tmp_path, base=BASE)


@pytest.mark.parametrize("holds", ["adapter", "gguf"])
def test_a_person_s_card_stays_and_ours_is_written_once_more(request, holds, tmp_path):
    place = request.getfixturevalue(holds)
    path = place / "README.md"
    path.write_text(f"---\nlicense: mit\nbase_model: {BASE}\n---\n\n# Mine\n")
    for base in (BASE, None):
        assert published(repository_files(place, base=base))["README.md"] == path.read_bytes()
    with pytest.raises(ValueError, match="`card` must name the model .* base_model, 'me/other', got 'me/tiny'"):
        repository_files(place, base="me/other")
    for line in ("base_model: /home/me/model", "license: mit"):
        path.write_text(f"---\n{line}\n---\n\n# Mine\n")
        with pytest.raises(ValueError, match="`card` must name the model on the Hub"):
            repository_files(place, base=BASE)

    path.unlink()
    metadata = tmp_path / "about.yaml"
    metadata.write_text("authors: Emmy")
    written = published(repository_files(place, base=BASE, metadata=metadata))["README.md"]
    path.write_bytes(written)
    again = published(repository_files(place, base="me/other"))["README.md"].decode()
    assert "base_model: me/other" in again and BASE not in again and "Made by Emmy." in again
    # One that was changed since stays, but not beside other files.
    path.write_bytes(written.replace(b"Made by", b"Kept by"))
    assert published(repository_files(place, base=BASE))["README.md"] == path.read_bytes()
    (place / "LICENSE").write_text("None.")
    with pytest.raises(ValueError, match="`card` must be of these files"):
        repository_files(place, base=BASE)


def test_only_an_untouched_card_of_peft_says_nothing(adapter):
    path = adapter / "README.md"
    assert "# Model Card for Model ID" in path.read_text()
    assert "# Model Card for Model ID" not in published(repository_files(adapter, base=BASE))["README.md"].decode()
    path.write_text(path.read_text().replace("[More Information Needed]", "Emmy", 1))
    with pytest.raises(ValueError, match="`card` must name the model on the Hub"):
        repository_files(adapter, base=BASE)


@pytest.mark.parametrize("holds", ["adapter", "gguf"])
def test_what_does_not_go_out(request, holds, tmp_path):
    place = request.getfixturevalue(holds)
    weights = place / ("adapter_model.safetensors" if holds == "adapter" else "my-gguf-F32.gguf")
    assert repository_files(place, base=BASE).files
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="`results` are of a whole model"):
        repository_files(place, base=BASE, results=tmp_path / "results.json")
    with pytest.raises(
        ValueError, match="`base` must be the id of the model on the Hub that this one belongs to, got"
    ):
        repository_files(place)
    with pytest.raises(ValueError, match="`base` must be the id of a model on the Hub such as me/my-rigpt, got 'a b'"):
        repository_files(place, base="a b")
    (place / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="must not hold the state of a training"):
        repository_files(place, base=BASE)
    (place / "optimizer.pt").unlink()
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="`folder` must hold (the )?whole"):
        repository_files(place, base=BASE)
    outside = tmp_path / "outside"
    outside.write_bytes(whole)
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(ValueError, match="hold itself all that is published"):
        repository_files(place, base=BASE)
    weights.unlink()
    weights.write_bytes(whole)
    (place / "LICENSE").write_text(f"see {WRITE}{'0' * 30}")
    with pytest.raises(ValueError, match="must not hold an access token"):
        repository_files(place, base=BASE)


@pytest.mark.parametrize("how", ["dora", "rslora", "patterns"])
def test_kinds_of_lora(folder, how, tmp_path):
    options = {
        "dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "patterns": {"rank_pattern": {"q_proj": 3}}
    }[how]  # fmt: skip
    model = RiGPTForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=4, **options))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    card = published(repository_files(tmp_path / "adapter", base=BASE))["README.md"].decode()
    said = {"dora": "| method | DoRA |", "rslora": "scaled by 4 / √2 |", "patterns": "4 / 2, others for some maps |"}[
        how
    ]
    assert said in card
    # As the card says.
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter")
    logits = [each.eval()(tokens(2, 7)).logits.detach() for each in (adapted, loaded)]
    assert difference(*logits) <= SYMMETRY[torch.float32]


def test_adapters_of_other_methods_are_refused(folder, tmp_path):
    get_peft_model(
        RiGPTForCausalLM.from_pretrained(folder), IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="`folder` must hold an adapter of LoRA, got .* of type 'IA3'. .* hf upload"):
        repository_files(tmp_path / "adapter", base=BASE)


def test_the_configuration_of_an_adapter_names_nothing_of_this_machine(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"corda_config": {"cache": "/home/me/secret.pt"}, "revision": "mine"}
        )
    )
    sent = json.loads(published(repository_files(adapter, base=BASE))["adapter_config.json"])
    assert sent["corda_config"] == {"cache": "secret.pt"} and sent["revision"] is None
    point_to(adapter, "")
    assert "'' is no folder" in repository_files(adapter, base=BASE).notes[0]
    for local in ("runs/mine/model", "secret"):
        point_to(adapter, local)
        with pytest.raises(ValueError, match=f"`base` must be the id .* made on '{local}'"):
            repository_files(adapter)


def test_an_adapter_that_does_not_fit_its_model(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    save_file(tensors | {first: tensors[first] * torch.nan}, path)
    with pytest.raises(ValueError, match=f"`{first}` of .* must hold finite numbers"):
        repository_files(adapter, base=BASE)
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match="`folder` must belong to this model"):
        repository_files(adapter, base=BASE)
    # Of a model of another kind nothing is said here, and of one that is not here nobody can say anything.
    stock = adapter.parent / "stock"
    stock_model("llama-tied", torch.float32).save_pretrained(stock)
    point_to(adapter, str(stock))
    with pytest.raises(ValueError, match="`folder` must hold an adapter of a RiGPT, got .* belongs to a llama"):
        repository_files(adapter, base=BASE)
    point_to(adapter, "you/there")
    contents = repository_files(adapter)
    assert "'you/there' is no folder of this machine" in contents.notes[0]
    assert "RiGPT, a GPT-class" not in published(contents)["README.md"].decode()
    assert json.loads(published(contents)["adapter_config.json"])["base_model_name_or_path"] == "you/there"


def test_a_card_that_is_written_names_the_base(folder):
    with pytest.raises(ValueError, match="`base` is for a card that is written"):
        repository_files(folder, base=BASE, check_loading=False)
    (folder / "README.md").unlink()
    card = published(repository_files(folder, base=BASE, check_loading=False))["README.md"].decode()
    assert f"base_model: {BASE}" in card


def test_of_another_kind_nothing_stays_that_would_be_taken_for_a_part(hub, gguf, rigpt):
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "finetune.json": b"{}"}
    hub.put_files("me/other", adapter | {"mine.txt": b"mine", "tokenizer.json": b"{}"})
    code, _, err = rigpt("publish", gguf, "me/other", "--base", BASE)
    assert code == 2 and "or hold files in GGUF to update" in err and set(adapter) < set(hub.files("me/other"))
    assert rigpt("publish", gguf, "me/other", "--base", BASE, "--force")[0] == 0
    names = set(hub.files("me/other"))
    assert not names & set(adapter) and names > {"mine.txt", "tokenizer.json", "certificate.json"}


@pytest.mark.parametrize(
    "paths, model_type, kind, refused",
    [
        (["adapter_config.json", "adapter_model.safetensors"], None, "adapter", False),
        (["adapter_config.json", "adapter_model.safetensors"], None, None, True),
        (["a.gguf"], None, "gguf", False),
        (["a.gguf"], None, "adapter", True),
        (["a.gguf", "x.bin"], None, "gguf", True),
        (["adapter_config.json", "adapter_model.safetensors", "model.safetensors"], None, "adapter", True),
        (["adapter_config.json", "x.gguf"], None, "adapter", True),
        (["config.json", "model.safetensors"], "rigpt", "gguf", True),
        (["config.json", "model.safetensors"], "rigpt", None, False),
        (["README.md"], None, "gguf", False),
    ],
)
def test_only_the_same_kind_is_replaced(paths, model_type, kind, refused):
    assert bool(foreign(paths, model_type, kind)) == refused
