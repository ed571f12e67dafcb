"The site: what becomes of a notebook, tables of parameters, contents; built, its links, its search and its pages in a browser"
import http.server
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from threading import Thread

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'docs'))
import links
import pages

v4 = nbformat.v4

@pytest.fixture(scope='module')
def rooms(): return pages.rooms()

@pytest.fixture(scope='module')
def names(rooms): return pages.known(rooms, [f.stem for f in pages.notebooks()])

# Notebooks

LONG = '\n'.join(f'a{i} = {i}' for i in range(20))

def notebook():
    "One cell of each kind"
    picture = v4.new_output('display_data', data={'image/png': 'AA=='})
    return v4.new_notebook(cells=[
        v4.new_markdown_cell('# rle\n\n> Masks'), v4.new_code_cell('#| default_exp rle'), v4.new_code_cell('#| hide\nsecret = 1'),
        v4.new_markdown_cell('`rle_area` counts what `rle_encode(m)` wrote; see `32_decide.ipynb`.'),
        v4.new_code_cell('#| export\ndef rle_area(rle): return 0\ndef _private(): pass\n'+LONG),
        v4.new_markdown_cell('Seen from **above**, with [words](x.md).'), v4.new_code_cell('#| slow\nplot()', outputs=[picture])])

def test_a_notebook_becomes_a_page(names):
    nb = pages.lesson(notebook(), names, 'at the head')
    sources = [c.source for c in nb.cells]
    assert not any(word in s for s in sources for word in ('#|', 'secret', 'default_exp')) and len(sources) == 5
    assert sources[0] == '# rle\n\n> Masks\n\nat the head'
    assert ('[`rle_area`](#pneumothorax.rle.rle_area) counts what [`rle_encode(m)`](#pneumothorax.rle.rle_encode) wrote; '
        'see [`32_decide.ipynb`](/nbs/32_decide.ipynb).' in sources[1])
    assert sources[1].startswith('(code-rle-rle_area)=\n') and '_private' not in sources[1]
    assert nb.cells[2].metadata.tags == ['hide-input'] and nb.cells[2].metadata.mystnb.code_prompt_show.startswith('rle_area, a0')
    assert 'tags' not in nb.cells[4].metadata and nb.cells[4].metadata.mystnb.image.alt == 'Seen from above, with words.'

def test_names_are_linked_once_and_in_prose_alone():
    to = {'area': '#a'}
    assert pages.linked('`area` and `area`', to) == '[`area`](#a) and `area`'
    for text in ('# `area`', '[`area`](x.md)', '```\n`area`\n```', '`other`', '``a `area` b``'): assert pages.linked(text, to) == text
    assert pages.linked('a\n## `area`\n`area`', to) == 'a\n## `area`\n[`area`](#a)'

def test_capitals_are_told_apart(): assert len({pages.anchor('m', n) for n in ('CLAHE', 'clahe', 'Clahe')}) == 3

# The library

def test_table_of_a_function():
    from pneumothorax.decide import keep_large
    table = pages.table(keep_large, {})
    assert ('| `min_area` | `float` | `800` | pixels of the 1024² frame |' in table
        and '| `mask` | `numpy.ndarray` |  | H×W, uint8 in {0,1} |' in table)
    assert table.endswith('**Returns** `numpy.ndarray`: the same shape, small components removed')
    assert pages.signature(keep_large) == '(mask, min_area=800)'

def test_comments_are_no_markdown():
    def f(a:str='x|y', # as 3*bce+4*focal, <none> or `area`
    ): pass
    assert r"| `a` | `str` | `'x\|y'` | as 3\*bce+4\*focal, \<none> or [`area`](#a) |" in pages.table(f, {'area': '#a'})

def test_every_public_name_has_an_entry(rooms, names):
    told = pages.commands(names)
    for m, stem in rooms.items():
        page = pages.api_page(m, stem, names)
        for n in pages.load(m).__all__:
            if pages.is_command(n): assert f'## {n}\n' in told
            else:
                assert len(re.findall(rf'^````{{py:\w+}} {n}(?![\w.])', page, re.MULTILINE)) == 1, f'{m}.{n}'
                assert f'](#{pages.anchor(m, n)})' in page
    assert {m for m in rooms} == {f.stem for f in (ROOT/'pneumothorax').glob('*.py')}-{'__init__', '_modidx', 'all'}

def test_commands_tell_what_help_tells(names):
    page = pages.command_page('ptx_sample', names)
    assert ('ptx_sample out [options]' in page
        and '| `--n` | `int` | `64` | radiographs of the training part; a quarter as many are added as test part |' in page)

def test_every_notebook_is_in_the_contents():
    contents = pages.contents()
    for f in pages.notebooks(): assert contents.count(f'<nbs/{f.stem}>') == 1, f.stem
    assert ([pages.floor(s) for s in ('00_rle', '32a_chest', '13_new', '52_tutorial', '60_evidence')]
        == ['Files and labels', 'Prediction', 'Training', 'Tutorials', 'Evidence'])
    assert {f for _, f in pages.FLOORS} == set(pages.LISTED)

# Links

def test_broken_links_are_found(tmp_path):
    (tmp_path/'b.html').write_text('<h1 id="there">b</h1>')
    (tmp_path/'a.html').write_text('<a href="b.html#there">1</a><a href="b.html#nowhere">2</a><a href="c.html">3</a>'
        '<a href="../a.html">4</a><a href="https://example.org/x">5</a>'
        '<img src="data:," alt="fine"><img src="b.html"><script src="https://cdn.example.org/x.js"></script>')
    (tmp_path/'a.css').write_text('a { background: url(https://fonts.example.org/f.woff) }')
    wrong, hosts, n = links.check(tmp_path)
    assert n == 2 and hosts == {'example.org': 1, 'cdn.example.org': 1}
    for what in ('b.html#nowhere', 'c.html', '../a.html', 'without a description: b.html', 'cdn.example.org', 'fonts.example.org'):
        assert sum(what in w for w in wrong) == 1, what
    assert len(wrong) == 6

# The site itself

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "Built as `make docs` builds it"
    for m in ('sphinx', 'myst_nb', 'furo'): pytest.importorskip(m, reason='the site needs the extra "docs"')
    out = tmp_path_factory.mktemp('docs')
    assert pages.write(out/'pages') > 100
    p = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-j', 'auto', '-c', ROOT/'docs', out/'pages',
        out/'site'], check=False, capture_output=True, text=True, env={**os.environ, 'PYTHONWARNINGS': 'ignore'})
    assert p.returncode == 0, p.stderr[-3000:]
    return out/'site'

@pytest.mark.slow
def test_links_of_the_site(site):
    wrong, _, n = links.check(site)
    assert not wrong and n > 150, '\n'.join(wrong[:20])
    assert 'hypercolumn' in (site/'searchindex.js').read_text()
    assert '<math' in (site/'nbs'/'20_losses.html').read_text()

@pytest.fixture(scope='module')
def browser():
    "Debian's chromium"
    api = pytest.importorskip('playwright.sync_api', reason='needs the extra "browser"')
    if not shutil.which('chromium'): pytest.skip('needs chromium')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        yield b
        b.close()

@pytest.fixture(scope='module')
def addresses(site):
    "Where the site can be opened: from the disk, and from a server of this machine"
    quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield {'disk': site.as_uri(), 'server': f'http://127.0.0.1:{server.server_port}'}
    server.shutdown()

@pytest.mark.slow
@pytest.mark.parametrize('where', ['disk', 'server'])
def test_search_and_no_other_host(browser, addresses, where):
    base, asked = addresses[where], []
    page = browser.new_page()
    page.on('request', lambda r: asked.append(r.url))
    for f in ('index.html', 'nbs/20_losses.html', 'nbs/40d_view.html', 'api/train.html', 'commands.html', 'changelog.html'):
        page.goto(f'{base}/{f}', wait_until='load')
    page.goto(f'{base}/search.html?q=hypercolumns')
    page.wait_for_selector('ul.search li a')
    found = page.eval_on_selector_all('ul.search li a', 'x => x.map(a => a.getAttribute("href"))')
    assert any('nbs/16_hyperunet.html' in f for f in found), found
    assert len(asked) > 10 and not [u for u in asked if not u.startswith((base, 'data:'))]
    page.close()

OUTSIDE = """[...document.querySelectorAll('article *')].filter(e => {
    if (e.closest('svg, math, .headerlink') || !e.getClientRects().length || e.getBoundingClientRect().right <= innerWidth+1) return false
    for (let p = e; p.tagName != 'ARTICLE'; p = p.parentElement)
        if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false
    return true}).map(e => e.tagName+' '+e.className+' '+e.textContent.slice(0, 40))"""     # and does not scroll in itself

@pytest.mark.slow
def test_nothing_sticks_out_on_a_phone(browser, site):
    "Nor is a picture cut"
    page = browser.new_page(viewport={"width": 390, "height": 844})
    wide = []
    for f in sorted(site.rglob('*.html')):
        if '_modules' in f.parts: continue
        page.goto(f.as_uri(), wait_until='load')
        if page.evaluate('document.documentElement.scrollWidth > innerWidth'): wide.append(f.name)
        wide += [f'{f.name}: {e}' for e in page.evaluate(OUTSIDE)]
        if page.evaluate('[...document.querySelectorAll("article img")].some(i => !i.naturalWidth)'):
            wide.append(f'{f.name}: a picture that is not there')
    page.close()
    assert not wide, '\n'.join(wide[:40])
