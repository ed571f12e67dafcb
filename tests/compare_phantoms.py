"""How far are the phantoms from real radiographs? `python tests/compare_phantoms.py OUT [--n 172] [--size 512] [--name after] [--report]`

The 172 radiographs of `$PTX_SHARED/siim-small` and `siim-more` against as many phantoms of the same views' mixture, as many of them
positive. Both go the same way: to `--size` by area, to eight bits, through JPEG of one quality, and without a rim of 6 %, lest shutters,
bit depth or compression tell them apart. Measured are the mean percentiles of grey, the radially averaged power spectrum (difference of its
logarithm by band, in cycles per picture width; the spread of the real ones beside it), how well a classifier tells real from phantom (AUROC
of five folds by patient, interval by patient) from four kinds of features, and the Fréchet distance of two of them, beside that of one half
of the real patients from the other. Another version's phantoms: `PYTHONPATH=other/checkout … --name before`; tables of all names in OUT are
printed."""
import argparse
import io
import json
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from comparing import all_images, ends
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pneumothorax.bootstrap import bootstrap_stat
from pneumothorax.dicom import read_xray
from pneumothorax.encoders import create_encoder, load_weights
from pneumothorax.metrics import auroc
from pneumothorax.phantom import phantom, plan_phantoms

GREY = 1, 5, 25, 50, 75, 95, 99
BANDS = 2, 4, 8, 16, 32, 64, 128, 224

def alike(x, size):
    "What both kinds go through: size, eight bits, JPEG, no rim"
    x, f = cv2.resize(np.asarray(x, np.float32), (size, size), interpolation=cv2.INTER_AREA), io.BytesIO()
    Image.fromarray((x.clip(0, 1)*255).round().astype(np.uint8)).save(f, 'JPEG', quality=90)
    k = round(.06*size)
    return np.asarray(Image.open(f))[k:-k, k:-k].astype(np.float32)/255

def spectrum(x):
    "Logarithm (base 10) of the mean power in each band of spatial frequency, under a Hann window"
    w = np.hanning(len(x)).astype(np.float32)
    p = np.abs(np.fft.fftshift(np.fft.fft2((x-x.mean())*w[:, None]*w)))**2
    f = np.fft.fftshift(np.fft.fftfreq(len(x)))*len(x)
    r = np.hypot(f[:, None], f)
    return np.array([np.log10(p[(r >= lo) & (r < hi)].mean()+1e-9) for lo, hi in pairwise(BANDS)])

def texture(x):
    "Contrast at six scales in a 4×4 grid, and the shape of its distribution"
    out = []
    for k in range(6):
        s = cv2.GaussianBlur(x, (0, 0), 2.**k*.6)
        d = s-cv2.GaussianBlur(x, (0, 0), 2.**k*1.2)
        cell = cv2.resize(d*d, (4, 4), interpolation=cv2.INTER_AREA)
        z = d.ravel()/max(d.std(), 1e-6)
        out += [*np.log(cell.ravel()+1e-9), np.log((z**4).mean()), (z**3).mean(), *np.percentile(z, (1, 10, 90, 99))]
    return np.array(out)

def deep(xs):
    "Mean and spread of the maps of the encoder that the project starts from"
    enc, out = create_encoder(), []
    load_weights(enc.eval(), 'lite0')
    with torch.inference_mode():
        for x in xs:
            maps = enc(torch.from_numpy((x-x.mean())/(x.std()+1e-6))[None, None])
            out.append(torch.cat([f(m[0], (1, 2)) for m in maps[1:] for f in (torch.mean, torch.std)]).numpy())
    return np.stack(out)

def features(xs):
    "Four kinds, from simple to subtle"
    return {'grey': np.array([np.percentile(x, GREY) for x in xs]), 'spectrum': np.array([spectrum(x) for x in xs]),
        'texture': np.array([texture(x) for x in xs]), 'encoder': deep(xs)}

def told_apart(f, y, who):
    "Out-of-fold score of each image"
    out = np.zeros(len(y))
    for a, b in GroupKFold(5, shuffle=True, random_state=0).split(f, y, who):
        m = make_pipeline(StandardScaler(), LogisticRegression(C=.01, max_iter=2000)).fit(f[a], y[a])
        out[b] = m.decision_function(f[b])
    return out

def frechet(a, b):
    "Fréchet distance of two sets of features in the twelve main directions of the first, each scaled to its spread there"
    m = make_pipeline(StandardScaler(), PCA(12, whiten=True, random_state=0)).fit(a)
    a, b = m.transform(a), m.transform(b)
    ca, cb = np.cov(a.T), np.cov(b.T)
    return ((a.mean(0)-b.mean(0))**2).sum()+np.trace(ca+cb)-2*np.sqrt(np.linalg.eigvals(ca@cb).real.clip(0)).sum()

def of_real(a):
    df = all_images()
    return features([alike(read_xray(f), a.size) for f in df.path[:a.n]]), df.patient_id[:a.n].astype(str).tolist(), df.has_ptx[:a.n].mean()

def of_phantoms(a, positive):
    rows = plan_phantoms(a.n, a.size, 5, 0, positive)
    xs = [alike(phantom(r['seed'], a.size, 'auto' if r['area'] else 'none', [5, r['patient']], r['area'] or None)[0], a.size) for r in rows]
    return features(xs), [f'phantom {r["patient"]}' for r in rows]

def measure(a):
    "One table for one version of the phantoms"
    real, people, positive = of_real(a)
    made, others = of_phantoms(a, positive)
    y, who = np.r_[np.zeros(a.n, int), np.ones(a.n, int)], np.array(people+others)
    half = np.isin(people, list(dict.fromkeys(people))[::2])
    out = {'n': a.n, 'size': a.size, 'patients': len(set(people)), 'made_for': len(set(others)), 'positive': float(positive),
        'auroc': {}, 'frechet': {}}
    for k in real:
        s = told_apart(np.r_[real[k], made[k]], y, who)
        c = bootstrap_stat(auroc, [s, y], who)
        out['auroc'][k] = [c.value, c.lo, c.hi]
        if k in ('texture', 'encoder'): out['frechet'][k] = [frechet(real[k], made[k]), frechet(real[k][half], real[k][~half])]
    for k in ('grey', 'spectrum'):
        out[k] = {'real': real[k].mean(0).tolist(), 'spread': real[k].std(0).tolist(), 'phantom': made[k].mean(0).tolist(),
            'spread_phantom': made[k].std(0).tolist()}
    return out

def report(tables):
    "All versions side by side"
    names, any_ = list(tables), next(iter(tables.values()))
    print(f'{any_["n"]} real radiographs ({any_["patients"]} patients) and as many phantoms ({any_["made_for"]}), {any_["size"]} px')
    row = lambda *c: print('|', *(f'{v} |' for v in c))
    def head(*c):
        print()
        row(*c)
        print('|'+'---|'*len(c))
    head('told apart by (AUROC)', *names)
    for k in any_['auroc']: row(k, *(f'{t["auroc"][k][0]:.3f} {ends(*t["auroc"][k][1:])}' for t in tables.values()))
    head('Fréchet distance', *names, 'real from real')
    for k in any_['frechet']: row(k, *(f'{t["frechet"][k][0]:.1f}' for t in tables.values()), f'{any_["frechet"][k][1]:.1f}')
    head('cycles per width: log10 power, minus real', *names, 'spread of real')
    for i, (lo, hi) in enumerate(pairwise(BANDS)):
        row(f'{lo} to {hi}', *(f'{t["spectrum"]["phantom"][i]-t["spectrum"]["real"][i]:+.2f}' for t in tables.values()),
            f'{any_["spectrum"]["spread"][i]:.2f}')
    head('percentile of grey (0 to 255)', 'real', *names, 'spread of real')
    for i, q in enumerate(GREY):
        row(q, f'{255*any_["grey"]["real"][i]:.0f}', *(f'{255*t["grey"]["phantom"][i]:.0f}' for t in tables.values()),
            f'{255*any_["grey"]["spread"][i]:.0f}')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path)
    p.add_argument('--n', type=int, default=172)
    p.add_argument('--size', type=int, default=512)
    p.add_argument('--name', default='after')
    p.add_argument('--report', action='store_true', help='print what is there, measure nothing')
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if not a.report: (a.out/f'{a.name}.json').write_text(json.dumps(measure(a))+'\n')
    report({f.stem: json.loads(f.read_text()) for f in sorted(a.out.glob('*.json'), key=lambda f: (f.stem != 'before', f.stem))})
