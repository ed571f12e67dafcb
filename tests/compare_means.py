"""Is the mean of several networks better than one of them? `python tests/compare_means.py OUT 'size 384:1' 'size 384:2' 'size 512:1'`, on
what `compare_training.py OUT` trained, given as variant:seed

Their maps of what they have not seen are averaged, at the size of the first. As in `compare_training`, the rule is searched on the other
folds' maps of the same kind. Differences in pairs to the average score of the networks by themselves, with 95 % intervals by patient;
and the share of the weak negatives that each marks. tests/results/means.csv has a row per image and what was averaged; what stands there of
other networks is kept."""
import argparse
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from compare_training import FOLDS, by_other_folds, judged, maps_of, name_of
from comparing import all_images, ends

from pneumothorax.bootstrap import bootstrap_ci, paired_bootstrap
from pneumothorax.decide import TOPS, count_pixels, dice_of
from pneumothorax.folds import make_folds
from pneumothorax.metrics import auroc
from pneumothorax.records import open_maps

RESULTS = Path(__file__).parent/'results'/'means.csv'

def at(maps, side):
    "Maps at that size"
    return maps if maps.shape[-1] == side else np.stack([cv2.resize(m, (side, side), interpolation=cv2.INTER_LINEAR) for m in maps])

def mean_of(maps):
    "The mean of n×h×w bytes, rounded as a single network's are"
    return np.mean([at(m, maps[0].shape[-1]) for m in maps], 0).round().astype(np.uint8)

def healthy_of(out, variant, seed, fold):
    index, m, _ = open_maps(out/f'{name_of(variant, seed, fold)}.healthy')
    return m[index.sort_values('ImageId').row.to_numpy()]

def alarms(out, df, networks, counts):
    "Which of the weak negatives does the rule of each fold mark, 0 or 1"
    rules = by_other_folds(df, counts)[0]
    empty = [mean_of([healthy_of(out, *n, f) for n in networks]) for f in FOLDS]
    return np.concatenate([1-dice_of(count_pixels(m, [[]]*len(m), TOPS), r) for m, r in zip(empty, rules)])

def rows_of(a, df, networks):
    "A row per image, and the false alarms"
    counts, _, t = judged(df, mean_of([maps_of(a, df, *n) for n in networks]))
    return t, bootstrap_ci(alarms(a.out, df, networks, counts))

def line(name, t, al, alone, ill, who):
    "Value, and difference to the average of the networks `alone`, which are none for one of them"
    cells = []
    for column, rows in (('dice', ill | True), ('dice', ill), ('outline', ill)):
        mine = t[column].to_numpy()[rows]
        d = paired_bootstrap(mine, np.mean([o[column].to_numpy()[rows] for o in alone], 0), who[rows]) if alone else None
        cells += [f'{mine.mean():.3f}', f'{d.value:+.3f} {ends(d.lo, d.hi, "+.3f")}' if d else '']
    print('| '+' | '.join([name, *cells, f'{auroc(t.prob.to_numpy(), ill):.3f}', f'{al.value:.3f} {ends(al.lo, al.hi)}'])+' |')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path)
    p.add_argument('networks', nargs='+', help='variant:seed')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    df = all_images()
    df = df.merge(make_folds(df, n=len(FOLDS), seed=0), on='ImageId')
    df['patient_id'] = pd.factorize(df.patient_id)[0]
    networks = [(v, int(s)) for v, _, s in (n.rpartition(':') for n in a.networks)]
    got = {' + '.join(f'{v}:{s}' for v, s in k): rows_of(a, df, k) for k in [*([n] for n in networks), networks]}
    alone = [t for t, _ in got.values()][:-1]
    print('| | Dice | less one alone | on positives | less one alone | outlines | less one alone | AUROC | marked of the weak negatives |')
    print('|'+'---|'*9)
    for k, (t, al) in got.items():
        line(k, t, al, alone if ' + ' in k else [], df.has_ptx.to_numpy(bool), df.patient_id.to_numpy())
    old = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame({'networks': []})
    columns = ['ImageId', 'patient_id', 'has_ptx', 'fold', 'networks', 'dice', 'outline', 'prob']
    pd.concat([old[~old.networks.isin(got)], *(t.assign(networks=k)[columns] for k, (t, _) in got.items())]).to_csv(RESULTS, index=False)
