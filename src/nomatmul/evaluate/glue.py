"""Scores of GLUE's tasks, by scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

METRICS = ("accuracy", "matthews", "f1", "macro_f1", "pearson", "spearman")


def glue_scores(
    metrics: Sequence[str], predictions: ArrayLike, labels: ArrayLike
) -> dict[str, float]:
    """Each metric of predictions against labels, in [-1, 1].

    Class ids for "accuracy", "matthews" (Matthews' correlation), "f1" (of class 1) and "macro_f1"
    (mean over classes); numbers for "pearson" and "spearman". A correlation with predictions that
    are all the same is 0. Raises ValueError for an unknown metric, unequal lengths, no rows, or
    values that are not finite; ImportError where scikit-learn is missing.
    """
    found, wanted = np.asarray(predictions, float), np.asarray(labels, float)
    if found.shape != wanted.shape or found.ndim != 1:
        raise ValueError(f"{found.shape} predictions for {wanted.shape} labels")
    if not len(found):
        raise ValueError("no rows to score")
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        raise ValueError("predictions and labels must be finite")
    return {name: _score(name, found, wanted) for name in metrics}


def _score(name: str, found: np.ndarray, wanted: np.ndarray) -> float:
    try:
        from scipy import stats
        from sklearn import metrics
    except ImportError as error:
        raise ImportError(f"scores need scikit-learn: pip install scikit-learn ({error})") from None
    if name in ("pearson", "spearman"):
        correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant input, which gives NaN, is meant below
            value = float(correlate(found, wanted)[0]) if len(found) > 1 else 0.0
        return value if np.isfinite(value) else 0.0
    classes, truth = found.astype(int), wanted.astype(int)
    if name == "accuracy":
        return float(metrics.accuracy_score(truth, classes))
    if name == "matthews":
        return float(metrics.matthews_corrcoef(truth, classes))
    if name == "f1":
        return float(metrics.f1_score(truth, classes, zero_division=0))
    if name == "macro_f1":
        return float(metrics.f1_score(truth, classes, average="macro", zero_division=0))
    raise ValueError(f"metric {name!r} is not known: use one of {', '.join(METRICS)}")
