"""Gradients in a file give the bits of gradients in memory, leave nothing behind, and name a full disk."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.errors import DiskError, NumericsError
from compress.numerics import mfac
from compress.numerics.gradient_file import CPU, ChunkedGradients, file_gradients, held_gradients
from compress.numerics.mfac import Gradients, gram_matrix, inverse_fisher, joint_update, new_gradients


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filed(gradients: Tensor, width: int) -> ChunkedGradients:
    m, d = gradients.shape
    found = file_gradients(m, d, gradients.dtype, width=width)
    for start in range(0, m, 3):
        rows = slice(start, min(m, start + 3))
        found[rows, slice(0, d // 2)] = gradients[rows, : d // 2]
        found[rows, slice(d // 2, d)] = gradients[rows, d // 2 :]
    return found


def everything(gradients: Gradients, blocks: int | None, dtype: torch.dtype) -> list[Tensor]:
    m, d = gradients.shape
    x, keep = random(1, d).to(dtype), random(2, d) > 0
    gram = gram_matrix(gradients)
    fisher = inverse_fisher(gradients, 1e-3, blocks=blocks, gram=gram if blocks is None else None)
    update = joint_update(gradients, random(3, d), keep, blocks=blocks, gram=gram if blocks is None else None)
    some = inverse_fisher(gradients[::3], 1e-3)
    return [
        gram,
        fisher.diagonal(),
        fisher.ihvp(x),
        fisher.ihvp_span(torch.ones(m)),
        fisher.submatrix([0, 5, d - 1], [3, d // 2]),
        update.solve(1e-3),
        some.diagonal(),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "d", "blocks"), [(20, 1003, None), (33, 2000, None), (20, 503, 16), (20, 503, 50)])
def test_the_bits_are_those_of_gradients_in_memory(
    m: int, d: int, blocks: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mfac, "PIECE", 100 * m)
    gradients = random(0, m, d).to(dtype)
    stored = new_gradients(m, d, dtype, memory=gradients.nbytes - 1)
    assert isinstance(stored, ChunkedGradients)
    assert len(stored.chunks) > 3
    stored[slice(0, m), slice(0, d)] = gradients
    for found, expected in zip(everything(stored, blocks, dtype), everything(gradients, blocks, dtype), strict=True):
        assert torch.equal(found, expected)


def test_what_fits_stays_in_memory() -> None:
    assert isinstance(new_gradients(3, 5, torch.float32, memory=60), Tensor)


def test_it_reads_as_a_tensor_does() -> None:
    gradients = random(0, 7, 40)
    stored = filed(gradients, 9)
    assert (stored.shape, len(stored), stored.numel(), stored.dtype) == ((7, 40), 7, 280, torch.float32)
    for start, length in ((0, 40), (9, 9), (5, 20), (39, 1)):
        assert torch.equal(stored.narrow(1, start, length), gradients.narrow(1, start, length))
    for index in (torch.arange(40), torch.tensor([39, 0, 9, 9, 8, 20]), torch.arange(1, 40, 3)):
        assert torch.equal(stored.index_select(1, index), gradients.index_select(1, index))
    assert torch.equal(stored[::2].narrow(1, 3, 20), gradients[::2, 3:23])


def test_a_gradient_that_is_not_finite_is_named_by_its_place_in_the_whole() -> None:
    gradients = random(0, 4, 60)
    gradients[2, 51] = float("nan")
    with pytest.raises(NumericsError, match="gradient row 2 of 4 is nan at column 51"):
        gram_matrix(filed(gradients, 9))


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stored = file_gradients(4, 100_000, torch.float32, width=1000)
    assert list(tmp_path.iterdir()) == []
    stored[slice(0, 4), slice(0, 100_000)] = torch.ones(4, 100_000)
    assert float(stored.narrow(1, 0, 100_000).sum()) == 400_000


def test_a_full_disk_names_the_folder_and_the_levers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskError) as caught:
        file_gradients(1000, 1_000_000, torch.float32, width=1000)
    assert caught.value.message == f"{tmp_path}: no room for 4GB of gradients (No space left on device)"
    assert "--memory" in caught.value.hint
    assert "TMPDIR" in caught.value.hint
    assert caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def results(gradients: mfac.Gradients, device: torch.device) -> list[Tensor]:
    """A product with the inverse, the diagonal, an element and the joint update."""
    generator = torch.Generator().manual_seed(1)
    weights, x = torch.randn(2, gradients.shape[1], generator=generator).to(device)
    inverse = mfac.inverse_fisher(gradients, 1e-2)
    change = mfac.joint_update(gradients, weights, weights.abs() > 0.5).solve(1e-2)
    found = [inverse.ihvp(x.double()), inverse.diagonal(), inverse.submatrix([3, 5], [3, 900]), change]
    return [tensor.cpu() for tensor in found]


def test_chunks_in_memory_give_the_bits_of_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    m, d = 24, 1000
    monkeypatch.setattr(mfac, "PIECE", 100 * m)
    values = torch.randn(m, d, generator=torch.Generator().manual_seed(0))
    chunked = held_gradients(m, d, torch.float32, mfac.strip_width(m, CPU), CPU, is_there=True)
    assert len(chunked.chunks) == 10
    chunked[slice(0, m), slice(0, d)] = values
    for ours, theirs in zip(results(chunked, CPU), results(values, CPU), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_processor_gives() -> None:
    m, d, device = 64, 40_000, torch.device("cuda")
    values = torch.randn(m, d, generator=torch.Generator().manual_seed(0))
    for chunked in (
        mfac.new_gradients(m, d, torch.float32, memory=0, device=device),
        held_gradients(m, d, torch.float32, 4096, device, is_there=False),
    ):
        chunked[slice(0, m), slice(0, d)] = values
        for ours, theirs in zip(results(chunked, device), results(values, CPU), strict=True):
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
