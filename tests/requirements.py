"""Write requirements*.txt from pyproject.toml: python -m tests.requirements."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
HEAD = "# Made from pyproject.toml by `make requirements`.\n"
# Groups of pyproject.toml that have a file of their own.
GROUPS = ("test", "docs", "tfds", "ahead")


def files() -> dict[str, str]:
    """Content of each requirements file by its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]

    def expanded(names):
        """`names`, those of this project's own groups in place of the groups."""
        for name in names:
            own = re.fullmatch(rf"{project['name']}\[([\w-]+)\]", name)
            yield from expanded(groups[own[1]]) if own else [name]

    def text(names):
        return HEAD + "".join(f"{name}\n" for name in names)

    found = {"requirements.txt": text(project["dependencies"])}
    for group in GROUPS:
        names = ["-r requirements.txt", *expanded(groups[group])]
        found[f"requirements-{group}.txt"] = text(names)
    return found


if __name__ == "__main__":
    for name, content in files().items():
        (ROOT / name).write_text(content)
