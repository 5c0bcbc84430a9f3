import os
import re

import numpy as np
import pytest
from PIL import Image

from headstart.trainer.inputs import index
from headstart.trainer.inputs.images import read_image


def part_sizes(images):
    return {name: len(indices) for name, indices in images.parts.items()}


class TestFolder:
    def test_a_class_per_folder(self, load, make_folder):
        folder = make_folder({"10": 2, "9": 3, "cat": 1})
        images = load(folder)
        assert images.classes == ("9", "10", "cat")
        assert np.bincount(images.labels).tolist() == [3, 2, 1]
        assert images.parts == {}
        assert not images.is_grey
        for i, path in enumerate(images.storage.paths):
            assert images.classes[images.labels[i]] in path
            assert np.array_equal(images.image(i), read_image(path))

    def test_the_same_folder_elsewhere_has_the_same_fingerprint(self, load, make_folder, tmp_path):
        first = load(make_folder(a=2, b=2))
        assert load(make_folder(a=2, b=2, name="moved")).fingerprint == first.fingerprint

    def test_a_relative_path_and_a_home(self, load, make_folder, monkeypatch):
        folder = make_folder(a=1, b=1)
        monkeypatch.chdir(folder.parent)
        monkeypatch.setenv("HOME", str(folder.parent))
        assert load("data").storage.paths == load("~/data").storage.paths == load(folder).storage.paths

    def test_other_files_and_hidden_ones_are_left_alone(self, load, make_folder, make_image):
        folder = make_folder(a=2, b=2)
        for name in ("README", "a/.DS_Store", "a/notes.txt", "labels.csv", "a/._0.png"):
            (folder / name).write_text("text")
        for name in (".git/x.png", "__MACOSX/a/x.png", "a/.thumbnails/x.png", "b/.hidden.png"):
            make_image(folder / name)
        assert len(load(folder)) == 4

    def test_suffixes_in_capitals_and_deeper_folders_count(self, load, make_folder, make_image):
        folder = make_folder(a=1, b=1)
        make_image(folder / "a/more/deep/2.png", 50)
        (folder / "a/0.png").rename(folder / "a/0.PNG")
        assert len(load(folder)) == 3

    def test_links_are_followed_and_loops_are_not(self, load, make_folder, make_image):
        folder = make_folder(a=2, b=1)
        make_image(folder.parent / "elsewhere/x.png", 50)
        (folder / "b/linked").symlink_to(folder.parent / "elsewhere")
        (folder / "a/loop").symlink_to(folder / "a")
        assert np.bincount(load(folder).labels).tolist() == [2, 2]

    def test_a_folder_with_a_colon_is_a_folder(self, load, make_folder, monkeypatch):
        monkeypatch.chdir(make_folder(a=1, b=1, name="data:2").parent)
        assert len(load("data:2")) == 2

    def test_a_folder_that_cannot_be_listed_is_refused(self, refused, make_folder, monkeypatch):
        def fail(_path):
            raise PermissionError(13, "Permission denied", "data/a")

        monkeypatch.setattr("pathlib.Path.iterdir", fail)
        refused(make_folder(a=1, b=1), "Permission denied", "make it readable")

    def test_a_deeper_folder_that_cannot_be_listed_is_refused(self, refused, make_folder, monkeypatch):
        folder, scandir = make_folder({"a": 1, "a/deep": 1, "b": 1}), os.scandir

        def fail(path):
            if str(path).endswith("deep"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr("os.scandir", fail)
        refused(folder, "Permission denied", "deep", "make it readable")

    @pytest.mark.parametrize("validation", ["val", "valid", "validation", "Validation"])
    def test_parts(self, load, make_folder, validation):
        images = load(make_folder({f"{part}/{c}": 2 for part in ("train", validation, "test") for c in "ab"}))
        assert part_sizes(images) == {"train": 4, "validation": 4, "test": 4}
        assert images.classes == ("a", "b")
        for part, indices in images.parts.items():
            spelling = validation if part == "validation" else part
            assert all(f"/{spelling}/" in images.storage.paths[i] for i in indices)

    def test_some_parts(self, load, make_folder):
        assert part_sizes(load(make_folder({"train/a": 2, "train/b": 2, "test/b": 1}))) == {
            "train": 4,
            "test": 1,
        }

    def test_an_empty_part_is_as_good_as_none(self, load, make_folder):
        folder = make_folder({"train/a": 2, "train/b": 2})
        (folder / "test").mkdir()
        assert part_sizes(load(folder)) == {"train": 4}

    def test_a_class_called_train_is_a_class(self, load, make_folder):
        images = load(make_folder(car=2, plane=2, train=2))
        assert images.classes == ("car", "plane", "train")
        assert images.parts == {}

    def test_progress_and_the_second_run(self, load, make_folder, monkeypatch):
        folder, calls, decoded = make_folder(a=3, b=3), [], []
        first = load(folder, lambda done, total: calls.append((done, total)))
        assert calls[-1] == (6, 6)
        monkeypatch.setattr(index, "read_image", lambda *args, **options: decoded.append(args))
        assert load(folder).fingerprint == first.fingerprint
        assert decoded == []

    def test_mixed_formats_and_grey(self, load, make_folder):
        folder = make_folder(a=0, b=0)
        for i, (mode, suffix) in enumerate([("L", "jpg"), ("1", "gif"), ("L", "webp"), ("P", "bmp"), ("LA", "png")]):
            Image.new("L", (4 + i, 9 - i), 40 * i).convert(mode).save(folder / "ab"[i % 2] / f"{i}.{suffix}")
        images = load(folder)
        assert len(images) == 5
        assert images.is_grey
        assert {images.image(i).shape for i in range(5)} == {(9 - i, 4 + i, 3) for i in range(5)}

    @pytest.mark.parametrize(
        ("folders", "said"),
        [
            ({}, ["has no class folders, nothing", "accepted: a folder with one sub-folder"]),
            ({".": 3}, ["no class folders, only 3 images"]),
            ({"a": 3}, ["one class only, 'a'"]),
            ({"a": 3, "b": 0, "c": 0}, ["without an image: b, c; add images"]),
            ({"a": 1, "b": 1, ".": 1}, ["images beside its class folders, such as 0.png"]),
            ({"train/a": 1, "train/b": 1, "test/c": 1}, ["no image in train: c"]),
            ({"train/a": 1, "train/b": 1, "test/b": 0}, ["test has class folders without an image: b"]),
            ({"train/a": 1, "train/b": 1, "test": 2}, ["beside them images in test"]),
            ({"train/a": 1, "train/b": 1, "extra/c": 2}, ["beside them images in extra"]),
            ({"train/a": 1, "train/b": 1, "val/a": 1, "valid/a": 1}, ["a part twice: train, val, valid"]),
            (
                {"Training_set/a": 1, "Training_set/b": 1, "test_set/a": 1},
                ["not classes: Training_set, test_set", "rename"],
            ),
            ({"test/a": 1, "val/a": 1}, ["not classes: test, val; accepted for parts: train"]),
        ],
        ids=str,
    )
    def test_what_is_refused(self, refused, make_folder, folders, said):
        folder = make_folder({name: size for name, size in folders.items() if name != "."})
        for i in range(folders.get(".", 0)):
            Image.new("L", (2, 2)).save(folder / f"{i}.png")
        refused(folder, *said)

    def test_a_name_that_is_not_utf8_is_refused(self, refused, make_folder):
        refused(make_folder({os.fsdecode(b"caf\xe9"): 1, "tea": 1}), r"not UTF-8: 'caf\udce9'", "rename")

    @pytest.mark.parametrize("name", ["two\nlines", "tea\u200b", "no\xa0break"], ids=ascii)
    def test_a_name_with_what_nobody_can_see_is_refused(self, refused, make_folder, name):
        refused(make_folder({name: 1, "tea": 1}), f"that nobody can see, such as line breaks: {name!r}; rename")

    def test_joiners_and_the_wide_space_are_part_of_a_name(self, make_folder, load):
        names = ("\U0001f468\u200d\U0001f469", "\u0645\u06cc\u200c\u0634\u0648\u062f", "\u72ac\u3000\u732b")
        assert set(load(make_folder(dict.fromkeys(names, 1))).classes) == set(names)

    @pytest.mark.parametrize("parts", [("", ""), ("train/", "test/")], ids=["classes", "in parts"])
    def test_names_of_two_unicode_forms_are_refused(self, refused, make_folder, parts):
        folder = make_folder({f"{parts[0]}caf\u00e9": 1, f"{parts[1]}cafe\u0301": 1, f"{parts[0]}tea": 1})
        refused(folder, r"differ in their Unicode form", r"'cafe\u0301' and 'caf\xe9'", "rename one to the other")


class TestUnreadable:
    def test_a_pipe_is_not_waited_for(self, refused, make_folder):
        folder = make_folder(a=2, b=2)
        (folder / "a/deeper").mkdir()
        os.mkfifo(folder / "a/deeper/pipe.png")
        refused(folder, "pipe.png is no regular file")

    def test_all_are_listed_and_refused(self, refused, make_folder):
        folder = make_folder(a=15, b=3)
        for i in range(12):
            (folder / f"a/{i}.png").write_bytes(b"broken")
        message = refused(folder, "12 of 18 files cannot be used", "... and 2 more", "data.unreadable to skip")
        assert len(re.findall(r"^  \S+/a/\d+\.png is not an image", message, re.MULTILINE)) == 10

    def test_skipping_lists_them(self, load, make_folder):
        folder = make_folder(a=3, b=3)
        content = (folder / "a/1.png").read_bytes()
        (folder / "a/1.png").write_bytes(content[: len(content) // 2])
        images = load(folder, unreadable="skip")
        assert len(images) == 5
        assert images.skipped == (str(folder / "a/1.png"),)
        assert str(folder / "a/1.png") not in images.storage.paths

    def test_skipping_keeps_parts_in_step(self, load, make_folder):
        folder = make_folder({"train/a": 3, "train/b": 3, "test/a": 2, "test/b": 1})
        (folder / "train/a/0.png").write_bytes(b"")
        images = load(folder, unreadable="skip")
        assert part_sizes(images) == {"train": 5, "test": 3}
        assert all("/test/" in images.storage.paths[i] for i in images.parts["test"])

    def test_a_class_may_not_vanish(self, refused, make_folder):
        folder = make_folder(a=1, b=3, c=3)
        (folder / "a/0.png").write_bytes(b"broken")
        refused(folder, "no file of these classes can be read: a", "a/0.png", unreadable="skip")

    def test_a_part_may_not_vanish(self, refused, make_folder):
        folder = make_folder({"train/a": 2, "train/b": 2, "test/a": 1})
        (folder / "test/a/0.png").write_bytes(b"broken")
        refused(folder, "no file of these parts can be read: test", unreadable="skip")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "/no/such/folder",
            "'/no/such/folder', which does not exist; accepted: a folder with one sub-folder",
        ),
        ("cifar10", "does not exist; did you mean torchvision:CIFAR10? accepted"),
        ("digits", "did you mean sklearn:digits?"),
    ],
)
def test_a_path_that_is_nothing_is_refused(refused, path, said):
    refused(path, said)


def test_a_file_of_another_kind_is_refused(refused, tmp_path):
    (tmp_path / "data.zip").touch()
    refused(tmp_path / "data.zip", "is the file", "accepted: a folder", "a .csv", "a .npz")
