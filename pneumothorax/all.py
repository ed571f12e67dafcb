"What a notebook user wants, in one import"
from pneumothorax.rle import *
from pneumothorax.dicom import *
from pneumothorax.siim import *
from pneumothorax.phantom import *
from pneumothorax.folds import *
from pneumothorax.cache import *
from pneumothorax.bootstrap import *
from pneumothorax.equalize import *
from pneumothorax.data import *
from pneumothorax.losses import *
from pneumothorax.metrics import *
from pneumothorax.models import *
from pneumothorax.learner import *
from pneumothorax.priors import *
from pneumothorax.predict import *
from pneumothorax.decide import *
from pneumothorax.submission import *
