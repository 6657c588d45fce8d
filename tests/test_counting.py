"""Golden counts, and the sheets' reference vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.specs import vit
from vitrim.counting import attention_macs, cost, mlp_macs, similarity_macs
from vitrim.errors import SpecError
from vitrim.spec import AttentionSpec, MlpSpec, ModelSpec, Similarity


def deit(width: int, heads: int) -> ModelSpec:
    return vit(width=width, blocks=12, heads=heads, head_dim=64, hidden=4 * width, image=224, patch=16, classes=1000)


@pytest.mark.parametrize(
    ("width", "heads", "macs", "params"),
    [(192, 3, 1_253_683_200, 5_717_416), (384, 6, 4_598_882_304, 22_050_664), (768, 12, 17_563_828_224, 86_567_656)],
)
def test_deit_counts_are_the_published_ones(width: int, heads: int, macs: int, params: int) -> None:
    found = cost(deit(width, heads))
    assert (found.macs, found.params, found.flops) == (macs, params, 2 * macs)
    assert found.file_bytes == 4 * params


@pytest.mark.parametrize(
    ("width", "heads", "rank", "f", "params", "macs"),
    [(384, 6, 32, 152, 11_348_584, 2_314_010_112), (768, 12, 24, 256, 35_818_600, 7_123_950_336)],
)
def test_factorised_deit_counts_are_those_of_the_comcat_sheet(
    width: int, heads: int, rank: int, f: int, params: int, macs: int
) -> None:
    spec = deit(width, heads)
    block = replace(
        spec.blocks[0],
        attention=AttentionSpec(heads=heads, qk_dim=rank, v_dim=rank, scale=0.125, k_bias=False, v_bias=False),
        mlp=MlpSpec(hidden=4 * width, fc1_rank=f, fc2_rank=f),
    )
    found = cost(replace(spec, blocks=(block,) * 12))
    assert (found.params, found.macs) == (params, macs)


def test_the_formulas_add_up_to_the_total() -> None:
    found = cost(deit(192, 3))
    assert found.macs == found.stem_macs + found.head_macs + sum(block.macs for block in found.blocks)
    assert found.params == found.stem_params + found.head_params + sum(block.params for block in found.blocks)
    assert found.blocks[0].attention_macs == attention_macs(3, 64, 64, tokens=197, width=192)
    assert found.blocks[0].mlp_macs == mlp_macs(768, tokens=197, width=192)


def test_what_has_no_spec_is_refused() -> None:
    with pytest.raises(SpecError, match="cost: str has no spec; expected a model"):
        cost("builtin:cifar10-vit-micro")


def test_the_formulas_take_tensors() -> None:
    import torch

    hidden = torch.tensor(768.0, requires_grad=True)
    mlp_macs(hidden, tokens=197, width=192).backward()
    assert hidden.grad == 2 * 197 * 192


def test_a_similarity_step_counts_as_the_design_says() -> None:
    assert similarity_macs(Similarity(keep=6), 9, 16) == 5 * 4 * 16 + 3 * 4 * 17
    compared = 9 * 16 * 5 + 5 * 4 * 5
    carried = 3 * 16 * 2 * 2 + 3 * 4 * 16
    ward = Similarity(keep=6, match="ward", metric=5, carry=2)
    assert similarity_macs(ward, 9, 16) == compared + 3 * 4 * 17 + carried
    heavier = Similarity(keep=6, match="heavier", metric=3, carry=2)
    assert (
        similarity_macs(heavier, 9, 16) == 9 * 9 * (3 + 2) + 9 * 16 * (3 + 1) + 3 * 6 * 17 + 3 * 16 * 2 * 2 + 3 * 6 * 16
    )


def test_peak_activations_follow_the_stated_formula() -> None:
    n, d = 197, 192
    widest = max(3 * 224 * 224 + n * d, n * d + n * d + n * 3 * 4 * 64, n * d + n * d + 2 * n * 768)
    assert cost(deit(192, 3)).activation_bytes == 4 * widest
