"Metrics over several processes, and what they refuse"
import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pandas as pd
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
        for r in '01':
            ps.append(subprocess.Popen([sys.executable, '-W', 'ignore', ROOT/'tests'/'two_processes.py', r, port, tmp/r, *MODES], env=env,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
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
    (LOGITS.repeat(1, 2, 1, 1), TRUE, 'one channel'), (LOGITS[:, 0], TRUE, 'one channel'), (LOGITS, TRUE[:, None], 'N×H×W'),
    (LOGITS[:3], TRUE, 'N×H×W'), (LOGITS[..., ::2], TRUE, 'N×H×W')])
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
    'no positive': (lambda: metrics.mean_score(np.ones((2, 2, 2)), np.zeros((2, 2, 2)), 'dice_pos'), 'no image of 2'),
    'one class': (lambda: metrics.auroc([.1, .2], [1, 1]), 'no image of 2 is negative'),
    'no image': (lambda: metrics.average_precision([], []), 'no image of 0'),
    'NaN score': (lambda: metrics.auroc([.1, np.nan], [0, 1]), 'NaN'),
    'NaN probability': (lambda: metrics.ece([np.nan], [1]), 'NaN'),
    'logits as probabilities': (lambda: metrics.reliability([-3.], [1]), 'sigmoid'),
    'NaN map': (lambda: metrics.image_prob(np.full((1, 2, 2), np.nan)), 'NaN'),
    'words as scores': (lambda: metrics.auroc(['a', 'b'], [0, 1]), 'one number per image'),
    'half a bin': (lambda: metrics.ece([.2, .3], [0, 1], 2.5), 'whole number'),
    'no map has a pixel 17': (lambda: metrics.image_prob(np.zeros((0, 4, 4)), 17), 'from 1 to 16'),
    'too many pixels of logits': (lambda: metrics.AUROC(top=17**3).accumulate(batch(LOGITS, TRUE)), 'from 1 to'),
    'too many pixels': (lambda: metrics.image_prob(np.zeros((1, 2, 2)), 5), 'from 1 to 4'),
    'lesions of two sizes': (lambda: metrics.match_lesions(np.ones((2, 2)), np.ones((3, 3))), 'H×W'),
}

@pytest.mark.parametrize('name', BAD)
def test_a_function_refuses(name):
    f, why = BAD[name]
    with pytest.raises(MetricError, match=why): f()

@pytest.mark.parametrize('cls', two.METRICS, ids=lambda c: c._name)
def test_an_empty_batch_changes_nothing(cls):
    m = cls()
    m.accumulate(batch(LOGITS[:0], TRUE[:0]))
    assert np.isnan(m.value)
    m.accumulate(batch(LOGITS, TRUE))
    whole = m.value
    m.reset()
    m.accumulate(batch(LOGITS, TRUE))
    assert m.value == whole
    assert len(metrics.image_prob(np.zeros((0, 4, 4)))) == 0

@pytest.mark.parametrize('level', [[30, 25, 20, 18], [-105, -110, -120, -150], [np.inf, 90, 80, -np.inf]], ids=['high', 'low', 'infinite'])
@pytest.mark.parametrize('top', [1, 3])
@pytest.mark.parametrize('cls', [metrics.AUROC, metrics.AveragePrecision])
def test_sure_models_keep_their_ranking(cls, top, level):
    m = cls(top=top)
    m.accumulate(batch(torch.tensor(level, dtype=torch.float32)[:, None, None, None].repeat(1, 1, 2, 2),
        torch.tensor([1, 1, 0, 0])[:, None, None].repeat(1, 2, 2)))
    assert m.value == 1
    assert metrics.auroc(level, [1, 1, 0, 0]) == 1

def test_the_bootstrap_is_to_be_had_from_both():
    for n in ('bootstrap_ci', 'paired_bootstrap', 'bootstrap_stat'): assert getattr(metrics, n) is getattr(bootstrap, n)

@pytest.mark.parametrize('f', [bootstrap.bootstrap_ci, lambda *a: bootstrap.paired_bootstrap(a[0], a[0], *a[1:])], ids=['one', 'paired'])
@pytest.mark.parametrize('args, why', [(([],), 'no values'), (([.1, np.nan],), 'not finite'), (([.1, .2], ['a']), 'one label'),
    (([.1, .2], [['a'], ['b']]), 'one label'), ((['x', 'y'],), 'one number per image'), (([.1, .2], None, 1000.), 'whole number'),
    (([.1, .2], None, 1000, -1), 'seed')])
def test_the_bootstrap_refuses(f, args, why):
    with pytest.raises(PtxError, match=why): f(*args)

PREDICTED = np.eye(4)[[0, 1, 2, 3]].reshape(4, 2, 2)
TAKES_GROUPS = {
    'bootstrap_ci': lambda g: bootstrap.bootstrap_ci([1, .5, 1, 0], g),
    'paired_bootstrap': lambda g: bootstrap.paired_bootstrap([1, .5, 1, 0], [1, 1, 1, 1], g),
    'bootstrap_stat': lambda g: bootstrap.bootstrap_stat(np.mean, [np.arange(4)], g),
    'mean_score': lambda g: metrics.mean_score(PREDICTED, PREDICTED, 'dice', g),
}

@pytest.mark.parametrize('f', TAKES_GROUPS)
@pytest.mark.parametrize('none', [None, np.nan, '', '  ', 'nan', 'NaN', pd.NA, pd.NaT], ids=repr)
@pytest.mark.parametrize('kind', [list, lambda g: np.array(g, dtype=object), pd.Series, lambda g: pd.Series(g, index=range(9, 5, -1))],
    ids=['list', 'array', 'series', 'index'])
def test_a_missing_patient_is_refused(f, none, kind):
    with pytest.raises(PtxError, match='1 value with no group .*number 2'): TAKES_GROUPS[f](kind(['a', 'b', none, 'c']))

@pytest.mark.parametrize('f', TAKES_GROUPS)
def test_a_missing_patient_in_an_array_of_text_or_numbers_is_refused(f):
    for g in (np.array(['a', 'b', np.nan, 'c']), np.array([1, 2, np.nan, 3]), [1, 2, float('nan'), 3], ['a', None, None, '']):
        with pytest.raises(PtxError, match='no group'): TAKES_GROUPS[f](g)
    with pytest.raises(PtxError, match='one label'): TAKES_GROUPS[f]([[1], [2], [3], [4]])

@pytest.mark.parametrize('k', range(1, 6))
def test_fewer_than_six_patients_have_no_interval(k):
    v, g = [.2, .4, .3, .9, .1, .5, .6], np.arange(7) % k
    for r in (bootstrap.bootstrap_ci(v, g), bootstrap.paired_bootstrap(np.ones(7), v, g), bootstrap.bootstrap_stat(np.mean, [v], g)):
        assert np.isnan(r.lo) and np.isnan(r.hi) and 'too few, a 95 % interval needs 6' in str(r) and 'nan' not in str(r)
    assert np.isnan(bootstrap.paired_bootstrap(np.ones(7), v, g).p)

def test_too_few_resamples_is_told_as_such():
    why = bootstrap.bootstrap_ci(np.arange(6), n=100).why
    assert why == '100 resamples are too few for 6 groups, give n=411 or more'
    assert np.isnan(bootstrap.bootstrap_ci(np.arange(6), n=410).lo) and not np.isnan(bootstrap.bootstrap_ci(np.arange(6), n=411).lo)

@pytest.mark.parametrize('v, g', [(np.ones(20), None), (np.full(1000, .1), None), (np.zeros(7), None), ([0, 1]*8, np.repeat(range(8), 2))])
def test_what_does_not_vary_has_no_interval(v, g):
    for r in (bootstrap.bootstrap_ci(v, g), bootstrap.bootstrap_stat(np.mean, [v], g, n=500)):
        assert np.isnan(r.lo) and r.value == pytest.approx(np.mean(v)) and 'the same in every resample' in str(r)

def test_a_p_value_is_no_smaller_than_the_sign_tests_and_says_when_it_is_a_bound():
    for k in (6, 7, 8, 20):
        r = bootstrap.paired_bootstrap(np.linspace(.1, .2, k), np.zeros(k))
        assert r.p >= 2/2**k and r.p_is_bound and r.p < .05
    assert bootstrap.paired_bootstrap(np.linspace(.1, .2, 6), np.zeros(6)).p == 2/2**6
    r = bootstrap.paired_bootstrap(np.linspace(.1, .2, 300), np.zeros(300))
    assert r.p_is_bound and 'p < 0.0003' in str(r)
    r = bootstrap.paired_bootstrap(np.linspace(-.1, .2, 300), np.zeros(300)+.04)
    assert not r.p_is_bound and 'p = ' in str(r)

def test_differences_that_cancel_are_ties():
    a, b = np.array([.3, .1]*10), np.array([.2, .2]*10)
    whole = bootstrap.paired_bootstrap([1, -1]*10, [0, 0]*10)   # the same, in numbers that floats hold exactly
    for r in (bootstrap.paired_bootstrap(a, b), bootstrap.paired_bootstrap(b, a)):
        assert str(r).startswith('0.0000') and r.p == whole.p and (r.lo, r.hi) == pytest.approx((whole.lo/10, whole.hi/10))

def test_blocks_do_not_change_the_draws(monkeypatch):
    rng = np.random.default_rng(0)
    v, g = rng.random(300), rng.integers(0, 90, 300)
    whole = bootstrap.bootstrap_ci(v, g, n=500)
    monkeypatch.setattr(bootstrap, '_BLOCK', 100)
    assert bootstrap.bootstrap_ci(v, g, n=500) == whole

def test_integers_and_tensors_are_values():
    assert bootstrap.bootstrap_ci([1, 0, 1]).value == bootstrap.bootstrap_ci(torch.tensor([1., 0, 1])).value == pytest.approx(2/3)
