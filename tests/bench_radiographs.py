"""Reading, caching and equalising radiographs against the named alternatives:
`python tests/bench_radiographs.py [read cache clahe prepare scale]`

Raced as in `racing`. Needs the real radiographs (`$PTX_SHARED`)."""
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pandas as pd
import pydicom
import torch
from conftest import SHARED
from PIL import Image
from pydicom.encaps import get_frame
from pydicom.pixels import pixel_array
from racing import line, race, rounds_of

from pneumothorax.cache import prepare, shrink
from pneumothorax.dicom import read_xray
from pneumothorax.equalize import CLAHE, CLAHE16, TensorXray

SMALL = SHARED/'siim-small'
JPEGS = sorted((SMALL/'dicom-images-train').rglob('*.dcm'))

def frames(): return [np.frombuffer(get_frame(pydicom.dcmread(f).PixelData, 0, number_of_frames=1), np.uint8) for f in JPEGS]

def read():
    "One file: ours, the bare decoders, pydicom, fastai"
    from fastai.medical.imaging import PILDicom
    by_file = dict(zip(JPEGS, frames()))
    contestants = {'libjpeg-turbo (OpenCV), frame only': lambda f: cv2.imdecode(by_file[f], cv2.IMREAD_UNCHANGED),
        'libjpeg-turbo (Pillow), frame only': lambda f: np.asarray(Image.open(io.BytesIO(by_file[f]))),
        'read_xray': read_xray,
        'pydicom, plugin Pillow': lambda f: pixel_array(f, decoding_plugin='pillow'),
        'pydicom, its own choice': lambda f: pydicom.dcmread(f).pixel_array,
        'fastai PILDicom, as a tensor': lambda f: torch.from_numpy(np.array(PILDicom.create(f))).float()/255}
    if find_spec('libjpeg'): contestants['pydicom, plugin pylibjpeg'] = lambda f: pixel_array(f, decoding_plugin='pylibjpeg')
    off = max(np.abs(read_xray(f)*255-pydicom.dcmread(f).pixel_array).max() for f in JPEGS)
    print(f'{len(JPEGS)} JPEG Baseline radiographs of 1024 × 1024; read_xray is within {off:.2f} grey levels of pydicom')
    race('reading a file', 'libjpeg-turbo (OpenCV), frame only', contestants, JPEGS)

def cache():
    "One item: from the cache, and from DICOM"
    with TemporaryDirectory() as d:
        c = prepare(copies(Path(d)/'data', len(JPEGS)), Path(d)/'c', 512, progress=False)
        rows = dict(zip(c.table.path.map(str), c.table.row))
        race('an item of 512 px', 'read_xray', {'read_xray': read_xray, 'read_xray, shrink': lambda f: shrink(read_xray(f), 512),
            'row of the cache': lambda f: c.image(rows[f]), 'copy of as many bytes': lambda f: c.image(rows[f]).copy()}, list(rows))

def clahe():
    "Equalising: ours for a batch, kornia's for a batch, scikit-image's and OpenCV's for each image"
    for size in (512, 1024): clahe_at(size)

def clahe_at(size):
    "The same at one size"
    import kornia
    import skimage.exposure
    x = torch.stack([torch.from_numpy(shrink(read_xray(f), size))[None] for f in JPEGS[:8]])
    eight, sixteen = ((x[:, 0].numpy()*n).round().astype(t) for n, t in ((255, np.uint8), (65535, np.uint16)))
    cl, ours, cv16 = cv2.createCLAHE(2., (8, 8)), CLAHE(), CLAHE16()
    alone = cv2.getNumThreads()   # one, since `dicom` leaves the cores to the workers
    cv2.setNumThreads(torch.get_num_threads())
    assert cv2.getNumThreads() == torch.get_num_threads(), 'OpenCV was given other threads than torch: no fair race'
    threads = f'threads: {torch.get_num_threads()} of torch, {cv2.getNumThreads()} of OpenCV, 1 of scikit-image'
    race(f'CLAHE of 8 radiographs of {size} px ({threads})', 'ours, 4,096 levels', {
        'ours, 4,096 levels': lambda _: ours(TensorXray(x)), 'kornia, 256 levels': lambda _: kornia.enhance.equalize_clahe(x, 2.),
        'scikit-image, float': lambda _: [skimage.exposure.equalize_adapthist(i.numpy(), kernel_size=size//8) for i in x[:, 0]],
        'OpenCV, 16 bits': lambda _: [cl.apply(i) for i in sixteen], 'OpenCV, 16 bits, as CLAHE16': lambda _: cv16(TensorXray(x)),
        'OpenCV, 8 bits': lambda _: [cl.apply(i) for i in eight]}, [0], rounds=7)
    cv2.setNumThreads(alone)

def copies(out, n):
    "A folder with `n` radiographs under new names, which are links to the twelve, and their labels"
    labels = pd.read_csv(SMALL/'train-rle.csv', skipinitialspace=True).rename(columns=str.strip)
    rles = labels.groupby('ImageId').EncodedPixels.apply(list)
    out.mkdir(parents=True)
    one = {f: shutil.copy(f, out.parent/f.name) for f in JPEGS}
    rows = []
    for i in range(n):
        f = JPEGS[i % len(JPEGS)]
        os.link(one[f], out/f'{i}.dcm')
        rows += [(f'{i}', r) for r in rles[f.stem]]
    pd.DataFrame(rows, columns=['ImageId', 'EncodedPixels']).to_csv(out/'train-rle.csv', index=False)
    return out

_frames = []

def _bare(i): return cv2.imdecode(_frames[i % len(_frames)], cv2.IMREAD_UNCHANGED).shape

def _whole(f): return read_xray(f).shape

def prepare_against_decoder(n=1200, rounds=5):
    "Throughput on two processes"
    from pneumothorax.siim import siim_train
    _frames[:] = frames()
    times = {'libjpeg-turbo (OpenCV), frames only': [], 'read_xray': [], 'prepare, 512 px': []}
    with TemporaryDirectory() as d:
        table = siim_train(copies(Path(d)/'data', n))
        files = table.path.tolist()
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('fork')) as pool:
            for _ in range(rounds_of(rounds)):
                jobs = (lambda: list(pool.map(_bare, range(n), chunksize=8)), lambda: list(pool.map(_whole, files, chunksize=8)),
                    lambda: prepare(table, Path(d)/'c', 512, progress=False))
                for k, job in zip(times, jobs):
                    shutil.rmtree(Path(d)/'c', ignore_errors=True)
                    t0 = time.perf_counter()
                    job()
                    times[k].append((time.perf_counter()-t0)/n*1e3)
    print(f'\n{n:,} radiographs, two processes\n{"":34} {"ms":>8}   ratio to libjpeg-turbo (OpenCV), frames only')
    for k, t in times.items():
        line(k, t, times['libjpeg-turbo (OpenCV), frames only'],
            *('radiographs on two processes', 'libjpeg-turbo (OpenCV), frames only')*(k != 'libjpeg-turbo (OpenCV), frames only'))

def memory(pid):
    """MB of memory of its own that a process and its children have now, and the same where pages that they share since the fork count
    once for each of them; pages of mapped files apart"""
    def of(p):
        try: shared, own = Path(f'/proc/{p}/smaps_rollup').read_text(), Path(f'/proc/{p}/status').read_text()
        except OSError: return np.zeros(2)   # it has ended
        if 'Pss_Anon:' not in shared or 'RssAnon:' not in own: return np.zeros(2)
        return np.array([int(text.split(key)[1].split()[0])/1024 for text, key in ((shared, 'Pss_Anon:'), (own, 'RssAnon:'))])
    kids = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return sum(of(p) for p in [pid, *kids])

def scale(counts=(100, 1_000, 10_000), size=256):
    "Time and memory of the command at three sizes"
    print(f'\nptx_prepare at {size} px\n{"images":>8} {"s":>8} {"ms an image":>12} {"s, nothing to do":>17} '
        f'{"MB, all processes":>18} {"shared pages for each":>22}')
    for n in counts:
        with TemporaryDirectory() as d:
            data, took, mb = copies(Path(d)/'data', n), [], np.zeros(2)
            for _ in range(2):
                t0 = time.perf_counter()
                p = subprocess.Popen([Path(sys.executable).parent/'ptx_prepare', data, Path(d)/'c', '--size', str(size)],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                while p.poll() is None:
                    mb = np.maximum(mb, memory(p.pid))
                    time.sleep(.05)
                took.append(time.perf_counter()-t0)
                assert p.returncode == 0
            print(f'{n:8,} {took[0]:8.2f} {took[0]/n*1e3:12.2f} {took[1]:17.2f} {mb[0]:18.0f} {mb[1]:22.0f}', flush=True)

PARTS = {'read': read, 'cache': cache, 'clahe': clahe, 'prepare': prepare_against_decoder, 'scale': scale}

if __name__ == '__main__':
    if not JPEGS: sys.exit(f'no real radiographs in {SMALL}: set PTX_SHARED to their folder')
    warnings.simplefilter('ignore')
    unknown = set(sys.argv[1:])-set(PARTS)
    if unknown: sys.exit(f'{", ".join(unknown)}: give some of {", ".join(PARTS)}')
    for part in sys.argv[1:] or PARTS: PARTS[part]()
    sys.stdout.flush()
