"The audit against slow oracles and on the real labels; bad tables; the command"
import warnings

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import ok, ptx

from pneumothorax.rle import LabelError, rle_decode, rle_encode
from pneumothorax.siim import PtxNotice, audit_figure, audit_labels, body_mask, find_siim, read_labels


def blobs(rng):
    "A few random rectangles"
    m = np.zeros((1024, 1024), np.uint8)
    for y, x, h, w in rng.integers(1, 300, (3, 4)): m[y:y+h, x:x+w] = 1
    return m

def test_overlaps_and_pieces_agree_with_pixels(tmp_path):
    rng = np.random.default_rng(0)
    cases = {f'i{k}': [rle_encode(blobs(rng)) for _ in range(3)] for k in range(12)}
    (tmp_path/'y.csv').write_text('ImageId,EncodedPixels\n'+''.join(f'{i},{r}\n' for i, rs in cases.items() for r in rs))
    t = audit_labels(tmp_path/'y.csv', overlap=0, pieces=-99, min_area=10**7).set_index(['what', 'ImageId']).value
    for i, rs in cases.items():
        ms = [rle_decode(r) for r in rs]
        shares = [(a&b).sum()/min(a.sum(), b.sum()) for k, a in enumerate(ms) for b in ms[:k]]
        assert abs(t['overlapping masks', i]-max(shares)) < 1e-9
        assert t['tiny mask', i] == min(m.sum() for m in ms)
        assert t['many pieces', i] == cv2.connectedComponents(np.maximum.reduce(ms))[0]-1

def test_the_real_labels(shared):
    t = audit_labels(shared/'siim-labels'/'stage_2_train.csv.gz')
    assert t.what.value_counts(sort=False).to_dict() == {'tiny mask': 16, 'overlapping masks': 164, 'many pieces': 42}
    assert t.value[0] == 55 and t.value.groupby(t.what).first().to_dict()['many pieces'] == 20

def test_no_real_mask_leaves_the_body(shared):
    files = find_siim(shared/'siim-small')
    t = audit_labels(files.labels, files, outside=.01)
    assert not (t.what == 'outside the body').any()
    moved = read_labels(files.labels)
    air = np.zeros((1024, 1024), np.uint8)
    air[:60, :60] = 1
    moved['rles'] = [[rle_encode(air)] if r else [] for r in moved.rles]
    t = audit_labels(moved, files)
    assert (t.what == 'outside the body').sum() > 30   # a few radiographs show the patient up to that corner

def test_body_of_an_empty_picture(): assert body_mask(np.zeros((64, 64), np.float32)).sum() == 0

def test_findings_that_are_no_table(tmp_path, phantoms):
    y = phantoms/'train-rle.csv'
    (tmp_path/'f.csv').write_text('name,finding\na,Pneumothorax\n')
    with pytest.raises(LabelError, match='columns name, finding'): audit_labels(y, findings=tmp_path/'f.csv')
    with pytest.raises(LabelError, match='none.csv: no such file'): audit_labels(y, findings=tmp_path/'none.csv')
    with pytest.warns(PtxNotice, match='not in the table of findings'):
        audit_labels(y, findings=pd.DataFrame({'ImageId': ['x'], 'finding': ['Pneumothorax']}))

def audited(findings, column=None):
    "The findings about images a, with a mask, and b and c without; and the notices"
    y = pd.DataFrame({'ImageId': ['a', 'b', 'c'], 'rles': [['1000 50000'], [], []], 'n_masks': [1, 0, 0], 'area': [50000, 0, 0],
        'has_ptx': [True, False, False]})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        t = audit_labels(y, findings=pd.DataFrame({'ImageId': ['a ', ' b', 'c'], **findings}), column=column)
    return dict(zip(t.ImageId, t.what)), ' / '.join(str(w.message) for w in said)

WITHOUT, AGAINST = 'finding without mask', 'mask without finding'

@pytest.mark.parametrize('cells, want', [
    (['Pneumothorax', 'No pneumothorax', 'Effusion'], {}),
    (['No pneumothorax', 'Effusion;Pneumothorax', 'effusion, pneumothorax '], {'a': AGAINST, 'b': WITHOUT, 'c': WITHOUT}),
    (['No Finding', 'Mass', 'Infiltration|Pneumothorax'], {'a': AGAINST, 'c': WITHOUT}),
])
def test_whole_labels_are_compared(cells, want):
    assert audited({'finding': cells}) == (want, '')

def test_sentences_and_blanks_are_not_compared():
    found, said = audited({'report': ['Pneumothorax excluded', 'No evidence of pneumothorax', 'Pneumothorax']})
    assert (found == {'c': WITHOUT} and '2 findings are neither labels nor yes or no, not compared (column report)' in said
        and 'b (No evidence' in said)
    found, said = audited({'report': [None, ' ', 'Pneumothorax']})
    assert found == {'c': WITHOUT} and '2 findings are blank, not compared' in said
    for cells in (['no sign of pneumothorax.']*3, ['Lungs are clear. Heart is normal.']*3, [None]*3):
        with pytest.raises(LabelError, match='neither labels'): audited({'pneumothorax': cells})

@pytest.mark.parametrize('name, column', [('pneumothorax', None), (' PneumoThorax', None), ('x', 'x'), ('X', ' x')])
@pytest.mark.parametrize('yes, no', [(1, 0), ('yes', 'No'), (True, False), ('1.0', '0.0')])
def test_a_column_of_yes_and_no(name, column, yes, no):
    assert audited({'other': ['Mass']*3, name: [no, yes, no]}, column) == ({'a': AGAINST, 'b': WITHOUT}, '')
    found, said = audited({name: [no, yes, 'perhaps']}, column)
    assert found == {'a': AGAINST, 'b': WITHOUT} and 'c (perhaps)' in said

def test_a_mask_without_pixels_is_found(tmp_path):
    (tmp_path/'y.csv').write_text('ImageId,EncodedPixels\na,3 0\nb,3 0 5 0\nb,9 1000\n')
    y = read_labels(tmp_path/'y.csv')
    assert y.n_masks.tolist() == [0, 1] and y.has_ptx.tolist() == [False, True] and y.area.tolist() == [0, 1000]
    t = audit_labels(y)
    assert t[['ImageId', 'what', 'value']].values.tolist() == [['a', 'tiny mask', 0], ['b', 'tiny mask', 0]]

def test_broken_radiographs_are_noticed(tmp_path, phantoms):
    (tmp_path/'b.dcm').write_bytes(b'none')
    y = read_labels(phantoms/'train-rle.csv')
    images = dict.fromkeys(y.ImageId, tmp_path/'b.dcm')
    with pytest.warns(PtxNotice, match='cannot be read'): t = audit_labels(y, images)
    assert not len(t) and audit_figure(t, y, images) is None
    t = pd.DataFrame({'ImageId': y.ImageId[:1], 'what': 'tiny mask', 'value': 5., 'detail': '5 px'})
    # the end of the reason stands in place of the picture
    assert 'export the radiograph again' in ' '.join(audit_figure(t, y, images).axes[0].get_title().split())

def test_the_command(tmp_path, phantoms):
    y = read_labels(phantoms/'train-rle.csv')
    pd.DataFrame({'ImageId': y.ImageId, 'finding': np.where(y.has_ptx, 'No Finding', 'Pneumothorax')}).to_csv(tmp_path/'f.csv', index=False)
    p = ok('ptx_audit', phantoms, '--out', tmp_path/'audit', '--findings', tmp_path/'f.csv')
    assert f'{len(y)} findings' in p.stdout and 'mask without finding' in p.stdout
    assert len(pd.read_csv(tmp_path/'audit'/'audit.csv')) == len(y) and (tmp_path/'audit'/'audit.png').read_bytes()[:4] == b'\x89PNG'
    said = ok('ptx_audit', phantoms/'train-rle.csv', '--out', tmp_path/'bare').stdout
    assert 'radiographs not looked at' in said and 'give their folder' in said and 'not looked at' not in p.stdout
    p = ptx('ptx_audit', phantoms, '--out', tmp_path/'audit')
    assert p.returncode == 1 and 'holds an audit already' in p.stderr

def test_the_command_names_a_column_and_leaves_nothing_half_done(tmp_path, phantoms):
    y = read_labels(phantoms/'train-rle.csv')
    pd.DataFrame({'ImageId': y.ImageId, 'told': 1-y.has_ptx}).to_csv(tmp_path/'f.csv', index=False)
    for args, why in ((['--n', 0], '--n 0'), (['--n', -1], '--n -1'), (['--findings', tmp_path/'f.csv'], '--column'),
            (['--column', 'told'], '--findings')):
        p = ptx('ptx_audit', phantoms, '--out', tmp_path/'audit', *args)
        assert p.returncode == 1 and 'Traceback' not in p.stderr and why in p.stderr and not (tmp_path/'audit').exists()
    p = ok('ptx_audit', phantoms, '--out', tmp_path/'audit', '--findings', tmp_path/'f.csv', '--column', 'told')
    assert f'{len(y)} findings' in p.stdout
