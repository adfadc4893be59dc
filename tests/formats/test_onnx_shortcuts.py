import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.export import to_onnx
from compress.formats.onnx_shortcuts import shortcuts_as_convolutions


class Shortcut(nn.Module):
    """Every n-th row and column of a convolution's output, with channels of zeros around it."""

    def __init__(self, rows: slice, columns: slice, pads: tuple[int, ...], value: float = 0.0, is_read: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.rows, self.columns, self.pads, self.value, self.is_read = rows, columns, pads, value, is_read

    def forward(self, x: Tensor) -> Tensor:
        taken = torch.relu(self.conv(x))[:, :, self.rows, self.columns]
        y = F.pad(taken, self.pads, value=self.value)
        return y + taken.mean() if self.is_read else y


def exported(module: nn.Module) -> onnx.ModelProto:
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    return to_onnx(module.eval(), (x,))


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type in ("Slice", "Pad", "Conv")]


@pytest.mark.parametrize(
    ("rows", "columns", "pads"),
    [
        (slice(None, None, 2), slice(None, None, 2), (0, 0, 0, 0, 2, 2)),
        (slice(None, None, 2), slice(None, None, 3), (0, 0, 0, 0, 0, 5)),
        (slice(None), slice(None, None, 2), (0, 0, 0, 0, 1, 0)),
    ],
)
def test_a_strided_padded_shortcut_is_one_convolution_of_the_same_values(
    rows: slice, columns: slice, pads: tuple[int, ...]
) -> None:
    plain = exported(Shortcut(rows, columns, pads))
    changed = shortcuts_as_convolutions(plain)
    assert "Pad" in ops(plain)
    assert ops(changed) == ["Conv", "Conv"]
    onnx.checker.check_model(changed, full_check=True)
    for batch in (1, 3):
        x = np.random.default_rng(0).normal(size=(batch, 3, 9, 8)).astype(np.float32)
        want, got = (
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
                None, {model.graph.input[0].name: x}
            )
            for model in (plain, changed)
        )
        assert np.array_equal(got[0], want[0])


@pytest.mark.parametrize(
    "module",
    [
        Shortcut(slice(1, None, 2), slice(1, None, 2), (0, 0, 0, 0, 2, 2)),  # from the second on
        Shortcut(slice(None, 6, 2), slice(None, 6, 2), (0, 0, 0, 0, 2, 2)),  # a part of the image
        Shortcut(slice(None, None, 2), slice(None, None, 2), (1, 1, 0, 0, 2, 2)),  # columns are added too
        Shortcut(slice(None, None, 2), slice(None, None, 2), (0, 0, 0, 0, 2, 2), value=1.0),  # not zeros
        Shortcut(slice(None), slice(None), (0, 0, 0, 0, 2, 2)),  # nothing is left out
        Shortcut(slice(None, None, 2), slice(None, None, 2), (0, 0, 0, 0, 2, 2), is_read=True),
    ],
    ids=["offset", "part", "columns", "ones", "dense", "read"],
)
def test_what_does_more_stays(module: nn.Module) -> None:
    plain = exported(module)
    assert ops(shortcuts_as_convolutions(plain)) == ops(plain)
    before = plain.SerializeToString(deterministic=True)
    assert shortcuts_as_convolutions(plain).SerializeToString(deterministic=True) == before
