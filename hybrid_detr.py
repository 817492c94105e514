"""The detector of the papers: two-stage Deformable DETR, whose query row is cut into groups that do not see each other.

    image -> backbone -> pyramid of V levels, flattened to S tokens -> encoder (deformable self-attention)
          -> every token proposes a box; the best N become queries -> decoder -> a box and C class scores per query

Letters: B images, L decoder layers, N queries of the row, n of one group, G groups, C classes, S tokens (cells of all
levels), D width, d = D / heads, V levels of h x w cells, J sampling points per level, E pairs of encoder heads. Shapes
are written behind the line that makes them.
Boxes are (cx, cy, w, h) as fractions of the image; a mask is True at padding.

Sources: Deformable DETR (attention, proposals, refinement), H-DETR (groups, Table 8), Group DETR (equal groups, A.2),
DINO (mixed query selection, look forward twice, denoising), Stable-DINO (memory fusion).
"Official code" is HDETR/H-Deformable-DETR, whose checkpoints load with `from_official` and give the same outputs.
This file needs torch and torchvision only, and can be copied alone; `python hybrid_detr.py` prints the shape behind
every stage.
"""
import copy
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d


class Outputs(NamedTuple):
    """All that matching and losses need."""
    pred_logits: Tensor      # (L, B, N, C): before the sigmoid, class c of 0..C-1 in column c, no background column;
    #                          with softmax (L, B, N, C+1), the last for "no object"
    pred_boxes: Tensor       # (L, B, N, 4); N counts the denoising queries in training
    encoder_logits: Tensor   # (1, B, E*S, C): one "layer" of E groups. Column 0, "object or not", ranks the tokens; the
    #                          others learn that nothing is there, and are kept for the official checkpoints
    encoder_boxes: Tensor    # (1, B, E*S, 4)


class TooFewTokens(ValueError):
    """An image is too small to choose the queries from."""


# --- Backbones ------------------------------------------------------------------------------------------------------

class TinyBackbone(nn.Sequential):
    """Strides 8, 16, 32 from scratch: small enough to train on a laptop. (B,3,H,W) -> three maps.

    Most of a small detector's time goes into the transformer, so the convolutions can afford residual blocks.
    """
    channels = (128, 192, 256)

    def __init__(self):
        def conv(c_in, c_out, stride):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())
        super().__init__(
            nn.Sequential(conv(3, 32, 2), conv(32, 64, 2), Residual(64), conv(64, 128, 2), Residual(128)),
            nn.Sequential(conv(128, 192, 2), Residual(192)),
            nn.Sequential(conv(192, 256, 2), Residual(256)))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        x = images
        for stage in self:
            x = stage(x)
            maps.append(x)
        return maps


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


class FrozenNorm(FrozenBatchNorm2d):
    """Batch norm with fixed numbers, which are float32 and would turn bfloat16 back into float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class Backbone(nn.Module):
    """A torchvision ResNet or Swin by name: (B,3,H,W) -> maps of stride 8, 16, 32.

    frozen=True is the papers' setting for ImageNet weights: a ResNet's batch norm is frozen, and its stem and first
    stage do not train; a Swin trains whole. The weights themselves come from `load_imagenet`, so that building a model
    never needs a network. Raises ValueError for a name that torchvision does not know, or is neither ResNet nor Swin.
    """

    def __init__(self, name: str, frozen: bool = True):
        super().__init__()
        self.name = name
        swin, resnet = name.startswith('swin_'), re.match('(resnet|resnext|wide_resnet)', name)
        if not (swin or resnet) or name not in torchvision.models.list_models():
            raise ValueError(f'unknown backbone {name!r}: use tiny, or a ResNet or Swin of torchvision, such as '
                             'resnet50')
        norm = {'norm_layer': FrozenNorm} if frozen and not swin else {}
        nodes = ('features.3', 'features.5', 'features.7') if swin else ('layer2', 'layer3', 'layer4')
        self.body = create_feature_extractor(torchvision.models.get_model(name, weights=None, **norm), list(nodes))
        self.channels_come_last = swin   # (B, h, w, D)
        # A trial run spares a table of widths; in eval(), which leaves the statistics of batch norm alone.
        self.channels = tuple(m.shape[1] for m in self.eval()(torch.zeros(1, 3, 64, 64)))
        self.train()
        if frozen:
            for parameter_name, parameter in self.body.named_parameters():
                parameter.requires_grad_(not parameter_name.startswith(('conv1', 'layer1')))

    def load_imagenet(self) -> None:
        """Fetch torchvision's first ImageNet weights; of ResNet-50 those of the papers. Raises URLError without a
        network."""
        state = torchvision.models.get_model_weights(self.name).IMAGENET1K_V1.get_state_dict(progress=True)
        ours = self.body.state_dict()   # without the classifier
        self.body.load_state_dict({name: value for name, value in state.items() if name in ours})

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = list(self.body(images).values())
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_come_last else maps


# --- Where a token is -----------------------------------------------------------------------------------------------

def sine_code(numbers: Tensor, channels: int) -> Tensor:
    """Each number becomes `channels` sines and cosines, interleaved: (..., n) -> (..., n * channels)."""
    # angle_k = 2 pi x / 10000^(2k / channels), k = 0, 1, ... channels/2 - 1
    k = torch.arange(channels // 2, device=numbers.device)
    angle = numbers[..., None] * 2 * math.pi / 10000 ** (2 * k / channels)                      # (..., n, channels/2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-3)


class Geometry(NamedTuple):
    """Where the S tokens of a padded batch lie. Only `position` holds something learned, the code of the level."""
    shapes: list[tuple[int, int]]   # (h, w) of each level
    padding: Tensor                 # (B, S) bool
    valid_ratios: Tensor            # (B, V, 2): the part of each level's width and height that is image
    position: Tensor                # (B, S, D): sine code of the cell + the learned code of its level
    centres: Tensor                 # (B, S, 2): centre of the cell, in fractions of the image without its padding
    level: Tensor                   # (S,): level of each token


def geometry(padding_mask: Tensor, shapes: list[tuple[int, int]], level_embed: Tensor) -> Geometry:
    """padding_mask (B,H,W) bool, the levels' (h,w) and level_embed (V,D) -> what follows from where the padding is."""
    paddings, ratios, positions, centres = [], [], [], []
    for (h, w), level_code in zip(shapes, level_embed):
        padding = F.interpolate(padding_mask[:, None].float(), size=(h, w))[:, 0].bool()            # (B, h, w)
        # The image lies at the top left, so the first row and the first column count its cells.
        valid = ~padding
        valid_wh = torch.stack([valid[:, 0].sum(1), valid[:, :, 0].sum(1)], -1).to(level_embed)     # (B, 2)
        ratios.append(torch.stack([valid_wh[:, 0] / w, valid_wh[:, 1] / h], -1))                    # (B, 2)
        row, column = torch.meshgrid(torch.arange(h, device=valid.device), torch.arange(w, device=valid.device),
                                     indexing='ij')
        cell = (torch.stack([column, row], -1) + 0.5).flatten(0, 1)                                 # (h*w, 2)
        # Divided by the cells of the image, so that 0..1 spans it without its padding.
        centres.append(cell / valid_wh[:, None])                                                    # (B, h*w, 2)
        # The position code has y before x, and 1e-6 in the divisor, as in the official code.
        y_x = (cell / (valid_wh[:, None] + 1e-6)).flip(-1)                                          # (B, h*w, 2)
        positions.append(sine_code(y_x, level_embed.shape[1] // 2) + level_code)                    # (B, h*w, D)
        paddings.append(padding.flatten(1))
    level = torch.cat([torch.full((h * w,), v, device=padding_mask.device) for v, (h, w) in enumerate(shapes)])
    return Geometry(shapes, torch.cat(paddings, 1), torch.stack(ratios, 1), torch.cat(positions, 1),
                    torch.cat(centres, 1), level)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Before the sigmoid, with x kept off 0 and 1, so that a box at the very border stays finite (as the official code,
    which keeps x and 1 - x off 0 each)."""
    return torch.logit(x, eps=1e-5)


def initial_boxes(where: Geometry) -> Tensor:
    """What each token proposes before it is looked at: a box of 0.05 * 2^level around its centre -> box logits (B,S,4).

    Padded tokens, and boxes with a number outside 0.01..0.99, are ruled out by +inf (Deformable DETR's official code).
    """
    size = 0.05 * 2.0 ** where.level.to(where.centres)                                              # (S,)
    box = torch.cat([where.centres, size[:, None].expand_as(where.centres)], -1)                    # (B, S, 4)
    invalid = where.padding | ~((box > 0.01) & (box < 0.99)).all(-1)
    return inverse_sigmoid(box).masked_fill(invalid[..., None], math.inf)


# --- Attention ------------------------------------------------------------------------------------------------------

def deformable_attention(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The inner part of Deformable DETR Eq. 3: per head, a weighted sum of bilinear samples from all levels.

    value (B,S,heads,d), locations (B,N,heads,V,J,2) as x, y in 0..1, weights (B,N,heads,V,J) -> (B,N,heads*d).
    Outside a level the value is 0. The official code has a CUDA kernel of its own for it. Of the forms in PyTorch, one
    `grid_sample` per level was the best on a CPU or near it (tried: one gather over all levels, embedding_bag).
    """
    B, _, heads, d = value.shape
    N = locations.shape[1]
    grid = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)                  # (V, B*heads, N, J, 2), -1..1
    weights = weights.permute(3, 0, 2, 1, 4).reshape(len(shapes), B * heads, 1, N, -1)          # (V, B*heads, 1, N, J)
    out = 0
    # out_q = sum_v sum_j weight_qvj * x_v(location_qvj), where x_v is the map of level v, read bilinearly
    for v, cells in enumerate(value.split([h * w for h, w in shapes], 1)):
        x = cells.permute(0, 2, 3, 1).reshape(B * heads, d, *shapes[v])                             # (B*heads, d, h, w)
        sampled = F.grid_sample(x, grid[v], padding_mode='zeros', align_corners=False)              # (B*heads, d, N, J)
        out = out + (sampled * weights[v]).sum(-1)                                                  # (B*heads, d, N)
    return out.view(B, heads * d, N).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query looks at J points per level and head around its reference, and predicts these and their weights.

    Deformable DETR Eq. 3: out_q = sum_m W_m sum_v sum_j A_mqvj W'_m x_v(reference_q + offset_mqvj), where m is the
    head; A is `weights`, W' `value_proj`, W `output_proj`.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """At the start head h looks in direction 2 pi h / heads, point j = 0..J-1 at distance j + 1, measured as the
        larger of |x| and |y|, all with equal weight. Called by HybridDETR, after its Xavier."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)                              # (heads, 2)
        distance = torch.arange(1, self.points + 1)
        offsets = (direction[:, None, None] * distance[:, None]).expand(-1, self.levels, -1, -1)    # (heads, V, J, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, reference: Tensor, tokens: Tensor, shapes, padding: Tensor) -> Tensor:
        """query (B,N,D), reference (B,N,V,2), a point, or (B,N,V,4), a box, in fractions of each level's padded map,
        tokens (B,S,D), padding (B,S) -> (B,N,D)."""
        B, N, _ = query.shape
        # Padding is set to 0 after the projection, so that not even its bias is seen there.
        value = self.value_proj(tokens).masked_fill(padding[..., None], 0.0)                            # (B, S, D)
        offsets = self.sampling_offsets(query).view(B, N, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(B, N, self.heads, -1).softmax(-1)   # over levels and points
        weights = weights.view(offsets.shape[:-1])                                                # (B, N, heads, V, J)
        anchor = reference[:, :, None, :, None]                                                   # (B, N, 1, V, 1, .)
        if anchor.shape[-1] == 2:   # a point: offsets count in cells of the level
            # non_blocking: torch.tensor(..., device='cuda') would make the CPU wait for the GPU, in each layer.
            cells = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype).to(offsets.device, non_blocking=True)
            locations = anchor + offsets / cells[:, None]                                     # (B, N, heads, V, J, 2)
        else:                       # a box: at the start, the J-th point in each direction lies on its border
            locations = anchor[..., :2] + offsets / self.points * anchor[..., 2:] * 0.5
        value = value.unflatten(-1, (self.heads, -1))                                              # (B, S, heads, d)
        return self.output_proj(deformable_attention(value, shapes, locations, weights))


class GroupSelfAttention(nn.Module):
    """Multi-head self-attention inside each group of the query row, and never across (Group DETR Eq. 5).

    Equal groups are folded into the batch, as in Group DETR (Alg. 1); groups of different size attend one after the
    other. H-DETR puts all queries into one attention and masks the (N,N) matrix (§3.2.1): the same numbers, but at the
    cost of N^2 instead of the sum of n^2.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        # Query, key and value in one matrix, as in nn.MultiheadAttention: Xavier's range depends on the shape.
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, content: Tensor, position: Tensor, sizes: Sequence[int], denoising_groups: int = 0) -> Tensor:
        """content, position (B,N,D), sizes: queries of each group -> (B,N,D). Position is no part of the value.

        What the sizes leave over at the end of the row are denoising queries, in groups of R. Each sees its own
        denoising group and the first group, the detector's. (In DINO they see all matching queries, which are one
        group; here only the first of several, if they are separate.) No matching query sees them: they know the answer.
        """
        B, _, D = content.shape
        matching = sum(sizes)
        q, k = F.linear(content + position, self.in_proj.weight[:2 * D], self.in_proj.bias[:2 * D]).chunk(2, -1)
        v = F.linear(content, self.in_proj.weight[2 * D:], self.in_proj.bias[2 * D:])                   # (B, N, D) each
        if len(set(sizes)) == 1:   # one attention with G times the batch
            folded = (x[:, :matching].unflatten(1, (len(sizes), -1)).flatten(0, 1) for x in (q, k, v))   # (B*G, n, D)
            out = [self.attend(*folded).view(B, matching, D)]
        else:
            parts = [x[:, :matching].split(sizes, 1) for x in (q, k, v)]                  # of each group (B, n, D)
            out = [self.attend(*of_group) for of_group in zip(*parts)]
        if denoising_groups:   # X in the shapes below
            own_q, *own_kv = (x[:, matching:].unflatten(1, (denoising_groups, -1)) for x in (q, k, v))   # (B, X, R, D)
            first_kv = (x[:, None, :sizes[0]].expand(-1, denoising_groups, -1, -1) for x in (k, v))     # (B, X, n, D)
            seen_kv = (torch.cat(pair, 2).flatten(0, 1) for pair in zip(own_kv, first_kv))             # (B*X, R+n, D)
            out.append(self.attend(own_q.flatten(0, 1), *seen_kv).view(B, -1, D))
        return self.out_proj(torch.cat(out, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every query sees every key: (B,n,D), (B,m,D), (B,m,D) -> (B,n,D)."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))            # (B, heads, n, d)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)


# --- Layers ---------------------------------------------------------------------------------------------------------

class FeedForward(nn.Module):
    """(B, ., D) -> the same shape; residual and norm included. All layers normalise after the sum ("post-norm")."""

    def __init__(self, width: int, ffn: int, dropout: float):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class EncoderLayer(nn.Module):
    """Each token looks at a few others of all levels, then passes the feed-forward layers alone."""

    def __init__(self, width, heads, levels, points, ffn, dropout):
        super().__init__()
        self.attention, self.norm = DeformableAttention(width, heads, levels, points), nn.LayerNorm(width)
        self.dropout, self.ffn = nn.Dropout(dropout), FeedForward(width, ffn, dropout)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes, padding: Tensor) -> Tensor:
        """tokens, position (B,S,D), reference (B,S,V,2) -> (B,S,D). Position goes into the query, never the value."""
        attended = self.attention(tokens + position, reference, tokens, shapes, padding)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class DecoderLayer(nn.Module):
    """Each query talks to its group, looks at the image, then passes the feed-forward layers alone."""

    def __init__(self, width, heads, levels, points, ffn, dropout):
        super().__init__()
        self.self_attention, self.self_norm = GroupSelfAttention(width, heads, dropout), nn.LayerNorm(width)
        self.cross_attention, self.cross_norm = DeformableAttention(width, heads, levels, points), nn.LayerNorm(width)
        self.dropout, self.ffn = nn.Dropout(dropout), FeedForward(width, ffn, dropout)

    def forward(self, content: Tensor, position: Tensor, sizes: Sequence[int], denoising_groups: int,
                reference: Tensor, tokens: Tensor, shapes, padding: Tensor) -> Tensor:
        """content, position (B,N,D), reference (B,N,V,4), tokens (B,S,D) -> (B,N,D).

        Only self-attention lets queries see each other. It is what makes one of two equal queries give way, so a
        group whose assignment is one-to-one has to be alone in it.
        """
        attended = self.self_attention(content, position, sizes, denoising_groups)
        content = self.self_norm(content + self.dropout(attended))
        attended = self.cross_attention(content + position, reference, tokens, shapes, padding)
        return self.ffn(self.cross_norm(content + self.dropout(attended)))


def clones(module: nn.Module, n: int) -> nn.ModuleList:
    """n copies with parameters of their own, which start equal unless `reset_parameters` draws them anew."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(n))


# --- The detector ---------------------------------------------------------------------------------------------------

class HybridDETR(nn.Module):
    """Two-stage Deformable DETR on a query row cut into groups.

    groups: queries of each group, e.g. (300, 1500) for H-DETR's hybrid branch, (300,) * 11 for Group DETR.
    selection: 'ranks' has one pair of encoder heads; 'heads' and 'distinct' have one for each group; see `select`.
    separate_attention=False lets all groups of a training step see each other (Group DETR Table 7 c).
    ffn=2048, dropout=0, mixed_selection, look_forward_twice: the switches of H-DETR Table 8, in the paper's best row.
    fusion: none, simple, ulike or dense; see `encode`. denoising=True: forward takes denoising queries (matchers.py).
    softmax=True: one more column in the decoder's class heads, "no object", for DETR's cross-entropy.
    width: a multiple of 32 (GroupNorm) and of heads.
    backbone: 'tiny' or a name for `Backbone`; frozen_backbone: see there.
    The attribute checkpoint_activations=True saves memory in training: see `call_layer`.
    Raises ValueError for an unknown selection, fusion or backbone.
    """

    def __init__(self, num_classes: int, groups: Sequence[int] = (300,), backbone: str = 'resnet50', *,
                 frozen_backbone: bool = True, width: int = 256, heads: int = 8, encoder_layers: int = 6,
                 decoder_layers: int = 6, ffn: int = 2048, points: int = 4, levels: int = 4, dropout: float = 0.0,
                 mixed_selection: bool = True, look_forward_twice: bool = True, selection: str = 'ranks',
                 separate_attention: bool = True, fusion: str = 'none', denoising: bool = False, softmax: bool = False):
        super().__init__()
        if selection not in ('ranks', 'heads', 'distinct'):
            raise ValueError(f'unknown selection {selection!r}: use ranks, heads or distinct')
        if fusion not in ('none', 'simple', 'ulike', 'dense'):
            raise ValueError(f'unknown fusion {fusion!r}: use none, simple, ulike or dense')
        self.groups, self.selection, self.fusion = tuple(groups), selection, fusion
        self.num_classes, self.softmax, self.checkpoint_activations = num_classes, softmax, False
        self.look_forward_twice, self.separate_attention = look_forward_twice, separate_attention
        self.backbone = TinyBackbone() if backbone == 'tiny' else Backbone(backbone, frozen_backbone)
        channels = self.backbone.channels
        # Every level gets the width D. Those beyond the backbone's three come from stride-2 convolutions, the first on
        # its last map, each later one on the level before.
        convolutions = [nn.Conv2d(c, width, 1) for c in channels[:levels]]
        while len(convolutions) < levels:
            c = channels[-1] if len(convolutions) == len(channels) else width
            convolutions.append(nn.Conv2d(c, width, 3, stride=2, padding=1))
        self.input_proj = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, width)) for conv in convolutions)
        self.level_embed = nn.Parameter(torch.empty(levels, width))
        self.encoder = clones(EncoderLayer(width, heads, levels, points, ffn, dropout), encoder_layers)
        # How many maps each projection of the memory fusion joins.
        joined = {'none': (), 'simple': (2,), 'ulike': (2,) * math.ceil(encoder_layers / 2),
                  'dense': (encoder_layers + 1,)}
        self.fusions = nn.ModuleList(nn.Sequential(nn.Linear(maps * width, width), nn.LayerNorm(width))
                                     for maps in joined[fusion])
        self.decoder = clones(DecoderLayer(width, heads, levels, points, ffn, dropout), decoder_layers)
        self.proposal_proj = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.position_proj = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width))
        self.query_content = nn.Parameter(torch.empty(sum(groups), width)) if mixed_selection else None
        # Content of a denoising query: its class; the last row, zero, is for empty slots.
        self.denoising_content = nn.Embedding(num_classes + 1, width, padding_idx=num_classes) if denoising else None
        class_head = nn.Linear(width, num_classes)
        box_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                 nn.Linear(width, 4))
        # "No object" is the decoder's only: the encoder ranks its tokens by a sigmoid.
        decoder_class_head = nn.Linear(width, num_classes + 1) if softmax else class_head
        self.class_heads = clones(decoder_class_head, decoder_layers)
        self.box_heads = clones(box_head, decoder_layers)
        encoder_heads = 1 if selection == 'ranks' else len(groups)
        self.encoder_class_heads = clones(class_head, encoder_heads)
        self.encoder_box_heads = clones(box_head, encoder_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the official code: Xavier for all matrices of the transformer; heads say "score 0.01, box unmoved".

        Score 0.01, since nearly all queries are background: otherwise their loss would drown everything at the start.
        Box unmoved, so that the first predictions are the proposals themselves.
        """
        for module in (self.encoder, self.decoder, self.proposal_proj, self.position_proj):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
            if isinstance(module, GroupSelfAttention):
                nn.init.zeros_(module.in_proj.bias)
                nn.init.zeros_(module.out_proj.bias)
        for projection in (*self.fusions, *self.input_proj):
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        nn.init.normal_(self.level_embed)
        if self.query_content is not None:
            nn.init.normal_(self.query_content)
        # Equal encoder heads would stay equal for ever in Group DETR, where they see the same tokens and targets: all
        # but the first are drawn anew. The decoder's may start equal, as each sees another layer.
        for head in (*self.encoder_class_heads[1:], *self.encoder_box_heads[1:]):
            for module in head.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        for head in (*self.class_heads, *self.encoder_class_heads):
            nn.init.constant_(head.bias, math.log(0.01 / 0.99))   # before the sigmoid
            nn.init.zeros_(head.bias[self.num_classes:])   # "no object" has the logit 0; without softmax this is empty
        for head in (*self.box_heads, *self.encoder_box_heads):
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def forward(self, images: Tensor, padding_mask: Tensor, group: int | None = None, noised=None) -> Outputs:
        """images (B,3,H,W), padding_mask (B,H,W) bool -> Outputs.

        In train() every group of the row runs, in eval() only the first; `group` asks for a single other one.
        noised: `matchers.Denoising`, whose queries follow at the end of the row.
        Raises ValueError if the images have fewer tokens than there are queries to choose.
        """
        if group is None and not self.training:
            group = 0
        # The image: backbone and encoder.
        tokens, shapes = self.pyramid(images)                                                           # (B, S, D)
        where = geometry(padding_mask, shapes, self.level_embed)
        tokens = self.encode(tokens, where)

        # The queries: first stage. All groups up to the wanted one propose: it may get what the earlier ones leave.
        sizes = self.groups if group is None else self.groups[:group + 1]
        encoder_logits, box_logits = self.propose(tokens, where, len(sizes))                            # (B, E, S, .)
        chosen, end = self.select(encoder_logits, box_logits, sizes), sum(sizes)               # (B, n, 4) of each group
        if group is not None:   # only the last of them goes on; in the whole row it ends at `end`
            chosen, sizes = chosen[-1:], sizes[-1:]
        matching = sum(sizes)   # the row without denoising queries
        boxes = torch.cat(chosen if noised is None else [*chosen, noised.boxes], 1)                     # (B, N, 4)
        # Each of the 4 numbers of a box becomes D/2 sines and cosines, (B, N, 2D) together, of which a projection makes
        # where a query looks from (position) and what it asks for (content).
        position, content = self.position_proj(sine_code(boxes, tokens.shape[-1] // 2)).chunk(2, -1)    # (B, N, D) each
        content = content[:, :matching]   # denoising queries have a content of their own
        if self.query_content is not None:   # mixed query selection: position from the image, content learned
            content = self.query_content[end - matching:end].expand(len(images), -1, -1)         # (B, matching, D)
        if noised is not None:
            content = torch.cat([content, self.denoising_content(noised.labels)], 1)                    # (B, N, D)
        # The predictions: second stage.
        seen = sizes if self.separate_attention else (matching,)   # (matching,): all as one group
        pred_logits, pred_boxes = self.decode(boxes, content, position, seen, 0 if noised is None else noised.groups,
                                              tokens, where)
        # The encoder's are one more "layer", whose row holds the tokens of each group one after the other.
        return Outputs(pred_logits, pred_boxes, encoder_logits.flatten(1, 2)[None],
                       box_logits.sigmoid().flatten(1, 2)[None])

    def call_layer(self, layer: nn.Module, *inputs):
        """Call a layer of encoder or decoder. With checkpoint_activations, training keeps only its inputs, and backward
        computes the layer again: less memory, more time. What is kept otherwise is mostly sampled values."""
        if self.checkpoint_activations and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def pyramid(self, images: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        """Backbone maps projected to one width and flattened, fine levels first: (B,3,H,W) -> (B,S,D), V x (h,w)."""
        maps = self.backbone(images)
        projected = [project(x) for project, x in zip(self.input_proj, maps)]                       # (B, D, h, w) each
        x = maps[-1]
        for project in self.input_proj[len(maps):]:
            x = project(x)
            projected.append(x)
        return torch.cat([m.flatten(2).transpose(1, 2) for m in projected], 1), [tuple(m.shape[2:]) for m in projected]

    def encode(self, tokens: Tensor, where: Geometry) -> Tensor:
        """The encoder, and the memory fusion of Stable-DINO §3: (B,S,D) -> (B,S,D).

        The backbone's tokens F_0 and the outputs F_1..F_last of the encoder layers are joined along their features and
        projected back (linear and norm, App. B), so that pretrained features reach the decoder from the first step on:
        simple  [F_last, F_0]
        ulike   F_0 joins the output of the last layer, F_1 that of the one before, and so on inwards (Fig. 4c)
        dense   [F_0, F_1, ..., F_last], the paper's default
        ulike is a reading: the figure draws four layers, and the released code has none. With two layers it is simple.
        """
        # Centres are fractions of the image, and attention samples at fractions of a level's padded map: the ratio
        # turns one into the other. It differs from level to level, since a map has whole cells.
        reference = where.centres[:, :, None] * where.valid_ratios[:, None]                             # (B, S, V, 2)
        outputs, last = [tokens], len(self.encoder)
        for l, layer in enumerate(self.encoder, 1):
            tokens = self.call_layer(layer, tokens, where.position, reference, where.shapes, where.padding)
            inwards = last - l   # 0 at the last layer
            if self.fusion == 'ulike' and inwards < last / 2:   # the second half
                tokens = self.fusions[inwards](torch.cat([tokens, outputs[inwards]], -1))
            outputs.append(tokens)
        if self.fusion == 'simple':
            tokens = self.fusions[0](torch.cat([outputs[last], outputs[0]], -1))
        if self.fusion == 'dense':
            tokens = self.fusions[0](torch.cat(outputs, -1))
        return tokens

    def propose(self, tokens: Tensor, where: Geometry, n_groups: int) -> tuple[Tensor, Tensor]:
        """Every token proposes, in scores and boxes before the sigmoid: (B,S,D) -> (B,E,S,C), (B,E,S,4).

        E = n_groups, or 1 if one pair of heads ranks for all. Every token learns to propose, chosen or not: this is the
        encoder's own loss, the same for every scheme unless groups have heads of their own (matchers.encoder_groups).
        Tokens that are ruled out enter as 0 and have the box logits +inf: they share one score and the box (1,1,1,1),
        stay in the loss as background, and may even be chosen if nothing better is left (official code).
        """
        initial = initial_boxes(where)                                                                  # (B, S, 4)
        features = self.proposal_proj(tokens.masked_fill(initial[..., :1].isinf(), 0.0))                # (B, S, D)
        # Scores at least in float32: in bfloat16 many tie, and chance would rank.
        with torch.autocast(tokens.device.type, enabled=False):
            exact = features.to(torch.promote_types(features.dtype, torch.float32))
            logits = torch.stack([head(exact) for head in self.encoder_class_heads[:n_groups]], 1)
        box_logits = torch.stack([head(features) for head in self.encoder_box_heads[:n_groups]], 1) + initial[:, None]
        return logits, box_logits

    def select(self, logits: Tensor, box_logits: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Two-stage: the tokens with the best scores become the queries: -> boxes (B,n,4) of each group, detached.

        Detached: the decoder's losses do not train the proposals; the encoder's own loss, on all tokens, does.
        'ranks': one head. The first group gets its ranks 1 to n, the next group those that follow, and so on. H-DETR
        App. D finds the boxes of ranks 301-600 badly placed, and takes this as the reason why K = 1 does not help.
        'heads': each group takes the best of a head of its own, so that all start equally well (Group DETR A.2).
        'distinct': as 'heads', without the tokens that an earlier group has taken (H-DETR App. D, for K = 1; there only
        the class heads are separate, here each group has a pair of class and box head, as in Group DETR).
        """
        scores = logits[..., 0]   # "object or not": the encoder trains with all labels 0                  (B, E, S)
        wanted = sum(sizes) if self.selection != 'heads' else max(sizes)
        if wanted > scores.shape[2]:
            raise TooFewTokens(f'the image has {scores.shape[2]} tokens, too few to choose {wanted} queries from: '
                               'use larger images or fewer queries')
        if self.selection == 'ranks':
            chosen = [(0, top) for top in scores[:, 0].topk(wanted).indices.split(list(sizes), 1)]
        else:
            chosen, taken = [], torch.zeros_like(scores[:, 0], dtype=torch.bool)
            for e, size in enumerate(sizes):
                top = scores[:, e].masked_fill(taken, -math.inf).topk(size).indices                     # (B, n)
                chosen.append((e, top))
                if self.selection == 'distinct':
                    taken = taken.scatter(1, top, True)
        # Rows `top` (B, n) of box_logits[:, e] (B, S, 4).
        return [box_logits[:, e].take_along_dim(top[..., None], 1).detach().sigmoid() for e, top in chosen]

    def decode(self, boxes: Tensor, content: Tensor, position: Tensor, sizes: Sequence[int], denoising_groups: int,
               tokens: Tensor, where: Geometry) -> tuple[Tensor, Tensor]:
        """Iterative refinement (Deformable DETR): every layer moves the boxes -> (L,B,N,C), (L,B,N,4).

        boxes (B,N,4), tokens (B,S,D), content, position (B,N,D), sizes and denoising_groups as in GroupSelfAttention.
        Each layer has heads of its own. The position code stays that of the proposal (official code; DINO computes it
        anew from the boxes of the layer before).

            box_l  = sigmoid(shift_l + sigmoid^-1(box_(l-1)))   box_(l-1) detached, `reference`: where layer l samples
            pred_l = the same number, but box_(l-1) not detached, `previous`, so that its loss also reaches head l-1,
                     and no head further back (look forward twice, DINO); without the switch pred_l = box_l
        """
        pred_logits, pred_boxes = [], []
        # Fractions of the image -> of each level's padded map (see `encode`), for centre and size.
        ratios = torch.cat([where.valid_ratios, where.valid_ratios], -1)[:, None]                   # (B, 1, V, 4)
        reference = previous = boxes   # equal in value always: `reference` has no gradient, `previous` that of one head
        for layer, class_head, box_head in zip(self.decoder, self.class_heads, self.box_heads):
            in_maps = reference[:, :, None] * ratios                                                # (B, N, V, 4)
            content = self.call_layer(layer, content, position, sizes, denoising_groups, in_maps, tokens, where.shapes,
                                      where.padding)
            shift = box_head(content)
            pred_logits.append(class_head(content))
            pred_boxes.append((shift + inverse_sigmoid(previous)).sigmoid())
            refined = (shift + inverse_sigmoid(reference)).sigmoid()
            reference = refined.detach()
            previous = refined if self.look_forward_twice else reference
        return torch.stack(pred_logits), torch.stack(pred_boxes)                                    # (L, B, N, .)


# --- Checkpoints of HDETR/H-Deformable-DETR -------------------------------------------------------------------------

OFFICIAL_NAMES = [   # (name here as a regular expression, official name); the first that fits is taken
    (r'level_embed', r'transformer.level_embed'),
    (r'query_content', r'query_embed.weight'),
    (r'encoder\.(\d+)\.attention\.(.+)', r'transformer.encoder.layers.\1.self_attn.\2'),
    (r'encoder\.(\d+)\.norm\.(.+)', r'transformer.encoder.layers.\1.norm1.\2'),
    (r'encoder\.(\d+)\.ffn\.norm\.(.+)', r'transformer.encoder.layers.\1.norm2.\2'),
    (r'decoder\.(\d+)\.cross_attention\.(.+)', r'transformer.decoder.layers.\1.cross_attn.\2'),
    (r'decoder\.(\d+)\.cross_norm\.(.+)', r'transformer.decoder.layers.\1.norm1.\2'),
    (r'decoder\.(\d+)\.self_attention\.in_proj\.(.+)', r'transformer.decoder.layers.\1.self_attn.in_proj_\2'),
    (r'decoder\.(\d+)\.self_attention\.out_proj\.(.+)', r'transformer.decoder.layers.\1.self_attn.out_proj.\2'),
    (r'decoder\.(\d+)\.self_norm\.(.+)', r'transformer.decoder.layers.\1.norm2.\2'),
    (r'decoder\.(\d+)\.ffn\.norm\.(.+)', r'transformer.decoder.layers.\1.norm3.\2'),
    (r'(encoder|decoder)\.(\d+)\.ffn\.(.+)', r'transformer.\1.layers.\2.\3'),
    (r'proposal_proj\.0\.(.+)', r'transformer.enc_output.\1'),
    (r'proposal_proj\.1\.(.+)', r'transformer.enc_output_norm.\1'),
    (r'position_proj\.0\.(.+)', r'transformer.pos_trans.\1'),
    (r'position_proj\.1\.(.+)', r'transformer.pos_trans_norm.\1'),
    (r'class_heads\.(\d+)\.(.+)', r'class_embed.\1.\2'),
    (r'box_heads\.(\d+)\.0\.(.+)', r'bbox_embed.\1.layers.0.\2'),
    (r'box_heads\.(\d+)\.2\.(.+)', r'bbox_embed.\1.layers.1.\2'),
    (r'box_heads\.(\d+)\.4\.(.+)', r'bbox_embed.\1.layers.2.\2'),
    (r'backbone\.body\.(.+)', r'backbone.0.body.\1'),
    (r'(input_proj\..+)', r'\1'),
]


def official_name(name: str, decoder_layers: int) -> str | None:
    """The official name of an entry of this model's state dict; None for one the official model does not have.

    The official encoder's heads are those behind the decoder's last; so only one pair of encoder heads has a name.
    """
    name = re.sub(r'^encoder_(class|box)_heads\.0\.', rf'\1_heads.{decoder_layers}.', name)
    for pattern, official in OFFICIAL_NAMES:
        if fits := re.fullmatch(pattern, name):
            return fits.expand(official)
    return None


def from_official(state_dict: dict[str, Tensor], queries: Sequence[int] = (300, 1500),
                  mixed_selection: bool = True) -> HybridDETR:
    """Build the model that fits a checkpoint of the public H-Deformable-DETR and load every entry.

    state_dict: the checkpoint's 'model'. Layers, widths, classes, levels and the ResNet are read off the shapes; 8
    heads are assumed, as in every official file. The class columns stay as they are: COCO's raw category ids 0..90.
    `transformer.decoder.{class,bbox}_embed` are aliases of `{class,bbox}_embed`: both are expected, and equal.
    Raises ValueError that names the entry if one is unknown, missing, of another shape, or an alias with other values;
    and if `queries` does not sum to the rows of `query_embed.weight`.
    """
    # Sizes from the shapes, then the model, then every entry under its name here; nothing may be left over.
    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f'missing entry {name} (expected a two-stage checkpoint of H-Deformable-DETR)')
        return state_dict[name].shape

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in state_dict) if m), default=-1)

    levels, width = shape('transformer.level_embed')
    layers = count(r'transformer\.decoder\.layers\.(\d+)')
    if mixed_selection and shape('query_embed.weight')[0] != sum(queries):
        raise ValueError(f'query_embed.weight has {shape("query_embed.weight")[0]} rows, but queries={tuple(queries)}')
    blocks = tuple(count(rf'backbone\.0\.body\.layer{stage}\.(\d+)') for stage in (1, 2, 3, 4))
    resnets = {(2, 2, 2, 2): 'resnet18', (3, 4, 6, 3): 'resnet50', (3, 4, 23, 3): 'resnet101'}
    if blocks not in resnets:
        raise ValueError(f'backbone.0.body.layer1..4 have {blocks} blocks: no ResNet that is known here')
    model = HybridDETR(
        shape('class_embed.0.weight')[0], queries, resnets[blocks], width=width, levels=levels, decoder_layers=layers,
        encoder_layers=count(r'transformer\.encoder\.layers\.(\d+)'), mixed_selection=mixed_selection,
        ffn=shape('transformer.encoder.layers.0.linear1.weight')[0],
        points=shape('transformer.encoder.layers.0.self_attn.attention_weights.weight')[0] // (8 * levels))
    loaded, unknown = {}, set(state_dict)
    for ours, value in model.state_dict().items():
        name = official_name(ours, layers)
        if shape(name) != value.shape:
            raise ValueError(f'entry {name} is {tuple(shape(name))}, the model needs {tuple(value.shape)}')
        loaded[ours] = state_dict[name]
        unknown.discard(name)
        if re.match('(class|bbox)_embed', name):
            alias = f'transformer.decoder.{name}'
            if shape(alias) != value.shape or not torch.equal(state_dict[alias], state_dict[name]):
                raise ValueError(f'entry {alias} differs from {name}, of which it is an alias')
            unknown.discard(alias)
    if unknown:
        raise ValueError(f'unknown entry {min(unknown)} ({len(unknown)} in all)')
    model.load_state_dict(loaded)
    return model


# --- The example: two images through a small detector ---------------------------------------------------------------

@torch.no_grad()
def demonstrate() -> None:
    """Print the shape behind every stage, and that the first group does not notice the second."""
    torch.manual_seed(0)
    model = HybridDETR(5, groups=(4, 12), backbone='tiny', width=64, heads=4, encoder_layers=2, decoder_layers=3,
                       ffn=128, levels=3)
    images, padding_mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    images[1, :, :, 96:], padding_mask[1, :, 96:] = 0, True   # the second image is narrower
    tokens, shapes = model.pyramid(images)
    where = geometry(padding_mask, shapes, model.level_embed)
    encoded = model.encode(tokens, where)
    logits, box_logits = model.propose(encoded, where, n_groups=2)
    first, second = model.select(logits, box_logits, model.groups)
    in_training = model(images, padding_mask)
    at_inference = model.eval()(images, padding_mask)
    print(f'2 images, C = 5 classes, groups of {model.groups} queries, levels of {", ".join(map(str, shapes))} cells\n')
    for what, letters, x in (
            ('images', 'B 3 H W', images), ('pyramid: backbone, one width', 'B S D', tokens),
            ('encoder', 'B S D', encoded), ('proposals: scores of each token', 'B E S C', logits),
            ('proposals: boxes', 'B E S 4', box_logits), ('the best become queries', 'B n 4', first),
            ('and the next best, for group two', 'B n 4', second),
            ('decoder in train(): scores', 'L B N C', in_training.pred_logits),
            ('boxes', 'L B N 4', in_training.pred_boxes),
            ('decoder in eval(): one group', 'L B n 4', at_inference.pred_boxes)):
        print(f'{what:36}{letters:10}{tuple(x.shape)}')
    model.query_content[4:] += 1.0
    moved = (model.train()(images, padding_mask).pred_logits - in_training.pred_logits).abs()
    print(f'\nWith other content in group two, its scores move by up to {moved[:, :, 4:].max():.2f}, and those of '
          f'group one by {moved[:, :, :4].max():g}.')


if __name__ == '__main__':
    import argparse
    argparse.ArgumentParser(description=demonstrate.__doc__).parse_args()
    demonstrate()
