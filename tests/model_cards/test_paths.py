"""Paths of a machine leave texts, and nothing else does."""

import time

import pytest

from rigpt_hf.text.paths import without_path


def test_paths_become_their_last_part():
    for text, expected in {
        "/home/alice/secret/gpt2 (GPT2LMHeadModel)": "gpt2 (GPT2LMHeadModel)",
        "/home/alice/my secrets/gpt2": "gpt2",
        "../../home/alice/secret/gpt2": "gpt2",
        "runs/alice-client-x/model": "model",
        "from runs/alice-client-x/model and me/b": "from model and me/b",
        "./model": "model",
        "x/../model": "model",
        "~alice/model/": "model",
        "C:\\Users\\alice\\gpt2": "gpt2",
        "file:///home/alice/gpt2": "gpt2",
    }.items():
        assert without_path(text) == expected


def test_quoted_paths_are_paths_to_the_quotation_mark():
    for text, expected in {
        "No such file: '/home/ada/secret dir/model'": "No such file: 'model'",
        'No such file: "/home/ada/secret dir/it\'s/model"': 'No such file: "model"',
        "No such file: '/home/ada/it's a secret/model'.": "No such file: 'model'.",
        "cannot read `~/secret dir/model` now": "cannot read `model` now",
        "got '~ada/secret dir/model', '../secret dir/b/'": "got 'model', 'b'",
        "got 'C:\\Users\\ada\\secret dir\\model'": "got 'model'",
        "got 'D:/secret dir/model'": "got 'model'",
        "got 'file:///home/ada/secret dir/model'": "got 'model'",
        "/home/ada/secret dir/a: no '/home/ada/secret dir/b'": "a: no 'b'",
        "'/home/ada/secret dir/model (GPT2)' failed": "'model (GPT2)' failed",
    }.items():
        assert without_path(text) == expected
        assert "secret" not in expected


def test_ids_addresses_and_prose_stay():
    for text in (
        "openai-community/gpt2",
        "gpt2",
        "https://huggingface.co/me/b",
        "2.5 tokens/s, and/or a / b",
        # In quotation marks too.
        "got 'me/my-model', not 'openai-community/gpt2'",
        "at 'https://huggingface.co/me/b' or `https://a.b/c d/e`",
        "'and / or', '/', '~', the model's own / that of Ada's",
        "`prompt` must be one line",
    ):
        assert without_path(text) == text


@pytest.mark.parametrize("part", ["a", "a.", "~", "-", "a:", "'C:/a ", "file:", "/", "a://"])
def test_long_texts_are_read_once(part):
    """So that a record of somebody else stops no verb: minutes, where every letter is looked at from all before it."""
    begin = time.process_time()
    without_path(part * (100_000 // len(part)))
    assert time.process_time() - begin < 10
