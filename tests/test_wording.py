"""Which words: the formula in plain Python, planted words, nulls, the coverage of intervals, and the examples."""

import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy.stats import binom

from natfp_jax import stats
from natfp_jax.attribution import Comparison
from natfp_jax.classify import WORD, featurise
from natfp_jax.config import Attribution
from natfp_jax.tokenizer import Tokenizer
from natfp_jax.wording import LISTED, STABLE, log_odds, wording

SETTINGS = Attribution()
COUNTS = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=2, max_size=8)


class Sources:
    """Texts of "w0 w1 ...", one of each class at each prompt; each text has chances of its own, spread about its class's.

    Chances are Dirichlet with mean `chances_KV`: the smaller `concentration`, the more a text repeats its words.
    """

    def __init__(self, seed, chances_KV, prompts=300, length=30, concentration=20.0, per_document=1):
        random = default_rng(seed)
        self.classes = [f"class {'abcdefgh'[k]}" for k in range(len(chances_KV))]
        drawn = []
        for chances_V in chances_KV:
            own_NV = random.gamma(concentration * chances_V, size=(prompts, len(chances_V))) + 1e-300
            drawn.append(random.multinomial(length, own_NV / own_NV.sum(axis=1, keepdims=True)))
        self.counts = np.concatenate(drawn)
        names = np.array([f"w{v}" for v in range(self.counts.shape[1])])
        self.texts = [" ".join(random.permutation(np.repeat(names, row))) for row in self.counts]
        self.labels = np.repeat(self.classes, prompts)
        self.prompts = np.tile([f"prompt {i}" for i in range(prompts)], len(chances_KV))
        self.documents = np.tile([f"document {i // per_document}" for i in range(prompts)], len(chances_KV))
        self.rows = np.arange(len(self.texts))

    def comparison(self, name="a comparison"):
        return Comparison(name, self.rows, self.labels, self.prompts, self.documents)

    def wording(self, name="a comparison"):
        return wording(featurise("words", self.texts, None), self.comparison(name), SETTINGS)

    def reordered(self, rows):
        other = object.__new__(Sources)
        other.classes, other.rows, other.texts = self.classes, np.arange(len(rows)), [self.texts[row] for row in rows]
        other.labels, other.prompts, other.documents = self.labels[rows], self.prompts[rows], self.documents[rows]
        return other


def zipf(pieces):
    chances = 1 / np.arange(5, pieces + 5)
    return chances / chances.sum()


def changed(chances_V, factors):
    """The chances after some pieces' were multiplied; the others share what is left."""
    chances = chances_V.copy()
    for piece, factor in factors.items():
        chances[piece] *= factor
    rest = [v for v in range(len(chances)) if v not in factors]
    chances[rest] *= (1 - chances[list(factors)].sum()) / chances[rest].sum()
    return chances


def planted(seed=0, **sizes):
    common = zipf(200)
    return Sources(seed, [common, changed(common, {3: 2.5, 10: 2.5, 20: 2.5})], prompts=800, **sizes)


def by_hand(own, others, prior):
    """Monroe, Colaresi & Quinn 2008, equations 16 and 20, piece by piece in Python's floats."""
    ratios, errors = [], []
    for y, z, a in zip(own, others, prior, strict=True):
        left = (y + a) / (sum(own) + sum(prior) - y - a)
        right = (z + a) / (sum(others) + sum(prior) - z - a)
        ratios.append(math.log(left) - math.log(right))
        errors.append(math.sqrt(1 / (y + a) + 1 / (z + a)))
    return ratios, errors


# --- the formula ------------------------------------------------------------------------------------------------------


@given(COUNTS, st.floats(0.01, 10))
def test_log_odds_by_hand(counts, size):
    own, others = zip(*counts, strict=True)
    prior = [size * (y + z + 1) / 100 for y, z in counts]
    ratios, errors = by_hand(own, others, prior)
    found = log_odds(own, others, prior)
    assert found[0].tolist() == pytest.approx(ratios, rel=1e-9, abs=1e-9)
    assert found[1].tolist() == pytest.approx(errors, rel=1e-9)


@given(COUNTS, st.sampled_from([0.25, 3, 10]))
def test_sides_turn_the_sign_and_a_scale_changes_the_error_alone(counts, scale):
    own, others = np.array(counts, dtype=float).T
    prior = 0.02 * (own + others + 1)
    ratio, error = log_odds(own, others, prior)
    assert log_odds(others, own, prior)[0].tolist() == (-ratio).tolist()
    more, less = log_odds(scale * own, scale * others, scale * prior)
    assert more == pytest.approx(ratio, abs=1e-9)
    assert less == pytest.approx(error / math.sqrt(scale))


@pytest.mark.parametrize("classes", [2, 3])
def test_every_number_of_a_word_by_hand(classes):
    sources = Sources(1, [zipf(8)] * classes, concentration=1e6)
    test = stats.split(sources.documents, 0, 0.1, 0.4) == "test"
    known = {label: sources.counts[~test & (sources.labels == label)].sum(axis=0).tolist() for label in sources.classes}
    pooled = [sum(uses) for uses in zip(*known.values(), strict=True)]
    prior = [0.02 / classes * uses for uses in pooled]
    found = sources.wording()
    assert found.tested == (8 if classes == 2 else 24)
    assert len(found.words) >= 8
    for word in found.words:
        own, v = known[word.source], int(word.piece[1:])
        others = [every - mine for every, mine in zip(pooled, own, strict=True)]
        ratios, errors = by_hand(own, others, prior)
        assert word.log_odds == pytest.approx(ratios[v])
        assert word.z == pytest.approx(ratios[v] / errors[v])
        assert word.used == ("more" if ratios[v] > 0 else "less")
        assert np.mean(word.ci95) == pytest.approx(word.log_odds)
        assert word.ci95[1] - word.ci95[0] >= 2 * 1.9599 * errors[v]
        assert word.per_10000 == pytest.approx(10_000 * own[v] / sum(own))
        assert word.per_10000_elsewhere == pytest.approx(10_000 * others[v] / sum(others))
        holds = sources.documents[~test & (sources.counts[:, v] > 0)]
        assert word.documents == len(set(holds))


# --- what must not matter ---------------------------------------------------------------------------------------------


def test_the_order_of_texts_does_not_matter():
    sources = planted(per_document=2)
    shuffled = sources.reordered(default_rng(0).permutation(len(sources.texts)))
    assert shuffled.wording() == sources.wording()


def test_other_names_of_two_classes_turn_everything_and_change_no_number():
    sources = planted()
    found = sources.wording()
    sources.labels = np.where(sources.labels == "class a", "class b", "class a")
    turned = sources.wording()
    names = {"class a": "class b", "class b": "class a"}
    expected = [replace(word, source=names[word.source]) for word in found.words]
    assert sorted(turned.words, key=repr) == sorted(expected, key=repr)
    assert replace(turned, words=[]) == replace(found, words=[])


def test_copies_of_texts_raise_z_and_do_not_narrow_the_interval():
    sources = planted(concentration=5.0)
    copied = sources.reordered(np.repeat(np.arange(len(sources.texts)), 4))
    once, often = ({word.piece: word for word in one.wording().words} for one in (sources, copied))
    assert set(once) & set(often) >= {"w3", "w10", "w20"}
    for piece in set(once) & set(often):
        assert often[piece].log_odds == pytest.approx(once[piece].log_odds)
        assert often[piece].z == pytest.approx(2 * once[piece].z)
    assert often["w3"].ci95 == pytest.approx(once["w3"].ci95)


def test_the_test_part_confirms_and_chooses_nothing():
    sources = planted()
    test = stats.split(sources.documents, 0, 0.1, 0.4) == "test"
    before = sources.wording()
    sources.texts = ["w0 w1 unheard" if out else text for text, out in zip(sources.texts, test, strict=True)]
    after = sources.wording()
    assert [replace(word, held_out_z=0) for word in after.words] == [replace(word, held_out_z=0) for word in before.words]
    assert (after.tested, after.stable) == (before.tested, before.stable)
    assert all(abs(word.held_out_z) < 0.1 for word in after.words)


def test_two_comparisons_share_no_resamples():
    sources = planted()
    first, second = (sources.wording(name).words for name in ("first", "second"))
    assert [word.log_odds for word in first if word.piece == "w3"] == [word.log_odds for word in second if word.piece == "w3"]
    assert [word.ci95 for word in first] != [word.ci95 for word in second]


# --- known answers ----------------------------------------------------------------------------------------------------


def test_planted_words_are_found_stable_and_held():
    found = planted().wording()
    more = [word for word in found.words if word.source == "class b"]
    assert {word.piece for word in more[:3]} == {"w3", "w10", "w20"}
    for word in more[:3]:
        assert word.stability >= STABLE
        assert word.held_out_z > 1.96
        assert word.per_10000 > 1.5 * word.per_10000_elsewhere
    assert 3 <= found.held <= found.stable <= 30
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["words"][0]["source"] == "class a"


def test_of_three_classes_each_has_what_it_uses_more_and_less():
    common = zipf(100)
    sources = Sources(3, [common, changed(common, {4: 3.0}), changed(common, {7: 0.2})], prompts=800)
    first = {}
    for word in sources.wording().words:
        assert (word.log_odds > 0) == (word.used == "more") == (word.per_10000 > word.per_10000_elsewhere)
        first.setdefault((word.source, word.used), word)
    assert first["class b", "more"].piece == "w4"
    assert first["class c", "less"].piece == "w7"
    assert all(first[found].stability >= STABLE for found in (("class b", "more"), ("class c", "less")))
    assert set(first) == {(name, used) for name in sources.classes for used in ("more", "less")}


@pytest.mark.parametrize("concentration", [5.0, 1000.0])
def test_in_a_null_stable_words_are_as_rare_as_promised(concentration):
    tested, stable, promised = 0, 0, 0.0
    for seed in range(12):
        found = Sources(seed, [zipf(300)] * 2, prompts=400, concentration=concentration).wording()
        tested, stable, promised = tested + found.tested, stable + found.stable, promised + found.by_chance
    assert tested > 1000
    assert promised < 0.001 * tested
    assert stable <= binom.isf(1e-6, tested, promised / tested)


def test_intervals_cover_what_they_claim_when_texts_repeat_their_words():
    """All five pieces are listed, so that none is chosen for its ratio; one of them is looked at."""
    chances_KV = np.array([[0.1, 0.15, 0.2, 0.25, 0.3], [0.14, 0.15, 0.18, 0.25, 0.28]])
    logits = np.log(chances_KV / (1 - chances_KV))
    truth, runs = logits[1, 0] - logits[0, 0], 150
    covered = narrow = 0
    for seed in range(runs):
        (word,) = (w for w in Sources(seed, chances_KV, prompts=150, concentration=10.0).wording().words if w.piece == "w0")
        sign = 1 if word.source == "class b" else -1
        low, high = sorted(sign * bound for bound in word.ci95)
        covered += low <= truth <= high
        narrow += abs(sign * word.log_odds - truth) <= 1.96 * abs(word.log_odds / word.z)
    assert binom.isf(1 - 1e-6, runs, 0.93) <= covered <= binom.isf(1e-6, runs, 0.97)
    assert narrow < binom.isf(1 - 1e-6, runs, 0.93)  # as if each word had been drawn alone: the resamples are not idle


def test_twice_the_same_texts_differ_in_nothing():
    sources = Sources(0, [zipf(50)] * 2)
    sources.texts[300:] = sources.texts[:300]
    found = sources.wording()
    assert (found.tested, found.stable, found.words) == (50, 0, [])


def test_a_count_of_zero_is_not_certain():
    """A piece in twelve texts, by chance all of one class: no resample has it in the other."""
    sources = Sources(0, [zipf(20)] * 2)
    test = stats.split(sources.documents, 0, 0.1, 0.4) == "test"
    for row in np.flatnonzero(~test)[:12]:
        sources.texts[row] += " rare"
    (word,) = (word for word in sources.wording().words if word.piece == "rare")
    assert (word.source, word.per_10000_elsewhere) == ("class a", 0)
    assert word.stability < STABLE


def test_pieces_of_few_documents_are_not_looked_at_and_texts_of_one_word_have_nothing_to_tell():
    sources = Sources(0, [zipf(20)] * 2)
    known = np.flatnonzero(stats.split(sources.documents, 0, 0.1, 0.4) != "test")
    for row in known[:9]:
        sources.texts[row] += " rare rare rare"
    assert sources.wording().tested == 20
    sources.texts = ["same same"] * len(sources.texts)
    assert (sources.wording().tested, sources.wording().words) == (0, [])


# --- examples ---------------------------------------------------------------------------------------------------------


def test_examples_are_of_the_class_and_have_the_word():
    sources = planted()
    seen = set()
    for word in sources.wording().words:
        own = [text for text, label in zip(sources.texts, sources.labels, strict=True) if label == word.source]
        assert len(word.examples) == 3
        for example in word.examples:
            assert example.piece == word.piece in re.findall(WORD, f"{example.before}{example.piece}{example.after}")
            assert max(len(example.before), len(example.after)) <= 31
            part = example.before.removeprefix("…") + example.piece + example.after.removesuffix("…")
            assert any(part in text and word.piece in text.split() for text in own)
            seen.add(part)
    assert len(seen) > 2 * LISTED  # and not the same texts for all


def test_examples_of_subwords_stand_in_the_text_as_they_were_written():
    random = default_rng(0)
    kinds = (["the naïve reader", "“yes”", "of it"], ["a naïve writer", "«no»", "of\nit"])
    drawn = [" ".join(random.choice(kind, size=12)) for kind in kinds for _ in range(100)]
    tokenizer = Tokenizer.train(iter(drawn), 280)
    features = featurise("subwords", drawn, tokenizer)
    prompts = [f"prompt {i}" for i in range(100)] * 2
    compared = Comparison("a comparison", np.arange(200), ["one"] * 100 + ["two"] * 100, prompts, prompts)
    listed = wording(features, compared, SETTINGS).words
    whole = [word for word in listed if not word.piece.startswith("<")]
    assert len(whole) >= LISTED
    for word in whole:
        own = drawn[:100] if word.source == "one" else drawn[100:]
        assert word.examples
        for example in word.examples:
            assert example.piece == word.piece
            part = example.before.removeprefix("…") + example.piece + example.after.removesuffix("…")
            assert any(part in text for text in own)
