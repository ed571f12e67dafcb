"""`HyperUnet` against the decoders it is compared with, around the same encoder:
`python tests/bench_models.py [--sections train inference memory growth]`

What is timed in pairs is raced as in `racing`: the two take turns in an order drawn anew each round, and the median of the rounds'
ratios is printed with their 10th and 90th percentile. Ratios are those of a contestant's time (or memory) to `hyperunet`'s: `fastai_unet`
is meant to take at least 3 times as long and at least twice the memory, smp's `unet` at least 1/1.3 = 0.77, and the encoder alone, below
which no decoder can come, about 1/1.6 = 0.62. All in channels_last, which is the faster format here for most; the rivals in the ordinary
one too."""
import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from racing import line, race

from pneumothorax.encoders import create_encoder
from pneumothorax.models import xray_model

BATCH = {'resnet34': 2, 'tf_efficientnet_lite0': 4}   # at 256 px; half of it at 512
CONTESTANTS = ('encoder alone', 'hyperunet', 'unet', 'unet, contiguous', 'fastai_unet', 'fastai_unet, contiguous')

def batch_size(encoder, size): return max(1, BATCH.get(encoder, 2)*256//size)

def network(what, encoder):
    "A contestant, with random weights, and its memory format"
    layout = torch.contiguous_format if what.endswith(', contiguous') else torch.channels_last
    torch.manual_seed(0)
    net = create_encoder(encoder) if what == 'encoder alone' else xray_model(what.removesuffix(', contiguous'), encoder)
    return net.to(memory_format=layout), layout

def batch(encoder, size, layout=torch.channels_last, n=None):
    "Random images and masks"
    rng, n = torch.Generator().manual_seed(0), n or batch_size(encoder, size)
    x = torch.randn(n, 1, size, size, generator=rng).to(memory_format=layout)
    return x, (torch.rand(n, 1, size, size, generator=rng) < .01).float()

def loss(out, y):
    "Cross-entropy of logits; of an encoder's maps, which have no target, their mean"
    return F.binary_cross_entropy_with_logits(out, y) if isinstance(out, torch.Tensor) else sum(m.mean() for m in out)

def step_of(net):
    "A training step: forward, loss, backward, RAdam"
    opt = torch.optim.RAdam(net.train().parameters(), lr=1e-4)
    def step(b):
        loss(net(b[0]), b[1]).backward()
        opt.step()
        opt.zero_grad()
    return step

def forward_of(net):
    "Inference"
    net.eval()
    @torch.inference_mode()
    def forward(b): return net(b[0])
    return forward

def bind(f, b):
    "`race` gives an item; here each contestant has its own batch"
    return lambda _: f(b)

def contest(title, encoder, size, work, rounds):
    "All contestants at one size; each keeps its own batch, in its memory format"
    calls = {}
    for what in CONTESTANTS:
        net, layout = network(what, encoder)
        calls[what] = bind(work(net), batch(encoder, size, layout))
    race(f'{title}: {encoder}, {batch_size(encoder, size)} images of {size} px', 'hyperunet', calls, [0], rounds=rounds)

def train(a):
    "Training steps"
    for e in a.encoders:
        for s in a.sizes: contest('a training step', e, s, step_of, a.rounds)

def inference(a):
    "Forward passes"
    for e in a.encoders:
        for s in a.sizes: contest('inference', e, s, forward_of, a.rounds)

def status(key): return int(re.search(rf'^{key}:\s+(\d+) kB', Path('/proc/self/status').read_text(), re.MULTILINE)[1])/1024

def step_memory(what, encoder, size):
    """MB that three training steps add at their peak to what the process had before, in a process of its own: activations, gradients,
    RAdam's moments, and what the allocator and the convolutions take beside them. A small network has its step before, so that the
    libraries' own memory is not counted"""
    (net, layout), small = (network(what, encoder), torch.nn.Conv2d(1, 8, 3).to(memory_format=torch.channels_last))
    b, step, first = batch(encoder, size, layout), step_of(net), step_of(small)
    first((b[0][..., :32, :32], torch.zeros(len(b[0]), 8, 30, 30)))
    Path('/proc/self/clear_refs').write_text('5')   # the peak begins anew
    before = status('VmRSS')
    assert status('VmHWM') < before+8, 'the peak of this process cannot be set back'
    for _ in range(3): step(b)
    return {'peak': status('VmHWM')-before, 'state': 3*sum(p.numel() for p in net.parameters())*4/2**20}

def memory(a):
    "Peak memory of training, each in its own process; once for each of at most five rounds"
    for e in a.encoders:
        for s in a.sizes:
            print(f'\npeak memory of training: {e}, {batch_size(e, s)} images of {s} px\n{"":34} {"MB":>8}   ratio to hyperunet')
            peaks = {what: [] for what in CONTESTANTS}
            for _ in range(min(a.rounds, 5)):
                for what in CONTESTANTS:
                    p = subprocess.run([sys.executable, __file__, '--threads', str(a.threads), '--one', what, e, str(s)],
                        capture_output=True, text=True, check=True)
                    peaks[what].append(json.loads(p.stdout.splitlines()[-1]))
            for what in CONTESTANTS: line(what, *([p['peak'] for p in peaks[w]] for w in (what, 'hyperunet')))
            print(f'{"of it gradients and moments (MB)":34}', ', '.join(f'{what} {p[0]["state"]:.0f}' for what, p in peaks.items()),
                flush=True)

def growth(a):
    "How the time of one image grows with its size, hyperunet"
    sizes = [s for s in (128, 256, 384, 512, 768, 1024) if s <= a.largest]
    for e in a.encoders:
        for title, work in (('training', step_of), ('inference', forward_of)):
            call, rng = work(network('hyperunet', e)[0]), np.random.default_rng(0)
            batches = {s: batch(e, s, n=2 if title == 'training' else 1) for s in sizes}
            times = {s: np.zeros(a.rounds) for s in sizes}
            for b in batches.values(): call(b)
            for r in range(a.rounds):
                for s in rng.permutation(sizes):
                    t0 = time.perf_counter()
                    call(batches[int(s)])
                    times[int(s)][r] = (time.perf_counter()-t0)*1e3
            print(f'\n{title} of hyperunet, {e}, by size\n{"":34} {"ms/MP":>8}   ratio to {sizes[0]} px')
            per = {s: t/(len(batches[s][0])*s*s/1e6) for s, t in times.items()}
            for s in sizes: line(f'{s} px, {np.median(times[s]):,.0f} ms for {len(batches[s][0])}', per[s], per[sizes[0]])

SECTIONS = {'train': train, 'inference': inference, 'memory': memory, 'growth': growth}

def arguments():
    "The command line"
    p = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    p.add_argument('--sections', nargs='+', choices=SECTIONS, default=list(SECTIONS))
    p.add_argument('--encoders', nargs='+', default=list(BATCH))
    p.add_argument('--sizes', nargs='+', type=int, default=[256, 512])
    p.add_argument('--largest', type=int, default=1024, help='size up to which growth is followed')
    p.add_argument('--rounds', type=int, default=15)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--one', nargs=3, metavar=('MODEL', 'ENCODER', 'SIZE'), help='peak memory of one model, as JSON')
    return p.parse_args()

if __name__ == '__main__':
    a = arguments()
    warnings.simplefilter('ignore')
    torch.set_num_threads(a.threads)
    if a.one: print(json.dumps(step_memory(a.one[0], a.one[1], int(a.one[2]))))
    else:
        print(f'torch {torch.__version__}, threads: {torch.get_num_threads()}, rounds: {a.rounds}')
        for s in a.sections: SECTIONS[s](a)
