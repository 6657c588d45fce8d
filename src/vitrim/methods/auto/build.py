"""auto: a candidate is built front to back, each half refitted on the stream that the cut network has by then."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import closed_form as cf
from vitrim import surgery
from vitrim.checkpoints import Piece
from vitrim.closed_form import stream_width as narrowing
from vitrim.closed_form import sublayers as parts
from vitrim.methods.auto.choose import Candidate
from vitrim.methods.auto.score import Job, own_memory
from vitrim.model import OPEN, Block, Stream, Vit
from vitrim.spec import BlockSpec, SelectionStep, Similarity, spec_hash, token_walk

FLAT = 1e-3
"""Share of the identity in an output metric, which keeps its root invertible."""
SCORE_ROWS = 128
"""Tokens for each query dim from which the factors of scores are taken: their moments are small."""
HEAD_RIDGE = 0.3
"""Pull of a classifier towards the inherited one: its rows are one an image."""


class Refit:
    """A candidate's network as it is built, block by block, from the dense one in the candidate's stream."""

    def __init__(self, job: Job, candidate: Candidate, part: str, name: str) -> None:
        self.job, self.candidate, self.part, self.name = job, candidate, part, name
        self.basis: narrowing.Basis | None = None
        self.start = job.base
        if candidate.width != job.base.spec.width:
            self.start, self.basis = job.narrowed(candidate.width, part)
        self.goal = job.nets.spec(candidate, tail=False)
        self.state = dict(self.start.state_dict())
        for i, step in candidate.steps:
            if isinstance(step, Similarity) and step.metric:
                self.put_merge(i, step)
        self.kept: list[Tensor | None] = []
        """Hidden units that stay of each block; None: as they are, or none."""

    def target(self, x: Tensor) -> Tensor:
        """The dense stream as the student would have it.  B N D -> B N D'"""
        return x if self.basis is None else x @ self.basis.down.to(x)

    def metric(self, name: str) -> Tensor:
        """The place's output metric in the student's stream, mean diagonal 1."""
        wide = self.job.sites[name].metric
        if self.basis is None:
            return wide
        f = self.basis.up.mT @ wide @ self.basis.up
        mean, eye = float(f.diagonal().mean()), torch.eye(len(f), dtype=f.dtype)
        return (f / mean + FLAT * eye) / (1 + FLAT) if mean > 0 else eye  # a narrow stream has one empty direction

    def module(self, i: int, spec: BlockSpec) -> Block:
        """Block `i` with the halves of `spec` and the weights so far."""
        here = f"blocks.{i}."
        with torch.device("meta"):
            block = Block(spec, self.goal.width, self.goal.norm_eps, token_walk(self.goal)[i])
        own = {name.removeprefix(here): value for name, value in self.state.items() if name.startswith(here)}
        block.load_state_dict(own, strict=True, assign=True)
        return block.eval()

    def put(self, name: str, value: Tensor | None) -> None:
        assert value is not None  # a refit gives a bias unless it is told not to
        self.state[name] = own_memory(value.to(next(self.start.parameters())))

    def put_merge(self, i: int, step: Similarity) -> None:
        """The weights of the similarity step of block `i`, in the student's stream."""
        metric = parts.double(self.job.maps[f"{i}/metric"])
        if self.basis is not None:
            metric = self.basis.up.mT @ metric
        self.put(f"blocks.{i}.steps.0.metric", metric[:, -(step.metric or 0) :])
        if step.carry:  # of a stream whose tokens are the product: it is not narrower
            for name in ("importance", "carry_a", "carry_b"):
                self.put(f"blocks.{i}.steps.0.{name}", self.job.maps[f"{i}/{name}"])

    def forget(self, *modules: str) -> None:
        for name in [n for n in self.state if n.startswith(tuple(f"{module}." for module in modules))]:
            del self.state[name]

    # -- one block

    def attention(self, i: int, walk: cf.Walk) -> None:
        """Cut and refit the attention of block `i` on the student's stream towards the dense one."""
        before, after = self.start.spec.blocks[i].attention, self.goal.blocks[i].attention
        if before is None or not self.job.nets.levels[i].refit[0]:
            return
        here, site = f"blocks.{i}.attention", f"mid:{i}"
        if after is None:
            self.forget(here, f"blocks.{i}.norm1")
            return
        spec = replace(self.goal.blocks[i], attention=before, mlp=self.start.spec.blocks[i].mlp)
        if after.qk_dim < before.qk_dim:
            block: Block = self.module(i, spec)
            scores = parts.Scores()
            rows = 0
            for _, stream in walk.pairs():
                entry = block.start(stream)
                q, k, _ = block.attention.qkv_heads(block.norm1(entry.x))
                scores.add(q, k, self.job.weights(site, q.shape[2]).to(q))
                rows += entry.x.shape[0] * entry.x.shape[1]
                if rows >= SCORE_ROWS * before.qk_dim:
                    break
            factors = scores.factors(block.attention).sliced(after.qk_dim)
            _, _, v, _ = parts.head_weights(block.attention)
            factored = [_rows(factors.left), _rows(factors.right.mT), _rows(v)]
            self.put(f"{here}.qkv", torch.cat(factored))
            self.state.pop(f"{here}.k_bias", None)
            if factors.left_bias is not None:
                self.put(f"{here}.q_bias", factors.left_bias.flatten())
            before = replace(before, qk_dim=after.qk_dim, k_bias=False)
            spec = replace(spec, attention=before)
        block = self.module(i, spec)
        stats = cf.Regression.empty(before.heads * before.v_dim, self.goal.width, device=self.job.device)
        for mixed, goal, _ in walk.attention(self.job.base.blocks[i], block):
            stats.add(mixed, goal, self.job.weights(site, goal.shape[1]).to(goal))
        b: Tensor | None
        if after.v_dim < before.v_dim:
            found = parts.values(block.attention, stats, self.metric(site))
            w, b = parts.output(stats, found, after.v_dim, block.attention.v_bias, ridge=self.job.config.output_ridge)
            kept = parts.double(block.attention.qkv)[: 2 * before.heads * before.qk_dim]
            self.put(f"{here}.qkv", torch.cat([kept, _rows(found.left[..., : after.v_dim])]))
            self.state.pop(f"{here}.v_bias", None)
        else:
            w, b = cf.refit(stats, parts.double(block.attention.out.weight).T, ridge=self.job.config.output_ridge)
        self.put(f"{here}.out.weight", w.T)
        self.put(f"{here}.out.bias", b)

    def mlp(self, i: int, walk: cf.Walk) -> tuple[Tensor | None, Tensor | None]:
        """Cut and refit the MLP of block `i`; gives the hidden units that stay (None: all, or none).

        Also what a block without any half should add to the stream, [D'], for the block before it.
        """
        before, after = self.start.spec.blocks[i].mlp, self.goal.blocks[i].mlp
        levels = self.job.nets.levels[i]
        lost = self.start.spec.blocks[i].attention is not None and self.goal.blocks[i].attention is None
        if not levels.refit[1] and not (before is None and lost):
            return None, None
        here, site = f"blocks.{i}.mlp", f"block:{i}"
        block: Block = self.module(i, replace(self.goal.blocks[i], mlp=before))
        stats = cf.Regression.empty(1 if after is None else before.hidden, self.goal.width, device=self.job.device)  # type: ignore[union-attr]
        for hidden, goal, _ in walk.mlp(self.job.base.blocks[i], block, _ones if after is None else None):
            stats.add(hidden, goal, self.job.weights(site, goal.shape[1]).to(goal))
        if after is None:
            self.forget(here, f"blocks.{i}.norm2")
            mean = parts.mean_target(stats)
            if self.goal.blocks[i].attention is None:
                return None, mean
            if levels.refit[0]:
                bias = f"blocks.{i}.attention.out.bias"
                self.put(bias, parts.double(self.state[bias]) + mean)
                walk.changed()
            return None, None  # in front of a frozen attention the mean would change what it reads
        assert before is not None
        last, metric = parts.last_linear(block.mlp), self.metric(site)
        keep = None
        if after.hidden < before.hidden:
            order = parts.elimination(stats, last, metric, ridge=self.job.config.ridge)
            keep = order.kept(after.hidden)
            rows = torch.cat([keep, keep + before.hidden]) if before.kind == "swiglu" else keep
            for name in (f"{here}.fc1.weight", f"{here}.fc1.bias"):
                if (value := self.state.get(name)) is not None:
                    self.put(name, value[rows.to(value.device)])
        w, b = parts.refitted(stats, last, metric, ridge=self.job.config.ridge, keep=keep)
        self.put(f"{here}.{'fc2' if last.outputs is None else 'fc2a'}.weight", w.T)
        self.put(f"{here}.fc2.bias", b)
        return keep, None

    def refitted(self, i: int, walk: cf.Walk) -> Piece:
        """The tensors of block `i`; `/keep`: hidden units that stay; `/shift`: what the half before it is to add."""
        self.attention(i, walk)
        keep, mean = self.mlp(i, walk)
        found = {name: own_memory(value) for name, value in self.state.items() if name.startswith(f"blocks.{i}.")}
        extra = {"/keep": keep, "/shift": mean if self.before(i) else None}
        return Piece(found | {name: value for name, value in extra.items() if value is not None}, {})

    def before(self, i: int) -> str | None:
        """The bias of the last half before block `i`. None where there is no such half, or it is frozen."""
        if not i:
            return None
        block, refit = self.goal.blocks[i - 1], self.job.nets.levels[i - 1].refit
        if block.mlp is not None:
            return f"blocks.{i - 1}.mlp.fc2.bias" if refit[1] else None
        return f"blocks.{i - 1}.attention.out.bias" if refit[0] and block.attention is not None else None

    @torch.no_grad()
    def build(self) -> Vit:
        """The network, with the prefix step if the result has one."""
        job, count = self.job, len(self.goal.blocks)
        like = next(job.base.parameters())
        walk = cf.Walk(
            (job.base.embed(x.to(like)) for x in job.inputs.batches(self.part)),
            (self.start.embed(x.to(like)) for x in job.inputs.batches(self.part)),
            folder=job.scratch,
            device=job.device,
            target=self.target,
        )
        for i in range(count):
            found = job.kept(f"{self.name}-{i}", partial(self.refitted, i, walk)).tensors
            self.forget(f"blocks.{i}")
            self.state |= {name: value.to(like.device) for name, value in found.items() if name.startswith("blocks.")}
            self.kept.append(found.get("/keep"))
            if (shift := found.get("/shift")) is not None and (bias := self.before(i)):
                self.put(bias, parts.double(self.state[bias]) + shift)
            if i + 1 < count:
                walk.advance(job.base.blocks[i], self.module(i, self.goal.blocks[i]), shift=shift)
            job.tell(self.name.split("-")[0], i + 1, count)
        spec = job.nets.spec(self.candidate)
        blocks, parent = tuple(self.record(i) for i in range(count)), spec_hash(job.model.spec)
        last = SelectionStep(method="auto", variant=job.config.score, parent=parent, refit=True, blocks=blocks)
        small = surgery.with_spec(job.model, spec, self.state, last).eval()
        self.refit_heads(small)
        return small

    @torch.no_grad()
    def losses_by_block(self, images: int) -> list[float]:
        """Divergences of the networks whose first 0, 1, ..., L blocks are those built here and the rest dense; once built.

        images: of those on which options are scored.
        """
        job, product, count = self.job, self.job.product, len(self.goal.blocks)
        like = next(job.base.parameters())
        spec = replace(self.start.spec, restore=self.goal.restore)
        dense = surgery.with_spec(self.start, spec, self.start.state_dict(), share=True).eval()
        blocks = [self.module(i, self.goal.blocks[i]) for i in range(count)]
        sums, done = [0.0] * (count + 1), 0
        for x in job.inputs.batches("scored"):
            x = x[: images - done].to(like)
            before = product.outcome(job.base(x, gates=OPEN, want=(product.want,))[product.want])
            stream = dense.embed(x)
            for i in range(count + 1):
                after = product.outcome(cf.answers(dense, stream, i, product.want))
                sums[i] += float(product.divergence(before, after).sum())
                stream = blocks[i].run(stream) if i < count else stream
            done += len(x)
            if done >= images:
                break
        return [value / done for value in sums]

    def refit_heads(self, small: Vit) -> None:
        """The last linear of each classifier, on what the student gives it, towards the dense logits."""
        base, like = self.job.base, next(self.job.base.parameters())
        found: dict[str, cf.Regression] = {}
        for x in self.job.inputs.batches(self.part) if small.spec.outputs else ():
            theirs = base(x.to(like), gates=OPEN, want=("outputs",))["outputs"]
            for name, seen in small(x.to(like), gates=OPEN, want=("reads",))["reads"].items():
                if name not in found:
                    found[name] = cf.Regression.empty(seen.shape[1], theirs[name].shape[1], device=self.job.device)
                found[name].add(seen, theirs[name])
        for name, stats in found.items():
            head = small.heads[name]
            assert isinstance(head, nn.Linear)
            w, b = cf.refit(stats, parts.double(head.weight).T, ridge=HEAD_RIDGE, bias=head.bias is not None)
            head.weight.copy_(w.T)
            if b is not None:
                head.bias.copy_(b)

    def record(self, i: int) -> dict[str, Any] | None:
        """How block `i` was cut, for the selection."""
        before, after = self.job.nets.base.blocks[i], self.goal.blocks[i]
        levels = self.job.nets.levels[i]
        entry: dict[str, Any] = {}
        if before.attention is not None and levels.refit[0]:
            entry["attention"] = "gone" if after.attention is None else "rotated"
        if before.mlp is not None and levels.refit[1]:
            keep = self.kept[i]
            if after.mlp is None:
                entry["mlp"] = "gone"
            elif self.candidate.width != self.job.base.spec.width:
                entry["mlp"] = "rotated"
            else:
                entry["mlp"] = {"hidden": None if keep is None else keep.tolist()}
        return entry or None


def _ones(stream: Stream) -> Tensor:  # B N D -> B N 1
    return stream.x.new_ones(*stream.x.shape[:2], 1)


def _rows(factor: Tensor) -> Tensor:  # H D R -> (H R) D
    return factor.mT.flatten(0, 1)
