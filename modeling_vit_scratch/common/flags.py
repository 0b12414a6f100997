# SPDX-License-Identifier: Apache-2.0
"""Flags that several scripts have, with their help text. A subclass that changes a default keeps the text."""

from dataclasses import dataclass

from .parsing import flag


# What training takes of a photo at least, as a fraction of its area. The usual 0.08 is for a million images.
PHOTO_SMALLEST_AREA = 0.35


@dataclass
class HubFlags:
    """Of what is downloaded."""

    model_revision: str = flag("main", "Branch, tag or commit on the Hub.", metavar="REVISION")
    cache_dir: str | None = flag(None, "Folder for downloads. Default: Hugging Face's.", metavar="DIR")


@dataclass
class ImageFlags:
    """Where the images are in the data."""

    dataset_config_name: str | None = flag(None, "Configuration of a data set of the Hub.", metavar="NAME")
    image_column_name: str | None = flag(None, "Column of the images. Default: detected.", metavar="NAME")


@dataclass
class LabelFlags(ImageFlags):
    """Where the labels are, and which images are held out."""

    label_column_name: str | None = flag(None, "Column of the labels. Default: detected.", metavar="NAME")
    label_separator: str | None = flag(
        None, "Separator of labels in a text column, for images with several. Example: '|'", metavar="TEXT"
    )
    train_val_split: float | None = flag(
        None, "Fraction of each class that training holds out, where the data have no validation split."
    )
    max_eval_samples: int | None = flag(None, "Evaluate on at most N images, chosen at random.")


@dataclass
class ReadingFlags:
    """How images are read, and in what batches."""

    per_device_eval_batch_size: int = flag(128, "Batch size per device, without gradients.")
    dataloader_num_workers: int | None = flag(
        None, "Worker processes per device that decode images; if not set, as many as the cores allow."
    )


@dataclass
class FastDecodeFlag:
    """How exactly photos are decoded."""

    fast_decode: bool = flag(
        True,
        "Decode JPEG photos at reduced scale and resize with 8-bit kernels: faster, and pixels differ by up to about 1 "
        "of 255 levels on average. Evaluation always decodes in full.",
    )


@dataclass
class BrokenImageFlags:
    """What happens to images that can't be read."""

    max_broken_images: int | None = flag(0, "Skip up to N images that can't be read; each is named.")


@dataclass
class SeedFlag:
    """Of everything random."""

    seed: int = flag(42, "Random seed.")
