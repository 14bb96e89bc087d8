"""Files of text: one function finds and reads them for every program, and says which file and line is wrong."""

import gzip
import logging

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from rigpt_hf.text import files
from rigpt_hf.text.corpus import read_text
from rigpt_hf.text.files import local_documents, reader_of, source_files, split_files
from rigpt_hf.training.finetune_data import read_rows
from tests.training.texts import lines


def texts(path, **options):
    return list(local_documents(path, **options))


def for_tuning(path, split="train"):
    return [piece.content for piece in read_rows(str(path), split)]


def test_every_program_reads_the_same_files(tmp_path):
    """Columns beside the text may be anything; dates are text; no byte-order mark is read; names in any case."""
    changing = [{"text": f"Row {n}.", "other": None if n < 40_000 else "x" * 200} for n in range(80_000)]
    assert len(lines(changing)) > 10_000_000, "so much that readers by blocks would settle on a type before"
    dates = ["2024-01-01", "2024-02-01T10:00:00"]
    cases = {
        "changing.jsonl": (lines(changing).encode(), [row["text"] for row in changing]),
        "lists.jsonl": (lines([{"text": "A.", "n": [1]}, {"n": None, "text": "B."}]).encode(), ["A.", "B."]),
        "dates.jsonl": (lines({"text": date} for date in dates).encode(), dates),
        "UPPER.JSONL": (b'{"text": "A."}\r\n\r\n{"text": "B."}', ["A.", "B."]),
        "marked.txt": ("\ufeffA.".encode(), ["A."]),
        "marked.jsonl": ("\ufeff".encode() + b'{"text": "A."}', ["A."]),
        "packed.json.gz": (gzip.compress(b'{"text": "A."}'), ["A."]),
        "packed.TXT.gz": (gzip.compress("\ufeffA.".encode()), ["A."]),
        "list.json": (b'[\n {"text": "A."},\n {"text": "B."}\n]', ["A.", "B."]),
        "strings.json": (b'["A.", "B."]', ["A.", "B."]),
        "object.json": (b'{\n "text": "A."\n}', ["A."]),
        "columns.json": (b'{\n "text": ["A.", "B."], "n": [1, 2]}', ["A.", "B."]),
        "late.jsonl": (b'{"n": 1}\n{"text": "A."}\n{"text": null}\n', ["A."]),
        "readme.md": (b"A.", ["A."]),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert texts(path) == expected, name
        assert for_tuning(path) == expected, name
        assert read_text(path) == expected, name
    table = pa.table({"text": pa.array(dates).dictionary_encode(), "n": [1, 2]})
    pa.parquet.write_table(table, tmp_path / "dates.Parquet")
    assert texts(tmp_path / "dates.Parquet") == for_tuning(tmp_path / "dates.Parquet") == dates
    assert reader_of("a.parquet.gz") is reader_of("a.csv") is reader_of("README.md") is None
    assert (tmp_path / "readme.md") not in source_files(tmp_path), "in a folder it tells about the data"


def test_what_is_saved_to_disk_is_read(tmp_path):
    table = Dataset.from_dict({"n": [1, 2, 3], "text": ["A.", None, "B."]})
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "two")
    for folder in ("one", "two", "two/train"):
        assert texts(tmp_path / folder) == for_tuning(tmp_path / folder) == ["A.", "B."], folder
    assert texts(tmp_path / "two", split="test") == for_tuning(tmp_path / "two", "test") == ["B."]
    with pytest.raises(ValueError, match="`data` must have a column `text` .* with the columns n. Rename"):
        table.select_columns(["n"]).save_to_disk(tmp_path / "bare")
        for_tuning(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"with the split 'dev', got .*two"):
        texts(tmp_path / "two", split="dev")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(ValueError, match="`source` must hold files .* that can be read, got .*one'"):
        texts(tmp_path / "one")


def test_an_empty_shard_is_skipped_and_said(tmp_path, caplog):
    contents = {"a.jsonl": b"\n \n", "b.jsonl.gz": gzip.compress(b""), "c.txt": b" \n", "d.json": b"", "e.txt": b"A."}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    empty = Dataset.from_dict({"text": ["x"]}).select([])
    empty.to_parquet(tmp_path / "f.parquet")
    pa.parquet.write_table(pa.table({}), tmp_path / "g.parquet")
    (tmp_path / "h.parquet").touch()
    for read in (texts, for_tuning):
        files._say_empty.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert read(tmp_path) == ["A."]
        said = {record.message.split("'")[1].rpartition("/")[2] for record in caplog.records}
        assert said == {path.name for path in tmp_path.iterdir()} - {"e.txt"} and len(caplog.records) == len(said)
        caplog.clear()
    assert texts(tmp_path / "a.jsonl") == [] and not caplog.records


def test_splits_of_a_folder(tmp_path):
    names = ("train-0.jsonl", "data/training/b.jsonl", "test/c.jsonl", "val.txt", "README.md", "notes.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}' if name.endswith("l") else name)
    splits = {split: [path.name for path in inside] for split, inside in split_files(tmp_path).items()}
    assert splits == {"train": ["b.jsonl", "train-0.jsonl"], "test": ["c.jsonl"], "validation": ["val.txt"]}
    assert for_tuning(tmp_path) == ["data/training/b.jsonl", "train-0.jsonl"]
    assert for_tuning(tmp_path, "train[1:]+test") == ["train-0.jsonl", "test/c.jsonl"]
    assert for_tuning(tmp_path, "train[:50%]") == ["data/training/b.jsonl"]
    for split in ("dev", "train[x]", "train[", ""):
        with pytest.raises(ValueError, match="`data_split` must be one of train, test, validation, or a slice"):
            read_rows(str(tmp_path), split)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "constraint.txt").write_text("A.")
    assert list(split_files(tmp_path / "plain")) == ["train"]


def test_what_is_wrong_is_said_with_file_and_line(tmp_path):
    unreadable = "`source` must hold files of UTF-8 text, JSON or Parquet that can be read, got '.*/{}': {}"
    cases = {
        "a.jsonl": (b'{"text": "A."}\n\n{"text"\n', "line 3 is not JSON: Expecting"),
        "b.jsonl": (b'{"text": "A."}\n3\n', "row 1 must be an object, got '3'"),
        "c.jsonl": (b'{"text": "\\ud83d"}\n{"text": "A."}\n', "from line 1 on a text has half of a surrogate pair"),
        "c2.jsonl": (b'{"text": "A."}\n{"text": "\\ude00"}\n', "from line 2 on a text has half of a surrogate pair"),
        "c3.json": (b'{"text":\n ["\\uD800"]}', "from line 1 on a text has half of a surrogate pair"),
        "d.jsonl": (b'{"text": "A."}\n\xff\n', "it is not UTF-8 at byte"),
        "e.json": (b"[" * 100_000, "its brackets are nested too deeply"),
        "f.txt.gz": (gzip.compress(b"A." * 1000)[:-9], "Compressed file ended|CRC"),
        "g.jsonl.gz": (b"no such thing", "Not a gzipped file"),
        "h.parquet": (b"PAR1 and no more", "Parquet"),
        "i.txt": ("A.".encode("utf-16"), "it is not UTF-8 at byte 0"),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=unreadable.format(name, f".*({said})")) as caught:
            texts(tmp_path / name)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    for content, said in (
        (
            [{"body": "x"}] * 1500,
            "`source` must have its texts in the column 'text', got '.*' with body. .* as `text_column`",
        ),
        ([{"text": 3}], "`source` must have text in the column 'text', got int in '.*'. .* as `text_column`"),
    ):
        (tmp_path / "a.jsonl").write_text(lines(content))
        with pytest.raises(ValueError, match=said):
            texts(tmp_path / "a.jsonl")
    for name in ("table.csv", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"1,2")
        with pytest.raises(ValueError, match="must be or hold files that end in .txt, .jsonl, .*Rename or convert"):
            texts(tmp_path / name)
    with pytest.raises(ValueError, match="`text` must be a file or a folder, got '.*nowhere.txt': No such file"):
        read_text(tmp_path / "nowhere.txt")
