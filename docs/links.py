"""Links of the site that was built: `python docs/links.py DIR` lists those that lead nowhere inside, and the hosts to which others lead.

Nothing is asked of another host. A page may link to one, but must not take pictures, scripts or fonts from there."""
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

TAKES = {('img', 'src'), ('script', 'src'), ('link', 'href'), ('iframe', 'src'), ('source', 'src')}     # fetched when a page is opened

class Page(HTMLParser):
    "Anchors and links of one page, pictures without a description"
    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.bare = set(), [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        "Note what an element is called, and where it leads"
        a = dict(attrs)
        self.anchors |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.links += [(tag, k, a[k]) for k in ('href', 'src') if a.get(k)]
        if tag == 'img' and not a.get('alt'): self.bare.append(a.get('src', ''))

def check(site):
    "What is wrong, and how often pages link to other hosts"
    site = Path(site).resolve()
    pages = {f: Page(f.read_text(encoding='utf-8')) for f in sorted(site.rglob('*.html'))}
    wrong, hosts = [], Counter()
    for f, page in pages.items():
        wrong += [f'{f.relative_to(site)}: a picture without a description: {src}' for src in page.bare]
        for tag, attr, link in page.links:
            to = urlsplit(link)
            if to.scheme in ('data', 'mailto'): continue
            if to.scheme or to.netloc:
                hosts[to.netloc] += 1
                if (tag, attr) in TAKES: wrong.append(f'{f.relative_to(site)}: taken from another host: {link}')
                continue
            target = (f.parent/unquote(to.path)).resolve() if to.path else f
            if not target.is_relative_to(site) or not target.is_file(): wrong.append(f'{f.relative_to(site)}: {link} is not there')
            elif to.fragment and target in pages and unquote(to.fragment) not in pages[target].anchors:
                wrong.append(f'{f.relative_to(site)}: {link} has no such anchor')
    for f in site.rglob('*.css'):
        taken = re.findall(r'url\(["\']?((?:https?:)?//[^)"\']+)', f.read_text(encoding='utf-8'))
        wrong += [f'{f.relative_to(site)}: taken from another host: {u}' for u in taken]
    return wrong, hosts, len(pages)

if __name__ == '__main__':
    wrong, hosts, n = check(sys.argv[1])
    others = ', '.join(f'{h} ({k})' for h, k in hosts.most_common()) or 'none'
    sys.stdout.write(''.join(f'{w}\n' for w in wrong)+f'{n} pages, {len(wrong)} faults; to other hosts, not asked: {others}\n')
    sys.exit(bool(wrong))
