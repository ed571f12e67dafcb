"The cache: killed, disturbed, moved, cut off, and on a disk that is full"
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ok, ptx

from pneumothorax import cache
from pneumothorax.cache import XrayCache, prepare, prepare_row
from pneumothorax.data import xray_dls, xray_stats
from pneumothorax.equalize import equalizer
from pneumothorax.phantom import make_phantoms
from pneumothorax.rle import PtxError
from pneumothorax.siim import PtxNotice, find_siim, siim_train


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Sixty radiographs under other names: twelve phantoms, each five times"
    out = tmp_path_factory.mktemp('many')
    sample = make_phantoms(out/'sample', n=12, size=256, n_test=0, positive=.5, progress=False)
    rows = (sample/'train-rle.csv').read_text().splitlines()
    for k in range(5):
        for f in sample.rglob('*.dcm'):
            (out/'data'/f'{k}').mkdir(parents=True, exist_ok=True), shutil.copy(f, out/'data'/f'{k}'/f'{k}-{f.name}')
    (out/'data'/'train-rle.csv').write_text('\n'.join([rows[0], *(f'{k}-{r}' for k in range(5) for r in rows[1:])])+'\n')
    return out/'data'

def start(*args):
    return subprocess.Popen([Path(sys.executable).parent/'ptx_prepare', *map(str, args)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True)

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
    assert ('60 radiographs' in p.stdout
        and f'1 radiograph has changed since preparation, and is prepared again: {files[4].stem}' in p.stderr)
    rows = len(XrayCache(tmp_path/'c').rows)
    shutil.copy(files[0], copy/'0'/'new.dcm')
    with (copy/'train-rle.csv').open('a') as f: f.write('new,-1\n')
    assert '61 radiographs' in ok('ptx_prepare', copy, tmp_path/'c', '--size', 64).stdout and len(XrayCache(tmp_path/'c').rows) == rows+1

def test_some_rows_of_a_table(phantoms, tmp_path):
    "Chosen by the user, in any order, with the numbers they had"
    df = siim_train(phantoms).sort_values('ImageId', ascending=False)
    c = prepare(df[df.has_ptx], tmp_path/'c', 32, workers=0, progress=False)
    assert sorted(c.table.ImageId) == sorted(df.ImageId[df.has_ptx])
    for r in c.table.itertuples(): np.testing.assert_array_equal(c.image(r.row), cache.from_grey16(prepare_row(r.path, [], 32)['image']))

@pytest.mark.parametrize('args, why', [(['--size', 8], '--size 8'), (['--fit', 'crop'], '--fit crop'),
    (['--equalize', 'sharpen'], 'no such equalisation'), (['--equalize', 'clahe:clip'], 'key=number')])
def test_wrong_arguments(data, tmp_path, args, why):
    p = ptx('ptx_prepare', data, tmp_path/'c', *args)
    assert p.returncode == 1 and why in p.stderr and 'Traceback' not in p.stderr and not (tmp_path/'c'/'rows.npy').exists()

def test_a_padded_run_predicts_over_the_whole_radiograph(data, tmp_path):
    ok('ptx_prepare', data, tmp_path/'c', '--size', 64, '--fit', 'pad', '--equalize', 'stretch')
    ok('ptx_train', tmp_path/'c', '--out', tmp_path/'run', '--bs', 8, '--epochs', 1, '--encoder', 'mobilenetv3_small_050',
        '--weights', 'none', '--workers', 0)
    ok('ptx_predict', tmp_path/'run', data/'0', '--out', tmp_path/'pred', '--workers', 0)
    assert np.load(tmp_path/'pred'/'maps.npy').shape == (12, 64, 64)

# --- two runs, and processes of every kind

def outcome(p):
    "Exit code and what a command said"
    return p.wait(), (p.stderr.read() if p.stderr else '')

def both(data, out):
    return subprocess.Popen([Path(sys.executable).parent/'ptx_prepare', str(data), str(out), '--size', '64'], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True)

def test_two_runs_at_once(data, tmp_path):
    ok('ptx_prepare', data, tmp_path/'whole', '--size', 64)
    want = (tmp_path/'whole'/'rows.npy').read_bytes()
    out = tmp_path/'c'
    first = both(data, out)
    while not done(out) and first.poll() is None: time.sleep(.002)
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGSTOP)   # in the middle, with the lock
    n = done(out)
    try: code, said = outcome(both(data, out))
    finally: os.killpg(first.pid, signal.SIGCONT)
    assert 0 < n < 60 and code == 1 and 'another ptx_prepare' in said and 'Traceback' not in said
    assert outcome(first) == (0, '') and (out/'rows.npy').read_bytes() == want
    shutil.rmtree(out)
    ends = [outcome(p) for p in [both(data, out), both(data, out)]]   # and both in the same moment
    assert sorted(code for code, _ in ends) in ([0, 0], [0, 1]) and not any('Traceback' in said for _, said in ends)
    assert (out/'rows.npy').read_bytes() == want

SCRIPT = """
import multiprocessing, os, sys, time
from pathlib import Path
from pneumothorax.cache import prepare
def slow(x):
    Path(sys.argv[3], str(os.getpid())).touch()
    time.sleep(float(sys.argv[4]))
    return x
if __name__ == '__main__':
    multiprocessing.set_start_method(sys.argv[5])
    print(len(prepare(sys.argv[1], sys.argv[2], 64, before=slow, progress=False)))
"""

def alive(pid):
    "Is this process at work?"
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except OSError: return False

@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks processes up in /proc')
@pytest.mark.parametrize('method', ['fork', 'spawn', 'forkserver'])
def test_every_way_of_making_processes(phantoms, tmp_path, method):
    (tmp_path/'s.py').write_text(SCRIPT)
    (tmp_path/'pids').mkdir()
    run = lambda seconds: subprocess.Popen([sys.executable, tmp_path/'s.py', phantoms, tmp_path/'c', tmp_path/'pids', str(seconds), method],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p = run(30)
    while len(pids := list((tmp_path/'pids').iterdir())) < 2 and p.poll() is None: time.sleep(.02)
    assert p.poll() is None, p.communicate()
    p.kill()   # the workers must leave with it, and the lock be free
    p.communicate()
    end = time.monotonic()+20
    while any(alive(f.name) for f in pids) and time.monotonic() < end: time.sleep(.02)
    assert not any(alive(f.name) for f in pids)
    said, errors = run(0).communicate()
    assert said == '12\n', errors

# --- what a row depends on

@pytest.fixture
def sample(phantoms, tmp_path): return Path(shutil.copytree(phantoms, tmp_path/'sample'))

def again(data, out, **kwargs):
    "Prepare in this process; gives the cache, the notices and the names of the radiographs that were decoded"
    read = []
    with pytest.MonkeyPatch.context() as m, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        m.setattr(cache, 'prepare_row', lambda path, *args: (read.append(Path(path).stem), prepare_row(path, *args))[1])
        return prepare(data, out, 64, workers=0, progress=False, **kwargs), [str(w.message) for w in said if w.category is PtxNotice], read

def test_another_spelling_or_place_of_the_data_is_no_change(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c, said, read = again('sample', 'c')
    assert (len(c), said, len(read)) == (12, [], 12) and all(Path(p).is_absolute() for p in c.table.path)
    assert again(sample, tmp_path/'c')[1:] == again(sample/'..'/'sample', 'c')[1:] == ([], [])
    monkeypatch.chdir(sample.rename(tmp_path/'moved'))
    c, said, read = again('.', '../c')
    assert (len(c), said, read) == (12, [], []) and all(Path(p).is_file() for p in c.table.path)

def test_any_identifier_is_kept(sample, tmp_path):
    files, names = sorted((sample/'dicom-images-train').rglob('*.dcm')), ['NA', 'null', 'nan', '007', '7', 'None', 'x,y']
    (tmp_path/'odd').mkdir()
    for f, n in zip(files, names): shutil.copy2(f, tmp_path/'odd'/f'{n}.dcm')
    (tmp_path/'odd'/'train.csv').write_text('ImageId,EncodedPixels\n'+''.join(f'"{n}",-1\n' for n in names))
    for _ in range(2):
        c, said, read = again(tmp_path/'odd', tmp_path/'c')
        assert sorted(c.table.ImageId) == sorted(names) and len(c.rows) == len(names) and not said
    assert not read

def test_radiographs_that_come_back_have_their_rows(sample, tmp_path):
    c = again(sample, tmp_path/'c')[0]
    gone = Path(c.table.path[3])
    gone.rename(tmp_path/'gone.dcm')
    less, said, read = again(sample, tmp_path/'c')
    assert gone.stem not in set(less.table.ImageId) and len(less) == 11 and not read and any('no longer in the data' in s for s in said)
    shutil.copy2(c.table.path[0], gone.with_name('new.dcm'))
    with (sample/'train-rle.csv').open('a') as f: f.write('new,-1\n')
    assert again(sample, tmp_path/'c')[2] == ['new']
    (tmp_path/'gone.dcm').rename(gone)
    back, said, read = again(sample, tmp_path/'c')
    assert (len(back), len(back.rows), said, read) == (13, 13, [], []) and back.table.row[back.table.ImageId == gone.stem].item() == 3
    pd.testing.assert_frame_equal(back.table[:12], c.table, check_dtype=False)

# --- before the resize

def half(x): return x/2
def too_much(x): return 3*x-1
def nothing(x): return x*np.float32(np.nan)

def test_what_before_gives_is_looked_at(sample, tmp_path):
    c = again(sample, tmp_path/'c', before=too_much)[0]
    bare = again(sample, tmp_path/'bare')[0]
    x, y = (k.image(k.table.row[0]) for k in (c, bare))
    assert x[y < .2].max() == 0 and x[y > .8].min(initial=1) > .99   # 65535 and 0 where they wrap
    with pytest.raises(PtxError, match='no numbers'): again(sample, tmp_path/'n', before=nothing)

def test_a_function_is_known_by_its_name(sample, tmp_path):
    for _ in range(2): c, _, read = again(sample, tmp_path/'c', before=half)
    assert c.settings['before'] == f'{__name__}.half' and not read
    with pytest.raises(PtxError, match='no name'): again(sample, tmp_path/'d', before=lambda x: x)

def test_a_random_equalisation_is_refused(phantoms, tmp_path):
    with pytest.raises(PtxError, match='random'): prepare(phantoms, tmp_path/'c', 64, before=equalizer('clahe:p=0.5'))
    p = ptx('ptx_prepare', phantoms, tmp_path/'c', '--equalize', 'clahe:p=0.5')
    assert p.returncode == 1 and 'random' in p.stderr and 'Traceback' not in p.stderr and not (tmp_path/'c').exists()

# --- folders that are broken, or no place for a cache

def cut(f, share=.5): f.write_bytes(f.read_bytes()[:int(f.stat().st_size*share)])
def drop_line(f): f.write_text(''.join(f.read_text().splitlines(keepends=True)[:-1]))
def to_format(n):
    def f(out): (out/'cache.json').write_text(json.dumps({**json.loads((out/'cache.json').read_text()), 'format': n}))
    return f

# what happens to a cache, what opening it says, and what another run says ('' if it mends it)
BROKEN = {
    'killed before the index': (lambda d: [(d/n).unlink() for n in ('index.csv', 'rows.npy')], 'index.csv: missing', ''),
    'no index': (lambda d: (d/'index.csv').unlink(), 'index.csv: missing', ''),
    'half an index': (lambda d: cut(d/'index.csv'), 'index.csv: not the index', 'remove this file'),
    'a line short': (lambda d: drop_line(d/'index.csv'), '11 lines for 12 rows', ''),
    'empty index': (lambda d: cut(d/'index.csv', 0), 'index.csv: not the index', 'remove this file'),
    'no array': (lambda d: (d/'rows.npy').unlink(), 'rows.npy: No such file', ''),
    'half an array': (lambda d: cut(d/'rows.npy'), 'cut short', 'remove this file'),
    'empty array': (lambda d: cut(d/'rows.npy', 0), 'not the array', 'remove this file'),
    'half the settings': (lambda d: cut(d/'cache.json'), 'not the settings', 'prepare again'),
    'a list of settings': (lambda d: (d/'cache.json').write_text('[]'), 'cache format None', 'prepare again'),
    'format 1': (to_format(1), 'cache format 1', 'prepare again'),
}

@pytest.mark.parametrize('what', BROKEN)
def test_a_broken_cache_says_what_to_do(sample, tmp_path, what):
    harm, why, remedy = BROKEN[what]
    c = again(sample, tmp_path/'c')[0]
    want = (c.path/'rows.npy').read_bytes()
    harm(c.path)
    for use in (XrayCache, lambda p: xray_dls(p, workers=0)):
        with pytest.raises(PtxError) as e: use(c.path)
        assert why in str(e.value) and 'again' in str(e.value)
    if remedy:
        with pytest.raises(PtxError, match=remedy) as e: again(sample, c.path)
        if remedy == 'prepare again': shutil.rmtree(c.path)
        else: Path(str(e.value).split(': ')[0]).unlink()
    assert len(again(sample, c.path)[0]) == 12 and (c.path/'rows.npy').read_bytes() == want

def test_a_broken_cache_on_the_command_line(sample, tmp_path):
    c = again(sample, tmp_path/'c')[0]
    (c.path/'index.csv').unlink()
    p = ptx('ptx_train', c.path, '--out', tmp_path/'run')
    assert p.returncode == 1 and 'run ptx_prepare again' in p.stderr and 'Traceback' not in p.stderr

def test_places_where_nothing_can_be_written(sample, tmp_path):
    (tmp_path/'file').touch()
    (tmp_path/'c'/'.lock').mkdir(parents=True)
    for out in (tmp_path/'file'/'c', tmp_path/'c', *([Path('/proc/c8')] if Path('/proc').exists() else [])):
        with pytest.raises(PtxError, match='cannot be written'): prepare(sample, out, 64, workers=0, progress=False)
    p = ptx('ptx_prepare', sample, tmp_path/'d', '--workers', -1)
    assert p.returncode == 1 and '--workers -1' in p.stderr and 'Traceback' not in p.stderr

def test_an_image_twice_in_a_table_is_refused(sample, tmp_path):
    df = siim_train(sample)
    with pytest.raises(PtxError, match='more than once'): again(df.assign(ImageId=df.ImageId[0]), tmp_path/'c')

# --- statistics

def test_statistics_of_a_cache_and_of_a_folder_without_labels(sample, tmp_path):
    c = again(sample, tmp_path/'c')[0]
    with pytest.raises(PtxError, match='resized already'): xray_stats(c, 'clahe', before=True, workers=0)
    assert xray_stats(str(c.path), size=64, workers=0).norm() == xray_stats(c, size=64, workers=0).norm()
    bare = tmp_path/'bare'
    bare.mkdir()
    for f in c.table.path[:3]: shutil.copy(f, bare)
    s = xray_stats(bare, size=64, workers=0)
    assert len(s.images) == 3 and s.images.coverage.isna().all() and (s.images.error == '').all()

def test_other_settings_are_said_in_words(sample, tmp_path, capsys):
    "Which the cache has, and which are asked for: no dictionary of Python"
    again(sample, tmp_path/'c', before=equalizer('clahe:clip=3,grid=4'))
    with pytest.raises(PtxError,
            match=re.escape('that is equalised by CLAHE(clip=3.0, grid=4), and what is asked for is not equalised; ask for the same')):
        again(sample, tmp_path/'c')
    with pytest.raises(PtxError, match=r'equalised by CLAHE.*, and what is asked for is equalised by HistEqualize\('):
        again(sample, tmp_path/'c', before=equalizer('hist'))
    with pytest.raises(PtxError, match='that is size 64, and what is asked for is size 32;'):
        prepare(sample, tmp_path/'c', 32, before=equalizer('clahe:clip=3,grid=4'), workers=0, progress=False)

def test_one_radiograph_is_counted_in_the_singular(sample, tmp_path):
    one = siim_train(sample).iloc[:1]
    assert ': 1 radiograph, 64 px' in repr(prepare(one, tmp_path/'c', 64, workers=0, progress=False))
    assert str(xray_stats(one, size=64, workers=0)).startswith('1 radiograph (0 broken)')
    (tmp_path/'one').mkdir()
    shutil.copy(one.path.iloc[0], tmp_path/'one')
    assert ': 1 radiograph, 0 of them' in repr(find_siim(tmp_path/'one', labels=next(sample.rglob('train-rle.csv'))))
