"""What a study knows of its images: every one of them counts in its digest."""

import dataclasses

import numpy as np
import pytest

from mosaic_jax.core import errors
from mosaic_jax.data import federated
from mosaic_jax.data.dataset import Arrays, Info
from tests import tiny


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("kind", ["image", "label"])
def test_every_image_and_label_counts(part, kind):
    # Half of the images for training are held out for validation.
    config = dataclasses.replace(
        tiny.study().data, split="iid", num_clients=2, validation=0.5
    )
    info = Info(3, 16, 1, (0.5,), (0.5,), "none")
    arrays = {
        f"{part}_{kind}": np.zeros((8, 16, 16, 1), np.uint8)
        if kind == "image"
        else np.arange(8, dtype=np.uint8) % 2
        for part in ("train", "test")
        for kind in ("image", "label")
    }

    def content():
        return federated.build(config, 0, info, Arrays(**arrays)).content_sha256

    seen = {content()}
    for row in range(8):
        changed = arrays[f"{part}_{kind}"].copy()
        changed[row] += 1
        arrays[f"{part}_{kind}"] = changed
        seen.add(content())
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("train", "test", "told"),
    [
        (1, 0, "all training images are of class 1: there is nothing to tell apart"),
        ([0, 1], [2, 3], "no test image is of a class that any client holds"),
    ],
)
def test_a_study_that_could_find_nothing_is_refused(train, test, told):
    config = dataclasses.replace(tiny.study().data, split="iid", num_clients=2)
    label = {"train_label": np.resize(train, 8), "test_label": np.resize(test, 8)}
    image = np.zeros((8, 16, 16, 1), np.uint8)
    arrays = Arrays(train_image=image, test_image=image, **label)
    info = Info(4, 16, 1, (0.5,), (0.5,), "none")
    with pytest.raises(errors.DataError, match=f"data.name = digits: {told}"):
        federated.build(config, 0, info, arrays)
