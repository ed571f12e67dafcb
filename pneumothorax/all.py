"What a notebook user wants, in one import"
# The names below and no others: no name of Python, IPython or fastai, so that it stands beside `from fastai.vision.all import *`.
# What is not here is imported from its module, errors too: all are of the family `PtxError`. `?` behind a name shows its parameters.
# (One line above: nbdev 3 would write a longer docstring into that of the package.)
import warnings as _warnings
import fastai.torch_core as _core     # it sets filters of its own, which stay

with _warnings.catch_warnings():
    # fastai compiles its `Mish` while it is imported, by what torch calls deprecated; this one warning, and only here
    _warnings.filterwarnings('ignore', r'`torch\.jit\.script` is deprecated', FutureWarning)
    import fastai.layers as _layers

from pneumothorax.rle import PtxError, rle_area, rle_decode, rle_encode, rles_to_mask
from pneumothorax.dicom import read_dicom, read_xray, show_xray, xray_meta, xray_metadata
from pneumothorax.siim import PtxNotice, SiimFiles, audit_figure, audit_labels, find_siim, read_labels, read_patients, siim_train
from pneumothorax.phantom import make_phantoms, phantom
from pneumothorax.masks import mask_sheet, read_masks, save_labels
from pneumothorax.folds import fold_report, leakage, make_folds, near_duplicates, read_folds, save_folds
from pneumothorax.cache import XrayCache, prepare
from pneumothorax.source import XrayData, open_data
from pneumothorax.bootstrap import bootstrap_ci, paired_bootstrap
from pneumothorax.samplers import SlidingSampleRate, seed_all
from pneumothorax.equalize import CLAHE, Equalize, FreqHist, Gamma, HistEqualize, PercentileStretch, Quantize, TensorXray, equalizer
from pneumothorax.data import TensorXrayMask, XrayBlock, split_by_patient, xray_datablock, xray_dls, xray_stats, xray_tfms
from pneumothorax.encoders import create_encoder, load_weights
from pneumothorax.hyperunet import HyperUnet
from pneumothorax.optimizers import xray_optimizer
from pneumothorax.losses import AuxLoss, ComboLoss, bce_loss, boundary_loss, dice_loss, focal_loss, jaccard_loss, lovasz_loss, tversky_loss, xray_loss
from pneumothorax.metrics import (AUROC, AveragePrecision, DicePos, DiceNeg, ImageIoU, KaggleDice, LesionF1, PixelECE, Sensitivity,
    Specificity, kaggle_dice, show_reliability)
from pneumothorax.models import MODELS, xray_model
from pneumothorax.callbacks import Accumulate, EarlyStop, GradientNoise, StopNaN, mixed_precision
from pneumothorax.learner import load_run, read_run, save_run, xray_learner
from pneumothorax.priors import LogitAdjustedLoss, adjust_logits, position_prior
from pneumothorax.averaging import EMA, SWA, average_checkpoints
from pneumothorax.watch import Watch
from pneumothorax.unlabelled import Unlabelled, with_unlabelled
from pneumothorax.train import RECIPES, Recipe, make_recipe, show_recipe, train
from pneumothorax.tta import TTA_PRESETS, tta_probs, views
from pneumothorax.predict import predict_maps
from pneumothorax.records import open_maps, open_oof
from pneumothorax.decide import Decision, Triplet, decide, explain, explain_figure, keep_large, prob_to_mask
from pneumothorax.gate import Gate, fit_gate, load_gate
from pneumothorax.chest import describe_mask
from pneumothorax.outlines import masks_of, predict_like
from pneumothorax.submission import contact_sheet, decision_from, gate_verdict, read_decision, write_submission
from pneumothorax.crossval import cross_validate, predict_oof
from pneumothorax.scoring import check_submission, report_text, score_report, score_submission, submission_figure
from pneumothorax.export import export_masks
from pneumothorax.show import outline
from pneumothorax.bundle import bundle, find_inputs, go_on, start_from, unmet
from pneumothorax.compare import compare
from pneumothorax.cases import open_cases
from pneumothorax.report import report
from pneumothorax.merging import merge_submissions
from pneumothorax import interpret as _interpret, view as _view     # no name is taken from these, but `?` shows their parameters as well
from pneumothorax.docs import tell_parameters as _tell
import sys as _sys

_tell([m for name,m in list(_sys.modules.items()) if name.startswith('pneumothorax.') and hasattr(m,'__all__')])
