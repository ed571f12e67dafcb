"""What callbacks and optimisers add to a step of training: `python tests/bench_training.py [--sections callbacks optimizers] [--only GradientNoise …]`

A real setting: `hyperunet` around tf_efficientnet_lite0 with random weights, images of 256 px, on the CPU. Learners with a callback and without
take turns in an order drawn anew each round, as in `bench_radiographs`, and the median of the rounds' ratios is printed with their 10th and 90th
percentile. A round is `--steps` batches, each of them a whole step of fastai's loop: forward, loss, backward, optimiser, all events of a batch.
Batches are ready, nothing is read. What acts once per epoch is not seen here.

Which callbacks there are stands in `CALLBACKS`: a name, and a function of the batch size that makes them. The aim is 1.03 at most."""
import argparse
import warnings

import torch
from bench_radiographs import race
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner

from pneumothorax.callbacks import Accumulate, EarlyStop, GradientNoise, StopNaN, mixed_precision
from pneumothorax.losses import AuxLoss, xray_loss
from pneumothorax.models import xray_model
from pneumothorax.optimizers import OPTIMIZERS, xray_optimizer

CALLBACKS = {
    'GradientNoise': lambda bs: [GradientNoise()],
    'GradientClip (fastai)': lambda bs: [GradientClip(1.)],
    'StopNaN': lambda bs: [StopNaN()],
    'Accumulate, 2 batches': lambda bs: [Accumulate(2*bs)],
    'EarlyStop': lambda bs: [EarlyStop('valid_loss')],
    'mixed_precision': lambda bs: [mixed_precision('cpu')],
    'all but mixed_precision': lambda bs: [GradientNoise(), GradientClip(1.), StopNaN(), Accumulate(2*bs), EarlyStop('valid_loss')],
}

def batch(bs, size):
    "Random images and masks"
    g = torch.Generator().manual_seed(0)
    return torch.randn(bs, 1, size, size, generator=g).to(memory_format=torch.channels_last), (torch.rand(bs, size, size, generator=g) < .01).to(torch.uint8)

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
    race(f'a step with another optimiser: {a.encoder}, {a.bs} images of {a.size} px', 'radam', {k: step_of([], a, k) for k in OPTIMIZERS}, [batch(a.bs, a.size)]*a.steps, rounds=a.rounds)

SECTIONS = {'callbacks': callbacks, 'optimizers': optimizers}

def arguments():
    "The command line"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
