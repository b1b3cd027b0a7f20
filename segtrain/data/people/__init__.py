"""Drawn demo people: the data set to try everything with before having one's own.

writing → scenes → figures, props, backdrops → heads, poses, looks → sketch.
"""

from segtrain.data.people.writing import GENERATOR_VERSION, write_demo_people

__all__ = ["GENERATOR_VERSION", "write_demo_people"]
