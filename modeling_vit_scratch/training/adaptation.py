# SPDX-License-Identifier: Apache-2.0
"""Training a part of a network: frozen layers, low-rank adapters (LoRA), and a head on features computed once."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..common.errors import InputError
from ..data.dataset import ImageClassificationDataset
from ..distillation.loss import PROJECTION
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from .arguments import RecipeArguments
from .optimization import is_head, layer_number


_ADAPTER = "default"  # peft's name of an adapter, in the names of its weights


def adapt(model: PreTrainedModel, recipe: RecipeArguments) -> None:
    """Freezes what --freeze names, or adds the adapters of --lora_rank. Raises InputError if the flag does not fit."""
    if recipe.lora_rank is not None:
        _add_adapters(model, recipe.lora_rank)
    elif recipe.freeze is not None:
        freeze, layers = recipe.freeze, model.config.num_hidden_layers
        last = {"embeddings": 0, "encoder": layers + 1}.get(freeze)
        last = int(freeze) if last is None else last
        if freeze != "encoder" and last > layers:
            raise InputError(f"--freeze {freeze}: the network has {layers} layers. Give that at most, or encoder.")
        for name, parameter in model.named_parameters():
            if not is_head(name) and layer_number(name, layers) <= last:
                parameter.requires_grad_(False)
        for name, module in model.named_modules():  # what does not learn needs no noise
            if not is_head(name) and layer_number(f"{name}.", layers) <= last:
                for attribute in {"p", "rate", "attention_dropout"} & vars(module).keys():
                    setattr(module, attribute, 0.0)


def _add_adapters(model: PreTrainedModel, rank: int) -> None:
    if importlib.util.find_spec("peft") is None:
        raise InputError('--lora_rank needs peft: pip install -e ".[lora]"')
    from peft import LoraConfig, inject_adapter_in_model  # here: it takes seconds

    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".layers." in name]
    # Hu et al., arXiv:2106.09685; all linear layers and a scale of 2: Dettmers et al., arXiv:2305.14314.
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear), model, _ADAPTER)
    for name, parameter in model.named_parameters():
        if is_head(name):
            parameter.requires_grad_(True)


def is_temporary(name: str) -> bool:
    """Whether a weight serves training alone: of an adapter, or of the projection that a teacher's features need."""
    return ".lora_" in name or name.startswith(PROJECTION)


def merge_adapters(model: PreTrainedModel, weights: dict[str, Tensor]) -> ViTScratchForImageClassification:
    """A network without what is temporary, W + scale B A in place of W, from one that has it and its weights."""
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if not is_temporary(name)}
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            down, up = (weights[f"{name}.lora_{which}.{_ADAPTER}.weight"] for which in "AB")
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + layer.scaling[_ADAPTER] * (up @ down)
    merged = ViTScratchForImageClassification(model.config)
    merged.load_state_dict(plain)
    return merged


def describe_trained(model: PreTrainedModel, optimizer_states: int) -> str | None:
    """How many parameters are trained, and what that saves; None if all are."""
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    if trained == total:
        return None
    here, all_of_them = (4 * (1 + optimizer_states) * count / 1e6 for count in (trained, total))  # in float32
    return (
        f"Trained: {trained:,} of {total:,} parameters ({100 * trained / total:.2g} %); their gradients and optimizer "
        f"states take {here:,.1f} MB, those of all {all_of_them:,.1f} MB."
    )


# --- Features computed once -------------------------------------------------------------------------------------------


class StoredFeatures(ViTScratchModel):
    """An encoder that also takes its own pooled output, (B, D) in place of pixels, and returns it."""

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        if pixel_values.ndim != 2:
            return super().forward(pixel_values, *args, **kwargs)
        return BaseModelOutputWithPooling(pooler_output=pixel_values.to(self.dtype))


class FeatureDataset(ImageClassificationDataset):
    """The images of a data set as features (N, D)."""

    def __init__(self, images: ImageClassificationDataset, features: Tensor) -> None:
        none = SimpleNamespace(description="none: the features of each image are computed once")
        super().__init__(images.examples, images.processor, augmentation=none, seed=images.seed)
        self.features = features

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        labels = map(self.examples.label, indices)
        labels = [one if isinstance(one, int) else torch.as_tensor(one, dtype=torch.float32) for one in labels]
        return [
            {"pixel_values": feature, "labels": label, "key": (self.seed, int(self._epoch), index)}
            for index, label, feature in zip(indices, labels, self.features[list(map(self.examples.index, indices))])
        ]


def store_features(
    model: ViTScratchForImageClassification,
    datasets: tuple[ImageClassificationDataset, ImageClassificationDataset],
    processor: BaseImageProcessor,
    arguments: Any,
) -> tuple[ImageClassificationDataset, ImageClassificationDataset]:
    """The data sets as features, which a frozen encoder then takes; as they are if a head or flag needs the images."""
    train, recipe = datasets[0], arguments.recipe_arguments
    augments = arguments.smallest_area < 1 or recipe.auto_augment or recipe.color_jitter or recipe.random_erasing
    augments = augments or recipe.mixup or recipe.cutmix or recipe.aug_repeats > 1 or arguments.images_on_device
    augments = augments or recipe.distills  # a teacher needs the pixels, too
    is_stored = isinstance(train, ImageClassificationDataset) and not arguments.max_broken_images
    is_stored = is_stored and model.distillation_classifier is None  # which sees another token
    if recipe.freeze != "encoder" or augments or not is_stored:
        return datasets
    from ..evaluation.probes import extract_features  # imports much of scikit-learn

    plain = ImageClassificationDataset(train.examples, processor, model.config.num_channels)
    model.to(arguments.device)
    size, workers = arguments.per_device_eval_batch_size, arguments.dataloader_num_workers
    stored = []
    for images in (plain, datasets[1]):
        features = extract_features(model, images, size, workers, processor).values
        stored.append(FeatureDataset(images, torch.from_numpy(features)))
    model.vit.__class__ = StoredFeatures
    return tuple(stored)
