"How the notebooks read: rhythm, prose, documented parameters, size; what is exported; README and index"
import ast
import base64
import builtins
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import readme
from conftest import ROOT
from lessons import LONGEST, SOON, WIDE, hidden, lesson
from PIL import Image

NBS = sorted((ROOT/'nbs').glob('*.ipynb'))
MODULE = re.compile(r'^#\|\s*default_exp\s+(\w+)', re.MULTILINE)

def cells(f): return nbformat.read(f, as_version=4).cells
def exported(c): return c.cell_type == 'code' and re.search(r'^#\|\s*export', c.source, re.MULTILINE) is not None
def example(c): return c.cell_type == 'code' and not exported(c)

def tree(c):
    "Syntax of a code cell, without magics"
    return ast.parse('\n'.join(line for line in c.source.splitlines() if not line.startswith(('%', '!'))))

def only_imports(c): return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree(c).body)
def prose(cs): return '\n'.join(c.source for c in cs if c.cell_type == 'markdown')

# Each check takes the cells of a notebook and returns complaints, so that it can be shown to fail

def rhythm(cs):
    "Examples follow exported cells, and at most two exported cells stand in a row"
    out = [cs[i+2].source[:60] for i in range(len(cs)-2) if all(exported(c) for c in cs[i:i+3])]
    out = [f'three exported cells in a row, the third: {s}' for s in out]
    work = [i for i, c in enumerate(cs) if exported(c) and not only_imports(c)]
    shown = sum(i+1 < len(cs) and example(cs[i+1]) for i in work)
    if work and shown < .4*len(work): out.append(f'{shown} of {len(work)} exported cells are followed at once by an example or a test')
    return out

def words(cs):
    "80 words of prose for each exported cell"
    n, w = sum(exported(c) and not only_imports(c) for c in cs), len(prose(cs).split())
    return [f'{w} words for {n} exported cells'] if w < 80*n else []

def public(cs):
    "Public functions and classes of the exported cells, with the lines of their cell"
    return [(n, c.source) for c in cs if exported(c) for n in tree(c).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]

def beside(cs):
    "Prose names every public function and class"
    text = ' '.join(re.findall(r'`[^`\n]+`', prose(cs)))
    return [f'no prose speaks of `{n.name}`' for n, _ in public(cs) if not re.search(rf'\b{n.name}\b', text)]

def commented(source):
    "Lines of code that end with a comment"
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}

def undocumented(f, source, where):
    "What a signature lacks: types, comments, a docstring"
    lines = commented(source)
    args = [a for a in f.args.posonlyargs+f.args.args+f.args.kwonlyargs if a.arg not in ('self', 'cls')]
    ends = [a.end_lineno for a in args]
    out = [] if ast.get_docstring(f) or f.name.startswith('__') else [f'{where}: no docstring']
    for a in args:
        if a.annotation is None: out.append(f'{where}: {a.arg} has no type')
        if a.end_lineno not in lines or ends.count(a.end_lineno) > 1: out.append(f'{where}: {a.arg} has no comment of its own')
    return out

# fastai prescribes these signatures
PRESCRIBED = {'show_batch', 'show_results', 'plot_top_losses', 'show', 'affine_coord', 'extra_repr'}

def docments(cs):
    "Every parameter of what is public has a type and a comment, everything public a docstring"
    out = []
    for n, source in public(cs):
        funcs = [n]
        if isinstance(n, ast.ClassDef):
            if not ast.get_docstring(n): out.append(f'{n.name}: no docstring')
            funcs = [f for f in n.body if isinstance(f, ast.FunctionDef) and (f.name == '__init__' or not f.name.startswith('_'))]
        for f in funcs:
            if f.name in PRESCRIBED: continue
            out += undocumented(f, source, f.name if f is n else f'{n.name}.{f.name}')
    return out

def imports(cs):
    "Exported code imports the package by its name, never nbdev"
    out = []
    for c in filter(exported, cs):
        for n in ast.walk(tree(c)):
            names = [n.module or ''] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names] if isinstance(n, ast.Import) else []
            out += [f'exported code imports {m}' for m in names if m.split('.')[0] in ('nbdev', 'execnb', 'pytest')]
    return out

CHECKS = rhythm, words, beside, docments, imports

@pytest.mark.parametrize('check', CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('nb', [f for f in NBS if any(map(exported, cells(f)))], ids=lambda f: f.stem)
def test_notebook_style(nb, check):
    complaints = check(cells(nb))
    assert not complaints, '\n'.join([nb.name, *complaints])

def test_each_check_can_fail():
    v4 = nbformat.v4
    bad = v4.new_code_cell('#| export\ndef area(mask, size:int): return 0\nimport nbdev')
    fine = [v4.new_markdown_cell('`area` counts. ' + 'word '*80),
        v4.new_code_cell('#| export\ndef area(\n    mask:list, # rows\n)->int: # pixels\n    "Count"\n    return 0'),
        v4.new_code_cell('area([])')]
    for check in CHECKS:
        assert check([bad]*3), check.__name__
        assert not check(fine), check.__name__
    assert len(docments([bad])) == 4   # no docstring, no type, and two parameters without a comment

def shortcomings(cs):
    "What keeps cells from being a lesson"
    r = lesson(cs)
    return [text for wrong, text in (
        (not 0 < r.first <= SOON, f'the first result comes after {r.first or "all"} visible cells, {SOON} are allowed'),
        (sum(w >= WIDE for w in r.widths) < 2, f'figures of {r.widths} pixels, two of {WIDE} are asked for'),
        (r.columns > LONGEST, f'a line of code of {r.columns} columns, {LONGEST} are allowed'),
        (not r.ends, 'the last cell does not say what to remember and two things to try, with hidden answers')) if wrong]

@pytest.mark.parametrize('nb', NBS, ids=lambda f: f.stem)
def test_a_notebook_is_a_lesson(nb): assert not shortcomings(cells(nb))

def test_shortcomings_of_a_lesson_are_found():
    v4, wide = nbformat.v4, io.BytesIO()
    Image.new('L', (WIDE, 8)).save(wide, 'PNG')
    picture = v4.new_output('display_data', data={'image/png': base64.b64encode(wide.getvalue()).decode()})
    shown = v4.new_code_cell('show(x)', outputs=[picture, picture])
    end = v4.new_markdown_cell('## What to remember\n\n## Try it\n\n' + '<details>'*2)
    dull = [v4.new_code_cell('x = 0')]*SOON
    title = v4.new_markdown_cell('# title')
    assert not shortcomings([title, shown, end])
    late, endless = shortcomings([title, *dull, shown, end]), shortcomings([title, shown])
    plain = shortcomings([title, v4.new_markdown_cell('| a |\n|---|'), end])
    long = shortcomings([title, shown, v4.new_code_cell('x'*(LONGEST+1)), end])
    assert [len(c) for c in (late, plain, long, endless)] == [1]*4 and late[0].startswith('the first') and plain[0].startswith('figures')

@pytest.mark.parametrize('nb', NBS, ids=lambda f: f.stem)
def test_a_notebook_does_not_silence_the_next(nb):
    "nbdev_test may run all of them in one process; a filter for everything has to be taken back"
    lines = [line for c in cells(nb) if c.cell_type == 'code' for line in c.source.splitlines()]
    assert not any(line.startswith('warnings.simplefilter(') for line in lines) or any('.__exit__(None' in line for line in lines)

def test_names_of_cells_are_told_apart():
    "As they stand in the file: nbformat would rename them while reading"
    names = {f.name: [c['id'] for c in json.loads(f.read_text(encoding='utf-8'))['cells']] for f in NBS}
    assert not {f: twice for f, ids in names.items() if (twice := sorted({i for i in ids if ids.count(i) > 1}))}

def of_patients(cs):
    "Cells that read real data (flag data), draw radiographs, and store the picture"
    stores = lambda c: any(m.startswith('image/') for o in c.outputs for m in o.get('data', {}))
    return [c.id for c in cs if c.cell_type == 'code' and re.search(r'^#\|\s*data', c.source, re.MULTILINE) and stores(c)
            and re.search('imread|read_xray|show_xray|xray_sheet|show_batch|show_results|audit_figure|overlay', c.source)]

def test_no_radiograph_of_a_patient_is_stored():
    assert not {f.name: ids for f in NBS if (ids := of_patients(cells(f)))}
    v4 = nbformat.v4
    c = v4.new_code_cell('#| data\nshow_xray(x)', outputs=[v4.new_output('display_data', data={'image/png': ''})])
    assert of_patients([c]) == [c.id]

def number(f): return f.name.split('_')[0]     # 05, 05a, 06 …

def test_reading_order_is_the_order_of_dependency():
    rooms = {f: m.group(1) for f in NBS if (m := MODULE.search('\n'.join(c.source for c in cells(f))))}     # the others are tutorials
    numbers = {m: number(f) for f, m in rooms.items()}
    assert len({number(f) for f in NBS}) == len(NBS) and all(number(f) > max(numbers.values()) for f in NBS if f not in rooms)
    for f in rooms:
        code = '\n'.join(c.source for c in cells(f) if exported(c))
        for m in re.findall(r'(?:from|import)\s+pneumothorax\.(\w+)', code): assert numbers[m] < number(f), f'{f.name} imports {m}'
    modules = {p.stem for p in (ROOT/'pneumothorax').glob('*.py')}
    assert modules == {*numbers, '__init__', '_modidx', 'all'}

TUTORIALS = [f for f in NBS if number(f) in map(str, range(50, 58))]
GIVEN = {*dir(builtins), 'display'}     # IPython's own

def starred(n):
    "Names that `from … import *` brings"
    m = importlib.import_module(n.module)
    return getattr(m, '__all__', [k for k in vars(m) if k[0] != '_'])

def binds(n):
    "Names that a node of the syntax gives a meaning"
    if isinstance(n, ast.ImportFrom) and n.names[0].name == '*': return starred(n)
    if isinstance(n, (ast.Import, ast.ImportFrom)): return [(a.asname or a.name).split('.')[0] for a in n.names]
    if isinstance(n, ast.Name): return [] if isinstance(n.ctx, ast.Load) else [n.id]
    if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)): return [n.name]
    return [n.arg] if isinstance(n, ast.arg) else []

def not_shown(cs):
    "Names that visible cells use and no visible cell before or at that place binds: who copies from the page lacks them"
    bound, out = set(GIVEN), []
    for c in cs:
        if c.cell_type != 'code' or hidden(c): continue
        nodes = [*ast.walk(tree(c))]
        for n in nodes: bound.update(binds(n))
        out += [f'{c.id}: {k}' for k in sorted({n.id for n in nodes if isinstance(n, ast.Name)}-bound)]
    return out

@pytest.mark.parametrize('nb', TUTORIALS, ids=lambda f: f.stem)
def test_what_a_tutorial_shows_can_be_copied(nb): assert not not_shown(cells(nb))

def test_what_cannot_be_copied_is_found():
    v4 = nbformat.v4
    sources = '#| hide\nn = 3', 'from os import *\nk = [i for i in range(2)]', 'print(n, k, getcwd())\ndef f(x): return x'
    cs = [v4.new_code_cell(s) for s in sources]
    assert [s.split(': ')[1] for s in not_shown(cs)] == ['n'] and len(TUTORIALS) == 8

def opened_with(cs):
    "Sentence first, then the picture; a picture of images/ is one that the page itself draws"
    first = next(c for c in cs[1:] if not hidden(c))
    linked = [(ROOT/'nbs'/f).read_bytes() for f in re.findall(r'!\[[^]]+\]\(([^)]+)\)', first.source)]
    drawn = [base64.b64decode(o.data['image/jpeg']) for c in cs for o in c.get('outputs', []) if 'image/jpeg' in o.get('data', {})]
    return first.cell_type == 'markdown' and first.source[0].isalpha() and all(b in drawn for b in linked)

@pytest.mark.parametrize('nb', TUTORIALS, ids=lambda f: f.stem)
def test_a_tutorial_begins_with_a_sentence(nb): assert opened_with(cells(nb))

def text_files(root=ROOT):
    "What is in the repository: its files without environments, caches and results"
    skip = re.compile(r'^(\.git|\.venv.*|build|dist|out|_proc|_docs|__pycache__|.*\.egg-info|\.(pytest|ruff)_cache|\.ipynb_checkpoints)$')
    for top, dirs, files in os.walk(root):
        dirs[:] = [d for d in dirs if not skip.match(d)]
        for f in files:
            if not skip.match(f): yield Path(top)/f     # in a worktree .git is a file

def test_sizes():
    for f in text_files():
        limit = 400_000 if f.suffix == '.ipynb' else 1_000_000
        assert f.stat().st_size <= limit, f'{f.name}: {f.stat().st_size:,} bytes, at most {limit:,} are allowed'

# folders of one machine; in two pieces, lest this file be found
PATHS = re.compile('|'.join(a+b for a, b in ((r'/wo', r'rk/'), (r'/ro', r'ot/'), (r'/home/', r'\w'), (r'/tmp/', r'\w'),
    ('site-', 'packages'), (r'\bC:\\', r'\\?Users'), ('file:/', '//'), ('/ka', 'ggle/working/[a-z]'))))

def test_no_machine_is_named():
    assert PATHS.search('see /ro'+'ot/x') and PATHS.search('lib/site-'+'packages/torch') and not PATHS.search('nbs/01_dicom.ipynb')
    for f in text_files():
        if f.suffix not in ('.ipynb', '.py', '.md', '.txt', '.ini', '.toml', '.csv', ''): continue
        for i, line in enumerate(f.read_text(encoding='utf-8').splitlines(), 1):
            if '"image/' not in line: assert not PATHS.search(line), f'{f.relative_to(ROOT)}:{i}: {line[:120]}'

def snapshot(root): return {f.relative_to(root): f.read_bytes() for f in text_files(root) if f.suffix in ('.py', '.ipynb')}

# other names of commands, an index without addresses, and other ideas of what a clean notebook is
NBDEV3 = int(version('nbdev').split('.')[0]) > 2

def rebuild(root):
    "Export and clean the notebooks of a copy of the repository"
    env = {**os.environ, 'PYTHONPATH': str(root), 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([command.replace('_', '-') if NBDEV3 else command], cwd=root, check=True, env=env, capture_output=True)

def test_export_and_clean_change_nothing(tmp_path):
    copy = tmp_path/'copy'
    for f in text_files():
        (copy/f.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, copy/f.relative_to(ROOT))
    before = snapshot(copy)
    rebuild(copy)
    after = snapshot(copy)
    changed = [str(f) for f in before.keys() | after.keys() if before.get(f) != after.get(f)
        and not (NBDEV3 and (f.name == '_modidx.py' or f.suffix == '.ipynb'))]
    assert not changed, f'run `make export` and commit: {changed}'
    (copy/'pneumothorax'/'rle.py').write_text('# edited by hand')
    rebuild(copy)
    assert snapshot(copy) == after   # an edit of the package does not last, so the comparison above sees it

def test_every_notebook_is_in_the_table():
    listed = re.findall(r'^\| \[([^]]+)\]\(([^)]+)\)', (ROOT/'nbs'/'README.md').read_text(encoding='utf-8'), re.MULTILINE)
    assert ([name for name, _ in listed] == sorted(f.stem for f in (ROOT/'nbs').glob('*.ipynb'))
        and all(f'{name}.ipynb' == link for name, link in listed))

def test_the_front_page_is_short(): assert len((ROOT/'README.md').read_text(encoding='utf-8').splitlines()) <= 150

def test_readme_agrees_with_the_index():
    text, pictures = readme.build()
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text, 'run `make readme`'
    for name in pictures: assert (ROOT/name).exists(), f'{name} is missing: run `make readme`'
    for link in re.findall(r'\]\(([^)#:]+)\)', text): assert (ROOT/link).exists(), f'README links to {link}'
    nb = nbformat.read(ROOT/'index.ipynb', as_version=4)
    nb.cells[0].source += ' changed'
    assert readme.render(nb)[0] != text
