"A mask is cut once, at the size that is asked for; a cache and a folder give the same batches"
import numpy as np
import pytest
import torch
from conftest import ok, ptx

from pneumothorax.cache import FULL, coverage, cut_mask, prepare, shrink_mask
from pneumothorax.data import xray_dls
from pneumothorax.equalize import equalizer
from pneumothorax.rle import rles_to_mask
from pneumothorax.samplers import seeded
from pneumothorax.siim import siim_train


@pytest.fixture(scope='module')
def real(shared):
    "The 43 true masks of real radiographs"
    df = siim_train(shared/'siim-small')
    return [rles_to_mask(r) for r in df.rles[df.has_ptx]]

def by_hand(m, size):
    "The rule in plain loops: mean of each block, sorted, as many as the area"
    k = len(m)//size
    c = [(round(FULL*m[i*k:(i+1)*k, j*k:(j+1)*k].mean()), i, j) for i in range(size) for j in range(size)]
    n = max(round(sum(v for v, _, _ in c)/FULL), 1)
    c.sort(key=lambda o: (-o[0], (o[1]*.7548776662+o[2]*.5698402910) % 1))
    out = np.zeros((size, size), np.uint8)
    for v, i, j in c[:n]: out[i, j] = v > 0
    return out

def test_the_rule_against_loops():
    rng = np.random.default_rng(0)
    for p in (.02, .3, .9):
        m = (rng.random((64, 64)) < p).astype(np.uint8)
        assert (shrink_mask(m, 16) == by_hand(m, 16)).all()

@pytest.mark.parametrize('sizes, least, most', [((512,), .99, 1.02), ((256,), .85, 1.02), ((512, 256), .85, 1.02), ((128,), .95, 1.17),
    ((512, 128), .95, 1.17), ((300,), .99, 1.07), ((512, 300), .99, 1.07), ((384, 256), .85, 1.02)])
def test_real_masks_do_not_grow(real, sizes, least, most):
    area, got = np.array([m.sum() for m in real]), []
    for m in real:
        c = coverage(m, sizes[0])
        for s in sizes[1:]: c = coverage(c, s, inside=FULL)
        got.append(cut_mask(c).sum()*(1024/sizes[-1])**2)
    r, thin = np.array(got)/area, area <= np.quantile(area, .1)
    assert len(real) == 43 and abs(r.mean()-1) < .005 and abs(r[thin].mean()-1) < .03 and least < r.min() <= r.max() < most

def test_a_positive_stays_positive(real):
    assert all(shrink_mask(m, s).any() for m in real for s in (97, 64, 32)) and not shrink_mask(np.zeros((64, 64), np.uint8), 32).any()

def batches(source, size, **kw):
    "Two epochs of training and the validation, augmentation and all"
    dls = xray_dls(source, size, 4, seed=3, workers=0, **kw)
    with seeded(1): return [o.clone().as_subclass(torch.Tensor) for dl in (dls.train, dls.train, dls.valid) for b in dl for o in b]

@pytest.mark.parametrize('before, after', [(None, None), (None, 'clahe'), ('hist', None)])
def test_cache_and_folder_give_equal_batches(phantoms, tmp_path, before, after):
    prepare(phantoms, tmp_path/'c', 48, before=equalizer(before), workers=0, progress=False)
    a = batches(tmp_path/'c', 48, equalize=after)
    b = batches(phantoms, 48, equalize=before or after, equalize_first=bool(before))
    assert len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))

def test_real_cache_and_folder(shared, tmp_path):
    df = siim_train(shared/'siim-small')
    df = df[df.has_ptx].head(12).reset_index(drop=True)
    c = prepare(df, tmp_path/'c', 512, workers=0, progress=False)
    for size in (512, 256):
        pairs = list(zip(batches(c, size, tfms=[], stats=(.5, .25)), batches(df, size, tfms=[], stats=(.5, .25))))
        for x, y in pairs:
            assert torch.equal(x, y) if size == 512 or x.dtype == torch.uint8 else (x-y).abs().max() < 4/65535*4

def test_an_old_cache_is_refused_and_says_why(phantoms, tmp_path):
    prepare(phantoms, tmp_path/'c', 64, workers=0, progress=False)
    f = tmp_path/'c'/'cache.json'
    f.write_text(f.read_text().replace('"format": 3', '"format": 2'))
    for args in (('ptx_train', tmp_path/'c', '--out', tmp_path/'r'), ('ptx_prepare', phantoms, tmp_path/'c', '--size', 64)):
        p = ptx(*args)
        assert (p.returncode == 1 and 'cache format 2, this version reads 3 (masks were cut' in p.stderr and 'prepare again' in p.stderr
            and 'Traceback' not in p.stderr)
    ok('ptx_prepare', phantoms, tmp_path/'new', '--size', 64)
