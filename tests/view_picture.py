"""The picture of the reading room, images/view.jpg: `python tests/view_picture.py RUN FILE` with Chromium and playwright; RUN and FILE of
`make demo`

A radiograph of the test part of the sample is dropped, and the layer of probabilities laid over it."""
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

OUT = Path(__file__).resolve().parents[1]/'images'/'view.jpg'

if __name__ == '__main__':
    with socket.create_server(('127.0.0.1', 0)) as s: url = f'http://127.0.0.1:{s.getsockname()[1]}/'
    server = subprocess.Popen([Path(sys.executable).parent/'ptx_view', sys.argv[1], '--port', url[17:-1], '--no_browser'])
    try:
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(url).close()
                break
            time.sleep(.1)
        with sync_playwright() as p:
            page = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox']).new_page(
                viewport={'width': 1360, 'height': 900})
            page.goto(url)
            page.set_input_files('input[type=file]', sys.argv[2])
            page.wait_for_selector('text=highest probability')
            page.get_by_text('probability', exact=True).click()
            time.sleep(2)
            Image.open(io.BytesIO(page.screenshot())).convert('RGB').save(OUT, quality=85)
    finally: server.terminate()
    print(f'{OUT.name}: {OUT.stat().st_size/1e3:.0f} kB')
