"""COCO average precision, other measures of the papers, result files and pictures for a trained detector.

    python eval.py --weights runs/group/checkpoint.pt                          its own data, the 12 COCO numbers
    python eval.py --weights runs/group/checkpoint.pt --pictures 8             ground truth beside predictions
    python eval.py --weights runs/group/checkpoint.pt --pr-curve pr.png        precision over recall
    python eval.py --weights runs/group/checkpoint.pt --unstable 20            does the matching change between layers?
    python eval.py --weights runs/group/checkpoint.pt --matches matches.png    who answers for whom, in every scheme
    python eval.py --weights official.pth --data COCO                          a checkpoint of HDETR/H-Deformable-DETR
    python eval.py --benchmark                                                 time and memory of all schemes

Letters as in hybrid_detr.py: B images, L decoder layers, N queries, C classes.
"""
import argparse
import contextlib
import io
import json
import math
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import batched_nms, box_convert, generalized_box_iou, sigmoid_focal_loss
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

import hybrid_detr
from data import (IMAGENET_MEAN, IMAGENET_STD, Categories, Dataset, FirstImages, UserError, collate, open_dataset,
                  train_loader, val_loader)
from hybrid_detr import HybridDETR, Outputs, from_official
from losses import criterion
from matchers import Cost, assign, class_scores, denoising_queries, encoder_groups, match, matching_cost, query_groups

METRICS = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large',
           'AR1', 'AR10', 'AR100', 'AR_small', 'AR_medium', 'AR_large')


# --- Checkpoints ----------------------------------------------------------------------------------------------------

def read_checkpoint(path: str) -> dict:
    """The content of a checkpoint file, as data: no code in it is run. Raises UserError if it cannot be read."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):   # the official files hold their settings in one
            content = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'checkpoint {path} does not exist') from None
    except Exception as error:   # a damaged file, or one with code in it, can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f'{path} is no readable checkpoint: {reason}') from None
    model = content.get('model') if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(
            isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided
            and not x.is_quantized and not x.is_meta for name, x in model.items()):
        raise UserError(f"{path} is no checkpoint of a detector: it has no entry 'model' of names and tensors")
    broken = next((name for name, x in model.items() if not x.isfinite().all()), None)
    if broken:
        raise UserError(f'{path} holds a model that diverged: {broken} is not finite')
    return content


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics file. The last line of a killed run may be torn; another bad one raises UserError."""
    lines, records = path.read_text(errors='replace').splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            records[-1]['step'] + 0
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                raise UserError(f'line {number} of {path} is no record of a training step') from None
            return records[:number - 1]
    return records


def is_official(checkpoint: dict) -> bool:
    return 'architecture' not in checkpoint


def categories_of(checkpoint: dict) -> Categories:
    ids, names = checkpoint['categories']['ids'], checkpoint['categories']['names']
    for values, kind in ((ids, int), (names, str)):
        if not isinstance(values, list) or len(values) != len(ids) or not all(isinstance(x, kind) for x in values):
            raise ValueError('its categories are no lists of ids and names')
    return Categories(ids, names)


def load_detector(path: str) -> tuple[HybridDETR, Categories | None, dict]:
    """-> the model in eval mode, the categories of its columns (None: COCO's raw ids), the settings of its training.

    Raises UserError if the file does not hold a detector of this project or of HDETR/H-Deformable-DETR.
    """
    checkpoint = read_checkpoint(path)
    try:
        if is_official(checkpoint):
            mixed = 'query_embed.weight' in checkpoint['model']
            rows = len(checkpoint['model']['query_embed.weight']) if mixed else 300
            groups = (300, rows - 300) if rows > 300 else (rows,)   # the official files have 300 one-to-one queries
            return from_official(checkpoint['model'], groups, mixed).eval(), None, {}
        model = HybridDETR(**checkpoint['architecture'])
        model.load_state_dict(checkpoint['model'])
        categories, settings = categories_of(checkpoint), dict(checkpoint['settings'])
        if len(categories) != model.num_classes:
            raise ValueError(f'it has {model.num_classes} classes and the names of {len(categories)}')
        if not isinstance(settings.get('data', ''), str):
            raise TypeError(f'its settings have the data {settings["data"]!r}')
        for name, least in dict(image_size=32, batch_size=1, seed=0, overfit=0).items():
            if not isinstance(settings.get(name, least), int) or settings.get(name, least) < least:
                raise TypeError(f'its settings have the {name} {settings[name]!r}')
        if settings.get('seed', 0) >= 2 ** 31:
            raise ValueError(f'its settings have the seed {settings["seed"]}')
    except Exception as error:   # entries may be missing, or anything: it is somebody's file
        raise UserError(f'{path} does not fit: {type(error).__name__} {" ".join(str(error).split())[:200]}') from None
    return model.eval(), categories, settings


# --- From outputs to detections -------------------------------------------------------------------------------------

def detections(outputs: Outputs, sizes: list[tuple[int, int]], top: int = 100, nms: float | None = None,
               softmax: bool = False):
    """The `top` best of all N*C scores of the last layer: -> per image scores (k,) in falling order, labels (k,),
    boxes_xyxy (k,4) in pixels of the stored image; k = min(top, N*C), or less with NMS.

    A query may appear with several classes (Deformable DETR's official post-processing, 100 in H-DETR's). With NMS at
    IoU `nms`, the best 10 * top are thinned out first: else duplicates would take the places of other objects.
    softmax: of a model trained with cross-entropy.
    """
    probability = class_scores(outputs.pred_logits[-1].float(), softmax)                            # (B, N, C)
    B, N, C = probability.shape
    scores, flat = probability.flatten(1).topk(min(top if nms is None else 10 * top, N * C), 1)
    labels, query = flat % C, flat // C
    boxes = box_convert(outputs.pred_boxes[-1].float(), 'cxcywh', 'xyxy').gather(1, query[..., None].expand(-1, -1, 4))
    boxes = boxes * torch.tensor([[w, h, w, h] for h, w in sizes], device=boxes.device)[:, None]
    kept = []
    for s, l, b in zip(scores, labels, boxes):
        keep = slice(None) if nms is None else batched_nms(b, s, l, nms)[:top]
        kept.append((s[keep], l[keep], b[keep]))
    return kept


@torch.inference_mode()
def detect(model: HybridDETR, dataset: Dataset, ids: list[int], *, batch_size: int, workers: int,
           nms: float | None = None, group: int = 0) -> np.ndarray:
    """Run the detector over a data set: rows of (image id, x, y, w, h, score, category id). ids: of the class columns.

    Under torchrun every process takes its share of the images, and all get all rows. The model is left as it was.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, was_training = next(model.parameters()).device, model.training
    rows, id_of = [np.zeros((0, 7))], np.array(ids)
    model.eval()
    loader = val_loader(dataset, batch_size, workers, rank, world)
    for batch in tqdm(loader, desc='evaluate', leave=False, disable=rank > 0 or None):
        batch = batch.to(device)
        try:
            outputs = model(batch.images, batch.padding_mask, group)
        except ValueError as error:
            raise UserError(f'{batch.names[0]}: {error}') from None
        for image_id, (scores, labels, boxes) in zip(batch.image_ids,
                                                     detections(outputs, batch.sizes, nms=nms, softmax=model.softmax)):
            xywh = box_convert(boxes, 'xyxy', 'xywh').double().cpu().numpy()
            rows.append(np.column_stack([np.full(len(xywh), image_id), xywh, scores.double().cpu(),
                                         id_of[labels.cpu()]]))
    model.train(was_training)
    rows = np.concatenate(rows)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, rows)
        rows = np.concatenate(shares)
    return rows


def duplicate_rate(rows: np.ndarray) -> float:
    """The part of the detections of score above 0.3 that NMS at IoU 0.7 would remove; 0 if there are none."""
    rows = torch.from_numpy(rows[rows[:, 5] > 0.3])
    image_and_class = rows[:, [0, 6]].unique(dim=0, return_inverse=True)[1]
    kept = batched_nms(box_convert(rows[:, 1:5], 'xywh', 'xyxy'), rows[:, 5], image_and_class, 0.7)
    return (len(rows) - len(kept)) / max(len(rows), 1)


def average_precision(coco_json: dict, rows: np.ndarray, table: bool = False, curve: str | None = None):
    """pycocotools' 12 numbers for the rows of `detect` and oLRP with its parts, by name, and AP by category id.

    table=True prints pycocotools' table and oLRP; curve: PNG to draw precision over recall to.
    """
    from pycocotools.coco import COCO   # only needed here: training and inference run without it
    from pycocotools.cocoeval import COCOeval
    if not coco_json['images']:
        raise UserError('there are no images to evaluate on')
    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter):
        truth = COCO()
        truth.dataset = coco_json
        truth.createIndex()
        found = truth.loadRes(rows) if len(rows) else COCO()
        if not len(rows):
            found.dataset = {'images': coco_json['images'], 'annotations': [], 'categories': coco_json['categories']}
            found.createIndex()
        evaluation = COCOeval(truth, found, 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.nullcontext() if table else contextlib.redirect_stdout(chatter):
        evaluation.summarize()
    precision = evaluation.eval['precision'][:, :, :, 0, -1]  # (IoU thresholds, recalls, classes); -1: no ground truth
    by_class = {}
    for k, category_id in enumerate(evaluation.params.catIds):
        known = precision[..., k][precision[..., k] > -1]
        by_class[category_id] = float(known.mean()) if known.size else math.nan
    errors = optimal_lrp(evaluation)
    if table:
        print(' oLRP @[ IoU=0.50 ] = {oLRP:.3f}: localization {oLRP_Loc:.3f}, false positives {oLRP_FP:.3f}, '
              'false negatives {oLRP_FN:.3f}'.format(**errors))
    if curve:
        draw_curve(precision, curve)
    return {**dict(zip(METRICS, evaluation.stats.tolist())), **errors}, by_class


def optimal_lrp(evaluation) -> dict[str, float]:
    """oLRP, the optimal Localization Recall Precision error at IoU 0.5, and its parts: 0 is perfect, 1 the worst.

        LRP(s) = (sum over TP of (1 - IoU) / 0.5 + #FP + #FN) / (#TP + #FP + #FN),  of the detections of score >= s
        oLRP = min over s;  there Loc = mean over TP of 1 - IoU,  FP = 1 - precision,  FN = 1 - recall

    Oksuz et al., ECCV 2018; H-DETR Fig. 4. TP and FP are those of a COCOeval after `evaluate` (all areas, the 100 best
    detections of a class in an image, crowds ignored); the mean is over the classes with ground truth. A class without
    detections, or better off without, has oLRP 1 and FN 1 and no Loc and FP: their means leave it out. As in COCO's
    numbers, -1 is the mean of no class at all.
    """
    params, found = evaluation.params, [np.zeros((0, 4))]
    for k in range(len(params.catIds)):
        first = k * len(params.areaRng) * len(params.imgIds)   # of the class's images; the first area is 'all'
        results = [r for r in evaluation.evalImgs[first:first + len(params.imgIds)] if r]
        targets = sum(int((r['gtIgnore'] == 0).sum()) for r in results)
        if not targets:
            continue
        pairs = [(math.inf, 0, 0.0)]   # score, is it a TP, 1 - IoU; the first is the threshold above all scores
        for r in results:
            key = r['image_id'], r['category_id']
            column = {gt['id']: j for j, gt in enumerate(evaluation._gts[key])}
            at_half = zip(r['dtScores'], r['dtMatches'][0], r['dtIgnore'][0])   # the first IoU threshold is 0.5
            pairs += [(score, 1, 1 - evaluation.ious[key][i][column[gt]]) if gt else (score, 0, 0.0)
                      for i, (score, gt, ignored) in enumerate(at_half) if not ignored]
        score, hit, error = np.array(sorted(pairs, key=lambda pair: -pair[0])).T
        tp, fp, error = hit.cumsum(), (1 - hit).cumsum() - 1, error.cumsum()   # -1: the first is no detection
        lrp = (error / 0.5 + fp + targets - tp) / (targets + fp)
        lrp[:-1][score[:-1] == score[1:]] = math.inf   # a threshold cannot divide equal scores
        with np.errstate(invalid='ignore'):   # 0 / 0 is nan: without a TP, which is best only without any detection
            found.append(np.stack([lrp, error / tp, fp / (tp + fp), 1 - tp / targets], 1)[[lrp.argmin()]])
    known = [column[~np.isnan(column)] for column in np.concatenate(found).T]
    return {name: float(column.mean()) if len(column) else -1.0
            for name, column in zip(('oLRP', 'oLRP_Loc', 'oLRP_FP', 'oLRP_FN'), known)}


# --- How stable the matching is -------------------------------------------------------------------------------------

def cost_of(settings: dict) -> Cost:
    """The matching cost that a detector is trained with, by the flags of train.py; the plain one without any."""
    default = Cost()
    return Cost(settings.get('cost', default.kind), settings.get('cost_class', default.class_weight),
                settings.get('f2', default.f2), settings.get('official_losses', False),
                settings.get('cls_loss') == 'ce')


@torch.inference_mode()
def unstable_score(model: HybridDETR, dataset: Dataset, ids: list[int], n_images: int = 20, cost: Cost = Cost(), *,
                   batch_size: int = 1, workers: int = 0) -> list[float]:
    """Stable-DINO §2.4.3, Fig. 3: for each decoder layer the percentage of ground truths whose query is another one
    than in the layer before. Layer 1 is compared with the encoder: its proposal number i is the start of query i.

    Of the first group, the detector, matched one-to-one whatever the scheme; in the encoder with all labels 0, as in
    training. The paper's example is one image; this is the percentage of all ground truths of the first n_images, and
    an empty list without any. ids: of the class columns. The model is left as it was.
    """
    column_of = torch.tensor([ids.index(category_id) for category_id in dataset.categories.ids])
    device, was_training, changed, total = next(model.parameters()).device, model.training, 0, 0
    model.eval()
    for batch in val_loader(FirstImages(dataset, n_images), batch_size, workers):
        batch = batch.to(device)
        outputs = model(batch.images, batch.padding_mask, 0)   # of one group, so the encoder has one head
        L, _, n, _ = outputs.pred_logits.shape
        chosen = outputs.encoder_logits[..., 0].topk(n, 2).indices[..., None]   # (1, B, n, 1), as in HybridDETR.select
        proposals = [x.gather(2, chosen.expand(-1, -1, -1, x.shape[3])) for x in outputs[2:4]]
        groups = query_groups('one2one', L, n=n)
        try:
            columns = [column_of.to(device)[labels] for labels in batch.gt_labels]
            decoder, encoder = match(*outputs[:2], *proposals, columns, batch.gt_boxes, groups,
                                     encoder_groups(groups, 1, n), cost)
        except FloatingPointError as error:
            raise UserError(f'{batch.names[0]}: {error}') from None
        query = torch.full((L + 1, sum(map(len, batch.gt_labels))), -1, device=device)   # -1: more objects than queries
        query[0, encoder.gt] = encoder.query
        query[decoder.layer + 1, decoder.gt] = decoder.query
        changed, total = changed + (query[1:] != query[:-1]).sum(1), total + query.shape[1]
    model.train(was_training)
    return (100 * changed / total).tolist() if total else []


# --- Pictures -------------------------------------------------------------------------------------------------------

def as_picture(image: Tensor) -> Tensor:
    """Undo `data.normalise`: float (3,H,W) -> uint8 (3,H,W)."""
    mean, std = (torch.tensor(x, device=image.device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return v2.functional.to_dtype((image * std + mean).clamp(0, 1), torch.uint8, scale=True).cpu()


# Okabe and Ito's colours, told apart by the colour-blind and in print; a class keeps its colour in both pictures.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#F0E442', '#000000')


def draw_boxes(picture: Tensor, boxes: Tensor, labels: list[int], texts: list[str]) -> Tensor:
    """uint8 (3,H,W) and boxes (M,4) as fractions -> the picture with boxes and texts, its short side at least 384."""
    scale = max(1, -(-384 // min(picture.shape[1:])))
    picture = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if not len(boxes):
        return picture
    height, width = picture.shape[1:]
    corners = box_convert(boxes.cpu(), 'cxcywh', 'xyxy').clamp(0, 1) * torch.tensor([width - 1, height - 1] * 2)
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    return draw_bounding_boxes(picture, corners, texts, colors=colours, width=2, label_colors='white',
                               label_background_colors=colours, fill_labels=True)


def save_grid(rows: list[list[Tensor]], path: Path) -> None:
    """Save a PNG of pictures, uint8 (3,H,W) each, row by row with white between them."""
    def joined(pictures, across):   # along the width or the height
        side = max(picture.shape[3 - across] for picture in pictures)
        padded = [v2.functional.pad(p, [0, 0, 8, side - p.shape[1]] if across == 2 else [0, 0, side - p.shape[2], 8],
                                    fill=255) for p in pictures]
        return torch.cat(padded, across)
    grid = joined([joined(row, 2) for row in rows], 1)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


@torch.inference_mode()
def draw_predictions(model: HybridDETR, dataset: Dataset, ids: list[int], path: Path, n: int = 4,
                     threshold: float = 0.3, nms: float | None = None, group: int = 0) -> None:
    """Save a PNG, a row for each of the first n images: ground truth left, predictions of score >= threshold right."""
    device, was_training, rows = next(model.parameters()).device, model.training, []
    names = dict(zip(dataset.categories.ids, dataset.categories.names))
    model.eval()
    for batch in val_loader(FirstImages(dataset, n), 1, 0):
        outputs = model(batch.images.to(device), batch.padding_mask.to(device), group)
        (scores, labels, boxes), = detections(outputs, [(1, 1)], nms=nms, softmax=model.softmax)
        good = scores >= threshold
        shown = [dataset.categories.label_of.get(ids[label], 0) for label in labels[good].tolist()]
        texts = [f'{names.get(ids[label], ids[label])} {score:.2f}'
                 for label, score in zip(labels[good].tolist(), scores[good].tolist())]
        picture, truth = as_picture(batch.images[0]), batch.gt_labels[0].tolist()
        pair = [draw_boxes(picture, batch.gt_boxes[0], truth, [dataset.categories.names[label] for label in truth]),
                draw_boxes(picture, box_convert(boxes[good], 'xyxy', 'cxcywh'), shown, texts)]
        rows.append(pair)
    model.train(was_training)
    save_grid(rows, path)


@torch.inference_mode()
def draw_matches(model: HybridDETR, dataset: Dataset, ids: list[int], path: str, index: int,
                 cost: Cost = Cost()) -> None:
    """Save a PNG of one image, again and again: whom each scheme makes answer for whom, given the same predictions.

    The row of N queries, the first group of the model in its last layer, is cut as each scheme would cut it, with three
    copies where copies are. A line leads from the centre of a query's box to the ground truth that it has to find, in
    the colour of its group. Raises UserError for an image without objects, or for fewer than 4 queries.
    """
    sample, device, was_training = dataset[0, index], next(model.parameters()).device, model.training
    batch = collate([sample]).to(device)
    model.eval()
    outputs = model(batch.images, batch.padding_mask, 0)
    model.train(was_training)
    N, M = outputs.pred_boxes.shape[2], len(sample.boxes)
    if not M or N < 4:
        raise UserError(f'--matches: {sample.name} has {M} objects, the model {N} queries; it takes one and four')
    columns = torch.tensor([ids.index(dataset.categories.ids[label]) for label in sample.labels.tolist()])
    costs = [matching_cost(outputs.pred_logits[-1:, 0], outputs.pred_boxes[-1:, 0], columns.to(device),
                           batch.gt_boxes[0], cost).cpu()]
    q, found = N // 4, outputs.pred_boxes[-1, 0].cpu()
    panels = {f'one2one: {N} queries': dict(scheme='one2one', n=N),
              f'one2many (also epoch at first, and the first layers of layer): {N} queries, K = 3':
              dict(scheme='one2many', n=N, K=3),
              f'branch: {q} queries | T = {N - q} queries, K = 3': dict(scheme='branch', n=q, T=N - q, K=3),
              f'group: G = 4 groups of {q} queries': dict(scheme='group', n=q, G=4)}
    photograph, pictures = dataset.load(index)[0].convert('L').convert('RGB'), []   # grey, so that the colours tell
    photograph = photograph.resize([round(side * 1200 / max(photograph.size)) for side in photograph.size])
    (width, height), font = photograph.size, ImageFont.load_default(size=30)
    for title, row in panels.items():
        groups = query_groups(layers=1, **row)
        picture = Image.new('RGB', (width, height + 50), 'white')
        picture.paste(photograph, (0, 50))
        pen = ImageDraw.Draw(picture)
        pen.text((0, 22), title, 'black', font, anchor='lm')

        def box(cxcywh, colour, thick):
            x0, y0, x1, y1 = (box_convert(cxcywh, 'cxcywh', 'xyxy').clamp(0, 1) *
                              torch.tensor([width - 1, height - 1] * 2)).tolist()
            pen.rectangle((x0, y0 + 50, x1, y1 + 50), outline=colour, width=thick)
            return (x0 + x1) / 2, (y0 + y1) / 2 + 50

        for truth in sample.boxes:
            box(truth, 'white', 12)
            box(truth, 'black', 6)
        group_of = [g for g, group in enumerate(groups) for _ in range(group.queries)]
        matches = assign(costs, groups)
        for query, gt in zip(matches.query.tolist(), matches.gt.tolist()):
            colour = COLOURS[group_of[query]]
            ends = box(found[query], colour, 3), box(sample.boxes[gt], None, 1)
            pen.line(ends, 'white', 9)
            pen.line(ends, colour, 5)
            pen.ellipse([ends[0][i] + d for d in (-11, 11) for i in (0, 1)], colour, 'white', 3)
        pictures.append(v2.functional.pil_to_tensor(picture.reduce(2)))
    save_grid([pictures[:2], pictures[2:]], Path(path))


def draw_lines(lines: dict[str, tuple], names: tuple[str, str], limits: tuple[float, float], path: str) -> None:
    """Save a PNG of lines {text: (x values, y values)}; names and limits: of the x and y axis, which start at 0."""
    image = Image.new('RGB', (1600, 1200), 'white')   # twice the final size, for smooth lines
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=40)
    top = 120 + 50 * -(-len(lines) // 3)

    def at(x, y):
        return 130 + 1420 * x / limits[0], 1060 - (1060 - top) * y / limits[1]

    for axis, limit in enumerate(limits):
        step = next(step for power in range(-3 if limit <= 1 else 0, 9) for digit in (1, 2, 5)   # layers are whole
                    if limit / (step := digit * 10.0 ** power) <= 6)
        for tick in np.arange(0, limit * 1.001, step):
            (x, y), text = at(*((tick, 0) if axis == 0 else (0, tick))), f'{tick:.4g}'
            pen.line((x, y, *(at(tick, limits[1]) if axis == 0 else at(limits[0], tick))), '#DDDDDD', 2)
            pen.text((x, y + 16) if axis == 0 else (x - 16, y), text, 'black', font, anchor='mt' if axis == 0 else 'rm')
    pen.line((at(0, limits[1]), at(0, 0), at(limits[0], 0)), 'black', 4)
    pen.text((at(limits[0] / 2, 0)[0], 1180), names[0], 'black', font, anchor='mb')
    pen.text((20, top - 40), names[1], 'black', font, anchor='lm')
    for i, (text, (x, y)) in enumerate(lines.items()):   # the legend stands above the axes, where no line can be
        pen.line([at(*point) for point in zip(x, y)], COLOURS[i % len(COLOURS)], 8, joint='curve')
        left, middle = 20 + i % 3 * 525, 50 + i // 3 * 50
        pen.line((left, middle, left + 60, middle), COLOURS[i % len(COLOURS)], 8)
        pen.text((left + 76, middle), text, 'black', font, anchor='lm')
    image.reduce(2).save(path)


def draw_curve(precision: np.ndarray, path: str) -> None:
    """Save a PNG of precision over recall (H-DETR Fig. 7), the mean over the classes with ground truth.

    precision (IoU thresholds, recalls, classes) of COCOeval, -1 for a class without ground truth. The area under a
    curve is its AP. Raises UserError if no class has ground truth.
    """
    precision = precision[:, :, (precision > -1).all((0, 1))]
    if not precision.size:
        raise UserError(f'{path}: without ground truth there is no precision-recall curve')
    curves = precision.mean(2)   # IoU 0.50, 0.55, ... 0.95
    curves = {'IoU 0.5': curves[0], 'IoU 0.75': curves[5], 'mean of 0.5-0.95': curves.mean(0)}
    recall = np.linspace(0, 1, precision.shape[1])
    draw_lines({f'{name}: AP {curve.mean():.3f}': (recall, curve) for name, curve in curves.items()},
               ('recall', 'precision'), (1, 1), path)


def compare(folders: list[str], picture: str | None = None, unstable: str | None = None) -> None:
    """Print the results of several runs, and draw their AP over the steps (Group DETR Fig. 1, H-DETR Fig. 4), and of
    those with --unstable the last unstable scores over the layers (Stable-DINO Fig. 3).

    Folders whose names differ only in what follows the last '-', the seed, are repetitions: a row and a line of their
    means. Raises UserError if a folder holds no evaluated run, or repetitions differ in their evaluations.
    """
    runs: dict[str, list[list[dict]]] = {}
    for folder in folders:
        file = Path(folder) / 'metrics.jsonl'
        if not file.is_file():
            raise UserError(f'{file} does not exist: --compare takes folders of train.py')
        evaluations = [record for record in read_metrics(file) if 'AP' in record]
        for record in evaluations:
            if not all(isinstance(record.get(key), (int, float)) for key in ('AP', 'AP50', 'duplicates')):
                raise UserError(f'{file}: the evaluation of step {record["step"]} lacks a number')
        runs.setdefault(Path(folder).name.rsplit('-', 1)[0], []).append(evaluations)
    lines, of_layers = {}, {}
    print('| run | seeds | steps | AP | AP50 | duplicates |\n|---|---|---|---|---|---|')
    for name, repetitions in runs.items():
        steps = [record['step'] for record in repetitions[0]]
        if not steps or any([record['step'] for record in run] != steps for run in repetitions):
            raise UserError(f'{name}: its runs have no evaluations, or not at the same steps')
        last = [run[-1] for run in repetitions]
        print('| ' + ' | '.join([name, str(len(last)), str(steps[-1]), *(
            f'{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})' for values in (
                [record[key] for record in last] for key in ('AP', 'AP50', 'duplicates')))]) + ' |')
        lines[name] = [0, *steps], [0, *np.mean([[record['AP'] for record in run] for run in repetitions], 0)]
        if all(record.get('unstable') for record in last):
            of_layers[name] = np.mean([record['unstable'] for record in last], 0)
    if unstable and not of_layers:
        raise UserError('--unstable-curves: none of the runs was trained with --unstable N')
    print('AP, AP50 and duplicates: mean (lowest-highest) over the seeds')
    if picture:
        draw_lines(lines, ('steps', 'AP'), (max(x[-1] for x, _ in lines.values()),
                                            max(1e-3, *(max(y) for _, y in lines.values()))), picture)
        print(f'picture: {picture}')
    if unstable:
        for name, scores in of_layers.items():
            print(f'{name}: unstable score of layer 1 to {len(scores)}: {", ".join(f"{x:.1f} %" for x in scores)}')
        draw_lines({name: (range(1, len(scores) + 1), scores) for name, scores in of_layers.items()},
                   ('decoder layer', 'unstable score, %'), (max(map(len, of_layers.values())),
                                                            max(1e-3, *map(max, of_layers.values()))), unstable)
        print(f'picture: {unstable}')


# --- Benchmark ------------------------------------------------------------------------------------------------------

def published_loss(outputs: Outputs, gt_labels: list[Tensor], gt_boxes: list[Tensor], groups, num_boxes: float):
    """The loss of a scheme as the released code of H-DETR computes it: a matcher and a criterion for every layer and
    group, ground truths repeated before the cost, costs between all images, one-hot targets with a background column.

    Here only to be measured against, and to give the same number (test_all.py).
    """
    total, first = 0.0, 0
    calls = [(outputs.encoder_logits[0], outputs.encoder_boxes[0], 1, 1.0, [torch.zeros_like(x) for x in gt_labels])]
    for group in groups:
        rows = slice(first, first := first + group.queries)
        calls += [(logits[:, rows], boxes[:, rows], copies, group.weight, gt_labels) for logits, boxes, copies in
                  zip(outputs.pred_logits, outputs.pred_boxes, group.copies)]
    for logits, boxes, copies, weight, labels in calls:
        B, n, C = logits.shape
        labels, targets = [x.repeat(copies) for x in labels], [x.repeat(copies, 1) for x in gt_boxes]
        with torch.no_grad():
            p, xyxy = logits.flatten(0, 1).sigmoid(), box_convert(torch.cat(targets), 'cxcywh', 'xyxy')
            cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
            cost = 2 * cost[:, torch.cat(labels)] + 5 * torch.cdist(boxes.flatten(0, 1), torch.cat(targets), p=1)
            cost -= 2 * generalized_box_iou(box_convert(boxes.flatten(0, 1), 'cxcywh', 'xyxy'), xyxy)
            cost = cost.view(B, n, -1).cpu().split([len(x) for x in targets], -1)
            pairs = [[torch.from_numpy(i) for i in linear_sum_assignment(c[b])] for b, c in enumerate(cost)]
        image = torch.cat([torch.full_like(query, b) for b, (query, _) in enumerate(pairs)])
        query = torch.cat([query for query, _ in pairs])
        classes = torch.full((B, n), C, device=logits.device)
        classes[image, query] = torch.cat([x[gt] for x, (_, gt) in zip(labels, pairs)])
        target = F.one_hot(classes, C + 1)[..., :-1].to(logits.dtype)
        wanted = torch.cat([x[gt] for x, (_, gt) in zip(targets, pairs)])
        corners = (box_convert(x, 'cxcywh', 'xyxy') for x in (boxes[image, query], wanted))
        loss = (2 * sigmoid_focal_loss(logits, target, 0.25, 2).sum() + 5 * (boxes[image, query] - wanted).abs().sum()
                + 2 * (1 - generalized_box_iou(*corners).diag()).sum())
        total = total + weight * loss / max(copies * num_boxes, 1.0)
    return total


def published_self_attention(self, content: Tensor, position: Tensor, groups, denoising: int = 0) -> Tensor:
    """GroupSelfAttention.forward with one attention over the whole row and an (N,N) mask, as in H-DETR's code."""
    owner = torch.arange(len(groups), device=content.device).repeat_interleave(
        torch.tensor(groups).to(content.device, non_blocking=True), output_size=sum(groups))
    q = (content + position).transpose(0, 1)
    return F.multi_head_attention_forward(
        q, q, content.transpose(0, 1), q.shape[-1], self.heads, self.in_proj.weight, self.in_proj.bias, None, None,
        False, 0.0, self.out_proj.weight, self.out_proj.bias, attn_mask=owner[:, None] != owner)[0].transpose(0, 1)


def published_deformable_attention(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The pure PyTorch form that comes with the released code: all samples of all levels side by side."""
    B, _, heads, d = value.shape
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)                                   # (B*heads, N, V, P, 2)
    maps = (level.permute(0, 2, 3, 1).reshape(B * heads, d, h, w)
            for (h, w), level in zip(shapes, value.split([h * w for h, w in shapes], 1)))
    samples = [F.grid_sample(level, grid[:, :, v], align_corners=False) for v, level in enumerate(maps)]
    samples = torch.stack(samples, 3)                                                          # (B*heads, d, N, V, P)
    out = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum((3, 4))
    return out.view(B, heads * d, -1).transpose(1, 2)


def has_bfloat16(device: torch.device) -> bool:
    """Where --amp is the default: on a CUDA device that computes in bfloat16 and does not only emulate it."""
    return device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


def compile_attention(device: torch.device) -> None:
    """--compile, for this process. Raises UserError if torch has no compiler to work with."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except RuntimeError as error:   # the first of many lines says what is missing
        raise UserError(f'--compile: torch cannot compile here ({str(error).splitlines()[0]}): install what it names, '
                        'or leave the flag out') from None
    hybrid_detr.deformable_attention = torch.compile(hybrid_detr.deformable_attention)


class Clock:
    """Seconds of each stage of a row's steps; waits for the GPU at the end of a stage."""

    def __init__(self, device: torch.device):
        self.device, self.rounds = device, []

    def now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> 'Clock':
        self.rounds.append({})
        self.last = self.now()
        return self

    def tick(self, stage: str) -> None:
        now = self.now()
        self.rounds[-1][stage] = now - self.last
        self.last = now

    def seconds(self, stages=None) -> list[float]:
        """Of each round but the first, which warms up: the sum of these stages, or of all."""
        return [sum(value for stage, value in r.items() if not stages or stage in stages) for r in self.rounds[1:]]


def spread(values: list[float]) -> str:
    """Median, fastest and slowest."""
    return f'{np.median(values):.3g} ({min(values):.3g}-{max(values):.3g})'


class BenchmarkRow:
    """A model in training, and what its steps took.

    given: flags of train.py, and `checkpoint_activations`, or `published` for the released code's way: a mask in
    self-attention, its deformable attention, its loss and an optimizer that goes parameter by parameter.
    """

    def __init__(self, given: dict, num_classes: int, device: torch.device, amp: bool):
        import train   # which imports this file
        given = dict(given)
        checkpointed, self.published = (given.pop(x, False) for x in ('checkpoint_activations', 'published'))
        self.settings, self.amp, self.device = train.complete(given), amp, device
        torch.manual_seed(0)
        # As in training; only that the weights of a pretrained backbone need not be there to take their time.
        self.model = HybridDETR(**train.architecture(self.settings, num_classes)).to(device).train()
        self.model.checkpoint_activations = checkpointed
        self.model.backbone.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(train.parameter_groups(self.model, self.settings), foreach=False,
                                           fused=not self.published)
        self.loss_of, self.row = train.loss_of, train.row_of(self.settings)
        self.clock, self.inference, self.memory = Clock(device), Clock(device), 0

    def loss(self, batch, num_boxes: float) -> Tensor:
        tick = self.clock.tick
        if not self.published:
            parts, _ = self.loss_of(self.model, self.model, batch, self.settings, 0.0, num_boxes, self.amp, tick)
            return sum(parts.values())
        with self.patches(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            outputs = self.model(batch.images, batch.padding_mask)
        tick('forward')
        loss = published_loss(Outputs(*(x.float() for x in outputs)), batch.gt_labels, batch.gt_boxes,
                              query_groups(layers=len(self.model.decoder), **self.row), num_boxes)
        tick('loss')
        return loss

    def patches(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.published:
            stack.enter_context(mock.patch.object(hybrid_detr, 'deformable_attention', published_deformable_attention))
            stack.enter_context(mock.patch.object(hybrid_detr.GroupSelfAttention, 'forward', published_self_attention))
        return stack

    def step(self, batch) -> None:
        """A training step and an inference. The memory is CUDA's peak above what was there before; on the CPU, which
        keeps no such account, the bytes that forward keeps for backward."""
        kept, num_boxes = {}, float(sum(map(len, batch.gt_boxes)))

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        first = not self.clock.rounds   # the round that warms up, and does not count
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        self.clock.start()
        with (torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x) if first and self.device.type == 'cpu' else
              contextlib.nullcontext()):
            loss = self.loss(batch, num_boxes)
        loss.backward()
        self.clock.tick('backward')
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings['clip'])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.tick('optimizer')
        if self.device.type == 'cuda' and not first:   # the first step makes the optimizer's moments, too
            self.memory = max(self.memory, torch.cuda.max_memory_allocated(self.device) - before)
        elif self.device.type == 'cpu' and first:
            own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
            self.memory = sum(size for pointer, size in kept.items() if pointer not in own)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            self.inference.start()
            self.model.eval()(batch.images, batch.padding_mask)
            self.inference.tick('image')
        self.model.train()

    def gflops(self, batch) -> float:
        """Of the forward of an image in training, without the samples of deformable attention (torch counts none)."""
        noised = denoising_queries(batch.gt_labels[:1], batch.gt_boxes[:1], self.model.num_classes,
                                   self.settings['denoising']) if self.settings['denoising'] else None
        with self.patches(), FlopCounterMode(display=False) as flops:
            self.model(batch.images[:1], batch.padding_mask[:1], noised=noised)
        return flops.get_total_flops() / 1e9


def benchmark_rows(kind: str, tiny: bool) -> dict[str, dict]:
    """name -> flags of train.py, by which the rows of the table differ."""
    import train
    rows = train.TINY_ROWS if tiny else train.PAPER_ROWS
    n, T, G = rows['one2one']['n'], rows['branch']['T'], rows['group']['G']
    if kind == 'queries':
        return {f'branch, T = {m * n}': dict(scheme='branch', T=m * n)
                for m in ((0, 1, 2, 3, 4, 5) if tiny else (0, 1, 3, 5, 7, 11))}   # tiny has 336 tokens
    if kind == 'groups':
        return {f'group, G = {G}': dict(scheme='group', G=G) for G in (1, 2, 4, 7, 10, 13)}
    return {'one2one': dict(scheme='one2one'), f'one2one, n = {n + T}': dict(scheme='one2one', n=n + T),
            f'one2one, n = {n * G}': dict(scheme='one2one', n=n * G),
            **{scheme: dict(scheme=scheme) for scheme in rows if scheme != 'one2one'},
            'one2one, checkpointed': dict(scheme='one2one', checkpoint_activations=True),
            'branch, checkpointed': dict(scheme='branch', checkpoint_activations=True),
            'branch, as published': dict(scheme='branch', published=True)}


def benchmark(args: argparse.Namespace) -> None:
    """Print time and memory of training steps: in every round a step of each row, on the same batch, so that a slower
    moment of the machine slows all of them, and ratios within a round mean something."""
    device, rows = torch.device(args.device), benchmark_rows(args.benchmark, args.model == 'tiny')
    amp = has_bfloat16(device) if args.amp is None else args.amp
    if args.compile:
        compile_attention(device)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')   # as in training
    common = {'model': args.model, 'data': args.data or 'shapes'}
    if args.image_size:
        common['image_size'] = args.image_size
    first = next(iter(rows))
    if args.rows:
        wanted = {part: [name for name in rows if part in name] for part in args.rows.split(',')}
        for part, found in wanted.items():
            if not found:
                raise UserError(f'--rows {part}: is in none of {", ".join(rows)}')
        rows = {name: rows[name] for name in rows if name == first or any(name in found for found in wanted.values())}
    import train
    settings = train.complete({**common, **rows[first]})
    batch_size = args.batch_size or settings['batch_size']
    dataset = open_dataset(settings['data'], 'train', settings['image_size'], augment=True)
    try:
        rows = {name: BenchmarkRow({**common, **given}, len(dataset.categories), device, amp)
                for name, given in rows.items()}
    except ValueError as error:
        raise UserError(f'--model {args.model}: {error}') from None

    # Loading alone, without a model that takes the cores: a step waits for it if it is slower than the step.
    alone, loading = Clock(device), Clock(device)
    for index in range(200 if args.model == 'tiny' else 20):
        alone.start()
        dataset[0, index % len(dataset)]
        alone.tick('image')
    batches = iter(train_loader(dataset, batch_size, 21, args.workers, pin=device.type == 'cuda'))
    for _ in range(21):
        loading.start()
        next(batches).to(device)
        loading.tick('batch')

    batches = iter(train_loader(dataset, batch_size, args.repeats + 1, args.workers, pin=device.type == 'cuda'))
    for _ in tqdm(range(args.repeats + 1), desc='rounds', disable=None):
        batch = next(batches).to(device)
        for row in rows.values():
            row.step(batch)

    stages, steps = ('forward', 'matching', 'loss', 'backward', 'optimizer'), {
        name: row.clock.seconds() for name, row in rows.items()}
    print(f'torch {torch.__version__} on {device}, {torch.get_num_threads()} threads; {args.model}'
          f'{", bfloat16" * amp}; batches of {batch_size} images of {settings["image_size"]} pixels; {args.repeats} '
          f'rounds\n'
          f'data: {args.workers} workers load a batch in {np.mean(loading.seconds()):.3g} s, with nothing beside them; '
          f'one process alone loads {1 / np.mean(alone.seconds()):.0f} images/s\n'
          f'| | M parameters | GFLOPs | step, s | {" | ".join(stages)} | MB | images/s | '
          f'against {first} | against one2one with as many queries |\n|{"---|" * (8 + len(stages))}')
    for name, row in rows.items():
        alike = [other for other in rows if other.startswith('one2one')
                 and sum(rows[other].model.groups) == sum(row.model.groups)]
        print('| ' + ' | '.join([
            name, f'{sum(p.numel() for p in row.model.parameters()) / 1e6:.1f}', f'{row.gflops(batch):.1f}',
            spread(steps[name]), *(f'{np.median(row.clock.seconds([stage])):.3g}' if stage in row.clock.rounds[-1] else
                                   'in loss' for stage in stages),
            f'{row.memory / 1e6:.0f}', spread([batch_size / s for s in row.inference.seconds()]),
            *(spread([a / b for a, b in zip(steps[name], steps[other])]) for other in (first, *alike[:1])),
            *[''] * (not alike)]) + ' |')
    print('step: forward to optimizer, median (fastest-slowest) of the rounds; GFLOPs: forward of an image in training '
          'without deformable sampling;\nMB: ' + ('peak of a step above what was allocated before it' if device.type ==
          'cuda' else 'kept by forward for backward') + '; images/s: inference with the first group; epoch: its first '
          'part; deim: without mosaic, mixup and average')


def benchmark_loss(args: argparse.Namespace) -> None:
    """Print the time of matching, loss and their backward at the paper's size, here and as published."""
    device, made = torch.device(args.device), torch.Generator().manual_seed(0)
    L, B, C, S, M = 6, 2, 91, 13294, 7   # S: tokens of an image of 800 x 800; M: boxes of an image, COCO's mean

    def boxes(*shape):
        return torch.cat([torch.rand(*shape, 2, generator=made) * 0.6 + 0.2, torch.rand(*shape, 2, generator=made) * 0.3
                          + 0.05], -1).to(device).requires_grad_()

    groups = query_groups('branch', L, n=300, T=1500, K=6)
    tokens = encoder_groups(groups, 1, S)
    outputs = Outputs(*(x for N, l in ((1800, L), (S, 1)) for x in (
        (torch.randn(l, B, N, C, generator=made) - 4).to(device).requires_grad_(), boxes(l, B, N))))
    labels, gt = [torch.randint(C, (M,), generator=made).to(device) for _ in range(B)], [*boxes(B, M).detach()]
    clocks, values = {'here': Clock(device), 'as published': Clock(device)}, {}
    for _ in range(args.repeats + 1):
        for name, clock in clocks.items():
            clock.start()
            if name == 'here':
                matches = match(*outputs, labels, gt, groups, tokens)
                loss = sum(criterion(outputs, labels, gt, *matches, groups, tokens, B * M)[0].values())
            else:
                loss = published_loss(outputs, labels, gt, groups, B * M)
            torch.autograd.grad(loss, outputs)
            clock.tick('all')
            values[name] = loss.item()
    seconds = {name: clock.seconds() for name, clock in clocks.items()}
    ratio = [b / a for a, b in zip(*seconds.values())]
    print(f'matching, loss and backward, {L} layers of 300 + 1500 queries, K = 6, {S} tokens, {B} images of {M} boxes, '
          f'{C} classes on {device}:\n' + ', '.join(f'{name} {spread(s)} s' for name, s in seconds.items())
          + f': {spread(ratio)} times as fast\nthe losses: ' + ', '.join(f'{value:.5f}' for value in values.values()))


# --- The command ----------------------------------------------------------------------------------------------------

def ids_for(model_categories: Categories | None, dataset: Dataset, columns: int) -> list[int]:
    """The category id of every class column. Raises UserError if the model was trained for other categories."""
    theirs = dataset.categories
    if model_categories is None:   # an official checkpoint: column c is COCO's raw category id c, 0 and the gaps unused
        if max(theirs.ids) >= columns:
            raise UserError(f'the checkpoint has {columns} columns for category ids, the data has id {max(theirs.ids)}')
        return list(range(columns))
    if (model_categories.ids, model_categories.names) != (theirs.ids, theirs.names):
        ours, data = (f'{len(c)} classes, {", ".join(c.names[:4])}.. with ids {c.ids[:4]}..'
                      for c in (model_categories, theirs))
        raise UserError(f'the checkpoint detects {ours}, the data has {data}')
    return theirs.ids


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--weights', help='checkpoint of train.py or of HDETR/H-Deformable-DETR')
    parser.add_argument('--data', help="'shapes' or a folder in the COCO layout (default what it was trained on)")
    parser.add_argument('--split', choices=('val', 'train'),
                        help='part of the data (default val; of an --overfit run the images it was trained on)')
    parser.add_argument('--image-size', type=int, help='short side of the resized images (default as in training)')
    parser.add_argument('--batch-size', type=int,
                        help='images at a time (default as in training, official 2); their padding enters the '
                             'GroupNorm, so it moves the result a little')
    parser.add_argument('--workers', type=int, default=2, help='processes that load images (default 2)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default cuda if there is one')
    parser.add_argument('--group', type=int, default=0, help='query group to evaluate (default 0, the detector)')
    parser.add_argument('--nms', type=float, help='remove boxes that overlap a better one of their class at this IoU')
    parser.add_argument('--per-class', action='store_true', help='print the AP of each class')
    parser.add_argument('--save-json', help="write the detections in COCO's results format to this file")
    parser.add_argument('--unstable', type=int, default=0, metavar='N',
                        help='match the first N images and print how many objects change their query from layer to '
                             'layer (the unstable score; the paper has N = 20)')
    parser.add_argument('--pr-curve', metavar='FILE', help='draw precision over recall to this PNG')
    parser.add_argument('--pictures', type=int, default=0, metavar='N',
                        help='draw ground truth and predictions of N images')
    parser.add_argument('--matches', metavar='FILE',
                        help='draw to this PNG whom each scheme would make answer for whom in one image, given the '
                             'predictions of this model')
    parser.add_argument('--image', type=int, default=0, metavar='N', help='that image of --matches (default 0)')
    parser.add_argument('--picture-file', default='predictions.png', help='PNG to draw to (default predictions.png)')
    group = parser.add_argument_group('comparison of runs, instead of an evaluation')
    group.add_argument('--compare', nargs='+', metavar='RUN', help='print the results of runs NAME-SEED, a row a NAME')
    group.add_argument('--curves', metavar='FILE', help='and draw their AP over the steps to this PNG')
    group.add_argument('--unstable-curves', metavar='FILE',
                       help='and the unstable score over the layers, of runs with --unstable')
    group = parser.add_argument_group('benchmark: time and memory of training, instead of an evaluation')
    group.add_argument('--benchmark', nargs='?', const='schemes', choices=('schemes', 'queries', 'groups', 'loss'),
                       help='a table of all schemes (default), of branch with more and more queries, of group with '
                            'more and more groups; or matching and loss alone')
    group.add_argument('--model', default='tiny', help='tiny, r50, or a ResNet or Swin of torchvision (default tiny)')
    group.add_argument('--rows', help='only rows with one of these, separated by commas, in their names')
    group.add_argument('--repeats', type=int, default=5, help='rounds that count (default 5)')
    group.add_argument('--amp', action=argparse.BooleanOptionalAction, help='as in train.py')
    group.add_argument('--compile', action='store_true', help='as in train.py')
    args = parser.parse_args(argv)
    modes = [name for name in ('weights', 'compare', 'benchmark') if getattr(args, name)]
    if len(modes) != 1:
        parser.error('one of --weights, --compare and --benchmark is needed')
    machine = {'device', 'repeats', 'compile'}
    table = machine | {'data', 'image_size', 'batch_size', 'workers', 'amp', 'model', 'rows'}
    drawn = {'curves', 'unstable_curves'}
    means_something = {'weights': vars(args).keys() - drawn - {'model', 'rows', 'repeats', 'amp', 'compile'},
                       'compare': drawn, 'benchmark': machine if args.benchmark == 'loss' else table}[modes[0]]
    for name, value in vars(args).items():   # nothing that is given is ignored
        if name not in (*modes, *means_something) and value != parser.get_default(name):
            parser.error(f'--{name.replace("_", "-")} has no meaning with --{modes[0]}'
                         + f' {args.benchmark}' * (modes[0] == 'benchmark'))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.image and not args.matches:
        raise UserError(f'--image {args.image}: only --matches looks at one image')
    if args.nms is not None and not 0 <= args.nms <= 1:
        raise UserError(f'--nms {args.nms}: is an IoU, 0 to 1')
    for name, least in dict(batch_size=1, image_size=32, workers=0, group=0, pictures=0, unstable=0, repeats=1,
                            image=0).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f'--{name.replace("_", "-")} {getattr(args, name)}: must be at least {least}')
    pictures = ('picture_file', 'pr_curve', 'matches', 'curves', 'unstable_curves')
    for name in ('weights', 'data', 'save_json', 'rows', *pictures):
        if getattr(args, name) == '':   # a variable of the shell that was not set
            raise UserError(f"--{name.replace('_', '-')} '': is empty")
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch finds no CUDA device here')
    for name in ('save_json', *pictures):
        path, ending = getattr(args, name), '.json' if name == 'save_json' else '.png'
        if path is not None and not path.endswith(ending):
            raise UserError(f'--{name.replace("_", "-")} {path}: must end in {ending}')
        if path is not None and not Path(path).parent.is_dir():
            raise UserError(f'the folder of {path} does not exist')
    if args.compare:
        return compare(args.compare, args.curves, args.unstable_curves)
    if args.benchmark:
        return benchmark_loss(args) if args.benchmark == 'loss' else benchmark(args)
    model, categories, settings = load_detector(args.weights)
    if not 0 <= args.group < len(model.groups):
        raise UserError(f'--group {args.group}: the model has groups 0 to {len(model.groups) - 1}')
    name = args.data or settings.get('data')
    if name is None:
        raise UserError('an official checkpoint does not say on what to evaluate: add --data COCO')
    size = args.image_size or settings.get('image_size', 800)
    few = settings.get('overfit') and not args.data and not args.split   # trained on a few images: its own data
    dataset = open_dataset(name, 'train' if few else args.split or 'val', size, seed=settings.get('seed', 0))
    if few:
        dataset = FirstImages(dataset, settings['overfit'])
        print(f'the {len(dataset)} images it was trained on:')
    model.to(args.device)
    ids = ids_for(categories, dataset, model.num_classes)
    if args.image >= len(dataset):
        raise UserError(f'--image {args.image}: there are the images 0 to {len(dataset) - 1}')
    batch_size = args.batch_size or settings.get('batch_size', 2)
    rows = detect(model, dataset, ids, batch_size=batch_size, workers=args.workers, nms=args.nms, group=args.group)
    if args.save_json:
        results = [{'image_id': int(image_id), 'category_id': int(category_id), 'bbox': bbox, 'score': score}
                   for image_id, *bbox, score, category_id in rows.tolist()]
        Path(args.save_json).write_text(json.dumps(results))
        print(f'{len(results)} detections written to {args.save_json}')
    _, by_class = average_precision(dataset.coco_json(), rows, table=True, curve=args.pr_curve)
    if args.per_class:
        for category_id, name in zip(dataset.categories.ids, dataset.categories.names):
            print(f'{name:24} AP {by_class[category_id]:.3f}')
    if args.unstable:
        scores = unstable_score(model, dataset, ids, args.unstable, cost_of(settings), workers=args.workers)
        print(f'unstable score of layer 1 to {len(model.decoder)}, first group: '
              f'{", ".join(f"{score:.1f} %" for score in scores) or "no objects"}')
    if args.pr_curve:
        print(f'curve: {args.pr_curve}')
    if args.matches:
        draw_matches(model, dataset, ids, args.matches, args.image, cost_of(settings))
        print(f'picture: {args.matches}')
    if args.pictures:
        draw_predictions(model, dataset, ids, Path(args.picture_file), args.pictures, nms=args.nms, group=args.group)
        print(f'picture: {args.picture_file}')


def run_command(main) -> None:
    """Run a command; what the user can mend ends it with one line and exit code 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError as error:   # of the GPU; the CPU's has no class of its own
        sys.exit(f'{Path(sys.argv[0]).name}: the GPU is full; take a smaller --batch-size (in training with '
                 f'--accumulate) or --checkpoint-activations ({str(error).splitlines()[0]})')
    except RuntimeError as error:
        reasons = {'gloo': 'another process of this run is gone, or does not answer; its own message says why',
                   'DataLoader worker': 'a process that loads images is gone; is the memory full? fewer --workers?',
                   'allocate memory': 'the memory is full'}
        reason = next((reason for text, reason in reasons.items() if text in str(error)),
                      reasons['gloo'] if isinstance(error, torch.distributed.DistError) else None)
        if not reason:
            raise
        sys.exit(f'{Path(sys.argv[0]).name}: {reason} ({str(error).splitlines()[0]})')
    except (UserError, OSError) as error:   # OSError: no right to write, disk full
        # From a worker process the message comes with its traceback around it.
        text = str(error).split('UserError: ')[-1]
        sys.exit(f'{Path(sys.argv[0]).name}: {" ".join(text.split())}')   # one line, whatever a file is called


if __name__ == '__main__':
    run_command(main)
