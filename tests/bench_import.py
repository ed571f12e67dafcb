"""Processor time of `import pneumothorax.all` relative to `import fastai.vision.all`: `python tests/bench_import.py [ROUNDS]`

Each import in a new process, the two in turns; the median of the ratios with the smallest and largest. Time of the processor, which other
programs hardly change."""
import statistics
import subprocess
import sys

from racing import keep, rounds_of

CODE = 'import time, {}; print(time.process_time())'

def seconds(module):
    "Of one import, the interpreter's start included"
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', CODE.format(module)], cwd='/', capture_output=True, text=True, check=True)
    return float(p.stdout)

def ratios(rounds):
    "Ours over fastai's, by round"
    return [seconds('pneumothorax.all')/seconds('fastai.vision.all') for _ in range(rounds)]

if __name__ == '__main__':
    r = ratios(int(sys.argv[1]) if len(sys.argv) > 1 else rounds_of(7))
    keep('import, time of the processor', 'import pneumothorax.all', 'import fastai.vision.all', r)
    print(f'import pneumothorax.all / import fastai.vision.all: {statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})')
