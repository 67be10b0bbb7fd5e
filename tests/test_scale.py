"""The studies of configs/scale: as large as they say, laid over the hardware that they name, and small enough for it."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.plan_all import SIZES, TOPOLOGIES
from natfp_jax import chips, mesh, params
from natfp_jax.errors import UserError
from natfp_jax.loading import load_study
from natfp_jax.study import arms

STUDY = Path(__file__).parent.parent / "configs" / "scale" / "seeds.py"
PAIRS = [(size, hardware) for size in SIZES for hardware in TOPOLOGIES if (size, hardware) != ("7b", "h200x1")]
# Weights but for the embedding, as Pythia's authors and Llama 2's count them.
COUNTS = {"70m": 19e6, "160m": 85e6, "410m": 302e6, "1.4b": 1.21e9, "7b": 6.48e9}


def loaded(size, hardware):
    return load_study(STUDY, [f"size={size}", f"hardware={hardware}"])


@pytest.mark.parametrize(("size", "hardware"), PAIRS)
def test_a_study_fills_the_hardware_that_it_names(size, hardware):
    study, there = loaded(size, hardware), chips.parse(TOPOLOGIES[hardware])
    laid = mesh.size(study.run.mesh, math.prod(there.shape))
    ways = laid.data * laid.fsdp
    data = study.experiment.data
    assert data.batch // study.run.microbatches % ways == 0, "every device has rows of every part"
    assert len(arms(study)) == 4
    assert study.experiment.model.width % laid.fsdp == 0
    # What is held of weights, optimiser and gradient is at most two thirds of a device.
    count = params.count(params.table(study.experiment.model, study.experiment.corpus.vocabulary))
    chip = next(chip for chip in chips.CHIPS if chip.name == there.chip)
    assert 16 * count / laid.fsdp < 2 / 3 * chip.usable


@pytest.mark.parametrize("size", SIZES)
def test_a_model_is_as_large_as_it_is_called(size):
    study = loaded(size, "v5e-16")
    specs = params.table(study.experiment.model, study.experiment.corpus.vocabulary)
    layers = sum(math.prod(spec.shape) for path, spec in specs.items() if path.startswith("layers"))
    assert layers == pytest.approx(COUNTS[size], rel=0.03)
    data = study.experiment.data
    assert data.windows * data.seq_len == pytest.approx(20 * float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]], rel=0.05)


def test_what_has_no_room_is_refused():
    with pytest.raises(UserError, match="no room on h200x1"):
        loaded("7b", "h200x1")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the `tpu` extra")
def test_the_smallest_compiles_for_its_slice_and_fits(tmp_path):
    command = [sys.executable, "-c", "from natfp_jax.cli import main; main()", "plan", str(STUDY)]
    command += ["size=70m", "hardware=v5e-16", "--topology", "v5e:4x4", "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["fits"]
