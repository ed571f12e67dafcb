"""Find and outline pneumothorax on chest radiographs, with fastai.

`from pneumothorax.all import *` brings what a notebook needs: `make_phantoms`, `xray_dls`, `xray_learner`, `train`, `predict_maps`,
`write_submission`, `score_submission` and others, each with its parameters behind `?`. The commands `ptx_sample`, `ptx_train`,
`ptx_predict`, `ptx_submit`, `ptx_score` and others do the same without Python; `ptx_demo` shows them all. Research software, no medical device."""
__version__ = "0.1.0"
