# SPDX-License-Identifier: Apache-2.0
"""The files that make other libraries load what `save_checkpoint` writes: the way back of `architecture.py`."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from ..configuration_vit_scratch import ViTScratchConfig
from .architecture import OUR_NAMES, RESAMPLE, SHARED_FIELDS, SHARED_SETTINGS, TIMM_ACTIVATIONS, shorten
from .formats import TIMM, TRANSFORMERS, Format


_TIMM_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
# Fields of some of transformers' configurations that we have too.
_SAVED_FIELDS = (
    "drop_path_rate", "rope_theta", "proj_bias", "mlp_bias", "key_bias", "use_gated_mlp", "num_register_tokens",
)  # fmt: skip


def their_configs(
    form: Format, config: ViTScratchConfig, dialect: Mapping[str, Any], processor: Any, state: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What other libraries read beside the weights: file names to contents (JSON), none for some formats."""
    if form is TRANSFORMERS:
        return _transformers_files(config, dialect["model_type"], processor, state)
    return {"config.json": _timm_config(config, dialect, processor)} if form is TIMM else {}


def _transformers_files(
    config: ViTScratchConfig, model_type: str, processor: Any, state: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    names = ("hidden_size", "num_channels", "qkv_bias", *SHARED_FIELDS)
    fields = {name: getattr(config, name) for name in names}
    fields.update(image_size=shorten(config.image_hw), patch_size=shorten(config.patch_hw))
    theirs = {ours: name for name, ours in OUR_NAMES.items()}
    fields.update({theirs.get(name, name): getattr(config, name) for name in (*_SAVED_FIELDS, *OUR_NAMES.values())})
    if model_type.startswith("dinov2"):
        ratio = config.intermediate_size / config.hidden_size
        if config.use_gated_mlp:  # two thirds of it, rounded up
            ratio = int(1.5 * ratio)
        fields.update(mlp_ratio=int(ratio) if ratio == int(ratio) else ratio, drop_path_rate=config.drop_path_rate)
        fields["use_swiglu_ffn"] = config.use_gated_mlp
    else:
        fields["intermediate_size"] = config.intermediate_size
    fields["encoder_stride"] = config.patch_hw[0]
    if config.layer_scale_init_value is not None:
        fields["layerscale_value"] = config.layer_scale_init_value
    default = CONFIG_MAPPING[model_type]()
    tower = getattr(default, "vision_config", default)
    fields |= {"vision_use_head": config.pooling == "map", "use_head": False, "num_patches": math.prod(config.grid_hw)}
    fields |= {"query_bias": config.qkv_bias, "value_bias": config.qkv_bias}
    fields["key_bias"] = config.qkv_bias and config.key_bias
    fields = {name: value for name, value in fields.items() if hasattr(tower, name)}
    if tower is not default:
        fields = {"vision_config": fields}
    if config.num_labels:
        fields.update(id2label=config.id2label, label2id=config.label2id)
    # MetaCLIP 2's tower is in none of transformers' tables.
    architecture = modeling_auto.MODEL_MAPPING_NAMES.get(model_type, "MetaClip2VisionModel")
    if config.use_distillation_head:
        architecture = "DeiTForImageClassificationWithTeacher"
    elif model_type == "deit" and "classifier.weight" in state:  # which has two classes
        architecture = "DeiTForImageClassification"
    elif "classifier.weight" in state:
        architecture = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(model_type, architecture)
    elif "decoder.weight" in state:
        architecture = modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES.get(model_type, architecture)
    files = {"config.json": {**CONFIG_MAPPING[model_type](**fields).to_dict(), "architectures": [architecture]}}
    if processor is not None:
        settings = processor.to_dict()
        settings = {key: settings[key] for key in SHARED_SETTINGS if settings.get(key) is not None}
        files["preprocessor_config.json"] = {**settings, "image_processor_type": "ViTImageProcessor"}
    return files


def _timm_config(config: ViTScratchConfig, dialect: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    size = _TIMM_SIZES.get(config.hidden_size, "base")
    has_packed_mlp = config.use_gated_mlp and not dialect.get("joins")
    pooling = {"cls": "token", "mean": "avg"}.get(config.pooling, config.pooling)
    family, distilled = ("deit", "_distilled") if config.use_distillation_token else ("vit", "")
    arguments: dict[str, Any] = {
        "img_size": list(config.image_hw), "patch_size": list(config.patch_hw), "in_chans": config.num_channels,
        "embed_dim": config.hidden_size, "depth": config.num_hidden_layers, "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size * (2 if has_packed_mlp else 1),
        "qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm, "init_values": config.layer_scale_init_value,
        "act_layer": next(name for name, ours in TIMM_ACTIVATIONS.items() if ours == config.hidden_act),
    }  # fmt: skip
    if not distilled:
        # of all tokens before the patches, or of none
        has_positions = dialect.get("registers_placed") if config.num_register_tokens else config.cls_token_position
        arguments |= {
            "class_token": config.use_cls_token, "no_embed_class": not has_positions,
            "reg_tokens": config.num_register_tokens, "global_pool": pooling, "fc_norm": config.norm_after_pooling,
        }  # fmt: skip
    if config.position_embedding == "none":
        arguments["pos_embed"] = "none"
    if config.position_embedding == "rope_2d":  # another class in timm
        names = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "global_pool")
        arguments = {name: arguments[name] for name in names}
    settings = {} if processor is None else processor.to_dict()
    names = {number: name for name, number in RESAMPLE.items()}
    pretrained = {
        "input_size": [config.num_channels, *config.image_hw],
        "mean": list(settings.get("image_mean") or [0.5] * config.num_channels),
        "std": list(settings.get("image_std") or [0.5] * config.num_channels),
        "interpolation": names.get(settings.get("resample"), "bicubic"),
        "crop_pct": settings.get("crop_pct") or 1.0, "crop_mode": "center" if settings.get("crop_pct") else "squash",
        "num_classes": config.num_labels, "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if config.use_distillation_head else "head",
    }  # fmt: skip
    return {
        "architecture": dialect.get("architecture") or f"{family}_{size}{distilled}_patch16_224",
        "num_classes": config.num_labels, "num_features": config.hidden_size, "global_pool": pooling,
        "model_args": arguments, "pretrained_cfg": pretrained,
    }  # fmt: skip
