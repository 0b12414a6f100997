# SPDX-License-Identifier: Apache-2.0
"""What the data set takes from the rooms above it."""

from typing import Protocol

import numpy as np
from PIL import Image


class Augmentation(Protocol):
    """Any callable (image, generator) -> image that can be pickled for worker processes; `description` is for cards."""

    description: str

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image: ...
