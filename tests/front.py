"""The picture of the front page, images/front.jpg: `python tests/front.py RUN [SEED]`, RUN of `make demo` (out/demo/run)

A phantom of 512 px that no training has seen, the probability of each pixel by the run (mean of two views), and what the plain rule
outlines beside the truth."""
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from PIL import Image

from pneumothorax.dicom import COLOURS, contours
from pneumothorax.metrics import kaggle_dice
from pneumothorax.outlines import masks_of
from pneumothorax.phantom import phantom
from pneumothorax.predict import predict_maps
from pneumothorax.records import from_bytes

OUT = Path(__file__).resolve().parents[1]/'images'/'front.jpg'

def panel(ax, x, title):
    "A radiograph under a title"
    ax.imshow(x, cmap='gray', vmin=0, vmax=1)
    ax.set_title(title, fontsize=13)
    ax.axis('off')

def line(ax, mask, kind, width):
    "The border of a mask"
    for p in contours(mask, (512, 512)): ax.plot(*np.r_[p, p[:1]].T, color=COLOURS[kind], lw=width, label=kind)

if __name__ == '__main__':
    run, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_005
    x, masks, _ = phantom(seed, 512, 'apical', area=22_000)
    true = np.clip(sum(masks), 0, 1).astype(np.uint8)
    with tempfile.TemporaryDirectory() as t:
        Image.fromarray((x*255).round().astype(np.uint8)).save(f'{t}/x.png')
        made = masks_of(predict_maps(run, f'{t}/x.png', f'{t}/p', tta='hflip', workers=0, progress=False))
        (_, p, mask), = made
        p, mask = from_bytes(np.array(p)), np.array(mask)
    fig, axs = plt.subplots(1, 3, figsize=(13, 4.6), layout='constrained')
    for ax, title in zip(axs, ('a radiograph that it has not seen (synthetic)', 'what the network believes',
            f'what it outlines, and the truth: Dice {kaggle_dice(mask, true):.2f}')):
        panel(ax, x, title)
    heat = axs[1].imshow(np.ma.masked_less(p, .1), cmap='inferno', vmin=.1, vmax=1, alpha=.7, extent=(-.5, 511.5, 511.5, -.5),
        interpolation='bilinear')
    fig.colorbar(heat, ax=axs[1], fraction=.045, pad=.01).ax.tick_params(labelsize=11)
    line(axs[2], true, 'true', 3)
    line(axs[2], mask, 'predicted', 1.5)
    by = {h.get_label(): h for h in axs[2].get_lines()}
    axs[2].legend(by.values(), by, loc='lower right', fontsize=11, framealpha=.8)
    fig.savefig(OUT, dpi=100, pil_kwargs={'quality': 88})
    print(f'{OUT.name}: {OUT.stat().st_size/1e3:.0f} kB')
