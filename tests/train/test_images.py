"""The image task: what it reads, what it holds out, and what it refuses before a step is made."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from largebatch.train.data.sampler import Sampler
from largebatch.train.tasks.images import Images


def pixels(number: int, *shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (number, *shape), dtype=np.uint8)


@pytest.fixture
def arrays(tmp_path: Path) -> Callable[..., str]:
    """Writes an .npz of 200 images of 6 by 6 in 3 channels and 4 classes, or what is given."""

    def write(name: str = "images.npz", **more: Any) -> str:
        content = {"images": pixels(200, 6, 6, 3), "labels": np.arange(200) % 4} | more
        kept = {key: value for key, value in content.items() if value is not None}
        np.savez(tmp_path / name, **kept)
        return str(tmp_path / name)

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three class folders with 20 images of 5 by 5 each, every pixel the image's number."""
    for number in range(60):
        of_class = tmp_path / "data" / ("ant", "bee", "cat")[number % 3]
        of_class.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 5), (number, 2 * number, 3 * number)).save(
            of_class / f"{number:02}.png"
        )
    return tmp_path / "data"


def task(path: str, **more: Any) -> Images:
    return Images(path, **({"classes": 4, "channels": 3, "size": 6} | more))


def everything(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    found, labels = images.train_batch(np.arange(images.num_train))
    return found, labels


def test_every_image_is_in_training_or_held_out_and_in_one_alone(
    arrays: Callable[..., str],
) -> None:
    images = task(arrays(), mean=[0.0] * 3, std=[1 / 255.0] * 3)
    train, train_labels = everything(images)
    held, held_labels = images.eval_batch(np.arange(images.num_eval))
    assert images.num_train + images.num_eval == 200
    assert 5 <= images.num_eval <= 35  # 20 expected, with a deviation of 4.2
    found = torch.cat((train, held)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    labelled = {
        image.tobytes(): int(label)
        for image, label in zip(found, torch.cat((train_labels, held_labels)), strict=True)
    }
    expected = {image.tobytes(): number % 4 for number, image in enumerate(pixels(200, 6, 6, 3))}
    assert labelled == expected


def test_what_is_held_out_is_a_matter_of_the_image_not_of_its_place(
    arrays: Callable[..., str],
) -> None:
    """So copies of an image never stand on both sides, and a shuffled file is split alike."""
    order = np.random.default_rng(1).permutation(200)
    copies = np.concatenate((order, order[:50]))
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3}
    first = task(arrays(), **plain)
    second = task(arrays("b.npz", images=pixels(200, 6, 6, 3)[copies], labels=copies % 4), **plain)
    sides = [
        {image.numpy().tobytes() for image in images.eval_batch(np.arange(images.num_eval))[0]}
        for images in (first, second)
    ]
    assert sides[0] == sides[1]
    train = {image.numpy().tobytes() for image in everything(second)[0]}
    assert not train & sides[1]


def test_measured_normalisation_leaves_mean_0_and_deviation_1(arrays: Callable[..., str]) -> None:
    scaled = pixels(200, 6, 6, 3) // np.array([1, 2, 8], np.uint8)
    images, _ = everything(task(arrays(images=scaled)))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3))


def test_given_normalisation_is_of_pixels_from_0_to_1(arrays: Callable[..., str]) -> None:
    path = arrays(images=np.full((200, 6, 6), 51, np.uint8))
    # All of them are one image and would fall on one side: so another file to evaluate on.
    images = task(path, channels=1, eval_path=path, mean=[0.1], std=[0.5])
    assert everything(images)[0].shape == (200, 1, 6, 6)
    assert everything(images)[0].unique().tolist() == pytest.approx([(51 / 255 - 0.1) / 0.5])


def test_flipping_adds_each_images_mirror_image_once_an_epoch(arrays: Callable[..., str]) -> None:
    path = arrays()
    plain, flipped = task(path), task(path, flip=True)
    assert flipped.num_train == 2 * plain.num_train
    assert flipped.num_eval == plain.num_eval
    images, labels = everything(flipped)
    before, after = images.chunk(2)
    assert torch.equal(before, everything(plain)[0])
    assert torch.equal(after, before.flip(3))
    assert torch.equal(labels, everything(plain)[1].repeat(2))


def test_an_epoch_is_the_same_however_it_is_cut_into_batches(arrays: Callable[..., str]) -> None:
    images = task(arrays(), flip=True)
    order = Sampler(images.num_train, seed=3, replacement=images.replacement)
    whole, labels = images.train_batch(order.take(0, images.num_train))
    cuts = [0, 7, 100, images.num_train]
    parts = [images.train_batch(order.take(start, end - start)) for start, end in pairwise(cuts)]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    assert torch.equal(torch.cat([part for _, part in parts]), labels)
    assert len(whole.flatten(1).unique(dim=0)) == images.num_train


def test_the_loss_is_the_mean_negative_log_probability(arrays: Callable[..., str]) -> None:
    images = task(arrays())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).double()
    found, labels = images.train_batch(np.arange(10))
    batch = (found.double(), labels)
    scores = model(batch[0]).detach().numpy()
    right = scores[np.arange(10), labels.numpy()]
    expected = (np.log(np.exp(scores).sum(1)) - right).mean()
    assert float(images.loss(model, batch).detach()) == pytest.approx(expected, rel=1e-12)


def test_a_model_of_other_classes_is_refused(arrays: Callable[..., str]) -> None:
    images = task(arrays())
    with pytest.raises(ValueError, match=r"= \(3, 4\), got \(3, 5\): choose an image model"):
        images.loss(
            nn.Sequential(nn.Flatten(), nn.Linear(108, 5)), images.train_batch(np.arange(3))
        )


def test_class_folders_are_classes_in_the_order_of_their_names(folder: Path) -> None:
    images = task(str(folder), classes=3, size=5, mean=[0.0] * 3, std=[1 / 255.0] * 3)
    for batch in (everything(images), images.eval_batch(np.arange(images.num_eval))):
        found, labels = batch
        numbers = found[:, 0, 0, 0].round()
        assert torch.equal(numbers.long() % 3, labels)
        torch.testing.assert_close(found[:, 2, 4, 4], 3 * numbers)
    assert images.num_train + images.num_eval == 60
    assert images.num_eval > 0


def test_grey_images_are_read_from_a_folder_of_colours(folder: Path) -> None:
    images = task(str(folder), classes=3, size=5, channels=1, mean=[0.0], std=[1 / 255.0])
    found, labels = images.train_batch(np.array([0]))
    assert found.shape == (1, 1, 5, 5)
    number = 3 * np.arange(20) + int(labels[0])
    grey = 0.299 * number + 0.587 * 2 * number + 0.114 * 3 * number
    assert np.abs(grey - float(found[0, 0, 0, 0])).min() < 1.0


def test_other_files_can_be_held_out(arrays: Callable[..., str]) -> None:
    other = arrays("other.npz", images=pixels(7, 6, 6, 3), labels=np.zeros(7, np.int8))
    images = task(arrays(), eval_path=other)
    assert (images.num_train, images.num_eval) == (200, 7)
    assert set(images.eval_batch(np.arange(7))[1].tolist()) == {0}


def test_the_hash_is_of_the_content(arrays: Callable[..., str]) -> None:
    first = task(arrays()).provenance()
    again = task(arrays("again.npz")).provenance()
    relabelled = task(arrays("relabelled.npz", labels=np.arange(200) % 3)).provenance()
    assert first["data_hash"] == again["data_hash"] != relabelled["data_hash"]
    assert first["data"].startswith("200 images of images.npz, ")


@pytest.mark.parametrize(
    ("content", "more", "sentence"),
    [
        ({"images": pixels(200, 3, 6, 6)}, {}, "(N, 6, 6, 3), got uint8 of shape (200, 3, 6, 6)"),
        ({"images": pixels(200, 6, 5, 3)}, {}, "(N, 6, 6, 3), got uint8 of shape (200, 6, 5, 3)"),
        ({"images": pixels(200, 6, 6)}, {}, "(N, 6, 6, 3), got uint8 of shape (200, 6, 6)"),
        ({"images": pixels(200, 6, 6) / 255}, {"channels": 1}, "got float64 of shape (200, 6, 6)"),
        ({"labels": np.arange(199) % 4}, {}, "whole numbers of shape (200,), one an image, got"),
        ({"labels": np.ones(200)}, {}, "whole numbers of shape (200,), one an image, got float64"),
        ({"labels": np.arange(200) % 5}, {}, "from 0 to 3 for task.classes=4, got 0 to 4"),
        ({"labels": np.arange(200) % 4 - 1}, {}, "from 0 to 3 for task.classes=4, got -1 to 2"),
        ({"labels": None}, {}, "it has no array labels, but images"),
        ({}, {"held_out": 0}, "task.held_out must be a number > 0 and <= 1, got 0"),
        ({}, {"held_out": 1}, "leaves 0 images for training and 200 for evaluation"),
        ({}, {"mean": [0.5] * 3}, "task.mean and task.std must be given both or neither"),
        ({}, {"mean": [0.5], "std": [0.5]}, "task.mean must have task.channels=3 numbers"),
        ({}, {"mean": [0.5] * 3, "std": [0.0] * 3}, "task.std must be a number > 0, got 0.0"),
        ({}, {"classes": 1}, "task.classes must be a whole number of at least 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_name(
    arrays: Callable[..., str], content: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    path = arrays(**content)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        task(path, **more)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere.npz", "which is not there"),
        ("text.txt", "which is a file"),
        ("text.npz", "text.npz cannot be read as images and labels"),
    ],
)
def test_a_path_that_is_none_of_both_is_refused(tmp_path: Path, name: str, sentence: str) -> None:
    for text in ("text.txt", "text.npz"):
        (tmp_path / text).write_text("no images")
    with pytest.raises(ValueError, match=sentence):
        task(str(tmp_path / name))


def test_no_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task.path must be given: an .npz file"):
        Images(None, classes=4, channels=3, size=6)


def test_objects_in_an_npz_are_not_unpickled(arrays: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="cannot be read as images and labels"):
        task(arrays(labels=np.array([{}] * 200, dtype=object)))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: Image.new("RGB", (7, 5)).save(f / "bee" / "x.png"), "x.png must be 5 by 5 .* 7"),
        (lambda f: (f / "cat" / "x.jpg").write_text("no image"), "x.jpg cannot be read as an im"),
        (lambda f: (f / "dog").mkdir(), r"must have task.classes=3 class folders, got 4: ant, bee"),
        (lambda f: [file.unlink() for file in (f / "ant").iterdir()], "ant must hold images of"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_before_training(
    folder: Path, spoil: Callable[[Path], Any], sentence: str
) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=sentence):
        task(str(folder), classes=3, size=5)


def test_an_image_that_breaks_off_is_named(folder: Path) -> None:
    """Its header is whole, so it is found when it is read."""
    images = task(str(folder), classes=3, size=5, mean=[0.0] * 3, std=[1.0] * 3)
    for file in folder.rglob("*.png"):
        content = file.read_bytes()
        file.write_bytes(content[: content.index(b"IDAT") + 6])
    with pytest.raises(ValueError, match=r"\d\d.png cannot be read as an image"):
        images.train_batch(np.array([0]))


def test_folders_of_other_classes_are_no_evaluation(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in ("ant", "bee", "dog"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (5, 5)).save(other / name / "0.png")
    with pytest.raises(ValueError, match="in one alone: cat, dog"):
        task(str(folder), classes=3, size=5, eval_path=str(other))


def test_a_run_learns_to_tell_a_bright_half_from_a_dark_one(
    tmp_path: Path, train: Callable[..., int], read_run: Callable[..., Any]
) -> None:
    """Images whose class is a rule, the right or the left half brighter. 0.1 nats is 90 % sure."""
    images = pixels(400, 8, 8) // 2
    labels = np.arange(400) % 2
    images[labels == 0, :, :4] += 100
    images[labels == 1, :, 4:] += 100
    np.savez(tmp_path / "halves.npz", images=images, labels=labels)
    words = ["task=images", "task.path=halves.npz", "task.classes=2", "task.channels=1"]
    more = ["task.size=8", "model.widths=[16]", "target.loss=0.1", "batch.size=64", "optim.lr=0.01"]
    assert train(*words, *more, "hydra.run.dir=run", "budget.samples=2e4") == 0
    _, summary = read_run(tmp_path / "run")
    assert summary["status"] == "reached"
    assert summary["provenance"]["data"].startswith("400 images of halves.npz")
