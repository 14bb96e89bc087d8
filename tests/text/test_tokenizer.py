"""Tokenizers made here, on texts that are hard for a trainer."""

import random

from rigpt_hf.text import tokenizer


def test_words_of_great_length_are_cut_for_the_trainer_alone(monkeypatch):
    """One word of 300,000 letters would take the trainer as long for each merge as all of a book."""
    draw = random.Random(0)
    word = "".join(draw.choice("abcdefghij") for _ in range(300_000))
    seen = []
    cut = tokenizer._cut
    monkeypatch.setattr(tokenizer, "_cut", lambda passage: seen.append(cut(passage)) or seen[-1])
    made = tokenizer.train_tokenizer([f"A cat.\n\n{word} {' ' * 5000}B.", "Plain text of a book."], 300)
    (parts, plain) = seen
    assert "".join(parts) == f"A cat.\n\n{word} {' ' * 5000}B." and plain == ["Plain text of a book."]
    assert len(parts) > 300 and max(map(len, parts)) < 2100
    assert made.decode(tokenizer.encode(made, [word[:5000]])[0]) == word[:5000]


def test_making_one_says_nothing(capfd):
    """The library's own bars would be on standard output, from outside of Python."""
    tokenizer.train_tokenizer(["A cat.", "A dog."] * 1000, 300)
    assert capfd.readouterr() == ("", "")
