"""Better merging of tokens, nothing trained: one change of matching, place or what comes back at a time, on the real model.

A constant count of the 256 patch tokens merges in each of the 12 blocks, with sizes in the attention, and all tokens are restored at
the end; nothing else is cut. Maps are fitted on training photographs, variants are chosen on `--split validation`, and the table is
of `--split test`. Variants are functions of the model's blocks here; only what is in `vitrim.tokens` is in the library.

    python benchmarks/merging.py --model MODEL --data CAMVID [--split test] [--photographs 32] [--only NAME]; --table

MODEL: as `photographs.py` has it. Rows go to results/merging-dinov2-small.jsonl in place of their like.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import photographs as real
import protocol
import torch
from torch import Tensor
from torch.nn import functional as F

from vitrim import closed_form as cf
from vitrim import surgery
from vitrim.closed_form.fisher import Product, gradients
from vitrim.counting import attention_macs, cost, mlp_macs
from vitrim.model import Block, Vit

PLACE = protocol.RESULTS / "merging-dinov2-small.jsonl"
COUNTS = (8, 13, 16, 20)
FIT, SENSED, BATCH = 48, 32, 8
RANK, RIDGE, LEAN = 64, 0.1, 4.0
AT = {"start": 0, "mid": 1, "end": 2}


@dataclass(frozen=True)
class Way:
    """One row. seen: what tokens are compared by; rule: how; split: which may merge into which; back: what comes back with a token."""

    name: str
    rule: str = "ward"
    seen: str = "fisher"
    split: str = "halves"
    at: str = "mid"
    rounds: int = 1
    reassigned: bool = False
    important: str | None = None
    back: str | None = "every token"


WAYS = (
    Way("cosine of the stream (ToMe's matching)", rule="cosine", seen="stream", back=None),
    Way("cosine of the keys", rule="cosine", seen="keys", back=None),
    Way("cosine of the half's normalised input", rule="cosine", seen="normed", back=None),
    Way("cosine of tokens less their mean", rule="cosine", seen="centred", back=None),
    Way("distance in the stream, no sizes", rule="distance", seen="stream", back=None),
    Way("Ward in the stream", seen="stream", back=None),
    Way("Ward in 64 Fisher directions", back=None),
    Way("Ward in 384 Fisher directions", seen="fisher 384", back=None),
    Way("64 directions, difference back as it is", back="as it is"),
    Way("64 directions, carry of the nearer half of pairs", back="half"),
    Way("64 directions, carry of every token's nearest"),
    Way("... no sizes in the matching", rule="distance"),
    Way("... halves of a checkerboard", split="checkerboard"),
    Way("... halves by chance", split="chance"),
    Way("... two rounds a block", rounds=2),
    Way("... at the start of the block", at="start"),
    Way("... at the end of the block", at="end"),
    Way("... any into heavier ones", split="heavier"),
    Way("... any into heavier ones, each to the nearest centre again", split="heavier", reassigned=True),
    Way("... any into heavier ones, importance by x F x^T", split="heavier", important="quadratic"),
    Way("... any into heavier ones, importance by a linear map", split="heavier", important="linear"),
)


def take(x: Tensor, index: Tensor) -> Tensor:  # B n E, B K -> B K E
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def squared(a: Tensor, b: Tensor) -> Tensor:  # B n E, B m E -> B n m
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").square()


class Trial:
    """The dense model, and what is fitted once on its streams: places are `at + 2 i` of block i."""

    def __init__(self, model: Vit, fit: list[Tensor]) -> None:
        self.model = model
        self.patches = len(fit[0]) and model.spec.grid[0] * model.spec.grid[1]
        self.streams = [torch.cat(parts) for parts in zip(*(self.dense(x) for x in fit), strict=True)]
        self.grams, self.leaning = self._gradients(fit)
        self.roots = {(k, n): self._root(gram, n) for k, gram in self.grams.items() for n in (RANK, model.spec.width)}
        self._carries: dict[tuple[str, str], list[Tensor]] = {}

    @torch.no_grad()
    def dense(self, x: Tensor) -> list[Tensor]:
        """Patch tokens in front of the blocks, and behind each half."""
        stream = self.model.embed(x)
        found = [stream.x[:, 1:]]
        for block in self.model.blocks:
            stream = block.attend(stream).stream
            found.append(stream.x[:, 1:])
            stream = block.transform(stream).stream
            found.append(stream.x[:, 1:])
        return found

    def _gradients(self, fit: list[Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """By place behind an attention: Fisher matrices of patch tokens, and the map to the logarithm of a gradient's length."""
        places = [2 * i + 1 for i in range(len(self.model.blocks))]
        width = self.model.spec.width
        grams = {k: torch.zeros(width, width, dtype=torch.float64) for k in places}
        stats = {k: cf.Regression.empty(width, 1) for k in places}
        generator, at = torch.Generator().manual_seed(0), 0
        for x in fit:
            names = [f"mid:{k // 2}" for k in places]
            found = gradients(self.model, x, names, draws=2, generator=generator, product=Product("tokens"))
            for k, name in zip(places, names, strict=True):
                g = found.of[name][:, :, 1:]
                flat = g.flatten(0, 2)
                grams[k] += (flat.mT @ flat).double()
                stats[k].add(self.streams[k][at : at + len(x)], g.square().sum((0, 3)).log()[..., None] / 2)
            at += len(x)
            if at >= SENSED:
                break
        zero = torch.zeros(width, 1, dtype=torch.float64)
        return grams, {k: cf.refit(one, zero, ridge=RIDGE)[0].float() for k, one in stats.items()}

    @staticmethod
    def _root(gram: Tensor, rank: int) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        return (vectors * (values / values[-1]).clamp_min(0).sqrt())[:, -rank:].float()

    def carries(self, way: Way) -> list[Tensor] | None:
        """For each block the map of a difference there to that at the end, [D, D]."""
        if way.back is None:
            return None
        eye = torch.eye(self.model.spec.width)
        if way.back == "as it is":
            return [eye] * len(self.model.blocks)
        if (way.back, way.at) not in self._carries:
            self._carries[way.back, way.at] = [self._carry(way, 2 * i) for i in range(len(self.model.blocks))]
        return self._carries[way.back, way.at]

    def _carry(self, way: Way, first: int) -> Tensor:
        here, last = self.streams[first + AT[way.at]], self.streams[-1]
        seen = here @ self.roots[first + 1, RANK]
        if way.back == "half":
            near, best = squared(seen[:, 0::2], seen[:, 1::2]).min(-1)
            chosen = near.topk(near.shape[1] // 2, largest=False).indices
            one, two = 2 * chosen, 2 * best.gather(1, chosen) + 1
            apart, end = (take(x, one) - take(x, two) for x in (here, last))
        else:
            alone = torch.diag(torch.full((seen.shape[1],), torch.inf))
            nearest = (squared(seen, seen) + alone).argmin(-1)
            apart, end = (x - take(x, nearest) for x in (here, last))
        stats = cf.Regression.empty(apart.shape[2], apart.shape[2])
        stats.add(apart, end)
        eye = torch.eye(apart.shape[2], dtype=torch.float64)
        return cf.refit(stats, eye, ridge=0.01 if way.back == "half" else RIDGE, bias=False)[0].float()

    # -- one pass

    def seen(self, way: Way, block: Block, i: int, x: Tensor) -> Tensor:
        """What patch tokens are compared by.  x: B P D"""
        if way.seen == "keys":
            return block.attention.qkv_heads(block.norm1(x))[1].transpose(1, 2).flatten(2)
        if way.seen == "normed":
            return block.norm2(x)
        if way.seen == "centred":
            return x - x.mean(1, keepdim=True)
        if way.seen == "stream":
            return x
        return x @ self.roots[2 * i + 1, self.model.spec.width if way.seen == "fisher 384" else RANK]

    def mass(self, way: Way, place: int, x: Tensor, sizes: Tensor) -> Tensor:
        if way.important is None:
            return sizes
        if way.important == "quadratic":
            return sizes * ((x @ self.grams[place].float()) * x).sum(-1) / x.square().sum(-1)
        lean = (x @ self.leaning[place])[..., 0]
        return sizes * (lean - lean.mean(1, keepdim=True)).clamp(-LEAN, LEAN).exp()

    @torch.no_grad()
    def tokens(self, way: Way, x: Tensor, count: int) -> Tensor:
        """After the final norm, restored.  B N D"""
        model, carries = self.model, self.carries(way)
        head, p = model.embed(x).x.split([1, self.patches], dim=1)
        sizes = p.new_ones(p.shape[:2])
        where = torch.arange(self.patches).expand(len(x), -1)  # of each token that of a source
        history: list[tuple[int, Tensor, Tensor]] = []
        chance = torch.Generator().manual_seed(0)

        def merge(i: int, block: Block) -> None:
            nonlocal p, sizes, where
            goal = left(p.shape[1], count)
            for n in range(way.rounds):
                keep = goal + (p.shape[1] - goal) * (way.rounds - 1 - n) // (way.rounds - n)
                place = 2 * i + AT[way.at]
                seen, mass = self.seen(way, block, i, p), self.mass(way, place, p, sizes)
                owner, stays = owners(way, seen, mass, keep, where, model.spec.grid[1], chance)
                whole = p.new_zeros(len(p), keep).scatter_add(1, owner, sizes)
                index = owner[:, :, None].expand(-1, -1, p.shape[2])
                mean = torch.zeros_like(p[:, :keep]).scatter_add(1, index, p * sizes[:, :, None]) / whole[:, :, None]
                history.append((i, owner, p - take(mean, owner)))
                p, sizes, where = mean, whole, where.gather(1, stays)

        for i, block in enumerate(model.blocks):
            if way.at == "start":
                merge(i, block)
            both = torch.cat([head, p], dim=1)
            both = both + block.attention.finish(
                block.attention.mix(block.norm1(both), bias=F.pad(sizes.log(), (1, 0))[:, None, None])
            )
            head, p = both[:, :1], both[:, 1:]
            if way.at == "mid":
                merge(i, block)
            both = torch.cat([head, p], dim=1)
            both = both + block.mlp.finish(block.mlp.units(block.norm2(both)))
            head, p = both[:, :1], both[:, 1:]
            if way.at == "end":
                merge(i, block)
        for i, owner, apart in reversed(history):
            p = take(p, owner)
            if carries is not None:
                p = p + apart @ carries[i]
        return model.norm(torch.cat([head, p], dim=1))


def left(patches: int, count: int) -> int:
    return max(patches - count, patches - patches // 2)


def owners(
    way: Way, seen: Tensor, mass: Tensor, keep: int, where: Tensor, cols: int, chance: torch.Generator
) -> tuple[Tensor, Tensor]:
    """For each token the number of the one that holds it after, B P; and of those that stay their numbers before, B K.  seen: B P E"""
    b, p, _ = seen.shape
    here = torch.arange(p)
    if way.rule == "cosine":
        unit = F.normalize(seen, dim=-1)
        lost = -unit @ unit.mT
    else:
        lost = squared(seen, seen)
        if way.rule == "ward":
            lost = lost / (1 / mass[:, :, None] + 1 / mass[:, None])
    if way.split == "heavier":
        order = mass * (1 + here / (2 * p * p))
        allowed = order[:, None] > order[:, :, None]
    else:
        rank = here.expand(b, -1)
        if way.split == "chance":
            rank = torch.randperm(p, generator=chance).expand(b, -1)
        elif way.split == "checkerboard":
            colour = (where // cols + where % cols) % 2
            rank = (colour * p + here).argsort(-1).argsort(-1)  # sources are the first half
            rank = torch.where(rank < p - p // 2, 0, 1)
        source = rank % 2 == 0
        allowed = source[:, :, None] & ~source[:, None]
    least = torch.where(allowed, lost, torch.inf).amin(-1)
    gone = torch.zeros(b, p, dtype=torch.bool).scatter(1, least.topk(p - keep, largest=False).indices, True)
    open_to = ~gone[:, None] if way.split == "heavier" else allowed
    best = torch.where(open_to, lost, torch.inf).argmin(-1)
    after = (~gone).long().cumsum(-1) - 1
    owner = torch.where(gone, after.gather(1, best), after)
    stays = (~gone).long().topk(keep, dim=-1).indices.sort(-1).values
    if way.reassigned:
        whole = mass.new_zeros(b, keep).scatter_add(1, owner, mass)
        index = owner[:, :, None].expand(-1, -1, seen.shape[2])
        centres = torch.zeros_like(seen[:, :keep]).scatter_add(1, index, seen * mass[:, :, None]) / whole[:, :, None]
        owner = torch.where(gone, squared(seen, centres).argmin(-1), owner)
    return owner, stays


def macs(way: Way, model: Vit, count: int) -> int:
    """Operations of blocks and merges: comparisons, maps, the one-hot product and what is carried; the stem as it is."""
    width, total = model.spec.width, cost(model).stem_macs
    now = model.spec.grid[0] * model.spec.grid[1]
    for block in model.spec.blocks:
        a, m = block.attention, block.mlp
        assert a is not None
        assert m is not None
        after = left(now, count)
        into_attention, into_mlp = {"start": (after, after), "mid": (now, after), "end": (now, now)}[way.at]
        total += attention_macs(a.heads, a.qk_dim, a.v_dim, tokens=into_attention + 1, width=width)
        total += mlp_macs(m.hidden, tokens=into_mlp + 1, width=width, kind=m.kind)
        gone, targets, pairs = now - after, now // 2, (now - now // 2) * (now // 2)
        if way.split == "heavier":
            targets, pairs = after, now * now
        directions = RANK if way.seen == "fisher" else width
        maps = now * width * (directions if way.seen in ("fisher", "fisher 384") else 0)
        maps += {None: 0, "linear": now * width, "quadratic": now * width * width}[way.important]
        maps += now * width * width if way.seen == "keys" else 0
        again = now * after * directions if way.reassigned else 0
        square = gone * width * width if way.back not in (None, "as it is") else 0
        total += way.rounds * pairs * directions + way.rounds * maps + again + gone * targets * (width + 1) + square
        now = after
    return int(total)


def scored(trial: Trial, way: Way, count: int, truth: real.Fidelity) -> dict[str, float]:
    found = []
    for x, goal in zip(truth.batches(), truth.reference, strict=True):
        tokens = trial.tokens(way, x, count)
        cosine = F.cosine_similarity(tokens, goal["tokens"], dim=-1)
        shown = truth.decoder.of_tokens(tokens)
        ours, theirs = shown > real.IMPORTANT, goal["map"] > real.IMPORTANT
        both, either = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
        overlap = torch.where(either > 0, both / either.clamp_min(1), 1.0)
        found.append(torch.stack([cosine.mean(1), cosine[:, 0], (shown - goal["map"]).abs().mean((1, 2)), overlap]))
    cosine, cls, mae, iou = torch.cat(found, dim=1)
    means = {"cosine": cosine.mean(), "cls": cls.mean(), "map_mae": mae.mean(), "map_iou": iou.mean()}
    return {name: float(value) for name, value in means.items()} | {"worst": float(cosine.min())}


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dense = real.dense_model(options.model)
    fit = real.Fidelity(dense, real.decoder(options.model), fetch(options.data, "train", FIT), BATCH)
    truth = real.Fidelity(dense, fit.decoder, fetch(options.data, options.split, options.photographs), BATCH)
    trial = Trial(surgery.fold_layer_scale(dense).eval(), list(fit.batches()))
    ways = [way for way in WAYS if not options.only or any(part in way.name for part in options.only)]
    anew = {(way.name, count, options.split) for way in ways for count in options.counts}
    rows = protocol.read(PLACE) if PLACE.is_file() else []
    rows = [row for row in rows if (row["way"], row["count"], row["split"]) not in anew]
    for way in ways:
        for count in options.counts:
            began = time.monotonic()
            row: dict[str, Any] = {"way": way.name, "count": count, "split": options.split}
            row |= {"kept_macs": macs(way, dense, count) / cost(dense).macs, **scored(trial, way, count, truth)}
            row |= {"fit": FIT, "photographs": len(truth.images), "seconds": time.monotonic() - began}
            rows.append(row | {"model": "dinov2-small", "data": truth.images.fingerprint()} | protocol.conditions())
            protocol.write(PLACE, rows)
            protocol.say(f"{way.name:64s} {count:3d} {1e3 * (1 - row['cosine']):7.2f} {row['worst']:.4f}")


def fetch(source: Any, split: str, count: int) -> Any:
    return real.prepared(real.photographs(source, split, count))


def table() -> None:
    rows = [row for row in protocol.read(PLACE) if row["split"] == "test"]
    assert rows, "no row of the test split; run with --split test first"
    first, order = rows[0], [way.name for way in WAYS]
    text = [
        "# Merging of tokens, nothing trained: what helps",
        "",
        f"DINOv2-small, {first['photographs']} CamVid test photographs, maps fitted on {first['fit']} training photographs. A constant count of "
        "the 256 patch tokens merges in each of 12 blocks, with sizes in the attention; all come back at the end, and nothing else is "
        "cut. Rows that begin with dots change the one in front of them, the carry of every token's nearest, in one thing, the last two in "
        "two. By "
        "`python benchmarks/merging.py --table` from `benchmarks/results/merging-dinov2-small.jsonl`; the "
        "choice was made on validation photographs, of which [the log](../log.md) tells, with what was tried and dropped.",
    ]
    for count in sorted({row["count"] for row in rows}):
        text += ["", f"## {count} a block", ""]
        text += ["| way | MACs kept | mean cosine | worst image | class token | map MAE | map IoU at 0.5 |"]
        text += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for row in sorted(rows, key=lambda row: order.index(row["way"])):
            if row["count"] == count:
                figures = f"{row['cosine']:.4f} | {row['worst']:.4f} | {row['cls']:.4f} | {row['map_mae']:.4f} | {row['map_iou']:.3f}"
                text.append(f"| {row['way']} | {100 * row['kept_macs']:.1f} % | {figures} |")
    protocol.publish("merging-dinov2-small", "\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--photographs", type=int, default=32)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--only", nargs="+", help="rows whose names hold one of these")
    parser.add_argument("--table", action="store_true", help="only make the table from the rows that are there")
    options = parser.parse_args()
    if options.table:
        table()
    elif options.model is None or options.data is None:
        parser.error("--model and --data are needed")
    else:
        run(options)


if __name__ == "__main__":
    main()
