import dataclasses

import pytest
import torch
from torchvision.transforms import v2

from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SIZES = [(1, 1), (1, 7), (7, 1), (32, 32), (63, 40), (40, 63), (123, 257), (257, 123), (224, 225), (20, 301)]


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def torchvision_twin(preprocessing):
    return v2.Compose([
        v2.ToDtype(torch.float32, scale=True),
        v2.Resize(preprocessing.resize, interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
        v2.CenterCrop(preprocessing.crop),
        v2.Normalize(preprocessing.mean, preprocessing.std),
    ])  # fmt: skip


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (96, 96), (35, 32), (8, 1), (9, 4), (11, 8)])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_equals_torchvision(size, resize, crop):
    preprocessing = Preprocessing(resize=resize, crop=crop, mean=(0.0,) * 3, std=(1.0,) * 3)
    images = random_images(3, *size, 3)
    ours = Preprocess(preprocessing)(images)
    theirs = torchvision_twin(preprocessing)(images.permute(0, 3, 1, 2))
    assert ours.shape == (3, 3, crop, crop)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 1e-6


def test_normalisation_equals_torchvision():
    preprocessing = Preprocessing(resize=40, crop=32, **IMAGENET)
    images = random_images(2, 50, 61, 3)
    theirs = torchvision_twin(preprocessing)(images.permute(0, 3, 1, 2))
    # Dividing by a std of 0.22 magnifies the rounding of the resize.
    assert (Preprocess(preprocessing)(images) - theirs).abs().max() <= 1e-6 / 0.224


def test_grey_is_itu_r_601():
    preprocess = Preprocess(Preprocessing(resize=1, crop=1, channels=1, mean=(0.0,), std=(1.0,)))
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    grey = preprocess(colours.view(4, 1, 1, 3))
    assert grey.shape == (4, 1, 1, 1)
    assert grey.flatten().tolist() == pytest.approx([0.299, 0.587, 0.114, 1.0], abs=1e-6)


def test_grey_equals_torchvision_within_its_rounded_weights():
    preprocessing = Preprocessing(resize=40, crop=32, channels=1, mean=(0.0,), std=(1.0,))
    images = random_images(2, 50, 61, 3)
    theirs = v2.Grayscale()(torchvision_twin(preprocessing)(images.permute(0, 3, 1, 2)))
    assert (Preprocess(preprocessing)(images) - theirs).abs().max() <= 1.1e-4  # 0.2989 there, 0.299 here


def test_one_image_is_a_batch_of_one():
    preprocess = Preprocess(Preprocessing(resize=9, crop=8, **IMAGENET))
    image = random_images(13, 10, 3)
    assert torch.equal(preprocess.one(image), preprocess(image.unsqueeze(0))[0])


def test_exports_with_every_size_dynamic():
    preprocess = Preprocess(Preprocessing(resize=12, crop=9, **IMAGENET)).eval()
    auto = torch.export.Dim.DYNAMIC
    shapes = {"images": {0: auto, 1: auto, 2: auto}}
    program = torch.export.export(preprocess, (random_images(2, 31, 17, 3),), dynamic_shapes=shapes).module()
    for shape in [(1, 17, 31, 3), (5, 12, 13, 3), (2, 40, 8, 3), (3, 23, 23, 3)]:
        images = random_images(*shape)
        assert torch.equal(program(images), preprocess(images)), shape


def test_leaves_a_state_dict_alone():
    assert Preprocess(Preprocessing(resize=9, crop=8, **IMAGENET)).state_dict() == {}


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 8, 8, 3),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
    ],
    ids=["float", "channels-first", "no-batch"],
)
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match=r"accepted: torch.uint8 \[N, H, W, 3\]"):
        Preprocess(Preprocessing(resize=9, crop=8, **IMAGENET))(images)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"crop": 33}, "crop"),
        ({"crop": 0}, "crop"),
        ({"resize": 0, "crop": 0}, "resize"),
        ({"channels": 2}, "channels"),
        ({"channels": 1}, "mean"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean"),
        ({"std": (0.5, 0.5)}, "std"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
    ],
    ids=str,
)
def test_impossible_preprocessing_is_refused(change, field):
    with pytest.raises(ValueError, match=f"preprocessing.{field} is .*accepted"):
        Preprocessing(**({"resize": 32, "crop": 32, **IMAGENET} | change))


def test_lists_and_whole_numbers_give_the_same_card():
    from_yaml = Preprocessing(resize=8, crop=8, mean=[0, 0, 0], std=[1, 1, 1])
    assert from_yaml == Preprocessing(resize=8, crop=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert repr(dataclasses.asdict(from_yaml)["mean"]) == "(0.0, 0.0, 0.0)"
