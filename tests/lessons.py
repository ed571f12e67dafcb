"""Do the notebooks read as lessons? `python tests/lessons.py [COMMIT]`

A line per notebook, as it is stored or was at a commit: words of prose, figures that a reader sees and their widths in pixels, after how
many visible cells the first result (figure or table) comes, the longest line of code, and whether the end says what to remember and what to
try. `test_style` holds the notebooks to it."""
import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
from PIL import Image

ROOT = Path(__file__).parent.parent
WIDE, LONGEST, SOON = 600, 140, 3     # pixels of a figure, columns of code, visible cells before the first result

class Lesson(NamedTuple):
    words: int
    widths: list     # of figures, pixels
    first: int       # visible cells after the title until the first result, counted from 1; 0 for none
    columns: int     # of the longest line of code
    ends: bool       # what to remember, and two things to try with hidden answers

def hidden(c): return c.cell_type == 'code' and re.search(r'^#\|\s*(hide|default_exp)\b', c.source, re.MULTILINE) is not None

def picture_width(data):
    "Width of a stored picture, of the kinds that a notebook may hold; None for what is no picture"
    for kind in ('image/png', 'image/jpeg'):
        if kind in data: return Image.open(io.BytesIO(base64.b64decode(data[kind]))).width
    svg = re.search(r'<svg[^>]*?viewBox="[\d.-]+ [\d.-]+ ([\d.]+)', data.get('image/svg+xml') or data.get('text/html', ''))
    return round(float(svg[1])) if svg else None

def linked_widths(c, root=ROOT/'nbs'):
    "Widths of pictures that prose shows"
    return [Image.open(root/f).width for f in re.findall(r'!\[[^]]*\]\(([^)]+)\)', c.source)]

def widths(c):
    "Widths of the figures of a cell"
    if c.cell_type == 'markdown': return linked_widths(c)
    return [w for o in c.get('outputs', []) if (w := picture_width(o.get('data', {}))) is not None]

def has_table(c):
    if c.cell_type == 'markdown': return re.search(r'^\|\s*-', c.source, re.MULTILINE) is not None
    return any('<table' in o.get('data', {}).get('text/html', '') for o in c.get('outputs', []))

def lesson(cells):
    "What a reader of these cells meets"
    seen = [c for c in cells if not hidden(c)]
    first = next((i for i, c in enumerate(seen) if i and (widths(c) or has_table(c))), 0)
    last = seen[-1].source
    ends = all(w in last for w in ('## What to remember', '## Try it')) and last.count('<details>') >= 2
    columns = max((len(line) for c in cells if c.cell_type == 'code' for line in c.source.splitlines()), default=0)
    return Lesson(sum(len(c.source.split()) for c in cells if c.cell_type == 'markdown'),
        [w for c in seen for w in widths(c)], first, columns, ends)

def notebooks(commit=None):
    "Name and cells of each notebook, as they are or were"
    if not commit: return [(f.stem, nbformat.read(f, as_version=4).cells) for f in sorted((ROOT/'nbs').glob('*.ipynb'))]
    git = lambda *a: subprocess.run(['git', *a], cwd=ROOT, capture_output=True, check=True, text=True, encoding='utf-8').stdout
    files = [f for f in git('ls-tree', '--name-only', commit, 'nbs/').split() if f.endswith('.ipynb')]
    return [(Path(f).stem, nbformat.from_dict(json.loads(git('show', f'{commit}:{f}'), object_hook=joined)).cells) for f in files]

def joined(d):
    "Sources and outputs as one text, as nbformat's reader gives them"
    return {k: ''.join(v) if isinstance(v, list) and v and all(isinstance(x, str) for x in v) else v for k, v in d.items()}

if __name__ == '__main__':
    found = [(name, lesson(cells)) for name, cells in notebooks(*sys.argv[1:2])]
    print('| notebook | words | figures | widths | first result after | longest line | ends |\n|---|---|---|---|---|---|---|')
    for name, r in found:
        print(f'| {name} | {r.words:,} | {len(r.widths)} | {", ".join(map(str, r.widths))} | '
            f'{r.first or "none"} | {r.columns} | {"yes" if r.ends else "no"} |')
    ws = sorted(w for _, r in found for w in r.widths)
    print(f'\n{len(found)} notebooks, {len(ws)} figures, median width {ws[len(ws)//2]}, '
        f'{sum(w >= WIDE for w in ws)} of at least {WIDE} pixels; '
        f'{sum(0 < r.first <= SOON for _, r in found)} begin with a result, {sum(r.ends for _, r in found)} end with what to remember')
