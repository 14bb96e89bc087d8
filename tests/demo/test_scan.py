"""SCAN's commands, against what its paper says of them."""

import pytest

from rigpt_hf.demo import scan


MEANT = {
    "jump": "JUMP",
    "turn left": "LTURN",
    "jump opposite left and walk thrice": "LTURN LTURN JUMP WALK WALK WALK",
    "turn around right": "RTURN RTURN RTURN RTURN",
    "walk after run around left": "LTURN RUN LTURN RUN LTURN RUN LTURN RUN WALK",
    "look right twice": "RTURN LOOK RTURN LOOK",
}


def test_all_commands_are_there_and_mean_what_they_should():
    examples = {" ".join(one.command): " ".join(one.actions) for one in scan.grammar()}
    assert len(examples) == len(scan.grammar()) == 20910
    assert {command: examples[command] for command in MEANT} == MEANT
    assert max(len(one.actions) for one in scan.grammar()) == 48


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("add-jump", 13204, 7706),
        ("around-right", 15225, 5685),
        ("length", 16990, 3920),
        ("add-turn-left", 19702, 1208),
    ],
)
def test_a_split_keeps_what_it_says(name, train, test):
    learned, kept = scan.split(name)
    assert (len(learned), len(kept)) == (train, test) and not set(learned) & set(kept)
    assert set(learned) | set(kept) == set(scan.grammar())
    short = scan.split(name, longest=24)
    assert 0 < len(short[1]) < test and max(len(one.actions) for part in short for one in part) == 24


def test_a_fifth_is_drawn_at_random():
    learned, kept = scan.split("simple")
    assert len(learned) + len(kept) == 20910 and 0.19 < len(kept) / 20910 < 0.21
    assert scan.split("simple", seed=1)[1] != kept == scan.split("simple")[1]


def test_only_answers_and_their_end_have_labels():
    examples = [one for one in scan.grammar() if " ".join(one.command) in MEANT]
    ids, labels = scan.encode(examples)
    for example, row, label in zip(examples, ids, labels, strict=True):
        words = [scan.VOCABULARY[token] for token in row]
        asked = ["<s>", *example.command, "<answer>"]
        answer = [*example.actions, "<end>"]
        assert words[: len(asked) + len(answer)] == asked + answer and set(words[len(asked) + len(answer) :]) <= {
            "<pad>"
        }
        assert [scan.VOCABULARY[token] for token in label if token >= 0] == answer
        assert (label[: len(asked)] == -100).all() and (label[len(asked) : len(asked) + len(answer)] >= 0).all()
    assert scan.encode(examples, 40)[0].shape == (len(examples), 40)
