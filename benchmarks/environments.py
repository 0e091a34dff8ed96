"""An environment of its own for each rival: what they need excludes one another.

    python -m benchmarks.environments
    python -m benchmarks.environments pfl flower

Makes .rivals/NAME for each file benchmarks/requirements/NAME.txt and installs what it
asks for, with the Python that runs this (which needs no packages). An environment whose
file has not changed since is left alone.
"""

import argparse
import pathlib
import subprocess
import venv

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / ".rivals"
REQUIREMENTS = {
    path.stem: path
    for path in sorted((ROOT / "benchmarks" / "requirements").glob("*.txt"))
}


def python(name: str) -> pathlib.Path:
    """The interpreter of environment `name`.

    Raises:
      SystemExit: it is not there or out of date; the line says how to make it.
    """
    if not is_ready(name):
        raise SystemExit(
            f"the environment {name} is missing or out of date: make it by python -m"
            f" benchmarks.environments {name}"
        )
    return FOLDER / name / "bin" / "python"


def make(name: str) -> None:
    """Create environment `name` anew and install its requirements.

    Raises:
      CalledProcessError: pip failed; it has said why.
    """
    folder = FOLDER / name
    venv.EnvBuilder(with_pip=True, clear=True).create(folder)
    pip = folder / "bin" / "python", "-m", "pip", "install", "--quiet"
    subprocess.run([*pip, "-r", REQUIREMENTS[name]], check=True)
    _mark(name).write_text(REQUIREMENTS[name].read_text())


def is_ready(name: str) -> bool:
    """Environment `name` has what its file asks for."""
    wanted = REQUIREMENTS[name].read_text()
    return _mark(name).is_file() and _mark(name).read_text() == wanted


def _mark(name: str) -> pathlib.Path:
    """Written last: what has been installed."""
    return FOLDER / name / "installed.txt"


def main() -> None:
    """Make those that are not ready."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default all")
    names = parser.parse_args().names or list(REQUIREMENTS)
    for name in names:
        if name not in REQUIREMENTS:
            parser.error(f"{name}: must be one of {', '.join(REQUIREMENTS)}")
    for name in names:
        if not is_ready(name):
            make(name)
        print(python(name))


if __name__ == "__main__":
    main()
