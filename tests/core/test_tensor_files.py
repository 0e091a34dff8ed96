"""Arrays are read out of files that nothing in them can run."""

import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, tensor_files
from tests import golden

FOLDER = pathlib.Path(golden.__file__).parent
# Written by torch.save 2.13, along with an epoch, of a network on several devices; the
# last layer's weights are bfloat16 and lie column by column.
PTH = FOLDER / "mlp.pth"


def expected():
    shapes = {
        "hidden.0": (4, 256),
        "hidden.1": (4, 4),
        "fc": (10, 4),
    }
    np_rng, found = np.random.RandomState(45), {}
    for name, shape in shapes.items():
        weight = np_rng.standard_normal(shape) / np.sqrt(shape[1])
        found[f"{name}.weight"] = weight.astype(np.float32)
        bias = 0.1 * np_rng.standard_normal(shape[:1])
        found[f"{name}.bias"] = bias.astype(np.float32)
    return found


def test_pth_without_pytorch():
    found, wanted = tensor_files.read(PTH), expected()
    wanted["fc.weight"] = wanted["fc.weight"].astype(jnp.bfloat16)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def edited(path, **entries):
    """A copy of the file at `path` with other content in some of its entries."""
    with zipfile.ZipFile(PTH) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            short = pathlib.PurePath(name).name.replace(".pkl", "")
            content = old.read(name)
            new.writestr(name, entries.get(f"_{short}", lambda x: x)(content))
    return path


def test_a_pth_with_more_than_tensors_is_refused():
    with pytest.raises(errors.CheckpointError, match="holds more than tensors: NEWOBJ"):
        tensor_files.read(FOLDER / "more_than_tensors.pth")


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        (
            {
                "_data": lambda x: x.replace(
                    b"_rebuild_tensor_v2", b"_rebuild_tensor_vX"
                )
            },
            "holds more than tensors: torch._utils._rebuild_tensor_vX",
        ),
        ({"_data": lambda x: x.replace(b"ctorch._utils", b"cos\nsystem  ")}, "damaged"),
        ({"_data": lambda x: x[:60]}, "damaged"),
        ({"_0": lambda x: x[:8]}, "damaged"),
        ({"_data": lambda x: x.replace(b"FloatStorage", b"BlurbStorage")}, "Blurb"),
    ],
)
def test_what_is_damaged_or_does_more_is_one_line(tmp_path, entries, why):
    with pytest.raises(errors.CheckpointError, match=why) as caught:
        tensor_files.read(edited(tmp_path / "x.pth", **entries))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "x.pth"))


def test_a_tensor_must_lie_in_its_storage():
    storage = np.arange(6, dtype=np.float32)
    rebuild = tensor_files._Global("torch._utils._rebuild_tensor_v2")
    call = tensor_files._Machine(None, "")._call
    found = call(rebuild, (storage, 1, (2, 2), (2, 1), False, None))
    np.testing.assert_array_equal(found, [[1, 2], [3, 4]])
    for offset, shape, strides in [
        (3, (2, 2), (2, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (10**9,), (0,)),
    ]:
        with pytest.raises(ValueError, match="does not lie in its storage"):
            call(rebuild, (storage, offset, shape, strides, False, None))


def test_safetensors_go_there_and_back(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {"a/b": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}
    tensor_files.write(path, arrays)
    np.testing.assert_array_equal(tensor_files.read(path)["a/b"], arrays["a/b"])
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(errors.CheckpointError, match="damaged or of another kind"):
        tensor_files.read(path)


def test_other_files_are_told(tmp_path):
    for name, why in [("x.pth", "no such file"), ("y.bin", "must end in one of .pth")]:
        path = tmp_path / name
        if name == "y.bin":
            path.write_bytes(b"?")
        with pytest.raises(errors.CheckpointError, match=why):
            tensor_files.read(path)
    (tmp_path / "z.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(errors.CheckpointError, match=r"since 1\.6"):
        tensor_files.read(tmp_path / "z.pt")
