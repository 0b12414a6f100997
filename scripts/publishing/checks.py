# SPDX-License-Identifier: Apache-2.0
"""Whether a model's folder can be published: it loads and runs, has this version's code, and reports of its weights."""

import json
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard

from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchImageProcessor,
    ViTScratchModel,
)
from modeling_vit_scratch.cards.records import EVALUATIONS, RECORD, is_of_other_weights, read_json
from modeling_vit_scratch.common.records import license_note
from modeling_vit_scratch.hub.contents import CODE


_MODELS = (ViTScratchForImageClassification, ViTScratchModel, ViTScratchForMaskedImageModeling)


def changed_code(folder: Path) -> list[str]:
    """The code files that the folder lacks or has in another version than this one."""
    found = {file.name: file.read_bytes() for file in folder.glob("*.py")}
    return [module.name for module in CODE if found.get(module.name) != module.read_bytes()]


def check_model(folder: Path) -> list[str]:
    """The problems, a line each, of loading a folder's processor and model and running it on a grey image."""
    pickles = [path.name for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    has_weights = any(folder.glob("model*.safetensors"))
    if pickles and not has_weights:
        return [f"{pickles[0]} is a pickle: loading it can run any code. Convert it: scripts/convert.py."]
    missing = [name for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()]
    missing += [] if has_weights else ["model.safetensors"]
    if missing:
        return [f"{folder} has no {', no '.join(missing)}: it is not a finished model. Train or convert one into it."]
    try:
        config = ViTScratchConfig.from_pretrained(folder)
        name = (config.architectures or [""])[0]
        classes = {model_class.__name__: model_class for model_class in _MODELS}
        if name not in classes:
            return [f"config.json names the architecture {name or 'nothing'}. Known ones: {', '.join(classes)}."]
        processor = ViTScratchImageProcessor.from_pretrained(folder)
        model, info = classes[name].from_pretrained(folder, output_loading_info=True)
        lines = [
            f"The weights do not fit config.json: {title.replace('_', ' ')} {', '.join(sorted(map(str, keys))[:3])}."
            for title, keys in info.items()
            if title.endswith("_keys") and keys
        ]
        image = np.full((40, 30, processor.num_channels), 128, np.uint8)
        with torch.no_grad():
            outputs = model.eval()(processor(image, return_tensors="pt")["pixel_values"].to(model.dtype))
        if not all(value.isfinite().all() for value in outputs.values() if isinstance(value, torch.Tensor)):
            lines.append("The model's output for a grey image is not finite (NaN or infinity).")
    except Exception as error:  # a damaged folder can raise anything
        return [f"{folder} can't be loaded: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"]
    return lines


def stale_reports(folder: Path) -> list[str]:
    """A message for each report, in a folder to publish, that is of other weights."""
    return [
        f"{file.relative_to(folder).as_posix()} is of other weights than those in {folder}. Remove it, or evaluate "
        "again, and write the card anew."
        for file in sorted((folder / EVALUATIONS).rglob(RECORD))
        if is_of_other_weights(read_json(file).get("model", {}).get("weights"), folder)
    ]


def license_notes(folder: Path, card: str | None) -> list[str]:
    """What to say of a card whose licence gives more than that of the weights that training started from."""
    try:
        base = json.loads((folder / RECORD).read_text("utf-8"))["model"]["license"]
        note = license_note(ModelCard(card).data.license, base)
    except (OSError, ValueError, KeyError, TypeError):  # no card, or no record of ours
        return []
    return [note] if note else []
