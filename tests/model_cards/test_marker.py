"""The hidden line of a generated card: it tells whose weights it describes, and whether somebody changed it."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from rigpt_hf.model_cards.card import render
from rigpt_hf.model_cards.marker import for_repository, is_unchanged, read_marker, without_marker
from rigpt_hf.model_cards.metadata import AuthorMetadata
from tests.model_cards.test_card import CASES


def test_a_card_knows_what_it_was_written_from():
    for name in CASES:
        known = CASES[name]
        text = render(known, "me/my-rigpt")
        marker = read_marker(text)
        assert marker.weights == known.fingerprint and marker.repo == "me/my-rigpt" and is_unchanged(text, marker)
        assert marker.author_metadata == known.author and (marker.results is None) == (known.evaluation is None)
        assert render(replace(known, author=marker.author_metadata), "me/my-rigpt") == text
        assert text.endswith(" -->\n") and text.count("<!--") == 1
        # As when a tokenizer is pushed: the library reads the card and lays out its metadata anew.
        again = str(ModelCard(text))
        assert is_unchanged(again, read_marker(again))


def test_changes_are_seen():
    text = render(CASES["trained"], "me/my-rigpt")
    marker = read_marker(text)
    for old, new in (("Writes docstrings.", "Writes prose."), ("apache-2.0", "mit"), ("## Limits", "## Bounds")):
        assert old in text and not is_unchanged(text.replace(old, new), marker)
    assert is_unchanged(text.replace("\n", "\r\n"), marker)


def test_people_cannot_end_the_comment():
    author = AuthorMetadata(title="Mine", description="An arrow --> and <!-- another", license="mit")
    text = render(replace(CASES["bare"], author=author))
    line = text.splitlines()[-1]
    assert line.count("-->") == 1 and line.endswith("-->") and read_marker(text).author_metadata == author


def test_a_card_is_made_to_fit_a_repository():
    """As if it had been written for it."""
    for before in (None, "me/other"):
        for name in CASES:
            text = render(CASES[name], before)
            assert text != render(CASES[name], "you/123")
            assert for_repository(text, "you/123") == render(CASES[name], "you/123")
            ModelCard(for_repository(text, "you/123"))


def test_what_people_wrote_stays():
    mine = '# Mine\n\nfrom_pretrained("FOLDER")\n'
    assert read_marker(mine) is None and for_repository(mine, "me/b") == mine
    changed = render(CASES["bare"]).replace("# RiGPT\n", "# My own title\n").replace("## Limits", "## Bounds")
    fitted = for_repository(changed, "me/b")
    assert "# My own title\n" in fitted and "## Bounds" in fitted and 'from_pretrained("me/b"' in fitted
    assert "FOLDER" not in without_marker(fitted) and not is_unchanged(fitted, read_marker(fitted))
    again = for_repository(fitted, "me/c")
    assert 'from_pretrained("me/c"' in again and not is_unchanged(again, read_marker(again))


def test_a_broken_marker_is_refused():
    text = render(CASES["bare"])
    for broken in ('{"weights": 1}', "{}", '{"weights"}'):
        damaged = without_marker(text) + f"<!-- rigpt card {broken} -->\n"
        with pytest.raises(ValueError, match="`card` must end with the comment of rigpt card .* or remove that line"):
            read_marker(damaged)
