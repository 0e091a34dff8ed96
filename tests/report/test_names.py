"""Names of studies on a page, and beside its figures."""

from mosaic_jax.report import names


def test_names_in_figures():
    cells = [f"model.name=mlp,data.alpha={alpha},seed=1" for alpha in (0.1, 1)]
    assert names.distinct(cells) == ["data.alpha=0.1", "data.alpha=1"]
    for same in (["fedavg", "mosaic"], ["a=1", "a=1,b=2"], ["a=1,b=2"]):
        assert names.distinct(same) == same
    assert names.labels(["fedavg", "mosaic"]) == ["fedavg", "mosaic"]
    alike = [f"{'x' * 30}{i}{'y' * 30}" for i in range(2)]
    assert [label[:4] for label in names.labels(alike)] == ["0: x", "1: x"]
    long = "methods.coboosting.iterations=1," * 3
    (found,) = names.labels([long])
    assert found == "methods.coboosting…ting.iterations=1,"
