"Metrics over several processes, and what they refuse"
import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import two_processes as two
from conftest import ROOT

from pneumothorax import bootstrap, metrics
from pneumothorax.metrics import MetricError
from pneumothorax.rle import PtxError

# --- two processes

MODES = ['shared', *(['accelerate'] if find_spec('accelerate') else [])]

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "What each of two processes measured; none of them outlives the test"
    tmp, port = tmp_path_factory.mktemp('two'), str(free_port())
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    ps = []
    try:
        for r in '01': ps.append(subprocess.Popen([sys.executable, '-W', 'ignore', ROOT/'tests'/'two_processes.py', r, port, tmp/r, *MODES], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        for p in ps:
            text = p.communicate(timeout=240)[0]
            assert p.returncode == 0, text[-3000:]
    finally:
        for p in ps:
            p.kill()
            p.wait()
    return [json.loads((tmp/r).read_text()) for r in '01']

@pytest.mark.parametrize('mode', ['shared', 'accelerate'])
def test_two_processes_agree_with_one(both, mode):
    if mode not in MODES: pytest.skip('accelerate is not installed')
    names = [c._name for c in two.METRICS]
    for i, bs in enumerate(two.BATCHES):
        want = two.measure('alone', bs)['values']
        assert not np.isnan(want).any()
        for r in both:
            got = r[mode][i]
            exact = [n for n in names if n not in ('image_ece', 'pixel_ece')]   # these two add up floats
            assert {n: v for n, v in zip(names, got['values']) if n in exact} == {n: v for n, v in zip(names, want) if n in exact}
            np.testing.assert_allclose(got['values'], want, rtol=1e-12)

def test_the_shares_were_padded_and_it_would_have_mattered(both):
    "One image of seven went through twice; counted twice, it would change the score"
    assert [sum(r['shared'][i]['seen'] for r in both) for i in range(len(two.BATCHES))] == [8]*4
    logits, true = two.images()
    dice = metrics.kaggle_dice(logits[:, 0] > 0, true)
    assert abs(np.r_[dice, dice[0]].mean()-dice.mean()) > .01

# --- what is refused

def batch(logits, true): return SimpleNamespace(pred=logits, y=true, yb=(true,), to_detach=lambda x: x)

LOGITS, TRUE = two.images()
NAN = LOGITS.clone()
NAN[3, 0, 4, 4] = float('nan')

@pytest.mark.parametrize('cls', two.METRICS, ids=lambda c: c._name)
@pytest.mark.parametrize('logits, true, why', [(NAN, TRUE, 'diverged'), (LOGITS, TRUE*255, '0 and 1'), (LOGITS, TRUE-.5, '0 and 1'),
    (LOGITS.repeat(1, 2, 1, 1), TRUE, 'one channel'), (LOGITS[:, 0], TRUE, 'one channel'), (LOGITS, TRUE[:, None], 'N×H×W'), (LOGITS[:3], TRUE, 'N×H×W'), (LOGITS[..., ::2], TRUE, 'N×H×W')])
def test_a_metric_refuses(cls, logits, true, why):
    with pytest.raises(MetricError, match=why): cls().accumulate(batch(logits, true))

@pytest.mark.parametrize('cls', two.METRICS, ids=lambda c: c._name)
def test_a_metric_forgets_and_takes_half_precision(cls):
    m = cls()
    m.accumulate(batch(LOGITS, TRUE))
    first = m.value
    m.reset()
    assert np.isnan(m.value)
    m.accumulate(batch(LOGITS.double().requires_grad_(), TRUE.bool()))
    assert m.value == first
    m.reset()
    m.accumulate(batch(LOGITS.half(), TRUE.long()))
    assert abs(m.value-first) < .01

BAD = {
    'masks of 255': (lambda: metrics.kaggle_dice(np.full((1, 2, 2), 255), np.ones((1, 2, 2))), '0 and 1'),
    'probabilities as masks': (lambda: metrics.image_scores(np.full((1, 2, 2), .5), np.ones((1, 2, 2))), 'threshold'),
    'NaN as a mask': (lambda: metrics.kaggle_dice(np.full((1, 2, 2), np.nan), np.ones((1, 2, 2))), '0 and 1'),
    'other shapes': (lambda: metrics.mean_score(np.ones((2, 2, 2)), np.ones((1, 2, 2))), 'N×H×W'),
    'no positive': (lambda: metrics.mean_score(np.ones((2, 2, 2)), np.zeros((2, 2, 2)), 'dice_pos'), 'none of 2 images'),
    'one class': (lambda: metrics.auroc([.1, .2], [1, 1]), 'one class'),
    'no image': (lambda: metrics.average_precision([], []), 'one class'),
    'NaN score': (lambda: metrics.auroc([.1, np.nan], [0, 1]), 'NaN'),
    'NaN probability': (lambda: metrics.ece([np.nan], [1]), 'NaN'),
    'logits as probabilities': (lambda: metrics.reliability([-3.], [1]), 'sigmoid'),
    'NaN map': (lambda: metrics.image_prob(np.full((1, 2, 2), np.nan)), 'NaN'),
    'too many pixels': (lambda: metrics.image_prob(np.zeros((1, 2, 2)), 5), 'from 1 to 4'),
    'lesions of two sizes': (lambda: metrics.match_lesions(np.ones((2, 2)), np.ones((3, 3))), 'H×W'),
}

@pytest.mark.parametrize('name', BAD)
def test_a_function_refuses(name):
    f, why = BAD[name]
    with pytest.raises(MetricError, match=why): f()

def test_the_bootstrap_is_to_be_had_from_both():
    for n in ('bootstrap_ci', 'paired_bootstrap', 'bootstrap_stat'): assert getattr(metrics, n) is getattr(bootstrap, n)

@pytest.mark.parametrize('f', [bootstrap.bootstrap_ci, lambda *a: bootstrap.paired_bootstrap(a[0], a[0], *a[1:])], ids=['one', 'paired'])
@pytest.mark.parametrize('args, why', [(([],), 'no values'), (([.1, np.nan],), 'not finite'), (([.1, .2], ['a']), '(labels|label)'), (([.1, .2], ['a', None]), 'no group'), ((['x', 'y'],), 'one number per image')])
def test_the_bootstrap_refuses(f, args, why):
    with pytest.raises(PtxError, match=why): f(*args)

def test_one_patient_has_no_interval():
    r = bootstrap.bootstrap_ci([.2, .4], ['a', 'a'])
    assert r.value == pytest.approx(.3) and np.isnan(r.lo) and 'no interval' in str(r)

def test_blocks_do_not_change_the_draws(monkeypatch):
    rng = np.random.default_rng(0)
    v, g = rng.random(300), rng.integers(0, 90, 300)
    whole = bootstrap.bootstrap_ci(v, g, n=500)
    monkeypatch.setattr(bootstrap, '_BLOCK', 100)
    assert bootstrap.bootstrap_ci(v, g, n=500) == whole

def test_integers_and_tensors_are_values():
    assert bootstrap.bootstrap_ci([1, 0, 1]).value == bootstrap.bootstrap_ci(torch.tensor([1., 0, 1])).value == pytest.approx(2/3)
