"""Token merges: the list of the CAIT sheet (section 10, items 1 to 10), partial lattices, similarity merging."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.specs import close, images, make, vit
from vitrim.counting import cost
from vitrim.errors import SpecError
from vitrim.model import Gates
from vitrim.spec import Merge, Position, Prefix, Similarity, token_walk
from vitrim.tokens import Merged, merge_lattice, merge_similar, restore


def tokens(rows: int, cols: int, *, batch: int = 2, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, rows * cols, width, generator=generator, dtype=torch.float64)
    return x, torch.ones(batch, rows * cols, dtype=torch.float64)


def merge(x: torch.Tensor, sizes: torch.Tensor, grid: tuple[int, int], axis: str, keep: int | None = None) -> Merged:
    n = grid[1] if axis == "h" else grid[0]
    return merge_lattice(x, sizes, grid=grid, axis=axis, keep=keep or n - n // 2)


def test_deit_goes_from_197_to_99_to_50_tokens() -> None:
    spec = vit(width=16, blocks=3, image=224, patch=16)
    steps = (Merge(axis="h", keep=7), Merge(axis="v", keep=7))
    blocks = [replace(b, steps=s) for b, s in zip(spec.blocks, ((steps[0],), (steps[1],), ()), strict=True)]
    walk = token_walk(replace(spec, blocks=tuple(blocks)))
    assert [at.enter.count for at in walk] == [197, 99, 50]


def test_horizontal_and_vertical_merges_are_means_of_neighbours() -> None:
    x, sizes = tokens(4, 6)
    lattice = x.view(2, 4, 6, -1)
    across = merge(x, sizes, (4, 6), "h").x.view(2, 4, 3, -1)
    assert close(across, (lattice[:, :, 0::2] + lattice[:, :, 1::2]) / 2, 1e-12)
    down = merge(x, sizes, (4, 6), "v").x.view(2, 2, 6, -1)
    assert close(down, (lattice[:, 0::2] + lattice[:, 1::2]) / 2, 1e-12)


def test_both_merges_are_average_pooling_in_either_order() -> None:
    x, sizes = tokens(4, 6)
    pooled = F.avg_pool2d(x.view(2, 4, 6, -1).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    h = merge(x, sizes, (4, 6), "h")
    v = merge(x, sizes, (4, 6), "v")
    assert close(merge(h.x, h.sizes, (4, 3), "v").x, pooled, 1e-12)
    assert close(merge(v.x, v.sizes, (2, 6), "h").x, pooled, 1e-12)


def test_an_odd_last_column_is_copied_and_later_weighs_by_size() -> None:
    x, sizes = tokens(7, 7)
    once = merge(x, sizes, (7, 7), "h")
    assert once.undo.grid == (7, 4)
    assert close(once.x.view(2, 7, 4, -1)[:, :, 3], x.view(2, 7, 7, -1)[:, :, 6], 1e-15)
    assert once.sizes.sum(1).tolist() == [49.0, 49.0]
    twice = merge(once.x, once.sizes, (7, 4), "h")
    lattice = x.view(2, 7, 7, -1)
    assert close(twice.x.view(2, 7, 2, -1)[:, :, 1], lattice[:, :, 4:].mean(2), 1e-12)


@given(st.integers(2, 7), st.integers(2, 7), st.data())
def test_restoring_is_exact_for_any_chain_of_merges(rows: int, cols: int, data: st.DataObject) -> None:
    x, sizes = tokens(rows, cols, seed=rows * 8 + cols)
    grid, chain, history = (rows, cols), [], []
    current = Merged(x, sizes, None)  # type: ignore[arg-type]
    for _ in range(data.draw(st.integers(1, 3))):
        axis = data.draw(st.sampled_from(["h", "v"]))
        n = grid[1] if axis == "h" else grid[0]
        if n == 1:
            continue
        keep = data.draw(st.integers(n - n // 2, n - 1))
        current = merge(current.x, current.sizes, grid, axis, keep)
        grid = current.undo.grid
        history.append(current.undo)
        chain.append((axis, keep))
    restored = restore(current.x, tuple(history))
    assert restored.shape == x.shape
    assert close(current.sizes.sum(1), sizes.sum(1), 1e-12)
    assert close(restored.mean(1), x.mean(1), 1e-10)  # each token stands at exactly its source cells
    if chain and all(undo.owner.dim() == 1 for undo in history):  # fixed pairs: merging again gives the same tokens
        again, size, at = restored, sizes, (rows, cols)
        for axis, keep in chain:
            again, size, undo = merge(again, size, at, axis, keep)
            at = undo.grid
        assert close(again, current.x, 1e-10)


def test_a_ramp_stays_monotone_along_both_axes() -> None:
    ramp = torch.arange(7.0, dtype=torch.float64)
    lattice = (ramp[:, None] + ramp[None, :])[None, :, :, None].expand(1, 7, 7, 3) + 1
    x = lattice.reshape(1, 49, 3)
    h = merge(x, torch.ones(1, 49, dtype=torch.float64), (7, 7), "h")
    v = merge(h.x, h.sizes, (7, 4), "v")
    back = restore(v.x, (h.undo, v.undo)).view(7, 7, 3)
    assert (back.diff(dim=0) >= 0).all()
    assert (back.diff(dim=1) >= 0).all()


def test_each_source_of_a_mean_gets_half_of_the_gradient() -> None:
    x, sizes = tokens(2, 4)
    x.requires_grad_()
    merge(x, sizes, (2, 4), "h").x.sum().backward()
    assert close(x.grad, torch.full_like(x, 0.5), 1e-15)


@pytest.mark.parametrize("keep", [4, 5, 6])
def test_a_batch_merges_as_its_items_do(keep: int) -> None:
    x, sizes = tokens(3, 7, batch=4)
    whole = merge(x, sizes, (3, 7), "h", keep).x
    for i in range(4):
        assert close(whole[i : i + 1], merge(x[i : i + 1], sizes[i : i + 1], (3, 7), "h", keep).x, 1e-14)


def test_a_partial_lattice_merges_the_pair_that_is_most_alike() -> None:
    x, sizes = tokens(3, 6, batch=1)
    lattice = x.view(1, 3, 6, -1)
    lattice[:, :, 3] = lattice[:, :, 2] * 2  # the same direction: cosine 1
    merged = merge(lattice.reshape(1, 18, -1), sizes, (3, 6), "h", 5)
    assert merged.undo.owner.tolist() == [[0, 1, 2, 2, 3, 4]]
    assert close(merged.x.view(1, 3, 5, -1)[:, :, 2], lattice[:, :, 2] * 1.5, 1e-12)


def test_learned_weights_start_as_the_mean_and_follow_their_gate() -> None:
    x, sizes = tokens(2, 4)
    mean = merge(x, sizes, (2, 4), "h").x
    zero, far = torch.zeros(6, dtype=torch.float64), torch.full((6,), 50.0, dtype=torch.float64)
    assert close(merge_lattice(x, sizes, grid=(2, 4), axis="h", keep=2, weight="learned", gate=zero).x, mean, 1e-12)
    first = merge_lattice(x, sizes, grid=(2, 4), axis="h", keep=2, weight="learned", gate=far).x
    assert close(first.view(2, 2, 2, -1), x.view(2, 2, 4, -1)[:, :, 0::2], 1e-12)


def test_similarity_weights_favour_the_typical_token() -> None:
    lattice = torch.ones(1, 3, 4, 3, dtype=torch.float64)
    lattice[0, 1, 1] = torch.tensor([-1.0, 5.0, -4.0])  # unlike all around it
    merged = merge_lattice(
        lattice.reshape(1, 12, 3),
        torch.ones(1, 12, dtype=torch.float64),
        grid=(3, 4),
        axis="h",
        keep=2,
        weight="similarity",
        tau=0.1,
    )
    assert (merged.x.view(3, 2, 3)[1, 0] - 1).abs().max() < 0.01


def test_a_pair_without_neighbours_merges_by_halves() -> None:
    x, sizes = tokens(2, 1, width=5)
    merged = merge_lattice(x, sizes, grid=(2, 1), axis="v", keep=1, weight="similarity", tau=0.1)
    assert close(merged.x[:, 0], x.mean(1), 1e-12)


@pytest.mark.parametrize("patches", [8, 9])
def test_similar_tokens_merge_by_size_and_restore_to_their_sources(patches: int) -> None:
    x, sizes = tokens(1, patches, batch=3)
    merged = merge_similar(x, sizes, keep=patches - 3)
    assert merged.x.shape[1] == patches - 3
    assert close(merged.sizes.sum(1), sizes.sum(1), 1e-12)
    restored = restore(merged.x, (merged.undo,))
    assert close(restored.sum(1), x.sum(1), 1e-10)
    for b in range(3):
        for j in range(patches):
            same = merged.undo.owner[b] == merged.undo.owner[b, j]
            assert close(restored[b, j], x[b][same].mean(0), 1e-10)


def test_equal_tokens_are_the_ones_that_merge() -> None:
    x, sizes = tokens(1, 6, batch=1)
    x[0, 5] = x[0, 2] * 3
    owner = merge_similar(x, sizes, keep=5).undo.owner[0]
    assert owner[2] == owner[5]
    assert len(set(owner.tolist())) == 5


@pytest.mark.parametrize("patches", [8, 9])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("match", ["ward", "heavier"])
def test_ward_merges_what_adds_least_to_the_scatter_within_groups(match: str, patches: int, sized: bool) -> None:
    x, sizes = tokens(1, patches, batch=1)
    sizes = torch.arange(1, patches + 1).to(sizes)[None] if sized else sizes
    metric = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    seen = x[0] @ metric
    added = {}
    for i in range(patches):
        for j in range(i + 1, patches, 2 if match == "ward" else 1):
            s, t = sizes[0, i], sizes[0, j]
            centre = (s * seen[i] + t * seen[j]) / (s + t)
            added[i, j] = float(s * (seen[i] - centre).square().sum() + t * (seen[j] - centre).square().sum())
    owner = merge_similar(x, sizes, keep=patches - 1, match=match, metric=metric).undo.owner[0]
    merged = next((i, j) for i, j in added if owner[i] == owner[j])
    assert merged == min(added, key=lambda pair: added[pair])


def test_heavier_keeps_the_order_of_what_remains_and_none_merges_into_what_goes() -> None:
    x, sizes = tokens(3, 5, batch=4)
    sizes = torch.randint(1, 5, sizes.shape, generator=torch.Generator().manual_seed(1)).to(sizes)
    merged = merge_similar(x, sizes, keep=8, match="heavier")
    assert close(merged.sizes.sum(1), sizes.sum(1), 1e-12)
    for b in range(4):
        owner = merged.undo.owner[b].tolist()
        assert sorted(set(owner)) == list(range(8))
        for n in range(8):
            group = [j for j in range(15) if owner[j] == n]
            weight = sizes[b, group, None]
            assert close(merged.x[b, n], (x[b, group] * weight).sum(0) / weight.sum(), 1e-12)
        alone = [owner.index(n) for n in range(8) if owner.count(n) == 1]
        assert alone == sorted(alone)


def test_important_tokens_are_the_last_to_merge_whatever_is_added_to_all() -> None:
    x, sizes = tokens(1, 8, batch=1)
    x[0, 5] = x[0, 2] + 0.01  # by far the nearest two
    x[0, :, 0] = 0.0
    x[0, [2, 5], 0] = 3.0
    importance = torch.tensor([8.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    metric = torch.eye(6, dtype=torch.float64)[:, 1:]

    def owner(x: torch.Tensor, importance: torch.Tensor | None) -> list[int]:
        merged = merge_similar(x, sizes, keep=5, match="heavier", metric=metric * 10, importance=importance)
        return merged.undo.owner[0].tolist()

    apart = x.clone()
    apart[0, 5, 1:] += 0.5
    assert owner(apart, None)[2] == owner(apart, None)[5]
    assert owner(apart, importance)[2] != owner(apart, importance)[5]
    assert owner(apart, importance) == owner(apart + torch.eye(6, dtype=torch.float64)[0] * 7, importance)


NOTHING = torch.ones(6, 2, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)


@pytest.mark.parametrize("match", ["cosine", "ward", "heavier"])
@pytest.mark.parametrize("patches", [8, 9])
def test_what_is_carried_along_unchanged_gives_every_token_back(match: str, patches: int) -> None:
    x, sizes = tokens(1, patches, batch=3)
    history = []
    seen, weights = x, sizes
    for keep in (patches - 3, patches - 5):  # groups of sizes 1 to 4, merged again
        merged = merge_similar(seen, weights, keep=keep, match=match, carry=NOTHING)
        seen, weights = merged.x, merged.sizes
        history.append(merged.undo)
    assert close(restore(seen, tuple(history), carried=True), x, 1e-12)
    assert not close(restore(seen, tuple(history)), x, 1e-3)


def test_carried_differences_come_back_where_a_lattice_merged_before() -> None:
    x, sizes = tokens(4, 6)
    halved = merge_lattice(x, sizes, axis="h", grid=(4, 6), keep=3)
    merged = merge_similar(halved.x, halved.sizes, keep=7, match="heavier", carry=NOTHING)
    history = halved.undo, merged.undo
    assert close(restore(merged.x, history, carried=True), restore(halved.x, history[:1]), 1e-12)
    assert not close(restore(merged.x, history), restore(halved.x, history[:1]), 1e-3)


def test_a_network_that_restores_gives_the_shapes_of_one_that_does_not_merge() -> None:
    from vitrim.spec import Pool

    dense = vit(pool=Pool(kind="none"), outputs=())
    spec = carrying(dense)
    model, x = make(spec), images(dense)
    assert model(x).shape == make(dense)(x).shape == (2, 17, 16)
    assert model.features(x, [1])[0].shape == (2, 16, 4, 4)
    with torch.no_grad():
        for block in model.blocks:
            for name, value in block.named_parameters():
                if name.startswith(("attention.out", "mlp.fc2")):
                    value.zero_()
        model.blocks[0].steps[0].carry_b.zero_()
    assert close(model(x), model.norm(model.embed(x).x))  # nothing happens behind the merge: carrying undoes it


def carrying(dense: Any, keep: int = 9) -> Any:
    """The same network, which merges in its first block and gives every token back."""
    step = Similarity(keep=keep, match="heavier", metric=4, carry=2, proportional=True)
    return replace(dense, restore=True, blocks=(replace(dense.blocks[0], steps=(step,)), *dense.blocks[1:]))


def test_a_tap_gives_each_merged_token_at_all_that_it_stands_for() -> None:
    model = make(carrying(vit()))
    found = model(images(model.spec), want=("block:1", "restored:1", "map:1", "restored:0", "block:0"))
    merged, restored = found["block:1"], found["restored:1"]
    assert (merged.shape[1], restored.shape[1]) == (10, 17)
    assert torch.equal(restored[:, :1], merged[:, :1])  # the class token
    assert torch.equal(found["map:1"].flatten(2).mT, restored[:, 1:])
    for one, all_ in zip(merged[:, 1:], restored[:, 1:], strict=True):
        assert len(all_.unique(dim=0)) == 9
        assert torch.equal(all_.unique(dim=0), one.unique(dim=0))
    assert found["restored:0"].shape == (2, 17, 16)
    assert found["block:0"].shape == (2, 10, 16)


@pytest.mark.parametrize("tap", ["map:1", "restored:1"])
def test_a_tap_of_a_block_whose_tokens_are_gone_is_refused(tap: str) -> None:
    spec = vit()
    model = make(replace(spec, blocks=(spec.blocks[0], replace(spec.blocks[1], steps=(Prefix(),)))))
    assert model.features(images(spec), [0])[0].shape == (2, 16, 4, 4)
    with pytest.raises(SpecError, match=f"{tap} was asked for behind a prefix step.* take a block before 1"):
        model(images(spec), want=(tap,))


def test_images_of_another_size_lose_the_same_share_of_tokens_and_get_all_back() -> None:
    # 16 to 9 patch tokens; its directions and what it carries are of the stream, whatever the size
    model = make(carrying(vit()))
    x = torch.randn(1, 3, 24, 32, dtype=torch.float64)
    found = model(x, want=("tokens", "block:1"))
    assert found["tokens"].shape[1] == 1 + 6 * 8
    assert found["block:1"].shape[1] == 1 + 48 - round(7 * 48 / 16)
    tiny = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    assert model(tiny, want=("tokens",))["tokens"].shape[1] == 2  # a single patch has none to merge with


@pytest.mark.slow
def test_what_is_carried_has_the_same_gradients_where_blocks_are_recomputed() -> None:
    model, x = make(carrying(vit())), images(vit())
    grads = []
    for again in (False, True):
        model.grad_checkpoint = again
        model.zero_grad()
        model(x, want=("tokens",))["tokens"].square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert model.blocks[0].steps[0].carry_b.grad.abs().max() > 0
    assert all(close(a, b) for a, b in zip(*grads, strict=True))


def test_what_is_carried_counts_as_memory_until_it_is_restored() -> None:
    dense = vit(blocks=3, image=64)
    spec = carrying(dense, keep=200)
    without = replace(spec, blocks=(replace(spec.blocks[0], steps=(Similarity(keep=200),)), *spec.blocks[1:]))
    assert [at.carried for at in token_walk(spec)] == [256, 256, 256]
    assert cost(spec).activation_bytes - cost(without).activation_bytes == 4 * 256 * 16


@pytest.mark.parametrize("prefix", [(), ("cls",), ("cls", "dist")])
def test_prefix_tokens_pass_a_merge_unchanged(prefix: tuple[str, ...]) -> None:
    from vitrim.spec import Pool

    spec = vit(prefix=prefix, pool=Pool(kind="mean"))
    step = Merge(axis="h", keep=2)
    merging = replace(spec, blocks=(replace(spec.blocks[0], steps=(step,)), spec.blocks[1]))
    model = make(merging)
    stream, seen = model.blocks[0](model.embed(images(spec)))
    assert torch.equal(stream.x[:, : len(prefix)], seen.block.x[:, : len(prefix)])


@settings(max_examples=20)
@given(st.sampled_from(["h", "v"]), st.integers(2, 3), st.booleans())
def test_maps_come_back_on_the_lattice_of_the_input(axis: str, keep: int, proportional: bool) -> None:
    spec = vit(image=16, patch=4)
    merging = replace(
        spec,
        blocks=(
            replace(spec.blocks[0], steps=(Merge(axis=axis, keep=keep, proportional=proportional),)),
            spec.blocks[1],
        ),
    )
    model = make(merging)
    maps = model.features(images(spec), [0, 1])
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 4)] * 2
    bigger = torch.randn(1, 3, 24, 32, dtype=torch.float64)
    assert model.features(bigger, [1])[0].shape == (1, 16, 6, 8)


@pytest.mark.parametrize("kind", ["cls", "mean", "map"])
@pytest.mark.parametrize("axis", ["h", "v"])
def test_equal_tokens_merge_without_a_loss_where_every_reader_counts_them_by_size(
    kind: str, axis: Literal["h", "v"]
) -> None:
    """Of the four columns or rows, the first two are equal and merge; the others stay apart."""
    from vitrim.spec import Pool

    pool = Pool(kind="map", heads=2, hidden=8) if kind == "map" else Pool(kind=kind)  # type: ignore[arg-type]
    dense = vit(pool=pool, outputs=(), position=Position(kind="none", grid=(4, 4)))
    x = images(dense)
    across = x if axis == "h" else x.transpose(2, 3)
    across[..., 4:8] = across[..., :4]
    step = Merge(at="mid", axis=axis, keep=3, proportional=True)
    model = make(dense)
    merged = make(replace(dense, blocks=(replace(dense.blocks[0], steps=(step,)), dense.blocks[1])))
    assert close(merged(x), model(x))


def test_a_proportional_step_counts_merged_tokens_as_often_as_they_stand_for() -> None:
    """All patch tokens equal: after a proportional merge, attention gives what it gave before the merge."""
    spec = vit(blocks=1)
    plain = make(spec)
    for proportional in (True, False):
        step = Merge(at="start", axis="h", keep=2, proportional=proportional)
        merging = make(replace(spec, blocks=(replace(spec.blocks[0], steps=(step,)),)))
        merging.load_state_dict(plain.state_dict())
        with torch.no_grad():
            for model in (plain, merging):
                model.position.zero_()
        x = torch.ones(1, 3, 16, 16, dtype=torch.float64)
        assert close(plain(x), merging(x)) is proportional


def test_two_merges_save_what_the_sheet_says_of_deit_small() -> None:
    spec = vit(width=384, blocks=12, heads=6, head_dim=64, hidden=1536, image=224, patch=16, classes=1000)
    blocks = list(spec.blocks)
    blocks[3] = replace(blocks[3], steps=(Merge(axis="h", keep=7),))
    blocks[7] = replace(blocks[7], steps=(Merge(axis="v", keep=7),))
    assert round(cost(replace(spec, blocks=tuple(blocks))).macs / 1e9, 3) == 2.664


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Similarity(keep=12), Merge(axis="h", keep=2)), "lattice is gone"),
        ((Merge(axis="h", keep=1),), "expected 2 to 3"),
        ((Similarity(keep=3),), "at most half"),
        ((Merge(axis="h", keep=2, weight="similarity"),), "tau"),
        ((Prefix(), Merge(axis="h", keep=2)), "no patch tokens left"),
        ((Similarity(keep=12, metric=3),), "expected match='ward'"),
        ((Similarity(keep=12, match="ward", metric=99),), "at most the stream's width"),
        ((Similarity(keep=12, carry=2),), "nothing restores the tokens"),
        ((Similarity(keep=12, carry=0),), "carry=0; expected a number above 0"),
        ((Similarity(keep=12, carry=99),), "at most the stream's width"),
    ],
)
def test_impossible_steps_are_refused(steps: tuple[object, ...], message: str) -> None:
    spec = vit()
    with pytest.raises(SpecError, match=message):
        replace(spec, blocks=(spec.blocks[0], replace(spec.blocks[1], steps=steps)))


def test_a_prefix_step_belongs_to_the_last_block_of_a_network_that_reads_prefix_tokens() -> None:
    from vitrim.spec import Pool

    spec = vit()
    with pytest.raises(SpecError, match="expected the last block"):
        replace(spec, blocks=(replace(spec.blocks[0], steps=(Prefix(),)), spec.blocks[1]))
    with pytest.raises(SpecError, match="reads more than prefix tokens"):
        replace(spec, pool=Pool(kind="mean"), blocks=(spec.blocks[0], replace(spec.blocks[1], steps=(Prefix(),))))


def test_gates_decide_for_each_image_group_or_batch() -> None:
    spec = vit()
    block = spec.blocks[0]
    assert block.attention is not None
    assert block.mlp is not None
    gated = replace(block, attention=replace(block.attention, gate=True), mlp=replace(block.mlp, gate=True))
    model = make(replace(spec, blocks=(gated, gated)))
    x = images(spec, 8)

    def decisions(gates: Gates) -> torch.Tensor:
        found = model(x, gates=gates, want=("decisions",))["decisions"]
        return torch.stack([d for pair in found for d in pair])  # halves B

    alone = decisions(Gates(policy="image"))
    assert 0 < alone.mean() < 1
    assert torch.equal(decisions(Gates(policy="open")), torch.ones_like(alone))
    assert (decisions(Gates(policy="batch")).diff(dim=1) == 0).all()
    groups = torch.tensor([0, 0, 1, 1, 0, 1, 2, 2])
    grouped = decisions(Gates(policy="group", groups=groups))
    assert (grouped[:, groups == 1].diff(dim=1) == 0).all()
    assert torch.equal(decisions(Gates(policy="group", groups=torch.arange(8))), alone)
    one_by_one = torch.cat([model(x[i : i + 1]) for i in range(8)])
    assert close(model(x), one_by_one)  # per image: a batch changes nothing


def test_straight_through_gates_pass_a_gradient_and_noise_moves_them() -> None:
    spec = vit(blocks=1)
    block = spec.blocks[0]
    assert block.attention is not None
    gated = replace(spec, blocks=(replace(block, attention=replace(block.attention, gate=True)),))
    model, x = make(gated), images(spec)
    model(x, gates=Gates(straight_through=True)).sum().backward()
    assert model.blocks[0].attention.gate.weight.grad.abs().max() > 0
    closed = [(torch.tensor([[100.0, 0.0]] * 2), torch.zeros(2, 2))]
    decisions = model(x, gates=Gates(noise=closed), want=("decisions",))["decisions"]
    assert decisions[0][0].tolist() == [0.0, 0.0]
