"""This package has the drawings of plot.py: curves of runs, comparisons of evaluations, and one group token by token
(picture and page)."""
