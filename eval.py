"""COCO average precision, result files and pictures for a trained detector.

    python eval.py --weights runs/group/checkpoint.pt                          its own data, the 12 COCO numbers
    python eval.py --weights runs/group/checkpoint.pt --pictures 8             ground truth beside predictions
    python eval.py --weights official.pth --data COCO                          a checkpoint of HDETR/H-Deformable-DETR

Letters as in hybrid_detr.py: B images, L decoder layers, N queries, C classes.
"""
import argparse
import contextlib
import io
import json
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms, box_convert
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

from data import (IMAGENET_MEAN, IMAGENET_STD, Categories, Dataset, FirstImages, UserError, open_dataset,
                  val_loader)
from hybrid_detr import HybridDETR, Outputs, from_official

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
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f'{path} is no readable checkpoint: {reason}') from None
    if not isinstance(content, dict) or not isinstance(content.get('model'), dict):
        raise UserError(f"{path} is no checkpoint of a detector: it has no entry 'model'")
    return content


def is_official(checkpoint: dict) -> bool:
    return 'architecture' not in checkpoint


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
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f'{path} does not fit: {" ".join(str(error).split())[:200]}') from None
    return model.eval(), Categories(**checkpoint['categories']), checkpoint['settings']


# --- From outputs to detections -------------------------------------------------------------------------------------

def detections(outputs: Outputs, sizes: list[tuple[int, int]], top: int = 100, nms: float | None = None):
    """The `top` best of all N*C scores of the last layer: -> per image scores (k,) in falling order, labels (k,),
    boxes_xyxy (k,4) in pixels of the stored image; k = min(top, N*C), or less with NMS.

    A query may appear with several classes (Deformable DETR's official post-processing, 100 in H-DETR's). With NMS at
    IoU `nms`, the best 10 * top are thinned out first: else duplicates would take the places of other objects.
    """
    probability = outputs.pred_logits[-1].float().sigmoid()                                         # (B, N, C)
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
        for image_id, (scores, labels, boxes) in zip(batch.image_ids, detections(outputs, batch.sizes, nms=nms)):
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


def average_precision(coco_json: dict, rows: np.ndarray, table: bool = False):
    """pycocotools' 12 numbers for the rows of `detect`, by name, and AP by category id; table=True prints its table."""
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
    return dict(zip(METRICS, evaluation.stats.tolist())), by_class


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


@torch.inference_mode()
def draw_predictions(model: HybridDETR, dataset: Dataset, ids: list[int], path: Path, n: int = 4,
                     threshold: float = 0.3, nms: float | None = None, group: int = 0) -> None:
    """Save a PNG, a row for each of the first n images: ground truth left, predictions of score >= threshold right."""
    device, was_training, rows = next(model.parameters()).device, model.training, []
    names = dict(zip(dataset.categories.ids, dataset.categories.names))
    model.eval()
    for batch in val_loader(FirstImages(dataset, n), 1, 0):
        outputs = model(batch.images.to(device), batch.padding_mask.to(device), group)
        (scores, labels, boxes), = detections(outputs, [(1, 1)], nms=nms)
        good = scores >= threshold
        shown = [dataset.categories.label_of.get(ids[label], 0) for label in labels[good].tolist()]
        texts = [f'{names.get(ids[label], ids[label])} {score:.2f}'
                 for label, score in zip(labels[good].tolist(), scores[good].tolist())]
        picture, truth = as_picture(batch.images[0]), batch.gt_labels[0].tolist()
        pair = [draw_boxes(picture, batch.gt_boxes[0], truth, [dataset.categories.names[label] for label in truth]),
                draw_boxes(picture, box_convert(boxes[good], 'xyxy', 'cxcywh'), shown, texts)]
        rows.append(torch.cat([pair[0], pair[0].new_full((3, pair[0].shape[1], 8), 255), pair[1]], 2))
    model.train(was_training)
    width = max(row.shape[2] for row in rows)
    rows = [v2.functional.pad(row, [0, 0, width - row.shape[2], 8], fill=255) for row in rows]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(path)


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
    parser.add_argument('--weights', required=True, help='checkpoint of train.py or of HDETR/H-Deformable-DETR')
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
    parser.add_argument('--pictures', type=int, default=0, metavar='N',
                        help='draw ground truth and predictions of N images')
    parser.add_argument('--picture-file', default='predictions.png', help='PNG to draw to (default predictions.png)')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.nms is not None and not 0 <= args.nms <= 1:
        raise UserError(f'--nms {args.nms}: is an IoU, 0 to 1')
    for name, least in dict(batch_size=1, image_size=32, workers=0, pictures=0).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f'--{name.replace("_", "-")} {getattr(args, name)}: must be at least {least}')
    for path in (args.save_json, args.picture_file):
        if path and not Path(path).parent.is_dir():
            raise UserError(f'the folder of {path} does not exist')
    if not args.picture_file.endswith('.png'):
        raise UserError(f'--picture-file {args.picture_file}: must end in .png')
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
    ids = ids_for(categories, dataset, model.class_heads[0].out_features)
    batch_size = args.batch_size or settings.get('batch_size', 2)
    rows = detect(model, dataset, ids, batch_size=batch_size, workers=args.workers, nms=args.nms, group=args.group)
    if args.save_json:
        results = [{'image_id': int(image_id), 'category_id': int(category_id), 'bbox': bbox, 'score': score}
                   for image_id, *bbox, score, category_id in rows.tolist()]
        Path(args.save_json).write_text(json.dumps(results))
        print(f'{len(results)} detections written to {args.save_json}')
    _, by_class = average_precision(dataset.coco_json(), rows, table=True)
    if args.per_class:
        for category_id, name in zip(dataset.categories.ids, dataset.categories.names):
            print(f'{name:24} AP {by_class[category_id]:.3f}')
    if args.pictures:
        draw_predictions(model, dataset, ids, Path(args.picture_file), args.pictures, nms=args.nms, group=args.group)
        print(f'picture: {args.picture_file}')


def run_command(main) -> None:
    """Run a command; what the user can mend ends it with one line and exit code 1."""
    try:
        main()
    except (UserError, OSError) as error:   # OSError: no right to write, disk full
        # From a worker process the message comes with its traceback around it.
        sys.exit(f'{Path(sys.argv[0]).name}: {str(error).split("UserError: ")[-1].strip()}')


if __name__ == '__main__':
    run_command(main)
