"Settings of the site; its pages are written by pages.py. Nothing is executed, fetched, or asked of another host"
import re
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[1]
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(ROOT/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

project, author, release = cfg['lib_name'], cfg['author'], cfg['version']
project_copyright = cfg['copyright']
extensions = ['myst_nb', 'sphinx.ext.viewcode']
exclude_patterns = ['notebooks']
nitpicky = True
smartquotes = False     # 'lite0' is typed, not said
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'attrs_block', 'attrs_inline', 'colon_fence']
myst_heading_anchors = 4
add_module_names = False
toc_object_entries_show_parents = 'hide'
viewcode_follow_imported_members = False     # every name is described where it is defined; nothing has to be imported for that

html_theme = 'furo'
html_title = project
html_static_path = ['site.css']
html_css_files = ['site.css']
html_copy_source = False
html_show_sphinx = False
html_math_renderer = 'mathml'
html_theme_options = {
    'navigation_with_keys': True,
    'light_css_variables': {'color-sidebar-link-text--top-level': 'var(--color-foreground-secondary)'},
    'dark_css_variables': {'color-sidebar-link-text--top-level': 'var(--color-foreground-secondary)'},
}

def formula(tex, block):
    "A formula as MathML, which browsers draw themselves; docutils takes the digits of \\frac14 for one number"
    return tex2mathml(re.sub(r'\\frac\s*(\d)(\d)', r'\\frac{\1}{\2}', tex), as_block=block)

def in_line(writer, node):
    "Formula in a line of text"
    writer.body.append(formula(node.astext(), False))
    raise SkipNode

def on_its_own(writer, node):
    "Formula on a line of its own"
    writer.body.append(f'<div class="formula">{formula(node.astext(), True)}</div>\n')
    raise SkipNode

def setup(app):
    "Tell Sphinx how formulas are drawn"
    app.add_html_math_renderer('mathml', inline_renderers=(in_line, None), block_renderers=(on_its_own, None))
