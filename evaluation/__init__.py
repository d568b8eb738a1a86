"""The details of eval.py: which problems (benchmarks, multiple_choice), the folder, the report, the statistics."""
