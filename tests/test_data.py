"Loaders as they are used: predicting pixels, mixing, all for training, one patient for all, pictures, what they print"
import pickle
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pydicom
import pytest
import torch
from conftest import TINY, ok
from fastai.vision.all import CutMix, Interpretation, MixUp
from pictures import wrong
from PIL import Image

from pneumothorax.cache import prepare
from pneumothorax.data import LoadXray, split_by_patient, xray_dls
from pneumothorax.dicom import XrayError, read_xray
from pneumothorax.learner import xray_learner
from pneumothorax.losses import xray_loss
from pneumothorax.phantom import make_phantoms
from pneumothorax.rle import PtxError
from pneumothorax.siim import PtxNotice, siim_train


@pytest.fixture(scope='module')
def learn(phantoms, one_thread):
    "A network that has learnt nothing"
    return xray_learner(xray_dls(phantoms, 64, 4, valid=.5, stats=(.5, .25), workers=0), encoder='mobilenetv3_small_050', weights='none')

@pytest.fixture
def quiet(learn):
    "Without bars and lines"
    with learn.no_bar(), learn.no_logging(): yield learn
    plt.close('all')

# --- pixels in place of files

def given(f):
    "One radiograph in every form"
    a = read_xray(f)
    return [f, str(f), a, a[None], torch.from_numpy(a), np.rint(a*65535).astype(np.uint16)]

def test_predict_takes_what_fastai_takes(quiet):
    f = quiet.dls.train.items.path.iloc[0]
    want = quiet.predict(f)
    for o in given(f)[1:]: assert (quiet.predict(o)[2]-want[2]).abs().max() < 1e-3 and (quiet.predict(o)[0] == want[0]).float().mean() > .99
    for o in given(f): assert (quiet.get_preds(dl=quiet.dls.test_dl([o, o]))[0][1]-want[2]).abs().max() < 1e-3
    small = (read_xray(f)*255).round().astype(np.uint8)
    assert torch.equal(quiet.predict(small)[2], quiet.predict(small.astype(np.float32)/np.float32(255))[2])

@pytest.mark.parametrize('bad, why', [(lambda a: a*300, r'numbers in \[0,1\]'), (lambda a: a-.5, r'numbers in \[0,1\]'),
    (lambda a: a.astype(int), 'int64'), (lambda a: np.stack([a]*3, -1), 'H×W'), (lambda a: a*np.nan, 'NaN')])
def test_pixels_that_cannot_be_a_radiograph(quiet, bad, why):
    with pytest.raises(XrayError, match=why): quiet.predict(bad(read_xray(quiet.dls.train.items.path.iloc[0])))

def test_a_learner_of_a_cache_predicts_files(phantoms, tmp_path):
    c = prepare(phantoms, tmp_path/'c', 64, fit='pad', workers=0, progress=False)
    learn = xray_learner(xray_dls(c, bs=4, valid=.5, stats=(.5, .25), workers=0), encoder='mobilenetv3_small_050', weights='none')
    t = c.table
    with learn.no_bar(), learn.no_logging():
        rows = learn.get_preds(dl=learn.dls.test_dl(t.head(2)))[0]
        for i in (0, 1): assert (learn.predict(t.path[i])[2]-rows[i]).abs().max() < 1e-6

# --- MixUp and CutMix

def test_mixup_mixes_losses(quiet):
    class See(MixUp):
        def after_loss(self):
            if not self.training: return
            lf, pred, lam = self.old_lf, self.pred, self.lam
            lf.reduction = 'none'
            a, b = lf(pred, *self.yb1), lf(pred, *self.yb)
            lf.reduction = 'mean'
            seen.append((self.learn.loss.item(), (a+lam*(b-a)).mean().item(), self.y.unique().tolist()))
    seen, before = [], quiet.loss_func
    quiet.fit(1, cbs=See())
    assert (seen and all(abs(a-b) < 1e-5 and set(y) <= {0, 1} for a, b, y in seen) and quiet.loss_func is before
        and before.reduction == 'mean')
    assert xray_loss('bce').y_int

def test_cutmix_says_why_not(quiet):
    with pytest.raises(PtxError, match='CutMix pastes pieces of radiographs and leaves their masks'): quiet.fit(1, cbs=CutMix())

# --- who is held back

def test_one_patient_for_all_says_so(phantoms):
    df = siim_train(phantoms).assign(patient_id='ANONYMOUS')
    with pytest.warns(PtxNotice, match='ANONYMOUS'): v = split_by_patient(df)
    with pytest.warns(PtxNotice, match='unknown patient'): assert (v == split_by_patient(df.drop(columns='patient_id'))).all()
    with pytest.raises(PtxError, match='^3 patients cannot be split 5 ways'): split_by_patient(df.assign(patient_id=list('abc')*4))
    with pytest.raises(PtxError, match='^1 patient cannot be split 2 ways; give more radiographs$'): split_by_patient(df[:1], .5)

def test_the_same_from_files(phantoms, tmp_path):
    import shutil
    d = shutil.copytree(phantoms, tmp_path/'d')
    (d/'metadata.csv').unlink()
    for f in d.rglob('*.dcm'):
        ds = pydicom.dcmread(f)
        ds.PatientID = 'ANONYMOUS'
        ds.save_as(f)
    p = ok('ptx_train', d, '--out', tmp_path/'r', *TINY)
    assert 'ANONYMOUS' in p.stderr and 'Traceback' not in p.stderr
    t = siim_train(d)
    t[['ImageId']].assign(patient_id=range(len(t))).to_csv(d/'metadata.csv', index=False)     # the remedy
    assert 'ANONYMOUS' not in ok('ptx_train', d, '--out', tmp_path/'r2', *TINY).stderr

def test_valid_0_trains_on_all(phantoms, tmp_path):
    with pytest.warns(PtxNotice, match='all images, nothing held back') as said: dls = xray_dls(phantoms, 64, 4, valid=0, workers=0)
    assert (len([w for w in said if w.category is PtxNotice]) == 1 and len(dls.train_ds) == 12 and dls.xray['valid'] == []
        and 'nothing held back' in repr(dls))
    p = ok('ptx_train', phantoms, '--out', tmp_path/'r', '--valid', 0, *TINY)
    assert (p.stderr.count('nothing held back') == 1 and '12 images trained on, 0 held back' in p.stdout
        and (tmp_path/'r'/'run.json').exists())
    ok('ptx_predict', tmp_path/'r', phantoms, '--out', tmp_path/'p', '--workers', 0)

# --- pictures, and what is printed

def test_loaders_say_what_they_are(phantoms):
    s = repr(xray_dls(phantoms, 64, 4, valid=.5, workers=0, equalize='clahe')).splitlines()
    assert (len(s) == 2 and s[0].startswith('training ') and ' patients, ' in s[0] and 'validation ' in s[0]
        and s[1].startswith('64 px (stretch), batches of 4, CLAHE after the resize, mean 0.'))
    assert 'XrayDataLoaders' in repr(pickle.loads(pickle.dumps(xray_dls(phantoms, 64, 4, workers=0, stats=(.5, .25)))).new_empty())

@pytest.fixture(scope='module')
def large(tmp_path_factory): return make_phantoms(tmp_path_factory.mktemp('large')/'s', 12, 256, n_test=0, positive=.5, progress=False)

@pytest.mark.parametrize('size, n', [(256, 1), (256, 4), (256, 12), (64, 4)])
def test_pictures_are_as_large_as_the_radiographs(large, size, n):
    dls = xray_dls(large, size, 12, valid=None, stats=(.5, .25), workers=0, tfms=[])
    dls.show_batch(max_n=n)
    fig = plt.gcf()
    fig.canvas.draw()
    axs = [a for a in fig.axes if a.images]
    assert not wrong(fig) and len(axs) == n and all(min(a.get_window_extent().width, a.get_window_extent().height) >= size for a in axs)
    ids = dls.train.items.ImageId.iloc[dls.train.batch_items(0)][:n]
    assert all(i.endswith(a.get_title().lstrip('…')) and a.get_title() for i, a in zip(ids, axs))
    plt.close('all')

def test_results_carry_names_and_dice(quiet):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet.show_results(max_n=4, shuffle=False)
    axs = [a for a in plt.gcf().axes if a.images]
    assert not wrong(plt.gcf()) and len(axs) == 4
    pred, true = quiet.get_preds()
    names = quiet.dls.valid.items.ImageId.tolist()
    for a, p, t, i in zip(axs, pred, true, names):
        p, t = p[0] >= .5, t > 0
        want = 2*(p&t).sum()/(p.sum()+t.sum()) if t.any() and p.any() else float(t.any() == p.any())
        assert a.get_title().split()[-1] == f'{want:.2f}' and i.endswith(a.get_title().split()[0].lstrip('…'))

def test_top_losses(quiet):
    Interpretation.from_learner(quiet).plot_top_losses(3)
    axs = [a for a in plt.gcf().axes if a.images]
    losses = [float(a.get_title().split()[1]) for a in axs]
    assert (not wrong(plt.gcf()) and len(axs) == 3 and losses == sorted(losses, reverse=True)
        and all('Dice' in a.get_title() and a.lines for a in axs))

def test_a_shared_loader_can_be_sent(phantoms):
    pytest.importorskip('accelerate')
    from pneumothorax.distributed import shared_dl
    dl = shared_dl(xray_dls(phantoms, 64, 4, stats=(.5, .25), workers=0, valid=.5).train, 0, 2)
    back = pickle.loads(pickle.dumps(dl))
    assert type(back) is type(dl) and len(back) == len(dl) and back.rank == 0 and back.fake_l.d is back

@pytest.mark.parametrize('mode', ['L', 'RGB', 'P', '1', 'F', 'I;16', 'I'])
def test_pictures_in_memory_are_taken(tmp_path, mode):
    "As fastai's own image learners take them; 16 bits stay 16 bits, and EXIF turns them upright"
    a = np.random.default_rng(0).integers(0, 256, (40, 48)).astype(np.uint8)
    if mode == '1': a = (a > 127).astype(np.uint8)*255
    deep = a.astype(np.uint16)*257
    im = {'F': lambda: Image.fromarray(a.astype(np.float32)/255), 'I;16': lambda: Image.fromarray(deep),
        'I': lambda: Image.fromarray(deep.astype(np.int32))}.get(mode, lambda: Image.fromarray(a).convert(mode))()
    want = LoadXray(32)(a)
    assert torch.equal(LoadXray(32)(im), want)
    if mode in ('L', 'RGB'):
        exif = Image.Exif()
        exif[274] = 6
        im.save(tmp_path/'a.png', exif=exif)
        assert torch.equal(LoadXray(32)(Image.open(tmp_path/'a.png')), LoadXray(32)(np.rot90(a, -1).copy()))
