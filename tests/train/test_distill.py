"""The loss against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.data import Data
from compress.errors import UsageError
from compress.task import CausalLM, Classification, Regression, divergence
from compress.train.distill import distance, divergence_from, first_tensor, loss_of

G = torch.Generator().manual_seed(0)
LOGITS, WANTED = torch.randn(6, 5, generator=G), torch.randn(6, 5, generator=G)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (6, 1), (6,)])
@pytest.mark.parametrize("are_logits", [True, False])
def test_at_temperature_one_it_is_the_divergence_that_is_reported(shape: tuple[int, ...], are_logits: bool) -> None:
    reference, outputs = torch.randn(shape), torch.randn(shape)
    found = distance(reference, outputs, are_logits=are_logits, temperature=1.0)
    assert float(found) == pytest.approx(divergence(reference, outputs, are_logits=are_logits), rel=1e-5)


def test_temperature_divides_logits_and_keeps_gradients_in_size() -> None:
    t = 3.0
    p, q = (torch.softmax(x.double() / t, 1) for x in (WANTED, LOGITS))
    expected = float((p * (p / q).log()).sum(1).mean()) * t**2
    assert float(distance(WANTED, LOGITS, are_logits=True, temperature=t)) == pytest.approx(expected, rel=1e-5)


def test_shares_add_up() -> None:
    task, far = Classification(), distance(WANTED, LOGITS, are_logits=True, temperature=2.0)
    found = loss_of(task, LOGITS, LABELS, WANTED, distill=0.25, temperature=2.0)
    torch.testing.assert_close(found, 0.25 * far + 0.75 * F.cross_entropy(LOGITS, LABELS))
    torch.testing.assert_close(loss_of(task, LOGITS, LABELS, WANTED, distill=1.0, temperature=2.0), far)
    alone = loss_of(task, LOGITS, LABELS, None, distill=0.25, temperature=2.0)
    torch.testing.assert_close(alone, F.cross_entropy(LOGITS, LABELS))


def test_without_labels_the_dense_network_is_all() -> None:
    found = loss_of(Classification(), LOGITS, None, WANTED, distill=0.1, temperature=1.0)
    torch.testing.assert_close(found, distance(WANTED, LOGITS, are_logits=True, temperature=1.0))
    found = loss_of(Regression(), LOGITS, None, WANTED, distill=0.1, temperature=1.0)
    torch.testing.assert_close(found, F.mse_loss(LOGITS, WANTED))


def test_of_text_it_is_the_mean_over_tokens() -> None:
    logits, wanted = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    found = loss_of(CausalLM(), logits, None, wanted, distill=1.0, temperature=1.0)
    per_token = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, per_token.mean())


def test_half_floats_are_widened() -> None:
    found = loss_of(Classification(), LOGITS.bfloat16(), LABELS, WANTED.bfloat16(), distill=0.5, temperature=2.0)
    assert found.dtype is torch.float32


def test_the_first_tensor_is_compared() -> None:
    assert first_tensor({"logits": LOGITS, "aux": WANTED}) is LOGITS
    assert first_tensor((None, [WANTED])) is WANTED
    with pytest.raises(UsageError, match="gives no tensor"):
        first_tensor({"loss": 3.0})


def test_examples_stay_whatever_a_forward_writes() -> None:
    def writes(x: Tensor) -> Tensor:
        return x.mul_(2)

    def shifted(x: Tensor) -> Any:
        return (x * 2 + 1,)

    data = Data((torch.ones(300, 3),), None, "ones")
    assert divergence_from(writes, shifted, data, Regression(), CPU) == pytest.approx(1.0)
    assert bool((data.inputs[0] == 1).all())
