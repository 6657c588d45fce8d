"""The paper's way: metric images, a trial for each block, progressive compression; all by gradient steps on the teacher's features."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim import closed_form as cf
from vitrim import surgery
from vitrim.budget import Budget
from vitrim.checkpoints import Piece
from vitrim.closed_form import fisher
from vitrim.data.draws import mix, ranked
from vitrim.freezing import Half
from vitrim.methods.dcvit.job import Job
from vitrim.methods.dcvit.structure import Structure, candidates, chosen_blocks, structure
from vitrim.methods.fitting import kept
from vitrim.model import OPEN, Vit
from vitrim.progress import Progress
from vitrim.spec import Preprocess
from vitrim.surgery import Keep
from vitrim.training import Batch, Step, TrainConfig, fit
from vitrim.training.objectives import Plain

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SUBSET, _NOISE = 0x6463_7375, 0x6463_6E6F


class Mimic(Plain):
    """The teacher's token features after the final norm; squared error, a mean over all elements. No labels, no logits.

    Trains everything up to and including block `last`, and the final norm; later blocks and the classifier are frozen, and
    gradients pass through them. warmup_epochs: the released code's loss scaling, 0 in the first epoch; 0: none.
    """

    def __init__(self, teacher: Vit, *, last: int, fixed: frozenset[Half], warmup_epochs: int = 0) -> None:
        super().__init__()
        self.teacher, self.last, self.fixed, self.warmup_epochs = teacher, last, fixed, warmup_epochs

    def trained(self, name: str) -> bool:
        """Whether the parameter of this name learns."""
        parts = name.split(".")
        if parts[0] in ("heads", "pool", "pool_norm"):
            return False
        if parts[0] != "blocks":
            return True
        half = {"norm1": "attention", "norm2": "mlp"}.get(parts[2], parts[2])
        return int(parts[1]) <= self.last and (int(parts[1]), half) not in self.fixed

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        first = next(model.parameters())
        self.teacher = self.teacher.to(first.device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and self.trained(name))
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        with torch.no_grad():
            aim = self.teacher(batch.images, gates=OPEN, want=("tokens",))["tokens"]
        found = model(batch.images, gates=OPEN, want=("tokens",))["tokens"]
        scale = min(1.0, step.epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        return scale * F.mse_loss(found, aim)


def finetune(job: Job, student: Vit, *, last: int, steps: int, out: Path | None = None, what: str = "finetune") -> Vit:
    """The student after section 8's fine-tuning; what was given is trained in place. Float32 (or the model's own) throughout.

    last: the block that was cut last; the one behind it learns too. what: the name of this in the progress.
    """
    config, inputs, last = job.config, job.inputs, min(last + 1, len(job.base.blocks) - 1)
    assert inputs.images is not None  # `compress_family` has refused that
    paper = config.variant == "finetune" and config.preset == "paper"
    batch = min(64, inputs.count)
    settings = TrainConfig(
        steps=steps * -(-inputs.count // batch) if paper else steps,
        batch_size=batch,
        lr=config.lr,
        min_lr=0.0,
        warmup=0.0 if paper else min(0.5, 20 / max(steps, 40)),
        weight_decay=1e-4,
        clip=None,
        augment=config.augment,
        seed=config.seed,
        device=job.device.type,  # type: ignore[arg-type]
        log_every=max(1, steps // 20),
    )
    own = student.config
    if paper and own.preprocess is not None and len(own.preprocess.mean) == 3:
        student.config = replace(own, preprocess=replace(own.preprocess, mean=IMAGENET[0], std=IMAGENET[1]))

    def told(stage: str, done: int, total: int, **facts: Any) -> None:
        job.tell(what, done, total, **facts)

    wanted = {name: p.requires_grad for name, p in student.named_parameters()}
    try:
        fit(
            student,
            Mimic(job.base, last=last, fixed=job.space.fixed, warmup_epochs=20 if paper else 0),
            inputs.images,
            settings,
            out=out,
            resume=job.resume,
            progress=told,
        )
    finally:
        student.config = own
        for name, p in student.named_parameters():
            p.requires_grad_(wanted[name])
    return student


def synthesise(
    teacher: Vit, count: int, steps: int, *, seed: int, size_px: tuple[int, int], progress: Progress | None = None
) -> Tensor:
    """Images [count, C, h, w] that the teacher finds typical of as many classes, from noise: the metric set.

    DeepInversion (arXiv 1912.08795) without its feature term: cross entropy, total variation 1e-4, norm 1e-5; Adam 0.25
    with betas 0.5 and 0.9, 100 steps of warm-up, half a cosine. The whole batch with the lowest loss is kept. With fewer
    classes than images, classes repeat.
    """
    preprocess, spec = teacher.config.preprocess, teacher.spec
    assert spec.classes is not None
    like = next(teacher.parameters())
    generator = torch.Generator().manual_seed(int(mix(seed, _NOISE)[0] >> np.uint64(1)))
    shape = (count, spec.channels, *size_px)
    classes = torch.cat([torch.randperm(spec.classes, generator=generator) for _ in range(-(-count // spec.classes))])
    classes = classes[:count].sort().values.to(like.device)
    images = torch.randn(shape, generator=generator).to(like).requires_grad_()
    low = high = None
    if preprocess is not None:
        mean, std = (torch.tensor(v).view(-1, 1, 1).to(like) for v in (preprocess.mean, preprocess.std))
        low, high = -mean / std, (1 - mean) / std
    optimizer = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.9), eps=1e-8)
    best, lowest = images.detach().clone(), math.inf
    warm = min(100, max(1, steps // 10))
    reach = max(1, round(30 / 224 * max(size_px)))
    for at in range(steps):
        rate = (at + 1) / warm if at < warm else 0.5 * (1 + math.cos(math.pi * (at - warm) / max(1, steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = 0.25 * rate
        drawn = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        turned = images.roll(drawn, dims=(2, 3))
        if bool(torch.rand((), generator=generator) < 0.5):
            turned = turned.flip(3)
        with torch.enable_grad():
            logits = teacher(turned, gates=OPEN)
            spread = sum(
                d.square().sum().clamp_min(1e-20).sqrt() ** 0.6
                for d in (
                    turned[..., :, 1:] - turned[..., :, :-1],
                    turned[..., 1:, :] - turned[..., :-1, :],
                    turned[..., 1:, 1:] - turned[..., :-1, :-1],
                    turned[..., 1:, :-1] - turned[..., :-1, 1:],
                )
            )
            loss = F.cross_entropy(logits, classes) + 1e-4 * spread + 1e-5 * turned.flatten(1).norm(dim=1).mean()
            (gradient,) = torch.autograd.grad(loss, images)
        now = float(loss.detach())
        if now < lowest:
            best, lowest = images.detach().clone(), now
        images.grad = gradient
        optimizer.step()
        if low is not None and high is not None:
            with torch.no_grad():
                images.copy_(images.clamp(low, high))
        if progress is not None:
            progress("synthesise", at + 1, steps, loss=now)
    return best


def jpeg_round_trip(images: Tensor, preprocess: Preprocess) -> Tensor:
    """The released code's way of the metric images over the disk: stretched, JPEG, resized, cropped, ImageNet constants."""
    from PIL import Image
    from torchvision.transforms import functional as transforms

    found = []
    height, width = images.shape[-2:]
    for image in images.cpu().float():
        low, high = image.min(), image.max()
        pixels = ((image - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
        file = io.BytesIO()
        transforms.to_pil_image(pixels).save(file, format="JPEG")
        with Image.open(file) as back:
            resized = transforms.resize(back.convert("RGB"), round(min(height, width) * 256 / 224))
        x = transforms.to_tensor(transforms.center_crop(resized, [height, width]))
        found.append(transforms.normalize(x, *IMAGENET))
    return torch.stack(found).to(images)


def metric_images(job: Job) -> Tensor:
    """Images on which trials are compared, in the network's own input, on the CPU."""
    base, inputs, config = job.base, job.inputs, job.config
    if not base.spec.outputs:  # nothing to synthesise from: the images themselves, as the paper's ablation has them
        enough = islice(inputs.batches(), -(-config.metric_images // inputs.batch_size))
        return torch.cat(list(enough))[: config.metric_images].cpu()
    images = synthesise(
        base,
        config.metric_images,
        config.metric_steps,
        seed=config.seed,
        size_px=base.spec.image_px,
        progress=job.progress,
    )
    preprocess = base.config.preprocess
    if config.preset == "paper" and preprocess is not None and len(preprocess.mean) == 3:
        images = jpeg_round_trip(images, preprocess)
    return images.cpu()


def subset(hidden: int, keep: int, *, seed: int, block: int, draw: int = 0) -> tuple[int, ...]:
    """A uniform subset of the hidden units, sorted: a function of (seed, block, draw) alone."""
    return tuple(sorted(int(u) for u in ranked(seed, _SUBSET, block, draw, np.arange(hidden))[:keep]))


def narrow(job: Job, student: Vit, index: int, hidden: int, *, draw: int = 0) -> tuple[Vit, Keep]:
    """The student with one block compressed, weights inherited as they are, and what was kept."""
    mlp = student.spec.blocks[index].mlp
    assert mlp is not None
    keep = Keep(attention=False, hidden=subset(mlp.hidden, hidden, seed=job.config.seed, block=index, draw=draw))
    keeps: list[Keep | None] = [None] * len(student.spec.blocks)
    keeps[index] = keep
    return surgery.cut(student, keeps, method="dcvit", variant="finetune", skip=job.space.fixed), keep


@torch.no_grad()
def mismatch(teacher: Vit, student: Vit, x: Tensor, batch_size: int, product: fisher.Product) -> float:
    """How far the student's product is from the teacher's on the metric images."""
    like = next(teacher.parameters())
    before, after = (
        torch.cat([cf.answers(net, net.embed(part.to(like)), 0, product.want).cpu() for part in x.split(batch_size)])
        for net in (teacher, student)
    )
    return product.apart(before, after)


def by_finetuning(job: Job, budget: Budget) -> tuple[Vit, list[Keep | None], list[dict[str, Any]], dict[str, Any]]:
    """The paper's way: structure, metric images, a trial for each candidate, progressive compression.

    Gives the student, what was kept of each block, the history and the report.
    """
    base, config, space = job.base, job.config, job.space
    shape, limits, paper = structure(space, config, budget), budget.limits(space.reference), config.preset == "paper"
    keeps: list[Keep | None] = [None] * len(base.blocks)
    scores, best = _trials(job, shape, limits)
    ranking = sorted(scores, key=lambda i: (scores[i], i))
    if paper:
        order = ranking[: shape.k]
        widths = {i: shape.hidden[i] for i in order}
    else:
        order, widths = chosen_blocks(space, ranking, shape, limits, scores)
    student, trained = base, 0
    if order[0] == ranking[0]:  # its trial was the best
        student, keeps[order[0]] = narrow(job, base, order[0], widths[order[0]])
        student.load_state_dict({n: t.to(job.device) for n, t in best.items()})
        trained = 1
    for nth, i in enumerate(order[trained:], start=trained):
        student, keeps[i] = narrow(job, student, i, widths[i], draw=nth if paper else 0)
        what = f"compress block {i}, {nth + 1 - trained} of {len(order) - trained}"
        finetune(job, student, last=max(order[: nth + 1]), steps=config.steps, out=job.place(f"stage-{i}"), what=what)
    history = [{"stage": "trial", "block": i, "mismatch": mismatch} for i, mismatch in scores.items()]
    report = {
        "k": len(order),
        "order": order,
        "metric": "synthetic images" if base.spec.outputs else "the few images themselves",
        "counted": shape.counted,
        "preset": config.preset,
        "steps": config.steps,
    }
    return student, keeps, history, report


def _trials(job: Job, shape: Structure, limits: Mapping[str, int]) -> tuple[dict[int, float], dict[str, Tensor]]:
    """The mismatch after compressing each candidate alone, and the weights of the best student; noted as they come."""
    journal, found = job.journal(limits=limits), candidates(job.space)
    metric = kept(journal, "metric", lambda: Piece({"images": metric_images(job)}, {})).tensors["images"]
    scores: dict[int, float] = {}
    best: dict[str, Tensor] = {}
    for done, i in enumerate(found, start=1):
        weights: dict[str, Tensor] = {}
        if (noted := journal.get(f"trial-{i}")) is not None:
            weights, scores[i] = noted.tensors, noted.values["mismatch"]
        else:
            student, _ = narrow(job, job.base, i, shape.hidden[i])
            out, what = job.place(f"trial-{i}"), f"trial of block {i}, {done} of {len(found)}"
            finetune(job, student, last=i, steps=job.config.steps, out=out, what=what)
            scores[i] = mismatch(job.base, student, metric, job.config.batch_size, job.product)
            if scores[i] < min((lost for j, lost in scores.items() if j != i), default=math.inf):
                weights = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
            journal.put(f"trial-{i}", weights, {"mismatch": scores[i]})
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
        best = weights or best
    return scores, best
