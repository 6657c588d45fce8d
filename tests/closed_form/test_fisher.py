"""Gradients by random signs: the Fisher matrix of the outputs, in their own unit."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.specs import close, images, make, vit
from vitrim.closed_form import fisher
from vitrim.model import Gates, Vit
from vitrim.spec import Config, Pool

SPEC = vit(blocks=2, width=8, heads=1, head_dim=8, hidden=8, classes=3)


def every_sign(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Instead of random signs: each vector of them once."""
    vectors = torch.tensor(list(product((0, 1), repeat=classes)))
    monkeypatch.setattr(fisher.torch, "randint", lambda *_, **__: vectors)


def test_the_mean_over_all_signs_is_the_fisher_matrix(monkeypatch):
    model, x = make(SPEC), images(SPEC, 1)
    at = model(x, want=("block:0", "logits"))
    p = at["logits"].softmax(-1)[0]
    jacobian = torch.stack(
        [
            torch.autograd.grad(at["logits"].log_softmax(-1)[0, c], at["block:0"], retain_graph=True)[0].flatten()
            for c in range(3)
        ]
    )
    expected = sum(p[c] * jacobian[c][:, None] * jacobian[c][None, :] for c in range(3))
    every_sign(monkeypatch, 3)
    g = fisher.gradients(model, x, ("block:0",), draws=8, generator=torch.Generator()).of["block:0"].flatten(1)
    assert close(g.mT @ g / 8, expected)


@pytest.mark.parametrize("kind", ["classes", "features", "tokens"])
def test_divergence_is_zero_for_the_same_and_positive_for_others(kind):
    product, shape = fisher.Product(kind), (4, 3, 5) if kind == "tokens" else (4, 5)
    given = [torch.randn(shape) for _ in range(2)]
    a, b = (product.outcome(one) for one in given)
    assert close(product.divergence(a, a), torch.zeros(4, dtype=torch.float64), 1e-12)
    assert (product.divergence(a, b) > 0).all()
    if kind != "classes":  # twice one minus the cosine, a mean over the tokens
        cosine = torch.nn.functional.cosine_similarity(*(one.double() for one in given), dim=-1)
        assert close(product.divergence(a, b), 2 - 2 * (cosine if kind == "features" else cosine.mean(1)), 1e-6)


def test_an_encoder_is_for_its_tokens_and_a_classifier_for_its_classes_unless_said_otherwise():
    encoder = replace(SPEC, outputs=(), pool=Pool(kind="mean"))
    several = Config(spec=SPEC, problem_type="multi_label_classification")
    networks = (Config(spec=encoder), Config(spec=SPEC), several)
    assert [fisher.Product.of(one).kind for one in networks] == ["tokens", "classes", "labels"]
    assert [fisher.Product.of(one, "output").kind for one in networks] == ["features", "classes", "labels"]
    assert {fisher.Product.of(one, "tokens").kind for one in networks} == {"tokens"}


def test_patches_that_nothing_reads_have_no_gradient():
    model, x = make(SPEC), images(SPEC, 2)
    g = fisher.gradients(model, x, ("mid:1", "block:1", "mid:0"), draws=2, generator=torch.Generator()).of
    assert (g["mid:1"][:, :, 1:] == 0).all()
    assert (g["block:1"][:, :, 1:] == 0).all()
    assert (g["mid:0"][:, :, 1:] != 0).any()


@pytest.mark.parametrize("kind", ["classes", "features", "tokens"])
def test_the_predicted_divergence_of_a_small_change_is_the_measured_one(kind):
    product = fisher.Product(kind)
    spec = SPEC if kind == "classes" else replace(SPEC, outputs=(), pool=Pool(kind="mean"))
    model, x = make(spec), images(spec, 4)
    generator = torch.Generator().manual_seed(0)
    grads = fisher.gradients(model, x, ("block:0",), draws=4000, generator=generator, product=product)
    size = 1e-3
    change = size * torch.randn(4, 17, 8, generator=generator, dtype=torch.float64)
    predicted = grads.cost("block:0", change).mean(0)
    after = product.outcome(_changed(model, x, change, product.want))
    measured = product.divergence(grads.outcome, after)
    assert torch.allclose(predicted, measured, rtol=0.15)


def test_with_several_labels_each_is_told_by_itself():
    model, x = make(SPEC), images(SPEC, 4)
    model.config = Config(spec=SPEC, problem_type="multi_label_classification")
    generator = torch.Generator().manual_seed(0)
    grads = fisher.gradients(model, x, ("block:0",), draws=4000, generator=generator)
    change = 1e-3 * torch.randn(4, 17, 8, generator=generator, dtype=torch.float64)
    p, q = (logits.sigmoid() for logits in (model(x, gates=Gates(policy="open")), _changed(model, x, change, "logits")))
    measured = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    assert torch.allclose(grads.cost("block:0", change).mean(0), measured, rtol=0.15)
    said = model(x).detach()  # raised by 2, which a softmax does not see
    assert fisher.Product("classes").apart(said, said + 2.0) < 1e-12
    assert fisher.Product("labels").apart(said, said + 2.0) > 0.1


@torch.no_grad()
def _changed(model: Vit, x: torch.Tensor, change: torch.Tensor, want: str) -> torch.Tensor:
    handle = model.blocks[0].register_forward_hook(lambda _, __, out: (out[0]._replace(x=out[0].x + change), out[1]))
    result = model(x, gates=Gates(policy="open"), want=(want,))[want]
    handle.remove()
    return result


def test_divergences_are_zero_for_equal_outputs_and_never_negative():
    logs, product = torch.randn(5, 7).log_softmax(-1), fisher.Product("classes")
    assert close(product.divergence(logs, logs), torch.zeros(5, dtype=torch.float64))
    assert (product.divergence(logs, torch.randn(5, 7).log_softmax(-1)) > 0).all()


def test_the_signs_of_an_image_do_not_depend_on_its_batch():
    model, x = make(SPEC), images(SPEC, 4)
    together = fisher.gradients(model, x, ("mid:0",), draws=2, generator=torch.Generator().manual_seed(4)).of["mid:0"]
    generator = torch.Generator().manual_seed(4)
    apart = [fisher.gradients(model, part, ("mid:0",), draws=2, generator=generator).of["mid:0"] for part in x.split(3)]
    assert close(together, torch.cat(apart, dim=1))


def test_the_same_seed_draws_the_same_signs():
    model, x = make(SPEC), images(SPEC, 2)
    one, two = (
        fisher.gradients(model, x, ("mid:0",), draws=2, generator=torch.Generator().manual_seed(4)).of["mid:0"]
        for _ in range(2)
    )
    assert torch.equal(one, two)
