"""Images as a backbone's input, batch by batch, decoded ahead of the step that needs them."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from headstart.trainer.inputs.dataset import LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocess

NUM_DECODERS = 4


def pixel_batches(images: LabelledImages, batches: Sequence[np.ndarray], preprocess: Preprocess) -> Generator[Tensor]:
    """Yield each batch of sample numbers as float32 pixels [B, C, S, S], in order.

    While one batch is being worked on, the next is decoded by threads. Images of one size are resized together,
    others one by one: antialiased resizing treats each image alone, so the pixels are the same either way.
    """
    with ThreadPoolExecutor(NUM_DECODERS) as pool:
        ahead = [pool.submit(images.image, int(i)) for batch in batches[:1] for i in batch]
        for position in range(len(batches)):
            arrays = [future.result() for future in ahead]
            ahead = [pool.submit(images.image, int(i)) for batch in batches[position + 1 :][:1] for i in batch]
            yield to_pixels(arrays, preprocess)


def to_pixels(arrays: Sequence[np.ndarray], preprocess: Preprocess) -> Tensor:
    """Turn uint8 images [H, W, 3] of any sizes into float32 pixels [B, C, S, S]."""
    with torch.no_grad():
        if len({array.shape for array in arrays}) == 1:
            pixels: Tensor = preprocess(torch.from_numpy(np.stack(arrays)))
            return pixels
        return torch.cat([preprocess(torch.from_numpy(array)[None]) for array in arrays])
