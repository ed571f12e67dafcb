"Optimisers by name: stages, schedules, files, and states that do not belong"
import copy
import io
import pickle

import numpy as np
import pytest
import torch
from fastai.callback import progress, schedule  # noqa: F401 (they add methods to `Learner`)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import Lookahead
from torch import nn

from pneumothorax.optimizers import OPTIMIZERS, OptimizerError, xray_optimizer

every = pytest.mark.parametrize('name', list(OPTIMIZERS))

def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 1, 1))

def learner(spec, model=None, **kw):
    "Two groups of parameters, ten images"
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(1, 6, 6, generator=g), torch.randn(1, 6, 6, generator=g)) for _ in range(10)]
    return Learner(DataLoaders(*[DataLoader(data, bs=2, num_workers=0)]*2), model or network(), loss_func=nn.MSELoss(),
        opt_func=xray_optimizer(spec), splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())], lr=.01, **kw)

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): f()
    return {k: v.clone() for k, v in learn.model.state_dict().items()}

def through_file(sd):
    f = io.BytesIO()
    torch.save(sd, f)
    f.seek(0)
    return torch.load(f, weights_only=True)

@every
def test_state_is_plain_after_a_schedule_with_numpy_numbers_and_rates_by_group(name):
    learn = learner(name)
    quiet(learn, lambda: learn.fit_one_cycle(1, slice(1e-4, 1e-2)))
    for h in learn.opt.hypers: h['wd'] = np.float64(.1)
    sd = through_file(learn.opt.state_dict())
    assert [h['wd'] for h in sd['hypers']] == [.1, .1]
    assert all(type(v) in (float, int, bool) for h in sd['hypers'] for v in h.values())

@every
def test_training_in_stages_stopped_between_them_ends_the_same(name):
    def stage(learn, k):
        if k == 1: learn.freeze_to(1)
        else: learn.unfreeze()
        return quiet(learn, lambda: learn.fit_one_cycle(2, slice(1e-3, 1e-2)))
    straight, half, new = learner(name+':wd=.1'), learner(name+':wd=.1'), learner(name+':wd=.1')
    for k in (0, 1, 2): want = stage(straight, k)
    for k in (0, 1): stage(half, k)
    new.model.load_state_dict(half.model.state_dict())
    new.create_opt()
    new.opt.load_state_dict(through_file(half.opt.state_dict()))
    got = stage(new, 2)
    assert all(torch.equal(want[k], got[k]) for k in want)

@every
def test_what_is_frozen_does_not_move_and_what_is_thawed_does(name):
    learn = learner(name+':wd=.5')
    quiet(learn, lambda: learn.fit(1))
    learn.freeze_to(1)
    before = copy.deepcopy(learn.model.state_dict())
    after = quiet(learn, lambda: learn.fit(2))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    # fastai trains norms in frozen groups if it knows their type, which GroupNorm's it does not
    assert moved == {'3.weight', '3.bias'}
    learn.unfreeze()
    again = quiet(learn, lambda: learn.fit(1))
    assert all(not torch.equal(after[k], again[k]) for k in after)

@every
def test_loading_leaves_the_dictionary_alone_and_shares_nothing(name):
    learn = learner(name)
    quiet(learn, lambda: learn.fit(1))
    sd = through_file(learn.opt.state_dict())
    kept = copy.deepcopy(sd)
    other = learner(name)
    other.create_opt()
    other.opt.load_state_dict(sd)
    quiet(other, lambda: other.fit(1))
    assert sd.keys() == kept.keys()
    assert all(torch.equal(a['grad_avg'], b['grad_avg']) for a, b in zip(sd['state'], kept['state']))

@every
def test_a_state_saved_before_the_first_step(name):
    a, b = learner(name), learner(name)
    a.create_opt()
    b.create_opt()
    b.opt.load_state_dict(through_file(a.opt.state_dict()))
    assert all(torch.equal(x, y) for x, y in zip(quiet(a, lambda: a.fit(1)).values(), quiet(b, lambda: b.fit(1)).values()))

@every
def test_a_function_of_it_and_a_learner_can_be_pickled(name):
    f = pickle.loads(pickle.dumps(xray_optimizer(name)))
    assert f.keywords == xray_optimizer(name).keywords
    assert isinstance(f(list(network().parameters()), lr=.1), Lookahead) == (name == 'ranger')

def test_parameters_may_come_as_an_iterator_and_options_are_not_shared():
    f = xray_optimizer('ranger:k=2')
    for _ in range(2): assert f(network().parameters(), lr=.1).k == 2
    assert OPTIMIZERS['ranger']['k'] == 6

def test_group_norms_and_biases_do_not_decay_in_a_learner():
    learn = learner('adamw:wd=.5')
    learn.create_opt()
    for p in learn.model.parameters(): p.data, p.grad = torch.ones_like(p), torch.zeros_like(p)
    learn.opt.step()
    assert [n for n, p in learn.model.named_parameters() if (p != 1).any()] == ['0.weight', '3.weight']

@pytest.mark.parametrize(('name', 'other'), [(a, b) for a in OPTIMIZERS for b in OPTIMIZERS if a != b])
def test_the_state_of_another_optimiser(name, other):
    a, b = learner(name), learner(other)
    a.create_opt()
    b.create_opt()
    if (name, other) in (('ranger', 'radam'),):   # the same fast weights; the slow ones are left out
        b.opt.load_state_dict(a.opt.state_dict())
        return
    with pytest.raises(OptimizerError, match='another'): b.opt.load_state_dict(a.opt.state_dict())
