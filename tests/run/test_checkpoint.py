"""Trees come back as they were; damage is noticed."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core import errors, trees
from mosaic_jax.core.types import MetaState
from mosaic_jax.run import checkpoint, processes


def state(value):
    params = {
        "a": {"kernel": jnp.full((64, 8), float(value))},
        "b": jnp.arange(3.0) + value,
    }
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-3))
    return MetaState(params=params, ema_params=params, opt_state=tx.init(params))


def test_round_trip(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path)
    for step in (2, 4, 6):
        saved.save(step, state(step))
    saved.close()
    step, flat, _ = checkpoint.Checkpoints(tmp_path).latest()
    assert step == 6
    restored = trees.restore_into(state(0.0), flat)
    assert jax.tree.structure(restored) == jax.tree.structure(state(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state(6))


def test_notes_are_kept_beside_the_tree(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(3, {"w": jnp.zeros(2)}, {"history": [{"step": 3, "loss": 0.1}]})
    assert saved.latest()[2] == {"history": [{"step": 3, "loss": 0.1}]}


def test_nothing_saved(tmp_path):
    assert checkpoint.Checkpoints(tmp_path / "new").latest() is None


def test_a_flipped_bit_falls_back_to_the_step_before(tmp_path, caplog):
    saved = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2):
        saved.save(step, state(step))
    saved.close()
    # Orbax keeps some data twice and reads one of them: flip a bit in each file.
    for path in (tmp_path / "2").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with caplog.at_level("WARNING", "mosaic_jax"):
        step, flat, _ = checkpoint.Checkpoints(tmp_path).latest()
    assert step == 1
    assert "is damaged" in caplog.text
    jax.tree.map(
        np.testing.assert_array_equal, trees.restore_into(state(0), flat), state(1)
    )


def test_missing_parts_are_told_in_one_line(tmp_path):
    """Orbax would go on to read: its threads print a traceback for every array."""
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(0, {f"a{i}": jnp.full(64, float(i)) for i in range(300)})
    saved.close()
    for path in (tmp_path / "0").rglob("d/*"):
        path.unlink()
    code = (
        "from mosaic_jax.run import checkpoint;"
        f" print(checkpoint.Checkpoints({str(tmp_path)!r}).latest())"
    )
    args = {"capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", code], **args)
    assert done.stdout == "None\n"
    assert "is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_shape_is_named(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(0, {"w": jnp.zeros(3)})
    _, flat, _ = saved.latest()
    with pytest.raises(
        errors.CheckpointError, match=r"w: saved float32\[3\], expected"
    ):
        trees.restore_into({"w": jnp.zeros(4)}, flat)
    with pytest.raises(errors.CheckpointError, match="v: saved nothing"):
        trees.restore_into({"w": jnp.zeros(3), "v": jnp.zeros(1)}, flat)


def test_digest_sees_names_shapes_and_bytes():
    base = trees.digest({"a": np.zeros(4)})
    assert base == trees.digest({"a": np.zeros(4)})
    for other in ({"b": np.zeros(4)}, {"a": np.zeros((2, 2))}, {"a": -np.zeros(4)}):
        assert trees.digest(other) != base


@pytest.fixture
def write(monkeypatch, tmp_path):
    """`write(step, tree, who, own)`: some of three processes write a checkpoint.

    `own`: each to a folder of its own, "0", "1" and "2".
    """

    def written(step, tree, who=(1, 2, 0), own=False):
        folders = [tmp_path / str(me) if own else tmp_path for me in range(3)]
        digests, steps = {}, [int(path.name) for path in folders[0].glob("[0-9]*")]
        for me in who:

            def exchange(value, me=me):
                if isinstance(value, list):  # the first knows which are there
                    assert me or sorted(value) == sorted(steps)
                    return [steps, [], []]
                digests[me] = value
                return [digests.get(i) for i in range(3)]

            with monkeypatch.context() as patch:
                patch.setattr(jax, "process_index", lambda me=me: me)
                patch.setattr(jax, "process_count", lambda: 3)
                patch.setattr(processes, "exchange", exchange)
                saved = checkpoint.Checkpoints(folders[me], {"seed": 1})
                saved.save(step, tree, {"of": step})
                saved.close()

    return written


def latest(folder):
    saved = checkpoint.Checkpoints(folder, {"seed": 1})
    found = saved.latest()
    saved.close()
    return found


def test_parts_of_several_processes_are_read_by_one(write, tmp_path):
    for step in (2, 4, 6, 8):
        write(step, state(step))
    step, flat, notes = latest(tmp_path)
    assert (step, notes) == (8, {"of": 8})
    jax.tree.map(
        np.testing.assert_array_equal, trees.restore_into(state(0.0), flat), state(8)
    )
    for number in (1, 2):
        kept = {path.stem for path in (tmp_path / f"part_{number}").glob("*")}
        assert {"6", "8"} <= kept <= {"4", "6", "8"}


def test_parts_in_folders_of_their_own_are_kept_as_long(write, tmp_path):
    for step in (2, 4, 6, 8):
        write(step, state(step), own=True)
    for number in (1, 2):
        part = f"part_{number}"
        kept = {path.stem for path in (tmp_path / str(number) / part).glob("*")}
        assert {"6", "8"} <= kept <= {"4", "6", "8"}
        # Together, as a store has them.
        (tmp_path / str(number) / part).rename(tmp_path / "0" / part)
    assert latest(tmp_path / "0")[0] == 8
    (tmp_path / "0" / "part_2" / "8.npz").unlink()
    assert latest(tmp_path / "0")[0] == 6


def test_fewer_arrays_than_processes(write, tmp_path):
    write(1, {"w": jnp.ones(3)})
    _, flat, _ = latest(tmp_path)
    np.testing.assert_array_equal(flat["w"], np.ones(3))


@pytest.mark.parametrize("who", [(1,), (1, 2)])
def test_what_not_all_have_written_does_not_count(write, tmp_path, who):
    write(2, state(2))
    write(4, state(4), who)
    assert latest(tmp_path)[0] == 2


@pytest.mark.parametrize("gone", [True, False])
def test_a_part_that_is_damaged_spoils_the_whole(write, tmp_path, caplog, gone):
    for step in (2, 4):
        write(step, state(step))
    path = tmp_path / "part_2" / "4.npz"
    path.unlink() if gone else path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level("WARNING", "mosaic_jax"):
        assert latest(tmp_path)[0] == 2
    assert "4 is damaged (the checksum of part 2 differs)" in caplog.text


def test_arrays_are_dealt_by_their_bytes():
    sizes = {"a": 9, "b": 5, "c": 4, "d": 1}
    arrays = {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
    arrays["e"] = jnp.zeros(20, jnp.bfloat16)
    found = [sorted(part) for part in checkpoint.shares(arrays, 2)]
    assert found == [["e"], ["a", "b", "c", "d"]]
