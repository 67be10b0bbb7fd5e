"""Where compiled programs are kept."""

from pathlib import Path

import jax
import pytest

from natfp_jax import programs

OPTION = "jax_compilation_cache_dir"


@pytest.fixture
def unset():
    before = jax.config.values[OPTION]
    jax.config.update(OPTION, None)
    yield
    jax.config.update(OPTION, before)


@pytest.mark.usefixtures("unset")
def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    programs.keep()
    assert Path(jax.config.values[OPTION]) == tmp_path / "natfp_jax"


@pytest.mark.usefixtures("unset")
def test_without_a_cache_folder_of_the_users_it_is_the_usual_one(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    programs.keep()
    assert jax.config.values[OPTION] == "/somewhere/.cache/natfp_jax"


@pytest.mark.usefixtures("unset")
def test_what_the_user_has_set_stays(tmp_path):
    jax.config.update(OPTION, str(tmp_path))
    programs.keep()
    assert jax.config.values[OPTION] == str(tmp_path)
