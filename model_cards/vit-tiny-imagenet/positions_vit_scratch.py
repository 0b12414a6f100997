# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""
The kinds of positions: what is added to tokens (E_pos of equation 1) and what attention adds to its scores, for the
grid of patches that was trained and, resampled, for any other.

Shapes are those of `encoder_vit_scratch.py`. "The paper" is Dosovitskiy et al. (arXiv:2010.11929v2).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vit_scratch import ViTScratchConfig


def resample_positions(positions: Tensor, rows: int, columns: int, interpolation: str) -> Tensor:
    """
    Resamples a grid of position embeddings (3.2 of the paper), (1, rows', columns', D) -> (1, rows, columns, D).

    `interpolation`: `"bilinear"` with corners aligned, which is the `scipy.ndimage.zoom(order=1)` of the paper's code;
    `"bicubic"`, as transformers; `"bicubic_antialias"`, as timm; `"bicubic_align_corners"`, as torchvision;
    `"bicubic_offset"`, as the authors of DINO and DINOv2, who scale as if to 0.1 patches more;
    `"bilinear_antialias"`, as NaFlex.
    """
    values = (positions if positions.dtype == torch.float64 else positions.float()).permute(0, 3, 1, 2)
    if interpolation == "bicubic_offset":
        scales = [(new + 0.1) / old for new, old in zip((rows, columns), values.shape[2:])]
        resampled = torch.ops.aten.upsample_bicubic2d(values, (rows, columns), False, *scales)
    else:
        align_corners = interpolation in ("bilinear", "bicubic_align_corners")
        options = {"mode": interpolation.split("_")[0], "antialias": interpolation.endswith("antialias")}
        resampled = F.interpolate(values, size=(rows, columns), align_corners=align_corners, **options)
    return resampled.permute(0, 2, 3, 1).to(positions.dtype)


def grid_places(stored: tuple[int, int], grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the patches of a grid lie on the stored one, corners aligned: rows (rows,), columns (columns,)."""
    y, x = (torch.arange(size, device=device) for size in grid)
    return y * (stored[0] - 1) / y[-1].clamp(min=1), x * (stored[1] - 1) / x[-1].clamp(min=1)


def sincos_positions(y: Tensor, x: Tensor, width: int) -> Tensor:
    """The fixed positions of MoCo v3: sines and cosines of column x and row y, (rows,), (columns,) -> (1, N, width)."""
    omega = 10_000 ** -(torch.arange(width // 4, device=y.device) / max(width // 4 - 1, 1))
    y_angle = torch.outer(y, omega)[:, None].expand(-1, x.shape[0], -1)  # (rows, columns, width / 4)
    x_angle = torch.outer(x, omega).expand(y.shape[0], -1, -1)
    return torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=-1).flatten(0, 1)[None]


class ViTScratchPositionEmbeddings(nn.Module):
    """E_pos of equation 1, in the kinds of the paper's D.4. Stored for the grid of `config.image_size`."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.kind, self.interpolation = config.position_embedding, config.position_embedding_interpolation
        self.width, self.grid = config.hidden_size, config.grid_hw
        # Of the tokens before the patches, class and distillation token may have a position; registers never do.
        num_classifying = int(config.use_cls_token) + int(config.use_distillation_token)
        self.num_placed = num_classifying if self.kind == "learned_1d" and config.cls_token_position else 0
        self.num_unplaced = config.num_prefix_tokens - self.num_placed
        if self.kind == "learned_1d":
            self.weight = nn.Parameter(torch.empty(1, self.num_placed + math.prod(self.grid), self.width))
        elif self.kind == "learned_2d":
            self.row_weight = nn.Parameter(torch.empty(1, self.grid[0], 1, self.width // 2))
            self.column_weight = nn.Parameter(torch.empty(1, 1, self.grid[1], self.width // 2))

    def patch_positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(1, N, D)"""
        if self.kind == "sincos_2d":  # a place in the image keeps its position, whatever the grid
            return sincos_positions(*grid_places(self.grid, (rows, columns), device), self.width)
        if self.kind == "learned_1d":
            stored = self.weight[:, self.num_placed :].unflatten(1, self.grid)
        else:
            shape = (1, *self.grid, self.width // 2)
            stored = torch.cat([self.row_weight.expand(shape), self.column_weight.expand(shape)], dim=-1)
        # A size that torch.export leaves open is always resampled; on the stored grid that changes nothing.
        is_open = isinstance(rows, torch.SymInt) or isinstance(columns, torch.SymInt)
        if is_open or (rows, columns) != self.grid:
            stored = resample_positions(stored, rows, columns, self.interpolation)
        return stored.flatten(1, 2)

    def forward(self, hidden_states: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """
        Adds the positions of a grid (rows, columns), the stored one by default, to the tokens that have one:
        (B, T, D) -> (B, T, D).
        """
        patches = self.patch_positions(*(grid or self.grid), hidden_states.device)
        positions = F.pad(patches, (0, 0, self.num_unplaced, 0))
        if self.num_placed:
            positions = torch.cat([self.weight[:, : self.num_placed], positions], dim=1)
        return hidden_states + positions.to(hidden_states.dtype)


class ViTScratchRotaryPositions(nn.Module):
    """
    DINOv3's rotary positions (Siméoni et al., arXiv:2508.10104): each pair of channels of a query or key is turned by
    an angle, for half of the pairs proportional to the row of the patch, for the others to the column. Both go from -1
    to 1 over the image, whatever the grid. Tokens that are not patches stay as they are.
    """

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens, self.theta = config.grid_hw, config.num_prefix_tokens, config.rope_theta

    def forward(self, states: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Queries or keys (B, A, T, E) -> (B, A, T, E)"""
        (rows, columns), width = grid or self.grid, states.shape[-1]
        y, x = ((2 * torch.arange(size, device=states.device) + 1) / size - 1 for size in (rows, columns))
        frequencies = 2 * math.pi / self.theta ** (torch.arange(width // 4, device=states.device) * (4 / width))
        angles = torch.stack([y[:, None].expand(-1, columns), x.expand(rows, -1)], dim=-1)[..., None] * frequencies
        angles = angles.flatten(2).flatten(0, 1).tile(2)  # (rows, columns, 2, E / 4) -> (N, E)
        patches = states[:, :, self.num_prefix_tokens :]
        first, second = patches.chunk(2, dim=-1)  # the pairs: channels that lie E / 2 apart
        turned = patches * angles.cos().to(states.dtype)
        turned = turned + torch.cat([-second, first], dim=-1) * angles.sin().to(states.dtype)
        return torch.cat([states[:, :, : self.num_prefix_tokens], turned], dim=2)


class ViTScratchRelativePositions(nn.Module):
    """
    1-D relative attention of the paper's D.4: the product of each query with an embedding of its distance to each key,
    counted in patches row by row. Tokens that are not patches have no distance.
    """

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens = config.grid_hw, config.num_prefix_tokens
        head_width = config.hidden_size // config.num_attention_heads
        self.weight = nn.Parameter(torch.empty(2 * math.prod(self.grid) - 1, head_width))

    def forward(self, query: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, A, T, E) -> (B, A, T, T). On another grid, distances are those of the places on the stored one."""
        y, x = grid_places(self.grid, grid or self.grid, query.device)
        place = (y[:, None] * self.grid[1] + x).flatten()  # (N,)
        distance = place[:, None] - place + (math.prod(self.grid) - 1)  # (N, N), counted from 0
        below, above = distance.floor().long(), distance.ceil().long()
        table = torch.lerp(self.weight[below].float(), self.weight[above].float(), (distance - below)[..., None])
        patches = query[:, :, self.num_prefix_tokens :]  # (B, A, N, E)
        bias = torch.einsum("baqe,qke->baqk", patches, table.to(query.dtype))  # (B, A, N, N)
        return F.pad(bias, (self.num_prefix_tokens, 0, self.num_prefix_tokens, 0))
