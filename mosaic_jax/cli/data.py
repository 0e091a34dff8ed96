"""Prepare and look at a data set, and at how it would be split, without training.

mosaic data cifar10 --data_dir data
mosaic data digits --split dirichlet_unbalanced --alpha 0.1
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from mosaic_jax.run import programs

    programs.end_on_interrupt()

import numpy as np

from mosaic_jax.core import errors, files, schema
from mosaic_jax.data import dataset, partition, settings, sources
from mosaic_jax.report import figures
from mosaic_jax.run import programs

# More clients than this are not listed.
MOST_ROWS = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a user's error."""
    parser = programs.parser("data", __doc__)
    parser.add_argument("name", help="as config.data.name, see mosaic list data")
    parser.add_argument("--data_dir", default="data", help="as config.data.dir")
    parser.add_argument(
        "--split", choices=(*partition.MODES, "file"), help="draw label counts"
    )
    parser.add_argument("--split_file", default="", help="of --split file")
    parser.add_argument("--num_clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.1)
    of_data = schema.defaults(settings.Data)
    for field in settings.SPLIT_FIELDS[1:]:
        value = of_data[field]
        told = "as in config.data"
        parser.add_argument(f"--{field}", type=type(value), default=value, help=told)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="picture of --split, PNG, PDF or SVG; by default none is drawn",
    )
    args = parser.parse_args(arguments)
    return programs.exit_code(lambda: _describe(args))


def _describe(args: argparse.Namespace) -> None:
    if args.output:
        files.check_output("--output", args.output, figures.SUFFIXES)
    if (args.split == "file") != bool(args.split_file):
        raise errors.ConfigError(
            f"--split_file = {args.split_file!r}: must be a file with --split file, and"
            " be left out otherwise"
        )
    info, found = sources.load(args.name, args.data_dir)
    print(
        f"{args.name}: {info.num_classes} classes,"
        f" {' x '.join(map(str, info.image_shape))}, augmentation {info.augmentation}"
    )
    print(f"mean {info.mean}, deviation {info.std} (black 0, white 1)")
    counts = []
    for part in ("train", "test"):
        label = getattr(found, f"{part}_label")
        count = np.bincount(label, minlength=info.num_classes)
        print(
            f"{part:5} {len(label):7} images, {count.min()} to {count.max()} of a class"
        )
        counts.append(count)
    for told in [*dataset.absent(*counts), dataset.pointless(*counts)]:
        if told:
            print(told)
    if args.split:
        _draw(args, found.train_label, info.num_classes)


def _draw(args: argparse.Namespace, label: np.ndarray, num_classes: int) -> None:
    if args.split == "file":
        parts = partition.read(
            args.split_file, num_images=len(label), num_clients=args.num_clients
        )
    else:
        parts = partition.split(
            label,
            mode=args.split,
            num_clients=args.num_clients,
            seed=args.seed,
            **{field: getattr(args, field) for field in settings.SPLIT_FIELDS},
        )
    count = partition.label_counts(label, parts, num_classes)
    size = count.sum(axis=1)
    print(
        f"{len(parts)} clients, {size.min()} to {size.max()} images, sha256"
        f" {partition.digest(parts)[:16]}"
    )
    if len(count) <= MOST_ROWS:
        print(_table(count))
    if args.output:
        figures.save(figures.label_counts(count), args.output)
        print(args.output)


def _table(count: np.ndarray) -> str:
    """Images of each class [C, K] as text, a row for each client."""
    width = max(4, len(str(count.max()))) + 1
    lines = [("class", [str(number) for number in range(count.shape[1])])]
    lines += [
        (f"client {client}", [str(value or ".") for value in row])
        for client, row in enumerate(count)
    ]
    first = max(len(name) for name, _ in lines)
    return "\n".join(
        f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells)
        for name, cells in lines
    )


if __name__ == "__main__":
    sys.exit(main())
