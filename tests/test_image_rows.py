"""Images as rows: read from anywhere, decoded once, augmented in training alone, kept."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import noiseproof
from noiseproof.checkpoint import Interrupted
from noiseproof.cli import main
from noiseproof.engine import Engine
from noiseproof.errors import InputError
from noiseproof.job import Job
from noiseproof.loop import Progress
from noiseproof.method import Batch, Run, logits_of
from noiseproof.methods import GCE, TURN, CleaR, CrossEntropy, NMTune
from noiseproof.methods.clear import routing_of
from noiseproof.models import load_image_processor
from noiseproof.preparation import Prepared
from noiseproof.record import RunRecord
from noiseproof.tables import load_table
from noiseproof.tasks import pixels
from noiseproof.tasks.augmentation import CHANGES, augmented, parse_changes
from noiseproof.tasks.images import ImageClassification, ImageColumn, Pixels
from noiseproof.tuning import tune_model
from rows import IMAGE_CONFIGS, image_model, image_rows
from tiny import LABELS, python, same_weights, train_settings, weights


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own, empty cache for every test."""
    monkeypatch.setenv("NOISEPROOF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fit(data: Any = None, **changes: Any) -> Any:
    """A short run on the tiny ViT."""
    settings: dict[str, Any] = {"task": "image", "model": image_model(), "method": CrossEntropy()}
    settings |= {"train": train_settings(**({"epochs": 1} | changes.pop("train", {})))}
    return noiseproof.fit(image_rows() if data is None else data, **(settings | changes))


def task_of(**changes: Any) -> ImageClassification:
    return ImageClassification(load_image_processor(image_model()), **changes)


def files(folder: Path, data: dict[str, Any], *, by_class: bool = True) -> list[str]:
    """Write the images as PNG; their names relative to the folder."""
    names = []
    for row, (array, label) in enumerate(zip(data["image"], data["label"], strict=True)):
        name = f"{label}/{row:03d}.png" if by_class else f"pictures/{row:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / name)
        names.append(name)
    return names


def read(source: Any, image: str = "image", split: str = "train") -> np.ndarray:
    """The pixels that are found in a table, in order."""
    table = load_table(source, split)
    inputs = ImageColumn(image).read(table, np.arange(len(table)))
    found, good = task_of().ready(inputs)
    assert isinstance(found, Pixels) and len(good) == len(table)
    return found.block(np.arange(len(found)))


# --- reading -------------------------------------------------------------------------------------


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    """A channel or an axis that is swapped still trains, on other pictures."""
    data = image_rows(6)
    wanted = data["image"]
    names = files(tmp_path / "by_name", data, by_class=False)
    pd.DataFrame({"image": names, "label": data["label"]}).to_csv(
        tmp_path / "by_name" / "t.csv", index=False
    )
    raw = [(tmp_path / "by_name" / name).read_bytes() for name in names]
    np.savez(tmp_path / "a.npz", image=wanted)
    np.savez_compressed(tmp_path / "b.npz", image_train=wanted, image_test=wanted[:2])
    table = pd.DataFrame({"image": [{"bytes": one, "path": None} for one in raw]})
    table.to_parquet(tmp_path / "t.parquet")
    saved = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(array) for array in wanted]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    saved.save_to_disk(tmp_path / "saved")
    sources = {
        "csv": tmp_path / "by_name" / "t.csv", "npz": tmp_path / "a.npz",
        "packed": tmp_path / "b.npz", "parquet": tmp_path / "t.parquet",
        "saved": tmp_path / "saved", "dataset": saved,
        "array": {"image": wanted}, "bytes": {"image": raw},
        "pillow": {"image": [Image.fromarray(array) for array in wanted]},
        "absolute": {"image": [str(tmp_path / "by_name" / name) for name in names]},
    }  # fmt: skip
    for name, source in sources.items():
        np.testing.assert_array_equal(read(source), wanted, err_msg=name)
    assert len(read(tmp_path / "b.npz", split="test")) == 2


def test_a_folder_per_class_is_a_table(tmp_path: Path) -> None:
    """With or without a folder per split above it."""
    data = image_rows(6)
    files(tmp_path / "all" / "train", data)
    files(tmp_path / "all" / "test", image_rows(3, seed=1))
    table = load_table(tmp_path / "all" / "train").frame
    assert table["label"].tolist() == sorted(data["label"])
    assert table["image"][0] == f"{LABELS[0]}/000.png"
    pd.testing.assert_frame_equal(load_table(tmp_path / "all").frame, table)
    assert len(load_table(tmp_path / "all", "test").frame) == 3
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no folders of images"):
        load_table(tmp_path / "empty")


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_every_mode_become_rgb(tmp_path: Path, mode: str, in_memory: bool) -> None:
    """Grey scans and transparent icons stand beside photos; a scan of 16 bits is not all white."""
    colour = Image.fromarray(image_rows(1)["image"][0])
    grey = np.asarray(colour.convert("L"))
    wanted = np.asarray(colour)
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
        wanted = np.stack([grey] * 3, axis=-1)
    else:
        picture = colour.convert(mode)
        if mode in ("L", "LA"):
            wanted = np.stack([grey] * 3, axis=-1)
        elif mode in ("P", "1"):
            wanted = np.asarray(picture.convert("RGB"))
            assert len(np.unique(wanted)) > 1
    file = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    picture.save(file)
    found = read({"image": [picture if in_memory else str(file)]})
    np.testing.assert_array_equal(found, wanted[None])


def test_grey_arrays_become_rgb() -> None:
    grey = image_rows(2)["image"][:, :, :, 0]
    np.testing.assert_array_equal(read({"image": grey}), np.stack([grey] * 3, axis=-1))
    assert read({"image": np.zeros((2, 9, 7), np.uint8)}).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_that_does_not_say_what_is_white_is_refused(mode: str) -> None:
    """Clipped to 8 bits, such pictures would be white or black."""
    picture = Image.new(mode, (8, 8), 70_000)
    with pytest.raises(InputError, match=rf"have the mode {mode}, which.*convert it to L or RGB"):
        read({"image": [picture]})


def test_a_16_bit_png_of_an_older_pillow_is_scaled() -> None:
    """It was read as mode I."""
    picture = Image.new("I", (8, 8), 128 * 257)
    picture.format = "PNG"
    assert (read({"image": [picture]}) == 128).all()


def test_a_palette_tells_pictures_apart() -> None:
    """The numbers of a picture alone are not what it shows."""
    indices = Image.fromarray(np.tile(np.arange(2, dtype=np.uint8), (8, 4)))
    pictures = []
    for colours in ((0, 0, 0, 255, 0, 0), (0, 0, 255, 0, 255, 0)):
        one = indices.copy()
        one.putpalette(colours)
        pictures.append(one)
    assert pictures[0].mode == "P" and pictures[0].tobytes() == pictures[1].tobytes()
    for one in pictures:
        wanted = np.asarray(one.convert("RGB"))[None]
        np.testing.assert_array_equal(read({"image": [one]}), wanted)
    found, _ = task_of().ready(task_of().inputs_of(pictures))
    assert isinstance(found, Pixels) and len({mark.tobytes() for mark in found.digests}) == 2


def test_a_turned_photo_is_put_upright(tmp_path: Path) -> None:
    """Cameras write how they were held beside the pixels."""
    picture = Image.fromarray(image_rows(1)["image"][0])
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        found = read({"image": [str(tmp_path / "turned.png"), opened]})
    for turned in found:  # of a file, and of an image of Pillow
        np.testing.assert_array_equal(turned, np.asarray(picture)[::-1, ::-1])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([""], "cannot read row 1 of the table (image 0): the cell is empty"),
        ([None], "cannot read row 1 of the table (image 0): the cell is empty"),
        ([b""], "cannot read row 1 of the table (image 0): the cell is empty"),
        ([{"bytes": None, "path": None}], "(image 0): the cell is empty"),
        ([3], "row 1 of the table, column 'image', has a value of type int, expected an image"),
        (["absent.png"], "cannot read row 1 of the table (absent.png): the file does not exist"),
        ([b"no image"], "cannot read row 1 of the table (image 0): it is no image"),
        (
            np.zeros((2, 8, 8, 3)),
            "array 'image' of the table has shape (2, 8, 8, 3) and type float",
        ),
        (np.zeros((2, 8, 8, 5), np.uint8), "expected uint8 images (rows, height, width, 3)"),
        ([np.zeros((8, 8))], "row 1 of the table, column 'image', has shape (1, 8, 8) and type"),
    ],
)
def test_what_is_no_image_is_told_with_its_row(cells: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        read({"image": cells})
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_column_that_is_missing_is_told() -> None:
    with pytest.raises(InputError, match=r"no column 'picture' \(image\)"):
        read({"image": [b"x"]}, "picture")


# --- decoding and its cache ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "convnext", "efficientnet", "efficientnet-top"])
def test_pixel_values_are_those_of_the_processor(name: str, tmp_path: Path) -> None:
    """Scaled by other means than in pre-training, features are other features."""
    kind, _, top = name.partition("-")
    processor = load_image_processor(image_model("vit" if kind == "efficientnet" else kind))
    if kind == "efficientnet":
        values = json.loads((Path(image_model()) / "preprocessor_config.json").read_text())
        values |= {"image_processor_type": "EfficientNetImageProcessor"}
        values |= {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": bool(top)}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        processor = load_image_processor(str(tmp_path))
    random = np.random.default_rng(1)
    pictures = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((8, 8), (20, 9))]
    task = ImageClassification(processor)
    found = task.encode(pictures).inputs(np.arange(2))["pixel_values"]
    wanted = np.stack([processor([Image.fromarray(one)])["pixel_values"][0] for one in pictures])
    assert found.shape == (2, 3, 8, 8) and found.dtype == torch.float32
    # the processor scales before it rounds to whole pixels, or after: half a step of 1 / 255
    half = 0.51 / 255 / 0.2 * {"": 1, "top": 2 / 0.2}[top] * (2 if kind == "efficientnet" else 1)
    np.testing.assert_allclose(found.numpy(), wanted, atol=half)
    np.testing.assert_allclose(found[0].numpy(), wanted[0], rtol=1e-5, atol=1e-5)


def test_a_processor_of_which_no_pixel_can_be_scaled_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is decoded, by its name: wrong values would be learned from in silence."""
    processor = load_image_processor(image_model())
    original = type(processor)._preprocess

    def curved(self: Any, *arguments: Any, **named: Any) -> Any:
        answer = original(self, *arguments, **named)
        if named["do_rescale"]:
            answer["pixel_values"] = [np.square(one) for one in answer["pixel_values"]]
        return answer

    monkeypatch.setattr(type(processor), "_preprocess", curved)
    monkeypatch.setattr(pixels, "_decode_one", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match=f"{type(processor).__name__} of this model changes"):
        fit()


def test_images_are_decoded_once_for_all_runs(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Decoding and resizing a large data set takes longer than an epoch on its pixels."""
    first = fit()
    kept = sorted(path.name for path in (cache / "images").iterdir())
    assert {Path(name).suffix for name in kept} == {".npy", ".digests", ".json"}
    monkeypatch.setattr(pixels, "_decode_one", lambda *_: pytest.fail("decoded again"))
    again = fit()
    assert sorted(path.name for path in (cache / "images").iterdir()) == kept
    assert same_weights(first.predictor.model, again.predictor.model)
    assert first.record.data["fingerprint"] == again.record.data["fingerprint"]


def test_a_file_that_changed_is_decoded_again(tmp_path: Path) -> None:
    """A cache that goes by the name alone would answer with the old picture."""
    data = image_rows(2)
    names = [str(tmp_path / name) for name in files(tmp_path, data)]
    before = read({"image": names})
    Image.fromarray(255 - data["image"][0]).save(names[0])
    os.utime(names[0], (1, 1))
    after = read({"image": names})
    assert not np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


def test_a_cache_that_was_cut_short_is_made_anew(cache: Path) -> None:
    wanted = read(image_rows(4))
    (path,) = (cache / "images").glob("*.npy")
    path.write_bytes(path.read_bytes()[:200])
    np.testing.assert_array_equal(read(image_rows(4)), wanted)


def test_a_run_that_dies_while_decoding_leaves_no_table(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a table would be zeros for the rest."""
    monkeypatch.setattr(pixels, "PIECE", 2)
    original, calls = pixels._decode_one, []

    def breaks(source: Any, processor: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(source, processor)

    monkeypatch.setattr(pixels, "_decode_one", breaks)
    with pytest.raises(KeyboardInterrupt):
        read(image_rows(6))
    assert not list((cache / "images").iterdir())


def test_a_table_is_whole_while_others_look_for_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers of a grid decode the same images at once; neither may see half a file."""
    data, inside = image_rows(4), []
    original = os.replace

    def looks(source: Any, target: Any) -> None:
        names = {path.suffix for path in (cache / "images").iterdir() if path.is_file()}
        assert ".npy" not in names and Path(target).suffix not in names
        if not inside:  # another process does the same work in between
            inside.append(1)
            monkeypatch.setattr(os, "replace", original)
            np.testing.assert_array_equal(read(data), data["image"])
            for path in (cache / "images").glob("*.*"):
                if path.is_file():  # and begins it anew
                    path.write_bytes(b"")
        original(source, target)

    monkeypatch.setattr(os, "replace", looks)
    np.testing.assert_array_equal(read(data), data["image"])
    assert inside
    monkeypatch.setattr(pixels, "_decode_one", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(read(data), data["image"])


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Written through a map, a page that finds no place on the disk ends the process."""
    import resource

    original = np.lib.format.open_memmap

    def only_read(*arguments: Any, mode: str = "w+", **named: Any) -> Any:
        assert mode == "r", "a map is written through"
        return original(*arguments, mode=mode, **named)

    monkeypatch.setattr(np.lib.format, "open_memmap", only_read)
    read(image_rows(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write the image cache"):
            read(image_rows(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(list((cache / "images").iterdir())) == 3  # those of the first


def test_a_file_that_could_not_be_read_once_is_read_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Too many open files is no property of the image."""
    data = image_rows(3)
    names = [str(tmp_path / name) for name in files(tmp_path, data)]
    original = Path.read_bytes

    def refuses(self: Path) -> bytes:
        if str(self) == names[1]:
            raise OSError(errno.EMFILE, "Too many open files")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuses)
        with pytest.raises(InputError, match=r"001\.png\): Too many open files"):
            read({"image": names})
        assert not list((cache / "images").iterdir())
        task = task_of(on_bad_image="skip")
        found, good = task.ready(task.inputs_of(names))
        assert good.tolist() == [0, 2] and isinstance(found, Pixels)
        np.testing.assert_array_equal(found.block(np.arange(2)), data["image"][[0, 2]])
    np.testing.assert_array_equal(read({"image": names}), data["image"])


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NOISEPROOF_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write the image cache .*NOISEPROOF_CACHE"):
        read(image_rows(2))


def test_worker_processes_decode_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the order of the rows, bad ones included."""
    data = image_rows(12)
    names = [str(tmp_path / name) for name in files(tmp_path, data)]
    names[5] = str(tmp_path / "absent.png")
    stamps = [name.encode() for name in names]
    monkeypatch.setattr(pixels, "PIECE", 2)
    alone = pixels.decode(names, stamps, load_image_processor(image_model()))
    monkeypatch.setenv("NOISEPROOF_CACHE", str(tmp_path / "other"))
    shared = pixels.decode(names, stamps, load_image_processor(image_model()), workers=2)
    np.testing.assert_array_equal(alone.pixels, shared.pixels)
    np.testing.assert_array_equal(alone.digests, shared.digests)
    assert alone.bad == shared.bad == {5: "the file does not exist"}


def test_workers_of_a_script_without_a_guard_are_one_line(tmp_path: Path) -> None:
    """They run the script anew, and one that is piped into Python cannot be found again."""
    names = files(tmp_path, image_rows(pixels.PIECE + 1))
    script = tmp_path / "script.py"
    script.write_text(
        "from noiseproof.models import load_image_processor\n"
        "from noiseproof.tasks.images import ImageClassification\n"
        f"task = ImageClassification(load_image_processor({image_model()!r}), workers=1)\n"
        f"task.encode({[str(tmp_path / name) for name in names]!r})\n",
        encoding="utf-8",
    )
    found = python(str(script), NOISEPROOF_CACHE=str(tmp_path / "cache"))
    last = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 1 and "BrokenProcessPool" not in last
    assert 'if __name__ == "__main__":' in last and "image_workers=0" in last


# --- bad images ----------------------------------------------------------------------------------


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A folder of images of which two cannot be read."""
    folder = tmp_path / "spoilt"
    names = files(folder, image_rows(12, wrong=0.0))
    whole = (folder / names[3]).read_bytes()
    (folder / names[3]).write_bytes(whole[: len(whole) // 2])
    (folder / names[7]).write_bytes(b"")
    return folder


def test_a_bad_image_is_an_error_or_is_left_out_and_counted(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One broken download of 50,000 must neither pass unseen nor stop everything."""
    words = ["fit", str(spoilt), "--task", "image", "--model", image_model(), "--method", "GCE",
             "--train.epochs", "1", "--train.device", "cpu"]  # fmt: skip
    words += ["--test", str(spoilt), "--out"]
    capsys.readouterr()  # what saving the model said
    assert main([*words, str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "(2 such images)" in error and "--on-bad-image skip" in error
    assert f"row 2 of {spoilt} ({LABELS[0]}/003.png)" in error
    run = tmp_path / "b"
    assert main([*words, str(run), "--on-bad-image", "skip"]) == 0
    record = RunRecord.read(run)
    assert record.data["unreadable"] == {"training": 2, "test": 2}
    assert record.data["rows"] == record.data["test_rows"] == 10
    ids = set(pd.read_parquet(run / "samples.parquet")["row_id"].astype(int))
    assert ids == set(range(12)) - {1, 6}
    out = tmp_path / "p.csv"
    capsys.readouterr()
    predict = ["predict", str(run), str(spoilt), "--out", str(out), "--overwrite"]
    assert main([*predict, "--on-bad-image", "error"]) == 2
    assert f"{LABELS[0]}/003.png" in capsys.readouterr().err
    assert main(predict) == 0  # as in training
    table = pd.read_csv(out)
    assert len(table) == 12 and table["predicted_label"].isna().sum() == 2
    assert table["confidence"].isna().tolist() == table["predicted_label"].isna().tolist()


def test_an_empty_cell_is_skipped_like_an_image_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table of 50,000 paths with a gap."""
    data = image_rows(12, wrong=0.0)
    names: list[Any] = list(files(tmp_path, data, by_class=False))
    names[4] = ""
    table = pd.DataFrame({"image": names, "label": data["label"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    words = ["fit", str(tmp_path / "t.csv"), "--task", "image", "--model", image_model(),
             "--method", "GCE", "--train.epochs", "1", "--train.device", "cpu"]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert "row 5 " in error and "the cell is empty" in error and "--on-bad-image skip" in error
    run = tmp_path / "b"
    assert main([*words, "--out", str(run), "--on-bad-image", "skip"]) == 0
    assert RunRecord.read(run).data["unreadable"] == {"training": 1}
    out = tmp_path / "p.csv"
    assert main(["predict", str(run), str(tmp_path / "t.csv"), "--out", str(out)]) == 0
    assert np.flatnonzero(pd.read_csv(out)["predicted_label"].isna()).tolist() == [4]
    away = tmp_path / "away" / "noisy.csv"  # no path of the folder stands there now
    away.parent.mkdir()
    noise = ["--noise", "symmetric:0.3", "--out", str(away)]
    assert main(["corrupt", str(tmp_path / "t.csv"), "--task", "image", *noise]) == 0
    assert np.flatnonzero(pd.read_csv(away)["image"].isna()).tolist() == [4]


def test_images_of_which_none_can_be_read_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is no image"):
        fit({"image": [b"x", b"y"] * 2, "label": ["a", "b"] * 2}, on_bad_image="skip")


# --- augmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_keeps_form_and_hangs_on_its_generator_alone(name: str) -> None:
    """And it does change something, for most draws."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    before, changes = picture.copy(), parse_changes(name)
    made = [augmented(picture, changes, seed, 3) for seed in range(30)]
    for seed, one in enumerate(made):
        assert one.shape == picture.shape and one.dtype == np.uint8
        np.testing.assert_array_equal(one, augmented(picture, changes, seed, 3))
    assert len({one.tobytes() for one in made}) > 1
    np.testing.assert_array_equal(picture, before)


def test_a_crop_of_a_single_pixel_is_possible() -> None:
    assert augmented(np.zeros((1, 1, 3), np.uint8), parse_changes("crop+flip"), 0, 0).shape == (
        1,
        1,
        3,
    )


def test_a_row_is_augmented_alike_in_whatever_batch_it_stands() -> None:
    """A run that is resumed inside an epoch has other batches before it."""
    encoded = task_of(augment="crop+flip+rand").encode(image_rows()["image"])
    plain = encoded.inputs(np.arange(25))["pixel_values"]
    one = encoded.training_inputs(np.arange(25), 7)["pixel_values"]
    other = encoded.training_inputs(np.array([9, 3]), 7)["pixel_values"]
    assert torch.equal(other, one[[9, 3]])
    assert not torch.equal(one, encoded.training_inputs(np.arange(25), 8)["pixel_values"])
    assert torch.equal(plain, encoded.inputs(np.arange(25))["pixel_values"])
    assert not torch.equal(plain, one)
    none = task_of(augment="none").encode(image_rows()["image"])
    assert torch.equal(none.training_inputs(np.arange(25), 7)["pixel_values"], plain)


def test_training_alone_is_augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of disturbed rows would be other scores in every epoch."""
    seen: list[tuple[int, int]] = []

    def spy(picture: np.ndarray, changes: Any, seed: int, row: int, view: int) -> np.ndarray:
        assert view == 0
        seen.append((seed, row))
        return picture

    monkeypatch.setattr("noiseproof.tasks.images.augmented", spy)
    fit(test=image_rows(9, seed=3), clean_label="clean_label", train={"epochs": 2})
    assert len(seen) == 50 and len({seed for seed, _ in seen}) == 2
    assert sorted(row for _, row in seen) == sorted([*range(25)] * 2)
    seen.clear()
    fit(method=CrossEntropy(tune="head"))
    fit(augment="none")
    assert not seen  # features of a frozen encoder are those of the rows as they are


@pytest.mark.parametrize("augment", ["none", "crop+flip"])
def test_a_row_around_the_adapters_is_augmented_too(
    augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortcut of CleaR for closed gates would train the head on rows as they are."""
    apart: list[float] = []
    original = CleaR._logits

    def spy(self: CleaR, model: nn.Module, batch: Batch, run: Run, gate: Tensor) -> Tensor:
        found = original(self, model, batch, run, gate)
        routing = routing_of(run)
        routing.set(gate)
        with torch.no_grad():
            whole = logits_of(model, batch)
        known = routing.frozen is not None and len(routing.frozen) > 0
        assert not known or augment == "none"
        apart.append(float((whole - found.detach()).abs().max()))
        return found

    monkeypatch.setattr(CleaR, "_logits", spy)
    method = CleaR(warmup_epochs=1, gate_unit="network", gamma=0.5)
    fit(method=method, augment=augment, train={"epochs": 2})
    assert max(apart) < 1e-5


def test_an_interrupted_run_goes_on_with_the_same_pictures(tmp_path: Path) -> None:
    """Bit for bit: what was drawn before must not matter for what is drawn next."""
    settings: dict[str, Any] = {"augment": "crop+flip+rand", "train": {"epochs": 2}}
    whole = fit(out=tmp_path / "whole", **settings)

    def stop(progress: Progress) -> None:
        if progress.epoch == 1 and progress.step == 2 and progress.history is None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        fit(out=tmp_path / "run", report=stop, **settings)
    resumed = fit(out=tmp_path / "run", resume=True, **settings)
    assert same_weights(whole.predictor.model, resumed.predictor.model)
    assert whole.history == resumed.history


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "crop+spin"}, "augment must be none, or some of crop, flip, rand joined by +"),
        ({"on_bad_image": "hide"}, "on_bad_image must be one of error, skip; got 'hide'"),
        ({"image_size": 0}, "image_size must lie in"),
        ({"image_workers": -1}, "image_workers must lie in"),
        ({"model": "minilm"}, "task 'image' needs a model of images: give model (minilm, which is"),
        ({"model": None}, "task 'image' needs a model: give model"),
    ],
)
def test_settings_of_images_are_checked_before_anything_is_read(
    settings: dict[str, Any], message: str
) -> None:
    usual = {"task": "image", "model": "x", "method": CrossEntropy()}
    with pytest.raises(InputError) as refusal:
        Job("absent", **(usual | settings))
    assert message in str(refusal.value)


# --- models of transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_CONFIGS)
def test_a_frozen_encoder_is_computed_once_whatever_its_architecture(name: str) -> None:
    """Maps of convolutions, tokens, pooled or not: the head must read the same from the cache."""
    method = CrossEntropy(tune="head")
    work = Prepared(
        Job(image_rows(), task="image", model=image_model(name), method=method,
            train=train_settings(epochs=1))
    )  # fmt: skip
    model = tune_model(work.model, "head", rank=1)
    engine = Engine(work.job.train)
    with torch.no_grad():
        wanted = model.eval()(**work.encoded.inputs(np.arange(25))).logits
    engine.start_stage(model, work.encoded, 1e-3)
    assert engine.cached
    torch.testing.assert_close(engine.predict(work.encoded), wanted, rtol=1e-4, atol=1e-5)
    engine.end_stage()
    for chosen in (method, CrossEntropy(), NMTune(svd_k=2)):  # the last batch has one row
        result = fit(model=image_model(name), method=chosen, train={"epochs": 2})
        assert np.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize("name", IMAGE_CONFIGS)
def test_adapters_find_their_place_in_every_architecture(name: str, tmp_path: Path) -> None:
    """Attention, linear layers, or convolutions where there is nothing else."""
    result = fit(model=image_model(name), method=GCE(tune="lora"), out=tmp_path / "run")
    trained, whole = (result.record.model[key] for key in ("trained_parameters", "parameters"))
    assert 0 < trained < whole
    new = image_rows(4, seed=3)["image"]
    kept = result.predictor.predict_proba(new)
    assert (noiseproof.load(tmp_path / "run").predict_proba(new) == kept).all()


def test_another_size_is_asked_of_the_processor_and_tried_on_the_model() -> None:
    """A ViT has one position per patch; a network of convolutions takes any size."""
    result = fit(model=image_model("convnext"), image_size=12)
    assert result.predictor.task.encode(image_rows(2)["image"]).pixels.size == (12, 12)
    with pytest.raises(InputError, match=r"does not take images of 12 x 12.*another image_size"):
        fit(image_size=12)


def test_an_adapter_is_saved_for_peft_and_transformers(tmp_path: Path) -> None:
    """`model/` must load without this library."""
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    result = fit(method=GCE(tune="lora"), out=tmp_path / "run", train={"epochs": 3})
    folder = tmp_path / "run" / "model"
    assert {"adapter_config.json", "preprocessor_config.json"} <= {p.name for p in folder.iterdir()}
    new = image_rows(6, seed=4)["image"]
    kept = result.predictor.predict_proba(new)
    assert (noiseproof.load(tmp_path / "run").predict_proba(new) == kept).all()
    base = AutoModelForImageClassification.from_pretrained(image_model(), num_labels=3)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    values = load_image_processor(str(folder))([Image.fromarray(one) for one in new])
    with torch.no_grad():
        logits = model(pixel_values=torch.from_numpy(np.stack(values["pixel_values"]))).logits
    np.testing.assert_allclose(torch.softmax(logits, 1).numpy(), kept, atol=1e-4)
    merged = fit(method=GCE(tune="lora"), out=tmp_path / "merged", merge=True, train={"epochs": 3})
    assert not (tmp_path / "merged" / "model" / "adapter_config.json").exists()
    np.testing.assert_allclose(merged.predictor.predict_proba(new), kept, atol=1e-4)


def test_suspects_are_named_by_their_file(tmp_path: Path) -> None:
    files(tmp_path / "all", image_rows(24, wrong=0.3))
    fit(tmp_path / "all", method=TURN(probe_epochs=3, precondition="off"), out=tmp_path / "run")
    suspects = pd.read_csv(tmp_path / "run" / "suspects.csv")
    assert list(suspects)[:3] == ["row_id", "image", "label"]
    assert all((tmp_path / "all" / name).is_file() for name in suspects["image"])


def test_noise_may_follow_the_pictures_or_replace_them(tmp_path: Path) -> None:
    """Foreign pictures come from another folder, and lie in another table of pixels."""
    files(tmp_path / "pool" / "any", image_rows(5, seed=9), by_class=False)
    clean = image_rows(30, wrong=0.0)
    foreign = fit(clean, noise="openset:0.3", noise_pool=str(tmp_path / "pool"), image="image",
                  out=tmp_path / "run")  # fmt: skip
    assert foreign.samples["clean_label"].isna().sum() > 3
    instance = fit(clean, noise="instance:0.3")
    assert 0.1 < instance.record.noise["injected_rate"] < 0.6


def test_replaced_rows_hold_the_pixels_of_the_pool() -> None:
    task = task_of()
    rows, _ = task.ready(task.inputs_of(image_rows(5)["image"]))
    pool, _ = task.ready(task.inputs_of(image_rows(3, seed=8)["image"]))
    assert isinstance(rows, Pixels) and isinstance(pool, Pixels)
    mixed = rows.replaced(np.array([4, 1]), pool, np.array([2, 0])).take(np.array([1, 0, 4]))
    wanted = [pool.block(np.array([0])), rows.block(np.array([0])), pool.block(np.array([2]))]
    np.testing.assert_array_equal(mixed.block(np.arange(3)), np.concatenate(wanted))
    assert b"".join(mixed.content()) != b"".join(rows.take(np.array([1, 0, 4])).content())


def test_the_fingerprint_is_of_the_pictures_and_not_of_where_they_lie(tmp_path: Path) -> None:
    """Another machine has other folders."""
    data = image_rows(6)
    prints = []
    for place in ("here", "there"):
        files(tmp_path / place, data)
        prints.append(fit(tmp_path / place).record.data["fingerprint"])
    changed = data | {"image": 255 - data["image"]}
    files(tmp_path / "other", changed)
    prints.append(fit(tmp_path / "other").record.data["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_the_command_line_corrupts_a_table_of_paths(tmp_path: Path) -> None:
    """The pool's pictures lie in another folder: their paths become absolute."""
    data = image_rows(20, wrong=0.0)
    names = files(tmp_path / "a", data, by_class=False)
    pd.DataFrame({"image": names, "label": data["label"]}).to_csv(tmp_path / "a/t.csv", index=False)
    files(tmp_path / "pool" / "any", image_rows(5, seed=9), by_class=False)
    out = tmp_path / "a" / "noisy.csv"
    words = ["corrupt", str(tmp_path / "a/t.csv"), "--task", "image", "--out", str(out)]
    pool = ["--noise", "openset:0.3", "--noise-pool", str(tmp_path / "pool")]
    assert main([*words, *pool]) == 0
    table = pd.read_csv(out)
    foreign = table["clean_label"] == "<foreign>"
    assert foreign.any() and all(Path(name).is_absolute() for name in table["image"][foreign])
    assert len(read(out)) == 20
    away = tmp_path / "away.csv"  # paths must hold from there
    source = ["corrupt", str(tmp_path / "a/t.csv"), "--task", "image", "--noise", "symmetric:0.3"]
    assert main([*source, "--out", str(away)]) == 0
    np.testing.assert_array_equal(read(away), data["image"])
    instance = ["--noise", "instance:0.3", "--model", image_model(), "--overwrite"]
    assert main([*words, *instance]) == 0


# --- modules of one's own ------------------------------------------------------------------------


class Net(nn.Module):
    """A small network of convolutions with a linear head."""

    def __init__(self, classes: int = 3, answer: str = "tensor") -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(32, classes)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        features = self.drop(self.features(x).flatten(1))
        logits = self.fc(features)
        return {"tensor": logits, "tuple": (logits, features), "dict": {"logits": logits}}[
            self.answer
        ]


class Convolutions(nn.Module):
    """A network whose classes are maps: it has no linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize("answer", ["tensor", "dict"])
@pytest.mark.parametrize("tune", ["full", "head"])
def test_a_module_of_ones_own_is_trained_and_left_as_it_was(
    answer: str, tune: str, tmp_path: Path
) -> None:
    """Whatever gives logits will do; what the caller holds does not change under them."""
    torch.manual_seed(3)
    net = Net(answer=answer)
    before = weights(net)
    result = fit(model=net, image_size=8, method=CrossEntropy(tune=tune), out=tmp_path / "run",
                 train={"epochs": 3})  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in weights(net).items())
    plain = result.predictor.model.plain()
    assert type(plain) is Net and plain.state_dict().keys() == net.state_dict().keys()
    frozen = torch.equal(plain.features[0].weight, net.features[0].weight)
    assert frozen == (tune == "head")
    assert not torch.equal(plain.fc.weight, net.fc.weight)
    new = image_rows(6, seed=4)["image"]
    kept = result.predictor.predict_proba(new)
    from safetensors.torch import load_file

    again = Net()
    again.load_state_dict(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    values = torch.from_numpy(new).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        own = torch.softmax(again.eval()(values), dim=1)
    np.testing.assert_allclose(own.numpy(), kept, atol=1e-5)
    loaded = noiseproof.load(tmp_path / "run", model=Net(answer=answer))
    assert (loaded.predict_proba(new) == kept).all()
    with pytest.raises(InputError, match=r"the model was a torch module, <Net>; give load"):
        noiseproof.load(tmp_path / "run")
    with pytest.raises(InputError, match="do not fit the module Convolutions"):
        noiseproof.load(tmp_path / "run", model=Convolutions())
    assert RunRecord.read(tmp_path / "run").spec["model"] == "<Net>"


def test_a_module_that_cannot_be_split_trains_whole(tmp_path: Path) -> None:
    """Its head is no linear layer on one vector a row, so no part of it can be frozen."""
    for net in (Convolutions(), Net(answer="tuple")):
        fit(model=net, image_size=8)
    result = fit(model=Convolutions(), image_size=8, out=tmp_path / "run")
    new = image_rows(6, seed=4)["image"]
    loaded = noiseproof.load(tmp_path / "run", model=Convolutions())
    assert (loaded.predict_proba(new) == result.predictor.predict_proba(new)).all()
    with pytest.raises(InputError, match="has no encoder") as refusal:
        fit(model=Convolutions(), image_size=8, method=CrossEntropy(tune="head"))
    assert "tune=full" in str(refusal.value)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Net(classes=5), "the module Net gives (2, 5) for 2 rows, expected logits (2, 3)"),
        (nn.Flatten(), "the module Flatten gives (2, 192) for 2 rows, expected logits (2, 3)"),
        (nn.Linear(5, 3), "the module Linear fails on rows of shape (2, 3, 8, 8): mat1 and mat2"),
    ],
)
def test_a_module_that_does_not_fit_is_told_before_training(net: nn.Module, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        fit(model=net, image_size=8)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "method",
    [
        TURN(probe_epochs=2, precondition="off"),
        NMTune(svd_k=2),
        noiseproof.CoTeaching(),
        GCE(tune="lora", target_modules=("fc2",)),
    ],
    ids=lambda method: method.name,
)
def test_methods_that_ask_for_parts_work_on_a_module(method: Any, tmp_path: Path) -> None:
    """Probe, reshaping, a second copy, adapters: all through the split that was found."""

    class Deep(Net):
        def __init__(self) -> None:
            super().__init__()
            self.fc2 = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Any:
            return self.fc(torch.relu(self.fc2(self.features(x).flatten(1))))

    result = fit(
        model=Deep(), image_size=8, method=method, out=tmp_path / "run", train={"epochs": 3}
    )
    new = image_rows(6, seed=4)["image"]
    loaded = noiseproof.load(tmp_path / "run", model=Deep())
    np.testing.assert_allclose(
        loaded.predict_proba(new), result.predictor.predict_proba(new), atol=1e-5
    )


def test_a_probe_leaves_every_number_of_the_encoder_as_it_was() -> None:
    """Running statistics of BatchNorm are no parameters: freezing those does not hold them."""
    torch.manual_seed(3)
    net = Net()
    before = weights(net.features)
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(before)
    result = fit(model=net, image_size=8, method=TURN.preset("robust_probe", probe_epochs=3))
    plain = result.predictor.model.plain()
    after = weights(plain.features)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(plain.fc.weight, net.fc.weight)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_turn_on_pictures_keeps_those_that_are_labelled_rightly(name: str) -> None:
    """With all its checks on, from the files to the rows that the last step trains on."""
    kept: list[Tensor] = []

    class Watched(TURN):
        def on_epoch_start(self, run: Run) -> Any:
            columns = super().on_epoch_start(run)
            if run.stage == "tune":
                kept.append(columns["keep"])
            return columns

    data = image_rows(150, wrong=0.3)
    result = fit(data, model=image_model(name), method=Watched(precondition="stop"),
                 clean_label="clean_label", train={"epochs": 2})  # fmt: skip
    wrong = np.array(data["label"]) != np.array(data["clean_label"])
    assert len(kept) == 2 and wrong.mean() == 0.3
    for keep in kept:
        assert keep.float().mean() > 0.25 and wrong[keep.numpy()].mean() < 0.05
        counts = np.unique(np.array(data["label"])[keep.numpy()], return_counts=True)[1]
        assert len(counts) == 3
    assert (result.samples["keep"].to_numpy() == kept[-1].numpy()).all()


def test_features_are_kept_for_pictures_of_one_size_and_scale_alone(
    cache: Path, tmp_path: Path
) -> None:
    """Those of another size or normalisation would train a head on what no encoder gives."""
    probe = CrossEntropy(tune="head")

    def tables() -> int:
        return len(list((cache / "features").glob("*.npy")))

    source = image_model("convnext")
    fit(model=source, method=probe)
    fit(model=source, method=probe)
    assert tables() == 1
    fit(model=source, method=probe, image_size=12)
    assert tables() == 2
    other = shutil.copytree(source, tmp_path / "other")
    values = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(values | {"image_std": [0.3] * 3}))
    fit(model=str(other), method=probe)
    assert tables() == 3


def test_features_of_a_module_are_computed_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a network of convolutions on one core they are most of the time of a probe."""
    probe = CrossEntropy(tune="head")
    torch.manual_seed(3)
    net = Net()
    first = fit(model=net, image_size=8, method=probe)
    assert len(list((cache / "features").glob("*.npy"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "encode", lambda *_: pytest.fail("encoded again"))
        again = fit(model=net, image_size=8, method=probe)
    assert same_weights(first.predictor.model, again.predictor.model)
    with torch.no_grad():
        net.features[1].running_mean.add_(0.1)
    fit(model=net, image_size=8, method=probe)
    assert len(list((cache / "features").glob("*.npy"))) == 2


def test_texts_take_no_module() -> None:
    """A text needs a tokenizer, which lies beside the model."""
    with pytest.raises(InputError, match="must be a name or a folder, got a Net"):
        noiseproof.fit({"text": ["a", "b"] * 2, "label": ["x", "y"] * 2}, model=Net(),
                       method=CrossEntropy())  # fmt: skip


def test_pictures_come_from_memory_too(tmp_path: Path) -> None:
    """For a service that never writes what it gets."""
    predictor = fit().predictor
    arrays = image_rows(4, seed=2)["image"]
    pictures = [Image.fromarray(array) for array in arrays]
    buffers = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        buffers.append(buffer.getvalue())
    wanted = predictor.predict(arrays)
    assert predictor.predict(pictures) == predictor.predict(buffers) == wanted
    assert predictor.predict(list(arrays)) == wanted
    pictures[0].save(tmp_path / "one.png")
    for one in (tmp_path / "one.png", str(tmp_path / "one.png"), pictures[0], buffers[0]):
        assert predictor.predict(one) == wanted[:1]
    for rows, message in (
        ([3], "row 1 of the images has a value of type int, expected an image"),
        ([pictures[0], None], "cannot read row 2 of the images (image 1): the cell is empty"),
        (3, "expected a list of images, got a value of type int"),
        ({"image": pictures}, "expected a list of images, got a value of type dict"),
        ([np.zeros((8, 8), np.float32)], "row 1 of the images has shape (1, 8, 8) and type float"),
        ("absent.png", "cannot read row 1 of the images (absent.png): the file does not exist"),
    ):
        with pytest.raises(InputError) as refusal:
            predictor.predict(rows)
        assert message in str(refusal.value)
