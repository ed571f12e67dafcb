"""What a move costs in the reading room, and what two hundred radiographs leave behind: `python tests/bench_view.py RUN FILE [UPLOADS]`

One visitor without a browser: the median time to decide anew after a slider has moved, with its smallest and largest, beside the time to
read the radiograph (a bare `outline` of the same run in the same process is the alternative); then UPLOADS times the same file under other
names, with the memory of the process before and after. With Chromium and playwright the same move in a browser: from the key that moves the
slider to the words on the page that follow from it."""
import gc
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from pneumothorax.reading import ReadingRoom
from pneumothorax.show import outline
from pneumothorax.view import Page


def memory():
    "Resident, in megabytes"
    gc.collect()
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e6

def taken(f, n):
    "Seconds of each call"
    out = []
    for k in range(n):
        t = time.perf_counter()
        f(k)
        out.append(time.perf_counter()-t)
    return out

def in_a_browser(run, f, n=50):
    "Seconds from key to words, n times"
    from playwright.sync_api import sync_playwright
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    server = subprocess.Popen([Path(sys.executable).parent/'ptx_view', run, '--port', str(port), '--triplet', '.06,0,.03', '--no_browser'],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with sync_playwright() as p:
            page = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox']).new_page()
            for _ in range(300):
                with suppress(Exception): page.goto(f'http://127.0.0.1:{port}/')
                if page.title() == 'Reading room': break
                time.sleep(.1)
            page.set_input_files('input[type=file]', str(f))
            words = page.locator('table', has_text='highest probability').first
            words.wait_for(timeout=60_000)
            bottom = page.locator('.noUi-handle').nth(5)
            bottom.focus()
            def move(k):
                was = words.inner_text()
                bottom.press('ArrowRight' if k%2 else 'ArrowLeft')
                for _ in range(2000):
                    if words.inner_text() != was: return
                sys.exit(f'the words stay: {was}')
            time.sleep(2)
            return taken(move, n)
    finally: server.terminate()

def said(what, v, unit='ms', scale=1000):
    print(f'{what}: {statistics.median(v)*scale:.0f} {unit} ({min(v)*scale:.0f} to {max(v)*scale:.0f}, n={len(v)})')

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    run, f, n = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 200
    page = Page(ReadingRoom(run))
    data = f.read_bytes()
    said('outline of the run, from its folder', taken(lambda k: outline(run, f, '.5,800,.3', tta='hflip'), 3))
    said('to read a radiograph in the room', taken(lambda k: page.take_in({f'{k}.dcm': data}), 5))
    said('to decide anew after a slider has moved', taken(lambda k: setattr(page.top, 'value', round(.02+.009*k, 3)), 100))
    if shutil.which('chromium') and find_spec('playwright'): said('the same in a browser, from key to words', in_a_browser(run, f))
    before = memory()
    for k in range(n): page.take_in({f'again-{k}.dcm': data})
    print(f'memory: {before:.0f} MB before, {memory():.0f} MB after {n} more radiographs ({len(page.seen)} kept)')
    page.forget()
