"""Perplexity and accuracy: numbers that can be worked out by hand, and nothing that depends on how they are got."""

import math

import pytest
import torch
from transformers import GPT2LMHeadModel

from rigpt_hf.conversion import convert_model
from rigpt_hf.evaluation.likelihood import rolling_windows, score
from rigpt_hf.evaluation.measures.cloze import Cloze, cloze_accuracy
from rigpt_hf.evaluation.measures.multiple_choice import MultipleChoice, multiple_choice_accuracy
from rigpt_hf.evaluation.measures.perplexity import detokenize, perplexity
from rigpt_hf.evaluation.models import EvaluatedModel, evaluated
from tests.evaluation.toys import Bigrams, rows, tiny_gpt2, word_tokenizer
from tests.models import tiny_model
from tests.tolerances import SYMMETRY


WORDS = ["<s>", "a", " a", " b", " cc"]
# Row: what came before; every row sums to one, and none is like another.
TABLE = torch.tensor(
    [
        [0.1, 0.5, 0.2, 0.1, 0.1],
        [0.1, 0.1, 0.1, 0.3, 0.4],
        [0.2, 0.1, 0.2, 0.4, 0.1],
        [0.1, 0.1, 0.5, 0.1, 0.2],
        [0.3, 0.1, 0.1, 0.4, 0.1],
    ],
    dtype=torch.float64,
)
TEXT, BYTES = "a b a cc", 8
# a -> b, b -> a, a (after a space) -> cc
NATS = -math.log(0.3 * 0.5 * 0.1)


@pytest.fixture
def bigrams():
    return EvaluatedModel(Bigrams(TABLE), word_tokenizer(WORDS), "bigrams")


def test_perplexity_of_bigrams(bigrams):
    result = perplexity(bigrams, [TEXT])
    # The first token is not asked for, and its byte does not count.
    assert result["tokens"] == 3 and result["words"] == 4 and result["bytes"] == BYTES - 1
    exact = {
        "loss": NATS / 3,
        "perplexity": math.exp(NATS / 3),
        "word_perplexity": math.exp(NATS / 4),
        "byte_perplexity": math.exp(NATS / (BYTES - 1)),
        "bits_per_byte": NATS / (BYTES - 1) / math.log(2),
    }
    for key, value in exact.items():
        assert result[key] == pytest.approx(value, rel=1e-12), key


def test_a_beginning_makes_the_first_token_count(bigrams):
    result = perplexity(bigrams, [TEXT], bos=True)
    assert result["tokens"] == 4
    assert result["loss"] == pytest.approx((NATS - math.log(0.5)) / 4, rel=1e-12)
    assert result["protocol"]["bos"] is True


def test_texts_alone_and_joined(bigrams):
    alone = perplexity(bigrams, [TEXT, TEXT])
    assert alone["tokens"] == 6 and alone["loss"] == pytest.approx(NATS / 3, rel=1e-12)
    assert alone["samples"]["nats"] == pytest.approx([NATS, NATS]) and alone["samples"]["bytes"] == [BYTES - 1] * 2
    joined = perplexity(bigrams, [TEXT, TEXT[1:]], separator="")  # "a b a cc b a cc"
    assert joined["tokens"] == 6
    assert joined["bytes"] == 2 * BYTES - 2
    assert joined["loss"] == pytest.approx((NATS - math.log(0.4 * 0.5 * 0.1)) / 6, rel=1e-12)


def test_windows_ask_for_every_token_once():
    for length in (2, 4, 5, 6, 9, 13):
        for stride in (1, 2, 3, 4):
            tokens = list(range(length))
            windows = list(rolling_windows(tokens, 4, stride))
            assert [target for window in windows for target in window.targets] == tokens[1:]
            for window in windows:
                assert len(window.inputs) <= 4 and len(window.targets) <= len(window.inputs)
                # What is read ends just before the last token that is asked for, without gaps.
                assert window.inputs == list(range(window.targets[-1] - len(window.inputs), window.targets[-1]))
            # Later windows have as much before them as fits.
            assert all(len(window.inputs) == 4 for window in windows[1:])


def test_strides_change_what_is_read_not_what_is_asked():
    model, data = tiny_model(), rows(2, 50)
    found = {stride: perplexity(model, data, context=16, stride=stride) for stride in (16, 8, 1)}
    assert len({result["tokens"] for result in found.values()}) == 1
    assert len({round(result["loss"], 6) for result in found.values()}) == 3, "strides must matter to a model"


def test_padding_and_batches_change_nothing():
    for kind in ("stock", "rigpt-learned", "rigpt-rotary"):
        for dtype in SYMMETRY:
            options = {"position_embedding_type": "learned"} if kind.endswith("learned") else {}
            model = (tiny_gpt2() if kind == "stock" else tiny_model(**options)).to(dtype)
            data = [row[: 5 + 7 * index] for index, row in enumerate(rows(5))]
            expected = perplexity(model, data, batch_size=1, context=24)["samples"]["nats"]
            assert len(expected) == 5 and min(expected) > 0
            for side in ("left", "right"):
                for batch in (2, 3, 7):
                    found = perplexity(model, data, batch_size=batch, padding_side=side, context=24)["samples"]["nats"]
                    assert found == pytest.approx(expected, rel=SYMMETRY[dtype])


def test_the_loss_is_that_of_the_library():
    model, data = tiny_gpt2().double(), rows(4, 40)
    ids = torch.tensor(data)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    # Which is rounded to float32 on the way.
    assert perplexity(model, data)["loss"] == pytest.approx(expected, rel=1e-7)


def test_a_conversion_keeps_the_numbers():
    model = tiny_gpt2().double()
    before, after = (perplexity(each, rows())["loss"] for each in (model, convert_model(model)))
    assert after == pytest.approx(before, rel=1e-12)


def test_models_are_loaded_from_folders(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    word_tokenizer([f" w{index}" for index in range(61)]).save_pretrained(tmp_path)
    measured = evaluated(tmp_path)
    assert measured.name == str(tmp_path) and measured.tokenizer is not None
    text = "".join(f" w{index}" for index in rows(1)[0])
    expected = perplexity(tiny_gpt2(), rows(1))["loss"]
    assert perplexity(str(tmp_path), [text])["loss"] == pytest.approx(expected, rel=1e-6)


def test_incomplete_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_gpt2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"`model` must hold the weights .* which lacks .*c_fc.weight"):
        evaluated(tmp_path)


def test_wikitext_is_written_as_people_write():
    for raw, plain in (
        ("a town , 3 @,@ 000 people .", "a town, 3,000 people."),
        ("a well @-@ known ( or not ) thing", "a well-known (or not) thing"),
        (" = = Heading = = ", " == Heading == "),
        ("the ship 's crew", "the ship's crew"),
        ("the players ' first game in the teams ' history", "the players ' first game in the teams ' history"),
        ('he said " so " ; she left', 'he said "so"; she left'),
    ):
        assert detokenize(raw, "wikitext") == plain
        assert detokenize(raw, "none") == raw


def test_words_are_counted_before_the_detokenizer(bigrams):
    result = perplexity(bigrams, ["a b , a"], detokenizer="wikitext")
    assert result["words"] == 4 and result["bytes"] == 6
    assert result["protocol"]["detokenizer"] == "wikitext"


def test_refusals(bigrams):
    for options, message in (
        ({"texts": []}, "`predictions` must be a list of texts or of rows of token ids"),
        ({"texts": "a b"}, "`predictions` must be a list of texts"),
        ({"texts": ["a"]}, "`predictions` must give at least two tokens, got 1 in 1 texts"),
        ({"texts": [[1, -7]]}, "`predictions` must give token ids from 0 to 4 for bigrams, got -7"),
        ({"texts": [[1, 7]]}, "`predictions` must give token ids from 0 to 4 for bigrams, got 7"),
        ({"texts": [[1, 2]], "separator": " "}, "`detokenizer` and `separator` are for texts"),
        ({"context": 0}, "`context` must be at least 1, got 0"),
        ({"context": 17}, "`context` must be at most the 16 positions of bigrams, got 17"),
        ({"context": 4, "stride": 5}, "`stride` must lie between 1 and the context of 4, got 5"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"padding_side": "top"}, "`padding_side` must be 'left' or 'right', got 'top'"),
        ({"detokenizer": "ptb"}, "`detokenizer` must be one of none, wikitext, got 'ptb'"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(bigrams, **({"texts": [TEXT]} | options))


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="`tokenizer` is needed to read text"):
        perplexity(tiny_model(), ["Some text."])
    with pytest.raises(ValueError, match="`model` must be the folder of a saved model or the id"):
        perplexity("no/such-folder/here", ["Some text."])


def test_choices_of_bigrams(bigrams):
    # After "a": b 0.3, cc 0.4; after "a b": a 0.5, cc 0.2.
    examples = [
        MultipleChoice("a", [" b", " cc"], 1),
        MultipleChoice("a", [" b", " cc"], 0),
        MultipleChoice("a b", [" a", " cc", " b"], 0),
        # By sums the longer is the less likely.
        MultipleChoice("a", [" b", " b a"], 1),
    ]
    result = multiple_choice_accuracy(bigrams, examples)
    assert result["samples"]["accuracy"] == [True, False, True, False]
    # By characters without the first space: log .3 / 1 = -1.20, log .15 / 3 = -0.63; and log .4 / 2 > log .3 / 1.
    assert result["samples"]["accuracy_normalized"] == [True, False, True, True]
    assert result["accuracy"] == 0.5 and result["accuracy_normalized"] == 0.75
    assert result["chance"] == pytest.approx((3 / 2 + 1 / 3) / 4)


def test_tokens_that_texts_begin_with(bigrams):
    """Of a tokenizer that puts one there, as Llama's does; and of any where nothing else is read before."""
    (nothing,) = cloze_accuracy(bigrams, [Cloze("", "a")])["samples"]["nats"]
    assert nothing == pytest.approx(-math.log(0.5))
    assert multiple_choice_accuracy(bigrams, [MultipleChoice("", ["a b", " a b"], 0)])["samples"]["accuracy"] == [True]

    class Beginning:
        """Adds the first word of the list, unless it is told not to."""

        bos_token_id = 0

        def __call__(self, texts, add_special_tokens=True, **options):
            found = bigrams.tokenizer(texts, add_special_tokens=False)["input_ids"]
            start = [0] if add_special_tokens else []
            one = isinstance(texts, str)
            return {"input_ids": [*start, *found] if one else [[*start, *row] for row in found]}

    seen = EvaluatedModel(Bigrams(TABLE), Beginning(), "beginning")
    assert seen.begins_texts and not bigrams.begins_texts
    cloze_accuracy(seen, [Cloze("a b", " a")])
    cloze_accuracy(bigrams, [Cloze("a b", " a")])
    assert seen.model.shapes[-1] == (1, 3) and bigrams.model.shapes[-1] == (1, 2)


def test_the_end_of_a_text(bigrams):
    # The likeliest after "a" is cc, after " b" it is " a", after " a" it is " b".
    result = cloze_accuracy(bigrams, [Cloze("a", " cc"), Cloze("a", " b"), Cloze("a b", " a b"), Cloze("a ", "cc")])
    assert result["samples"]["accuracy"] == [True, False, True, True]
    nats = [-math.log(0.4), -math.log(0.3), -math.log(0.5 * 0.4), -math.log(0.4)]
    assert result["samples"]["nats"] == pytest.approx(nats)
    assert result["target_perplexity"] == pytest.approx(math.exp(sum(nats) / 4))


def test_long_prompts_lose_their_beginning(bigrams):
    prompt = "a" + " b a" * 20
    assert cloze_accuracy(bigrams, [Cloze(prompt, " b")], context=4)["samples"]["nats"] == pytest.approx(
        [-math.log(0.4)]
    )
    assert max(length for _, length in bigrams.model.shapes) <= 4


def test_padding_and_batches_do_not_change_accuracy():
    model = GPT2LMHeadModel(tiny_gpt2().config).eval()
    tokenizer = word_tokenizer([f" w{index}" for index in range(61)])
    words = [[f" w{index}" for index in row] for row in rows(8, 12, seed=3)]
    examples = [MultipleChoice("".join(w[: 3 + i]), [w[-1], w[-2], w[-3] + w[-4]], 0) for i, w in enumerate(words)]
    runs = [
        multiple_choice_accuracy(model, examples, tokenizer, batch_size=size, padding_side=side)["samples"]
        for size, side in ((1, "right"), (5, "right"), (5, "left"))
    ]
    assert runs[0] == runs[1] == runs[2]


def test_impossible_examples():
    for make, message in (
        (lambda: MultipleChoice("a", ["b"], 0), "`choices` must be at least two texts, none empty"),
        (lambda: MultipleChoice("a", ["b", ""], 0), "`choices` must be at least two texts, none empty"),
        (lambda: MultipleChoice("a", ["b", "c"], 2), "`answer` must be an index of the 2 choices, got 2"),
        (lambda: Cloze("a", " "), "`target` must be some text, got ' '"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_no_examples_and_long_endings(bigrams):
    with pytest.raises(ValueError, match="`examples` must hold at least one"):
        cloze_accuracy(bigrams, [])
    with pytest.raises(ValueError, match="`context` must hold a whole ending of 3 tokens, got 2"):
        cloze_accuracy(bigrams, [Cloze("a", " b a b")], context=2)


def test_scores_come_one_batch_at_a_time(bigrams):
    """Windows are taken as they are needed, so a long text is never in memory as logits."""
    taken = []

    def windows():
        for window in rolling_windows([1, 3, 2, 4] * 20, 4):
            taken.append(window)
            yield window

    scores = score(bigrams, windows(), batch_size=2)
    next(scores)
    assert len(taken) == 2
