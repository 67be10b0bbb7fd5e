"""The classifiers of counts as scikit-learn estimators, and the shortcuts that a study takes with them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy import sparse
from scipy.special import softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

from natfp_jax import classify
from natfp_jax.errors import UserError


class Characters:
    """A tokenizer whose ids are code points; 0xE9 stands for half a character."""

    def encode_batch(self, texts):
        return [[ord(c) for c in text] for text in texts]

    def decode(self, ids):
        return "".join("\ufffd" if i == 0xE9 else chr(i) for i in ids)


def sources(random, classes, texts, strength, pieces=60, length=30):
    """Texts of `classes` sources of independent words, with their exact distributions."""
    common = 1 / np.arange(1, pieces + 1)
    chances = common * np.exp(strength * random.normal(size=(classes, pieces)))
    chances /= chances.sum(axis=1, keepdims=True)
    names = np.array([f"w{i}" for i in range(pieces)])
    found = [" ".join(names[random.choice(pieces, length, p=chances[k])]) for k in range(classes) for _ in range(texts)]
    return found, np.repeat(np.arange(classes), texts), chances


KINDS = ("subwords", "words", "ngrams")


def test_words_keep_case_and_punctuation():
    counter = classify.bag("words", Characters())
    counts = counter.fit_transform(["The end, isn't it?\n — Ça! The", ""]).toarray()
    names = counter.get_feature_names_out().tolist()
    assert sorted(names) == sorted(["The", "end", ",", "isn", "'", "t", "it", "?", "—", "Ça", "!"])
    assert counts[0][names.index("The")] == 2
    assert counts[0].sum() == 12
    assert not counts[1].any()


@given(st.lists(st.text(alphabet="abcé", max_size=9), min_size=1).filter(any))
def test_subwords_are_counted_as_scikit_learn_counts_them(texts):
    ours, theirs = (
        classify.Subwords(Characters()),
        CountVectorizer(analyzer=lambda text: Characters().encode_batch([text])[0], dtype=np.float64),
    )
    assert (ours.fit_transform(texts).toarray() == theirs.fit_transform(texts).toarray()).all()
    unseen = ["zebra", "", "bac"]
    assert (ours.transform(unseen).toarray() == theirs.transform(unseen).toarray()).all()
    assert (clone(ours).fit(texts).transform(unseen).toarray() == ours.transform(unseen).toarray()).all()


def test_runs_are_of_up_to_three_subwords():
    counts = classify.bag("ngrams", Characters()).transform(["abab", ""])
    # a 2, b 2, ab 2, ba 1, aba 1, bab 1
    assert sorted(counts[[0]].data.tolist()) == [1, 1, 1, 2, 2, 2]
    assert counts[[1]].nnz == 0


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_estimator_from_texts_to_classes(classes, kind):
    texts, codes, _ = sources(default_rng(0), classes, 60, 1.0)
    labels = np.array(["alpha", "beta", "gamma"])[codes]
    estimator = classify.pipeline(kind, Characters(), C=0.1)
    assert estimator.fit(texts, labels) is estimator
    assert estimator.classes_.tolist() == sorted(set(labels))
    probabilities = estimator.predict_proba(texts)
    assert probabilities.sum(axis=1) == pytest.approx(1)
    assert (estimator.predict(texts) == estimator.classes_[probabilities.argmax(axis=1)]).all()
    assert set(estimator.predict(["", "pieces never seen"])) <= set(labels)


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_cloned_nested_and_searched(kind):
    texts, labels, _ = sources(default_rng(0), 2, 60, 1.0)
    estimator = classify.pipeline(kind, Characters(), C=0.1)
    copy = clone(estimator)
    assert copy.get_params()["linear__C"] == 0.1
    assert not hasattr(copy["linear"], "coef_")
    again = clone(estimator).fit(texts, labels).predict_proba(texts)
    assert (again == estimator.fit(texts, labels).predict_proba(texts)).all()
    assert cross_val_score(make_pipeline(estimator), texts, labels, cv=3).mean() > 0.6
    search = GridSearchCV(estimator, {"linear__C": [0.01, 0.1]}, cv=3).fit(texts, labels)
    assert search.best_params_["linear__C"] in (0.01, 0.1)


def test_fitting_anew_forgets_what_was_learnt():
    """No class, piece or weight of the first fit is left in the second."""
    texts, labels, _ = sources(default_rng(0), 3, 60, 1.0)
    others = [text.replace("w", "v") for text, label in zip(texts, labels, strict=True) if label < 2]
    for kind in KINDS:
        fresh, used = (classify.pipeline(kind, Characters(), C=0.1) for _ in range(2))
        used.fit(texts, labels)
        ours, theirs = (one.fit(others, labels[labels < 2]).predict_proba(others) for one in (fresh, used))
        assert (ours == theirs).all()


def test_what_was_not_fitted_says_so():
    for kind in KINDS:
        with pytest.raises(NotFittedError):
            classify.pipeline(kind, Characters()).predict(["a"])


def pair_source(random, texts, chain):
    """Letters a to h, each alike often, whose next letter depends on it by a circulant chain."""
    drawn = np.empty((texts, 30), np.int64)
    drawn[:, 0] = random.integers(8, size=texts)
    steps = random.choice(8, size=drawn.shape, p=chain)
    for place in range(1, 30):
        drawn[:, place] = (drawn[:, place - 1] + steps[:, place]) % 8
    return ["".join("abcdefgh"[i] for i in row) for row in drawn]


def test_runs_tell_apart_what_pieces_alone_cannot():
    random = default_rng(0)
    chain = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
    texts = [*pair_source(random, 400, chain), *pair_source(random, 400, np.roll(chain, 2))]
    labels, fit = np.repeat([0, 1], 400), np.tile(np.arange(400) < 200, 2)
    score = {}
    for kind in ("subwords", "ngrams"):
        known, held = ([text for text, one in zip(texts, fit, strict=True) if one == side] for side in (True, False))
        estimator = classify.pipeline(kind, Characters(), C=0.01).fit(known, labels[fit])
        score[kind] = np.mean(estimator.predict(held) == labels[~fit])
    assert score["subwords"] < 0.6
    assert score["ngrams"] > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_study_give_what_a_fit_on_the_texts_gives(kind):
    """Columns of other texts have weight zero and change nothing."""
    texts, labels, _ = sources(default_rng(0), 3, 60, 1.0)
    texts = [*texts, "pieces of quite another zoo", "¿ß?"]
    tokenizer = Characters()
    features = classify.featurise(kind, texts, tokenizer)
    rows = default_rng(1).permutation(180)
    fit, held = rows[:120], rows[120:]
    (rows_only, *_) = classify.candidates(kind, (0.1,))
    rows_only.fit(features.counts_NV[fit], labels[fit])
    whole = classify.pipeline(kind, tokenizer, 0.1)
    whole.fit([texts[i] for i in fit], labels[fit])
    if kind != "ngrams":
        unseen = np.asarray(features.counts_NV[fit].sum(axis=0)) == 0
        assert unseen.any()
        assert (rows_only["linear"].coef_[:, unseen] == 0).all()
    assert rows_only.predict_proba(features.counts_NV[held]) == pytest.approx(
        whole.predict_proba([texts[i] for i in held]), abs=1e-4
    )


def test_the_order_of_columns_decides_no_text():
    texts, labels, _ = sources(default_rng(0), 3, 200, 0.5, pieces=300)
    counts = classify.featurise("words", texts, Characters()).counts_NV
    order = default_rng(1).permutation(counts.shape[1])
    one, other = (classify.linear(1.0).fit(c, labels).predict_proba(c) for c in (counts, counts[:, order]))
    assert one == pytest.approx(other, abs=1e-4)
    assert (one.argmax(axis=1) == other.argmax(axis=1)).all()


def test_features_count_pieces_and_show_them():
    features = classify.featurise("subwords", ["abba", "", "\u00e9a"], Characters())
    assert features.names(np.arange(3)) == ["a", "b", "<233>"]
    assert features.counts_NV.toarray().tolist() == [[2, 2, 0], [0, 0, 0], [1, 0, 1]]
    assert classify.featurise("words", ["b a, b"], Characters()).names(np.arange(3)) == [",", "a", "b"]


def test_a_run_is_shown_by_its_text():
    features = classify.featurise("ngrams", ["", "abc", "c"], Characters())
    shown = features.names(features.counts_NV[[1]].nonzero()[1])
    assert sorted(shown) == ["a", "ab", "abc", "b", "bc", "c"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_a_piece_are_a_clear_mistake(kind):
    with pytest.raises(UserError, match=rf"none of 2 texts has {kind}"):
        classify.featurise(kind, ["", " " if kind == "words" else ""], Characters())


def best_scaled(fitted, counts, labels):
    """The least log-loss of a classifier whose log-probabilities are multiplied by one number, among many numbers."""
    scales = np.geomspace(1e-3, 50, 1500)
    return min(log_loss(labels, softmax(scale * fitted.predict_log_proba(counts), axis=1)) for scale in scales)


def test_choice_follows_validation_log_loss_and_refits_on_both_parts():
    texts, labels, _ = sources(default_rng(0), 2, 150, 0.5)
    features = classify.featurise("words", texts, Characters())
    part = default_rng(1).choice(3, size=300, p=[0.5, 0.2, 0.3])
    grid = (1.0, 0.01, 0.1, 0.001)
    among = classify.candidates("words", grid)
    chosen, _ = classify.choose(among, features.counts_NV, labels, part == 0, part == 1, np.ones(300, bool))
    losses = {}
    for C in grid:
        plain = classify.linear(C).fit(features.counts_NV[part == 0], labels[part == 0])
        losses[C] = log_loss(labels[part == 1], plain.predict_proba(features.counts_NV[part == 1]))
    assert classify.chosen(chosen) == {"C": min(losses, key=losses.get)}
    for C, asked in ((classify.chosen(chosen)["C"], among), (0.1, classify.candidates("words", (0.1,)))):
        plain = classify.linear(C).fit(features.counts_NV[part == 0], labels[part == 0])
        found = classify.choose(asked, features.counts_NV, labels, part == 0, part == 1, np.ones(300, bool)).loss
        assert found == pytest.approx(best_scaled(plain, features.counts_NV[part == 1], labels[part == 1]), abs=1e-4)
        assert found <= losses[C] + 1e-9, "as it is, is one of the scales"
    both = classify.linear(chosen["linear"].C).fit(features.counts_NV[part < 2], labels[part < 2])
    assert (chosen["linear"].coef_ == both.coef_).all()


def test_settings_of_very_many_texts_are_chosen_with_some_and_fitted_with_all():
    texts, labels, _ = sources(default_rng(0), 2, 150, 0.5)
    counts = classify.featurise("words", texts, Characters()).counts_NV
    part, tried = default_rng(1).choice(2, size=300, p=[0.7, 0.3]), np.tile(np.arange(150) < 50, 2)
    among = classify.candidates("words", (0.01, 0.1))
    chosen, loss = classify.choose(among, counts, labels, part == 0, part == 1, tried)
    few, _ = classify.choose(
        classify.candidates("words", (0.01, 0.1)), counts, labels, (part == 0) & tried, (part == 1) & tried, tried
    )
    assert classify.chosen(chosen) == classify.chosen(few)
    assert (chosen["linear"].coef_ == classify.linear(chosen["linear"].C).fit(counts, labels).coef_).all()
    assert (chosen["linear"].coef_ != few["linear"].coef_).any()
    every = classify.linear(chosen["linear"].C).fit(counts[part == 0], labels[part == 0])
    assert loss == pytest.approx(best_scaled(every, counts[part == 1], labels[part == 1]), abs=1e-4)


def test_equal_losses_take_the_smallest_c():
    counts = sparse.csr_array(np.ones((8, 1)))  # one piece, once in every text: nothing to learn
    labels, training = np.tile([0, 1], 4), np.arange(8) < 4
    among = classify.candidates("words", (1.0, 0.01, 0.1))
    chosen, loss = classify.choose(among, counts, labels, training, ~training, np.ones(8, bool))
    assert classify.chosen(chosen) == {"C": 0.01}
    assert loss == pytest.approx(np.log(2))


def told(kind, texts, labels, C, count):
    features = classify.featurise(kind, texts, Characters())
    (fitted,) = classify.candidates(kind, (C,))[:1]
    fitted.fit(features.counts_NV, labels)
    return [features.names(columns) for columns in classify.telling(fitted, features.counts_NV, count)], fitted


@pytest.mark.parametrize("classes", [2, 3])
def test_telling_pieces_are_those_that_were_planted(classes):
    random = default_rng(0)
    labels = np.repeat(np.arange(classes), 100)
    texts = [f"the the {'the ' * random.integers(3)}{'mark' + str(k) if random.random() < 0.5 else ''}" for k in labels]
    telling, _ = told("words", texts, labels, 1.0, 2)
    assert [pieces[0] for pieces in telling] == [f"mark{k}" for k in range(classes)]
    assert all(len(pieces) <= 2 for pieces in telling)
    assert all("mark1" not in pieces for pieces in (telling[0], *telling[2:]))
    runs, _ = told("ngrams", [text.replace("mark", "m") for text in texts], labels, 1.0, 3)
    assert all(f"{k}" in pieces[0] for k, pieces in enumerate(runs))


def test_telling_pieces_are_common_as_well_as_one_sided():
    labels = np.repeat([0, 1], 100)
    often = np.tile(np.arange(100), 2) < np.where(labels == 0, 75, 25)
    texts = [f"the {'often' if o else ''} {'hapax' if i < 2 else ''}" for i, o in enumerate(often)]
    telling, fitted = told("words", texts, labels, 100.0, 2)
    hapax, often = -fitted["linear"].coef_[0, :2]
    assert hapax > often > 0
    assert telling[0] == ["often", "hapax"]
