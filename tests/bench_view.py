"""What a move costs in the reading room, and what two hundred radiographs leave behind: `python tests/bench_view.py RUN FILE [UPLOADS]`

One visitor without a browser: the median time to decide anew after a slider has moved, with its smallest and largest, beside the time to read the radiograph (a bare
`outline` of the same run in the same process is the alternative); then UPLOADS times the same file under other names, with the memory of the process before and after."""
import gc
import os
import statistics
import sys
import time
import warnings
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

def said(what, v, unit='ms', scale=1000): print(f'{what}: {statistics.median(v)*scale:.0f} {unit} ({min(v)*scale:.0f} to {max(v)*scale:.0f}, n={len(v)})')

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    run, f, n = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 200
    page = Page(ReadingRoom(run))
    data = f.read_bytes()
    said('outline of the run, from its folder', taken(lambda k: outline(run, f, '.5,800,.3', tta='hflip'), 3))
    said('to read a radiograph in the room', taken(lambda k: page.take_in({f'{k}.dcm': data}), 5))
    said('to decide anew after a slider has moved', taken(lambda k: setattr(page.top, 'value', round(.02+.009*k, 3)), 100))
    before = memory()
    for k in range(n): page.take_in({f'again-{k}.dcm': data})
    print(f'memory: {before:.0f} MB before, {memory():.0f} MB after {n} more radiographs ({len(page.seen)} kept)')
    page.forget()
