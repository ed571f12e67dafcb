"Priors: against slow oracles at random shapes, nothing broadcast in silence, each bad argument one clear error, and a training run"
import ast
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import named
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.all import TensorImageBW, TensorMask, noop
from torch import nn

from pneumothorax import bootstrap, metrics
from pneumothorax.data import xray_dls
from pneumothorax.learner import xray_learner
from pneumothorax.losses import ComboLoss, LossError, bce_loss, xray_loss
from pneumothorax.priors import ClassLoss, LogitAdjustedLoss, adjust_logits, position_prior
from pneumothorax.rle import LabelError, rle_encode, rles_to_mask
from pneumothorax.siim import read_labels


def draws(seed=0):
    "Twenty random shapes, logits and priors"
    rng = np.random.default_rng(seed)
    for _ in range(20):
        n, h, w = rng.integers(1, 6, 3)
        yield rng, n, h, w, torch.tensor(rng.normal(0, 5, (n, 1, h, w)))

def test_one_channel_against_a_loop():
    for rng, n, h, w, logits in draws():
        alpha = rng.normal()
        image, place = rng.uniform(.01, .99, n), rng.uniform(.01, .99, (h, w))
        got_image, got_place = adjust_logits(logits, image, alpha), adjust_logits(logits, place, alpha)
        for i, r, c in np.ndindex(n, h, w):
            old = logits[i, 0, r, c].item()
            assert got_image[i, 0, r, c].item() == pytest.approx(old-alpha*math.log(image[i]/(1-image[i])), abs=1e-9)
            assert got_place[i, 0, r, c].item() == pytest.approx(old-alpha*math.log(place[r, c]/(1-place[r, c])), abs=1e-9)

def test_classes_against_a_loop():
    for rng, n, h, w, _ in draws(1):
        k, alpha = rng.integers(2, 5), rng.normal()
        logits, prior = torch.tensor(rng.normal(0, 5, (n, k, h, w))), rng.dirichlet(np.ones(k))
        got = adjust_logits(logits, prior, alpha, dim=1)
        for i, j, r, c in np.ndindex(n, k, h, w):
            assert got[i, j, r, c].item() == pytest.approx(logits[i, j, r, c].item()-alpha*math.log(prior[j]), abs=1e-9)

def test_images_as_many_as_columns():
    "PyTorch would line a vector up with the width"
    logits = torch.zeros(4, 1, 4, 4)
    out = adjust_logits(logits, [.1, .2, .3, .4])
    assert torch.equal(out, out[:, :, :1, :1].expand(4, 1, 4, 4)) and len(out.unique()) == 4

@pytest.mark.parametrize('shape', [(3,), (4, 4, 4), (4, 1), (1, 4), (2, 1, 4, 4), (4, 2, 4, 4), (1, 1, 1, 1, 2)])
def test_nothing_is_broadcast_in_silence(shape):
    with pytest.raises(LossError, match='one per place'): adjust_logits(torch.zeros(4, 1, 4, 4), torch.full(shape, .5))

BAD = [({'prior': p}, why) for p, why in ((0, 'outside'), (1, 'outside'), (22, 'outside'), (-.5, 'outside'), (math.nan, 'nan'),
    (math.inf, 'inf'), (None, 'nan'), ('rare', 'type str'), ([], 'empty'), ([[.1], [.2, .3]], 'type list'),
    (torch.tensor([True]), 'outside'), (torch.tensor(1e-9).half(), 'outside'))]
BAD += [({'prior': .2, 'alpha': a}, 'finite number') for a in (math.nan, math.inf, -math.inf, 'all', None)]
BAD += [({'prior': p, 'dim': 1}, why)
    for p, why in (([.2]*3, 'off 1'), ([.5]*2, '3 classes'), (.5, '3 classes'), (np.full((5, 5), .2), '3 classes'))]
BAD += [({'prior': [.5, .3, .2], 'dim': d}, 'no such axis') for d in (4, -5, 1.5, 'c')]

@pytest.mark.parametrize('kw,why', BAD, ids=str)
def test_bad_priors(kw, why):
    with pytest.raises(LossError, match=why): adjust_logits(torch.zeros(2, 3, 5, 5), **kw)

@pytest.mark.parametrize('logits', [torch.zeros(2).long(), torch.zeros(2).bool(), np.zeros(2), [.1], .5], ids=str)
def test_bad_logits(logits):
    with pytest.raises(LossError, match='floating tensor'): adjust_logits(logits, .2)

@pytest.mark.parametrize('kw,why', [({'prior': [.1, .2]}, 'one number, or H×W'), ({'prior': np.full((2, 2, 2), .1)}, 'one number, or H×W'),
    ({'prior': 2.}, 'outside'), ({'prior': .5, 'dim': 1}, 'per class'), ({'prior': [.5, .6], 'dim': 1}, 'off 1'),
    ({'prior': .1, 'alpha': math.nan}, 'finite'), ({'prior': .1, 'loss_func': bce_loss}, 'instance'),
    ({'prior': .1, 'loss_func': ComboLoss}, 'instance'), ({'prior': .1, 'loss_func': 'bce'}, 'instance')], ids=named)
def test_bad_losses(kw, why):
    with pytest.raises(LossError, match=why): LogitAdjustedLoss(**kw)

def test_loss_refuses_what_does_not_fit():
    logits, masks = torch.zeros(2, 1, 4, 5), torch.zeros(2, 4, 5).long()
    with pytest.raises(LossError, match='one per place'): LogitAdjustedLoss(np.full((5, 4), .1))(logits, masks)
    with pytest.raises(LossError, match='N×1×H×W'): LogitAdjustedLoss(.1)(logits, masks[:1])
    with pytest.raises(LossError, match='3 classes'): LogitAdjustedLoss([.5, .5], dim=1)(torch.zeros(2, 3, 4, 5), masks)
    for bad, why in ((masks+3, '0 to 2'), (masks-1, '0 to 2'), (masks.float(), 'whole numbers'), (masks[:1], 'one for each')):
        with pytest.raises(LossError, match=why): LogitAdjustedLoss([.5, .3, .2], dim=1)(torch.zeros(2, 3, 4, 5), bad)
    with pytest.raises(LossError, match='no such axis'): LogitAdjustedLoss([.5, .5], dim=5)(torch.zeros(2, 2, 4, 5), masks)
    with pytest.raises(LossError, match='no class vectors'): ClassLoss()(torch.zeros(3), masks)
    with pytest.raises(LossError, match='reduction'): ClassLoss(reduction='sum')(torch.zeros(2, 3, 4, 5), masks)

def test_another_loss_inside():
    logits, targ = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40).reshape(2, 4, 5)%3
    prior = torch.tensor([.6, .3, .1])
    theirs, ours = (LogitAdjustedLoss(prior, loss_func=f, dim=1) for f in (CrossEntropyLossFlat(axis=1), None))
    assert theirs(logits, targ).item() == pytest.approx(ours(logits, targ).item(), abs=1e-6)
    assert torch.equal(theirs.activation(logits), ours.activation(logits)) and torch.equal(theirs.decodes(logits), ours.decodes(logits))
    plain, masks = LogitAdjustedLoss(.2, loss_func=nn.BCEWithLogitsLoss()), targ.clamp(max=1)[:, None].float()
    assert plain(logits[:, :1], masks).item() == pytest.approx(LogitAdjustedLoss(.2)(logits[:, :1], masks).item(), abs=1e-6)
    assert torch.equal(plain.decodes(plain.activation(logits[:, :1])), (logits[:, 0] > 0).to(torch.uint8))
    theirs.reduction = 'none'
    assert theirs.loss_func.reduction == 'none'

def test_types_and_mixed_precision():
    logits, masks = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 8, 8, dtype=torch.uint8)
    loss = LogitAdjustedLoss(np.full((8, 8), .01))
    want = loss(logits, masks)
    assert torch.equal(loss(logits.as_subclass(TensorImageBW), masks.as_subclass(TensorMask)), want)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(loss(logits, masks), want)
    assert 'shift' not in loss.state_dict() and loss.half()(logits, masks).isfinite()
    assert type(adjust_logits(logits.as_subclass(TensorImageBW), .1)) is TensorImageBW

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    logits, masks = torch.randn(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)
    for prior in (.1, np.full((8, 8), .1), torch.full((8, 8), .1)):
        assert torch.allclose(adjust_logits(logits.cuda(), prior).cpu(), adjust_logits(logits, prior), atol=1e-5)
        assert torch.allclose(LogitAdjustedLoss(prior)(logits.cuda(), masks.cuda()).cpu(),
            LogitAdjustedLoss(prior)(logits, masks), atol=1e-5)
    classes = torch.randn(2, 3, 4, 4)
    assert torch.allclose(adjust_logits(classes.cuda(), [.5, .3, .2], dim=1).cpu(), adjust_logits(classes, [.5, .3, .2], dim=1), atol=1e-5)

def random_masks(n, seed=0):
    "Masks at 1024² of a few rectangles, some empty, as arrays and as run-lengths in one or two rows"
    rng, masks, rles = np.random.default_rng(seed), [], []
    for i in range(n):
        parts = []
        for _ in range(i % 3):
            m = np.zeros((1024, 1024), np.uint8)
            r, c, h, w = rng.integers(0, 900, 4)
            m[r:r+h//4, c:c+w//4] = 1
            parts.append(rle_encode(m))
        rles.append([p for p in parts if p != '-1'])
        masks.append(rles_to_mask(rles[-1]))
    return np.stack(masks), rles

@pytest.mark.parametrize('size', [1, 7, 64, 100, 1024])
def test_position_prior_is_the_mean_of_masks(size):
    masks, rles = random_masks(8)
    for empty in (False, True):
        n = len(masks) if empty else masks.any((1, 2)).sum()
        p = position_prior(rles, size, 2., empty)
        assert p.shape == (size, size) and p.dtype == np.float32 and 0 < p.min() <= p.max() < 1
        assert p.mean() == pytest.approx(masks.sum()/n/2**20, rel=1e-5)   # smoothing and resizing keep the mean
        for same in (masks, torch.tensor(masks), masks*255, pd.Series(rles), pd.Series(rles).values, pd.DataFrame({'rles': rles})):
            assert np.array_equal(position_prior(same, size, 2., empty), p)

def test_position_prior_of_a_label_file(phantoms):
    labels = read_labels(phantoms/'train-rle.csv')
    assert np.array_equal(position_prior(labels, 32), position_prior([r for r in labels.rles if r], 32))
    assert position_prior(labels, 32, empty=True).mean() == pytest.approx(labels.area.mean()/2**20, rel=1e-5)

@pytest.mark.parametrize('masks,kw,why', [([], {}, 'no positive pixel'), ([[], []], {}, 'no positive pixel'),
    (np.zeros((2, 8, 8), bool), {}, 'no positive pixel'), (np.ones((2, 8, 8), bool), {}, 'no doubt'),
    (np.full((2, 8, 8), .5), {}, 'threshold'), (np.ones((8, 8), int), {}, 'N×H×W'), ('0 5', {}, 'each image'),
    (pd.DataFrame({'a': [1]}), {}, 'read_labels'), ([['0 5']], {'size': 0}, 'size'), ([['0 5']], {'size': 2.}, 'size'),
    ([['0 5']], {'size': True}, 'size'), ([['0 5']], {'smooth': 0}, 'smooth'), ([['0 5']], {'smooth': -1}, 'smooth'),
    ([['0 5']], {'smooth': math.nan}, 'smooth'), ([['0 5']], {'smooth': None}, 'smooth'),
    ([['0 5']], {'smooth': 1e-60}, 'no doubt')], ids=str)
def test_bad_masks(masks, kw, why):
    with pytest.raises(LossError, match=why): position_prior(masks, **kw)

def test_bad_run_lengths():
    for bad, why in (('1 2 3', 'odd'), ('0 2000000', 'ends at'), ('x', 'whole number')):
        with pytest.raises(LabelError, match=why): position_prior([['0 5'], [bad]])

def test_training_with_a_prior_of_places(phantoms):
    prior = position_prior(read_labels(phantoms/'train-rle.csv'), 64, empty=True)
    learn = xray_learner(xray_dls(phantoms, size=64, bs=4, workers=0), encoder='mobilenetv3_small_050', weights='none',
        loss_func=LogitAdjustedLoss(prior, loss_func=xray_loss()))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        logits, masks = learn.get_preds(act=noop)
        probs, _, decoded, losses = learn.get_preds(with_decoded=True, with_loss=True)
    assert torch.allclose(probs, logits.sigmoid(), atol=1e-6) and torch.equal(decoded, (probs[:, 0] > .5).to(torch.uint8))
    want = xray_loss(reduction='none')(adjust_logits(logits, prior, -1), masks)
    assert torch.allclose(losses, want, atol=1e-5)

def test_the_lesson_uses_the_package_for_intervals_and_scores(root):
    "What a lower module gives is imported, not written again"
    nb = json.loads((root/'nbs'/'25_priors.ipynb').read_text(encoding='utf-8'))
    code = [ast.parse(''.join(c['source'])) for c in nb['cells'] if c['cell_type'] == 'code']
    own = {n.name for t in code for n in t.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    given = {n for m in (bootstrap, metrics) for n in m.__all__}
    used = {n.id for t in code for n in ast.walk(t) if isinstance(n, ast.Name)}
    assert not own & {*given, 'bootstrap'} and {'auroc', 'bootstrap_ci', 'bootstrap_stat', 'paired_bootstrap', 'reliability'} <= used
    assert 'confidence' not in ''.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
