"""What fine-tuning makes of text and chats: labels, windows, held-out rows, padding."""

import json
import random
import signal
from itertools import groupby

import datasets
import numpy as np
import pytest

from rigpt_hf.text.tokenizer import END
from rigpt_hf.training import finetune_data as data
from rigpt_hf.training import templates
from tests.training.texts import CHAT, MARKED, PLAIN, TEXT, lines


def test_only_what_the_assistant_says_has_labels(with_template):
    for template in (PLAIN, MARKED):  # by beginnings, by marks
        tokenizer = with_template(template)
        input_ids, labels = data.encode_chat(CHAT, tokenizer)
        text = f"[user] Hi{END}[assistant] Woof, cat.{END}[user] And you?{END}[assistant] Bones!{END}"
        assert tokenizer.decode(input_ids) == text
        spoken = [list(ids) for says, ids in groupby(labels, lambda label: label != data.IGNORED) if says]
        assert [tokenizer.decode(ids) for ids in spoken] == [f"Woof, cat.{END}", f"Bones!{END}"]
        assert set(labels[labels != input_ids]) == {data.IGNORED}


def test_nothing_but_the_assistant_is_trained_wherever_it_begins(with_template):
    """Neither its own prompt, nor a system prompt that the template makes up, is a turn of the assistant."""
    system = "{% if messages[0].role != 'system' %}[system] Be a cat.{{ eos_token }}{% endif %}"
    silent = PLAIN.partition("{% if add")[0]  # has no prompt for the assistant's turn
    calls = PLAIN.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].function.name }}")
    own = f"[assistant] Woof, cat.{END}"
    answers = [f"Woof, cat.{END}", f"Bones!{END}"]
    for template, expected in (
        (PLAIN, answers),
        (MARKED, answers),
        (system + PLAIN, answers),
        (system + MARKED, answers),
        (system + calls, answers),
        (system + silent, [own, f"[assistant] Bones!{END}"]),
    ):
        tokenizer = with_template(template)
        for chat in (CHAT, CHAT[1:], [{"role": "system", "content": "Hm."}, *CHAT[1:]]):
            _, labels = data.encode_chat(chat, tokenizer)
            spoken = [list(ids) for says, ids in groupby(labels, lambda label: label != data.IGNORED) if says]
            assert [tokenizer.decode(ids) for ids in spoken] == expected, (template, chat)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "purr"}}]}
    _, labels = data.encode_chat([call], with_template(system + calls))
    assert tokenizer.decode(labels[labels != data.IGNORED]) == f"purr{END}"
    for chat in ([call], [*CHAT, call]):
        with pytest.raises(ValueError, match="got one that leaves `tool_calls` out of row 3. Give another"):
            data.encode_chat(chat, with_template(PLAIN.replace("m.content", "(m.content or '')")), "row 3")
    # Where the first turn is written in another way than later ones, nobody knows where it begins.
    first = PLAIN.replace("{{ m.content }}", "{{ m.content | upper if loop.first else m.content }}")
    with pytest.raises(ValueError, match="`chat_template` must render the beginning of a conversation"):
        data.encode_chat(CHAT[1:], with_template(first))


def test_templates_that_fail_or_never_end_are_refused(with_template, monkeypatch):
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for broken, reason in (
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{% for a in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ messages[7].content.x }}", "'dict object' has no|list object has no element 7"),
        ("{% if %}", "Expected an expression"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: maximum recursion"),
        (endless, "it took more than 0.2 seconds"),
    ):
        for template in (broken + PLAIN, broken + MARKED):
            with pytest.raises(ValueError, match=rf"that the chat template accepts, got row 3: ({reason})") as caught:
                data.encode_chat(CHAT, with_template(template), "row 3")
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="it took more than 0.2 seconds"):  # as every beginning is rendered
        data.encode_chat(CHAT * 5000, with_template(PLAIN))
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    data.encode_chat(CHAT, with_template(PLAIN))


def test_content_is_text_or_parts_of_text(tmp_path):
    def part(text):
        return {"type": "text", "text": text}

    def chat(content, **more):
        return [{"role": "user", "content": content} | more, CHAT[1]]

    image, audio = {"type": "image", "url": "cat.png"}, {"type": "input_audio", "text": "Meow."}
    for content, expected in (
        ([part("Hi"), part(" cat")], "Hi cat"),
        ([part("Hi"), {"text": "!"}], "Hi!"),
        ([part("Hi") | {"image": None}], "Hi"),
        ([], ""),
        (None, None),
    ):
        (piece,) = rows_of(tmp_path, [{"messages": chat(content)}])
        assert piece.content[0].get("content") == expected and piece.content[1] == CHAT[1]
    for content in (
        image,
        [image],
        [part("Hi"), image],
        [audio],
        [part(3)],
        [["Hi"]],
        ["Hi"],
        7,
        True,
        {"text": "Hi"},
    ):
        rows = rows_of(tmp_path, [{"messages": CHAT}, {"messages": chat(content)}])
        with pytest.raises(
            ValueError, match="`data` must have text, or parts of .*, got .* in row 1 of '.*rows.jsonl'"
        ):
            list(rows)
    for messages in (
        "Hi",
        {"role": "user"},
        [],
        [None],
        [{"content": "Hi"}],
        [{"role": 1, "content": "Hi"}],
        [{"role": "user"}],
    ):
        rows = rows_of(tmp_path, [{"messages": messages}])
        with pytest.raises(ValueError, match="each with `role` and `content`, in .* in row 0 of '.*rows.jsonl'"):
            list(rows)
    # Tables have every field in every message.
    parts = [{"messages": [{"role": "user", "content": [part("Hi") | {"image": None}], "name": None}]}]
    datasets.Dataset.from_list(parts).to_parquet(tmp_path / "a.parquet")
    (piece,) = data.read_rows(str(tmp_path / "a.parquet"))
    assert piece.content == [{"role": "user", "content": "Hi"}]


def test_a_template_that_rewrites_the_past_must_mark(with_template):
    """As those that drop earlier thoughts: a beginning of the chat is no beginning of the text."""
    last = "{% for m in messages %}{% if loop.last %}>{% endif %}" + PLAIN.removeprefix("{% for m in messages %}")
    with pytest.raises(ValueError, match=r"`chat_template` must render the beginning .* generation"):
        data.encode_chat(CHAT, with_template(last))
    marked = "{% for m in messages %}{% if loop.last %}>{% endif %}" + MARKED.removeprefix("{% for m in messages %}")
    assert (data.encode_chat(CHAT, with_template(marked))[1] != data.IGNORED).any()
    strict = "{{ raise_exception('a system message first') }}"
    with pytest.raises(ValueError, match=r"chats that the chat template accepts, got row 3: a system message first"):
        data.encode_chat(CHAT, with_template(strict), "row 3")


def rows_of(tmp_path, rows, name="rows.jsonl"):
    (tmp_path / name).write_text(lines(rows))
    return data.read_rows(str(tmp_path / name))


def test_a_data_set_that_is_a_program_has_a_remedy(monkeypatch):
    reasons = ["Dataset scripts are no longer supported, but found texts.py", "Out of luck"]

    def load_dataset(*arguments, **options):
        raise RuntimeError(reasons.pop(0))

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    remedy = "but found texts.py. The Hub .* pass `--data-revision refs/convert/parquet`"
    with pytest.raises(ValueError, match=f"`data` must be .* got 'a/texts'.* Hub gave: Dataset .* {remedy}"):
        data.read_rows("a/texts")
    with pytest.raises(ValueError, match="got 'a/texts'. There is no such file, and the Hub gave: Out of luck$"):
        data.read_rows("a/texts")


def test_what_is_held_out_depends_on_content_alone(tmp_path):
    rows = [{"text": f"Passage {n % 90} of a book."} for n in range(100)]
    rows += [{"messages": [{"role": "user", "content": str(n)}, CHAT[1]]} for n in range(50)]
    shuffled = random.Random(0).sample(rows, len(rows))

    def held(rows, name, share):
        table = rows_of(tmp_path, rows, name)
        mask, fingerprint = data.hold_out(table, share)
        contents = [json.dumps(piece.content) for piece in table]
        return sorted(c for c, out in zip(contents, mask, strict=True) if out), fingerprint

    expected, fingerprint = held(rows, "a.jsonl", 0.3)
    assert 25 < len(expected) < 65 and len(expected) > len(set(expected)), "equal rows are on one side"
    again, other = held(shuffled, "b.jsonl", 0.3)
    assert again == expected and other != fingerprint
    fewer = held(shuffled[:75], "c.jsonl", 0.3)[0]
    assert 0 < len(fewer) < len(expected) and set(fewer) <= set(expected)
    assert set(expected) < set(held(rows, "d.jsonl", 0.6)[0])
    assert len(held(rows[:20], "e.jsonl", 1e-9)[0]) == 1, "at least one"
    assert held(rows, "f.jsonl", 0.0)[0] == []
    with pytest.raises(ValueError, match=r"got 0.3 of 1 piece.* between blank lines: put blank lines"):
        held(rows[:1], "g.jsonl", 0.3)
    with pytest.raises(ValueError, match=r"got 1.0 of 9 piece\(s\) of text, of which 1 differ"):
        held(rows[:1] * 9, "h.jsonl", 1.0)


def test_passages_of_a_file_stay_one_document(tokenizer, tmp_path):
    files = {"a.txt": "One.\n\nTwo, \nand on.\n \n\nThree.\n", "b.txt": "Four.", "c.txt": " \n"}
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    rows = data.read_rows(str(folder))
    assert [piece.content.strip() for piece in rows] == ["One.", "Two, \nand on.", "Three.", "Four."]
    documents = data.encode(rows, np.ones(4, dtype=bool), tokenizer, 1000)["input_ids"]
    assert [tokenizer.decode(ids) for ids in documents] == [files["a.txt"] + END, files["b.txt"] + END]
    (ids,) = data.encode(rows, np.array([True, False, True, False]), tokenizer, 1000)["input_ids"]
    assert tokenizer.decode(ids) == "One.\n\nThree.\n" + END


def test_rows_without_text_and_chat_are_counted(tmp_path):
    empty: list[dict] = [{"text": " "}, {"text": None}, {"prompt": "Who?"}, {"messages": None, "text": ""}]
    for more in ([], [{"text": "One."}, {"messages": CHAT}]):
        rows = rows_of(tmp_path, [*more, *empty, {"text": "Two."}])
        for _ in range(2):
            assert len(list(rows)) == len(more) + 1 and rows.blank == len(empty)


def test_parts_are_the_whole_text(tokenizer, tmp_path):
    rows = rows_of(tmp_path, [{"text": TEXT}, {"text": ""}, {"text": "The end."}])
    examples = data.encode(rows, np.ones(2, dtype=bool), tokenizer, 16)
    assert examples["labels"] == examples["input_ids"] and max(map(len, examples["input_ids"])) == 16
    joined = [token for ids in examples["input_ids"] for token in ids]
    assert tokenizer.decode(joined) == TEXT + END + "The end." + END


def test_parquet_and_lists_are_read(tmp_path):
    expected = [CHAT, CHAT[:2]]
    table = datasets.Dataset.from_dict({"messages": expected, "id": [1, 2]})
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([{"messages": chat} for chat in expected]))
    for name in ("a.parquet", "a.json"):
        assert [piece.content for piece in data.read_rows(str(tmp_path / name))] == expected
