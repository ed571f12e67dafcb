"Runs beside each other: the same numbers as by hand, who is judged on what, and what cannot be compared"
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, ok, ptx

from pneumothorax.bootstrap import bootstrap_ci, paired_bootstrap
from pneumothorax.cases import open_cases
from pneumothorax.compare import compare
from pneumothorax.predict import predict_maps
from pneumothorax.rle import PtxError
from pneumothorax.scoring import score_images
from pneumothorax.siim import siim_train
from pneumothorax.submission import write_submission


@pytest.fixture(scope='module')
def runs(phantoms, tmp_path_factory):
    d = tmp_path_factory.mktemp('runs')
    for name, seed in (('a', 3), ('b', 4)): ok('ptx_train', phantoms, '--out', d/name, '--valid', '.5', '--seed', seed, *TINY)
    ok('ptx_folds', phantoms, '--n', '2', '--out', d/'folds.csv')
    ok('ptx_train', phantoms, '--folds', d/'folds.csv', '--out', d/'cv', *TINY)
    return d

RULE = {'thresh': .001, 'min_area': 1}

def test_the_numbers_are_those_of_a_submission(runs, phantoms, tmp_path):
    "Of one run, predicted, submitted and scored by hand"
    held = json.loads((runs/'a'/'run.json').read_text())['data']['valid']
    t = siim_train(phantoms)
    t = t[t.ImageId.isin(held)]
    predict_maps(runs/'a', dict(zip(t.ImageId, t.path)), tmp_path/'p', workers=0, progress=False)
    write_submission(tmp_path/'p', tmp_path/'s.csv', progress=False, blank=True, **RULE)
    s = score_images(tmp_path/'s.csv', phantoms/'train-rle.csv').set_index('ImageId')
    c = compare([runs/'a', runs/'cv'], device='cpu', **RULE)
    mine = c.sides[0].table.set_index('ImageId').dice
    assert set(mine.index) == set(held) and np.allclose(mine, s.dice.reindex(mine.index))
    who = c.sides[0].table.patient_id.to_numpy()
    assert c.scores.dice['a'] == bootstrap_ci(mine.to_numpy(), who)
    assert c.differences.dice['cv'] == paired_bootstrap(c.sides[1].table.dice.to_numpy(), mine.to_numpy(), who)

def test_only_what_was_held_back(runs):
    a, b = (set(json.loads((runs/k/'run.json').read_text())['data']['valid']) for k in 'ab')
    if not a & b: pytest.skip('nothing in common')
    with pytest.warns(UserWarning, match='not in all of them'): c = compare([runs/'a', runs/'b'], device='cpu', **RULE)
    assert set(c.sides[0].table.ImageId) == a & b and list(c.recipes.index) == ['seed']

def test_the_command(runs, tmp_path):
    p = ok('ptx_compare', runs/'a', runs/'cv', '--out', tmp_path/'q.png', '--thresh', '.001')
    t = pd.read_csv(tmp_path/'q.csv')
    assert len(t) == 9 and (tmp_path/'q.png').exists() and 'minus a' in p.stdout and 'what differs' in p.stdout
    assert set(t.name) == {'a', 'cv'} and t.minus.dropna().unique().tolist() == ['a']

def test_what_cannot_be_compared(runs, phantoms, tmp_path):
    for args, why in (([runs/'a'], 'two runs or more'), ([runs/'a', str(runs/'a')+'/'], 'given twice'),
            ([runs/'a', phantoms], 'no run, no cross-validation and no predictions')):
        p = ptx('ptx_compare', *args, '--out', tmp_path/'q.png')
        assert p.returncode == 1 and why in p.stderr and 'Traceback' not in p.stderr
    ok('ptx_predict', runs/'a', phantoms/'dicom-images-test', '--out', tmp_path/'p', '--workers', '0')
    with pytest.raises(PtxError, match='no labels of their own'): compare([runs/'a', tmp_path/'p'], device='cpu')
    with pytest.raises(PtxError, match='no image in common'):
        compare([runs/'a', tmp_path/'p'], phantoms/'answers'/'test-rle.csv', device='cpu')
    shutil.copytree(runs/'a', tmp_path/'moved')
    r = json.loads((tmp_path/'moved'/'run.json').read_text())
    r['args']['data'] = str(tmp_path/'gone')
    (tmp_path/'moved'/'run.json').write_text(json.dumps(r))
    with pytest.raises(PtxError, match='is not there; start where it was trained, or predict its images where they are now'):
        compare([runs/'cv', tmp_path/'moved'], device='cpu')
    assert not (tmp_path/'q.png').exists()

def test_positives_without_an_outline_are_not_judged(runs, phantoms, tmp_path):
    "They have no true mask, which is not the same as an empty one"
    t = siim_train(phantoms)
    ok('ptx_predict', runs/'a', phantoms/'dicom-images-train', '--out', tmp_path/'p', '--workers', '0')
    held = json.loads((runs/'a'/'run.json').read_text())['data']['valid']
    t = t[t.ImageId.isin(held)]
    pos = t[t.has_ptx].ImageId.tolist()
    rows = [f'{i},,{"yes" if y else "no"}' if i != pos[0] else f'{i},{r[0]},yes' for i, y, r in zip(t.ImageId, t.has_ptx, t.rles)]
    (tmp_path/'t.csv').write_text('\n'.join(['image,mask,label', *rows])+'\n')
    with pytest.warns(UserWarning, match='have no outline, so they are not judged'):
        c = open_cases(tmp_path/'p', tmp_path/'t.csv:empty=skip', **RULE)
    assert set(c.table.ImageId) == set(t.ImageId)-set(pos[1:]) and c.table.has_ptx.sum() == 1

def test_sides_with_another_truth_are_refused(runs, phantoms, tmp_path):
    t = pd.read_csv(phantoms/'train-rle.csv', skipinitialspace=True, dtype=str).rename(columns=str.strip)
    t['EncodedPixels'] = t.EncodedPixels.to_numpy()[::-1]
    for f in phantoms.iterdir():
        if f.name != 'train-rle.csv': (tmp_path/f.name).symlink_to(f)
    t.to_csv(tmp_path/'train-rle.csv', index=False)
    run = shutil.copytree(runs/'a', tmp_path/'other')
    r = json.loads((run/'run.json').read_text())
    (run/'run.json').write_text(json.dumps({**r, 'args': {**r['args'], 'data': str(tmp_path)}}))
    with pytest.raises(PtxError, match=r'radiographs? ha(s|ve) another truth \(.*give both the same labels'):
        compare([runs/'a', run], device='cpu', **RULE)

def test_networks_whose_radiographs_are_gone_are_told(runs, phantoms, tmp_path):
    run = shutil.copytree(runs/'a', tmp_path/'moved')
    r = json.loads((run/'run.json').read_text())
    (run/'run.json').write_text(json.dumps({**r, 'args': {**r['args'], 'data': str(tmp_path/'gone')}}))
    t = siim_train(phantoms)
    predict_maps(run, dict(zip(t.ImageId, t.path)), tmp_path/'p', workers=0, progress=False)
    with pytest.warns(UserWarning, match='1 network has learnt from radiographs that lie elsewhere now.*gone'):
        open_cases(tmp_path/'p', phantoms)
    (run/'run.json').write_text(json.dumps({**r, 'args': {}}))
    with pytest.warns(UserWarning, match='its record names none'): open_cases(tmp_path/'p', phantoms)

def test_another_table_of_that_name_stays(runs, tmp_path):
    (tmp_path/'q.csv').write_text('ImageId,EncodedPixels\n')
    p = ptx('ptx_compare', runs/'a', runs/'cv', '--out', tmp_path/'q.png')
    assert p.returncode and 'another table of this name' in p.stderr and (tmp_path/'q.csv').read_text() == 'ImageId,EncodedPixels\n'
