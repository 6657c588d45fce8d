"""Closed forms, by subject: factors, statistics, regressions with elimination, streams between passes, two streams in step, sensitivity."""

from __future__ import annotations

from vitrim.closed_form.factors import TINY, Factors, factorise_linear, factorise_qk, factorise_vo, fold_value_bias
from vitrim.closed_form.regression import RIDGES, Elimination, Regression, choose_ridge, eliminate, loss, refit, total
from vitrim.closed_form.sensitivity import Sensitivity, places, sensitivity
from vitrim.closed_form.statistics import BlockStatistics, Moments, calibrate, sees_inputs
from vitrim.closed_form.streams import IN_MEMORY_BYTES, StreamCache, answers, following, lookahead
from vitrim.closed_form.walk import Rows, Walk

__all__ = [
    "IN_MEMORY_BYTES",
    "RIDGES",
    "TINY",
    "BlockStatistics",
    "Elimination",
    "Factors",
    "Moments",
    "Regression",
    "Rows",
    "Sensitivity",
    "StreamCache",
    "Walk",
    "answers",
    "calibrate",
    "choose_ridge",
    "eliminate",
    "factorise_linear",
    "factorise_qk",
    "factorise_vo",
    "fold_value_bias",
    "following",
    "lookahead",
    "loss",
    "places",
    "refit",
    "sees_inputs",
    "sensitivity",
    "total",
]
