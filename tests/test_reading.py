"""The neural classifiers: the estimator's contract, and sources whose best possible reader is known."""

from functools import cached_property

import jax
import numpy as np
import pytest
from numpy.random import default_rng
from scipy.stats import binom
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from natfp_jax.config import Model
from natfp_jax.errors import UserError
from natfp_jax.language_models import LanguageModels
from natfp_jax.model import head, hidden, logits
from natfp_jax.reader import Reader

LETTERS = "abcd"
KINDS = [LanguageModels, Reader]


class Characters:
    """Ids from 1 on for the letters, one id for whatever else."""

    eos_id, size, padded_size = 0, len(LETTERS) + 2, 16

    def encode_batch(self, texts):
        return [[1 + LETTERS.index(c) if c in LETTERS else 1 + len(LETTERS) for c in text] for text in texts]


def small(kind, **settings):
    return kind(Characters(), **{"width": 16, "layers": 1, "heads": 2, "tokens": 16, "batch": 32, "epochs": 2, **settings})


# --- sources whose best reader is known -------------------------------------------------------------------------------


class Chains:
    """Two Markov chains, each the other in reverse: every count of letters is equally likely under both."""

    step_S = np.array([0.15, 0.55, 0.15, 0.15])  # the chance to go on by so many letters, round the alphabet

    def __init__(self, seed, texts, length=12):
        random, K = default_rng(seed), 2
        step_NT = random.choice(len(LETTERS), (K * texts, length), p=self.step_S)
        self.labels = np.repeat(["fore", "back"], texts)
        step_NT[:, 0] = random.integers(len(LETTERS), size=K * texts)
        step_NT[texts:, 1:] *= -1
        self.ids_NT = step_NT.cumsum(axis=1) % len(LETTERS)
        self.texts = ["".join(LETTERS[i] for i in ids) for ids in self.ids_NT]

    @cached_property
    def odds_N(self):
        """log p(text | fore) − log p(text | back)."""
        step_NT = np.diff(self.ids_NT, axis=1) % len(LETTERS)
        # Only steps of 1 and of 3 are more likely in one direction: the ratio is 1 exactly where there are as many of either.
        return ((step_NT == 1).sum(axis=1) - (step_NT == 3).sum(axis=1)) * np.log(self.step_S[1] / self.step_S[3])

    @property
    def best(self):
        """The share that the likelihood ratio gives to its source."""
        return np.where(self.odds_N == 0, 0.5, (self.odds_N > 0) == (self.labels == "fore")).mean()


CHAINS = {
    LanguageModels: {"together": 1, "epochs": 6, "learning_rate": 1e-2, "own_rate": 1e-2, "batch": 64},
    Reader: {"width": 32, "learning_rate": 5e-3, "dropout": 0.0, "weight_decay": 0.1, "epochs": 10, "patience": 6, "batch": 64},
}
TEXTS = {LanguageModels: 400, Reader: 1200}  # of each chain: to find out what to look at takes more than to count


@pytest.fixture(scope="module", params=KINDS)
def read(request):
    """A classifier of two chains, with texts that it has not seen."""
    training, validation, test = Chains(0, TEXTS[request.param]), Chains(1, 100), Chains(2, 1000)
    fitted = small(request.param, **CHAINS[request.param])
    return fitted.fit(training.texts, training.labels, (validation.texts, validation.labels)), training, validation, test


def test_it_reads_nearly_all_that_can_be_read_where_a_bag_reads_nothing(read):
    fitted, training, _, test = read
    found = (fitted.predict(test.texts) == test.labels).mean()
    assert 0.85 < test.best < 0.99
    assert found > test.best - 0.06

    def counts(texts):
        return [[text.count(letter) for letter in LETTERS] for text in texts]

    bag = Pipeline([("counts", FunctionTransformer(counts)), ("linear", LogisticRegression())])
    bag.fit(training.texts, training.labels)
    low, high = binom.interval(1 - 1e-6, len(test.texts), 0.5)
    assert low <= np.count_nonzero(bag.predict(test.texts) == test.labels) <= high


def test_probabilities_are_about_as_good_as_those_of_the_true_sources(read):
    fitted, _, _, test = read
    best = log_loss(test.labels == "fore", 1 / (1 + np.exp(-test.odds_N)))
    assert best < log_loss(test.labels, fitted.predict_proba(test.texts), labels=fitted.classes_) < best + 0.12


def test_the_kept_epoch_is_the_one_with_the_least_validation_loss_at_the_best_scale(read):
    fitted, _, validation, _ = read
    assert fitted.losses_[fitted.epoch_] == min(fitted.losses_)
    found_NK = fitted.predict_proba(validation.texts)
    assert log_loss(validation.labels, found_NK, labels=fitted.classes_) == pytest.approx(min(fitted.losses_), abs=1e-6)
    for factor in (0.9, 1.1):
        warmed_NK = found_NK**factor / (found_NK**factor).sum(axis=1, keepdims=True)
        assert log_loss(validation.labels, warmed_NK, labels=fitted.classes_) > min(fitted.losses_)


@pytest.mark.parametrize("kind", KINDS)
def test_two_sources_that_are_one_are_at_chance(kind):
    one, other, test = Chains(3, 200), Chains(4, 40), Chains(5, 1000)

    def coins(texts, seed):
        return default_rng(seed).integers(2, size=len(texts))

    fitted = small(kind, epochs=3)
    fitted.fit(one.texts, coins(one.texts, 0), (other.texts, coins(other.texts, 1)))
    labels = coins(test.texts, 2)
    low, high = binom.interval(1 - 1e-6, len(labels), 0.5)
    assert low <= np.count_nonzero(fitted.predict(test.texts) == labels) <= high
    assert log_loss(labels, fitted.predict_proba(test.texts)) < np.log(2) + 0.05  # and it knows that it knows nothing


# --- the estimator ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some():
    """Texts of three classes that differ in their letters."""
    random = default_rng(0)
    texts = ["".join(random.choice(list(LETTERS), random.integers(1, 20), p=p)) for p in random.dirichlet(np.ones(4), 90)]
    return texts, np.tile(["x", "z", "y"], 30)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_estimator(kind, some):
    texts, labels = some
    tokenizer = Characters()
    unfitted = kind(tokenizer, width=16, layers=1, heads=2, epochs=1)
    assert unfitted.tokenizer is tokenizer
    assert unfitted.get_params()["width"] == 16
    assert unfitted.set_params(seed=3, tokens=8) is unfitted
    assert (unfitted.seed, unfitted.tokens) == (3, 8)
    given = dict(vars(unfitted))
    with pytest.raises(NotFittedError):
        unfitted.predict(texts)
    copy = clone(unfitted)
    assert {k: v for k, v in copy.get_params().items() if k != "tokenizer"} == {
        k: v for k, v in unfitted.get_params().items() if k != "tokenizer"
    }
    assert unfitted.fit(texts, labels) is unfitted
    assert {name: vars(unfitted)[name] for name in given} == given
    assert all(name.endswith("_") for name in set(vars(unfitted)) - set(given))
    assert not hasattr(clone(unfitted), "classes_")
    assert unfitted.classes_.tolist() == ["x", "y", "z"]
    found_NK = unfitted.predict_proba(texts)
    assert found_NK.shape == (90, 3)
    assert found_NK.sum(axis=1) == pytest.approx(1)
    assert (unfitted.predict(texts) == unfitted.classes_[found_NK.argmax(axis=1)]).all()
    assert 0 <= unfitted.score(texts, labels) <= 1
    assert unfitted.predict_proba([]).shape == (0, 3)
    assert unfitted.__sklearn_tags__().input_tags.string


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_in_a_pipeline(kind, some):
    texts, labels = some
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipeline = Pipeline([("lower", lower), ("reader", small(kind, epochs=1))])
    upper = [text.upper() for text in texts]
    validation = (texts[:20], labels[:20])
    pipeline.fit(upper, labels, reader__validation=validation)
    alone = small(kind, epochs=1).fit(texts, labels, validation)
    assert (
        clone(pipeline).fit(upper, labels, reader__validation=validation).predict_proba(upper) == alone.predict_proba(texts)
    ).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_depends_on_the_texts_and_the_seed_alone(kind, some):
    texts, labels = some
    first = small(kind).fit(texts, labels)
    found_NK = first.predict_proba(texts)
    order = default_rng(1).permutation(len(texts))
    shuffled = small(kind).fit([texts[n] for n in order], labels[order])
    assert (shuffled.predict_proba(texts) == found_NK).all()
    assert (small(kind, seed=1).fit(texts, labels).predict_proba(texts) != found_NK).any()
    first.fit(texts[::-1], np.repeat([5, 2], 45))  # forgets all of it
    assert first.classes_.tolist() == [2, 5]
    assert (first.fit(texts, labels).predict_proba(texts) == found_NK).all()


@pytest.mark.parametrize("kind", KINDS)
def test_validation_texts_choose_and_nothing_else(kind, some):
    """One epoch leaves no choice but that of the scale: whatever the validation texts, the odds keep their proportions."""
    texts, labels = some
    one, other = (
        small(kind, epochs=1).fit(texts[:60], labels[:60], (texts[a:b], labels[a:b])) for a, b in ((60, 75), (75, 90))
    )
    for mine, its in zip(one.state().items(), other.state().items(), strict=True):
        assert mine[0] == its[0]
        assert (mine[1] == its[1]).all() == (mine[0] != "scale")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_does_not_depend_on_its_neighbours(kind, some):
    texts, labels = some
    fitted = small(kind, epochs=1).fit(texts, labels)
    together = fitted.predict_proba(texts)
    for n in (0, 31, 32, 89):
        assert fitted.predict_proba([texts[n]])[0] == pytest.approx(together[n], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_classifier_is_plain_arrays(kind, some, tmp_path):
    texts, labels = some
    fitted = small(kind, epochs=1).fit(texts, labels.astype(object))
    np.savez(tmp_path / "state.npz", **fitted.state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        again = kind.from_state(dict(file), **fitted.get_params())
    assert (again.predict_proba(texts) == fitted.predict_proba(texts)).all()
    assert again.predict(texts).tolist() == fitted.predict(texts).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_gets_a_class(kind, some):
    texts, labels = some
    fitted = small(kind, epochs=1, tokens=8).fit(["", *texts], [labels[0], *labels])
    strange = ["", "ß¿ \0", texts[0] * 50, "\N{BROKEN HEART}"]
    assert np.isfinite(fitted.predict_proba(strange)).all()
    head = "abcdabcd"
    cut, longer = fitted.predict_proba([head, head + "abc"])
    assert cut == pytest.approx(longer)  # `tokens` are read, no more


@pytest.mark.parametrize("labels", [[True, False], [3, -1], np.array(["b", "a"], dtype=object)])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_type(kind, labels, some):
    texts, named = some[0][:40], np.tile(labels, 20)
    fitted = small(kind, epochs=1).fit(texts, named)
    assert fitted.classes_.tolist() == sorted(labels)
    assert set(fitted.predict(texts).tolist()) <= set(labels)


@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_are_said_in_one_line(kind):
    with pytest.raises(UserError, match=r"two classes to train on, got 2 of \['x'\]"):
        small(kind).fit(["a", "b"], ["x", "x"], (["a"], ["x"]))
    with pytest.raises(UserError, match="got 0 validation texts"):
        small(kind).fit(["a", "b"], ["x", "y"], ([], []))
    with pytest.raises(UserError, match=r"got 1 validation texts of \['z'\], expected some, of the classes"):
        small(kind).fit(["a", "b"], ["x", "y"], (["a"], ["z"]))
    with pytest.raises(UserError, match="2 texts have 1 labels"):
        small(kind).fit(["a", "b"], ["x"])
    with pytest.raises(UserError, match="validation loss is nan after epoch 1"):
        small(kind, learning_rate=1e30).fit(["a", "b"] * 50, ["x", "y"] * 50, (["a"], ["x"]))


# --- what a text is judged by -----------------------------------------------------------------------------------------


def test_a_language_model_scores_a_text_and_its_end(some):
    """Against one unpadded row at a time, in float64 from the logits on."""
    texts, labels = some
    fitted = small(LanguageModels, epochs=1, tokens=16).fit(texts, labels)
    model, tokenizer = Model(width=16, layers=1, heads=2), Characters()
    some = texts[:12]
    logits_TV = jax.jit(lambda tree, row: logits(hidden(model, tree, row[None]), head(tree), tokenizer.size)[0])
    assert {len(text) >= 16 for text in some} == {True, False}
    expected_NK = np.empty((len(some), 3))
    for n, ids in enumerate(tokenizer.encode_batch(some)):
        row = np.array([0, *ids, 0])[:17]  # a text of sixteen ids or more is cut, and its end not seen
        for k, tree in enumerate(fitted.params_[str(k)] for k in range(3)):
            z_TV = np.asarray(logits_TV(tree, row[:-1]), np.float64)[:, : tokenizer.size]
            log_p_TV = z_TV - np.log(np.exp(z_TV).sum(axis=1, keepdims=True))
            expected_NK[n, k] = log_p_TV[np.arange(len(row) - 1), row[1:]].sum()
    odds_NK = np.exp(fitted.scale_ * (expected_NK - expected_NK.max(axis=1, keepdims=True)))
    assert fitted.predict_proba(some) == pytest.approx(odds_NK / odds_NK.sum(axis=1, keepdims=True), rel=1e-3)


def test_the_models_of_equal_texts_are_equal():
    """What they differ in is the text alone: start, order and number of steps are common."""
    texts = Chains(0, 40).texts
    fitted = small(LanguageModels, epochs=1).fit(texts * 2, np.repeat([0, 1], 80), (texts, np.arange(80) % 2))
    assert fitted.predict_proba(texts) == pytest.approx(0.5, abs=1e-12)
