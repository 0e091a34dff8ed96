"""Write the README's badges, docs/badges/*.svg: python -m tests.badges."""

import tomllib

import anybadge
import yaml

from tests.requirements import ROOT

FOLDER = ROOT / "docs" / "badges"


def files() -> dict[str, str]:
    """Each badge by its name: the Pythons that are tested, and the licence."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    checks = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())
    pythons = checks["jobs"]["tests"]["strategy"]["matrix"]["python"]
    texts = {"python": " | ".join(pythons), "licence": project["license"]}
    return {f"{name}.svg": _svg(name, text) for name, text in texts.items()}


def _svg(name: str, text: str) -> str:
    badge = anybadge.Badge(name, text, default_color="#0072b2")
    badge.mask_str = name  # the library counts the badges of a process
    return badge.badge_svg_text


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in files().items():
        (FOLDER / name).write_text(content)
