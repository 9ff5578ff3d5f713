"""The lecture figures: one file each, run as python -m experiments.figures.NAME --out=DIR."""
