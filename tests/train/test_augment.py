"""Crops and flips against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import UsageError
from compress.train.augment import augmented, black


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_loop(x: Tensor, names: tuple[str, ...], source: torch.Generator, padding: Tensor) -> Tensor:
    """Image by image, with draws in the same order."""
    n, _, height, width = x.shape
    rows, columns = height // 8, width // 8
    images = list(x)
    if "crop" in names:
        tops = torch.randint(2 * rows + 1, (n, 1), generator=source)
        lefts = torch.randint(2 * columns + 1, (n, 1), generator=source)
        padded = [
            torch.stack(
                [F.pad(c, (columns, columns, rows, rows), value=float(p)) for c, p in zip(image, padding, strict=True)]
            )
            for image in images
        ]
        images = [
            image[:, int(top) : int(top) + height, int(left) : int(left) + width]
            for image, top, left in zip(padded, tops, lefts, strict=True)
        ]
    if "flip" in names:
        mirrored = torch.rand(n, generator=source) < 0.5
        images = [image.flip(2) if flip else image for image, flip in zip(images, mirrored, strict=True)]
    return torch.stack(images)


@pytest.mark.parametrize("names", [("crop",), ("flip",), ("crop", "flip"), ()])
@pytest.mark.parametrize("shape", [(9, 3, 32, 32), (4, 1, 16, 24)])
def test_a_batch_is_what_a_loop_over_images_gives(names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator(1))
    for padding in (torch.zeros(shape[1]), black(x)):
        expected = plain_loop(x, names, generator(), padding)
        assert torch.equal(augmented(x, names, generator(), padding=padding), expected)
    assert torch.equal(augmented(x, names, generator()), plain_loop(x, names, generator(), torch.zeros(shape[1])))


def test_black_is_the_least_value_of_each_channel() -> None:
    pixels = torch.randint(256, (50, 3, 8, 8), generator=generator()).float() / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    x = (pixels - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    torch.testing.assert_close(black(x), -mean / std)


def test_crops_of_32_pixels_move_by_up_to_four() -> None:
    x = torch.zeros(2000, 1, 32, 32)
    x[:, :, 16, 16] = 1
    places = augmented(x, ("crop",), generator()).flatten(1).argmax(1)
    assert sorted(set((places // 32).tolist())) == list(range(12, 21))
    assert sorted(set((places % 32).tolist())) == list(range(12, 21))


def test_about_half_are_mirrored() -> None:
    x = torch.arange(4.0).expand(1000, 1, 4, 4)
    assert 450 < int((augmented(x, ("flip",), generator())[:, 0, 0, 0] == 3).sum()) < 550


def test_the_images_themselves_stay() -> None:
    x = torch.randn(5, 3, 8, 8)
    before = x.clone()
    augmented(x, ("crop", "flip"), generator())
    assert torch.equal(x, before)


@pytest.mark.parametrize("x", [torch.randn(4, 7), torch.randint(5, (4, 3, 8, 8))])
def test_what_are_no_images_is_refused(x: Tensor) -> None:
    with pytest.raises(UsageError, match=r"--augment needs images \[n, c, h, w\]; the inputs have shape"):
        augmented(x, ("flip",), generator())


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="augmentation 'cutout' is unknown") as caught:
        augmented(torch.randn(1, 3, 8, 8), ("cutout",), generator())
    assert "crop, flip" in caught.value.hint
