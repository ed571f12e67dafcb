"Pictures of radiographs: axes hold data, nothing is cut, both outlines can be seen, for one image as for twelve"
import warnings

import cv2
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pictures import wrong

from pneumothorax.decide import AREAS, BOTTOMS, TOPS, Decision, Triplet, explain_figure, surface_figure
from pneumothorax.dicom import COLOURS, contours, draw_outlines, show_xray, xray_sheet
from pneumothorax.gate import show_importance
from pneumothorax.metrics import reliability, show_reliability
from pneumothorax.phantom import phantom
from pneumothorax.rle import rle_encode, rles_to_mask
from pneumothorax.scoring import submission_figure
from pneumothorax.siim import audit_figure, audit_labels, find_siim, read_labels
from pneumothorax.submission import contact_sheet
from pneumothorax.watch import draw_history, overlays

LONG = '1.2.276.0.7230010.3.1.4.8323329.1517875163.4559{:02}'

@pytest.fixture(scope='module')
def chests():
    "Three radiographs with their masks"
    return [(x, np.maximum.reduce(masks)) for x, masks, _ in (phantom([8, i], 64, area=a) for i, a in enumerate((300, 9000, 40000)))]

def colours(fig):
    "How many pixels of a figure have each colour of the scheme"
    FigureCanvasAgg(fig).draw()
    a = np.asarray(fig.canvas.buffer_rgba())[..., :3]/255.
    return {k: int((np.abs(a-to_rgb(c)).max(-1) < .1).sum()) for k, c in COLOURS.items()}

@pytest.mark.parametrize('n', [1, 2, 5, 12])
@pytest.mark.parametrize('areas', [False, True])
def test_a_sheet_of_any_length(chests, n, areas):
    xs, masks = ([chests[i % 3][k] for i in range(n)] for k in (0, 1))
    fig = Figure()
    axs = xray_sheet(xs, masks, [np.roll(m, 20, 1) for m in masks],
        [f'{LONG.format(i)} Dice 0.{i}' for i in range(n)], fig=fig, areas=areas)
    assert not wrong(fig) and len(axs) == n and {t.get_text() for t in fig.legends[0].get_texts()} == set(list(COLOURS)[:4 if areas else 2])
    assert all(a.get_title().endswith(f'Dice 0.{i}') and f'.4559{i:02}' in a.get_title() for i, a in enumerate(axs))
    assert min(list(colours(fig).values())[:2]) > 30

def test_one_radiograph_of_its_own(chests):
    import matplotlib.pyplot as plt
    x, m = chests[1]
    for size in (2, 3, 6):
        fig = show_xray(x, m, np.roll(m, 20, 0), title=LONG.format(7), size=size).figure
        assert not wrong(fig)
        plt.close(fig)
    assert not show_xray(x, title='alone').figure.legends
    plt.close('all')

def test_neither_outline_hides_the_other(chests):
    x, m = chests[2]
    fig = Figure(figsize=(3, 3))
    show_xray(x, m, m, ax=fig.add_axes([0, 0, 1, 1]))
    c = colours(fig)
    assert c['true'] > 50 and c['predicted'] > 50
    c = draw_outlines(np.zeros((300, 300, 3), np.uint8), m, m)
    assert all((np.abs(c/255.-to_rgb(COLOURS[k])).max(-1) < .02).sum() > 50 for k in ('true', 'predicted'))

def border(mask, size):
    "The outermost pixels of a mask at the size of a picture"
    m = cv2.resize(mask*255, size[::-1], interpolation=cv2.INTER_AREA) > 127
    m = np.pad(m.astype(np.uint8), 1)
    return (m-cv2.erode(m, np.ones((3, 3), np.uint8)))[1:-1, 1:-1] > 0

def test_contours_enclose_the_border(chests):
    for _, m in chests:
        a = np.zeros((256, 256), np.uint8)
        cv2.fillPoly(a, [np.rint(p).astype(np.int32) for p in contours(m, (256, 256))], 1)
        small = cv2.resize(m*255, (256, 256), interpolation=cv2.INTER_AREA) > 127
        assert ((a > 0)&small).sum() > .95*small.sum() and not (border(m, (256, 256))&~(cv2.dilate(a, np.ones((3, 3), np.uint8)) > 0)).any()

@pytest.mark.parametrize('n', [1, 4])
def test_the_sheet_of_an_audit(phantoms, tmp_path, n):
    files = find_siim(phantoms)
    y = read_labels(files.labels)
    t = pd.DataFrame([(i, what, 1., 'something about it') for what in ('tiny mask', 'many pieces') for i in y.ImageId[y.has_ptx]],
        columns=['ImageId', 'what', 'value', 'detail'])
    fig = audit_figure(t, y, files, n)
    assert not wrong(fig) and colours(fig)['true'] > 20 and colours(fig)['predicted'] > 20
    assert not wrong(audit_figure(t.head(1), y, files, n))
    (tmp_path/'broken.dcm').write_bytes(b'none')
    fig = audit_figure(t, y, dict.fromkeys(y.ImageId, tmp_path/'broken.dcm'), n)
    assert not wrong(fig) and 'export the' in fig.axes[0].get_title()
    assert audit_labels(y, files) is not None

def drawn(monkeypatch, f, *args, **kwargs):
    "The figures that a function saves"
    figs, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **kw: (figs.append(self), save(self, *a, **kw)))
    f(*args, **kwargs)
    return figs

@pytest.mark.parametrize('n', [1, 5, 12])
def test_pictures_of_a_submission(phantoms, tmp_path, monkeypatch, n):
    "A contact sheet and the failures, of one image as of twelve, one of which cannot be read"
    files = find_siim(phantoms)
    y = read_labels(files.labels)
    y = y.sort_values('has_ptx', ascending=False, kind='stable').head(n)
    paths = {i: files.images[i] for i in y.ImageId}
    if n > 1: paths[y.ImageId.iloc[-1]] = tmp_path/'broken.dcm'
    (tmp_path/'broken.dcm').write_bytes(b'none')
    sub = pd.DataFrame({'ImageId': y.ImageId,
        'EncodedPixels': [rle_encode(np.roll(rles_to_mask(r), 30, 0)) if r else '-1' for r in y.rles]})
    sub.to_csv(tmp_path/'s.csv', index=False)
    fig, = drawn(monkeypatch, contact_sheet, tmp_path/'s.csv', paths, tmp_path/'sheet.png', pd.Series(.4, y.ImageId), n=4)
    said = [a.get_title() for a in fig.axes if a.has_data()]
    assert (not wrong(fig) and colours(fig)['predicted'] > 20 and len(said) == n
        and all(any(i[-6:] in t.replace('\n', '') for t in said) for i in y.ImageId))
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['predicted'] and (n == 1 or any('export' in t for t in said))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fig, = drawn(monkeypatch, submission_figure, tmp_path/'s.csv', paths, tmp_path/'f.png', files.labels, n=12)
    assert not wrong(fig) and min(colours(fig)[k] for k in ('true', 'predicted')) > 20 and (tmp_path/'f.png').stat().st_size > 1000

@pytest.mark.parametrize('decision', ['.5,2000,.3', Decision(Triplet(.5, 2000, .3), min_piece=800, fill=500, dilate=8)])
def test_pictures_of_a_decision(chests, decision):
    x, m = chests[2]
    p = cv2.GaussianBlur(m.astype(np.float32), (0, 0), 30)
    for keep in (True, False):
        for image in (None, x):
            fig = explain_figure(p/p.max(), decision, keep, image, title=LONG.format(3))
            assert not wrong(fig) and colours(fig)['predicted'] > 20 and fig.legends[0].get_texts()[0].get_text() == 'mask after the step'
    scores = np.random.default_rng(0).random((len(TOPS), len(AREAS), len(BOTTOMS)))
    for marks in ({}, {'chosen': Triplet(.5, 2000, .3)}, {'chosen': Triplet(.5, 2000, .3), 'the winners': Triplet(.75, 1000, .3)}):
        fig = surface_figure(scores, marks=marks)
        assert not wrong(fig) and [t.get_text() for lg in fig.legends for t in lg.get_texts()] == list(marks)
    import matplotlib.pyplot as plt
    plt.close('all')

def test_charts_of_a_gate_and_of_calibration():
    import matplotlib.pyplot as plt
    r = np.random.default_rng(0)
    for n in (1, 5, 20):
        t = pd.DataFrame({'what': [f'largest probability in zone {i}' for i in range(n)], 'loss': np.linspace(.1, -.01, n), 'sd': .01})
        assert not wrong(show_importance(t).figure)
    for n in (1, 30, 10000):
        p = r.random(n)
        ax = show_reliability(reliability(p, r.random(n) < p))
        assert not wrong(ax.figure) and [x.get_text() for x in ax.get_legend().get_texts()] == ['as often as said', 'measured']
    plt.close('all')

def test_the_check_finds_what_is_wrong():
    fig = Figure(figsize=(2, 2))
    ax = fig.add_axes([0, 0, 1, 1])
    assert wrong(fig)[0] == 'axes 0 hold nothing'
    ax.plot([0, 1])
    ax.axis('off')
    assert not wrong(fig)
    ax.set_title('above the page')
    fig.text(.5, .5, 'one upon')
    fig.text(.55, .5, 'the other', fontsize=5)
    assert [s.split("' ")[1] for s in wrong(fig)] == ['is cut off', "lies upon 'one upon'", 'is too small to read']

@pytest.mark.parametrize('loss', [1., .9987, 1234.5])
@pytest.mark.parametrize('n', [1, 3, 20])
def test_the_history_of_a_run(loss, n, tmp_path, monkeypatch):
    "Numbers of any length are whole, and the size of a stage lies upon no legend"
    h = pd.DataFrame({'epoch': range(n), 'stage': [2*i//n for i in range(n)], 'size': [128+128*(2*i//n) for i in range(n)]})
    for k, v in {'train_loss': loss, 'valid_loss': loss*1.0003, 'dice': .5, 'dice_pos': 0., 'dice_neg': 1.}.items():
        h[k] = v*(1-.001*h.epoch)
    fig, = drawn(monkeypatch, draw_history, h, tmp_path/'history.png')
    assert not wrong(fig) and len(fig.axes) == 2 and (tmp_path/'history.png').exists()
    for ax in fig.axes: assert all(v == round(v) for v in ax.get_xticks()) and not ax.yaxis.get_offset_text().get_text()

def test_overlays_of_any_length(chests):
    "Each tile holds its radiograph and both outlines"
    for n in (1, 5, 12):
        xs, masks = (np.stack([chests[1+i % 2][k] for i in range(n)]) for k in (0, 1))
        a = overlays(xs, masks, np.roll(masks, 20, 2), [f'Dice 0.{i:02}' for i in range(n)])
        assert a.shape == (-(-n//4)*288+18, min(n, 4)*274-4, 3)
        legend = a[-18:].reshape(-1, 3)/255.
        assert (all((np.abs(legend-to_rgb(COLOURS[k])).max(-1) < .1).sum() > 15 for k in ('true', 'predicted'))
            and (legend < .3).all(-1).sum() > 40)
        for i in range(n):
            tile = a[i//4*288:i//4*288+288, i % 4*274:i % 4*274+270]
            assert tile[18:].std() > 20 and (tile[:18] < 128).any()
            assert all((np.abs(tile/255.-to_rgb(COLOURS[k])).max(-1) < .02).sum() > 50 for k in ('true', 'predicted'))
