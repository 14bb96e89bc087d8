"""`rigpt generate` and the verbs that train: what they write is what the model says, and what the programs make."""

import io
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rigpt_hf.cli.generation import tokens_of
from rigpt_hf.training.finetune import main as finetune_program

from .conftest import in_one_line


PROMPT = "a b c a"
TEMPLATE = "{% for m in messages %}a c {{ m.content }} {% endfor %}"


def expected(folder, prompt: str, new: int) -> str:
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)  # the tokenizer's padding may be a word
    whole = model.eval().generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def texts(said: str) -> list[str]:
    return [json.loads(line)["text"] for line in said.splitlines()]


@pytest.mark.parametrize("name", ["rigpt", "gpt2"])
def test_the_likeliest_text_is_shown_as_it_is_written(done, folders, name, caplog):
    wanted = expected(folders / name, PROMPT, 5)
    said = done("generate", folders / name, PROMPT, "--max-new-tokens", 5, "--device", "cpu")
    assert said == wanted + "\n" and (wanted.strip() or name == "gpt2")
    assert any("ended the text at once." in record.message for record in caplog.records) == (not wanted.strip())
    lines = done("generate", folders / name, PROMPT, "--max-new-tokens", 5, "--device", "cpu", "--json")
    assert json.loads(lines) == {"prompt": PROMPT, "text": wanted, "seed": 0}


def test_drawn_texts_are_those_of_their_seeds(done, folders):
    words = ("generate", folders / "rigpt", PROMPT, "--temperature", 2, "--max-new-tokens", 8, "--json")
    three = texts(done(*words, "--samples", 3, "--seed", 1))
    assert len({*three}) == 3 and three[1:] == texts(done(*words, "--samples", 2, "--seed", 2))
    # Of so few words one alone is likely enough.
    (greedy,) = texts(done("generate", folders / "rigpt", PROMPT, "--max-new-tokens", 8, "--json"))
    assert texts(done(*words, "--top-p", 1e-9)) == [greedy] and greedy not in three


def test_without_a_number_there_are_as_many_tokens_as_fit(done, folders):
    said = done("generate", folders / "rigpt", PROMPT, "--json")
    model, tokenizer = (kind.from_pretrained(folders / "rigpt") for kind in (AutoModelForCausalLM, AutoTokenizer))
    room = model.config.max_position_embeddings - len(tokenizer(PROMPT)["input_ids"])
    assert texts(said) == [expected(folders / "rigpt", PROMPT, min(100, room))]


@pytest.fixture
def with_tokenizer(folders, tmp_path, capsys):
    """The model in a folder of its own, whose tokenizer has these fields."""

    def make(**fields):
        tokenizer = AutoTokenizer.from_pretrained(folders / "rigpt")
        AutoModelForCausalLM.from_pretrained(folders / "rigpt").save_pretrained(tmp_path / "own")
        for name, value in fields.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(tmp_path / "own")
        capsys.readouterr()
        return tmp_path / "own"

    return make


def test_a_prompt_is_piped_in_and_a_chat_has_its_form(done, with_tokenizer, monkeypatch):
    folder = with_tokenizer(chat_template=TEMPLATE)
    monkeypatch.setattr("sys.stdin", io.StringIO("b"))
    said = done("generate", folder, "--chat", "--max-new-tokens", 4, "--json")
    assert texts(said) == [expected(folder, "a c b ", 4)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked, plain = (tokens_of("b", tokenizer, chat)[0].tolist() for chat in (True, False))
    assert asked == tokenizer("a c b ")["input_ids"] != plain


def test_a_chat_needs_a_template(rigpt, with_tokenizer):
    folder = with_tokenizer(chat_template=None)
    assert "`--chat` needs a tokenizer with a chat" in in_one_line(rigpt("generate", folder, PROMPT, "--chat"))


def test_an_adapter_is_heard(done, rigpt, folders, tmp_path, capsys, caplog):
    model = AutoModelForCausalLM.from_pretrained(folders / "rigpt")
    torch.manual_seed(0)
    settings = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "up_proj"], lora_alpha=99)
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    words = ("generate", folders / "rigpt", PROMPT, "--max-new-tokens", 8)
    code, said, errors = rigpt(*words, "--adapter", tmp_path / "adapter")
    assert (code, errors) == (0, "") and said != done(*words)
    settings = tmp_path / "adapter/adapter_config.json"
    turned = json.loads(settings.read_text()) | {"base_model_name_or_path": str(folders / "rigpt-untied")}
    settings.write_text(json.dumps(turned))
    assert not caplog.records and rigpt(*words, "--adapter", tmp_path / "adapter")[0] == 0
    assert "whose weights are not those of" in caplog.records.pop().message
    # One of its tensors left out, or by the name of a layer that is not there, or of another shape.
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    name, tensor = sorted(tensors.items())[0]
    others = {key: value for key, value in tensors.items() if key != name}
    for changed in ({}, {name.replace("layers.0", "layers.9"): tensor}, {name: tensor[:, 1:].contiguous()}):
        save_file(others | changed, file)
        assert "`--adapter` must belong to this model" in in_one_line(rigpt(*words, "--adapter", tmp_path / "adapter"))


@pytest.mark.parametrize(
    "words, rule",
    [
        (["--temperature", "-1"], "`--temperature` must be at least 0"),
        (["--samples", "2"], "`--samples` and `--top-p` need a `--temperature` above 0"),
        (["--max-new-tokens", "9999"], "`--max-new-tokens` must fit behind the prompt into the"),
        (["--adapter", "FOLDER"], "`--adapter` must be a folder with adapter_config.json"),
    ],
)
def test_bad_input_ends_in_one_line(rigpt, folders, words, rule):
    words = [str(folders / "rigpt") if word == "FOLDER" else word for word in words]
    assert rule in in_one_line(rigpt("generate", folders / "rigpt", PROMPT, *words))


def test_every_id_needs_a_row(rigpt, with_tokenizer):
    folder = with_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"more{number}" for number in range(99)])
    tokenizer.save_pretrained(folder)
    assert "an embedding for each id of its tokenizer" in in_one_line(rigpt("generate", folder, PROMPT))


def test_bytes_are_no_text(rigpt, folders, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\xfeb"), "utf-8", "surrogateescape"))
    assert "`PROMPT` must be text in UTF-8" in in_one_line(rigpt("generate", folders / "rigpt"))


def test_no_prompt_is_no_text(rigpt, folders):
    assert "`PROMPT` must be a text" in in_one_line(rigpt("generate", folders / "rigpt", ""))


def test_verbs_that_train_are_the_programs(done, rigpt, folders, with_tokenizer, tmp_path, capsys):
    source = with_tokenizer(eos_token="c")
    short = ["--max-steps", "2", "--context-length", "16", "--cpu", "--quiet"]
    done("finetune", source, folders / "text.txt", tmp_path / "verb", *short)
    assert finetune_program([*map(str, (source, folders / "text.txt", tmp_path / "program")), *short]) == 0
    verb, program = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("verb", "program"))
    for (name, ours), theirs in zip(verb.state_dict().items(), program.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    before = AutoModelForCausalLM.from_pretrained(source)
    assert not torch.equal(before.lm_head.weight, verb.lm_head.weight)
    capsys.readouterr()
    words = ("pretrain", "--prepare-only", "--data", tmp_path / "none.txt", "--output-dir", tmp_path / "run")
    assert "none.txt" in in_one_line(rigpt(*words)) and not (tmp_path / "run").exists()


def test_a_model_that_says_nothing_is_noticed(done, with_tokenizer, caplog, monkeypatch):
    """Nothing but spaces, as of a model for chats that is not asked as one."""
    folder = with_tokenizer(chat_template=TEMPLATE)
    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(folder)), "decode", lambda *_, **__: " ")
    for chat, hint in (([], True), (["--chat"], False)):
        caplog.clear()
        done("generate", folder, PROMPT, "--max-new-tokens", 2, "--json", *chat)
        (notice,) = [one.message for one in caplog.records if "ended the text at once" in one.message]
        assert ("try --chat" in notice) == hint
