"""UVC's primal-dual rule: how counts, gates and duals move. Knows no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vitrim.methods.uvc.config import Rules

Array = np.ndarray[Any, np.dtype[np.float64]]

GATE_START = 2.0
"""Keep minus skip at the start: a block is kept with probability 0.881, as the paper's logits (-1, +1) have it."""
GATE_LIMIT = 4.0
"""Gate logits stay within it either way."""


class Width(NamedTuple):
    """One count: units of a part of a block that may go, at most size - 1. head: for dims counted by head."""

    block: int
    part: str
    size: int
    head: int | None = None

    @property
    def top(self) -> float:
        """Largest share that may go: one unit always stays."""
        return 1 - 1 / self.size


def bottom(energies: Array, removed: float) -> tuple[float, float]:
    """The paper's bottom-s norm of ascending energies [n]: the sum of the ceil(s) smallest, and its slope in s.

    The slope is the next smallest entry, the price of one more group; the largest where none is left.
    """
    count = min(len(energies), math.ceil(removed - 1e-9))
    return float(energies[:count].sum()), float(energies[min(count, len(energies) - 1)])


def prox(group: Any, strength: Any) -> Any:
    """argmin over V of |V - W|^2 / 2 + strength * |V|^2: the weights of a removed group, smaller."""
    return group / (1 + 2 * strength)


class Controller:
    """Counts, gates and duals: the decisions, and how they move. Knows no network.

    removed [W]: share of each width that is gone. logits [G]: keep minus skip. y [W], z [2] (MACs, parameters): duals, never
    below 0. targets [2]: what the cost may be, as shares; infinite where there is no limit.
    """

    def __init__(self, widths: Sequence[Width], gates: int, targets: Sequence[float], rules: Rules) -> None:
        self.rules, self.widths = rules, list(widths)
        self.sizes = np.array([w.size for w in widths], dtype=np.float64)
        self.tops = np.array([w.top for w in widths], dtype=np.float64)
        self.targets = np.array(targets, dtype=np.float64)
        self.bound = np.isfinite(self.targets)
        self.removed = np.zeros(len(self.widths))
        self.logits = np.full(gates, GATE_START)
        self.y = np.full(len(self.widths), 1e-3)
        self.z = np.where(self.bound, 1e-3, 0.0)
        self.prices = np.zeros(len(self.widths) + gates)  # running means of the loss's slopes
        self.weight = np.zeros_like(self.prices)  # how much of a mean they are yet
        self.velocity, self.gathered, self.count = np.zeros(gates), np.zeros(gates), 0.0
        self.cost = np.ones(2)
        self.goal = np.where(self.bound, 1.0, np.inf)

    STATE = ("removed", "logits", "y", "z", "prices", "weight", "velocity", "gathered", "cost", "goal")

    def effective(self, share: float) -> Array:
        """Gate logits as the network has them at a share of the search: colder as it goes on, never without doubt."""
        if not self.rules.masked:
            return self.logits
        return np.clip(self.logits / (1 + (self.rules.cold - 1) * min(1.0, share)), -GATE_LIMIT, GATE_LIMIT)

    def advance(
        self,
        share: float,
        steps: int,
        loss_widths: Array,
        loss_gates: Array,
        energies: Sequence[Array],
        shares: Callable[[Array, Array], tuple[Array, Array, Array]],
    ) -> None:
        """One step of all decisions and duals.

        share: of the search that is done, in [0, 1); steps: of the whole search. loss_widths, loss_gates: slopes of the loss
        in each share removed and in each gate's logit as the forward pass had it. energies: ascending squared norms of the
        groups of each width, their sum 1 in `clean`. shares: cost of (removed, logits at their temperature), with slopes.
        """
        value, slope_w, slope_g = shares(self.removed, self.effective(share))
        self.goal = self._goal(share)
        counts = (self.removed * self.sizes).tolist()
        norms = np.array([bottom(e, s) for e, s in zip(energies, counts, strict=True)])
        penalties, rises = norms.reshape(-1, 2).T
        if self.rules.masked:
            keep = 1 / (1 + np.exp(-self.effective(share)))
            # slopes in the probability itself can be averaged while logits move and cool
            doubt = np.maximum(0.01, keep * (1 - keep))
            fresh = np.concatenate([loss_widths, -loss_gates / doubt])
            spans = np.concatenate([np.full(len(loss_widths), 0.02), np.full(len(doubt), 0.1)])
            memory = np.maximum(5.0, spans * steps)
            self.prices += (fresh - self.prices) / memory
            self.weight += (1 - self.weight) / memory
            self._move(share, steps, value, slope_w, slope_g / doubt, rises)
        else:
            self._move_as_published(value, slope_w, slope_g, loss_gates, rises)
        self.cost = shares(self.removed, self.effective(share))[0]
        per_step = 1.0 / steps if self.rules.masked else 1.0
        self.y += self.rules.y_step * per_step * penalties
        phase = min(len(self.rules.z_steps) - 1, int(share * len(self.rules.z_steps)))
        # in `clean` a high price is reached, and left, as fast as a low one
        pace = np.maximum(1.0, self.z) if self.rules.masked else 1.0
        rise = self.rules.z_steps[phase] * per_step * pace * self._over(self.cost)
        self.z = np.clip(self.z + rise, 0.0, self.rules.z_max)

    def _goal(self, share: float) -> Array:
        done = 1.0 if not self.rules.ramp else min(1.0, share / self.rules.ramp)
        return np.where(self.bound, 1 + (np.minimum(self.targets, 1.0) - 1) * done, np.inf)

    def _over(self, cost_: Array) -> Array:
        """How far the cost is above the budget of now; 0 where there is none."""
        return np.where(self.bound, cost_ - np.where(self.bound, self.goal, 0.0), 0.0)

    def _push(self, value: Array) -> Array:
        """Price of each resource: its dual, and the proportional part."""
        part = self.rules.z_push * np.maximum(1.0, self.z) * self._over(value)
        return np.where(self.bound, np.maximum(0.0, self.z + part), 0.0)

    def _move(self, share: float, steps: int, value: Array, slope_w: Array, slope_g: Array, rises: Array) -> None:
        """Each decision moves by (saving - loss) / (saving + |loss|) of the largest step: the same for any scale of the loss."""
        push = self._push(value)
        prices = self.prices / self.weight
        slopes = rises * self.sizes
        loss = np.concatenate([prices[: len(self.widths)] + self.y * slopes, prices[len(self.widths) :]])
        saving = np.concatenate([-(push @ slope_w), push @ slope_g])
        scale = np.concatenate([np.abs(slope_w).max(0), np.abs(slope_g).max(0)])
        drive = (saving - loss) / (saving + np.abs(loss) + 0.02 * scale + 1e-12)
        calm = 1.0 if share < 0.8 else max(0.2, 1 - 4 * (share - 0.8))
        step_w, step_g = drive[: len(self.widths)], drive[len(self.widths) :]
        most, most_g = (calm * min(0.1, whole / steps) for whole in (self.rules.count_step, self.rules.gate_step))
        self.removed = np.clip(self.removed + most * step_w, 0.0, self.tops)
        self.logits = np.clip(self.logits - 2 * GATE_LIMIT * most_g * step_g, -GATE_LIMIT, GATE_LIMIT)

    def _move_as_published(self, value: Array, slope_w: Array, slope_g: Array, loss_gates: Array, rises: Array) -> None:
        """Steps in units, infinity norm at most 1; gates by SGD on the plain mean of several steps' gradients."""
        push, rules = self._push(value), self.rules
        gradient = self.y * rises + (push @ slope_w) / self.sizes
        for chosen in ([w.part == "v" for w in self.widths], [w.part != "v" for w in self.widths]):
            if any(chosen):
                gradient[chosen] /= max(1.0, float(np.abs(gradient[chosen]).max()))
        self.removed = np.clip(self.removed - rules.count_step * gradient / self.sizes, 0.0, self.tops)
        self.gathered += loss_gates + rules.gate_weight * (push @ slope_g)
        self.count += 1
        if self.count >= rules.gate_every:
            mean = self.gathered / self.count + 1e-4 * self.logits
            self.velocity = 0.9 * self.velocity + mean
            self.logits = self.logits - rules.gate_step * self.velocity
            self.gathered, self.count = np.zeros_like(self.gathered), 0.0

    def state(self) -> dict[str, Any]:
        """All of it."""
        arrays = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in self.STATE}
        return {**arrays, "count": self.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        for name in self.STATE:
            setattr(self, name, state[name].double().numpy().copy())
        self.count = state["count"]

    def agree(self) -> None:
        """Take the decisions of rank 0, where several processes search."""
        held = [self.state()]
        torch.distributed.broadcast_object_list(held, 0)
        self.restore(held[0])
