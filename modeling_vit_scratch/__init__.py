# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer (Dosovitskiy et al., ICLR 2021), from scratch, with the interface of Hugging Face transformers."""

from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)

from .configuration_vit_scratch import VARIANTS, ViTScratchConfig
from .image_processing_vit_scratch import ViTScratchImageProcessor
from .modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
    ViTScratchPreTrainedModel,
)


# With the package imported, the Auto classes need no trust_remote_code; and what is saved takes its code along.
AutoConfig.register(ViTScratchConfig.model_type, ViTScratchConfig)
ViTScratchConfig.register_for_auto_class()
for _auto, _model in (
    (AutoModel, ViTScratchModel),
    (AutoModelForImageClassification, ViTScratchForImageClassification),
    (AutoModelForMaskedImageModeling, ViTScratchForMaskedImageModeling),
    (AutoBackbone, ViTScratchBackbone),
):
    _auto.register(ViTScratchConfig, _model)
    _model.register_for_auto_class(_auto.__name__)
# One class for both names: it needs no torchvision, and gives the same values where there is one.
AutoImageProcessor.register(
    ViTScratchConfig, image_processor_classes={"pil": ViTScratchImageProcessor, "torchvision": ViTScratchImageProcessor}
)
ViTScratchImageProcessor.register_for_auto_class("AutoImageProcessor")


def _load_checkpoint(*args: Any, **kwargs: Any) -> Any:
    from .checkpoint.loading import from_pretrained  # not before it is needed: importing the package stays quick

    return from_pretrained(*args, **kwargs)


# `from_pretrained` reads other people's checkpoints too, and adapts weights to other sizes.
ViTScratchPreTrainedModel.checkpoint_loader = staticmethod(_load_checkpoint)

__version__ = "0.2.0"
__all__ = [
    "VARIANTS",
    "ViTScratchBackbone",
    "ViTScratchConfig",
    "ViTScratchForImageClassification",
    "ViTScratchForMaskedImageModeling",
    "ViTScratchImageProcessor",
    "ViTScratchModel",
]
