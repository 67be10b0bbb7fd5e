"""The classifier made of a pretrained encoder: tiny ones of random weights, written by transformers themselves."""

import builtins
import logging
import shutil

import numpy as np
import pytest
from numpy.random import default_rng
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from natfp_jax import encoder
from natfp_jax.encoder import Encoder
from natfp_jax.errors import UserError

WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KINDS = ["deberta", "bert"]


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers", reason="transformers are not installed: pip install -e '.[hf]'")
    return pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[hf]'")


@pytest.fixture(scope="module")
def folders(torch, tmp_path_factory):
    """A DeBERTaV2 and a BERT, with the tokenizer of eight words."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": len(SPECIAL + WORDS), "max_position_embeddings": 24, "type_vocab_size": 2}
    configs = {
        "deberta": transformers.DebertaV2Config(
            **sizes, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, pooler_hidden_size=32
        ),
        "bert": transformers.BertConfig(**sizes),
    }
    found = {}
    for kind, config in configs.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformers.AutoModel.from_config(config).save_pretrained(found[kind])
        vocabulary = {word: n for n, word in enumerate(SPECIAL + WORDS)}
        transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(found[kind])
    return found


def sources(seed, texts):
    """Two sources of independent words that differ in how often they have each."""
    random, chances = default_rng(seed), np.linspace(1, 3, len(WORDS))
    chances_KV = np.stack([chances, chances[::-1]]) / chances.sum()
    found = [" ".join(random.choice(WORDS, 12, p=p_V)) for p_V in chances_KV for _ in range(texts)]
    return found, np.repeat(["up", "down"], texts), chances_KV


@pytest.fixture(scope="module")
def some():
    return sources(0, 60)[:2]


def small(folder, **settings):
    return Encoder(folder, **{"batch": 32, "learning_rate": 3e-3, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_two_sources_nearly_as_well_as_they_can_be_told_apart(kind, folders):
    training, validation, (texts, labels, chances_KV) = sources(1, 600), sources(2, 100), sources(3, 500)
    fitted = small(folders[kind], epochs=3).fit(*training[:2], validation[:2])
    odds_V = np.log(chances_KV[0] / chances_KV[1])
    odds_N = np.array([sum(odds_V[WORDS.index(word)] for word in text.split()) for text in texts])
    best = ((odds_N > 0) == (labels == "up")).mean()
    assert 0.85 < best < 0.99
    assert fitted.score(texts, labels) > best - 0.06
    assert -np.log(fitted.predict_proba(texts)[np.arange(1000), (labels == "up").astype(int)]).mean() < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_estimator(kind, folders, some):
    texts, labels = some
    unfitted = small(folders[kind])
    assert unfitted.get_params()["folder"] is folders[kind]
    given = dict(vars(unfitted))
    with pytest.raises(NotFittedError):
        unfitted.predict(texts)
    assert clone(unfitted).get_params() == unfitted.get_params()
    assert unfitted.fit(texts, labels) is unfitted
    assert {name: vars(unfitted)[name] for name in given} == given
    assert all(name.endswith("_") for name in set(vars(unfitted)) - set(given))
    assert not hasattr(clone(unfitted), "classes_")
    assert unfitted.classes_.tolist() == ["down", "up"]
    found_NK = unfitted.predict_proba(texts)
    assert found_NK.shape == (120, 2)
    assert found_NK.sum(axis=1) == pytest.approx(1)
    assert (unfitted.predict(texts) == unfitted.classes_[found_NK.argmax(axis=1)]).all()
    assert unfitted.predict_proba([]).shape == (0, 2)
    assert unfitted.__sklearn_tags__().input_tags.string
    assert np.isfinite(unfitted.predict_proba(["", "ß¿ \0", texts[0] * 50])).all()


def test_it_works_in_a_pipeline(folders, some):
    texts, labels = some
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipeline = Pipeline([("lower", lower), ("encoder", small(folders["bert"]))])
    upper, validation = [text.upper() for text in texts], (texts[:20], ["up", "down"] * 10)
    pipeline.fit(upper, labels, encoder__validation=validation)
    alone = small(folders["bert"]).fit(texts, labels, validation)
    assert (clone(pipeline).fit(upper, labels, encoder__validation=validation).predict_proba(upper)
            == alone.predict_proba(texts)).all()  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_depends_on_the_texts_and_the_seed_alone(kind, folders, some, torch):
    texts, labels = some
    found_NK = small(folders[kind]).fit(texts, labels).predict_proba(texts)
    order = default_rng(1).permutation(len(texts))
    torch.rand(3)  # whatever others drew before
    again = small(folders[kind]).fit([texts[n] for n in order], labels[order])
    assert (again.predict_proba(texts) == found_NK).all()
    assert (small(folders[kind], seed=1).fit(texts, labels).predict_proba(texts) != found_NK).any()
    again.fit(texts, np.tile([5, 2, 3], 40))  # forgets all of it
    assert again.classes_.tolist() == [2, 3, 5]
    assert (again.fit(texts, labels).predict_proba(texts) == found_NK).all()


def test_nothing_of_a_fit_is_seen_outside(folders, some, torch):
    import transformers

    before, level = torch.random.get_rng_state(), transformers.logging.get_verbosity()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    fitted = small(folders["deberta"]).fit(*some)
    fitted.predict_proba(some[0])
    assert (torch.random.get_rng_state() == before).all()
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    assert transformers.logging.get_verbosity() == level


def test_the_weights_with_the_least_validation_loss_are_kept_at_the_best_scale(folders):
    held, held_labels = sources(5, 40)[:2]
    fitted = small(folders["bert"], epochs=3, batch=16).fit(*sources(0, 200)[:2], (held, held_labels))
    assert len(fitted.losses_) > 2

    def loss(factor=1.0):
        found_NK = fitted.predict_proba(held) ** factor
        own_N = found_NK[np.arange(len(held)), np.searchsorted(fitted.classes_, held_labels)]
        return -np.log(own_N / found_NK.sum(axis=1)).mean()

    assert loss() == pytest.approx(min(fitted.losses_), abs=1e-6)
    assert loss() < min(loss(0.9), loss(1.1))


def test_a_text_does_not_depend_on_its_neighbours_nor_on_what_is_cut_off(folders, some):
    texts, labels = some
    fitted = small(folders["deberta"], tokens=8).fit(texts, labels)
    together = fitted.predict_proba(texts)
    for n in (0, 31, 32, 119):
        assert fitted.predict_proba([texts[n]])[0] == pytest.approx(together[n], rel=1e-4)
    assert fitted.predict_proba([texts[0] + " fox fox"])[0] == pytest.approx(together[0], rel=1e-4)


def test_a_text_is_never_longer_than_the_encoder_is_made_for(folders, some):
    texts, labels = some
    fitted = small(folders["bert"], tokens=512).fit([" ".join([text] * 9) for text in texts], labels)
    assert fitted.tokens_ == 24


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_nothing(kind, folders, some, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        small(folders[kind]).fit(*some)
    said = capfd.readouterr()
    assert (said.out, said.err, caplog.text) == ("", "", "")


def test_mistakes_are_said_in_one_line(folders, some, tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere has no config.json and no model.safetensors and no a tokenizer: give a local"
    ):
        Encoder(tmp_path / "nowhere").fit(*some)
    pickled = tmp_path / "pickled"
    shutil.copytree(folders["bert"], pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled has no model.safetensors: give"):
        Encoder(pickled).fit(*some)
    damaged = tmp_path / "damaged"
    shutil.copytree(folders["bert"], damaged)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"damaged cannot be read as an encoder \(.+\): give one that") as raised:
        Encoder(damaged).fit(*some)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="two classes to train on, got 2 of"):
        small(folders["bert"]).fit(["a", "b"], ["x", "x"], (["a"], ["x"]))
    with pytest.raises(UserError, match=r"validation loss is nan after check 1, .+ lower its learning_rate"):
        small(folders["bert"], learning_rate=1e30).fit(*some)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_its_packages_it_says_what_to_install(missing, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *others):
        if name.partition(".")[0] in (missing, "transformers"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r"an encoder needs PyTorch and transformers \(No module named .+\): pip install"
    ) as raised:
        encoder.check(tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="pip install"):
        Encoder(tmp_path).fit(["a", "b"], ["x", "y"])
