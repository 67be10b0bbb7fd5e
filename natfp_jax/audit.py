"""What the files of an output folder prove of the lineage that they claim.

Owns `natfp audit`: every claim of runs and studies, recomputed from seeds and files wherever this machine can, and its verdict.
Writes nothing and mends nothing.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from natfp_jax import config, files, texts
from natfp_jax.audit_run import AuditedRun
from natfp_jax.claims import Claim, attempt, short, unless
from natfp_jax.config import Study
from natfp_jax.corpus import Store, opened
from natfp_jax.errors import UserError
from natfp_jax.progress import Progress
from natfp_jax.runs import RunFolder
from natfp_jax.study import PARENT_OF, Arm, arms, draws, parents

__all__ = ["REPLAYED", "audit"]

REPLAYED = 8  # steps that are trained again by default


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
    names = dict[str, str]()
    for one in filter(None, studies):  # what is an arm of one study may be a parent in another
        for name, entry in sorted(one.listed.items(), key=lambda entry: not entry[0].startswith(PARENT_OF)):
            names[entry["fingerprint"]] = f"the {name}" if name.startswith(PARENT_OF) else f"arm {name}"
    known = dict[str, AuditedRun]()
    runs = [AuditedRun(RunFolder(folder), names, stores, known) for folder in folders]
    known |= {run.fingerprint: run for run in runs if run.readable(claims)}
    with progress.task("audit", len(known), "runs") as advance:
        for run in known.values():
            claims += run.claims(replayed)
            advance(1)
    for study in studies:
        if study is not None:
            claims += study.claims(known, stores)
    return claims


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
            return unless(store.recomputed(), store.sha256, "its description says that its ids have sha256")

        claims.append(attempt(subject, "every file is what was written, and the ids have the recorded hash", whole))
    return found


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

        claims.append(attempt(f"study {path.parent.name}", "study.json and arms.json are what was written", readable))
        return found[0] if found else None

    def claims(self, known: dict[str, AuditedRun], stores: dict[tuple[str, str], Store]) -> Iterator[Claim]:
        """All of the study's claims."""
        subject = f"study {self.study.name}"
        yield attempt(subject, "every arm is the experiment that the study says", lambda: self._arms(known))
        claim = "arms differ where their seeds differ, and are equal where they are equal"
        yield attempt(subject, claim, lambda: self._distinct(known))
        yield attempt(
            subject,
            "texts are what was written, and made out to the weights of their arm and step",
            lambda: self._texts(known, stores),
        )
        for name in ("attribution.json", "timings.json", "report/summary.json"):
            if (self.folder / name).exists():
                yield attempt(subject, f"{name} is what was written", lambda name=name: self._result(name, known))  # type: ignore[misc]

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """Its arms, by their names."""
        return {arm.id: arm for arm in arms(self.study)}

    def _arms(self, known: dict[str, AuditedRun]) -> str | None:
        for arm in (*parents(self.arms.values()), *self.arms.values()):
            name, entry = arm.id, self.listed[arm.id]
            if wrong := unless(
                config.fingerprint(arm.experiment, entry["inputs"]), entry["fingerprint"], f"arms.json says that arm {name} is"
            ):
                return wrong
            if name in self.arms and entry["fingerprint"] not in known and (self.folder / "attribution.json").exists():
                return f"arm {name} has no run that can be read, expected {entry['fingerprint'][:16]}"
        return None

    def _distinct(self, known: dict[str, AuditedRun]) -> str | None:
        """What must differ differs, and what must be equal is; between arms of one size, corpus and length."""
        seen: dict[Any, tuple[str, Any]] = {}
        for name, arm in self.arms.items():
            run, experiment = known.get(self.listed[name]["fingerprint"]), arm.experiment
            if run is None or not run.records or experiment.published is not None:  # which has no seeds, and may be another
                continue
            first, last, data = run.records[min(run.records)], run.records[max(run.records)], experiment.data
            inputs, adapters = self.listed[name]["inputs"], experiment.lora
            # Alpha is in no weight; and parents may be one at the step that is begun with.
            begun = first.get("origin", {}).get("weights"), adapters and (adapters.rank, adapters.targets)
            seed = experiment.seeds.init if "init" in experiment.deciding else None
            start = experiment.model, seed, experiment.perturb, inputs["tokenizer"], begun
            order = (
                data.windows,
                data.epochs,
                data.batch,
                experiment.seeds.order,
                inputs["pool"],
                last["step"],
            )
            compared = [("init", start, first["weights"]), ("order", order, last["order_hash"])]
            for kind, source, got in compared if last["step"] > 0 else compared[:1]:  # at step 0 nothing is fed yet
                pairs: tuple[tuple[Any, Any], ...] = ((("hash", kind, got), source), (("source", kind, source), got))
                for key, expected in pairs:
                    other, had = seen.setdefault(key, (name, expected))
                    if had != expected:
                        relation = "share" if key[0] == "hash" else "do not share"
                        return f"arms {other} and {name} {relation} the {kind} hash {short(got)}"
            for step, record in run.records.items():
                other, _ = seen.setdefault(("weights", record["weights"]), (name, None))
                if other != name and step > 0:
                    return f"arms {other} and {name} have the same weights at step {step}, {short(record['weights'])}"
        return None

    def _texts(self, known: dict[str, AuditedRun], stores: dict[tuple[str, str], Store]) -> str | None:
        found = []
        for one in draws(self.study):
            sampling = self.study.sampling
            for name in one.files(sampling.prompts, sampling.file_texts):
                path = self.folder / "draws" / name
                if texts.exists(path):
                    claim = attempt("", "", lambda path=path, one=one: self._drawn(path, one, known, stores))  # type: ignore[misc]
                    found += [f"{path.stem}: {claim.detail}"] if claim.verdict == "false" else []
        return "; ".join(found) or None

    def _drawn(self, path: Path, one: Any, known: dict[str, AuditedRun], stores: dict[tuple[str, str], Store]) -> str | None:
        table, record = texts.read(path), texts.read_record(path)
        run = known[self.listed[one.arm]["fingerprint"]]
        store = next((store for (_, tokenizer), store in stores.items() if tokenizer == record["inputs"]["tokenizer"]), None)
        ids, written = table["ids"].to_pylist(), None
        if run.experiment.published is not None:
            with suppress(UserError):  # its folder is not here: the run says so
                tokenizer = run.adopted.tokenizer
                begun = [[tokenizer.eos_id, *some] for some in tokenizer.encode_batch(table["prompt"].to_pylist())]
                written = tokenizer.continued(begun, ids)
        elif store is not None:
            written = store.tokenizer.decode_batch(ids)
        if written is not None and written != table["text"].to_pylist():
            return "its texts are not those of its ids"
        temperature = one.drawn_at(self.study.sampling)
        said = {"arm": one.arm, "checkpoint": one.step, "draw": one.number, "temperature": temperature}
        for column, expected in said.items():
            if set(table[column].to_pylist()) - {expected}:
                return f"its column {column} is not {expected} everywhere"
        return (
            unless(texts.digest(table["ids"]), record["texts"], "its ids are recorded as")
            or unless(run.records[one.step]["weights"], record["inputs"]["weights"], "it was drawn from the weights")
            or unless(run.fingerprint, record["fingerprint"], "it was drawn from the experiment")
        )

    def _result(self, name: str, known: dict[str, AuditedRun]) -> str | None:
        written = files.read_remade(self.folder / name)
        if name != "report/summary.json":
            return None
        files.verify(self.folder / "report", written["files"])
        for arm in written["arms"]:
            run = known[self.listed[arm["id"]]["fingerprint"]]
            last = run.records[max(run.records)]
            for said, recorded in (("init_hash", "init_hash"), ("order_hash", "order_hash"), ("final_hash", "weights")):
                if wrong := unless(last[recorded], arm[said], f"it gives arm {arm['id']} the {said}"):
                    return wrong
        return None
