"""Archives of data sets in their true formats, of few and small images."""

import io
import tarfile

import numpy as np
from PIL import Image


def cifar_archive(path, num=3, extra=None):
    """A CIFAR-10 binary archive of `num` images a file; returns images and labels."""
    np_rng = np.random.RandomState(0)
    image = np_rng.randint(0, 256, (6 * num, 32, 32, 3)).astype(np.uint8)
    label = np_rng.randint(0, 10, 6 * num)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    with tarfile.open(path, "w:gz") as tar:
        for part, name in enumerate(names):
            rows = slice(part * num, (part + 1) * num)
            planes = image[rows].transpose(0, 3, 1, 2).reshape(num, -1)
            content = np.concatenate([label[rows, None], planes], 1).astype(np.uint8)
            add(tar, f"cifar-10-batches-bin/{name}", content.tobytes())
        for name, content in (extra or {}).items():
            add(tar, name, content)
    return image, label


def add(tar, name, content):
    """Add a file to an open tar archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(value, side=64, mode="RGB", kind="PNG"):
    """Bytes of an image file of one colour."""
    image = Image.new(mode, (side, side), value)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def tiny_imagenet_files():
    """Contents by name of a Tiny-ImageNet of three classes."""
    wnids = [f"n{i:08d}" for i in (3, 1, 2)]
    files = {
        "tiny-imagenet-200/wnids.txt": "\n".join(wnids).encode(),
        "tiny-imagenet-200/val/val_annotations.txt": (
            f"val_0.JPEG\t{wnids[0]}\t0\t0\t9\t9\nval_1.JPEG\t{wnids[1]}\t0\t0\t9\t9\n"
        ).encode(),
        "tiny-imagenet-200/val/images/val_0.JPEG": png((30, 0, 0), kind="JPEG"),
        "tiny-imagenet-200/val/images/val_1.JPEG": png((10, 0, 0), kind="JPEG"),
        "tiny-imagenet-200/test/images/test_0.JPEG": b"unlabelled: not read",
    }
    for i, wnid in enumerate(wnids):
        name = f"tiny-imagenet-200/train/{wnid}/images/{wnid}_0.JPEG"
        files[name] = png((100 * i, 0, 0), kind="JPEG")
    return files


def food101_files():
    """Contents by name of a Food-101 of two classes."""
    return {
        "food-101/meta/classes.txt": b"apple_pie\nwaffles\n",
        "food-101/meta/train.txt": b"apple_pie/1\nwaffles/2\n",
        "food-101/meta/test.txt": b"waffles/3\n",
        "food-101/images/apple_pie/1.jpg": png((200, 0, 0), 512, kind="JPEG"),
        "food-101/images/waffles/2.jpg": png((0, 200, 0), 300, kind="JPEG"),
        "food-101/images/waffles/3.jpg": png((0, 0, 200), 512, kind="JPEG"),
    }
