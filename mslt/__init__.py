"""mslt: multi-stage layerwise pretraining of BERT-like encoders."""

__version__ = "0.1.0"
