"""Draw the pictures of the schemes, of the losses, and of several runs.

    python .github/figures/draw.py [FOLDER]
    python .github/figures/draw.py FOLDER seconds SCHEME-STEPS-SEED ...
    python .github/figures/draw.py FOLDER unstable NAME-SEED ...

The first command writes schemes.png (the toy of matchers.py in every scheme) and losses.png (the
curves of losses.py) into FOLDER, or beside this file. The second writes seconds.png: the final AP
of runs over their training time. The third writes unstable.png: the unstable score of runs.
"""
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
SPREAD = np.mean, np.min, np.max   # over seeds
sys.path.insert(0, str(HERE.parents[1]))   # the root of the project

from eval import line_chart, read_metrics
from losses import MATCHED, curve
from matchers import TOY_COST, TOY_ROWS, toy


def font(size: int):
    return ImageFont.load_default(size=size)


def draw_schemes(path: Path) -> None:
    """Draw a panel for each scheme: queries, their ground truths, and the self-attention."""
    panels = [('one2one', 'always', 0, 0), ('branch', 'always', 0, 0),
              ('group', 'always', 0, 0), ('one2many', 'always', 0, 0),
              ('epoch', 'first part of training', 0, 0), ('epoch', 'rest of training', 0, 1),
              ('layer', 'first L1 layers', 0, 0), ('layer', 'other layers', 1, 0)]
    image = Image.new('RGB', (1640, 2680), 'white')   # halved at the end, for smooth lines
    pen = ImageDraw.Draw(image)
    for i, (scheme, when, layer, progress) in enumerate(panels):
        x, y = i % 2 * 800 + 50, i // 2 * 640 + 30   # two panels in a row
        draw_scheme(pen, x, y, scheme, when, layer, progress)
    costs = ';  '.join(f'{letter}: ' + '  '.join(f'{cost:g}' for cost in column)
                       for letter, column in zip('AB', TOY_COST.T.tolist()))
    text = ('A circle is a query, in the colour of the ground truth (square) that it is matched '
            'to. Grey is unmatched.\nThe matrix is self-attention: the query of a row sees the '
            'queries of its dark columns.\nThe cost of q0 to q5 for each ground truth, in all '
            f'panels: {costs}.')
    pen.text((50, 2545), text, 'black', font(28))
    image.reduce(2).save(path)


def draw_scheme(pen, x: int, y: int, scheme: str, when: str, layer: int, progress: float) -> None:
    """Draw one panel, whose top left corner is (x, y)."""
    colours = {'A': '#0072B2', 'B': '#D55E00', '.': '#BBBBBB'}
    grey, large, small = '#555555', font(38), font(28)
    groups, letters = toy(scheme, layer, progress)
    group_of = [g for g, group in enumerate(groups) for _ in range(group.queries)]
    numbers = '  '.join(f'{name}={value}' for name, value in TOY_ROWS[scheme].items())
    copies = ' | '.join(str(group.copies[layer]) for group in groups)
    pen.text((x, y), f'{scheme}: {when}', 'black', large)
    pen.text((x, y + 48), f'{numbers}:  copies of A and B: {copies}', grey, small)

    # The matches: queries from top to bottom, with a gap between groups, and a line to the ground
    # truth of each.
    height = [y + 150 + 64 * q + 26 * group_of[q] for q in range(len(letters))]
    gt_height = {'A': y + 230, 'B': y + 430}
    for q, letter in enumerate(letters):
        if letter != '.':
            pen.line((x + 50, height[q], x + 240, gt_height[letter]), colours[letter], 6)
        circle = (x, height[q] - 28, x + 56, height[q] + 28)
        pen.ellipse(circle, colours[letter], 'black', 2)
        text_colour = 'black' if letter == '.' else 'white'
        pen.text((x + 28, height[q]), f'q{q}', text_colour, small, anchor='mm')
    for letter, centre in gt_height.items():
        pen.rectangle((x + 220, centre - 34, x + 288, centre + 34), colours[letter], 'black', 2)
        pen.text((x + 254, centre), letter, 'white', large, anchor='mm')

    # The self-attention: the query of row q looks at that of column k.
    for q in range(len(letters)):
        pen.text((x + 362, y + 156 + 52 * q), f'q{q}', grey, small, anchor='rm')
        for k in range(len(letters)):
            left, top = x + 374 + 52 * k, y + 130 + 52 * q
            seen = '#444444' if group_of[q] == group_of[k] else 'white'
            pen.rectangle((left, top, left + 52, top + 52), seen, '#BBBBBB', 2)


# The lines of losses.png: the IoU of the match (None: not matched), colour and width.
LINES = {0.0: ('#D55E00', 11), 0.5: ('#E69F00', 8), 0.75: ('#56B4E9', 8), 1.0: ('#0072B2', 8),
         None: ('black', 3)}
WIDTH, HEIGHT = 660, 500   # of a panel


def draw_losses(path: Path) -> None:
    """Draw each loss over the score, and three of them as surfaces over score and IoU."""
    image = Image.new('RGB', (2400, 2190), 'white')   # halved at the end, for smooth lines
    pen, p = ImageDraw.Draw(image), torch.linspace(0.005, 0.995, 199)

    def frame(x: int, y: int, title: str, highest: float) -> None:
        """Draw axes: 0 to 1 to the right, 0 to `highest` upwards."""
        pen.rectangle((x, y, x + WIDTH, y + HEIGHT), outline='#555555', width=3)
        pen.text((x + WIDTH / 2, y - 12), title, 'black', font(40), anchor='ms')
        for part in (0, 0.5, 1):
            below = (x + part * WIDTH, y + HEIGHT + 12)
            pen.text(below, f'{part:g}', '#555555', font(30), anchor='ma')
            beside = (x - 12, y + (1 - part) * HEIGHT)
            pen.text(beside, f'{highest * part:g}', '#555555', font(30), anchor='rm')

    # Two rows of lines. Values beyond 3 leave the panel.
    for i, name in enumerate(('ce', *MATCHED)):
        x, y = i % 3 * 790 + 90, i // 3 * 690 + 80
        frame(x, y, name, 3)
        for iou, style in LINES.items():
            values = zip(p.tolist(), curve(name, p, iou)[0].tolist())
            points = [(x + WIDTH * a, y + HEIGHT * (1 - b / 3)) for a, b in values if b < 3]
            # IoU 0.5 is dashed, 4 of 8 pieces: its grey would look like that of 0.75.
            for k in range(0, len(points) - 1, 8):
                pen.line(points[k:k + (5 if iou == 0.5 else 9)], *style)
    # One row of surfaces, IoU 1 at the top. A step of grey is 1/4.
    for i, name in enumerate(('vfl', 'mal', 'stable')):
        x, y = i * 790 + 90, 1590
        rows = [curve(name, p, iou)[0] for iou in torch.linspace(1, 0, 100).tolist()]
        grey = 255 - 20 * (4 * torch.stack(rows).clamp(max=3)).floor()
        surface = Image.fromarray(grey.byte().numpy())
        image.paste(surface.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST), (x, y))
        frame(x, y, f'{name}, matched: IoU over p', 1)
    text = ('loss of a match over the score p (to the right) and the IoU (upwards): a step of grey '
            'is 1/4, white is below 1/4, darkest 3 and more')
    pen.text((1200, 1500), text, 'black', font(30), anchor='mm')
    # The legend of the lines.
    for j, (iou, style) in enumerate(LINES.items()):
        text = 'not matched' if iou is None else f'matched at IoU {iou:g}'
        for start in (60, 110):
            length = 30 if iou == 0.5 else 50
            pen.line((start + 450 * j, 1420, start + 450 * j + length, 1420), *style)
        pen.text((175 + 450 * j, 1420), text, 'black', font(30), anchor='lm')
    text = 'loss over the score p; ce, bce, focal: at any IoU'
    pen.text((1200, 1360), text, 'black', font(30), anchor='mm')
    image.reduce(2).save(path)


def draw_seconds(runs: list[Path], path: Path) -> None:
    """Draw the final AP of runs SCHEME-STEPS-SEED over their time, a line for each scheme.

    The time is the number of steps times the scheme's fastest `seconds_per_step`, since other
    processes may have slowed a run. A line is a mean over seeds, with the lowest and the highest.
    """
    ends, speed = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for folder in runs:
        scheme, steps, _ = folder.name.split('-')
        records = read_metrics(folder / 'metrics.jsonl')
        ends[scheme][int(steps)].append(records[-1]['AP'])
        speed[scheme] += [x['seconds_per_step'] for x in records if 'seconds_per_step' in x]
    lines = {}
    for scheme, lengths in ends.items():
        steps, aps = zip(*sorted(lengths.items()))
        seconds = min(speed[scheme]) * np.array(steps)
        lines[scheme] = seconds, *(np.array([f(seeds) for seeds in aps]) for f in SPREAD)
    line_chart(lines, ('seconds of a whole training', 'AP'), path)


def draw_unstable(runs: list[Path], path: Path) -> None:
    """Draw the last unstable score of runs NAME-SEED over the decoder layers, a line per NAME."""
    scores = defaultdict(list)
    for folder in runs:
        records = read_metrics(folder / 'metrics.jsonl')
        scores[folder.name.rpartition('-')[0]].append(records[-1]['unstable'])
    lines = {name: (np.arange(len(seeds[0])) + 1, *(f(seeds, 0) for f in SPREAD))
             for name, seeds in scores.items()}
    line_chart(lines, ('decoder layer', '% of objects that change their query'), path)


if __name__ == '__main__':
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    if not folder.is_dir():
        sys.exit(f'{folder}: is no folder')
    if len(sys.argv) > 2:
        draw = {'seconds': draw_seconds, 'unstable': draw_unstable}[sys.argv[2]]
        draw([Path(run) for run in sys.argv[3:]], folder / f'{sys.argv[2]}.png')
    else:
        draw_schemes(folder / 'schemes.png')
        draw_losses(folder / 'losses.png')
