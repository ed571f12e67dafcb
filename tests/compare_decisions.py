"""What each step from map to mask is worth on the real radiographs: `python tests/compare_decisions.py OUT [--seeds 1] [--jobs 2]`

The 114 radiographs of `$PTX_SHARED/siim-small` in four folds by patient; a network for each pair of folds, trained on these two (recipe `stable`) and predicting the
other two. Each fold is the test set once. Of the three others each is predicted by the network of the remaining two, which has seen neither it nor the test set:
on these out-of-fold maps the rule is searched and the gate is fitted, and the same networks predict the test set, each alone or all three together.
So nothing is ever tuned on what it is scored on. What stands in OUT is not made again; `--report` only prints."""
import itertools
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from comparing import images, parser, same_recipe

from pneumothorax.cache import prepare
from pneumothorax.folds import make_folds

FOLDS = range(4)
PAIRS = list(itertools.combinations(FOLDS, 2))

def fit(cache, ids, pair, seed, a):
    "Train the network of a pair of folds, or go on with it"
    from pneumothorax.train import train
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    run = a.out/f'run-{pair[0]}{pair[1]}-{seed}'
    if not (run/'run.json').exists(): train(cache, run, 'stable', valid=ids, seed=seed, weights=a.weights, workers=0, progress=False, size=a.size, epochs=a.epochs, encoder=a.encoder)
    return f'{run.name} trained'

def train_all(a, df, cache):
    "A network for each pair of folds and each seed"
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
        jobs = [pool.submit(fit, cache, df.ImageId[~df.fold.isin(p)].tolist(), p, s, a) for s in range(a.seeds) for p in PAIRS]
        for i, j in enumerate(as_completed(jobs)): print(f'{i+1}/{len(jobs)} {j.result()}', flush=True)

if __name__ == '__main__':
    p = parser(__doc__, seeds=1, epochs=16)
    p.add_argument('--encoder', default='tf_efficientnet_lite0')
    a = p.parse_args()
    same_recipe(a, ('epochs', 'size', 'weights', 'encoder'))
    df, cache = images(a), a.out/f'cache-{a.size}'
    prepare(df, cache, a.size, progress=False)
    df = df.merge(make_folds(df, n=len(FOLDS), seed=0), on='ImageId')
    if not a.report: train_all(a, df, cache)
