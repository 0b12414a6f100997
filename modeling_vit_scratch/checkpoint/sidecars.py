# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights in other libraries' folders, so that they load what `save_checkpoint` writes there."""

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from ..configuration_vit_scratch import ViTScratchConfig
from .formats import TIMM, TRANSFORMERS, Format


_ARCHITECTURES = {
    "vit": ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"),
    "vit_msn": ("ViTMSNModel", "ViTMSNForImageClassification", "ViTMSNModel"),
    "vit_mae": ("ViTMAEModel",) * 3,
    "ijepa": ("IJepaModel", "IJepaForImageClassification", "IJepaModel"),
    "deit": ("DeiTModel", "DeiTForImageClassification", "DeiTForMaskedImageModeling"),
    "dinov2": ("Dinov2Model",) * 3,
    "dinov2_with_registers": ("Dinov2WithRegistersModel",) * 3,
}
_TIMM_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
TIMM_ACTIVATIONS = {
    "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu",
}  # fmt: skip
_TIMM_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def their_configs(
    form: Format, config: ViTScratchConfig, dialect: Mapping[str, Any], processor: Any, state: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """File names to contents (JSON); empty for formats that have none."""
    if form is TRANSFORMERS:
        return _of_transformers(config, dialect["model_type"], processor, state)
    return {"config.json": _of_timm(config, dialect, processor)} if form is TIMM else {}


def _side(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


def _of_transformers(
    config: ViTScratchConfig, model_type: str, processor: Any, state: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    fields = {
        name: getattr(config, name)
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "num_channels",
            "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "qkv_bias", "problem_type",
        )
    }  # fmt: skip
    fields.update(image_size=_side(config.image_hw), patch_size=_side(config.patch_hw))
    if model_type.startswith("dinov2"):
        ratio = config.intermediate_size / config.hidden_size
        fields.update(mlp_ratio=int(ratio) if ratio == int(ratio) else ratio, drop_path_rate=config.drop_path_rate)
        fields["layerscale_value"] = config.layer_scale_init_value
        if config.num_register_tokens:
            fields["num_register_tokens"] = config.num_register_tokens
    else:
        fields["intermediate_size"] = config.intermediate_size
    if model_type in ("vit", "deit"):
        fields["encoder_stride"] = config.patch_hw[0]
    if config.num_labels:
        fields.update(id2label=config.id2label, label2id=config.label2id)
    kind = 1 if "classifier.weight" in state else 2 if "decoder.weight" in state else 0
    architecture = _ARCHITECTURES[model_type][kind]
    if config.use_distillation_head:
        architecture = "DeiTForImageClassificationWithTeacher"
    contents = {**CONFIG_MAPPING[model_type](**fields).to_dict(), "architectures": [architecture]}
    files = {"config.json": contents}
    if processor is not None:
        settings = processor.to_dict()
        settings = {key: settings.get(key) for key in ("size", "resample", "do_resize", "do_rescale", "do_normalize",
                    "rescale_factor", "image_mean", "image_std", "do_center_crop", "crop_size")}  # fmt: skip
        settings["image_processor_type"] = "ViTImageProcessor"
        files["preprocessor_config.json"] = {key: value for key, value in settings.items() if value is not None}
    return files


def _of_timm(config: ViTScratchConfig, dialect: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    size = _TIMM_SIZES.get(config.hidden_size, "base")
    family, distilled = ("deit", "_distilled") if config.use_distillation_token else ("vit", "")
    arguments: dict[str, Any] = {
        "img_size": list(config.image_hw),
        "patch_size": list(config.patch_hw),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale_init_value,
        "act_layer": next(name for name, ours in TIMM_ACTIVATIONS.items() if ours == config.hidden_act),
    }
    if not distilled:
        # of all tokens before the patches, or of none
        has_positions = dialect.get("registers_placed") if config.num_register_tokens else config.cls_token_position
        arguments.update(
            class_token=config.use_cls_token,
            no_embed_class=not has_positions,
            reg_tokens=config.num_register_tokens,
            global_pool="token" if config.pooling == "cls" else "avg",
            fc_norm=config.norm_after_pooling,
        )
    if config.position_embedding == "none":
        arguments["pos_embed"] = "none"
    settings = {} if processor is None else processor.to_dict()
    pretrained = {
        "input_size": [config.num_channels, *config.image_hw],
        "mean": list(settings.get("image_mean") or [0.5] * config.num_channels),
        "std": list(settings.get("image_std") or [0.5] * config.num_channels),
        "interpolation": _TIMM_RESAMPLE.get(settings.get("resample"), "bicubic"),
        "crop_pct": settings.get("crop_pct") or 1.0,
        "crop_mode": "center" if settings.get("crop_pct") else "squash",
        "num_classes": config.num_labels,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if config.use_distillation_head else "head",
    }
    return {
        "architecture": dialect.get("architecture") or f"{family}_{size}{distilled}_patch16_224",
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": "token" if config.pooling == "cls" else "avg",
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
