"What one process and two do alike; started by test_distributed.py, alone and by `accelerate launch`"
import json
import sys
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.optimizer import RAdam
from fastai.torch_core import rank_distrib
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d
from torch import nn

from pneumothorax import metrics as m
from pneumothorax.data import xray_dls
from pneumothorax.distributed import is_main, join_processes, main_first, on_main, processes
from pneumothorax.losses import xray_loss
from pneumothorax.rle import LabelError
from pneumothorax.samplers import Seeded, SlidingSampleRate

METRICS = [m.KaggleDice, m.DicePos, m.DiceNeg, m.ImageIoU, m.AUROC, m.PixelECE]

class Seen(Callback):
    "Fingerprints of the training images that went through this process, step by step"
    run_valid = False
    def __init__(self): self.steps = []
    def before_batch(self): self.steps.append(self.x.mean((1, 2, 3)).tolist())

class Fails(Callback):
    "An error in one of the processes, at the third step"
    run_valid = False
    def __init__(self, rank): self.rank = rank
    def after_batch(self):
        if self.train_iter == 3 and rank_distrib() == self.rank: raise RuntimeError('this process fails')

def learner(data, workers=0):
    "A small network with both kinds of batch norm"
    dls = xray_dls(data, 64, 4, .35, 1, tfms=[], stats=(.5, .25), workers=workers)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), BatchNormAct2d(8), nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(8, 1, 3, 1, 1))
    return Learner(dls, net, loss_func=xray_loss(), opt_func=RAdam, lr=.01, metrics=[c() for c in METRICS],
        splitter=lambda n: [list(n[0].parameters()), list(n[1:].parameters())])

def curve(data, out, workers=0, sync_bn=True, cbs=()):
    "Train in two stages, the first with a frozen layer; what can be compared"
    learn, seen = learner(data, workers), Seen()
    losses, values = [], []
    before = [type(o) for o in learn.model], [type(dl) for dl in learn.dls], list(learn.model.state_dict())
    with processes(learn, sync_bn=sync_bn), learn.no_bar(), learn.no_logging():
        for i, freeze in enumerate((learn.freeze, learn.unfreeze)):
            freeze()
            learn.plan = 2*i, 4
            learn.fit(2, cbs=[Seeded(3), seen, *cbs])
            losses += [float(v) for v in learn.recorder.losses]
            values += [[float(v) for v in row] for row in learn.recorder.values]
        checked = [float(v) for v in learn.validate()]
    assert before == ([type(o) for o in learn.model], [type(dl) for dl in learn.dls], list(learn.model.state_dict()))
    if is_main() and out: save_file(learn.model.state_dict(), out)
    return {'losses': losses, 'values': values, 'checked': checked, 'seen': seen.steps}

def measure(data, weights):
    "Metrics and predictions for given weights"
    learn = learner(data)
    learn.model.load_state_dict(load_file(weights))
    with processes(learn), learn.no_bar(), learn.no_logging():
        values = [float(v) for v in learn.validate()]
        learn.fit(1, lr=0, cbs=Seeded(0))     # lr=0 leaves the weights, though not the running statistics
        preds = learn.get_preds(act=lambda x: x.mean((1, 2, 3)))
    return {'values': values, 'preds': preds[0].tolist(), 'masks': [int(y.sum()) for y in preds[1]]}

def said(f, *args):
    "The error that a function raises"
    try: return f(*args)
    except (RuntimeError, ValueError) as e: return f'{type(e).__name__}: {e}'

def faulty(): raise LabelError('row 7 of labels.csv')

def together():
    "What goes through the main process"
    made = []
    return {'result': on_main(lambda: {'n': 3}), 'first': main_first(lambda: made.append(1) or len(made)), 'error': said(on_main, faulty)}

def broken(data):
    "An error in all processes; afterwards the learner must be as before"
    learn = learner(data)
    with processes(learn), learn.no_bar(), learn.no_logging(): error = said(learn.fit, 1, None, None, [Fails(0), Fails(1)])
    kinds = [type(o).__name__ for o in [learn.model, *learn.model, *learn.dls]]
    learn.dls.train.bs = 5
    return {'error': error, 'kinds': kinds, 'odd': said(fit_shared, learn)}

def fit_shared(learn):
    "One epoch"
    with processes(learn), learn.no_bar(), learn.no_logging(): learn.fit(1)

def everything(data, weights, out):
    "All of it, in one process or in each of several"
    return {'plain': curve(data, out/'plain.safetensors'), 'sliding': curve(data, None, 2, cbs=[SlidingSampleRate(.8, .5)]),
        'apart': curve(data, None, sync_bn=False), 'measured': measure(data, weights) if weights else None}

if __name__ == '__main__':
    data, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    n = join_processes()
    rank = torch.distributed.get_rank()
    result = {'n': n, 'rank': rank, 'main': is_main(), **everything(data, out/'alone.safetensors', out),
        'together': together(), 'broken': broken(data)}
    (out/f'{rank}.json').write_text(json.dumps(result), encoding='utf-8')
    learn = learner(data, workers=2)
    with processes(learn): learn.fit(50, cbs=Fails(1))     # in one of the two only
    (out/'survived').touch()
