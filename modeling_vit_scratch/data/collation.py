# SPDX-License-Identifier: Apache-2.0
"""From examples to batches: loaders, collators with Mixup and CutMix, and normalising and mixing on the device."""

import functools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor


if TYPE_CHECKING:
    from transformers import TrainingArguments  # imports peft and more, which a prediction does without


# Keeps these random numbers apart from others with the same seed and epoch.
_STREAM = 0x6D6978


class ImageCollator:
    description: str | None = None

    def __call__(self, examples: list[dict[str, Any]] | dict[str, Tensor]) -> dict[str, Tensor]:
        """
        To "pixel_values" (B, C, H, W), "labels" (B, ...), and in training "keys" (B, 3), int64: seed, epoch and index.
        "broken", where images can't be read, has pairs of index and reason. A batch stays as it is.
        """
        if isinstance(examples, dict):
            return examples
        ours = ("key", "broken")
        batch = default_collate([{name: example[name] for name in example if name not in ours} for example in examples])
        if "key" in examples[0]:
            batch["keys"] = torch.tensor([example["key"] for example in examples], dtype=torch.int64)
        broken = [pair for example in examples for pair in example.get("broken", {}).items()]
        return {**batch, "broken": broken} if broken else batch


@dataclass(frozen=True)
class Mixing:
    """How each image of a batch is mixed with its partner: see `mix`."""

    weight: float  # that an image keeps inside the box
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels
    kept: float  # the share of the image, and of its label

    def mix_labels(self, targets: Tensor, distance: int = 1) -> Tensor:
        """Probabilities (B, K), each row mixed with its partner's: see `partner_distance`."""
        return targets.roll(distance, 0).mul_(1.0 - self.kept).add_(targets * self.kept)


def mixup(size: tuple[int, int], weight: float) -> Mixing:
    """weight x + (1 - weight) x' (Zhang et al., arXiv:1710.09412), for images of a (height, width) in pixels."""
    height, width = size
    return Mixing(weight, (0, 0, width, height), weight)


def cutmix(size: tuple[int, int], weight: float, column: int, row: int) -> Mixing:
    """
    A rectangle of about (1 - weight) of the area, around (column, row) and cut by the border, comes from the other
    image (Yun et al., arXiv:1905.04899). The labels are mixed by its area.
    """
    height, width = size
    half = 0.5 * math.sqrt(1.0 - weight)
    half_width, half_height = int(half * width), int(half * height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    return Mixing(0.0, (left, top, right, bottom), 1.0 - (right - left) * (bottom - top) / (width * height))


class MixingCollator(ImageCollator):
    """
    Batches with Mixup or CutMix as torchvision's (`transforms.v2`), each as likely if both have an alpha, and labels
    that are probabilities, (B, K). The random numbers depend on the seed, the epoch and the images of the batch alone.
    Held-out examples, without a "key", are not mixed.
    """

    def __init__(
        self,
        num_labels: int,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        label_smoothing: float = 0.0,
        repeats: int = 1,
    ) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0 or max(mixup_alpha, cutmix_alpha) == 0:
            given = f"mixup_alpha={mixup_alpha:g} and cutmix_alpha={cutmix_alpha:g}"
            raise ValueError(f"{given} must not be negative, and one must be above 0.")
        self.num_labels, self.label_smoothing, self.repeats = num_labels, label_smoothing, repeats
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        parts = [f"{name} {alpha:g}" for name, alpha in (("Mixup", mixup_alpha), ("CutMix", cutmix_alpha)) if alpha]
        self.description = " or ".join(parts)

    def __call__(self, examples: list[dict[str, Any]] | dict[str, Tensor]) -> dict[str, Tensor]:
        """With "mixing_weights" (B,), float32, and "mixing_boxes" (B, 4), int64: equal rows, to be sliced as images."""
        batch = super().__call__(examples)
        if "keys" not in batch:
            return batch
        targets = batch["labels"]  # (B, K) where images have several
        targets = targets if targets.ndim == 2 else F.one_hot(targets, self.num_labels).float()
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels
        keys = batch["keys"].tolist()
        seed, epoch, _ = keys[0]
        generator = np.random.default_rng((_STREAM, seed, epoch, *(index for _, _, index in keys)))
        mixing = self.draw(batch["pixel_values"].shape[-2:], generator)
        batch["labels"] = mixing.mix_labels(targets, partner_distance(len(targets), self.repeats))
        batch["mixing_weights"] = torch.full((len(keys),), mixing.weight, dtype=torch.float32)
        batch["mixing_boxes"] = torch.tensor([mixing.box] * len(keys), dtype=torch.int64)
        return batch

    def draw(self, size: tuple[int, int], generator: np.random.Generator) -> Mixing:
        """A random mixing of images of a (height, width) in pixels."""
        both = self.mixup_alpha and self.cutmix_alpha
        use_cutmix = generator.random() < 0.5 if both else bool(self.cutmix_alpha)
        alpha = self.cutmix_alpha if use_cutmix else self.mixup_alpha
        weight = float(generator.beta(alpha, alpha))
        if not use_cutmix:
            return mixup(size, weight)
        height, width = size
        return cutmix(size, weight, int(generator.integers(width)), int(generator.integers(height)))


# --- On the device ----------------------------------------------------------------------------------------------------


def normalization(processor: BaseImageProcessor) -> tuple[Tensor, Tensor]:
    """Scale and offset of each channel, (C or 1, 1, 1), with which an image processor normalises pixels 0 to 255."""
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = np.broadcast_arrays(np.atleast_1d(np.float64(mean)), np.atleast_1d(np.float64(std)))
    return tuple(torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (factor / std, -mean / std))


class Normalize:
    """
    uint8 (B, C, H, W) to float32 on the same device, bit for bit as this library's image processor does it, whatever
    the precision of the network. Processors of other libraries normalise by themselves: their output stays as it is.
    """

    def __init__(self, processor: BaseImageProcessor | None) -> None:
        self.is_needed = isinstance(processor, ViTScratchImageProcessor)
        self.takes_floats = self.is_needed and not processor.do_eight_bits
        if self.is_needed:
            self.scale, self.offset = normalization(processor)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        is_normalized = pixel_values.dtype != torch.uint8 and not (self.takes_floats and pixel_values.ndim == 4)
        if not self.is_needed or is_normalized:
            return pixel_values
        self.scale, self.offset = self.scale.to(pixel_values.device), self.offset.to(pixel_values.device)
        # Rounded twice, as in the processor: a fused multiply-add would give other last bits.
        return pixel_values.float().mul_(self.scale).add_(self.offset)


def partner_distance(count: int, repeats: int) -> int:
    """How far before an image of a batch its partner is: with --aug_repeats, nearer ones are the same image again."""
    return max(1, min(repeats, count // 2))


def mix(pixel_values: Tensor, weights: Tensor, boxes: Tensor, repeats: int = 1) -> Tensor:
    """
    Mixes each image (B, C, H, W) with its partner: inside its box (B, 4) it keeps its weight (B,), outside all of it.
    The box of `mixup` is the whole image, the weight of `cutmix` 0. Does not wait for the device.
    """
    height, width = pixel_values.shape[-2:]
    rows, columns = (torch.arange(length, device=pixel_values.device) for length in (height, width))
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # (B, 1) each
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    kept = torch.where(inside, weights[:, None, None].to(pixel_values.dtype), 1.0)[:, None]  # (B, 1, H, W)
    partners = pixel_values.roll(partner_distance(len(pixel_values), repeats), 0)
    return partners.mul_(1.0 - kept).add_(pixel_values * kept)


def input_size(processor: BaseImageProcessor, config: ViTScratchConfig) -> tuple[int, int]:
    """Height and width of what the processor makes."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    if size is not None and size["height"] and size["width"]:
        return size["height"], size["width"]
    return config.image_hw


# --- Loaders ----------------------------------------------------------------------------------------------------------


def process_loader(
    dataset: Dataset, arguments: "TrainingArguments", collator: Callable[..., Any], batches: Sampler[list] | None
) -> DataLoader:
    """The loader of one process: of the `batches` of a stream or, without, by these samplers."""
    batching: dict[str, Any] = {"batch_sampler": batches}
    if batches is None:
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        repeats = arguments.recipe_arguments.aug_repeats
        place = seed, arguments.process_index, arguments.world_size
        if arguments.recipe_arguments.balanced_sampling:
            sampler = BalancedSampling(dataset.examples.labels, *place)
        else:
            sampler = RepeatedAugmentation(len(dataset), repeats, *place)
        batching = {"batch_size": arguments.train_batch_size, "drop_last": arguments.dataloader_drop_last}
        batching["sampler"] = sampler
    names = ("num_workers", "pin_memory", "persistent_workers", "multiprocessing_context", "prefetch_factor")
    options = {name: getattr(arguments, f"dataloader_{name}") for name in names}
    loader = DataLoader(dataset, collate_fn=collator, **options, **batching)
    # As for one process: accelerate would share out the batches once more.
    return prepare_data_loader(
        loader, arguments.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )


class RepeatedAugmentation(Sampler[int]):
    """
    Repeated augmentation (Hoffer et al., arXiv:1901.09335; Berman et al., arXiv:1902.05509): DeiT's `RASampler` and
    timm's `RepeatAugSampler`, but DeiT's epoch ends at a multiple of 256 images. `count` images are shuffled, put
    `repeats` times in a row, and dealt to the processes in turn. An epoch keeps its length: it sees one in `repeats`.
    Gives numbers `index + repetition * count`, so that each repetition has random numbers of its own.
    """

    def __init__(self, count: int, repeats: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.repeats, self.seed, self.rank, self.world_size = count, repeats, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.count / self.world_size)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.numbers(torch.arange(len(self)) * self.world_size + self.rank, generator).tolist())

    def numbers(self, positions: Tensor, generator: torch.Generator) -> Tensor:
        """The images at these positions of an epoch."""
        order = torch.randperm(self.count, generator=generator)
        positions = positions % (self.count * self.repeats)  # fewer images than processes: from the start again
        return order[positions // self.repeats] + positions % self.repeats * self.count


class BalancedSampling(RepeatedAugmentation):
    """
    Every class equally often in an epoch, or once more than another, where `labels` are classes (N,). The images of a
    class come equally often, too, or once more. An epoch keeps its length, so images of frequent classes are left out.
    """

    def __init__(self, labels: list[int], *place: int) -> None:
        super().__init__(len(labels), 1, *place)
        self.labels = torch.tensor(labels)

    def numbers(self, positions: Tensor, generator: torch.Generator) -> Tensor:
        classes, chosen = self.labels.unique(), []
        classes = classes[torch.randperm(len(classes), generator=generator)]  # the first ones come once more
        for place, label in enumerate(classes):
            members = (self.labels == label).nonzero()[:, 0]
            rounds = torch.arange(len(range(place, self.count, len(classes)))) // len(members)
            orders = [torch.randperm(len(members), generator=generator) for _ in range(int(rounds[-1]) + 1)]
            chosen.append(members[torch.cat(orders)[: len(rounds)]] + rounds * self.count)
        return torch.cat(chosen)[torch.randperm(self.count, generator=generator)][positions % self.count]


def prepare_workers(loader: DataLoader) -> None:
    """Makes worker processes leave signals to the process that trains, which needs the workers to finish a step."""
    loader = getattr(loader, "base_dataloader", loader)  # inside of accelerate's, torch's own
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
    loader.collate_fn = functools.partial(_share_batch, loader.collate_fn)


def _share_batch(collate: Callable[[Any], Any], examples: Any) -> Any:
    """In a worker, puts a batch into shared memory. torch does so later, where nobody would hear that it failed."""
    batch = collate(examples)
    if get_worker_info() is not None:
        tree_map_only(Tensor, Tensor.share_memory_, batch)
    return batch


def _start_worker(prepare: Callable[[int], None] | None, number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare(number)


def _end_with_parent() -> None:
    """Ends this process at a SIGTERM from the one that trains, and not at one from e.g. a launcher."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)
