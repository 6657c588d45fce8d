"""T2T-ViT: laws 3 and 5 for the family. The counterpart is a network written in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.sources.t2t.kit import VARIANTS, pictures, read
from tests.specs import close
from tests.t2t_reference import T2T_ViT, tiny
from vitrim import artifact, sources
from vitrim.budget import Budget
from vitrim.counting import cost
from vitrim.errors import SourceError
from vitrim.methods import comcat
from vitrim.model import Masks
from vitrim.sources import t2t
from vitrim.spec import T2TPerformer
from vitrim.surgery import Keep, cut, exact_tail, fold_layer_scale, masked_twin

# ------------------------------------------------------------------------------------------------- law 5: from memory


@pytest.mark.parametrize("variant", VARIANTS)
def test_law_5_logits_and_features_are_the_modules_own(variant: str) -> None:
    module = tiny(**VARIANTS[variant]).float().double()
    model, x = read(module), pictures(module)
    streams: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: streams.append(out)) for block in module.blocks]
    expected = module(x)
    for hook in hooks:
        hook.remove()
    assert close(expected, model(x))
    found = model(x, want=tuple(f"block:{i}" for i in range(3)))
    assert all(close(stream, found[f"block:{i}"]) for i, stream in enumerate(streams))


@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_law_5_another_resolution_is_the_network_built_for_it(kind: str) -> None:
    module = tiny(kind).float().double()
    larger = tiny(kind, img_size=48).double()
    table = larger.pos_embed.detach().clone()
    larger.load_state_dict({**module.state_dict(), "pos_embed": table})
    model = read(module)
    assert close(larger(pictures(module, px=48)), model(pictures(module, px=48)), 1e-7)  # tables are float32 in both


@pytest.mark.parametrize("variant", ["performer", "transformer"])
def test_law_3_cut_equals_masked(variant: str) -> None:
    module = tiny(**VARIANTS[variant]).float().double()
    model, x = read(module), pictures(module)
    keeps = [
        Keep(heads=(0, 2), qk=((0, 3, 5), (1, 2, 7)), v=((0, 1), (4, 6)), hidden=tuple(range(0, 48, 3))),
        None,
        Keep(attention=False),
    ]
    smaller = cut(model, keeps, method="test")
    assert close(model(x, masks=masked_twin(model, keeps)), smaller(x))
    assert cost(smaller.spec).stem_macs == cost(model.spec).stem_macs
    assert cost(smaller.spec).params == sum(p.numel() for p in smaller.parameters()) < cost(model.spec).params
    assert close(model(x), fold_layer_scale(model)(x))
    assert close(model(x), exact_tail(model)(x))


def test_the_callers_module_and_random_state_stay_as_they_are() -> None:
    module = tiny().float().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    model = t2t.from_module(module)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_module_from_memory_is_recognised_by_its_structure() -> None:
    class Mine(T2T_ViT):
        """A user's subclass."""

    module = tiny().float()
    module.__class__ = Mine
    model = sources.from_model(module)
    assert isinstance(model.spec.stem, T2TPerformer)
    assert model.config.preprocess is not None


def test_a_table_that_is_not_the_sinusoids_is_resized_and_not_rebuilt() -> None:
    module = tiny().float()
    assert t2t.spec_of(module).position.resize == "rebuild_1d"
    assert t2t.spec_of(module.half()).position.resize == "rebuild_1d"
    with torch.no_grad():
        module.pos_embed[0, 2] += 0.5
    assert t2t.spec_of(module).position.resize == "bicubic"


# ------------------------------------------------------------------------------------------------------------ refusals


def spoiled(what: str) -> nn.Module:
    """A network that T2T-ViT's spec cannot say."""
    module: Any = tiny(tokens_type="transformer" if what == "scale" else "performer").float()
    stem = module.tokens_to_token
    if what == "extra":
        module.blocks[1].attn.se_layer = nn.Linear(24, 24)
    elif what == "tokeniser":
        stem.soft_split0 = nn.Conv2d(3, 8, 7, 4, 2)
    elif what == "padding":
        stem.soft_split1 = nn.Unfold((3, 3), stride=(2, 2), padding=(0, 0))
    elif what == "scale":
        stem.attention1.attn.scale = 8**-0.5
    elif what == "epsilon":
        stem.attention2.epsilon = 1e-6
    elif what == "eps":
        module.blocks[2].norm1.eps = 1e-6
    elif what == "activation":
        module.blocks[0].mlp.act = nn.ReLU()
    elif what == "head":
        module.head = nn.Sequential(nn.Linear(24, 5))
    elif what == "missing":
        del module.blocks[1].norm2
    elif what == "stage":
        del stem.attention2.norm1
    elif what == "no table":
        module.pos_embed = None
    elif what == "table":
        module.pos_embed = nn.Parameter(torch.zeros(1, 7, 24), requires_grad=False)
    elif what == "quantised":
        module.blocks[0].attn.qkv = nn.Sequential(nn.Linear(24, 72))
    else:
        return nn.Linear(3, 3)
    return module


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("extra", r"numbers that a plain one does not have: blocks\.1\.attn\.se_layer"),
        ("tokeniser", r"tokeniser of another design \(soft_split0: Conv2d\)"),
        ("padding", r"another padding or dilation \(soft_split1"),
        ("scale", r"another scale than 147 \*\* -0\.5 \(tokens_to_token\.attention1\)"),
        ("epsilon", r"another epsilon than 1e-08 \(tokens_to_token\.attention2\)"),
        ("eps", r"norms with different eps \[1e-06, 1e-05\]"),
        ("activation", r"the activation ReLU\(\) \(block 0\)"),
        ("head", "a classifier that is more than one linear"),
        ("missing", r"block 1: Block without norm2"),
        ("table", "a position table of 7 rows"),
        ("quantised", "a Sequential as qkv in block 0"),
        ("stage", r"tokens_to_token\.attention2: Token_performer without norm1"),
        ("no table", "no position table"),
        ("other", "Linear without tokens_to_token, cls_token"),
    ],
)
def test_what_the_spec_cannot_say_is_refused_by_name(what: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        t2t.from_module(spoiled(what))


def test_a_changed_forward_is_refused_with_the_first_block_that_differs() -> None:
    module = tiny().float()
    attn = module.blocks[1].attn
    whole = type(attn).forward
    attn.forward = lambda x: whole(attn, x) * 1.5
    with pytest.raises(SourceError, match="first in block 1"):
        t2t.from_module(module)
    assert t2t.from_module(module, verify=False).spec == t2t.spec_of(module)


# ---------------------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_comcat_compresses_the_backbone_and_an_artifact_keeps_the_result(kind: str, tmp_path: Path) -> None:
    module = tiny(kind, img_size=48, embed_dim=48, num_heads=3, mlp_ratio=4.0).float()
    model = t2t.from_module(module)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 48, 48, 3), dtype=np.uint8)
    config = comcat.ComcatConfig(budget=Budget(keep_params=0.8))
    small = comcat.compress(model, config, data=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()).model
    assert cost(small.spec).params <= 0.8 * cost(model.spec).params
    assert small.spec.stem == model.spec.stem
    stem = {name: value for name, value in model.state_dict().items() if name.startswith("stem.")}
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in stem.items())
    assert not small.stem.state_dict(keep_vars=True).get("stages.0.features", torch.zeros(1)).requires_grad
    artifact.save(small, tmp_path / "small")
    loaded = artifact.load(tmp_path / "small")
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(x), small(x))
    assert loaded.spec == small.spec
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == [
        n for n, p in model.named_parameters() if not p.requires_grad
    ]


def test_a_search_differentiates_through_the_backbone_only() -> None:
    model = t2t.from_module(tiny().float())
    hidden = tuple(torch.ones(48, requires_grad=True) for _ in range(3))
    model(torch.randn(2, 3, 32, 32), masks=Masks(hidden=hidden)).square().sum().backward()
    assert all(mask.grad is not None and mask.grad.abs().sum() > 0 for mask in hidden)
    assert model.stem.stages[0].features.grad is None
    assert model.stem.stages[0].kqv.weight.grad is not None
