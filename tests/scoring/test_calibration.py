"""Confidences: whether they are probabilities, and what is said of that.     python -m pytest tests/scoring/test_calibration.py"""

import json

import numpy
import pytest

from alpaca.common.errors import UserError
from alpaca.scoring.calibration import (
    BINS,
    CALIBRATION,
    FEWEST,
    Calibration,
    bins,
    calibration_error,
    calibration_text,
    error_interval,
    fit,
    fit_rows,
    log_loss,
    log_odds,
    out_of_fold,
    rate_confidence,
    read_calibration,
    scored,
    with_confidence,
    write_calibration,
)
from alpaca.scoring.metrics import RESAMPLES


def entities(count, slope, intercept, seed=0):
    """(log-probabilities, which are right), drawn as a Calibration with these parameters says."""
    draw = numpy.random.default_rng(seed)
    logs = numpy.log(draw.beta(5, 1, size=count))
    return logs, draw.random(count) < Calibration(slope, intercept).confidence(logs)


def rows_of(logs, right, per_row=4):
    """Rows of `per_row` entities each."""
    rows = []
    for begin in range(0, len(logs), per_row):
        found = [
            {"entity": f"甲{i}", "type": "人名", "spans": [], "log_probability": round(float(logs[i]), 6)}
            for i in range(begin, min(begin + per_row, len(logs)))
        ]
        gold = [e for e, hit in zip(found, right[begin : begin + per_row], strict=True) if hit]
        rows.append({"text": "甲", "prediction": "", "entities": found, "gold": gold})
    return rows


def test_the_parameters_are_found_again():
    """And they are where the likelihood of Platt's targets is highest: no step in any direction is better."""
    logs, right = entities(60_000, 0.5, -1.0)
    found = fit(logs, right)
    assert found.slope == pytest.approx(0.5, abs=0.03) and found.intercept == pytest.approx(-1.0, abs=0.06)
    logs, right = logs[:500], right[:500]
    hits = right.sum()
    targets = numpy.where(right, (hits + 1) / (hits + 2), 1 / (500 - hits + 2))

    def loss(slope, intercept):
        p = 1 / (1 + numpy.exp(-(slope * log_odds(logs) + intercept)))
        return -(targets * numpy.log(p) + (1 - targets) * numpy.log(1 - p)).sum()

    found = fit(logs, right)
    for step in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, -1e-3)):
        assert loss(*found) < loss(found.slope + step[0], found.intercept + step[1])


def test_nothing_is_fitted_where_it_would_mean_nothing():
    logs, right = entities(FEWEST, 1.0, 0.0)
    assert fit(logs, right) and not fit(logs[1:], right[1:])
    assert not fit(logs, numpy.ones(FEWEST, dtype=bool)) and not fit(logs, numpy.zeros(FEWEST, dtype=bool))
    assert not fit(-logs - logs.max(), ~right & (logs < -0.5))  # the surer, the more often wrong
    split = numpy.log(numpy.linspace(0.01, 0.99, FEWEST))
    assert fit(split, split > -0.5).slope > 1  # no parameters grow without end where the two can be told apart


def test_confidence_is_between_0_and_1_and_keeps_the_order():
    """Also of what is certain and of what cannot be; log-odds are those of the probability."""
    logs = numpy.array([-800.0, -20.0, -1.0, -1e-6, 0.0])
    sure = Calibration(0.7, -0.3).confidence(logs)
    assert (numpy.diff(sure) >= 0).all() and 0 <= sure[0] < 1e-9 and 0.99 < sure[-1] < 1 and sure[-1] == sure[-2]
    assert log_odds(numpy.log(0.8)) == pytest.approx(numpy.log(4)) and Calibration(1, 0).confidence(
        numpy.log(0.8)
    ) == pytest.approx(0.8)


def test_rows_get_their_confidences():
    found = [{"entity": "甲", "type": "人名", "spans": [[0, 1]], "log_probability": score} for score in (-0.5, 1e-6)]
    row = {"text": "甲", "entities": found}
    raw = with_confidence(row, None)
    assert [entity["confidence"] for entity in raw["entities"]] == [0.6065, 1.0] and raw["calibrated"] is False
    calibrated = with_confidence(raw, Calibration(1.0, -1.0))
    expected = [round(float(value), 4) for value in Calibration(1.0, -1.0).confidence([-0.5, 1e-6])]
    assert [entity["confidence"] for entity in calibrated["entities"]] == expected and calibrated["calibrated"] is True
    assert with_confidence(calibrated, None) == raw and "calibrated" not in row


def test_error_and_log_loss_by_hand():
    sure, right = numpy.array([0.9, 0.1, 0.6, 0.8]), numpy.array([True, False, False, True])
    assert bins(sure, right) == [(0.1, 0, 1), (0.6, 0, 1), (0.8, 1, 1), (0.9, 1, 1)]
    assert calibration_error(sure, right) == pytest.approx((0.1 + 0.6 + 0.2 + 0.1) / 4)
    assert log_loss(sure, right) == pytest.approx(-numpy.log([0.9, 0.9, 0.4, 0.8]).mean())
    assert log_loss(numpy.array([0.0]), numpy.array([True])) == pytest.approx(-numpy.log(1e-9))
    # ten groups of as many, by confidence: in each the mean counts, not each entity
    sure = numpy.repeat(numpy.linspace(0.05, 0.95, BINS), 20)
    right = numpy.concatenate([numpy.arange(20) < round(20 * value) for value in sure[::20]])
    assert [found.count for found in bins(sure, right)] == [20] * BINS
    assert calibration_error(sure, right) == pytest.approx(0, abs=1e-9)
    assert calibration_error(sure, ~right) == pytest.approx(numpy.abs(1 - 2 * sure).mean())


def test_out_of_fold_no_entity_is_scored_by_its_own_row():
    """A row whose entities are turned round changes the confidences of others, and none of its own."""
    logs, right = entities(800, 0.5, -1.0)
    found = scored(rows_of(logs, right))
    before = out_of_fold(found)
    for row in (0, 7, 150):
        inside = found.rows == row
        changed = out_of_fold(found._replace(right=numpy.where(inside, ~found.right, found.right)))
        assert (changed[inside] == before[inside]).all() and (changed[~inside] != before[~inside]).mean() > 0.8


def test_rated():
    """The raw error is large, that out of fold is small, and its interval holds it; each of the figures is what it says."""
    logs, right = entities(2000, 0.5, -1.0)
    rows = rows_of(logs, right)
    calibration = fit_rows(rows)
    rated = rate_confidence(rows, calibration, own=True)
    figures, found = rated.figures, scored(rows)
    raw, after = numpy.exp(found.log_probabilities), out_of_fold(found)
    assert figures["error_raw"] == pytest.approx(calibration_error(raw, found.right)) and figures["error_raw"] > 0.3
    assert figures["error"] == pytest.approx(calibration_error(after, found.right)) and figures["error"] < 0.04
    assert figures["log_loss"] == pytest.approx(log_loss(after, found.right)) and figures["n"] == 2000
    assert figures["log_loss_raw"] == pytest.approx(log_loss(raw, found.right))
    assert figures["log_loss_raw"] > figures["log_loss"]
    for name in ("error", "error_raw"):
        low, high = figures[f"{name.replace('error', 'error_interval')}"]
        assert 0 < low < high < low + 0.1 and low < figures[name] + 0.02 and figures[name] < high
    assert (rated.raw, rated.calibrated) == (bins(raw, found.right), bins(after, found.right))
    elsewhere = rate_confidence(rows, Calibration(1.0, 0.0)).figures
    assert elsewhere["error"] == pytest.approx(elsewhere["error_raw"])  # that calibration says what is there already
    text = calibration_text(figures)
    assert f"未校准 {figures['error_raw']:.3f}，校准后 {figures['error']:.3f}（2000 个实体）" in text


def test_the_fewest_entities_that_are_calibrated_are_rated():
    """Each fold is fitted on fewer."""
    rows = rows_of(*entities(FEWEST, 1.0, 0.0))
    assert rate_confidence(rows, fit_rows(rows), own=True).figures["error"] > 0


def test_the_interval_is_that_of_rows_drawn_anew():
    logs, right = entities(60, 0.5, -1.0)
    numbers, sure = scored(rows_of(logs, right, per_row=3)).rows, numpy.exp(logs)
    draw, errors = numpy.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = numpy.concatenate([numpy.flatnonzero(numbers == row) for row in draw.integers(20, size=20)])
        errors.append(calibration_error(sure[chosen], right[chosen]))
    errors.sort()
    low, high = error_interval(numbers, sure, right)
    assert [sum(error < bound for error in errors) / RESAMPLES for bound in (low, high)] == pytest.approx(
        [0.025, 0.975]
    )


def test_rated_without_a_calibration_or_entities():
    rows = rows_of(*entities(40, 1.0, 0.0))
    assert fit_rows(rows) is None
    rated = rate_confidence(rows)
    assert rated.calibrated == [] and rated.figures["error"] is None and rated.figures["error_raw"] > 0
    assert "没有校准" in calibration_text(rated.figures)
    figures = rate_confidence([{"text": "甲", "entities": [], "gold": []}], Calibration(1.0, 0.0)).figures
    assert figures.pop("n") == 0 and set(figures.values()) == {None}
    assert "没有预测出实体" in calibration_text({"n": 0})


def test_a_calibration_belongs_to_one_adapter(tmp_path):
    rows = rows_of(*entities(400, 0.5, -1.0))
    calibration = fit_rows(rows)
    assert read_calibration(tmp_path) is None
    write_calibration(tmp_path, calibration, "a1", rows)
    facts = json.loads((tmp_path / CALIBRATION).read_text(encoding="utf-8"))
    hits = sum(len(row["gold"]) for row in rows)
    assert (facts["adapter_sha256"], facts["entities"], facts["right"]) == ("a1", 400, hits)
    assert read_calibration(tmp_path, "a1") == read_calibration(tmp_path) == calibration
    assert read_calibration(tmp_path, "b2") is None
    for damage in ("{", "[]", '{"slope": 1, "intercept": NaN, "adapter_sha256": ""}', '{"slope": -1, "intercept": 0}'):
        (tmp_path / CALIBRATION).write_text(damage, encoding="utf-8")
        with pytest.raises(UserError, match="calibration.json: damaged; delete it"):
            read_calibration(tmp_path)
    write_calibration(tmp_path, None, "a1", rows)  # an older one is none of these weights' any more
    assert not (tmp_path / CALIBRATION).exists()
