"""The data sets: from small files written here, what comes out and what is refused."""

import gzip
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from headrace.launch.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    Digits,
    Generated,
    GeneratedTokens,
    HuggingFace,
    ImageFolder,
    SourceText,
)
from headrace.launch.data.mnist import read_idx

os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is first imported
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


# Digits


def test_digits_are_split_in_1437_and_360_and_centred_on_the_training_images() -> None:
    pytest.importorskip("sklearn")
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    image, label = train[0]
    assert (image.shape, image.dtype) == ((64,), torch.float32)
    assert (label.shape, label.dtype) == ((), torch.int64)
    assert train.inputs.mean(dim=0).abs().max() < 1e-6
    assert train.inputs.std().item() == pytest.approx(1, abs=1e-3)
    assert test.targets.bincount(minlength=10).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]


def test_digits_name_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"Digits needs .* 'headrace\[scikit-learn\]'"):
        Digits()


# Source text


def test_source_text_gives_windows_and_the_same_one_character_later() -> None:
    data = SourceText("train", context=50, characters=10_000)
    assert len(data) == (9_000 - 51) // 50 + 1
    first, target = data[0]
    second, _ = data[1]
    assert first.dtype == target.dtype == torch.int64
    assert torch.equal(target, torch.cat([first[1:], second[:1]]))
    assert data.decode(torch.cat([first, second])).startswith('"""Record of phased-in')
    assert len(list(iter(data))) == len(data)


def test_source_text_s_last_tenth_is_for_validation() -> None:
    train = SourceText("train", context=10, characters=20_000)
    validation = SourceText("validation", context=10, characters=20_000)
    assert (len(train.text), len(validation.text)) == (18_000, 2_000)
    longer = SourceText("train", context=10, characters=40_000)
    assert torch.equal(longer.text[18_000:20_000], validation.text)


def test_source_text_s_stride_makes_windows_overlap() -> None:
    data = SourceText("train", context=8, characters=1_000, stride=3)
    assert len(data) == (900 - 9) // 3 + 1
    assert torch.equal(data[1][0], data[0][0].new_tensor(data.text[3:11].tolist()))
    assert data[len(data) - 1][1].shape == (8,)


def test_source_text_has_97_symbols_whatever_the_text() -> None:
    assert len(SourceText.vocabulary) == 97
    symbols = SourceText.encode("a\n é\t~")
    assert symbols.tolist() == [2 + ord("a") - 32, 1, 2, 0, 0, 96]
    assert SourceText.decode(symbols) == "a\n \ufffd\ufffd~"


def test_source_text_reads_sorted_paths_and_leaves_tests_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, text in {
        "b.py": "bbb",
        "a/z.py": "azz",
        "a.py": "aaa",
        "test/t.py": "ttt",
        "a/tests/t.py": "ttt",
        "site-packages/s.py": "sss",
        "config-3-x86/c.py": "ccc",
        "_sysconfigdata_linux.py": "ddd",
        "notes.txt": "nnn",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    data = SourceText("train", context=2, characters=9)
    assert data.decode(data.text) == "aaaazzbb"
    with pytest.raises(ValueError, match="characters=10: the standard library has 9 of them"):
        SourceText("train", context=2, characters=10)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: f"{tmp_path}/none")
    with pytest.raises(FileNotFoundError, match=r"no .py files of the standard library in .*none"):
        SourceText()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split='test': give one of train, validation"),
        ({"context": 0}, "context=0: give a whole number"),
        ({"stride": 0}, "stride=0: give a whole number"),
        ({"characters": -1}, "characters=-1"),
        (
            {"split": "validation", "characters": 100, "context": 10},
            "context=10: the validation split has 10 characters",
        ),
    ],
)
def test_source_text_refuses_what_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceText(**arguments)


# MNIST


def idx(array: Tensor) -> bytes:
    header = b"\0\0\x08" + bytes([array.dim()])
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + sizes + bytes(array.flatten().int().tolist())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    images = torch.arange(5 * 6).view(5, 2, 3)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(torch.tensor([3, 1, 4, 1, 5])))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:2])))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.tensor([9, 2]))))
    return tmp_path


def test_mnist_reads_idx_files_unpacked_or_not(mnist: Path) -> None:
    train, test = MNIST(mnist, "train"), MNIST(str(mnist), "test", mean=0.5, std=0.25)
    assert (len(train), len(test)) == (5, 2)
    image, label = train[2]
    expected = (torch.arange(12.0, 18.0).view(1, 2, 3) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(image, expected)
    assert (label.item(), label.dtype) == (4, torch.int64)
    torch.testing.assert_close(test[0][0].flatten()[3].item(), (3 / 255 - 0.5) / 0.25)
    assert test.targets.tolist() == [9, 2]


def test_a_missing_mnist_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        MNIST(tmp_path, "test")
    message = str(caught.value)
    assert f"there is no file {tmp_path}/t10k-images-idx3-ubyte" in message
    assert "http://yann.lecun.com/exdb/mnist" in message
    assert "https://github.com/zalandoresearch/fashion-mnist" in message
    assert f"put them into {tmp_path}" in message


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x", b"<html>", "x is not an IDX file of unsigned bytes"),
        ("x", idx(torch.zeros(2, 3))[:-1], r"states the shape \[2, 3\] and has 5 bytes of data"),
        ("x", b"\0\0\x08\x03\0", "get it again"),
        ("x.gz", b"<html>", "x.gz cannot be unpacked"),
        ("x.gz", gzip.compress(idx(torch.zeros(2, 3)), mtime=0)[:-9], "x.gz cannot be unpacked"),
    ],
)
def test_damaged_idx_files_are_refused(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name)


def test_mnist_refuses_files_that_do_not_belong_together(mnist: Path) -> None:
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(torch.tensor([3, 1])))
    with pytest.raises(ValueError, match=r"images have shape \(5, 2, 3\), its labels \(2,\)"):
        MNIST(mnist)
    with pytest.raises(ValueError, match="split='valid': give one of train, test"):
        MNIST(mnist, "valid")  # type: ignore[arg-type]


# CIFAR


def records(*labels: list[int]) -> bytes:
    return b"".join(bytes(label) + bytes(range(256)) * 12 for label in labels)


def test_cifar_10_joins_its_five_files(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(records([number], [9]))
    (folder / "test_batch.bin").write_bytes(records([7]))

    train = CIFAR10(tmp_path)  # where the archive was unpacked …
    assert train.targets.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
    test = CIFAR10(folder, "test")  # … or the folder it holds
    image, label = test[0]
    assert (image.shape, image.dtype, label.item()) == ((3, 32, 32), torch.float32, 7)
    # Planes are red, green, blue; a row is 32 bytes.
    for channel, (mean, std) in enumerate(zip(CIFAR10.mean, CIFAR10.std, strict=True)):
        expected = (34 / 255 - mean) / std
        assert image[channel, 1, 2].item() == pytest.approx(expected, abs=1e-6)


def test_cifar_100_gives_the_fine_label(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(records([3, 77], [1, 99]))
    assert CIFAR100(tmp_path).targets.tolist() == [77, 99]
    assert CIFAR100(tmp_path)[1][0].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("dataset", "archive", "file"),
    [
        (CIFAR10, "cifar-10-binary.tar.gz", "cifar-10-batches-bin/data_batch_1.bin"),
        (CIFAR100, "cifar-100-binary.tar.gz", "cifar-100-binary/train.bin"),
    ],
)
def test_a_missing_cifar_file_says_where_to_get_it(
    tmp_path: Path, dataset: Callable[..., Any], archive: str, file: str
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        dataset(tmp_path)
    message = str(caught.value)
    assert f"there is no file {tmp_path}/{file}" in message
    assert f"Get {archive}" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message
    assert f"unpack it in {tmp_path}" in message


def test_a_cifar_file_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.bin").write_bytes(records([3, 77])[:-1])
    with pytest.raises(ValueError, match="3073 bytes, not a multiple of a record's 3074"):
        CIFAR100(tmp_path, "test")
    with pytest.raises(ValueError, match="split='validation': give one of train, test"):
        CIFAR100(tmp_path, "validation")  # type: ignore[arg-type]


# Image folders


@pytest.fixture
def images(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for path, size, color in (
        ("dog/b.png", (40, 20), (255, 0, 0)),
        ("dog/more/a.JPG", (20, 60), (0, 255, 0)),
        ("cat/a.png", (16, 16), (0, 0, 255)),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", size, color).save(tmp_path / path)
    image.new("L", (16, 20), 51).save(tmp_path / "cat" / "grey.png")
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_image_folders_give_normalised_squares_and_a_class_per_folder(images: Path) -> None:
    data = ImageFolder(images, size=8)
    assert data.classes == ["cat", "dog"]
    assert [label.item() for _, label in (data[i] for i in range(len(data)))] == [0, 0, 1, 1]
    blue, _ = data[0]
    assert (blue.shape, blue.dtype) == ((3, 8, 8), torch.float32)
    expected = [(0 - 0.485) / 0.229, (0 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(blue[:, 3, 5], torch.tensor(expected))
    grey, _ = ImageFolder(images, size=8, mean=(0, 0, 0), std=(1, 1, 1))[1]
    torch.testing.assert_close(grey, torch.full((3, 8, 8), 0.2))


def test_the_shorter_side_is_resized_and_the_middle_cut_out(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "only").mkdir()
    stripes = image.new("RGB", (30, 10))
    stripes.paste((255, 255, 255), (10, 0, 20, 10))
    stripes.save(tmp_path / "only" / "stripes.png")
    white, _ = ImageFolder(tmp_path, size=10, mean=(0, 0, 0), std=(1, 1, 1))[0]
    assert torch.equal(white, torch.ones(3, 10, 10))


def test_image_folder_errors_say_what_to_do(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"put the images at ROOT/CLASS/NAME.jpg"):
        ImageFolder(images / "missing")
    with pytest.raises(FileNotFoundError, match="not a folder with one subfolder for each class"):
        ImageFolder(images / "cat")
    with pytest.raises(ValueError, match="size=0"):
        ImageFolder(images, size=0)
    (images / "cat" / "a.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"cat/a.png cannot be read as an image"):
        ImageFolder(images)[0]
    (images / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no images \(.bmp, .gif"):
        ImageFolder(images)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "PIL.Image", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"ImageFolder needs .* 'headrace\[pillow\]'"):
        ImageFolder(images)


# Hugging Face


@pytest.fixture
def hub_cache(tmp_path: Path) -> dict[str, Any]:
    pytest.importorskip("datasets")
    return {"cache_dir": str(tmp_path / "cache")}


def test_hugging_face_reads_columns_of_a_local_csv(
    tmp_path: Path, hub_cache: dict[str, Any]
) -> None:
    (tmp_path / "t.csv").write_text("a,b,label,text\n1,0.5,3,x\n2,-1,4,y\n7,8,9,z\n")
    data = HuggingFace(
        "csv",
        input=["a", "b"],
        target="label",
        split="train[:2]",
        data_files=str(tmp_path / "t.csv"),
        options=hub_cache,
    )
    assert len(data) == 2
    torch.testing.assert_close(data[1][0], torch.tensor([2.0, -1.0]))
    assert (data[1][1].item(), data[1][1].dtype) == (4, torch.int64)
    inputs, targets = next(iter(DataLoader(data, batch_size=2)))
    assert (inputs.shape, targets.tolist()) == ((2, 2), [3, 4])


def test_hugging_face_reads_parquet_and_saved_folders(
    tmp_path: Path, hub_cache: dict[str, Any]
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"tokens": [[1, 2, 3], [4, 5, 6]], "next": [[2, 3, 4], [5, 6, 7]], "score": [0.5, 1.5]}
    )
    rows.to_parquet(str(tmp_path / "t.parquet"))
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "both")

    parquet = HuggingFace(
        "parquet",
        input="tokens",
        target="next",
        data_files=[str(tmp_path / "t.parquet")],
        options=hub_cache,
    )
    saved = HuggingFace(tmp_path / "one", input="tokens", target="score")
    test = HuggingFace(tmp_path / "both", input="tokens", target="next", split="test")

    assert [part.tolist() for part in parquet[1]] == [[4, 5, 6], [5, 6, 7]]
    assert parquet[1][0].dtype == torch.int64
    assert (saved[1][1].item(), saved[1][1].dtype) == (1.5, torch.float32)
    assert (len(test), test[0][1].tolist()) == (1, [5, 6, 7])
    with pytest.raises(ValueError, match=r"split='valid': .*both has train, test"):
        HuggingFace(tmp_path / "both", input="tokens", target="next", split="valid")
    with pytest.raises(ValueError, match=r"split='test': .*one was saved from one split"):
        HuggingFace(tmp_path / "one", input="tokens", target="next", split="test")


def test_hugging_face_gives_images_between_0_and_1(images: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [str(images / "dog/b.png")], "label": [1]})
    rows = rows.cast_column("image", datasets.Image())
    rows.save_to_disk(str(images / "saved"))
    image, _ = HuggingFace(images / "saved", input="image", target="label")[0]
    assert (image.shape, image.dtype) == ((3, 20, 40), torch.float32)
    assert image[:, 0, 0].tolist() == [1, 0, 0]


def test_hugging_face_errors_say_what_to_do(
    tmp_path: Path, hub_cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": [[1, 2]], "text": ["words"], "y": [1]})
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "t.csv").write_text("x,y\n1,2\n")

    def load(path: str, **arguments: Any) -> HuggingFace:
        return HuggingFace(tmp_path / path, **{"input": "x", "target": "y", **arguments})

    with pytest.raises(ValueError, match=r"there is no column 'z' in .*; it has x, text, y"):
        load("saved", target="z")
    with pytest.raises(TypeError, match="column 'text' holds str, not numbers: turn it into"):
        load("saved", input="text")
    with pytest.raises(TypeError, match=r"column 'x' holds \(2,\) tensors: several columns"):
        load("saved", input=["y", "x"])
    csv: dict[str, Any] = {"input": "x", "target": "y", "options": hub_cache}
    with pytest.raises(ValueError, match="corresponds to no data"):
        HuggingFace("csv", data_files=str(tmp_path / "t.csv"), split="train[:0]", **csv)
    with pytest.raises(FileNotFoundError, match="Local files are looked for from"):
        HuggingFace("csv", data_files="none.csv", **csv)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"HuggingFace needs .* 'headrace\[datasets\]'"):
        load("saved")


# Generated


def test_generated_items_depend_on_seed_and_index_alone() -> None:
    data, twin = Generated([3, 4], 10, samples=6), Generated((3, 4), 10, samples=6)
    twin[0]  # order does not matter
    assert torch.equal(data[5][0], twin[5][0])
    assert not torch.equal(data[5][0], data[4][0])
    assert not torch.equal(data[5][0], Generated([3, 4], 10, seed=1)[5][0])
    assert (data[0][0].shape, data[0][0].dtype) == ((3, 4), torch.float32)
    assert (len(data), len(list(iter(data)))) == (6, 6)


def test_generated_numbers_are_standard_normal_and_labels_cover_the_classes() -> None:
    data = Generated([16], classes=3, samples=200)
    inputs, targets = next(iter(DataLoader(data, batch_size=200)))
    assert abs(inputs.mean().item()) < 0.1
    assert inputs.std().item() == pytest.approx(1, abs=0.05)
    assert targets.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_generated_dtypes_have_names(dtype: torch.dtype | str) -> None:
    assert Generated([2], 2, dtype=dtype)[0][0].dtype is torch.bfloat16


def test_generated_tokens_are_followed_by_their_targets() -> None:
    data = GeneratedTokens(context=50, vocabulary=7, samples=3)
    tokens, target = data[2]
    assert torch.equal(tokens[1:], target[:-1])
    assert tokens.dtype == torch.int64
    assert set(tokens.tolist()) == set(range(7))
    assert (len(data), len(list(iter(data)))) == (3, 3)
    assert torch.equal(GeneratedTokens(50, 7)[2][0], tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Generated([3, 0], 10), r"shape\[1\]=0: give a whole number"),
        (lambda: Generated([3], 0), "classes=0"),
        (lambda: Generated([3], 2, samples=0), "samples=0"),
        (lambda: Generated([3], 2, dtype="int64"), "dtype='int64': give a floating-point one"),
        (lambda: Generated([3], 2, dtype="half-ish"), "dtype='half-ish'"),
        (lambda: GeneratedTokens(0, 7), "context=0"),
        (lambda: GeneratedTokens(5, 0), "vocabulary=0"),
    ],
)
def test_generated_refuses_what_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
