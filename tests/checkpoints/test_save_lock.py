"""Several that save to one path at once: each waits for the others, and all is whole."""

import json
import os
import threading
import time

import jax.numpy as jnp
import pytest

from streamjax.checkpoints import SaveError, check_manifest, replaced_folder, save_lock, save_pytree
from streamjax.checkpoints.save_lock import locked


def test_saves_at_once_are_one_after_the_other(tmp_path):
    failures = []

    def save(number):
        try:
            with replaced_folder(tmp_path / "s", lambda name: True) as folder:
                for name in ("a", "b"):
                    (folder / name).write_text(json.dumps(number))
                    time.sleep(0.02)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
    check_manifest(tmp_path / "s")
    assert (tmp_path / "s" / "a").read_text() == (tmp_path / "s" / "b").read_text()


def test_a_lock_that_a_killed_process_left_is_no_hindrance(tmp_path):
    (tmp_path / ".s.lock").touch()
    save_pytree({"x": jnp.zeros(1)}, tmp_path / "s")
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_who_waits_for_too_long_says_so_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(save_lock, "_SECONDS", 0.1)
    save_pytree({"x": jnp.zeros(1)}, tmp_path / "s")
    before = sorted(tmp_path.rglob("*"))
    with locked(tmp_path / ".s.lock"):
        message = rf"^{tmp_path}/s was not saved: another process has been saving there for \d+ seconds; .*as it was$"
        with pytest.raises(SaveError, match=message):
            save_pytree({"x": jnp.ones(1)}, tmp_path / "s")
        with pytest.raises(SaveError, match=message), replaced_folder(tmp_path / "s", lambda name: True):
            pass
        assert os.path.exists(tmp_path / ".s.lock")
    assert sorted(tmp_path.rglob("*")) == before
