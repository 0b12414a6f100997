# SPDX-License-Identifier: Apache-2.0
"""Checks of a folder before it is published: its model loads and runs, its card is valid and says where it is."""

import re
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from PIL import Image

from ..common.records import license_problem
from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchForMaskedImageModeling, ViTScratchModel
from .contents import CODE, Upload, shown_figures


_KINDS = {
    kind.__name__: kind
    for kind in (ViTScratchForImageClassification, ViTScratchModel, ViTScratchForMaskedImageModeling)
}
# The line of a card that loads the model. Its path is replaced by the name on the Hub.
_LOCATION = re.compile(r"""(\bpipeline\([^)\n]*?\bmodel=|\bfrom_pretrained\()(["'])([^"'\n]+)\2""")


def check_model(folder: Path) -> list[str]:
    """
    Loads the processor and the model, and runs it on a grey image.

    Returns:
        The problems, a line each.
    """
    pickles = [path.name for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    has_weights = any(folder.glob("model*.safetensors"))
    if not has_weights and pickles:
        return [f"{pickles[0]} is a pickle: loading it can run any code. Convert it: scripts/convert.py."]
    needed = ("config.json", "preprocessor_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    missing += [] if has_weights else ["model.safetensors"]
    if missing:
        return [f"{folder} has no {', no '.join(missing)}: it is not a finished model. Train or convert one into it."]
    try:
        config = ViTScratchConfig.from_pretrained(folder)
        name = (config.architectures or [""])[0]
        if name not in _KINDS:
            return [f"config.json names the architecture {name or 'nothing'}. Known ones: {', '.join(_KINDS)}."]
        processor = ViTScratchImageProcessor.from_pretrained(folder)
        model, info = _KINDS[name].from_pretrained(folder, output_loading_info=True)
        misfits = {title: sorted(map(str, info[title]))[:3] for title in info if title.endswith("_keys")}
        lines = [
            f"The weights do not fit config.json: {title.replace('_', ' ')} {', '.join(names)}."
            for title, names in misfits.items()
            if names
        ]
        image = Image.new("RGB" if config.num_channels == 3 else "L", (40, 30), 128)
        with torch.no_grad():
            outputs = model.eval()(processor(image, return_tensors="pt")["pixel_values"].to(model.dtype))
        values = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
        if not all(value.isfinite().all() for value in values):
            lines.append("The model's output for a grey image is not finite (NaN or infinity).")
    except Exception as error:  # a damaged folder can raise anything
        return [
            f"{folder} can't be loaded: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
        ]
    return lines


def prepare_card(
    folder: Path, architecture: str | None, repo_id: str, license: str | None, text: str | None = None
) -> tuple[Upload | None, list[str]]:
    """
    The card to publish: its example loads the model from the Hub, and it has a licence.

    Args:
        folder: of the model.
        architecture: the class in config.json, which decides the task.
        repo_id: the repository that the card's example loads the model from.
        license: the Hub's name of a licence, to replace the card's.
        text: of the card, in place of the folder's README.md.

    Returns:
        The card, or None if it can't be read; and the problems, a line each.
    """
    file = folder / "README.md"
    if text is None and not file.is_file():
        return None, ["There is no README.md. Write one, or run scripts/card.py, which writes it from the records."]
    try:
        card = ModelCard(file.read_text(encoding="utf-8") if text is None else text)
    except Exception as error:  # of the YAML reader, of model-index, of the text's encoding
        return None, [f"The metadata of README.md can't be read: {' '.join(str(error).split())}"]
    data, lines = card.data, []
    if license is not None and license != data.license:
        data.license, data.license_name, data.license_link = license, None, None
    if data.license is None:
        lines.append(
            "README.md names no licence. Add --license, e.g. apache-2.0: without a licence nobody may use the model."
        )
    elif problem := license_problem(data.license, data.get("license_name"), data.get("license_link")):
        lines.append(f"The licence {data.license}: {problem}")
    if data.library_name != "transformers":
        lines.append(f"library_name in README.md is {data.library_name}; the Hub needs transformers.")
    is_classifier = architecture == ViTScratchForImageClassification.__name__
    task = "image-classification" if is_classifier else "image-feature-extraction"
    if architecture is not None and data.pipeline_tag != task:
        lines.append(f"pipeline_tag in README.md is {data.pipeline_tag}; this model is for {task}.")
    absent = sorted(path for path in shown_figures(folder) if not (folder / path).is_file())
    lines += [f"README.md shows {path}, which is not in {folder}." for path in absent]
    card.text = _LOCATION.sub(lambda found: f"{found[1]}{found[2]}{repo_id}{found[2]}", card.text)
    return Upload("README.md", str(card).encode()), lines


def changed_code(folder: Path) -> list[str]:
    """The code files that the folder lacks or has in another version than this one."""
    return [
        module.name
        for module in CODE
        if not (folder / module.name).is_file() or (folder / module.name).read_bytes() != module.read_bytes()
    ]
