"Run one notebook by nbdev's own runner: `python tests/run_notebook.py NOTEBOOK 'FLAGS TO SKIP' 'FLAGS TO RUN ALL THE SAME'`"
import sys
from pathlib import Path

from nbdev.test import test_nb

if __name__ == '__main__': sys.exit(not test_nb(Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split())[0])
