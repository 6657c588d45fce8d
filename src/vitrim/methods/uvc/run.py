"""UVC: heads, dims in a head, MLP units and whole blocks chosen together under one budget while the weights learn.

Source   Yu et al., ICLR 2022, arXiv:2203.08243: primal-dual search over counts s, r and block gates with duals y, p, z
         (Algorithm 1), distilled from the uncompressed model; details that the paper leaves open from the authors' code.
Takes    a ViT, a budget on MACs or parameters or both, labelled images (an encoder: any images), and training steps.
Gives    an ordinary smaller ViT, exactly cut, whose weights were trained for a while in that form; recovery comes after.
Departs  The released code prunes almost by skipping alone, lets its budget dual wind up and never meets its budget. Here
         counts are shares of their range; each decision moves by what it saves at the budget's price z against what it
         costs: the measured slope of the loss under soft masks, plus y times the paper's norm penalty. The budget falls
         along a ramp, z has a ceiling and a proportional part, gates enter the cost without noise and are drawn for each
         image. The exact cost of the materialised network is differentiated. A finaliser meets the budget before the last
         part of the run, which trains under the final masks. `preset="paper"` has the released command's values and its
         rule of motion (no masks in the forward pass), without the faults of that code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vitrim import counting, surgery
from vitrim import data as rooms
from vitrim.budget import Budget, exceeded
from vitrim.codec import plain
from vitrim.counting import Cost, cost
from vitrim.data import Images
from vitrim.errors import BudgetError, ConfigError, DataError, TrainingError
from vitrim.freezing import HALVES, frozen
from vitrim.methods.uvc.config import PRESETS, Rules, UvcConfig
from vitrim.model import Masks, Vit
from vitrim.progress import Progress
from vitrim.result import Compressed
from vitrim.spec import AttentionSpec, BlockSpec, ModelSpec, spec_hash, token_walk
from vitrim.surgery import Keep
from vitrim.tasks.classification import class_index
from vitrim.training import Batch, Objective, Step, fit, ready, schedule
from vitrim.training.objectives import Distilled, LabelFree, Supervised

Array = np.ndarray[Any, np.dtype[np.float64]]
Half = tuple[int, str]
"""(block, "attention" | "mlp")."""

GATE_START = 2.0
"""Keep minus skip at the start: a block is kept with probability 0.881, as the paper's logits (-1, +1) have it."""
GATE_LIMIT = 4.0
"""Gate logits stay within it either way."""
WHOLE_FROM = 0.6
"""Share of the search from which `clean` counts the cost of whole levels: a part of a head is scaled, not saved."""
GUMBEL_TAU = 0.5
"""Temperature of the gate samples (paper and code)."""


# ------------------------------------------------------------------------------------------------------ what may be removed


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Counts of one block as it will be; attention, mlp: whether they are there."""

    attention: bool
    mlp: bool
    heads: int = 1
    qk: int = 1
    v: int = 1
    hidden: int = 1


class Space:
    """What the search decides on a spec (LayerScale folded), and what each decision costs. No torch until `shares`.

    widths: the counts. gates: for each switch, the halves that it closes. reference: what shares refer to.
    """

    def __init__(self, spec: ModelSpec, config: UvcConfig, fixed: Collection[Half], reference: Cost) -> None:
        self.spec, self.reference, self.tie = spec, reference, config.tie_qk
        self.per_head, self.align = config.per_head, config.align
        self.walk = token_walk(spec)
        self.widths: list[Width] = []
        self.gates: list[tuple[Half, ...]] = []
        self.free: set[Half] = set()
        for i, block in enumerate(spec.blocks):
            halves = [(i, half) for half in ("attention", "mlp") if getattr(block, half) is not None]
            loose = [half for half in halves if half not in fixed]
            if config.widths:
                self.free |= set(loose)
                self._offer(i, block, config.per_head)
            if config.gates == "halves":
                self.gates += [(half,) for half in loose]
            elif config.gates == "block" and halves and loose == halves:
                self.gates.append(tuple(halves))
        self.gate_of = {half: g for g, halves in enumerate(self.gates) for half in halves}
        self.index: dict[tuple[int, str], list[int]] = {}
        for w, width in enumerate(self.widths):
            self.index.setdefault((width.block, width.part), []).append(w)
        whole = cost(spec)
        self.constant = {
            "macs": whole.macs - sum(b.attention_macs + b.mlp_macs for b in whole.blocks),
            "params": whole.params - sum(b.attention_params + b.mlp_params for b in whole.blocks),
        }

    def _offer(self, i: int, block: BlockSpec, per_head: bool) -> None:
        if (a := block.attention) is not None and (i, "attention") in self.free:
            if a.heads > 1:
                self.widths.append(Width(i, "heads", a.heads))
            if a.v_dim > 1:
                heads: Sequence[int | None] = range(a.heads) if per_head else (None,)
                self.widths += [Width(i, "v", a.v_dim, h) for h in heads]
        if (m := block.mlp) is not None and (i, "mlp") in self.free and m.hidden > 1:
            self.widths.append(Width(i, "hidden", m.hidden))

    def surviving(self, i: int, removed: Array, ranks: Mapping[int, Array] | None) -> list[int]:
        """The widths of block `i` that count the dims of heads which stay. ranks: of its heads, in the order in which they go."""
        where, heads = self.index[(i, "v")], self.index.get((i, "heads"))
        if not ranks or heads is None:
            return where
        gone = math.floor(float(removed[heads[0]]) * len(where) + 1e-9)
        return [w for w, rank in zip(where, ranks[i], strict=True) if rank >= gone]

    def tied(self, a: AttentionSpec) -> bool:
        """Whether this attention's queries and keys lose dims with its values."""
        return self.tie and a.qk_norm == "none" and a.qk_dim > 1

    def always(self) -> bool:
        """Whether some half stays whatever the gates do."""
        return any(
            (i, half) not in self.gate_of
            for i, block in enumerate(self.spec.blocks)
            for half in ("attention", "mlp")
            if getattr(block, half) is not None
        )

    def attention_cost(self, i: int, heads: Any, qk: Any, v: Any) -> tuple[Any, Any]:
        """MACs and parameters of an attention half with these counts, numbers or tensors: `counting`'s formulas."""
        a, at, width = self.spec.blocks[i].attention, self.walk[i], self.spec.width
        assert a is not None
        macs = counting.attention_macs(heads, qk, v, tokens=at.keys.count, width=width, queries=at.queries.count)
        changed: Any = {"heads": heads, "qk_dim": qk, "v_dim": v}
        return macs + 2 * width * a.gate, counting.attention_params(replace(a, **changed), width)

    def mlp_cost(self, i: int, hidden: Any) -> tuple[Any, Any]:
        """MACs and parameters of an MLP half with so many units."""
        m, width = self.spec.blocks[i].mlp, self.spec.width
        assert m is not None
        tokens = self.walk[i].mlp.count
        macs = counting.mlp_macs(
            hidden, tokens=tokens, width=width, kind=m.kind, fc1_rank=m.fc1_rank, fc2_rank=m.fc2_rank
        )
        return macs + 2 * width * m.gate, counting.mlp_params(replace(m, hidden=hidden), width)

    def half_cost(self, half: Half, shape: Shape) -> dict[str, int]:
        """Exact cost of a half in a shape; zero where it is closed."""
        i, name = half
        if (self.spec.blocks[i].attention is None and name == "attention") or not getattr(shape, name):
            return {"macs": 0, "params": 0}
        found = (
            self.attention_cost(i, shape.heads, shape.qk, shape.v)
            if name == "attention"
            else self.mlp_cost(i, shape.hidden)
        )
        return {"macs": found[0], "params": found[1]}

    def total(self, shapes: Sequence[Shape]) -> dict[str, int]:
        """Exact MACs and parameters of the network with these shapes."""
        found = dict(self.constant)
        for i, shape in enumerate(shapes):
            for name in ("attention", "mlp"):
                if getattr(self.spec.blocks[i], name) is not None:
                    for key, value in self.half_cost((i, name), shape).items():
                        found[key] += value
        return found

    def shares(
        self,
        removed: Array,
        logits: Array,
        *,
        counts: Literal["continuous", "ceil", "levels"] = "continuous",
        ranks: Mapping[int, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        """MACs and parameters as shares of the reference, with their slopes.

        removed: share of each width, [W]; logits: of the gates, [G], kept with probability sigmoid(logit).
        -> [2], [2, W], [2, G].  counts: `ceil` rounds what is removed up, `levels` takes the nearest that the finaliser
        may choose; slopes are as if neither did.
        """
        x = torch.tensor(removed, dtype=torch.float64, requires_grad=True)
        d = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        gone, keep = x.unbind(), torch.sigmoid(d).unbind()
        totals: list[Any] = [self.constant["macs"], self.constant["params"]]

        def kept(i: int, part: str, size: int) -> Any:
            """Units left of `size`; dims counted by head are padded to the head that keeps most."""
            where = self.index.get((i, part))
            if where is None:
                return size
            alive = self.surviving(i, removed, ranks) if len(where) > 1 else where
            share = gone[alive[0]] if len(alive) == 1 else torch.stack([gone[w] for w in alive]).amin()
            count = size * (1 - share)
            now = float(count.detach())
            if counts == "continuous":
                return count
            whole = math.floor(now + 1e-9) if counts == "ceil" else _nearest(self.levels(i, part, self.align), now)
            return count + (whole - count).detach()

        for i, block in enumerate(self.spec.blocks):
            if (a := block.attention) is not None:
                v: Any = kept(i, "v", a.v_dim)
                qk: Any = v * a.qk_dim / a.v_dim if self.tied(a) else a.qk_dim
                found = self.attention_cost(i, kept(i, "heads", a.heads), qk, v)
                self._add(totals, found, self.gate_of.get((i, "attention")), keep)
            if (m := block.mlp) is not None:
                found = self.mlp_cost(i, kept(i, "hidden", m.hidden))
                self._add(totals, found, self.gate_of.get((i, "mlp")), keep)
        whole = (self.reference.macs, self.reference.params)
        values, slopes_w, slopes_g = np.zeros(2), np.zeros((2, len(removed))), np.zeros((2, len(logits)))
        for k in range(2):
            share = torch.as_tensor(totals[k], dtype=torch.float64) / whole[k]
            values[k] = float(share.detach())
            if share.requires_grad:
                first, second = torch.autograd.grad(share, (x, d), retain_graph=k == 0, allow_unused=True)
                slopes_w[k] = 0 if first is None else first.numpy()
                slopes_g[k] = 0 if second is None else second.numpy()
        return values, slopes_w, slopes_g

    @staticmethod
    def _add(totals: list[Any], found: tuple[Any, Any], gate: int | None, keep: Sequence[Tensor]) -> None:
        for k in range(2):
            totals[k] = totals[k] + (found[k] if gate is None else keep[gate] * found[k])

    # --------------------------------------------------------------------------------------------------- whole numbers

    def dense(self) -> list[Shape]:
        """Every block as it is."""
        return [_shape(block) for block in self.spec.blocks]

    def levels(self, i: int, part: str, align: int) -> list[int]:
        """Counts that a part may have: multiples of align where it has room for two of them, and its own size."""
        full = getattr(_shape(self.spec.blocks[i]), part)
        if (i, part) not in self.index:
            return [full]
        unit = 1 if part == "heads" or full < 2 * align else align
        return [*range(unit, full, unit), full]

    def at(self, shape: Shape, i: int, part: str, count: int) -> Shape:
        """The shape with another count; queries and keys follow the values where they are tied."""
        changes: dict[str, Any] = {part: count}
        a = self.spec.blocks[i].attention
        if part == "v" and a is not None and self.tied(a):
            changes["qk"] = max(1, round(a.qk_dim * count / a.v_dim))
        return replace(shape, **changes)

    def least(self, align: int = 1) -> list[Shape]:
        """Every width at its lowest level, all gates open."""
        shapes = self.dense()
        for i, part in self.index:
            shapes[i] = self.at(shapes[i], i, part, self.levels(i, part, align)[0])
        return shapes

    def with_gates(self, shapes: Sequence[Shape], is_open: Sequence[bool]) -> list[Shape]:
        """The shapes with the gates set."""
        found = list(shapes)
        for g, halves in enumerate(self.gates):
            for i, name in halves:
                changed: Any = {name: is_open[g]}
                found[i] = replace(found[i], **changed)
        return found

    def cheapest(self, shapes: Sequence[Shape], resource: str = "macs") -> list[bool]:
        """Gates that leave the cheapest network which still computes something."""
        if not self.gates or self.always():
            return [False] * len(self.gates)
        prices = [sum(self.half_cost(h, shapes[h[0]])[resource] for h in halves) for halves in self.gates]
        return [g == int(np.argmin(prices)) for g in range(len(prices))]

    def spec_with(self, shapes: Sequence[Shape]) -> ModelSpec:
        """The materialised network's spec."""
        blocks = []
        for block, shape in zip(self.spec.blocks, shapes, strict=True):
            a, m = block.attention, block.mlp
            if a is not None:
                a = replace(a, heads=shape.heads, qk_dim=shape.qk, v_dim=shape.v) if shape.attention else None
            if m is not None:
                m = replace(m, hidden=shape.hidden) if shape.mlp else None
            blocks.append(replace(block, attention=a, mlp=m))
        return replace(self.spec, blocks=tuple(blocks))


def _nearest(levels: Sequence[int], count: float) -> int:
    return min(levels, key=lambda level: (abs(level - count), level))


def _shape(block: BlockSpec) -> Shape:
    a, m = block.attention, block.mlp
    return Shape(
        attention=a is not None,
        mlp=m is not None,
        heads=1 if a is None else a.heads,
        qk=1 if a is None else a.qk_dim,
        v=1 if a is None else a.v_dim,
        hidden=1 if m is None else m.hidden,
    )


def space_of(spec: ModelSpec, config: UvcConfig) -> Space:
    """The decisions on a spec as it was passed in; budgets' shares refer to it."""
    fixed = frozen(spec, config.freeze)
    return Space(surgery.with_folded(spec, skip=fixed), config, fixed, cost(spec))


ANY = Budget(keep_macs=1.0)


def floor(spec: ModelSpec, config: UvcConfig | None = None) -> Cost:
    """The cheapest network within reach: every width at one unit, every gate closed but the cheapest."""
    config = config or UvcConfig(budget=ANY)
    space = space_of(spec, config)
    limits = config.bounds.limits(space.reference)
    resource = "macs" if "macs" in limits else "params"
    least = space.least()
    return cost(space.spec_with(space.with_gates(least, space.cheapest(least, resource))))


def step(spec: ModelSpec, config: UvcConfig | None = None) -> dict[str, int]:
    """How far below a budget the result may end, by resource: one unit of a width, or a block at its narrowest (law 7)."""
    config = config or UvcConfig(budget=ANY)
    space = space_of(spec, config)
    least, full = space.least(), space.dense()
    found = {"macs": 0, "params": 0}
    for halves in space.gates:
        for key in found:
            found[key] = max(found[key], sum(space.half_cost(half, least[half[0]])[key] for half in halves))
    for i, part in space.index:
        half = (i, "mlp" if part == "hidden" else "attention")
        count = getattr(full[i], part)
        below = space.at(full[i], i, part, count - 1)
        for key in found:
            found[key] = max(found[key], space.half_cost(half, full[i])[key] - space.half_cost(half, below)[key])
    peak = space.reference.activation_bytes - floor(spec, config).activation_bytes
    in_bytes = counting.FLOAT_BYTES * found["params"]
    return {**found, "memory_bytes": in_bytes + peak, "file_bytes": in_bytes}


def plan(spec: ModelSpec, config: UvcConfig | None = None) -> dict[str, Any]:
    """What can be said from the spec alone: the range of each resource, the step, the needs, what stays as it is.

    Raises BudgetError when the config's budget is out of reach.
    """
    chosen = config or UvcConfig(budget=ANY)
    space = space_of(spec, chosen)
    least = floor(spec, chosen)
    if config is not None:
        config.bounds.refuse_unreachable(floor=least, reference=space.reference, method="uvc")
    rules = chosen.rules
    labels = bool(spec.outputs) and not (chosen.distill and rules.alpha == 1)
    kept = {"classifier": "kept dense"} if spec.outputs else {}
    for i, half in sorted(frozen(spec, chosen.freeze)):
        kept[f"block {i} {half}"] = "frozen"
    for i, block in enumerate(spec.blocks):
        if (a := block.attention) is not None and (i, "attention") in space.free and not space.tied(a):
            why = f"{a.qk_norm} norm between queries and keys" if a.qk_norm != "none" else "tie_qk is off"
            kept[f"block {i} qk"] = why
    return {
        "method": "uvc",
        "variant": chosen.preset,
        "range": {
            name: [getattr(least, name), getattr(space.reference, name)]
            for name in ("macs", "params", "memory_bytes", "file_bytes")
        },
        "step": step(spec, chosen),
        "needs": {"images": rules.batch_size, "labels": labels, "training": True},
        "dense": kept,
    }


# ------------------------------------------------------------------------------------------------------------- primal, dual


def bottom(energies: Array, removed: float) -> tuple[float, float]:
    """The paper's bottom-s norm of ascending energies [n]: the sum of the ceil(s) smallest, and its slope in s.

    The slope is the next smallest entry, the price of one more group; the largest where none is left.
    """
    count = min(len(energies), math.ceil(removed - 1e-9))
    return float(energies[:count].sum()), float(energies[min(count, len(energies) - 1)])


def ramp_mask(ranks: Any, removed: float, size: int, width: float) -> Array:
    """Masks masks by rank (0 goes first): 0 below `removed`, 1 above, a straight ramp of `width` ranks between.

    At whole numbers with a width of 1 they are 0 and 1; with nothing removed all are exactly 1, and they sum to size - removed.
    """
    width = min(width, 2 * removed + 1, 2 * (size - removed) + 1)
    return np.clip((np.asarray(ranks) + 0.5 - removed) / width + 0.5, 0.0, 1.0)


def window(removed: float, size: int, width: float) -> Array:
    """Weights [size], by rank, of the units on the ramp: whose mask's gradients price the next bit of a count. Sum 1."""
    width = min(width, 2 * removed + 1, 2 * (size - removed) + 1)
    low, high, ranks = removed - width / 2, removed + width / 2, np.arange(size)
    overlap = np.clip(np.minimum(ranks + 1, high) - np.maximum(ranks, low), 0.0, None)
    return overlap / overlap.sum()


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
        penalties = [
            bottom(e, s * n) for e, s, n in zip(energies, self.removed.tolist(), self.sizes.tolist(), strict=True)
        ]
        if self.rules.masked:
            keep = 1 / (1 + np.exp(-self.effective(share)))
            # slopes in the probability itself can be averaged while logits move and cool
            doubt = np.maximum(0.01, keep * (1 - keep))
            fresh = np.concatenate([loss_widths, -loss_gates / doubt])
            spans = np.concatenate([np.full(len(loss_widths), 0.02), np.full(len(doubt), 0.1)])
            memory = np.maximum(5.0, spans * steps)
            self.prices += (fresh - self.prices) / memory
            self.weight += (1 - self.weight) / memory
            self._move(share, steps, value, slope_w, slope_g / doubt, penalties)
        else:
            self._move_as_published(value, slope_w, slope_g, loss_gates, penalties)
        self.cost = shares(self.removed, self.effective(share))[0]
        per_step = 1.0 / steps if self.rules.masked else 1.0
        self.y += self.rules.y_step * per_step * np.array([p[0] for p in penalties])
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

    def _move(
        self,
        share: float,
        steps: int,
        value: Array,
        slope_w: Array,
        slope_g: Array,
        penalties: Sequence[tuple[float, float]],
    ) -> None:
        """Each decision moves by (saving - loss) / (saving + |loss|) of the largest step: the same for any scale of the loss."""
        push = self._push(value)
        prices = self.prices / self.weight
        slopes = np.array([p[1] for p in penalties]) * self.sizes
        loss = np.concatenate([prices[: len(self.widths)] + self.y * slopes, prices[len(self.widths) :]])
        saving = np.concatenate([-(push @ slope_w), push @ slope_g])
        scale = np.concatenate([np.abs(slope_w).max(0), np.abs(slope_g).max(0)])
        drive = (saving - loss) / (saving + np.abs(loss) + 0.02 * scale + 1e-12)
        calm = 1.0 if share < 0.8 else max(0.2, 1 - 4 * (share - 0.8))
        step_w, step_g = drive[: len(self.widths)], drive[len(self.widths) :]
        most, most_g = (calm * min(0.1, whole / steps) for whole in (self.rules.count_step, self.rules.gate_step))
        self.removed = np.clip(self.removed + most * step_w, 0.0, self.tops)
        self.logits = np.clip(self.logits - 2 * GATE_LIMIT * most_g * step_g, -GATE_LIMIT, GATE_LIMIT)

    def _move_as_published(
        self,
        value: Array,
        slope_w: Array,
        slope_g: Array,
        loss_gates: Array,
        penalties: Sequence[tuple[float, float]],
    ) -> None:
        """Steps in units, infinity norm at most 1; gates by SGD on the plain mean of several steps' gradients."""
        push, rules = self._push(value), self.rules
        gradient = self.y * np.array([p[1] for p in penalties]) + (push @ slope_w) / self.sizes
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

    def agree(self, device: torch.device) -> None:
        """Take the decisions of rank 0, where several processes search."""
        arrays = [np.atleast_1d(getattr(self, name)) for name in self.STATE]
        kind = torch.float32 if device.type == "mps" else torch.float64
        flat = torch.tensor(np.concatenate([*arrays, [self.count]]), device=device, dtype=kind)
        torch.distributed.broadcast(flat, 0)
        values = flat.double().cpu().numpy()
        for name, part in zip(self.STATE, np.split(values[:-1], np.cumsum([a.size for a in arrays])[:-1]), strict=True):
            setattr(self, name, part.copy())
        self.count = float(values[-1])


# --------------------------------------------------------------------------------------------------------------- finaliser


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shapes of all blocks, gates included; before: the nearest to what the search left, whatever they cost."""

    shapes: list[Shape]
    before: list[Shape]


class _Finaliser:
    """From continuous decisions to whole numbers within the budget."""

    def __init__(
        self,
        space: Space,
        limits: Mapping[str, int],
        losses: Mapping[tuple[int, str], Array],
        logits: Array,
        ranks: Mapping[int, Array],
    ) -> None:
        """losses: for each part with a count, what losing its k weakest units costs, [size + 1], in a common unit.

        ranks: of heads, where they count their own dims.
        """
        self.space, self.limits, self.losses, self.logits, self.ranks = space, limits, losses, logits, ranks
        self.exact = any(name not in ("macs", "params") for name in limits)

    def run(self, removed: Array) -> Layout:
        space = self.space
        is_open = [bool(logit > 0) for logit in self.logits]
        if not any(is_open) and not space.always() and is_open:
            is_open[int(np.argmax(self.logits))] = True
        shapes = space.dense()
        left = {}
        for (i, part), where in space.index.items():
            alive = space.surviving(i, removed, self.ranks) if len(where) > 1 else where
            left[(i, part)] = space.widths[where[0]].size * (1 - float(removed[alive].min()))
        align = space.align
        cheapest = space.cheapest(space.least(align), "macs" if "macs" in self.limits else "params")
        while align > 1 and self.over(space.with_gates(space.least(align), cheapest)):
            align //= 2
        for i, part in space.index:
            levels = space.levels(i, part, align)
            shapes[i] = space.at(shapes[i], i, part, _nearest(levels, left[(i, part)]))
        before = space.with_gates(shapes, is_open)
        shapes, is_open = self._trim(shapes, is_open, align, cheapest)
        shapes = self._fill(shapes, is_open, align)
        while self._room(shapes, is_open):
            shapes = self._fill(shapes, is_open, 1)
            if not self._room(shapes, is_open) or not self._reopen(shapes, is_open, align):
                break
            shapes = self._fill(shapes, is_open, align)
        return Layout(shapes=space.with_gates(shapes, is_open), before=before)

    def over(self, shapes: Sequence[Shape]) -> list[str]:
        """Limited resources of which these shapes take too much."""
        if self.exact:
            return exceeded(cost(self.space.spec_with(shapes)), self.limits)
        total = self.space.total(shapes)
        return [name for name, limit in self.limits.items() if total[name] > limit]

    def _price(self, half: Half, shape: Shape, names: Collection[str]) -> float:
        found = self.space.half_cost(half, shape)
        keys = {"macs" if name == "macs" else "params" for name in names}
        return sum(found[key] / getattr(self.space.reference, key) for key in keys)

    def _moves(
        self, shapes: Sequence[Shape], is_open: Sequence[bool], align: int, names: Collection[str], *, up: bool
    ) -> list[tuple[float, int, str, int]]:
        """Single steps of a level: (loss for each share of cost, block, part, new count), cheapest to lose first."""
        found = []
        for i, part in self.space.index:
            half = (i, "mlp" if part == "hidden" else "attention")
            gate = self.space.gate_of.get(half)
            if gate is not None and not is_open[gate]:
                continue
            now, levels = getattr(shapes[i], part), self.space.levels(i, part, align)
            if up:
                count = next((level for level in levels if level > now), None)
            else:
                count = next((level for level in reversed(levels) if level < now), None)
            if count is None:
                continue
            curve = self.losses[(i, part)]
            size = len(curve) - 1
            loss = abs(float(curve[size - count] - curve[size - now]))
            price = abs(
                self._price(half, self.space.at(shapes[i], i, part, count), names) - self._price(half, shapes[i], names)
            )
            found.append((loss / max(price, 1e-12), i, part, count))
        return sorted(found)

    def _trim(
        self, shapes: list[Shape], is_open: list[bool], align: int, cheapest: list[bool]
    ) -> tuple[list[Shape], list[bool]]:
        while names := self.over(self.space.with_gates(shapes, is_open)):
            moves = self._moves(shapes, is_open, align, names, up=False)
            if moves:
                _, i, part, count = moves[0]
                shapes[i] = self.space.at(shapes[i], i, part, count)
                continue
            opened = [g for g, is_ in enumerate(is_open) if is_]
            if len(opened) > 1 or (opened and self.space.always()):
                is_open[min(opened, key=lambda g: float(self.logits[g]))] = False
            elif is_open != cheapest:
                is_open = list(cheapest)
            else:
                raise BudgetError("uvc: the cheapest network is above the budget; choose a larger one.")
        return shapes, is_open

    def _fill(self, shapes: list[Shape], is_open: Sequence[bool], align: int) -> list[Shape]:
        closed: set[tuple[int, str]] = set()
        while True:
            moves = [m for m in self._moves(shapes, is_open, align, self.limits, up=True) if (m[1], m[2]) not in closed]
            if not moves:
                return shapes
            _, i, part, count = moves[-1]
            trial = list(shapes)
            trial[i] = self.space.at(shapes[i], i, part, count)
            if self.over(self.space.with_gates(trial, is_open)):
                closed.add((i, part))  # budgets only fill up: what does not fit now never will
            else:
                shapes = trial

    def _room(self, shapes: Sequence[Shape], is_open: Sequence[bool]) -> bool:
        """Whether every limit has more than 1 % of the reference left."""
        now = cost(self.space.spec_with(self.space.with_gates(shapes, is_open)))
        return all(
            limit - getattr(now, name) > getattr(self.space.reference, name) / 100
            for name, limit in self.limits.items()
        )

    def _reopen(self, shapes: list[Shape], is_open: list[bool], align: int) -> bool:
        """Open the closed gate that was nearest to open, at its lowest levels, if it fits."""
        closed = sorted((g for g, is_ in enumerate(is_open) if not is_), key=lambda g: -float(self.logits[g]))
        for unit in (align, 1):
            for g in closed:
                trial = list(shapes)
                for i, name in self.space.gates[g]:
                    parts = ("hidden",) if name == "mlp" else ("heads", "v")
                    for part in parts:
                        if (i, part) in self.space.index:
                            trial[i] = self.space.at(trial[i], i, part, self.space.levels(i, part, unit)[0])
                opened = [is_ or other == g for other, is_ in enumerate(is_open)]
                if not self.over(self.space.with_gates(trial, opened)):
                    shapes[:], is_open[:] = trial, opened
                    return True
        return False


def finalise(
    space: Space,
    limits: Mapping[str, int],
    removed: Array,
    logits: Array,
    losses: Mapping[tuple[int, str], Array],
    ranks: Mapping[int, Array] | None = None,
) -> Layout:
    """Whole numbers within the limits, nearest to what the search decided.

    Gates by their sign, counts rounded and aligned; then the level with the least loss for its cost goes while a limit is
    exceeded, and the one with the most comes back while it fits; where 1 % stays free, single units, then closed gates.
    losses: by (block, part), what losing the k weakest units costs, [size + 1]. ranks: by block, places of the heads in the
    order in which they go, where each counts its own dims. Raises BudgetError out of reach.
    """
    return _Finaliser(space, limits, losses, logits, ranks or {}).run(removed)


# ------------------------------------------------------------------------------------------------------------ the objective


class Slot(NamedTuple):
    """Where the soft tensor of a part of a block stands in the flat vector of masks."""

    block: int
    part: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


class Softened:
    """The wrapped model's forward with soft tensors, for an objective that knows nothing of them."""

    def __init__(self, model: nn.Module, soft: Masks) -> None:
        self.model, self.soft = model, soft

    def __call__(self, images: Tensor, want: Sequence[str] | None = None) -> Any:
        return self.model(images, masks=self.soft, want=want)


class Search:
    """UVC as an objective of the one loop: weights by its optimiser, decisions by a `Controller`.

    The loop averages the gradient of `leaf` (masks, then gate logits) over the processes; it has no part in the weights'
    optimiser, its clipping or its decay. layout: the final decision, once it has been taken.
    """

    def __init__(
        self, space: Space, inner: Objective, config: UvcConfig, limits: Mapping[str, int], fixed: Collection[Half] = ()
    ) -> None:
        """inner: the loss of a plain forward pass. fixed: frozen halves, whose weights stay."""
        self.space, self.inner, self.config, self.limits, self.fixed = space, inner, config, dict(limits), fixed
        self.rules = config.rules
        self.slots, size = self._slots()
        self.masks = size
        self.leaf = torch.ones(size + len(space.gates))
        targets = _targets(limits, space.reference)
        self.controller = Controller(space.widths, len(space.gates), targets, self.rules)
        self.slopes: Array = np.zeros(len(self.leaf))
        self.final: Array | None = None  # masks and gates of the layout, 0 and 1
        self.shown: Array = self.controller.logits  # the gates' logits of the step
        self.layout: Layout | None = None
        self.rounded: dict[str, int] = {}
        self.trace: list[list[float]] = []
        self.norms: dict[tuple[int, str], Array] = {}
        self.model: Vit

    def _slots(self) -> tuple[list[Slot], int]:
        found: list[Slot] = []
        at = 0
        for i, part in self.space.index:
            a, m = self.space.spec.blocks[i].attention, self.space.spec.blocks[i].mlp
            shapes: list[tuple[str, tuple[int, ...]]] = []
            if part == "hidden":
                assert m is not None
                shapes = [("hidden", (m.hidden,))]
            else:
                assert a is not None
                shapes = [("heads", (a.heads,))] if part == "heads" else [("v", (a.heads, a.v_dim))]
                if part == "v" and self.space.tied(a):
                    shapes.append(("qk", (a.heads, a.qk_dim)))
            for name, shape in shapes:
                found.append(Slot(i, name, at, shape))
                at = found[-1].stop
        return found, at

    # --------------------------------------------------------------------------------------------------- what the loop calls

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        assert isinstance(model, Vit)
        self.model = model
        surgery.hold(model, self.fixed)
        first = next(model.parameters())
        self.leaf = torch.ones(len(self.leaf), device=first.device, dtype=first.dtype, requires_grad=True)
        self.norms = self._measure()
        decisions = {"params": [self.leaf], "lr": 0.0, "schedule": "constant", "weight_decay": 0.0}
        return [*self.inner.param_groups(model), decisions]

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        if step.micro == 0:
            self._refresh(step)
        softened: Any = Softened(model, self.soft(step, len(batch.images)))
        return self.inner.loss(softened, batch, step)

    def after_backward(self, step: Step) -> None:
        """Take the leaf's gradient away, so that neither clipping nor the optimiser meets it."""
        grad = self.leaf.grad  # none where the forward pass has no soft tensors
        self.slopes = np.zeros(len(self.leaf)) if grad is None else grad.double().cpu().numpy()
        self.leaf.grad = None

    def after_step(self, step: Step) -> None:
        first, stop = self._search_span(step.total)
        if self.layout is None:
            self._shrink(step)  # by the decisions that this step was taken with
            self.norms = self._measure()
            whole = np.isfinite(self.slopes).all()  # fp16 skips steps that overflowed; so do decisions
            if whole and first <= step.index < stop:
                self._decide(self.slopes, step, first, stop)
            if step.index + 1 >= stop:
                self._settle()

    def phase(self, step: Step) -> str:
        first, stop = self._search_span(step.total)
        return "warm-up" if step.index < first else "search" if step.index < stop else "settle"

    def state_dict(self) -> dict[str, Any]:
        inner = self.inner.state_dict()
        state = {
            "controller": self.controller.state(),
            "trace": self.trace,
            "rounded": self.rounded,
            "config": _identity(self.config),
            "settled": self.final is not None,
            "inner": inner,
        }
        if self.final is not None:
            assert self.layout is not None
            state["final"] = torch.tensor(self.final)
            state["before"] = [_numbers(shape) for shape in self.layout.before]
            state["shapes"] = [_numbers(shape) for shape in self.layout.shapes]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = _identity(self.config)
        for key, value in now.items():
            if state["config"].get(key) != value:
                raise TrainingError(
                    f"the search to be resumed had {key}={state['config'].get(key)!r}, this one {value!r}. "
                    "Resume with the same settings, or choose another folder."
                )
        self.controller.restore(state["controller"])
        self.trace, self.rounded = [list(row) for row in state["trace"]], dict(state["rounded"])
        self.inner.load_state_dict(state["inner"])
        self.norms = self._measure()
        if state["settled"]:
            self.final = state["final"].double().numpy().copy()
            shapes, before = ([Shape(**row) for row in state[name]] for name in ("shapes", "before"))
            self.layout = Layout(shapes=shapes, before=before)

    def metrics(self) -> dict[str, float]:
        """The loss's parts, and everything that the search decides: flat names, one number each."""
        c = self.controller
        found = dict(self.inner.metrics())
        for k, name in enumerate(("macs", "params")):
            found[f"cost/{name}"] = float(c.cost[k])
            if c.bound[k]:
                found[f"budget/{name}"] = float(c.goal[k])
                found[f"z/{name}"] = float(c.z[k])
        for w, width in enumerate(self.space.widths):
            name = f"{width.part}/{width.block}" + ("" if width.head is None else f"/{width.head}")
            found[f"removed/{name}"] = float(c.removed[w])
            found[f"y/{name}"] = float(c.y[w])
        for g, halves in enumerate(self.space.gates):
            found[f"gate/{_gate_name(halves)}"] = self._probability(g)
        return found

    def _probability(self, g: int) -> float:
        """That gate `g` is open, as the step had it."""
        logit = float(self.shown[g])
        return float(logit > 0) if self.final is not None else 1 / (1 + math.exp(-logit))

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
            lambda removed, logits: self.space.shares(removed, logits, counts=counts, ranks=ranks),
        )
        if step.world > 1:
            controller.agree(self.leaf.device)
        every = max(1, (stop - first) // 200)
        if (step.index - first) % every == 0 or step.index + 1 == stop:
            k = self._binding()
            self.trace.append([step.index, float(controller.cost[k]), float(controller.goal[k])])

    def _head_ranks(self) -> dict[int, Array]:
        """Of each block's heads, their places in the order in which they go; only where heads count their own dims."""
        if not self.space.per_head:
            return {}
        return {slot.block: _ranks(self.scores(slot)) for slot in self.slots if slot.part == "heads"}

    def _binding(self) -> int:
        """The limited resource that is furthest above its goal, or least below it."""
        c = self.controller
        return max((k for k in (0, 1) if c.bound[k]), key=lambda k: float(c.cost[k] - c.goal[k]))

    @torch.no_grad()
    def _refresh(self, step: Step) -> None:
        """The leaf's values for this step: a function of the decisions alone."""
        values = np.ones(len(self.leaf))
        if self.final is not None:
            values = self.final
        else:
            if self.rules.masked:
                values[: self.masks] = self._soft_masks()
            values[self.masks :] = self.controller.effective(self._share(step))
        self.shown = values[self.masks :]
        self.leaf.copy_(torch.tensor(values))

    def soft(self, step: Step, images: int) -> Masks:
        """What the forward pass multiplies with. Draws the gates' noise from the global generator."""
        count = len(self.space.spec.blocks)
        rows: dict[str, list[Tensor | None]] = {
            name: [None] * count for name in ("block", "attention", "mlp", "heads", "qk", "v", "hidden")
        }
        settled = self.final is not None
        leaf = self.leaf.detach() if settled else self.leaf
        if self.rules.masked or settled:
            device = leaf.device.type
            masks = leaf[: self.masks]
            if torch.is_autocast_enabled(device):
                masks = masks.to(torch.get_autocast_dtype(device))  # or the product would be taken in float32
            for slot in self.slots:
                rows[slot.part][slot.block] = masks[slot.start : slot.stop].view(slot.shape)
        logits = leaf[self.masks :]
        first, _ = self._search_span(step.total)
        if settled:
            is_open: Any = self.final[self.masks :] > 0 if self.final is not None else ()
            keep = logits
        else:
            is_open = [False] * len(logits)
            # binary concrete: the two-way Gumbel softmax of the paper; a draw for each image, or one for all as published
            draws = torch.rand(images if self.rules.masked else 1, len(logits), dtype=torch.float64)
            noise = torch.logit(draws.clamp(1e-9, 1 - 1e-9)).to(logits)
            keep = torch.sigmoid((logits + noise) / GUMBEL_TAU)  # B G
        for g, halves in enumerate(self.space.gates):
            if is_open[g] or step.index < first:
                continue
            scale = keep[g] if settled else keep[:, g]
            i = halves[0][0]
            if len(halves) == 2 and all(s.at == "end" for s in self.space.spec.blocks[i].steps):
                rows["block"][i] = scale
            else:
                for _, half in halves:
                    rows[half][i] = scale
        return Masks(**{name: tuple(values) for name, values in rows.items() if any(v is not None for v in values)})

    # ----------------------------------------------------------------------------------------------------- orders, energies

    @torch.no_grad()
    def _measure(self) -> dict[tuple[int, str], Array]:
        """Squared norms of each unit's weights: the consumers' columns (out, fc2); for queries and keys, the product of theirs."""
        found: list[Tensor] = []
        for slot in self.slots:
            block = self.model.blocks[slot.block]
            if slot.part == "hidden":
                found.append(block.mlp.reader.weight.square().sum(0))
            else:
                a = block.attention
                heads, inner_qk = a.spec.heads, a.spec.heads * a.spec.qk_dim
                if slot.part == "qk":
                    q, k = a.qkv[: 2 * inner_qk].square().sum(1).view(2, -1)
                    found.append(q * k)
                else:
                    columns = a.out.weight.square().sum(0)
                    found.append(columns.view(heads, -1).sum(1) if slot.part == "heads" else columns)
        flat = torch.cat(found).double().cpu().numpy() if found else np.zeros(0)
        return {(s.block, s.part): flat[s.start : s.stop].reshape(s.shape) for s in self.slots}

    def scores(self, slot: Slot) -> Array:
        """What units are ordered by, in the slot's shape: the lowest go first."""
        return self.norms[(slot.block, slot.part)]

    def _removed(self, slot: Slot) -> Array:
        """Units of the slot that go, for each head or once: a number, or [H, 1]."""
        part = "v" if slot.part == "qk" else slot.part
        where = self.space.index[(slot.block, part)]
        size = slot.shape[-1]
        shares = np.minimum(self.controller.removed[where], 1 - 1 / size)
        return shares[:, None] * size if len(shares) > 1 else shares * size

    def _soft_masks(self) -> Array:
        """Masks of all slots, flat."""
        flat = np.ones(self.masks)
        for slot in self.slots:
            ranks = _ranks(self.scores(slot))
            size = slot.shape[-1]
            gone = np.broadcast_to(self._removed(slot), (*slot.shape[:-1], 1) if len(slot.shape) > 1 else (1,))
            rows = [
                ramp_mask(r, float(s), size, _ramp_width(size))
                for r, s in zip(ranks.reshape(-1, size), gone.reshape(-1), strict=True)
            ]
            flat[slot.start : slot.stop] = np.concatenate(rows)
        return flat

    def _count_slopes(self, slopes: Array) -> Array:
        """Slope of the loss in each share removed, from the gradients of the masks on the ramps."""
        found = np.zeros(len(self.space.widths))
        if not self.rules.masked:
            return found
        for slot in self.slots:
            part = "v" if slot.part == "qk" else slot.part
            where = self.space.index[(slot.block, part)]
            size = slot.shape[-1]
            gradients = slopes[slot.start : slot.stop].reshape(-1, size)
            order = np.argsort(self.scores(slot).reshape(-1, size), axis=1, kind="stable")
            gone = np.broadcast_to(self._removed(slot).reshape(-1), (len(gradients),))
            for row, (gradient, ordered, s) in enumerate(zip(gradients, order, gone, strict=True)):
                price = -size * float(window(float(s), size, _ramp_width(size)) @ gradient[ordered])
                found[where[row] if len(where) > 1 else where[0]] += price
        return found

    def _energies(self) -> list[Array]:
        """For each width, the norms of its groups in the order in which they go; shares of their sum in `clean`."""
        found: dict[int, Array] = {}
        for slot in self.slots:
            if slot.part == "qk":
                continue
            norms, scores = self.norms[(slot.block, slot.part)], self.scores(slot)
            ordered = np.take_along_axis(norms, np.argsort(scores, axis=-1, kind="stable"), axis=-1)
            where = self.space.index[(slot.block, slot.part)]
            rows = ordered.reshape(-1, slot.shape[-1])
            if len(where) == 1:
                rows = rows.sum(0, keepdims=True)
            for w, row in zip(where, rows, strict=True):
                found[w] = row / max(1e-30, row.sum()) if self.rules.masked else row
        return [found[w] for w in range(len(self.space.widths))]

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
        for slot in self.slots:
            if slot.part == "qk":
                continue
            where = self.space.index[(slot.block, slot.part)]
            ranks, gone = _ranks(self.scores(slot)), self._removed(slot)
            lost = ranks < np.ceil(gone - 1e-9) if self.rules.ceil else ranks + 0.5 < gone
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
        losses: dict[tuple[int, str], Array] = {}
        scores = {(slot.block, slot.part): self.scores(slot) for slot in self.slots}
        # norms of different layers compare as shares of their layer
        scores = {key: value / max(1e-30, float(value.sum())) for key, value in scores.items()}
        for (i, part), value in scores.items():
            rows = np.sort(value.reshape(-1, value.shape[-1]), axis=1).sum(0)
            curve = np.concatenate([[0.0], np.cumsum(rows)])
            if part != "qk":
                losses[(i, part)] = curve
        for (i, part), value in scores.items():
            if part == "qk" and len(losses[(i, "v")]) == value.shape[-1] + 1:
                losses[(i, "v")] = losses[(i, "v")] + np.concatenate([[0.0], np.cumsum(np.sort(value, axis=1).sum(0))])
        self.layout = finalise(
            self.space, self.limits, self.controller.removed, self.controller.logits, losses, self._head_ranks()
        )
        self.rounded = self.space.total(self.layout.before)
        final = np.ones(len(self.leaf))
        for slot in self.slots:
            shape = self.layout.shapes[slot.block]
            size = slot.shape[-1]
            final[slot.start : slot.stop] = (_ranks(self.scores(slot)) >= size - getattr(shape, slot.part)).reshape(-1)
        for g, halves in enumerate(self.space.gates):
            i, half = halves[0]
            final[self.masks + g] = float(getattr(self.layout.shapes[i], half))
        self.final = final

    def keeps(self) -> list[Keep | None]:
        """What stays of each block; the cut by it equals the masks of the settled search."""
        assert self.layout is not None
        assert self.final is not None
        masks = {(s.block, s.part): self.final[s.start : s.stop].reshape(s.shape) for s in self.slots}
        found: list[Keep | None] = []
        for i, shape in enumerate(self.layout.shapes):
            mine = {part: mask for (block, part), mask in masks.items() if block == i}
            block = self.space.spec.blocks[i]
            keep = Keep(attention=shape.attention or block.attention is None, mlp=shape.mlp or block.mlp is None)
            if not mine and keep == Keep():
                found.append(None)
                continue
            heads = _kept(mine["heads"]) if "heads" in mine else None
            changes: dict[str, Any] = {"heads": heads}
            for part in ("qk", "v"):
                if part in mine:
                    rows = range(len(mine[part])) if heads is None else heads
                    changes[part] = tuple(_kept(mine[part][h]) for h in rows)
            if "hidden" in mine:
                changes["hidden"] = _kept(mine["hidden"])
            found.append(replace(keep, **changes))
        return found


def _kept(mask: Array) -> tuple[int, ...]:
    return tuple(int(u) for u in np.flatnonzero(mask))


def _ranks(scores: Array) -> np.ndarray[Any, Any]:
    """Place of each unit in the order in which they go, along the last axis."""
    order = np.argsort(scores, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(scores.shape[-1]), scores.shape), axis=-1)
    return ranks


def _ramp_width(size: int) -> float:
    """Ranks on a soft mask's ramp: a sixteenth of them, so that a price is a mean over several units."""
    return max(1.0, size / 16)


def _numbers(shape: Shape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in Shape.__slots__}


def _gate_name(halves: Sequence[Half]) -> str:
    i, half = halves[0]
    return str(i) if len(halves) == 2 else f"{i}/{half}"


def _identity(config: UvcConfig) -> dict[str, Any]:
    """What must agree for a search to be resumed, beyond what the loop checks itself."""
    names = ("budget", "preset", "gates", "widths", "distill", "tie_qk", "count_per_head", "warmup", "settle", "ramp")
    values = plain(config)
    return {name: values[name] for name in (*names, "cold", "alpha", "tau", "align", "freeze")}


def _targets(limits: Mapping[str, int], reference: Cost) -> tuple[float, float]:
    """Shares of MACs and parameters to aim at. Bytes become parameters; memory, beside the reference's activations."""
    bounds = [math.inf]
    if "params" in limits:
        bounds.append(limits["params"])
    if "file_bytes" in limits:
        bounds.append(limits["file_bytes"] / counting.FLOAT_BYTES)
    if "memory_bytes" in limits:
        left = limits["memory_bytes"] - reference.activation_bytes
        share = limits["memory_bytes"] / reference.memory_bytes
        bounds.append(max(left / counting.FLOAT_BYTES, 0.5 * share * reference.params))
    return limits.get("macs", math.inf) / reference.macs, min(bounds) / reference.params


# ----------------------------------------------------------------------------------------------------------------- compress


def compress(
    model: Vit,
    config: UvcConfig,
    *,
    data: Any = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    resume: bool = False,
    teacher: Vit | None = None,
) -> Compressed:
    """Search and train, then cut; no recovery. `model` is left as it was, and is the teacher if no other is given.

    data: whatever `vitrim.data.open` takes; its train split is learned. folder: for metrics.jsonl and checkpoints, from
    which `resume` goes on. A model within its budget comes back as it is, untrained. The report says where the saving came
    from, what the finaliser had to change, and whether the search converged.
    Raises BudgetError, before anything is read, when the budget is out of reach; DataError without images or labels;
    TrainingError as `vitrim.training.fit` does.
    """
    fixed = frozen(model.spec, config.freeze)
    space = space_of(model.spec, config)
    config.bounds.refuse_unreachable(floor=floor(model.spec, config), reference=space.reference, method="uvc")
    limits = config.bounds.limits(space.reference)
    if not exceeded(space.reference, limits):
        every = [(i, half) for i in range(len(model.spec.blocks)) for half in HALVES]
        untouched = [None] * len(model.spec.blocks)
        whole = surgery.cut(model, untouched, method="uvc", variant=config.preset, skip=every)
        return Compressed(
            model=whole, method="uvc", variant=config.preset, report={"within_budget": True, "warnings": []}
        )
    if data is None:
        raise DataError("uvc: the search trains on images; none were given. Pass data=.")
    needed, label_free = needs_labels(model.spec, config)
    images = rooms.open(data, split="train", labelled=True if needed else False if label_free else None)
    objective = Search(space, _inner(teacher or model, config, images, label_free=label_free), config, limits, fixed)
    base = surgery.fold_layer_scale(model, skip=fixed)
    labelled = images.labelled and not label_free
    label_map = class_index(model.config.labels, images.classes, classes=model.spec.classes) if labelled else None
    fitted = fit(
        base,
        objective,
        images,
        config.training,
        out=folder,
        resume=resume,
        label_map=label_map,
        progress=_named(progress),
    )
    small = surgery.cut(fitted.model, objective.keeps(), method="uvc", variant=config.preset, skip=fixed)
    last = replace(small.selection.steps[-1], parent=spec_hash(model.spec), refit=True)
    small.selection = model.selection.then(last)
    report = _report(objective, small.spec)
    report |= {
        "steps": fitted.steps,
        "seconds": round(fitted.seconds, 1),
        "images_per_s": fitted.images_per_s,
        "objective": _objective_name(config, label_free),
    }
    history = [_row(line, space) for line in fitted.history if line["kind"] == "train"]
    return Compressed(model=small, method="uvc", variant=config.preset, history=history, report=report)


def needs_labels(spec: ModelSpec, config: UvcConfig) -> tuple[bool, bool]:
    """Whether the search needs labels, and whether it does not look at any. Raises ConfigError where it can learn nothing."""
    if not spec.outputs and not config.distill:
        raise ConfigError("uvc: distill=False on an encoder, which has no classifier to train; leave distill on.")
    label_free = not spec.outputs
    return not label_free and not (config.distill and config.rules.alpha == 1), label_free


def check(spec: ModelSpec, config: UvcConfig, images: Images) -> None:
    """Raise what `compress` would raise about these training images or this machine, before any work is done."""
    needed, _ = needs_labels(spec, config)
    if needed:
        rooms.open(images, labelled=True)
    ready(config.training, images)


def _objective_name(config: UvcConfig, label_free: bool) -> str:
    return "label_free" if label_free else "distilled" if config.distill else "supervised"


def _inner(model: Vit, config: UvcConfig, images: Images, *, label_free: bool) -> Objective:
    rules = config.rules
    if label_free:
        return LabelFree(model)
    labels = images.labels
    several = labels is not None and labels.dim() > 1
    if not config.distill:
        return Supervised(smoothing=rules.smoothing, multi_label=several)
    return Distilled(model, alpha=rules.alpha, tau=rules.tau, smoothing=rules.smoothing, multi_label=several)


SHOWN = ("loss", "lr", "grad_norm", "epoch", "phase", "seconds_left", "images_per_s")


def _named(progress: Progress | None) -> Progress | None:
    """The loop's progress under the method's name, with the distance from the budget instead of every decision."""
    if progress is None:
        return None

    def told(stage: str, done: int, total: int, **facts: Any) -> None:
        shown = {key: value for key, value in facts.items() if key in SHOWN}
        for name in ("macs", "params"):
            if f"budget/{name}" in facts:
                shown[f"keep_{name}"] = facts[f"cost/{name}"]
        progress("uvc" if stage == "train" else stage, done, total, **shown)

    return told


def _row(line: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """A line of metrics.jsonl with the decisions by what they are about: `block 3`, `block 3 head 1`, `block 3 mlp`."""
    row = {key: line[key] for key in ("step", "phase", "loss", "lr") if key in line}
    row |= {key: value for key, value in line.items() if key.endswith("_loss")}
    for name in ("cost", "budget", "z"):
        row[name] = {key.split("/", 1)[1]: line[key] for key in line if key.startswith(f"{name}/")}
    for name in ("removed", "y"):
        row[name] = {
            part: {_about(key.split("/")[2:], "head"): line[key] for key in line if key.startswith(f"{name}/{part}/")}
            for part in ("heads", "v", "hidden")
        }
    names = [_gate_name(halves) for halves in space.gates]
    row["gates"] = {_about(name.split("/"), ""): line[f"gate/{name}"] for name in names}
    return row


def _about(place: Sequence[str], what: str) -> str:
    return " ".join(["block", place[0], *(word for word in (what, *place[1:]) if word and len(place) > 1)])


def _report(objective: Search, spec: ModelSpec) -> dict[str, Any]:
    """Where the saving came from, what the finaliser changed, how the search ended, and what is left of each block."""
    space, layout = objective.space, objective.layout
    assert layout is not None
    reference = {"macs": space.reference.macs, "params": space.reference.params}
    after, dense = cost(spec), space.dense()
    saving: dict[str, Any] = {}
    finaliser: dict[str, Any] = {}
    for name, whole in reference.items():
        saved = whole - getattr(after, name)
        skipped = sum(
            space.half_cost((i, half), dense[i])[name]
            for i, shape in enumerate(layout.shapes)
            for half in ("attention", "mlp")
            if getattr(dense[i], half) and not getattr(shape, half)
        )
        skipping = min(1.0, skipped / saved) if saved else 0.0
        saving[name] = {"share": saved / whole, "skipping": skipping, "widths": 1 - skipping if saved else 0.0}
        searched = float(objective.controller.cost[0 if name == "macs" else 1])
        rounded, final = objective.rounded[name] / whole, getattr(after, name) / whole
        finaliser[name] = {
            "searched": searched,
            "rounded": rounded,
            "final": final,
            "cut": max(0.0, max(searched, rounded) - final),
        }
    verdict, why = judged(objective.trace)
    bound = [name for k, name in enumerate(("macs", "params")) if objective.controller.bound[k]]
    cut = max(finaliser[name]["cut"] for name in bound)
    warnings = []
    if cut > 0.05:
        warnings.append(
            f"the search had not reached its budget: the finaliser itself cut {100 * cut:.1f} % of the cost of the network that was searched. "
            "Give it more steps, or a larger budget."
        )
    return {
        "saving": saving,
        "finaliser": finaliser,
        "search": {"ended": verdict, "judged": why, "columns": ["step", "cost", "budget"], "trace": objective.trace},
        "blocks": [_numbers(shape) for shape in layout.shapes],
        "warnings": warnings,
    }


def judged(trace: Sequence[Sequence[float]]) -> tuple[str, str]:
    """How a search ended, from rows of (step, cost, budget), and by what rule.

    Looks at the last quarter of the search: "converged" where cost and budget stay within 4 % of dense of each other (a
    head or eight dims come and go in whole levels there); "oscillated" where the difference changes sign twice and spans
    over 8 %; "short of the budget" or "below the budget" else.
    """
    tail = np.array([row[1] - row[2] for row in trace[-max(1, len(trace) // 4) :]])
    worst, span = float(np.abs(tail).max()), float(tail.max() - tail.min())
    turns = int((np.diff(np.sign(tail[np.abs(tail) > 0.005])) != 0).sum())
    what = (
        f"last quarter of the search: cost within {100 * worst:.1f} % of dense of the budget, {turns} changes of side"
    )
    if worst <= 0.04:
        return "converged", what
    if turns >= 2 and span > 0.08:
        return "oscillated", what
    return ("short of the budget" if tail[-1] > 0 else "below the budget"), what


__all__ = ["PRESETS", "UvcConfig", "compress", "floor", "plan", "step"]
