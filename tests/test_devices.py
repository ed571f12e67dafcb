"A device without float64, as Apple's GPUs are: what computes on it asks for none, unless on the CPU"
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from pneumothorax.averaging import SWA
from pneumothorax.distributed import run_device
from pneumothorax.equalize import EQUALIZERS, TensorXray, equalizer, freq_breaks, grey_counts, level_at
from pneumothorax.losses import TERMS, xray_loss
from pneumothorax.metrics import AUROC, AveragePrecision, DicePos, ImageECE, KaggleDice, LesionF1, PixelECE
from pneumothorax.priors import LogitAdjustedLoss, adjust_logits
from pneumothorax.rle import PtxError

CPU, MPS = torch.device('cpu'), torch.device('mps')

class Apple(TorchFunctionMode):
    "Tensors are said to be on 'mps', and have no float64 there, unless they come from `cpu()` or are made without a device"
    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        ins = [t for t in flat if isinstance(t, torch.Tensor)]
        here = bool(not ins or all(hasattr(t, 'on_cpu') for t in ins))
        if f == torch.Tensor.device.__get__: return CPU if here else MPS
        there = any(isinstance(o, (str, torch.device)) and str(o) == 'mps' for o in flat)
        if f is torch.Tensor.to:      # where another tensor is, or the device that is named
            if len(ins) > 1: here = hasattr(ins[1], 'on_cpu')
            elif any(isinstance(o, (str, torch.device)) for o in flat): here = not there
        if f is torch.Tensor.numpy and not here: raise TypeError("can't convert mps:0 device type tensor to numpy")
        args, kwargs = tree_map(lambda o: CPU if isinstance(o, (str, torch.device)) and str(o) == 'mps' else o, (args, kwargs))
        out = f(*args, **kwargs)
        if f is torch.Tensor.cpu: here = True
        if ins and out is ins[0] and here != hasattr(out, 'on_cpu'): out = out.clone()
        for t in tree_flatten(out)[0]:
            if not isinstance(t, torch.Tensor): continue
            if here and not there: t.on_cpu = True
            elif t.dtype == torch.float64:
                raise TypeError('Cannot convert a MPS Tensor to float64 dtype as the MPS framework does not support float64')
            elif hasattr(t, 'on_cpu') and not any(t is i for i in ins): del t.on_cpu
        return out

class Step:
    "What a metric is shown of a learner"
    def __init__(self, pred, y): self.pred, self.y, self.to_detach = pred, y, lambda t: t

@pytest.fixture
def batch():
    "Logits and masks"
    g = torch.Generator().manual_seed(0)
    return (torch.randn(4, 1, 32, 32, generator=g),
        torch.cat([(torch.randn(2, 32, 32, generator=g) > 1).to(torch.uint8), torch.zeros(2, 32, 32, dtype=torch.uint8)]))

def test_the_simulation_refuses_float64(batch):
    with Apple():
        for f in (lambda x: x.double(), lambda x: x.to(torch.float64), lambda x: x.cpu().double().to(x.device),
                lambda x: torch.zeros(2, dtype=torch.float64, device=x.device)):
            with pytest.raises(TypeError, match='float64'): f(batch[0])
        assert batch[0].cpu().double().dtype == torch.float64 and batch[0].device.type == 'mps'

@pytest.mark.parametrize('make', [lambda: KaggleDice(min_area=50), DicePos, AUROC, lambda: AUROC(5), AveragePrecision,
    PixelECE, ImageECE, LesionF1])
def test_metrics(batch, make):
    a, b = make(), make()
    a.accumulate(Step(*batch))
    with Apple(): b.accumulate(Step(*batch))
    assert a.value == b.value

@pytest.mark.parametrize('name', EQUALIZERS)
def test_equalisation(batch, name):
    x = batch[0].sigmoid()
    eq = equalizer(dict(name=name, **({'breaks': [0, .3, .5, 1]} if name == 'freq' else {})))
    want = eq(TensorXray(x))
    with Apple(): got = eq(TensorXray(x))
    assert torch.equal(want.as_subclass(torch.Tensor), got.as_subclass(torch.Tensor))

def test_counts(batch):
    c = grey_counts(batch[0].sigmoid())
    want, breaks = level_at(c, .3), freq_breaks(c.sum(0))
    with Apple():
        got = level_at(c, .3)
        assert freq_breaks(c.sum(0)) == breaks
    assert torch.equal(want, got)

@pytest.mark.parametrize('loss', [*TERMS, .01, np.full((32, 32), .2)],
    ids=lambda o: o if isinstance(o, str) else f'prior of {np.ndim(o)} axes')
def test_losses(batch, loss):
    make = (lambda: xray_loss(loss)) if isinstance(loss, str) else lambda: LogitAdjustedLoss(loss)
    want = make()(*batch)
    with Apple():
        f = make()
        got = f(*batch)
    assert torch.equal(want, got) and not any(b.dtype == torch.float64 for b in f.buffers())

def test_prior(batch):
    want = adjust_logits(batch[0], .2)
    with Apple(): got = adjust_logits(batch[0], .2)
    assert torch.equal(want, got)

def test_the_average_of_weights_is_on_the_cpu(phantoms):
    from pneumothorax.data import xray_dls
    from pneumothorax.learner import xray_learner
    learn = xray_learner(xray_dls(phantoms, 64, 4, stats=(.5, .25), workers=0), encoder='mobilenetv3_small_050', weights='none')
    swa = SWA(start=0)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=swa)
    assert all(p.dtype == torch.float64 and p.device.type == 'cpu' for p in swa.average.module.parameters())
    assert not any(p.dtype == torch.float64 for p in (*swa.swa_net.parameters(), *learn.model.parameters()))

@pytest.mark.parametrize('cuda, apple, want', [(True, True, 'cuda'), (False, True, 'mps'), (False, False, 'cpu')])
def test_the_device_by_default(cuda, apple, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: apple)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2*cuda)
    there = ['cpu']+['mps']*apple+['cuda', 'cuda:1']*cuda
    assert run_device() == want and [run_device(d) for d in there] == there and run_device(CPU) == 'cpu'
    for d in {'mps', 'cuda', 'cuda:1', 'cuda:2'}-set(there):
        with pytest.raises(PtxError, match=f'device={d}: not available here; give auto or '): run_device(d)
    with pytest.raises(PtxError, match='no such device'): run_device('gpu')
