"Losses: the order of good and bad predictions, gradients, extremes, half precision, peers, and what is refused"
import math
import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import named
from scipy.ndimage import distance_transform_edt
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from pneumothorax import losses
from pneumothorax.losses import *
from pneumothorax.losses import LossError, _distance
from pneumothorax.rle import PtxError

LOSSES = {f.__name__.removesuffix('_loss'): f
    for f in (bce_loss, focal_loss, dice_loss, jaccard_loss, tversky_loss, lovasz_loss, boundary_loss)}
# terms that say nothing of some images, or of single pixels
WHOLE = {'pos_dice': partial(dice_loss, over='positives'), 'batch_dice': partial(dice_loss, over='batch'), 'top': top_loss}
# every term, and its options away from their defaults
CASES = [*((k, {}) for k in LOSSES), ('bce', {'pos_weight': 5}), ('focal', {'gamma': .5, 'alpha': .25}), ('dice', {'eps': 20.}),
    ('tversky', {'alpha': .8, 'beta': .1}), ('tversky', {'gamma': .75}), ('tversky', {'gamma': 2}), ('lovasz', {'symmetric': True})]
case = pytest.mark.parametrize(('name', 'kw'), CASES,
    ids=lambda o: ','.join(f'{k}={v}' for k, v in o.items()) if isinstance(o, dict) else o)
AREAS = [0, 1, 30, 500, 900, 1024]   # pixels of 32×32

def batch(areas=AREAS, side=32):
    "Masks of these areas, the first pixels of the image"
    t = torch.zeros(len(areas), side*side, dtype=torch.uint8)
    for m, a in zip(t, areas): m[:a] = 1
    return t.view(-1, side, side)

def says(t, sure=1.): return (t.float()*2-1)[:, None]*sure

def rand(n=4, h=9, w=7, seed=0, share=.3):
    "Random float64 logits and masks; the second mask is empty, the third full"
    g = torch.Generator().manual_seed(seed)
    t = (torch.rand(n, h, w, generator=g) < share).long()
    t[1], t[2] = 0, 1
    return torch.randn(n, 1, h, w, generator=g, dtype=torch.float64)*2, t

def slope(f, l):
    l = l.detach().clone().requires_grad_()
    return torch.autograd.grad(f(l), l)[0]

# --- values

@case
def test_the_better_the_prediction_the_smaller_the_loss_on_every_image(name, kw):
    t = batch([0, 40, 200, 500, 900])
    said = [says(t), says(t.roll(1, 1)), says(t)*0, -says(t)]
    v = torch.stack([LOSSES[name](l, t, **kw, reduction='none') for l in said])
    perfect, shifted, undecided, opposite = v
    assert (perfect < undecided).all() and (undecided < opposite).all()
    some = t.flatten(1).bool().any(1)
    assert (perfect[some] < shifted[some]).all() and (shifted[some] < opposite[some]).all()
    assert (v >= 0).all()
    assert shifted.mean() < undecided.mean()

@case
def test_a_mask_flipped_or_transposed_costs_the_same(name, kw):
    l, t = rand()
    v = LOSSES[name](l, t, **kw, reduction='none')
    for l2, t2 in ((l.flip(-1), t.flip(-1)), (l.flip(-2), t.flip(-2)), (l.mT, t.mT)):
        torch.testing.assert_close(LOSSES[name](l2, t2, **kw, reduction='none'), v, rtol=1e-6, atol=1e-9)

@case
def test_each_image_counts_by_itself(name, kw):
    l, t = rand()
    each = LOSSES[name](l, t, **kw, reduction='none')
    assert each.shape == (4,)
    for i in range(4): torch.testing.assert_close(LOSSES[name](l[i:i+1], t[i:i+1], **kw), each[i])
    torch.testing.assert_close(LOSSES[name](l, t, **kw), each.mean())
    torch.testing.assert_close(ComboLoss(**{name: 2}, options={name: kw})(l, t), 2*each.mean())

@pytest.mark.parametrize('fill', [0, 1])
def test_clean_empty_and_full_masks(fill):
    t = torch.full((2, 8, 8), fill, dtype=torch.uint8)
    for name, kw in CASES: assert LOSSES[name](says(t, 60), t, **kw).item() < 1e-6, name

def test_empty_masks_by_their_stated_rules():
    t = torch.zeros(1, 8, 8)
    for pixels in (1, 7, 64):
        l = says(batch([pixels], 8), 60)
        assert dice_loss(l, t).item() == pytest.approx(pixels/(pixels+1))
        assert jaccard_loss(l, t).item() == pytest.approx(pixels/(pixels+1))
        assert tversky_loss(l, t).item() == pytest.approx(.3*pixels/(.3*pixels+1))
        assert tversky_loss(l, t, gamma=.75).item() == pytest.approx((.3*pixels/(.3*pixels+1))**.75)
        assert boundary_loss(l, t).item() == pytest.approx(pixels/64)
        assert bce_loss(l, t).item() == pytest.approx(60*pixels/64)
        assert lovasz_loss(l, t).item() == 61
        assert lovasz_loss(l, t, True).item() == pytest.approx((61+61*pixels/64)/2)

# --- gradients

@case
@pytest.mark.parametrize('seed', [0, 1])
def test_gradients_agree_with_finite_differences(name, kw, seed):
    l, t = rand(4, 4, 3, seed)
    assert torch.autograd.gradcheck(lambda l: LOSSES[name](l, t, **kw, reduction='none'), l.requires_grad_())

@case
def test_no_gradient_points_the_wrong_way(name, kw):
    l, t = rand()
    d = slope(lambda l: LOSSES[name](l, t, **kw), l)
    assert (d*(1-2*t[:, None]) >= 0).all()

@case
def test_a_batch_of_healthy_images_teaches(name, kw):
    t = torch.zeros(3, 16, 16, dtype=torch.uint8)
    for level in (-6, -.5, 3):
        l = torch.full((3, 1, 16, 16), level, dtype=torch.float64)
        l[:, 0, 3, 4] += .3
        v, d = LOSSES[name](l, t, **kw), slope(lambda l: LOSSES[name](l, t, **kw), l)
        assert v.isfinite() and d.isfinite().all() and (d >= 0).all()
        if name == 'lovasz' and not kw:
            assert ((d > 0).flatten(1).sum(1) == (level+.3 > -1)).all() and (level+.3 < -1 or (d[:, 0, 3, 4] > 0).all())
        elif name != 'lovasz': assert (d > 0).all()

@case
@pytest.mark.parametrize('far', [50, 200])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_have_finite_losses_and_gradients(name, kw, far, dtype):
    t = batch()
    right = says(t, far)
    mixed = right.clone()
    mixed[:, :, ::3] *= -1
    for l in (right, -right, mixed):
        l = l.to(dtype).requires_grad_()
        v = LOSSES[name](l, t, **kw, reduction='none')
        assert v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert v.isfinite().all()
        v.sum().backward()
        assert l.grad.isfinite().all() and l.grad.dtype == dtype
    if name in ('bce', 'focal', 'lovasz'):
        assert slope(lambda l: LOSSES[name](l, t, **kw, reduction='none').sum(), -right).flatten(1).abs().amax(1).gt(1e-6).all()

@case
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_change_nothing_but_the_logits(name, kw, dtype):
    l, t = rand(4, 96, 80)
    l = l.to(dtype)
    want = LOSSES[name](l.double(), t, **kw)
    torch.testing.assert_close(LOSSES[name](l, t, **kw).double(), want, rtol=1e-4, atol=1e-6)
    with torch.autocast('cpu', dtype=torch.bfloat16): got = LOSSES[name](l, t, **kw)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)

def test_a_million_undecided_pixels():
    t = torch.zeros(1, 1024, 1024, dtype=torch.uint8)
    t[:, :100, :100] = 1
    for name, kw in CASES:
        v = [LOSSES[name](torch.zeros(1, 1, 1024, 1024, dtype=d), t, **kw).item() for d in (torch.float16, torch.float64)]
        assert v[0] == pytest.approx(v[1], rel=1e-4), name

@case
def test_nan_and_infinite_logits_are_not_hidden(name, kw):
    l, t = rand()
    l[0, 0, 2, 3] = math.nan
    v = LOSSES[name](l, t, **kw, reduction='none')
    assert v.isnan().tolist() == [True, False, False, False]
    assert LOSSES[name](l, t, **kw).isnan()

# --- peers

def test_focal_agrees_with_torchvision_monai_kornia_and_smp():
    l, t = rand()
    l, y = l.float(), t[:, None].float()
    for gamma, alpha in ((2, None), (2, .25), (1.5, .9), (0, None)):
        want = focal_loss(l, t, gamma, alpha)
        torch.testing.assert_close(sigmoid_focal_loss(l, y, -1 if alpha is None else alpha, gamma, 'mean'), want, rtol=1e-5, atol=1e-6)
        monai, kornia, smp = (pytest.importorskip(m) for m in ('monai.losses', 'kornia.losses', 'segmentation_models_pytorch.losses'))
        torch.testing.assert_close(monai.FocalLoss(gamma=gamma, alpha=alpha)(l, y), want, rtol=1e-5, atol=1e-6)
        if alpha:
            torch.testing.assert_close(kornia.binary_focal_loss_with_logits(l, y, alpha=alpha, gamma=gamma, reduction='mean'),
                want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(smp.FocalLoss('binary', alpha=alpha, gamma=gamma)(l, t), want, rtol=1e-4, atol=1e-6)

def test_overlap_agrees_with_monai_per_image():
    monai = pytest.importorskip('monai.losses')
    l, t = rand()
    y = t[:, None].double()
    def check(cls, want, **kw): torch.testing.assert_close(cls(sigmoid=True, reduction='none', **kw)(l, y).flatten(), want)
    check(monai.DiceLoss, dice_loss(l, t, reduction='none'), smooth_nr=1, smooth_dr=1)
    check(monai.DiceLoss, jaccard_loss(l, t, reduction='none'), jaccard=True, smooth_nr=2, smooth_dr=2)
    for a, b in ((.3, .7), (.9, .4)):
        check(monai.TverskyLoss, tversky_loss(l, t, a, b, reduction='none'), alpha=a, beta=b, smooth_nr=1, smooth_dr=1)

def test_overlap_agrees_with_smp_on_one_image_with_a_mask():
    smp = pytest.importorskip('segmentation_models_pytorch.losses')
    l, t = rand()
    l, t = l[:1].float(), t[:1]
    torch.testing.assert_close(smp.DiceLoss('binary')(l, t), dice_loss(l, t, 1e-9))
    torch.testing.assert_close(smp.JaccardLoss('binary')(l, t), jaccard_loss(l, t, 1e-9))
    torch.testing.assert_close(smp.TverskyLoss('binary', alpha=.2, beta=.6, gamma=.75)(l, t), tversky_loss(l, t, .2, .6, .75, 1e-9))

def test_lovasz_agrees_with_smp_and_kornia():
    smp, kornia = pytest.importorskip('segmentation_models_pytorch.losses'), pytest.importorskip('kornia.losses')
    for seed in range(3):
        l, t = rand(seed=seed)
        torch.testing.assert_close(smp.LovaszLoss('binary', per_image=True)(l.float(), t), lovasz_loss(l.float(), t))
        torch.testing.assert_close(kornia.lovasz_hinge_loss(l, t), lovasz_loss(l, t))
        torch.testing.assert_close(kornia.lovasz_hinge_loss(-l, 1-t), 2*lovasz_loss(l, t, True)-lovasz_loss(l, t))

def test_distances_agree_with_scipy_and_the_loss_with_monais():
    _, t = rand(5, 40, 33, share=.05)
    for i, m in enumerate(t.numpy()):
        d = _distance(t[i:i+1, None].float())[0, 0].numpy()
        if not m.any() or m.all(): assert (d == 1).all()
        else: np.testing.assert_allclose(d*math.hypot(40, 33), distance_transform_edt(m)+distance_transform_edt(1-m)-.5, atol=1e-4)
    monai = pytest.importorskip('monai.losses')
    l = rand(5, 40, 33)[0].float()
    # theirs is not shifted to zero, and half a pixel off the outline, which adds half the mean probability
    inside, ok = t[:, None].float(), [0, 3, 4]   # masks 1 and 2 have no outline
    want = math.hypot(40, 33)*(boundary_loss(l, t, 'none')-(inside*_distance(inside)).mean((1, 2, 3)))+l.sigmoid().mean((1, 2, 3))/2
    got = monai.BoundaryLoss(sigmoid=True, reduction='none')(l, inside).flatten()
    torch.testing.assert_close(got[ok], want[ok], rtol=1e-4, atol=1e-4)
    assert (got[[1, 2]] == 0).all() and (boundary_loss(l, t, 'none')[[1, 2]] > 0).all()

# --- sums

def test_the_masks_are_looked_at_once_and_bool_ones_never(monkeypatch):
    looks, every = [], torch.Tensor.all
    monkeypatch.setattr(torch.Tensor, 'all', lambda self, *a, **k: looks.append(1) or every(self, *a, **k))
    l, t = rand()
    loss = xray_loss('3:1:4')
    looks.clear()
    loss(l, t)
    assert len(looks) == 1
    loss(l, t.bool())
    assert len(looks) == 1
    AuxLoss(loss)((l, l.mean((2, 3)), [l[..., ::2, ::2], l[..., ::4, ::4]]), t)
    assert len(looks) == 2

def test_presets_and_names():
    assert xray_loss().weights == {'bce': 30, 'pos_dice': 1}
    assert {k: xray_loss(k).weights for k in PRESETS} == {'3:1:4': {'bce': 3, 'batch_dice': 1, 'focal': 4},
        '2:1:2': {'bce': 2, 'batch_dice': 1, 'focal': 2}, '1:1:1': {'bce': 1, 'batch_dice': 1, 'focal': 1}}
    for k in TERMS: assert xray_loss(k).weights == {k: 1}
    assert xray_loss(' 2*BCE + 0.5 * tversky ', thresh=.3).weights == {'bce': 2, 'tversky': .5}
    assert {*LOSSES, *WHOLE} == set(TERMS)

@pytest.mark.parametrize(('name', 'why'), [('bce_dice', 'bce'), ('dise', 'did you mean dice'), ('jacard', 'did you mean jaccard'),
    ('4:1:3', 'preset'), ('', 'no term'), ('+bce', 'no term'), ('2bce', 'no term'), ('1e3*bce', 'no term'), ('-2*bce', 'no term'),
    ('bce*2', 'no term'), ('dice+2*dice', 'twice'), ('0*dice', 'without a term'), (3, 'no term'), ('*', 'no term'),
    ('xyz', 'choose among bce')])
def test_unknown_names(name, why):
    with pytest.raises(LossError, match=why): xray_loss(name)

@pytest.mark.parametrize(('kw', 'why'), [({}, 'without a term'), ({'bce': 0, 'dice': 0.}, 'without a term'), ({'bce': math.nan}, 'bce=nan'),
    ({'bce': math.inf}, 'bce=inf'), ({'bce': -1}, 'bce=-1'), ({'bce': '1'}, "bce='1'"), ({'bce': None}, 'bce=None'),
    ({'bce': True}, 'bce=True'), ({'bce': False}, 'bce=False'), ({'bcee': 1}, 'did you mean bce'), ({'bce': 1, 'thresh': 50}, 'thresh=50'),
    ({'bce': 1, 'thresh': 0}, 'thresh'), ({'bce': 1, 'thresh': math.nan}, 'thresh'), ({'bce': 1, 'reduction': 'sum'}, 'reduction'),
    ({'bce': 1, 'reduction': None}, 'reduction'), ({'bce': 1, 'options': {'dice': {'eps': 1}}}, 'options of'),
    ({'bce': 1, 'options': {'bce': {'weight': 1}}}, 'pos_weight'), ({'bce': 1, 'options': {'bce': {'l': 1}}}, 'option of bce'),
    ({'dice': 1, 'options': {'dice': {'eps': 0}}}, 'eps=0'), ({'jaccard': 1, 'options': {'jaccard': {'eps': -1}}}, 'eps=-1'),
    ({'focal': 1, 'options': {'focal': {'gamma': -1}}}, 'gamma'), ({'focal': 1, 'options': {'focal': {'gamma': math.nan}}}, 'gamma'),
    ({'focal': 1, 'options': {'focal': {'alpha': 1}}}, 'alpha'), ({'tversky': 1, 'options': {'tversky': {'beta': 0}}}, 'beta=0'),
    ({'boundary': 1, 'options': {'boundary': {'x': 1}}}, 'none at all')], ids=str)
def test_bad_sums_are_refused_when_they_are_made(kw, why):
    with pytest.raises(LossError, match=why): ComboLoss(**kw)

@pytest.mark.parametrize(('f', 'kw'), [(dice_loss, {'eps': 0}), (dice_loss, {'eps': -1}), (jaccard_loss, {'eps': math.nan}),
    (tversky_loss, {'alpha': 0}), (tversky_loss, {'gamma': 0}), (tversky_loss, {'eps': math.inf}), (focal_loss, {'gamma': -.1}),
    (focal_loss, {'alpha': 0}), (focal_loss, {'alpha': 1.5}), (bce_loss, {'pos_weight': 0}), (bce_loss, {'pos_weight': math.nan}),
    (lovasz_loss, {'reduction': 'sum'}), (boundary_loss, {'reduction': ''})], ids=named)
def test_bad_options_of_functions(f, kw):
    l, t = rand()
    with pytest.raises(LossError, match=next(iter(kw))): f(l, t, **kw)

@pytest.mark.parametrize('f', [*LOSSES.values(), xray_loss(), AuxLoss()], ids=lambda f: getattr(f, '__name__', type(f).__name__))
def test_what_does_not_belong_together(f):
    l, t = torch.zeros(2, 1, 4, 5), torch.zeros(2, 4, 5, dtype=torch.uint8)
    for bad in (t[:1], t[:, :3], t[0], torch.zeros(2, 2, 4, 5), t[..., None]):
        with pytest.raises(LossError, match='N×1×H×W'): f(l, bad)
    for bad in (l[:, 0], l.expand(2, 2, 4, 5), l[:0], l[..., :0]):
        with pytest.raises(LossError, match='N×1×H×W'): f(bad, t[:len(bad), :, :bad.shape[-1]])
    for bad in (t+2, t*math.nan, t+.5, t.float()-.001, t.float()*math.nan+1, t.long()-1):
        with pytest.raises(LossError, match='mask values'): f(l, bad)
    one = t.float()
    one[1, 2, 3] = math.nan
    with pytest.raises(LossError, match='nan'): f(l, one)
    for bad in (l.long(), l.bool()):
        with pytest.raises(LossError, match='floating'): f(bad, t)
    with pytest.raises(LossError, match='give a tensor'): f(l, t.numpy())
    assert issubclass(LossError, PtxError)

def test_the_tuple_of_a_training_step_is_told_where_to_go():
    l, t = rand()
    with pytest.raises(LossError, match='AuxLoss'): xray_loss()((l, None, []), t)

def test_the_threshold_is_that_of_decide():
    from pneumothorax.decide import prob_to_mask
    p = np.array([[.2, .5], [np.nextafter(np.float32(.5), np.float32(0)), .9]], np.float32)
    for thresh in (.5, .2, .9):
        mask = ComboLoss(bce=1, thresh=float(np.float32(thresh))).decodes(torch.tensor(p)[None, None])
        assert mask.dtype == torch.uint8 and (mask[0].numpy() == prob_to_mask(p, float(np.float32(thresh)), 0, 2)).all()

def test_reduction_can_be_set_and_is_checked():
    loss = xray_loss()
    aux = AuxLoss(loss)
    for o in (loss, aux):
        with pytest.raises(LossError, match='reduction'): o.reduction = 'sum'
    aux.reduction = 'none'
    assert loss.reduction == aux.reduction == 'none'
    l, t = rand()
    assert aux(l, t).shape == aux((l, l.mean((2, 3)), [l[..., ::2, ::2]]), t).shape == (4,)

def test_weights_may_change_between_epochs():
    l, t = rand()
    loss = ComboLoss(dice=1, boundary=.01)
    loss.weights['boundary'] = 3.
    torch.testing.assert_close(loss(l, t), dice_loss(l, t)+3*boundary_loss(l, t))

# --- side outputs

def outputs(l, t, dtype=None):
    l = l.to(dtype or l.dtype)
    return l, torch.stack([l.mean((1, 2, 3)), l.amax((1, 2, 3))], 1), [l[..., ::2, ::2], l[..., ::4, ::4]]

def test_aux_loss_is_the_sum_of_its_parts():
    l, t = rand(4, 16, 12)
    out = l, image, deep = outputs(l, t)
    main = xray_loss('3:1:4')
    has = t.flatten(1).bool().any(1).double()[:, None].expand(4, 2)
    by_image = nn.functional.binary_cross_entropy_with_logits(image, has)
    levels = [main(d, nn.functional.max_pool2d(t[:, None].double(), k)) for d, k in zip(deep, (2, 4))]
    want = main(l, t)+.3*by_image+.7*sum(levels)/2
    for mask in (t, t.bool(), t.to(torch.uint8)[:, None]): torch.testing.assert_close(AuxLoss(main, .3, .7)(out, mask), want)
    torch.testing.assert_close(AuxLoss(main, 0, 0)(out, t), main(l, t))
    torch.testing.assert_close(AuxLoss(main, .3, 0)((l, image[:, :1], []), t),
        main(l, t)+.3*nn.functional.binary_cross_entropy_with_logits(image[:, :1], has[:, :1]))
    for nothing in (None, image[:, :0]): torch.testing.assert_close(AuxLoss(main)((l, nothing, []), t), main(l, t))

def test_aux_loss_any_size_dtype_and_gradients():
    l, t = rand(4, 13, 10)
    for h, w in ((7, 5), (4, 3), (1, 1)): assert AuxLoss()((l, None, [torch.zeros(4, 1, h, w)]), t).isfinite()
    for dtype in (torch.float16, torch.bfloat16):
        out = outputs(l, t, dtype)
        torch.testing.assert_close(AuxLoss()(out, t), AuxLoss()(outputs(l.to(dtype).float(), t), t), rtol=1e-2, atol=1e-2)
    assert torch.autograd.gradcheck(lambda l: AuxLoss(image=1., deep=1.)(outputs(l, t), t), l.requires_grad_())
    far = [o.requires_grad_() for o in (-says(t, 200), torch.full((4, 2), 200.), -says(t, 200)[..., ::4, ::4])]
    AuxLoss()((far[0], far[1], far[2:]), t).backward()
    for o in far: assert o.grad.isfinite().all() and o.grad.abs().sum() > 0

@pytest.mark.parametrize(('kw', 'why'), [({'image': -1}, 'image'), ({'deep': math.inf}, 'deep'), ({'image': True}, 'image'),
    ({'main': 'bce'}, 'xray_loss'), ({'main': bce_loss}, 'instance'), ({'main': ComboLoss}, 'instance')], ids=named)
def test_bad_aux_losses(kw, why):
    with pytest.raises(LossError, match=why): AuxLoss(**kw)

def test_bad_outputs():
    l, t = rand()
    out = l, image, deep = outputs(l, t)
    for bad, why in ((out[:2], 'tuple'), ({'logits': l}, 'dict'), ((l, image[:2], deep), 'image-level'),
            ((l, image[..., None], deep), 'image-level'), ((l, image, [deep[0][:2]]), 'N×1×H×W'), ((None, image, deep), 'floating')):
        with pytest.raises(LossError, match=why): AuxLoss()(bad, t)

def test_losses_in_a_learner(tmp_path):
    "One fit with side outputs, then predictions; the loss survives pickling"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    t = batch([0, 20, 100, 0], 16)
    ds = [(says(t)[i], t[i]) for i in range(4)]
    dls = DataLoaders(*[DataLoader(ds, bs=2, num_workers=0)]*2)
    learn = Learner(dls, TwoFaced(), loss_func=AuxLoss(xray_loss('3*bce+dice+4*focal')), path=tmp_path)
    learn.fit(2, 1e-2)
    assert np.isfinite(learn.recorder.values[-1]).all()
    probs, targs, decoded, each = learn.get_preds(with_decoded=True, with_loss=True)
    want = xray_loss('3*bce+dice+4*focal', reduction='none')(torch.logit(probs), targs)
    torch.testing.assert_close(each, want, rtol=1e-3, atol=1e-4)
    assert decoded.shape == (4, 16, 16) and learn.loss_func.reduction == 'mean'
    again = pickle.loads(pickle.dumps(learn.loss_func))
    assert again.main.weights == learn.loss_func.main.weights

class TwoFaced(nn.Module):
    "A tuple in training, a tensor otherwise"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
    def forward(self, x):
        l = self.conv(x)
        return (l, l.mean((2, 3)).expand(-1, 2), [l[..., ::2, ::2]]) if self.training else l

def test_types_of_fastai_come_off():
    from fastai.torch_core import TensorImage, TensorMask
    l, t = rand()
    for loss in (xray_loss('3:1:4'), *(xray_loss(k) for k in TERMS)):
        v = loss(l.as_subclass(TensorImage), t.as_subclass(TensorMask))
        assert type(v) is torch.Tensor
        torch.testing.assert_close(v, loss(l, t))

def test_public_names():
    assert set(losses.__all__) >= {'LossError', 'TERMS', 'PRESETS', 'ComboLoss', 'xray_loss', 'AuxLoss', 'top_loss',
        *(f.__name__ for f in LOSSES.values())}
    assert SimpleNamespace(**TERMS).bce

def test_side_outputs_that_are_missing_or_meet_another_loss():
    from pneumothorax.priors import LogitAdjustedLoss
    l, t = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4)
    assert AuxLoss()((l, None, None), t) == AuxLoss()(l, t)
    with pytest.raises(LossError, match='AuxLoss'): LogitAdjustedLoss(.01)((l, None, []), t)
    assert AuxLoss(LogitAdjustedLoss(.01))((l, torch.zeros(2, 2), [torch.zeros(2, 1, 2, 2)]), t) > 0

# --- terms of positives, of batches and of whole images

@pytest.mark.parametrize('eps', [1., 40.])
def test_dice_of_positives_leaves_the_others_alone(eps):
    l, t = rand()
    each, alone = dice_loss(l, t, eps, 'none', 'positives'), dice_loss(l, t, eps, 'none')
    some = t.flatten(1).bool().any(1)
    assert some.tolist() == [True, False, True, True]
    torch.testing.assert_close(each, alone*some)
    torch.testing.assert_close(ComboLoss(pos_dice=1, options={'pos_dice': {'eps': eps}})(l, t), (alone*some).sum()/4)
    d = slope(lambda l: dice_loss(l, t, eps, over='positives'), l)
    assert (d[1] == 0).all() and (d[[0, 2, 3]] != 0).all()

def test_dice_of_a_batch_is_that_of_one_large_image():
    l, t = rand()
    want = dice_loss(l.flatten(0, 2)[None, None], t.flatten(0, 1)[None])
    torch.testing.assert_close(dice_loss(l, t, over='batch'), want)
    torch.testing.assert_close(ComboLoss(batch_dice=1, reduction='none')(l, t), want.expand(4))
    d = slope(lambda l: dice_loss(l, t, over='batch'), l)
    assert (d[1] > 0).all()     # a healthy image costs what its area takes from the others
    smp = pytest.importorskip('segmentation_models_pytorch.losses')
    torch.testing.assert_close(smp.DiceLoss('binary')(l.float(), t), dice_loss(l.float(), t, 1e-6, over='batch'))

def test_dice_of_a_healthy_batch():
    t = torch.zeros(3, 8, 8, dtype=torch.uint8)
    l = says(batch([0, 4, 6], 8), 60)
    assert dice_loss(l, t, over='batch').item() == pytest.approx(10/11)
    assert dice_loss(l, t, over='positives').item() == 0
    with pytest.raises(LossError, match="over='all'"): dice_loss(l, t, over='all')

def test_top_looks_at_the_highest_logits():
    t = batch([0, 40, 0], 32)
    l = torch.full((3, 1, 32, 32), -3., dtype=torch.float64)
    l[0, 0, 5, 5:9], l[1, 0, 30, 3] = 2., 4.
    assert (top_loss(l, t, 4/1024, 'none').tolist()
        == pytest.approx([math.log1p(math.exp(2)), math.log1p(math.exp((3*3-4)/4)), math.log1p(math.exp(-3))]))
    # a pixel of 1,024
    torch.testing.assert_close(top_loss(l, t),
        nn.functional.binary_cross_entropy_with_logits(l.flatten(1).amax(1), torch.tensor([0., 1, 0], dtype=torch.float64)))
    d = slope(lambda l: top_loss(l, t, 4/1024), l)
    assert ((d != 0).flatten(1).sum(1) == 4).all() and (d[[0, 2]] >= 0).all() and (d[1] <= 0).all()
    for share in (0, 1, math.nan):
        with pytest.raises(LossError, match='share'): top_loss(l, t, share)

@pytest.mark.parametrize('name', WHOLE)
def test_terms_of_whole_images_are_finite_anywhere_and_hide_no_nan(name):
    t = batch()
    for far in (50, 200):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            l = (-says(t, far)).to(dtype).requires_grad_()
            v = WHOLE[name](l, t)
            assert v.dtype == torch.float32 and v.isfinite()
            v.backward()
            assert l.grad.isfinite().all()
    l, t = rand()
    l[0, 0, 2, 3] = math.nan
    assert WHOLE[name](l, t).isnan()
    l, t = rand(4, 4, 3)
    assert torch.autograd.gradcheck(lambda l: WHOLE[name](l, t, reduction='none'), l.requires_grad_())

def test_a_healthy_chest_is_where_the_terms_differ():
    "A network that marks nothing, against one that is right but for p=.001 elsewhere: by Dice of each image alone nothing is better"
    t = batch([0]*7+[500], 256)
    nothing, right = says(t*0, 20.), torch.where(t[:, None] > 0, 4., math.log(1e-3))
    prefers = {k: ComboLoss(**{k: 1})(nothing, t) < ComboLoss(**{k: 1})(right, t) for k in TERMS}
    assert [k for k, v in prefers.items() if v] == ['dice', 'jaccard', 'tversky', 'boundary']

# --- label smoothing

@pytest.mark.parametrize('name', ['bce', 'focal', 'bce+dice', '3:1:4', '2*focal+boundary'])
def test_smoothing_mixes_the_mask_and_its_complement_in_pixel_terms_only(name):
    l, t = rand()
    hard, soft = xray_loss(name, reduction='none'), xray_loss(name, smooth=.2, reduction='none')
    want = sum(w*((.9*LOSSES[k](l, t, reduction='none')+.1*LOSSES[k](l, 1-t, reduction='none')) if k in ('bce', 'focal')
        else {**LOSSES, **WHOLE}[k](l, t, reduction='none')) for k, w in hard.weights.items())
    assert torch.allclose(soft(l, t), want, atol=1e-12)
    assert not torch.allclose(soft(l, t), hard(l, t))
    assert torch.equal(xray_loss(name, smooth=0, reduction='none')(l, t), hard(l, t))

def test_smoothing_weighs_positive_pixels_as_torch_does():
    l, t = rand()
    y = t[:, None].double()*.7+.15
    want = torch.nn.functional.binary_cross_entropy_with_logits(l, y, pos_weight=torch.tensor(4., dtype=torch.float64))
    assert torch.allclose(ComboLoss(bce=1, smooth=.3, options={'bce': {'pos_weight': 4}})(l, t), want, atol=1e-12)

def test_smoothing_has_the_right_slope_survives_pickling_and_reaches_the_side_outputs():
    l, t = rand()
    f = AuxLoss(xray_loss('bce+focal', smooth=.1), image=0, deep=1)
    assert torch.autograd.gradcheck(lambda l: f(l, t), l.requires_grad_())
    same = pickle.loads(pickle.dumps(f))
    assert same.main.smooth == .1
    assert torch.equal(same(l, t), f(l, t))
    assert torch.allclose(f((l, None, [l]), t), 2*f(l, t))

@pytest.mark.parametrize('bad', [-.1, 1, 1., 2, math.nan, math.inf, True, '0.1', None])
def test_smoothing_outside_its_range_is_refused(bad):
    with pytest.raises(LossError, match='smooth='): xray_loss('bce+dice', smooth=bad)

def test_smoothing_without_a_term_to_smooth_is_refused():
    with pytest.raises(LossError, match='hard mask'): xray_loss('dice+lovasz', smooth=.1)
