"""The classes of a mask, the same everywhere."""

BACKGROUND, PERSON = 0, 1
# Neither: crowds, and what an annotator left open. Counts in no loss and no metric.
IGNORE = 255
CLASSES = ("background", "person")
