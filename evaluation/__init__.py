"""This package has the parts of eval.py: problems (benchmarks, multiple_choice), folder, report and statistics."""
