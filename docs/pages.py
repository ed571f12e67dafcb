"""Sources of the site from what the repository holds: `python docs/pages.py DIR` writes them for Sphinx.

Notebooks keep their stored outputs, lose hidden cells and directives, and names in them become links.
API pages and commands come from the live objects, by fastcore's docments."""
import ast
import importlib
import inspect
import re
import shutil
import sys
from bisect import bisect_right
from pathlib import Path

import nbformat
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
# The floors of the house, by the number with which each begins; a new notebook is on that of the number below it
FLOORS = [(0, 'Files and labels'), (7, 'Training'), (8, 'Files and labels'), (9, 'Training'), (10, 'Batches'), (12, 'Training'),
    (15, 'Networks'), (17, 'Training'), (20, 'Networks'), (23, 'Training'), (25, 'Networks'), (26, 'Training'), (30, 'Prediction'),
    (35, 'Training'), (36, 'Scores'), (37, 'For people'), (38, 'Scores'), (39, 'For people'), (50, 'Tutorials'), (60, 'Evidence')]
LISTED = 'Tutorials', 'Evidence', 'Files and labels', 'Batches', 'Networks', 'Training', 'Prediction', 'Scores', 'For people'
LONG = {'exported': 16, 'imports': 1, 'picture': 6, 'other': 30}     # cells with more lines are folded

# Notebooks

def floor(stem):
    "Heading under which a notebook stands in the table of contents"
    return FLOORS[bisect_right([n for n, _ in FLOORS], int(stem[:2]))-1][1]

def notebooks(root=ROOT):
    "All notebooks but the front page, in reading order"
    return sorted((root/'nbs').glob('*.ipynb'))

def directives(source):
    "What stands behind `#|` in a cell"
    return set(re.findall(r'^#\|\s*(\w+)', source, re.MULTILINE))

def module_of(nb):
    "The module that a notebook exports, if any"
    return next((m[1] for c in nb.cells if (m := re.match(r'#\|\s*default_exp\s+(\w+)', c.source))), None)

def tree(source):
    "Syntax of a cell, without magics"
    return ast.parse('\n'.join(line for line in source.splitlines() if line[:1] not in ('%', '!')))

def defined(source):
    "Names that the top of an exported cell defines"
    body = tree(source).body
    names = [[n.name] if isinstance(n, (ast.FunctionDef, ast.ClassDef)) else
        [t.id for a in n.targets for t in ast.walk(a) if isinstance(t, ast.Name)] if isinstance(n, ast.Assign) else [] for n in body]
    return [n for ns in names for n in ns]

def linked(text, links):
    "The first mention of a name in backquotes becomes a link; headings, code and what is a link already stay"
    seen = set()
    def link(m):
        name = re.sub(r'^nbs/|\.ipynb$|\(.*\)$', '', m[1])
        if name not in links or name in seen: return m[0]
        seen.add(name)
        return f'[{m[0]}]({links[name]})'
    parts = re.split(r'(^(?:```|~~~).*?^(?:```|~~~)|^#.*?$|\[[^\]]*\]\([^)]*\)|``.+?``)', text, flags=re.MULTILINE | re.DOTALL)
    return ''.join(p if i%2 else re.sub(r'`([^`\n]+)`', link, p) for i, p in enumerate(parts))

def plain(text, n=160):
    "The last paragraph of prose, without markup and not too long: what is said of the picture that follows"
    text = re.sub(r'[`*_]|\]\([^)]*\)|^>|^#+|\[', '', text.strip().split('\n\n')[-1], flags=re.MULTILINE)
    text = ' '.join(text.split())
    return text if len(text) <= n else text[:n].rsplit(' ', 1)[0]+' …'

def anchor(module, name):
    "Where a name is defined; capitals are told apart, since anchors have none"
    return f'{"constant" if name.isupper() else "class" if name[0].isupper() else "code"}-{module}-{name}'.lower()

def fold(cell, source, names, kind):
    "Metadata that close a long cell, under a line that says what is in it"
    lines = source.count('\n')+1
    if kind == 'exported' and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree(source).body): kind = 'imports'
    if lines <= LONG[kind]: return
    what = (', '.join([n for n in names if n[0] != '_'] or names)
        or {'picture': 'code of the picture', 'imports': 'imports'}.get(kind, 'code'))
    cell.metadata.update(tags=['hide-input'], mystnb={f'code_prompt_{k}': f'{what} · {lines} lines' for k in ('show', 'hide')})

def lesson(nb, links, head=''):
    "A notebook as its page: shown cells, folded code, links, an anchor for what each exported cell defines"
    module, cells, said, seen = module_of(nb), [], None, set()
    for c in nb.cells:
        flags = directives(c.source) if c.cell_type == 'code' else set()
        if flags & {'hide', 'default_exp'}: continue
        c.metadata = nbformat.from_dict({})
        if c.cell_type == 'markdown':
            c.source = linked(c.source, links)
            cells.append(said := c)
            continue
        if c.cell_type != 'code': continue
        c.source = source = '\n'.join(line for line in c.source.splitlines() if not line.startswith('#|')).strip()
        if not source: continue
        exported, picture = bool(flags & {'export', 'exports'}), any(m.startswith('image/') for o in c.outputs for m in o.get('data', {}))
        names = defined(source) if exported else []
        new = [n for n in dict.fromkeys(names) if n in links and n not in seen]
        if new and said and module: said.source = '\n'.join(f'({anchor(module, n)})=' for n in new)+'\n'+said.source
        seen |= {*new}
        fold(c, source, names, 'exported' if exported else 'picture' if picture else 'other')
        if picture: c.metadata.mystnb = {**c.metadata.get('mystnb', {}), 'image': {'alt': plain(said.source if said else '')}}
        cells.append(c)
    if head and cells: cells[0].source += f'\n\n{head}'
    nb.cells, nb.metadata = cells, nbformat.from_dict({'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'}})
    return nb

# The library, read from the live objects

def rooms(root=ROOT):
    "Module → notebook that exports it, in reading order"
    found = {f: module_of(nbformat.read(f, as_version=4)) for f in notebooks(root)}
    return {m: f.stem for f, m in found.items() if m}

def load(name): return importlib.import_module(f'pneumothorax.{name}')

def is_command(name): return name.startswith('ptx_')

def known(modules, stems):
    "Name → where a link to it leads: what is public, modules, commands, notebooks"
    links = {m: f'/api/{m}.md' for m in modules}
    links |= {n: f'#{n.replace("_", "-")}-command' if is_command(n) else f'#pneumothorax.{m}.{n}' for m in modules for n in load(m).__all__}
    return links | {s: f'/nbs/{s}.ipynb' for s in stems}

def but(links, *pages):
    "Without those that lead to the page on which one is"
    return {k: v for k, v in links.items() if v not in pages}

def cell(text):
    "Text of a table's cell: a bar would end it"
    return str(text).replace('|', '\\|').replace('\n', ' ')

def literal(v, n=60):
    "A value as code, short; nothing where there is none"
    if v is inspect.Parameter.empty: return ''
    if isinstance(v, (set, frozenset)): v = sorted(v)
    if repr(v) == '<factory>': return '…'
    text = getattr(v, '__name__', None) or re.sub(r' at 0x\w+', '', repr(v))
    text = text if len(text) <= n else text[:n]+' …'
    return f'`` {text} ``' if '`' in text else f'`{text}`'

def prose(text, links):
    "A comment or docstring, which is no markdown but for backquotes, with links"
    parts = re.split(r'(`[^`]+`)', text or '')
    return linked(''.join(p if i%2 else re.sub(r'([\\*_<\[\]$#~])', r'\\\1', p) for i, p in enumerate(parts)), links)

def typed(anno):
    "A type as one writes it"
    if anno in (None, inspect.Parameter.empty): return ''
    return '`'+re.sub(r'\bpneumothorax\.\w+\.', '', anno if isinstance(anno, str) else inspect.formatannotation(anno))+'`'

def params(f):
    "Parameters by fastcore's reader, without `self`; empty where there is none to read"
    try: return {k: v for k, v in docments(f, full=True).items() if k not in ('self', 'cls')}
    except (TypeError, ValueError, OSError): return {}

def rows(head, lines):
    "A table that becomes a list on a phone"
    return '\n'.join(['{.params}', '| '+' | '.join(head)+' |', '|---'*len(head)+'|', *('| '+' | '.join(map(cell, r))+' |' for r in lines)])

def table(f, links):
    "Parameters of a function as a table, and its result in a line, from its docments"
    found = params(f)
    back = found.pop('return', None)
    lines = [(f'`{k}`', typed(v.anno), literal(v.default), prose(v.docment, links)) for k, v in found.items()]
    out = [rows(('Parameter', 'Type', 'Default', 'What it is'), lines)] if lines else []
    if back and back.docment: out.append(f'**Returns** {typed(back.anno)}: {prose(back.docment, links)}')
    return '\n\n'.join(out)

def signature(f):
    "Names and defaults; types are in the table"
    try: sig = inspect.signature(f)
    except (TypeError, ValueError): return '(…)'
    plain = lambda v: v if v is inspect.Parameter.empty or isinstance(v, (int, float, str, type(None))) else ...
    short = [p.replace(annotation=p.empty, default=plain(p.default)) for p in sig.parameters.values() if p.name not in ('self', 'cls')]
    return str(sig.replace(parameters=short, return_annotation=sig.empty)).replace('Ellipsis', '…')

def summary(o):
    "The first line of a docstring"
    return (inspect.getdoc(o) or '').split('\n\n')[0].replace('\n', ' ')

def directive(kind, name, body, fence='```'):
    "A Sphinx directive around markdown"
    return f'{fence}{{py:{kind}}} {name}\n\n{body.strip()}\n{fence}\n'

def methods(cls, links):
    "Public methods of a class that have something to say"
    own = {k: f for k, f in vars(cls).items() if k[0] != '_' and inspect.isfunction(f) and f.__module__ == cls.__module__ and f.__doc__}
    return '\n'.join(directive('method', k+signature(f), f'{prose(summary(f), links)}\n\n{table(f, links)}') for k, f in own.items())

def entry(module, name, o, links):
    "One public name: signature, what it does, parameters, where it is explained"
    lesson = f'{{.where}}\n[where it is explained](#{anchor(module, name)})'
    if isinstance(o, type):
        made = o if '__init__' in vars(o) or '__dataclass_fields__' in vars(o) else None
        head = name+(signature(o) if made else '')
        return directive('exception' if issubclass(o, Exception) else 'class', head,
            f'{prose(summary(o), links)}\n\n{table(o, links) if made else ""}\n\n{lesson}\n\n{methods(o, links)}', '````')
    body = f'{prose(summary(o), links)}\n\n{table(o, links)}\n\n{lesson}'
    if inspect.isfunction(o): return directive('function', name+signature(o), body, '````')
    if callable(o): return directive('function', name, f'fastai\'s, for radiographs.\n\n{lesson}', '````')
    return directive('data', name, f'{typed(type(o).__name__)}, {literal(o, 300)}\n\n{lesson}', '````')

def api_page(module, stem, links):
    "All public names of a room: a list, then one by one"
    m = load(module)
    here = but(links, f'/api/{module}.md')
    names = [n for n in m.__all__ if not is_command(n)]
    names.sort(key=lambda n: not callable(getattr(m, n)))     # constants come last
    what = lambda o: prose(summary(o), here) if callable(o) else literal(o)
    lines = [(f'[`{n}`](#pneumothorax.{module}.{n})', what(getattr(m, n))) for n in names]
    told = ['', 'The commands have [a page of their own](/commands.md).'] if len(names) < len(m.__all__) else []
    return '\n'.join([f'# API of {module}', '', f'> {summary(m)}', '',
        f'Explained, tried and tested in [{stem}](/nbs/{stem}.ipynb).', *told, '',
        f'```{{py:module}} pneumothorax.{module}\n```', '', rows(('Name', 'What it does'), lines), '',
        *(entry(module, n, getattr(m, n), here) for n in names)])

def api_index(found):
    "All rooms with their one line, floor by floor"
    out = ['# API', '', ('One page for each module, written from the comments beside its parameters. '
        '`from pneumothorax.all import *` takes a chosen list of these names; '
        'the others are imported from their module. {ref}`From A to Z <genindex>`.'), '']
    for f in LISTED:
        lines = [(f'[{m}](/api/{m}.md)', summary(load(m))) for m, s in found.items() if floor(s) == f]
        if lines: out += [f'## {f}', '', rows(('Module', 'What it does'), lines), '']
    pages = [f'{m} <{m}>' for m in found]
    return '\n'.join([*out, '```{toctree}', ':hidden:', *pages, '```', ''])

def command_page(name, links):
    "One command as its `--help` tells it"
    from pneumothorax import cli
    f = getattr(cli, name)
    told, parser = docments(inspect.unwrap(f), full=True), cli._parser(inspect.unwrap(f), *f.main.args[1:])
    lines = []
    for a in parser._actions:
        if a.dest not in told: continue
        v = told[a.dest]
        default = '' if v.default in (inspect.Parameter.empty, None) or v.anno is bool else literal(v.default)
        option = a.option_strings[0] if a.option_strings else a.dest
        lines.append((f'`{option}`', '' if v.anno is bool else typed(v.anno), default, prose(v.docment, links)))
    usage = ' '.join(parser.format_usage().split()).removeprefix('usage: ')
    example = f.main.args[-1]
    return '\n'.join([f'({name.replace("_", "-")}-command)=', f'## {name}', '',
        prose(summary(inspect.unwrap(f)), links), '', '```sh', usage,
        *([f'{example}     # for example'] if example else []), '```', '',
        rows(('Argument', 'Type', 'Default', 'What it is'), lines), ''])

def commands(links):
    "All commands, in the order in which one needs them"
    from pneumothorax import cli
    names = [n for n in cli.__all__ if is_command(n)]
    lines = [(f'[`{n}`](#{n.replace("_", "-")}-command)', summary(inspect.unwrap(getattr(cli, n)))) for n in names]
    return '\n'.join(['# Commands', '', '> The same functions, typed in a terminal', '',
        'Options may be written with `-` or `_`. Each command says what comes next, and `--help` prints what stands here.',
        'How they are made: [41_cli](/nbs/41_cli.ipynb).',
        '', rows(('Command', 'What it does'), lines), '', *(command_page(n, but(links, links[n])) for n in names)])

# The site

DOORS = """:::{container} doors
[**The first hour**\\
Look, train, see what is wrong, decide, hand in](/nbs/53_tutorial.first_hour.ipynb)

[**Your own radiographs**\\
From DICOM files and somebody's drawings to masks in your viewer](/nbs/50_tutorial.own_data.ipynb)

[**A Kaggle kernel**\\
Train, predict and submit without internet](/nbs/51_tutorial.kaggle.ipynb)

[**Few labels**\\
What pays where masks are rare, measured](/nbs/52_tutorial.few_labels.ipynb)

[**Thresholds**\\
Choose a rule without fooling yourself](/nbs/55_tutorial.thresholds.ipynb)

[**Depth**\\
What a DICOM file holds, and what 8 bits lose](/nbs/54_tutorial.depth.ipynb)

[**The first place**\\
Its recipe, told again in a few lines](/nbs/57_tutorial.first_place.ipynb)

[**Parts of your own**\\
Bring an encoder, a loss or a callback](/nbs/56_tutorial.own_parts.ipynb)

[**Evidence**\\
Does it help? Each idea with its interval](/nbs/60_evidence.ipynb)

[**Commands**\\
Everything from a terminal, with all options](/commands.md)

[**API**\\
Every function and parameter](/api/index.md)

[**The first lesson**\\
All notebooks in reading order begin here](/nbs/00_rle.ipynb)
:::
"""

def title(f):
    "A notebook's line in the table of contents: its number and its name, or the title of a lesson without a module"
    nb = nbformat.read(f, as_version=4)
    return f.stem.replace('_', ' ') if module_of(nb) else nb.cells[0].source.splitlines()[0].lstrip('# ')

FIRST = '53_tutorial.first_hour'     # before the other tutorials

def toctree(caption, entries):
    "One heading of the table of contents"
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *entries, '```', ''])

def contents(root=ROOT):
    "Table of contents: tutorials, evidence, rooms floor by floor, reference"
    there = sorted(notebooks(root), key=lambda n: n.stem != FIRST)
    books = {f: [f'{title(n)} <nbs/{n.stem}>' for n in there if floor(n.stem) == f] for f in LISTED}
    return '\n'.join([*(toctree(f, b) for f, b in books.items() if b),
        toctree('Reference', ['Commands <commands>', 'API <api/index>', 'Changelog <changelog>'])])

def head(stem, module):
    "What stands under the title of a lesson"
    api = f'[API of `{module}`](/api/{module}.md) · ' if module else ''
    return f'{{.where}}\n{api}{{download}}`download the notebook <../notebooks/{stem}.ipynb>`'

def write(out, root=ROOT):
    "Write the sources of the whole site into a folder, made anew; how many pages"
    out = Path(out)
    shutil.rmtree(out, ignore_errors=True)
    pages = {}
    found = rooms(root)
    links = known(found, [f.stem for f in notebooks(root)])
    for f in notebooks(root):
        nb = nbformat.read(f, as_version=4)
        m = module_of(nb)
        pages[f'nbs/{f.name}'] = nbformat.writes(lesson(nb, but(links, f'/nbs/{f.name}', f'/api/{m}.md'), head(f.stem, m)))
        pages[f'notebooks/{f.name}'] = f.read_text(encoding='utf-8')
    front = lesson(nbformat.read(root/'index.ipynb', as_version=4), links)
    front.cells.insert(1, nbformat.v4.new_markdown_cell(DOORS))
    front.cells.append(nbformat.v4.new_markdown_cell(contents(root)))
    pages['index.ipynb'] = nbformat.writes(front)
    pages |= {f'api/{m}.md': api_page(m, s, links) for m, s in found.items()}
    pages |= {'api/index.md': api_index(found), 'commands.md': commands(links)}
    # the front page points there
    pages['nbs/README.md'] = '---\norphan: true\n---\n' + (root/'nbs'/'README.md').read_text(encoding='utf-8')
    pages['changelog.md'] = linked((root/'CHANGELOG.md').read_text(encoding='utf-8'), links)
    for name, text in pages.items():
        (out/name).parent.mkdir(parents=True, exist_ok=True)
        (out/name).write_text(text, encoding='utf-8')
    shutil.copytree(root/'images', out/'images')
    return len([p for p in pages if not p.startswith('notebooks/')])

if __name__ == '__main__': sys.stdout.write(f'{write(sys.argv[1])} pages\n')
