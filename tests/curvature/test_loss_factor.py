"""Cotangents against the loss's Hessian in the outputs, formed by torch.func, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import hessian
from torch.nn import functional as F
from torch.testing import assert_close

from compress.curvature.loss_factor import Draw, cotangents, loss_of, output_curvature, period
from compress.errors import NumericsError, UsageError
from compress.task import CausalLM, Classification, Regression


class Pair:
    """A user's loss of two outputs, convex in them, with a product between them."""

    name, unit, higher_is_better = "pair", "nats", False

    def prepare(self, data: Any) -> Any:
        return data

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        a, b = outputs
        return (F.cross_entropy(a, targets, reduction="none") + (b.sum(1) - a[:, 0]).pow(4)).mean()

    def score(self, outputs: Any, targets: Tensor) -> Tensor:
        return outputs[0][:, 0]


class Scaled(Pair):
    """A loss that overflows, or whose Hessian does, as the first output grows."""

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return (outputs[0].abs().sqrt() * outputs[1].exp()).sum(1).mean()


def draw(probe: int, count: int, seed: int = 0) -> Draw:
    return Draw(seed, range(count), probe, "calib.npz")


def second_moment(task: Any, outputs: Any, targets: Tensor | None, probes: int, mode: str = "ggn") -> Tensor:
    """Mean over probes of the outer products, ``[n, k, k]``."""
    total: Tensor | float = 0.0
    n = len(outputs if isinstance(outputs, Tensor) else outputs[0])
    for probe in range(probes):
        parts = cotangents(task, outputs, targets, draw(probe, n), mode=mode)
        flat = torch.cat([part.reshape(n, -1) for part in parts], 1)
        total = total + torch.einsum("ni,nj->nij", flat, flat) / probes
    assert isinstance(total, Tensor)
    return total


def logits(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cross_entropy_hessian(values: Tensor) -> Tensor:
    p = torch.softmax(values, -1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_all_probes_of_a_class_prediction_are_its_hessian(classes: int) -> None:
    values = logits(4, classes)
    assert period(Classification(), values) == classes
    found = second_moment(Classification(), values, None, classes)
    assert_close(found, cross_entropy_hessian(values))
    assert_close(second_moment(Classification(), values, None, 3 * classes), found)


def test_all_probes_of_a_regression_are_its_hessian() -> None:
    values = logits(3, 2, 3)
    assert period(Regression(), values) == 6
    expected = (2 / 6) * torch.eye(6, dtype=torch.float64)
    assert_close(second_moment(Regression(), values, None, 6), expected.expand(3, 6, 6))


def test_a_regression_of_one_number_needs_no_second_dimension() -> None:
    values = logits(3)
    assert period(Regression(), values) == 1
    (probe,) = cotangents(Regression(), values, None, draw(0, 3), mode="ggn")
    assert_close(probe.square(), torch.full((3,), 2.0, dtype=torch.float64))


def test_all_probes_of_a_users_loss_are_its_hessian_over_all_outputs() -> None:
    a, b = logits(4, 3), logits(8, 2)[4:]
    targets = torch.tensor([0, 1, 2, 1])
    assert period(Pair(), (a, b)) == 5
    found = second_moment(Pair(), (a, b), targets, 5)
    for i in range(4):

        def loss(f: Tensor, i: int = i) -> Tensor:
            return Pair().loss((f[None, :3], f[None, 3:]), targets[i : i + 1])

        # The root of an eigenvalue 0 that came out as 1e-16 is 1e-8.
        assert_close(found[i], hessian(loss)(torch.cat([a[i], b[i]])), atol=1e-6, rtol=1e-6)


def test_probes_of_a_window_are_unbiased_for_the_mean_over_tokens() -> None:
    values = logits(2, 3, 4)
    assert period(CausalLM(), values) == 0
    blocks = cross_entropy_hessian(values) / 3
    found = second_moment(CausalLM(), values, None, 4000)
    for n in range(2):
        assert_close(found[n], torch.block_diag(*blocks[n]), atol=0.03, rtol=0)


def test_any_single_probe_is_unbiased() -> None:
    """The entries of a row of the Hartley matrix aren't all 1: a fixed order would weight the outputs unequally."""
    values = logits(1, 6).expand(4000, 6)
    for probe in (0, 1, 4):
        (found,) = cotangents(Classification(), values, None, draw(probe, 4000), mode="ggn")
        assert_close(found.T @ found / 4000, cross_entropy_hessian(values[0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(1, 5), (1, 2, 3)])
def test_sampled_labels_have_the_same_second_moment(shape: tuple[int, ...]) -> None:
    values = logits(*shape).expand(4000, *shape[1:])
    task = Classification() if len(shape) == 2 else CausalLM()
    (found,) = cotangents(task, values, None, draw(0, 4000), mode="sampled")
    flat = found.flatten(1)
    blocks = cross_entropy_hessian(values[0]).reshape(-1, shape[-1], shape[-1]) / (shape[1] if len(shape) == 3 else 1)
    assert_close(flat.T @ flat / 4000, torch.block_diag(*blocks), atol=0.02, rtol=0)


def test_sampled_regression_targets_have_the_same_second_moment() -> None:
    (found,) = cotangents(Regression(), logits(1, 4).expand(4000, 4), None, draw(0, 4000), mode="sampled")
    assert_close(found.T @ found / 4000, 0.5 * torch.eye(4, dtype=torch.float64), atol=0.05, rtol=0)


def test_label_cotangents_are_the_gradient_of_each_examples_loss() -> None:
    values, targets = logits(3, 4), torch.tensor([1, 0, 3])
    (found,) = cotangents(Classification(), values, targets, draw(0, 3), mode="labels")
    assert_close(found, torch.softmax(values, 1) - F.one_hot(targets, 4))


def test_output_traces_are_those_of_the_hessian() -> None:
    values = logits(6, 5)
    found = output_curvature(Classification(), values)
    assert found is not None
    assert_close(found, cross_entropy_hessian(values).diagonal(dim1=1, dim2=2).sum(1))
    windows = output_curvature(CausalLM(), values.reshape(2, 3, 5))
    assert windows is not None
    assert_close(windows, found.reshape(2, 3).mean(1))
    assert output_curvature(Regression(), values) is None
    assert output_curvature(Pair(), (values, values)) is None


def test_output_traces_of_certain_predictions_keep_their_digits() -> None:
    found = output_curvature(Classification(), torch.tensor([[0.0, 30.0]]))
    assert found is not None
    assert_close(float(found[0]), 2 * torch.tensor(-30.0, dtype=torch.float64).exp().item(), rtol=1e-2, atol=0)


def test_losses_without_labels_have_the_hessian_of_the_models_own() -> None:
    values = logits(2, 4)
    dense = hessian(lambda f: loss_of(Classification(), f, None))(values)
    blocks = torch.stack([dense[i, :, i] for i in range(2)])
    assert_close(blocks, cross_entropy_hessian(values) / 2)
    assert_close(loss_of(Regression(), values, None), torch.zeros((), dtype=torch.float64))
    assert_close(loss_of(Classification(), values, torch.tensor([1, 2])), F.cross_entropy(values, torch.tensor([1, 2])))


def test_a_linear_loss_has_no_curvature() -> None:
    class Linear(Pair):
        def loss(self, outputs: Any, targets: Tensor) -> Tensor:
            return outputs[0].sum(1).mean()

    parts = cotangents(Linear(), (logits(2, 3), logits(2, 2)), torch.zeros(2), draw(0, 2), mode="ggn")
    assert [part.shape for part in parts] == [(2, 3), (2, 2)]
    assert not any(part.any() for part in parts)


def test_a_concave_part_of_the_loss_is_left_out() -> None:
    class Saddle(Pair):
        def loss(self, outputs: Any, targets: Tensor) -> Tensor:
            return (outputs[0].square().sum(1) - outputs[1].square().sum(1)).mean()

    found = second_moment(Saddle(), (logits(2, 1), logits(2, 1)), torch.zeros(2), 2)
    assert_close(found, torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64)).expand(2, 2, 2))


class Pixels(Pair):
    """A mean over pixels; with ``weight``, one that neighbours have a part in."""

    weight = 0.0

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        steps = (outputs[..., 1:] - outputs[..., :-1]).square().mean()
        return F.cross_entropy(outputs, targets) + self.weight * steps


class SmoothPixels(Pixels):
    weight = 0.5


@pytest.mark.parametrize("task", [Pixels(), SmoothPixels()], ids=["by pixel", "between pixels"])
def test_all_probes_of_a_loss_of_pixels_are_its_hessian(task: Pixels) -> None:
    values, targets = logits(2, 3, 2, 2), torch.tensor([[[0, 1], [2, 1]], [[1, 1], [0, 2]]])
    assert period(task, values) == 12
    found = second_moment(task, values, targets, 12)
    for i in range(2):

        def loss(f: Tensor, i: int = i) -> Tensor:
            return task.loss(f.reshape(1, 3, 2, 2), targets[i : i + 1])

        assert_close(found[i], hessian(loss)(values[i].flatten()), atol=1e-6, rtol=1e-6)


def test_a_loss_of_many_pixels_needs_no_hessian_of_all_of_them() -> None:
    values, targets = logits(2, 3, 40, 40), torch.zeros(2, 40, 40, dtype=torch.int64)
    (probe,) = cotangents(Pixels(), values, targets, draw(0, 2), mode="ggn")
    assert probe.shape == values.shape
    with pytest.raises(UsageError, match="the network has 4800 outputs an example"):
        cotangents(SmoothPixels(), values, targets, draw(0, 2), mode="ggn")


@pytest.mark.parametrize(
    ("mode", "outputs", "targets", "words"),
    [
        ("ggn", (1, 1), None, "the loss of the metric pair needs targets"),
        ("sampled", (1, 1), 2, "labels can't be sampled for the metric pair"),
        ("labels", (1, 1), None, "the empirical Fisher needs labels, and --data has none"),
        ("ggn", (500, 100), 2, "the network has 600 outputs an example; a loss of your own is factored up to 512"),
    ],
)
def test_what_a_users_loss_lacks_is_named(mode: str, outputs: tuple[int, int], targets: int | None, words: str) -> None:
    values = tuple(logits(2, size) for size in outputs)
    labels = None if targets is None else torch.zeros(targets, dtype=torch.int64)
    with pytest.raises(UsageError, match=words):
        cotangents(Pair(), values, labels, draw(0, 2), mode=mode)


def test_a_users_loss_without_labels_is_an_error() -> None:
    with pytest.raises(UsageError, match="the loss of the metric pair needs targets"):
        loss_of(Pair(), (logits(2, 1), logits(2, 1)), None)


def test_a_loss_that_is_not_finite_names_its_examples() -> None:
    outputs = (torch.ones(4, 1), torch.full((4, 1), 200.0))
    with pytest.raises(NumericsError, match=r"the loss is inf on examples 8-11 of calib.npz"):
        cotangents(Scaled(), outputs, torch.zeros(4), Draw(0, range(8, 12), 0, "calib.npz"), mode="labels")


def test_a_hessian_that_is_not_finite_names_its_examples() -> None:
    outputs = (torch.tensor([[1.0], [0.0], [2.0]]), torch.zeros(3, 1))
    with pytest.raises(NumericsError, match=r"the loss's Hessian isn't finite on example 1 of calib.npz"):
        cotangents(Scaled(), outputs, torch.zeros(3), draw(0, 3), mode="ggn")


def test_an_output_that_is_not_finite_names_its_examples() -> None:
    values = logits(3, 4)
    values[2, 1] = float("nan")
    with pytest.raises(NumericsError, match=r"the output isn't finite on example 2 of calib.npz"):
        cotangents(Classification(), values, None, draw(0, 3), mode="sampled")
