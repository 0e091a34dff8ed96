"""Metrics: what ships against others' code, and a user's own."""

import clu.metrics
import flax.struct
import numpy as np
import pytest
import scipy.special
from sklearn import metrics as reference

import mosaic_jax as mj
from mosaic_jax.api import measured, metrics
from mosaic_jax.core import errors
from tests.api.test_study import Net, config, images

K = 7
np_rng = np.random.RandomState(0)
LABEL = np_rng.randint(0, K - 1, 300).astype(np.int32)  # the last class is not there
LOGITS = np_rng.randn(300, K).astype(np.float32)
LOGITS[np.arange(300), LABEL] += 1
SCORE = scipy.special.softmax(LOGITS.astype(float), axis=-1)


def test_those_that_scikit_learn_has():
    found = {name: one(LOGITS, LABEL) for name, one in metrics.SHIPPED.items()}
    predicted, classes = LOGITS.argmax(-1), np.arange(K)
    assert found["top_1"] == reference.accuracy_score(LABEL, predicted)
    top_5 = reference.top_k_accuracy_score(LABEL, LOGITS, k=5, labels=classes)
    assert found["top_5"] == pytest.approx(top_5)
    log_loss = reference.log_loss(LABEL, SCORE, labels=classes)
    assert found["loss"] == pytest.approx(log_loss)
    f1 = reference.f1_score(LABEL, predicted, average="macro")
    assert found["macro_f1"] == pytest.approx(f1)
    areas = [reference.roc_auc_score(k == LABEL, SCORE[:, k]) for k in np.unique(LABEL)]
    assert found["auroc"] == pytest.approx(np.mean(areas))


def test_calibration_error_by_hand():
    """Two bins: at 0.9 all are right, at 0.6 none is."""
    sure, right = np.array([0.9, 0.9, 0.6, 0.6]), np.array([1, 1, 0, 0])
    logits = np.log(np.stack([sure, 1 - sure], axis=1))
    found = metrics.calibration_error(logits, 1 - right)
    assert found == pytest.approx((2 * 0.1 + 2 * 0.6) / 4)


def test_of_one_class_there_is_no_curve():
    assert np.isnan(metrics.auroc(LOGITS, np.zeros(300, int)))


def spread(logits, labels):
    """A user's own."""
    return logits.std() + len(labels)


@flax.struct.dataclass
class Both(clu.metrics.Collection):
    accuracy: clu.metrics.Accuracy


def test_kinds_of_metrics():
    given = ["top_1", spread, clu.metrics.Accuracy, Both]
    found = metrics.measure(given, K)(LOGITS, LABEL)
    assert list(found) == ["top_1", "spread", "Accuracy", "accuracy"]
    for name in ("Accuracy", "accuracy"):
        assert found[name] == pytest.approx(found["top_1"])
    assert found["spread"] == pytest.approx(LOGITS.std() + 300)
    assert metrics.measure({"far": spread}, K)(LOGITS, LABEL).keys() == {"far"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("top_1", r"metrics = 'top_1': must be a list"),
        (["top1"], r"metrics: 'top1': did you mean 'top_1'"),
        ([3], r"metrics: 3: must have a name"),
        ({"three": 3}, r"metrics: three: 3: must be a function of logits"),
        (
            {"all": lambda x, y: x},
            r"metrics: all: must return a number for logits",
        ),
        ({"no": lambda x: 1}, r"metrics: no: must return a number .*: TypeError"),
    ],
)
def test_what_is_refused(given, told):
    with pytest.raises(errors.ConfigError, match=told):
        metrics.measure(given, K)


def test_metrics_of_a_study(tmp_path):
    def study(rounds, metrics):
        return mj.Study(
            config(init__rounds=rounds, data__client_test="own"),
            tmp_path,
            model=Net(),
            data=mj.data.arrays(*images()),
            metrics=metrics,
        )

    result = study(2, ["top_1", spread]).run()
    found = result.metrics
    for held_out, accuracy in result.summary.accuracies.items():
        for model, value in accuracy.items():
            assert found.models[model][held_out]["top_1"] == pytest.approx(value)
    assert len(found.clients["top_1"]) == 3
    assert min(found.clients["spread"]) >= 50  # as many test images as there are
    assert "<td>spread</td>" in result._repr_html_()
    assert mj.load(tmp_path).metrics == found
    again = study(2, ["loss"]).run()
    assert again.metrics.models["final"]["test"].keys() == {"loss"}
    assert again.summary == result.summary
    # Of other models nothing is known.
    assert study(3, None).run().metrics == measured.Measured()
    per_class = result.per_class["final"]
    assert np.mean(per_class) == pytest.approx(result.summary.test_accuracy["final"])
