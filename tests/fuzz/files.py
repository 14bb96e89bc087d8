"""Bad data, and bad files beside models: suites, metadata, results, transformations, templates, shards."""

import gzip
import io
import json
from typing import Any

import pandas

from .cases import PLACES, Case, Draw, damage, kind, misplace
from .models import TEMPLATES
from .world import CHATS, COMMANDS, TEXT


def replaced(words: list[str], old: str, new: str) -> list[str]:
    return [new if word == old else word for word in words]


def parquet(rows: int, column: str = "text") -> bytes:
    buffer = io.BytesIO()
    pandas.DataFrame({column: ["the cat"] * rows}).to_parquet(buffer)
    return buffer.getvalue()


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


MANY = [{"text": f"the cat saw {n}"} for n in range(300)]
BAD = {
    "empty.txt": b"",
    "blank.txt": b" \n\n\t\n",
    "mark.txt": b"\xef\xbb\xbf",
    "latin.txt": "caf\xe9 ".encode("latin-1") * 200,
    "utf16.txt": TEXT.encode("utf-16"),
    "one.txt": b"a",
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n",
    "cut.jsonl": lines(*MANY)[:-9],
    "object.json": b'{"text": 7}',
    "numbers.jsonl": b"1\n2\n",
    "number.jsonl": lines({"text": 7}, {"text": 8}),
    "lists.jsonl": lines({"text": ["a"]}, {"text": ["b"]}),
    "column.jsonl": lines({"body": "the cat"}),
    "mixed.jsonl": lines(*MANY, {"text": 7}),
    "deep.jsonl": b'{"text": ' + b"[" * 50_000 + b"\n",
    "cut.jsonl.gz": gzip.compress(lines(*MANY))[:-20],
    "not.jsonl.gz": b"not compressed",
    "none.parquet": parquet(0),
    "cut.parquet": parquet(300)[:-40],
    "column.parquet": parquet(300, "body"),
    "table.csv": b"text\nthe cat\n",
    "bare": TEXT.encode(),
}
ODD = {
    "marked.txt": b"\xef\xbb\xbf" + TEXT.encode(),
    "zeros.txt": b"\0" * 3000,
    "long.txt": b"the cat saw " * 250_000,
    "markup.txt": b"[/b] {{ 1/0 }} [red]\n\n" * 100,
    "array.json": json.dumps(MANY).encode(),
    "changes.jsonl": lines(*MANY, *({"text": "a dog", "other": [1, {"a": 2}]} for _ in MANY)),
    "dates.jsonl": lines(*({"text": f"2024-01-{n % 28 + 1:02}"} for n in range(300))),
    "good.jsonl.gz": gzip.compress(lines(*MANY)),
    "UPPER.JSONL": lines(*MANY),
}
CHAT: list[Any] = [
    [], "text", None, 7, {"role": "user"}, [{"role": "user"}], [{"content": "a"}], [["user", "a"]],
    [{"role": 7, "content": "a"}], [{"role": "user", "content": 7}], [{"role": "user", "content": {"a": 1}}],
    [{"role": "user", "content": [{"type": "image", "url": "x"}]}], [{"role": "assistant", "content": ["a", "b"]}],
]  # fmt: skip


@kind(4)
def data(draw: Draw) -> Case:
    once = ("verify-stock", "merge", "charges-measure", "demo-text", "evaluate")
    name = draw.choice((*once, *("prepare", "finetune", "chat") * 2))
    words = COMMANDS[name].words
    old = next(word for word in words if word in ("in/text.txt", "in/chats.jsonl", "in/rows.jsonl"))
    said, fine, content = "odd.jsonl", None, b""
    if name == "chat":
        place, row = draw.randrange(40), {"messages": draw.choice(CHAT)}
        fine = "it is left out, and said" if row["messages"] is None else None
        content = lines(*([*CHATS[:place], row, *CHATS[place:]] if draw.random() < 0.7 else [row]))
        fine = "a row without a chat, among others, is none" if row["messages"] is None else None
    elif draw.random() < 0.1:
        said = draw.choice(PLACES)
        misplace(draw.work / "in" / said, said)
    else:
        said = draw.choice([*BAD, *ODD])
        content = (BAD | ODD)[said]
        fine = "text, if odd" if said in ODD or said == "bare" else None
        if name == "evaluate":
            fine = {"mixed.jsonl": "no more is read than it needs", "one.txt": "a token after the first"}.get(
                said, fine
            )
    if content or said not in PLACES:
        (draw.work / "in" / said).write_bytes(content)
    shown = content.decode("utf-8", "replace")[-60:] if name == "chat" else said
    return Case(name, f"data: {shown}", fine, replaced(words, old, f"in/{said}"))


FILES = [
    ("evaluate", "in/suite.yaml"), ("card", "in/metadata.yaml"), ("publish", "in/metadata.yaml"),
    ("rotate-file", "in/turn.st"), ("chat", "in/template.jinja"), ("pretrain", "in/shards/manifest.json"),
    ("pretrain", "in/shards/train-00000.bin"), ("space", "in/rigpt/certificate.json"),
    ("card", "in/rigpt/certificate.json"), ("verify", "in/rigpt/.rigpt-written.json"),
    *((name, "--config") for name in ("demo", "prepare", "finetune")),
    *((name, "--results") for name in ("card", "publish")),
]  # fmt: skip
YAML = ("a: [", "!!python/object/apply:os.system ['touch canary']", "- 1\n- 2", "7", "steps: many", "? [a]\n: 1",
    "a: &a [*a]", "seed: .nan", "no_such_key: 1", "tasks: 7", "tasks: [{metric: nothing}]", "title: [1, {a: 2}]",
    "language: 7", "base_model: {a: 1}", "text: {documents: -1}", "tasks: []", "\ttab: 1")  # fmt: skip


@kind(3)
def side(draw: Draw) -> Case:
    name, path = draw.choice(FILES)
    words, fine = COMMANDS[name].words, None
    if path.startswith("--"):
        words, path = [*words, path, "in/more.yaml"], "in/more.yaml"
        (draw.work / path).write_text("{}")
    file = draw.work / path
    if path.endswith(".yaml") and draw.random() < 0.7:
        file.write_text(said := draw.choice(YAML))
    elif path.endswith(".jinja"):
        file.write_bytes((said := draw.choice((*TEMPLATES, "\xff"))).encode("latin-1"))
    else:
        said = damage(draw, file)
    if path.startswith("in/rigpt/"):
        fine = "what was said before is stated, or not read"
    return Case(name, f"{path}: {said[:60]!r}", fine, words)
