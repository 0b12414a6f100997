# SPDX-License-Identifier: Apache-2.0
"""
What model a foreign checkpoint holds: configuration and image processor, from names, shapes and config.json.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING

from ..configuration_vit_scratch import ViTScratchConfig
from .families import Family, find_family
from .files import CheckpointError
from .formats import NPZ, TIMM, TORCHVISION, TRANSFORMERS, Format


BILINEAR, BICUBIC = 2, 3
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": BILINEAR, "bicubic": BICUBIC}
# Where one configuration is of text and images, that of the images alone.
_TOWERS = {name: f"{name}_vision_model" for name in ("clip", "metaclip_2", "siglip", "siglip2", "aimv2")}
TIMM_ACTIVATIONS = {
    "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu",
}  # fmt: skip

# Heads by width where a head has not 64 channels: the paper's H (Table 1) and Zhai et al., arXiv:2106.04560, Table 2.
_HEADS_BY_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
# Fields that are true if there is a tensor.
_SHOWN_BY = {
    "mlp_bias": "vit.layers.{i}.mlp.fc2.bias", "use_patch_norm": "vit.embeddings.patch_embeddings.layernorm.weight",
    "use_pre_norm": "vit.embeddings.layernorm.weight", "use_cls_token": "vit.embeddings.cls_token",
    "use_distillation_token": "vit.embeddings.distillation_token", "use_mask_token": "vit.embeddings.mask_token",
    "use_distillation_head": "distillation_classifier.weight", "qkv_bias": "vit.layers.{i}.attention.qkv.bias",
    "qk_norm": "vit.layers.{i}.attention.q_norm.weight",
}  # fmt: skip
# Arguments of timm's models that are read below, that tensors show, or that matter in training alone.
_TIMM_ARGUMENTS = {
    "img_size", "num_heads", "global_pool", "act_layer", "norm_layer", "pos_embed",
    "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "qk_norm", "proj_bias",
    "init_values", "class_token", "no_embed_class", "reg_tokens", "fc_norm", "pre_norm", "final_norm",
    "scale_attn_norm", "scale_mlp_norm", "embed_norm_layer", "dynamic_img_size", "dynamic_img_pad",
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "weight_init", "fix_init",
}  # fmt: skip
# Settings that transformers' configurations and image processors have too.
SHARED_FIELDS = (
    "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "hidden_dropout_prob",
    "initializer_range", "attention_probs_dropout_prob", "problem_type",
)  # fmt: skip
# Of some of transformers' configurations, and what two of them are called here.
_SOME_FIELDS = (
    "drop_path_rate", "rope_theta", "proj_bias", "mlp_bias", "key_bias", "attention_dropout", "rms_norm_eps",
)  # fmt: skip
OUR_NAMES = {"attention_dropout": "attention_probs_dropout_prob", "rms_norm_eps": "layer_norm_eps"}
SHARED_SETTINGS = (
    "size", "resample", "do_resize", "do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std",
    "do_center_crop", "crop_size",
)  # fmt: skip


@dataclass
class Evidence:
    """What is known of a checkpoint before a tensor is read. `given` has the fields that the user sets."""

    source: str
    family: Family | None
    form: Format
    dialect: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    given: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def find(self, ours: str) -> tuple[int, ...] | None:
        """The shape of their tensor for ours (of any layer), None if there is none."""
        theirs = next((theirs for name, theirs, _ in self.form.rows if name == ours), None)
        if theirs is None:
            return None
        name = theirs[0].format(i="COUNT", s="", u="", s1="1", u1="1", **self.dialect)
        name = re.escape(name).replace("COUNT", r"\d+")
        found = (their for their in self.shapes if re.fullmatch(name, their) and their not in self.left_out)
        return next(map(self.shapes.get, found), None)

    def need(self, ours: str) -> tuple[int, ...]:
        shape = self.find(ours)
        if shape is None:
            raise self.fail(f"looks like a {self.form.title}, but lacks what {ours} is made of, for any layer.")
        return shape

    def fail(self, reason: str) -> CheckpointError:
        """The error that names the file and, where it is known, the model."""
        return CheckpointError(f"{self.source}{f' ({self.family})' if self.family else ''}: {reason}")


def infer_config(evidence: Evidence) -> ViTScratchConfig:
    """The configuration of a foreign checkpoint: shapes first, then what its config.json adds."""
    fields = _from_shapes(evidence)
    if evidence.form is TIMM:
        fields.update(_of_timm(evidence, fields))
    elif evidence.form is TRANSFORMERS:
        fields.update(_of_transformers(evidence, fields))
    elif evidence.form is TORCHVISION:
        fields["position_embedding_interpolation"] = "bicubic_align_corners"
    else:
        # Flax's gelu is the tanh approximation, and its LayerNorm's epsilon 1e-6; the code resizes with scipy's zoom.
        fields.update(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, zero_init_head=True)
        fields["position_embedding_interpolation"] = "bilinear"
        fields["num_attention_heads"] = evidence.need("vit.layers.{i}.attention.qkv.weight")[-2]
    fields.update(_positions(evidence, fields))
    fields["num_attention_heads"] = _num_heads(evidence, fields)
    fields.pop("_image_size", None)  # what config.json says, which the positions decide
    return ViTScratchConfig(**fields)


def _from_shapes(evidence: Evidence) -> dict[str, Any]:
    patch = "vit.embeddings.patch_embeddings."
    is_npz, kernel = evidence.form is NPZ, evidence.need(f"{patch}projection.weight")
    side = (evidence.config.get("vision_config") or evidence.config).get("patch_size", 16)
    is_flat = evidence.form is TRANSFORMERS and len(kernel) == 2 and isinstance(side, int) and side > 0
    if is_flat and kernel[1] % side**2 == 0:  # SigLIP 2's dense layer: (D, height * width * C)
        kernel = (kernel[0], kernel[1] // side**2, side, side)
    if len(kernel) != 4:
        raise evidence.fail(f"its patch projection has the shape {kernel}, which is that of no convolution.")
    height, width, channels, hidden = kernel if is_npz else (*kernel[2:], kernel[1], kernel[0])
    fields: dict[str, Any] = {"hidden_size": hidden, "num_channels": channels}
    root = evidence.find(f"{patch}stem.root_conv.weight")
    if root is not None:
        fields.update(stem_layers=_count_units(evidence), num_channels=root[2], stem_width_factor=root[3] / 64)
        stride = 4 * 2 ** max(len(fields["stem_layers"]) - 1, 0)
        height, width = stride * height, stride * width
    fields["patch_size"] = shorten([height, width])
    fields["num_hidden_layers"] = _count_layers(evidence)
    # Kernels of Flax are (inputs, outputs), those of PyTorch (outputs, inputs).
    (*_, first), (second, *_) = (
        evidence.need(f"vit.layers.{{i}}.mlp.fc{n}.weight")[:: 1 if is_npz else -1] for n in (1, 2)
    )
    fields["use_gated_mlp"] = first == 2 * second
    fields["intermediate_size"] = second
    fields |= {name: evidence.find(ours) is not None for name, ours in _SHOWN_BY.items()}
    has_bias = evidence.find("vit.layers.{i}.layernorm_before.bias") is not None
    fields["norm_type"] = "layernorm" if has_bias else "rmsnorm"
    fields["patch_bias"] = not fields["use_pre_norm"] or evidence.find(f"{patch}projection.bias") is not None
    has_probe = evidence.find("vit.pooler.attention.probe") is not None
    fields["pooling"] = "map" if has_probe else "cls" if fields["use_cls_token"] else "mean"
    registers = evidence.find("vit.embeddings.register_tokens")
    fields["num_register_tokens"] = registers[1] if registers else 0
    if registers and not registers[1]:  # DINOv3's default
        name = next(name for name in evidence.shapes if name.endswith("register_tokens"))
        evidence.left_out[name] = "it has no elements"
    if evidence.find("vit.layers.{i}.layer_scale_attention.weight") is not None:
        fields["layer_scale_init_value"] = 1e-5
    head, pooler = evidence.find("classifier.weight"), evidence.find("vit.pooler.dense.bias")
    head = evidence.find("classifier.bias") or (head[::-1] if is_npz and head else head)
    fields["num_labels"] = head[0] if head else 0
    fields["representation_size"] = pooler[0] if pooler else None
    return fields


def _count_layers(evidence: Evidence) -> int:
    name = "vit.layers.{i}.layernorm_before.weight"
    theirs = next(theirs for ours, theirs, _ in evidence.form.rows if ours == name)
    before = re.escape(theirs[0].split("{i}")[0].format(**evidence.dialect))
    found = [int(match[1]) for name in evidence.shapes if (match := re.match(rf"{before}(\d+)[./]", name))]
    if not found:
        raise evidence.fail("there is not one encoder layer in it.")
    return max(found) + 1


def _count_units(evidence: Evidence) -> list[int]:
    prefix = re.escape(evidence.dialect["prefix"])
    matches = (re.match(rf"{prefix}block(\d+)/unit(\d+)/", name) for name in evidence.shapes)
    units = dict(sorted((int(match[1]), int(match[2])) for match in matches if match))  # the last one of each stage
    if list(units) != list(range(1, len(units) + 1)):
        raise evidence.fail(f"its ResNet has the stages {list(units)}, with a gap.")
    return list(units.values())


def _positions(evidence: Evidence, fields: dict[str, Any]) -> dict[str, Any]:
    """The image size that the positions are for, and which of the tokens before the patches have one."""
    patch, given = _pair(fields["patch_size"]), evidence.given
    stored = evidence.find("vit.embeddings.position_embeddings.weight")
    if stored is None:
        size = given.get("source_image_size") or fields.get("_image_size") or given.get("image_size")
        kind = fields.get("position_embedding") or _without_positions(evidence, fields)
        # By default the paper's 224 pixels, or the nearest below that the patch divides.
        default = shorten([max(224 // side, 1) * side for side in patch])
        return {"position_embedding": kind, "image_size": size or default}
    tokens, registers = stored[-2:][0], fields["num_register_tokens"]
    num_prefix = int(fields["use_cls_token"]) + int(fields["use_distillation_token"])
    placements = [num_prefix, 0]
    if evidence.dialect.get("registers") == "reg_token":  # timm gives a position to all tokens, or to patches only
        placements.insert(0, num_prefix + registers)
    # What is said, if anything is; else a square (None); else what is wanted: so many positions may be for it.
    said = given.get("source_image_size")
    for size in [said] if said else [fields.get("_image_size"), None, given.get("image_size")]:
        grid = tuple(length // side for length, side in zip(_pair(size), patch)) if size else None
        for placed in placements:
            patches = tokens - placed
            side = math.isqrt(max(patches, 0))
            rows, columns = grid or (side, side)
            if rows * columns != patches or patches < 1:
                continue
            if grid is None and placed < num_prefix:
                evidence.notes.append(
                    f"Positions: {tokens}, taken as {rows} x {columns} patches and none for the class token. If they"
                    " are a rectangle and the class token, say source_image_size=(height, width)."
                )
            if placed > num_prefix:
                evidence.dialect["registers_placed"] = True
            elif grid is None and fields.get("_image_size"):
                evidence.notes.append(
                    f"Positions: {rows} x {columns}, which is not the grid of config.json's {fields['_image_size']}."
                )
            stored_size = shorten([rows * patch[0], columns * patch[1]])
            return {"image_size": stored_size, "cls_token_position": placed >= num_prefix}
    if said:
        raise evidence.fail(
            f"its {tokens} positions don't fit an image_size of {said}, patches of {patch[0]} x {patch[1]} and"
            f" {num_prefix} tokens before the patches."
        )
    if not num_prefix and math.isqrt(tokens - 1) ** 2 == tokens - 1:
        raise evidence.fail(f"its {tokens} positions are for a class token too, but there is no class token in it.")
    raise evidence.fail(
        f"its {tokens} positions are those of no square grid, with {num_prefix} more for tokens before the patches or"
        " without. If the grid is a rectangle, say source_image_size=(height, width)."
    )


def _without_positions(evidence: Evidence, fields: dict[str, Any]) -> str:
    """The kind of positions of a model whose file has none."""
    wanted = evidence.given.get("position_embedding")
    if evidence.form is NPZ:
        if wanted == "none":
            return "none"
        if fields["use_cls_token"] and not evidence.dialect.get("scanned", False) and wanted != "sincos_2d":
            raise evidence.fail(
                "it has no position embeddings. Say position_embedding='sincos_2d' for the fixed ones of big_vision."
            )
        evidence.notes.append("Positions: none in the file, so the fixed sines and cosines of big_vision.")
        return "sincos_2d"
    if (evidence.config.get("model_args") or {}).get("pos_embed") in ("", "none"):
        return "none"
    raise evidence.fail(
        "it has no position embeddings. A model that needs none in its file computes them as this package doesn't:"
        " rotary ones (DINOv3, EVA, RoPE-ViT), relative ones (BEiT), or others."
    )


def usual_heads(width: int) -> int | None:
    """The number of heads that networks of a width have as a rule; None if there is no rule."""
    return _HEADS_BY_WIDTH.get(width, width // 64 if width % 64 == 0 else None)


def _num_heads(evidence: Evidence, fields: dict[str, Any]) -> int:
    width, given = fields["hidden_size"], evidence.given.get("num_attention_heads")
    q_norm = evidence.find("vit.layers.{i}.attention.q_norm.weight")
    if known := fields.get("num_attention_heads") or (width // q_norm[0] if q_norm else given):
        return known
    heads = usual_heads(width)
    if heads is None:
        raise evidence.fail(
            f"the number of heads is not in the file, and a width of {width} is no multiple of 64, the usual width of a"
            " head. Say num_attention_heads=…"
        )
    if evidence.family and evidence.family.row:
        return heads  # rows say where a name means another number
    evidence.notes.append(
        f"Heads: {heads}, as usual for a width of {width}; the file doesn't say. If it is another number, say"
        " num_attention_heads=…"
    )
    return heads


def _of_timm(evidence: Evidence, fields: dict[str, Any]) -> dict[str, Any]:
    config, family = evidence.config, evidence.family
    arguments, pretrained = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    unknown = {name: value for name, value in arguments.items() if value and name not in _TIMM_ARGUMENTS}
    if not unknown and arguments.get("norm_layer") not in (None, fields["norm_type"]):
        unknown = {"norm_layer": arguments["norm_layer"]}
    if unknown:
        raise evidence.fail(f"its config.json has model_args that this package doesn't know: {unknown}.")
    added: dict[str, Any] = {"position_embedding_interpolation": "bicubic_antialias"}
    if fields["use_gated_mlp"]:
        added["hidden_act"] = "silu"
    if family is None:
        evidence.notes.append(
            "Architecture: no config.json beside the file names it, and the file is not called as one of timm's; read"
            " as the plain Vision Transformer that its tensors look like, with exact GELU and an epsilon of 1e-6."
        )
    elif family.row is None:
        evidence.notes.append(
            f"Architecture: {family} is unknown here, and read as the plain Vision Transformer that its tensors look"
            " like. If its code computes something else, the numbers differ: compare them before you use it."
        )
    else:
        if not config:
            evidence.notes.append(f"Architecture: {family}, by the name of the file.")
        added.update(family.row.fields)
        if not family.name.startswith("eva_giant"):  # whose class in timm has other arguments
            evidence.dialect["architecture"] = family.name
    if arguments.get("num_heads"):
        added["num_attention_heads"] = arguments["num_heads"]
    if activation := arguments.get("act_layer"):
        if activation not in TIMM_ACTIVATIONS:
            known = ", ".join(TIMM_ACTIVATIONS)
            raise evidence.fail(f"its activation {activation!r} is unknown here. Known: {known}.")
        added["hidden_act"] = TIMM_ACTIVATIONS[activation]
    is_dino = evidence.shapes.get("mask_token") == (1, fields["hidden_size"]) and fields["use_mask_token"]
    if is_dino and not config and not fields["num_register_tokens"]:  # DINOv2 as its authors publish it
        added["position_embedding_interpolation"] = "bicubic_offset"
    comes_last = "fc_norm.weight" in evidence.shapes
    pooling = arguments.get("global_pool") or config.get("global_pool") or ("avg" if comes_last else None)
    if pooling == "avg" or (pooling == "token" and fields["use_cls_token"]):
        added["pooling"] = "mean" if pooling == "avg" else "cls"
    elif pooling not in (None, "", fields["pooling"]):
        raise evidence.fail(f"it pools by {pooling!r}. This package knows 'token', 'avg' and 'map'.")
    added["norm_after_pooling"] = comes_last and added.get("pooling", fields["pooling"]) == "mean"
    size = arguments.get("img_size") or (pretrained.get("input_size") or [None])[1:]
    if size:
        added["_image_size"] = size if isinstance(size, int) else list(size)
    names = pretrained.get("label_names") or config.get("label_names")
    if names and len(names) == fields["num_labels"]:
        described = pretrained.get("label_descriptions") or config.get("label_descriptions") or {}
        added["id2label"] = {index: described.get(name, name) for index, name in enumerate(names)}
    return added


def _of_transformers(evidence: Evidence, fields: dict[str, Any]) -> dict[str, Any]:
    model_type, dialect = evidence.config.get("model_type"), evidence.dialect
    if model_type is None:
        is_dino, has_registers = fields.get("layer_scale_init_value"), fields["num_register_tokens"]
        model_type = "dinov2_with_registers" if has_registers else "dinov2" if is_dino else "vit"
        model_type = "deit" if fields["use_distillation_token"] else model_type
        model_type = model_type if fields["use_cls_token"] else "ijepa"
        patches = {"patch_embeddings": "dinov3_vit", "patch_embed": "aimv2", "patch_embedding": "siglip"}
        model_type = "clip" if dialect["cls"] == "class_embedding" else patches.get(dialect["patch"], model_type)
        evidence.notes.append(
            f"There is no config.json beside it: read as model_type {model_type!r} with its defaults."
        )
    whole = CONFIG_MAPPING[model_type].from_dict({k: v for k, v in evidence.config.items() if k != "model_type"})
    theirs = getattr(whole, "vision_config", whole)
    has_config = "model_type" in evidence.config
    unknown = () if has_config else ("num_hidden_layers", "num_attention_heads")
    known = [k for k in (*SHARED_FIELDS, *_SOME_FIELDS) if hasattr(theirs, k) and k not in unknown]
    added = {OUR_NAMES.get(k, k): getattr(theirs, k) for k in known}
    added["position_embedding_interpolation"] = "bicubic"
    row = find_family({"model_type": model_type}, "").row
    added.update(row.fields)
    if has_config:
        added["_image_size"] = getattr(theirs, "image_size", None)
        is_classifier = any("ForImageClassification" in name for name in evidence.config.get("architectures") or [])
        if fields["num_labels"] or is_classifier:
            added.update(id2label=whole.id2label, label2id=whole.label2id)
    if "decoder.0.weight" in evidence.shapes:
        added["use_mask_token"] = False  # masked image modeling has one in any case
    prefix = re.escape(dialect["prefix"])
    if fields["num_labels"] or "decoder.0.weight" in evidence.shapes or model_type == "ijepa":
        added.update(row.classifier if fields["num_labels"] else {}, representation_size=None)
        unused = rf"{prefix}(pooler\.dense|head)\."
        if not added.get("use_final_norm", True):
            unused += rf"|{prefix}{dialect['norm']}\."
        reason = "transformers' models with a head do not compute it"
        evidence.left_out.update({name: reason for name in evidence.shapes if re.match(unused, name)})
    elif fields["representation_size"] and getattr(theirs, "pooler_act", "tanh") != "tanh":
        raise evidence.fail(f"its pooler's activation is {theirs.pooler_act!r}; the representation layer's is tanh.")
    if getattr(theirs, "layerscale_value", None) is not None and fields.get("layer_scale_init_value"):
        added["layer_scale_init_value"] = theirs.layerscale_value
    head = evidence.find("classifier.weight")
    if head and added.get("pooling") == "cls_mean" and head[1] == fields["hidden_size"]:
        added["pooling"] = "cls"
    if model_type.startswith("dinov2") and fields["use_gated_mlp"]:
        added["hidden_act"] = "silu"
    elif model_type.startswith(("siglip", "aimv2")):
        _of_poolings(evidence, theirs, added)
    if "id2label" in added:
        del fields["num_labels"]
    dialect["model_type"] = _TOWERS.get(model_type, model_type) if not fields.get("num_labels", 1) else model_type
    return added


def _of_poolings(evidence: Evidence, theirs: Any, added: dict[str, Any]) -> None:
    """What SigLIP's and AIMv2's encoders do without their attention pooling."""
    if getattr(theirs, "is_native", False):
        raise evidence.fail("it computes its positions for the size of each image. No model of this package does that.")
    if added.get("pooling") == "map" and evidence.find("vit.pooler.attention.probe") is None:
        added["pooling"] = "mean"
    if hasattr(theirs, "rms_norm_eps"):
        added["proj_bias"] = theirs.qkv_bias
    prefix = re.escape(evidence.dialect["prefix"])
    heads = [name for name in evidence.shapes if re.match(rf"{prefix}head\.(cls_token|[kv]_proj|output_proj)\b", name)]
    reason = "AIMv2's pooling, whose query has no projection; the mean over patches stands for the image"
    evidence.left_out.update(dict.fromkeys(heads, reason))


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def shorten(size: Sequence[int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def infer_processor(evidence: Evidence, config: ViTScratchConfig) -> dict[str, Any]:
    """The settings of the image processor that the source is served with; a guess is noted as one."""
    height, width = config.image_hw
    settings: dict[str, Any] = {"size": {"height": height, "width": width}, "num_channels": config.num_channels}
    if evidence.preprocessor:
        given = {key: evidence.preprocessor.get(key) for key in (*SHARED_SETTINGS, "crop_pct")}
        return settings | {key: value for key, value in given.items() if value is not None}
    pretrained = evidence.config.get("pretrained_cfg") or {}
    if pretrained.get("mean"):
        settings.update(image_mean=list(pretrained["mean"]), image_std=list(pretrained["std"]))
        settings["resample"] = RESAMPLE.get(pretrained.get("interpolation"), BICUBIC)
        settings["crop_pct"] = pretrained.get("crop_pct") if pretrained.get("crop_mode", "center") == "center" else None
        return settings
    # Of what is trained without labels or by Facebook, the statistics of ImageNet; of what Google trained, one half.
    is_facebook = evidence.form is TORCHVISION or config.use_distillation_token or config.num_labels == 0
    is_facebook = is_facebook or config.layer_scale_init_value is not None
    mean = std = [0.5] * config.num_channels
    if config.num_channels == 3 and is_facebook and evidence.form is not NPZ:
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    settings.update(image_mean=mean, image_std=std, resample=BILINEAR)
    if evidence.form is TIMM:
        settings.update(resample=BICUBIC, crop_pct=1.0 if config.num_register_tokens or height > 448 else 0.9)
    elif evidence.form is TORCHVISION:
        settings.update(crop_pct=0.875 if height < 384 else 1.0, resample=BILINEAR if height < 384 else BICUBIC)
    if evidence.form is not NPZ:
        evidence.notes.append(
            f"Image processor: the file says nothing of it; taken as mean {mean}, std {std}"
            + (f", crop {settings['crop_pct']}" if "crop_pct" in settings else "")
            + ", as is usual for such a model. Check it against where the file came from."
        )
    return settings
