"The audit against slow oracles and on the real labels; bad tables; the command"
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
    with pytest.raises(LabelError, match='has ImageId'): audit_labels(y, findings=tmp_path/'f.csv')
    with pytest.raises(LabelError, match='not a readable CSV'): audit_labels(y, findings=tmp_path/'none.csv')
    with pytest.warns(PtxNotice, match='not in the table of findings'): audit_labels(y, findings=pd.DataFrame({'ImageId': ['x'], 'finding': ['Pneumothorax']}))

def test_broken_radiographs_are_noticed(tmp_path, phantoms):
    (tmp_path/'b.dcm').write_bytes(b'none')
    y = read_labels(phantoms/'train-rle.csv')
    images = dict.fromkeys(y.ImageId, tmp_path/'b.dcm')
    with pytest.warns(PtxNotice, match='cannot be read'): t = audit_labels(y, images)
    assert not len(t) and audit_figure(t, y, images) is None
    t = pd.DataFrame({'ImageId': y.ImageId[:1], 'what': 'tiny mask', 'value': 5., 'detail': '5 px'})
    assert 'export the radiograph again' in audit_figure(t, y, images).axes[0].get_title()   # the end of the reason stands in place of the picture

def test_the_command(tmp_path, phantoms):
    y = read_labels(phantoms/'train-rle.csv')
    pd.DataFrame({'ImageId': y.ImageId, 'finding': np.where(y.has_ptx, 'No Finding', 'Pneumothorax')}).to_csv(tmp_path/'f.csv', index=False)
    p = ok('ptx_audit', phantoms, '--out', tmp_path/'audit', '--findings', tmp_path/'f.csv')
    assert f'{len(y)} findings' in p.stdout and 'mask without finding' in p.stdout
    assert len(pd.read_csv(tmp_path/'audit'/'audit.csv')) == len(y) and (tmp_path/'audit'/'audit.png').read_bytes()[:4] == b'\x89PNG'
    p = ptx('ptx_audit', phantoms, '--out', tmp_path/'audit')
    assert p.returncode == 1 and 'holds an audit already' in p.stderr
