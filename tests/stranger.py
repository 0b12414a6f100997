# SPDX-License-Identifier: Apache-2.0
"""
What a stranger does with a model folder, who has torch, transformers and Pillow, and not this package.

    python tests/stranger.py FOLDER PHOTO

Prints one line of JSON: for each step what came out, numbers as digests of their bytes, or the error. Runs with every
transformers that the folder is for; `tests/version_matrix.py` compares them.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)


TRUST = {"trust_remote_code": True}


def digest(*tensors: torch.Tensor) -> str:
    """The same for the same numbers, to the last digit, of the same shapes."""
    result = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().numpy()
        result.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return result.hexdigest()[:12]


def read_config(folder: Path, photo: Path) -> Any:
    config = AutoConfig.from_pretrained(folder, **TRUST)
    changed = AutoConfig.from_pretrained(folder, num_labels=7, hidden_dropout_prob=0.1, **TRUST)
    return [config.model_type, config.num_labels, len(config.id2label), changed.num_labels, changed.hidden_dropout_prob]


def read_images(folder: Path, photo: Path) -> Any:
    processor = AutoImageProcessor.from_pretrained(folder, **TRUST)
    with Image.open(photo) as image:
        array = np.asarray(image.convert("RGB"))
        inputs = [photo, str(photo), image.convert("RGB"), array, torch.tensor(array).permute(2, 0, 1)]
        pixels = processor(inputs, return_tensors="pt")["pixel_values"]
    other = AutoImageProcessor.from_pretrained(folder, size={"shortest_edge": 40}, do_center_crop=True,
                                               crop_size={"height": 32, "width": 24}, **TRUST)  # fmt: skip
    one_call = processor(photo, return_tensors="pt", image_mean=0.25, do_resize=False)["pixel_values"]
    with tempfile.TemporaryDirectory() as saved:
        processor.save_pretrained(saved)
        again = AutoImageProcessor.from_pretrained(saved, **TRUST)
        equal = torch.equal(again(photo, return_tensors="pt")["pixel_values"][0], pixels[0])
    return [digest(pixels), digest(other(photo, return_tensors="pt")["pixel_values"]), digest(one_call), equal]


def pixels_for(folder: Path) -> torch.Tensor:
    height, width = AutoConfig.from_pretrained(folder, **TRUST).image_hw
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def classify(folder: Path, photo: Path) -> Any:
    model = AutoModelForImageClassification.from_pretrained(folder, **TRUST).eval()
    pixels, found = pixels_for(folder), []
    with torch.no_grad():
        found.append(digest(model(pixels).logits))
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            outputs = model(pixels, output_hidden_states=True, output_attentions=True)
            mask = torch.ones(outputs.hidden_states[0].shape[:2], dtype=torch.long)
            mask[0, -3:] = 0
            masked = model(pixels, attention_mask=mask).logits
            found.append([digest(*outputs.hidden_states), digest(*outputs.attentions), digest(masked)])
        found.append(len(model(pixels, return_dict=False)))
    return found


def train_a_checkpointed_step(folder: Path, photo: Path) -> Any:
    model = AutoModelForImageClassification.from_pretrained(folder, **TRUST).train()
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    loss = model(pixels_for(folder), labels=torch.tensor([0, 1])).loss
    loss.backward()
    return [loss.item().hex(), digest(*(parameter.grad for parameter in model.parameters()))]


def open_other_classes(folder: Path, photo: Path) -> Any:
    pixels = pixels_for(folder)
    with torch.no_grad():
        encoder = AutoModel.from_pretrained(folder, **TRUST).eval()(pixels)
        painted = AutoModelForMaskedImageModeling.from_pretrained(folder, **TRUST).eval()(pixels).reconstruction
        backbone = AutoBackbone.from_config(AutoConfig.from_pretrained(folder, out_indices=[0, -1], **TRUST), **TRUST)
        outputs = backbone(pixels)
    shapes = [list(painted.shape), *(list(maps.shape) for maps in outputs.feature_maps)]
    return [digest(encoder.last_hidden_state, encoder.pooler_output), shapes, outputs.hidden_states is None]


def run_pipelines(folder: Path, photo: Path) -> Any:
    answers = pipeline("image-classification", model=str(folder), **TRUST)(str(photo), top_k=2)
    extract = pipeline("image-feature-extraction", model=str(folder), pool=True, return_tensors=True, **TRUST)
    return [[answer["label"], answer["score"].hex()] for answer in answers] + [digest(extract(str(photo)))]


def take_a_step_of_the_trainer(folder: Path, photo: Path) -> Any:
    model = AutoModelForImageClassification.from_pretrained(folder, **TRUST)
    data = [{"pixel_values": pixels, "labels": index} for index, pixels in enumerate(pixels_for(folder))]
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output, max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no",
            learning_rate=1e-3, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        trainer.save_model(output)
        again = AutoModelForImageClassification.from_pretrained(output, **TRUST)
        equal = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    return [loss.hex(), digest(*model.state_dict().values()), equal]


def save_again(folder: Path, photo: Path) -> Any:
    model = AutoModelForImageClassification.from_pretrained(folder, **TRUST).eval()
    with tempfile.TemporaryDirectory() as saved, torch.no_grad():
        model.save_pretrained(saved)
        files = sorted(path.name for path in Path(saved).iterdir())
        logits = AutoModelForImageClassification.from_pretrained(saved, **TRUST).eval()(pixels_for(folder)).logits
    return [files, digest(logits)]


STEPS: dict[str, Callable[[Path, Path], Any]] = {
    "configuration": read_config,
    "image processor": read_images,
    "logits, attentions": classify,
    "checkpointed gradients": train_a_checkpointed_step,
    "other Auto classes": open_other_classes,
    "pipelines": run_pipelines,
    "Trainer": take_a_step_of_the_trainer,
    "saved again": save_again,
}


def results(folder: Path, photo: Path) -> Iterator[tuple[str, Any]]:
    for name, step in STEPS.items():
        try:
            yield name, step(folder, photo)
        except Exception as error:  # whatever this version raises is the result
            yield name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(versions | dict(results(Path(sys.argv[1]), Path(sys.argv[2])))))
