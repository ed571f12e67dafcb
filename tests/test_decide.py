"Rules from map to mask, against masks that are drawn and counted one by one"
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from pneumothorax.bootstrap import score_areas
from pneumothorax.decide import *
from pneumothorax.rle import PtxError
from pneumothorax.siim import PtxNotice

RNG = np.random.default_rng(0)
MAPS = np.clip(np.kron(RNG.random((12, 8, 8)), np.ones((8, 8)))*np.linspace(.2, 1.4, 12)[:, None, None], 0, 1).astype(np.float32)
MASKS = np.kron(RNG.random((12, 8, 8)) < .1, np.ones((8, 8))).astype(np.uint8)*(np.arange(12) % 3 > 0)[:, None, None]
GRID = [.1, .5, .9], [0, 1000, 40_000.5, 1e7], [.05, .5, .95]

def drawn(maps, masks, rule, size=64):
    "Dice of each image as `decide` draws it"
    pairs = [(decide(p, rule, size=size) > 0, m > 0) for p, m in zip(maps, masks)]
    return score_areas([(p & m).sum() for p, m in pairs], [p.sum() for p, _ in pairs], [m.sum() for _, m in pairs])

@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_search_is_the_loop(dtype):
    maps = (MAPS*np.iinfo(dtype).max).round().astype(dtype) if np.issubdtype(dtype, np.integer) else MAPS.astype(dtype)
    best, scores = search(maps, MASKS, *GRID)
    want = np.array([[[drawn(maps, MASKS, Triplet(t, a, b)).mean() for b in GRID[2]] for a in GRID[1]] for t in GRID[0]])
    assert np.abs(scores-want).max() < 1e-12
    assert drawn(maps, MASKS, best).mean() == pytest.approx(scores.max(), abs=1e-12)

def test_a_probability_that_equals_a_threshold_does_not_exceed_it():
    levels = np.arange(256)/255
    bytes_ = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    c = count_pixels(bytes_, np.ones((1, 16, 16), np.uint8), levels[:-1])
    assert (c.over[0]/4096 == 255-np.arange(255)).all()
    for b in (0, 51, 100, 254): assert decide(bytes_[0], Triplet(0, 0, b/255), size=16).sum() == 255-b

def test_order_of_images_and_weights_do_not_matter_where_they_should_not():
    c = count_pixels(MAPS, MASKS, [*GRID[0], *GRID[2]])
    a, b = surface(c, *GRID), surface(c[::-1], *GRID)
    assert np.abs(a-b).max() < 1e-12
    twice = surface(c[np.repeat(np.arange(12), 2)], *GRID, weights=np.tile([1., 3.], 12))
    assert np.abs(a-twice).max() < 1e-12
    w = np.arange(12.)
    assert np.abs(surface(c, *GRID, np.stack([w, w+1], 1))[..., 0]-surface(c, *GRID, w)).max() < 1e-12

def test_many_images_are_taken_in_parts():
    c = count_pixels(np.tile(MAPS, (400, 1, 1)), np.tile(MASKS, (400, 1, 1)), [*GRID[0], *GRID[2]])
    assert len(c) == 4800
    assert np.abs(surface(c, *GRID)-search(MAPS, MASKS, *GRID)[1]).max() < 1e-12

def test_nested_search_never_sees_the_fold_it_scores():
    c, folds = count_pixels(MAPS, MASKS, TOPS), np.arange(12) % 3
    r = nested_search(c, folds)
    worse = Counts(c.levels, c.over.copy(), c.inside.copy(), c.truth.copy())
    worse.inside[folds == 1] = 0
    s = nested_search(worse, folds)
    assert r['chosen'].triplet[1] == s['chosen'].triplet[1]
    assert r['dice'].mean() == pytest.approx(r['score'].value)
    assert dice_of(c, r['triplet']).mean()-r['dice'].mean() == pytest.approx(r['optimism'])
    assert r['triplet'] == search(c)[0]

@pytest.mark.parametrize('step', [{}, {'min_piece': 30_000}, {'min_prob': .6}, {'fill': 20_000}, {'dilate': 40},
    {'min_piece': 17_000, 'min_prob': .5, 'fill': 1e6, 'dilate': 16}])
def test_an_explanation_ends_with_the_mask(step):
    d = Decision(Triplet(.5, 1000, .3), **step)
    for p in MAPS:
        t = explain(p, d, size=64)
        assert t.area.iloc[-1] == round(decide(p, d, size=64).sum()*256)
        assert len(t) == 1+len({'min_piece', 'min_prob'} & step.keys() and {1})+('fill' in step)+('dilate' in step)
    assert Decision.of(json.loads(json.dumps(d.spec()))) == d

def test_an_explanation_names_what_it_dropped():
    m = np.zeros((64, 64), np.float32)
    m[4:24, 4:24], m[40:44, 40:44], m[50:60, 50:60] = .9, .8, .4
    t = explain(m, Decision(Triplet(.5, 0, .3), min_piece=5000, min_prob=.5), size=64)
    assert list(t.columns) == ['step', 'asked', 'found', 'area'] and list(t.step) == ['triplet', 'pieces']
    assert t.found[0].startswith(f'{(400+16)*256:,} px') and t.area[0] == (400+16+100)*256
    assert t.found[1] == '1 of 3 kept; dropped 25,600 px at 0.40, 4,096 px at 0.80' and t.area[1] == 400*256
    healthy = explain(m, Decision(Triplet(.5, 0, .3), min_piece=5000, fill=True, dilate=30), keep=False, size=64)
    assert list(healthy.step) == ['triplet', 'verdict', 'pieces', 'holes', 'dilation'] and (healthy.area[1:] == 0).all()

@pytest.mark.parametrize('size', [64, 96, 1024])
def test_the_plain_rule_is_its_own_sentence(size):
    for p in (MAPS[5], (MAPS[7]*255).round().astype(np.uint8)):
        for thresh in (.05, .2, 51/255, .5, float(p.max()/(255 if p.dtype == np.uint8 else 1))-1e-6):
            for area in (0, 1, 800, 17_000):
                assert (prob_to_mask(p, thresh, area, size)
                    == keep_large((upsample(p, size) >= np.float32(thresh)).astype(np.uint8), area)).all()

def test_any_storage_of_maps_and_masks_counts_the_same(tmp_path):
    bytes_ = (MAPS*255).round().astype(np.uint8)
    np.save(tmp_path/'maps.npy', bytes_)
    want = count_pixels(bytes_, MASKS, TOPS)
    for maps, masks in ((np.load(tmp_path/'maps.npy', mmap_mode='r'), MASKS > 0), (list(bytes_), MASKS.astype(float)),
            (np.asfortranarray(bytes_), MASKS.transpose(0, 2, 1).copy().transpose(0, 2, 1))):
        got = count_pixels(maps, masks, TOPS)
        assert all((getattr(got, k) == getattr(want, k)).all() for k in ('over', 'inside', 'truth'))
    turned = count_pixels(bytes_[:, ::-1, ::-1], MASKS[:, ::-1, ::-1], TOPS)
    assert (turned.inside == want.inside).all()

def test_counts_are_saved_whole_and_joined(tmp_path):
    c = count_pixels(MAPS, MASKS, TOPS)
    c.save(tmp_path/'a'/'counts.npz')
    assert (search(Counts.load(tmp_path/'a'/'counts.npz'))[1] == search(c)[1]).all() and len(list((tmp_path/'a').iterdir())) == 1
    assert (search(Counts.join([c[:5], c[5:]]))[1] == search(c)[1]).all()
    with pytest.raises(PtxError, match='same levels'): Counts.join([c, count_pixels(MAPS, MASKS, [.5])])
    with pytest.raises(PtxError, match='same levels'): Counts.join([])
    whole = (tmp_path/'a'/'counts.npz').read_bytes()
    (tmp_path/'half.npz').write_bytes(whole[:len(whole)//2])
    np.savez(tmp_path/'other.npz', a=1)
    for f in ('half.npz', 'other.npz', 'none.npz'):
        with pytest.raises(PtxError, match=f): Counts.load(tmp_path/f)

NAN = MAPS.copy()
NAN[4, 3, 3] = np.nan

@pytest.mark.parametrize('maps, masks, grid, why', [
    (MAPS, MASKS[:11], GRID, '12 maps and 11'), (MAPS, MASKS[:, :32], GRID, 'image 0.*square'),
    (NAN, MASKS, GRID, 'image 4.*NaN'), (MAPS*300, MASKS, GRID, 'image 0.*sigmoid'), (MAPS-.5, MASKS, GRID, 'image 0'),
    (MAPS[:, None], MASKS, GRID, 'H×W'), (MAPS, MASKS*2, GRID, 'image 1.*0 and 1'), (MAPS, MASKS*np.nan, GRID, '0 and 1'),
    (MAPS, ['1 x']*12, GRID, 'image 0'), (MAPS[:0], MASKS[:0], GRID, 'no images'), (MAPS, MASKS, ([], [0], [.5]), 'no thresholds'),
    (MAPS, MASKS, ([.5], [], [.5]), 'at least one'), (MAPS, MASKS, ([.5], [0], []), 'no thresholds'),
    (MAPS, MASKS, ([75], [0], [.5]), 'below 1'), (MAPS, MASKS, ([.5], [0], [-.1]), 'below 1'),
    (MAPS, MASKS, ([np.nan], [0], [.5]), 'below 1'), (MAPS, MASKS, ([.5], [np.nan], [.5]), '0 or more'),
    (MAPS, MASKS, ([.5], [-1], [.5]), '0 or more'), (MAPS, MASKS, ([.5], [np.inf], [.5]), '0 or more'),
    (MAPS, MASKS, ([.5, .7, .5], [0], [.5]), 'tops: 0.5 is there more than once'),
    (MAPS, MASKS, ([.5], [0, 800, 800], [.5]), 'areas: 800')])
def test_bad_input_is_named(maps, masks, grid, why):
    with pytest.raises(PtxError, match=why): search(maps, masks, *grid)

def test_a_map_that_is_empty_or_full_is_legal():
    healthy = (MASKS.reshape(12, -1).sum(1) == 0).mean()
    full = 2*MASKS.reshape(12, -1).sum(1)/(MASKS.reshape(12, -1).sum(1)+4096)
    for dtype in (np.uint8, np.uint16, np.float32):
        top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
        assert (search(np.zeros((12, 64, 64), dtype), MASKS, *GRID)[1] == healthy).all()
        scores = search(np.full((12, 64, 64), top, dtype), MASKS, *GRID)[1]
        assert np.abs(scores[:, :3]-full.mean()).max() < 1e-12 and (scores[:, 3] == healthy).all()
    assert search(MAPS, MASKS*0, *GRID)[1].max() == 1 and search(MAPS, MASKS*0+1, *GRID)[1].min() == 0

def test_holes_are_inside():
    m = np.zeros((64, 64), np.float32)
    m[8:40, 8:40] = 1
    m[20:24, 20:24] = 0
    m[30:40, 30:34] = 0
    assert decide(m, Decision(Triplet(.5, 0, .5), fill=True), size=64).sum() == 32*32-40
    for fill, want in ((0, 32*32-16-40), (16*256-1, 32*32-16-40), (16*256, 32*32-40), (1e7, 32*32-40)):
        assert decide(m, Decision(Triplet(.5, 0, .5), fill=fill), size=64).sum() == want
    frame = np.ones((64, 64), np.float32)
    frame[10:20, 10:20] = 0
    assert decide(frame, Decision(Triplet(.5, 0, .5), fill=1e7), size=64).all()

def test_pieces_are_searched_as_they_are_drawn():
    t = Triplet(.3, 0, .6)
    best, scores = search_pieces(MAPS, MASKS, t, [0, 17_000, 60_000], [0, .7, .8])
    for i, a in enumerate([0, 17_000, 60_000]):
        for j, q in enumerate([0, .7, .8]):
            assert drawn(MAPS, MASKS, Decision(t, min_piece=a, min_prob=q)).mean() == pytest.approx(scores[i, j], abs=1e-12)
    assert drawn(MAPS, MASKS, best).mean() == pytest.approx(scores.max(), abs=1e-12)
    nothing = search_pieces(MAPS*0, MASKS, t)[1]
    assert (nothing == (MASKS.reshape(12, -1).sum(1) == 0).mean()).all()

def test_limits_of_pieces_are_nested_too():
    c, folds, who = count_pixels(MAPS, MASKS, TOPS), np.arange(12)//2 % 3, np.arange(12)//2
    r = nested_search(c, folds, who)
    assert (r['optimistic'].value-r['score'].value == pytest.approx(r['optimism'])
        and r['optimistic'].value == pytest.approx(dice_of(c, r['triplet']).mean()))
    more = nested_pieces(MAPS, MASKS, r, folds, who)
    for k, t, a, q in more['chosen'][['fold', 'triplet', 'min_piece', 'min_prob']].itertuples(index=False):
        held = folds == k
        best = search_pieces(MAPS[~held], MASKS[~held], Triplet.of(t))[0]
        assert (best.min_piece, best.min_prob) == (a, q)
        assert np.abs(drawn(MAPS[held], MASKS[held], best)-more['dice'][held]).max() < 1e-12
    assert more['gain'].value == pytest.approx((more['dice']-r['dice']).mean()) and more['decision'].triplet == r['triplet']
    with pytest.raises(PtxError, match='12 maps|11 maps'): nested_pieces(MAPS[:11], MASKS[:11], r, folds, who)

def test_patients_in_two_folds_are_counted():
    c = count_pixels(MAPS, MASKS, TOPS)
    with pytest.warns(PtxNotice, match='^2 patients are in more than one fold'):
        nested_search(c, np.arange(12) % 3, ['a', 'a', 'b', 'b', *'cdefghij'])
    for folds, why in (([0]*12, 'one fold'), ([0, 1], '12 images'), ([np.nan, 1]*6, 'folds')):
        with pytest.raises(PtxError, match=why): nested_search(c, folds)

def test_the_benchmark_runs():
    p = subprocess.run([sys.executable, ROOT/'tests'/'bench_search.py', '--images', '60', '--size', '32', '--rounds', '1'],
        env={**os.environ, 'PYTHONPATH': str(ROOT/'tests')}, capture_output=True, text=True, check=True)
    assert '10,000 triplets' in p.stdout
    assert float(p.stdout.split()[-1]) < 1e-12
