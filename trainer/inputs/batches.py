"""Images as a backbone's input, batch by batch, decoded ahead of the step that needs them."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from headstart.trainer.inputs.dataset import LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocess

NUM_DECODERS = 4
# Values of an image above which it is resized as soon as it is decoded: about 600 x 600 pixels. A batch of photographs
# kept whole until it is complete takes 30 bytes a pixel, which are 12 GB for 32 of 12 megapixels.
_LARGE = 1 << 20


def pixel_batches(images: LabelledImages, batches: Sequence[np.ndarray], preprocess: Preprocess) -> Generator[Tensor]:
    """Yield each batch of sample numbers as float32 pixels [B, C, S, S], in order.

    While one batch is being worked on, the next is decoded by threads. Large images are resized there, so that no more
    than `NUM_DECODERS` of them are held whole; small ones of one size are resized together, others one by one:
    antialiased resizing treats each image alone, so the pixels are the same either way.
    """

    def load(i: int) -> np.ndarray | Tensor:
        image = images.image(i)
        return to_pixels([image], preprocess) if image.size > _LARGE else image

    with ThreadPoolExecutor(NUM_DECODERS) as pool:
        ahead = [pool.submit(load, int(i)) for batch in batches[:1] for i in batch]
        for position in range(len(batches)):
            loaded = [future.result() for future in ahead]
            ahead = [pool.submit(load, int(i)) for batch in batches[position + 1 :][:1] for i in batch]
            yield to_pixels(loaded, preprocess)


def to_pixels(images: Sequence[np.ndarray | Tensor], preprocess: Preprocess) -> Tensor:
    """Turn uint8 images [H, W, 3] of any sizes into float32 pixels [B, C, S, S].

    An image may also be its pixels [1, C, S, S] already.
    """
    arrays = [image for image in images if isinstance(image, np.ndarray)]
    with torch.no_grad():
        if len(arrays) == len(images) and len({array.shape for array in arrays}) == 1:
            pixels: Tensor = preprocess(torch.from_numpy(np.stack(arrays)))
            return pixels
        return torch.cat([i if isinstance(i, Tensor) else preprocess(torch.from_numpy(i)[None]) for i in images])
