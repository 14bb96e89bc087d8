"""How one says which tokens are exchanged, and what is refused."""

import json
import math
import time

import numpy as np
import pytest
from sympy.combinatorics.named_groups import AlternatingGroup, CyclicGroup, SymmetricGroup
from tokenizers import models

from rigpt_hf.symmetry.tokens import OrderError, TokenSymmetry
from tests.evaluation.toys import word_tokenizer
from tests.symmetry.tokens.groups import SYMMETRIES, VOCABULARY, table


ORDERS = {"cyclic": 5, "symmetric": 6, "quaternions": 8, "conjugations": 12, "two": 20}


@pytest.mark.parametrize("name", SYMMETRIES)
def test_it_is_the_same_after_it_was_saved(name, tmp_path):
    symmetry = SYMMETRIES[name]()
    assert symmetry.order == ORDERS[name]
    symmetry.save(tmp_path / "symmetry.json")
    again = TokenSymmetry.load(tmp_path / "symmetry.json")
    assert again == symmetry and again != SYMMETRIES["two" if name == "cyclic" else "cyclic"]()
    (tmp_path / "link.json").symlink_to("symmetry.json")
    with pytest.raises(ValueError, match="`path` must be a file itself to be replaced, got .*link to 'symmetry.json'"):
        symmetry.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    for permutation in again.permutations:
        assert permutation.sort().values.tolist() == list(range(VOCABULARY))
        assert (permutation != permutation.sort().values).sum() > 1
    rest = set(range(VOCABULARY)) - {token for orbit in again.orbits for token in orbit}
    assert set(again.points) | rest == set(range(VOCABULARY)) and len(rest) > 10


def test_tokens_may_be_text():
    tokenizer = word_tokenizer(["<s>", "walk", "run", "WALK", "RUN", "and"])
    tokenizer.bos_token = "<s>"
    expected = TokenSymmetry(6, [[[1, 2], [3, 4]]])
    assert TokenSymmetry.named("cyclic", [["walk", "run"], ["WALK", "RUN"]], tokenizer=tokenizer) == expected
    assert TokenSymmetry.from_exchanges([[["walk", "run"], ["WALK", "RUN"]]], tokenizer=tokenizer) == expected
    for tokens, said in (
        (["<s>", "run"], "leave special tokens where they are, got token 0 in generator 0"),
        (["walk run", "and"], "must be single tokens of the tokenizer, got 'walk run'"),
    ):
        with pytest.raises(ValueError, match=said):
            TokenSymmetry.named("cyclic", [tokens], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TokenSymmetry(9, [[[1, 2], [2, 3]]]), "must move every token once, got token 2 in generator 0"),
        (lambda: TokenSymmetry(9, [[[1, 2]], [[3, 9]]]), "have tokens from 0 to 8, got token 9 in generator 1"),
        (lambda: TokenSymmetry(0, [[]]), "`vocab_size` must be at least 1, got 0"),
        (lambda: TokenSymmetry(9, [[[5, 5]]]), "move every token once, got token 5"),
        (lambda: TokenSymmetry(9, [[[5]], [[10**1000]]]), "from 0 to 8, got token 10*.{3} in generator 1"),
        (lambda: TokenSymmetry(9, [[[1, 2]]], special=[2]), "leave special tokens where they are, got token 2"),
        (lambda: TokenSymmetry.named("free", [[1, 2]], 9), "one of cyclic, dihedral, symmetric, got .* 'free'"),
        (lambda: TokenSymmetry.named("cyclic", [[1, 2], [3]], 9), "lists of one length, .* got the lengths .1, 2."),
        (lambda: TokenSymmetry.named("cyclic", [["a", "b"]], 9), "`tokenizer` must be given .* got none with 'a'"),
        (lambda: TokenSymmetry.named("cyclic", [[1, 2]]), "`vocab_size` or `tokenizer` must be given"),
        (lambda: TokenSymmetry.of_table("all", np.eye(2), [1, 2], 9), "conjugations or automorphisms, got 'all'"),
        (
            lambda: TokenSymmetry.of_table("conjugations", [[0, 1], [0, 1]], [1, 2], 9),
            "multiplication table of a group",
        ),
        (lambda: TokenSymmetry(9, []) | TokenSymmetry(8, []), "of the same vocabulary, got 8 and 9"),
        (lambda: TokenSymmetry.from_dict({"generators": 7}), "must be an object with the format 'rigpt token symm"),
    ],
)
def test_what_is_no_symmetry_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("group", "inner", "outer"),
    [(CyclicGroup(12), 1, 4), (SymmetricGroup(3), 6, 6), (AlternatingGroup(4), 12, 24)],
)
def test_what_respects_products_is_found(group, inner, outer):
    products = table(group)
    tokens = list(range(len(products)))
    for kind, order in (("conjugations", inner), ("automorphisms", outer)):
        symmetry = TokenSymmetry.of_table(kind, products, tokens, VOCABULARY)
        assert symmetry.order == order
        for permutation in symmetry.permutations.numpy():
            image = permutation[: len(products)]
            assert (image[products] == products[image[:, None], image]).all()


@pytest.mark.parametrize("generators", [[[[10.5, 11.7]]], [[[True, False]]], [{"a": 1}], ["ab"], [["ab"]], [[[[1]]]]])
def test_what_is_no_token_is_none(generators):
    content = {"format": "rigpt token symmetry", "vocab_size": 20, "generators": generators}
    with pytest.raises(ValueError, match="`(tokens|content|tokenizer)` must"):
        TokenSymmetry.from_dict(content)
    assert TokenSymmetry.from_dict(content | {"generators": [[[10, 11]]]}).order == 2


@pytest.mark.full
def test_the_order_of_large_groups_is_seen_at_once():
    large = TokenSymmetry.named("symmetric", [range(300), range(300, 600)], 1000)
    other = TokenSymmetry.named("symmetric", [range(600, 650)], 1000)
    assert large.order == math.factorial(300)
    assert (large | other | TokenSymmetry.named("cyclic", [range(700, 706)], 1000)).order == 6 * math.factorial(
        300
    ) * math.factorial(50)
    # Two ways of moving are no product where one generator does both.
    assert TokenSymmetry(20, [[[0, 1, 2], [5, 6]]]).order == 6
    assert TokenSymmetry(20, [[[0, 1], [5, 6, 7]], [[5, 6], [10, 11]]]).order == 12
    # Alternating, on several sets of points alike, and dihedral.
    assert TokenSymmetry.from_exchanges([[range(2001)], [[0, 1, 2]]], 2001).order == math.factorial(2001) // 2
    assert TokenSymmetry.named("dihedral", [range(700), range(700, 1400)], 1400).order == 1400


def test_what_cannot_be_counted_is_large():
    """Pairs of 100 things that change places, and their orders as they are: a group of 2^100 100! elements."""
    pairs = [[2 * i, 2 * i + 1] for i in range(100)]
    large = TokenSymmetry(200, [pairs[:1], [[0, 2], [1, 3]], [[one[i] for one in pairs] for i in (0, 1)]])
    with pytest.raises(OrderError, match="more than 5000 elements must be symmetric to be counted"):
        assert large.order
    assert large.order_in_words == "more than 5,000" and not large.group.is_listed
    assert TokenSymmetry.named("symmetric", [range(3000)], 3000).order_in_words == "about 10^9130.6"
    assert TokenSymmetry(5, [[[0, 1, 2], [3, 4]]]).order_in_words == "6"


def test_a_cycle_of_one_token_moves_nothing():
    still = TokenSymmetry(20, [[[5]], []])
    assert len(still.points) == 0 and still.order == 1 and still.orbits == []
    assert still == TokenSymmetry(20, [[], []]) and still.to_dict()["generators"] == [[], []]
    more = TokenSymmetry(20, [[[5], [6, 7]]], special=[5])
    assert more.points.tolist() == [6, 7] and more.generators == (((6, 7),),)


PAIRS = [[2 * i, 2 * i + 1] for i in range(25_000)]


@pytest.mark.parametrize(
    ("generators", "order", "orbits"),
    [
        ([[list(range(50_000))]], "50,000", 1),
        ([PAIRS], "2", 25_000),
        ([[pair] for pair in PAIRS[:10_000]], "about 10^3010.3", 10_000),
        ([[list(range(50_000))], [[0, 1]]], "about 10^213236.5", 1),
        ([[list(range(50_000))], [[i, 49_999 - i] for i in range(25_000)]], "more than 5,000", 1),
    ],
    ids=["cycle", "pairs", "generators", "symmetric", "dihedral"],
)
@pytest.mark.full
def test_a_symmetry_of_50_000_tokens_is_read_in_seconds(generators, order, orbits, tmp_path):
    content = {"format": "rigpt token symmetry", "vocab_size": 50_000, "generators": generators}
    (tmp_path / "symmetry.json").write_text(json.dumps(content))
    start = time.process_time()
    symmetry = TokenSymmetry.load(tmp_path / "symmetry.json")
    assert symmetry.order_in_words == order and len(symmetry.orbits) == orbits
    assert len(generators) > 2 or len(symmetry.permutations) == len(generators)
    assert time.process_time() - start < 10  # a second or two where nothing else runs; it was minutes


@pytest.mark.parametrize(
    ("generators", "fault"),
    [
        ([[[5, 5]]], "`generators` must move every token once"),
        ([[["a"]]], "`tokenizer` must be given"),
        (7, "`content`"),
    ],
)
def test_what_a_file_lacks_is_said_with_its_name(generators, fault, tmp_path):
    path = tmp_path / "symmetry.json"
    path.write_text(json.dumps({"format": "rigpt token symmetry", "vocab_size": 9, "generators": generators}))
    with pytest.raises(ValueError, match=f"^`symmetry` must hold exchanges of tokens, got '{path}': {fault}"):
        TokenSymmetry.load(path)


def test_a_tokenizer_with_gaps_says_how_many_tokens_there_are():
    tokenizer = word_tokenizer(["<s>", "walk", "run"])
    tokenizer.add_tokens([])
    tokenizer.backend_tokenizer.model = models.WordLevel({"<s>": 0, "walk": 1, "run": 7}, unk_token="<s>")
    assert len(tokenizer) == 3
    written = {"format": "rigpt token symmetry", "generators": [[["walk", "run"]]]}
    for symmetry in (
        TokenSymmetry.from_dict(written, tokenizer=tokenizer),
        TokenSymmetry.named("cyclic", [["walk", "run"]], tokenizer=tokenizer),
    ):
        assert symmetry.vocab_size == 8 and symmetry.generators == (((1, 7),),)
    with pytest.raises(ValueError, match="`vocab_size` or `tokenizer` must be given"):
        TokenSymmetry.from_dict(written | {"generators": [[[1, 7]]]})


def test_the_first_token_is_a_word_behind_a_space_too():
    """Its id is 0, which is no absence."""
    spaced = word_tokenizer([" cat", "<s>"])
    spaced.backend_tokenizer.model = models.WordLevel({" cat": 0, "<s>": 1}, unk_token="<s>")
    spaced.unk_token = spaced.bos_token = "<s>"
    with pytest.raises(ValueError, match="' cat' is one, as words behind a space are"):
        TokenSymmetry.named("cyclic", [["cat", "dog"]], tokenizer=spaced)
