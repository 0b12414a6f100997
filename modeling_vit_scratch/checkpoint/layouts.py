# SPDX-License-Identifier: Apache-2.0
"""
Files whose tensors lie otherwise than the tables of `formats.py` have them, shown as if they did. No tensor is read
before it is asked for.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from ..configuration_vit_scratch import MOST
from .files import CheckpointError, TensorFile


# The patch projection of every format but the official one, with whatever is before it.
_PROJECTION = re.compile(
    r"((?:.*\.)?)(?:patch_embed\.proj|embeddings\.patch_embed(?:dings\.projection|dings?)?|conv_proj)\.weight"
)
# What transformers' classifiers call their encoder; their heads stand beside it.
_ENCODER = re.compile(r"(?:^|(?<=\.))(?:vit|deit|dinov2|dinov2_with_registers|ijepa|vision_model)\.$")
_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.", "decoder.")
_PRETRAINING_HEAD = re.compile(r"(^|[._])head\.(mlp|last_layer)\.")
# Where training scripts keep a network, best first: an average or a teacher is what is published.
_PREFERRED = (
    "model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema", "teacher", "target_encoder", "base_encoder",
    "model", "state_dict", "module", "params",
)  # fmt: skip


def unwrap(file: TensorFile) -> tuple[TensorFile, list[str]]:
    """
    The one network of a training checkpoint, without the names that wrappers put before its tensors; and a line that
    names what lies beside it. Raises CheckpointError if no usual name says which of several networks is meant.
    """
    found = dict.fromkeys(match[1] for name in file if (match := _PROJECTION.fullmatch(name)))
    prefixes = sorted(found, key=_preference)
    if not prefixes:
        return file, []
    if len(prefixes) > 1 and _preference(prefixes[0]) == _preference(prefixes[1]):
        raise CheckpointError(
            f"{file.path}: there are {len(prefixes)} networks in it, {', '.join(map(repr, prefixes[:4]))}. Save the"
            " state_dict() of the one that you mean alone."
        )
    prefix = prefixes[0]
    parent = _ENCODER.sub("", prefix)
    encoder = prefix.removeprefix(parent)
    beside = [name[len(parent) :] for name in file if name.startswith(parent) and not name.startswith(prefix)]
    if not beside or any(name.startswith(_HEADS) for name in beside):
        prefix = parent
    names = {_plain_name(name[len(prefix) :], encoder): name for name in file if name.startswith(prefix)}
    outside = [name for name in file if not name.startswith(prefix)]
    notes = []
    if outside:
        groups = Counter(_first_difference(name, prefix) for name in outside)
        listed = ", ".join(f"{group} ({count} tensors)" if count > 1 else group for group, count in groups.items())
        has_head = any(map(_PRETRAINING_HEAD.search, outside))
        reason = " with its projection head, which only pre-training uses" if has_head else ""
        notes = [f"Left out, beside {prefix.rstrip('.')!r}{reason}: {listed}."]
    shapes = {new: file.shapes[old] for new, old in names.items()}
    return TensorFile(file.path, shapes, lambda name: file[names[name]]), notes


def _preference(prefix: str) -> int:
    """The lower, the better: by the best name in the prefix."""
    parts = prefix.split(".")
    known = [_PREFERRED.index(part) for part in parts if part in _PREFERRED]
    return min(known, default=len(_PREFERRED)) + len(_PREFERRED) * ("student" in parts)


def _plain_name(name: str, encoder: str) -> str:
    """DINOv2's training keeps layers in chunks, blocks.CHUNK.LAYER; transformers saves ViTMSN's layers without vit."""
    if encoder and name.startswith("encoder.layer."):
        return encoder + name
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def _first_difference(name: str, prefix: str) -> str:
    """The name as far as it shows that it lies outside of the prefix."""
    parts = name.split(".")
    pairs = enumerate(zip(parts, prefix.split(".")))
    same = next((index for index, (part, inside) in pairs if part != inside), len(parts))
    return ".".join(parts[: same + 1])


def unstack(file: TensorFile) -> TensorFile:
    """big_vision's scanned layers, (layers, …) in one array, under the names that they have apart."""
    stacks = {name: name.replace("/encoderblock/", "/encoderblock_{}/") for name in file if "/encoderblock/" in name}
    shapes = {name: shape for name, shape in file.shapes.items() if name not in stacks}
    where: dict[str, tuple[str, int]] = {}
    for name, template in stacks.items():
        layers = file.shapes[name][0] if file.shapes[name] else 0
        if layers > MOST["num_hidden_layers"]:
            raise CheckpointError(f"{file.path}: {name} is of {layers:,} layers; no network has so many.")
        for layer in range(layers):
            where[template.format(layer)] = (name, layer)
            shapes[template.format(layer)] = file.shapes[name][1:]
    read_stack = lru_cache(3)(file.__getitem__)  # query, key and value are read in turn

    def read(name: str) -> Tensor:
        if name not in where:
            return file[name]
        stack, layer = where[name]
        return read_stack(stack)[layer].clone()

    return TensorFile(file.path, shapes, read)


# What some networks keep in several tensors: the end of the table's name, and of theirs. EVA's keys have no bias, which
# without rotary positions is a bias of zeros.
_GATED = ("mlp.gate_proj", "mlp.up_proj"), ("ffn.gate_proj", "ffn.up_proj"), ("mlp.fc1_g", "mlp.fc1_x")
_JOINS = [
    (f"mlp.fc1.{kind}", tuple(f"{part}.{kind}" for part in parts)) for parts in _GATED for kind in ("weight", "bias")
] + [("attn.qkv.bias", ("attn.q_bias", "attn.v_bias"))]


def join(file: TensorFile, has_key_bias: bool) -> tuple[TensorFile, dict[str, tuple[str, ...]]]:
    """The tensors of `_JOINS` as one each, and the joins that were found, for `split`."""
    shapes, parts, found = dict(file.shapes), {}, {}
    for end, ends in _JOINS:
        for stem in [name.removesuffix(ends[0]) for name in file if name.endswith(ends[0])]:
            names = tuple(stem + each for each in ends)
            if any(file.shapes.get(name) != file.shapes[names[0]] for name in names):
                continue
            is_bias = end == "attn.qkv.bias" and has_key_bias
            rows, *rest = file.shapes[names[0]] or (0,)
            parts[stem + end], shapes[stem + end] = (names, is_bias), ((2 + is_bias) * rows, *rest)
            found |= {} if is_bias else {end: ends}
            for name in names:
                del shapes[name]

    def read(name: str) -> Tensor:
        if name not in parts:
            return file[name]
        names, is_bias = parts[name]
        first, second = (file[part] for part in names)
        return torch.cat([first, torch.zeros_like(first), second] if is_bias else [first, second])

    return (TensorFile(file.path, shapes, read) if parts else file), found


def split(tensors: dict[str, Tensor], joins: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """What `join` undoes."""
    apart = {}
    for name, tensor in tensors.items():
        end = next((end for end in joins if name.endswith(end)), None)
        names = [name] if end is None else [name.removesuffix(end) + part for part in joins[end]]
        apart.update(zip(names, tensor.chunk(len(names))))
    return apart


def fold_registers(file: TensorFile, registers: str, positions: str, before: int) -> TensorFile:
    """
    The positions of `registers` (1, R, D) added to the registers themselves, which computes the same. `positions` are
    (1, before + R + N, D): the tokens before the registers keep theirs.
    """
    count, shapes = file.shapes[registers][1], dict(file.shapes)
    shapes[positions] = (1, shapes[positions][1] - count, shapes[positions][2])

    def read(name: str) -> Tensor:
        if name == registers:
            return file[registers] + file[positions][:, before : before + count]
        if name == positions:
            stored = file[positions]
            return torch.cat([stored[:, :before], stored[:, before + count :]], dim=1)
        return file[name]

    return TensorFile(file.path, shapes, read)
