# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of Vision Transformers in and out, exact: the official JAX `.npz`, timm (and DeiT, DINO, MAE, DINOv2 as
their authors publish them), transformers, torchvision, and this package's own.

    load_checkpoint(source)                    what a file, folder or Hub id holds, in this package's names
    save_checkpoint(model, path, format)       back again: a round trip gives the same bytes

The names in a file show its format. Every tensor is read, or its format's table allows to leave it out, or an error
lists it.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import listed
from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchForMaskedImageModeling
from .architecture import Evidence, infer_config, infer_processor
from .families import Row, find_family
from .files import CheckpointError, TensorFile, find_files, open_tensors, write_tensors
from .formats import FORMATS, NATIVE, NPZ, SAME, TIMM, TRANSFORMERS, Format, Rule, expand, find_dialect, recognise
from .layouts import fold_registers, join, split, unstack, unwrap
from .their_files import their_configs


@dataclass
class Checkpoint(Mapping[str, Tensor]):
    """
    A checkpoint in this package's names (those of `ViTScratchForImageClassification`, and `decoder.*`): a mapping that
    reads each tensor when it is asked for.

    Attributes:
        format: one of `FORMATS`.
        config: the model's configuration. `config.source_format` has the format's dialect, for `save_checkpoint`.
        processor: arguments of its `ViTScratchImageProcessor`.
        notes: what was guessed or left out, a line each.
    """

    source: str
    format: str
    config: ViTScratchConfig
    processor: dict[str, Any]
    file: TensorFile
    rows: dict[str, tuple[list[str], Rule]]
    notes: list[str]

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> Tensor:
        theirs, rule = self.rows[name]
        return rule.read([self.file[their] for their in theirs], self.config)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self) -> str:
        """One line: format, size, patches, image size, labels."""
        config = self.config
        patch, image = ("x".join(map(str, pair)) for pair in (config.patch_hw, config.image_hw))
        stem = "" if config.stem_layers is None else f", ResNet stem {config.stem_layers}"
        return (
            f"{self.source}: {FORMATS[self.format].title}; width {config.hidden_size},"
            f" {config.num_hidden_layers} layers, {config.num_attention_heads} heads, patches {patch}{stem},"
            f" images {image}, {config.num_labels} labels, {config.hidden_act}, epsilon {config.layer_norm_eps:g}"
        )


def load_checkpoint(source: str | os.PathLike, given: Mapping[str, Any] | None = None, **hub: Any) -> Checkpoint:
    """
    Finds out what a checkpoint is, and makes sure that it is whole; reads no tensor yet.

    Args:
        source: a file (`.npz`, safetensors, PyTorch's; the suffix doesn't matter), a folder with one, or a Hub id.
        given: fields that the file may leave open: `num_attention_heads`, `position_embedding`, `image_size`,
            `source_image_size` (for positions on a rectangle); others are ignored.
        hub: arguments for the Hub, e.g. `revision`, `token`, `subfolder`.

    Raises:
        CheckpointError: if the source can't be read or is of no known format, or for missing and unexpected keys.
    """
    path, their_config, preprocessor = find_files(source, **hub)
    family = find_family(their_config, path)
    row = (family and family.row) or Row("")
    if row.refused:
        raise CheckpointError(f"{path}: {family} {row.refused}. No model of this package does that.")
    file, notes = unwrap(open_tensors(path))
    form = recognise(file)
    if form is None:
        raise CheckpointError(
            f"{path}{f' ({family})' if family else ''}: no Vision Transformer that this package knows:"
            f" {', '.join(list(file)[:5]) or 'it is empty'}, … Known formats: {', '.join(FORMATS)}."
        )
    if form is NATIVE:
        return _native(path, file, their_config, notes)
    is_scanned = form is NPZ and any("Transformer/encoderblock/" in name for name in file)
    joins = {}
    if is_scanned:
        file = unstack(file)
    elif form in (TIMM, TRANSFORMERS):
        file, joins = join(file, row.fields.get("key_bias", True))
    shapes, dialect = file.shapes, find_dialect(form, file.shapes)
    if joins:
        dialect["joins"] = joins
    if form is NPZ:
        dialect["scanned"] = is_scanned
    evidence = Evidence(path, family, form, dialect, shapes, their_config, preprocessor, dict(given or {}), notes)
    for pattern, reason in form.unsupported.items():
        if names := [name for name in shapes if re.search(pattern, name)]:
            raise evidence.fail(f"it {reason} ({', '.join(names[:3])}). No model of this package does that.")
    if form is TIMM and any(name.startswith("decoder_") for name in shapes):
        evidence.left_out["mask_token"] = "MAE's decoder, which only pre-training uses"
    config = infer_config(evidence)
    if dialect.get("registers_placed"):
        before = int(config.use_cls_token) + int(config.use_distillation_token)
        file = fold_registers(file, dialect["registers"], "pos_embed", before)
        evidence.shapes = file.shapes
    config.source_format = {"name": form.name, **dialect}
    rows = _match(evidence, config)
    processor = infer_processor(evidence, config)
    return Checkpoint(path, form.name, config, processor, file, rows, evidence.notes)


def _expected_shapes(config: ViTScratchConfig) -> tuple[dict[str, torch.Size], set[str]]:
    """The shapes of every parameter that a model of this configuration can have, and the names that it must have."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ViTScratchForImageClassification(config).state_dict().items()}
        needed = set(shapes)
        if config.stem_layers is None:
            more = ViTScratchForMaskedImageModeling(config).state_dict()
            shapes.update({name: tensor.shape for name, tensor in more.items() if name not in shapes})
    return shapes, needed


def _match(evidence: Evidence, config: ViTScratchConfig) -> dict[str, tuple[list[str], Rule]]:
    """The rows of the table that the file has. The error lists all keys that are missing, unexpected or misshapen."""
    expected, needed = _expected_shapes(config)
    rows, missing, used = {}, [], set()
    for ours, theirs, rule in expand(evidence.form, config, evidence.dialect):
        if ours not in expected or any(name in evidence.left_out for name in theirs):
            continue
        present = [name for name in theirs if name in evidence.shapes]
        if len(present) == len(theirs):
            rows[ours] = (theirs, rule)
            used.update(theirs)
        elif present or ours in needed:
            missing += [name for name in theirs if name not in evidence.shapes]
    in_table = {ours for ours, _, _ in expand(evidence.form, config, evidence.dialect)}
    missing += [f"(whatever gives {name})" for name in sorted(needed - set(rows) - in_table)]
    unexpected = []
    prefix = evidence.dialect.get("prefix")
    for name in (name for name in evidence.shapes if name not in used):
        is_inside = prefix and name.startswith(prefix)
        patterns = () if is_inside and evidence.form is NPZ else evidence.form.leftovers.items()
        reason = evidence.left_out.get(name) or next((why for at, why in patterns if re.search(at, name)), None)
        if reason:
            evidence.left_out[name] = reason
        else:
            unexpected.append(name)
    wrong = []
    for ours, (theirs, rule) in rows.items():
        with torch.device("meta"):
            try:
                shape = rule.read([torch.empty(evidence.shapes[name]) for name in theirs], config).shape
            except (RuntimeError, IndexError, ValueError):
                shape = None
        if shape != expected[ours]:
            their_shapes = " and ".join(f"{name} {tuple(evidence.shapes[name])}" for name in theirs)
            wrong.append(f"{their_shapes} (wanted for {ours} {tuple(expected[ours])})")
    problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    problems = [f"{what} ({len(names)}): {listed(names, 20)}" for what, names in problems.items() if names]
    if problems:
        raise evidence.fail(f"looks like a {evidence.form.title}, but keys are {'; '.join(problems)}.")
    for reason in dict.fromkeys(evidence.left_out.values()):
        names = [name for name, why in evidence.left_out.items() if why == reason]
        evidence.notes.append(f"Left out: {listed(names, 4)} ({reason}).")
    return rows


def _native(path: str, file: TensorFile, their_config: dict[str, Any], notes: list[str]) -> Checkpoint:
    if their_config.get("model_type") != ViTScratchConfig.model_type:
        raise CheckpointError(
            f"{path}: tensors of this package, but no config.json of it lies beside them. Load the folder that"
            " save_pretrained wrote."
        )
    config = ViTScratchConfig.from_dict(their_config)
    prefix = "" if any(name.startswith("vit.") for name in file) else "vit."
    rows = {f"{prefix}{name}": ([name], SAME) for name in file}
    expected, needed = _expected_shapes(config)
    heads = ("classifier.", "distillation_classifier.", "vit.pooler.")
    missing = sorted(name for name in needed - set(rows) if not name.startswith(heads))
    unexpected = sorted(set(rows) - set(expected))
    if missing or unexpected:
        raise CheckpointError(f"{path}: keys are missing: {missing[:20]}; unexpected: {unexpected[:20]}.")
    return Checkpoint(path, NATIVE.name, config, {}, file, rows, notes)


def save_checkpoint(
    model: nn.Module | Checkpoint, path: str | os.PathLike, format: str | None = None, exact: bool = True
) -> None:
    """
    Writes a model in another format; one that came from it is written as it came: names, shapes and bytes.

    Args:
        path: a file, `.npz`, `.safetensors`, `.bin` or `.pth`; or a folder for the format's usual file and config.json.
        format: one of `FORMATS`; by default the one that the model came from.
        exact: refuse a format whose own code would compute other numbers, e.g. another GELU.

    Raises:
        ValueError: if the format can't hold the model; the message says what it has no place for.
    """
    config = model.config
    origin = getattr(config, "source_format", None) or {}
    format = format or origin.get("name")
    origin = origin if origin.get("name") == format else {}
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown. Choose one of: {', '.join(FORMATS)}.")
    form, state = FORMATS[format], model if isinstance(model, Checkpoint) else model.state_dict()
    if not any(name.startswith("vit.") for name in state):
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
    if form is NATIVE:
        raise ValueError("The package's own format is written by the model's save_pretrained.")
    if config.calibrated and config.temperature != 1.0:  # no other format has a place for it but the classifier
        heads = ("classifier.", "distillation_classifier.")
        state = {name: state[name] / config.temperature if name.startswith(heads) else state[name] for name in state}
    dialect = _writing_dialect(form, origin, config, state)
    if exact:
        _refuse_other_numbers(form, dialect, config, "classifier.weight" in state)
    state = _with_places(state, form, config, dialect)
    tensors, leftover = {}, set(state)
    for ours, theirs, rule in expand(form, config, dialect):
        if ours in state:
            leftover.discard(ours)
            tensors.update(zip(theirs, rule.write(state[ours], config)))
    if leftover:
        names = listed(sorted(leftover), 8)
        raise ValueError(f"The {form.name} format has no place for {names}: the model can't be written in it.")
    if form is TIMM and config.representation_size and not origin:
        raise ValueError("timm has no representation layer (pre_logits): the model can't be written in its format.")
    tensors = split(tensors, dialect.get("joins", {}))
    if dialect.get("scanned"):
        tensors = _stacked(tensors, config.num_hidden_layers)
    path = Path(path)
    if path.suffix:
        return write_tensors(path, tensors)
    write_tensors(path / ("model.npz" if form is NPZ else "model.safetensors"), tensors)
    for name, content in their_configs(form, config, dialect, getattr(model, "image_processor", None), state).items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _with_places(
    state: Mapping[str, Tensor], form: Format, config: ViTScratchConfig, dialect: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """Zeros as the positions of tokens that have none here, and have one in the format."""
    name = "vit.embeddings.position_embeddings.weight"
    if config.position_embedding != "learned_1d" or form is NPZ:
        return state
    wanted = int(config.use_cls_token) + int(config.use_distillation_token)
    placed = wanted if config.cls_token_position else 0
    if form is TIMM and not config.use_distillation_token:
        wanted = config.num_prefix_tokens if dialect.get("registers_placed") else placed
    if wanted <= placed:
        return state
    weight = state[name]
    zeros = weight.new_zeros(1, wanted - placed, weight.shape[2])
    return {**state, name: torch.cat([weight[:, :placed], zeros, weight[:, placed:]], dim=1)}


def _writing_dialect(
    form: Format, origin: Mapping[str, Any], config: ViTScratchConfig, state: Mapping[str, Tensor]
) -> dict:
    dialect: dict[str, Any] = {name: values[0] for name, values in form.dialects.items()}
    is_dino = config.layer_scale_init_value is not None
    if form is NPZ:
        dialect.update(prefix="", scanned=False, norm_axes=1)
        if not config.cls_token_position:
            dialect["positions"] = "pos_embedding"
    elif form is TIMM:
        # timm gives a position to every token before the patches, or to none of them.
        has_positions = config.use_cls_token and config.cls_token_position
        dialect["registers_placed"] = config.num_register_tokens > 0 and has_positions
    elif form is TRANSFORMERS:
        model_type = "dinov2_with_registers" if config.num_register_tokens else "dinov2" if is_dino else "vit"
        model_type = "deit" if config.use_distillation_token else model_type
        dialect.update(prefix="", model_type=model_type)
        if is_dino:
            parts = ("weights_in", "weights_out") if config.use_gated_mlp else ("fc1", "fc2")
            dialect.update(norm1="norm1", norm2="norm2", fc1=f"mlp.{parts[0]}", fc2=f"mlp.{parts[1]}")
        if config.use_distillation_head:
            dialect["classifier"] = "cls_classifier"
    dialect.update({key: value for key, value in origin.items() if key != "name"})
    if form is TIMM and dialect["registers"] != "reg_token":  # Facebook's code has positions for the class token alone
        dialect["registers_placed"] = False
    has_head = any(name.startswith(("classifier", "decoder")) for name in state)
    if form is TRANSFORMERS and not dialect["prefix"] and has_head:
        model_type = dialect["model_type"].removesuffix("_vision_model")
        is_tower = model_type != dialect["model_type"]
        prefix = "vision_model." if is_tower else "vit." if model_type in ("vit_msn", "vit_mae") else f"{model_type}."
        dialect.update(model_type=model_type, prefix=prefix)
    return dialect


# Fields that the config.json of a model type of transformers has.
_SAID_BY_CONFIG = {
    "dinov2": ("use_gated_mlp",), "dinov2_with_registers": ("use_gated_mlp",),
    "dinov3_vit": ("key_bias", "use_gated_mlp", "mlp_bias", "proj_bias"),
    "aimv2_vision_model": ("mlp_bias", "proj_bias"),
    "siglip_vision_model": ("pooling",), "siglip2_vision_model": ("pooling",),
}  # fmt: skip


def _refuse_other_numbers(
    form: Format, dialect: Mapping[str, Any], config: ViTScratchConfig, has_classifier: bool
) -> None:
    """What a format's code computes with, where neither tensors nor the files beside them say it."""
    named = {"model_type": dialect["model_type"]} if form is TRANSFORMERS else {}
    named = {"architecture": dialect["architecture"]} if dialect.get("architecture") else named
    family = find_family(named, "")
    row = (family and family.row) or Row("")
    said = {**row.fields, **(row.classifier if has_classifier else {})}
    free = _SAID_BY_CONFIG.get(dialect.get("model_type"), ())
    if form is TIMM:  # model_args say it
        said = {name: value for name, value in said.items() if name not in ("hidden_act", "pooling")}
    for name, values in form.fixed.items():
        values, value = (said[name],) if name in said else values, getattr(config, name)
        if value not in values and name not in free:
            raise ValueError(
                f"The {form.name} format's own code computes with {name}={values[0]!r}, the model with {value!r}: the"
                " numbers would differ. exact=False writes it all the same."
            )


def _stacked(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    stacked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "/encoderblock_0/" in name:
            parts = [tensors[name.replace("/encoderblock_0/", f"/encoderblock_{layer}/")] for layer in range(layers)]
            stacked[name.replace("/encoderblock_0/", "/encoderblock/")] = torch.stack(parts)
        elif "/encoderblock_" not in name:
            stacked[name] = tensor
    return stacked
