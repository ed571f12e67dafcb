"README.md from index.ipynb: markdown and visible code as they stand, pictures as files, hidden cells left out"
import base64
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor

ROOT = Path(__file__).resolve().parents[1]

class Hide(Preprocessor):
    "Drop `#| hide` and `#| default_exp` cells and the remaining directive lines"
    def preprocess(self, nb, resources):
        def shown(c): return not (c.cell_type == 'code' and any(c.source.lstrip().startswith(f'#| {d}') for d in ('hide', 'default_exp')))
        nb.cells = [c for c in nb.cells if shown(c)]
        for c in nb.cells:
            if c.cell_type == 'code': c.source = '\n'.join(line for line in c.source.splitlines() if not line.startswith('#|')).strip()
        return nb, resources

def render(nb):
    "Markdown of a notebook, and its pictures as name → bytes"
    nb.metadata['language_info'] = {'name': 'python'}
    exporter = MarkdownExporter(preprocessors=[Hide])
    text, resources = exporter.from_notebook_node(nb, {'output_files_dir': 'images'})
    text = re.sub(r'\n{3,}', '\n\n', '\n'.join(line.rstrip() for line in text.strip().splitlines())) + '\n'
    return '<!-- generated from index.ipynb by `make readme` -->\n\n' + text, {k: v for k, v in resources.get('outputs', {}).items()}

def build(root=ROOT):
    "README.md and pictures of the repository's index"
    return render(nbformat.read(root/'index.ipynb', as_version=4))

if __name__ == '__main__':
    text, pictures = build()
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    for name, data in pictures.items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(base64.b64decode(data) if isinstance(data, str) else data)
    sys.stdout.write(f'README.md: {len(text.split()):,} words, {len(pictures)} pictures\n')
