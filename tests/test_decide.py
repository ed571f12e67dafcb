"Rules from map to mask, against masks that are drawn and counted one by one"
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from pneumothorax.bootstrap import score_areas
from pneumothorax.decide import *
from pneumothorax.rle import PtxError

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
    for steady in (True, False):
        r = nested_search(c, folds, steady=steady)
        worse = Counts(c.levels, c.over.copy(), c.inside.copy(), c.truth.copy())
        worse.inside[folds == 1] = 0
        s = nested_search(worse, folds, steady=steady)
        assert r['chosen'].triplet[1] == s['chosen'].triplet[1]
        assert r['dice'].mean() == pytest.approx(r['score'].value)
        assert dice_of(c, r['triplet']).mean()-r['dice'].mean() == pytest.approx(r['optimism'])

def test_patients_are_resampled_whole():
    c = count_pixels(MAPS, MASKS, TOPS)
    alone, together = plateau(c, groups=list('abcdefghijkl'), n=30), plateau(c, n=30)
    assert alone[0] == together[0]
    assert (alone[1] == together[1]).all()
    one = plateau(c, groups=['same']*12, n=5)[1]
    assert (one == surface(c, TOPS, AREAS, BOTTOMS).max()-surface(c, TOPS, AREAS, BOTTOMS)).all()
    with pytest.raises(PtxError, match='3 patients for 12'): plateau(c, groups=[1, 2, 3])

@pytest.mark.parametrize('step', [{}, {'min_piece': 30_000}, {'min_prob': .6}, {'fill': 20_000}, {'dilate': 40}, {'min_piece': 17_000, 'min_prob': .5, 'fill': 1e6, 'dilate': 16}])
def test_an_explanation_ends_with_the_mask(step):
    d = Decision(Triplet(.5, 1000, .3), **step)
    for p in MAPS:
        t = explain(p, d, size=64)
        assert t.area.iloc[-1] == round(decide(p, d, size=64).sum()*256)
        assert len(t) == 1+len({'min_piece', 'min_prob'} & step.keys() and {1})+('fill' in step)+('dilate' in step)
    assert Decision.of(json.loads(json.dumps(d.spec()))) == d

def test_holes_are_inside():
    m = np.zeros((64, 64), np.float32)
    m[8:40, 8:40] = 1
    m[20:24, 20:24] = 0
    m[30:40, 30:34] = 0
    for fill, want in ((0, 32*32-16-40), (16*256-1, 32*32-16-40), (16*256, 32*32-40), (1e7, 32*32-40)): assert decide(m, Decision(Triplet(.5, 0, .5), fill=fill), size=64).sum() == want
    frame = np.ones((64, 64), np.float32)
    frame[10:20, 10:20] = 0
    assert decide(frame, Decision(Triplet(.5, 0, .5), fill=1e7), size=64).all()

def test_pieces_are_searched_as_they_are_drawn():
    t = Triplet(.3, 0, .6)
    best, scores = search_pieces(MAPS, MASKS, t, [0, 17_000, 60_000], [0, .7, .8])
    for i, a in enumerate([0, 17_000, 60_000]):
        for j, q in enumerate([0, .7, .8]): assert drawn(MAPS, MASKS, Decision(t, min_piece=a, min_prob=q)).mean() == pytest.approx(scores[i, j], abs=1e-12)
    assert drawn(MAPS, MASKS, best).mean() == pytest.approx(scores.max(), abs=1e-12)
    nothing = search_pieces(MAPS*0, MASKS, t)[1]
    assert (nothing == (MASKS.reshape(12, -1).sum(1) == 0).mean()).all()

def test_the_benchmark_runs():
    p = subprocess.run([sys.executable, ROOT/'tests'/'bench_search.py', '--images', '60', '--size', '32', '--rounds', '1'], capture_output=True, text=True, check=True)
    assert '10,000 triplets' in p.stdout
    assert float(p.stdout.split()[-1]) < 1e-12
