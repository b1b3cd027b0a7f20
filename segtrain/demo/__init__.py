"""Drawn demo people: a dataset to try segtrain without data of your own.

Imports: coco_writer → scenes → figures, props, backdrops → heads, poses, appearance → canvas.
"""

from segtrain.demo.coco_writer import GENERATOR_VERSION, write_demo_people

__all__ = ["GENERATOR_VERSION", "write_demo_people"]
