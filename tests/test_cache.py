"The cache from the command line: killed, disturbed, and on a disk that is full"
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ok, ptx

from pneumothorax.cache import XrayCache
from pneumothorax.phantom import make_phantoms


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Sixty radiographs under other names: twelve phantoms, each five times"
    out = tmp_path_factory.mktemp('many')
    sample = make_phantoms(out/'sample', n=12, size=256, n_test=0, positive=.5, progress=False)
    rows = (sample/'train-rle.csv').read_text().splitlines()
    for k in range(5):
        for f in sample.rglob('*.dcm'): (out/'data'/f'{k}').mkdir(parents=True, exist_ok=True), shutil.copy(f, out/'data'/f'{k}'/f'{k}-{f.name}')
    (out/'data'/'train-rle.csv').write_text('\n'.join([rows[0], *(f'{k}-{r}' for k in range(5) for r in rows[1:])])+'\n')
    return out/'data'

def start(*args): return subprocess.Popen([Path(sys.executable).parent/'ptx_prepare', *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

def done(out):
    try: return int((np.load(out/'rows.npy', mmap_mode='r')['stamp'] != 0).sum())
    except (OSError, ValueError): return 0

def test_kill_9_at_any_moment(data, tmp_path):
    ok('ptx_prepare', data, tmp_path/'whole', '--size', 512)
    want = (tmp_path/'whole'/'rows.npy').read_bytes()
    seen = []
    for wait in (0, 5, 20, 40):
        out = tmp_path/f'{wait}'
        p = start(data, out, '--size', 512)
        while done(out) < wait and p.poll() is None: time.sleep(.005)
        if not wait: time.sleep(1.)
        os.kill(p.pid, signal.SIGKILL)   # the command alone; its workers must notice
        p.wait()
        seen.append(done(out))
        ok('ptx_prepare', data, out, '--size', 512)
        assert (out/'rows.npy').read_bytes() == want
    assert any(0 < n < 60 for n in seen), f'no run was caught in the middle: {seen}'

def test_a_second_run_waits_its_turn(data, tmp_path):
    from filelock import FileLock
    out = tmp_path/'c'
    ok('ptx_prepare', data, out, '--size', 64)
    before = (out/'rows.npy').read_bytes()
    with FileLock(out/'.lock'): p = ptx('ptx_prepare', data, out, '--size', 64)
    assert p.returncode == 1 and 'another ptx_prepare' in p.stderr and (out/'rows.npy').read_bytes() == before

def test_a_full_disk_stops_it_and_room_lets_it_go_on(data, tmp_path):
    out = tmp_path/'c'
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20*64*64*3, resource.RLIM_INFINITY))
    full = [Path(sys.executable).parent/'ptx_prepare', data, out, '--size', '64']
    p = subprocess.run(full, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert p.returncode == 1 and 'the disk is full' in p.stderr and 'Traceback' not in p.stderr, p.stderr
    assert '60 radiographs' in ok('ptx_prepare', data, out, '--size', 64).stdout

def test_broken_and_changed_files(data, tmp_path):
    copy = tmp_path/'data'
    shutil.copytree(data, copy)
    files = sorted(copy.rglob('*.dcm'))
    files[3].write_bytes(b'nothing')
    p = ok('ptx_prepare', copy, tmp_path/'c', '--size', 64)
    assert '59 radiographs' in p.stdout and f'notice: 1 radiograph could not be prepared, left out: {files[3].stem}' in p.stderr
    shutil.copy(data/files[3].relative_to(copy), files[3])
    os.utime(files[4], ns=(5, 5))
    p = ok('ptx_prepare', copy, tmp_path/'c', '--size', 64)
    assert '60 radiographs' in p.stdout and f'1 radiograph has changed since preparation, and is prepared again: {files[4].stem}' in p.stderr
    rows = len(XrayCache(tmp_path/'c').rows)
    shutil.copy(files[0], copy/'0'/'new.dcm')
    with (copy/'train-rle.csv').open('a') as f: f.write('new,-1\n')
    assert '61 radiographs' in ok('ptx_prepare', copy, tmp_path/'c', '--size', 64).stdout and len(XrayCache(tmp_path/'c').rows) == rows+1

@pytest.mark.parametrize('args, why', [(['--size', 8], 'size=8'), (['--fit', 'crop'], "'crop'"), (['--equalize', 'sharpen'], 'no such equalisation'), (['--equalize', 'clahe:clip'], 'key=number')])
def test_wrong_arguments(data, tmp_path, args, why):
    p = ptx('ptx_prepare', data, tmp_path/'c', *args)
    assert p.returncode == 1 and why in p.stderr and 'Traceback' not in p.stderr and not (tmp_path/'c'/'rows.npy').exists()

def test_a_padded_run_predicts_over_the_whole_radiograph(data, tmp_path):
    ok('ptx_prepare', data, tmp_path/'c', '--size', 64, '--fit', 'pad', '--equalize', 'stretch')
    ok('ptx_train', tmp_path/'c', '--out', tmp_path/'run', '--bs', 8, '--epochs', 1, '--arch', 'mobilenetv3_small_050', '--weights', 'none', '--workers', 0)
    ok('ptx_predict', tmp_path/'run', data/'0', '--out', tmp_path/'pred', '--workers', 0)
    assert np.load(tmp_path/'pred'/'maps.npy').shape == (12, 64, 64)
