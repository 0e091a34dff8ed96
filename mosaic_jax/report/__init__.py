"""Figures and the report page of a run."""


def write(study):
    """Placeholder."""
    return study.workdir / "report.html"
