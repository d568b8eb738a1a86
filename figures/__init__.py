"""This package draws the figures of plot.py: curves of runs, comparisons of evaluations, and the tokens of one group
of rollouts, as a picture and as an HTML page."""
