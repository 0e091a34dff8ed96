"""What studies are called on a page: cells of a sweep have long names."""

from collections.abc import Sequence

# Characters of a name beside a figure.
LONGEST = 36


def distinct(names: Sequence[str]) -> list[str]:
    """Names of studies without the parts that all have in common.

    Args:
      names: those of a sweep are FIELD=VALUE,FIELD=VALUE,...; others stay as they are.
    """
    shared = common(names)
    parts = [[p for p in name.split(",") if p not in shared] for name in names]
    short = [",".join(part) for part in parts]
    return short if all(short) and len(set(short)) == len(short) else list(names)


def common(names: Sequence[str]) -> list[str]:
    """Parts of the first name that all others have too, in its order."""
    parts = [name.split(",") for name in names]
    return [p for p in parts[0] if len(parts) > 1 and all(p in one for one in parts)]


def labels(names: Sequence[str]) -> list[str]:
    """Names that fit beside a figure: long ones lose their middle, none equals another.

    Args:
      names: of studies.
    """
    half = LONGEST // 2
    cut = [n if len(n) <= LONGEST else f"{n[:half]}…{n[-half:]}" for n in names]
    if len(set(cut)) == len(cut):
        return cut
    return [f"{i}: {name}" for i, name in enumerate(cut)]
