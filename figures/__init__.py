"""This package draws the figures that plot.py writes: curves of runs, comparisons of evaluations, a picture of the
tokens of one group of rollouts, and an HTML page that shows the weight of every token under each method."""
