import pytest

from tests.report import saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run directories: few clients, many, and two seeds of one study."""
    root = tmp_path_factory.mktemp("runs")
    saved.write_run(root / "few")
    saved.write_run(root / "many", num_clients=1000, num_classes=100)
    for seed in (0, 1):
        saved.write_run(root / "seeds" / f"seed_{seed}", seed=seed, alpha=1.0)
    return root
