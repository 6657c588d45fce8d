"""T2T-ViT written again in plain torch with its authors' names and no code of ours, as the source's counterpart.

Their repository is no package, so this follows the published structure: keys, orders, scales, the fixed table. `T2T_ViT`
takes the arguments of theirs. Images are square.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TokenAttention(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.num_heads = 1
        self.scale = inputs**-0.5
        self.width = width
        self.qkv = nn.Linear(inputs, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.qkv(x)
        q, k, v = rows[..., : self.width], rows[..., self.width : 2 * self.width], rows[..., 2 * self.width :]
        weights = (torch.einsum("bne,bme->bnm", q, k) * self.scale).softmax(-1)
        return v + self.proj(torch.einsum("bnm,bme->bne", weights, v))


class Token_transformer(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs)
        self.attn = TokenAttention(inputs, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Token_performer(nn.Module):
    def __init__(self, inputs: int, width: int, kernel_ratio: float = 0.5) -> None:
        super().__init__()
        self.emb, self.head_cnt, self.epsilon = width, 1, 1e-8
        self.m = int(width * kernel_ratio)
        self.kqv = nn.Linear(inputs, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(inputs)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(0.1))
        self.w = nn.Parameter(
            nn.init.orthogonal_(torch.empty(self.m, width)) * math.sqrt(self.m)
            if torch.get_default_device().type != "meta"
            else torch.empty(self.m, width),
            requires_grad=False,
        )

    def phi(self, x: Tensor) -> Tensor:
        half_square = (x * x).sum(-1, keepdim=True).repeat(1, 1, self.m) / 2
        return torch.exp(torch.einsum("bti,mi->btm", x, self.w) - half_square) / math.sqrt(self.m)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = torch.split(self.kqv(self.norm1(x)), self.emb, dim=-1)
        kp, qp = self.phi(k), self.phi(q)
        divisor = torch.einsum("bti,bi->bt", qp, kp.sum(1)).unsqueeze(2)
        mixed = torch.einsum("bin,bim->bnm", v, kp)
        y = torch.einsum("bti,bni->btn", qp, mixed) / (divisor.repeat(1, 1, self.emb) + self.epsilon)
        x = v + self.proj(y)
        return x + self.mlp(self.norm2(x))


class T2T_module(nn.Module):
    def __init__(self, tokens_type: str, embed_dim: int, token_dim: int, in_chans: int) -> None:
        super().__init__()
        stage = {"transformer": Token_transformer, "performer": Token_performer}[tokens_type]
        self.soft_split0 = nn.Unfold(kernel_size=(7, 7), stride=(4, 4), padding=(2, 2))
        self.soft_split1 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        self.soft_split2 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        self.attention1 = stage(in_chans * 49, token_dim)
        self.attention2 = stage(token_dim * 9, token_dim)
        self.project = nn.Linear(token_dim * 9, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.soft_split0(x).transpose(1, 2)
        for stage, split in ((self.attention1, self.soft_split1), (self.attention2, self.soft_split2)):
            x = stage(x)
            side = int(math.sqrt(x.shape[1]))
            x = split(x.transpose(1, 2).reshape(x.shape[0], -1, side, side)).transpose(1, 2)
        return self.project(x)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, qkv_bias: bool, qk_scale: float | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, hidden: int, qkv_bias: bool, qk_scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, qkv_bias, qk_scale)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class T2T_ViT(nn.Module):
    def __init__(
        self,
        img_size: int = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        token_dim: int = 64,
    ) -> None:
        super().__init__()
        self.tokens_to_token = T2T_module(tokens_type, embed_dim, token_dim, in_chans)
        rows = (img_size // 16) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(table(rows, embed_dim), requires_grad=False)
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, hidden, qkv_bias, qk_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def table(rows: int, width: int) -> Tensor:
    """1 rows D: sine at even, cosine at odd columns; the angle of column j is n / 10000^(2 floor(j/2) / D)."""
    found = torch.empty(rows, width, dtype=torch.float64)
    for j in range(width):
        angles = torch.arange(rows, dtype=torch.float64) / 10000 ** (2 * (j // 2) / width)
        found[:, j] = angles.sin() if j % 2 == 0 else angles.cos()
    return found.float()[None]


def tiny(tokens_type: str = "performer", *, seed: int = 0, **fields: Any) -> T2T_ViT:
    """A small network in float64 and eval mode, every number random but the table."""
    arguments = {"img_size": 32, "num_classes": 5, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0}
    module = T2T_ViT(tokens_type=tokens_type, **{**arguments, "token_dim": 8, **fields}).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name == "pos_embed":
                continue
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            near_one = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.3 * values if near_one else values * (0.3 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return module


__all__ = ["T2T_ViT", "table", "tiny"]
