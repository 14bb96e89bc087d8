"""Sources of text: every kind gives its documents, and each mistake is named."""

import gzip
import json
import tracemalloc
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset

from rigpt_hf.checkpoints import read
from rigpt_hf.text import files, sources
from rigpt_hf.text.sources import documents
from rigpt_hf.training import build
from rigpt_hf.training.options import DataOptions, parse_options


@pytest.fixture
def folder(tmp_path):
    """Files of every kind, with blank texts and other columns among them."""
    (tmp_path / "a.txt").write_text("First.\n<|endoftext|>\nSecond,\nof two lines.\n<|endoftext|>\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in ("Third.", "", "4th.")))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"other": 1, "text": "Fifth."}))
    Dataset.from_dict({"text": ["Sixth.", None, "  "], "m": [1, 2, 3]}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "e.json").write_text(json.dumps([{"text": "Seventh."}]))
    (tmp_path / "f.jsonl").touch()
    (tmp_path / "ignored.csv").write_text("text\nno\n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "g.txt").write_text("no")
    return tmp_path


def test_a_folder_gives_the_documents_of_its_files_in_order(folder):
    expected = ["First.", "Second,\nof two lines.", "Third.", "4th.", "Fifth.", "Sixth.", "Seventh."]
    assert list(documents(str(folder))) == expected
    assert list(documents(folder / "d.parquet")) == ["Sixth."]


def test_a_text_file_is_one_document_unless_it_holds_the_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One.\n\nStill one.\n")
    assert list(documents(path)) == ["One.\n\nStill one.\n"]
    assert list(documents(path, separator="\n\n")) == ["One.", "Still one."]


def test_separators_at_the_border_of_what_is_read_at_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("ab--cd---e--")
    for chunk in (1, 2, 3, 100):
        monkeypatch.setattr(files, "CHUNK", chunk)
        assert list(documents(tmp_path / "a.txt", separator="--")) == ["ab", "cd", "-e"], chunk


def test_a_long_file_is_not_read_whole(tmp_path):
    (tmp_path / "a.txt").write_text(("x" * 1000 + "\n\n") * 20_000)
    size = (tmp_path / "a.txt").stat().st_size

    def peak(**options) -> int:
        tracemalloc.start()
        assert sum(len(text) for text in documents(tmp_path / "a.txt", **options)) >= 20_000 * 1000
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(separator="\n\n") < size / 2 < size <= peak()


def test_documentation_of_installed_packages(monkeypatch):
    asked, passages = [], ["A passage.", "Another."]
    monkeypatch.setattr(
        sources, "gather_documentation", lambda *given, **more: asked.append((given, more)) or passages
    )
    assert list(documents("docs", megabytes=0.5)) == ["A passage.", "Another."]
    assert asked == [((500_000,), {"part": "training"})]


class Hub:
    """What `datasets` and the Hub's client would answer."""

    def __init__(self, rows=None, error=None):
        self.rows, self.error, self.asked = rows, error, []

    def load_dataset(self, **options):
        self.asked.append(options)
        if self.error:
            raise self.error
        return IterableDataset.from_generator(lambda: iter(self.rows))

    def dataset_info(self, source, revision):
        if self.error:
            raise self.error
        return SimpleNamespace(sha=f"commit of {revision}")


@pytest.fixture
def hub(monkeypatch):
    def install(**facts) -> Hub:
        fake = Hub(**facts)
        monkeypatch.setattr("datasets.load_dataset", fake.load_dataset)
        monkeypatch.setattr(sources, "HfApi", lambda: fake)
        return fake

    return install


def test_a_data_set_on_the_hub_is_streamed_at_a_revision(hub, tmp_path):
    fake = hub(rows=[{"body": "One.", "n": 1}, {"body": None, "n": 2}, {"body": "Two.", "n": 3}])
    texts = documents("someone/texts", text_column="body", split="test", name="small", revision="abc")
    assert list(texts) == ["One.", "Two."]
    expected = {"path": "someone/texts", "name": "small", "split": "test", "revision": "abc", "streaming": True}
    assert fake.asked == [expected]
    # Nothing else has a commit.
    assert sources.pinned("someone/texts", "main") == "commit of main"
    assert sources.pinned("docs", None) is sources.pinned(str(tmp_path), None) is None


def test_a_hub_that_gives_nothing_is_named(hub):
    remedy = "but found texts.py. The Hub .* pass `data_options: {revision: refs/convert/parquet}`"
    for error, said in (
        (ConnectionError("Couldn't reach\n 'a/texts' on the Hub"), "Couldn't reach 'a/texts' on the Hub$"),
        (RuntimeError("Dataset scripts are no longer supported, but found texts.py"), f"Dataset scripts .* {remedy}"),
        (RuntimeError("Out of luck"), "Out of luck$"),
    ):
        hub(error=error)
        rule = f"`source` must be data that `datasets` can read, got 'a/texts'. There .* gave: {said}"
        with pytest.raises(ValueError, match=rule):
            list(documents("a/texts"))
    hub(error=ConnectionError("no network"))
    with pytest.raises(ValueError, match="`source` must be data that `datasets` can read, got 'a/texts'.* no network"):
        sources.pinned("a/texts", None)


@pytest.mark.parametrize("preset", ["gpt2-124m-openwebtext", "stock-gpt2-124m-openwebtext"])
def test_openwebtext_is_read_as_parquet(hub, monkeypatch, tokenizer, tmp_path, preset):
    fake = hub(rows=[{"text": f"Page {n} of the web."} for n in range(300)])
    monkeypatch.setattr(build, "load_tokenizer", lambda name, revision: tokenizer)
    options = parse_options(["--config", preset, "--data-dir", str(tmp_path / "data"), "--eval-share", "0.1"])
    build.ensure_data(options, progress=False)
    (asked,) = fake.asked
    branch = "refs/convert/parquet"
    assert (asked["path"], asked["revision"]) == ("Skylion007/openwebtext", f"commit of commit of {branch}")
    # The same again finds what is there, by the branch or by its commit, and no other.
    build.ensure_data(options)
    options.data_options["revision"] = f"commit of commit of {branch}"
    build.ensure_data(options)
    assert len(fake.asked) == 1
    options.data_options["revision"] = "main"
    with pytest.raises(
        ValueError, match=f"what `data_options.revision` says, got .* made with '{branch}' instead of 'main'"
    ):
        build.ensure_data(options)


def test_impossible_sources(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name, content in (("a.txt", b" \n"), ("b.txt", b"\xff\xfe\xff"), ("d.parquet", b"no such thing")):
        (other / name).write_bytes(content)
    (other / "c.jsonl").write_text('{"text": "a"}\nnot json\n')
    (other / "e.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000)
    (other / "empty").mkdir()
    unreadable = "`source` must hold files of UTF-8 text, JSON or Parquet that can be read, got"
    column = "`source` must have its texts in the column 'body', got .* with text, .* as `text_column`"
    for source, options, message in (
        (folder / "b.jsonl", {"text_column": "body"}, column),
        (folder / "d.parquet", {"text_column": "body"}, column),
        (
            folder / "b.jsonl",
            {"text_column": "n"},
            "`source` must have text in the column 'n', got int in .* as `text_column`",
        ),
        (other / "a.txt", {}, "`source` must hold some text, got .*a.txt', where all is blank"),
        (other / "b.txt", {}, f"{unreadable} .*b.txt': it is not UTF-8 at byte 0"),
        (other / "c.jsonl", {}, f"{unreadable} .*c.jsonl': line 2 is not JSON: Expecting value"),
        (other / "e.jsonl", {}, f"{unreadable} .*e.jsonl': line 2 is not JSON: its brackets are nested too deeply"),
        (other / "d.parquet", {}, f"{unreadable} .*d.parquet': "),
    ):
        with pytest.raises(ValueError, match=message):
            list(documents(source, **options))
    nowhere = "`source` must be 'docs', an existing file .*, got '.*'. Check the path"
    for source, options, message in (  # at once, before anything is read
        *((name, {}, nowhere) for name in ("./nowhere", "nowhere/at/all", "nowhere.txt", "some/texts.jsonl")),
        (other / "empty", {}, "`source` must be or hold files that end in .txt, .*, got"),
        (other / "a.txt", {"separator": ""}, "`separator` must be some text, got ''"),
        ("docs", {"megabytes": 0}, "`megabytes` must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            documents(source, **options)


def test_a_tokenizer_made_here_and_the_shards_see_one_commit(tmp_path, monkeypatch):
    """A branch may move between two readings, so it is resolved once."""
    seen = {}

    def read(source, **options):
        seen["tokenizer"] = options
        return iter(["some text of a page"] * 400)

    def write(source, tokenizer, path, **options):
        seen["shards"] = options
        path.mkdir()

    monkeypatch.setattr(build, "pinned", lambda source, revision: f"commit of {revision}")
    monkeypatch.setattr(build, "documents", read)
    monkeypatch.setattr(build, "prepare", write)
    asked = {"name": "part", "revision": "branch"}
    options = DataOptions(str(tmp_path / "data"), "owner/pages", asked, tokenizer="train:300")
    build.ensure_data(options)
    assert seen["tokenizer"] == {"name": "part", "revision": "commit of branch"}
    assert seen["shards"]["revision"] == "commit of branch" and asked["revision"] == "branch"


def test_a_tokenizer_is_asked_for_by_revision(tmp_path, monkeypatch):
    asked = []

    class Hub:
        @staticmethod
        def from_pretrained(name, revision, trust_remote_code):
            asked.append((name, revision))
            raise OSError("no network")

    monkeypatch.setattr(read, "AutoTokenizer", Hub)
    options = DataOptions(str(tmp_path / "data"), "docs", tokenizer="owner/tokenizer", tokenizer_revision="abc")
    with pytest.raises(ValueError, match="`tokenizer` must come with a tokenizer that loads, .* no network"):
        build.ensure_data(options)
    assert asked == [("owner/tokenizer", "abc")]
