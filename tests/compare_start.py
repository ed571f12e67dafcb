"""Does a network get off the ground? `python tests/compare_start.py OUT [--seeds 2] [--jobs 2]`, then the same with `--report`

A small encoder with random weights learns phantoms of 128 px: with hypercolumns and without, with 8 images a step and with 2, by two
losses, and with two kinds of initial weights of the last layer. What counts is how well it ranks the pixels of phantoms that it has not
seen: average precision over all their pixels, which is the share of positive pixels (.002 to .003) for a network that learnt nothing. What
stands in OUT is not made again; tests/results/start.csv has a row per training."""
import itertools
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed

import pandas as pd
import torch
from comparing import parser, same_recipe, write

from pneumothorax import hyperunet
from pneumothorax.cache import prepare
from pneumothorax.metrics import average_precision
from pneumothorax.phantom import make_phantoms

PLAIN = hyperunet._score
MODELS, SIZES = ('hyperunet', 'hyperunet:hypercolumns=False'), (8, 2)
LOSSES = 'bce+dice', '30*bce+pos_dice'
HEADS = {'std 0.01': True, "torch's own": False}

def name_of(*words): return '.'.join(''.join(c if c.isalnum() else '-' for c in str(w)) for w in words)

def one(a, model, bs, loss, head, seed):
    "Train one network and say how it ranks pixels"
    from pneumothorax.train import train
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    hyperunet._score, f, t0 = (lambda nf, prior, small: PLAIN(nf, prior, HEADS[head]),
        a.out/f'{name_of(model, bs, loss, head, seed)}.csv', time.perf_counter())
    learn = train(a.out/'cache', f.with_suffix(''), loss=loss, model=model, encoder=a.encoder, weights='none', bs=bs, epochs=a.epochs,
        seed=seed, valid=.25, workers=0, progress=False, fresh=True)
    learn.model.eval()
    with torch.inference_mode(): p, y = (torch.cat(o).numpy().ravel() for o in zip(*[(learn.model(x), y) for x, y in learn.dls.valid]))
    hyperunet._score = PLAIN
    row = {'model': model, 'bs': bs, 'loss': loss, 'head': head, 'seed': seed, 'ap': round(average_precision(p, y), 4),
        'share': round(float((y > 0).mean()), 4), 'secs': round(time.perf_counter()-t0)}
    write(pd.DataFrame([row]), f)
    return f'{f.stem}: {row["ap"]:.3f}'

def report(a):
    "A line per way to start"
    t = pd.concat([pd.read_csv(f) for f in sorted(a.out.glob('*.csv'))], ignore_index=True)
    (a.out/'table').mkdir(exist_ok=True)
    write(t, a.out/'table'/'start.csv')
    print(t.groupby(['loss', 'head', 'model', 'bs']).ap.agg(['mean', 'min', 'max', 'count']).round(3).to_string())

if __name__ == '__main__':
    p = parser(__doc__, epochs=30, seeds=2)
    p.add_argument('--encoder', default='mobilenetv3_small_050')
    p.add_argument('--images', type=int, default=240)
    a = p.parse_args()
    same_recipe(a, ('epochs', 'encoder', 'images'))
    if a.report: report(a)
    else:
        if not (a.out/'cache'/'cache.json').exists():
            make_phantoms(a.out/'phantoms', a.images, seed=0)
            prepare(a.out/'phantoms', a.out/'cache', 128, progress=False)
        todo = [(*t, s) for s in range(a.seeds) for t in itertools.product(MODELS, SIZES, LOSSES, HEADS)]
        todo = [t for t in todo if not (a.out/f'{name_of(*t)}.csv').exists()]
        with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
            jobs = [pool.submit(one, a, *t) for t in todo]
            for i, j in enumerate(as_completed(jobs)): print(f'{i+1}/{len(jobs)} {j.result()}', flush=True)
