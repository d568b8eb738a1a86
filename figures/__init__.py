"""The drawings of plot.py: curves of runs, comparisons of evaluations, one group token by token (picture and
page)."""
