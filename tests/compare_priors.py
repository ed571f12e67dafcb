"""Does it help to know where pneumothoraces are? `python tests/compare_priors.py OUT [--variant base]`, after
`tests/compare_training.py OUT --only base`

The share of the competition's masks that cover a place (`position_prior` of all positives of `$PTX_SHARED/siim-labels` but the 172
radiographs at hand, both sides alike) as an offset of the logits, with growing weight: the maps are those of `compare_training.py`, each by
the network that has not seen the image, the rule of a fold is searched on the others. Differences to the maps as they are, with 95 %
intervals by patient."""
import argparse
from pathlib import Path

import numpy as np
from compare_training import FOLDS, by_other_folds, maps_of
from comparing import SHARED, all_images, ends

from pneumothorax.bootstrap import paired_bootstrap
from pneumothorax.decide import TOPS, count_pixels
from pneumothorax.folds import make_folds
from pneumothorax.metrics import auroc, image_prob
from pneumothorax.priors import position_prior
from pneumothorax.siim import read_labels

WEIGHTS = 0, .1, .25, .5, 1

def logits_of_places(df, size):
    "Log-odds of each place, those of the tenth that is likeliest at 0"
    t = read_labels(SHARED/'siim-labels'/'stage_2_train.csv.gz')
    p = position_prior([r for r in t.rles[~t.ImageId.isin(df.ImageId)] if len(r)], size)
    z = np.log((p+p[:, ::-1])/(2-p-p[:, ::-1]))
    return z-np.quantile(z, .9)

def scored(df, probs):
    "Dice by a rule of the other folds, Dice on positives by their best threshold, AUROC of each fold"
    y, fold = df.has_ptx.to_numpy(bool), df.fold.to_numpy()
    _, dice, outline = by_other_folds(df, count_pixels((probs*255).round().astype(np.uint8), df.rles.tolist(), TOPS))
    return dice, outline, np.mean([auroc(image_prob(probs[fold == f], 64), y[fold == f]) for f in FOLDS])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path)
    p.add_argument('--variant', default='base')
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    df = all_images()
    df = df.merge(make_folds(df, n=len(FOLDS), seed=0), on='ImageId')
    m = (maps_of(a, df, a.variant, a.seed).astype(np.float32)/255).clip(1e-3, 1-1e-3)
    z, places, y, who, first = np.log(m/(1-m)), logits_of_places(df, m.shape[-1]), df.has_ptx.to_numpy(bool), df.patient_id.to_numpy(), None
    print(f'{a.variant}, seed {a.seed}\n'
        '| weight | Dice | difference | outlines | difference | AUROC of a fold |\n|---|---|---|---|---|---|')
    for w in WEIGHTS:
        dice, outline, au = scored(df, 1/(1+np.exp(-z-w*places)))
        first = first or (dice, outline)
        d, o = paired_bootstrap(dice, first[0], who), paired_bootstrap(outline[y], first[1][y], who[y])
        differ = [f'{v.value:+.3f} {ends(v.lo, v.hi, "+.3f")}' if w else '' for v in (d, o)]
        print(f'| {w:g} | {dice.mean():.3f} | {differ[0]} | {outline[y].mean():.3f} | {differ[1]} | {au:.3f} |', flush=True)
