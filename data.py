"""Images and boxes in: a shapes data set made on the fly, and any folder in the COCO layout.

    B images of a batch, M boxes of one image, C classes. Boxes are (cx, cy, w, h) as fractions of the image without its
    padding; boxes_xyxy, and those of a `target` (what `load` gives and transforms change), are (x0, y0, x1, y1) in
    pixels. Labels are 0..C-1, whatever the ids in the file.

A data set here has `categories` and items `dataset[epoch, index]`: everything random about an item follows from (seed,
epoch, index) alone, so it is the same in every process and after a resumed run. All but DenseOneToOne, whose items have
a third index, also have `coco_json()` for the evaluation, and `load(index)`: the image as stored, for its mosaics.
"""
import json
import math
import os
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The part of the training in which DenseOneToOne acts: epochs 4 to 34 of 60, as for RT-DETRv2 in the official code
# (ShihuaHuang95/DEIM). Afterwards the model trains on images such as it will be asked about.
DENSE = (4 / 60, 34 / 60)


class UserError(Exception):
    """Something the user can mend; its text is the one line they see."""


class Categories:
    """The one place where category ids of any numbering become labels 0..C-1, and labels become ids again."""

    def __init__(self, ids: list[int], names: list[str]):
        self.ids, self.names = ids, names
        self.label_of = {category_id: label for label, category_id in enumerate(ids)}

    def __len__(self) -> int:
        return len(self.ids)


class Sample(NamedTuple):
    image: Tensor          # (3, H, W), normalised
    labels: Tensor         # (M,) int64
    boxes: Tensor          # (M, 4)
    image_id: int
    size: tuple[int, int]  # (height, width) of the image as stored, in pixels
    name: str              # where it comes from, for messages


class Batch(NamedTuple):
    images: Tensor                # (B, 3, H, W), zero at padding
    padding_mask: Tensor          # (B, H, W) bool, True at padding
    gt_labels: list[Tensor]       # B tensors (M_b,)
    gt_boxes: list[Tensor]        # B tensors (M_b, 4)
    image_ids: list[int]
    sizes: list[tuple[int, int]]  # as in Sample
    names: list[str]

    def to(self, device) -> 'Batch':
        """The same batch on `device`; the CPU does not wait for the copies if the batch lies in pinned memory."""
        def move(x):
            return [move(y) for y in x] if isinstance(x, list) else x.to(device, non_blocking=True)
        return Batch(*(move(x) for x in self[:4]), *self[4:])


def collate(samples: list[Sample]) -> Batch:
    """Pad all images at the bottom and right to the largest height and width of the batch."""
    height, width = (max(s.image.shape[d] for s in samples) for d in (1, 2))
    images = torch.zeros(len(samples), 3, height, width)
    padding_mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for sample, image, mask in zip(samples, images, padding_mask):
        _, h, w = sample.image.shape
        image[:, :h, :w] = sample.image
        mask[:h, :w] = False
    # B samples of six fields -> six lists of B. Without the images they are the other fields of Batch, in its order.
    # Labels and boxes stay lists: images differ in M, and the matcher takes them one by one.
    _, *lists = map(list, zip(*samples))
    return Batch(images, padding_mask, *lists)


# --- Shapes, made on the fly ----------------------------------------------------------------------------------------

SHAPES = ('disc', 'ring', 'box', 'frame', 'triangle', 'cross')


def shape_mask(label: int, w: int, h: int) -> np.ndarray:
    """The pixels of a shape that touches all four sides of its (h, w) box, from 5 x 5 on: bool (h, w)."""
    x = (2 * np.arange(w) + 1) / w - 1            # (w,)    pixel centres, -1..1
    y = (2 * np.arange(h)[:, None] + 1) / h - 1   # (h, 1)
    radius2 = x * x + y * y                       # (h, w)
    # Of the triangle, half the width at the lower edge of each row of pixels: 1 / h at the top, 1 at the bottom. At
    # least 1 / w, or the top row of a box of even width might stay empty; 1.01 for rounding.
    half = np.maximum((y + 1) / 2 + 0.5 / h, 1.01 / w)   # (h, 1)
    return {'disc': radius2 <= 1, 'ring': (radius2 <= 1) & (radius2 >= 0.3), 'box': radius2 >= 0,
            'frame': (np.abs(x) >= 0.55) | (np.abs(y) >= 0.55),
            'triangle': np.abs(x) <= half,
            'cross': (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)}[SHAPES[label]]


def draw_shapes(seed: int, index: int, size: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image `index` of a shapes set: -> uint8 (size,size,3), boxes_xyxy int (M,4), labels int (M,), 1 <= M <= 12.

    Half of the tries put an object beside an earlier one of its class and about its size (a third of the objects end
    so), overlapping up to 40 % of the smaller: crowds are where two queries want the same object, and so where matching
    schemes differ. Thin bars and blocks of texture are no objects. The bits are the same on every machine: numpy's
    frozen RandomState and exact arithmetic.
    """
    rng = np.random.RandomState([seed, index])
    uniform = iter(rng.random_sample(1200).tolist()).__next__   # at most 699 are used; one call a number is slower

    def between(low, high):   # integer, both ends included
        return low + int(uniform() * (high - low + 1))

    # Background: two scales of coloured texture, 70..188 in each channel, then bars of any colour.
    cell = math.ceil(size / 4)
    coarse = rng.randint(70, 150, (4, 4, 3), np.int32).repeat(cell, 0).repeat(cell, 1)[:size, :size]
    fine = rng.randint(0, 40, (size // 8 + 1, size // 8 + 1, 3), np.int32).repeat(8, 0).repeat(8, 1)[:size, :size]
    image = coarse + fine
    for _ in range(between(0, 6)):
        thick, long = between(1, max(2, size // 48)), between(size // 8, size // 2)
        h, w = (thick, long) if uniform() < 0.5 else (long, thick)
        x, y = between(0, size - w), between(0, size - h)
        image[y:y + h, x:x + w] = [between(0, 255) for _ in range(3)]

    low, high = size * 10 // 128, size * 56 // 128   # of the mean side in pixels; each side is 0.75..1.25 of it
    placed = []                                                                              # (x0, y0, x1, y1, label)
    wanted = 1 + int(12 * uniform() * (0.4 + 0.6 * uniform()))   # 1..12, few more often than many
    for _ in range(6 * wanted):
        if len(placed) == wanted:
            break
        if placed and uniform() < 0.5:   # a neighbour of an earlier object
            x0, y0, x1, y1, label = placed[int(uniform() * len(placed))]
            w, h = (max(low // 2, int(side * (0.85 + 0.3 * uniform()))) for side in (x1 - x0, y1 - y0))
            across = 1 if uniform() < 0.5 else -1
            step, drift = across * (0.65 + 0.5 * uniform()), uniform() - 0.5   # in sizes of the new object
            dx, dy = (step, drift) if uniform() < 0.5 else (drift, step)
            x, y = x0 + int(dx * w), y0 + int(dy * h)
        else:
            label, u = between(0, len(SHAPES) - 1), uniform()
            side = low + (high - low) * u * u   # small objects are commoner
            w, h = int(side * (0.75 + 0.5 * uniform())), int(side * (0.75 + 0.5 * uniform()))
            x, y = between(0, size - w), between(0, size - h)
        if not (0 <= x <= size - w and 0 <= y <= size - h):
            continue
        # For each earlier object: the area it shares with the new one, and the area of the smaller of both.
        overlaps = ((max(0, min(x + w, x1) - max(x, x0)) * max(0, min(y + h, y1) - max(y, y0)),
                     min(w * h, (x1 - x0) * (y1 - y0))) for x0, y0, x1, y1, _ in placed)
        if all(overlap <= 0.4 * smaller for overlap, smaller in overlaps):
            placed.append((x, y, x + w, y + h, label))

    placed.sort(key=lambda b: -(b[2] - b[0]) * (b[3] - b[1]))   # large first: nothing small is hidden
    for x0, y0, x1, y1, label in placed:
        # Darker or lighter than the texture in each channel, but not tied to the class.
        colour = [between(0, 60) if uniform() < 0.5 else between(195, 255) for _ in range(3)]
        image[y0:y1, x0:x1][shape_mask(label, x1 - x0, y1 - y0)] = colour
    noise = np.frombuffer(rng.bytes(size * size * 3), np.uint8).reshape(size, size, 3) >> 3
    image = (image + noise - 16).clip(0, 255).astype(np.uint8)
    objects = np.array(placed, dtype=np.int64)
    return image, objects[:, :4], objects[:, 4]


class ShapesDataset(Dataset):
    """`length` images of `size` x `size` pixels; train and val are drawn with different seeds."""

    def __init__(self, split: str = 'train', length: int = 8000, size: int = 128, seed: int = 0):
        self.split, self.length, self.size, self.seed = split, length, size, 2 * seed + (split != 'train')
        self.categories = Categories(list(range(1, len(SHAPES) + 1)), list(SHAPES))

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> tuple[Image.Image, dict, int, str]:
        """As CocoFolder.load."""
        image, boxes_xyxy, labels = draw_shapes(self.seed, index, self.size)
        target = pixel_target(boxes_xyxy, labels, (self.size, self.size))
        return Image.fromarray(image), target, index, f'shapes/{self.split}/{index}'

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        _, index = key   # the same in every epoch: not augmented
        image, target, image_id, name = self.load(index)
        boxes = box_convert(target['boxes'].as_subclass(Tensor) / self.size, 'xyxy', 'cxcywh')
        return Sample(normalise(v2.functional.pil_to_tensor(image)), target['labels'], boxes, image_id,
                      (self.size, self.size), name)

    def most_boxes(self, n: int | None = None) -> int:
        """Of an image, of the first n or of all."""
        return 12 if n is None else max(len(draw_shapes(self.seed, i, self.size)[2]) for i in range(n))

    def coco_json(self, n: int | None = None) -> dict:
        """Of all images, or of the first n. Every image is drawn anew: only drawing tells its boxes."""
        annotations, length = [], self.length if n is None else n
        for index in range(length):
            _, boxes_xyxy, labels = draw_shapes(self.seed, index, self.size)
            for (x0, y0, x1, y1), label in zip(boxes_xyxy.tolist(), labels.tolist()):
                annotations.append({'id': len(annotations) + 1, 'image_id': index, 'iscrowd': 0,
                                    'category_id': self.categories.ids[label], 'area': (x1 - x0) * (y1 - y0),
                                    'bbox': [x0, y0, x1 - x0, y1 - y0]})
        return {'images': [{'id': i, 'height': self.size, 'width': self.size} for i in range(length)],
                'annotations': annotations, 'categories': categories_json(self.categories)}


def categories_json(categories: Categories) -> list[dict]:
    return [{'id': i, 'name': name} for i, name in zip(categories.ids, categories.names)]


def normalise(image: Tensor) -> Tensor:
    """uint8 (3,H,W) -> float with ImageNet's mean and deviation, as torchvision's pretrained backbones expect."""
    image = v2.functional.to_dtype(image, torch.float32, scale=True)
    return v2.functional.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def pixel_target(boxes_xyxy: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> dict:
    """Boxes (M,4) in pixels and labels (M,) of an image of size (height, width), as torchvision's transforms want."""
    boxes = torch.from_numpy(boxes_xyxy).float()
    return {'boxes': tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size),
            'labels': torch.from_numpy(labels)}


def transformed(transforms, seed: int, image: Image.Image, target: dict) -> tuple[Tensor, Tensor, Tensor]:
    """The first three fields of a Sample. What is random follows from `seed` alone, and no generator is moved by it."""
    with torch.random.fork_rng(devices=[]):   # of the CPU only, from which all transforms draw
        torch.default_generator.manual_seed(seed)   # not torch.manual_seed, which seeds the GPUs, too
        image, target = transforms(image, target)
    boxes = box_convert(target['boxes'].as_subclass(Tensor), 'xyxy', 'cxcywh')
    boxes = boxes / torch.tensor([image.width, image.height] * 2)
    return normalise(v2.functional.pil_to_tensor(image)), target['labels'], boxes


# --- A folder in the COCO layout ------------------------------------------------------------------------------------

class RandomSizeCrop:
    """Crop to a random width and height between `low` and `high` pixels (or the image's own size, if that is less)."""

    def __init__(self, low: int, high: int):
        self.low, self.high = low, high

    def __call__(self, image: Image.Image, target: dict):
        def choose(low, high):
            return int(torch.randint(low, high + 1, ()))
        w, h = (choose(min(self.low, side), min(self.high, side)) for side in image.size)
        window = dict(top=choose(0, image.height - h), left=choose(0, image.width - w), height=h, width=w)
        return v2.functional.crop(image, **window), {**target, 'boxes': v2.functional.crop(target['boxes'], **window)}


def resize_to(size: int) -> v2.Resize:
    """A short side of `size`, less where the long side would exceed 1333 / 800 of that (DETR's limits)."""
    return v2.Resize(size, max_size=round(size * 1333 / 800))


def flips_and_colours(size: int, vertical_flip: bool) -> list:
    """The flips of every training, and changed colours for small images: see `train_transforms`."""
    return ([v2.RandomHorizontalFlip()] + [v2.RandomVerticalFlip()] * vertical_flip
            + [v2.RandomPhotometricDistort()] * (size < 480))


# Cut boxes at the border, then remove those with a side below 1 pixel, and their labels. Without the clamp, one that
# ends 1e-5 outside by rounding would be removed, too.
TIDY_BOXES = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])


def train_transforms(size: int, vertical_flip: bool = False):
    """DETR's augmentation (and H-DETR's) for a largest short side of `size` pixels; theirs is 800.

    Flip, then a short side of 480..800 and a long side of at most 1333, half the time after a crop of 384..600 from a
    short side of 400, 500 or 600; every number shrinks with `size`. Our own, for a `size` below 480: no short side
    below 640 / 800 of it, so that objects keep more pixels, and changed colours, since a small model mostly starts from
    scratch and has not seen a million photographs before.
    """
    def scaled(n):   # a number of DETR's -> pixels here
        return max(1, round(n * size / 800))
    sides = range(640 if size < 480 else 480, 801, 32)
    # Not v2.RandomShortestSize: it cuts off fractions of a pixel, and 427 x 640 resized to 480 has 479.
    resize = v2.RandomChoice([v2.Resize(scaled(side), max_size=scaled(1333)) for side in sides])
    shrink = v2.RandomChoice([v2.Resize(scaled(side)) for side in (400, 500, 600)])
    cropped = v2.Compose([shrink, RandomSizeCrop(scaled(384), scaled(600)), resize])
    return v2.Compose([*flips_and_colours(size, vertical_flip), v2.RandomChoice([resize, cropped]), TIDY_BOXES])


def as_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. Images of 16 or 32 bits, which Pillow would cut off at 255, are scaled to their maximum."""
    if image.mode.startswith(('I', 'F')):
        pixels = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((pixels.clip(0) * (255 / max(pixels.max(), 1e-9))).astype(np.uint8))
    return image.convert('RGB')


def read_annotations(file: Path) -> dict:
    """The content of a COCO annotation file. Raises UserError that names the first bad entry.

    Boxes may lie partly outside their image or have no area: both are common, and CocoFolder handles them.
    """
    def need(condition: bool, problem: str) -> None:
        if not condition:
            raise UserError(f'{file}: {problem}')

    def is_number(x, kind=(int, float)) -> bool:   # below 2^53: ids and boxes share arrays of float64
        return isinstance(x, kind) and not isinstance(x, bool) and abs(x) < 2 ** 53

    def entries(kind: str) -> Iterator[tuple[str, dict]]:
        """The entries of one of the file's three lists, each with what a message calls it."""
        need(isinstance(content.get(kind), list) and len(content[kind]) > 0, f'has no list of {kind}, or an empty one')
        for place, entry in enumerate(content[kind]):
            need(isinstance(entry, dict), f'entry {place} of {kind} is no object')
            yield f'entry {place} of {kind}', entry

    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file} is no valid JSON: {error}') from None
    need(isinstance(content, dict), 'is not the object of a COCO annotation file')
    known = {'images': set(), 'categories': set()}
    for kind, ids in known.items():
        for what, entry in entries(kind):
            need(is_number(entry.get('id'), int), f'{what} has the id {entry.get("id")!r}, no whole number below 2^53')
            need(entry['id'] not in ids, f'the id {entry["id"]} stands for two {kind}')
            ids.add(entry['id'])
            if kind == 'categories':
                need(isinstance(entry.get('name'), str), f'{what} has no name')
                continue
            name, sides = entry.get('file_name'), (entry.get('width'), entry.get('height'))
            need(isinstance(name, str) and name != '' and '\0' not in name, f'{what} has no file_name')
            need(not Path(name).is_absolute() and '..' not in Path(name).parts,
                 f'{what} names {name!r}, which is outside the image folder')
            need(all(is_number(side, int) and side > 0 for side in sides),
                 f'{what}, {name!r}, has the width and height {sides}, which must be whole numbers above 0')
    for what, a in entries('annotations'):
        what, box = f'{what} (id {a.get("id")!r})', a.get('bbox')
        for name, kind in (('image_id', 'images'), ('category_id', 'categories')):
            need(is_number(a.get(name), int) and a[name] in known[kind],
                 f'{what} has the {name} {a.get(name)!r}, which is not listed')
        need(isinstance(box, list) and len(box) == 4 and all(map(is_number, box)),
             f'{what} has the bbox {box!r}, which must be four numbers x, y, width, height')
        need(is_number(a.get('area', 0)), f'{what} has the area {a.get("area")!r}, which is no number')
        need(a.get('iscrowd', 0) in (0, 1), f'{what} has iscrowd {a.get("iscrowd")!r}, which must be 0 or 1')
    return content


class CocoFolder(Dataset):
    """A folder with train2017/, val2017/ and annotations/instances_{train,val}2017.json, COCO's own or any other.

    Images without boxes are kept. Boxes are cut at their image's border; crowd boxes and boxes without area do not
    train, and their number is printed; the evaluation sees the file as it is. Raises UserError, naming file and entry,
    if something is missing, unreadable or senseless.
    """

    def __init__(self, root: str, split: str, size: int, augment: bool = False, vertical_flip: bool = False,
                 seed: int = 0):
        self.folder, self.seed = Path(root) / f'{split}2017', seed
        file = Path(root) / 'annotations' / f'instances_{split}2017.json'
        for path, what in ((Path(root), 'data folder'), (self.folder, 'image folder'), (file, 'annotation file')):
            if not path.exists():
                raise UserError(f'{what} {path} does not exist (expected DIR/train2017, DIR/val2017 and '
                                'DIR/annotations/instances_{train,val}2017.json)')
        content = read_annotations(file)
        by_id = sorted(content['categories'], key=lambda c: c['id'])
        self.categories = Categories([c['id'] for c in by_id], [c['name'] for c in by_id])
        self.images = [(i['id'], i['file_name'], i['height'], i['width']) for i in content['images']]
        with os.scandir(self.folder) as entries:   # one look at the folder, where COCO has 118,000 files
            present = {entry.name for entry in entries if entry.is_file()}
        for _, name, height, width in self.images:
            if max(width, height) > 20 * min(width, height):   # resized (`resize_to`), its short side is < size / 12
                raise UserError(f'{file}: the image {name!r} has {width} x {height} pixels: too long and thin to be '
                                'resized')
            if name not in present and not (self.folder / name).is_file():   # the latter: it may be in a subfolder
                raise UserError(f'{file} names the image {name!r}, which is not in {self.folder}')
        # A row for each annotation: image (as an index), category id, x, y, w, h, area, crowd. Arrays, because lists of
        # dicts would be copied into every worker process as their reference counts are touched.
        index_of = {image_id: index for index, (image_id, *_) in enumerate(self.images)}
        rows = [(index_of[a['image_id']], a['category_id'], *a['bbox'], a.get('area', a['bbox'][2] * a['bbox'][3]),
                 a.get('iscrowd', 0)) for a in content['annotations']]
        rows = np.array(rows, dtype=np.float64)
        self.rows = rows[np.argsort(rows[:, 0], kind='stable')]
        # Of A annotations, sorted by image. owner (A,): index of the image; xy, wh, image_wh (A, 2): pixels.
        owner, category_ids = self.rows[:, :2].astype(int).T
        xy, wh, crowd = self.rows[:, 2:4], self.rows[:, 4:6], self.rows[:, 7]
        image_wh = np.array([(w, h) for _, _, h, w in self.images])[owner]
        # Image i has the rows from first_row[i] up to, and without, first_row[i + 1].
        self.first_row = np.searchsorted(owner, np.arange(len(self.images) + 1))
        outside = (xy + wh > 1.01 * image_wh + 1).any(1)   # by more than what rounding and resized files explain
        if outside.mean() > 0.2:
            raise UserError(f'{file}: {outside.mean():.0%} of the boxes end outside their image: are they x1, y1, x2, '
                            'y2? COCO has x, y, width, height')
        corners = np.concatenate([xy, xy + wh], 1).clip(0, np.tile(image_wh, 2))   # (A, 4) xyxy
        self.usable = (crowd == 0) & (corners[:, 2:] > corners[:, :2]).all(1)
        if not self.usable.all():
            example = self.images[owner[~self.usable][0]][1]
            print(f'{file}: {int((~self.usable).sum())} of {len(self.rows)} boxes are crowds or have no area in their '
                  f'image and do not train; the first is in {example}')
        if not self.usable.any():
            raise UserError(f'{file} has no box with an area')
        self.corners = corners.astype(np.float32)
        self.labels = np.array([self.categories.label_of[i] for i in category_ids.tolist()], dtype=np.int64)
        self.transforms = train_transforms(size, vertical_flip) if augment else resize_to(size)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, dict, int, str]:
        """The RGB image as stored, its boxes in pixels {'boxes': xyxy (M,4), 'labels': (M,)}, its id and its name."""
        image_id, name, height, width = self.images[index]
        try:
            with Image.open(self.folder / name) as image:
                # A camera held upright stores a turned image, with a tag that says so. Which of both was annotated, the
                # size tells. Without a tag nothing is turned here, and the size is refused below.
                if width != height and image.size == (height, width):
                    image = ImageOps.exif_transpose(image)
                image = as_rgb(image)
        except Exception as error:   # a broken file can fail in any way: OSError, SyntaxError, ValueError, IndexError..
            raise UserError(f'cannot read the image {self.folder / name}: {error}') from None
        if (image.height, image.width) != (height, width):
            raise UserError(f'{self.folder / name} has {image.width} x {image.height} pixels, its annotation file says '
                            f'{width} x {height}')
        rows = slice(self.first_row[index], self.first_row[index + 1])
        usable = self.usable[rows]
        target = pixel_target(self.corners[rows][usable], self.labels[rows][usable], (height, width))
        return image, target, image_id, str(self.folder / name)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        image, target, image_id, name = self.load(index)
        seed = int(np.random.RandomState([self.seed, epoch, index]).randint(2 ** 31 - 1))   # one number out of three
        return Sample(*transformed(self.transforms, seed, image, target), image_id, (image.height, image.width), name)

    def most_boxes(self, n: int | None = None) -> int:
        """The most that an image, of the first n or of all, trains with."""
        images = self.images[:n]
        return max(int(self.usable[a:b].sum()) for a, b in zip(self.first_row, self.first_row[1:len(images) + 1]))

    def coco_json(self, n: int | None = None) -> dict:
        """As ShapesDataset.coco_json; with the boxes as the file has them, crowds too: COCOeval ignores them."""
        images = self.images[:n]
        rows = self.rows[:self.first_row[len(images)]]   # sorted by image
        annotations = [{'id': i + 1, 'image_id': images[int(image)][0], 'category_id': int(category), 'bbox': bbox,
                        'area': area, 'iscrowd': int(crowd)}
                       for i, (image, category, *bbox, area, crowd) in enumerate(rows.tolist())]
        return {'images': [{'id': i, 'height': h, 'width': w} for i, _, h, w in images],
                'annotations': annotations, 'categories': categories_json(self.categories)}


class FirstImages(Dataset):
    """The first `n` images of another data set: what `--overfit` trains and evaluates on."""

    def __init__(self, dataset: Dataset, n: int):
        self.dataset, self.n, self.categories = dataset, min(n, len(dataset)), dataset.categories

    def __len__(self) -> int:
        return self.n

    def load(self, index: int) -> tuple[Image.Image, dict, int, str]:
        return self.dataset.load(index)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.dataset[key]

    def coco_json(self, n: int | None = None) -> dict:
        return self.dataset.coco_json(self.n if n is None else min(n, self.n))

    def most_boxes(self) -> int:
        return self.dataset.most_boxes(self.n)


def open_dataset(name: str, split: str, size: int, augment: bool = False, vertical_flip: bool = False,
                 seed: int = 0) -> Dataset:
    """'shapes' or a folder in the COCO layout -> data set; split is 'train' or 'val'."""
    if name == 'shapes':
        return ShapesDataset(split, 8000 if split == 'train' else 500, size, seed)
    return CocoFolder(name, split, size, augment, vertical_flip, seed)


# --- Dense one-to-one: more objects an image ------------------------------------------------------------------------

def mosaic(images: list[Image.Image], targets: list[dict], size: int) -> tuple[Image.Image, dict]:
    """Four images with targets as `load` gives them -> one, a 2 x 2 grid on black (DEIM slides).

    Each is resized to a short side of `size` pixels and lies in the top left corner of its quadrant; all quadrants have
    the largest width and the largest height (official code). That a long side is at most 4 * size is our own: a wide
    and a high strip of 20 : 1 would make a canvas of 40 * size by 40 * size.
    """
    tiles = [v2.Resize(size, max_size=4 * size)(image, target) for image, target in zip(images, targets)]
    w, h = (max(tile.size[d] for tile, _ in tiles) for d in (0, 1))
    canvas, boxes = Image.new('RGB', (2 * w, 2 * h)), []
    for (tile, target), corner in zip(tiles, ((0, 0), (w, 0), (0, h), (w, h))):
        canvas.paste(tile, corner)
        boxes.append(target['boxes'].as_subclass(Tensor) + torch.tensor(corner * 2))   # (x, y, x, y)
    return canvas, {'boxes': tv_tensors.BoundingBoxes(torch.cat(boxes), format='XYXY', canvas_size=(2 * h, 2 * w)),
                    'labels': torch.cat([target['labels'] for target in targets])}


def mixup(sample: Sample, other: Sample, beta: float = 0.5) -> Sample:
    """beta * sample + (1 - beta) * other, with the objects of both.

    Both are normalised and lie in the top left corner of an image as high and as wide as the larger of each; where one
    has no pixels it counts as 0, the mean colour. Boxes become fractions of the new image.
    0.5 on the DEIM slides; the official code draws beta from 0.45..0.55, and stores it for each box, but no loss uses
    it. Id and stored size are those of `sample`.
    """
    h, w = (max(sample.image.shape[d], other.image.shape[d]) for d in (1, 2))
    image, boxes = torch.zeros(3, h, w), []
    for part, weight in ((sample, beta), (other, 1 - beta)):
        _, part_h, part_w = part.image.shape
        image[:, :part_h, :part_w] += weight * part.image
        boxes.append(part.boxes * torch.tensor([part_w / w, part_h / h] * 2))
    return sample._replace(image=image, labels=torch.cat([sample.labels, other.labels]), boxes=torch.cat(boxes),
                           name=f'{sample.name} mixed with {other.name}')


class DenseOneToOne(Dataset):
    """Several images of a training set in one: one-to-one matching, but more objects and so more positives an image.

    Items `dataset[epoch, index, dense]`. If `dense`, half of them are mosaics, and half of all are mixed with another
    image, which may be a mosaic, too. Mosaics are of four different images (DEIM slides); the official code draws with
    replacement. It mixes whole batches, each image with the one before; here the partner is drawn for each image, so
    that no item depends on its batch. An item has up to eight images' objects: mind the number of queries.
    Raises UserError for a set of fewer than four images.
    """

    def __init__(self, dataset: Dataset, size: int, vertical_flip: bool = False, seed: int = 0):
        if len(dataset) < 4:
            raise UserError(f'a mosaic needs four images, and the training set has {len(dataset)}')
        self.dataset, self.categories, self.size, self.seed = dataset, dataset.categories, size, seed
        # Turned, shifted and scaled on black: what leaves the canvas is lost, but nothing is cropped (official code).
        affine = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.5, 1.5), fill=0)
        self.transforms = v2.Compose([affine, *flips_and_colours(size, vertical_flip), resize_to(size), TIDY_BOXES])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, bool]) -> Sample:
        epoch, index, dense = key
        if not dense:
            return self.dataset[epoch, index]
        rng = np.random.RandomState([self.seed, epoch, index, 1])   # 1: other numbers than the data set's own
        sample = self.plain_or_mosaic(epoch, index, rng)
        if rng.random_sample() < 0.5:
            [partner] = self.others(1, index, rng)
            sample = mixup(sample, self.plain_or_mosaic(epoch, partner, rng))
        return sample

    def plain_or_mosaic(self, epoch: int, index: int, rng: np.random.RandomState) -> Sample:
        if rng.random_sample() < 0.5:
            return self.dataset[epoch, index]
        four = [index, *self.others(3, index, rng)]
        images, targets, ids, names = zip(*(self.dataset.load(i) for i in four))
        image, target = mosaic(images, targets, round(self.size / 2))
        return Sample(*transformed(self.transforms, int(rng.randint(2 ** 31 - 1)), image, target), ids[0],
                      (images[0].height, images[0].width), f'mosaic of {", ".join(names)}')

    def others(self, count: int, index: int, rng: np.random.RandomState) -> list[int]:
        """`count` different images, none of them `index`: drawn from len - 1 numbers, those from `index` on move up."""
        return [int(i + (i >= index)) for i in rng.choice(len(self) - 1, count, replace=False)]


# --- Batches --------------------------------------------------------------------------------------------------------

def train_batches(n: int, batch_size: int, steps: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1,
                  dense_part: tuple[float, float] | None = None) -> Iterator[list[tuple]]:
    """The (epoch, index) pairs of this process for the steps start..steps-1: a new order each epoch, no image left out.

    Position p of the endless stream of images lies in epoch p // n. A run that starts at a later step therefore sees
    what an uninterrupted one would have seen, and W processes see together what one with W times the batch would.
    With `dense_part`, a part of the training such as DENSE, they are DenseOneToOne's triples: True within that part.
    """
    @lru_cache(2)   # a batch may reach into the next epoch
    def order(epoch: int) -> list[int]:
        return np.random.RandomState([seed, epoch]).permutation(n).tolist()

    for step in range(start, steps):
        # The third index of an item: a tuple of one bool, or of none where the data set takes (epoch, index).
        dense = () if dense_part is None else (dense_part[0] <= step / steps < dense_part[1],)
        # Processes take turns: step 0 is the first `world` batches of the stream, one for each.
        first = (step * world + rank) * batch_size
        yield [(p // n, order(p // n)[p % n], *dense) for p in range(first, first + batch_size)]


def ignore_interrupts(_worker: int) -> None:
    """A terminal sends Ctrl-C to the loading processes, too; what it means is decided by the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train_loader(dataset: Dataset, batch_size: int, steps: int, workers: int, seed: int = 0, start: int = 0,
                 rank: int = 0, world: int = 1, pin: bool = False,
                 dense_part: tuple[float, float] | None = None) -> DataLoader:
    """Batches for the steps start..steps-1 of this process, once.

    A DataLoader draws a number from its generator when it starts. It gets one of its own: so the training's is left
    alone, and a resumed run draws the same dropout as an uninterrupted one.
    """
    batches = train_batches(len(dataset), batch_size, steps, seed, start, rank, world, dense_part)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin,
                      generator=torch.Generator(), worker_init_fn=ignore_interrupts)


def val_loader(dataset: Dataset, batch_size: int, workers: int, rank: int = 0, world: int = 1) -> DataLoader:
    """Every image once, in order; process `rank` of `world` takes every world-th."""
    keys = [(0, index) for index in range(rank, len(dataset), world)]
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      generator=torch.Generator(), worker_init_fn=ignore_interrupts)
