"""Stems: images to patch tokens. Part of the runtime: torch alone."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .spec import ConvStem, ModelSpec, T2TPerformer, T2TTransformer

EPSILON = 1e-8
"""Added to the denominator of the linear attention (T2T-ViT, `token_performer.py`)."""


class ConvPatches(nn.Module):
    """Patches by one strided convolution."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert isinstance(spec.stem, ConvStem)
        self.proj = nn.Conv2d(
            spec.channels, spec.width, kernel_size=spec.patch_px, stride=spec.patch_px, bias=spec.stem.bias
        )

    def forward(self, x: Tensor) -> Tensor:  # B C h w -> B patches D
        return self.proj(x).flatten(2).transpose(1, 2)


def soft_split(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Overlapping patches, zeros beyond the border, so many that each side shrinks by the stride exactly.

    x: B C h w -> B (h/stride w/stride) (C kernel kernel), places row by row, features by channel, row, column.
    """
    return F.unfold(x, kernel, padding=padding(kernel, stride), stride=stride).transpose(1, 2)


def padding(kernel: int, stride: int) -> int:
    """Zeros on each side of a soft split: 2 for 7/4, 1 for 3/2."""
    return (kernel - stride + 1) // 2


class TokenTransformer(nn.Module):
    """A narrowing stage of T2T-ViT: one-head attention whose shortcut is the values, then an MLP of the same width.

    The softmax scale is that of the *input* width, as in the released networks; queries, keys, values carry no bias.
    """

    def __init__(self, inputs: int, stem: T2TTransformer, eps: float) -> None:
        super().__init__()
        e = stem.token_dim
        self.scale = inputs**-0.5
        self.norm1 = nn.LayerNorm(inputs, eps=eps)
        self.qkv = nn.Linear(inputs, 3 * e, bias=False)  # rows: queries, keys, values
        self.proj = nn.Linear(e, e)
        self.norm2 = nn.LayerNorm(e, eps=eps)
        self.fc1 = nn.Linear(e, e)
        self.fc2 = nn.Linear(e, e)

    def forward(self, x: Tensor) -> Tensor:  # B T inputs -> B T e
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, dim=-1)  # each B 1 T e
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = v[:, 0] + self.proj(y[:, 0])
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TokenPerformer(nn.Module):
    """The same stage with linear attention by positive random features, which are fixed.

    The projections carry biases, and their rows are in the order keys, queries, values. Features, sums over tokens and
    the division run in float32 at least, under autocast too. The dropout of 0.1 that the authors' code has here in
    training is left out.
    """

    def __init__(self, inputs: int, stem: T2TPerformer, eps: float) -> None:
        super().__init__()
        e = stem.token_dim
        self.features = nn.Parameter(torch.empty(stem.features, e), requires_grad=False)
        self.norm1 = nn.LayerNorm(inputs, eps=eps)
        self.kqv = nn.Linear(inputs, 3 * e)  # rows: keys, queries, values
        self.proj = nn.Linear(e, e)
        self.norm2 = nn.LayerNorm(e, eps=eps)
        self.fc1 = nn.Linear(e, e)
        self.fc2 = nn.Linear(e, e)

    def forward(self, x: Tensor) -> Tensor:  # B T inputs -> B T e
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = v + self.proj(self._attend(k, q, v).to(v.dtype))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def phi(self, x: Tensor) -> Tensor:
        """exp(<w, x> - |x|^2 / 2) / sqrt(m) for each of the m features w.  B T e -> B T m."""
        w = self.features.to(x.dtype)
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0])

    def _attend(self, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        device = v.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
            k, q, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (k, q, v))
            k, q = self.phi(k), self.phi(q)  # B T m
            total = k.sum(1)[:, :, None]  # B m 1
            mixed = k.transpose(1, 2) @ v  # B m e
            return (q @ mixed) / (q @ total + EPSILON)


class TokensToTokens(nn.Module):
    """Patches by three soft splits with a stage after the first and the second, and a projection to the width.

    Source   Yuan et al., ICCV 2021, arXiv:2101.11986; the authors' released networks.
    Departs  takes rectangles too, by carrying rows and columns.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        stem = spec.stem
        assert not isinstance(stem, ConvStem)
        self.splits = tuple(zip(stem.kernels, stem.strides, strict=True))
        widths = (spec.channels * stem.kernels[0] ** 2, stem.token_dim * stem.kernels[1] ** 2)
        self.stages = nn.ModuleList(
            TokenTransformer(width, stem, spec.norm_eps)
            if isinstance(stem, T2TTransformer)
            else TokenPerformer(width, stem, spec.norm_eps)
            for width in widths
        )
        self.project = nn.Linear(stem.token_dim * stem.kernels[2] ** 2, spec.width)

    def forward(self, x: Tensor) -> Tensor:  # B C h w -> B patches D
        for stage, (kernel, stride) in zip(self.stages, self.splits[:2], strict=True):
            grid = (x.shape[2] // stride, x.shape[3] // stride)
            x = stage(soft_split(x, kernel, stride)).transpose(1, 2).unflatten(2, grid)  # B e rows cols
        return self.project(soft_split(x, *self.splits[2]))
