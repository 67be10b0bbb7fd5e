"""The short forms of the soaks in `tests/soak`: kills at random moments, and damage to every kind of file."""

import jax
import pytest

from natfp_jax import mesh
from natfp_jax.errors import UserError
from tests.soak import damage, kills

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_of_the_devices():
    """As in the processes that the soak starts."""
    make = mesh.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make", lambda axes, devices=None: make(axes, jax.devices()[:1]))
        yield


def test_killed_at_random_moments_a_study_ends_bitwise_as_if_untouched(tmp_path):
    done, right = kills.soak(3, tmp_path, seed=1, processes=(1,), each=3)
    assert len(done) == right == 3


def test_no_damage_to_any_kind_of_file_is_taken_for_the_truth(tmp_path):
    done = damage.soak(len(damage.KINDS), tmp_path, seed=1)
    assert [one.kind for one in done] == [kind.name for kind in damage.KINDS]
    assert [one for one in done if one.outcome == "accepted silently"] == []
    for one in done:
        assert one.said or one.outcome == "found by the audit"


def test_the_soak_would_notice_what_is_accepted_silently(tmp_path, monkeypatch):
    """Without the manifests of token stores, another token is trained on and nobody says so."""
    monkeypatch.setattr("natfp_jax.corpus.fetched", lambda folder, _: folder)
    monkeypatch.setattr(damage, "KINDS", (damage.Kind("validation", "corpora/*/validation.bin"),))
    monkeypatch.setattr(damage, "states", lambda study, folder: [(name, out) for name, out in first(study, folder)])
    assert damage.soak(2, tmp_path, seed=0)[0].outcome == "accepted silently"


def first(study, folder):
    """The finished study alone."""
    said, whole = damage.carried_out(study, folder / "finished")
    if not whole:
        raise UserError(said)
    return [("finished", folder / "finished")]
