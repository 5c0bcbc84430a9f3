import numpy as np
import pytest


class TestTable:
    @pytest.fixture
    def table(self, make_folder):
        folder = make_folder(a=3, b=3)

        def write(*lines, encoding="utf-8"):
            (folder / "labels.csv").write_bytes("\n".join(lines).encode(encoding))
            return folder / "labels.csv"

        return write

    def test_paths_are_relative_to_the_table(self, load, table, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        path = table("path,label", "a/0.png,cat", "b/1.png,dog", f"{tmp_path}/data/b/2.png,cat")
        images = load(path)
        assert [images.classes[label] for label in images.labels] == ["cat", "dog", "cat"]
        assert images.storage.paths[2] == str(tmp_path / "data/b/2.png")

    def test_columns_in_any_order_and_case_beside_others(self, load, table):
        path = table("note, Label ,PATH", '"a, ""b""\nc",cat,a/0.png', "x, dog , a/1.png", "", encoding="utf-8-sig")
        assert load(path).classes == ("cat", "dog")

    def test_a_split_column(self, load, table):
        path = table("path,label,split", "a/0.png,x,train", "a/1.png,y,Train", "b/0.png,x,val", "b/1.png,y,test")
        images = load(path)
        assert {name: indices.tolist() for name, indices in images.parts.items()} == {
            "train": [0, 1], "validation": [2], "test": [3],
        }  # fmt: skip

    def test_missing_images_are_listed_with_their_lines(self, refused, table):
        rows = [f"a/{i}.png,x" for i in range(20)]
        message = refused(table("path,label", *rows), "17 of 20 rows", "and 7 more", unreadable="skip")
        assert "line 5 names a/3.png, which is not there" in message

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            (["file,class", "a/0.png,x"], "has the columns file, class; needed: path and label"),
            (
                ["path;label", "a/0.png;x"],
                "has the columns path;label; needed: path and label, separated by commas",
            ),
            ([""], "has the columns none"),
            (["path,label"], "holds no images"),
            (["path,label", "a/0.png,x", "a/1.png,"], "line 3 has no label"),
            (["path,label", "a/0.png"], "line 2 has no label"),
            (["path,label", ",x"], "line 2 has no path"),
            (["path,label", "a,x"], "line 2 names a, which is not there"),
            (["path,label", "a/0.png,x"], "one class only, 'x'"),
            (["path,label,split", "a/0.png,x,holdout"], "line 2 has the split 'holdout'"),
        ],
        ids=str,
    )
    def test_what_is_refused(self, refused, table, lines, said):
        refused(table(*lines), said, "labels.csv")

    def test_one_image_with_two_labels_is_refused(self, refused, load, table):
        path = table("path,label", "a/0.png,cat", "a/1.png,dog", "a/0.png,dog")
        refused(path, "line 4 gives a/0.png the label 'dog', which has 'cat' already")
        assert len(load(table("path,label", "a/0.png,cat", "a/1.png,dog", "a/0.png,cat"))) == 3

    def test_a_column_twice_is_refused(self, refused, table):
        refused(table("path,label,Label", "a/0.png,cat,dog", "a/1.png,dog,cat"), "the column label twice")

    def test_another_encoding_is_refused(self, refused, table):
        refused(table("path,label", "a/0.png,Käse", encoding="latin-1"), "comma-separated UTF-8 text")


class TestArrays:
    IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)

    @pytest.fixture
    def write(self, tmp_path):
        def writing(**arrays):
            np.savez(tmp_path / "data.npz", **arrays)
            return tmp_path / "data.npz"

        return writing

    @pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "str"])
    def test_labels_of_each_kind(self, load, write, dtype):
        images = load(write(images=self.IMAGES, labels=np.array([10, 9, 10, 2, 2, 9]).astype(dtype)))
        assert images.classes == ("2", "9", "10")
        assert images.labels.tolist() == [2, 1, 2, 0, 0, 1]
        assert images.is_grey
        assert np.array_equal(images.image(3)[..., 2], self.IMAGES[3])

    def test_colour(self, load, write):
        colour = np.stack([self.IMAGES, 255 - self.IMAGES, self.IMAGES], axis=-1)
        images = load(write(images=colour, labels=np.arange(6) % 2, other=np.zeros(3)))
        assert np.array_equal(images.image(5), colour[5])
        assert not images.is_grey

    def test_parts_of_their_own(self, load, write):
        split = np.array(["train", "Train", "val", "test", "train", "testing"])
        images = load(write(images=self.IMAGES, labels=np.array([0, 1, 0, 1, 1, 0]), split=split))
        assert {name: indices.tolist() for name, indices in images.parts.items()} == {
            "train": [0, 1, 4], "validation": [2], "test": [3, 5],
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"labels": None}, "has the arrays images; needed: images, uint8 [N, H, W]"),
            ({"images": IMAGES.astype(np.float32)}, "images are float32 [6, 4, 5]; needed"),
            ({"images": IMAGES[0]}, "images are uint8 [4, 5]"),
            ({"images": IMAGES[..., None]}, "images are uint8 [6, 4, 5, 1]"),
            ({"images": IMAGES[:, :0]}, "images are [6, 0, 5], without a pixel"),
            ({"labels": np.zeros(6)}, "labels are float64 [6]"),
            ({"labels": np.zeros((6, 2), dtype=int)}, "labels are int64 [6, 2]"),
            ({"labels": np.array(["a", None] * 3, dtype=object)}, "cannot be read as a .npz file"),
            ({"labels": np.arange(5)}, "6 images and 5 labels"),
            ({"labels": np.zeros(6, dtype=int)}, "one class only, '0'"),
            ({"split": np.arange(6)}, "split is int64 [6]; accepted: [6] text, each train, validation or test"),
            ({"split": np.array(["train"] * 5)}, "[5]; accepted: [6] text"),
            ({"split": np.array(["train"] * 4 + ["fold 1", ""])}, "split has '', 'fold 1'; accepted"),
            ({"split": np.array(["train", "test"] * 3)}, "have no image in train: 1"),
            ({"images": IMAGES[:0], "labels": np.arange(0)}, "holds no images"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_is_refused(self, refused, write, change, said):
        arrays = {"images": self.IMAGES, "labels": np.arange(6) % 2} | change
        refused(write(**{name: array for name, array in arrays.items() if array is not None}), said)

    @pytest.mark.parametrize("kept", [0, 3, 100, 400])
    def test_a_broken_file_is_refused(self, refused, write, kept):
        path = write(images=self.IMAGES, labels=np.arange(6) % 2)
        path.write_bytes(path.read_bytes()[:kept])
        refused(path, "data.npz cannot be read as a .npz file")

    def test_an_encrypted_file_is_refused(self, refused, write):
        path = write(images=self.IMAGES, labels=np.arange(6) % 2)
        content = bytearray(path.read_bytes())
        for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # bit 0 of a member's flags, in both its headers
            start = content.find(header)
            while start >= 0:
                content[start + flags] |= 1
                start = content.find(header, start + 1)
        path.write_bytes(bytes(content))
        refused(path, "cannot be read as a .npz file", "encrypted")

    def test_a_single_array_is_refused(self, refused, tmp_path):
        with (tmp_path / "data.npz").open("wb") as file:
            np.save(file, self.IMAGES)
        refused(tmp_path / "data.npz", "cannot be read as a .npz file")
