"""A study below an output folder: what lies where, and whose it is.

Owns the paths, the token stores and identities of the arms, the prompts, and what a draw is made from; and that a study belongs
to one command at a time, or to the tasks of one job array. Must not know how a stage does its work.

    OUT/data/                    what our TFDS builders prepared
    OUT/corpora/<hash>/          token stores
    OUT/runs/<fingerprint>/      one experiment each, shared by all studies below OUT
    OUT/restart/<arms>/          what stopped or killed trainings go on from, whatever study they are of
    OUT/studies/<name>/          study.json, arms.json, draws/, attribution.json, timings.json, report/
    OUT/studies/<name>/tasks/    the locks of tasks that share the study
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from natfp_jax import adoption, config, files, lineage, mesh, processes, texts
from natfp_jax.config import Corpus, Experiment, Study
from natfp_jax.contrast import differences
from natfp_jax.corpus import Store, opened, prepare
from natfp_jax.errors import UserError
from natfp_jax.lineage import Identity, code
from natfp_jax.lock import alone, held, holder
from natfp_jax.member import Origin
from natfp_jax.params import Params
from natfp_jax.progress import Progress
from natfp_jax.prompts import Prompts, prompts_of
from natfp_jax.runs import RunFolder
from natfp_jax.share import Share, dealt
from natfp_jax.study import Arm, Draw, arms, comparisons, draws, kept_fractions, parents, settled
from natfp_jax.tokenizer import Tokenizer
from natfp_jax.train import load_weights

__all__ = ["Workspace", "write_if_new"]


class Workspace:
    """What is there of a study. With many processes all of them have one, and use it alike."""

    def __init__(self, study: Study, out: Path, progress: Progress, share: Share | None = None) -> None:
        """`share`: what of the study this command does, of several that share it; None: all."""
        self.study, self.out, self.progress, self.share = study, out, progress, share
        self.folder = out / "studies" / study.name
        self.arms, self.published = adoption.adoptions(arms(study))
        mine = [*self.arms.values()] if share is None else dealt([*self.arms.values()], share.tasks)[share.task]
        self.mine = {arm.id: arm for arm in mine}  # those that this command trains and draws from
        self.parents = {parent.id: parent for parent in parents(self.arms.values())}
        self.comparisons = comparisons(study)

    # --- whose folder, and how long things took ---

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the study's folder for this command alone, and says whose it is. Who shares the study waits for it.

        Raises:
          UserError: another process holds it, or tasks that share it otherwise are at work; it belongs to another study, or
            the processes of this command differ.
        """
        share = "all of it" if self.share is None else f"task {self.share}"
        processes.agree({"study": config.fingerprint(self.study), "version of natfp_jax": code(), "part of the study": share})
        with processes.leading(self._owned()):
            # A folder of its own for every host would be found out much later, by a process that waits for ever.
            processes.agree({"file system at --out": holder(self.folder)})
            yield

    @contextmanager
    def _owned(self) -> Iterator[None]:
        path, mine = self.folder / "study.json", config.fingerprint(replace(self.study, run=config.Run()))
        begun = (self.folder / "arms.json").exists()  # until then there is nothing to be confused with
        owner = files.read_json(path) if begun and path.exists() else {"fingerprint": mine}
        if owner.get("fingerprint") != mine and not self._is(owner.get("study")):
            found = differences(owner.get("study"), config.to_json(self.study))
            changed = ", ".join(path for path in found if path.split(".")[0] != "run") or "version"  # which decides nothing
            raise UserError(
                f"{self.folder} holds the study {str(owner.get('fingerprint'))[:16]}, expected {mine[:16]} (they differ in "
                f"{changed}): give another --out, or another name=... to share its runs"
            )
        with alone(self.folder, self.progress, wait=self.share is not None):
            tasks = [folder.name for folder in sorted(self._tasks.glob("*-of-*")) if held(folder)]
            others = [name for name in tasks if self.share is None or not name.endswith(f"-of-{self.share.tasks}")]
            strangers = [name for name in others if held(self._tasks / name, proven=True)]
            if strangers:
                expected = "none beside it" if self.share is None else f"--tasks {self.share.tasks}"
                raise UserError(
                    f"task {strangers[0]} of {self.folder} is at work, expected {expected}: wait for it or stop it, or share "
                    "the study as it does"
                )
            if not tasks:
                files.clear(self.folder)
            write_if_new(path, {"fingerprint": mine, "study": config.to_json(self.study)}, begun)
            yield

    @property
    def _tasks(self) -> Path:
        return self.folder / "tasks"

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Holds this command's own share of the study.

        Raises:
          UserError: another process does that share.
        """
        with nullcontext() if self.share is None else processes.leading(alone(self._tasks / str(self.share), self.progress)):
            yield

    def _is(self, written: Any) -> bool:
        """Whether this is the study that an earlier version has written, which knew fewer fields of its levels."""
        try:
            there, here = (settled(replace(one, run=config.Run())) for one in (config.from_json(Study, written), self.study))
        except UserError:
            return False
        return there == here

    @contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, int]]:
        """Adds the seconds of a stage, and the amounts that it fills in, to timings.json."""
        start, amounts = time.perf_counter(), dict[str, int]()
        yield amounts
        processes.led(lambda: self.spent(stage, time.perf_counter() - start, amounts))

    def spent(self, stage: str, seconds: float, amounts: dict[str, int]) -> None:
        """Adds to timings.json, what all tasks spent; of many processes the first one's task."""
        path = self.folder / "timings.json"
        with nullcontext() if self.share is None else alone(self._tasks, wait=True):
            timings = files.read_remade(path) if path.exists() else {}
            entry = timings.setdefault(stage, {"seconds": 0.0})
            entry["seconds"] = round(entry["seconds"] + seconds, 2)
            for name, amount in amounts.items():
                entry[name] = entry.get(name, 0) + amount
            files.write_json(path, timings)

    # --- arms ---

    @cached_property
    def devices(self) -> jax.sharding.Mesh:
        """The mesh that everything runs on."""
        return mesh.make(self.study.run.mesh)

    @property
    def base(self) -> Arm:
        """The base arm."""
        return next(iter(self.arms.values()))

    @property
    def store(self) -> Store:
        """The base arm's token store, which gives the tokenizer and the prompts of all arms; prepared if it is not there."""
        return self.store_of(self.base)

    @cached_property
    def _stores(self) -> dict[Corpus, Store]:
        """The token stores of all arms and parents; that of the base arm's oldest ancestor gives the tokenizer."""
        first = (*self.base.experiment.ancestors, self.base.experiment)[0].corpus
        found = {first: self._opened(first)}
        for arm in (*self.arms.values(), *self.parents.values()):
            corpus = arm.experiment.corpus
            if corpus not in found:  # one tokenizer for all arms, so that texts and likelihoods are comparable
                if corpus.tokenizer not in (None, first.tokenizer):
                    raise UserError(
                        f"{arm.id} gives the tokenizer {corpus.tokenizer}, but all arms share that of the corpus that the base "
                        "arm, or its oldest ancestor, is trained on: give it there, and leave it out here"
                    )
                found[corpus] = self._opened(replace(corpus, tokenizer=str(found[first].folder / "tokenizer.json")))
        return found

    def _opened(self, corpus: Corpus) -> Store:
        mine: list[Store] = []

        def prepared() -> str:
            mine.append(prepare(corpus, self.out, self.progress))
            return mine[0].folder.name

        folder = processes.led(prepared)
        return mine[0] if mine else opened(self.out / "corpora" / folder)

    def store_of(self, arm: Arm) -> Store:
        """The token store that an arm is trained on."""
        return self._stores[arm.experiment.corpus]

    def tokenizer_of(self, arm: str) -> Tokenizer:
        """What an arm reads and writes by; all but published models share that of the base arm."""
        return self.published[arm].tokenizer if arm in self.published else self.store.tokenizer

    def written(self, arm: str, prompts: Prompts, several: Sequence[Sequence[int]]) -> list[str]:
        """The texts that an arm has written behind these prompts, by their ids."""
        tokenizer = self.tokenizer_of(arm)
        if arm not in self.published:  # bytes of ours are the same wherever they stand
            return tokenizer.decode_batch(several)
        return tokenizer.continued(prompts.encoded(tokenizer), several)

    def end_of(self, arm: str) -> int:
        """The id that ends an arm's texts."""
        return self.published[arm].source.described.end if arm in self.published else self.store.end_id

    @cached_property
    def reencoded(self) -> bool:
        """Whether arms have different tokenizers, so that a text has other ids for another arm."""
        return len({(self.tokenizer_of(arm).sha256, self.end_of(arm)) for arm in self.arms}) > 1

    def params_of(self, arm: str, step: int) -> Params:
        """An arm's parameters, laid over the mesh."""
        padded = self.tokenizer_of(arm).padded_size
        return load_weights(self.run_of(arm), step, self.arms[arm].experiment, padded, self.devices)

    @cached_property
    def identities(self) -> dict[str, Identity]:
        """Arm id, or parent's → what the experiment is, now that its corpus is known."""
        pools: dict[Any, str] = {}
        known: dict[Experiment, Identity] = {}
        found = {}
        for arm in (*self.parents.values(), *self.arms.values()):  # parents first: a child's names its parent's
            if arm.id in self.published:
                found[arm.id] = self.published[arm.id].identity
                continue
            store, data, parent = self.store_of(arm), arm.experiment.data, arm.experiment.parent
            pool = store.sha256, data.seq_len, data.windows, data.first
            if pool not in pools:
                pools[pool] = store.pool(data).sha256()
            hashes = store.sha256, store.tokenizer.sha256, pools[pool]
            of = None if parent is None else known[parent.experiment].fingerprint
            found[arm.id] = known[arm.experiment] = lineage.identity(arm.experiment, *hashes, of)
        same: dict[str, str] = {}
        for name in self.arms:
            if (other := same.setdefault(found[name].fingerprint, name)) == name:
                continue
            if name in self.published:
                raise UserError(f"arms {other} and {name} are one model: their folders hold the same files; leave one out")
            raise UserError(f"arms {other} and {name} are the same experiment: change the factors so that all arms differ")
        return found

    def parent_of(self, arm: Arm) -> Arm | None:
        """What an arm begins with, if it has a parent."""
        parent = arm.experiment.parent
        return None if parent is None else next(one for one in self.parents.values() if one.experiment == parent.experiment)

    def origin_of(self, arm: Arm) -> Origin | None:
        """The checkpoint of its parent that an arm begins with, if it has one."""
        parent, named = self.parent_of(arm), arm.experiment.parent
        return None if parent is None or named is None else Origin(named.experiment, self.run_of(parent.id), named.step)

    def run_of(self, arm: str) -> RunFolder:
        """The run of an arm, or of a parent."""
        return RunFolder(self.out / "runs" / self.identities[arm].short)

    @property
    def restarts(self) -> Path:
        """The folder of what stopped or killed trainings go on from, of all studies."""
        return self.out / "restart"

    def kept(self, arm: Arm) -> list[int]:
        """The steps whose checkpoints an arm keeps, or a parent."""
        return arm.experiment.kept_steps(kept_fractions(self.study, self.arms.values(), arm.experiment))

    def check_owners(self) -> None:
        """Raises a UserError if the run of an arm is another experiment's, or began with what its parent no longer is."""
        for name, identity in self.identities.items():
            self.run_of(name).check_owner(identity)
        for parent in self.parents.values():
            self._check_children(parent)

    def _check_children(self, parent: Arm) -> None:
        """Raises a UserError if children of a parent began with other weights than it has now."""
        strangers: dict[tuple[str, str], list[str]] = {}
        for arm in (*self.parents.values(), *self.arms.values()):
            origin, run = self.origin_of(arm), self.run_of(arm.id)
            if origin is None or origin.experiment != parent.experiment:
                continue
            if run.missing([0]) or origin.run.missing([origin.step]):
                continue
            if (began := run.record(0)["origin"]) != (now := origin.record()):
                strangers.setdefault((began["weights"], now["weights"]), []).append(str(run.folder))
        for (then, here), folders in strangers.items():
            raise UserError(
                f"{', '.join(folders)} began with the weights {then[:16]} of {self.run_of(parent.id).folder}, which now are "
                f"{here[:16]}: move what is wrong away, and run the same command again"
            )

    def check_trained(self, some: dict[str, Arm] | None = None) -> None:
        """Raises a UserError if one of `some` arms, or of all, lacks a checkpoint, or a run is another experiment's."""
        self.check_owners()
        for arm in (self.arms if some is None else some).values():
            if missing := self.run_of(arm.id).missing(self.kept(arm)):
                raise UserError(f"arm {arm.id} lacks the checkpoints at steps {missing}: run `natfp train` first")

    # --- prompts and draws ---

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts of every draw."""
        return prompts_of(self.store, self.study.sampling, self.context)

    @property
    def context(self) -> int:
        """The most tokens that every arm has been trained on."""
        return min(self._context(arm) for arm in self.arms)

    def _context(self, arm: str) -> int:
        if arm in self.published:
            return self.published[arm].source.described.context
        return self.arms[arm].experiment.data.seq_len

    @cached_property
    def longest_prompt(self) -> int:
        """Its tokens, EOS with them, by whichever arm's tokenizer has the most.

        Raises:
          UserError: an arm has not been trained on as many, or has no positions for a text behind it.
        """
        source = self.study.sampling.prompt_file or "the corpus"
        found = dict[str, int]()
        for arm in self.arms:
            tokenizer = self.tokenizer_of(arm)
            if tokenizer.sha256 not in found:
                found[tokenizer.sha256] = self.prompts.check(tokenizer, self.context, source)
            self._check_room(arm, found[tokenizer.sha256])
        return max(found.values())

    def limit_of(self, arm: str) -> int | None:
        """The tokens that an arm can have at most; None: any number."""
        return self.published[arm].source.described.limit if arm in self.published else self.arms[arm].experiment.model.context

    def _check_room(self, arm: str, longest: int) -> None:
        most, new = self.limit_of(arm), self.study.sampling.lengths[-1]
        if most is not None and longest + new > most:
            raise UserError(
                f"arm {arm} can have {most} tokens, a prompt has up to {longest} and its text {new} more: lower "
                "sampling.new_tokens or sampling.prompt_chars"
            )

    def draw_paths(self, one: Draw) -> list[Path]:
        """The sample files of a draw."""
        sampling = self.study.sampling
        return [self.folder / "draws" / name for name in one.files(sampling.prompts, sampling.file_texts)]

    def draw_settings(self, one: Draw) -> dict[str, Any]:
        """What decides the texts of a draw besides the weights; batch shapes are part of the numerics record."""
        kept = config.to_json(self.study.sampling)
        names = ("top_k", "top_p", "min_p", "repetition_penalty", "greedy", "cache", "seed")
        tokens = self.study.sampling.lengths[-1]
        return {"new_tokens": tokens, "temperature": one.drawn_at(self.study.sampling), **{name: kept[name] for name in names}}

    def draw_inputs(self, one: Draw) -> dict[str, str]:
        """The hashes of all that a draw is made from."""
        return {
            "settings": files.hash_json(self.draw_settings(one)),
            "weights": self.run_of(one.arm).record(one.step)["weights"],
            "prompts": self.prompts.sha256,
            "tokenizer": self.tokenizer_of(one.arm).sha256,
        }

    def left(self) -> list[str]:
        """The arms of other commands that share the study which are not trained and drawn from yet."""
        every = draws(self.study)

        def undone(arm: Arm) -> bool:
            if not self.run_of(arm.id).complete(self.kept(arm)):
                return True
            return any(not texts.exists(path) for one in every if one.arm == arm.id for path in self.draw_paths(one))

        return [name for name, arm in self.arms.items() if name not in self.mine and undone(arm)]

    def missing_files(self, some: dict[str, Arm] | None = None) -> dict[Draw, list[int]]:
        """The draws of `some` arms, or of all, that are not whole yet, and which of their files are not there.

        Raises:
          UserError: a file was drawn from something else.
        """
        missing: dict[Draw, list[int]] = {}
        for one in (one for one in draws(self.study) if some is None or one.arm in some):
            inputs = self.draw_inputs(one)
            for number, path in enumerate(self.draw_paths(one)):
                if not texts.exists(path):
                    missing.setdefault(one, []).append(number)
                    continue
                record = texts.read_record(path)
                for name, expected in inputs.items():
                    if (got := record["inputs"].get(name)) != expected:
                        raise UserError(
                            f"{path} was drawn from {name} {got}, expected {expected}: remove it, or give another --out"
                        )
        return missing


def write_if_new(path: Path, value: dict[str, Any], owned: bool = False) -> None:
    """A file that says the same already is not touched; one that is damaged is written over, unless it is `owned`."""
    try:
        same = path.exists() and files.read_remade(path) == value
    except UserError:
        if owned:
            raise
        same = False
    if not same:
        files.write_json(path, value)
