"""CIFAR-10/100, ImageNet and Cityscapes as they lie on disk, and scikit-learn's digits.

Nothing is downloaded: point `root` at the unpacked files.

    cifar10, cifar100   cifar-10-batches-py/ or cifar-10-batches-bin/ (and cifar-100-python/, -binary/)
    imagenet            train/<class>/*.JPEG and val/<class>/*.JPEG
    cityscapes          leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/…_gtFine_labelIds.png
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
IGNORE = 255  # Cityscapes pixels of no class

# Cityscapes label id → training id, after the official createTrainIdLabelImgs.
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9}
TRAIN_IDS |= {23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


class DataError(ValueError):
    """Files that are missing or not of the expected format."""


@dataclass(frozen=True)
class Data:
    """Training and held-out set, yielding `(image [3, H, W], label)`; for Cityscapes a label per pixel."""

    train: Dataset[Any]
    test: Dataset[Any]
    classes: int


# ---- CIFAR ---------------------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Pickles can run code; those of CIFAR hold numpy arrays, and nothing else is let through."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise DataError(f"a CIFAR file refers to {module}.{name}, which is no array; download it again")


def cifar(root: Path, classes: int) -> Data:
    """CIFAR-10 or CIFAR-100 in the Python or the binary version; normalised, random crops and flips."""
    folders = [
        f"cifar-{classes}-{kind}"
        for kind in (("batches-py", "batches-bin")[:] if classes == 10 else ("python", "binary"))
    ]
    found = [root / folder for folder in folders if (root / folder).is_dir()]
    if not found:
        raise DataError(f"no {' or '.join(folders)} in {root}")
    binary = found[0].name.endswith(("bin", "binary"))
    suffix = ".bin" if binary else ""
    names = ([f"data_batch_{i}" for i in range(1, 6)], "test_batch") if classes == 10 else (["train"], "test")
    names = ([f"{n}{suffix}" for n in names[0]], f"{names[1]}{suffix}")
    read = _read_cifar_binary if binary else _read_cifar_pickle
    parts = [read(found[0] / name, classes) for name in names[0] if (found[0] / name).exists()]
    if not parts:
        raise DataError(f"no {names[0][0]} in {found[0]}")
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))

    def normalise(x: Tensor) -> Tensor:
        return (x - mean[:, None, None]) / std[:, None, None]

    test = read(found[0] / names[1], classes)
    return Data(_Augmented(normalise(images), labels), TensorDataset(normalise(test[0]), test[1]), classes)


def _read_cifar_pickle(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    with path.open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
    labels = batch[b"labels" if classes == 10 else b"fine_labels"]
    return _images(np.asarray(batch[b"data"])), torch.tensor(labels)


def _read_cifar_binary(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    """One label byte (CIFAR-100: coarse, then fine), then 3072 bytes of red, green, blue."""
    skip = 1 if classes == 10 else 2
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size % (skip + 3072):
        raise DataError(f"{path} is not a whole number of records of {skip + 3072} bytes")
    rows = raw.reshape(-1, skip + 3072)
    return _images(rows[:, skip:]), torch.from_numpy(rows[:, skip - 1].astype(np.int64))


def _images(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows.reshape(-1, 3, 32, 32).astype(np.float32) / 255)


class _Augmented(Dataset[Any]):
    """Random crops of the image padded by 4, and flips."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        padded = F.pad(self.images[index], (4, 4, 4, 4))
        top, left, flip = torch.randint(9, ()), torch.randint(9, ()), torch.rand(()) < 0.5
        image = padded[:, top : top + 32, left : left + 32]
        return image.flip(2) if flip else image, self.labels[index]


# ---- folders of images -----------------------------------------------------------------------------------


def imagenet(root: Path, size: int = 224) -> Data:
    """Folders of images, one per class; random resized crops and flips, centre crops for the test."""
    classes = sorted(p.name for p in (root / "train").glob("*") if p.is_dir())
    if not classes:
        raise DataError(f"no class folders in {root / 'train'}")
    number = {name: i for i, name in enumerate(classes)}

    def split(name: str, transform: Callable[[Any], Tensor]) -> _Folder:
        images = sorted(p for p in (root / name).glob("*/*") if p.suffix.lower() in (".jpeg", ".jpg", ".png"))
        unknown = {p.parent.name for p in images} - number.keys()
        if not images or unknown:
            what = f"classes {sorted(unknown)[:3]} that train does not have" if unknown else "no images"
            raise DataError(f"{what} in {root / name}")
        return _Folder([(p, number[p.parent.name]) for p in images], transform)

    return Data(
        split("train", lambda image: random_resized_crop(image, size)),
        split("val", lambda image: centre_crop(image, size)),
        len(classes),
    )


class _Folder(Dataset[Any]):
    def __init__(self, items: list[tuple[Path, int]], transform: Callable[[Any], Tensor]) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        return self.transform(_open(path)), label


def random_resized_crop(image: Any, size: int) -> Tensor:
    """8 to 100 % of the area, aspect 3/4 to 4/3, flipped half of the time (Szegedy et al. 2015)."""
    width, height = image.size
    area, aspect = (0.08 + 0.92 * float(torch.rand(()))) * width * height, torch.empty(()).uniform_(-1, 1)
    ratio = math.exp(float(aspect) * math.log(4 / 3))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    left, top = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
    pixels = _normalised(image.resize((size, size), box=(left, top, left + w, top + h)))
    return pixels.flip(2) if torch.rand(()) < 0.5 else pixels


def centre_crop(image: Any, size: int) -> Tensor:
    """The shorter side to 8/7 of the size, then the middle."""
    width, height = image.size
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return _normalised(image.resize((size, size), box=(left, top, left + side, top + side)))


class Cityscapes(Dataset[Any]):
    """Images and the training id of every pixel, at `size` = (height, width); flipped in training."""

    def __init__(self, root: Path, split: str, size: tuple[int, int], flip: bool) -> None:
        self.images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        if not self.images:
            raise DataError(f"no images in {root / 'leftImg8bit' / split}")
        self.labels = [self._label_of(root, path) for path in self.images]
        self.size, self.flip = size, flip
        self.train_id = torch.full((256,), IGNORE)
        for label, train_id in TRAIN_IDS.items():
            self.train_id[label] = train_id

    @staticmethod
    def _label_of(root: Path, image: Path) -> Path:
        name = image.name.replace("_leftImg8bit", "_gtFine_labelIds")
        path = root / "gtFine" / image.parent.parent.name / image.parent.name / name
        if not path.exists():
            raise DataError(f"no {path} for {image.name}")
        return path

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        height, width = self.size
        image = _normalised(_open(self.images[index]).resize((width, height)))
        with Image.open(self.labels[index]) as file:
            ids = np.asarray(file.resize((width, height), Image.Resampling.NEAREST))
        label = self.train_id[torch.from_numpy(ids.astype(np.int64))]
        if self.flip and torch.rand(()) < 0.5:
            image, label = image.flip(2), label.flip(1)
        return image, label


def cityscapes(root: Path, size: tuple[int, int] = (512, 1024)) -> Data:
    return Data(Cityscapes(root, "train", size, True), Cityscapes(root, "val", size, False), 19)


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as file:
        return file.convert("RGB")


def _normalised(image: Any) -> Tensor:
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return (pixels - MEAN) / STD


# ---- digits -----------------------------------------------------------------------------------------------


def digits(root: Path | None = None) -> Data:
    """scikit-learn's handwritten digits with three equal channels, 32x32; `root` is not used."""
    from . import digits as own

    train, test = own.load_digits(size=32)
    sets = [TensorDataset(s.images.expand(-1, 3, -1, -1), s.labels) for s in (train, test)]
    return Data(sets[0], sets[1], 10)


DATASETS: dict[str, Callable[[Path], Data]] = {
    "cifar10": lambda root: cifar(root, 10),
    "cifar100": lambda root: cifar(root, 100),
    "imagenet": imagenet,
    "cityscapes": cityscapes,
    "digits": digits,
}
