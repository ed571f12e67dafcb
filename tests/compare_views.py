"""What do several looks at a radiograph give? `python tests/compare_views.py OUT [--variant base --seeds 3]`, on the networks that
`compare_training.py OUT` trained

Each network predicts the fold that it has not seen with each set of views; the rule is searched on the other folds' maps of the same views,
as in `compare_training`. Differences to one look in pairs, 95 % intervals by patient; the time of a prediction as a ratio to one look's, in
the same run. Seeds whose networks are not there are left out and told. tests/results/views.csv has a row per image, views and seed."""
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from compare_training import FOLDS, compared, judged, maps_of, name_of
from comparing import all_images, parser

from pneumothorax.folds import make_folds
from pneumothorax.metrics import auroc
from pneumothorax.predict import predict_maps

RESULTS, ONE = Path(__file__).parent/'results'/'views.csv', 'identity'
VIEWS = {'one look': ONE, 'mirrored (`hflip`)': 'hflip', 'three sizes, mirrored':
    'identity,hflip,scale:0.75,hflip+scale:0.75,scale:1.25,hflip+scale:1.25', 'turned by 5°': 'identity,rotate:5,rotate:-5',
    'CLAHE and gamma': 'identity,clahe,gamma:gamma=0.8', 'all twelve (`full`)': 'full'}

def rows_of(a, df, variant, seed, views):
    "A row per image, with the seconds that all of them took"
    secs = 0.
    for f in FOLDS:
        out, files = a.out/f'{name_of(variant, seed, f)}.views', df.path[df.fold == f].tolist()
        t = time.perf_counter()
        predict_maps(a.out/name_of(variant, seed, f), files, out, tta=VIEWS[views], workers=0, progress=False, fresh=True)
        secs += time.perf_counter()-t
    t = judged(df, maps_of(a, df, variant, seed, 'views'))[-1].assign(variant=variant, views=views, seed=seed, secs=round(secs, 1))
    return t[['ImageId', 'patient_id', 'has_ptx', 'fold', 'variant', 'views', 'seed', 'secs', 'dice', 'outline', 'prob']]

def report(t):
    "A line for each set of views"
    print('| views | seeds | Dice | difference | on positives | difference | outlines | difference | AUROC | time |\n|'+'---|'*10)
    of = {v: dict(list(g.groupby('seed'))) for v, g in t.groupby('views', sort=False)}
    base = of['one look']
    first = next(iter(base.values()))
    who, ill = first.patient_id.to_numpy(), first.has_ptx.to_numpy(bool)
    for v, ts in of.items():
        cells = [s for c, r in (('dice', slice(None)), ('dice', ill), ('outline', ill)) for s in compared(ts, base, c, r, who)]
        rank = [auroc(g.prob.to_numpy(), g.has_ptx.to_numpy(bool)) for g in ts.values()]
        ratio = np.mean([g.secs.iloc[0]/base[s].secs.iloc[0] for s, g in ts.items()])
        print('| '+' | '.join([v, str(len(ts)), *cells, f'{np.mean(rank):.3f}', f'{ratio:.1f}'])+' |')

if __name__ == '__main__':
    p = parser(__doc__)
    p.add_argument('--variant', default='base')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    df = all_images()
    df = df.merge(make_folds(df, n=len(FOLDS), seed=0), on='ImageId')
    df['patient_id'] = pd.factorize(df.patient_id)[0]
    there = [s for s in range(a.seeds) if all((a.out/name_of(a.variant, s, f)/'run.json').exists() for f in FOLDS)]
    if len(there) < a.seeds: print(f'{a.variant}: networks of the seeds {there} only')
    old = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame({'variant': [], 'seed': [], 'views': []})
    for s in there:
        for v in VIEWS:
            if ((old.variant == a.variant) & (old.seed == s) & (old.views == v)).any(): continue
            old = pd.concat([old, rows_of(a, df, a.variant, s, v)], ignore_index=True)
            old.to_csv(RESULTS, index=False)
    report(old[old.variant == a.variant])
