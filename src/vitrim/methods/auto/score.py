"""auto: what each level of each part costs alone, in output divergence: images, parts, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrim import closed_form as cf
from vitrim import data as opened
from vitrim import surgery
from vitrim.checkpoints import Journal, Piece
from vitrim.closed_form import fisher
from vitrim.closed_form import stream_width as narrowing
from vitrim.closed_form import sublayers as parts
from vitrim.closed_form.regression import reduced_rank
from vitrim.errors import DataError
from vitrim.methods.auto import merges
from vitrim.methods.auto.choose import Losses, Nets, Scores
from vitrim.methods.auto.config import AutoConfig
from vitrim.methods.auto.merges import Merges, Node
from vitrim.methods.fitting import Run, kept
from vitrim.model import OPEN, Block, Stream, TokenStep, Vit
from vitrim.space import BlockLevels
from vitrim.spec import mergeable, token_walk
from vitrim.tokens import squared_distances, take

HELD_OUT = 4
"""One image in so many is held out: options are scored and plans compared on it."""
SENSED, SCORED = 16_384, 8_192
"""Tokens from which sensitivities are summed, and on which options are scored: their images are the first of those to fit, and of those held out."""
ROWS = 16
"""Tokens for each unknown of a regression that is only for scores or a trial plan; the network that stays is fitted on all."""
GRAPH = 1_024
"""Tokens whose graph is held at once."""
PROBE = 64
"""Images from which the readers of a trial stream width are corrected, and the fewest for scores and trial builds."""


class Inputs:
    """The calibration images as the network takes them, read anew by each pass, a batch at a time.

    Parts: `fit`, `held` (every fourth image), `all`; the first of `fit`: `probe`, `sensed`, `few`; the first of `held`: `scored`.
    """

    def __init__(self, model: Vit, source: Any, config: AutoConfig, nets: Nets) -> None:
        if source is None:
            raise DataError("auto: it needs a few hundred unlabelled images, and none were given. Pass data=.")
        self.batch_size = config.batch_size
        self.feed = opened.calibration_images(
            source, model.config.preprocess, count=config.images, seed=config.seed, method="auto"
        )
        self.count, self.mark = len(self.feed), self.feed.mark[:16]
        if self.count < 2:
            raise DataError(
                f"auto: {self.count} image; expected two at least (one judges), and a few hundred to do well."
            )
        every = np.arange(self.count)
        step_ = min(HELD_OUT, self.count)
        is_held = every % step_ == step_ - 1
        held, fit = every[is_held], every[~is_held]
        tokens = max((at.keys.count for at in token_walk(nets.base)), default=1)

        def images(rows: int) -> int:
            return math.ceil(rows / tokens)

        self.rows = {"all": every, "held": held, "scored": held[: images(SCORED)], "fit": fit, "probe": fit[:PROBE]}
        self.rows |= {"sensed": fit[: images(SENSED)], "few": fit[: max(PROBE, images(ROWS * unknowns_of(nets)))]}
        if self.feed.alike(self.batch_size):
            raise DataError(
                f"auto: all {self.count} images are equal; expected different ones, such as a few hundred photos."
            )

    def batches(self, part: str) -> Iterator[Tensor]:
        """Batches [B, C, h, w]."""
        return self.feed.subset(self.rows[part]).batches(self.batch_size)


def unknowns_of(nets: Nets) -> int:
    """Of the largest regression: inputs of a linear that is refitted."""
    sizes = [
        size
        for whole, levels in zip(nets.whole.whole, nets.levels, strict=True)
        for size, refit in zip((whole.heads * whole.v, whole.hidden), levels.refit, strict=True)
        if refit
    ]
    return max(sizes, default=0)


def warnings_of(nets: Nets, inputs: Inputs) -> list[str]:
    """What the images are too few for."""
    unknowns = unknowns_of(nets)
    least = min((at.mlp.count for at in token_walk(nets.base)), default=1)
    rows = len(inputs.rows["fit"]) * least
    if rows >= 2 * unknowns:
        return []
    enough = math.ceil(2 * unknowns / least * HELD_OUT / (HELD_OUT - 1))
    return [
        f"{inputs.count} images give {rows} tokens to fit {unknowns} unknowns; the ridge keeps the fit close to the inherited "
        f"weights. {enough} images or more would do."
    ]


# ------------------------------------------------------------------------------------------------------ parts and scores


@dataclass(frozen=True, kw_only=True)
class Job(Run):
    """One run. Its base has no prefix step."""

    nets: Nets
    config: AutoConfig
    inputs: Inputs
    journal: Journal

    @property
    def graph(self) -> int:
        """Images whose graph is held at once."""
        return max(1, GRAPH // max((at.keys.count for at in token_walk(self.base.spec)), default=1))

    def kept(self, name: str, make: Callable[[], Piece]) -> Piece:
        """A finished piece of work, from the journal where it has been noted."""
        return kept(self.journal, name, make)

    @torch.no_grad()
    def answer(self, model: Vit, x: Tensor) -> Tensor:
        """What the model answers to a batch, [B, C] on the CPU. Raises DataError where it is not finite."""
        want = self.product.want
        found = self.product.outcome(model(x.to(next(model.parameters())), gates=OPEN, want=(want,))[want]).cpu()
        if not torch.isfinite(found).all():
            raise DataError("auto: the model's output is not finite. Check the weights and the images' normalisation.")
        return found

    @cached_property
    def maps(self) -> dict[str, Tensor]:
        """Of `merge_maps`."""
        return self.kept("merge-maps", partial(merge_maps, self)).tensors

    def merger(self, i: int, before: Node, after: Node) -> TokenStep:
        """The step from one node to another in block `i` of the dense stream."""
        width = self.base.spec.width
        step = merges.merge(before, after, width, carry=self.nets.restores)
        made = TokenStep(step, width, length=mergeable(step, before.patches, before.grid))
        for name in ("metric", "importance", "carry_a", "carry_b"):
            if getattr(made, name) is not None:
                setattr(made, name, nn.Parameter(self.maps[f"{i}/{name}"].to(self.device), requires_grad=False))
        return made

    @cached_property
    def logs(self) -> list[Tensor] | None:
        """The dense model's answers to the held-out images, batch by batch; None where they are too many to keep."""
        found, size = [], 0
        for x in self.inputs.batches("held"):
            found.append(self.answer(self.base, x))
            size += found[-1].numel() * found[-1].element_size()
            if size > cf.IN_MEMORY_BYTES:
                return None
        return found

    def divergence(self, model: Vit) -> float:
        """Of the model from the dense one, on the held-out images."""
        total = 0.0
        for n, x in enumerate(self.inputs.batches("held")):
            before = self.answer(self.base, x) if self.logs is None else self.logs[n]
            total += float(self.product.divergence(before, self.answer(model, x)).sum())
        return total / len(self.inputs.rows["held"])

    @cached_property
    def sites(self) -> dict[str, cf.Sensitivity]:
        """Sensitivity at every place, from the images that parts are fitted on."""
        if not self.base.blocks:
            return {}
        t = self.kept("sensitivity", self._sensitivity).tensors
        kinds = [field.name for field in fields(cf.Sensitivity)]
        return {n: cf.Sensitivity(**{kind: t[f"{n}/{kind}"] for kind in kinds}) for n in cf.places(self.base)}

    def _sensitivity(self) -> Piece:
        batches = (part for x in self.inputs.batches("sensed") for part in x.split(self.graph))
        told = partial(self.tell, "sensitivity", total=len(self.inputs.rows["sensed"]))
        found = cf.sensitivity(
            self.base,
            batches,
            product=self.product,
            seed=self.config.seed,
            important=self.nets.restores and len(self.nets.nodes) > 1,
            progress=told,
        )
        return Piece(
            {f"{name}/{kind}": value for name, site in found.items() for kind, value in vars(site).items()}, {}
        )

    def takes_mean(self, i: int) -> bool:
        """Whether what block `i` adds on average can go into a bias before it, should the block go."""
        if not i:
            return False
        before, refit = self.base.spec.blocks[i - 1], self.nets.levels[i - 1].refit
        return refit[1] if before.mlp is not None else refit[0]

    def weights(self, name: str, tokens: int) -> Tensor:
        return self.sites[name].weights(tokens)

    def reader_weights(self, name: str, tokens: int) -> Tensor | None:
        """Of the tokens that a reader of the stream sees: those of the place in front of it."""
        kind, i = name.split(":")
        if kind == "norm2":
            return self.weights(f"mid:{i}", tokens)
        return self.weights("mid:0" if i == "0" else f"block:{int(i) - 1}", tokens)

    @cached_property
    def gram(self) -> Tensor:
        """[D, D] of the stream at all its readers."""
        return self.kept("stream", self._gram).tensors["gram"]

    def _gram(self) -> Piece:
        total, like = narrowing.Stream.empty(self.base.spec.width), next(self.base.parameters())
        for x in self.inputs.batches("fit"):
            for _, seen in narrowing.readings(self.base, x.to(like)):
                total.add(seen, len(self.base.spec.prefix))
        return Piece({"gram": total.gram}, {})

    def narrowed(self, width: int, part: str) -> tuple[Vit, narrowing.Basis]:
        """The dense network in a narrower stream, its readers corrected on these images."""
        effect = torch.stack([self.sites[name].matrix for name in sorted(self.sites)]).sum(0) if self.sites else None
        basis = narrowing.directions(self.gram, width, effect)
        corrected = narrowing.corrections(self.base, basis, self.inputs.batches(part), weights=self.reader_weights)
        return narrowing.narrow(self.base, basis, corrected), basis


def own_memory(tensor: Tensor) -> Tensor:
    """A copy with memory of its own, as it comes back from a checkpoint."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def block_parts(job: Job, i: int, held: cf.StreamCache) -> Piece:
    """The parts of block `i` at every level on offer, in the model's dtype, from one pass over the dense stream in front of it.

    `qk/left` [H, D, R], `qk/right` [H, R, D], `qk/bias` [H, R]; `v/left`; for each rank v `o/v/w` [H v, D], `o/v/b`;
    for each width m `mlp/m/keep`, `/w` [m, E], `/b` [D]; the same as `off/m/...` without the attention.
    """
    block, levels, config = job.base.blocks[i], job.nets.levels[i], job.config
    empty = partial(cf.Regression.empty, outputs=job.base.spec.width, device=job.device)
    units = levels.whole.hidden
    scores = parts.Scores() if len(levels.qk) > 1 else None
    heads = empty(block.attention.out.in_features) if len(levels.v) > 1 else None
    mlp = empty(units) if len(levels.hidden) > 1 or levels.bare else None
    off = empty(units) if levels.off and levels.refit[1] else None
    gone = empty(1) if levels.empty else None
    for stream in held.batches(job.device):
        entry = block.start(stream)
        at_mid = job.weights(f"mid:{i}", entry.x.shape[1]).to(entry.x)
        if scores is not None:
            q, k, _ = block.attention.qkv_heads(block.norm1(entry.x))
            scores.add(q, k, at_mid)
        mid, mixed, _ = block.attend(entry)
        if heads is not None and mixed is not None:
            heads.add(mixed, mid.x - entry.x, at_mid)
        theirs, ours = cf.following(block, mid, entry, "mid")
        inner = block.mid(mid)
        at_end = job.weights(f"block:{i}", inner.x.shape[1]).to(inner.x)
        after = None
        if mlp is not None:
            hidden = block.units(inner)
            update = block.mlp.finish(hidden)
            mlp.add(hidden, update, at_end)
            after = None if block.has_steps("mid") else inner.x + update
        if off is not None or gone is not None:
            target = (block.transform(theirs).stream.x if after is None else after) - ours.x
            if off is not None:
                off.add(block.units(ours), target, at_end)
            if gone is not None:
                gone.add(target.new_ones(*target.shape[:2], 1), target, at_end)
    found: dict[str, Tensor] = {}
    like = next(block.parameters(), torch.empty(0))

    def keep(name: str, value: Tensor | None) -> None:
        if value is not None:
            found[name] = own_memory(value.to("cpu", like.dtype) if value.is_floating_point() else value)

    if scores is not None:
        factors = scores.factors(block.attention)
        keep("qk/left", factors.left)
        keep("qk/right", factors.right)
        keep("qk/bias", factors.left_bias)
    if heads is not None:
        directions = parts.values(block.attention, heads, job.sites[f"mid:{i}"].metric)
        keep("v/left", directions.left)
        for rank in levels.v[1:]:
            w, b = parts.output(heads, directions, rank, block.attention.v_bias, ridge=config.output_ridge)
            keep(f"o/{rank}/w", w)
            keep(f"o/{rank}/b", b)
    for name, stats, kept_sizes in (("mlp", mlp, levels.hidden[1:]), ("off", off, levels.hidden)):
        if stats is None:
            continue
        last, metric = parts.last_linear(block.mlp), job.sites[f"block:{i}"].metric
        order = parts.elimination(stats, last, metric, ridge=config.ridge)
        for size, stay, w, shift in parts.refitted_at(stats, last, metric, order, kept_sizes, ridge=config.ridge):
            keep(f"{name}/{size}/keep", stay)
            keep(f"{name}/{size}/w", w)
            keep(f"{name}/{size}/b", shift)
    if levels.off and not levels.refit[1]:
        keep(f"off/{units}/frozen", torch.ones(1))
    # a mean counts only where a bias can take it: the attention's own, or that of the half before the block
    if mlp is not None and levels.bare:
        mean = parts.mean_target(mlp)
        keep("mlp/0/b", mean if levels.refit[0] else torch.zeros_like(mean))
    if gone is not None:
        mean = parts.mean_target(gone)
        keep("off/0/b" if levels.whole.attention else "mlp/0/b", mean if job.takes_mean(i) else torch.zeros_like(mean))
    return Piece(found, {})


Emit = Callable[[str, int, str, Tensor], None]
"""Told of each level: part, size, place, and how the stream there changes [B, N, D]."""


def changes(block: Block, i: int, levels: BlockLevels, found: Piece, entry: Stream, emit: Emit) -> None:
    """What each level of each part does to the dense stream.  entry: after the steps at the block's start."""
    t = {name: value.to(entry.x.device) for name, value in found.tensors.items()}
    mid, mixed, _ = block.attend(entry)
    if mixed is not None:
        x, a = block.norm1(entry.x), block.attention
        q, k, v = a.qkv_heads(x)
        bias = entry.size_bias()
        if "qk/left" in t:
            new_q = torch.einsum("bnd,hdr->bhnr", x, t["qk/left"])
            if "qk/bias" in t:
                new_q = new_q + t["qk/bias"][:, None]
            new_k = torch.einsum("bnd,hrd->bhnr", x, t["qk/right"])
            for rank in levels.qk[1:]:
                y = a.attend(new_q[..., :rank], new_k[..., :rank], v, bias)
                emit("qk", rank, f"mid:{i}", (y.transpose(1, 2).flatten(2) - mixed) @ a.out.weight.T)
        if "v/left" in t:
            new_v = torch.einsum("bnd,hdr->bhnr", x, t["v/left"])
            y = a.attend(q, k, new_v, bias).transpose(1, 2)  # B N H R
            for rank in levels.v[1:]:
                update = y[..., :rank].flatten(2) @ t[f"o/{rank}/w"] + t[f"o/{rank}/b"]
                emit("v", rank, f"mid:{i}", update - (mid.x - entry.x))
    theirs, ours = cf.following(block, mid, entry, "mid")
    inner = block.mid(mid)
    for part, kind, before, after in (
        ("hidden", "mlp", inner, block.transform(inner).stream),
        ("off", "off", ours, block.transform(theirs).stream),
    ):
        sizes = sorted({int(name.split("/")[1]) for name in t if name.startswith(f"{kind}/")})
        hidden = block.units(before) if any(sizes) else before.x
        for size in sizes:
            here = f"{kind}/{size}"
            if not size:
                update = t[f"{here}/b"]
            elif f"{here}/frozen" in t:
                update = block.mlp.finish(hidden)
            else:
                update = hidden[..., t[f"{here}/keep"]] @ t[f"{here}/w"]
                if block.mlp.fc2a is not None:
                    update = update @ block.mlp.fc2.weight.T
                update = update + t[f"{here}/b"]
            emit(part, size, f"block:{i}", before.x + update - after.x)


def all_parts(job: Job) -> list[Piece]:
    """The parts of all blocks, in one walk of the dense stream."""
    found: list[Piece] = []
    count = len(job.base.blocks)
    held = cf.StreamCache(job.scratch, "dense")
    like = next(job.base.parameters())
    with torch.no_grad():
        held.fill(job.base.embed(x.to(like)) for x in job.inputs.batches("few"))
    for i, block in enumerate(job.base.blocks):
        found.append(job.kept(f"parts-{i}", partial(block_parts, job, i, held)))
        if i + 1 < count:
            with torch.no_grad():
                held.advance(block.run, job.device)
        job.tell("parts", i + 1, count)
    return found


def score(job: Job) -> Scores:
    """What every option costs alone: blocks' parts, stream widths, merges."""
    rows = job.kept("scores", lambda: _packed(score_blocks(job, all_parts(job)))).values["blocks"]
    blocks = tuple(Losses(**{kind: dict(row[kind]) for kind in KINDS}) for row in rows)
    nets = job.nets
    widths: dict[int, float] = {}
    most = 0.0
    for done, w in enumerate(nets.widths):  # no narrower stream below a wider one: what noise says otherwise
        if done:
            most = max(most, job.kept(f"width-{w}", partial(_narrower, job, w)).values["loss"])
            job.tell("widths", done, len(nets.widths) - 1)
        widths[w] = most
    merged = None
    if len(nets.nodes) > 1:
        merged = Merges.settled(nets.nodes, np.array(job.kept("merges", partial(merge_losses, job)).values["losses"]))
    return Scores(blocks, widths, merged)


MERGED, FEWEST = 2_048, 8
"""Tokens of the held-out images on which merges are measured, and the fewest of these images."""
CARRY_RIDGE = 1e-1
"""Pull of what is carried towards the difference as it is, as a share of the mean square of the differences."""


@torch.no_grad()
def merge_maps(job: Job) -> Piece:
    """What the merges of each block go by: `i/metric` [D, R], where tokens are compared, the least direction first, `i/importance` [D],
    and the factors `i/carry_a` [D, R], `i/carry_b` [R, D].

    metric: the leading directions of what the product minds of patch tokens behind the attention; importance: how much it minds
    each. carry: regression of each token's difference from its nearest at the end of the dense stream on that here, beyond that
    itself.
    """
    base, found, like = job.base, {}, next(job.base.parameters())
    width, count, prefix = base.spec.width, len(base.blocks), len(base.spec.prefix)
    rank = merges.directions(width)
    for i in range(count):
        values, vectors = torch.linalg.eigh(job.sites[f"mid:{i}"].patches)
        scale = (values / values[-1:].clamp_min(1e-300)).clamp_min(0).sqrt()
        found[f"{i}/metric"] = own_memory((vectors * scale)[:, -rank:].to("cpu", like.dtype))
        if job.nets.restores:
            found[f"{i}/importance"] = own_memory(job.sites[f"mid:{i}"].importance.to("cpu", like.dtype))
    if job.nets.restores:
        grams = [torch.zeros(width, width, dtype=torch.float64) for _ in range(count)]
        crosses = [torch.zeros(width, width, dtype=torch.float64) for _ in range(count)]
        names = [*(f"mid:{i}" for i in range(count)), f"block:{count - 1}"]
        for x in job.inputs.batches("sensed"):
            seen = base(x.to(like), gates=OPEN, want=names)
            last = seen[names[-1]][:, prefix:]
            for i, name in enumerate(names[:-1]):
                here = seen[name][:, prefix:]
                apart = [d.flatten(0, 1) for d in _apart(here, found[f"{i}/metric"], (here, last))]
                grams[i] += (apart[0].mT @ apart[0]).to("cpu", torch.float64)
                crosses[i] += (apart[0].mT @ apart[1]).to("cpu", torch.float64)
        for i, (gram, cross) in enumerate(zip(grams, crosses, strict=True)):
            a, b = reduced_rank(gram, cross - gram, merges.carried(width), ridge=CARRY_RIDGE)
            found[f"{i}/carry_a"], found[f"{i}/carry_b"] = (own_memory(one.to(like.dtype)) for one in (a, b))
    return Piece(found, {})


def _apart(x: Tensor, metric: Tensor, streams: Sequence[Tensor]) -> list[Tensor]:
    """Differences of each stream between every token and that which is nearest to it in `x`.  x, streams: B P D -> B P D each"""
    alone = torch.diag(x.new_full(x.shape[1:2], torch.inf))
    nearest = (squared_distances(x @ metric.to(x)) + alone).argmin(-1)
    return [values - take(values, nearest) for values in streams]


@torch.no_grad()
def merge_losses(job: Job) -> Piece:
    """`losses`, [blocks, n]: of the dense stream behind each attention brought down to each node, a rung at a time, columns before rows.

    0 where none is measured.
    """
    nets, base, like, product = job.nets, job.base, next(job.base.parameters()), job.product
    net = surgery.with_spec(base, replace(base.spec, restore=nets.restores), base.state_dict(), share=True).eval()
    sums, done = np.zeros((len(base.blocks), len(nets.nodes))), 0
    tokens = max((at.keys.count for at in token_walk(base.spec)), default=1)
    images, told_of = max(FEWEST, math.ceil(MERGED / tokens)), set(merges.measured(nets.nodes))
    for x in job.inputs.batches("held"):
        x = x[: images - done].to(like)
        stream = net.embed(x)
        before = product.outcome(net(x, gates=OPEN, want=(product.want,))[product.want])
        for i, block in enumerate(net.blocks):
            merged = {nets.nodes[0]: block.attend(stream).stream}
            for n, node in enumerate(nets.nodes[1:], start=1):
                nearest = merges.nearest(nets.nodes, n)
                merged[node] = job.merger(i, nearest, node)(merged[nearest])
                if n not in told_of:
                    continue
                after = block.transform(merged[node]).stream
                told = product.outcome(cf.answers(net, after, i + 1, product.want))
                sums[i, n] += float(product.divergence(before, told).sum())
            stream = block.run(stream)
            job.tell("merges", i + 1, len(base.blocks))
        done += len(x)
        if done >= images:
            break
    return Piece({}, {"losses": (sums / done).tolist()})


KINDS = ("qk", "v", "hidden", "off")


def _packed(rows: Sequence[Losses]) -> Piece:
    return Piece({}, {"blocks": [{kind: sorted(getattr(one, kind).items()) for kind in KINDS} for one in rows]})


def _narrower(job: Job, width: int) -> Piece:
    """The loss of a stream width, with everything else dense."""
    return Piece({}, {"loss": job.divergence(job.narrowed(width, "probe")[0])})


def score_blocks(job: Job, library: Sequence[Piece]) -> list[Losses]:
    """Each level alone, everything else dense, on the held-out images. Each scored batch is noted."""
    generator = torch.Generator().manual_seed(job.config.seed)
    total, done = len(job.inputs.rows["scored"]), 0
    sums: list[dict[tuple[str, int], float]] = [{} for _ in job.base.blocks]
    for n, x in enumerate(job.inputs.batches("scored")):
        noted = job.kept(f"scored-{n}", partial(batch_losses, job, library, x, generator))
        generator.set_state(noted.tensors["signs"])
        for so_far, one in zip(sums, noted.values["blocks"], strict=True):
            for part, size, loss in one:
                so_far[part, size] = so_far.get((part, size), 0.0) + loss
        done += len(x)
        job.tell("score", done, total)
    rows = []
    for found_sums, levels in zip(sums, job.nets.levels, strict=True):
        losses = Losses()
        for (part, size), value in found_sums.items():
            if not math.isfinite(value):
                raise DataError("auto: a score is not finite. Check the weights and the images' normalisation.")
            getattr(losses, part)[size] = value / total
        losses.settle(levels.whole)
        rows.append(losses)
    return rows


def batch_losses(job: Job, library: Sequence[Piece], x: Tensor, generator: torch.Generator) -> Piece:
    """Of each block rows of part, size and the divergences that this level causes, summed over these images [B, C, h, w].

    Also the state in which the generator is left.
    """
    sums: list[dict[tuple[str, int], float]] = [{} for _ in job.base.blocks]
    for part in x.to(next(job.base.parameters())).split(job.graph):
        _add_losses(job, library, part, generator, sums)
    blocks = [[(part, size, lost) for (part, size), lost in block.items()] for block in sums]
    return Piece({"signs": generator.get_state()}, {"blocks": blocks})


def _add_losses(
    job: Job,
    library: Sequence[Piece],
    x: Tensor,
    generator: torch.Generator,
    sums: Sequence[dict[tuple[str, int], float]],
) -> None:
    """Add to the sums of each block, by part and size, what that level loses on images [B, C, h, w]."""
    base, product = job.base, job.product
    grads: fisher.Gradients | None = None
    if job.config.score == "fisher":
        names, draws = cf.places(base), job.config.draws
        grads = fisher.gradients(base, x, names, product=product, draws=draws, generator=generator)
    with torch.no_grad():
        before = product.outcome(base(x, gates=OPEN, want=(product.want,))[product.want])
        stream = base.embed(x)
        for i, (block, found) in enumerate(zip(base.blocks, library, strict=True)):
            entry = block.start(stream)

            def emit(part: str, size: int, place: str, change: Tensor, i: int = i, entry: Stream = entry) -> None:
                if grads is not None:
                    lost = grads.cost(place, change).mean(0)
                else:
                    after = product.outcome(_answer_after(base, i, place, entry, change, product.want))
                    lost = product.divergence(before, after)
                sums[i][part, size] = sums[i].get((part, size), 0.0) + float(lost.sum())

            changes(block, i, job.nets.levels[i], found, entry, emit)
            stream = block.run(stream)


def _answer_after(base: Vit, i: int, place: str, entry: Stream, change: Tensor, want: str) -> Tensor:
    """What the dense network answers when the stream at this place of block `i` is changed."""
    block = base.blocks[i]
    stream = block.attend(entry).stream
    if place.startswith("mid"):
        stream = stream._replace(x=stream.x + change)
    stream = block.transform(block.mid(stream)).stream
    if place.startswith("block"):
        stream = stream._replace(x=stream.x + change)
    return cf.answers(base, block.end(stream), i + 1, want)
