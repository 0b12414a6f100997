# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of Vision Transformers in and out, exact: the official JAX `.npz`, timm (and DeiT, DINO, MAE, DINOv2 as
their authors publish them), transformers, torchvision, and this package's own.

    load_checkpoint(source)                    what a file, folder or Hub id holds, in this package's names
    save_checkpoint(model, path, format)       back again: a round trip gives the same bytes

`loading.py` has what the models' `from_pretrained` makes of it.

The format is found by looking at the names in the file. Every tensor of a source is read, or is one of those that its
format's table allows to be left over, or is an error that lists it.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchForMaskedImageModeling
from .architecture import Evidence, infer_config, infer_processor
from .families import find_family
from .files import CheckpointError, TensorFile, find_files, open_tensors, write_tensors
from .formats import FORMATS, NATIVE, NPZ, TIMM, TRANSFORMERS, Format, Rule, expand, find_dialect, recognise
from .layouts import fold_registers, join_biases, unstack, unwrap
from .sidecars import their_configs


@dataclass
class Checkpoint(Mapping[str, Tensor]):
    """
    A checkpoint in this package's names (those of `ViTScratchForImageClassification`, and `decoder.*`): a mapping that
    reads each tensor when it is asked for.

    Attributes:
        source: the file.
        format: name of its format, one of `FORMATS`.
        config: the model's configuration. `config.source_format` has the format's dialect, for `save_checkpoint`.
        processor: arguments of the `ViTScratchImageProcessor` that the source is served with.
        notes: what was guessed or left out, a readable line each.
    """

    source: str
    format: str
    config: ViTScratchConfig
    processor: dict[str, Any]
    file: TensorFile
    rows: dict[str, tuple[list[str], Rule]]
    notes: list[str] = field(default_factory=list)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> Tensor:
        theirs, rule = self.rows[name]
        return rule.read([self.file[their] for their in theirs], self.config)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def image_processor(self) -> ViTScratchImageProcessor:
        """The image processor that the source is served with."""
        return ViTScratchImageProcessor(**self.processor)

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
        given: fields that the file may leave open: `num_attention_heads`, `position_embedding`, `source_image_size`
            (for positions on a rectangle).
        hub: arguments for the Hub, e.g. `revision`, `token`, `subfolder`.

    Raises:
        CheckpointError: if the source can't be read, is of no known format, or lacks or has keys that it must not; the
            message lists them.
    """
    path, beside = find_files(source, **hub)
    their_config = beside["config.json"]
    family = find_family(their_config, path)
    if family is not None and family.row is not None and family.row.refused:
        raise CheckpointError(f"{path}: {family} {family.row.refused}. No model of this package does that.")
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
    file = unstack(file) if is_scanned else join_biases(file) if form is TIMM else file
    shapes, dialect = file.shapes, _dialect(form, file)
    if form is NPZ:
        dialect["scanned"] = is_scanned
    processor = beside["preprocessor_config.json"]
    evidence = Evidence(path, family, form, dialect, shapes, their_config, processor, dict(given or {}), notes)
    _refuse_unsupported(evidence)
    if form is TIMM and any(name.startswith("decoder_") for name in shapes):
        evidence.left_out["mask_token"] = "MAE's decoder, which only pre-training uses"
    config = infer_config(evidence)
    if dialect.get("registers_placed"):
        before = int(config.use_cls_token) + int(config.use_distillation_token)
        file = fold_registers(file, dialect["registers"], "pos_embed", before)
        evidence.shapes = file.shapes
    config.source_format = {"name": form.name, **dialect}
    rows = _match(evidence, config)
    processor = infer_processor(evidence, their_config, config)
    return Checkpoint(path, form.name, config, processor, file, rows, evidence.notes)


def _dialect(form: Format, names: TensorFile) -> dict[str, Any]:
    dialect: dict[str, Any] = find_dialect(form, names)
    if form is NPZ:
        prefixes = [name.removesuffix("embedding/kernel") for name in names if name.endswith("embedding/kernel")]
        prefixes += [name.split("Transformer/")[0] for name in names if "Transformer/" in name]
        dialect["prefix"] = min(prefixes, key=len, default="")
        ranks = [
            len(shape) for name, shape in names.shapes.items() if re.search(r"(gn_root|gn\d|gn_proj)/scale$", name)
        ]
        dialect["norm_axes"] = max(ranks, default=1)
    elif form is TRANSFORMERS:
        match = next(
            (m for name in names if (m := re.match(r"(?:(\w+)\.)?(embeddings|encoder|layers|layernorm)\.", name))), None
        )
        dialect["prefix"] = f"{match[1]}." if match and match[1] else ""
    return dialect


def _refuse_unsupported(evidence: Evidence) -> None:
    for pattern, reason in evidence.form.unsupported.items():
        names = [name for name in evidence.shapes if re.search(pattern, name)]
        if names:
            raise evidence.fail(f"it {reason} ({', '.join(names[:3])}). No model of this package does that.")


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
    missing += [
        f"(whatever gives {name})" for name in sorted(needed - set(rows)) if not _is_in_table(evidence.form, name)
    ]
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
    problems = [
        f"{what} ({len(names)}): {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
        if names
    ]
    if problems:
        raise evidence.fail(f"looks like a {evidence.form.title}, but keys are {'; '.join(problems)}.")
    for reason in dict.fromkeys(evidence.left_out.values()):
        names = [name for name, why in evidence.left_out.items() if why == reason]
        evidence.notes.append(f"Left out: {', '.join(names[:4])}{', …' if len(names) > 4 else ''} ({reason}).")
    return rows


def _is_in_table(form: Format, name: str) -> bool:
    plain = re.sub(r"layers\.\d+\.", "layers.{i}.", re.sub(r"stages\.\d+\.\d+\.", "stages.{s}.{u}.", name))
    return any(ours == plain for ours, _, _ in form.rows)


def _native(path: str, file: TensorFile, their_config: dict[str, Any], notes: list[str]) -> Checkpoint:
    if their_config.get("model_type") != ViTScratchConfig.model_type:
        raise CheckpointError(
            f"{path}: tensors of this package, but no config.json of it lies beside them. Load the folder that"
            " save_pretrained wrote."
        )
    config = ViTScratchConfig.from_dict(their_config)
    same = Rule(lambda tensors, _: tensors[0], lambda tensor, _: [tensor])
    prefix = "" if any(name.startswith("vit.") for name in file) else "vit."
    rows = {f"{prefix}{name}": ([name], same) for name in file}
    expected, needed = _expected_shapes(config)
    heads = ("classifier.", "distillation_classifier.", "vit.pooler.")
    missing = sorted(name for name in needed - set(rows) if not name.startswith(heads))
    unexpected = sorted(set(rows) - set(expected))
    if missing or unexpected:
        raise CheckpointError(f"{path}: keys are missing: {missing[:20]}; unexpected: {unexpected[:20]}.")
    return Checkpoint(path, NATIVE.name, config, {}, file, rows, notes)


# Writing -------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: nn.Module | Checkpoint, path: str | os.PathLike, format: str | None = None, exact: bool = True
) -> None:
    """
    Writes a model in another format, so that a model that came from it is written as it came: names, shapes and bytes.

    Args:
        model: a model of this package, or what `load_checkpoint` gives.
        path: a file whose suffix says `.npz`, `.safetensors`, `.bin` or `.pth`, or a folder, which gets the format's
            usual file and its config.json.
        format: one of `FORMATS`; by default the one that the model came from.
        exact: refuse a format whose own code would compute other numbers, e.g. another GELU.

    Raises:
        ValueError: if the format can't hold the model; the message says what it has no place for.
    """
    config = model.config
    origin = dict(getattr(config, "source_format", None) or {})
    format = format or origin.get("name")
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown. Choose one of: {', '.join(FORMATS)}.")
    form, state = FORMATS[format], _full_state(model)
    if form is NATIVE:
        raise ValueError("The package's own format is written by the model's save_pretrained.")
    if config.calibrated and config.temperature != 1.0:  # no other format has a place for it but the classifier
        heads = ("classifier.", "distillation_classifier.")
        state = {name: state[name] / config.temperature if name.startswith(heads) else state[name] for name in state}
    dialect = _writing_dialect(form, origin, config, state)
    state = _with_places(state, form, config, dialect)
    tensors, leftover = {}, set(state)
    for ours, theirs, rule in expand(form, config, dialect):
        if ours in state:
            leftover.discard(ours)
            tensors.update(zip(theirs, rule.write(state[ours], config)))
    if form is NPZ and dialect["norm_axes"] == 4:
        for name in tensors:
            if re.search(r"(gn_root|gn\d|gn_proj)/(scale|bias)$", name):
                tensors[name] = tensors[name].reshape(1, 1, 1, -1)
    _refuse_loss(form, config, leftover, exact)
    if dialect.get("scanned"):
        tensors = _stacked(tensors, config.num_hidden_layers)
    path = Path(path)
    if path.suffix:
        write_tensors(path, tensors)
        return
    write_tensors(path / ("model.npz" if form is NPZ else "model.safetensors"), tensors)
    for name, content in their_configs(form, config, dialect, getattr(model, "image_processor", None), state).items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _full_state(model: nn.Module | Checkpoint) -> Mapping[str, Tensor]:
    if isinstance(model, Checkpoint):
        return model
    state = model.state_dict()
    return state if any(name.startswith("vit.") for name in state) else {f"vit.{name}": t for name, t in state.items()}


def _with_places(
    state: Mapping[str, Tensor], form: Format, config: ViTScratchConfig, dialect: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """Zeros as the positions of tokens that have none here, and have one in the format."""
    name = "vit.embeddings.position_embeddings.weight"
    if config.position_embedding != "learned_1d" or form is NPZ:
        return state
    tokens = int(config.use_cls_token) + int(config.use_distillation_token)
    placed = tokens if config.cls_token_position else 0
    if form is TIMM and not config.use_distillation_token:
        wanted = config.num_prefix_tokens if dialect.get("registers_placed") else placed
    else:
        wanted = tokens
    weight = state[name]
    zeros = weight.new_zeros(1, wanted - placed, weight.shape[2])
    return (
        {**state, name: torch.cat([weight[:, :placed], zeros, weight[:, placed:]], dim=1)} if wanted > placed else state
    )


def _writing_dialect(
    form: Format, origin: dict[str, Any], config: ViTScratchConfig, state: Mapping[str, Tensor]
) -> dict:
    dialect: dict[str, Any] = {name: values[0] for name, values in form.dialects.items()}
    is_dino = config.layer_scale_init_value is not None
    if form is NPZ:
        dialect.update(prefix="", scanned=False, norm_axes=1)
        if not config.cls_token_position:
            dialect["positions"] = "pos_embedding"
    elif form is TIMM:
        # timm gives a position to every token before the patches, or to none of them.
        dialect["registers_placed"] = (
            config.num_register_tokens > 0 and config.use_cls_token and config.cls_token_position
        )
    elif form is TRANSFORMERS:
        model_type = "dinov2_with_registers" if config.num_register_tokens else "dinov2" if is_dino else "vit"
        model_type = "deit" if config.use_distillation_token else model_type
        dialect.update(prefix="", model_type=model_type)
        if is_dino:
            dialect.update(norm1="norm1", norm2="norm2", fc1="mlp.fc1", fc2="mlp.fc2")
        if config.use_distillation_head:
            dialect["classifier"] = "cls_classifier"
    if origin.get("name") == form.name:
        dialect.update({key: value for key, value in origin.items() if key != "name"})
    if form is TIMM and dialect["registers"] != "reg_token":  # Facebook's code has positions for the class token alone
        dialect["registers_placed"] = False
    if (
        form is TRANSFORMERS
        and not dialect["prefix"]
        and any(name.startswith(("classifier", "decoder")) for name in state)
    ):
        dialect["prefix"] = {"vit_msn": "vit.", "vit_mae": "vit."}.get(
            dialect["model_type"], f"{dialect['model_type']}."
        )
    return dialect


def _refuse_loss(form: Format, config: ViTScratchConfig, leftover: set[str], exact: bool) -> None:
    if leftover:
        names = sorted(leftover)
        raise ValueError(
            f"The {form.name} format has no place for {', '.join(names[:8])}{', …' if len(names) > 8 else ''}: the"
            " model can't be written in it."
        )
    origin = getattr(config, "source_format", None) or {}
    origin = origin if origin.get("name") == form.name else {}
    if form is TIMM and config.representation_size and not origin:
        raise ValueError("timm has no representation layer (pre_logits): the model can't be written in its format.")
    fixed = {**form.fixed, "pooling": ("mean",)} if origin.get("model_type") == "ijepa" else form.fixed
    for name, values in fixed.items():
        value = getattr(config, name)
        if value not in values and exact:
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
