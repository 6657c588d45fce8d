"""Closed forms, by subject: low-rank factors, weighted regressions with elimination, streams held between passes, sensitivity."""

from __future__ import annotations

from vitrim.closed_form.factors import (
    TINY,
    BlockStatistics,
    Factors,
    Moments,
    calibrate,
    factorise_linear,
    factorise_qk,
    factorise_vo,
    fold_value_bias,
    sees_inputs,
)
from vitrim.closed_form.knapsack import CELLS, knapsack
from vitrim.closed_form.regression import RIDGES, Elimination, Regression, choose_ridge, eliminate, loss, refit
from vitrim.closed_form.sensitivity import Sensitivity, sensitivity
from vitrim.closed_form.streams import (
    IN_MEMORY_BYTES,
    StreamCache,
    after_steps,
    answers,
    attend,
    divergence,
    expand,
    finish,
    following,
    has_steps,
    lookahead,
    narrowed,
    through_mlp,
)

__all__ = [
    "CELLS",
    "IN_MEMORY_BYTES",
    "RIDGES",
    "TINY",
    "BlockStatistics",
    "Elimination",
    "Factors",
    "Moments",
    "Regression",
    "Sensitivity",
    "StreamCache",
    "after_steps",
    "answers",
    "attend",
    "calibrate",
    "choose_ridge",
    "divergence",
    "eliminate",
    "expand",
    "factorise_linear",
    "factorise_qk",
    "factorise_vo",
    "finish",
    "fold_value_bias",
    "following",
    "has_steps",
    "knapsack",
    "lookahead",
    "loss",
    "narrowed",
    "refit",
    "sees_inputs",
    "sensitivity",
    "through_mlp",
]
