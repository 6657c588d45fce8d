"""The model beside the laws: soft tensors, taps, other image sizes, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.specs import close, images, make, vit
from vitrim.counting import cost
from vitrim.errors import SpecError
from vitrim.model import Gates, Masks, build, sinusoids
from vitrim.spec import ConvStem, Merge, Output, Pool, Position, T2TPerformer, T2TTransformer


def test_soft_of_ones_changes_nothing_and_every_field_changes_something() -> None:
    block = vit().blocks[0]
    assert block.mlp is not None
    spec = replace(vit(), blocks=(replace(block, mlp=replace(block.mlp, fc1_rank=3, fc2_rank=4)),) * 2)
    model, x = make(spec), images(spec)
    shapes = {
        "block": (),
        "attention": (),
        "mlp": (),
        "heads": (2,),
        "qk": (2, 8),
        "v": (2, 8),
        "hidden": (24,),
        "fc1_rank": (3,),
        "fc2_rank": (4,),
    }
    expected = model(x)
    for name, shape in shapes.items():
        ones = torch.ones(shape, dtype=torch.float64)
        assert close(expected, model(x, masks=Masks(**{name: (ones, None)}))), name
        half = (0.5 * ones).requires_grad_()
        changed = model(x, masks=Masks(**{name: (None, half)}))
        assert not close(expected, changed, 1e-6), name
        changed.sum().backward()
        assert half.grad is not None, name


def test_a_block_of_weight_zero_is_skipped_and_one_per_image_works() -> None:
    spec = vit()
    model, x = make(spec), images(spec)
    zero = torch.zeros((), dtype=torch.float64)
    skipped = model(x, masks=Masks(block=(None, zero)))
    halves = model(x, masks=Masks(attention=(None, zero), mlp=(None, zero)))
    assert close(skipped, halves)
    each = torch.tensor([0.0, 1.0], dtype=torch.float64)
    mixed = model(x, masks=Masks(block=(None, each)))
    assert close(mixed, torch.stack([skipped[0], model(x)[1]]))


def test_a_soft_block_over_its_own_merge_is_refused() -> None:
    spec = vit()
    merging = replace(
        spec, blocks=(replace(spec.blocks[0], steps=(Merge(at="mid", axis="h", keep=2),)), spec.blocks[1])
    )
    with pytest.raises(SpecError, match="scale its halves instead"):
        make(merging)(images(spec), masks=Masks(block=(torch.ones(()), None)))


def test_taps_give_the_streams_of_the_blocks() -> None:
    spec = vit()
    model, x = make(spec), images(spec)
    found = model(x, want=("block:0", "mid:1", "block:1", "tokens", "pooled", "logits", "map:1"))
    stream, _ = model.blocks[0](model.embed(x))
    assert close(found["block:0"], stream.x)
    stream, seen = model.blocks[1](stream)
    assert close(found["mid:1"], seen.mid.x)
    assert close(found["tokens"], model.norm(stream.x))
    assert close(found["pooled"], found["tokens"][:, 0])
    assert close(found["logits"], model(x))
    assert close(found["map:1"].flatten(2).transpose(1, 2), found["block:1"][:, 1:])
    assert list(model.outputs(x)) == ["head"]


@pytest.mark.parametrize(
    ("want", "hint"), [("logit", "did you mean 'logits'"), ("block:9", "blocks 0 to 1"), ("blok:1", "block:i")]
)
def test_an_unknown_want_is_refused(want: str, hint: str) -> None:
    with pytest.raises(SpecError, match=hint):
        make(vit())(images(vit()), want=(want,))


def test_two_classifiers_answer_with_their_mean() -> None:
    spec = replace(
        vit(), prefix=("cls", "dist"), outputs=(Output(classes=5), Output(name="head_dist", classes=5, reads=("dist",)))
    )
    model, x = make(spec), images(spec)
    both = model.outputs(x)
    assert close(model(x), (both["head"] + both["head_dist"]) / 2)


def test_an_encoder_gives_its_pooled_features_or_its_tokens() -> None:
    spec = replace(vit(), outputs=())
    assert make(spec)(images(spec)).shape == (2, 16)
    tokens = replace(spec, pool=Pool(kind="none"))
    assert make(tokens)(images(spec)).shape == (2, 17, 16)


@pytest.mark.parametrize("resize", ["bicubic", "bicubic_antialias", "rebuild_1d"])
@pytest.mark.parametrize("prefix_rows", [True, False])
def test_other_image_sizes_resize_the_table_and_the_own_size_does_not(resize: str, prefix_rows: bool) -> None:
    position = Position(grid=(4, 4), prefix_rows=prefix_rows, resize=resize)
    model = make(vit(position=position))
    assert model(torch.randn(1, 3, 32, 24, dtype=torch.float64)).shape == (1, 5)
    assert torch.equal(model.positions((4, 4)), model.position)
    rows = model.positions((8, 6))
    assert rows.shape == (48 + prefix_rows, 16)
    if resize == "rebuild_1d":
        assert torch.equal(rows, sinusoids(48 + prefix_rows, 16).double())


@pytest.mark.parametrize("shape", [(1, 3, 15, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_an_input_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="expected"):
        make(vit())(torch.zeros(shape, dtype=torch.float64))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    spec = vit()
    x, grads = images(spec), []
    for flag in (False, True):
        model = make(spec)
        model.grad_checkpoint = flag
        model(x).sum().backward()
        grads.append(model.blocks[0].attention.qkv.grad)
    assert close(grads[0], grads[1], 1e-12)


def test_a_built_model_is_float32_in_eval_mode_and_starts_like_deit() -> None:
    model = build(vit())
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 0.01 < float(model.blocks[0].mlp.fc1.weight.detach().std()) < 0.03
    assert model(torch.zeros(1, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("stem", "params", "macs"),
    [(T2TPerformer(), 21_545_550, 4_783_468_544), (T2TTransformer(), 21_541_070, 6_088_721_920)],
)
def test_t2t_stems_are_costed_as_their_sheet_says(stem: object, params: int, macs: int) -> None:
    spec = vit(width=384, blocks=14, heads=6, head_dim=64, hidden=1152, image=224, patch=16, classes=1000, stem=stem)
    block = spec.blocks[0]
    assert block.attention is not None
    bare = replace(block, attention=replace(block.attention, q_bias=False, k_bias=False, v_bias=False))
    spec = replace(spec, blocks=(bare,) * 14, position=Position(kind="fixed", grid=(14, 14)))
    assert (cost(spec).params, cost(spec).macs) == (params, macs)
    assert build(replace(vit(), stem=ConvStem(bias=False))).stem.proj.bias is None


@pytest.mark.parametrize(
    ("fields", "message"), [({"policy": "each"}, "expected image, group"), ({"policy": "group"}, "belong to policy")]
)
def test_gates_refuse_what_they_cannot_do(fields: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Gates(**fields)


def test_the_runtime_needs_torch_and_safetensors_only() -> None:
    """Everything else that vitrim depends on is barred; building, saving and loading still work."""
    code = """
import sys
barred = {"timm", "torchvision", "click", "pydantic", "rich", "accelerate", "huggingface_hub", "pyarrow", "PIL"}
class Bar:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in barred:
            raise ImportError(f"barred: {name}")
sys.meta_path.insert(0, Bar())
import tempfile, pathlib, torch
from vitrim import artifact
from vitrim.model import build
from vitrim.spec import Attention, Block, Mlp, ModelSpec, Output, Position
block = Block(attention=Attention(heads=2, qk_dim=4, v_dim=4, scale=0.5), mlp=Mlp(hidden=8))
spec = ModelSpec(image_px=(8, 8), patch_px=(4, 4), width=8, position=Position(grid=(2, 2)), blocks=(block,), outputs=(Output(classes=3),))
model = build(spec)
folder = pathlib.Path(tempfile.mkdtemp()) / "m"
artifact.save(model, folder)
x = torch.randn(2, 3, 8, 8)
assert torch.equal(artifact.load(folder)(x), model(x))
assert not barred & set(sys.modules), barred & set(sys.modules)
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr
