"""The detector of the papers: Deformable DETR with a query row that is cut into groups.

    image -> backbone -> pyramid of V levels, flattened to S tokens -> encoder
          -> every token proposes a box; the best proposals become the N queries
             (one-stage: learned queries)
          -> decoder -> a box and C class scores per query

Queries of different groups do not see each other. Training runs all groups. Inference runs only
the first group.

Letters: B images of H x W pixels, L decoder layers, N queries of the row, n queries of one group,
G groups, C classes, S tokens (cells of all levels), D width, d = D / heads, V levels of h x w
cells, J sampling points per level, E pairs of encoder heads, X groups of R denoising queries.
A shape stands behind the line that makes it.
Boxes are (cx, cy, w, h) as fractions of the image. A mask is True at padding.

Sources: Deformable DETR (attention, proposals, refinement), H-DETR (groups, Table 8), Group DETR
(equal groups, A.2), DINO (mixed query selection, look forward twice, denoising), Stable-DINO
(memory fusion). "Official code" is HDETR/H-Deformable-DETR. Its checkpoints load with
`from_official` and give the same outputs.

This file needs torch and torchvision only, and can be copied alone. `python hybrid_detr.py` prints
the shape after every stage.
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
    """Class logits and boxes that the decoder and the encoder predict.

    The encoder counts as one layer with E groups of S tokens. A one-stage encoder predicts nothing.
    Column 0 of the encoder's classes means "object" and ranks the tokens.
    The other columns learn background, as in official checkpoints.
    """
    pred_logits: Tensor  # (L, B, N, C); with softmax (L, B, N, C+1), the last is "no object"
    pred_boxes: Tensor  # (L, B, N, 4); in training N includes the denoising queries
    encoder_logits: Tensor  # (1, B, E*S, C)
    encoder_boxes: Tensor  # (1, B, E*S, 4)


class TooFewTokens(ValueError):
    """An image has fewer tokens than queries to choose."""


# --- Backbones ---

class TinyBackbone(nn.Sequential):
    """A backbone for a laptop, trained from scratch: (B,3,H,W) -> maps of stride 8, 16, 32.

    The transformer takes most of the time, so residual blocks cost little.
    """
    channels = (128, 192, 256)

    def __init__(self):
        def conv(c_in, c_out, stride):
            convolution = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU())
        super().__init__(
            nn.Sequential(conv(3, 32, 2), conv(32, 64, 2), Residual(64),
                          conv(64, 128, 2), Residual(128)),
            nn.Sequential(conv(128, 192, 2), Residual(192)),
            nn.Sequential(conv(192, 256, 2), Residual(256)))

    def forward(self, images: Tensor) -> list[Tensor]:
        # (B, 3, H, W) -> (B, 128, H/8, W/8), (B, 192, H/16, W/16), (B, 256, H/32, W/32)
        maps = []
        x = images
        for stage in self:
            x = stage(x)
            maps.append(x)
        return maps


class Residual(nn.Module):
    """ResNet's basic block: the input is added to the output of two convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


class FrozenNorm(FrozenBatchNorm2d):
    """Batch norm with fixed numbers in float32. The result has the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class Backbone(nn.Module):
    """A torchvision ResNet or Swin by name: (B,3,H,W) -> maps of stride 8, 16, 32.

    frozen=True is the papers' setting for ImageNet weights: a ResNet's batch norm, stem and first
    stage do not train. All of a Swin trains.
    Only `load_imagenet` needs the internet. Raises ValueError for any other name.
    """

    def __init__(self, name: str, frozen: bool = True):
        super().__init__()
        self.name = name
        swin = name.startswith('swin_')
        resnet = re.match('(resnet|resnext|wide_resnet)', name)
        if not (swin or resnet) or name not in torchvision.models.list_models():
            raise ValueError(f'unknown backbone {name!r}: use tiny, or a ResNet or Swin of '
                             'torchvision, such as resnet50')
        norm = {'norm_layer': FrozenNorm} if frozen and not swin else {}
        nodes = ['layer2', 'layer3', 'layer4']
        if swin:
            nodes = ['features.3', 'features.5', 'features.7']
        model = torchvision.models.get_model(name, weights=None, **norm)
        self.body = create_feature_extractor(model, nodes)
        self.channels_come_last = swin
        # A blank image shows the channel widths. eval() keeps batch norm unchanged.
        self.channels = tuple(m.shape[1] for m in self.eval()(torch.zeros(1, 3, 64, 64)))
        self.train()
        if frozen:
            for parameter_name, parameter in self.body.named_parameters():
                parameter.requires_grad_(not parameter_name.startswith(('conv1', 'layer1')))

    def load_imagenet(self) -> None:
        """Fetch torchvision's V1 ImageNet weights. The papers use them for ResNet-50.

        Raises URLError without the internet.
        """
        weights = torchvision.models.get_model_weights(self.name).IMAGENET1K_V1
        state = weights.get_state_dict(progress=True)
        ours = self.body.state_dict()  # without the classifier
        self.body.load_state_dict({name: value for name, value in state.items() if name in ours})

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = list(self.body(images).values())
        # A Swin's maps are (B, h, w, channels).
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_come_last else maps


# --- Where a token is ---

def sine_code(numbers: Tensor, channels: int) -> Tensor:
    """Turn each number into `channels` sines and cosines: (..., c) -> (..., c * channels)."""
    # angle_k = 2 pi x / 10000^(2k / channels), k = 0, 1, ... channels/2 - 1
    k = torch.arange(channels // 2, device=numbers.device)
    angle = numbers[..., None] * 2 * math.pi / 10000 ** (2 * k / channels)  # (..., c, channels/2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-3)


class Geometry(NamedTuple):
    """Where the S tokens of a padded batch lie."""
    shapes: list[tuple[int, int]]  # (h, w) of each level
    padding: Tensor  # (B, S) bool
    valid_ratios: Tensor  # (B, V, 2): the image's share of each level's width and height
    position: Tensor  # (B, S, D): sine code of the cell + learned code of its level
    centres: Tensor  # (B, S, 2): cell centre in fractions of the unpadded image
    level: Tensor  # (S,): level of each token


def geometry(padding_mask: Tensor, shapes: list[tuple[int, int]],
             level_embed: Tensor) -> Geometry:
    """Derive the Geometry from padding_mask (B,H,W), the levels' (h, w) and level_embed (V,D)."""
    paddings, ratios, positions, centres = [], [], [], []
    device = padding_mask.device
    for (h, w), level_code in zip(shapes, level_embed):
        padding = F.interpolate(padding_mask[:, None].float(), size=(h, w))[:, 0].bool()
        # The image lies at the top left, so the first row and column count its cells.
        valid = ~padding  # (B, h, w)
        valid_wh = torch.stack([valid[:, 0].sum(1), valid[:, :, 0].sum(1)], -1)
        valid_wh = valid_wh.to(level_embed)[:, None]  # (B, 1, 2)
        row, column = torch.meshgrid(torch.arange(h, device=device),
                                     torch.arange(w, device=device), indexing='ij')
        cell = (torch.stack([column, row], -1) + 0.5).flatten(0, 1)  # (h*w, 2)
        # The position code has y before x, and 1e-6 in the divisor, as in the official code.
        y_x = (cell / (valid_wh + 1e-6)).flip(-1)  # (B, h*w, 2)
        code = sine_code(y_x, level_embed.shape[1] // 2)  # (B, h*w, D)
        positions.append(code + level_code)
        centres.append(cell / valid_wh)  # (B, h*w, 2)
        ratios.append(torch.cat([valid_wh[..., :1] / w, valid_wh[..., 1:] / h], -1))  # (B, 1, 2)
        paddings.append(padding.flatten(1))
    levels = [torch.full((h * w,), v, device=device) for v, (h, w) in enumerate(shapes)]
    return Geometry(shapes, torch.cat(paddings, 1), torch.cat(ratios, 1),
                    torch.cat(positions, 1), torch.cat(centres, 1), torch.cat(levels))


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logit of x, of any shape. x is clamped to 1e-5..1-1e-5, so the logit is finite."""
    return torch.logit(x, eps=1e-5)


def initial_boxes(where: Geometry) -> Tensor:
    """Initial box logits (B,S,4) of the tokens: a box of size 0.05 * 2^level at the cell centre.

    Padded tokens and boxes with a number outside 0.01..0.99 are ruled out by +inf (official code).
    """
    size = 0.05 * 2.0 ** where.level.to(where.centres)  # (S,)
    box = torch.cat([where.centres, size[:, None].expand_as(where.centres)], -1)  # (B, S, 4)
    invalid = where.padding | ~((box > 0.01) & (box < 0.99)).all(-1)
    return inverse_sigmoid(box).masked_fill(invalid[..., None], math.inf)


# --- Attention ---

def deformable_attention(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor,
                         weights: Tensor) -> Tensor:
    """The core of Deformable DETR Eq. 3: per head, a weighted sum of samples from all levels.

    value (B,S,heads,d), locations (B,N,heads,V,J,2) as x, y in 0..1, weights (B,N,heads,V,J)
    -> (B,N,heads*d). Outside a level the value is 0.
    """
    B, _, heads, d = value.shape
    N = locations.shape[1]
    # Speed: points come before queries, so that the sum over J reads contiguous memory.
    grid = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).contiguous()
    grid = grid.flatten(1, 2)  # (V, B*heads, J, N, 2), -1..1
    weights = weights.permute(3, 0, 2, 4, 1).contiguous()
    weights = weights.view(len(shapes), B * heads, 1, -1, N)  # (V, B*heads, 1, J, N)
    cells = value.split([h * w for h, w in shapes], 1)
    out = 0
    # out_q = sum_v sum_j weight_qvj * x_v(location_qvj). x_v is level v, interpolated.
    for x, shape, points, weight in zip(cells, shapes, grid, weights):
        x = x.permute(0, 2, 3, 1).reshape(B * heads, d, *shape)  # (B*heads, d, h, w)
        sampled = F.grid_sample(x, points, padding_mode='zeros', align_corners=False)
        out = out + (sampled * weight).sum(2)  # (B*heads, d, J, N) -> (B*heads, d, N)
    # Speed: the backward of `flatten` makes the gradient contiguous, once for all levels.
    return out.flatten().view(B, heads * d, N).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Attention to J points per level and head. A query predicts their offsets and weights.

    Deformable DETR Eq. 3: out_q = sum_m W_m sum_v sum_j A_mqvj W'_m x_v(reference_q + offset_mqvj),
    where m is the head, A `weights`, W' `value_proj` and W `output_proj`.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.core = deformable_attention  # or a compiled one
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Let head m look in direction 2 pi m / heads, with equal weights.

        Point j = 0..J-1 lies at distance j + 1, measured as the larger of |x| and |y|.
        """
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (heads, 2)
        distance = torch.arange(1, self.points + 1)
        offsets = direction[:, None, None] * distance[:, None]  # (heads, 1, J, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, reference: Tensor, tokens: Tensor, shapes,
                padding: Tensor) -> Tensor:
        """Sample the tokens: query (B,N,D), tokens (B,S,D), padding (B,S) -> (B,N,D).

        reference is a point (B,N,V,2) or a box (B,N,V,4), in fractions of each level's padded map.
        """
        B, N, _ = query.shape
        # Padding is set to 0 after the projection, because the projection adds a bias.
        value = self.value_proj(tokens).masked_fill(padding[..., None], 0.0)  # (B, S, D)
        value = value.unflatten(-1, (self.heads, -1))  # (B, S, heads, d)
        offsets = self.sampling_offsets(query)
        offsets = offsets.view(B, N, self.heads, self.levels, self.points, 2)
        # A is a softmax over the levels and points of one head.
        weights = self.attention_weights(query).view(B, N, self.heads, -1).softmax(-1)
        weights = weights.view(offsets.shape[:-1])  # (B, N, heads, V, J)
        anchor = reference[:, :, None, :, None]  # (B, N, 1, V, 1, 2 or 4)
        if anchor.shape[-1] == 2:
            # Offsets from a point are in cells of the level.
            cells = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype)
            # Speed: with non_blocking, the CPU does not wait for the GPU.
            cells = cells.to(offsets.device, non_blocking=True)
            locations = anchor + offsets / cells[:, None]  # (B, N, heads, V, J, 2)
        else:
            # From a box, an offset of J reaches from the centre to the border.
            locations = anchor[..., :2] + offsets / self.points * anchor[..., 2:] * 0.5
        return self.output_proj(self.core(value, shapes, locations, weights))


class GroupSelfAttention(nn.Module):
    """Multi-head self-attention inside each group of the query row (Group DETR Eq. 5).

    Equal groups are folded into the batch, as in Group DETR (Alg. 1). Groups of different size
    attend one after the other. H-DETR masks the (N,N) matrix of all queries instead (§3.2.1). The
    mask gives the same numbers. It costs N^2 instead of the sum of n^2.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        # Query, key and value share one matrix, as in nn.MultiheadAttention.
        # Separate matrices would get a wider range from Xavier.
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, content: Tensor, position: Tensor, sizes: Sequence[int],
                denoising_groups: int = 0) -> Tensor:
        """Attend within groups of `sizes` queries: content, position (B,N,D) -> (B,N,D).

        The position is added to query and key only.
        Queries beyond `sum(sizes)` are X = `denoising_groups` groups of R denoising queries.
        A denoising query sees its own group and the first group.
        Other queries never see denoising queries, which are made from the ground truth.
        """
        B, _, D = content.shape
        matching = sum(sizes)
        weight, bias = self.in_proj.weight, self.in_proj.bias
        q, k = F.linear(content + position, weight[:2 * D], bias[:2 * D]).chunk(2, -1)  # (B, N, D)
        v = F.linear(content, weight[2 * D:], bias[2 * D:])  # (B, N, D)
        if len(set(sizes)) == 1:
            # One attention with G times the batch: (B, G*n, D) -> (B*G, n, D).
            folded = (x[:, :matching].unflatten(1, (len(sizes), -1)).flatten(0, 1)
                      for x in (q, k, v))
            out = [self.attend(*folded).view(B, matching, D)]
        else:
            parts = [x[:, :matching].split(sizes, 1) for x in (q, k, v)]  # (B, n, D) per group
            out = [self.attend(*of_group) for of_group in zip(*parts)]
        if denoising_groups:
            X = denoising_groups
            own_q, *own_kv = (x[:, matching:].unflatten(1, (X, -1)) for x in (q, k, v))
            first_kv = (x[:, None, :sizes[0]].expand(-1, X, -1, -1) for x in (k, v))
            # Keys and values: (B, X, R, D) and (B, X, n, D) -> (B*X, R+n, D).
            seen_kv = (torch.cat(pair, 2).flatten(0, 1) for pair in zip(own_kv, first_kv))
            out.append(self.attend(own_q.flatten(0, 1), *seen_kv).view(B, -1, D))
        return self.out_proj(torch.cat(out, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let every query see all m keys: (B,n,D), (B,m,D), (B,m,D) -> (B,n,D)."""
        # (B, n, D) -> (B, heads, n, d)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return out.transpose(1, 2).flatten(2)


# --- Layers: residual, then norm ("post-norm") ---

class FeedForward(nn.Module):
    """Two linear layers with residual and norm: (B, ., D) -> the same shape."""

    def __init__(self, width: int, ffn: int, dropout: float):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class EncoderLayer(nn.Module):
    """Deformable attention of the tokens to each other, then a feed-forward part."""

    def __init__(self, width, heads, levels, points, ffn, dropout):
        super().__init__()
        self.attention = DeformableAttention(width, heads, levels, points)
        self.norm = nn.LayerNorm(width)
        self.dropout, self.ffn = nn.Dropout(dropout), FeedForward(width, ffn, dropout)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes,
                padding: Tensor) -> Tensor:
        """Update the tokens (B,S,D), given position (B,S,D) and reference (B,S,V,2).

        The position is added to the query only.
        """
        attended = self.attention(tokens + position, reference, tokens, shapes, padding)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class DecoderLayer(nn.Module):
    """Self-attention in each group, attention to the image, then a feed-forward part."""

    def __init__(self, width, heads, levels, points, ffn, dropout):
        super().__init__()
        self.self_attention = GroupSelfAttention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width, heads, levels, points)
        self.cross_norm = nn.LayerNorm(width)
        self.dropout, self.ffn = nn.Dropout(dropout), FeedForward(width, ffn, dropout)

    def forward(self, content: Tensor, position: Tensor, sizes: Sequence[int],
                denoising_groups: int, reference: Tensor, tokens: Tensor, shapes,
                padding: Tensor) -> Tensor:
        """Update the content (B,N,D), given position (B,N,D), reference (B,N,V,4), tokens (B,S,D).

        Self-attention is how duplicate queries are suppressed. A one-to-one group must therefore
        not see other groups.
        """
        attended = self.self_attention(content, position, sizes, denoising_groups)
        content = self.self_norm(content + self.dropout(attended))
        attended = self.cross_attention(content + position, reference, tokens, shapes, padding)
        return self.ffn(self.cross_norm(content + self.dropout(attended)))


def clones(module: nn.Module, n: int) -> nn.ModuleList:
    """Return n equal copies of a module, each with its own parameters."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(n))


# --- The detector ---

class HybridDETR(nn.Module):
    """Deformable DETR on a query row that is cut into groups.

    groups: queries of each group. H-DETR's hybrid branch has (300, 1500), Group DETR (300,) * 11.
    two_stage=False: each query learns its position code and its content. A linear layer turns the
        code into the point where the query starts (Deformable DETR §4.1).
    selection: 'ranks' has one pair of encoder heads. 'heads' and 'distinct' have one per group. See
        `select`.
    separate_attention=False: in training, all groups see each other (Group DETR Table 7 c).
    ffn=2048, dropout=0, mixed_selection, look_forward_twice: the tricks of H-DETR Table 8.
    fusion: none, simple, ulike or dense; see `encode`.
    denoising=True: forward accepts denoising queries (noisy ground truths, DINO).
    softmax=True: the decoder's class heads have a column "no object", for DETR's cross-entropy.
    width: a multiple of 32 (GroupNorm) and of heads.
    backbone: 'tiny' or a name for `Backbone`; frozen_backbone: see there.
    The attribute checkpoint_activations=True saves memory in training; see `call_layer`.
    Raises ValueError for an unknown selection, fusion or backbone.
    """

    def __init__(self, num_classes: int, groups: Sequence[int] = (300,),
                 backbone: str = 'resnet50', *, frozen_backbone: bool = True, width: int = 256,
                 heads: int = 8, encoder_layers: int = 6, decoder_layers: int = 6, ffn: int = 2048,
                 points: int = 4, levels: int = 4, dropout: float = 0.0,
                 mixed_selection: bool = True, look_forward_twice: bool = True,
                 two_stage: bool = True, selection: str = 'ranks', separate_attention: bool = True,
                 fusion: str = 'none', denoising: bool = False, softmax: bool = False):
        super().__init__()
        if selection not in ('ranks', 'heads', 'distinct'):
            raise ValueError(f'unknown selection {selection!r}: use ranks, heads or distinct')
        if fusion not in ('none', 'simple', 'ulike', 'dense'):
            raise ValueError(f'unknown fusion {fusion!r}: use none, simple, ulike or dense')
        self.groups, self.selection, self.fusion = tuple(groups), selection, fusion
        self.two_stage = two_stage
        self.num_classes, self.softmax, self.checkpoint_activations = num_classes, softmax, False
        self.look_forward_twice = look_forward_twice
        self.separate_attention = separate_attention
        if backbone == 'tiny':
            self.backbone = TinyBackbone()
        else:
            self.backbone = Backbone(backbone, frozen_backbone)
        channels = self.backbone.channels
        # Every level gets the width D. Further levels are convolutions of stride 2. The first takes
        # the backbone's last map, the others the level before.
        convolutions = [nn.Conv2d(c, width, 1) for c in channels[:levels]]
        while len(convolutions) < levels:
            c = channels[-1] if len(convolutions) == len(channels) else width
            convolutions.append(nn.Conv2d(c, width, 3, stride=2, padding=1))
        self.input_proj = nn.ModuleList(
            nn.Sequential(conv, nn.GroupNorm(32, width)) for conv in convolutions)
        self.level_embed = nn.Parameter(torch.empty(levels, width))
        layer = (width, heads, levels, points, ffn, dropout)
        self.encoder = clones(EncoderLayer(*layer), encoder_layers)
        # The number of maps that each projection of the memory fusion joins.
        joined = {'none': (), 'simple': (2,), 'ulike': (2,) * math.ceil(encoder_layers / 2),
                  'dense': (encoder_layers + 1,)}
        self.fusions = nn.ModuleList(
            nn.Sequential(nn.Linear(maps * width, width), nn.LayerNorm(width))
            for maps in joined[fusion])
        self.decoder = clones(DecoderLayer(*layer), decoder_layers)
        # A query learns its content. In one stage it also learns its position code.
        self.query_embed = None
        if mixed_selection or not two_stage:
            numbers = width if two_stage else 2 * width
            self.query_embed = nn.Parameter(torch.empty(sum(groups), numbers))
        if two_stage:
            self.proposal_proj = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        else:
            self.reference_points = nn.Linear(width, 2)
        if two_stage or denoising:
            self.position_proj = nn.Sequential(nn.Linear(2 * width, 2 * width),
                                               nn.LayerNorm(2 * width))
        self.denoising_content = None
        if denoising:
            # The content of a denoising query is its class. Empty slots take the last row, 0.
            self.denoising_content = nn.Embedding(num_classes + 1, width, padding_idx=num_classes)
        class_head = nn.Linear(width, num_classes)
        box_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width),
                                 nn.ReLU(), nn.Linear(width, 4))
        # Only the decoder has "no object": the encoder ranks its tokens by a sigmoid.
        decoder_class_head = nn.Linear(width, num_classes + 1) if softmax else class_head
        self.class_heads = clones(decoder_class_head, decoder_layers)
        self.box_heads = clones(box_head, decoder_layers)
        encoder_heads = (1 if selection == 'ranks' else len(groups)) if two_stage else 0
        self.encoder_class_heads = clones(class_head, encoder_heads)
        self.encoder_box_heads = clones(box_head, encoder_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does: Xavier for the matrices of the transformer.

        Scores start at 0.01, because nearly all queries are background.
        Box heads start with a shift of 0, so the first predictions are the proposals.
        """
        transformer = 'encoder.', 'decoder.', 'proposal_proj', 'position_proj', 'reference_points'
        for name, parameter in self.named_parameters():
            if name.startswith(transformer) and parameter.dim() > 1:
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
        if self.query_embed is not None:
            nn.init.normal_(self.query_embed)
        # Group DETR's encoder heads have the same tokens and ground truths. Equal heads would stay
        # equal, so all but the first are drawn anew.
        for head in (*self.encoder_class_heads[1:], *self.encoder_box_heads[1:]):
            for module in head.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        for head in (*self.class_heads, *self.encoder_class_heads):
            nn.init.constant_(head.bias, math.log(0.01 / 0.99))
            # "No object" has bias 0. Without softmax this slice is empty.
            nn.init.zeros_(head.bias[self.num_classes:])
        for head in (*self.box_heads, *self.encoder_box_heads):
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)
        if not self.two_stage:
            # Without proposals, a box starts with the size sigmoid(-2) = 0.12 of the image.
            nn.init.zeros_(self.reference_points.bias)
            nn.init.constant_(self.box_heads[0][-1].bias[2:], -2.0)

    def forward(self, images: Tensor, padding_mask: Tensor, group: int | None = None,
                noised=None) -> Outputs:
        """Detect: images (B,3,H,W), padding_mask (B,H,W) bool -> Outputs.

        train() runs every group, and eval() only the first. `group` runs that group alone.
        noised: denoising queries for the end of the row. They are `noised.boxes` (B,X*R,4) and
        `noised.labels` (B,X*R). X is `noised.groups`.
        Raises TooFewTokens if the images have fewer tokens than queries to choose.
        In eval(), torch.export allows dynamic B, H, W (Swin: dynamic B).
        """
        if group is None and not self.training:
            group = 0
        # The image: backbone and encoder.
        tokens, shapes = self.pyramid(images)  # (B, S, D)
        where = geometry(padding_mask, shapes, self.level_embed)
        tokens = self.encode(tokens, where)

        # Every query gets a box, a position code and a content.
        # Earlier groups also choose: `group` may get only the tokens that they leave.
        proposing = self.groups if group is None else self.groups[:group + 1]
        sizes = proposing if group is None else proposing[-1:]
        end, matching = sum(proposing), sum(sizes)  # `matching`: without denoising queries
        B, learned = tokens.shape[0], self.query_embed
        if learned is not None:
            learned = learned[end - matching:end].expand(B, -1, -1)
        noisy = [] if noised is None else [noised.boxes]
        if self.two_stage:
            encoder_logits, box_logits = self.propose(tokens, where, len(proposing))
            chosen = self.select(encoder_logits, box_logits, proposing)  # (B, n, 4) per group
            boxes = torch.cat([*chosen[-len(sizes):], *noisy], 1)  # (B, N, 4)
            position, content = self.code(boxes)
            # Mixed query selection: the position comes from the image, the content is learned.
            content = content[:, :matching] if learned is None else learned
        else:
            encoder_logits = tokens.new_zeros(B, 1, 0, self.num_classes)
            box_logits = tokens.new_zeros(B, 1, 0, 4)
            position, content = learned.chunk(2, -1)
            point = self.reference_points(position).to(position).sigmoid()  # (B, n, 2)
            # The logit of 0.5 is 0: the first box head alone decides the size.
            start = torch.cat([point, torch.full_like(point, 0.5)], -1)
            boxes = torch.cat([start, *noisy], 1)  # (B, N, 4)
            position = torch.cat([position, *(self.code(x)[0] for x in noisy)], 1)
        if noised is not None:
            content = torch.cat([content, self.denoising_content(noised.labels)], 1)  # (B, N, D)

        # The decoder predicts.
        seen = sizes if self.separate_attention else (matching,)
        denoising_groups = 0 if noised is None else noised.groups
        pred_logits, pred_boxes = self.decode(boxes, content, position, seen, denoising_groups,
                                              tokens, where)
        # The groups of the encoder stand one after the other.
        return Outputs(pred_logits, pred_boxes, encoder_logits.flatten(1, 2)[None],
                       box_logits.sigmoid().flatten(1, 2)[None])

    def code(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Turn boxes into position codes and contents: (B,N,4) -> 2 x (B,N,D)."""
        # Each number of a box becomes D/2 sines and cosines.
        code = sine_code(boxes, self.level_embed.shape[1] // 2)  # (B, N, 2D)
        return self.position_proj(code).chunk(2, -1)

    def call_layer(self, layer: nn.Module, *inputs):
        """Call a layer of encoder or decoder.

        With checkpoint_activations, training keeps only the layer's inputs. The backward pass
        computes the layer again. This takes more time and less memory.
        """
        if self.checkpoint_activations and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def pyramid(self, images: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        """Project the backbone's maps to one width and flatten them, fine levels first.

        (B,3,H,W) -> tokens (B,S,D) and V shapes (h, w).
        """
        maps = self.backbone(images)
        projected = [project(x) for project, x in zip(self.input_proj, maps)]  # (B, D, h, w)
        # Each further level comes from the one before.
        x = maps[-1]
        for project in self.input_proj[len(maps):]:
            x = project(x)
            projected.append(x)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in projected], 1)
        return tokens, [tuple(m.shape[2:]) for m in projected]

    def encode(self, tokens: Tensor, where: Geometry) -> Tensor:
        """Run the encoder with the memory fusion of Stable-DINO §3: (B,S,D) -> (B,S,D).

        F_0 are the backbone's tokens, and F_l is the output of encoder layer l. The fusion joins
        features and projects them to width D (linear and norm, App. B). So the decoder gets
        pretrained features from the first step on.
            simple  [F_last, F_0]
            ulike   F_0 joins the output of the last layer, F_1 of the one before, ... (Fig. 4c)
            dense   [F_0, F_1, ..., F_last], the paper's default
        Fig. 4c draws ulike for four layers, and the released code has no ulike. Here ulike fuses
        in the second half of the layers.
        """
        # Centres are fractions of the image. Attention samples at fractions of a level's padded
        # map. The valid ratio of the level converts them.
        reference = where.centres[:, :, None] * where.valid_ratios[:, None]  # (B, S, V, 2)
        outputs, last = [tokens], len(self.encoder)
        for l, layer in enumerate(self.encoder, 1):
            tokens = self.call_layer(layer, tokens, where.position, reference, where.shapes,
                                     where.padding)
            inwards = last - l  # 0 at the last layer
            if self.fusion == 'ulike' and inwards < last / 2:
                tokens = self.fusions[inwards](torch.cat([tokens, outputs[inwards]], -1))
            outputs.append(tokens)
        if self.fusion == 'simple':
            tokens = self.fusions[0](torch.cat([outputs[last], outputs[0]], -1))
        if self.fusion == 'dense':
            tokens = self.fusions[0](torch.cat(outputs, -1))
        return tokens

    def propose(self, tokens: Tensor, where: Geometry,
                n_groups: int) -> tuple[Tensor, Tensor]:
        """Predict class and box logits of every token: (B,S,D) -> (B,E,S,C), (B,E,S,4).

        E is 1 for selection 'ranks', else n_groups.
        The encoder's own loss trains every token.
        Ruled-out tokens (see `initial_boxes`) enter as 0, and share one score and the box
        (1,1,1,1). They stay in the loss and can be chosen.
        """
        initial = initial_boxes(where)  # (B, S, 4)
        ruled_out = initial[..., :1].isinf()
        features = self.proposal_proj(tokens.masked_fill(ruled_out, 0.0))  # (B, S, D)
        # Scores need float32. In bfloat16 many are equal, and their ranks would be arbitrary.
        with torch.autocast(tokens.device.type, enabled=False):
            exact = features.to(torch.promote_types(features.dtype, torch.float32))
            logits = [head(exact) for head in self.encoder_class_heads[:n_groups]]
        shifts = [head(features) for head in self.encoder_box_heads[:n_groups]]
        return torch.stack(logits, 1), torch.stack(shifts, 1) + initial[:, None]

    def select(self, logits: Tensor, box_logits: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Choose the tokens with the best scores: (B,E,S,C), (B,E,S,4) -> boxes (B,n,4) per group.

        The boxes are detached. Only the encoder's own loss trains the proposals.
            ranks     One head. The first group gets ranks 1 to n, the next group gets the ranks
                      that follow. H-DETR App. D finds the boxes of ranks 301-600 poor.
            heads     Each group takes the best of its own head, so that all groups start equally
                      well (Group DETR A.2).
            distinct  Like heads, but without the tokens of earlier groups (H-DETR App. D, where
                      only the class heads are separate).
        """
        scores = logits[..., 0]  # column "object", (B, E, S)
        wanted = sum(sizes) if self.selection != 'heads' else max(sizes)
        if wanted > scores.shape[2]:
            raise TooFewTokens(f'the image has {scores.shape[2]} tokens, too few to choose '
                               f'{wanted} queries from: use larger images or fewer queries')
        if self.selection == 'ranks':
            best = scores[:, 0].topk(wanted).indices
            chosen = [(0, top) for top in best.split(list(sizes), 1)]
        else:
            chosen = []
            taken = torch.zeros_like(scores[:, 0], dtype=torch.bool)
            for e, size in enumerate(sizes):
                top = scores[:, e].masked_fill(taken, -math.inf).topk(size).indices  # (B, n)
                chosen.append((e, top))
                if self.selection == 'distinct':
                    taken = taken.scatter(1, top, True)
        # Take the rows `top` (B, n) of box_logits[:, e] (B, S, 4).
        # With take_along_dim, torch.export would fix B.
        return [box_logits[:, e].gather(1, top[..., None].expand(-1, -1, 4)).detach().sigmoid()
                for e, top in chosen]

    def decode(self, boxes: Tensor, content: Tensor, position: Tensor, sizes: Sequence[int],
               denoising_groups: int, tokens: Tensor, where: Geometry) -> tuple[Tensor, Tensor]:
        """Refine the boxes in every layer (iterative refinement, Deformable DETR).

        boxes (B,N,4), tokens (B,S,D), content, position (B,N,D) -> (L,B,N,C), (L,B,N,4).
        `sizes` and `denoising_groups` are those of GroupSelfAttention.
        Each layer has its own heads. All layers have the same position code, as in the official
        code. DINO computes a new code in each layer.

            box_l  = sigmoid(shift_l + sigmoid^-1(box_(l-1))), box_(l-1) detached (`reference`)
            pred_l = the same, with box_(l-1) not detached (`previous`)

        Through pred_l, the loss of layer l trains the box heads l and l-1 (look forward twice,
        DINO). Without this switch, pred_l = box_l.
        """
        pred_logits, pred_boxes = [], []
        # The ratios (see `encode`) apply to centre and size.
        ratios = torch.cat([where.valid_ratios, where.valid_ratios], -1)[:, None]  # (B, 1, V, 4)
        # Both have the same values. After layer 1, only `previous` can carry a gradient.
        reference = previous = boxes
        for layer, class_head, box_head in zip(self.decoder, self.class_heads, self.box_heads):
            in_maps = reference[:, :, None] * ratios  # (B, N, V, 4)
            if layer is self.decoder[0] and not self.two_stage:
                # The query starts as a point. In a box of 2J cells, an offset of 1 is one cell.
                cells = torch.tensor([(w, h) for h, w in where.shapes])
                size = 2 * layer.cross_attention.points / cells  # (V, 2)
                in_maps[:, :sum(sizes), :, 2:] = size.to(boxes.device, non_blocking=True)
            content = self.call_layer(layer, content, position, sizes, denoising_groups, in_maps,
                                      tokens, where.shapes, where.padding)
            shift = box_head(content)
            pred_logits.append(class_head(content))
            pred_boxes.append((shift + inverse_sigmoid(previous)).sigmoid())
            refined = (shift + inverse_sigmoid(reference)).sigmoid()
            reference = refined.detach()
            previous = refined if self.look_forward_twice else reference
        return torch.stack(pred_logits), torch.stack(pred_boxes)  # (L, B, N, .)


# Parts of the model, as beginnings of parameter names.
PARTS = {'all': '', 'backbone': 'backbone.',
         'encoder': ('backbone.', 'input_proj.', 'level_embed', 'encoder.', 'fusions.')}


def parts_of(named, part: str) -> dict:
    """Return the entries of a part of PARTS. named: {name: parameter or module}, or pairs."""
    return {name: x for name, x in dict(named).items() if f'{name}.'.startswith(PARTS[part])}


def parameter_groups(model: HybridDETR, lr: float, pretrained: bool) -> list[dict]:
    """Split the trained parameters: most learn at rate lr, some at lr / 10 (official code).

    A large step of sampling offsets or reference points would move all samples off the object.
    A pretrained backbone is good already. A schedule multiplies base_lr.
    """
    slow, normal = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_slow = re.search('sampling_offsets|reference_points', name) or (
                pretrained and name.startswith('backbone'))
            (slow if is_slow else normal).append(parameter)
    return [{'params': parameters, 'lr': rate, 'base_lr': rate}
            for parameters, rate in ((normal, lr), (slow, lr / 10))]


# --- Checkpoints of HDETR/H-Deformable-DETR ---

# Pairs of a name in this file (a regular expression) and an official name. First match counts.
OFFICIAL_NAMES = [
    (r'level_embed', r'transformer.level_embed'),
    (r'query_embed', r'query_embed.weight'),
    (r'encoder\.(\d+)\.attention\.(.+)', r'transformer.encoder.layers.\1.self_attn.\2'),
    (r'encoder\.(\d+)\.norm\.(.+)', r'transformer.encoder.layers.\1.norm1.\2'),
    (r'encoder\.(\d+)\.ffn\.norm\.(.+)', r'transformer.encoder.layers.\1.norm2.\2'),
    (r'decoder\.(\d+)\.cross_attention\.(.+)', r'transformer.decoder.layers.\1.cross_attn.\2'),
    (r'decoder\.(\d+)\.cross_norm\.(.+)', r'transformer.decoder.layers.\1.norm1.\2'),
    (r'decoder\.(\d+)\.self_attention\.in_proj\.(.+)',
     r'transformer.decoder.layers.\1.self_attn.in_proj_\2'),
    (r'decoder\.(\d+)\.self_attention\.out_proj\.(.+)',
     r'transformer.decoder.layers.\1.self_attn.out_proj.\2'),
    (r'decoder\.(\d+)\.self_norm\.(.+)', r'transformer.decoder.layers.\1.norm2.\2'),
    (r'decoder\.(\d+)\.ffn\.norm\.(.+)', r'transformer.decoder.layers.\1.norm3.\2'),
    (r'(encoder|decoder)\.(\d+)\.ffn\.(.+)', r'transformer.\1.layers.\2.\3'),
    (r'(reference_points\..+)', r'transformer.\1'),
    (r'proposal_proj\.0\.(.+)', r'transformer.enc_output.\1'),
    (r'proposal_proj\.1\.(.+)', r'transformer.enc_output_norm.\1'),
    (r'position_proj\.0\.(.+)', r'transformer.pos_trans.\1'),
    (r'position_proj\.1\.(.+)', r'transformer.pos_trans_norm.\1'),
    (r'class_heads\.(\d+)\.(.+)', r'class_embed.\1.\2'),
    (r'box_heads\.(\d+)\.0\.(.+)', r'bbox_embed.\1.layers.0.\2'),
    (r'box_heads\.(\d+)\.2\.(.+)', r'bbox_embed.\1.layers.1.\2'),
    (r'box_heads\.(\d+)\.4\.(.+)', r'bbox_embed.\1.layers.2.\2'),
    (r'backbone\.body\.(.+)', r'backbone.0.body.\1'),
    (r'(input_proj\..+)', r'\1')]


def official_name(name: str, decoder_layers: int) -> str | None:
    """Return the official name of an entry of this model's state dict, or None.

    The official code has one pair of encoder heads, which follows the decoder's last pair.
    """
    name = re.sub(r'^encoder_(class|box)_heads\.0\.', rf'\1_heads.{decoder_layers}.', name)
    for pattern, official in OFFICIAL_NAMES:
        if fits := re.fullmatch(pattern, name):
            return fits.expand(official)
    return None


def from_official(state_dict: dict[str, Tensor], queries: Sequence[int] = (300, 1500),
                  mixed_selection: bool = True) -> HybridDETR:
    """Build the model of an official checkpoint, and load its weights.

    state_dict: the checkpoint's 'model'. Its shapes give layers, widths, classes, levels and the
    ResNet. All official files have 8 heads. The class columns stay COCO's raw category ids 0..90.
    queries: the queries of each group.
    Raises ValueError, which names the first unknown, missing or different entry.
    """
    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f'missing entry {name} (expected a checkpoint of H-Deformable-DETR)')
        return state_dict[name].shape

    def count(pattern: str) -> int:
        numbers = [int(m[1]) for m in (re.match(pattern, name) for name in state_dict) if m]
        return 1 + max(numbers, default=-1)

    # Read the sizes off the shapes and build the model.
    levels, width = shape('transformer.level_embed')
    layers = count(r'transformer\.decoder\.layers\.(\d+)')
    blocks = tuple(count(rf'backbone\.0\.body\.layer{stage}\.(\d+)') for stage in (1, 2, 3, 4))
    resnets = {(2, 2, 2, 2): 'resnet18', (3, 4, 6, 3): 'resnet50', (3, 4, 23, 3): 'resnet101'}
    if blocks not in resnets:
        raise ValueError(f'backbone.0.body.layer1..4 have {blocks} blocks: no known ResNet')
    weights = shape('transformer.encoder.layers.0.self_attn.attention_weights.weight')[0]
    model = HybridDETR(
        shape('class_embed.0.weight')[0], queries, resnets[blocks], width=width, levels=levels,
        encoder_layers=count(r'transformer\.encoder\.layers\.(\d+)'), decoder_layers=layers,
        ffn=shape('transformer.encoder.layers.0.linear1.weight')[0],
        points=weights // (8 * levels), mixed_selection=mixed_selection,
        two_stage='transformer.reference_points.weight' not in state_dict)
    # Load every entry under its name in this file. No entry may be left over.
    loaded, unknown = {}, set(state_dict)
    for ours, value in model.state_dict().items():
        name = official_name(ours, layers)
        if shape(name) != value.shape:
            raise ValueError(f'entry {name} is {tuple(shape(name))}, the model needs '
                             f'{tuple(value.shape)}')
        loaded[ours] = state_dict[name]
        unknown.discard(name)
        # The official decoder holds these heads again (one-stage: box heads only).
        if name.startswith('bbox_embed') or model.two_stage and name.startswith('class_embed'):
            alias = f'transformer.decoder.{name}'
            if shape(alias) != value.shape or not torch.equal(state_dict[alias], state_dict[name]):
                raise ValueError(f'entry {alias} differs from {name}, of which it is an alias')
            unknown.discard(alias)
    if unknown:
        raise ValueError(f'unknown entry {min(unknown)} ({len(unknown)} in all)')
    model.load_state_dict(loaded)
    return model


# --- The worked example: two images through a small detector ---

@torch.no_grad()
def demonstrate() -> None:
    """Print the shape after every stage. Show that the first group does not see the second."""
    torch.manual_seed(0)
    model = HybridDETR(5, groups=(4, 12), backbone='tiny', width=64, heads=4, encoder_layers=2,
                       decoder_layers=3, ffn=128, levels=3)
    images = torch.randn(2, 3, 96, 128)
    padding_mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    # The second image is narrower.
    images[1, :, :, 96:] = 0
    padding_mask[1, :, 96:] = True
    tokens, shapes = model.pyramid(images)
    where = geometry(padding_mask, shapes, model.level_embed)
    encoded = model.encode(tokens, where)
    logits, box_logits = model.propose(encoded, where, n_groups=2)
    first, second = model.select(logits, box_logits, model.groups)
    in_training = model(images, padding_mask)
    at_inference = model.eval()(images, padding_mask)
    levels = ', '.join(map(str, shapes))
    print(f'2 images, C = 5 classes, groups of {model.groups} queries, levels of {levels} cells\n')
    for stage, letters, x in (
            ('images', 'B 3 H W', images),
            ('pyramid: backbone, one width', 'B S D', tokens),
            ('encoder', 'B S D', encoded),
            ('proposals: scores of each token', 'B E S C', logits),
            ('proposals: boxes', 'B E S 4', box_logits),
            ('the best become queries', 'B n 4', first),
            ('and the next best, for group two', 'B n 4', second),
            ('decoder in train(): scores', 'L B N C', in_training.pred_logits),
            ('boxes', 'L B N 4', in_training.pred_boxes),
            ('decoder in eval(): one group', 'L B n 4', at_inference.pred_boxes)):
        print(f'{stage:36}{letters:10}{tuple(x.shape)}')
    model.query_embed[4:] += 1.0
    moved = (model.train()(images, padding_mask).pred_logits - in_training.pred_logits).abs()
    print(f'\nWith other content in group two, its scores move by up to '
          f'{moved[:, :, 4:].max():.2f}, and those of group one by {moved[:, :, :4].max():g}.')


if __name__ == '__main__':
    demonstrate()
