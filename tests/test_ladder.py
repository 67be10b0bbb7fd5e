"""The rungs: each is fitted on the texts that are for it, and asked for the others."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.random import default_rng
from test_reading import Chains, Characters

from natfp_jax import ladder, stats
from natfp_jax.config import Attribution
from natfp_jax.errors import UserError
from natfp_jax.ladder import Task
from natfp_jax.language_models import LanguageModels
from natfp_jax.reader import Reader

NETWORKS = {"lm": LanguageModels, "transformer": Reader}
SETTINGS = Attribution(regularisation=(0.1,))


class Letters(Characters):
    """The letters as subwords."""

    def decode(self, ids):
        return "".join("?abcd#"[i] for i in ids)


@pytest.fixture(scope="module")
def chains():
    return Chains(0, 150, length=8)


def task_of(chains, seed=0, rows=None):
    """A third each for training, validation and test."""
    part_N = default_rng(seed).permutation(np.arange(len(chains.texts)) % 3)
    labels_N = (chains.labels == "fore").astype(int)
    rows = np.arange(len(labels_N)) if rows is None else rows
    parts = [part_N == part for part in range(3)]
    return Task("comparison of chains", rows, labels_N, *parts, tried_N=np.ones(len(labels_N), bool))


@pytest.mark.parametrize("kind", ["lm", "transformer"])
def test_a_network_is_the_estimator_fitted_on_the_parts(kind, chains):
    task = task_of(chains)
    found = ladder.prepare(kind, chains.texts, Letters()).judge(task, replace(SETTINGS, split_seed=5))
    texts = np.array(chains.texts)

    def part(mask_N):
        return texts[mask_N].tolist(), task.labels_N[mask_N]

    alone = NETWORKS[kind](Letters(), seed=5).fit(*part(task.training_N), validation=part(task.validation_N))
    assert (found.probabilities_NK == alone.predict_proba(part(task.test_N)[0])).all()
    assert found.chosen == {"looks": alone.epoch_ + 1}
    held, label_N = part(task.validation_N)
    assert found.validation_bits == pytest.approx(stats.bits_per_text(alone.predict_proba(held), label_N), abs=1e-6)


@pytest.mark.parametrize("kind", ["subwords", "words", "ngrams", "lm"])
def test_the_test_texts_choose_and_teach_nothing(kind, chains):
    """Other labels of the test texts change no probability, and other test texts change none of those that stay."""
    task, texts = task_of(chains), [" ".join(text) for text in chains.texts]
    judged = ladder.prepare(kind, texts, Letters()).judge(task, SETTINGS)
    turned_N = np.where(task.test_N, 1 - task.labels_N, task.labels_N)
    again = ladder.prepare(kind, texts, Letters()).judge(replace(task, labels_N=turned_N), SETTINGS)
    assert (again.probabilities_NK == judged.probabilities_NK).all()
    assert again.validation_bits == judged.validation_bits
    stay = np.flatnonzero(task.test_N)[:20]
    few_N = np.isin(np.arange(len(texts)), stay)
    fewer = ladder.prepare(kind, texts, Letters()).judge(replace(task, test_N=few_N), SETTINGS)
    assert fewer.probabilities_NK == pytest.approx(judged.probabilities_NK[:20], abs=1e-6)


@pytest.mark.parametrize("kind", ["subwords", "lm"])
def test_what_else_a_study_has_does_not_matter(kind, chains):
    """Rows say which of the prepared texts a comparison is of."""
    task, others = task_of(chains), ["dddd"] * 50
    alone = ladder.prepare(kind, chains.texts, Letters()).judge(task, SETTINGS)
    among = ladder.prepare(kind, [*others, *chains.texts], Letters()).judge(replace(task, rows=task.rows + 50), SETTINGS)
    assert among.probabilities_NK == pytest.approx(alone.probabilities_NK, abs=1e-9)


def test_a_network_needs_texts_of_two_classes(chains):
    task = task_of(chains)
    one = replace(task, labels_N=np.zeros_like(task.labels_N))
    with pytest.raises(UserError, match="texts of two classes"):
        ladder.prepare("lm", chains.texts, Letters()).judge(one, SETTINGS)


def test_an_encoder_needs_a_folder(chains):
    with pytest.raises(UserError, match=r"as attribution\.encoder or, with --texts, --encoder"):
        ladder.prepare("encoder", chains.texts, Letters()).judge(task_of(chains), SETTINGS)
