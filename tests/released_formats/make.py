# SPDX-License-Identifier: Apache-2.0
"""
Writes the folders beside this file, each with the code that had its format first:

    git worktree add --detach /tmp/old COMMIT
    PYTHONPATH=/tmp/old python tests/released_formats/make.py NAME     COMMIT and NAME: of FORMATS, here

What is there is never written again: people have such folders. See tests/test_released_formats.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

import modeling_vit_scratch
from modeling_vit_scratch import ViTScratchConfig, ViTScratchImageProcessor


# Two layers of width 16 on 2 x 3 patches: a folder below 60 kB.
TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": [8, 12], "patch_size": 4, "id2label": {0: "cat", 1: "dog", 2: "owl"},
}  # fmt: skip
CLASSIFIER, MASKED = "ViTScratchForImageClassification", "ViTScratchForMaskedImageModeling"
# Name: commit, class, fields of the configuration, of the processor. Each has what its commit brought to the disk.
FORMATS = {
    "first": (
        "b31ee64", CLASSIFIER,
        {"representation_size": 8, "qk_norm": True, "layer_scale_init_value": 0.5, "num_register_tokens": 1},
        {"crop_pct": 0.875},
    ),
    "first_mean": (
        "b31ee64", CLASSIFIER,
        {"pooling": "mean", "position_embedding": "learned_2d", "position_embedding_placement": "every_layer",
         "qkv_bias": False, "num_channels": 1},
        {"num_channels": 1, "image_mean": 0.4, "image_std": 0.3, "background_color": [0, 0, 0]},
    ),
    "first_masked": ("b31ee64", MASKED, {"position_embedding": "relative_1d"}, {"do_normalize": False}),
    "distilled": (
        "57d42e5", CLASSIFIER,
        {"use_distillation_token": True, "use_distillation_head": True, "cls_token_position": False,
         "use_mask_token": True},
        {"resample": 3},
    ),
    "hybrid": (
        "57d42e5", CLASSIFIER,
        {"stem_layers": [1], "stem_width_factor": 0.5, "pooling": "mean", "norm_after_pooling": True, "hidden_size": 8,
         "num_hidden_layers": 1, "num_channels": 1, "dtype": "float16"},
        {"size": {"shortest_edge": 9}, "do_center_crop": True, "crop_size": {"height": 8, "width": 12},
         "num_channels": 1, "image_mean": 0.5, "image_std": 0.5},
    ),
    "sigmoid": (
        "e2195b2", CLASSIFIER, {"head_bias_init": -6.9, "problem_type": "multi_label_classification"}, {},
    ),
    "temperature": ("c3f5a03", CLASSIFIER, {"temperature": 1.75}, {}),
    "fast_resize": ("8c7e83f", CLASSIFIER, {}, {"do_fast_resize": True}),
    "rotary": (
        "87e6d56", CLASSIFIER,
        {"position_embedding": "rope_2d", "rope_theta": 50.0, "key_bias": False, "num_register_tokens": 2,
         "pooling": "cls_mean", "use_gated_mlp": True, "mlp_bias": False, "proj_bias": False, "norm_type": "rmsnorm"},
        {},
    ),
    "attention_pooling": (
        "87e6d56", CLASSIFIER,
        {"pooling": "map", "use_patch_norm": True, "use_pre_norm": True, "use_final_norm": False, "patch_bias": False},
        {},
    ),
}  # fmt: skip


def main(name: str) -> None:
    commit, architecture, fields, settings = FORMATS[name]
    folder, code = Path(__file__).parent / name, Path(modeling_vit_scratch.__file__).parents[1]
    here = subprocess.run(["git", "rev-parse", commit, "HEAD"], cwd=code, capture_output=True, text=True, check=True)
    if len(set(here.stdout.split())) != 1:
        raise SystemExit(f"{code} is not at {commit}, which had this format first.")
    if folder.exists():
        raise SystemExit(f"{folder} is there, and people have such folders.")

    torch.manual_seed(0)
    model = getattr(modeling_vit_scratch, architecture)(ViTScratchConfig(**TINY | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # those that start at zero and one, too
            parameter += 0.2 * torch.randn_like(parameter)
    processor = ViTScratchImageProcessor(**{"size": {"height": 8, "width": 12}} | settings)
    model.to(model.config.dtype or torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.glob("*.py"):  # a hundred kilobytes that git has
        file.unlink()

    pixels = np.arange(19 * 23 * 3).reshape(19, 23, 3)
    photo = Image.fromarray((pixels * pixels // 997 % 256).astype(np.uint8))
    photo.save(folder / "photo.png")
    pixel_values = processor(photo if fields.get("num_channels") != 1 else photo.convert("L"), return_tensors="pt")
    with torch.no_grad():
        outputs = model.float()(**pixel_values)
    answer = outputs.logits if architecture == CLASSIFIER else outputs.reconstruction
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    expected = {"commit": commit, **versions, **{key: value.tolist() for key, value in pixel_values.items()}}
    text = json.dumps(expected | {"answer": answer.tolist()})
    (folder / "expected.json").write_text(text + "\n")
    if sum(file.stat().st_size for file in folder.iterdir()) > 60_000:
        shutil.rmtree(folder)
        raise SystemExit(f"{name} is larger than 60 kB. Make it smaller.")


if __name__ == "__main__":
    main(*sys.argv[1:])
