"""When do more than 8 bits matter? `python tests/compare_depth.py OUT [--seeds 3 --epochs 12 --images 160]`

The competition's files have 8 bits, so nothing can be gained there. Files of a hospital have 10 to 16, and a radiograph may use a small
part of its range (a low dose, a metal marker that takes the upper end). Phantoms of 12 bits and more are moved into a share of the range,
all of it, a tenth, a fortieth, as a detector would store them; then they keep their depth, or are rounded to 8 bits as a converter does it.
In a fortieth of the range 8 bits have six grey values left. The same network learns from each, ImageNet weights, its own statistics, and
ranks the pixels of the quarter that it has not seen: average precision over all their pixels. Depth minus 8 bits in pairs by seed, with a
95 % interval of the images, drawn again in both alike. tests/results/depth.csv has a row per share, depth and seed."""
import multiprocessing
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from comparing import ENCODER, parser, same_recipe

from pneumothorax.data import xray_dls
from pneumothorax.dicom import read_xray
from pneumothorax.learner import xray_learner
from pneumothorax.metrics import average_precision
from pneumothorax.phantom import make_phantoms

RESULTS, SHARES, DEPTHS, SIZE = Path(__file__).parent/'results'/'depth.csv', (1, 10, 40), ('full', '8 bits'), 128

def stored(sample, out, share, depth):
    "16-bit pictures as of a detector that uses one part in so many of its range, maybe rounded to 8 bits, with their labels"
    if (out/'train-rle.csv').exists(): return
    out.mkdir()
    for f in sorted(sample.glob('dicom-images-train/*/*/*.dcm')):
        x = .5+(read_xray(f)-.5)/share
        if depth == '8 bits': x = np.round(x*255)/255
        cv2.imwrite(str(out/f'{f.stem}.png'), np.round(x*65535).astype(np.uint16))
    shutil.copy(sample/'train-rle.csv', out)

def folder_of(share, depth): return f'{share}.{depth.replace(" ", "-")}'

def name_of(share, depth, seed): return f'{folder_of(share, depth)}.{seed}'

def one(a, share, depth, seed):
    "Train one network; probabilities and masks of what it has not seen"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    run, data = a.out/name_of(share, depth, seed), a.out/folder_of(share, depth)
    learn = xray_learner(xray_dls(data, SIZE, 4, valid=.25, workers=0, seed=0), encoder=ENCODER, weights=a.weights, seed=seed)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, a.lr)
    learn.model.eval()
    with torch.inference_mode(): out = [(learn.model(x).sigmoid(), y) for x, y in learn.dls.valid]
    p, y = (torch.cat(o).numpy() for o in zip(*out))
    np.savez_compressed(f'{run}.npz', p=p.reshape(len(p), -1).astype(np.float16), y=y.reshape(len(y), -1) > 0)
    return run.name

def score(p, y, rows): return average_precision(p[rows].ravel(), y[rows].ravel().astype(int))

def report(a):
    "A line per share: both depths, and their difference"
    rows = []
    for share in SHARES:
        got = {d: [np.load(a.out/f'{name_of(share, d, s)}.npz') for s in range(a.seeds)] for d in DEPTHS}
        got = {d: [(g['p'].astype(np.float32), g['y']) for g in gs] for d, gs in got.items()}
        rng, n = np.random.default_rng(0), len(got['full'][0][0])
        whole = {d: [score(*g, slice(None)) for g in gs] for d, gs in got.items()}
        rows += [{'share': share, 'depth': d, 'seed': s, 'ap': round(v, 4)} for d, vs in whole.items() for s, v in enumerate(vs)]
        diffs = []
        for _ in range(a.draws):
            i = rng.integers(0, n, n)
            if not any(y[i].any() for _, y in got['full']): continue
            diffs.append(np.mean([score(*f, i)-score(*e, i) for f, e in zip(got['full'], got['8 bits'])]))
        m = {d: f'{np.mean(v):.3f} ({min(v):.3f}–{max(v):.3f})' for d, v in whole.items()}
        lo, hi = np.quantile(diffs, [.025, .975])
        less = np.mean(whole['full'])-np.mean(whole['8 bits'])
        print(f'| 1/{share} | {m["full"]} | {m["8 bits"]} | {less:+.3f} [{lo:+.3f}, {hi:+.3f}] |')
    pd.DataFrame(rows).to_csv(RESULTS, index=False)

if __name__ == '__main__':
    p = parser(__doc__, epochs=12)
    p.add_argument('--images', type=int, default=160)
    p.add_argument('--draws', type=int, default=200)
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    same_recipe(a, ('epochs', 'weights', 'images'))
    if not a.report:
        sample = make_phantoms(a.out/'phantoms', n=a.images, n_test=4, size=SIZE, positive=.5, progress=False)
        todo = [(s, d, k) for k in range(a.seeds) for s in SHARES for d in DEPTHS if not (a.out/f'{name_of(s, d, k)}.npz').exists()]
        for s, d in {t[:2] for t in todo}: stored(sample, a.out/folder_of(s, d), s, d)
        with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
            jobs = [pool.submit(one, a, *t) for t in todo]
            for i, j in enumerate(as_completed(jobs)): print(f'{i+1}/{len(jobs)} {j.result()}', flush=True)
    print('| part of the range | full depth | 8 bits | difference |\n|---|---|---|---|')
    report(a)
