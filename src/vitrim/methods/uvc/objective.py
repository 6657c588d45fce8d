"""UVC as an objective of the one training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrim import search, surgery
from vitrim.allocation import Ints
from vitrim.budget import Constraints
from vitrim.checkpoints import same_run
from vitrim.codec import plain
from vitrim.counting import ADDITIVE, FLOAT_BYTES, Cost
from vitrim.freezing import HALVES
from vitrim.methods.uvc.config import UvcConfig
from vitrim.methods.uvc.controller import Array, Controller, prox
from vitrim.methods.uvc.decisions import Decisions, finalise
from vitrim.model import Masks, Vit
from vitrim.search import MaskedModel, Place, Settled, Slot
from vitrim.space import Choice
from vitrim.surgery import Keep
from vitrim.training import Batch, Objective, Step, schedule

WHOLE_FROM = 0.6
"""Share of the search from which `clean` counts the cost of whole levels: a part of a head is scaled, not saved."""
GUMBEL_TAU = 0.5
"""Temperature of the gate samples (paper and code)."""


class Search:
    """UVC as an objective of the one loop: weights by its optimiser, decisions by a `Controller`.

    The loop averages the gradient of `leaf` (masks, then gate logits) over the processes; it has no part in the weights'
    optimiser, its clipping or its decay. layout: the final decision, once it has been taken.
    """

    def __init__(self, decisions: Decisions, inner: Objective, config: UvcConfig, limits: Mapping[str, int]) -> None:
        """inner: the loss of a plain forward pass."""
        self.decisions, self.inner, self.config, self.limits = decisions, inner, config, dict(limits)
        self.rules = config.rules
        self.slots = search.lay_out(decisions)
        self.masks = self.slots[-1].stop if self.slots else 0
        self.leaf = torch.ones(self.masks + len(decisions.gates))
        targets = _targets(limits, decisions.space.reference)
        self.controller = Controller(decisions.widths, len(decisions.gates), targets, self.rules)
        self.slopes: Array = np.zeros(len(self.leaf))
        self.final: Array | None = None  # masks and gates of the layout, 0 and 1
        self.shown: Array = self.controller.logits  # the gates' logits of the step
        self.layout: Settled | None = None
        self.rounded: dict[str, int] = {}
        self.trace: list[list[float]] = []
        self.norms: dict[Place, Array] = {}
        self.model: Vit

    # --------------------------------------------------------------------------------------------------- what the loop calls

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        assert isinstance(model, Vit)
        self.model = model
        surgery.hold(model, self.decisions.space.fixed)
        first = next(model.parameters())
        self.leaf = torch.ones(len(self.leaf), device=first.device, dtype=first.dtype, requires_grad=True)
        self.norms = search.squared_norms(self.model, self.slots)
        decisions = {"params": [self.leaf], "lr": 0.0, "schedule": "constant", "weight_decay": 0.0}
        return [*self.inner.param_groups(model), decisions]

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        if step.micro == 0:
            self._refresh(step)
        masked: Any = MaskedModel(model, self.soft(step, len(batch.images)))
        return self.inner.loss(masked, batch, step)

    def after_backward(self, step: Step) -> None:
        """Take the leaf's gradient away, so that neither clipping nor the optimiser meets it."""
        grad = self.leaf.grad  # none where the forward pass has no soft tensors
        self.slopes = np.zeros(len(self.leaf)) if grad is None else grad.double().cpu().numpy()
        self.leaf.grad = None

    def after_step(self, step: Step) -> None:
        first, stop = self._search_span(step.total)
        if self.layout is None:
            self._shrink(step)  # by the decisions that this step was taken with
            self.norms = search.squared_norms(self.model, self.slots)
            whole = np.isfinite(self.slopes).all()  # fp16 skips steps that overflowed; so do decisions
            if whole and first <= step.index < stop:
                self._decide(self.slopes, step, first, stop)
            if step.index + 1 >= stop:
                self._settle()

    def phase(self, step: Step) -> str:
        first, stop = self._search_span(step.total)
        return "warm-up" if step.index < first else "search" if step.index < stop else "settle"

    def state_dict(self) -> dict[str, Any]:
        state = {
            "controller": self.controller.state(),
            "trace": self.trace,
            "rounded": self.rounded,
            "config": _identity(self.config),
            "settled": self.final is not None,
            "inner": self.inner.state_dict(),
        }
        if self.final is not None:
            assert self.layout is not None
            state["final"] = torch.tensor(self.final)
            state["before"] = rows_of(self.layout.before, self.layout.before)
            state["shapes"] = rows_of(self.layout.sizes, self.layout.choices)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        same_run(Path("checkpoints"), state["config"], _identity(self.config))
        self.controller.restore(state["controller"])
        self.trace, self.rounded = [list(row) for row in state["trace"]], dict(state["rounded"])
        self.inner.load_state_dict(state["inner"])
        self.norms = search.squared_norms(self.model, self.slots)
        if state["settled"]:
            self.final = state["final"].double().numpy().copy()
            whole = self.decisions.space.whole
            (sizes, choices), (_, before) = (_read_rows(state[name], whole) for name in ("shapes", "before"))
            self.layout = Settled(sizes=sizes, choices=choices, before=before)

    def metrics(self) -> dict[str, float]:
        """The loss's parts, and everything that the search decides: flat names, one number each."""
        c = self.controller
        found = dict(self.inner.metrics())
        for k, name in enumerate(ADDITIVE):
            found[f"cost/{name}"] = float(c.cost[k])
            if c.bound[k]:
                found[f"budget/{name}"] = float(c.goal[k])
                found[f"z/{name}"] = float(c.z[k])
        for w, width in enumerate(self.decisions.widths):
            name = f"{width.part}/{width.block}" + ("" if width.head is None else f"/{width.head}")
            found[f"removed/{name}"] = float(c.removed[w])
            found[f"y/{name}"] = float(c.y[w])
        for g, halves in enumerate(self.decisions.gates):
            logit = float(self.shown[g])  # as the step had it
            i, half = halves[0]
            name = str(i) if len(halves) == 2 else f"{i}/{half}"
            found[f"gate/{name}"] = 1 / (1 + math.exp(-logit)) if self.final is None else float(logit > 0)
        return found

    # ------------------------------------------------------------------------------------------------------------- the parts

    def _search_span(self, total: int) -> tuple[int, int]:
        """The first step whose end moves decisions, and the one that is the first under the final masks."""
        first = min(total - 1, round(self.rules.warmup * total))
        return first, max(first + 1, total - round(self.rules.settle * total))

    def _share(self, step: Step) -> float:
        first, stop = self._search_span(step.total)
        return max(0.0, (step.index - first) / (stop - first))

    def _decide(self, slopes: Array, step: Step, first: int, stop: int) -> None:
        controller, share, ranks = self.controller, self._share(step), self._head_ranks()
        counts: Any = "ceil" if self.rules.ceil else "levels" if share >= WHOLE_FROM else "continuous"
        controller.advance(
            share,
            stop - first,
            self._count_slopes(slopes),
            slopes[self.masks :],
            self._energies(),
            lambda removed, logits: self.decisions.shares(removed, logits, counts=counts, ranks=ranks),
        )
        if step.world > 1:
            controller.agree()
        every = max(1, (stop - first) // 200)
        if (step.index - first) % every == 0 or step.index + 1 == stop:
            k = self._binding()
            self.trace.append([step.index, float(controller.cost[k]), float(controller.goal[k])])

    def _head_ranks(self) -> dict[int, Ints]:
        """Of each block's heads, their places in the order in which they go; only where heads count their own dims."""
        if not self.decisions.per_head:
            return {}
        return {slot.block: search.ranks(self.scores(slot)) for slot in self.slots if slot.part == "heads"}

    def _binding(self) -> int:
        """The limited resource that is furthest above its goal, or least below it."""
        c = self.controller
        return max((k for k in (0, 1) if c.bound[k]), key=lambda k: float(c.cost[k] - c.goal[k]))

    @torch.no_grad()
    def _refresh(self, step: Step) -> None:
        """The leaf's values for this step: a function of the decisions alone."""
        values = self.final
        if values is None:
            soft = self._soft_masks() if self.rules.masked else np.ones(self.masks)
            values = np.concatenate([soft, self.controller.effective(self._share(step))])
        self.shown = values[self.masks :]
        self.leaf.copy_(torch.tensor(values))

    def soft(self, step: Step, images: int) -> Masks:
        """What the forward pass multiplies with. Draws the gates' noise from the global generator."""
        leaf = self.leaf if self.final is None else self.leaf.detach()
        logits, first = leaf[self.masks :], self._search_span(step.total)[0]
        scales: list[Tensor | None]
        if self.final is None:
            # binary concrete: the two-way Gumbel softmax of the paper; a draw for each image, or one for all as published
            draws = torch.rand(images if self.rules.masked else 1, len(logits), dtype=torch.float64)
            noise = torch.logit(draws.clamp(1e-9, 1 - 1e-9)).to(logits)
            scales = list(torch.sigmoid((logits + noise) / GUMBEL_TAU).unbind(1))  # B each
        else:
            ends = zip(self.final[self.masks :], logits, strict=True)
            scales = [None if final > 0 else logit for final, logit in ends]
        if step.index < first:
            scales = [None] * len(scales)
        masks = leaf[: self.masks] if self.rules.masked or self.final is not None else None
        return search.masks_of(self.decisions.space.base, self.slots, masks, self.decisions.gates, scales)

    # ----------------------------------------------------------------------------------------------------- orders, energies

    def scores(self, slot: Slot) -> Array:
        """What units are ordered by, in the slot's shape: the lowest go first."""
        return self.norms[slot.place]

    def _widths(self, slot: Slot) -> list[int]:
        """The widths that count the slot's units; queries and keys follow the values."""
        return self.decisions.index[(slot.block, "v" if slot.part == "qk" else slot.part)]

    def _removed(self, slot: Slot) -> Array:
        """Units of the slot that go, for each head or once: [1], or [H, 1]."""
        shares = np.minimum(self.controller.removed[self._widths(slot)], 1 - 1 / slot.size)
        return shares[:, None] * slot.size if len(shares) > 1 else shares * slot.size

    def _soft_masks(self) -> Array:
        """Masks of all slots, flat."""
        found = [search.soft_masks(self.scores(slot), self._removed(slot)).reshape(-1) for slot in self.slots]
        return np.concatenate([np.zeros(0), *found])

    def _count_slopes(self, slopes: Array) -> Array:
        """Slope of the loss in each share removed, from the gradients of the masks on the ramps."""
        found = np.zeros(len(self.decisions.widths))
        if not self.rules.masked:
            return found
        for slot in self.slots:
            where = self._widths(slot)
            rows = search.share_slopes(self.scores(slot), self._removed(slot), slopes[slot.start : slot.stop])
            np.add.at(found, where if len(where) > 1 else where * len(rows), rows)
        return found

    def _energies(self) -> list[Array]:
        """For each width, the norms of its groups in the order in which they go; shares of their sum in `clean`."""
        found: list[Array] = []
        for slot in (slot for slot in self.slots if slot.part != "qk"):  # in the order of the widths
            rows = np.sort(self.scores(slot), axis=-1).reshape(-1, slot.size)
            found += list(rows if len(self._widths(slot)) > 1 else rows.sum(0, keepdims=True))
        return [row / max(1e-30, row.sum()) if self.rules.masked else row for row in found]

    @torch.no_grad()
    def _shrink(self, step: Step) -> None:
        """The proximal step on the weights of removed groups; dims first, then whole heads."""
        controller, config = self.controller, self.config
        if not controller.removed.any():
            return
        if self.rules.masked:
            strength = self.rules.prox / step.total
        else:
            low = min(1e-5, config.lr)
            strength = low + (config.lr - low) * schedule(step.index, step.total, config.training.warmup)
        for slot in (slot for slot in self.slots if slot.part != "qk"):
            where, places, gone = self._widths(slot), search.ranks(self.scores(slot)), self._removed(slot)
            lost = places < np.ceil(gone - 1e-9) if self.rules.ceil else places + 0.5 < gone
            if not lost.any():
                continue
            y = controller.y[where]
            y = y[:, None] if len(where) > 1 else y
            factor = np.where(lost, prox(np.ones(lost.shape), strength * y), 1.0)
            block = self.model.blocks[slot.block]
            linear = block.mlp.reader if slot.part == "hidden" else block.attention.out
            if slot.part == "heads":
                factor = np.repeat(factor, block.attention.spec.v_dim)
            linear.weight.mul_(torch.tensor(factor.reshape(1, -1)).to(linear.weight))

    # ------------------------------------------------------------------------------------------------------------ the end

    def _settle(self) -> None:
        """Take the final decision; from here on the masks are its own."""
        decisions, c, ranks = self.decisions, self.controller, self._head_ranks()
        losses = search.loss_curves(self.norms, decisions.tied)
        self.layout = finalise(decisions, self.limits, c.removed, c.logits, losses, ranks)
        self.rounded = decisions.space.total(self.layout.before)
        gates = [float(getattr(self.layout.choices[halves[0][0]], halves[0][1])) for halves in decisions.gates]
        self.final = np.concatenate([search.hard_masks(self.slots, self.norms, self.layout.sizes), gates])

    def keeps(self) -> list[Keep | None]:
        """What stays of each block; the cut by it equals the masks of the settled search."""
        assert self.layout is not None
        assert self.final is not None
        return search.keeps_of(self.decisions.space.base, self.slots, self.final[: self.masks], self.layout.choices)


SIZES = ("heads", "qk", "v", "hidden")


def rows_of(sizes: Sequence[Choice], choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Sizes of every block as JSON has them, 1 of what is not there; attention, mlp: whether they are."""
    return [
        {"attention": now.attention, "mlp": now.mlp, **{part: max(1, getattr(size, part)) for part in SIZES}}
        for size, now in zip(sizes, choices, strict=True)
    ]


def _read_rows(
    rows: Sequence[Mapping[str, Any]], whole: Sequence[Choice]
) -> tuple[tuple[Choice, ...], tuple[Choice, ...]]:
    """The inverse: sizes, choices."""
    sizes, choices = [], []
    for row, size in zip(rows, whole, strict=True):
        now = size._replace(**{part: row[part] for part in SIZES if getattr(size, part)})
        sizes.append(now)
        for half in HALVES:
            now = now if row[half] else now.without(half)
        choices.append(now)
    return tuple(sizes), tuple(choices)


def _identity(config: UvcConfig) -> dict[str, Any]:
    """What must agree for a search to be resumed, beyond what the loop checks itself."""
    names = ("budget", "preset", "gates", "widths", "distill", "tie_qk", "count_per_head", "warmup", "settle", "ramp")
    values = plain(config)
    return {name: values[name] for name in (*names, "cold", "alpha", "tau", "align", "freeze")}


def _targets(limits: Mapping[str, int], reference: Cost) -> tuple[float, float]:
    """Shares of MACs and parameters to aim at. Bytes become parameters; memory, beside the reference's activations."""
    constraints = Constraints.of(limits)
    macs, params = (constraints.additive.get(name, math.inf) for name in ADDITIVE)
    if constraints.memory_bytes is not None:
        left = constraints.memory_bytes - reference.activation_bytes
        share = constraints.memory_bytes / reference.memory_bytes
        params = min(params, max(left / FLOAT_BYTES, 0.5 * share * reference.params))
    return macs / reference.macs, params / reference.params
