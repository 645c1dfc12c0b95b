"""Confidence that is a probability: two parameters fitted on a dev set, and how far confidences are off.

The score of an entity is the probability of its line in the answer, under the grammar and without the line's end: with the
end, or without the grammar's renormalisation, it told right entities from wrong ones less well (AUC on the demo 0.894 for
0.923, on MSRA 0.830 for 0.850). It ranks entities well, but it is not how often entities like them are right: Platt's
method (Platt 1999, "Probabilistic Outputs for Support Vector Machines") fits a line to its log-odds; the fit is
Newton's, as Lin, Lin and Weng 2007 give it. Rows are those of predictions.jsonl (metrics.py).
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy

from alpaca.common.errors import UserError
from alpaca.common.whole_files import written_whole
from alpaca.scoring.metrics import RESAMPLES, strings_of

FEWEST = 200  # entities; two parameters fitted on fewer say more of chance than of the model
FOLDS, BINS = 10, 10
DECIMALS = 4
CALIBRATION = "calibration.json"  # in adapter_model/, and in the folder of a model that the adapter is merged into


class Calibration(NamedTuple):
    """confidence = 1 / (1 + exp(-(slope * log-odds + intercept))), log-odds: those of the line's probability."""

    slope: float
    intercept: float

    def confidence(self, log_probabilities):
        """What is said of entities with these log-probabilities, float64 of the same shape."""
        return _sigmoid(self.slope * log_odds(log_probabilities) + self.intercept)


class Bin(NamedTuple):
    """Entities of similar confidence."""

    confidence: float  # their mean
    right: float  # the share of them that is right
    count: int


class Scored(NamedTuple):
    """Predicted entities, as arrays of one length."""

    rows: numpy.ndarray  # number of the row that each is in
    log_probabilities: numpy.ndarray
    right: numpy.ndarray  # bool: whether gold has it too, as the string view counts


def log_odds(log_probabilities):
    """log(p / (1 - p)) of each log p, float64; they are rounded to six decimals, so 0 counts as -1e-6."""
    logs = numpy.clip(numpy.asarray(log_probabilities, dtype=numpy.float64), -700, -1e-6)
    return logs - numpy.log(-numpy.expm1(logs))


def scored(rows):
    """The Scored of all predicted entities of rows."""
    found = [
        (number, entity["log_probability"], (entity["entity"], entity["type"]) in strings_of(row, "gold"))
        for number, row in enumerate(rows)
        for entity in row["entities"]
    ]
    numbers, logs, right = zip(*found, strict=True) if found else ((), (), ())
    return Scored(numpy.array(numbers, dtype=int), numpy.array(logs, dtype=float), numpy.array(right, dtype=bool))


def with_confidence(row, calibration):
    """The row with the `confidence` of its entities, 0 to 1, and `calibrated`; calibration None: the line's probability."""
    entities = []
    for entity in row["entities"]:
        log_probability = entity["log_probability"]
        sure = calibration.confidence(log_probability) if calibration else raw_confidence(log_probability)
        entities.append({**entity, "confidence": round(float(sure), 4)})
    return {**row, "entities": entities, "calibrated": calibration is not None}


def fit(log_probabilities, right, fewest=FEWEST):
    """The Calibration of entities (arrays as in Scored), or None where it would mean nothing: fewer than `fewest`, all of
    them right or all wrong, or the surer ones no more often right."""
    x, hits = log_odds(log_probabilities), int(right.sum())
    if len(x) < fewest or hits in (0, len(x)):
        return None
    # Platt's targets: not quite 0 and 1, so that a perfect split has an end
    targets = numpy.where(right, (hits + 1) / (hits + 2), 1 / (len(x) - hits + 2))
    inputs = numpy.stack([x, numpy.ones_like(x)])
    weights = numpy.array([1.0, 0.0])

    def loss(weights):
        z = weights @ inputs
        return (numpy.logaddexp(0, z) - targets * z).sum()

    for _ in range(100):
        p = _sigmoid(weights @ inputs)
        gradient = inputs @ (p - targets)
        step = numpy.linalg.solve((inputs * (p * (1 - p))) @ inputs.T + 1e-9 * numpy.eye(2), gradient)
        size = 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if abs(size * step).max() < 1e-9:
            break
    # rounded as far as no confidence shows: what another machine's arithmetic changes in the ninth decimal is no other fit
    slope, intercept = (round(float(weight), DECIMALS) for weight in weights)
    return Calibration(slope, intercept) if slope > 0 else None


def out_of_fold(found):
    """Each entity's confidence by parameters that were fitted without its row: ten folds of rows, drawn by a fixed seed.

    found: Scored. None where one of the fits is. What parameters say of the entities that they were fitted on looks
    better than what they will say of others.
    """
    numbers = numpy.unique(found.rows)
    fold_of_row = dict(zip(numpy.random.default_rng(0).permutation(numbers), range(len(numbers)), strict=True))
    folds = numpy.array([fold_of_row[number] % FOLDS for number in found.rows], dtype=int)
    confidences = numpy.empty(len(folds))
    for fold in numpy.unique(folds):
        inside = folds == fold
        calibration = fit(found.log_probabilities[~inside], found.right[~inside], fewest=FEWEST // 2)
        if calibration is None:
            return None
        confidences[inside] = calibration.confidence(found.log_probabilities[inside])
    return confidences


def _groups(count):
    """Where each of BINS groups of equally many begins, and the end of the last; fewer groups where there are fewer."""
    return numpy.linspace(0, count, min(BINS, count) + 1).astype(int)


def bins(confidences, right):
    """Up to BINS Bin of equally many entities, the least sure first."""
    order = numpy.argsort(confidences, kind="stable")
    parts = numpy.split(order, _groups(len(order))[1:-1]) if len(order) else []
    return [Bin(float(confidences[part].mean()), float(right[part].mean()), len(part)) for part in parts]


def calibration_error(confidences, right):
    """How far mean confidence and share of right ones are apart, the mean over the bins (Naeini et al. 2015); 0.0 of none."""
    if not len(confidences):
        return 0.0
    order = numpy.argsort(confidences, kind="stable")
    gaps = numpy.add.reduceat((confidences - right)[order], _groups(len(order))[:-1])
    return float(abs(gaps).sum() / len(order))


def error_interval(rows, confidences, right):
    """95 % interval of calibration_error, [low, high]: a percentile bootstrap over rows, as that of F1 (metrics.py).

    rows: the number of each entity's row, ascending. An error that is 0 in truth is not 0 in a sample: the interval says
    how large it comes out by chance.
    """
    _, first, counts = numpy.unique(rows, return_index=True, return_counts=True)
    draw, errors = numpy.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = draw.integers(len(first), size=len(first))
        ends = counts[drawn].cumsum()
        chosen = numpy.arange(ends[-1]) + numpy.repeat(first[drawn] - ends + counts[drawn], counts[drawn])
        errors.append(calibration_error(confidences[chosen], right[chosen]))
    return [float(bound) for bound in numpy.percentile(errors, [2.5, 97.5])]


def log_loss(confidences, right):
    """Mean of -log of the probability that was given to what is true, in nats; no probability counts below 1e-9."""
    p = numpy.where(right, confidences, 1 - confidences)
    return float(-numpy.log(numpy.clip(p, 1e-9, 1)).mean())


class Rated(NamedTuple):
    """How good confidences are."""

    figures: dict  # what metrics.json says under "calibration"
    raw: list  # of Bin, of the lines' own probabilities
    calibrated: list  # of Bin; none where nothing is calibrated
    own: bool  # calibrated out of fold


def rate_confidence(rows, calibration=None, own=False):
    """The Rated of rows with gold.

    calibration: the one that the rows' confidences are made with; None: none. own: it was fitted on rows of this file, so
    it is rated out of fold. "error_raw", "log_loss_raw": of the lines' own probabilities; "error", "log_loss": of the
    calibrated ones, None where there are none; "n": entities. Each error has an interval. No entities: all None, n 0.
    """
    found = scored(rows)
    names = ("error", "error_interval", "log_loss")
    result, pictures, after = {"n": len(found.rows)}, [], None
    if calibration:
        after = out_of_fold(found) if own else calibration.confidence(found.log_probabilities)
    for suffix, sure in (("_raw", raw_confidence(found.log_probabilities)), ("", after)):
        if sure is None or not len(found.rows):
            result |= {name + suffix: None for name in names}
            pictures.append([])
            continue
        values = (
            calibration_error(sure, found.right),
            error_interval(found.rows, sure, found.right),
            log_loss(sure, found.right),
        )
        result |= {name + suffix: value for name, value in zip(names, values, strict=True)}
        pictures.append(bins(sure, found.right))
    return Rated(result, *pictures, own)


def calibration_text(rates):
    """What test.py prints of rate_confidence's figures."""
    if not rates["n"]:
        return "没有预测出实体，没有置信度"
    after = "没有校准" if rates["error"] is None else f"校准后 {rates['error']:.3f}"
    return f"置信度的校准误差：未校准 {rates['error_raw']:.3f}，{after}（{rates['n']} 个实体）"


def fit_rows(rows):
    """The Calibration of the entities of rows with gold, or None, as `fit`."""
    found = scored(rows)
    return fit(found.log_probabilities, found.right)


def write_calibration(folder, calibration, adapter_sha256, rows):
    """Put a Calibration beside the adapter of a folder, with what it was fitted on; None: an older one goes."""
    found, path = scored(rows), Path(folder) / CALIBRATION
    if calibration is None:
        path.unlink(missing_ok=True)
        return
    counts = {"entities": len(found.rows), "right": int(found.right.sum())}
    facts = {**calibration._asdict(), "adapter_sha256": adapter_sha256, **counts}
    with written_whole(path) as new:
        new.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_calibration(folder, adapter_sha256=None):
    """The Calibration in an adapter's folder, or of a model that one was merged into; None where there is none.

    adapter_sha256: of the adapter; a calibration of another one is none. UserError where the file is damaged.
    """
    path = Path(folder) / CALIBRATION
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        calibration, made_of = Calibration(float(facts["slope"]), float(facts["intercept"])), facts["adapter_sha256"]
        if not (calibration.slope > 0 and math.isfinite(sum(calibration))):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: damaged; delete it, python test.py writes it again") from None
    return calibration if adapter_sha256 in (None, made_of) else None


def raw_confidence(log_probabilities):
    """The probability of each line itself, float64."""
    return numpy.exp(log_probabilities)


def _sigmoid(z):
    return 0.5 * (1 + numpy.tanh(0.5 * z))
