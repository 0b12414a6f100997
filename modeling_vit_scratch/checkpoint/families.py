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
    """
    `refused` completes a sentence that begins with the name; it is empty for what can be read. `classifier` has the
    fields in which the library's own classifier differs.
    """

    pattern: str
    fields: Mapping[str, Any] = {}
    refused: str = ""
    classifier: Mapping[str, Any] = {}


ROTARY = "turns queries and keys by rotary position embeddings of another kind than DINOv3's"
RELATIVE = "adds relative positions to the attention scores"
TIMM_STEM = "has timm's convolutional stem, whose epsilons are not those of the paper's hybrids (whose .npz opens)"
_SIZES = "(tiny|xsmall|wee|little|small|mediumd?|betwixt|base|large|huge|giant(opt)?|gigantic|so150m2?|so400m)"

CLIP = {"use_pre_norm": True, "patch_bias": False}
DINOV3 = {"position_embedding": "rope_2d", "key_bias": False, "layer_norm_eps": 1e-5, "pooling": "mean"}
SWIGLU = {"use_gated_mlp": True, "hidden_act": "silu"}
TANH = {"hidden_act": "gelu_pytorch_tanh"}
AIM = {"norm_type": "rmsnorm", "use_patch_norm": True, "use_gated_mlp": True}

# timm: `architecture` in config.json.
TIMM_ROWS = (
    Row(r"vit_huge_plus_patch16_dinov3(_qkvb)?", DINOV3 | SWIGLU | {"num_attention_heads": 20}),
    Row(r"vit_7b_patch16_dinov3", DINOV3 | SWIGLU | {"num_attention_heads": 32}),
    Row(r"vit_small_plus_patch16_dinov3(_qkvb)?", DINOV3 | SWIGLU),
    Row(r"vit_\w+_patch16_dinov3(_qkvb)?", DINOV3),
    Row(r"vit_.*(rope|lingbot|sapiens2).*|vit_pe_.*|eva02_(?!enorm).*|(qwen3|deepseek)_vit.*", refused=ROTARY),
    Row(r"(test_)?vit_s?relpos.*|beit(v2)?_.*|(samvit|gemma4_vit)_.*", refused=RELATIVE),
    Row(r"vit_.*_rpn_.*|eva02_enormous_.*", refused="normalises after each branch, not before it (res-post-norm)"),
    Row(r"beit3_.*", refused="normalises inside of attention and MLP"),
    Row(r"vit_.*_(xp|\d+x[2-9])_.*|vit_d?pwee_.*", refused="computes attention and MLP side by side"),
    Row(r"vit_d(wee|little)_.*", refused="subtracts one attention map from another (differential attention)"),
    Row(r"naflexvit_.*", refused="stores its positions for images of any shape (NaFlex)"),
    Row(r"vit_(?!.*siglip).*clip_quickgelu_\d+", CLIP | {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}),
    Row(r"vit_(?!.*siglip).*clip_\d+", CLIP | {"layer_norm_eps": 1e-5}),
    Row(r"vit_giant_patch14_(reg\d_)?(dinov2|tipsv2)", SWIGLU),
    *(Row(rf"aimv2_{size}_patch14_\d+",
          AIM | {"hidden_act": "silu", "proj_bias": False, "layer_norm_eps": 1e-5, "num_attention_heads": heads})
      for size, heads in (("large", 8), ("huge", 12), ("1b", 16), ("3b", 24))),
    Row(r"vit_.*_radio_.*|vit_intern300m_.*", {"use_final_norm": False}),
    Row(r"test_vit3", refused="pools over the tokens before the patches too"),
    Row(r"test_vit4", {"num_attention_heads": 3, "norm_type": "rmsnorm"}),
    Row(r"vit_\w+_(r\d*|resnet\d+d)_.*", refused=TIMM_STEM),
    Row(r"vit_base_mci_.*|vitamin_.*", refused="has a convolutional stem (MobileCLIP, ViTamin)"),
    Row(r"vit_base_patch16_gap_224", {"num_attention_heads": 16}),
    Row(r"vit_(base_patch32_siglip_(gap_)?256|large_patch16_siglip_(gap_)?512|so400m_patch16_siglip_(gap_)?\d+)", TANH),
    Row(r"vit_giantopt_patch16_siglip_(gap_)?\d+", TANH | {"num_attention_heads": 16}),
    Row(r"test_vit2?", {"num_attention_heads": 2}),
    # The rest of timm's names computes what its tensors look like.
    Row(rf"(vit|deit3?)_{_SIZES}(_distilled)?_patch\d+(_plus)?(_reg\d+)?(_siglip)?(_gap|_map)?(_36x1)?_\d+(_miil)?"),
    Row(rf"vit_{_SIZES}_patch\d+(_reg\d+)?_(dinov2|tipsv2)|flexivit_(small|base|large)|eva_(large|giant)_patch14_\w+"),
    Row(r"(cait|convit|crossvit|csatv2|efficientvit|fastvit|gcvit|levit|mobilevit|repvit|tiny_vit|volo|xcit)\w*",
        refused="is no plain Vision Transformer"),
)  # fmt: skip

# transformers: `model_type` in config.json.
TRANSFORMERS_ROWS = (
    Row(r"vit_scratch|vit|deit|vit_mae|vit_msn"),
    Row(r"dinov2", classifier={"pooling": "cls_mean"}),
    Row(r"dinov2_with_registers", {"position_embedding_interpolation": "bicubic_antialias"},
        classifier={"pooling": "cls_mean"}),
    Row(r"dinov3_vit", {"position_embedding": "rope_2d"}),
    Row(r"ijepa", {"pooling": "mean"}),
    Row(r"siglip(_vision_model)?", {"pooling": "map"}, classifier={"pooling": "mean"}),
    Row(r"siglip2(_vision_model)?", {"pooling": "map", "position_embedding_interpolation": "bilinear_antialias"},
        classifier={"pooling": "mean"}),
    Row(r"(clip|metaclip_2)(_vision_model)?", CLIP | {"norm_after_pooling": True},
        classifier={"pooling": "mean", "norm_after_pooling": False, "use_final_norm": False}),
    Row(r"aimv2(_vision_model)?", AIM | {"pooling": "mean"}),
    Row(r"mlcd.*|vjepa2", refused=ROTARY),
    Row(r"beit|data2vec-vision|sam|sam_vision_model", refused=RELATIVE),
    Row(r"yolos", refused="has tokens for the objects that it detects"),
    Row(r".*", refused="is no architecture that this package knows"),
)  # fmt: skip


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
