"""What a study knows of its images: every one of them counts in its digest."""

import dataclasses

import numpy as np
import pytest

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
    info = Info(2, 16, 1, (0.5,), (0.5,), "none")
    arrays = {
        f"{part}_{kind}": np.zeros((8, 16, 16, 1) if kind == "image" else 8, np.uint8)
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
