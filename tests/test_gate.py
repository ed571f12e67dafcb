"The gate: what it refuses, what it bears, and that nothing leaks"
import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from pneumothorax.gate import (
    FEATURES,
    Embedder,
    Gate,
    GateError,
    best_gate_threshold,
    dice_if_kept,
    embed_images,
    features,
    fit_calibration,
    fit_gate,
    keep_by_expected_dice,
    keep_out_of_fold,
    load_gate,
    map_features,
    soft_dice,
    weigh_map,
)
from pneumothorax.records import FORMAT
from pneumothorax.rle import PtxError
from pneumothorax.siim import PtxNotice, siim_train

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:.*unknown patient:pneumothorax.siim.PtxNotice')]

def made(n=60, seed=0):
    "Maps with a blob that is stronger in positives, labels and patients"
    rng = np.random.default_rng(seed)
    y = np.arange(n)%3 == 0
    maps = np.zeros((n, 32, 32), np.float32)
    for m, pos in zip(maps, y):
        r, c = rng.integers(2, 24, 2)
        m[r:r+6, c:c+6] = np.clip(rng.normal(.65 if pos else .4, .15), .02, 1)
    table = pd.DataFrame({'ImageId': [f'i{k:03}' for k in range(n)], 'row': range(n)})
    return (table, np.rint([255*cv2.GaussianBlur(m, (0, 0), 1) for m in maps]).astype(np.uint8), y.astype(int),
        np.array([f'p{k//2}' for k in range(n)]))

@pytest.fixture(scope='module')
def data():
    table, maps, y, who = made()
    return features((table, maps), 'map', progress=False), y, who, np.arange(60)//20

@pytest.fixture(scope='module')
def kept(data):
    return pd.DataFrame({'dice': np.where(data[1], .6, 0.), 'area': 900}, data[0].index)

@pytest.fixture(scope='module')
def gate(data, kept): return Gate('logistic').fit(*data, kept=kept)

def test_every_feature_is_described_and_no_other():
    p = np.full((8, 8), .3)
    assert set(map_features(p, p, p)) == {c for c in FEATURES if c.split('_')[0] in ('map', 'views', 'runs')}
    with pytest.raises(GateError, match='of the same map'): map_features(p, p[:4])
    for bad in (np.zeros((0, 4)), np.full((4, 4), np.nan), np.full((4, 4), 300, np.int64)):
        with pytest.raises(GateError): map_features(bad)

@pytest.mark.parametrize('kind', ['logistic', 'boosting'])
def test_labels_of_a_fold_do_not_touch_what_is_said_of_it(data, kind):
    X, y, who, f = data
    who = np.where(np.arange(60) == 0, who[30], who)   # one patient in the folds 0 and 1
    with pytest.warns(PtxNotice, match='1 patient is in several folds'): a = Gate(kind).fit(X, y, who, f)
    for k in range(3):
        turn = (f == k)|np.isin(who, who[f == k])
        with pytest.warns(PtxNotice): b = Gate(kind).fit(X, np.where(turn, 1-y, y), who, f)
        assert (a.oof[f == k] == b.oof[f == k]).all() and (a.oof != b.oof).any()

def test_two_folds_are_split_again_and_do_not_leak(data):
    X, y, who, f = data
    f = (f == 1).astype(int)
    a, b = Gate('logistic').fit(X, y, who, f), Gate('logistic').fit(X, np.where(f == 1, 1-y, y), who, f)
    assert (a.oof[f == 1] == b.oof[f == 1]).all() and (a.raw != a.oof).all()

def test_the_order_of_labels_does_not_matter_if_they_have_ids(data):
    X, y, who, f = data
    by_id = [pd.Series(v, X.index)[::-1] for v in (y, who, f)]
    assert (Gate('logistic').fit(X, *by_id).oof == Gate('logistic').fit(X, y, who, f).oof).all()

def test_one_class(data):
    X, y, who, f = data
    with pytest.raises(GateError, match='a gate needs both kinds'): Gate().fit(X, y*0, who, f)
    with pytest.raises(GateError, match='without fold 0: no image of 20 left for training is negative'):
        Gate('logistic').fit(X[:40], np.arange(40) >= 20, who[:40], f[:40])
    held = Gate('logistic').fit(X, y, np.arange(60), np.where(y == 1, f, f+3))   # each fold has one class: nothing wrong with that
    assert np.isfinite(held.oof).all()

def test_faulty_input_is_named(data, kept):
    X, y, who, f = data
    s = pd.Series(y, X.index)
    for args, why in (((X, s.astype(float).where(s.index != 'i007'), who, f), 'i007'),
            ((X, s.drop('i003'), who, f), '1 image has no label'),
            ((X.drop('i003'), s, who[1:], f[1:]), r'labels: 1 image has no features \(i003\)'),
            ((X, y[1:], who, f), '59 for 60'), ((X, y*2, who, f), 'label of 0 or 1'),
            ((X, y, who, np.where(f == 1, np.nan, f)), 'have no fold'), ((X, y, who, f*0), 'in one fold'), ((X, y, who[1:], f), 'patients'),
            ((X.assign(map_max=np.inf), y, who, f), 'map_max of i000 is inf'), ((X.to_numpy(), y, who, f), 'table of `features`')):
        with pytest.raises(GateError, match=why): Gate('logistic').fit(*args)
    for k, why in ((kept.drop(columns='area'), 'no column area'), (kept.assign(dice=np.nan), 'no Dice for'),
            (kept[1:], 'no Dice for i000')):
        with pytest.raises(GateError, match=why): Gate('logistic').fit(*data, kept=k)
    for kw, why in (({'kind': 'svm'}, 'boosting'), ({'calibration': 'beta'}, 'platt')):
        with pytest.raises(GateError, match=why): Gate(**kw)

def test_what_a_gate_is_asked_about(data, gate):
    X = data[0]
    with pytest.raises(GateError, match=r'features runs_max: this gate has never seen them'): gate.predict(X.assign(runs_max=.1))
    with pytest.raises(GateError, match=r"features map_max are missing.*what='map'"): gate.predict(X.drop(columns='map_max'))
    with pytest.raises(GateError, match='more than once'): gate.predict(X.iloc[[1, 1]])
    with pytest.raises(GateError, match='not fitted'): Gate().predict(X)
    assert (gate.predict(X[X.columns[::-1]]) == gate.predict(X)).all()   # columns go by name

def test_another_size_and_another_depth_of_the_maps(gate):
    table, maps, _, _ = made()
    p = gate.predict(features((table, maps), progress=False, what='map'))
    for other in (np.repeat(np.repeat(maps, 4, 1), 4, 2), maps.astype(np.uint16)*257, (maps/255).astype(np.float32)):
        assert np.abs(gate.predict(features((table, other), progress=False, what='map'))-p).max() < .01

def test_metadata_may_be_missing(data):
    X, y, who, f = data
    M = X.assign(meta_age=np.where(y, 60, np.nan), meta_male=np.nan, meta_ap=np.r_[np.nan, y[1:]])
    for kind in ('boosting', 'logistic'):
        g = Gate(kind).fit(M, y, who, f)
        with pytest.warns(PtxNotice, match='3 metadata columns are missing'): assert np.isfinite(g.predict(X)).all()
        assert np.isfinite(g.predict(M.assign(meta_male=1.))).all()

def test_expected_dice_is_a_mean_of_few_and_a_regression_of_many(data, kept, gate):
    assert gate.dice_model == pytest.approx(.6) and (gate.expected_dice(data[0]) == gate.dice_model).all()
    table, maps, y, who = made(240)
    X = features((table, maps), 'map', progress=False)
    k = pd.DataFrame({'dice': np.where(y, X.map_max, 0.), 'area': 900}, X.index)
    g = Gate('logistic').fit(X, y, who, kept=k)
    assert np.corrcoef(g.dice_oof[y == 1], k.dice[y == 1])[0, 1] > .9
    none = Gate('logistic').fit(*data, kept=kept.assign(area=0, dice=1.-data[1]))
    assert not keep_by_expected_dice(none.oof, none.expected_dice(data[0])).any()

def test_saved_and_loaded(data, gate, tmp_path):
    X = data[0]
    gate.save(tmp_path/'g')
    assert sorted(f.name for f in (tmp_path/'g').iterdir()) == ['features.npy', 'gate.json', 'images.csv']
    back = load_gate(tmp_path/'g')
    assert (np.allclose(back.predict(X), gate.predict(X), atol=1e-9) and (back.oof == gate.oof).all() and back.threshold == gate.threshold
        and (back.dice_oof == gate.dice_oof).all())
    with pytest.raises(GateError, match='not fitted'): Gate().save(tmp_path/'h')
    with pytest.raises(GateError, match='already'): gate.save(tmp_path/'g')
    with pytest.raises(GateError, match='not kept'): back.importance()

def test_a_damaged_gate_is_refused_and_a_different_one_noticed(gate, tmp_path):
    gate.save(tmp_path/'g')
    with pytest.raises(GateError, match='no gate'): load_gate(tmp_path)
    r = json.loads((tmp_path/'g'/'gate.json').read_text())
    for change, why in ((lambda d: (d/'gate.json').write_text('{'), 'no gate'),
            (lambda d: (d/'gate.json').write_text(json.dumps({**r, 'format': 9})), 'format 9'),
            (lambda d: (d/'images.csv').write_text('ImageId\n'), 'were changed'), (lambda d: (d/'features.npy').unlink(), 'missing')):
        d = shutil.copytree(tmp_path/'g', tmp_path/'copy')
        change(d)
        with pytest.raises(GateError, match=why): load_gate(d)
        shutil.rmtree(d)
    # as if another version fitted otherwise
    (tmp_path/'g'/'gate.json').write_text(json.dumps({**r, 'args': {**r['args'], 'kind': 'both'}}))
    with pytest.warns(PtxNotice, match='1 gate has other predictions than when they were saved.*scikit-learn'): load_gate(tmp_path/'g')

def test_importance_is_of_held_back_folds_and_repeats(data, gate):
    a, b = gate.importance('feature', n=2), gate.importance('feature', n=2)
    assert a.equals(b) and set(a.what) == set(gate.columns) and a.loss.is_monotonic_decreasing
    with pytest.raises(GateError, match='by='): gate.importance('row')

def test_rules_refuse_what_makes_no_sense():
    with pytest.raises(GateError, match='one of each'): best_gate_threshold([.1], [1, 0], [0])
    with pytest.raises(GateError, match='NaN'): best_gate_threshold([.1, np.nan], [1, 0], [0, 1])
    with pytest.raises(GateError, match='in one'): keep_out_of_fold([.1, .2], [1, 0], [0, 1], [0, 0])
    with pytest.raises(GateError, match='d from'): keep_by_expected_dice([.5], [1.5])
    with pytest.raises(GateError, match='probability'): weigh_map(np.zeros((2, 2)), np.nan)
    with pytest.raises(GateError, match='one size'): soft_dice(np.zeros((2, 2)), np.zeros((4, 4)))
    with pytest.raises(GateError, match='isotonic'): fit_calibration([.1, .2], [0, 1], 'beta')
    t, s = best_gate_threshold([1., 1.], [0, 0], [0, 0])   # nothing is kept, however sure the gate is
    assert t > 1 and s == 1

def test_all_empty_and_all_full_maps():
    y, table = np.arange(12) % 2, pd.DataFrame({'ImageId': list('abcdefghijkl'), 'row': range(12)})
    for v in (0, 255):
        X = features((table, np.full((12, 16, 16), v, np.uint8)), 'map', progress=False)
        with pytest.warns(PtxNotice, match='no better than chance'): g = Gate('logistic', n=3).fit(X, y, np.arange(12))
        assert np.allclose(g.predict(X), .5, atol=.05)

@pytest.fixture
def folder(phantoms, tmp_path):
    "Out-of-fold predictions of the twelve phantoms, without a network"
    t, rng = siim_train(phantoms), np.random.default_rng(0)
    maps = np.stack([np.rint(255*np.clip(rng.random((32, 32))*(.6 if p else .3), 0, 1)) for p in t.has_ptx]).astype(np.uint8)
    np.save(tmp_path/'maps.npy', maps)
    t.assign(row=range(12), max_prob=0)[['ImageId', 'path', 'row', 'max_prob']].to_csv(tmp_path/'index.csv', index=False)
    (tmp_path/'failed.csv').write_text('ImageId,path,error\n')
    (tmp_path/'predict.json').write_text(json.dumps({'format': FORMAT}))
    return tmp_path, t

def test_a_folder(folder, tmp_path):
    out, t = folder
    with pytest.raises(GateError, match='spread_runs.npy'): features(out, 'map,runs', progress=False)
    with pytest.raises(PtxError, match='labels.csv'): fit_gate(out, progress=False)
    np.save(out/'spread.npy', np.load(out/'maps.npy')//4)
    tiny = Embedder('mobilenetv3_small_050', None, 64)
    X = features(out, 'map,views,image,meta,emb', embed=tiny, bs=5, progress=False)
    assert X.notna().all(axis=None) and (X.meta_age.to_numpy() == t.age.astype(float).to_numpy().astype(np.float32)).all()
    assert np.allclose(X[tiny.columns], embed_images(t.path.tolist(), tiny), atol=1e-4)
    rle = [r[0] if r else '-1' for r in t.rles]
    labels = pd.DataFrame({'ImageId': t.ImageId, 'EncodedPixels': rle, 'patient_id': t.ImageId,
        'fold': t.groupby('has_ptx').cumcount() % 3})
    labels.iloc[1:].to_csv(out/'labels.csv', index=False)
    with pytest.raises(PtxError, match='no row for'): fit_gate(out, progress=False)
    pd.concat([labels, labels[:1].assign(ImageId='lost')]).to_csv(out/'labels.csv', index=False)
    g = fit_gate(out, 'map', kind='logistic', progress=False)
    assert (g.y == t.has_ptx).all() and g.threshold is not None
    assert g.kept.dice.equals(dice_if_kept(out, t.set_index('ImageId').rles).dice)

def test_a_radiograph_that_is_gone_is_noticed_and_its_map_counts(folder):
    out, t = folder
    i = pd.read_csv(out/'index.csv')
    i.loc[3, 'path'] = 'gone.dcm'
    i.to_csv(out/'index.csv', index=False)
    with pytest.warns(PtxNotice, match='1 radiograph cannot be read.*gone.dcm'): X = features(out, 'map,image', progress=False)
    assert X.iloc[3].filter(like='image_').isna().all() and X.filter(like='map_').notna().all(axis=None)
    g = Gate('logistic', n=3).fit(X, t.has_ptx.to_numpy(), t.ImageId.to_numpy())
    assert np.isfinite(g.predict(X)).all()
    with pytest.raises(PtxError): embed_images(['gone.dcm'], Embedder('mobilenetv3_small_050', None, 64))
