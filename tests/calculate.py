"""What the whole competition costs, on paper: `python tests/calculate.py [--recipes full default first_place]`

Nobody here has run it. Floating-point operations of a training step are counted by torch (`FlopCounterMode`), and the bytes that it moves
from the sizes of what each layer reads and writes: once forward, twice backward. A device takes at least the longer of the two at the rates
of its data sheet (the roofline of Williams et al., 2009), which no program reaches; two to four times as long is usual. Images of an epoch
are four fifths of the competition's first stage, as the recipe's sampling takes them; the other fifth is looked at once in an epoch. Eight
GPUs divide the work and exchange gradients in a ring, 2·(7/8) of the parameters in 4 bytes at the rate of their link, once in a step. What
one core of this machine reads of a prepared cache in a second is measured, and says how many reading processes that GPU would wait for."""
import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bench import machine
from torch.utils.flop_counter import FlopCounterMode

from pneumothorax.losses import xray_loss
from pneumothorax.models import xray_model
from pneumothorax.train import make_recipe

RESULTS = Path(__file__).parent/'results'/'full.json'
IMAGES, POSITIVES, TRAINED = 10_675, 2_379, .8     # of the first stage
# in a second: operations in 16 bits, in full precision (TF32 where there is), bytes of memory, bytes to the next GPU (0: no eight)
DEVICES = {'T4 (Kaggle)': (65e12, 8.1e12, .32e12, 0), 'A100 80 GB': (312e12, 156e12, 2e12, 300e9), 'H200': (989e12, 495e12, 4.8e12, 450e9)}

def step_cost(net, loss, size, bs=2):
    "FLOPs and 4-byte bytes moved of a training step, and FLOPs of a look, for one image; parameters"
    x, y, moved = torch.randn(bs, 1, size, size), torch.zeros(bs, 1, size, size), []
    def hook(m, i, o): moved.extend(t.numel()*4 for t in [*i, *(o if isinstance(o, (tuple, list)) else [o])] if torch.is_tensor(t))
    hooks = [m.register_forward_hook(hook) for m in net.modules() if not list(m.children())]
    with FlopCounterMode(display=False) as look, torch.no_grad(): net(x)
    moved.clear()
    with FlopCounterMode(display=False) as step: loss(net(x), y).backward()
    for h in hooks: h.remove()
    net.zero_grad()
    return step.get_total_flops()/bs, 3*sum(moved)/bs, look.get_total_flops()/bs

def images_of(recipe, epochs):
    "Images that an epoch takes, on the average"
    kind, *rest = recipe.sampling.replace(':', ',').split(',')
    if kind == 'plain': return IMAGES*TRAINED
    shares = np.linspace(float(rest[0]), float(rest[-1]), epochs)
    return float(np.mean(POSITIVES*TRAINED/shares))

def best_of(f, n=5):
    "Seconds"
    times = []
    for _ in range(n):
        t = time.perf_counter()
        f()
        times.append(time.perf_counter()-t)
    return min(times)

def bound(flops, moved, rate, bandwidth): return max(flops/rate, moved/bandwidth)

def read_rate(size, n=32):
    "Images that one core reads of a cache in a second, up to the batch that a GPU gets"
    from pneumothorax.cache import prepare
    from pneumothorax.data import xray_dls
    from pneumothorax.phantom import make_phantoms
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        prepare(make_phantoms(f'{d}/sample', n=n, n_test=4, size=512, progress=False), f'{d}/cache', size, progress=False)
        dl = xray_dls(f'{d}/cache', size, 8, valid=.2, workers=0).train
        batch = list(range(8))
        return 8/best_of(lambda: dl.create_batch([dl.do_item(i) for i in batch]), 10)

def stages(recipe):
    "Size, epochs and images in a step of each stage"
    sizes = recipe.size if isinstance(recipe.size, list) else [recipe.size or 512]
    many = lambda v: v if isinstance(v, list) else [v]
    n = max(len(many(v)) for v in (sizes, recipe.epochs, recipe.bs))
    fill = lambda v: (many(v)*n)[:n]
    return list(zip(fill(sizes), fill(recipe.epochs), fill(recipe.bs)))

def calculate(name):
    "What a recipe computes and moves, the minutes on each device at least, and the images that the fastest stage wants in a second"
    r = make_recipe(name)
    net, loss, half = xray_model(r.model, r.encoder).train(), xray_loss(r.loss), r.precision == 'mixed'
    params = sum(p.numel() for p in net.parameters())
    secs, fed = {**dict.fromkeys(DEVICES, 0.), **{f'8 × {d}': 0. for d, v in DEVICES.items() if v[3]}}, dict.fromkeys(DEVICES, 0.)
    flops = moved = steps = 0
    for size, epochs, bs in stages(r):
        f, m, look = step_cost(net, loss, size)
        n, seen = images_of(r, epochs)*epochs, IMAGES*(1-TRAINED)*epochs
        flops, moved, steps = flops+n*f+seen*look, moved+n*m+seen*m/3, steps+n/bs
        for d, (in16, full, wide, link) in DEVICES.items():
            rate, bits = (in16, 2) if half else (full, 1)
            each = bound(f, m/bits, rate, wide)
            t = n*each+seen*bound(look, m/3/bits, rate, wide)
            secs[d], fed[d] = secs[d]+t, max(fed[d], 1/each)
            if link: secs[f'8 × {d}'] += t/8+n/bs/8*2*7/8*4*params/link
    return {'recipe': name, 'encoder': r.encoder, 'stages': ', '.join(f'{e} epochs at {s} px' for s, e, _ in stages(r)),
        'precision': '16 bits' if half else 'full', 'million parameters': round(params/1e6, 1), 'PFLOP': round(flops/1e15, 1),
        'TB moved, of 4 bytes a number': round(moved/1e12, 1), 'steps of one GPU': round(steps),
        **{f'minutes at least, {d}': round(s/60, 1) for d, s in secs.items()},
        **{f'images a second at most, {d}': round(v) for d, v in fed.items()}}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--recipes', nargs='+', default=['default', 'full', 'first_place'])
    p.add_argument('--results', type=Path, default=RESULTS)
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    rows = [calculate(r) for r in a.recipes]
    print(pd.DataFrame(rows).set_index('recipe').T.to_string())
    reads = {size: round(read_rate(size)) for size in (256, 512, 1024)}
    print('images that one core reads in a second:', ', '.join(f'{v} at {k} px' for k, v in reads.items()))
    a.results.write_text(json.dumps({'machine': machine(), 'reads': reads, 'recipes': rows}, indent=0)+'\n')
