"""What the files of an output folder prove of the lineage that they claim.

Owns `natfp audit`: every claim of runs and studies, recomputed from seeds and files wherever this machine can, and its verdict.
Writes nothing and mends nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
from rich import box
from rich.table import Table
from rich.text import Text

from natfp_jax import checkpoint, config, files, lineage, mesh, params, texts
from natfp_jax.config import Experiment, Run, Study
from natfp_jax.corpus import Store, opened
from natfp_jax.errors import UserError
from natfp_jax.lineage import weight_hash
from natfp_jax.order import Order, order_hash
from natfp_jax.progress import Progress
from natfp_jax.runs import RunFolder
from natfp_jax.study import Arm, arms, draws
from natfp_jax.train import conditions, replay

__all__ = ["REPLAYED", "Claim", "audit", "table"]

REPLAYED = 8  # steps that are trained again by default
Verdict = Literal["proven", "recorded", "false"]


@dataclass(frozen=True)
class Claim:
    """One claim and what became of it.

    Attributes:
      subject: what it is about, such as "arm init0-order1".
      claim: a sentence.
      verdict: "proven": recomputed, and so. "recorded": it says so, and cannot be recomputed here. "false": it is not so.
      detail: what was found instead, or why it could not be recomputed.
    """

    subject: str
    claim: str
    verdict: Verdict
    detail: str = ""


def audit(out: Path, progress: Progress, replayed: int = REPLAYED) -> list[Claim]:
    """Every claim of the corpora, runs and studies below `out`.

    Args:
      replayed: how many first steps of each run are trained again.

    Raises:
      UserError: there are no runs.
    """
    folders = sorted(path.parent for path in (out / "runs").glob("*/experiment.json"))
    if not folders:
        expected = out / "runs" / "FINGERPRINT" / "experiment.json"
        raise UserError(f"{out} has no runs, expected {expected}: give the --out of `natfp run`")
    claims: list[Claim] = []
    stores = _stores(out, claims)
    studies = [_Study.read(path, claims) for path in sorted((out / "studies").glob("*/study.json"))]
    names = {entry["fingerprint"]: f"arm {arm}" for study in studies if study for arm, entry in study.listed.items()}
    runs = [_Run(RunFolder(folder), names, stores) for folder in folders]
    known = {run.fingerprint: run for run in runs if run.readable(claims)}
    with progress.task("audit", len(known), "runs") as advance:
        for run in known.values():
            claims += run.claims(known, replayed)
            advance(1)
    for study in studies:
        if study is not None:
            claims += study.claims(known, stores)
    return claims


def table(claims: list[Claim]) -> Table:
    """The claims, subject by subject, and how many of each verdict there are."""
    shown = Table(box=box.SIMPLE, pad_edge=False, caption_justify="left")
    for column in ("subject", "claim", "verdict", "what was found"):
        shown.add_column(column)
    styles = {"proven": "green", "recorded": "yellow", "false": "bold red"}
    before = None
    for claim in claims:
        subject = "" if claim.subject == before else claim.subject
        before = claim.subject
        shown.add_row(Text(subject), Text(claim.claim), Text(claim.verdict, styles[claim.verdict]), Text(claim.detail))
    counts = Counter(claim.verdict for claim in claims)
    shown.caption = f"{counts['proven']} proven, {counts['recorded']} recorded but not proven here, {counts['false']} false"
    return shown


def _attempt(subject: str, claim: str, check: Callable[[], str | None]) -> Claim:
    """The claim with its verdict: `check` returns what was found instead, or raises what a user can mend."""
    try:
        wrong = check()
    except UserError as error:
        wrong = str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a record of another shape
        wrong = f"its records cannot be read ({type(error).__name__}: {error})"
    return Claim(subject, claim, "false", wrong) if wrong else Claim(subject, claim, "proven")


def _unless(expected: object, got: object, what: str) -> str | None:
    return None if got == expected else f"{what} {_short(got)}, expected {_short(expected)}"


def _short(value: object) -> str:
    text = str(value)
    return text[:16] if len(text) == 64 else text


# --- corpora ----------------------------------------------------------------------------------------------------------


def _stores(out: Path, claims: list[Claim]) -> dict[tuple[str, str], Store]:
    """(ids' hash, tokenizer's hash) → the token stores that are what was written."""
    found: dict[tuple[str, str], Store] = {}
    for path in sorted((out / "corpora").glob("*/meta.json")):
        if path.parent.suffix:  # set aside
            continue
        subject = f"corpus {path.parent.name}"

        def whole(folder: Path = path.parent) -> str | None:
            store = opened(folder)
            found[store.sha256, store.tokenizer.sha256] = store
            return _unless(store.recomputed(), store.sha256, "its description says that its ids have sha256")

        claims.append(_attempt(subject, "every file is what was written, and the ids have the recorded hash", whole))
    return found


# --- runs -------------------------------------------------------------------------------------------------------------


class _Run:
    """One run under audit."""

    def __init__(self, run: RunFolder, names: dict[str, str], stores: dict[tuple[str, str], Store]) -> None:
        self.run, self._names, self._stores = run, names, stores
        self.subject = f"run {run.folder.name}"

    def readable(self, claims: list[Claim]) -> bool:
        """Whether the run says what it is; claims that it is what it says."""

        def named() -> str | None:
            owner = files.read_json(self.run.folder / "experiment.json")
            self.experiment = config.from_json(Experiment, owner["experiment"])
            self.inputs: dict[str, str] = owner["inputs"]
            self.fingerprint: str = owner["fingerprint"]
            self.subject = self._names.get(self.fingerprint, self.subject)
            folder = self.run.folder.name
            return _unless(config.fingerprint(self.experiment, self.inputs), self.fingerprint, "its fingerprint is") or _unless(
                folder, self.fingerprint[:16], f"the folder {folder} holds the experiment"
            )

        claim = _attempt(self.subject, "its folder is named after the experiment in it", named)
        claims.append(replace(claim, subject=self.subject))
        return claim.verdict == "proven"

    @cached_property
    def store(self) -> Store | None:
        """The token store that it was trained on, if it is whole and here."""
        return self._stores.get((self.inputs["corpus"], self.inputs["tokenizer"]))

    @cached_property
    def steps(self) -> list[int]:
        """The steps that have a folder."""
        folder = self.run.checkpoints
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """The records that can be read."""
        found = {}
        for step in self.steps:
            with suppress(UserError):
                found[step] = checkpoint.record(self.run.checkpoints, step)
        return found

    @cached_property
    def init_hash(self) -> str | None:
        """What the seed gives on this machine."""
        if self.store is None:
            return None
        specs = params.table(self.experiment.model, self.store.tokenizer.padded_size)
        return weight_hash(params.init(specs, self.experiment.seeds.init, perturb=self.experiment.perturb))

    def order_hashes(self, steps: list[int]) -> dict[int, str]:
        """The order hash at each of `steps`, ascending, from the seed."""
        data = self.experiment.data
        order, fed, at, found = Order(data.windows, data.batch, self.experiment.seeds.order), self.inputs["pool"], 0, {}
        for step in steps:
            for one in range(at, step):
                fed = order_hash(fed, order.rows(one))
            at, found[step] = step, fed
        return found

    def claims(self, known: dict[str, "_Run"], replayed: int) -> Iterator[Claim]:
        """All of the run's claims."""
        steps = f"checkpoints {', '.join(map(str, self.steps))}"
        yield _attempt(self.subject, f"{steps}: every file is what was written", lambda: self._each(self._whole))
        yield _attempt(
            self.subject, f"{steps} are of this experiment", lambda: self._each(lambda step: self._owner(step, known))
        )
        if self.store is None:
            yield Claim(self.subject, "corpus, init and order", "recorded", "its corpus is not here, or is damaged")
        else:
            yield from self._recomputed(known, replayed)
        yield _attempt(self.subject, "each checkpoint descends from the one before it, and all from step 0", self._chain)
        yield _attempt(self.subject, "lineage.json says what the checkpoints say, and the log is whole", self._gathered)

    def _each(self, check: Callable[[int], str | None]) -> str | None:
        """What is wrong with each checkpoint."""

        def wrong(step: int) -> str | None:
            try:
                return check(step)
            except UserError as error:
                return str(error)

        found = {step: wrong(step) for step in self.steps}
        return "; ".join(f"step {step}: {what}" for step, what in found.items() if what) or None

    def _whole(self, step: int) -> None:
        checkpoint.verify(self.run.checkpoints, step)

    def _owner(self, step: int, known: dict[str, "_Run"]) -> str | None:
        owner = checkpoint.record(self.run.checkpoints, step)["fingerprint"]
        if owner == self.fingerprint:
            return None
        whose = known[owner].subject if owner in known else f"the experiment {owner[:16]}"
        return f"it is a checkpoint of {whose}, under the name of {self.subject}"

    def _recomputed(self, known: dict[str, "_Run"], replayed: int) -> Iterator[Claim]:
        assert self.store is not None
        data, store = self.experiment.data, self.store
        yield _attempt(
            self.subject,
            "the pool of windows has the recorded hash",
            lambda: _unless(store.windows(data.seq_len, data.windows).sha256(), self.inputs["pool"], "its pool is recorded as"),
        )
        yield _attempt(self.subject, "checkpoints hold the weights whose hash they record", lambda: self._each(self._weights))
        yield self._init(known)
        yield _attempt(self.subject, "the windows were fed in the order of the seed", lambda: self._order(known))
        yield self._replayed(replayed)

    def _devices(self, step: int | None = None) -> jax.sharding.Mesh:
        """The mesh that a step was trained on, or one device."""
        if step is not None:
            return mesh.make(config.Mesh(**self.records[step]["numerics"]["mesh"]))
        return mesh.make(config.Mesh(), jax.devices()[:1])

    def _weights(self, step: int) -> str | None:
        assert self.store is not None
        if step not in self.records:
            return "its record cannot be read"
        specs = params.table(self.experiment.model, self.store.tokenizer.padded_size)
        like = checkpoint.with_shardings(params.abstract(specs), mesh.param_shardings(self._devices(), specs))
        got, _ = checkpoint.restore(self.run.checkpoints, step, like)
        return _unless(self.records[step]["weights"], weight_hash(got), "its weights have sha256")

    def _same_software(self, step: int) -> bool:
        """Whether this machine draws the numbers that the run's machine drew."""
        there, here = self.records[step]["numerics"], lineage.numerics(self._devices())
        names = ("backend", "device", "machine")
        return all(there[name] == here[name] for name in names) and there["versions"]["jax"] == here["versions"]["jax"]

    def _init(self, known: dict[str, "_Run"]) -> Claim:
        seed = self.experiment.seeds.init
        claim = f"the weights of step 0 are those of init seed {seed}"
        wrong = {step: record["init_hash"] for step, record in self.records.items() if record["init_hash"] != self.init_hash}
        if 0 in self.records and self.records[0]["weights"] != self.init_hash:
            wrong[0] = self.records[0]["weights"]
        if not self.records:
            return Claim(self.subject, claim, "recorded", "there is no checkpoint")
        if not wrong:
            return Claim(self.subject, claim, "proven")
        step, got = next(iter(wrong.items()))
        whose = [run for run in known.values() if run is not self and run.init_hash == got]
        named = f": that is init seed {whose[0].experiment.seeds.init} of {whose[0].subject}" if whose else ""
        detail = f"checkpoint {step} says {_short(got)}, the seed gives {_short(self.init_hash)}{named}"
        if whose or self._same_software(step):
            return Claim(self.subject, claim, "false", detail)
        return Claim(self.subject, claim, "recorded", f"{detail}; it was made by another machine or version of jax")

    def _order(self, known: dict[str, "_Run"]) -> str | None:
        for step, expected in self.order_hashes(list(self.records)).items():
            if (got := self.records[step]["order_hash"]) != expected:
                others = [run for run in known.values() if run is not self and run.order_hashes([step])[step] == got]
                named = f": that is order seed {others[0].experiment.seeds.order} of {others[0].subject}" if others else ""
                seed = self.experiment.seeds.order
                return f"checkpoint {step} records {_short(got)}, order seed {seed} gives {_short(expected)}{named}"
        return None

    def _replayed(self, replayed: int) -> Claim:
        """Trains the first steps again, and compares every hash of weights that is recorded of them."""
        assert self.store is not None
        recorded: dict[int, tuple[str, int]] = {}  # step → hash, and the checkpoint that says so
        for step, record in sorted(self.records.items(), reverse=True):
            recorded[step] = record["weights"], step
            recorded.update({int(early): (sha256, step) for early, sha256 in record["early"].items()})
        wanted = {step: said for step, said in sorted(recorded.items()) if 0 < step <= replayed}
        claim = f"the weights of steps {', '.join(map(str, wanted))} follow from the seeds"
        if not wanted:
            return Claim(self.subject, f"the weights of the first {replayed} steps", "recorded", "none of them is recorded")
        witness = self.records[max(said for _, said in wanted.values())]
        there = witness["numerics"]
        settings = Run(microbatches=there["microbatches"], remat=there["remat"])
        try:
            devices = self._devices(witness["step"])
        except UserError as error:
            return Claim(self.subject, claim, "recorded", str(error))
        here = conditions(self.experiment, settings, devices)
        if differ := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
            return Claim(self.subject, claim, "recorded", f"this machine differs in {', '.join(differ)}")
        for step, weights in replay(self.experiment, self.store, settings, devices, max(wanted)):
            if step in wanted and (got := weight_hash(weights)) != wanted[step][0]:
                detail = f"step {step} gives {_short(got)}, checkpoint {wanted[step][1]} records {_short(wanted[step][0])}"
                return Claim(
                    self.subject, claim, "false", f"{detail}: it was not trained from this step 0, or not by this code"
                )
        return Claim(self.subject, claim, "proven")

    def _chain(self) -> str | None:
        if missing := [step for step in self.steps if step not in self.records]:
            return f"the records of {missing} cannot be read"
        if 0 not in self.records:
            return "there is no checkpoint at step 0"
        init = self.records[0]["weights"]
        for step, record in self.records.items():
            parent = record["parent"]
            if record["init_hash"] != init:
                return f"checkpoint {step} descends from {_short(record['init_hash'])}, step 0 is {_short(init)}"
            if step == 0:
                if parent is not None:
                    return f"checkpoint 0 has a parent, step {parent['step']}"
            elif parent is None or not parent["step"] < step:
                return f"checkpoint {step} has no parent before it"
            elif parent["step"] not in self.records:
                return f"checkpoint {step} descends from step {parent['step']}, which is not here"
            elif (got := self.records[parent["step"]]["weights"]) != parent["weights"]:
                return f"checkpoint {step} descends from {_short(parent['weights'])}, step {parent['step']} is {_short(got)}"
        return None

    def _gathered(self) -> str | None:
        written = files.read_remade(self.run.folder / "lineage.json")
        if written["checkpoints"] != list(self.records.values()):
            return "lineage.json differs from the records of the checkpoints"
        return self.run.damaged_metrics()


# --- studies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Study:
    """One study under audit."""

    folder: Path
    study: Study
    listed: dict[str, dict[str, Any]]  # arm → fingerprint and inputs

    @classmethod
    def read(cls, path: Path, claims: list[Claim]) -> "_Study | None":
        """The study at `path`, if it can be read and has arms; claims that it can."""
        found: list[_Study] = []

        def readable() -> None:
            study = config.from_json(Study, files.read_json(path)["study"])
            if (path.parent / "arms.json").exists():
                found.append(cls(path.parent, study, files.read_json(path.parent / "arms.json")))

        claims.append(_attempt(f"study {path.parent.name}", "study.json and arms.json are what was written", readable))
        return found[0] if found else None

    def claims(self, known: dict[str, _Run], stores: dict[tuple[str, str], Store]) -> Iterator[Claim]:
        """All of the study's claims."""
        subject = f"study {self.study.name}"
        yield _attempt(subject, "every arm is the experiment that the study says", lambda: self._arms(known))
        claim = "arms differ where their seeds differ, and are equal where they are equal"
        yield _attempt(subject, claim, lambda: self._distinct(known))
        yield _attempt(subject, "texts are what was drawn, from the weights of their arm and step", lambda: self._texts(known))
        for name in ("attribution.json", "timings.json", "report/summary.json"):
            if (self.folder / name).exists():
                yield _attempt(subject, f"{name} is what was written", lambda name=name: self._result(name, known))  # type: ignore[misc]

    def _all(self) -> dict[str, Arm]:
        return {arm.id: arm for arm in arms(self.study)}

    def _arms(self, known: dict[str, _Run]) -> str | None:
        for name, arm in self._all().items():
            entry = self.listed[name]
            if wrong := _unless(
                config.fingerprint(arm.experiment, entry["inputs"]), entry["fingerprint"], f"arms.json says that arm {name} is"
            ):
                return wrong
            if entry["fingerprint"] not in known:
                return f"arm {name} has no run that can be read, expected {entry['fingerprint'][:16]}"
        return None

    def _distinct(self, known: dict[str, _Run]) -> str | None:
        """What must differ differs, and what must be equal is; between arms of one size, corpus and length."""
        seen: dict[Any, tuple[str, Any]] = {}
        for name, arm in self._all().items():
            run, experiment = known.get(self.listed[name]["fingerprint"]), arm.experiment
            if run is None or not run.records:
                continue
            last, data = run.records[max(run.records)], experiment.data
            start = experiment.model, experiment.seeds.init, experiment.perturb, self.listed[name]["inputs"]["tokenizer"]
            order = (
                data.windows,
                data.epochs,
                data.batch,
                experiment.seeds.order,
                self.listed[name]["inputs"]["pool"],
                last["step"],
            )
            first = run.records[min(run.records)]
            for kind, source, got in (("init", start, first["weights"]), ("order", order, last["order_hash"])):
                pairs: tuple[tuple[Any, Any], ...] = ((("hash", kind, got), source), (("source", kind, source), got))
                for key, expected in pairs:
                    other, had = seen.setdefault(key, (name, expected))
                    if had != expected:
                        relation = "share" if key[0] == "hash" else "do not share"
                        return f"arms {other} and {name} {relation} the {kind} hash {_short(got)}"
            for step, record in run.records.items():
                other, _ = seen.setdefault(("weights", record["weights"]), (name, None))
                if other != name and step > 0:
                    return f"arms {other} and {name} have the same weights at step {step}, {_short(record['weights'])}"
        return None

    def _texts(self, known: dict[str, _Run]) -> str | None:
        found = []
        for one in draws(self.study):
            path = self.folder / "draws" / f"{one.arm}.step{one.step}.draw{one.number}.parquet"
            if texts.exists(path):
                claim = _attempt("", "", lambda path=path, one=one: self._drawn(path, one, known))  # type: ignore[misc]
                found += [f"{path.stem}: {claim.detail}"] if claim.verdict == "false" else []
        return "; ".join(found) or None

    def _drawn(self, path: Path, one: Any, known: dict[str, _Run]) -> str | None:
        table, record = texts.read(path), texts.read_record(path)
        run = known[self.listed[one.arm]["fingerprint"]]
        for column, expected in (("arm", one.arm), ("checkpoint", one.step), ("draw", one.number)):
            if set(table[column].to_pylist()) - {expected}:
                return f"its column {column} is not {expected} everywhere"
        return (
            _unless(files.hash_json(table["ids"].to_pylist()), record["texts"], "its ids are recorded as")
            or _unless(run.records[one.step]["weights"], record["inputs"]["weights"], "it was drawn from the weights")
            or _unless(run.fingerprint, record["fingerprint"], "it was drawn from the experiment")
        )

    def _result(self, name: str, known: dict[str, _Run]) -> str | None:
        written = files.read_remade(self.folder / name)
        if name != "report/summary.json":
            return None
        files.verify(self.folder / "report", written["files"])
        for arm in written["arms"]:
            run = known[self.listed[arm["id"]]["fingerprint"]]
            last = run.records[max(run.records)]
            for said, recorded in (("init_hash", "init_hash"), ("order_hash", "order_hash"), ("final_hash", "weights")):
                if wrong := _unless(last[recorded], arm[said], f"it gives arm {arm['id']} the {said}"):
                    return wrong
        return None
