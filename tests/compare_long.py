"""Which loss bears a long training? `python tests/compare_long.py OUT [--epochs 100 --size 128 --only bce…] [--jobs 2]`, then `--report`

The two thirds of the 172 radiographs of `$PTX_SHARED/siim-small` and `siim-more` that the first fold of `compare_training` learns from, and
the third that it has not seen. A network for each loss, the default recipe else, one seed. Kept in tests/results/long.csv: for each epoch
the Dice on positives, and the share of healthy radiographs that stay empty, by the plain threshold of one half; and the AUROC of the images
at the end. What stands in OUT is not trained again; an interrupted training goes on."""
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from compare_training import FOLDS, OTHER
from comparing import all_images, parser, same_recipe

from pneumothorax.cache import prepare
from pneumothorax.folds import make_folds
from pneumothorax.metrics import auroc, image_prob
from pneumothorax.records import open_maps

RESULTS, LOSSES = Path(__file__).parent/'results'/'long.csv', ('30*bce+pos_dice', *OTHER)

def name_of(loss): return loss.replace('*', 'x').replace('+', '-').replace(':', '-')

def fit(a, df, loss):
    "Train on all but fold 0, and predict it"
    from pneumothorax.predict import predict_maps
    from pneumothorax.train import train
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    unseen, out = df[df.fold == 0], a.out/name_of(loss)
    if not (out/'run.json').exists():
        train(a.out/'cache', out, 'default', loss=loss, epochs=a.epochs, valid=unseen.ImageId.tolist(), weights=a.weights, workers=0,
            progress=False)
    if not (a.out/f'{out.name}.maps'/'predict.json').exists():
        predict_maps(out, unseen.path.tolist(), a.out/f'{out.name}.maps', workers=0, progress=False, fresh=True)
    return loss

def rows_of(a, df, loss):
    "A row per epoch"
    index, m, _ = open_maps(a.out/f'{name_of(loss)}.maps')
    ill = df.set_index('ImageId').has_ptx[index.ImageId].to_numpy(bool)
    h = pd.read_csv(a.out/name_of(loss)/'history.csv')[['epoch', 'train_loss', 'dice', 'dice_pos', 'dice_neg']].round(4)
    return h.assign(loss=loss, auroc=round(auroc(image_prob(m[index.row.to_numpy()].astype(np.float32)/255, 64), ill), 4))

def report(a, df):
    "What each ends with, and its best Dice on positives on the way"
    there = [k for k in LOSSES if (a.out/f'{name_of(k)}.maps'/'predict.json').exists()]
    if left := [k for k in LOSSES if k not in there]: print('not there:', ', '.join(left))
    t = pd.concat([rows_of(a, df, k) for k in there])
    print('| loss | Dice on positives, best epoch | last ten | healthy left empty, last ten | AUROC |\n|'+'---|'*5)
    for k, g in t.groupby('loss', sort=False):
        end = g.tail(10)
        best = f'{g.dice_pos.max():.3f} ({g.epoch[g.dice_pos.idxmax()]+1})'
        print(f'| `{k}` | {best} | {end.dice_pos.mean():.3f} | {end.dice_neg.mean():.3f} | {g.auroc.iloc[0]:.3f} |')
    t.to_csv(RESULTS, index=False)

if __name__ == '__main__':
    p = parser(__doc__, epochs=100, size=128)
    p.add_argument('--only', nargs='+', default=LOSSES, help='losses')
    a = p.parse_args()
    if bad := set(a.only)-set(LOSSES): sys.exit(f'{", ".join(bad)}: there are {", ".join(LOSSES)}')
    same_recipe(a, ('epochs', 'size', 'weights'))
    df = all_images()
    df = df.merge(make_folds(df, n=len(FOLDS), seed=0), on='ImageId')
    if a.report: report(a, df)
    else:
        prepare(df, a.out/'cache', a.size, progress=False)
        with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
            for j in as_completed([pool.submit(fit, a, df, k) for k in a.only]): print(j.result(), flush=True)
