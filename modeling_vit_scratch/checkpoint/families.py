# SPDX-License-Identifier: Apache-2.0
"""
What the name of a model says and its tensors don't: different networks can have tensors of the same names and shapes.

A row is a pattern for whole names, with fields of our configuration or the reason why no model of this package computes
the same. The first that matches counts. `scripts/experiments/model_zoo.py` runs the names of timm and transformers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """`refused` completes a sentence that begins with the name; it is empty for what can be read."""

    pattern: str
    fields: Mapping[str, Any] = {}
    refused: str = ""


ROTARY = "turns queries and keys by rotary position embeddings"
ATTENTION_POOLING = "pools by attention"
NORM_FIRST = "normalises the tokens before the first layer, as CLIP does"
GATED_MLP = "has gated MLPs (SwiGLU)"
RELATIVE = "adds relative positions to the attention scores"
TIMM_STEM = "has timm's convolutional stem, whose epsilons are not those of the paper's hybrids (whose .npz opens)"
_SIZES = "(tiny|xsmall|wee|little|small|mediumd?|betwixt|base|large|huge|giant(opt)?|gigantic|so150m2?|so400m)"

# timm: `architecture` in config.json.
TIMM_ROWS = (
    Row(r"vit_.*(rope|dinov3|lingbot|sapiens2).*|vit_pe_.*|eva02_(?!enorm).*|(qwen3|deepseek)_vit.*",
        refused=ROTARY),
    Row(r"(test_)?vit_s?relpos.*|beit(v2)?_.*|(samvit|gemma4_vit)_.*", refused=RELATIVE),
    Row(r"vit_.*_rpn_.*|eva02_enormous_.*", refused="normalises after each branch, not before it (res-post-norm)"),
    Row(r"beit3_.*", refused="normalises inside of attention and MLP"),
    Row(r"vit_.*_(xp|\d+x[2-9])_.*|vit_d?pwee_.*", refused="computes attention and MLP side by side"),
    Row(r"vit_d(wee|little)_.*", refused="subtracts one attention map from another (differential attention)"),
    Row(r"naflexvit_.*", refused="stores its positions for images of any shape (NaFlex)"),
    Row(r"vit_(?!.*siglip).*clip_.*", refused=NORM_FIRST),
    Row(r".*siglip_\d.*|vit_.*_map_.*|test_vit3", refused=ATTENTION_POOLING),
    Row(r"vit_giant_patch14_(reg\d_)?(dinov2|tipsv2)|aimv2_.*|vitamin_.*", refused=GATED_MLP),
    Row(r"vit_.*_radio_.*|vit_intern300m_.*", refused="has no LayerNorm after the last layer"),
    Row(r"test_vit4", refused="normalises by RMSNorm"),
    Row(r"vit_\w+_(r\d*|resnet\d+d)_.*", refused=TIMM_STEM),
    Row(r"vit_base_mci_.*", refused="has a convolutional stem (MobileCLIP)"),
    Row(r"vit_base_patch16_gap_224", {"num_attention_heads": 16}),
    Row(r"vit_(base_patch32_siglip_gap_256|large_patch16_siglip_gap_512|so400m_patch16_siglip_gap_\d+)",
        {"hidden_act": "gelu_pytorch_tanh"}),
    Row(r"vit_giantopt_patch16_siglip_gap_\d+", {"hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 16}),
    Row(r"test_vit2?", {"num_attention_heads": 2}),
    # The rest of timm's names computes what its tensors look like.
    Row(rf"(vit|deit3?)_{_SIZES}(_distilled)?_patch\d+(_plus)?(_reg\d+)?(_siglip)?(_gap)?(_36x1)?_\d+(_miil)?"),
    Row(rf"vit_{_SIZES}_patch\d+(_reg\d+)?_(dinov2|tipsv2)|flexivit_(small|base|large)|eva_(large|giant)_patch14_\w+"),
    Row(r"(cait|convit|crossvit|csatv2|efficientvit|fastvit|gcvit|levit|mobilevit|repvit|tiny_vit|volo|xcit)\w*",
        refused="is no plain Vision Transformer"),
)  # fmt: skip

# transformers: `model_type` in config.json.
TRANSFORMERS_ROWS = (
    Row(r"vit_scratch|vit|deit|vit_mae|vit_msn|dinov2"),
    Row(r"dinov2_with_registers", {"position_embedding_interpolation": "bicubic_antialias"}),
    Row(r"ijepa", {"pooling": "mean"}),
    Row(r"dinov3_vit|mlcd.*|vjepa2", refused=ROTARY),
    Row(r"beit|data2vec-vision|sam|sam_vision_model", refused=RELATIVE),
    Row(r"siglip.*", refused=ATTENTION_POOLING),
    Row(r"clip.*|chinese_clip.*|altclip.*|metaclip_2.*|owlv.*", refused=NORM_FIRST),
    Row(r"aimv2.*", refused=GATED_MLP),
    Row(r"yolos", refused="has tokens for the objects that it detects"),
    Row(r".*", refused="is no architecture that this package knows"),
)


class Family(NamedTuple):
    """A library's name of a model, and its row; None for an unknown name."""

    library: str
    name: str
    row: Row | None

    def __str__(self) -> str:
        return f"{self.name} of {self.library}"


def find_family(config: Mapping[str, Any], path: str) -> Family | None:
    """The model that `config.json` names; without one, the model of timm that the file is called after."""
    model_type, architecture = config.get("model_type"), config.get("architecture")
    if isinstance(architecture, str) and model_type in (None, "timm_wrapper"):
        name = architecture.partition(".")[0]
        return Family("timm", name, _find(TIMM_ROWS, name))
    if isinstance(model_type, str):
        return Family("transformers", model_type, _find(TRANSFORMERS_ROWS, model_type))
    name = re.split(r"[.-]", Path(path).name)[0]
    row = _find(TIMM_ROWS, name)
    return Family("timm", name, row) if row else None


def _find(rows: tuple[Row, ...], name: str) -> Row | None:
    return next((row for row in rows if re.fullmatch(row.pattern, name)), None)
