"""Memory and time of `predict_maps`: `python tests/bench_predict.py [--images 100 3000] [--size 128] [--rounds 5]`

Each prediction runs in a process of its own with two reading processes; shared pages are counted once (PSS), and the file of the maps,
which the system may write back and drop at any time, is left out. The radiographs are links to a few phantoms. The time is that of
`predict_maps` relative to fastai's `Learner.get_preds` over the same files with the same network, which keeps all maps as floats in memory
and writes nothing; both take turns, the median of the rounds is printed with the smallest and largest."""
import argparse
import multiprocessing
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from racing import keep


def pss(pid):
    "Proportional share of a process and its children, without the mapped maps, in bytes"
    total, children = 0, []
    try:
        for task in Path(f'/proc/{pid}/task').iterdir(): children += (task/'children').read_text().split()
        mapped = False
        for line in Path(f'/proc/{pid}/smaps').read_text().splitlines():
            if '-' in line.split(' ')[0]: mapped = 'maps.npy' in line
            elif line.startswith('Pss:') and not mapped: total += 1024*int(line.split()[1])
    except OSError: return 0   # it has ended
    return total+sum(pss(c) for c in children)

def predict(run, images, out):
    "One prediction, in a process of its own"
    warnings.filterwarnings('ignore')
    import torch

    from pneumothorax.predict import predict_maps
    torch.set_num_threads(1)
    predict_maps(run, images, out, workers=2, progress=False, fresh=True)

def peak(run, images, out):
    "Largest memory of a prediction"
    p = multiprocessing.get_context('spawn').Process(target=predict, args=(run, images, out))
    p.start()
    most = 0
    while p.is_alive():
        most = max(most, pss(p.pid))
        time.sleep(.2)
    if p.exitcode: raise SystemExit('the prediction failed')
    return most

def links(d, files, n):
    "A folder of so many radiographs"
    out = d/f'images-{n}'
    out.mkdir()
    for i in range(n): os.symlink(files[i % len(files)], out/f'x{i:05d}.dcm')
    return out

def main(a):
    import pandas as pd
    import torch

    from pneumothorax.phantom import make_phantoms
    from pneumothorax.predict import predict_maps
    from pneumothorax.train import train
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        d = Path(tmp)
        data = make_phantoms(d/'sample', n=16, size=a.size, positive=.5, progress=False)
        learn = train(data, d/'run', size=a.size, bs=4, epochs=1, encoder=a.encoder, weights='none', valid=.5, workers=0, progress=False)
        files = sorted(data.rglob('*.dcm'))
        for n in a.images:
            images = links(d, files, n)
            print(f'{n:6,} images: at most {peak(d/"run", images, d/"pred")/1e6:,.0f} MB, maps of {n*a.size**2/1e6:.0f} MB on the disk',
                flush=True)
        images = links(d, files, a.timed)

        dl, ratios = learn.dls.test_dl(pd.DataFrame({'path': sorted(map(str, images.iterdir())), 'rles': [[]]*a.timed}),
            bs=8, num_workers=2), []
        for _ in range(a.rounds):
            t = time.perf_counter()
            with learn.no_bar(), learn.no_logging(): learn.get_preds(dl=dl)
            theirs, t = time.perf_counter()-t, time.perf_counter()
            predict_maps(d/'run', images, d/'pred', workers=2, progress=False, fresh=True)
            ratios.append((time.perf_counter()-t)/theirs)
        keep(f'prediction of {a.timed} radiographs of {a.size} px, two reading processes', 'predict_maps', "fastai's get_preds", ratios)
        print(f'time of predict_maps relative to get_preds, {a.timed} images: '
            f'{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--images', type=int, nargs='+', default=[100, 3000])
    p.add_argument('--size', type=int, default=128)
    p.add_argument('--timed', type=int, default=400, help='images of the comparison of times')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--encoder', default='mobilenetv3_small_050')
    warnings.filterwarnings('ignore')
    main(p.parse_args())
