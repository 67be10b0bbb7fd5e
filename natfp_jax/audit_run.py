"""One run under audit: what its files claim of its lineage.

Owns the claims of one run, recomputed from its seeds and its corpus. Must not know studies.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax

from natfp_jax import checkpoint, config, descent, files, lineage, lora, mesh, params
from natfp_jax.adoption import Adopted, adopted
from natfp_jax.claims import Claim, attempt, guarded, short, unless
from natfp_jax.config import Experiment, Run
from natfp_jax.corpus import Store
from natfp_jax.errors import UserError
from natfp_jax.lineage import weight_hash
from natfp_jax.lock import held
from natfp_jax.order import Order, order_hash
from natfp_jax.params import Params
from natfp_jax.runs import RunFolder
from natfp_jax.train import conditions, load_weights, replay

__all__ = ["AuditedRun"]


class AuditedRun:
    """One run under audit."""

    def __init__(
        self, run: RunFolder, names: dict[str, str], stores: dict[tuple[str, str], Store], known: "dict[str, AuditedRun]"
    ) -> None:
        """`known`: all runs that can be read, by their fingerprints."""
        self.run, self._names, self._stores, self._known = run, names, stores, known
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
            return unless(config.fingerprint(self.experiment, self.inputs), self.fingerprint, "its fingerprint is") or unless(
                folder, self.fingerprint[:16], f"the folder {folder} holds the experiment"
            )

        claim = attempt(self.subject, "its folder is named after the experiment in it", named)
        claims.append(replace(claim, subject=self.subject))
        return claim.verdict == "proven"

    @cached_property
    def store(self) -> Store | None:
        """The token store that it was trained on, if it is whole and here."""
        return self._stores.get((self.inputs.get("corpus", ""), self.inputs["tokenizer"]))

    @cached_property
    def steps(self) -> list[int]:
        """The steps that have a folder."""
        folder = self.run.checkpoints
        found = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []
        # Of a training that was killed, the next command sets aside what was being saved.
        return [step for step in found if self.finished or (folder / str(step) / files.MANIFEST).exists()]

    @property
    def finished(self) -> bool:
        """Whether its training has come to an end."""
        return self.run.finished

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """The records that can be read."""
        found = {}
        for step in self.steps:
            with suppress(UserError):
                found[step] = checkpoint.record(self.run.checkpoints, step)
        return found

    @cached_property
    def parent(self) -> "AuditedRun | None":
        """The run of its parent, if it has one and that is here."""
        return self._known.get(self.inputs.get("parent", ""))

    def _parent_weights(self, devices: jax.sharding.Mesh) -> Callable[[], Params] | None:
        """What reads the weights that a child begins with."""
        assert self.store is not None
        origin, run = self.experiment.parent, self.parent
        if origin is None or run is None:
            return None
        return partial(load_weights, run.run, origin.step, run.experiment, self.store.tokenizer.padded_size, devices)

    @cached_property
    def _begun(self) -> Params | None:
        """What the seed gives on this machine, and the parent; None: there is no telling here."""
        if self.store is None or (self.experiment.parent is not None and self.parent is None):
            return None
        parent, specs = self._parent_weights(self._devices()), self._specs
        one = self.experiment
        return descent.begun(specs, one.seeds.init, None, one.perturb, None if parent is None else parent())

    @cached_property
    def _specs(self) -> dict[str, params.Spec]:
        assert self.store is not None
        return lora.table(self.experiment.model, self.store.tokenizer.padded_size, self.experiment.lora)

    @cached_property
    def init_hash(self) -> str | None:
        """The hash of the weights that it must have begun with."""
        tree = self._begun
        return None if tree is None else weight_hash(tree)

    def order_hashes(self, steps: list[int]) -> dict[int, str]:
        """The order hash at each of `steps`, ascending, from the seed."""
        data = self.experiment.data
        order, fed, at, found = Order(data.windows, data.batch, self.experiment.seeds.order), self.inputs["pool"], 0, {}
        for step in steps:
            for one in range(at, step):
                fed = order_hash(fed, order.rows(one))
            at, found[step] = step, fed
        return found

    def claims(self, replayed: int) -> Iterator[Claim]:
        """All of the run's claims."""
        if held(self.run.folder):
            yield Claim(self.subject, "its training", "recorded", "a process is at it: audit it again afterwards")
            return
        steps = f"checkpoints {', '.join(map(str, self.steps))}"
        yield attempt(self.subject, f"{steps}: every file is what was written", lambda: self._each(self._whole))
        yield attempt(self.subject, f"{steps} are of this experiment", lambda: self._each(self._owner))
        if self.experiment.published is not None:
            yield guarded(self.subject, "its weights are those of the published folder", self._published)
            yield attempt(self.subject, "lineage.json says what the checkpoint says", self._gathered)
            return
        if self.store is None:
            yield Claim(self.subject, "corpus, init and order", "recorded", "its corpus is not here, or is damaged")
        else:
            yield from self._recomputed(replayed)
        yield attempt(self.subject, "each checkpoint names the weights of one before it, back to step 0", self._chain)
        if self.experiment.parent is not None:
            yield guarded(self.subject, "each checkpoint names the parent's that it begins with", self._descent)
        if self.finished:
            yield attempt(self.subject, "lineage.json says what the checkpoints say, and the log is whole", self._gathered)
        else:
            yield Claim(self.subject, "its training", "recorded", "it is not finished")

    @cached_property
    def adopted(self) -> Adopted:
        """The published model that it is of.

        Raises:
          UserError: its folder is not here.
        """
        return adopted(self.experiment)

    def _published(self) -> Claim:
        """Whether the folder is what was adopted, and so are the weights."""
        claim, named = "its weights are those of the published folder", self.experiment.published
        assert named is not None
        try:
            model = self.adopted
        except UserError as error:
            return Claim(self.subject, claim, "recorded", f"the folder is not here ({error})")
        if wrong := unless(model.identity.inputs["published"], self.inputs["published"], f"{named.folder} holds"):
            return Claim(self.subject, claim, "recorded", f"{wrong}: the folder has changed since, or is another")
        padded, said = model.tokenizer.padded_size, self.records[0]["weights"]
        saved = self._read(0, params.table(model.experiment.model, padded))
        wrong = unless(said, weight_hash(model.source.params(padded)), "the folder gives") or unless(
            said, weight_hash(saved), "the checkpoint holds"
        )
        return Claim(self.subject, claim, "false" if wrong else "proven", wrong or "")

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

    def _owner(self, step: int) -> str | None:
        owner = checkpoint.record(self.run.checkpoints, step)["fingerprint"]
        if owner == self.fingerprint:
            return None
        whose = self._known[owner].subject if owner in self._known else f"the experiment {owner[:16]}"
        return f"it is a checkpoint of {whose}, under the name of {self.subject}"

    def _recomputed(self, replayed: int) -> Iterator[Claim]:
        assert self.store is not None
        data, store = self.experiment.data, self.store
        yield attempt(
            self.subject,
            "the pool of windows has the recorded hash",
            lambda: unless(store.pool(data).sha256(), self.inputs["pool"], "its pool is recorded as"),
        )
        yield attempt(self.subject, "checkpoints hold the weights whose hash they record", lambda: self._each(self._weights))
        yield guarded(self.subject, "the weights of step 0 are those of the init seed", self._init)
        if self.experiment.lora is not None:
            yield guarded(self.subject, "nothing but the adapters was trained", self._still)
        yield attempt(self.subject, "the windows were fed in the order of the seed", self._order)
        yield guarded(self.subject, "the first weights follow from the seeds", lambda: self._replayed(replayed))

    def _devices(self) -> jax.sharding.Mesh:
        """One device, which is enough to read with."""
        return mesh.make(config.Mesh(), jax.devices()[:1])

    def _weights(self, step: int) -> str | None:
        assert self.store is not None
        if step not in self.records:
            return "its record cannot be read"
        return unless(self.records[step]["weights"], weight_hash(self._read(step)), "its weights have sha256")

    def _read(self, step: int, specs: dict[str, params.Spec] | None = None) -> Params:
        specs = self._specs if specs is None else specs
        like = checkpoint.with_shardings(params.abstract(specs), mesh.param_shardings(self._devices(), specs))
        tree: Params = checkpoint.restore(self.run.checkpoints, step, like)[0]
        return tree

    def _same_software(self, step: int) -> bool:
        """Whether this machine draws the numbers that the run's machine drew."""
        there, here = self.records[step]["numerics"], lineage.numerics(self._devices())
        names = ("backend", "device", "machine")
        return all(there[name] == here[name] for name in names) and there["versions"]["jax"] == here["versions"]["jax"]

    def _init(self) -> Claim:
        seed, origin = self.experiment.seeds.init, self.experiment.parent
        claim = f"the weights of step 0 are those of init seed {seed}"
        if origin is not None:
            whose = f"run {self.inputs['parent'][:16]}" if self.parent is None else self.parent.subject
            claim = f"the weights of step 0 are those of step {origin.step} of {whose}"
            claim += f", and adapters of init seed {seed}" if self.experiment.lora else ""
        if not self.records:
            return Claim(self.subject, claim, "recorded", "there is no checkpoint")
        if origin is not None and self.parent is None:
            return Claim(self.subject, claim, "recorded", "its parent is not here")
        wrong = {step: record["init_hash"] for step, record in self.records.items() if record["init_hash"] != self.init_hash}
        if 0 in self.records and self.records[0]["weights"] != self.init_hash:
            wrong[0] = self.records[0]["weights"]
        if not wrong:
            return Claim(self.subject, claim, "proven")
        step, got = next(iter(wrong.items()))
        named = self._named(got)
        gives = "the seed gives" if origin is None else "they are"
        detail = f"checkpoint {step} says {short(got)}, {gives} {short(self.init_hash)}{named or ''}"
        copied = origin is not None and origin.experiment.lora is None and self.experiment.lora is None
        if named or copied or self._same_software(step):
            return Claim(self.subject, claim, "false", detail)
        return Claim(self.subject, claim, "recorded", f"{detail}; it was made by another machine or version of jax")

    def _named(self, weights: str) -> str | None:
        """Whose weights these are, in words."""
        for run in self._known.values():
            if run is not self and run.experiment.parent is None and run.init_hash == weights:
                return f": that is init seed {run.experiment.seeds.init} of {run.subject}"
            for step, record in run.records.items():
                if run is not self and record["weights"] == weights:
                    return f": that is step {step} of {run.subject}"
        return None

    def _still(self) -> Claim:
        claim = "nothing but the adapters was trained"
        tree = self._begun
        if tree is None:
            return Claim(self.subject, claim, "recorded", "its parent is not here")
        expected = weight_hash(lora.split(tree, self.experiment.lora)[1])

        def wrong(step: int) -> str | None:
            _, still = lora.split(self._read(step), self.experiment.lora)
            return unless(expected, weight_hash(still), "all other weights have sha256")

        return attempt(self.subject, claim, lambda: self._each(wrong))

    def _order(self) -> str | None:
        for step, expected in self.order_hashes(list(self.records)).items():
            if (got := self.records[step]["order_hash"]) != expected:
                others = [run for run in self._known.values() if run is not self and run.order_hashes([step])[step] == got]
                named = f": that is order seed {others[0].experiment.seeds.order} of {others[0].subject}" if others else ""
                seed = self.experiment.seeds.order
                return f"checkpoint {step} records {short(got)}, order seed {seed} gives {short(expected)}{named}"
        return None

    def _early(self) -> str | None:
        """What two records say differently of one step's weights."""
        said: dict[int, tuple[str, int]] = {}
        for step, record in self.records.items():
            told = {**{int(early): sha256 for early, sha256 in record["early"].items()}, step: record["weights"]}
            for of, sha256 in told.items():
                before, other = said.setdefault(of, (sha256, step))
                if before != sha256:
                    return f"checkpoints {other} and {step} record {short(before)} and {short(sha256)} for step {of}"
        return None

    def _replayed(self, replayed: int) -> Claim:
        """Trains the first steps again, and compares every hash of weights that is recorded of them."""
        assert self.store is not None
        recorded: dict[int, tuple[str, int]] = {}  # step → hash, and the first checkpoint that says so
        for step, record in sorted(self.records.items(), reverse=True):
            recorded[step] = record["weights"], step
            recorded.update({int(early): (sha256, step) for early, sha256 in record["early"].items()})
        wanted = {step: said for step, said in sorted(recorded.items()) if 0 < step <= replayed}
        sources = "the seeds" if self.experiment.parent is None else "the seeds and the parent"
        claim = f"the weights of steps {', '.join(map(str, wanted))} follow from {sources}"
        if not wanted:
            return Claim(self.subject, f"the weights of the first {replayed} steps", "recorded", "none of them is recorded")
        if wrong := self._early():
            return Claim(self.subject, claim, "false", wrong)
        # Of a training that was carried out in several ways, the first stretch.
        witness = self.records[max(said for _, said in wanted.values())]
        there = witness["before"][0]["numerics"] if witness["before"] else witness["numerics"]
        until = witness["before"][0]["until"] if witness["before"] else witness["step"]
        if max(wanted) > until:
            detail = f"it was trained in several ways, until step {until} in the first"
            return Claim(self.subject, claim, "recorded", f"{detail}: audit with --replay {until}, or fewer")
        settings = Run(microbatches=there["microbatches"], remat=there["remat"], execution=there.get("execution"))
        try:
            devices = mesh.make(config.Mesh(**there["mesh"]))
        except UserError as error:
            return Claim(self.subject, claim, "recorded", str(error))
        here = conditions(self.experiment, settings, devices)
        if differ := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
            return Claim(self.subject, claim, "recorded", f"this machine differs in {', '.join(differ)}")
        if there["backend"] == "gpu" and "deterministic" not in there["xla_flags"]:
            why = "a GPU repeats itself with XLA_FLAGS=--xla_gpu_deterministic_ops=true alone, under which it was not trained"
            return Claim(self.subject, claim, "recorded", why)
        if self.experiment.parent is not None and self.parent is None:
            return Claim(self.subject, claim, "recorded", "its parent is not here")
        parent = self._parent_weights(devices)
        for step, weights in replay(self.experiment, self.store, settings, devices, max(wanted), parent):
            if step in wanted and (got := weight_hash(weights)) != wanted[step][0]:
                detail = f"step {step} gives {short(got)}, checkpoint {wanted[step][1]} records {short(wanted[step][0])}"
                return Claim(self.subject, claim, "false", f"{detail}: not trained from this step 0, or by other code")
        return Claim(self.subject, claim, "proven")

    def _chain(self) -> str | None:
        if missing := [step for step in self.steps if step not in self.records]:
            return f"the records of {missing} cannot be read"
        if self.steps and 0 not in self.records:
            return "there is no checkpoint at step 0"
        if not self.steps:
            return None if not self.finished else "there is no checkpoint"
        init = self.records[0]["weights"]
        for step, record in self.records.items():
            parent = record["parent"]
            if record["init_hash"] != init:
                return f"checkpoint {step} descends from {short(record['init_hash'])}, step 0 is {short(init)}"
            if step == 0:
                if parent is not None:
                    return f"checkpoint 0 has a parent, step {parent['step']}"
            elif parent is None or not parent["step"] < step:
                return f"checkpoint {step} has no parent before it"
            elif parent["step"] not in self.records:
                return f"checkpoint {step} descends from step {parent['step']}, which is not here"
            elif (got := self.records[parent["step"]]["weights"]) != parent["weights"]:
                return f"checkpoint {step} descends from {short(parent['weights'])}, step {parent['step']} is {short(got)}"
        return None

    def _descent(self) -> Claim:
        origin, claim = self.experiment.parent, "each checkpoint names the parent's that it begins with"
        assert origin is not None
        run, one = self.parent, self.experiment
        if one.lora is None and one.perturb is None and 0 in self.records:  # it is a copy, wherever that was made
            copied = self.records[0].get("origin", {}).get("weights")
            if wrong_copy := unless(copied, self.records[0]["weights"], "checkpoint 0 is"):
                return Claim(self.subject, claim, "false", wrong_copy)
        if run is None:
            return Claim(self.subject, claim, "recorded", f"run {self.inputs['parent'][:16]} is not here")

        def wrong() -> str | None:
            if other := unless(run.inputs["tokenizer"], self.inputs["tokenizer"], "its tokenizer is"):
                return other
            if other := unless(config.fingerprint(origin.experiment, run.inputs), run.fingerprint, "its parent is said to be"):
                return other
            if origin.step not in run.records:
                return f"{run.subject} has no checkpoint at step {origin.step}"
            expected = {name: run.records[origin.step][name] for name in ("fingerprint", "step", "weights")}
            for step, record in self.records.items():
                if (got := record.get("origin")) != expected:
                    return f"checkpoint {step} names {_checkpoint(got)}, expected {_checkpoint(expected)}"
            return None

        return attempt(self.subject, claim, wrong)

    def _gathered(self) -> str | None:
        written = files.read_remade(self.run.folder / "lineage.json")
        if written["checkpoints"] != list(self.records.values()):
            return "lineage.json differs from the records of the checkpoints"
        return self.run.damaged_metrics()


def _checkpoint(origin: dict[str, Any] | None) -> str:
    if origin is None:
        return "none"
    return f"step {origin['step']} of run {short(origin['fingerprint'])}, {short(origin['weights'])}"
