"Finding radiographs and reading labels: identifiers, kinds of files, what is synthetic"
import json
import shutil

import pandas as pd
import pydicom
import pytest
from conftest import ok, ptx

from pneumothorax.dicom import xray_meta
from pneumothorax.folds import make_folds, read_folds, save_folds
from pneumothorax.rle import LabelError
from pneumothorax.siim import PtxNotice, read_labels, read_patients, siim_train


def dicoms(folder): return sorted(folder.rglob('*.dcm'))

# --- identifiers

NAMES = ['NA', 'nan', 'null', 'None', 'N/A'.replace('/', '_'), 'NULL', '007', '1e5', 'True', 'tail ', '\u2003wide', 'caf\xe9', 'x,y']

@pytest.fixture
def named(phantoms, tmp_path):
    "A folder of radiographs with awkward names, and labels for them"
    some = dicoms(phantoms)
    (tmp_path/'set').mkdir()
    for k, i in enumerate(NAMES): shutil.copy(some[k % len(some)], tmp_path/'set'/f'{i}.dcm')
    t = pd.DataFrame({'ImageId': NAMES, 'EncodedPixels': ['5000 900' if k % 2 else '-1' for k in range(len(NAMES))]})
    t.to_csv(tmp_path/'set'/'train-rle.csv', index=False)
    return tmp_path/'set'

def test_names_that_look_like_nothing(named, recwarn):
    t = siim_train(named)
    assert sorted(t.ImageId) == sorted(i.strip() for i in NAMES) and t.path.map(lambda f: f.stem.strip()).tolist() == t.ImageId.tolist()
    assert not [w for w in recwarn if issubclass(w.category, PtxNotice) and 'label' in str(w.message)]
    folds = make_folds(t, groups={i: f'p{i}' for i in t.ImageId}, n=2)
    save_folds(folds, named/'folds.csv')
    assert read_folds(named/'folds.csv', t.ImageId).equals(folds)

def test_identifiers_are_read_the_same_from_every_table(tmp_path):
    (tmp_path/'p.csv').write_text('ImageId,patient_id,fold\n NA ,1,0\ne\u0301.dcm,2,1\n', encoding='utf-8')
    with pytest.warns(PtxNotice, match='1 identifier'): assert read_patients(tmp_path/'p.csv').to_dict() == {'NA': '1', '\xe9': '2'}
    with pytest.warns(PtxNotice): assert read_folds(tmp_path/'p.csv', ['NA', '\xe9']).ImageId.tolist() == ['NA', '\xe9']

@pytest.mark.parametrize('ending', ['.dcm', '.PNG', '.dcm.png'])
def test_labels_with_the_ending_of_a_file(phantoms, tmp_path, ending):
    (tmp_path/'y.csv').write_text('\n'.join(r.replace(',', f'{ending},') if k else r for k, r in enumerate((phantoms/'train-rle.csv').read_text().splitlines())))
    with pytest.warns(PtxNotice, match='end like names of files'): t = siim_train(phantoms, tmp_path/'y.csv')
    assert t.ImageId.tolist() == siim_train(phantoms).ImageId.tolist()

def test_labels_of_other_radiographs_show_one_of_each(phantoms, tmp_path):
    (tmp_path/'y.csv').write_text('ImageId,EncodedPixels\nsomething,-1\n')
    with pytest.raises(LabelError, match="name 'something' for example, the radiographs '1.2.826"): siim_train(phantoms, tmp_path/'y.csv')

# --- what is synthetic

def test_phantoms_say_that_they_are_synthetic(phantoms, tmp_path):
    assert siim_train(phantoms).synthetic.all() and xray_meta(dicoms(phantoms)[0])['synthetic'] is True
    shutil.copytree(phantoms, tmp_path/'bare')
    (tmp_path/'bare'/'metadata.csv').unlink()
    assert siim_train(tmp_path/'bare').synthetic.all()   # by the header alone
    for f in dicoms(tmp_path/'bare'):
        ds = pydicom.dcmread(f)
        del ds.SyntheticData
        ds.save_as(f)
    assert not siim_train(tmp_path/'bare').synthetic.any()

def test_real_radiographs_are_not_synthetic(shared):
    with pytest.warns(PtxNotice): t = siim_train(shared/'siim-small')
    assert t.synthetic.dtype == bool and not t.synthetic.any()

def test_a_cache_carries_it(phantoms, tmp_path):
    from pneumothorax.cache import prepare
    assert prepare(phantoms, tmp_path/'c', 64, workers=0, progress=False).table.synthetic.tolist() == [True]*12

def test_more_positives_from_the_command(tmp_path):
    ok('ptx_sample', tmp_path/'s', '--n', 8, '--size', 64, '--positive', .75)
    assert read_labels(tmp_path/'s'/'train-rle.csv').has_ptx.sum() == 6 and json.loads((tmp_path/'s'/'phantom.json').read_text())['positive'] == .75
    p = ptx('ptx_sample', tmp_path/'t', '--positive', 7)
    assert p.returncode == 1 and 'positive=7.0: give a share from 0 to 1' in p.stderr and not (tmp_path/'t').exists()
