"The reading room: what is said, what is refused, that nothing stays; and, slowly, in a real browser"
import asyncio
import errno
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import ptx
from PIL import Image

pn = pytest.importorskip('panel')

from pneumothorax.masks import read_masks
from pneumothorax.reading import LIMIT, ReadingRoom
from pneumothorax.rle import PtxError, rles_to_mask
from pneumothorax.siim import read_labels
from pneumothorax.view import KEPT, Page, view_server


@pytest.fixture(scope='module')
def room(cv): return ReadingRoom(cv, device='cpu')

@pytest.fixture(scope='module')
def files(phantoms): return sorted((phantoms/'dicom-images-test').rglob('*.dcm'))

@pytest.fixture
def page(room, tmp_path):
    p = Page(room, labels=tmp_path/'mine.csv', decision='.01,0,.005')
    yield p
    p.forget()

def changed(f, **kw):
    ds = pydicom.dcmread(f)
    for k, v in kw.items():
        if v is None: delattr(ds, k)
        else: setattr(ds, k, v)
    b = io.BytesIO()
    ds.save_as(b)
    return b.getvalue()

def png(a):
    b = io.BytesIO()
    Image.fromarray(a).save(b, 'PNG')
    return b.getvalue()

def test_what_is_said_is_what_is_drawn_and_taken(page, files):
    page.take_in({f.name: f.read_bytes() for f in files[:2]})
    r = page.seen[page.now]
    assert list(page.which.options) == [f.name for f in files[:2]] and page.now == files[1].name
    m = r.mask(page.triplet())
    assert (np.asarray(Image.open(page.take('png'))) > 0).sum() == m.sum() > 0
    assert f'{int(m.sum()):,} of its {m.size:,} pixels' in page.facts.object and page.steps.object.area.iloc[-1] > 0
    for k in ('dicomseg', 'sc'): assert pydicom.dcmread(page.take(k)).StudyInstanceUID == pydicom.dcmread(r.path).StudyInstanceUID
    (Path(page.folder)/'s.dcm').write_bytes(page.take('dicomseg').getvalue())
    back = read_masks(Path(page.folder)/'s.dcm', {r.image: r.path})
    assert (rles_to_mask(back.own[0], m.shape) == m).all()
    assert read_labels(io_file(page, 'rle')).has_ptx[0]
    page.top.value, page.area.value = .99, 8000
    assert '>nothing</td>' in page.facts.object and page.sources['lines'].data['xs'] == []
    assert 'nothing is outlined' in page.take('sc').getvalue().decode()

def io_file(page, kind):
    f = Path(page.folder)/'taken.csv'
    f.write_bytes(page.take(kind).getvalue())
    return f

def test_no_patient_is_shown(page, files):
    page.take_in({'a.dcm': changed(files[0], PatientName='Secret^Name', PatientID='secret-7', PatientBirthDate='19501224')})
    said = page.facts.object+page.steps.object.to_string()+page.said.object
    assert 'ecret' not in said and '1950' not in said and b'ecret' not in page.take('png').getvalue()+page.take('rle').getvalue()

BAD = {'text.dcm': (lambda f: b'hello', 'not a DICOM file'), 'empty.dcm': (lambda f: b'', 'empty (0 bytes)'),
    'photo.png': (lambda f: png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), 'a colour image'),
    'nopixels.dcm': (lambda f: changed(f, PixelData=None), 'no pixel data'),
    'cut.dcm': (lambda f: f.read_bytes()[:len(f.read_bytes())//2], 'cut'),
    'frames.dcm': (lambda f: changed(f, NumberOfFrames=2, PixelData=pydicom.dcmread(f).PixelData*2), '2 frames'),
    'large.dcm': (lambda f: bytes(200*10**6), f'200 MB, at most {LIMIT}'),
    'tiny.png': (lambda f: png(np.zeros((8, 8), np.uint8)), 'too few'), 'a&b<i>.dcm': (lambda f: b'hello', 'a&amp;b_i_.dcm: '),
    '\0.dcm': (lambda f: b'hello', '_.dcm: '), '..': (lambda f: b'hello', 'image: '), 300*'ü': (lambda f: b'hello', 120*'ü'+': ')}

@pytest.mark.parametrize('name', BAD)
def test_a_sentence_for_each_bad_file(page, files, name):
    make, why = BAD[name]
    page.take_in({name: make(files[0]), 'good.dcm': files[0].read_bytes()})
    assert (page.said.visible and why in page.said.object and page.folder not in page.said.object
        and '<i>' not in page.said.object), page.said.object
    # the other is read all the same, and of the bad one nothing is left
    assert list(page.seen) == ['good.dcm'] and len(list(Path(page.folder).iterdir())) == 1

def test_draw_first(page, files, tmp_path):
    page.take_in({files[0].name: files[0].read_bytes()})
    page.hide.value = True
    assert (page.facts.object == '' and page.steps.object is None and page.sources['lines'].data['xs'] == []
        and all(b.visible for b in page.buttons.values()))
    page.sources['drawn'].data = {'xs': [[10.5, 30.5, 30.5, 10.5]], 'ys': [[53.5, 53.5, 33.5, 33.5]]}
    page.compare()
    assert page.verdict.object.startswith('Dice 0.') and 'yours 441 px' in page.verdict.object
    page.healthy()
    page.keep()
    t = read_labels(tmp_path/'mine.csv')
    assert len(t) == 1 and rles_to_mask(t.rles[0])[16*11:16*30, 16*11:16*30].all()     # what was kept before is replaced
    (tmp_path/'mine.csv').write_text('image,mask\n')
    page.keep()
    assert 'its first line is not' in page.verdict.object and (tmp_path/'mine.csv').read_text() == 'image,mask\n'
    page.labels = None
    page.healthy()
    assert 'no label file' in page.verdict.object

def test_while_one_draws_ones_own_outline_is_taken_away(page, files):
    page.take_in({files[0].name: files[0].read_bytes()})
    assert not any(f.disabled for f in page.files)
    page.hide.value = True
    assert [f.disabled for f in page.files] == [False, False, True, True]
    assert ('nothing is drawn' in page.take('png').getvalue().decode() and 'nothing is drawn' in page.verdict.object
        and not page.said.visible)
    page.sources['drawn'].data = {'xs': [[10.5, 30.5, 30.5, 10.5]], 'ys': [[53.5, 53.5, 33.5, 33.5]]}
    m = np.asarray(Image.open(page.take('png'))) > 0
    assert m.sum() == 441 and m[10:31, 10:31].all()
    # corners are rounded where a mask becomes larger
    assert abs(rles_to_mask(read_labels(io_file(page, 'rle')).rles[0]).sum()/(441*16**2)-1) < .01
    assert 'can be taken as' in page.take('dicomseg').getvalue().decode()

def test_what_is_not_in_dicom_has_no_dicom_objects(page, files):
    page.take_in({'x.png': png((page.room.read(files[0].read_bytes(), 'x.dcm').x*255).astype(np.uint8))})
    assert [f.disabled for f in page.files] == [False, False, True, True]
    assert 'is no DICOM file, so no DICOM object can refer to it' in page.take('sc').getvalue().decode()

def test_the_mask_begins_where_it_is_decided_at_the_latest(page, files):
    page.take_in({files[0].name: files[0].read_bytes()})
    page.top.value = .3
    page.bottom.value = .8
    assert page.bottom.value == .3 == page.triplet().bottom

def test_what_fails_for_another_reason_is_said_too(page, files, monkeypatch, caplog):
    def broken(*args): raise RuntimeError('out of memory')
    monkeypatch.setattr(page.room, 'read', broken)
    page.take_in({'x.dcm': b''})
    assert 'reading it failed (RuntimeError)' in page.said.object and 'out of memory' in caplog.text

def test_kept_labels_of_any_name_can_be_read(page, files, tmp_path):
    for name in ('a "b", c.png', 'a.png'):
        page.take_in({name: png(np.random.default_rng(len(name)).integers(0, 255, (64, 64), np.uint8))})
        page.healthy()
    t = read_labels(tmp_path/'mine.csv')
    assert t.ImageId.tolist() == ['a _b_, c', 'a'] and not t.has_ptx.any()

def test_two_visitors_and_what_is_left_of_them(room, files):
    pages = [Page(room), Page(room)]
    async def both(): await asyncio.gather(*(p.begin({f.name: f.read_bytes()}) for p, f in zip(pages, files)))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(pn.state, 'execute', lambda f, schedule=None: f())
        asyncio.run(both())
    assert [list(p.seen) for p in pages] == [[f.name] for f in files[:2]]
    for p in pages: p.forget()
    assert not any(Path(p.folder).exists() for p in pages)

def test_the_oldest_are_forgotten(page, files):
    for k in range(KEPT+2): page.take_in({f'{k}.dcm': files[0].read_bytes()})
    assert list(page.seen) == [f'{k}.dcm' for k in range(2, KEPT+2)] and len(list(Path(page.folder).iterdir())) == KEPT

def dropped_in(page, **files):
    "As the browser hands files over, one after the other; one whose kind is text comes as text"
    async def all_of_them():
        for k, v in files.items():
            page.drop.value[f'{k}.dcm'] = v
            page.drop.param.trigger('value')
            await asyncio.sleep(0)
            while page.drop.loading: await asyncio.sleep(.01)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(pn.state, 'execute', lambda f, schedule=None: asyncio.ensure_future(f()) if asyncio.iscoroutinefunction(f) else f())
        asyncio.run(all_of_them())

def test_two_files_of_one_name_and_what_was_wrong_stays_until_it_is_read(room, files):
    page = Page(room, {f.name: f for f in files})
    page.take_in({'same.dcm': files[0].read_bytes()})
    page.take_in({'same.dcm': files[1].read_bytes()})
    page.take_in({'same.dcm': files[2].read_bytes()})
    assert list(page.seen) == ['same.dcm', 'same (2).dcm', 'same (3).dcm'] == list(page.which.options) and page.now == 'same (3).dcm'
    # what is kept of one is not the other's
    assert len({r.path.read_bytes() for r in page.seen.values()}) == len({r.image for r in page.seen.values()}) == 3
    page.take_in({'bad.dcm': b'hello'})
    page.take_in({'good.dcm': files[0].read_bytes()})
    assert 'bad.dcm' in page.said.object and page.said.visible and page.now == 'good.dcm'
    page.which.value = 'same.dcm'
    assert page.now == 'same.dcm' and not page.said.visible
    page.forget()

def test_files_that_are_dropped_are_read_once_and_not_kept_in_memory(room, files):
    page = Page(room)
    dropped_in(page, words='no radiograph', a=files[0].read_bytes(), b=files[1].read_bytes())
    assert page.drop.value == {} and list(page.seen) == ['a.dcm', 'b.dcm'] and page.said.object.count('words.dcm') == 1
    dropped_in(page, a=files[2].read_bytes())
    assert list(page.seen) == ['a.dcm', 'b.dcm', 'a (2).dcm']
    page.forget()

def test_a_sample_that_is_gone(room, files, tmp_path):
    shutil.copy(files[0], tmp_path/'s.dcm')
    page = Page(room, {'s.dcm': tmp_path/'s.dcm', 't.dcm': tmp_path/'t.dcm'})
    page.take_in(page.samples)
    assert list(page.seen) == ['s.dcm'] and 't.dcm: cannot be read now (No such file or directory)' in page.said.object
    page.forget()

def test_runs_that_are_gone(cv, files, tmp_path):
    "What was loaded goes on"
    shutil.copytree(cv, tmp_path/'cv')
    p = Page(ReadingRoom(tmp_path/'cv', device='cpu'))
    shutil.rmtree(tmp_path/'cv')
    p.take_in({files[0].name: files[0].read_bytes()})
    assert list(p.seen) == [files[0].name] and not p.said.visible
    p.forget()

def free():
    "A port that nobody has"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def reachable():
    "Can a machine speak to itself? A sandbox without any network, not even that of its own, can't"
    with socket.create_server(('127.0.0.1', 0)) as s, suppress(OSError):
        socket.create_connection(s.getsockname(), timeout=10).close()
        return True

def answer(port, server):
    "The page, once the server is there"
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({}))     # a proxy is for others
    for _ in range(1200):
        with suppress(OSError): return ask.open(f'http://127.0.0.1:{port}/', timeout=30).read().decode()
        if server.poll() is not None: return
        time.sleep(.1)

@pytest.fixture(scope='module')
def site(cv):
    "A server of its own process, as a user starts it: address, file of outlines, page"
    if not reachable(): pytest.skip('no network, not even of this machine alone')
    port, kept, log = free(), cv.parent/'kept.csv', cv.parent/'view.log'
    how = '--port', str(port), '--triplet', '.01,0,.005', '--keep', kept, '--no_browser'
    with open(log, 'w') as f: p = subprocess.Popen([Path(sys.executable).parent/'ptx_view', cv, *how], stdout=f, stderr=f)
    try:
        page = answer(port, p)
        assert page, log.read_text()
        yield f'http://127.0.0.1:{port}/', kept, page
    finally: p.terminate()

def test_the_server_answers(site): assert 'Reading room' in site[2]

def test_the_server_serves_a_page_on_this_machine_alone(cv, monkeypatch):
    served = []
    monkeypatch.setattr(pn, 'serve', lambda panels, **kw: served.append((panels, kw)))
    view_server(cv, 5007, device='cpu', show=False)
    with pytest.warns(UserWarning, match='let in whoever reaches them'): view_server(cv, 5007, '0.0.0.0', device='cpu', show=False)
    assert ([(kw['address'], kw['websocket_origin']) for _, kw in served]
        == [('127.0.0.1', ['127.0.0.1:5007', 'localhost:5007']), ('0.0.0.0', '*')])

def pages_of(monkeypatch, n, *args, fails=None, do=lambda pages: None, **kw):
    "Pages of visitors to a server that is then stopped, and their folders while it ran"
    out = []
    def serve(panels, **kw):
        out.extend(panels['']() for _ in range(n))
        out.append(set(Path(tempfile.gettempdir()).glob(f'ptx-view-{os.getpid()}-*')))
        do(out[:n])
        if fails: raise fails
    monkeypatch.setattr(pn, 'serve', serve)
    view_server(*args, device='cpu', show=False, **kw)
    return out[:n], out[n]

def test_each_visitor_has_a_page_and_nothing_of_it_stays_when_the_server_stops(cv, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    (tmp_path/'ptx-view-999999999-x').mkdir()     # of a server that was killed
    (a, b), there = pages_of(monkeypatch, 2, cv)
    assert a is not b and len(list(a.select(pn.widgets.FileDropper))) == 1
    assert len(there) == 2 and not list(tmp_path.glob('ptx-view-*'))
    with pytest.raises(KeyboardInterrupt): pages_of(monkeypatch, 1, cv, fails=KeyboardInterrupt())
    assert not list(tmp_path.glob('ptx-view-*'))
    with pytest.raises(PtxError, match='port=5006: something else answers there'):
        pages_of(monkeypatch, 0, cv, fails=OSError(errno.EADDRINUSE, 'in use'))

def test_samples_can_be_picked(cv, files, monkeypatch, tmp_path):
    for k, f in enumerate(files[:2]): shutil.copy(f, tmp_path/f's{k}.dcm')
    (tmp_path/'again').mkdir()
    shutil.copy(files[0], tmp_path/'again'/'s0.dcm')
    def pick(pages):
        pick, which = [next(s for s in pages[0].select(pn.widgets.Select) if s.name == n) for n in ('or a sample', 'radiograph')]
        assert pick.options == ['', 's0.dcm', 's1.dcm']
        async def picked():
            pick.value = 's1.dcm'
            while not which.options: await asyncio.sleep(.01)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(pn.state, 'execute', lambda f, schedule=None: asyncio.ensure_future(f()) if asyncio.iscoroutinefunction(f) else f())
            asyncio.run(asyncio.wait_for(picked(), 60))
        assert which.value == 's1.dcm'
    with pytest.warns(UserWarning, match='identifier of another one'): pages_of(monkeypatch, 1, cv, samples=tmp_path, do=pick)

def test_the_command(phantoms):
    for args, why in ((('nowhere',), 'no such file or folder'), ((phantoms,), 'run.json')):
        p = ptx('ptx_view', *args, '--no_browser')
        assert p.returncode == 1 and why in p.stderr and 'Traceback' not in p.stderr, p.stderr

# --- in a browser

@pytest.fixture(scope='module')
def browser():
    sync = pytest.importorskip('playwright.sync_api', reason='no playwright; install pneumothorax[browser]')
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not chromium: pytest.skip('no Chromium; it is in the Debian package chromium')
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()

def visit(browser, url, wide=1360):
    "A page, what it complained of, and what it asked of others than its server"
    page, wrong = browser.new_page(viewport={'width': wide, 'height': 900}, accept_downloads=True), []
    page.on('console', lambda m: wrong.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.on('request', lambda r: wrong.append(r.url) if not r.url.startswith((url, url.replace('http', 'ws'), 'data:', 'blob:')) else None)
    page.goto(url)
    page.wait_for_selector('input[type=file]', state='attached', timeout=60_000)
    time.sleep(1)
    return page, wrong

def dropped(page, *files):
    page.set_input_files('input[type=file]', [str(f) for f in files])
    page.wait_for_selector('text=highest probability', timeout=60_000)
    time.sleep(1)

@pytest.mark.slow
def test_a_visit(site, browser, files, tmp_path):
    "Load, drop, move a slider, take away, hide, draw, compare, keep"
    url, kept, _ = site
    page, wrong = visit(browser, url)
    dropped(page, files[0])
    assert 'pixels' in page.locator('table').first.inner_text()
    top = page.locator('.noUi-handle').nth(3)     # the window has two, strength one
    top.focus()
    for _ in range(60): top.press('ArrowRight')
    page.wait_for_selector('td:text-is("nothing")')
    for _ in range(60): top.press('ArrowLeft')
    page.wait_for_selector('td:has-text("pixels")')
    for text, name in (('mask as PNG', 'm.png'), ('run-length', 'r.csv'), ('DICOM segmentation', 's.dcm'), ('DICOM capture', 'c.dcm')):
        with page.expect_download() as d: page.get_by_text(text).click()
        d.value.save_as(tmp_path/name)
    m = np.asarray(Image.open(tmp_path/'m.png')) > 0
    back = read_masks(tmp_path/'s.dcm', {files[0].stem: files[0]})
    assert m.ndim == 2 and m.any() and (rles_to_mask(back.own.iloc[0], m.shape) == m).all()
    assert (len(read_labels(tmp_path/'r.csv')) == 1
        and pydicom.dcmread(tmp_path/'c.dcm').SOPClassUID.name == 'Secondary Capture Image Storage')
    page.get_by_role('button', name='hide the prediction').click()
    page.wait_for_selector('button:has-text("compare")')
    page.wait_for_selector('text=highest probability', state='detached')
    box = page.locator('canvas').first.bounding_box()
    x, y, s = box['x']+box['width']/2, box['y']+box['height']/2, box['width']/6
    page.mouse.move(x, y)
    page.mouse.down()
    for dx, dy in ((s, 0), (s, s), (0, s), (0, 0)): page.mouse.move(x+dx, y+dy, steps=8)
    page.mouse.up()
    time.sleep(.5)
    page.get_by_role('button', name='compare').click()
    page.wait_for_selector('text=in both')
    page.get_by_role('button', name='keep my outline').click()
    page.wait_for_selector('text=kept in kept.csv')
    assert read_labels(kept).has_ptx.tolist() == [True] and not wrong, wrong
    page.close()

@pytest.mark.slow
def test_two_visitors_a_bad_file_and_a_telephone(site, browser, files, tmp_path):
    (tmp_path/'bad.dcm').write_bytes(b'hello')
    (a, wa), (b, wb) = visit(browser, site[0]), visit(browser, site[0], 390)
    a.set_input_files('input[type=file]', str(tmp_path/'bad.dcm'))     # by itself: nothing follows that would bring the words along
    a.wait_for_selector('text=not a DICOM file', timeout=20_000)
    dropped(a, files[0])
    dropped(b, files[1])
    assert a.locator('text=not a DICOM file').count() and not b.locator('text=not a DICOM file').count()
    assert b.evaluate('document.documentElement.scrollWidth') <= 390     # nothing sticks out
    assert b.locator('canvas').first.bounding_box()['y'] < b.locator('.noUi-handle').first.bounding_box()['y']
    assert not wa and not wb
    for p in (a, b): p.close()
