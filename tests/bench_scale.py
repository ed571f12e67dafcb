"""How time and memory of each stage grow: `python tests/bench_scale.py OUT [--images 100 400 1600 6400 12000] [--stages …]`

The competition has 10,675 radiographs with labels; nothing in a test shows what happens there. Each stage runs alone, in a process of its
own with one thread and no reading processes, on n radiographs of 128 px: 64 phantoms of which each stands there n/64 times, with
identifiers and patients of its own and other noise in its pixels, so that no two are the same. Kept in tests/results/scale.csv: seconds of
the processor for the stage (its children's, too) without the start of Python, and the largest memory of the process (proportional share,
without the file of the maps, which the system may write back). The exponent says how time grows, n^exponent, by least squares over the
logarithms from 1,600 images on: 1 is as it should be. What stands in the table is not measured again unless its stage is named; `--report`
prints the table alone. 12,000 images take about half an hour and 2 GB of disk."""
import argparse
import json
import multiprocessing
import os
import shutil
import traceback
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from bench import machine
from bench_predict import pss

RESULTS, SIZE, BASE = Path(__file__).parent/'results'/'scale.csv', 128, 64
COLUMNS, NET = ['stage', 'images', 'seconds', 'mb'], {'encoder': 'mobilenetv3_small_050', 'weights': 'none'}

def sample(d, n):
    "n radiographs made of `BASE` phantoms, in the competition's form; nothing is made that is there"
    import pydicom

    from pneumothorax.phantom import make_phantoms
    base, out = make_phantoms(d.parent/'base', n=BASE, n_test=8, size=SIZE, positive=.22, progress=False), d/'data'
    if (out/'train-rle.csv').exists(): return out
    rng, rows = np.random.default_rng(n), pd.read_csv(base/'train-rle.csv', dtype=str)
    rows = list(rows.groupby(rows.columns[0]))
    where, lines = {f.stem: f for f in base.rglob('dicom-images-train/*/*/*.dcm')}, []
    (out/'images').mkdir(parents=True, exist_ok=True)
    for i in range(n):
        uid, masks = rows[i % len(rows)]
        x, new = pydicom.dcmread(where[uid]), f'{uid}.{i+1}'
        x.SOPInstanceUID = x.file_meta.MediaStorageSOPInstanceUID = new
        x.PatientID = f'p{i}'
        if not x.file_meta.TransferSyntaxUID.is_compressed:
            a = x.pixel_array
            x.PixelData = np.where(rng.random(a.shape) < .1, a ^ 1, a).astype(a.dtype).tobytes()
        x.save_as(out/'images'/f'{new}.dcm')
        lines.append(masks.assign(**{masks.columns[0]: new}))
    pd.concat(lines).to_csv(out/'train-rle.csv', index=False)
    return out

def network(d):
    "One small network for all"
    from pneumothorax.train import train
    run = d.parent/'run'
    if not (run/'run.json').exists():
        train(d.parent/'base', run, size=SIZE, bs=8, epochs=1, valid=.5, workers=0, progress=False, **NET)
    return run

def labels(d):
    from pneumothorax.siim import siim_train
    siim_train(d/'data')

def audit(d):
    from pneumothorax.siim import audit_labels
    audit_labels(d/'data'/'train-rle.csv', d/'data'/'images')

def folds(d):
    from pneumothorax.folds import make_folds
    from pneumothorax.siim import read_labels
    make_folds(read_labels(d/'data'/'train-rle.csv'))

def duplicates(d):
    from pneumothorax.folds import near_duplicates
    near_duplicates(sorted((d/'data'/'images').iterdir()), workers=0)

def prepare(d):
    from pneumothorax.cache import prepare
    prepare(d/'data', d/'cache', SIZE, workers=0, progress=False)

def cache(d):
    "Read each image and mask once"
    from pneumothorax.cache import XrayCache
    c = XrayCache(d/'cache')
    for i in range(len(c)): c.image(i), c.mask(i)

def epoch(d):
    "An epoch of a small network at 64 px"
    from pneumothorax.train import train
    train(d/'cache', d/'run', size=64, bs=16, epochs=1, workers=0, progress=False, fresh=True, **NET)

def predict(d):
    from pneumothorax.predict import predict_maps
    predict_maps(network(d), d/'data'/'images', d/'pred', workers=0, progress=False, fresh=True)

def search(d):
    from pneumothorax.decide import TOPS, count_pixels, search
    from pneumothorax.records import open_maps
    from pneumothorax.siim import read_labels
    index, maps, _ = open_maps(d/'pred')
    rles = read_labels(d/'data'/'train-rle.csv').set_index('ImageId').rles
    search(count_pixels(maps, rles[index.sort_values('row').ImageId].tolist(), TOPS))

def submit(d):
    from pneumothorax.submission import write_submission
    write_submission(d/'pred', d/'submission.csv', progress=False, decision='0.5,800,0.3')

def score(d):
    "With intervals, from 10,000 resamples"
    from pneumothorax.scoring import score_report
    score_report([d/'submission.csv'], d/'data'/'train-rle.csv')

def merge(d):
    "Three submissions"
    from pneumothorax.merging import merge_submissions
    merge_submissions([shutil.copy(d/'submission.csv', d/f'submission-{k}.csv') for k in range(3)], d/'merged.csv')

def export(d):
    "A PNG for each radiograph"
    from pneumothorax.export import export_masks
    shutil.rmtree(d/'masks', ignore_errors=True)
    export_masks(d/'pred', d/'masks', decision='0.5,800,0.3', progress=False)

def report(d):
    from pneumothorax.report import report
    report(network(d), d/'pred', d/'report.html', labels=d/'data'/'train-rle.csv', decision='0.5,800,0.3')

STAGES = {f.__name__: f for f in (labels, audit, folds, duplicates, prepare, cache, epoch, predict, search, submit, score, merge, export,
    report)}

def alone(name, d, pipe):
    "One stage; how long it took, or what went wrong"
    warnings.filterwarnings('ignore')
    import torch

    torch.set_num_threads(1)
    f = STAGES[name]
    if name in ('predict', 'report'): network(d)
    t = sum(os.times()[:4])
    try:
        f(d)
        pipe.send(sum(os.times()[:4])-t)
    except Exception: pipe.send(traceback.format_exc())     # noqa: BLE001  it is told, and the others go on

def measured(name, d):
    "Seconds, and MB at most"
    ours, theirs = multiprocessing.Pipe()
    p = multiprocessing.get_context('spawn').Process(target=alone, args=(name, d, theirs))
    p.start()
    most = 0
    while p.is_alive() and not ours.poll(.1): most = max(most, pss(p.pid))
    said = ours.recv() if ours.poll() else f'ended with {p.exitcode}'
    p.join()
    if isinstance(said, str): raise RuntimeError(said)     # noqa: TRY004  it is what a stage said
    return said, most/1e6

def exponent(t, least=1600):
    "Of time, over the larger half of the sizes"
    t = t[t.images >= least]
    return np.polyfit(np.log(t.images), np.log(t.seconds), 1)[0] if len(t) > 1 else np.nan

def table(results):
    "A line for each stage: seconds and MB by number of images, exponent"
    t = pd.read_csv(results)
    return pd.DataFrame({s: {**{f'{n:,} images': f'{g.seconds.iloc[0]:.1f} s, {g.mb.iloc[0]:,.0f} MB' for n, g in of.groupby('images')},
        'exponent': f'{exponent(of):.2f}'} for s, of in t.groupby('stage', sort=False)}).T

def main(a):
    old = pd.read_csv(a.results) if a.results.exists() else pd.DataFrame(columns=COLUMNS)
    if a.stages: old = old[~(old.stage.isin(a.stages) & old.images.isin(a.images))]
    failed = []
    for n in a.images:
        d = a.out/f'{n}'
        d.mkdir(parents=True, exist_ok=True)
        sample(d, n)
        network(d)
        for s in STAGES:
            if ((old.stage == s) & (old.images == n)).any(): continue
            try: secs, mb = measured(s, d)
            except RuntimeError as e:
                failed.append(f'{s} of {n} images: {e}')
                continue
            old = pd.DataFrame([*old.to_numpy().tolist(), [s, n, round(secs, 3), round(mb)]], columns=COLUMNS)
            old.sort_values(['stage', 'images'], key=lambda c: c.map(list(STAGES).index) if c.name == 'stage' else c).to_csv(
                a.results, index=False)
            a.results.with_suffix('.json').write_text(json.dumps(machine(), indent=0)+'\n')
            print(f'{s:12} {n:6,} images {secs:8.2f} s {mb:8,.0f} MB', flush=True)
    return failed

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path, nargs='?')
    p.add_argument('--images', type=int, nargs='+', default=[100, 400, 1600, 6400, 12000])
    p.add_argument('--stages', nargs='+', choices=list(STAGES), default=[], help='to measure anew')
    p.add_argument('--results', type=Path, default=RESULTS)
    p.add_argument('--report', action='store_true')
    warnings.filterwarnings('ignore')
    a = p.parse_args()
    if not a.report and a.out is None: p.error('a folder for the radiographs is needed')
    failed = [] if a.report else main(a)
    print(table(a.results).to_string())
    if failed: raise SystemExit('\n'.join(failed))
