"""What callbacks and optimisers add to training:
`python tests/bench_training.py [--sections parts callbacks optimizers epochs] [--only GradientNoise …]`

A real setting: `hyperunet` around tf_efficientnet_lite0 with random weights, images of 256 px, on the CPU. Learners with a callback and
without take turns in an order drawn anew each round, as in `racing`, and the median of the rounds' ratios is printed with their 10th and
90th percentile. A round is `--steps` batches, each of them a whole step of fastai's loop: forward, loss, backward, optimiser, all events of
a batch. Batches are ready, nothing is read. Which callbacks there are stands in `CALLBACKS`: a name, and a function of the batch size that
makes them. The aim is 1.03 at most.

What acts once per epoch (averages, files, pictures) is not seen in steps. The section `epochs` trains with the recipe `everything` on the
real radiographs, and times what each callback does in all its events, as a share of the rest of the epoch: the median over the epochs that
follow the first, with the smallest and the largest. These events do not grow with the data, apart from those of each step and from the pass
for batch norm.

The section `parts` says how the seconds of the processor in a step of the default recipe divide into reading a batch from a cache,
augmentation, loss (with its gradient), the network (forward and backward) and the optimiser, on the real radiographs; and how long the
network of smp's `Unet` around the same encoder takes, in the same rounds."""
import argparse
import warnings
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from unittest.mock import patch

import numpy as np
import torch
from conftest import SHARED
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from racing import keep, race

from pneumothorax.averaging import EMA
from pneumothorax.cache import prepare
from pneumothorax.callbacks import Accumulate, EarlyStop, GradientNoise, StopNaN, mixed_precision
from pneumothorax.data import xray_dls
from pneumothorax.losses import AuxLoss, xray_loss
from pneumothorax.models import xray_model
from pneumothorax.optimizers import OPTIMIZERS, xray_optimizer
from pneumothorax.train import recipe_callbacks, train

CALLBACKS = {
    'GradientNoise': lambda bs: [GradientNoise()],
    'GradientClip (fastai)': lambda bs: [GradientClip(1.)],
    'StopNaN': lambda bs: [StopNaN()],
    'Accumulate, 2 batches': lambda bs: [Accumulate(2*bs)],
    'EarlyStop': lambda bs: [EarlyStop('valid_loss')],
    'EMA': lambda bs: [EMA(.99)],
    'mixed_precision': lambda bs: [mixed_precision('cpu')],
    'all but mixed_precision': lambda bs: [GradientNoise(), GradientClip(1.), StopNaN(), Accumulate(2*bs), EarlyStop('valid_loss')],
}

def batch(bs, size):
    "Random images and masks"
    g = torch.Generator().manual_seed(0)
    return (torch.randn(bs, 1, size, size, generator=g).to(memory_format=torch.channels_last),
        (torch.rand(bs, size, size, generator=g) < .01).to(torch.uint8))

def step_of(cbs, a, opt='radam', loss='bce+dice'):
    "A function of a batch: one step of a learner that is in the middle of an epoch"
    torch.manual_seed(0)
    net = xray_model('hyperunet', a.encoder).to(memory_format=torch.channels_last)
    dls = DataLoaders(*[DataLoader([0], bs=a.bs, num_workers=0)]*2, device=torch.device('cpu'))   # the batches come from `race`
    learn = Learner(dls, net, loss_func=AuxLoss(xray_loss(loss)), opt_func=xray_optimizer(opt), lr=1e-5, cbs=cbs)
    learn.create_opt()
    learn.remove_cb(ProgressCallback)
    for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
    learn.dl, learn.n_iter = dls.train, 10**9
    count = iter(range(10**9))
    return lambda b: learn.one_batch(next(count), b)

def callbacks(a):
    "Each callback against none"
    chosen = {k: f for k, f in CALLBACKS.items() if not a.only or k in a.only}
    race(f'a step with a callback: {a.encoder}, {a.bs} images of {a.size} px', 'none',
        {'none': step_of([], a), **{k: step_of(f(a.bs), a) for k, f in chosen.items()}}, [batch(a.bs, a.size)]*a.steps, rounds=a.rounds)

def optimizers(a):
    "Each optimiser against RAdam"
    race(f'a step with another optimiser: {a.encoder}, {a.bs} images of {a.size} px', 'radam', {k: step_of([], a, k) for k in OPTIMIZERS},
        [batch(a.bs, a.size)]*a.steps, rounds=a.rounds)

def epochs(a):
    "What each callback does in an epoch, as a share of what the others and the steps take"
    call, spent = Callback.__call__, Counter()
    def timed(self, event):
        start = perf_counter()
        try: return call(self, event)
        finally: spent[type(self).__name__] += perf_counter()-start
    class Laps(Callback):
        "Reads and clears the clocks at the end of an epoch"
        order = 10**6
        def __init__(self): self.rows, self.start = [], perf_counter()
        def after_epoch(self):
            now = perf_counter()
            self.rows.append((now-self.start, Counter(spent)))
            spent.clear()
            self.start = now
    laps = Laps()
    made = recipe_callbacks
    with (TemporaryDirectory() as d, patch.object(Callback, '__call__', timed),
            patch('pneumothorax.train.recipe_callbacks', lambda *args: [*made(*args), laps])):
        cache = prepare(SHARED/'siim-small', Path(d)/'cache', a.size, progress=False)
        train(cache, Path(d)/'run', 'everything', weights='none', workers=0, progress=False, size=a.size, epochs=a.rounds//2, bs=a.bs,
            encoder=a.encoder, accumulate=2*a.bs, lr=1e-5, swa=.5)
    print(f'\nshare of an epoch of 92 images, {a.encoder}, {a.bs} images of {a.size} px a batch; '
        f'the rest of an epoch takes {np.median([t-sum(c.values()) for t, c in laps.rows[1:]]):.0f} s')
    for name in sorted({n for _, c in laps.rows for n in c}-{'Laps'}):
        shares = [c[name]/(t-c[name]) for t, c in laps.rows[1:]]
        print(f'{name:24} {100*np.median(shares):6.2f} %  ({100*min(shares):.2f} to {100*max(shares):.2f})')

def seconds(what):
    "Its value, and the seconds of the processor that it took"
    t = process_time()
    return what(), process_time()-t

def backward(net, x, loss, y):
    "Logits with their loss and gradients of all weights; seconds of the loss, and of the network"
    z, ahead = seconds(lambda: net(x))
    top = z.detach().requires_grad_()
    _, cost = seconds(lambda: loss(top, y).backward())
    return cost, ahead+seconds(lambda: z.backward(top.grad))[1]

def step_parts(dls, net, other, opt, loss, bs):
    "Seconds of each part of a step on images drawn by chance"
    ds, m = dls.train.dataset, dls.train.after_batch
    pairs, read = seconds(lambda: [ds[i] for i in torch.randperm(len(ds))[:bs].tolist()])
    plain = tuple(type(o[0])(torch.stack([v.as_subclass(torch.Tensor) for v in o])) for o in zip(*pairs))
    (x, y), aug = seconds(lambda: m(plain))
    x = x.as_subclass(torch.Tensor).contiguous(memory_format=torch.channels_last)
    cost, main = backward(net, x, loss, y)
    _, stepped = seconds(opt.step)
    opt.zero_grad()
    _, rival = backward(other, x, loss, y)
    other.zero_grad()
    return {'reading': read, 'augmentation': aug, 'loss': cost, 'network': main, 'optimiser': stepped}, rival

def parts(a):
    "Where the time of a training step goes"
    with TemporaryDirectory() as d:
        dls = xray_dls(prepare(SHARED/'siim-small', Path(d)/'cache', a.size, progress=False), a.size, a.bs, workers=0)
        net, other = (xray_model(k, a.encoder).to(memory_format=torch.channels_last).train() for k in ('hyperunet', 'unet'))
        opt, loss = xray_optimizer()(list(net.parameters()), lr=1e-5), xray_loss()
        rounds = [step_parts(dls, net, other, opt, loss, a.bs) for _ in range(a.rounds+2)][2:]
    print(f'\na step of {a.encoder}, {a.bs} real radiographs of {a.size} px: '
        f'{np.median([sum(p.values()) for p, _ in rounds]):.2f} s of the processor')
    say = lambda v: f'{np.median(v):6.3f}  ({np.quantile(v, .1):.3f} to {np.quantile(v, .9):.3f})'
    shares = {k: [p[k]/sum(p.values()) for p, _ in rounds] for k in rounds[0][0]}
    for k, v in shares.items():
        print(f'{k:32} {say(v)}')
        keep(f'a step of the default recipe, {a.bs} real radiographs of {a.size} px', k, 'the whole step', v)
    keep(f'forward and backward, {a.bs} images of {a.size} px', "smp's Unet", 'HyperUnet', [r/p['network'] for p, r in rounds])
    print(f"{'augmentation and loss together':32} {say([(p['augmentation']+p['loss'])/sum(p.values()) for p, _ in rounds])}")
    print(f"{'network of smp/ours':32} {say([r/p['network'] for p, r in rounds])}")

SECTIONS = {'parts': parts, 'callbacks': callbacks, 'optimizers': optimizers, 'epochs': epochs}

def arguments():
    "The command line"
    p = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    p.add_argument('--sections', nargs='+', choices=SECTIONS, default=list(SECTIONS))
    p.add_argument('--only', nargs='+', choices=CALLBACKS, help='these callbacks; all if left out')
    p.add_argument('--encoder', default='tf_efficientnet_lite0')
    p.add_argument('--size', type=int, default=256)
    p.add_argument('--bs', type=int, default=8)
    p.add_argument('--steps', type=int, default=2, help='batches in a round')
    p.add_argument('--rounds', type=int, default=15)
    p.add_argument('--threads', type=int, default=2)
    return p.parse_args()

if __name__ == '__main__':
    a = arguments()
    warnings.simplefilter('ignore')
    torch.set_num_threads(a.threads)
    print(f'torch {torch.__version__}, threads: {torch.get_num_threads()}, rounds: {a.rounds} of {a.steps} steps')
    for s in a.sections: SECTIONS[s](a)
