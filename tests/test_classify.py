"""The unigram classifier as a scikit-learn estimator, and the shortcuts that a study takes with it."""

import numpy as np
import pytest
from numpy.random import default_rng
from scipy import sparse
from sklearn.base import clone
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


def test_words_keep_case_and_punctuation():
    assert classify.words(["The end, isn't it?\n — Ça!", ""]) == [
        ["The", "end", ",", "isn", "'", "t", "it", "?", "—", "Ça", "!"],
        [],
    ]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("pieces", [classify.words, Characters().encode_batch])
def test_it_is_an_estimator_from_texts_to_classes(classes, pieces):
    texts, codes, _ = sources(default_rng(0), classes, 60, 1.0)
    labels = np.array(["alpha", "beta", "gamma"])[codes]
    unigram = classify.unigram(pieces, C=0.1)
    assert unigram.fit(texts, labels) is unigram
    assert unigram.classes_.tolist() == sorted(set(labels))
    probabilities = unigram.predict_proba(texts)
    assert probabilities.sum(axis=1) == pytest.approx(1)
    assert (unigram.predict(texts) == unigram.classes_[probabilities.argmax(axis=1)]).all()
    assert set(unigram.predict(["", "pieces never seen"])) <= set(labels)


def test_it_can_be_cloned_nested_and_searched():
    texts, labels, _ = sources(default_rng(0), 2, 60, 1.0)
    unigram = classify.unigram(classify.words, C=0.1)
    copy = clone(unigram)
    assert copy.get_params()["linear__C"] == 0.1
    assert not hasattr(copy["linear"], "coef_")
    assert (clone(unigram).fit(texts, labels).predict_proba(texts) == unigram.fit(texts, labels).predict_proba(texts)).all()
    assert cross_val_score(make_pipeline(unigram), texts, labels, cv=3).mean() > 0.6
    search = GridSearchCV(unigram, {"linear__C": [0.01, 0.1]}, cv=3).fit(texts, labels)
    assert search.best_params_["linear__C"] in (0.01, 0.1)


@pytest.mark.parametrize("kind", ["words", "subwords"])
def test_rows_of_the_study_give_what_a_fit_on_the_texts_gives(kind):
    """Columns of other texts have weight zero and change nothing."""
    texts, labels, _ = sources(default_rng(0), 3, 60, 1.0)
    texts = [*texts, "pieces of quite another zoo", "¿ß?"]
    tokenizer = Characters()
    features = classify.featurise(kind, texts, tokenizer)
    rows = default_rng(1).permutation(180)
    fit, held = rows[:120], rows[120:]
    linear = classify.linear(0.1).fit(features.counts_NV[fit], labels[fit])
    unigram = classify.unigram(classify.words if kind == "words" else tokenizer.encode_batch, 0.1)
    unigram.fit([texts[i] for i in fit], labels[fit])
    unseen = np.asarray(features.counts_NV[fit].sum(axis=0)) == 0
    assert unseen.any()
    assert (linear.coef_[:, unseen] == 0).all()
    assert linear.predict_proba(features.counts_NV[held]) == pytest.approx(
        unigram.predict_proba([texts[i] for i in held]), abs=1e-4
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
    assert features.names_V.tolist() == ["a", "b", "<233>"]
    assert features.counts_NV.toarray().tolist() == [[2, 2, 0], [0, 0, 0], [1, 0, 1]]
    assert classify.featurise("words", ["b a, b"], Characters()).names_V.tolist() == [",", "a", "b"]


def test_texts_without_a_piece_are_a_clear_mistake():
    with pytest.raises(UserError, match=r"none of 2 texts has words"):
        classify.featurise("words", ["", "  "], Characters())


def test_choice_follows_validation_log_loss_and_refits_on_both_parts():
    texts, labels, _ = sources(default_rng(0), 2, 150, 0.5)
    features = classify.featurise("words", texts, Characters())
    part = default_rng(1).choice(3, size=300, p=[0.5, 0.2, 0.3])
    grid = (1.0, 0.01, 0.1, 0.001)
    chosen = classify.choose(features.counts_NV, labels, part == 0, part == 1, grid)
    losses = {}
    for C in grid:
        plain = classify.linear(C).fit(features.counts_NV[part == 0], labels[part == 0])
        losses[C] = log_loss(labels[part == 1], plain.predict_proba(features.counts_NV[part == 1]))
    assert min(losses, key=losses.get) == chosen.C
    both = classify.linear(chosen.C).fit(features.counts_NV[part < 2], labels[part < 2])
    assert (chosen.coef_ == both.coef_).all()


def test_equal_losses_take_the_smallest_c():
    counts = sparse.csr_array(np.ones((8, 1)))  # one piece, once in every text: nothing to learn
    labels, training = np.tile([0, 1], 4), np.arange(8) < 4
    assert classify.choose(counts, labels, training, ~training, (1.0, 0.01, 0.1)).C == 0.01


@pytest.mark.parametrize("classes", [2, 3])
def test_telling_pieces_are_those_that_were_planted(classes):
    random = default_rng(0)
    labels = np.repeat(np.arange(classes), 100)
    texts = [f"the the {'the ' * random.integers(3)}{'mark' + str(k) if random.random() < 0.5 else ''}" for k in labels]
    features = classify.featurise("words", texts, Characters())
    fitted = classify.linear(1.0).fit(features.counts_NV, labels)
    telling = classify.telling(fitted, features.counts_NV, features.names_V, 2)
    assert [pieces[0] for pieces in telling] == [f"mark{k}" for k in range(classes)]
    assert all(len(pieces) <= 2 for pieces in telling)
    assert all("mark1" not in pieces for pieces in (telling[0], *telling[2:]))


def test_telling_pieces_are_common_as_well_as_one_sided():
    labels = np.repeat([0, 1], 100)
    often = np.tile(np.arange(100), 2) < np.where(labels == 0, 75, 25)
    texts = [f"the {'often' if o else ''} {'hapax' if i < 2 else ''}" for i, o in enumerate(often)]
    features = classify.featurise("words", texts, Characters())
    fitted = classify.linear(100.0).fit(features.counts_NV, labels)
    hapax, often = -fitted.coef_[0, :2]
    assert hapax > often > 0
    assert classify.telling(fitted, features.counts_NV, features.names_V, 2)[0] == ["often", "hapax"]
