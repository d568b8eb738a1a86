"""What plot.py draws: curves of runs, comparisons of evaluations, one group token by token (picture and page)."""
