"""What a study costs on a slice, before it is rented.

Owns which programs a study needs, how often, and what all of them come to. The programs are the real ones; no corpus is read.
Must not know how devices are had, nor how a plan is shown.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jax

from natfp_jax import config
from natfp_jax.chips import Chip, chips_in
from natfp_jax.config import Experiment, Study
from natfp_jax.costs import size
from natfp_jax.errors import UserError
from natfp_jax.program import program_for
from natfp_jax.remedies import Remedy, nearest
from natfp_jax.sample import new_slots_for, rows_for, slots_for
from natfp_jax.sampling_cost import Texts, texts_of
from natfp_jax.study import Arm, arms, draws, kept_fractions, parents
from natfp_jax.tokenizer import Tokenizer, padded
from natfp_jax.train import check_laid
from natfp_jax.training_cost import Training, training

__all__ = ["Plan", "alike", "plan", "remedy", "vocabulary"]

_CHARACTERS = 2  # of a token of a prompt, at least: what a prompt's slots are guessed by


@dataclass(frozen=True)
class Plan:
    """A study on a slice."""

    study: str
    topology: str
    chip: Chip
    devices: int
    estimated: bool  # whether the programs are another platform's than the slice's
    trainings: tuple[Training, ...]
    texts: tuple[Texts, ...]
    disk: int  # bytes of checkpoints and of what a stopped training goes on from

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(memory.fits for memory in [*(one.memory for one in self.trainings), *(one.memory for one in self.texts)])

    @property
    def hours(self) -> float:
        """Of training and sampling."""
        return (sum(one.seconds for one in self.trainings) + sum(one.seconds for one in self.texts)) / 3600

    @property
    def chip_hours(self) -> float:
        """The same of all chips."""
        return self.hours * chips_in(self.chip, self.devices)

    def json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        summed = {"fits": self.fits, "hours": self.hours, "chip_hours": self.chip_hours}
        found: dict[str, Any] = {**asdict(self), **summed}
        for one, said in zip(self.trainings, found["trainings"], strict=True):
            said["time"] |= {"seconds": one.time.seconds, "bound": one.time.bound}
            said["memory"]["fits"] = one.memory.fits
        for drawn, said in zip(self.texts, found["texts"], strict=True):
            said["time"] |= {"seconds": drawn.time.seconds, "bound": drawn.time.bound}
            said["memory"]["fits"] = drawn.memory.fits
        return found


def plan(
    study: Study, topology: str, chip: Chip, devices: jax.sharding.Mesh, say: Callable[[str], None], estimated: bool = False
) -> Plan:
    """Compiles what a study needs and adds it up.

    Args:
      study: whose corpus is not looked at: only the size of its vocabulary, which is taken as it is asked for.
      topology: what `devices` are called.
      chip: what they are.
      devices: they need not be at hand.
      say: told what is compiled.
      estimated: whether `devices` stand for such a slice.

    Raises:
      UserError: an arm cannot run on the mesh.
    """
    every = arms(study)
    if any(arm.experiment.published is not None for arm in every):
        raise UserError(f"study {study.name} is of published models: a plan is of what is trained; give a study that trains")
    before, sizes = parents(every), vocabulary(study)
    found, disk = list[Training](), 0
    for group in alike([*before, *every]):
        one = group[0].experiment
        check_laid(one, sizes[1], study.run, devices)
        trained = training([arm.id for arm in group], one, sizes, study.run, chip, devices, say)
        found.append(trained)
        kept = one.kept_steps(kept_fractions(study, every, one))
        program = program_for(one, *sizes, devices, study.run, trained.together)
        state = sum(size(leaf) for leaf in jax.tree.leaves(program.one))
        disk += state * (len(group) * len(kept) + trained.together * study.run.restarts)
    return Plan(
        study.name, topology, chip, devices.size, estimated, tuple(found), _texts(study, every, sizes, chip, devices, say), disk
    )


def remedy(study: Study, found: Plan, devices: jax.sharding.Mesh, say: Callable[[str], None]) -> Remedy | None:
    """What of `run.` to change so that the training of a plan fits that does not; None: it fits, or there is nothing to try."""
    groups = alike([*parents(arms(study)), *arms(study)])
    wrong = [group[0].experiment for group, one in zip(groups, found.trainings, strict=True) if not one.memory.fits]
    return nearest(wrong, vocabulary(study), study.run, found.chip.usable, devices, say) if wrong else None


def vocabulary(study: Study) -> tuple[int, int]:
    """The ids that a study's tokenizer has, at most, without and with padding."""
    base = arms(study)[0].experiment
    corpus = (*base.ancestors, base)[0].corpus
    ids = corpus.vocabulary if corpus.tokenizer is None else Tokenizer.load(Path(corpus.tokenizer)).size
    return ids, padded(ids)


def alike(every: Iterable[Arm]) -> list[list[Arm]]:
    """Arms of one shape, parents apart from their children."""

    def like(arm: Arm) -> tuple[int, str]:
        return len(arm.experiment.ancestors), repr(config.shape(arm.experiment))

    return [list(group) for _, group in groupby(sorted(every, key=like), key=like)]


def _texts(
    study: Study,
    every: Sequence[Arm],
    sizes: tuple[int, int],
    chip: Chip,
    devices: jax.sharding.Mesh,
    say: Callable[[str], None],
) -> tuple[Texts, ...]:
    sampling = study.sampling
    model_of = {arm.id: arm.experiment.model for arm in every}
    prompt = slots_for(max(_prompt_tokens(study, arm.experiment) for arm in every))
    slots, each = prompt + new_slots_for(sampling.lengths[-1]), min(sampling.prompts, sampling.file_texts)
    models, wanted = list(dict.fromkeys(model_of.values())), draws(study)
    rows = sampling.batch or min(
        rows_for(model, sizes[1], slots, each, devices, chip.usable, sampling.cache) for model in models
    )
    counts = [sum(model_of[one.arm] == model for one in wanted) for model in models]
    return tuple(
        texts_of(model, sampling, sizes, count, prompt, rows, chip, devices, say)
        for model, count in zip(models, counts, strict=True)
    )


def _prompt_tokens(study: Study, experiment: Experiment) -> int:
    if experiment.corpus.conversations or study.sampling.prompt_file is not None:
        return experiment.data.seq_len  # nothing is known of questions, nor of prompts from elsewhere
    return study.sampling.prompt_chars // _CHARACTERS + 1
