"""Train the demo's network on Fashion-MNIST and write the three files that the package ships.

    python -m compress.demo.train --images /usr/share/datasets/fashion-mnist --out compress/demo

The images are Debian's package ``dataset-fashion-mnist`` (Zalando Research, MIT licence). Of the 60,000 training
images, 1,024 become the calibration subset; of the 10,000 test images, the first 2,000 become the evaluation subset.
Cost: about 20 minutes on 2 cores for 20 epochs.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from .network import FashionNet, fashion_net

MEAN, STD = 0.2860, 0.3530  # of the training images, scaled to [0, 1]


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes behind a gzipped IDX header of ``header`` bytes."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8)[header:]


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images ``[n, 28, 28]`` and int64 labels ``[n]``; ``split`` is ``train`` or ``t10k``."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    return images, read_idx(folder / f"{split}-labels-idx1-ubyte.gz", 8).astype(np.int64)


def normalise(images: np.ndarray) -> torch.Tensor:
    """Float32 images ``[n, 1, 28, 28]`` of zero mean and unit variance over the training set."""
    return ((torch.from_numpy(images.copy()).float() / 255 - MEAN) / STD)[:, None]


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip each image with probability one half and shift the batch by up to two pixels."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    dy, dx = (int(v) for v in torch.randint(0, 5, (2,), generator=generator))
    return F.pad(x, (2, 2, 2, 2), value=-MEAN / STD)[:, :, dy : dy + 28, dx : dx + 28]


def accuracy(model: FashionNet, x: torch.Tensor, y: torch.Tensor) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    with torch.no_grad():
        parts = zip(torch.split(x, 500), torch.split(y, 500), strict=True)
        hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in parts)
    return 100 * hits / len(y)


def train(x: torch.Tensor, y: torch.Tensor, epochs: int, batch: int, seed: int) -> FashionNet:
    """SGD with Nesterov momentum on a one-cycle schedule."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = fashion_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - batch + 1, batch):
            index = order[start : start + batch]
            loss = F.cross_entropy(model(augment(x[index], generator)), y[index])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    train_images, train_labels = read_split(arguments.images, "train")
    test_images, test_labels = read_split(arguments.images, "t10k")
    model = train(normalise(train_images), torch.from_numpy(train_labels), arguments.epochs, 256, arguments.seed)
    test_accuracy = accuracy(model, normalise(test_images), torch.from_numpy(test_labels))

    save_file(model.state_dict(), arguments.out / "fashion_net.safetensors")
    chosen = np.random.default_rng(arguments.seed).permutation(len(train_images))[:1024]
    np.savez_compressed(arguments.out / "calibration.npz", x=train_images[chosen, None], y=train_labels[chosen])
    np.savez_compressed(arguments.out / "evaluation.npz", x=test_images[:2000, None], y=test_labels[:2000])
    card = {"epochs": arguments.epochs, "seed": arguments.seed, "test_accuracy": test_accuracy, "test_images": 10000}
    (arguments.out / "fashion_net.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
    print(f"{test_accuracy:.2f} % on the 10,000 test images")


if __name__ == "__main__":
    main()
