"""Train, judge and use person/background segmentation networks."""

__version__ = "0.1.0"
