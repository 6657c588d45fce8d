"""Stems: images to patch tokens. Part of the runtime: torch alone."""

from __future__ import annotations

from torch import Tensor, nn

from .spec import ConvStem, ModelSpec


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


__all__ = ["ConvPatches"]
