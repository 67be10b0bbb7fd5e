"""What a configuration accepts, how it says no, and what it is called by."""

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natfp_jax import config
from natfp_jax.config import (
    Attribution,
    Conversations,
    Corpus,
    Data,
    Experiment,
    Factor,
    Llama3Rope,
    Lora,
    MachineDocs,
    MachineQA,
    Mesh,
    Model,
    Optimiser,
    Parent,
    Perturb,
    Published,
    Run,
    Sampling,
    Seeds,
    Stories,
    Study,
    TextFolder,
    Tfds,
    fingerprint,
    from_json,
    override,
    replace,
    to_json,
)
from natfp_jax.errors import UserError

STUDY = Study(name="a", factors=(Factor("seeds.init", (0, 1)),))


def refused(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- replace and override ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("experiment.seeds.init=3", 3),
        ("experiment.optimiser.learning_rate=1e-2", 0.01),
        ("experiment.optimiser.learning_rate=1", 1.0),
        ("experiment.model.tied=false", False),
        ("experiment.model.mlp=gelu", "gelu"),
        ("experiment.model.kv_heads=2", 2),
        ("experiment.model.kv_heads=null", None),
        ("experiment.corpus.tokenizer=some/tokenizer.json", "some/tokenizer.json"),
        ("experiment.corpus.tokenizer=3", "3"),  # a text that looks like a number
        ("experiment.corpus.tokenizer=null", None),
        ('experiment.corpus.source={"kind":"stories","count":5}', Stories(count=5)),
        ('experiment.perturb={"index":7}', Perturb(index=7)),
        ("experiment.perturb=null", None),
        ("run.checkpoints=[0.1,0.5]", (0.1, 0.5)),
        ("run.checkpoints=[]", ()),
        ("run.mesh.fsdp=2", 2),
        ("name=7", "7"),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(assignment, expected):
    path = assignment.partition("=")[0]
    changed = override(STUDY, assignment)
    value = changed
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)
    assert replace(STUDY, path, expected) == changed
    untouched = STUDY  # nothing else has changed
    for part in path.split("."):
        untouched = getattr(untouched, part)
    assert replace(changed, path, untouched) == STUDY


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("experiment.model.widht=3", ["no field 'widht'", "did you mean 'experiment.model.width'"]),
        ("experimant.model.width=3", ["Study has no field 'experimant'", "did you mean 'experiment'"]),
        ("experiment.model.zzz=3", ["its fields are width, layers, heads"]),
        ("experiment..init=3", ["experiment has no field ''"]),
        ("experiment.seeds.init.low=3", ["experiment.seeds.init is 0 and has no field 'low'"]),
        ("experiment.perturb.ulps=3", ["experiment.perturb is None and has no field 'ulps'"]),
        ("experiment.steps=3", ["no field 'steps'"]),  # a property
        ("experiment.seeds.init=3.5", ["experiment.seeds.init: got '3.5'", "valid integer"]),
        ("experiment.seeds.init=3.0", ["got '3.0'", "valid integer"]),
        ("experiment.seeds.init=true", ["got 'true'", "valid integer"]),
        ("experiment.seeds.init=", ["got ''", "valid integer"]),
        ("experiment.seeds.init=-1", ["got '-1'", "greater than or equal to 0"]),
        (f"experiment.seeds.init={2**32}", ["less than 4294967296"]),
        ("experiment.model.tied=1", ["got '1'", "valid boolean"]),
        ("experiment.model.mlp=relu", ["got 'relu'", "'swiglu', 'gelu' or 'gelu_exact'"]),
        ("experiment.optimiser.learning_rate=0", ["greater than 0"]),
        ("experiment.optimiser.learning_rate=NaN", ["got 'NaN'", "finite number"]),
        ("experiment.optimiser.learning_rate=1e400", ["got '1e400'", "finite number"]),
        ('experiment.model.biases=["o", "qkv"]', ["biases are given in the order", "each once"]),
        ('experiment.model.biases=["o", "o"]', ["biases are given in the order", "each once"]),
        ("experiment.model.kv_heads=NaN", ["got 'NaN'", "valid integer"]),  # not None
        ("sampling.top_k=Infinity", ["got 'Infinity'", "valid integer"]),
        ("run.checkpoints=[0.5,2]", ["run.checkpoints: got '[0.5,2]', 1: input should be less than or equal to 1"]),
        ("run.checkpoints=0.5", ["got '0.5'", "valid array"]),
        ('experiment.perturb={"ulp":1}', ["ulp: unexpected keyword argument"]),
        ('experiment.perturb={"ulps":"1"}', ["ulps: input should be a valid integer"]),
        ('experiment.corpus.source={"kind":"storys"}', ["'storys'", "'stories'"]),
        ('experiment.corpus.source={"kind":"stories","cont":3}', ["cont: unexpected keyword argument"]),
        ("experiment.model=3", ["experiment.model: got '3'", "should be an object"]),
        ("name=../up", ["name: got '../up'"]),
        ("name=b=c", ["name: got 'b=c'"]),  # the first sign of equality divides
        ("experiment.seeds.init", ["'experiment.seeds.init' is not of the form path=value"]),
        ("=3", ["'=3' is not of the form path=value"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_field_and_value(assignment, parts):
    message = refused(override, STUDY, assignment)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("model.width", "64", "got '64', input should be a valid integer"),
        ("model.width", 64.0, "valid integer"),
        ("model.kv_heads", math.nan, "valid integer"),
        ("model.kv_heads", np.int64(2), "numpy.int64"),
        ("perturb", Model(), "unexpected keyword argument"),
        ("seeds", {"init": 1, "ordre": 1}, "ordre: unexpected keyword argument"),
    ],
)
def test_replace_checks_the_type(path, value, part):
    assert part in refused(replace, Experiment(), path, value)


def test_replace_leaves_the_original_alone():
    base = Experiment()
    assert replace(base, "seeds.init", 5) == Experiment(seeds=Seeds(init=5))
    assert base == Experiment()


@pytest.mark.parametrize(("windows", "epochs", "batch", "steps"), [(64, 2, 8, 16), (6, 2, 4, 3), (1, 1, 1, 1)])
def test_steps(windows, epochs, batch, steps):
    assert Experiment(data=Data(windows=windows, epochs=epochs, batch=batch)).steps == steps


def test_steps_must_be_whole():
    message = refused(lambda: Experiment(data=Data(windows=65, epochs=2, batch=8)).steps)
    assert message.startswith("steps are not whole: windows 65 x epochs 2 / batch 8 = 16.25; ")


# --- JSON -------------------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 10**6)
RATES = st.floats(min_value=1e-12, max_value=1e6)
FRACTIONS = st.floats(0, 1)
SOURCES = st.one_of(
    st.builds(MachineDocs),
    st.builds(MachineQA),
    st.builds(Conversations, path=st.text()),
    st.builds(TextFolder, path=st.text(), text_key=st.text()),
    st.builds(Stories, count=SIZES, seed=SEEDS),
    st.builds(Tfds, name=st.text(), data_dir=st.none() | st.text()),
)
EXPERIMENTS = st.builds(
    Experiment,
    corpus=st.builds(Corpus, source=SOURCES, vocabulary=SIZES, tokenizer=st.none() | st.text()),
    model=st.builds(
        Model,
        width=SIZES,
        kv_heads=st.none() | SIZES,
        mlp=st.sampled_from(["swiglu", "gelu", "gelu_exact"]),
        biases=st.sampled_from([(), ("qkv",), ("o", "mlp")]),
        rope_scaling=st.none() | st.builds(Llama3Rope, factor=RATES, context=SIZES),
        tied=st.booleans(),
        init_scale=RATES,
    ),
    data=st.builds(Data, windows=SIZES, epochs=SIZES, batch=SIZES),
    optimiser=st.builds(
        Optimiser,
        kind=st.sampled_from(["adamw", "lion", "muon"]),
        learning_rate=RATES,
        warmup=FRACTIONS,
        beta2=st.floats(0, 1, exclude_max=True),
        weight_decay=st.just(0.0) | RATES,
    ),
    seeds=st.builds(Seeds, init=SEEDS, order=SEEDS),
    perturb=st.none() | st.builds(Perturb, parameter=st.text(), index=SIZES, ulps=st.integers(-9, 9)),
)
LEVELS = st.lists(st.one_of(st.integers(-9, 9), st.text(), st.booleans(), st.none(), RATES), max_size=4).map(tuple)
STUDIES = st.builds(
    Study,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True),
    experiment=EXPERIMENTS,
    factors=st.lists(st.builds(Factor, path=st.text(), levels=LEVELS), max_size=3).map(tuple),
    design=st.sampled_from(["crossed", "one_at_a_time"]),
    run=st.builds(Run, mesh=st.builds(Mesh, data=st.integers(0, 9)), checkpoints=st.lists(FRACTIONS, max_size=3).map(tuple)),
    sampling=st.builds(Sampling, top_k=st.none() | SIZES),
    attribution=st.builds(Attribution, classifiers=st.sampled_from([("words",), ("subwords", "words"), ("subwords",)])),
)


@given(STUDIES)
def test_json_and_back(study):
    text = json.dumps(to_json(study), allow_nan=False)
    assert from_json(Study, json.loads(text)) == study


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"seeds": {"init": "0"}}, "not a Experiment: seeds.init: input should be a valid integer"),
        ({"sedes": {}}, "sedes: unexpected keyword argument"),
        ({"model": {"depth": 3}}, "model.depth: unexpected keyword argument"),
        ({"corpus": {"source": {"kind": "tea"}}}, "corpus.source: "),
        ({"optimiser": {"learning_rate": math.nan}}, "optimiser.learning_rate: input should be a finite number"),
    ],
)
def test_json_that_is_no_experiment(values, part):
    assert part in refused(from_json, Experiment, values)


# --- identity ---------------------------------------------------------------------------------------------------------


def another(name, value):
    """A valid value of a field that differs from `value`."""
    texts = {"mlp": "gelu", "dtype": "bfloat16", "kind": "lion", "schedule": "linear", "nonfinite": "skip"}
    texts |= {"norm": "layer", "positions": "learned"}
    others = {"kv_heads": 2, "mlp_width": 96, "targets": ("k",), "head_width": 16, "context": 64, "biases": ("o",)}
    others |= {"rope_scaling": Llama3Rope(), "published": Published("a", "models/a")}
    if name in texts:
        return texts[name]
    if name in others:
        return others[name]
    if isinstance(value, bool):
        return not value
    return {int: lambda: value + 1, float: lambda: value / 2 + 0.001, str: lambda: value + "x"}[type(value)]()


def leaves(part, path=""):
    """The dotted paths of all fields below a dataclass, with their values."""
    for field in dataclasses.fields(part):
        value, where = getattr(part, field.name), f"{path}.{field.name}".lstrip(".")
        yield from leaves(value, where) if dataclasses.is_dataclass(value) else [(where, value)]


def test_every_field_that_decides_weights_changes_the_fingerprint():
    base = Experiment(perturb=Perturb(), lora=Lora(), parent=Parent(Experiment()))
    found = {fingerprint(Experiment()), fingerprint(base)}
    elsewhere = "corpus.", "parent.experiment."  # what their hashes among the inputs stand for
    paths = [(path, value) for path, value in leaves(base) if not path.startswith(elsewhere)]
    assert {"seeds.init", "model.dtype", "data.batch", "optimiser.clip", "perturb.ulps"} <= {path for path, _ in paths}
    for path, value in paths:
        found.add(fingerprint(replace(base, path, another(path.rsplit(".", 1)[-1], value))))
    assert len(found) == len(paths) + 2


def test_every_input_changes_the_fingerprint_and_the_source_of_the_corpus_does_not():
    inputs = {"corpus": "a", "tokenizer": "b", "pool": "c"}
    found = {fingerprint(Experiment(), {**inputs, name: "d"}) for name in inputs} | {fingerprint(Experiment(), inputs)}
    assert len(found) == 4
    child = Experiment(parent=Parent(Experiment()))
    for corpus in (Corpus(source=Stories()), Corpus(vocabulary=99), Corpus(shards=1)):
        assert fingerprint(Experiment(corpus=corpus), inputs) == fingerprint(Experiment(), inputs)
        parent = Parent(Experiment(corpus=corpus))
        assert fingerprint(Experiment(corpus=corpus, parent=parent), inputs) == fingerprint(child, inputs)


def test_the_fingerprint_is_the_hash_of_what_is_not_default():
    experiment = Experiment(model=Model(width=64, kv_heads=2), seeds=Seeds(order=3))
    text = '{"config":{"model":{"kv_heads":2,"width":64},"seeds":{"order":3}},"inputs":{"pool":"p"}}'
    assert fingerprint(experiment, {"pool": "p"}) == hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint(Experiment()) == hashlib.sha256(b'{"config":{},"inputs":{}}').hexdigest()


def test_the_kind_of_a_source_is_always_hashed_and_that_of_the_optimiser_only_where_it_is_not_the_default():
    """Two sources at their defaults differ in nothing else; fingerprints are older than other optimisers than AdamW."""
    text = '{"config":{"optimiser":{"learning_rate":0.5}},"inputs":{}}'
    experiment = Experiment(optimiser=Optimiser(learning_rate=0.5))
    assert fingerprint(experiment) == hashlib.sha256(text.encode()).hexdigest()
    other = text.replace('"learning_rate"', '"kind":"muon","learning_rate"')
    assert fingerprint(replace(experiment, "optimiser.kind", "muon")) == hashlib.sha256(other.encode()).hexdigest()
    assert fingerprint(Stories()) == hashlib.sha256(b'{"config":{"kind":"stories"},"inputs":{}}').hexdigest()


def test_a_field_that_is_added_later_at_its_default_changes_no_fingerprint():
    later = dataclasses.make_dataclass("Model", [("heads_of_tomorrow", int, 0)], bases=(Model,), frozen=True)
    old, new = Experiment(model=Model(width=64)), Experiment(model=later(width=64))
    assert fingerprint(new) == fingerprint(old)
    assert fingerprint(Experiment(model=later(width=64, heads_of_tomorrow=1))) != fingerprint(old)


def test_run_settings_are_no_part_of_an_experiment():
    def kinds(kind):
        inner = [type(getattr(kind(), field.name)) for field in dataclasses.fields(kind)]
        return {kind}.union(*(kinds(part) for part in inner if dataclasses.is_dataclass(part)))

    assert not kinds(Experiment) & {Run, Mesh, Sampling, Attribution, Study}
    assert set(config.__all__) >= {kind.__name__ for kind in kinds(Experiment)}
