"""A small set of images as TFDS prepares it, without TensorFlow."""

import numpy as np


def prepare(directory, name, side=None):
    """Write the set `name` (of a class): 150 images for training and 20 for testing.

    They are `side` x 16, of several heights where that is None, of 3 classes and five
    writers.
    """
    import tensorflow_datasets as tfds

    np_rng = np.random.RandomState(0)
    features = {
        "image": tfds.features.Tensor(shape=(side, 16, 1), dtype=np.uint8),
        "label": tfds.features.ClassLabel(num_classes=3),
        "writer": tfds.features.Text(),
    }

    def rows(first, end):
        for i in range(first, end):
            shape = (side or 12 + i % 9, 16, 1)
            image = np_rng.randint(0, 256, shape).astype(np.uint8)
            yield i, {"image": image, "label": i % 3, "writer": f"w{i % 5}"}

    def info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    with tfds.core.registered.skip_registration():
        kind = type(
            name,
            (tfds.core.GeneratorBasedBuilder,),
            {
                "__module__": __name__,
                "VERSION": tfds.core.Version("1.0.0"),
                "_info": info,
                "_split_generators": lambda *_: {
                    "train": rows(0, 150),
                    "test": rows(150, 170),
                },
                "_generate_examples": lambda *_: iter(()),
            },
        )
    kind(data_dir=directory, file_format="array_record").download_and_prepare()
