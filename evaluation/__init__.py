"""The parts of eval.py: problems (benchmarks, multiple_choice), the folder, the report, the statistics."""
